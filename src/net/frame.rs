//! The frame header: 48 bytes before every payload, and the only thing that says how long the payload is.
//!
//! A pure codec: [`Header::parse`] checks every limit, so that its caller may allocate what a header asks for.
//! Layout and rules are in the protocol's specification, [`crate::net`].
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

use serde::{Deserialize, Serialize};

use crate::checksum::crc32c;
use crate::digest;

/// How many bytes a header has on the wire.
pub const HEADER_LEN: usize = 48;
/// How many of them its checksum covers: all before the checksum itself.
const CHECKED_LEN: usize = 44;
/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"MTAG";
/// The version of the header's layout.
pub const VERSION: u8 = 1;
/// The most bytes of a volume that one data frame covers: 1 MiB.
pub const MAX_DATA: u64 = 1 << 20;
/// The most bytes of a volume that one zero frame covers: 1 GiB.
pub const MAX_ZERO: u64 = 1 << 30;
/// The longest control payload, in bytes: 64 KiB.
pub const MAX_CONTROL: u32 = 1 << 16;
/// The length of a digest, in bytes.
const DIGEST_LEN: u32 = 32;
const _: () = assert!(digest::LEN == 32);
/// How many bytes of a volume each digest of a [`Kind::Digests`] frame may be of: a power of two in this range.
pub const DIGEST_UNITS: std::ops::RangeInclusive<u64> = 4096..=MAX_DATA;
/// The most bytes of a volume that one frame of digests is about: as many digests as a control payload has room for.
pub const MAX_DIGESTED: u64 = 2048 * MAX_DATA;
/// The unit of the window's accounting, in bytes: a data frame costs its length rounded up to it, a zero frame
/// costs one.
pub const COST_UNIT: u64 = 4096;

/// What a frame is. The comment after each says who sends it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Kind {
    /// Versions and features offered. Client.
    Hello,
    /// Version and features chosen. Server.
    HelloReply,
    /// A one-time secret and a certificate request. Client.
    Enroll,
    /// The certificate. Server.
    EnrollReply,
    /// The disk that this connection is for. Client.
    Open,
    /// Window and limits of the open volume. Server.
    OpenReply,
    /// The start of a pass. Client.
    Begin,
    /// The pass may start. Server.
    BeginReply,
    /// Bytes for the volume. Client.
    Data,
    /// A run of zeros for the volume. Client.
    Zero,
    /// Window given back. Server.
    Progress,
    /// The end of a pass: make it durable. Client.
    Commit,
    /// The pass is durable. Server.
    Committed,
    /// The other side's last word. Either.
    Error,
    /// A data frame's payload was damaged and thrown away: its range is to be sent again. Server.
    Refused,
    /// Something that the client's user should know. Server.
    Notice,
    /// Digests of what the volume holds. Server.
    Digests,
    /// Everything up to here is dealt with: what of it was not sent is the same on both sides. Client.
    Covered,
    /// A range that differs: its digests are wanted in small units. Client.
    Refine,
    /// One more connection for a session that is open. Client.
    Join,
    /// It carries frames of the pass. Server.
    JoinReply,
}

/// The kinds by number: the place in this list is the byte on the wire, counted from 1.
const KINDS: [Kind; 21] = [
    Kind::Hello,
    Kind::HelloReply,
    Kind::Enroll,
    Kind::EnrollReply,
    Kind::Open,
    Kind::OpenReply,
    Kind::Begin,
    Kind::BeginReply,
    Kind::Data,
    Kind::Zero,
    Kind::Progress,
    Kind::Commit,
    Kind::Committed,
    Kind::Error,
    Kind::Refused,
    Kind::Notice,
    Kind::Digests,
    Kind::Covered,
    Kind::Refine,
    Kind::Join,
    Kind::JoinReply,
];

