//! A disk that begins with some bytes and is zeros from there on.

use mt_agent::error::IoError;
use mt_agent::layout::ranges::between;
use mt_agent::layout::tree::{Disk, Layout, read};
use mt_agent::storage::ReadAt;

/// Larger than the bytes, so that places beyond them are on the disk.
const SIZE: u64 = 64 << 20;

struct Sparse<'a>(&'a [u8]);

impl ReadAt for Sparse<'_> {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        assert!(offset + buf.len() as u64 <= SIZE);
        buf.fill(0);
        let own = self.0.get(offset as usize..).unwrap_or_default();
        let len = own.len().min(buf.len());
        buf[..len].copy_from_slice(&own[..len]);
        Ok(())
    }
}

/// Reads the disk and looks at what is said to be used.
pub fn check(bytes: &[u8], sector: Option<u64>) -> Layout {
    let reader = Sparse(bytes);
    let layout = read(&[Disk { reader: &reader, sector }]);
    let used = layout.used(0).expect("it is the only disk");
    assert!(used.iter().all(|range| range.end() <= SIZE));
    assert!(used.covers(between(0, 1 << 20).expect("not empty")));
    assert!(used.covers(between(SIZE - (1 << 20), SIZE).expect("not empty")));
    layout
}
