//! The server's side of a connection: from the first hello to the last acknowledgement.
//!
//! What a session may touch is decided by its [`Host`]: the agent, with its protections and disks; the tests,
//! with disks in memory. The session itself knows the protocol (see [`crate::net`]) and keeps its promises:
//! nothing is allocated before it is bounded, bytes with a bad checksum do not reach the volume, and a commit
//! is answered after the volume's flush succeeded and the host's record of it is durable.

mod coverage;
mod digester;
mod intake;
mod lanes;
mod numbers;
mod receiving;
mod report;
mod stage;
mod verifying;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::timeout;

use self::digester::Comparing;
pub use self::digester::DEPTH as DIGEST_DEPTH;
use self::intake::Intake;
pub use self::lanes::Lanes;
use self::receiving::{Ended, Receiving, protocol};
use self::report::Report;
pub use self::stage::Stage;
use super::frame::{Encoding, Kind, MAX_DATA};
use super::message::{
    self, Begin, Code, Commit, Enroll, EnrollReply, Hello, HelloReply, Join, JoinReply, Open, OpenReply,
};
use super::wire;
use crate::error::{IoError, chain};
use crate::journal::Writer;
use crate::name::Name;
use crate::points::PointId;
use crate::storage::Storage;
use crate::sys::aligned::Arena;
use crate::volume::counters::Counters;
use crate::volume::{Events, Fault, Volume};

/// What a session needs of the program around it. All methods may block; sessions call them off the runtime.
pub trait Host: Send + Sync + 'static {
    /// Gives a certificate to a machine that proves a token's secret.
    fn enroll(&self, peer: SocketAddr, request: &Enroll) -> Result<EnrollReply, message::Error>;

    /// Opens the target disk that belongs to `open.disk` of `machine`, if all rules allow it. The volume
    /// reports to `events`.
    fn open(
        &self,
        peer: SocketAddr,
        machine: &Name,
        open: &Open,
        events: Events,
    ) -> Result<Opened, message::Error>;

    /// Opens the same disk only to look at it, as at its newest point where it has one: beside whoever writes it then.
    fn view(&self, peer: SocketAddr, machine: &Name, open: &Open) -> Result<Viewed, message::Error>;
}

/// A volume that is only looked at.
pub struct Viewed {
    /// The size of the target disk in bytes.
    pub device_size: u64,
    /// Its logical block size in bytes.
    pub block: u32,
    /// The point that is looked at; with none, nobody writes to the disk meanwhile.
    pub baseline: Option<PointId>,
    /// Opens what is looked at for reading. A point that is let go of is an error, which may be a [`message::Error`].
    pub reader: Reader,
    /// Up to where the client has compared it.
    pub covered: Arc<AtomicU64>,
    /// What must last as long as it is looked at.
    pub hold: Box<dyn Send>,
}

/// An open volume.
pub struct Opened {
    /// The volume itself.
    pub volume: Volume,
    /// The size of the target disk in bytes.
    pub device_size: u64,
    /// Its logical block size in bytes.
    pub block: u32,
    /// Opens the same device once more, for reading, with buffers from the arena.
    pub reader: Reader,
    /// The point at which it stands.
    pub baseline: Option<PointId>,
    /// Whether it likely holds much of what the source does.
    pub alike: bool,
    /// Whether it holds the baseline, of a source of this size, and nothing else.
    pub standing: bool,
    /// For a pass of a group's point, the point, and how far it is.
    pub group: Option<(PointId, watch::Receiver<Stage>)>,
    /// The window to grant, in bytes; at least one data frame and at most the volume's arena.
    pub window: u64,
    /// How many connections may carry the pass.
    pub connections: u32,
    /// What the session counts.
    pub counters: Arc<Counters>,
    /// Where passes are recorded.
    pub passes: Box<dyn Passes>,
    /// What must last until the volume is closed, however long that takes: the right to write to it.
    pub hold: Box<dyn Send>,
}

/// Opens a queue of [`DIGEST_DEPTH`] requests for reading a volume.
pub type Reader = Box<dyn FnOnce(&Arena) -> Result<Box<dyn Storage>, IoError> + Send>;

