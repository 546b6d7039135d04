//! Free space that is not sent: what arrives is whole all the same, by the word of the kernel that mounts it and of the
//! tools that check it, and where there is any doubt everything arrives.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mt_agent::digest::is_zero;
use mt_agent::layout::ranges::{Ranges, between};
use mt_agent::layout::tree::{Disk, read};
use mt_agent::storage::file::ReadFile;
use serde_json::Value;
use support::{
    Loop, MACHINE, MIB, Mount, Outcome, Rig, Service, assert_equal, directory, noise, run, succeed, tool,
    wait_for,
};

/// Mounts it for as long as `work` takes, and unmounts it as it should be.
fn mounted<T>(node: &Path, dir: &Path, options: &str, work: impl FnOnce(&Path) -> T) -> T {
    let mount = Mount::with(node, dir, options);
    let result = work(dir);
    // Not lazily, and whoever looks at all mounts holds each for a moment.
    wait_for("the unmount", || nix::mount::umount(dir).ok());
    std::mem::forget(mount);
    support::wait_until_unclaimed(node);
    result
}

/// Files, each of which is on stable storage by itself: a `sync` would write the bitmaps as well.
#[derive(Default)]
struct Files(BTreeMap<String, Vec<u8>>);

impl Files {
    fn write(&mut self, dir: &Path, name: String, len: usize) {
        let bytes = noise(name.bytes().fold(7, |sum, byte| sum * 31 + u64::from(byte)), len);
        let mut file = File::create(dir.join(&name)).unwrap();
        file.write_all(&bytes).unwrap();
        file.sync_all().unwrap();
        self.0.insert(name, bytes);
    }

    /// Some files of all lengths, of which every fifth goes again.
    fn work(&mut self, dir: &Path, round: u64) {
        for index in 0..40u64 {
            self.write(dir, format!("file{round}-{index}"), 1000 + 50_021 * (index as usize % 17));
            if index % 5 == 4 {
                let name = format!("file{round}-{}", index - 2);
                fs::remove_file(dir.join(&name)).unwrap();
                File::open(dir).unwrap().sync_all().unwrap();
                self.0.remove(&name);
            }
        }
    }

