//! The rules by which a disk may become a target.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use time::OffsetDateTime;

use super::{Assignment, State};
use crate::disk::discover::{Disk, Role};
use crate::disk::id::{self, DiskId};
use crate::name::{Name, ParseNameError};

/// One `NAME=DISK` of a command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// The machine's name for its disk.
    pub name: Name,
    /// The target disk that was asked for.
    pub target: Target,
}

/// How a target disk was named.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// By its identity, in any spelling.
    Id(DiskId),
    /// By a device node such as `/dev/sdb`, which means whatever it means right now: it is replaced by the identity.
    Node(PathBuf),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Id(id) => id.fmt(f),
            Target::Node(path) => path.display().fmt(f),
        }
    }
}

/// Why a text is no `NAME=DISK`.
#[derive(Debug, thiserror::Error)]
pub enum ParseRequestError {
    /// There is no `=`.
    #[error(
        "`{0}` is not NAME=DISKID, as in root=naa.6000c29…; `mt-agent discover-disks` shows the identities"
    )]
    Form(String),
    /// The name is none.
    #[error("no name of a disk before the `=`")]
    Name(#[source] ParseNameError),
    /// The identity is none.
    #[error("no identity of a disk behind the `=`; `mt-agent discover-disks` shows them")]
    Id(#[source] id::ParseError),
}

impl FromStr for Request {
    type Err = ParseRequestError;

    fn from_str(text: &str) -> Result<Request, ParseRequestError> {
        let (name, target) =
            text.split_once('=').ok_or_else(|| ParseRequestError::Form(text.escape_debug().collect()))?;
        let name = name.trim().parse().map_err(ParseRequestError::Name)?;
        let target = target.trim();
        let path = Path::new(target);
        // The links below /dev/disk/by-id carry an identity, every other name below /dev is a place.
        let target = match target.parse() {
            Ok(id) => Target::Id(id),
            Err(_) if path.starts_with("/dev") && !path.starts_with("/dev/disk/by-id") => {
                Target::Node(path.to_owned())
            }
            Err(error) => return Err(ParseRequestError::Id(error)),
        };
        Ok(Request { name, target })
    }
}

/// A command that asked for disks that it cannot have. Nothing was assigned.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct Refused {
    /// The machine that they were for.
    pub machine: Name,
    /// Each disk that was refused.
    pub refused: Vec<Refusal>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nothing was assigned to machine {}:", self.machine)?;
        for refusal in &self.refused {
            write!(f, "\n  {}={}: {}", refusal.disk, refusal.given, refusal.why)?;
        }
        Ok(())
    }
}

/// One disk that was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The machine's name for it.
    pub disk: Name,
    /// How the target was named.
    pub given: String,
    /// Why.
    pub why: Why,
}

/// Why a disk cannot be a target.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Why {
    /// Not attached, or never was.
    #[error("no such disk is attached; see `mt-agent discover-disks`, or `--rescan` if it was just attached")]
    Absent,
    /// A partition, or another node that is no whole disk.
    #[error("this is not a whole disk; see `mt-agent discover-disks`")]
    NotADisk,
    /// It carries this host.
    #[error("it carries this system ({evidence}); choose another disk")]
    System {
        /// How that is known.
        evidence: String,
    },
    /// Somebody uses it.
    #[error("it is in use ({evidence}); release it first, or choose another disk")]
    InUse {
        /// By whom.
        evidence: String,
    },
    /// It carries the retention file system.
    #[error("it carries the retention directory; choose another disk")]
    Retention,
    /// Another disk has the same identity.
    #[error("another disk has the same identity ({evidence}); detach one of them, or give it a new UUID")]
    Clone {
        /// Which.
        evidence: String,
    },
    /// It has no identity.
    #[error("it has no UUID, and no weaker identity either{hint}")]
    NoIdentity {
        /// What discovery advises.
        hint: String,
    },
    /// It has an identity that is not world-wide unique, and it was not named by that.
    #[error("it has no UUID; if you are sure, name it by its weaker identity: {name}={id}")]
    Weak {
        /// The machine's name for it.
        name: Name,
        /// The weaker identity.
        id: DiskId,
    },
    /// A loop device, where those are not allowed.
    #[error("it is a loop device; set `allow_loop = true` in the configuration if that is what you want")]
    Loop,
    /// The kernel does not let it be written.
    #[error("it is read-only")]
    ReadOnly,
    /// It belongs to somebody.
    #[error("it is assigned to {owner} already; `mt-agent protect remove` takes it away from there")]
    Assigned {
        /// As `machine/disk`.
        owner: String,
    },
    /// The machine has another target of this name.
    #[error(
        "the machine has {id} under this name already; \
         take it away first with `mt-agent protect remove {machine} --disk NAME`"
    )]
    NameTaken {
        /// The machine.
        machine: Name,
        /// Its target of this name.
        id: DiskId,
    },
    /// The command names the target twice.
    #[error("it is the same disk as {other}")]
    Twice {
        /// The other name of it.
        other: Name,
    },
    /// The command gives a name twice.
    #[error("the name is given twice")]
    NameTwice,
    /// It carries something.
    #[error("it is not empty ({content}); everything on it is lost if you give --overwrite")]
    NotEmpty {
        /// What lies on it.
        content: String,
    },
    /// More disks than a machine can have.
    #[error("a machine has at most {most} disks")]
    TooMany {
        /// That many.
        most: usize,
    },
}
