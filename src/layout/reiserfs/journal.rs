//! The journal: which blocks will be others once it is replayed.
//!
//! It is a ring of blocks, and behind it lies its header. A transaction is a description, copies of the blocks that it
//! changes, and a commit, all in a row:
//!
//! ```text
//! header       0 last flushed transaction (4)   4 where the next one begins (4)   8 mount (4)  12 as in the superblock
//! description  0 number (4)  4 blocks (4)  8 mount (4)  12 where they belong (4 each) …  last 12 bytes: magic
//! commit       0 number (4)  4 blocks (4)               8 where the rest belongs (4 each) …  last 16 bytes: unused
//! ```
//!
//! Numbers go up by one, mount counts with every mount. The kernel replays from where the header says for as long as
//! there is a transaction of the header's mount whose commit is there; from then on nothing was promised to anybody. The
//! header is brought up to date before the place of a flushed transaction is used again, and with every mount, before
//! the first transaction.

use std::collections::BTreeMap;

use super::superblock::Superblock;
use crate::layout::Error;
use crate::layout::fields::Block;
use crate::layout::view::{MAX_READ, View};

const MAGIC: &[u8] = b"ReIsErLB";

/// A file system's blocks as they are once the journal is replayed.
pub struct Replayed<'v, 'a> {
    /// All of the file system's place.
    pub view: &'v View<'a>,
    block_size: u64,
    /// For blocks that are newer in the journal: where.
    newer: BTreeMap<u64, u64>,
    /// How many transactions there are to replay.
    pub transactions: u64,
}

impl<'v, 'a> Replayed<'v, 'a> {
    /// As if nothing were to be replayed.
    pub fn nothing(view: &'v View<'a>, superblock: &Superblock) -> Replayed<'v, 'a> {
        Replayed { view, block_size: superblock.block_size, newer: BTreeMap::new(), transactions: 0 }
    }

    /// Reads a block.
    pub fn read(&self, block: u64) -> Result<Block, Error> {
        let from = self.newer.get(&block).copied().unwrap_or(block);
        self.view.read(from.saturating_mul(self.block_size), self.block_size)
    }

    /// Follows the journal of a file system with a superblock that was checked. What the kernel would refuse, and what
    /// it cannot have left, is an error.
    pub fn follow(view: &'v View<'a>, superblock: &Superblock) -> Result<Replayed<'v, 'a>, Error> {
        let mut replayed = Replayed::nothing(view, superblock);
        let mut ring = Ring::open(view, superblock)?;
        let empty = ring.next.is_none();
        let mut passed: u64 = 0;
        while let Some((description, commit, len)) = ring.transaction(view, superblock)? {
            passed = passed.saturating_add(len).saturating_add(2);
            if passed > ring.size {
                return Err(description.fields().corrupt("a transaction that overwrites the oldest one", 4));
            }
            // In the description there is room for this many.
            let half = superblock.block_size.saturating_sub(24) >> 2;
            for index in 0..len {
                let (block, at) = match index.checked_sub(half) {
                    None => (&description, index.saturating_mul(4).saturating_add(12)),
                    Some(index) => (&commit, index.saturating_mul(4).saturating_add(8)),
                };
                let target = u64::from(block.fields().le32(at)?);
                let kept = superblock.kept().contains(&target);
                if !(superblock.block()..superblock.blocks).contains(&target) || kept {
                    return Err(block
                        .fields()
                        .corrupt("a transaction for a block that is none of the tree's", at));
                }
                replayed.newer.insert(target, ring.block(index.saturating_add(1)));
            }
            ring.advance(len.saturating_add(2));
            replayed.transactions = replayed.transactions.saturating_add(1);
            if passed == ring.size {
                return Ok(replayed);
            }
        }
        if empty {
            // Without a place to begin at, the kernel looks at every block for transactions.
            ring.nothing_behind(view, superblock.block_size)?;
        }
        Ok(replayed)
    }
}

struct Ring {
    /// Its first block on the disk.
    first: u64,
    size: u64,
    mount: u32,
    /// Where the next transaction begins, from `first`.
    at: u64,
    /// Its number, if that is known: no transaction may have been flushed yet.
    next: Option<u32>,
}

