//! TCP options of both sides.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::TcpStream;

/// Lets the kernel find a peer that is gone: idle for 10 s, then a probe every 5 s, and 30 s in all. Small
/// frames are not held back (`TCP_NODELAY`).
pub fn set(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = stream.as_fd();
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &10)?;
    setsockopt(&socket, sockopt::TcpKeepInterval, &5)?;
    setsockopt(&socket, sockopt::TcpKeepCount, &4)?;
    // Keepalive does not run while sent data is unacknowledged (RFC 5482).
    setsockopt(&socket, sockopt::TcpUserTimeout, &30_000)?;
    Ok(())
}
