//! Writes the disks of a machine as they were at a point to image files, or tells their digests. The volumes are only read,
//! and replication goes on meanwhile ([`past`](super::past)).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::failover::{lacks, written_to};
use super::past::Past;
use super::target::{CHUNK, Target};
use super::{Error, Journal};
use crate::digest::Digest;
use crate::error::IoError;
use crate::name::Name;
use crate::points::{Log, Point};
use crate::protection::{Assignment, Store};
use crate::units::Extent;

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

/// An image under the name that it has until all of them are done; removed when this is dropped before.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Where it was renamed there is none; and what cannot be removed has a name that says what it is.
        fs::remove_file(&self.0).unwrap_or_default();
    }
}

/// Writes `DIR/<disk>.img` for every disk of the machine that the point has; none of them may exist. All of them get their
/// names once all are whole, and durable: whatever fails before leaves none. `progress` is called with the bytes of each step.
pub fn export(
    retention: &Path,
    store: &Store,
    log: &mut Log,
    machine: &Name,
    point: &Point,
    dir: &Path,
    progress: impl Fn(u64),
) -> Result<Vec<Image>, Error> {
    if !dir.is_dir() {
        return Err(Error::Refused(format!("{} is no directory; make it first", dir.display())));
    }
    let plan = plan(retention, store, log, machine, point)?;
    let path = |one: &Planned| dir.join(format!("{}.img", one.disk.name));
    if let Some(path) = plan.iter().map(path).find(|path| path.symlink_metadata().is_ok()) {
        let text = format!("{} exists; move it away, or give another directory", path.display());
        return Err(Error::Refused(text));
    }
    let mut images = Vec::new();
    for one in plan {
        let (disk, size, path) = (one.disk.name.clone(), one.target.size(), path(&one));
        let unfinished = Unfinished(dir.join(format!(".{disk}.img.unfinished")));
        // Of an export that was killed.
        drop(Unfinished(unfinished.0.clone()));
        let written = write(machine, one, &unfinished.0, &progress)?;
        images.push((unfinished, Image { disk, path, size, written }));
    }
    still_kept(log, point)?;
    images
        .into_iter()
        .map(|(unfinished, image)| {
            crate::durable::rename(&unfinished.0, &image.path)?;
            Ok(image)
        })
        .collect()
}

/// What a disk was at a point, in short.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Digested {
    /// The machine's disk.
    pub disk: Name,
    /// Of how many bytes from its beginning on: as many as its source had last, or all of it where that is not known.
    pub size: u64,
    /// Their BLAKE3 digest.
    pub digest: Digest,
}

/// The digest of every disk of the machine that the point has.
pub fn digests(
    retention: &Path,
    store: &Store,
    log: &mut Log,
    machine: &Name,
    point: &Point,
    progress: impl Fn(u64),
) -> Result<Vec<Digested>, Error> {
    let mut digests = Vec::new();
    for one in plan(retention, store, log, machine, point)? {
        let size = one.disk.source.as_ref().map_or(one.target.size(), |source| source.size.0);
        let (disk, mut hasher) = (one.disk.name.clone(), blake3::Hasher::new());
        read(machine, one, size, |_, bytes| {
            hasher.update(bytes);
            progress(bytes.len() as u64);
            Ok(())
        })?;
        digests.push(Digested { disk, size, digest: *hasher.finalize().as_bytes() });
    }
    still_kept(log, point)?;
    Ok(digests)
}

/// What was read of a point that was let go of meanwhile may be anything.
fn still_kept(log: &mut Log, point: &Point) -> Result<(), Error> {
    log.refresh()?;
    if log.get(point.id).is_some() {
        return Ok(());
    }
    let text = format!("point {} was let go of while it was read: nothing is left of that", point.id);
    Err(Error::Refused(text))
}

/// A disk that is to be read as it was at a point.
struct Planned {
    disk: Assignment,
    /// The pass that led to the point.
    pass: u64,
    journal: Journal,
    target: Target,
}

/// All disks of the machine, if the point has them and they can be read.
fn plan(
    retention: &Path,
    store: &Store,
    log: &mut Log,
    machine: &Name,
    point: &Point,
) -> Result<Vec<Planned>, Error> {
    let protection = store.load(machine)?;
    // Points that were committed since it was read are in the protection.
    log.refresh()?;
    let mut plan = Vec::new();
    for disk in protection.disks.clone() {
        let Some(at) = point.volumes_of(machine).find(|at| at.is_on(&disk.name, &disk.id)) else {
            return Err(Error::Refused(lacks(log, &protection, point, &disk)));
        };
        let journal = Journal::read(retention, machine, &disk, log)?;
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        journal.reaches(at.pass).map_err(failed)?;
        let target = Target::attached(&disk.id)?;
        // Whoever has a released disk may write to it; while that is being taken back, nobody does.
        if let (Some(released), None) = (log.released(machine), log.begun(machine))
            && let Some(place) = written_to(released, &disk.name, &journal, &target)?
        {
            return Err(Error::Written { machine: machine.clone(), disk: disk.name.clone(), place });
        }
        plan.push(Planned { pass: at.pass, disk, journal, target });
    }
    Ok(plan)
}

fn write(machine: &Name, one: Planned, path: &Path, progress: &impl Fn(u64)) -> Result<u64, Error> {
    let named = |op| {
        let path = path.display().to_string();
        move |error: io::Error| IoError::new(op, path, error)
    };
    let image = File::create_new(path).map_err(named("create"))?;
    let size = one.target.size();
    image.set_len(size).map_err(named("set the length of"))?;
    let mut written = 0;
    read(machine, one, size, |at, bytes| {
        written += write_sparse(&image, bytes, at).map_err(named("write"))?;
        progress(bytes.len() as u64);
        Ok(())
    })?;
    image.sync_all().map_err(named("flush"))?;
    Ok(written)
}

/// Reads the first `size` bytes as they were at the point.
fn read(
    machine: &Name,
    one: Planned,
    size: u64,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let Planned { disk, pass, journal, target } = one;
    let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
    let mut past = Past::of(target, journal, pass).map_err(failed)?;
    let (mut at, end) = (0, size.min(past.size()));
    while let Some(part) = Extent::new(at, (past.size() - at).min(CHUNK)).filter(|part| part.offset() < end) {
        let bytes = past.read(part).map_err(failed)?;
        each(at, &bytes[..bytes.len().min((end - at) as usize)])?;
        at = part.end();
    }
    Ok(())
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
