//! Brings the disks of a machine to a point, and releases them: from then on the service writes to none of them.
//!
//! Nothing is to be done for the newest point: the disks stand at it, once a pass that was interrupted is rolled back. An
//! older point is reached by a pass like any other, whose source is the view of that point: what it overwrites is saved,
//! so that it can be taken back.
//!
//! # The order of writes, and what a crash between two of them leaves
//!
//! (1) Open passes are rolled back. (2) On each disk a pass goes back, and is made durable with its end record. (3) The
//! release is recorded in the points log. A crash before (3) leaves open passes, which are rolled back when this, or the
//! next pass of the sender, is called again; after it the machine is released. To take it back: (4) the passes of (2) are
//! rolled back, (5) that is recorded, (6) their segments are let go of. A crash before (5) leaves the machine released,
//! and the same can be done again; after it, segments of passes that lead nowhere, which the next to write lets go of.

use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use time::OffsetDateTime;

use super::{Error, Journal, LONGEST_SEGMENT};
use crate::disk::device::{OpenDisk, TargetOptions, open_target};
use crate::disk::discover::Options;
use crate::journal::recover::{self, discard, roll_back, verify};
use crate::journal::{View, Writer};
use crate::name::Name;
use crate::points::{Kind, Log, PassOf, Point, PointId, Record, Released, TakenBack};
use crate::protection::{self, Assignment, Hold, Store};
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
                (To::Id(id), _) => format!("machine {machine} has no point {id}"),
                (_, Some(_)) => format!(
                    "machine {machine} has no such point that is one moment of its source; `mt-agent points {machine}` \
                     lists all, and one that is not can be named by its id, with --fuzzy"
                ),
            };
            Error::Refused(format!("{text}; see `mt-agent points {machine}`"))
        })
    }
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
    let _alone = alone(store, machine)?;
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
    let mut plan = Vec::new();
    for disk in &protection.disks {
        let at = point.volumes_of(machine).find(|at| at.disk == disk.name && at.id == disk.id);
        let Some(at) = at else {
            let text = format!("point {} has no disk {} of machine {machine}", point.id, disk.name);
            return Err(Error::Refused(format!("{text}: it was assigned later, or not sent")));
        };
        let journal = read(retention, machine, disk, log)?;
        // Everything that will be written is read before anything is, on any disk: a journal that is damaged leaves them
        // as they are.
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        journal.reaches(at.pass).map_err(failed)?;
        for pass in journal.history.after(at.pass).map_err(failed)? {
            verify(pass, &journal.shelf).map_err(failed)?;
        }
        plan.push((disk, at.pass, journal));
    }
    let mut disks = Vec::new();
    let mut passes = Vec::new();
    for (disk, pass, journal) in plan {
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
        let view = View::after(&history, pass, &journal.shelf).map_err(failed)?;
        report.brought_back = view.len();
        if !how.dry_run && (!open.is_empty() || !view.is_empty()) {
            let target = open_disk(store, retention, machine, disk)?;
            journal.tidy()?;
            for pass in open.iter().rev() {
                let (mut device, _) = device(&target, disk, how.engine)?;
                roll_back(pass, &journal.shelf, &mut device).map_err(failed)?;
                discard(pass, &journal.shelf)?;
            }
            if !view.is_empty() {
                let number = journal.next();
                go_back(machine, disk, &target, &journal, &view, number, how.engine)?;
                passes.push(PassOf { disk: disk.name.clone(), pass: number });
            }
        }
        disks.push(report);
    }
    if !how.dry_run {
        let released = Released { machine: machine.clone(), point: point.id, time: now(), passes };
        log.append(Record::Released(released))?;
    }
    Ok(Report { point: point.id, time: point.time, disks })
}

/// Takes a failover back: the disks stand at the newest point again, and the machine can be received.
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
    let Some(released) = log.released(machine).cloned() else {
        return Err(Error::Refused(format!("machine {machine} is not failed over")));
    };
    // All of it is read before anything is written.
    for disk in &protection.disks {
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        let journal = read(retention, machine, disk, log)?;
        let back = released.passes.iter().find(|back| back.disk == disk.name);
        if let Some(pass) = back.and_then(|back| journal.history.passes.get(&back.pass)) {
            verify(pass, &journal.shelf).map_err(failed)?;
        }
    }
    let (mut disks, mut gone) = (Vec::new(), Vec::new());
    for disk in &protection.disks {
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        let journal = read(retention, machine, disk, log)?;
        let back = released.passes.iter().find(|back| back.disk == disk.name);
        let mut rolled_back = 0;
        if let Some(back) = back {
            let Some(pass) = journal.history.passes.get(&back.pass).cloned() else {
                let text = format!("the journal of disk {} no longer has pass {}", disk.name, back.pass);
                return Err(Error::Refused(text));
            };
            let target = open_disk(store, retention, machine, disk)?;
            let (mut device, _) = device(&target, disk, engine)?;
            roll_back(&pass, &journal.shelf, &mut device).map_err(failed)?;
            rolled_back = pass.bytes;
            gone.push((pass, journal.shelf));
        }
        let (disk, id) = (disk.name.clone(), disk.id.to_string());
        disks.push(DiskReport { disk, id, rolled_back, brought_back: 0 });
    }
    log.append(Record::TakenBack(TakenBack { machine: machine.clone(), time: now() }))?;
    for (pass, shelf) in gone {
        discard(&pass, &shelf)?;
    }
    let point = log.newest(machine).map_or((released.point, released.time), |point| (point.id, point.time));
    Ok(Report { point: point.0, time: point.1, disks })
}

/// The machine for ourselves: against senders, and against the service's look at the retention, which takes a moment.
fn alone(store: &Store, machine: &Name) -> Result<Hold, Error> {
    let mut tries = 20;
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

fn read(retention: &Path, machine: &Name, disk: &Assignment, log: &Log) -> Result<Journal, Error> {
    let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
    Journal::read(retention, machine, &disk.name, &disk.id, log).map_err(failed)
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
const DEPTH: usize = 32;
/// Memory for what goes back.
const MEMORY: usize = 8 << 20;

fn device(target: &OpenDisk, disk: &Assignment, engine: EngineChoice) -> Result<(Device, Arena), Error> {
    let name = disk.id.to_string();
    let file =
        target.file.try_clone().map_err(|error| crate::error::IoError::new("duplicate", &*name, error))?;
    let arena = Arena::new(MEMORY).map_err(|error| crate::error::IoError::new("map", "memory", error))?;
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
    view: &View<'_>,
    number: u64,
    engine: EngineChoice,
) -> Result<(), Error> {
    let (device, arena) = device(target, disk, engine)?;
    let device = device.with_shelf(journal.shelf.clone());
    let (sender, events) = channel();
    // The receiver goes away after the volume.
    let report = Box::new(move |event| drop(sender.send(event)));
    let volume = Volume::start(disk.name.as_str(), Box::new(device), target.size.0, arena, report)?;
    volume.save(Writer::new(number, LONGEST_SEGMENT));
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
    view.each(|offset, bytes| {
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
