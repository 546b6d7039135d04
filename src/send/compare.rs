//! Finding what differs from what the receiver has, by digests: units first, and the blocks of those that differ.
//!
//! The reading thread goes through its source in order, and so do the digests that come. A chunk with units that differ
//! waits until their blocks' digests have come; the next ones are read and compared meanwhile, so that the way to the
//! receiver and back costs time only where nearly everything differs. What is dealt with is told in order.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::source::{Ask, Differing, Output, Reader, Stop};
use crate::digest::{self, Digest};
use crate::storage::ahead::Part;
use crate::sys::aligned::Buffer;
use crate::units::Extent;

/// How many chunks wait for the digests of their blocks, or for those before them. They hold a part of the reader's
/// memory, which must leave room for reading on.
const PENDING: usize = 8;

/// How long a run of zeros is looked at as one.
const LONGEST_HOLE: u64 = 16 << 20;

// All that waits together is less than what the receiver sends ahead: its next digests never wait for what waits for
// them.
const _: () = assert!(PENDING as u64 * LONGEST_HOLE + TELL < super::AHEAD);

/// How often the receiver is told how far the comparing is, in bytes of the source.
const TELL: u64 = 4 << 20;

/// How often while nothing may be read: the shortest `idle_timeout` is a second.
const SIGN: Duration = Duration::from_millis(500);

/// What comes from the connection.
pub(super) struct Asks {
    asks: Receiver<Ask>,
    /// The receiver's digests that were not looked at yet.
    units: VecDeque<Digest>,
    /// The same of the blocks of ranges that were asked for.
    blocks: VecDeque<Vec<Digest>>,
    /// What was asked for meanwhile.
    later: VecDeque<Extent>,
}

impl Asks {
    pub(super) fn new(asks: Receiver<Ask>) -> Asks {
        Asks { asks, units: VecDeque::new(), blocks: VecDeque::new(), later: VecDeque::new() }
    }

    /// The next that was asked for, or `None` where nobody asks any more.
    pub(super) fn next(&mut self) -> Option<Ask> {
        self.later.pop_front().map(Ask::Send).or_else(|| self.asks.recv().ok())
    }

    /// Waits for one thing more.
    fn receive(&mut self) -> Result<(), Stop> {
        match self.asks.recv().map_err(|_| Stop::NobodyListens)? {
            Ask::Send(extent) => self.later.push_back(extent),
            Ask::Units(digests) => self.units.extend(digests),
            Ask::Blocks(digests) => self.blocks.push_back(digests),
            Ask::Compare(_) | Ask::Ranges(_) => unreachable!("a connection carries one pass"),
        }
        Ok(())
    }

    fn unit(&mut self) -> Result<Digest, Stop> {
        loop {
            if let Some(digest) = self.units.pop_front() {
                return Ok(digest);
            }
            self.receive()?;
        }
    }

    fn blocks(&mut self) -> Result<Vec<Digest>, Stop> {
        loop {
            if let Some(digests) = self.blocks.pop_front() {
                return Ok(digests);
            }
            self.receive()?;
        }
    }
}

/// A part of the source that was compared.
struct Chunk {
    at: u64,
    len: usize,
    /// Without bytes it is a hole.
    bytes: Option<Arc<Buffer>>,
    /// What differs for certain.
    differs: Vec<Range<usize>>,
    /// What holds more that does, to be told by its blocks.
    refine: Option<Range<usize>>,
}

impl Reader {
    /// Finds what of the source the receiver does not have.
    pub(super) fn compare(&mut self, asks: &mut Asks, differing: &Differing) -> Result<(), Stop> {
        let whole = self.scan.source.extent();
        let mut walk = self.scan.walk(whole, digest::UNIT.into());
        let mut pending: VecDeque<Chunk> = VecDeque::new();
        let (mut told, mut ended) = (0, false);
        // A hole that is longer than one is looked at.
        let mut hole: Option<Extent> = None;
        loop {
            while pending.front().is_some_and(|chunk| chunk.refine.is_none()) {
                let Some(chunk) = pending.pop_front() else { break };
                let end = chunk.at + chunk.len as u64;
                self.settle(chunk, differing)?;
                if end - told >= TELL || end == whole.end() {
                    self.covered(end)?;
                    told = end;
                }
            }
            if ended && pending.is_empty() {
                return Ok(());
            }
            if ended || pending.len() >= PENDING {
                let digests = asks.blocks()?;
                if let Some(chunk) = pending.iter_mut().find(|chunk| chunk.refine.is_some()) {
                    refine(chunk, &digests);
                }
                continue;
            }
            let part = match hole.take() {
                Some(hole) => Some((hole.offset(), Part::Hole(hole))),
                None => self.scan.next(&mut walk)?,
            };
            let (at, len, bytes) = match part {
                None => {
                    ended = true;
                    continue;
                }
                Some((at, Part::Bytes(buffer))) => (at, buffer.len(), Some(Arc::new(buffer))),
                Some((at, Part::Hole(found))) => {
                    let len = found.len().min(LONGEST_HOLE);
                    hole = Extent::new(at + len, found.len() - len);
                    (at, len as usize, None)
                }
            };
            // A hole, too: it is not read here, but on the other side.
            self.pay(len as u64, told)?;
            let chunk = Chunk { at, len, bytes, differs: Vec::new(), refine: None };
            let chunk = self.look(chunk, asks, differing)?;
            pending.push_back(chunk);
        }
    }