    #[track_caller]
    fn check(&self, dir: &Path) {
        for (name, bytes) in &self.0 {
            let found = fs::read(dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(found == *bytes, "{name} is not what was written");
        }
    }
}

/// What is left of a disk where the power fails now.
fn power_cut(disk: &Loop, to: PathBuf) -> Loop {
    tool("cp", &["--sparse=always", disk.backing().to_str().unwrap(), to.to_str().unwrap()]);
    Loop::attach(&to, 512)
}

/// Other bytes all over a disk.
fn soil(node: &Path) {
    let mut disk = OpenOptions::new().write(true).open(node).unwrap();
    while disk.write(&[0xa5; MIB as usize]).is_ok_and(|count| count > 0) {}
    disk.sync_all().unwrap();
}

/// With targets that are full of other bytes.
fn rig(sizes: &[u64]) -> Rig {
    let dir = directory();
    let service = Service::start(dir.path(), &[]);
    let target = |(index, size): (usize, &u64)| {
        let disk = Loop::create(&dir.path().join(format!("d{index}.img")), *size);
        soil(disk.node());
        disk
    };
    let targets = sizes.iter().enumerate().map(target).collect();
    Rig::assemble(dir, service, targets)
}

/// The free bytes of some disks, in whole pages.
fn free(disks: &[&Path]) -> Vec<Ranges> {
    let files: Vec<ReadFile> = disks.iter().map(|path| ReadFile::open(path).unwrap()).collect();
    let disks: Vec<Disk<'_>> =
        files.iter().map(|file| Disk { reader: file, sector: file.sector().unwrap() }).collect();
    let layout = read(&disks);
    let of = |index: usize| {
        let size = layout.disks[index].size;
        let free = layout.used(index).unwrap().complement(between(0, size).unwrap());
        let page = |range: mt_agent::units::Extent| {
            between(range.offset().next_multiple_of(4096), range.end() - range.end() % 4096)
        };
        free.iter().filter_map(page).collect()
    };
    (0..disks.len()).map(of).collect()
}

fn is_zeros(bytes: &[u8], ranges: &Ranges) -> bool {
    ranges.iter().all(|range| is_zero(&bytes[range.offset() as usize..range.end() as usize]))
}

/// The target holds the source, and zeros where that is free.
#[track_caller]
fn assert_skipped(source: &Path, free: &Ranges, target: &Path) {
    let [mut expected, found] = [source, target].map(|path| fs::read(path).unwrap());
    for range in free.iter() {
        expected[range.offset() as usize..range.end() as usize].fill(0);
    }
    let differs = expected.chunks(4096).zip(found.chunks(4096)).position(|(ours, theirs)| ours != theirs);
    assert_eq!(differs, None, "page: {} is not {}", target.display(), source.display());
}

fn field(outcome: &Value, name: &str) -> u64 {
    outcome["disks"][0][name].as_u64().unwrap_or_else(|| panic!("no {name} in {outcome:#}"))
}

fn reasons(outcome: &Value) -> Vec<String> {
    let all = outcome["disks"][0]["not_skipped"].as_array().unwrap();
    all.iter().map(|why| why.as_str().unwrap().to_owned()).collect()
}

fn verify(rig: &Rig, disks: &[(&str, &Path)], args: &[&str]) -> Outcome {
    let (to, state) = (rig.service.address().to_string(), rig.client().display().to_string());
    let disks: Vec<String> = disks.iter().map(|(name, path)| format!("{name}={}", path.display())).collect();
    let base = ["verify", "--json", "--machine", MACHINE, "--state-dir", &state, "--to", &to, "--disk"];
    run(&[&base[..], &[&disks.join(",")], args].concat())
}

/// Sends a disk to a target that is full of other bytes: what is free is zeros there, it is equal by `verify`, and a second
/// pass finds nothing to send. What was free.
#[track_caller]
fn skipped(rig: &Rig, source: &Path, args: &[&str]) -> Ranges {
    let disks = [("d0", source)];
    let free = free(&[source]).remove(0);
    assert!(free.bytes() > 20 * MIB, "{free:?}");
    let sent = rig.send(&disks, &[&["--json"], args].concat()).ok().json();
    assert_eq!(field(&sent, "skipped_bytes"), free.bytes(), "{sent:#}");
    assert!(field(&sent, "free_bytes") >= free.bytes());
    assert_eq!(field(&sent, "used_bytes") + field(&sent, "free_bytes"), field(&sent, "size"));
    assert_eq!(reasons(&sent), [""; 0]);
    assert_skipped(source, &free, rig.targets[0].backing());
    let equal = verify(rig, &disks, &[]).ok().json();
    assert_eq!(equal["equal"], true);
    let again = rig.send(&disks, &["--json"]).ok().json();
    assert_eq!(
        (field(&again, "sent_bytes"), field(&again, "zero_bytes"), field(&again, "same_bytes")),
        (0, 0, field(&again, "size"))
    );
    rig.synchronized("d0");
    free
}

fn newest_is_fuzzy(rig: &Rig) -> bool {
    let list = run(&["points", MACHINE, "--json", "--config", &rig.service.config()]).ok().json();
    list["points"].as_array().unwrap().last().unwrap()["fuzzy"].as_bool().unwrap()
}

/// As the issue has it: the bitmaps on the disk call much of it free that the journal does not.
#[test]
fn a_dirty_ext4_is_whole_where_its_free_space_was_skipped() {
    require_root!();
    for options in ["data=ordered", "data=journal"] {
        let rig = rig(&[256 * MIB]);
        let disk = Loop::create(&rig.path("source.img"), 256 * MIB);
        tool("mkfs.ext4", &["-q", disk.node().to_str().unwrap()]);
        let (cut, files) = mounted(disk.node(), &rig.path("mnt"), &format!("commit=900,{options}"), |dir| {
            let mut files = Files::default();
            files.work(dir, 0);
            (power_cut(&disk, rig.path("cut.img")), files)
        });
        skipped(&rig, cut.node(), &[]);
        let target = rig.targets[0].node();
        mounted(target, &rig.path("mnt"), "defaults", |dir| files.check(dir));
        tool("e2fsck", &["-fn", target.to_str().unwrap()]);
    }
}

fn has_xfs() -> bool {
    let found = ["/usr/sbin/mkfs.xfs", "/sbin/mkfs.xfs"].iter().any(|path| Path::new(path).exists());
    if !found {
        support::skipped(std::thread::current().name().unwrap(), "xfsprogs is not installed");
    }
    found
}

/// With a log to replay all of it is sent, and that is said; frozen, or unmounted, it is not.
#[test]
fn a_dirty_xfs_is_sent_whole_and_one_that_is_frozen_or_clean_is_not() {
    require_root!();
    if !has_xfs() {
        return;
    }
    let rig = rig(&[400 * MIB]);
    let target = rig.targets[0].node();
    let whole = |dir: &str, files: &Files| {
        mounted(target, &rig.path(dir), "defaults", |dir| files.check(dir));
        tool("xfs_repair", &["-n", target.to_str().unwrap()]);
    };
    let disk = Loop::create(&rig.path("source.img"), 400 * MIB);
    soil(disk.node());
    tool("mkfs.xfs", &["-q", "-f", "-K", disk.node().to_str().unwrap()]);
    let mut files = Files::default();
    let cut = mounted(disk.node(), &rig.path("mnt"), "defaults", |dir| {
        files.work(dir, 0);
        power_cut(&disk, rig.path("cut.img"))
    });
    let sent = rig.send(&[("d0", cut.node())], &["--json"]).ok().json();
    assert_eq!(
        reasons(&sent),
        ["bytes 0..419430400: xfs: a log with changes that are to be replayed cannot be followed"]
    );
    assert_equal(cut.backing(), rig.targets[0].backing());
    rig.synchronized("d0");
    whole("mnt", &files);
    // Room for the next one.
    fs::remove_file(cut.backing()).unwrap();
    drop(cut);
    // Mounted and not frozen, nothing is left out; frozen, what is free is.
    let (free, taken) = mounted(disk.node(), &rig.path("mnt"), "defaults", |dir| {
        files.work(dir, 1);
        let sent = rig.send(&[("d0", disk.node())], &["--json"]).ok().json();
        assert_eq!((field(&sent, "skipped_bytes"), reasons(&sent).len()), (0, 1), "{sent:#}");
        assert!(reasons(&sent)[0].contains("it is in use") && newest_is_fuzzy(&rig));
        files.work(dir, 2);
        let copy = rig.path("frozen.img");
        let hook = format!("cp --sparse=always {} {}", disk.backing().display(), copy.display());
        let sent =
            rig.send(&[("d0", disk.node())], &["--json", "--freeze", "--post-hook", &hook]).ok().json();
        assert!(!newest_is_fuzzy(&rig) && reasons(&sent).is_empty(), "{sent:#}");
        let skipped = field(&sent, "skipped_bytes");
        rig.synchronized("d0");
        let bytes = fs::read(rig.targets[0].backing()).unwrap();
        let free = self::free(&[rig.targets[0].backing()]).remove(0);
        assert_eq!(free.bytes(), skipped);
        assert!(is_zeros(&bytes, &free), "what is free is not zeros");
        (free, copy)
    });
    assert!(free.bytes() > 200 * MIB && taken.exists());
    whole("mnt", &files);
    // And unmounted.
    skipped(&rig, disk.node(), &["--whole"]);
    whole("mnt", &files);
}

/// One in use is sent whole in the first pass; the next one finds it frozen, and then a removed file is gone from the target.
#[test]
fn a_mounted_ext4_is_only_skipped_while_it_is_frozen() {
    require_root!();
    let rig = rig(&[128 * MIB]);
    let disk = Loop::create(&rig.path("source.img"), 128 * MIB);
    soil(disk.node());
    // Without a discard, so that its free space holds what was there before; with its inode tables, which the kernel would
    // zero some seconds after the mount, in the middle of what is compared.
    let options = "nodiscard,lazy_itable_init=0,lazy_journal_init=0";
    tool("mkfs.ext4", &["-q", "-E", options, disk.node().to_str().unwrap()]);
    let mut files = Files::default();
    let target = rig.targets[0].backing();
    mounted(disk.node(), &rig.path("mnt"), "defaults", |dir| {
        files.work(dir, 0);
        let sent = rig.send(&[("d0", disk.node())], &["--json", "--freeze"]).ok().json();
        assert_eq!((field(&sent, "skipped_bytes"), sent["disks"][0]["free_bytes"].is_null()), (0, true));
        let text = rig.send(&[("d0", disk.node())], &[]).ok().stdout;
        assert!(text.contains("d0: free space not skipped: it is in use"), "{text}");
        fs::remove_file(dir.join("file0-0")).unwrap();
        files.0.remove("file0-0");
        let before = fs::read(target).unwrap();
        assert!(before.chunks(4096).any(|page| *page == [0xa5; 4096]));
        let text = rig.send(&[("d0", disk.node())], &["--freeze"]).ok().stdout;
        assert!(text.contains(" free, ") && text.contains("of it skipped"), "{text}");
        assert!(!newest_is_fuzzy(&rig));
        rig.synchronized("d0");
        let free = free(&[target]).remove(0);
        let after = fs::read(target).unwrap();
        assert!(free.bytes() > 50 * MIB);
        assert!(is_zeros(&after, &free));
        // What was left out is no difference; what is used is told as such, free or not.
        let disks = [("d0", disk.node())];
        let told = verify(&rig, &disks, &[]).json();
        assert!(field(&told, "differing_free_bytes") > 50 * MIB, "{told:#}");
        assert!(
            field(&told, "differing_bytes") < MIB && told["disks"][0]["free_bytes"].is_null(),
            "{told:#}"
        );
        let told = verify(&rig, &disks, &["--whole-disk"]).fails(1, &["does not hold"]).json();
        assert!(field(&told, "differing_bytes") > 50 * MIB, "{told:#}");
        assert_eq!(field(&told, "differing_free_bytes"), 0);
    });
    mounted(rig.targets[0].node(), &rig.path("mnt"), "defaults", |dir| files.check(dir));
    tool("e2fsck", &["-fn", rig.targets[0].node().to_str().unwrap()]);
}

/// A partition of a loop device: in the table, and known to the kernel.
struct Partition {
    node: String,
    disk: String,
    number: String,
}

impl Partition {
    /// In sectors. The first one makes a new table.
    fn new(disk: &Loop, number: u32, start: u64, sectors: u64) -> Partition {
        let disk = disk.node().to_str().unwrap().to_owned();
        let (append, label) = if number > 1 { ("--append", "") } else { ("--wipe=always", "label: gpt\n") };
        let script = format!(
            "printf '{label}start={start}, size={sectors}\n' | sfdisk -q --no-reread {append} {disk}"
        );
        tool("sh", &["-c", &script]);
        let (node, number) = (format!("{disk}p{number}"), number.to_string());
        // A kernel that read the table has it already.
        if !Path::new(&node).exists() {
            tool("addpart", &[&disk, &number, &start.to_string(), &sectors.to_string()]);
        }
        wait_for("the partition", || Path::new(&node).exists().then_some(()));
        Partition { node, disk, number }
    }

