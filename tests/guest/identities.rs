//! Discovery held against the system's own tools, disk by disk, on real SCSI devices.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::small;
use crate::lio::{Identity, Lun, Store, Target, discovered, named, settle};
use crate::support::{
    MACHINE, MIB, Outcome, Rig, Service, assert_equal, directory, run, tool, wait_for, write_random,
};

/// What a tool prints, whether it succeeds or not.
fn said(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What `scsi_id`, which asks the device, must say of this identity: type 3 is NAA, and type 0 what the vendor likes,
/// such as a serial.
fn by_scsi_id(disk: &Value) -> String {
    match disk["id"].as_str().map(|id| id.split_once('.').unwrap()) {
        None => String::new(),
        Some(("naa", digits)) => format!("3{digits}"),
        Some(("serial", value)) => format!("0{value}"),
        Some(other) => panic!("{disk:#}: {other:?}"),
    }
}

fn scsi_id(node: &str) -> String {
    said("/lib/udev/scsi_id", &["-g", "-u", "-d", node])
}

/// The NAA identity, if it has one.
fn naa(disk: &Value) -> Option<&str> {
    disk["id"].as_str()?.strip_prefix("naa.")
}

/// What a device answers that is asked who it is: `scsi_id` and `sg_vpd` are told the same as discovery.
fn answers(disk: &Value, node: &str) {
    assert_eq!(scsi_id(node), by_scsi_id(disk), "{node}: scsi_id");
    let page = said("sg_vpd", &["-p", "di", node]);
    let unit = page.split("Target port:").next().unwrap();
    let designators: Vec<&str> = unit.lines().filter_map(|line| line.trim().strip_prefix("0x")).collect();
    assert_eq!(designators, naa(disk).into_iter().collect::<Vec<_>>(), "{node}: sg_vpd: {page}");
    let page = said("sg_vpd", &["-p", "sn", node]);
    let serial = page.lines().find_map(|line| line.trim().strip_prefix("Unit serial number: "));
    assert_eq!(disk["serial"].as_str(), serial, "{node}: {page}");
}

/// What `lsblk` says of a device.
struct Lsblk(Value);

impl Lsblk {
    fn of(node: &str) -> Lsblk {
        let text = tool("lsblk", &["-J", "-O", "-b", "-d", node]);
        let said: Value = serde_json::from_str(&text).unwrap();
        Lsblk(said["blockdevices"][0].clone())
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.0[key].as_str().map(str::trim).filter(|value| !value.is_empty())
    }

    /// Number, size and the like.
    fn agrees(&self, disk: &Value) {
        let Lsblk(said) = self;
        assert_eq!((&said["kname"], &said["maj:min"]), (&disk["name"], &disk["devno"]), "{said:#}");
        assert_eq!((&said["size"], &said["ro"]), (&disk["size"], &disk["read_only"]), "{said:#}");
        assert_eq!(
            (&said["log-sec"], &said["phy-sec"]),
            (&disk["logical_sector"], &disk["physical_sector"]),
            "{said:#}"
        );
    }
}

/// What udev knows of a device.
struct Properties(String);

impl Properties {
    fn of(node: &str) -> Properties {
        Properties(tool("udevadm", &["info", "--query=property", "--name", node]))
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }
}

/// Holds one disk of `discover-disks --json` against what every other tool says of it.
pub fn agrees(disk: &Value, from: From) {
    let udev = from == From::Udev;
    let text = |key: &str| disk[key].as_str();
    let (name, node) = (text("name").unwrap(), text("node").unwrap());
    let naa = naa(disk);
    answers(disk, node);

    let lsblk = Lsblk::of(node);
    lsblk.agrees(disk);
    assert_eq!((lsblk.text("path"), lsblk.text("hctl")), (Some(node), text("hctl")));
    assert_eq!((lsblk.text("vendor"), lsblk.text("model")), (text("vendor"), text("model")), "{name}");
    let wwn = lsblk.text("wwn").map(|wwn| wwn.strip_prefix("0x").unwrap());
    assert_eq!(wwn, naa.filter(|_| udev), "{name}: lsblk");

    let hctl = text("hctl").unwrap();
    let line = |text: String| {
        let line =
            text.lines().find(|line| line.starts_with(&format!("[{hctl}]"))).unwrap_or_default().to_owned();
        line.split_whitespace().map(str::to_owned).collect::<Vec<String>>()
    };
    let lsscsi = line(said("lsscsi", &["-u"]));
    let known = naa.filter(|_| from != From::Device).unwrap_or("none");
    assert_eq!((lsscsi[2].as_str(), lsscsi[3].as_str()), (known, node), "{lsscsi:?}");
    let lsscsi = line(said("lsscsi", &["-i"]));
    let [.., listed, id] = lsscsi.as_slice() else { panic!("{lsscsi:?}") };
    assert_eq!(listed, node);
    let expected = by_scsi_id(disk);
    // Of what has one identity udev gives each name to one: another path, or the map, which then stands for its paths.
    let shared = disk["role"] == "clone";
    let mapped = fs::read_dir(format!("/sys/block/{name}/holders")).unwrap().next().is_some();
    match text("id").filter(|_| udev) {
        Some(_) if id == "-" => assert!(shared && !mapped, "{lsscsi:?}"),
        // It takes any one of the names that udev gave.
        Some(_) => {
            let link = format!("/dev/disk/by-id/scsi-{id}");
            let named = fs::canonicalize(&link).unwrap();
            assert!(named == Path::new(node) || shared, "{link}: {}", named.display());
            assert_eq!(scsi_id(named.to_str().unwrap()), expected, "{link}");
            assert!(Path::new(&format!("/dev/disk/by-id/scsi-{expected}")).exists(), "{expected}");
        }
        None => assert_eq!(id, "-", "{lsscsi:?}"),
    }

    if udev {
        let properties = Properties::of(node);
        let property = |key: &str| properties.get(key);
        assert_eq!(property("ID_WWN_WITH_EXTENSION").map(|wwn| &wwn[2..]), naa, "{}", properties.0);
        // Where names are made of it, it has no blanks.
        let serial = text("serial").map(|serial| serial.replace(' ', "_"));
        assert_eq!(property("ID_SCSI_SERIAL"), serial.as_deref(), "{}", properties.0);
        assert_eq!(lsblk.text("serial"), serial.as_deref(), "{name}: lsblk");
        assert_eq!(property("ID_VENDOR"), text("vendor"));
        assert_eq!(
            property("ID_MODEL").map(|model| model.replace('_', " ")),
            text("model").map(|model| model.replace('_', " "))
        );
    }
}

/// The same for a multipath map and, each as a disk of its own, for its paths, as they were listed before there was a map.
fn map_agrees(map: &Value, paths: &[Value], from: From) {
    let text = |key: &str| map[key].as_str();
    let (name, node, naa) = (text("name").unwrap(), text("node").unwrap(), naa(map).unwrap());
    for path in paths {
        assert_eq!(path["id"], map["id"]);
        agrees(path, from);
    }
    let names: Vec<&Value> = paths.iter().map(|path| &path["name"]).collect();
    assert_eq!(map["paths"], serde_json::json!(names));
    // What it is asked, one of its paths answers.
    answers(map, node);

    let wwid = format!("3{naa}");
    let known = tool("dmsetup", &["info", "-c", "--noheadings", "-o", "uuid,blkdevname,name"]);
    let [uuid, device, mapped] = known.split(':').collect::<Vec<_>>()[..] else { panic!("{known}") };
    assert_eq!((uuid, device), (format!("mpath-{wwid}").as_str(), name));
    let lsblk = Lsblk::of(node);
    lsblk.agrees(map);
    assert_eq!((lsblk.text("type"), lsblk.text("name")), (Some("mpath"), Some(mapped)));
    assert_eq!(lsblk.text("path"), Some(format!("/dev/mapper/{mapped}").as_str()));
    let below = tool("lsblk", &["-n", "-r", "-s", "-o", "KNAME", node]);
    let mut below: Vec<&str> = below.lines().collect();
    below.sort_unstable();
    assert_eq!(
        below,
        std::iter::once(name).chain(names.iter().map(|name| name.as_str().unwrap())).collect::<Vec<_>>()
    );

    let properties = Properties::of(node);
    let known = ["DM_UUID", "DM_NAME", "DM_WWN", "DM_SERIAL"].map(|key| properties.get(key));
    if from != From::Udev {
        return assert_eq!(known, [None; 4], "{}", properties.0);
    }
    assert_eq!(known, [uuid, mapped, &format!("0x{naa}"), &wwid].map(Some), "{}", properties.0);
    // The names of the disk are the map's.
    for link in [
        format!("dm-uuid-{uuid}"),
        format!("dm-name-{mapped}"),
        format!("wwn-0x{naa}"),
        format!("scsi-{wwid}"),
    ] {
        let link = Path::new("/dev/disk/by-id").join(link);
        assert_eq!(fs::canonicalize(&link).unwrap(), Path::new(node), "{}", link.display());
    }
}

/// Where identities come from, and so what is there besides the disk itself.
#[derive(Clone, Copy, PartialEq)]
pub enum From {
    Udev,
    Sysfs,
    Device,
}

/// All kinds of disks, which have the same identities wherever these are read.
fn disks_agree(from: From) {
    if from == From::Device {
        // As on kernels before 3.13: sysfs has no pages (BLIST_SKIP_VPD_PAGES).
        tool("modprobe", &["scsi_mod", "default_dev_flags=0x4000000"]);
    }
    let dir = directory();
    let target = Target::new();
    let mut expected = Vec::new();
    let identities = [
        Identity::vmware(1),
        Identity::vmware(2),
        Identity::vmware(0xfffffff3),
        Identity::Bare,
        Identity::Bare,
    ];
    for (lun, identity) in identities.iter().enumerate() {
        let size = (lun as u64 + 1) * 8 * MIB;
        let store = Store::file(&dir.path().join(format!("disk{lun}")), size, identity);
        let lun = target.attach(u32::try_from(lun).unwrap(), &store);
        let id = matches!(identity, Identity::VmWare(_)).then(|| identity.canonical());
        expected.push((lun.name(), id));
    }
    let before: Vec<String> = expected.iter().map(|(name, _)| name.clone()).collect();
    // Host 1, and so not the first of its numbers; large sectors.
    tool("modprobe", &["scsi_debug", "num_tgts=2", "max_luns=2", "sector_size=4096", "physblk_exp=1"]);
    wait_for("the disks of scsi_debug", || (discovered().len() == expected.len() + 4).then_some(()));
    if from == From::Udev {
        settle();
    }
    let disks = discovered();
    let (target, debug): (Vec<&Value>, Vec<&Value>) =
        disks.iter().partition(|disk| before.iter().any(|name| disk["name"] == **name));
    for (name, id) in &expected {
        let disk = named(&disks, name);
        assert_eq!(disk["id"].as_str(), id.as_deref(), "{disk:#}");
        assert_eq!(disk["role"], if id.is_some() { "free" } else { "no-uuid" });
    }
    assert_eq!(target.len(), expected.len());
    let mut naa3: Vec<&str> = debug.iter().map(|disk| disk["id"].as_str().unwrap()).collect();
    naa3.sort_unstable();
    assert_eq!(
        naa3,
        ["naa.3333333000000fa0", "naa.3333333000000fa1", "naa.3333333000001388", "naa.3333333000001389"]
    );
    assert!(debug.iter().all(|disk| disk["logical_sector"] == 4096 && disk["physical_sector"] == 8192));
    for disk in &disks {
        agrees(disk, from);
        let source = match from {
            From::Udev | From::Sysfs => "sysfs",
            From::Device => "sg-io",
        };
        assert_eq!(disk["id_source"].as_str(), disk["id"].as_str().map(|_| source), "{disk:#}");
        let page = format!("/sys/block/{}/device/vpd_pg83", disk["name"].as_str().unwrap());
        assert_eq!(Path::new(&page).exists(), !disk["id"].is_null() && from != From::Device, "{page}");
    }
}

#[test]
fn disks_are_what_the_tools_say() {
    small().run(|_| disks_agree(From::Udev));
}

#[test]
fn disks_are_what_the_tools_say_without_udevd() {
    small().without_udev().run(|_| disks_agree(From::Sysfs));
}

#[test]
fn disks_are_what_the_tools_say_where_only_the_device_knows() {
    small().without_udev().run(|_| disks_agree(From::Device));
}

/// One LUN that is there by two ways.
struct TwoPaths {
    store: Store,
    paths: Vec<Lun>,
}

impl TwoPaths {
    fn new(backing: &Path) -> TwoPaths {
        let store = Store::file(backing, 64 * MIB, &Identity::vmware(7));
        let paths = (0..2).map(|_| Target::new().attach(3, &store)).collect();
        TwoPaths { store, paths }
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.paths.iter().map(Lun::name).collect();
        names.sort_unstable();
        names
    }

    /// Makes one disk of both, as multipathd does, with a map that waits where no path is left.
    fn map(&self) {
        tool("modprobe", &["-a", "dm-multipath", "dm-round-robin"]);
        let names = self.names();
        let (one, two) = (&names[0], &names[1]);
        let sectors = 64 * MIB / 512;
        let table = format!(
            "0 {sectors} multipath 1 queue_if_no_path 0 1 1 round-robin 0 2 1 /dev/{one} 1 /dev/{two} 1"
        );
        let uuid = format!("mpath-3{}", &Identity::vmware(7).canonical()[4..]);
        tool("dmsetup", &["create", "lun", "--uuid", &uuid, "--table", &table]);
    }

    /// Both are seen, as copies of each other, and are what the tools say. Gives them, by name.
    fn are_clones(&self, from: From) -> Vec<Value> {
        let mut disks = discovered();
        let id = Identity::vmware(7).canonical();
        disks.retain(|disk| disk["id"] == id);
        assert_eq!(disks.len(), 2, "{disks:#?}");
        for disk in &disks {
            agrees(disk, from);
            assert_eq!(disk["role"], "clone", "{disk:#}");
            assert!(disk["problems"][0].as_str().unwrap().contains("start multipathd"), "{disk:#}");
            let other = self.names().into_iter().find(|name| disk["name"] != **name).unwrap();
            assert!(disk["evidence"][0].as_str().unwrap().ends_with(&format!("identity as {other}")));
        }
        disks
    }
}

fn protect_add(service: &Service, disk: &str) -> Outcome {
    run(&["protect", "add", MACHINE, "--config", &service.config(), "--disk", disk])
}

#[test]
fn two_paths_are_clones_until_a_map_makes_them_one_without_udevd() {
    small().without_udev().run(|_| {
        let rig = Rig::new(&[]);
        let paths = TwoPaths::new(&rig.path("disk"));
        let listed = paths.are_clones(From::Sysfs);
        let id = Identity::vmware(7).canonical();
        for disk in [id.clone(), format!("/dev/{}", paths.names()[0])] {
            protect_add(&rig.service, &format!("root={disk}"))
                .fails(3, &["another disk has the same identity"]);
        }
        paths.map();
        let disks = discovered();
        let [map] = disks.as_slice() else { panic!("{disks:#?}") };
        assert_eq!((&map["name"], &map["id"]), (&"dm-0".into(), &id.as_str().into()));
        assert_eq!((&map["id_source"], &map["role"]), (&"sysfs".into(), &"free".into()));
        map_agrees(map, &listed, From::Sysfs);
        tool("dmsetup", &["remove", "lun"]);
        paths.are_clones(From::Sysfs);
    });
}

/// Its LUN comes back under another name, and nobody tells the map: what uses the map would go on with it.
#[test]
fn a_map_that_lost_its_paths_still_owns_its_disk() {
    small().without_udev().run(|_| {
        let rig = Rig::new(&[]);
        let paths = TwoPaths::new(&rig.path("disk"));
        paths.map();
        paths.paths.iter().for_each(Lun::delete);
        let again = Target::new().attach(0, &paths.store);
        let id = Identity::vmware(7).canonical();
        let disks = discovered();
        assert_eq!(disks.len(), 2, "{disks:#?}");
        let map = named(&disks, "dm-0");
        assert_eq!((&map["id"], &map["role"]), (&id.as_str().into(), &"in-use".into()), "{map:#}");
        let said = [
            "dm-0 is a multipath map that has no path left",
            &format!("dm-0 has the same identity as {}", again.name()),
        ];
        assert_eq!(map["evidence"], serde_json::json!(said));
        assert_eq!(named(&disks, &again.name())["role"], "clone", "{disks:#?}");
        protect_add(&rig.service, &format!("root=/dev/{}", again.name()))
            .fails(3, &["another disk has the same identity", "as dm-0"]);
        protect_add(&rig.service, &format!("root={id}")).fails(3, &["another disk has the same identity"]);
        protect_add(&rig.service, "root=/dev/dm-0").fails(3, &["no path left"]);
    });
}

#[test]
fn two_paths_are_one_disk_with_multipath_and_one_may_fail_while_it_is_written() {
    small().run(|_| {
        let rig = Rig::new(&[]);
        let disk = TwoPaths::new(&rig.path("disk"));
        settle();
        let listed = disk.are_clones(From::Udev);
        fs::write("/etc/multipath.conf", "defaults {\n find_multipaths no\n user_friendly_names no\n}\n")
            .unwrap();
        tool("modprobe", &["-a", "dm-multipath", "dm-service-time", "dm-round-robin"]);
        tool("multipath", &["-v2"]);
        settle();
        let id = Identity::vmware(7).canonical();
        let disks = discovered();
        let [map] = disks.as_slice() else { panic!("{disks:#?}") };
        assert_eq!(
            (&map["name"], &map["id"], &map["role"]),
            (&"dm-0".into(), &id.as_str().into(), &"free".into())
        );
        assert_eq!(map["problems"], serde_json::json!([]));
        map_agrees(map, &listed, From::Udev);

        // By any of its names, it is the map that is written; a path that fails takes nothing with it.
        let path = format!("root=/dev/{}", disk.names()[0]);
        let planned = protect_add(&rig.service, &path).ok();
        assert!(planned.stdout.contains("/dev/dm-0"), "{planned:#?}");
        let source = rig.random("source", 64 * MIB);
        let send = rig.start_into_pass(&[("root", &source)], &["--bwlimit", "24M"]);
        disk.paths[0].delete();
        send.finish().ok();
        rig.synchronized("root");
        assert_equal(&source, &rig.path("disk"));
        rig.service.wait_until_idle();

        // A path that joins later and is not in the map is another disk with this identity.
        let third = Target::new().attach(0, &disk.store);
        settle();
        let disks = discovered();
        assert_eq!(
            (&named(&disks, "dm-0")["role"], &named(&disks, &third.name())["role"]),
            (&"clone".into(), &"clone".into())
        );
        write_random(&source, 0, MIB);
        rig.send(&[("root", &source)], &[]).fails(3, &["its role is clone", &third.name()]);
    });
}
