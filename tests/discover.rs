//! Discovery over made trees, through the library and through the command.

#[path = "sysroot/tree.rs"]
mod tree;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use assert_cmd::Command;
use mt_agent::disk::discover::watch::compare;
use mt_agent::disk::discover::{self, Disk, FindError, IdSource, Options, Role, Sysroot};
use serde_json::json;
use tree::{GIB, LSI, PVSCSI, Scsi, Tree, VMWARE_A, VMWARE_B};

fn list(root: &Path, options: &Options) -> Vec<Disk> {
    discover::discover(&Sysroot::new(root), options).unwrap()
}

fn disks(tree: &Tree) -> Vec<Disk> {
    list(&tree.root, &Options { include_loop: true, ..Options::default() })
}

fn named<'a>(disks: &'a [Disk], name: &str) -> &'a Disk {
    disks.iter().find(|disk| disk.name == name).unwrap_or_else(|| panic!("{name} is not listed"))
}

fn id(disk: &Disk) -> Option<String> {
    disk.id.as_ref().map(ToString::to_string)
}

#[test]
fn a_vmware_vm_shows_its_uuids_on_either_adapter() {
    for adapter in [PVSCSI, LSI] {
        let dir = tempfile::tempdir().unwrap();
        let found = disks(&tree::vmware(dir.path(), adapter, true));
        assert_eq!(found.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), ["sda", "sdb"]);
        let [sda, sdb] = &found[..] else { unreachable!() };
        assert_eq!(id(sda), Some(format!("naa.{VMWARE_A}")));
        assert_eq!(id(sdb), Some(format!("naa.{VMWARE_B}")));
        assert_eq!(sdb.id_source, Some(IdSource::Sysfs));
        assert_eq!((sdb.hctl.as_deref(), sdb.size.0, sdb.role), (Some("0:0:1:0"), 100 * GIB, Role::Free));
        assert_eq!((sdb.vendor.as_deref(), sdb.model.as_deref()), (Some("VMware"), Some("Virtual disk")));
        assert_eq!(sdb.serial.as_deref(), Some(VMWARE_B));
        assert_eq!((&sdb.evidence, &sdb.problems), (&vec![], &vec![]));
        assert_eq!(sda.role, Role::System);
        assert_eq!(
            sda.evidence,
            [
                "sda1 is mounted on /boot",
                "sda2 is a physical volume of an active volume group: it carries dm-0 (centos-root)",
                "dm-0 (centos-root) on sda2 is mounted on /",
                "sda2 is a physical volume of an active volume group: it carries dm-1 (centos-swap)",
                "dm-1 (centos-swap) on sda2 is swap",
            ]
        );
    }
}

/// As on a kernel that does not read them.
fn without_pages(root: &Path, name: &str) {
    let device = std::fs::canonicalize(root.join(format!("sys/block/{name}/device"))).unwrap();
    for page in ["vpd_pg83", "vpd_pg80"] {
        std::fs::remove_file(device.join(page)).unwrap();
    }
}

/// What cannot be known does not speak for a disk.
#[test]
fn without_the_tables_of_mounts_and_swaps_no_disk_is_free() {
    for table in ["proc/self/mountinfo", "proc/swaps"] {
        let damages: [fn(&Tree, &str); 5] = [
            |tree, table| std::fs::remove_file(tree.root.join(table)).unwrap(),
            |tree, table| tree.write(table, ""),
            |tree, table| tree.write(table, "a line of something else\n"),
            |tree, table| tree.write(table, vec![b'x'; 17 << 20]),
            |tree, table| {
                // A pipe, which nobody ever writes to.
                std::fs::remove_file(tree.root.join(table)).unwrap();
                let mode = nix::sys::stat::Mode::S_IRWXU;
                nix::unistd::mkfifo(&tree.root.join(table), mode).unwrap();
            },
        ];
        for damage in damages {
            let dir = tempfile::tempdir().unwrap();
            let tree = tree::vmware(dir.path(), PVSCSI, true);
            damage(&tree, table);
            let found = disks(&tree);
            let sdb = named(&found, "sdb");
            assert_eq!(sdb.role, Role::InUse, "{table}");
            assert!(sdb.problems[0].contains(table) && sdb.evidence == sdb.problems, "{sdb:?}");
            assert!(mt_agent::disk::device::check_role(sdb).is_err());
        }
    }
    // A host with very many mounts is known all the same.
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, true);
    let table = tree.root.join("proc/self/mountinfo");
    let text = std::fs::read_to_string(&table).unwrap();
    let many = "40 1 0:50 / /run/many rw - tmpfs tmpfs rw\n".repeat(10_000);
    std::fs::write(&table, format!("{many}{text}")).unwrap();
    let found = disks(&tree);
    assert_eq!((named(&found, "sda").role, named(&found, "sdb").role), (Role::System, Role::Free));
    assert!(named(&found, "sda").evidence[0].contains("/boot"));
}

