//! Devices of device mapper that fail and stand still when a test wants it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::tool;

/// A device over a part of another one, which can be made to fail and to stand still. A part of a loop device, since
/// that is no SCSI disk and is not listed.
pub struct Mapped {
    name: String,
    under: PathBuf,
    start: u64,
    sectors: u64,
}

impl Mapped {
    /// Over `size` bytes of a device, from `start` on.
    pub fn new(name: &str, under: &Path, start: u64, size: u64) -> Mapped {
        tool("modprobe", &["dm-mod"]);
        let (under, start, sectors) = (under.to_owned(), start / 512, size / 512);
        let mapped = Mapped { name: name.to_owned(), under, start, sectors };
        tool("dmsetup", &["create", name, "--table", &mapped.table("linear", "")]);
        mapped
    }

    pub fn node(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }

    fn table(&self, kind: &str, rest: &str) -> String {
        format!("0 {} {kind} {} {} {rest}", self.sectors, self.under.display(), self.start)
    }

    /// From now on it is this, with these arguments after device and offset.
    pub fn becomes(&self, kind: &str, rest: &str) {
        if kind != "linear" {
            tool("modprobe", &[&format!("dm-{kind}")]);
        }
        tool("dmsetup", &["reload", &self.name, "--table", &self.table(kind, rest)]);
        tool("dmsetup", &["resume", &self.name]);
    }

    /// Nothing fails any more.
    pub fn is_sound(&self) {
        self.becomes("linear", "");
    }

    /// It takes no more, until it is resumed.
    pub fn stands_still(&self) {
        tool("dmsetup", &["suspend", "--nolockfs", "--noflush", &self.name]);
    }

    pub fn goes_on(&self) {
        tool("dmsetup", &["resume", &self.name]);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // A test that failed while it stood still could not end: whoever waits for it cannot be killed.
        Command::new("dmsetup").args(["resume", &self.name]).output().ok();
    }
}
