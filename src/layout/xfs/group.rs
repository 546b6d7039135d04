//! An allocation group: four sectors of headers at its beginning, and the two trees of its free extents.
//!
//! The sectors are a copy of the superblock; AGF, of the free space; AGI, of the inodes; AGFL, a ring of blocks that the
//! trees grow into. The last are in neither tree and count as free; here they are used, like the trees' own blocks.

use super::super::Error;
use super::super::fields::{Block, Fields};
use super::super::ranges::{Ranges, Used, between};
use super::super::view::{PER_RANGE, View};
use super::free::{Order, Tree};
use super::superblock::Superblock;
use super::{Lsn, Stamp};
use crate::units::Extent;

pub(super) const AGF: Stamp = Stamp { checksum: 216, uuid: 64, lsn: 208 };
pub(super) const AGI: Stamp = Stamp { checksum: 312, uuid: 296, lsn: 320 };
pub(super) const AGFL: Stamp = Stamp { checksum: 32, uuid: 8, lsn: 24 };

/// A group whose headers are sound.
pub struct Group<'a> {
    view: &'a View<'a>,
    pub superblock: &'a Superblock,
    /// Where the log ends.
    pub head: Lsn,
    pub index: u64,
    headers: Block,
    /// Single blocks that something else has.
    taken: Vec<u64>,
}

