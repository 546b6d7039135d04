use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::thread;

use proptest::prelude::*;
use time::macros::datetime;
use time::{Duration, OffsetDateTime};

use super::*;

const NOON: OffsetDateTime = datetime!(2026-03-01 12:00 UTC);

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn volume(machine: &str, disk: &str, pass: u64) -> VolumeAt {
    VolumeAt {
        machine: name(machine),
        disk: name(disk),
        id: format!("loop:/{machine}/{disk}").parse().unwrap(),
        lineage: Lineage(5),
        pass,
        sender_pass: PassId(u128::from(pass)),
        bytes: 4096 * pass,
    }
}

/// A point of a machine's disks `root` and `data`, `minutes` after noon.
fn point(id: u128, machine: &str, minutes: i64, pass: u64) -> Point {
    let time = NOON + Duration::minutes(minutes);
    Point {
        id: PointId(id),
        time,
        recorded: time + Duration::seconds(1),
        kind: Kind::Crash,
        fuzzy: false,
        name: None,
        group: None,
        volumes: vec![volume(machine, "root", pass), volume(machine, "data", pass)],
    }
}

fn dropped(ids: &[u128], reason: Reason) -> Record {
    Record::Dropped(Dropped { time: NOON, reason, points: ids.iter().copied().map(PointId).collect() })
}

fn released(machine: &str, id: u128) -> Record {
    let sample = Sample { head: 1, tail: 2, between: 3 };
    let disks = vec![ReleasedDisk { disk: name("root"), pass: Some(9), sample }];
    Record::Released(Released { machine: name(machine), point: PointId(id), time: NOON, disks })
}

fn given_up(machine: &str, ids: &[u128]) -> Record {
    let points = ids.iter().copied().map(PointId).collect();
    Record::GivenUp(GivenUp { machine: name(machine), time: NOON, points })
}

/// A point goes, but for these machines.
fn narrowed(id: u128, machines: &[&str]) -> Record {
    let machines = machines.iter().map(|machine| name(machine)).collect();
    Record::Narrowed(Narrowed { point: PointId(id), time: NOON, reason: Reason::Size, machines })
}

/// A point of the disks `root` of a group's machines.
fn group_point(id: u128, machines: &[&str], pass: u64) -> Record {
    let volumes = machines.iter().map(|machine| volume(machine, "root", pass)).collect();
    Record::Point(Point { group: Some(name("shop")), volumes, ..point(id, machines[0], id as i64, pass) })
}

/// A failover to a point begins, or its undoing.
fn begun(machine: &str, id: Option<u128>) -> Record {
    Record::Begun(Begun { machine: name(machine), point: id.map(PointId), time: NOON })
}

fn taken_back(machine: &str) -> Record {
    Record::TakenBack(TakenBack { machine: name(machine), time: NOON })
}

fn ids(log: &Log, machine: &str) -> Vec<u128> {
    log.points(&name(machine)).map(|point| point.id.0).collect()
}

/// A log with three points of two machines, one of which was dropped, and a machine that was failed over.
fn sample(dir: &Path) -> Log {
    let mut log = Log::open(dir).unwrap();
    for record in [
        Record::Point(point(1, "web01", 0, 1)),
        Record::Point(point(2, "web01", 10, 2)),
        Record::Point(point(3, "db01", 11, 1)),
        released("web01", 2),
        dropped(&[1], Reason::Age),
    ] {
        log.append(record).unwrap();
    }
    log
}

