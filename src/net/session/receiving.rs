//! The receiving of a pass: what is accepted, what the volume's thread reports, and the commit.

use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, Notify, mpsc, oneshot, watch};
use tokio::time::timeout;

use super::coverage::Coverage;
use super::digester::{self, Comparing, Digester, send_digests, unreadable};
use super::stage::{Stage, reached};
use super::{Begun, CLOSING, Error, Passes, Patience, off_runtime, within};
use crate::error::IoError;
use crate::net::compress;
use crate::net::frame::{COST_UNIT, DIGEST_UNITS, Encoding, Header, Kind};
use crate::net::message::{self, Begin, BeginReply, Code, Commit, Committed, Notice, OpenReply, PassKind};
use crate::net::wire;
use crate::pass::PassId;
use crate::sys::aligned::{Arena, Buffer};
use crate::units::Extent;
use crate::volume::counters::{Counters, Phase};
use crate::volume::{Event, Events, Fault, Volume};

/// Waits in a pass, where silence is normal: a peer that waits for window has nothing to say. It is given up after
/// `idle`, and at most twice that, in which nothing was under way to the disk, no byte came and no window went back.
pub(super) async fn patiently<T>(
    report: &Report,
    idle: Duration,
    next: impl Future<Output = Result<T, wire::Error>>,
) -> Result<T, Error> {
    let mut next = pin!(next);
    loop {
        let before = report.signs();
        match timeout(idle, &mut next).await {
            Ok(result) => return Ok(result?),
            Err(_) if report.is_busy() || report.signs() != before => {}
            Err(_) => return Err(Error::Silent(idle)),
        }
    }
}

/// A peer's bytes, each of them a sign of life.
pub(super) struct Heard<'a, R> {
    pub(super) reader: &'a mut R,
    pub(super) report: Arc<Report>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Heard<'_, R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let poll = Pin::new(&mut *self.reader).poll_read(cx, buf);
        self.report.heard.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
        poll
    }
}

/// What the volume's thread tells the session's tasks.
#[derive(Debug, Default)]
pub(super) struct Report {
    frames: AtomicU64,
    cost: AtomicU64,
    /// What was taken on of the same costs: as long as it is more, the volume is at work.
    taken: AtomicU64,
    /// Bytes that came from the peer.
    heard: AtomicU64,
    /// Frames of digests that went to it.
    pub(super) digested: AtomicU64,
    /// The session closes: no frame of digests is begun any more.
    pub(super) ended: Notify,
    /// Progress to report, or `closing`.
    news: Notify,
    flushed: Notify,
    /// Bytes in the journal of the pass, at its end.
    saved: AtomicU64,
    closing: AtomicBool,
    /// Whether the journal waits for room.
    paused: AtomicBool,
    /// Set before the first command goes to the volume.
    pub(super) counters: OnceLock<Arc<Counters>>,
}

impl Report {
    pub(super) fn events(self: Arc<Report>, fault: oneshot::Sender<Fault>) -> Events {
        let mut fault_sender = Some(fault);
        Box::new(move |event| match event {
            Event::Written { frames, cost, written, zeroed } => {
                if let Some(counters) = self.counters.get() {
                    counters.written_bytes.fetch_add(written, Ordering::Relaxed);
                    counters.zeroed_bytes.fetch_add(zeroed, Ordering::Relaxed);
                }
                self.give_back(frames, cost);
            }
            Event::Flushed { saved } => {
                self.saved.store(saved, Ordering::Relaxed);
                self.flushed.notify_one();
            }
            Event::Paused | Event::Resumed => {
                let paused = matches!(event, Event::Paused);
                if let Some(counters) = self.counters.get() {
                    counters.paused.store(paused, Ordering::Relaxed);
                }
                self.paused.store(paused, Ordering::Release);
                self.news.notify_one();
            }
            Event::Faulted(fault) => {
                if let Some(sender) = fault_sender.take() {
                    // The session may be gone.
                    sender.send(fault).ok();
                }
            }
        })
    }

