//! Any disk as one with ext2, ext3 or ext4: no panic, no hang, no memory without bound; and what is said to be used lies on
//! the disk. Disks come as pieces, all between them zeros: the size in units of 64 KiB (2 bytes), whether checksums are made
//! to hold (1 byte); then of each piece the sector (3 bytes), its length (2 bytes), and its bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::checksum::crc32c_raw;
use mt_agent::error::IoError;
use mt_agent::layout::view::View;
use mt_agent::layout::{Allocation, ext4};
use mt_agent::storage::ReadAt;

struct Pieces {
    size: u64,
    all: Vec<(u64, Vec<u8>)>,
}

impl ReadAt for Pieces {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let end = offset + buf.len() as u64;
        assert!(end <= self.size, "read beyond the end");
        buf.fill(0);
        for (at, bytes) in &self.all {
            let (from, to) = (offset.max(*at), end.min(at + bytes.len() as u64));
            if from < to {
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            }
        }
        Ok(())
    }
}

fuzz_target!(|bytes: &[u8]| {
    let [a, b, seal, rest @ ..] = bytes else { return };
    let mut disk = Pieces { size: u64::from(u16::from_le_bytes([*a, *b])) << 16, all: Vec::new() };
    let mut rest = rest;
    while let [a, b, c, low, high, tail @ ..] = rest {
        let at = u64::from(u32::from_le_bytes([*a, *b, *c, 0])) * 512;
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(tail.len());
        let (piece, tail) = tail.split_at(len);
        disk.all.push((at, piece.to_vec()));
        rest = tail;
    }
    if seal & 1 == 1 {
        let mut superblock = [0; 1024];
        if disk.size >= 2048 {
            disk.read_at(1024, &mut superblock).expect("it lies on the disk");
        }
        let crc = crc32c_raw(!0, &superblock[..0x3fc]);
        disk.all.push((1024 + 0x3fc, crc.to_le_bytes().to_vec()));
    }
    if let Ok(Some(found)) = ext4::read(&View::new(&disk))
        && let Allocation::Known(used) = found.allocation
    {
        assert!(found.size.0 <= disk.size);
        assert!(used.iter().all(|range| range.end() <= found.size.0));
    }
});
