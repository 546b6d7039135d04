//! What becomes of the bytes that were read: zeros are left out, the rest is compressed where that pays.

use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use crate::digest::is_zero;
use crate::net::compress::pack;
use crate::net::frame::{Encoding, Header, MAX_ZERO};
use crate::sys::aligned::Buffer;
use crate::units::Extent;

/// How to compress.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Compression {
    /// LZ4, and none for a while where it does not pay.
    #[default]
    Auto,
    /// None.
    Off,
    /// LZ4 wherever it makes a frame smaller.
    Lz4,
    /// Zstandard wherever it makes a frame smaller.
    Zstd,
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Compression, String> {
        Ok(match text {
            "auto" => Compression::Auto,
            "off" => Compression::Off,
            "lz4" => Compression::Lz4,
            "zstd" => Compression::Zstd,
            _ => return Err("give auto, off, lz4 or zstd".to_owned()),
        })
    }
}

impl Compression {
    /// The encodings that it may use.
    pub fn encodings(self) -> Vec<Encoding> {
        match self {
            Compression::Off => Vec::new(),
            Compression::Auto | Compression::Lz4 => vec![Encoding::Lz4],
            Compression::Zstd => vec![Encoding::Zstd],
        }
    }
}

/// A frame without its number.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) header: Header,
    pub(super) payload: Payload,
}

#[derive(Debug)]
pub(super) enum Payload {
    None,
    Raw(Arc<Buffer>, Range<usize>),
    Packed(Vec<u8>),
}

impl Payload {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Payload::None => &[],
            Payload::Raw(buffer, range) => &buffer[range.clone()],
            Payload::Packed(bytes) => bytes,
        }
    }
}

/// The unit in which zeros are looked for, in bytes. Shorter runs cost more as frames than as bytes.
const CELL: usize = 64 << 10;

/// The longest run of zeros in one frame: bounds the time that the receiver needs for it.
const LONGEST_ZERO: u64 = 64 << 20;
const _: () = assert!(LONGEST_ZERO <= MAX_ZERO);

/// Turns chunks into pieces, in ascending order.
#[derive(Debug)]
pub(super) struct Encoder {
    compression: Compression,
    /// Zeros that were seen and not sent yet: the next chunk may prolong them.
    zeros: Option<Extent>,
    /// How many pieces are sent raw before compression is tried again.
    skip: u32,
    /// How many it will be the next time that it does not pay.
    backoff: u32,
}

/// The longest time without a try at compression, in pieces.
const MAX_BACKOFF: u32 = 64;

impl Encoder {
    pub(super) fn new(compression: Compression) -> Encoder {
        Encoder { compression, zeros: None, skip: 0, backoff: 1 }
    }

    /// The pieces of a part of a chunk that begins at `offset`.
    pub(super) fn chunk(
        &mut self,
        offset: u64,
        buffer: &Arc<Buffer>,
        part: Range<usize>,
        out: &mut Vec<Piece>,
    ) {
        let cell = |at: usize| &buffer[at..part.end.min(at + CELL)];
        let mut at = part.start;
        while at < part.end {
            let zero = is_zero(cell(at));
            let mut end = at;
            while end < part.end && is_zero(cell(end)) == zero {
                end += cell(end).len();
            }
            // Not empty, and inside a disk: an extent it is.
            let Some(extent) = Extent::new(offset + at as u64, (end - at) as u64) else { return };
            if zero {
                self.zero(extent, out);
            } else {
                out.extend(self.flush());
                out.push(self.data(extent, buffer, at..end));
            }
            at = end;
        }
    }

    /// The pieces of a range that is known to be zeros, without its bytes.
    pub(super) fn hole(&mut self, extent: Extent, out: &mut Vec<Piece>) {
        let mut at = extent.offset();
        while let Some(part) = Extent::new(at, (extent.end() - at).min(LONGEST_ZERO)) {
            self.zero(part, out);
            at = part.end();
        }
    }

    /// The zeros that were held back.
    pub(super) fn flush(&mut self) -> Option<Piece> {
        let zeros = self.zeros.take()?;
        Some(Piece { header: Header::zero(0, zeros.offset(), zeros.len()), payload: Payload::None })
    }

    fn zero(&mut self, extent: Extent, out: &mut Vec<Piece>) {
        let joined = match self.zeros {
            Some(zeros) if zeros.end() == extent.offset() && zeros.len() + extent.len() <= LONGEST_ZERO => {
                Extent::new(zeros.offset(), zeros.len() + extent.len())
            }
            _ => None,
        };
        if joined.is_none() {
            out.extend(self.flush());
        }
        self.zeros = joined.or(Some(extent));
    }

