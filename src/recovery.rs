//! Going back: what the journals of a machine's disks and the points log say together, and what can be made of it.
//!
//! - [`Journal`]: the journal of one disk, held against the log: which point the disk stands at, which pass is open.
//! - [`failover`]: brings the disks of a machine to a point and releases them, and takes that back.
//! - [`export`](mod@export): writes the disks as they were at a point to image files, while replication goes on.
//! - [`past`]: a disk as it was at a point, while it is written to.
//! - [`check`](mod@check): reads everything, and says which points are sound.

pub mod check;
pub mod export;
pub mod failover;
pub mod past;
mod target;

use std::collections::{BTreeMap, HashSet};
use std::ops::RangeBounds;
use std::path::{Path, PathBuf};

use crate::disk::id::DiskId;
use crate::error::IoError;
use crate::journal::recover::{self, Damage, History, Pass, recover};
use crate::journal::writer::segment_name;
use crate::name::Name;
use crate::pass::Lineage;
use crate::points::{self, Log, PointId, VolumeAt};
use crate::protection::{self, Assignment, Commit};
use crate::storage::shelf::Directory;
use target::Target;
use time::OffsetDateTime;

/// The longest segment of a journal, in bytes.
pub const LONGEST_SEGMENT: u64 = 64 << 20;

/// Where the journal of a disk lies.
pub fn place(retention: &Path, machine: &Name, disk: &Name) -> PathBuf {
    retention.join(points::JOURNALS).join(machine.as_str()).join(disk.as_str())
}

/// Why a machine's disks cannot be brought to a point, or a point not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A journal is damaged or cannot be read.
    #[error(
        "disk {disk} of machine {machine} (`mt-agent check {machine}` on the master target says which points that costs, and \
         with --give-up gives these up, so that the machine can be received again)"
    )]
    Journal {
        /// The machine.
        machine: Name,
        /// The disk.
        disk: Name,
        /// What is wrong.
        #[source]
        source: recover::Error,
    },
    /// The log does not have the newest point of a disk, which the protection has: the end of the log is missing.
    #[error(
        "points.log does not have the newest point of disk {disk} of machine {machine}, of {}: it is an older copy, or lines were \
         cut off its end, and the disk is not what it tells any more. Put the log back as it was, or give the points up with \
         `mt-agent check {machine} --give-up`: then the machine can be received again, from an initial pass on",
        crate::units::rfc3339(*time)
    )]
    Behind {
        /// The machine.
        machine: Name,
        /// The disk.
        disk: Name,
        /// When the newest point was committed.
        time: OffsetDateTime,
    },
    /// The log does not know that the disk is released, which the protection does: the end of the log is missing.
    #[error(
        "points.log does not know that machine {machine} was failed over to point {point}: it is an older copy, or lines were cut \
         off its end; disk {disk} may not be what it tells any more, and in use elsewhere. Put the log back as it \
         was, or give the points up with `mt-agent check {machine} --give-up`: then the machine can be received again, from an \
         initial pass on"
    )]
    Forgotten {
        /// The machine.
        machine: Name,
        /// The disk.
        disk: Name,
        /// Where it was failed over to.
        point: PointId,
    },
    /// The points log.
    #[error(transparent)]
    Points(#[from] points::Error),
    /// The protections.
    #[error(transparent)]
    Protection(#[from] protection::Error),
    /// A target disk cannot be opened.
    #[error(transparent)]
    Disk(#[from] crate::disk::device::Error),
    /// Somebody wrote to a disk that was released.
    #[error(
        "disk {disk} of machine {machine} was written to since it was released: {place} is not as it was; the points are not on \
         it any more. Fail over no more and use the disks as they are, or give the points up with \
         `mt-agent check {machine} --give-up`: then the machine can be received again, from an initial pass on"
    )]
    Written {
        /// The machine.
        machine: Name,
        /// The disk.
        disk: Name,
        /// Where it shows.
        place: &'static str,
    },
    /// A rule or the present state forbids it; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// A write or a flush of a target disk failed.
    #[error("disk {disk} of machine {machine} failed; call it again once the cause is gone")]
    Fault {
        /// The machine.
        machine: Name,
        /// The disk.
        disk: Name,
        /// Why.
        #[source]
        source: crate::volume::Fault,
    },
}