#[test]
fn what_was_appended_is_there_when_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let retention = dir.path().join("retention");
    let mut log = sample(&retention);
    for log in [&log, &Log::open(&retention).unwrap()] {
        assert_eq!((ids(log, "web01"), ids(log, "db01"), ids(log, "db")), (vec![2], vec![3], vec![]));
        assert_eq!(log.newest(&name("web01")), Some(&point(2, "web01", 10, 2)));
        let passes = |machine, disk| -> Vec<(u128, u64)> {
            log.volume(&name(machine), &name(disk)).map(|(point, at)| (point.id.0, at.pass)).collect()
        };
        assert_eq!((passes("web01", "data"), passes("db01", "root")), (vec![(2, 2)], vec![(3, 1)]));
        assert_eq!(passes("web01", "none"), []);
        assert_eq!(log.get(PointId(1)), None);
        assert_eq!(log.get(PointId(3)), Some(&point(3, "db01", 11, 1)));
        assert_eq!(log.released(&name("web01")).unwrap().point, PointId(2));
        assert_eq!(log.released(&name("db01")), None);
        assert_eq!(log.in_use().collect::<Vec<_>>(), [PointId(2)]);
        assert_eq!(log.history()[0].dropped, Some((NOON, Reason::Age)));
    }
    log.append(taken_back("web01")).unwrap();
    log.append(Record::Point(point(4, "web01", 20, 3))).unwrap();
    let log = Log::open(&retention).unwrap();
    assert_eq!((ids(&log, "web01"), log.released(&name("web01"))), (vec![2, 4], None));
    assert_eq!(log.at(&name("web01"), NOON), None);
    for (minutes, id) in [(10, 2), (19, 2), (20, 4), (1000, 4)] {
        let found = log.at(&name("web01"), NOON + Duration::minutes(minutes)).unwrap();
        assert_eq!(found.id, PointId(id), "{minutes} minutes after noon");
    }
    let mode = fs::metadata(retention.join(FILE_NAME)).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn reading_creates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path().join("none")).unwrap();
    log.refresh().unwrap();
    assert_eq!(log.history(), []);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn every_prefix_gives_exactly_the_points_whose_records_are_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path()).unwrap();
    let path = dir.path().join(FILE_NAME);
    let mut expected = Vec::new();
    for id in 1..=5 {
        log.append(Record::Point(point(id, "web01", 0, id as u64))).unwrap();
        expected.push((fs::metadata(&path).unwrap().len() as usize, ids(&log, "web01")));
    }
    log.append(dropped(&[1, 2], Reason::Size)).unwrap();
    expected.push((fs::metadata(&path).unwrap().len() as usize, ids(&log, "web01")));
    assert_eq!(expected.last().unwrap().1, [3, 4, 5]);
    let whole = fs::read(&path).unwrap();
    // The first line is there whole, or no file is.
    let head = line::head().len();
    for len in 0..head {
        fs::write(&path, &whole[..len]).unwrap();
        for result in
            [Log::open(dir.path()).map(drop), Log::open(dir.path()).and_then(|mut log| log.settle())]
        {
            assert!(matches!(result, Err(Error::Corrupt { line: 1, .. })), "cut to {len} bytes: {result:?}");
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), len as u64);
    }
    for len in head..=whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        let points = expected.iter().rfind(|(end, _)| *end <= len).map_or(vec![], |(_, ids)| ids.clone());
        let mut log = Log::open(dir.path()).unwrap();
        assert_eq!(ids(&log, "web01"), points, "cut to {len} bytes");
        // And it goes on from there: the part is cut off and in nobody's way. (Each costs its flushes.)
        if len % 16 != 0 && !expected.iter().any(|(end, _)| end.abs_diff(len) < 3) {
            continue;
        }
        let next =
            Record::Point(Point { volumes: vec![volume("web01", "root", 99)], ..point(99, "web01", 0, 99) });
        let line = line::encode(&next).unwrap();
        log.append(next).unwrap();
        assert!(
            fs::read(&path).unwrap().ends_with(&line),
            "something is left of what was cut to {len} bytes"
        );
        let again = ids(&Log::open(dir.path()).unwrap(), "web01");
        assert_eq!(again, [points, vec![99]].concat(), "cut to {len} bytes");
    }
}

