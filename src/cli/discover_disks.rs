//! `mt-agent discover-disks`: what each disk is, and whether it may be a target.
//!
//! `--json` prints one object: `schema_version` (1) and `disks`, an array of [`Disk`]s. With `--watch` it prints
//! one object a line: the first as above, and then one for each change, with `schema_version`, `event`
//! (`attached`, `detached`, `resized`, `changed`), `disk`, and for `resized` the size `from` which it changed.
//! Sizes are in bytes.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use mt_agent::disk::discover::watch::{Change, Watch};
use mt_agent::disk::discover::{self, Disk, Options, Sysroot, discover};
use mt_agent::disk::id::DiskId;
use mt_agent::error::plain;
use mt_agent::protection::Store;
use serde::Serialize;

use super::places::Places;
use super::{Failure, setup, table};

/// The version of the JSON; it changes when a field goes or changes its meaning.
const SCHEMA_VERSION: u32 = 1;

/// List every disk with its identity, its role and what is wrong with it; writes nothing to any disk.
#[derive(clap::Args)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused (--require-uuid and a disk has no UUID)."
)]
pub struct Args {
    /// Print JSON; sizes are in bytes
    #[arg(long)]
    json: bool,
    /// List loop devices too
    #[arg(long = "loop")]
    include_loop: bool,
    /// Stay, and print what changes as disks come, go and are resized; what the kernel tells nobody, such as an assignment or
    /// a mount, is seen within half a minute
    #[arg(long)]
    watch: bool,
    /// First ask every SCSI disk for its size again, and every SCSI host for new disks (needs root). This takes no
    /// disk away: one that went unnoticed by the bus stays listed, without a size
    #[arg(long, conflicts_with = "sysroot")]
    rescan: bool,
    /// Exit with 3 if a disk has no UUID
    #[arg(long, conflicts_with = "watch")]
    require_uuid: bool,
    /// Read another tree's sys, proc and run/udev
    #[arg(long, value_name = "DIR", default_value = "/", conflicts_with = "watch")]
    sysroot: PathBuf,
    #[command(flatten)]
    places: Places,
}

#[derive(Serialize)]
struct Listing<'a> {
    schema_version: u32,
    disks: &'a [Disk],
}

#[derive(Serialize)]
struct Event<'a> {
    schema_version: u32,
    #[serde(flatten)]
    change: &'a Change,
}

/// Runs the command.
pub fn run(args: Args) -> Result<(), Failure> {
    let sysroot = Sysroot::new(&args.sysroot);
    if args.rescan {
        rescan(&sysroot)?;
    }
    let include_loop = args.include_loop;
    // Another host's disks: this one's assignments say nothing of them.
    let config = if sysroot.is_live() { Some(args.places.load()?) } else { None };
    let mut had = false;
    let mut look = move || {
        let Some(config) = &config else { return Options { include_loop, ..Options::default() } };
        let dir = &config.retention_dir;
        // The disks are worth seeing all the same, to who may not read (all of) the protections too.
        let known = Store::open(dir).known();
        // No command takes their directory away: that there was one is told by an earlier look, or by what was set up.
        had |= known.is_some() || setup::disks(config) > 0;
        let gone = (had && known.is_none()).then(|| {
            format!("{} holds no protections any more; mount the retention file system", dir.display())
        });
        let (assigned, mut unread) = known.unwrap_or_default();
        unread.extend(gone);
        Options { include_loop, assigned, unread, retention: Some(dir.clone()), ..Options::default() }
    };
    let options = look();
    for why in &options.unread {
        note!("mt-agent: not all that is assigned is known: {why}");
    }
    let mut out = io::stdout().lock();
    if args.watch {
        let watch = Watch::new(sysroot, look).map_err(failure)?;
        return done(follow(watch, args.json, &mut out));
    }
    let disks = discover(&sysroot, &options).map_err(failure)?;
    if args.json {
        let listing = Listing { schema_version: SCHEMA_VERSION, disks: &disks };
        let text = serde_json::to_string_pretty(&listing).map_err(Failure::failed)?;
        done(writeln!(out, "{text}").map_err(Failure::failed))?;
    } else {
        done(out.write_all(listing(&disks).as_bytes()).map_err(Failure::failed))?;
    }
    let without: Vec<&str> =
        disks.iter().filter(|disk| lacks_uuid(disk)).map(|disk| disk.name.as_str()).collect();
    if args.require_uuid && !without.is_empty() {
        return Err(Failure::refused(format!(
            "{} without a UUID: {}; let the hypervisor give each one (VMware: disk.EnableUUID = TRUE; QEMU: wwn=)",
            if without.len() == 1 { "a disk is".to_owned() } else { format!("{} disks are", without.len()) },
            without.join(", ")
        )));
    }
    Ok(())
}

