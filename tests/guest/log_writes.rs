//! What a crash leaves on a disk, shown by dm-log-writes: the kernel records what a run writes and flushes, and the
//! record is replayed up to any point.
//!
//! ```ignore
//! let log = LogWrites::on(&disk, &log_disk); // the program under test works on log.node()
//! ...
//! log.mark("acknowledged");
//! ...
//! log.finish().each_crash(8, |image, point| {
//!     // `image` is a file with what the power cut leaves; the check may change it.
//!     if point.after("acknowledged") { ... }
//! });
//! ```
//!
//! # The log
//! All numbers are little-endian. Sectors have the size that the first one names, the disk's logical block.
//!
//! ```text
//! sector 0   u64 magic, u64 version (1), u64 number of entries, u32 sector size
//! then each  u64 first sector, u64 number of sectors, u64 flags, u64 length of the mark, the mark: one sector
//!            the data that was written, unless it was a discard
//! ```
//!
//! The kernel logs a write when a flush that was issued *after the write completed* has completed itself, just before
//! that flush; a write with FUA when it completed; a mark when it was made. So everything before a mark was on stable
//! storage when it was made, and what was written but not flushed comes behind the mark. The log is complete once the
//! target is taken away, which the kernel notes with a last mark of its own.
//!
//! # What a power cut leaves
//! A *barrier* is an entry that made something durable: a flush, or a write with FUA. A crash between two barriers
//! leaves all that was durable at the first, and of what the second makes durable any part, in sectors: all of it was
//! under way or in the disk's cache in the moment before the second completed. (A write may have been in the cache even
//! earlier, but the log cannot prove that, and a state that cannot have been would be a false alarm.)
//!
//! What was discarded may read as anything, so it reads as [`DISCARDED`].
//!
//! Two disks have two logs, and only marks tie them together: a state of the one at a mark belongs to a state of the
//! other at that mark if one of them was at rest. One log below both disks has one order of everything, but to the kernel
//! a flush of either makes the other durable too, which would hide a flush that is missing. So the replay is told which
//! part of the device is which disk, and whose each flush was: see [`Recording::with_parts`].

use std::fmt;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::support::{MIB, scratch, tool};

/// What a discarded byte reads as.
pub const DISCARDED: u8 = 0xd5;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
/// Of an entry, without its mark.
const HEADER: usize = 32;
/// The mark that the kernel makes when the target is taken away.
const END: &str = "dm-log-writes-end";

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
const METADATA: u64 = 16;

/// A device that passes everything on to a disk and logs it on another one. It stays as long as the guest.
pub struct LogWrites {
    name: String,
    disk: PathBuf,
    log: PathBuf,
    /// What was on the disk before.
    before: File,
}

impl LogWrites {
    /// Over `disk`, with the log on `log`, which must have room for all that is written and a sector for each write.
    pub fn on(disk: &Path, log: &Path) -> LogWrites {
        let before = scratch();
        copy(&File::open(disk).unwrap(), before.as_file());
        // An old log there must not pass for this one's.
        File::options().write(true).open(log).unwrap().write_all_at(&[0; 4096], 0).unwrap();
        forget(log);
        let name = format!("log-writes-{}", before.path().file_name().unwrap().display());
        let made = LogWrites { name, disk: disk.into(), log: log.into(), before: before.into_file() };
        tool("modprobe", &["-a", "dm-mod", "dm-log-writes"]);
        let target = format!("log-writes {} {}", disk.display(), log.display());
        tool("dmsetup", &["create", &made.name, "--table", &made.table(&target)]);
        made
    }

    fn table(&self, target: &str) -> String {
        format!("0 {} {target}", size(&self.before) / 512)
    }

    /// The device that logs.
    pub fn node(&self) -> PathBuf {
        // Not its name in /dev/mapper, which udevd would have to make.
        let info = ["info", "--columns", "--noheadings", "-o", "blkdevname", &self.name];
        Path::new("/dev").join(tool("dmsetup", &info))
    }