#[test]
fn any_flipped_bit_is_found_also_in_the_last_line() {
    let dir = tempfile::tempdir().unwrap();
    let log = sample(dir.path());
    let path = dir.path().join(FILE_NAME);
    let whole = fs::read(&path).unwrap();
    let last = whole[..whole.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
    // Not written anew each time: ext4 flushes a file that was emptied and written.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for at in 0..whole.len() {
        // All of them where lines meet; elsewhere one of each byte will do.
        let bits = if whole[at] == b'\n' || at.saturating_sub(last) < 10 { 0..8 } else { at % 8..at % 8 + 1 };
        for bit in bits {
            file.write_all_at(&[whole[at] ^ 1 << bit], at as u64).unwrap();
            match Log::open(dir.path()) {
                Err(Error::Corrupt { file, line, .. }) => {
                    let expected = 1 + whole[..at].iter().filter(|&&byte| byte == b'\n').count();
                    assert_eq!((&file, line), (&path, expected), "bit {bit} of byte {at}");
                }
                other => panic!("bit {bit} of byte {at}: {other:?}"),
            }
        }
        file.write_all_at(&whole[at..=at], at as u64).unwrap();
    }
    assert_eq!(Log::open(dir.path()).unwrap().history(), log.history());
}

/// The file got its length, and not its content: that leaves sectors of zeros.
#[test]
fn a_last_line_that_lacks_a_sector_was_being_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let mut log = sample(dir.path());
    let before = fs::read(&path).unwrap();
    let many = (0..40).map(|disk| volume("db01", &disk.to_string(), 9)).collect();
    log.append(Record::Point(Point { volumes: many, ..point(9, "db01", 30, 9) })).unwrap();
    let whole = fs::read(&path).unwrap();
    let mut torn = 0;
    for sector in (before.len() - before.len() % 512..whole.len()).step_by(512) {
        let mut bytes = whole.clone();
        let range = sector.max(before.len())..(sector + 512).min(whole.len());
        bytes[range].fill(0);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(ids(&Log::open(dir.path()).unwrap(), "db01"), [3], "without the sector at {sector}");
        torn += 1;
    }
    assert!(torn > 10, "{torn}");
    // A few zeros are no sector.
    let mut bytes = whole.clone();
    bytes[before.len() + 600..before.len() + 700].fill(0);
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(Log::open(dir.path()), Err(Error::Corrupt { line: 7, .. })));
}

#[test]
fn no_log_where_there_are_journals_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join(JOURNALS)).unwrap();
    let error = Log::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert!(error.to_string().contains("put back a sound copy, or move `journals` away too"), "{error}");
    assert!(!dir.path().join(FILE_NAME).exists());
    fs::remove_dir(dir.path().join(JOURNALS)).unwrap();
    Log::open(dir.path()).unwrap().settle().unwrap();
    // From then on it is there.
    fs::create_dir(dir.path().join(JOURNALS)).unwrap();
    Log::open(dir.path()).unwrap();
}

