//! The user's commands before and after a pass.
//!
//! A hook is run by `/bin/sh -c`, as it would be typed: it is the word of whoever runs `mt-agent send`, with the same
//! rights, and nothing that comes from elsewhere is put into it. What it should know is in its environment. What it prints
//! goes to standard error, since standard output may be JSON.

use std::io;
use std::os::fd::AsFd;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::time::timeout;

use crate::error::IoError;

/// How long a hook that is told to end gets for it.
const GRACE: Duration = Duration::from_secs(2);

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be started.
    #[error("the {0} cannot be run")]
    Io(&'static str, #[source] IoError),
    /// It says so.
    #[error("the {0} failed: {1}")]
    Failed(&'static str, ExitStatus),
    /// It takes too long.
    #[error("the {0} did not end within {1:?} and was killed; raise --hook-timeout if it needs longer")]
    Slow(&'static str, Duration),
}

/// A hook's processes, which go when this is dropped before the hook's end.
struct Processes(Option<Pid>);

impl Processes {
    fn send(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // They may be gone.
            killpg(group, signal).ok();
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.send(Signal::SIGKILL);
    }
}

/// Runs a hook to its end. `which` is what the user calls it.
pub(super) async fn run(
    which: &'static str,
    command: &str,
    environment: &[(&'static str, String)],
    limit: Duration,
) -> Result<(), Error> {
    let failed = |op| move |error| Error::Io(which, IoError::new(op, "/bin/sh", error));
    let output = io::stderr().as_fd().try_clone_to_owned().map_err(failed("give its output to"))?;
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(output)
        // All that it starts goes with it; and what ends the sender is not for it.
        .process_group(0)
        .spawn()
        .map_err(failed("start"))?;
    let mut processes = Processes(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw));
    match timeout(limit, child.wait()).await {
        Ok(ended) => {
            // What it left behind on purpose stays.
            processes.0 = None;
            match ended.map_err(failed("wait for"))? {
                status if status.success() => Ok(()),
                status => Err(Error::Failed(which, status)),
            }
        }
        Err(_) => {
            processes.send(Signal::SIGTERM);
            timeout(GRACE, child.wait()).await.ok();
            drop(processes);
            child.wait().await.map_err(failed("wait for"))?;
            Err(Error::Slow(which, limit))
        }
    }
}
