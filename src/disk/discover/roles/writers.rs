//! Who may be writing to what is read from an open file or block device.
//!
//! Whoever mounts a device, swaps on it or builds another one upon it claims it, in whatever mount namespace. A device that is
//! claimed cannot be opened with O_EXCL, nor can its disk then, nor any partition where the whole disk is claimed: so one such
//! open tells of them all. (It is for reading, writes nothing, and no event comes of it; but whoever claims the device in that
//! very moment is turned away, and so only devices are asked of which nothing else is known.)
//!
//! Who it is that has claimed a device, the tables of this host tell: a file system that nobody can write to does not matter,
//! nor does one that is frozen, nor a map that nobody has claimed in turn. Swap does not matter either: its blocks are used
//! whatever it writes. Loop devices claim nothing of what they stand on, and are followed up and down.
//!
//! A claim of which nothing is known counts as somebody who writes. What is not seen here is a process that has opened the
//! device to write to it: that shows once it does, in what the device counts.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use super::super::exclusive;
use super::super::views::{Under, whole_disk};
use super::super::{BETWEEN, LOOKS};
use super::{MOUNTS_SHOWN, Sysroot, Usage, devno_of, holder_of, name_of, partitions};

/// Who may be writing to what is read from `file`, one fact a line, as `sda2 is mounted on /home`. File systems whose files
/// have one of the device numbers of `frozen` do not.
pub fn writers(sysroot: &Sysroot, file: &File, frozen: &[String]) -> Vec<String> {
    let meta = match file.metadata() {
        Ok(meta) => meta,
        Err(error) => return vec![format!("what it is cannot be known: {error}")],
    };
    let usage = Usage::read(sysroot, None);
    let mut found = usage.unknown.clone();
    for one in usage.loops.iter().filter(|one| one.under.is_none()) {
        found.push(format!("what the loop device {} stands on cannot be known", one.name));
    }
    let own = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    let mut look = Look { sysroot, usage: &usage, frozen, own: None, claimed: HashMap::new(), found };
    match Under::of(&meta) {
        Under::Device(devno) => {
            look.own = Some((devno.clone(), own));
            look.above(&devno, "");
            look.below(&devno);
        }
        under => look.shown(&under),
    }
    look.found
}

struct Look<'a> {
    sysroot: &'a Sysroot,
    usage: &'a Usage,
    frozen: &'a [String],
    /// What is asked about, where that is a device: its number, and by which path it is surely reached.
    own: Option<(String, PathBuf)>,
    /// The numbers of the devices that were looked at, and whether they, or a part of them, are claimed.
    claimed: HashMap<String, bool>,
    found: Vec<String>,
}

