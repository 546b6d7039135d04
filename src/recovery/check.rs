//! Reads the journals of a machine whole, says which of its points are sound, and gives up those that are not.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use time::OffsetDateTime;

use super::failover::written_to;
use super::target::Target;
use super::{Error, Journal, Standing, let_go, place};
use crate::durable;
use crate::error::{IoError, chain};
use crate::journal::{recover, verify};
use crate::name::Name;
use crate::points::{GivenUp, Log, PointId, Record};
use crate::protection::{Assignment, Store};

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// The points of the machine, oldest first.
    pub points: Vec<Checked>,
    /// How many bytes of before-images were read.
    pub bytes: u64,
    /// The released disks that are not attached: whether somebody wrote to them is not known.
    pub unseen: Vec<Name>,
    /// The disks of which no point can be reached, and why; there may be none to show it with.
    pub lost: Vec<(Name, String)>,
    /// Where files were put that belong to another disk.
    pub put_aside: Vec<PathBuf>,
}

/// One point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// Which.
    pub id: PointId,
    /// What is wrong with what it needs, one text a disk; nothing where it is sound.
    pub damage: Vec<String>,
}

/// What is wrong with one disk.
#[derive(Default)]
struct Disk {
    /// Nothing can be said of what it holds: no point can be reached.
    lost: Option<String>,
    /// The passes that are damaged.
    passes: BTreeMap<u64, String>,
    /// The pass that led to the point at which it is released: what lies before needs nothing that came after.
    released: Option<u64>,
}

/// Verifies every segment that a point of the machine needs: checksums, sequence, whose it is, and that none is missing; and
/// for a machine that is failed over, that nobody is seen to have written to its disks. Writes nothing.
pub fn check(retention: &Path, store: &Store, log: &mut Log, machine: &Name) -> Result<Report, Error> {
    let protection = store.load(machine)?;
    // Points that were committed since it was read are in the protection.
    log.refresh()?;
    let mut report = Report::default();
    let mut disks = Vec::new();
    for disk in &protection.disks {
        let found = look(retention, log, machine, disk, &mut report)?;
        if let Some(lost) = &found.lost {
            report.lost.push((disk.name.clone(), lost.clone()));
        }
        disks.push((disk, found));
    }
    for point in log.points(machine) {
        let mut damage = Vec::new();
        for (disk, found) in &disks {
            let Some(at) = point.volumes_of(machine).find(|at| at.is_on(&disk.name, &disk.id)) else {
                continue;
            };
            let until = found.released.filter(|released| at.pass <= *released).unwrap_or(u64::MAX);
            let worst = found.passes.iter().rfind(|(pass, _)| (at.pass + 1..=until).contains(*pass));
            let what = found.lost.as_ref().or(worst.map(|(_, what)| what));
            damage.extend(what.map(|what| format!("disk {}: {what}", disk.name)));
        }
        report.points.push(Checked { id: point.id, damage });
    }
    Ok(report)
}

fn look(
    retention: &Path,
    log: &Log,
    machine: &Name,
    disk: &Assignment,
    report: &mut Report,
) -> Result<Disk, Error> {
    let mut found = Disk::default();
    let journal = match Journal::read(retention, machine, disk, log) {
        Ok(journal) => journal,
        // What else the journal holds, and whether a pass is open, is not known then.
        Err(Error::Journal { source: error @ recover::Error::Foreign { .. }, .. }) => {
            return Ok(Disk { lost: Some(chain(&error)), ..found });
        }
        Err(error @ (Error::Behind { .. } | Error::Forgotten { .. })) => {
            return Ok(Disk { lost: Some(chain(&error)), ..found });
        }
        Err(error) => return Err(error),
    };
    for (pass, damage) in journal.missing() {
        found.passes.insert(pass, damage.to_string());
    }
    for (number, pass) in journal.history.passes.range(journal.standing.oldest() + 1..) {
        if let Err(error) = verify(pass, &journal.shelf) {
            found.passes.insert(*number, chain(&error));
        }
        report.bytes += pass.bytes;
    }
    if let Some(released) = log.released(machine) {
        found.released = journal.standing.pass_at(released.point);
        // While that is being taken back, the disk is neither the one nor the other.
        if log.begun(machine).is_none() {
            match Target::attached(&disk.id) {
                Err(error) if error.source.kind() == io::ErrorKind::NotFound => {
                    report.unseen.push(disk.name.clone());
                }
                target => {
                    let place = written_to(released, &disk.name, &journal, &target?)?;
                    found.lost = place.map(|place| {
                        format!("it was written to since it was released: {place} is not as it was")
                    });
                }
            }
        }
    }
    Ok(found)
}

/// Gives up the points that are not sound, for good, so that the machine can be received again: from the newest point that is
/// left, or, where a disk has none left, from an initial pass on. Says which points those were. A machine that is failed over
/// stays so, unless the very point is given up; one at which another machine is failed over is not.
///
/// First the points, in one record, then what the protection says of them, then what the journals have: a crash in between
/// leaves segments that nobody needs, which the next look at the retention removes, or what calling it again mends.
pub fn give_up(retention: &Path, store: &Store, log: &mut Log, machine: &Name) -> Result<Report, Error> {
    let protection = store.load(machine)?;
    let _alone = super::failover::alone(store, machine)?;
    log.settle()?;
    let mut report = check(retention, store, log, machine)?;
    let given_up = report.points.iter().filter(|point| !point.damage.is_empty());
    let points: Vec<PointId> = given_up.map(|point| point.id).collect();
    if points.is_empty() && report.lost.is_empty() {
        return Ok(report);
    }
    if !points.is_empty() {
        let time = OffsetDateTime::now_utc();
        if log.released(machine).is_some_and(|released| points.contains(&released.point)) {
            store.release(machine, None)?;
        }
        log.append(Record::GivenUp(GivenUp { machine: machine.clone(), time, points }))?;
    }
    for disk in &protection.disks {
        let standing = Standing::of(machine, &disk.name, &disk.id, log);
        if standing.newest().is_none() {
            store.forget_commit(machine, &disk.name)?;
        }
        // Of a disk without points the segments stay until its initial pass begins; but not those of another one.
        match Journal::read(retention, machine, disk, log) {
            Err(Error::Journal { source: recover::Error::Foreign { .. }, .. }) => {
                report.put_aside.push(put_aside(&place(retention, machine, &disk.name))?);
            }
            Ok(_) | Err(Error::Behind { .. } | Error::Forgotten { .. }) => {
                let_go(retention, machine, &disk.name, &standing)?
            }
            Err(error) => return Err(error),
        }
    }
    Ok(report)
}

/// Puts a journal away in which there are files of another disk: they are not ours to remove, and in the way of the next pass.
fn put_aside(journal: &Path) -> Result<PathBuf, IoError> {
    // No disk is called that.
    let names = (1..).map(|number| {
        let mut name = journal.as_os_str().to_owned();
        name.push(format!("~foreign-{number}"));
        PathBuf::from(name)
    });
    for aside in names {
        match durable::rename(journal, &aside) {
            Err(error) if error.source.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            other => return other.map(|()| aside),
        }
    }
    unreachable!("there are more names than files")
}
