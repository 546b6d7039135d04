//! Any bytes as the beginning of a disk that is to hold an XFS: as they are, and with all checksums made right, behind
//! which the rest of the parser lies. A map is within the file system, and has its groups' headers as used.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::checksum::crc32c;
use mt_agent::layout::Allocation;
use mt_agent::layout::ranges::between;
use mt_agent::layout::tree::{Content, Layout};

#[path = "layout/sparse.rs"]
mod sparse;

/// The magic of a structure, where its checksum lies, and whether it takes a block and not a sector.
const STRUCTURES: [(&[u8], usize, bool); 6] = [
    (b"XFSB", 224, false),
    (b"XAGF", 216, false),
    (b"XAGI", 312, false),
    (b"XAFL", 32, false),
    (b"AB3B", 52, true),
    (b"AB3C", 52, true),
];

fuzz_target!(|bytes: &[u8]| {
    let mut disk = bytes.to_vec();
    disk.resize(disk.len().max(512), 0);
    disk[..4].copy_from_slice(b"XFSB");
    check(&disk);
    seal(&mut disk);
    check(&disk);
});

fn check(disk: &[u8]) {
    let layout: Layout = sparse::check(disk, Some(512));
    let Some(Content::FileSystem(found)) = layout.disks.first().map(|disk| &disk.content) else { return };
    let Allocation::Known(used) = &found.allocation else { return };
    assert!(used.iter().all(|range| range.end() <= found.size.0));
    let (group, sector) = (number(disk, 84, 4) * number(disk, 4, 4), number(disk, 102, 2));
    for group in (0..found.size.0).step_by(group as usize) {
        assert!(used.covers(between(group, group + 4 * sector).expect("not empty")));
    }
}

fn number(disk: &[u8], at: usize, len: usize) -> u64 {
    disk[at..at + len].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Makes the checksums right wherever a structure seems to begin.
fn seal(disk: &mut [u8]) {
    let (block, sector) = (number(disk, 4, 4) as usize, number(disk, 102, 2) as usize);
    for at in (0..disk.len()).step_by(512) {
        for (magic, field, is_block) in STRUCTURES {
            let len = if is_block { block } else { sector };
            if disk[at..].starts_with(magic) && (512..=65536).contains(&len) && disk.len() - at >= len {
                let structure = &mut disk[at..at + len];
                structure[field..field + 4].fill(0);
                let sum = crc32c(structure);
                structure[field..field + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        // A record of the log: its header and as many blocks behind it as it says.
        if disk[at..].starts_with(b"\xfe\xed\xba\xbe") && disk.len() - at >= 512 {
            let body = number(disk, at + 12, 4) as usize;
            if body <= 32 << 10 && disk.len() - at - 512 >= body {
                disk[at + 32..at + 36].fill(0);
                let summed = [&disk[at..at + 328], &disk[at + 512..at + 512 + body]].concat();
                disk[at + 32..at + 36].copy_from_slice(&crc32c(&summed).to_le_bytes());
            }
        }
    }
}
