//! Disks and images arrive whole: the real program, real loop devices, real TLS.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use support::{
    Loop, MACHINE, MIB, Mount, Rig, Service, allocated, assert_equal, directory, run, tool, write_random,
};

/// Both engines do the same; which one runs, and why, is shown everywhere.
fn arrives_with(engine: &str) {
    let rig = Rig::with(&[24 * MIB], &["--engine", engine]);
    let source = rig.mixed("source.img", 24 * MIB);
    let disk = Loop::attach(&source, 512);
    let send = rig.start_into_pass(&[("d0", disk.node())], &["--engine", engine, "--bwlimit", "3M"]);
    let writing = rig.service.volume(MACHINE, "d0").engine.expect("an engine while it is received");
    assert_eq!((writing.name.as_str(), rig.state("d0").as_str()), (engine, "receiving"));
    send.finish().ok();
    assert_equal(&source, rig.targets[0].backing());
    rig.synchronized("d0");

    let status = run(&["status", "--json", "--config", &rig.service.config()]).ok().json();
    assert_eq!(status["service"]["engine"]["name"], engine);
    let volume = &status["machines"][0]["volumes"][0];
    assert_eq!(volume["phase"], "synchronized");
    assert_eq!(volume["last_commit"]["bytes"], 24 * MIB);
    assert_eq!(volume["last_commit"]["point_in_time"], true);
    assert!(rig.service.log().contains(&format!("engine={engine}")));
}

#[test]
fn with_io_uring() {
    require_root!();
    arrives_with("io-uring");
}

#[test]
fn with_threads() {
    require_root!();
    arrives_with("threads");
}

#[test]
fn without_io_uring_threads_write_and_the_reason_is_shown() {
    require_root!();
    let dir = directory();
    let service = Service::start_without_io_uring(dir.path(), &[]);
    let target = Loop::create(&dir.path().join("d0.img"), 8 * MIB);
    let rig = Rig::assemble(dir, service, vec![target]);
    let engine = rig.service.status().service.engine;
    assert_eq!(engine.name, "threads");
    assert!(engine.why.contains("io_uring is forbidden"), "{engine}");
    assert!(rig.service.log().contains("io_uring is forbidden"));
    let source = rig.mixed("source.img", 8 * MIB);
    let mut command = rig.command(&[("d0", &source)], &[]);
    support::seccomp::forbid_io_uring(&mut command);
    rig.spawn(command).finish().ok();
    assert_equal(&source, rig.targets[0].backing());

    // Asked for by name, it is an error and not something else.
    let mut insisting = support::mt_agent();
    insisting.args(["serve", "--config", &rig.service.config(), "--engine", "io-uring"]);
    insisting.args(["--state-dir", rig.path("other").to_str().unwrap()]);
    support::seccomp::forbid_io_uring(&mut insisting);
    rig.spawn(insisting).finish().fails(1, &["set up io_uring", "Operation not permitted"]);
}

#[test]
fn several_disks_at_once() {
    require_root!();
    let sizes = [8 * MIB, 16 * MIB, 4 * MIB, 12 * MIB];
    let rig = Rig::new(&sizes);
    let sources: Vec<_> =
        sizes.iter().enumerate().map(|(index, size)| rig.mixed(&format!("s{index}.img"), *size)).collect();
    let names = ["d0", "d1", "d2", "d3"];
    let disks: Vec<(&str, &Path)> =
        names.iter().copied().zip(sources.iter().map(|path| path.as_path())).collect();
    let sent = rig.send(&disks, &["--json"]).ok().json();
    let mut passes = Vec::new();
    for (index, name) in names.iter().enumerate() {
        assert_equal(&sources[index], rig.targets[index].backing());
        rig.synchronized(name);
        let disk = &sent["disks"][index];
        assert_eq!(
            (&disk["disk"], &disk["size"], &disk["error"]),
            (&(*name).into(), &sizes[index].into(), &().into())
        );
        assert_eq!(disk["pass"], rig.service.recorded(MACHINE, name)["last_commit"]["pass"]);
        passes.push(disk["pass"].clone());
    }
    passes.dedup();
    assert_eq!(passes.len(), 4, "each disk has a pass of its own");
}

