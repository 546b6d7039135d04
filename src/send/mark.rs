//! What changes whenever somebody writes to a source: two marks that are equal say that nobody did in between.
//!
//! A block device counts the sectors that were written since the system started (Documentation/block/stat.rst). What is written
//! through a loop device is counted there, and changes what it stands on, which may be written by another way as well. What is
//! written to a partition is counted there and on its disk; what is written to the disk, past its partitions, only there. A map
//! is only seen to be written through itself: what it lies on is written for other maps all the time.
//!
//! Of an image file there are its times and its size.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::sys::stat::{major, minor};

use crate::disk::discover::Sysroot;
use crate::disk::discover::views::{self, Backing};

/// A mark of an open source. None where it would not change with every write.
pub(super) fn of(file: &File) -> Option<String> {
    // What lies in the page cache since before would be written while it is read. Where that fails, reading does too.
    file.sync_all().ok();
    without_flush(file)
}

/// The same, but what is still in the page cache stays there and does not count.
pub(super) fn without_flush(file: &File) -> Option<String> {
    let metadata = file.metadata().ok()?;
    if !metadata.file_type().is_block_device() {
        return Some(times(&metadata));
    }
    device(&format!("{}:{}", major(metadata.rdev()), minor(metadata.rdev())), 0)
}

/// The size and the times of a file that a write changes.
fn times(file: &fs::Metadata) -> String {
    format!("{} {} {} {} {}", file.len(), file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec())
}

/// More loop devices over each other than anybody makes.
const DEEPEST: u32 = 16;

fn device(devno: &str, depth: u32) -> Option<String> {
    let dir = format!("/sys/dev/block/{devno}");
    if depth > DEEPEST {
        return None;
    }
    let disk = fs::exists(format!("{dir}/partition")).ok()?.then(|| format!("{dir}/.."));
    let counts = fs::read_to_string(format!("{}/queue/iostats", disk.as_ref().unwrap_or(&dir)));
    if counts.is_ok_and(|counts| counts.trim() == "0") {
        return None;
    }
    let mut mark = format!("{:?}", written(&dir)?);
    if let Some(disk) = &disk {
        mark += &format!(" {:?}", past_partitions(disk)?);
    }
    let whole = match &disk {
        Some(disk) => fs::read_to_string(format!("{disk}/dev")).ok()?.trim().to_owned(),
        None => devno.to_owned(),
    };
    match views::backing(&Sysroot::default(), &whole) {
        None => {}
        Some(Backing::Device(under)) => mark += &format!(" {}", device(&under, depth + 1)?),
        Some(Backing::File(path)) => mark += &format!(" {}", times(&fs::metadata(path).ok()?)),
        Some(Backing::Unknown) => return None,
    }
    Some(mark)
}

/// Sectors written, discards completed and sectors discarded. A flush counts as a write of nothing.
type Written = [u64; 3];

fn written(dir: &str) -> Option<Written> {
    let stat = fs::read_to_string(format!("{dir}/stat")).ok()?;
    let fields: Vec<&str> = stat.split_ascii_whitespace().collect();
    // Kernels before 4.18 do not count discards.
    let field = |index: usize| fields.get(index).map_or(Some(0), |field| field.parse().ok());
    Some([field(6)?, field(11)?, field(13)?])
}

/// How often the counters of partitions are read until nobody has written to any in between.
const LOOKS: u32 = 200;

/// What was written to a disk and to none of its partitions. None where the partitions are written to so busily that this
/// cannot be told.
fn past_partitions(disk: &str) -> Option<Written> {
    let parts: Vec<String> = fs::read_dir(disk)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path().to_str()?.to_owned()))
        .filter(|dir| fs::exists(format!("{dir}/partition")).unwrap_or(false))
        .collect();
    let sum = || {
        parts.iter().try_fold([0; 3], |sum: Written, part| {
            let more = written(part)?;
            Some(std::array::from_fn(|index| sum[index].wrapping_add(more[index])))
        })
    };
    let mut before = sum()?;
    for _ in 0..LOOKS {
        let (all, after) = (written(disk)?, sum()?);
        if before == after {
            return Some(std::array::from_fn(|index| all[index].wrapping_sub(after[index])));
        }
        before = after;
    }
    None
}
