//! The journal's inode, and where the blocks of the journal lie: in an extent tree, or behind indirect blocks as in ext2
//! and ext3.
//!
//! | at | |
//! |---|---|
//! | 0x00 | kind and mode |
//! | 0x04, 0x6c | size in bytes, low and high half |
//! | 0x20 | flags: 0x80000 is an extent tree |
//! | 0x28 | 60 bytes: the tree's root, or 15 block numbers |
//! | 0x64 | generation, a part of checksums |
//! | 0x7c, 0x82 | checksum, 16 bits each |
//! | 0x80 | how much of the inode is used beyond 128 bytes |

use super::super::Error;
use super::super::fields::Fields;
use super::blocks::Blocks;
use super::groups;
use super::superblock::{Checks, Geometry};
use crate::checksum::crc32c_raw;

/// The inode of the journal.
pub const JOURNAL: u32 = 8;

/// A journal of more blocks is not followed: `mke2fs` makes none.
const MAX_BLOCKS: u64 = 10_240_000;
/// A journal in more pieces is not followed.
const MAX_RUNS: usize = 1 << 16;
/// An extent tree of more nodes is not followed, nor a deeper one.
const MAX_NODES: u32 = 1 << 16;
const MAX_DEPTH: u16 = 5;

const EXTENTS: u32 = 0x8_0000;

/// Some blocks of the journal that lie one behind the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The first, counted from the journal's beginning.
    pub logical: u64,
    /// Where that lies.
    pub block: u64,
    /// How many.
    pub count: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.logical.saturating_add(self.count)
    }
}

/// Where all blocks of the journal lie, from its first one on.
pub fn journal(blocks: &Blocks<'_, '_>, geometry: &Geometry) -> Result<Vec<Run>, Error> {
    let table = geometry.byte(groups::first_inode_table(blocks, geometry)?);
    let at = table.saturating_add(u64::from(JOURNAL).saturating_sub(1).saturating_mul(geometry.inode_size));
    let read = blocks.view.read(at, geometry.inode_size)?;
    let inode = read.fields();
    let seed = verify(inode, geometry)?;
    if inode.le16(0)? & 0xf000 != 0x8000 {
        return Err(inode.corrupt("a journal that is no file", 0));
    }
    let size = u64::from(inode.le32(4)?) | (u64::from(inode.le32(0x6c)?) << 32);
    let count = size.checked_div(geometry.block_size).unwrap_or(0);
    if count > MAX_BLOCKS {
        return Err(Error::unsupported(format!("a journal of {count} blocks")));
    }
    let root = inode.part(0x28, 60)?;
    let mut runs = Runs { all: Vec::new(), geometry, count };
    if inode.le32(0x20)? & EXTENTS != 0 {
        let depth = root.le16(6)?;
        if depth > MAX_DEPTH {
            return Err(root.corrupt("an extent tree that is too deep", 6));
        }
        let mut tree = Tree { blocks, geometry, seed, nodes: 0, runs };
        tree.node(root, depth)?;
        runs = tree.runs;
    } else {
        let direct = root.part(0, 48)?;
        runs.pointers(direct)?;
        for (depth, at) in [(1u32, 48), (2, 52), (3, 56)] {
            indirect(blocks, &mut runs, root.le32(at)?, depth)?;
        }
    }
    runs.finish(inode)
}

/// Verifies an inode, and gives what the checksums of its extent blocks begin with.
fn verify(inode: Fields<'_>, geometry: &Geometry) -> Result<Option<u32>, Error> {
    let Checks::Crc32c(seed) = geometry.checks else { return Ok(None) };
    let seed = crc32c_raw(crc32c_raw(seed, &JOURNAL.to_le_bytes()), &inode.array::<4>(0x64)?);
    let mut bytes = inode.all().to_vec();
    let mut zero = |at: usize| bytes.iter_mut().skip(at).take(2).for_each(|byte| *byte = 0);
    zero(0x7c);
    let wide = geometry.inode_size > 128 && inode.le16(0x80)? >= 4;
    let mut expected = u32::from(inode.le16(0x7c)?);
    if wide {
        zero(0x82);
        expected |= u32::from(inode.le16(0x82)?) << 16;
    }
    let found = crc32c_raw(seed, &bytes);
    if expected != if wide { found } else { found & 0xffff } {
        return Err(inode.corrupt("a journal whose inode's checksum does not hold", 0x7c));
    }
    Ok(Some(seed))
}

/// The runs found so far, in the journal's order.
struct Runs<'a> {
    all: Vec<Run>,
    geometry: &'a Geometry,
    /// How many blocks the journal has.
    count: u64,
}

