//! The commit of a point: one record in the points log, once each of its disks is durable.
//!
//! Phase one: the session of every disk flushes its disk and its journal, and says so ([`Coordinator::prepare`]). Phase
//! two: when the last of them has, the point's record is appended to the log, and everyone hears of it. A crash before the
//! record leaves passes that are open, on all disks; after it, a point that is there on all of them. Whether the disks are
//! of one machine or of a group of machines makes no difference to that: it is one record.
//!
//! A group's sessions meet before that, so that there is one moment at which all of its machines stand still: when their
//! disks are open ([`Coordinator::gather`]), where they learn the name of their point, and when their passes begin, which is
//! after the machines' hooks ran and their file systems were frozen, and before the first of them is read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use time::OffsetDateTime;
use tokio::sync::watch;

use crate::error::chain;
use crate::name::Name;
use crate::net::message::{self, Begin, Code, Commit};
use crate::net::session::Stage;
use crate::points::{Dropped, Error, Kind, Log, Point, PointId, Reason, Record, VolumeAt};

/// Gathers the disks of points, and owns the log of a running service.
#[derive(Debug)]
pub(super) struct Coordinator {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    log: Log,
    gatherings: HashMap<Key, Gathering>,
    /// Of each group the point whose machines have not all come yet.
    forming: HashMap<Name, PointId>,
}

/// A point on its way. That of one machine is named by its sender, so it is that machine's alone; that of a group by us.
type Key = (Option<Name>, PointId);

/// A machine, and its name for a disk.
type Disk = (Name, Name);

#[derive(Debug)]
struct Gathering {
    group: Option<Name>,
    /// Of each machine the disks that it sends; `None` until it has come.
    machines: BTreeMap<Name, Option<BTreeSet<Name>>>,
    /// Whose sessions are there.
    here: BTreeSet<Disk>,
    begun: BTreeSet<Disk>,
    prepared: BTreeMap<Disk, (VolumeAt, Commit)>,
    stage: watch::Sender<Stage>,
}

/// One disk's place in a point. Dropped before the point is recorded, it takes the point with it; but while a group still
/// gathers, only itself.
#[derive(Debug)]
pub(super) struct Ticket {
    coordinator: Arc<Coordinator>,
    key: Key,
    disk: Disk,
}

impl Ticket {
    /// The point of which it is.
    pub(super) fn point(&self) -> PointId {
        self.key.1
    }
}

impl Gathering {
    fn new(group: Option<Name>, machines: BTreeMap<Name, Option<BTreeSet<Name>>>) -> Gathering {
        let names = machines.keys().cloned().collect();
        let stage = watch::Sender::new(match group {
            Some(_) => Stage::Gathering(names),
            None => Stage::Beginning(names),
        });
        let (here, begun, prepared) = Default::default();
        Gathering { group, machines, here, begun, prepared, stage }
    }

    /// The machines that do not have all of their disks among these.
    fn lacking(&self, among: &BTreeSet<Disk>) -> Vec<Name> {
        let has_all = |machine: &Name, disks: &BTreeSet<Name>| {
            disks.iter().all(|disk| among.contains(&(machine.clone(), disk.clone())))
        };
        let lacking = self
            .machines
            .iter()
            .filter(|(machine, disks)| disks.as_ref().is_none_or(|disks| !has_all(machine, disks)));
        lacking.map(|(machine, _)| machine.clone()).collect()
    }

    /// A disk comes that says which ones are sent with it.
    fn enter(&mut self, disk: &Disk, disks: &[Name]) -> Result<(), message::Error> {
        let protocol = |text: String| Err(message::Error::new(Code::Protocol, text));
        let (machine, name) = disk;
        let disks: BTreeSet<Name> = disks.iter().cloned().collect();
        if !disks.contains(name) {
            return protocol(format!("disk {name} is not one of those of its own point"));
        }
        if let Stage::Lost(error) = &*self.stage.borrow() {
            return Err(error.clone());
        }
        let Some(known) = self.machines.get_mut(machine) else {
            // Since this point began to form.
            let text = format!("machine {machine} joined its group just now; send again in a moment");
            return Err(message::Error::new(Code::Refused, text));
        };
        match known {
            Some(known) if *known != disks => {
                return protocol("the passes of a point name different disks".to_owned());
            }
            _ => *known = Some(disks),
        }
        if !self.here.insert(disk.clone()) {
            return protocol(format!("disk {name} is in this point already"));
        }
        Ok(())
    }

