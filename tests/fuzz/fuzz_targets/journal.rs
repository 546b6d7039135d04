//! Any block as a header of a journal: parsing never panics, and what it takes comes back from its own encoding.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::checksum::crc32c;
use mt_agent::journal::format::{self, BLOCK_LEN};

fuzz_target!(|bytes: &[u8]| {
    let mut block = [0; BLOCK_LEN];
    let len = bytes.len().min(BLOCK_LEN - 4);
    block[..len].copy_from_slice(&bytes[..len]);
    // Sealed, or hardly anything gets past the checksum.
    let crc = crc32c(&block[..BLOCK_LEN - 4]);
    block[BLOCK_LEN - 4..].copy_from_slice(&crc.to_le_bytes());
    if let Ok(segment) = format::parse_segment(&block) {
        assert_eq!(format::parse_segment(&format::encode_segment(&segment)), Ok(segment));
    }
    if let Ok(record) = format::parse_record(&block) {
        assert!(
            record.len() >= format::BLOCK
                && record.len() <= 2 * format::BLOCK + u64::from(format::MAX_PAYLOAD)
        );
        let again = format::encode_record(&record).expect("what was parsed keeps the rules");
        assert_eq!(format::parse_record(&again), Ok(record));
    }
});
