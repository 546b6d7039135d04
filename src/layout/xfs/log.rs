//! The log: where it ends, and whether anything in it is to be replayed.
//!
//! It is a ring of blocks of 512 bytes. Each round is a *cycle* with a number, and each block begins with that of the round
//! in which it was last written: a record's header at its second word, behind its magic; any other block at its first word, the
//! four bytes that belong there being in the header. So blocks of the present cycle are followed, from where the next
//! record will be written on, by blocks of the one before; that place is the *head*.
//!
//! Whoever unmounts writes all that was logged to its place, and then a record that says just that. So there is nothing to
//! replay where the record that ends at the head is such a one. Several records are on their way to the disk at once, and
//! with the power they may stop in any order; so what lies around the head must be of its cycle and free of gaps.
//!
//! Whoever freezes (and whoever does nothing for a minute) writes all that was logged to its place as well, and then logs the
//! superblock, so that a mount looks for what it has to clean up. The *tail*, before which all is in its place, is then such a
//! record, and so are all behind it. A replay would change the superblock's counters and nothing else; see [`cover`].

mod cover;

use super::super::Error;
use super::super::fields::{Block, Fields};
use super::super::view::View;
use super::superblock::Superblock;
use super::{Lsn, checksum_holds};

/// The size of the log's blocks.
const BLOCK: u64 = 512;
/// The same where memory is counted.
const BLOCK_LEN: usize = 512;
/// The magic of a record's header.
const MAGIC: &[u8] = b"\xfe\xed\xba\xbe";
/// What a record of eight buffers at most may be on its way to the disk, of 256 KiB each; and as much again for good measure.
const WINDOW: u64 = (4 << 20) / BLOCK;
/// The most blocks of a record, with its headers.
const MAX_RECORD: u64 = (256 << 10) / BLOCK;
/// How many blocks' first words are in one header.
const WORDS: u64 = 64;
/// A covered log has two records behind its tail.
const MAX_COVERS: u64 = 8;
/// How much is read at once.
const CHUNK: u64 = (1 << 20) / BLOCK;

/// Where a log ends in which nothing is to be replayed that changes what is free.
#[derive(Clone, Copy, Debug)]
pub struct End {
    pub head: Lsn,
    /// Whether nothing at all is to be replayed.
    pub clean: bool,
}

/// The end of the log; or why it has none, or why what is to be replayed may change what is free.
pub fn end(view: &View<'_>, superblock: &Superblock) -> Result<End, Error> {
    let log = Log::of(view, superblock)?;
    let head = log.head()?;
    log.around(head)?;
    let last = log.record_before(head)?;
    let clean = last.is_unmount()?;
    if !clean {
        log.only_covers(head, &last)?;
    }
    Ok(End { head: head.lsn(), clean })
}

struct Log<'a> {
    view: &'a View<'a>,
    superblock: &'a Superblock,
    /// Where it begins on the disk.
    start: u64,
    /// How many blocks of 512 bytes it has.
    blocks: u64,
}

/// The first block that is not of the present cycle, which is the log's end where all blocks are.
#[derive(Clone, Copy)]
struct Head {
    block: u64,
    cycle: u32,
    /// Where a gap without a cycle ends that the head is followed by; the head itself, but in a log that was emptied.
    gap: u64,
}

impl Head {
    fn lsn(self) -> Lsn {
        u64::from(self.cycle) << 32 | self.block
    }

    /// What a record that begins at a block says of its place.
    fn lsn_of(self, block: u64) -> Lsn {
        u64::from(self.cycle_of(block)) << 32 | block
    }

    /// The cycle of a block. There is one before the first one: zero, as in a log that was not written to its end yet.
    fn cycle_of(self, block: u64) -> u32 {
        match block {
            _ if block < self.block => self.cycle,
            _ if block < self.gap => 0,
            _ => self.cycle.saturating_sub(1),
        }
    }
}

/// A record, in one piece also where it goes over the log's end.
struct Record {
    /// Its headers and what they are of.
    bytes: Block,
    /// How many blocks the headers take.
    headers: u64,
}

