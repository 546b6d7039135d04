//! A machine whose disks are received and brought back by the library's own pieces, in the order in which the service and
//! `mt-agent failover` do it: for tests of what the pieces come to together, on whatever disks.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};

use mt_agent::disk::id::DiskId;
use mt_agent::journal::recover::{self, recover};
use mt_agent::journal::roll_back;
use mt_agent::journal::{View, Writer, verify};
use mt_agent::name::Name;
use mt_agent::pass::{Lineage, PassId};
use mt_agent::points::{
    Begun, Dropped, Kind, Log, Point, PointId, Reason, Record, Released, ReleasedDisk, Sample, TakenBack,
    VolumeAt,
};
use mt_agent::recovery::{Journal, Standing, let_go, place};
use mt_agent::storage::Storage;
use mt_agent::storage::shelf::Directory;
use mt_agent::sys::aligned::Arena;
use mt_agent::units::Extent;
use mt_agent::volume::{Event, Volume};
use time::OffsetDateTime;

use super::MACHINE;

/// Where it is killed within something that concerns all disks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Killed {
    No,
    /// When the first of the disks is done.
    AfterOneDisk,
    /// When all are, and the record that counts is not written.
    BeforeTheRecord,
}

/// Opens a disk, for passes with segments in this directory.
pub type Open = Box<dyn Fn(&Arena, Directory) -> Box<dyn Storage>>;

/// A disk, with how it is opened.
pub struct Disk {
    pub name: &'static str,
    pub size: u64,
    pub open: Open,
    /// What it holds, for a journal whose newest record is torn.
    pub read: Box<dyn Fn(Extent) -> Vec<u8> + Sync>,
}

/// One disk that is being received.
pub struct Session {
    pub volume: Volume,
    events: Receiver<Event>,
    lineage: Lineage,
    pass: u64,
}