    /// Grows with every byte that comes and every bit of window, and every digest, that goes back.
    fn signs(&self) -> [u64; 3] {
        [&self.heard, &self.cost, &self.digested].map(|count| count.load(Ordering::Acquire))
    }

    /// Whether the volume has something to carry out. Called by the task that hands it over, and no other.
    fn is_busy(&self) -> bool {
        self.taken.load(Ordering::Relaxed) != self.cost.load(Ordering::Acquire)
    }

    fn give_back(&self, frames: u64, cost: u64) {
        self.frames.fetch_add(frames, Ordering::Relaxed);
        // Released after the count of frames, and acquired before it.
        self.cost.fetch_add(cost, Ordering::Release);
        self.news.notify_one();
    }
}

/// Why the receiving of passes ended.
pub(super) enum Ended {
    Session(Error),
    Faulted(Fault),
}

impl<E: Into<Error>> From<E> for Ended {
    fn from(error: E) -> Ended {
        Ended::Session(error.into())
    }
}

pub(super) struct Receiving {
    pub(super) volume: Volume,
    pub(super) passes: Box<dyn Passes>,
    pub(super) counters: Arc<Counters>,
    pub(super) report: Arc<Report>,
    pub(super) window: u64,
    pub(super) source_size: u64,
    /// How payloads may be encoded, besides raw.
    pub(super) encodings: Vec<Encoding>,
    pub(super) patience: Patience,
    pub(super) pass: Option<Pass>,
    /// How far the point is that the pass leads to; before its beginning only of a group's.
    pub(super) stage: Option<watch::Receiver<Stage>>,
    /// Holds a compressed payload; at most one data frame long.
    pub(super) compressed: Vec<u8>,
    pub(super) comparing: Comparing,
}

/// The pass that is being received.
pub(super) struct Pass {
    id: PassId,
    kind: PassKind,
    /// Until its commit.
    open: bool,
    /// The next frame's sequence number.
    sequence: u64,
    /// What its frames cost of the window, all together.
    cost: u64,
    /// Bytes of the volume that were accepted.
    written: u64,
    zeroed: u64,
    coverage: Coverage,
}

impl Pass {
    /// Whether this is the number of the next frame.
    fn expect(&self, sequence: u64) -> Result<(), Error> {
        if sequence == self.sequence {
            return Ok(());
        }
        Err(protocol(format!("frame {sequence} came where {} was due", self.sequence)))
    }
}

/// How many frames of a pass may arrive damaged: more are no accident, and each leaves a line in the log.
const MOST_DAMAGED: u32 = 64;

fn after_the_commit(header: Header) -> Error {
    protocol(format!("a {:?} frame came after the commit: a connection carries one pass", header.kind))
}

/// Whether digests of so many bytes each may be asked for.
pub(super) fn check_unit(unit: u32) -> Result<(), Error> {
    match unit.is_power_of_two() && DIGEST_UNITS.contains(&unit.into()) {
        true => Ok(()),
        false => Err(protocol(format!(
            "digests of {unit} bytes each: a power of two from 4 KiB to 1 MiB is allowed"
        ))),
    }
}

pub(super) fn protocol(text: impl Into<String>) -> Error {
    Error::Refused(message::Error::new(Code::Protocol, text))
}

impl Receiving {
    pub(super) async fn run<S: AsyncRead + AsyncWrite>(
        &mut self,
        reader: &mut ReadHalf<S>,
        writer: &Mutex<WriteHalf<S>>,
        reply: &OpenReply,
        fault: &mut oneshot::Receiver<Fault>,
        digests: &mut mpsc::Receiver<digester::Output>,
        stopped: impl Future<Output = Error>,
    ) -> Result<(), Ended> {
        let report = self.report.clone();
        let mut progress = pin!(report_progress(&report, writer));
        let mut digests = pin!(send_digests(&report, digests, writer));
        let result = {
            let mut receive = pin!(self.receive(reader, writer, reply));
            tokio::select! {
                result = &mut receive => result.map_err(Ended::Session),
                // It returns early only where writing fails.
                result = &mut progress => return result.map_err(|error| Ended::Session(error.into())),
                result = &mut digests => return result.map_err(Ended::Session),
                Ok(fault) = fault => Err(Ended::Faulted(fault)),
                error = stopped => Err(error.into()),
            }
        };
        // Not dropped in the middle of a frame: what comes after it must be readable.
        report.closing.store(true, Ordering::Release);
        report.news.notify_one();
        report.ended.notify_one();
        timeout(CLOSING, async { tokio::join!(progress, digests) }).await.ok();
        result
    }

