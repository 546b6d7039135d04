//! What needs a hypervisor under the guest: disks that come, go and grow, on the adapters that virtual machines have.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use mt_agent::disk::device::{Error, Refusal, TargetOptions, open_listed, open_target};
use mt_agent::disk::discover::{Sysroot, discover};
use mt_agent::disk::id::DiskId;
use serde_json::{Value, json};

use crate::harness::{Inside, full};
use crate::hypervisor::{Hypervisor, VirtualDisk};
use crate::identities::{From, agrees};
use crate::lio::discovered;
use crate::support::{MACHINE, MIB, Rig, allocated, assert_equal, mt_agent, patience, run, tool, wait_for};

/// Loads drivers of adapters.
fn load(drivers: &[&str]) {
    for driver in ["sd_mod"].iter().chain(drivers) {
        tool("modprobe", &[driver]);
    }
}

/// How many SCSI disks the kernel has.
fn scsi_disks() -> usize {
    let names = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with("sd")).count()
}

/// All disks, each of which is what the tools of the system say that it is.
fn agreed(from: From) -> Vec<Value> {
    let disks = discovered();
    assert_eq!(disks.len(), scsi_disks());
    disks.iter().for_each(|disk| agrees(disk, from));
    disks
}

fn text<'a>(disk: &'a Value, key: &str) -> &'a str {
    disk[key].as_str().unwrap_or_default()
}

/// Lets udevd find what is there, as at boot.
fn start_udev() {
    tool("/lib/systemd/systemd-udevd", &["--daemon"]);
    tool("udevadm", &["trigger", "--action=add", "--subsystem-match=block"]);
    tool("udevadm", &["settle", "--timeout=600"]);
}

/// Leaves nothing of it.
fn stop_udev() {
    tool("udevadm", &["control", "--exit"]);
    fs::remove_dir_all("/run/udev").unwrap();
    fs::remove_dir_all("/dev/disk").unwrap();
}

/// Tells the kernel not to read VPD pages, and lets it forget the disks that it has and find them again: then sysfs has
/// no pages, as on old kernels.
fn hide_pages(disks: &[Value]) {
    // It asks for the pages of its disks whatever the kernel is told.
    tool("modprobe", &["-r", "virtio_scsi"]);
    // BLIST_SKIP_VPD_PAGES
    fs::write("/sys/module/scsi_mod/parameters/default_dev_flags", "0x4000000").unwrap();
    let devices = disks.iter().map(|disk| Path::new("/sys/bus/scsi/devices").join(text(disk, "hctl")));
    let devices: Vec<_> = devices.filter(|device| device.exists()).collect();
    devices.iter().for_each(|device| fs::write(device.join("delete"), "1").unwrap());
    assert_eq!(scsi_disks(), 0);
    rescan();
    tool("udevadm", &["settle", "--timeout=600"]);
    for device in devices {
        assert!(device.join("block").exists(), "{} was not found again", device.display());
        assert!(!device.join("vpd_pg83").exists() && !device.join("vpd_pg80").exists());
    }
}

/// The identities by address, since names change.
fn identities(disks: &[Value]) -> BTreeMap<&str, &Value> {
    disks.iter().map(|disk| (text(disk, "hctl"), &disk["id"])).collect()
}

/// Where identities with this prefix were read.
fn sources<'a>(disks: &'a [Value], prefix: &str) -> BTreeSet<&'a str> {
    let disks = disks.iter().filter(|disk| text(disk, "id").starts_with(prefix));
    disks.map(|disk| text(disk, "id_source")).collect()
}

/// VMware's disks without UUID have advice of their own, in the table and with `--require-uuid`.
fn told_to_give_uuids() {
    let table = run(&["discover-disks"]).ok().stdout;
    assert_eq!(
        table.matches("the virtual machine lacks disk.EnableUUID. Power the VM off").count(),
        2,
        "{table}"
    );
    assert_eq!(table.matches("give the virtual disk a `wwn=`").count(), 2, "{table}");
    let refused = run(&["discover-disks", "--require-uuid"]);
    assert_eq!(refused.stdout, table);
    // A serial is no UUID either.
    refused.fails(3, &["6 disks are without a UUID", "disk.EnableUUID"]);
}

