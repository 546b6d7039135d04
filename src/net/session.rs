//! The server's side of a connection: from the first hello to the last acknowledgement.
//!
//! What a session may touch is decided by its [`Host`]: the agent, with its protections and disks; the tests,
//! with disks in memory. The session itself knows the protocol (see [`crate::net`]) and keeps its promises:
//! nothing is allocated before it is bounded, bytes with a bad checksum do not reach the volume, and a commit
//! is answered after the volume's flush succeeded and the host's record of it is durable.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, Notify, oneshot, watch};
use tokio::time::timeout;

use super::compress;
use super::frame::{COST_UNIT, Encoding, Header, Kind, MAX_DATA};
use super::message::{
    self, Begin, BeginReply, Code, Commit, Committed, Enroll, EnrollReply, Hello, HelloReply, Notice, Open,
    OpenReply, PassKind,
};
use super::wire;
use crate::error::chain;
use crate::journal::Writer;
use crate::name::Name;
use crate::pass::PassId;
use crate::points::PointId;
use crate::sys::aligned::Buffer;
use crate::units::Extent;
use crate::volume::counters::{Counters, Phase};
use crate::volume::{Event, Events, Fault, Volume};

/// What a session needs of the program around it. All methods may block; sessions call them off the runtime.
pub trait Host: Send + Sync + 'static {
    /// Gives a certificate to a machine that proves a token's secret.
    fn enroll(&self, peer: SocketAddr, request: &Enroll) -> Result<EnrollReply, message::Error>;

    /// Opens the target disk that belongs to `open.disk` of `machine`, if all rules allow it. The volume
    /// reports to `events`.
    fn open(&self, machine: &Name, open: &Open, events: Events) -> Result<Opened, message::Error>;
}

/// An open volume.
pub struct Opened {
    /// The volume itself.
    pub volume: Volume,
    /// The size of the target disk in bytes.
    pub device_size: u64,
    /// Its logical block size in bytes.
    pub block: u32,
    /// The point at which it stands.
    pub baseline: Option<PointId>,
    /// The window to grant, in bytes; at least one data frame and at most the volume's arena.
    pub window: u64,
    /// What the session counts.
    pub counters: Arc<Counters>,
    /// Where passes are recorded.
    pub passes: Box<dyn Passes>,
    /// What must last until the volume is closed, however long that takes: the right to write to it.
    pub hold: Box<dyn Send>,
}

/// The durable record of a volume's passes. What a method did is on stable storage when it returns.
///
/// It is dropped where the pass ends before its [`prepare`](Self::prepare): whoever waits for it learns so then.
pub trait Passes: Send {
    /// A pass begins. For a delta pass, the journal that saves what it overwrites; for an initial one `None`: from here
    /// on the content of the volume is neither the old nor the new.
    fn begin(&mut self, begin: &Begin) -> Result<Option<Writer>, message::Error>;
    /// The volume holds the pass, whole and durable, with `saved` bytes in its journal. The answer comes once all
    /// disks of the point have said so, and their point is recorded: with the time that it was recorded with. A crash
    /// before the record leaves an open pass.
    fn prepare(&mut self, commit: &Commit, saved: u64) -> Result<Decision, message::Error>;
    /// The point is recorded.
    fn committed(&mut self, commit: &Commit) -> Result<(), message::Error>;
    /// A write or flush failed.
    fn fault(&mut self, fault: &Fault) -> Result<(), message::Error>;
}

/// What became of a point, once it is known.
pub type Decision = oneshot::Receiver<Result<OffsetDateTime, message::Error>>;

/// How long a session waits.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a message that the protocol's state demands.
    pub handshake: Duration,
    /// For a sign of life in an open pass, while the server has nothing left to carry out.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { handshake: Duration::from_secs(15), idle: Duration::from_secs(300) }
    }
}

