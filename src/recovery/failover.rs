//! Brings the disks of a machine to a point, and releases them: from then on the service writes to none of them.
//!
//! Nothing is to be done for the newest point: the disks stand at it, once a pass that was interrupted is rolled back. An
//! older point is reached by a pass like any other, whose source is the view of that point: what it overwrites is saved,
//! so that it can be taken back.
//!
//! # The order of writes, and what a crash between two of them leaves
//!
//! (1) That it begins, and to which point, is recorded in the points log: from here on nothing is received for the machine,
//! and the point is not let go. (2) Open passes are rolled back. (3) On each disk a pass goes back, and is made durable with
//! its end record. (4) A sample of each disk is taken, and the release is recorded. A crash between (1) and (4) leaves the
//! record of (1) and open passes: called again, to this point or another, the open passes are rolled back and it goes on; so
//! it does when the service starts. Or it is taken back, and then they are rolled back alone.
//!
//! To take it back: (5) the disks are held against what they were in (4), (6) that it is taken back is recorded, (7) the passes
//! of (3) are rolled back, (8) that it is done is recorded, (9) their segments are let go of. A crash between (6) and (8)
//! leaves the record of (6): it is done again, without (5), which would find what (7) wrote. After (8) it leaves segments of
//! passes that lead nowhere: they are rolled back once more, which changes nothing, and let go of.
//!
//! That the disks are released is in the protection as well, from after (4) until before (8): a log that does not know of it has
//! lost its end, and nothing else would keep the disks, which others may use, from being written to. A crash in between
//! leaves that it is not there, and then only that is not noticed. That the log lost (1) or (6) needs no such care: then nobody
//! has the disks, and what was begun is rolled back as any open pass is, or is found to be written to.

use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use time::OffsetDateTime;

use super::target::Target;
use super::{Error, Journal, LONGEST_SEGMENT};
use crate::disk::device::{OpenDisk, TargetOptions, open_target};
use crate::disk::discover::Options;
use crate::error::IoError;
use crate::journal::{View, Writer, recover, roll_back, verify};
use crate::name::Name;
use crate::points::{Begun, Kind, Log, Point, PointId, Record, Released, ReleasedDisk, TakenBack};
use crate::protection::{self, Assignment, Hold, Protection, Store};
use crate::storage::Geometry;
use crate::storage::device::{Device, EngineChoice};
use crate::sys::aligned::Arena;
use crate::units::ByteLen;
use crate::volume::{Event, Volume};

/// Which point is meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum To {
    /// The newest.
    Latest,
    /// The newest of kind `application`.
    LatestApplication,
    /// This one.
    Id(PointId),
    /// The only one with this name, or whose id begins so.
    Called(Name),
    /// The newest that is not after this moment.
    Time(OffsetDateTime),
}

impl To {
    /// The point of the machine that it means.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is none.
    pub fn find<'a>(&self, log: &'a Log, machine: &Name) -> Result<&'a Point, Error> {
        self.find_common(log, machine, &[])
    }

    /// The point of the machine and of all these others that it means.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is none.
    pub fn find_common<'a>(&self, log: &'a Log, machine: &Name, others: &[Name]) -> Result<&'a Point, Error> {
        let of_all = |point: &&Point| others.iter().all(|other| point.is_of(other));
        let mut points = log.points(machine).filter(of_all);
        let found = match self {
            // A moment is meant: what is none serves only whoever asks for it by its name.
            To::Latest => points.rfind(|point| !point.fuzzy),
            To::LatestApplication => points.rfind(|point| point.kind == Kind::Application && !point.fuzzy),
            To::Id(id) => log.get(*id).filter(|point| point.is_of(machine)).filter(of_all),
            To::Called(name) => only(points, machine, name)?,
            To::Time(time) => points.rfind(|point| point.time <= *time && !point.fuzzy),
        };
        if let (None, [other, ..]) = (found, others) {
            let text = format!(
                "machines {machine} and {other} have no such point together; `mt-agent points {machine}` shows those of their \
                 group, and each can be failed over alone"
            );
            return Err(Error::Refused(text));
        }
        found.ok_or_else(|| {
            let text = match (self, log.newest(machine)) {
                (_, None) => format!("machine {machine} has no points; the first pass of `mt-agent send` makes one"),
                (To::Id(id), _) => format!("machine {machine} has no point {id}; see `mt-agent points {machine}`"),
                (To::Called(name), _) => format!(
                    "machine {machine} has no point that is called {name} or whose id begins so; see `mt-agent points {machine}`"
                ),
                (_, Some(_)) => format!(
                    "machine {machine} has no such point that is one moment of its source; `mt-agent points {machine}` \
                     lists all, and one that is not can be named by its id, with --fuzzy"
                ),
            };
            Error::Refused(text)
        })
    }
}

