//! ext2, ext3 and ext4 on images that the distribution's tools and the kernel made, held against these tools.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mt_agent::error::IoError;
use mt_agent::layout::ranges::Ranges;
use mt_agent::layout::view::View;
use mt_agent::layout::{Allocation, Error, FileSystem, State, ext4};
use mt_agent::storage::ReadAt;
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
            support::wait_until_unclaimed(disk.node());
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

/// Holds the map of an image with a journal to replay against what is free when `e2fsck` did that.
#[track_caller]
fn replay_by_e2fsck(image: &Path, dir: &Path, what: &str) {
    let free = free(&ours(image));
    let replayed = dir.join("replayed.img");
    copy(image, &replayed);
    let mut e2fsck = Command::new("e2fsck");
    let output = e2fsck.args(["-y", "-E", "journal_only"]).arg(&replayed).output().unwrap();
    // It ends with 1 where it changed something, and with 0 where it failed.
    let said = String::from_utf8(output.stderr).unwrap();
    let failed = said.contains("while recovering") || !matches!(output.status.code(), Some(0 | 1));
    assert!(!failed, "{what}: {said}");
    let (_, theirs) = dumpe2fs(&replayed);
    assert_eq!(free.subtract(&theirs), Ranges::new(), "{what}: free, and not after the replay");
    assert_eq!(theirs.subtract(&free), Ranges::new(), "{what}: used, and not after the replay");
}

/// The same against what the kernel makes of it where all that is free is zeros. Gives whether nothing but the journal told
/// of some of it: what lay in the bitmaps' places was not the truth.
fn replay_by_kernel(image: &Path, written: &Written, dir: &Path, what: &str) -> bool {
    let found = ours(image);
    assert_eq!(found.state, Some(State::JournalToReplay), "{what}");
    let free = free(&found);
    let (_, stale) = dumpe2fs(image);

    let replayed = dir.join("replayed.img");
    copy(image, &replayed);
    assert!(zero(&replayed, &free) > MIB);
    let disk = Loop::attach(&replayed, 512);
    let mount = Mount::new(disk.node(), &dir.join("again"));
    written.check(&dir.join("again"), what);
    drop(mount);
    support::wait_until_unclaimed(disk.node());
    drop(disk);
    tool("e2fsck", &["-fn", replayed.to_str().unwrap()]);
    compare(&replayed, &format!("{what}, replayed by the kernel"));
    stale.subtract(&free).bytes() > 0
}

/// Runs `work` on a new file system some times, and each time holds a copy of what is on its disk against the replay. Says
/// how many of these copies had a log that goes round.
fn dirty(args: &str, size: u64, options: &str, rounds: usize) -> usize {
    dirty_after(args, size, options, rounds, |_| {})
}

