//! The superblock: what it says of its file system, and the geometry that all else is found by.
//!
//! Its 1024 bytes lie at byte 1024, little-endian, with copies at the beginning of some groups. Of what is used here:
//!
//! | at | | at | |
//! |---|---|---|---|
//! | 0x00 | inodes | 0x60 | incompatible features |
//! | 0x04, 0x150 | blocks, low and high half | 0x64 | features that forbid writing |
//! | 0x0c, 0x158 | free blocks, the same | 0x68 | UUID |
//! | 0x14 | first data block | 0x78 | label |
//! | 0x18 | block size is 1024 << this | 0xce | blocks kept for more descriptors |
//! | 0x1c | cluster size is 1024 << this | 0xd0 | UUID of an external journal |
//! | 0x20, 0x24 | blocks, clusters of a group | 0xe0, 0xe4 | the journal's inode, device |
//! | 0x28 | inodes of a group | 0xfe | size of a descriptor |
//! | 0x38 | magic | 0x104 | first descriptor block that lies in its own groups |
//! | 0x3a | state | 0x175 | kind of checksums |
//! | 0x3e, 0x4c | minor and major revision | 0x24c | the two groups with copies (sparse_super2) |
//! | 0x58 | size of an inode | 0x270 | seed of checksums, where it is kept |
//! | 0x5c | compatible features | 0x3fc | checksum of all before |

use super::super::Error;
use super::super::fields::{Block, Fields};
use super::super::view::View;
use super::features::{self, Features};
use crate::checksum::crc32c_raw;

/// Where the primary superblock lies.
pub const AT: u64 = 1024;
/// How long it is.
pub const LEN: u64 = 1024;
/// The magic, and where it lies in a superblock.
pub const MAGIC: (u64, &[u8]) = (0x38, b"\x53\xef");

const STATE_VALID: u16 = 1;
const STATE_ERRORS: u16 = 2;

/// More groups than these are not followed: 128 TiB of the usual ones, and 56 MiB of memory.
const MAX_GROUPS: u64 = 1 << 20;

/// A superblock whose checksum holds, if it has one, and that does not contradict itself.
#[derive(Debug)]
pub struct Superblock {
    /// Where it was read.
    pub at: u64,
    /// Its features.
    pub features: Features,
    /// The major and minor revision.
    pub revision: (u32, u16),
    /// As `blkid` prints it.
    pub uuid: Option<String>,
    /// As `blkid` prints it.
    pub label: Option<String>,
    /// The size of a block in bytes.
    pub block_size: u64,
    /// How many of them there are.
    pub blocks: u64,
    /// How many of them are free, by this superblock's count.
    pub free_blocks: u64,
    /// Unmounted, as far as this superblock knows.
    pub valid: bool,
    /// Errors were found.
    pub errors: bool,
    /// The inode that holds the journal; 0 where that is a device of its own.
    pub journal_inode: u32,
    /// In which group it says to lie.
    pub group: u32,
    /// What all else is found by; or the feature that forbids to believe that.
    pub geometry: Result<Geometry, String>,
}

/// What is of use in a primary superblock that is damaged.
pub struct Remains {
    /// The UUID.
    pub id: [u8; 16],
    /// Unmounted, no errors, and no journal to replay.
    pub clean: bool,
}

impl Remains {
    /// Takes it from a superblock that need not be sound.
    pub fn parse(fields: Fields<'_>) -> Result<Remains, Error> {
        let features = Features { incompatible: fields.le32(0x60)?, ..Features::default() };
        let valid = fields.le16(0x3a)? & (STATE_VALID | STATE_ERRORS) == STATE_VALID;
        Ok(Remains { id: fields.array(0x68)?, clean: valid && !features.has(features::RECOVER) })
    }
}

/// How the blocks of a file system are divided into groups, and where its descriptors lie.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// The size of a block in bytes, a power of two from 1 to 64 KiB.
    pub block_size: u64,
    /// How many there are, all before the first one of a group among them.
    pub blocks: u64,
    /// The first block of the first group: 1 where the boot sector has a block of its own.
    pub first_block: u64,
    /// How many blocks a bit of a bitmap stands for; 1 without bigalloc.
    pub cluster: u64,
    /// How many bits of a bitmap are used.
    pub clusters_per_group: u64,
    /// How many blocks these are.
    pub blocks_per_group: u64,
    /// How many groups there are, the last one of which may be shorter.
    pub groups: u64,
    /// How many blocks the inode table of a group takes.
    pub inode_table: u64,
    /// The size of an inode in bytes.
    pub inode_size: u64,
    /// How many inodes a group has.
    pub inodes_per_group: u64,
    /// The size of a group's descriptor in bytes.
    pub descriptor: u64,
    /// Whether bitmaps and inode tables may lie in another group.
    pub flexible: bool,
    /// From this block of descriptors on they lie in the groups that they are about.
    pub first_meta: u64,
    /// Blocks behind the descriptors that are kept for more of them.
    pub reserved: u64,
    /// Which groups have a copy of the superblock.
    pub copies: Copies,
    /// How descriptors and bitmaps are verified.
    pub checks: Checks,
    /// What a device of its own or the superblock's copies are known by.
    pub id: [u8; 16],
}

