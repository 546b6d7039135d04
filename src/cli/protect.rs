//! `mt-agent protect`: which target disk belongs to which disk of which machine.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use clap::{Args, Subcommand};
use mt_agent::disk::device;
use mt_agent::disk::discover::{self, Disk, Sysroot};
use mt_agent::error::chain;
use mt_agent::name::Name;
use mt_agent::points::{GivenUp, Log, Point, PointId, Record};
use mt_agent::protection::assign::{self, Allowed, Planned, Request};
use mt_agent::protection::{Assignment, Error, Listed, State, Store};
use mt_agent::units::{ByteLen, rfc3339};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::places::Places;
use super::{Failure, print, print_json};
use super::{setup, table};

/// The version of the JSON that these commands print.
const SCHEMA_VERSION: u32 = 1;

/// Assign target disks to machines
#[derive(Subcommand)]
pub enum Command {
    /// Assign target disks to a machine: all of those given, or none
    Add(AddArgs),
    /// List the machines and their target disks
    List(ListArgs),
    /// Take target disks away from a machine, and give up its recovery points; what lies on the disks stays
    Remove(RemoveArgs),
    /// Make a consistency group of machines, whose points are there on all of them or on none; or take it away
    Group(GroupArgs),
}

/// What `protect group` is told.
#[derive(Args)]
pub struct GroupArgs {
    /// The group
    group: Name,
    /// Its machines, separated by commas: all of them, in place of those that it has
    #[arg(long, value_name = "NAMES", required_unless_present = "remove", value_delimiter = ',')]
    machines: Vec<Name>,
    /// Take the group away; its machines and points stay
    #[arg(long, conflicts_with = "machines")]
    remove: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

/// What `protect add` is told.
#[derive(Args)]
pub struct AddArgs {
    /// The machine, by the name that its certificate will carry
    machine: Name,
    /// The machine's name for its disk, and the identity of the target disk, in any spelling (a /dev name is resolved
    /// to the identity, which is shown and kept). Several: separated by commas, or with the option repeated
    #[arg(long = "disk", value_name = "NAME=DISKID", required = true, value_delimiter = ',', value_parser = request)]
    disks: Vec<Request>,
    /// Take disks that are not empty too: everything on them is lost
    #[arg(long)]
    overwrite: bool,
    /// Take disks that carry an older copy of the machine's: of it only what differs is sent and written
    #[arg(long, conflicts_with = "overwrite")]
    seed: bool,
    /// Check everything and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print what was assigned as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

/// What `protect list` is told.
#[derive(Args)]
pub struct ListArgs {
    /// Only this machine
    machine: Option<Name>,
    /// Print it as JSON, with sizes in bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

/// What `protect remove` is told.
#[derive(Args)]
pub struct RemoveArgs {
    /// The machine
    machine: Name,
    /// Only this one of its disks
    #[arg(long, value_name = "NAME")]
    disk: Option<Name>,
    /// Check everything and take nothing away
    #[arg(long)]
    dry_run: bool,
    /// Print what was taken away as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

/// clap shows an error without its sources.
fn request(text: &str) -> Result<Request, String> {
    text.parse().map_err(|error: assign::ParseRequestError| chain(&error))
}

/// Runs one of them.
pub fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Add(args) => add(&args),
        Command::List(args) => list(&args),
        Command::Remove(args) => remove(&args),
        Command::Group(args) => group(&args),
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match &error {
            Error::Io(io) if io.source.kind() == io::ErrorKind::StorageFull => Failure::failed(format!(
                "{}; nothing was changed: free some space on the retention file system",
                chain(&error)
            )),
            _ if error.is_refusal() => Failure::refused(error),
            _ => Failure::failed(error),
        }
    }
}

fn add(args: &AddArgs) -> Result<(), Failure> {
    for (index, request) in args.disks.iter().enumerate() {
        if args.disks[..index].iter().any(|other| other.name == request.name) {
            return Err(Failure::Usage(format!("the disk {} is named twice", request.name)));
        }
    }
    let config = args.places.load()?;
    let store = Store::open(&config.retention_dir);
    let owners = store.owners()?;
    let options = discover::Options {
        // Always looked at, so that one that is not allowed is refused for what it is.
        include_loop: true,
        assigned: store.assigned()?,
        retention: Some(config.retention_dir.clone()),
        ..discover::Options::default()
    };
    let disks = discover::discover(&Sysroot::new("/"), &options).map_err(Failure::failed)?;
    let allowed = Allowed { overwrite: args.overwrite, seed: args.seed, loops: config.allow_loop };
    let planned = assign::plan(&args.machine, &args.disks, &disks, &owners, allowed, device::inspect)
        .map_err(Failure::refused)?;
    let now = OffsetDateTime::now_utc();
    let new: Vec<Assignment> = planned
        .iter()
        .filter(|planned| planned.content.is_some())
        .map(|planned| planned.assignment(allowed, now))
        .collect();
    if args.dry_run || new.is_empty() {
        store.assign_dry(&args.machine, &new)?;
    } else {
        store.assign(&args.machine, &new)?;
    }
    let followed = if args.dry_run { Ok(Vec::new()) } else { setup::follow_disks(&config) };
    let file = store.file(&args.machine);
    if args.json {
        let disks: Vec<Value> = planned.iter().map(planned_json).collect();
        print_json(&json!({
            "schema_version": SCHEMA_VERSION,
            "machine": args.machine,
            "dry_run": args.dry_run,
            "file": file.display().to_string(),
            "disks": disks,
        }))?;
        return followed.map(drop);
    }
    let mut lines = Vec::new();
    for planned in &planned {
        let done = match (&planned.content, args.dry_run) {
            (None, _) => "is assigned already",
            (Some(_), true) => "would be assigned",
            (Some(_), false) => "is assigned",
        };
        lines.push(format!("{}: {} {done}: {}", args.machine, planned.name, planned.id));
        lines.push(format!("  now {}", describe(planned.disk)));
        match &planned.content {
            Some(content) if content.is_blank() => lines.push(format!("  it seems blank: {content}")),
            Some(content) if args.seed => {
                lines.push(format!(
                    "  it carries {content}: taken for an older copy, of which only what differs is sent"
                ));
            }
            Some(content) => {
                // Behind the source's end nothing is written.
                lines.push(format!(
                    "  it carries {content}: it will be overwritten, as far as the source reaches"
                ));
            }
            None => {}
        }
        lines.extend(planned.disk.problems.iter().map(|note| format!("  note: {}", table::printable(note))));
    }
    if args.dry_run {
        lines.push("dry run: nothing was written".to_owned());
    }
    lines.extend(followed.as_deref().unwrap_or_default().iter().cloned());
    print(&(lines.join("\n") + "\n"))?;
    followed.map(drop)
}

/// The disk as it shows itself now: `/dev/sdb, 10.0 GiB, VMware Virtual disk`.
fn describe(disk: &Disk) -> String {
    let mut parts = vec![disk.node.display().to_string(), disk.size.to_string()];
    let maker: Vec<String> =
        [&disk.vendor, &disk.model].into_iter().flatten().map(|text| table::printable(text)).collect();
    if !maker.is_empty() {
        parts.push(maker.join(" "));
    }
    parts.join(", ")
}

fn planned_json(planned: &Planned<'_>) -> Value {
    json!({
        "name": planned.name,
        "id": planned.id,
        "given": planned.given,
        "node": planned.disk.node.display().to_string(),
        "size": planned.disk.size,
        "logical_sector": planned.disk.logical_sector,
        "already_assigned": planned.content.is_none(),
        "content": planned.content,
        "weak_identity": planned.id.is_weak(),
        "problems": planned.disk.problems,
    })
}

fn list(args: &ListArgs) -> Result<(), Failure> {
    let config = args.places.load()?;
    let store = Store::open(&config.retention_dir);
    let machines = match &args.machine {
        Some(machine) => vec![(machine.clone(), Ok(store.load(machine)?))],
        None => store.all()?,
    };
    let broken = machines.iter().filter(|(_, protection)| protection.is_err()).count();
    // Only looked for: a disk that is about to be opened is not disturbed.
    let options =
        discover::Options { include_loop: true, probe_exclusive: false, ..discover::Options::default() };
    let attached = discover::discover(&Sysroot::default(), &options).map_err(Failure::failed)?;
    if args.json {
        let machines: Vec<Value> = machines.iter().map(|machine| machine_json(machine, &attached)).collect();
        print_json(&json!({ "schema_version": SCHEMA_VERSION, "machines": machines }))?;
    } else if machines.is_empty() {
        print("no disk is assigned; assign some with `mt-agent protect add`\n")?;
    } else {
        let head = ["MACHINE", "DISK", "IDENTITY", "NODE", "SIZE", "STATE", "LAST COMMIT", "ERROR"];
        let rows: Vec<Vec<String>> = machines.iter().flat_map(|machine| rows(machine, &attached)).collect();
        let mut lines = table::lines(&head, &rows);
        lines.extend(groups(&machines));
        print(&(lines.join("\n") + "\n"))?;
    }
    match broken {
        0 => Ok(()),
        1 => Err(Failure::failed("the protection of one machine cannot be read; its error says what to do")),
        _ => Err(Failure::failed(format!(
            "the protections of {broken} machines cannot be read; their errors say what to do"
        ))),
    }
}

/// A line for each consistency group.
fn groups(machines: &[Listed]) -> Vec<String> {
    let mut groups: BTreeMap<&Name, Vec<&str>> = BTreeMap::new();
    for (machine, protection) in machines {
        if let Ok(Some(group)) = protection.as_ref().map(|protection| &protection.group) {
            groups.entry(group).or_default().push(machine.as_str());
        }
    }
    groups.into_iter().map(|(group, machines)| format!("group {group}: {}", machines.join(", "))).collect()
}

fn group(args: &GroupArgs) -> Result<(), Failure> {
    let config = args.places.load()?;
    let store = Store::open(&config.retention_dir);
    let machines: BTreeSet<Name> = args.machines.iter().cloned().collect();
    let before = store.set_group(&args.group, &machines)?;
    if args.json {
        return print_json(&json!({
            "schema_version": SCHEMA_VERSION, "group": args.group, "machines": machines, "before": before,
        }));
    }
    let list = |machines: &BTreeSet<Name>| machines.iter().map(Name::as_str).collect::<Vec<_>>().join(", ");
    print(&match (machines.is_empty(), before.is_empty()) {
        (true, _) => format!("group {} is taken away; it was {}\n", args.group, list(&before)),
        (false, true) => format!("group {}: {}\n", args.group, list(&machines)),
        (false, false) => format!("group {}: {} (before: {})\n", args.group, list(&machines), list(&before)),
    })
}

/// Where an assigned disk is attached now, if it is.
fn node_of(disk: &Assignment, attached: &[Disk]) -> Option<String> {
    let disk = attached.iter().find(|other| other.id.as_ref() == Some(&disk.id))?;
    Some(disk.node.display().to_string())
}

fn rows((machine, protection): &Listed, attached: &[Disk]) -> Vec<Vec<String>> {
    let none = || "-".to_owned();
    let disk = |disk: &Assignment| {
        let error = match &disk.state {
            State::Faulted(_, fault) => table::printable(&fault.reason),
            State::Empty | State::Receiving(_) | State::Synchronized => none(),
        };
        vec![
            machine.to_string(),
            disk.name.to_string(),
            table::printable(&disk.id.to_string()),
            node_of(disk, attached).unwrap_or_else(|| "absent".to_owned()),
            disk.size.to_string(),
            disk.state.name().to_owned(),
            disk.last_commit.map_or_else(none, |commit| rfc3339(commit.time)),
            error,
        ]
    };
    match protection {
        Ok(protection) => protection.disks.iter().map(disk).collect(),
        Err(error) => {
            let mut row = vec![machine.to_string()];
            row.resize_with(7, none);
            row.push(table::printable(&chain(error)));
            vec![row]
        }
    }
}

fn machine_json((machine, protection): &Listed, attached: &[Disk]) -> Value {
    match protection {
        Ok(protection) => json!({
            "machine": machine,
            "error": null,
            "created": rfc3339(protection.created),
            "group": protection.group,
            "disks": protection.disks.iter().map(|disk| listed_json(disk, attached)).collect::<Vec<_>>(),
        }),
        Err(error) => {
            json!({ "machine": machine, "error": chain(error), "created": null, "group": null, "disks": [] })
        }
    }
}

/// With the node, which is null where the disk is not attached.
fn listed_json(disk: &Assignment, attached: &[Disk]) -> Value {
    let mut json = disk_json(disk);
    json["node"] = node_of(disk, attached).into();
    json
}

fn disk_json(disk: &Assignment) -> Value {
    let (pass, fault) = match &disk.state {
        State::Empty | State::Synchronized => (None, None),
        State::Receiving(pass) => (Some(pass), None),
        State::Faulted(pass, fault) => (Some(pass), Some(fault)),
    };
    json!({
        "name": disk.name,
        "id": disk.id,
        "size": disk.size,
        "logical_sector": disk.logical_sector,
        "overwrite": disk.overwrite,
        "seed": disk.seed,
        "assigned_at": rfc3339(disk.assigned_at),
        "state": disk.state.name(),
        "pass": pass.map(|pass| json!({ "id": pass.id.to_string(), "started": rfc3339(pass.started) })),
        "last_commit": disk.last_commit.map(|commit| json!({
            "pass": commit.pass.to_string(),
            "time": rfc3339(commit.time),
            "bytes": commit.bytes,
            "point_in_time": commit.point_in_time,
        })),
        "source": disk.source.as_ref().map(|source| json!({ "size": source.size, "id": source.id })),
        "fault": fault.map(|fault| json!({ "time": rfc3339(fault.time), "reason": fault.reason })),
    })
}

fn remove(args: &RemoveArgs) -> Result<(), Failure> {
    let config = args.places.load()?;
    let store = Store::open(&config.retention_dir);
    let planned = store.remove_dry(&args.machine, args.disk.as_ref())?;
    let mut log = Log::open(&config.retention_dir)?;
    if let (Some(begun), Some(disk)) = (log.begun(&args.machine), &args.disk) {
        let machine = &args.machine;
        return Err(Failure::refused(format!(
            "{begun} began and is not done: go on with it or take it back first, with `mt-agent failover {machine}`; disk {disk} \
             stays"
        )));
    }
    if let (Some(released), Some(disk)) = (log.released(&args.machine), &args.disk) {
        let (machine, point) = (&args.machine, released.point);
        return Err(Failure::refused(format!(
            "machine {machine} is failed over to point {point}: take all of it away, or take the failover back first, with \
             `mt-agent failover {machine} --undo`; disk {disk} stays"
        )));
    }
    // All of them with all of its disks: which these are is not known where the protection cannot be read.
    let names = |point: &&Point| {
        args.disk.as_ref().is_none_or(|disk| point.volumes_of(&args.machine).any(|at| at.disk == *disk))
    };
    let points: Vec<&Point> = log.points(&args.machine).filter(names).collect();
    // Those of a group go for all of its machines.
    let others: BTreeSet<Name> =
        points.iter().flat_map(|point| &point.volumes).map(|at| at.machine.clone()).collect();
    let others: Vec<Name> = others.into_iter().filter(|machine| *machine != args.machine).collect();
    let points: Vec<PointId> = points.into_iter().map(|point| point.id).collect();
    let taken = match args.dry_run {
        true => planned,
        false => {
            // The points go with their disks, which anyone may write to then; and go first: a crash in between leaves
            // assigned disks without points, and no points of disks that are nobody's.
            if !points.is_empty() {
                let alone = store.exclude(&args.machine)?;
                let (machine, time) = (args.machine.clone(), OffsetDateTime::now_utc());
                log.append(Record::GivenUp(GivenUp { machine, time, points: points.clone() }))?;
                drop(alone);
            }
            store.remove(&args.machine, args.disk.as_ref())?
        }
    };
    let followed = if args.dry_run { Ok(Vec::new()) } else { setup::follow_disks(&config) };
    if args.json {
        print_json(&json!({
            "schema_version": SCHEMA_VERSION,
            "machine": args.machine,
            "dry_run": args.dry_run,
            "disks": taken.iter().map(disk_json).collect::<Vec<_>>(),
        }))?;
        return followed.map(drop);
    }
    let done = if args.dry_run { "would be" } else { "is" };
    let mut text = String::new();
    for disk in &taken {
        let id = table::printable(&disk.id.to_string());
        let size: ByteLen = disk.size;
        text.push_str(&format!("{}: {} {done} taken away: {id}, {size}\n", args.machine, disk.name));
    }
    if taken.is_empty() {
        text = format!("{}: its protection, which could not be read, {done} removed\n", args.machine);
    }
    if !points.is_empty() {
        let (count, gone) = (points.len(), if args.dry_run { "would be" } else { "are" });
        text.push_str(&format!("{}: {count} recovery points {gone} given up with it\n", args.machine));
        for other in &others {
            text.push_str(&format!(
                "{other}: those of them that are its own too, as of one group, with them\n"
            ));
        }
    }
    if args.dry_run {
        text.push_str("dry run: nothing was written\n");
    }
    followed.as_deref().unwrap_or_default().iter().for_each(|line| text.push_str(&format!("{line}\n")));
    print(&text)?;
    followed.map(drop)
}
