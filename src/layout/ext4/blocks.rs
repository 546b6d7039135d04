//! The blocks of a file system as they are once its journal was replayed.

use std::collections::HashMap;

use super::super::Error;
use super::super::fields::Block;
use super::super::view::View;

/// What a block of a journal begins with. Where what was journalled begins so itself, the journal has zeros instead.
pub const JOURNAL_MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];

/// Where a block's newest content lies, if that is in the journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Newer {
    /// At this byte.
    pub at: u64,
    /// It begins with [`JOURNAL_MAGIC`], which the journal does not show.
    pub escaped: bool,
}

/// Blocks of metadata, each where it is newest.
pub struct Blocks<'v, 'd> {
    /// All of the file system's place.
    pub view: &'v View<'d>,
    /// The size of a block in bytes.
    pub block_size: u64,
    /// Those that are newer in the journal.
    pub newer: HashMap<u64, Newer>,
}

impl Blocks<'_, '_> {
    /// Reads `count` blocks, of 16 MiB at most.
    pub fn read(&self, first: u64, count: u64) -> Result<Block, Error> {
        let at = first.saturating_mul(self.block_size);
        let read = self.view.read(at, count.saturating_mul(self.block_size))?;
        if self.newer.is_empty() {
            return Ok(read);
        }
        let size = usize::try_from(self.block_size).unwrap_or(usize::MAX);
        let mut bytes = read.bytes().to_vec();
        for (block, content) in (first..).zip(bytes.chunks_mut(size)) {
            if let Some(newer) = self.newer.get(&block) {
                self.view.fill(newer.at, content)?;
                if newer.escaped
                    && let Some(start) = content.first_chunk_mut()
                {
                    *start = JOURNAL_MAGIC;
                }
            }
        }
        Ok(Block::new(bytes, at))
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_block_is_read_where_it_is_newest() {
        let disk = Arc::new((0..8192u32).map(|at| (at / 1024) as u8).collect::<Vec<u8>>());
        let view = View::new(&disk);
        let newer = [(2, Newer { at: 6144, escaped: false }), (3, Newer { at: 7168, escaped: true })];
        let blocks = Blocks { view: &view, block_size: 1024, newer: newer.into_iter().collect() };
        let read = blocks.read(1, 4).unwrap();
        let bytes = read.bytes();
        assert_eq!(bytes[..1024], [1; 1024]);
        assert_eq!(bytes[1024..2048], [6; 1024]);
        assert_eq!(bytes[2048..2052], JOURNAL_MAGIC);
        assert_eq!(bytes[2052..3072], [7; 1020]);
        assert_eq!(bytes[3072..], [4; 1024]);
        assert_eq!(blocks.read(3, 1).unwrap().bytes(), &bytes[2048..3072]);
        assert!(blocks.read(7, 2).is_err());
    }
}
