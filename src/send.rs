//! The source side: reads the disks of a machine and sends them to its master target.
//!
//! Each disk has a thread that reads ahead, finds zeros, compresses and checksums ([`source`]), and one connection
//! or several ([`lanes`], `session`). [`send`] runs them side by side and returns when the last commit was acknowledged. Before
//! anything is read the machine can be made to stand still ([`still`]): by hooks, and by freezing its file systems.

pub mod alone;
mod compare;
mod encode;
mod error;
pub mod free;
pub mod freeze;
pub mod hints;
pub mod hook;
pub mod lanes;
pub mod limit;
mod mark;
mod session;
pub mod source;
pub mod still;
mod waits;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

pub use encode::Compression;
pub use error::Error;

use crate::error::{IoError, chain};
use crate::name::Name;
use crate::net::address::Address;
use crate::net::keepalive;
use crate::net::message::{Code, Committed, OpenReply};
use crate::net::tls::{self, HandshakeError};
use crate::points::PointId;
use crate::storage::device::EngineChoice;
use free::{Free, Space};
use hints::Hints;
use lanes::Connections;
use limit::{Limiter, Rates};
use source::Source;
use still::{Freeze, Still, unsteady};
use waits::Waits;

use crate::units::Extent;

/// What to send, and where.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where the master target listens.
    pub to: Address,
    /// The machine's names for its disks, and where they are read.
    pub disks: Vec<(Name, PathBuf)>,
    /// How to compress.
    pub compression: Compression,
    /// How to read.
    pub engine: EngineChoice,
    /// Bytes a second on the wire, all disks together.
    pub limit: Option<Rates>,
    /// How many connections carry each disk.
    pub connections: Connections,
    /// What the user calls the point, if anything.
    pub name: Option<Name>,
    /// The consistency group of the machine whose point this is, if any.
    pub group: Option<Name>,
    /// What to send, or to look at.
    pub scope: Scope,
    /// Whether free space is sent like anything else.
    pub whole_disk: bool,
    /// Whether the sources may have other sizes than those that were sent before.
    pub resized: bool,
    /// Whether they may be other disks, of whatever size.
    pub another: bool,
    /// What a tracker says has changed since the last point of each disk: a superset of what has.
    pub hints: BTreeMap<Name, PathBuf>,
    /// Up to where earlier attempts at the same have written each disk, as [`Progress::reached`] says: with [`Scope::Whole`],
    /// what is to be compared and not sent again.
    pub sent: BTreeMap<Name, u64>,
    /// How long a master target that has no time, or does not answer, is asked again for a disk; and not too often.
    pub wait: Duration,
}

/// What a pass is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Scope {
    /// What differs, where the target likely holds much of the source; else everything. With hints only they are looked
    /// at.
    #[default]
    Differences,
    /// What differs, and what of it the hints do not tell.
    CheckHints,
    /// Everything, whatever the target says that it holds; but for what an earlier attempt at the same has written.
    Whole,
    /// Nothing is sent: what differs is told.
    Verify,
}

/// The point to which the passes of all disks lead.
#[derive(Clone, Debug)]
pub struct Point {
    /// Its name for programs.
    pub id: PointId,
    /// All disks of it.
    pub disks: Vec<Name>,
    /// The moment that the disks will stand at.
    pub time: OffsetDateTime,
    /// Its name for people.
    pub name: Option<Name>,
}

