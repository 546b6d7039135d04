//! Reading a device in order, several requests at a time.

use std::collections::VecDeque;

use super::{Action, Completion, Place, Request, Storage};
use crate::error::IoError;
use crate::sys::aligned::{Arena, Buffer};
use crate::units::Extent;

/// How much is read by one request.
pub const CHUNK: u64 = 1 << 20;

/// Reads ranges of a device ahead of whoever takes them.
pub struct Ahead {
    device: Box<dyn Storage>,
    arena: Arena,
    /// The oldest first; the tag of each read is its offset.
    window: VecDeque<(u64, Slot)>,
    next: u64,
    end: u64,
    completions: Vec<Completion>,
}

enum Slot {
    Reading,
    Read(Buffer),
    Hole(Extent),
}

/// The next of what was asked for.
#[derive(Debug)]
pub enum Part {
    /// What was read.
    Bytes(Buffer),
    /// Zeros that were not read.
    Hole(Extent),
}

impl Part {
    /// How many bytes of the device it stands for; never 0.
    // There is no `is_empty`: a part never is.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        match self {
            Part::Bytes(buffer) => buffer.len() as u64,
            Part::Hole(hole) => hole.len(),
        }
    }
}

impl Ahead {
    /// A queue over `device`, whose buffers are those of `arena`. Nothing is read before [`seek`](Self::seek).
    pub fn new(device: Box<dyn Storage>, arena: Arena) -> Ahead {
        Ahead { device, arena, window: VecDeque::new(), next: 0, end: 0, completions: Vec::new() }
    }

    /// From here on, [`next`](Self::next) gives the bytes from `start` to `end`, both multiples of the device's block.
    /// Only to be called where the range before was taken to its end.
    pub fn seek(&mut self, start: u64, end: u64) {
        debug_assert!(self.window.is_empty());
        (self.next, self.end) = (start, end);
    }

    /// The next part and its offset, or `None` at the end of the range: a chunk, less than that at the end or before a
    /// hole. `hole` tells the hole that begins at an offset, or the next one if it is known; of it, so much is passed over
    /// that reading goes on at a multiple of `unit`, and one that is not next begins at one.
    ///
    /// Waits for memory where nothing is under way: whoever holds parts must be giving some back.
    pub fn next(
        &mut self,
        unit: u64,
        mut hole: impl FnMut(u64) -> Option<Extent>,
    ) -> Result<Option<(u64, Part)>, IoError> {
        loop {
            while self.next < self.end && self.window.len() < self.device.depth() {
                let mut len = (self.end - self.next).min(CHUNK);
                if let Some(found) = hole(self.next) {
                    let stop = found.end().min(self.end);
                    // What is left of its last unit is read with the data that follows, and that of its first with that before.
                    let stop = stop - stop % unit;
                    let start = match found.offset() <= self.next {
                        true => self.next,
                        false => found.offset().next_multiple_of(unit),
                    };
                    match stop.checked_sub(start).and_then(|len| Extent::new(start, len)) {
                        Some(passed) if start == self.next => {
                            self.window.push_back((self.next, Slot::Hole(passed)));
                            self.next = stop;
                            continue;
                        }
                        Some(passed) => len = len.min(passed.offset() - self.next),
                        None => {}
                    }
                }
                let len = len as usize;
                // Waits for memory only where nothing is under way that would have to be looked after.
                let buffer = match self.window.is_empty() {
                    true => self.arena.alloc_blocking(len),
                    false => match self.arena.try_alloc(len) {
                        Some(buffer) => buffer,
                        None => break,
                    },
                };
                self.submit(self.next, self.next, buffer);
                self.window.push_back((self.next, Slot::Reading));
                self.next += len as u64;
            }
            match self.window.pop_front() {
                None => return Ok(None),
                Some((at, Slot::Read(buffer))) => return Ok(Some((at, Part::Bytes(buffer)))),
                Some((at, Slot::Hole(hole))) => return Ok(Some((at, Part::Hole(hole)))),
                Some((at, Slot::Reading)) => {
                    self.window.push_front((at, Slot::Reading));
                    self.wait(None)?;
                }
            }
        }
    }

    /// Reads one range out of order, at once. Multiples of the device's block, a chunk at most.
    pub fn read(&mut self, offset: u64, buffer: Buffer) -> Result<Buffer, IoError> {
        // No chunk has this tag: offsets are below the end of a device.
        const OUT_OF_ORDER: u64 = u64::MAX;
        while self.window.iter().filter(|(_, slot)| matches!(slot, Slot::Reading)).count()
            >= self.device.depth()
        {
            self.wait(None)?;
        }
        self.submit(OUT_OF_ORDER, offset, buffer);
        loop {
            if let Some(buffer) = self.wait(Some(OUT_OF_ORDER))? {
                return Ok(buffer);
            }
        }
    }

    fn submit(&mut self, tag: u64, offset: u64, buffer: Buffer) {
        self.device.submit(Request { tag, place: Place::Disk, action: Action::Read { offset, buffer } });
    }

    /// Waits until something was read; gives back the buffer of `wanted` if that was among it.
    fn wait(&mut self, wanted: Option<u64>) -> Result<Option<Buffer>, IoError> {
        self.device.wait(&mut self.completions)?;
        let mut found = None;
        for Completion { tag, buffer, result } in self.completions.drain(..) {
            result?;
            if Some(tag) == wanted {
                found = buffer;
            } else if let (Some((_, slot)), Some(buffer)) =
                (self.window.iter_mut().find(|(at, _)| *at == tag), buffer)
            {
                *slot = Slot::Read(buffer);
            }
        }
        Ok(found)
    }
}
