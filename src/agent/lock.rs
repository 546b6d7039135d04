//! One service a state directory.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::durable::{Claim, Unclaimed};
use crate::error::IoError;

/// The right to be the service of a state directory, for as long as it lives: a lock of `<state_dir>/instance.lock`.
#[derive(Debug)]
pub struct Instance {
    _claim: Claim,
}

/// Why this is not the service.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Somebody else is.
    #[error(
        "mt-agent is running already{}, it holds {}; stop it first, or use \
         another --state-dir", pid.map(|pid| format!(" with pid {pid}")).unwrap_or_default(), file.display()
    )]
    Refused {
        /// The lock.
        file: PathBuf,
        /// Who holds it, where that could be read.
        pid: Option<u32>,
    },
}

impl Instance {
    /// Becomes the service of `state_dir`, which must exist.
    pub fn acquire(state_dir: &Path) -> Result<Instance, Error> {
        // The administrator may have made it a link.
        let directory = File::open(state_dir)
            .map_err(|error| IoError::new("open", state_dir.display().to_string(), error))?;
        match Claim::new(&directory, &state_dir.join("instance.lock")) {
            Ok(claim) => Ok(Instance { _claim: claim }),
            Err(Unclaimed::Held { file, pid }) => Err(Error::Refused { file, pid }),
            Err(Unclaimed::Io(error)) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_refused_with_the_pid_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("instance.lock"), "4711 left behind by a crash").unwrap();
        let first = Instance::acquire(dir.path()).unwrap();
        match Instance::acquire(dir.path()) {
            Err(Error::Refused { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        Instance::acquire(dir.path()).unwrap();
    }
}