    fn node(&self) -> &str {
        &self.node
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        // Whoever looks at all devices has it open for a moment.
        for _ in 0..100 {
            let delpart =
                Command::new("delpart").args([&self.disk, &self.number]).stderr(Stdio::null()).status();
            if delpart.is_ok_and(|status| status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} stays", self.node);
    }
}

/// A file system that is mounted in a mount namespace of its own, in which a process waits until this is dropped.
struct Elsewhere {
    process: Child,
}

impl Elsewhere {
    fn mount(node: &Path, dir: &Path) -> Elsewhere {
        fs::create_dir_all(dir).unwrap();
        let mut command = Command::new("unshare");
        // Whoever lists disks holds each for a moment.
        let script =
            "for i in $(seq 100); do mount \"$0\" \"$1\" && echo mounted && exec sleep 600; sleep 0.1; done";
        command.args(["--mount", "sh", "-c", script]);
        let mut process = command.args([node, dir]).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "mounted\n");
        let name = format!("/proc/{}/comm", process.id());
        wait_for("sleep", || (fs::read_to_string(&name).unwrap() == "sleep\n").then_some(()));
        Elsewhere { process }
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // The namespace goes with its only process, and the mount with that.
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Nobody, once it is seen that they are gone: a namespace takes a moment to go.
#[track_caller]
fn nobody(rig: &Rig, source: &Path) {
    wait_for("a source that nobody uses", || rig.users(source).is_empty().then_some(()));
}

fn name(node: impl AsRef<Path>) -> String {
    node.as_ref().file_name().unwrap().to_str().unwrap().to_owned()
}

/// Whoever has mounted the bytes of a source is found, in whatever mount namespace and through whatever loop devices.
#[test]
fn whoever_has_mounted_a_source_is_found() {
    require_root!();
    let rig = rig(&[64 * MIB]);
    let disk = Loop::create(&rig.path("source.img"), 64 * MIB);
    let (one, two) = (Partition::new(&disk, 1, 2048, 81_920), Partition::new(&disk, 2, 83_968, 30_000));
    tool("mkfs.ext4", &["-q", one.node()]);
    tool("mkfs.ext4", &["-q", two.node()]);
    let (whole, part) = (disk.node(), Path::new(one.node()));
    let (label, mnt) = (name(part), rig.path("mnt"));
    let at = |label: &str| vec![format!("{label} is mounted on {}", mnt.display())];
    nobody(&rig, whole);
    nobody(&rig, part);

    // In a container, say. The other partition does not concern this one.
    let other = Elsewhere::mount(two.node().as_ref(), &mnt);
    let held = |label: &str| {
        let found = rig.users(whole);
        let text =
            format!("{label} is held: it is mounted on {} in the mount namespace of sleep", mnt.display());
        assert!(found.len() == 1 && found[0].starts_with(&text), "{found:?}");
    };
    held(&name(two.node()));
    assert_eq!(rig.users(part), [""; 0]);
    let sent = rig.send(&[("d0", whole)], &["--json"]).ok();
    assert!(sent.stderr.contains("is in use") && newest_is_fuzzy(&rig), "{sent:#?}");
    assert!(field(&sent.json(), "skipped_bytes") == 0 && reasons(&sent.json())[0].contains("is held"));
    drop(other);
    nobody(&rig, whole);

    // Through a loop device over the partition, and one over that; here and elsewhere.
    let over = Loop::attach(part, 512);
    let above = Loop::attach(over.node(), 512);
    nobody(&rig, whole);
    let shown = format!("{} on {} on {label}", name(above.node()), name(over.node()));
    mounted(above.node(), &mnt, "defaults", |_| {
        assert_eq!((rig.users(whole), rig.users(part)), (at(&shown), at(&shown)));
        // And the other way round: the device is the source that the mounted one shows.
        assert_eq!(rig.users(over.node()), at(&format!("{} on {}", name(above.node()), name(over.node()))));
        assert!(run(&["inspect", one.node()]).ok().stdout.contains("is shown by the loop device"));
    });
    let elsewhere = Elsewhere::mount(above.node(), &mnt);
    held(&shown);
    drop(elsewhere);
    mounted(part, &mnt, "defaults", |_| assert_eq!(rig.users(above.node()), at(&label)));
    drop(above);
    drop(over);

    // Of a partition, through one over the whole disk, or over its file.
    // What it read of the disk was there before the file system.
    tool("blockdev", &["--flushbufs", whole.to_str().unwrap()]);
    for from in [whole, disk.backing()] {
        let over = tool("losetup", &["--find", "--show", "--offset", "1048576", from.to_str().unwrap()]);
        // It goes with this.
        let open = File::open(&over).unwrap();
        tool("losetup", &["--detach", &over]);
        mounted(over.as_ref(), &mnt, "defaults", |_| {
            assert_eq!(rig.users(part), at(&name(&over)));
            assert_eq!(rig.users(disk.backing()).len(), 1);
        });
        drop(open);
    }
    nobody(&rig, part);
    nobody(&rig, disk.backing());

    // The whole disk, whose partitions are not there any more but for the kernel: they are claimed with it.
    tool("mkfs.ext4", &["-q", "-F", whole.to_str().unwrap()]);
    mounted(whole, &mnt, "defaults", |_| {
        assert_eq!((rig.users(whole), rig.users(part)), (at(&name(whole)), at(&name(whole))));
    });
}

/// What is written to a partition past it is only counted on the disk.
#[test]
fn a_write_to_a_partition_through_its_disk_is_noticed() {
    require_root!();
    let rig = rig(&[32 * MIB]);
    let disk = Loop::create(&rig.path("source.img"), 64 * MIB);
    let part = Partition::new(&disk, 1, 2048, 16_384);
    // All of it has to be sent.
    soil(part.node().as_ref());
    let over = Loop::attach(disk.node(), 512);
    let slow = ["--whole", "--compression", "off", "--bwlimit", "4M"];
    for to in [Some(disk.node()), Some(over.node()), None] {
        let send = rig.start_into_pass(&[("d0", part.node().as_ref())], &slow);
        if let Some(to) = to {
            send.standing_still(|| {
                let file = OpenOptions::new().write(true).open(to).unwrap();
                file.write_all_at(&[0x5a; 4096], 4 * MIB).unwrap();
                file.sync_all().unwrap();
            });
        }
        let said = send.finish().ok().stderr.contains("somebody wrote to the source while it was read");
        assert_eq!((said, newest_is_fuzzy(&rig)), (to.is_some(), to.is_some()));
    }
}

/// Of several sources only those count as frozen on which something was, and nothing counts that is mounted where it cannot be
/// frozen.
#[test]
fn only_what_was_frozen_counts_as_frozen() {
    require_root!();
    let rig = rig(&[64 * MIB, 64 * MIB]);
    let disks = ["one.img", "two.img"].map(|file| Loop::create(&rig.path(file), 64 * MIB));
    let sources = [("d0", disks[0].node()), ("d1", disks[1].node())];
    for (_, node) in sources {
        tool("mkfs.ext4", &["-q", node.to_str().unwrap()]);
    }
    let newest = || {
        let list = run(&["points", MACHINE, "--json", "--config", &rig.service.config()]).ok().json();
        let newest = list["points"].as_array().unwrap().last().unwrap().clone();
        (newest["kind"].as_str().unwrap().to_owned(), newest["fuzzy"].as_bool().unwrap())
    };
    let not_skipped =
        |sent: &Value, disk: usize| sent["disks"][disk]["not_skipped"][0].as_str().map(str::to_owned);
    mounted(disks[0].node(), &rig.path("mnt"), "defaults", |_| {
        // Nobody who gave --freeze is told to give it.
        let first = rig.send(&sources, &["--freeze", "--json"]).ok().json();
        let why = not_skipped(&first, 0).unwrap();
        assert!(why.contains("nothing is frozen in a first pass") && !why.contains("--freeze"), "{why}");
        assert_eq!(not_skipped(&first, 1), None);
        let sent = rig.send(&sources, &["--freeze", "--json"]).ok().json();
        assert_eq!((not_skipped(&sent, 0), not_skipped(&sent, 1)), (None, None));
        assert_eq!(newest(), ("filesystem".to_owned(), false));
        let elsewhere = Elsewhere::mount(disks[1].node(), &rig.path("mnt1"));
        let sent = rig.send(&sources, &["--freeze", "--json"]).ok();
        assert!(sent.stderr.contains("that is not frozen, so the point is no moment"), "{sent:#?}");
        let sent = sent.json();
        let why = not_skipped(&sent, 1).unwrap();
        assert!(why.contains("is held") && why.contains("--freeze does not reach that"), "{why}");
        assert_eq!((not_skipped(&sent, 0), sent["disks"][1]["skipped_bytes"].as_u64()), (None, Some(0)));
        assert_eq!(newest(), ("crash".to_owned(), true));
        drop(elsewhere);
        // Without it, it is named.
        let sent = rig.send(&sources, &["--json"]).ok().json();
        let why = not_skipped(&sent, 0).unwrap();
        assert!(why.contains("it is in use (loop") && why.contains("with --freeze it is left out"), "{why}");
    });
}

/// A file system that nobody can write to stands still, until somebody can.
#[test]
fn what_is_mounted_read_only_stands_still() {
    require_root!();
    let rig = rig(&[64 * MIB]);
    let (disk, _) = used_before(&rig, 64 * MIB);
    let disks = [("d0", disk.node())];
    mounted(disk.node(), &rig.path("mnt"), "ro", |dir| {
        // That nothing is frozen in a first pass does not matter where nothing has to be.
        let sent = rig.send(&disks, &["--json", "--freeze"]).ok();
        assert!(!newest_is_fuzzy(&rig) && sent.stderr.is_empty(), "{sent:#?}");
        let sent = rig.send(&disks, &["--json", "--whole"]).ok();
        assert!(!newest_is_fuzzy(&rig) && sent.stderr.is_empty(), "{sent:#?}");
        let sent = sent.json();
        assert!(field(&sent, "skipped_bytes") > 30 * MIB && reasons(&sent).is_empty(), "{sent:#}");
        // What counts as zeros was not read.
        assert!(field(&sent, "read_bytes") < field(&sent, "size") - field(&sent, "skipped_bytes") + MIB);
        let slow = ["--whole", "--compression", "off", "--bwlimit", "3M"];
        let send = rig.start_into_pass(&disks, &slow);
        send.standing_still(|| tool("mount", &["-o", "remount,rw", dir.to_str().unwrap()]));
        let sent = send.finish().ok();
        assert!(sent.stderr.contains("somebody wrote to the source while it was read"), "{sent:#?}");
        assert!(newest_is_fuzzy(&rig));
    });
}

/// A dry run says what would be skipped, and why not.
#[test]
fn a_dry_run_tells_of_free_space() {
    require_root!();
    let rig = rig(&[64 * MIB]);
    let (disk, _) = used_before(&rig, 64 * MIB);
    let disks = [("d0", disk.node())];
    let dry = |args: &[&str]| {
        let json = rig.send(&disks, &[&["--dry-run", "--json"], args].concat()).ok().json();
        (field(&json, "skipped_bytes"), reasons(&json).join("; "))
    };
    let free = free(&[disk.node()]).remove(0).bytes();
    assert_eq!(dry(&[]), (free, String::new()));
    assert_eq!(dry(&["--whole-disk"]), (0, "--whole-disk asks for all of it".to_owned()));
    let text = rig.send(&disks, &["--dry-run"]).ok().stdout;
    assert!(text.contains("MiB free, ") && text.contains("of it would be skipped"), "{text}");
    mounted(disk.node(), &rig.path("mnt"), "defaults", |_| {
        let text = rig.send(&disks, &["--dry-run"]).ok().stdout;
        assert!(text.contains("d0: free space not skipped: it is in use (loop"), "{text}");
        let (skipped, why) = dry(&["--freeze"]);
        assert!(skipped == 0 && why.contains("it is looked for once that is frozen"), "{why}");
    });
}

/// A disk of which a partition is mounted has a page cache of its own, in which is what was read of it before: not what the
/// file system has written since.
#[test]
fn what_the_page_cache_holds_of_a_frozen_disk_is_not_believed() {
    require_root!();
    let rig = rig(&[128 * MIB]);
    let disk = Loop::create(&rig.path("source.img"), 128 * MIB);
    let node = disk.node().to_str().unwrap();
    let part = Partition::new(&disk, 1, 2048, 250_000);
    tool("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0", part.node()]);
    let mut files = Files::default();
    mounted(part.node().as_ref(), &rig.path("mnt"), "defaults", |dir| {
        rig.send(&[("d0", disk.node())], &[]).ok();
        run(&["inspect", node]).ok();
        files.work(dir, 0);
        let sent = rig.send(&[("d0", disk.node())], &["--freeze", "--json"]).ok().json();
        assert!(field(&sent, "skipped_bytes") > 30 * MIB && reasons(&sent).is_empty(), "{sent:#}");
        assert!(!newest_is_fuzzy(&rig));
        rig.synchronized("d0");
    });
    drop(part);
    let (copy, inner) = (rig.targets[0].backing(), rig.path("inner.img"));
    let partition = fs::read(copy).unwrap()[MIB as usize..][..250_000 * 512].to_vec();
    fs::write(&inner, partition).unwrap();
    let inner = Loop::attach(&inner, 512);
    mounted(inner.node(), &rig.path("mnt"), "defaults", |dir| files.check(dir));
    tool("e2fsck", &["-fn", inner.node().to_str().unwrap()]);
}

/// Somebody mounts the source in the middle of the pass and takes what was free: that point is no moment, and the next one
/// misses nothing.
#[test]
fn a_source_that_did_not_stand_still_after_all_gives_a_fuzzy_point() {
    require_root!();
    let rig = rig(&[64 * MIB]);
    let disk = Loop::create(&rig.path("source.img"), 64 * MIB);
    tool("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0", disk.node().to_str().unwrap()]);
    let mut files = Files::default();
    mounted(disk.node(), &rig.path("mnt"), "defaults", |dir| files.work(dir, 0));
    let slow = ["--whole", "--compression", "off", "--bwlimit", "4M"];
    let send = rig.start_into_pass(&[("d0", disk.node())], &slow);
    send.standing_still(|| mounted(disk.node(), &rig.path("mnt"), "defaults", |dir| files.work(dir, 1)));
    let sent = send.finish().ok();
    assert!(sent.stderr.contains("somebody wrote to the source while it was read"), "{sent:#?}");
    assert!(newest_is_fuzzy(&rig));
    rig.send(&[("d0", disk.node())], &[]).ok();
    assert!(!newest_is_fuzzy(&rig));
    rig.synchronized("d0");
    assert_skipped(disk.node(), &free(&[disk.node()])[0], rig.targets[0].backing());
    mounted(rig.targets[0].node(), &rig.path("mnt"), "defaults", |dir| files.check(dir));
    tool("e2fsck", &["-fn", rig.targets[0].node().to_str().unwrap()]);
}

/// Somebody writes to the same file by another way.
#[test]
fn a_write_through_another_loop_device_is_noticed() {
    require_root!();
    let rig = rig(&[64 * MIB]);
    let disk = Loop::create(&rig.path("source.img"), 64 * MIB);
    tool("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0", disk.node().to_str().unwrap()]);
    let other = Loop::attach(disk.backing(), 512);
    let mut files = Files::default();
    let slow = ["--whole", "--compression", "off", "--bwlimit", "1M"];
    mounted(disk.node(), &rig.path("mnt"), "defaults", |dir| files.work(dir, 0));
    let send = rig.start_into_pass(&[("d0", disk.node())], &slow);
    send.standing_still(|| mounted(other.node(), &rig.path("mnt"), "defaults", |dir| files.work(dir, 1)));
    let sent = send.finish().ok();
    assert!(sent.stderr.contains("somebody wrote to the source while it was read"), "{sent:#?}");
    assert!(newest_is_fuzzy(&rig));
}

