//! Ranges that a tracker says have changed: LVM's thin_delta, a hypervisor's changed-block tracking, blktrace.
//!
//! Two forms are read: JSON, an array of objects with `offset` and `length` (others of their members are passed over); or
//! text, `offset length` a line, where empty lines and those that begin with `#` are passed over. Both count bytes.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use crate::error::IoError;
use crate::units::Extent;

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
    /// It is neither of the two forms.
    #[error("it is no JSON array of objects with `offset` and `length`")]
    Json(#[from] serde_json::Error),
    /// A line that is none.
    #[error("line {line}: give `offset length`, in bytes")]
    Line {
        /// Counted from 1.
        line: usize,
    },
    /// A range that no disk can have.
    #[error("{length} bytes at offset {offset} pass the end of any disk")]
    Range {
        /// In bytes.
        offset: u64,
        /// In bytes.
        length: u64,
    },
}

#[derive(Deserialize)]
struct Range {
    offset: u64,
    length: u64,
}

impl Hints {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Hints, Error> {
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
        Hints::parse(&text)
    }

    /// Reads either form.
    pub fn parse(text: &str) -> Result<Hints, Error> {
        let ranges: Vec<Range> = match text.trim_start().starts_with('[') {
            true => serde_json::from_str(text)?,
            false => text
                .lines()
                .enumerate()
                .map(|(index, line)| (index + 1, line.trim()))
                .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
                .map(|(number, line)| {
                    let mut fields = line.split_ascii_whitespace().map(str::parse);
                    match (fields.next(), fields.next(), fields.next()) {
                        (Some(Ok(offset)), Some(Ok(length)), None) => Ok(Range { offset, length }),
                        _ => Err(Error::Line { line: number }),
                    }
                })
                .collect::<Result<_, _>>()?,
        };
        let mut extents = Vec::with_capacity(ranges.len());
        for Range { offset, length } in ranges.iter().filter(|range| range.length > 0) {
            let extent = Extent::new(*offset, *length).and_then(|extent| extent.widened(UNIT));
            extents.push(extent.ok_or(Error::Range { offset: *offset, length: *length })?);
        }
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
        Ok(Hints(merged))
    }

    /// The ranges, as far as a disk of so many bytes has them.
    pub(super) fn within(&self, size: u64) -> impl Iterator<Item = Extent> {
        self.0.iter().filter_map(move |extent| {
            Extent::new(extent.offset(), extent.end().min(size).checked_sub(extent.offset())?)
        })
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_forms_say_the_same() {
        let text = Hints::parse("# a comment\n\n8192 1\n0 4096\n  4095\t2  \n").unwrap();
        let json = Hints::parse(
            r#" [{"offset":8192,"length":1,"data":true},{"offset":0,"length":4096},{"offset":4095,"length":2}]"#,
        );
        assert_eq!(text, json.unwrap());
        assert_eq!(text, Hints(vec![Extent::new(0, 12288).unwrap()]));
        assert_eq!(text.within(8193).collect::<Vec<_>>(), [Extent::new(0, 8193).unwrap()]);
        assert_eq!(Hints::parse("").unwrap(), Hints::default());
        assert_eq!(Hints::parse("5 0\n").unwrap(), Hints::default());
    }

    #[test]
    fn what_is_neither_is_told_with_its_place() {
        for (text, line) in [("1 2 3", 1), ("0 1\n-1 5", 2), ("0 1\n\n7", 3), ("0x10 4", 1), ("{}", 1)] {
            let error = Hints::parse(text).unwrap_err();
            assert!(matches!(error, Error::Line { line: found } if found == line), "{text}: {error}");
        }
        assert!(matches!(Hints::parse("[1]"), Err(Error::Json(_))));
        assert!(matches!(Hints::parse(&format!("{} 2", u64::MAX)), Err(Error::Range { .. })));
        assert!(matches!(Hints::parse(&format!("{} 1", u64::MAX - 5)), Err(Error::Range { .. })));
    }

    proptest! {
        #[test]
        fn what_is_missed_is_what_no_hint_covers(
            ranges in prop::collection::vec((0..60u64, 1..6u64), 0..12), from in 0..60u64, len in 1..20u64,
        ) {
            let text: String = ranges.iter().map(|(at, len)| format!("{} {}\n", at * UNIT, len * UNIT)).collect();
            let hints = Hints::parse(&text).unwrap();
            let covered = |block: u64| ranges.iter().any(|(at, len)| (*at..at + len).contains(&block));
            let missed = hints.missed(Extent::new(from * UNIT, len * UNIT).unwrap());
            for block in 0..90 {
                let is = missed.iter().any(|extent| (extent.offset()..extent.end()).contains(&(block * UNIT)));
                prop_assert_eq!(is, (from..from + len).contains(&block) && !covered(block));
            }
        }
    }
}
