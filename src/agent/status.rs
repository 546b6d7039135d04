//! What the service tells of itself: the live counters, and the report that is made of them.
//!
//! `GET /v1/status` answers with a [`Report`] in JSON. All sizes are bytes, all times RFC 3339 in UTC, all durations
//! seconds. A field that has nothing to say is `null`, none is left out, and a later minor version may add some:
//! clients pass over what they do not know. `schema_version` goes up when a field changes its meaning.
//!
//! ```json
//! {
//!   "schema_version": 1,
//!   "service": {
//!     "version": "0.1.0", "pid": 4711, "started": "2026-03-01T10:00:00Z", "listen": "[::]:9443",
//!     "sessions": 1, "engine": {"name": "io-uring", "why": "probed"}
//!   },
//!   "machines": [{
//!     "machine": "web01", "error": null,
//!     "volumes": [{
//!       "disk": "root", "id": "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90", "size": 10737418240,
//!       "phase": "receiving", "pass": "000102030405060708090a0b0c0d0e0f", "total_bytes": 10737418240,
//!       "received_bytes": 4294967296, "written_bytes": 2147483648, "zeroed_bytes": 2147483648,
//!       "same_bytes": 0, "wire_bytes": 1610612736, "connections": 4, "rate": 104857600, "eta": 62,
//!       "lag": 86400, "lag_bytes": 6442450944, "verified_bytes": null,
//!       "last_commit": {"pass": "…", "time": "…", "bytes": 10737418240, "point_in_time": true},
//!       "engine": {"name": "io-uring", "why": "probed"}, "error": null
//!     }]
//!   }]
//! }
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::commit::Coordinator;
use super::sessions::Sessions;
use crate::error::{chain, plain};
use crate::name::Name;
use crate::points;
use crate::protection::{self, Assignment, State, Store};
use crate::storage::device::Engine;
use crate::units::ByteLen;
use crate::volume::counters::{Counters, Phase};

/// The version of [`Report`]'s shape.
pub const SCHEMA_VERSION: u32 = 1;

/// How long a change of the rate takes to show by two thirds: long enough that a figure can be read, short enough
/// that a stall is seen.
const SMOOTHING: Duration = Duration::from_secs(5);
/// Samples closer together than this say more of the scheduler than of the rate.
const CLOSEST: Duration = Duration::from_millis(200);
/// How many characters of a reason are in the line of [`Board::line`].
const LONGEST_REASON: usize = 200;

/// The volumes that are open, by machine and disk. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Live {
    volumes: Arc<Mutex<Volumes>>,
    pub(super) sessions: Sessions,
}

#[derive(Debug, Default)]
struct Volumes {
    open: BTreeMap<(Name, Name), Arc<Counters>>,
    closed: BTreeMap<(Name, Name), Totals>,
}

/// What all passes over a volume came to since the service started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Bytes of the volume that arrived.
    pub received_bytes: u64,
    /// Bytes of the volume that were found to be the same.
    pub same_bytes: u64,
    /// Bytes of payloads on the wire.
    pub wire_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Bytes made zero.
    pub zeroed_bytes: u64,
    /// Frames of data.
    pub frames: u64,
    /// Frames of data that arrived damaged.
    pub refused_frames: u64,
    /// Passes that were committed.
    pub commits: u64,
    /// Passes in which a write or a flush failed.
    pub faults: u64,
}

impl Totals {
    fn of(counters: &Counters) -> Totals {
        let phase = counters.phase();
        Totals {
            received_bytes: counters.received_bytes.load(Ordering::Relaxed),
            same_bytes: counters.same_bytes.load(Ordering::Relaxed),
            wire_bytes: counters.wire_bytes.load(Ordering::Relaxed),
            written_bytes: counters.written_bytes.load(Ordering::Relaxed),
            zeroed_bytes: counters.zeroed_bytes.load(Ordering::Relaxed),
            frames: counters.frames.load(Ordering::Relaxed),
            refused_frames: counters.refused_frames.load(Ordering::Relaxed),
            commits: u64::from(phase == Phase::Synchronized),
            faults: u64::from(phase == Phase::Faulted),
        }
    }

