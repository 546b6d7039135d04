//! Recovery points survive what the kernel really wrote: two disks and the file system of the retention directory lie on
//! one device that dm-log-writes records, and each state in which a power cut could have left all three is opened,
//! recovered and looked at.

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mt_agent::error::IoError;
use mt_agent::points::{PointId, Reason};
use mt_agent::storage::device::{Device, EngineChoice};
use mt_agent::storage::fault::FaultDisk;
use mt_agent::storage::{Action, Completion, Geometry, Place, Request, Storage, Waker};
use mt_agent::units::Extent;
use nix::mount::MsFlags;
use rand::rngs::StdRng as Dice;
use rand::{RngExt, SeedableRng};

use crate::harness::small;
use crate::log_writes::{LogWrites, Point, copy, flushed};
use crate::mapped::Mapped;
use crate::support::house::{Disk, House, Killed, machine};
use crate::support::{KIB, Loop, MIB, Mount, directory, tool};

const NAMES: [&str; 2] = ["d0", "d1"];
const SIZES: [u64; 2] = [256 * KIB, 64 * KIB];
/// The file system comes first on the device, so that the device can be mounted.
const KEPT: u64 = 10 * MIB;
/// Short segments, so that passes have several.
const SEGMENT: u64 = 96 << 10;
const SECTOR: u32 = 4096;

fn range(disk: usize) -> Range<u64> {
    let start = KEPT + SIZES[..disk].iter().sum::<u64>();
    start..start + SIZES[disk]
}

/// A disk that makes a mark in the log behind each of its flushes. Nobody else flushes from when that is issued until the
/// mark is made: the mark tells whose the last flush was, and the file system's must not be taken for the disk's.
struct Marking {
    device: Device,
    name: &'static str,
    log: Arc<LogWrites>,
    /// Whoever has this flushes: one of the disks, or one of their journals.
    flushing: Arc<Mutex<()>>,
    /// What completed while a flush was waited for.
    done: Vec<Completion>,
}

impl Storage for Marking {
    fn geometry(&self) -> Geometry {
        self.device.geometry()
    }

    fn depth(&self) -> usize {
        self.device.depth()
    }

    fn submit(&mut self, request: Request) {
        if !matches!(request.action, Action::Flush) {
            return self.device.submit(request);
        }
        let (tag, place) = (request.tag, request.place);
        let _alone = self.flushing.lock().unwrap();
        self.device.submit(request);
        while !self.done.iter().any(|completion| completion.tag == tag) {
            self.device.wait(&mut self.done).unwrap();
        }
        if place == Place::Disk {
            self.log.mark(&flushed(self.name));
        }
    }

    fn wait(&mut self, done: &mut Vec<Completion>) -> Result<(), IoError> {
        if self.done.is_empty() {
            return self.device.wait(done);
        }
        done.append(&mut self.done);
        Ok(())
    }

    fn waker(&self) -> Waker {
        self.device.waker()
    }

    fn create_segment(&mut self, name: &str, len: u64, header: &[u8]) -> Result<(), IoError> {
        let _alone = self.flushing.lock().unwrap();
        self.device.create_segment(name, len, header)
    }
}

/// What the log of points says after some record, and what the disks hold then.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Moment {
    points: Vec<(PointId, [Vec<u8>; 2])>,
    released: Option<PointId>,
}

/// What is done, with a mark behind each record of the points log.
struct Script {
    house: House,
    log: Arc<LogWrites>,
    now: [Vec<u8>; 2],
    moments: Vec<Moment>,
    dice: Dice,
}

impl Script {
    fn last(&self) -> &Moment {
        self.moments.last().unwrap()
    }

    fn recorded(&mut self, moment: Moment) {
        self.log.mark(&record(self.moments.len()));
        self.moments.push(moment);
    }

    fn committed(&mut self, id: PointId) {
        let mut moment = self.last().clone();
        moment.points.push((id, self.now.clone()));
        self.recorded(moment);
    }

