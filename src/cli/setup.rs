//! `mt-agent setup`: the changes that make this host a master target.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use mt_agent::agent::config::{self, Config, Sourced};
use mt_agent::disk::id::DiskId;
use mt_agent::error::{IoError, chain};
use mt_agent::setup;
use mt_agent::setup::{
    Applied, CHANGES, Change, Checked, Error, Finding, Host, Level, Outcomes, Planned, Reverted, Setup,
    Standing, Status, Wishes, tree::Root,
};
use mt_agent::units::rfc3339;
use serde_json::{Value, json};

use super::places::Places;
use super::{Failure, print, print_json, table};

/// The version of the JSON that these commands print.
const SCHEMA_VERSION: u32 = 1;

/// Make this host a master target: look at the changes first, apply them, take them back
#[derive(Subcommand)]
pub enum Command {
    /// Look whether this host is fit and each change is in place; writes nothing
    Check(Selection),
    /// Show what `apply` would do, as unified diffs and exact calls; writes nothing
    Plan(ApplyArgs),
    /// Make the changes; what was there is kept, and a second run changes nothing
    Apply(ApplyArgs),
    /// Put back what was there before the changes
    Revert(Selection),
    /// Say what was applied when, and whether a reboot is due
    Status(Selection),
}

/// Of which host, and which changes.
#[derive(Args)]
pub struct Selection {
    /// Work on this directory, the root of an image, instead of /
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Only these changes, by the names that `check` lists, separated by commas
    #[arg(long, value_name = "CHANGES", value_delimiter = ',', value_parser = names(), hide_possible_values = true)]
    only: Vec<String>,
    /// All but these changes, separated by commas
    #[arg(long, value_name = "CHANGES", value_delimiter = ',', value_parser = names(), hide_possible_values = true)]
    skip: Vec<String>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

/// What `apply` and `plan` are told.
#[derive(Args)]
pub struct ApplyArgs {
    #[command(flatten)]
    selection: Selection,
    /// Make a file system for the retention on this disk, and have it mounted at boot
    #[arg(long, value_name = "DISKID")]
    retention_disk: Option<DiskId>,
    /// Take a retention disk that is not empty too: everything on it is lost
    #[arg(long, requires = "retention_disk")]
    overwrite: bool,
    /// Install packages that are missing
    #[arg(long)]
    install: bool,
}

fn names() -> PossibleValuesParser {
    PossibleValuesParser::new(CHANGES.iter().map(|change| change.name))
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        if error.is_refusal() { Failure::refused(error) } else { Failure::failed(error) }
    }
}

impl Selection {
    fn changes(&self) -> Result<Vec<&'static Change>, Failure> {
        let named = |names: &[String], change: &Change| names.iter().any(|name| name == change.name);
        let wanted = |change: &&Change| {
            (self.only.is_empty() || named(&self.only, change)) && !named(&self.skip, change)
        };
        let left: Vec<&Change> = CHANGES.iter().filter(wanted).collect();
        if left.is_empty() {
            let of = if self.only.is_empty() { "there are" } else { "--only names" };
            return Err(Failure::Usage(format!(
                "no change is left: --skip takes away all that {of}; leave one of them out of it"
            )));
        }
        Ok(left)
    }

    fn open(&self, wishes: Wishes) -> Result<Setup, Failure> {
        let places = &self.places;
        let wishes = Wishes { config: places.config.clone(), ..wishes };
        let config = match &places.config {
            Some(_) => places.load()?,
            // The host's own.
            None => places.over(configured(&Root::open(&self.root)?)?.config),
        };
        Ok(Setup::open(Host::open(&self.root, places_of(&config), wishes)?)?)
    }

    fn print(&self, changes: Vec<Value>, text: &str) -> Result<(), Failure> {
        if !self.json {
            return print(text);
        }
        print_json(&json!({
            "schema_version": SCHEMA_VERSION,
            "root": self.root.display().to_string(),
            "changes": changes,
        }))
    }
}

