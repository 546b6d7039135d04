//! Going back: recovery points of the real program on loop devices, from the first pass to failover and its undoing.

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mt_agent::journal::format::{Segment, encode_segment};
use mt_agent::journal::writer::segment_name;
use mt_agent::pass::Lineage;
use mt_agent::points::{Dropped, Log, PointId, Reason, Record};
use nix::sys::signal::Signal;
use rand::rngs::StdRng as Dice;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use support::{KIB, Loop, MACHINE, MIB, PATIENCE, Rig, Service, assert_equal, directory, run, wait_for};

const SIZE: u64 = 16 * MIB;

/// Changes some ranges of a file: a few long ones and many short ones, some to zeros.
fn change(path: &Path, dice: &mut Dice) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let size = file.metadata().unwrap().len();
    for _ in 0..dice.random_range(5..40) {
        let len = match dice.random_range(0..4) {
            0 => dice.random_range(1..=MIB),
            1 => 4 * KIB,
            _ => dice.random_range(1..=64 * KIB),
        };
        let offset = dice.random_range(0..size - len);
        let mut bytes = vec![0; len as usize];
        if dice.random_range(0..4) != 0 {
            dice.fill(&mut bytes[..]);
        }
        file.write_all_at(&bytes, offset).unwrap();
    }
}

/// A rig whose disk went through versions of a source, each of them a point; and a copy of each version.
fn with_versions(count: usize, dice: &mut Dice) -> (Rig, PathBuf, Vec<PathBuf>) {
    let rig = Rig::new(&[SIZE]);
    let source = rig.random("source.img", SIZE);
    let mut versions = Vec::new();
    for number in 0..count {
        if number > 0 {
            change(&source, dice);
        }
        rig.send(&[("d0", &source)], &["--point-name", &format!("v{number}")]).ok();
        let version = rig.path(&format!("v{number}.img"));
        fs::copy(&source, &version).unwrap();
        versions.push(version);
    }
    (rig, source, versions)
}

fn points(rig: &Rig) -> Vec<Value> {
    let list = run(&["points", MACHINE, "--json", "--config", &rig.service.config()]).ok().json();
    list["points"].as_array().unwrap().clone()
}

fn id(point: &Value) -> String {
    point["id"].as_str().unwrap().to_owned()
}

fn command(rig: &Rig, args: &[&str]) -> support::Outcome {
    run(&[args, &["--config", &rig.service.config()]].concat())
}

