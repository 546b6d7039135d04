//! Checks, plans, applies and reverts any change, by what it says that it wants.

use std::path::Path;

use similar::TextDiff;
use time::OffsetDateTime;

use super::record::{FileRecord, Record, Records, State};
use super::report::{
    Applied, AppliedStatus, Checked, Outcomes, Planned, PlannedCall, Reverted, Standing, Status,
};
use super::tree::{self, Entry, Owner};
use super::{CHANGES, Call, Change, Error, Host, Level, Refusal, Wanted, moment};
use crate::error::{IoError, chain};

mod look;

use look::Target;

/// A host, and the records of what was done to it.
#[derive(Debug)]
pub struct Setup {
    host: Host,
    records: Records,
}

impl Setup {
    /// Nothing is read or written yet.
    ///
    /// # Errors
    /// Where the links in the path of the state cannot be followed.
    pub fn open(host: Host) -> Result<Setup, Error> {
        // Beside the state and not in it: that belongs to the user of the service, who is not to say what root puts back.
        let mut records = host.places.state_dir.clone().into_os_string();
        records.push("-setup");
        let records = Records::open(&host.root, host.root.real_parent(records.as_ref())?);
        Ok(Setup { host, records })
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// What was recorded of a change. Its paths were without links when they were recorded; one that leads elsewhere by now, out of
    /// the root maybe, is not followed.
    fn recorded(&self, change: &Change) -> Result<Option<Record>, Error> {
        let record = self.records.load(change.name)?;
        let paths = |record: &Record| {
            let files = record.files.iter().map(|file| file.path.clone());
            files.chain(record.dirs.clone()).collect::<Vec<_>>()
        };
        for path in record.as_ref().map(paths).unwrap_or_default() {
            if self.host.root.real_parent(&path)? != path {
                return Err(Error::refused(
                    format!(
                        "{} is not where `setup apply` left it any more: a directory on the way to it is a link now",
                        path.display()
                    ),
                    "put the directory back, then run this again",
                ));
            }
        }
        Ok(record)
    }

    /// The content that a file had before.
    fn original(&self, change: &Change, file: &FileRecord) -> Result<Vec<u8>, Error> {
        match &file.before {
            Entry::File { sha256, .. } => self.records.kept(change.name, sha256),
            Entry::Absent | Entry::Link { .. } => Ok(Vec::new()),
        }
    }

    /// `line` is ours, and still in it.
    fn changed_since(&self, change: &Change, file: &FileRecord, now: &Entry, line: Option<&str>) -> Refusal {
        let path = file.path.display();
        if let Some((then, now)) = file.only_owner(now) {
            let Owner { uid, gid, mode } = then;
            let (what, fix) = match (uid, gid) == (now.uid, now.gid) {
                true => (format!("mode: {mode:o} then, {:o} now", now.mode), String::new()),
                false => {
                    let what = format!("owner: {uid}:{gid} then, {}:{} now", now.uid, now.gid);
                    (what, format!("chown {uid}:{gid} {path} && "))
                }
            };
            return Refusal {
                what: format!("{path} was changed since `setup apply`, and is left alone: only its {what}"),
                fix: format!("{fix}chmod {mode:o} {path}, then run this again"),
            };
        }
        if let Some(line) = line {
            return Refusal {
                what: format!(
                    "{path} was changed since `setup apply` wrote it, and is left alone: it still has the line `{line}`"
                ),
                fix: "remove that line by hand, then run this again".to_owned(),
            };
        }
        let (before, put) = match &file.before {
            Entry::Absent => ("there was none before".to_owned(), "remove it".to_owned()),
            Entry::Link { target } => {
                (format!("before it was a link to {}", target.display()), "make it so again".to_owned())
            }
            Entry::File { sha256, .. } => {
                let kept = self.records.original(change.name, sha256);
                (format!("what it was before is kept in {}", kept.display()), "copy that back".to_owned())
            }
        };
        Refusal {
            what: format!("{path} was changed since `setup apply` wrote it, and is left alone: {before}"),
            fix: format!("{put} by hand, then run this again"),
        }
    }

    /// Whether each change is in place.
    pub fn check(&self, changes: &[&Change]) -> Vec<Checked> {
        changes.iter().map(|change| self.check_one(change)).collect()
    }

    fn check_one(&self, change: &Change) -> Checked {
        let mut found = Wanted::default();
        let apply = self.host.command(&format!("apply --only {}", change.name));
        match self.look(change) {
            Err(Error::Refused(refusals)) => {
                refusals.into_iter().for_each(|Refusal { what, fix }| found.find(Level::Fail, what, fix));
            }
            Err(error) => found.find(Level::Fail, chain(&error), "mend that, then check again"),
            Ok(look) => {
                for target in &look.targets {
                    if let Some(Refusal { what, fix }) = &target.problem {
                        found.find(Level::Fail, what, fix);
                    } else if target.differs {
                        let path = target.path.display();
                        let what = match (&target.now, &target.want) {
                            (Entry::Absent, _) => format!("{path} is not there"),
                            (_, Entry::Absent) => format!("{path} is not wanted any more"),
                            _ => format!("{path} does not say what it must"),
                        };
                        found.find(Level::Fail, what, apply.clone());
                    }
                }
                if let Some(record) = &look.record {
                    match record.state {
                        State::Applying => {
                            found.find(Level::Fail, "applying it was interrupted", apply.clone())
                        }
                        State::Reverting => found.find(
                            Level::Fail,
                            "taking it back was interrupted",
                            self.host.command(&format!("revert --only {}", change.name)),
                        ),
                        State::Applied if self.reboot_due(record) => {
                            found.find(Level::Warn, "all of it is in effect only after a reboot", "reboot");
                        }
                        State::Applied => {}
                    }
                }
                let due = look.wanted.prepare.iter().map(|call| (call.why.clone(), call.to_string()));
                due.for_each(|(why, call)| {
                    found.find(Level::Fail, format!("to be done: {why} (`{call}`)"), apply.clone())
                });
                if !look.wanted.files.is_empty() && !look.files_due() {
                    // Not one of others that was well as it was.
                    let is_ours = |path: &Path| {
                        look.record
                            .as_ref()
                            .is_none_or(|record| record.files.iter().any(|file| file.path == path))
                    };
                    let files = look.wanted.files.iter().zip(&look.targets);
                    let files = files.filter(|(file, target)| !file.shared || is_ours(&target.path));
                    let paths: Vec<String> = files.map(|(file, _)| file.path.display().to_string()).collect();
                    found.find(Level::Pass, format!("{} is in place", paths.join(", ")), String::new());
                }
                found.findings.extend(look.wanted.findings);
                found.evidence = look.wanted.evidence;
            }
        }
        if found.findings.is_empty() {
            found.find(Level::Pass, "nothing is needed here", String::new());
        }
        let level = found.findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Pass);
        let Change { name, about, .. } = *change;
        Checked { name, about, level, findings: found.findings, evidence: found.evidence }
    }