/// A size that is a multiple of nothing, onto disks with small and large sectors: also the last bytes arrive, and
/// what lies behind them stays.
#[test]
fn an_image_of_odd_size_arrives_whole() {
    require_root!();
    let size = 1_000_003;
    for sector in [512, 4096] {
        let dir = directory();
        let service = Service::start(dir.path(), &[]);
        let backing = dir.path().join("target.img");
        write_random(&backing, 0, 2 * MIB);
        let before = fs::read(&backing).unwrap();
        let target = Loop::attach(&backing, sector);
        let rig = Rig::assemble(dir, service, vec![target]);
        let source = rig.random("source.img", size);
        rig.send(&[("d0", &source)], &[]).ok();
        assert_equal(&source, &backing);
        assert!(fs::read(&backing).unwrap()[size as usize..] == before[size as usize..], "sector {sector}");
        assert_eq!(rig.service.recorded(MACHINE, "d0")["last_commit"]["bytes"], size);

        // One that ends in zeros, and one of a few bytes.
        File::options().write(true).open(&source).unwrap().write_all_at(&[0; 70_000], size - 70_000).unwrap();
        rig.send(&[("d0", &source)], &[]).ok();
        assert_equal(&source, &backing);
        assert!(fs::read(&backing).unwrap()[size as usize..] == before[size as usize..], "sector {sector}");
        let tiny = rig.random("tiny.img", 3);
        rig.send(&[("d0", &tiny)], &["--another-disk"]).ok();
        assert_equal(&tiny, &backing);
        assert!(fs::read(&backing).unwrap()[3..size as usize] == fs::read(&source).unwrap()[3..]);
    }
}

#[test]
fn sectors_of_different_sizes_on_both_sides() {
    require_root!();
    // The first size is whole in sectors of 512 bytes only, so that the last block is merged with what was there.
    for (size, from, to) in [(6 * MIB + 3 * 512, 512, 4096), (6 * MIB, 4096, 512)] {
        let dir = directory();
        let service = Service::start(dir.path(), &[]);
        let backing = dir.path().join("target.img");
        File::create(&backing).unwrap().set_len(8 * MIB).unwrap();
        let rig = Rig::assemble(dir, service, vec![Loop::attach(&backing, to)]);
        assert_eq!(rig.service.recorded(MACHINE, "d0")["logical_sector"], to);
        let source = rig.mixed("source.img", size);
        let disk = Loop::attach(&source, from);
        rig.send(&[("d0", disk.node())], &[]).ok();
        assert_equal(&source, &backing);
        rig.synchronized("d0");
    }
}

/// What the target held before does not shine through, and the holes that the zeros make save space.
#[test]
fn zeros_replace_what_the_target_held() {
    require_root!();
    for engine in ["io-uring", "threads"] {
        let dir = directory();
        let service = Service::start(dir.path(), &["--engine", engine]);
        let backing = dir.path().join("target.img");
        write_random(&backing, 0, 24 * MIB);
        let rig = Rig::assemble(dir, service, vec![Loop::attach(&backing, 512)]);
        let source = rig.mixed("source.img", 20 * MIB);
        let garbage = fs::read(&backing).unwrap();
        rig.send(&[("d0", &source)], &[]).ok();
        assert_equal(&source, &backing);
        // A target that is larger than the source keeps what lies behind.
        let kept = 20 * MIB as usize;
        assert!(
            fs::read(&backing).unwrap()[kept..] == garbage[kept..],
            "bytes behind the source were changed"
        );
        assert!(allocated(&backing) < 20 * MIB, "{} bytes are allocated", allocated(&backing));

        let nothing = rig.path("zeros.img");
        File::create(&nothing).unwrap().set_len(20 * MIB).unwrap();
        let sent = rig.send(&[("d0", &nothing)], &["--json"]).ok().json();
        assert_eq!(sent["disks"][0]["sent_bytes"], 0);
        assert_equal(&nothing, &backing);
        // Zeros that were there already are left as they are, allocated or not.
        assert!(allocated(&backing) <= 5 * MIB, "{} bytes are allocated", allocated(&backing));
    }
}

#[test]
fn every_compression_arrives_and_saves_where_it_says_so() {
    require_root!();
    let size = 8 * MIB;
    let dir = directory();
    let service = Service::start(dir.path(), &[]);
    let backing = dir.path().join("target.img");
    write_random(&backing, 0, size);
    let rig = Rig::assemble(dir, service, vec![Loop::attach(&backing, 512)]);
    let source = rig.random("source.img", size);
    // One half is text.
    let file = File::options().write(true).open(&source).unwrap();
    file.write_all_at(&b"all work and no play\n".repeat(4 << 20)[..4 << 20], 4 * MIB).unwrap();
    for (compression, most) in [("off", size), ("lz4", 5 * MIB), ("zstd", 5 * MIB), ("auto", 7 * MIB)] {
        write_random(&backing, 0, size);
        let sent = rig.send(&[("d0", &source)], &["--compression", compression, "--json"]).ok().json();
        assert_equal(&source, &backing);
        let bytes = sent["disks"][0]["sent_bytes"].as_u64().unwrap();
        assert!(bytes <= most, "{compression}: {bytes} bytes were sent");
        if compression == "off" {
            assert_eq!(bytes, size);
        }
    }
}

