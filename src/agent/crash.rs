//! What a power cut leaves of a machine with two disks, at every moment of scripted runs, and what recovery makes of it.
//!
//! The disks, the journal of each and the points log lose their power in one instant: what happens to them has one order, and
//! of each what was not flushed survives as it may. What is recorded goes through the service's own [`Coordinator`]; what its
//! sessions and `failover` do around that is done here in the same order, as they work on devices.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use rand::rngs::StdRng as Dice;
use rand::{Rng, RngExt, SeedableRng};
use time::OffsetDateTime;
use tokio::sync::watch;

use super::commit::{Coordinator, Ticket};
use crate::disk::id::DiskId;
use crate::journal::recover::{self, History, Pass, go_on, let_go, recover, tidy};
use crate::journal::{View, Writer, roll_back, verify};
use crate::name::Name;
use crate::net::message::{Begin, Commit, PassKind};
use crate::net::session::Stage;
use crate::pass::{Lineage, PassId};
use crate::points::{
    self, Begun, Dropped, Kind, Log, Point, PointId, Reason, Record, Released, ReleasedDisk, Sample,
    TakenBack, VolumeAt,
};
use crate::recovery::Standing;
use crate::storage::fault::{Content, Event, FaultDisk, Replay};
use crate::units::Extent;
use crate::volume::crash::{SECTOR, SEGMENT, SIZE, Session, scribble, torn};

const DISKS: [&str; 2] = ["root", "data"];
const THEN: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

fn machine() -> Name {
    "web01".parse().unwrap()
}

fn name(disk: usize) -> Name {
    DISKS[disk].parse().unwrap()
}

fn target(disk: usize) -> DiskId {
    format!("loop:/{}", DISKS[disk]).parse().unwrap()
}

fn standing(disk: usize, log: &Log) -> Standing {
    Standing::of(&machine(), &name(disk), &target(disk), log)
}

/// The machine's disks, each with its journal, and the points log.
struct Rig {
    disks: [FaultDisk; 2],
    log: FaultDisk,
}

impl Rig {
    fn with([root, data, log]: [Content; 3]) -> Rig {
        let log = FaultDisk::with(log, SECTOR);
        let disks = [root, data].map(|content| FaultDisk::with(content, SECTOR).beside(&log));
        Rig { disks, log }
    }

    fn all(&self) -> [&FaultDisk; 3] {
        [&self.disks[0], &self.disks[1], &self.log]
    }

    fn contents(&self) -> [Content; 3] {
        self.all().map(FaultDisk::content)
    }

    fn bytes(&self) -> [Vec<u8>; 2] {
        self.disks.each_ref().map(FaultDisk::bytes)
    }

    fn moments(&self) -> Moments {
        Moments(self.all().map(FaultDisk::replay))
    }

    /// The log, settled, as a service that starts has it.
    fn settle(&self) -> Log {
        let scroll = Box::new(self.log.scroll(points::FILE_NAME));
        let mut log = Log::on(scroll, points::FILE_NAME.into()).unwrap();
        log.settle().unwrap();
        log
    }

    fn journal(&self, disk: usize, standing: &Standing) -> History {
        let disk = &self.disks[disk];
        let holds =
            |extent: Extent| Ok(disk.bytes()[extent.offset() as usize..extent.end() as usize].to_vec());
        recover(&disk.shelf(), &|lineage| standing.is_ours(lineage), &holds).unwrap()
    }

    /// Brings one disk back to where it stands, as whoever is about to write it does.
    fn recover(&self, disk: usize, standing: &Standing) {
        self.tidy(disk, standing);
        let history = self.journal(disk, standing);
        for pass in history.after(standing.committed()).unwrap().into_iter().rev() {
            self.roll_back(disk, pass);
            self.discard(disk, standing, pass.number..=pass.number);
        }
    }

    fn tidy(&self, disk: usize, standing: &Standing) {
        tidy(&self.disks[disk].shelf()).unwrap();
        self.discard(disk, standing, ..=standing.oldest());
    }

    fn roll_back(&self, disk: usize, pass: &Pass) {
        let disk = &self.disks[disk];
        roll_back(pass, &disk.shelf(), &mut disk.open().unwrap()).unwrap();
    }

