//! Opens target disks, by identity and never by name.
//!
//! [`open_target`] is the only way to a descriptor that may be written through. Discovery says which device has
//! the identity and whether its role allows it to be a target; the device is opened exclusively; and then its
//! identity is read once more *from the descriptor* ([`read_identity`]), because between the two a name can have
//! passed to another disk. From there on the exclusive open keeps others away.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::discover::exclusive::{self, Claim};
use super::discover::identity::{self, Identity, Transport};
use super::discover::{self, Disk, IdSource, Role, Sysroot};
use super::id::DiskId;
use crate::error::IoError;
use crate::layout::signature::{self, Content};
use crate::sys::ioctl;
use crate::units::ByteLen;

/// Why a disk is not opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The disks could not be looked at.
    #[error("the disks of this machine cannot be listed")]
    Discover(#[source] discover::Error),
    /// No disk has this identity.
    #[error("no disk here is {id}; attach it, then look with `mt-agent discover-disks --rescan`")]
    Missing {
        /// The identity that was looked for.
        id: DiskId,
    },
    /// The disk is there and must not be written.
    #[error("{id} is refused: {reason}")]
    Refused {
        /// The identity of the disk.
        id: DiskId,
        /// Which rule speaks against it.
        reason: Refusal,
    },
    /// The descriptor is not one of a whole disk whose identity could be known.
    #[error("{node} is no disk that can be identified: {why}")]
    NoDisk {
        /// The device.
        node: String,
        /// What it is instead.
        why: String,
    },
}

/// The rule by which a disk must not be written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// Its role: it carries this host, is in use, or shares its identity with another disk.
    #[error("its role is {}: {}", role.as_str(), evidence.join("; "))]
    Role {
        /// The role.
        role: Role,
        /// Why it has it.
        evidence: Vec<String>,
    },
    /// Something holds it, though nothing showed that.
    #[error("it is held by something else: {}", .0.join("; "))]
    Busy(
        /// Who holds it.
        Vec<String>,
    ),
    /// It belongs to another machine.
    #[error("it is assigned to the machine {owner}, not to {machine}")]
    OtherMachine {
        /// Whose it is.
        owner: String,
        /// Who asked for it.
        machine: String,
    },
    /// It belongs to no machine.
    #[error("it is not assigned to the machine {machine}; assign it with `mt-agent protect add`")]
    NotAssigned {
        /// Who asked for it.
        machine: String,
    },
    /// It is read-only.
    #[error("it is read-only")]
    ReadOnly,
    /// It is smaller than what it shall hold.
    #[error("it has {} ({} bytes) and {} ({} bytes) are needed", size, size.0, needed, needed.0)]
    TooSmall {
        /// What it has.
        size: ByteLen,
        /// What is needed.
        needed: ByteLen,
    },
    /// The opened device is another disk than the one that was found.
    #[error("{node} was opened and turned out to be {}: the disks changed meanwhile, look again", found.as_ref().map_or("a disk without identity".to_owned(), ToString::to_string))]
    Changed {
        /// The device.
        node: String,
        /// What the descriptor says.
        found: Option<DiskId>,
    },
}

impl Error {
    /// Whether it is a safety rule that spoke (exit code 3), and not something that failed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Error::Refused { .. } | Error::Missing { .. } | Error::NoDisk { .. })
    }
}

