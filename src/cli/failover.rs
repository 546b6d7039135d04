//! `mt-agent failover`: brings the disks of machines to a point and releases them, or takes that back.
//!
//! `--json` prints one object: `schema_version` (1), `machine`, `point`, `time`, `dry_run`, and `disks`, of each `disk`, `id`,
//! `rolled_back` (bytes of an interrupted pass) and `brought_back` (bytes that differed from the point); and `compared`: whether
//! the disks were held against what they were when they were released. For several machines, or with `--group`, it has
//! `schema_version` and `machines`, an array of such objects.

use std::path::Path;
use std::time::{Duration, Instant};

use hyper::Method;
use mt_agent::agent::config::Config;
use mt_agent::error::{IoError, chain};
use mt_agent::name::Name;
use mt_agent::points::Log;
use mt_agent::protection::{self, Store};
use mt_agent::recovery::Error;
use mt_agent::recovery::failover::{How, Report, To, fail_over, passed_over, undo};
use mt_agent::units::ByteLen;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::places::Places;
use super::status;
use super::{Failure, print};

const SCHEMA_VERSION: u32 = 1;

/// How long the service may take to let go of the disks of a machine whose sessions end: less than it refuses new ones.
const LETTING_GO: Duration = Duration::from_secs(30);

/// Bring the disks of machines to a recovery point and release them, or take that back
#[derive(clap::Args)]
pub struct Args {
    /// The machine; or several, separated by commas: they are brought to one point that all of them have
    #[arg(value_delimiter = ',', required_unless_present = "group")]
    machines: Vec<Name>,
    /// All machines of this consistency group
    #[arg(long, value_name = "NAME", conflicts_with = "machines")]
    group: Option<Name>,
    /// The point: latest, latest-application, the id of one (`mt-agent points`) or its first digits, its name, or a time such
    /// as 2026-03-01T10:00:00Z
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
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(To::Time(time));
    }
    text.parse().map(To::Called).map_err(|_| {
        "give latest, latest-application, a point's id or its first digits, its name, or a time such as 2026-03-01T10:00:00Z"
            .to_owned()
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
    let mut machines: Vec<Name> = match &args.group {
        Some(group) => store.members(group)?.into_iter().collect(),
        None => args.machines,
    };
    let by_id = matches!(args.to, Some(To::Id(_) | To::Called(_)));
    let several = args.group.is_some() || machines.len() > 1;
    let mut log = Log::open(retention)?;
    let mut to = args.to;
    if let (Some(meant), [first, others @ ..]) = (&to, machines.as_slice())
        && !others.is_empty()
    {
        let point = meant.find_common(&log, first, others)?.id;
        to = Some(To::Id(point));
        // As where it was called before, and one of them failed.
        machines.retain(|machine| {
            let is_there = log.released(machine).is_some_and(|released| released.point == point);
            if is_there {
                note!("mt-agent: {machine} is failed over to point {point} already");
            }
            !is_there
        });
    }
    let engine = config.engine;
    let mut done = Vec::new();
    let mut one_by_one = |log: &mut Log, work: &mut dyn FnMut(&mut Log, &Name) -> Result<Report, Failure>| {
        machines.iter().try_for_each(|machine| {
            let started = Instant::now();
            let report = work(log, machine)?;
            if !args.dry_run {
                // For whoever reads its log. Where it does not run, or does not answer, this command tells all the same.
                tell(&config.control_socket, machine, "changed").ok();
            }
            done.push((machine.clone(), report, started.elapsed()));
            Ok(())
        })
    };
    let result = match to {
        None => one_by_one(&mut log, &mut |log, machine| Ok(undo(retention, &store, log, machine, engine)?)),
        Some(to) => {
            let how = How { fuzzy: args.fuzzy, dry_run: args.dry_run, engine };
            // None of them is touched where another cannot be brought to the point.
            if machines.len() > 1 && !how.dry_run {
                for machine in &machines {
                    alone(&config, &store, &mut log, machine, &to, How { dry_run: true, ..how }, true)?;
                }
            }
            one_by_one(&mut log, &mut |log, machine| {
                alone(&config, &store, log, machine, &to, how, !how.dry_run)
            })
        }
    };
    if args.json {
        let mut each: Vec<_> =
            done.iter().map(|(machine, report, _)| to_json(machine, report, args.dry_run)).collect();
        let text = match (several, each.pop()) {
            (false, Some(only)) => format!("{only:#}\n"),
            (false, None) => String::new(),
            (true, last) => {
                each.extend(last);
                format!("{:#}\n", json!({ "schema_version": SCHEMA_VERSION, "machines": each }))
            }
        };
        print(&text)?;
        return result;
    }
    for (machine, report, took) in &done {
        let passed_over = if args.undo { 0 } else { passed_over(&log, machine, report.point) };
        if passed_over > 0 && !by_id {
            note!(
                "mt-agent: {machine}: {passed_over} newer points are no moment of their source (fuzzy) and were passed over; \
                 `mt-agent points {machine}` lists them"
            );
        }
        print(&to_text(machine, report, *took, args.undo, args.dry_run))?;
    }
    result
}

/// Fails a machine over. Where it is being received, and `end` allows that, the service is told to end its sessions; it
/// refuses new ones for long enough.
fn alone(
    config: &Config,
    store: &Store,
    log: &mut Log,
    machine: &Name,
    to: &To,
    how: How,
    end: bool,
) -> Result<Report, Failure> {
    let mut asked: Option<Instant> = None;
    loop {
        match fail_over(&config.retention_dir, store, log, machine, to, how) {
            Err(Error::Protection(protection::Error::Receiving { .. }))
                if end && asked.is_none_or(|asked| asked.elapsed() < LETTING_GO) =>
            {
                if asked.is_some() {
                    continue;
                }
                // Nothing ends for a point that there is not.
                let point = to.find(log, machine)?;
                if point.fuzzy && !how.fuzzy {
                    let text = format!(
                        "point {} is no moment of its source; give --fuzzy to take it all the same",
                        point.id
                    );
                    return Err(Failure::refused(text));
                }
                tell(&config.control_socket, machine, "end-sessions")?;
                asked = Some(Instant::now());
            }
            other => {
                // Whatever came of it is on stable storage, and is what counts from here on.
                if asked.is_some()
                    && let Err(Failure::Failed(error)) = tell(&config.control_socket, machine, "receive")
                {
                    note!("mt-agent: nothing is received for {machine} for a minute: {}", chain(&*error));
                }
                return Ok(other?);
            }
        }
    }
}

/// Tells the service that nothing more is to be received for the machine, or that it may be.
fn tell(socket: &Path, machine: &Name, what: &str) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(IoError::new("start", "the runtime", error)))?;
    let path = format!("/v1/machines/{machine}/{what}");
    match runtime.block_on(status::ask(socket, Method::POST, &path)) {
        Ok(_) => Ok(()),
        Err(status::Error::NotRunning(_)) => {
            Err(protection::Error::Receiving { machine: machine.clone() }.into())
        }
        Err(error) => Err(Failure::failed(error)),
    }
}

fn to_text(machine: &Name, report: &Report, took: Duration, undo: bool, dry_run: bool) -> String {
    let seconds = took.as_secs_f64();
    let done = match (undo, dry_run) {
        (true, _) => "taken back: the machine can be received again; its disks stand at",
        (_, true) => "would be failed over to",
        (_, false) => "failed over: its disks are released at",
    };
    let time = report.time.format(&Rfc3339).unwrap_or_default();
    let mut text = format!("{machine}: {done} point {} of {time} ({seconds:.1} s)\n", report.point);
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
    if !undo && !dry_run {
        text += &format!(
            "  take it back, before anything writes to them, with `mt-agent failover {machine} --undo`\n"
        );
    }
    text
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
