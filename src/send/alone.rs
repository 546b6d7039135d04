//! One sender a disk.
//!
//! The master target takes one at a time. Of two that keep the same disk protected each would wait for the other, and make
//! points that nobody asked for; so the second is told, and ends, or waits. What only compares may run beside it.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::durable::{self, Claim, Unclaimed};
use crate::error::IoError;
use crate::name::Name;
use crate::net::tls::client::Identity;

/// The right to send some disks of a machine, for as long as it lives: a lock for each, in a directory beside the machine's
/// identity.
#[derive(Debug)]
pub struct Alone {
    _claims: Vec<Claim>,
    unlocked: Option<IoError>,
}

/// Why they are not to be sent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(
        "it cannot be seen whether another `mt-agent send` sends these disks (what lies in the place of a lock can be moved away)"
    )]
    Io(#[from] IoError),
    /// Somebody else does.
    #[error(
        "disk {disk} of {machine} is being sent by another `mt-agent send`{} (it holds {})", pid.map(|pid| format!(" with pid {pid}")).unwrap_or_default(), file.display()
    )]
    Taken {
        /// The machine.
        machine: Name,
        /// Its disk.
        disk: Name,
        /// The lock.
        file: PathBuf,
        /// Who holds it, where that could be read.
        pid: Option<u32>,
    },
}

impl Error {
    /// Whether somebody else sends, rather than that something failed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Error::Taken { .. })
    }
}

impl Alone {
    /// Becomes the sender of these disks of a machine that is enrolled in `state_dir`.
    pub fn with<'a>(
        state_dir: &Path,
        machine: &Name,
        disks: impl IntoIterator<Item = &'a Name>,
    ) -> Result<Alone, Error> {
        // No machine's identity is named so.
        let locks = Identity::path(state_dir, machine).with_extension("locks");
        let mut alone = Alone { _claims: Vec::new(), unlocked: None };
        let directory = match durable::private_dir(&locks).and_then(|()| durable::open_dir(&locks)) {
            Err(error) if has_no_room(&error) => return Ok(Alone { unlocked: Some(error), ..alone }),
            opened => opened?,
        };
        // In one order: of two that want the same disks one gets them, and not neither.
        let disks: BTreeSet<&Name> = disks.into_iter().collect();
        for disk in disks {
            match Claim::new(&directory, &locks.join(disk.as_str())) {
                Ok(claim) => alone._claims.push(claim),
                Err(Unclaimed::Io(error)) if has_no_room(&error) => alone.unlocked = Some(error),
                Err(Unclaimed::Io(error)) => return Err(error.into()),
                Err(Unclaimed::Held { file, pid }) => {
                    let (machine, disk) = (machine.clone(), disk.clone());
                    return Err(Error::Taken { machine, disk, file, pid });
                }
            }
        }
        Ok(alone)
    }

    /// Why it is not certain that nobody else sends the same: a lock cannot be made on a file system that is full or read-only.
    /// No machine stays unprotected for that.
    pub fn unlocked(&self) -> Option<&IoError> {
        self.unlocked.as_ref()
    }
}

fn has_no_room(error: &IoError) -> bool {
    use ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.source.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_claimed_in_one_order() {
        let dir = tempfile::tempdir().unwrap();
        let [machine, a, b]: [Name; 3] = ["web01", "a", "b"].map(|name| name.parse().unwrap());
        let held = Alone::with(dir.path(), &machine, [&b, &a]).unwrap();
        for disks in [[&a, &b], [&b, &a]] {
            match Alone::with(dir.path(), &machine, disks) {
                Err(Error::Taken { disk, .. }) => assert_eq!(disk, a),
                other => panic!("{other:?}"),
            }
        }
        drop(held);
        assert!(Alone::with(dir.path(), &machine, [&a, &b]).unwrap().unlocked().is_none());
    }
}
