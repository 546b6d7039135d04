//! `mt-agent protect` and `mt-agent status`, on loop devices and a real control socket.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use mt_agent::agent::control::Control;
use mt_agent::agent::status::{Board, Live, Service};
use mt_agent::name::Name;
use mt_agent::pass::PassId;
use mt_agent::protection::{Source, Store};
use mt_agent::storage::device::Engine;
use mt_agent::volume::counters::Counters;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A loop device over a file of its own, detached when this is dropped.
struct Loop {
    node: PathBuf,
    file: PathBuf,
}

impl Loop {
    fn new(dir: &Path, name: &str, size: u64) -> Loop {
        let file = dir.join(name);
        fs::File::create(&file).unwrap().set_len(size).unwrap();
        Loop::over(&file, &[])
    }

    fn over(file: &Path, options: &[&str]) -> Loop {
        let made =
            Command::new("losetup").args(["--find", "--show"]).args(options).arg(file).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let node = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
        Loop { node, file: file.to_owned() }
    }

    fn id(&self) -> String {
        format!("loop:{}", self.file.display())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.node).status();
        assert!(detached.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

fn root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let is =
        status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"));
    if !is {
        eprintln!("SKIPPED: needs root for loop devices");
    }
    is
}

struct Site {
    dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mt-agent.toml"), "allow_loop = true\n").unwrap();
        Site { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mt-agent"));
        command.args(args).arg("--config").arg(self.path().join("mt-agent.toml"));
        command.arg("--state-dir").arg(self.path().join("state"));
        command
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    fn done(&self, args: &[&str]) -> String {
        let (code, out, err) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {err}");
        out
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.done(&[args, &["--json"]].concat())).unwrap()
    }

    fn refused(&self, args: &[&str], what: &str) {
        let (code, out, err) = self.run(args);
        assert_eq!((code, out.as_str()), (3, ""), "{args:?}: {err}");
        assert!(err.contains(what), "{args:?}: {err}");
    }