    /// Waits until so much may have been read, and says meanwhile how far all is dealt with: the other side would take the
    /// wait for silence.
    fn pay(&mut self, len: u64, told: u64) -> Result<(), Stop> {
        let mut wait = self.limiter.as_ref().map_or(Duration::ZERO, |limiter| limiter.take(len));
        while let Some(rest) = wait.checked_sub(SIGN) {
            std::thread::sleep(SIGN);
            self.covered(told)?;
            wait = rest;
        }
        std::thread::sleep(wait);
        Ok(())
    }

    /// Compares the chunk's units, and asks for the digests of the blocks of those that differ.
    fn look(&self, mut chunk: Chunk, asks: &mut Asks, differing: &Differing) -> Result<Chunk, Stop> {
        let unit = digest::UNIT as usize;
        let units = (0..chunk.len).step_by(unit).map(|from| from..chunk.len.min(from + unit));
        let ours: Box<dyn Iterator<Item = Digest>> = match &chunk.bytes {
            Some(bytes) => Box::new(digest::of(bytes, digest::UNIT)),
            None => Box::new(digest::of_zeros(chunk.len as u64, digest::UNIT)),
        };
        for (range, ours) in units.zip(ours) {
            let theirs = asks.unit()?;
            if let Differing::Sent { up_to } = differing
                && chunk.at + range.end as u64 > *up_to
            {
                chunk.differs.push(range);
                continue;
            }
            if theirs == ours {
                continue;
            }
            match &chunk.bytes {
                // Zeros cost nothing to send; but where differences are told, those in free space are not.
                Some(bytes)
                    if !matches!(differing, Differing::Sent { .. })
                        || !digest::is_zero(&bytes[range.clone()]) =>
                {
                    let from = chunk.refine.map_or(range.start, |refine| refine.start);
                    chunk.refine = Some(from..range.end);
                }
                _ => chunk.differs.push(range),
            }
        }
        if let Some(range) = &chunk.refine
            && let Some(extent) = Extent::new(chunk.at + range.start as u64, range.len() as u64)
        {
            self.output.blocking_send(Output::Refine(extent)).map_err(|_| Stop::NobodyListens)?;
        }
        Ok(chunk)
    }

    /// Hands over what differs.
    fn settle(&mut self, mut chunk: Chunk, differing: &Differing) -> Result<(), Stop> {
        chunk.differs.sort_by_key(|range| range.start);
        chunk.differs.dedup_by(|next, range| {
            let joins = next.start <= range.end;
            if joins {
                range.end = range.end.max(next.end);
            }
            joins
        });
        let differs: usize = chunk.differs.iter().map(Range::len).sum();
        let same = (chunk.len - differs) as u64;
        self.progress.same.fetch_add(same, Ordering::Relaxed);
        self.progress.done.fetch_add(same, Ordering::Relaxed);
        for range in chunk.differs {
            let Some(extent) = Extent::new(chunk.at + range.start as u64, range.len() as u64) else {
                continue;
            };
            let told = match differing {
                Differing::Sent { .. } => Vec::new(),
                Differing::Checked(hints) => hints.missed(extent),
                Differing::Told => vec![extent],
            };
            // What is free may be anything on the other side: passes that only looked at hints leave there what was.
            for extent in told.into_iter().flat_map(|extent| self.scan.free.outside(extent)) {
                self.output.blocking_send(Output::Differs(extent)).map_err(|_| Stop::NobodyListens)?;
            }
            match &chunk.bytes {
                _ if matches!(differing, Differing::Told) => {
                    self.progress.done.fetch_add(extent.len(), Ordering::Relaxed);
                }
                Some(bytes) => {
                    self.pass_on(|encoder, pieces| encoder.chunk(chunk.at, bytes, range, pieces))?;
                }
                None => self.pass_on(|encoder, pieces| encoder.hole(extent, pieces))?,
            }
        }
        Ok(())
    }
}

/// Finds the blocks that differ in what was to be refined.
fn refine(chunk: &mut Chunk, theirs: &[Digest]) {
    let (Some(range), Some(bytes)) = (chunk.refine.take(), &chunk.bytes) else { return };
    let block = digest::FINE as usize;
    let blocks = range.clone().step_by(block).map(|from| from..range.end.min(from + block));
    let ours = digest::of(&bytes[range.clone()], digest::FINE);
    let differing = blocks.zip(ours.zip(theirs)).filter(|(_, (ours, theirs))| ours != *theirs);
    chunk.differs.extend(differing.map(|(block, _)| block));
}