    /// Some of both disks becomes other bytes, zeros, or what it was.
    fn scribble(&mut self, times: usize) {
        for _ in 0..times {
            let disk = self.dice.random_range(0..2);
            let blocks = SIZES[disk] / 4096;
            let block = self.dice.random_range(0..blocks);
            let len = self.dice.random_range(1..=(blocks - block).min(12)) * 4096;
            let (at, session) = (block * 4096, self.house.receiving(disk));
            let part = &mut self.now[disk][at as usize..(at + len) as usize];
            match self.dice.random_range(0..6) {
                0 => {
                    part.fill(0);
                    session.volume.zero(Extent::new(at, len).unwrap(), 0).unwrap();
                }
                1 => session.write(at, part),
                _ => {
                    self.dice.fill(part);
                    session.write(at, part);
                }
            }
        }
    }

    fn pass(&mut self, times: usize) {
        self.scribble(times);
        let id = self.house.commit(Killed::No).unwrap();
        self.committed(id);
    }

    /// An initial pass; passes with overlaps, one of which is interrupted and goes on, and one that is rolled back; the
    /// oldest points are let go of; a way back, which is taken back; a last pass.
    fn run(&mut self) {
        for now in &mut self.now {
            self.dice.fill(&mut now[..]);
        }
        let id = self.house.initial(&self.now.clone(), Killed::No).unwrap();
        self.committed(id);
        self.pass(6);
        self.scribble(4);
        self.house.restart();
        self.pass(4);
        self.scribble(4);
        assert_eq!(self.house.commit(Killed::BeforeTheRecord), None);
        (0..2).for_each(|disk| self.house.roll_back(disk));
        self.now = self.last().points.last().unwrap().1.clone();
        self.pass(5);

        let mut moment = self.last().clone();
        let gone = moment.points.drain(..2).map(|(id, _)| id).collect();
        self.house.drop_points(gone, Reason::Age, false);
        self.recorded(moment);
        self.house.drop_points(Vec::new(), Reason::Age, true);

        let moment = self.last().clone();
        let back = moment.points[0].0;
        self.house.fail_over(back, Killed::No);
        self.recorded(Moment { released: Some(back), ..moment.clone() });
        self.house.undo(Killed::No);
        self.recorded(moment);
        self.pass(4);
    }
}

fn record(number: usize) -> String {
    format!("record:{number}")
}

#[test]
fn every_point_survives_a_power_cut_at_any_moment() {
    small().without_udev().run(|_| {
        let dir = directory();
        let loop_disk = |name: &str, size| {
            File::create_new(dir.path().join(name)).unwrap().set_len(size).unwrap();
            Loop::attach(&dir.path().join(name), SECTOR)
        };
        let end = range(1).end;
        let (under, under_log) = (loop_disk("disks", end), loop_disk("log", 128 * MIB));
        let now = "lazy_itable_init=0,lazy_journal_init=0";
        tool("mkfs.ext4", &["-q", "-E", now, under.node().to_str().unwrap(), &format!("{}k", KEPT / KIB)]);
        let log = Arc::new(LogWrites::on(under.node(), under_log.node()));
        let kept = Mapped::new("kept", &log.node(), 0, KEPT);
        let retention = dir.path().join("retention");
        // It writes nothing by itself while this runs.
        let mount = Mount::with(&kept.node(), &retention, "commit=300");
        let flushing = Arc::new(Mutex::new(()));
        let disks = (0..2).map(|disk| {
            let (name, size, log, flushing) = (NAMES[disk], SIZES[disk], log.clone(), flushing.clone());
            let mapped = Mapped::new(name, &log.node(), range(disk).start, size);
            Disk {
                name,
                size,
                read: Box::new(|_| unreachable!("nothing is torn yet")),
                open: Box::new(move |arena, shelf| {
                    let mut options = OpenOptions::new();
                    options.read(true).write(true).custom_flags(nix::libc::O_DIRECT);
                    let file = options.open(mapped.node()).unwrap();
                    let geometry = Geometry { size, block: SECTOR };
                    let (device, _) =
                        Device::new(file, name, geometry, EngineChoice::Auto, 8, arena).unwrap();
                    let (device, log) = (device.with_shelf(shelf), log.clone());
                    Box::new(Marking { device, name, log, flushing: flushing.clone(), done: Vec::new() })
                }),
            }
        });
        let house = House::open(&retention, disks.collect(), SEGMENT);
        let begin = Instant::now();
        let (now, moments) = (SIZES.map(|size| vec![0; size as usize]), vec![Moment::default()]);
        let mut script = Script { house, log: log.clone(), now, moments, dice: Dice::seed_from_u64(4) };
        script.run();
        let Script { house, log: other, moments, .. } = script;
        drop((house, other, mount));
        let log = Arc::into_inner(log).expect("nobody else has it").finish();
        println!("recorded in {:?}: {:?}", begin.elapsed(), log.barriers_and_bytes());
        let parts: Vec<_> = (0..2).map(|disk| (NAMES[disk], range(disk))).collect();
        let log = log.with_parts(&parts);

        // Attached once: that takes longer than to look at a state. Nobody has it open but who has mounted it.
        let after = dir.path().join("after");
        File::create(&after).unwrap().set_len(end).unwrap();
        let (after, place) = (Loop::attach_idle(&after, SECTOR), dir.path().join("mounted"));
        fs::create_dir(&place).unwrap();
        let mut seen = vec![0; moments.len()];
        let states = log.each_crash(SAMPLES, |image, point| {
            copy(&File::open(image).unwrap(), &File::options().write(true).open(after.backing()).unwrap());
            seen[recovers(&after, point, &moments, &place)] += 1;
        });
        println!("{states} states, after each record {seen:?}, in {:?}", begin.elapsed());
        assert!(seen.iter().all(|count| *count > 0));
    });
}