/// The identity of a block device that is already open, or `None` where it has none.
///
/// A SCSI disk is asked by INQUIRY through this very descriptor, which sysfs' copy of a page cannot outdo: that
/// may be stale. Where it gives no answer, and for other disks, sysfs is looked up by the descriptor's device
/// number. A loop device is asked on which file it stands, and that must be the file at the path which sysfs
/// shows. Fails for what is no whole disk.
pub fn read_identity(file: &File, sysroot: &Sysroot) -> Result<Option<(DiskId, IdSource)>, Error> {
    let meta = file.metadata().map_err(|error| IoError::new("stat", "an open disk", error))?;
    let no_disk = |node: String, why: &str| Error::NoDisk { node, why: why.to_owned() };
    if !meta.file_type().is_block_device() {
        return Err(no_disk("the file".to_owned(), "it is no block device"));
    }
    let devno = exclusive::number(meta.rdev());
    let link = sysroot.path(format!("sys/dev/block/{devno}"));
    let target = std::fs::read_link(&link)
        .map_err(|error| IoError::new("look up", link.display().to_string(), error))?;
    let Some(name) = target.file_name().and_then(|name| name.to_str()) else {
        return Err(no_disk(devno, "sysfs does not know it"));
    };
    if link.join("partition").exists() {
        return Err(no_disk(name.to_owned(), "it is a partition; give the disk"));
    }
    if link.join("dm").exists() {
        return of_multipath(file, sysroot, name);
    }
    let Some(transport) = Transport::of(name) else {
        return Err(no_disk(name.to_owned(), "neither SCSI, NVMe, virtio nor loop"));
    };
    match transport {
        Transport::Scsi => Ok(of_scsi(file, sysroot, name).id),
        Transport::Loop => of_loop(file, sysroot, name),
        _ => Ok(identity::from_sysfs(sysroot, name, transport).id),
    }
}

fn of_scsi(file: &File, sysroot: &Sysroot, name: &str) -> Identity {
    let mut asked = Identity::default();
    if identity::offer_inquiry(file, &mut asked) || asked.id.is_some() {
        return asked;
    }
    identity::from_sysfs(sysroot, name, Transport::Scsi)
}

/// A multipath map passes the INQUIRY on to one of its paths; the others must be the same disk by sysfs.
fn of_multipath(file: &File, sysroot: &Sysroot, name: &str) -> Result<Option<(DiskId, IdSource)>, Error> {
    let no_disk = |why: String| Error::NoDisk { node: name.to_owned(), why };
    let uuid = std::fs::read_to_string(sysroot.path(format!("sys/block/{name}/dm/uuid"))).unwrap_or_default();
    if !uuid.starts_with("mpath-") {
        return Err(no_disk("it is a device-mapper device that is no multipath map".to_owned()));
    }
    let mut asked = Identity::default();
    identity::offer_inquiry(file, &mut asked);
    let paths = std::fs::read_dir(sysroot.path(format!("sys/block/{name}/slaves")))
        .map_err(|error| IoError::new("list", format!("the paths of {name}"), error))?;
    for path in paths {
        let path =
            path.map_err(|error| IoError::new("list", format!("the paths of {name}"), error))?.file_name();
        let path = path.to_string_lossy();
        let found = identity::from_sysfs(sysroot, &path, Transport::Scsi).id;
        match (&asked.id, found) {
            (Some((id, _)), Some((other, _))) if *id != other => {
                return Err(no_disk(format!("its path {path} is {other} and another one is {id}")));
            }
            (None, Some(found)) => asked.id = Some(found),
            _ => {}
        }
    }
    Ok(asked.id)
}

fn of_loop(file: &File, sysroot: &Sysroot, name: &str) -> Result<Option<(DiskId, IdSource)>, Error> {
    let found = identity::from_sysfs(sysroot, name, Transport::Loop).id;
    let Some((id, source)) = found else { return Ok(None) };
    let status =
        ioctl::loop_status(file).map_err(|error| IoError::new("ask for the backing file of", name, error))?;
    let path = id.backing_file().unwrap_or(Path::new("/"));
    if (status.offset, status.size_limit) != (0, 0) {
        // The identity is the whole file; a part of it would be another disk under the same name.
        let why =
            format!("it shows only a part of {}: attach it without offset and size limit", path.display());
        return Err(Error::NoDisk { node: name.to_owned(), why });
    }
    match std::fs::metadata(path) {
        Ok(meta) if (meta.dev(), meta.ino()) == (status.device, status.inode) => Ok(Some((id, source))),
        Ok(_) => Err(Error::NoDisk {
            node: name.to_owned(),
            why: format!("{} is not the file that it stands on: that one was replaced", path.display()),
        }),
        Err(error) => Err(IoError::new("stat", path.display().to_string(), error).into()),
    }
}

