//! The thread of a volume.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use super::delta::Delta;
use super::pulse::Pulse;
use super::{Command, Event, Events, Fault};
use crate::error::IoError;
use crate::storage::{Action, Completion, Place, Request, Storage};
use crate::sys::aligned::{Arena, Buffer};
use crate::units::Extent;

/// How many bytes of a read-modify-write are handled at a time.
const MERGE: usize = 256 << 10;

pub(super) struct Worker {
    pub(super) storage: Box<dyn Storage>,
    /// How much of the device belongs to the source.
    size: u64,
    pub(super) queue: Receiver<Command>,
    /// Commands that were taken from the queue and not started yet.
    pub(super) waiting: VecDeque<Command>,
    pub(super) events: Events,
    in_flight: Vec<InFlight>,
    /// Commands of which a part is under way.
    open: HashMap<u64, Open>,
    next_tag: u64,
    completions: Vec<Completion>,
    /// Results of requests that somebody waits for, with the buffers of reads.
    awaited: HashMap<u64, Option<Buffer>>,
    /// How many of them are under way.
    begun: usize,
    /// Memory for read-modify-write: taken when first needed.
    scratch: Arena,
    /// Where the pass saves what it overwrites, if it does.
    pub(super) delta: Option<Delta>,
    pub(super) pulse: Arc<Pulse>,
}

/// A write or zero request under way, and the blocks that it touches.
struct InFlight {
    tag: u64,
    extent: Extent,
    command: u64,
}

/// What is left of a command.
struct Open {
    requests: usize,
    done: Done,
}

/// What a command came to.
#[derive(Default)]
pub(super) struct Done {
    pub(super) cost: u64,
    pub(super) written: u64,
    pub(super) zeroed: u64,
}

/// Why the thread stops in the middle of something.
#[derive(Debug)]
pub(super) enum Stop {
    Failed(IoError),
    /// The handle is gone while the journal waits for room: nothing of what waits was promised to anyone.
    Closed,
}

impl From<IoError> for Stop {
    fn from(error: IoError) -> Stop {
        Stop::Failed(error)
    }
}

impl Worker {
    pub(super) fn new(
        storage: Box<dyn Storage>,
        size: u64,
        queue: Receiver<Command>,
        events: Events,
        pulse: Arc<Pulse>,
    ) -> Result<Worker, IoError> {
        let scratch = Arena::new(MERGE).map_err(|error| IoError::new("map", "memory", error))?;
        Ok(Worker {
            storage,
            size,
            queue,
            waiting: VecDeque::new(),
            events,
            in_flight: Vec::new(),
            open: HashMap::new(),
            next_tag: 0,
            completions: Vec::new(),
            awaited: HashMap::new(),
            begun: 0,
            scratch,
            delta: None,
            pulse,
        })
    }

    /// Until the handle is gone or the volume is faulted.
    pub(super) fn run(mut self) {
        match self.serve() {
            Ok(()) | Err(Stop::Closed) => {}
            Err(Stop::Failed(error)) => {
                tracing::error!(error = &error as &dyn std::error::Error, "volume faulted");
                // The device is closed before anyone hears of the fault, so that it can be opened again at once.
                let Worker { storage, mut events, .. } = self;
                drop(storage);
                events(Event::Faulted(Fault(Arc::new(error))));
            }
        }
    }

    fn serve(&mut self) -> Result<(), Stop> {
        let mut open = true;
        loop {
            while open {
                match self.queue.try_recv() {
                    Ok(command) => self.waiting.push_back(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => open = false,
                }
            }
            if self.has_room()
                && let Some(command) = self.waiting.pop_front()
            {
                self.pulse.beat();
                match self.delta.take() {
                    None => self.start(command)?,
                    Some(mut delta) => {
                        let result = self.start_saved(&mut delta, command);
                        self.delta = Some(delta);
                        result?;
                    }
                }
                // Back to the queue: waiting inside of `start` may have taken the wake-up of a command that
                // came meanwhile, and nothing would wake the `step` below for it again.
                continue;
            }
            if !open && self.waiting.is_empty() {
                return Ok(self.drain()?);
            }
            self.step()?;
        }
    }

    /// Whether one more request may be submitted.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight.len() + self.begun < self.storage.depth()
    }

    fn start(&mut self, command: Command) -> Result<(), IoError> {
        let block = u64::from(self.storage.geometry().block);
        match command {
            Command::Write { offset, buffer, cost } => {
                // The handle has checked it: not empty, inside the volume.
                let Some(extent) = Extent::new(offset, buffer.len() as u64) else { return Ok(()) };
                let done = Done { cost, written: extent.len(), zeroed: 0 };
                if extent.is_aligned(block) {
                    let command = self.open(done);
                    self.submit(extent, command, Action::Write { offset, buffer })?;
                    self.close(command);
                } else {
                    self.drain()?;
                    self.merge(extent, Some(&buffer))?;
                    self.report(1, done);
                }
                Ok(())
            }
            Command::Zero { extent, cost } => {
                let done = Done { cost, written: 0, zeroed: extent.len() };
                let command = self.open(done);
                if extent.is_aligned(block) {
                    self.submit(extent, command, Action::Zero(extent))?;
                    self.close(command);
                    return Ok(());
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
                    self.submit(middle, command, Action::Zero(middle))?;
                }
                self.close(command);
                Ok(())
            }
            Command::Flush => {
                self.flush_disk()?;
                (self.events)(Event::Flushed { saved: 0 });
                Ok(())
            }
            Command::Save(writer) => {
                self.drain()?;
                self.delta = Some(Delta::new(*writer, self.storage.geometry())?);
                Ok(())
            }
        }
    }

