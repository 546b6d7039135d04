//! Going back: what the journals of a machine's disks and the points log say together, and what can be made of it.
//!
//! - [`Journal`]: the journal of one disk, held against the log: which point the disk stands at, which pass is open.
//! - [`failover`]: brings the disks of a machine to a point and releases them, and takes that back.
//! - [`export`](mod@export): writes the disks as they were at a point to image files, while replication goes on.
//! - [`check`](mod@check): reads everything, and says which points are sound.

pub mod check;
pub mod export;
pub mod failover;

use std::path::{Path, PathBuf};

use crate::disk::id::DiskId;
use crate::error::IoError;
use crate::journal::recover::{self, Damage, History, Pass, recover};
use crate::journal::writer::segment_name;
use crate::name::Name;
use crate::points::{self, Log, PointId, VolumeAt};
use crate::protection;
use crate::storage::shelf::Directory;

/// The longest segment of a journal, in bytes.
pub const LONGEST_SEGMENT: u64 = 64 << 20;

/// Where the journal of a disk lies.
pub fn place(retention: &Path, machine: &Name, disk: &Name) -> PathBuf {
    retention.join("journals").join(machine.as_str()).join(disk.as_str())
}

/// Why a machine's disks cannot be brought to a point, or a point not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A journal is damaged or cannot be read.
    #[error("disk {disk} of machine {machine}")]
    Journal {
        /// The machine.
        machine: Name,
        /// The disk.
        disk: Name,
        /// What is wrong.
        #[source]
        source: recover::Error,
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

/// The journal of one disk of a machine, and what the log says of it.
pub struct Journal {
    /// Its segments.
    pub shelf: Directory,
    /// What they hold.
    pub history: History,
    /// The newest point that the disk has, and the pass that led there.
    pub newest: Option<(PointId, u64)>,
    /// The pass that led to the oldest point that is kept.
    pub oldest: Option<u64>,
    /// All passes that led to points, or back to one, in order.
    led: Vec<u64>,
}

impl Journal {
    /// Reads it, and changes nothing.
    pub fn read(
        retention: &Path,
        machine: &Name,
        disk: &Name,
        target: &DiskId,
        log: &Log,
    ) -> Result<Journal, recover::Error> {
        let shelf = Directory::at(place(retention, machine, disk));
        let history = recover(&shelf)?;
        let of_disk = |volume: &&VolumeAt| volume.disk == *disk && volume.id == *target;
        let passes: Vec<(PointId, u64)> = log
            .points(machine)
            .filter_map(|point| {
                let volume = point.volumes_of(machine).find(of_disk)?;
                Some((point.id, volume.pass))
            })
            .collect();
        let oldest = passes.first().copied();
        let mut newest = passes.last().copied();
        let mut led: Vec<u64> = passes.iter().map(|(_, pass)| *pass).collect();
        // Going back made a pass of its own, which is a part of what the disk stands at.
        if let (Some((_, pass)), Some(released)) = (&mut newest, log.released(machine)) {
            let back = released.passes.iter().find(|back| back.disk == *disk);
            *pass = back.map_or(*pass, |back| back.pass);
            led.extend(back.map(|back| back.pass));
        }
        Ok(Journal { shelf, history, newest, oldest: oldest.map(|(_, pass)| pass), led })
    }

    /// Whether the way back to the point after this pass is whole: every pass since then that led to a point is there, to
    /// its end, and nothing is known to be damaged.
    pub fn reaches(&self, pass: u64) -> Result<(), recover::Error> {
        self.history.after(pass)?;
        for led in self.led.iter().filter(|led| **led > pass) {
            let whole = self.history.passes.get(led).is_some_and(|found| found.ended);
            if !whole {
                let (segment, what) =
                    (segment_name(*led, 0), "segments of this pass, or its end, are missing");
                return Err(recover::Error::Corrupt { pass: *led, damage: Damage { segment, at: 0, what } });
            }
        }
        Ok(())
    }

    /// Removes what nobody needs any more. For the one that writes the disk.
    pub fn tidy(&self) -> Result<(), IoError> {
        recover::tidy(&self.shelf)?;
        self.let_go()
    }

    /// Removes the segments of passes that no kept point needs. Whoever writes the disk meanwhile writes others.
    pub fn let_go(&self) -> Result<(), IoError> {
        // What led to the oldest point, or to one that was let go of.
        let unneeded = self.history.up_to(self.oldest.unwrap_or(0));
        unneeded.into_iter().try_for_each(|pass| recover::discard(pass, &self.shelf))
    }

    /// The pass that led to the newest point, or 0.
    pub fn committed(&self) -> u64 {
        self.newest.map_or(0, |(_, pass)| pass)
    }

    /// Passes that lead to no point, oldest first: one that was interrupted, as a rule none or one.
    pub fn open(&self) -> Result<Vec<&Pass>, recover::Error> {
        self.history.after(self.committed())
    }

    /// The number of a new pass.
    pub fn next(&self) -> u64 {
        let last = self.history.passes.keys().next_back().copied().unwrap_or(0);
        last.max(self.committed()) + 1
    }
}