/// How far one disk is: for showing.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of the source that were read.
    pub read: AtomicU64,
    /// How many bytes of the source are zeros, or count as such, and were not sent.
    pub zero: AtomicU64,
    /// How many bytes of the source the receiver has already.
    pub same: AtomicU64,
    /// Bytes of payload that went over the wire.
    pub sent: AtomicU64,
    /// Bytes of the source that are sent (or skipped as zeros).
    pub done: AtomicU64,
    /// Where the receiver has something else, when source and target are only compared, or the hints did not tell so: the
    /// first [`MOST_DIFFERENCES`].
    pub differences: Mutex<Vec<Extent>>,
    /// How many bytes of such there are in all.
    pub differs: AtomicU64,
    /// How many more differ in space that was free when the comparing began, of a source in use: what is free there may not
    /// be for long, and what it holds does not matter as long as it is.
    pub differs_free: AtomicU64,
    /// The point at which the target stands, once it is known, if it does at any.
    pub baseline: OnceLock<PointId>,
    /// What of the source is free, once that was looked for.
    pub space: OnceLock<Space>,
    /// How many connections carry it, once the pass began.
    pub connections: AtomicU64,
    /// The size of the target, once it is known.
    pub target: AtomicU64,
    /// Frames that the receiver refused as damaged, and that were sent again.
    pub again: AtomicU64,
    /// Whether the receiver cannot take it yet, and is asked again.
    pub waiting: AtomicBool,
    /// Whether the receiver has opened it.
    pub opened: AtomicBool,
    /// With [`Scope::Whole`], up to where of the source everything was sent, and written there. Looked at every few seconds.
    pub reached: AtomicU64,
    /// When something of it arrived for the last time: frames there, or digests here.
    pub arrived: Mutex<Option<Instant>>,
    /// Whether its source is what is waited for.
    pub waits: Waits,
    /// Why the hints were not relied on, where they were not.
    pub set_aside: OnceLock<&'static str>,
    /// Whether a pass began in which the hints were held against what differs ([`Scope::CheckHints`]): in this attempt, or in
    /// an [earlier](Progress::add_missed) one. With [`Progress::set_aside`] as well they were not judged to the end.
    pub judged: AtomicBool,
}

impl Progress {
    /// Adds what an earlier attempt at the same found that hints do not tell: it may have been sent then, so that it does not
    /// differ any more.
    pub fn add_missed(&self, earlier: &Progress) {
        self.judged.fetch_or(earlier.judged.load(Ordering::Relaxed), Ordering::Relaxed);
        // A list is whole whoever panicked beside it.
        let before = earlier.differences.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut now = self.differences.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = hints::merged([&*now, &before[..]].concat());
        let listed: u64 = all.iter().map(|extent| extent.len()).sum();
        // The lists end somewhere, and the counts do not.
        let most = listed.max(earlier.differs.load(Ordering::Relaxed));
        self.differs.fetch_max(most, Ordering::Relaxed);
        all.truncate(MOST_DIFFERENCES);
        *now = all;
    }
}

/// How many ranges that differ are told of.
pub const MOST_DIFFERENCES: usize = 10_000;

/// How much of its volume a receiver may send digests of before they are looked at.
const AHEAD: u64 = 256 << 20;

/// What became of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Done {
    /// It was sent, and is durable, in this point.
    Committed(Committed, PointId),
    /// It was compared.
    Compared,
}

/// A disk that is ready to be sent.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Its name.
    pub name: Name,
    /// The open source.
    pub source: Arc<Source>,
    /// How far it is.
    pub progress: Arc<Progress>,
}

/// Opens all sources, so that nothing is sent where one of them is missing.
pub fn prepare(plan: &Plan) -> Result<Vec<Prepared>, source::Error> {
    plan.disks
        .iter()
        .map(|(name, path)| {
            let source = Arc::new(Source::open(path)?);
            Ok(Prepared { name: name.clone(), source, progress: Arc::default() })
        })
        .collect()
}

