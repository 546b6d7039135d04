//! What the tests of the whole program share: real loop devices, the real binary, real TLS on the loopback
//! interface. Everything is given back when its guard is dropped, also when the test fails; and loop devices and
//! processes even when the test itself is killed. Nothing has a fixed name or port, so that tests run side by side.
// Each test file is a program of its own and uses a part of this.
#![allow(dead_code)]

pub mod client;
pub mod house;
pub mod proxy;
pub mod seccomp;

use std::any::Any;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use mt_agent::agent::status::{Report, VolumeReport};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Whence, lseek};
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// How long anything may take that should take a moment: the machine may be busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Whether this test can run, which is said where it cannot.
pub fn root(test: &str) -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    skipped(test, "it needs root (loop devices, guests); run it with sudo");
    false
}

/// Says, past the capture of test output, that a test cannot run here; in CI, with `CI=true` or
/// `MT_AGENT_REQUIRE_ROOT_TESTS` set, that is a failure.
pub fn skipped(test: &str, why: &str) {
    let required = std::env::var_os("MT_AGENT_REQUIRE_ROOT_TESTS").is_some();
    assert!(
        !required && std::env::var_os("CI").is_none_or(|value| value != "true"),
        "{test} cannot run ({why}), and in CI (CI=true or MT_AGENT_REQUIRE_ROOT_TESTS) nothing may be skipped"
    );
    // Not `eprintln!`, which a test that passes swallows.
    let notice = format!("\n*** SKIPPED: {test}: {why} ***\n\n");
    std::io::stderr().write_all(notice.as_bytes()).unwrap();
}

/// Leaves the test where it cannot run.
#[macro_export]
macro_rules! require_root {
    () => {
        // The thread of a test has its name.
        if !support::root(std::thread::current().name().unwrap_or("a test")) {
            return;
        }
    };
}

/// A directory in memory where there is one: the tests are about the program and not about this disk.
pub fn directory() -> TempDir {
    static CLEARED: Once = Once::new();
    CLEARED.call_once(clear);
    tempfile::Builder::new().prefix(&prefix(std::process::id())).tempdir_in(memory()).unwrap()
}

/// An empty file in the same place.
pub fn scratch() -> NamedTempFile {
    tempfile::Builder::new().prefix(&prefix(std::process::id())).tempfile_in(memory()).unwrap()
}

/// How what a process makes there is called: by its number, and by where it has that number.
pub fn prefix(pid: u32) -> String {
    let namespace = fs::metadata("/proc/self/ns/pid").unwrap().ino();
    format!("mt-agent-test-{namespace:x}-{pid}-")
}

/// Removes what tests left whose process was killed. Where something is mounted, it stays: that may be anyone's.
pub fn clear() {
    let ours = prefix(0).trim_end_matches("0-").to_owned();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for entry in fs::read_dir(memory()).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let pid = name.to_str().and_then(|name| name.strip_prefix(&ours)?.split('-').next());
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if Path::new("/proc").join(pid.to_string()).exists() || mounts.contains(path.to_str().unwrap()) {
            continue;
        }
        // Another test may be doing the same.
        _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    }
}

/// Where there is room in memory.
pub fn memory() -> PathBuf {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() }
}

/// Bytes that no other call gives.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Runs a tool that must succeed, and returns what it printed.
#[track_caller]
pub fn tool(program: &str, args: &[&str]) -> String {
    succeed(Command::new(program).args(args))
}

/// The same for a command.
#[track_caller]
pub fn succeed(command: &mut Command) -> String {
    let mut tries = 0..20;
    loop {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        if output.status.success() {
            return String::from_utf8(output.stdout).unwrap().trim().to_owned();
        }
        let said = String::from_utf8_lossy(&output.stderr);
        // Whoever lists disks, in another test, holds each for a moment, in which nobody makes anything on it.
        let held = ["in use", "busy", "exclusively"].iter().any(|word| said.contains(word));
        assert!(held && tries.next().is_some(), "{command:?}: {}: {said}", output.status);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The CPU time of this thread so far: what a bound on work goes by that holds however busy the machine is.
pub fn cpu() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
    [usage.user_time(), usage.system_time()]
        .map(|time| Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000))
        .into_iter()
        .sum()
}

/// How long is waited here: a guest has one processor, and system calls take ten times as long in it.
pub fn patience() -> Duration {
    if std::env::var_os("MT_AGENT_GUEST_SHARE").is_some() { 4 * PATIENCE } else { PATIENCE }
}

