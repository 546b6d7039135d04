//! `mt-agent send`: the source side.
//!
//! `--json` prints one object, with `--every` one a line for each pass: `schema_version` (1), `machine`, `dry_run`, `seconds`,
//! `post_hook_error`, and `disks`, of each `disk`, `size`, `seconds`; what its last attempt came to in bytes, `read_bytes`,
//! `same_bytes` (compared, and there already), `zero_bytes` (told as zeros), `sent_bytes` (payload), and in `connections` and
//! `refused_frames` (damaged, and sent again); `used_bytes`, `free_bytes`, `skipped_bytes` (free, and not read) and
//! `not_skipped` (why not, in words); `ranges_set_aside` (why `--changed-ranges` was not relied on, or null), `missed` (of
//! each `offset` and `length`: what differed, in any attempt, and was not told by it); `point`, `pass` and `committed`, null
//! where it was not; and `error`. Why an attempt failed that was followed by another one is told on standard error.

mod attempt;
mod screen;

use std::path::{Path, PathBuf};
use std::time::Duration;

use mt_agent::error::chain;
use mt_agent::name::Name;
use mt_agent::net::address::Address;
use mt_agent::send::alone::Alone;
use mt_agent::send::free::Space;
use mt_agent::send::lanes::Connections;
use mt_agent::send::limit::Rates;
use mt_agent::send::still::Wishes;
use mt_agent::send::{Compression, Done, Error, Plan, Prepared, Scope, preview};
use mt_agent::storage::device::EngineChoice;
use mt_agent::units::ByteLen;
use serde_json::json;
use tokio::time::sleep;

use self::attempt::prepare;
pub(super) use self::attempt::{Job, Signals};
use super::table::printable;
use super::{Failure, print, print_json};

/// The version of the JSON that this command prints.
const SCHEMA_VERSION: u32 = 1;

/// Which disks are read, and the other side.
#[derive(clap::Args)]
pub struct What {
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
    /// How to read: auto, io-uring or threads
    #[arg(long, default_value = "auto")]
    engine: EngineChoice,
    /// Also take the free space of the file systems and volume groups on the disks for what it holds: by default it is not
    /// read and counts as zeros, where it is certain what is free
    #[arg(long)]
    whole_disk: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Where the machine's identity lies
    #[arg(long, value_name = "DIR", default_value = super::STATE_DIR)]
    state_dir: PathBuf,
    /// What to log to stderr: error, warn, info, debug or trace
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    log_level: String,
}

/// Send disks of this machine to its master target
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    what: What,
    /// How to compress: auto (LZ4 where it pays), off, lz4 or zstd
    #[arg(long, default_value = "auto")]
    compression: Compression,
    /// Send at most so many bytes a second, all disks together: 10M, 512K. By the time of day, in the time zone of this
    /// machine, with commas between: 08:00-18:00=2M,20M is 2M from 8 to 18 and else 20M; at times that are not told of, and
    /// where no rate is told for the others, nothing is limited
    #[arg(long, value_name = "BYTES|HH:MM-HH:MM=BYTES,…")]
    bwlimit: Option<Rates>,
    /// How many connections carry each disk, 1 to 8, as far as the master target allows them. auto: one, or four where an
    /// answer takes 10 ms or longer. --bwlimit is for all of them together
    #[arg(long, value_name = "NUMBER", default_value = "auto")]
    connections: Connections,
    /// Send everything, also where the master target likely has most of it: by default, both sides are compared by digests
    /// then, and only what differs is sent. Where the connection is lost, what this command had sent is compared and not sent
    /// again
    #[arg(long)]
    whole: bool,
    /// Send a disk although it has another size than when it was sent last. What the target has behind the end of a smaller
    /// one stays there
    #[arg(long, conflicts_with = "every")]
    resized: bool,
    /// Send a disk although it is another one, of whatever size, than the one that was sent last under its name
    #[arg(long, conflicts_with = "every")]
    another_disk: bool,
    /// Check that the sources can be read and show what would be sent and what skipped, and send nothing
    #[arg(long)]
    dry_run: bool,
    /// What has changed on a disk since its last point, as a tracker knows it: a file of `offset length` a line, or a JSON
    /// array of objects with `offset` and `length`, in bytes; `[]` where nothing has. Nothing else is looked at, where the
    /// target stands at that point; else they are set aside, and that is told. With --freeze only beside --verify: a tracker
    /// does not tell what is written until the freeze; of a snapshot it does. For several disks: with the option repeated
    #[arg(long, value_name = "NAME=FILE", value_parser = ranges, conflicts_with_all = ["whole", "every"])]
    changed_ranges: Vec<(Name, PathBuf)>,
    /// Compare all of the disks all the same, and fail if something changed that --changed-ranges does not tell (it is
    /// sent), or if that cannot be judged any more once a connection was lost
    #[arg(long, requires = "changed_ranges")]
    verify: bool,
    /// Send again and again, a pass each period: 15m, 1h; 0s: without a pause. A connection that is lost is waited for. With
    /// --json each pass prints an object, one a line
    #[arg(long, value_name = "PERIOD", value_parser = period)]
    every: Option<Duration>,
    /// How long to try again, after longer and longer pauses, where the connection was lost once the master target had opened
    /// a disk; the time counts from the last byte that arrived. What arrived is not sent again. Where it has no time, or breaks
    /// off, before, it is asked again 40 times at most, or twice, a second apart. 0s: not at all
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = period)]
    retry_for: Duration,
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