impl Session {
    /// Writes bytes from `at` on.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        for (index, bytes) in bytes.chunks(16 << 10).enumerate() {
            let mut buffer = self.volume.arena().alloc_blocking(bytes.len());
            buffer.copy_from_slice(bytes);
            self.volume.write(at + (index << 14) as u64, buffer, 0).unwrap();
        }
    }

    /// What the journal of the pass takes.
    fn flush(&self) -> u64 {
        self.volume.flush();
        loop {
            match self.events.recv().unwrap() {
                Event::Flushed { saved } => return saved,
                Event::Written { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

pub struct House {
    pub retention: PathBuf,
    pub log: Log,
    disks: Vec<Disk>,
    /// The longest segment.
    segment: u64,
    sessions: Option<Vec<Session>>,
    next: u128,
}

pub fn machine() -> Name {
    MACHINE.parse().unwrap()
}

fn id(disk: &Disk) -> DiskId {
    format!("loop:/images/{}", disk.name).parse().unwrap()
}

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

impl House {
    /// With a retention directory that may have the log of one.
    pub fn open(retention: &Path, disks: Vec<Disk>, segment: u64) -> House {
        let mut log = Log::open(retention).unwrap();
        log.settle().unwrap();
        House { retention: retention.to_owned(), log, disks, segment, sessions: None, next: 1 }
    }

    fn name(&self, disk: usize) -> Name {
        self.disks[disk].name.parse().unwrap()
    }

    fn standing(&self, disk: usize) -> Standing {
        Standing::of(&machine(), &self.name(disk), &id(&self.disks[disk]), &self.log)
    }

    /// As [`Journal::read`] does, which looks for the disk among those of this host.
    fn journal(&self, disk: usize) -> Journal {
        let (standing, shelf) = (self.standing(disk), Directory::at(self.place(disk)));
        let read = &self.disks[disk].read;
        let holds = |extent| Ok(read(extent));
        let history = recover(&shelf, &|lineage| standing.is_ours(lineage), &holds).unwrap();
        Journal { shelf, history, standing }
    }

    fn place(&self, disk: usize) -> PathBuf {
        place(&self.retention, &machine(), &self.name(disk))
    }

    fn storage(&self, disk: usize, arena: &Arena) -> Box<dyn Storage> {
        (self.disks[disk].open)(arena, Directory::create_all(self.place(disk)).unwrap())
    }

    fn session(&self, disk: usize, lineage: Lineage, writer: Option<Writer>, pass: u64) -> Session {
        let arena = Arena::new(128 << 10).unwrap();
        let (sender, events) = channel();
        let report = Box::new(move |event| drop(sender.send(event)));
        let Disk { name, size, .. } = self.disks[disk];
        let volume = Volume::start(name, self.storage(disk, &arena), size, arena, report).unwrap();
        if let Some(writer) = writer {
            volume.save(writer);
        }
        Session { volume, events, lineage, pass }
    }

    /// Whether disks are being received.
    pub fn is_receiving(&self) -> bool {
        self.sessions.is_some()
    }

    /// Ends the sessions. What was sent arrives.
    pub fn close(&mut self) {
        self.sessions = None;
    }

    /// Kills whoever has the disks open, and reads everything anew.
    pub fn restart(&mut self) {
        self.close();
        self.log = Log::open(&self.retention).unwrap();
        self.log.settle().unwrap();
    }

    /// The session of a disk: of a pass that begins now on all disks, or of one that goes on, where none is there.
    pub fn receiving(&mut self, disk: usize) -> &Session {
        if self.sessions.is_none() {
            let begin = |disk| {
                let journal = self.journal(disk);
                journal.tidy().unwrap();
                let lineage = journal.standing.lineage.expect("the first pass is an initial one");
                let writer = match journal.open().unwrap().last() {
                    Some(open) => recover::go_on(open, lineage, self.segment, &journal.shelf).unwrap(),
                    None => Writer::new(lineage, journal.next(), self.segment),
                };
                let pass = writer.pass();
                self.session(disk, lineage, Some(writer), pass)
            };
            self.sessions = Some((0..self.disks.len()).map(begin).collect());
        }
        &self.sessions.as_ref().unwrap()[disk]
    }

    /// Ends the pass. The point that it became, or none where it was killed.
    pub fn commit(&mut self, killed: Killed) -> Option<PointId> {
        self.receiving(0);
        let sessions = self.sessions.take().unwrap();
        let mut volumes = Vec::new();
        for (disk, session) in self.until(killed).zip(&sessions) {
            let bytes = session.flush();
            volumes.push(self.at(disk, session, bytes));
        }
        drop(sessions);
        self.record(killed, volumes)
    }

    /// The disks that are done before it is killed.
    fn until(&self, killed: Killed) -> std::ops::Range<usize> {
        0..if killed == Killed::AfterOneDisk { 1 } else { self.disks.len() }
    }

    fn at(&self, disk: usize, session: &Session, bytes: u64) -> VolumeAt {
        let (machine, id, sender_pass) = (machine(), id(&self.disks[disk]), PassId(self.next));
        let &Session { lineage, pass, .. } = session;
        VolumeAt { machine, disk: self.name(disk), id, lineage, pass, sender_pass, bytes }
    }

    fn record(&mut self, killed: Killed, volumes: Vec<VolumeAt>) -> Option<PointId> {
        if killed != Killed::No {
            self.restart();
            return None;
        }
        let (id, time) = (PointId(self.next), now());
        self.next += 1;
        let (kind, fuzzy, name, group) = (Kind::Crash, false, None, None);
        let point = Point { id, time, recorded: time, kind, fuzzy, name, group, volumes };
        self.log.append(Record::Point(point)).unwrap();
        Some(id)
    }

    /// An initial pass, which overwrites the disks in place; all points go.
    pub fn initial(&mut self, contents: &[Vec<u8>], killed: Killed) -> Option<PointId> {
        self.close();
        let journals: Vec<_> = (0..self.disks.len()).map(|disk| self.journal(disk)).collect();
        let points = self.log.points(&machine()).map(|point| point.id).collect();
        self.drop_points(points, Reason::Initial, false);
        let mut volumes = Vec::new();
        for disk in self.until(killed) {
            let journal = &journals[disk];
            journal.discard(..).unwrap();
            let session = self.session(disk, Lineage::random().unwrap(), None, journal.next());
            session.write(0, &contents[disk]);
            session.flush();
            volumes.push(self.at(disk, &session, 0));
        }
        self.record(killed, volumes)
    }

    /// Lets go of points; `swept`: and of the segments that nobody needs then.
    pub fn drop_points(&mut self, points: Vec<PointId>, reason: Reason, swept: bool) {
        if !points.is_empty() {
            self.log.append(Record::Dropped(Dropped { time: now(), reason, points })).unwrap();
        }
        if swept {
            for disk in 0..self.disks.len() {
                let_go(&self.retention, &machine(), &self.name(disk), &self.standing(disk)).unwrap();
            }
        }
    }

    /// Rolls back the pass that is open on a disk, if one is.
    pub fn roll_back(&self, disk: usize) {
        let journal = self.journal(disk);
        journal.tidy().unwrap();
        for pass in journal.open().unwrap().into_iter().rev() {
            verify(pass, &journal.shelf).unwrap();
            roll_back(pass, &journal.shelf, &mut *self.storage(disk, &Arena::new(1).unwrap())).unwrap();
            journal.discard(pass.number..=pass.number).unwrap();
        }
    }

    /// The pass of a disk that led to a point.
    pub fn pass(&self, point: PointId, disk: usize) -> u64 {
        self.log.get(point).unwrap().volumes[disk].pass
    }

    /// Brings the disks back to a point and releases them.
    pub fn fail_over(&mut self, point: PointId, killed: Killed) {
        self.close();
        let begun = Begun { machine: machine(), point: Some(point), time: now() };
        self.log.append(Record::Begun(begun)).unwrap();
        let mut disks = Vec::new();
        for disk in self.until(killed) {
            let pass = self.pass(point, disk);
            self.journal(disk).reaches(pass).unwrap();
            self.roll_back(disk);
            let journal = self.journal(disk);
            let view = View::after(&journal.history, pass).unwrap();
            let mut back = None;
            if !view.is_empty() {
                let (lineage, pass) = (journal.standing.lineage.unwrap(), journal.next());
                let writer = Writer::new(lineage, pass, self.segment);
                let session = self.session(disk, lineage, Some(writer), pass);
                view.each(&journal.shelf, |at, bytes| {
                    session.write(at, bytes);
                    Ok::<(), recover::Error>(())
                })
                .unwrap();
                session.flush();
                back = Some(pass);
            }
            // Who looks at the disk before it is taken back is none of the library's pieces.
            let sample = Sample { head: 0, tail: 0, between: 0 };
            disks.push(ReleasedDisk { disk: self.name(disk), pass: back, sample });
        }
        if killed == Killed::No {
            let released = Released { machine: machine(), point, time: now(), disks };
            self.log.append(Record::Released(released)).unwrap();
        } else {
            self.restart();
        }
    }

    /// Takes that back, also where it was killed.
    pub fn undo(&mut self, killed: Killed) {
        let released = self.log.released(&machine()).is_some();
        if self.log.begun(&machine()).is_none() {
            let begun = Begun { machine: machine(), point: None, time: now() };
            self.log.append(Record::Begun(begun)).unwrap();
        }
        let mut gone = Vec::new();
        for disk in self.until(killed) {
            let journal = self.journal(disk);
            let back: Vec<_> = match released {
                true => {
                    journal.standing.back.iter().map(|pass| journal.history.passes[pass].clone()).collect()
                }
                false => journal.open().unwrap().into_iter().cloned().collect(),
            };
            for pass in back.iter().rev() {
                verify(pass, &journal.shelf).unwrap();
                roll_back(pass, &journal.shelf, &mut *self.storage(disk, &Arena::new(1).unwrap())).unwrap();
            }
            gone.push((journal, back));
        }
        if killed == Killed::No {
            self.log.append(Record::TakenBack(TakenBack { machine: machine(), time: now() })).unwrap();
            for (journal, back) in gone {
                back.iter().for_each(|pass| journal.discard(pass.number..=pass.number).unwrap());
            }
        } else {
            self.restart();
        }
    }

    /// What a disk was at each point that is kept, oldest first, read through its journal over what it holds: `bytes`, which
    /// must have been read before this is called.
    pub fn views(&self, disk: usize, bytes: &[u8]) -> Vec<(PointId, Vec<u8>)> {
        let journal = self.journal(disk);
        let view = |point: &Point| {
            let pass = self.pass(point.id, disk);
            journal.reaches(pass).unwrap();
            let mut bytes = bytes.to_owned();
            let view = View::after(&journal.history, pass).unwrap();
            view.overlay(&journal.shelf, 0, &mut bytes).unwrap();
            (point.id, bytes)
        };
        self.log.points(&machine()).map(view).collect()
    }
}