/// Waits until `look` gives something.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < patience(), "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A loop device over a file. The kernel detaches it when this is dropped, or this process dies, and nobody else
/// has it open: `losetup -d` of a device that is open detaches it at its last close.
pub struct Loop {
    node: PathBuf,
    backing: PathBuf,
    open: Option<File>,
}

impl Loop {
    /// Over a new, empty, sparse file of `size` bytes.
    pub fn create(backing: &Path, size: u64) -> Loop {
        File::create_new(backing).unwrap().set_len(size).unwrap();
        Loop::attach(backing, 512)
    }

    /// Over a file that is there, with logical sectors of so many bytes.
    pub fn attach(backing: &Path, sector: u32) -> Loop {
        let mut disk = Loop::attach_idle(backing, sector);
        disk.open = Some(File::open(&disk.node).unwrap());
        tool("losetup", &["-d", disk.node.to_str().unwrap()]);
        disk
    }

    /// The same, but nobody has it open: whoever opens it is the first and the last, which takes the kernel longer.
    /// It stays where the test is killed.
    pub fn attach_idle(backing: &Path, sector: u32) -> Loop {
        let (sector, file) = (sector.to_string(), backing.to_str().unwrap());
        let node = wait_for("a free loop device", || {
            let mut losetup = Command::new("losetup");
            let output = losetup.args(["--find", "--show", "--sector-size", &sector, file]).output().unwrap();
            // Two that look for a free device at once may find the same one.
            output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
        });
        // The kernel keeps these switches of the device's from whoever had it before.
        tool("blockdev", &["--setrw", &node]);
        fs::write(format!("/sys/block/{}/queue/iostats", node.trim_start_matches("/dev/")), "1").unwrap();
        Loop { node: node.into(), backing: backing.to_owned(), open: None }
    }

    pub fn node(&self) -> &Path {
        &self.node
    }

    pub fn backing(&self) -> &Path {
        &self.backing
    }

    /// As `protect add` takes it.
    pub fn id(&self) -> String {
        format!("loop:{}", self.backing.display())
    }

    /// Makes the disk as large as its file is now, while it is in use.
    pub fn resize(&self, size: u64) {
        OpenOptions::new().write(true).open(&self.backing).unwrap().set_len(size).unwrap();
        tool("losetup", &["--set-capacity", self.node.to_str().unwrap()]);
    }

    pub fn set_read_only(&self, read_only: bool) {
        let switch = if read_only { "--setro" } else { "--setrw" };
        tool("blockdev", &[switch, self.node.to_str().unwrap()]);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if self.open.is_none() {
            tool("losetup", &["-d", self.node.to_str().unwrap()]);
        }
    }
}

/// A file system of a given size in memory.
pub struct Tmpfs {
    path: PathBuf,
}