#[test]
fn the_limit_on_bandwidth_holds() {
    require_root!();
    let rig = Rig::new(&[12 * MIB, 12 * MIB]);
    let sources = [rig.random("a.img", 12 * MIB), rig.random("b.img", 12 * MIB)];
    let disks: [(&str, &Path); 2] = [("d0", &sources[0]), ("d1", &sources[1])];
    let sent = rig.send(&disks, &["--compression", "off", "--bwlimit", "6M", "--json"]).ok().json();
    // 24 MiB for both together at 6 MiB/s; a tenth of a second's worth may be saved up.
    let took = sent["seconds"].as_f64().unwrap();
    assert!((3.6..12.0).contains(&took), "{took} s");
    assert_equal(&sources[0], rig.targets[0].backing());
    assert_equal(&sources[1], rig.targets[1].backing());
}

/// Disks that share a narrow limit wait for each other: longer than the receiver bears silence, if each sent whole
/// frames.
#[test]
fn a_sender_that_limits_itself_is_not_cut_for_its_silence() {
    require_root!();
    let sizes = [MIB; 4];
    let mut rig = Rig::new(&sizes);
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "idle_timeout = \"3s\"\n"));
    let names = ["d0", "d1", "d2", "d3"];
    let sources = names.map(|name| rig.random(&format!("{name}.source"), sizes[0]));
    let disks: Vec<(&str, &Path)> =
        names.iter().copied().zip(sources.iter().map(|path| path.as_path())).collect();
    rig.send(&disks, &["--compression", "off", "--bwlimit", "256K"]).ok();
    for (index, source) in sources.iter().enumerate() {
        assert_equal(source, rig.targets[index].backing());
    }
}

#[test]
fn a_mounted_source_is_sent_and_the_user_is_told() {
    require_root!();
    let rig = Rig::new(&[32 * MIB]);
    let image = rig.path("source.img");
    File::create(&image).unwrap().set_len(32 * MIB).unwrap();
    tool("mkfs.ext4", &["-q", image.to_str().unwrap()]);
    let disk = Loop::attach(&image, 512);
    let mount = Mount::new(disk.node(), &rig.path("mnt"));
    fs::write(rig.path("mnt/letter"), "dear reader").unwrap();
    tool("sync", &["-f", rig.path("mnt/letter").to_str().unwrap()]);
    let outcome = rig.send(&[("d0", disk.node())], &[]).ok();
    assert!(outcome.stderr.contains("is mounted on"), "{outcome:#?}");
    assert!(outcome.stderr.contains("not one point in time"), "{outcome:#?}");
    assert_eq!(rig.service.recorded(MACHINE, "d0")["last_commit"]["point_in_time"], false);

    // The file behind it is as little a point in time.
    let outcome = rig.send(&[("d0", &image)], &[]).ok();
    assert!(outcome.stderr.contains("not one point in time"), "{outcome:#?}");

    // Once it stands still nothing is said, and what arrives is a file system with the letter in it.
    drop(mount);
    let outcome = rig.send(&[("d0", disk.node())], &[]).ok();
    assert_eq!(outcome.stderr, "");
    assert_equal(&image, rig.targets[0].backing());
    rig.wait_until_closed("d0");
    let arrived = Mount::new(rig.targets[0].node(), &rig.path("arrived"));
    assert_eq!(fs::read_to_string(rig.path("arrived/letter")).unwrap(), "dear reader");
    // And now it is in use here: nothing is written to it.
    rig.send(&[("d0", disk.node())], &[]).fails(3, &["is mounted on"]);
    drop(arrived);
    rig.send(&[("d0", disk.node())], &[]).ok();
}

/// A pass over a disk that holds an older one, and a dry run that changes nothing.
#[test]
fn a_second_pass_brings_what_changed() {
    require_root!();
    let rig = Rig::new(&[8 * MIB]);
    let source = rig.mixed("source.img", 8 * MIB);
    rig.send(&[("d0", &source)], &[]).ok();
    let first = rig.service.recorded(MACHINE, "d0")["last_commit"]["pass"].clone();
    write_random(&source, 3 * MIB + 17, MIB);
    rig.send(&[("d0", &source)], &["--dry-run"]).ok();
    let planned = rig.send(&[("d0", &source)], &["--dry-run", "--json"]).ok().json();
    assert_eq!(
        (&planned["dry_run"], &planned["disks"][0]["size"]),
        (&true.into(), &(8 * MIB).into()),
        "{planned}"
    );
    assert_eq!(planned["disks"][0]["source"], source.to_str().unwrap());
    assert_eq!(rig.service.recorded(MACHINE, "d0")["last_commit"]["pass"], first);
    // The first random byte may be what it was.
    let differs = support::first_difference(&source, rig.targets[0].backing());
    assert!(differs.is_some_and(|at| (3 * MIB + 17..4 * MIB).contains(&at)), "{differs:?}");
    rig.send(&[("d0", &source)], &[]).ok();
    assert_ne!(rig.service.recorded(MACHINE, "d0")["last_commit"]["pass"], first);
    assert_equal(&source, rig.targets[0].backing());
}

