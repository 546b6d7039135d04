//! `mt-agent send`: the source side.

use std::cell::Cell;
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
use mt_agent::net::tls::client::Identity;
use mt_agent::send::still::{self, Still, Wishes};
use mt_agent::send::{self, Compression, Done, Error, Plan, Prepared, Progress, Scope};
use mt_agent::storage::device::EngineChoice;
use mt_agent::units::{ByteLen, rfc3339};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, log_failure, print, print_json};

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
    /// Send everything, also where the master target likely has most of it: by default, both sides are compared by digests
    /// then, and only what differs is sent
    #[arg(long)]
    whole: bool,
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
    /// Make one point of all machines of this consistency group: `mt-agent send --group` must run on all of them within
    /// five minutes, and is not a machine's first
    #[arg(long, value_name = "NAME")]
    group: Option<Name>,
    /// Freeze the file systems that are mounted on the sources while they are read, for so long at most (30s): they are
    /// thawed then, and the point is no moment. Not for a machine's first pass
    #[arg(
        long, value_name = "LIMIT", num_args = 0..=1, require_equals = true, default_missing_value = "30s",
        value_parser = freeze_limit
    )]
    freeze: Option<Duration>,
    /// A command that /bin/sh runs before the freeze. Where it fails, nothing is sent. It finds MT_AGENT_MACHINE,
    /// MT_AGENT_POINT, MT_AGENT_DISKS and MT_AGENT_GROUP in its environment
    #[arg(long, value_name = "COMMAND")]
    pre_hook: Option<String>,
    /// A command that /bin/sh runs once everything was read and thawed, and whenever the pre-hook was run, however that and
    /// the pass ended. With both hooks the point is of kind `application`
    #[arg(long, value_name = "COMMAND")]
    post_hook: Option<String>,
    /// How long a hook may take
    #[arg(long, value_name = "LIMIT", default_value = "60s", value_parser = hook_limit)]
    hook_timeout: Duration,
}

/// Nobody wants a host that stands still for longer.
const LONGEST_FREEZE: Duration = Duration::from_secs(10 * 60);
/// The master target waits for ten minutes between the opening of the disks and their passes.
const LONGEST_HOOK: Duration = Duration::from_secs(8 * 60);

fn freeze_limit(text: &str) -> Result<Duration, String> {
    limit_of(text, LONGEST_FREEZE)
}

fn hook_limit(text: &str) -> Result<Duration, String> {
    limit_of(text, LONGEST_HOOK)
}

/// A whole number with `s` or `m`.
fn limit_of(text: &str, longest: Duration) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match (number.parse::<u64>(), unit) {
        (Ok(number), "s") => number,
        (Ok(number), "m") => number.saturating_mul(60),
        _ => return Err("give a whole number with s or m, as in 30s".to_owned()),
    };
    let limit = Duration::from_secs(seconds);
    if limit < Duration::from_secs(1) || limit > longest {
        return Err(format!("give 1s to {}m", longest.as_secs() / 60));
    }
    Ok(limit)
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

/// Why a disk was not sent.
#[derive(Debug, thiserror::Error)]
enum Unsent {
    #[error(transparent)]
    Failed(#[from] Error),
    // A commit may be on its way: only the master target knows.
    #[error(
        "interrupted before its commit was acknowledged: run it again (`mt-agent status` on the master target shows \
         how its target stands)"
    )]
    Interrupted,
}

/// How it went with a disk, and after what time.
struct Ended {
    result: Result<Done, Unsent>,
    after: Duration,
}