/// Which groups have a copy of the superblock, beside the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copies {
    /// Each.
    All,
    /// The second, and those whose number is a power of 3, 5 or 7.
    Sparse,
    /// These two; 0 is none.
    Two([u32; 2]),
}

/// How descriptors and bitmaps are verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checks {
    /// Not at all.
    None,
    /// Descriptors by a CRC-16.
    Crc16,
    /// Both by a CRC-32C that begins with this.
    Crc32c(u32),
}

impl Superblock {
    /// Whether these bytes are marked as a superblock.
    pub fn is_marked(fields: Fields<'_>) -> bool {
        fields.has(MAGIC.0, MAGIC.1)
    }

    /// Reads the one at byte `at`; `None` where nothing is marked as one.
    pub fn read(view: &View<'_>, at: u64) -> Result<Option<Result<Superblock, Error>>, Error> {
        match at.checked_add(LEN) {
            Some(end) if end <= view.size() => {
                let block = view.read(at, LEN)?;
                Ok(Superblock::is_marked(block.fields()).then(|| Superblock::parse(&block)))
            }
            _ => Ok(None),
        }
    }

    /// Parses the 1024 bytes of one.
    pub fn parse(block: &Block) -> Result<Superblock, Error> {
        let fields = block.fields();
        if !Superblock::is_marked(fields) {
            return Err(fields.corrupt("a superblock without its magic", MAGIC.0));
        }
        let major = fields.le32(0x4c)?;
        let [compatible, incompatible, read_only] =
            [fields.le32(0x5c)?, fields.le32(0x60)?, fields.le32(0x64)?];
        let features = Features { compatible, incompatible, read_only };
        if major == 0 && features != Features::default() {
            return Err(fields.corrupt("a superblock of the first revision that has features", 0x4c));
        }
        if features.has(features::METADATA_CSUM) {
            if fields.u8(0x175)? != 1 {
                return Err(fields.corrupt("checksums of an unknown kind", 0x175));
            }
            if crc32c_raw(!0, fields.bytes(0, 0x3fc)?) != fields.le32(0x3fc)? {
                return Err(fields.corrupt("a superblock whose checksum does not hold", 0x3fc));
            }
        }
        let shift = fields.le32(0x18)?;
        let block_size = 1024u64.checked_shl(shift).filter(|_| shift <= 6);
        let block_size = block_size.ok_or_else(|| fields.corrupt("an impossible size of blocks", 0x18))?;
        let wide = features.has(features::WIDE);
        let number = |low, high| -> Result<u64, Error> {
            let high = fields.le32(high)?;
            if high != 0 && !wide {
                return Err(fields.corrupt("a number of blocks that has more than 32 bits", low));
            }
            Ok(u64::from(fields.le32(low)?) | (u64::from(high) << 32))
        };
        let (blocks, free_blocks) = (number(0x04, 0x150)?, number(0x0c, 0x158)?);
        if blocks.checked_mul(block_size).is_none() || free_blocks > blocks {
            return Err(fields.corrupt("an impossible number of blocks", 0x04));
        }
        let state = fields.le16(0x3a)?;
        let geometry = match features.unknown() {
            Some(name) => Err(name),
            None => Ok(Geometry::parse(fields, &features, block_size, blocks)?),
        };
        Ok(Superblock {
            at: fields.at(),
            features,
            revision: (major, fields.le16(0x3e)?),
            uuid: fields.uuid(0x68)?,
            label: fields.label(0x78, 16)?,
            block_size,
            blocks,
            free_blocks,
            valid: state & STATE_VALID != 0,
            errors: state & STATE_ERRORS != 0,
            journal_inode: fields.le32(0xe0)?,
            group: u32::from(fields.le16(0x5a)?),
            geometry,
        })
    }
}

