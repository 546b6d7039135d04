//! ReiserFS: versions 3.5 and 3.6, as Linux had it from 2.2 to 6.12.
//!
//! Which blocks are used its bitmaps say, as they are when the journal has been replayed. After a power cut that is not
//! how they lie on the disk, and the superblock in its place does not tell: it is the one of the last flush, which
//! says that all is well, and what says otherwise is in the journal. So the journal is looked at always.
//!
//! Nothing in this format has a checksum. So what is written down twice must agree: the bitmaps with the count of free
//! blocks, and with the places that are never free.

mod journal;
mod superblock;

use super::fields::Fields;
use super::ranges::{Ranges, between, runs};
use super::view::{PER_RANGE, View};
use super::{Allocation, Error, FileSystem, State};
use crate::units::ByteLen;
use journal::Replayed;
use superblock::{Found, Superblock};

const KIND: &str = "reiserfs";

/// Reads the file system.
pub fn read(view: &View<'_>) -> Result<Option<FileSystem>, Error> {
    let in_place = match superblock::find(view)? {
        None => return Ok(None),
        Some(Found::First) => {
            let why = Error::unsupported("a ReiserFS of before it had a journal");
            return Ok(Some(FileSystem::new(KIND, view.size(), Allocation::Whole { why })));
        }
        Some(Found::Superblock(superblock)) => *superblock,
    };
    Ok(Some(match follow(view, &in_place) {
        Ok((superblock, transactions, used)) => {
            let mut found = describe(&superblock, Allocation::Known(used));
            found.state = Some(match (transactions, superblock.unmounted) {
                (0, 1) => State::Clean,
                (0, _) => State::NotUnmounted,
                _ => State::JournalToReplay,
            });
            if transactions > 0 {
                found
                    .notes
                    .push(format!("as it is once its journal is replayed (transactions: {transactions})"));
            }
            found
        }
        Err(why) => {
            let mut found = describe(&in_place, Allocation::Whole { why });
            // Whether it is well otherwise is not known without its journal.
            found.state = (in_place.checked != 0).then_some(State::Errors);
            found
        }
    }))
}

fn describe(superblock: &Superblock, allocation: Allocation) -> FileSystem {
    let mut found = FileSystem::new(KIND, superblock.size(), allocation);
    found.version = Some(if superblock.new_format { "3.6" } else { "3.5" }.into());
    found.uuid = superblock.uuid.clone();
    found.label = superblock.label.clone();
    found.block_size = Some(superblock.block_size);
    found.free = Some(ByteLen(superblock.free.saturating_mul(superblock.block_size)));
    let hash = match superblock.hash {
        1 => Some("tea"),
        2 => Some("rupasov"),
        3 => Some("r5"),
        // It is chosen with the first mount.
        _ => None,
    };
    found.features.extend(hash.map(str::to_owned));
    if superblock.journal.own {
        found.features.push("non-standard journal".into());
    }
    found
}

/// The superblock and the used bytes as they are once the journal is replayed, and how many transactions it has.
fn follow(view: &View<'_>, in_place: &Superblock) -> Result<(Superblock, u64, Ranges), Error> {
    in_place.check()?;
    let replayed = Replayed::follow(view, in_place)?;
    let block = replayed.read(in_place.block())?;
    // It may lie in the journal; in its place it is.
    let fields = Fields::new(block.bytes(), in_place.at);
    let superblock = Superblock::parse(fields)?;
    superblock.check()?;
    if (superblock.block_size, &superblock.journal) != (in_place.block_size, &in_place.journal) {
        return Err(fields.corrupt("a superblock in the journal that is another file system's", 0));
    }
    let used = used(&superblock, &replayed)?;
    Ok((superblock, replayed.transactions, used))
}

/// The used bytes by the bitmaps.
fn used(superblock: &Superblock, replayed: &Replayed<'_, '_>) -> Result<Ranges, Error> {
    let mut used = replayed.view.used();
    let mut free: u64 = 0;
    let mut rooted = false;
    let bytes = |block: u64| block.saturating_mul(superblock.block_size);
    for index in 0..superblock.bitmaps() {
        let bitmap = replayed.read(superblock.bitmap(index))?;
        let first = index.saturating_mul(superblock.bits());
        let count = superblock.blocks.saturating_sub(first).min(superblock.bits());
        // What lies at the beginning is never free: all up to the journal's end, or a bitmap.
        let fixed = if index == 0 { superblock.kept().end } else { superblock.bitmaps_within() };
        let mut begins = fixed == 0;
        let mut ranges: u64 = 0;
        free = free.saturating_add(count);
        runs(bitmap.bytes(), count, |from, to| {
            ranges = ranges.saturating_add(1);
            begins |= from == 0 && to >= fixed;
            free = free.saturating_sub(to.saturating_sub(from));
            let (from, to) = (first.saturating_add(from), first.saturating_add(to));
            rooted |= (from..to).contains(&superblock.root);
            between(bytes(from), bytes(to)).into_iter().for_each(|range| used.add(range));
        });
        replayed.view.spend(ranges.saturating_mul(PER_RANGE))?;
        if !begins {
            return Err(bitmap.fields().corrupt("a bitmap that calls a bitmap or the journal free", 0));
        }
    }
    let fails = |what, at: u64| Err(Error::Corrupt { what, at: superblock.at.saturating_add(at) });
    if !rooted {
        return fails("a tree whose root is free", 8);
    }
    if free != superblock.free {
        return fails("a count of free blocks that is not that of the bitmaps", 4);
    }
    Ok(used.finish())
}

#[cfg(test)]
mod tests;