impl ApplyArgs {
    /// The changes; what is asked for besides must be for one of them.
    fn changes(&self) -> Result<Vec<&'static Change>, Failure> {
        let changes = self.selection.changes()?;
        for (asked, option, of) in [
            (self.retention_disk.is_some(), "--retention-disk", "retention"),
            (self.install, "--install", "packages"),
        ] {
            if asked && !changes.iter().any(|change| change.name == of) {
                return Err(Failure::Usage(format!(
                    "{option} is for the change {of}, which --only or --skip leave out; name it, or leave {option} out"
                )));
            }
        }
        Ok(changes)
    }

    fn open(&self) -> Result<Setup, Failure> {
        let ApplyArgs { retention_disk, overwrite, install, .. } = self;
        self.selection.open(Wishes {
            retention_disk: retention_disk.clone(),
            overwrite: *overwrite,
            install: *install,
            ..Wishes::default()
        })
    }
}

/// What the host's own files say. Where they are links, these are meant inside of its root.
fn configured(root: &Root) -> Result<Sourced, Failure> {
    let mut files = Vec::new();
    let mut take = |path: &Path| {
        let bytes = root.read(path)?;
        let found = bytes.is_some();
        files.extend(bytes.map(|bytes| (root.at(path), bytes)));
        Ok::<bool, Error>(found)
    };
    take(Path::new(config::DEFAULT_FILE))?;
    let snippets = Path::new(config::DEFAULT_SNIPPETS);
    for name in root.entries(snippets)?.iter().filter(|name| config::is_snippet(name)) {
        let path = snippets.join(name);
        if !take(&path)? {
            let target = root.at(&path).display().to_string();
            return Err(Failure::refused(IoError::new(
                "open",
                target,
                io::Error::from_raw_os_error(libc::ENOENT),
            )));
        }
    }
    Ok(Sourced::of(files)?)
}

fn places_of(config: &Config) -> setup::Places {
    setup::Places {
        state_dir: config.state_dir.clone(),
        retention_dir: config.retention_dir.clone(),
        port: config.listen.port(),
    }
}

/// For how many assigned disks this host is set up, as far as that is known.
pub fn disks(config: &Config) -> usize {
    let host = Host::open("/".as_ref(), places_of(config), Wishes::default());
    host.and_then(Setup::open).map_or(0, |setup| setup.disks())
}

/// After disks were assigned or taken away: makes those changes again that depend on it, where they were made. Says what was
/// done.
pub fn follow_disks(config: &Config) -> Result<Vec<String>, Failure> {
    let failed = |what: &str| {
        Failure::failed(format!(
            "the disks are assigned as they are listed, but this host does not treat them so yet: {what}; mend that, then run \
             `mt-agent setup apply`"
        ))
    };
    let host = Host::open("/".as_ref(), places_of(config), Wishes::default());
    let done = host
        .and_then(Setup::open)
        .and_then(|setup| setup.follow_disks())
        .map_err(|error| failed(&chain(&error)))?;
    let mut lines = Vec::new();
    for (name, outcome) in done {
        let applied = outcome.map_err(|error| failed(&format!("{name}: {}", chain(&error))))?;
        lines.extend(
            files_text(&applied.files, &applied.removed, "wrote").map(|text| format!("setup {name}: {text}")),
        );
        lines.extend(
            applied
                .findings
                .iter()
                .filter(|found| found.level > Level::Pass)
                .map(|found| format!("setup {name}: {}", finding_text(found))),
        );
    }
    Ok(lines)
}

/// Runs one of them.
pub fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Check(args) => check(&args),
        Command::Plan(args) => plan(&args),
        Command::Apply(args) => apply(&args),
        Command::Revert(args) => revert(&args),
        Command::Status(args) => status(&args),
    }
}

fn value(of: impl serde::Serialize) -> Result<Value, Failure> {
    serde_json::to_value(of).map_err(Failure::failed)
}

fn check(args: &Selection) -> Result<(), Failure> {
    let changes = args.changes()?;
    let setup = args.open(Wishes::default())?;
    setup.host().expect_system()?;
    let checked = setup.check(&changes);
    let text = checked_text(&checked).join("\n") + "\n";
    args.print(checked.iter().map(value).collect::<Result<_, _>>()?, &text)?;
    failing(checked.iter().filter(|checked| checked.level == Level::Fail).map(|checked| checked.name))
}