/// Two that keep one disk protected would take turns. What only compares may run beside it, and so may the other disks.
#[test]
fn a_disk_has_one_sender() {
    require_root!();
    let rig = Rig::new(&[MIB, MIB]);
    let [d0, d1] = ["d0.src", "d1.src"].map(|name| rig.random(name, MIB));
    let mut first = rig.start(&[("d0", &d0)], &["--every", "1h"]);
    support::wait_for("the first pass", || (rig.state("d0") == "synchronized").then_some(()));
    let pid = format!("with pid {} (it holds ", first.pid());
    let texts = ["disk d0 of web01 is being sent", &pid, "): wait for its end, or stop it first"];
    for disks in [&[("d0", &*d0)][..], &[("d1", &*d1), ("d0", &*d0)]] {
        rig.send(disks, &[]).fails(3, &texts);
    }
    assert_eq!(rig.state("d1"), "empty");
    rig.send(&[("d1", &d1)], &[]).ok();
    rig.send(&[("d0", &d0)], &["--dry-run"]).ok();
    let (to, state) = (rig.service.address().to_string(), rig.client());
    let disk = format!("d0={}", d0.display());
    run(&[
        "verify",
        "--machine",
        MACHINE,
        "--to",
        &to,
        "--state-dir",
        state.to_str().unwrap(),
        "--disk",
        &disk,
    ])
    .ok();
    assert_eq!(first.has_ended(), None, "{}", first.stderr());
    // However it ends.
    first.kill();
    rig.send(&[("d0", &d0)], &[]).ok();
}

/// A pass by hand leaves no machine unprotected: who keeps it so goes on when that has ended.
#[test]
fn who_keeps_a_machine_protected_waits_for_another_sender() {
    require_root!();
    let rig = Rig::new(&[MIB]);
    let source = rig.random("source.img", MIB);
    let mut first = rig.start(&[("d0", &source)], &["--every", "1h"]);
    support::wait_for("the first pass", || first.stdout().contains("committed").then_some(()));
    let texts = [format!("with pid {} ", first.pid()), "): waiting for its end".to_owned()];
    let waits = || {
        let process = rig.start(&[("d0", &source)], &["--every", "1h"]);
        support::wait_for("what it waits for", || {
            let said = process.stderr();
            texts.iter().all(|text| said.contains(text)).then_some(())
        });
        process
    };
    let (stopped, mut second) = (waits(), waits());
    stopped.signal(Signal::SIGTERM);
    stopped.finish().ok();
    // Longer than until it looks again.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!((second.has_ended(), second.stdout().as_str()), (None, ""));
    first.kill();
    support::wait_for("its first pass", || second.stdout().contains("committed").then_some(()));
    assert_eq!(second.stderr().matches("is being sent").count(), 1, "{}", second.stderr());
}

/// A pass that a signal ends has a result, also of who keeps a machine protected.
#[test]
fn an_interrupted_pass_of_many_has_a_result() {
    require_root!();
    let rig = Rig::new(&[8 * MIB]);
    let source = rig.random("source.img", 8 * MIB);
    let more =
        ["--every", "1h", "--json", "--compression", "off", "--bwlimit", "1M", "--post-hook", "/bin/false"];
    let sender = rig.start_into_pass(&[("d0", &source)], &more);
    sender.signal(Signal::SIGTERM);
    let ended = sender.finish().ok();
    assert!(ended.stderr.contains("the post-hook failed"), "{ended:#?}");
    assert_eq!(ended.stdout.lines().count(), 1, "{ended:#?}");
    let disk = &ended.json()["disks"][0];
    assert_eq!((&disk["disk"], &disk["point"]), (&"d0".into(), &serde_json::Value::Null));
    assert!(disk["error"].as_str().is_some_and(|error| error.contains("interrupted")), "{disk:#}");
}

/// Several that list disks at once do not take each other for a use of the disk.
#[test]
fn listing_disks_disturbs_nobody() {
    require_root!();
    let dir = directory();
    let backing = dir.path().join("disk.img");
    File::create(&backing).unwrap().set_len(MIB).unwrap();
    let disk = Loop::attach_idle(&backing, 512);
    let id = disk.id();
    let list = || {
        for _ in 0..100 {
            let listed = run(&["discover-disks", "--loop", "--json"]).ok().json();
            let found = listed["disks"].as_array().unwrap().iter().find(|disk| disk["id"] == *id).unwrap();
            assert_eq!(found["role"], "free", "{found}");
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(list);
        }
    });
}
