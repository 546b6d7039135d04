//! The master boot record: four entries, of which one may be an extended partition with a chain of logical ones.
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 440 | 4 | disk signature | |
//! | 446 | 4 × 16 | entries | boot flag (1), old geometry (3), type (1), old geometry (3), first sector (4), sectors (4) |
//! | 510 | 2 | | 0x55 0xaa |
//!
//! An extended partition begins with a boot record of its own: its first entry is a logical partition, from this record
//! on; its second is the next record, from the beginning of the extended partition on.

use std::collections::BTreeSet;

use super::Error;
use super::fields::Fields;
use super::table::{Partition, Table};
use super::view::View;
use crate::units::Extent;

/// The type of the entry that covers a disk for those that know no GPT.
const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// More than any system takes.
const MAX_LOGICAL: usize = 256;

/// One entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    active: bool,
    kind: u8,
    first: u64,
    count: u64,
}

impl Entry {
    pub(super) fn is_protective(self) -> bool {
        self.kind == PROTECTIVE
    }

    fn is_used(self) -> bool {
        self.kind != 0 && self.count != 0
    }

    fn is_extended(self) -> bool {
        EXTENDED.contains(&self.kind)
    }

    fn partition(self, number: u32, from: u64, sector: u64, id: u32) -> Option<Partition> {
        let at = from.checked_add(self.first)?.checked_mul(sector)?;
        Some(Partition {
            number,
            extent: Extent::new(at, self.count.checked_mul(sector)?)?,
            kind: format!("{:#x}", self.kind),
            uuid: Some(format!("{id:08x}-{number:02x}")),
            name: None,
            bootable: self.active,
            container: self.is_extended(),
        })
    }
}

/// The entries of a boot record that are in use, with their places; `None` where these bytes are none.
fn entries(record: Fields<'_>) -> Result<Option<Vec<(u32, Entry)>>, Error> {
    if !record.has(510, &[0x55, 0xaa]) {
        return Ok(None);
    }
    let mut entries = Vec::new();
    for (number, at) in (1..).zip([446, 462, 478, 494]) {
        let entry = record.part(at, 16)?;
        let active = match entry.u8(0)? {
            0 => false,
            0x80 => true,
            _ => return Ok(None),
        };
        let (first, count) = (u64::from(entry.le32(8)?), u64::from(entry.le32(12)?));
        entries.push((number, Entry { active, kind: entry.u8(4)?, first, count }));
    }
    entries.retain(|(_, entry)| entry.is_used());
    Ok(Some(entries))
}

/// The entries in use of a disk's first sector; `None` where it has no boot record.
pub(super) fn read_entries(disk: &View<'_>) -> Result<Option<Vec<Entry>>, Error> {
    if disk.size() < 512 {
        return Ok(None);
    }
    let found = entries(disk.read(0, 512)?.fields())?;
    Ok(found.map(|entries| entries.into_iter().map(|(_, entry)| entry).collect()))
}

/// Reads the table of a disk with sectors of `sector` bytes, which has one.
pub(super) fn read(disk: &View<'_>, sector: u64) -> Result<Table, Error> {
    let block = disk.read(0, 512)?;
    let record = block.fields();
    let found = entries(record)?.ok_or_else(|| record.corrupt("no master boot record", 0))?;
    let id = record.le32(440)?;
    let mut table = Table::new("dos", (id != 0).then(|| format!("{id:#010x}")), sector);
    table.takes(0, sector);
    for (number, entry) in found {
        let place = 446u64.saturating_add(16u64.saturating_mul(u64::from(number).saturating_sub(1)));
        let overflow = || record.corrupt("a partition that ends beyond any disk", place);
        table.partitions.push(entry.partition(number, 0, sector, id).ok_or_else(overflow)?);
        if entry.is_extended() && !table.partitions.iter().any(|one| one.number > 4) {
            logical(disk, entry, id, &mut table)?;
        } else if entry.is_extended() {
            table.flaw(record.corrupt("a second extended partition", place));
        }
    }
    Ok(table)
}

/// Walks the chain of an extended partition. What is wrong in it is a flaw: the partitions before that are shown.
fn logical(disk: &View<'_>, extended: Entry, id: u32, table: &mut Table) -> Result<(), Error> {
    let sector = table.sector;
    let end = extended.first.saturating_add(extended.count);
    let (mut at, mut seen) = (extended.first, BTreeSet::new());
    for number in (5u32..).take(MAX_LOGICAL) {
        let byte = at.saturating_mul(sector);
        let corrupt = |what| Error::Corrupt { what, at: byte };
        if !seen.insert(at) {
            return table.flawed(corrupt("a chain of logical partitions that runs in a circle"));
        }
        let Some(place) = disk.part(byte, 512) else {
            return table.flawed(corrupt("a chain of logical partitions that leaves the disk"));
        };
        let block = match place.read(0, 512) {
            Ok(block) => block,
            Err(error) => return table.flawed(error),
        };
        let record = Fields::new(block.bytes(), byte);
        let Some(found) = entries(record)? else {
            return table.flawed(corrupt("a chain of logical partitions that ends in no boot record"));
        };
        table.takes(byte, sector);
        let mut next = None;
        for (slot, entry) in found {
            match (slot, entry.is_extended()) {
                (1, false) => {
                    let inside = at
                        .checked_add(entry.first)
                        .and_then(|first| first.checked_add(entry.count))
                        .is_some_and(|last| last <= end);
                    match entry.partition(number, at, sector, id).filter(|_| inside) {
                        Some(partition) => table.partitions.push(partition),
                        None => {
                            return table.flawed(corrupt("a logical partition that leaves its extended one"));
                        }
                    }
                }
                (2, true) if entry.first < extended.count => next = extended.first.checked_add(entry.first),
                (2, true) => {
                    return table
                        .flawed(corrupt("a chain of logical partitions that leaves its extended one"));
                }
                _ => return table.flawed(corrupt("a boot record of a logical partition with other entries")),
            }
        }
        match next {
            Some(next) => at = next,
            None => return Ok(()),
        }
    }
    table.flawed(Error::unsupported(format!("more than {MAX_LOGICAL} logical partitions")))
}
