//! Sources that are in use: frozen file systems and hooks, with a real ext4 on a loop device into which somebody writes all
//! the while.

mod support;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::{Frozen, Loop, MACHINE, MIB, Mount, Outcome, Process, Rig, run, tool, wait_for};

const SIZE: u64 = 32 * MIB;
/// A pass of some seconds.
const SLOW: [&str; 5] = ["--whole", "--compression", "off", "--bwlimit", "4M"];

/// A rig whose source is a mounted file system, into which somebody writes.
// Dropped in this order.
struct Site {
    writer: Writer,
    mount: Option<Mount>,
    source: Loop,
    rig: Rig,
}

/// Writes small files, one after another, until it is dropped.
struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    fn new(dir: &Path) -> Writer {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (dir, stopped, count) = (dir.to_owned(), stop.clone(), written.clone());
        let thread = std::thread::spawn(move || {
            for number in 0u64.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let path = dir.join(format!("file{}", number % 200));
                fs::write(&path, vec![number as u8; 20_000]).unwrap();
                if number % 7 == 0 {
                    fs::remove_file(path).unwrap();
                }
                if number % 3 == 0 {
                    tool("sync", &["-f", dir.to_str().unwrap()]);
                }
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Writer { stop, written, thread: Some(thread) }
    }

    /// How long until it goes on.
    fn waits(&self) -> Duration {
        let (before, start) = (self.written.load(Ordering::Relaxed), Instant::now());
        wait_for("a write", || (self.written.load(Ordering::Relaxed) > before + 1).then_some(()));
        start.elapsed()
    }

    /// Whether it is stopped in a write, for as long as this looks.
    fn is_held(&self) -> bool {
        let before = self.written.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(200));
        self.written.load(Ordering::Relaxed) <= before + 1
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap_or_default();
    }
}

impl Site {
    /// After a first pass.
    fn new() -> Site {
        let rig = Rig::new(&[SIZE]);
        let source = Loop::create(&rig.path("source.img"), SIZE);
        tool("mkfs.ext4", &["-q", source.node().to_str().unwrap()]);
        let mount = Some(Mount::new(source.node(), &rig.path("mnt")));
        support::write_random(&rig.path("mnt/ballast"), 0, SIZE / 2);
        let writer = Writer::new(&rig.path("mnt"));
        let site = Site { writer, mount, source, rig };
        site.send(&[]).ok();
        site
    }

    fn send(&self, args: &[&str]) -> Outcome {
        self.start(args).finish()
    }

    fn start(&self, args: &[&str]) -> Process {
        self.rig.start(&[("d0", self.source.node())], args)
    }

    /// Starts a pass and waits until it is read.
    fn start_into_pass(&self, args: &[&str]) -> Process {
        self.rig.start_into_pass(&[("d0", self.source.node())], &[&SLOW, args].concat())
    }

    fn points(&self) -> Vec<Value> {
        let list = run(&["points", MACHINE, "--json", "--config", &self.rig.service.config()]).ok().json();
        list["points"].as_array().unwrap().clone()
    }

    /// Kind of the newest point, and whether it is fuzzy.
    fn newest(&self) -> (String, bool) {
        let point = self.points().pop().unwrap();
        (point["kind"].as_str().unwrap().to_owned(), point["fuzzy"].as_bool().unwrap())
    }

    /// The newest point as an image file.
    fn exported(&self) -> PathBuf {
        let (out, id) =
            (self.rig.path("out"), self.points().pop().unwrap()["id"].as_str().unwrap().to_owned());
        fs::remove_dir_all(&out).unwrap_or_default();
        fs::create_dir(&out).unwrap();
        let what = format!("{MACHINE}@{id}");
        let dir = out.to_str().unwrap();
        run(&["export", &what, "--dir", dir, "--config", &self.rig.service.config()]).ok();
        out.join("d0.img")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.rig.path(name)
    }
}

/// The file system has nothing to repair: its journal is empty, which of one in use it is only while that is frozen, and
/// `e2fsck` finds nothing.
fn is_whole(image: &Path) -> bool {
    let features = tool("dumpe2fs", &["-h", image.to_str().unwrap()]);
    let check =
        Command::new("e2fsck").arg("-fn").arg(image).stdout(Stdio::null()).stderr(Stdio::null()).status();
    !features.contains("needs_recovery") && check.unwrap().success()
}

