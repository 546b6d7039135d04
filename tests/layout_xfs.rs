//! What is read of an XFS, against `xfs_db`, `xfs_info`, `xfs_repair`, `blkid` and the kernel.

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use mt_agent::checksum::crc32c;
use mt_agent::layout::ranges::{Ranges, between};
use mt_agent::layout::tree::{Content, Disk, read};
use mt_agent::layout::{Allocation, FileSystem, State};
use mt_agent::storage::file::ReadFile;
use nix::fcntl::{FallocateFlags, fallocate};
use support::{Frozen, Loop, MIB, Mount, cpu, directory, noise, tool, wait_for};

const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs a line of shell, with the system's tools in its path.
#[track_caller]
fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).env("PATH", PATH).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn has_tools() -> bool {
    let found = Path::new("/usr/sbin/xfs_db").exists() || Path::new("/sbin/xfs_db").exists();
    if !found {
        support::skipped(std::thread::current().name().unwrap(), "xfsprogs is not installed");
    }
    found
}

/// A new file system in a sparse image.
#[track_caller]
fn mkfs(dir: &Path, size: u64, flags: &str) -> PathBuf {
    let image = dir.join("xfs.img");
    File::create(&image).unwrap().set_len(size).unwrap();
    sh(&format!("mkfs.xfs -q -f {flags} {}", image.display()));
    image
}

/// What is read of an image.
#[track_caller]
fn found(image: &Path) -> FileSystem {
    let file = ReadFile::open(image).unwrap();
    let layout = read(&[Disk { reader: &file, sector: None }]);
    match layout.disks.into_iter().next().unwrap().content {
        Content::FileSystem(found) => found,
        other => panic!("{other:?}"),
    }
}

/// What is free of it, by the map.
#[track_caller]
fn free(found: &FileSystem) -> Ranges {
    match &found.allocation {
        Allocation::Known(used) => used.complement(between(0, found.size.0).unwrap()),
        Allocation::Whole { why } => panic!("all of it is used: {why}"),
    }
}

#[track_caller]
fn why_whole(found: &FileSystem) -> String {
    match &found.allocation {
        Allocation::Known(_) => panic!("{found:?}"),
        Allocation::Whole { why } => why.to_string(),
    }
}

/// The fields that `xfs_db` prints, one a line.
fn field(printed: &str, name: &str) -> u64 {
    let line = printed.lines().find(|line| line.split(' ').next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in {printed}"));
    line.rsplit_once("= ").unwrap().1.parse().unwrap()
}

/// What is free of it, by `xfs_db`: the extents of the tree of free ones by their beginnings, or by their lengths, which is
/// what it shows but for the blocks kept for the trees.
fn theirs(image: &Path, tree: &str) -> Ranges {
    let image = image.display();
    let superblock = sh(&format!("xfs_db -r -c 'sb 0' -c 'p blocksize agblocks agcount' {image}"));
    let get = |name| field(&superblock, name);
    let (block, group, count) = (get("blocksize"), get("agblocks"), get("agcount"));
    let mut kept = Vec::new();
    let script: String =
        (0..count).map(|ag| format!("agf {ag}\np flfirst fllast flcount\nagfl {ag}\np bno\n")).collect();
    let printed = sh(&format!("printf '{}' | xfs_db -r {image}", script.replace('\n', "\\n")));
    let mut ends = Vec::new();
    for line in printed.lines().map(|line| line.trim_start_matches("xfs_db> ")) {
        if let Some((name, value)) = line.split_once(" = ") {
            if !name.starts_with("bno") {
                ends.push(value.parse::<usize>().unwrap());
                continue;
            }
            let ag = kept.len() as u64;
            let &[first, _, count] = ends.as_slice() else { panic!("{printed}") };
            let all: Vec<&str> = value.split(' ').map(|one| one.split_once(':').unwrap().1).collect();
            let ring = all.iter().cycle().skip(first).take(count);
            kept.push(ring.map(|one| (ag, one.parse::<u64>().unwrap())).collect::<Vec<_>>());
            ends.clear();
        }
    }
    assert_eq!(kept.len() as u64, count, "{printed}");
    let kept: Vec<(u64, u64)> = kept.into_iter().flatten().collect();
    let extents = sh(&format!("xfs_db -r -c 'freesp {tree} -d' {image}"));
    let rows = extents.lines().skip(1).map_while(|line| {
        let row: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap_or(u64::MAX)).collect();
        (row.len() == 3 && !row.contains(&u64::MAX)).then(|| (row[0], row[1], row[2]))
    });
    let rows: Vec<(u64, u64, u64)> = rows.collect();
    assert!(kept.iter().all(|(ag, at)| rows.contains(&(*ag, *at, 1))), "{kept:?} {extents}");
    let rows = rows.into_iter().filter(|(ag, at, len)| *len != 1 || !kept.contains(&(*ag, *at)));
    rows.map(|(ag, at, len)| {
        let from = (ag * group + at) * block;
        between(from, from + len * block).unwrap()
    })
    .collect()
}