    /// Notes in the log that this moment was passed. The name is one word.
    pub fn mark(&self, name: &str) {
        tool("dmsetup", &["message", &self.name, "0", "mark", name]);
    }

    /// How many entries the log has by now: what was written is in it once it was flushed.
    pub fn entries(&self) -> u64 {
        let status = tool("dmsetup", &["status", &self.name]);
        assert!(!status.contains("logging_disabled"), "the log is full or broken: {status}");
        status.split(' ').nth(3).unwrap().parse().unwrap()
    }

    /// Ends the recording. The device stays, also for whoever has it open, and logs no more.
    pub fn finish(self) -> Recording {
        self.entries();
        let plain = self.table(&format!("linear {} 0", self.disk.display()));
        tool("dmsetup", &["load", &self.name, "--table", &plain]);
        // Not what the file system on it still has in memory.
        tool("dmsetup", &["suspend", "--nolockfs", &self.name]);
        tool("dmsetup", &["resume", &self.name]);
        forget(&self.log);
        let log = Log::parse(File::open(&self.log).unwrap(), size(&self.before)).unwrap();
        assert_eq!(log.marks(log.entries.len()).last(), Some(END), "the log does not end as it must");
        Recording { log, before: self.before }
    }
}

/// The mark that says that the last flush before it was one of this part: from when that was issued, nobody else may flush
/// any of the device until the mark is made.
pub fn flushed(part: &str) -> String {
    format!("flushed:{part}")
}

/// Device mapper passes by the pages in which the kernel keeps what was read and written through the device's node.
fn forget(device: &Path) {
    tool("blockdev", &["--flushbufs", device.to_str().unwrap()]);
}

/// What happened to a disk.
pub struct Recording {
    log: Log,
    before: File,
}

/// A moment at which the power failed, as far as the log knows it.
pub struct Point<'a> {
    log: &'a Log,
    /// So many entries were in the log.
    entries: usize,
    /// And it was past the marks among so many.
    passed: usize,
    /// What was kept of what was not durable.
    kept: String,
}

impl Point<'_> {
    /// Whether this mark was made before.
    pub fn after(&self, mark: &str) -> bool {
        let all = self.log.marks(self.log.entries.len()).filter(|name| *name == mark).count();
        assert!(all == 1, "the log has the mark {mark} {all} times");
        self.log.marks(self.passed).any(|name| name == mark)
    }
}

impl fmt::Display for Point<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} entries, {}", self.entries, self.log.entries.len(), self.kept)?;
        match self.log.marks(self.passed).last() {
            Some(mark) => write!(f, ", after the mark {mark}"),
            None => Ok(()),
        }
    }
}

impl Recording {
    /// Of a device on which several disks lie: a flush makes durable only what is on the disk that it was of. One that
    /// carries data is of the disk with these data; an empty one is of a disk of these where it is the last flush before a
    /// mark that says so ([`flushed`]), and else of the rest of the device.
    pub fn with_parts(mut self, parts: &[(&str, Range<u64>)]) -> Recording {
        let entries = &mut self.log.entries;
        for entry in entries.iter_mut().filter(|entry| !entry.extent.is_empty()) {
            let inside = |(_, part): &&(_, Range<u64>)| part.contains(&entry.extent.start);
            entry.part = parts.iter().position(|part| inside(&part)).map_or(0, |index| index + 1);
        }
        let mut last = None;
        for index in 0..entries.len() {
            if entries[index].flags & FLUSH != 0 {
                last = Some(index);
            }
            let part = parts.iter().position(|(name, _)| entries[index].mark == Some(flushed(name)));
            if let (Some(part), Some(last)) = (part, last) {
                assert!(entries[last].extent.is_empty(), "a mark stands behind a flush that carries data");
                entries[last].part = part + 1;
            }
        }
        self
    }

    /// Calls `check` with what a power cut leaves at least, that is without anything that was not durable: at the
    /// beginning, at each barrier, and at each mark. Returns how often.
    pub fn each_flush(&self, check: impl FnMut(&Path, &Point)) -> usize {
        self.each_crash(0, check)
    }

