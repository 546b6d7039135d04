//! The bytes of a segment: a header, then records, each a multiple of 4 KiB.
//!
//! All numbers are little-endian. Every header takes one block of 4096 bytes, whose last four are the CRC-32C of the
//! others.
//!
//! Segment header, the first block:
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 8 | magic | the bytes `MTSEGMNT` |
//! | 8 | 4 | version | 2 |
//! | 12 | 4 | index | which segment of its pass, from 0 |
//! | 16 | 8 | pass | the number of the pass |
//! | 24 | 8 | generation | random: records of another segment that once lay on the same blocks do not have it |
//! | 32 | 8 | sequence | that of the first record |
//! | 40 | 16 | lineage | whose journal it is: a segment that got to another volume's place is told by it |
//!
//! Record header, then its payload:
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 8 | magic | the bytes `MTRECORD` |
//! | 8 | 4 | kind | 1: before-images; 2: the end of the pass |
//! | 12 | 4 | count | how many entries |
//! | 16 | 8 | generation | that of the segment |
//! | 24 | 8 | sequence | the record's number in its pass, over all segments |
//! | 32 | 4 | payload_len | bytes behind this header, a multiple of 4096 |
//! | 64 | 24 × count | entries | offset on the disk (8), length in bytes (4), flags (4; bit 0: all zeros), CRC-32C of the image (4), zero (4) |
//!
//! The payload holds the images of the entries that are not zeros, in their order, each filled up with zeros to a multiple
//! of 4096 bytes. Offsets are multiples of 4096, lengths multiples of 512 and at most 256 KiB: an image is read whole to
//! be verified.
//!
//! The header covers itself and the checksum of each image: of a record that was torn by a power cut, whichever part is
//! missing, one of them does not hold. Behind the payload of before-images the header stands once more, the same bytes: of
//! a record that is damaged one of the two says which blocks it is about, so that the disk can be asked whether they were
//! overwritten, and the record thus whole once. A power cut may leave either without the other.
//!
//! Behind the last record there are zeros to the end of the file.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

use crate::bytes;
use crate::checksum::crc32c;
use crate::pass::Lineage;
use crate::units::Extent;

/// The unit of everything in a segment, and of the ranges that are saved together, in bytes.
pub const BLOCK: u64 = 4096;
/// The same, for sizes in memory.
pub const BLOCK_LEN: usize = 4096;
/// The largest payload of a record, in bytes.
pub const MAX_PAYLOAD: u32 = 8 << 20;
/// The most entries of a record: what fits its header.
pub const MAX_ENTRIES: usize = 167;
/// The longest image, in bytes.
pub const MAX_IMAGE: u64 = 256 << 10;

const SEGMENT_MAGIC: [u8; 8] = *b"MTSEGMNT";
const RECORD_MAGIC: [u8; 8] = *b"MTRECORD";
const VERSION: u32 = 2;
const ENTRIES_AT: usize = 64;
const ENTRY_LEN: usize = 24;
const CRC_AT: usize = BLOCK_LEN - 4;
const ZERO: u32 = 1;
const _: () = assert!(ENTRIES_AT + MAX_ENTRIES * ENTRY_LEN <= CRC_AT);

/// One block of a segment.
pub type Block = [u8; BLOCK_LEN];

/// What a segment says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Whose journal it is part of.
    pub lineage: Lineage,
    /// The number of its pass.
    pub pass: u64,
    /// Which of the pass's segments it is, from 0.
    pub index: u32,
    /// Random.
    pub generation: u64,
    /// The sequence number of its first record.
    pub sequence: u64,
}

/// One before-image: where it belongs, and whether it is stored or known to be zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Where on the disk.
    pub extent: Extent,
    /// All zeros: nothing of it is stored.
    pub zero: bool,
    /// The checksum of the image; 0 for zeros.
    pub crc: u32,
}

impl Entry {
    /// How many bytes of payload it takes.
    pub fn stored(&self) -> u64 {
        if self.zero { 0 } else { self.extent.len().next_multiple_of(BLOCK) }
    }
}