/// The map is that of `xfs_db`, to the byte and in both directions; and so is everything else that is said.
#[track_caller]
fn agrees(image: &Path) {
    let found = found(image);
    let free = free(&found);
    for tree in ["", "-c"] {
        let theirs = theirs(image, tree);
        let (more, less) = (free.subtract(&theirs), theirs.subtract(&free));
        assert!(more.is_empty() && less.is_empty(), "only here: {more:?}; only there: {less:?}");
    }
    let node = image.display();
    let blkid = |tag: &str| sh(&format!("blkid -p -o value -s {tag} {node}"));
    assert_eq!((found.kind, found.uuid.clone().unwrap_or_default()), ("xfs", blkid("UUID")));
    assert_eq!(found.label.clone().unwrap_or_default(), blkid("LABEL"));
    let superblock = sh(&format!("xfs_db -r -c 'sb 0' -c 'p blocksize dblocks fdblocks' {node}"));
    let block = field(&superblock, "blocksize");
    assert_eq!(found.block_size, Some(block));
    assert_eq!(found.size.0, field(&superblock, "dblocks") * block);
    assert_eq!(found.free.unwrap().0, field(&superblock, "fdblocks") * block);
    assert_eq!(found.used().unwrap().0, found.size.0 - found.free.unwrap().0);
    assert_eq!(found.state, Some(State::Clean));
    let info = sh(&format!("xfs_info {node}"));
    let switches = [
        "crc",
        "projid32bit",
        "lazy-count",
        "ascii-ci",
        "ftype",
        "finobt",
        "rmapbt",
        "reflink",
        "inobtcount",
        "sparse",
        "bigtime",
        "nrext64",
    ];
    for switch in switches {
        let on = info.split([' ', ',', '\n']).any(|word| word == format!("{switch}=1"));
        assert_eq!(found.features.iter().any(|feature| feature == switch), on, "{switch}: {info}");
    }
    assert_eq!(found.version.as_deref(), Some(if info.contains("crc=1") { "5" } else { "4" }));
}

/// Mounts it for as long as `work` takes, and unmounts it as it should be.
fn mounted<T>(image: &Path, options: &str, work: impl FnOnce(&Path) -> T) -> T {
    let disk = Loop::attach(image, 512);
    let dir = directory();
    let mount = Mount::with(disk.node(), dir.path(), options);
    let result = work(dir.path());
    // Not lazily, and whoever looks at all mounts holds each for a moment.
    wait_for("the unmount", || nix::mount::umount(dir.path()).ok());
    std::mem::forget(mount);
    support::wait_until_unclaimed(disk.node());
    result
}