#[test]
fn what_begins_keeps_the_disks_until_it_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = sample(dir.path());
    log.append(taken_back("web01")).unwrap();
    log.append(Record::Point(point(4, "web01", 20, 3))).unwrap();
    log.append(begun("web01", Some(2))).unwrap();
    let refused = |log: &mut Log, record: Record| match log.append(record) {
        Err(Error::Refused(refused)) => refused,
        other => panic!("{other:?}"),
    };
    for log in [&mut log, &mut Log::open(dir.path()).unwrap()] {
        assert_eq!(log.all_begun().map(|begun| begun.point).collect::<Vec<_>>(), [Some(PointId(2))]);
        let five = Record::Point(point(5, "web01", 30, 4));
        assert!(matches!(refused(log, five), Refused::Begun(_)));
        assert!(matches!(refused(log, dropped(&[2], Reason::Age)), Refused::Released { .. }));
        assert_eq!(log.in_use().collect::<Vec<_>>(), [PointId(2)]);
    }
    // To another point; and done.
    log.append(begun("web01", Some(4))).unwrap();
    log.append(released("web01", 4)).unwrap();
    assert!(log.begun(&name("web01")).is_none());
    assert!(matches!(refused(&mut log, begun("web01", Some(2))), Refused::Released { .. }));
    assert!(matches!(refused(&mut log, begun("db01", None)), Refused::NotReleased(_)));
    log.append(begun("web01", None)).unwrap();
    assert!(Log::open(dir.path()).unwrap().begun(&name("web01")).is_some());
    // Whoever asks for it gives up the very point: then nothing is begun, and nothing released.
    assert!(matches!(refused(&mut log, dropped(&[4], Reason::Asked)), Refused::Released { .. }));
    // Not for another one.
    assert!(matches!(refused(&mut log, given_up("db01", &[3, 4])), Refused::Released { .. }));
    log.append(given_up("web01", &[4])).unwrap();
    for log in [&log, &Log::open(dir.path()).unwrap()] {
        assert!(log.released(&name("web01")).is_none() && log.begun(&name("web01")).is_none());
        assert_eq!(log.in_use().count(), 0);
    }
}

#[test]
fn a_point_that_is_narrowed_stays_for_those_who_stand_at_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path()).unwrap();
    let group = ["web01", "db01", "app01"];
    log.append(group_point(1, &group, 1)).unwrap();
    log.append(group_point(2, &group, 2)).unwrap();
    log.append(group_point(3, &["web01"], 3)).unwrap();
    let refused = |log: &mut Log, record: Record| match log.append(record) {
        Err(Error::Refused(refused)) => refused,
        other => panic!("{other:?}"),
    };
    for machines in [&group[..], &["web02"], &["web01", "web02"]] {
        assert_eq!(refused(&mut log, narrowed(2, machines)), Refused::Narrow(PointId(2)));
    }
    assert_eq!(refused(&mut log, narrowed(9, &["db01"])), Refused::NoPoint(PointId(9)));
    for machines in [vec![], vec!["db01", "db01"]] {
        assert!(matches!(refused(&mut log, narrowed(2, &machines)), Refused::Line(_)));
    }
    log.append(begun("web01", Some(2))).unwrap();
    assert!(matches!(refused(&mut log, narrowed(2, &["db01"])), Refused::Released { .. }));
    log.append(taken_back("web01")).unwrap();
    log.append(group_point(4, &["app01"], 3)).unwrap();
    log.append(narrowed(2, &["db01", "app01"])).unwrap();
    // In the order of the points, also for one that does not stand at it any more.
    assert_eq!(ids(&log, "app01"), [1, 2, 4]);
    log.append(narrowed(2, &["db01"])).unwrap();
    let is_so = |log: &Log| {
        assert_eq!(group.map(|machine| ids(log, machine)), [vec![1, 3], vec![1, 2], vec![1, 4]]);
        let own = log.get(PointId(2)).unwrap();
        assert_eq!((&own.group, &own.volumes), (&None, &vec![volume("db01", "root", 2)]));
        // What its pass saved is needed for the first one, and known.
        let passes = |machine| -> Vec<u64> {
            let entries = log.history().iter().filter(|entry| entry.has_images());
            let volumes = entries.flat_map(|entry| &entry.point.volumes);
            volumes.filter(|at| at.machine == name(machine)).map(|at| at.pass).collect()
        };
        assert_eq!(group.map(passes), [vec![1, 2, 3], vec![1, 2], vec![1, 2, 3]]);
    };
    is_so(&log);
    is_so(&Log::open(dir.path()).unwrap());
    // The same once it was compacted, with and without what the first one needs.
    let fill = |log: &mut Log, pass: u64| {
        let path = dir.path().join(FILE_NAME);
        let (mut bytes, other) = (fs::read(&path).unwrap(), format!("other{pass}"));
        for pass in pass..pass + 1000 {
            bytes.extend(line::encode(&group_point(pass.into(), &[&*other], pass)).unwrap());
            bytes.extend(line::encode(&dropped(&[pass.into()], Reason::Age)).unwrap());
        }
        fs::write(&path, bytes).unwrap();
        *log = Log::open(dir.path()).unwrap();
        log.append(group_point((pass + 1000).into(), &[&*other], pass + 1000)).unwrap();
        let lines = fs::read(&path).unwrap().iter().filter(|&&byte| byte == b'\n').count();
        assert!(lines < 20, "{lines}");
    };
    fill(&mut log, 1000);
    is_so(&log);
    is_so(&Log::open(dir.path()).unwrap());
    log.append(dropped(&[1], Reason::Age)).unwrap();
    fill(&mut log, 3000);
    for log in [&log, &Log::open(dir.path()).unwrap()] {
        assert_eq!(group.map(|machine| ids(log, machine)), [vec![3], vec![2], vec![4]]);
        assert_eq!(log.get(PointId(2)).unwrap().volumes, [volume("db01", "root", 2)]);
    }
    // It goes as any other.
    log.append(group_point(5, &["db01"], 3)).unwrap();
    log.append(dropped(&[2], Reason::Age)).unwrap();
    assert_eq!(ids(&Log::open(dir.path()).unwrap(), "db01"), [5]);
}