/// A serial is no UUID; a loop device never has one, and was asked for.
fn lacks_uuid(disk: &Disk) -> bool {
    disk.id.as_ref().is_none_or(DiskId::is_weak) && !disk.name.starts_with("loop")
}

fn failure(error: discover::Error) -> Failure {
    match error {
        discover::Error::Refused(_) => Failure::refused(error),
        discover::Error::Io(_) => Failure::failed(error),
    }
}

/// A reader that went away (`| head`) is no failure of ours.
fn done(result: Result<(), Failure>) -> Result<(), Failure> {
    match result {
        Err(Failure::Failed(error))
            if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Asks the hosts, and gives disks that answer a little time to be probed.
fn rescan(sysroot: &Sysroot) -> Result<(), Failure> {
    let hosts = sysroot.rescan().map_err(failure)?;
    if hosts == 0 {
        note!("mt-agent: this machine has no SCSI host that could be asked to look again");
        return Ok(());
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while !sysroot.is_settled() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn follow(mut watch: Watch, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::failed(error);
    if json {
        let line = serde_json::to_string(&Listing { schema_version: SCHEMA_VERSION, disks: watch.disks() });
        writeln!(out, "{}", line.map_err(Failure::failed)?).map_err(failed)?;
    } else {
        write!(out, "{}", listing(watch.disks())).map_err(failed)?;
    }
    out.flush().map_err(failed)?;
    loop {
        let changes = watch.wait(io::stdout().as_fd()).map_err(failure)?;
        if changes.is_empty() {
            // Whoever read went away, and would otherwise be missed only at the next change.
            return Ok(());
        }
        for change in changes {
            if json {
                let line = serde_json::to_string(&Event { schema_version: SCHEMA_VERSION, change: &change });
                writeln!(out, "{}", line.map_err(Failure::failed)?).map_err(failed)?;
            } else {
                writeln!(out, "{}", sentence(&change)).map_err(failed)?;
            }
        }
        out.flush().map_err(failed)?;
    }
}

fn sentence(change: &Change) -> String {
    let (word, disk, more) = match change {
        Change::Attached { disk } => ("attached", disk, facts(disk)),
        Change::Detached { disk } => ("detached", disk, String::new()),
        Change::Resized { disk, from } => ("resized ", disk, format!("from {from} to {}", disk.size)),
        Change::Changed { disk } => ("changed ", disk, facts(disk)),
    };
    let identity = disk.id.as_ref().map_or("no UUID".to_owned(), ToString::to_string);
    plain(format!("{word} {} ({identity}) {more}", disk.name).trim_end()).into_owned()
}

fn facts(disk: &Disk) -> String {
    let mut text = format!("{}, {}", disk.size, disk.role.as_str());
    for line in disk.evidence.iter().chain(&disk.problems) {
        text.push_str("; ");
        text.push_str(line);
    }
    text
}

/// One line a disk, then the reasons: evidence of the role, and problems with what to do.
fn listing(disks: &[Disk]) -> String {
    if disks.is_empty() {
        return "no disks (loop devices are listed with --loop)\n".to_owned();
    }
    // Numbers end in line, which tables do not do by themselves.
    let width = disks.iter().map(|disk| disk.size.to_string().len()).max().unwrap_or(0);
    let size = |text: &str| format!("{text:>width$}");
    let head = ["IDENTITY", "NAME", "H:C:T:L", &size("SIZE"), "VENDOR AND MODEL", "ROLE", "PROBLEMS"];
    let mut rows = Vec::new();
    for disk in disks {
        let text = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let model: Vec<&str> =
            [&disk.vendor, &disk.model].into_iter().flatten().map(String::as_str).collect();
        rows.push(vec![
            text(disk.id.as_ref().map(ToString::to_string)),
            disk.name.clone(),
            text(disk.hctl.clone()),
            size(&disk.size.to_string()),
            if model.is_empty() { "-".to_owned() } else { model.join(" ") },
            disk.role.as_str().to_owned(),
            match disk.problems.len() {
                0 => "none".to_owned(),
                1 => "1, see below".to_owned(),
                n => format!("{n}, see below"),
            },
        ]);
    }
    let mut out = table::lines(&head, &rows).join("\n") + "\n";
    for disk in disks {
        if disk.evidence.is_empty() && disk.problems.is_empty() && disk.paths.len() < 2 {
            continue;
        }
        out.push_str(&format!("\n{}:\n", plain(&disk.name)));
        if disk.paths.len() > 1 {
            out.push_str(&format!("  paths: {}\n", plain(&disk.paths.join(", "))));
        }
        for line in &disk.evidence {
            out.push_str(&format!("  {}: {}\n", disk.role.as_str(), plain(line)));
        }
        for line in &disk.problems {
            out.push_str(&format!("  problem: {}\n", plain(line)));
        }
    }
    out
}
