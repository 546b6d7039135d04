//! One disk's connection, seen from its sender. The protocol is specified in [`crate::net`].

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::encode::Piece;
use super::free::Free;
use super::hints::Hints;
use super::lanes::{self, Connections, Dealt, Outlet};
use super::limit::Limiter;
use super::source::{self, Ask, Differing, Output, Reading, Source};
use super::still::{Still, Worth};
use super::{AHEAD, Compression, Done, Error, MOST_DIFFERENCES, PATIENCE, Point, Progress, SILENCE, Scope};
use crate::digest::{self, Digest};
use crate::name::Name;
use crate::net::frame::{Header, Kind, MAX_DATA};
use crate::net::message::{
    Begin, BeginReply, Code, Commit, Committed, Hello, HelloReply, Message, Notice, Open, OpenReply,
    PROTOCOL, PassKind,
};
use crate::net::wire;
use crate::pass::PassId;
use crate::storage::device::EngineChoice;
use crate::units::Extent;

/// One disk to open on the master target.
#[derive(Clone)]
pub(super) struct Opening {
    pub(super) disk: Name,
    pub(super) source: Arc<Source>,
    pub(super) compression: Compression,
    /// Whether it may have another size, or be another disk, than what was sent before.
    pub(super) resized: bool,
    pub(super) another: bool,
    /// Whether it is only to be compared.
    pub(super) verify: bool,
    pub(super) group: Option<Name>,
    /// All disks of the point.
    pub(super) disks: Vec<Name>,
    pub(super) connections: Connections,
}

/// One disk to send.
pub(super) struct Job {
    pub(super) point: Point,
    pub(super) still: Arc<Still>,
    pub(super) source: Arc<Source>,
    pub(super) free: Arc<Free>,
    /// What of a source in use seems to be free: where it is compared, that is told by itself.
    pub(super) in_doubt: Free,
    pub(super) progress: Arc<Progress>,
    pub(super) compression: Compression,
    pub(super) engine: EngineChoice,
    pub(super) limiter: Option<Arc<Limiter>>,
    pub(super) scope: Scope,
    /// With [`Scope::Whole`], up to where earlier attempts have written it: that is compared.
    pub(super) sent: u64,
    /// Only where they tell all that differs.
    pub(super) hints: Option<Arc<Hints>>,
}

/// How many frames may come back as damaged before it is no accident any more.
const MAX_DAMAGED: u64 = 16;

/// How often a pass that sends everything makes sure that all of it so far was carried out, so that it need not be sent again
/// where the connection breaks.
const MARK: Duration = Duration::from_secs(2);

/// How many frames wait between the reading thread and the connection.
const QUEUE: usize = 8;

/// Carries out a pass over a connection on which the disk was opened, and those that joined it; returns when it was
/// acknowledged.
pub(super) async fn run<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    joined: Vec<S>,
    reply: &OpenReply,
    job: &Job,
) -> Result<Done, Error> {
    carry_out(stream, joined, reply, job).await.map_err(|error| match (error, job.progress.waits.hangs()) {
        // It rightly says that it heard nothing.
        (error, Some(time)) if error.code() == Some(Code::Silent) => job.hangs(time),
        (Error::Wire(error), _) if job.scope == Scope::Verify => Error::NotCompared(error),
        (error, _) => error,
    })
}

