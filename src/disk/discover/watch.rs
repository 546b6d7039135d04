//! Follows disks as they come, go and change.
//!
//! Both of the kernel's uevent groups are listened to: its own, which needs no udevd, and udev's, whose messages
//! come when the database has been written. Either one only says that something happened; what happened is
//! found by looking again and comparing, so that a lost message costs nothing but time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use super::{Disk, Error, Options, Sysroot, discover};
use crate::error::IoError;
use crate::units::ByteLen;

/// Events come in bursts: looking waits until there was none for this long…
const QUIET: Duration = Duration::from_millis(150);
/// …but no longer than this: where there is no end of events, too, a disk is told of within two seconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// What no event tells (a new mount, an opener, an assignment) is seen at the latest after this long.
const LOOK_ANYWAY: Duration = Duration::from_secs(30);

/// What changed between two looks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Change {
    /// A disk came.
    Attached {
        /// The disk.
        disk: Disk,
    },
    /// A disk went.
    Detached {
        /// As it was.
        disk: Disk,
    },
    /// A disk has another size.
    Resized {
        /// As it is now.
        disk: Disk,
        /// The size that it had, in bytes.
        from: ByteLen,
    },
    /// Something else about a disk changed: its role, its paths, its problems.
    Changed {
        /// As it is now.
        disk: Disk,
    },
}

/// What changed from `before` to `after`. A disk is the same one while its identity and its name are; without an
/// identity, while the kernel has not put another one in its place.
pub fn compare(before: &[Disk], after: &[Disk]) -> Vec<Change> {
    let in_place = |a: &Disk, b: &Disk| a.name == b.name && a.devno == b.devno;
    let same =
        |a: &Disk, b: &Disk| a.id == b.id && in_place(a, b) && (a.id.is_some() || a.sequence == b.sequence);
    let gone = before.iter().filter(|old| !after.iter().any(|new| same(old, new)));
    let mut changes: Vec<Change> = gone.map(|disk| Change::Detached { disk: disk.clone() }).collect();
    for new in after {
        match before.iter().find(|old| same(old, new)) {
            None => changes.push(Change::Attached { disk: new.clone() }),
            // One that lost its medium or its last path is no smaller disk.
            Some(old) if old.size != new.size && old.size.0 > 0 && new.size.0 > 0 => {
                changes.push(Change::Resized { disk: new.clone(), from: old.size });
            }
            Some(old) if old != new => changes.push(Change::Changed { disk: new.clone() }),
            Some(_) => {}
        }
    }
    changes
}

/// A watch over the disks of this machine.
pub struct Watch {
    sysroot: Sysroot,
    options: Box<dyn FnMut() -> Options>,
    kernel: udev::MonitorSocket,
    udev: udev::MonitorSocket,
    disks: Vec<Disk>,
}

impl Watch {
    /// Begins to listen, then looks: nothing that happens after this is missed. The options are asked for at each look,
    /// since what is assigned changes meanwhile. Refused for another tree than this machine's, which sends no events.
    pub fn new(sysroot: Sysroot, mut options: impl FnMut() -> Options + 'static) -> Result<Watch, Error> {
        if !sysroot.is_live() {
            return Err(Error::Refused(
                "only this machine's own disks can be watched; leave out --sysroot".to_owned(),
            ));
        }
        let listen = |builder: io::Result<udev::MonitorBuilder>| builder?.match_subsystem("block")?.listen();
        let failed = |error| Error::Io(IoError::new("listen for", "uevents of block devices", error));
        let kernel = listen(udev::MonitorBuilder::new_kernel()).map_err(failed)?;
        let udev = listen(udev::MonitorBuilder::new()).map_err(failed)?;
        let disks = discover(&sysroot, &options())?;
        Ok(Watch { sysroot, options: Box::new(options), kernel, udev, disks })
    }

    /// The disks as they were last seen.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// Waits until something changed, or until nobody has the other end of the pipe or connection `stop` any more,
    /// which gives no changes.
    pub fn wait(&mut self, stop: BorrowedFd<'_>) -> Result<Vec<Change>, Error> {
        loop {
            if self.sleep(stop, LOOK_ANYWAY)? == Woken::Stop {
                return Ok(Vec::new());
            }
            let burst = Instant::now();
            while burst.elapsed() < PATIENCE {
                match self.sleep(stop, QUIET)? {
                    Woken::Event => {}
                    Woken::Timeout => break,
                    Woken::Stop => return Ok(Vec::new()),
                }
            }
            let disks = discover(&self.sysroot, &(self.options)())?;
            let changes = compare(&self.disks, &disks);
            self.disks = disks;
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }

    fn sleep(&self, stop: BorrowedFd<'_>, time: Duration) -> Result<Woken, Error> {
        let mut fds = [
            PollFd::new(self.kernel.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.udev.as_fd(), PollFlags::POLLIN),
            // Its end is told unasked (POLLERR, POLLHUP), and nothing else matters.
            PollFd::new(stop, PollFlags::empty()),
        ];
        let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
        let ready = match poll(&mut fds, timeout) {
            Ok(ready) => ready,
            // A signal that the program handles elsewhere.
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(Error::Io(IoError::new("wait for", "uevents of block devices", errno))),
        };
        if fds[2].any() == Some(true) {
            return Ok(Woken::Stop);
        }
        // What they say does not matter, only that they are emptied.
        let events = self.kernel.iter().count() + self.udev.iter().count();
        Ok(if ready > 0 || events > 0 { Woken::Event } else { Woken::Timeout })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Woken {
    Event,
    Timeout,
    Stop,
}
