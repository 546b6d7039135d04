//! Opening targets, on real loop devices.

#[path = "loopdev/guard.rs"]
mod guard;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use guard::{LoopDev, available, directory, image, run};
use mt_agent::disk::device::{self, Error, OpenDisk, Refusal, TargetOptions, open_target};
use mt_agent::disk::discover::watch::{Change, Watch};
use mt_agent::disk::discover::{self, Disk, IdSource, Options, Role, Sysroot};
use mt_agent::disk::id::DiskId;
use mt_agent::sys::aligned::Arena;
use mt_agent::sys::ring::Ring;
use mt_agent::units::ByteLen;

const MIB: u64 = 1 << 20;

/// One test at a time: `losetup` and discovery open every loop device for a moment, and who has a disk open is what these
/// tests are about.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn loop_id(path: &Path) -> DiskId {
    DiskId::loop_file(path).unwrap()
}

fn open(path: &Path) -> Result<OpenDisk, Error> {
    open_target(&loop_id(path), &TargetOptions::default())
}

fn refusal(result: Result<OpenDisk, Error>) -> Refusal {
    match result {
        Err(Error::Refused { reason, .. }) => reason,
        Err(other) => panic!("failed, and was not refused: {other:?}"),
        Ok(disk) => panic!("{} was opened", disk.name),
    }
}

fn role(result: Result<OpenDisk, Error>) -> (Role, Vec<String>) {
    match refusal(result) {
        Refusal::Role { role, evidence } => (role, evidence),
        other => panic!("refused for another reason: {other}"),
    }
}

fn listed(path: &Path) -> Disk {
    let options = Options { include_loop: true, ..Options::default() };
    let disks = discover::discover(&Sysroot::default(), &options).unwrap();
    let id = Some(loop_id(path));
    disks.into_iter().find(|disk| disk.id == id).unwrap()
}

fn attached(name: &str) -> Option<(tempfile::TempDir, PathBuf, LoopDev)> {
    if !available() {
        return None;
    }
    let (dir, path) = directory();
    let path = path.join(name);
    image(&path, 32 * MIB);
    let device = LoopDev::attach(&path, &[]);
    Some((dir, path, device))
}

/// What is registered with a ring the kernel would let go of some time later by itself.
#[test]
fn a_disk_is_free_as_soon_as_its_ring_is_closed() {
    let _turn = turn();
    let Some((_dir, path, device)) = attached("ring.img") else { return };
    for round in 0..100 {
        let disk = open(&path).unwrap();
        let arena = Arena::new(1 << 16).unwrap();
        let ring = match Ring::new(disk.file, 4, &arena) {
            Ok(ring) => ring,
            Err(error) => return eprintln!("NOT HERE: io_uring: {error}"),
        };
        drop(ring);
        let again = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.node);
        again.unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
}

/// A process that was killed holds what it had registered with a ring a while longer, and shows in no list.
#[test]
fn a_disk_that_is_held_by_nobody_who_shows_is_waited_for() {
    let _turn = turn();
    let Some((_dir, path, device)) = attached("lingers.img") else { return };
    let ring = match io_uring::IoUring::new(1) {
        Ok(ring) => ring,
        Err(error) => return eprintln!("NOT HERE: io_uring: {error}"),
    };
    let held = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.node).unwrap();
    ring.submitter().register_files(&[held.as_raw_fd()]).unwrap();
    drop(held);
    // For a second, not for ever.
    let start = Instant::now();
    let Refusal::Busy(who) = refusal(open(&path)) else { panic!("not refused as busy") };
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(who[0].contains("shows in no mount, holder or process"), "{who:?}");
    std::thread::scope(|scope| {
        let opened = scope.spawn(|| open(&path).map(drop));
        std::thread::sleep(Duration::from_millis(300));
        ring.submitter().unregister_files().unwrap();
        opened.join().unwrap().unwrap();
    });
}