#[test]
fn udev_s_database_is_asked_where_the_kernel_has_no_pages_and_the_cut_wwn_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, true);
    without_pages(dir.path(), "sdb");
    tree.udev_vmware("8:16", VMWARE_B);
    // What a minimal VM may have: an entry without an identity.
    tree.udev("8:0", &[("ID_SCSI", "1"), ("ID_WWN", &format!("0x{}", &VMWARE_A[..16]))]);
    let found = disks(&tree);
    assert_eq!(
        (named(&found, "sda").id_source, named(&found, "sdb").id_source),
        (Some(IdSource::Sysfs), Some(IdSource::Udev))
    );
    assert_eq!(id(named(&found, "sda")), Some(format!("naa.{VMWARE_A}")));
    assert_eq!(id(named(&found, "sdb")), Some(format!("naa.{VMWARE_B}")));
    assert_eq!(named(&found, "sdb").serial.as_deref(), Some(VMWARE_B));
}

#[test]
fn the_kernel_is_believed_where_udev_still_has_the_disk_that_had_the_number_before() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, true);
    let before = disks(&tree);
    tree.udev_vmware("8:16", tree::SAN);
    assert_eq!(disks(&tree), before);
    // One that has only a serial is not the one either that has a better identity.
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::qemu_virtio_scsi(dir.path());
    let before = disks(&tree);
    for disk in &before {
        tree.udev_vmware(&disk.devno, tree::SAN);
    }
    assert_eq!(disks(&tree), before);
}

#[test]
fn what_is_found_does_not_depend_on_where_it_was_found() {
    // udev knows neither UUID designators nor SCSI names, and stores the T10 designator in their place.
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new(dir.path());
    let uuid = tree::hex("10001efe0ec16b2e4b779d612d2f4a4a9b01");
    tree.scsi(&Scsi {
        name: "sda",
        devno: "8:0",
        hctl: "0:0:0:0",
        adapter: PVSCSI,
        vendor: "ACME",
        model: "Array",
        revision: "1",
        size: GIB,
        page_83: Some(tree::page_83(&[(2, 1, b"ACME    lun 7"), (1, 0xa, &uuid)])),
        page_80: Some("lun 7"),
        wwid: None,
    });
    let without = disks(&tree);
    tree.udev("8:0", &[("ID_SCSI", "1"), ("ID_SERIAL", "1ACME_lun_7"), ("ID_SCSI_SERIAL", "lun_7")]);
    assert_eq!(id(&without[0]).as_deref(), Some("uuid.1efe0ec1-6b2e-4b77-9d61-2d2f4a4a9b01"));
    assert_eq!(without[0].serial.as_deref(), Some("lun 7"));
    assert_eq!(disks(&tree), without);
}

#[test]
fn a_vmware_vm_without_enableuuid_is_told_what_to_do() {
    for adapter in [PVSCSI, LSI] {
        let dir = tempfile::tempdir().unwrap();
        let found = disks(&tree::vmware(dir.path(), adapter, false));
        let (sda, sdb) = (named(&found, "sda"), named(&found, "sdb"));
        assert_eq!((sda.role, sdb.role), (Role::System, Role::NoUuid));
        for disk in [sda, sdb] {
            assert_eq!((&disk.id, disk.id_source), (&None, None));
            for word in ["disk.EnableUUID", "`TRUE`", "without quotes", "Power the VM off", "power it on"] {
                assert!(disk.problems[0].contains(word), "{:?} does not say {word}", disk.problems);
            }
        }
    }
}

#[test]
fn paths_under_multipath_are_one_disk_and_without_it_clones() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::multipath(dir.path());
    let found = disks(&tree);
    assert_eq!(found.len(), 1);
    let disk = &found[0];
    assert_eq!(
        (disk.name.as_str(), disk.node.to_str(), disk.devno.as_str()),
        ("dm-0", Some("/dev/dm-0"), "253:0")
    );
    assert_eq!(disk.paths, ["sdb", "sdc"]);
    assert_eq!(id(disk), Some(format!("naa.{}", tree::SAN)), "the port's NAA is not the disk's");
    assert_eq!((disk.role, &disk.evidence, &disk.problems), (Role::Free, &vec![], &vec![]));

    std::fs::remove_file(dir.path().join("sys/block/dm-0")).unwrap();
    for path in ["sdb", "sdc"] {
        std::fs::remove_file(dir.path().join(format!("sys/block/{path}/holders/dm-0"))).unwrap();
    }
    let found = disks(&tree);
    assert_eq!(found.iter().map(|disk| disk.role).collect::<Vec<_>>(), [Role::Clone, Role::Clone]);
    assert_eq!(found[0].evidence, ["sdb has the same identity as sdc"]);
    assert!(found[0].problems[0].contains("start multipathd"));
}

/// Until the map is loaded anew, the path that went stays a slave, of which nothing is left but the link.
#[test]
fn a_map_whose_first_path_went_is_still_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::multipath(dir.path());
    std::fs::remove_file(dir.path().join("sys/block/sdb")).unwrap();
    let found = disks(&tree);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), id(&found[0])), ("dm-0", Some(format!("naa.{}", tree::SAN))));
    assert_eq!((&found[0].paths, found[0].role), (&vec!["sdc".to_owned()], Role::Free));
}

