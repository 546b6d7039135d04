//! Writes the disks of a machine as they were at a point to image files. The volumes are only read, and replication goes on
//! meanwhile.
//!
//! Whoever writes a disk makes the old content durable in the journal before it overwrites a block. So a range of the disk
//! is read first, and the journal is looked at afterwards: whatever was overwritten before the read is in the journal by
//! then.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{Error, Journal, place};
use crate::disk::discover::{self, Options, Sysroot};
use crate::error::IoError;
use crate::journal::View;
use crate::journal::recover::recover;
use crate::name::Name;
use crate::points::{Log, Point};
use crate::protection::{Assignment, Store};
use crate::storage::shelf::Directory;
use crate::sys::aligned::Arena;

/// How much is read at a time.
const CHUNK: u64 = 1 << 20;

/// One image that was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// The machine's disk.
    pub disk: Name,
    /// The file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// How many of them were written; the rest are holes.
    pub written: u64,
}

/// Writes `DIR/<disk>.img` for every disk of the machine that the point has; none of them may exist. `progress` is called
/// with the bytes of each step.
pub fn export(
    retention: &Path,
    store: &Store,
    log: &mut Log,
    machine: &Name,
    point: &Point,
    dir: &Path,
    progress: impl Fn(u64),
) -> Result<Vec<Image>, Error> {
    let protection = store.load(machine)?;
    let options = Options { include_loop: true, probe_exclusive: false, ..Options::default() };
    let listed = discover::discover(&Sysroot::default(), &options)
        .map_err(|error| Error::Refused(crate::error::chain(&error)))?;
    let mut images = Vec::new();
    for disk in &protection.disks {
        let Some(at) = point.volumes_of(machine).find(|at| at.disk == disk.name && at.id == disk.id) else {
            let text =
                format!("point {} has no disk {} ({}) of machine {machine}", point.id, disk.name, disk.id);
            return Err(Error::Refused(text));
        };
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        let journal = Journal::read(retention, machine, &disk.name, &disk.id, log).map_err(failed)?;
        journal.reaches(at.pass).map_err(failed)?;
        let Some(found) = listed.iter().find(|found| found.id.as_ref() == Some(&disk.id)) else {
            return Err(Error::Refused(format!("disk {} ({}) is not attached", disk.name, disk.id)));
        };
        images.push(write(retention, machine, disk, at.pass, &found.node, dir, &progress)?);
    }
    log.refresh()?;
    if log.get(point.id).is_none() {
        let text = format!(
            "point {} was let go of while it was exported: what was written is not to be used",
            point.id
        );
        return Err(Error::Refused(text));
    }
    Ok(images)
}

fn write(
    retention: &Path,
    machine: &Name,
    disk: &Assignment,
    pass: u64,
    node: &Path,
    dir: &Path,
    progress: &impl Fn(u64),
) -> Result<Image, Error> {
    let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
    let named = |path: &Path, op| {
        let path = path.display().to_string();
        move |error: io::Error| IoError::new(op, path, error)
    };
    let shelf = Directory::at(place(retention, machine, &disk.name));
    // Around the page cache, which does not see what is written around it.
    let source = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(node)
        .map_err(named(node, "open for reading"))?;
    let size = crate::sys::ioctl::size(&source).map_err(named(node, "ask for the size of"))?;
    let path = dir.join(format!("{}.img", disk.name));
    let image =
        OpenOptions::new().write(true).create_new(true).open(&path).map_err(named(&path, "create"))?;
    image.set_len(size).map_err(named(&path, "set the length of"))?;
    let arena = Arena::new(CHUNK as usize).map_err(|error| IoError::new("map", "memory", error))?;
    let mut buffer = arena.alloc_blocking(CHUNK as usize);
    let mut history = recover(&shelf).map_err(failed)?;
    let mut view = View::after(&history, pass, &shelf).map_err(failed)?;
    let mut written = 0;
    let mut at = 0;
    while at < size {
        let len = (size - at).min(CHUNK) as usize;
        buffer.set_len(len);
        source
            .read_exact_at(&mut buffer, at)
            .map_err(|error| IoError::at("read", node.display().to_string(), at, error))?;
        if !history.is_current(&shelf).map_err(failed)? {
            history = recover(&shelf).map_err(failed)?;
            view = View::after(&history, pass, &shelf).map_err(failed)?;
        }
        view.overlay(at, &mut buffer).map_err(failed)?;
        written += write_sparse(&image, &buffer, at).map_err(named(&path, "write"))?;
        progress(len as u64);
        at += len as u64;
    }
    image.sync_all().map_err(named(&path, "flush"))?;
    Ok(Image { disk: disk.name.clone(), path, size, written })
}

/// Writes what is not zeros.
fn write_sparse(file: &File, bytes: &[u8], at: u64) -> io::Result<u64> {
    let mut written = 0;
    for (index, block) in bytes.chunks(64 << 10).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, at + (index as u64 * (64 << 10)))?;
            written += block.len() as u64;
        }
    }
    Ok(written)
}
