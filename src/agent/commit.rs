//! The commit of a point: one record in the points log, once each of its disks is durable.
//!
//! Phase one: the session of every disk flushes its disk and its journal, and says so ([`Coordinator::prepare`]). Phase
//! two: when the last of them has, the point's record is appended to the log, and everyone hears of it. A crash before the
//! record leaves passes that are open, on all disks; after it, a point that is there on all of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use time::OffsetDateTime;
use tokio::sync::oneshot;

use crate::error::chain;
use crate::name::Name;
use crate::net::message::{self, Begin, Code, Commit};
use crate::net::session::Decision;
use crate::points::{Dropped, Error, Log, Point, PointId, Reason, Record, VolumeAt};

/// Gathers the disks of points, and owns the log of a running service.
#[derive(Debug)]
pub(super) struct Coordinator {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    log: Log,
    gatherings: HashMap<(Name, PointId), Gathering>,
}

/// A point on its way.
#[derive(Debug, Default)]
struct Gathering {
    disks: BTreeSet<Name>,
    joined: BTreeSet<Name>,
    prepared: BTreeMap<Name, VolumeAt>,
    waiting: Vec<oneshot::Sender<Result<OffsetDateTime, message::Error>>>,
    /// Which disk left before its pass was durable: the point will not be.
    lost: Option<Name>,
}

/// One disk's place in a point. Dropped before the point is recorded, it takes the point with it.
#[derive(Debug)]
pub(super) struct Ticket {
    coordinator: Arc<Coordinator>,
    key: (Name, PointId),
    disk: Name,
}

impl Coordinator {
    pub(super) fn new(log: Log) -> Coordinator {
        Coordinator { inner: Mutex::new(Inner { log, gatherings: HashMap::new() }) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing that is done under the lock leaves it half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the log, as others may have changed it meanwhile too.
    pub(super) fn read<T>(&self, look: impl FnOnce(&Log) -> T) -> Result<T, Error> {
        let mut inner = self.lock();
        inner.log.refresh()?;
        Ok(look(&inner.log))
    }

    /// Appends a record that is no point.
    pub(super) fn append(&self, record: Record) -> Result<(), Error> {
        let mut inner = self.lock();
        let result = inner.log.append(record);
        if result.is_err() {
            inner.reopen();
        }
        result
    }

    /// Drops all points that an initial pass over this disk makes worthless.
    pub(super) fn drop_for_initial(&self, machine: &Name, disk: &Name) -> Result<(), Error> {
        let points: Vec<PointId> = self.read(|log| {
            let of_disk = |point: &&Point| point.volumes_of(machine).any(|volume| volume.disk == *disk);
            log.points(machine).filter(of_disk).map(|point| point.id).collect()
        })?;
        if points.is_empty() {
            return Ok(());
        }
        tracing::warn!(%machine, %disk, points = points.len(), "an initial pass begins: older points are dropped");
        let (time, reason) = (OffsetDateTime::now_utc(), Reason::Initial);
        self.append(Record::Dropped(Dropped { time, reason, points }))
    }

    /// A pass begins that leads to a point.
    pub(super) fn join(
        self: &Arc<Self>,
        machine: &Name,
        disk: &Name,
        begin: &Begin,
    ) -> Result<Ticket, message::Error> {
        let protocol = |text: String| message::Error::new(Code::Protocol, text);
        let disks: BTreeSet<Name> = begin.disks.iter().cloned().collect();
        if !disks.contains(disk) {
            return Err(protocol(format!("disk {disk} is not one of those of its own point")));
        }
        let known = self.read(|log| log.get(begin.point).is_some()).map_err(|error| refuse(&error))?;
        if known {
            return Err(protocol(format!("point {} was recorded before", begin.point)));
        }
        let mut inner = self.lock();
        let key = (machine.clone(), begin.point);
        let gathering = inner.gatherings.entry(key.clone()).or_default();
        if gathering.joined.is_empty() {
            gathering.disks = disks;
        } else if gathering.disks != disks {
            return Err(protocol("the passes of a point name different disks".to_owned()));
        }
        if let Some(lost) = &gathering.lost {
            return Err(incomplete(lost));
        }
        if !gathering.joined.insert(disk.clone()) {
            return Err(protocol(format!("disk {disk} is in this point already")));
        }
        Ok(Ticket { coordinator: self.clone(), key, disk: disk.clone() })
    }

    /// A disk of the point is durable. The last one records the point; blocks for as long as that takes.
    pub(super) fn prepare(&self, ticket: &Ticket, volume: VolumeAt, commit: &Commit) -> Decision {
        let (sender, decision) = oneshot::channel();
        let mut inner = self.lock();
        let Inner { log, gatherings } = &mut *inner;
        let Some(gathering) = gatherings.get_mut(&ticket.key) else {
            unreachable!("a gathering is there as long as one of its tickets is");
        };
        if let Some(lost) = &gathering.lost {
            // Whoever waits may be gone.
            sender.send(Err(incomplete(lost))).ok();
            return decision;
        }
        gathering.prepared.insert(ticket.disk.clone(), volume);
        gathering.waiting.push(sender);
        if gathering.prepared.len() < gathering.disks.len() {
            return decision;
        }
        let recorded = OffsetDateTime::now_utc();
        let recorded = recorded.replace_nanosecond(0).unwrap_or(recorded);
        let id = ticket.key.1;
        let point = Point {
            id,
            time: commit.time,
            recorded,
            kind: commit.kind,
            fuzzy: !commit.point_in_time,
            name: commit.name.clone(),
            group: None,
            volumes: gathering.prepared.values().cloned().collect(),
        };
        let waiting = std::mem::take(&mut gathering.waiting);
        let appended = log.append(Record::Point(point));
        let result = match appended {
            Ok(()) => Ok(recorded),
            Err(error) => {
                inner.reopen();
                // A flush that failed may have left the record durable after all.
                match inner.log.get(id) {
                    Some(_) => Ok(recorded),
                    None => Err(refuse(&error)),
                }
            }
        };
        inner.gatherings.remove(&ticket.key);
        for waiter in waiting {
            waiter.send(result.clone()).ok();
        }
        decision
    }
}

impl Inner {
    /// After a failure nobody knows what the log holds until it was read again and settled.
    fn reopen(&mut self) {
        let Some(dir) = self.log.path().parent() else { return };
        let reopened = Log::open(dir).and_then(|mut log| log.settle().map(|()| log));
        match reopened {
            Ok(log) => self.log = log,
            Err(error) => tracing::error!(error = chain(&error), "the points log cannot be opened again"),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut inner = self.coordinator.lock();
        let Some(gathering) = inner.gatherings.get_mut(&self.key) else { return };
        gathering.joined.remove(&self.disk);
        gathering.lost.get_or_insert_with(|| self.disk.clone());
        for waiter in gathering.waiting.drain(..) {
            waiter.send(Err(incomplete(&self.disk))).ok();
        }
        if gathering.joined.is_empty() {
            inner.gatherings.remove(&self.key);
        }
    }
}

fn incomplete(lost: &Name) -> message::Error {
    let text = format!(
        "disk {lost} of the same point was not received, so there is no point; send all of them again"
    );
    message::Error::new(Code::Incomplete, text)
}

/// What the peer is told of a points log that cannot be used.
pub(super) fn refuse(error: &Error) -> message::Error {
    let code = match error {
        Error::Io(io) if super::receive::out_of_space(&io.source) => Code::NoSpace,
        Error::Refused(_) => Code::Refused,
        _ => Code::Internal,
    };
    tracing::error!(error = chain(error), "the points log");
    message::Error::new(code, chain(error))
}