/// The only point with this name, or whose id begins so, if there is one.
fn only<'a>(
    points: impl Iterator<Item = &'a Point>,
    machine: &Name,
    name: &Name,
) -> Result<Option<&'a Point>, Error> {
    let is_called =
        |point: &&Point| point.name.as_ref() == Some(name) || point.id.to_string().starts_with(name.as_str());
    let called: Vec<&Point> = points.filter(is_called).collect();
    let [first, _, ..] = called.as_slice() else { return Ok(called.first().copied()) };
    let count = called.len();
    let text = format!(
        "{count} points of machine {machine} are called {name}, or have an id that begins so, the oldest of them {} of {}; give the id of one, see `mt-agent points {machine}`",
        first.id,
        crate::units::rfc3339(first.time)
    );
    Err(Error::Refused(text))
}

/// How many points of a machine are newer than this one and no moment, so that they were not meant.
pub fn passed_over(log: &Log, machine: &Name, point: PointId) -> usize {
    log.points(machine).rev().take_while(|newer| newer.id != point).filter(|newer| newer.fuzzy).count()
}

/// What is allowed, and how.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Take a point that is no moment, too.
    pub fuzzy: bool,
    /// Change nothing, and say what would be.
    pub dry_run: bool,
    /// How disks are written.
    pub engine: EngineChoice,
}

/// What was done, or would be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// The point.
    pub point: PointId,
    /// Its moment.
    pub time: OffsetDateTime,
    /// The disks, released at it.
    pub disks: Vec<DiskReport>,
    /// Whether the disks were held against what they were when they were released.
    pub compared: bool,
}

/// One disk of a [`Report`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskReport {
    /// The machine's name for it.
    pub disk: Name,
    /// Its identity.
    pub id: String,
    /// How many bytes of an interrupted pass were rolled back.
    pub rolled_back: u64,
    /// How many bytes were brought back to the point.
    pub brought_back: u64,
}

/// Brings all disks of a machine to a point and releases them. To be called again where it was interrupted.
pub fn fail_over(
    retention: &Path,
    store: &Store,
    log: &mut Log,
    machine: &Name,
    to: &To,
    how: How,
) -> Result<Report, Error> {
    let protection = store.load(machine)?;
    // Nobody receives, and nobody begins to, until this is done.
    let _alone = match alone(store, machine) {
        // Whoever only looks is in nobody's way.
        Err(Error::Protection(protection::Error::Receiving { .. })) if how.dry_run => None,
        other => Some(other?),
    };
    log.settle()?;
    if let Some(released) = log.released(machine) {
        let text = format!(
            "machine {machine} was failed over already, to point {}; `mt-agent failover {machine} --undo` takes that back",
            released.point
        );
        return Err(Error::Refused(text));
    }
    let point = to.find(log, machine)?.clone();
    if point.fuzzy && !how.fuzzy {
        let text = format!(
            "point {} is no moment of its source, which was in use while it was read; give --fuzzy to take it all the same",
            point.id
        );
        return Err(Error::Refused(text));
    }
    let result = fail_over_to(retention, store, log, &protection, &point, how);
    // Beside the service it may have been let go of, and then it is not damaged.
    if result.is_err() && how.dry_run {
        log.refresh()?;
        if log.get(point.id).is_none() {
            return Err(Error::Refused(format!("point {} was let go of meanwhile", point.id)));
        }
    }
    result
}