impl Geometry {
    fn parse(
        fields: Fields<'_>,
        features: &Features,
        block_size: u64,
        blocks: u64,
    ) -> Result<Geometry, Error> {
        let wrong = |what, at| Err(fields.corrupt(what, at));
        let bigalloc = features.has(features::BIGALLOC);
        let [size_shift, cluster_shift] = [fields.le32(0x18)?, fields.le32(0x1c)?];
        // A cluster of more than 1 GiB would be larger than a group of the usual size.
        let cluster = match cluster_shift.checked_sub(size_shift) {
            Some(shift) if cluster_shift <= 20 && (bigalloc || shift == 0) => 1u64.checked_shl(shift),
            _ => None,
        };
        let Some(cluster) = cluster else {
            return wrong("an impossible size of clusters", 0x1c);
        };
        let first_block = u64::from(fields.le32(0x14)?);
        // Where the boot sector's block is one of its own, the first group begins behind it; with clusters it may not.
        let boot = u64::from(block_size == 1024);
        if first_block > boot || (first_block < boot && cluster == 1) || blocks <= first_block {
            return wrong("an impossible first block", 0x14);
        }
        let [blocks_per_group, clusters_per_group] = [fields.le32(0x20)?, fields.le32(0x24)?].map(u64::from);
        let bits = block_size.saturating_mul(8);
        if clusters_per_group == 0 || clusters_per_group > bits || clusters_per_group & 7 != 0 {
            return wrong("an impossible number of clusters in a group", 0x24);
        }
        if clusters_per_group.checked_mul(cluster) != Some(blocks_per_group) {
            return wrong("an impossible number of blocks in a group", 0x20);
        }
        let inode_size = match fields.le32(0x4c)? {
            0 => 128,
            _ => u64::from(fields.le16(0x58)?),
        };
        if !inode_size.is_power_of_two() || inode_size < 128 || inode_size > block_size {
            return wrong("an impossible size of inodes", 0x58);
        }
        let inodes_per_group = u64::from(fields.le32(0x28)?);
        let table = inodes_per_group.saturating_mul(inode_size);
        if inodes_per_group == 0 || inodes_per_group > bits || !table.is_multiple_of(block_size) {
            return wrong("an impossible number of inodes in a group", 0x28);
        }
        let groups = blocks.saturating_sub(first_block).div_ceil(blocks_per_group.max(1));
        if groups.checked_mul(inodes_per_group) != Some(u64::from(fields.le32(0)?)) {
            return wrong("a number of inodes that is not that of its groups", 0);
        }
        if groups > MAX_GROUPS {
            return Err(Error::unsupported(format!("a file system of {groups} groups")));
        }
        let descriptor = match (features.has(features::WIDE), u64::from(fields.le16(0xfe)?)) {
            (false, _) => 32,
            (true, size @ (64 | 128 | 256 | 512 | 1024)) => size,
            (true, _) => return wrong("an impossible size of descriptors", 0xfe),
        };
        let first_meta = match features.has(features::META_BG) {
            true => u64::from(fields.le32(0x104)?),
            false => u64::MAX,
        };
        let copies = match (features.has(features::SPARSE_SUPER2), features.has(features::SPARSE_SUPER)) {
            (true, _) => Copies::Two([fields.le32(0x24c)?, fields.le32(0x250)?]),
            (false, true) => Copies::Sparse,
            (false, false) => Copies::All,
        };
        let id = fields.array::<16>(0x68)?;
        let kept_seed = features.has(features::CSUM_SEED);
        let checks = match (features.has(features::METADATA_CSUM), features.has(features::GDT_CSUM)) {
            (true, true) => return wrong("checksums of two kinds at once", 0x64),
            (true, false) if kept_seed => Checks::Crc32c(fields.le32(0x270)?),
            (true, false) => Checks::Crc32c(crc32c_raw(!0, &id)),
            (false, _) if kept_seed => return wrong("a seed of checksums, and no checksums", 0x60),
            (false, true) => Checks::Crc16,
            (false, false) => Checks::None,
        };
        Ok(Geometry {
            block_size,
            blocks,
            first_block,
            cluster,
            clusters_per_group,
            blocks_per_group,
            groups,
            inode_table: table.checked_div(block_size).unwrap_or(0),
            inode_size,
            inodes_per_group,
            descriptor,
            flexible: features.has(features::FLEX_BG),
            first_meta,
            reserved: u64::from(fields.le16(0xce)?),
            copies,
            checks,
            id,
        })
    }

    /// The block in which the superblock lies.
    pub fn superblock(&self) -> u64 {
        u64::from(self.block_size == AT)
    }

    /// The byte at which a block begins.
    pub fn byte(&self, block: u64) -> u64 {
        // The product of all blocks was checked, and a block beyond them fails when it is read.
        block.saturating_mul(self.block_size)
    }

    /// Whether these blocks lie in the file system, and not before its first group.
    pub fn holds(&self, first: u64, count: u64) -> bool {
        first >= self.first_block && first.checked_add(count).is_some_and(|end| end <= self.blocks)
    }

    /// The first block of a group.
    pub fn start(&self, group: u64) -> u64 {
        group.saturating_mul(self.blocks_per_group).saturating_add(self.first_block)
    }

    /// How many blocks a group has.
    pub fn len(&self, group: u64) -> u64 {
        self.blocks.saturating_sub(self.start(group)).min(self.blocks_per_group)
    }

