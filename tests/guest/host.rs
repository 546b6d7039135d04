//! A whole host: systemd as init, and everything installed that looks for volume groups, arrays and paths.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{cold_disk, host, is_guest, read_directories};
use crate::lio::discovered;
use crate::support::{MACHINE, MIB, run, tool, wait_for};

fn systemctl(args: &[&str]) -> String {
    tool("systemctl", args)
}

/// The service as systemd sees it.
fn property(name: &str) -> String {
    systemctl(&["show", "--property", name, "--value", "mt-agent"])
}

fn main_pid() -> i32 {
    property("MainPID").parse().unwrap()
}

/// What this test wants of a host: it is up, all of it, and is built on what it must not lose.
fn is_up() {
    assert_eq!(fs::read_to_string("/proc/1/comm").unwrap(), "systemd\n");
    // It says so by its exit code as well, and by that alone why.
    tool(
        "sh",
        &[
            "-c",
            "systemctl is-system-running --wait || { systemctl --failed; journalctl -b -p 4; exit 1; } >&2",
        ],
    );
    for unit in ["multi-user.target", "systemd-udevd", "multipathd"] {
        systemctl(&["is-active", unit]);
    }
    assert_eq!(tool("findmnt", &["-n", "-o", "SOURCE,FSTYPE", "/"]), "/dev/mapper/system-root ext4");
}

fn the_root_disk_is_refused(share: &Path) {
    let disks = discovered();
    let (id, _) = cold_disk(share, 0);
    let root = disks.iter().find(|disk| disk["id"] == id.as_str()).expect("the root disk");
    assert_eq!(root["role"], "system", "{root:#}");
    let name = root["name"].as_str().unwrap();
    let said = format!("dm-0 (system-root) on {name} is mounted on /");
    assert!(root["evidence"].as_array().unwrap().contains(&said.as_str().into()), "{root:#}");
    for disk in [&id, &format!("/dev/{name}")] {
        let add = ["protect", "add", MACHINE, "--overwrite", "--disk", &format!("root={disk}")];
        run(&add).fails(3, &["this system uses it", &said]);
    }
    let (id, _) = cold_disk(share, 1);
    let other = disks.iter().find(|disk| disk["id"] == id.as_str()).expect("the other one");
    assert_eq!(other["role"], "free", "{other:#}");
}

/// The disks of a host that carry what hosts look for, by their numbers.
const SYSTEM: usize = 1;
const DATA: usize = 2;
const PAIR: [usize; 2] = [3, 4];
const PATH: usize = 5;
const CARRIERS: [usize; 5] = [SYSTEM, DATA, PAIR[0], PAIR[1], PATH];

/// The node of a disk of this host, whatever uses it.
fn node(share: &Path, number: usize) -> String {
    let (id, _) = cold_disk(share, number);
    let disks = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    let is =
        |disk: &PathBuf| fs::read_to_string(disk.join("device/wwid")).is_ok_and(|wwid| wwid.trim() == id);
    let disk = disks.into_iter().find(is).unwrap_or_else(|| panic!("no disk {number}"));
    Path::new("/dev").join(disk.file_name().unwrap()).display().to_string()
}

/// What is on a disk that comes from a machine that is protected.
fn source(number: usize) -> PathBuf {
    format!("/var/tmp/{number}.img").into()
}

/// Writes onto the disks what machines have: a volume group with the name of this host's own, one with another name,
/// a mirror of md, and a file system on a disk that multipathd knows; and keeps images of them.
fn write_signatures(share: &Path) {
    // LVM sees this disk alone, and not that the name of the group is taken.
    let config = "--driverloaded n --config 'devices { dir = \"/run/elsewhere\" }'";
    let lvm = |disk: &str, command: &str| {
        let (name, rest) = command.split_once(' ').unwrap();
        tool("sh", &["-c", &format!("lvm {name} -qq --devices {disk} {config} {rest}")]);
    };
    for (number, name) in [(SYSTEM, "system"), (DATA, "replicated")] {
        let disk = node(share, number);
        lvm(&disk, &format!("pvcreate {disk}"));
        lvm(&disk, &format!("vgcreate -s 1m {name} {disk}"));
        lvm(&disk, &format!("lvcreate -an -Zn -Wn -y -L 8m -n data {name}"));
    }
    let [one, two] = PAIR.map(|number| node(share, number));
    let create = ["--create", "/dev/md/pair", "--run", "--level=1", "--raid-devices=2", "--metadata=1.2"];
    tool("mdadm", &[&create[..], &["--assume-clean", &one, &two]].concat());
    tool("mdadm", &["--stop", "/dev/md/pair"]);
    let path = node(share, PATH);
    tool("mkfs.ext4", &["-q", "-L", "path", &path]);
    // As it has it of each disk that it ever had two paths to.
    tool("multipath", &["-a", &path]);
    for number in CARRIERS {
        let [from, to] = [node(share, number), source(number).display().to_string()];
        tool("dd", &["status=none", "bs=1M", "conv=sparse", &format!("if={from}"), &format!("of={to}")]);
    }
}

