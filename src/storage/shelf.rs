//! A directory of segment files on a real file system.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::file::ReadFile;
use super::{ReadAt, Shelf};
use crate::durable;
use crate::error::IoError;
use crate::sys::aligned::Arena;

/// Segment files below one directory, which this program alone changes.
#[derive(Clone, Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// The directory, which is made where it is missing.
    pub fn create_all(path: PathBuf) -> Result<Directory, IoError> {
        durable::private_dir(&path)?;
        Ok(Directory(path))
    }

    /// The directory as it is: listing one that does not exist gives nothing.
    pub fn at(path: PathBuf) -> Directory {
        Directory(path)
    }

    fn named(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// A new file with all of its space reserved, its name and its beginning durable, and its path for showing. Written
    /// around the page cache where the file system can.
    pub(super) fn create(&self, name: &str, len: u64, header: &[u8]) -> Result<(File, String), IoError> {
        let (path, named) = (self.0.join(name), self.named(name));
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(flags)
                .open(&path)
        };
        let file = match open(libc::O_DIRECT) {
            // The kernel has made the file before it finds that its file system has no direct I/O.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                fs::remove_file(&path).unwrap_or_default();
                open(0)
            }
            other => other,
        };
        let file = file.map_err(|error| IoError::new("create", &*named, error))?;
        durable::hand_over(&file, &path)?;
        // One flush for all of it: each is a commit of the file system's own journal.
        let made = i64::try_from(len)
            .map_err(io::Error::other)
            .and_then(|len| reserve(&file, len))
            .and_then(|()| Arena::new(header.len()))
            .and_then(|arena| {
                let mut aligned = arena.alloc_blocking(header.len());
                aligned.copy_from_slice(header);
                file.write_all_at(&aligned, 0)
            })
            .and_then(|()| file.sync_all())
            .map_err(|error| IoError::new("reserve", &*named, error))
            .and_then(|()| durable::sync_dir(&self.0));
        match made {
            Ok(()) => Ok((file, named)),
            Err(error) => {
                // A crash before this leaves a segment without records, which recovery passes over.
                fs::remove_file(&path).unwrap_or_default();
                Err(error)
            }
        }
    }
}

impl Shelf for Directory {
    fn list(&self) -> Result<Vec<String>, IoError> {
        let failed = |error| IoError::new("list", self.0.display().to_string(), error);
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            // What is not UTF-8 was not made by this program.
            names.extend(entry.map_err(failed)?.file_name().into_string());
        }
        Ok(names)
    }

    fn open(&self, name: &str) -> Result<Box<dyn ReadAt + Send + Sync>, IoError> {
        let named = self.named(name);
        let file = File::open(self.0.join(name)).map_err(|error| IoError::new("open", &*named, error))?;
        Ok(Box::new(ReadFile::new(file, named)?))
    }

    fn settle(&self, name: &str, cut: Option<u64>) -> Result<(), IoError> {
        let named = self.named(name);
        let failed = |op| {
            let named = named.clone();
            move |error| IoError::new(op, named, error)
        };
        let file = OpenOptions::new().write(true).open(self.0.join(name)).map_err(failed("open"))?;
        if let Some(len) = cut {
            file.set_len(len).map_err(failed("cut"))?;
        }
        file.sync_all().map_err(failed("flush"))
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), IoError> {
        durable::rename(&self.0.join(from), &self.0.join(to))
    }

    fn remove(&self, names: &[String]) -> Result<(), IoError> {
        for name in names {
            match fs::remove_file(self.0.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(|error| IoError::new("remove", self.named(name), error))?,
            }
        }
        durable::sync_dir(&self.0)
    }
}

/// Some file systems give up on a signal, for which they take a completion of the ring too.
fn reserve(file: &File, len: i64) -> io::Result<()> {
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, len) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}