#[test]
fn nothing_is_skipped_of_a_disk_that_does_not_count_its_writes() {
    require_root!();
    let rig = rig(&[64 * MIB]);
    let (disk, _) = used_before(&rig, 64 * MIB);
    let name = disk.node().file_name().unwrap().to_str().unwrap().to_owned();
    let counts = format!("/sys/block/{name}/queue/iostats");
    fs::write(&counts, "0").unwrap();
    let sent = rig.send(&[("d0", disk.node())], &["--json"]).ok().json();
    fs::write(&counts, "1").unwrap();
    assert_eq!(field(&sent, "skipped_bytes"), 0, "{sent:#}");
    assert_equal(disk.node(), rig.targets[0].backing());
    // Nor of one whose file may be written by whoever still reaches it.
    fs::remove_file(disk.backing()).unwrap();
    let sent = rig.send(&[("d0", disk.node())], &["--json"]).ok().json();
    assert!(
        field(&sent, "skipped_bytes") == 0 && reasons(&sent)[0].contains("cannot be reached here"),
        "{sent:#}"
    );
}

/// A disk whose free space holds what was there before.
fn used_before(rig: &Rig, size: u64) -> (Loop, Files) {
    let disk = Loop::create(&rig.path("source.img"), size);
    soil(disk.node());
    tool(
        "mkfs.ext4",
        &["-q", "-b", "4096", "-E", "nodiscard,lazy_itable_init=0", disk.node().to_str().unwrap()],
    );
    let mut files = Files::default();
    mounted(disk.node(), &rig.path("mnt"), "defaults", |dir| files.work(dir, 0));
    (disk, files)
}

