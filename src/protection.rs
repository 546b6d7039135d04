//! Which target disk belongs to which disk of which machine, and how far each of them has come.
//!
//! One readable file a machine, `<retention>/machines/<machine>.toml`. It lies on the retention file system so
//! that the disks and the retention disk, attached to another master target, go on from there. [`Store`] is the
//! only one who writes these files, and whatever it wrote is durable when it returns. The bytes are in [`mod@file`],
//! the rules by which a disk may be assigned in [`assign`].
//!
//! ```toml
//! schema_version = 1
//! machine = "web01"
//! created = "2026-03-01T10:00:00Z"
//! group = "shop"                       # the consistency group that the machine belongs to, if any
//!
//! [[disk]]
//! name = "root"                        # the machine's name for it
//! id = "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90"
//! size = 10737418240                   # bytes, when it was assigned
//! logical_sector = 512                 # bytes
//! overwrite = false                    # whether it was assigned with --overwrite or --seed, and carried something
//! assigned_at = "2026-03-01T10:00:00Z"
//! state = "receiving"                  # empty, receiving, synchronized or faulted
//! [disk.pass]                          # while receiving or faulted: the pass that did it
//! id = "000102030405060708090a0b0c0d0e0f"
//! started = "2026-03-01T11:00:00Z"
//! [disk.last_commit]                   # once a pass was committed: the newest one
//! pass = "0f0e0d0c0b0a09080706050403020100"
//! time = "2026-03-01T10:30:00Z"
//! bytes = 10737418240
//! point_in_time = true
//! [disk.source]                        # once a pass began: the machine's disk that the target has, or had, bytes of
//! size = 10737418240
//! id = "naa.6000c29b7d3e5f1a2b4c6d8e0f102132"  # where it has an identity
//! ```
//!
//! `released = "<a point>"` beside `state` says that the machine is failed over to it. `seed = true` beside `overwrite` says that what the disk carried is an older copy of the machine's (`--seed`).
//!
//! The states and what leads from one to the other:
//!
//! ```text
//!            begin            commit
//!   empty ---------> receiving ------> synchronized
//!                    |  ^  ^ begin          |
//!              fault |  |  +----------------+
//!                    v  | begin, with another pass
//!                  faulted
//! ```

pub mod assign;
pub mod file;
mod store;

use std::path::PathBuf;

use time::OffsetDateTime;

use crate::disk::id::DiskId;
use crate::error::IoError;
use crate::name::Name;
use crate::pass::PassId;
use crate::points::PointId;
use crate::units::ByteLen;

pub use store::{Hold, Listed, Store};

/// The target disks of one machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Protection {
    /// The protected machine.
    pub machine: Name,
    /// When its first disk was assigned.
    pub created: OffsetDateTime,
    /// The consistency group that it belongs to. All machines that name a group are its members.
    pub group: Option<Name>,
    /// Its disks, in the order of their assignment; never none, and no name or identity twice.
    pub disks: Vec<Assignment>,
}

impl Protection {
    /// The assignment of one of the machine's disks.
    pub fn disk(&self, name: &Name) -> Option<&Assignment> {
        self.disks.iter().find(|disk| disk.name == *name)
    }
}

/// One target disk that belongs to a machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Assignment {
    /// The machine's name for its disk.
    pub name: Name,
    /// The target disk.
    pub id: DiskId,
    /// Its size in bytes when it was assigned.
    pub size: ByteLen,
    /// Its logical sector size in bytes when it was assigned.
    pub logical_sector: u32,
    /// Whether it was assigned with `--overwrite` or `--seed`, although it carried something.
    pub overwrite: bool,
    /// Whether what it carried is an older copy of the machine's disk: only what differs from it need be sent.
    pub seed: bool,
    /// When it was assigned.
    pub assigned_at: OffsetDateTime,
    /// How far it is.
    pub state: State,
    /// The newest pass that was committed, if there is one. The disk stands at it only while the state is
    /// [`State::Synchronized`].
    pub last_commit: Option<Commit>,
    /// The source of the newest pass that began.
    pub source: Option<Source>,
    /// The point at which it is released: others may use it. The points log says so too, and for longer; here it shows that a
    /// log which does not has lost its end.
    pub released: Option<PointId>,
    /// Whether a failover was taken back since the last commit. Of what others did to the disk meanwhile only samples were looked
    /// at: the next pass has to look at all of it.
    pub taken_back: bool,
}

/// A disk of the protected machine: what tells it from another one, or from itself after it was resized.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// Its size in bytes.
    pub size: ByteLen,
    /// Its identity, where it has one: an image has none, nor has a logical volume.
    pub id: Option<DiskId>,
}

/// How far a target disk is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum State {
    /// Assigned, and nothing was written yet.
    Empty,
    /// A pass writes, or was interrupted: the content is neither the old nor the new.
    Receiving(Pass),
    /// The content is that of the last commit.
    Synchronized,
    /// A write or a flush failed in this pass: nothing is known of the content.
    Faulted(Pass, Fault),
}