    /// Looks how far it is.
    fn look(&mut self) {
        let begun = !matches!(*self.stage.borrow(), Stage::Gathering(_));
        let lacking = self.lacking(if begun { &self.begun } else { &self.here });
        let next = match (begun, lacking.is_empty()) {
            (false, false) => Stage::Gathering(lacking),
            (false, true) => Stage::Beginning(self.machines.keys().cloned().collect()),
            (true, false) => Stage::Beginning(lacking),
            (true, true) => Stage::Begun,
        };
        self.stage.send_if_modified(|stage| {
            let news = !matches!(stage, Stage::Lost(_)) && *stage != next;
            if news {
                *stage = next;
            }
            news
        });
    }

    /// The point, once all of its disks are prepared.
    fn point(&self, id: PointId, recorded: OffsetDateTime) -> Option<Point> {
        let prepared: BTreeSet<Disk> = self.prepared.keys().cloned().collect();
        if !self.lacking(&prepared).is_empty() {
            return None;
        }
        let commits = || self.prepared.values().map(|(_, commit)| commit);
        Some(Point {
            id,
            // The moment is the same by the senders, each of which has a clock of its own: the latest, so that a point is
            // never taken for one that was before it.
            time: commits().map(|commit| commit.time).max()?,
            recorded,
            // No better than the worst of its disks.
            kind: commits().map(|commit| commit.kind).min().unwrap_or(Kind::Crash),
            fuzzy: commits().any(|commit| !commit.point_in_time),
            name: commits().find_map(|commit| commit.name.clone()),
            group: self.group.clone(),
            volumes: self.prepared.values().map(|(volume, _)| volume.clone()).collect(),
        })
    }
}

impl Coordinator {
    pub(super) fn new(log: Log) -> Coordinator {
        let (gatherings, forming) = Default::default();
        Coordinator { inner: Mutex::new(Inner { log, gatherings, forming }) }
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

    /// Looks at the log where that takes no time: whoever only shows it must not wait for a record that a retention which
    /// stands still does not take. A log that cannot be read is told where it is needed.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Log) -> T) -> Option<T> {
        let mut inner = self.inner.try_lock().ok()?;
        inner.log.refresh().ok()?;
        Some(look(&inner.log))
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

    /// A disk of a machine of a group is open. `members` are the group's machines, this one among them. Gives the point
    /// of which it will be.
    pub(super) fn gather(
        self: &Arc<Self>,
        group: &Name,
        members: &BTreeSet<Name>,
        disk: Disk,
        disks: &[Name],
    ) -> Result<(Ticket, watch::Receiver<Stage>), message::Error> {
        let mut inner = self.lock();
        let Inner { gatherings, forming, .. } = &mut *inner;
        let point = match forming.get(group) {
            Some(point) => *point,
            None => random_point()?,
        };
        let key = (None, point);
        let gathering = gatherings.entry(key.clone()).or_insert_with(|| {
            forming.insert(group.clone(), point);
            Gathering::new(
                Some(group.clone()),
                members.iter().map(|machine| (machine.clone(), None)).collect(),
            )
        });
        let entered = gathering.enter(&disk, disks);
        if let Err(error) = entered {
            if gathering.here.is_empty() {
                gatherings.remove(&key);
                forming.remove(group);
            }
            return Err(error);
        }
        gathering.look();
        if !matches!(*gathering.stage.borrow(), Stage::Gathering(_)) {
            forming.remove(group);
        }
        let stage = gathering.stage.subscribe();
        Ok((Ticket { coordinator: self.clone(), key, disk }, stage))
    }

    /// A pass begins that leads to a point: for a group's disk, to that of its ticket.
    pub(super) fn begin(
        self: &Arc<Self>,
        ticket: Option<Ticket>,
        disk: Disk,
        begin: &Begin,
    ) -> Result<(Ticket, watch::Receiver<Stage>), message::Error> {
        let protocol = |text: String| message::Error::new(Code::Protocol, text);
        let ticket = match ticket {
            Some(ticket) => ticket,
            None => {
                let known =
                    self.read(|log| log.get(begin.point).is_some()).map_err(|error| refuse(&error))?;
                if known {
                    return Err(protocol(format!("point {} was recorded before", begin.point)));
                }
                let mut inner = self.lock();
                let key = (Some(disk.0.clone()), begin.point);
                let gathering = inner.gatherings.entry(key.clone()).or_insert_with(|| {
                    let disks = begin.disks.iter().cloned().collect();
                    Gathering::new(None, BTreeMap::from([(disk.0.clone(), Some(disks))]))
                });
                let entered = gathering.enter(&disk, &begin.disks);
                gathering.look();
                if gathering.here.is_empty() {
                    inner.gatherings.remove(&key);
                }
                entered?;
                Ticket { coordinator: self.clone(), key, disk }
            }
        };
        let mut inner = self.lock();
        let gathering = inner.of(&ticket);
        let disks: BTreeSet<Name> = begin.disks.iter().cloned().collect();
        if begin.point != ticket.key.1 || gathering.machines.get(&ticket.disk.0) != Some(&Some(disks)) {
            drop(inner);
            return Err(protocol("the pass leads to another point than that of its group".to_owned()));
        }
        gathering.begun.insert(ticket.disk.clone());
        gathering.look();
        let stage = gathering.stage.subscribe();
        drop(inner);
        Ok((ticket, stage))
    }

    /// A disk of the point is durable. The last one records the point; blocks for as long as that takes.
    pub(super) fn prepare(&self, ticket: &Ticket, volume: VolumeAt, commit: &Commit) {
        let mut inner = self.lock();
        let id = ticket.key.1;
        let recorded = OffsetDateTime::now_utc();
        let recorded = recorded.replace_nanosecond(0).unwrap_or(recorded);
        let gathering = inner.of(ticket);
        if matches!(*gathering.stage.borrow(), Stage::Lost(_)) {
            return;
        }
        gathering.prepared.insert(ticket.disk.clone(), (volume, commit.clone()));
        let Some(point) = gathering.point(id, recorded) else { return };
        let stage = match inner.log.append(Record::Point(point)) {
            Ok(()) => Stage::Recorded(recorded),
            Err(error) => {
                inner.reopen();
                // A flush that failed may have left the record durable after all.
                match inner.log.get(id) {
                    Some(_) => Stage::Recorded(recorded),
                    None => Stage::Lost(refuse(&error)),
                }
            }
        };
        if let Some(gathering) = inner.gatherings.remove(&ticket.key) {
            // The sessions have the other end.
            gathering.stage.send_replace(stage);
        }
    }
}

impl Inner {
    fn of(&mut self, ticket: &Ticket) -> &mut Gathering {
        match self.gatherings.get_mut(&ticket.key) {
            Some(gathering) => gathering,
            None => unreachable!("a gathering is there as long as one of its tickets is"),
        }
    }