#[test]
fn the_whole_disk_is_sent_where_that_is_asked_for() {
    require_root!();
    let rig = rig(&[64 * MIB]);
    let (disk, _) = used_before(&rig, 64 * MIB);
    let disks = [("d0", disk.node())];
    let sent = rig.send(&disks, &["--json", "--whole-disk"]).ok().json();
    assert_eq!(
        (field(&sent, "skipped_bytes"), reasons(&sent)),
        (0, vec!["--whole-disk asks for all of it".to_owned()])
    );
    assert_equal(disk.node(), rig.targets[0].backing());
    // What is free is not compared unless that is asked for.
    assert_eq!(verify(&rig, &disks, &["--whole-disk"]).ok().json()["equal"], true);
    assert_eq!(verify(&rig, &disks, &[]).ok().json()["equal"], true);
    // And what is used is, to the block.
    let used = free(&[disk.node()])[0].complement(between(0, 64 * MIB).unwrap());
    let behind = used.iter().last().unwrap().offset();
    rig.wait_until_closed("d0");
    let target = OpenOptions::new().read(true).write(true).open(rig.targets[0].backing()).unwrap();
    let mut byte = [0];
    target.read_exact_at(&mut byte, behind).unwrap();
    target.write_all_at(&[!byte[0]], behind).unwrap();
    tool("blockdev", &["--flushbufs", rig.targets[0].node().to_str().unwrap()]);
    let found = verify(&rig, &disks, &[]).fails(1, &["does not hold"]).json();
    let differences = found["disks"][0]["differences"].as_array().unwrap();
    assert!(
        differences.len() == 1 && differences[0]["offset"] == behind && differences[0]["length"] == 4096,
        "{found:#}"
    );
    // Skipped after all, the target is zeros there; and the whole disk does not equal that any more.
    let sent = rig.send(&disks, &["--json"]).ok().json();
    assert!(field(&sent, "zero_bytes") + 65536 * 64 > field(&sent, "skipped_bytes"), "{sent:#}");
    assert_skipped(disk.node(), &free(&[disk.node()])[0], rig.targets[0].backing());
    verify(&rig, &disks, &["--whole-disk"]).fails(1, &["does not hold"]);
}