    fn add(&mut self, other: Totals) {
        self.received_bytes += other.received_bytes;
        self.same_bytes += other.same_bytes;
        self.wire_bytes += other.wire_bytes;
        self.written_bytes += other.written_bytes;
        self.zeroed_bytes += other.zeroed_bytes;
        self.frames += other.frames;
        self.refused_frames += other.refused_frames;
        self.commits += other.commits;
        self.faults += other.faults;
    }
}

impl Live {
    /// Shows a volume's counters for as long as the [`Shown`] lives; after that they count in its totals.
    pub fn show(&self, machine: Name, disk: Name, counters: Arc<Counters>) -> Shown {
        let key = (machine, disk);
        let mut volumes = self.lock();
        // Cannot be while a device is opened exclusively; if it is, nothing is lost from the totals.
        if let Some(before) = volumes.open.insert(key.clone(), counters.clone()) {
            volumes.closed.entry(key.clone()).or_default().add(Totals::of(&before));
        }
        drop(volumes);
        Shown { live: self.clone(), key, counters }
    }

    /// The volumes that are open.
    pub fn open(&self) -> BTreeMap<(Name, Name), Arc<Counters>> {
        self.lock().open.clone()
    }

    /// The totals of every volume that was open since the service started.
    pub fn totals(&self) -> BTreeMap<(Name, Name), Totals> {
        let volumes = self.lock();
        let mut totals = volumes.closed.clone();
        for (key, counters) in &volumes.open {
            totals.entry(key.clone()).or_default().add(Totals::of(counters));
        }
        totals
    }

    fn lock(&self) -> MutexGuard<'_, Volumes> {
        // Nothing that is done under the lock leaves it half done.
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a volume in the [`Live`] list.
#[derive(Debug)]
pub struct Shown {
    live: Live,
    key: (Name, Name),
    counters: Arc<Counters>,
}

impl Drop for Shown {
    fn drop(&mut self) {
        let mut volumes = self.live.lock();
        if volumes.open.get(&self.key).is_some_and(|open| Arc::ptr_eq(open, &self.counters)) {
            volumes.open.remove(&self.key);
            volumes.closed.entry(self.key.clone()).or_default().add(Totals::of(&self.counters));
        }
    }
}

/// What is known of the service as a whole.
#[derive(Debug)]
pub struct Service {
    /// When it started.
    pub started: OffsetDateTime,
    /// Where it takes connections.
    pub listen: SocketAddr,
    /// How volumes are written, and why so.
    pub engine: Engine,
    /// Connections that are open.
    pub sessions: AtomicU64,
    /// Connections that were taken.
    pub sessions_total: AtomicU64,
    /// Connections that were refused: no certificate, a wrong one, not the protocol, too many.
    pub refused_total: AtomicU64,
    /// Connections that ended with a frame that was refused: a checksum, a length, an offset or an order that does
    /// not hold. A damaged payload alone ends no connection: see [`Counters::refused_frames`].
    pub bad_frames_total: AtomicU64,
}

impl Service {
    /// A service that starts now.
    pub fn new(listen: SocketAddr, engine: Engine) -> Service {
        let now = OffsetDateTime::now_utc();
        Service {
            started: now.replace_nanosecond(0).unwrap_or(now),
            listen,
            engine,
            sessions: AtomicU64::new(0),
            sessions_total: AtomicU64::new(0),
            refused_total: AtomicU64::new(0),
            bad_frames_total: AtomicU64::new(0),
        }
    }
}

/// The answer to `GET /v1/status`; its shape is in the documentation of this module.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The service.
    pub service: ServiceReport,
    /// Every machine that has a protection, by name.
    pub machines: Vec<MachineReport>,
}

/// The service in a [`Report`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ServiceReport {
    /// Of mt-agent.
    pub version: String,
    /// Of the process.
    pub pid: u32,
    /// When it started.
    #[serde(with = "time::serde::rfc3339")]
    pub started: OffsetDateTime,
    /// Where it takes connections.
    pub listen: SocketAddr,
    /// Connections that are open.
    pub sessions: u64,
    /// How volumes are written.
    pub engine: Engine,
}

/// One machine in a [`Report`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MachineReport {
    /// The machine.
    pub machine: Name,
    /// Why its protection cannot be read; then there are no volumes.
    pub error: Option<String>,
    /// Its volumes, in the order of their assignment.
    pub volumes: Vec<VolumeReport>,
}

