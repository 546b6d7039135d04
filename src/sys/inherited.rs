//! Descriptors that this process was started with.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt};

/// Takes the listening TCP socket that systemd opened for this process (sd_listen_fds(3)), if it did. Only the first call
/// gets it.
///
/// # Errors
/// Where there are several, or it is something else.
pub fn listener() -> io::Result<Option<TcpListener>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
    // Fails where one of them is not open.
    let mut numbers = sd_notify::listen_fds()?;
    if numbers.len() > 1 {
        return Err(invalid("there are several: one TCP socket is expected"));
    }
    let Some(number) = numbers.next() else { return Ok(None) };
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(None);
    }
    // SAFETY: `listen_fds` has found it to be open, and to be meant for this process; it is 3, none of the standard
    // streams. Nothing else in this process knows of it, and `TAKEN` lets it be taken once.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    let tcp = matches!(address.family(), Some(AddressFamily::Inet | AddressFamily::Inet6));
    if !tcp || !getsockopt(&socket, sockopt::AcceptConn)? {
        return Err(invalid("it is no TCP socket that listens"));
    }
    Ok(Some(TcpListener::from(socket)))
}
