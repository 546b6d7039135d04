//! What a sender waits for: whether that is its own source.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::sleep;

/// How long a read may take while nothing else is there to send: longer than a disk takes to start, or its path to be found
/// again. As a rule the receiver, which hears nothing meanwhile, has had enough before.
const LONGEST_READ: Duration = Duration::from_secs(120);

/// What of a silence is surely the source's: a receiver bears a second at least.
const LONG: Duration = Duration::from_secs(1);

/// Whether the reading thread waits for the source, and the connection for the thread.
#[derive(Debug, Default)]
pub struct Waits {
    /// Since when a read is under way that the thread waits for.
    reading: Mutex<Option<Instant>>,
    /// Whether the connection could send and has nothing.
    idle: AtomicBool,
}

impl Waits {
    /// Carries out a read.
    pub(super) fn read<T>(&self, read: impl FnOnce() -> T) -> T {
        *self.reading() = Some(Instant::now());
        let result = read();
        *self.reading() = None;
        result
    }

    fn reading(&self) -> MutexGuard<'_, Option<Instant>> {
        // It is whole whoever panicked beside it.
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the connection has nothing to send although it may.
    pub(super) fn idle(&self, idle: bool) {
        self.idle.store(idle, Ordering::Relaxed);
    }

    /// For how long a read has been all that is waited for, where that is long.
    pub fn hangs(&self) -> Option<Duration> {
        let since = (*self.reading()).filter(|_| self.idle.load(Ordering::Relaxed))?;
        Some(since.elapsed()).filter(|time| *time >= LONG)
    }

    /// Until a read has been waited for too long.
    pub(super) async fn too_long(&self) -> Duration {
        loop {
            if let Some(time) = self.hangs().filter(|time| *time >= LONGEST_READ) {
                return time;
            }
            sleep(LONG).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_read_that_everything_waits_for_hangs() {
        let waits = Waits::default();
        waits.idle(true);
        assert_eq!(waits.hangs(), None);
        waits.read(|| assert_eq!(waits.hangs(), None));
        let since = |time| *waits.reading() = Instant::now().checked_sub(time);
        since(LONG);
        assert!(waits.hangs().is_some());
        // There is something to send, or no room for it.
        waits.idle(false);
        assert_eq!(waits.hangs(), None);
        waits.idle(true);
        since(LONGEST_READ);
        assert!(waits.too_long().await >= LONGEST_READ);
        waits.read(|| ());
        assert_eq!(waits.hangs(), None);
    }
}
