//! The changes that make a plain host a master target: each can be looked at first, applied, and taken back.
//!
//! A [`Change`] only says what it wants: which files with which content, which calls after they changed, and what it
//! found that no file can mend. Checking, planning, applying and reverting are written once, in [`machine`]:
//!
//! - [`Setup::check`] compares, and changes nothing;
//! - [`Setup::plan`] shows a unified diff of each file, and the calls;
//! - [`Setup::apply`] keeps what was there, then writes; interrupted at any step, the next run completes it, and a second
//!   run changes nothing;
//! - [`Setup::revert`] puts back what was there, unless someone changed a file since;
//! - [`Setup::status`] says what was applied when, and whether a reboot is due.
//!
//! All of it works on a directory ([`tree::Root`]): `/`, or the root of an image. A change reads the host through
//! [`Host::root`] only; calls are made on the live host only.
//!
//! To write another change: a file `setup/<change>.rs` with a `const CHANGE: Change`, and a line in [`CHANGES`]. A file
//! that others own too is marked [`File::shared`]; its new content is made from the one that is there, so that making it
//! again changes nothing. Where writing would do harm, [`Error::Refused`] is returned: then nothing of the change is
//! touched, and what was applied before stays. A file that a change does not want any more becomes what it was before it: so
//! a change must want the same after it was applied as before. Where others changed it, and all that is ours in it is a
//! [`File::line`], it stays theirs, and they are told to take the line out.

use std::fmt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::error::IoError;
use crate::protection;

mod automount;
mod crash;
mod devices;
mod gpt_auto;
pub mod host;
mod io_uring;
mod kernel_modules;
mod limits;
mod lvm;
pub mod machine;
mod md;
mod multipath;
mod network;
mod nftables;
mod packages;
pub mod record;
pub mod report;
mod retention;
mod snapshots;
#[cfg(test)]
mod tests;
mod time;
pub mod tree;
mod udev;

pub use host::{Host, Places, Wishes};
pub use machine::Setup;
pub use report::{Applied, Checked, Outcomes, Planned, Reverted, Standing, Status};

/// All changes, in the order in which they are applied.
pub const CHANGES: &[Change] = &[
    packages::CHANGE,
    udev::CHANGE,
    lvm::CHANGE,
    multipath::CHANGE,
    md::CHANGE,
    gpt_auto::CHANGE,
    automount::CHANGE,
    io_uring::CHANGE,
    kernel_modules::CHANGE,
    network::CHANGE,
    crash::CHANGE,
    retention::CHANGE,
    time::CHANGE,
    limits::CHANGE,
    snapshots::CHANGE,
];

/// One change to a host.
#[derive(Clone, Copy)]
pub struct Change {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it ensures, in one line.
    pub about: &'static str,
    /// Whether it depends on which disks are assigned, and so is applied again whenever that changes.
    pub follows_disks: bool,
    /// Looks at the host and says what is wanted.
    pub wanted: fn(&Host) -> Result<Wanted, Error>,
}

/// What a change wants, and what it found.
#[derive(Debug, Default)]
pub struct Wanted {
    /// What it is based on, one fact a line.
    pub evidence: Vec<String>,
    /// What no file of the change says.
    pub findings: Vec<Finding>,
    /// The files.
    pub files: Vec<File>,
    /// What has to be done before the files are written, as long as it is listed here. Live only.
    pub prepare: Vec<Call>,
    /// What makes the host look at the files: called after one of them changed, back to what it was too. Live only; may be
    /// called twice.
    pub calls: Vec<Call>,
    /// Whether all of it is in effect only after a reboot.
    pub reboot: bool,
    /// What stays in effect after it was taken back, and until when.
    pub lasts: Option<String>,
    /// Whether it is not known at present in which files of others a line of ours is wanted: those that have one keep it.
    pub lines_stay: bool,
    /// Devices whose names must mean the same until the calls were made: as long as one is open, its name goes to no other.
    pub pinned: Vec<std::fs::File>,
}

impl Wanted {
    /// A fact.
    pub fn evidence(&mut self, fact: impl Into<String>) {
        self.evidence.push(fact.into());
    }

    /// A finding.
    pub fn find(&mut self, level: Level, what: impl Into<String>, fix: impl Into<String>) {
        self.findings.push(Finding { level, what: what.into(), fix: fix.into() });
    }
}