#[test]
fn a_map_without_paths_still_owns_its_disk() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::multipath(dir.path());
    std::fs::remove_file(dir.path().join("sys/block/sdb")).unwrap();
    std::fs::remove_file(dir.path().join("sys/block/sdc")).unwrap();
    let found = disks(&tree);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), id(&found[0])), ("dm-0", Some(format!("naa.{}", tree::SAN))));
    assert_eq!((found[0].role, found[0].paths.len()), (Role::InUse, 0));
    assert_eq!(found[0].evidence, ["dm-0 is a multipath map that has no path left"]);
}

/// Such as the hidden path of an NVMe namespace: it has no identity, and does not hide the disk.
#[test]
fn a_map_whose_first_path_is_no_disk_by_its_name_is_still_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::multipath(dir.path());
    tree.other("ab", "250:0", 500 * GIB);
    tree.write("sys/block/dm-0/slaves/ab/dev", "250:0\n");
    let found = disks(&tree);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), id(&found[0])), ("dm-0", Some(format!("naa.{}", tree::SAN))));
    assert_eq!(
        (&found[0].paths[..], found[0].hctl.as_deref()),
        (&["ab", "sdb", "sdc"].map(str::to_owned)[..], Some("1:0:0:23"))
    );
    assert!(found[0].problems[0].contains("ab is a path of dm-0 and yet has another identity"));
}

#[test]
fn a_third_path_outside_the_map_is_a_clone() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::multipath(dir.path());
    let unit = tree::hex(tree::SAN);
    tree.scsi(&Scsi {
        name: "sdd",
        devno: "8:48",
        hctl: "3:0:0:23",
        adapter: PVSCSI,
        vendor: "DGC",
        model: "VRAID",
        revision: "0533",
        size: 500 * GIB,
        page_83: Some(tree::page_83(&[(1, 3, &unit)])),
        page_80: None,
        wwid: None,
    });
    let found = disks(&tree);
    assert_eq!((named(&found, "dm-0").role, named(&found, "sdd").role), (Role::Clone, Role::Clone));
    // And a path that is another disk is told.
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::multipath(dir.path());
    let page = tree::page_83(&[(1, 3, &tree::hex(VMWARE_A))]);
    let device = std::fs::canonicalize(dir.path().join("sys/block/sdc/device")).unwrap();
    std::fs::write(device.join("vpd_pg83"), page).unwrap();
    assert!(disks(&tree)[0].problems[0].contains("sdc is a path of dm-0 and yet has another identity"));
}

#[test]
fn qemu_sata_and_nvme_disks_have_their_identities() {
    let dir = tempfile::tempdir().unwrap();
    let found = disks(&tree::qemu_virtio_scsi(dir.path()));
    let all: Vec<_> = found.iter().map(|disk| (id(disk), disk.role)).collect();
    assert_eq!(all[0], (Some("naa.5000c50015ea71aa".to_owned()), Role::Free));
    assert_eq!(all[1], (Some("serial.QEMU_QEMU_HARDDISK_target-7".to_owned()), Role::Free));
    assert!(found[1].problems[0].contains("only a serial"));
    assert_eq!(all[2], (None, Role::NoUuid), "the name of a QEMU drive is no identity");
    assert!(found[2].problems[0].contains("wwn="));

    let dir = tempfile::tempdir().unwrap();
    let tree = tree::sata(dir.path());
    let found = disks(&tree);
    assert_eq!(id(&found[0]).as_deref(), Some("naa.50014ee2b1c2d3e4"));
    assert_eq!(id(&found[1]).as_deref(), Some("t10.ATA_QEMU_HARDDISK_QM00003"));
    // ata_id stores it without the vendor, and udev's entry gives the same disk.
    let ata = [("ID_ATA", "1"), ("ID_BUS", "ata")];
    let serial = [("ID_SERIAL", "QEMU_HARDDISK_QM00003"), ("ID_SERIAL_SHORT", "QM00003")];
    tree.udev("8:16", &[ata, serial].concat());
    without_pages(dir.path(), "sdb");
    let again = disks(&tree);
    assert_eq!((&again[1].id, again[1].id_source), (&found[1].id, Some(IdSource::Udev)));
    // Without a serial there is but the model in that place, which is no disk's.
    tree.udev("8:16", &[&ata[..], &[("ID_SERIAL", "QEMU_HARDDISK")]].concat());
    let model = disks(&tree).remove(1);
    assert_eq!((model.id, model.role), (None, Role::NoUuid));

    let dir = tempfile::tempdir().unwrap();
    let found = disks(&tree::nvme(dir.path()));
    let all: Vec<_> = found.iter().filter_map(id).collect();
    assert_eq!(all[..2], ["eui.002538ba11b2c3d4", "eui.6479a7ffff000001000c2999f2a3b4c5"]);
    assert_eq!(all[2], "uuid.1efe0ec1-6b2e-4b77-9d61-2d2f4a4a9b01");
    assert_eq!(all[3], "nvme.1b36-666f6f-51454d55204e564d65204374726c-00000001");
    assert_eq!(found[0].problems, Vec::<String>::new());
    assert!(found[3].problems[0].contains("only a serial"));
}