/// What the points log says of one disk of a machine.
#[derive(Clone, Debug)]
pub struct Standing {
    /// The points that the disk has, oldest first, and the passes that led there.
    points: Vec<(PointId, u64)>,
    /// The pass that brought it back from the newest point to an older one, at which it is released.
    pub back: Option<u64>,
    /// What its segments and its points have in common; `None` while it has no point.
    pub lineage: Option<Lineage>,
    /// The passes through which the ways back lead, also those of points that were thinned, and how many bytes each saved,
    /// where that is recorded.
    led: BTreeMap<u64, Option<u64>>,
    /// The lineages of all other disks that have points.
    others: HashSet<Lineage>,
}

impl Standing {
    /// Of this disk, which has points only on this target.
    pub fn of(machine: &Name, disk: &Name, target: &DiskId, log: &Log) -> Standing {
        let is_ours = |at: &&VolumeAt| at.machine == *machine && at.is_on(disk, target);
        let kept = log.history().iter().filter(|entry| entry.dropped.is_none()).map(|entry| &entry.point);
        let volumes = kept.clone().filter_map(|point| Some((point, point.volumes.iter().find(is_ours)?)));
        let lineage = volumes.clone().next_back().map(|(_, at)| at.lineage);
        let points: Vec<_> = volumes.map(|(point, at)| (point.id, at.pass)).collect();
        let others = kept.flat_map(|point| &point.volumes).filter(|at| !is_ours(at)).map(|at| at.lineage);
        let mut standing =
            Standing { points, back: None, lineage, led: BTreeMap::new(), others: others.collect() };
        // Where the points that it went back from were given up, it stands at the newest one, and the pass leads nowhere.
        let released = log.released(machine).filter(|released| standing.newest() != Some(released.point));
        standing.back = released
            .and_then(|released| released.disks.iter().find(|back| back.disk == *disk))
            .and_then(|back| back.pass);
        let through = standing.oldest() + 1..=standing.points.last().map_or(0, |(_, pass)| *pass);
        let with_images = log.history().iter().filter(|entry| entry.has_images());
        let passes = with_images.filter_map(|entry| entry.point.volumes.iter().find(is_ours));
        let passes = passes.filter(|at| Some(at.lineage) == lineage && through.contains(&at.pass));
        let back = standing.back.map(|back| (back, None));
        standing.led = passes.map(|at| (at.pass, Some(at.bytes))).chain(back).collect();
        standing
    }

    /// The newest point.
    pub fn newest(&self) -> Option<PointId> {
        self.points.last().map(|(point, _)| *point)
    }

    /// The pass that led to the oldest point, or 0.
    pub fn oldest(&self) -> u64 {
        self.points.first().map_or(0, |(_, pass)| *pass)
    }

    /// The pass that led to where the disk stands: to the newest point, or back from there; or 0.
    pub fn committed(&self) -> u64 {
        self.back.or(self.points.last().map(|(_, pass)| *pass)).unwrap_or(0)
    }

    /// The pass that led to this point.
    pub fn pass_at(&self, point: PointId) -> Option<u64> {
        self.points.iter().find(|(known, _)| *known == point).map(|(_, pass)| *pass)
    }

    /// Whether a segment with this lineage belongs to the disk; while it has no point, any that is no other disk's may.
    pub fn is_ours(&self, lineage: Lineage) -> bool {
        self.lineage.map_or_else(|| !self.others.contains(&lineage), |ours| ours == lineage)
    }
}

/// Removes the segments of one disk that no kept point needs. Whoever writes the disk meanwhile writes others.
pub fn let_go(retention: &Path, machine: &Name, disk: &Name, standing: &Standing) -> Result<(), Error> {
    let shelf = Directory::at(place(retention, machine, disk));
    let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.clone(), source };
    // What led to the oldest point, or to one that was let go of.
    let unneeded = ..=standing.oldest();
    recover::let_go(&shelf, unneeded, &|lineage| standing.is_ours(lineage)).map_err(failed)
}

