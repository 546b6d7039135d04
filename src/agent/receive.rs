//! What the service lets a session touch: the protections, and the disks that they name.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use time::OffsetDateTime;
use tokio::sync::watch;

use super::commit::{self, Coordinator, Ticket};
use super::config::Config;
use super::refusal::{
    is_another, larger, not_opened, refuse, still_as_assigned, still_of_its_size, still_the_same_source,
    unusable,
};
use super::sessions::Entry;
use super::status::{Live, Shown};
use super::systemd::Pulses;
use crate::disk::device::{OpenDisk, TargetOptions, open_target};
use crate::disk::discover::Options;
use crate::disk::id::DiskId;
use crate::error::{IoError, chain};
use crate::journal::Writer;
use crate::journal::recover;
use crate::name::Name;
use crate::net::frame::MAX_DATA;
use crate::net::message::{self, Begin, Code, Commit, Enroll, EnrollReply, Open, PassKind};
use crate::net::session::{Begun, DIGEST_DEPTH, Host, Opened, Passes, Reader, Viewed};
use crate::net::token::TokenStore;
use crate::net::{enrolment, tls};
use crate::pass::{Lineage, PassId};
use crate::points::VolumeAt;
use crate::protection::{self, Assignment, Hold, Source, State, Store};
use crate::recovery::past::{Kept, Newest};
use crate::recovery::{self, Journal, LONGEST_SEGMENT, Standing};
use crate::storage::Geometry;
use crate::storage::device::Device;
use crate::storage::shelf::Directory;
use crate::sys::aligned::Arena;
use crate::units::ByteLen;
use crate::volume::counters::Counters;
use crate::volume::{Events, Fault, Volume};

/// How many requests to one disk are under way at once: the reads of a whole batch of small before-images, beside writes, so that
/// the batch before is journalled meanwhile.
const DEPTH: usize = 160;

/// The service, as a session sees it.
#[derive(Debug)]
pub(super) struct Receiver {
    /// As it is when a session opens its disk.
    pub(super) config: watch::Receiver<Arc<Config>>,
    pub(super) identity: tls::server::Identity,
    pub(super) tokens: TokenStore,
    pub(super) store: Store,
    pub(super) live: Live,
    pub(super) coordinator: Arc<Coordinator>,
    pub(super) pulses: Arc<Pulses>,
}

impl Host for Receiver {
    fn enroll(&self, peer: SocketAddr, request: &Enroll) -> Result<EnrollReply, message::Error> {
        enrolment::handle(request, peer, &self.tokens, &self.identity, OffsetDateTime::now_utc())
            .map_err(|refused| refused.to_peer())
    }

    fn open(
        &self,
        peer: SocketAddr,
        machine: &Name,
        open: &Open,
        events: Events,
    ) -> Result<Opened, message::Error> {
        let config = self.config.borrow().clone();
        let (hold, assignment) = self.held(machine, open, &config)?;
        let assignment = &assignment;
        let session = self.live.sessions.receive(machine, &open.disk, peer);
        let disk = self.target(machine, open, assignment, &config, &session)?;
        still_the_same_source(machine, open, assignment)?;
        let failed = |error: IoError| message::Error::new(Code::Internal, chain(&error));
        let arena = usize::try_from(config.window.0)
            .map_err(io::Error::other)
            .and_then(Arena::new)
            .map_err(|error| failed(IoError::new("map", "a window", error)))?;
        let geometry = Geometry { size: disk.size.0, block: disk.logical_block };
        let choice = config.engine;
        let name = disk.id.to_string();
        let again =
            disk.file.try_clone().map_err(|error| failed(IoError::new("duplicate", &*name, error)))?;
        let reader_name = name.clone();
        let reader: Reader = Box::new(move |arena| {
            let (device, _) = Device::new(again, reader_name, geometry, choice, DIGEST_DEPTH, arena)?;
            Ok(Box::new(device))
        });
        let (storage, engine) =
            Device::new(disk.file, name, geometry, choice, DEPTH, &arena).map_err(failed)?;
        tracing::info!(
            id = %disk.id, node = %disk.node.display(), engine = %engine,
            size = %disk.size, source = %ByteLen(open.size), "volume opened"
        );
        let journal = self.journal(&config.retention_dir, machine, assignment)?;
        make_ready(&config.retention_dir, machine, assignment, &journal)?;
        if open.group.is_some() && journal.standing.newest().is_none() {
            // It takes long, and overwrites in place: the others of the group are not to wait for it, nor to fail with it.
            let text = format!(
                "disk {} stands at no point yet: send the machine once without `--group`, and then with it",
                open.disk
            );
            return Err(message::Error::new(Code::Refused, text));
        }
        let storage = storage.with_shelf(journal.shelf.clone());
        let counters = Arc::new(Counters::new(open.size, engine));
        let volume =
            Volume::start(open.disk.as_str(), Box::new(storage), open.size, arena, events).map_err(failed)?;
        self.pulses.watch(volume.pulse());
        let mut ledger = Ledger {
            _hold: hold.clone(),
            store: self.store.clone(),
            machine: machine.clone(),
            disk: open.disk.clone(),
            pass: None,
            coordinator: self.coordinator.clone(),
            ticket: None,
            volume: None,
            target: assignment.id.clone(),
            source: Source { size: ByteLen(open.size), id: open.source.clone() },
            journal,
            counters: counters.clone(),
            _shown: self.live.show(machine.clone(), open.disk.clone(), counters.clone()),
        };
        let mut group = None;
        if let Some(name) = &open.group {
            let members = self.store.members(name).map_err(|error| refuse(&error))?;
            if !members.contains(machine) {
                let error = protection::Error::NotInGroup { machine: machine.clone(), group: name.clone() };
                return Err(refuse(&error));
            }
            let disk = (machine.clone(), open.disk.clone());
            let (ticket, stage) = self.coordinator.gather(name, &members, disk, &open.disks)?;
            group = Some((ticket.point(), stage));
            ledger.ticket = Some(ticket);
        }
        Ok(Opened {
            baseline: ledger.journal.standing.newest(),
            alike: assignment.state != State::Empty || assignment.seed,
            standing: ledger.journal.standing.newest().is_some()
                && assignment.state == State::Synchronized
                && !assignment.taken_back
                && assignment.last_commit.is_some_and(|commit| commit.bytes == open.size)
                && !(open.another || is_another(open, assignment))
                && ledger.journal.open().is_ok_and(|passes| passes.is_empty()),
            reader,
            group,
            volume,
            device_size: disk.size.0,
            block: disk.logical_block,
            window: config.window.0,
            connections: config.max_connections,
            counters,
            passes: Box::new(ledger),
            hold: Box::new((session, hold)),
        })
    }