/// Files of all kinds, most of which go again; a file of which every other block is left; and a full file system in between.
fn populate(root: &Path, block: u64, holes: u64) {
    let many = root.join("many");
    fs::create_dir(&many).unwrap();
    for index in 0..600u64 {
        fs::write(many.join(index.to_string()), noise(index, (index * 37 % 9000) as usize)).unwrap();
    }
    for index in 0..24u64 {
        fs::write(
            root.join(format!("large{index}")),
            noise(index + 1000, (1 + index as usize % 5) * 190_000),
        )
        .unwrap();
    }
    let swiss = File::create(root.join("swiss")).unwrap();
    fallocate(&swiss, FallocateFlags::empty(), 0, (holes * 2 * block) as i64).unwrap();
    // Or what was written takes the holes.
    tool("sync", &["-f", root.to_str().unwrap()]);
    // What fits, in ever smaller pieces, but for the last of it.
    let filler = File::create(root.join("filler")).unwrap();
    let (mut at, mut len) = (0i64, 64 << 20);
    while len >= 1 << 18 {
        match fallocate(&filler, FallocateFlags::empty(), at, len) {
            Ok(()) => at += len,
            Err(_) => len /= 2,
        }
    }
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for hole in 0..holes {
        fallocate(&swiss, punch, (hole * 2 * block) as i64, block as i64).unwrap();
    }
    for index in (0..600).filter(|index| index % 3 > 0) {
        fs::remove_file(many.join(index.to_string())).unwrap();
    }
    for index in (0..24).filter(|index| index % 4 == 1) {
        fs::remove_file(root.join(format!("large{index}"))).unwrap();
    }
    fallocate(&filler, punch, at / 3, at / 3).unwrap();
}

/// The names and checksums of all files.
fn checksums(root: &Path) -> Vec<(PathBuf, u32)> {
    let mut all = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let mut bytes = Vec::new();
                File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
                all.push((path.strip_prefix(root).unwrap().to_owned(), crc32c(&bytes)));
            }
        }
    }
    all.sort();
    all
}

/// Makes zeros of all that.
fn clear(image: &Path, free: &Ranges) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for range in free.iter() {
        fallocate(&file, punch, range.offset() as i64, range.len() as i64).unwrap();
    }
}

/// Flags with which this kernel mounts it, the size in MiB, and how many holes are made.
const MOUNTABLE: &[(&str, u64, u64)] = &[
    ("", 400, 3000),
    ("-m finobt=0,inobtcount=0,reflink=0,bigtime=0 -i sparse=0", 400, 300),
    ("-m rmapbt=1", 400, 3000),
    ("-m reflink=0", 400, 300),
    ("-m rmapbt=1,reflink=0,bigtime=0", 400, 300),
    ("-m finobt=0,inobtcount=0", 400, 300),
    ("-m inobtcount=0 -L 'a label'", 400, 10),
    ("-i nrext64=1 -L twelve-bytes", 400, 10),
    ("-i sparse=0,size=2048", 400, 10),
    ("-i maxpct=5,size=1024", 400, 10),
    ("-b size=1024", 400, 9000),
    ("-b size=1024 -m rmapbt=1", 400, 300),
    ("-b size=2048 -s size=2048", 400, 300),
    ("-b size=8192", 400, 300),
    ("-b size=16384 -n size=65536", 400, 100),
    ("-b size=65536", 800, 100),
    ("-s size=1024", 400, 10),
    ("-s size=4096", 400, 300),
    ("-b size=32768 -s size=32768", 800, 100),
    ("-d agcount=3", 400, 300),
    ("-d agcount=2 -l agnum=1", 400, 10),
    ("-d agcount=20 -l size=64m", 1400, 10),
    ("-d agsize=100m,size=333m", 400, 300),
    ("-d agsize=96m", 401, 300),
    ("-d su=64k,sw=4", 800, 10),
    ("-d su=256k,sw=3 -l su=256k,size=64m", 800, 300),
    ("-l size=80m,su=32k", 400, 10),
    ("-m uuid=01234567-89ab-cdef-0123-456789abcdef", 400, 10),
];

#[test]
fn the_map_is_that_of_xfs_db_on_what_the_kernel_fills() {
    require_root!();
    if !has_tools() {
        return;
    }
    // It is the kernel and the tools that are waited for.
    thread::scope(|scope| {
        for some in MOUNTABLE.chunks(7) {
            scope.spawn(|| some.iter().for_each(|(flags, size, holes)| filled(flags, size * MIB, *holes)));
        }
    });
}