    fn store(&self) -> Store {
        Store::open(self.path().join("state/retention"))
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[test]
fn disks_are_assigned_listed_and_taken_away() {
    if !root() {
        return;
    }
    let site = Site::new();
    let (a, b) = (Loop::new(site.path(), "a", 8 * MIB), Loop::new(site.path(), "b", 16 * MIB));
    let both = format!("root={},data={}", a.id(), b.node.display());

    let out = site.done(&["protect", "add", "web01", "--disk", &both, "--dry-run"]);
    assert!(out.contains("would be assigned") && out.contains("nothing was written"), "{out}");
    assert!(!site.path().join("state").exists(), "a dry run wrote");

    let added = site.json(&["protect", "add", "web01", "--disk", &both]);
    assert_eq!((added["schema_version"].as_u64(), added["dry_run"].as_bool()), (Some(1), Some(false)));
    // What was given as a place is kept as an identity.
    assert_eq!(added["disks"][1]["id"], b.id());
    let file = fs::read_to_string(site.store().file(&name("web01"))).unwrap();
    assert!(!file.contains("/dev/") && file.contains(&b.id()), "{file}");

    let listed = site.json(&["protect", "list"]);
    assert_eq!(listed["machines"][0]["disks"][0]["name"], "root");
    assert_eq!(listed["machines"][0]["disks"][1]["size"], 16 * MIB);
    assert_eq!(listed["machines"][0]["disks"][1]["state"], "empty");
    let out = site.done(&["protect", "list", "web01"]);
    assert!(out.starts_with("MACHINE") && out.contains("8.0 MiB") && out.contains(&a.id()), "{out}");

    let again = site.json(&["protect", "add", "web01", "--disk", &both]);
    assert_eq!(again["disks"][0]["already_assigned"], true);
    site.refused(
        &["protect", "add", "db01", "--disk", &format!("root={}", a.id())],
        "assigned to machine web01 as root",
    );
    assert!(!site.store().file(&name("db01")).exists());

    site.refused(&["protect", "remove", "web01", "--disk", "nope"], "no disk nope");
    site.refused(&["protect", "remove", "nobody"], "no disk is assigned to machine nobody");
    let hold = site.store().hold(&name("web01")).unwrap();
    site.refused(&["protect", "remove", "web01"], "machine web01 is receiving");
    site.refused(&["protect", "remove", "web01", "--dry-run"], "machine web01 is receiving");
    drop(hold);
    let planned = site.json(&["protect", "remove", "web01", "--disk", "root", "--dry-run"]);
    assert_eq!(
        (&planned["dry_run"], &planned["disks"][0]["id"]),
        (&true.into(), &a.id().into()),
        "{planned}"
    );
    let out = site.done(&["protect", "remove", "web01", "--dry-run"]);
    assert!(out.contains("data would be taken away") && out.contains("nothing was written"), "{out}");
    assert_eq!(site.json(&["protect", "list"])["machines"][0]["disks"].as_array().unwrap().len(), 2);
    let out = site.done(&["protect", "remove", "web01", "--disk", "root"]);
    assert!(out.contains("root is taken away"), "{out}");
    site.done(&["protect", "add", "db01", "--disk", &format!("root={}", a.id())]);
    site.done(&["protect", "remove", "web01"]);
    let removed = site.json(&["protect", "list"]);
    assert_eq!(removed["machines"].as_array().unwrap().len(), 1);
    // Where a disk is now, and that it is not there.
    assert_eq!(removed["machines"][0]["disks"][0]["node"], a.node.to_str().unwrap());
    drop(a);
    // Detached when whoever lists disks meanwhile has closed it.
    let node = || site.json(&["protect", "list"])["machines"][0]["disks"][0]["node"].clone();
    let start = std::time::Instant::now();
    while node() != Value::Null {
        assert!(start.elapsed().as_secs() < 30, "the device is not detached");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(site.done(&["protect", "list"]).contains("absent"));
    site.refused(&["protect", "list", "web01"], "no disk is assigned to machine web01");
}

#[test]
fn what_must_not_be_a_target_is_refused_and_nothing_is_written() {
    if !root() {
        return;
    }
    let site = Site::new();
    let good = Loop::new(site.path(), "good", 8 * MIB);
    let add = |disks: &str, what: &str| {
        let both = format!("good={},bad={disks}", good.id());
        site.refused(&["protect", "add", "web01", "--disk", &both], what);
        assert!(!site.path().join("state").exists(), "half of a refused command was done");
    };
    add(&good.id(), "same disk as good");
    add("loop:/no/such/file", "no such disk is attached");
    add("/dev/null", "not a whole disk");
    add("naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90", "no such disk is attached");

    let file = site.path().join("read-only");
    fs::write(&file, vec![0; MIB as usize]).unwrap();
    let read_only = Loop::over(&file, &["--read-only"]);
    add(&read_only.id(), "read-only");

    let first = Loop::new(site.path(), "twice", 8 * MIB);
    let second = Loop::over(&first.file, &[]);
    add(&first.id(), "same identity");
    drop(second);

    // Held by somebody, who is this process.
    let used = Loop::new(site.path(), "used", 8 * MIB);
    let mut options = fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), 0o200);
    let held = options.open(&used.node).unwrap();
    add(&used.id(), "in use");
    drop(held);

    // Made on the file: whoever lists disks beside this holds each for a moment.
    let file = site.path().join("full");
    fs::File::create(&file).unwrap().set_len(8 * MIB).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file).status().unwrap();
    assert!(made.success());
    let full = Loop::over(&file, &[]);
    add(&full.id(), "ext4");
    add(&full.id(), "--overwrite");
    let disk = format!("root={}", full.id());
    let out = site.done(&["protect", "add", "web02", "--overwrite", "--disk", &disk]);
    assert!(
        out.contains("it carries") && out.contains("ext4") && out.contains("will be overwritten"),
        "{out}"
    );
    assert!(site.store().load(&name("web02")).unwrap().disks[0].overwrite);
    // Looking and assigning wrote nothing to it.
    let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(&full.node).output().unwrap();
    assert!(checked.status.success());

    // Nothing announces itself on this one, and it is full of data all the same.
    let raw = Loop::new(site.path(), "raw", 100 * MIB);
    let file = fs::OpenOptions::new().write(true).open(&raw.file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0x5a; 88 * MIB as usize], 2 * MIB).unwrap();
    let disk = format!("root={}", raw.id());
    let add_raw = ["protect", "add", "web03", "--disk", &disk];
    site.refused(&add_raw, "data without a known signature (at byte ");
    let out = site.done(&[&add_raw[..], &["--overwrite", "--dry-run"]].concat());
    assert!(out.contains("data without a known signature"), "{out}");
    let blank = site.json(&["protect", "add", "web03", "--dry-run", "--disk", &format!("b={}", good.id())]);
    let content = &blank["disks"][0]["content"];
    assert_eq!((&content["first_data"], &content["places"]), (&Value::Null, &512.into()), "{blank}");

