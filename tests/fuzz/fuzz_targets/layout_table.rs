//! Any bytes as the beginning of a disk, once with the checksums of a GPT put right: reading never panics, and what is used
//! lies on the disk, with its first and last MiB.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::checksum::crc32;

#[path = "layout/sparse.rs"]
mod sparse;

fn seal(bytes: &mut [u8], sector: usize) -> Option<()> {
    let word = |bytes: &[u8], at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    bytes.get_mut(sector..)?.get_mut(..8)?.copy_from_slice(b"EFI PART");
    let entries = usize::try_from(word(bytes, sector + 72)?).ok()?.checked_mul(sector)?;
    let len = usize::try_from(word(bytes, sector + 80)?.checked_mul(word(bytes, sector + 84)?)?).ok()?;
    let crc = crc32(bytes.get(entries..entries.checked_add(len)?)?);
    bytes.get_mut(sector + 88..)?.get_mut(..4)?.copy_from_slice(&crc.to_le_bytes());
    bytes.get_mut(sector + 16..)?.get_mut(..4)?.fill(0);
    let size = usize::try_from(word(bytes, sector + 12)?).ok()?;
    let crc = crc32(bytes.get(sector..sector.checked_add(size)?)?);
    bytes.get_mut(sector + 16..)?.get_mut(..4)?.copy_from_slice(&crc.to_le_bytes());
    Some(())
}

fuzz_target!(|bytes: &[u8]| {
    sparse::check(bytes, Some(512));
    sparse::check(bytes, None);
    for sector in [512, 4096] {
        let mut sealed = bytes.to_vec();
        if seal(&mut sealed, sector).is_some() {
            sparse::check(&sealed, Some(sector as u64));
        }
    }
});