/// The adapters by what the hypervisor calls them, with their drivers, and the kinds of disks that the test below plugs
/// in. A SAS target has an address only by its WWN.
const ADAPTERS: [(&str, &str, &[usize]); 4] = [
    ("virtio", "virtio_scsi", &[0, 1, 2, 4]),
    ("pvscsi", "vmw_pvscsi", &[0, 2, 3, 4]),
    ("parallel", "am53c974", &[1]),
    ("mptsas", "mptsas", &[0]),
];

#[test]
fn disks_of_every_adapter_are_what_the_system_s_tools_say() {
    full().without_udev().run(|guest| {
        let mut hypervisor = Hypervisor::connect();
        for (index, (adapter, _, kinds)) in ADAPTERS.into_iter().enumerate() {
            for &kind in kinds {
                let (serial, wwn) =
                    (format!("disk {index}-{kind}"), format!("0x5000c50015ea7{index}{kind}0"));
                let properties = match kind {
                    0 => json!({"serial": serial, "wwn": wwn}),
                    1 => json!({"serial": serial}),
                    2 => json!({}),
                    // On VMware's disks both pages say the same.
                    3 => {
                        json!({"vendor": "VMware", "product": "Virtual disk", "serial": wwn[2..], "wwn": wwn})
                    }
                    _ => json!({"vendor": "VMware", "product": "Virtual disk"}),
                };
                let size = (16 + 10 * index + kind) as u64 * MIB;
                let disk = VirtualDisk::new(&guest.share, &format!("{adapter}{kind}"), size, properties);
                hypervisor.plug(&disk, adapter, kind as u8);
            }
        }
        load(&ADAPTERS.map(|(_, driver, _)| driver));
        wait_for("the disks", || (scsi_disks() == 10).then_some(()));
        let from = |disks: &[Value]| {
            ["naa.", "serial."].map(|prefix| Vec::from_iter(sources(disks, prefix)).join(" "))
        };

        // By the kernel alone.
        let by_kernel = agreed(From::Sysfs);
        assert_eq!(from(&by_kernel), ["sysfs", "sysfs"]);
        assert_eq!(by_kernel.iter().filter(|disk| disk["id"].is_null()).count(), 4);
        told_to_give_uuids();

        // With udev, which is asked where the kernel does not know.
        start_udev();
        let by_udev = agreed(From::Udev);
        assert_eq!(from(&by_udev), ["sysfs", "sysfs"]);

        // By udev alone, which takes what may be a drive's name for a serial, and is not believed there.
        hide_pages(&by_kernel);
        let by_udev_alone = discovered();
        assert_eq!((by_udev_alone.len(), from(&by_udev_alone)), (6, ["udev", "sg-io"].map(str::to_owned)));

        // By the disks alone.
        stop_udev();
        let by_inquiry = agreed(From::Device);
        assert_eq!((by_inquiry.len(), from(&by_inquiry)), (6, ["sg-io", "sg-io"].map(str::to_owned)));

        let by_kernel = identities(&by_kernel);
        assert_eq!(identities(&by_udev), by_kernel);
        for (address, id) in identities(&by_udev_alone).into_iter().chain(identities(&by_inquiry)) {
            assert_eq!(by_kernel[address], id);
        }
    });
}

/// A disk with a WWN of its own.
fn identified(guest: &Inside, number: u32, size: u64) -> VirtualDisk {
    let wwn = json!({"serial": format!("disk{number}"), "wwn": format!("0x{}", wwn(number))});
    VirtualDisk::new(&guest.share, &format!("disk{number}"), size, wwn)
}

fn wwn(number: u32) -> String {
    // Nothing but zeros behind the maker would be no identity.
    format!("5000c501{number:08x}")
}

/// As `discover-disks` writes it.
fn id(number: u32) -> String {
    format!("naa.{}", wwn(number))
}

/// A running `discover-disks --watch`.
struct Watching {
    process: Child,
    lines: Receiver<(Instant, Value)>,
    /// How long each word took to come.
    late: Vec<Duration>,
}

