//! What a volume's thread needs to know in order to append to its journal. It does no I/O of its own.

use super::format::{
    self, BLOCK, BLOCK_LEN, Body, Entry, MAX_ENTRIES, MAX_IMAGE, MAX_PAYLOAD, Record, Segment,
};
use super::recover::Pass;
use super::saved::Saved;
use crate::checksum::crc32c;
use crate::pass::Lineage;
use crate::units::Extent;

/// The first segment of a pass has this length, in bytes; each further one about as much as was written before it, up to
/// the limit. A small pass does not reserve much, and a large one has few files.
const SHORTEST: u64 = 1 << 20;

/// The pass that is being written.
#[derive(Debug)]
pub struct Writer {
    lineage: Lineage,
    pass: u64,
    shortest: u64,
    longest: u64,
    saved: Saved,
    /// The number of the next record.
    sequence: u64,
    /// The number of the next segment.
    index: u32,
    open: Option<Open>,
    /// Bytes that all records of the pass take.
    bytes: u64,
}

#[derive(Debug)]
struct Open {
    generation: u64,
    len: u64,
    /// Where the next record goes.
    at: u64,
}

/// A segment that has to be created before the next record is written.
#[derive(Debug)]
pub struct NewSegment {
    /// Its file name.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
    /// Its first block.
    pub header: format::Block,
}

/// A buffer of this many bytes takes any record whose images come to so many bytes, each filled up to whole blocks.
pub const fn record_len(images: usize) -> usize {
    2 * BLOCK_LEN + images
}

impl Writer {
    /// For a new pass of the volume with this lineage. `longest` is the length of its longest segments in bytes.
    pub fn new(lineage: Lineage, pass: u64, longest: u64) -> Writer {
        let (shortest, saved) = (SHORTEST.min(longest), Saved::default());
        Writer { lineage, pass, shortest, longest, saved, sequence: 0, index: 0, open: None, bytes: 0 }
    }

    /// For a pass that was interrupted: what it saved stays saved. See [`go_on`](super::recover::go_on).
    pub(super) fn go_on(lineage: Lineage, pass: &Pass, longest: u64) -> Writer {
        let mut writer = Writer::new(lineage, pass.number, longest);
        pass.images.iter().for_each(|image| writer.saved.insert(image.extent()));
        (writer.sequence, writer.index, writer.bytes) = (pass.next_sequence, pass.next_index, pass.bytes);
        writer
    }

    /// The number of its pass.
    pub fn pass(&self) -> u64 {
        self.pass
    }

    /// How many bytes its records take so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether all blocks that the range touches have their image.
    pub fn has_all(&self, extent: Extent) -> bool {
        self.saved.has_all(extent)
    }

    /// The parts of the range that have no image yet, each no longer than an image can be.
    pub fn missing(&self, extent: Extent) -> Vec<Extent> {
        let parts = self.saved.missing(extent).into_iter();
        parts.flat_map(|part| pieces(part, MAX_IMAGE)).collect()
    }

    /// Puts a record of the first of these images, as many as it takes, into `buffer` ([`record_len`] tells its size),
    /// and says how many that were and how many bytes the record has. [`place`](Self::place) says where it goes.
    pub fn compose(&self, images: &[(Extent, &[u8])], buffer: &mut [u8]) -> (usize, usize) {
        let mut entries = Vec::new();
        let mut at = BLOCK_LEN;
        for (extent, bytes) in images.iter().take(MAX_ENTRIES) {
            let zero = bytes.iter().all(|byte| *byte == 0);
            let crc = if zero { 0 } else { crc32c(bytes) };
            let entry = Entry { extent: *extent, zero, crc };
            let end = at + entry.stored() as usize;
            if end + BLOCK_LEN > buffer.len() || end - BLOCK_LEN > MAX_PAYLOAD as usize {
                break;
            }
            if !zero {
                let (image, padding) = buffer[at..end].split_at_mut(bytes.len());
                image.copy_from_slice(bytes);
                padding.fill(0);
            }
            at = end;
            entries.push(entry);
        }
        let taken = entries.len();
        let payload_len = (at - BLOCK_LEN) as u32;
        // Its generation is that of the segment, which is known once there is a place.
        self.head(Body::Images { entries, payload_len }, &mut buffer[..BLOCK_LEN]);
        buffer.copy_within(..BLOCK_LEN, at);
        (taken, at + BLOCK_LEN)
    }

