//! `serve` and `send` over SCSI disks, with both engines, and what these disks do that files do not.

use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::small;
use crate::lio::{Identity, Lun, Store, Target, discovered, settle};
use crate::mapped::Mapped;
use crate::support::{
    KIB, Loop, MACHINE, MIB, Rig, Service, assert_equal, directory, mt_agent, run, seccomp, tool, wait_for,
    write_random,
};

/// A service whose machine has SCSI disks, `d0`, `d1` and so on.
struct Array {
    rig: Rig,
    target: Target,
    luns: Vec<Lun>,
}

impl Array {
    /// With new disks on files of these sizes.
    fn new(sizes: &[u64], args: &[&str]) -> Array {
        let rig = Rig::with(&[], args);
        let stores = sizes.iter().zip(0..).map(|(size, number)| {
            Store::file(&rig.path(&format!("d{number}.img")), *size, &Identity::vmware(number))
        });
        let stores = stores.collect::<Vec<_>>();
        Array::on(rig, &stores)
    }

    /// With these, of which each has the identity of its number.
    fn on(rig: Rig, stores: &[Store]) -> Array {
        let target = Target::new();
        let luns: Vec<Lun> = stores.iter().zip(0..).map(|(store, lun)| target.attach(lun, store)).collect();
        settle();
        let array = Array { rig, target, luns };
        array.assign();
        array
    }

    fn assign(&self) {
        let all: Vec<String> =
            (0..self.luns.len()).map(|disk| format!("d{disk}={}", self.id(disk))).collect();
        let config = self.rig.service.config();
        run(&["protect", "add", MACHINE, "--config", &config, "--overwrite", "--disk", &all.join(",")]).ok();
    }

    fn id(&self, disk: usize) -> String {
        Identity::vmware(u32::try_from(disk).unwrap()).canonical()
    }

    fn backing(&self, disk: usize) -> PathBuf {
        self.rig.path(&format!("d{disk}.img"))
    }

    /// The disk is as its source, and the record says so.
    #[track_caller]
    fn arrived(&self, disk: usize, source: &Path) {
        self.rig.synchronized(&format!("d{disk}"));
        assert_equal(source, &self.backing(disk));
    }

    /// The volume is faulted with this reason, in the status and in the record, and stays so.
    #[track_caller]
    fn is_faulted(&self, disk: &str, reason: &str) {
        let volume = self.rig.wait_until_closed(disk);
        assert_eq!(volume.phase, "faulted", "{volume:?}");
        assert!(volume.error.as_deref().unwrap().contains(reason), "{volume:?}");
        let recorded = self.rig.service.recorded(MACHINE, disk);
        assert_eq!(recorded["state"], "faulted");
        assert!(recorded["fault"]["reason"].as_str().unwrap().contains(reason), "{recorded}");
    }
}

/// From a SCSI disk onto another one, and beside it an image onto a third.
fn arrives_with(engine: &str) {
    let array = Array::new(&[48 * MIB, 32 * MIB], &["--engine", engine]);
    let rig = &array.rig;
    let (first, second) = (rig.mixed("first", 48 * MIB), rig.mixed("second", 32 * MIB));
    let from = array.target.attach(9, &Store::existing(&first, &Identity::vmware(9)));
    // What was there goes, also where the source has zeros.
    write_random(&array.luns[0].node(), 0, 48 * MIB);
    // It was empty when it was assigned, and nobody said then that what came since may go.
    run(&["protect", "remove", MACHINE, "--config", &rig.service.config()]).ok();
    array.assign();
    let disks: [(&str, &Path); 2] = [("d0", &from.node()), ("d1", &second)];
    let send = rig.start_into_pass(&disks, &["--engine", engine, "--bwlimit", "20M"]);
    // However busy this machine is, the pass is not over before it was looked at.
    send.signal(Signal::SIGSTOP);
    for disk in ["d0", "d1"] {
        let volume = rig.service.volume(MACHINE, disk);
        assert_eq!(volume.engine.expect("an engine while it is received").name, engine);
    }
    // While it is received it is held.
    let disks = discovered();
    let held = disks.iter().find(|disk| disk["id"] == array.id(0).as_str()).unwrap();
    let ours = |line: &Value| line.as_str().unwrap().starts_with("mt-agent (pid");
    assert!(held["evidence"].as_array().unwrap().iter().any(ours), "{held:#}");
    send.signal(Signal::SIGCONT);
    send.finish().ok();
    array.arrived(0, &first);
    array.arrived(1, &second);
}