pub fn run(args: Args) -> Result<(), Failure> {
    logging::init(Some(logging::Format::Text), Some(&args.log_level)).map_err(log_failure)?;
    for (index, (name, path)) in args.disks.iter().enumerate() {
        for (other, source) in &args.disks[..index] {
            if name == other {
                return Err(Failure::Usage(format!("the disk {name} is named twice")));
            }
            if path == source {
                let path = path.display();
                return Err(Failure::Usage(format!("{path} is the source of two disks: {other} and {name}")));
            }
        }
    }
    let identity = Identity::load(&args.state_dir, &args.machine).map_err(Failure::refused)?;
    let to = match args.to {
        Some(to) => to,
        None => identity.server.parse().map_err(Failure::failed)?,
    };
    let plan = Plan {
        name: args.point_name,
        group: args.group,
        to,
        disks: args.disks,
        compression: args.compression,
        engine: args.engine,
        limit: args.bwlimit.map(|limit| limit.0),
        scope: if args.whole { Scope::Whole } else { Scope::Differences },
    };
    let disks = send::prepare(&plan).map_err(|error| match error.is_refusal() {
        true => Failure::refused(error),
        false => Failure::failed(error),
    })?;
    let mounts: Vec<Vec<String>> = disks.iter().map(|disk| disk.source.mounts(&Sysroot::default())).collect();
    let wishes = Wishes {
        pre_hook: args.pre_hook,
        post_hook: args.post_hook,
        hook_timeout: args.hook_timeout,
        freeze: args.freeze,
    };
    let in_use = disks.iter().zip(&mounts).flat_map(|(disk, mounts)| mounts.iter().map(move |m| (disk, m)));
    // What will be frozen is no reason to worry.
    for (disk, mount) in in_use.filter(|_| wishes.freeze.is_none()) {
        let path = disk.source.path().display();
        eprintln!("mt-agent: {path} is in use ({mount}): what arrives is not one point in time");
    }
    if args.dry_run {
        return dry_run(&args.machine, &plan, &disks, &mounts, args.json);
    }
    let tls = identity.client_config().map_err(Failure::failed)?;
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::failed)?;
    let screen = Screen::new(&disks);
    let still = Arc::new(Still::new(args.machine.clone(), disks.len(), wishes));
    let mut ended: Vec<Option<Ended>> = disks.iter().map(|_| None).collect();
    let mut printed = Ok(());
    let mut after_reading: Result<(), still::Error> = Ok(());
    let interrupted = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
        let sending = send::send(&plan, tls, &still, disks, |index, result| {
            let result = result.map_err(Unsent::from);
            let one = Ended { result, after: screen.started.elapsed() };
            if let Err(failure) = screen.ended(index, &one, args.json) {
                printed = Err(failure);
            }
            ended[index] = Some(one);
        });
        let interrupted = tokio::select! {
            () = sending => false,
            _ = interrupt.recv() => true,
            _ = terminate.recv() => true,
            () = screen.show() => unreachable!("the display never ends by itself"),
        };
        // A thaw, and a hook, which has its limit: a second signal changes nothing.
        after_reading = still.end().await;
        Ok::<_, Failure>(interrupted)
    })?;
    // A reader that waits for a broken device must not hold up the exit.
    runtime.shutdown_background();
    let after = screen.started.elapsed();
    let mut ends = Vec::new();
    for (index, end) in ended.into_iter().enumerate() {
        ends.push(match end {
            Some(end) => end,
            None => {
                let end = Ended { result: Err(Unsent::Interrupted), after };
                screen.ended(index, &end, args.json)?;
                end
            }
        });
    }
    if args.json {
        print_json(&json!({
            "schema_version": SCHEMA_VERSION,
            "machine": args.machine,
            "dry_run": false,
            "seconds": after.as_secs_f64(),
            "post_hook_error": after_reading.as_ref().err().map(|error| chain(error)),
            "disks": screen.disks.iter().zip(&ends).map(|(disk, end)| disk.json(end)).collect::<Vec<_>>(),
        }))?;
    }
    printed?;
    let failed: Vec<&Unsent> = ends.iter().filter_map(|end| end.result.as_ref().err()).collect();
    if failed.is_empty() {
        // The point is there all the same.
        return after_reading.map_err(Failure::failed);
    }
    if let Err(error) = after_reading {
        eprintln!("mt-agent: {}", chain(&error));
    }
    let text = format!(
        "{}{} of {} disks of {} were not sent",
        if interrupted { "interrupted: " } else { "" },
        failed.len(),
        ends.len(),
        args.machine
    );
    let refused = |unsent: &&Unsent| matches!(unsent, Unsent::Failed(error) if error.is_refusal());
    Err(if failed.iter().all(refused) { Failure::refused(text) } else { Failure::failed(text) })
}

fn dry_run(
    machine: &Name,
    plan: &Plan,
    disks: &[Prepared],
    mounts: &[Vec<String>],
    json: bool,
) -> Result<(), Failure> {
    if json {
        let disk = |(disk, mounts): (&Prepared, &Vec<String>)| {
            json!({
                "disk": disk.name,
                "source": disk.source.path().display().to_string(),
                "size": disk.source.size(),
                "in_use": mounts,
            })
        };
        return print_json(&json!({
            "schema_version": SCHEMA_VERSION,
            "machine": machine,
            "dry_run": true,
            "to": plan.to.to_string(),
            "disks": disks.iter().zip(mounts).map(disk).collect::<Vec<_>>(),
        }));
    }
    for disk in disks {
        let (name, path, size) = (&disk.name, disk.source.path().display(), disk.source.size());
        print(&format!("would send {path} ({size}) as disk {name} of {machine} to {}\n", plan.to))?;
    }
    Ok(())
}

/// One disk, as it is shown.
struct Shown {
    name: Name,
    size: ByteLen,
    progress: Arc<Progress>,
    ended: Cell<bool>,
}

