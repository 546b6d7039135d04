//! The two trees of a group's free extents.
//!
//! A block of a tree begins with its magic, its level (0 is that of the leaves), how many records it has and its two
//! neighbours on its level; in version 5 where it lies, when it was changed, whose it is and its checksum. A record is the
//! beginning and the length of a free extent, four bytes each. Blocks above the leaves have a copy of the first record of
//! each block below them, and behind the room for all these the blocks' numbers.
//!
//! A tree is read level by level, so that all of its own blocks are known before its first record is.

use super::super::Error;
use super::super::fields::{Block, Fields};
use super::Stamp;
use super::group::Group;

/// Where a block has no neighbour.
const NONE: u64 = 0xffff_ffff;
/// Trees are never higher.
const MAX_LEVELS: u64 = 9;
/// The most blocks of one level, which take 16 bytes of memory each and some more: with blocks of 4 KiB enough for every
/// other block of a group of the greatest size.
const MAX_BLOCKS: usize = 1 << 18;

pub(super) const STAMP: Stamp = Stamp { checksum: 52, uuid: 32, lsn: 24 };

/// A free extent, in blocks of the group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    pub start: u32,
    pub len: u32,
}

impl Record {
    fn parse(fields: Fields<'_>, at: u64) -> Result<Record, Error> {
        Ok(Record { start: fields.be32(at)?, len: fields.be32(at.saturating_add(4))? })
    }

    /// The first block behind it.
    pub fn end(self) -> u64 {
        u64::from(self.start).saturating_add(u64::from(self.len))
    }
}

/// By what a tree's records are ordered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    Start,
    /// And those of one length by their beginnings.
    Length,
}

impl Order {
    pub(super) fn magic(self, v5: bool) -> &'static [u8] {
        match (self, v5) {
            (Order::Start, false) => b"ABTB",
            (Order::Start, true) => b"AB3B",
            (Order::Length, false) => b"ABTC",
            (Order::Length, true) => b"AB3C",
        }
    }

    /// Grows from one record to the next one.
    fn key(self, record: Record) -> (u32, u32) {
        match self {
            Order::Start => (record.start, 0),
            Order::Length => (record.len, record.start),
        }
    }
}

/// What a tree's records make up, in whatever order they come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sum {
    pub records: u64,
    pub blocks: u64,
    pub longest: u64,
    /// Sums of two hashes of each record: two trees that agree in these have the same records.
    digest: [u64; 2],
}

impl Sum {
    fn add(&mut self, record: Record) {
        let len = u64::from(record.len);
        self.records = self.records.saturating_add(1);
        self.blocks = self.blocks.saturating_add(len);
        self.longest = self.longest.max(len);
        let both = u64::from(record.start) << 32 | len;
        for (sum, seed) in self.digest.iter_mut().zip([0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03]) {
            *sum = sum.wrapping_add(mixed(both.wrapping_add(seed)));
        }
    }
}

/// The finaliser of SplitMix64: each bit depends on all bits.
fn mixed(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A block of a tree, as the one above it knows it.
#[derive(Clone, Copy, Debug)]
struct Child {
    block: u32,
    /// Its first record, as the block above has it; the root is in none.
    first: Option<Record>,
}

/// A tree of which all but the leaves was read.
pub struct Tree<'a> {
    group: &'a Group<'a>,
    order: Order,
    /// The blocks above the leaves.
    upper: Vec<u32>,
    leaves: Vec<Child>,
}