    /// Makes everything durable that was started.
    pub(super) fn flush_disk(&mut self) -> Result<(), IoError> {
        // A flush makes durable what had completed when it was submitted.
        self.drain()?;
        self.perform(Place::Disk, Action::Flush)?;
        Ok(())
    }

    /// A command whose requests are submitted next, until it is closed.
    pub(super) fn open(&mut self, done: Done) -> u64 {
        let command = self.tag();
        self.open.insert(command, Open { requests: 1, done });
        command
    }

    /// All requests of the command were submitted: once they have completed, it is reported.
    pub(super) fn close(&mut self, command: u64) {
        if let Some(done) = self.complete(command) {
            self.report(1, done);
        }
    }

    /// Counts what a request of an open command does.
    pub(super) fn count(&mut self, command: u64, bytes: u64, zeros: bool) {
        if let Some(Open { done, .. }) = self.open.get_mut(&command) {
            *(if zeros { &mut done.zeroed } else { &mut done.written }) += bytes;
        }
    }

    /// One thing of a command is done; gives back what all of them came to where it was the last.
    fn complete(&mut self, command: u64) -> Option<Done> {
        let open = self.open.get_mut(&command)?;
        open.requests -= 1;
        if open.requests > 0 {
            return None;
        }
        self.open.remove(&command).map(|open| open.done)
    }

    pub(super) fn report(&mut self, frames: u64, Done { cost, written, zeroed }: Done) {
        (self.events)(Event::Written { frames, cost, written, zeroed });
    }

    /// Starts a request of a command, after those that touch the same blocks, and once there is room for it.
    pub(super) fn submit(&mut self, extent: Extent, command: u64, action: Action) -> Result<(), IoError> {
        debug_assert!(extent.end() <= self.size.next_multiple_of(crate::journal::BLOCK));
        self.wait_for_overlaps(extent)?;
        while !self.has_room() {
            self.step()?;
        }
        let tag = self.tag();
        if let Some(open) = self.open.get_mut(&command) {
            open.requests += 1;
        }
        self.in_flight.push(InFlight { tag, extent, command });
        self.storage.submit(Request { tag, place: Place::Disk, action });
        Ok(())
    }

    pub(super) fn wait_for_overlaps(&mut self, extent: Extent) -> Result<(), IoError> {
        while self.in_flight.iter().any(|other| other.extent.overlaps(extent)) {
            self.step()?;
        }
        Ok(())
    }

    fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    /// Waits for something to happen, and reports what completed.
    pub(super) fn step(&mut self) -> Result<(), IoError> {
        let mut completions = std::mem::take(&mut self.completions);
        if self.in_flight.is_empty() && self.begun == 0 {
            self.pulse.rest();
        }
        self.storage.wait(&mut completions)?;
        // Being woken by a command that nothing can be done with yet is not getting on.
        if !completions.is_empty() {
            self.pulse.beat();
        }
        let (mut frames, mut sum) = (0, Done::default());
        for Completion { tag, result, buffer } in completions.drain(..) {
            result?;
            let Some(at) = self.in_flight.iter().position(|request| request.tag == tag) else {
                // Somebody waits for it by its tag.
                self.begun -= 1;
                self.awaited.insert(tag, buffer);
                continue;
            };
            let command = self.in_flight.swap_remove(at).command;
            if let Some(done) = self.complete(command) {
                frames += 1;
                sum.cost += done.cost;
                sum.written += done.written;
                sum.zeroed += done.zeroed;
            }
        }
        self.completions = completions;
        if frames > 0 {
            self.report(frames, sum);
        }
        Ok(())
    }

    pub(super) fn drain(&mut self) -> Result<(), IoError> {
        while !self.in_flight.is_empty() {
            self.step()?;
        }
        Ok(())
    }

    /// Starts a request that belongs to no command; [`await_one`](Self::await_one) waits for it.
    pub(super) fn begin(&mut self, place: Place, action: Action) -> u64 {
        let tag = self.tag();
        self.begun += 1;
        self.storage.submit(Request { tag, place, action });
        tag
    }

    /// Until the request with this tag has completed; what else completes meanwhile is reported as ever.
    pub(super) fn await_one(&mut self, tag: u64) -> Result<Option<Buffer>, IoError> {
        loop {
            if let Some(buffer) = self.awaited.remove(&tag) {
                return Ok(buffer);
            }
            self.step()?;
        }
    }

    /// One request to its end.
    pub(super) fn perform(&mut self, place: Place, action: Action) -> Result<Option<Buffer>, IoError> {
        while !self.has_room() {
            self.step()?;
        }
        let tag = self.begin(place, action);
        self.await_one(tag)
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
            let Some(mut buffer) = self.perform(Place::Disk, read)? else {
                unreachable!("a read gives its buffer back")
            };
            let (from, to) = ((at - blocks.offset()) as usize, (stop - blocks.offset()) as usize);
            match content {
                Some(content) => {
                    let (first, last) = ((at - extent.offset()) as usize, (stop - extent.offset()) as usize);
                    buffer[from..to].copy_from_slice(&content[first..last]);
                }
                None => buffer[from..to].fill(0),
            }
            self.perform(Place::Disk, Action::Write { offset: blocks.offset(), buffer })?;
            at = stop;
        }
        Ok(())
    }
}
