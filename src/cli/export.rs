//! `mt-agent export`: the disks of a machine as they were at a point, as image files. The disks are only read.
//!
//! `--json` prints one object: `schema_version` (1), `machine`, `point`, and `images`, of each `disk`, `path`, `size` and
//! `written_bytes` (the rest are holes).

use std::path::PathBuf;

use mt_agent::name::Name;
use mt_agent::points::Log;
use mt_agent::protection::Store;
use mt_agent::recovery::export::export;
use mt_agent::recovery::failover::To;
use mt_agent::units::ByteLen;
use serde_json::json;

use super::places::Places;
use super::{Failure, digest, failover, print};

const SCHEMA_VERSION: u32 = 1;

/// Write a machine's disks as they were at a recovery point to image files
#[derive(clap::Args)]
pub struct Args {
    /// The machine and the point: MACHINE@latest, MACHINE@ID (or its first digits), MACHINE@NAME or MACHINE@TIME
    #[arg(value_name = "MACHINE@POINT", value_parser = what)]
    what: (Name, To),
    /// Where to put DISK.img of each disk; none of them may exist
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Print what was written as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

/// `MACHINE@POINT`.
pub(super) fn what(text: &str) -> Result<(Name, To), String> {
    let (machine, point) = text.split_once('@').ok_or("give MACHINE@POINT, as in web01@latest")?;
    Ok((machine.parse().map_err(|error| format!("{error}"))?, failover::to(point)?))
}

pub fn run(args: Args) -> Result<(), Failure> {
    let config = args.places.load()?;
    let (retention, store) = (&config.retention_dir, Store::open(&config.retention_dir));
    let (machine, to) = args.what;
    let mut log = Log::open(retention)?;
    let point = to.find(&log, &machine)?.clone();
    if point.fuzzy {
        note!(
            "mt-agent: point {} is no moment of its source, which was in use while it was read: what is in the images may              contradict itself",
            point.id
        );
    }
    let total: u64 = store.load(&machine)?.disks.iter().map(|disk| disk.size.0).sum();
    let bar = digest::bar(total);
    let images = export(retention, &store, &mut log, &machine, &point, &args.dir, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let images = images?;
    if let Some(released) = log.released(&machine) {
        note!(
            "mt-agent: machine {machine} is failed over to point {}: its disks are no longer ours. Their first 16 MiB, their \
             last MiB, 64 places between, and all that was brought back are as they were then; if somebody wrote elsewhere, that \
             is in the images, too",
            released.point
        );
    }
    if args.json {
        let images: Vec<_> = images
            .iter()
            .map(|image| {
                json!({
                    "disk": image.disk, "path": image.path, "size": image.size, "written_bytes": image.written,
                })
            })
            .collect();
        let report = json!({
            "schema_version": SCHEMA_VERSION, "machine": machine, "point": point.id, "images": images,
        });
        return print(&format!("{report:#}\n"));
    }
    let text = images.iter().map(|image| {
        let (size, written) = (ByteLen(image.size), ByteLen(image.written));
        format!(
            "{}: {size} in {} ({written} of data), as at point {}\n",
            image.disk,
            image.path.display(),
            point.id
        )
    });
    print(&text.collect::<String>())
}