    fs::write(site.path().join("mt-agent.toml"), "").unwrap();
    let disk = format!("root={}", good.id());
    site.refused(&["protect", "add", "web01", "--disk", &disk], "allow_loop = true");
}

#[test]
fn wrong_usage_and_broken_files_say_what_to_do() {
    let site = Site::new();
    for (args, what) in [
        (&["protect", "add", "web01"][..], "--disk"),
        (&["protect", "add", "../x", "--disk", "a=/dev/sda"], "is no name"),
        (&["protect", "add", "web01", "--disk", "/dev/sda"], "NAME=DISKID"),
        (&["protect", "add", "web01", "--disk", "root=sda"], "discover-disks"),
        (&["protect", "add", "web01", "--disk", "a=/dev/sda,a=/dev/sdb"], "the disk a is named twice"),
    ] {
        let (code, _, err) = site.run(args);
        assert_eq!(code, 2, "{args:?}: {err}");
        assert!(err.contains(what), "{args:?}: {err}");
    }
    let out = site.done(&["protect", "list"]);
    assert!(out.contains("mt-agent protect add"), "{out}");
    fs::create_dir_all(site.path().join("state/retention/machines")).unwrap();
    fs::write(site.store().file(&name("web01")), "schema_version = 1\nmachine = web01\n").unwrap();
    fs::write(site.store().file(&name("web02")), "schema_version = 7\n").unwrap();
    let (code, out, err) = site.run(&["protect", "list"]);
    assert_eq!(code, 1, "{err}");
    assert!(out.contains("web01.toml:2: ") && out.contains("update mt-agent"), "{out}");
    let (code, out, _) = site.run(&["protect", "list", "--json"]);
    let listed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, listed["machines"].as_array().unwrap().len()), (1, 2));
    assert!(listed["machines"][0]["error"].as_str().unwrap().contains("web01.toml:2: "), "{out}");

    fs::write(site.path().join("mt-agent.toml"), "\nretention = \"/x\"\n").unwrap();
    let (code, _, err) = site.run(&["protect", "list"]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("mt-agent.toml:2: ") && err.contains("`retention_dir`"), "{err}");
}

/// What is not known to be free is not called so.
#[test]
fn a_protection_that_cannot_be_read_leaves_no_disk_free() {
    if !root() {
        return;
    }
    let site = Site::new();
    let (a, b) = (Loop::new(site.path(), "a", 8 * MIB), Loop::new(site.path(), "b", 8 * MIB));
    site.done(&["protect", "add", "web01", "--disk", &format!("root={}", a.id())]);
    let roles = || {
        let listed = site.json(&["discover-disks", "--loop"]);
        let disks = listed["disks"].as_array().unwrap().clone();
        let find = |wanted: &Loop| disks.iter().find(|disk| disk["id"] == wanted.id()).unwrap().clone();
        [find(&a), find(&b)]
    };
    assert_eq!(roles().map(|disk| disk["role"].clone()), ["assigned", "free"]);
    fs::write(site.store().file(&name("web02")), "schema_version = 1\nmachine = web02\n").unwrap();
    let [first, second] = roles();
    assert_eq!((&first["role"], &second["role"]), (&"assigned".into(), &"unknown".into()));
    let why = second["problems"][0].as_str().unwrap();
    assert!(why.contains("whether it is assigned is not known") && why.contains("web02.toml:2: "), "{why}");
    // The directory itself, as for who is not root.
    fs::remove_dir_all(site.path().join("state/retention/machines")).unwrap();
    fs::write(site.path().join("state/retention/machines"), "").unwrap();
    assert_eq!(roles().map(|disk| disk["role"].clone()), ["unknown", "unknown"]);
}