/// A tracker tells what was written: a file that was removed is free, which nobody wrote to its blocks.
#[test]
fn what_a_tracker_need_not_tell_of_free_space_is_not_missed() {
    require_root!();
    let rig = rig(&[64 * MIB]);
    let (disk, _) = used_before(&rig, 64 * MIB);
    let disks = [("d0", disk.node())];
    rig.send(&disks, &[]).ok();
    let before = fs::read(disk.backing()).unwrap();
    mounted(disk.node(), &rig.path("mnt"), "defaults", |dir| fs::remove_file(dir.join("file0-16")).unwrap());
    let after = fs::read(disk.backing()).unwrap();
    let changed = (0..64 * MIB as usize / 4096).filter(|block| {
        let range = block * 4096..(block + 1) * 4096;
        before[range.clone()] != after[range]
    });
    let hints: String = changed.map(|block| format!("{} 4096\n", block * 4096)).collect();
    fs::write(rig.path("hints"), &hints).unwrap();
    let hints = format!("d0={}", rig.path("hints").display());
    // Only they are looked at, and what they do not tell stays there.
    let sent = rig.send(&disks, &["--json", "--changed-ranges", &hints]).ok().json();
    assert_eq!(reasons(&sent), ["only the ranges are looked at that --changed-ranges tells"]);
    assert_eq!(verify(&rig, &disks, &[]).ok().json()["equal"], true);
    rig.send(&disks, &["--changed-ranges", &hints, "--verify"]).ok();
    assert_skipped(disk.node(), &free(&[disk.node()])[0], rig.targets[0].backing());
}

