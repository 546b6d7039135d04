//! What is recognised by name and not looked into: its UUID and label as `blkid` prints them, and all of it used.

use super::fields::{Fields, uuid};
use super::signature::MEMBERS;
use super::view::View;
use super::{Allocation, Error, FileSystem};
use crate::units::ByteLen;

const MEMBER: &str = "a member of something larger";

/// Describes what announced itself as `kind`.
pub(super) fn read(kind: &'static str, view: &View<'_>) -> Result<FileSystem, Error> {
    let why = Error::unsupported(match kind {
        "swap" => "what swap holds".to_owned(),
        "crypto_LUKS" | "BitLocker" => "encrypted data".to_owned(),
        "swsuspend" => "the memory of a machine that sleeps".to_owned(),
        "bcache" | "zfs_member" | "LVM1_member" | "VMFS_volume_member" | "stratis" | "oracleasm" => {
            MEMBER.to_owned()
        }
        _ if MEMBERS.contains(&kind) => MEMBER.to_owned(),
        _ => format!("the free space of {kind}"),
    });
    let mut found = FileSystem::new(kind, view.size(), Allocation::Whole { why });
    match kind {
        "swap" => swap(view, &mut found)?,
        "crypto_LUKS" => luks(view, &mut found)?,
        "linux_raid_member" => md(view, &mut found)?,
        "bcache" => bcache(view, &mut found)?,
        "btrfs" => btrfs(view, &mut found)?,
        "vfat" => fat(view, &mut found)?,
        "ntfs" => ntfs(view, &mut found)?,
        "iso9660" => iso(view, &mut found)?,
        "ocfs2" => ocfs2(view, &mut found)?,
        "gfs" | "gfs2" => {
            let block = view.read(64 << 10, 512)?;
            found.label = block.fields().label(160, 64)?;
            found.uuid = block.fields().uuid(256)?;
        }
        "jbd" => {
            let block = view.read(1024, 256)?;
            let header = block.fields();
            found.version = Some(format!("{}.{}", header.le32(0x4c)?, header.le16(0x3e)?));
            found.uuid = header.uuid(0x68)?;
            found.label = header.label(0x78, 16)?;
        }
        _ => {}
    }
    Ok(found)
}

fn swap(view: &View<'_>, found: &mut FileSystem) -> Result<(), Error> {
    for page in [4u64 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10] {
        let Ok(end) = view.read(page.saturating_sub(10), 10) else { break };
        if end.bytes() == b"SWAP-SPACE" {
            found.version = Some("0".to_owned());
            found.block_size = Some(page);
            return Ok(());
        }
        if end.bytes() != b"SWAPSPACE2" {
            continue;
        }
        let block = view.read(1024, 64)?;
        let header = block.fields();
        found.block_size = Some(page);
        // The version and the numbers are those of whatever processor made it.
        let little = header.le32(0)? == 1;
        if little || header.be32(0)? == 1 {
            let last = if little { header.le32(4)? } else { header.be32(4)? };
            found.version = Some("1".to_owned());
            found.size = ByteLen(u64::from(last).saturating_add(1).saturating_mul(page));
            found.uuid = header.uuid(12)?;
            found.label = header.label(28, 16)?;
        }
        return Ok(());
    }
    Err(Error::Corrupt { what: "no signature of swap", at: 0 })
}

fn ocfs2(view: &View<'_>, found: &mut FileSystem) -> Result<(), Error> {
    // Its superblock is the third block, of whatever size.
    for size in (9..=12).map(|shift| 1u64 << shift) {
        let block = view.read(size.saturating_mul(2), 512)?;
        let header = block.fields();
        if header.has(0, b"OCFSV2") {
            found.version = Some(format!("{}.{}", header.le16(192)?, header.le16(194)?));
            found.block_size = Some(size);
            found.label = header.label(272, 64)?;
            found.uuid = header.uuid(336)?;
            break;
        }
    }
    Ok(())
}

fn luks(view: &View<'_>, found: &mut FileSystem) -> Result<(), Error> {
    let block = view.read(0, 256)?;
    let header = block.fields();
    if header.has(0, b"LUKS\xba\xbe") {
        let version = header.be16(6)?;
        found.version = Some(version.to_string());
        found.uuid = header.label(168, 40)?;
        if version == 2 {
            found.label = header.label(24, 48)?;
        }
    } else {
        found.notes.push("its first header is not there".to_owned());
    }
    Ok(())
}

