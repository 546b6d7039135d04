//! Byte offsets, byte lengths and ranges as types of their own, so that one is never taken for another.
//!
//! All of them count bytes. Conversions that can fail are named (`checked_…`, `try_…`); nothing wraps. And how a time
//! is shown ([`rfc3339`]).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A length in bytes. Shown in binary units (`10.0 GiB`), serialised as a plain number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteLen(pub u64);

impl ByteLen {
    /// One kibibyte (1024 bytes).
    pub const KIB: u64 = 1 << 10;
    /// One mebibyte.
    pub const MIB: u64 = 1 << 20;
    /// One gibibyte.
    pub const GIB: u64 = 1 << 30;
}

const UNITS: [(&str, u32); 6] =
    [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl fmt::Display for ByteLen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match UNITS.iter().find(|(_, shift)| self.0 >> shift > 0) {
            // An f64 holds 53 bits: plenty for a figure of three digits and a half.
            Some((unit, shift)) => format!("{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64),
            None => format!("{} B", self.0),
        };
        f.pad(&text)
    }
}

impl fmt::Debug for ByteLen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B", self.0)
    }
}

/// Why a text is no size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no size: give a whole number with an optional K, M, G or T (powers of 1024), as in 512M")]
pub struct ParseSizeError(String);

impl FromStr for ByteLen {
    type Err = ParseSizeError;

    /// `4096`, `512K`, `10M`, `1GiB`: a whole number of bytes or of a power of 1024, any case.
    fn from_str(text: &str) -> Result<ByteLen, ParseSizeError> {
        let bad = || ParseSizeError(text.to_owned());
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(bad()),
        };
        let number: u64 = number.parse().map_err(|_| bad())?;
        number.checked_mul(1 << shift).map(ByteLen).ok_or_else(bad)
    }
}

/// A range of bytes on a volume whose end does not overflow: every `Extent` that exists is arithmetically sound.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Extent {
    offset: u64,
    len: u64,
}

impl Extent {
    /// The range `[offset, offset + len)`, or `None` where it is empty or its end passes `u64::MAX`.
    pub fn new(offset: u64, len: u64) -> Option<Extent> {
        if len == 0 {
            return None;
        }
        offset.checked_add(len)?;
        Some(Extent { offset, len })
    }

    /// The first byte of the range.
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// How many bytes it covers; never 0.
    // There is no `is_empty`: an extent never is.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> u64 {
        self.len
    }

    /// The first byte after the range.
    pub fn end(self) -> u64 {
        self.offset + self.len
    }

    /// Whether both ends are multiples of `unit` (a sector size).
    pub fn is_aligned(self, unit: u64) -> bool {
        self.offset.is_multiple_of(unit) && self.len.is_multiple_of(unit)
    }

    /// Whether the two ranges share a byte.
    pub fn overlaps(self, other: Extent) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// The smallest range of whole `unit`s that covers this one, or `None` where that overflows.
    pub fn widened(self, unit: u64) -> Option<Extent> {
        let offset = self.offset - self.offset % unit;
        let end = self.end().checked_next_multiple_of(unit)?;
        Extent::new(offset, end - offset)
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {}..{}", self.offset, self.end())
    }
}

/// A time as people and programs are shown it: RFC 3339, UTC, whole seconds. That has no years beyond 9999; such a time is shown
/// as the number that it is.
pub fn rfc3339(time: OffsetDateTime) -> String {
    let time = time.to_offset(time::UtcOffset::UTC).replace_nanosecond(0).unwrap_or(time);
    time.format(&Rfc3339).unwrap_or_else(|_| time.unix_timestamp().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_in_binary_units_and_parsed_back() {
        assert_eq!(ByteLen(0).to_string(), "0 B");
        assert_eq!(ByteLen(1023).to_string(), "1023 B");
        assert_eq!(ByteLen(10 * ByteLen::GIB).to_string(), "10.0 GiB");
        assert_eq!(ByteLen(u64::MAX).to_string(), "16.0 EiB");
        assert_eq!("10M".parse(), Ok(ByteLen(10 * ByteLen::MIB)));
        assert_eq!("4096".parse(), Ok(ByteLen(4096)));
        assert_eq!("1 gib".parse(), Ok(ByteLen(ByteLen::GIB)));
        for bad in ["", "M", "-1", "1.5G", "1X", "99999999999999999999", "18446744073709551615K"] {
            assert!(bad.parse::<ByteLen>().is_err(), "{bad} was taken for a size");
        }
    }

    #[test]
    fn an_extent_never_overflows_and_is_never_empty() {
        assert_eq!(Extent::new(0, 0), None);
        assert_eq!(Extent::new(u64::MAX, 1), None);
        assert_eq!(Extent::new(u64::MAX - 1, 1).unwrap().end(), u64::MAX);
    }

    #[test]
    fn overlap_and_widening_hold_at_the_edges() {
        let e = |o, l| Extent::new(o, l).unwrap();
        assert!(e(0, 10).overlaps(e(9, 1)));
        assert!(!e(0, 10).overlaps(e(10, 1)));
        assert_eq!(e(4097, 1).widened(4096), Extent::new(4096, 4096));
        assert_eq!(e(u64::MAX - 2, 1).widened(4096), None);
        assert!(e(4096, 512).is_aligned(512));
        assert!(!e(4096, 513).is_aligned(512));
    }

    #[test]
    fn a_time_is_shown_in_utc_and_whole_seconds() {
        let time = time::macros::datetime!(2026-03-01 12:00:00.999 +02:00);
        assert_eq!(rfc3339(time), "2026-03-01T10:00:00Z");
    }
}
