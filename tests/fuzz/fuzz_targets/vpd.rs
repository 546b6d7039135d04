//! Bytes that a disk may answer to an INQUIRY: `cargo fuzz run --fuzz-dir tests/fuzz vpd`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::disk::{id::DiskId, vpd};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(found) = vpd::parse_identification(bytes) {
        for note in &found.notes {
            assert!(note.at >= 4 && note.at <= bytes.len(), "{note} of {} bytes", bytes.len());
        }
        if let Some(id) = found.identity() {
            assert_eq!(id.to_string().parse::<DiskId>().as_ref(), Ok(&id));
        }
    }
    _ = vpd::parse_serial(bytes);
    _ = vpd::parse_inquiry(bytes);
});
