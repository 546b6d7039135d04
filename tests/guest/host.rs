//! A whole host: systemd as init, and everything installed that looks for volume groups, arrays and paths.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{cold_disk, host};
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

const UNIT: &str = "[Service]
Type=notify
ExecStart=/usr/bin/mt-agent serve --allow-root-retention
StateDirectory=mt-agent
RuntimeDirectory=mt-agent
Restart=always
RestartSec=100ms
[Install]
WantedBy=multi-user.target
";

#[test]
fn a_host_comes_up_and_a_service_comes_back() {
    host(&[64 * MIB]).run(|guest| {
        is_up();
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        if guest.boot == 0 {
            fs::write("/etc/boot-id", &boot_id).unwrap();
            fs::copy(env!("CARGO_BIN_EXE_mt-agent"), "/usr/bin/mt-agent").unwrap();
            fs::write("/etc/systemd/system/mt-agent.service", UNIT).unwrap();
            systemctl(&["daemon-reload"]);
            // Which returns when it is ready.
            systemctl(&["enable", "--now", "mt-agent"]);
            assert_eq!(property("ActiveState"), "active");
            run(&["status"]).ok();
            let before = main_pid();
            kill(Pid::from_raw(before), Signal::SIGKILL).unwrap();
            wait_for("the service", || {
                (property("ActiveState") == "active" && main_pid() != before).then_some(())
            });
            run(&["status"]).ok();
            the_root_disk_is_refused(&guest.share);
            guest.reboot();
        } else {
            assert_eq!(guest.boot, 1);
            assert_ne!(fs::read_to_string("/etc/boot-id").unwrap(), boot_id);
            assert_eq!(property("ActiveState"), "active");
            run(&["status"]).ok();
        }
    });
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
    tool("udevadm", &["settle"]);
    tool("multipathd", &["add", "path", node(share, PATH).trim_start_matches("/dev/")]);
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
    tool("vgchange", &["-qq", "-an", "replicated"]);
    tool("mdadm", &["--quiet", "--stop", "--scan"]);
    tool("multipath", &["-w", &node(share, PATH)]);
    tool("multipath", &["-F"]);
    for number in CARRIERS {
        let (_, image) = cold_disk(share, number);
        let count = image.metadata().unwrap().len() / MIB;
        let (to, count) = (format!("of={}", node(share, number)), format!("count={count}"));
        tool("dd", &["status=none", "if=/dev/zero", "bs=1M", "oflag=direct", &to, &count]);
    }
    tool("udevadm", &["settle"]);
}

#[test]
fn a_host_takes_disks_that_carry_what_it_looks_for() {
    host(&[16 * MIB; 5]).run(|guest| {
        is_up();
        assert_eq!(taken(), Vec::<String>::new());
        write_signatures(&guest.share);
        takes_all(&guest.share);
        wipe(&guest.share);
        assert_eq!(taken(), Vec::<String>::new());
    });
}
