//! `mt-agent check`: reads the journals of a machine whole, says which of its points are sound, and gives up the others where
//! it is told to.
//!
//! `--json` prints one object: `schema_version` (1), `machine`, `read_bytes`, and `points`, oldest first, of each `id`, `sound`,
//! `given_up`, and `damage` (an array of texts); `lost`, the disks of which no point can be reached, of each `disk` and `what`
//! is wrong; and `put_aside`, the paths to which files of other disks were moved.

use mt_agent::name::Name;
use mt_agent::points::Log;
use mt_agent::protection::Store;
use mt_agent::recovery::check::{check, give_up};
use mt_agent::units::ByteLen;
use serde_json::json;

use super::places::Places;
use super::{Failure, print};

const SCHEMA_VERSION: u32 = 1;

/// Verify the before-images of a machine's recovery points; exit code 1 where one is not sound, and was not given up
#[derive(clap::Args)]
pub struct Args {
    /// The machine
    machine: Name,
    /// Give up the points that are not sound, for good: then the machine can be received again, from the newest one that is
    /// left on, or, where a disk has none left, from an initial pass on
    #[arg(long)]
    give_up: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let config = args.places.load()?;
    let (retention, store) = (&config.retention_dir, Store::open(&config.retention_dir));
    let mut log = Log::open(retention)?;
    let report = match args.give_up {
        true => give_up(retention, &store, &mut log, &args.machine)?,
        false => check(retention, &store, &mut log, &args.machine)?,
    };
    for (disk, what) in report.lost.iter().filter(|_| report.points.is_empty()) {
        note!("mt-agent: disk {disk}: {what}");
    }
    for path in &report.put_aside {
        note!(
            "mt-agent: files of another disk were put aside in {}: put each of them back where it was, or remove them",
            path.display()
        );
    }
    for disk in &report.unseen {
        note!(
            "mt-agent: disk {disk} is released and not attached: whether somebody wrote to it is not known"
        );
    }
    let gone = |damage: &[String]| args.give_up && !damage.is_empty();
    let damaged = report.points.iter().filter(|point| !point.damage.is_empty()).count();
    if args.json {
        let points: Vec<_> = report
            .points
            .iter()
            .map(|point| {
                json!({
                    "id": point.id, "sound": point.damage.is_empty(), "given_up": gone(&point.damage),
                    "damage": point.damage,
                })
            })
            .collect();
        let report = json!({
            "schema_version": SCHEMA_VERSION, "machine": args.machine, "read_bytes": report.bytes, "points": points,
            "lost": report.lost.iter().map(|(disk, what)| json!({ "disk": disk, "what": what })).collect::<Vec<_>>(),
            "put_aside": report.put_aside,
        });
        print(&format!("{report:#}\n"))?;
    } else {
        for point in &report.points {
            match point.damage.as_slice() {
                [] => print(&format!("{}  sound\n", point.id))?,
                damage => {
                    let done = if gone(damage) { ", given up" } else { "" };
                    print(&format!("{}  NOT SOUND{done}: {}\n", point.id, damage.join("; ")))?;
                }
            }
        }
        let (count, read) = (report.points.len(), ByteLen(report.bytes));
        print(&format!(
            "{}: {count} points, {damaged} not sound; {read} of before-images read\n",
            args.machine
        ))?;
    }
    match damaged {
        _ if args.give_up => Ok(()),
        0 if report.lost.is_empty() => Ok(()),
        _ => Err(Failure::failed(format!(
            "{damaged} points of {} cannot be gone back to; `mt-agent check {} --give-up` gives them up for good",
            args.machine, args.machine
        ))),
    }
}