    /// After a failure nobody knows what the log holds until it was read again and settled.
    fn reopen(&mut self) {
        if let Err(error) = self.log.reopen() {
            tracing::error!(error = chain(&error), "the points log cannot be opened again");
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut inner = self.coordinator.lock();
        let Inner { gatherings, forming, .. } = &mut *inner;
        let Some(gathering) = gatherings.get_mut(&self.key) else { return };
        let (machine, disk) = &self.disk;
        gathering.here.remove(&self.disk);
        if matches!(*gathering.stage.borrow(), Stage::Gathering(_)) {
            // Nobody was told yet that all are there: its sender may come again.
            if !gathering.here.iter().any(|(other, _)| other == machine) {
                gathering.machines.insert(machine.clone(), None);
            }
            gathering.look();
        } else {
            gathering.stage.send_if_modified(|stage| {
                let first = !matches!(stage, Stage::Lost(_));
                if first {
                    let of = gathering.group.as_ref().map(|_| format!(" of machine {machine}")).unwrap_or_default();
                    let text = format!(
                        "disk {disk}{of} of the same point was not received, so there is no point; send all of them again"
                    );
                    *stage = Stage::Lost(message::Error::new(Code::Incomplete, text));
                }
                first
            });
        }
        if gathering.here.is_empty() {
            if let Some(group) = &gathering.group
                && forming.get(group) == Some(&self.key.1)
            {
                forming.remove(group);
            }
            gatherings.remove(&self.key);
        }
    }
}

fn random_point() -> Result<PointId, message::Error> {
    let mut bits = [0; 16];
    getrandom::fill(&mut bits)
        .map_err(|error| message::Error::new(Code::Internal, format!("there are no random bits: {error}")))?;
    Ok(PointId(u128::from_ne_bytes(bits)))
}

/// What the peer is told of a points log that cannot be used.
pub(super) fn refuse(error: &Error) -> message::Error {
    let code = match error {
        Error::Io(io) if super::refusal::out_of_space(&io.source) => Code::NoSpace,
        Error::Refused(_) => Code::Refused,
        _ => Code::Internal,
    };
    tracing::error!(error = chain(error), "the points log");
    message::Error::new(code, chain(error))
}
