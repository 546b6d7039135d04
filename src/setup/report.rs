//! What the machine found and did, as it is printed and as JSON.

use std::path::PathBuf;

use serde::Serialize;
use time::OffsetDateTime;

use super::{Call, Error, Finding, Level};

/// What became of each change, by its name.
pub type Outcomes<T> = Vec<(&'static str, Result<T, Error>)>;

/// What was found of one change.
#[derive(Debug, Serialize)]
pub struct Checked {
    /// Its name.
    pub name: &'static str,
    /// What it ensures.
    pub about: &'static str,
    /// The worst of its findings.
    pub level: Level,
    /// The findings, never none.
    pub findings: Vec<Finding>,
    /// What they are based on.
    pub evidence: Vec<String>,
}

/// What applying one change would do.
#[derive(Debug, Serialize)]
pub struct Planned {
    /// Its name.
    pub name: &'static str,
    /// What it ensures.
    pub about: &'static str,
    /// What would be called before.
    pub prepare: Vec<PlannedCall>,
    /// The unified diffs of its files.
    pub diff: String,
    /// What would be called after.
    pub calls: Vec<PlannedCall>,
    /// Whether all of it would be in effect only after a reboot.
    pub reboot: bool,
    /// Why it would be refused.
    pub refused: Option<String>,
    /// What no file of it says.
    pub findings: Vec<Finding>,
    /// What it is based on.
    pub evidence: Vec<String>,
}

impl Planned {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.refused.is_none() && self.diff.is_empty() && self.prepare.is_empty() && self.calls.is_empty()
    }
}

/// A call that would be made.
#[derive(Debug, Serialize)]
pub struct PlannedCall {
    /// As a shell would take it.
    pub command: String,
    /// What for.
    pub why: String,
    /// It would be made only where this exists.
    pub only_if: Option<PathBuf>,
}

impl PlannedCall {
    /// A call as it would be made.
    pub(super) fn of(call: &Call) -> PlannedCall {
        PlannedCall { command: call.to_string(), why: call.why.clone(), only_if: call.only_if.clone() }
    }
}

/// What was done for one change.
#[derive(Debug, Default, Serialize)]
pub struct Applied {
    /// The files that were written or removed.
    pub files: Vec<PathBuf>,
    /// Those of them that were removed.
    pub removed: Vec<PathBuf>,
    /// The calls that were made.
    pub calls: Vec<String>,
    /// The calls that wait until this is done on the live host.
    pub left: Vec<String>,
    /// What no file of it says.
    pub findings: Vec<Finding>,
    /// Whether all of it is in effect only after a reboot.
    pub reboot: bool,
}

/// What was taken back of one change.
#[derive(Debug, Default, Serialize)]
pub struct Reverted {
    /// Whether it was applied at all.
    pub applied: bool,
    /// The files that were put back or removed.
    pub files: Vec<PathBuf>,
    /// Those of them that were removed: there was none before.
    pub removed: Vec<PathBuf>,
    /// The calls that were made.
    pub calls: Vec<String>,
    /// Whether some of it stays in effect until a reboot.
    pub reboot: bool,
    /// What stays in effect, and until when.
    pub lasts: Option<String>,
}

/// How a change stands.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Its name.
    pub name: &'static str,
    /// What is known of it, where it was applied.
    pub applied: Option<AppliedStatus>,
}

/// How a change that was applied stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// All of it is as it was written.
    Applied,
    /// Someone changed or removed some of its files since.
    ChangedSince,
    /// Applying it was interrupted.
    Applying,
    /// Taking it back was interrupted.
    Reverting,
}

/// A change that was applied.
#[derive(Debug, Serialize)]
pub struct AppliedStatus {
    /// How it stands.
    pub state: Standing,
    /// By which version.
    pub version: String,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// Whether a reboot is due before all of it is in effect. Not known of a tree that is not the live host.
    pub reboot_due: bool,
    /// Its files.
    pub files: Vec<PathBuf>,
    /// Those of them that someone changed since.
    pub edited: Vec<PathBuf>,
}