    fn discard(&self, disk: usize, standing: &Standing, passes: impl std::ops::RangeBounds<u64>) {
        let_go(&self.disks[disk].shelf(), passes, &|lineage| standing.is_ours(lineage)).unwrap();
    }

    /// Takes a failover back, one that was begun or one that is done, by the steps (7) to (9) of `recovery::failover`.
    fn take_back(&self, told: &Told, append: impl FnOnce(Record)) {
        let mut undone = Vec::new();
        for (disk, standing) in told.standings.iter().enumerate() {
            let history = self.journal(disk, standing);
            let back: Vec<Pass> = match told.kept.released {
                Some(_) => standing.back.iter().map(|back| history.passes[back].clone()).collect(),
                None => history.after(standing.committed()).unwrap().into_iter().cloned().collect(),
            };
            back.iter().rev().for_each(|pass| self.roll_back(disk, pass));
            undone.push(back);
        }
        append(Record::TakenBack(TakenBack { machine: machine(), time: THEN }));
        for (disk, back) in undone.iter().enumerate() {
            for pass in back {
                self.discard(disk, &told.standings[disk], pass.number..=pass.number);
            }
        }
    }
}

/// What happened to a rig, gone through up to some moment.
struct Moments([Replay; 3]);

impl Moments {
    /// Goes one event further; gives the number of a mark where it was one.
    fn step(&mut self) -> Option<Option<u64>> {
        let next = self.0.iter_mut().filter(|replay| replay.moment().is_some());
        match next.min_by_key(|replay| replay.moment())?.step() {
            Some(Event::Mark(number)) => Some(Some(*number)),
            _ => Some(None),
        }
    }

    fn is_certain(&self) -> bool {
        self.0.iter().all(Replay::is_certain)
    }

    fn torn(&self, rng: &mut Dice) -> [Content; 3] {
        self.0.each_ref().map(|replay| torn(replay, rng))
    }
}

/// Which points there are, oldest first, and the one at which the disks are released; else they stand at the newest.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
struct Kept {
    points: Vec<PointId>,
    released: Option<PointId>,
}

impl Kept {
    fn and(&self, point: PointId) -> Kept {
        Kept { points: [&*self.points, &[point]].concat(), released: self.released }
    }

    fn stands_at(&self) -> Option<PointId> {
        self.released.or(self.points.last().copied())
    }
}

/// What the log says.
struct Told {
    kept: Kept,
    points: Vec<Point>,
    begun: bool,
    standings: [Standing; 2],
}

impl Told {
    fn by(log: &Log) -> Told {
        let points: Vec<Point> = log.points(&machine()).cloned().collect();
        let released = log.released(&machine()).map(|released| released.point);
        Told {
            kept: Kept { points: points.iter().map(|point| point.id).collect(), released },
            points,
            begun: log.begun(&machine()).is_some(),
            standings: [0, 1].map(|disk| standing(disk, log)),
        }
    }
}

/// What settled logs say, by their bytes: reading them is the same each time, and takes longer than all the rest.
#[derive(Default)]
struct Known(HashMap<Vec<u8>, Rc<Told>>);

impl Known {
    fn settle(&mut self, rig: &Rig) -> Rc<Told> {
        let bytes = || rig.log.content().segments.get(points::FILE_NAME).map(|log| log.to_vec());
        if let Some(told) = bytes().and_then(|bytes| self.0.get(&bytes)) {
            return told.clone();
        }
        let told = Rc::new(Told::by(&rig.settle()));
        self.0.insert(bytes().unwrap(), told.clone());
        told
    }

    /// What a service does that starts after a power cut, whoever takes back what was begun, and whoever writes the disks
    /// next.
    fn recover(&mut self, rig: &Rig) -> Rc<Told> {
        let mut told = self.settle(rig);
        if told.begun {
            rig.take_back(&told, |record| rig.settle().append(record).unwrap());
            told = self.settle(rig);
        }
        for (disk, standing) in told.standings.iter().enumerate() {
            // Without any point nothing is promised.
            if standing.newest().is_some() {
                rig.recover(disk, standing);
            }
        }
        told
    }
}

