//! A guest for a test. The test calls [`Guest::run`] with its body. On the host that boots a guest, in which this
//! very program is run again for this one test; there, `run` calls the body. So a body is written like that of any
//! other test, with the whole of `support`, and what it asserts is asserted in the guest.
//!
//! The program, what it tests and its sources are in the guest where they are on the host, read-only; everything
//! else there is memory, and goes with the guest.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use crate::hypervisor;
use crate::support;

/// Where the guest finds what passes between it and the host. That it is set says that this is the guest.
const SHARE: &str = "MT_AGENT_GUEST_SHARE";

/// How many guests run at once: they share the processors and the memory of the host with other tests. Three took longer.
const AT_ONCE: usize = 2;

/// A guest that runs for so long hangs: one that has little to do took 195 seconds on a host with ten things to do at once,
/// and what a whole host does between two boots took 924 on a busy one.
const LIMIT: Duration = Duration::from_secs(3600);

/// User-mode Linux writes to its output, and reads nothing.
const NO_INPUT: &str = "con0=null,fd:1";

/// What a guest is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// User-mode Linux.
    Small,
    /// QEMU.
    Full,
    /// QEMU, from a disk on which a system with systemd is.
    Host,
}

/// A guest that is not booted yet.
#[derive(Debug)]
pub struct Guest {
    kind: Kind,
    memory: u64,
    udev: bool,
    disks: Vec<u64>,
}

/// User-mode Linux: one processor, no PCI; SCSI disks are made in it, see `lio`.
pub fn small() -> Guest {
    Guest { kind: Kind::Small, memory: 768, udev: true, disks: Vec::new() }
}

/// QEMU with an adapter of each kind, into which disks are plugged while it runs, see `hypervisor`. It emulates the
/// processor, and so is slow.
pub fn full() -> Guest {
    Guest { kind: Kind::Full, memory: 768, udev: true, disks: Vec::new() }
}

/// A whole host in QEMU: systemd, udevd, multipathd, LVM and md, and a root file system that stays when it reboots, on
/// the logical volume root of the volume group system on a SCSI disk. Beside that it has empty disks of these sizes,
/// see [`cold_disk`]. The body runs when the host is up, and again after each [`Inside::reboot`].
pub fn host(disks: &[u64]) -> Guest {
    Guest { kind: Kind::Host, memory: 1024, udev: true, disks: disks.to_vec() }
}

/// A host's disk number N, counted from 1, as `discover-disks` names it, and the file in the share that it is. Disk 0
/// has the root file system.
pub fn cold_disk(share: &Path, number: usize) -> (String, PathBuf) {
    (format!("naa.5000c500000c01d{number}"), share.join(format!("cold{number}.img")))
}

/// What a body in the guest is given.
pub struct Inside {
    /// A directory of the host: what a test leaves there, [`Guest::run`] returns on the host.
    pub share: PathBuf,
    /// How often it was booted before, for this test.
    pub boot: u32,
}

/// What a body leaves in the share when the host shall boot again.
const AGAIN: &str = "again";

impl Inside {
    /// When the body is through, the host reboots, and it is called again.
    pub fn reboot(&self) {
        fs::write(self.share.join(AGAIN), "").unwrap();
    }
}

/// What a body leaves in the share when it is through.
const RAN: &str = "ran";

impl Guest {
    /// With so many MiB of memory, of which the host gives what is used.
    pub fn memory(self, memory: u64) -> Guest {
        Guest { memory, ..self }
    }

    /// Without udevd: nobody but the kernel says what there is.
    pub fn without_udev(self) -> Guest {
        Guest { udev: false, ..self }
    }

    /// Runs `body` in the guest, under the name of the test that calls this, once in a test and from its own thread. On
    /// the host, gives back what the body left in [`Inside::share`]; `None` in the guest, or where no guest can run, which
    /// is said. What a test does outside of `body` it does on both sides.
    pub fn run(self, body: impl FnOnce(&Inside)) -> Option<tempfile::TempDir> {
        if let Some(share) = std::env::var_os(SHARE) {
            let share = PathBuf::from(share);
            let boot = std::env::var("MT_AGENT_GUEST_BOOT").unwrap().parse().unwrap();
            body(&Inside { share: share.clone(), boot });
            // A guest in which no test of this name was found ends well, too.
            fs::write(share.join(RAN), "").unwrap();
            return None;
        }
        // The thread of a test has its name.
        let test = thread::current().name().expect("a test has a name").to_owned();
        thread_local!(static USED: Cell<bool> = const { Cell::new(false) });
        assert!(!USED.replace(true), "one guest a test: its bodies would all run in each of them");
        if !support::root(&test) {
            return None;
        }
        match self.kind.assembled() {
            Ok(root) => Some(self.boot(root, &test)),
            Err(why) => {
                support::skipped(&test, why);
                None
            }
        }
    }

