//! `mt-agent digest`: the digest of whole disks and images, and of a machine's disks at a recovery point, to be compared by eye
//! or by a program. They are only read.
//!
//! `--json` prints one object: `schema_version` (1) and `digests`, of each `what` (as it was given), `disk` and `point` (null but
//! of a machine at a point), `path` (null of one), `size` (bytes), `algorithm` (`blake3`) and `digest` (64 hexadecimal digits).

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use mt_agent::disk::discover::{self, FindError, Options, Sysroot, find};
use mt_agent::name::Name;
use mt_agent::points::Log;
use mt_agent::protection::Store;
use mt_agent::recovery::export::{Digested, digests};
use mt_agent::recovery::failover::To;
use mt_agent::send::Progress;
use mt_agent::send::source::{self, Source};
use mt_agent::storage::device::EngineChoice;
use serde_json::{Value, json};

use super::places::Places;
use super::{Failure, export, print, print_json};

const SCHEMA_VERSION: u32 = 1;

/// Print the BLAKE3 digest of whole disks or images, or of a machine's disks at a recovery point
#[derive(clap::Args)]
pub struct Args {
    /// Disks, by identity or device node, and image files; on the master target also MACHINE@latest, MACHINE@ID or
    /// MACHINE@TIME: of each disk of the machine as many bytes as its source had when it was sent last
    #[arg(value_name = "DISK|FILE|MACHINE@POINT", required = true)]
    what: Vec<String>,
    /// How to read: auto, io-uring or threads
    #[arg(long, default_value = "auto")]
    engine: EngineChoice,
    /// Print the digests as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let mut digests = Vec::new();
    for what in &args.what {
        if let Some((machine, to)) = at_point(what) {
            digests.extend(of_point(&args, what, &machine, &to)?);
            continue;
        }
        let path = place(what)?;
        let (digest, size) = read(&path, args.engine)?;
        if !args.json {
            print(&format!("{digest}  {what}\n"))?;
        }
        digests.push(json!({
            "what": what, "disk": null, "point": null, "path": path, "size": size, "algorithm": "blake3",
            "digest": digest,
        }));
    }
    if args.json {
        print_json(&json!({ "schema_version": SCHEMA_VERSION, "digests": Value::from(digests) }))?;
    }
    Ok(())
}

/// A machine and a point, if that is what was named. No identity of a disk is read like one but a loop device's.
fn at_point(what: &str) -> Option<(Name, To)> {
    if Path::new(what).exists() || what.starts_with("loop:") {
        return None;
    }
    export::what(what).ok()
}

fn of_point(args: &Args, what: &str, machine: &Name, to: &To) -> Result<Vec<Value>, Failure> {
    let config = args.places.load()?;
    let (retention, store) = (&config.retention_dir, Store::open(&config.retention_dir));
    let mut log = Log::open(retention)?;
    let point = to.find(&log, machine)?.clone();
    let bar = bar(store.load(machine)?.disks.iter().map(|disk| disk.size.0).sum());
    let digests = digests(retention, &store, &mut log, machine, &point, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let mut values = Vec::new();
    for Digested { disk, size, digest } in digests? {
        let digest = blake3::Hash::from_bytes(digest).to_hex().to_string();
        if !args.json {
            print(&format!("{digest}  {machine}@{} {disk}, {size} bytes\n", point.id))?;
        }
        values.push(json!({
            "what": what, "disk": disk, "point": point.id, "path": null, "size": size, "algorithm": "blake3",
            "digest": digest,
        }));
    }
    Ok(values)
}

/// On a terminal, how much of so many bytes was read.
pub(super) fn bar(size: u64) -> ProgressBar {
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new(size),
        false => ProgressBar::hidden(),
    };
    let style = "{bar:30} {bytes:>11} of {total_bytes:11} {binary_bytes_per_sec:>12}  {eta}";
    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// Where a disk that was named is read. What is a path is one; else it is an identity.
fn place(what: &str) -> Result<PathBuf, Failure> {
    if Path::new(what).exists() {
        return Ok(what.into());
    }
    let options = Options { include_loop: true, probe_exclusive: false, ..Options::default() };
    let disks = discover::discover(&Sysroot::default(), &options).map_err(Failure::failed)?;
    match find(&disks, what) {
        Ok(disk) => Ok(disk.node.clone()),
        Err(FindError::Parse(error)) if !what.starts_with("/dev/disk/") => {
            Err(Failure::refused(match what.contains('/') {
                true => format!("there is no file `{what}`"),
                false => format!("there is no file `{what}`, and no disk is named so: {}", error.reason),
            }))
        }
        Err(error) => Err(Failure::refused(error)),
    }
}

fn read(path: &Path, engine: EngineChoice) -> Result<(String, u64), Failure> {
    let failed = |error: source::Error| match error.is_refusal() {
        true => Failure::refused(error),
        false => Failure::failed(error),
    };
    let source = Source::open(path).map_err(failed)?;
    let size = source.size().0;
    let bar = bar(size);
    let progress = Arc::new(Progress::default());
    let digest = std::thread::scope(|scope| {
        let counted = progress.clone();
        let reading = scope.spawn(move || source::digest(source, engine, counted));
        while !reading.is_finished() {
            bar.set_position(progress.done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(20));
        }
        reading.join()
    });
    bar.finish_and_clear();
    let digest = digest.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map_err(failed)?;
    Ok((blake3::Hash::from_bytes(digest).to_hex().to_string(), size))
}