fn fail_over_to(
    retention: &Path,
    store: &Store,
    log: &mut Log,
    protection: &Protection,
    point: &Point,
    how: How,
) -> Result<Report, Error> {
    let machine = &protection.machine;
    let mut plan = Vec::new();
    for disk in &protection.disks {
        let Some(at) = point.volumes_of(machine).find(|at| at.is_on(&disk.name, &disk.id)) else {
            return Err(Error::Refused(lacks(log, protection, point, disk)));
        };
        let journal = Journal::read(retention, machine, disk, log)?;
        // Everything that will be written is read before anything is, on any disk: a journal that is damaged leaves them
        // as they are.
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        journal.reaches(at.pass).map_err(failed)?;
        for pass in journal.history.after(at.pass).map_err(failed)? {
            verify(pass, &journal.shelf).map_err(failed)?;
        }
        // Nor is anything written before all disks can be.
        let target = match how.dry_run {
            true => None,
            false => Some(open_disk(store, retention, machine, disk)?),
        };
        plan.push((disk, at.pass, journal, target));
    }
    if !how.dry_run {
        let begun = Begun { machine: machine.clone(), point: Some(point.id), time: now() };
        log.append(Record::Begun(begun))?;
    }
    let (mut disks, mut released) = (Vec::new(), Vec::new());
    for (disk, pass, journal, target) in plan {
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        let open: Vec<_> = journal.open().map_err(failed)?.into_iter().cloned().collect();
        let mut report = DiskReport {
            disk: disk.name.clone(),
            id: disk.id.to_string(),
            rolled_back: open.iter().map(|pass| pass.bytes).sum(),
            brought_back: 0,
        };
        let mut history = journal.history.clone();
        open.iter().for_each(|pass| drop(history.passes.remove(&pass.number)));
        let view = View::after(&history, pass).map_err(failed)?;
        report.brought_back = view.len();
        if let Some(target) = target {
            journal.tidy().map_err(failed)?;
            for pass in open.iter().rev() {
                let (mut device, _) = device(&target, disk, how.engine)?;
                roll_back(pass, &journal.shelf, &mut device).map_err(failed)?;
                journal.discard(pass.number..=pass.number).map_err(failed)?;
            }
            let mut back = None;
            if !view.is_empty() {
                let number = journal.next();
                if let Err(error) = go_back(machine, disk, &target, &journal, &view, number, how.engine) {
                    // Where it was refused, nothing is begun any more: what it wrote is an open pass.
                    if matches!(error, Error::Refused(_)) {
                        log.append(Record::TakenBack(TakenBack { machine: machine.clone(), time: now() }))?;
                    }
                    return Err(error);
                }
                back = Some(number);
            }
            let sample = Target::of(&target)?.sample()?;
            released.push(ReleasedDisk { disk: disk.name.clone(), pass: back, sample });
        }
        disks.push(report);
    }
    if !how.dry_run {
        let released = Released { machine: machine.clone(), point: point.id, time: now(), disks: released };
        log.append(Record::Released(released))?;
        store.release(machine, Some(point.id))?;
    }
    Ok(Report { point: point.id, time: point.time, disks, compared: false })
}

/// That a point lacks a disk, and which one to take instead.
pub(super) fn lacks(log: &Log, protection: &Protection, point: &Point, disk: &Assignment) -> String {
    let machine = &protection.machine;
    let text = format!(
        "point {} has no disk {} of machine {machine}: it was assigned later, or not sent",
        point.id, disk.name
    );
    let has_all = |point: &&Point| {
        let has = |disk: &Assignment| point.volumes_of(machine).any(|at| at.is_on(&disk.name, &disk.id));
        !point.fuzzy && protection.disks.iter().all(has)
    };
    match log.points(machine).rfind(has_all) {
        Some(whole) => format!(
            "{text}; the newest point with all disks is that of {}: give {} in its place",
            crate::units::rfc3339(whole.time),
            whole.id
        ),
        None => {
            format!("{text}; there is no point with all disks yet, the next pass of all of them makes one")
        }
    }
}