/// The same on a file system to which something was done before.
fn dirty_after(args: &str, size: u64, options: &str, rounds: usize, prepare: impl FnOnce(&Path)) -> usize {
    let dir = directory();
    let what = format!("mke2fs {args}, -o {options}");
    let (image, taken) = (sparse(&dir.path().join("source.img"), size), dir.path().join("taken.img"));
    mke2fs(&image, args);
    prepare(&image);
    let disk = Loop::attach(&image, 512);
    // Nothing is written but what is asked for.
    let mount = Mount::with(disk.node(), &dir.path().join("mnt"), &format!("commit=900,{options}"));
    let mut written = Written::new(&dir.path().join("mnt"));
    let (mut round_the_end, mut stale, mut round) = (0, false, 0);
    // The kernel writes the bitmaps in its own time, and may have done so in one round or another.
    while round < rounds || (!stale && round < rounds + 5) {
        written.work(round);
        copy(&image, &taken);
        round_the_end += usize::from(wraps(&taken));
        let what = format!("{what}, round {round}");
        replay_by_e2fsck(&taken, dir.path(), &what);
        stale |= replay_by_kernel(&taken, &written, dir.path(), &what);
        round += 1;
    }
    assert!(stale, "{what}: the bitmaps were written, and this shows nothing");
    drop(mount);
    support::wait_until_unclaimed(disk.node());
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

/// The numbers of transactions have 32 bits, and go on at 0.
#[test]
fn numbers_of_transactions_that_go_round_are_followed() {
    require_root!();
    let number = |image: &Path| {
        let block: u64 = tool("debugfs", &["-R", "bmap <8> 0", image.to_str().unwrap()]).parse().unwrap();
        let file = OpenOptions::new().write(true).open(image).unwrap();
        file.write_all_at(&(u32::MAX - 3).to_be_bytes(), block * 4096 + 0x18).unwrap();
    };
    dirty_after("-t ext3 -b 4096", 256 * MIB, "data=ordered", 1, number);
}

/// Journals that this kernel does not write, by `debugfs`: transactions with what lies in the places of bitmaps and
/// descriptors after a file was written, or lay there before.
#[test]
fn each_kind_of_transaction_is_followed_as_e2fsck_does() {
    require_root!();
    let dir = directory();
    let scripts: &[&[&str]] = &[
        &["jw -b LIST NEW"],
        &["jw -c -b LIST NEW"],
        &["jw -b LIST NEW", "jw -b LIST OLD"],
        &["jw -b LIST NEW", "jw -c -b LIST OLD"],
        &["jw -b LIST OLD", "jw -b LIST NEW", "jw -b LIST OLD", "jw -b LIST NEW"],
        &["jw -b LIST NEW", "jw -r LIST OLD"],
        &["jw -b LIST NEW", "jw -c -r LIST OLD"],
        &["jw -b LIST NEW", "jw -r LIST OLD", "jw -b LIST NEW"],
        &["jw -r LIST OLD", "jw -b LIST NEW"],
        &["jw -b LIST -r LIST NEW"],
    ];
    for (features, open) in [
        ("^metadata_csum", "jo"),
        ("^metadata_csum,^64bit", "jo"),
        ("^metadata_csum", "jo -c"),
        ("^metadata_csum,^64bit", "jo -c"),
        ("metadata_csum", "jo -c -v 2"),
        ("metadata_csum,^64bit", "jo -c -v 2"),
        ("metadata_csum", "jo -c -v 3"),
        ("metadata_csum,^64bit", "jo -c -v 3"),
    ] {
        let (old, new, image) = (dir.path().join("old"), dir.path().join("new"), dir.path().join("image"));
        sparse(&old, 64 * MIB);
        mke2fs(&old, &format!("-t ext4 -b 1024 -O {features}"));
        copy(&old, &new);
        let disk = Loop::attach(&new, 512);
        let mount = Mount::new(disk.node(), &dir.path().join("mnt"));
        fs::write(dir.path().join("mnt/file"), content(0, 3 << 20)).unwrap();
        drop(mount);
        support::wait_until_unclaimed(disk.node());
        drop(disk);
        assert!(free(&ours(&old)).subtract(&free(&ours(&new))).bytes() >= 3 << 20);
        // All blocks of descriptors and bitmaps that differ, but for the superblock.
        let [before, after] = [&old, &new].map(|path| fs::read(path).unwrap());
        let groups = tool("dumpe2fs", &[old.to_str().unwrap()]);
        let mut blocks: Vec<usize> = groups
            .lines()
            .flat_map(|line| [" Block bitmap at ", "Inode bitmap at "].map(|key| line.split_once(key)))
            .flatten()
            .map(|(_, rest)| rest.split([' ', ',']).next().unwrap().parse().unwrap())
            .collect();
        blocks.push(2);
        let slice = |bytes: &[u8], block: usize| bytes[block * 1024..(block + 1) * 1024].to_vec();
        blocks.retain(|block| slice(&before, *block) != slice(&after, *block));
        assert!(blocks.len() > 1);
        let path = |name: &str| dir.path().join(name);
        for (name, bytes) in [("OLD", &before), ("NEW", &after)] {
            let all: Vec<u8> = blocks.iter().flat_map(|block| slice(bytes, *block)).collect();
            fs::write(path(name), all).unwrap();
        }
        let list: Vec<String> = blocks.iter().map(usize::to_string).collect();
        for script in scripts {
            // The checksum of a transaction with revocations is one that `e2fsck` itself does not take.
            if open == "jo -c" && script.iter().any(|line| line.contains("-r")) {
                continue;
            }
            let text = format!("{open}\n{}\njc\n", script.join("\n"))
                .replace("LIST", &list.join(","))
                .replace("NEW", path("NEW").to_str().unwrap())
                .replace("OLD", path("OLD").to_str().unwrap());
            fs::write(path("commands"), text).unwrap();
            copy(&old, &image);
            let commands = path("commands");
            tool("debugfs", &["-w", "-f", commands.to_str().unwrap(), image.to_str().unwrap()]);
            let what = format!("{features}, {open}, {script:?}");
            replay_by_e2fsck(&image, dir.path(), &what);
            // And it was one or the other.
            let found = free(&ours(&image));
            let expected = match script.last().unwrap() {
                line if line.contains("-c") => script.len() == 2,
                line => line.contains("NEW") && !line.contains("-r"),
            };
            let one = if expected { &new } else { &old };
            assert_eq!(found, free(&ours(one)), "{what}");
        }
    }
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
    support::wait_until_unclaimed(disk.node());
    drop(disk);
    // What they were is still there, and stale.
    compare(&image, "fast commits, unmounted");
    let disk = Loop::attach(&image, 512);
    let mount = Mount::with(disk.node(), &dir.path().join("mnt"), "commit=900");
    let mut written = Written::new(&dir.path().join("mnt"));
    written.write("one", content(1, 3 << 20));
    copy(&image, &taken);
    // This is more than `e2fsck` 1.47 can do.
    assert!(replay_by_kernel(&taken, &written, dir.path(), "stale fast commits"));
    drop(mount);
    support::wait_until_unclaimed(disk.node());
}

/// An image in memory, of which some bytes are others.
struct Patched<'a>(&'a [u8], &'a [(usize, &'a [u8])]);

