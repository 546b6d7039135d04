//! Two disks of a machine, their journals and the log of recovery points, through random schedules, beside a model that
//! keeps a whole copy of everything. On files in memory; `MT_AGENT_MODEL_CASES` says how many schedules (300).

mod support;

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mt_agent::points::retention::{Policy, Room, choose};
use mt_agent::points::{PointId, Reason};
use mt_agent::storage::Geometry;
use mt_agent::storage::device::{Device, EngineChoice};
use mt_agent::units::Extent;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use support::house::{Disk, House, Killed, machine};
use tempfile::TempDir;
use time::OffsetDateTime;

/// The first disk ends in the middle of a block.
const SIZES: [u64; 2] = [20 * 4096 + 1536, 6 * 4096];
const NAMES: [&str; 2] = ["root", "data"];
/// Short ones, so that passes have several.
const SEGMENT: u64 = 40 << 10;

type Contents = [Vec<u8>; 2];

#[derive(Clone, Debug)]
enum Step {
    /// What is sent begins a pass where none is open.
    Write {
        disk: usize,
        at: u64,
        len: u64,
        fill: u8,
    },
    Zero {
        disk: usize,
        at: u64,
        len: u64,
    },
    /// The sender sends everything again.
    Resend,
    Commit(Killed),
    /// An initial pass overwrites both disks in place.
    Initial {
        fill: u8,
        killed: Killed,
    },
    /// One of the points is let go of, wherever it is; `swept`: and what only it needed, too.
    LetGo {
        point: usize,
        swept: bool,
    },
    /// The oldest are, until the before-images take so many bytes at most.
    Retain {
        bytes: u64,
    },
    Restart,
    /// The pass that is open is rolled back.
    RollBack,
    FailOver {
        point: usize,
        killed: Killed,
    },
    Undo(Killed),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let killed = || prop_oneof![6 => Just(Killed::No), 1 => Just(Killed::AfterOneDisk), 1 => Just(Killed::BeforeTheRecord)];
    let range = || {
        (0..2usize).prop_flat_map(|disk| {
            let size = SIZES[disk];
            // Most are whole blocks, as most of what senders send.
            let blocks = (0..size / 4096, 1..8u64).prop_map(|(block, count)| (block * 4096, count * 4096));
            let any = (0..size, 1..20_000u64);
            (Just(disk), prop_oneof![3 => blocks, 1 => any])
                .prop_map(move |(disk, (at, len))| (disk, at, len.min(size - at)))
        })
    };
    let write = (range(), 0..4u8).prop_map(|((disk, at, len), fill)| Step::Write { disk, at, len, fill });
    let zero = range().prop_map(|(disk, at, len)| Step::Zero { disk, at, len });
    let step = prop_oneof![
        12 => write,
        4 => zero,
        1 => Just(Step::Resend),
        5 => killed().prop_map(Step::Commit),
        1 => (0..4u8, killed()).prop_map(|(fill, killed)| Step::Initial { fill, killed }),
        1 => (0..9usize, any::<bool>()).prop_map(|(point, swept)| Step::LetGo { point, swept }),
        1 => (0..400_000u64).prop_map(|bytes| Step::Retain { bytes }),
        3 => Just(Step::Restart),
        1 => Just(Step::RollBack),
        3 => (0..9usize, killed()).prop_map(|(point, killed)| Step::FailOver { point, killed }),
        3 => killed().prop_map(Step::Undo),
    ];
    prop::collection::vec(step, 1..60)
}

/// Every sector is another one, so that none can take the place of another unnoticed.
fn pattern(fill: u8, at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(|at| fill.wrapping_mul(64).wrapping_add((at / 512) as u8)).collect()
}

/// The disks and what should be on them.
struct Pair {
    house: House,
    /// What each disk holds, once all that was sent has arrived.
    now: Contents,
    /// The points, oldest first, with what the disks held.
    points: Vec<(PointId, Contents)>,
    released: Option<PointId>,
    /// The point of a failover that was killed.
    begun: Option<PointId>,
    dir: TempDir,
}

impl Pair {
    fn new() -> Pair {
        let dir = support::directory();
        let now = SIZES.map(|size| vec![7; size as usize]);
        let disks = (0..2).map(|index| {
            let path = path(dir.path(), index);
            fs::write(&path, &now[index]).unwrap();
            let geometry = Geometry { size: SIZES[index], block: 512 };
            let name = NAMES[index];
            Disk {
                name,
                size: SIZES[index],
                read: {
                    let path = path.clone();
                    Box::new(move |extent| {
                        fs::read(&path).unwrap()[extent.offset() as usize..extent.end() as usize].to_vec()
                    })
                },
                open: Box::new(move |arena, shelf| {
                    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
                    let device = Device::new(file, name, geometry, EngineChoice::Auto, 8, arena);
                    Box::new(device.unwrap().0.with_shelf(shelf))
                }),
            }
        });
        let house = House::open(&dir.path().join("retention"), disks.collect(), SEGMENT);
        Pair { house, now, points: Vec::new(), released: None, begun: None, dir }
    }

    /// The point became one, unless it did not.
    fn committed(&mut self, point: Option<PointId>) {
        self.points.extend(point.map(|id| (id, self.now.clone())));
    }