impl Shown {
    fn json(&self, Ended { result, after }: &Ended) -> Value {
        let committed = match result {
            Ok(Done::Committed(committed)) => Some(committed),
            _ => None,
        };
        json!({
            "disk": self.name,
            "size": self.size,
            "seconds": after.as_secs_f64(),
            "read_bytes": self.progress.read.load(Ordering::Relaxed),
            "same_bytes": self.progress.same.load(Ordering::Relaxed),
            "zero_bytes": self.progress.zero.load(Ordering::Relaxed),
            "sent_bytes": self.progress.sent.load(Ordering::Relaxed),
            "refused_frames": self.progress.again.load(Ordering::Relaxed),
            "pass": committed.map(|committed| committed.pass),
            "committed": committed.map(|committed| rfc3339(committed.time)),
            "error": result.as_ref().err().map(|error| chain(error)),
        })
    }

    /// How far it is, for where there is no bar. `before` is what was done at the last call, `period` ago.
    fn line(&self, before: &mut u64, period: Duration) -> String {
        let done = self.progress.done.load(Ordering::Relaxed);
        let rate = done.saturating_sub(std::mem::replace(before, done)) as f64 / period.as_secs_f64();
        let (name, size, rate) = (&self.name, self.size, ByteLen(rate as u64));
        if self.progress.waiting.load(Ordering::Relaxed) {
            return format!("{name}: waiting until the master target can take it");
        }
        let head = format!("{name}: {} of {size}", ByteLen(done));
        match rate.0 {
            0 => format!("{head}, nothing went out in the last {} s", period.as_secs()),
            bytes => format!("{head}, {rate}/s, {} s left", size.0.saturating_sub(done) / bytes),
        }
    }
}

/// What is shown while disks are sent: bars on a terminal, a line every ten seconds elsewhere, and each result.
struct Screen {
    started: Instant,
    disks: Vec<Shown>,
    bars: Option<(MultiProgress, Vec<ProgressBar>)>,
}

impl Screen {
    fn new(disks: &[Prepared]) -> Screen {
        let disk = |disk: &Prepared| Shown {
            name: disk.name.clone(),
            size: disk.source.size(),
            progress: disk.progress.clone(),
            ended: Cell::new(false),
        };
        let disks: Vec<Shown> = disks.iter().map(disk).collect();
        let bars = std::io::stderr().is_terminal().then(|| {
            let bars = MultiProgress::new();
            let style = "{msg:12} {bar:30} {bytes:>11} of {total_bytes:11} {binary_bytes_per_sec:>12}  {eta}";
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = |disk: &Shown| {
                let bar = ProgressBar::new(disk.size.0).with_style(style.clone());
                bars.add(bar.with_message(disk.name.to_string()))
            };
            let each = disks.iter().map(bar).collect();
            (bars, each)
        });
        Screen { started: Instant::now(), disks, bars }
    }

    /// Shows progress until it is dropped.
    async fn show(&self) {
        const PERIOD: Duration = Duration::from_secs(10);
        if let Some((_, bars)) = &self.bars {
            loop {
                for (bar, disk) in bars.iter().zip(&self.disks).filter(|(_, disk)| !disk.ended.get()) {
                    let waits = disk.progress.waiting.load(Ordering::Relaxed);
                    bar.set_message(format!("{}{}", disk.name, if waits { " (waits)" } else { "" }));
                    bar.set_position(disk.progress.done.load(Ordering::Relaxed));
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        let mut before = vec![0; self.disks.len()];
        loop {
            tokio::time::sleep(PERIOD).await;
            for (disk, before) in self.disks.iter().zip(&mut before).filter(|(disk, _)| !disk.ended.get()) {
                eprintln!("{}", disk.line(before, PERIOD));
            }
        }
    }

    /// Says how it went with one of the disks, as soon as that is known. With `json` that is said at the end.
    fn ended(&self, index: usize, Ended { result, after }: &Ended, json: bool) -> Result<(), Failure> {
        let Shown { name, size, progress, ended } = &self.disks[index];
        ended.set(true);
        if json {
            return Ok(());
        }
        let say = || match result {
            Ok(Done::Committed(committed)) => {
                let seconds = after.as_secs_f64();
                let zero = ByteLen(progress.zero.load(Ordering::Relaxed));
                let sent = ByteLen(progress.sent.load(Ordering::Relaxed));
                let same = match progress.same.load(Ordering::Relaxed) {
                    0 => String::new(),
                    same => format!(", {} there already", ByteLen(same)),
                };
                let rate = ByteLen((size.0 as f64 / seconds) as u64);
                print(&format!(
                    "{name}: {size} committed as pass {} in {seconds:.1} s ({rate}/s); {sent} sent, {zero} zeros{same}\n",
                    committed.pass
                ))
            }
            Ok(Done::Compared) => Ok(()),
            Err(error) => {
                eprintln!("mt-agent: {name}: {}", chain(error));
                Ok(())
            }
        };
        match &self.bars {
            // In the place of its bar, above those that go on.
            Some((bars, each)) => {
                each[index].finish_and_clear();
                bars.suspend(say)
            }
            None => say(),
        }
    }
}