async fn carry_out<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    mut stream: S,
    joined: Vec<S>,
    reply: &OpenReply,
    job: &Job,
) -> Result<Done, Error> {
    let (pass, compare) = begin(&mut stream, reply, job).await?;
    let compression = match job.compression.encodings().iter().all(|one| reply.compression.contains(one)) {
        true => job.compression,
        false => Compression::Off,
    };
    job.progress.waiting.store(false, Ordering::Relaxed);
    job.progress.target.store(reply.volume_size, Ordering::Relaxed);
    job.progress.connections.store(1 + joined.len() as u64, Ordering::Relaxed);
    if let Some(point) = reply.baseline {
        // An attempt has a progress of its own.
        job.progress.baseline.set(point).ok();
    }
    let Progress { read, zero, same, sent, done, differs, differs_free, .. } = &*job.progress;
    for counter in [read, zero, same, sent, done, differs, differs_free] {
        counter.store(0, Ordering::Relaxed);
    }
    job.differences().clear();
    let (asks, wanted) = mpsc::channel();
    let (output, pieces) = tokio::sync::mpsc::channel(QUEUE);
    let progress = job.progress.clone();
    let reading = Reading {
        source: job.source.clone(),
        free: job.free.clone(),
        engine: job.engine,
        // What is only compared is limited where it is read: hardly anything is sent.
        limiter: job.limiter.clone().filter(|_| job.scope == Scope::Verify),
    };
    // It ends when this future is dropped: the channels' other ends are gone then.
    tokio::task::spawn_blocking(move || {
        source::read(reading, compression, progress, wanted, output);
    });
    // The thread was just started, and holds the other end.
    let first = match (compare, &job.hints) {
        (true, _) if job.scope == Scope::Verify => Ask::Compare(Differing::Told),
        (true, Some(hints)) if job.scope == Scope::CheckHints => {
            Ask::Compare(Differing::Checked(hints.clone()))
        }
        (true, _) => {
            let up_to = if job.scope == Scope::Whole { job.sent } else { u64::MAX };
            Ask::Compare(Differing::Sent { up_to })
        }
        (false, Some(hints)) if job.scope == Scope::Differences => Ask::Ranges(hints.clone()),
        (false, _) => Ask::Send(job.source.extent()),
    };
    asks.send(first).ok();

    let (mut reader, writer) = tokio::io::split(stream);
    let writer = tokio::sync::Mutex::new(writer);
    let outlet = Outlet { limiter: job.limiter.clone(), progress: job.progress.clone() };
    let (deal, dealt) = Dealt::new();
    let deal = (!joined.is_empty()).then_some(deal);
    // Tasks of their own: they encrypt side by side. They end with this future.
    let mut lanes = JoinSet::new();
    for lane in joined {
        lanes.spawn(lanes::carry(lane, dealt.clone(), outlet.clone()));
    }
    let shared = Shared::new(pass, reply.window, asks);
    let failed = {
        let mut listen = pin!(shared.listen(&mut reader, job));
        let talk = pin!(shared.talk(&writer, pieces, deal.as_ref(), &outlet, job));
        let first = pin!(shared.carry(&writer, &dealt, &outlet));
        let sent = tokio::select! {
            result = &mut listen => Err(result.map_err(given_up)),
            time = job.progress.waits.too_long() => Err(Err(job.hangs(time))),
            sent = talk => Ok(sent),
            Err(error) = first => Ok(Err(error)),
            Some(ended) = lanes.join_next() => Ok(Err(match ended {
                Ok(Err(error)) => error,
                // It ends by itself only when no more frames come.
                Ok(Ok(())) => Error::Wire(wire::Error::Closed),
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            })),
        };
        match sent {
            Err(early) => Ok(Done::Committed(early?, job.point.id)),
            Ok(Ok(())) if job.scope == Scope::Verify => Ok(Done::Compared),
            Ok(Ok(())) => Ok(Done::Committed(listen.await.map_err(given_up)?, job.point.id)),
            Ok(Err(error)) => Err((error, timeout(REASON, listen).await)),
        }
    };
    match failed {
        Ok(done) => {
            // Everything is acknowledged: whether the goodbyes arrive makes no difference to it.
            drop(deal);
            let goodbye = async {
                writer.into_inner().shutdown().await.ok();
                while lanes.join_next().await.is_some() {}
                // The disk is closed there before the connection is: whoever sends next finds it free.
                while reader.read(&mut [0; 64]).await.is_ok_and(|len| len > 0) {}
            };
            timeout(LAST_WORD, goodbye).await.ok();
            Ok(done)
        }
        // Where writing failed, or another connection ended, the peer has likely said why before it closed: that is the
        // better answer.
        Err((
            Error::Wire(wire::Error::Io { .. } | wire::Error::Closed | wire::Error::Truncated),
            Ok(result),
        )) => result.map(|committed| Done::Committed(committed, job.point.id)).map_err(given_up),
        Err((error, _)) => Err(error),
    }
}

/// How long a goodbye may take.
const LAST_WORD: Duration = Duration::from_secs(3);

/// How long to wait for the peer's reason after writing to it failed, or another connection ended: it closes its disk before
/// it tells.
const REASON: Duration = Duration::from_secs(10);

/// What comes from the master target in a pass, unless that is silent for too long.
async fn heard<T>(next: impl Future<Output = Result<T, wire::Error>>) -> Result<T, Error> {
    timeout(SILENCE, next).await.map_err(|_| Error::Silent(SILENCE))?.map_err(Error::from)
}