#[test]
fn two_commands_at_once_never_share_a_disk() {
    if !root() {
        return;
    }
    let site = Site::new();
    let disk = Loop::new(site.path(), "wanted", 8 * MIB);
    for round in 0..3 {
        let wanted = format!("root={}", disk.id());
        let children: Vec<_> = (0..4)
            .map(|n| {
                let mut command = site.command(&["protect", "add", &format!("m{n}"), "--disk", &wanted]);
                command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
            })
            .collect();
        let codes: Vec<_> =
            children.into_iter().map(|mut child| child.wait().unwrap().code().unwrap()).collect();
        assert_eq!(codes.iter().filter(|&&code| code == 0).count(), 1, "round {round}: {codes:?}");
        assert!(codes.iter().all(|code| [0, 3].contains(code)), "round {round}: {codes:?}");
        let assigned = site.store().assigned().unwrap();
        assert_eq!(assigned.len(), 1);
        site.store().remove(&name(assigned.values().next().unwrap()), None).unwrap();
    }
}

#[test]
fn status_shows_a_service_that_runs_and_says_so_of_one_that_does_not() {
    let site = Site::new();
    let socket = site.path().join("control.sock");
    let socket_text = socket.to_str().unwrap().to_owned();
    let status = |more: &[&str]| site.run(&[&["status", "--socket", &socket_text], more].concat());
    let (code, out, err) = status(&[]);
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(err.contains("start it with `mt-agent serve`"), "{err}");
    // A service that was killed.
    drop(UnixListener::bind(&socket).unwrap());
    assert!(status(&[]).2.contains("is not running"));
    // Somebody else's socket.
    fs::remove_file(&socket).unwrap();
    let other = UnixListener::bind(&socket).unwrap();
    let answer = std::thread::spawn(move || {
        let (mut stream, _) = other.accept().unwrap();
        std::io::Write::write_all(&mut stream, b"SSH-2.0-OpenSSH_9.9\r\n").unwrap();
    });
    let (code, _, err) = status(&[]);
    answer.join().unwrap();
    assert!(code == 1 && err.contains("is not mt-agent"), "{err}");

    let store = site.store();
    let id = "naa.6000c2939d1a4b6f0e8c2d7a5b1f3e90";
    let assignment = mt_agent::protection::Assignment {
        name: name("root"),
        id: id.parse().unwrap(),
        size: mt_agent::units::ByteLen(10 << 30),
        logical_sector: 512,
        overwrite: false,
        seed: false,
        assigned_at: time::OffsetDateTime::UNIX_EPOCH,
        state: mt_agent::protection::State::Empty,
        last_commit: None,
        source: None,
        released: None,
        taken_back: false,
    };
    store.assign(&name("web01"), &[assignment]).unwrap();
    store
        .begin_pass(
            &name("web01"),
            &name("root"),
            PassId(1),
            &Source { size: mt_agent::units::ByteLen(1), id: None },
        )
        .unwrap();
    let engine = Engine { name: "io-uring".to_owned(), why: "probed".to_owned() };
    let service = Arc::new(Service::new("[::]:9443".parse().unwrap(), engine.clone()));
    let live = Live::default();
    let counters = Arc::new(Counters::new(10 << 30, engine));
    let _shown = live.show(name("web01"), name("root"), counters.clone());
    counters.begin(PassId(1).to_string());
    counters.received_bytes.store(5 << 30, Relaxed);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let control = runtime.block_on(async { Control::bind(&socket) }).unwrap();
    runtime.spawn(control.serve(
        Arc::new(Board::new(service, live, store)),
        Default::default(),
        std::future::pending(),
    ));

    let (code, out, err) = status(&[]);
    assert_eq!(code, 0, "{err}");
    for what in ["listens at [::]:9443", "io-uring (probed)", "web01", id, "receiving", "5.0 GiB", "10.0 GiB"]
    {
        assert!(out.contains(what), "{what} is not in\n{out}");
    }
    let (_, out, _) = status(&["web01", "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["machines"][0]["volumes"][0]["received_bytes"], 5u64 << 30);
    let (code, _, err) = status(&["nobody"]);
    assert!(code == 3 && err.contains("machine nobody"), "{err}");

    // Watching: a line a second where nobody looks at a terminal, and no escape codes.
    let mut watch = site.command(&["status", "--watch", "--json", "--socket", &socket_text]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let line = |text: String| serde_json::from_str::<Value>(&text).unwrap()["machines"][0]["machine"].clone();
    assert_eq!(line(lines.next().unwrap().unwrap()), "web01");
    assert_eq!(line(lines.next().unwrap().unwrap()), "web01");
    // Whoever listened has gone: it ends by itself.
    drop(lines);
    assert!(watch.wait().unwrap().success());
}
