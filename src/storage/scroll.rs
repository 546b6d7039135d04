//! A file on a real file system that grows at its end.

use std::any::Any;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use super::Scroll;
use crate::durable;
use crate::error::IoError;

/// How much room is held for what is to come, so that a little can be appended where nothing else has room.
const SPARE: u64 = 64 << 10;

/// A file, beside which lies `.<its name without what follows the last dot>.lock`: whoever changes it has an exclusive
/// `flock` of that.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    /// Open, so that no other file can have its inode number.
    open: Option<fs::File>,
    /// Up to where blocks are allocated.
    reserved: u64,
}

impl File {
    /// The file at `path`, which need not exist.
    pub fn at(path: PathBuf) -> File {
        File { path, open: None, reserved: 0 }
    }

    fn dir(&self) -> &Path {
        match self.path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        }
    }

    fn failed(&self, op: &'static str) -> impl FnOnce(io::Error) -> IoError {
        let named = self.path.display().to_string();
        move |error| IoError::new(op, named, error)
    }

    fn opened(&self) -> Result<&fs::File, IoError> {
        self.open.as_ref().ok_or_else(|| self.failed("use")(io::ErrorKind::NotConnected.into()))
    }
}

impl Scroll for File {
    fn lock(&self) -> Result<Box<dyn Any>, IoError> {
        if self.open.is_none() {
            durable::private_dir(self.dir())?;
        }
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
        Ok(Box::new(durable::lock(&self.dir().join(format!(".{stem}.lock")))?))
    }

    fn read(&self, limit: u64) -> Result<Option<Vec<u8>>, IoError> {
        match durable::read(&self.path, limit) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        }
    }

    fn is_beside(&self, name: &str) -> Result<bool, IoError> {
        self.path.with_file_name(name).try_exists().map_err(self.failed("look beside"))
    }

    fn replace(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        durable::write(&self.path, bytes, 0o600)
    }

    fn settle(&mut self, end: u64) -> Result<u64, IoError> {
        self.open = None;
        let file = OpenOptions::new().read(true).write(true).open(&self.path).map_err(self.failed("open"))?;
        let len = file.metadata().map_err(self.failed("look at"))?.len();
        if len != end {
            file.set_len(end).map_err(self.failed("cut"))?;
        }
        file.sync_all().map_err(self.failed("flush"))?;
        durable::sync_dir(self.dir())?;
        (self.open, self.reserved) = (Some(file), 0);
        Ok(len.saturating_sub(end))
    }

    fn ends_at(&self, end: u64) -> Result<bool, IoError> {
        let Some(open) = &self.open else { return Ok(false) };
        let named = match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            named => named.map_err(self.failed("look at"))?,
        };
        let ours = open.metadata().map_err(self.failed("look at"))?;
        Ok((named.dev(), named.ino(), named.len()) == (ours.dev(), ours.ino(), end))
    }

    fn append(&mut self, end: u64, bytes: &[u8]) -> Result<(), IoError> {
        let file = self.opened()?;
        let behind = end + bytes.len() as u64;
        let mut reserved = self.reserved;
        if behind > reserved {
            // Not every file system can; then what is to come finds its room or does not.
            let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
            if let (Ok(from), Ok(len)) = (end.try_into(), (behind - end + SPARE).try_into())
                && fallocate(file, keep, from, len).is_ok()
            {
                reserved = behind + SPARE;
            }
        }
        let failed = |error| IoError::at("append to", self.path.display().to_string(), end, error);
        file.write_all_at(bytes, end).map_err(failed)?;
        self.reserved = reserved;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        self.opened()?.sync_data().map_err(self.failed("flush"))
    }

    fn cut(&mut self, end: u64) -> Result<(), IoError> {
        self.opened()?.set_len(end).map_err(self.failed("cut"))
    }
}