#[test]
fn nothing_is_appended_to_a_damaged_log() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let mut log = Log::open(dir.path()).unwrap();
    let path = dir.path().join(FILE_NAME);
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"X", 60).unwrap();
    let damaged = fs::read(&path).unwrap();
    let error = log.append(taken_back("web01")).unwrap_err();
    assert!(error.to_string().contains("points.log:2: the checksum is"), "{error}");
    assert!(matches!(log.settle(), Err(Error::Corrupt { line: 2, .. })));
    assert_eq!(fs::read(&path).unwrap(), damaged);
    // What was read before stays.
    assert!(log.refresh().is_err());
    assert_eq!(ids(&log, "web01"), [2]);
}

#[test]
fn a_bad_line_before_the_last_is_damage_however_it_came_to_be() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let path = dir.path().join(FILE_NAME);
    let whole = fs::read(&path).unwrap();
    let lines: Vec<&[u8]> = whole.split_inclusive(|&byte| byte == b'\n').collect();
    let check = |lines: &[&[u8]], number: usize, text: &str| {
        fs::write(&path, lines.concat()).unwrap();
        match Log::open(dir.path()) {
            Err(Error::Corrupt { line, what, .. }) => {
                assert_eq!(line, number, "{what}");
                assert!(what.contains(text), "{what}");
            }
            other => panic!("{text}: {other:?}"),
        }
    };
    check(&[&lines[..2], &[b"\n"], &lines[2..]].concat(), 3, "no line of a checksum");
    check(&[&lines[..], &[b"00000000 {}\n"]].concat(), 7, "the checksum is 00000000");
    check(&[&lines[..], &[b"00000000 {}\n", b"00000000"]].concat(), 7, "the checksum is 00000000");
    let long = vec![b'x'; line::MAX_LINE];
    check(&[&lines[..], &[&long]].concat(), 7, "at most");
    // Lines that are sound, and cannot follow.
    check(&[&lines[..], &lines[1..2]].concat(), 7, "was recorded before");
    check(&[&lines[..], &lines[5..6]].concat(), 7, "there is no point 00000000000000000000000000000001");
    check(&lines[1..], 1, "none of the records that are known");
    check(&[&lines[..2], &lines[..1]].concat(), 3, "none of the records that are known");
}

#[test]
fn a_log_of_a_later_version_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let json = r#"{"record":"log","schema_version":3,"and":"more"}"#;
    fs::write(&path, format!("{:08x} {json}\n", crate::checksum::crc32c(json.as_bytes()))).unwrap();
    let error = Log::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { version: 3, .. }), "{error}");
    assert!(error.to_string().ends_with("knows only 2; update mt-agent"), "{error}");
}

