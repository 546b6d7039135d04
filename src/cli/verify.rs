//! `mt-agent verify`: whether a master target holds what the disks of this machine hold. Neither is changed.
//!
//! `--json` prints one object: `schema_version` (1), `machine`, `equal`, and `disks`, of each `disk`, `size`, `equal`, `point`
//! (the recovery point that it was compared with, or null: the target stands at none, and was compared as it is),
//! `target_size` (null where it is not known), `differing_bytes`, `differences` (of each `offset` and `length` in bytes, and
//! `where`, the partitions and file systems of the source that it touches, in words; the first 10,000), `free_bytes` (what is
//! proven free and so may differ; null where it is not known), `differing_free_bytes` (how many more differ of a source in use
//! where its file systems called it free when the comparing began: they are not among the others, and it is `equal` with
//! them), and `error`.

use std::sync::atomic::Ordering;

use mt_agent::layout::landmarks::Landmarks;
use mt_agent::layout::tree;
use mt_agent::send::limit::Rates;
use mt_agent::send::{Prepared, Scope};
use mt_agent::storage::file::ReadFile;
use mt_agent::units::ByteLen;
use serde_json::json;

use super::send::{Job, Signals, What};
use super::{Failure, print, print_json};

const SCHEMA_VERSION: u32 = 1;

/// How many differing ranges are listed for people.
const SHOWN: usize = 20;

/// Compare disks of this machine with the newest recovery point of its master target, by digests. A pass that runs goes on
/// beside it: what that has written is not looked at. What differs is told with the partitions and file systems in which it
/// lies; of a source in use, that is also what was written since its last pass
#[derive(clap::Args)]
#[command(mut_arg("whole_disk", |arg| arg.help(
    "Compare the free space of the file systems and volume groups on the disks as well: by default it is not read, and what \
     the master target holds there does not count, where it is certain what is free; of a source in use, what seems to be \
     free is told by itself"
)))]
pub struct Args {
    #[command(flatten)]
    what: What,
    /// Read at most so many bytes a second, all disks together: 100M; by the time of day as in `send --bwlimit`. The master
    /// target reads as slowly then, and is 256 MiB ahead at most. By default nothing is limited: give it where a pass runs
    /// that must not be slowed down
    #[arg(long, value_name = "BYTES|HH:MM-HH:MM=BYTES,…")]
    rate: Option<Rates>,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let mut job = Job::new(&args.what)?;
    job.plan.scope = Scope::Verify;
    job.plan.limit = args.rate;
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::failed)?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::new().map_err(Failure::failed)?;
        job.attempt(&mut signals).await
    });
    runtime.shutdown_background();
    let outcome = outcome?;
    let mut equal = true;
    let mut disks = Vec::new();
    // A disk that answers no read would not answer here either, and nothing would come of all of this.
    let hangs = outcome.disks.iter().any(|disk| disk.progress.waits.hangs().is_some());
    let landmarks = match !hangs && outcome.compared().any(|(_, differs, ..)| differs > 0) {
        true => landmarks(&outcome.disks),
        false => Vec::new(),
    };
    for (index, (disk, differs, differences, error)) in outcome.compared().enumerate() {
        let (name, size) = (&disk.name, disk.source.size());
        let places = |extent| landmarks.get(index).map_or(Vec::new(), |one| one.at(extent));
        let target = Some(disk.progress.target.load(Ordering::Relaxed)).filter(|target| *target > 0);
        let free = disk.progress.space.get().and_then(|space| space.free);
        let in_doubt = disk.progress.differs_free.load(Ordering::Relaxed);
        let point = disk.progress.baseline.get();
        let (to, from) = match point {
            Some(point) => (format!(" to point {point}"), format!(" from point {point}")),
            None => Default::default(),
        };
        let same = differs == 0 && error.is_none();
        equal &= same;
        if !job.json && error.is_none() {
            let mut text = match differs {
                0 if free.is_some_and(|free| free > 0) => {
                    let free = free.unwrap_or_default();
                    let used = ByteLen(size.0 - free);
                    format!("{name}: {used} are equal{to}, and {} are free\n", ByteLen(free))
                }
                0 => format!("{name}: {} are equal{to}\n", ByteLen(size.0 - in_doubt)),
                _ => format!("{name}: {} of {size} differ{from}\n", ByteLen(differs)),
            };
            if in_doubt > 0 {
                text += &format!(
                    "  {} differ in space that its file systems called free when the comparing began: a pass with --freeze \
                     leaves such out, and nothing is missing on the master target. It is in use, so that this is not certain: \
                     compare a snapshot of it, or the disk while nothing of it is mounted\n",
                    ByteLen(in_doubt)
                );
            }
            for extent in differences.iter().take(SHOWN) {
                let places = places(*extent).join("; ");
                text += &format!("  {extent}{}{places}\n", if places.is_empty() { "" } else { ": " });
            }
            if differences.len() > SHOWN {
                text += &format!("  and {} ranges more (--json lists them)\n", differences.len() - SHOWN);
            }
            if let Some(more) = target.and_then(|target| target.checked_sub(size.0)).filter(|more| *more > 0)
            {
                text += &format!(
                    "  the target is larger by {} ({more} bytes): what it holds behind the end of the source was not compared\n",
                    ByteLen(more)
                );
            }
            print(&text)?;
        }
        let differences: Vec<_> = differences
            .iter()
            .map(
                |extent| json!({"offset": extent.offset(), "length": extent.len(), "where": places(*extent)}),
            )
            .collect();
        disks.push(json!({
            "disk": name, "size": size, "point": point, "target_size": target, "equal": same, "differing_bytes": differs,
            "differences": differences, "free_bytes": free, "differing_free_bytes": in_doubt,
            "error": error,
        }));
    }
    if job.json {
        print_json(&json!({
            "schema_version": SCHEMA_VERSION, "machine": job.machine, "equal": equal, "disks": disks,
        }))?;
    }
    outcome.verdict(&job.machine)?;
    match equal {
        true => Ok(()),
        false => Err(Failure::failed(format!(
            "the master target does not hold what {} does; `mt-agent send` brings it",
            job.machine
        ))),
    }
}

/// What lies where on the sources: of each, or nothing where one of them cannot be read any more.
fn landmarks(disks: &[Prepared]) -> Vec<Landmarks> {
    let opened: Result<Vec<(ReadFile, Option<u64>)>, _> = disks
        .iter()
        .map(|disk| {
            let file = ReadFile::open(disk.source.path())?;
            let sector = file.sector()?;
            Ok::<_, mt_agent::error::IoError>((file, sector))
        })
        .collect();
    let Ok(opened) = opened else { return Vec::new() };
    let all: Vec<tree::Disk<'_>> =
        opened.iter().map(|(file, sector)| tree::Disk { reader: file, sector: *sector }).collect();
    let layout = tree::read(&all);
    (0..disks.len()).map(|index| Landmarks::of(&layout, index)).collect()
}