    fn boot(&self, root: &Path, test: &str) -> tempfile::TempDir {
        let _place = Place::take();
        let keep = std::env::var_os("MT_AGENT_GUEST_KEEP").is_some_and(|value| value == "1");
        let mut share = if keep {
            // Under a name of its own, or the next tests would take it for forgotten.
            let mut kept = tempfile::Builder::new();
            kept.prefix("mt-agent-guest-").disable_cleanup(true).tempdir_in(support::memory()).unwrap()
        } else {
            support::directory()
        };
        if self.kind == Kind::Host {
            let [image, disk] = [root.join("host.img"), cold_disk(share.path(), 0).1];
            support::tool("cp", &["--sparse=always", image.to_str().unwrap(), disk.to_str().unwrap()]);
            for (size, number) in self.disks.iter().zip(1..) {
                fs::File::create_new(cold_disk(share.path(), number).1).unwrap().set_len(*size).unwrap();
            }
        }
        for boot in 0.. {
            let environment = self.environment(test, boot, std::env::vars_os());
            fs::write(share.path().join("environment"), environment).unwrap();
            let mut command = self.kind.command(self, root, share.path());
            println!("{command:?}");
            if keep {
                write_start(&command, share.path(), test);
            }
            let mut console = Console::start(&mut command);
            console.follow(LIMIT, AFTER_PANIC);
            let status = fs::read_to_string(share.path().join("status"));
            let status = status.unwrap_or_else(|error| panic!("the guest ended and left no status: {error}"));
            assert_eq!(status.trim(), "0", "the test failed in the guest");
            for left in ["status", RAN] {
                let removed = fs::remove_file(share.path().join(left));
                removed.unwrap_or_else(|error| panic!("no body of a test {test} ran in the guest: {error}"));
            }
            if fs::remove_file(share.path().join(AGAIN)).is_err() {
                break;
            }
        }
        share.disable_cleanup(false);
        share
    }

    /// What the guest's init is told: variables of a shell. Those of the host that tests look at are among them.
    fn environment(
        &self,
        test: &str,
        boot: u32,
        host: impl Iterator<Item = (OsString, OsString)>,
    ) -> Vec<u8> {
        let program = std::env::current_exe().unwrap();
        let mut text = Vec::new();
        let mut variable = |name: &str, values: &[&[u8]]| {
            text.extend_from_slice(name.as_bytes());
            text.extend_from_slice(b"=(");
            for value in values {
                text.extend_from_slice(&quoted(value));
                text.push(b' ');
            }
            text.extend_from_slice(b")\n");
        };
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let [tree, built] = read_directories().map(bytes);
        variable("MT_AGENT_GUEST_READS", &[&tree, &built]);
        variable("MT_AGENT_GUEST_DIRECTORY", &[&tree]);
        variable("MT_AGENT_GUEST_UDEV", &[self.udev.to_string().as_bytes()]);
        let arguments = ["--exact", test, "--nocapture", "--test-threads=1", "--include-ignored"];
        let mut words = vec![bytes(&program)];
        words.extend(arguments.map(|word| word.as_bytes().to_vec()));
        let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
        variable("MT_AGENT_GUEST_COMMAND", &words);
        text.extend_from_slice(format!("export MT_AGENT_GUEST_BOOT={boot}\n").as_bytes());
        for (name, value) in host {
            let name = name.as_bytes();
            let told = name.starts_with(b"RUST_")
                || name.starts_with(b"MT_AGENT_") && !name.starts_with(b"MT_AGENT_GUEST_");
            // Not all that may stand in an environment is a name to a shell.
            if told && name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_') {
                text.extend_from_slice(&[b"export ", name, b"=", &quoted(value.as_bytes()), b"\n"].concat());
            }
        }
        text
    }
}

