//! Ranges that a tracker says have changed: LVM's thin_delta, a hypervisor's changed-block tracking, blktrace.
//!
//! Two forms are read: JSON, an array of objects with `offset` and `length` (others of their members are passed over); or
//! text, `offset length` a line, where empty lines and those that begin with `#` are passed over. Both count bytes. That
//! nothing has changed is said by an empty array: an empty file more likely comes from a tracker that failed.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::IoError;
use crate::units::{ByteLen, Extent};

/// The unit that ranges are widened to.
const UNIT: u64 = 4096;

/// The longest file: some million ranges.
const MOST: u64 = 32 << 20;

/// Ranges of a disk in ascending order, which do not touch.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hints(Vec<Extent>);

/// Why a file tells no ranges.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// It is a directory, a pipe or a device.
    #[error("it is no regular file")]
    NoFile,
    /// It is too long.
    #[error("the file has over {} MiB: give fewer and longer ranges", MOST >> 20)]
    TooLong,
    /// Nothing is in it.
    #[error(
        "it holds no range: if nothing has changed, that is said by `[]`; if something may have, look at what made the file, or \
         send without --changed-ranges"
    )]
    Empty,
    /// It is neither of the two forms.
    #[error("it is no JSON array of objects with `offset` and `length`")]
    Json(#[from] serde_json::Error),
    /// A line that is none.
    #[error("line {line}: give `offset length`, in bytes")]
    Line {
        /// Counted from 1.
        line: usize,
    },
    /// A range that the disk does not have.
    #[error(
        "{place}: {length} bytes at offset {offset} pass the end of the disk, which has {}: give what a tracker tells of this \
         disk, in bytes, or send without --changed-ranges",
        size.0
    )]
    Range {
        /// Where it stands.
        place: Place,
        /// In bytes.
        offset: u64,
        /// In bytes.
        length: u64,
        /// Of the disk.
        size: ByteLen,
    },
}

/// Where a range stands in its file, counted from 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Of a text.
    Line(usize),
    /// Of a JSON array.
    Entry(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Line(number) => write!(f, "line {number}"),
            Place::Entry(number) => write!(f, "entry {number}"),
        }
    }
}

#[derive(Deserialize)]
struct Range {
    offset: u64,
    length: u64,
}

/// One that stands in a JSON array.
struct Entry(Range);

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entry, D::Error> {
        deserializer.deserialize_map(Object).map(Entry)
    }
}

/// Nothing but an object: what is derived takes an array of two numbers as well, and they may be a beginning and an end.
struct Object;

impl<'de> Visitor<'de> for Object {
    type Value = Range;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with `offset` and `length`")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Range, A::Error> {
        Range::deserialize(MapAccessDeserializer::new(map))
    }
}

impl Hints {
    /// Reads a file that tells of a disk of `size` bytes.
    pub fn read(path: &Path, size: ByteLen) -> Result<Hints, Error> {
        let failed = |op| move |error| IoError::new(op, path.display().to_string(), error);
        // Before it is opened: the open of a pipe waits for its writer.
        if !std::fs::metadata(path).map_err(failed("open"))?.is_file() {
            return Err(Error::NoFile);
        }
        let file = File::open(path).map_err(failed("open"))?;
        let mut text = String::new();
        file.take(MOST + 1).read_to_string(&mut text).map_err(failed("read"))?;
        if text.len() as u64 > MOST {
            return Err(Error::TooLong);
        }
        Hints::parse(&text, size)
    }

    /// Reads either form.
    pub fn parse(text: &str, size: ByteLen) -> Result<Hints, Error> {
        let ranges: Vec<(Place, Range)> = match text.trim_start().starts_with('[') {
            true => {
                let ranges: Vec<Entry> = serde_json::from_str(text)?;
                ranges
                    .into_iter()
                    .enumerate()
                    .map(|(index, Entry(range))| (Place::Entry(index + 1), range))
                    .collect()
            }
            false => lines(text)?,
        };
        let mut extents = Vec::with_capacity(ranges.len());
        for (place, Range { offset, length }) in ranges {
            let end = offset.checked_add(length).filter(|end| *end <= size.0);
            let end = end.ok_or(Error::Range { place, offset, length, size })?;
            if length == 0 {
                continue;
            }
            // Widened, and no further than the disk goes.
            let (offset, end) =
                (offset - offset % UNIT, end.checked_next_multiple_of(UNIT).unwrap_or(size.0));
            extents.extend(Extent::new(offset, end.min(size.0) - offset));
        }
        Ok(Hints(merged(extents)))
    }

    /// The ranges.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Extent> {
        self.0.iter().copied()
    }

    /// The parts of a range that no hint covers.
    pub(super) fn missed(&self, extent: Extent) -> Vec<Extent> {
        let first = self.0.partition_point(|hint| hint.end() <= extent.offset());
        let mut missed = Vec::new();
        let mut at = extent.offset();
        for hint in self.0[first..].iter().take_while(|hint| hint.offset() < extent.end()) {
            missed.extend(hint.offset().checked_sub(at).and_then(|len| Extent::new(at, len)));
            at = hint.end();
        }
        missed.extend(extent.end().checked_sub(at).and_then(|len| Extent::new(at, len)));
        missed
    }
}

