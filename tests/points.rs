//! The points log where the kernel says no, and `mt-agent points`.

mod support;

use std::path::Path;
use std::process::Command;
use std::thread;

use mt_agent::name::Name;
use mt_agent::pass::{Lineage, PassId};
use mt_agent::points::{Dropped, Error, Kind, Log, Point, PointId, Reason, Record, Released, VolumeAt};
use serde_json::{Value, json};
use support::Tmpfs;
use time::OffsetDateTime;
use time::macros::datetime;

const NOON: OffsetDateTime = datetime!(2026-03-01 12:00 UTC);

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn point(id: u128, volumes: &[(&str, &str, u64)]) -> Point {
    let at = |&(machine, disk, bytes): &(&str, &str, u64)| VolumeAt {
        machine: name(machine),
        disk: name(disk),
        id: format!("loop:/images/{machine}.{disk}").parse().unwrap(),
        lineage: Lineage(5),
        pass: id as u64,
        sender_pass: PassId(id),
        bytes,
    };
    Point {
        id: PointId(id),
        time: NOON + time::Duration::minutes(id as i64),
        recorded: NOON + time::Duration::minutes(id as i64 + 1),
        kind: Kind::Crash,
        fuzzy: false,
        name: None,
        group: None,
        volumes: volumes.iter().map(at).collect(),
    }
}

fn ids(log: &Log) -> Vec<u128> {
    log.points(&name("web01")).map(|point| point.id.0).collect()
}

#[test]
fn after_a_failed_write_or_flush_the_log_takes_nothing_until_it_is_opened_again() {
    let record = |id| Record::Point(point(id, &[("web01", "root", 0)]));
    for (call, op) in [(libc::SYS_pwrite64, "append to"), (libc::SYS_fdatasync, "flush")] {
        let dir = support::directory();
        let mut log = Log::open(dir.path()).unwrap();
        log.append(record(1)).unwrap();
        let (result, mut log) = thread::scope(|scope| {
            let failing = scope.spawn(move || {
                support::seccomp::fail_in_this_thread(call, libc::EIO);
                (log.append(record(2)), log)
            });
            failing.join().unwrap()
        });
        let Err(Error::Io(error)) = result else { panic!("{result:?}") };
        assert_eq!((error.op, error.source.raw_os_error()), (op, Some(libc::EIO)));
        // The kernel would say yes again.
        assert!(matches!(log.append(record(3)), Err(Error::Latched { .. })));
        assert!(matches!(log.settle(), Err(Error::Latched { .. })));
        assert_eq!(ids(&log), [1]);
        let mut log = Log::open(dir.path()).unwrap();
        assert_eq!(ids(&log), [1], "what failed to be flushed was left where a reader finds it");
        log.append(record(4)).unwrap();
        assert_eq!(ids(&Log::open(dir.path()).unwrap()), [1, 4]);
    }
}

#[test]
fn a_log_that_cannot_be_settled_takes_nothing() {
    let dir = support::directory();
    let record = |id| Record::Point(point(id, &[("web01", "root", 0)]));
    Log::open(dir.path()).unwrap().append(record(1)).unwrap();
    let mut log = Log::open(dir.path()).unwrap();
    let (result, mut log) = thread::scope(|scope| {
        let failing = scope.spawn(move || {
            // Of the file and of its directory.
            support::seccomp::fail_in_this_thread(libc::SYS_fsync, libc::EIO);
            (log.append(record(2)), log)
        });
        failing.join().unwrap()
    });
    let Err(Error::Io(error)) = result else { panic!("{result:?}") };
    assert_eq!((error.op, error.source.raw_os_error()), ("flush", Some(libc::EIO)));
    assert!(matches!(log.append(record(2)), Err(Error::Latched { .. })));
    let mut log = Log::open(dir.path()).unwrap();
    log.append(record(2)).unwrap();
    assert_eq!(ids(&log), [1, 2]);
}

