//! The groups: their descriptors, and the bitmaps that say which of their blocks are used.
//!
//! A descriptor has 32 bytes, or with 64-bit block numbers 64 or more. Of what is used here:
//!
//! | at | |
//! |---|---|
//! | 0x00, 0x20 | block of the block bitmap, low and high half |
//! | 0x04, 0x24 | block of the inode bitmap, the same |
//! | 0x08, 0x28 | first block of the inode table, the same |
//! | 0x0c, 0x2c | free clusters, 16 bits each |
//! | 0x12 | flags: 2 is a block bitmap that was never written |
//! | 0x18, 0x38 | checksum of the block bitmap, 16 bits each |
//! | 0x1e | checksum of the descriptor |
//!
//! No structure has a copy that is as new as the original, and what is damaged is not guessed at. Where there are no
//! checksums, what can be compared is: the count of free clusters with the bitmap, and the bitmap with the places of what
//! lies in fixed places.

use super::super::Error;
use super::super::fields::{Block, Fields};
use super::super::ranges::{Ranges, between, runs};
use super::super::view::PER_RANGE;
use super::blocks::Blocks;
use super::superblock::{Checks, Geometry};
use crate::checksum::{crc16_raw, crc32c_raw};
use crate::units::Extent;

/// The bitmap was never written: what it would say follows from where the group's own structures lie.
const BLOCK_UNINIT: u16 = 2;

/// The most bytes of neighbouring bitmaps that are read at once.
const WINDOW: u64 = 1 << 20;

/// What a group takes beside what is read of it: its descriptor's checksum, and where its structures lie.
const PER_GROUP: u64 = 2048;

/// What a descriptor says of its group.
#[derive(Clone, Copy, Debug)]
struct Group {
    bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    free: u64,
    unwritten: bool,
    checksum: u32,
}

/// The used bytes of a file system, and how many it says are free.
#[derive(Debug)]
pub struct Map {
    /// All used bytes, the boot sector among them.
    pub used: Ranges,
    /// By the descriptors' counts.
    pub free: u64,
}

/// Reads the descriptors and bitmaps.
pub fn map(blocks: &Blocks<'_, '_>, geometry: &Geometry) -> Result<Map, Error> {
    let groups = descriptors(blocks, geometry)?;
    let mut used = blocks.view.used();
    between(0, geometry.byte(geometry.first_block)).into_iter().for_each(|boot| used.add(boot));
    let mut free = 0u64;
    let mut window = Window { first: 0, read: Block::new(Vec::new(), 0) };
    for (index, group) in (0u64..).zip(&groups) {
        let clusters = geometry.len(index).div_ceil(geometry.cluster.max(1));
        let (mut count, mut ranges) = (0u64, 0u64);
        let mut add = |from: u64, to: u64| {
            ranges = ranges.saturating_add(1);
            count = count.saturating_add(to.saturating_sub(from));
            let byte = |cluster: u64| {
                let block = geometry.start(index).saturating_add(cluster.saturating_mul(geometry.cluster));
                geometry.byte(block.min(geometry.blocks))
            };
            between(byte(from), byte(to)).into_iter().for_each(|range| used.add(range));
        };
        if group.unwritten {
            own(group, index, geometry).iter().for_each(|range| add(range.offset(), range.end()));
        } else {
            let rest = groups.get(usize::try_from(index).unwrap_or(usize::MAX)..).unwrap_or_default();
            let bitmap = window.bitmap(blocks, group.bitmap, rest)?;
            verify(bitmap, group, geometry)?;
            runs(bitmap.all(), clusters, &mut add);
        }
        blocks.view.spend(ranges.saturating_mul(PER_RANGE))?;
        if clusters.checked_sub(count) != Some(group.free) {
            let at = geometry.byte(group.bitmap);
            return Err(Error::Corrupt {
                what: "a group whose count of free blocks is not that of its bitmap",
                at,
            });
        }
        free = free.saturating_add(group.free);
    }
    let used = used.finish();
    for (index, group) in (0u64..).zip(&groups) {
        let beginning = (geometry.start(index), geometry.beginning(index).0);
        let own = [
            (group.bitmap, 1),
            (group.inode_bitmap, 1),
            (group.inode_table, geometry.inode_table),
            beginning,
        ];
        for (first, count) in own {
            let range = Extent::new(geometry.byte(first), geometry.byte(count));
            if range.is_some_and(|range| !used.covers(range)) {
                let at = geometry.byte(first);
                return Err(Error::Corrupt { what: "metadata in blocks that its bitmap calls free", at });
            }
        }
    }
    Ok(Map { used, free: geometry.byte(free.saturating_mul(geometry.cluster)) })
}

fn descriptors(blocks: &Blocks<'_, '_>, geometry: &Geometry) -> Result<Vec<Group>, Error> {
    // The number is limited, and a larger memory that grows would for a moment be taken twice.
    let mut groups = Vec::with_capacity(usize::try_from(geometry.groups).unwrap_or(0));
    for index in 0..geometry.descriptor_blocks() {
        let at = geometry.descriptor_block(index);
        if !geometry.holds(at, 1) {
            let at = geometry.byte(at);
            return Err(Error::Corrupt { what: "descriptors beyond the end of their file system", at });
        }
        let read = blocks.read(at, 1)?;
        let first = index.saturating_mul(geometry.per_block());
        blocks.view.spend(geometry.per_block().saturating_mul(PER_GROUP))?;
        for group in first..first.saturating_add(geometry.per_block()).min(geometry.groups) {
            let at = group.saturating_sub(first).saturating_mul(geometry.descriptor);
            groups.push(Group::parse(read.fields().part(at, geometry.descriptor)?, group, geometry)?);
        }
    }
    Ok(groups)
}

