//! The file of the points log: read whole, appended to by one record at a time, durable before anyone is told.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use time::OffsetDateTime;

use super::{
    Begun, Dropped, Error, GivenUp, Narrowed, Point, PointId, Reason, Record, Refused, Released, TakenBack,
    VolumeAt, line,
};
use crate::error::{IoError, chain};
use crate::name::Name;
use crate::storage::{Scroll, scroll};

/// The name of the log in the retention directory.
pub const FILE_NAME: &str = "points.log";
/// A longer log is not read, and none is made: a point a minute of a hundred machines for two weeks is less.
const MAX_LOG: u64 = 1 << 30;
/// The directory of the journals, beside the log.
pub const JOURNALS: &str = "journals";
/// A log of fewer lines is not worth compacting.
const WORTH: usize = 1000;

/// The points log of a retention directory, as far as it was read.
///
/// Beside `points.log` the directory holds `.points.lock`: whoever appends has an exclusive `flock` of it, the
/// service and the commands alike. Reading needs none. What was read stays as it is until [`Log::append`],
/// [`Log::settle`] or [`Log::refresh`] looks again.
///
/// # What a crash leaves
///
/// *Appending* is one write behind the last line, and a flush. A crash within it leaves a part of the line as the very
/// last one: less than all of it, or sectors of zeros where the file got its length and not its content; or all of it,
/// durable or not. Nobody was told of it in either case. Readers pass over the part. What comes before is not touched:
/// it was flushed. A whole line whose checksum does not hold is no such part, and damage also where it is the last one.
///
/// *The next to append* cannot tell whether a whole last line is durable. So a `Log` appends only behind an end that it
/// made itself; otherwise it reads all, cuts off what is no line, flushes the file, and then the directory. From
/// there on every line is as durable as one that it appended. A crash between these leaves what was there before, or
/// the same without the part. [`Log::settle`] does this alone: whoever *acts* on a point that it did not record itself
/// settles first.
///
/// *Making the log*, and *compacting* it, replaces the file whole ([`Scroll::replace`]): a crash leaves the old one
/// or the new one, which mean the same, and perhaps a temporary file whose name begins with a dot. Should the flush
/// of the directory fail, either may be there after a power cut; so nothing is appended before the directory was
/// flushed with the file that has the name. So there is never a log without its first line, and since it is made before
/// the first journal is, never none where there are journals.
///
/// A *bad line with anything behind it* is left by no crash. It is [`Error::Corrupt`], and nothing is appended.
///
/// After a *failed write or flush* the kernel may have thrown away what it could not write and call it clean. The line
/// is taken out of the file as far as that can be done, and the `Log` takes nothing more. Nobody knows then
/// whether the record is there: [`reopen`](Log::reopen) the log before going on.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    scroll: Box<dyn Scroll>,
    state: State,
    /// Where to append, while nobody else did since: every line before it is durable, and so is the file's name.
    end: Option<u64>,
    latched: bool,
    /// At how many lines to look whether compacting pays.
    look_at: usize,
}

/// A point that the log still has: also a dropped one, while an older one needs its before-images. One that was narrowed is two:
/// dropped for the machines that it was taken from, and behind that kept for the others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The point.
    pub point: Point,
    /// When and why it was dropped, if it was.
    pub dropped: Option<(OffsetDateTime, Reason)>,
}

impl Entry {
    /// Whether its before-images may still be of use: those of a pass that was undone, or that an initial pass made
    /// worthless, are gone whatever is kept.
    pub fn has_images(&self) -> bool {
        !matches!(self.dropped, Some((_, Reason::Undo | Reason::Initial)))
    }
}

#[derive(Default, Debug)]
struct State {
    /// In the order of the log: older ones first.
    entries: Vec<Entry>,
    places: HashMap<PointId, usize>,
    released: BTreeMap<Name, Released>,
    begun: BTreeMap<Name, Begun>,
    /// How many records the file has.
    lines: usize,
}

