//! The receiving of a pass, over its first connection: the order of things, and the commit.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::timeout;

use super::digester::{self, Comparing, Digester, send_digests, unreadable};
use super::intake::{Intake, Pass};
use super::lanes::{Inviting, Places};
use super::report::{Heard, patiently, report_progress};
use super::stage::{Stage, reached};
use super::{Begun, CLOSING, Error, Passes, Patience, off_runtime, out_of_range, within};
use crate::error::IoError;
use crate::net::frame::{COST_UNIT, DIGEST_UNITS, Header, Kind};
use crate::net::message::{self, Begin, BeginReply, Code, Commit, Committed, OpenReply, PassKind};
use crate::net::wire;
use crate::pass::PassId;
use crate::sys::aligned::Arena;
use crate::units::Extent;
use crate::volume::Fault;
use crate::volume::counters::Phase;

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
    pub(super) intake: Arc<Intake>,
    pub(super) passes: Box<dyn Passes>,
    pub(super) source_size: u64,
    pub(super) patience: Patience,
    /// How far the point is that the pass leads to; before its beginning only of a group's.
    pub(super) stage: Option<watch::Receiver<Stage>>,
    /// Until the pass begins, other connections may join.
    pub(super) inviting: Option<Inviting>,
    pub(super) places: Places,
}

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
        let report = self.intake.report.clone();
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
        report.close();
        timeout(CLOSING, async { tokio::join!(progress, digests) }).await.ok();
        result
    }

    async fn receive<S: AsyncRead + AsyncWrite>(
        &mut self,
        reader: &mut ReadHalf<S>,
        writer: &Mutex<WriteHalf<S>>,
        reply: &OpenReply,
    ) -> Result<(), Error> {
        let intake = self.intake.clone();
        let reader = &mut Heard { reader, report: intake.report.clone() };
        if let Some(stage) = &mut self.stage {
            let gathered = |stage: &Stage| !matches!(stage, Stage::Gathering(_));
            reached(stage, gathered, self.patience.gather, reader, writer).await?;
        }
        wire::write_message(&mut *writer.lock().await, 0, reply).await?;
        let mut packed = Vec::new();
        loop {
            let patience = if intake.pass().is_none() { self.patience.begin } else { intake.idle };
            let header = match patiently(&intake.report, patience, wire::read_header(reader)).await {
                Err(Error::Wire(wire::Error::Closed)) if !intake.is_open() => return Ok(()),
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
                    intake.report.begun();
                    // Not before: the reply is the first that the client hears.
                    if let Some(unit) = compare {
                        self.compare(unit).await?;
                    }
                }
                Kind::Covered => intake.covered(header.sequence, header.length, self.source_size)?,
                Kind::Refine => self.refine(&header)?,
                Kind::Data | Kind::Zero => intake.take(reader, &header, &mut packed).await?,
                Kind::Commit => {
                    let commit =
                        within(self.patience.handshake, wire::read_message_body(reader, &header)).await?;
                    intake.until(|pass| pass.has_all(header.sequence)).await?;
                    // Nothing may follow a commit. That the client goes away is noticed while its point waits for
                    // other disks.
                    let mut next = pin!(wire::read_header(reader));
                    let committed = tokio::select! {
                        committed = self.commit(header.sequence, commit) => committed?,
                        early = &mut next => return Err(early.map_or_else(Error::from, after_the_commit)),
                    };
                    intake.report.answered();
                    wire::write_message(&mut *writer.lock().await, header.sequence, &committed).await?;
                    // All is said. Whoever does not close nevertheless keeps neither the disk nor a place.
                    return match timeout(CLOSING, next).await {
                        Ok(Err(wire::Error::Closed)) | Err(_) => Ok(()),
                        Ok(other) => Err(after_the_commit(other?)),
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
        if self.intake.pass().is_some() {
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
            self.intake.volume.save(writer);
        }
        self.stage = Some(stage);
        self.intake.counters.begin(id.to_string());
        // From here on nobody joins.
        self.inviting = None;
        let joined = self.places.taken();
        self.intake.counters.connections.store(1 + u64::from(joined), Ordering::Relaxed);
        *self.intake.pass() = Some(Pass::new(id, kind, joined > 0));
        Ok(compare)
    }

    /// Begins to send digests.
    async fn compare(&mut self, unit: u32) -> Result<(), Error> {
        let possible = std::mem::replace(&mut *self.intake.comparing(), Comparing::No);
        let Comparing::Possible { reader, output } = possible else {
            return Err(protocol("a connection carries one pass"));
        };
        let size = self.source_size;
        let started = off_runtime(move || {
            let arena = Arena::new(digester::MEMORY).map_err(|error| IoError::new("map", "memory", error))?;
            Digester::start(reader(&arena)?, arena, size, unit, output)
        });
        let digester = started.await?.map_err(|error| unreadable(&error))?;
        *self.intake.comparing() = Comparing::Running(digester);
        Ok(())
    }

    fn refine(&self, header: &Header) -> Result<(), Error> {
        let comparing = self.intake.comparing();
        let Comparing::Running(digester) = &*comparing else {
            return Err(protocol("a Refine frame where nothing is compared"));
        };
        let Some(extent) = Extent::new(header.offset, header.length) else {
            return Err(protocol("an empty range"));
        };
        self.intake.volume.check(extent).map_err(out_of_range)?;
        match digester.refine(extent) {
            true => Ok(()),
            false => Err(protocol(format!("over {} ranges wait to be refined", digester::MOST_WISHES))),
        }
    }

    async fn commit(&mut self, sequence: u64, commit: Commit) -> Result<Committed, Error> {
        let intake = self.intake.clone();
        let (id, written, zeroed) = self.close(sequence, &commit)?;
        intake.counters.enter(Phase::Committing);
        intake.volume.flush();
        // A fault ends the session from outside of this future.
        intake.report.flushed.notified().await;
        let saved = intake.report.saved.load(Ordering::Relaxed);
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
        intake.counters.enter(Phase::Synchronized);
        Ok(Committed { pass: id, written, zeroed, time })
    }

    /// Closes the pass, where the commit counts what came; gives back its name, and how many bytes were written and made
    /// zero.
    fn close(&self, sequence: u64, commit: &Commit) -> Result<(PassId, u64, u64), Error> {
        let mut pass = self.intake.pass();
        let Some(pass) = pass.as_mut().filter(|pass| pass.open && pass.id == commit.pass) else {
            return Err(protocol("a commit of a pass that is not open"));
        };
        let received = (pass.numbers.due(), pass.written + pass.zeroed);
        if received != (commit.frames, commit.bytes) {
            let text = format!(
                "the commit counts {} frames and {} bytes, and {} and {} were accepted",
                commit.frames, commit.bytes, received.0, received.1
            );
            return Err(protocol(text));
        }
        pass.numbers.check(sequence)?;
        // One that came since the commit began would be written behind its flush.
        if !pass.is_complete() {
            return Err(protocol("a frame came over another connection that is numbered beyond the commit"));
        }
        if let Some(refused) = pass.coverage.first_refused() {
            return Err(protocol(format!("{refused} were refused and did not come again")));
        }
        // An initial pass leaves nothing out: what it does not send it makes zero, or knows to be the same.
        let whole = match &*self.intake.comparing() {
            Comparing::Running(_) => pass.coverage.is_whole(self.source_size),
            _ => commit.bytes == self.source_size,
        };
        if pass.kind == PassKind::Initial && !whole {
            let text = format!("the pass covers {} of the source's {} bytes", commit.bytes, self.source_size);
            return Err(protocol(text));
        }
        pass.open = false;
        Ok((pass.id, pass.written, pass.zeroed))
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

// The window's smallest cost is that of an arena's page, so that a window of commands fits the arena.
const _: () = assert!(COST_UNIT as usize == crate::sys::aligned::PAGE);
