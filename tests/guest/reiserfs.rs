//! ReiserFS, as the kernel writes it: the fixtures of `tests/fixtures/reiserfs`, the recipe by which they are made
//! anew, that the kernel still reads in each of them what it wrote, and that it does so when all is gone that the map
//! calls free.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use mt_agent::layout::ranges::{Ranges, between};
use mt_agent::layout::tree::{Content, Disk};
use mt_agent::layout::{self, Allocation, FileSystem, State};
use mt_agent::storage::file::ReadFile;
use sha2::{Digest, Sha256};

use crate::harness::small;
use crate::log_writes::{self, LogWrites};
use crate::support::{KIB, Loop, MIB, Mount, Rig, directory, tool};

/// A kind of file system of which there is a fixture.
struct Kind {
    name: &'static str,
    make: fn(&Bench),
    /// What `debugreiserfs` says of it.
    is: &'static [&'static str],
    /// Whether the kernel finds transactions in its journal when it is mounted.
    replays: bool,
}

const KINDS: &[Kind] = &[
    Kind {
        name: "clean",
        make: clean,
        is: &["format 3.6 with standard journal", "is clean"],
        replays: false,
    },
    Kind {
        name: "clean-3.5",
        make: clean_35,
        is: &["format 3.5 with standard journal", "\"tea\""],
        replays: false,
    },
    // In its place the superblock is that of the new file system: it says "clean", but for the journal.
    Kind { name: "dirty", make: dirty, is: &["format 3.6", "is clean", "height: 2"], replays: true },
    Kind { name: "dirty-3.5", make: dirty_35, is: &["format 3.5", "is clean", "height: 2"], replays: true },
    Kind { name: "old-place", make: old_place, is: &["block in block 2 ", "format 3.5"], replays: true },
    Kind {
        name: "dirty-blocks-of-1024",
        make: dirty_small_blocks,
        is: &["Blocksize: 1024", "bitmaps: 5\n", "is clean"],
        replays: true,
    },
    Kind { name: "unclean", make: unclean, is: &["format 3.6", "is NOT clean"], replays: true },
    Kind {
        name: "blocks-of-1024",
        make: small_blocks,
        is: &["Blocksize: 1024", "height: 4"],
        replays: false,
    },
    Kind { name: "fragmented", make: fragmented, is: &["device: 9216\n", "is clean"], replays: false },
    Kind { name: "grown", make: grown, is: &["device: 35840\n", "bitmaps: 2\n"], replays: false },
    Kind { name: "shrunk", make: shrunk, is: &["device: 11264\n", "bitmaps: 1\n"], replays: false },
    Kind {
        name: "journal-of-513",
        make: small_journal,
        is: &["non-standard journal", "Size 513 "],
        replays: true,
    },
    Kind {
        name: "journal-elsewhere",
        make: external_journal,
        is: &["non-standard journal", "Size 1024 "],
        replays: true,
    },
];

/// Where one of them is made.
struct Bench {
    dir: tempfile::TempDir,
    /// Whether its format is 3.5.
    old: Cell<bool>,
    /// What was in it when it was last noted.
    noted: RefCell<String>,
}