impl Tmpfs {
    pub fn mount(path: &Path, size: u64) -> Tmpfs {
        fs::create_dir_all(path).unwrap();
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "none", path.to_str().unwrap()]);
        Tmpfs { path: path.to_owned() }
    }

    pub fn resize(path: &Path, size: u64) {
        tool("mount", &["-o", &format!("remount,size={size}"), path.to_str().unwrap()]);
    }

    /// Takes all the space that is left, until the file is removed.
    pub fn fill(path: &Path) -> PathBuf {
        let filler = path.join("filler");
        let mut file = File::create(&filler).unwrap();
        let error = loop {
            if let Err(error) = file.write_all(&[0x5a; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        filler
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: what failed may have left files open.
        if let Err(error) = nix::mount::umount2(&self.path, nix::mount::MntFlags::MNT_DETACH) {
            eprintln!("umount {}: {error}", self.path.display());
        }
    }
}

/// A file system of a disk, mounted.
pub struct Mount {
    path: PathBuf,
}

impl Mount {
    pub fn new(node: &Path, path: &Path) -> Mount {
        Mount::with(node, path, "defaults")
    }

    /// With these options, separated by commas.
    pub fn with(node: &Path, path: &Path, options: &str) -> Mount {
        fs::create_dir_all(path).unwrap();
        // Whoever lists disks holds each for a moment.
        wait_for("a mount", || {
            let mut mount = Command::new("mount");
            mount
                .args(["-o", options])
                .args([node, path])
                .stderr(Stdio::null())
                .status()
                .unwrap()
                .success()
                .then_some(())
        });
        Mount { path: path.to_owned() }
    }
}

/// Waits until nobody has a disk for itself. A mount ends a moment after the call, or later where another test has copied all
/// mounts to a namespace of its own.
pub fn wait_until_unclaimed(node: &Path) {
    wait_for("nobody to have the disk", || {
        OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(node).ok()
    });
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount2(&self.path, nix::mount::MntFlags::MNT_DETACH) {
            eprintln!("umount {}: {error}", self.path.display());
        }
    }
}

/// A file system that is frozen: disks in files on it take no writes for a while.
pub struct Frozen {
    path: PathBuf,
}

impl Frozen {
    pub fn new(path: &Path) -> Frozen {
        tool("fsfreeze", &["--freeze", path.to_str().unwrap()]);
        Frozen { path: path.to_owned() }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        tool("fsfreeze", &["--unfreeze", self.path.to_str().unwrap()]);
    }
}

/// A process, which is killed and waited for when this is dropped; what it prints goes to files.
pub struct Process {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    ended: Option<ExitStatus>,
    what: String,
}

impl Process {
    /// Starts `command`; `files` are where its output goes, with `.out` and `.err` after them.
    pub fn spawn(mut command: Command, files: &Path) -> Process {
        let (stdout, stderr) = (files.with_extension("out"), files.with_extension("err"));
        command.stdin(Stdio::null());
        command.stdout(File::create(&stdout).unwrap());
        command.stderr(OpenOptions::new().create(true).append(true).open(&stderr).unwrap());
        let what = format!("{command:?}");
        Process { child: command.spawn().unwrap(), stdout, stderr, ended: None, what }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.pid()).unwrap()), signal).unwrap();
    }

    /// What `work` gives while the process stands still, which is not at its end before that on the slowest machine.
    pub fn standing_still<T>(&self, work: impl FnOnce() -> T) -> T {
        self.signal(Signal::SIGSTOP);
        let result = work();
        self.signal(Signal::SIGCONT);
        result
    }

    /// kill -9, and waits for the end. Killing what has ended does nothing.
    pub fn kill(&mut self) -> ExitStatus {
        if self.ended.is_none() {
            self.child.kill().unwrap();
            self.ended = Some(self.child.wait().unwrap());
        }
        self.ended.unwrap()
    }

    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap();
        }
        self.ended
    }

    /// Waits for the end, at most `limit`.
    pub fn wait_within(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.has_ended() {
                return status;
            }
            assert!(start.elapsed() < limit, "{} runs after {limit:?}:\n{}", self.what, self.stderr());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn stdout(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap()
    }

    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap()
    }

    /// Waits for the end and takes what it printed.
    pub fn finish(mut self) -> Outcome {
        let status = self.wait_within(6 * patience());
        let (stdout, stderr) = (self.stdout(), self.stderr());
        Outcome { code: status.code(), signal: status.signal(), stdout, stderr }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// It did what it was asked.
    #[track_caller]
    pub fn ok(self) -> Outcome {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// It failed with this exit code and said all of this.
    #[track_caller]
    pub fn fails(self, code: i32, texts: &[&str]) -> Outcome {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for text in texts {
            assert!(self.stderr.contains(text), "`{text}` is missing: {self:#?}");
        }
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap()
    }
}

/// The command under test.
pub fn mt_agent() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mt-agent"))
}

