//! ext2, ext3 and ext4 on images that the distribution's tools and the kernel made, held against these tools.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mt_agent::layout::ranges::Ranges;
use mt_agent::layout::view::View;
use mt_agent::layout::{Allocation, Error, FileSystem, State, ext4};
use mt_agent::storage::file::ReadFile;
use mt_agent::units::Extent;
use support::{GIB, KIB, Loop, MIB, Mount, directory, tool};

fn read(path: &Path) -> Result<Option<FileSystem>, Error> {
    ext4::read(&View::new(&ReadFile::open(path).unwrap()))
}

#[track_caller]
fn ours(path: &Path) -> FileSystem {
    read(path).unwrap().expect("a file system")
}

/// The free ranges, of which it must know.
#[track_caller]
fn free(found: &FileSystem) -> Ranges {
    match &found.allocation {
        Allocation::Known(used) => used.complement(Extent::new(0, found.size.0).unwrap()),
        Allocation::Whole { why } => panic!("wholly used: {why}"),
    }
}

/// Why it says that all of it is used.
#[track_caller]
fn why(found: &FileSystem) -> String {
    match &found.allocation {
        Allocation::Known(used) => panic!("known, with {} bytes", used.bytes()),
        Allocation::Whole { why } => why.to_string(),
    }
}

fn sparse(path: &Path, size: u64) -> PathBuf {
    File::create(path).unwrap().set_len(size).unwrap();
    path.to_owned()
}

fn mke2fs(image: &Path, args: &str) {
    let mut words: Vec<&str> = args.split_whitespace().collect();
    words.extend(["-q", "-F", image.to_str().unwrap()]);
    tool("mke2fs", &words);
}

/// What `dumpe2fs` says: its head as keys and values, and the free blocks of all groups.
fn dumpe2fs(image: &Path) -> (BTreeMap<String, String>, Ranges) {
    let text = tool("dumpe2fs", &[image.to_str().unwrap()]);
    let mut head = BTreeMap::new();
    for line in text.lines() {
        if let Some((key, value)) = line.split_once(':') {
            head.entry(key.to_owned()).or_insert_with(|| value.trim().to_owned());
        }
    }
    let size: u64 = head["Block size"].parse().unwrap();
    let block = |text: &str| -> u64 { text.trim().parse().unwrap() };
    let cluster = head.get("Cluster size").map_or(size, |size| block(size));
    let end = block(&head["Block count"]) * size;
    let lines = text.lines().filter_map(|line| line.strip_prefix("  Free blocks: "));
    let ranges = lines.flat_map(|line| line.split(',')).filter(|range| !range.trim().is_empty());
    let free = ranges
        .map(|range| {
            let (from, to) = range.split_once('-').unwrap_or((range, range));
            // With clusters it names the first block of the last one.
            let (from, to) = (block(from) * size, (block(to) * size + cluster).min(end));
            Extent::new(from, to - from).unwrap()
        })
        .collect();
    (head, free)
}

/// All that is read is what `dumpe2fs` and `blkid` say.
#[track_caller]
fn compare(image: &Path, what: &str) {
    let (head, theirs) = dumpe2fs(image);
    let found = ours(image);
    let our_free = free(&found);
    assert_eq!(our_free.subtract(&theirs), Ranges::new(), "{what}: free, and not for dumpe2fs");
    assert_eq!(theirs.subtract(&our_free), Ranges::new(), "{what}: used, and not for dumpe2fs");
    let blocks = |key: &str| head[key].parse::<u64>().unwrap() * found.block_size.unwrap();
    assert_eq!(found.size.0, blocks("Block count"), "{what}");
    assert_eq!(found.free.unwrap().0, blocks("Free blocks"), "{what}");
    assert_eq!(found.features.join(" "), head["Filesystem features"].replace("(none)", ""), "{what}");
    assert_eq!(found.state, Some(State::Clean), "{what}");
    assert!(found.notes.is_empty(), "{what}: {:?}", found.notes);
    let probed = tool("blkid", &["-p", "-o", "export", image.to_str().unwrap()]);
    let tags: BTreeMap<&str, &str> = probed.lines().filter_map(|line| line.split_once('=')).collect();
    let tag = |key: &str| tags.get(key).map(|value| value.replace('\\', ""));
    assert_eq!(Some(found.kind), tag("TYPE").as_deref(), "{what}");
    assert_eq!(found.version, tag("VERSION"), "{what}");
    assert_eq!(found.uuid, tag("UUID"), "{what}");
    assert_eq!(found.label, tag("LABEL"), "{what}");
}