/// The super block of an array: of version 1 at one of three places, of version 0.90 at one more.
fn md(view: &View<'_>, found: &mut FileSystem) -> Result<(), Error> {
    let magic = b"\xfc\x4e\x2b\xa9";
    let size = view.size();
    let end = size.saturating_sub(0x2000) & !0xfff;
    for (version, at) in [("1.1", 0), ("1.2", 4096), ("1.0", end)] {
        let Ok(block) = view.read(at, 256) else { continue };
        let header = block.fields();
        if header.has(0, magic) && header.le32(4)? == 1 {
            found.version = Some(version.to_owned());
            found.uuid = header.uuid(16)?;
            found.label = header.label(32, 32)?;
            return Ok(());
        }
    }
    let block = view.read((size & !0xffff).saturating_sub(0x1_0000), 4096)?;
    let header = block.fields();
    // Its numbers are those of the processor that made it, and a UUID is four of them.
    let read = if header.has(0, magic) { Fields::le32 } else { Fields::be32 };
    let number = |index: u64| read(header, index.saturating_mul(4));
    found.version = Some(format!("{}.{}.{}", number(1)?, number(2)?, number(3)?));
    let words = [number(5)?, number(13)?, number(14)?, number(15)?].map(u32::to_le_bytes);
    if let Ok(bytes) = words.concat().try_into() {
        found.uuid = Some(uuid(bytes));
    }
    Ok(())
}

fn bcache(view: &View<'_>, found: &mut FileSystem) -> Result<(), Error> {
    let block = view.read(4096, 256)?;
    found.uuid = block.fields().uuid(40)?;
    found.label = block.fields().label(72, 32)?;
    Ok(())
}

fn btrfs(view: &View<'_>, found: &mut FileSystem) -> Result<(), Error> {
    let block = view.read(64 << 10, 4096)?;
    let header = block.fields();
    found.uuid = header.uuid(32)?;
    found.label = header.label(0x12b, 256)?;
    found.block_size = Some(u64::from(header.le32(0x90)?));
    let (total, used) = (header.le64(0x70)?, header.le64(0x78)?);
    // Of one on a single device; of several, this one does not hold all of it.
    if header.le64(0x88)? == 1 && total <= view.size() {
        found.size = ByteLen(total);
        found.free = total.checked_sub(used).map(ByteLen);
    }
    Ok(())
}

fn fat(view: &View<'_>, found: &mut FileSystem) -> Result<(), Error> {
    let block = view.read(0, 512)?;
    let boot = block.fields();
    let sector = u64::from(boot.le16(11)?);
    let cluster = u64::from(boot.u8(13)?).saturating_mul(sector);
    let reserved = u64::from(boot.le16(14)?).saturating_mul(sector);
    let root_len = u64::from(boot.le16(17)?).saturating_mul(32);
    let sectors = match boot.le16(19)? {
        0 => u64::from(boot.le32(32)?),
        few => u64::from(few),
    };
    let fat_sectors = match boot.le16(22)? {
        0 => u64::from(boot.le32(36)?),
        few => u64::from(few),
    };
    let tables = u64::from(boot.u8(16)?).saturating_mul(fat_sectors).saturating_mul(sector);
    let root = reserved.saturating_add(tables);
    let data = root.saturating_add(root_len.checked_next_multiple_of(sector.max(1)).unwrap_or(root_len));
    let size = sectors.saturating_mul(sector);
    let clusters = size.saturating_sub(data).checked_div(cluster);
    let clusters = clusters.ok_or_else(|| boot.corrupt("sectors or clusters without a size", 11))?;
    let is_32 = boot.le16(22)? == 0 && boot.le32(36)? != 0;
    found.version = Some(
        if is_32 {
            "FAT32"
        } else if clusters < 4085 {
            "FAT12"
        } else {
            "FAT16"
        }
        .to_owned(),
    );
    found.block_size = Some(sector);
    found.size = ByteLen(size);
    let serial = boot.le32(if is_32 { 67 } else { 39 })?;
    found.uuid = (serial != 0).then(|| format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff));
    found.label = match is_32 {
        false => volume_name(view.read(root, root_len)?.fields())?.flatten(),
        true => {
            let chain = Chain { view, table: reserved, data, cluster, clusters };
            chain.volume_name(boot.le32(44)?)?
        }
    };
    Ok(())
}

/// The clusters of FAT32's root directory.
struct Chain<'v> {
    view: &'v View<'v>,
    table: u64,
    data: u64,
    cluster: u64,
    clusters: u64,
}

impl Chain<'_> {
    fn volume_name(&self, first: u32) -> Result<Option<String>, Error> {
        let mut next = u64::from(first & 0x0fff_ffff);
        // The name is among the first of a directory; no chain is followed in a circle.
        for _ in 0..64 {
            let Some(index) = next.checked_sub(2).filter(|index| *index < self.clusters) else { break };
            let at = self.data.saturating_add(index.saturating_mul(self.cluster));
            if let Some(end) = volume_name(self.view.read(at, self.cluster)?.fields())? {
                return Ok(end);
            }
            let entry = self.view.read(self.table.saturating_add(next.saturating_mul(4)), 4)?;
            next = u64::from(entry.fields().le32(0)? & 0x0fff_ffff);
        }
        Ok(None)
    }
}

