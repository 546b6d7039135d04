//! A host's root directory, and the files in it: read, and replaced whole with all that belongs to them.
//!
//! The root may be a directory of another system, whose symbolic links are meant inside of it: each path is followed
//! here, part by part, and never leaves the root.
//!
//! Whoever may write to a directory of it may put a link into the place of another one at any moment. So what was followed
//! is opened anew part by part too, each from the one above it, which is held open, and no link is followed then: what is
//! there instead is an error, and nothing outside the root is read or written. Not by openat2(2), which EL 8 does not have.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Error, moment};
use crate::error::IoError;
use crate::sys::xattr;

/// The longest file that is read: a configuration.
pub const MAX_LEN: u64 = 4 << 20;
/// The kernel's own limit of links that it follows.
const MAX_LINKS: usize = 40;

/// Opens a directory to go on from.
const STEP: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

fn failed<'a>(op: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io(IoError::new(op, path.display().to_string(), source))
}

/// What the kernel and the daemons of a running host show of it.
const RUNNING: [&str; 4] = ["/dev", "/proc", "/run", "/sys"];

/// The root directory of a host.
#[derive(Clone, Debug)]
pub struct Root {
    path: PathBuf,
    dir: Arc<OwnedFd>,
    /// Those of [`RUNNING`] in an image that are this machine's own, mounted into it.
    borrowed: Vec<&'static str>,
}

/// A directory, held open, and a name in it.
struct Spot<'a> {
    dir: OwnedFd,
    name: &'a OsStr,
}

impl Spot<'_> {
    /// Opens what has this name, which must not be a link.
    fn open(&self, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(File::from(openat(&self.dir, self.name, flags, Mode::empty())?))
    }

    /// What has this name.
    fn kind(&self) -> io::Result<SFlag> {
        let stat = fstatat(&self.dir, self.name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        Ok(SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()))
    }

    fn read_link(&self) -> io::Result<PathBuf> {
        Ok(readlinkat(&self.dir, self.name)?.into())
    }

    fn remove(&self, how: UnlinkatFlags) -> io::Result<()> {
        Ok(unlinkat(&self.dir, self.name, how)?)
    }

    /// Flushes the directory: the names in it.
    fn sync(&self) -> io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        File::from(openat(&self.dir, ".", flags, Mode::empty())?).sync_all()
    }
}

impl Root {
    /// The host whose root directory is `path`; `/` is this one.
    ///
    /// # Errors
    /// Where that is no directory.
    pub fn open(path: &Path) -> Result<Root, Error> {
        let path = path.canonicalize().map_err(failed("open", path))?;
        let dir = nix::fcntl::open(&path, STEP, Mode::empty());
        let dir = dir.map_err(|errno| failed("open", &path)(errno.into()))?;
        let mut root = Root { path, dir: Arc::new(dir), borrowed: Vec::new() };
        if !root.is_live() {
            let same = |one: &Path, other: &Path| {
                let identity = |path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
                identity(one).is_some_and(|one| identity(other) == Some(one))
            };
            let dirs = RUNNING.into_iter().map(|dir| (dir, root.path.join(&dir[1..])));
            root.borrowed = dirs.filter(|(dir, own)| same(Path::new(dir), own)).map(|(dir, _)| dir).collect();
        }
        Ok(root)
    }

    /// Whether this is the machine itself.
    pub fn is_live(&self) -> bool {
        self.path == Path::new("/")
    }

