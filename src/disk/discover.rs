//! Finds the disks of this machine, their identities and their roles.
//!
//! Everything is read from `sys`, `proc` and `run/udev` under a [`Sysroot`]. Only where that is the machine
//! itself are devices asked: by INQUIRY where neither udev nor sysfs has an identity, and by an exclusive open
//! for reading where nothing else says that a disk is in use. Nothing is ever written.
//!
//! A role is the strongest of what speaks against the disk, in this order: system, retention, in use, clone, no
//! UUID, assigned, unknown, free. The evidence of all of them is kept.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::id::{DiskId, is_no_serial};
use crate::error::IoError;
use crate::units::ByteLen;

pub(in crate::disk) mod exclusive;
pub(in crate::disk) mod identity;
pub mod roles;
mod sysfs;
mod udev;
pub mod views;
pub mod watch;

use exclusive::Claim;
use identity::{Identity, Transport};
pub use sysfs::Sysroot;

/// One disk as discovery sees it. Several paths of one LUN are one disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Disk {
    /// The identity, if the disk has one.
    pub id: Option<DiskId>,
    /// Where the identity was read.
    pub id_source: Option<IdSource>,
    /// The kernel's name, without `/dev/`: `sda`. It changes between boots and is for showing only. Of several
    /// paths that multipath made one, the map: `dm-0`.
    pub name: String,
    /// The device node.
    pub node: PathBuf,
    /// Device number as the kernel writes it, `8:0`.
    pub devno: String,
    /// Which of all the disks that this kernel had it is, from Linux 5.15 on: another one in its place has another
    /// number.
    #[serde(skip)]
    pub sequence: Option<u64>,
    /// Host, channel, target and LUN, `2:0:1:0`, of a SCSI disk (of its first path).
    pub hctl: Option<String>,
    /// Size in bytes.
    pub size: ByteLen,
    /// The logical sector size in bytes.
    pub logical_sector: u32,
    /// The physical sector size in bytes.
    pub physical_sector: u32,
    /// Vendor of the INQUIRY data, trimmed.
    pub vendor: Option<String>,
    /// Model of the INQUIRY data, trimmed.
    pub model: Option<String>,
    /// Serial of VPD page 0x80, or what the transport has in its place.
    pub serial: Option<String>,
    /// Whether the kernel holds the disk read-only.
    pub read_only: bool,
    /// The kernel names of all paths of this disk, its own included.
    pub paths: Vec<String>,
    /// What the disk is used for.
    pub role: Role,
    /// Why it has that role, one fact a line: `sda2 is mounted on /boot`.
    pub evidence: Vec<String>,
    /// What is wrong with it, and what to do.
    pub problems: Vec<String>,
}

/// Where an identity was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IdSource {
    /// udev's database.
    Udev,
    /// sysfs: the VPD pages or `wwid` that the kernel read.
    Sysfs,
    /// An INQUIRY sent to the device.
    SgIo,
    /// The backing file of a loop device.
    Loop,
}

/// What a disk is used for, and so whether it may be a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Carries /, /boot, swap or a mount of this host.
    System,
    /// Held by something: dm, md, a mount of another namespace, an exclusive opener.
    InUse,
    /// Carries the retention file system.
    Retention,
    /// Assigned to a machine.
    Assigned,
    /// Shares its identity with another disk that is not another path to it.
    Clone,
    /// Has no identity.
    NoUuid,
    /// Nothing speaks against it, but what is assigned could not be read in full, or it has no size.
    Unknown,
    /// Nothing speaks against it.
    Free,
}

impl Role {
    /// The role as it is written in the table and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::InUse => "in-use",
            Role::Retention => "retention",
            Role::Assigned => "assigned",
            Role::Clone => "clone",
            Role::NoUuid => "no-uuid",
            Role::Unknown => "unknown",
            Role::Free => "free",
        }
    }
}

/// Why discovery failed as a whole. What is wrong with one disk is among its problems.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tree cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// What was asked for needs other rights or another machine.
    #[error("{0}")]
    Refused(String),
}

