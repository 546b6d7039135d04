//! Numbers at an offset of some bytes; `None` where the bytes end before.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

/// The `N` bytes from `at` on.
pub fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// A little-endian number of two bytes.
pub fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

/// A little-endian number of four bytes.
pub fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

/// A little-endian number of eight bytes.
pub fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// A big-endian number of two bytes.
pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

/// A big-endian number of four bytes.
pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}

/// A big-endian number of eight bytes.
pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_from_their_place_and_never_from_beyond_the_end() {
        let bytes = [0, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(le16(&bytes, 1), Some(0x0201));
        assert_eq!(be16(&bytes, 7), Some(0x0708));
        assert_eq!(le32(&bytes, 5), Some(0x0807_0605));
        assert_eq!(be32(&bytes, 5), Some(0x0506_0708));
        assert_eq!(le64(&bytes, 1), Some(0x0807_0605_0403_0201));
        assert_eq!(be64(&bytes, 1), Some(0x0102_0304_0506_0708));
        assert_eq!((be16(&bytes, 8), le32(&bytes, 6), le64(&bytes, 2)), (None, None, None));
        assert_eq!((be64(&bytes, 9), le16(&bytes, usize::MAX)), (None, None));
    }
}