/// One volume in a [`Report`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VolumeReport {
    /// The machine's name for its disk.
    pub disk: Name,
    /// The identity of the target disk.
    pub id: String,
    /// The size of the target disk when it was assigned.
    pub size: u64,
    /// While a session has it: `open`, `receiving`, `paused` (the retention file
    /// system is full), `committing`, `synchronized`, `faulted`. Else `empty`,
    /// `interrupted` (a pass began and nobody sends), `synchronized`, `faulted`; and
    /// after a failover `released`, while one writes the disks, or was interrupted, `failing-over`.
    pub phase: String,
    /// The pass that runs, was interrupted or faulted.
    pub pass: Option<String>,
    /// The size of what the pass brings; `null`, as are the next nine, while no session has the volume.
    pub total_bytes: Option<u64>,
    /// Bytes of the volume that arrived in this pass, zeros included.
    pub received_bytes: Option<u64>,
    /// Bytes of the volume that were compared in this pass and are the same on both sides. What arrived and these are what
    /// is done of `total_bytes`.
    pub same_bytes: Option<u64>,
    /// Bytes whose writing completed.
    pub written_bytes: Option<u64>,
    /// Bytes that were made zero without being written.
    pub zeroed_bytes: Option<u64>,
    /// Bytes of payloads on the wire.
    pub wire_bytes: Option<u64>,
    /// How many connections carry the pass; 0 before it begins.
    pub connections: Option<u64>,
    /// Bytes of the volume a second, smoothed.
    pub rate: Option<u64>,
    /// Seconds until everything has arrived, at that rate.
    pub eta: Option<u64>,
    /// Which engine writes.
    pub engine: Option<Engine>,
    /// Seconds since the last commit.
    pub lag: Option<u64>,
    /// Bytes of the source that the running pass has neither brought nor found to be there yet: the most by which the target is
    /// behind what is being sent. `null` while no pass runs: what changed since then only the source knows.
    pub lag_bytes: Option<u64>,
    /// Bytes of the source that a `verify` which runs has compared with the newest point so far, beside whatever else is done
    /// with the volume; `null` where none runs.
    pub verified_bytes: Option<u64>,
    /// The last commit. The disk stands at it only in the phase `synchronized`.
    pub last_commit: Option<CommitReport>,
    /// What failed.
    pub error: Option<String>,
}

/// A commit in a [`Report`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CommitReport {
    /// The pass.
    pub pass: String,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// The size of the source, in bytes.
    pub bytes: u64,
    /// Whether the source stood still while it was read.
    pub point_in_time: bool,
}

impl From<protection::Commit> for CommitReport {
    fn from(commit: protection::Commit) -> CommitReport {
        let protection::Commit { pass, time, bytes, point_in_time } = commit;
        CommitReport { pass: pass.to_string(), time, bytes, point_in_time }
    }
}

/// Makes reports: of the protections as they are on disk, and of the live counters.
#[derive(Debug)]
pub struct Board {
    /// The service.
    pub service: Arc<Service>,
    /// The open volumes.
    pub live: Live,
    store: Store,
    points: Option<Arc<Coordinator>>,
    rates: Mutex<HashMap<(Name, Name), Smoothed>>,
    reload_refused: Mutex<Option<String>>,
}

/// The rate of one pass, as an exponentially weighted mean of what each interval between two samples had.
#[derive(Debug)]
struct Smoothed {
    counters: Arc<Counters>,
    at: Instant,
    done: u64,
    rate: Option<f64>,
}

impl Smoothed {
    fn sample(&mut self, now: Instant) {
        let interval = now.saturating_duration_since(self.at);
        if interval < CLOSEST {
            return;
        }
        let done = self.counters.done();
        let rate = done.saturating_sub(self.done) as f64 / interval.as_secs_f64();
        let weight = 1.0 - (-interval.as_secs_f64() / SMOOTHING.as_secs_f64()).exp();
        self.rate = Some(self.rate.map_or(rate, |before| before + weight * (rate - before)));
        (self.at, self.done) = (now, done);
    }
}

/// So much of a text as fits in a line.
fn shortened(text: &str) -> String {
    let mut short: String = plain(text).chars().take(LONGEST_REASON).collect();
    if text.chars().nth(LONGEST_REASON).is_some() {
        short.push('…');
    }
    short
}