    fn data(&mut self, extent: Extent, buffer: &Arc<Buffer>, range: Range<usize>) -> Piece {
        let plain = &buffer[range.clone()];
        let (encoding, payload) = match self.compress(plain) {
            Some((encoding, packed)) => (encoding, Payload::Packed(packed)),
            None => (Encoding::Raw, Payload::Raw(buffer.clone(), range)),
        };
        let Some(header) = Header::data(encoding, 0, extent.offset(), extent.len(), payload.bytes()) else {
            unreachable!("a chunk is at most as long as a frame")
        };
        Piece { header, payload }
    }

    fn compress(&mut self, plain: &[u8]) -> Option<(Encoding, Vec<u8>)> {
        let (encoding, automatic) = match self.compression {
            Compression::Off => return None,
            Compression::Auto => (Encoding::Lz4, true),
            Compression::Lz4 => (Encoding::Lz4, false),
            Compression::Zstd => (Encoding::Zstd, false),
        };
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        let mut packed = Vec::new();
        let smaller = pack(encoding, plain, &mut packed);
        // It pays from an eighth on: less is not worth the time of either side.
        if automatic && (!smaller || packed.len() > plain.len() - plain.len() / 8) {
            self.skip = self.backoff;
            self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
            return None;
        }
        self.backoff = 1;
        smaller.then_some((encoding, packed))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::net::compress::unpack;
    use crate::sys::aligned::Arena;

    fn run(disk: &[u8], compression: Compression) -> Vec<Piece> {
        let arena = Arena::new(1 << 20).unwrap();
        let mut encoder = Encoder::new(compression);
        let mut pieces = Vec::new();
        for (index, chunk) in disk.chunks(1 << 20).enumerate() {
            let mut copied = Vec::new();
            let mut buffer = arena.alloc_blocking(chunk.len());
            buffer.copy_from_slice(chunk);
            let buffer = Arc::new(buffer);
            encoder.chunk((index << 20) as u64, &buffer, 0..chunk.len(), &mut copied);
            drop(buffer);
            // The arena holds one chunk: what refers to it is copied out.
            pieces.extend(copied.into_iter().map(|piece| match piece.payload {
                Payload::Raw(..) => {
                    Piece { payload: Payload::Packed(piece.payload.bytes().to_vec()), ..piece }
                }
                _ => piece,
            }));
        }
        pieces.extend(encoder.flush());
        pieces
    }

    #[test]
    fn zeros_are_joined_across_chunks_up_to_their_limit() {
        let mut disk = vec![0; 200 << 20];
        disk[(100 << 20) + 5] = 1;
        let pieces = run(&disk, Compression::Off);
        let extents: Vec<_> =
            pieces.iter().map(|p| (p.header.offset, p.header.length, p.payload.bytes().len())).collect();
        let (mib, kib) = (1 << 20, 1 << 10);
        assert_eq!(
            extents,
            [
                (0, 64 * mib, 0),
                (64 * mib, 36 * mib, 0),
                (100 * mib, 64 * kib, 65536),
                (100 * mib + 64 * kib, 64 * mib - 64 * kib, 0),
                (164 * mib, 36 * mib, 0),
            ]
        );
    }

    #[test]
    fn auto_gives_up_on_noise_and_comes_back_for_text() {
        let mut state = 1u64;
        let mut noise: Vec<u8> = (0..40 << 20)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        let raw = run(&noise, Compression::Auto);
        assert!(raw.iter().all(|piece| piece.header.encoding == Encoding::Raw));
        noise.resize(120 << 20, b'a');
        let both = run(&noise, Compression::Auto);
        assert!(both.iter().filter(|piece| piece.header.encoding == Encoding::Lz4).count() > 10);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn the_pieces_cover_the_disk_once_and_hold_its_bytes(
            runs in prop::collection::vec((any::<Option<u8>>(), 1..700_000usize), 1..12),
            mode in 0..4usize,
        ) {
            let mut disk = Vec::new();
            for (byte, len) in runs {
                disk.resize(disk.len() + len, byte.unwrap_or(0));
            }
            let modes = [Compression::Auto, Compression::Off, Compression::Lz4, Compression::Zstd];
            let mut at = 0;
            for Piece { header, payload } in run(&disk, modes[mode]) {
                prop_assert_eq!(header.offset, at as u64);
                prop_assert!(Header::parse(&header.encode()).is_ok());
                let end = at + header.length as usize;
                let mut plain = vec![0; header.length as usize];
                match (payload.bytes(), header.encoding) {
                    ([], _) => {}
                    (bytes, Encoding::Raw) => plain.copy_from_slice(bytes),
                    (bytes, encoding) => unpack(encoding, bytes, &mut plain).unwrap(),
                }
                prop_assert!(payload.bytes().is_empty() || header.fits(payload.bytes()));
                prop_assert!(plain == disk[at..end]);
                at = end;
            }
            prop_assert_eq!(at, disk.len());
        }
    }
}