/// The first block of the inode table of the first group, by the descriptor that lies in its place, whatever the journal
/// says: the journal's own inode is found by it.
pub fn first_inode_table(blocks: &Blocks<'_, '_>, geometry: &Geometry) -> Result<u64, Error> {
    let read = blocks.read(geometry.descriptor_block(0), 1)?;
    Ok(Group::parse(read.fields().part(0, geometry.descriptor)?, 0, geometry)?.inode_table)
}

impl Group {
    fn parse(fields: Fields<'_>, index: u64, geometry: &Geometry) -> Result<Group, Error> {
        let number = u32::try_from(index).unwrap_or(u32::MAX).to_le_bytes();
        let (before, behind) =
            (fields.bytes(0, 0x1e)?, fields.bytes(0x20, geometry.descriptor.saturating_sub(0x20))?);
        let checksum = match geometry.checks {
            Checks::None => None,
            // What lies behind the checksum is part of neither, and the rest is behind that.
            Checks::Crc16 => {
                Some([&geometry.id[..], &number, before, behind].into_iter().fold(!0, crc16_raw))
            }
            Checks::Crc32c(seed) => {
                let register = [&number, before, &[0, 0], behind].into_iter().fold(seed, crc32c_raw);
                let [low, high, ..] = register.to_le_bytes();
                Some(u16::from_le_bytes([low, high]))
            }
        };
        if checksum.is_some_and(|checksum| fields.le16(0x1e).ok() != Some(checksum)) {
            return Err(fields.corrupt("a group's descriptor whose checksum does not hold", 0x1e));
        }
        let wide = geometry.descriptor >= 64;
        let block = |low, high| -> Result<u64, Error> {
            let high = if wide { fields.le32(high)? } else { 0 };
            Ok(u64::from(fields.le32(low)?) | (u64::from(high) << 32))
        };
        let half = |low, high| -> Result<u32, Error> {
            let high = if wide { fields.le16(high)? } else { 0 };
            Ok(u32::from(fields.le16(low)?) | (u32::from(high) << 16))
        };
        let group = Group {
            bitmap: block(0x00, 0x20)?,
            inode_bitmap: block(0x04, 0x24)?,
            inode_table: block(0x08, 0x28)?,
            free: u64::from(half(0x0c, 0x2c)?),
            // Without checksums of descriptors nobody looks at the flags.
            unwritten: fields.le16(0x12)? & BLOCK_UNINIT != 0 && geometry.checks != Checks::None,
            checksum: half(0x18, 0x38)?,
        };
        let table = (group.inode_table, geometry.inode_table);
        for (first, count) in [(group.bitmap, 1), (group.inode_bitmap, 1), table] {
            let within = first >= geometry.start(index)
                && first.saturating_add(count) <= geometry.start(index).saturating_add(geometry.len(index));
            if !geometry.holds(first, count) || !(within || geometry.flexible) {
                return Err(fields.corrupt("a group whose bitmaps or inodes lie where they cannot", 0));
            }
        }
        Ok(group)
    }
}

/// Neighbouring bitmaps, which are read together.
struct Window {
    first: u64,
    read: Block,
}

impl Window {
    /// The bitmap in this block; `groups` are the one that it is of and those behind that.
    fn bitmap(&mut self, blocks: &Blocks<'_, '_>, block: u64, groups: &[Group]) -> Result<Fields<'_>, Error> {
        let size = blocks.block_size;
        let at = block.checked_sub(self.first).and_then(|at| at.checked_mul(size));
        let end = at.and_then(|at| at.checked_add(size)).and_then(|end| usize::try_from(end).ok());
        if end.is_none_or(|end| end > self.read.bytes().len()) {
            let next = groups.iter().zip(block..);
            let next = next.take_while(|(group, block)| group.bitmap == *block && !group.unwritten);
            let most = WINDOW.checked_div(size).unwrap_or(1);
            let count = u64::try_from(next.count()).unwrap_or(1).min(most).max(1);
            (self.first, self.read) = (block, blocks.read(block, count)?);
        }
        let at = block.saturating_sub(self.first).saturating_mul(size);
        self.read.fields().part(at, size)
    }
}

/// That a bitmap's checksum holds, if it has one.
fn verify(bitmap: Fields<'_>, group: &Group, geometry: &Geometry) -> Result<(), Error> {
    let Checks::Crc32c(seed) = geometry.checks else { return Ok(()) };
    let bits = geometry.clusters_per_group.checked_div(8).unwrap_or(0);
    let register = crc32c_raw(seed, bitmap.bytes(0, bits)?);
    let found = if geometry.descriptor >= 64 { register } else { register & 0xffff };
    if found != group.checksum {
        return Err(bitmap.corrupt("a block bitmap whose checksum does not hold", 0));
    }
    Ok(())
}

/// The clusters of a group that its own structures take, where its bitmap was never written.
fn own(group: &Group, index: u64, geometry: &Geometry) -> Ranges {
    let (start, len) = (geometry.start(index), geometry.len(index));
    let (beginning, reserved) = geometry.beginning(index);
    let all = [
        (start, beginning.saturating_add(reserved)),
        (group.bitmap, 1),
        (group.inode_bitmap, 1),
        (group.inode_table, geometry.inode_table),
    ];
    let cluster = geometry.cluster.max(1);
    all.into_iter()
        .filter_map(|(first, count)| {
            // As far as they lie in this group.
            let from = first.max(start).checked_sub(start)?;
            let to = first.saturating_add(count).checked_sub(start)?.min(len);
            between(from.checked_div(cluster)?, if to > from { to.div_ceil(cluster) } else { 0 })
        })
        .collect()
}
