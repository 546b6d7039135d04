//! The superblock, and where everything lies that has a fixed place.
//!
//! It is the beginning of a block, at byte 65,536, or at byte 8192 as the first ones of format 3.5 have it:
//!
//! ```text
//!  0 blocks (4)        4 free blocks (4)    8 root of the tree (4)
//! 12 journal: its first block (4), its device (4), blocks in it (4), blocks in a transaction (4), magic (4), three more
//! 44 block size (2)   46 two sizes (2, 2)  50 how it was unmounted (2)         52 magic (10)
//! 62 state (2)        64 hash (4)          68 height of the tree (2)           70 bitmaps (2)
//! 72 version (2)      74 reserved for the journal (2)                          76 a generation (4)
//! 80 flags (4)        84 UUID (16)        100 label (16)                        format 3.6 alone has the last four
//! ```
//!
//! Behind it lie the first bitmap, the journal, and the journal's header, a block. Each block of the size of a bitmap is
//! the bitmap of as many blocks as it has bits, and is the first of them; but the first, as said, lies behind the
//! superblock, and where that is at byte 8192 all of them do, and then comes the journal.

use std::ops::Range;

use crate::layout::Error;
use crate::layout::fields::{Block, Fields};
use crate::layout::view::View;

/// Where it lies, and where it lay.
const PLACE: u64 = 64 << 10;
const OLD_PLACE: u64 = 8 << 10;
/// How much of its block is read here.
const LEN: u64 = 204;

const MAGIC_AT: u64 = 52;
/// Where the format had its magic before it had a journal.
const FIRST_MAGIC_AT: u64 = 20;
const MAGIC_3_5: &[u8] = b"ReIsErFs";
const MAGIC_3_6: &[u8] = b"ReIsEr2Fs";
/// Of either version: its journal has another size, or lies elsewhere.
const MAGIC_JOURNAL: &[u8] = b"ReIsEr3Fs";

/// A superblock.
#[derive(Clone, Debug)]
pub struct Superblock {
    /// Its first byte, from the beginning of the place.
    pub at: u64,
    /// How many blocks the file system has, and how large they are.
    pub blocks: u64,
    pub block_size: u64,
    /// How many blocks are free.
    pub free: u64,
    /// The root of the tree.
    pub root: u64,
    pub journal: Journal,
    /// How it was unmounted: 1 is well, 2 is not at all.
    pub unmounted: u16,
    /// What its checker left it in: 0 is well.
    pub checked: u16,
    /// Which hash orders the names of a directory.
    pub hash: u32,
    /// How many bitmaps there are said to be.
    bitmaps: u16,
    /// Whether it is of format 3.6, and not of 3.5.
    pub new_format: bool,
    pub uuid: Option<String>,
    pub label: Option<String>,
}

/// What it says about the journal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Journal {
    /// Whether it is not the standard one.
    pub own: bool,
    pub first: u64,
    /// The number of the device on which it is; 0 is this one.
    pub device: u32,
    /// How many blocks it has besides its header.
    pub size: u64,
    /// How many blocks a transaction has at most; 0 is the standard number.
    longest: u64,
    /// The same number is in its header, if it is not the standard one.
    pub magic: u32,
    /// How many blocks are kept for it where it is not the standard one, wherever it lies.
    reserved: u16,
}

/// What lies in a place.
pub enum Found {
    Superblock(Box<Superblock>),
    /// One of before the time of the journal.
    First,
}

/// Looks for the superblock.
pub fn find(view: &View<'_>) -> Result<Option<Found>, Error> {
    let [old, new] = [read(view, OLD_PLACE)?, read(view, PLACE)?];
    let first = old.as_ref().is_some_and(|block| block.fields().has(FIRST_MAGIC_AT, MAGIC_3_5));
    let parse = |block: Option<Block>| {
        let block = block.filter(|block| is_magic(block.fields()));
        block.map(|block| Superblock::parse(block.fields())).transpose()
    };
    match (parse(old)?, parse(new)?) {
        // One of them is left over, or a copy in the other one's journal. The kernel believes the first one, reiserfsck
        // the second.
        (Some(_), Some(_)) => Err(Error::Corrupt { what: "a second superblock", at: PLACE }),
        (Some(superblock), None) | (None, Some(superblock)) => {
            Ok(Some(Found::Superblock(Box::new(superblock))))
        }
        (None, None) => Ok(first.then_some(Found::First)),
    }
}

/// What may be a superblock.
fn read(view: &View<'_>, at: u64) -> Result<Option<Block>, Error> {
    let fits = at.checked_add(LEN).is_some_and(|end| end <= view.size());
    fits.then(|| view.read(at, LEN)).transpose()
}

fn is_magic(fields: Fields<'_>) -> bool {
    [MAGIC_3_5, MAGIC_3_6, MAGIC_JOURNAL].iter().any(|magic| fields.has(MAGIC_AT, magic))
}

