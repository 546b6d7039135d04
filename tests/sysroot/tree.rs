//! Makes trees of `sys`, `proc` and `run/udev` as discovery reads them.
//!
//! MADE, NOT RECORDED: these trees are written from public facts (the kernel's ABI documents, udev's rules,
//! SPC-5, vendors' knowledge bases), with the attributes that discovery and `lsblk` look at. Identities are
//! invented within the ranges of their vendors.

#![allow(dead_code)] // each user of this file takes its part

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// A tree under a directory that exists.
pub struct Tree {
    pub root: PathBuf,
}

/// A SCSI disk of a tree.
#[derive(Clone)]
pub struct Scsi<'a> {
    pub name: &'a str,
    pub devno: &'a str,
    pub hctl: &'a str,
    /// The way to the host under `sys/devices`.
    pub adapter: &'a str,
    pub vendor: &'a str,
    pub model: &'a str,
    pub revision: &'a str,
    pub size: u64,
    pub page_83: Option<Vec<u8>>,
    pub page_80: Option<&'a str>,
    pub wwid: Option<&'a str>,
}

pub const GIB: u64 = 1 << 30;

/// Page 0x83 of designators: code set (with the protocol), association and type, bytes.
pub fn page_83(designators: &[(u8, u8, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (codes, types, bytes) in designators {
        body.extend([*codes, *types, 0, u8::try_from(bytes.len()).unwrap()]);
        body.extend(*bytes);
    }
    let mut page = vec![0, 0x83];
    page.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
    page.extend(body);
    page
}

/// Bytes of hexadecimal digits.
pub fn hex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

impl Tree {
    pub fn new(root: impl Into<PathBuf>) -> Tree {
        let tree = Tree { root: root.into() };
        for dir in ["sys/block", "sys/class/block", "sys/dev/block", "proc/self", "run/udev/data"] {
            fs::create_dir_all(tree.root.join(dir)).unwrap();
        }
        tree.write("proc/self/mountinfo", "22 1 0:21 / /proc rw - proc proc rw\n");
        tree.write("proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n");
        tree
    }

    pub fn write(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn append(&self, path: &str, line: &str) {
        let text = fs::read_to_string(self.root.join(path)).unwrap();
        self.write(path, format!("{text}{line}\n"));
    }

    /// A block device at `sys/<dir>`, with its three links.
    fn block(&self, dir: &str, name: &str, devno: &str, size: u64) {
        let sys = format!("sys/{dir}");
        let (major, minor) = devno.split_once(':').unwrap();
        let file = |path: &str, content: &str| self.write(format!("{sys}/{path}"), format!("{content}\n"));
        file("dev", devno);
        file("size", &(size / 512).to_string());
        file("ro", "0");
        file("removable", "0");
        file("uevent", &format!("MAJOR={major}\nMINOR={minor}\nDEVNAME={name}\nDEVTYPE=disk"));
        fs::create_dir_all(self.root.join(format!("{sys}/holders"))).unwrap();
        fs::create_dir_all(self.root.join(format!("{sys}/slaves"))).unwrap();
        symlink(format!("../../{dir}"), self.root.join(format!("sys/class/block/{name}"))).unwrap();
        symlink(format!("../../{dir}"), self.root.join(format!("sys/dev/block/{devno}"))).unwrap();
    }

    fn disk(&self, dir: &str, name: &str, devno: &str, size: u64) {
        self.block(dir, name, devno, size);
        self.write(format!("sys/{dir}/queue/logical_block_size"), "512\n");
        self.write(format!("sys/{dir}/queue/physical_block_size"), "512\n");
        symlink(format!("../{dir}"), self.root.join(format!("sys/block/{name}"))).unwrap();
    }

    pub fn scsi(&self, disk: &Scsi) {
        let host = disk.hctl.split(':').next().unwrap();
        let target = disk.hctl.rsplit_once(':').unwrap().0;
        let device = format!("devices/{}/host{host}/target{target}/{}", disk.adapter, disk.hctl);
        self.disk(&format!("{device}/block/{}", disk.name), disk.name, disk.devno, disk.size);
        let file = |path: &str, content: &[u8]| self.write(format!("sys/{device}/{path}"), content);
        file("state", b"running\n");
        let mut inquiry = vec![0u8, 0, 6, 2, 31, 0, 0, 0];
        inquiry.extend(format!("{:<8}{:<16}{:<4}", disk.vendor, disk.model, disk.revision).into_bytes());
        file("inquiry", &inquiry);
        file("vendor", format!("{:<8}\n", disk.vendor).as_bytes());
        file("model", format!("{:<16}\n", disk.model).as_bytes());
        file("rev", format!("{:<4}\n", disk.revision).as_bytes());
        file("type", b"0\n");
        file("rescan", b"");
        if let Some(page) = &disk.page_83 {
            file("vpd_pg83", page);
        }
        if let Some(serial) = disk.page_80 {
            let len = u8::try_from(serial.len()).unwrap();
            file("vpd_pg80", &[&[0, 0x80, 0, len], serial.as_bytes()].concat());
        }
        if let Some(wwid) = disk.wwid {
            file("wwid", format!("{wwid}\n").as_bytes());
        }
        symlink(
            format!("../../../{}", disk.hctl),
            self.root.join(format!("sys/{device}/block/{}/device", disk.name)),
        )
        .unwrap();
        let host_dir = self.root.join(format!("sys/class/scsi_host/host{host}"));
        fs::create_dir_all(&host_dir).unwrap();
        fs::write(host_dir.join("scan"), "").unwrap();
    }

    pub fn nvme(&self, name: &str, devno: &str, model: &str, serial: &str, wwid: &str, size: u64) {
        let (controller, _) = name.rsplit_once('n').unwrap();
        let device = format!("devices/pci0000:00/0000:00:1d.0/0000:03:00.0/nvme/{controller}");
        self.disk(&format!("{device}/{name}"), name, devno, size);
        self.write(format!("sys/{device}/model"), format!("{model:<40}\n"));
        self.write(format!("sys/{device}/serial"), format!("{serial:<20}\n"));
        self.write(format!("sys/{device}/{name}/wwid"), format!("{wwid}\n"));
        symlink(format!("../../{controller}"), self.root.join(format!("sys/{device}/{name}/device")))
            .unwrap();
    }

    pub fn virtio(&self, name: &str, devno: &str, serial: &str, size: u64) {
        let device = "devices/pci0000:00/0000:00:04.0/virtio1";
        self.disk(&format!("{device}/block/{name}"), name, devno, size);
        // The kernel writes no newline here.
        self.write(format!("sys/{device}/block/{name}/serial"), serial);
        symlink("../../../virtio1", self.root.join(format!("sys/{device}/block/{name}/device"))).unwrap();
    }

    pub fn loop_device(&self, name: &str, devno: &str, file: &str, size: u64) {
        let dir = format!("devices/virtual/block/{name}");
        self.disk(&dir, name, devno, size);
        if !file.is_empty() {
            self.write(format!("sys/{dir}/loop/backing_file"), format!("{file}\n"));
        }
    }

    /// A device such as dm-0, md127, zram0 or sr0.
    pub fn other(&self, name: &str, devno: &str, size: u64) {
        self.disk(&format!("devices/virtual/block/{name}"), name, devno, size);
    }

    /// A device-mapper device on other block devices, disks or partitions.
    pub fn dm(&self, name: &str, devno: &str, map: &str, uuid: &str, size: u64, on: &[&str]) {
        self.other(name, devno, size);
        self.write(format!("sys/block/{name}/dm/name"), format!("{map}\n"));
        self.write(format!("sys/block/{name}/dm/uuid"), format!("{uuid}\n"));
        self.stack(name, on);
    }

    /// An md array on other block devices.
    pub fn md(&self, name: &str, devno: &str, level: &str, size: u64, on: &[&str]) {
        self.other(name, devno, size);
        self.write(format!("sys/block/{name}/md/level"), format!("{level}\n"));
        self.stack(name, on);
    }

    fn stack(&self, name: &str, on: &[&str]) {
        for below in on {
            // Only the names of these links are looked at; that they lead somewhere is for lsblk.
            let holders = self.root.join(format!("sys/class/block/{below}/holders"));
            symlink(self.root.join(format!("sys/class/block/{name}")), holders.join(name)).unwrap();
            let slaves = self.root.join(format!("sys/class/block/{name}/slaves"));
            symlink(self.root.join(format!("sys/class/block/{below}")), slaves.join(below)).unwrap();
        }
    }

    /// A partition of a disk: `sda` and 2 give `sda2`, `nvme0n1` and 2 give `nvme0n1p2`.
    pub fn partition(&self, disk: &str, number: u32, devno: &str, size: u64) -> String {
        let p = if disk.ends_with(|c: char| c.is_ascii_digit()) { "p" } else { "" };
        let name = format!("{disk}{p}{number}");
        let dir = fs::canonicalize(self.root.join(format!("sys/block/{disk}"))).unwrap();
        let sys = fs::canonicalize(self.root.join("sys")).unwrap();
        let dir = format!("{}/{name}", dir.strip_prefix(sys).unwrap().display());
        self.block(&dir, &name, devno, size);
        self.write(format!("sys/{dir}/partition"), format!("{number}\n"));
        name
    }

    pub fn mount(&self, devno: &str, point: &str, source: &str) {
        self.append(
            "proc/self/mountinfo",
            &format!("40 1 {devno} / {point} rw,relatime shared:1 - ext4 {source} rw"),
        );
    }

    pub fn swap(&self, path: &str) {
        self.append(
            "proc/swaps",
            &format!("{path}                               partition\t2097148\t\t0\t\t-2"),
        );
    }

    pub fn udev(&self, devno: &str, properties: &[(&str, &str)]) {
        let lines: String = properties.iter().map(|(key, value)| format!("E:{key}={value}\n")).collect();
        self.write(format!("run/udev/data/b{devno}"), format!("I:1234567\n{lines}G:systemd\nV:1\n"));
    }

    /// What udev stores of a VMware disk that has a UUID.
    pub fn udev_vmware(&self, devno: &str, digits: &str) {
        self.udev(
            devno,
            &[
                ("ID_SCSI", "1"),
                ("ID_VENDOR", "VMware"),
                ("ID_MODEL", "Virtual_disk"),
                ("ID_SERIAL", &format!("3{digits}")),
                ("ID_SERIAL_SHORT", digits),
                ("ID_WWN", &format!("0x{}", &digits[..16])),
                ("ID_WWN_VENDOR_EXTENSION", &format!("0x{}", &digits[16..])),
                ("ID_WWN_WITH_EXTENSION", &format!("0x{digits}")),
                ("ID_SCSI_SERIAL", digits),
            ],
        );
    }
}

/// The adapters of the trees.
pub const PVSCSI: &str = "pci0000:00/0000:00:15.0/0000:03:00.0";
pub const LSI: &str = "pci0000:00/0000:00:10.0";
pub const VIRTIO_SCSI: &str = "pci0000:00/0000:00:05.0/virtio2";
pub const AHCI: &str = "pci0000:00/0000:00:1f.2/ata1";

pub const VMWARE_A: &str = "6000c2939d1a4b0f8e2d7c6b5a493827";
pub const VMWARE_B: &str = "6000c29a1f2e3d4c5b6a798897a6b5c4";

/// A VMware VM with a system disk (LVM, as the installer lays it out) and an empty disk, on a PVSCSI or an LSI
/// Logic adapter. Without `disk.EnableUUID` neither VPD page is there.
pub fn vmware(root: &Path, adapter: &str, enable_uuid: bool) -> Tree {
    let tree = Tree::new(root);
    let revision = if adapter == PVSCSI { "2.0" } else { "1.0" };
    for (name, devno, hctl, digits, size) in
        [("sda", "8:0", "0:0:0:0", VMWARE_A, 40 * GIB), ("sdb", "8:16", "0:0:1:0", VMWARE_B, 100 * GIB)]
    {
        let bytes = hex(digits);
        tree.scsi(&Scsi {
            name,
            devno,
            hctl,
            adapter,
            vendor: "VMware",
            model: "Virtual disk",
            revision,
            size,
            page_83: enable_uuid.then(|| page_83(&[(1, 3, &bytes)])),
            page_80: enable_uuid.then_some(digits),
            wwid: None,
        });
    }
    let boot = tree.partition("sda", 1, "8:1", GIB);
    let pv = tree.partition("sda", 2, "8:2", 39 * GIB);
    tree.dm("dm-0", "253:0", "centos-root", "LVM-abcdefroot", 35 * GIB, &[&pv]);
    tree.dm("dm-1", "253:1", "centos-swap", "LVM-abcdefswap", 4 * GIB, &[&pv]);
    tree.other("sr0", "11:0", 0);
    tree.other("zram0", "252:0", 0);
    tree.mount("253:0", "/", "/dev/mapper/centos-root");
    tree.mount("8:1", "/boot", &format!("/dev/{boot}"));
    tree.swap("/dev/dm-1");
    tree
}

pub const SAN: &str = "600601609460280018f1a2b3c4d5e6f7";

/// A LUN of an array that two FC hosts see, made one by multipath.
pub fn multipath(root: &Path) -> Tree {
    let tree = Tree::new(root);
    for (name, devno, hctl, port) in
        [("sdb", "8:16", "1:0:0:23", "5006016044602a1b"), ("sdc", "8:32", "2:0:1:23", "5006016844602a1b")]
    {
        let (unit, port) = (hex(SAN), hex(port));
        tree.scsi(&Scsi {
            name,
            devno,
            hctl,
            adapter: "pci0000:00/0000:00:03.0/0000:05:00.0",
            vendor: "DGC",
            model: "VRAID",
            revision: "0533",
            size: 500 * GIB,
            // The port comes first: it must not be taken for the disk.
            page_83: Some(page_83(&[(0x01, 0x93, &port), (0x01, 0x94, &[0, 0, 0, 4]), (1, 3, &unit)])),
            page_80: Some("APM00123456789"),
            wwid: Some("naa.600601609460280018f1a2b3c4d5e6f7"),
        });
    }
    tree.dm("dm-0", "253:0", "mpatha", &format!("mpath-3{SAN}"), 500 * GIB, &["sdb", "sdc"]);
    tree
}

/// QEMU's virtio-scsi: a disk with `wwn=`, one with only `serial=`, and one with neither.
pub fn qemu_virtio_scsi(root: &Path) -> Tree {
    let tree = Tree::new(root);
    let wwn = hex("5000c50015ea71aa");
    let disk = Scsi {
        name: "sda",
        devno: "8:0",
        hctl: "2:0:0:0",
        adapter: VIRTIO_SCSI,
        vendor: "QEMU",
        model: "QEMU HARDDISK",
        revision: "2.5+",
        size: 10 * GIB,
        page_83: Some(page_83(&[(2, 0, b"drive-scsi0-0-0-0"), (1, 3, &wwn)])),
        page_80: None,
        wwid: None,
    };
    tree.scsi(&disk);
    tree.scsi(&Scsi {
        name: "sdb",
        devno: "8:16",
        hctl: "2:0:0:1",
        page_83: Some(page_83(&[(2, 0, b"target-7")])),
        page_80: Some("target-7"),
        ..disk.clone()
    });
    tree.scsi(&Scsi {
        name: "sdc",
        devno: "8:32",
        hctl: "2:0:0:2",
        page_83: Some(page_83(&[(2, 0, b"drive-scsi0-0-0-2")])),
        ..disk
    });
    tree
}

/// A SATA disk with a world-wide name, and an old one without.
pub fn sata(root: &Path) -> Tree {
    let tree = Tree::new(root);
    let wwn = hex("50014ee2b1c2d3e4");
    let t10 = format!("{:<8}{:<40}{:<20}", "ATA", "WDC WD10EZEX-08WN4A0", "WD-WCC6Y0AB1CDE");
    let disk = Scsi {
        name: "sda",
        devno: "8:0",
        hctl: "0:0:0:0",
        adapter: AHCI,
        vendor: "ATA",
        model: "WDC WD10EZEX-08W",
        revision: "1A01",
        size: 1000204886016,
        // libata: the serial as vendor specific, the T10 designator, and the WWN where the disk has one.
        page_83: Some(page_83(&[(2, 0, b"     WD-WCC6Y0AB1CDE"), (2, 1, t10.as_bytes()), (1, 3, &wwn)])),
        page_80: Some("     WD-WCC6Y0AB1CDE"),
        wwid: Some("naa.50014ee2b1c2d3e4"),
    };
    tree.scsi(&disk);
    let t10 = format!("{:<8}{:<40}{:<20}", "ATA", "QEMU HARDDISK", "QM00003");
    tree.scsi(&Scsi {
        name: "sdb",
        devno: "8:16",
        hctl: "1:0:0:0",
        vendor: "ATA",
        model: "QEMU HARDDISK",
        page_83: Some(page_83(&[(2, 0, b"QM00003             "), (2, 1, t10.as_bytes())])),
        page_80: Some("QM00003"),
        wwid: None,
        ..disk
    });
    tree
}

/// NVMe namespaces with an EUI-64, an NGUID, a UUID, and with none of them.
pub fn nvme(root: &Path) -> Tree {
    let tree = Tree::new(root);
    let size = 512 * GIB;
    tree.nvme("nvme0n1", "259:0", "Samsung SSD 980 PRO", "S5GXNX0T123456", "eui.002538ba11b2c3d4", size);
    tree.nvme(
        "nvme1n1",
        "259:1",
        "VMware Virtual NVMe Disk",
        "VMWARE_0000",
        "eui.6479a7ffff000001000c2999f2a3b4c5",
        size,
    );
    tree.nvme(
        "nvme2n1",
        "259:2",
        "QEMU NVMe Ctrl",
        "deadbeef",
        "uuid.1efe0ec1-6b2e-4b77-9d61-2d2f4a4a9b01",
        size,
    );
    let made = "nvme.1b36-666f6f-51454d55204e564d65204374726c-00000001";
    tree.nvme("nvme3n1", "259:3", "QEMU NVMe Ctrl", "foo", made, size);
    tree
}

/// `count` VMware disks with everything in udev's database and in sysfs, as a big target has them.
pub fn many(root: &Path, count: u32) -> Tree {
    let tree = Tree::new(root);
    for at in 0..count {
        let name = sd_name(at);
        // Sixteen minors a disk, then the extended majors 65 to 71.
        let major =
            [8, 65, 66, 67, 68, 69, 70, 71, 128, 129, 130, 131, 132, 133, 134, 135][(at / 16 % 16) as usize];
        let devno = format!("{major}:{}", at % 16 * 16);
        let digits = format!("6000c29{at:025x}");
        let bytes = hex(&digits);
        tree.scsi(&Scsi {
            name: &name,
            devno: &devno,
            hctl: &format!("{}:0:{}:0", at / 64, at % 64),
            adapter: PVSCSI,
            vendor: "VMware",
            model: "Virtual disk",
            revision: "2.0",
            size: 64 * GIB,
            page_83: Some(page_83(&[(1, 3, &bytes)])),
            page_80: Some(&digits),
            wwid: None,
        });
        tree.udev_vmware(&devno, &digits);
    }
    tree
}

/// `sda` … `sdz`, `sdaa` …
fn sd_name(at: u32) -> String {
    let mut letters = Vec::new();
    let mut rest = at + 1;
    while rest > 0 {
        letters.push(b'a' + u8::try_from((rest - 1) % 26).unwrap());
        rest = (rest - 1) / 26;
    }
    letters.reverse();
    format!("sd{}", String::from_utf8(letters).unwrap())
}