/// Takes a failover back: the disks stand at the newest point again, and the machine can be received. To be called again
/// where it was interrupted, and for a failover that was.
pub fn undo(
    retention: &Path,
    store: &Store,
    log: &mut Log,
    machine: &Name,
    engine: EngineChoice,
) -> Result<Report, Error> {
    let protection = store.load(machine)?;
    let _alone = alone(store, machine)?;
    log.settle()?;
    let (released, begun) = (log.released(machine).cloned(), log.begun(machine).cloned());
    if released.is_none() && begun.is_none() {
        return Err(Error::Refused(format!("machine {machine} is not failed over")));
    }
    let mut plan = Vec::new();
    for disk in &protection.disks {
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        let journal = Journal::read(retention, machine, disk, log)?;
        // What leads back to the newest point: that which went to an older one, or, where that was interrupted, all that
        // leads nowhere.
        let back: Vec<_> = match &released {
            Some(_) => {
                let back = journal.standing.back;
                let gone = |pass| {
                    let text = format!("the journal of disk {} no longer has pass {pass}", disk.name);
                    Error::Refused(text)
                };
                back.map(|pass| journal.history.passes.get(&pass).cloned().ok_or_else(|| gone(pass)))
                    .into_iter()
                    .collect::<Result<_, _>>()?
            }
            None => journal.open().map_err(failed)?.into_iter().cloned().collect(),
        };
        // All of it is read before anything is written.
        for pass in &back {
            verify(pass, &journal.shelf).map_err(failed)?;
        }
        let target = open_disk(store, retention, machine, disk)?;
        if let (Some(released), None) = (&released, &begun)
            && let Some(place) = written_to(released, &disk.name, &journal, &Target::of(&target)?)?
        {
            return Err(Error::Written { machine: machine.clone(), disk: disk.name.clone(), place });
        }
        plan.push((disk, journal, back, target));
    }
    // What was interrupted was held against it before, or nobody had the disks yet.
    let compared = released.is_some() && begun.is_none();
    if compared {
        log.append(Record::Begun(Begun { machine: machine.clone(), point: None, time: now() }))?;
    }
    let mut disks = Vec::new();
    for (disk, journal, back, target) in &plan {
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        for pass in back.iter().rev() {
            let (mut device, _) = device(target, disk, engine)?;
            roll_back(pass, &journal.shelf, &mut device).map_err(failed)?;
        }
        let rolled_back = back.iter().map(|pass| pass.bytes).sum();
        disks.push(DiskReport {
            disk: disk.name.clone(),
            id: disk.id.to_string(),
            rolled_back,
            brought_back: 0,
        });
        // Where the points that it went back from were given up, their passes lead nowhere, and must not be rolled back.
        if back.is_empty() {
            journal.discard(journal.standing.committed() + 1..).map_err(failed)?;
        }
    }
    store.release(machine, None)?;
    log.append(Record::TakenBack(TakenBack { machine: machine.clone(), time: now() }))?;
    for (disk, journal, back, _) in &plan {
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        for pass in back {
            journal.discard(pass.number..=pass.number).map_err(failed)?;
        }
    }
    match log.newest(machine) {
        Some(point) => Ok(Report { point: point.id, time: point.time, disks, compared }),
        None => unreachable!("a machine is failed over to one of its points, which stays"),
    }
}

/// Where it shows that somebody wrote to a disk since it was released.
///
/// Looked at are the places of its [sample](crate::points::Sample), and all that was brought back to the point. What was
/// written elsewhere is not noticed: that would take reading all of the disk at the failover, and again.
pub(super) fn written_to(
    released: &Released,
    disk: &Name,
    journal: &Journal,
    target: &Target,
) -> Result<Option<&'static str>, Error> {
    let Some(then) = released.disks.iter().find(|then| then.disk == *disk) else { return Ok(None) };
    if let Some(place) = then.sample.differs(&target.sample()?) {
        return Ok(Some(place));
    }
    let (Some(back), Some(pass)) = (journal.standing.back, journal.standing.pass_at(released.point)) else {
        return Ok(None);
    };
    let mut history = journal.history.clone();
    history.passes.remove(&back);
    let read = |extent| target.read(extent).map_err(recover::Error::Io);
    let compared = View::after(&history, pass).and_then(|view| view.is_on(&journal.shelf, read));
    match compared {
        Ok(false) => Ok(Some("something that was brought back to the point")),
        // What was brought back cannot be read any more; to take it back, that is not needed.
        Ok(true) | Err(recover::Error::Corrupt { .. }) => Ok(None),
        Err(source) => Err(Error::Journal { machine: released.machine.clone(), disk: disk.clone(), source }),
    }
}