#[test]
fn a_full_file_system_has_room_to_drop_points_and_latches_when_it_is_gone() {
    require_root!();
    let dir = support::directory();
    let dir = dir.path().join("retention");
    let _mounted = Tmpfs::mount(&dir, 512 * support::KIB);
    let record = |id| Record::Point(point(id, &[("web01", "root", 0)]));
    let dropped =
        |id| Record::Dropped(Dropped { time: NOON, reason: Reason::Space, points: vec![PointId(id)] });
    let mut log = Log::open(&dir).unwrap();
    for id in 1..=100 {
        log.append(record(id)).unwrap();
    }
    let filler = Tmpfs::fill(&dir);
    // Also for a service that was started just now.
    log.append(dropped(1)).unwrap();
    Log::open(&dir).unwrap().append(dropped(2)).unwrap();
    let mut acknowledged = 100;
    let error = loop {
        match log.append(record(acknowledged + 1)) {
            Ok(()) => acknowledged += 1,
            Err(error) => break error,
        }
    };
    assert!(acknowledged > 150, "{acknowledged}");
    let Error::Io(error) = error else { panic!("{error:?}") };
    assert_eq!((error.op, error.source.kind()), ("append to", std::io::ErrorKind::StorageFull));
    let whole: Vec<u128> = (3..=acknowledged).collect();
    assert_eq!(ids(&log), whole);
    // Latched, although there is room again.
    std::fs::remove_file(filler).unwrap();
    for again in [log.append(record(10_000)), log.settle()] {
        assert!(matches!(again, Err(Error::Latched { .. })), "{again:?}");
    }
    let mut log = Log::open(&dir).unwrap();
    assert_eq!(ids(&log), whole);
    log.append(record(10_000)).unwrap();
    assert_eq!(ids(&Log::open(&dir).unwrap()), [whole, vec![10_000]].concat());
}

