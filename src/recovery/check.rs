//! Reads the journals of a machine whole, and says which of its points are sound.

use std::path::Path;

use super::{Error, Journal};
use crate::error::chain;
use crate::journal::recover::verify;
use crate::name::Name;
use crate::points::{Log, PointId};
use crate::protection::Store;

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// The points of the machine, oldest first.
    pub points: Vec<Checked>,
    /// How many bytes of before-images were read.
    pub bytes: u64,
}

/// One point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// Which.
    pub id: PointId,
    /// What is wrong with what it needs, one text a disk; nothing where it is sound.
    pub damage: Vec<String>,
}

/// Verifies every segment that a point of the machine needs: checksums, sequence, and that none is missing. Writes nothing.
pub fn check(retention: &Path, store: &Store, log: &Log, machine: &Name) -> Result<Report, Error> {
    let protection = store.load(machine)?;
    let mut report = Report { points: Vec::new(), bytes: 0 };
    let mut passes = Vec::new();
    for disk in &protection.disks {
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        let journal = Journal::read(retention, machine, &disk.name, &disk.id, log).map_err(failed)?;
        // From the newest back: a damaged pass costs the points before it.
        let mut broken: Option<(u64, String)> = None;
        let led_to_points: Vec<u64> = log
            .points(machine)
            .flat_map(|point| point.volumes_of(machine))
            .filter(|volume| volume.disk == disk.name && volume.id == disk.id)
            .map(|volume| volume.pass)
            .collect();
        let oldest = journal.oldest.unwrap_or(0);
        for (number, pass) in journal.history.passes.range(oldest + 1..).rev() {
            let sound = match verify(pass, &journal.shelf) {
                Ok(()) if led_to_points.contains(number) && !pass.ended => {
                    Err("its end is missing".to_owned())
                }
                Ok(()) => Ok(()),
                Err(error) => Err(chain(&error)),
            };
            report.bytes += pass.bytes;
            if let Err(what) = sound
                && broken.is_none()
            {
                broken = Some((*number, format!("disk {}: {what}", disk.name)));
            }
        }
        // A delta pass that led to a point has a segment, if only for its end.
        let missing =
            led_to_points.iter().skip(1).rev().find(|pass| !journal.history.passes.contains_key(pass));
        if let Some(missing) = missing
            && broken.as_ref().is_none_or(|(number, _)| number < missing)
        {
            broken =
                Some((*missing, format!("disk {}: the segments of pass {missing} are missing", disk.name)));
        }
        passes.push((disk.name.clone(), broken));
    }
    for point in log.points(machine) {
        let mut damage = Vec::new();
        for (disk, broken) in &passes {
            let at = point.volumes_of(machine).find(|volume| volume.disk == *disk);
            if let (Some(at), Some((number, what))) = (at, broken)
                && at.pass < *number
            {
                damage.push(what.clone());
            }
        }
        report.points.push(Checked { id: point.id, damage });
    }
    Ok(report)
}