#[test]
fn a_free_disk_is_opened_with_its_identity_and_geometry() {
    let _turn = turn();
    let Some((_dir, path, device)) = attached("free disk.img") else { return };
    let disk = open(&path).unwrap();
    assert_eq!((disk.id.clone(), disk.name.as_str()), (loop_id(&path), device.name()));
    assert_eq!((disk.size, disk.logical_block), (ByteLen(32 * MIB), 512));
    assert!(disk.content().unwrap().is_blank());
    let flags = nix::fcntl::fcntl(&disk.file, nix::fcntl::FcntlArg::F_GETFL).unwrap();
    assert_eq!(flags & (libc::O_DIRECT | libc::O_ACCMODE), libc::O_DIRECT | libc::O_RDWR);
    // While it is open nobody else gets it, and it shows as ours.
    let Refusal::Busy(who) = refusal(open(&path)) else { panic!("not refused as busy") };
    assert!(who[0].contains(&format!("(pid {}) has it open", std::process::id())), "{who:?}");
    let shown = listed(&path);
    assert_eq!((shown.role, &shown.evidence), (Role::InUse, &who));
    let assigned = [(loop_id(&path), "web".to_owned())].into();
    let options = Options { include_loop: true, assigned, ..Options::default() };
    let disks = discover::discover(&Sysroot::default(), &options).unwrap();
    assert_eq!(disks.iter().find(|disk| disk.id == Some(loop_id(&path))).unwrap().role, Role::Assigned);
    drop(disk);
    assert_eq!(listed(&path).role, Role::Free);
    open(&path).unwrap();
}

#[test]
fn a_mounted_disk_is_refused() {
    let _turn = turn();
    let Some((dir, path, device)) = attached("mounted.img") else { return };
    run("mkfs.ext4", &["-q", device.node.to_str().unwrap()]);
    assert_eq!(open(&path).unwrap().content().unwrap().to_string(), "ext4 (at byte 1080)");
    let point = dir.path().canonicalize().unwrap().join("a mount");
    fs::create_dir(&point).unwrap();
    let mounted = guard::Mounted::mount(&device.node, &point);
    let result = open(&path);
    let retention = TargetOptions {
        discovery: Options { retention: Some(point.join("journal")), ..Options::default() },
        ..TargetOptions::default()
    };
    let as_retention = open_target(&loop_id(&path), &retention);
    drop(mounted);
    let evidence = format!("{} is mounted on {}", device.name(), point.display());
    assert_eq!(role(result), (Role::System, vec![evidence.clone()]));
    assert_eq!(role(as_retention), (Role::Retention, vec![format!("{evidence}, which holds the retention")]));
    open(&path).unwrap();
}

#[test]
fn a_mounted_partition_holds_its_disk() {
    let _turn = turn();
    if !available() {
        return;
    }
    let (_dir, point) = directory();
    let path = point.join("parts.img");
    image(&path, 32 * MIB);
    run("sh", &["-c", &format!("printf 'label: gpt\\n,16M\\n' | sfdisk -q {}", path.display())]);
    let device = LoopDev::attach(&path, &["-P"]);
    let part = PathBuf::from(format!("{}p1", device.node.display()));
    if !part.exists() {
        // A kernel that reads no partition tables can still be told of a partition.
        run("addpart", &[device.node.to_str().unwrap(), "1", "2048", "32768"]);
    }
    let file = File::open(&part).unwrap();
    let error = device::read_identity(&file, &Sysroot::default()).unwrap_err();
    assert!(error.to_string().contains("it is a partition"), "{error}");
    drop(file);
    run("mkfs.ext4", &["-q", part.to_str().unwrap()]);
    let point = point.join("m");
    fs::create_dir(&point).unwrap();
    let mounted = guard::Mounted::mount(&part, &point);
    let result = open(&path);
    drop(mounted);
    assert_eq!(
        role(result),
        (Role::System, vec![format!("{}p1 is mounted on {}", device.name(), point.display())])
    );
    // Partitions that nobody uses do not hold it.
    let disk = open(&path).unwrap();
    assert!(disk.content().unwrap().to_string().contains("gpt (at byte 512)"));
}

#[test]
fn swap_is_refused() {
    let _turn = turn();
    let Some((_dir, path, device)) = attached("swap.img") else { return };
    let node = device.node.to_str().unwrap();
    run("mkswap", &["-q", node]);
    if !std::process::Command::new("swapon").arg(node).status().unwrap().success() {
        eprintln!("NOT HERE: this kernel takes no swap");
        return;
    }
    let result = open(&path);
    run("swapoff", &[node]);
    assert_eq!(role(result), (Role::System, vec![format!("{} is swap", device.name())]));
}

#[test]
fn two_devices_on_one_file_are_clones() {
    let _turn = turn();
    let Some((_dir, path, first)) = attached("twice.img") else { return };
    let second = LoopDev::attach(&path, &[]);
    let (role, evidence) = role(open(&path));
    assert_eq!(role, Role::Clone);
    assert!(evidence[0].contains(first.name()) && evidence[0].contains(second.name()), "{evidence:?}");
    drop(second);
    open(&path).unwrap();
}