/// The durable record of a volume's passes. What a method did is on stable storage when it returns.
///
/// It is dropped where the pass ends before its [`prepare`](Self::prepare): whoever waits for it learns so then.
pub trait Passes: Send {
    /// A pass begins.
    fn begin(&mut self, begin: &Begin) -> Result<Begun, message::Error>;
    /// The volume holds the pass, whole and durable, with `saved` bytes in its journal. [`Stage::Recorded`] comes once all
    /// disks of the point have said so. A crash before that leaves an open pass.
    fn prepare(&mut self, commit: &Commit, saved: u64) -> Result<(), message::Error>;
    /// The point is recorded.
    fn committed(&mut self, commit: &Commit) -> Result<(), message::Error>;
    /// A write or flush failed.
    fn fault(&mut self, fault: &Fault) -> Result<(), message::Error>;
}

/// A pass that began.
pub struct Begun {
    /// For a delta pass, the journal that saves what it overwrites; for an initial one `None`: from here on the content of
    /// the volume is neither the old nor the new.
    pub writer: Option<Writer>,
    /// How far the point is that it leads to.
    pub stage: watch::Receiver<Stage>,
}

/// Which sessions must end.
#[derive(Debug, Default)]
pub struct Ending {
    /// All of them: the service stops.
    pub service: bool,
    /// Those of machines that are being failed over; also those that come before the given moment.
    pub machines: HashMap<Name, Instant>,
}

impl Ending {
    /// Why the sessions of this machine must end, if they must.
    fn reason(&self, machine: Option<&Name>) -> Option<message::Error> {
        if self.service {
            let text = "the service stops; run `mt-agent send` again once it is back";
            return Some(message::Error::new(Code::ShuttingDown, text));
        }
        let until = self.machines.get(machine?)?;
        (Instant::now() < *until).then(|| {
            let text =
                "the machine is being failed over on the master target, which receives nothing more for it";
            message::Error::new(Code::Refused, text)
        })
    }
}

/// How long a session waits.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a message that the protocol's state demands.
    pub handshake: Duration,
    /// For the other machines of a group; and for the other disks of a client that compares.
    pub gather: Duration,
    /// From an open disk to its pass: the client's hooks run then, and its file systems are frozen.
    pub begin: Duration,
    /// For a sign of life in an open pass, while the server has nothing left to carry out.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            handshake: Duration::from_secs(15),
            gather: Duration::from_secs(5 * 60),
            begin: Duration::from_secs(10 * 60),
            idle: Duration::from_secs(300),
        }
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
    /// Another connection that carries the pass ended before its commit, for this reason where the peer is to hear of one.
    #[error("another connection of the pass ended")]
    Lane(Option<message::Error>),
    /// There is no room for another session.
    #[error("refused: `max_sessions` connections are open")]
    Full,
}

impl Error {
    fn to_peer(&self) -> Option<message::Error> {
        match self {
            Error::Wire(error) => error.to_peer(),
            Error::Refused(error) => Some(error.clone()),
            Error::Silent(_) => {
                let text = format!("{self}: it, or the way between, may be stalled; connect again");
                Some(message::Error::new(Code::Silent, text))
            }
            Error::Lane(why) => why.clone(),
            Error::Full => {
                let text = "`max_sessions` connections are open on the master target";
                Some(message::Error::new(Code::Busy, text))
            }
        }
    }
}

/// Who a connection comes from.
pub struct Guest {
    /// Its address.
    pub peer: SocketAddr,
    /// The machine that its certificate names; without one it may only enrol.
    pub machine: Option<Name>,
    /// What it counts as. One that carries the pass of another counts among that session's and gives this back.
    pub place: Box<dyn Send>,
    /// Whether there is room for a session.
    pub room: bool,
}

/// Speaks with one client until it closes the connection, or must end.
pub async fn serve<S>(
    stream: S,
    mut guest: Guest,
    host: Arc<dyn Host>,
    lanes: &Lanes,
    patience: Patience,
    ending: watch::Receiver<Ending>,
) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut reader, writer) = tokio::io::split(stream);
    let writer = Mutex::new(writer);
    let result = converse(&mut reader, &writer, &mut guest, host, lanes, patience, ending).await;
    let mut writer = writer.into_inner();
    match &result {
        Ok(()) => {
            timeout(CLOSING, writer.shutdown()).await.ok();
        }
        Err(error) => part(reader, writer, error.to_peer()).await,
    }
    result
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

/// Waits until the session must end.
async fn stopped(ending: &mut watch::Receiver<Ending>, machine: Option<&Name>) -> Error {
    let reason = match ending.wait_for(|ending| ending.reason(machine).is_some()).await {
        Ok(ending) => ending.reason(machine),
        Err(_) => None,
    };
    match reason {
        Some(reason) => reason.into(),
        // Whoever could say so is gone; or the machine may be received again, in this very moment.
        None => std::future::pending().await,
    }
}