    async fn receive<S: AsyncRead + AsyncWrite>(
        &mut self,
        reader: &mut ReadHalf<S>,
        writer: &Mutex<WriteHalf<S>>,
        reply: &OpenReply,
    ) -> Result<(), Error> {
        let (report, idle) = (self.report.clone(), self.patience.idle);
        let reader = &mut Heard { reader, report: report.clone() };
        if let Some(stage) = &mut self.stage {
            let gathered = |stage: &Stage| !matches!(stage, Stage::Gathering(_));
            reached(stage, gathered, self.patience.gather, reader, writer).await?;
        }
        wire::write_message(&mut *writer.lock().await, 0, reply).await?;
        let mut damaged = 0;
        loop {
            let patience = if self.pass.is_none() { self.patience.begin } else { idle };
            let header = match patiently(&report, patience, wire::read_header(reader)).await {
                Err(Error::Wire(wire::Error::Closed))
                    if !self.pass.as_ref().is_some_and(|pass| pass.open) =>
                {
                    return Ok(());
                }
                other => other?,
            };
            match header.kind {
                Kind::Begin => {
                    let begin =
                        within(self.patience.handshake, wire::read_message_body(reader, &header)).await?;
                    let compare = self.begin(begin).await?;
                    if let Some(stage) = &mut self.stage {
                        let begun = |stage: &Stage| matches!(stage, Stage::Begun | Stage::Recorded(_));
                        reached(stage, begun, self.patience.begin, reader, writer).await?;
                    }
                    wire::write_message(&mut *writer.lock().await, 0, &BeginReply {}).await?;
                    // Not before: the reply is the first that the client hears.
                    if let Some(unit) = compare {
                        self.compare(unit).await?;
                    }
                }
                Kind::Covered => self.covered(header.length)?,
                Kind::Refine => self.refine(&header)?,
                Kind::Data => {
                    let extent = self.accept(&header)?;
                    // This is where a slow disk slows its sender down, for as long as it takes: the window is
                    // the arena, so the wait is for a gap that is large enough. At most one data frame long.
                    let buffer = self.volume.arena().alloc(extent.len() as usize).await;
                    if patiently(&report, idle, self.data(reader, &header, extent, buffer)).await? {
                        if let Some(pass) = &mut self.pass {
                            pass.coverage.add(extent)?;
                        }
                    } else {
                        if let Some(pass) = &mut self.pass {
                            pass.coverage.refuse(extent);
                        }
                        damaged += 1;
                        if damaged > MOST_DAMAGED {
                            let text = format!(
                                "over {MOST_DAMAGED} frames of the pass arrived damaged: it is given up"
                            );
                            return Err(message::Error::new(Code::BadChecksum, text).into());
                        }
                        wire::write_header(&mut *writer.lock().await, &Header::refused(&header)).await?;
                    }
                }
                Kind::Zero => {
                    let extent = self.accept(&header)?;
                    if let Some(pass) = &mut self.pass {
                        pass.zeroed += extent.len();
                        pass.coverage.add(extent)?;
                    }
                    report.taken.fetch_add(header.window_cost(), Ordering::Relaxed);
                    self.volume.zero(extent, header.window_cost()).map_err(out_of_range)?;
                }
                Kind::Commit => {
                    let commit =
                        within(self.patience.handshake, wire::read_message_body(reader, &header)).await?;
                    // Nothing may follow a commit. That the client goes away is noticed while its point waits for
                    // other disks.
                    let mut next = pin!(wire::read_header(reader));
                    let committed = tokio::select! {
                        committed = self.commit(header.sequence, commit) => committed?,
                        early = &mut next => return Err(early.map_or_else(Error::from, after_the_commit)),
                    };
                    wire::write_message(&mut *writer.lock().await, header.sequence, &committed).await?;
                    return match within(self.patience.idle, next).await {
                        Err(Error::Wire(wire::Error::Closed)) => Ok(()),
                        other => Err(after_the_commit(other?)),
                    };
                }
                Kind::Error => {
                    // Always Err: the peer's last word.
                    let _: BeginReply =
                        within(self.patience.handshake, wire::read_message_body(reader, &header)).await?;
                }
                kind => return Err(protocol(format!("a {kind:?} frame has no place in a pass"))),
            }
        }
    }