/// What discovery is told that the machine cannot say.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether loop devices are disks.
    pub include_loop: bool,
    /// The machines to which disks are assigned.
    pub assigned: BTreeMap<DiskId, String>,
    /// Why more disks may be assigned than is known: what could not be read.
    pub unread: Vec<String>,
    /// A directory whose disk carries the retention.
    pub retention: Option<PathBuf>,
    /// Whether a disk that seems unused is opened exclusively, for reading, to see whether it is. Who is about
    /// to open a disk exclusively anyway leaves this off.
    pub probe_exclusive: bool,
}

impl Default for Options {
    /// No loop devices, nothing assigned, no retention, exclusive openers are looked for.
    fn default() -> Options {
        Options {
            include_loop: false,
            assigned: BTreeMap::new(),
            unread: Vec::new(),
            retention: None,
            probe_exclusive: true,
        }
    }
}

/// A multipath map: one disk that is there several times.
struct Map {
    name: String,
    paths: Vec<String>,
}

/// Lists the disks under `sysroot`, in the order of their names.
///
/// Listed are SCSI disks (`sd`), NVMe namespaces, virtio and Xen disks, and loop devices where they were asked
/// for. A disk that goes while it is looked at is left out. Fails only where `sys/block` cannot be listed.
pub fn discover(sysroot: &Sysroot, options: &Options) -> Result<Vec<Disk>, Error> {
    let devices = sysroot.block_devices()?;
    let usage = roles::Usage::read(sysroot, options.retention.as_deref());
    let maps: Vec<Map> = devices.iter().filter_map(|name| multipath(sysroot, name)).collect();
    let of_path: HashMap<&str, &Map> =
        maps.iter().flat_map(|map| map.paths.iter().map(move |path| (path.as_str(), map))).collect();
    let listed =
        |name: &str| Transport::of(name).filter(|&kind| kind != Transport::Loop || options.include_loop);
    let mut disks = Vec::new();
    for name in &devices {
        let Some(transport) = listed(name) else { continue };
        let map = of_path.get(name.as_str()).copied();
        // The first path stands for the map; one that is no disk by its name does not keep the others from it.
        if map.is_some_and(|map| map.paths.iter().find(|path| listed(path).is_some()) != Some(name)) {
            continue;
        }
        disks.extend(describe(sysroot, options, &usage, name, transport, map));
    }
    for map in maps.iter().filter(|map| map.paths.is_empty()) {
        disks.extend(describe(sysroot, options, &usage, &map.name, Transport::Scsi, Some(map)));
    }
    look_again(sysroot, &mut disks);
    mark_clones(&mut disks);
    Ok(disks.into_iter().map(|sketch| sketch.finish(options)).collect())
}

/// How often, and how long after, a disk that seemed held is looked at again.
const LOOKS: u32 = 3;
const BETWEEN: Duration = Duration::from_millis(20);

/// Whoever lists disks holds each of them for a moment. Only who holds one a little later, too, has a use for it.
fn look_again(sysroot: &Sysroot, disks: &mut [Sketch]) {
    for _ in 0..LOOKS {
        let mut held = disks.iter_mut().filter(|sketch| sketch.claim != Claim::None).peekable();
        if held.peek().is_none() {
            return;
        }
        thread::sleep(BETWEEN);
        for sketch in held {
            sketch.claim = exclusive::probe(sysroot, &sketch.disk.node, &sketch.found.devnos);
        }
    }
}

/// The multipath map `sys/block/<name>`, if it is one.
fn multipath(sysroot: &Sysroot, name: &str) -> Option<Map> {
    if !name.starts_with("dm-") || !sysroot.text(format!("sys/block/{name}/dm/uuid"))?.starts_with("mpath-") {
        return None;
    }
    // A path that went stays a slave until the map is loaded anew.
    let mut paths = sysroot.names(format!("sys/block/{name}/slaves"));
    paths.retain(|path| sysroot.path(format!("sys/block/{path}")).exists());
    Some(Map { name: name.to_owned(), paths })
}