/// Runs what may block off the runtime.
async fn off_runtime<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    // What it logs is of the same machine and disk.
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
        .await
        .map_err(|_| message::Error::new(Code::Internal, "a task of the agent failed; see its log").into())
}

fn out_of_range(error: crate::volume::OutOfRange) -> Error {
    Error::Refused(message::Error::new(Code::OutOfRange, error.to_string()))
}

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    reader: &mut ReadHalf<S>,
    writer: &Mutex<WriteHalf<S>>,
    guest: &mut Guest,
    host: Arc<dyn Host>,
    lanes: &Lanes,
    patience: Patience,
    mut ending: watch::Receiver<Ending>,
) -> Result<(), Error> {
    let (peer, machine) = (guest.peer, guest.machine.clone());
    let greeting = tokio::select! {
        greeting = within(patience.handshake, wire::read_message(reader)) => greeting,
        error = stopped(&mut ending, machine.as_ref()) => return Err(error),
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
        error = stopped(&mut ending, machine.as_ref()) => return Err(error),
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
    if header.kind == Kind::Join {
        let join: Join = within(patience.handshake, wire::read_message_body(reader, &header)).await?;
        tracing::Span::current().record("disk", tracing::field::display(&join.disk));
        let lane = lanes.join(&machine, &join)?;
        guest.place = Box::new(());
        wire::write_message(&mut *writer.lock().await, 0, &JoinReply {}).await?;
        return lane.run(reader).await;
    }
    if !guest.room {
        return Err(Error::Full);
    }
    let open: Open = within(patience.handshake, wire::read_message_body(reader, &header)).await?;
    tracing::Span::current().record("disk", tracing::field::display(&open.disk));
    let (source_size, disk) = (open.size, open.disk.clone());
    if source_size == 0 {
        return Err(protocol("a source of 0 bytes"));
    }
    if open.verify {
        let of_machine = machine.clone();
        let viewed = off_runtime(move || host.view(peer, &of_machine, &open)).await??;
        let stopped = stopped(&mut ending, Some(&machine));
        return verifying::verify(reader, writer, viewed, source_size, patience, stopped).await;
    }
    let report = Arc::new(Report::default());
    let (fault_sender, mut fault) = oneshot::channel();
    let events = report.clone().events(fault_sender);
    let encodings = open.compression.clone();
    let of_machine = machine.clone();
    let opened = off_runtime(move || host.open(peer, &of_machine, &open, events)).await??;
    let Opened {
        volume,
        device_size,
        block,
        reader: digests_of,
        baseline,
        alike,
        standing,
        group,
        window,
        connections,
        counters,
        passes,
        hold,
    } = opened;
    let (point, stage) = group.unzip();
    report.counters.get_or_init(|| counters.clone());
    let encodings: Vec<Encoding> =
        encodings.into_iter().filter(|encoding| *encoding != Encoding::Raw).collect();
    let (lose, mut lost) = mpsc::channel(1);
    let (digests, mut digested) = mpsc::channel(2);
    let intake = Arc::new(Intake {
        volume,
        counters,
        report,
        window,
        encodings: encodings.clone(),
        idle: patience.idle,
        pass: Default::default(),
        comparing: Comparing::Possible { reader: digests_of, output: digests }.into(),
        moved: watch::Sender::new(()),
        lost: lose,
        over: watch::Sender::new(false),
    });
    let (inviting, places, join) = lanes.invite(&machine, &disk, connections, &intake)?;
    let reply = OpenReply {
        window,
        max_payload: MAX_DATA as u32,
        volume_size: device_size,
        block,
        compression: encodings,
        baseline,
        alike,
        standing,
        point,
        join,
    };
    let mut pass =
        Receiving { intake, passes, source_size, patience, stage, inviting: Some(inviting), places };
    let stopped = async {
        tokio::select! {
            error = stopped(&mut ending, Some(&machine)) => error,
            Some(error) = lost.recv() => error,
        }
    };
    let result = pass.run(reader, writer, &reply, &mut fault, &mut digested, stopped).await;
    // Its thread has nobody to talk to any more, and ends.
    drop(digested);
    let Receiving { intake, mut passes, inviting, places, .. } = pass;
    drop(inviting);
    intake.end();
    places.empty().await;
    // The device is closed before the connection is: a sender that connects again finds it free. Only a disk that
    // hangs keeps it open longer, and that is no reason to let the sender wait for its answer.
    let closing = off_runtime(move || {
        if let Some(Intake { volume, comparing, .. }) = Arc::into_inner(intake) {
            drop(comparing);
            volume.close();
        }
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