    /// Begins a pass; gives back the unit of the digests that the client wants, if it does.
    async fn begin(&mut self, begin: Begin) -> Result<Option<u32>, Error> {
        if self.pass.is_some() {
            return Err(protocol("a connection carries one pass"));
        }
        match begin.kind {
            PassKind::Initial | PassKind::Delta => {}
            PassKind::Verify => {
                return Err(protocol("a pass that only compares, on a disk that was opened for writing"));
            }
            PassKind::Unknown => {
                let text = "the client asks for a kind of pass that this agent does not have; it has `initial`, `delta` and \
                            `verify`";
                return Err(message::Error::new(Code::UnsupportedFeature, text).into());
            }
        }
        tracing::Span::current().record("point", tracing::field::display(begin.point));
        let (id, kind) = (begin.pass, begin.kind);
        begin.compare.map_or(Ok(()), check_unit)?;
        let compare = begin.compare;
        let Begun { writer, stage } = self.record(move |passes| passes.begin(&begin)).await?;
        if let Some(writer) = writer {
            self.volume.save(writer);
        }
        self.stage = Some(stage);
        self.counters.begin(id.to_string());
        self.pass = Some(Pass {
            id,
            kind,
            open: true,
            sequence: 0,
            cost: 0,
            written: 0,
            zeroed: 0,
            coverage: Coverage::default(),
        });
        Ok(compare)
    }

    /// Begins to send digests.
    async fn compare(&mut self, unit: u32) -> Result<(), Error> {
        let Comparing::Possible { reader, output } = std::mem::replace(&mut self.comparing, Comparing::No)
        else {
            return Err(protocol("a connection carries one pass"));
        };
        let size = self.source_size;
        let started = off_runtime(move || {
            let arena = Arena::new(digester::MEMORY).map_err(|error| IoError::new("map", "memory", error))?;
            Digester::start(reader(&arena)?, arena, size, unit, output)
        });
        self.comparing = Comparing::Running(started.await?.map_err(|error| unreadable(&error))?);
        Ok(())
    }

    /// The client is through with the first `bytes` of its source.
    fn covered(&mut self, bytes: u64) -> Result<(), Error> {
        let Some(pass) = &mut self.pass else {
            return Err(protocol("a Covered frame outside of a pass"));
        };
        if bytes < pass.coverage.below() || bytes > self.source_size {
            let (before, size) = (pass.coverage.below(), self.source_size);
            return Err(protocol(format!("{bytes} bytes are covered, after {before}, of {size}")));
        }
        pass.coverage.pass(bytes);
        // What came is before it, but for what was sent again.
        let same = bytes.saturating_sub(pass.written + pass.zeroed);
        self.counters.same_bytes.store(same, Ordering::Relaxed);
        if let Comparing::Running(digester) = &self.comparing {
            digester.covered(bytes);
        }
        Ok(())
    }