fn filled(flags: &str, size: u64, holes: u64) {
    println!("mkfs.xfs {flags}");
    let dir = directory();
    let image = mkfs(dir.path(), size, flags);
    agrees(&image);
    let block = found(&image).block_size.unwrap();
    let before = mounted(&image, "defaults", |root| {
        populate(root, block, holes);
        checksums(root)
    });
    agrees(&image);
    let free = free(&found(&image));
    assert!(free.count() as u64 > holes, "{flags}: {} free extents", free.count());

    // What is free may be anything.
    clear(&image, &free);
    sh(&format!("xfs_repair -n {}", image.display()));
    assert!(mounted(&image, "ro", checksums) == before, "{flags}");
}

/// Flags of file systems that this kernel does not mount, and the size in MiB.
const UNMOUNTABLE: &[(&str, u64)] = &[
    ("-m crc=0", 400),
    ("-m crc=0 -b size=512", 400),
    ("-m crc=0 -b size=1024", 400),
    ("-m crc=0 -b size=8192 -i size=512", 400),
    ("-m crc=0 -b size=65536", 800),
    ("-m crc=0 -s size=4096", 400),
    ("-m crc=0 -b size=32768 -s size=32768", 800),
    ("-m crc=0 -l version=1", 400),
    ("-m crc=0 -l lazy-count=0", 400),
    ("-m crc=0 -l version=1,lazy-count=0 -b size=512", 400),
    ("-m crc=0 -i attr=1,projid32bit=0", 400),
    ("-m crc=0 -n ftype=0,version=ci -L old", 400),
    ("-m crc=0 -d agcount=20 -l size=64m", 2000),
    ("-m crc=0 -d agsize=96m", 401),
    ("-m crc=0 -d su=64k,sw=4 -l su=256k,size=64m", 800),
    ("-n version=ci", 400),
    ("-m rmapbt=1 -n version=ci -b size=1024", 400),
];

/// Without the kernel: made with files in it, of which every other one is taken out of its inode, after which `xfs_repair`
/// makes the trees of free extents anew.
#[test]
fn the_map_is_that_of_xfs_db_on_what_xfs_repair_makes() {
    if !has_tools() {
        return;
    }
    for (flags, size) in UNMOUNTABLE {
        println!("mkfs.xfs {flags}");
        let dir = directory();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("one"), noise(1, 4000)).unwrap();
        let files: String =
            (0..2500).map(|index| format!("f{index} ---644 0 0 {}\n", path("one").display())).collect();
        fs::write(path("proto"), format!("/none\n0 0\nd--755 0 0\n{files}$\n")).unwrap();
        let image = mkfs(dir.path(), size * MIB, &format!("-p {} {flags}", path("proto").display()));
        agrees(&image);
        let listed = sh(&format!("xfs_db -r -c 'ls /' {}", image.display()));
        let inodes = listed.lines().filter(|line| line.contains(" regular ") || line.contains(" f"));
        let inodes = inodes.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        let commands: String =
            inodes.step_by(2).map(|one| format!("inode {one}\nwrite core.mode 0\n")).collect();
        assert!(commands.lines().count() > 2000, "{listed}");
        fs::write(path("commands"), commands).unwrap();
        let node = image.display();
        sh(&format!("xfs_db -x {node} < {} > /dev/null", path("commands").display()));
        sh(&format!("xfs_repair {node} > /dev/null 2>&1"));
        sh(&format!("xfs_repair -n {node} > /dev/null 2>&1"));
        agrees(&image);
        assert!(free(&found(&image)).count() > 1000, "{flags}");
    }
}

/// What an image holds at this moment.
fn copy(image: &Path, to: &str) -> PathBuf {
    let copy = image.with_file_name(to);
    sh(&format!("cp --sparse=always {} {}", image.display(), copy.display()));
    copy
}

/// Forty files, each made durable by itself, so that only the log tells of them.
fn write_durably(root: &Path, from: u64) {
    for index in from..from + 40 {
        let mut file = File::create(root.join(format!("durable{index}"))).unwrap();
        file.write_all(&noise(index, 700_000)).unwrap();
        file.sync_all().unwrap();
    }
}

const REPLAY: &str = "a log with changes that are to be replayed cannot be followed";