    fn view(&self, peer: SocketAddr, machine: &Name, open: &Open) -> Result<Viewed, message::Error> {
        let config = self.config.borrow().clone();
        let (hold, assignment) = self.held(machine, open, &config)?;
        let covered = Arc::new(AtomicU64::new(0));
        // A copy of the disk may well be compared, but not one that cannot be equal.
        still_of_its_size(machine, open, &assignment)?;
        let session = self.live.sessions.compare(machine, &open.disk, peer, &covered)?;
        let journal = self.journal(&config.retention_dir, machine, &assignment)?;
        let (baseline, lineage) = (journal.standing.newest(), journal.standing.lineage);
        let pass = journal.standing.committed();
        let newest = Newest::open(machine, &assignment, journal).map_err(|error| unusable(&error))?;
        let engine = config.engine;
        let Some(newest) = newest else {
            // There is nothing to go back to: it must not be written to.
            let disk = self.target(machine, open, &assignment, &config, &session)?;
            let geometry = Geometry { size: disk.size.0, block: disk.logical_block };
            let name = disk.id.to_string();
            let file = disk.file.try_clone().map_err(|error| {
                message::Error::new(Code::Internal, chain(&IoError::new("duplicate", &*name, error)))
            })?;
            let reader: Reader = Box::new(move |arena| {
                let (device, _) = Device::new(file, name, geometry, engine, DIGEST_DEPTH, arena)?;
                Ok(Box::new(device))
            });
            let (device_size, block) = (geometry.size, geometry.block);
            let hold = Box::new((disk, session, hold));
            return Ok(Viewed { device_size, block, baseline, reader, covered, hold });
        };
        let (device_size, block) = (newest.size(), newest.block());
        if device_size < open.size {
            let (size, needed) = (ByteLen(device_size), ByteLen(open.size));
            let text = format!(
                "the target disk has {size}, and the source {needed}: {}",
                larger(machine, &open.disk)
            );
            return Err(message::Error::new(Code::SizeMismatch, text));
        }
        tracing::info!(id = %assignment.id, point = ?baseline, "volume opened to be compared");
        let (coordinator, machine, disk) = (self.coordinator.clone(), machine.clone(), assignment);
        let kept: Kept = Box::new(move || {
            let failed = |error| IoError::new("look at", "the recovery points", io::Error::other(error));
            let standing =
                coordinator.read(|log| Standing::of(&machine, &disk.name, &disk.id, log)).map_err(failed)?;
            if standing.lineage == lineage && standing.oldest() <= pass {
                return Ok(());
            }
            let text = "the recovery point that was compared was let go of meanwhile, so that no more can be said of it; \
                        run it again: it takes the newest point then";
            let refused = message::Error::new(Code::Refused, text);
            Err(IoError::new("read", "the disk as it was", io::Error::other(refused)))
        });
        let reader: Reader = Box::new(move |arena| newest.queue(engine, DIGEST_DEPTH, arena, kept));
        Ok(Viewed { device_size, block, baseline, reader, covered, hold: Box::new((session, hold)) })
    }
}