/// The volume's name in a piece of a directory; `Some(None)` where the directory ends without one.
fn volume_name(directory: Fields<'_>) -> Result<Option<Option<String>>, Error> {
    for entry in directory.all().chunks_exact(32) {
        let entry = Fields::new(entry, directory.at());
        match (entry.u8(0)?, entry.u8(11)?) {
            (0, _) => return Ok(Some(None)),
            (0xe5, _) => {}
            // A name, and no piece of a long one.
            (_, attributes) if attributes & 0x18 == 0x08 && attributes != 0x0f => {
                return Ok(Some(entry.label(0, 11)?));
            }
            _ => {}
        }
    }
    Ok(None)
}

fn ntfs(view: &View<'_>, found: &mut FileSystem) -> Result<(), Error> {
    let block = view.read(0, 512)?;
    let boot = block.fields();
    let sector = u64::from(boot.le16(11)?);
    let cluster = match boot.u8(13)? {
        few @ 0..=128 => u64::from(few),
        // A power of two, negated.
        power => 1u64.checked_shl(u32::from(power.wrapping_neg())).unwrap_or(0),
    }
    .saturating_mul(sector);
    let record = match boot.u8(64)? {
        few @ 0..=127 => u64::from(few).saturating_mul(cluster),
        power => 1u64.checked_shl(u32::from(power.wrapping_neg())).unwrap_or(0),
    };
    found.block_size = Some(sector);
    found.size = ByteLen(boot.le64(40)?.saturating_mul(sector));
    found.uuid = Some(format!("{:016X}", boot.le64(72)?));
    // The fourth file is the volume itself.
    let at = boot.le64(48)?.saturating_mul(cluster).saturating_add(record.saturating_mul(3));
    if !(512..=65536).contains(&record) {
        return Err(boot.corrupt("a size of file records that is out of bounds", 64));
    }
    let block = view.read(at, record)?;
    let file = block.fields();
    if !file.has(0, b"FILE") {
        return Err(file.corrupt("a file record without its signature", 0));
    }
    let mut at = u64::from(file.le16(20)?);
    while let Ok(attribute) = file.part(at, 24) {
        let (kind, len) = (attribute.le32(0)?, u64::from(attribute.le32(4)?));
        if kind == 0xffff_ffff || len < 24 {
            break;
        }
        if kind == 0x60 {
            let from = at.saturating_add(u64::from(attribute.le16(20)?));
            let name = file.bytes(from, u64::from(attribute.le32(16)?))?;
            let units: Vec<u16> = name.as_chunks().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
            found.label = Some(String::from_utf16_lossy(&units)).filter(|label| !label.is_empty());
            break;
        }
        at = at.saturating_add(len);
    }
    Ok(())
}

fn iso(view: &View<'_>, found: &mut FileSystem) -> Result<(), Error> {
    const BLOCK: u64 = 2048;
    let block = view.read(32 << 10, BLOCK)?;
    let volume = block.fields();
    found.block_size = Some(u64::from(volume.le16(128)?));
    found.size = ByteLen(u64::from(volume.le32(80)?).saturating_mul(u64::from(volume.le16(128)?)));
    let plain =
        |label: Option<String>| label.map(|label| label.trim().to_owned()).filter(|label| !label.is_empty());
    found.label = plain(volume.label(40, 32)?);
    // When it was last changed, or made: sixteen digits.
    for at in [830, 813] {
        let digits = volume.bytes(at, 16)?;
        if digits.iter().all(u8::is_ascii_digit) && digits.iter().any(|digit| *digit != b'0') {
            let text = String::from_utf8_lossy(digits);
            let mut digits = text.chars();
            let parts = [4, 2, 2, 2, 2, 2, 2].map(|len| digits.by_ref().take(len).collect::<String>());
            found.uuid = Some(parts.join("-"));
            break;
        }
    }
    // A second description may have the label with all of its letters.
    for at in (1..16u64).map(|index| BLOCK.saturating_mul(index.saturating_add(16))) {
        let Ok(block) = view.read(at, BLOCK) else { break };
        let other = block.fields();
        if !other.has(1, b"CD001") || other.u8(0)? == 255 {
            break;
        }
        if other.u8(0)? == 2 && [&b"%/@"[..], b"%/C", b"%/E"].iter().any(|escape| other.has(88, escape)) {
            let units = other.bytes(40, 32)?.as_chunks().0.iter().map(|pair| u16::from_be_bytes(*pair));
            let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
            let joliet = plain(Some(String::from_utf16_lossy(&units)));
            found.version = Some("Joliet Extension".to_owned());
            found.label = joliet.or(found.label.take());
            break;
        }
    }
    Ok(())
}
