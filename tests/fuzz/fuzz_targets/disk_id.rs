//! Text that somebody may give for a disk: `cargo fuzz run --fuzz-dir tests/fuzz disk_id`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::disk::id::DiskId;

fuzz_target!(|text: &str| {
    if let Ok(id) = text.parse::<DiskId>() {
        assert_eq!(id.to_string().parse::<DiskId>().as_ref(), Ok(&id));
    }
});