impl Receiver {
    /// A machine's disk, which from here on nobody takes away from it.
    fn held(
        &self,
        machine: &Name,
        open: &Open,
        config: &Config,
    ) -> Result<(Arc<Hold>, Assignment), message::Error> {
        // First the hold, then what it holds.
        let hold = Arc::new(self.store.hold(machine).map_err(|error| refuse(&error))?);
        let protection = self.store.load(machine).map_err(|error| refuse(&error))?;
        let Some(assignment) = protection.disk(&open.disk) else {
            let error = protection::Error::NoDisk { machine: machine.clone(), disk: open.disk.clone() };
            return Err(refuse(&error));
        };
        if assignment.id.backing_file().is_some() && !config.allow_loop {
            let text = format!("{} is a loop device, and `allow_loop` is not set", assignment.id);
            return Err(message::Error::new(Code::Refused, text));
        }
        Ok((hold, assignment.clone()))
    }

    /// Its target, by all rules, and for nobody else.
    fn target(
        &self,
        machine: &Name,
        open: &Open,
        assignment: &Assignment,
        config: &Config,
        session: &Entry,
    ) -> Result<OpenDisk, message::Error> {
        let discovery = Options {
            assigned: self.assigned()?,
            retention: Some(config.retention_dir.clone()),
            ..Options::default()
        };
        let at_least = ByteLen(open.size);
        let options = TargetOptions { discovery, machine: Some(machine.to_string()), at_least };
        let disk = open_target(&assignment.id, &options).map_err(|error| {
            let told = not_opened(&error);
            let text = match told.code {
                Code::Busy => self.live.sessions.holder(machine, &open.disk),
                Code::SizeMismatch => Some(format!("{}: {}", told.message, larger(machine, &open.disk))),
                _ => None,
            };
            text.map_or(told.clone(), |text| message::Error::new(told.code, text))
        })?;
        session.holds();
        for note in &disk.notes {
            tracing::warn!(id = %disk.id, note);
        }
        still_as_assigned(&disk, assignment)?;
        Ok(disk)
    }

    /// Reads the journal of a disk of a machine that is not failed over.
    fn journal(
        &self,
        retention: &Path,
        machine: &Name,
        disk: &Assignment,
    ) -> Result<Journal, message::Error> {
        let read = self.coordinator.read(|log| {
            let released = log.released(machine).map(|released| released.point);
            let begun = log.begun(machine).cloned();
            (begun, released, Journal::read(retention, machine, disk, log))
        });
        let (begun, released, journal) = read.map_err(|error| commit::refuse(&error))?;
        if let Some(begun) = begun {
            let text = format!(
                "{begun} began and is not done: its disks are not written to; `mt-agent failover {machine}` on the master \
                 target, with --to or --undo, goes on with it or takes it back"
            );
            return Err(message::Error::new(Code::Refused, text));
        }
        if let Some(point) = released {
            let text = format!(
                "machine {machine} was failed over to point {point}: its disks are not written to; \
                 `mt-agent failover {machine} --undo` on the master target takes that back"
            );
            return Err(message::Error::new(Code::Refused, text));
        }
        journal.map_err(|error| unusable(&error))
    }

    /// Every assigned disk with its machine. A protection that cannot be read concerns its own machine alone:
    /// the others go on.
    fn assigned(&self) -> Result<BTreeMap<DiskId, String>, message::Error> {
        let mut assigned = BTreeMap::new();
        for (machine, loaded) in self.store.all().map_err(|error| refuse(&error))? {
            match loaded {
                Ok(protection) => {
                    assigned.extend(protection.disks.into_iter().map(|disk| (disk.id, machine.to_string())));
                }
                Err(error) => {
                    tracing::warn!(of = %machine, error = chain(&error), "passed over a protection")
                }
            }
        }
        Ok(assigned)
    }
}

// The smallest window that can be configured holds several data frames, whatever the arena's fragmentation.
const _: () = assert!(super::config::WINDOW.start >= 2 * MAX_DATA);

/// Writes the passes of one volume to its protection.
struct Ledger {
    /// Also here, and not only with the volume: what this records goes on when its session has ended.
    _hold: Arc<Hold>,
    store: Store,
    machine: Name,
    disk: Name,
    pass: Option<PassId>,
    coordinator: Arc<Coordinator>,
    ticket: Option<Ticket>,
    volume: Option<VolumeAt>,
    target: DiskId,
    source: Source,
    journal: Journal,
    counters: Arc<Counters>,
    _shown: Shown,
}

