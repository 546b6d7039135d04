//! Checksums: CRC-32C (Castagnoli), that of every header and payload of ours (RFC 3720, appendix B.4 has test vectors);
//! and those that are found on disks.

/// The CRC-32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}

/// The register of a CRC-32C that stood at `register`, after `bytes`; nothing is inverted. Of formats whose seed or end is
/// their own: the CRC-32C as usual is `!crc32c_raw(!0, bytes)`.
pub fn crc32c_raw(register: u32, bytes: &[u8]) -> u32 {
    !::crc32c::crc32c_append(!register, bytes)
}

/// The CRC-32 of IEEE 802.3, as in GPT and gzip.
pub fn crc32(bytes: &[u8]) -> u32 {
    !crc32_raw(!0, bytes)
}

/// The register of a CRC-32 of IEEE 802.3 that stood at `register`, after `bytes`; nothing is inverted.
pub fn crc32_raw(register: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(register, |register, byte| {
        let [low, ..] = register.to_le_bytes();
        CRC32[usize::from(low ^ byte)] ^ (register >> 8)
    })
}

/// What each value of the register's lowest byte becomes.
const CRC32: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut register = index as u32;
        let mut bit = 0;
        while bit < 8 {
            register = (register >> 1) ^ (0xedb8_8320 & (register & 1).wrapping_neg());
            bit += 1;
        }
        table[index] = register;
        index += 1;
    }
    table
};

/// The register of a CRC-16 (polynomial 0x8005, the lowest bit first) that stood at `register`, after `bytes`; nothing is
/// inverted.
pub fn crc16_raw(register: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(register, |register, byte| {
        (0..8).fold(register ^ u16::from(*byte), |register, _| {
            (register >> 1) ^ (0xa001 & (register & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc16_has_the_check_value_of_the_catalogues() {
        // As CRC-16/MODBUS.
        assert_eq!(crc16_raw(crc16_raw(!0, b"12345"), b"6789"), 0x4b37);
    }

    #[test]
    fn agrees_with_the_vectors_of_rfc_3720() {
        assert_eq!(crc32c(&[0u8; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
        assert_eq!(!crc32c_raw(crc32c_raw(!0, &ascending[..7]), &ascending[7..]), 0x46dd_794e);
    }

    #[test]
    fn crc32_has_the_check_value_of_the_catalogues() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(!crc32_raw(crc32_raw(!0, b"1234"), b"56789"), 0xcbf4_3926);
    }
}