/// A table, in lines of the narrowest terminal: of each change what was found, and below that how to mend it and, where
/// anything is to be mended, what that was seen by.
fn checked_text(checked: &[Checked]) -> Vec<String> {
    let width = CHANGES.iter().map(|change| change.name.len()).max().unwrap_or_default();
    let mut lines = vec![format!("RESULT  {:width$}  WHAT", "CHANGE")];
    for Checked { name, level, findings, evidence, .. } in checked {
        for (at, Finding { level, what, fix }) in findings.iter().enumerate() {
            let head = format!("{:6}  {name:width$}  ", level.as_str());
            lines.extend(table::wrapped(&head, &table::printable(what)));
            // One for all that it mends.
            let is_last = findings.get(at + 1).is_none_or(|next| next.fix != *fix);
            if is_last && !fix.is_empty() {
                lines.extend(table::wrapped("        fix: ", &table::printable(fix)));
            }
        }
        let shown = evidence.iter().filter(|_| *level > Level::Pass);
        lines.extend(shown.flat_map(|fact| table::wrapped("        seen: ", &table::printable(fact))));
    }
    lines
}

/// Exit code 3 where any change is not as it must be.
fn failing(names: impl Iterator<Item = &'static str>) -> Result<(), Failure> {
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        Ok(())
    } else {
        Err(Failure::refused(format!("not as it must be: {}", names.join(", "))))
    }
}

fn plan(args: &ApplyArgs) -> Result<(), Failure> {
    let changes = args.changes()?;
    let setup = args.open()?;
    setup.host().expect_system()?;
    let planned = setup.plan(&changes);
    let mut text = String::new();
    for plan in &planned {
        text.push_str(&plan_text(plan, setup.host().is_live()));
    }
    args.selection.print(planned.iter().map(value).collect::<Result<_, _>>()?, &text)?;
    let refused: Vec<&str> =
        planned.iter().filter(|plan| plan.refused.is_some()).map(|plan| plan.name).collect();
    if refused.is_empty() {
        Ok(())
    } else {
        Err(Failure::refused(format!("would be refused: {}", refused.join(", "))))
    }
}

fn plan_text(plan: &Planned, is_live: bool) -> String {
    let mut text = format!("# {}: {}\n", plan.name, plan.about);
    let mut say = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    plan.evidence.iter().for_each(|fact| say(format!("#   {}", table::printable(fact))));
    plan.findings.iter().for_each(|finding| say(finding_text(finding)));
    if let Some(refused) = &plan.refused {
        refused.lines().for_each(|line| say(format!("refused: {}", table::printable(line))));
    }
    let call = |when: &str, call: &setup::report::PlannedCall| {
        let only = call
            .only_if
            .as_ref()
            .map_or(String::new(), |path| format!(", where {} is there", path.display()));
        format!("{when}: {}  # {}{only}", call.command, call.why)
    };
    // In an image nothing is called.
    let (first, then) =
        if is_live { ("first call", "call") } else { ("left for the host itself", "on a running host") };
    plan.prepare.iter().for_each(|planned| say(call(first, planned)));
    if !plan.diff.is_empty() {
        say(plan.diff.trim_end_matches('\n').to_owned());
    }
    plan.calls.iter().for_each(|planned| say(call(then, planned)));
    if plan.reboot {
        say("then reboot: all of it is in effect only after that".to_owned());
    }
    if plan.is_empty() {
        say("nothing to do".to_owned());
    }
    text.push('\n');
    text
}

fn finding_text(Finding { level, what, fix }: &Finding) -> String {
    let fix = if fix.is_empty() { String::new() } else { format!("; {}", table::printable(fix)) };
    format!("{}: {}{fix}", level.as_str(), table::printable(what))
}

/// What became of each change, as JSON; and the failure that the command ends with.
fn outcomes<T: serde::Serialize>(done: &Outcomes<T>) -> Result<(Vec<Value>, Option<Failure>), Failure> {
    let mut values = Vec::new();
    let (mut failed, mut refused) = (Vec::new(), Vec::new());
    for (name, outcome) in done {
        let mut json = json!({ "name": name, "error": null });
        match outcome {
            Ok(done) => json["done"] = value(done)?,
            Err(error) => {
                json["error"] = chain(error).into();
                if error.is_refusal() { &mut refused } else { &mut failed }.push(*name);
            }
        }
        values.push(json);
    }
    let failure = if !failed.is_empty() {
        Some(Failure::failed(format!("failed: {}", failed.join(", "))))
    } else if !refused.is_empty() {
        Some(Failure::refused(format!("refused: {}", refused.join(", "))))
    } else {
        None
    };
    Ok((values, failure))
}