/// The processes that a process has started.
fn children(pid: u32) -> Vec<i32> {
    let mut children = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let text = fs::read_to_string(thread.unwrap().path().join("children")).unwrap_or_default();
        children.extend(text.split_whitespace().map(|pid| pid.parse::<i32>().unwrap()));
    }
    children
}

#[test]
fn a_frozen_source_gives_a_point_without_anything_to_repair() {
    require_root!();
    let site = Site::new();
    assert_eq!(site.newest(), ("crash".to_owned(), true));
    for _ in 0..3 {
        let sent = site.send(&["--freeze", "--whole", "--compression", "off", "--bwlimit", "32M"]).ok();
        assert!(!sent.stderr.contains("not one point in time"), "{sent:#?}");
        assert!(site.writer.waits() < Duration::from_secs(5));
        assert_eq!(site.newest(), ("filesystem".to_owned(), false));
        let image = site.exported();
        assert!(is_whole(&image));
        let disk = Loop::attach(&image, 512);
        let mount = Mount::with(disk.node(), &site.path("look"), "ro,noload");
        assert!(fs::read_dir(site.path("look")).unwrap().count() > 3);
        drop(mount);
    }
    run(&["failover", MACHINE, "--to", "latest", "--config", &site.rig.service.config()]).ok();
    assert!(is_whole(site.rig.targets[0].node()));
}

#[test]
fn it_is_frozen_while_it_is_read_and_thawed_however_that_ends() {
    require_root!();
    let site = Site::new();
    let count = site.points().len();
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT] {
        let send = site.start_into_pass(&["--freeze=60s"]);
        assert!(site.writer.is_held(), "{signal}");
        let start = Instant::now();
        send.signal(signal);
        site.writer.waits();
        assert!(start.elapsed() < Duration::from_secs(10), "{signal}: {:?}", start.elapsed());
        send.finish();
        site.rig.service.wait_until_idle();
    }
    // The master target goes away.
    let mut site = site;
    let send = site.start_into_pass(&["--freeze=60s"]);
    assert!(site.writer.is_held());
    site.rig.service.process().kill();
    site.writer.waits();
    send.finish().fails(1, &["the pass was not acknowledged"]);
    site.rig.service.spawn();
    assert_eq!(site.points().len(), count);
    site.send(&["--freeze"]).ok();
    assert!(is_whole(&site.exported()));
}

#[test]
fn at_the_limit_it_is_thawed_and_the_point_is_fuzzy() {
    require_root!();
    let site = Site::new();
    let send = site.start_into_pass(&["--freeze=4s"]);
    site.writer.waits();
    let sent = send.finish().ok();
    assert!(sent.stderr.contains("thawed before everything was read, because 4 s had passed"), "{sent:#?}");
    assert_eq!(site.newest(), ("crash".to_owned(), true));
    let (id, out) = (site.points().last().unwrap()["id"].clone(), site.path("fuzzy"));
    fs::create_dir(&out).unwrap();
    let what = format!("{MACHINE}@{}", id.as_str().unwrap());
    let export = ["export", &what, "--dir", out.to_str().unwrap(), "--config", &site.rig.service.config()];
    let export = run(&export).ok();
    assert!(export.stderr.contains("is no moment of its source"), "{export:#?}");
    // Whoever thaws it in between makes it fuzzy as well.
    let send = site.start_into_pass(&["--freeze=60s"]);
    tool("fsfreeze", &["--unfreeze", site.path("mnt").to_str().unwrap()]);
    let sent = send.finish().ok();
    assert!(sent.stderr.contains("thawed by somebody else"), "{sent:#?}");
    assert_eq!(site.newest(), ("crash".to_owned(), true));
}

#[test]
fn the_guard_is_guarded() {
    require_root!();
    let site = Site::new();
    let send = site.start_into_pass(&["--freeze=60s"]);
    let guard = children(send.pid());
    assert_eq!(guard.len(), 1);
    // What ends others does not end it; what does is noticed.
    kill(Pid::from_raw(guard[0]), Signal::SIGTERM).unwrap();
    assert!(site.writer.is_held());
    kill(Pid::from_raw(guard[0]), Signal::SIGKILL).unwrap();
    site.writer.waits();
    let sent = send.finish().ok();
    assert!(sent.stderr.contains("the process that freezes was ended"), "{sent:#?}");
    assert_eq!(site.newest(), ("crash".to_owned(), true));
}