/// Takes a file system away, also when a check fails.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount(self.0) {
            eprintln!("umount {}: {error}", self.0.display());
        }
    }
}

/// Of the states between each two flushes.
const SAMPLES: usize = 1;

/// Does what a service that starts does, and holds everything against what was promised. The number of the last record.
fn recovers(image: &Loop, point: &Point, moments: &[Moment], place: &Path) -> usize {
    let acknowledged = (1..moments.len()).rev().find(|number| point.after(&record(*number))).unwrap_or(0);
    let (kind, options) = (Some("ext4"), None::<&str>);
    nix::mount::mount(Some(image.node()), place, kind, MsFlags::empty(), options).unwrap();
    let _mounted = Mounted(place);
    let file = File::open(image.backing()).unwrap();
    let contents: Vec<FaultDisk> = (0..2)
        .map(|disk| {
            let mut bytes = vec![0; SIZES[disk] as usize];
            file.read_exact_at(&mut bytes, range(disk).start).unwrap();
            FaultDisk::new(bytes, SECTOR)
        })
        .collect();
    let disks = (0..2).map(|disk| {
        let (content, held) = (contents[disk].clone(), contents[disk].clone());
        Disk {
            name: NAMES[disk],
            size: SIZES[disk],
            open: Box::new(move |_, _| Box::new(content.open().unwrap())),
            read: Box::new(move |extent| {
                held.bytes()[extent.offset() as usize..extent.end() as usize].to_vec()
            }),
        }
    });
    let mut house = House::open(place, disks.collect(), SEGMENT);

    // What was acknowledged is there, and at most what would have been next.
    let released = house.log.released(&machine()).map(|released| released.point);
    let points: Vec<PointId> = house.log.points(&machine()).map(|point| point.id).collect();
    let is = |moment: &Moment| {
        moment.released == released && moment.points.iter().map(|(id, _)| *id).eq(points.iter().copied())
    };
    let next = moments.len().min(acknowledged + 2);
    let Some(at) = (acknowledged..next).rev().find(|number| is(&moments[*number])) else {
        panic!("{points:?} and {released:?} after record {acknowledged}")
    };
    let moment = &moments[at];
    let Some((_, newest)) = moment.points.last() else { return at };
    let expected = match released {
        // It was on its way there, or back.
        _ if house.log.begun(&machine()).is_some() => {
            house.undo(Killed::No);
            newest
        }
        Some(back) => &moment.points.iter().find(|(id, _)| *id == back).unwrap().1,
        None => newest,
    };
    for disk in 0..2 {
        house.roll_back(disk);
        let bytes = contents[disk].bytes();
        assert!(bytes == expected[disk], "disk {disk} after record {at}");
        for ((id, view), (_, then)) in house.views(disk, &bytes).iter().zip(&moment.points) {
            assert!(*view == then[disk], "disk {disk} at point {id} after record {at}");
        }
    }
    // Doing it twice is doing it once.
    house.restart();
    for disk in 0..2 {
        house.roll_back(disk);
        assert!(contents[disk].bytes() == expected[disk], "disk {disk} after record {at}, again");
    }
    let left = fs::read_dir(place.join("journals")).is_ok();
    assert!(left || at < 2, "no journal after record {at}");
    at
}