    fn refine(&self, header: &Header) -> Result<(), Error> {
        let Comparing::Running(digester) = &self.comparing else {
            return Err(protocol("a Refine frame where nothing is compared"));
        };
        let Some(extent) = Extent::new(header.offset, header.length) else {
            return Err(protocol("an empty range"));
        };
        self.volume.check(extent).map_err(out_of_range)?;
        match digester.refine(extent) {
            true => Ok(()),
            false => Err(protocol(format!("over {} ranges wait to be refined", digester::MOST_WISHES))),
        }
    }

    /// Checks a data or zero frame against the pass, the window and the volume, before anything is allocated.
    fn accept(&mut self, header: &Header) -> Result<Extent, Error> {
        let Some(pass) = self.pass.as_mut().filter(|pass| pass.open) else {
            return Err(protocol("data outside of a pass"));
        };
        pass.expect(header.sequence)?;
        if header.encoding != Encoding::Raw && !self.encodings.contains(&header.encoding) {
            return Err(protocol(format!(
                "a payload in {}, which was not agreed on",
                header.encoding.name()
            )));
        }
        let returned = self.report.cost.load(Ordering::Acquire);
        let outstanding = pass.cost + header.window_cost() - returned;
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
        pass.sequence += 1;
        pass.cost += header.window_cost();
        self.counters.frames.fetch_add(1, Ordering::Relaxed);
        self.counters.received_bytes.fetch_add(extent.len(), Ordering::Relaxed);
        self.counters.wire_bytes.fetch_add(u64::from(header.payload_len), Ordering::Relaxed);
        Ok(extent)
    }

    /// Receives a payload and hands it to the volume; `false` where its checksum did not hold.
    async fn data<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut R,
        header: &Header,
        extent: Extent,
        mut buffer: Buffer,
    ) -> Result<bool, wire::Error> {
        let cost = header.window_cost();
        let read = if header.encoding == Encoding::Raw {
            wire::read_payload(reader, header, &mut buffer).await
        } else {
            self.compressed.resize(header.payload_len as usize, 0);
            wire::read_payload(reader, header, &mut self.compressed).await
        };
        match read {
            Err(wire::Error::PayloadChecksum { .. }) => {
                drop(buffer);
                self.counters.refused_frames.fetch_add(1, Ordering::Relaxed);
                self.counters.received_bytes.fetch_sub(extent.len(), Ordering::Relaxed);
                tracing::warn!(frame = header.sequence, %extent, "refused a payload whose checksum does not hold");
                self.report.taken.fetch_add(cost, Ordering::Relaxed);
                self.report.give_back(1, cost);
                return Ok(false);
            }
            other => other?,
        }
        if header.encoding != Encoding::Raw {
            compress::unpack(header.encoding, &self.compressed, &mut buffer)
                .map_err(|source| wire::Error::Compression { sequence: header.sequence, source })?;
        }
        if let Some(pass) = &mut self.pass {
            pass.written += extent.len();
        }
        self.report.taken.fetch_add(cost, Ordering::Relaxed);
        if self.volume.write(extent.offset(), buffer, cost).is_err() {
            unreachable!("the range was checked before its payload was read");
        }
        Ok(true)
    }

    async fn commit(&mut self, sequence: u64, commit: Commit) -> Result<Committed, Error> {
        let Some(pass) = self.pass.as_mut().filter(|pass| pass.open && pass.id == commit.pass) else {
            return Err(protocol("a commit of a pass that is not open"));
        };
        let received = (pass.sequence, pass.written + pass.zeroed);
        if received != (commit.frames, commit.bytes) {
            let text = format!(
                "the commit counts {} frames and {} bytes, and {} and {} were accepted",
                commit.frames, commit.bytes, received.0, received.1
            );
            return Err(protocol(text));
        }
        pass.expect(sequence)?;
        if let Some(refused) = pass.coverage.first_refused() {
            return Err(protocol(format!("{refused} were refused and did not come again")));
        }
        // An initial pass leaves nothing out: what it does not send it makes zero, or knows to be the same.
        let whole = match &self.comparing {
            Comparing::Running(_) => pass.coverage.is_whole(self.source_size),
            _ => commit.bytes == self.source_size,
        };
        if pass.kind == PassKind::Initial && !whole {
            let text = format!("the pass covers {} of the source's {} bytes", commit.bytes, self.source_size);
            return Err(protocol(text));
        }
        pass.open = false;
        let (id, written, zeroed) = (pass.id, pass.written, pass.zeroed);
        self.counters.enter(Phase::Committing);
        self.volume.flush();
        // A fault ends the session from outside of this future.
        self.report.flushed.notified().await;
        let saved = self.report.saved.load(Ordering::Relaxed);
        let (prepared, recorded) = (commit.clone(), commit);
        self.record(move |passes| passes.prepare(&prepared, saved)).await?;
        let stage = self.stage.as_mut().ok_or_else(lost)?;
        let decided = stage.wait_for(|stage| matches!(stage, Stage::Recorded(_) | Stage::Lost(_))).await;
        let time = match decided.map(|stage| stage.clone()) {
            Ok(Stage::Recorded(time)) => time,
            Ok(Stage::Lost(error)) => return Err(error.into()),
            Ok(_) | Err(_) => return Err(lost().into()),
        };
        self.record(move |passes| passes.committed(&recorded)).await?;
        self.counters.enter(Phase::Synchronized);
        Ok(Committed { pass: id, written, zeroed, time })
    }

    /// Lets the host record something, off the runtime.
    async fn record<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn Passes) -> Result<T, message::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let mut passes = std::mem::replace(&mut self.passes, Box::new(Gone));
        let (passes, result) = off_runtime(move || {
            let result = work(&mut *passes);
            (passes, result)
        })
        .await?;
        self.passes = passes;
        Ok(result?)
    }
}

