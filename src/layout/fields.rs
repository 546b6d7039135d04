//! The fields of a structure that was read from a disk, by their offsets in it.

use super::Error;
use crate::bytes;

/// Bytes that were read, and where they lie, for the error that says so.
#[derive(Clone, Debug)]
pub struct Block {
    bytes: Vec<u8>,
    at: u64,
}

impl Block {
    /// Bytes from `at` on.
    pub fn new(bytes: Vec<u8>, at: u64) -> Block {
        Block { bytes, at }
    }

    /// The fields in it.
    pub fn fields(&self) -> Fields<'_> {
        Fields { bytes: &self.bytes, at: self.at }
    }

    /// The bytes themselves.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A structure: its fields are read by their offset from its beginning, and none from beyond its end.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    bytes: &'a [u8],
    at: u64,
}

impl<'a> Fields<'a> {
    /// A structure that lies at byte `at`.
    pub fn new(bytes: &'a [u8], at: u64) -> Fields<'a> {
        Fields { bytes, at }
    }

    /// All of its bytes.
    pub fn all(self) -> &'a [u8] {
        self.bytes
    }

    /// Where it lies.
    pub fn at(self) -> u64 {
        self.at
    }

    /// What is wrong with the field at this offset.
    pub fn corrupt(self, what: &'static str, at: u64) -> Error {
        Error::Corrupt { what, at: self.at.saturating_add(at) }
    }

    fn number<T>(self, at: u64, read: fn(&[u8], usize) -> Option<T>) -> Result<T, Error> {
        let found = usize::try_from(at).ok().and_then(|at| read(self.bytes, at));
        found.ok_or_else(|| self.corrupt(CUT_OFF, at))
    }

    /// One byte.
    pub fn u8(self, at: u64) -> Result<u8, Error> {
        self.number(at, |bytes, at| bytes.get(at).copied())
    }

    /// A little-endian number of two bytes.
    pub fn le16(self, at: u64) -> Result<u16, Error> {
        self.number(at, bytes::le16)
    }

    /// A little-endian number of four bytes.
    pub fn le32(self, at: u64) -> Result<u32, Error> {
        self.number(at, bytes::le32)
    }

    /// A little-endian number of eight bytes.
    pub fn le64(self, at: u64) -> Result<u64, Error> {
        self.number(at, bytes::le64)
    }

    /// A big-endian number of two bytes.
    pub fn be16(self, at: u64) -> Result<u16, Error> {
        self.number(at, bytes::be16)
    }

    /// A big-endian number of four bytes.
    pub fn be32(self, at: u64) -> Result<u32, Error> {
        self.number(at, bytes::be32)
    }

    /// A big-endian number of eight bytes.
    pub fn be64(self, at: u64) -> Result<u64, Error> {
        self.number(at, bytes::be64)
    }

    /// `N` bytes.
    pub fn array<const N: usize>(self, at: u64) -> Result<[u8; N], Error> {
        self.number(at, bytes::array)
    }

    /// `len` bytes.
    pub fn bytes(self, at: u64, len: u64) -> Result<&'a [u8], Error> {
        let range = || {
            let from = usize::try_from(at).ok()?;
            self.bytes.get(from..from.checked_add(usize::try_from(len).ok()?)?)
        };
        range().ok_or_else(|| self.corrupt(CUT_OFF, at))
    }

    /// A structure within this one.
    pub fn part(self, at: u64, len: u64) -> Result<Fields<'a>, Error> {
        Ok(Fields { bytes: self.bytes(at, len)?, at: self.at.saturating_add(at) })
    }

    /// Whether these bytes lie at this offset.
    pub fn has(self, at: u64, magic: &[u8]) -> bool {
        usize::try_from(at).is_ok_and(|at| self.bytes.get(at..).is_some_and(|rest| rest.starts_with(magic)))
    }

    /// The UUID at this offset as `blkid` prints it; `None` where it is all zeros.
    pub fn uuid(self, at: u64) -> Result<Option<String>, Error> {
        let bytes = self.array::<16>(at)?;
        Ok((bytes != [0; 16]).then(|| uuid(bytes)))
    }

    /// The label in these bytes as `blkid` prints it; `None` where there is none.
    pub fn label(self, at: u64, len: u64) -> Result<Option<String>, Error> {
        let bytes = self.bytes(at, len)?;
        let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(text);
        Ok(Some(text.trim_end().to_owned()).filter(|text| !text.is_empty()))
    }
}

const CUT_OFF: &str = "a structure that ends before its fields do";

/// Sixteen bytes as a UUID is written (RFC 9562).
pub fn uuid(bytes: [u8; 16]) -> String {
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut hex = hex.iter().map(String::as_str);
    let groups = [4, 2, 2, 2, 6].map(|len| hex.by_ref().take(len).collect::<String>());
    groups.join("-")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn a_field_beyond_the_end_is_an_error_that_says_where() {
        let block = Block::new(vec![1; 20], 4096);
        let fields = block.fields();
        assert_eq!(fields.le32(16).unwrap(), 0x0101_0101);
        assert_eq!(fields.part(12, 8).unwrap().be64(0).unwrap(), 0x0101_0101_0101_0101);
        let ends = |error: Error, at| {
            assert_eq!(error.to_string(), format!("{CUT_OFF} (at byte {at})"));
        };
        ends(fields.le32(17).unwrap_err(), 4096 + 17);
        ends(fields.u8(20).unwrap_err(), 4096 + 20);
        ends(fields.le64(u64::MAX).unwrap_err(), u64::MAX);
        ends(fields.bytes(1, u64::MAX).unwrap_err(), 4097);
        ends(fields.part(12, 8).unwrap().u8(8).unwrap_err(), 4096 + 20);
        assert!(fields.has(19, &[1]) && !fields.has(19, &[1, 1]) && !fields.has(u64::MAX, &[]));
    }

    #[test]
    fn labels_and_uuids_are_those_of_blkid() {
        let mut bytes = b"my root  \0junk\xff".to_vec();
        bytes.extend(0x10..0x20);
        bytes.extend([0; 16]);
        let fields = Fields::new(&bytes, 0);
        assert_eq!(fields.label(0, 15).unwrap().as_deref(), Some("my root"));
        assert_eq!(fields.label(10, 5).unwrap().as_deref(), Some("junk\u{fffd}"));
        assert_eq!(fields.label(31, 16).unwrap(), None);
        assert_eq!(fields.uuid(15).unwrap().as_deref(), Some("10111213-1415-1617-1819-1a1b1c1d1e1f"));
        assert_eq!(fields.uuid(31).unwrap(), None);
    }
}
