//! Holds every byte of a pass against what was written.

use super::format::{self, BLOCK, BLOCK_LEN, Body};
use super::parallel;
use super::recover::{Damage, Error, Pass, Segment};
use crate::checksum::crc32c;
use crate::error::IoError;
use crate::storage::{ReadAt, Shelf};

/// Reads all segments of a pass, and says whether they are as they were written, to the last byte: headers, images, what
/// fills them up to whole blocks, and the zeros behind the last record. Only behind the newest record of a pass that did not
/// end there may be something else, which a power cut tore; [`recover`](super::recover::recover) has judged it.
pub fn verify(pass: &Pass, shelf: &dyn Shelf) -> Result<(), Error> {
    if let Some(damage) = &pass.damage {
        return Err(Error::Corrupt { pass: pass.number, damage: damage.clone() });
    }
    let results = parallel::each(&pass.segments, pass.bytes > ALONE, |place, segment| {
        let may_be_torn = place + 1 == pass.segments.len() && (!pass.ended || segment.end == 0);
        verify_segment(pass.number, segment, may_be_torn, shelf)
    });
    results.into_iter().collect()
}

/// A pass that saved no more bytes is read by one thread.
const ALONE: u64 = 8 << 20;

fn verify_segment(
    pass: u64,
    Segment { name, end, .. }: &Segment,
    may_be_torn: bool,
    shelf: &dyn Shelf,
) -> Result<(), Error> {
    let damaged = |at, what| Error::Corrupt { pass, damage: Damage { segment: name.clone(), at, what } };
    let reader = shelf.open(name)?;
    let mut block = [0; BLOCK_LEN];
    let mut at = 0;
    if *end > 0 {
        reader.read_at(0, &mut block)?;
        format::parse_segment(&block).map_err(|_| damaged(0, "the segment's header is damaged"))?;
        at = BLOCK;
    }
    let mut behind = Vec::new();
    while at < *end {
        reader.read_at(at, &mut block)?;
        let record = format::parse_record(&block).map_err(|_| damaged(at, "a record's header is damaged"))?;
        // What is behind the header, at most what a payload may be.
        behind.resize((record.len() - BLOCK) as usize, 0);
        reader.read_at(at + BLOCK, &mut behind)?;
        let mut rest = behind.as_slice();
        for entry in record.entries().iter().filter(|entry| !entry.zero) {
            let stored = at + record.len() - rest.len() as u64;
            // Parsing has held the sum of these against the length of the payload.
            let (bytes, later) = rest.split_at(entry.stored() as usize);
            rest = later;
            let (image, padding) = bytes.split_at(entry.extent.len() as usize);
            if crc32c(image) != entry.crc {
                return Err(damaged(stored, "the checksum of a before-image does not hold"));
            }
            if padding.iter().any(|byte| *byte != 0) {
                return Err(damaged(stored, "what fills up a before-image is not zero"));
            }
        }
        at += record.len();
        if let Body::Images { .. } = record.body
            && rest != block
        {
            return Err(damaged(at - BLOCK, "the copy of a record's header is damaged"));
        }
    }
    if !may_be_torn && !is_zero(&*reader, at)? {
        return Err(damaged(at, "something stands behind the last record"));
    }
    Ok(())
}

/// Whether there are only zeros from `at` to the end.
fn is_zero(reader: &dyn ReadAt, mut at: u64) -> Result<bool, IoError> {
    const STEP: u64 = 1 << 20;
    let mut chunk = vec![0; STEP as usize];
    while at < reader.size() {
        let chunk = &mut chunk[..(reader.size() - at).min(STEP) as usize];
        reader.read_at(at, chunk)?;
        if chunk.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += chunk.len() as u64;
    }
    Ok(true)
}