impl ReadAt for Patched<'_> {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let from = offset as usize;
        buf.copy_from_slice(&self.0[from..from + buf.len()]);
        for (at, patch) in self.1 {
            for (at, byte) in (*at..).zip(*patch) {
                if let Some(found) = at.checked_sub(from).and_then(|at| buf.get_mut(at)) {
                    *found = *byte;
                }
            }
        }
        Ok(())
    }
}

fn parse(disk: Patched<'_>) -> Result<Option<FileSystem>, Error> {
    ext4::read(&View::new(&disk))
}

/// What it comes to: `known`, or why not, with the notes.
fn verdict(image: &[u8], patches: &[(usize, &[u8])]) -> String {
    match parse(Patched(image, patches)) {
        Err(why) => format!("error: {why}"),
        Ok(None) => "nothing".to_owned(),
        Ok(Some(found)) => match found.allocation {
            Allocation::Known(_) => format!("known {}", found.notes.join(", ")),
            Allocation::Whole { why } => format!("whole: {why} {}", found.notes.join(", ")),
        },
    }
}

/// An image in memory, and where some of its structures lie.
struct Image {
    bytes: Vec<u8>,
    block: usize,
    journal: usize,
    inode: usize,
    bitmap: usize,
    descriptors: usize,
}

fn image(args: &str, size: u64) -> Image {
    let dir = directory();
    let path = sparse(&dir.path().join("image"), size);
    mke2fs(&path, args);
    load(&path)
}

fn load(path: &Path) -> Image {
    let text = tool("dumpe2fs", &[path.to_str().unwrap()]);
    let number = |key: &str| -> usize {
        let rest = text.lines().find_map(|line| line.trim().strip_prefix(key)).unwrap();
        rest.trim_start_matches([':', ' ', '\t']).split([' ', ',', '-']).next().unwrap().parse().unwrap()
    };
    let block = number("Block size");
    let journal = match text.contains("has_journal") {
        true => tool("debugfs", &["-R", "bmap <8> 0", path.to_str().unwrap()]).parse().unwrap(),
        false => 0,
    };
    Image {
        bytes: fs::read(path).unwrap(),
        block,
        journal: journal * block,
        inode: number("Inode table at ") * block + 7 * number("Inode size"),
        bitmap: number("Block bitmap at ") * block,
        descriptors: (1024 / block + 1) * block,
    }
}

impl Image {
    #[track_caller]
    fn with(&self, patches: &[(usize, &[u8])], expected: &str) {
        let found = verdict(&self.bytes, patches);
        assert!(found.contains(expected), "{patches:?}: `{found}` and not `{expected}`");
    }
}