#[test]
fn the_kernel_s_wwid_serves_where_the_page_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::sata(dir.path());
    let device = std::fs::canonicalize(dir.path().join("sys/block/sda/device")).unwrap();
    std::fs::remove_file(device.join("vpd_pg83")).unwrap();
    let found = disks(&tree);
    assert_eq!(
        (id(&found[0]).as_deref(), found[0].id_source),
        (Some("naa.50014ee2b1c2d3e4"), Some(IdSource::Sysfs))
    );
    // A hostile page gives a problem and the next best identity.
    std::fs::write(device.join("vpd_pg83"), [0, 0x83, 0, 8, 1, 3, 0, 200, 1, 2, 3, 4]).unwrap();
    let found = disks(&tree);
    assert_eq!(id(&found[0]).as_deref(), Some("serial.ATA_WDC_WD10EZEX-08W_WD-WCC6Y0AB1CDE"));
    assert!(found[0].problems[0].contains("reaches past the end of the page"));
}

/// A disk with this page 0x83 and this serial.
fn presented(designators: &[(u8, u8, &[u8])], serial: Option<&str>) -> Disk {
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new(dir.path());
    tree.scsi(&Scsi {
        name: "sda",
        devno: "8:0",
        hctl: "0:0:0:0",
        adapter: PVSCSI,
        vendor: "VMware",
        model: "Array",
        revision: "1",
        size: GIB,
        page_83: Some(tree::page_83(designators)),
        page_80: serial,
        wwid: None,
    });
    disks(&tree).remove(0)
}

#[test]
fn a_name_that_nobody_gave_is_no_identity() {
    let zeros = tree::hex("5000000000000000");
    let next = presented(&[(1, 3, &zeros), (2, 1, b"ACME    lun 7")], None);
    assert_eq!((id(&next).as_deref(), next.role), (Some("t10.ACME_lun_7"), Role::Free));
    assert!(next.problems[0].contains("at byte 4 names no disk: it is a placeholder"), "{next:?}");
    let serial =
        presented(&[(1, 3, &tree::hex("5000c500ffffffff")), (1, 3, &tree::hex("5000c50fffffffff"))], None);
    assert_eq!(id(&serial).as_deref(), Some("naa.5000c500ffffffff"), "a maker may well come to that number");
    let none = presented(&[(1, 3, &zeros)], Some("0000-0000"));
    assert_eq!((id(&none), none.role, none.serial.as_deref()), (None, Role::NoUuid, Some("0000-0000")));
    let problems = none.problems.join("\n");
    for said in ["it is a placeholder", "its serial `0000-0000` is a placeholder", "is damaged or names none"]
    {
        assert!(problems.contains(said), "{problems}");
    }
    assert!(!problems.contains("EnableUUID"), "{problems}");

    // Where the kernel has no pages: its own word for the designator, and udev's.
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::sata(dir.path());
    without_pages(dir.path(), "sda");
    tree.write("sys/block/sda/device/wwid", "naa.5000000000000000\n");
    tree.udev(
        "8:0",
        &[
            ("ID_SCSI", "1"),
            ("ID_WWN_WITH_EXTENSION", "0x5000000000000000"),
            ("ID_SERIAL", "35000000000000000"),
        ],
    );
    let found = disks(&tree);
    assert_eq!((id(&found[0]), found[0].role), (None, Role::NoUuid));
    assert!(found[0].problems[0].contains("its wwid in sysfs: `naa.5000000000000000` is no disk identity"));
}

#[test]
fn what_is_told_of_a_disk_has_an_end() {
    let hostile = presented(&[(1, 3, &[][..]); 10_000], None);
    assert_eq!(hostile.role, Role::NoUuid);
    assert_eq!(hostile.problems.len(), 66);
    assert_eq!(hostile.problems[64], "and 9936 more");
    assert!(hostile.problems[65].starts_with("no UUID"));

    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, true);
    for at in 0..300 {
        tree.write(format!("sys/block/sdb/holders/thing{at}"), "");
    }
    let assigned = [(format!("naa.{VMWARE_B}").parse().unwrap(), "web".to_owned())].into();
    let found = list(dir.path(), &Options { assigned, ..Options::default() });
    let evidence = &named(&found, "sdb").evidence;
    assert_eq!(evidence.len(), 66);
    assert_eq!(
        evidence[63..],
        ["sdb is held by thing63", "and 236 more", "it is assigned to the machine web"]
    );
}