/// Rigs that a script went through, one after each power cut, with the logs of how they came there.
struct Run {
    /// And the number of the promise that holds when the logs begin.
    rigs: Vec<(Rig, usize)>,
    /// By the numbers that are the marks in the logs: from there on it is one of these.
    promises: Vec<Vec<Kept>>,
    /// What the disks held at each point.
    contents: HashMap<PointId, [Vec<u8>; 2]>,
}

/// A script while it is made up.
struct Script<'a> {
    run: Run,
    coordinator: Arc<Coordinator>,
    kept: Kept,
    /// What the disks hold, as far as it was sent.
    model: [Vec<u8>; 2],
    rng: &'a mut Dice,
}

/// A disk that is being received.
struct Receiving {
    session: Session,
    ticket: Ticket,
    stage: watch::Receiver<Stage>,
    volume: VolumeAt,
}

impl Run {
    /// An initial pass, and what a machine goes through afterwards: passes that are committed, interrupted, gone on with
    /// and rolled back; points that are let go of; ways back and their undoing; another initial pass.
    fn new(rng: &mut Dice, steps: usize) -> Run {
        let model = [0, 1].map(|_| {
            let mut bytes = vec![0; SIZE as usize];
            rng.fill_bytes(&mut bytes);
            bytes
        });
        let [root, data] = model.clone().map(|disk| Content { disk, ..Content::default() });
        let rig = Rig::with([root, data, Content::default()]);
        let coordinator = Arc::new(Coordinator::new(rig.settle()));
        let run =
            Run { rigs: vec![(rig, 0)], promises: vec![vec![Kept::default()]], contents: HashMap::new() };
        let mut script = Script { run, coordinator, kept: Kept::default(), model, rng };
        script.initial();
        for _ in 0..steps {
            match script.rng.random_range(0..12) {
                0..8 => script.delta(),
                8 | 9 => script.let_go(),
                10 => script.go_back_and_undo(),
                _ => script.initial(),
            }
        }
        script.run
    }
}