/// Sends all disks side by side, one pass each, which lead to one point: all of them are committed, or none. `ended` gets
/// the result of each as soon as it is there, with its place in the plan. Dropped before its end, it breaks off those
/// disks of which nothing was heard. Whatever happened, [`Still::end`] is to be called afterwards.
pub async fn send(
    plan: &Plan,
    tls: Arc<ClientConfig>,
    still: &Arc<Still>,
    disks: Vec<Prepared>,
    mut ended: impl FnMut(usize, Result<Done, Error>),
) {
    let names: Vec<Name> = disks.iter().map(|disk| disk.name.clone()).collect();
    let mut opening = JoinSet::new();
    for (index, disk) in disks.iter().enumerate() {
        let one = session::Opening {
            disk: disk.name.clone(),
            source: disk.source.clone(),
            compression: plan.compression,
            resized: plan.resized,
            another: plan.another,
            verify: plan.scope == Scope::Verify,
            group: plan.group.clone(),
            disks: names.clone(),
            // What is only compared sends next to nothing.
            connections: match plan.scope {
                Scope::Verify => Connections::Exactly(1),
                _ => plan.connections,
            },
        };
        let (to, tls, progress, wait) = (plan.to.clone(), tls.clone(), disk.progress.clone(), plan.wait);
        opening.spawn(async move { (index, open_one(&to, tls, &one, &progress, wait).await) });
    }
    let mut opened: Vec<Option<Opened>> = names.iter().map(|_| None).collect();
    let mut heard = vec![false; names.len()];
    let failed = together(opening, |index, result| match result {
        Ok(one) => opened[index] = Some(one),
        Err(error) => {
            heard[index] = true;
            ended(index, Err(error));
        }
    });
    if let Some(failed) = failed.await {
        for index in (0..names.len()).filter(|index| !heard[*index]) {
            ended(index, Err(Error::Together(names[failed].clone())));
        }
        return;
    }
    let opened: Vec<Opened> = opened.into_iter().flatten().collect();
    let replies: Vec<&OpenReply> = opened.iter().map(|opened| &opened.reply).collect();
    let id = match replies.first().and_then(|reply| reply.point) {
        Some(id) => id,
        None => random_id(),
    };
    let all_delta = replies.iter().all(|reply| reply.baseline.is_some());
    let sources: Vec<_> = disks.iter().map(|disk| (disk.name.clone(), disk.source.clone())).collect();
    let unsteady = match still.begin(id, plan.group.as_ref(), &sources, all_delta).await {
        Ok(unsteady) => unsteady,
        Err(error) => {
            let error = Arc::new(error);
            (0..names.len()).for_each(|index| ended(index, Err(Error::Still(error.clone()))));
            return;
        }
    };
    // Of what is only compared it is known all the same, for the report: see `Progress::differs_free`.
    let in_doubt = |unsteady: &Option<String>| {
        unsteady.clone().filter(|_| plan.scope == Scope::Verify && !plan.whole_disk)
    };
    let in_doubt: Vec<Option<String>> = unsteady.iter().map(in_doubt).collect();
    let look: Vec<_> = disks
        .iter()
        .zip(&replies)
        .zip(unsteady)
        .zip(&in_doubt)
        .map(|(((disk, reply), unsteady), in_doubt)| {
            let unsteady = unsteady.filter(|_| in_doubt.is_none());
            (disk.source.clone(), plan.why_not(&disk.name, reply.standing).or(unsteady))
        })
        .collect();
    let found = match tokio::task::spawn_blocking(move || free::find(&look)).await {
        Ok(found) => found,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    };
    let mut free = Vec::new();
    for ((disk, (ranges, space)), in_doubt) in disks.iter().zip(found).zip(in_doubt) {
        let (certain, doubtful, space) = match in_doubt {
            Some(why) => (Free::default(), ranges, Space::unknown(&why)),
            None => (ranges, Free::default(), space),
        };
        // An attempt has a progress of its own.
        disk.progress.space.set(space).ok();
        free.push((Arc::new(certain), doubtful));
    }
    // After the pre-hook, which may have made them.
    let (asked, of) = (plan.clone(), disks.clone());
    let mut hints = match tokio::task::spawn_blocking(move || asked.read_hints(&of)).await {
        Ok(Ok(hints)) => hints,
        Ok(Err((path, error))) => {
            (0..names.len()).for_each(|index| ended(index, Err(Error::Hints(path.clone(), error.clone()))));
            return;
        }
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    };
    for (disk, reply) in disks.iter().zip(&replies).filter(|(_, reply)| !reply.standing) {
        if hints.remove(&disk.name).is_some() {
            let why = not_all(reply);
            tracing::warn!(disk = %disk.name, "--changed-ranges is set aside: {why}");
            disk.progress.set_aside.set(why).ok();
        }
    }
    for disk in disks.iter().filter(|disk| plan.scope == Scope::CheckHints && hints.contains_key(&disk.name))
    {
        // Before the passes begin: whether they did is not known where an answer is lost.
        disk.progress.judged.store(true, Ordering::Relaxed);
    }
    let limiter = plan.limit.clone().map(|rates| Arc::new(Limiter::new(rates)));
    let (time, name) = (OffsetDateTime::now_utc(), plan.name.clone());
    let point = Point { id, disks: names.clone(), time, name };
    let mut passes = JoinSet::new();
    for (index, ((disk, (free, in_doubt)), opened)) in disks.into_iter().zip(free).zip(opened).enumerate() {
        let job = session::Job {
            point: point.clone(),
            still: still.clone(),
            source: disk.source,
            free,
            in_doubt,
            progress: disk.progress,
            compression: plan.compression,
            engine: plan.engine,
            limiter: limiter.clone(),
            scope: plan.scope,
            sent: plan.sent.get(&disk.name).copied().unwrap_or(0),
            hints: hints.get(&disk.name).cloned(),
        };
        let Opened { first, joined, reply } = opened;
        passes.spawn(async move { (index, session::run(first, joined, &reply, &job).await) });
    }
    let failed = together(passes, |index, result| {
        heard[index] = true;
        ended(index, result);
    });
    if let Some(failed) = failed.await {
        for index in (0..names.len()).filter(|index| !heard[*index]) {
            ended(index, Err(Error::Together(names[failed].clone())));
        }
    }
}

