//! The service as systemd runs it: a user of its own, readiness, watchdog, reload, end, sockets, the journal. systemd itself
//! is not here; what it would hear and hand over is.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mt_agent::durable;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use support::client::Client;
use support::{
    Frozen, Loop, MACHINE, MIB, Rig, Service, Surroundings, assert_equal, directory, mt_agent, run, tool,
    wait_for, write_random,
};
use tempfile::TempDir;

/// A user, a group and another group that nobody else has.
const USER: u32 = 64123;
const GROUP: u32 = 64124;
const DISKS: u32 = 64125;

/// A loop device that the members of [`DISKS`] may read and write, as `disk` has it on a host.
struct Lent {
    node: PathBuf,
    before: fs::Metadata,
}

impl Lent {
    fn new(disk: &Loop) -> Lent {
        let (node, before) = (disk.node().to_owned(), fs::metadata(disk.node()).unwrap());
        chown(&node, None, Some(DISKS)).unwrap();
        fs::set_permissions(&node, fs::Permissions::from_mode(0o660)).unwrap();
        Lent { node, before }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        chown(&self.node, Some(self.before.uid()), Some(self.before.gid())).unwrap();
        fs::set_permissions(&self.node, self.before.permissions()).unwrap();
    }
}

/// Everything below the directory that is not the user's.
fn foreign(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            found.extend(foreign(&path));
        }
        if (metadata.uid(), metadata.gid()) != (USER, GROUP) {
            found.push(path);
        }
    }
    found
}

type Messages = Vec<(Instant, Vec<u8>)>;

/// What somebody sends to a socket of datagrams, until this is dropped.
struct Heard {
    dir: TempDir,
    path: PathBuf,
    messages: Arc<Mutex<Messages>>,
}

impl Heard {
    fn new() -> Heard {
        let dir = directory();
        let path = dir.path().join("socket");
        let socket = UnixDatagram::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let messages = Arc::<Mutex<Messages>>::default();
        let (heard, known) = (messages.clone(), path.clone());
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            while known.exists() {
                let len = socket.recv(&mut buffer).unwrap();
                heard.lock().unwrap().push((Instant::now(), buffer[..len].to_owned()));
            }
        });
        Heard { dir, path, messages }
    }

    /// The lines that came after a moment.
    fn lines(&self, since: Instant) -> Vec<String> {
        let messages = self.messages.lock().unwrap();
        let texts = messages
            .iter()
            .filter(|(at, _)| *at >= since)
            .map(|(_, bytes)| String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect::<Vec<_>>());
        texts.flatten().collect()
    }

    fn wait(&self, since: Instant, what: &str) {
        wait_for(what, || self.lines(since).iter().any(|line| line.contains(what)).then_some(()));
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        // The thread is woken, finds the file gone and ends.
        let end = UnixDatagram::unbound().unwrap();
        end.connect(&self.path).unwrap();
        fs::remove_file(&self.path).unwrap();
        // It may have ended already.
        end.send(b"").ok();
    }
}

fn config(rig: &Rig, args: &[&str]) -> support::Outcome {
    run(&[args, &["--config", &rig.service.config()]].concat())
}