    /// What applying the changes would do. Nothing is written.
    pub fn plan(&self, changes: &[&Change]) -> Vec<Planned> {
        changes.iter().map(|change| self.plan_one(change)).collect()
    }

    fn plan_one(&self, change: &Change) -> Planned {
        let Change { name, about, .. } = *change;
        let mut planned = Planned {
            name,
            about,
            prepare: Vec::new(),
            diff: String::new(),
            calls: Vec::new(),
            reboot: false,
            refused: None,
            findings: Vec::new(),
            evidence: Vec::new(),
        };
        let look = match self.look(change) {
            Ok(look) => look,
            Err(error) => {
                planned.refused = Some(chain(&error));
                return planned;
            }
        };
        planned.refused = look.refused().map(|refused| refused.to_string());
        planned.diff = look.targets.iter().filter(|target| target.differs).map(diff).collect();
        planned.prepare = look.wanted.prepare.iter().map(PlannedCall::of).collect();
        if look.files_due() {
            planned.calls = look.wanted.calls.iter().map(PlannedCall::of).collect();
            planned.reboot = look.wanted.reboot && self.host.is_live();
        }
        planned.findings = look.wanted.findings;
        planned.evidence = look.wanted.evidence;
        planned
    }

    /// Makes the changes, each on its own: one that fails does not keep the others from being made.
    ///
    /// # Errors
    /// Only where no change can be made at all; what became of each is in the list.
    pub fn apply(&self, changes: &[&'static Change]) -> Result<Outcomes<Applied>, Error> {
        self.host.expect_system()?;
        let _alone = self.records.lock()?;
        Ok(changes.iter().map(|change| (change.name, self.apply_one(change))).collect())
    }

    /// For how many assigned disks this host is set up, as far as the records can be read.
    pub fn disks(&self) -> usize {
        let follows = CHANGES.iter().filter(|change| change.follows_disks);
        let records = follows.filter_map(|change| self.records.load(change.name).ok().flatten());
        records.map(|record| record.disks).max().unwrap_or(0)
    }

    /// Makes those changes again that depend on which disks are assigned, as far as they were made. Where none was,
    /// nothing is written.
    ///
    /// # Errors
    /// Those of [`Setup::apply`].
    pub fn follow_disks(&self) -> Result<Outcomes<Applied>, Error> {
        let follows = CHANGES.iter().filter(|change| change.follows_disks);
        // One whose record cannot be read was made once, and says so when it is applied.
        let made = follows.filter(|change| !matches!(self.records.load(change.name), Ok(None)));
        let made: Vec<&Change> = made.collect();
        if made.is_empty() { Ok(Vec::new()) } else { self.apply(&made) }
    }

    pub(super) fn apply_one(&self, change: &Change) -> Result<Applied, Error> {
        let root = &self.host.root;
        let mut look = self.look(change)?;
        if let Some(refused) = look.refused() {
            return Err(refused);
        }
        let mut applied =
            Applied { findings: std::mem::take(&mut look.wanted.findings), ..Applied::default() };
        if self.host.is_live() {
            applied.calls = self.call(&look.wanted.prepare)?;
        } else {
            applied.left = look.wanted.prepare.iter().map(Call::to_string).collect();
        }
        for target in &look.targets {
            // What an interrupted run left beside a file, also beside one that is as it shall be.
            tree::clear(root, &target.path)?;
        }
        if !look.files_due() {
            if look.record.is_some() {
                // The last run may have been interrupted just before it did that.
                self.records.sweep(change.name, look.record.as_ref())?;
            }
            return Ok(applied);
        }
        // Then a file or a directory may be there without what is done after it was made.
        let is_interrupted = look.record.as_ref().is_some_and(|record| record.state != State::Applied);
        let mut record = look.record.take().unwrap_or_else(Record::begun);
        for target in look.targets.iter().filter(|target| target.differs) {
            let known = record.files.iter_mut().find(|file| file.path == target.path);
            if let Some(file) = known {
                file.writing = Some(target.want.clone());
                file.edited |= target.edited;
                file.line = target.line.clone().or(file.line.take());
                continue;
            }
            if let Entry::File { .. } = target.now {
                self.records.keep(change.name, &target.now_bytes)?;
            }
            record.files.push(FileRecord {
                path: target.path.clone(),
                before: target.now.clone(),
                written: None,
                writing: Some(target.want.clone()),
                edited: false,
                line: target.line.clone(),
            });
            for dir in tree::missing_dirs(root, &target.path) {
                if !record.dirs.contains(&dir) {
                    record.dirs.push(dir);
                }
            }
        }
        record.state = State::Applying;
        record.version = env!("CARGO_PKG_VERSION").to_owned();
        record.time = OffsetDateTime::now_utc();
        record.boot = self.host.boot();
        record.reboot = look.wanted.reboot;
        record.disks = look.disks;
        record.calls.clone_from(&look.wanted.calls);
        record.lasts.clone_from(&look.wanted.lasts);
        self.records.save(change.name, &record)?;

        if is_interrupted {
            // One in which nothing is yet may lack its permissions or its label: it is made again.
            record.dirs.iter().rev().try_for_each(|dir| tree::remove_dir(root, dir))?;
        }
        for target in &look.targets {
            if target.differs {
                if target.want != Entry::Absent {
                    for dir in tree::missing_dirs(root, &target.path) {
                        tree::make_dir(root, &dir, 0o755)?;
                        self.label(&dir)?;
                    }
                }
                tree::put(root, &target.path, &target.want, &target.want_bytes)?;
                moment()?;
            }
            let is_made = |file: &FileRecord| file.path == target.path && file.before == Entry::Absent;
            let is_new = target.now == Entry::Absent || is_interrupted && record.files.iter().any(is_made);
            if is_new && target.want != Entry::Absent {
                self.label(&target.path)?;
            }
            moment()?;
            if target.differs {
                applied.files.push(target.path.clone());
                if target.want == Entry::Absent {
                    applied.removed.push(target.path.clone());
                }
            }
        }
        applied.calls.extend(self.call(&look.wanted.calls)?);
        moment()?;

        // What it wanted once, and is what it was, is not its concern any more.
        record
            .files
            .retain(|file| look.targets.iter().any(|target| target.stays && target.path == file.path));
        for file in &mut record.files {
            if let Some(written) = file.writing.take() {
                file.written = Some(written);
            }
        }
        record.state = State::Applied;
        if record.files.is_empty() {
            self.records.save(change.name, &record)?;
            record.dirs.iter().rev().try_for_each(|dir| tree::remove_dir(root, dir))?;
            self.records.remove(change.name)?;
        } else {
            self.records.save(change.name, &record)?;
            self.records.sweep(change.name, Some(&record))?;
        }
        applied.reboot = look.wanted.reboot && self.host.is_live();
        Ok(applied)
    }

    /// Takes the changes back, the last one first.
    ///
    /// # Errors
    /// Only where nothing can be taken back at all; what became of each is in the list.
    pub fn revert(&self, changes: &[&'static Change]) -> Result<Outcomes<Reverted>, Error> {
        if changes.iter().all(|change| matches!(self.records.has(change.name), Ok(false))) {
            return Ok(changes.iter().rev().map(|change| (change.name, Ok(Reverted::default()))).collect());
        }
        let _alone = self.records.lock()?;
        Ok(changes.iter().rev().map(|change| (change.name, self.revert_one(change))).collect())
    }

    pub(super) fn revert_one(&self, change: &Change) -> Result<Reverted, Error> {
        let root = &self.host.root;
        let Some(mut record) = self.recorded(change)? else {
            self.records.sweep(change.name, None)?;
            return Ok(Reverted::default());
        };
        let (mut back, mut problems) = (Vec::new(), Vec::new());
        for file in &record.files {
            let (now, content) = Entry::read(root, &file.path)?;
            if now.is_like(&file.before) {
                continue;
            }
            if file.is_changed(&now) {
                let line = file.line_in(&now, content.as_deref());
                if file.line.is_some() && line.is_none() {
                    // The line was taken out by hand.
                    continue;
                }
                problems.push(self.changed_since(change, file, &now, line));
            }
            // Read before anything is touched.
            back.push((file.path.clone(), file.before.clone(), self.original(change, file)?));
        }
        if !problems.is_empty() {
            return Err(Error::Refused(problems));
        }
        record.state = State::Reverting;
        self.records.save(change.name, &record)?;
        for file in &record.files {
            tree::clear(root, &file.path)?;
        }
        let (mut files, mut removed) = (Vec::new(), Vec::new());
        for (path, before, content) in back {
            tree::put(root, &path, &before, &content)?;
            moment()?;
            if before == Entry::Absent {
                removed.push(path.clone());
            }
            files.push(path);
        }
        record.dirs.iter().rev().try_for_each(|dir| tree::remove_dir(root, dir))?;
        let calls = self.call(&record.calls)?;
        self.records.remove(change.name)?;
        let reboot = record.reboot && self.host.is_live();
        let had_line = record.files.iter().any(|file| file.line.is_some());
        let lasts = record.lasts.filter(|_| had_line && self.host.is_live());
        Ok(Reverted { applied: true, files, removed, calls, reboot, lasts })
    }

    /// What was applied when.
    ///
    /// # Errors
    /// Where a record or a file cannot be read.
    pub fn status(&self, changes: &[&Change]) -> Result<Vec<Status>, Error> {
        changes.iter().map(|change| self.status_one(change)).collect()
    }

    fn status_one(&self, change: &Change) -> Result<Status, Error> {
        let Some(record) = self.recorded(change)? else {
            return Ok(Status { name: change.name, applied: None });
        };
        let reboot_due = self.reboot_due(&record);
        let mut edited = Vec::new();
        for file in &record.files {
            let (now, _) = Entry::read(&self.host.root, &file.path)?;
            let is_ours = match record.state {
                State::Applied => file.written.as_ref().is_some_and(|written| written.is_like(&now)),
                // Some may be what they were before.
                State::Applying | State::Reverting => file.knows(&now),
            };
            if file.edited || !is_ours {
                edited.push(file.path.clone());
            }
        }
        let files = record.files.into_iter().map(|file| file.path).collect();
        let Record { state, version, time, .. } = record;
        let state = match state {
            State::Applied if edited.is_empty() => Standing::Applied,
            State::Applied => Standing::ChangedSince,
            State::Applying => Standing::Applying,
            State::Reverting => Standing::Reverting,
        };
        Ok(Status {
            name: change.name,
            applied: Some(AppliedStatus { state, version, time, reboot_due, files, edited }),
        })
    }

    fn reboot_due(&self, record: &Record) -> bool {
        record.reboot && self.host.is_live() && record.boot == self.host.boot()
    }

    /// The host of a tree reads all of its files when it boots.
    fn call(&self, calls: &[Call]) -> Result<Vec<String>, Error> {
        let mut made = Vec::new();
        for call in calls.iter().filter(|_| self.host.is_live()) {
            if call.only_if.as_ref().is_none_or(|path| self.host.root.exists(path)) {
                run(call)?;
                made.push(call.to_string());
            }
        }
        Ok(made)
    }

    /// Gives what was made anew the label that the host's policy has for its place. In the tree of another host that is
    /// done when it boots for the first time.
    fn label(&self, real: &Path) -> Result<(), Error> {
        if self.host.is_live()
            && self.host.root.exists("/sys/fs/selinux/enforce")
            && self.host.program("restorecon")
        {
            let path = real.to_string_lossy();
            run(&Call::new("restorecon", &["-F", &path], "to give it the label of its place"))?;
        }
        Ok(())
    }
}

/// As `diff -u` shows it.
fn diff(target: &Target) -> String {
    let text = |entry: &Entry, bytes: &[u8]| match entry {
        Entry::Absent => String::new(),
        Entry::Link { target } => format!("(link to {})\n", target.display()),
        Entry::File { .. } => String::from_utf8_lossy(bytes).into_owned(),
    };
    let name = |entry: &Entry| match entry {
        Entry::Absent => "/dev/null".to_owned(),
        _ => target.path.display().to_string(),
    };
    let (old, new) = (text(&target.now, &target.now_bytes), text(&target.want, &target.want_bytes));
    let (from, to) = (name(&target.now), name(&target.want));
    TextDiff::from_lines(&old, &new).unified_diff().header(&from, &to).to_string()
}

fn run(call: &Call) -> Result<(), Error> {
    let failed = |why: String| Error::Call { call: Box::new(call.clone()), why };
    let output =
        call.command().output().map_err(|error| failed(chain(&IoError::new("run", &call.program, error))))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it said nothing");
    Err(failed(format!("{}: {said}", output.status)))
}
