//! The rules by which a disk may become a target.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use time::OffsetDateTime;

use super::{Assignment, State};
use crate::disk::device;
use crate::disk::discover::{Disk, Role};
use crate::disk::id::{self, DiskId};
use crate::error::chain;
use crate::layout::signature::Content;
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
    /// It carries this host, or is mounted.
    #[error("this system uses it ({evidence}); unmount it, or choose another disk")]
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
    /// What cannot be a disk.
    #[error("it has {size} bytes in sectors of {sector}: no medium, or a path that failed")]
    Geometry {
        /// In bytes.
        size: u64,
        /// In bytes.
        sector: u32,
    },
    /// Nobody can tell what lies on it.
    #[error("it cannot be read ({error}); see `dmesg`")]
    Unreadable {
        /// What the operating system said.
        error: String,
    },
    /// The kernel does not let it be written.
    #[error("it is read-only")]
    ReadOnly,
    /// It belongs to somebody.
    #[error(
        "it is assigned to machine {machine} as {disk}; if it shall not be any more, take it away there with \
         `mt-agent protect remove {machine} --disk {disk}`"
    )]
    Assigned {
        /// The machine.
        machine: Name,
        /// The machine's disk.
        disk: Name,
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
    #[error(
        "it is not empty ({content}); everything on it is lost if you give --overwrite; if it is an older \
         copy of this disk, --seed makes use of it"
    )]
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

/// A target that passed every rule that can be checked without the other assignments.
#[derive(Clone, Debug)]
pub struct Planned<'a> {
    /// The machine's name for it.
    pub name: Name,
    /// How it was named.
    pub given: String,
    /// The disk.
    pub disk: &'a Disk,
    /// Its identity.
    pub id: DiskId,
    /// What was found on it; `None` for one that is assigned in just this way already.
    pub content: Option<Content>,
}

impl Planned<'_> {
    /// The assignment that this becomes.
    pub fn assignment(&self, allowed: Allowed, now: OffsetDateTime) -> Assignment {
        let carries = self.content.as_ref().is_some_and(|content| !content.is_blank());
        Assignment {
            name: self.name.clone(),
            id: self.id.clone(),
            size: self.disk.size,
            logical_sector: self.disk.logical_sector,
            overwrite: carries && allowed.takes_content(),
            seed: carries && allowed.seed,
            assigned_at: now.replace_nanosecond(0).unwrap_or(now),
            state: State::Empty,
            last_commit: None,
            source: None,
            released: None,
            taken_back: false,
        }
    }
}

/// What the user allows beyond the rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Allowed {
    /// Disks that are not empty, and whose content is worth nothing.
    pub overwrite: bool,
    /// Disks that are not empty, and carry an older copy of the machine's.
    pub seed: bool,
    /// Loop devices.
    pub loops: bool,
}

impl Allowed {
    fn takes_content(self) -> bool {
        self.overwrite || self.seed
    }
}

/// Holds the requests of one command against the disks that are attached: all of them pass, or all that do not are
/// named. `content` says what lies on a disk, and is asked only of those that nothing else speaks against. Whether a
/// disk is assigned is looked at by `owners`, and for good by [`super::Store::assign`], which holds the lock.
pub fn plan<'a>(
    machine: &Name,
    requests: &[Request],
    disks: &'a [Disk],
    owners: &BTreeMap<DiskId, (Name, Name)>,
    allowed: Allowed,
    content: impl Fn(&Disk) -> Result<Content, device::Error>,
) -> Result<Vec<Planned<'a>>, Refused> {
    let mut planned: Vec<Planned<'a>> = Vec::new();
    let mut refused = Vec::new();
    for request in requests {
        let checked = check(request, disks, allowed).and_then(|(disk, id)| {
            if planned.iter().any(|other| other.name == request.name) {
                return Err(Why::NameTwice);
            }
            if let Some(twice) = planned.iter().find(|other| other.id == id) {
                return Err(Why::Twice { other: twice.name.clone() });
            }
            if let Some((owner, name)) = owners.get(&id) {
                return if owner == machine && *name == request.name {
                    Ok((disk, id, None))
                } else {
                    Err(Why::Assigned { machine: owner.clone(), disk: name.clone() })
                };
            }
            let content = content(disk).map_err(|error| Why::Unreadable { error: chain(&error) })?;
            if !content.is_blank() && !allowed.takes_content() {
                return Err(Why::NotEmpty { content: content.to_string() });
            }
            Ok((disk, id, Some(content)))
        });
        let given = request.target.to_string();
        match checked {
            Ok((disk, id, content)) => {
                planned.push(Planned { name: request.name.clone(), given, disk, id, content });
            }
            Err(why) => refused.push(Refusal { disk: request.name.clone(), given, why }),
        }
    }
    if refused.is_empty() { Ok(planned) } else { Err(Refused { machine: machine.clone(), refused }) }
}

fn check<'a>(request: &Request, disks: &'a [Disk], allowed: Allowed) -> Result<(&'a Disk, DiskId), Why> {
    let disk = match &request.target {
        Target::Id(id) => {
            if id.backing_file().is_some() && !allowed.loops {
                return Err(Why::Loop);
            }
            disks.iter().find(|disk| disk.id.as_ref() == Some(id)).ok_or(Why::Absent)?
        }
        Target::Node(node) => {
            // Through the links of /dev/disk/by-path and the like.
            let node = std::fs::canonicalize(node).map_err(|_| Why::Absent)?;
            let is = |disk: &&Disk| {
                disk.node == node || disk.paths.iter().any(|path| Path::new("/dev").join(path) == node)
            };
            disks.iter().find(is).ok_or(Why::NotADisk)?
        }
    };
    let evidence = || disk.evidence.join("; ");
    match disk.role {
        Role::System => return Err(Why::System { evidence: evidence() }),
        Role::InUse => return Err(Why::InUse { evidence: evidence() }),
        Role::Retention => return Err(Why::Retention),
        Role::Clone => return Err(Why::Clone { evidence: evidence() }),
        // Whose it is is looked at with the protections themselves, all of which must be readable then.
        Role::NoUuid | Role::Assigned | Role::Unknown | Role::Free => {}
    }
    let Some(id) = disk.id.clone() else {
        let hint: String = disk.problems.iter().map(|problem| format!("; {problem}")).collect();
        return Err(Why::NoIdentity { hint });
    };
    if id.backing_file().is_some() && !allowed.loops {
        return Err(Why::Loop);
    }
    if id.is_weak() && matches!(request.target, Target::Node(_)) {
        return Err(Why::Weak { name: request.name.clone(), id });
    }
    if disk.read_only {
        return Err(Why::ReadOnly);
    }
    let (size, sector) = (disk.size.0, disk.logical_sector);
    if size == 0 || sector == 0 || !size.is_multiple_of(u64::from(sector)) {
        return Err(Why::Geometry { size, sector });
    }
    Ok((disk, id))
}
