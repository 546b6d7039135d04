//! `mt-agent check`: reads the journals of a machine whole, and says which of its points are sound.
//!
//! `--json` prints one object: `schema_version` (1), `machine`, `read_bytes`, and `points`, oldest first, of each `id`, `sound`
//! and `damage` (an array of texts).

use mt_agent::name::Name;
use mt_agent::points::Log;
use mt_agent::protection::Store;
use mt_agent::recovery::check::check;
use mt_agent::units::ByteLen;
use serde_json::json;

use super::places::Places;
use super::{Failure, print};

const SCHEMA_VERSION: u32 = 1;

/// Verify the before-images of a machine's recovery points; exit code 1 where one is not sound
#[derive(clap::Args)]
pub struct Args {
    /// The machine
    machine: Name,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let config = args.places.load()?;
    let (retention, store) = (&config.retention_dir, Store::open(&config.retention_dir));
    let log = Log::open(retention)?;
    let report = check(retention, &store, &log, &args.machine)?;
    let damaged = report.points.iter().filter(|point| !point.damage.is_empty()).count();
    if args.json {
        let points: Vec<_> = report
            .points
            .iter()
            .map(|point| json!({ "id": point.id, "sound": point.damage.is_empty(), "damage": point.damage }))
            .collect();
        let report = json!({
            "schema_version": SCHEMA_VERSION, "machine": args.machine, "read_bytes": report.bytes, "points": points,
        });
        print(&format!("{report:#}\n"))?;
    } else {
        for point in &report.points {
            match point.damage.as_slice() {
                [] => print(&format!("{}  sound\n", point.id))?,
                damage => print(&format!("{}  NOT SOUND: {}\n", point.id, damage.join("; ")))?,
            }
        }
        let (count, read) = (report.points.len(), ByteLen(report.bytes));
        print(&format!(
            "{}: {count} points, {damaged} not sound; {read} of before-images read\n",
            args.machine
        ))?;
    }
    match damaged {
        0 => Ok(()),
        _ => Err(Failure::failed(format!("{damaged} points of {} cannot be gone back to", args.machine))),
    }
}
