//! The journal (JBD2), applied in memory: which blocks are newer in it than in their places.
//!
//! The journal is a file of blocks, big-endian. Its first block is its superblock; the others, from `first` on, are a log
//! that goes round. In it each transaction is descriptor blocks, each followed by the blocks that it has tags for, and
//! blocks of revocations, and at last a commit block; these three have a header of 12 bytes: magic, kind, and the
//! transaction's number. A transaction without its commit block never was. The log ends at the first block that is not
//! what the next transaction, or the next block of this one, would begin with.
//!
//! | superblock at | |
//! |---|---|
//! | 0x0c, 0x10, 0x14 | size of a block, blocks, the log's first block |
//! | 0x18, 0x1c | number of the oldest transaction, and its block; 0 where there is none |
//! | 0x20 | error |
//! | 0x24, 0x28, 0x2c | features: compatible, incompatible, forbidding to write |
//! | 0x30 | UUID, which checksums of blocks begin with |
//! | 0x50 | kind of checksums |
//! | 0x54 | blocks of the area of fast commits, at the journal's end |
//! | 0xfc | checksum of its 1024 bytes |
//!
//! A kernel that replays this goes over it three times: for its end, for revocations, and for the blocks. So does this. A
//! kernel goes on after some errors, or takes a damaged block for the end; here each is the end of the attempt, because
//! what that kernel's file system would be afterwards cannot be known.
//!
//! Fast commits, which say what became of files rather than of blocks, are not followed: where there are any that a kernel
//! would replay, that is an error.

use std::collections::HashMap;

use super::super::Error;
use super::super::fields::{Block, Fields};
use super::super::view::View;
use super::blocks::{Blocks, JOURNAL_MAGIC, Newer};
use super::inode::{self, Run};
use super::superblock::Geometry;
use crate::checksum::{crc32_raw, crc32c_raw};

const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_1: u32 = 3;
const SUPERBLOCK_2: u32 = 4;
const REVOCATIONS: u32 = 5;

const COMPATIBLE_CHECKSUM: u32 = 0x1;
const REVOKE: u32 = 0x1;
const WIDE: u32 = 0x2;
const ASYNC_COMMIT: u32 = 0x4;
const CSUM_V2: u32 = 0x8;
const CSUM_V3: u32 = 0x10;
const FAST_COMMIT: u32 = 0x20;

const CRC32: u8 = 1;
const CRC32C: u8 = 4;

const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST: u32 = 8;

/// The size of the area of fast commits where the superblock does not say.
const FAST_COMMIT_BLOCKS: u64 = 256;
/// A log has at least so many blocks beside that area.
const MIN_BLOCKS: u64 = 1024;
/// What the area of fast commits begins with, where it holds any: a tag, and the length of what follows.
const FAST_HEAD: (u16, u16) = (9, 8);

/// More blocks or revocations to replay are not followed: each takes some 30 bytes of memory, twice. A journal of 1 GiB,
/// which is the largest that `mke2fs` makes unless it is told to, has not as many blocks of 4 KiB.
const MAX_REPLAYED: usize = 1 << 18;

/// What a byte takes that is in the checksum of its transaction, beside that it is read.
const TRANSACTION_CRC: u64 = 8;

/// How much of the journal is read at once.
const WINDOW: u64 = 256 << 10;

/// How the log's blocks are verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Checks {
    None,
    /// One CRC-32 over all blocks of a transaction.
    Transaction,
    /// A CRC-32C in each block, and in tags 16 bits of the blocks' own.
    Blocks16,
    /// The same with all 32 bits.
    Blocks32,
}

/// Reads the journal of a file system. `recover`: its superblock says that it is to be replayed.
pub fn replay(
    blocks: &Blocks<'_, '_>,
    geometry: &Geometry,
    recover: bool,
) -> Result<HashMap<u64, Newer>, Error> {
    let mut file = File::new(blocks.view, geometry, inode::journal(blocks, geometry)?);
    let superblock = file.read(0)?;
    let log = Log::parse(superblock.fields(), geometry, &file)?;
    if log.start == 0 {
        log.fast_commits(&mut file, log.sequence)?;
        return Ok(HashMap::new());
    }
    if !recover {
        return Err(superblock
            .fields()
            .corrupt("a journal to replay that its file system knows nothing of", 0x1c));
    }
    let found = log.scan(&mut file)?;
    log.fast_commits(&mut file, log.sequence.wrapping_add(found.transactions))?;
    log.apply(&mut file, &found)
}

