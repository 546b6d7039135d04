//! What is kept of a change that was applied: `<state>-setup/<change>/record.json`, and beside it the content of each
//! file that was there before, under the name of its SHA-256.
//!
//! The order of the writes, and what a crash between two of them leaves:
//!
//! ```text
//!   originals ------> record, state applying ------> files ------> record, state applied
//!             nothing                        some of                (calls are made again)
//!             refers to                      the files
//!             them                           are written
//! ```
//!
//! A record lists each of its files before any of them is written, with what was there first; who finds the record takes
//! that for the original, whatever is there by now. Nothing but a revert that came to its end removes the record.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{getegid, geteuid};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::tree::{self, Entry, Owner, Root};
use super::{Call, Error, moment};
use crate::error::IoError;

const SCHEMA_VERSION: u32 = 1;
const RECORD: &str = "record.json";

/// A change that was applied, or that was begun to be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    schema_version: u32,
    /// How far it is.
    pub state: State,
    /// The version of the mt-agent that applied it.
    pub version: String,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// The boot of the host during which it was applied; none where that was on a tree.
    pub boot: Option<String>,
    /// Whether all of it is in effect only after a reboot.
    pub reboot: bool,
    /// For how many assigned disks it was made.
    pub disks: usize,
    /// Its files.
    pub files: Vec<FileRecord>,
    /// The directories that were made for them, the uppermost first.
    pub dirs: Vec<PathBuf>,
    /// What makes the host look at the files again.
    pub calls: Vec<Call>,
    /// What stays in effect after it was taken back, and until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lasts: Option<String>,
}

/// How far a change is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Some of its files may not be written yet.
    Applying,
    /// Done.
    Applied,
    /// Some of its files may be what they were before.
    Reverting,
}

/// One file of a change.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Where it is in the host, without links.
    pub path: PathBuf,
    /// What was there before the change.
    pub before: Entry,
    /// What was written.
    pub written: Option<Entry>,
    /// What is about to be written.
    pub writing: Option<Entry>,
    /// Whether someone else changed it between two runs: to put back what was there before would undo that too.
    pub edited: bool,
    /// The line that is ours in a file of others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<String>,
}

impl FileRecord {
    /// Whether what is there now is ours, or what was there before.
    pub fn knows(&self, now: &Entry) -> bool {
        [Some(&self.before), self.written.as_ref(), self.writing.as_ref()]
            .into_iter()
            .flatten()
            .any(|e| e.is_like(now))
    }

    /// Whether others changed it, and it has to stay as they left it.
    pub(super) fn is_changed(&self, now: &Entry) -> bool {
        !now.is_like(&self.before) && (self.edited || !self.knows(now))
    }

    /// Our line, where that is in a file of others as it is now, or may be. None where nothing of us can be in there.
    pub(super) fn line_in(&self, now: &Entry, content: Option<&[u8]>) -> Option<&str> {
        let line = self.line.as_deref()?;
        let is_there = match content {
            Some(content) => content.windows(line.len()).any(|part| part == line.as_bytes()),
            None => *now != Entry::Absent,
        };
        is_there.then_some(line)
    }

    /// The owner and permissions then and now, where nothing else keeps this from being taken back.
    pub(super) fn only_owner(&self, now: &Entry) -> Option<(Owner, Owner)> {
        let ours = [&self.written, &self.writing].into_iter().flatten().filter(|_| !self.edited);
        [&self.before].into_iter().chain(ours).find_map(|then| match (then, now) {
            (Entry::File { sha256, owner, .. }, Entry::File { sha256: now_sha256, owner: now_owner, .. }) => {
                (sha256 == now_sha256).then_some((*owner, *now_owner))
            }
            _ => None,
        })
    }
}