#[test]
fn records_that_contradict_the_log_are_refused_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = sample(dir.path());
    let before = fs::read(log.path()).unwrap();
    let of_web = |id, pass| Record::Point(point(id, "web01", 30, pass));
    let of_db = |id, pass| Record::Point(point(id, "db01", 30, pass));
    let web = || name("web01");
    let follows = Refused::Pass { machine: name("db01"), disk: name("root"), pass: 1, last: 1 };
    let foreign = Refused::NotOf { point: PointId(2), machine: name("db01") };
    let gone = Refused::Released { machine: web(), point: PointId(2) };
    let none = Record::Point(Point { volumes: vec![], ..point(9, "db01", 0, 9) });
    let twice = vec![volume("db01", "root", 9), volume("db01", "root", 10)];
    let twice = Record::Point(Point { volumes: twice, ..point(9, "db01", 0, 9) });
    let mut same = point(9, "db01", 0, 9);
    same.volumes[1].id = same.volumes[0].id.clone();
    let many = (0..=line::MAX_VOLUMES).map(|disk| volume("db01", &disk.to_string(), 1)).collect();
    let many = Record::Point(Point { volumes: many, ..point(9, "db01", 0, 9) });
    let year = Record::TakenBack(TakenBack { machine: web(), time: datetime!(-1-01-01 0:00 UTC) });
    for (record, expected) in [
        (of_db(3, 2), Refused::Known(PointId(3))),
        // Dropped, but the log has it still.
        (of_db(1, 2), Refused::Known(PointId(1))),
        (of_db(9, 1), follows),
        (of_web(9, 9), gone.clone()),
        (dropped(&[1], Reason::Asked), Refused::NoPoint(PointId(1))),
        (dropped(&[3, 8], Reason::Asked), Refused::NoPoint(PointId(8))),
        (dropped(&[2], Reason::Initial), gone),
        (released("db01", 1), Refused::NoPoint(PointId(1))),
        (released("db01", 2), foreign),
        (taken_back("db01"), Refused::NotReleased(name("db01"))),
        (none, line::Error::None("disks").into()),
        (dropped(&[], Reason::Asked), line::Error::None("points").into()),
        (dropped(&[3, 3], Reason::Asked), line::Error::Twice("points").into()),
        (twice, line::Error::Twice("disks").into()),
        (Record::Point(same), line::Error::Twice("target disks").into()),
        (many, line::Error::TooMany { what: "disks", most: line::MAX_VOLUMES }.into()),
    ] {
        match log.append(record) {
            Err(Error::Refused(refused)) => assert_eq!(refused, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    assert!(matches!(log.append(year), Err(Error::Refused(Refused::Line(line::Error::Json(_))))));
    assert_eq!(fs::read(log.path()).unwrap(), before);
    // And it goes on.
    log.append(of_db(9, 2)).unwrap();
    assert_eq!(ids(&log, "db01"), [3, 9]);
}

#[test]
fn a_pass_that_was_undone_may_be_numbered_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path()).unwrap();
    log.append(Record::Point(point(1, "web01", 0, 1))).unwrap();
    log.append(Record::Point(point(2, "web01", 1, 2))).unwrap();
    log.append(dropped(&[2], Reason::Undo)).unwrap();
    log.append(Record::Point(point(3, "web01", 2, 2))).unwrap();
    assert_eq!(ids(&Log::open(dir.path()).unwrap(), "web01"), [1, 3]);
}