    /// Puts the record that ends the pass into `buffer`, one block.
    pub fn compose_end(&self, buffer: &mut [u8]) {
        self.head(Body::End, buffer);
    }

    fn head(&self, body: Body, block: &mut [u8]) {
        let generation = self.open.as_ref().map_or(0, |open| open.generation);
        let record = Record { generation, sequence: self.sequence, body };
        match format::encode_record(&record) {
            Ok(header) => block.copy_from_slice(&header),
            Err(error) => unreachable!("a record is composed by the rules of the format: {error}"),
        }
    }

    /// The segment that must be created before a record of `len` bytes is composed, if the open one has no room for it.
    /// `generation` is random.
    pub fn segment_for(&self, len: u64, generation: u64) -> Option<NewSegment> {
        if self.open.as_ref().is_some_and(|open| open.at + len <= open.len) {
            return None;
        }
        // By what was written, and not by the index: a pass that is interrupted again and again reserves no more for it.
        let doubled = self.bytes.next_power_of_two().clamp(self.shortest, self.longest);
        // The end of a pass that changed nothing more takes no more room than it needs.
        let segment_len = if len == BLOCK { 2 * BLOCK } else { doubled.max(BLOCK + len) };
        let (lineage, pass, index, sequence) = (self.lineage, self.pass, self.index, self.sequence);
        let segment = Segment { lineage, pass, index, generation, sequence };
        let header = format::encode_segment(&segment);
        Some(NewSegment { name: segment_name(self.pass, self.index), len: segment_len, header })
    }

    /// The segment was created, with this generation: records go there from now on.
    pub fn created(&mut self, segment: &NewSegment, generation: u64) {
        self.index += 1;
        self.open = Some(Open { generation, len: segment.len, at: BLOCK });
    }

    /// Where the next record goes.
    ///
    /// # Panics
    /// Without a segment.
    pub fn place(&self) -> u64 {
        self.open.as_ref().map_or_else(|| unreachable!("a segment was created"), |open| open.at)
    }

    /// The record is durable: its images count as saved.
    pub fn appended(&mut self, len: u64, images: &[(Extent, &[u8])]) {
        images.iter().for_each(|(extent, _)| self.saved.insert(*extent));
        self.sequence += 1;
        self.bytes += len;
        if let Some(open) = &mut self.open {
            open.at += len;
        }
    }
}

/// The range in pieces of at most `longest` bytes.
pub fn pieces(extent: Extent, longest: u64) -> impl Iterator<Item = Extent> {
    let mut at = extent.offset();
    std::iter::from_fn(move || {
        let piece = Extent::new(at, (extent.end() - at).min(longest))?;
        at = piece.end();
        Some(piece)
    })
}

/// The file name of a segment.
pub fn segment_name(pass: u64, index: u32) -> String {
    format!("{pass:016x}-{index:08x}.seg")
}

/// The name that the first segment of a pass gets when the pass is let go of.
pub fn gone_name(pass: u64) -> String {
    format!("{pass:016x}.gone")
}

/// The pass that is let go of, by such a name.
pub fn parse_gone(name: &str) -> Option<u64> {
    let pass = u64::from_str_radix(name.strip_suffix(".gone")?, 16).ok()?;
    (gone_name(pass) == name).then_some(pass)
}

/// The pass and index of a segment by its file name; `None` for a file that is none.
pub fn parse_name(name: &str) -> Option<(u64, u32)> {
    let (pass, index) = name.strip_suffix(".seg")?.split_once('-')?;
    let (pass, index) = (u64::from_str_radix(pass, 16).ok()?, u32::from_str_radix(index, 16).ok()?);
    (segment_name(pass, index) == name).then_some((pass, index))
}