/// A pass that the master target does not want any more is no broken one.
fn given_up(error: Error) -> Error {
    match error {
        Error::Wire(wire::Error::Peer(refusal)) if refusal.code == Code::Refused => Error::Ended(refusal),
        error => error,
    }
}

/// The answer to what was sent last, past what the user is told meanwhile. As long as it tells something, it is not silent.
async fn answer<T: Message, S: AsyncRead + Unpin>(stream: &mut S) -> Result<T, Error> {
    // Nothing was sent yet: a refusal here is an answer, not a broken pass.
    let refused = |error| match error {
        wire::Error::Peer(refusal) => Error::Refused(refusal),
        broken @ (wire::Error::Closed | wire::Error::Truncated | wire::Error::Io { .. }) => {
            Error::BrokenOff(broken)
        }
        other => Error::Wire(other),
    };
    let silent = |_| Error::Silent(PATIENCE);
    loop {
        let header = timeout(PATIENCE, wire::read_header(stream)).await.map_err(silent)?.map_err(refused)?;
        if header.kind != Kind::Notice {
            let message = timeout(PATIENCE, wire::read_message_body(stream, &header)).await;
            return message.map_err(silent)?.map_err(refused);
        }
        let notice = timeout(PATIENCE, wire::read_message_body(stream, &header)).await;
        let notice: Notice = notice.map_err(silent)?.map_err(refused)?;
        tracing::warn!("{}", notice.message);
    }
}

/// Says something that is answered.
pub(super) async fn ask<T: Message, S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    message: &impl Message,
) -> Result<T, Error> {
    let written = timeout(PATIENCE, wire::write_message(stream, 0, message)).await;
    match written.map_err(|_| Error::Silent(PATIENCE))? {
        // The peer may have said why before it closed.
        Ok(()) | Err(wire::Error::Io { .. }) => answer(stream).await,
        Err(error) => Err(error.into()),
    }
}

/// Says hello over a fresh connection, and returns how long the answer took to come: the server has nothing to do for it.
pub(super) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<Duration, Error> {
    let asked = Instant::now();
    let hello: HelloReply = ask(stream, &Hello::ours()).await?;
    if hello.protocol != PROTOCOL {
        return Err(Error::Broken("it chose a version of the protocol that was not offered"));
    }
    Ok(asked.elapsed())
}

/// Opens a disk on the master target, over a fresh connection; for a group returns when all of its machines have. Tells as
/// well how many more connections are to join.
pub(super) async fn open<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    opening: &Opening,
) -> Result<(OpenReply, u32), Error> {
    let round_trip = greet(stream).await?;
    let open = Open {
        disk: opening.disk.clone(),
        size: opening.source.size().0,
        sector: opening.source.sector(),
        source: opening.source.id(),
        resized: opening.resized,
        another: opening.another,
        compression: opening.compression.encodings(),
        verify: opening.verify,
        group: opening.group.clone(),
        disks: opening.group.as_ref().map_or_else(Vec::new, |_| opening.disks.clone()),
    };
    let reply: OpenReply = ask(stream, &open).await?;
    if u64::from(reply.max_payload) < MAX_DATA || reply.window < MAX_DATA {
        return Err(Error::Broken("it takes only frames that are smaller than those of this version"));
    }
    if reply.volume_size < open.size {
        return Err(Error::Broken("it opened a volume that is smaller than the source"));
    }
    if reply.point.is_some() != open.group.is_some() {
        return Err(Error::Broken("it does not know of groups"));
    }
    // The target is open now, so that it can be seen to be the source; and nothing was written to it.
    let source = opening.source.clone();
    if let Ok(Some(receiver)) = tokio::task::spawn_blocking(move || source.receiver()).await {
        return Err(Error::Itself(receiver));
    }
    let further = opening.connections.further(round_trip, reply.join.as_ref());
    Ok((reply, further))
}