#[test]
fn each_field_that_is_wrong_is_noticed() {
    let new = image("-t ext4 -b 1024 -O ^metadata_csum,^uninit_bg", 32 * MIB);
    assert_eq!(verdict(&new.bytes, &[]).trim(), "known");
    let sb = |at: usize, patch: &[u8], expected: &str| new.with(&[(1024 + at, patch)], expected);
    sb(0x00, &[1], "a number of inodes that is not that of its groups");
    sb(0x04, &[0, 0, 0, 0], "impossible number of blocks");
    sb(0x04, &[1], "larger than its place");
    sb(0x0c, &[0xff; 4], "impossible number of blocks");
    sb(0x14, &[0], "an impossible first block");
    sb(0x14, &[2], "an impossible first block");
    sb(0x18, &[7], "an impossible size of blocks");
    sb(0x18, &[32], "an impossible size of blocks");
    sb(0x18, &[1], "an impossible size of clusters");
    sb(0x1c, &[1], "an impossible size of clusters");
    sb(0x1c, &[0xff; 4], "an impossible size of clusters");
    sb(0x20, &[8], "an impossible number of blocks in a group");
    sb(0x24, &[0; 4], "an impossible number of clusters in a group");
    sb(0x24, &[1], "an impossible number of clusters in a group");
    sb(0x24, &[8, 0x20], "an impossible number of clusters in a group");
    sb(0x28, &[0; 4], "an impossible number of inodes in a group");
    sb(0x28, &[0xff; 4], "an impossible number of inodes in a group");
    sb(0x38, &[0], "the primary superblock is gone");
    sb(0x3a, &[0], "a file system that was not unmounted");
    sb(0x3a, &[3], "a file system in which errors were found");
    sb(0x4c, &[0], "of the first revision that has features");
    sb(0x58, &[0, 2], "a journal that is no file");
    sb(0x58, &[127, 0], "an impossible size of inodes");
    sb(0x58, &[64, 0], "an impossible size of inodes");
    sb(0x58, &[0, 8], "an impossible size of inodes");
    sb(0x5c, &[0xff], "the feature lazy_bg");
    sb(0x60, &[0xc3], "the feature compression");
    sb(0x63, &[0x80], "the feature FEATURE_I31");
    sb(0x66, &[0x10], "the feature FEATURE_R20");
    sb(0x61, &[0x22], "a seed of checksums, and no checksums");
    sb(0x65, &[0x06], "checksums of an unknown kind");
    new.with(&[(1024 + 0x65, &[0x06]), (1024 + 0x175, &[1])], "a superblock whose checksum does not hold");
    sb(0xe0, &[0], "a journal on a device of its own");
    sb(0xe0, &[9], "a journal in the inode 9");
    sb(0xfe, &[63], "an impossible size of descriptors");
    sb(0xfe, &[0], "an impossible size of descriptors");
    new.with(&[(1024 + 0x5c, &[0x38]), (1024 + 0x60, &[0xc6])], "with a journal to replay, and none");
    image("-t ext4 -b 1024 -O ^metadata_csum,^64bit", 32 * MIB)
        .with(&[(1024 + 0x150, &[1])], "a number of blocks that has more than 32 bits");

    let gd = |at: usize, patch: &[u8], expected: &str| new.with(&[(new.descriptors + at, patch)], expected);
    for at in [0, 4, 8, 0x20, 0x24, 0x28] {
        gd(at, &[0xff; 4], "a group whose bitmaps or inodes lie where they cannot");
    }
    for at in [0, 4, 8] {
        gd(at, &[0; 4], "a group whose bitmaps or inodes lie where they cannot");
    }
    let last = u32::to_le_bytes(32 * 1024 - 20);
    gd(0, &last, "a group whose count of free blocks is not that of its bitmap");
    gd(4, &last, "metadata in blocks that its bitmap calls free");
    gd(8, &last, "a group whose bitmaps or inodes lie where they cannot");
    gd(64 + 8, &u32::to_le_bytes(20 * 1024), "metadata in blocks that its bitmap calls free");
    gd(8, &u32::to_le_bytes(20 * 1024), "a journal that is no file");
    gd(0x0c, &[0xff], "a group whose count of free blocks is not that of its bitmap");
    gd(0x2c, &[1], "a group whose count of free blocks is not that of its bitmap");
    let bitmap = |patches: &[(usize, u8)], expected: &str| {
        let patches: Vec<(usize, [u8; 1])> =
            patches.iter().map(|(at, byte)| (new.bitmap + at, [*byte])).collect();
        new.with(&patches.iter().map(|(at, byte)| (*at, &byte[..])).collect::<Vec<_>>(), expected);
    };
    bitmap(&[(0, 0)], "a group whose count of free blocks is not that of its bitmap");
    assert_eq!((new.bytes[new.bitmap], new.bytes[new.bitmap + 1000]), (0xff, 0));
    // As many as before, and others.
    bitmap(&[(0, 0), (1000, 0xff)], "metadata in blocks that its bitmap calls free");

    let inode = |at: usize, patch: &[u8], expected: &str| new.with(&[(new.inode + at, patch)], expected);
    inode(0, &[0, 0x40], "a journal that is no file");
    inode(4, &[0, 0, 0, 0x7f], "a journal that is shorter than it says");
    inode(0x6c, &[1], "a journal that is shorter than it says");
    inode(0x6c, &[0x10], "a journal of 6");
    inode(0x20, &[0; 4], "a journal with holes, or blocks beyond the end");
    inode(0x28, &[0], "a node of an extent tree that is none");
    inode(0x2a, &[9], "a node of an extent tree that is none");
    inode(0x2e, &[6], "an extent tree that is too deep");
    inode(0x2e, &[1], "an extent tree");
    inode(0x34, &[1], "a journal with holes, or blocks beyond the end");
    inode(0x38, &[1, 0x80], "a journal in blocks that were never written");
    inode(0x3a, &[1], "a journal with holes, or blocks beyond the end");
    inode(0x3c, &[0xff; 4], "a journal with holes, or blocks beyond the end");
    inode(0x3c, &[0; 4], "a journal with holes, or blocks beyond the end");

    let journal = |at: usize, patch: &[u8], expected: &str| new.with(&[(new.journal + at, patch)], expected);
    journal(0, &[0], "a journal without its magic");
    journal(7, &[2], "a journal whose first block is no superblock");
    journal(0x0e, &[8], "a journal whose blocks are not those of its file system");
    journal(0x10, &[1], "a journal that is longer than its file");
    journal(0x10, &[0, 0, 0, 1], "a journal without a log");
    journal(0x14, &[0; 4], "a journal without a log");
    journal(0x1c, &[0, 0, 0, 1], "a journal to replay that its file system knows nothing of");
    journal(0x1c, &[1], "a journal whose log begins outside of it");
    journal(0x23, &[5], "a journal that was given up for an error");
    journal(0x28, &[0x80], "a journal with the feature 0x80000000");
    journal(0x2f, &[1], "a journal with the feature 0x1");
    journal(0x2b, &[0x18], "a journal with checksums of several kinds");
    journal(0x2b, &[0x10], "a journal with checksums of an unknown kind");
    new.with(
        &[(new.journal + 0x2b, &[0x10]), (new.journal + 0x50, &[4])],
        "a journal whose superblock's checksum does not hold",
    );
    // A large enough area of fast commits leaves no room for it.
    new.with(
        &[(new.journal + 0x2b, &[0x20]), (new.journal + 0x54, &[0, 0, 0x0e, 0])],
        "a journal without a log",
    );
}

