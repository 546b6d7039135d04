//! Recovery points: the moments to which the disks of a machine, or of a group of machines, can be brought.
//!
//! They lie in the *points log*, `<retention>/points.log`: one record a line, appended, checksummed, readable.
//! The bytes are in [`line`](mod@line), the file in [`Log`], and which points are let go in [`retention`].
//!
//! ```text
//! 7bd4ec45 {"record":"log","schema_version":2}
//! 5c1f0ab2 {"record":"point","id":"0001…","time":"2026-03-01T10:00:00Z","recorded":"…","kind":"crash",…}
//! 91e2d03c {"record":"dropped","time":"2026-03-02T10:00:05Z","reason":"age","points":["0001…"]}
//! ```
//!
//! A point's record *is* its commit, for all the disks that it names and of whatever machines: they are there
//! together or not at all, and nothing else has to be coordinated. Dropping points is a record as well, so that a
//! point is gone before the first of its before-images is.
//!
//! The passes of a volume are numbered, and a pass leads from one point to the next: pass *n* saved, before it wrote,
//! what the disk held at the point after pass *n − 1*. To read an older point one needs the before-images of all
//! the passes after it. So a dropped point frees what its *successor's* pass saved, and only once no older point of
//! that volume is kept.

pub mod line;
mod log;
pub mod retention;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::disk::id::DiskId;
use crate::error::IoError;
use crate::name::Name;
use crate::pass::{Lineage, PassId, id};

pub use log::{Entry, FILE_NAME, JOURNALS, Log};

id!(
    /// The name of a point, chosen by the sender: 128 random bits, written as 32 hexadecimal digits.
    PointId,
    ParsePointIdError,
    "a point"
);

/// What the source's file systems would find on the disks, best last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// What a power cut leaves.
    Crash,
    /// File systems that were frozen: nothing to repair.
    Filesystem,
    /// The applications had been told, too.
    Application,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Crash => "crash",
            Kind::Filesystem => "filesystem",
            Kind::Application => "application",
        })
    }
}

/// A moment to which the disks that it names can be brought.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Its name, the same for all disks that were sent together.
    pub id: PointId,
    /// The moment, by the source's clock.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// When it was recorded, by this host's clock. Retention goes by it: a source whose clock is wrong neither
    /// loses its points at once nor keeps them for ever.
    #[serde(with = "time::serde::rfc3339")]
    pub recorded: OffsetDateTime,
    /// What it is worth.
    pub kind: Kind,
    /// Whether the source was in use and not frozen while it was read: then it is no moment at all, and serves
    /// only as what the next pass compares with.
    pub fuzzy: bool,
    /// What the user calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The consistency group that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Name>,
    /// Every disk that can be brought to it; never none, and no disk twice.
    pub volumes: Vec<VolumeAt>,
}

impl Point {
    /// Its volumes of one machine.
    pub fn volumes_of<'a>(&'a self, machine: &'a Name) -> impl Iterator<Item = &'a VolumeAt> {
        self.volumes.iter().filter(move |volume| volume.machine == *machine)
    }

    /// Whether it names a disk of the machine.
    pub fn is_of(&self, machine: &Name) -> bool {
        self.volumes_of(machine).next().is_some()
    }
}

/// One disk at a point.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeAt {
    /// The machine.
    pub machine: Name,
    /// The machine's name for the disk.
    pub disk: Name,
    /// The target disk.
    pub id: DiskId,
    /// What the volume's journal and all its points since the last initial pass have in common.
    pub lineage: Lineage,
    /// The number of the pass in the volume's journal that led to the point.
    pub pass: u64,
    /// The sender's name for that pass.
    pub sender_pass: PassId,
    /// How many bytes of before-images that pass saved: what going back *from* this point to the one before it
    /// writes. None, for an initial pass.
    pub bytes: u64,
}

impl VolumeAt {
    /// Whether it is this disk of its machine, on this target disk.
    pub fn is_on(&self, disk: &Name, target: &DiskId) -> bool {
        self.disk == *disk && self.id == *target
    }
}

/// Why points were dropped.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    /// They were older than they may become.
    Age,
    /// The before-images took more room than they may.
    Size,
    /// The retention file system had too little room.
    Space,
    /// Thinning: others near them were kept.
    Thinned,
    /// An initial pass overwrites the disks in place.
    Initial,
    /// What made them was undone.
    Undo,
    /// The user asked for it.
    Asked,
}

/// Points that are no longer there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dropped {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// Why.
    pub reason: Reason,
    /// Which: never none, and none twice.
    pub points: Vec<PointId>,
}

/// Points that a user gave up for a machine, with all of their disks; and where the machine is failed over to one of them, or
/// about to be, that too: its disks are at no point then.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GivenUp {
    /// The machine.
    pub machine: Name,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// Which: never none, and none twice. None at which another machine is failed over.
    pub points: Vec<PointId>,
}

/// A point of several machines went as such, from all of them at once: it is from now on a point of those alone that stand at
/// it, as their newest, and belongs to no group.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Narrowed {
    /// The point.
    pub point: PointId,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// Why.
    pub reason: Reason,
    /// The machines that it still is of: never none, none twice, and not all that it was of.
    pub machines: Vec<Name>,
}