#[test]
fn another_s_exclusive_open_is_refused_with_who_it_is() {
    let _turn = turn();
    let Some((_dir, path, device)) = attached("held.img") else { return };
    // A process of another program: it opens the device for itself and waits.
    let script = "import os,sys,time; os.open(sys.argv[1], os.O_RDONLY|os.O_EXCL); print('held', flush=True); time.sleep(60)";
    let mut holder = std::process::Command::new("python3")
        .args(["-c", script, device.node.to_str().unwrap()])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(holder.stdout.take().unwrap()), &mut line)
        .unwrap();
    let result = open(&path);
    let assigned = [(loop_id(&path), "web".to_owned())].into();
    let options = Options { include_loop: true, assigned, ..Options::default() };
    let disks = discover::discover(&Sysroot::default(), &options).unwrap();
    let pid = holder.id();
    holder.kill().unwrap();
    holder.wait().unwrap();
    let Refusal::Busy(who) = refusal(result) else { panic!("not refused as busy") };
    assert!(who[0].starts_with("python3") && who[0].contains(&format!("(pid {pid})")), "{who:?}");
    let disk = disks.iter().find(|disk| disk.id == Some(loop_id(&path))).unwrap();
    assert_eq!(disk.role, Role::InUse, "assigned, and yet held by something that is not the agent");
    assert_eq!(disk.evidence, [who[0].clone(), "it is assigned to the machine web".to_owned()]);
}

#[test]
fn a_file_that_was_replaced_under_its_device_is_not_the_disk() {
    let _turn = turn();
    let Some((_dir, path, device)) = attached("replaced.img") else { return };
    let file = File::open(&device.node).unwrap();
    let sysroot = Sysroot::default();
    let read = || device::read_identity(&file, &sysroot);
    assert_eq!(read().unwrap(), Some((loop_id(&path), IdSource::Loop)));
    // The path now leads to another file; the kernel shows the old one as deleted.
    fs::rename(&path, path.with_extension("old")).unwrap();
    image(&path, 32 * MIB);
    assert_eq!(
        read().unwrap(),
        Some((loop_id(&path.with_extension("old")), IdSource::Loop)),
        "it went with the file"
    );
    assert!(matches!(open(&path), Err(Error::Missing { .. })));
    fs::remove_file(path.with_extension("old")).unwrap();
    assert_eq!(read().unwrap(), None, "the file has no name any more");
    // And a file that took the very name which the kernel shows is found out by its inode.
    image(&path.with_extension("old (deleted)"), 32 * MIB);
    let error = read().unwrap_err();
    assert!(error.to_string().contains("that one was replaced"), "{error}");
}

#[test]
fn a_part_of_a_file_is_not_the_disk() {
    let _turn = turn();
    if !guard::available() {
        return;
    }
    let (_dir, directory) = guard::directory();
    let path = directory.join("part.img");
    image(&path, 32 * MIB);
    for part in [["--offset", "1048576"], ["--sizelimit", "1048576"]] {
        let _device = LoopDev::attach(&path, &part);
        let error = open(&path).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("only a part of"), "{error}");
    }
}

#[test]
fn a_name_that_passed_to_another_disk_is_not_written_to() {
    let _turn = turn();
    // Others look for a free device at the same time, and may take the name first: then it is tried again.
    let (_dirs, path, device, listed) = 'free: loop {
        let Some((dir, path, device)) = attached("first.img") else { return };
        let listed = listed(&path);
        device::open_listed(listed.clone(), &loop_id(&path), &TargetOptions::default()).unwrap();
        // The same /dev name, another disk.
        let other = path.with_file_name("other.img");
        image(&other, 32 * MIB);
        run("losetup", &["-d", device.node.to_str().unwrap()]);
        let attach = std::process::Command::new("losetup").arg(&device.node).arg(&other).output().unwrap();
        if attach.status.success() {
            break 'free (dir, path, device, listed);
        }
        // It is somebody else's now, who will detach it.
        std::mem::forget(device);
    };
    let (id, other) = (loop_id(&path), path.with_file_name("other.img"));
    let result = device::open_listed(listed.clone(), &id, &TargetOptions::default());
    let found = Some(loop_id(&other));
    assert_eq!(refusal(result), Refusal::Changed { node: device.node.display().to_string(), found });
    assert!(matches!(device::inspect(&listed), Err(Error::Refused { reason: Refusal::Changed { .. }, .. })));
}