fn points(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let config = dir.join("mt-agent.toml");
    std::fs::write(&config, "").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mt-agent"));
    command.arg("points").args(args).arg("--config").arg(config).arg("--retention").arg(dir);
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// Assigns the disks `root` and `data` to a machine, as `protect add` writes it.
fn protect(dir: &Path, machine: &str) {
    let disk = |disk: &str| {
        format!(
            "[[disk]]\nname = \"{disk}\"\nid = \"loop:/images/{machine}.{disk}\"\nsize = 1048576\n\
             logical_sector = 512\noverwrite = false\nassigned_at = \"2026-03-01T10:00:00Z\"\nstate = \"empty\"\n"
        )
    };
    let head = format!("schema_version = 1\nmachine = \"{machine}\"\ncreated = \"2026-03-01T10:00:00Z\"\n");
    std::fs::create_dir_all(dir.join("machines")).unwrap();
    let file = dir.join(format!("machines/{machine}.toml"));
    std::fs::write(file, head + &disk("root") + &disk("data")).unwrap();
}

#[test]
fn points_are_listed_oldest_first_with_what_they_are_worth() {
    let dir = support::directory();
    let dir = dir.path();
    protect(dir, "web01");
    let mut log = Log::open(dir).unwrap();
    let first = point(1, &[("web01", "root", 0)]);
    let second = point(2, &[("web01", "root", 4096), ("web01", "data", 1 << 20), ("db01", "root", 1 << 30)]);
    let second = Point { kind: Kind::Application, group: Some(name("shop")), ..second };
    let third = point(3, &[("web01", "data", 512), ("web01", "root", 512)]);
    let third = Point { fuzzy: true, name: Some(name("before-upgrade")), ..third };
    for record in [
        Record::Point(point(9, &[("web01", "root", 0)])),
        Record::Dropped(Dropped { time: NOON, reason: Reason::Initial, points: vec![PointId(9)] }),
        Record::Point(first),
        Record::Point(second),
        Record::Point(third),
    ] {
        log.append(record).unwrap();
    }
    let (code, out, err) = points(dir, &["web01"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "ID                                TIME                  KIND          NAME            SIZE     COMPLETE\n\
         00000000000000000000000000000001  2026-03-01T12:01:00Z  crash         -               0 B      no\n\
         00000000000000000000000000000002  2026-03-01T12:02:00Z  application   -               1.0 MiB  yes\n\
         00000000000000000000000000000003  2026-03-01T12:03:00Z  crash, fuzzy  before-upgrade  1.0 KiB  yes\n"
    );
    // No protection: every disk that it has at some point counts.
    let (code, out, _) = points(dir, &["db01"]);
    assert_eq!(code, 0);
    assert!(out.ends_with(
        "00000000000000000000000000000002  2026-03-01T12:02:00Z  application  -     1.0 GiB  yes\n"
    ));

    let disks = Vec::new();
    let released = Released { machine: name("web01"), point: PointId(3), time: NOON, disks };
    log.append(Record::Released(released)).unwrap();
    let (_, out, _) = points(dir, &["web01"]);
    let last =
        "machine web01 was failed over to point 00000000000000000000000000000003 at 2026-03-01T12:00:00Z";
    assert_eq!(out.lines().last(), Some(last));
    let (code, out, err) = points(dir, &["web01", "--json"]);
    assert_eq!((code, err.as_str()), (0, ""));
    let listed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(listed["released"], json!({ "point": format!("{:032x}", 3), "time": "2026-03-01T12:00:00Z" }));
    assert_eq!((&listed["schema_version"], &listed["machine"]), (&json!(1), &json!("web01")));
    assert_eq!(listed["points"].as_array().unwrap().len(), 3);
    assert_eq!(
        listed["points"][1],
        json!({
            "id": "00000000000000000000000000000002",
            "time": "2026-03-01T12:02:00Z",
            "recorded": "2026-03-01T12:03:00Z",
            "kind": "application",
            "fuzzy": false,
            "name": null,
            "group": "shop",
            "size": (1 << 20) + 4096,
            "complete": true,
            "disks": [
                {
                    "name": "root",
                    "id": "loop:/images/web01.root",
                    "pass": 2,
                    "sender_pass": "00000000000000000000000000000002",
                    "size": 4096,
                },
                {
                    "name": "data",
                    "id": "loop:/images/web01.data",
                    "pass": 2,
                    "sender_pass": "00000000000000000000000000000002",
                    "size": 1 << 20,
                },
            ],
        })
    );
}

#[test]
fn a_machine_without_points_says_so_and_one_that_there_is_not_is_refused() {
    let dir = support::directory();
    let dir = dir.path();
    protect(dir, "web01");
    let (code, out, _) = points(dir, &["web01"]);
    assert_eq!((code, out.as_str()), (0, "machine web01 has no recovery points\n"));
    let (code, out, _) = points(dir, &["web01", "--json"]);
    let listed: Value = serde_json::from_str(&out).unwrap();
    let nothing =
        json!({ "schema_version": 1, "machine": "web01", "released": null, "begun": null, "points": [] });
    assert_eq!((code, listed), (0, nothing));
    let (code, out, err) = points(dir, &["web02"]);
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(err.contains("no disk is assigned to machine web02"), "{err}");
    let (code, ..) = points(dir, &[]);
    assert_eq!(code, 2);
    // Nothing was created.
    assert!(!dir.join("points.log").exists());
    // A target disk that was exchanged is another disk.
    Log::open(dir)
        .unwrap()
        .append(Record::Point(point(1, &[("web01", "root", 0), ("web01", "data", 0)])))
        .unwrap();
    assert!(points(dir, &["web01"]).1.ends_with("  yes\n"));
    let file = dir.join("machines/web01.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("loop:/images/web01.data", "loop:/images/other")).unwrap();
    assert!(points(dir, &["web01"]).1.ends_with("  no\n"));
    // A protection that cannot be read keeps nobody from the points.
    std::fs::write(&file, "nonsense").unwrap();
    let (code, out, err) = points(dir, &["web01"]);
    assert!(code == 0 && out.ends_with("  yes\n") && err.contains("told by the points alone"), "{out}{err}");
    // A damaged log is named, with what to do.
    std::fs::write(dir.join("points.log"), "x\ny\n").unwrap();
    let (code, out, err) = points(dir, &["web01"]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("points.log:1: ") && err.contains("put back a sound copy"), "{err}");
}
