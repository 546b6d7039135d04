//! The superblock: at the beginning of the place, and a copy at the beginning of every allocation group.

use super::super::Error;
use super::super::fields::{Block, Fields, uuid};
use super::super::view::View;
use super::checksum_holds;

/// The magic at the beginning of each.
const MAGIC: &[u8] = b"XFSB";
/// The smallest allocation group.
const MIN_GROUP_BLOCKS: u64 = 64;

// Bits of the version.
const VERSION: u16 = 0xf;
const LOG_V2: u16 = 0x0400;
const CASE_INSENSITIVE: u16 = 0x4000;
const MORE: u16 = 0x8000;
/// Attributes, link counts, quotas, aligned inodes, alignment to stripes, the log's version, sectors that are not of 512 bytes, the
/// state of extents, directories of version 2, names in any case, more bits. Without the one of shared read-only volumes, which
/// Linux never had.
const VERSION_KNOWN: u16 = 0xfdff;

// Bits of the second set.
const LAZY: u32 = 0x02;
const PROJECT_32: u32 = 0x80;
const CHECKSUMS: u32 = 0x100;
const FILE_TYPE: u32 = 0x200;
/// Lazy counters, attributes of version 2, project numbers of 32 bits, checksums, file types.
const SECOND_KNOWN: u32 = LAZY | 0x08 | PROJECT_32 | CHECKSUMS | FILE_TYPE;

/// Features with which an older kernel may only read. All of them take blocks, and all the blocks that they take are in
/// neither of the trees of free ones.
const READ_ONLY: &[(u32, &str)] = &[(1, "finobt"), (2, "rmapbt"), (4, "reflink"), (8, "inobtcount")];

/// Features with which an older kernel may not even read. None of these changes which blocks are free.
const INCOMPATIBLE: &[(u32, &str)] = &[
    (1, "ftype"),
    (2, "sparse"),
    (META_UUID, "meta_uuid"),
    (8, "bigtime"),
    (NEEDS_REPAIR, "needsrepair"),
    (0x20, "nrext64"),
    (0x40, "exchange"),
    (0x80, "parent"),
];

const META_UUID: u32 = 4;
const NEEDS_REPAIR: u32 = 0x10;

/// What the superblock says.
#[derive(Debug)]
pub struct Superblock {
    pub version: u16,
    /// The size of a block in bytes, and of the sectors in which the groups' headers lie.
    pub block: u64,
    pub sector: u64,
    /// In blocks: all of it, and a group.
    pub blocks: u64,
    pub group_blocks: u64,
    /// How many groups there are, and how many bits of a block's number count the blocks in its group.
    pub groups: u64,
    group_shift: u32,
    pub label: Option<String>,
    /// As it is shown.
    pub own_uuid: [u8; 16],
    /// As it is in other structures: another one once the shown one was changed.
    pub meta_uuid: [u8; 16],
    /// Where the log lies, in a group's number and a block of it, and its length in blocks. `None` where it is on another
    /// device.
    pub log: Option<(u64, u64, u64)>,
    /// How many blocks are free.
    pub free: u64,
    /// The place in the log of its last change; version 5 knows.
    pub lsn: Option<u64>,
    bits: u16,
    second: u32,
    read_only: u32,
    incompatible: u32,
    realtime: bool,
    unfinished: bool,
}

impl Superblock {
    /// The one at the beginning, if there is one.
    pub fn read(view: &View<'_>) -> Result<Option<Superblock>, Error> {
        if view.size() < 512 {
            return Ok(None);
        }
        let head = view.read(0, 512)?;
        if !head.fields().has(0, MAGIC) {
            return Ok(None);
        }
        // The checksum is that of the whole sector.
        let sector = u64::from(head.fields().be16(102)?);
        if !(512..=32768).contains(&sector) || !sector.is_power_of_two() {
            return Err(head.fields().corrupt("a superblock with an impossible size of sectors", 102));
        }
        let block: Block = view.read(0, sector)?;
        Superblock::parse(block.fields()).map(Some)
    }

