//! The way of frames into the volume, whichever of the pass's connections they come over.
//!
//! Data and Zero are taken as they come, in any order: no two of them touch the same bytes, and so the volume may have them
//! in any. What is received side by side is bounded by the window, as it is over one connection.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncRead;
use tokio::sync::{mpsc, watch};

use super::coverage::Coverage;
use super::digester::Comparing;
use super::numbers::Numbers;
use super::receiving::protocol;
use super::report::{Report, patiently};
use super::{Error, out_of_range};
use crate::net::compress;
use crate::net::frame::{Encoding, Header, Kind};
use crate::net::message::{self, Code, PassKind};
use crate::net::wire;
use crate::pass::PassId;
use crate::sys::aligned::Buffer;
use crate::units::Extent;
use crate::volume::Volume;
use crate::volume::counters::Counters;

/// How many frames of a pass may arrive damaged: more are no accident, and each leaves a line in the log.
const MOST_DAMAGED: u32 = 64;

/// What the connections of a pass have in common.
pub(super) struct Intake {
    pub(super) volume: Volume,
    pub(super) counters: Arc<Counters>,
    pub(super) report: Arc<Report>,
    pub(super) window: u64,
    /// How payloads may be encoded, besides raw.
    pub(super) encodings: Vec<Encoding>,
    /// How long silence is borne.
    pub(super) idle: Duration,
    pub(super) pass: Mutex<Option<Pass>>,
    pub(super) comparing: Mutex<Comparing>,
    /// Something about the pass changed.
    pub(super) moved: watch::Sender<()>,
    /// Why another connection than the first ended, where that ends the session.
    pub(super) lost: mpsc::Sender<Error>,
    /// The session is over.
    pub(super) over: watch::Sender<bool>,
}

/// The pass that is being received.
pub(super) struct Pass {
    pub(super) id: PassId,
    pub(super) kind: PassKind,
    /// Until its commit.
    pub(super) open: bool,
    pub(super) numbers: Numbers,
    /// How many of its frames have come in part.
    arriving: u32,
    /// What its frames cost of the window, all together.
    cost: u64,
    /// Bytes of the volume that were accepted.
    pub(super) written: u64,
    pub(super) zeroed: u64,
    /// Bytes of the frames that came or are coming, and were not refused.
    accepted: u64,
    damaged: u32,
    pub(super) coverage: Coverage,
    /// Up to where all is dealt with, once all frames before a number have come: what waits for them.
    covered: VecDeque<(u64, u64)>,
}

/// How much of that is remembered; more is taken together.
const MOST_COVERED: usize = 256;

impl Pass {
    /// One that begins, over several connections or one.
    pub(super) fn new(id: PassId, kind: PassKind, several: bool) -> Pass {
        Pass {
            id,
            kind,
            open: true,
            numbers: Numbers::new(several),
            arriving: 0,
            cost: 0,
            written: 0,
            zeroed: 0,
            accepted: 0,
            damaged: 0,
            coverage: Coverage::default(),
            covered: VecDeque::new(),
        }
    }

    /// Whether all frames before this number are here, whole.
    pub(super) fn has_all(&self, before: u64) -> bool {
        self.numbers.reach(before) && self.arriving == 0
    }

    /// Whether no frame is here, in part or whole, that comes after the first which has not come.
    pub(super) fn is_complete(&self) -> bool {
        self.numbers.none_early() && self.arriving == 0
    }
}

impl Intake {
    /// The pass, once it has begun.
    pub(super) fn pass(&self) -> MutexGuard<'_, Option<Pass>> {
        // What can panic while the lock is held is a defect that ends the session.
        self.pass.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How source and volume are compared.
    pub(super) fn comparing(&self) -> MutexGuard<'_, Comparing> {
        self.comparing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the pass has come so far.
    pub(super) async fn until(&self, so_far: impl Fn(&Pass) -> bool) -> Result<(), Error> {
        let mut moved = self.moved.subscribe();
        let reached = async {
            while self.pass().as_ref().is_some_and(|pass| !so_far(pass)) {
                // It lives as long as this does.
                moved.changed().await.ok();
            }
            Ok(())
        };
        patiently(&self.report, self.idle, reached).await
    }

    /// Whether frames may come.
    pub(super) fn is_open(&self) -> bool {
        self.pass().as_ref().is_some_and(|pass| pass.open)
    }

    /// Whether frames came, and no more will.
    pub(super) fn is_done(&self) -> bool {
        self.pass().as_ref().is_some_and(|pass| !pass.open)
    }

    /// Another connection than the first ended, which ends the session.
    pub(super) fn lose(&self, why: Option<message::Error>) {
        // Of several the first is enough.
        self.lost.try_send(Error::Lane(why)).ok();
    }

    /// The session is over.
    pub(super) fn end(&self) {
        self.over.send_replace(true);
    }

    /// Waits for that.
    pub(super) async fn ended(&self) {
        // Its sender lives as long as this does.
        self.over.subscribe().wait_for(|over| *over).await.ok();
    }

    /// The client is through with the first `bytes` of its source, of `size`: once the first `frames` frames have come, which
    /// may be under way on other connections.
    pub(super) fn covered(&self, frames: u64, bytes: u64, size: u64) -> Result<(), Error> {
        let mut pass = self.pass();
        let Some(pass) = pass.as_mut() else {
            return Err(protocol("a Covered frame outside of a pass"));
        };
        let before = pass.covered.back().map_or(pass.coverage.below(), |(_, bytes)| *bytes);
        if bytes < before || bytes > size {
            return Err(protocol(format!("{bytes} bytes are covered, after {before}, of {size}")));
        }
        if pass.covered.len() >= MOST_COVERED {
            pass.covered.pop_back();
        }
        pass.covered.push_back((frames, bytes));
        self.pass_over(pass);
        Ok(())
    }

