//! `mt-agent failover`: brings the disks of a machine to a point and releases them, or takes that back.
//!
//! `--json` prints one object: `schema_version` (1), `machine`, `point`, `time`, `dry_run`, and `disks`, of each `disk`, `id`,
//! `rolled_back` (bytes of an interrupted pass) and `brought_back` (bytes that differed from the point); and `compared`: whether
//! the disks were held against what they were when they were released.

use std::time::Instant;

use mt_agent::name::Name;
use mt_agent::points::Log;
use mt_agent::protection::Store;
use mt_agent::recovery::Error;
use mt_agent::recovery::failover::{How, Report, To, fail_over, undo};
use mt_agent::units::ByteLen;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::places::Places;
use super::{Failure, print};

const SCHEMA_VERSION: u32 = 1;

/// Bring a machine's disks to a recovery point and release them, or take that back
#[derive(clap::Args)]
pub struct Args {
    /// The machine
    machine: Name,
    /// The point: latest, latest-application, the id of one (`mt-agent points`), or a time such as 2026-03-01T10:00:00Z
    #[arg(long, value_name = "POINT", required_unless_present = "undo", value_parser = to)]
    to: Option<To>,
    /// Take the last failover back: the disks stand at the newest point again, and can be received
    #[arg(long, conflicts_with = "to")]
    undo: bool,
    /// Take a point that is not one moment of its source, too
    #[arg(long)]
    fuzzy: bool,
    /// Say what would be done, and change nothing
    #[arg(long, conflicts_with = "undo")]
    dry_run: bool,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

pub(super) fn to(text: &str) -> Result<To, String> {
    match text {
        "latest" => return Ok(To::Latest),
        "latest-application" => return Ok(To::LatestApplication),
        _ => {}
    }
    if let Ok(id) = text.parse() {
        return Ok(To::Id(id));
    }
    OffsetDateTime::parse(text, &Rfc3339).map(To::Time).map_err(|_| {
        "give latest, latest-application, a point's id, or a time such as 2026-03-01T10:00:00Z".to_owned()
    })
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Refused(_) | Error::Written { .. } | Error::Disk(_) => Failure::refused(error),
            Error::Protection(error) if error.is_refusal() => Failure::refused(error),
            error => Failure::failed(error),
        }
    }
}

pub fn run(args: Args) -> Result<(), Failure> {
    let config = args.places.load()?;
    let (retention, store) = (&config.retention_dir, Store::open(&config.retention_dir));
    let mut log = Log::open(retention)?;
    let started = Instant::now();
    let engine = config.engine;
    let report = match args.to {
        None => undo(retention, &store, &mut log, &args.machine, engine)?,
        Some(to) => {
            let how = How { fuzzy: args.fuzzy, dry_run: args.dry_run, engine };
            fail_over(retention, &store, &mut log, &args.machine, &to, how)?
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        return print(&format!("{:#}\n", to_json(&args.machine, &report, args.dry_run)));
    }
    let done = match (args.undo, args.dry_run) {
        (true, _) => "taken back: the machine can be received again; its disks stand at",
        (_, true) => "would be failed over to",
        (_, false) => "failed over: its disks are released at",
    };
    let time = report.time.format(&Rfc3339).unwrap_or_default();
    let mut text = format!("{}: {done} point {} of {time} ({seconds:.1} s)\n", args.machine, report.point);
    for disk in &report.disks {
        text += &format!("  {} ({})", disk.disk, disk.id);
        if disk.rolled_back > 0 {
            text += &format!(", {} rolled back", ByteLen(disk.rolled_back));
        }
        if disk.brought_back > 0 {
            text += &format!(", {} brought back", ByteLen(disk.brought_back));
        }
        text += "\n";
    }
    if report.compared {
        text += "  looked at, and found as it was when it was released, of each disk: its first 16 MiB, its last MiB, 64 places \
                 between, and all that had been brought back; what somebody may have written elsewhere was not looked at\n";
    }
    if !args.undo && !args.dry_run {
        text += &format!(
            "  take it back, before anything writes to them, with `mt-agent failover {} --undo`\n",
            args.machine
        );
    }
    print(&text)
}

fn to_json(machine: &Name, report: &Report, dry_run: bool) -> serde_json::Value {
    let disks: Vec<_> = report
        .disks
        .iter()
        .map(|disk| {
            json!({
                "disk": disk.disk, "id": disk.id, "rolled_back": disk.rolled_back, "brought_back": disk.brought_back,
            })
        })
        .collect();
    json!({
        "schema_version": SCHEMA_VERSION, "machine": machine, "point": report.point,
        "time": report.time.format(&Rfc3339).ok(), "dry_run": dry_run, "disks": disks, "compared": report.compared,
    })
}
