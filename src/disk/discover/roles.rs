//! What a disk is used for, with the evidence: mounts, swap and holders, through partitions, dm, md and loop devices.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::sysfs::Sysroot;
use super::views::{self, LoopDevice, Under};
use crate::error::chain;

mod writers;

pub use writers::writers;

/// What this host uses, by the device that it stands on.
#[derive(Default, Debug)]
pub(super) struct Usage {
    /// Mounts by device number.
    mounts: HashMap<String, Vec<Mount>>,
    /// Kernel names of the swap devices.
    swaps: HashSet<String>,
    /// Kernel names of the members of mounted btrfs file systems, with the UUID of the file system.
    btrfs: HashMap<String, String>,
    /// The loop devices, which hold what they stand on without claiming it.
    loops: Vec<LoopDevice>,
    /// Why it is not known what is mounted or swap: then every disk may be.
    unknown: Vec<String>,
}

#[derive(Debug)]
struct Mount {
    point: PathBuf,
    /// The device number of its files, which is not always that of the device.
    devno: String,
    /// Nobody can write to the file system.
    read_only: bool,
    /// Carries the retention directory, and is not a part of the host itself.
    retention: bool,
}

/// What speaks against a disk.
#[derive(Default, Debug)]
pub(super) struct Findings {
    /// Mounted, or swap.
    pub(super) system: bool,
    /// Carries the retention directory.
    pub(super) retention: bool,
    /// Held by dm, md or the like.
    pub(super) held: bool,
    /// The device numbers of the disk and of all its partitions.
    pub(super) devnos: Vec<String>,
    /// One fact a line.
    pub(super) evidence: Vec<String>,
    visited: HashSet<String>,
}

impl Findings {
    /// Adds what was found of another path to the same disk.
    pub(super) fn add(&mut self, other: Findings) {
        self.system |= other.system;
        self.retention |= other.retention;
        self.held |= other.held;
        self.devnos.extend(other.devnos);
        self.evidence.extend(other.evidence);
    }
}

/// Mount points that belong to the host, whatever else they carry.
const HOST: [&str; 11] =
    ["/", "/boot", "/boot/efi", "/efi", "/usr", "/var", "/var/lib", "/var/log", "/home", "/tmp", "/opt"];

/// A container host has thousands of bind mounts of one file system; the first few say enough.
const MOUNTS_SHOWN: usize = 8;

/// Deeper than dm and md are ever stacked.
const DEEPEST: usize = 16;

impl Usage {
    /// Reads mounts, swaps and btrfs members.
    pub(super) fn read(sysroot: &Sysroot, retention: Option<&Path>) -> Usage {
        let mut usage = Usage::default();
        let table = known(mount_table(sysroot), &mut usage.unknown);
        let device = |line: Line| (device_of(sysroot, line.devno.clone(), &line.source), line);
        let mounts: Vec<(String, Line)> = table.into_iter().map(device).collect();
        let covering = retention.and_then(|path| {
            let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            // The last one mounted on a point is the one that is seen.
            mounts
                .iter()
                .rev()
                .map(|(_, line)| &line.point)
                .filter(|point| path.starts_with(point))
                .max_by_key(|point| point.components().count())
                .cloned()
        });
        for (device, Line { devno, point, read_only, .. }) in mounts {
            let retention =
                covering.as_ref() == Some(&point) && !HOST.iter().any(|host| Path::new(host) == point);
            let mounts = usage.mounts.entry(device).or_default();
            if !mounts.iter().any(|mount| mount.point == point) {
                mounts.push(Mount { point, devno, read_only, retention });
            }
        }
        for path in known(swap_table(sysroot), &mut usage.unknown) {
            usage.swaps.extend(resolve(sysroot, &path));
        }
        for uuid in sysroot.names("sys/fs/btrfs") {
            for member in sysroot.names(format!("sys/fs/btrfs/{uuid}/devices")) {
                usage.btrfs.insert(member, uuid.clone());
            }
        }
        usage.loops = views::loops(sysroot);
        usage
    }