/// Files of all sizes, of which some are removed again: what is free is in many pieces.
fn fragment(dir: &Path) {
    let name = |index: usize| dir.join(format!("f{index}"));
    let write = |index: usize, len: usize| {
        // It is no harm where the file system is full.
        fs::write(name(index), vec![0x5a; len]).ok();
    };
    for index in 0..120 {
        write(index, 700 * (1 + index * index % 97));
    }
    for index in (0..120).step_by(3) {
        fs::remove_file(name(index)).ok();
    }
    for index in 200..220 {
        write(index, 90_000 + index * 1000);
    }
    fs::create_dir(dir.join("d")).unwrap();
    for index in 0..200 {
        fs::write(dir.join(format!("d/{index}")), [0; 20]).ok();
    }
    // Holes, and blocks that are given out and not written.
    let file = File::create(dir.join("holes")).unwrap();
    for at in 0..40 {
        file.write_all_at(&[1; 5000], at * 100_000).ok();
    }
    file.set_len(GIB).ok();
    Command::new("fallocate").args(["-l", "3M", name(900).to_str().unwrap()]).status().unwrap();
}

/// The same where this kernel does not mount it.
fn fragment_unmounted(image: &Path, dir: &Path) {
    let source = dir.join("source");
    let mut script = String::new();
    for index in 0..40usize {
        fs::write(source.with_extension(index.to_string()), vec![0x5a; 3000 * (1 + index * index % 97)])
            .unwrap();
        script += &format!("write {}.{index} f{index}\n", source.display());
    }
    for index in (0..40).step_by(3) {
        script += &format!("rm f{index}\n");
    }
    let commands = dir.join("commands");
    fs::write(&commands, script).unwrap();
    tool("debugfs", &["-w", "-f", commands.to_str().unwrap(), image.to_str().unwrap()]);
}