impl Look<'_> {
    /// Looks at a device and at all that is built upon it. `rest` is what it is called by after its name. Whether somebody,
    /// whoever it is, has claimed it or a part of it.
    fn above(&mut self, devno: &str, rest: &str) -> bool {
        if let Some(claimed) = self.claimed.get(devno) {
            return *claimed;
        }
        self.claimed.insert(devno.to_owned(), true);
        let Some(name) = name_of(self.sysroot, devno) else { return false };
        let (sysroot, dir) = (self.sysroot, format!("sys/class/block/{name}"));
        let label = holder_of(sysroot, &name).0 + rest;
        let mut claimed = self.used(devno, &name, &dir, &label);
        // Who has claimed the disk as a whole has this partition, too.
        if let Some(disk) = whole_disk(sysroot, devno)
            && let Some(name) = name_of(sysroot, &disk)
        {
            claimed |= match self.claimed.get(&disk) {
                Some(claimed) => *claimed,
                None => self.used(&disk, &name, &format!("{dir}/.."), &name),
            };
        }
        for one in self.usage.over(&Under::Device(devno.to_owned())) {
            self.above(&one.devno, &format!(" on {label}"));
        }
        self.claimed.insert(devno.to_owned(), claimed);
        for part in partitions(sysroot, &dir, &name) {
            if let Some(part) = devno_of(sysroot, &part) {
                claimed |= self.above(&part, rest);
            }
        }
        if !claimed && let Some(why) = self.refused(devno, &name) {
            self.found.push(format!("{label} is held: {why}"));
            claimed = true;
        }
        self.claimed.insert(devno.to_owned(), claimed);
        claimed
    }

    /// Looks at what shows the bytes that lie under a device: the loop devices over the disk of a partition, over what is
    /// under a map, and over the file or the device that a loop device stands on. Who uses other parts of a disk, or of a
    /// volume group, does not matter.
    fn below(&mut self, devno: &str) {
        let sysroot = self.sysroot;
        let Some(name) = name_of(sysroot, devno) else { return };
        let slaves = sysroot.names(format!("sys/class/block/{name}/slaves"));
        let parts_of = slaves.iter().filter_map(|slave| devno_of(sysroot, slave));
        for disk in parts_of.chain(whole_disk(sysroot, devno)).collect::<Vec<_>>() {
            if self.claimed.insert(disk.clone(), true).is_none() {
                self.shown(&Under::Device(disk.clone()));
                self.below(&disk);
            }
        }
        let usage = self.usage;
        let Some(under) =
            usage.loops.iter().find(|one| one.devno == devno).and_then(|one| one.under.as_ref())
        else {
            return;
        };
        self.shown(under);
        if let Under::Device(under) = under
            && !self.claimed.contains_key(under)
        {
            self.above(under, "");
            self.below(under);
        }
    }

    /// Looks at the loop devices that show this.
    fn shown(&mut self, under: &Under) {
        for one in self.usage.over(under) {
            self.above(&one.devno, "");
        }
    }

    /// Whether a device is claimed by something that is known; looks at that.
    fn used(&mut self, devno: &str, name: &str, dir: &str, label: &str) -> bool {
        let holders = self.sysroot.names(format!("{dir}/holders"));
        for holder in holders.iter().filter_map(|holder| devno_of(self.sysroot, holder)) {
            self.above(&holder, &format!(" on {label}"));
        }
        self.mounted(devno, name, label) || self.usage.swaps.contains(name) || !holders.is_empty()
    }

    /// Whether a file system of this device is mounted.
    fn mounted(&mut self, devno: &str, name: &str, label: &str) -> bool {
        let uuid = self.usage.btrfs.get(name);
        let mut mounts = self.usage.mounts.get(devno);
        if let (None, Some(_)) = (mounts, uuid) {
            // It is mounted by another one of its devices.
            let mut others = self.usage.btrfs.iter().filter(|(_, other)| Some(*other) == uuid);
            mounts = others.find_map(|(member, _)| self.usage.mounts.get(&devno_of(self.sysroot, member)?));
        }
        let Some(mounts) = mounts else {
            if let Some(uuid) = uuid {
                self.found.push(format!("{label} belongs to the btrfs {uuid}, which is mounted elsewhere"));
            }
            return uuid.is_some();
        };
        let writes = mounts.iter().filter(|mount| !mount.read_only && !self.frozen.contains(&mount.devno));
        let points: Vec<&Path> = writes.map(|mount| mount.point.as_path()).collect();
        for point in points.iter().take(MOUNTS_SHOWN) {
            self.found.push(format!("{label} is mounted on {}", point.display()));
        }
        if let more @ 1.. = points.len().saturating_sub(MOUNTS_SHOWN) {
            self.found.push(format!("{label} is mounted {more} times more"));
        }
        true
    }

    /// Why a device may be claimed, by an attempt to open it so that nobody else can.
    fn refused(&self, devno: &str, name: &str) -> Option<String> {
        if !self.sysroot.is_live() {
            return None;
        }
        let node = match &self.own {
            Some((own, path)) if own == devno => path.clone(),
            _ => Path::new("/dev").join(name.replace('!', "/")),
        };
        let flags = libc::O_EXCL | libc::O_NONBLOCK;
        let open = || OpenOptions::new().read(true).custom_flags(flags).open(&node);
        let mut opened = open();
        for _ in 0..LOOKS {
            // Whoever lists disks holds each for a moment.
            if opened.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
                thread::sleep(BETWEEN);
                opened = open();
            }
        }
        let error = match opened.and_then(|file| file.metadata()) {
            Ok(meta) if Under::of(&meta) == Under::Device(devno.to_owned()) => return None,
            Ok(_) => return Some(format!("{} is another device", node.display())),
            Err(error) => error,
        };
        match error.raw_os_error() {
            // It went, or nothing is in it.
            Some(libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => None,
            Some(libc::EBUSY) => Some(
                exclusive::mounted_elsewhere(self.sysroot, &[devno.to_owned()])
                    .unwrap_or_else(|| "by something that shows in no mount and no holder".to_owned()),
            ),
            _ => Some(format!("it cannot be opened to ask: {error}")),
        }
    }
}
