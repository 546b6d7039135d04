//! Which blocks of a disk have their image in the pass that runs.

use std::collections::BTreeMap;

use super::format::BLOCK;
use crate::units::Extent;

/// A bitmap of blocks, with memory only where there are some: one bit a block, at most 32 MiB for each TiB.
#[derive(Clone, Debug, Default)]
pub(super) struct Saved(BTreeMap<u64, Box<[u64; WORDS]>>);

const WORDS: usize = 512;
const BITS: u64 = 64 * WORDS as u64;

fn blocks(extent: Extent) -> std::ops::Range<u64> {
    extent.offset() / BLOCK..extent.end().div_ceil(BLOCK)
}

impl Saved {
    /// Adds the blocks that the range touches.
    pub(super) fn insert(&mut self, extent: Extent) {
        for block in blocks(extent) {
            let chunk = self.0.entry(block / BITS).or_insert_with(|| Box::new([0; WORDS]));
            let bit = block % BITS;
            chunk[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }

    /// Whether it has the block that begins at this offset.
    pub(super) fn has(&self, offset: u64) -> bool {
        let block = offset / BLOCK;
        let bit = block % BITS;
        self.0.get(&(block / BITS)).is_some_and(|chunk| chunk[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
    }

    /// Whether it has all blocks that the range touches.
    pub(super) fn has_all(&self, extent: Extent) -> bool {
        blocks(extent).all(|block| self.has(block * BLOCK))
    }

    /// The parts of the range, in whole blocks of it, that it does not have, in order and as long as they go.
    pub(super) fn missing(&self, extent: Extent) -> Vec<Extent> {
        let mut parts = Vec::new();
        let mut open: Option<u64> = None;
        for block in blocks(extent) {
            let at = (block * BLOCK).max(extent.offset());
            match (self.has(at), open) {
                (false, None) => open = Some(at),
                (true, Some(from)) => {
                    parts.extend(Extent::new(from, at - from));
                    open = None;
                }
                _ => {}
            }
        }
        parts.extend(open.and_then(|from| Extent::new(from, extent.end() - from)));
        parts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_equals_a_list_of_blocks(ranges in prop::collection::vec((0..40u64, 1..9u64), 0..12), look in (0..40u64, 1..9u64)) {
            // Around the border of two chunks.
            let base = (BITS - 20) * BLOCK;
            let extent = |(block, count): (u64, u64)| Extent::new(base + block * BLOCK, count * BLOCK - 512).unwrap();
            let mut saved = Saved::default();
            let mut model = [false; 60];
            for range in ranges {
                saved.insert(extent(range));
                model[range.0 as usize..(range.0 + range.1) as usize].fill(true);
            }
            let looked = extent(look);
            let mut missing = [false; 60];
            for part in saved.missing(looked) {
                prop_assert!(part.offset() >= looked.offset() && part.end() <= looked.end());
                for block in blocks(part) {
                    missing[(block - base / BLOCK) as usize] = true;
                }
            }
            for block in look.0..look.0 + look.1 {
                prop_assert_eq!(missing[block as usize], !model[block as usize]);
                prop_assert_eq!(saved.has(base + block * BLOCK), model[block as usize]);
            }
            prop_assert_eq!(saved.has_all(looked), saved.missing(looked).is_empty());
        }
    }
}
