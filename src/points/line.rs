//! A line of the points log: `<CRC-32C of the JSON, 8 hexadecimal digits> <JSON>\n`.
//!
//! A pure codec. What it takes keeps every bound below, and [`encode`] refuses what [`parse`] would not take back.
//! There is one spelling of the checksum, so that no flipped byte of a line goes unnoticed.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

use std::collections::HashSet;
use std::hash::Hash;

use serde::{Deserialize, Serialize};

use super::Record;
use crate::checksum::crc32c;

/// The version of the schema that is written, and the only one that is read.
pub const SCHEMA_VERSION: u32 = 2;
/// The longest line, in bytes, with its newline.
pub const MAX_LINE: usize = 4 << 20;
/// The most disks of one point.
pub const MAX_VOLUMES: usize = 4096;
/// The most points that one record drops.
pub const MAX_DROPPED: usize = 65536;
/// The most machines of a point that was narrowed.
pub const MAX_MACHINES: usize = MAX_VOLUMES;
/// The most disks of a machine that was failed over.
pub const MAX_RELEASED: usize = 256;

/// Why bytes are no line, or a record cannot be one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// Longer than any line.
    #[error("a line has at most {MAX_LINE} bytes")]
    TooLong,
    /// Not eight digits, a space, and something behind it.
    #[error("this is no line of a checksum and a record")]
    Form,
    /// The checksum is that of something else.
    #[error("the checksum is {given:08x}, and that of the record is {found:08x}")]
    Checksum {
        /// What the line says.
        given: u32,
        /// What its record has.
        found: u32,
    },
    /// The checksum is right, and the JSON is none of the records.
    #[error("this is none of the records that are known: {0}")]
    Json(String),
    /// The first line of a log of another version.
    #[error("schema_version is {0}")]
    Version(u32),
    /// A list of nothing.
    #[error("{0} are missing")]
    None(&'static str),
    /// A list that is too long.
    #[error("more than {most} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        most: usize,
    },
    /// A list with the same thing twice.
    #[error("two of the {0} are the same")]
    Twice(&'static str),
}

/// The first line of every log.
#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "lowercase", deny_unknown_fields)]
enum Head {
    Log { schema_version: u32 },
}

/// The line of a record, with its newline.
///
/// # Errors
/// Where the record breaks one of the bounds, or has a time that RFC 3339 cannot say.
pub fn encode(record: &Record) -> Result<Vec<u8>, Error> {
    check(record)?;
    line(record)
}

/// The record of a line, which is given without its newline.
///
/// # Errors
/// What is wrong with it.
pub fn parse(line: &[u8]) -> Result<Record, Error> {
    let record = serde_json::from_slice(verified(line)?).map_err(|error| Error::Json(error.to_string()))?;
    check(&record)?;
    Ok(record)
}

/// The first line of a log, with its newline.
pub fn head() -> Vec<u8> {
    // Nothing in it can fail to be encoded; should it nevertheless, an empty head is one that nobody takes.
    line(&Head::Log { schema_version: SCHEMA_VERSION }).unwrap_or_default()
}

/// Checks the first line of a log, which is given without its newline.
///
/// # Errors
/// [`Error::Version`] where it is the head of a log of another version.
pub fn parse_head(line: &[u8]) -> Result<(), Error> {
    /// What is read before the rest is looked at: a later version may have more.
    #[derive(Deserialize)]
    #[serde(tag = "record", rename_all = "lowercase")]
    enum Version {
        Log { schema_version: u32 },
    }
    let json = verified(line)?;
    let none = |error: serde_json::Error| Error::Json(error.to_string());
    let Version::Log { schema_version } = serde_json::from_slice(json).map_err(none)?;
    if schema_version != SCHEMA_VERSION {
        return Err(Error::Version(schema_version));
    }
    serde_json::from_slice::<Head>(json).map_err(none)?;
    Ok(())
}