#[test]
fn size_assignment_and_read_only_are_checked() {
    let _turn = turn();
    let Some((_dir, path, device)) = attached("rules.img") else { return };
    let id = loop_id(&path);
    let needed = ByteLen(32 * MIB + 1);
    let small = TargetOptions { at_least: needed, ..TargetOptions::default() };
    assert_eq!(refusal(open_target(&id, &small)), Refusal::TooSmall { size: ByteLen(32 * MIB), needed });
    let exact = TargetOptions { at_least: ByteLen(32 * MIB), ..TargetOptions::default() };
    open_target(&id, &exact).unwrap();

    let mut options = TargetOptions { machine: Some("web".to_owned()), ..TargetOptions::default() };
    assert_eq!(refusal(open_target(&id, &options)), Refusal::NotAssigned { machine: "web".to_owned() });
    options.discovery.assigned.insert(id.clone(), "db".to_owned());
    let other = Refusal::OtherMachine { owner: "db".to_owned(), machine: "web".to_owned() };
    assert_eq!(refusal(open_target(&id, &options)), other);
    options.discovery.assigned.insert(id.clone(), "web".to_owned());
    open_target(&id, &options).unwrap();

    let missing =
        open_target(&"naa.6000c2939d1a4b0f8e2d7c6b5a493827".parse().unwrap(), &options).unwrap_err();
    assert!(matches!(missing, Error::Missing { .. }) && missing.is_refusal());

    drop(device);
    let _device = LoopDev::attach(&path, &["-r"]);
    assert_eq!(refusal(open(&path)), Refusal::ReadOnly);
}

#[test]
fn only_whole_block_devices_have_an_identity() {
    let _turn = turn();
    let file = tempfile::tempfile().unwrap();
    let error = device::read_identity(&file, &Sysroot::default()).unwrap_err();
    assert!(matches!(error, Error::NoDisk { .. }), "{error}");
}

#[test]
fn this_machine_s_own_disk_is_refused() {
    let _turn = turn();
    let disks = discover::discover(&Sysroot::default(), &Options::default()).unwrap();
    let Some(system) =
        disks.iter().find(|disk| disk.evidence.iter().any(|line| line.ends_with("is mounted on /")))
    else {
        eprintln!("NOT HERE: / lies on no disk that can be listed here");
        return;
    };
    assert_eq!(system.role, Role::System);
    assert!(matches!(device::check_role(system), Err(Refusal::Role { role: Role::System, .. })));
    if let Some(id) = &system.id {
        assert_eq!(role(open_target(id, &TargetOptions::default())).0, Role::System);
        let file = match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&system.node) {
            Ok(file) => file,
            Err(error) => {
                eprintln!("NOT HERE: {} cannot be opened: {error}", system.node.display());
                return;
            }
        };
        let read = device::read_identity(&file, &Sysroot::default()).unwrap();
        assert_eq!(read.map(|(id, _)| id), Some(id.clone()), "the descriptor says what discovery said");
        assert!(!device::inspect(system).unwrap().is_blank());
    }
}

#[test]
fn targets_can_be_opened_side_by_side() {
    let _turn = turn();
    if !available() {
        return;
    }
    let (_dir, path) = directory();
    let devices: Vec<(PathBuf, LoopDev)> = (0..6)
        .map(|at| {
            let path = path.join(format!("{at}.img"));
            image(&path, MIB);
            let device = LoopDev::attach(&path, &[]);
            (path, device)
        })
        .collect();
    // Each opens its own, over and over, while a listing probes all of them: no opening may fail for that.
    thread::scope(|scope| {
        for (path, _) in &devices {
            scope.spawn(move || (0..10).for_each(|_| drop(open(path).unwrap())));
        }
        let (path, _) = &devices[0];
        scope.spawn(move || (0..10).for_each(|_| drop(listed(path))));
    });
}

