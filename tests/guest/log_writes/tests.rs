//! The replay of logs that are put together here by hand.

use std::collections::BTreeSet;
use std::fs;

use super::*;
use crate::harness::small;
use crate::support::{Loop, directory};

const DISK: u64 = 16;
const SECTOR: usize = 512;

/// A log of a disk of [`DISK`] sectors.
struct Hand {
    bytes: Vec<u8>,
    entries: u64,
}

impl Hand {
    fn new() -> Hand {
        Hand { bytes: vec![0; SECTOR], entries: 0 }
    }

    fn entry(&mut self, sector: u64, sectors: u64, flags: u64, text: &str) -> &mut Hand {
        let start = self.bytes.len();
        for field in [sector, sectors, flags, text.len() as u64] {
            self.bytes.extend(field.to_le_bytes());
        }
        self.bytes.extend(text.as_bytes());
        self.bytes.resize(start + SECTOR, 0);
        self.entries += 1;
        self
    }

    /// A write of sectors that all consist of one byte.
    fn write(&mut self, sector: u64, sectors: u64, byte: u8, flags: u64) -> &mut Hand {
        self.entry(sector, sectors, flags, "");
        self.bytes.extend(vec![byte; SECTOR * sectors as usize]);
        self
    }

    fn flush(&mut self) -> &mut Hand {
        self.entry(0, 0, FLUSH, "")
    }

