//! Loop devices that go away with the test, also when it fails.

#![allow(dead_code)] // each user of this file takes its part

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether loop devices can be made here; says loudly where not, and fails where CI must not skip.
pub fn available() -> bool {
    if nix::unistd::geteuid().is_root() && Path::new("/dev/loop-control").exists() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "CI must run the tests that need root and loop devices");
    eprintln!("SKIPPED: this test needs root and loop devices");
    false
}

/// A directory for images whose path has no symbolic links.
pub fn directory() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    (dir, path)
}

/// A sparse image of `size` bytes.
pub fn image(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// One loop device.
pub struct LoopDev {
    pub node: PathBuf,
}

impl LoopDev {
    /// A device on `file`, with further options of `losetup`.
    pub fn attach(file: &Path, options: &[&str]) -> LoopDev {
        let output = run("losetup", &[&["-f", "--show"], options, &[file.to_str().unwrap()]].concat());
        let node = PathBuf::from(output.trim());
        // A test that was killed may have left that.
        if !options.contains(&"-r") && !options.contains(&"--read-only") {
            run("blockdev", &["--setrw", node.to_str().unwrap()]);
        }
        LoopDev { node }
    }

    /// `loop7`.
    pub fn name(&self) -> &str {
        self.node.file_name().unwrap().to_str().unwrap()
    }
}

impl Drop for LoopDev {
    fn drop(&mut self) {
        // A panic here would hide the test's own; what stays attached is shown by losetup -a.
        let status = Command::new("losetup").arg("-d").arg(&self.node).status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("{} stays attached", self.node.display());
        }
    }
}

/// A mount that goes away with the test; declared after its device, it goes before it.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts `node` on the directory `point`.
    pub fn mount(node: &Path, point: &Path) -> Mounted {
        run("mount", &[node.to_str().unwrap(), point.to_str().unwrap()]);
        Mounted(point.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(&self.0).status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.display());
        }
    }
}

/// Runs a tool that must succeed, and gives what it printed.
pub fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().unwrap_or_else(|error| panic!("{tool}: {error}"));
    assert!(output.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