    /// How many descriptors a block holds; sizes of both are powers of two.
    pub fn per_block(&self) -> u64 {
        self.block_size.checked_div(self.descriptor).unwrap_or(1).max(1)
    }

    /// How many blocks of descriptors there are.
    pub fn descriptor_blocks(&self) -> u64 {
        self.groups.div_ceil(self.per_block().max(1))
    }

    /// Where the descriptor block with this index lies.
    pub fn descriptor_block(&self, index: u64) -> u64 {
        if index < self.first_meta {
            return self.superblock().saturating_add(1).saturating_add(index);
        }
        let group = index.saturating_mul(self.per_block());
        // It lies behind the superblock, which in the first group may itself lie behind the boot sector.
        let behind = match group {
            0 => self.superblock().saturating_sub(self.first_block).saturating_add(1),
            _ => u64::from(self.has_copy(group)),
        };
        self.start(group).saturating_add(behind)
    }

    /// Whether a group begins with a superblock.
    pub fn has_copy(&self, group: u64) -> bool {
        let power_of = |base: u64| {
            let mut power = 1u64;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        match self.copies {
            _ if group == 0 => true,
            Copies::All => true,
            Copies::Sparse => group == 1 || [3, 5, 7].into_iter().any(power_of),
            Copies::Two(two) => two.into_iter().any(|copy| u64::from(copy) == group),
        }
    }

    /// How many blocks at the beginning of a group the superblock and descriptors take, and how many more are kept for
    /// more descriptors.
    pub fn beginning(&self, group: u64) -> (u64, u64) {
        let copy = self.has_copy(group);
        let per_block = self.per_block().max(1);
        let index = group.checked_div(per_block).unwrap_or(0);
        if index < self.first_meta {
            return match copy {
                true => (self.descriptor_blocks().min(self.first_meta).saturating_add(1), self.reserved),
                false => (0, 0),
            };
        }
        // Groups that share a block of descriptors have it in the first two and in the last of them.
        let place = group.checked_rem(per_block).unwrap_or(0);
        let own = place <= 1 || place == per_block.saturating_sub(1);
        (u64::from(copy).saturating_add(u64::from(own)), 0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    /// Of 1 KiB blocks, and so of 16 descriptors in each; a file system that grew while it was mounted, beyond what was
    /// kept for its descriptors, has the first block of them behind the superblock and the others in their own groups.
    #[test]
    fn descriptors_lie_behind_the_superblock_and_in_their_own_groups() {
        let geometry = Geometry {
            block_size: 1024,
            blocks: 1 + 40 * 8192,
            first_block: 1,
            cluster: 1,
            clusters_per_group: 8192,
            blocks_per_group: 8192,
            groups: 40,
            inode_table: 100,
            inode_size: 256,
            inodes_per_group: 400,
            descriptor: 64,
            flexible: true,
            first_meta: 1,
            reserved: 7,
            copies: Copies::Sparse,
            checks: Checks::None,
            id: [0; 16],
        };
        let start = |group: u64| 1 + group * 8192;
        let places: Vec<u64> =
            (0..geometry.descriptor_blocks()).map(|index| geometry.descriptor_block(index)).collect();
        assert_eq!(places, [2, start(16), start(32)]);
        let copies: Vec<u64> = (0..40).filter(|group| geometry.has_copy(*group)).collect();
        assert_eq!(copies, [0, 1, 3, 5, 7, 9, 25, 27]);
        for (group, expected) in
            [(0, (2, 7)), (1, (2, 7)), (2, (0, 0)), (9, (2, 7)), (16, (1, 0)), (17, (1, 0)), (18, (0, 0))]
        {
            assert_eq!(geometry.beginning(group), expected, "{group}");
        }
        for (group, expected) in [(25, (1, 0)), (31, (1, 0)), (32, (1, 0)), (33, (1, 0)), (34, (0, 0))] {
            assert_eq!(geometry.beginning(group), expected, "{group}");
        }
        // All of them in their own groups, and a superblock behind the boot sector in the first one.
        let all = Geometry { first_meta: 0, copies: Copies::Two([1, 39]), ..geometry.clone() };
        assert_eq!([0, 1, 2].map(|index| all.descriptor_block(index)), [2, start(16), start(32)]);
        assert_eq!([0, 1, 2, 15, 39].map(|group| all.beginning(group).0), [2, 2, 0, 1, 1]);
        let clusters = Geometry { first_block: 0, cluster: 8, blocks: 40 * 8192, ..all };
        assert_eq!([0, 1].map(|index| clusters.descriptor_block(index)), [2, 16 * 8192]);
        let none = Geometry { first_meta: u64::MAX, copies: Copies::All, ..geometry };
        assert_eq!([0, 1, 2].map(|index| none.descriptor_block(index)), [2, 3, 4]);
        assert_eq!(none.beginning(18), (4, 7));
    }
}