impl Board {
    /// A board for a service with these protections.
    pub fn new(service: Arc<Service>, live: Live, store: Store) -> Board {
        Board {
            service,
            live,
            store,
            points: None,
            rates: Mutex::default(),
            reload_refused: Mutex::default(),
        }
    }

    /// The same, which knows the machines that were failed over.
    pub(super) fn with_points(self, points: Arc<Coordinator>) -> Board {
        Board { points: Some(points), ..self }
    }

    /// Writes to the log whether the machine is failed over, as the points log says.
    pub(super) fn log_standing(&self, machine: &Name) -> Result<(), points::Error> {
        let Some(points) = &self.points else { return Ok(()) };
        let (released, begun) =
            points.read(|log| (log.released(machine).cloned(), log.begun(machine).cloned()))?;
        match (released, begun) {
            (_, Some(begun)) => tracing::info!(%machine, "{begun} began and is not done"),
            (Some(released), None) => {
                let (point, time) = (released.point, released.time);
                tracing::info!(%machine, %point, %time, "failed over: its disks are released");
            }
            (None, None) => tracing::info!(%machine, "not failed over: its disks stand at its newest point"),
        }
        Ok(())
    }

    /// Looks at the counters for the rates. To be called about once a second; [`super::control`] does.
    pub fn sample(&self, now: Instant) {
        let open = self.live.open();
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rates.retain(|key, smoothed| open.get(key).is_some_and(|open| Arc::ptr_eq(open, &smoothed.counters)));
        for (key, counters) in open {
            let smoothed = rates.entry(key).or_insert_with(|| Smoothed {
                at: counters.started(),
                counters,
                done: 0,
                rate: None,
            });
            smoothed.sample(now);
        }
    }

    /// How it goes, in one line. Reads no file.
    pub fn line(&self) -> String {
        let open = self.live.open();
        let at_work: Vec<_> = open
            .iter()
            .filter(|(_, counters)| matches!(counters.phase(), Phase::Receiving | Phase::Committing))
            .collect();
        let mut line = format!("listening at {}", self.service.listen);
        if !at_work.is_empty() {
            self.add_work(&mut line, &at_work);
        }
        if let Some(why) = &*self.reload_refused.lock().unwrap_or_else(PoisonError::into_inner) {
            line += &format!("; reload refused, the configuration stays what it was: {why}");
        }
        line
    }

    /// Keeps why the last reload of the configuration was refused, for [`Board::line`]; or that it was not.
    pub(super) fn reload_refused(&self, why: Option<&str>) {
        // A line for people, and one only: the rest is in the log.
        let first = why.map(|why| match why.split_once('\n') {
            Some((first, _)) => format!("{} (and more: see the log)", shortened(first)),
            None => shortened(why),
        });
        *self.reload_refused.lock().unwrap_or_else(PoisonError::into_inner) = first;
    }

    fn add_work(&self, line: &mut String, at_work: &[(&(Name, Name), &Arc<Counters>)]) {
        let machines: BTreeSet<&Name> = at_work.iter().map(|((machine, _), _)| machine).collect();
        let sum =
            |figure: fn(&Counters) -> u64| at_work.iter().map(|(_, counters)| figure(counters)).sum::<u64>();
        let (done, total) = (sum(Counters::done), sum(Counters::total));
        let rate: f64 = at_work.iter().filter_map(|(key, counters)| self.rate(key, counters)).sum();
        *line += &format!(
            "; receiving {} disks of {} machines: {}% of {}, {}/s",
            at_work.len(),
            machines.len(),
            u128::from(done) * 100 / u128::from(total.max(1)),
            ByteLen(total),
            ByteLen(rate as u64)
        );
        let paused = at_work.iter().filter(|(_, counters)| counters.is_paused()).count();
        if paused > 0 {
            *line += &format!("; {paused} wait for room on the retention file system");
        }
    }