impl Superblock {
    /// Reads it from the beginning of its block. What it takes to know where things lie is right, and no more than that.
    pub fn parse(fields: Fields<'_>) -> Result<Superblock, Error> {
        let number = |at| fields.le32(at).map(u64::from);
        let own = fields.has(MAGIC_AT, MAGIC_JOURNAL);
        if !is_magic(fields) {
            return Err(fields.corrupt("a superblock without its magic", MAGIC_AT));
        }
        let new_format = match (fields.has(MAGIC_AT, MAGIC_3_6), own, fields.le16(72)?) {
            (true, ..) | (_, true, 2) => true,
            (_, true, 0) | (_, false, _) => false,
            _ => return Err(fields.corrupt("a version that no ReiserFS has", 72)),
        };
        let block_size = u64::from(fields.le16(44)?);
        if !block_size.is_power_of_two() || block_size < 512 || !fields.at().is_multiple_of(block_size) {
            return Err(fields.corrupt("a block size that no ReiserFS has", 44));
        }
        let uuid = if new_format { fields.uuid(84)? } else { None };
        let label = if new_format { fields.label(100, 16)? } else { None };
        Ok(Superblock {
            at: fields.at(),
            blocks: number(0)?,
            block_size,
            free: number(4)?,
            root: number(8)?,
            journal: Journal {
                own,
                first: number(12)?,
                device: fields.le32(16)?,
                size: number(20)?,
                longest: number(24)?,
                magic: fields.le32(28)?,
                reserved: fields.le16(74)?,
            },
            unmounted: fields.le16(50)?,
            checked: fields.le16(62)?,
            hash: fields.le32(64)?,
            bitmaps: fields.le16(70)?,
            new_format,
            uuid,
            label,
        })
    }

    /// That its numbers agree with each other, and are such that its bitmaps and its journal can be followed.
    pub fn check(&self) -> Result<(), Error> {
        let fails = |what, at: u64| Err(Error::Corrupt { what, at: self.at.saturating_add(at) });
        if self.checked != 0 {
            return Err(Error::unsupported(
                "a file system that reiserfsck calls damaged, or has not finished with,",
            ));
        }
        if self.root == u64::from(u32::MAX) {
            return Err(Error::unsupported("a tree that reiserfsck has not finished to rebuild"));
        }
        // With others the kernel and reiserfsck look for the bitmaps in different places; there were none.
        if self.is_old() && self.block_size != 4096 {
            return Err(Error::unsupported("an old ReiserFS with blocks of another size than 4096 bytes"));
        }
        if self.journal.device != 0 {
            return Err(Error::unsupported("a journal on another device"));
        }
        let kept = self.kept();
        if self.journal.first != kept.start {
            return fails("a journal that does not begin behind the bitmap", 12);
        }
        let longest = self.longest();
        if longest > self.standard_longest()
            || longest < 256.min(self.block_size >> 4)
            || self.journal.size < longest.saturating_mul(2)
        {
            return fails("transactions that are too long or too short for the journal", 24);
        }
        // The first bitmap tells of all of it.
        if kept.end > self.bits() || kept.end > self.blocks {
            return fails("a journal that ends beyond the first bitmap", 20);
        }
        let bitmaps = self.bitmaps();
        if u64::from(self.bitmaps) != if bitmaps > u64::from(u16::MAX) { 0 } else { bitmaps } {
            return fails("a count of bitmaps that is not that of its size", 70);
        }
        if !(kept.end..self.blocks).contains(&self.root) {
            return fails("a tree without a root", 8);
        }
        if !(1..=2).contains(&self.unmounted) {
            return fails("a state that no ReiserFS has", 50);
        }
        Ok(())
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.blocks.saturating_mul(self.block_size)
    }

    /// How many blocks a bitmap tells of.
    pub fn bits(&self) -> u64 {
        self.block_size.saturating_mul(8)
    }

    /// How many bitmaps there are.
    pub fn bitmaps(&self) -> u64 {
        self.blocks.div_ceil(self.bits())
    }

    /// Whether all bitmaps lie behind the superblock.
    fn is_old(&self) -> bool {
        self.at == OLD_PLACE
    }

    /// Its block.
    pub fn block(&self) -> u64 {
        self.at.checked_div(self.block_size).unwrap_or(0)
    }

    /// The block of the bitmap with this index.
    pub fn bitmap(&self, index: u64) -> u64 {
        let first = self.block().saturating_add(1);
        match index {
            _ if self.is_old() => first.saturating_add(index),
            0 => first,
            _ => index.saturating_mul(self.bits()),
        }
    }

    /// How many blocks are bitmaps at the beginning of what a bitmap other than the first one tells of.
    pub fn bitmaps_within(&self) -> u64 {
        if self.is_old() { 0 } else { 1 }
    }

    /// The blocks that are kept for the journal and its header, which a journal that is not the standard one may not
    /// need all, or not at all.
    pub fn kept(&self) -> Range<u64> {
        let bitmaps = if self.is_old() { self.bitmaps() } else { 1 };
        let start = self.block().saturating_add(1).saturating_add(bitmaps);
        let own = self.journal.size.saturating_add(1);
        let count = if self.journal.own { own.max(self.journal.reserved.into()) } else { own };
        start..start.saturating_add(count)
    }

    /// How many blocks a transaction has at most.
    pub fn longest(&self) -> u64 {
        match self.journal.longest {
            0 => self.standard_longest(),
            longest => longest,
        }
    }

    /// The same by the standard, which is also the most.
    fn standard_longest(&self) -> u64 {
        1024.min(self.block_size >> 2)
    }
}
