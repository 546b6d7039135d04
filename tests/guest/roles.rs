//! What real disks are used for, with the evidence, and that none of these becomes a target.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::harness::small;
use crate::lio::{FOR_MULTIPATH, Identity, Lun, Store, Target, discovered, named, settle, without_rules};
use crate::support::{MACHINE, MIB, Rig, run, tool};

/// A disk in use, and what is to be said of it.
struct Used {
    lun: Lun,
    id: String,
    role: &'static str,
    /// Each in one line of the evidence, in this order.
    evidence: Vec<String>,
}

/// Makes disks that are used in all ways, on a service that could receive onto them.
struct House {
    rig: Rig,
    target: Target,
    count: u32,
    used: Vec<Used>,
}

impl House {
    fn new() -> House {
        House { rig: Rig::new(&[]), target: Target::new(), count: 0, used: Vec::new() }
    }

    fn disk(&mut self) -> (Lun, String) {
        let identity = Identity::vmware(self.count);
        let store = Store::file(&self.rig.path(&format!("disk{}", self.count)), 64 * MIB, &identity);
        let lun = self.target.attach(self.count, &store);
        self.count += 1;
        (lun, identity.canonical())
    }

    fn used(&mut self, (lun, id): (Lun, String), role: &'static str, evidence: &[&str]) {
        let evidence = evidence.iter().map(|line| line.replace("DISK", &lun.name())).collect();
        self.used.push(Used { lun, id, role, evidence });
    }