    /// Why it is not known what is mounted or swap, one reason a line.
    pub(super) fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// What uses the block device `sys/block/<name>`, without counting the map `own` that makes one disk of
    /// several paths.
    pub(super) fn of(&self, sysroot: &Sysroot, name: &str, own: Option<&str>) -> Findings {
        let mut findings = Findings { held: !self.unknown.is_empty(), ..Findings::default() };
        findings.evidence.extend(self.unknown.iter().cloned());
        self.walk(sysroot, name, &format!("sys/block/{name}"), name, own, 0, &mut findings);
        findings
    }

    #[allow(clippy::too_many_arguments)] // one recursion, nowhere else called
    fn walk(
        &self,
        sysroot: &Sysroot,
        name: &str,
        dir: &str,
        label: &str,
        own: Option<&str>,
        depth: usize,
        found: &mut Findings,
    ) {
        if depth > DEEPEST || !found.visited.insert(name.to_owned()) {
            return;
        }
        if let Some(devno) = sysroot.text(format!("{dir}/dev")) {
            let mounts = self.mounts.get(&devno).map(Vec::as_slice).unwrap_or_default();
            for mount in mounts {
                found.system |= !mount.retention;
                found.retention |= mount.retention;
            }
            for Mount { point, retention, .. } in mounts.iter().take(MOUNTS_SHOWN) {
                let what = if *retention { ", which holds the retention" } else { "" };
                found.evidence.push(format!("{label} is mounted on {}{what}", point.display()));
            }
            if mounts.len() > MOUNTS_SHOWN {
                found.evidence.push(format!("{label} is mounted {} times more", mounts.len() - MOUNTS_SHOWN));
            }
            for LoopDevice { name: shown, .. } in self.over(&Under::Device(devno.clone())) {
                found.held = true;
                found.evidence.push(format!("{label} is shown by the loop device {shown}"));
                let dir = format!("sys/block/{shown}");
                self.walk(sysroot, shown, &dir, &format!("{shown} on {label}"), own, depth + 1, found);
            }
            found.devnos.push(devno);
        }
        if self.swaps.contains(name) {
            found.system = true;
            found.evidence.push(format!("{label} is swap"));
        }
        if let Some(uuid) = self.btrfs.get(name) {
            found.system |= !found.retention;
            found.evidence.push(format!("{label} belongs to the mounted btrfs {uuid}"));
        }
        for holder in sysroot.names(format!("{dir}/holders")) {
            if Some(holder.as_str()) == own {
                continue;
            }
            found.held = true;
            let (title, what) = holder_of(sysroot, &holder);
            found.evidence.push(format!("{label} {what} {title}"));
            let block = format!("sys/block/{holder}");
            // A holder may be a partition too, which only the flat directory has.
            let dir = if sysroot.path(&block).exists() { block } else { format!("sys/class/block/{holder}") };
            self.walk(sysroot, &holder, &dir, &format!("{title} on {label}"), own, depth + 1, found);
        }
        for part in partitions(sysroot, dir, name) {
            let label = label.strip_prefix(name).map_or(part.clone(), |rest| format!("{part}{rest}"));
            self.walk(sysroot, &part, &format!("{dir}/{part}"), &label, own, depth + 1, found);
        }
    }

    /// The loop devices that show this.
    fn over(&self, under: &Under) -> impl Iterator<Item = &LoopDevice> {
        self.loops.iter().filter(move |one| one.under.as_ref() == Some(under))
    }
}

/// The names of the partitions of a disk.
fn partitions(sysroot: &Sysroot, dir: &str, name: &str) -> Vec<String> {
    let mut names = sysroot.names(dir);
    names.retain(|entry| {
        entry.len() > name.len()
            && entry.starts_with(name)
            && sysroot.path(format!("{dir}/{entry}/partition")).exists()
    });
    names
}

