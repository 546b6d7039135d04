//! Which bytes of the sources are free. They need not be read: they count as zeros, and so the target's free space is
//! zeros too, whatever it held, and two passes agree.
//!
//! What is free stands on the disks ([`crate::layout`]), and that is only worth something while nobody writes to them. So
//! it is looked for once the machine stands still, and not on a source that does not.

use std::cell::RefCell;
use std::sync::Arc;

use super::source::{Error, Source};
use crate::error::{IoError, chain};
use crate::layout::ranges::{Ranges, between};
use crate::layout::tree::{self, Disk};
use crate::storage::ReadAt;
use crate::storage::ahead::CHUNK;
use crate::sys::aligned::{Arena, Buffer, PAGE};
use crate::units::Extent;

/// A shorter free range between others is read: that takes less time than another request.
const SHORTEST: u64 = 128 << 10;

/// The free bytes of a source, in whole pages.
#[derive(Debug, Default)]
pub(super) struct Free(Ranges);

impl Free {
    fn new(ranges: &Ranges) -> Free {
        let page = PAGE as u64;
        let whole = |range: Extent| {
            between(range.offset().checked_next_multiple_of(page)?, range.end() - range.end() % page)
        };
        Free(ranges.iter().filter_map(whole).collect())
    }

    /// Up to where everything from `at` on is free.
    pub(super) fn end_from(&self, at: u64) -> Option<u64> {
        let rest = Extent::new(at, u64::MAX - at)?;
        self.0.within(rest).next().filter(|range| range.offset() == at).map(Extent::end)
    }

    /// The first free range behind `at` for which a chunk that is read there should end before it.
    pub(super) fn next(&self, at: u64) -> Option<Extent> {
        self.0.within(Extent::new(at, CHUNK)?).find(|range| range.len() >= SHORTEST)
    }

    /// Makes zeros of what is free in `bytes`, which lie at `at`.
    pub(super) fn clear(&self, at: u64, bytes: &mut [u8]) {
        let window = Extent::new(at, bytes.len() as u64);
        for range in window.into_iter().flat_map(|window| self.0.within(window)) {
            bytes[(range.offset() - at) as usize..(range.end() - at) as usize].fill(0);
        }
    }

    /// What of a range is not free.
    pub(super) fn outside(&self, extent: Extent) -> Vec<Extent> {
        let mut found = Vec::new();
        let mut at = extent.offset();
        for range in self.0.within(extent) {
            found.extend(between(at, range.offset()));
            at = range.end();
        }
        found.extend(between(at, extent.end()));
        found
    }
}

/// What is known of a source's free space: for the report.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Space {
    /// How many bytes are proven free, where that was looked for.
    pub free: Option<u64>,
    /// How many of them were not read and count as zeros.
    pub skipped: u64,
    /// Why others are taken as used, without a look at which of them are: one sentence for each place.
    pub reasons: Vec<String>,
}

impl Space {
    /// All of it is used, for this reason.
    pub(super) fn unknown(why: &str) -> Space {
        Space { reasons: vec![why.to_owned()], ..Space::default() }
    }
}

/// Looks at sources for what of them is free. One that has a reason not to be looked at is used, all of it, and nothing that
/// lies partly on it is known either.
pub(super) fn find(sources: &[(Arc<Source>, Option<String>)]) -> Vec<(Free, Space)> {
    let mut found: Vec<(Free, Space)> = sources
        .iter()
        .map(|(_, why)| (Free::default(), Space::unknown(why.as_deref().unwrap_or_default())))
        .collect();
    let mut readers = Vec::new();
    for (index, (source, why)) in sources.iter().enumerate() {
        match (why, Metadata::new(source)) {
            (Some(_), _) => {}
            (None, Ok(reader)) => readers.push((index, reader)),
            (None, Err(error)) => found[index].1 = Space::unknown(&chain(&error)),
        }
    }
    let disks: Vec<Disk<'_>> = readers
        .iter()
        .map(|(_, reader)| Disk { reader, sector: reader.source.known_sector().map(u64::from) })
        .collect();
    // All of them together: a volume group may lie on several.
    let layout = tree::read(&disks);
    for (place, (index, reader)) in readers.iter().enumerate() {
        let Some(used) = layout.used(place) else { continue };
        let all = reader.source.extent();
        let free = Free::new(&used.complement(all));
        let space = Space {
            free: Some(all.len().saturating_sub(used.bytes())),
            skipped: free.0.bytes(),
            reasons: layout.reasons(place),
        };
        found[*index] = (free, space);
    }
    found
}

/// How much is read of a source at once where its metadata is read in order, and where it is not.
const IN_ORDER: u64 = 256 << 10;
const ELSEWHERE: u64 = 16 << 10;