/// Leaves a script beside what a guest is given that boots it once more, with a shell in the place of the test.
fn write_start(command: &Command, share: &Path, test: &str) {
    let mut words = vec![b"env".to_vec()];
    for (name, value) in command.get_envs() {
        words.push(quoted(&[name.as_bytes(), b"=", value.unwrap_or_default().as_bytes()].concat()));
    }
    for word in [command.get_program()].into_iter().chain(command.get_args()) {
        // Where user-mode Linux has its terminal.
        let word = if word == NO_INPUT { "con0=fd:0,fd:1".as_ref() } else { word };
        words.push(quoted(word.as_bytes()));
    }
    let shell = quoted(share.join("shell").as_os_str().as_bytes());
    let lines = [b": >".as_slice(), &shell, b"\n", &words.join(&b' '), b"\nstty sane\n"].concat();
    let path = share.join("start");
    fs::write(&path, [b"#!/bin/sh\n".as_slice(), &lines].concat()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let (path, share) = (path.display(), share.display());
    println!("if {test} fails, {share} stays; {path} boots it again, with a shell; then: rm -r {share}");
}

/// One word of a shell.
fn quoted(word: &[u8]) -> Vec<u8> {
    let mut text = vec![b'\''];
    word.iter().for_each(|byte| match byte {
        b'\'' => text.extend_from_slice(br"'\''"),
        byte => text.push(*byte),
    });
    text.push(b'\'');
    text
}

/// Whether this is the guest.
pub fn is_guest() -> bool {
    std::env::var_os(SHARE).is_some()
}

/// The directories of the host that a guest reads: the sources, and target/debug, wherever that is, which has the
/// programs under test beside `deps`.
pub fn read_directories() -> [&'static Path; 2] {
    let program = Path::new(env!("CARGO_BIN_EXE_mt-agent"));
    [Path::new(env!("CARGO_MANIFEST_DIR")), program.parent().unwrap()]
}

impl Kind {
    /// The directory that `assemble` made for this kind, or why there is none.
    fn assembled(self) -> Result<&'static Path, &'static str> {
        static SMALL: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        static FULL: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        let (made, name) = match self {
            Kind::Small => (&SMALL, "small"),
            Kind::Full | Kind::Host => (&FULL, "full"),
        };
        let made = made.get_or_init(|| {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/assemble");
            let output = Command::new(&script).arg(name).stdin(Stdio::null()).output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr);
            match output.status.code() {
                Some(0) => Ok(String::from_utf8(output.stdout).unwrap().trim_end().into()),
                Some(3) => Err(errors.trim_end().lines().last().unwrap_or("no guest can be made").to_owned()),
                _ => panic!("{}: {}\n{errors}", script.display(), output.status),
            }
        });
        made.as_deref().map_err(String::as_str)
    }

    /// The machine, which ends when this process does.
    fn command(self, guest: &Guest, root: &Path, share: &Path) -> Command {
        // Each end takes the next with it: this thread the first process, that one the first of a PID namespace, and
        // so all of it.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--pid", "--kill-child"]);
        let share_variable = format!("{SHARE}={}", share.display());
        match self {
            Kind::Small => {
                // The guest's memory is a file of the host's, in memory.
                command.env("TMPDIR", "/dev/shm").env("LD_PRELOAD", root.join("xstate.so"));
                command.arg(root.join("usr/bin/linux.uml"));
                command.arg(format!("mem={}M", guest.memory));
                command.args(["root=/dev/root", "rootfstype=hostfs", "ro", "init=/guest-init"]);
                command.arg(format!("rootflags={}", root.display()));
                command.arg(format!("uml_dir={}/", share.display()));
                command.args(["con=null", NO_INPUT, "ssl=null", "quiet", "panic=-1"]);
                command.arg(share_variable);
            }
            Kind::Full => hypervisor::machine(&mut command, root, share, guest.memory, &share_variable),
            Kind::Host => {
                let words =
                    format!("{share_variable} MT_AGENT_GUEST_HOST=yes systemd.unit=guest-test.target");
                hypervisor::machine(&mut command, root, share, guest.memory, &words);
                for number in 0..=guest.disks.len() {
                    hypervisor::cold(&mut command, share, number);
                }
            }
        }
        command
    }
}