/// The kernel's name of the device with this number.
pub(super) fn name_of(sysroot: &Sysroot, devno: &str) -> Option<String> {
    let target = std::fs::read_link(sysroot.path(format!("sys/dev/block/{devno}"))).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// A file system of this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileSystem {
    /// The device number that its files have.
    pub devno: String,
    /// Where it is mounted; never nowhere.
    pub points: Vec<PathBuf>,
    /// Whether nobody can write to it at all.
    pub read_only: bool,
}

/// The file systems that are mounted on the block devices with these numbers, disks or partitions, in the order in which
/// they were mounted.
///
/// # Errors
/// Where it cannot be known what is mounted.
pub fn file_systems(sysroot: &Sysroot, devnos: &[String]) -> Result<Vec<FileSystem>, String> {
    let mut found = Findings::default();
    let usage = Usage::read(sysroot, None);
    for devno in devnos {
        if let Some(name) = name_of(sysroot, devno) {
            usage.walk(sysroot, &name, &format!("sys/class/block/{name}"), &name, None, 0, &mut found);
        }
    }
    // A file system of several devices is mounted by one of them.
    for uuid in sysroot.names("sys/fs/btrfs") {
        let members = sysroot.names(format!("sys/fs/btrfs/{uuid}/devices"));
        let members: Vec<_> = members.iter().filter_map(|member| devno_of(sysroot, member)).collect();
        if members.iter().any(|member| found.devnos.contains(member)) {
            found.devnos.extend(members);
        }
    }
    let mut systems: Vec<FileSystem> = Vec::new();
    for Line { devno, point, source, read_only } in mount_table(sysroot)? {
        if !found.devnos.contains(&device_of(sysroot, devno.clone(), &source)) {
            continue;
        }
        match systems.iter_mut().find(|known| known.devno == devno) {
            Some(known) => known.points.push(point),
            None => systems.push(FileSystem { devno, points: vec![point], read_only }),
        }
    }
    Ok(systems)
}

/// What is mounted on the block device with this number, and what else holds it (an array, a volume group, a multipath
/// map): one fact a line.
pub fn holders(sysroot: &Sysroot, devno: &str) -> Vec<String> {
    findings(sysroot, devno).evidence
}

fn findings(sysroot: &Sysroot, devno: &str) -> Findings {
    let mut found = Findings::default();
    if let Some(name) = name_of(sysroot, devno) {
        let dir = format!("sys/class/block/{name}");
        Usage::read(sysroot, None).walk(sysroot, &name, &dir, &name, None, 0, &mut found);
    }
    found
}

/// How a holder is called, and what it is to the device it holds.
fn holder_of(sysroot: &Sysroot, holder: &str) -> (String, &'static str) {
    let attribute = |path: &str| sysroot.text(format!("sys/block/{holder}/{path}"));
    if let Some(map) = attribute("dm/name") {
        let uuid = attribute("dm/uuid").unwrap_or_default();
        let what = match uuid.split('-').next() {
            Some("LVM") => "is a physical volume of an active volume group: it carries",
            Some("CRYPT") => "is unlocked by dm-crypt as",
            Some("mpath") => "is a path of the multipath map",
            _ => "is held by",
        };
        return (format!("{holder} ({map})"), what);
    }
    match attribute("md/level") {
        Some(level) => (format!("{holder} ({level})"), "is a member of"),
        None => (holder.to_owned(), "is held by"),
    }
}

/// The entries of a table, or none and the reason.
fn known<T>(table: Result<Vec<T>, String>, unknown: &mut Vec<String>) -> Vec<T> {
    table.unwrap_or_else(|why| {
        unknown.push(format!("what this host has in use is not known, and so this disk may be: {why}"));
        Vec::new()
    })
}

/// A line of the table of mounts.
#[derive(PartialEq, Eq, Debug)]
struct Line {
    devno: String,
    point: PathBuf,
    source: String,
    /// The file system, rather than this mount of it.
    read_only: bool,
}

/// The device number of what is mounted. btrfs has a number of its own; its source says where it lies.
fn device_of(sysroot: &Sysroot, devno: String, source: &str) -> String {
    match devno.strip_prefix("0:") {
        Some(_) if source.starts_with("/dev/") => {
            resolve(sysroot, source).and_then(|name| devno_of(sysroot, &name)).unwrap_or(devno)
        }
        _ => devno,
    }
}

