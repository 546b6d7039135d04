//! What a volume tells of itself while it works: written by its thread and its session, read by anyone.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::storage::device::Engine;

/// The counters of one pass over one volume. All atomics are independent figures for showing, so `Relaxed` is
/// enough everywhere.
#[derive(Debug)]
pub struct Counters {
    /// Bytes of the volume that arrived, zeros included.
    pub received_bytes: AtomicU64,
    /// Bytes of the volume that were compared and are the same on both sides.
    pub same_bytes: AtomicU64,
    /// Bytes of payloads as they came over the wire, before they were decompressed.
    pub wire_bytes: AtomicU64,
    /// Bytes whose writing completed.
    pub written_bytes: AtomicU64,
    /// Bytes that were made zero without being written.
    pub zeroed_bytes: AtomicU64,
    /// Frames that arrived.
    pub frames: AtomicU64,
    /// Frames of data that were refused, since their checksum did not hold.
    pub refused_frames: AtomicU64,
    /// How many connections carry the pass, once it began.
    pub connections: AtomicU64,
    /// Whether the journal waits for room on the retention file system.
    pub paused: AtomicBool,
    total: u64,
    engine: Engine,
    started: Instant,
    ended: OnceLock<Duration>,
    phase: AtomicU8,
    pass: Mutex<Option<String>>,
    error: OnceLock<String>,
}

/// What a volume does right now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Phase {
    /// Open, and no pass began.
    Open = 0,
    /// A pass writes.
    Receiving = 1,
    /// Everything arrived, and is made durable.
    Committing = 2,
    /// The pass was committed.
    Synchronized = 3,
    /// A write or a flush failed.
    Faulted = 4,
}

impl Phase {
    /// The name that it has in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Open => "open",
            Phase::Receiving => "receiving",
            Phase::Committing => "committing",
            Phase::Synchronized => "synchronized",
            Phase::Faulted => "faulted",
        }
    }
}

impl Counters {
    /// Counters at zero for a volume of `total` bytes.
    pub fn new(total: u64, engine: Engine) -> Counters {
        Counters {
            received_bytes: AtomicU64::new(0),
            same_bytes: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            zeroed_bytes: AtomicU64::new(0),
            frames: AtomicU64::new(0),
            refused_frames: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            paused: AtomicBool::new(false),
            total,
            engine,
            started: Instant::now(),
            ended: OnceLock::new(),
            phase: AtomicU8::new(Phase::Open as u8),
            pass: Mutex::new(None),
            error: OnceLock::new(),
        }
    }

    /// The size of what is received, in bytes.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many bytes of it are dealt with: they arrived, or are the same.
    pub fn done(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed) + self.same_bytes.load(Ordering::Relaxed)
    }

    /// Which engine writes.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// When it began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// How long it has taken, or took once it was committed or faulted.
    pub fn elapsed(&self) -> Duration {
        self.ended.get().copied().unwrap_or_else(|| self.started.elapsed())
    }

    /// What it does.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Open,
            1 => Phase::Receiving,
            2 => Phase::Committing,
            3 => Phase::Synchronized,
            _ => Phase::Faulted,
        }
    }

    /// Goes on to a phase. Once it is faulted it stays that.
    pub fn enter(&self, phase: Phase) {
        // The end first: who sees the phase sees the time that it took.
        if matches!(phase, Phase::Synchronized | Phase::Faulted) {
            self.ended.get_or_init(|| self.started.elapsed());
        }
        self.phase.fetch_max(phase as u8, Ordering::Relaxed);
    }

    /// The name of the pass, once it began.
    pub fn pass(&self) -> Option<String> {
        self.pass.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A pass of this name began.
    pub fn begin(&self, pass: impl Into<String>) {
        *self.pass.lock().unwrap_or_else(PoisonError::into_inner) = Some(pass.into());
        self.enter(Phase::Receiving);
    }

    /// Whether the journal waits for room.
    pub fn is_paused(&self) -> bool {
        self.phase() != Phase::Faulted && self.paused.load(Ordering::Relaxed)
    }

    /// What failed.
    pub fn error(&self) -> Option<&str> {
        self.error.get().map(String::as_str)
    }

    /// A write or a flush failed. Of several reasons the first is kept.
    pub fn fault(&self, reason: impl Into<String>) {
        let reason = reason.into();
        self.error.get_or_init(|| reason);
        self.enter(Phase::Faulted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_final_and_keeps_its_first_reason() {
        let counters = Counters::new(1, Engine { name: "threads".into(), why: "asked for".into() });
        assert_eq!(counters.phase(), Phase::Open);
        counters.begin("p");
        counters.enter(Phase::Committing);
        counters.fault("first");
        counters.fault("second");
        counters.enter(Phase::Synchronized);
        assert_eq!((counters.phase(), counters.error()), (Phase::Faulted, Some("first")));
        assert_eq!(counters.elapsed(), counters.elapsed());
    }
}
