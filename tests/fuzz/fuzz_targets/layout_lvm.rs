//! Any bytes as a physical volume, with its checksums put right, and as the text of one: reading never panics, and of the
//! extents that a volume has none is free, unless its file system says so.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::layout::lvm::{checksum, text};
use mt_agent::layout::tree::Content;

#[path = "layout/sparse.rs"]
mod sparse;

/// Where the seeds have their metadata area.
const AREA: usize = 4096;

fn check(bytes: &[u8]) {
    let layout = sparse::check(bytes, Some(512));
    let used = layout.used(0).expect("it is the only disk");
    if !matches!(layout.disks[0].content, Content::PhysicalVolume(_)) {
        return;
    }
    for one in layout.groups.iter().filter(|one| one.group.flaw.is_none()) {
        for (volume, content) in one.group.volumes.iter().zip(&one.contents) {
            // What a file system proves free is another target's business.
            if matches!(content, Some(Content::FileSystem(_))) {
                continue;
            }
            for stripes in volume.segments.iter().filter_map(|segment| segment.stripes.as_ref()) {
                let here = stripes.areas.iter().filter(|area| one.group.members[area.member].found.is_some());
                here.for_each(|area| assert!(used.covers(area.extent)));
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    _ = text::parse(bytes);
    check(bytes);
    let mut sealed = bytes.to_vec();
    if sealed.len() < AREA + 512 {
        return;
    }
    sealed[512..520].copy_from_slice(b"LABELONE");
    sealed[536..544].copy_from_slice(b"LVM2 001");
    // The text, as far as its place is one.
    let number = |at: usize| u64::from_le_bytes(*sealed[at..].first_chunk().expect("it is long enough"));
    let (at, len) = (number(AREA + 40).saturating_add(AREA as u64), number(AREA + 48));
    let range = at as usize..at.saturating_add(len) as usize;
    if let Some(crc) = sealed.get(range).map(checksum) {
        sealed[AREA + 56..AREA + 60].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = checksum(&sealed[532..1024]);
    sealed[528..532].copy_from_slice(&crc.to_le_bytes());
    let crc = checksum(&sealed[AREA + 4..AREA + 512]);
    sealed[AREA..AREA + 4].copy_from_slice(&crc.to_le_bytes());
    check(&sealed);
});
