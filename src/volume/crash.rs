//! What failures and damage leave of a volume with a journal, and what recovery makes of it. What a power cut leaves of the
//! disks of a machine is held against their points in `agent/crash.rs`, with what is here.

use std::sync::mpsc::channel;

use rand::rngs::StdRng as Dice;
use rand::{Rng, RngExt, SeedableRng};

use super::*;
use crate::journal::recover::{self, History, go_on, let_go, recover, tidy};
use crate::journal::{View, Writer, roll_back, verify};
use crate::pass::Lineage;
use crate::storage::Shelf;
use crate::storage::fault::{Content, FaultDisk, Replay};

pub(crate) const SECTOR: u32 = 512;
/// Seven blocks and a half: the disk ends in the middle of one.
pub(crate) const SIZE: u64 = 7 * 4096 + 2048;
/// Short ones, so that passes have several.
pub(crate) const SEGMENT: u64 = 24 << 10;

const LINEAGE: Lineage = Lineage(7);

fn ours(lineage: Lineage) -> bool {
    lineage == LINEAGE
}

/// The journal of the disk, as it is now.
fn journal(disk: &FaultDisk) -> Result<History, recover::Error> {
    let holds = |extent: Extent| Ok(disk.bytes()[extent.offset() as usize..extent.end() as usize].to_vec());
    recover(&disk.shelf(), &ours, &holds)
}

/// A volume as a session has it.
pub(crate) struct Session {
    pub(crate) volume: Volume,
    events: std::sync::mpsc::Receiver<Event>,
}

impl Session {
    pub(crate) fn open(disk: &FaultDisk, writer: Option<Writer>) -> Session {
        let (sender, events) = channel();
        let arena = Arena::new(256 << 10).unwrap();
        let events_of = Box::new(move |event| drop(sender.send(event)));
        let storage = Box::new(disk.open().unwrap());
        let volume = Volume::start("test", storage, SIZE, arena, events_of).unwrap();
        if let Some(writer) = writer {
            volume.save(writer);
        }
        Session { volume, events }
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        for (index, bytes) in bytes.chunks(8192).enumerate() {
            let mut buffer = self.volume.arena().alloc_blocking(bytes.len());
            buffer.copy_from_slice(bytes);
            self.volume.write(offset + (index << 13) as u64, buffer, 8192).unwrap();
        }
    }

    /// Waits for a flush, and says how much the journal of the pass takes.
    pub(crate) fn flushed(&self) -> Result<u64, Fault> {
        loop {
            match self.events.recv().unwrap() {
                Event::Flushed { saved } => return Ok(saved),
                Event::Faulted(fault) => return Err(fault),
                Event::Written { .. } | Event::Paused | Event::Resumed => {}
            }
        }
    }

    pub(crate) fn flush(&self) -> Result<u64, Fault> {
        self.volume.flush();
        self.flushed()
    }
}

/// Random writes and zeros on a volume and a model of it.
pub(crate) fn scribble(session: &Session, model: &mut [u8], rng: &mut Dice, steps: usize) {
    for _ in 0..steps {
        let offset = rng.random_range(0..SIZE);
        let len = rng.random_range(1..=(SIZE - offset).min(12_000));
        // Most are whole blocks, as most of what senders send.
        let (offset, len) = match rng.random_range(0..4) {
            0 => (offset, len),
            _ => {
                let start = offset - offset % 4096;
                (start, (len.next_multiple_of(4096)).min(SIZE - start))
            }
        };
        let range = offset as usize..(offset + len) as usize;
        let extent = Extent::new(offset, len).unwrap();
        match rng.random_range(0..5) {
            0 => {
                model[range].fill(0);
                session.volume.zero(extent, 4096).unwrap();
            }
            kind => {
                let mut buffer = session.volume.arena().alloc_blocking(len as usize);
                buffer.copy_from_slice(&model[range.clone()]);
                // Some of it is what is there already.
                if kind > 1 {
                    let fill = rng.random_range(0..=255);
                    let from = rng.random_range(0..buffer.len());
                    buffer[from..].fill(fill);
                }
                model[range].copy_from_slice(&buffer);
                session.volume.write(offset, buffer, len).unwrap();
            }
        }
    }
}

/// Brings a disk back to the last point of those that were marked, as a service that starts does.
fn recover_to(disk: &FaultDisk, committed: u64) {
    let shelf = disk.shelf();
    tidy(&shelf).unwrap();
    let history = journal(disk).unwrap();
    let open = history.after(committed).unwrap();
    for pass in open.iter().rev() {
        roll_back(pass, &shelf, &mut disk.open().unwrap()).unwrap();
        let_go(&shelf, pass.number..=pass.number, &ours).unwrap();
    }
}