/// What is mounted: see [`mountinfo`].
fn mount_table(sysroot: &Sysroot) -> Result<Vec<Line>, String> {
    let text = sysroot.table("proc/self/mountinfo").map_err(|error| chain(&error))?;
    let mounts: Option<Vec<_>> = text.lines().map(mountinfo).collect();
    // Something is mounted everywhere.
    mounts.filter(|mounts| !mounts.is_empty()).ok_or("/proc/self/mountinfo is no table of mounts".to_owned())
}

/// The paths of what is swap (proc_swaps(5)).
fn swap_table(sysroot: &Sysroot) -> Result<Vec<String>, String> {
    let text = sysroot.table("proc/swaps").map_err(|error| chain(&error))?;
    let mut lines = text.lines();
    if !lines.next().is_some_and(|line| line.starts_with("Filename")) {
        return Err("/proc/swaps is no table of swaps".to_owned());
    }
    Ok(lines.map(|line| unescape(line.split_whitespace().next().unwrap_or_default())).collect())
}

/// A line of `mountinfo` (proc_pid_mountinfo(5)).
fn mountinfo(line: &str) -> Option<Line> {
    let mut fields = line.split(' ');
    let devno = fields.nth(2)?.to_owned();
    let (major, minor) = devno.split_once(':')?;
    if major.parse::<u32>().is_err() || minor.parse::<u32>().is_err() {
        return None;
    }
    let point = unescape(fields.nth(1)?);
    // Optional fields, ended by a dash; then the type, the source and the options of the file system.
    let mut fields = fields.skip_while(|field| *field != "-");
    let source = unescape(fields.nth(2)?);
    let read_only = fields.next().is_some_and(|options| options.split(',').any(|option| option == "ro"));
    Some(Line { devno, point: PathBuf::from(point), source, read_only })
}

/// Undoes the kernel's `\040` and its like.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(super) fn devno_of(sysroot: &Sysroot, name: &str) -> Option<String> {
    sysroot.text(format!("sys/class/block/{name}/dev"))
}

/// The kernel's name of the block device with this path in `/dev`.
pub(super) fn resolve(sysroot: &Sysroot, path: &str) -> Option<String> {
    let name = path.strip_prefix("/dev/")?;
    let flat = name.replace('/', "!");
    if sysroot.path(format!("sys/class/block/{flat}")).exists() {
        return Some(flat);
    }
    if sysroot.is_live() {
        return std::fs::canonicalize(path).ok()?.file_name()?.to_str().map(str::to_owned);
    }
    let map = name.strip_prefix("mapper/")?;
    let named = |dm: &String| sysroot.text(format!("sys/block/{dm}/dm/name")).as_deref() == Some(map);
    sysroot.names("sys/block").into_iter().filter(|name| name.starts_with("dm-")).find(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_gives_number_point_and_source() {
        let line =
            r"36 35 98:0 /mnt1 /mnt\040two/\134x rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let Line { devno, point, source, read_only } = mountinfo(line).unwrap();
        assert_eq!(
            (devno.as_str(), point.to_str().unwrap(), source.as_str(), read_only),
            ("98:0", r"/mnt two/\x", "/dev/root", false)
        );
        // What counts is the file system, and not one of its mounts.
        assert!(!mountinfo("36 35 98:0 / /mnt ro - ext4 /dev/sda rw,errors=x").unwrap().read_only);
        assert!(mountinfo("36 35 98:0 / /mnt rw - ext4 /dev/sda ro,errors=x").unwrap().read_only);
        assert!(mountinfo("").is_none());
        assert!(mountinfo("36 35 x:0 / /mnt rw - ext3 /dev/root rw").is_none());
        assert!(mountinfo("36 35 98:0 / /mnt rw shared:1 propagate_from:2").is_none());
        assert_eq!(unescape(r"\400\09\"), r"\400\09\");
    }
}