/// Arguments of `mke2fs`, and the size in KiB.
const MATRIX: &[(&str, u64)] = &[
    ("-t ext2 -b 1024 -L small", 40 << 10),
    ("-t ext2 -b 4096", 200 << 10),
    ("-t ext2 -b 1024 -r 0 -O none", 40 << 10),
    ("-t ext2 -b 2048 -O ^sparse_super,^resize_inode -I 128", 100 << 10),
    ("-t ext3 -b 1024", 60 << 10),
    ("-t ext3 -b 4096", 300 << 10),
    ("-t ext3 -b 4096 -O ^sparse_super,^resize_inode", 300 << 10),
    ("-t ext3 -b 1024 -O meta_bg,^resize_inode", 200 << 10),
    ("-t ext4", 300 << 10),
    ("-t ext4 -b 1024", 80 << 10),
    ("-t ext4 -b 2048 -m 0", 200 << 10),
    ("-t ext4 -b 4096 -O ^64bit", 300 << 10),
    ("-t ext4 -b 4096 -O ^metadata_csum,uninit_bg", 300 << 10),
    ("-t ext4 -b 1024 -O ^metadata_csum,uninit_bg,^64bit", 150 << 10),
    ("-t ext4 -b 4096 -O ^metadata_csum,^uninit_bg", 300 << 10),
    ("-t ext4 -b 4096 -O ^metadata_csum,^uninit_bg,^64bit,^flex_bg,^extent", 300 << 10),
    ("-t ext4 -b 4096 -O ^flex_bg", 300 << 10),
    ("-t ext4 -b 1024 -O ^flex_bg,^64bit", 150 << 10),
    ("-t ext4 -b 1024 -O ^flex_bg,^metadata_csum,uninit_bg", 150 << 10),
    ("-t ext4 -b 4096 -O meta_bg,^resize_inode", 400 << 10),
    ("-t ext4 -b 1024 -O meta_bg,^resize_inode", 200 << 10),
    ("-t ext4 -b 1024 -O meta_bg,^resize_inode,^flex_bg", 300 << 10),
    ("-t ext4 -b 1024 -O meta_bg,^resize_inode,^64bit,^flex_bg", 300 << 10),
    ("-t ext4 -b 2048 -O meta_bg,^resize_inode,^metadata_csum,uninit_bg", 600 << 10),
    ("-t ext4 -b 4096 -O bigalloc -C 16384", 300 << 10),
    ("-t ext4 -b 4096 -O bigalloc,^64bit -C 65536", 600 << 10),
    ("-t ext4 -b 4096 -O bigalloc -C 1048576", 4 << 20),
    ("-t ext4 -b 1024 -O bigalloc -C 8192", 200 << 10),
    ("-t ext4 -b 2048 -O bigalloc,^metadata_csum,uninit_bg,^flex_bg -C 4096", 200 << 10),
    ("-t ext4 -b 4096 -O sparse_super2,^resize_inode", 500 << 10),
    ("-t ext4 -b 1024 -O sparse_super2,^resize_inode -E num_backup_sb=1", 200 << 10),
    ("-t ext4 -b 1024 -O sparse_super2,^resize_inode,meta_bg -E num_backup_sb=0", 200 << 10),
    ("-t ext4 -b 4096 -O ^has_journal", 300 << 10),
    ("-t ext4 -b 1024 -O ^has_journal,^sparse_super,^resize_inode", 100 << 10),
    ("-t ext4 -b 4096 -O metadata_csum_seed -U 01234567-89ab-cdef-0123-456789abcdef", 200 << 10),
    ("-t ext4 -b 4096 -O inline_data,ea_inode,large_dir,encrypt,casefold,verity,stable_inodes", 200 << 10),
    ("-t ext4 -b 4096 -O quota,project -E quotatype=usrquota:grpquota:prjquota", 200 << 10),
    ("-t ext4 -b 4096 -O mmp", 200 << 10),
    ("-t ext4 -b 4096 -O orphan_file,fast_commit", 200 << 10),
    ("-t ext4 -b 8192", 400 << 10),
    ("-t ext4 -b 16384 -O ^metadata_csum,uninit_bg", 400 << 10),
    ("-t ext4 -b 32768 -O ^64bit", 600 << 10),
    ("-t ext4 -b 65536", 1 << 20),
    ("-t ext2 -b 65536", 6 << 20),
    ("-t ext4 -b 16384 -O bigalloc -C 262144", 1 << 20),
    // Odd sizes: the last group ends anywhere.
    ("-t ext4 -b 1024", (80 << 10) + 333),
    ("-t ext2 -b 1024", (40 << 10) + 1),
    ("-t ext4 -b 4096 -O bigalloc -C 65536", (300 << 10) + 12),
    ("-t ext4 -b 1024 -O ^flex_bg,meta_bg,^resize_inode", (130 << 10) + 3),
    // Other divisions into groups.
    ("-t ext4 -b 4096 -g 2048 -G 4", 300 << 10),
    ("-t ext4 -b 1024 -g 256 -O ^flex_bg", 30 << 10),
    ("-t ext4 -b 4096 -g 1024 -N 300000 -I 512 -G 64", 400 << 10),
    ("-t ext4 -b 4096 -E packed_meta_blocks=1", 600 << 10),
    ("-t ext4 -b 4096 -E lazy_itable_init=0,lazy_journal_init=0,resize=100000000", 300 << 10),
    ("-t ext4 -b 4096 -E desc_size=128", 300 << 10),
];

#[test]
fn the_map_is_that_of_dumpe2fs_whatever_the_features() {
    require_root!();
    let dir = directory();
    let (mut mounted, mut unmounted) = (0, 0);
    for (index, (args, size)) in MATRIX.iter().enumerate() {
        let what = format!("mke2fs {args}, {size} KiB");
        let image = sparse(&dir.path().join(format!("{index}.img")), size * KIB);
        mke2fs(&image, args);
        compare(&image, &format!("{what}, new"));
        let large =
            ["8192", "16384", "32768", "65536"].iter().any(|size| args.contains(&format!("-b {size}")));
        let disk = Loop::attach(&image, 512);
        // Kernels differ in what they mount: blocks larger than their pages, tables of Unicode, quotas.
        if !large && !args.contains("casefold") && !args.contains("quota") {
            let mount = Mount::new(disk.node(), &dir.path().join("mnt"));
            fragment(&dir.path().join("mnt"));
            drop(mount);
            wait_until_unmounted(disk.node());
            mounted += 1;
        } else {
            fragment_unmounted(&image, dir.path());
            unmounted += 1;
        }
        drop(disk);
        compare(&image, &format!("{what}, fragmented"));
        // Not many ranges would mean that it is not fragmented.
        assert!(free(&ours(&image)).count() > 1, "{what}");
        fs::remove_file(&image).unwrap();
    }
    assert!(mounted >= 40 && unmounted >= 6);
}

/// A mount ends when the kernel says so, which may be a moment after the call: `umount` here is lazy.
fn wait_until_unmounted(node: &Path) {
    support::wait_for("the end of a mount", || {
        OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(node).ok()
    });
}

/// The content of a file that differs from all others, and is none that a journal would have to escape.
fn content(index: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 4096 * 13 + index * 31) as u8).collect()
}