#[test]
fn a_log_that_is_to_be_replayed_makes_all_of_it_used() {
    require_root!();
    if !has_tools() {
        return;
    }
    for flags in ["", "-b size=1024 -m rmapbt=1", "-d su=256k,sw=3 -l su=256k,size=64m"] {
        let dir = directory();
        let image = mkfs(dir.path(), 800 * MIB, flags);
        let dirty = mounted(&image, "defaults", |root| {
            write_durably(root, 0);
            copy(&image, "dirty.img")
        });
        let naive = theirs(&dirty, "");
        let of_dirty = found(&dirty);
        assert_eq!((of_dirty.state, why_whole(&of_dirty)), (Some(State::JournalToReplay), REPLAY.to_owned()));
        // Clean as it was left, and clean as the kernel makes the copy.
        agrees(&image);
        mounted(&dirty, "defaults", |_| ());
        agrees(&dirty);
        // Without a look at the log the files would be lost.
        let lost = naive.subtract(&free(&found(&dirty))).bytes();
        assert!(lost > 40 * 700_000, "{flags}: {lost}");
    }
}

#[test]
fn a_frozen_file_system_has_a_map_and_a_mounted_one_only_while_it_is_idle() {
    require_root!();
    if !has_tools() {
        return;
    }
    for flags in
        ["", "-m rmapbt=1 -s size=4096", "-b size=32768 -s size=32768", "-d su=256k,sw=3 -l su=256k,size=64m"]
    {
        let dir = directory();
        let image = mkfs(dir.path(), 800 * MIB, flags);
        let (frozen, before, gone) = mounted(&image, "defaults", |root| {
            // Nothing was changed yet.
            agrees(&copy(&image, "mounted.img"));
            write_durably(root, 0);
            for index in (0..40).step_by(2) {
                fs::remove_file(root.join(format!("durable{index}"))).unwrap();
            }
            // This one goes when it is closed, or after the next mount.
            let held = File::create(root.join("held")).unwrap();
            held.write_all_at(&noise(7, 3_000_000), 0).unwrap();
            fs::remove_file(root.join("held")).unwrap();
            let frozen = Frozen::new(root);
            let image = copy(&image, "frozen.img");
            drop(frozen);
            let before = checksums(root);
            // And thawed it is as before.
            write_durably(root, 100);
            (image, before, copy(&dir.path().join("xfs.img"), "thawed.img"))
        });
        let of_frozen = found(&frozen);
        assert_eq!(of_frozen.state, Some(State::NotUnmounted), "{of_frozen:?}");
        assert_eq!(of_frozen.notes.len(), 1, "{of_frozen:?}");
        let map = free(&of_frozen);
        assert_eq!(map, theirs(&frozen, ""));
        assert_eq!(map, theirs(&frozen, "-c"));
        assert_eq!(why_whole(&found(&gone)), REPLAY);

        // What is free may be anything, and the kernel replays the log.
        clear(&frozen, &map);
        assert!(mounted(&frozen, "defaults", checksums) == before, "{flags}");
        sh(&format!("xfs_repair -n {}", frozen.display()));
        agrees(&frozen);
        // It has made the rest of the removed file free.
        let more = free(&found(&frozen)).subtract(&map).bytes();
        assert!(more >= 2_900_000, "{flags}: {more}");
    }
}

#[test]
fn what_is_on_other_devices_is_recognised() {
    if !has_tools() {
        return;
    }
    let dir = directory();
    let other = dir.path().join("other.img");
    File::create(&other).unwrap().set_len(200 * MIB).unwrap();
    let image = mkfs(dir.path(), 400 * MIB, &format!("-l logdev={}", other.display()));
    let of_image = found(&image);
    assert_eq!(
        (of_image.state, &*why_whole(&of_image)),
        (None, "a log on another device cannot be followed")
    );
    let image = mkfs(dir.path(), 400 * MIB, &format!("-r rtdev={}", other.display()));
    let of_image = found(&image);
    assert_eq!(
        (of_image.state, &*why_whole(&of_image)),
        (Some(State::Clean), "a file system with a real-time device cannot be followed")
    );
}