    /// Discovery knows them all, and `protect add` takes none: not by its identity, not by its place, not with
    /// `--overwrite`.
    fn is_refused(&self, udev: bool) {
        if udev {
            settle();
        }
        let disks = discovered();
        for used in &self.used {
            let disk = named(&disks, &used.lun.name());
            assert_eq!(disk["id"], used.id.as_str(), "{disk:#}");
            assert_eq!(disk["role"], used.role, "{disk:#}");
            let lines: Vec<&str> =
                disk["evidence"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
            assert_eq!(lines, used.evidence, "{disk:#}");
            // By its identity, a clone may be either of the two.
            let by_id = if used.role == "clone" { "another disk has the same identity" } else { lines[0] };
            let node = used.lun.node().display().to_string();
            for (target, said) in [(&used.id, by_id), (&node, lines[0])] {
                let config = self.rig.service.config();
                let disk = format!("root={target}");
                let add = ["protect", "add", MACHINE, "--config", &config, "--overwrite", "--disk", &disk];
                run(&add).fails(3, &[target, said]);
            }
        }
        let list = run(&["protect", "list", "--json", "--config", &self.rig.service.config()]).ok().json();
        assert_eq!(list["machines"], Value::Array(Vec::new()));
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The kernel's name of a device with another name in /dev.
pub fn kernel_name(path: &str) -> String {
    let number = fs::metadata(path).unwrap().rdev();
    let link = format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number));
    fs::read_link(link).unwrap().file_name().unwrap().to_str().unwrap().to_owned()
}

fn partitioned(lun: &Lun) -> PathBuf {
    let node = lun.node();
    let script = "label: gpt\nsize=16MiB\nsize=16MiB\n";
    tool("sh", &["-c", &format!("printf '{script}' | sfdisk -q --wipe always {}", node.display())]);
    // udevd makes the kernel read the table again when that is closed, and the partitions are away for a moment.
    if Path::new("/run/udev/control").exists() {
        settle();
    }
    node
}

/// For whoever lives on /sysroot, that is /, on the logical volume that is called so.
fn the_root_is_refused(house: &House, volume: &str) {
    let built = Path::new(env!("CARGO_BIN_EXE_mt-agent")).parent().unwrap();
    for dir in [Path::new("/dev"), Path::new("/proc"), Path::new("/sys"), Path::new("/usr"), built] {
        let inside = Path::new("/sysroot").join(dir.strip_prefix("/").unwrap());
        fs::create_dir_all(&inside).unwrap();
        tool("mount", &["--rbind", text(dir), text(&inside)]);
    }
    for link in ["lib", "lib64"] {
        symlink(format!("usr/{link}"), Path::new("/sysroot").join(link)).unwrap();
    }
    let inside = |args: &[&str]| {
        let mut command = Command::new("chroot");
        command.arg("/sysroot").arg(env!("CARGO_BIN_EXE_mt-agent")).args(args);
        house.rig.spawn(command).finish()
    };
    let said = format!("{volume} is mounted on /");
    let used = &house.used[0];
    let disks = inside(&["discover-disks", "--json"]).ok().json();
    let disk = named(disks["disks"].as_array().unwrap(), &used.lun.name());
    assert_eq!(disk["role"], "system", "{disk:#}");
    assert!(disk["evidence"].as_array().unwrap().contains(&said.as_str().into()), "{disk:#}");
    let (config, disk) = (house.rig.service.config(), format!("root={}", used.id));
    inside(&["protect", "add", MACHINE, "--config", &config, "--overwrite", "--disk", &disk])
        .fails(3, &["this system uses it", &said]);
    tool("umount", &["--recursive", "/sysroot"]);
}

fn used_disks(udev: bool) {
    if udev {
        // The last one would assemble again what this test takes apart.
        without_rules(&FOR_MULTIPATH);
        without_rules(&["64-md-raid-assembly"]);
    }
    let mut house = House::new();

    // A root disk as installers make it: /boot on a partition, / on a logical volume.
    let disk = house.disk();
    let node = partitioned(&disk.0);
    let (boot, pv) = (format!("{}1", text(&node)), format!("{}2", text(&node)));
    tool("mkfs.ext4", &["-q", &boot]);
    fs::create_dir_all("/boot").unwrap();
    tool("mount", &[&boot, "/boot"]);
    tool("pvcreate", &["-q", &pv]);
    tool("vgcreate", &["-q", "system", &pv]);
    tool("lvcreate", &["-q", "-n", "root", "-L", "8M", "-y", "-Zn", "-Wn", "system"]);
    tool("mkfs.ext4", &["-q", "/dev/system/root"]);
    fs::create_dir_all("/sysroot").unwrap();
    tool("mount", &["/dev/system/root", "/sysroot"]);
    let dm_of_root = kernel_name("/dev/system/root");
    house.used(
        disk,
        "system",
        &[
            "DISK1 is mounted on /boot",
            &format!(
                "DISK2 is a physical volume of an active volume group: it carries {dm_of_root} (system-root)"
            ),
            &format!("{dm_of_root} (system-root) on DISK2 is mounted on /sysroot"),
        ],
    );

    // Mounted as a whole.
    let disk = house.disk();
    tool("mkfs.ext4", &["-q", text(&disk.0.node())]);
    fs::create_dir_all("/srv/with space").unwrap();
    tool("mount", &[text(&disk.0.node()), "/srv/with space"]);
    house.used(disk, "system", &["DISK is mounted on /srv/with space"]);

    // A volume group that is active and not mounted.
    let disk = house.disk();
    tool("pvcreate", &["-q", text(&disk.0.node())]);
    tool("vgcreate", &["-q", "data", text(&disk.0.node())]);
    tool("lvcreate", &["-q", "-n", "home", "-L", "8M", "-y", "-Zn", "-Wn", "data"]);
    let dm = kernel_name("/dev/data/home");
    house.used(
        disk,
        "in-use",
        &[&format!("DISK is a physical volume of an active volume group: it carries {dm} (data-home)")],
    );

    // A mirror of md over two disks, one by a partition.
    let (one, two) = (house.disk(), house.disk());
    let part = format!("{}1", text(&partitioned(&two.0)));
    tool("modprobe", &["raid1"]);
    let members = [text(&one.0.node()).to_owned(), part];
    let create = [
        "--create",
        "/dev/md7",
        "--run",
        "--level=1",
        "--raid-devices=2",
        "--metadata=1.2",
        "--assume-clean",
    ];
    tool("mdadm", &[&create[..], &[members[0].as_str(), members[1].as_str()]].concat());
    house.used(one, "in-use", &["DISK is a member of md7 (raid1)"]);
    house.used(two, "in-use", &["DISK1 is a member of md7 (raid1)"]);

    // A bare table of device mapper.
    let disk = house.disk();
    let table = format!("0 65536 linear {} 2048", text(&disk.0.node()));
    tool("dmsetup", &["create", "thing", "--table", &table]);
    let dm = kernel_name("/dev/mapper/thing");
    house.used(disk, "in-use", &[&format!("DISK is held by {dm} (thing)")]);

    // Swap, on a partition and on a whole disk.
    let disk = house.disk();
    let part = format!("{}2", text(&partitioned(&disk.0)));
    tool("mkswap", &[&part]);
    tool("swapon", &[&part]);
    house.used(disk, "system", &["DISK2 is swap"]);
    let disk = house.disk();
    tool("mkswap", &[text(&disk.0.node())]);
    tool("swapon", &[text(&disk.0.node())]);
    house.used(disk, "system", &["DISK is swap"]);

    // Two disks with one identity: a copy that its array shows beside the original.
    let original = house.disk();
    let identity = Identity::vmware(house.count - 1);
    let store = Store::file(&house.rig.path("copy"), 64 * MIB, &identity);
    let copy = house.target.attach(house.count, &store);
    let evidence = |other: &Lun| format!("DISK has the same identity as {}", other.name());
    let (first, second) = (evidence(&copy), evidence(&original.0));
    house.used(original, "clone", &[&first]);
    house.used((copy, identity.canonical()), "clone", &[&second]);

    house.is_refused(udev);
    the_root_is_refused(&house, &format!("{dm_of_root} (system-root) on {}2", house.used[0].lun.name()));
    for args in [["umount", "/boot"], ["umount", "/srv/with space"]] {
        tool(args[0], &args[1..]);
    }
    tool("swapoff", &["-a"]);
    tool("vgchange", &["-q", "-an"]);
    tool("mdadm", &["-q", "--stop", "/dev/md7"]);
    tool("dmsetup", &["remove", "thing"]);
    if udev {
        settle();
    }
    // Nobody uses them any more; now it is what they carry that protects them, and that alone.
    let disks = discovered();
    for used in house.used.iter().filter(|used| used.role != "clone") {
        let disk = named(&disks, &used.lun.name());
        assert_eq!((&disk["role"], &disk["evidence"]), (&"free".into(), &serde_json::json!([])), "{disk:#}");
        let (config, disk) = (house.rig.service.config(), format!("d{}={}", used.lun.name(), used.id));
        let add = ["protect", "add", MACHINE, "--config", &config, "--disk", &disk];
        if used.evidence[0].contains("thing") {
            run(&add).ok();
        } else {
            run(&add).fails(3, &["it is not empty", "--overwrite"]);
            run(&[&add[..], &["--overwrite"]].concat()).ok();
        }
    }

    // What is used again after it was assigned is not written.
    let assigned = |evidence: &str| {
        let used = house.used.iter().find(|used| used.evidence[0].contains(evidence)).unwrap();
        (used, used.lun.node().display().to_string())
    };
    let ((mounted, mounted_node), (swap, swap_node), (mapped, _)) =
        (assigned("/srv/with space"), assigned("2 is swap"), assigned("(thing)"));
    tool("mount", &[&mounted_node, "/srv/with space"]);
    tool("swapon", &[&format!("{swap_node}2")]);
    tool("dmsetup", &["create", "thing", "--table", &table]);
    let by_map = format!("{} is held by {} (thing)", mapped.lun.name(), kernel_name("/dev/mapper/thing"));
    if udev {
        settle();
    }
    let source = house.rig.random("source", MIB);
    for (used, evidence) in [(mounted, &mounted.evidence[0]), (swap, &swap.evidence[0]), (mapped, &by_map)] {
        let disk = format!("d{}", used.lun.name());
        house.rig.send(&[(&disk, &source)], &[]).fails(3, &[&format!("its role is {}", used.role), evidence]);
    }
}

#[test]
fn disks_in_use_are_refused() {
    small().run(|_| used_disks(true));
}

#[test]
fn disks_in_use_are_refused_without_udevd() {
    small().without_udev().run(|_| used_disks(false));
}
