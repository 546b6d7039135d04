//! One sender a disk.
//!
//! The master target takes one at a time. Of two that keep the same disk protected each would wait for the other, and make
//! points that nobody asked for; so the second is told, and ends. What only compares may run beside it.

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
}

/// Why they are not to be sent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Somebody else does.
    #[error(
        "disk {disk} of {machine} is being sent by another `mt-agent send`{}: wait for its end, or stop it first (it holds \
         {})", pid.map(|pid| format!(" with pid {pid}")).unwrap_or_default(), file.display()
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
        durable::private_dir(&locks)?;
        let claim = |disk: &'a Name| match Claim::new(&locks.join(disk.as_str())) {
            Ok(claim) => Ok(claim),
            Err(Unclaimed::Io(error)) => Err(error.into()),
            Err(Unclaimed::Held { file, pid }) => {
                let (machine, disk) = (machine.clone(), disk.clone());
                Err(Error::Taken { machine, disk, file, pid })
            }
        };
        Ok(Alone { _claims: disks.into_iter().map(claim).collect::<Result<_, _>>()? })
    }
}
