//! Who has a disk open so that nobody else may.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::bound;
use super::sysfs::Sysroot;

/// What an attempt to open a disk exclusively for reading says of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::disk) enum Claim {
    /// Nobody holds it, or nobody can say.
    None,
    /// This agent holds it, and nobody else.
    Ours(Vec<String>),
    /// Something else holds it.
    Other(Vec<String>),
}

impl Claim {
    pub(in crate::disk) fn unseen() -> Claim {
        let what = "something holds it exclusively that shows in no mount, holder or process";
        Claim::Other(vec![what.to_owned()])
    }
}

/// Opens the disk exclusively and closes it again. Nothing is written, and no event comes of it; but whoever
/// opens the disk exclusively in this very moment is turned away.
pub(super) fn probe(sysroot: &Sysroot, node: &Path, devnos: &[String]) -> Claim {
    let flags = libc::O_EXCL | libc::O_NONBLOCK;
    match OpenOptions::new().read(true).custom_flags(flags).open(node) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            holders(sysroot, devnos).unwrap_or_else(Claim::unseen)
        }
        _ => Claim::None,
    }
}

/// The processes that have one of these devices open or mounted, as evidence, where any show. Only root sees them all.
pub(in crate::disk) fn holders(sysroot: &Sysroot, devnos: &[String]) -> Option<Claim> {
    let own = fs::metadata("/proc/self/exe").map(|exe| (exe.dev(), exe.ino())).ok();
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    for pid in sysroot.names("proc").iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) {
        if !has_open(sysroot, pid, devnos) {
            continue;
        }
        let name = sysroot.text(format!("proc/{pid}/comm")).unwrap_or_else(|| "?".to_owned());
        let exe =
            fs::metadata(sysroot.path(format!("proc/{pid}/exe"))).map(|exe| (exe.dev(), exe.ino())).ok();
        let same = name == "mt-agent" || exe.is_some() && exe == own;
        let evidence = format!("{name} (pid {pid}) has it open");
        if same { ours.push(evidence) } else { others.push(evidence) }
    }
    if others.is_empty() && ours.is_empty() {
        others.push(mounted_elsewhere(sysroot, devnos)?);
    }
    bound(&mut others);
    bound(&mut ours);
    Some(match others.is_empty() {
        true => Claim::Ours(ours),
        false => Claim::Other([others, ours].concat()),
    })
}

/// An agent that has one of these devices open for writing, which only a receiving one does: process and device. Only
/// root sees them all.
pub(super) fn written_by_agent(sysroot: &Sysroot, devnos: &[String]) -> Option<String> {
    let writes = |pid: &str, fd: &str| {
        let info = sysroot.text(format!("proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok()).unwrap_or(0);
        flags & libc::O_ACCMODE != libc::O_RDONLY
    };
    agents(sysroot).into_iter().find_map(|pid| {
        let fd = open_of(sysroot, &pid, devnos).into_iter().find(|fd| writes(&pid, fd))?;
        let node = fs::read_link(sysroot.path(format!("proc/{pid}/fd/{fd}"))).ok()?;
        Some(format!("mt-agent (pid {pid}) has {} open for writing", node.display()))
    })
}

/// The processes of this program, without the present one.
fn agents(sysroot: &Sysroot) -> Vec<String> {
    let exe =
        |pid: &str| fs::metadata(sysroot.path(format!("proc/{pid}/exe"))).map(|exe| (exe.dev(), exe.ino()));
    let (own, own_exe) = (std::process::id().to_string(), exe("self").ok());
    let is = |pid: &String| {
        pid.bytes().all(|b| b.is_ascii_digit())
            && *pid != own
            && (sysroot.text(format!("proc/{pid}/comm")).as_deref() == Some("mt-agent")
                || own_exe.is_some() && exe(pid).ok() == own_exe)
    };
    sysroot.names("proc").into_iter().filter(is).collect()
}

fn has_open(sysroot: &Sysroot, pid: &str, devnos: &[String]) -> bool {
    !open_of(sysroot, pid, devnos).is_empty()
}

/// The descriptors of a process that are one of these devices.
fn open_of(sysroot: &Sysroot, pid: &str, devnos: &[String]) -> Vec<String> {
    let dir = format!("proc/{pid}/fd");
    let is = |fd: &String| {
        let path = sysroot.path(format!("{dir}/{fd}"));
        // The text of the link first: a stat of every socket and pipe of a host would be a long way round.
        let device = fs::read_link(&path).is_ok_and(|target| target.starts_with("/dev/"));
        device
            && fs::metadata(&path)
                .is_ok_and(|meta| meta.file_type().is_block_device() && devnos.contains(&number(meta.rdev())))
    };
    sysroot.names(&dir).into_iter().filter(is).collect()
}

/// A device number as the kernel writes it.
pub(in crate::disk) fn number(rdev: u64) -> String {
    format!("{}:{}", libc::major(rdev), libc::minor(rdev))
}

/// A mount that only another mount namespace sees, such as a container's.
pub(super) fn mounted_elsewhere(sysroot: &Sysroot, devnos: &[String]) -> Option<String> {
    let pids = sysroot.names("proc");
    pids.iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())).find_map(|pid| {
        let table = sysroot.bytes(format!("proc/{pid}/mountinfo"))?;
        let table = String::from_utf8_lossy(&table).into_owned();
        let line = table
            .lines()
            .find(|line| line.split(' ').nth(2).is_some_and(|d| devnos.iter().any(|o| o == d)))?;
        let point = line.split(' ').nth(4).unwrap_or("?");
        let name = sysroot.text(format!("proc/{pid}/comm")).unwrap_or_else(|| "?".to_owned());
        Some(format!("it is mounted on {point} in the mount namespace of {name} (pid {pid})"))
    })
}