/// Each of many clones is told of a few others, and not of all.
/// What a rescan waits for.
#[test]
fn a_disk_is_settled_once_it_has_its_block_device() {
    let dir = tempfile::tempdir().unwrap();
    let sysroot = Sysroot::new(dir.path());
    let device = |name: &str, kind: &str, inquiry: u8| {
        let device = dir.path().join("sys/bus/scsi/devices").join(name);
        std::fs::create_dir_all(&device).unwrap();
        std::fs::write(device.join("type"), format!("{kind}\n")).unwrap();
        std::fs::write(device.join("inquiry"), [inquiry, 0]).unwrap();
        device
    };
    assert!(sysroot.is_settled());
    // A host, a tape, and a unit that is not connected, have none.
    std::fs::create_dir_all(dir.path().join("sys/bus/scsi/devices/host0")).unwrap();
    device("0:0:0:0", "1", 1);
    device("0:0:1:0", "0", 0x20);
    assert!(sysroot.is_settled());
    for (name, kind, inquiry) in [("0:0:2:0", "0", 0), ("0:0:3:0", "20", 0x14)] {
        let disk = device(name, kind, inquiry);
        assert!(!sysroot.is_settled(), "{name}");
        std::fs::create_dir(disk.join("block")).unwrap();
        assert!(sysroot.is_settled(), "{name}");
    }
}

#[test]
fn many_clones_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new(dir.path());
    for at in 0..200 {
        tree.loop_device(&format!("loop{at}"), &format!("7:{at}"), "/srv/a.img", GIB);
    }
    let found = disks(&tree);
    assert!(found.iter().all(|disk| disk.role == Role::Clone));
    let shown = "loop1, loop2, loop3, loop4, loop5, loop6, loop7, loop8 and 191 more";
    assert_eq!(named(&found, "loop0").evidence, [format!("loop0 has the same identity as {shown}")]);
    let shown = shown.replace("loop1,", "loop0, loop1,").replace(", loop8", "");
    for name in ["loop8", "loop9", "loop199"] {
        assert_eq!(named(&found, name).evidence, [format!("{name} has the same identity as {shown}")]);
    }
    assert!(named(&found, "loop199").problems[0].starts_with(&shown));

    let unread = (0..200).map(|at| format!("file {at}")).collect();
    let tree = tree::vmware(&dir.path().join("unread"), PVSCSI, true);
    let found = list(&tree.root, &Options { unread, ..Options::default() });
    let why = &named(&found, "sdb").problems[0];
    assert!(
        why.ends_with("file 0; file 1; file 2; file 3; file 4; file 5; file 6; file 7 and 192 more"),
        "{why}"
    );
}

#[test]
fn a_holder_counts_whatever_its_name_is() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, true);
    let holders = tree.root.join("sys/block/sdb/holders");
    std::fs::write(holders.join(std::ffi::OsStr::from_bytes(b"th\xffng")), "").unwrap();
    let found = disks(&tree);
    let sdb = named(&found, "sdb");
    assert_eq!((sdb.role, &sdb.evidence[..]), (Role::InUse, &["sdb is held by th\u{fffd}ng".to_owned()][..]));
}

#[test]
fn this_machine_is_known_however_its_root_is_spelled() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("root");
    std::os::unix::fs::symlink("/", &link).unwrap();
    for root in [Path::new("/"), Path::new("//"), Path::new("/.."), Path::new("/proc/../.."), &link] {
        let sysroot = Sysroot::new(root);
        assert!(sysroot.is_live(), "{}", root.display());
        assert_eq!(sysroot, Sysroot::default());
    }
    for root in [dir.path(), &dir.path().join("nowhere"), Path::new("/proc")] {
        assert!(!Sysroot::new(root).is_live(), "{}", root.display());
    }
}

/// The advice for a setting that is missing is not given where the page is there and broken.
#[test]
fn a_damaged_page_is_not_taken_for_a_missing_setting() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, false);
    let device = std::fs::canonicalize(dir.path().join("sys/block/sdb/device")).unwrap();
    for page in [&[0, 0x83, 0, 8, 1, 3, 0, 200, 1, 2, 3, 4][..], &[0, 0x83, 1]] {
        std::fs::write(device.join("vpd_pg83"), page).unwrap();
        let found = disks(&tree);
        let problems = named(&found, "sdb").problems.join("; ");
        assert_eq!(named(&found, "sdb").role, Role::NoUuid);
        assert!(problems.contains("VPD page 0x83") && problems.contains("is damaged"), "{problems}");
        assert!(!problems.contains("EnableUUID"), "{problems}");
        assert!(named(&found, "sda").problems.join("; ").contains("EnableUUID"));
    }
}