/// The same ranges, in ascending order and joined where they touch.
pub(super) fn merged(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_by_key(|extent| extent.offset());
    let mut merged: Vec<Extent> = Vec::new();
    for extent in extents {
        match merged.last_mut() {
            Some(last) if extent.offset() <= last.end() => {
                let end = last.end().max(extent.end());
                *last = Extent::new(last.offset(), end - last.offset()).unwrap_or(*last);
            }
            _ => merged.push(extent),
        }
    }
    merged
}

/// The ranges of a text.
fn lines(text: &str) -> Result<Vec<(Place, Range)>, Error> {
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
    let ranges: Vec<_> = lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(line, text)| {
            let mut fields = text.split_ascii_whitespace().map(str::parse);
            match (fields.next(), fields.next(), fields.next()) {
                (Some(Ok(offset)), Some(Ok(length)), None) => {
                    Ok((Place::Line(line), Range { offset, length }))
                }
                _ => Err(Error::Line { line }),
            }
        })
        .collect::<Result<_, _>>()?;
    if ranges.is_empty() { Err(Error::Empty) } else { Ok(ranges) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: ByteLen = ByteLen(12_289);

    fn parse(text: &str) -> Result<Hints, Error> {
        Hints::parse(text, SIZE)
    }

    #[test]
    fn both_forms_say_the_same() {
        let text = parse("# a comment\n\n8192 1\n0 4096\n  4095\t2  \n").unwrap();
        let json = parse(
            r#" [{"offset":8192,"length":1,"data":true},{"offset":0,"length":4096},{"offset":4095,"length":2}]"#,
        );
        assert_eq!(text, json.unwrap());
        assert_eq!(text, Hints(vec![Extent::new(0, 12288).unwrap()]));
        // The last block of a disk may be a part of one.
        assert_eq!(parse("12288 1").unwrap(), Hints(vec![Extent::new(12_288, 1).unwrap()]));
        // That nothing has changed is said, and not taken from a file that has nothing in it.
        for nothing in ["[]", " [ ]\n", "5 0\n", r#"[{"offset":12289,"length":0}]"#] {
            assert_eq!(parse(nothing).unwrap(), Hints::default(), "{nothing}");
        }
        for empty in ["", "\n", "# no ranges\n"] {
            assert!(matches!(parse(empty), Err(Error::Empty)), "{empty}");
        }
    }

    #[test]
    fn what_is_neither_is_told_with_its_place() {
        for (text, line) in [("1 2 3", 1), ("0 1\n-1 5", 2), ("0 1\n\n7", 3), ("0x10 4", 1), ("{}", 1)] {
            let error = parse(text).unwrap_err();
            assert!(matches!(error, Error::Line { line: found } if found == line), "{text}: {error}");
        }
        for other in ["[1]", "[[4096,8192]]", r#"[{"offset":0,"length":1},[0,1]]"#, r#"[{"offset":0}]"#] {
            assert!(matches!(parse(other), Err(Error::Json(_))), "{other}");
        }
        let (line, entry) = (Place::Line(2), Place::Entry(2));
        for (text, at) in [
            ("0 1\n12288 2\n".to_owned(), line),
            ("0 1\n12290 0\n".to_owned(), line),
            (format!("0 1\n{} 2", u64::MAX), line),
            (format!("0 1\n{} 1", u64::MAX - 5), line),
            (r#"[{"offset":0,"length":1},{"offset":0,"length":12290}]"#.to_owned(), entry),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(matches!(error, Error::Range { place, .. } if place == at), "{text}: {error}");
            assert!(error.to_string().starts_with(&format!("{at}: ")), "{error}");
        }
        // The widest there is.
        let all = Extent::new(0, u64::MAX).unwrap();
        let parsed = Hints::parse(&format!("1 {}", u64::MAX - 1), ByteLen(u64::MAX)).unwrap();
        assert_eq!(parsed, Hints(vec![all]));
    }

    proptest! {
        #[test]
        fn what_is_missed_is_what_no_hint_covers(
            ranges in prop::collection::vec((0..60u64, 1..6u64), 0..12), from in 0..60u64, len in 1..20u64,
        ) {
            let mut text: String =
                ranges.iter().map(|(at, len)| format!("{} {}\n", at * UNIT, len * UNIT)).collect();
            if text.is_empty() {
                text += "[]";
            }
            let hints = Hints::parse(&text, ByteLen(90 * UNIT)).unwrap();
            let covered = |block: u64| ranges.iter().any(|(at, len)| (*at..at + len).contains(&block));
            let missed = hints.missed(Extent::new(from * UNIT, len * UNIT).unwrap());
            for block in 0..90 {
                let is = missed.iter().any(|extent| (extent.offset()..extent.end()).contains(&(block * UNIT)));
                prop_assert_eq!(is, (from..from + len).contains(&block) && !covered(block));
            }
        }
    }
}