    fn parse(fields: Fields<'_>) -> Result<Superblock, Error> {
        let bits = fields.be16(100)?;
        let version = bits & VERSION;
        let v5 = version == 5;
        if v5 && !checksum_holds(fields, 224)? {
            return Err(fields.corrupt("a superblock whose checksum does not hold", 224));
        }
        let block = u64::from(fields.be32(4)?);
        if !(512..=65536).contains(&block)
            || !block.is_power_of_two()
            || block.ilog2() != u32::from(fields.u8(120)?)
        {
            return Err(fields.corrupt("a superblock with an impossible size of blocks", 4));
        }
        let sector = u64::from(fields.be16(102)?);
        let (blocks, group_blocks) = (fields.be64(8)?, u64::from(fields.be32(84)?));
        let groups = u64::from(fields.be32(88)?);
        let group_shift = u32::from(fields.u8(124)?);
        let bytes = blocks.checked_mul(block);
        let last = groups.checked_sub(1).and_then(|full| blocks.checked_sub(full.checked_mul(group_blocks)?));
        let headers = sector.saturating_mul(4);
        // The last group holds at least its headers, and the smallest of all.
        let last = last.filter(|last| (MIN_GROUP_BLOCKS..=group_blocks).contains(last));
        if last.is_none_or(|last| last.saturating_mul(block) < headers) || bytes.is_none() {
            return Err(fields.corrupt("a superblock whose groups do not make up its blocks", 84));
        }
        // The logarithm, rounded up.
        if group_blocks.checked_next_power_of_two().map(u64::ilog2) != Some(group_shift) {
            return Err(fields.corrupt("a superblock whose block numbers do not fit its groups", 124));
        }
        let log = (fields.be64(48)?, u64::from(fields.be32(96)?));
        // The two versions of this field were once written to different places.
        let second = if bits & MORE == 0 { 0 } else { fields.be32(200)? | fields.be32(204)? };
        let extra = |at| if v5 { fields.be32(at) } else { Ok(0) };
        let incompatible = extra(216)?;
        let own_uuid = fields.array(32)?;
        let found = Superblock {
            version,
            block,
            sector,
            blocks,
            group_blocks,
            groups,
            group_shift,
            label: fields.label(108, 12)?,
            own_uuid,
            meta_uuid: if incompatible & META_UUID == 0 { own_uuid } else { fields.array(248)? },
            log: None,
            free: fields.be64(144)?,
            lsn: if v5 { Some(fields.be64(240)?) } else { None },
            bits,
            second,
            read_only: extra(212)?,
            incompatible,
            realtime: fields.be64(16)? != 0,
            unfinished: fields.u8(126)? != 0,
        };
        Ok(Superblock { log: found.place_of_log(fields, log)?, ..found })
    }

    fn place_of_log(&self, fields: Fields<'_>, log: (u64, u64)) -> Result<Option<(u64, u64, u64)>, Error> {
        let (start, len) = log;
        if start == 0 {
            return Ok(None);
        }
        let place = self.split(start).and_then(|(group, block)| {
            let end = block.checked_add(len)?;
            // It lies in one group, behind its headers, which are within its first block or some.
            let free = self.headers()..=self.blocks_of(group);
            (len > 0 && free.contains(&block) && free.contains(&end)).then_some((group, block, len))
        });
        place.map(Some).ok_or_else(|| fields.corrupt("a superblock whose log lies where none can", 48))
    }

    /// The group and the block in it of a block's number.
    fn split(&self, number: u64) -> Option<(u64, u64)> {
        let group = number.checked_shr(self.group_shift)?;
        let block = number.checked_sub(group.checked_shl(self.group_shift)?)?;
        (group < self.groups && block < self.blocks_of(group)).then_some((group, block))
    }

    /// How many blocks the headers of a group take.
    pub fn headers(&self) -> u64 {
        self.sector.saturating_mul(4).div_ceil(self.block)
    }

    /// How many blocks a group has.
    pub fn blocks_of(&self, group: u64) -> u64 {
        self.blocks.saturating_sub(group.saturating_mul(self.group_blocks)).min(self.group_blocks)
    }

    /// Where a group begins.
    pub fn start_of(&self, group: u64) -> u64 {
        // The whole was seen to fit into 64 bits.
        group.saturating_mul(self.group_blocks).saturating_mul(self.block)
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.blocks.saturating_mul(self.block)
    }

    pub fn is_v5(&self) -> bool {
        self.version == 5
    }

    pub fn has_rmap(&self) -> bool {
        self.read_only & 2 != 0
    }

    pub fn has_reflink(&self) -> bool {
        self.read_only & 4 != 0
    }

    pub fn has_finobt(&self) -> bool {
        self.read_only & 1 != 0
    }

