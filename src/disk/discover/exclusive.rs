//! Who has a disk open so that nobody else may.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

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

/// Opens the disk exclusively and closes it again. Nothing is written, and no event comes of it; but whoever
/// opens the disk exclusively in this very moment is turned away.
pub(super) fn probe(sysroot: &Sysroot, node: &Path, devnos: &[String]) -> Claim {
    let flags = libc::O_EXCL | libc::O_NONBLOCK;
    match OpenOptions::new().read(true).custom_flags(flags).open(node) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => holders(sysroot, devnos),
        _ => Claim::None,
    }
}

/// The processes that have one of these devices open or mounted, as evidence. Only root sees them all.
pub(in crate::disk) fn holders(sysroot: &Sysroot, devnos: &[String]) -> Claim {
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
        others.push(mounted_elsewhere(sysroot, devnos).unwrap_or_else(|| {
            "something holds it exclusively that shows in no mount, holder or process".to_owned()
        }));
    }
    match others.is_empty() {
        true => Claim::Ours(ours),
        false => Claim::Other([others, ours].concat()),
    }
}

fn has_open(sysroot: &Sysroot, pid: &str, devnos: &[String]) -> bool {
    let dir = format!("proc/{pid}/fd");
    sysroot.names(&dir).iter().any(|fd| {
        let path = sysroot.path(format!("{dir}/{fd}"));
        // The text of the link first: a stat of every socket and pipe of a host would be a long way round.
        let device = fs::read_link(&path).is_ok_and(|target| target.starts_with("/dev/"));
        device
            && fs::metadata(&path)
                .is_ok_and(|meta| meta.file_type().is_block_device() && devnos.contains(&number(meta.rdev())))
    })
}

/// A device number as the kernel writes it.
pub(in crate::disk) fn number(rdev: u64) -> String {
    format!("{}:{}", libc::major(rdev), libc::minor(rdev))
}

/// A mount that only another mount namespace sees, such as a container's.
fn mounted_elsewhere(sysroot: &Sysroot, devnos: &[String]) -> Option<String> {
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