impl Bench {
    fn new() -> Bench {
        Bench { dir: directory(), old: Cell::new(false), noted: RefCell::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The image itself.
    fn image(&self) -> PathBuf {
        self.path("image")
    }

    /// The journal's, where it has one of its own.
    fn journal(&self) -> PathBuf {
        self.path("journal")
    }

    /// Makes a file system of `size` bytes, always with the same UUID and label where the format has them.
    fn mkfs(&self, size: u64, options: &[&str]) -> Loop {
        let disk = Loop::create(&self.image(), size);
        let names = ["-l", "fixture", "-u", "0c6d3dcb-3d69-4c41-a4b2-3c6a4f6a7a11"];
        self.old.set(options.contains(&"3.5"));
        let names = if self.old.get() { &[] } else { &names[..] };
        tool("mkreiserfs", &[&["-q", "-f"], names, options, &[disk.node().to_str().unwrap()]].concat());
        if self.old.get() {
            widen_root(disk.node());
        }
        disk
    }

    fn mount(&self, node: &Path) -> Mount {
        Mount::new(node, &self.path("mounted"))
    }

    /// Where a file is: see [`widen_root`] for why not in a directory, and not under a short name.
    fn at(&self, name: &str) -> PathBuf {
        let old = self.old.get().then(|| format!("{}-and its name is long", name.replace('/', "-")));
        self.path("mounted").join(old.as_deref().unwrap_or(name))
    }

    /// A file of `size` bytes, whose content is that of no other file.
    fn write(&self, name: &str, size: u64) -> File {
        fs::create_dir_all(self.at(name).parent().unwrap()).unwrap();
        let mut file = File::create(self.at(name)).unwrap();
        file.write_all(&content(name, 0, size)).unwrap();
        file
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.at(name)).unwrap();
    }

    /// Notes what is in it: what must be there when it is mounted again.
    fn note(&self) {
        self.noted.replace(listing(&self.path("mounted")));
    }

    /// Something of everything that the format knows.
    fn fill(&self) {
        // Tails, alone in a leaf and several in one, and direct items of all lengths.
        for index in 0..48 {
            self.write(&format!("tails/{index}"), 1 + index * 83);
        }
        // Directories of many items, with short and long names, some of them gone again.
        let long = |index: usize| format!("names/{index:03}{}", "-long".repeat(index % 40));
        (0..120).for_each(|index| drop(self.write(&long(index), 0)));
        (0..120).step_by(3).for_each(|index| self.remove(&long(index)));
        self.write("a/b/c/d/file", 5000);
        // Indirect items: a long one, one with a hole in it, and nothing but a hole.
        self.write("long", 600 * KIB + 1);
        let holes = self.write("holes", 9000);
        holes.write_all_at(&content("behind a hole", 0, 20_000), 3 * MIB).unwrap();
        self.write("hole", 0).set_len(MIB + 5).unwrap();
        symlink("a/b/c/d/file", self.at("symlink")).unwrap();
        fs::hard_link(self.at("tails/7"), self.at("hard link")).unwrap();
    }
}

/// Pads the names in the root directory of a new file system of format 3.5, as format 3.6 does.
///
/// The kernel refuses (since 5.14) each leaf with a directory item that has less than 24 bytes for each entry. An entry
/// needs 16 and its name, which is not padded in this format, so an empty directory cannot be read, neither the root
/// that mkreiserfs makes nor one that this very kernel makes. This is the way around it, together with long names in
/// the root directory alone. Kernels of the time of the format had no such rule, and their directories look otherwise.
fn widen_root(node: &Path) {
    const ROOT: u64 = 8211 * 4096;
    let disk = File::options().read(true).write(true).open(node).unwrap();
    let mut leaf = [0; 4096];
    disk.read_exact_at(&mut leaf, ROOT).unwrap();
    let mut set = |at: usize, old: u16, new: u16| {
        assert_eq!(leaf[at..at + 2], old.to_le_bytes(), "at {at} of the root");
        leaf[at..at + 2].copy_from_slice(&new.to_le_bytes());
    };
    // The leaf's free space; length and place of the second item; the directory's size in the first one.
    set(4, 3957, 3944);
    set(24 + 24 + 18, 35, 48);
    set(24 + 24 + 20, 4029, 4016);
    set(4064 + 8, 35, 48);
    leaf.copy_within(4029..4061, 4016);
    // Where the names are, "." behind "..".
    leaf[4016 + 12] = 40;
    leaf[4048..4064].copy_from_slice(b"..\0\0\0\0\0\0.\0\0\0\0\0\0\0");
    disk.write_all_at(&leaf, ROOT).unwrap();
    disk.sync_all().unwrap();
}

/// Lines that say where they are: a block that lies where another should is seen, and they compress well.
fn content(name: &str, from: u64, size: u64) -> Vec<u8> {
    let lines = (from / 32..).flat_map(|line| format!("{:<20.20}{line:>11}\n", name).into_bytes());
    lines.take(usize::try_from(size).unwrap()).collect()
}

fn clean(bench: &Bench) {
    let disk = bench.mkfs(40 * MIB, &[]);
    let _mount = bench.mount(disk.node());
    bench.fill();
    bench.note();
}

fn clean_35(bench: &Bench) {
    let disk = bench.mkfs(40 * MIB, &["--format", "3.5", "-h", "tea"]);
    let _mount = bench.mount(disk.node());
    bench.fill();
    bench.note();
}

/// What is on stable storage of a mounted file system, of which some files were flushed and nothing else was.
fn power_cut(bench: &Bench, options: &[&str], rounds: u32) {
    let disk = bench.mkfs(40 * MIB, options);
    let log = Loop::create(&bench.path("log"), 128 * MIB);
    drop(bench.mount(disk.node()));
    let log = LogWrites::on(disk.node(), log.node());
    let mount = bench.mount(&log.node());
    bench.fill();
    // Transactions to fill the journal with.
    bench.write("again 0", 4 * KIB);
    for round in 0..rounds {
        let [from, to] = [round, round + 1].map(|round| bench.at(&format!("again {}", round % 2)));
        fs::rename(from, to).unwrap();
        File::open(bench.path("mounted")).unwrap().sync_all().unwrap();
    }
    bench.write("flushed", 70 * KIB).sync_all().unwrap();
    // In another transaction: what the first one brought is changed, and some of it is gone.
    (0..48).step_by(2).for_each(|index| bench.remove(&format!("tails/{index}")));
    bench.remove("long");
    // Gone, but still open: whoever mounts it next has to free it.
    let orphan = bench.write("orphan", 100 * KIB);
    bench.remove("orphan");
    bench.write("flushed", 30 * KIB).sync_all().unwrap();
    bench.write("flushed too", 3 * KIB).sync_all().unwrap();
    bench.note();
    bench.write("lost", 50 * KIB);
    log.mark("power-cut");
    let image = log.finish().at("power-cut");
    drop((orphan, mount, disk));
    fs::rename(image.into_temp_path().keep().unwrap(), bench.image()).unwrap();
}

fn dirty(bench: &Bench) {
    power_cut(bench, &[], 0);
}

fn dirty_35(bench: &Bench) {
    power_cut(bench, &["--format", "3.5"], 0);
}

fn dirty_small_blocks(bench: &Bench) {
    power_cut(bench, &["-b", "1024"], 0);
}

/// As the first kernels and mkreiserfs of format 3.5 had it: the superblock 56 KiB earlier, and so all up to the end of the journal.
fn old_place(bench: &Bench) {
    const SUPERBLOCK: usize = 16;
    const BITMAP: usize = 17;
    const JOURNAL: usize = 18;
    const JOURNAL_SIZE: usize = 8192;
    const END: usize = JOURNAL + JOURNAL_SIZE + 1;
    const MOVED: usize = 14;
    power_cut(bench, &["--format", "3.5"], 0);
    let mut image = fs::read(bench.image()).unwrap();
    let mut blocks: Vec<&mut [u8]> = image.chunks_mut(4 * KIB as usize).collect();
    let get = |block: &[u8], at: usize| u32::from_le_bytes(block[at..at + 4].try_into().unwrap());
    let set = |block: &mut [u8], at: usize, value: usize| {
        block[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
    };
    // All copies of the two blocks, and their numbers.
    let mut copies = vec![(SUPERBLOCK, SUPERBLOCK), (BITMAP, BITMAP)];
    for at in (JOURNAL..).take(JOURNAL_SIZE) {
        if !blocks[at][4084..].starts_with(b"ReIsErLB") {
            continue;
        }
        for index in 0..get(blocks[at], 4) as usize {
            let target = get(blocks[at], 12 + 4 * index) as usize;
            if target == SUPERBLOCK || target == BITMAP {
                set(blocks[at], 12 + 4 * index, target - MOVED);
                copies.push((target, at + 1 + index));
            }
        }
    }
    for (target, at) in copies {
        match target {
            SUPERBLOCK => {
                let free = get(blocks[at], 4) as usize;
                set(blocks[at], 4, free + MOVED);
                set(blocks[at], 12, JOURNAL - MOVED);
            }
            // What the journal's end has left.
            _ => (END - MOVED..END).for_each(|block| blocks[at][block / 8] &= !(1 << (block % 8))),
        }
    }
    set(blocks[END - 1], 12, JOURNAL - MOVED);
    let [from, to] = [SUPERBLOCK, END].map(|block| block * 4 * KIB as usize);
    let moved = MOVED * 4 * KIB as usize;
    image.copy_within(from..to, from - moved);
    image[to - moved..to].fill(0);
    fs::write(bench.image(), image).unwrap();
}

/// What a power cut leaves in the middle of the unmount, the one moment at which also the superblock in its place says
/// that the file system is mounted.
fn unclean(bench: &Bench) {
    let disk = bench.mkfs(40 * MIB, &[]);
    let log = Loop::create(&bench.path("log"), 128 * MIB);
    let log = LogWrites::on(disk.node(), log.node());
    let mount = bench.mount(&log.node());
    bench.fill();
    bench.note();
    drop(mount);
    let mut unclean = 0;
    log.finish().each_flush(|image, _| {
        let mut state = [0; 2];
        File::open(image).unwrap().read_exact_at(&mut state, 64 * KIB + 50).unwrap();
        if state == [2, 0] {
            fs::copy(image, bench.image()).unwrap();
            unclean += 1;
        }
    });
    assert!(unclean > 0);
}

/// Also a tree of more levels.
fn small_blocks(bench: &Bench) {
    let disk = bench.mkfs(16 * MIB, &["-b", "1024", "-h", "rupasov"]);
    let _mount = bench.mount(disk.node());
    bench.fill();
    bench.note();
}

/// Files that grew block by block in turn until the file system was almost full, and one that lies in the gaps that
/// some of them left.
fn fragmented(bench: &Bench) {
    // Nine tenths of it are the journal.
    let disk = bench.mkfs(36 * MIB, &[]);
    let _mount = bench.mount(disk.node());
    for block in 0..36 {
        for index in 0..24 {
            // Closed each time, or the kernel would give it some blocks in advance.
            let name = format!("part {index}");
            let mut file = File::options().create(true).append(true).open(bench.at(&name)).unwrap();
            file.write_all(&content(&name, block * 4 * KIB, 4 * KIB)).unwrap();
        }
    }
    (0..24).step_by(2).for_each(|index| bench.remove(&format!("part {index}")));
    // What was removed is free once that is in the journal.
    bench.write("last", 3 * KIB).sync_all().unwrap();
    bench.write("in the gaps", 1500 * KIB);
    let extents = tool("filefrag", &[bench.at("in the gaps").to_str().unwrap()]);
    let count = extents.rsplit(": ").next().unwrap().split(' ').next().unwrap();
    assert!(count.parse::<u32>().unwrap() > 100, "{extents}");
    bench.note();
}

/// Mounted meanwhile, and over the 128 MiB of which one bitmap block tells.
fn grown(bench: &Bench) {
    let disk = bench.mkfs(40 * MIB, &[]);
    let _mount = bench.mount(disk.node());
    bench.fill();
    disk.resize(140 * MIB);
    let blocks = 140 * MIB / (4 * KIB);
    tool("mount", &["-o", &format!("remount,resize={blocks}"), bench.path("mounted").to_str().unwrap()]);
    bench.write("afterwards", 100 * KIB);
    bench.note();
}

/// By its own tool, back to one bitmap block.
fn shrunk(bench: &Bench) {
    let disk = bench.mkfs(140 * MIB, &[]);
    let mount = bench.mount(disk.node());
    bench.fill();
    bench.note();
    drop(mount);
    // It asks whether one is sure, and listens to nothing else.
    let shrink = format!("echo y | resize_reiserfs -s 44M {}", disk.node().display());
    tool("sh", &["-c", &shrink]);
    drop(disk);
    File::options().write(true).open(bench.image()).unwrap().set_len(44 * MIB).unwrap();
}

/// One of a size of its own, so short that it went round.
fn small_journal(bench: &Bench) {
    power_cut(bench, &["-s", "513", "-t", "128"], 150);
}

/// Moved to another disk, where the last transactions are.
fn external_journal(bench: &Bench) {
    let disk = bench.mkfs(40 * MIB, &[]);
    let mount = bench.mount(disk.node());
    bench.fill();
    drop(mount);
    let journal = Loop::create(&bench.journal(), 5 * MIB);
    let [node, journal_node] = [&disk, &journal].map(|disk| disk.node().to_str().unwrap());
    tool("reiserfstune", &["-f", "-f", "-s", "1024", "--journal-new-device", journal_node, node]);
    let kept = [bench.image(), bench.journal()].map(|path| (path.with_extension("kept"), path));
    let mount = Mount::with(disk.node(), &bench.path("mounted"), &format!("jdev={journal_node}"));
    bench.write("flushed", 70 * KIB).sync_all().unwrap();
    bench.write("flushed too", 3 * KIB).sync_all().unwrap();
    bench.note();
    for (kept, path) in &kept {
        log_writes::copy(&File::open(path).unwrap(), &File::create(kept).unwrap());
    }
    drop((mount, disk, journal));
    kept.iter().for_each(|(kept, path)| fs::rename(kept, path).unwrap());
}

/// What is in a mounted file system: a line for each file, by name.
fn listing(root: &Path) -> String {
    fn walk(root: &Path, dir: &Path, lines: &mut BTreeSet<(PathBuf, String)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_owned();
            let kind = path.symlink_metadata().unwrap().file_type();
            let what = if kind.is_symlink() {
                format!("symlink to {}", fs::read_link(&path).unwrap().display())
            } else if kind.is_dir() {
                walk(root, &path, lines);
                "directory".into()
            } else {
                let bytes = fs::read(&path).unwrap();
                let digest: String =
                    Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
                format!("{digest} {}", bytes.len())
            };
            lines.insert((name, what));
        }
    }
    let mut lines = BTreeSet::new();
    walk(root, root, &mut lines);
    lines.iter().map(|(name, what)| format!("{}: {what}\n", name.display())).collect()
}

/// Where the fixtures lie, and what they consist of: `KIND.img.zst`, for one `KIND.journal.img.zst`, and `KIND.files`.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reiserfs")
}

