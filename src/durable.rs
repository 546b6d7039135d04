//! Small files of state: replaced whole or not at all, and on stable storage before anyone relies on them.
//!
//! The service runs as a user of its own, and root's commands work on the same files. So what root makes in a directory
//! of somebody else's is given to them ([`hand_over`]), before anything is in it.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::sys::stat::Mode;
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
        match open_dir(path) {
            Ok(directory) => hand_over(&directory, path)?,
            // A link that the administrator made, to a directory that is theirs.
            Err(error) if matches!(error.source.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)) => {}
            Err(error) => return Err(error),
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
/// nothing. Nothing is written to it: whoever may put something else in its place could have it be anybody's file, and a file
/// system that is full, or read-only, has locks all the same.
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
    /// Locks the file `path`, which is made where it is missing, without waiting for it. It lies in `directory`, whatever that is
    /// called by now.
    ///
    /// # Errors
    /// Also where it is held, in this process or another one, and where it is a link or anything else than a regular file.
    pub fn new(directory: &File, path: &Path) -> Result<Claim, Unclaimed> {
        let name = path.file_name().unwrap_or_default();
        let open = |access| {
            // The open of a pipe would wait for its other end.
            let how = OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            openat(directory, name, access | how, Mode::S_IRUSR | Mode::S_IWUSR)
        };
        let (opened, made) = match open(OFlag::O_RDWR) {
            // What is there already can be locked all the same.
            Err(Errno::EROFS) => (open(OFlag::O_RDONLY), false),
            opened => (opened, true),
        };
        let mut file = File::from(opened.map_err(|errno| failed("open", path)(errno.into()))?);
        if !file.metadata().map_err(failed("look at", path))?.is_file() {
            let what = io::Error::other("it is no regular file, and so no lock: remove it");
            return Err(failed("lock", path)(what).into());
        }
        if made {
            give(&file, path, &directory.metadata().map_err(failed("look at", path))?)?;
        }
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Claim(lock)),
                Err((same, Errno::EINTR)) => file = same,
                Err((held, Errno::EWOULDBLOCK)) => {
                    return Err(Unclaimed::Held { file: path.to_owned(), pid: holder(&held) });
                }
                Err((_, errno)) => return Err(failed("lock", path)(errno.into()).into()),
            }
        }
    }
}

/// Who holds the exclusive `flock` of a file, where the kernel tells. It does not where it shows files under another device than
/// the file system's (btrfs, overlayfs), nor who runs in another container.
fn holder(file: &File) -> Option<u32> {
    let metadata = file.metadata().ok()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let place = format!("{:02x}:{:02x}:{inode}", libc::major(device), libc::minor(device));
    let look = || {
        fs::read_to_string("/proc/locks").ok()?.lines().find_map(|line| {
            match line.split_ascii_whitespace().collect::<Vec<_>>()[..] {
                // One that waits for it has an arrow before its kind.
                [_, "FLOCK", _, "WRITE", pid, at, ..] if at == place => pid.parse().ok(),
                _ => None,
            }
        })
    };
    // Where a lock goes away between two reads of the list, the kernel passes over another one.
    (0..3).find_map(|_| look())
}

/// Opens the directory `path`, so that what is done in it is done in no other one.
///
/// # Errors
/// Also where it is a link: it would be somebody else's directory.
pub fn open_dir(path: &Path) -> Result<File, IoError> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed("open", path))
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
    let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    give(made, path, &fs::metadata(above).map_err(failed("look at", above))?)
}

/// The same, where the directory is known.
fn give(made: &File, path: &Path, directory: &Metadata) -> Result<(), IoError> {
    let own = made.metadata().map_err(failed("look at", path))?;
    let is_others = own.uid() != 0 || (own.is_file() && own.nlink() != 1);
    if !geteuid().is_root() || directory.uid() == 0 || is_others {
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

    #[test]
    fn a_claim_names_its_holder_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, path) = (open_dir(dir.path()).unwrap(), dir.path().join("claim"));
        fs::write(&path, "4711 left behind by a crash").unwrap();
        let first = Claim::new(&directory, &path).unwrap();
        match Claim::new(&directory, &path) {
            Err(Unclaimed::Held { file, pid }) => {
                assert_eq!((file, pid), (path.clone(), Some(std::process::id())))
            }
            other => panic!("{other:?}"),
        }
        drop(first);
        Claim::new(&directory, &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"4711 left behind by a crash");
    }

    #[test]
    fn only_a_regular_file_in_the_very_directory_is_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, path) = (open_dir(dir.path()).unwrap(), dir.path().join("claim"));
        let io = || match Claim::new(&directory, &path) {
            Err(Unclaimed::Io(error)) => error.source,
            other => panic!("{other:?}"),
        };
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert_eq!(io().raw_os_error(), Some(libc::ELOOP));
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        // Also where it is held, which would be read from for ever.
        let held = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let _held = Flock::lock(held, FlockArg::LockExclusive).unwrap();
        assert!(io().to_string().contains("no regular file"));
        fs::remove_file(&path).unwrap();
        // Another directory in the place of the one that is held open.
        let aside = dir.path().with_extension("aside");
        fs::rename(dir.path(), &aside).unwrap();
        std::os::unix::fs::symlink("/nonexistent", dir.path()).unwrap();
        assert_eq!(open_dir(dir.path()).unwrap_err().source.raw_os_error(), Some(libc::ENOTDIR));
        Claim::new(&directory, &path).unwrap();
        assert!(aside.join("claim").is_file());
        fs::remove_file(dir.path()).unwrap();
        fs::rename(&aside, dir.path()).unwrap();
    }
}
