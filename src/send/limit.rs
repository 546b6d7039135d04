//! A limit on the bytes a second, for all disks of a `send` together.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A token bucket that may run into debt: whoever takes from it waits afterwards until the debt is paid. Those who
/// share it wait for each other, a [part](Limiter::part) each.
#[derive(Debug)]
pub struct Limiter {
    bytes_per_second: u64,
    /// When everything that was taken is paid for.
    paid: Mutex<Instant>,
}

/// How much idle time is saved up for a burst.
const BURST: Duration = Duration::from_millis(100);

impl Limiter {
    /// A limit of so many bytes a second (at least 1).
    pub fn new(bytes_per_second: u64) -> Limiter {
        Limiter { bytes_per_second: bytes_per_second.max(1), paid: Mutex::new(Instant::now()) }
    }

    /// The most that should be taken at once: a 64th of a second's worth, so that each of many disks gets its turn
    /// well inside the patience of its peer, but no less than 4 KiB and no more than 1 MiB.
    pub fn part(&self) -> usize {
        (self.bytes_per_second / 64).clamp(4 << 10, 1 << 20) as usize
    }

    /// Takes `bytes`, and returns how long to wait before they may be sent.
    pub fn take(&self, bytes: u64) -> Duration {
        self.take_at(bytes, Instant::now())
    }

    fn take_at(&self, bytes: u64, now: Instant) -> Duration {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        *paid = start + cost;
        paid.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time_whatever_the_sizes() {
        let limiter = Limiter::new(1 << 20);
        let start = Instant::now();
        let mut now = start;
        let mut bytes = 0;
        for size in [1 << 20, 100, 4096, 3 << 20, 1, 1 << 19] {
            now += limiter.take_at(size, now);
            bytes += size;
        }
        let seconds = (now - start).as_secs_f64();
        let expected = bytes as f64 / f64::from(1 << 20);
        assert!((expected - 0.2..=expected + 0.01).contains(&seconds), "{seconds} for {expected}");
        // What was not used long ago is not saved up.
        assert!(limiter.take_at(1 << 20, now + Duration::from_secs(100)) > Duration::from_millis(800));
    }
}