    pub fn has_lazy_counters(&self) -> bool {
        self.is_v5() || self.second & LAZY != 0
    }

    pub fn has_log_v2(&self) -> bool {
        self.bits & LOG_V2 != 0
    }

    pub fn needs_repair(&self) -> bool {
        self.incompatible & NEEDS_REPAIR != 0
    }

    pub fn uuid(&self) -> Option<String> {
        (self.own_uuid != [0; 16]).then(|| uuid(self.own_uuid))
    }

    /// What is wrong with it.
    pub fn corrupt(&self, what: &'static str, at: u64) -> Error {
        Error::Corrupt { what, at }
    }

    /// Its features, as `mkfs.xfs` calls them.
    pub fn features(&self) -> Vec<String> {
        let named = |bits: u32, names: &'static [(u32, &'static str)]| {
            names.iter().filter(move |(bit, _)| bits & bit != 0).map(|(_, name)| *name)
        };
        let v5 = self.is_v5();
        let own = [
            (v5, "crc"),
            (v5 || self.second & PROJECT_32 != 0, "projid32bit"),
            (self.has_lazy_counters(), "lazy-count"),
            (self.bits & CASE_INSENSITIVE != 0, "ascii-ci"),
            (!v5 && self.second & FILE_TYPE != 0, "ftype"),
        ];
        let own = own.into_iter().filter_map(|(has, name)| has.then_some(name));
        let all = own.chain(named(self.read_only, READ_ONLY)).chain(named(self.incompatible, INCOMPATIBLE));
        all.map(str::to_owned).collect()
    }

    /// Why its trees of free extents are not to be believed, or not to be understood, whatever is in them.
    pub fn obstacle(&self) -> Option<Error> {
        let known = |names: &[(u32, &str)]| names.iter().fold(0, |bits, (bit, _)| bits | bit);
        let unknown = [
            (u32::from(self.bits & !VERSION_KNOWN & !VERSION), "version bit"),
            (self.second & !SECOND_KNOWN, "feature"),
            (self.read_only & !known(READ_ONLY), "read-only compatible feature"),
            (self.incompatible & !known(INCOMPATIBLE), "incompatible feature"),
        ];
        let unknown = unknown.into_iter().find(|(bits, _)| *bits != 0);
        // The bit of checksums says the same as the version.
        let torn = self.is_v5() != (self.second & CHECKSUMS != 0);
        match self.version {
            4 | 5 if torn => {
                Some(self.corrupt(
                    "a superblock whose version and feature of checksums contradict each other",
                    100,
                ))
            }
            4 | 5 => match unknown {
                Some((bits, what)) => Some(Error::unsupported(format!("the {what} {bits:#x}"))),
                None if self.needs_repair() => {
                    Some(Error::unsupported("a file system that is to be repaired first"))
                }
                None if self.unfinished => Some(Error::unsupported("a file system that is still being made")),
                None if self.realtime => Some(Error::unsupported("a file system with a real-time device")),
                None => None,
            },
            other => Some(Error::unsupported(format!("the version {other}"))),
        }
    }

    /// That a copy, which is all of a group's first sector, is one of this superblock. What may change while mounted is not
    /// compared: it is brought up to date in the first one only.
    pub fn check_copy(&self, copy: Fields<'_>) -> Result<(), Error> {
        if !copy.has(0, MAGIC) {
            return Err(copy.corrupt("a copy of the superblock that is none", 0));
        }
        if self.is_v5() && !checksum_holds(copy, 224)? {
            return Err(copy.corrupt("a copy of the superblock whose checksum does not hold", 224));
        }
        let same = u64::from(copy.be32(4)?) == self.block
            && copy.be64(8)? == self.blocks
            && u64::from(copy.be32(84)?) == self.group_blocks
            && u64::from(copy.be32(88)?) == self.groups
            && u64::from(copy.be16(102)?) == self.sector
            && copy.be16(100)? & VERSION == self.version;
        let log = copy.be64(48)?;
        let log = if log == 0 { None } else { self.split(log) };
        let same = same && log == self.log.map(|(group, block, _)| (group, block));
        match same
            && self.log.is_none_or(|(_, _, len)| copy.be32(96).is_ok_and(|copy| u64::from(copy) == len))
        {
            true => Ok(()),
            false => Err(copy.corrupt("a copy of the superblock that contradicts it", 0)),
        }
    }
}
