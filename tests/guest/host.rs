//! A whole host: systemd as init, and everything installed that looks for volume groups, arrays and paths.

use std::fs;
use std::path::Path;

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