/// The journal as a file.
struct File<'a, 'd> {
    view: &'a View<'d>,
    geometry: &'a Geometry,
    /// In its own order.
    runs: Vec<Run>,
    /// The same in the order of the file system.
    places: Vec<Run>,
    /// Blocks that were read together: the first, and all of them.
    window: Option<(u64, Block)>,
}

impl<'a, 'd> File<'a, 'd> {
    fn new(view: &'a View<'d>, geometry: &'a Geometry, runs: Vec<Run>) -> File<'a, 'd> {
        let mut places = runs.clone();
        places.sort_unstable_by_key(|run| run.block);
        File { view, geometry, runs, places, window: None }
    }

    /// How many blocks it has.
    fn count(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.logical.saturating_add(run.count))
    }

    /// Where a block lies, and how many follow it in a row, itself among them.
    fn place(&self, logical: u64) -> Result<(u64, u64), Error> {
        let at = self.runs.partition_point(|run| run.logical.saturating_add(run.count) <= logical);
        let place = self.runs.get(at).and_then(|run| {
            let skip = logical.checked_sub(run.logical)?;
            Some((run.block.checked_add(skip)?, run.count.checked_sub(skip)?))
        });
        place.ok_or(Error::Corrupt { what: "a journal that ends before its log does", at: 0 })
    }

    /// Reads a block.
    fn read(&mut self, logical: u64) -> Result<Block, Error> {
        let size = self.geometry.block_size;
        let known = self.window.as_ref().and_then(|(first, read)| {
            let part = read.fields().part(logical.checked_sub(*first)?.checked_mul(size)?, size).ok()?;
            Some(Block::new(part.all().to_vec(), part.at()))
        });
        if let Some(block) = known {
            return Ok(block);
        }
        let (block, row) = self.place(logical)?;
        let count = WINDOW.checked_div(size).unwrap_or(1).clamp(1, row.max(1));
        let read = self.view.read(self.geometry.byte(block), count.saturating_mul(size))?;
        let part = read.fields().part(0, size)?;
        let block = Block::new(part.all().to_vec(), part.at());
        self.window = Some((logical, read));
        Ok(block)
    }

    /// Whether one of the file system's blocks is one of the journal's.
    fn has(&self, block: u64) -> bool {
        let at = self.places.partition_point(|run| run.block.saturating_add(run.count) <= block);
        self.places.get(at).is_some_and(|run| run.block <= block)
    }
}

/// A block that is to be replayed.
#[derive(Clone, Copy, Debug)]
struct Tag {
    /// Where it belongs.
    block: u64,
    /// Which block of the journal it is.
    logical: u64,
    /// Of how many transactions in the log its own is not the oldest.
    age: u32,
    escaped: bool,
    checksum: u32,
}

/// All transactions of the log that were committed.
#[derive(Default)]
struct Found {
    transactions: u32,
    tags: Vec<Tag>,
    /// A block is not replayed from this transaction, nor from older ones.
    revoked: HashMap<u64, u32>,
}

/// What the journal's superblock says.
struct Log {
    block_size: u64,
    first: u64,
    /// Behind the last block.
    end: u64,
    sequence: u32,
    start: u64,
    wide: bool,
    checks: Checks,
    /// What the checksums of blocks begin with.
    seed: u32,
    fast: bool,
}