/// The header of a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// That of its segment.
    pub generation: u64,
    /// Its number in the pass.
    pub sequence: u64,
    /// What it is.
    pub body: Body,
}

/// What a record holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// Before-images.
    Images {
        /// At least one and at most [`MAX_ENTRIES`]; they do not overlap.
        entries: Vec<Entry>,
        /// Bytes of payload.
        payload_len: u32,
    },
    /// The pass has all its images: nothing follows.
    End,
}

impl Record {
    /// How many bytes the whole record takes in its segment, with the copy of its header.
    pub fn len(&self) -> u64 {
        match &self.body {
            Body::Images { payload_len, .. } => (2 * BLOCK).saturating_add(u64::from(*payload_len)),
            Body::End => BLOCK,
        }
    }

    /// Its entries.
    pub fn entries(&self) -> &[Entry] {
        match &self.body {
            Body::Images { entries, .. } => entries,
            Body::End => &[],
        }
    }

    /// Whether it takes nothing; it never does.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Why a block is no header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// Something else lies here.
    #[error("there is no header here")]
    Magic,
    /// It was one, or is one in part.
    #[error("the header's checksum does not hold")]
    Checksum,
    /// Written by another version.
    #[error("a segment of version {0}, and this mt-agent knows only {VERSION}")]
    Version(u32),
    /// Sound, and breaks a rule: the field is named.
    #[error("the header's {0} breaks a rule")]
    Field(&'static str),
}

// Out of range is never asked for: the offsets are constants below the block's length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes::le32(bytes, at).unwrap_or(0)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes::le64(bytes, at).unwrap_or(0)
}

