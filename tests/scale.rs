//! Many disks at once, large ones, and slow ones: memory stays inside its bound.

mod support;

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use support::{
    Frozen, GIB, Loop, MACHINE, MIB, Mount, Rig, Service, allocated, assert_equal, directory, tool, wait_for,
    write_random,
};

/// What the service may take: a base, and so much for each volume that is open.
fn bound(volumes: u64) -> u64 {
    64 * MIB + 16 * MIB * volumes
}

/// The worst case: the disks stand still until every window is full.
#[test]
fn thirty_two_volumes_at_once() {
    require_root!();
    let (count, size) = (32, 10 * MIB);
    let dir = directory();
    let under = Loop::create(&dir.path().join("under.img"), 400 * MIB);
    tool("mkfs.ext4", &["-q", under.node().to_str().unwrap()]);
    let slow = dir.path().join("slow");
    let mount = Mount::new(under.node(), &slow);
    let service = Service::start(dir.path(), &[]);
    let disk = |index: u64| Loop::create(&slow.join(format!("d{index}.img")), size);
    let mut rig = Rig::assemble(dir, service, (0..count).map(disk).collect());
    rig.mounts = vec![Box::new(mount), Box::new(under)];
    let sources: Vec<_> = (0..count).map(|index| rig.random(&format!("s{index}.img"), size)).collect();
    let names: Vec<String> = (0..count).map(|index| format!("d{index}")).collect();
    let disks: Vec<(&str, &Path)> =
        names.iter().map(String::as_str).zip(sources.iter().map(|path| path.as_path())).collect();
    let start = Instant::now();
    let frozen = Frozen::new(&slow);
    let send = rig.start(&disks, &["--compression", "off"]);
    let full = || {
        let machines = rig.service.status().machines;
        machines[0].volumes.iter().filter(|volume| volume.received_bytes == Some(8 * MIB)).count()
    };
    // One after another, since each takes time of its own.
    for count in 1..=names.len() {
        wait_for("32 full windows", || (full() >= count).then_some(()));
    }
    println!("32 windows are full after {:?}", start.elapsed());
    drop(frozen);
    send.finish().ok();
    let (took, peak) = (start.elapsed(), rig.service.peak_memory());
    println!("32 volumes at once in {took:?}, peak of the receiver {} MiB", peak / MIB);
    assert!(peak > count * 8 * MIB, "{} MiB: were they all open?", peak / MIB);
    assert!(peak < bound(count), "{} MiB", peak / MIB);
    for (index, name) in names.iter().enumerate() {
        assert_equal(&sources[index], rig.targets[index].backing());
        rig.synchronized(name);
    }
    rig.service.wait_until_idle();
}

/// 10 GiB of which little is data: no more than that is allocated on the target.
#[test]
fn a_large_sparse_image() {
    require_root!();
    let size = 10 * GIB;
    // The target has something where the source has nothing, and had it when it was assigned.
    let dir = directory();
    let service = Service::start(dir.path(), &[]);
    let backing = dir.path().join("target.img");
    File::create(&backing).unwrap().set_len(size).unwrap();
    write_random(&backing, 5 * GIB, 4 * MIB);
    let mut rig = Rig::assemble(dir, service, vec![Loop::attach(&backing, 512)]);
    let source = rig.path("source.img");
    File::create(&source).unwrap().set_len(size).unwrap();
    for at in [4 * MIB + 5, 3 * GIB + 12_345, 7 * GIB, size - MIB] {
        write_random(&source, at, MIB);
    }
    let start = Instant::now();
    let sent = rig.send(&[("d0", &source)], &["--json"]).ok().json();
    let (took, peak) = (start.elapsed(), rig.service.peak_memory());
    println!("10 GiB sparse in {took:?}, peak of the receiver {} MiB", peak / MIB);
    assert_equal(&source, &backing);
    rig.synchronized("d0");
    assert_eq!(rig.service.recorded(MACHINE, "d0")["last_commit"]["bytes"], size);
    assert!(allocated(&backing) < 6 * MIB, "{}", allocated(&backing));
    assert!(sent["disks"][0]["sent_bytes"].as_u64().unwrap() < 6 * MIB, "{sent}");
    assert!(peak < bound(1), "{} MiB", peak / MIB);
}

/// A slow disk slows its sender down and nothing else.
#[test]
fn a_disk_that_stands_still() {
    require_root!();
    let dir = directory();
    let under = Loop::create(&dir.path().join("under.img"), 96 * MIB);
    tool("mkfs.ext4", &["-q", under.node().to_str().unwrap()]);
    let mount = Mount::new(under.node(), &dir.path().join("slow"));
    let service = Service::start(dir.path(), &[]);
    let targets = vec![
        Loop::create(&dir.path().join("slow/d0.img"), 64 * MIB),
        Loop::create(&dir.path().join("d1.img"), 64 * MIB),
    ];
    let mut rig = Rig::assemble(dir, service, targets);
    rig.mounts = vec![Box::new(mount), Box::new(under)];
    let source = rig.random("source.img", 64 * MIB);
    let fast = ["--compression", "off"];
    let slow = rig.start_into_pass(&[("d0", &source)], &["--compression", "off", "--bwlimit", "16M"]);
    let frozen = Frozen::new(&rig.path("slow"));
    let stuck = wait_for("a full window", || {
        let volume = rig.service.volume(MACHINE, "d0");
        let (received, written) = (volume.received_bytes.unwrap(), volume.written_bytes.unwrap());
        (received - written == 8 * MIB).then_some(received)
    });
    assert!(stuck < 64 * MIB);
    rig.send(&[("d1", &source)], &fast).ok();
    assert_equal(&source, rig.targets[1].backing());
    rig.synchronized("d1");
    let volume = rig.service.volume(MACHINE, "d0");
    assert_eq!((volume.phase.as_str(), volume.received_bytes), ("receiving", Some(stuck)));
    // What arrived and is not written is a window.
    assert_eq!(stuck - volume.written_bytes.unwrap(), 8 * MIB, "{volume:?}");
    let peak = rig.service.peak_memory();
    assert!(peak < bound(2), "{} MiB", peak / MIB);
    drop(frozen);
    slow.finish().ok();
    assert_equal(&source, rig.targets[0].backing());
    rig.synchronized("d0");
}
