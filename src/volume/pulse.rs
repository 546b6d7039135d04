//! Whether a volume's thread gets on with its work.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Kept by the thread of a volume, for as long as it runs: when it last got on with what it has to do.
#[derive(Debug)]
pub struct Pulse {
    started: Instant,
    /// Milliseconds after `started`, and one more: 0 while there is nothing to do. It is read alone, so `Relaxed` is enough.
    at: AtomicU64,
}

impl Pulse {
    pub(super) fn new() -> Pulse {
        Pulse { started: Instant::now(), at: AtomicU64::new(0) }
    }

    /// Something was begun or came to its end.
    pub(super) fn beat(&self) {
        let at = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.at.store(at.saturating_add(1), Ordering::Relaxed);
    }

    /// There is nothing to do, or nothing can be done before somebody else makes room.
    pub(super) fn rest(&self) {
        self.at.store(0, Ordering::Relaxed);
    }

    /// For how long it has had work and got on with none of it.
    pub fn stalled(&self) -> Duration {
        match self.at.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            at => self.started.elapsed().saturating_sub(Duration::from_millis(at)),
        }
    }
}