/// An image whose journal has two transactions, the second with revocations where `revoke`; no block of it changes.
fn journalled(features: &str, open: &str, revoke: bool) -> Image {
    let dir = directory();
    let path = sparse(&dir.path().join("image"), 16 * MIB);
    mke2fs(&path, &format!("-t ext4 -b 1024 -J size=1 -O {features}"));
    let (commands, blocks) = (dir.path().join("commands"), dir.path().join("blocks"));
    fs::write(&blocks, &fs::read(&path).unwrap()[2048..3072]).unwrap();
    let second = if revoke { "-r 9000,9001" } else { "-b 2" };
    let blocks = blocks.display();
    fs::write(&commands, format!("{open}\njw -b 2 {blocks}\njw {second} {blocks}\njc\n")).unwrap();
    tool("debugfs", &["-w", "-f", commands.to_str().unwrap(), path.to_str().unwrap()]);
    load(&path)
}

#[test]
fn each_part_of_a_journal_that_is_wrong_is_noticed() {
    // Block 1: a descriptor, 2: what it is for, 3: the commit, 4: revocations, 5: the commit.
    let new = journalled("^metadata_csum,^64bit", "jo", true);
    assert_eq!(verdict(&new.bytes, &[]).trim(), "known");
    let log = |block: usize, at: usize, patch: &[u8], expected: &str| {
        new.with(&[(new.journal + block * 1024 + at, patch)], expected);
    };
    log(1, 7, &[9], "a block of the journal that is of no kind");
    log(1, 12 + 7, &[4], "a tag of the journal with an unknown flag");
    log(1, 12, &[0, 0, 64, 0], "a journal with a block for where none can be");
    log(1, 12, &u32::to_be_bytes(u32::try_from(new.journal / 1024).unwrap()), "for where none can be");
    log(4, 12, &[0, 0, 4, 1], "a block of revocations that is longer than a block");
    log(4, 12, &[0, 0, 0, 15], "a block of revocations that is longer than a block");
    // The end of the log is where something else lies: no transaction, one of another number, one that does not end.
    for (block, at) in [(1, 0), (1, 11), (3, 0), (3, 11), (4, 0), (5, 0)] {
        log(block, at, &[0xff], "known");
    }
    // Descriptors wherever it is looked.
    let mut round = new.bytes.clone();
    let mut descriptor = round[new.journal + 1024..new.journal + 2048].to_vec();
    descriptor[12 + 7] &= !8;
    descriptor[36..].fill(0);
    for block in 1..1024 {
        round[new.journal + block * 1024..new.journal + (block + 1) * 1024].copy_from_slice(&descriptor);
    }
    let found = verdict(&round, &[]);
    assert!(found.contains("a journal whose log has no end"), "{found}");

    for (features, open) in [
        ("metadata_csum", "jo -c -v 3"),
        ("metadata_csum,^64bit", "jo -c -v 3"),
        ("metadata_csum", "jo -c -v 2"),
        ("metadata_csum,^64bit", "jo -c -v 2"),
    ] {
        let new = journalled(features, open, true);
        assert_eq!(verdict(&new.bytes, &[]).trim(), "known");
        for (block, expected) in [
            (1, "a block of the journal whose checksum does not hold"),
            (2, "a block in the journal whose checksum does not hold"),
            (3, "a transaction whose checksum does not hold"),
            (4, "a block of the journal whose checksum does not hold"),
            (5, "a transaction whose checksum does not hold"),
        ] {
            for at in (if block == 2 { 0 } else { 12 }..1024).step_by(17) {
                let at = new.journal + block * 1024 + at;
                new.with(&[(at, &[new.bytes[at] ^ 0x40])], expected);
            }
        }
    }
    let new = journalled("^metadata_csum", "jo -c", false);
    assert_eq!(verdict(&new.bytes, &[]).trim(), "known");
    for (block, at) in [(1, 900), (2, 3), (2, 1023), (3, 12), (3, 13), (3, 16), (5, 500)] {
        let at = new.journal + block * 1024 + at;
        new.with(&[(at, &[new.bytes[at] ^ 0x40])], "a transaction whose checksum does not hold");
    }
}