impl Kind {
    /// The byte on the wire.
    pub const fn number(self) -> u8 {
        match self {
            Kind::Hello => 1,
            Kind::HelloReply => 2,
            Kind::Enroll => 3,
            Kind::EnrollReply => 4,
            Kind::Open => 5,
            Kind::OpenReply => 6,
            Kind::Begin => 7,
            Kind::BeginReply => 8,
            Kind::Data => 9,
            Kind::Zero => 10,
            Kind::Progress => 11,
            Kind::Commit => 12,
            Kind::Committed => 13,
            Kind::Error => 14,
            Kind::Refused => 15,
            Kind::Notice => 16,
            Kind::Digests => 17,
            Kind::Covered => 18,
            Kind::Refine => 19,
            Kind::Join => 20,
            Kind::JoinReply => 21,
        }
    }

    /// The kind of a byte on the wire.
    pub fn from_number(number: u8) -> Option<Kind> {
        KINDS.get(usize::from(number.checked_sub(1)?)).copied()
    }

    /// Whether the payload is a JSON message.
    pub const fn is_control(self) -> bool {
        !matches!(
            self,
            Kind::Data
                | Kind::Zero
                | Kind::Progress
                | Kind::Refused
                | Kind::Digests
                | Kind::Covered
                | Kind::Refine
        )
    }
}

/// How the payload of a data frame holds its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// As they are.
    #[default]
    Raw,
    /// One LZ4 block (the block format, without a length before it).
    Lz4,
    /// One Zstandard frame (RFC 8878).
    Zstd,
}

impl Encoding {
    /// The name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Encoding::Raw => "raw",
            Encoding::Lz4 => "lz4",
            Encoding::Zstd => "zstd",
        }
    }

    const fn bits(self) -> u16 {
        match self {
            Encoding::Raw => 0,
            Encoding::Lz4 => 1,
            Encoding::Zstd => 2,
        }
    }
}

/// A frame's header. One that came out of [`Header::parse`] keeps every rule of its kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// How the payload is encoded; [`Encoding::Raw`] for all but data.
    pub encoding: Encoding,
    /// Data, zero and commit: the frame's number in its pass, from 0. Progress: how many of them were carried
    /// out. Refused: the number of the data frame.
    /// Error: the number of the frame that it is about, where there is one. Digests: how many bytes of the volume each
    /// of them is of. Otherwise 0, and not looked at.
    pub sequence: u64,
    /// Data, zero, refused, digests and refine: the first byte on the volume. Otherwise 0.
    pub offset: u64,
    /// Data, zero, refused, digests and refine: how many bytes of the volume the frame is about. Progress: the window cost
    /// given back since the pass began. Covered: how many bytes from the start of the volume. Otherwise 0.
    pub length: u64,
    /// How many payload bytes follow the header.
    pub payload_len: u32,
    /// CRC-32C of the payload as sent (after compression); 0 where there is none.
    pub payload_crc: u32,
}