#[test]
fn scsi_disks_receive_with_io_uring() {
    small().run(|_| arrives_with("io-uring"));
}

#[test]
fn scsi_disks_receive_with_threads() {
    small().run(|_| arrives_with("threads"));
}

/// What `kernel.io_uring_disabled` does, on a kernel that does not have it.
#[test]
fn scsi_disks_receive_where_io_uring_is_forbidden() {
    small().run(|_| {
        let dir = directory();
        let service = Service::start_without_io_uring(dir.path(), &[]);
        let rig = Rig::assemble(dir, service, vec![]);
        let store = Store::file(&rig.path("d0.img"), 24 * MIB, &Identity::vmware(0));
        let array = Array::on(rig, &[store]);
        let engine = array.rig.service.status().service.engine;
        assert_eq!(engine.name, "threads");
        assert!(engine.why.contains("io_uring is forbidden"), "{engine}");
        let source = array.rig.mixed("source", 24 * MIB);
        // From a SCSI disk, which is read past the page cache, and so with an engine.
        let from = array.target.attach(9, &Store::existing(&source, &Identity::vmware(9)));
        settle();
        let sent = |forbidden: bool, args: &[&str]| {
            let args = [&["--log-level", "mt_agent::send=debug"], args].concat();
            let mut send = array.rig.command(&[("d0", &from.node())], &args);
            if forbidden {
                seccomp::forbid_io_uring(&mut send);
            }
            array.rig.spawn(send).finish()
        };
        // A whole pass and one that compares, on both sides and on one.
        for forbidden in [true, false, true] {
            let sent = sent(forbidden, &[]).ok();
            let engine =
                if forbidden { "engine=threads (io_uring is forbidden" } else { "engine=io-uring (works" };
            assert!(sent.stderr.contains(engine), "{sent:#?}");
            array.arrived(0, &source);
            write_random(&from.node(), 5 * MIB, MIB);
        }
        // Asked for by name, it is an error and not something else, on either side.
        sent(true, &["--engine", "io-uring"]).fails(1, &["set up io_uring", "Operation not permitted"]);
        let mut insisting = mt_agent();
        insisting.args(["serve", "--config", &array.rig.service.config(), "--engine", "io-uring"]);
        insisting.args(["--state-dir", array.rig.path("other").to_str().unwrap()]);
        seccomp::forbid_io_uring(&mut insisting);
        array.rig.spawn(insisting).finish().fails(1, &["set up io_uring", "Operation not permitted"]);
    });
}

/// Every write fails, from the middle of the pass on.
fn writes_fail_with(engine: &str) {
    let rig = Rig::with(&[], &["--engine", engine]);
    let under = Loop::create(&rig.path("d0.img"), 32 * MIB);
    let failing = Mapped::new("flakey", under.node(), 0, 32 * MIB);
    let stores = [
        Store::block(&failing.node(), &Identity::vmware(0)),
        Store::file(&rig.path("d1.img"), 24 * MIB, &Identity::vmware(1)),
    ];
    let array = Array::on(rig, &stores);
    let rig = &array.rig;
    let (source, other) = (rig.random("source", 32 * MIB), rig.random("other", 24 * MIB));
    let beside = rig.start_into_pass(&[("d1", &other)], &["--bwlimit", "3M", "--compression", "off"]);
    // However busy this machine is, it is not over before it was looked at.
    beside.signal(Signal::SIGSTOP);
    let slow = ["--bwlimit", "12M", "--compression", "off"];
    let send = rig.start_into_pass(&[("d0", &source)], &slow);
    send.standing_still(|| failing.becomes("flakey", "0 3600 1 error_writes"));
    let reason = format!("write {}", array.id(0));
    send.finish().fails(1, &["the target disk failed: ", &reason, "(io)"]);
    assert_eq!(rig.service.volume(MACHINE, "d1").phase, "receiving", "the other one goes on");
    beside.signal(Signal::SIGCONT);
    array.is_faulted("d0", &reason);
    // As long as it fails it stays so; the other one knows nothing of it.
    rig.send(&[("d0", &source)], &[]).fails(1, &["the target disk failed: "]);
    array.is_faulted("d0", &reason);
    beside.finish().ok();
    array.arrived(1, &other);
    failing.is_sound();
    rig.send(&[("d0", &source)], &[]).ok();
    array.arrived(0, &source);
}