/// How a session ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection, or what came over it.
    #[error("connection")]
    Wire(#[from] wire::Error),
    /// This side gave up, and told the peer so.
    #[error("refused")]
    Refused(#[from] message::Error),
    /// The peer was silent for too long.
    #[error("the peer sent nothing for {0:?}")]
    Silent(Duration),
}

impl Error {
    fn to_peer(&self) -> Option<message::Error> {
        match self {
            Error::Wire(error) => error.to_peer(),
            Error::Refused(error) => Some(error.clone()),
            Error::Silent(_) => Some(message::Error::new(Code::Protocol, self.to_string())),
        }
    }
}

/// Speaks with one client until it closes the connection, or until `stopping` becomes true. `machine` is the one
/// that its certificate names; without one it may only enrol.
pub async fn serve<S>(
    stream: S,
    peer: SocketAddr,
    machine: Option<Name>,
    host: Arc<dyn Host>,
    patience: Patience,
    stopping: watch::Receiver<bool>,
) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut reader, writer) = tokio::io::split(stream);
    let writer = Mutex::new(writer);
    let result = converse(&mut reader, &writer, peer, machine, host, patience, stopping).await;
    let mut writer = writer.into_inner();
    match &result {
        Ok(()) => {
            timeout(CLOSING, writer.shutdown()).await.ok();
        }
        Err(error) => part(reader, writer, error.to_peer()).await,
    }
    result
}

/// Answers whatever a client says with `last_word`, and closes the connection.
pub async fn turn_away<S: AsyncRead + AsyncWrite + Unpin>(stream: S, last_word: message::Error) {
    let (reader, writer) = tokio::io::split(stream);
    part(reader, writer, Some(last_word)).await;
}

/// Closes a connection on which something went wrong. All of it is best effort: the peer may be gone.
async fn part<S: AsyncRead + AsyncWrite + Unpin>(
    mut reader: ReadHalf<S>,
    mut writer: WriteHalf<S>,
    last_word: Option<message::Error>,
) {
    if let Some(last_word) = last_word {
        timeout(CLOSING, wire::write_message(&mut writer, 0, &last_word)).await.ok();
    }
    timeout(CLOSING, writer.shutdown()).await.ok();
    // Closing a socket with unread data resets the connection, and a reset may overtake the last word: the
    // peer gets the time to read it and close.
    timeout(CLOSING, tokio::io::copy(&mut reader, &mut tokio::io::sink())).await.ok();
}

/// How long the end of a session may take, a step.
const CLOSING: Duration = Duration::from_secs(3);

async fn within<T>(limit: Duration, next: impl Future<Output = Result<T, wire::Error>>) -> Result<T, Error> {
    match timeout(limit, next).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Error::Silent(limit)),
    }
}

