//! XFS, versions 4 and 5. Everything on it is big-endian, but for its checksums.
//!
//! The place is divided into allocation groups of equal size, of which the last may be shorter. Each has two trees of its free
//! extents, one in the order of their beginnings and one in that of their lengths: what is in neither is used. A map is
//! given where both are whole, hold the same extents, and agree with all that is counted elsewhere.
//!
//! All that goes for a log with nothing to replay that would change the trees: with that they are those of an earlier time.
//! To know those that a replay makes, one would have to do all of what the kernel does, and so such a file system is used, all
//! of it.

mod free;
mod group;
mod log;
mod superblock;

use super::fields::Fields;
use super::ranges::Used;
use super::view::View;
use super::{Allocation, Error, FileSystem, State};
use crate::checksum::crc32c_raw;
use crate::units::ByteLen;
use group::Group;
use log::End;
use superblock::Superblock;

/// The XFS that begins at the beginning of `view`, if there is one. Copies of its superblock lie at places that only the first
/// one tells, so they are not looked for.
pub fn read(view: &View<'_>) -> Result<Option<FileSystem>, Error> {
    let Some(superblock) = Superblock::read(view)? else { return Ok(None) };
    let log = log::end(view, &superblock);
    let state = match &log {
        _ if superblock.needs_repair() => Some(State::Errors),
        Ok(end) if end.clean => Some(State::Clean),
        Ok(_) => Some(State::NotUnmounted),
        // Whether there is anything in it cannot be seen from here.
        Err(Error::Io(_)) => None,
        Err(_) if superblock.log.is_none() => None,
        _ => Some(State::JournalToReplay),
    };
    let covered = matches!(&log, Ok(end) if !end.clean);
    let known = superblock.obstacle().map_or(Ok(()), Err).and(log);
    let known = known.and_then(|end| used(view, &superblock, end));
    let (allocation, free) = match known {
        Ok((used, free)) => (Allocation::Known(used.finish()), free),
        Err(why) => (Allocation::Whole { why }, superblock.free),
    };
    let notes = covered
        .then_some("its log holds nothing but the superblock's counters, as while it is frozen or idle");
    Ok(Some(FileSystem {
        version: Some(superblock.version.to_string()),
        uuid: superblock.uuid(),
        label: superblock.label.clone(),
        block_size: Some(superblock.block),
        free: free.checked_mul(superblock.block).map(ByteLen),
        state,
        features: superblock.features(),
        notes: notes.into_iter().map(str::to_owned).collect(),
        ..FileSystem::new("xfs", superblock.size(), allocation)
    }))
}

/// All of its used bytes, and how many blocks count as free.
fn used(view: &View<'_>, superblock: &Superblock, end: End) -> Result<(Used, u64), Error> {
    if superblock.lsn.is_some_and(|lsn| !in_log(lsn, end.head)) {
        return Err(superblock.corrupt("a superblock that is younger than the log", 240));
    }
    let mut used = view.used();
    let mut free = 0u64;
    for index in 0..superblock.groups {
        let group = Group::read(view, superblock, end.head, index)?;
        free = free.saturating_add(group.free(&mut used)?);
    }
    // Until it is unmounted the superblock's own count is that of an earlier time.
    if end.clean && free != superblock.free {
        return Err(
            superblock.corrupt("a superblock whose count of free blocks is not that of its groups", 144)
        );
    }
    Ok((used, free))
}

/// The place of a record in the log: the cycle and the block of 512 bytes, as one number that grows.
type Lsn = u64;

/// What every structure of version 5 says of itself, beside its checksum.
struct Stamp {
    /// Where its checksum lies, in the structure's first part.
    checksum: u64,
    /// Where its UUID lies.
    uuid: u64,
    /// Where the place in the log of its last change lies.
    lsn: u64,
}

impl Stamp {
    /// That a structure of version 5 is whole, belongs to this file system and is not younger than its log.
    fn check(&self, superblock: &Superblock, head: Lsn, fields: Fields<'_>) -> Result<(), Error> {
        if !superblock.is_v5() {
            return Ok(());
        }
        if !checksum_holds(fields, self.checksum)? {
            return Err(fields.corrupt("a structure whose checksum does not hold", self.checksum));
        }
        if fields.array::<16>(self.uuid)? != superblock.meta_uuid {
            return Err(fields.corrupt("a structure of another file system", self.uuid));
        }
        check_lsn(fields, self.lsn, head)
    }
}

/// That this structure's last change is not one from behind the end of the log, which is not the log that it was made with
/// then.
fn check_lsn(fields: Fields<'_>, at: u64, head: Lsn) -> Result<(), Error> {
    match in_log(fields.be64(at)?, head) {
        true => Ok(()),
        false => Err(fields.corrupt("a structure that is younger than the log", at)),
    }
}

/// Whether a change was logged before the end of the log. One of all ones was never logged.
fn in_log(lsn: Lsn, head: Lsn) -> bool {
    lsn <= head || lsn == u64::MAX
}

/// Whether the CRC-32C of all these bytes is the one at `at`, which counts as zero. It is little-endian.
fn checksum_holds(fields: Fields<'_>, at: u64) -> Result<bool, Error> {
    let behind = at.saturating_add(4);
    let len = u64::try_from(fields.all().len()).unwrap_or(u64::MAX).saturating_sub(behind);
    let register = crc32c_raw(crc32c_raw(!0, fields.bytes(0, at)?), &[0; 4]);
    Ok(!crc32c_raw(register, fields.bytes(behind, len)?) == fields.le32(at)?)
}

#[cfg(test)]
mod tests;