impl Watching {
    fn start() -> Watching {
        let mut process =
            mt_agent().args(["discover-disks", "--watch", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines() {
                let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
                _ = sender.send((Instant::now(), line));
            }
        });
        let (_, listing): (Instant, Value) = lines.recv_timeout(patience()).unwrap();
        assert_eq!(listing["disks"], json!([]));
        Watching { process, lines, late: Vec::new() }
    }

    /// It says these events of these disks, in any order, each once, and no other; and gives what it said of the last
    /// one.
    fn says(&mut self, event: &str, disks: &[u32]) -> Value {
        let asked = Instant::now();
        let mut missing: Vec<String> = disks.iter().map(|number| id(*number)).collect();
        loop {
            let said = self.lines.recv_timeout(patience());
            let (when, said) = said.unwrap_or_else(|_| panic!("it missed that {missing:?} were {event}"));
            // Such as that udev's database has it now.
            if said["event"] == "changed" {
                continue;
            }
            let at = missing.iter().position(|id| said["disk"]["id"] == **id);
            let at = at.unwrap_or_else(|| panic!("{event} {missing:?}, and it says: {said}"));
            missing.swap_remove(at);
            assert_eq!(said["event"], event, "{said}");
            let late = when.saturating_duration_since(asked);
            // No later than an event that was seen; the look that comes without one comes after 30 seconds.
            assert!(late < Duration::from_secs(25), "only after {late:?}: {said}");
            self.late.push(late);
            if missing.is_empty() {
                return said;
            }
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[test]
fn a_watch_misses_no_disk_that_comes_grows_or_goes() {
    full().run(|guest| {
        load(&["virtio_scsi", "vmw_pvscsi"]);
        let mut hypervisor = Hypervisor::connect();
        let mut watching = Watching::start();
        let mut disks: Vec<VirtualDisk> = (0..6).map(|number| identified(guest, number, 16 * MIB)).collect();
        for round in 1..=20 {
            hypervisor.plug(&disks[0], "virtio", 1);
            watching.says("attached", &[0]);
            hypervisor.plug(&disks[1], "pvscsi", 1);
            watching.says("attached", &[1]);
            hypervisor.resize(&disks[0], (16 + round) * MIB);
            let said = watching.says("resized", &[0]);
            let sizes = [&said["from"], &said["disk"]["size"]].map(|size| size.as_u64().unwrap());
            assert_eq!(sizes, [(15 + round) * MIB, (16 + round) * MIB]);
            disks[..2].iter().for_each(|disk| hypervisor.unplug(disk));
            watching.says("detached", &[0, 1]);
        }
        // Many at once.
        let all: Vec<u32> = (0..6).collect();
        let adapters = ["virtio", "pvscsi"].iter().cycle();
        disks
            .iter()
            .zip(adapters)
            .zip(2..)
            .for_each(|((disk, adapter), target)| hypervisor.plug(disk, adapter, target));
        watching.says("attached", &all);
        disks.drain(..).for_each(|disk| hypervisor.unplug(&disk));
        watching.says("detached", &all);
        // On a busy machine single ones may take longer.
        watching.late.sort_unstable();
        let (median, slowest) = (watching.late[watching.late.len() / 2], watching.late.last().unwrap());
        println!("a word came after {median:?}, the slowest after {slowest:?}");
        assert!(median < Duration::from_secs(2), "half of all words came only after {median:?}");
    });
}

/// The disk with this number, if discovery finds it.
fn find(number: u32) -> Option<Value> {
    discovered().into_iter().find(|disk| disk["id"] == id(number))
}

fn size(number: u32) -> Option<u64> {
    find(number)?["size"].as_u64()
}

fn rescan() {
    run(&["discover-disks", "--rescan"]).ok();
}

#[test]
fn a_rescan_finds_what_no_bus_told() {
    full().run(|guest| {
        load(&["vmw_pvscsi", "am53c974"]);
        let mut hypervisor = Hypervisor::connect();
        let disks: Vec<VirtualDisk> = (0..4).map(|number| identified(guest, number, 16 * MIB)).collect();
        hypervisor.plug(&disks[0], "pvscsi", 0);
        hypervisor.plug(&disks[1], "pvscsi", 1);
        wait_for("the disks", || (find(0).is_some() && find(1).is_some()).then_some(()));
        // Parallel SCSI does not tell of a disk, and PVSCSI not of a size.
        hypervisor.plug(&disks[2], "parallel", 1);
        hypervisor.resize(&disks[1], 24 * MIB);
        // And one that this host let go of.
        let hctl = text(&find(0).unwrap(), "hctl").to_owned();
        fs::write(format!("/sys/bus/scsi/devices/{hctl}/delete"), "1").unwrap();
        assert_eq!((size(0), size(1), size(2)), (None, Some(16 * MIB), None));
        rescan();
        assert_eq!((size(0), size(1), size(2)), (Some(16 * MIB), Some(24 * MIB), Some(16 * MIB)));
        // Another one in the place of one, and the bus is silent: the kernel shows what it knew.
        // Not while udevd reads it: what this adapter was asked for a disk that is unplugged meanwhile it never answers.
        // After 30 seconds the kernel gives up, and takes the disk, and so whatever comes in its place, offline.
        tool("udevadm", &["settle", "--timeout=600"]);
        hypervisor.unplug(&disks[2]);
        hypervisor.plug(&disks[3], "parallel", 1);
        assert!(find(2).is_some() && find(3).is_none());
        let Err(Error::Refused { reason: Refusal::Changed { found, .. }, .. }) =
            open_target(&id(2).parse().unwrap(), &TargetOptions::default())
        else {
            panic!("another disk was opened");
        };
        assert_eq!(found, id(3).parse().ok());
        rescan();
        assert!(find(2).is_none() && find(3).is_some());
        // Nor is it told of one that went. What the kernel still shows has no size, and so no use.
        tool("udevadm", &["settle", "--timeout=600"]);
        hypervisor.unplug(&disks[3]);
        rescan();
        let gone = find(3).unwrap();
        assert_eq!((&gone["size"], &gone["role"]), (&json!(0), &json!("unknown")), "{gone:#}");
        assert!(gone["problems"][0].as_str().unwrap().contains("no size"), "{gone:#}");
        open_target(&id(3).parse().unwrap(), &TargetOptions::default()).unwrap_err();
    });
}

#[test]
fn an_exchanged_disk_is_refused_and_one_that_moved_is_found() {
    full().run(|guest| {
        load(&["virtio_scsi", "vmw_pvscsi"]);
        let mut hypervisor = Hypervisor::connect();
        let [ours, other] = [0, 1].map(|number| identified(guest, number, 16 * MIB));
        let waited = |number| wait_for("the disk", || find(number));
        hypervisor.plug(&ours, "virtio", 1);
        let before = waited(0);
        let rig = Rig::new(&[]);
        let target = format!("d0={}", text(&before, "node"));
        run(&["protect", "add", MACHINE, "--config", &rig.service.config(), "--disk", &target]).ok();
        let source = rig.random("source", 16 * MIB);
        let send = || rig.send(&[("d0", &source)], &[]);

        // Another one behind its name.
        let options = TargetOptions::default();
        let expected: DiskId = id(0).parse().unwrap();
        let listed = discover(&Sysroot::default(), &options.discovery).unwrap().remove(0);
        // Whoever has it open keeps its name.
        tool("udevadm", &["settle", "--timeout=600"]);
        hypervisor.unplug(&ours);
        wait_for("its name", || (scsi_disks() == 0).then_some(()));
        hypervisor.plug(&other, "virtio", 1);
        let after = waited(1);
        assert_eq!((&after["node"], &after["devno"]), (&before["node"], &before["devno"]));
        match open_listed(listed, &expected, &options) {
            Err(Error::Refused { reason: Refusal::Changed { found, .. }, .. }) => {
                assert_eq!(found, id(1).parse().ok())
            }
            result => panic!("the listing was believed: {result:?}"),
        }
        send().fails(3, &[&format!("no disk here is {}", id(0))]);
        assert_eq!(allocated(other.image()), 0, "the other disk was written");

        // It comes back elsewhere, under another name.
        hypervisor.plug(&ours, "pvscsi", 5);
        assert_ne!(waited(0)["node"], before["node"]);
        send().ok();
        rig.synchronized("d0");
        assert_equal(&source, ours.image());
        assert_eq!(allocated(other.image()), 0, "the other disk was written");
    });
}
