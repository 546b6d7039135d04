//! SCSI disks, made in a guest by the kernel's own target: files or block devices behind `tcm_loop`, each with the
//! identity that it is given. They stay as long as the guest.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::support::{run, tool, wait_for};

const CONFIG: &str = "/sys/kernel/config/target";

/// How a disk presents itself.
#[derive(Clone, Debug)]
pub enum Identity {
    /// As one of VMware's virtual disks with `disk.EnableUUID`: naa.6000c29 and 25 digits, which are these.
    VmWare(String),
    /// LIO's own names, and no serial.
    Bare,
}

impl Identity {
    /// VMware's, for the disk of this number.
    pub fn vmware(number: u32) -> Identity {
        Identity::VmWare(format!("{number:08x}a1b2c3d4e5f601234"))
    }

    /// As `discover-disks` writes it.
    pub fn canonical(&self) -> String {
        match self {
            Identity::VmWare(digits) => format!("naa.6000c29{digits}"),
            Identity::Bare => panic!("it has no identity of its own"),
        }
    }
}

/// What stands behind LUNs: one disk, however many ways lead to it.
pub struct Store {
    dir: PathBuf,
}

fn number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn write(path: PathBuf, value: &str) {
    fs::write(&path, value).unwrap_or_else(|error| panic!("{}: {value}: {error}", path.display()));
}

/// Loads what SCSI disks need.
pub fn load() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tool("modprobe", &["-a", "sd_mod", "tcm_loop", "target_core_file", "target_core_iblock"]);
        fs::create_dir(Path::new(CONFIG).join("loopback")).unwrap();
    });
}

impl Store {
    /// On a new, empty, sparse file.
    pub fn file(path: &Path, size: u64, identity: &Identity) -> Store {
        fs::File::create_new(path).unwrap().set_len(size).unwrap();
        Store::existing(path, identity)
    }

    /// On a file that is there.
    pub fn existing(path: &Path, identity: &Identity) -> Store {
        let size = path.metadata().unwrap().len();
        Store::new("fileio", &format!("fd_dev_name={},fd_dev_size={size}", path.display()), identity)
    }

    /// On a block device, such as one of device mapper's.
    pub fn block(node: &Path, identity: &Identity) -> Store {
        Store::new("iblock", &format!("udev_path={}", node.display()), identity)
    }

    fn new(driver: &str, control: &str, identity: &Identity) -> Store {
        load();
        let number = number();
        let dir = Path::new(CONFIG).join(format!("core/{driver}_{number}/disk{number}"));
        fs::create_dir_all(&dir).unwrap();
        write(dir.join("control"), control);
        if let Identity::VmWare(digits) = identity {
            for (name, value) in
                [("vendor_id", "VMware"), ("product_id", "Virtual disk"), ("company_id", "0x000c29")]
            {
                write(dir.join("wwn").join(name), value);
            }
            write(dir.join("wwn/vpd_unit_serial"), digits);
        }
        write(dir.join("enable"), "1");
        Store { dir }
    }
}

/// A SCSI host with one target, and LUNs on it.
pub struct Target {
    dir: PathBuf,
}

impl Target {
    pub fn new() -> Target {
        load();
        let number = number();
        let dir = Path::new(CONFIG).join(format!("loopback/naa.5001405{number:09x}/tpgt_1"));
        fs::create_dir_all(&dir).unwrap();
        write(dir.join("nexus"), &format!("naa.5001406{number:09x}"));
        Target { dir }
    }

    /// Shows `store` under this LUN, and waits until it is a disk.
    pub fn attach(&self, lun: u32, store: &Store) -> Lun {
        let dir = self.dir.join(format!("lun/lun_{lun}"));
        fs::create_dir(&dir).unwrap();
        symlink(&store.dir, dir.join("store")).unwrap();
        let address = fs::read_to_string(self.dir.join("address")).unwrap();
        let lun = Lun { dir, hctl: format!("{}:{lun}", address.trim()) };
        // Its name comes before it can be opened.
        wait_for("a disk", || File::open(Path::new("/dev").join(lun.try_name()?)).ok());
        lun
    }
}

/// A disk as the guest sees it.
pub struct Lun {
    dir: PathBuf,
    /// Host, channel, target, LUN.
    pub hctl: String,
}

impl Lun {
    pub fn device(&self) -> PathBuf {
        Path::new("/sys/bus/scsi/devices").join(&self.hctl)
    }

    fn try_name(&self) -> Option<String> {
        let entry = fs::read_dir(self.device().join("block")).ok()?.next()?.ok()?;
        Some(entry.file_name().into_string().unwrap())
    }

    /// The kernel's name now, such as `sda`.
    pub fn name(&self) -> String {
        self.try_name().unwrap_or_else(|| panic!("{} is no disk", self.hctl))
    }

    pub fn node(&self) -> PathBuf {
        Path::new("/dev").join(self.name())
    }

    /// Takes it away on the side of the target, as an array does that does not show a LUN any more.
    pub fn detach(&self) {
        fs::remove_file(self.dir.join("store")).unwrap();
        fs::remove_dir(&self.dir).unwrap();
        self.wait_until_gone();
    }

    /// Takes it away on the side of the host. It is found again by a rescan.
    pub fn delete(&self) {
        write(self.device().join("delete"), "1");
        self.wait_until_gone();
    }

    fn wait_until_gone(&self) {
        wait_for("the disk to go", || (!self.device().exists()).then_some(()));
    }
}

/// What `discover-disks --json` says.
pub fn discovered() -> Vec<Value> {
    let found = run(&["discover-disks", "--json"]).ok().json();
    found["disks"].as_array().unwrap().clone()
}

/// The disk that discovery calls so.
#[track_caller]
pub fn named<'a>(disks: &'a [Value], name: &str) -> &'a Value {
    let found = disks.iter().find(|disk| disk["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {disks:#?}"))
}

/// Waits until udevd has done what is to be done.
pub fn settle() {
    tool("udevadm", &["settle", "--timeout=600"]);
}

/// Rules of udev that run several processes for each event, and find nothing where there are no paths.
pub const FOR_MULTIPATH: [&str; 5] =
    ["55-scsi-sg3_id", "58-scsi-sg3_symlink", "56-dm-mpath", "60-multipath", "60-kpartx"];

/// Makes udevd do without these rules from now on.
pub fn without_rules(rules: &[&str]) {
    for rules in rules {
        symlink("/dev/null", format!("/etc/udev/rules.d/{rules}.rules")).unwrap();
    }
    tool("udevadm", &["control", "--reload"]);
}