/// A whole number with `s`, `m`, `h` or `d`.
fn period(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = match unit {
        // Nothing of any unit.
        "" if number.parse() == Ok(0) => 1,
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return Err("give a whole number with s, m, h or d, as in 30s".to_owned()),
    };
    let seconds = number.parse().ok().and_then(|number: u64| number.checked_mul(unit));
    // As much as a clock can be added to.
    seconds
        .filter(|seconds| *seconds < 1 << 32)
        .map(Duration::from_secs)
        .ok_or_else(|| "that is too long".to_owned())
}

fn limit_of(text: &str, longest: Duration) -> Result<Duration, String> {
    let limit = period(text)?;
    if limit < Duration::from_secs(1) || limit > longest {
        return Err(format!("give 1s to {}m", longest.as_secs() / 60));
    }
    Ok(limit)
}

fn disk(text: &str) -> Result<(Name, PathBuf), String> {
    of_disk(text, "NAME=SOURCE, as in root=/dev/sda")
}

fn ranges(text: &str) -> Result<(Name, PathBuf), String> {
    of_disk(text, "NAME=FILE, with the name that --disk gives the disk, as in root=/run/root.ranges")
}

/// The name of a disk and a path.
fn of_disk(text: &str, form: &str) -> Result<(Name, PathBuf), String> {
    let (name, path) =
        text.split_once('=').filter(|(_, path)| !path.is_empty()).ok_or(format!("give {form}"))?;
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
    #[error("the connection was lost, and it cannot be tried again: {0}")]
    NotAgain(String),
}

/// How it went with a disk, and after what time.
struct Ended {
    result: Result<Done, Unsent>,
    after: Duration,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let mut job = Job::new(&args.what)?;
    job.plan.name = args.point_name;
    job.plan.group = args.group;
    job.plan.compression = args.compression;
    (job.plan.resized, job.plan.another) = (args.resized, args.another_disk);
    job.plan.limit = args.bwlimit;
    job.plan.connections = args.connections;
    job.plan.wait = args.retry_for;
    job.plan.scope = match (args.whole, args.verify) {
        (true, _) => Scope::Whole,
        (false, true) => Scope::CheckHints,
        (false, false) => Scope::Differences,
    };
    for (name, path) in args.changed_ranges {
        let sent = job.plan.disks.iter().map(|(disk, _)| disk);
        if sent.clone().all(|disk| *disk != name) {
            let names = sent.map(Name::as_str).collect::<Vec<_>>().join(", ");
            return Err(Failure::Usage(format!(
                "--changed-ranges names disk {name}, which is not sent: give NAME=FILE with a name that --disk gives \
                 ({names}), or give --disk {name}=SOURCE too"
            )));
        }
        if job.plan.hints.insert(name.clone(), path).is_some() {
            return Err(Failure::Usage(format!(
                "--changed-ranges names disk {name} twice: give one file with all of its ranges"
            )));
        }
    }
    if !job.plan.hints.is_empty() && args.freeze.is_some() && !args.verify {
        return Err(Failure::Usage(
            "--freeze and --changed-ranges do not go together: what is written after the tracker has told, and before the \
             freeze, is in no range, so that the point would be damaged there. Give a snapshot as the source, and the ranges \
             that the tracker tells of that snapshot; or add --verify, which compares all of the disk while it is frozen"
                .to_owned(),
        ));
    }
    if !job.plan.hints.is_empty() && args.pre_hook.is_none() {
        // What a pre-hook makes is not there yet; everything else is better told now.
        job.plan
            .read_hints(&prepare(&job.plan)?)
            .map_err(|(path, error)| Failure::refused(format!("{}: {}", path.display(), chain(&*error))))?;
    }
    job.wishes = Wishes {
        pre_hook: args.pre_hook,
        post_hook: args.post_hook,
        hook_timeout: args.hook_timeout,
        freeze: args.freeze,
    };
    if args.dry_run {
        return dry_run(&job.machine, &job.plan, args.freeze.is_some(), args.what.json);
    }
    job.lines = args.every.is_some();
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::failed)?;
    let result = runtime.block_on(async {
        let mut signals = Signals::new().map_err(Failure::failed)?;
        let alone = alone(&args.what.state_dir, &job, args.every.is_some(), &mut signals).await?;
        let Some(_alone) = alone else { return Ok(()) };
        job.keep_on(args.every, args.retry_for, &mut signals).await
    });
    // A reader that waits for a broken device must not hold up the exit.
    runtime.shutdown_background();
    result
}