/// How long what a kernel says after it panicked is waited for.
const AFTER_PANIC: Duration = Duration::from_secs(1);

/// What a guest says, and when it ends.
struct Console {
    machine: Child,
    lines: mpsc::Receiver<String>,
}

impl Console {
    fn start(command: &mut Command) -> Console {
        let (reader, writer) = std::io::pipe().unwrap();
        command.stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
        let machine = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // The command has the writing end, too, as long as it lives.
        *command = Command::new("true");
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            let mut reader = BufReader::new(reader);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Console { machine, lines }
    }

    /// Prints what it says, into the output of this test, until it ends, or a while after its kernel panicked.
    fn follow(&mut self, mut limit: Duration, after_panic: Duration) {
        let start = Instant::now();
        let mut panicked = false;
        loop {
            match self.lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
                Ok(line) => {
                    println!("{:6.2} | {line}", start.elapsed().as_secs_f64());
                    // User-mode Linux says so as the last thing it does, and then, rarely, does not end.
                    if line == "reboot: System halted" {
                        break;
                    }
                    // Where its kernel panics, it may not end at all; where it was follows.
                    if line.contains("Kernel panic - not syncing: ") {
                        panicked = true;
                        limit = limit.min(start.elapsed() + after_panic);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if panicked => break,
                Err(RecvTimeoutError::Timeout) => panic!("the guest runs after {limit:?}"),
            }
        }
        assert!(!panicked, "the guest's kernel panicked");
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Both do nothing to one that has ended.
        self.machine.kill().unwrap();
        self.machine.wait().unwrap();
    }
}

/// One of the places for guests that run at once.
struct Place;

static FREE: Mutex<usize> = Mutex::new(AT_ONCE);
static FREED: Condvar = Condvar::new();

impl Place {
    fn take() -> Place {
        let mut free = FREED.wait_while(FREE.lock().unwrap(), |free| *free == 0).unwrap();
        *free -= 1;
        Place
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *FREE.lock().unwrap() += 1;
        FREED.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a machine that is this script is found to have done.
    fn followed(script: &str, limit: Duration) -> Result<(), String> {
        let mut console = Console::start(Command::new("sh").args(["-c", script]));
        // Long enough for what this script says then, on a busy machine as well.
        let follow = || console.follow(limit, Duration::from_secs(10));
        let followed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(follow));
        followed.map_err(|panic| match panic.downcast::<String>() {
            Ok(text) => *text,
            Err(panic) => (*panic.downcast_ref::<&str>().unwrap()).to_owned(),
        })
    }

    #[test]
    fn a_machine_that_panics_or_hangs_is_told_from_one_that_ends() {
        let long = Duration::from_secs(60);
        assert_eq!(followed("echo all is well", long), Ok(()));
        assert_eq!(followed("echo 'reboot: System halted'; exec sleep 50", long), Ok(()));
        let hangs = followed("exec sleep 50", Duration::from_millis(100));
        assert_eq!(hangs, Err("the guest runs after 100ms".to_owned()));
        // With and without the time before it; and what follows is read.
        let panicked = Err("the guest's kernel panicked".to_owned());
        let (dir, start) = (support::directory(), Instant::now());
        let read = dir.path().join("read");
        let script = format!(
            "echo 'Kernel panic - not syncing: x'; sleep 0.3; echo trace && : >{}; exec sleep 50",
            read.display()
        );
        assert_eq!(followed(&script, long), panicked);
        assert!(read.exists() && start.elapsed() < long / 2);
        assert_eq!(followed("echo '[    1.234567] Kernel panic - not syncing: x'", long), panicked);
    }

    #[test]
    fn what_killed_tests_left_is_removed_unless_something_is_mounted_there() {
        // No process has such a number.
        let [left, mounted] = ["one", "two"].map(|name| {
            let path = support::memory().join(format!("{}{name}", support::prefix(99_999_999)));
            fs::create_dir_all(path.join("mnt")).unwrap();
            path
        });
        let alive = support::directory();
        let mount = nix::unistd::geteuid()
            .is_root()
            .then(|| support::Tmpfs::mount(&mounted.join("mnt"), support::MIB));
        support::clear();
        assert!(!left.exists() && alive.path().exists());
        assert_eq!(mounted.exists(), mount.is_some());
        drop(mount);
        support::clear();
        assert!(!mounted.exists());
    }