fn put(block: &mut Block, at: usize, bytes: &[u8]) {
    for (to, from) in block.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

fn seal(mut block: Block) -> Block {
    let (checked, _) = block.split_at(CRC_AT);
    let crc = crc32c(checked);
    put(&mut block, CRC_AT, &crc.to_le_bytes());
    block
}

fn check(block: &Block, magic: [u8; 8]) -> Result<(), Error> {
    if !block.starts_with(&magic) {
        return Err(Error::Magic);
    }
    let (checked, _) = block.split_at(CRC_AT);
    if u32_at(block, CRC_AT) != crc32c(checked) {
        return Err(Error::Checksum);
    }
    Ok(())
}

/// The header of a segment.
pub fn encode_segment(segment: &Segment) -> Block {
    let mut block = [0; BLOCK_LEN];
    put(&mut block, 0, &SEGMENT_MAGIC);
    put(&mut block, 8, &VERSION.to_le_bytes());
    put(&mut block, 12, &segment.index.to_le_bytes());
    put(&mut block, 16, &segment.pass.to_le_bytes());
    put(&mut block, 24, &segment.generation.to_le_bytes());
    put(&mut block, 32, &segment.sequence.to_le_bytes());
    put(&mut block, 40, &segment.lineage.0.to_le_bytes());
    seal(block)
}

/// Reads the header of a segment.
pub fn parse_segment(block: &Block) -> Result<Segment, Error> {
    check(block, SEGMENT_MAGIC)?;
    let version = u32_at(block, 8);
    if version != VERSION {
        return Err(Error::Version(version));
    }
    Ok(Segment {
        lineage: Lineage(u128::from_le_bytes(bytes::array(block, 40).unwrap_or_default())),
        pass: u64_at(block, 16),
        index: u32_at(block, 12),
        generation: u64_at(block, 24),
        sequence: u64_at(block, 32),
    })
}

/// The header of a record.
///
/// # Errors
/// [`Error::Field`] where there are too many entries, or one or the payload is too long.
pub fn encode_record(record: &Record) -> Result<Block, Error> {
    let mut block = [0; BLOCK_LEN];
    put(&mut block, 0, &RECORD_MAGIC);
    put(&mut block, 16, &record.generation.to_le_bytes());
    put(&mut block, 24, &record.sequence.to_le_bytes());
    let (kind, count) = match &record.body {
        Body::End => (2u32, 0),
        Body::Images { entries, payload_len } => {
            put(&mut block, 32, &payload_len.to_le_bytes());
            let places = (ENTRIES_AT..).step_by(ENTRY_LEN);
            for (entry, at) in entries.iter().zip(places) {
                let mut bytes = [0; ENTRY_LEN];
                let len = u32::try_from(entry.extent.len()).map_err(|_| Error::Field("length"))?;
                let flags = if entry.zero { ZERO } else { 0 };
                let fields = entry.extent.offset().to_le_bytes().into_iter();
                let fields =
                    fields.chain(len.to_le_bytes()).chain(flags.to_le_bytes()).chain(entry.crc.to_le_bytes());
                bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
                put(&mut block, at, &bytes);
            }
            (1, entries.len())
        }
    };
    let count = u32::try_from(count).map_err(|_| Error::Field("count"))?;
    put(&mut block, 8, &kind.to_le_bytes());
    put(&mut block, 12, &count.to_le_bytes());
    let block = seal(block);
    // The rules are in one place.
    parse_record(&block).map(|_| block)
}

/// Reads the header of a record. Its payload is not looked at; its length is bounded.
pub fn parse_record(block: &Block) -> Result<Record, Error> {
    check(block, RECORD_MAGIC)?;
    let (kind, count) = (u32_at(block, 8), u32_at(block, 12));
    let payload_len = u32_at(block, 32);
    let body = match kind {
        1 => {
            let count = usize::try_from(count).ok().filter(|count| (1..=MAX_ENTRIES).contains(count));
            let count = count.ok_or(Error::Field("count"))?;
            let places = (ENTRIES_AT..).step_by(ENTRY_LEN).take(count);
            let entries: Vec<Entry> = places.map(|at| entry_at(block, at)).collect::<Result<_, _>>()?;
            let stored = entries.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.stored()));
            if payload_len > MAX_PAYLOAD || stored != u64::from(payload_len) {
                return Err(Error::Field("payload_len"));
            }
            Body::Images { entries, payload_len }
        }
        2 if (count, payload_len) == (0, 0) => Body::End,
        2 => return Err(Error::Field("count")),
        _ => return Err(Error::Field("kind")),
    };
    Ok(Record { generation: u64_at(block, 16), sequence: u64_at(block, 24), body })
}

