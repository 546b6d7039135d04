//! The tree that discovery reads: `sys`, `proc` and `run/udev` under one root.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Error;
use crate::error::IoError;

/// The root under which `sys`, `proc` and `run` are read: `/` for this machine, another directory for a tree
/// that was recorded or made. Devices are asked themselves only under `/`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sysroot {
    root: PathBuf,
}

impl Default for Sysroot {
    fn default() -> Sysroot {
        Sysroot::new("/")
    }
}

/// The longest attribute that is read: a VPD page has no more than 4 + 65535 bytes.
const LONGEST_ATTRIBUTE: u64 = 128 << 10;

/// The longest table that is read: tens of thousands of mounts.
const LONGEST_TABLE: u64 = 16 << 20;

impl Sysroot {
    /// The tree under `root`. However `/` is spelled (`/..`, a link), it is the machine itself.
    pub fn new(root: impl Into<PathBuf>) -> Sysroot {
        let root = root.into();
        let inode = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        let own = PathBuf::from("/");
        let live = inode(&root).is_some_and(|root| Some(root) == inode(&own));
        Sysroot { root: if live { own } else { root } }
    }

    /// Whether this is the machine itself, so that devices may be opened and asked.
    pub fn is_live(&self) -> bool {
        self.root == Path::new("/")
    }

    /// A path under the root.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// The bytes of a file, or `None` where it cannot be read: attributes come and go with drivers and devices,
    /// and a device may go between two reads.
    pub(super) fn bytes(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        use io::Read;
        let mut bytes = Vec::new();
        // A pipe in a tree that was made would be waited for.
        let file =
            fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(self.path(path)).ok()?;
        file.take(LONGEST_ATTRIBUTE).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// A table that the kernel always has, whole: without it nothing is known.
    pub(super) fn table(&self, path: impl AsRef<Path>) -> Result<String, IoError> {
        use io::Read;
        let path = self.path(path);
        let failed = |error| IoError::new("read", path.display().to_string(), error);
        let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let mut bytes = Vec::new();
        file.and_then(|file| file.take(LONGEST_TABLE + 1).read_to_end(&mut bytes)).map_err(failed)?;
        if bytes.len() as u64 > LONGEST_TABLE {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The text of an attribute without the white space around it, or `None` where there is none.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = String::from_utf8_lossy(&self.bytes(path)?).trim().to_owned();
        (!text.is_empty()).then_some(text)
    }

    /// A number in an attribute.
    pub(super) fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The names in a directory, sorted as people sort them (`sdb` before `sdaa`); none where there is no such
    /// directory. A name that is not UTF-8 leads nowhere as it stands here, and yet counts: it may be a holder's.
    pub(super) fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
        names
    }

    /// The names of all whole block devices.
    pub(super) fn block_devices(&self) -> Result<Vec<String>, Error> {
        let path = self.path("sys/block");
        if let Err(error) = fs::read_dir(&path) {
            return Err(Error::Io(IoError::new("list", path.display().to_string(), error)));
        }
        Ok(self.names("sys/block"))
    }

    /// Asks every SCSI disk for its size and its identification again, then every SCSI host to look for new disks,
    /// and gives how many hosts were asked: not every bus tells when a disk comes or grows. Needs root.
    pub fn rescan(&self) -> Result<usize, Error> {
        let disks = self.names("sys/block").into_iter().filter(|name| name.starts_with("sd"));
        for path in disks.map(|name| format!("sys/block/{name}/device/rescan")) {
            // One that went, or does not answer, does not keep the others from being asked.
            if let Err(refused @ Error::Refused(_)) = self.order(&path, b"1") {
                return Err(refused);
            }
        }
        let hosts = self.names("sys/class/scsi_host");
        for host in &hosts {
            self.order(&format!("sys/class/scsi_host/{host}/scan"), b"- - -")?;
        }
        Ok(hosts.len())
    }

    /// Writes into an attribute by which the kernel takes orders.
    fn order(&self, path: &str, order: &[u8]) -> Result<(), Error> {
        let path = self.path(path);
        // Not created where it is missing: sysfs has it, and another tree shall not gain files.
        let file = fs::OpenOptions::new().write(true).open(&path);
        file.and_then(|mut file| io::Write::write_all(&mut file, order)).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Error::Refused(
                "SCSI hosts may be asked to look again by root only; run this with sudo".to_owned(),
            ),
            _ => Error::Io(IoError::new("write", path.display().to_string(), error)),
        })
    }

    /// Whether every SCSI disk that the kernel knows has its block device, which comes a moment after it.
    pub fn is_settled(&self) -> bool {
        self.names("sys/bus/scsi/devices").iter().all(|device| {
            let device = format!("sys/bus/scsi/devices/{device}");
            // Those that the kernel's disk driver takes. Hosts and targets are listed as well, and have no type.
            let kind = self.text(format!("{device}/type"));
            let is_disk = matches!(kind.as_deref(), Some("0" | "7" | "14" | "20"));
            // A unit that is not connected has none, and answers so: the peripheral qualifier in its first byte.
            let inquiry = self.bytes(format!("{device}/inquiry")).unwrap_or_default();
            let is_there = inquiry.first().is_none_or(|byte| byte >> 5 == 0);
            !(is_disk && is_there) || self.path(format!("{device}/block")).exists()
        })
    }
}