/// How often it is looked whether another sender has ended.
const LOOK: Duration = Duration::from_secs(3);

/// Becomes the one who sends these disks. Whoever keeps a machine protected `waits` for another one's end: a pass by hand must
/// not leave it unprotected. None where a signal came first.
async fn alone(
    state_dir: &Path,
    job: &Job,
    waits: bool,
    signals: &mut Signals,
) -> Result<Option<Alone>, Failure> {
    let mut told = false;
    loop {
        match Alone::with(state_dir, &job.machine, job.plan.disks.iter().map(|(name, _)| name)) {
            Ok(alone) => {
                if let Some(error) = alone.unlocked() {
                    note!(
                        "mt-agent: {}: another `mt-agent send` of the same disks would not be noticed; see that none runs, and \
                         that there can be files again",
                        chain(error)
                    );
                }
                return Ok(Some(alone));
            }
            Err(error) if error.is_refusal() && waits => {
                if !std::mem::replace(&mut told, true) {
                    note!("mt-agent: {error}: waiting for its end");
                }
            }
            Err(error) if error.is_refusal() => {
                return Err(Failure::refused(format!("{error}: wait for its end, or stop it first")));
            }
            Err(error) => return Err(Failure::failed(error)),
        }
        if signals.before(sleep(LOOK)).await.is_none() {
            return Ok(None);
        }
    }
}

fn dry_run(machine: &Name, plan: &Plan, freeze: bool, json: bool) -> Result<(), Failure> {
    let disks = prepare(plan)?;
    let previews = preview(plan, freeze, &disks);
    if json {
        let disk = |(disk, (writers, space)): (&Prepared, &(Vec<String>, Space))| {
            json!({
                "disk": disk.name,
                "source": disk.source.path().display().to_string(),
                "size": disk.source.size(),
                "in_use": writers,
                "used_bytes": space.free.map(|free| disk.source.size().0 - free),
                "free_bytes": space.free,
                "skipped_bytes": space.skipped,
                "not_skipped": space.reasons,
            })
        };
        return print_json(&json!({
            "schema_version": SCHEMA_VERSION,
            "machine": machine,
            "dry_run": true,
            "to": plan.to.to_string(),
            "disks": disks.iter().zip(&previews).map(disk).collect::<Vec<_>>(),
        }));
    }
    for (disk, (_, space)) in disks.iter().zip(&previews) {
        let (name, path, size) = (&disk.name, disk.source.path().display(), disk.source.size());
        let text = format!("would send {path} ({size}) as disk {name} of {machine} to {}\n", plan.to);
        print(&(text + &of_space(name, size, space, "would be skipped")))?;
    }
    Ok(())
}

/// What is told of a disk's free space, in lines. `skipped` is what becomes of that which need not be read.
fn of_space(name: &Name, size: ByteLen, space: &Space, skipped: &str) -> String {
    let mut text = String::new();
    if let Some(free) = space.free {
        let (used, not_read) = (ByteLen(size.0 - free), ByteLen(space.skipped));
        text += &format!("{name}: {used} used, {} free, {not_read} of it {skipped}\n", ByteLen(free));
    }
    for why in &space.reasons {
        text += &format!("{name}: free space not skipped: {}\n", printable(why));
    }
    text
}