    /// The same, and between each two barriers also with all, and `samples` times with some, of the sectors that were
    /// not durable.
    pub fn each_crash(&self, samples: usize, mut check: impl FnMut(&Path, &Point)) -> usize {
        let entries = &self.log.entries;
        let mut replay = Replay::of(self);
        let mut random = Random(0x5eed);
        let mut states = 0;
        let mut look = |replay: &Replay, passed: usize, kept: String, keep: &dyn Fn(usize, u64) -> bool| {
            let image = scratch();
            copy(replay.image.as_file(), image.as_file());
            for index in replay.volatile() {
                entries[index].apply(&self.log, image.as_file(), |sector| keep(index, sector));
            }
            let point = Point { log: &self.log, entries: replay.done, passed, kept };
            let shown = ShownWhenItFails(&point);
            check(image.path(), &point);
            drop(shown);
            states += 1;
        };
        loop {
            let done = replay.done;
            let last = done.checked_sub(1).map(|last| &entries[last]);
            if last.is_none_or(|entry| entry.is_barrier() || entry.mark.is_some()) {
                look(&replay, done, "only what was durable".into(), &|_, _| false);
            }
            let volatile = replay.volatile();
            if samples > 0 && !volatile.is_empty() && last.is_none_or(Entry::is_barrier) {
                // All of it was there only when the next barrier had almost completed, and the marks before it passed.
                let passed = replay.next_barrier().unwrap_or(entries.len());
                look(&replay, passed, "all that was written".into(), &|_, _| true);
                for sample in 0..samples {
                    // Up to somewhere, some of the writes, some of the sectors: each finds other faults.
                    let (seed, share) = (random.next(), 1 + random.below(8));
                    let stop = volatile[random.below(volatile.len() as u64) as usize];
                    let torn = random.below(1 + entries[stop].sectors(&self.log));
                    let coin = |nth: u64| Random(seed ^ nth).below(9) < share;
                    let keep = |index: usize, sector: u64| match sample % 3 {
                        0 => index < stop || (index == stop && sector < torn),
                        1 => coin(index as u64),
                        _ => coin((index as u64) << 32 | sector),
                    };
                    look(&replay, passed, format!("sample {sample} of what was written"), &keep);
                }
            }
            if done == entries.len() {
                return states;
            }
            replay.step();
        }
    }

    /// What was durable at a mark, as an image file.
    pub fn at(&self, mark: &str) -> NamedTempFile {
        let marked = |entry: &Entry| entry.mark.as_deref() == Some(mark);
        let index = self.log.entries.iter().position(marked).unwrap_or_else(|| panic!("no mark {mark}"));
        self.up_to(index)
    }

    /// What was durable after so many entries of the log, as an image file.
    pub fn up_to(&self, entries: usize) -> NamedTempFile {
        let mut replay = Replay::of(self);
        while replay.done < entries {
            replay.step();
        }
        replay.image
    }

    /// What the disk holds in the end if the power does not fail, but for what was discarded.
    pub fn whole(&self) -> NamedTempFile {
        let mut replay = Replay::of(self);
        while replay.done < self.log.entries.len() {
            replay.step();
        }
        replay.flush(|_| true);
        replay.image
    }

    /// How many barriers and how many bytes of data the log has, for a test that wants to know that it saw something.
    pub fn barriers_and_bytes(&self) -> (usize, u64) {
        let barriers = self.log.entries.iter().filter(|entry| entry.is_barrier()).count();
        (barriers, self.log.entries.iter().map(|entry| entry.extent.end - entry.extent.start).sum())
    }
}

/// Says at which point a check failed.
struct ShownWhenItFails<'a>(&'a Point<'a>);

impl Drop for ShownWhenItFails<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the power failed at {}", self.0);
        }
    }
}

/// A disk at some entry of the log: what is durable is in the image.
struct Replay<'a> {
    log: &'a Log,
    image: NamedTempFile,
    done: usize,
    /// Entries before `done` that no flush has followed yet.
    pending: Vec<usize>,
}