/// The unflushed writes at this moment: dropped, kept or torn.
pub(crate) fn torn(replay: &Replay, rng: &mut Dice) -> Content {
    match rng.random_range(0..5) {
        0 => replay.cut(|_, _| false),
        1 => replay.cut(|_, _| true),
        // The beginning of each write, a whole header at least.
        2 => {
            let until = rng.random_range(8..40);
            replay.cut(|_, sector| sector < until)
        }
        // Whole writes.
        3 => {
            let seed: u64 = rng.random();
            replay.cut(|event, _| (seed >> (event % 64)) & 1 == 1)
        }
        _ => replay.cut(|_, _| rng.random()),
    }
}

/// A request that fails faults the volume; after it is opened again, the last point is there.
#[test]
fn a_failure_of_any_request_is_latched_and_recovered_from() {
    for errno in [libc::EIO, libc::ENOSPC] {
        for nth in 0.. {
            let disk = FaultDisk::new(vec![7; SIZE as usize], SECTOR);
            disk.fail_nth(nth, errno);
            let session = Session::open(&disk, Some(Writer::new(LINEAGE, 1, SEGMENT)));
            for (block, fill) in [(0, 1), (3, 2), (5, 0)] {
                let mut buffer = session.volume.arena().alloc_blocking(8192);
                buffer.fill(fill);
                session.volume.write(block * 4096, buffer, 8192).unwrap();
            }
            session.volume.zero(Extent::new(8192, 4096).unwrap(), 4096).unwrap();
            let result = session.flush();
            session.volume.close();
            if disk.heal() {
                // It made fewer requests than that.
                assert!(result.is_ok() && nth > 8, "only {nth} requests");
                break;
            }
            if let Err(fault) = &result {
                assert_eq!(fault.0.source.raw_os_error(), Some(errno), "request {nth}");
            }
            // Where the file system was full for a moment, it waited.
            assert!(result.is_err() || errno == libc::ENOSPC);
            recover_to(&disk, 0);
            assert!(disk.bytes().iter().all(|byte| *byte == 7), "request {nth} failed with {errno}");
        }
    }
}

/// Any flipped byte in a segment is found, also behind the last record, and costs the points that need it and no others.
#[test]
fn a_flipped_byte_is_found_and_costs_only_what_needs_it() {
    let mut rng = Dice::seed_from_u64(9);
    let mut disk = FaultDisk::new(vec![7; SIZE as usize], SECTOR);
    let mut model = vec![7; SIZE as usize];
    let mut points = vec![model.clone()];
    for pass in 1..=3 {
        let mut session = Session::open(&disk, Some(Writer::new(LINEAGE, pass, SEGMENT)));
        scribble(&session, &mut model, &mut rng, 6);
        if pass == 2 {
            // Interrupted by a power cut that tore a record: what it left is cut off.
            session.volume.close();
            let (mut replay, mut torn) = (disk.replay(), None);
            while replay.step().is_some() {
                let content = replay.cut(|_, sector| sector % 3 == 1);
                let history = journal(&FaultDisk::with(content.clone(), SECTOR)).unwrap();
                let newest = history.passes.get(&2).and_then(|pass| pass.segments.last());
                torn = newest.is_some_and(|newest| newest.torn).then_some(content).or(torn);
            }
            disk = FaultDisk::with(torn.expect("a moment that tears a record"), SECTOR);
            let open = &journal(&disk).unwrap().passes[&2];
            let writer = go_on(open, LINEAGE, SEGMENT, &disk.shelf()).unwrap();
            session = Session::open(&disk, Some(writer));
            session.write(0, &model);
        }
        session.flush().unwrap();
        session.volume.close();
        points.push(model.clone());
    }
    let whole = disk.content();
    for (name, bytes) in &whole.segments {
        let (damaged_pass, _) = crate::journal::writer::parse_name(name).unwrap();
        // Every byte behind the last record, and samples of what has checksums: those are held against every bit elsewhere.
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
        for at in (0..used).step_by(61).chain(used..bytes.len()) {
            let mut content = whole.clone();
            Arc::make_mut(content.segments.get_mut(name).unwrap())[at] ^= 1 << (at % 8);
            let disk = FaultDisk::with(content, SECTOR);
            let (shelf, history) = (disk.shelf(), journal(&disk).unwrap());
            let sound = |pass: &recover::Pass| pass.ended && verify(pass, &shelf).is_ok();
            for (number, pass) in &history.passes {
                assert_eq!(sound(pass), *number != damaged_pass, "{name} at {at}, pass {number}");
            }
            for point in damaged_pass..3 {
                let mut bytes = disk.bytes();
                View::after(&history, point).unwrap().overlay(&shelf, 0, &mut bytes).unwrap();
                assert!(bytes == points[point as usize]);
            }
        }
    }
}

