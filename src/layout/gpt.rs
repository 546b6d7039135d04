//! The GUID partition table (UEFI specification, chapter 5): a header in the second sector and a copy of it in the last,
//! each with the array of entries that it names.
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 8 | signature | `EFI PART` |
//! | 8 | 4 | revision | 0x00010000 |
//! | 12 | 4 | header_size | 92, or more |
//! | 16 | 4 | header_crc | CRC-32 of the header, with zeros here |
//! | 24 | 8 | my_lba | the sector of this header |
//! | 32 | 8 | alternate_lba | that of the other one |
//! | 40 | 8 | first_usable | |
//! | 48 | 8 | last_usable | |
//! | 56 | 16 | disk_guid | |
//! | 72 | 8 | entries_lba | |
//! | 80 | 4 | entry_count | |
//! | 84 | 4 | entry_size | 128 times a power of two |
//! | 88 | 4 | entries_crc | CRC-32 of the array |
//!
//! Entry: type (16), GUID (16), first sector (8), last sector (8), attributes (8), name (72, UTF-16).

use super::Error;
use super::fields::{self, Fields};
use super::ranges::between;
use super::table::{Partition, Table};
use super::view::View;
use crate::checksum::crc32;

const SIGNATURE: &[u8] = b"EFI PART";
const HEADER_LEN: u64 = 92;
/// The largest array of entries that is read, in bytes: 1024 of the usual ones, and as a rule there are 128.
const MAX_ENTRIES: u64 = 128 << 10;
/// The attribute by which a BIOS finds what to boot.
const LEGACY_BOOT: u64 = 1 << 2;

/// One of the two headers, sound, and the entries that it names.
struct Half {
    lba: u64,
    alternate: u64,
    first_usable: u64,
    last_usable: u64,
    guid: [u8; 16],
    entries_at: u64,
    entry_size: u64,
    entries: Vec<u8>,
}

/// Reads the table, if there is one.
///
/// # Errors
/// [`Error::Io`] only: a header that is damaged is none, as long as the other is sound.
pub(super) fn read(disk: &View<'_>, sector: Option<u64>) -> Result<Option<Table>, Error> {
    // Where it is not known, it is the size with which there is a header.
    for sector in sector.map_or(vec![512, 4096], |sector| vec![sector]) {
        if let Some(table) = read_with(disk, sector)? {
            return Ok(Some(table));
        }
    }
    Ok(None)
}

fn read_with(disk: &View<'_>, sector: u64) -> Result<Option<Table>, Error> {
    let Some(last) = disk.size().checked_div(sector).and_then(|sectors| sectors.checked_sub(1)) else {
        return Ok(None);
    };
    let primary = half(disk, sector, 1);
    // A disk that grew has it where its end was.
    let alternate = primary.as_ref().ok().map_or(last, |half| half.alternate);
    let backup = half(disk, sector, alternate);
    let mut notes = Vec::new();
    let (one, other) = match (primary, backup) {
        (Ok(primary), Ok(backup)) => (primary, Some(backup)),
        (Ok(primary), Err(Error::Io(error))) | (Err(Error::Io(error)), Ok(primary)) => {
            notes.push(format!("one of its headers cannot be read: {}", crate::error::chain(&error)));
            (primary, None)
        }
        (Ok(primary), Err(why)) => {
            notes.push(format!("the backup header in sector {alternate} is not sound: {why}"));
            (primary, None)
        }
        (Err(why), Ok(backup)) => {
            notes.push(format!("the primary header is not sound, the backup is used: {why}"));
            (backup, None)
        }
        (Err(Error::Io(error)), Err(_)) | (Err(_), Err(Error::Io(error))) => return Err(error.into()),
        (Err(_), Err(_)) => return Ok(None),
    };
    if one.lba.max(one.alternate) != last {
        notes.push(format!(
            "its backup lies in sector {}, and the disk's last is {last}",
            one.lba.max(one.alternate)
        ));
    }
    let mut table = Table::new("gpt", Some(guid(one.guid).to_uppercase()), sector);
    table.notes = notes;
    table.takes(0, sector);
    for half in [Some(&one), other.as_ref()].into_iter().flatten() {
        table.takes(half.lba.saturating_mul(sector), sector);
        let len = u64::try_from(half.entries.len()).unwrap_or(u64::MAX);
        table.takes(half.entries_at, len.checked_next_multiple_of(sector).unwrap_or(len));
    }
    if let Some(other) = &other {
        let key = |half: &Half| (half.guid, half.first_usable, half.last_usable, half.entry_size);
        if key(&one) != key(other) || one.entries != other.entries {
            table.flaw(Error::unsupported("two sound headers that say different things"));
        }
    }
    partitions(&one, &mut table);
    Ok(Some(table))
}

