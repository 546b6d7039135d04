//! Any bytes as the beginning of a disk, each kind's magic put into its place: what is recognised by name is described
//! without a panic, and all of it is used.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "layout/sparse.rs"]
mod sparse;

const MAGICS: [(usize, &[u8]); 10] = [
    (4086, b"SWAPSPACE2"),
    (0, b"LUKS\xba\xbe"),
    (0, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
    (4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
    (3, b"NTFS    "),
    (0x52, b"FAT32   "),
    (0x36, b"FAT16   "),
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ((32 << 10) + 1, b"CD001"),
    ((64 << 10) + 64, b"_BHRfS_M"),
];

fuzz_target!(|bytes: &[u8]| {
    sparse::check(bytes, Some(512));
    let Some((which, bytes)) = bytes.split_first() else { return };
    let (at, magic) = MAGICS[usize::from(*which) % MAGICS.len()];
    let mut disk = bytes.to_vec();
    disk.resize(disk.len().max(at + magic.len()), 0);
    disk[at..at + magic.len()].copy_from_slice(magic);
    sparse::check(&disk, Some(512));
});