/// The disk as it was at a point, exported and compared.
#[track_caller]
fn exported(rig: &Rig, point: &str, version: &Path) {
    let dir = rig.path(&format!("export-{point}"));
    fs::create_dir(&dir).unwrap();
    command(rig, &["export", &format!("{MACHINE}@{point}"), "--dir", dir.to_str().unwrap()]).ok();
    assert_equal(version, &dir.join("d0.img"));
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn every_point_can_be_read_gone_back_to_and_left_again() {
    require_root!();
    let mut dice = Dice::seed_from_u64(1);
    let (rig, source, versions) = with_versions(4, &mut dice);
    let points = points(&rig);
    assert_eq!(points.len(), 4);
    assert!(points.iter().all(|point| point["fuzzy"] == false && point["complete"] == true));
    assert_eq!(points[3]["name"], "v3");
    // What arrived as it was is in no journal: a tenth was changed, and that is what a point takes.
    let size = points[2]["size"].as_u64().unwrap();
    assert!(size > 0 && size < SIZE / 2, "{size}");
    let checked = command(&rig, &["check", MACHINE]).ok();
    assert!(checked.stdout.contains("4 points, 0 not sound"), "{}", checked.stdout);
    for (point, version) in points.iter().zip(&versions) {
        exported(&rig, &id(point), version);
    }
    exported(&rig, "latest", &versions[3]);
    // By its name, or the beginning of its id.
    exported(&rig, "v1", &versions[1]);
    exported(&rig, &id(&points[2])[..12], &versions[2]);
    command(&rig, &["failover", MACHINE, "--to", "v9"]).fails(3, &["has no point that is called v9"]);

    // A try changes nothing.
    command(&rig, &["failover", MACHINE, "--to", &id(&points[1]), "--dry-run"]).ok();
    assert_equal(&versions[3], rig.targets[0].backing());
    let back = command(&rig, &["failover", MACHINE, "--to", &id(&points[1]), "--json"]).ok().json();
    assert_eq!(rig.service.volume(MACHINE, "d0").phase, "released");
    rig.service.wait_for_log("failed over: its disks are released");
    assert!(back["disks"][0]["brought_back"].as_u64().unwrap() > 0);
    assert_equal(&versions[1], rig.targets[0].backing());
    command(&rig, &["failover", MACHINE, "--to", "latest"]).fails(3, &["was failed over already"]);
    rig.send(&[("d0", &source)], &[]).fails(3, &["was failed over", "--undo"]);
    assert_equal(&versions[1], rig.targets[0].backing());
    // Taken back, everything is as before, and goes on.
    command(&rig, &["failover", MACHINE, "--undo"]).ok();
    rig.service.wait_for_log("not failed over: its disks stand at its newest point");
    assert_equal(&versions[3], rig.targets[0].backing());
    for (point, version) in points.iter().zip(&versions) {
        exported(&rig, &id(point), version);
    }
    change(&source, &mut dice);
    rig.send(&[("d0", &source)], &["--point-name", "v1"]).ok();
    command(&rig, &["failover", MACHINE, "--to", "v1"])
        .fails(3, &["2 points of machine web01 are called v1", &id(&points[1])]);
    assert_equal(&source, rig.targets[0].backing());
    exported(&rig, &id(&points[3]), &versions[3]);
    // The newest point needs nothing to be written.
    let latest = command(&rig, &["failover", MACHINE, "--to", "latest", "--json"]).ok().json();
    assert_eq!(latest["disks"][0]["brought_back"], 0);
    assert_equal(&source, rig.targets[0].backing());
    command(&rig, &["failover", MACHINE, "--undo"]).ok();
    command(&rig, &["failover", MACHINE, "--undo"]).fails(3, &["is not failed over"]);
}

#[test]
fn a_pass_that_broke_off_is_rolled_back_or_goes_on() {
    require_root!();
    let mut dice = Dice::seed_from_u64(2);
    let (mut rig, source, versions) = with_versions(2, &mut dice);
    for round in 0..2 {
        support::write_random(&source, 0, SIZE);
        let slow = ["--bwlimit", "4M", "--compression", "off"];
        let send = rig.start_into_pass(&[("d0", &source)], &slow);
        std::thread::sleep(Duration::from_millis(300));
        // While it runs, and the disk is neither the one nor the other, the point is there.
        send.standing_still(|| {
            exported(&rig, "latest", &versions[1]);
            command(&rig, &["failover", MACHINE, "--to", "latest", "--dry-run"]).ok();
            rig.service.process().kill();
        });
        send.finish();
        assert!(support::first_difference(&versions[1], rig.targets[0].backing()).is_some());
        exported(&rig, "latest", &versions[1]);
        exported(&rig, &id(&points(&rig)[0]), &versions[0]);
        if round == 0 {
            let report = command(&rig, &["failover", MACHINE, "--to", "latest", "--json"]).ok().json();
            assert!(report["disks"][0]["rolled_back"].as_u64().unwrap() > 0);
            assert_equal(&versions[1], rig.targets[0].backing());
            command(&rig, &["failover", MACHINE, "--undo"]).ok();
        }
        rig.service.spawn();
    }
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
    exported(&rig, &id(&points(&rig)[1]), &versions[1]);
    exported(&rig, &id(&points(&rig)[0]), &versions[0]);
}

/// `MT_AGENT_KILLS` rounds, 25 unless it says otherwise.
#[test]
fn kill_9_of_the_service_at_random_moments_loses_no_point() {
    require_root!();
    let rounds = std::env::var("MT_AGENT_KILLS").map_or(25, |text| text.parse().unwrap());
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut dice = Dice::seed_from_u64(seed);
    let (mut rig, source, mut versions) = with_versions(1, &mut dice);
    let version = rig.path("version.img");
    for round in 0..rounds {
        change(&source, &mut dice);
        let send = rig.start(&[("d0", &source)], &["--compression", "off"]);
        std::thread::sleep(Duration::from_millis(dice.random_range(0..400)));
        rig.service.process().kill();
        let acknowledged = send.finish().code == Some(0);
        let listed = points(&rig);
        assert!(!acknowledged || listed.last().unwrap()["disks"][0]["sender_pass"].is_string());
        // A point that was recorded and not acknowledged is one, too.
        if listed.len() > versions.len() {
            let path = rig.path(&format!("k{round}.img"));
            fs::copy(&source, &path).unwrap();
            versions.push(path);
        } else {
            assert!(!acknowledged, "an acknowledged point is missing in round {round}");
        }
        exported(&rig, "latest", versions.last().unwrap());
        let any = dice.random_range(0..versions.len());
        exported(&rig, &id(&listed[any]), &versions[any]);
        rig.service.spawn();
    }
    change(&source, &mut dice);
    rig.send(&[("d0", &source)], &[]).ok();
    fs::copy(&source, &version).unwrap();
    assert_equal(&version, rig.targets[0].backing());
    let checked = command(&rig, &["check", MACHINE]).ok();
    assert!(checked.stdout.contains(" 0 not sound"), "{}", checked.stdout);
}

/// The directory of the journals of a machine's disk.
fn journal(rig: &Rig, disk: &str) -> PathBuf {
    PathBuf::from(rig.service.state_dir()).join("retention/journals").join(MACHINE).join(disk)
}

fn segments(directory: &Path) -> Vec<PathBuf> {
    let mut segments: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.sort();
    segments
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// Whether each of the points is sound, as `check` says.
fn sound(rig: &Rig) -> Vec<bool> {
    let report = command(rig, &["check", MACHINE, "--json"]).json();
    report["points"].as_array().unwrap().iter().map(|point| point["sound"] == true).collect()
}

#[test]
fn a_damaged_segment_costs_the_points_that_need_it() {
    require_root!();
    let mut dice = Dice::seed_from_u64(3);
    let (rig, _, versions) = with_versions(3, &mut dice);
    let segments = segments(&journal(&rig, "d0"));
    // The first of the newest pass.
    let newest = segments.iter().find(|path| path.to_str().unwrap().ends_with("3-00000000.seg")).unwrap();
    // Wherever a byte is flipped, also behind the last record.
    for segment in &segments {
        let len = fs::metadata(segment).unwrap().len();
        let places =
            [0, 100, 4095, 4096 + 70, 8192 + 100, len / 2, len - 4096, len - 1].map(|at| at.min(len - 1));
        for at in places {
            flip(segment, at);
            let is_newest = segment.to_str().unwrap().contains("3-0000");
            let expected = if is_newest { [false, false, true] } else { [false, true, true] };
            assert_eq!(sound(&rig), expected, "byte {at} of {}", segment.display());
            flip(segment, at);
        }
    }
    assert_eq!(sound(&rig), [true, true, true]);
    flip(newest, 8192 + 100);
    let points = points(&rig);
    let checked = command(&rig, &["check", MACHINE, "--json"]);
    assert_eq!(checked.code, Some(1));
    let report = checked.json();
    let sound: Vec<_> =
        report["points"].as_array().unwrap().iter().map(|point| point["sound"] == true).collect();
    assert_eq!(sound, [false, false, true]);
    assert!(report["points"][0]["damage"][0].as_str().unwrap().contains("3-00000000.seg"), "{report}");
    exported(&rig, &id(&points[2]), &versions[2]);
    command(&rig, &["failover", MACHINE, "--to", &id(&points[0])]).fails(1, &["damaged"]);
    assert_equal(&versions[2], rig.targets[0].backing());
    // One that is missing, or lost its end, is no shorter way back.
    let out = rig.path("out");
    fs::create_dir(&out).unwrap();
    for harm in
        [|path: &Path| File::create(path).map(drop).unwrap(), |path: &Path| fs::remove_file(path).unwrap()]
    {
        harm(newest);
        for point in &points[..2] {
            let what = format!("{MACHINE}@{}", id(point));
            command(&rig, &["failover", MACHINE, "--to", &id(point)]).fails(1, &["damaged", "missing"]);
            command(&rig, &["export", &what, "--dir", out.to_str().unwrap()]).fails(1, &["damaged"]);
        }
        assert_equal(&versions[2], rig.targets[0].backing());
        exported(&rig, &id(&points[2]), &versions[2]);
    }
}

/// What cannot be reached any more is given up, and no more than that; then the machine is received again.
#[test]
fn what_is_damaged_is_given_up_and_the_machine_goes_on() {
    require_root!();
    let mut dice = Dice::seed_from_u64(6);
    let (mut rig, source, mut versions) = with_versions(4, &mut dice);
    // A pass that led to a point: the points before it go.
    let third =
        segments(&journal(&rig, "d0")).into_iter().find(|path| path.to_str().unwrap().contains("2-0000"));
    flip(&third.unwrap(), 8192 + 100);
    command(&rig, &["check", MACHINE]).fails(1, &["1 points of web01", "--give-up"]);
    let given_up = command(&rig, &["check", MACHINE, "--give-up"]).ok();
    assert!(given_up.stdout.contains("NOT SOUND, given up: disk d0: "), "{}", given_up.stdout);
    versions.remove(0);
    assert_eq!(points(&rig).len(), 3);
    assert_eq!(sound(&rig), [true, true, true]);

    // An open pass: all points go, since the disk is at none, but not the disk.
    let newest = versions.last().unwrap();
    support::write_random(&source, 0, SIZE);
    let send = rig.start_into_pass(&[("d0", &source)], &["--bwlimit", "4M", "--compression", "off"]);
    command(&rig, &["check", MACHINE, "--give-up"]).fails(3, &["is receiving"]);
    wait_for("a record", || {
        let open: Vec<_> = segments(&journal(&rig, "d0"));
        open.iter().any(|path| path.to_str().unwrap().contains("5-0000")).then_some(())
    });
    // What is overwritten was saved.
    wait_for("a write", || support::first_difference(newest, rig.targets[0].backing()));
    rig.service.process().kill();
    send.finish();
    let open =
        segments(&journal(&rig, "d0")).into_iter().find(|path| path.to_str().unwrap().contains("5-0000"));
    flip(&open.unwrap(), 4096 + 70);
    let dir = rig.path("out");
    fs::create_dir(&dir).unwrap();
    let dir = dir.to_str().unwrap();
    for args in [&["failover", MACHINE, "--to", "latest"][..], &["export", "web01@latest", "--dir", dir]] {
        command(&rig, args).fails(1, &["damaged", "mt-agent check web01", "--give-up"]);
    }
    rig.service.spawn();
    rig.send(&[("d0", &source)], &[]).fails(3, &["damaged", "mt-agent check web01", "--give-up"]);
    assert_eq!(sound(&rig), [false, false, false]);
    command(&rig, &["check", MACHINE, "--give-up"]).ok();
    assert_eq!(points(&rig).len(), 0);
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
    exported(&rig, "latest", &source);
    assert_eq!(points(&rig).len(), 1);
}

/// A log that was cut at the end of a line looks sound; the protection knows of a point that it does not have.
#[test]
fn a_log_that_lost_its_end_is_noticed() {
    require_root!();
    let mut dice = Dice::seed_from_u64(14);
    let (mut rig, source, versions) = with_versions(3, &mut dice);
    let log = PathBuf::from(rig.service.state_dir()).join("retention/points.log");
    let whole = fs::read(&log).unwrap();
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    let dir = rig.path("out");
    fs::create_dir(&dir).unwrap();
    let dir = dir.to_str().unwrap();
    // The newest point is missing; all are.
    for left in [3, 1] {
        rig.service.process().kill();
        fs::write(&log, lines[..left].concat()).unwrap();
        rig.service.spawn();
        assert_eq!(points(&rig).len(), left - 1);
        if left > 1 {
            for args in
                [&["failover", MACHINE, "--to", "latest"][..], &["export", "web01@latest", "--dir", dir]]
            {
                command(&rig, args)
                    .fails(1, &["lines were cut off its end", "mt-agent check web01 --give-up"]);
            }
        }
        rig.send(&[("d0", &source)], &[])
            .fails(3, &["lines were cut off its end", "mt-agent check web01 --give-up"]);
        assert_eq!(sound(&rig), vec![false; left - 1]);
        command(&rig, &["check", MACHINE]).fails(1, &["--give-up"]);
        assert_equal(&versions[2], rig.targets[0].backing());
    }
    rig.service.process().kill();
    fs::write(&log, &whole).unwrap();
    rig.service.spawn();
    assert_eq!(sound(&rig), [true, true, true]);
    // First without any point, then with one that is left.
    for cut in [3, 1] {
        rig.service.process().kill();
        let text = fs::read(&log).unwrap();
        let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
        fs::write(&log, lines[..lines.len() - cut].concat()).unwrap();
        rig.service.spawn();
        let given_up = command(&rig, &["check", MACHINE, "--give-up"]).ok();
        assert!(format!("{given_up:?}").contains("lines were cut off its end"), "{given_up:#?}");
        for _ in 0..2 {
            change(&source, &mut dice);
            rig.send(&[("d0", &source)], &[]).ok();
        }
        assert_eq!(points(&rig).len(), 2);
        assert_eq!(sound(&rig), [true, true]);
        exported(&rig, "latest", &source);
    }
}

/// The same of a log that does not know any more that the disks are released, whatever else it knows: they are not written to.
#[test]
fn a_log_that_lost_a_release_is_noticed() {
    require_root!();
    let mut dice = Dice::seed_from_u64(15);
    let (mut rig, source, versions) = with_versions(2, &mut dice);
    let log = PathBuf::from(rig.service.state_dir()).join("retention/points.log");
    let first = id(&points(&rig)[0]);
    command(&rig, &["failover", MACHINE, "--to", &first]).ok();
    let whole = fs::read(&log).unwrap();
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    // The release is missing; that it began, too.
    for left in [lines.len() - 1, lines.len() - 2] {
        rig.service.process().kill();
        fs::write(&log, lines[..left].concat()).unwrap();
        rig.service.spawn();
        rig.service.wait_for_log("listening");
        let lost =
            ["was failed over to point", "lines were cut off its end", "mt-agent check web01 --give-up"];
        if left < lines.len() - 1 {
            rig.send(&[("d0", &source)], &[]).fails(3, &lost);
        }
        command(&rig, &["failover", MACHINE, "--to", "latest"]).fails(1, &lost);
        assert_eq!(sound(&rig), [false, false]);
        assert_equal(&versions[0], rig.targets[0].backing());
    }
    rig.service.process().kill();
    fs::write(&log, &whole).unwrap();
    rig.service.spawn();
    assert_eq!(sound(&rig), [true, true]);
    command(&rig, &["failover", MACHINE, "--undo"]).ok();
    rig.send(&[("d0", &source)], &[]).ok();
    // And given up, where it cannot be had back.
    command(&rig, &["failover", MACHINE, "--to", &first]).ok();
    rig.service.process().kill();
    fs::write(&log, lines[..lines.len() - 2].concat()).unwrap();
    rig.service.spawn();
    command(&rig, &["check", MACHINE, "--give-up"]).ok();
    change(&source, &mut dice);
    rig.send(&[("d0", &source)], &[]).ok();
    exported(&rig, "latest", &source);
}

/// Files of another machine's disk are in the way: they are put aside, whole, and the machine goes on.
#[test]
fn files_of_another_machine_are_put_aside() {
    require_root!();
    let mut dice = Dice::seed_from_u64(15);
    let (rig, source, _) = with_versions(2, &mut dice);
    let retention = PathBuf::from(rig.service.state_dir()).join("retention");
    let mut log = Log::open(&retention).unwrap();
    let mut point = log.newest(&MACHINE.parse().unwrap()).unwrap().clone();
    point.id = PointId(1);
    point.volumes[0].machine = "db01".parse().unwrap();
    point.volumes[0].id = "loop:/elsewhere".parse().unwrap();
    point.volumes[0].lineage = Lineage(9);
    log.append(Record::Point(point)).unwrap();
    let segment = Segment { lineage: Lineage(9), pass: 7, index: 0, generation: 1, sequence: 0 };
    let journal = journal(&rig, "d0");
    let name = segment_name(7, 0);
    fs::write(journal.join(&name), [&encode_segment(&segment)[..], &[0; 4096]].concat()).unwrap();
    rig.send(&[("d0", &source)], &[]).fails(3, &["belongs to the journal of another disk"]);
    assert_eq!(sound(&rig), [false, false]);
    let given_up = command(&rig, &["check", MACHINE, "--give-up"]).ok();
    let aside = journal.with_file_name("d0~foreign-1");
    assert!(given_up.stderr.contains(aside.to_str().unwrap()), "{given_up:#?}");
    assert!(aside.join(&name).exists());
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
    assert_eq!(sound(&rig), [true]);
}

/// A point that was thinned out is none any more, and what its pass saved is needed all the same.
#[test]
fn what_a_thinned_points_pass_saved_is_missed_where_it_is_missing() {
    require_root!();
    let mut dice = Dice::seed_from_u64(12);
    let (rig, _, versions) = with_versions(4, &mut dice);
    let ids: Vec<String> = points(&rig).iter().map(id).collect();
    let retention = PathBuf::from(rig.service.state_dir()).join("retention");
    let thinned = Dropped {
        time: time::OffsetDateTime::now_utc(),
        reason: Reason::Thinned,
        points: vec![ids[2].parse().unwrap()],
    };
    Log::open(&retention).unwrap().append(Record::Dropped(thinned)).unwrap();
    exported(&rig, &ids[0], &versions[0]);
    for segment in
        segments(&journal(&rig, "d0")).iter().filter(|path| path.to_str().unwrap().contains("3-0000"))
    {
        fs::remove_file(segment).unwrap();
    }
    assert_eq!(sound(&rig), [false, false, true]);
    command(&rig, &["failover", MACHINE, "--to", &ids[0]])
        .fails(1, &["damaged", "segments of this pass are missing"]);
}

/// The pass that went back is damaged: what lies before the point of the failover can be reached all the same.
#[test]
fn a_failover_that_cannot_be_taken_back_becomes_the_newest_point() {
    require_root!();
    let mut dice = Dice::seed_from_u64(7);
    let (rig, source, versions) = with_versions(4, &mut dice);
    let second = id(&points(&rig)[1]);
    let third = |path: &PathBuf| path.to_str().unwrap().contains("3-0000");
    let thirds = || segments(&journal(&rig, "d0")).into_iter().filter(third);
    let old: Vec<_> = thirds().map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    command(&rig, &["failover", MACHINE, "--to", &second]).ok();
    let back =
        segments(&journal(&rig, "d0")).into_iter().find(|path| path.to_str().unwrap().contains("5-0000"));
    flip(&back.unwrap(), 8192 + 100);
    command(&rig, &["failover", MACHINE, "--undo"]).fails(1, &["damaged", "--give-up"]);
    assert_equal(&versions[1], rig.targets[0].backing());
    assert_eq!(sound(&rig), [true, true, false, false]);
    command(&rig, &["check", MACHINE, "--give-up"]).ok();
    rig.send(&[("d0", &source)], &[]).fails(3, &["was failed over"]);
    command(&rig, &["failover", MACHINE, "--undo"]).ok();
    assert_equal(&versions[1], rig.targets[0].backing());
    assert_eq!(sound(&rig), [true, true]);
    exported(&rig, &id(&points(&rig)[0]), &versions[0]);
    exported(&rig, "latest", &versions[1]);
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
    for (point, version) in points(&rig).iter().zip([&versions[0], &versions[1], &versions[3]]) {
        exported(&rig, &id(point), version);
    }
    // The pass that was given up had the number of the new one: its files, put back from a copy, are not taken for that.
    thirds().for_each(|path| fs::remove_file(path).unwrap());
    old.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
    assert_eq!(sound(&rig), [false, false, true]);
    command(&rig, &["failover", MACHINE, "--to", &second]).fails(1, &["this is another pass than the one"]);
}

/// What a tracker tells is all that differs only where nobody else had the disk meanwhile, and where the source is the disk that
/// the tracker speaks of.
#[test]
fn ranges_are_not_relied_on_where_somebody_else_had_the_disk() {
    require_root!();
    let size = 48 << 20;
    let mut rig = Rig::new(&[size]);
    let source = rig.random("source.img", size);
    rig.send(&[("d0", &source)], &[]).ok();
    command(&rig, &["failover", MACHINE, "--to", "latest"]).ok();
    // No place of the sample.
    flip(rig.targets[0].backing(), (20 << 20) + 5);
    command(&rig, &["failover", MACHINE, "--undo"]).ok();
    let hints = rig.path("hints");
    let given = format!("d0={}", hints.display());
    let set_aside = |rig: &Rig, source: &Path, ranges: &str, more: &[&str]| {
        fs::write(&hints, ranges).unwrap();
        let sent = rig.send(&[("d0", source)], &[&["--changed-ranges", &given], more].concat()).ok();
        assert!(sent.stderr.contains("--changed-ranges is set aside"), "{sent:#?}");
        assert_equal(source, rig.targets[0].backing());
    };
    set_aside(&rig, &source, "[]", &[]);
    // An image has no identity by which it would show.
    let another = rig.random("another.img", size);
    set_aside(&rig, &another, "0 4096", &["--another-disk"]);
    fs::write(&hints, "[]").unwrap();
    let sent = rig.send(&[("d0", &another)], &["--changed-ranges", &given]).ok();
    assert!(!sent.stderr.contains("set aside"), "{sent:#?}");
    // Points and journals were given up by hand: nothing says any more at which of them the disk stands.
    rig.service.process().kill();
    let retention = PathBuf::from(rig.service.state_dir()).join("retention");
    fs::remove_file(retention.join("points.log")).unwrap();
    fs::remove_dir_all(retention.join("journals")).unwrap();
    rig.service.spawn();
    set_aside(&rig, &another, "[]", &[]);
}

/// Somebody wrote to a released disk: neither taken back nor exported as though nobody had.
#[test]
fn writes_to_a_released_disk_are_noticed() {
    require_root!();
    let mut dice = Dice::seed_from_u64(8);
    let (rig, source, versions) = with_versions(3, &mut dice);
    let target = rig.targets[0].backing().to_owned();
    let byte = |at: u64| flip(&target, at);
    let dir = rig.path("out");
    fs::create_dir(&dir).unwrap();
    // As far as one can go back, everything that was brought back is compared; the disk is no larger than what is sampled.
    for to in [id(&points(&rig)[0]), "latest".to_owned()] {
        let version = if to == "latest" { &versions[2] } else { &versions[0] };
        command(&rig, &["failover", MACHINE, "--to", &to]).ok();
        for at in [3, SIZE / 2, SIZE - 1] {
            byte(at);
            let undo = command(&rig, &["failover", MACHINE, "--undo"]);
            undo.fails(3, &["was written to since it was released", "--give-up"]);
            let export = command(&rig, &["export", "web01@latest", "--dir", dir.to_str().unwrap()]);
            export.fails(3, &["was written to since it was released"]);
            assert_eq!(sound(&rig), [false, false, false]);
            byte(at);
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        exported(&rig, &id(&points(&rig)[1]), &versions[1]);
        assert_equal(version, &target);
        let undone = command(&rig, &["failover", MACHINE, "--undo"]).ok();
        assert!(undone.stdout.contains("was not looked at"), "{}", undone.stdout);
        assert_equal(&versions[2], &target);
    }
    command(&rig, &["failover", MACHINE, "--to", "latest"]).ok();
    byte(77);
    command(&rig, &["check", MACHINE, "--give-up"]).ok();
    assert_eq!(points(&rig).len(), 0);
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, &target);
}

/// An interrupted failover is told by the log, and goes on; nothing is received meanwhile.
#[test]
fn an_interrupted_failover_goes_on_or_is_taken_back() {
    require_root!();
    let mut dice = Dice::seed_from_u64(9);
    let (mut rig, source, versions) = with_versions(3, &mut dice);
    let first = id(&points(&rig)[0]);
    let mut in_the_middle = 0;
    for round in 0..60 {
        // The moment is not met each time.
        if round >= 6 && in_the_middle > 0 {
            break;
        }
        let mut failover = std::process::Command::new(env!("CARGO_BIN_EXE_mt-agent"));
        failover.args(["failover", MACHINE, "--to", &first, "--config", &rig.service.config()]);
        let mut process = rig.spawn(failover);
        let config = rig.service.config();
        let begun = || {
            let list = run(&["points", MACHINE, "--json", "--config", &config]).ok().json();
            (list["begun"]["point"] == first, list["released"].is_object())
        };
        let log = PathBuf::from(rig.service.state_dir()).join("retention/points.log");
        // Not by a command: it would miss the moment.
        wait_for("its beginning", || {
            let text = fs::read_to_string(&log).unwrap();
            (text.lines().last().unwrap().contains("\"record\":\"begun\"") || begun().1).then_some(())
        });
        std::thread::sleep(Duration::from_millis(3 * (round % 6)));
        process.kill();
        let (interrupted, released) = begun();
        assert!(interrupted != released);
        if interrupted {
            in_the_middle += 1;
            let listed = command(&rig, &["points", MACHINE]).ok();
            assert!(listed.stdout.contains("began at"), "{}", listed.stdout);
            rig.send(&[("d0", &source)], &[]).fails(3, &["is not done", "--to or --undo"]);
        }
        match round % 3 {
            0 if interrupted => drop(command(&rig, &["failover", MACHINE, "--to", &first]).ok()),
            1 => {
                rig.service.process().kill();
                rig.service.spawn();
                wait_for("the failover", || begun().1.then_some(()));
            }
            _ => {}
        }
        if begun().1 {
            assert_equal(&versions[0], rig.targets[0].backing());
        }
        command(&rig, &["failover", MACHINE, "--undo"]).ok();
        assert_equal(&versions[2], rig.targets[0].backing());
    }
    assert!(in_the_middle > 0);
    // The same of its undoing, which is not held against what it wrote itself.
    in_the_middle = 0;
    for round in 0..60 {
        // The moment is not met each time.
        if round >= 6 && in_the_middle > 0 {
            break;
        }
        command(&rig, &["failover", MACHINE, "--to", &first]).ok();
        let mut undo = std::process::Command::new(env!("CARGO_BIN_EXE_mt-agent"));
        undo.args(["failover", MACHINE, "--undo", "--config", &rig.service.config()]);
        let mut process = rig.spawn(undo);
        let log = PathBuf::from(rig.service.state_dir()).join("retention/points.log");
        let last = || fs::read_to_string(&log).unwrap().lines().last().unwrap().to_owned();
        wait_for("its beginning", || (!last().contains("\"record\":\"released\"")).then_some(()));
        std::thread::sleep(Duration::from_millis(2 * (round % 6)));
        process.kill();
        let interrupted = last().contains("\"record\":\"begun\"");
        in_the_middle += u32::from(interrupted);
        exported(&rig, "latest", &versions[2]);
        exported(&rig, &first, &versions[0]);
        if interrupted && round % 2 == 0 {
            command(&rig, &["failover", MACHINE, "--undo"]).ok();
        } else if interrupted {
            rig.service.process().kill();
            rig.service.spawn();
            wait_for("the undoing", || last().contains("\"record\":\"taken-back\"").then_some(()));
        }
        assert_equal(&versions[2], rig.targets[0].backing());
        assert_eq!(sound(&rig), [true, true, true]);
    }
    assert!(in_the_middle > 0);
    rig.send(&[("d0", &source)], &[]).ok();
}

/// The files of two disks were exchanged: nothing is read through them, written beside them or removed.
#[test]
fn journals_that_were_exchanged_are_noticed() {
    require_root!();
    let rig = Rig::new(&[SIZE, SIZE]);
    let sources = [rig.random("a.img", SIZE), rig.random("b.img", SIZE)];
    let disks: [(&str, &Path); 2] = [("d0", &sources[0]), ("d1", &sources[1])];
    let mut dice = Dice::seed_from_u64(10);
    for _ in 0..3 {
        sources.iter().for_each(|source| change(source, &mut dice));
        rig.send(&disks, &[]).ok();
    }
    let (a, b) = (journal(&rig, "d0"), journal(&rig, "d1"));
    let exchange = |a: &Path, b: &Path| {
        let aside = a.with_extension("aside");
        fs::rename(a, &aside).unwrap();
        fs::rename(b, a).unwrap();
        fs::rename(aside, b).unwrap();
    };
    let names = [segments(&a), segments(&b)];
    let one = [names[0][0].clone(), b.join(names[0][0].file_name().unwrap())];
    let out = rig.path("out");
    fs::create_dir(&out).unwrap();
    for [a, b] in [[a.clone(), b.clone()], one] {
        exchange(&a, &b);
        let first = id(&points(&rig)[0]);
        for to in ["latest", &first] {
            command(&rig, &["failover", MACHINE, "--to", to])
                .fails(1, &["belongs to the journal of another disk"]);
            let what = format!("{MACHINE}@{to}");
            let export = command(&rig, &["export", &what, "--dir", out.to_str().unwrap()]);
            export.fails(1, &["belongs to the journal of another disk", "put each of them back"]);
        }
        assert_eq!(sound(&rig), [false, false, false]);
        rig.send(&disks, &[]).fails(3, &["belongs to the journal of another disk"]);
        exchange(&a, &b);
        assert_eq!([segments(&journal(&rig, "d0")), segments(&journal(&rig, "d1"))], names);
    }
    assert_eq!(sound(&rig), [true, true, true]);
    rig.send(&disks, &[]).ok();
    // And none is missing where they are.
    let log = PathBuf::from(rig.service.state_dir()).join("retention/points.log");
    let text = fs::read(&log).unwrap();
    for harm in [None, Some(&b""[..])] {
        match harm {
            None => fs::remove_file(&log).unwrap(),
            Some(bytes) => fs::write(&log, bytes).unwrap(),
        }
        command(&rig, &["points", MACHINE]).fails(1, &["points.log", "put back a sound copy"]);
        command(&rig, &["failover", MACHINE, "--to", "latest"]).fails(1, &["put back a sound copy"]);
        assert_eq!(fs::read(&log).ok().as_deref(), harm);
    }
    fs::write(&log, text).unwrap();
    assert_eq!(sound(&rig), [true, true, true, true]);
}

/// The newest point lacks a disk: the refusal names the one to take. And an export leaves all images or nothing.
#[test]
fn what_is_refused_names_what_would_do_and_leaves_nothing() {
    require_root!();
    let rig = Rig::new(&[SIZE, SIZE]);
    let sources = [rig.random("a.img", SIZE), rig.random("b.img", SIZE)];
    let disks: [(&str, &Path); 2] = [("d0", &sources[0]), ("d1", &sources[1])];
    rig.send(&disks, &[]).ok();
    rig.send(&disks[..1], &[]).ok();
    let whole = id(&points(&rig)[0]);
    let named = format!("give {whole} in its place");
    command(&rig, &["failover", MACHINE, "--to", "latest"]).fails(3, &["has no disk d1", &named]);
    let latest = format!("{MACHINE}@latest");
    command(&rig, &["digest", &latest]).fails(3, &["has no disk d1", &named]);
    let unknown = command(&rig, &["failover", MACHINE, "--to", "2001-01-01T00:00:00Z"]);
    let unknown = unknown.fails(3, &["mt-agent points"]);
    assert_eq!(unknown.stderr.matches("mt-agent points").count(), 1, "{}", unknown.stderr);
    let what = format!("{MACHINE}@{whole}");
    let out = rig.path("out");
    let export = || command(&rig, &["export", &what, "--dir", out.to_str().unwrap()]);
    export().fails(3, &["is no directory"]);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("d1.img"), "mine").unwrap();
    export().fails(3, &["d1.img exists"]);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    assert_eq!(fs::read(out.join("d1.img")).unwrap(), b"mine");
    fs::remove_file(out.join("d1.img")).unwrap();
    // One that fails on the way.
    support::tool("mount", &["-t", "tmpfs", "-o", "size=20m", "none", out.to_str().unwrap()]);
    let full = export();
    let left = fs::read_dir(&out).unwrap().count();
    support::tool("umount", &[out.to_str().unwrap()]);
    full.fails(1, &["No space left on device"]);
    assert_eq!(left, 0);
    export().ok();
    assert_equal(&sources[1], &out.join("d1.img"));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2);
}