fn half(disk: &View<'_>, sector: u64, lba: u64) -> Result<Half, Error> {
    let at = lba.saturating_mul(sector);
    let block = disk.read(at, sector)?;
    let header = block.fields();
    if !header.has(0, SIGNATURE) {
        return Err(header.corrupt("no signature of a GPT", 0));
    }
    let size = u64::from(header.le32(12)?);
    if !(HEADER_LEN..=sector).contains(&size) {
        return Err(header.corrupt("a header whose size is out of bounds", 12));
    }
    let mut checked = header.bytes(0, size)?.to_vec();
    checked.iter_mut().skip(16).take(4).for_each(|byte| *byte = 0);
    if crc32(&checked) != header.le32(16)? {
        return Err(header.corrupt("a header whose checksum does not hold", 16));
    }
    if header.le32(8)? >> 16 != 1 {
        return Err(header.corrupt("a header of another revision", 8));
    }
    if header.le64(24)? != lba {
        return Err(header.corrupt("a header that says it lies in another sector", 24));
    }
    let (first_usable, last_usable) = (header.le64(40)?, header.le64(48)?);
    let disk_end = disk.size().checked_div(sector).unwrap_or(0);
    if first_usable > last_usable || last_usable >= disk_end {
        return Err(header.corrupt("usable sectors that do not lie on the disk", 40));
    }
    let (count, entry_size) = (u64::from(header.le32(80)?), u64::from(header.le32(84)?));
    if entry_size < 128 || !entry_size.is_power_of_two() {
        return Err(header.corrupt("a size of entries that is not allowed", 84));
    }
    let len = count.saturating_mul(entry_size);
    if len == 0 || len > MAX_ENTRIES {
        return Err(header.corrupt("a number of entries that is out of bounds", 80));
    }
    let entries_at = header.le64(72)?.saturating_mul(sector);
    let entries = disk.read(entries_at, len)?;
    if crc32(entries.bytes()) != header.le32(88)? {
        return Err(header.corrupt("entries whose checksum does not hold", 88));
    }
    Ok(Half {
        lba,
        alternate: header.le64(32)?,
        first_usable,
        last_usable,
        guid: header.array(56)?,
        entries_at,
        entry_size,
        entries: entries.bytes().to_vec(),
    })
}

fn partitions(half: &Half, table: &mut Table) {
    let len = usize::try_from(half.entry_size).unwrap_or(usize::MAX);
    let places = (0u64..).map(|index| half.entries_at.saturating_add(index.saturating_mul(half.entry_size)));
    for ((number, at), bytes) in (1..).zip(places).zip(half.entries.chunks_exact(len)) {
        match partition(half, table.sector, number, Fields::new(bytes, at)) {
            Ok(partition) => table.partitions.extend(partition),
            Err(why) => table.flaw(why),
        }
    }
}

fn partition(half: &Half, sector: u64, number: u32, entry: Fields<'_>) -> Result<Option<Partition>, Error> {
    let kind = entry.array(0)?;
    if kind == [0; 16] {
        return Ok(None);
    }
    let (first, last) = (entry.le64(32)?, entry.le64(40)?);
    if first < half.first_usable || last > half.last_usable {
        return Err(entry.corrupt("a partition beyond the usable sectors", 32));
    }
    let end = last.saturating_add(1).saturating_mul(sector);
    let extent = between(first.saturating_mul(sector), end);
    let units: Vec<u16> = (56..128).step_by(2).map(|at| entry.le16(at)).collect::<Result<_, _>>()?;
    let name: Vec<u16> = units.into_iter().take_while(|unit| *unit != 0).collect();
    Ok(Some(Partition {
        number,
        extent: extent.ok_or_else(|| entry.corrupt("a partition that ends before it begins", 40))?,
        kind: guid(kind),
        uuid: Some(guid(entry.array(16)?)),
        name: Some(String::from_utf16_lossy(&name)).filter(|name| !name.is_empty()),
        bootable: entry.le64(48)? & LEGACY_BOOT != 0,
        container: false,
    }))
}

/// A GUID is a UUID whose first three fields are little-endian.
fn guid(bytes: [u8; 16]) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
    let [i, j, k, l, m, n, o, p] = rest;
    fields::uuid([d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p])
}
