//! Any 48 bytes: parsing never panics, what it takes is within the limits, and is what would be encoded again.
//!
//! The checksum would stop nearly every input, so that each is tried with a good one as well.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::checksum::crc32c;
use mt_agent::net::frame::{HEADER_LEN, Header, Kind, MAGIC, MAX_CONTROL, MAX_DATA, MAX_DIGESTED, MAX_ZERO};

fn check(bytes: &[u8; HEADER_LEN]) {
    let Ok(header) = Header::parse(bytes) else { return };
    assert_eq!(&header.encode(), bytes);
    let counts = matches!(header.kind, Kind::Progress | Kind::Covered);
    assert!(counts || header.offset.checked_add(header.length).is_some());
    let (length, payload) = match header.kind {
        Kind::Data => (MAX_DATA, header.length),
        Kind::Zero => (MAX_ZERO, 0),
        Kind::Refused | Kind::Refine => (MAX_DATA, 0),
        Kind::Progress | Kind::Covered => (u64::MAX, 0),
        Kind::Digests => (MAX_DIGESTED, u64::from(MAX_CONTROL)),
        _ => (0, u64::from(MAX_CONTROL)),
    };
    assert!(header.length <= length && u64::from(header.payload_len) <= payload);
    assert!(header.window_cost() <= MAX_DATA);
}

fuzz_target!(|bytes: [u8; HEADER_LEN]| {
    check(&bytes);
    let mut sealed = bytes;
    sealed[..4].copy_from_slice(&MAGIC);
    let crc = crc32c(&sealed[..HEADER_LEN - 4]);
    sealed[HEADER_LEN - 4..].copy_from_slice(&crc.to_le_bytes());
    check(&sealed);
});