/// Files, each of which is on stable storage; there is no `sync`, which would write the bitmaps as well.
struct Written {
    dir: PathBuf,
    files: BTreeMap<String, Vec<u8>>,
}

impl Written {
    fn new(dir: &Path) -> Written {
        Written { dir: dir.to_owned(), files: BTreeMap::new() }
    }

    fn write(&mut self, name: &str, content: Vec<u8>) {
        let mut file = File::create(self.dir.join(name)).unwrap();
        std::io::Write::write_all(&mut file, &content).unwrap();
        file.sync_all().unwrap();
        self.files.insert(name.to_owned(), content);
    }

    /// Files, some of which replace removed ones, in directories that come and go: their blocks were metadata, then hold
    /// data, and are revoked in between.
    fn work(&mut self, round: usize) {
        for index in 0..20usize {
            let index = round * 20 + index;
            self.write(&format!("f{index}"), content(index, 1000 + 20_011 * (index % 17)));
            let dir = self.dir.join(format!("d{index}"));
            fs::create_dir(&dir).unwrap();
            for entry in 0..30 {
                File::create(dir.join(format!("a-rather-long-name-of-an-empty-file-{entry}"))).unwrap();
            }
            if index % 3 == 2 {
                let name = format!("f{}", index - 2);
                fs::remove_file(self.dir.join(&name)).unwrap();
                self.files.remove(&name);
                fs::remove_dir_all(self.dir.join(format!("d{}", index - 1))).unwrap();
            }
            // Blocks that begin as those of a journal do.
            let magic: Vec<u8> = [0xc0, 0x3b, 0x39, 0x98].into_iter().cycle().take(9000).collect();
            self.write(&format!("m{index}"), magic);
        }
    }

    #[track_caller]
    fn check(&self, dir: &Path, what: &str) {
        for (name, content) in &self.files {
            let found = fs::read(dir.join(name)).unwrap_or_else(|error| panic!("{what}: {name}: {error}"));
            assert!(found == *content, "{what}: {name} is not what was written");
        }
    }
}

fn copy(from: &Path, to: &Path) {
    tool("cp", &["--sparse=always", from.to_str().unwrap(), to.to_str().unwrap()]);
}

/// Makes holes of all that is free, and gives how many bytes that were.
fn zero(image: &Path, free: &Ranges) -> u64 {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    let mode =
        nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for range in free.iter() {
        nix::fcntl::fallocate(&file, mode, range.offset() as i64, range.len() as i64).unwrap();
    }
    free.bytes()
}

/// Whether the live part of a journal goes round its end.
fn wraps(image: &Path) -> bool {
    let log = tool("debugfs", &["-R", "logdump", image.to_str().unwrap()]);
    let numbers = log.lines().filter_map(|line| {
        line.strip_prefix("Found expected sequence")?.rsplit(' ').next()?.parse::<u64>().ok()
    });
    let numbers: Vec<u64> = numbers.collect();
    numbers.windows(2).any(|pair| pair[1] < pair[0])
}

/// Holds the map of an image with a journal to replay against what is left when that was done, by `e2fsck` and by the
/// kernel.
fn replay(image: &Path, written: &Written, dir: &Path, what: &str) {
    let found = ours(image);
    assert_eq!(found.state, Some(State::JournalToReplay), "{what}");
    let free = free(&found);
    // Nothing but the journal tells: what lies in the bitmaps' places is not the truth.
    let (_, stale) = dumpe2fs(image);
    assert!(stale.subtract(&free).bytes() > 0, "{what}: the bitmaps were written, and this shows nothing");

    let replayed = dir.join("replayed.img");
    copy(image, &replayed);
    // That ends with 1 where it changed something.
    let status =
        Command::new("e2fsck").args(["-y", "-E", "journal_only"]).arg(&replayed).output().unwrap().status;
    assert!(matches!(status.code(), Some(0 | 1)), "{what}: {status}");
    let (_, theirs) = dumpe2fs(&replayed);
    assert_eq!(free.subtract(&theirs), Ranges::new(), "{what}: free, and not after the replay");
    assert_eq!(theirs.subtract(&free), Ranges::new(), "{what}: used, and not after the replay");

    copy(image, &replayed);
    assert!(zero(&replayed, &free) > MIB);
    let disk = Loop::attach(&replayed, 512);
    let mount = Mount::new(disk.node(), &dir.join("again"));
    written.check(&dir.join("again"), what);
    drop(mount);
    wait_until_unmounted(disk.node());
    drop(disk);
    tool("e2fsck", &["-fn", replayed.to_str().unwrap()]);
    compare(&replayed, &format!("{what}, replayed by the kernel"));
}