/// Begins the pass; returns when all passes of the point have begun.
async fn begin<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    reply: &OpenReply,
    job: &Job,
) -> Result<(PassId, bool), Error> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(|error| wire::Error::Io { op: "draw random bits", source: error.into() })?;
    let pass = PassId(u128::from_le_bytes(id));
    // A volume that stands at a point goes on from it.
    let kind = match (job.scope, reply.baseline) {
        (Scope::Verify, _) => PassKind::Verify,
        (_, Some(_)) => PassKind::Delta,
        (_, None) => PassKind::Initial,
    };
    let compare = match job.scope {
        // What is known to have changed need not be looked for.
        Scope::Differences => reply.alike && job.hints.is_none(),
        Scope::CheckHints => reply.alike,
        // What was written before the connection broke is not sent again: over one that always breaks before the end, the pass
        // would never come to it.
        Scope::Whole => job.sent > 0,
        Scope::Verify => true,
    };
    let (point, disks) = (job.point.id, job.point.disks.clone());
    let begin = Begin { pass, kind, point, disks, compare: compare.then_some(digest::UNIT) };
    let BeginReply {} = ask(stream, &begin).await?;
    Ok((pass, compare))
}

impl Job {
    /// A read of the source does not come back.
    fn hangs(&self, time: Duration) -> Error {
        source::Error::Hangs(self.source.path().to_owned(), time).into()
    }