impl<'a> Group<'a> {
    /// Reads the headers.
    pub fn read(
        view: &'a View<'a>,
        superblock: &'a Superblock,
        head: Lsn,
        index: u64,
    ) -> Result<Group<'a>, Error> {
        let headers = view.read(superblock.start_of(index), superblock.sector.saturating_mul(4))?;
        let mut group = Group { view, superblock, head, index, headers, taken: Vec::new() };
        let mut taken = Vec::new();
        if index > 0 {
            superblock.check_copy(group.sector(0)?)?;
        }
        group.header(group.sector(1)?, b"XAGF", &AGF)?;
        group.header(group.sector(2)?, b"XAGI", &AGI)?;
        group.inodes(&mut taken)?;
        group.ring(&mut taken)?;
        group.other_roots(&mut taken)?;
        group.taken = taken;
        Ok(group)
    }

    /// Adds the group's used bytes, and says how many blocks of it count as free.
    pub fn free(&self, used: &mut Used) -> Result<u64, Error> {
        let agf = self.sector(1)?;
        let by_start = Tree::read(self, Order::Start, agf.be32(16)?, u64::from(agf.be32(28)?))?;
        let by_length = Tree::read(self, Order::Length, agf.be32(20)?, u64::from(agf.be32(32)?))?;
        let taken = self.taken(&by_start, &by_length)?;

        let start = self.superblock.start_of(self.index);
        let bytes = |from: u64, to: u64| {
            let at = |block: u64| start.saturating_add(block.saturating_mul(self.superblock.block));
            between(at(from), at(to))
        };
        let mut behind = 0;
        let sum = by_start.records(|record| {
            let free = Extent::new(u64::from(record.start), u64::from(record.len));
            if free.is_some_and(|free| taken.within(free).next().is_some()) {
                return Err(self.corrupt("a free extent that something else lies in"));
            }
            bytes(behind, u64::from(record.start)).into_iter().for_each(|range| used.add(range));
            behind = record.end();
            Ok(())
        })?;
        bytes(behind, self.blocks()).into_iter().for_each(|range| used.add(range));

        if by_length.records(|_| Ok(()))? != sum {
            return Err(self.corrupt("two trees of free extents that do not agree"));
        }
        if u64::from(agf.be32(52)?) != sum.blocks {
            return Err(agf.corrupt("an AGF whose count of free blocks is wrong", 52));
        }
        if u64::from(agf.be32(56)?) != sum.longest {
            return Err(agf.corrupt("an AGF whose longest free extent is wrong", 56));
        }
        // Without their roots, the trees' blocks count as free, and those of the tree of owners like them.
        let owners = if self.superblock.has_rmap() { agf.be32(80)?.saturating_sub(1) } else { 0 };
        let below =
            |tree: &Tree<'_>| u64::try_from(tree.blocks().count()).unwrap_or(u64::MAX).saturating_sub(1);
        let trees = below(&by_start).saturating_add(below(&by_length)).saturating_add(u64::from(owners));
        if self.superblock.has_lazy_counters() && u64::from(agf.be32(60)?) != trees {
            return Err(agf.corrupt("an AGF whose count of blocks in its trees is wrong", 60));
        }
        Ok(sum.blocks.saturating_add(u64::from(agf.be32(48)?)).saturating_add(trees))
    }

    /// Its length in blocks.
    pub fn blocks(&self) -> u64 {
        self.superblock.blocks_of(self.index)
    }

    /// That a block is one of those behind its headers.
    pub fn has(&self, block: u32) -> Result<(), Error> {
        match (self.superblock.headers()..self.blocks()).contains(&u64::from(block)) {
            true => Ok(()),
            false => Err(self.corrupt("a block of a tree that lies beyond its group")),
        }
    }

    /// Reads a block that it has.
    pub fn block(&self, block: u32) -> Result<Block, Error> {
        let block = u64::from(block).saturating_mul(self.superblock.block);
        let at = self.superblock.start_of(self.index).saturating_add(block);
        self.view.read(at, self.superblock.block)
    }

    /// Spends what so many free extents take.
    pub fn spend(&self, extents: u64) -> Result<(), Error> {
        self.view.spend(extents.saturating_mul(PER_RANGE))
    }

    /// What is wrong with it.
    pub fn corrupt(&self, what: &'static str) -> Error {
        self.headers.fields().corrupt(what, self.superblock.sector)
    }

    fn sector(&self, index: u64) -> Result<Fields<'_>, Error> {
        let len = self.superblock.sector;
        self.headers.fields().part(len.saturating_mul(index), len)
    }

    /// What AGF and AGI have in common.
    fn header(&self, fields: Fields<'_>, magic: &[u8], stamp: &Stamp) -> Result<(), Error> {
        if !fields.has(0, magic) || fields.be32(4)? != 1 {
            let what = if magic == b"XAGF" { "a group without its AGF" } else { "a group without its AGI" };
            return Err(fields.corrupt(what, 0));
        }
        stamp.check(self.superblock, self.head, fields)?;
        if u64::from(fields.be32(8)?) != self.index {
            return Err(fields.corrupt("the header of another group", 8));
        }
        if u64::from(fields.be32(12)?) != self.blocks() {
            return Err(fields.corrupt("a group whose length is not that of the superblock", 12));
        }
        Ok(())
    }

    /// The roots of the trees of inodes.
    fn inodes(&self, taken: &mut Vec<u64>) -> Result<(), Error> {
        let agi = self.sector(2)?;
        taken.push(u64::from(agi.be32(20)?));
        if self.superblock.has_finobt() {
            taken.push(u64::from(agi.be32(328)?));
        }
        Ok(())
    }

    /// The roots of the trees of owners and of shared blocks.
    fn other_roots(&self, taken: &mut Vec<u64>) -> Result<(), Error> {
        let agf = self.sector(1)?;
        if self.superblock.has_rmap() {
            taken.push(u64::from(agf.be32(24)?));
        }
        if self.superblock.has_reflink() {
            taken.push(u64::from(agf.be32(88)?));
        }
        Ok(())
    }

    /// The blocks in the ring.
    fn ring(&self, taken: &mut Vec<u64>) -> Result<(), Error> {
        let (agf, agfl) = (self.sector(1)?, self.sector(3)?);
        let v5 = self.superblock.is_v5();
        if v5 {
            if !agfl.has(0, b"XAFL") || u64::from(agfl.be32(4)?) != self.index {
                return Err(agfl.corrupt("a group without its list of blocks for its trees", 0));
            }
            AGFL.check(self.superblock, self.head, agfl)?;
        }
        let first: u64 = if v5 { 36 } else { 0 };
        let size = self.superblock.sector.saturating_sub(first) / 4;
        let (from, to) = (u64::from(agf.be32(40)?), u64::from(agf.be32(44)?));
        let count = u64::from(agf.be32(48)?);
        // From one entry to the other inclusive, the last one's successor being the first one; or none.
        let len = match to.checked_sub(from) {
            _ if count == 0 => 0,
            Some(steps) => steps.saturating_add(1),
            None => to.saturating_add(1).saturating_add(size.saturating_sub(from)),
        };
        if from >= size || to >= size || len != count {
            return Err(agf.corrupt(
                "an AGF whose list of blocks for its trees has other ends than its count says",
                40,
            ));
        }
        for entry in 0..count {
            let entry = from.saturating_add(entry);
            let entry = entry.checked_sub(size).unwrap_or(entry);
            taken.push(u64::from(agfl.be32(first.saturating_add(entry.saturating_mul(4)))?));
        }
        Ok(())
    }

    /// All blocks that are known not to be free, none of which can be anything else at the same time.
    fn taken(&self, by_start: &Tree<'_>, by_length: &Tree<'_>) -> Result<Ranges, Error> {
        let headers = self.superblock.headers();
        let log = self.superblock.log.filter(|(group, ..)| *group == self.index);
        let areas = [between(0, headers), log.and_then(|(_, block, len)| Extent::new(block, len))];
        let single = self.taken.iter().copied().chain(by_start.blocks()).chain(by_length.blocks());
        let single = single.filter_map(|block| Extent::new(block, 1));
        let all: Vec<Extent> = areas.into_iter().flatten().chain(single).collect();
        let sum = all.iter().fold(0u64, |sum, one| sum.saturating_add(one.len()));
        let taken: Ranges = all.into_iter().collect();
        if taken.bytes() != sum {
            return Err(self.corrupt("a group in which two structures lie in one place"));
        }
        if taken.iter().next_back().is_some_and(|last| last.end() > self.blocks()) {
            return Err(self.corrupt("a structure that lies beyond its group"));
        }
        Ok(taken)
    }
}
