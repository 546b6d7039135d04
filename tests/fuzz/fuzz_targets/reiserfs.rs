//! Any bytes as what a ReiserFS has from its superblock on, in either of the places of that: the journal is followed and
//! the bitmaps are read without a panic, and what has a fixed place is used.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "layout/sparse.rs"]
mod sparse;

const MAGICS: [&[u8]; 3] = [b"ReIsErFs\0", b"ReIsEr2Fs", b"ReIsEr3Fs"];

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    let place = if which & 0x80 == 0 { 64 << 10 } else { 8 << 10 };
    let mut disk = vec![0; place];
    disk.extend(bytes);
    disk.resize(disk.len().max(place + 52 + 9), 0);
    let magic = MAGICS[usize::from(which & 0x7f) % MAGICS.len()];
    disk[place + 52..][..magic.len()].copy_from_slice(magic);
    sparse::check(&disk, Some(512));
});