/// Whatever is not as it should be is sent, to the byte.
#[test]
fn a_disk_that_is_not_believed_is_sent_whole() {
    require_root!();
    let rig = rig(&[64 * MIB]);
    let (disk, _) = used_before(&rig, 64 * MIB);
    let bytes = fs::read(disk.backing()).unwrap();
    drop(disk);
    let image = rig.path("source.img");
    let bitmap = {
        let text = tool("dumpe2fs", &[image.to_str().unwrap()]);
        let line = text.lines().find(|line| line.contains("Block bitmap at")).unwrap().to_owned();
        let number = line.split("Block bitmap at ").nth(1).unwrap();
        number.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse::<usize>().unwrap() * 4096
    };
    let cases: &[(usize, u8, &str)] = &[
        // A used block that is called free, an unknown feature in a superblock whose checksum does not hold then, and the
        // beginning of something else in the same place.
        (bitmap + 9, 0xff, "ext4: a block bitmap whose checksum does not hold"),
        (1024 + 0x60 + 3, 0x10, "ext4:"),
        (0, 0x58, "which of them is meant cannot be told"),
    ];
    for (index, (at, bits, why)) in cases.iter().enumerate() {
        let mut bytes = bytes.clone();
        match index {
            2 => bytes[..4].copy_from_slice(b"XFSB"),
            _ => bytes[*at] ^= bits,
        }
        fs::write(&image, &bytes).unwrap();
        let sent = rig.send(&[("d0", &image)], &["--json", "--whole"]).ok().json();
        assert_eq!((field(&sent, "skipped_bytes"), reasons(&sent).len()), (0, 1), "{sent:#}");
        assert!(reasons(&sent)[0].contains(why), "{sent:#}");
        assert_equal(&image, rig.targets[0].backing());
    }
}

