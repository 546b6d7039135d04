//! A pass that saves what it overwrites: see [`crate::journal`] for the order of writes and what a crash leaves.
//!
//! Commands are taken in batches. Of each batch the old content is read and compared, what changes and has no image yet
//! is appended to the journal and flushed, and then the changes are written, without waiting for their end: while they
//! are under way, the next batch is journalled. Its old content is read already while the batch before it is journalled,
//! unless the two have a block in common.

use std::io;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use super::worker::{Done, Stop, Worker};
use super::{Command, Event};
use crate::error::IoError;
use crate::journal::BLOCK;
use crate::journal::writer::{Writer, pieces, record_len};
use crate::storage::{Action, Geometry, Place};
use crate::sys::aligned::{Arena, Buffer};
use crate::units::Extent;

/// How many bytes of the disk one batch covers.
const BATCH: usize = 2 << 20;
/// How many commands one batch has at most: fewer than a record takes images, so that as a rule one record does.
const MOST: usize = 128;
/// The longest command: one data frame, with the blocks that it touches in part.
const LONGEST: usize = (1 << 20) + 2 * BLOCK as usize;
const _: () = assert!(LONGEST <= BATCH);
/// The unit in which long runs of zeros are handled.
const ZEROS: u64 = 256 << 10;
/// How long until it is tried again to get room for the journal.
const RETRY: Duration = Duration::from_millis(250);

/// What a volume's thread keeps for such a pass.
pub(super) struct Delta {
    writer: Writer,
    ended: bool,
    /// The size of the device: blocks end there.
    size: u64,
    /// Old content, of a batch and the next in turns: whatever the sizes, a whole batch has room in one that is empty.
    old: [Arena; 2],
    turn: usize,
    /// One record.
    record: Arena,
    /// New content that is a part of a command, until it is written.
    new: Arena,
}

/// A command, or a part of one, of the batch.
struct Piece {
    extent: Extent,
    /// The blocks that it touches.
    blocks: Extent,
    /// `None` for zeros.
    bytes: Option<Buffer>,
    command: u64,
    /// What the blocks hold; `None` where it need not be known.
    old: Option<Buffer>,
    read: Option<u64>,
    /// What becomes different.
    runs: Vec<Extent>,
}

impl Delta {
    pub(super) fn new(writer: Writer, geometry: Geometry) -> Result<Delta, IoError> {
        let arena = |len| Arena::new(len).map_err(|error| IoError::new("map", "memory", error));
        Ok(Delta {
            writer,
            ended: false,
            size: geometry.size,
            old: [arena(BATCH)?, arena(BATCH)?],
            turn: 0,
            record: arena(record_len(BATCH))?,
            new: arena(BATCH)?,
        })
    }

    fn piece(&self, extent: Extent, bytes: Option<Buffer>, command: u64) -> Piece {
        let blocks = extent
            .widened(BLOCK)
            .and_then(|blocks| Extent::new(blocks.offset(), blocks.end().min(self.size) - blocks.offset()));
        let Some(blocks) = blocks else {
            unreachable!("the handle has checked that it lies inside the volume")
        };
        Piece { extent, blocks, bytes, command, old: None, read: None, runs: Vec::new() }
    }
}

impl Piece {
    /// The blocks' new content from `run` on, given what they hold.
    fn fill(&self, run: Extent, into: &mut [u8]) {
        if let Some(old) = &self.old {
            into.copy_from_slice(part(old, self.blocks, run));
        }
        let (from, to) = (run.offset().max(self.extent.offset()), run.end().min(self.extent.end()));
        if from >= to {
            return;
        }
        let target = &mut into[(from - run.offset()) as usize..(to - run.offset()) as usize];
        match &self.bytes {
            Some(bytes) => {
                let skip = (from - self.extent.offset()) as usize;
                target.copy_from_slice(&bytes[skip..skip + target.len()]);
            }
            None => target.fill(0),
        }
    }

    /// Whether this block would be changed.
    fn changes(&self, block: Extent) -> bool {
        let Some(old) = &self.old else { return true };
        let old = part(old, self.blocks, block);
        let inside = self.extent.offset() <= block.offset() && block.end() <= self.extent.end();
        match &self.bytes {
            Some(bytes) if inside => *old != *part(bytes, self.extent, block),
            None if inside => old.iter().any(|byte| *byte != 0),
            _ => {
                let mut new = [0; BLOCK as usize];
                let new = &mut new[..old.len()];
                self.fill(block, new);
                *old != *new
            }
        }
    }
}

/// The bytes of `run`, out of those of `whole`.
fn part(bytes: &[u8], whole: Extent, run: Extent) -> &[u8] {
    let skip = (run.offset() - whole.offset()) as usize;
    &bytes[skip..skip + run.len() as usize]
}