#[test]
fn what_is_mounted_is_only_known_where_that_is_on_its_disk() {
    require_root!();
    let dir = directory();
    let (image, path) = (sparse(&dir.path().join("image"), 128 * MIB), dir.path().join("mnt"));
    for (args, journal) in [("-t ext4", true), ("-t ext4 -O ^has_journal", false), ("-t ext2", false)] {
        mke2fs(&image, args);
        let disk = Loop::attach(&image, 512);
        let mount = Mount::new(disk.node(), &path);
        let mut written = Written::new(&path);
        written.write("file", content(1, 5 << 20));
        if journal {
            assert_eq!(ours(&image).state, Some(State::JournalToReplay), "{args}");
            let frozen = support::Frozen::new(&path);
            compare(&image, "frozen");
            drop(frozen);
        } else {
            let found = ours(&image);
            assert_eq!(found.state, Some(State::NotUnmounted), "{args}");
            assert_eq!(why(&found), "a file system that was not unmounted cannot be followed", "{args}");
        }
        drop(mount);
        support::wait_until_unclaimed(disk.node());
    }
    // A journal elsewhere.
    let elsewhere = sparse(&dir.path().join("journal"), 16 * MIB);
    mke2fs(&elsewhere, "-b 4096 -O journal_dev");
    let device = Loop::attach(&elsewhere, 512);
    mke2fs(&image, &format!("-t ext4 -b 4096 -J device={}", device.node().display()));
    assert_eq!(why(&ours(&image)), "a journal on a device of its own cannot be followed");
    assert!(read(&elsewhere).unwrap().is_none());
}

#[test]
fn each_byte_that_a_checksum_covers_is_noticed() {
    for args in
        ["-t ext4 -b 1024", "-t ext4 -b 1024 -O ^64bit", "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg"]
    {
        let new = image(&format!("{args} -g 1024 -J size=1"), 8 * MIB);
        assert_eq!(verdict(&new.bytes, &[]).trim(), "known");
        let descriptor = if args.contains("^64bit") { 32 } else { 64 };
        for at in 0..3 * descriptor {
            let at = new.descriptors + at;
            new.with(&[(at, &[!new.bytes[at]])], "whole: a group's descriptor whose checksum does not hold");
        }
        if args.contains("^metadata_csum") {
            continue;
        }
        for at in (0..128).step_by(3) {
            let at = new.bitmap + at;
            new.with(&[(at, &[new.bytes[at] ^ 4])], "whole: a block bitmap whose checksum does not hold");
        }
        for at in (0..160).step_by(3) {
            let at = new.inode + at;
            new.with(&[(at, &[new.bytes[at] ^ 4])], "a journal whose inode's checksum does not hold");
        }
    }
}