/// A machine was failed over: its disks are no longer ours to write.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Released {
    /// The machine.
    pub machine: Name,
    /// The point at which its disks are.
    pub point: PointId,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// Its disks.
    pub disks: Vec<ReleasedDisk>,
}

/// One disk of a machine that was failed over.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleasedDisk {
    /// The machine's name for the disk.
    pub disk: Name,
    /// The number of the pass, in the volume's journal, that brought it back to the point. A disk that stood at it already
    /// has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass: Option<u64>,
    /// What it held then, so that it can be noticed when somebody wrote to it.
    pub sample: Sample,
}

/// Checksums of some places of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// Of its first 16 MiB.
    pub head: u32,
    /// Of its last MiB.
    pub tail: u32,
    /// Of 4 KiB at each of 64 places between.
    pub between: u32,
}

impl Sample {
    /// Where it shows that the disk holds something else now.
    pub fn differs(&self, now: &Sample) -> Option<&'static str> {
        let places = [
            (self.head != now.head, "its first 16 MiB"),
            (self.tail != now.tail, "its last MiB"),
            (self.between != now.between, "one of 64 places between its ends"),
        ];
        places.into_iter().find_map(|(differs, place)| differs.then_some(place))
    }
}

/// Disks of a machine are about to be written by something else than its passes. Until it is done, and that is recorded,
/// nothing else writes them, and its point is not let go.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Begun {
    /// The machine.
    pub machine: Name,
    /// The point of a failover; none where one is taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<PointId>,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
}

impl fmt::Display for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.point {
            Some(point) => write!(f, "a failover of machine {} to point {point}", self.machine),
            None => write!(f, "the undoing of the failover of machine {}", self.machine),
        }
    }
}

/// A failover was undone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakenBack {
    /// The machine.
    pub machine: Name,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
}

/// What is appended to the log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// A point was committed.
    Point(Point),
    /// Points were let go.
    Dropped(Dropped),
    /// A point went, but for machines that stand at it.
    Narrowed(Narrowed),
    /// Points were given up for a machine.
    GivenUp(GivenUp),
    /// A failover begins, or its undoing.
    Begun(Begun),
    /// A machine was failed over.
    Released(Released),
    /// That was undone.
    TakenBack(TakenBack),
}

/// Why the log cannot be read or appended to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused. Where a write or a flush of the log failed, it is [`Error::Latched`] from then on.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The log does not hold what it must; a crash leaves nothing but a part of the last line.
    #[error(
        "{}:{line}: {what}; put back a sound copy of the file, or move it away together with the directory `journals` beside \
         it: the disks keep what they hold, the points are given up, and the machines' next passes must be initial ones",
        file.display()
    )]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        what: String,
    },
    /// There is no log where there must be one: it is made before the first journal is.
    #[error(
        "{} is missing, and the directory `journals` beside it shows that there were recovery points; put back a sound copy, \
         or move `journals` away too: the disks keep what they hold, the points are given up, and the machines' next passes \
         must be initial ones", file.display()
    )]
    Missing {
        /// The file.
        file: PathBuf,
    },
    /// A log of a schema that this version does not know.
    #[error(
        "{}: schema_version is {version}, and this mt-agent knows only {}; \
         update mt-agent", file.display(), line::SCHEMA_VERSION
    )]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The record contradicts what the log holds, or cannot be written as a line. Nothing was written.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A write or a flush of the log failed before, so that nobody knows what it holds until it is opened again.
    #[error("{} takes no more records since writing it failed; it must be opened again", file.display())]
    Latched {
        /// The file.
        file: PathBuf,
    },
}

/// Why a record is not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    /// A point of that name was recorded before.
    #[error("point {0} was recorded before")]
    Known(PointId),
    /// There is no such point, or no longer.
    #[error("there is no point {0}")]
    NoPoint(PointId),
    /// The point has no disk of the machine.
    #[error("point {point} has no disk of machine {machine}")]
    NotOf {
        /// The point.
        point: PointId,
        /// The machine.
        machine: Name,
    },
    /// The passes of a volume ascend.
    #[error("pass {pass} of disk {disk} of machine {machine} does not follow its pass {last}")]
    Pass {
        /// The machine.
        machine: Name,
        /// The disk.
        disk: Name,
        /// The number that was given.
        pass: u64,
        /// The number of its newest point.
        last: u64,
    },
    /// The point has no machine but these, or none of them.
    #[error(
        "point {0} cannot be narrowed to these machines: it has others than them, and each of them, or it stays as it is"
    )]
    Narrow(PointId),
    /// The disks of the machine are not ours.
    #[error("machine {machine} was failed over to point {point}")]
    Released {
        /// The machine.
        machine: Name,
        /// The point.
        point: PointId,
    },
    /// Something else writes the disks of the machine, or was interrupted.
    #[error("{0} began and is not done")]
    Begun(Begun),
    /// The disks of the machine are ours.
    #[error("machine {0} is not failed over")]
    NotReleased(Name),
    /// It cannot be a line of the log.
    #[error(transparent)]
    Line(#[from] line::Error),
    /// The log would grow beyond what is read.
    #[error("the points log is full: {0} bytes are the most")]
    Full(u64),
}

#[cfg(test)]
mod tests;
