//! CRC-32C (Castagnoli), the checksum of every header and payload (RFC 3720, appendix B.4 has test vectors).

/// The CRC-32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_vectors_of_rfc_3720() {
        assert_eq!(super::crc32c(&[0u8; 32]), 0x8a91_36aa);
        assert_eq!(super::crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(super::crc32c(&ascending), 0x46dd_794e);
    }
}