    #[test]
    fn a_guest_is_told_what_the_host_s_environment_says() {
        let host = [
            ("RUST_BACKTRACE", "full"),
            ("MT_AGENT_CRASH_SEED", "it's 'quoted'\n$HOME"),
            ("MT_AGENT_GUEST_BOOT", "9"),
            ("MT_AGENT_NO-NAME", "x"),
            ("HOME", "/nowhere"),
        ];
        let host = host.map(|(name, value)| (name.into(), value.into()));
        let dir = support::directory();
        let path = dir.path().join("environment");
        fs::write(&path, small().environment("one::test", 3, host.into_iter())).unwrap();
        let script = r#"set -eu; . "$0"; printf '%s\n' "${MT_AGENT_GUEST_COMMAND[2]}"; exec env -0"#;
        let shell = Command::new("bash").args(["-c", script]).arg(&path).env_clear().output().unwrap();
        assert!(shell.status.success(), "{shell:?}");
        let said = String::from_utf8(shell.stdout).unwrap();
        let (test, variables) = said.split_once('\n').unwrap();
        assert_eq!(test, "one::test");
        let mut variables: Vec<&str> = variables
            .split_terminator('\0')
            .filter(|one| one.starts_with("RUST_") || one.contains("AGENT"))
            .collect();
        variables.sort_unstable();
        let told =
            ["MT_AGENT_CRASH_SEED=it's 'quoted'\n$HOME", "MT_AGENT_GUEST_BOOT=3", "RUST_BACKTRACE=full"];
        assert_eq!(variables, told);
    }

    #[test]
    fn a_guest_is_made_anew_only_where_it_is_damaged_and_there_is_room() {
        let test = thread::current().name().unwrap().to_owned();
        if !support::root(&test) {
            return;
        }
        let made = match Kind::Small.assembled() {
            Ok(made) => made,
            Err(why) => return support::skipped(&test, why),
        };
        let dir = support::directory();
        let cache = dir.path().join("cache");
        // There is room for one, and not for making another.
        let _room = support::Tmpfs::mount(&cache, 500 * support::MIB);
        let [sound, guest] = ["sound".as_ref(), made.file_name().unwrap()].map(|name| cache.join(name));
        support::tool("cp", &["-a", made.to_str().unwrap(), sound.to_str().unwrap()]);
        let assembled = |damage: fn(&Path)| {
            // Linked: what damages it puts another file in the place of one.
            support::tool("cp", &["-al", sound.to_str().unwrap(), guest.to_str().unwrap()]);
            damage(&guest);
            let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/assemble"));
            let output = script.arg("small").env("MT_AGENT_GUEST_CACHE", &cache).output().unwrap();
            let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            _ = fs::remove_dir_all(&guest);
            (output.status.code(), said.replace(guest.to_str().unwrap(), "GUEST"))
        };
        assert_eq!(assembled(|_| ()), (Some(0), "GUEST\n".to_owned()));
        let damages: [fn(&Path); 4] = [
            |guest| fs::remove_file(guest.join("usr/bin/linux.uml")).unwrap(),
            |guest| {
                fs::remove_file(guest.join("guest-init")).unwrap();
                fs::write(guest.join("guest-init"), "#!/bin/bash\n").unwrap();
            },
            |guest| fs::write(guest.join("usr/bin/more-than-was-there"), "").unwrap(),
            |guest| fs::remove_file(guest.join("contents")).unwrap(),
        ];
        for damage in damages {
            let (code, said) = assembled(damage);
            assert_eq!(code, Some(1), "{said}");
            for text in ["GUEST is damaged", "a small guest takes 600 MiB in ", " are free: make room"] {
                assert!(said.contains(text), "{said}");
            }
        }
        // Nothing that could be locked.
        fs::remove_file(cache.join("lock")).unwrap();
        fs::create_dir(cache.join("lock")).unwrap();
        let (code, said) = assembled(|_| ());
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("lock cannot be written: say with MT_AGENT_GUEST_CACHE"), "{said}");
    }
}