#[test]
fn roles_are_found_through_partitions_dm_and_md() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::many(dir.path(), 9);
    // a: an md member in a partition, whose array carries a crypt device that is mounted.
    let a = tree.partition("sda", 1, "8:1", GIB);
    let b = tree.partition("sdb", 1, "8:17", GIB);
    tree.md("md127", "9:127", "raid1", GIB, &[&a, &b]);
    tree.dm("dm-7", "253:7", "secret", "CRYPT-LUKS2-abc-secret", GIB, &["md127"]);
    tree.mount("253:7", r"/srv/my\040data", "/dev/mapper/secret");
    // c: held, and not mounted.
    tree.dm("dm-8", "253:8", "thing", "thing", GIB, &["sdc"]);
    // d: swap on the whole disk. e: partitions that nobody uses.
    tree.swap("/dev/sdd");
    tree.partition("sde", 1, "8:65", GIB);
    // i: a partition that a loop device shows, and that one by another.
    let i = tree.partition("sdi", 1, "8:129", GIB);
    tree.loop_device("loop4", "7:4", &format!("/dev/{i}"), GIB);
    tree.loop_device("loop5", "7:5", "/dev/loop4", GIB);
    // f: the retention. g: btrfs, which has a device number of its own; h is its second member.
    tree.mount("8:80", "/var/lib/mt-agent/retention", "/dev/sdf");
    tree.mount("0:44", "/pool", "/dev/sdg");
    tree.write("sys/fs/btrfs/0b1c/devices/sdg/dev", "8:96\n");
    tree.write("sys/fs/btrfs/0b1c/devices/sdh/dev", "8:112\n");
    let retention = Some("/var/lib/mt-agent/retention/journal".into());
    let found = list(dir.path(), &Options { retention, ..Options::default() });
    let role = |name| named(&found, name).role;
    assert_eq!(role("sda"), Role::System);
    assert_eq!(
        named(&found, "sda").evidence,
        [
            "sda1 is a member of md127 (raid1)",
            "md127 (raid1) on sda1 is unlocked by dm-crypt as dm-7 (secret)",
            "dm-7 (secret) on md127 (raid1) on sda1 is mounted on /srv/my data",
        ]
    );
    assert_eq!(role("sdb"), Role::System);
    assert_eq!(
        (role("sdc"), named(&found, "sdc").evidence[0].as_str()),
        (Role::InUse, "sdc is held by dm-8 (thing)")
    );
    assert_eq!((role("sdd"), named(&found, "sdd").evidence[0].as_str()), (Role::System, "sdd is swap"));
    assert_eq!(role("sde"), Role::Free);
    assert_eq!(role("sdf"), Role::Retention);
    assert!(
        named(&found, "sdf").evidence[0].ends_with("/var/lib/mt-agent/retention, which holds the retention")
    );
    assert_eq!((role("sdg"), role("sdh"), role("sdi")), (Role::System, Role::System, Role::InUse));
    let shown = ["sdi1 is shown by the loop device loop4", "loop4 on sdi1 is shown by the loop device loop5"];
    assert_eq!(named(&found, "sdi").evidence, shown);
    tree.mount("7:5", "/mnt", "/dev/loop5");
    let found = disks(&tree);
    assert_eq!(named(&found, "sdi").role, Role::System);
    assert_eq!(named(&found, "sdi").evidence[2], "loop5 on loop4 on sdi1 is mounted on /mnt");
    assert_eq!(named(&found, "sdh").evidence, ["sdh belongs to the mounted btrfs 0b1c"]);
    // Without being told of the retention it is a mount like any other.
    assert_eq!(named(&disks(&tree), "sdf").role, Role::System);
}

#[test]
fn an_assignment_yields_to_what_speaks_against_it_and_keeps_its_evidence() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, true);
    tree.loop_device("loop0", "7:0", "/srv/a.img", GIB);
    tree.loop_device("loop1", "7:1", "/srv/a.img", GIB);
    tree.loop_device("loop2", "7:2", "/srv/b.img", GIB);
    tree.loop_device("loop3", "7:3", "", 0);
    let assigned: BTreeMap<_, _> =
        [&format!("naa.{VMWARE_A}"), &format!("naa.{VMWARE_B}"), "loop:/srv/a.img"]
            .map(|id| (id.parse().unwrap(), "web".to_owned()))
            .into();
    let found = list(dir.path(), &Options { include_loop: true, assigned, ..Options::default() });
    let roles: Vec<_> = found.iter().map(|disk| (disk.name.as_str(), disk.role)).collect();
    assert_eq!(
        roles,
        [
            ("sda", Role::System),
            ("sdb", Role::Assigned),
            ("loop0", Role::Clone),
            ("loop1", Role::Clone),
            ("loop2", Role::Free)
        ]
    );
    for disk in &found[..4] {
        assert_eq!(disk.evidence.last().unwrap(), "it is assigned to the machine web", "{}", disk.name);
    }
    assert!(list(dir.path(), &Options::default()).iter().all(|disk| !disk.name.starts_with("loop")));
}

#[test]
fn an_administrator_finds_a_disk_by_any_spelling_and_by_its_dev_name() {
    let dir = tempfile::tempdir().unwrap();
    let found = disks(&tree::vmware(dir.path(), PVSCSI, true));
    for text in [format!("wwn-0x{VMWARE_B}"), VMWARE_B.to_uppercase(), "/dev/sdb".to_owned()] {
        assert_eq!(discover::find(&found, &text).unwrap().name, "sdb", "{text}");
    }
    assert!(matches!(discover::find(&found, "/dev/sdz"), Err(FindError::Missing(_))));
    assert!(matches!(discover::find(&found, "naa.5000c500a1b2c3d4"), Err(FindError::Missing(_))));
    assert!(matches!(discover::find(&found, "sdb"), Err(FindError::Parse(_))));
    let dir = tempfile::tempdir().unwrap();
    let found = disks(&tree::vmware(dir.path(), PVSCSI, false));
    let error = discover::find(&found, "/dev/sdb").unwrap_err();
    assert!(error.to_string().contains("disk.EnableUUID"), "{error}");
}