/// Whether a line that is no line has a sound one within: then its first part is a line whose newline was damaged, and
/// not what a crash leaves of a line that was being written.
pub fn hides_another(line: &[u8]) -> bool {
    const START: &[u8] = b" {\"record\":";
    let space = line.windows(START.len()).rposition(|window| window == START);
    let start = space.and_then(|space| space.checked_sub(8)).filter(|&start| start > 0);
    start.and_then(|start| line.get(start..)).is_some_and(|behind| verified(behind).is_ok())
}

/// Whether these bytes are all of a line but for its newline.
pub fn is_whole(line: &[u8]) -> bool {
    verified(line).is_ok()
}

/// Whether a sector of the line, which begins at this byte of its file, has nothing but zeros: what a crash leaves of a
/// line that was being written. No line has a zero in it, and no single bit makes one of the few bytes that it may have in
/// its first or last sector.
pub fn lacks_a_sector(line: &[u8], at: u64) -> bool {
    const SECTOR: usize = 512;
    let into = usize::try_from(at).unwrap_or(0).checked_rem(SECTOR).unwrap_or(0);
    let (first, rest) = line.split_at(SECTOR.saturating_sub(into).min(line.len()));
    let mut sectors = std::iter::once(first).chain(rest.chunks(SECTOR));
    sectors.any(|sector| !sector.is_empty() && sector.iter().all(|byte| *byte == 0))
}

fn line(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    let json = serde_json::to_vec(value).map_err(|error| Error::Json(error.to_string()))?;
    let mut line = format!("{:08x} ", crc32c(&json)).into_bytes();
    line.extend(json);
    line.push(b'\n');
    if line.len() <= MAX_LINE { Ok(line) } else { Err(Error::TooLong) }
}

/// The JSON of a line whose checksum is right.
fn verified(line: &[u8]) -> Result<&[u8], Error> {
    if line.len() >= MAX_LINE {
        return Err(Error::TooLong);
    }
    let (digits, json) = line.split_first_chunk::<8>().ok_or(Error::Form)?;
    let json = json.strip_prefix(b" ").ok_or(Error::Form)?;
    if !digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(Error::Form);
    }
    let digits = std::str::from_utf8(digits).map_err(|_| Error::Form)?;
    let given = u32::from_str_radix(digits, 16).map_err(|_| Error::Form)?;
    let found = crc32c(json);
    if given == found { Ok(json) } else { Err(Error::Checksum { given, found }) }
}

fn check(record: &Record) -> Result<(), Error> {
    match record {
        Record::Point(point) => {
            list("disks", &point.volumes, MAX_VOLUMES, |volume| (&volume.machine, &volume.disk))?;
            if point.volumes.is_empty() {
                return Err(Error::None("disks"));
            }
            list("target disks", &point.volumes, MAX_VOLUMES, |volume| &volume.id)
        }
        Record::Dropped(dropped) => {
            if dropped.points.is_empty() {
                return Err(Error::None("points"));
            }
            list("points", &dropped.points, MAX_DROPPED, |point| point)
        }
        Record::Narrowed(narrowed) => {
            if narrowed.machines.is_empty() {
                return Err(Error::None("machines"));
            }
            list("machines", &narrowed.machines, MAX_MACHINES, |machine| machine)
        }
        Record::GivenUp(given_up) => {
            if given_up.points.is_empty() {
                return Err(Error::None("points"));
            }
            list("points", &given_up.points, MAX_DROPPED, |point| point)
        }
        Record::Released(released) => list("disks", &released.disks, MAX_RELEASED, |disk| &disk.disk),
        Record::Begun(_) | Record::TakenBack(_) => Ok(()),
    }
}

fn list<'a, T, K: Hash + Eq>(
    what: &'static str,
    list: &'a [T],
    most: usize,
    key: impl Fn(&'a T) -> K,
) -> Result<(), Error> {
    if list.len() > most {
        return Err(Error::TooMany { what, most });
    }
    let mut seen = HashSet::new();
    if list.iter().all(|item| seen.insert(key(item))) { Ok(()) } else { Err(Error::Twice(what)) }
}