#[test]
fn a_disk_whose_writes_fail_is_faulted_with_io_uring() {
    small().run(|_| writes_fail_with("io-uring"));
}

#[test]
fn a_disk_whose_writes_fail_is_faulted_with_threads() {
    small().run(|_| writes_fail_with("threads"));
}

/// Reads fail: of a disk that shall become a target, and of one that is a source.
#[test]
fn disks_that_cannot_be_read() {
    small().run(|_| {
        let array = Array::new(&[16 * MIB, 16 * MIB], &[]);
        let rig = &array.rig;
        let source = rig.random("source", 16 * MIB);
        let under = Loop::attach(&source, 512);
        let dust = Mapped::new("dust", under.node(), 0, 16 * MIB);
        dust.becomes("dust", "512");
        let lun = array.target.attach(9, &Store::block(&dust.node(), &Identity::vmware(9)));
        settle();
        let message = |words: &[&str]| tool("dmsetup", &[&["message", "dust", "0"], words].concat());
        // 1 MiB is where no signature is looked for, and block 8 is.
        for (block, bad) in [("8", true), ("20480", false)] {
            message(&["addbadblock", block]);
            message(&["enable"]);
            let (config, target) = (rig.service.config(), format!("d9={}", array.id(9)));
            let add = ["protect", "add", MACHINE, "--config", &config, "--disk", &target];
            if bad {
                run(&add).fails(3, &["it cannot be read", "Input/output error"]);
            }
            let at = block.parse::<u64>().unwrap() * 512;
            let sent = rig.send(&[("d0", &lun.node())], &["--compression", "off"]);
            let sent = sent.fails(1, &["read ", "Input/output error"]);
            // At the byte, or in the block that was read with it.
            let shown =
                sent.stderr.split("at byte ").nth(1).expect("where").split(|c: char| !c.is_ascii_digit());
            let shown: u64 = shown.into_iter().next().unwrap().parse().unwrap();
            assert!(shown <= at && at < shown + 4 * MIB, "{sent:#?}");
            assert_eq!(rig.wait_until_closed("d0").phase, "interrupted");
            // It is the source that failed, and no fault of the target.
            assert_eq!(rig.state("d0"), "receiving");
            message(&["disable"]);
            message(&["removebadblock", block]);
        }
        rig.send(&[("d0", &lun.node())], &[]).ok();
        array.arrived(0, &source);

        // The source is known by its identity: another disk under its name is not sent by mistake.
        assert_eq!(rig.service.recorded(MACHINE, "d0")["source"]["id"], array.id(9).as_str());
        let copy = Loop::attach(&rig.random("copy", 16 * MIB), 512);
        let other = array.target.attach(8, &Store::block(copy.node(), &Identity::vmware(8)));
        settle();
        let refused = rig.send(&[("d0", &other.node())], &[]);
        refused.fails(3, &[&array.id(9), &array.id(8), "send it once with --another-disk"]);
        array.arrived(0, &source);
        rig.send(&[("d0", &other.node())], &["--another-disk"]).ok();
        array.arrived(0, copy.backing());
        other.delete();
    });
}

/// A block of a target that cannot be read any more, and that a second pass has to keep before it overwrites it.
fn before_images_fail_with(engine: &str) {
    let rig = Rig::with(&[], &["--engine", engine]);
    let under = Loop::create(&rig.path("d0.img"), 16 * MIB);
    let dust = Mapped::new("dust", under.node(), 0, 16 * MIB);
    let stores = [
        Store::block(&dust.node(), &Identity::vmware(0)),
        Store::file(&rig.path("d1.img"), 16 * MIB, &Identity::vmware(1)),
    ];
    let array = Array::on(rig, &stores);
    let rig = &array.rig;
    let (source, other) = (rig.random("source", 16 * MIB), rig.random("other", 16 * MIB));
    rig.send(&[("d0", &source), ("d1", &other)], &[]).ok();
    for image in [&source, &other] {
        [MIB, 10 * MIB].into_iter().for_each(|at| write_random(image, at, 64 * KIB));
    }
    let before = std::fs::read(array.backing(0)).unwrap();
    let bad = 10 * MIB + 32 * KIB;
    dust.becomes("dust", "512");
    let message = |words: &[&str]| tool("dmsetup", &[&["message", "dust", "0"], words].concat());
    message(&["addbadblock", &(bad / 512).to_string()]);
    message(&["enable"]);
    // It cannot be compared: nothing was written, and the record says what it said.
    let reason = format!("read {}", array.id(0));
    rig.send(&[("d0", &source)], &[]).fails(1, &["the target disk cannot be read: ", &reason, "(io)"]);
    // Nor is it overwritten where it is not compared: it would be lost for the point before.
    rig.send(&[("d0", &source)], &["--whole"]).fails(1, &["the target disk failed: ", &reason, "(io)"]);
    array.is_faulted("d0", &reason);
    let range = bad as usize..bad as usize + 512;
    assert!(std::fs::read(array.backing(0)).unwrap()[range.clone()] == before[range]);
    rig.send(&[("d1", &other)], &[]).ok();
    array.arrived(1, &other);
    message(&["disable"]);
    rig.send(&[("d0", &source)], &[]).ok();
    array.arrived(0, &source);
}