#[test]
fn a_disk_that_is_going_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, true);
    // Its size is taken first, and would be seen as a change.
    tree.write("sys/block/sdb/size", "0\n");
    for (state, listed) in [("running", 2), ("offline", 2), ("cancel", 1), ("deleted", 1)] {
        tree.write("sys/block/sdb/device/state", format!("{state}\n"));
        assert_eq!(disks(&tree).len(), listed, "{state}");
    }
    for (attribute, listed) in [("state", 2), ("type", 1)] {
        std::fs::remove_file(dir.path().join("sys/block/sdb/device").join(attribute)).unwrap();
        assert_eq!(disks(&tree).len(), listed, "{attribute}");
    }
}

#[test]
fn a_disk_that_lost_its_size_is_not_a_smaller_one() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, true);
    let sized = |sectors: &str| {
        tree.write("sys/block/sdb/size", sectors);
        disks(&tree)
    };
    let (small, large, none) = (sized("2048\n"), sized("4096\n"), sized("0\n"));
    let event = |before: &[Disk], after: &[Disk]| {
        let changes = serde_json::to_value(compare(before, after)).unwrap();
        assert_eq!(changes.as_array().unwrap().len(), 1);
        changes[0]["event"].as_str().unwrap().to_owned()
    };
    assert_eq!((event(&small, &large), event(&large, &small)), ("resized".to_owned(), "resized".to_owned()));
    assert_eq!((event(&large, &none), event(&none, &large)), ("changed".to_owned(), "changed".to_owned()));
    // Nor one that could be used.
    let roles = [&large, &none].map(|disks| disks.iter().find(|disk| disk.name == "sdb").unwrap().role);
    assert_eq!(roles, [Role::Free, Role::Unknown]);
}

#[test]
fn another_disk_without_identity_in_the_place_of_one_is_another() {
    let dir = tempfile::tempdir().unwrap();
    let events = |tree: &Tree| {
        let numbered = |number: &str| {
            tree.write("sys/block/sdb/diskseq", number);
            disks(tree)
        };
        let (one, again, other) = (numbered("7\n"), numbered("7\n"), numbered("9\n"));
        assert_eq!(compare(&one, &again), []);
        let changes = serde_json::to_value(compare(&one, &other)).unwrap();
        let changes = changes.as_array().unwrap().clone();
        Vec::from_iter(
            changes.into_iter().map(|change| (change["event"].clone(), change["disk"]["name"].clone())),
        )
    };
    let seen = |names: &[&str]| Vec::from_iter(names.iter().map(|name| (json!(name), json!("sdb"))));
    let without = tree::vmware(&dir.path().join("without"), PVSCSI, false);
    assert_eq!(events(&without), seen(&["detached", "attached"]));
    // By its identity it is the same one, on whatever occasion it was found again.
    let with = tree::vmware(&dir.path().join("with"), PVSCSI, true);
    assert_eq!(events(&with), seen(&["changed"]));
}

#[test]
fn rescan_asks_every_disk_and_every_host() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::multipath(dir.path());
    assert_eq!(Sysroot::new(&tree.root).rescan().unwrap(), 2);
    for host in ["host1", "host2"] {
        let path = tree.root.join(format!("sys/class/scsi_host/{host}/scan"));
        assert_eq!(std::fs::read_to_string(path).unwrap(), "- - -");
    }
    for disk in ["sdb", "sdc"] {
        let path = tree.root.join(format!("sys/block/{disk}/device/rescan"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1");
        // One that went meanwhile does no harm.
        std::fs::remove_file(path).unwrap();
        assert_eq!(Sysroot::new(&tree.root).rescan().unwrap(), 2);
    }
}

fn command(root: &Path) -> Command {
    let mut command = Command::cargo_bin("mt-agent").unwrap();
    command.arg("discover-disks").arg("--sysroot").arg(root);
    command
}

#[test]
fn the_command_lists_and_requires_uuids() {
    let dir = tempfile::tempdir().unwrap();
    tree::vmware(dir.path(), PVSCSI, true);
    let output = command(dir.path()).arg("--require-uuid").assert().success().get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<Vec<&str>> = text.lines().take(3).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        rows[0],
        "IDENTITY NAME H:C:T:L SIZE VENDOR AND MODEL ROLE PROBLEMS".split(' ').collect::<Vec<_>>()
    );
    let b = format!("naa.{VMWARE_B}");
    assert_eq!(rows[2], [&b, "sdb", "0:0:1:0", "100.0", "GiB", "VMware", "Virtual", "disk", "free", "none"]);

    let dir = tempfile::tempdir().unwrap();
    tree::vmware(dir.path(), LSI, false);
    command(dir.path()).assert().success();
    let output = command(dir.path()).arg("--require-uuid").assert().code(3).get_output().clone();
    assert!(String::from_utf8(output.stdout).unwrap().contains("disk.EnableUUID"));
    assert!(String::from_utf8(output.stderr).unwrap().contains("2 disks are without a UUID: sda, sdb"));
}