    /// Something went on.
    fn arrived(&self) {
        *self.progress.arrived.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Counts a range that differs.
    fn differs(&self, extent: Extent) {
        let used = self.in_doubt.outside(extent);
        let bytes: u64 = used.iter().map(|extent| extent.len()).sum();
        self.progress.differs.fetch_add(bytes, Ordering::Relaxed);
        self.progress.differs_free.fetch_add(extent.len() - bytes, Ordering::Relaxed);
        let mut differences = self.differences();
        for extent in used {
            let joined = differences.last().filter(|last| last.end() == extent.offset());
            let joined = joined.and_then(|last| Extent::new(last.offset(), last.len() + extent.len()));
            if let (Some(joined), Some(last)) = (joined, differences.last_mut()) {
                *last = joined;
            } else if differences.len() < MOST_DIFFERENCES {
                differences.push(extent);
            }
        }
    }

    fn differences(&self) -> MutexGuard<'_, Vec<Extent>> {
        // A list is whole whoever panicked beside it.
        self.progress.differences.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What listening and talking have in common.
struct Shared {
    pass: PassId,
    window: u64,
    /// Asks the reading thread for what is to be sent, and tells it what comes.
    asks: mpsc::Sender<Ask>,
    /// Window cost given back, and frames carried out, both since the pass began.
    returned: AtomicU64,
    carried_out: AtomicU64,
    /// Ranges that were refused, and so asked for again.
    refused: AtomicU64,
    refused_bytes: AtomicU64,
    /// Where the first of them begins.
    refused_from: AtomicU64,
    /// What the commit says that was sent.
    committed_bytes: AtomicU64,
    /// Whether the commit was sent, or is being.
    committing: AtomicBool,
    /// Up to where digests came, and up to where the peer was told that they are dealt with.
    digested: AtomicU64,
    covered: AtomicU64,
    /// Ranges whose blocks' digests were asked for.
    refining: Mutex<VecDeque<Extent>>,
    /// One of the above changed.
    news: Notify,
}

impl Shared {
    fn new(pass: PassId, window: u64, asks: mpsc::Sender<Ask>) -> Shared {
        Shared {
            pass,
            window,
            asks,
            returned: AtomicU64::new(0),
            carried_out: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            refused_bytes: AtomicU64::new(0),
            refused_from: AtomicU64::new(u64::MAX),
            committed_bytes: AtomicU64::new(0),
            committing: AtomicBool::new(false),
            digested: AtomicU64::new(0),
            covered: AtomicU64::new(0),
            refining: Mutex::new(VecDeque::new()),
            news: Notify::new(),
        }
    }

    /// Takes in how far the peer is, and whether anything went on with that. Without anything new it is only a sign of life;
    /// but once all is sent nothing else comes, and a group may wait long for its other machines.
    fn went_on(&self, progress: &Header) -> bool {
        let new = self.carried_out.fetch_max(progress.sequence, Ordering::Relaxed) < progress.sequence;
        self.returned.fetch_max(progress.length, Ordering::Release);
        self.news.notify_one();
        new || self.committing.load(Ordering::Relaxed)
    }

    /// Until the acknowledgement of the commit.
    async fn listen<S: AsyncRead + AsyncWrite>(
        &self,
        reader: &mut ReadHalf<S>,
        job: &Job,
    ) -> Result<Committed, Error> {
        loop {
            let header = heard(wire::read_header(reader)).await?;
            match header.kind {
                Kind::Refused => {
                    let extent = Extent::new(header.offset, header.length)
                        .filter(|extent| extent.end() <= job.source.size().0)
                        .ok_or(Error::Broken("it refused a range that the source does not have"))?;
                    job.progress.again.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%extent, "the master target refused a damaged frame; it is sent again");
                    if self.refused.load(Ordering::Relaxed) >= MAX_DAMAGED {
                        return Err(Error::Damaged(MAX_DAMAGED));
                    }
                    self.refused_bytes.fetch_add(extent.len(), Ordering::Relaxed);
                    self.refused_from.fetch_min(extent.offset(), Ordering::Relaxed);
                    // Before the count is raised: who sees the count can count on the thread's answer.
                    self.asks.send(Ask::Send(extent)).ok();
                    self.refused.fetch_add(1, Ordering::Release);
                    self.news.notify_one();
                }
                Kind::Progress => {
                    if self.went_on(&header) {
                        job.arrived();
                    }
                }
                Kind::Digests => {
                    self.digests(reader, &header, job.source.size().0).await?;
                    job.arrived();
                }
                Kind::Notice => {
                    let notice: Notice = heard(wire::read_message_body(reader, &header)).await?;
                    tracing::warn!("{}", notice.message);
                }
                _ => {
                    let committed: Committed = heard(wire::read_message_body(reader, &header)).await?;
                    if committed.pass != self.pass {
                        return Err(wire::Error::Unexpected {
                            found: Kind::Committed,
                            expected: Kind::Progress,
                        }
                        .into());
                    }
                    if !self.committing.load(Ordering::Acquire) {
                        return Err(Error::Broken("it acknowledged a commit before there was one"));
                    }
                    if committed.written.checked_add(committed.zeroed)
                        != Some(self.committed_bytes.load(Ordering::Relaxed))
                    {
                        return Err(Error::Broken("it acknowledged another number of bytes than were sent"));
                    }
                    return Ok(committed);
                }
            }
        }
    }

    /// Takes digests, if they are those that were due, and no more than may come ahead.
    async fn digests<S: AsyncRead + AsyncWrite>(
        &self,
        reader: &mut ReadHalf<S>,
        header: &Header,
        size: u64,
    ) -> Result<(), Error> {
        let Some(extent) = Extent::new(header.offset, header.length).filter(|extent| extent.end() <= size)
        else {
            return Err(Error::Broken("it sent digests of what the source does not have"));
        };
        let mut payload = vec![0; header.payload_len as usize];
        heard(wire::read_payload(reader, header, &mut payload)).await?;
        let (digests, rest) = payload.as_chunks::<{ digest::LEN }>();
        debug_assert!(rest.is_empty());
        let digests: Vec<Digest> = digests.to_vec();
        let ask = if header.sequence == u64::from(digest::FINE) {
            let due = self.refining.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            if due != Some(extent) {
                return Err(Error::Broken("it sent digests of blocks that were not asked for"));
            }
            Ask::Blocks(digests)
        } else {
            let due = self.digested.load(Ordering::Relaxed);
            let whole = extent.end() == size || extent.end().is_multiple_of(digest::UNIT.into());
            if header.sequence != u64::from(digest::UNIT) || extent.offset() != due || !whole {
                return Err(Error::Broken("it sent other digests than were due"));
            }
            if extent.end() - self.covered.load(Ordering::Relaxed) > AHEAD + u64::from(digest::UNIT) * 2048 {
                return Err(Error::Broken("it sends digests further ahead than it may"));
            }
            self.digested.store(extent.end(), Ordering::Relaxed);
            Ask::Units(digests)
        };
        self.asks.send(ask).ok();
        Ok(())
    }

    /// What of `cost`, the window that all frames took so far, was not given back.
    fn outstanding(&self, cost: u64) -> Result<u64, Error> {
        cost.checked_sub(self.returned.load(Ordering::Acquire))
            .ok_or(Error::Broken("it gave back more window than was taken"))
    }

    /// Writes the frames that are dealt to the first connection, beside what only that one carries. Ends only where writing
    /// fails.
    async fn carry<W: AsyncWrite + Unpin>(
        &self,
        writer: &tokio::sync::Mutex<W>,
        dealt: &Dealt,
        outlet: &Outlet,
    ) -> Result<(), Error> {
        while let Some(piece) = dealt.next().await {
            outlet.deliver(&mut *writer.lock().await, &piece).await?;
        }
        std::future::pending().await
    }

    /// Sends everything and the commit. Frames are dealt to whichever connection is free; where there is one, they are
    /// written in order with all else.
    async fn talk<W: AsyncWrite + Unpin>(
        &self,
        writer: &tokio::sync::Mutex<W>,
        mut pieces: tokio::sync::mpsc::Receiver<Output>,
        deal: Option<&tokio::sync::mpsc::Sender<Piece>>,
        outlet: &Outlet,
        job: &Job,
    ) -> Result<(), Error> {
        let (mut sequence, mut cost, mut bytes, mut finished) = (0, 0, 0, 0);
        let (mut reached, mut marked) = (0, Instant::now());
        loop {
            // The source is through when the first extent and all that were refused are.
            let refused = self.refused.load(Ordering::Acquire);
            let all_sent = finished == 1 + refused;
            let carried_out = self.carried_out.load(Ordering::Relaxed);
            if carried_out > sequence {
                return Err(Error::Broken("it carried out more frames than were sent"));
            }
            if all_sent && carried_out == sequence {
                job.progress.reached.store(job.source.size().0, Ordering::Relaxed);
                break;
            }
            // Frames are carried out in whatever order: only when none is under way is it known which were.
            let due = job.scope == Scope::Whole && marked.elapsed() >= MARK;
            if due && carried_out == sequence {
                // What was refused comes again behind everything else.
                let reached = reached.min(self.refused_from.load(Ordering::Relaxed));
                job.progress.reached.store(reached, Ordering::Relaxed);
                marked = Instant::now();
            }
            let waits = due && carried_out < sequence;
            job.progress.waits.idle(!all_sent && !waits);
            let output = tokio::select! {
                biased;
                output = pieces.recv(), if !all_sent && !waits => output,
                () = self.news.notified() => continue,
            };
            job.progress.waits.idle(false);
            match output {
                Some(Output::Piece(mut piece)) => {
                    piece.header.sequence = sequence;
                    cost += piece.header.window_cost();
                    while self.outstanding(cost)? > self.window {
                        self.news.notified().await;
                    }
                    sequence += 1;
                    bytes += piece.header.length;
                    reached = reached.max(piece.header.offset + piece.header.length);
                    match deal {
                        // The other end is kept as long as this runs.
                        Some(deal) => drop(deal.send(piece).await),
                        None => outlet.deliver(&mut *writer.lock().await, &piece).await?,
                    }
                }
                Some(Output::Covered(bytes)) => {
                    self.covered.store(bytes, Ordering::Relaxed);
                    self.say(writer, &Header::covered(sequence, bytes)).await?;
                }
                Some(Output::Refine(extent)) => {
                    self.refining.lock().unwrap_or_else(PoisonError::into_inner).push_back(extent);
                    self.say(writer, &Header::refine(extent.offset(), extent.len())).await?;
                }
                Some(Output::Differs(extent)) => job.differs(extent),
                Some(Output::Finished) => finished += 1,
                Some(Output::Failed(error)) => return Err(error.into()),
                None => unreachable!("the reading thread lives while it may be asked, or says why not"),
            }
        }
        let bytes = bytes
            .checked_sub(self.refused_bytes.load(Ordering::Relaxed))
            .ok_or(Error::Broken("it refused more bytes than were sent"))?;
        if job.scope == Scope::Verify {
            return Ok(());
        }
        self.committed_bytes.store(bytes, Ordering::Relaxed);
        let Worth { kind, point_in_time } = job.still.read().await;
        self.committing.store(true, Ordering::Release);
        let Point { time, name, .. } = job.point.clone();
        let commit = Commit { pass: self.pass, frames: sequence, bytes, point_in_time, time, kind, name };
        wire::write_message(&mut *writer.lock().await, sequence, &commit).await?;
        Ok(())
    }

    /// Says something that is all header.
    async fn say<W: AsyncWrite + Unpin>(
        &self,
        writer: &tokio::sync::Mutex<W>,
        header: &Header,
    ) -> Result<(), Error> {
        let mut writer = writer.lock().await;
        wire::write_header(&mut *writer, header).await?;
        writer.flush().await.map_err(|source| wire::Error::Io { op: "write", source })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_of_life_counts_once_all_is_sent() {
        let shared = Shared::new(PassId(1), 1, mpsc::channel().0);
        let sign = |frames| Header::progress(frames, 0);
        assert!(shared.went_on(&sign(3)));
        assert!(!shared.went_on(&sign(3)));
        shared.committing.store(true, Ordering::Relaxed);
        assert!(shared.went_on(&sign(3)));
    }
}