/// A disk that is taken away is nobody's: its points go with it, and the machine begins anew.
#[test]
fn points_go_with_their_disks() {
    require_root!();
    let mut dice = Dice::seed_from_u64(5);
    let (rig, source, _) = with_versions(2, &mut dice);
    command(&rig, &["failover", MACHINE, "--to", &id(&points(&rig)[0])]).ok();
    command(&rig, &["protect", "remove", MACHINE, "--disk", "d0"]).fails(3, &["is failed over", "--undo"]);
    let removed = command(&rig, &["protect", "remove", MACHINE]).ok();
    assert!(removed.stdout.contains("2 recovery points are given up"), "{removed:#?}");
    support::write_random(rig.targets[0].backing(), 0, SIZE);
    rig.service.protect_add(MACHINE, "d0", &rig.targets[0]).ok();
    assert_eq!(points(&rig).len(), 0);
    command(&rig, &["failover", MACHINE, "--to", "latest"]).fails(3, &["has no points"]);
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
    assert_eq!(points(&rig).len(), 1);
    // So they do where nothing tells any more which disks these were.
    let retention = PathBuf::from(rig.service.state_dir()).join("retention");
    fs::write(retention.join("machines").join(format!("{MACHINE}.toml")), "machine = ").unwrap();
    let removed = command(&rig, &["protect", "remove", MACHINE]).ok();
    for said in ["could not be read, is removed", "1 recovery points are given up"] {
        assert!(removed.stdout.contains(said), "{removed:#?}");
    }
    rig.service.protect_add(MACHINE, "d0", &rig.targets[0]).ok();
    assert_eq!(points(&rig).len(), 0);
}