/// A disk whose role is not decided yet.
struct Sketch {
    disk: Disk,
    found: roles::Findings,
    claim: Claim,
    clone: bool,
    /// Whether the page that should identify it is damaged, or names no disk.
    damaged: bool,
}

fn describe(
    sysroot: &Sysroot,
    options: &Options,
    usage: &roles::Usage,
    name: &str,
    transport: Transport,
    map: Option<&Map>,
) -> Option<Sketch> {
    let path_devno = sysroot.text(format!("sys/block/{name}/dev"))?;
    if transport == Transport::Loop {
        identity::backing_file(sysroot, name)?;
    }
    let pathless = map.is_some_and(|map| map.paths.is_empty());
    let Identity { id, serial, vendor, model, notes, damaged } = if pathless {
        identity::of_map(sysroot, name)
    } else {
        identity::discover(sysroot, name, &path_devno, transport)
    };
    let mut problems = notes;
    problems.extend_from_slice(usage.unknown());
    let own = map.map_or(name, |map| map.name.as_str());
    let paths = map.map_or_else(|| vec![name.to_owned()], |map| map.paths.clone());
    for path in paths.iter().filter(|path| path.as_str() != name) {
        let devno = sysroot.text(format!("sys/block/{path}/dev")).unwrap_or_default();
        let transport = Transport::of(path).unwrap_or(transport);
        let other = identity::discover(sysroot, path, &devno, transport).id;
        if other.as_ref().map(|(id, _)| id) != id.as_ref().map(|(id, _)| id) {
            problems.push(format!(
                "{path} is a path of {own} and yet has another identity than {name}; check multipath"
            ));
        }
    }
    let mut found = usage.of(sysroot, own, None);
    if map.is_some() {
        // What has hold of a single path, past the map.
        paths.iter().for_each(|path| found.add(usage.of(sysroot, path, Some(own))));
    }
    if pathless {
        // What used it does so still, and goes on once a path comes back, under whatever name.
        found.held = true;
        found.evidence.push(format!("{own} is a multipath map that has no path left"));
    }
    // What comes after these is little, and says most.
    bound(&mut problems);
    bound(&mut found.evidence);
    let attribute = |attribute: &str| sysroot.number(format!("sys/block/{own}/{attribute}"));
    let sectors = attribute("size").unwrap_or(0);
    let node = PathBuf::from("/dev").join(own.replace('!', "/"));
    let used = found.system || found.retention || found.held;
    let claim = if options.probe_exclusive && sysroot.is_live() && !used {
        exclusive::probe(sysroot, &node, &found.devnos)
    } else {
        Claim::None
    };
    let sector = |name: &str| attribute(name).and_then(|bytes| u32::try_from(bytes).ok());
    let logical_sector = sector("queue/logical_block_size").unwrap_or(512);
    let devno = if map.is_some() { sysroot.text(format!("sys/block/{own}/dev"))? } else { path_devno };
    let hctl = (transport == Transport::Scsi).then(|| hctl(sysroot, name)).flatten();
    if is_gone(sysroot, own, &devno) {
        return None;
    }
    let (id, id_source) = id.unzip();
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    let disk = Disk {
        id,
        id_source,
        name: own.to_owned(),
        node,
        devno,
        sequence: attribute("diskseq"),
        hctl,
        // sysfs counts in units of 512 bytes, whatever the sector size.
        size: ByteLen(sectors.saturating_mul(512)),
        logical_sector,
        physical_sector: sector("queue/physical_block_size").unwrap_or(logical_sector),
        vendor: filled(vendor),
        model: filled(model),
        serial: filled(serial),
        read_only: attribute("ro") == Some(1),
        paths,
        role: Role::Free,
        evidence: Vec::new(),
        problems,
    };
    Some(Sketch { disk, found, claim, clone: false, damaged })
}

/// Whether a disk went, or is going, so that what was read of it may be half of the truth: the kernel takes its size
/// before its number, and that before its name.
fn is_gone(sysroot: &Sysroot, name: &str, devno: &str) -> bool {
    let device = |attribute| sysroot.text(format!("sys/block/{name}/device/{attribute}"));
    let state = device("state");
    matches!(state.as_deref(), Some("cancel" | "deleted"))
        // All that the SCSI device says of itself goes before the disk does.
        || name.starts_with("sd") && state.is_none() && device("type").is_none()
        || sysroot.text(format!("sys/block/{name}/dev")).as_deref() != Some(devno)
}

