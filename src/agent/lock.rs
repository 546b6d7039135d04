//! One service a state directory.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::durable;
use crate::error::IoError;

/// The right to be the service of a state directory, for as long as it lives.
///
/// An exclusive `flock` of `<state_dir>/instance.lock`: it ends with the process, however that ends, and a file
/// that was left behind means nothing. What is written in it is only to name the holder.
#[derive(Debug)]
pub struct Instance {
    _lock: Flock<File>,
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
        let path = state_dir.join("instance.lock");
        let failed = |op, error| IoError::new(op, path.display().to_string(), error);
        let mut file = durable::lock_file(&path)?;
        let mut lock = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                Err((same, Errno::EINTR)) => file = same,
                Err((held, Errno::EWOULDBLOCK)) => {
                    let mut text = String::new();
                    // Only for the message: without it the pid is missing there.
                    let pid =
                        held.take(32).read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                    return Err(Error::Refused { file: path, pid });
                }
                Err((_, errno)) => return Err(failed("lock", errno.into()).into()),
            }
        };
        lock.set_len(0).map_err(|error| failed("empty", error))?;
        writeln!(lock, "{}", std::process::id()).map_err(|error| failed("write", error))?;
        Ok(Instance { _lock: lock })
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