impl<'a> Tree<'a> {
    /// Reads all but the leaves of a tree with this root and so many levels.
    pub fn read(group: &'a Group<'a>, order: Order, root: u32, levels: u64) -> Result<Tree<'a>, Error> {
        if !(1..=MAX_LEVELS).contains(&levels) {
            return Err(group.corrupt("a tree of free extents with an impossible height"));
        }
        group.has(root)?;
        let mut tree =
            Tree { group, order, upper: Vec::new(), leaves: vec![Child { block: root, first: None }] };
        for level in (1..levels).rev() {
            tree.descend(level)?;
        }
        Ok(tree)
    }

    /// Reads the lowest level that is known so far for the one below it.
    fn descend(&mut self, level: u64) -> Result<(), Error> {
        let mut below: Vec<Child> = Vec::new();
        let mut last = None;
        for (index, child) in self.leaves.iter().enumerate() {
            let block = self.block(index, *child, level)?;
            let fields = block.fields();
            let first = self.header();
            // Each entry takes twelve bytes: eight for a record, and four for a block behind all records.
            let most = self.room() / 12;
            let count = self.count(fields, most, 1)?;
            for entry in 0..count {
                let at = first.saturating_add(entry.saturating_mul(8));
                let record = Record::parse(fields, at)?;
                self.ascends(fields, at, record, child.first.filter(|_| entry == 0), &mut last)?;
                let at = first.saturating_add(most.saturating_mul(8)).saturating_add(entry.saturating_mul(4));
                let block = fields.be32(at)?;
                self.group.has(block)?;
                below.push(Child { block, first: Some(record) });
            }
            if below.len() > MAX_BLOCKS {
                return Err(Error::unsupported("a tree of so many free extents"));
            }
        }
        self.upper.extend(self.leaves.iter().map(|child| child.block));
        self.leaves = below;
        Ok(())
    }

    /// Gives all records in their order, and says what they make up.
    pub fn records(&self, mut give: impl FnMut(Record) -> Result<(), Error>) -> Result<Sum, Error> {
        let mut sum = Sum::default();
        let mut last = None;
        for (index, child) in self.leaves.iter().enumerate() {
            let block = self.block(index, *child, 0)?;
            let fields = block.fields();
            // A group without a free block has a root without a record.
            let least = if child.first.is_none() { 0 } else { 1 };
            let count = self.count(fields, self.room() / 8, least)?;
            self.group.spend(count)?;
            for entry in 0..count {
                let at = self.header().saturating_add(entry.saturating_mul(8));
                let record = Record::parse(fields, at)?;
                if record.len == 0 || record.end() > self.group.blocks() {
                    return Err(fields.corrupt("a free extent that lies beyond its group", at));
                }
                self.ascends(fields, at, record, child.first.filter(|_| entry == 0), &mut last)?;
                sum.add(record);
                give(record)?;
            }
        }
        Ok(sum)
    }

    /// All of its own blocks.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.upper.iter().copied().chain(self.leaves.iter().map(|leaf| leaf.block)).map(u64::from)
    }

    /// That a record comes behind the last one and, as the first of its block, is what the block above has of it.
    fn ascends(
        &self,
        fields: Fields<'_>,
        at: u64,
        record: Record,
        above: Option<Record>,
        last: &mut Option<Record>,
    ) -> Result<(), Error> {
        if above.is_some_and(|above| self.order.key(above) != self.order.key(record)) {
            return Err(fields.corrupt("a block of free extents that is not the one that the tree says", at));
        }
        let behind = last.is_none_or(|last| match self.order {
            // Above the leaves it is no more than where the block's extents begin.
            Order::Start => last.end() <= u64::from(record.start) && last.start < record.start,
            Order::Length => self.order.key(last) < self.order.key(record),
        });
        if !behind {
            return Err(fields.corrupt("free extents that are not in their order", at));
        }
        *last = Some(record);
        Ok(())
    }

    /// Where the records begin.
    fn header(&self) -> u64 {
        if self.group.superblock.is_v5() { 56 } else { 16 }
    }

    /// How many bytes are left for them.
    fn room(&self) -> u64 {
        self.group.superblock.block.saturating_sub(self.header())
    }

    fn count(&self, fields: Fields<'_>, most: u64, least: u64) -> Result<u64, Error> {
        let count = u64::from(fields.be16(6)?);
        match (least..=most).contains(&count) {
            true => Ok(count),
            false => Err(fields.corrupt("a block of free extents with an impossible count", 6)),
        }
    }

    /// Reads a block of the lowest level that is known so far, and checks what it says of itself.
    fn block(&self, index: usize, child: Child, level: u64) -> Result<Block, Error> {
        let block = self.group.block(child.block)?;
        let fields = block.fields();
        let superblock = self.group.superblock;
        if !fields.has(0, self.order.magic(superblock.is_v5())) {
            return Err(fields.corrupt("a block of a tree of free extents that is none", 0));
        }
        STAMP.check(superblock, self.group.head, fields)?;
        if superblock.is_v5() {
            // It says where it lies in units of 512 bytes.
            if fields.be64(16)?.checked_mul(512) != Some(fields.at()) {
                return Err(fields.corrupt("a block of free extents that belongs elsewhere", 16));
            }
            if u64::from(fields.be32(48)?) != self.group.index {
                return Err(fields.corrupt("a block of free extents of another group", 48));
            }
        }
        if u64::from(fields.be16(4)?) != level {
            return Err(fields.corrupt("a block of free extents of another level", 4));
        }
        let neighbour = |index: Option<usize>| {
            index.and_then(|index| self.leaves.get(index)).map_or(NONE, |child| u64::from(child.block))
        };
        if u64::from(fields.be32(8)?) != neighbour(index.checked_sub(1))
            || u64::from(fields.be32(12)?) != neighbour(index.checked_add(1))
        {
            return Err(fields.corrupt("a block of free extents with other neighbours", 8));
        }
        Ok(block)
    }
}