/// Any flipped byte in a pass that is open costs nothing, or is called damage: never is it taken for what a power cut left
/// although the disk needs it.
#[test]
fn a_flipped_byte_of_an_open_pass_is_damage_unless_the_disk_needs_it_not() {
    let mut rng = Dice::seed_from_u64(11);
    let (mut damaged, mut harmless) = (0, 0);
    for _ in 0..6 {
        let mut model = vec![0; SIZE as usize];
        rng.fill_bytes(&mut model);
        let point = model.clone();
        let disk = FaultDisk::new(point.clone(), SECTOR);
        let session = Session::open(&disk, Some(Writer::new(LINEAGE, 1, SEGMENT)));
        let steps = rng.random_range(1..6);
        scribble(&session, &mut model, &mut rng, steps);
        session.volume.close();
        let whole = disk.content();
        for (name, bytes) in &whole.segments {
            let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
            for at in (0..used).step_by(41).chain(used..used + 3) {
                let mut content = whole.clone();
                match Arc::make_mut(content.segments.get_mut(name).unwrap()).get_mut(at) {
                    Some(byte) => *byte ^= 1 << (at % 8),
                    None => continue,
                }
                let disk = FaultDisk::with(content, SECTOR);
                let rolled_back = journal(&disk).and_then(|history| {
                    let mut open = history.after(0)?.into_iter();
                    open.try_for_each(|pass| roll_back(pass, &disk.shelf(), &mut disk.open().unwrap()))
                });
                match rolled_back {
                    Ok(()) => {
                        assert!(
                            disk.bytes() == point,
                            "{name} at {at}: the point was lost, and nobody said so"
                        );
                        harmless += 1;
                    }
                    Err(recover::Error::Corrupt { .. }) => damaged += 1,
                    Err(error) => panic!("{name} at {at}: {error}"),
                }
            }
        }
    }
    assert!(damaged > 100 && harmless > 10, "{damaged} damaged, {harmless} harmless");
}

/// Whoever reads beside the writer, and only brings up to date what it knows of the journal, sees the point at every moment:
/// over passes, interruptions and new segments.
#[test]
fn a_history_that_is_brought_up_to_date_shows_the_point_at_every_moment() {
    let mut rng = Dice::seed_from_u64(21);
    for _ in 0..6 {
        let mut model = vec![0; SIZE as usize];
        rng.fill_bytes(&mut model);
        let point = model.clone();
        let disk = FaultDisk::new(point.clone(), SECTOR);
        for pass in 1..=3 {
            // Interrupted, ended without its point, and ended.
            for end in [false, true, true] {
                let shelf = disk.shelf();
                let writer = match journal(&disk).unwrap().passes.get(&pass) {
                    Some(open) => go_on(open, LINEAGE, SEGMENT, &shelf).unwrap(),
                    None => Writer::new(LINEAGE, pass, SEGMENT),
                };
                let session = Session::open(&disk, Some(writer));
                let steps = rng.random_range(1..9);
                scribble(&session, &mut model, &mut rng, steps);
                if end {
                    session.flush().unwrap();
                }
                session.volume.close();
            }
        }
        let mut replay = disk.replay();
        let mut history = History::default();
        let mut view = View::after(&history, 0).unwrap();
        loop {
            let now = FaultDisk::with(replay.cut(|_, _| true), SECTOR);
            let (shelf, mut bytes) = (now.shelf(), now.bytes());
            let held = bytes.clone();
            let holds = |extent: Extent| Ok(held[extent.offset() as usize..extent.end() as usize].to_vec());
            history.refresh(&shelf, &ours, &holds).unwrap();
            view.extend(&history).unwrap();
            view.overlay(&shelf, 0, &mut bytes).unwrap();
            assert!(bytes == point, "not the point");
            let anew = View::after(&journal(&now).unwrap(), 0).unwrap();
            assert_eq!((view.len(), view.parts()), (anew.len(), anew.parts()));
            if replay.step().is_none() {
                break;
            }
        }
        assert_eq!(history.passes.len(), 3);
    }
}

/// Files that got to another volume's place are neither read nor removed.
#[test]
fn a_segment_of_another_volume_is_noticed() {
    let disk = FaultDisk::new(vec![7; SIZE as usize], SECTOR);
    for pass in 1..=2 {
        let session = Session::open(&disk, Some(Writer::new(LINEAGE, pass, SEGMENT)));
        scribble(&session, &mut vec![7; SIZE as usize], &mut Dice::seed_from_u64(pass), 3);
        session.flush().unwrap();
        session.volume.close();
    }
    let holds = |_: Extent| unreachable!("no record is torn");
    let names = disk.shelf().list().unwrap();
    let theirs = |lineage| lineage == Lineage(8);
    for result in [recover(&disk.shelf(), &theirs, &holds).map(drop), let_go(&disk.shelf(), .., &theirs)] {
        assert!(matches!(result, Err(recover::Error::Foreign { segment }) if segment == names[0]));
    }
    assert_eq!(disk.shelf().list().unwrap(), names);
    recover(&disk.shelf(), &ours, &holds).unwrap();
}