#[test]
fn appenders_that_take_turns_lose_nothing() {
    const EACH: u64 = 25;
    let dir = tempfile::tempdir().unwrap();
    thread::scope(|scope| {
        for machine in ["a", "b", "c"] {
            let dir = dir.path();
            // A log of its own, as another process has.
            scope.spawn(move || {
                let mut log = Log::open(dir).unwrap();
                for pass in 1..=EACH {
                    let id = u128::from(machine.as_bytes()[0]) * 1000 + u128::from(pass);
                    log.append(Record::Point(point(id, machine, 0, pass))).unwrap();
                    assert_eq!(log.newest(&name(machine)).unwrap().id, PointId(id));
                }
            });
        }
        let dir = dir.path();
        // And who only reads sees no damage meanwhile.
        scope.spawn(move || {
            let mut log = Log::open(dir).unwrap();
            while log.history().len() < 3 * EACH as usize {
                log.refresh().unwrap();
            }
        });
    });
    let log = Log::open(dir.path()).unwrap();
    for machine in ["a", "b", "c"] {
        let from = u128::from(machine.as_bytes()[0]) * 1000;
        assert_eq!(ids(&log, machine), (from + 1..=from + u128::from(EACH)).collect::<Vec<_>>());
    }
}

#[test]
fn a_log_of_mostly_dropped_points_is_compacted_and_says_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let mut bytes = line::head();
    let mut add = |record| bytes.extend(line::encode(&record).unwrap());
    // The oldest that is kept, and two behind it, of which one was thinned and one was undone.
    for id in 1..=1000 {
        add(Record::Point(point(id, "web01", id as i64, id as u64)));
        if id <= 990 || id == 995 {
            add(dropped(&[id], if id == 995 { Reason::Thinned } else { Reason::Age }));
        }
    }
    add(dropped(&[1000], Reason::Undo));
    add(Record::Point(point(1001, "db01", 0, 1)));
    add(released("web01", 999));
    add(released("db01", 1001));
    add(taken_back("db01"));
    fs::write(&path, &bytes).unwrap();
    let mut log = Log::open(dir.path()).unwrap();
    log.append(Record::Point(point(1002, "db01", 1, 2))).unwrap();
    let lines = fs::read(&path).unwrap().iter().filter(|&&byte| byte == b'\n').count();
    // The head; 991 to 999, of which one was thinned; that it was; 1000, the last one of its disk, and that it was undone; 1001;
    // released; 1002.
    assert_eq!(lines, 1 + 9 + 1 + 2 + 1 + 1 + 1);
    log.append(Record::Point(point(1003, "db01", 2, 3))).unwrap();
    for log in [&log, &Log::open(dir.path()).unwrap()] {
        assert_eq!(ids(log, "web01"), [991, 992, 993, 994, 996, 997, 998, 999]);
        assert_eq!(ids(log, "db01"), [1001, 1002, 1003]);
        let thinned = log.history().iter().find(|entry| entry.dropped.is_some()).unwrap();
        assert_eq!((thinned.point.id, thinned.dropped), (PointId(995), Some((NOON, Reason::Thinned))));
        assert_eq!(log.released(&name("web01")).unwrap().point, PointId(999));
        assert_eq!(log.released(&name("db01")), None);
    }
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "the log and its lock");
}

fn any_name() -> impl Strategy<Value = Name> {
    "[A-Za-z0-9_][A-Za-z0-9._-]{0,63}".prop_map(|text| text.parse().unwrap())
}

fn any_time() -> impl Strategy<Value = OffsetDateTime> {
    // All that RFC 3339 can say: the years 0 to 9999, to the nanosecond.
    (-62_167_219_200i64..253_402_300_800, 0..1_000_000_000i64).prop_map(|(seconds, nanoseconds)| {
        OffsetDateTime::from_unix_timestamp(seconds).unwrap() + Duration::nanoseconds(nanoseconds)
    })
}

fn any_id() -> impl Strategy<Value = DiskId> {
    let file = "[a-zA-Z0-9 {}\":\\\\é]{1,30}x".prop_map(|path| format!("loop:/{path}"));
    let naa = proptest::array::uniform15(any::<u8>())
        .prop_map(|bytes| format!("naa.60{}", bytes.map(|byte| format!("{byte:02x}")).concat()));
    prop_oneof![file, naa].prop_map(|text| text.parse().unwrap())
}

