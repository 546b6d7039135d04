//! The text of a protection file: strict when it is parsed, readable when it is written.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use toml::Spanned;

use super::{Assignment, Commit, Fault, Pass, Protection, Source, State};
use crate::disk::id::DiskId;
use crate::name::Name;
use crate::pass::PassId;
use crate::points::PointId;
use crate::units::ByteLen;

/// The version of the schema that is written, and the only one that is read.
pub const SCHEMA_VERSION: u32 = 1;
/// A longer file is no protection, in bytes.
pub const MAX_LEN: u64 = 1 << 20;
/// The most disks of one machine.
pub const MAX_DISKS: usize = 256;
/// How much of a fault's reason is kept, in bytes.
pub const MAX_REASON: usize = 2000;

/// Why a text is no protection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParseError {
    /// A schema of another version.
    #[error("schema_version is {0}")]
    Version(u32),
    /// Anything else.
    #[error("line {line}: {what}")]
    Corrupt {
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        what: String,
    },
}

/// What is read before the rest is looked at: a later schema may have other fields.
#[derive(Deserialize)]
struct Version {
    schema_version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema_version: u32,
    machine: Spanned<Text<Name>>,
    #[serde(with = "time::serde::rfc3339")]
    created: OffsetDateTime,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<Text<Name>>,
    disk: Vec<Spanned<Disk>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Disk {
    name: Spanned<Text<Name>>,
    id: Spanned<Text<DiskId>>,
    size: Spanned<u64>,
    logical_sector: Spanned<u32>,
    overwrite: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    seed: bool,
    #[serde(with = "time::serde::rfc3339")]
    assigned_at: OffsetDateTime,
    state: StateName,
    #[serde(skip_serializing_if = "Option::is_none")]
    released: Option<Text<PointId>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    taken_back: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pass: Option<PassTable>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_commit: Option<CommitTable>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<FaultTable>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<SourceTable>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StateName {
    Empty,
    Receiving,
    Synchronized,
    Faulted,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PassTable {
    id: Text<PassId>,
    #[serde(with = "time::serde::rfc3339")]
    started: OffsetDateTime,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CommitTable {
    pass: Text<PassId>,
    #[serde(with = "time::serde::rfc3339")]
    time: OffsetDateTime,
    bytes: u64,
    point_in_time: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FaultTable {
    #[serde(with = "time::serde::rfc3339")]
    time: OffsetDateTime,
    reason: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceTable {
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Text<DiskId>>,
}

/// A value that is written as text and read with `FromStr`, so that its error gets the line of the value.
#[derive(Clone)]
struct Text<T>(T);

impl<T: fmt::Display> Serialize for Text<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Text<T>, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Text).map_err(serde::de::Error::custom)
    }
}

/// The number of the line, from 1, in which the byte at `offset` is.
pub(super) fn line_of(text: &[u8], offset: usize) -> usize {
    text.iter().take(offset).filter(|&&byte| byte == b'\n').count() + 1
}

/// Reads a protection. Everything that [`Protection`] promises is checked, and what is missing, unknown,
/// repeated or in contradiction is refused with its line.
pub fn parse(bytes: &[u8]) -> Result<Protection, ParseError> {
    let at = |offset: usize, what: String| ParseError::Corrupt { line: line_of(bytes, offset), what };
    let text = std::str::from_utf8(bytes)
        .map_err(|error| at(error.valid_up_to(), "this is not UTF-8".to_owned()))?;
    let in_toml = |error: toml::de::Error| {
        at(error.span().map_or(0, |span| span.start), error.message().trim_end().to_owned())
    };

    let Version { schema_version } = toml::from_str(text).map_err(in_toml)?;
    if schema_version != SCHEMA_VERSION {
        return Err(ParseError::Version(schema_version));
    }
    let file: File = toml::from_str(text).map_err(in_toml)?;
    if file.disk.is_empty() || file.disk.len() > MAX_DISKS {
        let what = format!("a machine has 1 to {MAX_DISKS} disks, and here are {}", file.disk.len());
        return Err(at(file.machine.span().start, what));
    }

    let mut names = HashSet::new();
    let mut ids = HashSet::new();
    let mut disks = Vec::with_capacity(file.disk.len());
    for disk in file.disk {
        let span = disk.span();
        let disk = disk.into_inner();
        if !names.insert(disk.name.get_ref().0.clone()) {
            let what = format!("a second disk is named {}", disk.name.get_ref().0);
            return Err(at(disk.name.span().start, what));
        }
        if !ids.insert(disk.id.get_ref().0.clone()) {
            let what = format!("a second disk has the identity {}", disk.id.get_ref().0);
            return Err(at(disk.id.span().start, what));
        }
        disks.push(disk.check(span).map_err(|(offset, what)| at(offset, what))?);
    }
    let group = file.group.map(|group| group.0);
    Ok(Protection { machine: file.machine.into_inner().0, created: file.created, group, disks })
}

impl Disk {
    /// The assignment, or what is wrong and at which byte.
    fn check(self, table: Range<usize>) -> Result<Assignment, (usize, String)> {
        let sector = *self.logical_sector.get_ref();
        if !(512..=65536).contains(&sector) || !sector.is_power_of_two() {
            let what = format!("{sector} bytes is no size of a sector");
            return Err((self.logical_sector.span().start, what));
        }
        let size = *self.size.get_ref();
        if size == 0 || !size.is_multiple_of(u64::from(sector)) {
            let what = format!("{size} bytes is no size of a disk with sectors of {sector} bytes");
            return Err((self.size.span().start, what));
        }
        let broken = |what: &str| (table.start, what.to_owned());
        let pass = self.pass.map(|pass| Pass { id: pass.id.0, started: pass.started });
        let fault = self.fault.map(|fault| Fault { time: fault.time, reason: fault.reason });
        let last_commit = self.last_commit.map(|commit| Commit {
            pass: commit.pass.0,
            time: commit.time,
            bytes: commit.bytes,
            point_in_time: commit.point_in_time,
        });
        let source =
            self.source.map(|source| Source { size: ByteLen(source.size), id: source.id.map(|id| id.0) });
        let state = match (self.state, pass, fault) {
            (StateName::Empty, None, None) => State::Empty,
            (StateName::Synchronized, None, None) => State::Synchronized,
            (StateName::Receiving, Some(pass), None) => State::Receiving(pass),
            (StateName::Faulted, Some(pass), Some(fault)) => State::Faulted(pass, fault),
            (StateName::Empty | StateName::Synchronized, ..) => {
                return Err(broken("a disk that is empty or synchronized has neither a pass nor a fault"));
            }
            (StateName::Receiving, ..) => {
                return Err(broken("a disk that is receiving has a pass and no fault"));
            }
            (StateName::Faulted, ..) => return Err(broken("a disk that is faulted has a pass and a fault")),
        };
        match (&state, &last_commit) {
            (State::Empty, Some(_)) => Err(broken("a disk that is empty has no last_commit")),
            (State::Empty, None) if source.is_some() => Err(broken("a disk that is empty has no source")),
            (State::Synchronized, None) => Err(broken("a disk that is synchronized has a last_commit")),
            _ => Ok(Assignment {
                name: self.name.into_inner().0,
                id: self.id.into_inner().0,
                size: ByteLen(size),
                logical_sector: sector,
                overwrite: self.overwrite,
                seed: self.seed,
                assigned_at: self.assigned_at,
                state,
                last_commit,
                source,
                released: self.released.map(|point| point.0),
                taken_back: self.taken_back,
            }),
        }
    }
}

/// The text of a protection. Fails only for numbers beyond TOML's (2^63).
pub fn encode(protection: &Protection) -> Result<String, toml::ser::Error> {
    // Where a value stood in a text has no meaning when it is written.
    fn written<T>(value: T) -> Spanned<T> {
        Spanned::new(0..0, value)
    }
    let disk = protection.disks.iter().map(|disk| {
        let (state, pass, fault) = match &disk.state {
            State::Empty => (StateName::Empty, None, None),
            State::Synchronized => (StateName::Synchronized, None, None),
            State::Receiving(pass) => (StateName::Receiving, Some(pass), None),
            State::Faulted(pass, fault) => (StateName::Faulted, Some(pass), Some(fault)),
        };
        written(Disk {
            name: written(Text(disk.name.clone())),
            id: written(Text(disk.id.clone())),
            size: written(disk.size.0),
            logical_sector: written(disk.logical_sector),
            overwrite: disk.overwrite,
            seed: disk.seed,
            assigned_at: disk.assigned_at,
            state,
            released: disk.released.map(Text),
            taken_back: disk.taken_back,
            pass: pass.map(|pass| PassTable { id: Text(pass.id), started: pass.started }),
            last_commit: disk.last_commit.map(|commit| CommitTable {
                pass: Text(commit.pass),
                time: commit.time,
                bytes: commit.bytes,
                point_in_time: commit.point_in_time,
            }),
            fault: fault.map(|fault| FaultTable { time: fault.time, reason: fault.reason.clone() }),
            source: disk
                .source
                .as_ref()
                .map(|source| SourceTable { size: source.size.0, id: source.id.clone().map(Text) }),
        })
    });
    let file = File {
        schema_version: SCHEMA_VERSION,
        machine: written(Text(protection.machine.clone())),
        created: protection.created,
        group: protection.group.clone().map(Text),
        disk: disk.collect(),
    };
    let text = toml::to_string(&file)?;
    Ok(format!(
        "# The target disks of machine {}. mt-agent writes this file: change it with `mt-agent protect`.\n{text}",
        protection.machine
    ))
}
