//! Under which devices the bytes of a file or a device can be reached: loop devices show a file or another device, and a
//! disk shows its partitions.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::identity::Transport;
use super::sysfs::Sysroot;
use super::{exclusive, identity, roles};
use crate::disk::id::DiskId;
use crate::sys::ioctl;

/// What lies under a loop device, or under whatever reads an open file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Under {
    /// A block device, by its number.
    Device(String),
    /// A regular file, by device and inode.
    File(u64, u64),
}

impl Under {
    pub(super) fn of(meta: &fs::Metadata) -> Under {
        match meta.file_type().is_block_device() {
            true => Under::Device(exclusive::number(meta.rdev())),
            false => Under::File(meta.dev(), meta.ino()),
        }
    }
}

/// A loop device that stands on something.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct LoopDevice {
    pub(super) name: String,
    pub(super) devno: String,
    /// On what, where that can be known.
    pub(super) under: Option<Under>,
}

/// How often a loop device is looked at that shows nothing, or another file than before.
const TRIES: u32 = 3;

/// The loop devices that stand on something.
pub(super) fn loops(sysroot: &Sysroot) -> Vec<LoopDevice> {
    let names = sysroot.names("sys/block").into_iter().filter(|name| name.starts_with("loop"));
    let attached = names.filter_map(|name| {
        let devno = sysroot.text(format!("sys/block/{name}/dev"))?;
        // Others attach and detach devices while one is looked at: what may be half of this and half of that is looked at again.
        for _ in 0..TRIES {
            // What is detached stands on nothing.
            let before = identity::backing_file(sysroot, &name)?;
            let under = under(sysroot, &name, &devno);
            if under.is_some() && identity::backing_file(sysroot, &name)? == before {
                return Some(LoopDevice { name, devno, under });
            }
        }
        identity::backing_file(sysroot, &name)?;
        Some(LoopDevice { name, devno, under: None })
    });
    attached.collect()
}

/// What a loop device stands on. The kernel is asked first: the path that it shows is one of the mount namespace in which the
/// device was made, and may lead elsewhere here.
fn under(sysroot: &Sysroot, name: &str, devno: &str) -> Option<Under> {
    let path = identity::backing_file(sysroot, name)?;
    if !sysroot.is_live() {
        if path.starts_with("/dev/") {
            return Some(Under::Device(roles::devno_of(sysroot, &roles::resolve(sysroot, &path)?)?));
        }
    } else if let Ok(device) = File::open(Path::new("/dev").join(name))
        && device.metadata().is_ok_and(|meta| Under::of(&meta) == Under::Device(devno.to_owned()))
        && let Ok(status) = ioctl::loop_status(&device)
    {
        return Some(match status.rdevice {
            0 => Under::File(status.device, status.inode),
            number => Under::Device(exclusive::number(number)),
        });
    }
    Some(Under::of(&fs::metadata(path).ok()?))
}

/// What a loop device stands on, for whoever wants to look at that.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Backing {
    /// A block device, by its number.
    Device(String),
    /// The file at this path.
    File(PathBuf),
    /// It cannot be known, or is a file that is not reached here: it was removed, or lies in another mount namespace.
    Unknown,
}

/// What the device with this number stands on, where it is a loop device that stands on something.
pub fn backing(sysroot: &Sysroot, devno: &str) -> Option<Backing> {
    let name = roles::name_of(sysroot, devno)?;
    let path = identity::backing_file(sysroot, &name)?;
    Some(match under(sysroot, &name, devno) {
        Some(Under::Device(devno)) => Backing::Device(devno),
        Some(file) if fs::metadata(&path).is_ok_and(|meta| Under::of(&meta) == file) => {
            Backing::File(path.into())
        }
        Some(_) | None => Backing::Unknown,
    })
}

/// The device numbers of all that shows the whole of an open file or block device: itself, what it stands on, and the loop
/// devices over the same.
pub fn of(sysroot: &Sysroot, file: &File) -> Vec<String> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    over(sysroot, Under::of(&meta))
}

/// The agent that receives into what is read from `file`, if one does here: the device and process.
pub fn receiver_into(sysroot: &Sysroot, file: &File) -> Option<String> {
    let mut devnos = of(sysroot, file);
    if let Some(disk) = devnos.first().and_then(|devno| whole_disk(sysroot, devno)) {
        devnos.extend(over(sysroot, Under::Device(disk)));
    }
    exclusive::written_by_agent(sysroot, &devnos)
}

/// The identity of an open disk, or of the disk of an open partition, if it has one; not of a loop device.
pub fn identity(sysroot: &Sysroot, file: &File) -> Option<DiskId> {
    let meta = file.metadata().ok().filter(|meta| meta.file_type().is_block_device())?;
    let devno = exclusive::number(meta.rdev());
    let devno = whole_disk(sysroot, &devno).unwrap_or(devno);
    let target = fs::read_link(sysroot.path(format!("sys/dev/block/{devno}"))).ok()?;
    let name = target.file_name()?.to_str()?;
    let found = match Transport::of(name) {
        Some(Transport::Loop) => return None,
        Some(transport) => identity::discover(sysroot, name, &devno, transport),
        // A multipath map is the disk of its paths; no other map is a disk.
        None => identity::of_map(sysroot, name),
    };
    found.id.map(|(id, _)| id)
}

/// A device, what it stands on where it is a loop device, and the loop devices over the same.
fn over(sysroot: &Sysroot, mut under: Under) -> Vec<String> {
    let loops = loops(sysroot);
    let mut devnos = Vec::new();
    loop {
        if let Under::Device(devno) = &under {
            // Two loop devices that stand on each other.
            if devnos.contains(devno) {
                return devnos;
            }
            devnos.push(devno.clone());
        }
        let below = loops.iter().find(|one| under == Under::Device(one.devno.clone()));
        match below.and_then(|one| one.under.clone()) {
            Some(below) => under = below,
            None => break,
        }
    }
    let stand = |devnos: &[String], one: &LoopDevice| match &one.under {
        Some(Under::Device(devno)) => devnos.contains(devno),
        file => *file == Some(under.clone()),
    };
    for one in &loops {
        if stand(&devnos, one) && !devnos.contains(&one.devno) {
            devnos.push(one.devno.clone());
        }
    }
    devnos
}

/// The disk of a partition.
pub(super) fn whole_disk(sysroot: &Sysroot, devno: &str) -> Option<String> {
    let dir = format!("sys/dev/block/{devno}");
    sysroot.text(format!("{dir}/partition"))?;
    sysroot.text(format!("{dir}/../dev"))
}