impl<'a> Log<'a> {
    fn of(view: &'a View<'a>, superblock: &'a Superblock) -> Result<Log<'a>, Error> {
        let Some((group, block, len)) = superblock.log else {
            return Err(Error::unsupported("a log on another device"));
        };
        let start = superblock.start_of(group).saturating_add(block.saturating_mul(superblock.block));
        // Blocks are of whole ones of 512 bytes.
        Ok(Log { view, superblock, start, blocks: len.saturating_mul(superblock.block) / BLOCK })
    }

    /// Where a block lies on the disk.
    fn at(&self, block: u64) -> u64 {
        self.start.saturating_add(block.saturating_mul(BLOCK))
    }

    fn corrupt(&self, what: &'static str, block: u64) -> Error {
        Error::Corrupt { what, at: self.at(block) }
    }

    fn cycle(&self, block: u64) -> Result<u32, Error> {
        cycle(self.view.read(self.at(block), BLOCK)?.fields())
    }

    fn head(&self) -> Result<Head, Error> {
        let (mut low, mut high) = (0, self.blocks.saturating_sub(1));
        let (first, last) = (self.cycle(low)?, self.cycle(high)?);
        if first == 0 {
            return Err(self.corrupt("a log that was never written", 0));
        }
        if first == last {
            return Ok(Head { block: self.blocks, cycle: first, gap: self.blocks });
        }
        if first.checked_sub(1) != Some(last) {
            return Err(self.corrupt("a log with a gap in its cycles", high));
        }
        if let Some(head) = self.emptied(first)? {
            return Ok(head);
        }
        // The first is of this cycle and the last of the one before, and somewhere between one follows on the other.
        while high.saturating_sub(low) > 1 {
            let middle = low.midpoint(high);
            match self.cycle(middle)? {
                cycle if cycle == first => low = middle,
                cycle if cycle == last => high = middle,
                _ => return Err(self.corrupt("a log with a gap in its cycles", middle)),
            }
        }
        Ok(Head { block: high, cycle: first, gap: high })
    }

    /// The head of a log that the tools have emptied: one record of their make at its beginning, the rest of a record's greatest
    /// length without a cycle, and from there on records of the cycle before.
    fn emptied(&self, cycle: u32) -> Result<Option<Head>, Error> {
        let first = Head { block: 1, cycle, gap: 1 };
        let behind = match self.record_at(first, 0) {
            Ok(Some(record)) if record.made_empty()? => record.len(),
            Err(Error::Io(error)) => return Err(error.into()),
            _ => return Ok(None),
        };
        let head = Head { block: behind, cycle, gap: MAX_RECORD };
        Ok((behind < MAX_RECORD && MAX_RECORD < self.blocks && self.cycle(behind)? == 0).then_some(head))
    }

    /// That the blocks on either side of the head are of the cycles that its place says, and so it is the only such place.
    fn around(&self, head: Head) -> Result<(), Error> {
        let window = WINDOW.saturating_mul(2).min(self.blocks);
        let mut from = head.block.saturating_add(self.blocks).saturating_sub(window / 2);
        let mut left = window;
        while left > 0 {
            from = from.checked_rem(self.blocks).unwrap_or(0);
            let count = left.min(CHUNK).min(self.blocks.saturating_sub(from));
            let chunk = self.view.read(self.at(from), count.saturating_mul(BLOCK))?;
            for index in 0..count {
                let block = from.saturating_add(index);
                let found = cycle(chunk.fields().part(index.saturating_mul(BLOCK), BLOCK)?)?;
                if found != head.cycle_of(block) {
                    return Err(self.corrupt("a log with a gap in its cycles", block));
                }
            }
            from = from.saturating_add(count);
            left = left.saturating_sub(count);
        }
        Ok(())
    }

    /// The record that ends at the head.
    fn record_before(&self, head: Head) -> Result<Record, Error> {
        let lost = || self.corrupt("a log without a record at its end", head.block);
        for len in 1..=MAX_RECORD.min(self.blocks) {
            let before = head.block.saturating_add(self.blocks).saturating_sub(len);
            let first = before.checked_rem(self.blocks).unwrap_or(0);
            let block = self.view.read(self.at(first), BLOCK)?;
            if block.fields().has(0, MAGIC) {
                return self.record_at(head, first)?.filter(|record| record.len() == len).ok_or_else(lost);
            }
        }
        Err(lost())
    }

    /// The record whose header is this block, if it is one.
    fn record_at(&self, head: Head, first: u64) -> Result<Option<Record>, Error> {
        let header = self.view.read(self.at(first), BLOCK)?;
        let fields = header.fields();
        if !fields.has(0, MAGIC) {
            return Ok(None);
        }
        if fields.be64(16)? != head.lsn_of(first) {
            return Err(fields.corrupt("a record of the log that belongs elsewhere", 16));
        }
        let version = fields.be32(8)?;
        if version != if self.superblock.has_log_v2() { 2 } else { 1 } {
            return Err(fields.corrupt("a record of the log of another version", 8));
        }
        if fields.array::<16>(304)? != self.superblock.own_uuid {
            return Err(fields.corrupt("a record of another file system's log", 304));
        }
        // Larger records have several headers.
        let size = u64::from(fields.be32(320)?);
        let headers = if version == 2 { size.div_ceil(BLOCK.saturating_mul(WORDS)).max(1) } else { 1 };
        let body = u64::from(fields.be32(12)?);
        let len = headers.saturating_add(body / BLOCK);
        if body == 0 || !body.is_multiple_of(BLOCK) || len > MAX_RECORD.min(self.blocks) {
            return Err(fields.corrupt("a record of the log with an impossible length", 12));
        }
        let mut bytes = Vec::new();
        let straight = len.min(self.blocks.saturating_sub(first));
        for (from, count) in [(first, straight), (0, len.saturating_sub(straight))] {
            if count > 0 {
                bytes.extend_from_slice(self.view.read(self.at(from), count.saturating_mul(BLOCK))?.bytes());
            }
        }
        let record = Record { bytes: Block::new(bytes, self.at(first)), headers };
        let made_empty = first == 0 && record.made_empty()?;
        if !made_empty && self.superblock.is_v5() && !sound(&record)? {
            return Err(fields.corrupt("a record of the log whose checksum does not hold", 32));
        }
        Ok(Some(record))
    }

    /// That all records from the tail that the last one gives to the head only cover the log.
    fn only_covers(&self, head: Head, last: &Record) -> Result<(), Error> {
        let replay = || Error::unsupported("a log with changes that are to be replayed");
        let end = head.block;
        let tail = last.bytes.fields().be64(24)?;
        let mut first = tail & 0xffff_ffff;
        // It must lie in the present round, or in the one before.
        if first >= self.blocks || tail != head.lsn_of(first) {
            return Err(replay());
        }
        for _ in 0..MAX_COVERS {
            let Some(record) = self.record_at(head, first)? else { return Err(replay()) };
            let count = u64::from(record.bytes.fields().be32(40)?);
            if !cover::is_cover(&record.operations()?, count, self.view, self.superblock)? {
                return Err(replay());
            }
            first = first.saturating_add(record.len());
            if first == end || first.checked_sub(self.blocks) == Some(end) {
                return Ok(());
            }
            first = first.checked_rem(self.blocks).unwrap_or(0);
        }
        Err(replay())
    }
}

impl Record {
    /// How many blocks it takes.
    fn len(&self) -> u64 {
        u64::try_from(self.bytes.bytes().len()).unwrap_or(u64::MAX) / BLOCK
    }