/// Another installation, given the retention directory and the disks, knows the machines and points, and carries on.
#[test]
fn the_house_can_be_moved() {
    require_root!();
    let mut dice = Dice::seed_from_u64(4);
    let (mut rig, source, versions) = with_versions(3, &mut dice);
    rig.service.process().signal(Signal::SIGTERM);
    rig.service.process().wait_within(PATIENCE);
    let dir = directory();
    let (from, to) = (PathBuf::from(rig.service.state_dir()).join("retention"), dir.path().join("retention"));
    support::tool("cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
    let elsewhere = Service::start(dir.path(), &["--retention", to.to_str().unwrap()]);
    let list = run(&["points", MACHINE, "--json", "--retention", to.to_str().unwrap()]).ok().json();
    let moved = list["points"].as_array().unwrap().clone();
    assert_eq!(moved, points(&rig));
    // The machine enrols with the new service, and its next pass is a delta.
    let client = dir.path().join("client");
    elsewhere.enroll(MACHINE, &client);
    change(&source, &mut dice);
    let (at, state) = (elsewhere.address().to_string(), client.to_str().unwrap().to_owned());
    let disk = format!("d0={}", source.display());
    run(&["send", "--machine", MACHINE, "--to", &at, "--state-dir", &state, "--disk", &disk]).ok();
    assert_equal(&source, rig.targets[0].backing());
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    let (what, retention) = (format!("{MACHINE}@{}", id(&moved[0])), to.to_str().unwrap());
    run(&["export", &what, "--dir", out.to_str().unwrap(), "--retention", retention]).ok();
    assert_equal(&versions[0], &out.join("d0.img"));
}

/// A point of two disks is there on both or on none.
#[test]
fn a_point_of_two_disks_is_there_on_both_or_on_none() {
    require_root!();
    let mut rig = Rig::new(&[SIZE, SIZE]);
    let sources = [rig.random("a.img", SIZE), rig.random("b.img", SIZE)];
    let disks: [(&str, &Path); 2] = [("d0", &sources[0]), ("d1", &sources[1])];
    rig.send(&disks, &[]).ok();
    let first = points(&rig);
    assert_eq!((first.len(), first[0]["disks"].as_array().unwrap().len()), (1, 2));
    let old = sources.clone().map(|source| {
        let copy = source.with_extension("old");
        fs::copy(&source, &copy).unwrap();
        copy
    });
    // The second disk fails when the first has arrived long ago.
    support::write_random(&sources[0], 0, 64 * KIB);
    support::write_random(&sources[1], 0, SIZE);
    let send = rig.start(&disks, &["--bwlimit", "8M", "--compression", "off"]);
    wait_for("the second disk's pass", || {
        let volume = rig.service.volume(MACHINE, "d1");
        (volume.phase == "receiving" && volume.received_bytes > Some(2 * MIB)).then_some(())
    });
    rig.targets[1].set_read_only(true);
    send.finish().fails(1, &["d1: "]);
    assert_eq!(points(&rig).len(), 1);
    rig.targets[1].set_read_only(false);
    wait_for("the end of the sessions", || (rig.service.status().service.sessions == 0).then_some(()));
    rig.service.process().kill();
    command(&rig, &["failover", MACHINE, "--to", "latest"]).ok();
    assert_equal(&old[0], rig.targets[0].backing());
    assert_equal(&old[1], rig.targets[1].backing());
}

#[test]
fn retention_on_the_root_file_system_must_be_allowed() {
    require_root!();
    let dir = directory();
    let on_root = tempfile::Builder::new().prefix(".mt-agent-test-").tempdir_in("/").unwrap();
    let (state, socket) = (dir.path().join("state"), dir.path().join("control"));
    let mut args = vec!["serve", "--listen", "127.0.0.1:0", "--state-dir", state.to_str().unwrap()];
    args.extend([
        "--control-socket",
        socket.to_str().unwrap(),
        "--retention",
        on_root.path().to_str().unwrap(),
    ]);
    run(&args).fails(3, &["is on the root file system", "allow_root_retention"]);
}

/// Where the file system of the retention is full, the pass waits, says so on both sides, and goes on.
#[test]
fn a_pass_without_room_waits_and_goes_on() {
    require_root!();
    let dir = directory();
    let retention = dir.path().join("retention");
    fs::create_dir(&retention).unwrap();
    support::tool("mount", &["-t", "tmpfs", "-o", "size=6m", "none", retention.to_str().unwrap()]);
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    }
    let service = Service::start(dir.path(), &["--retention", retention.to_str().unwrap()]);
    let target = Loop::create(&dir.path().join("d0.img"), SIZE);
    let config = service.config();
    let disk = format!("d0={}", target.id());
    let place = ["--config", &config, "--retention", retention.to_str().unwrap()];
    run(&[&["protect", "add", MACHINE, "--overwrite", "--disk", &disk][..], &place].concat()).ok();
    let mut rig = Rig::assemble(dir, service, Vec::new());
    rig.targets.push(target);
    rig.mounts = vec![Box::new(Unmount(retention.clone()))];
    let source = rig.random("source.img", SIZE);
    rig.send(&[("d0", &source)], &[]).ok();
    let old = rig.path("old.img");
    fs::copy(&source, &old).unwrap();
    support::write_random(&source, 0, SIZE);
    let send = rig.start(&[("d0", &source)], &["--compression", "off"]);
    wait_for("a pass without room", || (rig.service.volume(MACHINE, "d0").phase == "paused").then_some(()));
    wait_for("the sender's word of it", || {
        send.stderr().contains("the pass waits until there is room").then_some(())
    });
    rig.service.wait_for_log("a pass waits for room");
    support::tool("mount", &["-o", "remount,size=64m", "none", retention.to_str().unwrap()]);
    send.finish().ok();
    assert_equal(&source, rig.targets[0].backing());
    // Nor does going back wait for room for ever.
    let tight = run(&[&["points", MACHINE, "--json"][..], &place].concat()).ok().json();
    if tight["points"].as_array().unwrap().len() == 2 {
        rig.service.process().kill();
        let stat = nix::sys::statvfs::statvfs(&retention).unwrap();
        let used = (stat.blocks() - stat.blocks_free()) * stat.fragment_size();
        let room = format!("remount,size={}k", (used + 3 * MIB) / KIB);
        support::tool("mount", &["-o", &room, "none", retention.to_str().unwrap()]);
        let first = id(&tight["points"][0]);
        run(&[&["failover", MACHINE, "--to", &first][..], &place].concat()).fails(3, &["has no room"]);
        support::tool("mount", &["-o", "remount,size=64m", "none", retention.to_str().unwrap()]);
        run(&[&["failover", MACHINE, "--to", "latest"][..], &place].concat()).ok();
        assert_equal(&source, rig.targets[0].backing());
        run(&[&["failover", MACHINE, "--undo"][..], &place].concat()).ok();
    }
    let out = rig.path("out");
    fs::create_dir(&out).unwrap();
    let list = run(&[&["points", MACHINE, "--json"][..], &place].concat()).ok().json();
    // Little room was left: the first point may have been let go once the pass was done.
    if let [first, _] = list["points"].as_array().unwrap().as_slice() {
        let what = format!("{MACHINE}@{}", id(first));
        run(&[&["export", &what, "--dir", out.to_str().unwrap()][..], &place].concat()).ok();
        assert_equal(&old, &out.join("d0.img"));
    }
}