fn entry_at(block: &Block, at: usize) -> Result<Entry, Error> {
    let (offset, rest) = (u64_at(block, at), block.get(at..).unwrap_or_default());
    let (len, flags, crc) = (u64::from(u32_at(rest, 8)), u32_at(rest, 12), u32_at(rest, 16));
    let extent = Extent::new(offset, len).ok_or(Error::Field("length"))?;
    if !offset.is_multiple_of(BLOCK) || !len.is_multiple_of(512) {
        return Err(Error::Field("offset"));
    }
    if len > MAX_IMAGE {
        return Err(Error::Field("length"));
    }
    match flags {
        0 => Ok(Entry { extent, zero: false, crc }),
        ZERO => Ok(Entry { extent, zero: true, crc }),
        _ => Err(Error::Field("flags")),
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn images(entries: Vec<Entry>) -> Record {
        let payload_len = entries.iter().map(Entry::stored).sum::<u64>() as u32;
        Record { generation: 7, sequence: 9, body: Body::Images { entries, payload_len } }
    }

    fn entry(offset: u64, len: u64, zero: bool) -> Entry {
        Entry { extent: Extent::new(offset, len).unwrap(), zero, crc: 5 }
    }

    /// The block with some bytes changed and sealed again.
    fn patched(block: &Block, at: usize, bytes: &[u8]) -> Block {
        let mut block = *block;
        put(&mut block, at, bytes);
        seal(block)
    }

    #[test]
    fn every_rule_has_its_error() {
        let good = encode_record(&images(vec![entry(4096, 8192, false), entry(1 << 40, 512, true)])).unwrap();
        let parse = |at, bytes: &[u8]| parse_record(&patched(&good, at, bytes)).unwrap_err();
        assert_eq!(parse(0, b"x"), Error::Magic);
        assert_eq!(parse(8, &[3]), Error::Field("kind"));
        assert_eq!(parse(8, &[2]), Error::Field("count"));
        assert_eq!(parse(12, &0u32.to_le_bytes()), Error::Field("count"));
        assert_eq!(parse(12, &168u32.to_le_bytes()), Error::Field("count"));
        assert_eq!(parse(12, &u32::MAX.to_le_bytes()), Error::Field("count"));
        assert_eq!(parse(32, &4096u32.to_le_bytes()), Error::Field("payload_len"));
        assert_eq!(parse(64, &[1]), Error::Field("offset"));
        assert_eq!(parse(64, &u64::MAX.to_le_bytes()), Error::Field("length"));
        assert_eq!(parse(72, &0u32.to_le_bytes()), Error::Field("length"));
        assert_eq!(parse(72, &513u32.to_le_bytes()), Error::Field("offset"));
        assert_eq!(parse(76, &2u32.to_le_bytes()), Error::Field("flags"));
        let mut torn = good;
        torn[100] ^= 1;
        assert_eq!(parse_record(&torn), Err(Error::Checksum));
    }

    #[test]
    fn segments_come_back_and_other_versions_are_named() {
        let segment = Segment {
            lineage: Lineage(u128::MAX - 7),
            pass: 3,
            index: 2,
            generation: u64::MAX,
            sequence: 11,
        };
        let block = encode_segment(&segment);
        assert_eq!(parse_segment(&block), Ok(segment));
        assert_eq!(parse_segment(&patched(&block, 8, &[3])), Err(Error::Version(3)));
        assert_eq!(parse_segment(&[0; BLOCK_LEN]), Err(Error::Magic));
        assert_eq!(parse_record(&block), Err(Error::Magic));
    }

    #[test]
    fn what_does_not_fit_a_record_is_not_encoded() {
        let many = (0..=MAX_ENTRIES as u64).map(|n| entry(n * BLOCK, BLOCK, true)).collect();
        assert_eq!(encode_record(&images(many)), Err(Error::Field("count")));
        let long = images((0..40).map(|n| entry(n * MAX_IMAGE, MAX_IMAGE, false)).collect());
        assert_eq!(encode_record(&long), Err(Error::Field("payload_len")));
        assert_eq!(encode_record(&images(vec![entry(0, 1 << 32, true)])), Err(Error::Field("length")));
        assert_eq!(
            encode_record(&images(vec![entry(0, MAX_IMAGE + 512, true)])),
            Err(Error::Field("length"))
        );
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        (0..1u64 << 40, 1..64u64, any::<bool>())
            .prop_map(|(block, sectors, zero)| entry(block * BLOCK, sectors * 512, zero))
    }

    proptest! {
        #[test]
        fn records_come_back_and_any_flipped_bit_is_found(
            entries in prop::collection::vec(any_entry(), 1..MAX_ENTRIES),
            bit in 0..BLOCK_LEN * 8,
        ) {
            let record = images(entries);
            let block = encode_record(&record).unwrap();
            prop_assert_eq!(parse_record(&block).unwrap(), record);
            let mut damaged = block;
            damaged[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(parse_record(&damaged).is_err());
        }

        #[test]
        fn no_sealed_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 300), at in 0..200usize) {
            bytes[..8].copy_from_slice(&RECORD_MAGIC);
            bytes[8] %= 4;
            bytes[9..12].fill(0);
            bytes[12] %= 20;
            bytes[13..16].fill(0);
            let mut block = [0; BLOCK_LEN];
            block[..bytes.len()].copy_from_slice(&bytes);
            block[at] = 0;
            let _ = parse_record(&seal(block)).is_ok();
            let _ = parse_segment(&seal(block)).is_ok();
        }
    }
}
