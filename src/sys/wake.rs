//! An eventfd: how one thread wakes another that sleeps in the kernel.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};

/// A non-blocking eventfd. Waking twice before anyone looks is the same as waking once.
#[derive(Debug)]
pub struct EventFd(NixEventFd);

impl EventFd {
    /// A new one, not yet woken.
    pub fn new() -> io::Result<EventFd> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(EventFd(NixEventFd::from_value_and_flags(0, flags)?))
    }

    /// Makes the descriptor readable. Cannot block: a counter that is full is readable already.
    pub fn wake(&self) {
        match self.0.write(1) {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(errno) => unreachable!("a write of 8 bytes to an eventfd gives only EAGAIN: {errno}"),
        }
    }

    /// Takes the wake-up: the descriptor is not readable afterwards until the next [`wake`](Self::wake).
    pub fn clear(&self) {
        match self.0.read() {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(errno) => unreachable!("a read of 8 bytes from an eventfd gives only EAGAIN: {errno}"),
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