/// Stands in for the record while it is in use, and after a defect lost it.
struct Gone;

impl Passes for Gone {
    fn begin(&mut self, _: &Begin) -> Result<Begun, message::Error> {
        Err(lost())
    }
    fn prepare(&mut self, _: &Commit, _: u64) -> Result<(), message::Error> {
        Err(lost())
    }
    fn committed(&mut self, _: &Commit) -> Result<(), message::Error> {
        Err(lost())
    }
    fn fault(&mut self, _: &Fault) -> Result<(), message::Error> {
        Err(lost())
    }
}

pub(super) fn lost() -> message::Error {
    message::Error::new(Code::Internal, "the record of passes was lost; see the agent's log")
}

fn out_of_range(error: crate::volume::OutOfRange) -> Error {
    Error::Refused(message::Error::new(Code::OutOfRange, error.to_string()))
}

/// Gives window back as the volume's thread reports it, until the session closes. Fails where writing does.
async fn report_progress<S: AsyncRead + AsyncWrite>(
    report: &Report,
    writer: &Mutex<WriteHalf<S>>,
) -> Result<(), wire::Error> {
    let (mut reported, mut was_paused) = (0, false);
    loop {
        report.news.notified().await;
        if report.closing.load(Ordering::Acquire) {
            return Ok(());
        }
        let paused = report.paused.load(Ordering::Acquire);
        if paused != was_paused {
            was_paused = paused;
            let text = match paused {
                true => {
                    "the retention file system of the master target is full: the pass waits until there is room"
                }
                false => "there is room on the retention file system again: the pass goes on",
            };
            let notice = Notice { message: text.to_owned() };
            wire::write_message(&mut *writer.lock().await, 0, &notice).await?;
        }
        let cost = report.cost.load(Ordering::Acquire);
        if cost != reported {
            reported = cost;
            let header = Header::progress(report.frames.load(Ordering::Relaxed), cost);
            let mut writer = writer.lock().await;
            wire::write_header(&mut *writer, &header).await?;
            writer.flush().await.map_err(|source| wire::Error::Io { op: "write", source })?;
        }
    }
}

// The window's smallest cost is that of an arena's page, so that a window of commands fits the arena.
const _: () = assert!(COST_UNIT as usize == crate::sys::aligned::PAGE);