impl Log {
    /// Reads the log of the retention directory `dir`. Where there is none it is empty, and nothing is created.
    ///
    /// # Errors
    /// [`Error::Corrupt`] or [`Error::Unsupported`] where it cannot be understood.
    pub fn open(dir: impl AsRef<Path>) -> Result<Log, Error> {
        let path = dir.as_ref().join(FILE_NAME);
        Log::on(Box::new(scroll::File::at(path.clone())), path)
    }

    /// The same, of what is called `path` and lies anywhere.
    pub(crate) fn on(scroll: Box<dyn Scroll>, path: PathBuf) -> Result<Log, Error> {
        let (state, _) = read_unlocked(&*scroll, &path)?;
        Ok(Log { path, scroll, state, end: None, latched: false, look_at: WORTH })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what others appended since.
    ///
    /// # Errors
    /// As [`Log::open`]; then what was read before stays.
    pub fn refresh(&mut self) -> Result<(), Error> {
        if !self.is_current()? {
            self.state = read_unlocked(&*self.scroll, &self.path)?.0;
        }
        Ok(())
    }

    /// Reads what others appended since, and makes sure that all of it is durable. Creates the log.
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn settle(&mut self) -> Result<(), Error> {
        let _exclusive = self.exclusive()?;
        self.ready().map(drop)
    }

    /// Opens it again after a failure, and settles it.
    ///
    /// # Errors
    /// Then it takes nothing, as before, and what was read before stays.
    pub fn reopen(&mut self) -> Result<(), Error> {
        (self.latched, self.end) = (false, None);
        self.settle().inspect_err(|_| self.latched = true)
    }

    /// Appends a record. It is durable when this returns, and before, in effect, nobody was told of it.
    ///
    /// # Errors
    /// [`Error::Refused`] where it contradicts what the log, also what others appended since, holds: nothing was
    /// written. After [`Error::Io`] see [`Log`].
    pub fn append(&mut self, record: Record) -> Result<(), Error> {
        let _exclusive = self.exclusive()?;
        self.ready()?;
        self.state.check(&record)?;
        let line = line::encode(&record).map_err(Refused::Line)?;
        if self.state.lines >= self.look_at {
            self.compact_if_it_pays();
        }
        let end = self.ready()?;
        if end + line.len() as u64 > MAX_LOG {
            return Err(Refused::Full(MAX_LOG).into());
        }
        if let Err(error) = self.scroll.append(end, &line).and_then(|()| self.scroll.flush()) {
            // Where this fails too there is nothing more to be done about it; the first error is the one to report.
            self.scroll.cut(end).unwrap_or_default();
            (self.latched, self.end) = (true, None);
            return Err(error.into());
        }
        self.end = Some(end + line.len() as u64);
        self.state.apply(record);
        Ok(())
    }

    /// Waits for the right to append. It is held for one record.
    fn exclusive(&mut self) -> Result<Box<dyn Any>, Error> {
        if self.latched {
            return Err(Error::Latched { file: self.path.clone() });
        }
        Ok(self.scroll.lock().inspect_err(|_| self.latched = true)?)
    }

    /// Whether the file is as this `Log` left it.
    fn is_current(&self) -> Result<bool, IoError> {
        self.end.map_or(Ok(false), |end| self.scroll.ends_at(end))
    }

    /// The end to append at, after reading and settling what others left. The caller has the lock.
    fn ready(&mut self) -> Result<u64, Error> {
        if let Some(end) = self.end
            && self.is_current()?
        {
            return Ok(end);
        }
        self.end = None;
        let (state, mut end) = read(&*self.scroll, &self.path)?;
        if end == 0 {
            let head = line::head();
            self.scroll.replace(&head)?;
            end = head.len() as u64;
        }
        // After a failed flush the next one may succeed without having written a thing.
        let bytes = self.scroll.settle(end).inspect_err(|_| self.latched = true)?;
        if bytes > 0 {
            let log = self.path.display();
            tracing::warn!(%log, bytes, "a part of a line is cut off, of a record that was being written and nobody was told of");
        }
        self.state = state;
        self.end = Some(end);
        Ok(end)
    }

    /// Replaces the file by one without the records that nobody needs, where these are most of them. That it fails
    /// loses nothing: the old file goes on. The caller has the lock.
    fn compact_if_it_pays(&mut self) {
        let needed = self.state.needed();
        self.look_at = WORTH.max(self.state.lines / 4 * 5);
        if self.state.lines <= needed.len() * 4 {
            return;
        }
        self.end = None;
        let written = encode_all(&needed)
            .map_err(|error| IoError::new("encode", self.path.display().to_string(), io::Error::other(error)))
            .and_then(|bytes| self.scroll.replace(&bytes));
        match written {
            Ok(()) => self.look_at = WORTH.max(needed.len() * 4),
            Err(error) => tracing::warn!(error = chain(&error), "the points log could not be compacted"),
        }
    }

    /// Everything that is in the log, older ones first; dropped points as long as older ones need their before-images.
    pub fn history(&self) -> &[Entry] {
        &self.state.entries
    }

    /// The points of a machine, oldest first.
    pub fn points<'a>(&'a self, machine: &Name) -> impl DoubleEndedIterator<Item = &'a Point> {
        self.state.kept().filter(move |point| point.is_of(machine))
    }

    /// The points of a disk, oldest first, and where it is at each. What passes up to that of the first one saved is of
    /// no use any more; the next pass has a number above that of the last one.
    pub fn volume<'a>(
        &'a self,
        machine: &Name,
        disk: &Name,
    ) -> impl DoubleEndedIterator<Item = (&'a Point, &'a VolumeAt)> {
        self.state.volume(machine, disk)
    }

    /// The newest point of a machine.
    pub fn newest(&self, machine: &Name) -> Option<&Point> {
        self.points(machine).next_back()
    }

    /// The newest point of a machine that is not after `time`.
    pub fn at(&self, machine: &Name, time: OffsetDateTime) -> Option<&Point> {
        self.points(machine).rfind(|point| point.time <= time)
    }

    /// The point of that name, unless it was dropped.
    pub fn get(&self, id: PointId) -> Option<&Point> {
        let entry = self.state.entries.get(*self.state.places.get(&id)?)?;
        entry.dropped.is_none().then_some(&entry.point)
    }

    /// Where the machine was failed over to, while it is.
    pub fn released(&self, machine: &Name) -> Option<&Released> {
        self.state.released.get(machine)
    }

    /// What writes the machine's disks, or did when it was interrupted.
    pub fn begun(&self, machine: &Name) -> Option<&Begun> {
        self.state.begun.get(machine)
    }

    /// All that was begun and is not done.
    pub fn all_begun(&self) -> impl Iterator<Item = &Begun> {
        self.state.begun.values()
    }

    /// The points at which machines are failed over, and those to which they are being failed over.
    pub fn in_use(&self) -> impl Iterator<Item = PointId> {
        self.state.in_use().map(|(_, point)| point)
    }
}