/// The machine for ourselves. A session whose sender has heard of its commit and is gone ends a moment later; one that waits
/// for a disk that is held has it for longer.
pub(super) fn alone(store: &Store, machine: &Name) -> Result<Hold, Error> {
    let mut tries = 60;
    loop {
        match store.exclude(machine) {
            Err(protection::Error::Receiving { .. }) if tries > 0 => {
                tries -= 1;
                std::thread::sleep(Duration::from_millis(50));
            }
            other => return Ok(other?),
        }
    }
}

/// The target, by all rules that hold whenever one is written.
fn open_disk(store: &Store, retention: &Path, machine: &Name, disk: &Assignment) -> Result<OpenDisk, Error> {
    let discovery = Options {
        assigned: store.assigned()?,
        retention: Some(retention.to_owned()),
        include_loop: disk.id.backing_file().is_some(),
        ..Options::default()
    };
    let options =
        TargetOptions { discovery, machine: Some(machine.to_string()), at_least: ByteLen(disk.size.0) };
    Ok(open_target(&disk.id, &options)?)
}

/// How many requests are under way at once.
const DEPTH: usize = 160;
/// Memory for what goes back.
const MEMORY: usize = 8 << 20;

fn device(target: &OpenDisk, disk: &Assignment, engine: EngineChoice) -> Result<(Device, Arena), Error> {
    let name = disk.id.to_string();
    let file = target.file.try_clone().map_err(|error| IoError::new("duplicate", &*name, error))?;
    let arena = Arena::new(MEMORY).map_err(|error| IoError::new("map", "memory", error))?;
    let geometry = Geometry { size: target.size.0, block: target.logical_block };
    let (device, _) = Device::new(file, name, geometry, engine, DEPTH, &arena)?;
    Ok((device, arena))
}

/// Why going back ends early.
enum Back {
    Volume(Error),
    Journal(recover::Error),
}

impl From<recover::Error> for Back {
    fn from(error: recover::Error) -> Back {
        Back::Journal(error)
    }
}

/// One pass back to what the view shows.
fn go_back(
    machine: &Name,
    disk: &Assignment,
    target: &OpenDisk,
    journal: &Journal,
    view: &View,
    number: u64,
    engine: EngineChoice,
) -> Result<(), Error> {
    let Some(lineage) = journal.standing.lineage else {
        unreachable!("a disk that goes back has points");
    };
    let (device, arena) = device(target, disk, engine)?;
    let device = device.with_shelf(journal.shelf.clone());
    let (sender, events) = channel();
    // The receiver goes away after the volume.
    let report = Box::new(move |event| drop(sender.send(event)));
    let volume = Volume::start(disk.name.as_str(), Box::new(device), target.size.0, arena, report)?;
    volume.save(Writer::new(lineage, number, LONGEST_SEGMENT));
    let no_room = || {
        let text = format!(
            "the retention file system has no room for what going back overwrites on disk {}: free some; nothing was \
             released",
            disk.name
        );
        Error::Refused(text)
    };
    // What became of what was given to the volume; `true` once all of it is flushed.
    let hear = |event| match event {
        Event::Flushed { .. } => Ok(true),
        Event::Faulted(source) => {
            Err(Error::Fault { machine: machine.clone(), disk: disk.name.clone(), source })
        }
        Event::Paused => Err(no_room()),
        Event::Written { .. } | Event::Resumed => Ok(false),
    };
    let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
    view.each(&journal.shelf, |offset, bytes| {
        let mut buffer = loop {
            match volume.arena().try_alloc(bytes.len()) {
                Some(buffer) => break buffer,
                // Writes under way hold it, or the journal waits for room.
                None => drop(events.recv().map(hear).unwrap_or(Ok(false)).map_err(Back::Volume)?),
            }
        };
        buffer.copy_from_slice(bytes);
        if volume.write(offset, buffer, 0).is_err() {
            unreachable!("a before-image lies where its disk was written");
        }
        Ok(())
    })
    .map_err(|error| match error {
        Back::Volume(error) => error,
        Back::Journal(error) => failed(error),
    })?;
    volume.flush();
    loop {
        match events.recv() {
            Ok(event) => {
                if hear(event)? {
                    break;
                }
            }
            Err(_) => unreachable!("the volume's thread answers every flush, or says why not"),
        }
    }
    volume.close();
    Ok(())
}

fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_nanosecond(0).unwrap_or(now)
}
