//! Under which devices the bytes of a file or a device can be reached: loop devices show a file, and a disk shows its
//! partitions.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::identity::Transport;
use super::sysfs::Sysroot;
use super::{exclusive, identity};
use crate::disk::id::DiskId;

/// The device numbers of all that shows the whole of an open file or block device: itself, and the loop devices over
/// the same file.
pub fn of(sysroot: &Sysroot, file: &File) -> Vec<String> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    if !meta.file_type().is_block_device() {
        return loops(sysroot, (meta.dev(), meta.ino()));
    }
    over(sysroot, exclusive::number(meta.rdev()))
}

/// The agent that receives into what is read from `file`, if one does here: the device and process.
pub fn receiver_into(sysroot: &Sysroot, file: &File) -> Option<String> {
    let mut devnos = of(sysroot, file);
    if let Some(disk) = devnos.first().and_then(|devno| whole_disk(sysroot, devno)) {
        devnos.extend(over(sysroot, disk));
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

/// A device, and the loop devices over the same file where it is one itself.
fn over(sysroot: &Sysroot, devno: String) -> Vec<String> {
    let target = fs::read_link(sysroot.path(format!("sys/dev/block/{devno}"))).ok();
    let name = target.as_ref().and_then(|target| target.file_name()?.to_str());
    let mut devnos =
        name.and_then(|name| file_of(sysroot, name)).map_or(Vec::new(), |file| loops(sysroot, file));
    devnos.retain(|other| *other != devno);
    devnos.insert(0, devno);
    devnos
}

/// The disk of a partition.
fn whole_disk(sysroot: &Sysroot, devno: &str) -> Option<String> {
    let dir = format!("sys/dev/block/{devno}");
    sysroot.text(format!("{dir}/partition"))?;
    sysroot.text(format!("{dir}/../dev"))
}

/// The loop devices over a file, which is named by device and inode.
fn loops(sysroot: &Sysroot, file: (u64, u64)) -> Vec<String> {
    let names = sysroot.names("sys/block");
    let over = names.iter().filter(|name| name.starts_with("loop") && file_of(sysroot, name) == Some(file));
    over.filter_map(|name| sysroot.text(format!("sys/block/{name}/dev"))).collect()
}

/// The file under a loop device, by device and inode.
fn file_of(sysroot: &Sysroot, name: &str) -> Option<(u64, u64)> {
    let meta = fs::metadata(identity::backing_file(sysroot, name)?).ok()?;
    Some((meta.dev(), meta.ino()))
}
