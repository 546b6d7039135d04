//! Compression of data frames: LZ4 blocks and Zstandard frames.
//!
//! Both directions know the exact length of the plain bytes (the frame's length), so nothing here allocates
//! by what a payload claims.

use std::io;

use super::frame::Encoding;

/// Zstandard's level: the fastest that compresses better than LZ4 does.
const ZSTD_LEVEL: i32 = 1;

/// Compresses `plain` into `packed`, and says whether that made it smaller (if not, `packed` is unspecified and
/// the bytes are to be sent raw).
pub fn pack(encoding: Encoding, plain: &[u8], packed: &mut Vec<u8>) -> bool {
    let room = match encoding {
        Encoding::Raw => return false,
        Encoding::Lz4 => lz4_flex::block::get_maximum_output_size(plain.len()),
        // Room for less than the plain bytes: a frame that does not fit is of no use.
        Encoding::Zstd => plain.len(),
    };
    packed.resize(room, 0);
    let len = match encoding {
        Encoding::Raw => return false,
        Encoding::Lz4 => lz4_flex::block::compress_into(plain, packed).ok(),
        Encoding::Zstd => zstd::bulk::compress_to_buffer(plain, &mut packed[..], ZSTD_LEVEL).ok(),
    };
    match len {
        Some(len) if len < plain.len() => {
            packed.truncate(len);
            true
        }
        _ => false,
    }
}

/// Decompresses `packed` into `plain`, which it must fill exactly.
pub fn unpack(encoding: Encoding, packed: &[u8], plain: &mut [u8]) -> io::Result<()> {
    let len = match encoding {
        Encoding::Raw => {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "raw bytes are not compressed"));
        }
        Encoding::Lz4 => lz4_flex::block::decompress_into(packed, plain).map_err(io::Error::other)?,
        Encoding::Zstd => {
            one_frame(packed)?;
            zstd::bulk::decompress_to_buffer(packed, plain)?
        }
    };
    if len == plain.len() {
        Ok(())
    } else {
        let text = format!("a compressed payload holds {len} bytes, and its frame covers {}", plain.len());
        Err(io::Error::new(io::ErrorKind::InvalidData, text))
    }
}

/// The decoder takes any number of frames, and skips those of other formats: here is one and nothing else.
fn one_frame(packed: &[u8]) -> io::Result<()> {
    const MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();
    match zstd::zstd_safe::find_frame_compressed_size(packed) {
        Ok(len) if len == packed.len() && packed.starts_with(&MAGIC) => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not one Zstandard frame")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zstandard_payload_is_one_frame() {
        let plain = [7; 4096];
        let mut half = Vec::new();
        assert!(pack(Encoding::Zstd, &plain[..2048], &mut half));
        let mut whole = Vec::new();
        assert!(pack(Encoding::Zstd, &plain, &mut whole));
        let skippable = [&0x184d_2a50_u32.to_le_bytes()[..], &4_u32.to_le_bytes(), b"skip"].concat();
        let mut out = [0; 4096];
        unpack(Encoding::Zstd, &whole, &mut out).unwrap();
        for several in [
            [half.clone(), half].concat(),
            [whole.clone(), skippable.clone()].concat(),
            [skippable, whole].concat(),
        ] {
            assert!(unpack(Encoding::Zstd, &several, &mut out).is_err());
        }
    }

    #[test]
    fn what_was_packed_comes_back_and_only_where_it_got_smaller() {
        let text: Vec<u8> = (0..1 << 16).map(|n: u32| (n % 251) as u8).collect();
        let noise: Vec<u8> = (0..1 << 16)
            .scan(1u64, |state, _| {
                *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                Some((*state >> 56) as u8)
            })
            .collect();
        for encoding in [Encoding::Lz4, Encoding::Zstd] {
            let mut packed = Vec::new();
            assert!(pack(encoding, &text, &mut packed) && packed.len() < text.len());
            let mut plain = vec![0; text.len()];
            unpack(encoding, &packed, &mut plain).unwrap();
            assert!(plain == text);
            assert!(unpack(encoding, &packed, &mut vec![0; text.len() - 1]).is_err());
            assert!(unpack(encoding, &packed, &mut vec![0; text.len() + 1]).is_err());
            assert!(unpack(encoding, &packed[..packed.len() / 2], &mut plain).is_err());
            assert!(!pack(encoding, &noise, &mut packed));
        }
        assert!(!pack(Encoding::Raw, &text, &mut Vec::new()));
    }
}