/// Runs it to its end.
pub fn run(args: &[&str]) -> Outcome {
    let output = mt_agent().args(args).stdin(Stdio::null()).output().unwrap();
    Outcome {
        code: output.status.code(),
        signal: output.status.signal(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A running `mt-agent serve`, with state, retention and control socket in a directory of its own.
pub struct Service {
    process: Option<Process>,
    dir: PathBuf,
    address: SocketAddr,
    args: Vec<String>,
    surroundings: Surroundings,
}

/// What a service is started in.
#[derive(Default)]
pub struct Surroundings {
    pub forbid_io_uring: bool,
    /// A command that runs the one that follows it, in the same process.
    pub through: Vec<String>,
    pub variables: Vec<(&'static str, String)>,
    /// Instead of the binary where it was built, which not every user may reach.
    pub binary: Option<PathBuf>,
}

impl Service {
    /// Starts the service in `dir`, which may have one's state already, on a free port.
    pub fn start(dir: &Path, args: &[&str]) -> Service {
        Service::start_in(dir, args, Surroundings::default())
    }

    /// The same, where a seccomp filter forbids io_uring.
    pub fn start_without_io_uring(dir: &Path, args: &[&str]) -> Service {
        Service::start_in(dir, args, Surroundings { forbid_io_uring: true, ..Surroundings::default() })
    }

    /// The same, in these surroundings.
    pub fn start_in(dir: &Path, args: &[&str], surroundings: Surroundings) -> Service {
        let (state, socket) = (dir.join("state"), dir.join("control.sock"));
        let config = format!(
            "allow_loop = true\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\ncontrol_socket = {socket:?}\n"
        );
        fs::write(dir.join("mt-agent.toml"), config).unwrap();
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut service = Service { process: None, dir: dir.to_owned(), address, args, surroundings };
        service.spawn();
        service
    }

    /// Starts the process anew, after it was killed or ended, and waits until it answers.
    pub fn spawn(&mut self) {
        let Surroundings { forbid_io_uring, through, variables, binary } = &self.surroundings;
        let binary = binary.clone().unwrap_or_else(|| env!("CARGO_BIN_EXE_mt-agent").into());
        let mut command = match through.split_first() {
            None => Command::new(binary),
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(binary);
                command
            }
        };
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        command.arg("serve").args(["--config", &self.config()]).args(&self.args);
        if *forbid_io_uring {
            seccomp::forbid_io_uring(&mut command);
        }
        self.process = None;
        let mut process = Process::spawn(command, &self.dir.join("service"));
        let pid = process.pid();
        let report = wait_for("the service", || {
            if let Some(status) = process.has_ended() {
                panic!("the service ended ({status}):\n{}", process.stderr());
            }
            self.try_status().filter(|report| report.service.pid == pid)
        });
        self.address = report.service.listen;
        self.process = Some(process);
    }

    /// Stops it and starts it with another configuration.
    pub fn restart_with_config(&mut self, text: &str) {
        self.process().kill();
        fs::write(self.config(), text).unwrap();
        self.spawn();
    }

    pub fn config(&self) -> String {
        self.dir.join("mt-agent.toml").display().to_string()
    }

    pub fn state_dir(&self) -> String {
        self.dir.join("state").display().to_string()
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the service was started")
    }

    /// What it logged since the first start.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("service.err")).unwrap()
    }

    /// Waits until it has logged this: the end of a connection is logged once the peer has closed it, too.
    pub fn wait_for_log(&self, text: &str) {
        wait_for(text, || self.log().contains(text).then_some(()));
    }

    fn get(&self, path: &str) -> Option<String> {
        let mut stream = UnixStream::connect(self.dir.join("control.sock")).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        assert!(head.contains(" 200 "), "{answer}");
        Some(body.to_owned())
    }

    fn try_status(&self) -> Option<Report> {
        self.get("/v1/status").map(|body| serde_json::from_str(&body).unwrap())
    }

    pub fn status(&self) -> Report {
        self.try_status().expect("the service answers on its control socket")
    }

    /// Waits until no connection is left, nor one that the sender opened just before it was killed.
    pub fn wait_until_idle(&self) {
        let mut quiet = 0;
        wait_for("the end of all connections", || {
            quiet = if self.status().service.sessions == 0 { quiet + 1 } else { 0 };
            (quiet > 3).then_some(())
        });
    }

    /// A volume as `status` has it.
    pub fn volume(&self, machine: &str, disk: &str) -> VolumeReport {
        let machines = self.status().machines;
        let machine =
            machines.into_iter().find(|known| known.machine.as_str() == machine).expect("a machine");
        machine.volumes.into_iter().find(|known| known.disk.as_str() == disk).expect("a disk")
    }

    /// The value of a metric: `name` with its labels, as it stands in the text.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    /// The peak of its resident memory so far, in bytes.
    pub fn peak_memory(&mut self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process().pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * KIB
    }

    /// A token for a machine, which names the address where this service listens now.
    pub fn token(&self, machine: &str) -> String {
        let address = self.address.to_string();
        let state = self.state_dir();
        let args = ["token", "create", machine, "--json", "--address", &address, "--state-dir", &state];
        run(&args).ok().json()["token"].as_str().unwrap().to_owned()
    }

    /// Enrols a machine, whose identity then lies in `state`.
    pub fn enroll(&self, machine: &str, state: &Path) {
        run(&["enroll", &self.token(machine), "--state-dir", state.to_str().unwrap()]).ok();
    }

    pub fn protect_add(&self, machine: &str, disk: &str, target: &Loop) -> Outcome {
        let disk = format!("{disk}={}", target.id());
        run(&["protect", "add", machine, "--config", &self.config(), "--overwrite", "--disk", &disk])
    }

    /// A disk as `protect list --json` has it: what is on stable storage.
    pub fn recorded(&self, machine: &str, disk: &str) -> Value {
        let list = run(&["protect", "list", machine, "--json", "--config", &self.config()]).ok().json();
        let disks = list["machines"][0]["disks"].as_array().unwrap();
        disks.iter().find(|known| known["name"] == disk).expect("a disk").clone()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
        if std::thread::panicking() {
            eprintln!("--- log of the service ---\n{}---", self.log());
        }
    }
}

/// A service, the enrolled machine `web01`, and target disks that are assigned to it as `d0`, `d1` and so on.
// Dropped in this order: the service lets go of the disks, the disks of their files, the files of what they lie on.
pub struct Rig {
    pub service: Service,
    pub targets: Vec<Loop>,
    /// File systems in the directory, and what these lie on.
    pub mounts: Vec<Box<dyn Any>>,
    pub dir: TempDir,
    started: std::cell::Cell<u32>,
}

pub const MACHINE: &str = "web01";

impl Rig {
    /// With sparse target disks of these sizes in bytes.
    pub fn new(sizes: &[u64]) -> Rig {
        Rig::with(sizes, &[])
    }

    /// The same, with arguments for `serve`.
    pub fn with(sizes: &[u64], args: &[&str]) -> Rig {
        let dir = directory();
        let service = Service::start(dir.path(), args);
        let disk =
            |(index, size): (usize, &u64)| Loop::create(&dir.path().join(format!("d{index}.img")), *size);
        let targets = sizes.iter().enumerate().map(disk).collect();
        Rig::assemble(dir, service, targets)
    }

    /// Enrols the machine and assigns the disks.
    pub fn assemble(dir: TempDir, service: Service, targets: Vec<Loop>) -> Rig {
        service.enroll(MACHINE, &dir.path().join("client"));
        if !targets.is_empty() {
            let disks: Vec<String> =
                targets.iter().enumerate().map(|(index, disk)| format!("d{index}={}", disk.id())).collect();
            let config = service.config();
            run(&["protect", "add", MACHINE, "--overwrite", "--config", &config, "--disk", &disks.join(",")])
                .ok();
        }
        Rig { service, targets, mounts: Vec::new(), dir, started: 0.into() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where the identity of `web01` lies.
    pub fn client(&self) -> PathBuf {
        self.path("client")
    }

    /// Where another identity of `web01` lies, for a sender that does not know of the others.
    pub fn elsewhere(&self) -> String {
        let elsewhere = self.path("elsewhere");
        self.service.enroll(MACHINE, &elsewhere);
        elsewhere.to_str().unwrap().to_owned()
    }

    /// `mt-agent send` with these disks and further arguments, not started yet.
    pub fn command(&self, disks: &[(&str, &Path)], args: &[&str]) -> Command {
        let mut command = mt_agent();
        let (to, state) = (self.service.address().to_string(), self.client());
        command.args(["send", "--machine", MACHINE]);
        if !args.contains(&"--state-dir") {
            command.arg("--state-dir").arg(state);
        }
        if !args.contains(&"--to") {
            command.args(["--to", &to]);
        }
        for (name, source) in disks {
            command.arg("--disk").arg(format!("{name}={}", source.display()));
        }
        // Most tests want to see what ended the first attempt.
        if !args.contains(&"--retry-for") && !args.contains(&"--every") {
            command.args(["--retry-for", "0s"]);
        }
        command.args(args);
        command
    }

    /// Starts a process whose output lies in the directory of this rig.
    pub fn spawn(&self, command: Command) -> Process {
        let number = self.started.get();
        self.started.set(number + 1);
        Process::spawn(command, &self.path(&format!("process{number}")))
    }

    /// Starts `mt-agent send`.
    pub fn start(&self, disks: &[(&str, &Path)], args: &[&str]) -> Process {
        self.spawn(self.command(disks, args))
    }

    /// Runs `mt-agent send` to its end.
    pub fn send(&self, disks: &[(&str, &Path)], args: &[&str]) -> Outcome {
        self.start(disks, args).finish()
    }

    /// Who could be writing to a source, by what a dry run says.
    pub fn users(&self, source: &Path) -> Vec<String> {
        let found = self.send(&[("d0", source)], &["--dry-run", "--json"]).ok().json();
        let users = found["disks"][0]["in_use"].as_array().unwrap().iter();
        users.map(|user| user.as_str().unwrap().to_owned()).collect()
    }

    /// Starts `send` and waits until bytes were written to the first of its disks.
    pub fn start_into_pass(&self, disks: &[(&str, &Path)], args: &[&str]) -> Process {
        let mut send = self.start(disks, args);
        wait_for("a pass", || {
            if let Some(status) = send.has_ended() {
                panic!("the pass ended too soon ({status}): {}{}", send.stdout(), send.stderr());
            }
            let volume = self.service.volume(MACHINE, disks[0].0);
            (volume.phase == "receiving" && volume.received_bytes > Some(0)).then_some(())
        });
        send
    }

    /// Waits until the service has let go of a disk.
    pub fn wait_until_closed(&self, disk: &str) -> VolumeReport {
        wait_for("the end of the session", || {
            Some(self.service.volume(MACHINE, disk)).filter(|volume| volume.received_bytes.is_none())
        })
    }

    /// The recorded state of one of the machine's disks.
    pub fn state(&self, disk: &str) -> String {
        self.service.recorded(MACHINE, disk)["state"].as_str().unwrap().to_owned()
    }

    /// The disk stands at a commit, in the record and in the status.
    #[track_caller]
    pub fn synchronized(&self, disk: &str) {
        assert_eq!(self.state(disk), "synchronized");
        assert_eq!(self.wait_until_closed(disk).phase, "synchronized");
    }

    /// A new source file of random bytes.
    pub fn random(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        write_random(&path, 0, size);
        path
    }

    /// A source of `size` bytes, in which random data and zeros of all kinds of lengths and alignments alternate.
    pub fn mixed(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        let lengths = [3 * MIB, 64 * KIB, 4 * KIB, 512, 1, 100 * KIB, MIB + 1, 4 * MIB];
        let mut at = 0;
        for (index, len) in lengths.iter().cycle().enumerate() {
            let len = (*len).min(size - at);
            if index % 2 == 0 {
                write_random(&path, at, len);
            }
            at += len;
            if at == size {
                return path;
            }
        }
        unreachable!("the lengths are not all zero")
    }
}

/// Writes random bytes into a file, which is made where it is missing.
pub fn write_random(path: &Path, offset: u64, len: u64) {
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    let mut random = File::open("/dev/urandom").unwrap().take(len);
    // A buffer of its own: the one of `copy` is small, and this is a lot.
    let mut buffer = vec![0; usize::try_from(len.min(MIB)).unwrap()];
    loop {
        let count = random.read(&mut buffer).unwrap();
        if count == 0 {
            return;
        }
        file.write_all(&buffer[..count]).unwrap();
    }
}

/// The target begins with exactly the bytes of the source.
#[track_caller]
pub fn assert_equal(source: &Path, target: &Path) {
    if let Some(at) = first_difference(source, target) {
        panic!("{} differs from {} at byte {at}", target.display(), source.display());
    }
}

/// Where the target, as far as the source goes, is not equal to it. Holes in both are passed over.
pub fn first_difference(source: &Path, target: &Path) -> Option<u64> {
    let [source, target] = [source, target].map(|path| File::open(path).unwrap());
    let size = source.metadata().unwrap().len();
    let (mut ours, mut theirs) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut at = 0;
    while at < size {
        let next = [&source, &target].map(|file| next_data(file, at)).into_iter().flatten().min();
        // Between here and there both read as zeros.
        at = next?.min(size);
        let len = usize::try_from((size - at).min(MIB)).unwrap();
        source.read_exact_at(&mut ours[..len], at).unwrap();
        if target.read_exact_at(&mut theirs[..len], at).is_err() {
            return Some(at);
        }
        if ours[..len] != theirs[..len] {
            let differing = ours.iter().zip(&theirs).position(|(a, b)| a != b).unwrap();
            return Some(at + differing as u64);
        }
        at += len as u64;
    }
    None
}

/// The next byte that is in no hole.
fn next_data(file: &File, at: u64) -> Option<u64> {
    let at = i64::try_from(at).unwrap();
    match lseek(file, at, Whence::SeekData) {
        Ok(found) => Some(u64::try_from(found).unwrap()),
        Err(nix::errno::Errno::ENXIO) => None,
        Err(error) => panic!("SEEK_DATA: {error}"),
    }
}

/// How many bytes a file takes on its file system.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}