impl Worker {
    pub(super) fn start_saved(&mut self, delta: &mut Delta, command: Command) -> Result<(), Stop> {
        if delta.ended {
            return Err(
                IoError::new("go on with", "a pass that has ended", io::ErrorKind::InvalidInput).into()
            );
        }
        match command {
            Command::Write { offset, buffer, cost } => {
                let mut batch = Vec::new();
                self.take(delta, offset, buffer, cost, &mut batch);
                self.gather(delta, &[], &mut batch);
                self.begin_reads(delta, &mut batch)?;
                while !batch.is_empty() {
                    self.end_reads(&mut batch)?;
                    let mut next = Vec::new();
                    self.gather(delta, &batch, &mut next);
                    self.begin_reads(delta, &mut next)?;
                    self.replace(delta, batch)?;
                    batch = next;
                }
                Ok(())
            }
            Command::Zero { extent, cost } => {
                let command = self.open(Done { cost, written: 0, zeroed: 0 });
                let mut rest = pieces_at(extent, ZEROS).peekable();
                while rest.peek().is_some() {
                    let some = rest.by_ref().take(BATCH / ZEROS as usize);
                    let mut batch = some.map(|extent| delta.piece(extent, None, command)).collect::<Vec<_>>();
                    self.begin_reads(delta, &mut batch)?;
                    self.end_reads(&mut batch)?;
                    self.replace(delta, batch)?;
                }
                self.close(command);
                Ok(())
            }
            Command::Flush => {
                self.flush_disk()?;
                self.make_room(delta, BLOCK)?;
                let mut buffer = delta.record.alloc_blocking(BLOCK as usize);
                delta.writer.compose_end(&mut buffer);
                let offset = delta.writer.place();
                self.perform(Place::Segment, Action::Write { offset, buffer })?;
                self.perform(Place::Segment, Action::Flush)?;
                delta.ended = true;
                delta.writer.appended(BLOCK, &[]);
                (self.events)(Event::Flushed { saved: delta.writer.bytes() });
                Ok(())
            }
            Command::Save(_) => unreachable!("a session carries one pass"),
        }
    }

    fn take(&mut self, delta: &Delta, offset: u64, buffer: Buffer, cost: u64, batch: &mut Vec<Piece>) {
        let Some(extent) = Extent::new(offset, buffer.len() as u64) else { return };
        let command = self.open(Done { cost, written: 0, zeroed: 0 });
        batch.push(delta.piece(extent, Some(buffer), command));
    }

    /// Takes the writes that wait into a batch, as many as it holds.
    fn gather(&mut self, delta: &Delta, before: &[Piece], batch: &mut Vec<Piece>) {
        let mut bytes: u64 = batch.iter().map(|piece| piece.blocks.len()).sum();
        while batch.len() < MOST {
            if self.waiting.is_empty() {
                self.waiting.extend(self.queue.try_iter());
            }
            let Some(Command::Write { offset, buffer, .. }) = self.waiting.front() else { break };
            let Some(extent) = Extent::new(*offset, buffer.len() as u64) else { break };
            let next = delta.piece(extent, None, 0).blocks;
            // What shares a block with an earlier one must find what that one wrote.
            let shares = before.iter().chain(&*batch).any(|piece| piece.blocks.overlaps(next));
            bytes += next.len();
            if shares || (bytes > BATCH as u64 && !batch.is_empty()) {
                break;
            }
            let Some(Command::Write { offset, buffer, cost }) = self.waiting.pop_front() else { break };
            self.take(delta, offset, buffer, cost, batch);
        }
    }

    /// Saves what the pieces change, and starts to change it.
    fn replace(&mut self, delta: &mut Delta, mut batch: Vec<Piece>) -> Result<(), Stop> {
        for piece in &mut batch {
            piece.runs = changed_runs(piece);
        }
        self.save(delta, &batch)?;
        for piece in batch {
            let (command, is_write) = (piece.command, piece.bytes.is_some());
            self.write_new(delta, piece)?;
            // One piece a write; the pieces of zeros are closed together.
            if is_write {
                self.close(command);
            }
        }
        Ok(())
    }

    /// Starts to read what the pieces may overwrite.
    fn begin_reads(&mut self, delta: &mut Delta, batch: &mut [Piece]) -> Result<(), IoError> {
        delta.turn = 1 - delta.turn;
        for piece in batch {
            // What has its image, and is replaced whole, need not be known.
            if piece.extent == piece.blocks && delta.writer.has_all(piece.blocks) {
                continue;
            }
            self.wait_for_overlaps(piece.blocks)?;
            while !self.has_room() {
                self.step()?;
            }
            let buffer = delta.old[delta.turn].alloc_blocking(piece.blocks.len() as usize);
            let read = Action::Read { offset: piece.blocks.offset(), buffer };
            piece.read = Some(self.begin(Place::Disk, read));
        }
        Ok(())
    }