/// What this host has made of disks, beside what it is built on: devices of device mapper and of md.
fn taken() -> Vec<String> {
    let mapped = tool("dmsetup", &["ls"]);
    let mapped = mapped.lines().map(|line| line.split('\t').next().unwrap().to_owned());
    let arrays = fs::read_to_string("/proc/mdstat").unwrap_or_default();
    let arrays = arrays.lines().filter(|line| line.starts_with("md")).map(|line| line.to_owned());
    mapped.filter(|name| name != "system-root").chain(arrays).collect()
}

/// That is what a host does to disks with these signatures, if nobody tells it not to.
fn takes_all(share: &Path) {
    for number in CARRIERS {
        let disk = node(share, number);
        tool("udevadm", &["trigger", "--action=add", &disk]);
    }
    tool("udevadm", &["settle", "--timeout=600"]);
    // Its client waits for four seconds.
    let path = node(share, PATH);
    let add = ["add", "path", path.trim_start_matches("/dev/")];
    wait_for("multipathd", || {
        Command::new("multipathd").args(add).output().unwrap().status.success().then_some(())
    });
    let all = |taken: &[String]| {
        let has = |what: &str| taken.iter().any(|name| name.contains(what));
        has("replicated-data") && has(": active") && has("5000c500000c01d5")
    };
    wait_for("LVM, md and multipathd", || all(&taken()).then_some(()));
    let groups = tool("vgs", &["--noheadings", "-o", "vg_name"]);
    assert_eq!(groups.lines().filter(|line| line.trim() == "system").count(), 2, "{groups}");
}

/// Takes apart what the host made of them, and leaves them empty.
fn wipe(share: &Path) {
    // Who still looks at a map keeps it.
    tool("udevadm", &["settle", "--timeout=600"]);
    tool("vgchange", &["-qq", "-an", "replicated"]);
    tool("mdadm", &["--quiet", "--stop", "--scan"]);
    tool("multipath", &["-w", &node(share, PATH)]);
    tool("multipath", &["-R", "20", "-F"]);
    for number in CARRIERS {
        let (_, image) = cold_disk(share, number);
        let count = image.metadata().unwrap().len() / MIB;
        let (to, count) = (format!("of={}", node(share, number)), format!("count={count}"));
        tool("dd", &["status=none", "if=/dev/zero", "bs=1M", "oflag=direct", &to, &count]);
    }
    tool("udevadm", &["settle", "--timeout=600"]);
}

/// The package, made of what is tested, where both sides find it.
fn package() -> PathBuf {
    let [tree, built] = read_directories();
    let (top, name) = (built.join("guest-rpm"), format!("mt-agent-{}", env!("CARGO_PKG_VERSION")));
    if !is_guest() {
        let path = |name: &str| top.join(name).display().to_string();
        _ = fs::remove_dir_all(&top);
        fs::create_dir_all(path("SOURCES")).unwrap();
        let pack = ["-C", tree.to_str().unwrap(), "--transform", &format!("s,^,{name}/,"), "-czf"];
        let packed = ["packaging", "README.md", "LICENSE-MIT", "LICENSE-APACHE"];
        tool("tar", &[&pack[..], &[&path(&format!("SOURCES/{name}.tar.gz"))], &packed].concat());
        fs::write(path("SOURCES/LICENSE.dependencies"), "").unwrap();
        tool("strip", &["-o", &path("mt-agent"), env!("CARGO_BIN_EXE_mt-agent")]);
        let defined = [format!("_topdir {}", top.display()), format!("prebuilt {}", path("mt-agent"))];
        let spec = tree.join("packaging/mt-agent.spec").display().to_string();
        let build = ["-bb", "--nodeps", "--define", &defined[0], "--define", &defined[1], &spec];
        tool("rpmbuild", &build);
    }
    let made = fs::read_dir(top.join("RPMS/x86_64")).unwrap().map(|entry| entry.unwrap().path());
    let is = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(&name);
    made.into_iter().find(is).expect("the package")
}