/// A UUID that was changed is another one than the structures have; a label, and features that came later.
#[test]
fn what_xfs_admin_changes_is_read() {
    if !has_tools() {
        return;
    }
    let dir = directory();
    let image = mkfs(dir.path(), 400 * MIB, "-m bigtime=0,inobtcount=0");
    let node = image.display();
    sh(&format!("xfs_admin -U 01234567-89ab-cdef-0123-456789abcdef -L mydata {node}"));
    agrees(&image);
    let of_image = found(&image);
    assert_eq!(of_image.uuid.as_deref(), Some("01234567-89ab-cdef-0123-456789abcdef"));
    assert_eq!(of_image.label.as_deref(), Some("mydata"));
    assert!(of_image.features.iter().any(|feature| feature == "meta_uuid"), "{of_image:?}");
    sh(&format!("xfs_admin -O bigtime=1,inobtcount=1 {node}"));
    agrees(&image);
    sh(&format!("xfs_repair -L {node} 2>&1"));
    agrees(&image);
}

/// Grown while mounted, by groups and by a part of one.
#[test]
fn what_has_grown_is_read() {
    require_root!();
    if !has_tools() {
        return;
    }
    let dir = directory();
    let image = mkfs(dir.path(), 400 * MIB, "");
    let disk = Loop::attach(&image, 512);
    let path = directory();
    let mount = Mount::new(disk.node(), path.path());
    write_durably(path.path(), 0);
    for size in [417, 1100] {
        disk.resize(size * MIB);
        sh(&format!("xfs_growfs {}", path.path().display()));
    }
    wait_for("the unmount", || nix::mount::umount(path.path()).ok());
    std::mem::forget(mount);
    agrees(&image);
    assert_eq!(found(&image).size.0, 1100 * MIB);
}

/// Also what the kernel says while it is mounted, of its own trees and not of ours.
#[test]
fn the_map_is_that_of_the_kernel() {
    require_root!();
    if !has_tools() {
        return;
    }
    for flags in ["-m rmapbt=1", "-b size=1024", "-d agsize=96m -s size=4096"] {
        let dir = directory();
        let image = mkfs(dir.path(), 401 * MIB, flags);
        let block = found(&image).block_size.unwrap();
        mounted(&image, "defaults", |root| populate(root, block, 500));
        let rows =
            mounted(&image, "ro", |root| sh(&format!("xfs_io -r -c 'fsmap -d -n 4096' {}", root.display())));
        // `12: 7:1 [800..807]: free space 8`, in units of 512 bytes.
        let of_kernel: Ranges = rows
            .lines()
            .filter(|row| row.contains("free space"))
            .map(|row| {
                let range = row.split(['[', ']']).nth(1).unwrap().split_once("..").unwrap();
                let number = |text: &str| text.parse::<u64>().unwrap();
                between(number(range.0) * 512, (number(range.1) + 1) * 512).unwrap()
            })
            .collect();
        assert!(of_kernel.count() > 500, "{rows}");
        assert_eq!(free(&found(&image)), of_kernel, "{flags}");
    }
}

/// The log of a small one, which is written round and round: clean, frozen and dirty wherever its end may be.
#[test]
fn a_log_that_has_gone_round_is_read_wherever_it_ends() {
    require_root!();
    if !has_tools() {
        return;
    }
    let dir = directory();
    let image = dir.path().join("xfs.img");
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    // Only for its own tests does mkfs.xfs make one of this size.
    sh(&format!("TEST_DIR=x TEST_DEV=x QA_CHECK_FS=x mkfs.xfs -q {}", image.display()));
    let log = sh(&format!("xfs_db -r -c 'sb 0' -c 'p blocksize logblocks' {}", image.display()));
    let log = field(&log, "blocksize") * field(&log, "logblocks");
    assert!(log < 12 * MIB, "{log}");
    let mut cycles = 0;
    for round in 0..40 {
        let (dirty, frozen) = mounted(&image, "defaults", |root| {
            for index in 0..100 {
                let path = root.join((round * 37 + index).to_string());
                let mut file = File::create(&path).unwrap();
                file.write_all(&noise(index, 5000)).unwrap();
                file.sync_all().unwrap();
                if index % 3 > 0 {
                    fs::remove_file(path).unwrap();
                }
            }
            let dirty = copy(&image, "dirty.img");
            let held = Frozen::new(root);
            let frozen = copy(&image, "frozen.img");
            drop(held);
            (dirty, frozen)
        });
        assert_eq!(why_whole(&found(&dirty)), REPLAY);
        assert_eq!(free(&found(&frozen)), theirs(&frozen, ""));
        assert_eq!(free(&found(&image)), theirs(&image, ""));
        let state = sh(&format!("xfs_db -r -c 'sb 0' -c 'p lsn' {}", image.display()));
        let lsn = state.rsplit_once("= 0x").unwrap().1;
        cycles = u64::from_str_radix(lsn, 16).unwrap() >> 32;
    }
    assert!(cycles > 2, "the log has not gone round: {cycles}");
    agrees(&image);
}