    fn end_reads(&mut self, batch: &mut [Piece]) -> Result<(), IoError> {
        for piece in batch {
            if let Some(tag) = piece.read.take() {
                piece.old = self.await_one(tag)?;
            }
        }
        Ok(())
    }

    /// Appends the images that are missing, and makes them durable.
    fn save(&mut self, delta: &mut Delta, batch: &[Piece]) -> Result<(), Stop> {
        let mut images: Vec<(Extent, &[u8])> = Vec::new();
        for piece in batch {
            let Some(old) = &piece.old else { continue };
            for run in &piece.runs {
                let missing = delta.writer.missing(*run).into_iter();
                images.extend(missing.map(|extent| (extent, part(old, piece.blocks, extent))));
            }
        }
        let mut rest = images.as_slice();
        while !rest.is_empty() {
            let payload: usize =
                rest.iter().map(|(_, bytes)| bytes.len().next_multiple_of(BLOCK as usize)).sum();
            let longest = record_len(payload.min(BATCH));
            self.make_room(delta, longest as u64)?;
            let mut buffer = delta.record.alloc_blocking(longest);
            let (taken, len) = delta.writer.compose(rest, &mut buffer);
            buffer.set_len(len);
            let offset = delta.writer.place();
            self.perform(Place::Segment, Action::Write { offset, buffer })?;
            // Durable before anything of it is overwritten. Two records of one batch share nothing, so each has its own
            // flush only because a torn one must be the last of its segment.
            self.perform(Place::Segment, Action::Flush)?;
            let (saved, later) = rest.split_at(taken);
            delta.writer.appended(len as u64, saved);
            rest = later;
        }
        Ok(())
    }

    /// Sees to it that the open segment takes a record of `len` bytes. Where the file system has no room, it waits, and
    /// says so.
    fn make_room(&mut self, delta: &mut Delta, len: u64) -> Result<(), Stop> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| IoError::new("draw", "random bits", error))?;
        let generation = u64::from_ne_bytes(random);
        let Some(segment) = delta.writer.segment_for(len, generation) else { return Ok(()) };
        let mut paused = false;
        loop {
            match self.storage.create_segment(&segment.name, segment.len, &segment.header) {
                Ok(()) => break,
                Err(error) if out_of_space(&error) => {
                    if !paused {
                        self.drain()?;
                        (self.events)(Event::Paused);
                        paused = true;
                    }
                    match self.queue.recv_timeout(RETRY) {
                        Ok(command) => self.waiting.push_back(command),
                        Err(RecvTimeoutError::Timeout) => {}
                        Err(RecvTimeoutError::Disconnected) => return Err(Stop::Closed),
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        if paused {
            (self.events)(Event::Resumed);
        }
        // Its header is durable before its first record: a sound record behind one that is not is damage, and no crash.
        delta.writer.created(&segment, generation);
        Ok(())
    }

    /// Starts the writing of what the piece changes.
    fn write_new(&mut self, delta: &Delta, mut piece: Piece) -> Result<(), IoError> {
        for run in std::mem::take(&mut piece.runs) {
            let zeros = piece.bytes.is_none()
                && piece.extent.offset() <= run.offset()
                && run.end() <= piece.extent.end();
            self.count(piece.command, run.len(), zeros);
            let action = if zeros {
                Action::Zero(run)
            } else {
                let buffer = match &mut piece.bytes {
                    // All of the command: its own buffer goes.
                    bytes if run == piece.extent && bytes.is_some() => bytes.take(),
                    _ => {
                        let mut buffer = loop {
                            match delta.new.try_alloc(run.len() as usize) {
                                Some(buffer) => break buffer,
                                // It is held by writes under way.
                                None => self.step()?,
                            }
                        };
                        piece.fill(run, &mut buffer);
                        Some(buffer)
                    }
                };
                let Some(buffer) = buffer else { unreachable!("one of the two gave it") };
                Action::Write { offset: run.offset(), buffer }
            };
            self.submit(run, piece.command, action)?;
        }
        Ok(())
    }
}

/// The runs of blocks that a piece changes.
fn changed_runs(piece: &Piece) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    for block in pieces(piece.blocks, BLOCK).filter(|block| piece.changes(*block)) {
        match runs.last_mut() {
            Some(run) if run.end() == block.offset() => {
                if let Some(longer) = Extent::new(run.offset(), run.len() + block.len()) {
                    *run = longer;
                }
            }
            _ => runs.push(block),
        }
    }
    runs
}

/// The range in parts that end at multiples of `unit`.
fn pieces_at(extent: Extent, unit: u64) -> impl Iterator<Item = Extent> {
    let mut at = extent.offset();
    std::iter::from_fn(move || {
        let end = extent.end().min((at + 1).next_multiple_of(unit));
        let piece = Extent::new(at, end.checked_sub(at)?)?;
        at = end;
        Some(piece)
    })
}

fn out_of_space(error: &IoError) -> bool {
    matches!(error.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