impl Log {
    fn parse(fields: Fields<'_>, geometry: &Geometry, file: &File<'_, '_>) -> Result<Log, Error> {
        let wrong = |what, at| Err(fields.corrupt(what, at));
        if !fields.has(0, &JOURNAL_MAGIC) {
            return wrong("a journal without its magic", 0);
        }
        let kind = fields.be32(4)?;
        let [compatible, incompatible, read_only] = match kind {
            SUPERBLOCK_1 => [0; 3],
            SUPERBLOCK_2 => [fields.be32(0x24)?, fields.be32(0x28)?, fields.be32(0x2c)?],
            _ => return wrong("a journal whose first block is no superblock", 4),
        };
        let strange = incompatible & !(REVOKE | WIDE | ASYNC_COMMIT | CSUM_V2 | CSUM_V3 | FAST_COMMIT);
        if strange != 0 || read_only != 0 {
            let feature = if strange != 0 { strange } else { read_only };
            return Err(Error::unsupported(format!("a journal with the feature {feature:#x}")));
        }
        let transaction = compatible & COMPATIBLE_CHECKSUM != 0;
        let checks = match (transaction, incompatible & CSUM_V2 != 0, incompatible & CSUM_V3 != 0) {
            (false, false, false) => Checks::None,
            (true, false, false) => Checks::Transaction,
            (false, true, false) => Checks::Blocks16,
            (false, false, true) => Checks::Blocks32,
            _ => return wrong("a journal with checksums of several kinds", 0x28),
        };
        if matches!(checks, Checks::Blocks16 | Checks::Blocks32) {
            if fields.u8(0x50)? != CRC32C {
                return wrong("a journal with checksums of an unknown kind", 0x50);
            }
            let parts = [fields.bytes(0, 0xfc)?, &[0; 4], fields.bytes(0x100, 0x300)?];
            if parts.into_iter().fold(!0, crc32c_raw) != fields.be32(0xfc)? {
                return wrong("a journal whose superblock's checksum does not hold", 0xfc);
            }
        }
        if u64::from(fields.be32(0x0c)?) != geometry.block_size {
            return wrong("a journal whose blocks are not those of its file system", 0x0c);
        }
        if fields.be32(0x20)? != 0 {
            return Err(Error::unsupported("a journal that was given up for an error"));
        }
        let [count, first, sequence, start] =
            [fields.be32(0x10)?, fields.be32(0x14)?, fields.be32(0x18)?, fields.be32(0x1c)?];
        let (count, first, start) = (u64::from(count), u64::from(first), u64::from(start));
        if count > file.count() {
            return wrong("a journal that is longer than its file", 0x10);
        }
        let fast = incompatible & FAST_COMMIT != 0;
        let area = match (fast, u64::from(fields.be32(0x54)?)) {
            (false, _) => 0,
            (true, 0) => FAST_COMMIT_BLOCKS,
            (true, area) => area,
        };
        let end = count.checked_sub(area).filter(|end| !fast || *end >= MIN_BLOCKS);
        let Some(end) = end.filter(|end| first >= 1 && first < *end) else {
            return wrong("a journal without a log", 0x10);
        };
        if start != 0 && (start < first || start >= end) {
            return wrong("a journal whose log begins outside of it", 0x1c);
        }
        let seed = crc32c_raw(!0, fields.bytes(0x30, 16)?);
        let block_size = geometry.block_size;
        Ok(Log {
            block_size,
            first,
            end,
            sequence,
            start,
            wide: incompatible & WIDE != 0,
            checks,
            seed,
            fast,
        })
    }

    fn next(&self, logical: u64) -> u64 {
        match logical.saturating_add(1) {
            next if next < self.end => next,
            _ => self.first,
        }
    }

    /// Whether the log's blocks have checksums of their own.
    fn each(&self) -> bool {
        matches!(self.checks, Checks::Blocks16 | Checks::Blocks32)
    }

    /// That the area of fast commits holds none that would be replayed after the last transaction: such a one names the
    /// transaction that was under way, which is the `next`.
    fn fast_commits(&self, file: &mut File<'_, '_>, next: u32) -> Result<(), Error> {
        // Of the area's first block some writers make no use.
        for logical in [self.end, self.end.saturating_add(1)] {
            if !self.fast || logical >= file.count() {
                continue;
            }
            let read = file.read(logical)?;
            let fields = read.fields();
            let head = (fields.le16(0)?, fields.le16(2)?) == FAST_HEAD;
            // Numbers go round: half of them are older than any other.
            let stale = fields.le32(8)?.wrapping_sub(next) > u32::MAX >> 1;
            if head && !stale {
                return Err(Error::unsupported("a journal with fast commits"));
            }
        }
        Ok(())
    }