impl Passes for Ledger {
    fn begin(&mut self, begin: &Begin) -> Result<Begun, message::Error> {
        let pass = begin.pass;
        let failed = |error: &dyn std::error::Error| message::Error::new(Code::Internal, chain(error));
        let lineage = match (begin.kind, self.journal.standing.lineage) {
            (PassKind::Delta, None) => {
                let text = "the disk stands at no point yet: its first pass must be an initial one";
                return Err(message::Error::new(Code::Protocol, text));
            }
            (PassKind::Delta, Some(lineage)) => lineage,
            _ => Lineage::random().map_err(|error| failed(&IoError::new("draw", "random bits", error)))?,
        };
        if begin.kind != PassKind::Delta && self.ticket.is_some() {
            let text = "an initial pass is not a part of a group's point";
            return Err(message::Error::new(Code::Protocol, text));
        }
        let disk = (self.machine.clone(), self.disk.clone());
        let (ticket, stage) = self.coordinator.begin(self.ticket.take(), disk, begin)?;
        self.ticket = Some(ticket);
        let journal = &self.journal;
        let (number, writer) = match begin.kind {
            PassKind::Delta => {
                let open = journal.open().map_err(|error| failed(&error))?;
                let writer = match open.last() {
                    Some(open) => recover::go_on(open, lineage, LONGEST_SEGMENT, &journal.shelf)
                        .map_err(|error| failed(&error))?,
                    None => Writer::new(lineage, journal.next(), LONGEST_SEGMENT),
                };
                (writer.pass(), Some(writer))
            }
            // The session has refused the one, and records nothing of the other.
            PassKind::Verify | PassKind::Unknown => {
                return Err(message::Error::new(Code::UnsupportedFeature, "an unknown kind of pass"));
            }
            PassKind::Initial => {
                // First the points, then what they need, then the disk: a crash in between leaves a disk that was not
                // written to, with fewer points or none.
                self.coordinator
                    .drop_for_initial(&self.machine, &self.disk)
                    .map_err(|error| commit::refuse(&error))?;
                journal.discard(..).map_err(|error| failed(&error))?;
                (journal.next(), None)
            }
        };
        self.store
            .begin_pass(&self.machine, &self.disk, pass, &self.source)
            .map_err(|error| refuse(&error))?;
        self.pass = Some(pass);
        self.volume = Some(VolumeAt {
            machine: self.machine.clone(),
            disk: self.disk.clone(),
            id: self.target.clone(),
            lineage,
            pass: number,
            sender_pass: pass,
            bytes: 0,
        });
        let kind = if writer.is_some() { "delta" } else { "initial" };
        tracing::info!(%pass, kind, "pass began");
        Ok(Begun { writer, stage })
    }

    fn prepare(&mut self, commit: &Commit, saved: u64) -> Result<(), message::Error> {
        let (Some(ticket), Some(volume)) = (&self.ticket, &self.volume) else {
            unreachable!("a session prepares only what it began");
        };
        let volume = VolumeAt { bytes: saved, ..volume.clone() };
        self.coordinator.prepare(ticket, volume, commit);
        Ok(())
    }

    fn committed(&mut self, commit: &Commit) -> Result<(), message::Error> {
        let pass = commit.pass;
        self.store
            .commit_pass(&self.machine, &self.disk, pass, self.source.size.0, commit.point_in_time)
            .map_err(|error| refuse(&error))?;
        tracing::info!(%pass, bytes = commit.bytes, "pass committed");
        Ok(())
    }

    fn fault(&mut self, fault: &Fault) -> Result<(), message::Error> {
        let reason = chain(&*fault.0);
        tracing::error!(reason, "volume faulted");
        self.counters.fault(reason.clone());
        match self.pass {
            Some(pass) => {
                self.store.fault(&self.machine, &self.disk, pass, &reason).map_err(|error| refuse(&error))
            }
            None => Ok(()),
        }
    }
}

/// Makes a journal ready for a pass: removes what nobody needs any more.
fn make_ready(
    retention: &Path,
    machine: &Name,
    disk: &Assignment,
    journal: &Journal,
) -> Result<(), message::Error> {
    let failed = |source| {
        let machine = machine.clone();
        unusable(&recovery::Error::Journal { machine, disk: disk.name.clone(), source })
    };
    Directory::create_all(recovery::place(retention, machine, &disk.name))
        .map_err(|error| unusable(&error))?;
    journal.tidy().map_err(failed)?;
    if journal.standing.newest().is_some() {
        journal.open().map_err(failed)?;
    }
    Ok(())
}