/// The journal of one disk of a machine, and what the log says of it.
pub struct Journal {
    /// Its segments.
    pub shelf: Directory,
    /// What they hold.
    pub history: History,
    /// What the log says.
    pub standing: Standing,
}

impl Journal {
    /// Reads it, and changes nothing. `disk` was loaded before the log was read, or nobody commits a pass meanwhile.
    pub fn read(retention: &Path, machine: &Name, disk: &Assignment, log: &Log) -> Result<Journal, Error> {
        let Assignment { name, id, .. } = disk;
        if let Some(point) = disk.released
            && log.released(machine).is_none_or(|released| released.point != point)
        {
            return Err(Error::Forgotten { machine: machine.clone(), disk: name.clone(), point });
        }
        let shelf = Directory::at(place(retention, machine, name));
        let standing = Standing::of(machine, name, id, log);
        // Not opened unless it is asked: most journals say all by themselves.
        let holds = |extent| Target::attached(id)?.read(extent);
        let history = recover(&shelf, &|lineage| standing.is_ours(lineage), &holds)
            .map_err(|source| Error::Journal { machine: machine.clone(), disk: name.clone(), source })?;
        let journal = Journal { shelf, history, standing };
        match journal.lacks(machine, disk, log) {
            Some(commit) => {
                Err(Error::Behind { machine: machine.clone(), disk: name.clone(), time: commit.time })
            }
            None => Ok(journal),
        }
    }

    /// The disk's newest commit, where the log should have it and does not: a point is recorded there before it is in the
    /// protection.
    fn lacks(&self, machine: &Name, disk: &Assignment, log: &Log) -> Option<Commit> {
        let commit = disk.last_commit?;
        let is_it = |at: &VolumeAt| at.is_on(&disk.name, &disk.id) && at.sender_pass == commit.pass;
        let known = log.history().iter().any(|entry| entry.point.volumes_of(machine).any(is_it));
        // The log keeps it also where it was dropped. One that was moved away on purpose took the journals with it.
        let moved_away = self.standing.newest().is_none() && self.history.passes.is_empty();
        (!known && !moved_away).then_some(commit)
    }

    /// Whether the way back to the point after this pass is whole: every pass since then that led to a point is there, to
    /// its end, and nothing is known to be damaged.
    pub fn reaches(&self, pass: u64) -> Result<(), recover::Error> {
        self.history.after(pass)?;
        match self.missing().into_iter().find(|(missing, _)| *missing > pass) {
            Some((pass, damage)) => Err(recover::Error::Corrupt { pass, damage }),
            None => Ok(()),
        }
    }

    /// The passes through which ways back lead, and that are not there as they were when they ended.
    pub fn missing(&self) -> Vec<(u64, Damage)> {
        let missing = self.standing.led.iter().filter_map(|(led, bytes)| {
            let what = match self.history.passes.get(led) {
                Some(found) if !found.ended => "the end of this pass is missing",
                Some(found) if bytes.is_some_and(|bytes| bytes != found.bytes) => {
                    "this is another pass than the one that led to the point, or segments are missing"
                }
                Some(_) => return None,
                None => "the segments of this pass are missing",
            };
            Some((*led, Damage { segment: segment_name(*led, 0), at: 0, what }))
        });
        missing.collect()
    }

    /// Removes the segments of these passes.
    pub fn discard(&self, passes: impl RangeBounds<u64>) -> Result<(), recover::Error> {
        recover::let_go(&self.shelf, passes, &|lineage| self.standing.is_ours(lineage))
    }

    /// Removes what nobody needs any more. For the one that writes the disk.
    pub fn tidy(&self) -> Result<(), recover::Error> {
        recover::tidy(&self.shelf)?;
        self.discard(..=self.standing.oldest())
    }

    /// Passes that lead to no point, oldest first: one that was interrupted, as a rule none or one.
    pub fn open(&self) -> Result<Vec<&Pass>, recover::Error> {
        self.history.after(self.standing.committed())
    }

    /// The number of a new pass.
    pub fn next(&self) -> u64 {
        let last = self.history.passes.keys().next_back().copied().unwrap_or(0);
        last.max(self.standing.committed()) + 1
    }
}