/// Why what has changed since the last point is not all that differs on a target that does not stand at it and at nothing else.
fn not_all(reply: &OpenReply) -> &'static str {
    match (reply.baseline, reply.alike) {
        (None, false) => "the target stands at no recovery point yet, so that all of the disk is sent",
        (None, true) => "the target stands at no recovery point yet, so that all of the disk is compared",
        (Some(_), _) => {
            "since the newest recovery point a pass was interrupted, or a failover was taken back, or the source has another \
             size than it had then, or is another disk: they do not tell all that differs, so that all of the disk is compared"
        }
    }
}

/// A file, and why it tells no ranges.
type Unread = (PathBuf, Arc<hints::Error>);

impl Plan {
    /// Reads what trackers tell of these disks.
    pub fn read_hints(&self, disks: &[Prepared]) -> Result<BTreeMap<Name, Arc<Hints>>, Unread> {
        let told = disks.iter().filter_map(|disk| Some((disk, self.hints.get(&disk.name)?)));
        told.map(|(disk, path)| match Hints::read(path, disk.source.size()) {
            Ok(hints) => Ok((disk.name.clone(), Arc::new(hints))),
            Err(error) => Err((path.clone(), Arc::new(error))),
        })
        .collect()
    }

    /// Why free space is sent although it may be known which is. `standing`: whether the target stands at a point.
    fn why_not(&self, disk: &Name, standing: bool) -> Option<String> {
        let only_hints = self.scope == Scope::Differences && self.hints.contains_key(disk) && standing;
        let why = match (self.whole_disk, only_hints) {
            (true, _) => "--whole-disk asks for all of it",
            (false, true) => "only the ranges are looked at that --changed-ranges tells",
            (false, false) => return None,
        };
        Some(why.to_owned())
    }
}

/// What of the sources would be skipped now, and who may be writing to each: for a dry run. Nothing is frozen, and no hook is
/// run. `freeze`: whether what is mounted will be frozen.
pub fn preview(plan: &Plan, freeze: bool, disks: &[Prepared]) -> Vec<(Vec<String>, Space)> {
    let freeze = if freeze { Freeze::Later } else { Freeze::No };
    let writers: Vec<Vec<String>> = disks.iter().map(|disk| disk.source.writers(&[])).collect();
    let look: Vec<_> = disks
        .iter()
        .zip(&writers)
        .map(|(disk, writers)| {
            let why = plan.why_not(&disk.name, true);
            (disk.source.clone(), why.or_else(|| unsteady(&disk.source, writers, freeze)))
        })
        .collect();
    let spaces = free::find(&look).into_iter().map(|(_, space)| space);
    writers.into_iter().zip(spaces).collect()
}

/// Waits for what is done with all disks, and gives the place of one that failed, if any did. There is no point without
/// that one: what the others would still do is for nothing, and they end. `each` hears of those that ended by themselves.
async fn together<T: 'static>(
    mut tasks: JoinSet<(usize, Result<T, Error>)>,
    mut each: impl FnMut(usize, Result<T, Error>),
) -> Option<usize> {
    // Whether it failed only because another one did, which will say why in a moment.
    let mut failed: Option<(usize, bool)> = None;
    loop {
        let joined = match failed {
            Some((_, true)) => timeout(LAST_WORDS, tasks.join_next()).await,
            Some((_, false)) | None => Ok(tasks.join_next().await),
        };
        match joined {
            Ok(Some(Ok((index, result)))) => {
                if let Err(error) = &result {
                    let because_of_another = error.code() == Some(Code::Incomplete);
                    if failed.is_none_or(|(_, because_of_another)| because_of_another) {
                        failed = Some((index, because_of_another));
                    }
                    if !because_of_another {
                        tasks.abort_all();
                    }
                }
                each(index, result);
            }
            Ok(Some(Err(error))) if error.is_cancelled() => {}
            Ok(Some(Err(panic))) => std::panic::resume_unwind(panic.into_panic()),
            Ok(None) => return failed.map(|(index, _)| index),
            Err(_) => {
                tasks.abort_all();
                failed = failed.map(|(index, _)| (index, false));
            }
        }
    }
}