/// What a target must be, besides being the right disk.
#[derive(Clone, Debug, Default)]
pub struct TargetOptions {
    /// What discovery is told; loop devices are always looked at where the identity is that of one.
    pub discovery: discover::Options,
    /// The machine for which it is opened, which then must be the one that it is assigned to. `None` while it
    /// is being assigned.
    pub machine: Option<String>,
    /// The least size.
    pub at_least: ByteLen,
}

/// A disk that was checked and is held exclusively until this is dropped.
#[derive(Debug)]
pub struct OpenDisk {
    /// The descriptor: O_RDWR, O_EXCL, O_DIRECT, O_CLOEXEC.
    pub file: File,
    /// The identity, read from the descriptor.
    pub id: DiskId,
    /// The kernel's name, for showing.
    pub name: String,
    /// The device node.
    pub node: PathBuf,
    /// The size in bytes.
    pub size: ByteLen,
    /// The logical sector size in bytes: offsets, lengths and memory are multiples of this.
    pub logical_block: u32,
    /// The physical sector size in bytes.
    pub physical_block: u32,
    /// What is to be said each time: problems that do not forbid the disk, such as a weak identity.
    pub notes: Vec<String>,
}

impl OpenDisk {
    /// What lies on the disk, by its signatures.
    pub fn content(&self) -> Result<Content, Error> {
        // Opened again through the descriptor, and so certainly the same disk: signatures are read through the
        // page cache, which O_DIRECT would not allow.
        let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file));
        let file =
            File::open(again).map_err(|error| IoError::new("open for reading", self.name.clone(), error))?;
        Ok(signature::probe_file(&file, &self.name)?)
    }
}

/// How often, and how long between, an exclusive open is tried that found the disk busy: whoever lists disks
/// holds each of them for a moment.
const TRIES: u32 = 5;
const BETWEEN: Duration = Duration::from_millis(40);
/// How long it is tried while nobody shows who could hold the disk: what a killed process had registered with a ring, the
/// kernel lets go of in its own time.
const LINGERS: Duration = Duration::from_secs(1);

/// Finds the disk with this identity, checks it against every rule, and opens it for writing.
///
/// Refused, with the reason: a disk that carries this host or the retention, has holders or is held, shares its
/// identity with another, is assigned to another machine, is read-only or too small, or whose descriptor tells
/// another identity than was expected.
pub fn open_target(expected: &DiskId, options: &TargetOptions) -> Result<OpenDisk, Error> {
    let sysroot = Sysroot::default();
    let mut discovery = options.discovery.clone();
    discovery.include_loop |= expected.backing_file().is_some();
    // The exclusive open below says the same, and a probe would only disturb others that are about to open.
    discovery.probe_exclusive = false;
    let disks = discover::discover(&sysroot, &discovery).map_err(Error::Discover)?;
    let disk = disks
        .into_iter()
        .find(|disk| disk.id.as_ref() == Some(expected))
        .ok_or_else(|| Error::Missing { id: expected.clone() })?;
    open_listed(disk, expected, options)
}