#[test]
fn a_user_of_its_own_serves_what_root_administers() {
    require_root!();
    let dir = directory();
    chown(dir.path(), Some(USER), Some(GROUP)).unwrap();
    let binary = dir.path().join("mt-agent");
    // By a process that ends: this one's other threads start some, which would have it open for writing for a moment.
    tool("install", &["-m", "755", env!("CARGO_BIN_EXE_mt-agent"), binary.to_str().unwrap()]);
    // Before the service has run for the first time.
    let state = dir.path().join("state");
    run(&["token", "create", "early", "--address", "127.0.0.1:1", "--state-dir", state.to_str().unwrap()])
        .ok();

    let setpriv = "setpriv --reuid 64123 --regid 64124 --groups 64125 --no-new-privs --inh-caps=-all --bounding-set=-all";
    let through = setpriv.split(' ').map(str::to_owned).collect();
    let surroundings = Surroundings { through, binary: Some(binary), ..Surroundings::default() };
    let service = Service::start_in(dir.path(), &[], surroundings);
    let disk = Loop::create(&dir.path().join("d0.img"), 16 * MIB);
    let _lent = Lent::new(&disk);
    let mut rig = Rig::assemble(dir, service, vec![disk]);
    let status = fs::read_to_string(format!("/proc/{}/status", rig.service.process().pid())).unwrap();
    assert!(status.contains(&format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}\n")), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000\n"), "{status}");

    let source = rig.random("source.img", 16 * MIB);
    let first = rig.path("first.img");
    rig.send(&[("d0", &source)], &[]).ok();
    fs::copy(&source, &first).unwrap();
    for at in [0, 5, 9] {
        write_random(&source, at * MIB, MIB / 2);
        rig.send(&[("d0", &source)], &[]).ok();
    }
    assert_equal(&source, rig.targets[0].backing());
    config(&rig, &["check", MACHINE]).ok();
    let list = config(&rig, &["points", MACHINE, "--json"]).ok().json();
    assert_eq!(list["points"].as_array().unwrap().len(), 4);
    let oldest = list["points"][0]["id"].as_str().unwrap().to_owned();

    // Root goes back, which writes records and before-images, and takes it back; and the service goes on with all of it.
    config(&rig, &["failover", MACHINE, "--to", &oldest]).ok();
    assert_equal(&first, rig.targets[0].backing());
    assert_eq!(foreign(&state), Vec::<PathBuf>::new());
    rig.send(&[("d0", &source)], &[]).fails(3, &["was failed over"]);
    config(&rig, &["failover", MACHINE, "--undo"]).ok();
    assert_equal(&source, rig.targets[0].backing());
    config(&rig, &["protect", "group", "shop", "--machines", MACHINE]).ok();
    write_random(&source, 3 * MIB, MIB);
    rig.send(&[("d0", &source)], &[]).ok();
    config(&rig, &["failover", MACHINE, "--to", &oldest]).ok();
    rig.service.process().kill();
    rig.service.spawn();
    config(&rig, &["failover", MACHINE, "--undo"]).ok();
    write_random(&source, 12 * MIB, MIB);
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
    rig.synchronized("d0");
    assert_eq!(foreign(&state), Vec::<PathBuf>::new());
    assert!(!rig.service.log().contains("Permission denied"), "{}", rig.service.log());
}