/// LVM's tools, which activate nothing: for that the kernel would have to know device mapper.
fn lvm(dir: &Path, disks: &[&Path], command: &str) -> String {
    let list: Vec<&str> = disks.iter().map(|disk| disk.to_str().unwrap()).collect();
    let (name, rest) = command.split_once(' ').unwrap();
    let mut lvm = Command::new("lvm");
    lvm.env("LVM_SYSTEM_DIR", dir).env("LVM_SUPPRESS_FD_WARNINGS", "1").stdin(Stdio::null());
    lvm.args([name, "--driverloaded", "n", "--devices", &list.join(",")]);
    for word in rest.split(' ') {
        match word.strip_prefix('@') {
            Some(index) => lvm.arg(list[index.parse::<usize>().unwrap()]),
            None => lvm.arg(word),
        };
    }
    succeed(&mut lvm)
}

/// A file system in a volume over two disks, which are two disks of one pass.
#[test]
fn a_volume_over_two_disks_is_skipped_on_both() {
    require_root!();
    if !["/usr/sbin/lvm", "/sbin/lvm"].iter().any(|path| Path::new(path).exists()) {
        support::skipped(std::thread::current().name().unwrap(), "lvm2 is not installed");
        return;
    }
    let sizes = [120 * MIB, 140 * MIB];
    let rig = rig(&sizes);
    let system = rig.path("lvm");
    fs::create_dir(&system).unwrap();
    fs::write(
        system.join("lvm.conf"),
        format!(
            "devices {{ use_devicesfile = 0\n obtain_device_list_from_udev = 0\n external_device_info_source = \"none\"\n \
             hints = \"none\" }}\n backup {{ backup = 0\n archive = 0 }}\n global {{ locking_dir = \"{}\"\n use_lvmpolld = 0\n \
             event_activation = 0 }}\n activation {{ udev_sync = 0\n udev_rules = 0\n monitoring = 0 }}\n",
            system.display()
        ),
    )
    .unwrap();
    let disks: Vec<Loop> = sizes
        .iter()
        .enumerate()
        .map(|(index, size)| Loop::create(&rig.path(&format!("s{index}.img")), *size))
        .collect();
    let nodes: Vec<&Path> = disks.iter().map(Loop::node).collect();
    nodes.iter().for_each(|node| soil(node));
    let lvm = |command: &str| lvm(&system, &nodes, command);
    lvm("pvcreate -ff -y @0 @1");
    lvm("vgcreate -s 4m vg @0 @1");
    lvm("lvcreate -an -Zn -Wn -y -i 2 -I 64k -L 40m -n raw vg");
    lvm("lvcreate -an -Zn -Wn -y -L 160m -n root vg");
    // The file system that will lie in the volume, on a disk of its own.
    let inner = Loop::create(&rig.path("inner.img"), 160 * MIB);
    tool("mkfs.ext4", &["-q", inner.node().to_str().unwrap()]);
    let mut files = Files::default();
    mounted(inner.node(), &rig.path("mnt"), "defaults", |dir| files.work(dir, 0));
    // Where LVM says that the volume lies.
    let rows = lvm(
        "pvs --segments --noheadings --nosuffix --units b -o pv_name,pe_start,pvseg_start,pvseg_size,lv_name,seg_start",
    );
    let mut pieces = Vec::new();
    for row in rows.lines() {
        let words: Vec<&str> = row.split_whitespace().collect();
        if words.get(4) == Some(&"root") {
            let number = |index: usize| words[index].parse::<u64>().unwrap();
            let disk = nodes.iter().position(|node| *node == Path::new(words[0])).unwrap();
            pieces.push((disk, number(1) + number(2) * 4 * MIB, number(5), number(3) * 4 * MIB));
        }
    }
    assert!(pieces.iter().any(|piece| piece.0 == 0) && pieces.iter().any(|piece| piece.0 == 1), "{rows}");
    let content = fs::read(inner.backing()).unwrap();
    for (disk, at, from, len) in &pieces {
        let file = OpenOptions::new().write(true).open(nodes[*disk]).unwrap();
        file.write_all_at(&content[*from as usize..][..*len as usize], *at).unwrap();
        file.sync_all().unwrap();
    }
    let free = free(&nodes);
    assert!(free.iter().all(|free| free.bytes() > 20 * MIB), "{free:?}");
    let sources = [("d0", nodes[0]), ("d1", nodes[1])];
    let sent = rig.send(&sources, &["--json"]).ok().json();
    for (index, free) in free.iter().enumerate() {
        assert_eq!(sent["disks"][index]["skipped_bytes"], free.bytes(), "{sent:#}");
        // The other volume lies on both, and nobody knows what is in it.
        assert_eq!(sent["disks"][index]["not_skipped"], serde_json::json!(["vg/raw: nothing that is known"]));
        assert_skipped(nodes[index], free, rig.targets[index].backing());
    }
    assert_eq!(verify(&rig, &sources, &[]).ok().json()["equal"], true);
    // From the targets the volume is put together again, and mounted.
    for (disk, at, from, len) in &pieces {
        let mut part = vec![0; *len as usize];
        File::open(rig.targets[*disk].backing()).unwrap().read_exact_at(&mut part, *at).unwrap();
        let file = OpenOptions::new().write(true).open(inner.node()).unwrap();
        file.write_all_at(&part, *from).unwrap();
        file.sync_all().unwrap();
    }
    mounted(inner.node(), &rig.path("mnt"), "defaults", |dir| files.check(dir));
    tool("e2fsck", &["-fn", inner.node().to_str().unwrap()]);
    // One of them alone: of the volume a part is not here.
    let alone = rig.send(&[("d0", nodes[0])], &["--json"]);
    let alone = alone.ok().json();
    assert!(reasons(&alone).iter().any(|why| why.contains("lies on a disk that is not here")), "{alone:#}");
}