/// A guard that is stopped neither thaws nor says anything: it is ended, and what it should have done is done in its place.
#[test]
fn a_guard_that_stands_still_keeps_nothing_frozen() {
    require_root!();
    let site = Site::new();
    let send = site.start_into_pass(&["--freeze=6s"]);
    let guard = children(send.pid());
    assert_eq!(guard.len(), 1);
    kill(Pid::from_raw(guard[0]), Signal::SIGSTOP).unwrap();
    assert!(site.writer.is_held());
    // Half a minute is what a thaw may take.
    let start = Instant::now();
    let sent = send.finish().ok();
    site.writer.waits();
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    assert!(sent.stderr.contains("the process that freezes was ended, or did not answer"), "{sent:#?}");
    assert!(kill(Pid::from_raw(guard[0]), None).is_err(), "it was left behind");
    assert_eq!(site.newest(), ("crash".to_owned(), true));
}

#[test]
fn what_must_not_be_frozen_is_refused() {
    require_root!();
    let site = Site::new();
    let count = site.points().len();
    // Its own output would wait for the thaw.
    let mut command = site.rig.command(&[("d0", site.source.node())], &["--freeze"]);
    command.stdout(File::create(site.path("mnt/output")).unwrap()).stderr(Stdio::piped());
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(3) && said.contains("would wait for its thaw"), "{said}");
    // Somebody else's freeze is not ours to end.
    let frozen = Frozen::new(&site.path("mnt"));
    site.send(&["--freeze"]).fails(3, &["nothing was sent", "is frozen already"]);
    assert!(site.writer.is_held());
    drop(frozen);
    site.writer.waits();
    assert_eq!(site.points().len(), count);
    for wrong in ["--freeze=0s", "--freeze=11m", "--freeze=soon", "--hook-timeout=9m"] {
        site.send(&[wrong]).fails(2, &["invalid value"]);
    }
}

/// Not every file system can be frozen; what was frozen before one that cannot is thawed.
#[test]
fn what_cannot_be_frozen_is_refused() {
    require_root!();
    let dir = support::directory();
    let tmpfs = support::Tmpfs::mount(&dir.path().join("tmpfs"), MIB);
    let disk = Loop::create(&dir.path().join("disk.img"), SIZE);
    tool("mkfs.ext4", &["-q", disk.node().to_str().unwrap()]);
    let mount = Mount::new(disk.node(), &dir.path().join("mnt"));
    let mut guard = support::mt_agent();
    guard.args(["hold-frozen", "60000"]).args([dir.path().join("mnt"), dir.path().join("tmpfs")]);
    let mut guard = guard.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    guard.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(guard.wait().unwrap().success());
    assert_eq!(said, format!("failed 1 {}\n", libc::EOPNOTSUPP));
    fs::write(dir.path().join("mnt/file"), "it is thawed").unwrap();
    drop(mount);
    drop(tmpfs);
}

/// A file system in a file of another one that is frozen, too.
#[test]
fn what_lies_on_what_is_frozen_is_frozen_first() {
    require_root!();
    let rig = Rig::new(&[SIZE, SIZE / 2]);
    let outer = Loop::create(&rig.path("outer.img"), SIZE);
    tool("mkfs.ext4", &["-q", outer.node().to_str().unwrap()]);
    let outer_mount = Mount::new(outer.node(), &rig.path("outer"));
    let inner = Loop::create(&rig.path("outer/inner.img"), SIZE / 2);
    tool("mkfs.ext4", &["-q", inner.node().to_str().unwrap()]);
    let inner_mount = Mount::new(inner.node(), &rig.path("inner"));
    let writer = Writer::new(&rig.path("inner"));
    let disks = [("d0", outer.node()), ("d1", inner.node())];
    rig.send(&disks, &[]).ok();
    let sent = rig.send(&disks, &["--freeze=60s"]).ok();
    assert!(!sent.stderr.contains("no moment"), "{sent:#?}");
    writer.waits();
    drop(writer);
    run(&["failover", MACHINE, "--to", "latest", "--config", &rig.service.config()]).ok();
    assert!(is_whole(rig.targets[0].node()) && is_whole(rig.targets[1].node()));
    drop(inner_mount);
    drop(inner);
    drop(outer_mount);
}