    /// Goes through the log to its end.
    fn scan(&self, file: &mut File<'_, '_>) -> Result<Found, Error> {
        let mut found = Found::default();
        let mut way = Way { at: self.start, left: self.end.saturating_sub(self.first) };
        // Of the transaction that is being read.
        let (mut tags, mut revoked) = (Vec::new(), Vec::new());
        let mut register = !0;
        loop {
            let block = file.read(way.at)?;
            let fields = block.fields();
            let sequence = self.sequence.wrapping_add(found.transactions);
            if !fields.has(0, &JOURNAL_MAGIC) || fields.be32(8)? != sequence {
                return Ok(found);
            }
            way.step(self, fields)?;
            match fields.be32(4)? {
                DESCRIPTOR => {
                    self.verify(fields)?;
                    let mut crc = |block: &Block| {
                        register = crc32_of_transaction(register, block.bytes());
                        file.view.spend(self.block_size.saturating_mul(TRANSACTION_CRC))
                    };
                    if self.checks == Checks::Transaction {
                        crc(&block)?;
                    }
                    for tag in self.tags(fields)? {
                        let logical = way.at;
                        way.step(self, fields)?;
                        tags.push(Tag { logical, age: found.transactions, ..tag });
                        if self.checks == Checks::Transaction {
                            crc(&file.read(logical)?)?;
                        }
                    }
                }
                REVOCATIONS => {
                    self.verify(fields)?;
                    self.revocations(fields, &mut revoked)?;
                }
                COMMIT => {
                    self.verify_commit(fields, register)?;
                    register = !0;
                    found.tags.append(&mut tags);
                    found.revoked.extend(revoked.drain(..).map(|block| (block, found.transactions)));
                    found.transactions = found.transactions.saturating_add(1);
                }
                _ => return Err(fields.corrupt("a block of the journal that is of no kind", 4)),
            }
            let most = [found.tags.len(), tags.len(), found.revoked.len(), revoked.len()];
            if most.into_iter().any(|count| count > MAX_REPLAYED) {
                return Err(Error::unsupported("a journal with so much to replay"));
            }
        }
    }

    /// The tags of a descriptor block; which blocks of the journal they are for is not in them.
    fn tags(&self, fields: Fields<'_>) -> Result<Vec<Tag>, Error> {
        let len = match (self.checks, self.wide) {
            (Checks::Blocks32, _) => 16u64,
            // Two bytes more than there is use for, by a mistake of those who made it.
            (Checks::Blocks16, true) => 14,
            (Checks::Blocks16, false) => 10,
            (_, true) => 12,
            (_, false) => 8,
        };
        let end = self.block_size.saturating_sub(if self.each() { 4 } else { 0 });
        let mut tags = Vec::new();
        let mut at = 12u64;
        while at.saturating_add(len) <= end {
            let tag = fields.part(at, len)?;
            let (flags, checksum) = match self.checks {
                Checks::Blocks32 => (tag.be32(4)?, tag.be32(12)?),
                _ => (u32::from(tag.be16(6)?), u32::from(tag.be16(4)?)),
            };
            if flags & !(ESCAPED | SAME_UUID | LAST) != 0 {
                return Err(tag.corrupt("a tag of the journal with an unknown flag", 4));
            }
            let high = if self.wide { tag.be32(8)? } else { 0 };
            let block = u64::from(tag.be32(0)?) | (u64::from(high) << 32);
            tags.push(Tag { block, logical: 0, age: 0, escaped: flags & ESCAPED != 0, checksum });
            at = at.saturating_add(len).saturating_add(if flags & SAME_UUID != 0 { 0 } else { 16 });
            if flags & LAST != 0 {
                break;
            }
        }
        Ok(tags)
    }