impl Header {
    /// The header of a data frame whose `payload` (as it will be sent) covers `length` bytes at `offset`.
    ///
    /// Returns `None` where the payload's length does not fit a header; no other rule is looked at here.
    pub fn data(
        encoding: Encoding,
        sequence: u64,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> Option<Header> {
        let payload_len = u32::try_from(payload.len()).ok()?;
        let payload_crc = crc32c(payload);
        Some(Header { kind: Kind::Data, encoding, sequence, offset, length, payload_len, payload_crc })
    }

    /// The header (and all) of a zero frame for `length` bytes at `offset`.
    pub fn zero(sequence: u64, offset: u64, length: u64) -> Header {
        Header { offset, length, ..Header::bare(Kind::Zero, sequence) }
    }

    /// The header (and all) of a progress frame: `written` frames are written, `returned` bytes of window cost
    /// given back, both counted since the pass began.
    pub fn progress(written: u64, returned: u64) -> Header {
        Header { length: returned, ..Header::bare(Kind::Progress, written) }
    }

    /// The header (and all) that refuses a data frame, whose payload did not have the checksum it states.
    pub fn refused(data: &Header) -> Header {
        Header { offset: data.offset, length: data.length, ..Header::bare(Kind::Refused, data.sequence) }
    }

    /// The header of a frame of digests of `unit` bytes each, for the `length` bytes at `offset`; `payload` holds them
    /// one after another. `None` where its length does not fit.
    pub fn digests(unit: u32, offset: u64, length: u64, payload: &[u8]) -> Option<Header> {
        let payload_len = u32::try_from(payload.len()).ok()?;
        let payload_crc = crc32c(payload);
        Some(Header { offset, length, payload_len, payload_crc, ..Header::bare(Kind::Digests, unit.into()) })
    }

    /// The header (and all) that says that the first `bytes` of the volume are dealt with, once the first `frames` frames
    /// of the pass have come.
    pub fn covered(frames: u64, bytes: u64) -> Header {
        Header { length: bytes, ..Header::bare(Kind::Covered, frames) }
    }

    /// The header (and all) that asks for the digests of a range in units of [`digest::FINE`].
    pub fn refine(offset: u64, length: u64) -> Header {
        Header { offset, length, ..Header::bare(Kind::Refine, 0) }
    }

    /// The header of a control frame whose payload is `payload`, or `None` where its length does not fit.
    pub fn control(kind: Kind, sequence: u64, payload: &[u8]) -> Option<Header> {
        let payload_len = u32::try_from(payload.len()).ok()?;
        Some(Header { payload_len, payload_crc: crc32c(payload), ..Header::bare(kind, sequence) })
    }

    fn bare(kind: Kind, sequence: u64) -> Header {
        Header {
            kind,
            encoding: Encoding::Raw,
            sequence,
            offset: 0,
            length: 0,
            payload_len: 0,
            payload_crc: 0,
        }
    }

    /// What the frame costs of the window, in bytes: see [`COST_UNIT`]. 0 for all but data and zero.
    pub fn window_cost(&self) -> u64 {
        match self.kind {
            // The length of a parsed header is at most 1 MiB; one that was not parsed saturates.
            Kind::Data => self.length.checked_next_multiple_of(COST_UNIT).unwrap_or(u64::MAX),
            Kind::Zero => COST_UNIT,
            _ => 0,
        }
    }

    /// Whether `payload` is the one that this header was sent with.
    pub fn fits(&self, payload: &[u8]) -> bool {
        u32::try_from(payload.len()) == Ok(self.payload_len) && crc32c(payload) == self.payload_crc
    }

    /// The header's bytes. Checks nothing: what breaks a rule is refused by the other side's [`Header::parse`].
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut slots = bytes.iter_mut();
        let mut put = |field: &[u8]| field.iter().zip(slots.by_ref()).for_each(|(byte, slot)| *slot = *byte);
        put(&MAGIC);
        put(&[VERSION, self.kind.number()]);
        put(&self.encoding.bits().to_le_bytes());
        put(&self.sequence.to_le_bytes());
        put(&self.offset.to_le_bytes());
        put(&self.length.to_le_bytes());
        put(&self.payload_len.to_le_bytes());
        put(&self.payload_crc.to_le_bytes());
        put(&[0; 4]);
        let (checked, crc) = bytes.split_at_mut(CHECKED_LEN);
        crc.copy_from_slice(&crc32c(checked).to_le_bytes());
        bytes
    }

    /// Reads a header and checks every rule that can be checked without its payload and its connection.
    ///
    /// # Errors
    /// The first broken rule, in the order of the fields; but the checksum comes right after the magic, since
    /// no other field means anything before it holds.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Header, Error> {
        let (checked, stated_crc) = bytes.split_at(CHECKED_LEN);
        let mut rest = checked.iter().copied();
        let magic: [u8; 4] = take(&mut rest);
        let [version, kind] = take(&mut rest);
        let flags = u16::from_le_bytes(take(&mut rest));
        let sequence = u64::from_le_bytes(take(&mut rest));
        let offset = u64::from_le_bytes(take(&mut rest));
        let length = u64::from_le_bytes(take(&mut rest));
        let payload_len = u32::from_le_bytes(take(&mut rest));
        let payload_crc = u32::from_le_bytes(take(&mut rest));
        let reserved = u32::from_le_bytes(take(&mut rest));

