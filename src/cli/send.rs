//! `mt-agent send`: the source side.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mt_agent::agent::logging;
use mt_agent::disk::discover::Sysroot;
use mt_agent::error::chain;
use mt_agent::name::Name;
use mt_agent::net::address::Address;
use mt_agent::net::message::Committed;
use mt_agent::net::tls::client::Identity;
use mt_agent::send::{self, Compression, Error, Plan, Progress};
use mt_agent::storage::device::EngineChoice;
use mt_agent::units::ByteLen;
use serde_json::json;
use time::format_description::well_known::Rfc3339;

use super::{Failure, print};

/// The version of the JSON that this command prints.
const SCHEMA_VERSION: u32 = 1;

/// Send disks of this machine to its master target
#[derive(clap::Args)]
pub struct Args {
    /// The master target; by default the one where the machine was enrolled
    #[arg(long, value_name = "HOST[:PORT]")]
    to: Option<Address>,
    /// The machine, by the name under which it was enrolled
    #[arg(long)]
    machine: Name,
    /// The name of a disk on the master target, and where it is read: a block device or an image file. Several:
    /// separated by commas, or with the option repeated
    #[arg(long = "disk", value_name = "NAME=SOURCE", required = true, value_delimiter = ',', value_parser = disk)]
    disks: Vec<(Name, PathBuf)>,
    /// How to compress: auto (LZ4 where it pays), off, lz4 or zstd
    #[arg(long, default_value = "auto")]
    compression: Compression,
    /// Send at most so many bytes a second, all disks together: 10M, 512K
    #[arg(long, value_name = "BYTES", value_parser = limit)]
    bwlimit: Option<ByteLen>,
    /// How to read: auto, io-uring or threads
    #[arg(long, default_value = "auto")]
    engine: EngineChoice,
    /// Check that the sources can be read and show what would be sent, and send nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Where the machine's identity lies
    #[arg(long, value_name = "DIR", default_value = super::STATE_DIR)]
    state_dir: PathBuf,
    /// What to log to stderr: error, warn, info, debug or trace
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    log_level: String,
    /// What to call the recovery point that this leads to
    #[arg(long, value_name = "NAME")]
    point_name: Option<Name>,
}

/// A frame of 1 MiB must not take so long that the receiver gives the connection up.
const LEAST_LIMIT: ByteLen = ByteLen(64 * ByteLen::KIB);

fn limit(text: &str) -> Result<ByteLen, String> {
    let limit: ByteLen = text.parse().map_err(|error| format!("{error}"))?;
    if limit < LEAST_LIMIT { Err(format!("give at least {LEAST_LIMIT} a second")) } else { Ok(limit) }
}

fn disk(text: &str) -> Result<(Name, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("give NAME=SOURCE, as in root=/dev/sda")?;
    if path.is_empty() {
        return Err("give the source after the `=`".to_owned());
    }
    Ok((name.parse().map_err(|error| format!("{error}"))?, path.into()))
}

pub fn run(args: Args) -> Result<(), Failure> {
    logging::init(Some(logging::Format::Text), Some(&args.log_level)).map_err(Failure::failed)?;
    for (index, (name, path)) in args.disks.iter().enumerate() {
        if args.disks[..index].iter().any(|(other, source)| other == name || source == path) {
            return Err(Failure::refused(format!("{name}={} is named twice", path.display())));
        }
    }
    let identity = Identity::load(&args.state_dir, &args.machine).map_err(Failure::refused)?;
    let to = match args.to {
        Some(to) => to,
        None => identity.server.parse().map_err(Failure::failed)?,
    };
    let mut plan = Plan {
        name: args.point_name,
        point_in_time: true,
        to,
        disks: args.disks,
        compression: args.compression,
        engine: args.engine,
        limit: args.bwlimit.map(|limit| limit.0),
    };
    let disks = send::prepare(&plan).map_err(Failure::failed)?;
    for disk in &disks {
        let path = disk.source.path();
        for mount in disk.source.mounts(&Sysroot::default()) {
            plan.point_in_time = false;
            eprintln!(
                "mt-agent: {} is in use ({mount}): what arrives is not one point in time",
                path.display()
            );
        }
    }
    if args.dry_run {
        for disk in &disks {
            let (name, path, size) = (&disk.name, disk.source.path().display(), disk.source.size());
            print(&format!(
                "would send {path} ({size}) as disk {name} of {} to {}\n",
                args.machine, plan.to
            ))?;
        }
        return Ok(());
    }
    let tls = identity.client_config().map_err(Failure::failed)?;
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::failed)?;
    let started = Instant::now();
    let shown: Vec<_> = disks.iter().map(|d| (d.name.clone(), d.progress.clone(), d.source.size())).collect();
    let results = runtime.block_on(async {
        let show = show(shown.clone(), started);
        tokio::select! {
            results = send::send(&plan, tls, disks) => Ok(results),
            interrupted = tokio::signal::ctrl_c() => Err(match interrupted {
                Ok(()) => Failure::failed(
                    "interrupted: nothing was acknowledged, and the target is neither the old nor the new; run it again",
                ),
                Err(error) => Failure::failed(error),
            }),
            () = show => unreachable!("the display never ends by itself"),
        }
    });
    // A reader that waits for a broken device must not hold up the exit.
    runtime.shutdown_background();
    report(&args.machine, &shown, results?, started.elapsed(), args.json)
}