impl Record {
    /// One of a change that begins.
    pub fn begun() -> Record {
        Record {
            schema_version: SCHEMA_VERSION,
            state: State::Applying,
            version: String::new(),
            time: OffsetDateTime::UNIX_EPOCH,
            boot: None,
            reboot: false,
            disks: 0,
            files: Vec::new(),
            dirs: Vec::new(),
            calls: Vec::new(),
            lasts: None,
        }
    }
}

/// The records of one host.
///
/// Their directory is opened anew for each step, in the way of [`tree`], and it is looked whose it is: nothing is written or
/// removed where a link leads in the meantime.
#[derive(Clone, Debug)]
pub struct Records {
    root: Root,
    real: PathBuf,
}

impl Records {
    /// Those in a directory of the host, whose path was followed, and which need not be there.
    pub fn open(root: &Root, real: PathBuf) -> Records {
        Records { root: root.clone(), real }
    }

    /// Where the content is that a file had before, to be shown.
    pub fn original(&self, change: &str, sha256: &str) -> PathBuf {
        self.root.at(&self.real).join(change).join(sha256)
    }

    /// Keeps every other command away until the value is dropped.
    ///
    /// # Errors
    /// Where the directory cannot be made, is another user's, or the lock cannot be taken.
    pub fn lock(&self) -> Result<impl Drop + use<>, Error> {
        let dir = self.make()?;
        let failed = |error| IoError::new("lock", dir.shown().to_string(), error);
        let opened = dir.directory().map_err(failed)?;
        Flock::lock(opened, FlockArg::LockExclusive).map_err(|(_, errno)| failed(errno.into()).into())
    }

    /// The directory of all records.
    fn all(&self) -> Result<Option<Root>, Error> {
        trusted(&self.root, &self.real)
    }

    /// The directory of one change.
    fn of(&self, change: &str) -> Result<Option<Root>, Error> {
        self.all()?.map_or(Ok(None), |all| trusted(&all, &at(change)))
    }

    /// The directory of all records, which may have to be made.
    fn make(&self) -> Result<Root, Error> {
        self.all()?;
        for dir in tree::missing_dirs(&self.root, &self.real) {
            tree::make_dir(&self.root, &dir, 0o755)?;
        }
        tree::make_dir(&self.root, &self.real, 0o700)?;
        self.all()?.ok_or_else(|| gone(self.root.at(&self.real)))
    }

    /// Writes a file of a change, for this user alone.
    fn write(&self, change: &str, name: &str, content: &[u8]) -> Result<(), Error> {
        tree::make_dir(&self.make()?, &at(change), 0o700)?;
        let dir = self.of(change)?.ok_or_else(|| gone(self.root.at(&self.real).join(change)))?;
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let owner = Owner { uid, gid, mode: 0o600 };
        let file = Entry::File { sha256: tree::digest(content), owner, xattrs: BTreeMap::new() };
        tree::put(&dir, &at(name), &file, content)?;
        moment()
    }

    /// The record of a change, if it was applied.
    ///
    /// # Errors
    /// Where it cannot be read or understood, or is another user's.
    pub fn load(&self, change: &str) -> Result<Option<Record>, Error> {
        let Some(bytes) = self.of(change)?.map(|dir| dir.read(at(RECORD))).transpose()?.flatten() else {
            return Ok(None);
        };
        let corrupt = |what: String| Error::Corrupt { path: self.original(change, RECORD), what };
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
        if record.schema_version != SCHEMA_VERSION {
            let version = record.schema_version;
            return Err(corrupt(format!(
                "its schema_version is {version}, and this mt-agent knows only {SCHEMA_VERSION}: update mt-agent"
            )));
        }
        Ok(Some(record))
    }

    /// Whether there is anything of a change: a record, or what was kept before it could be written.
    ///
    /// # Errors
    /// Where that cannot be looked at, or is another user's.
    pub fn has(&self, change: &str) -> Result<bool, Error> {
        Ok(self.of(change)?.is_some())
    }

    /// Keeps the content that a file had before.
    ///
    /// # Errors
    /// The step that failed.
    pub fn keep(&self, change: &str, content: &[u8]) -> Result<(), Error> {
        self.write(change, &tree::digest(content), content)
    }