fn any_reason() -> impl Strategy<Value = Reason> {
    use Reason::*;
    proptest::sample::select(vec![Age, Size, Space, Thinned, Initial, Undo, Asked])
}

fn any_point() -> impl Strategy<Value = Point> {
    let volume = (any_name(), any_name(), any_id(), any::<u64>(), any::<u128>(), any::<u64>()).prop_map(
        |(machine, disk, id, pass, sender_pass, bytes)| VolumeAt {
            machine,
            disk,
            id,
            lineage: Lineage(!sender_pass),
            pass,
            sender_pass: PassId(sender_pass),
            bytes,
        },
    );
    let kind = proptest::sample::select(vec![Kind::Crash, Kind::Filesystem, Kind::Application]);
    let volumes = proptest::collection::vec(volume, 1..5);
    let optional = || proptest::option::of(any_name());
    (any::<u128>(), any_time(), any_time(), kind, any::<bool>(), optional(), optional(), volumes).prop_map(
        |(id, time, recorded, kind, fuzzy, name, group, volumes)| {
            let id = PointId(id);
            Point { id, time, recorded, kind, fuzzy, name, group, volumes }
        },
    )
}

fn any_record() -> impl Strategy<Value = Record> {
    let ids = proptest::collection::hash_set(any::<u128>().prop_map(PointId), 1..10);
    let dropped = (any_time(), any_reason(), ids).prop_map(|(time, reason, points)| {
        Record::Dropped(Dropped { time, reason, points: points.into_iter().collect() })
    });
    let sample = any::<[u32; 3]>().prop_map(|[head, tail, between]| Sample { head, tail, between });
    let disks = proptest::collection::hash_map(any_name(), (any::<Option<u64>>(), sample), 0..5);
    let released = (any_name(), any::<u128>(), any_time(), disks).prop_map(|(machine, id, time, disks)| {
        let disk = |(disk, (pass, sample))| ReleasedDisk { disk, pass, sample };
        let disks = disks.into_iter().map(disk).collect();
        Record::Released(Released { machine, point: PointId(id), time, disks })
    });
    let begun = (any_name(), any::<Option<u128>>(), any_time())
        .prop_map(|(machine, id, time)| Record::Begun(Begun { machine, point: id.map(PointId), time }));
    let ids = proptest::collection::hash_set(any::<u128>().prop_map(PointId), 1..10);
    let given_up = (any_name(), any_time(), ids).prop_map(|(machine, time, points)| {
        Record::GivenUp(GivenUp { machine, time, points: points.into_iter().collect() })
    });
    let machines = proptest::collection::hash_set(any_name(), 1..5);
    let narrowed =
        (any::<u128>(), any_time(), any_reason(), machines).prop_map(|(id, time, reason, machines)| {
            let machines = machines.into_iter().collect();
            Record::Narrowed(Narrowed { point: PointId(id), time, reason, machines })
        });
    let back =
        (any_name(), any_time()).prop_map(|(machine, time)| Record::TakenBack(TakenBack { machine, time }));
    prop_oneof![any_point().prop_map(Record::Point), dropped, narrowed, given_up, begun, released, back]
}

proptest! {
    #[test]
    fn a_record_comes_back_from_its_line(record in any_record()) {
        let line = line::encode(&record).unwrap();
        prop_assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
        prop_assert_eq!(line::parse(line.strip_suffix(b"\n").unwrap()), Ok(record));
    }

    #[test]
    fn a_damaged_line_is_none(record in any_record(), at in any::<proptest::sample::Index>(), bit in 0..8) {
        let mut line = line::encode(&record).unwrap();
        line.pop();
        let at = at.index(line.len());
        line[at] ^= 1u8 << bit;
        let error = line::parse(&line).unwrap_err();
        prop_assert!(matches!(error, line::Error::Form | line::Error::Checksum { .. }), "{error}");
    }
}