    /// The report of this moment. Reads the protections' files: to be called where that may block.
    pub fn report(&self) -> Result<Report, protection::Error> {
        let now = OffsetDateTime::now_utc();
        let open = self.live.open();
        let failed_over = |machine: &Name| {
            let looked =
                self.points.as_ref()?.look(|log| match (log.begun(machine), log.released(machine)) {
                    (Some(_), _) => Some("failing-over"),
                    (None, Some(_)) => Some("released"),
                    (None, None) => None,
                });
            looked.flatten()
        };
        let machines = self.store.all()?.into_iter().map(|(machine, protection)| match protection {
            Ok(protection) => {
                let volumes = protection.disks.into_iter().map(|disk| {
                    let key = (machine.clone(), disk.name.clone());
                    let mut report = self.volume(disk, open.get(&key), &key, now);
                    if let Some(phase) = failed_over(&machine) {
                        phase.clone_into(&mut report.phase);
                    }
                    report
                });
                let volumes = volumes.collect();
                MachineReport { machine, error: None, volumes }
            }
            Err(error) => MachineReport { machine, error: Some(chain(&error)), volumes: Vec::new() },
        });
        let machines = machines.collect();
        let service = &self.service;
        let service = ServiceReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started: service.started,
            listen: service.listen,
            sessions: service.sessions.load(Ordering::Relaxed),
            engine: service.engine.clone(),
        };
        Ok(Report { schema_version: SCHEMA_VERSION, service, machines })
    }

    fn volume(
        &self,
        disk: Assignment,
        live: Option<&Arc<Counters>>,
        key: &(Name, Name),
        now: OffsetDateTime,
    ) -> VolumeReport {
        let (phase, pass, error) = match disk.state {
            State::Empty => ("empty", None, None),
            State::Receiving(pass) => ("interrupted", Some(pass.id.to_string()), None),
            State::Synchronized => ("synchronized", None, None),
            State::Faulted(pass, fault) => ("faulted", Some(pass.id.to_string()), Some(fault.reason)),
        };
        let lag =
            disk.last_commit.map(|commit| u64::try_from((now - commit.time).whole_seconds()).unwrap_or(0));
        let mut report = VolumeReport {
            disk: disk.name,
            id: disk.id.to_string(),
            size: disk.size.0,
            phase: phase.to_owned(),
            pass,
            total_bytes: None,
            received_bytes: None,
            same_bytes: None,
            written_bytes: None,
            zeroed_bytes: None,
            wire_bytes: None,
            connections: None,
            rate: None,
            eta: None,
            engine: None,
            lag,
            lag_bytes: None,
            verified_bytes: self.live.sessions.compared(&key.0, &key.1),
            last_commit: disk.last_commit.map(CommitReport::from),
            error,
        };
        let Some(counters) = live else { return report };
        let Totals { received_bytes, same_bytes, wire_bytes, written_bytes, zeroed_bytes, .. } =
            Totals::of(counters);
        let phase = counters.phase();
        (if counters.is_paused() { "paused" } else { phase.name() }).clone_into(&mut report.phase);
        report.pass = counters.pass().or(report.pass);
        report.total_bytes = Some(counters.total());
        report.received_bytes = Some(received_bytes);
        report.same_bytes = Some(same_bytes);
        report.wire_bytes = Some(wire_bytes);
        report.connections = Some(counters.connections.load(Ordering::Relaxed));
        report.written_bytes = Some(written_bytes);
        report.zeroed_bytes = Some(zeroed_bytes);
        report.engine = Some(counters.engine().clone());
        report.error = counters.error().map(str::to_owned);
        if phase == Phase::Receiving {
            let rate = self.rate(key, counters);
            report.rate = rate.map(|rate| rate.round() as u64);
            let left = counters.total().saturating_sub(counters.done());
            report.lag_bytes = Some(left);
            report.eta = rate.filter(|rate| *rate >= 1.0).map(|rate| (left as f64 / rate).ceil() as u64);
        }
        report
    }

    /// The smoothed rate, or the mean since the start while there is no sample.
    fn rate(&self, key: &(Name, Name), counters: &Arc<Counters>) -> Option<f64> {
        let rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let smoothed = rates.get(key).filter(|smoothed| Arc::ptr_eq(&smoothed.counters, counters));
        smoothed.and_then(|smoothed| smoothed.rate).or_else(|| {
            let elapsed = counters.elapsed();
            (elapsed >= CLOSEST).then(|| counters.done() as f64 / elapsed.as_secs_f64())
        })
    }
}