    /// The content that a file had before, whose digest is known.
    ///
    /// # Errors
    /// Where it cannot be read, or is another one.
    pub fn kept(&self, change: &str, sha256: &str) -> Result<Vec<u8>, Error> {
        let path = self.original(change, sha256);
        match self.of(change)?.map(|dir| dir.read(at(sha256))).transpose()?.flatten() {
            Some(bytes) if tree::digest(&bytes) == sha256 => Ok(bytes),
            Some(_) => Err(Error::Corrupt { path, what: "it is not what was kept here".to_owned() }),
            None => Err(gone(path)),
        }
    }

    /// Writes the record of a change.
    ///
    /// # Errors
    /// The step that failed; the record is then the old one.
    pub fn save(&self, change: &str, record: &Record) -> Result<(), Error> {
        let path = self.original(change, RECORD);
        let corrupt =
            |error: serde_json::Error| Error::Corrupt { path: path.clone(), what: error.to_string() };
        let mut bytes = serde_json::to_vec_pretty(record).map_err(corrupt)?;
        bytes.push(b'\n');
        self.write(change, RECORD, &bytes)
    }

    /// Removes the record of a change that was taken back, and what was kept for it. The record goes first: a crash in
    /// between leaves files that nobody refers to, which go with the next one.
    ///
    /// # Errors
    /// The step that failed.
    pub fn remove(&self, change: &str) -> Result<(), Error> {
        if let Some(dir) = self.of(change)? {
            tree::put(&dir, &at(RECORD), &Entry::Absent, &[])?;
            moment()?;
        }
        self.sweep(change, None)
    }

    /// Removes what was left of a change without a record, or kept for files that it does not have any more.
    ///
    /// # Errors
    /// The file that could not be removed.
    pub fn sweep(&self, change: &str, record: Option<&Record>) -> Result<(), Error> {
        let Some(dir) = self.of(change)? else { return Ok(()) };
        let files = || record.iter().flat_map(|record| &record.files);
        let keeps = |name: &OsStr| {
            files().any(|file| matches!(&file.before, Entry::File { sha256, .. } if name == sha256.as_str()))
        };
        for name in dir.entries("/")? {
            if record.is_none() || (name != RECORD && !keeps(&name)) {
                match tree::put(&dir, &Path::new("/").join(name), &Entry::Absent, &[]) {
                    // Not made by us, and nothing to fail for each time.
                    Err(Error::Io(error)) if error.source.kind() == io::ErrorKind::IsADirectory => {}
                    done => done?,
                }
            }
        }
        match (record, self.all()?) {
            (None, Some(all)) => tree::remove_dir(&all, &at(change)),
            _ => Ok(()),
        }
    }
}

/// A name in a directory that is a root of its own.
fn at(name: &str) -> PathBuf {
    Path::new("/").join(name)
}

fn gone(path: PathBuf) -> Error {
    IoError::new("open", path.display().to_string(), io::ErrorKind::NotFound).into()
}

/// A directory of records, none where it is not there. Whoever could write to it would say what is put back into `/etc`.
fn trusted(above: &Root, real: &Path) -> Result<Option<Root>, Error> {
    let path = above.at(real);
    let failed = |error| IoError::new("look at", path.display().to_string(), error);
    match above.within(real) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() != io::ErrorKind::NotADirectory => return Err(failed(error).into()),
        Err(_) => {}
        Ok(dir) => {
            let meta = dir.metadata().map_err(failed)?;
            if meta.uid() == geteuid().as_raw() && meta.mode() & 0o022 == 0 {
                return Ok(Some(dir));
            }
        }
    }
    Err(Error::refused(
        format!(
            "{} must be a directory of the user who runs this, that nobody else may write to: its records say what is put back",
            path.display()
        ),
        "run this as root, or look who changed it",
    ))
}
