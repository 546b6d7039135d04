//! What is shipped beside the binary, held against the tools that read it.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

/// systemd finds nothing wrong with the units, and the program knows every option in them.
#[test]
fn units_are_what_systemd_reads() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        support::skipped("units_are_what_systemd_reads", "there is no systemd-analyze");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
    for name in ["mt-agent-send@.service"] {
        let unit = fs::read_to_string(units.join(name)).unwrap();
        // The binary is not installed here.
        let here = unit.replace("/usr/bin/mt-agent", env!("CARGO_BIN_EXE_mt-agent"));
        let path = dir.path().join(name.replace('@', "@web01"));
        fs::write(&path, here).unwrap();
        let checked =
            Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        let ours: Vec<&str> = said.lines().filter(|line| line.contains("mt-agent")).collect();
        assert!(checked.status.success() && ours.is_empty(), "{name}: {said}");

        let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/mt-agent ")).unwrap();
        let help = Command::new(env!("CARGO_BIN_EXE_mt-agent")).args(["send", "--help"]).output().unwrap();
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        for option in start.split_whitespace().filter(|word| word.starts_with("--")) {
            assert!(help.contains(option), "{option}");
        }
    }
}