impl State {
    /// The name that it has in the file and in messages.
    pub fn name(&self) -> &'static str {
        match self {
            State::Empty => "empty",
            State::Receiving(_) => "receiving",
            State::Synchronized => "synchronized",
            State::Faulted(..) => "faulted",
        }
    }
}

/// A pass that began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pass {
    /// The sender's name for it.
    pub id: PassId,
    /// When it began.
    pub started: OffsetDateTime,
}

/// A pass that was committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Commit {
    /// The sender's name for the pass.
    pub pass: PassId,
    /// When it was committed.
    pub time: OffsetDateTime,
    /// How many bytes of the volume it brought, zeros included.
    pub bytes: u64,
    /// Whether the source stood still while it was read.
    pub point_in_time: bool,
}

/// What failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// When.
    pub time: OffsetDateTime,
    /// What, as it is shown to the operator. At most [`file::MAX_REASON`] bytes are kept.
    pub reason: String,
}

/// Why a protection cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A protection file does not hold what it must. Nothing was changed; the other machines are not concerned.
    #[error(
        "{}:{line}: {what}; correct the file by hand, or take it away, with its recovery points, with `mt-agent protect \
         remove {machine}`, and assign the disks again with `mt-agent protect add`", file.display()
    )]
    Corrupt {
        /// The machine whose protection it is by its name.
        machine: Name,
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        what: String,
    },
    /// A protection file of a schema that this version does not know.
    #[error(
        "{}: schema_version is {version}, and this mt-agent knows only {}; \
         update mt-agent", file.display(), file::SCHEMA_VERSION
    )]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The machine has no disks here.
    #[error(
        "no disk is assigned to machine {machine}; see `mt-agent protect list`, assign one with \
         `mt-agent protect add {machine} --disk NAME=DISKID`"
    )]
    NoMachine {
        /// The machine.
        machine: Name,
    },
    /// The machine has other disks, but not this one.
    #[error(
        "machine {machine} has no disk {disk} here; see `mt-agent protect list {machine}`, assign it with \
         `mt-agent protect add {machine} --disk {disk}=DISKID`"
    )]
    NoDisk {
        /// The machine.
        machine: Name,
        /// The disk.
        disk: Name,
    },
    /// The machine is no member of the group.
    #[error(
        "machine {machine} does not belong to group {group}; see `mt-agent protect list`, set its machines with \
         `mt-agent protect group {group} --machines {machine},…`"
    )]
    NotInGroup {
        /// The machine.
        machine: Name,
        /// The group.
        group: Name,
    },
    /// No machine belongs to the group.
    #[error(
        "no machine belongs to group {0}; see `mt-agent protect list`, make it with \
         `mt-agent protect group {0} --machines A,B`"
    )]
    NoGroup(Name),
    /// Refused: the machine belongs to another group.
    #[error("machine {machine} belongs to group {group}; take that away first, or leave the machine out")]
    Grouped {
        /// The machine.
        machine: Name,
        /// The other group.
        group: Name,
    },
    /// Refused: a session of the machine runs.
    #[error("machine {machine} is receiving; stop its `mt-agent send` first")]
    Receiving {
        /// The machine.
        machine: Name,
    },
    /// Refused: the machine is being failed over, or that is being taken back.
    #[error("machine {machine} is being failed over")]
    Excluded {
        /// The machine.
        machine: Name,
    },
    /// Refused: the state of the disk does not lead there.
    #[error("disk {disk} of machine {machine} is {from}: it cannot {step}")]
    Transition {
        /// The machine.
        machine: Name,
        /// The disk.
        disk: Name,
        /// Its state, with the pass where it has one.
        from: String,
        /// What was asked.
        step: String,
    },
    /// Refused: two protections name one target disk.
    #[error(
        "disk {id} is assigned to disk {disk} of machine {machine} too; \
         take one of the two away with `mt-agent protect remove`"
    )]
    Shared {
        /// The target disk.
        id: DiskId,
        /// The other machine.
        machine: Name,
        /// The other machine's disk.
        disk: Name,
    },
    /// Refused by the rules for assigning disks. Nothing was assigned.
    #[error(transparent)]
    Refused(#[from] assign::Refused),
}

impl Error {
    /// Whether a rule or the present state refused it, rather than a failure.
    pub fn is_refusal(&self) -> bool {
        match self {
            Error::Io(_) | Error::Corrupt { .. } | Error::Unsupported { .. } => false,
            Error::NoMachine { .. }
            | Error::NoDisk { .. }
            | Error::NotInGroup { .. }
            | Error::NoGroup(_)
            | Error::Grouped { .. }
            | Error::Receiving { .. }
            | Error::Excluded { .. }
            | Error::Transition { .. }
            | Error::Shared { .. }
            | Error::Refused(_) => true,
        }
    }
}

#[cfg(test)]
mod tests;