/// How long the disk that takes its point with it gets to say why.
const LAST_WORDS: Duration = Duration::from_secs(3);

fn random_id() -> PointId {
    let mut bits = [0; 16];
    match getrandom::fill(&mut bits) {
        Ok(()) => PointId(u128::from_ne_bytes(bits)),
        Err(error) => unreachable!("the system has no random bits: {error}"),
    }
}

/// A connection to the master target.
type Connection = tokio_rustls::client::TlsStream<TcpStream>;

/// A disk that is open on the master target.
struct Opened {
    first: Connection,
    /// More connections for it.
    joined: Vec<Connection>,
    reply: OpenReply,
}

/// How long the master target may take for each step before data flows.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long it may be silent in a pass. Whatever it waits for itself, it says something every ten seconds.
const SILENCE: Duration = Duration::from_secs(60);

/// How often, a second after the last, a refusal is answered with another try where the peer says that it may help: the
/// volume may still be held by a connection that just broke, or by one whose sender is gone, which the peer's keepalives
/// notice after 30 seconds.
const TRIES: u32 = 40;

/// The same where the peer said nothing at all: it may have had to make room among connections that nobody knew yet.
const TRIES_UNANSWERED: u32 = 3;

/// How often to try in all, where a try to open a disk ends like this. What happens afterwards is not tried again.
fn tries(error: &Error) -> u32 {
    match error {
        Error::Refused(refusal) if refusal.code.retryable() => TRIES,
        Error::Silent(_) | Error::BrokenOff(_) | Error::Handshake(HandshakeError::Io(_)) => TRIES_UNANSWERED,
        _ => 1,
    }
}

async fn open_one(
    to: &Address,
    tls: Arc<ClientConfig>,
    opening: &session::Opening,
    progress: &Progress,
    wait: Duration,
) -> Result<Opened, Error> {
    let (mut tried, started) = (1, Instant::now());
    loop {
        let result = async {
            let turn = turn_at_the_door().await;
            let mut first = connect(to, tls.clone()).await?;
            drop(turn);
            let (reply, further) = session::open(&mut first, opening).await?;
            progress.opened.store(true, Ordering::Relaxed);
            let joined = lanes::join_all(to, &tls, &opening.disk, &reply, further).await;
            Ok(Opened { first, joined, reply })
        };
        match result.await {
            Err(error) if tried < tries(&error) && started.elapsed() < wait => {
                if tried == 1 {
                    let most = tries(&error);
                    tracing::warn!(
                        disk = %opening.disk, error = chain(&error),
                        "waiting, and trying again every second, {most} times at most"
                    );
                }
                progress.waiting.store(true, Ordering::Relaxed);
                tried += 1;
                sleep(Duration::from_secs(1)).await;
            }
            other => return other,
        }
    }
}

/// How many connections are being made at once: where every disk makes several, they would crowd each other out on the
/// master target, which bears only so many that it does not know yet; and all would be slow, near as it may be.
static DOOR: Semaphore = Semaphore::const_new(16);

/// Waits until one may be made; kept until it is.
async fn turn_at_the_door() -> Option<SemaphorePermit<'static>> {
    // It is never closed.
    DOOR.acquire().await.ok()
}

async fn connect(to: &Address, tls: Arc<ClientConfig>) -> Result<Connection, Error> {
    let connecting = async {
        let failed = |error| Error::Connect(IoError::new("connect to", to.to_string(), error));
        let tcp = TcpStream::connect((to.host(), to.port())).await.map_err(failed)?;
        keepalive::set(&tcp).map_err(failed)?;
        Ok(TlsConnector::from(tls).connect(tls::server_name(), tcp).await.map_err(HandshakeError::from)?)
    };
    timeout(PATIENCE, connecting).await.unwrap_or(Err(Error::Silent(PATIENCE)))
}

#[cfg(test)]
mod tests;
