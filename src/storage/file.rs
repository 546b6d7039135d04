//! A file or a block device that is only read, through the page cache.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::ReadAt;
use crate::error::IoError;
use crate::sys::ioctl;

/// An open file or block device.
#[derive(Debug)]
pub struct ReadFile {
    file: File,
    size: u64,
    name: String,
}

impl ReadFile {
    /// Opens a disk or an image of one for reading, and nothing else: the open of a pipe waits for its writer.
    pub fn open(path: &Path) -> Result<ReadFile, IoError> {
        let name = path.display().to_string();
        let failed = |error| IoError::new("open", &*name, error);
        let kind = fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            let why = "it is no block device and no regular file";
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        let file = File::open(path).map_err(failed)?;
        ReadFile::new(file, name)
    }

    /// Takes what is open for reading. `name` is what errors call it.
    pub fn new(file: File, name: impl Into<String>) -> Result<ReadFile, IoError> {
        let name = name.into();
        // The end of a block device is not in its metadata.
        let size = (&file)
            .seek(SeekFrom::End(0))
            .map_err(|error| IoError::new("seek to the end of", &*name, error))?;
        Ok(ReadFile { file, size, name })
    }

    /// The same, and what is read of it comes from the disk: what somebody who has it open, too, had read before it was written
    /// by another way does not count. Where that cannot be had, what was cached is as good as it was.
    pub fn afresh(self) -> ReadFile {
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).ok();
        self
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The size of a block device's sectors in bytes; an image does not say.
    pub fn sector(&self) -> Result<Option<u64>, IoError> {
        let failed = |error| IoError::new("ask for the sector size of", &*self.name, error);
        if !self.file.metadata().map_err(failed)?.file_type().is_block_device() {
            return Ok(None);
        }
        ioctl::logical_sector(&self.file).map(|sector| Some(u64::from(sector))).map_err(failed)
    }
}

impl ReadAt for ReadFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.file.read_exact_at(buf, offset).map_err(|error| IoError::at("read", &*self.name, offset, error))
    }
}