impl Script<'_> {
    fn rig(&self) -> &Rig {
        &self.run.rigs.last().unwrap().0
    }

    /// From this moment on it is one of these.
    fn promise(&mut self, kept: Vec<Kept>) {
        self.rig().log.mark(self.run.promises.len() as u64);
        self.run.promises.push(kept);
    }

    /// So it is now.
    fn becomes(&mut self, kept: Kept) {
        self.promise(vec![kept.clone()]);
        self.kept = kept;
    }

    fn told(&self) -> Told {
        self.coordinator.read(Told::by).unwrap()
    }

    fn append(&self, record: Record) {
        self.coordinator.append(record).unwrap();
    }

    /// The number of a new pass.
    fn next(&self, disk: usize, standing: &Standing) -> u64 {
        let last = self.rig().journal(disk, standing).passes.keys().next_back().copied();
        last.unwrap_or(0).max(standing.committed()) + 1
    }

    /// A disk is opened, and a pass begins, in the order of `Receiver::journal` and `Ledger::begin`.
    fn begin(&mut self, disk: usize, point: PointId, kind: PassKind) -> Receiving {
        let standing = self.coordinator.read(|log| standing(disk, log)).unwrap();
        let rig = &self.run.rigs.last().unwrap().0;
        rig.tidy(disk, &standing);
        let history = rig.journal(disk, &standing);
        let sender_pass = PassId(self.rng.random());
        let disks = vec![name(0), name(1)];
        let begin = Begin { pass: sender_pass, kind, point, disks, compare: None };
        let (ticket, stage) = self.coordinator.begin(None, (machine(), name(disk)), &begin).unwrap();
        let (lineage, pass, writer) = match (kind, standing.lineage) {
            (PassKind::Delta, Some(lineage)) => {
                let shelf = rig.disks[disk].shelf();
                let writer = match history.after(standing.committed()).unwrap().last() {
                    Some(open) => go_on(open, lineage, SEGMENT, &shelf).unwrap(),
                    None => Writer::new(lineage, self.next(disk, &standing), SEGMENT),
                };
                (lineage, writer.pass(), Some(writer))
            }
            _ => {
                self.coordinator.drop_for_initial(&machine(), &name(disk)).unwrap();
                rig.discard(disk, &standing, ..);
                (Lineage(self.rng.random()), self.next(disk, &standing), None)
            }
        };
        let volume = VolumeAt {
            machine: machine(),
            disk: name(disk),
            id: target(disk),
            lineage,
            pass,
            sender_pass,
            bytes: 0,
        };
        Receiving { session: Session::open(&rig.disks[disk], writer), ticket, stage, volume }
    }

    /// The sessions commit their passes, the first `steps` of flush, prepare, flush, prepare, and end. Says whether the point
    /// is recorded.
    fn commit(&mut self, point: PointId, receiving: [Receiving; 2], steps: usize) -> bool {
        self.run.contents.insert(point, self.model.clone());
        let at_once = self.rng.random();
        if at_once {
            receiving.iter().for_each(|disk| disk.session.volume.flush());
        }
        let first = self.rng.random_range(0..2);
        for (before, disk) in [(0, first), (2, 1 - first)] {
            let Receiving { session, ticket, volume, .. } = &receiving[disk];
            let flushed = match (steps > before, at_once) {
                (false, _) => break,
                (true, true) => session.flushed(),
                (true, false) => session.flush(),
            };
            match flushed {
                Ok(bytes) if steps > before + 1 => {
                    let commit = Commit {
                        pass: volume.sender_pass,
                        frames: 0,
                        bytes: SIZE,
                        point_in_time: true,
                        time: THEN,
                        kind: Kind::Crash,
                        name: None,
                    };
                    self.coordinator.prepare(ticket, VolumeAt { bytes, ..volume.clone() }, &commit);
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        let recorded = receiving.each_ref().map(|disk| matches!(*disk.stage.borrow(), Stage::Recorded(_)));
        assert_eq!(recorded[0], recorded[1]);
        for Receiving { session, ticket, .. } in receiving {
            session.volume.close();
            drop(ticket);
        }
        recorded[0]
    }

    fn initial(&mut self) {
        let point = PointId(self.rng.random());
        let with = Kept::default().and(point);
        self.promise(vec![self.kept.clone(), Kept::default(), with.clone()]);
        let receiving = [0, 1].map(|disk| self.begin(disk, point, PassKind::Initial));
        for (disk, model) in receiving.iter().zip(&mut self.model) {
            scribble(&disk.session, model, self.rng, 4);
        }
        assert!(self.commit(point, receiving, 4));
        assert!(self.rig().bytes() == self.model);
        self.becomes(with);
    }

    fn delta(&mut self) {
        for attempt in 0.. {
            let last = attempt == 2 || self.rng.random_range(0..5) < 2;
            let point = PointId(self.rng.random());
            let with = self.kept.and(point);
            self.promise(vec![self.kept.clone(), with.clone()]);
            let receiving = [0, 1].map(|disk| self.begin(disk, point, PassKind::Delta));
            if attempt > 0 {
                // The sender sends everything again, as it is now.
                receiving.iter().zip(&self.model).for_each(|(disk, model)| disk.session.write(0, model));
            }
            let mut steps = if last { 4 } else { self.rng.random_range(0..=4) };
            self.scribble(&receiving);
            if !last && self.rng.random_range(0..3) == 0 {
                // A request that fails, so that it may have written a record and not flushed it.
                let (of, nth) = [(0, 12), (1, 12), (2, 3)][self.rng.random_range(0..3)];
                let nth = self.rng.random_range(0..nth);
                self.rig().all()[of].fail_nth(nth, libc::EIO);
                steps = 4;
                self.scribble(&receiving);
            }
            let recorded = self.commit(point, receiving, steps);
            for device in self.rig().all() {
                device.heal();
            }
            let cut = !last && self.rng.random_range(0..3) > 0;
            if cut {
                self.cut();
            }
            // Whoever sends it asks whether there is such a point.
            let kept = self.told().kept;
            if cut {
                assert!([&self.kept, &with].contains(&&kept), "{kept:?}");
            } else {
                assert_eq!(kept, if recorded { with.clone() } else { self.kept.clone() });
                assert!(recorded || !last);
            }
            let is_there = kept == with;
            self.becomes(kept);
            if is_there {
                assert!(self.rig().bytes() == self.model);
                return;
            }
            for (disk, standing) in self.told().standings.iter().enumerate() {
                if self.rng.random() {
                    self.rig().recover(disk, standing);
                }
            }
        }
    }

    fn scribble(&mut self, receiving: &[Receiving; 2]) {
        for (disk, model) in receiving.iter().zip(&mut self.model) {
            let steps = self.rng.random_range(1..5);
            scribble(&disk.session, model, self.rng, steps);
        }
    }

    /// The power fails at some moment since the newest promise, and the service starts again.
    fn cut(&mut self) {
        let (mut moments, mut since, mut all) = (self.rig().moments(), 0, 0);
        while let Some(mark) = moments.step() {
            all += 1;
            since = if mark.is_some() { all } else { since };
        }
        let mut moments = self.rig().moments();
        for _ in 0..self.rng.random_range(since..=all) {
            moments.step();
        }
        self.run.rigs.push((Rig::with(moments.torn(self.rng)), self.run.promises.len() - 1));
        self.coordinator = Arc::new(Coordinator::new(self.rig().settle()));
    }

    /// The oldest points go, in the order of `agent::retention`.
    fn let_go(&mut self) {
        let count = self.rng.random_range(1..3).min(self.kept.points.len() - 1);
        if count == 0 {
            return;
        }
        let mut kept = self.kept.clone();
        let points = kept.points.drain(..count).collect();
        self.promise(vec![self.kept.clone(), kept.clone()]);
        self.append(Record::Dropped(Dropped { time: THEN, reason: Reason::Age, points }));
        self.becomes(kept);
        for (disk, standing) in self.told().standings.iter().enumerate() {
            self.rig().discard(disk, standing, ..=standing.oldest());
        }
    }

    /// A failover to any of the points, which is taken back, in the order of `recovery::failover`.
    fn go_back_and_undo(&mut self) {
        let before = self.kept.clone();
        let point = before.points[self.rng.random_range(0..before.points.len())];
        let released = Kept { released: Some(point), ..before.clone() };
        let then = self.run.contents[&point].clone();
        self.promise(vec![before.clone(), released.clone()]);
        self.append(Record::Begun(Begun { machine: machine(), point: Some(point), time: THEN }));
        let disks = [0, 1].map(|disk| {
            let pass = self.go_back(disk, point, &then[disk]);
            ReleasedDisk { disk: name(disk), pass, sample: Sample { head: 0, tail: 0, between: 0 } }
        });
        assert!(self.rig().bytes() == then);
        let record = Released { machine: machine(), point, time: THEN, disks: disks.into() };
        self.append(Record::Released(record));
        self.becomes(released.clone());
        self.promise(vec![released, before.clone()]);
        self.append(Record::Begun(Begun { machine: machine(), point: None, time: THEN }));
        self.rig().take_back(&self.told(), |record| self.append(record));
        assert!(self.rig().bytes() == self.model);
        self.becomes(before);
    }

    /// One disk goes back to a point, by a pass that it gives the number of, if that takes one.
    fn go_back(&self, disk: usize, point: PointId, then: &[u8]) -> Option<u64> {
        let standing = self.coordinator.read(|log| standing(disk, log)).unwrap();
        let (history, shelf) = (self.rig().journal(disk, &standing), self.rig().disks[disk].shelf());
        let view = View::after(&history, standing.pass_at(point).unwrap()).unwrap();
        if view.is_empty() {
            return None;
        }
        let pass = self.next(disk, &standing);
        let writer = Writer::new(standing.lineage.unwrap(), pass, SEGMENT);
        let session = Session::open(&self.rig().disks[disk], Some(writer));
        let mut places = Vec::new();
        view.each(&shelf, |at, bytes| {
            session.write(at, bytes);
            places.push(at as usize + bytes.len() - 1);
            Ok::<(), recover::Error>(())
        })
        .unwrap();
        session.flush().unwrap();
        session.volume.close();
        // It is told from a disk that has one bit of it otherwise.
        let is_on = |disk: &[u8]| {
            let part = |extent: Extent| disk[extent.offset() as usize..extent.end() as usize].to_vec();
            view.is_on(&shelf, |extent| Ok::<_, recover::Error>(part(extent))).unwrap()
        };
        assert!(is_on(then));
        for place in places {
            let mut other = then.to_vec();
            other[place] ^= 1;
            assert!(!is_on(&other), "the byte at {place} is not looked at");
        }
        Some(pass)
    }
}

/// What a power cut leaves of all three is one of what was promised, on both disks; and all points that the log has are.
fn check(rig: &Rig, promise: &[Kept], run: &Run, known: &mut Known, rng: &mut Dice) -> usize {
    let told = known.recover(rig);
    assert!(promise.contains(&told.kept), "{:?} is none of {promise:?}", told.kept);
    let Some(at) = told.kept.stands_at() else { return 0 };
    let newest = &run.contents[&at];
    for (disk, bytes) in rig.bytes().iter().enumerate() {
        assert!(*bytes == newest[disk], "disk {disk} is not as it was at point {at}, and that is recorded");
    }
    let recovered = rig.contents();
    known.recover(rig);
    assert!(rig.contents() == recovered, "recovering twice is not recovering once");
    for (disk, standing) in told.standings.iter().enumerate() {
        let (shelf, history) = (rig.disks[disk].shelf(), rig.journal(disk, standing));
        // Of the passes that ended, every byte is as it was written.
        history.passes.values().for_each(|pass| verify(pass, &shelf).unwrap());
        for point in &told.points {
            let pass = standing.pass_at(point.id).unwrap();
            let mut bytes = recovered[disk].disk.clone();
            View::after(&history, pass).unwrap().overlay(&shelf, 0, &mut bytes).unwrap();
            let then = &run.contents[&point.id][disk];
            assert!(bytes == *then, "point {} is not on disk {disk} as it was", point.id);
            // What the log says of the pass that led there is so, or it is not needed any more.
            let led = history.passes.get(&pass).map(|pass| pass.bytes);
            let said = point.volumes.iter().find(|at| at.disk == name(disk)).map(|at| at.bytes);
            assert!(led == said || pass <= standing.oldest());
        }
    }
    // The power fails again while it recovers.
    let mut states = 1;
    let mut moments = rig.moments();
    while moments.step().is_some() {
        if rng.random_range(0..4) == 0 {
            let again = Rig::with(moments.torn(rng));
            let kept = &known.recover(&again).kept;
            assert!(*kept == told.kept && again.bytes() == *newest, "not after a second power cut");
            states += 1;
        }
    }
    states
}

/// Crash states to look at: `MT_AGENT_CRASH_STATES`, or as many as CI does.
fn wanted() -> usize {
    std::env::var("MT_AGENT_CRASH_STATES").map_or(100_000, |text| text.parse().expect("a number of states"))
}

#[test]
fn a_power_cut_at_any_moment_leaves_every_point_on_both_disks_or_on_neither() {
    let seed: u64 = match std::env::var("MT_AGENT_CRASH_SEED") {
        Ok(text) => text.parse().expect("a seed"),
        Err(_) => rand::random(),
    };
    println!("to run this again: MT_AGENT_CRASH_SEED={seed}");
    let mut rng = Dice::seed_from_u64(seed);
    let (mut states, mut runs) = (0, 0);
    while states < wanted() {
        let (run, mut known) = (Run::new(&mut rng, 6), Known::default());
        for (rig, promise) in &run.rigs {
            let (mut moments, mut promise) = (rig.moments(), &run.promises[*promise]);
            while let Some(mark) = moments.step() {
                if let Some(number) = mark {
                    promise = &run.promises[number as usize];
                }
                let samples = if moments.is_certain() { 1 } else { 4 };
                for _ in 0..samples {
                    let left = Rig::with(moments.torn(&mut rng));
                    states += check(&left, promise, &run, &mut known, &mut rng);
                }
            }
        }
        runs += 1;
    }
    println!("{states} crash states in {runs} runs");
}
