//! Digests of ranges: how two copies of a disk are compared without sending either. BLAKE3, 32 bytes each.

use std::sync::OnceLock;

/// The digest of a unit.
pub type Digest = [u8; LEN];

/// How many bytes a digest has.
pub const LEN: usize = 32;

/// The unit in which two disks are compared: what is equal costs 32 bytes for each of them.
pub const UNIT: u32 = 64 << 10;

/// The unit in which a range that differs is looked at more closely.
pub const FINE: u32 = 4 << 10;

/// The digests of `bytes`, one for each `unit` bytes; the last may be of less.
pub fn of(bytes: &[u8], unit: u32) -> impl Iterator<Item = Digest> {
    bytes.chunks(unit as usize).map(digest)
}

/// The digest of `len` zeros, one for each `unit` bytes.
pub fn of_zeros(len: u64, unit: u32) -> impl Iterator<Item = Digest> {
    let whole = zeros(unit as usize);
    let rest = (len % u64::from(unit)) as usize;
    let units = std::iter::repeat_n(whole, (len / u64::from(unit)) as usize);
    units.chain((rest > 0).then(|| zeros(rest)))
}

fn digest(bytes: &[u8]) -> Digest {
    // Zeros are found at the speed of memory, and most disks have many.
    if is_zero(bytes) { zeros(bytes.len()) } else { *blake3::hash(bytes).as_bytes() }
}

fn zeros(len: usize) -> Digest {
    static UNITS: [OnceLock<Digest>; 2] = [OnceLock::new(), OnceLock::new()];
    let compute = || *blake3::hash(&vec![0; len]).as_bytes();
    match [UNIT, FINE].iter().position(|unit| *unit as usize == len) {
        Some(index) => *UNITS[index].get_or_init(compute),
        None => compute(),
    }
}

/// Whether all bytes are zero. Random data is found out in the first block, zeros go at the speed of memory: a
/// comparison of slices is the C library's, whatever this was compiled for.
pub fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|block| *block == ZEROS[..block.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_have_the_digests_of_zeros() {
        for (len, unit) in [(200_000, UNIT), (65536, UNIT), (5000, FINE), (4096, FINE), (1, FINE), (0, FINE)]
        {
            let plain: Vec<Digest> =
                vec![0u8; len].chunks(unit as usize).map(|part| *blake3::hash(part).as_bytes()).collect();
            assert_eq!(of(&vec![0; len], unit).collect::<Vec<_>>(), plain);
            assert_eq!(of_zeros(len as u64, unit).collect::<Vec<_>>(), plain);
        }
    }

    /// The empty input of the published test vectors of BLAKE3, and that every byte counts.
    #[test]
    fn the_digest_is_blake3() {
        let empty = blake3::hash(b"").to_hex();
        assert_eq!(empty.as_str(), "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
        let mut bytes = vec![7; 4096];
        let before: Vec<_> = of(&bytes, FINE).collect();
        bytes[4095] = 6;
        assert_ne!(before, of(&bytes, FINE).collect::<Vec<_>>());
    }
}
