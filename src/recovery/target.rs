//! A target disk that is only looked at, around the page cache: that does not see what is written around it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Mutex, PoisonError};

use crate::checksum::crc32c;
use crate::disk::device::{OpenDisk, read_identity};
use crate::disk::discover::{self, Options, Sysroot};
use crate::disk::id::DiskId;
use crate::error::{IoError, chain};
use crate::journal::BLOCK;
use crate::points::Sample;
use crate::sys::aligned::{Arena, Buffer};
use crate::sys::ioctl;
use crate::units::Extent;

/// How much is read at a time.
pub(super) const CHUNK: u64 = 1 << 20;
/// How much of a disk's beginning a [`Sample`] has: what lies there is written by whoever mounts or boots it.
const HEAD: u64 = 16 << 20;
/// The same of its end.
const TAIL: u64 = 1 << 20;
/// At how many places between it is looked at. Disks that turn take some ten milliseconds for each.
const PLACES: u64 = 64;

/// The disk.
pub(super) struct Target {
    file: File,
    name: String,
    size: u64,
    /// What is read goes through it: mapping memory anew takes longer than a small read.
    buffer: Mutex<Buffer>,
}

impl Target {
    /// The disk with this identity, which may be in use.
    pub(super) fn attached(id: &DiskId) -> Result<Target, IoError> {
        let failed = |why: String| IoError::new("look for", id.to_string(), io::Error::other(why));
        let options = Options { include_loop: true, probe_exclusive: false, ..Options::default() };
        let listed =
            discover::discover(&Sysroot::default(), &options).map_err(|error| failed(chain(&error)))?;
        let missing = || IoError::new("look for", id.to_string(), io::ErrorKind::NotFound);
        let found = listed.iter().find(|found| found.id.as_ref() == Some(id)).ok_or_else(missing)?;
        let node = found.node.display().to_string();
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&found.node)
            .map_err(|error| IoError::new("open for reading", node, error))?;
        let found = read_identity(&file, &Sysroot::default()).map_err(|error| failed(chain(&error)))?;
        if found.is_none_or(|(found, _)| found != *id) {
            return Err(failed("another disk was opened: the disks changed meanwhile".to_owned()));
        }
        Target::open(file, id)
    }

    /// One that is open for writing.
    pub(super) fn of(disk: &OpenDisk) -> Result<Target, IoError> {
        let file =
            disk.file.try_clone().map_err(|error| IoError::new("duplicate", disk.id.to_string(), error))?;
        Target::open(file, &disk.id)
    }

    fn open(file: File, id: &DiskId) -> Result<Target, IoError> {
        let name = id.to_string();
        let size = ioctl::size(&file).map_err(|error| IoError::new("ask for the size of", &*name, error))?;
        let arena = Arena::new(CHUNK as usize).map_err(|error| IoError::new("map", "memory", error))?;
        let buffer = Mutex::new(arena.alloc_blocking(CHUNK as usize));
        Ok(Target { file, name, size, buffer })
    }

    /// In bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Its logical block size in bytes.
    pub(super) fn block(&self) -> Result<u32, IoError> {
        ioctl::logical_sector(&self.file)
            .map_err(|error| IoError::new("ask for the sector size of", &*self.name, error))
    }

    /// The same disk, for others to read.
    pub(super) fn file(&self) -> Result<File, IoError> {
        self.file.try_clone().map_err(|error| IoError::new("duplicate", &*self.name, error))
    }

    /// What it holds there now.
    pub(super) fn read(&self, extent: Extent) -> Result<Vec<u8>, IoError> {
        let mut bytes = Vec::new();
        self.each(extent, |chunk| bytes.extend_from_slice(chunk))?;
        Ok(bytes)
    }

    /// Calls `look` with each part of the range, in order. It must not read the disk itself.
    pub(super) fn each(&self, extent: Extent, mut look: impl FnMut(&[u8])) -> Result<(), IoError> {
        let failed = |at, error| IoError::at("read", &*self.name, at, error);
        if extent.end() > self.size {
            return Err(failed(extent.offset(), io::ErrorKind::UnexpectedEof.into()));
        }
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = extent.offset();
        while at < extent.end() {
            // In whole blocks, as the kernel demands; the disk may end within the last one.
            let from = at - at % BLOCK;
            let to = extent.end().next_multiple_of(BLOCK).min(from + CHUNK).min(self.size);
            buffer.set_len((to - from) as usize);
            self.file.read_exact_at(&mut buffer, from).map_err(|error| failed(from, error))?;
            let end = to.min(extent.end());
            look(&buffer[(at - from) as usize..(end - from) as usize]);
            at = end;
        }
        Ok(())
    }

    /// A sample of what it holds now.
    pub(super) fn sample(&self) -> Result<Sample, IoError> {
        let (head, tail) = (self.size.min(HEAD), self.size.saturating_sub(TAIL));
        let places = (0..PLACES).map(|place| {
            let between = tail.saturating_sub(head + BLOCK) / BLOCK;
            (head + between * place / PLACES * BLOCK, BLOCK)
        });
        Ok(Sample {
            head: self.checksum([(0, head)])?,
            tail: self.checksum([(tail, self.size - tail)])?,
            between: self.checksum(places)?,
        })
    }

    /// A checksum of some parts, each given as its offset and length; they may reach beyond the end.
    fn checksum(&self, parts: impl IntoIterator<Item = (u64, u64)>) -> Result<u32, IoError> {
        let mut sums = Vec::new();
        for (offset, len) in parts {
            let Some(part) = Extent::new(offset, len.min(self.size.saturating_sub(offset))) else { continue };
            self.each(part, |chunk| sums.extend(crc32c(chunk).to_le_bytes()))?;
        }
        Ok(crc32c(&sums))
    }
}