#[test]
fn a_watch_sees_a_disk_come_grow_and_go() {
    let _turn = turn();
    if !available() {
        return;
    }
    let (_dir, path) = directory();
    let path = path.join("watched.img");
    image(&path, 8 * MIB);
    let options = Options { include_loop: true, probe_exclusive: false, ..Options::default() };
    let (sender, changes) = mpsc::channel();
    let (ready, begun) = mpsc::channel();
    let (stopped, stop) = std::io::pipe().unwrap();
    let id = loop_id(&path);
    let follower = thread::spawn(move || {
        let mut watch = Watch::new(Sysroot::default(), move || options.clone()).unwrap();
        ready.send(()).unwrap();
        loop {
            let seen = watch.wait(stopped.as_fd()).unwrap();
            if seen.is_empty() {
                return;
            }
            // Other tests have loop devices too.
            let ours = |change: &Change| match change {
                Change::Attached { disk } | Change::Detached { disk } => disk.id.as_ref() == Some(&id),
                Change::Resized { disk, .. } | Change::Changed { disk } => disk.id.as_ref() == Some(&id),
            };
            seen.into_iter().filter(ours).for_each(|change| sender.send(change).unwrap());
        }
    });
    begun.recv().unwrap();
    // Well before the look that comes without an event.
    let next = || changes.recv_timeout(Duration::from_secs(10)).unwrap();
    let device = LoopDev::attach(&path, &[]);
    let Change::Attached { disk } = next() else { panic!("not attached") };
    assert_eq!((disk.name.as_str(), disk.size), (device.name(), ByteLen(8 * MIB)));
    OpenOptions::new().write(true).open(&path).unwrap().set_len(16 * MIB).unwrap();
    run("losetup", &["-c", device.node.to_str().unwrap()]);
    let Change::Resized { disk, from } = next() else { panic!("not resized") };
    assert_eq!((from, disk.size), (ByteLen(8 * MIB), ByteLen(16 * MIB)));
    drop(device);
    assert!(matches!(next(), Change::Detached { .. }));
    drop(stop);
    follower.join().unwrap();
}

/// What is assigned while it watches is read at the next look; that it cannot be read any more is no sign that nothing is.
#[test]
fn a_watch_sees_an_assignment_come_and_go() {
    let _turn = turn();
    let Some((dir, path, _device)) = attached("assigned.img") else { return };
    fs::write(dir.path().join("mt-agent.toml"), "allow_loop = true\n").unwrap();
    let command = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mt-agent"));
        command
            .args(args)
            .args(["--config", "mt-agent.toml", "--state-dir", "state"])
            .current_dir(dir.path());
        command
    };
    let mut watch =
        command(&["discover-disks", "--watch", "--loop", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let (sender, lines) = mpsc::channel();
    let stdout = BufReader::new(watch.stdout.take().unwrap());
    let reader = thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            _ = sender.send(serde_json::from_str::<serde_json::Value>(&line).unwrap());
        }
    });
    let id = loop_id(&path).to_string();
    // A device that is attached makes an event, and so a look. Meanwhile others may hold the disk for a moment.
    let deadline = Instant::now() + Duration::from_secs(60);
    // What is told of the disk until it has this role.
    let await_role = |role: &str| {
        let mut all = Vec::new();
        while all.last().is_none_or(|disk: &serde_json::Value| disk["role"] != *role) {
            let left = deadline.saturating_duration_since(Instant::now());
            let told = lines
                .recv_timeout(left)
                .unwrap_or_else(|_| panic!("it was not told that the disk is {role}"));
            let listed = told["disks"].as_array().into_iter().flatten();
            all.extend(listed.chain(told.get("disk")).find(|disk| disk["id"] == *id).cloned());
        }
        all
    };
    let event = |name: &str| {
        let other = path.with_file_name(name);
        image(&other, MIB);
        LoopDev::attach(&other, &[])
    };
    let protect = |args: &[&str]| {
        let output = command(&[&["protect"], args].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    await_role("free");
    protect(&["add", "web01", "--disk", &format!("root={id}")]);
    let _one = event("one.img");
    await_role("assigned");
    // As where the file system is unmounted for a while.
    let (there, away) = (dir.path().join("state/retention"), dir.path().join("away"));
    fs::rename(&there, &away).unwrap();
    let _two = event("two.img");
    let told = await_role("unknown");
    assert!(told.iter().all(|disk| disk["role"] != "free"), "{told:?}");
    let why = "state/retention holds no protections any more; mount the retention file system";
    assert!(told.last().unwrap()["problems"].to_string().contains(why), "{told:?}");
    fs::rename(&away, &there).unwrap();
    let _three = event("three.img");
    await_role("assigned");
    protect(&["remove", "web01"]);
    let _other = event("other.img");
    await_role("free");
    watch.kill().unwrap();
    watch.wait().unwrap();
    reader.join().unwrap();
}

/// `discover-disks --watch | head -n1`, where nothing changes that would be told.
#[test]
fn a_watch_ends_with_whoever_reads_it() {
    let mut watch = Command::new(env!("CARGO_BIN_EXE_mt-agent"));
    let mut watch =
        watch.args(["discover-disks", "--watch", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(watch.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("{\"schema_version\":1"), "{line}");
    // Well before the look that comes without an event.
    let deadline = Instant::now() + Duration::from_secs(10);
    let ended = loop {
        match watch.try_wait().unwrap() {
            None if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            ended => break ended,
        }
    };
    watch.kill().unwrap();
    watch.wait().unwrap();
    assert_eq!(ended.and_then(|status| status.code()), Some(0));
}