/// Waits in a pass, where silence is normal: a peer that waits for window has nothing to say. It is given up after
/// `idle`, and at most twice that, in which nothing was under way to the disk, no byte came and no window went back.
async fn patiently<T>(
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
struct Heard<'a, R> {
    reader: &'a mut R,
    report: Arc<Report>,
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

/// Waits until the service stops.
async fn stopped(stopping: &mut watch::Receiver<bool>) -> Error {
    if stopping.wait_for(|stop| *stop).await.is_err() {
        // Whoever could say so is gone.
        std::future::pending::<()>().await;
    }
    let text = "the service stops; run `mt-agent send` again once it is back";
    message::Error::new(Code::ShuttingDown, text).into()
}

/// Runs what may block off the runtime.
async fn off_runtime<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| message::Error::new(Code::Internal, "a task of the agent failed; see its log").into())
}

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    reader: &mut ReadHalf<S>,
    writer: &Mutex<WriteHalf<S>>,
    peer: SocketAddr,
    machine: Option<Name>,
    host: Arc<dyn Host>,
    patience: Patience,
    stopping: watch::Receiver<bool>,
) -> Result<(), Error> {
    let mut stop = stopping.clone();
    let greeting = tokio::select! {
        greeting = within(patience.handshake, wire::read_message(reader)) => greeting,
        error = stopped(&mut stop) => return Err(error),
    };
    let hello: Hello = match greeting {
        // A port scan, or a health check.
        Err(Error::Wire(wire::Error::Closed)) => return Ok(()),
        other => other?,
    };
    let reply = HelloReply::to(&hello)?;
    wire::write_message(&mut *writer.lock().await, 0, &reply).await?;
    let request = tokio::select! {
        request = within(patience.handshake, wire::read_header(reader)) => request,
        error = stopped(&mut stop) => return Err(error),
    };
    let header = match request {
        Err(Error::Wire(wire::Error::Closed)) => return Ok(()),
        other => other?,
    };
    let Some(machine) = machine else {
        if header.kind != Kind::Enroll {
            let text = "this connection has no client certificate; enrol the machine with `mt-agent enroll`";
            return Err(message::Error::new(Code::NotAuthorized, text).into());
        }
        let request: Enroll = within(patience.handshake, wire::read_message_body(reader, &header)).await?;
        let reply = off_runtime(move || host.enroll(peer, &request)).await??;
        return Ok(wire::write_message(&mut *writer.lock().await, 0, &reply).await?);
    };
    let open: Open = within(patience.handshake, wire::read_message_body(reader, &header)).await?;
    let source_size = open.size;
    if source_size == 0 {
        return Err(protocol("a source of 0 bytes"));
    }
    let report = Arc::new(Report::default());
    let (fault_sender, mut fault) = oneshot::channel();
    let events = report.clone().events(fault_sender);
    let encodings = open.compression.clone();
    let opened = off_runtime(move || host.open(&machine, &open, events)).await??;
    let Opened { volume, device_size, block, baseline, window, counters, passes, hold } = opened;
    report.counters.get_or_init(|| counters.clone());
    let reply = OpenReply {
        window,
        max_payload: MAX_DATA as u32,
        volume_size: device_size,
        block,
        compression: encodings.into_iter().filter(|encoding| *encoding != Encoding::Raw).collect(),
        baseline,
    };
    let mut pass = Receiving {
        volume,
        passes,
        counters,
        report: report.clone(),
        window,
        source_size,
        encodings: reply.compression.clone(),
        patience,
        pass: None,
        compressed: Vec::new(),
    };
    let result = async {
        wire::write_message(&mut *writer.lock().await, 0, &reply).await?;
        pass.run(reader, writer, &mut fault, stopping).await
    }
    .await;
    // The device is closed before the connection is: a sender that connects again finds it free. Only a disk that
    // hangs keeps it open longer, and that is no reason to let the sender wait for its answer.
    let Receiving { volume, mut passes, .. } = pass;
    let closing = off_runtime(move || {
        volume.close();
        drop(hold);
    });
    timeout(CLOSING, closing).await.unwrap_or(Ok(()))?;
    // What was still in flight when something else ended the session may have failed as well.
    let failure = match result {
        Ok(()) => return Ok(()),
        Err(Ended::Faulted(fault)) => fault,
        Err(Ended::Session(error)) => match fault.try_recv() {
            Ok(fault) => fault,
            Err(_) => return Err(error),
        },
    };
    let text = format!("the target disk failed: {}", chain(&*failure.0));
    if let Err(error) = off_runtime(move || passes.fault(&failure)).await? {
        // The sender hears of the disk all the same; the record says that the pass was not finished.
        tracing::error!(error = chain(&error), "the failure of a disk could not be recorded");
    }
    Err(message::Error::new(Code::Io, text).into())
}

/// What the volume's thread tells the session's tasks.
#[derive(Debug, Default)]
struct Report {
    frames: AtomicU64,
    cost: AtomicU64,
    /// What was taken on of the same costs: as long as it is more, the volume is at work.
    taken: AtomicU64,
    /// Bytes that came from the peer.
    heard: AtomicU64,
    /// Progress to report, or `closing`.
    news: Notify,
    flushed: Notify,
    /// Bytes in the journal of the pass, at its end.
    saved: AtomicU64,
    closing: AtomicBool,
    /// Whether the journal waits for room.
    paused: AtomicBool,
    /// Set before the first command goes to the volume.
    counters: OnceLock<Arc<Counters>>,
}