/// Shows progress until it is dropped: bars on a terminal, a line every ten seconds elsewhere.
async fn show(disks: Vec<(Name, Arc<Progress>, ByteLen)>, started: Instant) {
    if std::io::stderr().is_terminal() {
        let bars = MultiProgress::new();
        let style = "{msg:12} {bar:30} {bytes:>11} of {total_bytes:11} {binary_bytes_per_sec:>12}  {eta}";
        let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bars: Vec<_> = disks
            .iter()
            .map(|(name, _, size)| {
                let bar = ProgressBar::new(size.0).with_style(style.clone()).with_message(name.to_string());
                bars.add(bar)
            })
            .collect();
        loop {
            for (bar, (_, progress, _)) in bars.iter().zip(&disks) {
                bar.set_position(progress.done.load(Ordering::Relaxed));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        for (name, progress, size) in &disks {
            let done = ByteLen(progress.done.load(Ordering::Relaxed));
            let rate = ByteLen((done.0 as f64 / started.elapsed().as_secs_f64()) as u64);
            let left = match rate.0 {
                0 => "unknown".to_owned(),
                rate => format!("{} s", size.0.saturating_sub(done.0) / rate),
            };
            eprintln!("{name}: {done} of {size}, {rate}/s, {left} left");
        }
    }
}

fn report(
    machine: &Name,
    disks: &[(Name, Arc<Progress>, ByteLen)],
    results: Vec<(Name, Result<Committed, Error>)>,
    elapsed: Duration,
    json: bool,
) -> Result<(), Failure> {
    let seconds = elapsed.as_secs_f64();
    let failures: Vec<&Name> =
        results.iter().filter(|(_, result)| result.is_err()).map(|(name, _)| name).collect();
    if json {
        let disks: Vec<_> = disks
            .iter()
            .zip(&results)
            .map(|((name, progress, size), (_, result))| {
                let committed = result.as_ref().ok();
                json!({
                    "disk": name,
                    "size": size,
                    "read_bytes": progress.read.load(Ordering::Relaxed),
                    "zero_bytes": progress.zero.load(Ordering::Relaxed),
                    "sent_bytes": progress.sent.load(Ordering::Relaxed),
                    "refused_frames": progress.again.load(Ordering::Relaxed),
                    "pass": committed.map(|committed| committed.pass),
                    "committed": committed.and_then(|committed| committed.time.format(&Rfc3339).ok()),
                    "error": result.as_ref().err().map(|error| chain(error)),
                })
            })
            .collect();
        let report = json!({
            "schema_version": SCHEMA_VERSION, "machine": machine, "seconds": seconds, "disks": disks,
        });
        print(&format!("{report:#}\n"))?;
    } else {
        for ((name, progress, size), (_, result)) in disks.iter().zip(&results) {
            match result {
                Ok(committed) => {
                    let zero = ByteLen(progress.zero.load(Ordering::Relaxed));
                    let sent = ByteLen(progress.sent.load(Ordering::Relaxed));
                    let rate = ByteLen((size.0 as f64 / seconds) as u64);
                    print(&format!(
                        "{name}: {size} committed as pass {} in {seconds:.1} s ({rate}/s); {sent} sent, {zero} zeros\n",
                        committed.pass
                    ))?;
                }
                Err(error) => eprintln!("mt-agent: {name}: {}", chain(error)),
            }
        }
    }
    // What failed with another disk says nothing of its own.
    let refused = |error: &Error| matches!(error, Error::Refused(_) | Error::Together(_));
    match failures.len() {
        0 => Ok(()),
        failed => {
            let text = format!("{failed} of {} disks of {machine} were not sent", results.len());
            let all_refused = results.iter().filter_map(|(_, result)| result.as_ref().err()).all(refused);
            Err(if all_refused { Failure::refused(text) } else { Failure::failed(text) })
        }
    }
}