/// A file that a change wants.
#[derive(Clone, Debug)]
pub struct File {
    /// Where, as the host writes it.
    pub path: PathBuf,
    /// What.
    pub content: Content,
    /// Whether others own it too and may change it, so that its content was made from what is there.
    pub shared: bool,
    /// The line that is ours in a file of others: without it there is nothing of us in there.
    pub line: Option<String>,
}

impl File {
    /// A file of mt-agent's own, readable for all.
    pub fn own(path: impl Into<PathBuf>, text: impl Into<Vec<u8>>) -> File {
        File { path: path.into(), content: Content::Bytes(text.into()), shared: false, line: None }
    }

    /// A file that others own too, with its new content. Where there was none it is readable for all.
    pub fn shared(path: impl Into<PathBuf>, text: impl Into<Vec<u8>>) -> File {
        File { path: path.into(), content: Content::Bytes(text.into()), shared: true, line: None }
    }

    /// The same, with the line that is all of ours in it.
    pub fn line(self, line: impl Into<String>) -> File {
        File { line: Some(line.into()), ..self }
    }

    /// A symbolic link.
    pub fn link(path: impl Into<PathBuf>, target: impl Into<PathBuf>) -> File {
        File { path: path.into(), content: Content::Link(target.into()), shared: false, line: None }
    }
}

/// What a file shall be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// A regular file. It keeps the owner, the permissions and the attributes of the one that is there.
    Bytes(Vec<u8>),
    /// A symbolic link to this.
    Link(PathBuf),
}

/// A program that is called.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Which.
    pub program: String,
    /// With what.
    pub args: Vec<String>,
    /// What for.
    pub why: String,
    /// Called only where this path exists: the socket of a daemon that does not run on every host.
    pub only_if: Option<PathBuf>,
}

impl Call {
    /// A call that is always made.
    pub fn new(program: &str, args: &[&str], why: &str) -> Call {
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        Call { program: program.to_owned(), args, why: why.to_owned(), only_if: None }
    }

    /// The same, made only where a path exists.
    pub fn only_if(self, path: &str) -> Call {
        Call { only_if: Some(path.into()), ..self }
    }

    /// As a process that is not started yet.
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .stdin(Stdio::null());
        command
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.program)?;
        self.args.iter().try_for_each(|arg| {
            match arg.is_empty() || arg.contains([' ', '\'', '"', '\\', '$', '*', '?']) {
                true => write!(f, " '{}'", arg.replace('\'', "'\\''")),
                false => write!(f, " {arg}"),
            }
        })
    }
}

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Pass,
    /// It works, with a drawback.
    Warn,
    /// A master target must not be like that.
    Fail,
}

impl Level {
    /// As it is shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Pass => "pass",
            Level::Warn => "warn",
            Level::Fail => "fail",
        }
    }
}

/// What a change found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What.
    pub what: String,
    /// What to do about it; empty where it is as it should be.
    pub fix: String,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A record cannot be understood.
    #[error("{}: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Which disks are assigned is not known.
    #[error("which disks are assigned is not known")]
    Protection(#[source] Box<protection::Error>),
    /// A rule, or the present state, speaks against it: a line for each reason. Nothing was touched.
    #[error("{}", .0.iter().map(Refusal::to_string).collect::<Vec<_>>().join("\n"))]
    Refused(Vec<Refusal>),
    /// A program failed.
    #[error("`{call}` ({}) failed: {why}; then run the same command again", call.why)]
    Call {
        /// The call.
        call: Box<Call>,
        /// What it said.
        why: String,
    },
}

/// What speaks against a change, and how to go on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what}; {fix}")]
pub struct Refusal {
    /// What.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

impl Error {
    /// A refusal for one reason.
    pub fn refused(what: impl Into<String>, fix: impl Into<String>) -> Error {
        Error::Refused(vec![Refusal { what: what.into(), fix: fix.into() }])
    }

    /// Whether it was refused, rather than failed.
    pub fn is_refusal(&self) -> bool {
        match self {
            Error::Refused(_) => true,
            Error::Protection(error) => error.is_refusal(),
            Error::Io(_) | Error::Corrupt { .. } | Error::Call { .. } => false,
        }
    }
}

/// A step at which the power may fail. The program itself does nothing here; its tests end it here, at each in turn.
#[cfg(not(test))]
fn moment() -> Result<(), Error> {
    Ok(())
}

#[cfg(test)]
use tests::moment;