#[test]
fn what_root_makes_is_handed_over_and_nothing_else() {
    require_root!();
    let dir = directory();
    let at = |name: &str| dir.path().join(name);
    let owner = |name: &str| {
        let metadata = fs::symlink_metadata(at(name)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    durable::write(&at("before"), b"x", 0o600).unwrap();
    assert_eq!(owner("before"), (0, 0));
    chown(dir.path(), Some(USER), Some(GROUP)).unwrap();
    durable::write(&at("file"), b"x", 0o640).unwrap();
    durable::private_dir(&at("a/b")).unwrap();
    drop(durable::lock(&at("a/lock")).unwrap());
    // What was root's before, or was left by a crash.
    drop(durable::lock(&at("before")).unwrap());
    for name in ["file", "a", "a/b", "a/lock", "before"] {
        assert_eq!(owner(name), (USER, GROUP), "{name}");
    }
    // The user could have put these there to get hold of somebody else's files.
    let theirs = directory();
    let file = theirs.path().join("shadow");
    fs::write(&file, "secret").unwrap();
    symlink(&file, at("link")).unwrap();
    fs::hard_link(&file, at("second")).unwrap();
    symlink(theirs.path(), at("elsewhere")).unwrap();
    durable::lock(&at("link")).unwrap_err();
    drop(durable::lock(&at("second")).unwrap());
    durable::private_dir(&at("elsewhere")).unwrap();
    for path in [&file, &theirs.path().to_owned()] {
        assert_eq!(fs::metadata(path).unwrap().uid(), 0, "{}", path.display());
    }
}

#[test]
fn systemd_hears_when_it_is_ready_how_it_goes_and_when_it_stops() {
    require_root!();
    let dir = directory();
    let heard = Heard::new();
    let notify = ("NOTIFY_SOCKET", heard.path.display().to_string());
    let variables = vec![notify.clone(), ("WATCHDOG_USEC", "1000000".to_owned())];
    // Who cannot listen is never ready.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = mt_agent();
    command.args(["serve", "--listen", &taken.local_addr().unwrap().to_string(), "--state-dir"]);
    command.arg(dir.path().join("other")).arg("--allow-root-retention");
    command.arg("--control-socket").arg(dir.path().join("other.sock")).env(notify.0, &notify.1);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let start = Instant::now();
    assert_eq!(heard.lines(start - Duration::from_secs(60)), Vec::<String>::new());

    let service = Service::start_in(dir.path(), &[], Surroundings { variables, ..Surroundings::default() });
    heard.wait(start, "READY=1");
    TcpStream::connect(service.address()).unwrap();
    let disk = Loop::create(&dir.path().join("d0.img"), 16 * MIB);
    let mut rig = Rig::assemble(dir, service, vec![disk]);
    heard.wait(start, &format!("STATUS=listening at {}", rig.service.address()));
    let source = rig.random("source.img", 16 * MIB);
    let send = rig.start_into_pass(&[("d0", &source)], &["--bwlimit", "4M", "--compression", "off"]);
    heard.wait(start, "; receiving 1 disks of 1 machines: ");
    wait_for("a watchdog that is fed", || {
        (heard.lines(start).iter().filter(|line| *line == "WATCHDOG=1").count() > 2).then_some(())
    });
    let asked = Instant::now();
    rig.service.process().signal(Signal::SIGTERM);
    assert_eq!(rig.service.process().wait_within(Duration::from_secs(10)).code(), Some(0));
    heard.wait(asked, "STOPPING=1");
    send.finish().fails(1, &["the service stops"]);
    // Nothing half is committed.
    assert_eq!(rig.state("d0"), "receiving");
    let lines = heard.lines(start);
    assert_eq!(lines.iter().filter(|line| *line == "READY=1").count(), 1, "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_is_fed_while_every_disk_with_work_gets_on_with_it() {
    require_root!();
    let dir = directory();
    let under = Loop::create(&dir.path().join("under.img"), 64 * MIB);
    tool("mkfs.ext4", &["-q", under.node().to_str().unwrap()]);
    let mount = support::Mount::new(under.node(), &dir.path().join("slow"));
    let heard = Heard::new();
    // It stands still for too long after twice that.
    let variables =
        vec![("NOTIFY_SOCKET", heard.path.display().to_string()), ("WATCHDOG_USEC", "1000000".to_owned())];
    let service = Service::start_in(dir.path(), &[], Surroundings { variables, ..Surroundings::default() });
    let disk = Loop::create(&dir.path().join("slow/d0.img"), 24 * MIB);
    let mut rig = Rig::assemble(dir, service, vec![disk]);
    rig.mounts = vec![Box::new(mount), Box::new(under)];
    let fed = |since: Instant| heard.lines(since).iter().filter(|line| *line == "WATCHDOG=1").count();

    // A disk that did something and has nothing to do since, for longer than it may stand still.
    let (mut client, _) = Client::begun(&rig, "d0", 24 * MIB).await;
    client.data(0, 0, &[7; 4096]).await;
    wait_for("a write", || (rig.service.volume(MACHINE, "d0").written_bytes == Some(4096)).then_some(()));
    tokio::time::sleep(Duration::from_secs(3)).await;
    let idle = Instant::now();
    wait_for("the feeding", || (fed(idle) > 1).then_some(()));
    // Several times a second, but for a machine that stalls.
    assert!(idle.elapsed() < Duration::from_secs(4), "{:?}", idle.elapsed());
    drop(client);
    rig.wait_until_closed("d0");
    // A pass that is slow and gets on, for as long.
    let source = rig.random("source.img", 24 * MIB);
    let slow = Instant::now();
    rig.send(&[("d0", &source)], &["--bwlimit", "6M", "--compression", "off"]).ok();
    assert!(slow.elapsed() > Duration::from_secs(3), "{:?}", slow.elapsed());
    assert!(!rig.service.log().contains("the watchdog is not fed"), "{}", rig.service.log());

    write_random(&source, 0, 24 * MIB);
    let frozen = Frozen::new(&rig.path("slow"));
    let send = rig.start(&[("d0", &source)], &["--compression", "off"]);
    rig.service.wait_for_log("the watchdog is not fed any more");
    let hungry = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    // One may have been on its way.
    assert!(fed(hungry) <= 1, "{}", fed(hungry));
    drop(frozen);
    let thawed = Instant::now();
    heard.wait(thawed, "WATCHDOG=1");
    send.finish().ok();
    assert_equal(&source, rig.targets[0].backing());
}

/// Whoever does not go away, on either port, is cut off in time.
#[tokio::test]
async fn a_stop_takes_ten_seconds_at_most() {
    require_root!();
    let mut rig = Rig::new(&[16 * MIB]);
    let (_client, _) = Client::begun(&rig, "d0", 16 * MIB).await;
    let mut half = UnixStream::connect(rig.path("control.sock")).unwrap();
    std::io::Write::write_all(&mut half, b"GET /v1/status HTTP/1.1\r\nHost: x\r\n").unwrap();
    rig.service.process().signal(Signal::SIGTERM);
    let status = rig.service.process().wait_within(Duration::from_secs(10));
    assert_eq!(status.code(), Some(0), "{}", rig.service.log());
    assert_eq!(rig.state("d0"), "receiving");
}

#[test]
fn a_hangup_takes_on_what_can_change_and_names_what_cannot() {
    require_root!();
    let dir = directory();
    let heard = Heard::new();
    let variables = vec![("NOTIFY_SOCKET", heard.path.display().to_string())];
    let service = Service::start_in(dir.path(), &[], Surroundings { variables, ..Surroundings::default() });
    let disk = Loop::create(&dir.path().join("d0.img"), 16 * MIB);
    let mut rig = Rig::assemble(dir, service, vec![disk]);
    let source = rig.random("source.img", 16 * MIB);
    let file = rig.service.config();
    let text = fs::read_to_string(&file).unwrap();
    let hangup = |rig: &mut Rig, text: &str, said: &str| {
        fs::write(&file, text).unwrap();
        let (now, before) = (Instant::now(), rig.service.log().len());
        rig.service.process().signal(Signal::SIGHUP);
        wait_for(said, || rig.service.log()[before..].contains(said).then_some(()));
        heard.wait(now, "READY=1");
        let lines = heard.lines(now);
        let at = |what: &str| lines.iter().position(|line| line.starts_with(what));
        assert!(at("RELOADING=1") < at("READY=1") && at("MONOTONIC_USEC=").is_some(), "{lines:?}");
    };
    rig.send(&[("d0", &source)], &[]).ok();

    // A session that is open goes on as it was opened.
    let send =
        rig.start_into_pass(&[("d0", &source)], &["--whole", "--bwlimit", "6M", "--compression", "off"]);
    hangup(&mut rig, &text.replace("allow_loop = true", "allow_loop = false"), "allow_loop = false");
    send.finish().ok();
    rig.send(&[("d0", &source)], &[]).fails(3, &["`allow_loop` is not set"]);

    let wrong = format!("{text}windw = 1\nmax_sessions = 0\n");
    let refused = Instant::now();
    hangup(&mut rig, &wrong, "mt-agent.toml:6: max_sessions: 0 is out of bounds");
    let status =
        format!("; reload refused, the configuration stays what it was: {file}:5: there is no key `windw`");
    heard.wait(refused, &status);
    heard.wait(refused, " (and more: see the log)");
    assert!(rig.service.log().contains("mt-agent.toml:5: there is no key `windw`"), "{}", rig.service.log());
    rig.send(&[("d0", &source)], &[]).fails(3, &["`allow_loop` is not set"]);

    let other = text.replace("127.0.0.1:0", "127.0.0.1:1") + "max_sessions = 1\nlog_level = \"debug\"\n";
    let taken = Instant::now();
    hangup(&mut rig, &other, "only a restart of the service takes on");
    let lines = heard.lines(taken);
    let status = lines.iter().rfind(|line| line.starts_with("STATUS=")).unwrap();
    assert!(!status.contains("refused"), "{lines:?}");
    assert!(rig.service.log().contains("keys=\"listen\""), "{}", rig.service.log());
    let elsewhere = rig.elsewhere();
    let [first, second] = [
        rig.start_into_pass(&[("d0", &source)], &["--whole", "--bwlimit", "2M", "--compression", "off"]),
        rig.start(&[("d0", &source)], &["--state-dir", &elsewhere, "--retry-for", "60s"]),
    ];
    rig.service.wait_for_log("refused: `max_sessions` connections are open");
    first.finish().ok();
    second.finish().ok();
    // Nobody hears that at any other level.
    drop(TcpStream::connect(rig.service.address()).unwrap());
    rig.service.wait_for_log("DEBUG");
    hangup(
        &mut rig,
        &other.replace("debug", "info").replace("sessions = 1", "sessions = 9"),
        "max_sessions = 9",
    );
    let before = rig.service.log().matches("DEBUG").count();
    rig.send(&[("d0", &source)], &[]).ok();
    assert_eq!(rig.service.log().matches("DEBUG").count(), before);
}

#[test]
fn a_socket_that_is_handed_over_is_used_and_outlives_the_service() {
    require_root!();
    let dir = directory();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let hand = "exec 3<&$SOCKET; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
    let through = ["bash", "-c", hand, "bash"].map(str::to_owned).to_vec();
    let variables = vec![("SOCKET", listener.as_raw_fd().to_string())];
    let surroundings = Surroundings { through, variables, ..Surroundings::default() };
    // Not the address in its configuration.
    let service = Service::start_in(dir.path(), &["--listen", "127.0.0.1:1"], surroundings);
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    assert_eq!(service.address(), listener.local_addr().unwrap());
    let disk = Loop::create(&dir.path().join("d0.img"), 4 * MIB);
    let rig = Rig::assemble(dir, service, vec![disk]);
    let source = rig.random("source.img", 4 * MIB);
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());

    // Something else than a TCP socket that listens is no reason to listen elsewhere.
    for (file, said) in [("< /dev/null", "ENOTSOCK"), ("<> /dev/tcp/127.0.0.1/$PORT", "it is no TCP socket")]
    {
        let script = format!("exec 3{file}; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"");
        let mut command = std::process::Command::new("bash");
        command.args([
            "-c",
            &script,
            "bash",
            env!("CARGO_BIN_EXE_mt-agent"),
            "serve",
            "--allow-root-retention",
        ]);
        command.args(["--listen", "127.0.0.1:0", "--state-dir"]).arg(rig.path("other"));
        command.arg("--control-socket").arg(rig.path("other.sock"));
        command.env("PORT", rig.service.address().port().to_string());
        let mut refused = rig.spawn(command);
        let (status, log) = (refused.wait_within(support::PATIENCE), refused.stderr());
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("the socket that systemd hands over"), "{log}");
        assert!(log.contains(said) || log.contains("non-socket"), "{log}");
    }
}

/// An entry as it is sent to the journal (its native protocol).
fn fields(mut entry: &[u8]) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::<String, Vec<String>>::new();
    while !entry.is_empty() {
        let end = entry.iter().position(|byte| matches!(byte, b'=' | b'\n')).unwrap();
        let (name, rest) = (String::from_utf8(entry[..end].to_owned()).unwrap(), &entry[end + 1..]);
        let (value, rest) = if entry[end] == b'=' {
            rest.split_at(rest.iter().position(|byte| *byte == b'\n').unwrap())
        } else {
            let (len, rest) = rest.split_at(8);
            rest.split_at(usize::try_from(u64::from_le_bytes(len.try_into().unwrap())).unwrap())
        };
        found.entry(name).or_default().push(String::from_utf8(value.to_owned()).unwrap());
        entry = &rest[1..];
    }
    found
}

#[test]
fn the_journal_has_machine_disk_and_point_as_fields() {
    require_root!();
    let dir = directory();
    let heard = Heard::new();
    // The journal's place is fixed: it is taken in a name space of its own.
    let mount = "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && \
        mount --bind \"$JOURNAL\" /run/systemd/journal && exec \"$@\"";
    let through = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"];
    let through = through.map(str::to_owned).to_vec();
    let variables = vec![("JOURNAL", heard.dir.path().display().to_string())];
    let surroundings = Surroundings { through, variables, ..Surroundings::default() };
    let service = Service::start_in(dir.path(), &["--log-format", "journald"], surroundings);
    let disk = Loop::create(&dir.path().join("d0.img"), 4 * MIB);
    let mut rig = Rig::assemble(dir, service, vec![disk]);
    let source = rig.random("source.img", 4 * MIB);
    rig.send(&[("d0", &source)], &[]).ok();
    config(&rig, &["failover", MACHINE, "--to", "latest"]).ok();
    rig.send(&[("d0", &source)], &[]).fails(3, &["was failed over"]);
    let list = config(&rig, &["points", MACHINE, "--json"]).ok().json();
    let point = list["points"][0]["id"].as_str().unwrap();

    let entries = |what: &str| -> Vec<BTreeMap<String, Vec<String>>> {
        let messages = heard.messages.lock().unwrap();
        let entries = messages.iter().map(|(_, bytes)| fields(bytes));
        entries.filter(|entry| entry.get("MESSAGE").is_some_and(|message| message[0] == what)).collect()
    };
    let once = |entry: &BTreeMap<String, Vec<String>>, name: &str| {
        let values = entry.get(name).unwrap_or_else(|| panic!("no {name} in {entry:?}"));
        assert_eq!(values.len(), 1, "{name}: {values:?}");
        values[0].clone()
    };
    for what in ["pass began", "pass committed"] {
        let [entry] = wait_for(what, || <[_; 1]>::try_from(entries(what)).ok());
        assert_eq!(once(&entry, "MT_AGENT_MACHINE"), MACHINE);
        assert_eq!(once(&entry, "MT_AGENT_DISK"), "d0");
        assert_eq!(once(&entry, "MT_AGENT_POINT"), point);
        assert_eq!(once(&entry, "SYSLOG_IDENTIFIER"), "mt-agent");
        assert_eq!(once(&entry, "PRIORITY"), "5");
    }
    // Before the pass there is no point; and that it was refused is of the same machine and disk.
    let opened = &entries("volume opened")[0];
    assert_eq!((once(opened, "MT_AGENT_DISK").as_str(), opened.get("MT_AGENT_POINT")), ("d0", None));
    let refused = wait_for("the refusal", || {
        entries("connection ended")
            .into_iter()
            .find(|entry| once(entry, "MT_AGENT_ERROR").contains("failed over"))
    });
    assert_eq!(
        (once(&refused, "MT_AGENT_MACHINE"), once(&refused, "PRIORITY")),
        (MACHINE.into(), "4".into())
    );
    rig.service.process().kill();
}

#[test]
fn the_configuration_is_checked_and_shown_before_the_service_reads_it() {
    let dir = directory();
    let file = dir.path().join("mt-agent.toml");
    let path = file.to_str().unwrap();
    fs::write(&file, "window = \"16M\"\nretention_size = \"none\"\n").unwrap();
    let sound = run(&["config", "check", "--config", path]).ok();
    assert!(
        sound.stdout.starts_with("The configuration is sound") && sound.stdout.contains(path),
        "{sound:?}"
    );
    let shown = run(&["config", "show", "--config", path]).ok().stdout;
    assert_eq!(shown.lines().count(), 3, "{shown}");
    assert!(shown.contains(&format!("# {path}:1")), "{shown}");
    // What it prints is a configuration that means the same.
    let effective = run(&["config", "show", "--effective", "--config", path]).ok().stdout;
    let again = dir.path().join("again.toml");
    fs::write(&again, &effective).unwrap();
    let json = |file: &Path, args: &[&str]| {
        run(&[&["config", "show", "--json", "--config", file.to_str().unwrap()], args].concat()).ok().json()
    };
    let [one, two] = [json(&file, &["--effective"]), json(&again, &["--effective"])];
    let values = |shown: &serde_json::Value| -> Vec<_> {
        let keys = shown["keys"].as_array().unwrap();
        keys.iter().map(|key| (key["key"].clone(), key["value"].clone())).collect()
    };
    assert_eq!(values(&one), values(&two));
    assert_eq!(values(&one).len(), effective.lines().count() - 1);
    let window = one["keys"].as_array().unwrap().iter().find(|key| key["key"] == "window").unwrap().clone();
    assert_eq!(
        window,
        serde_json::json!({ "key": "window", "value": 16 * MIB, "file": path, "line": 1, "reloads": true })
    );
    assert_eq!(json(&file, &[])["keys"].as_array().unwrap().len(), 2);

    fs::write(&file, "windw = \"16M\"\n[x]\n\nlisten = 1\n").unwrap();
    let wrong = run(&["config", "check", "--config", path]).fails(3, &["the configuration has 2 mistakes"]);
    assert!(wrong.stdout.contains(&format!("{path}:1: there is no key `windw`: did you mean `window`?")));
    let report = run(&["config", "check", "--json", "--config", path]).fails(3, &[]).json();
    let lines: Vec<_> =
        report["mistakes"].as_array().unwrap().iter().map(|one| one["line"].clone()).collect();
    assert_eq!((lines, report["files"][0].as_str()), (vec![1.into(), 2.into()], Some(path)));
    assert_eq!(report["more"], 0);
    // systemd must not start it again and again: it does not pass by itself. Nor does a file that is none.
    run(&["serve", "--config", path]).fails(3, &["there is no key `windw`", "there is no key `x`"]);
    for (path, said) in [("nowhere", "No such file"), (".", "directory"), ("pipe", "no regular file")] {
        let path = dir.path().join(path);
        if path.ends_with("pipe") {
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        run(&["serve", "--config", path.to_str().unwrap()]).fails(3, &[said]);
    }
}

#[test]
fn a_configuration_that_is_something_else_is_refused_in_a_moment() {
    let dir = directory();
    let file = dir.path().join("mt-agent.toml");
    let path = file.to_str().unwrap();
    let keys: String = (0..60_000).map(|n| format!("windw{n} = 1\n")).collect();
    let lines = "= \n".repeat(20_000);
    // What is no TOML at all is told once for each line.
    for (text, count) in [(keys, 60_000), (lines, 20_000)] {
        fs::write(&file, &text).unwrap();
        let start = Instant::now();
        let check = ["config", "check", "--config", path];
        let wrong = run(&check).fails(3, &[&format!("the configuration has {count} mistakes")]);
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        let last = format!("and {} more", count - 100);
        assert_eq!((wrong.stdout.lines().count(), wrong.stdout.lines().last()), (101, Some(last.as_str())));
        assert!(wrong.stdout.starts_with(&format!("{path}:1: ")), "{}", wrong.stdout);
    }
    let report = run(&["config", "check", "--json", "--config", path]).fails(3, &[]).json();
    assert_eq!((report["mistakes"].as_array().unwrap().len(), &report["more"]), (100, &19_900.into()));
}

#[test]
fn names_do_nothing_to_a_terminal_and_are_no_lines_of_their_own() {
    let dir = directory();
    let file = dir.path().join("a\u{1b}[2J\nretention_dir = '\u{9b}2J'.toml");
    let (path, shown) = (file.to_str().unwrap(), "a\\u{1b}[2J\\nretention_dir = '\\u{9b}2J'.toml");
    let raw = |text: &str| text.contains(|c: char| c.is_control() && c != '\n');
    fs::write(&file, "state_dir = \"/a\"\n").unwrap();
    for args in [&["config", "check"][..], &["config", "show"], &["config", "show", "--effective"]] {
        let found = run(&[args, &["--config", path]].concat()).ok().stdout;
        assert!(found.contains(shown) && !raw(&found), "{found:?}");
        assert!(!found.lines().any(|line| line.starts_with("retention_dir = '")), "{found}");
    }
    // In values too: no path has any of these, and NUL would end it.
    for (text, said) in [
        ("state_dir = \"/a\\u0000b\"", "`/a\\0b` has a control character in it"),
        ("retention_dir = \"/a\\nb\"", "`/a\\nb` has a control character"),
        ("control_socket = \"/a\\u001b[2J\"", "`/a\\u{1b}[2J` has a control character"),
        ("log_level = \"\\u001b[2J\"", "has a control character"),
        ("engine = \"\\u001b[2J\"", "has a control character"),
        ("window = \"\\u001b[2J\"", "no size"),
        ("retention_age = \"999999h\\n\\n\"", "999999h\\n\\n is out of bounds"),
        ("\"\\u001b[2J\" = 1", "there is no key `\\u{1b}[2J`"),
        ("\u{1b}[2J = 1", ""),
    ] {
        fs::write(&file, text).unwrap();
        let wrong =
            run(&["config", "check", "--config", path]).fails(3, &["the configuration has a mistake"]);
        assert!(wrong.stdout.contains(&format!("{shown}:1: ")) && wrong.stdout.contains(said), "{wrong:?}");
        let refused = run(&["serve", "--config", path]).fails(3, &[shown, said]);
        assert!(!raw(&wrong.stdout) && !raw(&refused.stderr), "{wrong:?} {refused:?}");
        assert_eq!((wrong.stdout.lines().count(), refused.stderr.lines().count()), (1, 1), "{refused:?}");
    }
    let missing = run(&["serve", "--config", &format!("{path}2")]).fails(3, &["No such file"]);
    assert!(missing.stderr.contains(shown) && missing.stderr.lines().count() == 1, "{missing:?}");
    run(&["serve", "--log-level", "mt_agent=\u{1b}"]).fails(2, &["`mt_agent=\\u{1b}` is no filter"]);
}

/// A socket that takes nothing more until somebody reads it.
fn stuff(socket: &UnixDatagram, path: &Path) {
    socket.set_nonblocking(true).unwrap();
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    while sender.send_to(b"NOISE=1\n", path).is_ok() {}
}

#[test]
fn nobody_who_does_not_read_what_is_said_to_systemd_holds_up_the_service() {
    require_root!();
    let (dir, mute) = (directory(), directory());
    let path = mute.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    stuff(&socket, &path);
    let variables = vec![
        ("NOTIFY_SOCKET", path.display().to_string()),
        // It is tried four times as often.
        ("WATCHDOG_USEC", "400000".to_owned()),
    ];
    let surroundings = Surroundings { variables, ..Surroundings::default() };
    let mut service = Service::start_in(dir.path(), &[], surroundings);
    service.wait_for_log("its socket is full");
    std::thread::sleep(Duration::from_millis(500));
    service.process().signal(Signal::SIGHUP);
    service.wait_for_log("the configuration was read again");
    assert_eq!(service.log().matches("its socket is full").count(), 1, "{}", service.log());
    // Who reads at last hears that it is ready, and that it lives.
    let mut heard = String::new();
    wait_for("READY=1 and what follows", || {
        let mut buffer = [0; 4096];
        while let Ok(len) = socket.recv(&mut buffer) {
            heard.push_str(&String::from_utf8_lossy(&buffer[..len]));
        }
        ["READY=1\n", "STATUS=listening at ", "WATCHDOG=1\n"]
            .iter()
            .all(|what| heard.contains(what))
            .then_some(())
    });
    stuff(&socket, &path);
    service.process().signal(Signal::SIGTERM);
    assert_eq!(service.process().wait_within(Duration::from_secs(5)).code(), Some(0), "{}", service.log());
}