    /// Its path on this machine, to be shown.
    pub fn shown(&self) -> std::path::Display<'_> {
        self.path.display()
    }

    /// Where a path of the host, whose links were followed, is on this machine.
    pub fn at(&self, real: &Path) -> PathBuf {
        self.path.join(real.strip_prefix("/").unwrap_or(real))
    }

    /// A directory whose path was followed, as a root of its own; whoever may exchange those above it does not exchange it.
    ///
    /// # Errors
    /// Where it is not there, or is a link.
    pub fn within(&self, real: &Path) -> io::Result<Root> {
        Ok(Root { path: self.at(real), dir: Arc::new(self.dir(real)?), borrowed: Vec::new() })
    }

    /// Whose the root itself is, and what they may.
    ///
    /// # Errors
    /// Where it cannot be looked at.
    pub fn metadata(&self) -> io::Result<fs::Metadata> {
        File::from(self.dir.try_clone()?).metadata()
    }

    /// The root itself, opened.
    ///
    /// # Errors
    /// Where it may not be read.
    pub fn directory(&self) -> io::Result<File> {
        self.spot(Path::new("/"))?.open(OFlag::O_RDONLY | OFlag::O_DIRECTORY)
    }

    /// Opens a directory whose path was followed.
    fn dir(&self, real: &Path) -> io::Result<OwnedFd> {
        let mut dir = self.dir.try_clone()?;
        for part in real.components() {
            match part {
                Component::Normal(name) => dir = openat(&dir, name, STEP, Mode::empty())?,
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => return Err(io::ErrorKind::InvalidInput.into()),
            }
        }
        Ok(dir)
    }

    /// Where a path is whose parents were followed.
    fn spot<'a>(&self, real: &'a Path) -> io::Result<Spot<'a>> {
        match (real.parent(), real.file_name()) {
            (Some(above), Some(name)) => Ok(Spot { dir: self.dir(above)?, name }),
            // The root itself.
            _ => Ok(Spot { dir: self.dir.try_clone()?, name: OsStr::new(".") }),
        }
    }

    /// Follows the links in `path`. What does not exist is as it is written.
    ///
    /// # Errors
    /// Where the links go round in a circle, or a directory cannot be looked into.
    pub fn real(&self, path: &Path) -> Result<PathBuf, Error> {
        self.follow(path, true)
    }

    /// As [`Root::real`], but what the path itself names is not followed.
    ///
    /// # Errors
    /// Those of [`Root::real`].
    pub fn real_parent(&self, path: &Path) -> Result<PathBuf, Error> {
        self.follow(path, false)
    }

    fn follow(&self, path: &Path, last: bool) -> Result<PathBuf, Error> {
        let parts = |path: &Path| {
            let named = path.components().filter_map(|part| match part {
                Component::Normal(name) => Some(name.to_owned()),
                Component::ParentDir => Some(OsString::from("..")),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
            });
            named.collect::<Vec<OsString>>().into_iter().rev()
        };
        let mut left: Vec<OsString> = parts(path).collect();
        let mut real = PathBuf::from("/");
        let mut links = 0;
        while let Some(part) = left.pop() {
            if part == ".." {
                // The root has itself above it.
                real.pop();
                continue;
            }
            let next = real.join(&part);
            let here = self.at(&next);
            let looked = self.spot(&next).and_then(|spot| Ok((spot.kind()?, spot)));
            match looked {
                Ok((SFlag::S_IFLNK, spot)) if last || !left.is_empty() => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(failed("follow", &here)(io::Error::from_raw_os_error(libc::ELOOP)));
                    }
                    let target = spot.read_link().map_err(failed("follow", &here))?;
                    if target.is_absolute() {
                        real = PathBuf::from("/");
                    }
                    left.extend(parts(&target));
                }
                Ok(_) => real = next,
                Err(error) if is_missing(&error) => real = next,
                Err(error) => return Err(failed("look at", &here)(error)),
            }
        }
        Ok(real)
    }

    /// The whole file, or `None` where there is none.
    ///
    /// # Errors
    /// Where it is no regular file, is longer than [`MAX_LEN`], or cannot be read.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Option<Vec<u8>>, Error> {
        let real = self.real(path.as_ref())?;
        let path = self.at(&real);
        let opened = match self.spot(&real) {
            Ok(spot) => open(&spot, &path),
            Err(error) => Err(failed("open", &path)(error)),
        };
        match opened {
            Ok((mut file, _)) => content(&path, &mut file).map(Some),
            Err(Error::Io(error)) if is_missing(&error.source) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// As [`Root::read`], as text to be understood: what is no UTF-8 is replaced, so that it must not be written back.
    ///
    /// # Errors
    /// Those of [`Root::read`].
    pub fn text(&self, path: impl AsRef<Path>) -> Result<Option<String>, Error> {
        Ok(self.read(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Follows the links in a path, unless what is there is true of this machine and not of the image.
    fn own(&self, path: &Path) -> Option<PathBuf> {
        let real = self.real(path).ok()?;
        let is_borrowed = self.borrowed.iter().any(|dir| real.starts_with(dir));
        (!is_borrowed).then_some(real)
    }

    /// The value in a file of sysfs or procfs, without the white space around it.
    pub fn value(&self, path: impl AsRef<Path>) -> Option<String> {
        let real = self.own(path.as_ref())?;
        let mut bytes = Vec::new();
        // In an image anything may be in its place.
        let (file, _) = open(&self.spot(&real).ok()?, &self.at(&real)).ok()?;
        file.take(64 << 10).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned()).filter(|value| !value.is_empty())
    }

    /// Whether there is anything.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.own(path.as_ref()).is_some_and(|real| self.is_there(&real))
    }

    fn is_there(&self, real: &Path) -> bool {
        self.spot(real).and_then(|spot| spot.kind()).is_ok()
    }

    /// What a link points to, as it is written.
    pub fn link(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        self.spot(&self.real_parent(path.as_ref()).ok()?).ok()?.read_link().ok()
    }

    /// The names in a directory, sorted; none where there is no such directory.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn entries(&self, path: impl AsRef<Path>) -> Result<Vec<OsString>, Error> {
        let real = self.real(path.as_ref())?;
        let read = || {
            let opened = self.spot(&real)?.open(OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
            let mut names = Vec::new();
            for entry in Dir::from_fd(opened.into())?.iter() {
                let name = OsString::from_vec(entry?.file_name().to_bytes().to_owned());
                if name != "." && name != ".." {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        };
        match read() {
            Err(error) if is_missing(&error) => Ok(Vec::new()),
            read => read.map_err(failed("list", &self.at(&real))),
        }
    }

    /// As [`Root::entries`]: those that are text; none where the directory cannot be read.
    pub fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let Some(real) = self.own(path.as_ref()) else { return Vec::new() };
        let names = self.entries(real).unwrap_or_default();
        names.into_iter().filter_map(|name| name.into_string().ok()).collect()
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Opens a regular file, for reading. A pipe is not waited for.
fn open(spot: &Spot<'_>, path: &Path) -> Result<(File, fs::Metadata), Error> {
    let other = || Error::refused(format!("{} is no regular file", path.display()), "move it away");
    // To open a device may set something going.
    if spot.kind().is_ok_and(|kind| kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK) {
        return Err(other());
    }
    let file = spot.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK).map_err(failed("open", path))?;
    let meta = file.metadata().map_err(failed("look at", path))?;
    if meta.is_file() { Ok((file, meta)) } else { Err(other()) }
}

fn content(path: &Path, file: &mut File) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(failed("read", path))?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(failed("read", path)(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(bytes)
}

/// SHA-256 in hexadecimal digits.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What there is at a path, but for a file's content.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Entry {
    /// Nothing.
    Absent,
    /// A regular file.
    File {
        /// Of its content.
        sha256: String,
        /// Whose it is, and what they may.
        owner: Owner,
        /// The extended attributes, in base64: SELinux's label, access lists.
        xattrs: BTreeMap<String, String>,
    },
    /// A symbolic link.
    Link {
        /// What it points to.
        target: PathBuf,
    },
}

/// Whose a file is, and what they may.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The permissions.
    pub mode: u32,
}

/// Attributes that are true of one content, or one inode, only: the integrity measurements.
const BOUND: [&str; 2] = ["security.ima", "security.evm"];

impl Entry {
    /// What there is at a path whose parents were followed, and the content of a file.
    ///
    /// # Errors
    /// Where it is neither file nor link, or cannot be read.
    pub fn read(root: &Root, real: &Path) -> Result<(Entry, Option<Vec<u8>>), Error> {
        let path = root.at(real);
        let looked = root.spot(real).and_then(|spot| Ok((spot.kind()?, spot)));
        let spot = match looked {
            Err(error) if is_missing(&error) => return Ok((Entry::Absent, None)),
            Err(error) => return Err(failed("look at", &path)(error)),
            Ok((SFlag::S_IFLNK, spot)) => {
                let target = spot.read_link().map_err(failed("follow", &path))?;
                return Ok((Entry::Link { target }, None));
            }
            Ok((_, spot)) => spot,
        };
        let (mut file, meta) = open(&spot, &path)?;
        let bytes = content(&path, &mut file)?;
        let owner = Owner { uid: meta.uid(), gid: meta.gid(), mode: meta.permissions().mode() & 0o7777 };
        let mut xattrs = BTreeMap::new();
        for name in xattr::list(&file).map_err(failed("list the attributes of", &path))? {
            let value = xattr::get(&file, &name).map_err(failed("read an attribute of", &path))?;
            let name = name.to_string_lossy().into_owned();
            if !BOUND.contains(&name.as_str()) {
                xattrs.insert(name, STANDARD.encode(value));
            }
        }
        Ok((Entry::File { sha256: digest(&bytes), owner, xattrs }, Some(bytes)))
    }

    /// Whether it is the same but for the attributes: that a label was put right is no edit.
    pub fn is_like(&self, other: &Entry) -> bool {
        match (self, other) {
            (
                Entry::File { sha256, owner, .. },
                Entry::File { sha256: other_sha256, owner: other_owner, .. },
            ) => (sha256, owner) == (other_sha256, other_owner),
            _ => self == other,
        }
    }
}

/// The name under which the next content of a file is prepared. It is the same each time, so that what an interruption
/// leaves is found again; it begins with a dot and has an ending of its own, so that no directory of snippets takes it
/// for one.
fn beside(real: &Path) -> PathBuf {
    let name = real.file_name().unwrap_or_default().to_string_lossy();
    real.with_file_name(format!(".{name}.mt-agent-new"))
}

/// Removes what an interrupted [`put`] left beside a path.
///
/// # Errors
/// Where it is there and cannot be removed.
pub fn clear(root: &Root, real: &Path) -> Result<(), Error> {
    let temporary = beside(real);
    let removed = root.spot(&temporary).and_then(|spot| spot.remove(UnlinkatFlags::NoRemoveDir));
    match removed {
        Err(error) if is_missing(&error) => Ok(()),
        removed => removed.map_err(failed("remove", &root.at(&temporary))),
    }
}

/// Makes a path be `entry`, with this content where that is a file: whole or not at all, and durable on return.
///
/// # Errors
/// The step that failed. Then the path is what it was, or (where only the last flush failed) what it shall be, and nothing
/// is left beside it.
pub fn put(root: &Root, real: &Path, entry: &Entry, content: &[u8]) -> Result<(), Error> {
    let path = root.at(real);
    let next = beside(real);
    clear(root, real)?;
    let spot = match root.spot(real) {
        Err(error) if *entry == Entry::Absent && is_missing(&error) => return Ok(()),
        spot => spot.map_err(failed("open", &path))?,
    };
    if *entry == Entry::Absent {
        return match spot.remove(UnlinkatFlags::NoRemoveDir) {
            Err(error) if is_missing(&error) => Ok(()),
            removed => {
                removed.map_err(failed("remove", &path))?;
                moment()?;
                spot.sync().map_err(failed("flush", &path))
            }
        };
    }
    // In the same directory, whatever is in its place by now.
    let next = Spot { dir: spot.dir.try_clone().map_err(failed("open", &path))?, name: name_of(&next) };
    let replaced = prepare(&next, &root.at(&beside(real)), entry, content).and_then(|()| {
        let renamed = renameat(&next.dir, next.name, &spot.dir, spot.name);
        renamed.map_err(|errno| failed("replace", &path)(errno.into()))
    });
    if let Err(error) = replaced {
        // A full file system, say; the first error is the one that matters. After a power cut nothing is removed.
        if moment().is_ok() {
            next.remove(UnlinkatFlags::NoRemoveDir).unwrap_or_default();
        }
        return Err(error);
    }
    moment()?;
    spot.sync().map_err(failed("flush", &path))
}

/// Makes what shall be renamed. It is a new one: whatever is there, a link too, is in the way.
fn prepare(next: &Spot<'_>, path: &Path, entry: &Entry, content: &[u8]) -> Result<(), Error> {
    match entry {
        Entry::Absent => {}
        Entry::Link { target } => {
            let made = symlinkat(target, &next.dir, next.name);
            made.map_err(|errno| failed("create", path)(errno.into()))?;
        }
        Entry::File { owner, xattrs, .. } => {
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
            let made = openat(&next.dir, next.name, flags, Mode::S_IRUSR | Mode::S_IWUSR);
            let mut file = File::from(made.map_err(|errno| failed("create", path)(errno.into()))?);
            moment()?;
            file.write_all(content).map_err(failed("write", path))?;
            moment()?;
            let meta = file.metadata().map_err(failed("look at", path))?;
            if (meta.uid(), meta.gid()) != (owner.uid, owner.gid) {
                std::os::unix::fs::fchown(&file, Some(owner.uid), Some(owner.gid))
                    .map_err(failed("give away", path))?;
            }
            // After the owner, whose change may take bits away.
            file.set_permissions(Permissions::from_mode(owner.mode)).map_err(failed("chmod", path))?;
            for (name, value) in xattrs {
                let damaged = || {
                    let what = format!("the record of {} is damaged: its attributes", path.display());
                    Error::refused(what, "put the file back by hand")
                };
                let value = STANDARD.decode(value).map_err(|_| damaged())?;
                let name = CString::new(name.as_str()).map_err(|_| damaged())?;
                // One that it was born with, as the label of its directory, is not set for nothing: that may be forbidden.
                if xattr::get(&file, &name).ok().as_ref() != Some(&value) {
                    xattr::set(&file, &name, &value).map_err(failed("set an attribute of", path))?;
                }
            }
            moment()?;
            file.sync_all().map_err(failed("flush", path))?;
        }
    }
    moment()
}

fn name_of(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_default()
}

/// The directories above `real` that are not there, the uppermost first.
pub fn missing_dirs(root: &Root, real: &Path) -> Vec<PathBuf> {
    let missing = real.ancestors().skip(1).take_while(|dir| !root.is_there(dir));
    let mut missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
    missing.reverse();
    missing
}

/// Makes a directory with these permissions, which may be there.
///
/// # Errors
/// Where it cannot be made or flushed.
pub fn make_dir(root: &Root, real: &Path, mode: u32) -> Result<(), Error> {
    let path = root.at(real);
    let spot = root.spot(real).map_err(failed("open", &path))?;
    match mkdirat(&spot.dir, spot.name, Mode::from_bits_truncate(mode)).map_err(io::Error::from) {
        Err(error)
            if error.kind() == io::ErrorKind::AlreadyExists
                && spot.kind().is_ok_and(|kind| kind == SFlag::S_IFDIR) => {}
        made => {
            made.map_err(failed("create", &path))?;
            moment()?;
            // Whatever the umask is: others may have to read what lies in it.
            spot.open(OFlag::O_RDONLY | OFlag::O_DIRECTORY)
                .and_then(|made| made.set_permissions(Permissions::from_mode(mode)))
                .map_err(failed("chmod", &path))?;
        }
    }
    moment()?;
    spot.sync().map_err(failed("flush", &path))
}

/// Removes a directory unless someone put something into it.
///
/// # Errors
/// Where it is empty and cannot be removed.
pub fn remove_dir(root: &Root, real: &Path) -> Result<(), Error> {
    let path = root.at(real);
    let removed = root.spot(real).and_then(|spot| spot.remove(UnlinkatFlags::RemoveDir).map(|()| spot));
    match removed {
        Err(error) if is_missing(&error) || error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        removed => {
            let spot = removed.map_err(failed("remove", &path))?;
            moment()?;
            spot.sync().map_err(failed("flush", &path))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_link_that_was_put_into_the_place_of_a_directory_leads_nowhere() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = Root::open(dir.path()).unwrap();
        fs::create_dir_all(dir.path().join("etc/ours")).unwrap();
        fs::write(dir.path().join("etc/ours/f"), "inside").unwrap();
        for name in ["f", ".f.mt-agent-new"] {
            fs::write(other.path().join(name), "of the host").unwrap();
        }
        fs::create_dir(other.path().join("empty")).unwrap();
        let real = root.real(Path::new("/etc/ours/f")).unwrap();
        let (entry, _) = Entry::read(&root, &real).unwrap();
        // Between the look and the writing.
        fs::rename(dir.path().join("etc/ours"), dir.path().join("etc/away")).unwrap();
        symlink(other.path(), dir.path().join("etc/ours")).unwrap();
        put(&root, &real, &entry, b"inside").unwrap_err();
        put(&root, &real, &Entry::Link { target: "/x".into() }, b"").unwrap_err();
        put(&root, &real, &Entry::Absent, b"").ok();
        clear(&root, &real).ok();
        make_dir(&root, Path::new("/etc/ours/new"), 0o755).unwrap_err();
        remove_dir(&root, Path::new("/etc/ours/empty")).ok();
        assert_eq!(Entry::read(&root, &real).unwrap().0, Entry::Absent);
        let names = |path: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(other.path()), [".f.mt-agent-new", "empty", "f"]);
        assert_eq!(fs::read(other.path().join("f")).unwrap(), b"of the host");
        assert_eq!(fs::read(dir.path().join("etc/away/f")).unwrap(), b"inside");
        // The root too is the one that was opened.
        let moved = dir.path().with_extension("moved");
        fs::rename(dir.path(), &moved).unwrap();
        symlink(other.path(), dir.path()).unwrap();
        assert_eq!(root.names("/"), ["etc"]);
        assert_eq!(root.text("/etc/away/f").unwrap().unwrap(), "inside");
        assert_eq!(root.read("/f").unwrap(), None);
        fs::remove_file(dir.path()).unwrap();
        fs::rename(&moved, dir.path()).unwrap();
    }

    #[test]
    fn links_are_followed_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc/real")).unwrap();
        fs::write(dir.path().join("etc/real/a"), "inside").unwrap();
        symlink("/etc/real", dir.path().join("etc/absolute")).unwrap();
        symlink("../../../../etc/real/a", dir.path().join("etc/above")).unwrap();
        symlink("round", dir.path().join("etc/round")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert!(!root.is_live());
        assert_eq!(root.text("/etc/absolute/a").unwrap().unwrap(), "inside");
        assert_eq!(root.text("/etc/above").unwrap().unwrap(), "inside");
        assert_eq!(root.real(Path::new("/etc/absolute/new/b")).unwrap(), Path::new("/etc/real/new/b"));
        assert_eq!(root.real_parent(Path::new("/etc/above")).unwrap(), Path::new("/etc/above"));
        assert!(root.real(Path::new("/etc/round")).is_err());
        assert_eq!(root.read("/etc/none/x").unwrap(), None);
        assert_eq!(root.read("/etc/real/a/x").unwrap(), None);
        assert!(matches!(root.read("/etc/real"), Err(Error::Refused(_))));
    }

    #[test]
    fn a_file_that_is_no_configuration_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("long")).unwrap().set_len(MAX_LEN + 1).unwrap();
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert!(root.read("/long").is_err());
        assert!(matches!(root.read("/pipe"), Err(Error::Refused(_))));
        assert!(matches!(Entry::read(&root, Path::new("/pipe")), Err(Error::Refused(_))));
        // To open one that is a device may set something going. This one would go on for ever.
        if nix::unistd::geteuid().is_root() {
            let zero = nix::sys::stat::makedev(1, 5);
            nix::sys::stat::mknod(&dir.path().join("device"), SFlag::S_IFCHR, Mode::S_IRWXU, zero).unwrap();
            assert!(root.value("/device").is_none());
            assert!(matches!(root.read("/device"), Err(Error::Refused(_))));
        }
        fs::write(dir.path().join("value"), " 1\n").unwrap();
        assert_eq!(root.value("/value").unwrap(), "1");
    }

    #[test]
    fn a_file_takes_owner_permissions_and_attributes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o4751)).unwrap();
        let is_root = nix::unistd::geteuid().is_root();
        if is_root {
            std::os::unix::fs::chown(&path, Some(1234), Some(4321)).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o4751)).unwrap();
            xattr::set(&File::open(&path).unwrap(), c"trusted.mt-agent", b"\0label").unwrap();
        }
        let (entry, content) = Entry::read(&root, Path::new("/f")).unwrap();
        assert_eq!(content.as_deref(), Some(&b"old"[..]));
        put(&root, Path::new("/g"), &entry, b"old").unwrap();
        assert_eq!(Entry::read(&root, Path::new("/g")).unwrap().0, entry);
        let Entry::File { owner, xattrs, .. } = &entry else { panic!("{entry:?}") };
        assert_eq!(owner.mode, 0o4751);
        assert!(
            !is_root || (owner.uid == 1234 && owner.gid == 4321 && xattrs.contains_key("trusted.mt-agent"))
        );
        assert_eq!(root.names("/"), ["f", "g"]);
    }
}
