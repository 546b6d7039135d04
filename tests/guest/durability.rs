//! What was acknowledged is on stable storage: a pass is recorded by dm-log-writes, below the target disk and below
//! the file system with the records, and each state in which a power cut could have left either is looked at.

use std::collections::BTreeSet;
use std::fs::File;
use std::time::Duration;

use mt_agent::name::Name;
use mt_agent::protection;
use nix::sys::signal::Signal;

use crate::harness::small;
use crate::lio::{Identity, Store, Target};
use crate::log_writes::LogWrites;
use crate::support::{
    Frozen, Loop, MACHINE, MIB, Mount, Rig, Service, assert_equal, directory, first_difference, run, tool,
    wait_for, write_random,
};

#[test]
fn what_was_acknowledged_survives_a_power_cut_at_any_moment() {
    survives("io-uring", 1);
}

#[test]
fn what_threads_wrote_survives_it_as_well() {
    survives("threads", 0);
}

/// A pass with this engine, and `samples` of the states of the records between each two flushes.
fn survives(engine: &str, samples: usize) {
    small().without_udev().run(|_| {
        let dir = directory();
        let disk = |name: &str, size, sector| {
            File::create_new(dir.path().join(name)).unwrap().set_len(size).unwrap();
            Loop::attach(&dir.path().join(name), sector)
        };
        let (under, under_log) = (disk("volume", 16 * MIB, 512), disk("volume.log", 64 * MIB, 512));
        // Something to be overwritten, also by zeros.
        write_random(under.backing(), 0, 16 * MIB);
        let volume = LogWrites::on(under.node(), under_log.node());
        let store = Store::block(&volume.node(), &Identity::vmware(1));
        Target::new().attach(0, &store);

        // ext4 relies on it that its superblock is not torn, so the sectors of this one are as large as its blocks.
        let (kept, kept_log) = (disk("kept", 8 * MIB, 4096), disk("kept.log", 64 * MIB, 4096));
        tool("mkfs.ext4", &["-q", kept.node().to_str().unwrap()]);
        let records = LogWrites::on(kept.node(), kept_log.node());
        let retention = dir.path().join("state/retention");
        let mount = Mount::new(&records.node(), &retention);
        let mark = |name: &str| [&volume, &records].map(|log| log.mark(name));

        let service = Service::start(dir.path(), &["--engine", engine]);
        let mut rig = Rig::assemble(dir, service, Vec::new());
        rig.mounts = vec![Box::new(mount)];
        let assigned = format!("d0={}", Identity::vmware(1).canonical());
        let config = rig.service.config();
        run(&["protect", "add", MACHINE, "--overwrite", "--config", &config, "--disk", &assigned]).ok();
        mark("assigned");

        let source = rig.mixed("source.img", 16 * MIB);
        let mut send = rig.start_into_pass(&[("d0", &source)], &["--bwlimit", "3M"]);
        // However busy this machine is, the pass is not over before what follows.
        send.signal(Signal::SIGSTOP);
        assert_eq!(rig.state("d0"), "receiving");
        mark("receiving");
        // From here on nothing can be recorded: the flush of the disk must come before that.
        let frozen = Frozen::new(&retention);
        let before = volume.entries();
        send.signal(Signal::SIGCONT);
        wait_for("a flush of the disk", || {
            let committing = rig.service.volume(MACHINE, "d0").phase == "committing";
            (committing && volume.entries() > before).then_some(())
        });
        mark("flushed");
        std::thread::sleep(Duration::from_millis(300));
        assert!(send.has_ended().is_none(), "what cannot be recorded was acknowledged");
        drop(frozen);
        send.finish().ok();
        mark("acknowledged");
        rig.synchronized("d0");
        rig.service.process().kill();
        let (volume, records) = (volume.finish(), records.finish());
        assert_equal(volume.whole().path(), under.backing());
        println!("volume: {:?}, records: {:?}", volume.barriers_and_bytes(), records.barriers_and_bytes());

        let mut others = 0;
        let states = volume.each_crash(12, |image, point| {
            if point.after("flushed") {
                assert_equal(&source, image);
            } else if first_difference(&source, image).is_some() {
                others += 1;
            }
        });
        println!("{states} states of the disk, {others} of them before it was whole");
        assert!(others >= 12, "only {others} of {states} states differ from the source");

        // What the records say at every moment, and so that nothing says more than what the disk holds.
        let (place, machine) = (rig.path("after"), MACHINE.parse::<Name>().unwrap());
        let marks = ["acknowledged", "flushed", "receiving", "assigned"];
        let mut seen = BTreeSet::new();
        let states = records.each_crash(samples, |image, point| {
            if !point.after("assigned") {
                return;
            }
            let disk = Loop::attach(image, 4096);
            let mount = Mount::new(disk.node(), &place);
            let state = protection::Store::open(&place).load(&machine).unwrap().disks[0].state.name();
            drop(mount);
            let passed = marks.into_iter().find(|mark| point.after(mark)).unwrap();
            let possible: &[&str] = match passed {
                "assigned" => &["empty", "receiving"],
                "receiving" => &["receiving"],
                "flushed" => &["receiving", "synchronized"],
                _ => &["synchronized"],
            };
            assert!(possible.contains(&state), "{state} after {passed}");
            seen.insert((passed, state));
        });
        println!("{states} states of the records: {seen:?}");
        assert!(
            seen.contains(&("acknowledged", "synchronized")) && seen.contains(&("receiving", "receiving"))
        );
    });
}