/// Reads a source as it will be read when it is sent, which is around the page cache: a file system writes past that of the
/// disk that its partition lies on.
struct Metadata<'a> {
    source: &'a Source,
    /// What was read last, and where.
    window: RefCell<(u64, Buffer)>,
}

impl<'a> Metadata<'a> {
    fn new(source: &'a Source) -> Result<Metadata<'a>, Error> {
        let arena = Arena::new(IN_ORDER as usize).map_err(|error| IoError::new("map", "memory", error))?;
        let mut buffer = arena.alloc_blocking(IN_ORDER as usize);
        buffer.set_len(0);
        Ok(Metadata { source, window: RefCell::new((0, buffer)) })
    }
}

impl ReadAt for Metadata<'_> {
    fn size(&self) -> u64 {
        self.source.size().0
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let mut window = self.window.borrow_mut();
        let (start, buffer) = &mut *window;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let behind = *start + buffer.len() as u64;
            if !(*start..behind).contains(&at) {
                let page = PAGE as u64;
                let from = at - at % page;
                let len = match at == behind {
                    true => IN_ORDER,
                    false => {
                        (at - from + rest.len() as u64).next_multiple_of(page).clamp(ELSEWHERE, IN_ORDER)
                    }
                };
                // Nothing is there before it was read.
                buffer.set_len(0);
                let size = self.size();
                let len = len.min(size.saturating_sub(from));
                if from + len <= at {
                    let end = std::io::ErrorKind::UnexpectedEof;
                    return Err(IoError::at("read", self.source.path().display().to_string(), at, end));
                }
                buffer.set_len(len as usize);
                if let Err(error) = self.source.read_uncached(from, buffer) {
                    buffer.set_len(0);
                    return Err(error);
                }
                *start = from;
            }
            let within = (at - *start) as usize;
            let count = (buffer.len() - within).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&buffer[within..within + count]);
            at += count as u64;
            rest = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    fn extent(from: u64, to: u64) -> Extent {
        between(from, to).unwrap()
    }

    #[test]
    fn only_whole_pages_are_free() {
        let ranges: Ranges =
            [extent(1, 4096), extent(5000, 20_000), extent(40_960, 49_152)].into_iter().collect();
        let free = Free::new(&ranges);
        assert_eq!(free.0.iter().collect::<Vec<_>>(), [extent(8192, 16_384), extent(40_960, 49_152)]);
        let mut bytes = vec![7; 12_000];
        free.clear(10_000, &mut bytes);
        assert!(bytes[..6384].iter().all(|byte| *byte == 0) && bytes[6384..].iter().all(|byte| *byte == 7));
        assert_eq!(free.outside(extent(0, 45_000)), [extent(0, 8192), extent(16_384, 40_960)],);
        assert_eq!(free.outside(extent(9000, 9001)), []);
        assert_eq!(
            (free.end_from(8191), free.end_from(8192), free.end_from(16_384)),
            (None, Some(16_384), None)
        );
    }

    #[test]
    fn a_short_free_range_is_read_with_what_lies_around_it() {
        let ranges: Ranges =
            [extent(1 << 20, (1 << 20) + SHORTEST - 4096), extent(3 << 19, 4 << 20)].into_iter().collect();
        let free = Free::new(&ranges);
        assert_eq!(free.next(4096), None);
        assert_eq!(free.next(1 << 20), Some(extent(3 << 19, 2 << 20)));
    }

    #[test]
    fn metadata_is_the_bytes_of_the_source_wherever_they_are_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..700_001u32).map(|at| (at * 7 + at / 4096) as u8).collect();
        file.write_all(&bytes).unwrap();
        let source = Source::open(file.path()).unwrap();
        let metadata = Metadata::new(&source).unwrap();
        let size = bytes.len() as u64;
        for (at, len) in
            [(0, 512), (512, 512), (16_384, 300_000), (5, 1), (4095, 2), (690_000, 10_001), (0, 700_001)]
        {
            let mut found = vec![0; len];
            metadata.read_at(at, &mut found).unwrap();
            assert!(found == bytes[at as usize..][..len], "{at} {len}");
        }
        assert!(metadata.read_at(size, &mut [0]).is_err());
        assert!(metadata.read_at(size - 1, &mut [0; 2]).is_err());
        // A read that fails leaves nothing behind that would be taken for what was read.
        File::options().write(true).open(file.path()).unwrap().set_len(8192).unwrap();
        assert!(metadata.read_at(300_000, &mut [0; 4096]).is_err());
        assert!(metadata.read_at(300_000, &mut [0; 4096]).is_err());
    }
}