    /// Adds the blocks that a block of revocations names.
    fn revocations(&self, fields: Fields<'_>, revoked: &mut Vec<u64>) -> Result<(), Error> {
        let used = u64::from(fields.be32(12)?);
        if used < 16 || used > self.block_size.saturating_sub(if self.each() { 4 } else { 0 }) {
            return Err(fields.corrupt("a block of revocations that is longer than a block", 12));
        }
        let len = if self.wide { 8u64 } else { 4 };
        let mut at = 16u64;
        while at.saturating_add(len) <= used {
            revoked.push(if self.wide { fields.be64(at)? } else { u64::from(fields.be32(at)?) });
            at = at.saturating_add(len);
        }
        Ok(())
    }

    /// That the checksum at the end of a block holds, if there is one.
    fn verify(&self, fields: Fields<'_>) -> Result<(), Error> {
        let at = self.block_size.saturating_sub(4);
        let parts = [fields.bytes(0, at)?, &[0; 4]];
        if self.each() && parts.into_iter().fold(self.seed, crc32c_raw) != fields.be32(at)? {
            return Err(fields.corrupt("a block of the journal whose checksum does not hold", at));
        }
        Ok(())
    }

    /// The same for a commit block. `register`: the checksum of the transaction.
    fn verify_commit(&self, fields: Fields<'_>, register: u32) -> Result<(), Error> {
        let found = fields.be32(16)?;
        let holds = match self.checks {
            Checks::None => true,
            Checks::Transaction => {
                let kind = (fields.u8(12)?, fields.u8(13)?);
                // Transactions that were written before checksums were turned on have none.
                (kind == (CRC32, 4) && found == register) || (kind == (0, 0) && found == 0)
            }
            Checks::Blocks16 | Checks::Blocks32 => {
                let rest = fields.bytes(20, self.block_size.saturating_sub(20))?;
                [fields.bytes(0, 16)?, &[0; 4], rest].into_iter().fold(self.seed, crc32c_raw) == found
            }
        };
        if !holds {
            return Err(fields.corrupt("a transaction whose checksum does not hold", 16));
        }
        Ok(())
    }

    /// Where the newest content of each block lies.
    fn apply(&self, file: &mut File<'_, '_>, found: &Found) -> Result<HashMap<u64, Newer>, Error> {
        let mut newer = HashMap::new();
        for tag in &found.tags {
            if found.revoked.get(&tag.block).is_some_and(|until| *until >= tag.age) {
                continue;
            }
            let at = file.geometry.byte(file.place(tag.logical)?.0);
            if tag.block >= file.geometry.blocks || file.has(tag.block) {
                return Err(Error::Corrupt { what: "a journal with a block for where none can be", at });
            }
            if self.each() {
                let read = file.read(tag.logical)?;
                let number = self.sequence.wrapping_add(tag.age).to_be_bytes();
                let register = [&number, read.bytes()].into_iter().fold(self.seed, crc32c_raw);
                let kept = if self.checks == Checks::Blocks32 { register } else { register & 0xffff };
                if kept != tag.checksum {
                    return Err(Error::Corrupt {
                        what: "a block in the journal whose checksum does not hold",
                        at,
                    });
                }
            }
            newer.insert(tag.block, Newer { at, escaped: tag.escaped });
        }
        Ok(newer)
    }
}

/// The way through the log.
struct Way {
    at: u64,
    /// How many blocks were not seen yet: more than the log has would be some of them twice.
    left: u64,
}

impl Way {
    /// Goes one block further; `fields` is what led there.
    fn step(&mut self, log: &Log, fields: Fields<'_>) -> Result<(), Error> {
        let left = self.left.checked_sub(1);
        self.left = left.ok_or_else(|| fields.corrupt("a journal whose log has no end", 0))?;
        self.at = log.next(self.at);
        Ok(())
    }
}

/// The register of a CRC-32 whose bits come the other way round.
fn crc32_of_transaction(register: u32, bytes: &[u8]) -> u32 {
    let reversed: Vec<u8> = bytes.iter().map(|byte| byte.reverse_bits()).collect();
    crc32_raw(register.reverse_bits(), &reversed).reverse_bits()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_of_a_transaction_has_the_check_value_of_the_catalogues() {
        // As CRC-32/MPEG-2, of which nothing is inverted or reversed either.
        assert_eq!(super::crc32_of_transaction(!0, b"123456789"), 0x0376_e6e7);
    }
}
