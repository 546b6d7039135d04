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

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::tree::{self, Entry};
use super::{Call, Error, moment};
use crate::durable;
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
}

impl FileRecord {
    /// Whether what is there now is ours, or what was there before.
    pub fn knows(&self, now: &Entry) -> bool {
        [Some(&self.before), self.written.as_ref(), self.writing.as_ref()]
            .into_iter()
            .flatten()
            .any(|e| e.is_like(now))
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
        }
    }
}

/// The records of one host.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// Those in `dir`, which need not be there.
    pub fn open(dir: PathBuf) -> Records {
        Records { dir }
    }

    /// The directory of one change.
    pub fn dir(&self, change: &str) -> PathBuf {
        self.dir.join(change)
    }

    /// Where the content is that a file had before.
    pub fn original(&self, change: &str, sha256: &str) -> PathBuf {
        self.dir(change).join(sha256)
    }

    /// Keeps every other command away until the value is dropped.
    ///
    /// # Errors
    /// Where the directory cannot be made, is another user's, or the lock cannot be taken.
    pub fn lock(&self) -> Result<impl Drop + use<>, Error> {
        durable::private_dir(&self.dir)?;
        self.trusted(&self.dir)?;
        Ok(durable::lock(&self.dir.join(".lock"))?)
    }

    /// The record of a change, if it was applied.
    ///
    /// # Errors
    /// Where it cannot be read or understood, or is another user's.
    pub fn load(&self, change: &str) -> Result<Option<Record>, Error> {
        for dir in [self.dir.clone(), self.dir(change)] {
            if fs::symlink_metadata(&dir).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                return Ok(None);
            }
            self.trusted(&dir)?;
        }
        let path = self.dir(change).join(RECORD);
        let bytes = match durable::read(&path, tree::MAX_LEN) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read?,
        };
        let corrupt = |what: String| Error::Corrupt { path: path.clone(), what };
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
        if record.schema_version != SCHEMA_VERSION {
            let version = record.schema_version;
            return Err(corrupt(format!(
                "its schema_version is {version}, and this mt-agent knows only {SCHEMA_VERSION}: update mt-agent"
            )));
        }
        Ok(Some(record))
    }

    /// Whoever could write here would say what is put back into `/etc`.
    fn trusted(&self, dir: &Path) -> Result<(), Error> {
        let meta = fs::symlink_metadata(dir)
            .map_err(|error| IoError::new("look at", dir.display().to_string(), error))?;
        if meta.is_dir() && meta.uid() == nix::unistd::geteuid().as_raw() && meta.mode() & 0o022 == 0 {
            return Ok(());
        }
        Err(Error::refused(
            format!(
                "{} must be a directory of the user who runs this, that nobody else may write to: its records say what is \
                 put back",
                dir.display()
            ),
            "run this as root, or look who changed it",
        ))
    }

    /// Keeps the content that a file had before.
    ///
    /// # Errors
    /// The step that failed.
    pub fn keep(&self, change: &str, content: &[u8]) -> Result<(), Error> {
        durable::private_dir(&self.dir(change))?;
        moment()?;
        durable::write(&self.original(change, &tree::digest(content)), content, 0o600)?;
        moment()
    }

    /// The content that a file had before, whose digest is known.
    ///
    /// # Errors
    /// Where it cannot be read, or is another one.
    pub fn kept(&self, change: &str, sha256: &str) -> Result<Vec<u8>, Error> {
        let path = self.original(change, sha256);
        let bytes = durable::read(&path, tree::MAX_LEN)?;
        if tree::digest(&bytes) == sha256 {
            Ok(bytes)
        } else {
            Err(Error::Corrupt { path, what: "it is not what was kept here".to_owned() })
        }
    }

    /// Writes the record of a change.
    ///
    /// # Errors
    /// The step that failed; the record is then the old one.
    pub fn save(&self, change: &str, record: &Record) -> Result<(), Error> {
        durable::private_dir(&self.dir(change))?;
        moment()?;
        let path = self.dir(change).join(RECORD);
        let corrupt =
            |error: serde_json::Error| Error::Corrupt { path: path.clone(), what: error.to_string() };
        let mut bytes = serde_json::to_vec_pretty(record).map_err(corrupt)?;
        bytes.push(b'\n');
        durable::write(&path, &bytes, 0o600)?;
        moment()
    }

    /// Removes the record of a change that was taken back, and what was kept for it. The record goes first: a crash in
    /// between leaves files that nobody refers to, which go with the next one.
    ///
    /// # Errors
    /// The step that failed.
    pub fn remove(&self, change: &str) -> Result<(), Error> {
        let dir = self.dir(change);
        durable::remove(&dir.join(RECORD))?;
        moment()?;
        fs::remove_dir_all(&dir).map_err(|error| IoError::new("remove", dir.display().to_string(), error))?;
        moment()?;
        Ok(durable::sync_dir(&self.dir)?)
    }

    /// Removes what was left of a change without a record, or kept for files that it does not have any more.
    ///
    /// # Errors
    /// The file that could not be removed.
    pub fn sweep(&self, change: &str, record: Option<&Record>) -> Result<(), Error> {
        let dir = self.dir(change);
        let failed = |error| IoError::new("remove", dir.display().to_string(), error);
        if record.is_none() {
            return match fs::remove_dir_all(&dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => Ok(removed.map_err(failed)?),
            };
        }
        let used = |name: &str| {
            name == RECORD
                || record
                    .iter()
                    .flat_map(|record| &record.files)
                    .any(|file| matches!(&file.before, Entry::File { sha256, .. } if sha256 == name))
        };
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if !used(&entry.file_name().to_string_lossy()) {
                fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(())
    }
}
