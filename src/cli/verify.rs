//! `mt-agent verify`: whether a master target holds what the disks of this machine hold. Neither is changed.
//!
//! `--json` prints one object: `schema_version` (1), `machine`, `equal`, and `disks`, of each `disk`, `size`, `equal`,
//! `differing_bytes`, `differences` (of each `offset` and `length` in bytes, the first 10,000), `free_bytes` (what is proven
//! free and so may differ; null where it is not known), and `error`.

use mt_agent::send::Scope;
use mt_agent::units::ByteLen;
use serde_json::json;

use super::send::{self, Job, Signals, What};
use super::{Failure, print, print_json};

const SCHEMA_VERSION: u32 = 1;

/// How many differing ranges are listed for people.
const SHOWN: usize = 20;

/// Compare disks of this machine with what its master target holds, by digests. Nothing is received for a disk meanwhile: a
/// `send` waits until it is through
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    what: What,
    /// Read at most so many bytes a second, all disks together: 100M. The master target reads as slowly then
    #[arg(long, value_name = "BYTES", value_parser = send::limit)]
    rate: Option<ByteLen>,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let mut job = Job::new(&args.what)?;
    job.plan.scope = Scope::Verify;
    job.plan.limit = args.rate.map(|rate| rate.0);
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::failed)?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::new().map_err(Failure::failed)?;
        job.attempt(&mut signals).await
    });
    runtime.shutdown_background();
    let outcome = outcome?;
    let mut equal = true;
    let mut disks = Vec::new();
    for ((name, size, differs, differences), error) in outcome.compared() {
        let progress = outcome.disks.iter().find(|disk| disk.name == *name).map(|disk| &disk.progress);
        let free = progress.and_then(|progress| progress.space.get()?.free);
        let same = differs == 0 && error.is_none();
        equal &= same;
        if !job.json && error.is_none() {
            let mut text = match differs {
                0 if free.is_some_and(|free| free > 0) => {
                    let free = free.unwrap_or_default();
                    format!("{name}: {} are equal, and {} are free\n", ByteLen(size.0 - free), ByteLen(free))
                }
                0 => format!("{name}: {size} are equal\n"),
                _ => format!("{name}: {} of {size} differ\n", ByteLen(differs)),
            };
            for extent in differences.iter().take(SHOWN) {
                text += &format!("  {extent}\n");
            }
            if differences.len() > SHOWN {
                text += &format!("  and {} ranges more (--json lists them)\n", differences.len() - SHOWN);
            }
            print(&text)?;
        }
        let differences: Vec<_> = differences
            .iter()
            .map(|extent| json!({"offset": extent.offset(), "length": extent.len()}))
            .collect();
        disks.push(json!({
            "disk": name, "size": size, "equal": same, "differing_bytes": differs, "differences": differences,
            "free_bytes": free,
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