/// Reads the log while others may append.
fn read_unlocked(scroll: &dyn Scroll, path: &Path) -> Result<(State, u64), Error> {
    match read(scroll, path) {
        // Whoever cuts off a part and appends, while it is read, shows a line that never was. Damage stays.
        Err(Error::Corrupt { .. }) => read(scroll, path),
        read => read,
    }
}

/// What the log says, and where its last line ends: at 0 where there is none.
fn read(scroll: &dyn Scroll, path: &Path) -> Result<(State, u64), Error> {
    let Some(bytes) = scroll.read(MAX_LOG)? else {
        return match scroll.is_beside(JOURNALS)? {
            false => Ok((State::default(), 0)),
            true => Err(Error::Missing { file: path.to_owned() }),
        };
    };
    let mut state = State::default();
    let mut rest = bytes.as_slice();
    let mut number = 0;
    let end = |rest: &[u8]| (bytes.len() - rest.len()) as u64;
    while !rest.is_empty() {
        let corrupt = |number, what: String| Error::Corrupt { file: path.to_owned(), line: number, what };
        let Some(len) = rest.iter().position(|&byte| byte == b'\n') else {
            // A part of a line, at the very end.
            if rest.len() >= line::MAX_LINE {
                return Err(corrupt(number + 1, line::Error::TooLong.to_string()));
            }
            if line::is_whole(&rest[..rest.len() - 1]) {
                return Err(corrupt(number + 1, "another byte stands where the line ends".to_owned()));
            }
            break;
        };
        let (line, behind) = (&rest[..len], &rest[len + 1..]);
        let read = match number {
            0 => line::parse_head(line).map(|()| None),
            _ => line::parse(line).map(Some),
        };
        match read {
            Ok(None) => {}
            Ok(Some(record)) => {
                state.check(&record).map_err(|refused| corrupt(number + 1, refused.to_string()))?;
                state.apply(record);
            }
            // The same, of a line whose last bytes were written and not all of the first.
            Err(line::Error::Form | line::Error::Checksum { .. })
                if behind.is_empty()
                    && line::lacks_a_sector(line, end(rest))
                    && !line::hides_another(line) =>
            {
                break;
            }
            Err(line::Error::Version(version)) => {
                return Err(Error::Unsupported { file: path.to_owned(), version });
            }
            Err(error) => return Err(corrupt(number + 1, error.to_string())),
        }
        rest = behind;
        number += 1;
    }
    if number == 0 {
        let what = "the first line of the log is missing".to_owned();
        return Err(Error::Corrupt { file: path.to_owned(), line: 1, what });
    }
    Ok((state, end(rest)))
}