/// The installed one.
fn agent(args: &[&str]) -> String {
    tool("/usr/bin/mt-agent", args)
}

/// The disks that multipathd takes, where nothing forbids it.
const KNOWN_PATHS: &str = "/etc/multipath/wwids";

const RETENTION: usize = 6;
const RETAINED: &str = "/var/lib/mt-agent/retention";

/// Plans or applies the changes, which must succeed, and returns what was said.
fn set_up(what: &str) -> String {
    let said = agent(&["setup", what]);
    println!("{said}");
    said
}

/// As an administrator does it.
fn install(share: &Path, package: &Path) {
    tool("rpm", &["--install", "--nodeps", package.to_str().unwrap()]);
    assert_eq!(tool("rpm", &["--verify", "--nodeps", "mt-agent"]), "");
    let disk = node(share, RETENTION);
    tool("mkfs.ext4", &["-q", "-L", "retention", &disk]);
    let table = fs::read_to_string("/etc/fstab").unwrap();
    // udevd takes its time here, and systemd waits no longer than this says.
    let retention = format!("LABEL=retention {RETAINED} ext4 nofail,x-systemd.device-timeout=900 0 0");
    fs::write("/etc/fstab", format!("{table}{retention}\n")).unwrap();
    // Nothing is written until it is applied.
    let planned = set_up("plan");
    assert!(planned.contains("stays: physical volume"), "{planned}");
    let applied: Value = serde_json::from_str(&agent(&["setup", "status", "--json"])).unwrap();
    assert!(applied["changes"].as_array().unwrap().iter().all(|change| change["applied"].is_null()));
    let applied = set_up("apply");
    for name in CHANGES {
        assert!(applied.contains(&format!("\n{name}: wrote /etc/")), "{name}");
    }
    systemctl(&["enable", "mt-agent"]);
}

/// The changes that have something to do on this host; the others find all as it should be, or warn.
const CHANGES: [&str; 7] = ["udev", "lvm", "multipath", "md", "gpt-auto", "kernel-modules", "network"];

/// All changes are applied, nobody edited what they wrote, and no reboot is due.
fn is_set_up() {
    let status: Value = serde_json::from_str(&agent(&["setup", "status", "--json"])).unwrap();
    let mut names = Vec::new();
    for change in status["changes"].as_array().unwrap().iter().filter(|change| !change["applied"].is_null()) {
        let applied = &change["applied"];
        assert_eq!(
            (&applied["state"], &applied["reboot_due"]),
            (&"applied".into(), &false.into()),
            "{change:#}"
        );
        assert_eq!(applied["edited"], json!([]), "{change:#}");
        names.push(change["name"].as_str().unwrap());
    }
    assert_eq!(names, CHANGES);
}

/// The service is there, as its own user, who has what it keeps, but not the records of setup.
fn is_served() {
    assert_eq!(property("ActiveState"), "active");
    let status = fs::read_to_string(format!("/proc/{}/status", main_pid())).unwrap();
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:\t")).unwrap().to_owned();
    let own = tool("id", &["-u", "mt-agent"]);
    assert!(own != "0" && users.split('\t').all(|user| user == own), "{users}");
    let kept = ["/var/lib/mt-agent", RETAINED, "/var/lib/mt-agent-setup"];
    let owners = tool("stat", &[&["--format=%U:%a"], &kept[..]].concat());
    assert_eq!(owners, "mt-agent:700\nmt-agent:700\nroot:700");
    agent(&["status"]);
}

fn name(number: usize) -> String {
    format!("d{number}")
}

fn assign_all(share: &Path) {
    let token = agent(&["token", "create", MACHINE, "--json", "--address", "127.0.0.1:9443"]);
    let token: Value = serde_json::from_str(&token).unwrap();
    agent(&["enroll", token["token"].as_str().unwrap(), "--state-dir", "/root/sender"]);
    let disks = CARRIERS.map(|number| format!("{}={}", name(number), cold_disk(share, number).0));
    agent(&["protect", "add", MACHINE, "--disk", &disks.join(",")]);
    // The changes followed the disks.
    let applied = set_up("apply");
    assert!(!applied.contains(": wrote ") && !applied.contains(": called "), "{applied}");
}

fn send_all() {
    let disks = CARRIERS.map(|number| format!("{}={}", name(number), source(number).display()));
    let to = ["--to", "127.0.0.1:9443", "--state-dir", "/root/sender"];
    agent(&[&["send", "--machine", MACHINE, "--disk", &disks.join(",")], &to[..]].concat());
}