/// Host, channel, target and LUN: the last part of the way to the SCSI device.
fn hctl(sysroot: &Sysroot, name: &str) -> Option<String> {
    let device = std::fs::read_link(sysroot.path(format!("sys/block/{name}/device"))).ok()?;
    let last = device.file_name()?.to_str()?.to_owned();
    (last.split(':').count() == 4).then_some(last)
}

/// How many facts of one sort are told of a disk: a page can have thousands of designators, all of them wrong, and a disk as
/// many openers.
const LINES: usize = 64;

/// Leaves the first lines, and says how many there were more.
fn bound(lines: &mut Vec<String>) {
    let more = lines.len().saturating_sub(LINES);
    if more > 0 {
        lines.truncate(LINES);
        lines.push(format!("and {more} more"));
    }
}

/// How many of many are named in one line.
const NAMED: usize = 8;

/// The first few of `count` in one line.
fn few<'a>(first: impl Iterator<Item = &'a str>, count: usize, between: &str) -> String {
    let first: Vec<&str> = first.take(NAMED).collect();
    let line = first.join(between);
    match count.saturating_sub(first.len()) {
        0 => line,
        more => format!("{line} and {more} more"),
    }
}

/// Finds disks that share an identity.
fn mark_clones(disks: &mut [Sketch]) {
    // How many have it, and the names of as many as are told of any of them.
    let mut names: HashMap<DiskId, (usize, Vec<String>)> = HashMap::new();
    for Sketch { disk, .. } in disks.iter() {
        if let Some(id) = &disk.id {
            let (count, first) = names.entry(id.clone()).or_default();
            *count += 1;
            if first.len() <= NAMED {
                first.push(disk.name.clone());
            }
        }
    }
    for sketch in disks.iter_mut() {
        let disk = &mut sketch.disk;
        let Some((count, first)) = disk.id.as_ref().and_then(|id| names.get(id)) else { continue };
        if *count < 2 {
            continue;
        }
        let others = first.iter().map(String::as_str).filter(|name| *name != disk.name);
        let others = few(others, count - 1, ", ");
        sketch.clone = true;
        disk.evidence.push(format!("{} has the same identity as {others}", disk.name));
        disk.problems.push(if disk.id.as_ref().is_some_and(|id| id.backing_file().is_some()) {
            format!("{others} stands on the same file; detach all but one with `losetup -d`")
        } else {
            format!(
                "{} and {others} have one identity: either they are paths of one LUN, then start multipathd, or \
                 one is a copy of the other, then detach it",
                disk.name
            )
        });
    }
}

impl Sketch {
    /// Decides the role and writes the evidence down.
    fn finish(self, options: &Options) -> Disk {
        let Sketch { mut disk, found, claim, clone, damaged } = self;
        let machine = disk.id.as_ref().and_then(|id| options.assigned.get(id));
        let taken = match &claim {
            Claim::None => false,
            Claim::Ours(_) => machine.is_none(),
            Claim::Other(_) => true,
        };
        disk.role = if found.system {
            Role::System
        } else if found.retention {
            Role::Retention
        } else if found.held || taken {
            Role::InUse
        } else if clone {
            Role::Clone
        } else if disk.id.is_none() {
            Role::NoUuid
        } else if machine.is_some() {
            Role::Assigned
        } else if !options.unread.is_empty() {
            let why = few(options.unread.iter().map(String::as_str), options.unread.len(), "; ");
            disk.problems.push(format!("whether it is assigned is not known: {why}"));
            Role::Unknown
        } else if disk.size.0 == 0 {
            Role::Unknown
        } else {
            Role::Free
        };
        let mut evidence = found.evidence;
        if let Claim::Ours(lines) | Claim::Other(lines) = claim {
            evidence.extend(lines);
        }
        evidence.append(&mut disk.evidence);
        evidence.extend(machine.map(|machine| format!("it is assigned to the machine {machine}")));
        disk.evidence = evidence;
        match &disk.id {
            None => {
                let serial = disk.serial.as_deref().filter(|serial| is_no_serial(serial.as_bytes()));
                let placeholder =
                    |serial| format!("its serial `{serial}` is a placeholder and names no disk");
                disk.problems.extend(serial.map(placeholder));
                disk.problems.push(no_uuid(&disk, damaged).to_owned());
            }
            Some(id) if id.is_weak() => disk.problems.push(
                "its identity is only a serial: it is unique if whoever gave it took care of that".to_owned(),
            ),
            Some(_) => {}
        }
        if disk.read_only {
            disk.problems.push("it is read-only and cannot be a target".to_owned());
        }
        if disk.size.0 == 0 {
            disk.problems.push("it has no size: no medium, or a path that failed".to_owned());
        }
        disk
    }
}