impl Ring {
    /// Reads the header.
    fn open(view: &View<'_>, superblock: &Superblock) -> Result<Ring, Error> {
        let journal = &superblock.journal;
        let block = journal.first.saturating_add(journal.size);
        let header = view.read(block.saturating_mul(superblock.block_size), 44)?;
        let header = header.fields();
        if journal.own && header.le32(28)? != journal.magic {
            return Err(header.corrupt("a journal whose magic is not that of the superblock", 28));
        }
        let (flushed, at, mount) = (header.le32(0)?, u64::from(header.le32(4)?), header.le32(8)?);
        if at >= journal.size || (flushed == 0 && at != 0) {
            return Err(header.corrupt("a journal that begins beyond its end", 4));
        }
        let next = match flushed {
            0 => None,
            _ => Some(successor(flushed)?),
        };
        Ok(Ring { first: journal.first, size: journal.size, mount, at, next })
    }

    /// The block that lies `offset` behind the beginning of the next transaction.
    fn block(&self, offset: u64) -> u64 {
        let within = self.at.saturating_add(offset).checked_rem(self.size).unwrap_or(0);
        self.first.saturating_add(within)
    }

    fn advance(&mut self, blocks: u64) {
        self.at = self.block(blocks).saturating_sub(self.first);
    }

    /// The next transaction: its description, its commit and how many blocks it has. `None` where there is none, or one
    /// that was never completed.
    fn transaction(
        &mut self,
        view: &View<'_>,
        superblock: &Superblock,
    ) -> Result<Option<(Block, Block, u64)>, Error> {
        let read = |block: u64| view.read(block.saturating_mul(superblock.block_size), superblock.block_size);
        let description = read(self.block(0))?;
        let fields = description.fields();
        if !is_description(description.bytes()) {
            return Ok(None);
        }
        let (number, len, mount) = (fields.le32(0)?, fields.le32(4)?, fields.le32(8)?);
        // One of earlier times, that nothing was written over since.
        if mount < self.mount || (mount == self.mount && self.next.is_some_and(|next| number < next)) {
            return Ok(None);
        }
        if mount > self.mount || number == 0 || self.next.is_some_and(|next| number > next) {
            return Err(fields.corrupt("a transaction out of its turn", 0));
        }
        let count = u64::from(len);
        if !(1..=superblock.longest()).contains(&count) {
            return Err(fields.corrupt("a transaction that is too long or empty", 4));
        }
        let commit = read(self.block(count.saturating_add(1)))?;
        if (commit.fields().le32(0)?, commit.fields().le32(4)?) != (number, len) {
            return Ok(None);
        }
        self.next = Some(successor(number)?);
        Ok(Some((description, commit, count)))
    }

    /// That there is no description behind the one at which it ended.
    fn nothing_behind(&self, view: &View<'_>, block_size: u64) -> Result<(), Error> {
        let byte = |block: u64| self.first.saturating_add(block).saturating_mul(block_size);
        let at_once = MAX_READ.checked_div(block_size).unwrap_or(1);
        let mut at = self.at.saturating_add(1);
        while at < self.size {
            let count = at_once.min(self.size.saturating_sub(at));
            let blocks = view.read(byte(at), count.saturating_mul(block_size))?;
            let size = usize::try_from(block_size).unwrap_or(usize::MAX);
            let found = blocks.bytes().chunks(size).position(is_description);
            if let Some(index) = found {
                let at = byte(at.saturating_add(u64::try_from(index).unwrap_or(u64::MAX)));
                return Err(Error::Corrupt { what: "a transaction out of its turn", at });
            }
            at = at.saturating_add(count);
        }
        Ok(())
    }
}

/// The number of the next transaction. Kernels differ in how they go on from the largest, which none ever gets to.
fn successor(number: u32) -> Result<u32, Error> {
    number.checked_add(1).ok_or_else(|| Error::unsupported("a journal whose numbers are used up"))
}

/// Whether a block begins a transaction.
fn is_description(block: &[u8]) -> bool {
    let at = block.len().saturating_sub(12);
    block.get(at..).is_some_and(|end| end.starts_with(MAGIC))
}