fn apply(args: &ApplyArgs) -> Result<(), Failure> {
    let changes = args.changes()?;
    let done = args.open()?.apply(&changes)?;
    let mut text = String::new();
    for (name, outcome) in &done {
        match outcome {
            Ok(applied) => text.push_str(&applied_text(name, applied)),
            Err(error) => lines_of(&mut text, name, error),
        }
    }
    let (values, failure) = outcomes(&done)?;
    args.selection.print(values, &text)?;
    match failure {
        Some(failure) => Err(failure),
        None => failing(done.iter().filter_map(|(name, outcome)| {
            let findings = &outcome.as_ref().ok()?.findings;
            findings.iter().any(|finding| finding.level == Level::Fail).then_some(*name)
        })),
    }
}

fn lines_of(text: &mut String, name: &str, error: &Error) {
    for line in chain(error).lines() {
        // Writing to a String cannot fail.
        _ = writeln!(text, "{name}: not done: {}", table::printable(line));
    }
}

/// What became of each file: it was removed, or what `done` says.
fn files_text(files: &[PathBuf], removed: &[PathBuf], done: &str) -> impl Iterator<Item = String> {
    files.iter().map(move |path| {
        format!("{} {}", if removed.contains(path) { "removed" } else { done }, path.display())
    })
}

fn applied_text(name: &str, applied: &Applied) -> String {
    let mut text = String::new();
    files_text(&applied.files, &applied.removed, "wrote")
        .for_each(|line| _ = writeln!(text, "{name}: {line}"));
    applied.calls.iter().for_each(|call| _ = writeln!(text, "{name}: called {call}"));
    applied.left.iter().for_each(|call| _ = writeln!(text, "{name}: left for the host itself: {call}"));
    if text.is_empty() {
        _ = writeln!(text, "{name}: nothing to do");
    }
    let found = applied.findings.iter().filter(|finding| finding.level > Level::Pass);
    found.for_each(|finding| _ = writeln!(text, "{name}: {}", finding_text(finding)));
    if applied.reboot {
        _ = writeln!(text, "{name}: all of it is in effect only after a reboot");
    }
    text
}

fn revert(args: &Selection) -> Result<(), Failure> {
    let changes = args.changes()?;
    let done = args.open(Wishes::default())?.revert(&changes)?;
    let mut text = String::new();
    for (name, outcome) in &done {
        match outcome {
            Ok(Reverted { applied: false, .. }) => _ = writeln!(text, "{name}: was not applied"),
            Ok(reverted) => {
                files_text(&reverted.files, &reverted.removed, "put back")
                    .for_each(|line| _ = writeln!(text, "{name}: {line}"));
                reverted.calls.iter().for_each(|call| _ = writeln!(text, "{name}: called {call}"));
                _ = writeln!(text, "{name}: is taken back");
                reverted.lasts.iter().for_each(|lasts| _ = writeln!(text, "{name}: {lasts}"));
                if reverted.reboot {
                    _ = writeln!(text, "{name}: some of it stays in effect until a reboot");
                }
            }
            Err(error) => lines_of(&mut text, name, error),
        }
    }
    let (values, failure) = outcomes(&done)?;
    args.print(values, &text)?;
    failure.map_or(Ok(()), Err)
}

fn status(args: &Selection) -> Result<(), Failure> {
    let changes = args.changes()?;
    let found = args.open(Wishes::default())?.status(&changes)?;
    let mut rows = Vec::new();
    for Status { name, applied } in &found {
        let mut row = vec![(*name).to_owned()];
        match applied {
            None => row.extend(["not applied", "-", "-", "-"].map(str::to_owned)),
            Some(applied) => {
                let state = match applied.state {
                    Standing::Applied => "applied",
                    Standing::ChangedSince => "changed since",
                    Standing::Applying => "interrupted: apply again",
                    Standing::Reverting => "interrupted: revert again",
                };
                let reboot = if applied.reboot_due { "due" } else { "-" };
                row.extend([state, &rfc3339(applied.time), &applied.version, reboot].map(str::to_owned));
            }
        }
        rows.push(row);
    }
    let mut lines = table::lines(&["CHANGE", "STATE", "TIME", "VERSION", "REBOOT"], &rows);
    for Status { name, applied } in &found {
        for path in applied.iter().flat_map(|applied| &applied.edited) {
            lines.push(format!("{name}: {} was changed since", path.display()));
        }
    }
    args.print(found.iter().map(value).collect::<Result<_, _>>()?, &(lines.join("\n") + "\n"))
}