#[test]
fn a_disk_whose_old_blocks_cannot_be_read_is_faulted_with_io_uring() {
    small().run(|_| before_images_fail_with("io-uring"));
}

#[test]
fn a_disk_whose_old_blocks_cannot_be_read_is_faulted_with_threads() {
    small().run(|_| before_images_fail_with("threads"));
}

/// A LUN that goes while it is written, and comes back.
fn vanishes_with(engine: &str) {
    let array = Array::new(&[32 * MIB, 24 * MIB], &["--engine", engine]);
    let rig = &array.rig;
    let (source, other) = (rig.random("source", 32 * MIB), rig.random("other", 24 * MIB));
    let beside = rig.start_into_pass(&[("d1", &other)], &["--bwlimit", "3M", "--compression", "off"]);
    // However busy this machine is, it is not over before it was looked at.
    beside.signal(Signal::SIGSTOP);
    let send = rig.start_into_pass(&[("d0", &source)], &["--bwlimit", "12M", "--compression", "off"]);
    send.standing_still(|| array.luns[0].delete());
    let reason = format!("write {}", array.id(0));
    send.finish().fails(1, &["the target disk failed: ", &reason, "(io)"]);
    assert_eq!(rig.service.volume(MACHINE, "d1").phase, "receiving", "the other one goes on");
    beside.signal(Signal::SIGCONT);
    array.is_faulted("d0", &reason);
    assert!(discovered().iter().all(|disk| disk["id"] != array.id(0).as_str()));
    rig.send(&[("d0", &source)], &[]).fails(3, &[&format!("no disk here is {}", array.id(0))]);
    array.is_faulted("d0", &reason);
    beside.finish().ok();
    array.arrived(1, &other);

    run(&["discover-disks", "--rescan"]).ok();
    wait_for("the disk", || discovered().iter().any(|disk| disk["id"] == array.id(0).as_str()).then_some(()));
    rig.send(&[("d0", &source)], &[]).ok();
    array.arrived(0, &source);
}

#[test]
fn a_disk_that_vanishes_is_faulted_with_io_uring() {
    small().run(|_| vanishes_with("io-uring"));
}

#[test]
fn a_disk_that_vanishes_is_faulted_with_threads() {
    small().run(|_| vanishes_with("threads"));
}

/// A disk that stands still before it is opened holds up no other.
#[test]
fn a_disk_that_stands_still_holds_up_no_other() {
    small().run(|_| {
        let rig = Rig::new(&[]);
        let under = Loop::create(&rig.path("d0.img"), 16 * MIB);
        // It holds something, which may go: else it would be looked at again when it is opened.
        write_random(under.backing(), 0, 4096);
        let still = Mapped::new("still", under.node(), 0, 16 * MIB);
        let stores = [
            Store::block(&still.node(), &Identity::vmware(0)),
            Store::file(&rig.path("d1.img"), 16 * MIB, &Identity::vmware(1)),
        ];
        let array = Array::on(rig, &stores);
        let source = array.rig.random("source", 16 * MIB);
        // Nobody gives the disk up because it stands still for a while.
        std::fs::write(array.luns[0].device().join("timeout"), "300").unwrap();
        still.stands_still();
        let send = array.rig.start(&[("d0", &source)], &[]);
        wait_for("the pass", || (array.rig.state("d0") == "receiving").then_some(()));
        array.rig.send(&[("d1", &source)], &[]).ok();
        array.arrived(1, &source);
        assert_eq!(array.rig.service.volume(MACHINE, "d0").written_bytes, Some(0));
        still.goes_on();
        send.finish().ok();
        array.arrived(0, &source);
    });
}
