//! One target disk, and the thread that owns the order of its writes and flushes.
//!
//! A [`Volume`] is the handle that a session holds. Commands go to the thread through a queue, and what became
//! of them comes back through the [`Events`] callback. The thread keeps several writes in flight, but never
//! two that touch the same block, so that the last one sent is the one that stays.
//!
//! What a crash leaves: writes that were not followed by a [`Volume::flush`] may be there, not there, or there
//! in part, in any combination. Nothing is acknowledged to a sender before its flush succeeded.
//!
//! After a failed write or flush the volume is *faulted*: the kernel may have dropped dirty data and may report
//! the next flush as good, so nothing that this thread could do afterwards would prove anything. It does no
//! more I/O; the disk has to be opened again.

pub mod counters;
mod delta;
pub mod pulse;
mod worker;

use std::fmt;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use self::pulse::Pulse;
use crate::error::IoError;
use crate::journal::Writer;
use crate::storage::{Storage, Waker};
use crate::sys::aligned::{Arena, Buffer};
use crate::units::Extent;

/// What may happen to a volume behind its session's back.
#[derive(Clone, Debug)]
pub enum Event {
    /// `frames` commands were carried out (not yet durable); their window cost was `cost`.
    Written {
        /// How many commands.
        frames: u64,
        /// The sum of what was passed as `cost`.
        cost: u64,
        /// How many bytes were written.
        written: u64,
        /// How many bytes were made zero.
        zeroed: u64,
    },
    /// All that was submitted before the flush is durable.
    Flushed {
        /// How many bytes the journal of the pass takes.
        saved: u64,
    },
    /// The journal's file system is full: nothing goes on until there is room.
    Paused,
    /// There was.
    Resumed,
    /// The volume is faulted; no other event follows.
    Faulted(Fault),
}

/// Why a volume does no more I/O.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the volume is faulted")]
pub struct Fault(#[source] pub Arc<IoError>);

/// Called from the volume's thread; must not block.
pub type Events = Box<dyn FnMut(Event) + Send>;

/// A range that is refused before anything is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{extent} lie outside of the volume's {size} bytes")]
pub struct OutOfRange {
    /// What was asked for.
    pub extent: Extent,
    /// How large the source is that this volume holds.
    pub size: u64,
}

#[derive(Debug)]
enum Command {
    Write { offset: u64, buffer: Buffer, cost: u64 },
    Zero { extent: Extent, cost: u64 },
    Flush,
    Save(Box<Writer>),
}

/// The handle of an open volume. Dropping it lets what is in flight finish, then ends the thread and closes the
/// device.
pub struct Volume {
    commands: Option<Sender<Command>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    pulse: Weak<Pulse>,
    size: u64,
    arena: Arena,
}

impl Volume {
    /// Starts the thread. `size` is the source's size in bytes, at most the device's; what lies behind it is
    /// never written. `arena` bounds the data that the volume holds.
    pub fn start(
        name: &str,
        storage: Box<dyn Storage>,
        size: u64,
        arena: Arena,
        events: Events,
    ) -> Result<Volume, IoError> {
        let (commands, queue) = channel();
        let waker = storage.waker();
        // The thread alone keeps it: where that has ended, nothing can stand still.
        let pulse = Arc::new(Pulse::new());
        let watched = Arc::downgrade(&pulse);
        let worker = worker::Worker::new(storage, size, queue, events, pulse)?;
        // What it logs is of the machine and the disk that it works for.
        let span = tracing::Span::current();
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(move || span.in_scope(|| worker.run()))
            .map_err(|error| IoError::new("start thread for", name, error))?;
        Ok(Volume { commands: Some(commands), waker, thread: Some(thread), pulse: watched, size, arena })
    }

    /// How the thread gets on, until it has ended.
    pub fn pulse(&self) -> Weak<Pulse> {
        self.pulse.clone()
    }

    /// Where the buffers for [`write`](Self::write) come from.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Whether the range lies inside the source's size: to be asked before memory is taken for it.
    pub fn check(&self, extent: Extent) -> Result<(), OutOfRange> {
        if extent.end() <= self.size { Ok(()) } else { Err(OutOfRange { extent, size: self.size }) }
    }

    /// Queues a write of the whole buffer. Any offset and length: what is not aligned to the device's blocks
    /// is merged with what is there.
    pub fn write(&self, offset: u64, buffer: Buffer, cost: u64) -> Result<(), OutOfRange> {
        let Some(extent) = Extent::new(offset, buffer.len() as u64) else { return Ok(()) };
        self.check(extent)?;
        self.send(Command::Write { offset, buffer, cost });
        Ok(())
    }

    /// Queues making a range read as zeros.
    pub fn zero(&self, extent: Extent, cost: u64) -> Result<(), OutOfRange> {
        self.check(extent)?;
        self.send(Command::Zero { extent, cost });
        Ok(())
    }

    /// From here on, what is overwritten is saved in the journal first, and the flush ends the pass there too.
    pub fn save(&self, writer: Writer) {
        self.send(Command::Save(Box::new(writer)));
    }

    /// Queues a flush of everything queued before it; [`Event::Flushed`] answers.
    pub fn flush(&self) {
        self.send(Command::Flush);
    }

    /// Waits until the thread has ended and the device is closed.
    pub fn close(mut self) {
        self.end();
    }

    fn send(&self, command: Command) {
        // The thread ends only when this sender is dropped, or after it reported a fault of its own: then the
        // event has said so already and the command has nowhere to go.
        if let Some(commands) = &self.commands
            && commands.send(command).is_ok()
        {
            self.waker.wake();
        }
    }

    fn end(&mut self) {
        self.commands = None;
        self.waker.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a volume's thread panicked");
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume").field("size", &self.size).finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod crash;
#[cfg(test)]
mod tests;