/// Runs `work` on a new file system some times, and each time holds a copy of what is on its disk against the replay. Says
/// how many of these copies had a log that goes round.
fn dirty(args: &str, size: u64, options: &str, rounds: usize) -> usize {
    let dir = directory();
    let what = format!("mke2fs {args}, -o {options}");
    let (image, taken) = (sparse(&dir.path().join("source.img"), size), dir.path().join("taken.img"));
    mke2fs(&image, args);
    let disk = Loop::attach(&image, 512);
    // Nothing is written but what is asked for.
    let mount = Mount::with(disk.node(), &dir.path().join("mnt"), &format!("commit=900,{options}"));
    let mut written = Written::new(&dir.path().join("mnt"));
    let mut round_the_end = 0;
    for round in 0..rounds {
        written.work(round);
        copy(&image, &taken);
        round_the_end += usize::from(wraps(&taken));
        replay(&taken, &written, dir.path(), &format!("{what}, round {round}"));
    }
    drop(mount);
    wait_until_unmounted(disk.node());
    round_the_end
}

#[test]
fn a_journal_to_replay_is_a_part_of_the_map() {
    require_root!();
    dirty("-t ext4 -b 4096", 256 * MIB, "data=ordered", 2);
    dirty("-t ext4 -b 4096", 256 * MIB, "data=journal", 2);
    // Without 64 bits, and so with narrower tags.
    dirty("-t ext4 -b 4096 -O ^64bit", 256 * MIB, "data=journal", 1);
    dirty("-t ext4 -b 1024 -O bigalloc -C 8192", 256 * MIB, "data=ordered", 1);
    dirty("-t ext4 -b 1024 -O meta_bg,^resize_inode", 256 * MIB, "data=ordered", 1);
}

#[test]
fn a_journal_without_checksums_or_with_one_for_each_transaction_is_replayed() {
    require_root!();
    dirty("-t ext3 -b 1024", 128 * MIB, "data=ordered", 2);
    dirty("-t ext3 -b 4096", 256 * MIB, "data=journal", 1);
    dirty("-t ext4 -b 4096 -O ^metadata_csum,uninit_bg", 256 * MIB, "data=ordered", 1);
    dirty("-t ext4 -b 4096 -O ^metadata_csum", 256 * MIB, "journal_checksum,data=journal", 1);
    dirty("-t ext4 -b 4096 -O ^metadata_csum,^64bit", 256 * MIB, "journal_async_commit,data=writeback", 1);
}

#[test]
fn a_log_that_goes_round_is_followed() {
    require_root!();
    assert!(dirty("-t ext4 -b 4096 -J size=4", 256 * MIB, "data=journal", 6) > 0);
    assert!(dirty("-t ext3 -b 1024 -J size=1", 128 * MIB, "data=ordered", 8) > 0);
}

#[test]
fn fast_commits_are_not_followed() {
    require_root!();
    let dir = directory();
    let (image, taken) = (sparse(&dir.path().join("source.img"), 256 * MIB), dir.path().join("taken.img"));
    mke2fs(&image, "-t ext4 -b 4096 -O fast_commit");
    let disk = Loop::attach(&image, 512);
    let mount = Mount::with(disk.node(), &dir.path().join("mnt"), "commit=900");
    // The first commit after a mount is never a fast one.
    let path = dir.path().join("mnt/file");
    for round in 0..6usize {
        let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        std::io::Write::write_all(&mut file, &content(round, 100_000)).unwrap();
        file.sync_all().unwrap();
    }
    copy(&image, &taken);
    let log = tool("debugfs", &["-R", "logdump", taken.to_str().unwrap()]);
    assert!(log.contains("Fast Commit Area"), "{log}");
    assert_eq!(why(&ours(&taken)), "a journal with fast commits cannot be followed");
    drop(mount);
    wait_until_unmounted(disk.node());
    drop(disk);
    // What they were is still there, and stale.
    compare(&image, "fast commits, unmounted");
    let disk = Loop::attach(&image, 512);
    let mount = Mount::with(disk.node(), &dir.path().join("mnt"), "commit=900");
    let mut written = Written::new(&dir.path().join("mnt"));
    written.write("one", content(1, 3 << 20));
    copy(&image, &taken);
    replay(&taken, &written, dir.path(), "stale fast commits");
    drop(mount);
    wait_until_unmounted(disk.node());
}