impl Runs<'_> {
    fn next(&self) -> u64 {
        self.all.last().map_or(0, Run::end)
    }

    fn push(&mut self, run: Run, at: Fields<'_>) -> Result<(), Error> {
        if run.logical != self.next() || !self.geometry.holds(run.block, run.count) {
            return Err(at.corrupt("a journal with holes, or blocks beyond the end", 0));
        }
        if let Some(last) = self.all.last_mut()
            && last.block.checked_add(last.count) == Some(run.block)
        {
            last.count = last.count.saturating_add(run.count);
            return Ok(());
        }
        if self.all.len() >= MAX_RUNS {
            return Err(Error::unsupported("a journal in so many pieces"));
        }
        self.all.push(run);
        Ok(())
    }

    /// Adds blocks by their numbers, until the journal is complete.
    fn pointers(&mut self, pointers: Fields<'_>) -> Result<(), Error> {
        for pointer in pointers.all().chunks_exact(4) {
            let logical = self.next();
            if logical >= self.count {
                break;
            }
            let block = pointer.first_chunk().copied().map_or(0, u32::from_le_bytes);
            self.push(Run { logical, block: u64::from(block), count: 1 }, pointers)?;
        }
        Ok(())
    }

    /// That all of the journal is there, and no block twice.
    fn finish(self, inode: Fields<'_>) -> Result<Vec<Run>, Error> {
        let mut sorted: Vec<(u64, u64)> = self.all.iter().map(|run| (run.block, run.count)).collect();
        sorted.sort_unstable();
        let mut end = 0;
        for (block, count) in sorted {
            if block < end {
                return Err(inode.corrupt("a journal that has a block twice", 0x28));
            }
            end = block.saturating_add(count);
        }
        if self.next() < self.count {
            return Err(inode.corrupt("a journal that is shorter than it says", 4));
        }
        Ok(self.all)
    }
}

/// Adds the blocks behind an indirect one.
fn indirect(blocks: &Blocks<'_, '_>, runs: &mut Runs<'_>, block: u32, depth: u32) -> Result<(), Error> {
    if runs.next() >= runs.count {
        return Ok(());
    }
    let block = u64::from(block);
    if !runs.geometry.holds(block, 1) {
        let at = runs.geometry.byte(block);
        return Err(Error::Corrupt { what: "a journal with holes, or blocks beyond the end", at });
    }
    let read = blocks.view.read(runs.geometry.byte(block), runs.geometry.block_size)?;
    let Some(below) = depth.checked_sub(1).filter(|below| *below > 0) else {
        return runs.pointers(read.fields());
    };
    for pointer in read.bytes().chunks_exact(4) {
        indirect(blocks, runs, pointer.first_chunk().copied().map_or(0, u32::from_le_bytes), below)?;
    }
    Ok(())
}

/// An extent tree: 12 bytes of header (magic, entries, the most of them, depth), then entries of 12 bytes.
struct Tree<'a, 'v, 'd> {
    blocks: &'a Blocks<'v, 'd>,
    geometry: &'a Geometry,
    seed: Option<u32>,
    nodes: u32,
    runs: Runs<'a>,
}

impl Tree<'_, '_, '_> {
    fn node(&mut self, node: Fields<'_>, depth: u16) -> Result<(), Error> {
        let [magic, entries, most, found] = [node.le16(0)?, node.le16(2)?, node.le16(4)?, node.le16(6)?];
        if magic != 0xf30a || entries > most || found != depth {
            return Err(node.corrupt("a node of an extent tree that is none", 0));
        }
        for index in 0..u64::from(entries) {
            let entry = node.part(12u64.saturating_add(index.saturating_mul(12)), 12)?;
            let logical = u64::from(entry.le32(0)?);
            let number = |high, low| -> Result<u64, Error> {
                Ok(u64::from(entry.le32(low)?) | (u64::from(entry.le16(high)?) << 32))
            };
            if let Some(below) = depth.checked_sub(1) {
                self.child(number(8, 4)?, entry, below)?;
                continue;
            }
            let count = u64::from(entry.le16(4)?);
            if count == 0 || count > 0x8000 {
                return Err(entry.corrupt("a journal in blocks that were never written", 4));
            }
            self.runs.push(Run { logical, block: number(6, 8)?, count }, entry)?;
        }
        Ok(())
    }

    fn child(&mut self, block: u64, entry: Fields<'_>, depth: u16) -> Result<(), Error> {
        self.nodes = self.nodes.saturating_add(1);
        if self.nodes > MAX_NODES {
            return Err(Error::unsupported("a journal in so many pieces"));
        }
        if !self.geometry.holds(block, 1) {
            return Err(entry.corrupt("an extent tree that leads beyond the end", 4));
        }
        let read = self.blocks.view.read(self.geometry.byte(block), self.geometry.block_size)?;
        let node = read.fields();
        if let Some(seed) = self.seed {
            let len = u64::from(node.le16(4)?).saturating_mul(12).saturating_add(12);
            if crc32c_raw(seed, node.bytes(0, len)?) != node.le32(len)? {
                return Err(node.corrupt("a node of an extent tree whose checksum does not hold", len));
            }
        }
        self.node(node, depth)
    }
}
