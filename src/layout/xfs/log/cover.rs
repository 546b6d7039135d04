//! Records that cover the log: of a transaction that changes the superblock's counters and nothing else.
//!
//! A record brings operations, each with a head of twelve bytes: of which transaction it is, the length of what it brings, from
//! whom, and whether it begins or ends its transaction. What a transaction brings is a head of its own, and then of each
//! changed thing a description and the changed bytes. Both are in the byte order of the processor that wrote them; such a log
//! of one that is big-endian is not known here, and is one to be replayed.

use super::super::super::Error;
use super::super::super::fields::{Block, Fields};
use super::super::super::view::View;
use super::super::superblock::Superblock;
use crate::bytes::{le16, le32, le64};

/// From a transaction.
const TRANSACTION: u8 = 0x69;
const START: u8 = 1;
const COMMIT: u8 = 2;
/// A changed buffer.
const BUFFER: u16 = 0x123c;
/// Bits of what kind of buffer it is; the others are orders.
const KIND: u16 = 0xf800;
/// Changed bytes are told in pieces of this length.
const PIECE: u64 = 128;
/// Of the superblock, what may be other than it was: from the count of inodes to that of free real-time extents, the checksum,
/// and the place in the log. Nothing of all that says where anything lies.
const MAY_CHANGE: [std::ops::Range<u64>; 3] = [128..160, 224..228, 240..248];

/// Whether these `count` operations are one whole transaction that changes the superblock, and nothing in it that matters.
pub fn is_cover(
    operations: &Block,
    count: u64,
    view: &View<'_>,
    superblock: &Superblock,
) -> Result<bool, Error> {
    let Some(all) = parse(operations.fields(), count) else { return Ok(false) };
    let [start, head, description, bytes, commit] = all.as_slice() else { return Ok(false) };
    let whole = [(start, START), (head, 0), (description, 0), (bytes, 0), (commit, COMMIT)];
    let whole = whole.iter().all(|(one, flags)| one.flags == *flags && one.of == start.of)
        && start.brings.is_empty()
        && commit.brings.is_empty()
        && head.brings.starts_with(b"NART");
    let Some((at, len)) = changed(description.brings, superblock).filter(|_| whole) else { return Ok(false) };
    if u64::try_from(bytes.brings.len()) != Ok(len) {
        return Ok(false);
    }
    let present = view.read(at, len)?;
    Ok((at..).zip(present.bytes().iter().zip(bytes.brings)).all(|(at, (present, logged))| {
        present == logged || MAY_CHANGE.iter().any(|range| range.contains(&at))
    }))
}

struct Operation<'a> {
    of: u32,
    flags: u8,
    brings: &'a [u8],
}

/// The operations, if all are there and from transactions.
fn parse(fields: Fields<'_>, count: u64) -> Option<Vec<Operation<'_>>> {
    let mut all = Vec::new();
    let mut at = 0u64;
    // One more than make up a record that covers the log need not be looked at.
    for _ in 0..count.min(6) {
        let head = fields.part(at, 12).ok()?;
        if head.u8(8).ok()? != TRANSACTION {
            return None;
        }
        let brings = at.checked_add(12)?;
        let len = u64::from(head.be32(4).ok()?);
        all.push(Operation {
            of: head.be32(0).ok()?,
            flags: head.u8(9).ok()?,
            brings: fields.bytes(brings, len).ok()?,
        });
        at = brings.checked_add(len)?;
    }
    Some(all)
}

/// Where what is changed begins and how much it is, if it is one piece of the superblock.
fn changed(description: &[u8], superblock: &Superblock) -> Option<(u64, u64)> {
    let is_superblock = le16(description, 0)? == BUFFER
        // This description and one piece.
        && le16(description, 2)? == 2
        && le16(description, 4)? & !KIND == 0
        && u64::from(le16(description, 6)?).checked_mul(512)? == superblock.sector
        && le64(description, 8)? == 0;
    let words = le32(description, 16)?;
    // A bit for each piece: those of one run of ones.
    let pieces = superblock.sector / PIECE;
    let changed = |piece: u64| {
        let word = usize::try_from(piece / 32).ok()?.checked_mul(4)?.checked_add(20)?;
        Some(le32(description, word)?.checked_shr(u32::try_from(piece % 32).ok()?)? & 1 == 1)
    };
    if !is_superblock || u64::from(words).checked_mul(32)? < pieces {
        return None;
    }
    let all: Vec<bool> = (0..pieces).map(changed).collect::<Option<_>>()?;
    let first = all.iter().position(|piece| *piece)?;
    let len = all.iter().filter(|piece| **piece).count();
    let run = all.get(first..first.checked_add(len)?)?;
    let bytes = |pieces: usize| u64::try_from(pieces).ok()?.checked_mul(PIECE);
    Some((bytes(first)?, bytes(len)?)).filter(|_| run.iter().all(|piece| *piece))
}
