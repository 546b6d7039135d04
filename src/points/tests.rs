use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

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
    let passes = vec![PassOf { disk: name("root"), pass: 9 }];
    Record::Released(Released { machine: name(machine), point: PointId(id), time: NOON, passes })
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
        assert_eq!(log.get(PointId(1)), None);
        assert_eq!(log.get(PointId(3)), Some(&point(3, "db01", 11, 1)));
        assert_eq!(log.released(&name("web01")).unwrap().point, PointId(2));
        assert_eq!(log.released(&name("db01")), None);
        assert_eq!(log.all_released().count(), 1);
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
    for len in 0..=whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        let points = expected.iter().rfind(|(end, _)| *end <= len).map_or(vec![], |(_, ids)| ids.clone());
        let mut log = Log::open(dir.path()).unwrap();
        assert_eq!(ids(&log, "web01"), points, "cut to {len} bytes");
        // And it goes on from there: the part is cut off and in nobody's way. (Each costs its flushes.)
        if len % 16 != 0 && !expected.iter().any(|(end, _)| end.abs_diff(len) < 3) {
            continue;
        }
        let next = point(99, "web01", 0, 99);
        log.append(Record::Point(next)).unwrap();
        let again = ids(&Log::open(dir.path()).unwrap(), "web01");
        assert_eq!(again, [points, vec![99]].concat(), "cut to {len} bytes");
    }
}

#[test]
fn any_flipped_bit_is_found_or_concerns_only_the_last_line() {
    let dir = tempfile::tempdir().unwrap();
    let log = sample(dir.path());
    let path = dir.path().join(FILE_NAME);
    let whole = fs::read(&path).unwrap();
    let last = whole[..whole.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
    for at in 0..whole.len() {
        // All of them where lines meet; elsewhere one of each byte will do.
        let bits = if whole[at] == b'\n' || at.saturating_sub(last) < 10 { 0..8 } else { at % 8..at % 8 + 1 };
        for bit in bits {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            fs::write(&path, &bytes).unwrap();
            match Log::open(dir.path()) {
                Err(Error::Corrupt { file, line, .. }) => {
                    let expected = 1 + whole[..at].iter().filter(|&&byte| byte == b'\n').count();
                    assert_eq!((&file, line), (&path, expected), "bit {bit} of byte {at}");
                }
                Ok(without) => {
                    assert!(at >= last, "bit {bit} of byte {at} was not found");
                    // The last record dropped point 1.
                    assert_eq!(ids(&without, "web01"), [1, 2]);
                }
                other => panic!("bit {bit} of byte {at}: {other:?}"),
            }
        }
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(Log::open(dir.path()).unwrap().history(), log.history());
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
