//! What is said to systemd, and taken from it: sd_notify(3), sd_watchdog_enabled(3). Where there is no systemd, nobody
//! listens, and that is no error.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::status::Board;
use crate::volume::pulse::Pulse;

/// How often the line of `systemctl status` is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// For how many times the watchdog's time a volume may stand still: a disk that is slow, or whose path is being switched,
/// is no reason to cut off all the others, and is answered for by the kernel's own time limits.
const PATIENT: u32 = 2;

/// How often, and after which pause, the last thing is said again that nobody takes.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(50);

/// Who listens. Nothing here waits for them: a socket that is full, since nobody reads it, must not hold up the service, which
/// would not even end then.
#[derive(Debug, Default)]
pub(super) struct Systemd {
    /// Its path, or its abstract name after an `@`.
    socket: Option<OsString>,
    /// Whether it has not taken yet that the service is ready: [`Systemd::keep_told`] says it again.
    owes_ready: AtomicBool,
    /// Whether the last message was not taken, which is logged once.
    deaf: AtomicBool,
}

impl Systemd {
    /// The one that started this process, if it wants to hear.
    pub(super) fn of_this_process() -> Systemd {
        Systemd { socket: std::env::var_os("NOTIFY_SOCKET"), ..Systemd::default() }
    }

    /// Says it, and whether it was taken.
    pub(super) fn tell(&self, states: &[NotifyState<'_>]) -> bool {
        match self.send(states) {
            Ok(()) => self.deaf.store(false, Ordering::Relaxed),
            Err(_) if self.deaf.swap(true, Ordering::Relaxed) => return false,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tracing::warn!(socket = ?self.socket, "systemd does not read what it is told: its socket is full");
                return false;
            }
            Err(error) => {
                tracing::warn!(socket = ?self.socket, %error, "systemd could not be told");
                return false;
            }
        }
        true
    }

    /// Says that the service is ready, and how it goes. Who does not hear it ends the service some time, so that it is said
    /// until it is taken.
    pub(super) fn tell_ready(&self, board: &Board) {
        let taken = self.tell(&[NotifyState::Ready, NotifyState::Status(&board.line())]);
        self.owes_ready.store(!taken, Ordering::Relaxed);
    }

    /// Says that the service ends. Nobody is left to say it later, and it may not take long.
    pub(super) async fn tell_stopping(&self) {
        for _ in 0..TRIES {
            if self.tell(&[NotifyState::Stopping, NotifyState::Status("stopping")]) {
                return;
            }
            sleep(PAUSE).await;
        }
    }

    fn send(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        let Some(name) = self.socket.as_ref().map(|name| name.as_bytes()) else { return Ok(()) };
        let address = match name.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
        };
        let message: String = states.iter().map(|state| format!("{state}\n")).collect();
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        // A datagram is sent whole or not at all.
        socket.send_to_addr(message.as_bytes(), &address).map(|_| ())
    }

    /// Tells how it goes, until this is aborted; and feeds the watchdog, but not while a volume stands still that has
    /// work: if nothing else ends that, a new start does. That this runs at all shows that the runtime does.
    pub(super) async fn keep_told(self: Arc<Systemd>, board: Arc<Board>, pulses: Arc<Pulses>) {
        let watchdog = sd_notify::watchdog_enabled();
        let tick = watchdog.map_or(LOOK, |limit| LOOK.min(limit / 4)).max(Duration::from_millis(1));
        let mut tick = interval(tick);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut said, mut stood) = (String::new(), false);
        loop {
            tick.tick().await;
            if self.owes_ready.load(Ordering::Relaxed) {
                self.tell_ready(&board);
            }
            let line = board.line();
            if line != said && self.tell(&[NotifyState::Status(&line)]) {
                said = line;
            }
            if let Some(limit) = watchdog {
                let stalled = pulses.stalled();
                let stands = stalled > limit * PATIENT;
                if stands && !stood {
                    tracing::error!(
                        seconds = stalled.as_secs(),
                        "a disk has got nothing done for too long: the watchdog is not fed any more"
                    );
                }
                stood = stands;
                if !stands {
                    self.tell(&[NotifyState::Watchdog]);
                }
            }
        }
    }
}

/// The threads of the volumes, whose getting on is what feeds the watchdog.
#[derive(Debug, Default)]
pub(super) struct Pulses(Mutex<Vec<Weak<Pulse>>>);

impl Pulses {
    /// Watches one more, until it has ended.
    pub(super) fn watch(&self, pulse: Weak<Pulse>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(pulse);
    }

    /// For how long the one that stands still longest does so.
    fn stalled(&self) -> Duration {
        let mut pulses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pulses.retain(|pulse| pulse.strong_count() > 0);
        pulses.iter().filter_map(Weak::upgrade).map(|pulse| pulse.stalled()).max().unwrap_or_default()
    }
}