        if magic != MAGIC {
            return Err(Error::NotThisProtocol { found: magic });
        }
        let stated = u32::from_le_bytes(take(&mut stated_crc.iter().copied()));
        let computed = crc32c(checked);
        if stated != computed {
            return Err(Error::HeaderChecksum { stated, computed });
        }
        if version != VERSION {
            return Err(Error::UnsupportedVersion { theirs: version });
        }
        let kind = Kind::from_number(kind).ok_or(Error::UnknownKind { number: kind })?;
        let encoding = match (kind, flags) {
            (_, 0) => Encoding::Raw,
            (Kind::Data, 1) => Encoding::Lz4,
            (Kind::Data, 2) => Encoding::Zstd,
            _ => return Err(Error::UnknownFlags { kind, flags }),
        };
        if reserved != 0 {
            return Err(Error::ReservedNotZero { found: reserved });
        }
        let header = Header { kind, encoding, sequence, offset, length, payload_len, payload_crc };
        header.check_extent()?;
        header.check_payload()?;
        Ok(header)
    }

    fn check_extent(&self) -> Result<(), Error> {
        let Header { kind, offset, length, .. } = *self;
        let limit = match kind {
            Kind::Data | Kind::Refused | Kind::Refine => MAX_DATA,
            Kind::Zero => MAX_ZERO,
            Kind::Digests => MAX_DIGESTED,
            Kind::Progress | Kind::Covered if offset == 0 => return Ok(()),
            _ if offset == 0 && length == 0 => return Ok(()),
            _ => return Err(Error::UnexpectedExtent { kind, offset, length }),
        };
        if length == 0 {
            return Err(Error::EmptyLength { kind });
        }
        if length > limit {
            return Err(Error::LengthTooLarge { kind, length, limit });
        }
        offset.checked_add(length).map(|_| ()).ok_or(Error::ExtentOverflows { offset, length })
    }

    fn check_payload(&self) -> Result<(), Error> {
        let Header { kind, encoding, length, payload_len, payload_crc, .. } = *self;
        match kind {
            Kind::Zero | Kind::Progress | Kind::Refused | Kind::Covered | Kind::Refine => {
                if payload_len != 0 || payload_crc != 0 {
                    return Err(Error::UnexpectedPayload { kind, payload_len, payload_crc });
                }
            }
            Kind::Data => {
                let wrong = match encoding {
                    Encoding::Raw => u64::from(payload_len) != length,
                    // What compression makes no smaller is sent raw.
                    Encoding::Lz4 | Encoding::Zstd => payload_len == 0 || u64::from(payload_len) > length,
                };
                if wrong {
                    return Err(Error::PayloadLength { encoding, payload_len, length });
                }
            }
            Kind::Digests => {
                let unit = self.sequence;
                if !unit.is_power_of_two() || !DIGEST_UNITS.contains(&unit) {
                    return Err(Error::DigestUnit { unit });
                }
                let digests = u64::from(payload_len).checked_div(DIGEST_LEN.into());
                let whole = payload_len.is_multiple_of(DIGEST_LEN);
                if payload_len > MAX_CONTROL || !whole || digests != Some(length.div_ceil(unit)) {
                    return Err(Error::DigestsLength { payload_len, length, unit });
                }
            }
            _ => {
                if payload_len == 0 || payload_len > MAX_CONTROL {
                    return Err(Error::ControlLength { kind, payload_len });
                }
            }
        }
        Ok(())
    }
}

/// The next `N` bytes. The callers' iterators hold as many as the fields take together, by construction.
fn take<const N: usize>(bytes: &mut impl Iterator<Item = u8>) -> [u8; N] {
    std::array::from_fn(|_| bytes.next().unwrap_or_default())
}

