//! What a change wants, beside what there is.

use std::path::PathBuf;

use super::Setup;
use crate::setup::record::{FileRecord, Record, State};
use crate::setup::tree::{self, Entry, Owner};
use crate::setup::{Change, Content, Error, File, Level, Refusal, Wanted};

/// A file as it is and as it shall be.
pub(super) struct Target {
    pub(super) path: PathBuf,
    pub(super) now: Entry,
    pub(super) now_bytes: Vec<u8>,
    pub(super) want: Entry,
    pub(super) want_bytes: Vec<u8>,
    pub(super) differs: bool,
    /// Whether it is changed since it was written.
    pub(super) edited: bool,
    /// Why it must not be touched.
    pub(super) problem: Option<Refusal>,
    /// Whether there is something of us in it afterwards.
    pub(super) stays: bool,
    /// The line that is ours in a file of others.
    pub(super) line: Option<String>,
}

/// A change and the host, looked at.
pub(super) struct Look {
    pub(super) wanted: Wanted,
    pub(super) record: Option<Record>,
    pub(super) targets: Vec<Target>,
    pub(super) disks: usize,
}

impl Look {
    /// Whether a file is to be written, or was left unwritten.
    pub(super) fn files_due(&self) -> bool {
        self.targets.iter().any(|target| target.differs)
            || self.record.as_ref().is_some_and(|record| record.state != State::Applied)
    }

    /// Why none of it may be touched.
    pub(super) fn refused(&self) -> Option<Error> {
        let problems: Vec<Refusal> =
            self.targets.iter().filter_map(|target| target.problem.clone()).collect();
        (!problems.is_empty()).then_some(Error::Refused(problems))
    }
}

impl Setup {
    /// Looks at the host, and at what a change wants of it. Nothing is written.
    pub(super) fn look(&self, change: &Change) -> Result<Look, Error> {
        let record = self.recorded(change)?;
        let disks = if change.follows_disks { self.host.assigned()?.len() } else { 0 };
        if let Some(record) = &record
            && record.disks > 0
            && !self.host.has_protections()
        {
            return Err(Error::refused(
                format!(
                    "{} was applied for {} assigned disks, and {} holds no protections now",
                    change.name,
                    record.disks,
                    self.host.places.retention_dir.display()
                ),
                "mount the retention file system",
            ));
        }
        let mut wanted = (change.wanted)(&self.host)?;
        let mut targets = Vec::new();
        for file in &wanted.files {
            targets.push(self.target(change, file, record.as_ref())?);
        }
        // What it wanted once and does not any more.
        for file in record.iter().flat_map(|record| &record.files) {
            if !targets.iter().any(|target| target.path == file.path) {
                targets.push(self.unwanted(change, file, &mut wanted)?);
            }
        }
        Ok(Look { wanted, record, targets, disks })
    }

    fn target(&self, change: &Change, file: &File, record: Option<&Record>) -> Result<Target, Error> {
        let root = &self.host.root;
        let path = match file.content {
            Content::Bytes(_) => root.real(&file.path)?,
            Content::Link(_) => root.real_parent(&file.path)?,
        };
        let (now, now_bytes) = Entry::read(root, &path)?;
        let recorded = record.and_then(|record| record.files.iter().find(|file| file.path == path));
        // One that was removed since comes back as it was.
        let kept = match (&now, recorded) {
            (Entry::Absent, Some(FileRecord { before, .. })) => before,
            _ => &now,
        };
        let (want, want_bytes) = match &file.content {
            Content::Link(target) => (Entry::Link { target: target.clone() }, Vec::new()),
            Content::Bytes(bytes) => {
                let (owner, xattrs) = match kept {
                    Entry::File { owner, xattrs, .. } => (*owner, xattrs.clone()),
                    Entry::Absent | Entry::Link { .. } => (new_owner(), Default::default()),
                };
                (Entry::File { sha256: tree::digest(bytes), owner, xattrs }, bytes.clone())
            }
        };
        let differs = match (&now, &want) {
            (Entry::File { sha256: now, .. }, Entry::File { sha256: want, .. }) => now != want,
            _ => now != want,
        };
        let edited = now != Entry::Absent && recorded.is_some_and(|recorded| !recorded.knows(&now));
        let problem = (differs && edited && !file.shared).then(|| Refusal {
            what: format!("{} was changed since `setup apply` wrote it", path.display()),
            fix: format!(
                "look what is in it, move it away, and run `{}` again",
                self.host.command(&format!("apply --only {}", change.name))
            ),
        });
        let now_bytes = now_bytes.unwrap_or_default();
        let line = file.line.clone();
        Ok(Target { path, now, now_bytes, want, want_bytes, differs, edited, problem, stays: true, line })
    }

    fn unwanted(&self, change: &Change, file: &FileRecord, wanted: &mut Wanted) -> Result<Target, Error> {
        let (now, now_bytes) = Entry::read(&self.host.root, &file.path)?;
        let path = file.path.clone();
        let is_changed = file.is_changed(&now);
        let line = file.line_in(&now, now_bytes.as_deref());
        let now_bytes = now_bytes.unwrap_or_default();
        if file.line.is_some() && (is_changed || wanted.lines_stay && line.is_some()) {
            let stays = line.is_some();
            if let Some(line) = line.filter(|_| !wanted.lines_stay) {
                wanted.find(
                    Level::Warn,
                    format!(
                        "{} was changed since `setup apply` put a line into it that is not wanted there any more",
                        path.display()
                    ),
                    format!("remove `{line}` from it by hand, and have its service read it again"),
                );
            }
            let (want, want_bytes) = (now.clone(), now_bytes.clone());
            let (differs, edited, problem, line) = (false, false, None, None);
            return Ok(Target {
                path,
                now,
                now_bytes,
                want,
                want_bytes,
                differs,
                edited,
                problem,
                stays,
                line,
            });
        }
        let want_bytes = self.original(change, file)?;
        let differs = !now.is_like(&file.before);
        let problem = is_changed.then(|| self.changed_since(change, file, &now, None));
        let (want, edited, stays, line) = (file.before.clone(), false, false, None);
        Ok(Target { path, now, now_bytes, want, want_bytes, differs, edited, problem, stays, line })
    }
}

/// A new file is its writer's, and for all to read.
fn new_owner() -> Owner {
    Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw(), mode: 0o644 }
}
