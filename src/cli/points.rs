//! `mt-agent points`: the recovery points of a machine. It reads files only, and needs no service.
//!
//! `--json` prints one object:
//!
//! | field | what |
//! |---|---|
//! | `schema_version` | 1 |
//! | `machine` | its name |
//! | `released` | `null`, or where the machine was failed over to: `point` and `time` |
//! | `begun` | `null`, or what began and is not done: a failover to `point`, or, where that is `null`, its undoing; and `time` |
//! | `points` | oldest first |
//!
//! and of each point:
//!
//! | field | what |
//! |---|---|
//! | `id` | 32 hexadecimal digits |
//! | `time`, `recorded` | the moment by the source's clock, and when it was recorded by this host's (RFC 3339) |
//! | `kind` | `crash`, `filesystem` or `application` |
//! | `fuzzy` | whether the source was in use and not frozen: no moment at all |
//! | `name`, `group` | text or `null` |
//! | `size` | bytes of before-images that going back from it to the point before writes, all disks of the machine |
//! | `complete` | whether every disk that is assigned to the machine has it |
//! | `disks` | of the machine: `name`, `id` (the target disk), `pass` (number in its journal), `sender_pass`, `size` |

use std::collections::HashSet;

use mt_agent::disk::id::DiskId;
use mt_agent::error::chain;
use mt_agent::name::Name;
use mt_agent::points::{Error, Log, Point, VolumeAt};
use mt_agent::protection::{self, Store};
use mt_agent::units::ByteLen;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::places::Places;
use super::{Failure, print, table};

/// The version of the JSON; it changes when a field goes or changes its meaning.
const SCHEMA_VERSION: u32 = 1;

/// List the recovery points of a machine, oldest first
#[derive(clap::Args)]
pub struct Args {
    /// The machine
    machine: Name,
    /// Print it as JSON, with sizes in bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Refused(_) => Failure::refused(error),
            _ => Failure::failed(error),
        }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    let config = args.places.load()?;
    let machine = &args.machine;
    let log = Log::open(&config.retention_dir)?;
    let points: Vec<&Point> = log.points(machine).collect();
    let disks = match Store::open(&config.retention_dir).load(machine) {
        Ok(protection) => protection.disks.into_iter().map(|disk| (disk.name, disk.id)).collect(),
        Err(error @ protection::Error::NoMachine { .. }) if points.is_empty() => return Err(error.into()),
        // The disks were taken away; the points are there all the same.
        Err(protection::Error::NoMachine { .. }) => disks_of(&points, machine),
        Err(error) => {
            note!("mt-agent: `complete` is told by the points alone: {}", chain(&error));
            disks_of(&points, machine)
        }
    };
    let released = log.released(machine);
    if args.json {
        let points: Vec<Value> = points.iter().map(|point| point_json(point, machine, &disks)).collect();
        let value = json!({
            "schema_version": SCHEMA_VERSION,
            "machine": machine,
            "released": released.map(|at| json!({ "point": at.point.to_string(), "time": rfc3339(at.time) })),
            "begun": log.begun(machine).map(|begun| json!({
                "point": begun.point.map(|point| point.to_string()), "time": rfc3339(begun.time),
            })),
            "points": points,
        });
        return print(&format!("{value:#}\n"));
    }
    if points.is_empty() {
        return print(&format!("machine {machine} has no recovery points\n"));
    }
    let rows: Vec<Vec<String>> = points.iter().map(|point| row(point, machine, &disks)).collect();
    let mut lines = table::lines(&["ID", "TIME", "KIND", "NAME", "GROUP", "SIZE", "COMPLETE"], &rows);
    if let Some(at) = released {
        lines.push(format!(
            "machine {machine} was failed over to point {} at {}",
            at.point,
            rfc3339(at.time)
        ));
    }
    if let Some(begun) = log.begun(machine) {
        lines.push(format!(
            "{begun} began at {} and is not done: `mt-agent failover {machine}`, with --to or --undo, goes on with it or takes it \
             back",
            rfc3339(begun.time)
        ));
    }
    print(&(lines.join("\n") + "\n"))
}

/// All disks that the machine has at any of its points.
fn disks_of(points: &[&Point], machine: &Name) -> HashSet<(Name, DiskId)> {
    let volumes = points.iter().flat_map(|point| point.volumes_of(machine));
    volumes.map(|volume| (volume.disk.clone(), volume.id.clone())).collect()
}

fn is_complete(point: &Point, machine: &Name, disks: &HashSet<(Name, DiskId)>) -> bool {
    let there = |volume: &VolumeAt, (name, id): &(Name, DiskId)| volume.disk == *name && volume.id == *id;
    disks.iter().all(|disk| point.volumes_of(machine).any(|volume| there(volume, disk)))
}

fn size(point: &Point, machine: &Name) -> ByteLen {
    ByteLen(point.volumes_of(machine).fold(0, |sum, volume| sum.saturating_add(volume.bytes)))
}

fn row(point: &Point, machine: &Name, disks: &HashSet<(Name, DiskId)>) -> Vec<String> {
    let fuzzy = if point.fuzzy { ", fuzzy" } else { "" };
    let complete = if is_complete(point, machine, disks) { "yes" } else { "no" };
    vec![
        point.id.to_string(),
        rfc3339(point.time),
        format!("{}{fuzzy}", point.kind),
        point.name.as_ref().map_or("-".to_owned(), Name::to_string),
        point.group.as_ref().map_or("-".to_owned(), Name::to_string),
        size(point, machine).to_string(),
        complete.to_owned(),
    ]
}

fn point_json(point: &Point, machine: &Name, disks: &HashSet<(Name, DiskId)>) -> Value {
    let disk = |volume: &VolumeAt| {
        json!({
            "name": volume.disk,
            "id": volume.id,
            "pass": volume.pass,
            "sender_pass": volume.sender_pass.to_string(),
            "size": volume.bytes,
        })
    };
    json!({
        "id": point.id.to_string(),
        "time": rfc3339(point.time),
        "recorded": rfc3339(point.recorded),
        "kind": point.kind,
        "fuzzy": point.fuzzy,
        "name": point.name,
        "group": point.group,
        "size": size(point, machine),
        "complete": is_complete(point, machine, disks),
        "disks": point.volumes_of(machine).map(disk).collect::<Vec<_>>(),
    })
}

/// RFC 3339 has no years beyond 9999; the log has none either.
fn rfc3339(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_else(|_| time.unix_timestamp().to_string())
}