    fn initial(&mut self, contents: Contents, killed: Killed) {
        self.points.clear();
        let point = self.house.initial(&contents, killed);
        self.becomes(contents, killed);
        self.committed(point);
    }

    /// The disks became this, or the first one did.
    fn becomes(&mut self, contents: Contents, killed: Killed) {
        let done = if killed == Killed::AfterOneDisk { 1 } else { 2 };
        self.now.iter_mut().zip(contents).take(done).for_each(|(now, content)| *now = content);
    }

    /// The first pass of a machine is an initial one.
    fn begin(&mut self) {
        if self.points.is_empty() {
            self.initial(self.now.clone(), Killed::No);
        }
    }

    /// Does a step, unless it is none that can be done now.
    fn step(&mut self, step: &Step) {
        // Whoever was failed over, or half so, is not received.
        let (points, busy) = (self.points.len(), self.released.or(self.begun));
        let ours = busy.is_none();
        match *step {
            Step::Write { disk, at, len, fill } if ours => {
                self.begin();
                let bytes = pattern(fill, at, len);
                self.house.receiving(disk).write(at, &bytes);
                self.now[disk][at as usize..(at + len) as usize].copy_from_slice(&bytes);
                // Before it has arrived there is nothing to be looked at.
                return;
            }
            Step::Zero { disk, at, len } if ours => {
                self.begin();
                self.house.receiving(disk).volume.zero(Extent::new(at, len).unwrap(), 0).unwrap();
                self.now[disk][at as usize..(at + len) as usize].fill(0);
                return;
            }
            Step::Resend if ours => {
                self.begin();
                self.now.iter().enumerate().for_each(|(disk, now)| self.house.receiving(disk).write(0, now));
            }
            Step::Commit(killed) if ours => {
                self.begin();
                let point = self.house.commit(killed);
                self.committed(point);
            }
            Step::Initial { fill, killed } if ours => {
                self.initial(SIZES.map(|size| pattern(fill, 0, size)), killed);
            }
            Step::LetGo { point, swept } if points > 1 => {
                // The newest one stays, and where the machine was failed over to.
                let id = self.points[point % (points - 1)].0;
                if busy != Some(id) {
                    self.let_go(vec![id], swept);
                }
            }
            Step::Retain { bytes } => {
                let max_age = Duration::from_secs(1 << 40);
                let policy = Policy { max_age, max_bytes: Some(bytes), min_free: 0, thinning: false };
                let (room, now) = (Room { free: 1 << 40, open: 0 }, OffsetDateTime::now_utc());
                let choice =
                    choose(self.house.log.history(), &busy.into_iter().collect(), &policy, room, now);
                let gone: Vec<PointId> = choice.drop.into_iter().map(|(id, _)| id).collect();
                let oldest = self.points.iter().map(|(id, _)| *id);
                assert!(gone.is_empty() || gone.len() < points, "the newest point stays");
                assert!(oldest.take(gone.len()).eq(gone.iter().copied()), "{gone:?} are not the oldest");
                self.let_go(gone, true);
            }
            Step::Restart => self.house.restart(),
            Step::RollBack if ours && points > 0 => {
                self.house.close();
                (0..2).for_each(|disk| self.house.roll_back(disk));
                self.now = self.points[points - 1].1.clone();
            }
            Step::FailOver { point, killed } if self.released.is_none() && points > 0 => {
                let (id, then) = self.points[point % points].clone();
                self.house.fail_over(id, killed);
                self.becomes(then, killed);
                (self.released, self.begun) =
                    if killed == Killed::No { (Some(id), None) } else { (None, Some(id)) };
            }
            Step::Undo(killed) if !ours => {
                self.house.undo(killed);
                self.becomes(self.points[points - 1].1.clone(), killed);
                if killed == Killed::No {
                    (self.released, self.begun) = (None, None);
                }
            }
            _ => return,
        }
        self.agrees();
    }

    fn let_go(&mut self, points: Vec<PointId>, swept: bool) {
        self.points.retain(|(id, _)| !points.contains(id));
        self.house.drop_points(points, Reason::Asked, swept);
    }

    /// Everything is as the model has it.
    fn agrees(&self) {
        let log = &self.house.log;
        assert_eq!(log.released(&machine()).map(|released| released.point), self.released);
        for disk in 0..2 {
            let bytes = fs::read(path(self.dir.path(), disk)).unwrap();
            assert!(
                self.house.is_receiving() || bytes == self.now[disk],
                "disk {disk} is not as it should be"
            );
            let views = self.house.views(disk, &bytes);
            let ids: Vec<_> = views.iter().map(|(id, _)| *id).collect();
            assert_eq!(ids, self.points.iter().map(|(id, _)| *id).collect::<Vec<_>>());
            for ((id, view), (_, then)) in views.iter().zip(&self.points) {
                assert!(*view == then[disk], "disk {disk} at point {id} is not as it was");
            }
        }
    }
}

fn path(dir: &Path, disk: usize) -> PathBuf {
    dir.join(NAMES[disk])
}

#[test]
fn any_schedule_leaves_every_point_as_it_was() {
    let cases = std::env::var("MT_AGENT_MODEL_CASES").map_or(300, |text| text.parse().expect("a number"));
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&steps(), |steps| {
            let mut pair = Pair::new();
            steps.iter().for_each(|step| pair.step(step));
            pair.house.restart();
            pair.agrees();
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}