fn encode_all(records: &[Record]) -> Result<Vec<u8>, line::Error> {
    let mut bytes = line::head();
    for record in records {
        bytes.extend(line::encode(record)?);
    }
    Ok(bytes)
}

impl State {
    fn kept(&self) -> impl DoubleEndedIterator<Item = &Point> {
        self.entries.iter().filter(|entry| entry.dropped.is_none()).map(|entry| &entry.point)
    }

    fn volume<'a>(
        &'a self,
        machine: &Name,
        disk: &Name,
    ) -> impl DoubleEndedIterator<Item = (&'a Point, &'a VolumeAt)> {
        self.kept().filter_map(move |point| {
            let volume = point.volumes.iter().find(|at| (&at.machine, &at.disk) == (machine, disk))?;
            Some((point, volume))
        })
    }

    fn find(&self, id: PointId) -> Result<&Point, Refused> {
        let entry = self.places.get(&id).and_then(|&place| self.entries.get(place));
        match entry {
            Some(Entry { point, dropped: None }) => Ok(point),
            _ => Err(Refused::NoPoint(id)),
        }
    }

    /// Whether the record may follow.
    fn check(&self, record: &Record) -> Result<(), Refused> {
        match record {
            Record::Point(point) => {
                if self.places.contains_key(&point.id) {
                    return Err(Refused::Known(point.id));
                }
                for volume in &point.volumes {
                    self.not_begun(&volume.machine)?;
                    if let Some(released) = self.released.get(&volume.machine) {
                        return Err(Refused::Released {
                            machine: released.machine.clone(),
                            point: released.point,
                        });
                    }
                    self.follows(volume)?;
                }
                Ok(())
            }
            Record::Dropped(dropped) => dropped.points.iter().try_for_each(|&id| self.may_go(id, None)),
            Record::Narrowed(Narrowed { point, machines, .. }) => {
                let volumes = &self.find(*point)?.volumes;
                let is_of = |machine: &Name| volumes.iter().any(|at| at.machine == *machine);
                if !machines.iter().all(is_of) || volumes.iter().all(|at| machines.contains(&at.machine)) {
                    return Err(Refused::Narrow(*point));
                }
                self.may_go(*point, None)
            }
            Record::GivenUp(GivenUp { machine, points, .. }) => {
                points.iter().try_for_each(|&id| self.may_go(id, Some(machine)))
            }
            Record::Begun(Begun { machine, point: Some(point), .. }) => {
                if let Some(Released { machine, point, .. }) = self.released.get(machine).cloned() {
                    return Err(Refused::Released { machine, point });
                }
                self.has(*point, machine)
            }
            Record::Begun(Begun { machine, point: None, .. }) => match self.released.contains_key(machine) {
                true => Ok(()),
                false => Err(Refused::NotReleased(machine.clone())),
            },
            Record::Released(released) => self.has(released.point, &released.machine),
            Record::TakenBack(TakenBack { machine, .. }) => {
                match self.released.contains_key(machine) || self.begun.contains_key(machine) {
                    true => Ok(()),
                    false => Err(Refused::NotReleased(machine.clone())),
                }
            }
        }
    }

    /// Whether there is this point, of this machine.
    fn has(&self, point: PointId, machine: &Name) -> Result<(), Refused> {
        match self.find(point)?.is_of(machine) {
            true => Ok(()),
            false => Err(Refused::NotOf { point, machine: machine.clone() }),
        }
    }

    /// Whether there is this point, and no machine but perhaps `but` is failed over to it, or about to be.
    fn may_go(&self, id: PointId, but: Option<&Name>) -> Result<(), Refused> {
        self.find(id)?;
        match self.in_use().find(|(machine, point)| *point == id && but != Some(machine)) {
            Some((machine, point)) => Err(Refused::Released { machine: machine.clone(), point }),
            None => Ok(()),
        }
    }

    fn not_begun(&self, machine: &Name) -> Result<(), Refused> {
        self.begun.get(machine).map_or(Ok(()), |begun| Err(Refused::Begun(begun.clone())))
    }

    /// The machines that are failed over, or being failed over, and the points.
    fn in_use(&self) -> impl Iterator<Item = (&Name, PointId)> {
        let begun = self.begun.values().filter_map(|begun| Some((&begun.machine, begun.point?)));
        self.released.values().map(|released| (&released.machine, released.point)).chain(begun)
    }

    /// Whether the pass is one after that of the volume's newest point.
    fn follows(&self, volume: &VolumeAt) -> Result<(), Refused> {
        match self.volume(&volume.machine, &volume.disk).next_back() {
            Some((_, last)) if last.pass >= volume.pass => Err(Refused::Pass {
                machine: volume.machine.clone(),
                disk: volume.disk.clone(),
                pass: volume.pass,
                last: last.pass,
            }),
            _ => Ok(()),
        }
    }

    /// Takes a record that passed [`State::check`].
    fn apply(&mut self, record: Record) {
        self.lines += 1;
        match record {
            Record::Point(point) => {
                self.places.insert(point.id, self.entries.len());
                self.entries.push(Entry { point, dropped: None });
            }
            Record::Dropped(Dropped { time, reason, points }) => {
                self.drop_points(&points, time, reason);
            }
            Record::Narrowed(Narrowed { point, time, reason, machines }) => {
                self.narrow(point, time, reason, &machines);
            }
            Record::GivenUp(GivenUp { machine, time, points }) => {
                self.drop_points(&points, time, Reason::Asked);
                // In one step, so that no crash leaves a machine that is failed over to nothing, or not at all and written to.
                let at = self.released.get(&machine).map(|released| released.point);
                let to = self.begun.get(&machine).and_then(|begun| begun.point);
                if at.or(to).is_some_and(|point| points.contains(&point)) {
                    self.released.remove(&machine);
                    self.begun.remove(&machine);
                }
            }
            Record::Begun(begun) => {
                self.begun.insert(begun.machine.clone(), begun);
            }
            Record::Released(released) => {
                self.begun.remove(&released.machine);
                self.released.insert(released.machine.clone(), released);
            }
            Record::TakenBack(TakenBack { machine, .. }) => {
                self.begun.remove(&machine);
                self.released.remove(&machine);
            }
        }
    }

    fn drop_points(&mut self, points: &[PointId], time: OffsetDateTime, reason: Reason) {
        for place in points.iter().filter_map(|id| self.places.get(id)) {
            self.entries[*place].dropped = Some((time, reason));
        }
    }

    /// Takes a point from all machines but these.
    fn narrow(&mut self, id: PointId, time: OffsetDateTime, reason: Reason, machines: &[Name]) {
        let Some(&place) = self.places.get(&id) else { return };
        let Some(entry) = self.entries.get_mut(place) else { return };
        entry.dropped = Some((time, reason));
        let mut point = entry.point.clone();
        entry.point.volumes.retain(|at| !machines.contains(&at.machine));
        point.volumes.retain(|at| machines.contains(&at.machine));
        point.group = None;
        self.entries.insert(place + 1, Entry { point, dropped: None });
        let moved = self.entries.iter().zip(0..).skip(place + 1);
        self.places.extend(moved.map(|(entry, place)| (entry.point.id, place)));
    }

    /// The records without which something that matters would be forgotten: not those of dropped points, unless an
    /// older point of one of their disks is kept, whose way back leads through their before-images, or it is the last one
    /// of a disk: that it is there shows that the log goes as far as the disk does.
    fn needed(&self) -> Vec<Record> {
        let mut last = HashMap::new();
        for (place, entry) in self.entries.iter().enumerate() {
            last.extend(entry.point.volumes.iter().map(|volume| ((&volume.machine, &volume.disk), place)));
        }
        let last: HashSet<usize> = last.into_values().collect();
        let mut kept = HashSet::new();
        let mut points = Vec::new();
        let mut dropped = Vec::new();
        let mut place = 0;
        // A point that was narrowed has several entries, one behind the other.
        for parts in self.entries.chunk_by(|one, next| one.point.id == next.point.id) {
            let is_needed = |(entry, place): (&Entry, usize)| {
                let mut volumes = entry.point.volumes.iter().map(|volume| (&volume.machine, &volume.disk));
                entry.dropped.is_none()
                    || last.contains(&place)
                    || entry.has_images() && volumes.any(|volume| kept.contains(&volume))
            };
            let first = parts.iter().zip(place..).position(is_needed);
            place += parts.len();
            let Some((parts, newest)) =
                first.map(|first| &parts[first..]).and_then(|parts| Some((parts, parts.last()?)))
            else {
                continue;
            };
            let mut point = parts[0].point.clone();
            point.volumes = parts.iter().flat_map(|part| part.point.volumes.clone()).collect();
            let id = point.id;
            points.push(Record::Point(point));
            if let ([Entry { dropped: Some((time, reason)), .. }, ..], true) = (parts, parts.len() > 1) {
                let machines: BTreeSet<&Name> = newest.point.volumes.iter().map(|at| &at.machine).collect();
                let machines = machines.into_iter().cloned().collect();
                let narrowed = Narrowed { point: id, time: *time, reason: *reason, machines };
                dropped.push(Record::Narrowed(narrowed));
            }
            match newest.dropped {
                Some((time, reason)) => {
                    dropped.push(Record::Dropped(Dropped { time, reason, points: vec![id] }));
                }
                None => {
                    kept.extend(newest.point.volumes.iter().map(|volume| (&volume.machine, &volume.disk)))
                }
            }
        }
        points.append(&mut dropped);
        points.extend(self.released.values().cloned().map(Record::Released));
        points.extend(self.begun.values().cloned().map(Record::Begun));
        points
    }
}