    /// Whether it is one that the tools write at the beginning of a log that they empty, and without a checksum.
    fn made_empty(&self) -> Result<bool, Error> {
        let fields = self.bytes.fields();
        Ok(fields.be32(32)? == 0 && fields.be32(36)? == u32::MAX && self.is_unmount()?)
    }

    /// Whether it says that all before it is in its place.
    fn is_unmount(&self) -> Result<bool, Error> {
        let fields = self.bytes.fields();
        // Of its one operation: the length of what it brings (newer kernels do not count that), from whom, and what it is for.
        let operation = fields.part(self.headers.saturating_mul(BLOCK), BLOCK)?;
        Ok(fields.be32(40)? == 1
            && matches!(operation.be32(4)?, 0 | 8)
            && operation.u8(8)? == 0xaa
            && operation.u8(9)? == 0x20
            && (operation.has(12, b"Un") || operation.has(12, b"nU")))
    }

    /// What is behind the headers, with the bytes that belong there where the cycles are; of records that are small.
    fn operations(&self) -> Result<Block, Error> {
        let fields = self.bytes.fields();
        let at = self.headers.saturating_mul(BLOCK);
        let len = self.len().saturating_sub(self.headers).min(WORDS);
        let mut bytes = fields.bytes(at, len.saturating_mul(BLOCK))?.to_vec();
        for (block, bytes) in bytes.chunks_mut(BLOCK_LEN).enumerate() {
            let word = 44u64.saturating_add(u64::try_from(block).unwrap_or(u64::MAX).saturating_mul(4));
            bytes.iter_mut().zip(fields.bytes(word, 4)?).for_each(|(byte, own)| *byte = *own);
        }
        Ok(Block::new(bytes, fields.at().saturating_add(at)))
    }
}

/// The cycle of a block.
fn cycle(block: Fields<'_>) -> Result<u32, Error> {
    block.be32(if block.has(0, MAGIC) { 4 } else { 0 })
}

/// Whether the checksum of a record holds: that of the header's fields, of the fields of each further one, and of all that
/// comes behind the headers. The structure of a header is four bytes longer on processors of 64 bits.
fn sound(record: &Record) -> Result<bool, Error> {
    let fields = record.bytes.fields();
    let body_at = record.headers.saturating_mul(BLOCK);
    let body = u64::try_from(fields.all().len()).unwrap_or(u64::MAX).saturating_sub(body_at);
    for len in [328, 324] {
        let mut bytes = fields.bytes(0, len)?.to_vec();
        for header in 1..record.headers {
            bytes.extend_from_slice(fields.bytes(header.saturating_mul(BLOCK), 260)?);
        }
        bytes.extend_from_slice(fields.bytes(body_at, body)?);
        if checksum_holds(Fields::new(&bytes, fields.at()), 32)? {
            return Ok(true);
        }
    }
    Ok(false)
}