/// Opens a disk of a listing that was made before, by the rules of [`open_target`]. The listing may be old: that
/// the disk is still the one which it says is read from the descriptor.
pub fn open_listed(disk: Disk, expected: &DiskId, options: &TargetOptions) -> Result<OpenDisk, Error> {
    let refused = |reason| Error::Refused { id: expected.clone(), reason };
    check_role(&disk).map_err(refused)?;
    if let Some(machine) = options.machine.clone() {
        match options.discovery.assigned.get(expected).cloned() {
            Some(owner) if owner == machine => {}
            Some(owner) => return Err(refused(Refusal::OtherMachine { owner, machine })),
            None => return Err(refused(Refusal::NotAssigned { machine })),
        }
    }
    let sysroot = Sysroot::default();
    let file = open_exclusively(&sysroot, &disk, expected)?;
    let failed = |op| {
        let name = disk.name.clone();
        move |error: std::io::Error| IoError::new(op, name.clone(), error)
    };
    let found = read_identity(&file, &sysroot)?.map(|(id, _)| id);
    if found.as_ref() != Some(expected) {
        return Err(refused(Refusal::Changed { node: disk.node.display().to_string(), found }));
    }
    if ioctl::read_only(&file).map_err(failed("ask for the read-only flag of"))? {
        return Err(refused(Refusal::ReadOnly));
    }
    let size = ByteLen(ioctl::size(&file).map_err(failed("ask for the size of"))?);
    if size < options.at_least {
        return Err(refused(Refusal::TooSmall { size, needed: options.at_least }));
    }
    Ok(OpenDisk {
        id: expected.clone(),
        size,
        logical_block: ioctl::logical_sector(&file).map_err(failed("ask for the sector size of"))?,
        physical_block: ioctl::physical_sector(&file).map_err(failed("ask for the sector size of"))?,
        file,
        name: disk.name,
        node: disk.node,
        notes: disk.problems,
    })
}

/// Whether a disk with this role may be a target at all.
pub fn check_role(disk: &Disk) -> Result<(), Refusal> {
    match disk.role {
        Role::Free | Role::Assigned if disk.read_only => Err(Refusal::ReadOnly),
        Role::Free | Role::Assigned => Ok(()),
        // What speaks against these is not what uses them.
        Role::NoUuid | Role::Unknown => {
            Err(Refusal::Role { role: disk.role, evidence: disk.problems.clone() })
        }
        role => Err(Refusal::Role { role, evidence: disk.evidence.clone() }),
    }
}

fn open_exclusively(sysroot: &Sysroot, disk: &Disk, id: &DiskId) -> Result<File, Error> {
    let flags = libc::O_EXCL | libc::O_DIRECT | libc::O_CLOEXEC;
    let start = Instant::now();
    for nth in 1.. {
        let error = match OpenOptions::new().read(true).write(true).custom_flags(flags).open(&disk.node) {
            Ok(file) => return Ok(file),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EBUSY) if nth < TRIES => thread::sleep(BETWEEN),
            Some(libc::EBUSY) => {
                let devnos = std::slice::from_ref(&disk.devno);
                let seen = exclusive::holders(sysroot, devnos);
                if seen.is_none() && start.elapsed() < LINGERS {
                    thread::sleep(BETWEEN);
                    continue;
                }
                let (Claim::Ours(who) | Claim::Other(who)) = seen.unwrap_or_else(Claim::unseen) else {
                    unreachable!("a busy disk is held by someone");
                };
                return Err(Error::Refused { id: id.clone(), reason: Refusal::Busy(who) });
            }
            Some(libc::EROFS) => return Err(Error::Refused { id: id.clone(), reason: Refusal::ReadOnly }),
            _ => return Err(IoError::new("open for writing", disk.node.display().to_string(), error).into()),
        }
    }
    unreachable!("one of the tries returns")
}

/// What lies on a disk that is not opened for writing, by its signatures. Its identity is read again from the
/// descriptor first; nothing is written and nothing is held.
pub fn inspect(disk: &Disk) -> Result<Content, Error> {
    let node = disk.node.display().to_string();
    let file = OpenOptions::new()
        .read(true)
        .open(&disk.node)
        .map_err(|error| IoError::new("open for reading", node.clone(), error))?;
    let found = read_identity(&file, &Sysroot::default())?.map(|(id, _)| id);
    match (&disk.id, found) {
        (Some(id), found) if found.as_ref() != Some(id) => {
            Err(Error::Refused { id: id.clone(), reason: Refusal::Changed { node, found } })
        }
        _ => Ok(signature::probe_file(&file, &node)?),
    }
}
