//! Small files of state: replaced whole or not at all, and on stable storage before anyone relies on them.
//!
//! The service runs as a user of its own, and root's commands work on the same files. So what root makes in a directory
//! of somebody else's is given to them ([`hand_over`]), before anything is in it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use crate::error::IoError;

fn failed<'a>(op: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> IoError + 'a {
    move |source| IoError::new(op, path.display().to_string(), source)
}

/// Puts `bytes` at `path` with permissions `mode`, in place of whatever was there.
///
/// A reader, or a power cut at any moment, finds the old file or the new one, never a part. The file has its
/// permissions from its creation on, so that a secret is never readable for even a moment. Readers of the
/// directory pass over names that begin with a dot: a crash may leave one behind.
///
/// # Errors
/// The step that failed; `path` is then what it was, except where only the last flush of the directory failed.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IoError> {
    let temporary = beside(path)?;
    let written = create(&temporary, bytes, mode)
        .and_then(|()| fs::rename(&temporary, path).map_err(failed("replace", path)));
    if let Err(error) = written {
        // It may not even exist; and the first error is the one that matters.
        fs::remove_file(&temporary).unwrap_or_default();
        return Err(error);
    }
    sync_parent(path)
}

/// Creates `path` with permissions `mode`, holding `bytes`, and flushes it (but not its directory).
///
/// # Errors
/// Also where the file exists already.
pub fn create(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IoError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(failed("create", path))?;
    hand_over(&file, path)?;
    file.write_all(bytes).map_err(failed("write", path))?;
    file.sync_all().map_err(failed("flush", path))
}

/// Renames `from` to `to` and makes that durable.
///
/// # Errors
/// The step that failed. After a failed flush the name is the new one, but may be the old one after a power cut.
pub fn rename(from: &Path, to: &Path) -> Result<(), IoError> {
    fs::rename(from, to).map_err(failed("rename", from))?;
    // The new name first: should the power fail in between, two names are better than none.
    sync_parent(to)?;
    if from.parent() != to.parent() { sync_parent(from) } else { Ok(()) }
}

/// Removes the file `path` and makes that durable.
///
/// # Errors
/// Also where there is none.
pub fn remove(path: &Path) -> Result<(), IoError> {
    fs::remove_file(path).map_err(failed("remove", path))?;
    sync_parent(path)
}

/// Creates the directory `path`, and those above it, for this user alone. It may exist.
///
/// # Errors
/// The directory that could not be created or flushed.
pub fn private_dir(path: &Path) -> Result<(), IoError> {
    if !path.is_dir() {
        if let Some(above) = path.parent().filter(|above| !above.as_os_str().is_empty()) {
            private_dir(above)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            made => made.map_err(failed("create", path))?,
        }
    }
    if geteuid().is_root() {
        let open =
            OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path);
        match open {
            Ok(directory) => hand_over(&directory, path)?,
            // A link that the administrator made, to a directory that is theirs.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)) => {}
            Err(error) => return Err(failed("open", path)(error)),
        }
    }
    // Also where it exists: whoever made it may have crashed before its name was on stable storage.
    sync_parent(path)
}

/// Flushes the directory `path`: the names in it.
///
/// # Errors
/// Where it cannot be opened or flushed.
pub fn sync_dir(path: &Path) -> Result<(), IoError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(failed("flush", path))
}

/// Waits for the lock `path` and holds it until the value is dropped. Processes and threads exclude each other.
///
/// # Errors
/// Where the lock file cannot be created or locked.
pub fn lock(path: &Path) -> Result<Flock<File>, IoError> {
    let file = lock_file(path)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| failed("lock", path)(errno.into()))
}

/// The right to be the only one of its kind, for as long as it lives.
///
/// An exclusive `flock` of a file: it ends with the process, however that ends, and a file that was left behind means
/// nothing. What is written in it is only to name the holder.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "it is there to be dropped")] Flock<File>);

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum Unclaimed {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Somebody else has it.
    #[error("another process{} holds {}", pid.map(|pid| format!(", with pid {pid},")).unwrap_or_default(), file.display())]
    Held {
        /// The lock.
        file: PathBuf,
        /// Who holds it, where that could be read.
        pid: Option<u32>,
    },
}