/// Has this host look at the disks.
fn look_at_all(share: &Path) {
    for number in CARRIERS {
        tool("udevadm", &["trigger", "--action=add", &node(share, number)]);
    }
    tool("udevadm", &["settle", "--timeout=600"]);
    // What udevd starts goes on for a while.
    std::thread::sleep(Duration::from_secs(5));
}

/// Nothing on this host has taken anything of what it received, nor changed a byte of it.
fn are_untouched(share: &Path) {
    assert_eq!(taken(), Vec::<String>::new());
    let groups = tool("vgs", &["--noheadings", "-o", "vg_name"]);
    assert_eq!(groups.trim(), "system");
    let disks = discovered_by("/usr/bin/mt-agent");
    for number in CARRIERS {
        let (id, image) = cold_disk(share, number);
        let disk = disks.iter().find(|disk| disk["id"] == id.as_str()).unwrap();
        assert_eq!(disk["role"], "assigned", "{disk:#}");
        assert!(fs::read(&image).unwrap() == fs::read(source(number)).unwrap(), "disk {number} was written");
    }
}

/// This host's multipathd refuses that disk now; whoever had two paths to it has it in its list all the same, and shall
/// boot with that.
fn is_kept_from_multipathd(share: &Path) {
    let added = Command::new("multipath").args(["-a", &node(share, PATH)]).output().unwrap();
    assert!(!added.status.success(), "{added:?}");
    let (id, _) = cold_disk(share, PATH);
    let list = fs::read_to_string(KNOWN_PATHS).unwrap();
    fs::write(KNOWN_PATHS, format!("{list}/3{}/\n", id.trim_start_matches("naa."))).unwrap();
}

fn discovered_by(program: &str) -> Vec<Value> {
    let found: Value = serde_json::from_str(&tool(program, &["discover-disks", "--json"])).unwrap();
    found["disks"].as_array().unwrap().clone()
}

/// As `systemctl reload` has it: the same process, with what was written meanwhile.
fn takes_on_what_is_configured() {
    let before = main_pid();
    fs::write("/etc/mt-agent/conf.d/more.toml", "max_sessions = 77\n").unwrap();
    systemctl(&["reload", "mt-agent"]);
    wait_for("the journal", || {
        let found = ["-b", "-o", "cat", "-u", "mt-agent", "MT_AGENT_CHANGED=max_sessions = 77"];
        let found = Command::new("journalctl").args(found).output().unwrap();
        (found.stdout == b"the configuration was read again\n").then_some(())
    });
    wait_for("the end of the reload", || (property("ActiveState") == "active").then_some(()));
    assert_eq!(main_pid(), before);
}

/// What this does to the service, systemd makes good.
fn comes_back_after(signal: Signal) {
    let before = main_pid();
    kill(Pid::from_raw(before), signal).unwrap();
    wait_for("the service", || {
        (property("ActiveState") == "active" && ![0, before].contains(&main_pid())).then_some(())
    });
    is_served();
}

#[test]
fn a_master_target_leaves_alone_what_it_receives() {
    let package = package();
    host(&[&[16 * MIB; 5][..], &[256 * MIB]].concat()).run(|guest| {
        let share = &guest.share;
        is_up();
        match guest.boot {
            0 => {
                assert_eq!(taken(), Vec::<String>::new());
                the_root_disk_is_refused(share);
                write_signatures(share);
                takes_all(share);
                wipe(share);
                install(share, &package);
                guest.reboot();
            }
            1 => {
                is_set_up();
                is_served();
                assign_all(share);
                send_all();
                look_at_all(share);
                are_untouched(share);
                takes_on_what_is_configured();
                comes_back_after(Signal::SIGKILL);
                fs::create_dir_all("/run/systemd/system/mt-agent.service.d").unwrap();
                let quick = "[Service]\nWatchdogSec=20\n";
                fs::write("/run/systemd/system/mt-agent.service.d/quick.conf", quick).unwrap();
                systemctl(&["daemon-reload"]);
                systemctl(&["restart", "mt-agent"]);
                comes_back_after(Signal::SIGSTOP);
                fs::remove_file("/run/systemd/system/mt-agent.service.d/quick.conf").unwrap();
                systemctl(&["daemon-reload"]);
                systemctl(&["restart", "mt-agent"]);
                send_all();
                is_kept_from_multipathd(share);
                guest.reboot();
            }
            _ => {
                assert_eq!(guest.boot, 2);
                is_set_up();
                is_served();
                // Booting, it has looked at them.
                are_untouched(share);
                send_all();
                look_at_all(share);
                are_untouched(share);
            }
        }
    });
}