impl Report {
    fn events(self: Arc<Report>, fault: oneshot::Sender<Fault>) -> Events {
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

    /// Grows with every byte that comes and every bit of window that goes back.
    fn signs(&self) -> (u64, u64) {
        (self.heard.load(Ordering::Relaxed), self.cost.load(Ordering::Acquire))
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
enum Ended {
    Session(Error),
    Faulted(Fault),
}

impl<E: Into<Error>> From<E> for Ended {
    fn from(error: E) -> Ended {
        Ended::Session(error.into())
    }
}

struct Receiving {
    volume: Volume,
    passes: Box<dyn Passes>,
    counters: Arc<Counters>,
    report: Arc<Report>,
    window: u64,
    source_size: u64,
    /// How payloads may be encoded, besides raw.
    encodings: Vec<Encoding>,
    patience: Patience,
    pass: Option<Pass>,
    /// Holds a compressed payload; at most one data frame long.
    compressed: Vec<u8>,
}

/// The pass that is being received.
struct Pass {
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
    covered: Coverage,
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

/// Which bytes of the volume a pass has brought: runs that do not touch, by their starts. A sender that goes
/// through its disk in order has one.
#[derive(Debug, Default)]
struct Coverage(BTreeMap<u64, u64>);

/// How many frames of a pass may arrive damaged: more are no accident, and each leaves a line in the log.
const MOST_DAMAGED: u32 = 64;

/// How scattered the frames of a pass may be: bounds what is remembered of it.
const MOST_RUNS: usize = 4096;

impl Coverage {
    fn overlaps(&self, extent: Extent) -> bool {
        self.0.range(..extent.end()).next_back().is_some_and(|(_, end)| *end > extent.offset())
    }

    /// Adds a range that overlaps none.
    fn add(&mut self, extent: Extent) -> Result<(), Error> {
        let (mut start, mut end) = (extent.offset(), extent.end());
        if let Some((&before, &touching)) = self.0.range(..start).next_back()
            && touching == start
        {
            start = before;
        }
        if let Some(after) = self.0.remove(&end) {
            end = after;
        }
        self.0.insert(start, end);
        match self.0.len() {
            0..=MOST_RUNS => Ok(()),
            _ => Err(protocol(format!("the pass jumps about: over {MOST_RUNS} separate ranges"))),
        }
    }
}

fn after_the_commit(header: Header) -> Error {
    protocol(format!("a {:?} frame came after the commit: a connection carries one pass", header.kind))
}

fn protocol(text: impl Into<String>) -> Error {
    Error::Refused(message::Error::new(Code::Protocol, text))
}

impl Receiving {
    async fn run<S: AsyncRead + AsyncWrite>(
        &mut self,
        reader: &mut ReadHalf<S>,
        writer: &Mutex<WriteHalf<S>>,
        fault: &mut oneshot::Receiver<Fault>,
        mut stopping: watch::Receiver<bool>,
    ) -> Result<(), Ended> {
        let report = self.report.clone();
        let mut progress = pin!(report_progress(&report, writer));
        let result = {
            let mut receive = pin!(self.receive(reader, writer));
            tokio::select! {
                result = &mut receive => result.map_err(Ended::Session),
                // It returns early only where writing fails.
                result = &mut progress => return result.map_err(|error| Ended::Session(error.into())),
                Ok(fault) = fault => Err(Ended::Faulted(fault)),
                error = stopped(&mut stopping) => Err(error.into()),
            }
        };
        // Not dropped in the middle of a frame: what comes after it must be readable.
        report.closing.store(true, Ordering::Release);
        report.news.notify_one();
        timeout(CLOSING, progress).await.ok();
        result
    }

    async fn receive<S: AsyncRead + AsyncWrite>(
        &mut self,
        reader: &mut ReadHalf<S>,
        writer: &Mutex<WriteHalf<S>>,
    ) -> Result<(), Error> {
        let (report, idle) = (self.report.clone(), self.patience.idle);
        let reader = &mut Heard { reader, report: report.clone() };
        let mut damaged = 0;
        loop {
            let header = match patiently(&report, idle, wire::read_header(reader)).await {
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
                    self.begin(begin).await?;
                    wire::write_message(&mut *writer.lock().await, 0, &BeginReply {}).await?;
                }
                Kind::Data => {
                    let extent = self.accept(&header)?;
                    // This is where a slow disk slows its sender down, for as long as it takes: the window is
                    // the arena, so the wait is for a gap that is large enough. At most one data frame long.
                    let buffer = self.volume.arena().alloc(extent.len() as usize).await;
                    if patiently(&report, idle, self.data(reader, &header, extent, buffer)).await? {
                        if let Some(pass) = &mut self.pass {
                            pass.covered.add(extent)?;
                        }
                    } else {
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
                        pass.covered.add(extent)?;
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

    async fn begin(&mut self, begin: Begin) -> Result<(), Error> {
        if self.pass.is_some() {
            return Err(protocol("a connection carries one pass"));
        }
        if begin.kind == PassKind::Unknown {
            let text = "the client asks for a kind of pass that this agent does not have; it has `initial` and `delta`";
            return Err(message::Error::new(Code::UnsupportedFeature, text).into());
        }
        let (id, kind) = (begin.pass, begin.kind);
        if let Some(writer) = self.record(move |passes| passes.begin(&begin)).await? {
            self.volume.save(writer);
        }
        self.counters.begin(id.to_string());
        self.pass = Some(Pass {
            id,
            kind,
            open: true,
            sequence: 0,
            cost: 0,
            written: 0,
            zeroed: 0,
            covered: Coverage::default(),
        });
        Ok(())
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
        if pass.covered.overlaps(extent) {
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
        // An initial pass leaves nothing out: what it does not send it makes zero.
        if pass.kind == PassKind::Initial && commit.bytes != self.source_size {
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
        let decision = self.record(move |passes| passes.prepare(&prepared, saved)).await?;
        let time = decision.await.map_err(|_| lost())??;
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
    fn begin(&mut self, _: &Begin) -> Result<Option<Writer>, message::Error> {
        Err(lost())
    }
    fn prepare(&mut self, _: &Commit, _: u64) -> Result<Decision, message::Error> {
        Err(lost())
    }
    fn committed(&mut self, _: &Commit) -> Result<(), message::Error> {
        Err(lost())
    }
    fn fault(&mut self, _: &Fault) -> Result<(), message::Error> {
        Err(lost())
    }
}

fn lost() -> message::Error {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn coverage_equals_a_map_of_bytes(ranges in prop::collection::vec((0..200u64, 1..40u64), 1..60)) {
            let mut coverage = Coverage::default();
            let mut bytes = [false; 240];
            for (offset, len) in ranges {
                let range = offset as usize..(offset + len) as usize;
                let extent = Extent::new(offset, len).unwrap();
                let overlaps = bytes[range.clone()].contains(&true);
                prop_assert_eq!(coverage.overlaps(extent), overlaps);
                if !overlaps {
                    bytes[range].fill(true);
                    prop_assert!(coverage.add(extent).is_ok());
                }
                let runs = bytes.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
                prop_assert_eq!(coverage.0.len(), runs);
            }
        }
    }

    #[test]
    fn a_pass_that_jumps_about_is_bounded() {
        let mut coverage = Coverage::default();
        let mut add = |n: usize| coverage.add(Extent::new(2 * n as u64, 1).unwrap());
        assert!((0..MOST_RUNS).all(|n| add(n).is_ok()));
        assert!(add(MOST_RUNS).is_err());
    }
}