    fn mark(&mut self, name: &str) -> &mut Hand {
        self.entry(0, 0, MARK, name)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for (at, field) in [(0, MAGIC), (8, VERSION), (16, self.entries), (24, SECTOR as u64)] {
            bytes[at..at + 8].copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// As if the disk had been full of dots before.
    fn recording(&self) -> Recording {
        let before = tempfile::tempfile().unwrap();
        before.write_all_at(&[b'.'; DISK as usize * SECTOR], 0).unwrap();
        Recording { log: parse(&self.bytes()).unwrap(), before }
    }
}

fn parse(bytes: &[u8]) -> Result<Log, String> {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    Log::parse(file, DISK * SECTOR as u64)
}

/// The disk with a letter for each sector, which must be in one piece.
fn letters(image: &Path) -> String {
    let bytes = fs::read(image).unwrap();
    assert_eq!(bytes.len(), DISK as usize * SECTOR);
    let sector = |bytes: &[u8]| {
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a sector is torn");
        if bytes[0] == DISCARDED { '?' } else { char::from(bytes[0]) }
    };
    bytes.chunks(SECTOR).map(sector).collect::<String>().trim_end_matches('.').to_owned()
}

fn at_each_flush(hand: &Hand) -> Vec<String> {
    let mut seen = Vec::new();
    let count = hand.recording().each_flush(|image, _| seen.push(letters(image)));
    assert_eq!(count, seen.len());
    seen
}

#[test]
fn what_was_not_flushed_is_lost() {
    let mut hand = Hand::new();
    hand.write(0, 2, b'a', 0).write(1, 2, b'b', METADATA).flush().write(0, 1, b'c', 0).mark(END);
    // At the beginning, the flush, and the mark: the last write was never flushed.
    assert_eq!(at_each_flush(&hand), ["", "abb", "abb"]);
    assert_eq!(letters(hand.recording().whole().path()), "cbb");
    assert_eq!(hand.recording().barriers_and_bytes(), (1, 5 * SECTOR as u64));
}

#[test]
fn a_write_with_fua_is_durable_by_itself_and_makes_nothing_else_durable() {
    let mut hand = Hand::new();
    hand.write(0, 1, b'a', FUA).write(1, 1, b'b', 0).write(2, 1, b'c', FUA).flush();
    assert_eq!(at_each_flush(&hand), ["", "a", "a.c", "abc"]);
}

#[test]
fn what_a_flush_carries_itself_waits_for_the_next_one() {
    let mut hand = Hand::new();
    hand.write(0, 1, b'a', 0).write(1, 1, b'b', FLUSH).write(2, 1, b'c', FLUSH | FUA).flush();
    assert_eq!(at_each_flush(&hand), ["", "a", "abc", "abc"]);
}

#[test]
fn what_was_discarded_may_be_anything() {
    let mut hand = Hand::new();
    hand.write(0, 4, b'a', 0).flush().entry(1, 2, DISCARD, "").write(2, 1, b'b', 0).flush();
    assert_eq!(at_each_flush(&hand), ["", "aaaa", "a?ba"]);
}

#[test]
fn a_long_write_arrives_whole() {
    let disk = 5 * MIB;
    let before = tempfile::tempfile().unwrap();
    before.set_len(disk).unwrap();
    let sectors = 2 * MIB / SECTOR as u64 + 3;
    let mut hand = Hand::new();
    hand.entry(7, sectors, FUA, "");
    let data: Vec<u8> = (0..sectors * SECTOR as u64).map(|at| (at / 3) as u8).collect();
    hand.bytes.extend(&data);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&hand.bytes(), 0).unwrap();
    let recording = Recording { log: Log::parse(file, disk).unwrap(), before };
    let image = fs::read(recording.whole().path()).unwrap();
    let (start, end) = (7 * SECTOR, 7 * SECTOR + data.len());
    assert!(image.len() == disk as usize && image[start..end] == data);
    assert!(image[..start].iter().chain(&image[end..]).all(|byte| *byte == 0));
}

#[test]
fn marks_say_what_was_passed() {
    let mut hand = Hand::new();
    hand.mark("begin").write(0, 1, b'a', 0).flush().mark("end").write(1, 1, b'b', 0).flush();
    let mut seen = Vec::new();
    hand.recording().each_flush(|image, point| {
        seen.push((letters(image), point.after("begin"), point.after("end")));
    });
    let expected =
        [("", false, false), ("", true, false), ("a", true, false), ("a", true, true), ("ab", true, true)];
    assert_eq!(seen, expected.map(|(letters, begin, end)| (letters.to_owned(), begin, end)));
    assert_eq!(letters(hand.recording().at("end").path()), "a");
    assert_eq!(letters(hand.recording().up_to(2).path()), "");
    assert_eq!(letters(hand.recording().up_to(3).path()), "a");
}

#[test]
#[should_panic(expected = "the log has the mark ende 0 times")]
fn a_mark_that_was_never_made_is_no_reason_to_pass() {
    let mut hand = Hand::new();
    hand.mark("end");
    hand.recording().each_flush(|_, point| assert!(!point.after("ende")));
}

/// Every state that may be, and none that may not: the earlier of two flushes is never undone, what comes behind the
/// next one is never seen, and each sector of what is in between is there or not, independently of the others.
#[test]
fn a_crash_leaves_any_part_of_what_was_not_flushed() {
    let mut hand = Hand::new();
    hand.write(0, 1, b'a', 0).flush().mark("middle");
    hand.write(1, 2, b'b', 0).write(3, 1, b'c', 0).flush().mark("end").write(4, 1, b'd', 0).flush();
    let mut states = BTreeSet::new();
    let count = hand.recording().each_crash(60, |image, point| {
        states.insert((letters(image), point.after("middle"), point.after("end")));
    });
    // The plain states at the start, three flushes and two marks; all and 60 samples in each of the three gaps.
    assert_eq!(count, 1 + 3 + 2 + 3 * 61);
    let between = ["a", "ab", "a.b", "abb", "a..c", "ab.c", "a.bc", "abbc"];
    let mut expected = BTreeSet::from([
        (String::new(), false, false),
        ("a".into(), false, false),
        ("abbc".into(), true, false),
        ("abbc".into(), true, true),
        ("abbcd".into(), true, true),
    ]);
    expected.extend(between.map(|letters| (letters.to_owned(), true, false)));
    assert_eq!(states, expected);
}

/// The log cannot tell whether a write was issued before a write with FUA that came before its flush; what is certain
/// is that the latter was under way alone.
#[test]
fn a_write_is_not_seen_before_an_earlier_fua() {
    let mut hand = Hand::new();
    hand.write(0, 2, b'a', FUA).write(2, 1, b'b', 0).flush();
    let mut states = BTreeSet::new();
    hand.recording().each_crash(60, |image, _| {
        states.insert(letters(image));
    });
    assert_eq!(states, ["", "a", ".a", "aa", "aab"].map(str::to_owned).into());
}

/// What was in the cache when the recording ended may be there or not.
#[test]
fn the_tail_may_be_kept_or_lost() {
    let mut hand = Hand::new();
    hand.write(0, 1, b'a', 0).flush().write(1, 1, b'b', 0).mark(END);
    let mut states = BTreeSet::new();
    hand.recording().each_crash(20, |image, point| {
        states.insert((letters(image), point.after(END)));
    });
    let expected = [("", false), ("a", false), ("a", true), ("ab", true)];
    assert_eq!(states, expected.map(|(letters, end)| (letters.to_owned(), end)).into());
}

/// Sectors 0 to 7 are one disk, 8 to 15 another; each is flushed for itself.
#[test]
fn a_flush_of_one_disk_leaves_the_other_as_it_was() {
    let mut hand = Hand::new();
    hand.write(0, 1, b'a', 0).write(8, 1, b'b', 0).flush().mark("flushed:high");
    // Of the first disk: an empty one, and one that carries data.
    hand.write(9, 1, b'c', 0).flush().mark("acknowledged").write(1, 1, b'd', FLUSH | FUA);
    hand.flush().mark("flushed:high");
    let parts = [("high", 8 * SECTOR as u64..16 * SECTOR as u64)];
    let mut seen = Vec::new();
    hand.recording().with_parts(&parts).each_flush(|image, _| seen.push(letters(image)));
    let b = "........b";
    let ab = "a.......b";
    assert_eq!(seen, ["", b, b, ab, ab, "ad......b", "ad......bc", "ad......bc"]);
    // What was not flushed may be there all the same, and goes on to be uncertain.
    let mut states = BTreeSet::new();
    hand.recording().with_parts(&parts).each_crash(60, |image, point| {
        if point.after("acknowledged") {
            states.insert(letters(image));
        }
    });
    let expected = ["a.......b", "a.......bc", "ad......b", "ad......bc"];
    assert_eq!(states, expected.map(str::to_owned).into());
}

#[test]
fn the_same_log_gives_the_same_states() {
    let mut hand = Hand::new();
    hand.write(0, 8, b'a', 0).write(4, 8, b'b', 0).flush();
    let states = || {
        let mut states = Vec::new();
        hand.recording().each_crash(9, |image, point| states.push((letters(image), point.to_string())));
        states
    };
    assert_eq!(states(), states());
}

#[test]
fn a_log_that_is_none_is_refused() {
    let mut good = Hand::new();
    good.write(2, 2, b'a', 0).mark("mark").flush();
    let good = good.bytes();
    parse(&good).unwrap();
    let (write, mark, flush) = (SECTOR, 4 * SECTOR, 5 * SECTOR);
    let changed = |at: usize, value: u64| {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        parse(&bytes).err().unwrap()
    };
    assert_eq!(changed(0, 0), "it is no log");
    assert_eq!(changed(8, 2), "its version is 2");
    assert_eq!(changed(24, 0), "its sectors have 0 bytes");
    assert_eq!(changed(24, 513), "its sectors have 513 bytes");
    assert_eq!(changed(24, 1 << 31), "its sectors have 2147483648 bytes");
    assert_eq!(changed(16, 6), "6 entries do not fit into 3072 bytes");
    assert_eq!(changed(16, u64::MAX), format!("{} entries do not fit into 3072 bytes", u64::MAX));
    assert_eq!(changed(16, 4), "entry 3: it lies behind the end of the log");
    // Before the data of the entry, and far away.
    assert_eq!(changed(write, 15), "entry 0: 2 sectors at 15 are not on the disk");
    assert_eq!(
        changed(write, u64::MAX / 512),
        format!("entry 0: 2 sectors at {} are not on the disk", u64::MAX / 512)
    );
    assert_eq!(changed(write, u64::MAX), format!("entry 0: 2 sectors at {} are not on the disk", u64::MAX));
    assert_eq!(
        changed(write + 8, 1 << 60),
        format!("entry 0: {} sectors at 2 are not on the disk", 1_u64 << 60)
    );
    assert_eq!(changed(write + 8, 0), "entry 0: it is nothing");
    assert_eq!(changed(write + 8, 5), "entry 0: its data reach over the end of the log");
    assert_eq!(changed(write + 16, 32), "entry 0: its flags are 0x20");
    assert_eq!(changed(write + 16, DISCARD | FUA), "entry 0: a discard that flushes");
    assert_eq!(changed(write + 24, 1), "entry 0: it has data where only marks have some");
    assert_eq!(changed(mark + 8, 1), "entry 1: a mark that writes");
    assert_eq!(changed(mark + 16, MARK | FLUSH), "entry 1: a mark that writes");
    assert_eq!(changed(mark + 24, 481), "entry 1: a mark of 481 bytes");
    assert_eq!(changed(mark + 24, u64::MAX), format!("entry 1: a mark of {} bytes", u64::MAX));
    assert_eq!(changed(flush + 24, 9), "entry 2: it has data where only marks have some");
    assert_eq!(parse(&good[..flush]).err().unwrap(), "entry 2: it lies behind the end of the log");
    assert!(parse(&good[..20]).err().unwrap().starts_with("its start cannot be read"));
}

/// Whatever lies on the log's disk, reading it ends, and what is taken for a log can be replayed.
#[test]
fn any_changed_byte_is_survived() {
    let mut hand = Hand::new();
    hand.write(2, 2, b'a', 0).mark("mark").entry(0, 1, DISCARD, "").flush().write(3, 1, b'b', FUA).flush();
    let good = hand.bytes();
    let mut refused = 0;
    for at in (0..good.len()).filter(|at| at % SECTOR < HEADER + 4) {
        for value in [0x00, 0x01, 0x10, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            match parse(&bytes) {
                Err(_) => refused += 1,
                Ok(log) => {
                    let before = tempfile::tempfile().unwrap();
                    before.set_len(DISK * SECTOR as u64).unwrap();
                    Recording { log, before }.each_crash(1, |_, _| ());
                }
            }
        }
    }
    assert!(refused > 500, "{refused} of the changes were found");
}

/// What is said of the log above holds for what the kernel writes.
#[test]
fn the_kernel_logs_like_this() {
    small().without_udev().run(|_| {
        let dir = directory();
        let disk = Loop::create(&dir.path().join("disk"), 8 * MIB);
        let log_disk = Loop::create(&dir.path().join("log"), 8 * MIB);
        let data = dir.path().join("data");
        let log = LogWrites::on(disk.node(), log_disk.node());
        let node = log.node();
        let node = node.to_str().unwrap();
        let write = |letter: u8, block: u64, flags: &str| {
            fs::write(&data, [letter; 4096]).unwrap();
            let (from, to) = (format!("if={}", data.display()), format!("of={node}"));
            tool("dd", &[&from, &to, "bs=4096", &format!("seek={block}"), "conv=notrunc", flags]);
        };
        write(b'a', 0, "oflag=direct");
        log.mark("written");
        tool("sync", &[node]);
        log.mark("flushed");
        write(b'b', 1, "oflag=direct,dsync");
        log.mark("through");
        tool("blkdiscard", &["--offset", "4096", "--length", "4096", node]);
        write(b'c', 2, "oflag=direct");
        log.mark("discarded");
        tool("sync", &[node]);
        log.mark("all");
        write(b'd', 3, "oflag=direct");
        let log = log.finish();
        let blocks = |image: NamedTempFile| {
            let block = |index: u64| {
                let mut block = [0; 4096];
                image.as_file().read_exact_at(&mut block, index * 4096).unwrap();
                assert!(block.iter().all(|byte| *byte == block[0]));
                block[0]
            };
            [0, 1, 2, 3].map(block)
        };
        assert_eq!(blocks(log.at("written")), [0, 0, 0, 0]);
        assert_eq!(blocks(log.at("flushed")), [b'a', 0, 0, 0]);
        assert_eq!(blocks(log.at("through")), [b'a', b'b', 0, 0]);
        assert_eq!(blocks(log.at("discarded")), [b'a', b'b', 0, 0]);
        assert_eq!(blocks(log.at("all")), [b'a', DISCARDED, b'c', 0]);
        assert_eq!(blocks(log.at(END)), [b'a', DISCARDED, b'c', 0]);
        assert_eq!(blocks(log.whole()), [b'a', DISCARDED, b'c', b'd']);
    });
}