impl Replay<'_> {
    fn of(recording: &Recording) -> Replay<'_> {
        let image = scratch();
        copy(&recording.before, image.as_file());
        Replay { log: &recording.log, image, done: 0, pending: Vec::new() }
    }

    fn step(&mut self) {
        let entry = &self.log.entries[self.done];
        if entry.flags & FLUSH != 0 {
            // What the flush itself carries is not covered by it.
            self.flush(|pending| pending.part == entry.part);
        }
        if entry.flags & FUA != 0 {
            entry.apply(self.log, self.image.as_file(), |_| true);
        } else if !entry.extent.is_empty() {
            self.pending.push(self.done);
        }
        self.done += 1;
    }

    fn flush(&mut self, covers: impl Fn(&Entry) -> bool) {
        let covered = self.pending.extract_if(.., |index| covers(&self.log.entries[*index]));
        for index in covered {
            self.log.entries[index].apply(self.log, self.image.as_file(), |_| true);
        }
    }

    fn next_barrier(&self) -> Option<usize> {
        (self.done..self.log.entries.len()).find(|index| self.log.entries[*index].is_barrier())
    }

    /// The writes of which a crash before the next barrier may leave a part.
    fn volatile(&self) -> Vec<usize> {
        let entries = &self.log.entries;
        let coming = match self.next_barrier() {
            // Whether what a later flush covers was written already, the log does not say.
            Some(next) if entries[next].flags & FLUSH == 0 => next..next + 1,
            next => self.done..next.unwrap_or(entries.len()),
        };
        let coming = coming.filter(|index| !entries[*index].extent.is_empty());
        self.pending.iter().copied().chain(coming).collect()
    }
}

/// A log as it lies on its disk.
struct Log {
    file: File,
    sector: u64,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    flags: u64,
    /// In bytes on the disk; empty for marks and for flushes that carry nothing.
    extent: Range<u64>,
    /// Where the data is in the log.
    data: u64,
    mark: Option<String>,
    /// The disk that it is of, if there are several on the device.
    part: usize,
}

impl Log {
    /// Reads the log of a disk of `disk` bytes.
    fn parse(file: File, disk: u64) -> Result<Log, String> {
        let size = size(&file);
        let mut start = [0; HEADER];
        file.read_exact_at(&mut start, 0).map_err(|error| format!("its start cannot be read: {error}"))?;
        if number(&start, 0) != MAGIC {
            return Err("it is no log".into());
        }
        if number(&start, 8) != VERSION {
            return Err(format!("its version is {}", number(&start, 8)));
        }
        let (count, sector) = (number(&start, 16), number(&start, 24) & 0xffff_ffff);
        if !(512..=65536).contains(&sector) || !sector.is_power_of_two() {
            return Err(format!("its sectors have {sector} bytes"));
        }
        // Each entry takes a sector at least, and the first one is taken.
        if count >= size / sector {
            return Err(format!("{count} entries do not fit into {size} bytes"));
        }
        let mut log = Log { file, sector, entries: Vec::new() };
        let mut at = sector;
        for index in 0..count {
            let entry = log.entry(at, size, disk).map_err(|what| format!("entry {index}: {what}"))?;
            let carried = if entry.flags & DISCARD == 0 { entry.extent.end - entry.extent.start } else { 0 };
            at = entry.data + carried;
            log.entries.push(entry);
        }
        Ok(log)
    }