/// Asks the owners of the format about the images on this bench: they must be what this kind says. Returns what is in
/// the file system once the kernel has mounted it, which changes the images.
fn shown(kind: &Kind, bench: &Bench) -> String {
    let said = tool("debugreiserfs", &[bench.image().to_str().unwrap()]);
    for is in kind.is {
        assert!(said.contains(is), "{} is not `{is}`: {said}", kind.name);
    }
    let disk = Loop::attach(&bench.image(), 512);
    let journal = bench.journal().exists().then(|| Loop::attach(&bench.journal(), 512));
    let options = match &journal {
        Some(journal) => format!("jdev={}", journal.node().display()),
        // Since 2.6.19 the kernel looks for the bitmaps of this one in the wrong place, where it needs them.
        None if kind.name == "old-place" => "ro".into(),
        None => "defaults".into(),
    };
    tool("dmesg", &["--clear"]);
    let mount = Mount::with(disk.node(), &bench.path("mounted"), &options);
    let listing = listing(&bench.path("mounted"));
    drop(mount);
    let kernel = tool("dmesg", &[]);
    assert_eq!(kernel.contains("replayed"), kind.replays, "{}: {kernel}", kind.name);
    assert!(!kernel.contains("REISERFS error"), "{}: {kernel}", kind.name);
    listing
}