#[test]
fn hooks_run_around_the_reading_in_their_order() {
    require_root!();
    let site = Site::new();
    let story = site.path("story");
    let note = |what: &str, file: &str| {
        format!(
            "echo {what} $MT_AGENT_MACHINE $MT_AGENT_POINT $MT_AGENT_DISKS >> {}; echo > {}; sync -f {}",
            story.display(),
            site.path("mnt").join(file).display(),
            site.path("mnt").display()
        )
    };
    let (pre, post) = (note("pre", "before"), note("post", "after"));
    site.send(&["--freeze", "--pre-hook", &pre, "--post-hook", &post, "--json"]).ok().json();
    assert_eq!(site.newest(), ("application".to_owned(), false));
    let id = site.points().pop().unwrap()["id"].as_str().unwrap().to_owned();
    assert_eq!(
        fs::read_to_string(&story).unwrap(),
        format!("pre {MACHINE} {id} d0\npost {MACHINE} {id} d0\n")
    );
    // The one before the freeze is in the point, the one after it is not.
    let disk = Loop::attach(&site.exported(), 512);
    let mount = Mount::with(disk.node(), &site.path("look"), "ro,noload");
    assert!(site.path("look/before").exists() && !site.path("look/after").exists());
    drop(mount);
    drop(disk);
    let found = run(&[
        "failover",
        MACHINE,
        "--to",
        "latest-application",
        "--dry-run",
        "--json",
        "--config",
        &site.rig.service.config(),
    ]);
    assert_eq!(found.ok().json()["point"], id);
    // One of the two is no word of the application; and without a freeze a source in use is no moment.
    site.send(&["--freeze", "--pre-hook", "true"]).ok();
    assert_eq!(site.newest(), ("filesystem".to_owned(), false));
    site.send(&["--pre-hook", "true", "--post-hook", "true"]).ok();
    assert_eq!(site.newest(), ("application".to_owned(), true));
}

#[test]
fn hooks_that_fail_or_take_too_long() {
    require_root!();
    let mut site = Site::new();
    let count = site.points().len();
    let after = site.path("after");
    let post = format!("echo >> {}", after.display());
    let ran = || fs::read_to_string(&after).map_or(0, |text| text.len());
    let state = site.rig.service.recorded(MACHINE, "d0");
    site.send(&["--freeze", "--pre-hook", "exit 7", "--post-hook", &post])
        .fails(3, &["nothing was sent", "the pre-hook failed: exit status: 7"]);
    assert_eq!(ran(), 1);
    // It and all that it started is killed.
    let (start, alive) = (Instant::now(), site.path("alive"));
    let slow = format!("trap '' TERM; (sleep 4; touch {}) & wait; sleep 60", alive.display());
    site.send(&["--freeze", "--pre-hook", &slow, "--post-hook", &post, "--hook-timeout", "1s"])
        .fails(3, &["nothing was sent", "the pre-hook did not end within 1s and was killed"]);
    assert_eq!(ran(), 2);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!((site.points().len(), site.rig.service.recorded(MACHINE, "d0")), (count, state));
    // A post-hook that fails changes nothing of the point.
    site.send(&["--post-hook", "exit 1"]).fails(1, &["the post-hook failed: exit status: 1"]);
    assert_eq!(site.points().len(), count + 1);
    site.send(&["--post-hook", "sleep 60", "--hook-timeout", "1s"])
        .fails(1, &["the post-hook did not end within 1s"]);
    // It runs also when the pass is interrupted, in the middle of the pre-hook or of the reading.
    for pre in ["true", "sleep 60"] {
        let began = site.path(&format!("began-{}", &pre[..4]));
        let pre = format!("touch {}; {pre}", began.display());
        let before = ran();
        let send =
            site.start(&[&SLOW[..], &["--freeze=60s", "--pre-hook", &pre, "--post-hook", &post]].concat());
        wait_for("the pre-hook", || began.exists().then_some(()));
        std::thread::sleep(Duration::from_millis(300));
        send.signal(Signal::SIGTERM);
        send.finish().fails(1, &["interrupted"]);
        assert_eq!(ran(), before + 1);
        site.writer.waits();
        site.rig.service.wait_until_idle();
    }
    // And when the master target goes away.
    let before = ran();
    let send = site.start_into_pass(&["--freeze=60s", "--post-hook", &post]);
    site.rig.service.process().kill();
    send.finish().fails(1, &["the pass was not acknowledged"]);
    assert_eq!(ran(), before + 1);
    std::thread::sleep(Duration::from_secs(4).saturating_sub(start.elapsed()));
    assert!(!alive.exists());
    drop(site.mount.take());
}
