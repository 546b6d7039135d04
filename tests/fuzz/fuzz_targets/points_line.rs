//! Any bytes as a line of the points log, and any JSON with a checksum that fits: parsing never panics, and what it takes
//! comes back from its own encoding.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::checksum::crc32c;
use mt_agent::points::line;

fn check(bytes: &[u8]) {
    if line::parse_head(bytes).is_ok() {
        assert!(line::parse(bytes).is_err());
    }
    let Ok(record) = line::parse(bytes) else { return };
    // It may grow over the limit where its text needs escapes; then it is refused, which is fine.
    let Ok(encoded) = line::encode(&record) else { return };
    let (newline, again) = encoded.split_last().unwrap();
    assert_eq!(*newline, b'\n');
    assert!(!again.contains(newline));
    assert!(line::parse(again).is_ok_and(|again| again == record));
    // Whatever the newline between two lines became, they are no one line.
    let joined = [again, b" ", again].concat();
    assert!(line::parse(&joined).is_err() && line::hides_another(&joined));
}

fuzz_target!(|bytes: &[u8]| {
    line::hides_another(bytes);
    check(bytes);
    // Past the checksum, which no fuzzer finds by itself.
    let json = bytes.get(9..).unwrap_or_default();
    check(&[format!("{:08x} ", crc32c(json)).as_bytes(), json].concat());
});
