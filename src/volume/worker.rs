//! The thread of a volume.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use super::{Command, Event, Events, Fault};
use crate::error::IoError;
use crate::storage::{Action, Completion, Place, Request, Storage};
use crate::sys::aligned::{Arena, Buffer};
use crate::units::Extent;

/// How many bytes of a read-modify-write are handled at a time.
const MERGE: usize = 256 << 10;

pub(super) struct Worker {
    storage: Box<dyn Storage>,
    /// How much of the device belongs to the source.
    size: u64,
    queue: Receiver<Command>,
    events: Events,
    in_flight: Vec<InFlight>,
    next_tag: u64,
    completions: Vec<Completion>,
    /// Memory for read-modify-write: two buffers of `MERGE`, taken when first needed.
    scratch: Arena,
}

/// A write or zero request under way, and the blocks that it touches.
struct InFlight {
    tag: u64,
    extent: Extent,
    cost: u64,
}

impl Worker {
    pub(super) fn new(
        storage: Box<dyn Storage>,
        size: u64,
        queue: Receiver<Command>,
        events: Events,
    ) -> Result<Worker, IoError> {
        let scratch = Arena::new(MERGE).map_err(|error| IoError::new("map", "memory", error))?;
        let (in_flight, completions) = (Vec::new(), Vec::new());
        Ok(Worker { storage, size, queue, events, in_flight, next_tag: 0, completions, scratch })
    }

    /// Until the handle is gone or the volume is faulted.
    pub(super) fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(error = &error as &dyn std::error::Error, "volume faulted");
            // The device is closed before anyone hears of the fault, so that it can be opened again at once.
            let Worker { storage, mut events, .. } = self;
            drop(storage);
            events(Event::Faulted(Fault(Arc::new(error))));
        }
    }

    fn serve(&mut self) -> Result<(), IoError> {
        let mut waiting = VecDeque::new();
        let mut open = true;
        loop {
            while open {
                match self.queue.try_recv() {
                    Ok(command) => waiting.push_back(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => open = false,
                }
            }
            if self.in_flight.len() < self.storage.depth()
                && let Some(command) = waiting.pop_front()
            {
                self.start(command)?;
                // Back to the queue: waiting inside of `start` may have taken the wake-up of a command that
                // came meanwhile, and nothing would wake the `step` below for it again.
                continue;
            }
            if !open && waiting.is_empty() {
                return self.drain();
            }
            self.step()?;
        }
    }

    fn start(&mut self, command: Command) -> Result<(), IoError> {
        let block = u64::from(self.storage.geometry().block);
        match command {
            Command::Write { offset, buffer, cost } => {
                // The handle has checked it: not empty, inside the volume.
                let Some(extent) = Extent::new(offset, buffer.len() as u64) else { return Ok(()) };
                if extent.is_aligned(block) {
                    self.submit(extent, cost, Action::Write { offset, buffer })
                } else {
                    self.drain()?;
                    self.merge(extent, Some(&buffer))?;
                    (self.events)(Event::Written { frames: 1, cost, written: extent.len(), zeroed: 0 });
                    Ok(())
                }
            }
            Command::Zero { extent, cost } => {
                if extent.is_aligned(block) {
                    return self.submit(extent, cost, Action::Zero(extent));
                }
                self.drain()?;
                let start = extent.offset().next_multiple_of(block).min(extent.end());
                let end = (extent.end() - extent.end() % block).max(start);
                for (from, to) in [(extent.offset(), start), (end, extent.end())] {
                    if let Some(edge) = Extent::new(from, to - from) {
                        self.merge(edge, None)?;
                    }
                }
                if let Some(middle) = Extent::new(start, end - start) {
                    return self.submit(middle, cost, Action::Zero(middle));
                }
                (self.events)(Event::Written { frames: 1, cost, written: 0, zeroed: extent.len() });
                Ok(())
            }
            Command::Flush => {
                // A flush makes durable what had completed when it was submitted.
                self.drain()?;
                self.perform(Action::Flush)?;
                (self.events)(Event::Flushed);
                Ok(())
            }
        }
    }

    /// Starts a request, after those that touch the same blocks.
    fn submit(&mut self, extent: Extent, cost: u64, action: Action) -> Result<(), IoError> {
        debug_assert!(extent.end() <= self.size);
        while self.in_flight.iter().any(|other| other.extent.overlaps(extent)) {
            self.step()?;
        }
        let tag = self.tag();
        self.in_flight.push(InFlight { tag, extent, cost });
        self.storage.submit(Request { tag, place: Place::Disk, action });
        Ok(())
    }

    fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    /// Waits for something to happen, and reports what completed.
    fn step(&mut self) -> Result<(), IoError> {
        let mut completions = std::mem::take(&mut self.completions);
        self.storage.wait(&mut completions)?;
        let (mut frames, mut cost, mut written, mut zeroed) = (0, 0, 0, 0);
        for Completion { tag, result, buffer } in completions.drain(..) {
            result?;
            let bytes = if buffer.is_some() { &mut written } else { &mut zeroed };
            if let Some(at) = self.in_flight.iter().position(|request| request.tag == tag) {
                let request = self.in_flight.swap_remove(at);
                frames += 1;
                cost += request.cost;
                *bytes += request.extent.len();
            }
        }
        self.completions = completions;
        if frames > 0 {
            (self.events)(Event::Written { frames, cost, written, zeroed });
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), IoError> {
        while !self.in_flight.is_empty() {
            self.step()?;
        }
        Ok(())
    }

    /// One request, alone, to its end.
    fn perform(&mut self, action: Action) -> Result<Option<Buffer>, IoError> {
        debug_assert!(self.in_flight.is_empty());
        let tag = self.tag();
        self.storage.submit(Request { tag, place: Place::Disk, action });
        let mut completions = std::mem::take(&mut self.completions);
        while completions.is_empty() {
            self.storage.wait(&mut completions)?;
        }
        let completion = completions.pop();
        self.completions = completions;
        match completion {
            Some(Completion { result, buffer, .. }) => result.map(|()| buffer),
            None => unreachable!("the loop ends with a completion"),
        }
    }

    /// Read-modify-write of a range that is not made of whole blocks: `content`, or zeros. Nothing else is in
    /// flight. A crash in between leaves blocks whose other bytes were written back as they were.
    fn merge(&mut self, extent: Extent, content: Option<&[u8]>) -> Result<(), IoError> {
        let block = u64::from(self.storage.geometry().block);
        let mut at = extent.offset();
        while at < extent.end() {
            // Up to the next multiple of MERGE, so that every piece but the ends is made of whole blocks.
            let stop = extent.end().min((at + 1).next_multiple_of(MERGE as u64));
            let piece = Extent::new(at, stop - at).and_then(|piece| piece.widened(block));
            let Some(blocks) = piece else {
                unreachable!("the range lies inside a device whose size is a multiple of the block")
            };
            let buffer = self.scratch.alloc_blocking(blocks.len() as usize);
            let read = Action::Read { offset: blocks.offset(), buffer };
            let Some(mut buffer) = self.perform(read)? else { unreachable!("a read gives its buffer back") };
            let (from, to) = ((at - blocks.offset()) as usize, (stop - blocks.offset()) as usize);
            match content {
                Some(content) => {
                    let (first, last) = ((at - extent.offset()) as usize, (stop - extent.offset()) as usize);
                    buffer[from..to].copy_from_slice(&content[first..last]);
                }
                None => buffer[from..to].fill(0),
            }
            self.perform(Action::Write { offset: blocks.offset(), buffer })?;
            at = stop;
        }
        Ok(())
    }
}