#[test]
fn a_copy_serves_where_the_primary_superblock_is_lost() {
    for (args, size) in [
        ("-t ext4 -b 1024 -L copies", 32 * MIB),
        ("-t ext4 -b 4096 -L copies", 300 * MIB),
        ("-t ext4 -b 2048 -L copies -O meta_bg,^resize_inode", 300 * MIB),
        ("-t ext4 -b 1024 -L copies -O sparse_super2,^resize_inode", 32 * MIB),
    ] {
        let new = image(args, size);
        let whole = |bytes: &[u8]| parse(Patched(bytes, &[])).unwrap().unwrap();
        let before = whole(&new.bytes);
        // Something in it is wrong: the map is what it was, as all of it is proven.
        let mut bytes = new.bytes.clone();
        bytes[1024 + 0x28] ^= 1;
        let found = whole(&bytes);
        assert_eq!(free(&found), free(&before), "{args}");
        let same = |found: &FileSystem| {
            assert_eq!((found.kind, &found.uuid, &found.label), ("ext4", &before.uuid, &before.label));
            assert_eq!((found.size, found.block_size, found.state), (before.size, before.block_size, None));
            assert_eq!(found.features, before.features);
        };
        same(&found);
        assert!(found.notes[0].starts_with("the primary superblock is damaged: a superblock whose checksum"));
        assert!(found.notes[0].contains("; read from the copy at byte "), "{:?}", found.notes);
        // It may be another one's.
        bytes[1024 + 0x68] ^= 1;
        assert_eq!(why(&whole(&bytes)), "a file system whose primary superblock is damaged (at byte 1024)");
        bytes[1024..2048].fill(0);
        let found = whole(&bytes);
        same(&found);
        assert_eq!(why(&found), "a file system whose primary superblock is gone (at byte 1024)");
    }
    // Without checksums nothing is proven.
    let mut new = image("-t ext4 -b 1024 -O ^metadata_csum", 32 * MIB);
    new.bytes[1024 + 0x28] = 1;
    assert!(verdict(&new.bytes, &[]).starts_with("whole: a file system whose primary superblock is damaged"));
    // A journal to replay is known to the primary alone.
    let new = image("-t ext4 -b 1024", 32 * MIB);
    new.with(&[(1024 + 0x28, &[1]), (new.journal + 0x1f, &[1])], "a journal to replay that its file system");
}

#[test]
fn what_damage_comes_by_chance_is_survived_and_none_of_it_frees_what_is_used() {
    use rand::{RngExt, SeedableRng};
    let mut random = rand::rngs::StdRng::seed_from_u64(4);
    for (args, proven) in [
        ("-t ext4 -b 1024 -J size=1", true),
        ("-t ext4 -b 1024 -J size=1 -O ^64bit,bigalloc -C 4096", true),
        ("-t ext4 -b 1024 -J size=1 -O ^metadata_csum,uninit_bg,meta_bg,^resize_inode", false),
        ("-t ext3 -b 1024 -J size=1", false),
    ] {
        let new = image(args, 16 * MIB);
        let truth = free(&parse(Patched(&new.bytes, &[])).unwrap().unwrap());
        // Where metadata lies: all blocks that are not zeros.
        let places: Vec<usize> = (0..new.bytes.len())
            .step_by(new.block)
            .filter(|at| new.bytes[*at..at + new.block] != [0; 1024])
            .collect();
        let before = support::cpu();
        for _ in 0..2000 {
            let damage: Vec<(usize, [u8; 1])> = (0..random.random_range(1..6))
                .map(|_| {
                    let place = places[random.random_range(0..places.len())];
                    (place + random.random_range(0..new.block), [random.random()])
                })
                .collect();
            let patches: Vec<(usize, &[u8])> = damage.iter().map(|(at, byte)| (*at, &byte[..])).collect();
            if let Ok(Some(found)) = parse(Patched(&new.bytes, &patches))
                && let Allocation::Known(used) = &found.allocation
                && proven
            {
                let free = used.complement(Extent::new(0, found.size.0).unwrap());
                assert_eq!(free.subtract(&truth), Ranges::new(), "{args}: {damage:?}");
            }
        }
        let spent = support::cpu() - before;
        assert!(spent < Duration::from_secs(60), "{args}: {spent:?}");
    }
}