/// What to do about a disk without an identity.
fn no_uuid(disk: &Disk, damaged: bool) -> &'static str {
    let vendor = disk.vendor.as_deref().unwrap_or_default();
    if damaged {
        "no UUID: its VPD page 0x83, which should tell this disk from others, is damaged or names none, and page 0x80 gives \
         no serial that does. No setting is missing: mend what presents this disk, or attach it through another controller"
    } else if vendor.eq_ignore_ascii_case("VMware") {
        "no UUID: the virtual machine lacks disk.EnableUUID. Power the VM off, add the row `disk.EnableUUID` = `TRUE` \
         (without quotes) under the advanced configuration parameters, and power it on"
    } else if vendor.eq_ignore_ascii_case("QEMU") {
        "no UUID: give the virtual disk a `wwn=` (or at least a `serial=`) in the machine's definition"
    } else if disk.name.starts_with("vd") {
        "no UUID: virtio disks have none; attach it as SCSI, or give it a `serial=` in the machine's definition"
    } else if disk.name.starts_with("loop") {
        "no identity: attach a file that has a name with `losetup`"
    } else {
        "no UUID: neither VPD page 0x83 nor page 0x80 tells this disk from others; attach it through a controller \
         that passes them on"
    }
}

/// Why a text that was given for a disk names none.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// It is neither an identity nor a device.
    #[error(transparent)]
    Parse(#[from] super::id::ParseError),
    /// There is no such disk.
    #[error(
        "there is no disk `{0}` here; `mt-agent discover-disks` lists those that are (`--loop` for loop devices, `--rescan` to look again)"
    )]
    Missing(String),
    /// The device is there and has no identity.
    #[error("{name} has no identity by which it could be assigned: {problem}")]
    NoIdentity {
        /// The kernel's name.
        name: String,
        /// What to do.
        problem: String,
    },
}

/// The disk that an administrator means: by any spelling of its identity, or by a `/dev` name, which is resolved
/// here and must not be kept. Of clones the first one is given.
pub fn find<'a>(disks: &'a [Disk], text: &str) -> Result<&'a Disk, FindError> {
    let parse = match text.parse::<DiskId>() {
        Ok(id) => {
            let disk = disks.iter().find(|disk| disk.id.as_ref() == Some(&id));
            return disk.ok_or_else(|| FindError::Missing(text.to_owned()));
        }
        Err(error) if !text.starts_with("/dev/") => return Err(error.into()),
        Err(error) => error,
    };
    let target = std::fs::canonicalize(text).unwrap_or_else(|_| PathBuf::from(text));
    let name = target.strip_prefix("/dev").ok().and_then(|name| name.to_str()).unwrap_or_default();
    let disk = disks.iter().find(|disk| disk.name == name || disk.paths.iter().any(|path| path == name));
    match disk {
        Some(disk) if disk.id.is_some() => Ok(disk),
        Some(disk) => Err(FindError::NoIdentity { name: name.to_owned(), problem: disk.problems.join("; ") }),
        None if parse.reason == super::id::Reason::Partition => Err(parse.into()),
        None => Err(FindError::Missing(text.to_owned())),
    }
}