    /// Passes over what is covered by now.
    fn pass_over(&self, pass: &mut Pass) {
        while let Some((_, bytes)) =
            pass.covered.front().copied().filter(|(frames, _)| pass.numbers.reach(*frames))
        {
            pass.covered.pop_front();
            pass.coverage.pass(bytes);
            // What came is before it, but for what was sent again, or comes early.
            let same = bytes.saturating_sub(pass.accepted);
            self.counters.same_bytes.store(same, Ordering::Relaxed);
            if let Comparing::Running(digester) = &*self.comparing() {
                digester.covered(bytes);
            }
        }
    }

    /// Takes a data or zero frame. `packed` is memory for a compressed payload, at most one data frame long.
    pub(super) async fn take<R: AsyncRead + Unpin>(
        &self,
        reader: &mut R,
        header: &Header,
        packed: &mut Vec<u8>,
    ) -> Result<(), Error> {
        // Before anything is taken for it: those that it waits for find room.
        self.until(|pass| !pass.numbers.must_wait(header.sequence)).await?;
        let extent = self.accept(header)?;
        let cost = header.window_cost();
        if header.kind == Kind::Zero {
            self.report.take(cost);
            self.volume.zero(extent, cost).map_err(out_of_range)?;
            return self.arrived(header, extent, true);
        }
        // This is where a slow disk slows its sender down, for as long as it takes: the window is the arena, so the wait is
        // for a gap that is large enough. At most one data frame long. Whoever has a part of the arena waits for nobody but
        // its own peer and the disk.
        let buffer = self.volume.arena().alloc(extent.len() as usize).await;
        let payload = self.payload(reader, header, packed, buffer);
        match patiently(&self.report, self.idle, payload).await? {
            Some(buffer) => {
                self.report.take(cost);
                self.volume.write(extent.offset(), buffer, cost).map_err(out_of_range)?;
                self.arrived(header, extent, true)
            }
            None => self.arrived(header, extent, false),
        }
    }

    /// Checks a data or zero frame against the pass, the window and the volume, before anything is allocated.
    fn accept(&self, header: &Header) -> Result<Extent, Error> {
        let mut pass = self.pass();
        let Some(pass) = pass.as_mut().filter(|pass| pass.open) else {
            return Err(protocol("data outside of a pass"));
        };
        pass.numbers.check(header.sequence)?;
        if header.encoding != Encoding::Raw && !self.encodings.contains(&header.encoding) {
            return Err(protocol(format!(
                "a payload in {}, which was not agreed on",
                header.encoding.name()
            )));
        }
        let outstanding = pass.cost + header.window_cost() - self.report.returned();
        if outstanding > self.window {
            let text = format!("{outstanding} bytes are under way, and the window is {}", self.window);
            return Err(protocol(text));
        }
        let Some(extent) = Extent::new(header.offset, header.length) else {
            return Err(protocol("an empty range"));
        };
        self.volume.check(extent).map_err(out_of_range)?;
        if pass.coverage.overlaps(extent) {
            return Err(protocol(format!("{extent} were sent before in this pass")));
        }
        pass.coverage.add(extent)?;
        pass.numbers.add(header.sequence);
        pass.arriving += 1;
        pass.accepted += extent.len();
        pass.cost += header.window_cost();
        self.pass_over(pass);
        self.counters.frames.fetch_add(1, Ordering::Relaxed);
        self.counters.received_bytes.fetch_add(extent.len(), Ordering::Relaxed);
        self.counters.wire_bytes.fetch_add(u64::from(header.payload_len), Ordering::Relaxed);
        self.moved.send_replace(());
        Ok(extent)
    }

    /// Receives a payload; `None` where its checksum did not hold.
    async fn payload<R: AsyncRead + Unpin>(
        &self,
        reader: &mut R,
        header: &Header,
        packed: &mut Vec<u8>,
        mut buffer: Buffer,
    ) -> Result<Option<Buffer>, wire::Error> {
        let raw = header.encoding == Encoding::Raw;
        let read = if raw {
            wire::read_payload(reader, header, &mut buffer).await
        } else {
            packed.resize(header.payload_len as usize, 0);
            wire::read_payload(reader, header, packed).await
        };
        match read {
            Err(wire::Error::PayloadChecksum { .. }) => return Ok(None),
            other => other?,
        }
        if !raw {
            compress::unpack(header.encoding, packed, &mut buffer)
                .map_err(|source| wire::Error::Compression { sequence: header.sequence, source })?;
        }
        Ok(Some(buffer))
    }

    /// An accepted frame has come to its end, and is the volume's; or it was damaged.
    fn arrived(&self, header: &Header, extent: Extent, sound: bool) -> Result<(), Error> {
        let mut pass = self.pass();
        let Some(pass) = pass.as_mut() else {
            unreachable!("it was accepted in a pass");
        };
        pass.arriving -= 1;
        self.moved.send_replace(());
        if sound {
            *if header.kind == Kind::Zero { &mut pass.zeroed } else { &mut pass.written } += extent.len();
            return Ok(());
        }
        self.counters.refused_frames.fetch_add(1, Ordering::Relaxed);
        self.counters.received_bytes.fetch_sub(extent.len(), Ordering::Relaxed);
        tracing::warn!(frame = header.sequence, %extent, "refused a payload whose checksum does not hold");
        pass.accepted -= extent.len();
        pass.coverage.refuse(extent);
        pass.damaged += 1;
        if pass.damaged > MOST_DAMAGED {
            let text = format!("over {MOST_DAMAGED} frames of the pass arrived damaged: it is given up");
            return Err(message::Error::new(Code::BadChecksum, text).into());
        }
        self.report.refuse(header);
        Ok(())
    }
}