#[test]
fn the_map_of_some_tebibytes_takes_a_moment_and_little_memory() {
    let dir = directory();
    // With most bitmaps never written, and with all of them written.
    for (tebibytes, args) in
        [(2, "-O metadata_csum"), (2, "-O ^metadata_csum,^uninit_bg -N 300000"), (8, "-O metadata_csum")]
    {
        let path = sparse(&dir.path().join("image"), tebibytes << 40);
        mke2fs(&path, &format!("-t ext4 {args} -E lazy_journal_init=1"));
        let before = support::cpu();
        let found = ours(&path);
        let spent = support::cpu() - before;
        assert!(free(&found).bytes() > (tebibytes * 1000) << 30);
        // In less than 2 s when this program is optimised and alone.
        assert!(spent < Duration::from_secs(20), "{args}: {spent:?}");
        let program = env!("CARGO_BIN_EXE_mt-agent");
        let script = format!("ulimit -v {}; {program} inspect {}", 100 << 10, path.display());
        let shown = tool("sh", &["-c", &script]);
        assert!(shown.contains("proven free"), "{shown}");
    }
}

/// What was grown, shrunk and converted has a history that none of those of `mke2fs` has.
#[test]
fn the_map_is_that_of_dumpe2fs_after_resizes_and_conversions() {
    require_root!();
    let dir = directory();
    let (image, path) = (dir.path().join("image"), dir.path().join("mnt"));
    let node = image.to_str().unwrap();
    let e2fsck = || {
        // It ends with 1 where there was something to do, as there is after some conversions.
        let status = Command::new("e2fsck").args(["-fyD", node]).output().unwrap().status;
        assert!(matches!(status.code(), Some(0 | 1)), "{status}");
    };
    let fill = || {
        let disk = Loop::attach(&image, 512);
        let mount = Mount::new(disk.node(), &path);
        fragment(&path);
        // Its names are free for the next time.
        fs::rename(path.join("d"), path.join(format!("d{}", fs::read_dir(&path).unwrap().count()))).unwrap();
        drop(mount);
        support::wait_until_unclaimed(disk.node());
    };
    let offline: &[(&str, u64, &[&[&str]])] = &[
        ("-t ext4 -b 1024", 64, &[&["resize2fs", "IMG", "150M"], &["resize2fs", "-M", "IMG"]]),
        ("-t ext3 -b 4096", 200, &[&["resize2fs", "IMG", "300M"], &["resize2fs", "IMG", "190M"]]),
        ("-t ext4 -b 4096 -O ^64bit", 200, &[&["resize2fs", "-b", "IMG"], &["resize2fs", "-s", "IMG"]]),
        ("-t ext4 -b 4096 -O sparse_super2,^resize_inode", 300, &[&["resize2fs", "IMG", "500M"]]),
        (
            "-t ext4 -b 4096 -O ^metadata_csum,uninit_bg",
            200,
            &[&["tune2fs", "-O", "metadata_csum", "IMG"], &["tune2fs", "-O", "^has_journal", "IMG"]],
        ),
        (
            "-t ext2 -b 1024 -I 128",
            60,
            &[
                &["tune2fs", "-j", "IMG"],
                &["tune2fs", "-I", "256", "IMG"],
                &["tune2fs", "-O", "extent,uninit_bg,flex_bg,dir_nlink", "IMG"],
                &["tune2fs", "-O", "metadata_csum", "IMG"],
                &["tune2fs", "-O", "metadata_csum_seed", "IMG"],
                &["tune2fs", "-U", "random", "IMG"],
            ],
        ),
    ];
    for (args, size, steps) in offline {
        sparse(&image, size * MIB);
        mke2fs(&image, args);
        fill();
        for step in *steps {
            e2fsck();
            let file = OpenOptions::new().write(true).open(&image).unwrap();
            file.set_len(600 * MIB).unwrap();
            let words: Vec<&str> = step.iter().map(|word| if *word == "IMG" { node } else { word }).collect();
            tool(words[0], &words[1..]);
            e2fsck();
            compare(&image, &format!("{args}, {step:?}"));
            if !step.contains(&"-M") {
                fill();
                compare(&image, &format!("{args}, {step:?}, fragmented"));
            }
        }
    }
}