impl Claim {
    /// Locks the file `path`, which is made where it is missing, without waiting for it.
    ///
    /// # Errors
    /// Also where it is held, in this process or another one.
    pub fn new(path: &Path) -> Result<Claim, Unclaimed> {
        let mut file = lock_file(path)?;
        let mut lock = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                Err((same, Errno::EINTR)) => file = same,
                Err((held, Errno::EWOULDBLOCK)) => {
                    let mut text = String::new();
                    // Only for the message: without it the pid is missing there.
                    let pid =
                        held.take(32).read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                    return Err(Unclaimed::Held { file: path.to_owned(), pid });
                }
                Err((_, errno)) => return Err(failed("lock", path)(errno.into()).into()),
            }
        };
        lock.set_len(0).map_err(failed("empty", path))?;
        writeln!(lock, "{}", std::process::id()).map_err(failed("write", path))?;
        Ok(Claim(lock))
    }
}

/// Opens the file `path`, which is there to be locked, or makes it.
///
/// # Errors
/// Also where it is a link: it would be somebody else's file.
pub fn lock_file(path: &Path) -> Result<File, IoError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed("open", path))?;
    hand_over(&file, path)?;
    Ok(file)
}

/// Gives what root has just made at `path`, or had made when it crashed, to whoever the directory belongs to.
///
/// Only what root owns, and what has no other name: the owner of the directory could have put a link there to a file that
/// is not theirs.
///
/// # Errors
/// Where the owner cannot be looked at or changed.
pub fn hand_over(made: &File, path: &Path) -> Result<(), IoError> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = fs::metadata(above).map_err(failed("look at", above))?;
    let own = made.metadata().map_err(failed("look at", path))?;
    if directory.uid() == 0 || own.uid() != 0 || (own.is_file() && own.nlink() != 1) {
        return Ok(());
    }
    fchown(made, Some(directory.uid()), Some(directory.gid())).map_err(failed("hand over", path))
}

/// The whole file, which must not be longer than `limit` bytes.
///
/// # Errors
/// Where it cannot be read, or is longer ([`io::ErrorKind::FileTooLarge`]).
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>, IoError> {
    let mut bytes = Vec::new();
    let file = regular(path)?;
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(failed("read", path))?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len <= limit) {
        Ok(bytes)
    } else {
        Err(failed("read", path)(io::ErrorKind::FileTooLarge.into()))
    }
}

/// Opens a regular file for reading. The open of a pipe would wait for its writer.
///
/// # Errors
/// Also where it is something else.
pub fn regular(path: &Path) -> Result<File, IoError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed("open", path))?;
    if file.metadata().map_err(failed("look at", path))?.is_dir() {
        return Err(failed("read", path)(io::ErrorKind::IsADirectory.into()));
    }
    if !file.metadata().map_err(failed("look at", path))?.is_file() {
        return Err(failed("read", path)(io::Error::other("it is no regular file")));
    }
    Ok(file)
}

fn sync_parent(path: &Path) -> Result<(), IoError> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => sync_dir(Path::new(".")),
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

/// A name in the same directory that no other writer chooses.
fn beside(path: &Path) -> Result<PathBuf, IoError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| failed("name", path)(error.into()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(path.with_file_name(format!(".{name}.{:016x}", u64::from_ne_bytes(random))))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_file_is_replaced_whole_with_its_permissions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        fs::write(&path, "a longer old content").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        write(&path, b"new", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(mode(&path), 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left");
    }

    #[test]
    fn a_failed_replacement_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        // A directory with something in it cannot be replaced by a file.
        let path = dir.path().join("state");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("x"), "").unwrap();
        assert_eq!(write(&path, b"new", 0o600).unwrap_err().op, "replace");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn private_directories_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        private_dir(&path).unwrap();
        private_dir(&path).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o700, 0o700));
    }

    #[test]
    fn a_file_over_the_limit_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, [0; 10]).unwrap();
        assert_eq!(read(&path, 10).unwrap().len(), 10);
        assert_eq!(read(&path, 9).unwrap_err().source.kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn the_lock_excludes_another_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = lock(&path).unwrap();
        let again = OpenOptions::new().write(true).open(&path).unwrap();
        let again = Flock::lock(again, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno);
        assert_eq!(again.map(|_| ()).unwrap_err(), nix::errno::Errno::EWOULDBLOCK);
        drop(held);
        drop(lock(&path).unwrap());
    }
}