/// Which rule a header breaks. Every one ends the connection: after it, nothing tells where the next frame begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// The first four bytes are not the magic.
    #[error("the peer does not speak this protocol: it sent {found:02x?} where a frame begins")]
    NotThisProtocol {
        /// What was there.
        found: [u8; 4],
    },
    /// The header's checksum does not hold.
    #[error("a frame header arrived damaged: its checksum is {computed:08x} and it states {stated:08x}")]
    HeaderChecksum {
        /// The checksum in the header.
        stated: u32,
        /// The checksum of what arrived.
        computed: u32,
    },
    /// The header has another layout version.
    #[error("frame version {theirs} is not supported: this agent speaks version {VERSION}")]
    UnsupportedVersion {
        /// The version in the header.
        theirs: u8,
    },
    /// No such kind of frame.
    #[error("unknown frame type {number}")]
    UnknownKind {
        /// The type byte.
        number: u8,
    },
    /// A flag that this version does not have, or one on a kind that has none.
    #[error("unknown flags {flags:#06x} on a {kind:?} frame")]
    UnknownFlags {
        /// The frame's kind.
        kind: Kind,
        /// All its flags.
        flags: u16,
    },
    /// The reserved field is used.
    #[error("the reserved field of a frame header is {found:#010x}, not 0")]
    ReservedNotZero {
        /// What is there.
        found: u32,
    },
    /// Offset or length on a kind that has none.
    #[error("a {kind:?} frame with offset {offset} and length {length}, where they must be 0")]
    UnexpectedExtent {
        /// The frame's kind.
        kind: Kind,
        /// Its offset, in bytes.
        offset: u64,
        /// Its length, in bytes.
        length: u64,
    },
    /// A data or zero frame that covers nothing.
    #[error("a {kind:?} frame of length 0")]
    EmptyLength {
        /// The frame's kind.
        kind: Kind,
    },
    /// A data or zero frame that covers more than one may.
    #[error("a {kind:?} frame of {length} bytes, more than {limit}")]
    LengthTooLarge {
        /// The frame's kind.
        kind: Kind,
        /// Its length, in bytes.
        length: u64,
        /// The most that it may be.
        limit: u64,
    },
    /// The end of the extent passes 2^64.
    #[error("{length} bytes at offset {offset} pass the end of any volume")]
    ExtentOverflows {
        /// The frame's offset, in bytes.
        offset: u64,
        /// Its length, in bytes.
        length: u64,
    },
    /// A payload, or the checksum of one, on a kind that has none.
    #[error("a {kind:?} frame with a payload of {payload_len} bytes (checksum {payload_crc:08x}) has none")]
    UnexpectedPayload {
        /// The frame's kind.
        kind: Kind,
        /// The payload length that it states.
        payload_len: u32,
        /// The payload checksum that it states.
        payload_crc: u32,
    },
    /// A data payload that cannot hold what the frame covers.
    #[error("a payload of {payload_len} bytes ({encoding:?}) for {length} bytes of the volume")]
    PayloadLength {
        /// How the payload is encoded.
        encoding: Encoding,
        /// Its length, in bytes.
        payload_len: u32,
        /// How many bytes of the volume it stands for.
        length: u64,
    },
    /// Digests of a unit that is no power of two, too small or too large.
    #[error("digests of {unit} bytes each: a power of two from 4 KiB to 1 MiB is allowed")]
    DigestUnit {
        /// The unit, in bytes.
        unit: u64,
    },
    /// Another number of digests than the range has units.
    #[error("{payload_len} bytes of digests for {length} bytes of the volume, of {unit} bytes each")]
    DigestsLength {
        /// The payload's length, in bytes.
        payload_len: u32,
        /// How many bytes of the volume they are for, in bytes.
        length: u64,
        /// How many bytes each is of.
        unit: u64,
    },
    /// A control payload that is empty or too long.
    #[error("a {kind:?} message of {payload_len} bytes: 1 to {MAX_CONTROL} are allowed")]
    ControlLength {
        /// The frame's kind.
        kind: Kind,
        /// Its payload's length, in bytes.
        payload_len: u32,
    },
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seal(mut bytes: [u8; HEADER_LEN]) -> [u8; HEADER_LEN] {
        let crc = crc32c(&bytes[..CHECKED_LEN]);
        bytes[CHECKED_LEN..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `header` with `field` written at `at`, and a checksum that holds.
    fn patched(header: Header, at: usize, field: &[u8]) -> Result<Header, Error> {
        let mut bytes = header.encode();
        bytes[at..at + field.len()].copy_from_slice(field);
        Header::parse(&seal(bytes))
    }

    fn data() -> Header {
        Header::data(Encoding::Raw, 7, 4096, 8192, &[0xa5; 8192]).unwrap()
    }

    fn lz4() -> Header {
        Header::data(Encoding::Lz4, 7, 4096, 8192, &[0xa5; 100]).unwrap()
    }

    fn hello() -> Header {
        Header::control(Kind::Hello, 0, b"{}").unwrap()
    }

    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let payload = b"123456789";
        let header = Header::data(Encoding::Zstd, 0x0102, 0x1000, 0x2000, payload).unwrap();
        let mut expected = Vec::new();
        expected.extend(b"MTAG\x01\x09\x02\x00");
        expected.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        expected.extend([0, 0x10, 0, 0, 0, 0, 0, 0]);
        expected.extend([0, 0x20, 0, 0, 0, 0, 0, 0]);
        expected.extend([9, 0, 0, 0]);
        // The check value of CRC-32C over "123456789".
        expected.extend(0xe306_9283u32.to_le_bytes());
        expected.extend([0; 4]);
        let crc = crc32c(&expected);
        expected.extend(crc.to_le_bytes());
        assert_eq!(header.encode().as_slice(), expected);
        assert!(header.fits(payload));
        assert!(!header.fits(b"123456780") && !header.fits(b"12345678"));
    }

    #[test]
    fn kinds_and_their_numbers_agree() {
        for (place, kind) in KINDS.iter().enumerate() {
            assert_eq!(usize::from(kind.number()), place + 1);
            assert_eq!(Kind::from_number(kind.number()), Some(*kind));
        }
        assert_eq!(Kind::from_number(0), None);
        assert_eq!(Kind::from_number(22), None);
    }

    #[test]
    fn magic_and_checksum_and_version() {
        assert_eq!(patched(data(), 0, b"GET "), Err(Error::NotThisProtocol { found: *b"GET " }));
        let mut bytes = data().encode();
        let stated = u32::from_le_bytes(bytes[44..].try_into().unwrap());
        bytes[8] ^= 1;
        let computed = crc32c(&bytes[..CHECKED_LEN]);
        assert_eq!(Header::parse(&bytes), Err(Error::HeaderChecksum { stated, computed }));
        for theirs in [0, 2, 255] {
            assert_eq!(patched(data(), 4, &[theirs]), Err(Error::UnsupportedVersion { theirs }));
        }
    }

    #[test]
    fn kind_flags_and_reserved() {
        for number in [0, 22, 255] {
            assert_eq!(patched(data(), 5, &[number]), Err(Error::UnknownKind { number }));
        }
        for flags in [3u16, 4, 0x8000, 0xffff] {
            let error = Err(Error::UnknownFlags { kind: Kind::Data, flags });
            assert_eq!(patched(data(), 6, &flags.to_le_bytes()), error);
        }
        assert_eq!(patched(hello(), 6, &[1]), Err(Error::UnknownFlags { kind: Kind::Hello, flags: 1 }));
        let zero = Header::zero(0, 0, 1);
        assert_eq!(patched(zero, 6, &[2]), Err(Error::UnknownFlags { kind: Kind::Zero, flags: 2 }));
        assert_eq!(patched(data(), 43, &[1]), Err(Error::ReservedNotZero { found: 0x0100_0000 }));
    }

    #[test]
    fn lengths_of_data_and_zero() {
        for (header, limit) in [(lz4(), MAX_DATA), (Header::zero(0, 0, 1), MAX_ZERO)] {
            let kind = header.kind;
            assert_eq!(patched(header, 24, &[0; 8]), Err(Error::EmptyLength { kind }));
            assert!(patched(header, 24, &limit.to_le_bytes()).is_ok());
            for length in [limit + 1, u64::from(u32::MAX), u64::MAX] {
                let error = Err(Error::LengthTooLarge { kind, length, limit });
                assert_eq!(patched(header, 24, &length.to_le_bytes()), error);
            }
        }
        let offset = u64::MAX - 8191;
        let error = Err(Error::ExtentOverflows { offset, length: 8192 });
        assert_eq!(patched(data(), 16, &offset.to_le_bytes()), error);
        assert!(patched(data(), 16, &(offset - 1).to_le_bytes()).is_ok());
    }

    #[test]
    fn control_and_progress_cover_nothing() {
        let kind = Kind::Hello;
        assert_eq!(patched(hello(), 16, &[1]), Err(Error::UnexpectedExtent { kind, offset: 1, length: 0 }));
        assert_eq!(patched(hello(), 24, &[1]), Err(Error::UnexpectedExtent { kind, offset: 0, length: 1 }));
        let progress = Header::progress(3, u64::MAX);
        assert_eq!(Header::parse(&progress.encode()), Ok(progress));
        let error = Error::UnexpectedExtent { kind: Kind::Progress, offset: 1, length: u64::MAX };
        assert_eq!(patched(progress, 16, &[1]), Err(error));
    }

    #[test]
    fn payload_lengths() {
        for payload_len in [0, 8191, 8193, u32::MAX] {
            let error = Error::PayloadLength { encoding: Encoding::Raw, payload_len, length: 8192 };
            assert_eq!(patched(data(), 32, &payload_len.to_le_bytes()), Err(error));
        }
        assert!(patched(lz4(), 32, &8192u32.to_le_bytes()).is_ok());
        for payload_len in [0, 8193, u32::MAX] {
            let error = Error::PayloadLength { encoding: Encoding::Lz4, payload_len, length: 8192 };
            assert_eq!(patched(lz4(), 32, &payload_len.to_le_bytes()), Err(error));
        }
        assert!(patched(hello(), 32, &MAX_CONTROL.to_le_bytes()).is_ok());
        for payload_len in [0, MAX_CONTROL + 1, u32::MAX] {
            let error = Error::ControlLength { kind: Kind::Hello, payload_len };
            assert_eq!(patched(hello(), 32, &payload_len.to_le_bytes()), Err(error));
        }
        for header in [Header::zero(1, 4096, 4096), Header::progress(1, 4096), Header::refused(&data())] {
            let kind = header.kind;
            let length = Error::UnexpectedPayload { kind, payload_len: 1, payload_crc: 0 };
            assert_eq!(patched(header, 32, &[1]), Err(length));
            let crc = Error::UnexpectedPayload { kind, payload_len: 0, payload_crc: 1 };
            assert_eq!(patched(header, 36, &[1]), Err(crc));
        }
    }

    #[test]
    fn digests_are_as_many_as_the_range_has_units() {
        let header = Header::digests(65536, 4096, 65537, &[7; 64]).unwrap();
        assert_eq!(Header::parse(&header.encode()), Ok(header));
        for unit in [0u64, 2048, 65535, 2 << 20, u64::MAX] {
            assert_eq!(patched(header, 8, &unit.to_le_bytes()), Err(Error::DigestUnit { unit }));
        }
        for payload_len in [0, 32, 63, 65, 96, u32::MAX] {
            let error = Error::DigestsLength { payload_len, length: 65537, unit: 65536 };
            assert_eq!(patched(header, 32, &payload_len.to_le_bytes()), Err(error));
        }
        assert_eq!(patched(header, 24, &[0; 8]), Err(Error::EmptyLength { kind: Kind::Digests }));
        let most = Header::digests(1 << 20, 0, MAX_DIGESTED, &vec![0; MAX_CONTROL as usize]).unwrap();
        assert_eq!(Header::parse(&most.encode()), Ok(most));
        let error =
            Error::LengthTooLarge { kind: Kind::Digests, length: MAX_DIGESTED + 1, limit: MAX_DIGESTED };
        assert_eq!(patched(most, 24, &(MAX_DIGESTED + 1).to_le_bytes()), Err(error));
    }

    #[test]
    fn what_is_covered_has_no_offset_and_what_is_refined_is_no_more_than_a_data_frame() {
        let covered = Header::covered(7, u64::MAX);
        assert_eq!(Header::parse(&covered.encode()), Ok(covered));
        let error = Error::UnexpectedExtent { kind: Kind::Covered, offset: 1, length: u64::MAX };
        assert_eq!(patched(covered, 16, &[1]), Err(error));
        let refine = Header::refine(4096, MAX_DATA);
        assert_eq!(Header::parse(&refine.encode()), Ok(refine));
        let error = Error::LengthTooLarge { kind: Kind::Refine, length: MAX_DATA + 1, limit: MAX_DATA };
        assert_eq!(patched(refine, 24, &(MAX_DATA + 1).to_le_bytes()), Err(error));
        assert_eq!(patched(refine, 24, &[0; 8]), Err(Error::EmptyLength { kind: Kind::Refine }));
    }

    #[test]
    fn the_window_cost_is_rounded_up() {
        let cost = |length| Header { length, ..data() }.window_cost();
        assert_eq!([cost(1), cost(4096), cost(4097), cost(MAX_DATA)], [4096, 4096, 8192, MAX_DATA]);
        assert_eq!(Header::zero(0, 0, MAX_ZERO).window_cost(), 4096);
        assert_eq!(hello().window_cost() + Header::progress(1, 4096).window_cost(), 0);
    }

    fn any_header() -> impl Strategy<Value = Header> {
        let encoding = prop_oneof![Just(Encoding::Raw), Just(Encoding::Lz4), Just(Encoding::Zstd)];
        let offset = prop_oneof![0..=1u64 << 50, (u64::MAX - MAX_ZERO - 10)..=u64::MAX - MAX_ZERO];
        let payload = (any::<u64>(), any::<u32>());
        prop_oneof![
            (encoding, offset.clone(), 1..=MAX_DATA, payload, any::<prop::sample::Index>()).prop_map(
                |(encoding, offset, length, (sequence, payload_crc), index)| {
                    let payload_len = match encoding {
                        Encoding::Raw => length as u32,
                        _ => 1 + index.index(length as usize) as u32,
                    };
                    Header { kind: Kind::Data, encoding, sequence, offset, length, payload_len, payload_crc }
                }
            ),
            (any::<u64>(), offset, 1..=MAX_ZERO).prop_map(|(s, o, l)| Header::zero(s, o, l)),
            (any::<u64>(), any::<u64>()).prop_map(|(w, r)| Header::progress(w, r)),
            (any::<u64>(), 0..=1u64 << 50, 1..=MAX_DATA)
                .prop_map(|(s, o, l)| Header { kind: Kind::Refused, ..Header::zero(s, o, l) }),
            (12u32..=20, 0..=1u64 << 50, 1..=1u64 << 20).prop_map(|(shift, offset, length)| {
                let payload = vec![1; length.div_ceil(1 << shift) as usize * digest::LEN];
                Header::digests(1 << shift, offset, length, &payload).unwrap()
            }),
            (any::<u64>(), any::<u64>()).prop_map(|(frames, bytes)| Header::covered(frames, bytes)),
            (0..=1u64 << 50, 1..=MAX_DATA).prop_map(|(o, l)| Header::refine(o, l)),
            (prop::sample::select(KINDS.to_vec()), 1..=MAX_CONTROL, payload)
                .prop_filter("control only", |(kind, ..)| kind.is_control())
                .prop_map(|(kind, payload_len, (sequence, payload_crc))| {
                    Header { payload_len, payload_crc, ..Header::bare(kind, sequence) }
                }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_parsed_back(header in any_header()) {
            prop_assert_eq!(Header::parse(&header.encode()), Ok(header));
        }

        #[test]
        fn any_flipped_bit_is_found(header in any_header(), bit in 0..HEADER_LEN * 8) {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::parse(&bytes).is_err());
        }

        /// What parses is what would be encoded: no two spellings of one header.
        #[test]
        fn what_parses_is_canonical(bytes in prop::array::uniform32(any::<u8>()), kind in 0u8..22) {
            let mut header = [0; HEADER_LEN];
            header[8..40].copy_from_slice(&bytes);
            header[..6].copy_from_slice(&[b'M', b'T', b'A', b'G', VERSION, kind]);
            let header = seal(header);
            if let Ok(parsed) = Header::parse(&header) {
                prop_assert_eq!(parsed.encode(), header);
            }
        }
    }
}