/// A bench with the fixture of this kind, and the names of its images.
fn fixture(kind: &Kind) -> (Bench, Vec<String>) {
    let bench = Bench::new();
    let mut names = Vec::new();
    for (image, name) in [(bench.image(), "img.zst"), (bench.journal(), "journal.img.zst")] {
        let name = format!("{}.{name}", kind.name);
        if let Ok(compressed) = File::open(fixtures().join(&name)) {
            zstd::stream::copy_decode(compressed, File::create(image).unwrap()).unwrap();
            names.push(name);
        }
    }
    (bench, names)
}

/// What is in the fixture of this kind.
fn files(kind: &Kind) -> String {
    fs::read_to_string(fixtures().join(format!("{}.files", kind.name))).unwrap()
}

#[test]
fn the_kernel_reads_the_fixtures() {
    small().without_udev().run(|_| {
        let mut expected = BTreeSet::from(["README.md".to_owned()]);
        for kind in KINDS {
            let (bench, names) = fixture(kind);
            assert_eq!(shown(kind, &bench), files(kind), "{}", kind.name);
            expected.extend(names);
            expected.insert(format!("{}.files", kind.name));
        }
        let found =
            fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert_eq!(found.collect::<BTreeSet<_>>(), expected);
    });
}

/// What the file system on an image is, and what is used of the disk that the image is.
fn mapped(image: &Path) -> (FileSystem, Ranges) {
    let file = ReadFile::open(image).unwrap();
    let mut layout = layout::tree::read(&[Disk { reader: &file, sector: None }]);
    let used = layout.used(0).unwrap();
    match layout.disks.remove(0).content {
        Content::FileSystem(found) => (found, used),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_kernel_misses_nothing_of_what_is_free() {
    small().without_udev().run(|_| {
        for kind in KINDS {
            let (bench, _) = fixture(kind);
            let (before, used) = mapped(&bench.image());
            let image = File::options().write(true).open(bench.image()).unwrap();
            let disk = between(0, image.metadata().unwrap().len()).unwrap();
            let mut zeroed = 0;
            for free in used.complement(disk).iter() {
                image.write_all_at(&vec![0; free.len() as usize], free.offset()).unwrap();
                zeroed += free.len();
            }
            println!("{}: {zeroed} bytes of {} are free", kind.name, disk.len());
            match before.allocation {
                // With its own it could not be followed, and the kernel needs it here as well.
                Allocation::Whole { why } => {
                    assert_eq!((kind.name, zeroed), ("journal-elsewhere", 0), "{why}");
                }
                Allocation::Known(before) => {
                    assert!(zeroed > 0 || kind.name == "fragmented", "{}", kind.name);
                    // Read-only, the kernel replays the journal and does nothing else: it comes to the same map.
                    let copy = bench.path("replayed");
                    fs::copy(bench.image(), &copy).unwrap();
                    let disk = Loop::attach(&copy, 512);
                    drop(Mount::with(disk.node(), &bench.path("mounted"), "ro"));
                    drop(disk);
                    let (after, _) = mapped(&copy);
                    assert_ne!(after.state, Some(State::JournalToReplay), "{}", kind.name);
                    match after.allocation {
                        Allocation::Known(after) => assert_eq!(before, after, "{}", kind.name),
                        Allocation::Whole { why } => panic!("{}: {why}", kind.name),
                    }
                }
            }
            assert_eq!(shown(kind, &bench), files(kind), "{}", kind.name);
        }
    });
}

/// What arrives where the free space was skipped is what the kernel mounts.
#[test]
fn the_kernel_misses_nothing_of_what_was_not_sent() {
    small().without_udev().run(|_| {
        for kind in KINDS {
            let (bench, _) = fixture(kind);
            let free = fs::metadata(bench.image()).unwrap().len() - mapped(&bench.image()).1.bytes();
            let rig = Rig::new(&[fs::metadata(bench.image()).unwrap().len()]);
            let sent = rig.send(&[("d0", &bench.image())], &["--json"]).ok().json();
            let disk = &sent["disks"][0];
            println!("{}: {} bytes of {} skipped", kind.name, disk["skipped_bytes"], disk["size"]);
            assert_eq!(disk["free_bytes"], free, "{disk:#}");
            let why = disk["not_skipped"].as_array().unwrap();
            match kind.name {
                "journal-elsewhere" => assert!(disk["skipped_bytes"] == 0 && why.len() == 1, "{disk:#}"),
                "fragmented" => assert!(why.is_empty(), "{disk:#}"),
                _ => assert!(disk["skipped_bytes"].as_u64() > Some(0) && why.is_empty(), "{disk:#}"),
            }
            rig.synchronized("d0");
            fs::rename(rig.targets[0].backing(), bench.image()).unwrap();
            drop(rig);
            assert_eq!(shown(kind, &bench), files(kind), "{}", kind.name);
        }
    });
}

/// The recipe. What it makes is the same in every run but for times and the like, so the files in it are those of the
/// fixtures; with `MT_AGENT_MAKE_FIXTURES` set they are replaced.
#[test]
fn the_fixtures_can_be_made_anew() {
    let made = small().without_udev().run(|inside| {
        for kind in KINDS {
            let bench = Bench::new();
            (kind.make)(&bench);
            for (image, name) in [(bench.image(), "img.zst"), (bench.journal(), "journal.img.zst")] {
                if image.exists() {
                    let compressed = zstd::encode_all(File::open(image).unwrap(), 19).unwrap();
                    assert!(compressed.len() < 100 << 10, "{} has {} bytes", kind.name, compressed.len());
                    fs::write(inside.share.join(format!("{}.{name}", kind.name)), compressed).unwrap();
                }
            }
            let files = shown(kind, &bench);
            assert_eq!(files, *bench.noted.borrow(), "{}", kind.name);
            fs::write(inside.share.join(format!("{}.files", kind.name)), files).unwrap();
        }
    });
    let Some(made) = made else { return };
    if std::env::var_os("MT_AGENT_MAKE_FIXTURES").is_some() {
        for entry in fs::read_dir(made.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "zst" || extension == "files") {
                fs::copy(&path, fixtures().join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    for kind in KINDS {
        let [ours, theirs] = [fixtures(), made.path().to_owned()]
            .map(|dir| fs::read_to_string(dir.join(format!("{}.files", kind.name))).unwrap());
        assert_eq!(ours, theirs, "{}", kind.name);
    }
}