/// Two TiB with some files in it, one of them full of holes; within the limits that a large allocation would break.
#[test]
fn a_large_one_is_read_in_a_moment_and_in_little_memory() {
    require_root!();
    if !has_tools() {
        return;
    }
    let dir = directory();
    let image = mkfs(dir.path(), 2 << 40, "-l size=100m");
    mounted(&image, "defaults", |root| {
        write_durably(root, 0);
        let large = File::create(root.join("large")).unwrap();
        fallocate(&large, FallocateFlags::empty(), 0, 1 << 40).unwrap();
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for hole in 0..20_000 {
            fallocate(&large, punch, hole << 25, 1 << 20).unwrap();
        }
    });
    agrees(&image);
    assert!(free(&found(&image)).count() > 20_000);
    let program = env!("CARGO_BIN_EXE_mt-agent");
    let shown = sh(&format!("ulimit -t 2; ulimit -v {}; {program} inspect {}", 100 << 10, image.display()));
    assert!(shown.contains("xfs") && shown.contains("proven free"), "{shown}");
}

/// Whatever becomes of its bytes, it is read in no time, and the map is the right one or none.
#[test]
fn a_damaged_one_has_the_right_map_or_none() {
    require_root!();
    if !has_tools() {
        return;
    }
    let dir = directory();
    let image = mkfs(dir.path(), 400 * MIB, "-b size=1024 -m rmapbt=1");
    mounted(&image, "defaults", |root| populate(root, 1024, 2000));
    let right = free(&found(&image));
    let of_image = fs::metadata(&image).unwrap().len();
    let superblock = sh(&format!("xfs_db -r -c 'sb 0' -c 'p agblocks agcount' {}", image.display()));
    let (group, count) = (field(&superblock, "agblocks") * 1024, field(&superblock, "agcount"));
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let (mut none, mut same) = (0, 0);
    let mut word = 88172645463325252u64;
    let mut random = |below: u64| {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word % below
    };
    for round in 0..400 {
        // In a group's headers, near them, where most of its trees are, or anywhere.
        let at = match round % 4 {
            0 => random(of_image - 8),
            1 => random(count) * group + random(24 << 10),
            _ => random(count) * group + random(2048),
        };
        let (mut kept, len) = ([0; 8], 1 + random(8) as usize);
        file.read_exact_at(&mut kept, at).unwrap();
        let mut changed = kept;
        changed[..len].iter_mut().for_each(|byte| *byte = random(256) as u8);
        file.write_all_at(&changed, at).unwrap();
        let before = cpu();
        let read_again = ReadFile::open(&image).unwrap();
        let layout = read(&[Disk { reader: &read_again, sector: None }]);
        assert!(cpu() - before < Duration::from_secs(2));
        match &layout.disks[0].content {
            Content::FileSystem(found) if matches!(found.allocation, Allocation::Known(_)) => {
                assert_eq!(free(found), right, "{changed:?} at {at}");
                same += 1;
            }
            _ => none += 1,
        }
        file.write_all_at(&kept, at).unwrap();
    }
    assert!(none > 50 && same > 50, "{none} {same}");
    assert_eq!(free(&found(&image)), right);
}