    /// The entry at byte `at` of the log's `size`.
    fn entry(&self, at: u64, size: u64, disk: u64) -> Result<Entry, String> {
        let data = at + self.sector;
        if data > size {
            return Err("it lies behind the end of the log".into());
        }
        let mut whole = vec![0; usize::try_from(self.sector).unwrap()];
        self.file.read_exact_at(&mut whole, at).map_err(|error| error.to_string())?;
        let [sector, sectors, flags, mark_len] = [0, 8, 16, 24].map(|field| number(&whole, field));
        if flags & !(FLUSH | FUA | DISCARD | MARK | METADATA) != 0 {
            return Err(format!("its flags are {flags:#x}"));
        }
        if flags & DISCARD != 0 && flags & (FLUSH | FUA) != 0 {
            return Err("a discard that flushes".into());
        }
        if flags & MARK == 0 && sectors == 0 && flags & FLUSH == 0 {
            return Err("it is nothing".into());
        }
        let bytes = |count: u64| count.checked_mul(self.sector);
        let extent =
            bytes(sector).zip(bytes(sectors)).and_then(|(from, len)| Some(from..from.checked_add(len)?));
        let Some(extent) = extent.filter(|extent| extent.is_empty() || extent.end <= disk) else {
            return Err(format!("{sectors} sectors at {sector} are not on the disk"));
        };
        if flags & DISCARD == 0 && extent.end - extent.start > size - data {
            return Err("its data reach over the end of the log".into());
        }
        let mut mark = None;
        if flags & MARK != 0 {
            if flags != MARK || sectors != 0 {
                return Err("a mark that writes".into());
            }
            let text = usize::try_from(mark_len).ok().and_then(|len| whole[HEADER..].get(..len));
            let text = text.ok_or_else(|| format!("a mark of {mark_len} bytes"))?;
            mark = Some(String::from_utf8_lossy(text).into_owned());
        } else if mark_len != 0 {
            // Inline data, which the kernel wrote for DAX until 5.11.
            return Err("it has data where only marks have some".into());
        }
        Ok(Entry { flags, extent, data, mark, part: 0 })
    }

    /// The marks among the first `entries`.
    fn marks(&self, entries: usize) -> impl Iterator<Item = &str> {
        self.entries[..entries].iter().filter_map(|entry| entry.mark.as_deref())
    }
}

impl Entry {
    fn is_barrier(&self) -> bool {
        self.flags & (FLUSH | FUA) != 0
    }

    fn sectors(&self, log: &Log) -> u64 {
        (self.extent.end - self.extent.start) / log.sector
    }

    /// Does to the image what this entry did to the disk, but only to the sectors, counted from its first, that `keep`
    /// says.
    fn apply(&self, log: &Log, image: &File, keep: impl Fn(u64) -> bool) {
        for from in self.extent.clone().step_by(MIB as usize) {
            let len = usize::try_from((self.extent.end - from).min(MIB)).unwrap();
            let (mut old, mut new) = (vec![0; len], vec![DISCARDED; len]);
            image.read_exact_at(&mut old, from).unwrap();
            if self.flags & DISCARD == 0 {
                log.file.read_exact_at(&mut new, self.data + (from - self.extent.start)).unwrap();
            }
            let first = (from - self.extent.start) / log.sector;
            let sectors =
                old.chunks_exact_mut(log.sector as usize).zip(new.chunks_exact(log.sector as usize));
            for (sector, (old, new)) in (first..).zip(sectors) {
                if keep(sector) {
                    old.copy_from_slice(new);
                }
            }
            image.write_all_at(&old, from).unwrap();
        }
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Enough randomness to choose sectors, the same in every run (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// The length of a file or a device.
fn size(mut file: &File) -> u64 {
    file.seek(SeekFrom::End(0)).unwrap()
}

/// Makes `to` a copy of `from`, with holes where there are zeros.
pub fn copy(from: &File, to: &File) {
    const STEP: usize = 64 << 10;
    let (size, mut bytes) = (size(from), vec![0; STEP]);
    to.set_len(0).unwrap();
    to.set_len(size).unwrap();
    for at in (0..size).step_by(STEP) {
        let bytes = &mut bytes[..usize::try_from((size - at).min(STEP as u64)).unwrap()];
        from.read_exact_at(bytes, at).unwrap();
        if *bytes != [0; STEP][..bytes.len()] {
            to.write_all_at(bytes, at).unwrap();
        }
    }
}

#[cfg(test)]
mod tests;