#[test]
fn no_name_does_anything_to_the_terminal_or_to_the_table() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree::vmware(dir.path(), PVSCSI, true);
    let device = tree.root.join("sys/block/sdb/device");
    std::fs::remove_file(device.join("inquiry")).unwrap();
    tree.write("sys/block/sdb/device/vendor", "\u{1b}[2J\n");
    tree.write("sys/block/sdb/device/model", "a\u{9b}b\rc\n");
    tree.write("sys/block/sdb/holders/\u{1b}c", "");
    let shown = |dir: &Path| {
        let output = command(dir).assert().success().get_output().clone();
        String::from_utf8(output.stdout).unwrap()
    };
    let text = shown(dir.path());
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    assert!(text.contains(r"sdb is held by \u{1b}c"), "{text}");
    let at = |line: usize, what: &str| text.lines().nth(line).unwrap().find(what).unwrap();
    assert_eq!((at(0, "ROLE"), at(0, "VENDOR")), (at(2, "in-use"), at(2, r"\u{1b}[2J a\u{9b}b\rc")));
    // The widest column that the formatting takes has 65,535 characters.
    tree.write("sys/block/sdb/device/model", "x".repeat(100_000));
    let text = shown(dir.path());
    assert!(text.lines().nth(2).unwrap().contains("xxx…  in-use"), "{}", text.len());
    assert!(text.len() < 100_000);
}

#[test]
fn the_json_has_its_shape() {
    let dir = tempfile::tempdir().unwrap();
    tree::vmware(dir.path(), PVSCSI, true);
    let output = command(dir.path()).arg("--json").assert().success().get_output().clone();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["schema_version"], 1);
    assert_eq!(
        json["disks"][1],
        serde_json::json!({
            "id": format!("naa.{VMWARE_B}"), "id_source": "sysfs", "name": "sdb", "node": "/dev/sdb",
            "devno": "8:16", "hctl": "0:0:1:0", "size": 100 * GIB, "logical_sector": 512, "physical_sector": 512,
            "vendor": "VMware", "model": "Virtual disk", "serial": VMWARE_B, "read_only": false, "paths": ["sdb"],
            "role": "free", "evidence": [], "problems": [],
        })
    );
}

/// Where their file system is not mounted, what `setup apply` recorded still tells that there are some.
#[test]
fn protections_that_are_not_there_are_missed_by_what_was_set_up() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("mt-agent.toml");
    std::fs::write(&config, "").unwrap();
    let missed = || {
        let mut command = Command::cargo_bin("mt-agent").unwrap();
        command.arg("discover-disks").arg("--config").arg(&config);
        let output = command.arg("--state-dir").arg(dir.path().join("state")).assert().success();
        let said = String::from_utf8(output.get_output().stderr.clone()).unwrap();
        said.contains("state/retention holds no protections any more; mount the retention file system")
    };
    assert!(!missed(), "nothing was ever assigned");
    let records = dir.path().join("state-setup/lvm");
    std::fs::create_dir_all(&records).unwrap();
    for dir in [records.parent().unwrap(), &records] {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    }
    let record = |disks: usize| {
        let record = json!({
            "schema_version": 1, "state": "applied", "version": "", "time": "2026-03-01T10:00:00Z", "boot": null,
            "reboot": false, "disks": disks, "files": [], "dirs": [], "calls": [],
        });
        std::fs::write(records.join("record.json"), record.to_string()).unwrap();
    };
    record(0);
    assert!(!missed());
    record(2);
    assert!(missed());
    std::fs::create_dir_all(dir.path().join("state/retention/machines")).unwrap();
    assert!(!missed());
}

#[test]
fn what_cannot_be_done_is_said_and_has_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let output = command(&dir.path().join("nowhere")).assert().code(1).get_output().clone();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("sys/block") && text.contains("No such file"), "{text}");
    command(dir.path()).arg("--watch").assert().code(2);
    command(dir.path()).arg("--rescan").assert().code(2);
}

#[test]
fn disks_of_a_big_target_are_listed_quickly() {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let dir = tempfile::tempdir().unwrap();
    tree::many(dir.path(), 256);
    let cpu = || {
        let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
        (usage.user_time() + usage.system_time()).num_milliseconds()
    };
    let before = cpu();
    let found = list(dir.path(), &Options::default());
    let spent = cpu() - before;
    assert_eq!(found.len(), 256);
    assert!(found.iter().all(|disk| disk.role == Role::Free && disk.id_source == Some(IdSource::Sysfs)));
    // 100 ms are asked of the release build; this bound only catches what is out of proportion.
    assert!(spent < 500, "{spent} ms of CPU for 256 disks");
    eprintln!("{spent} ms of CPU for 256 disks");
}
