//! The changes that keep LVM, multipath, md, systemd and desktops away from replicated disks: on the trees of hosts, and
//! against LVM's own tools.

#[path = "sysroot/tree.rs"]
mod hosts;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use hosts::{GIB, PVSCSI, Tree, VMWARE_A, VMWARE_B};
use mt_agent::layout::lvm::checksum;
use mt_agent::setup::{CHANGES, Change, Checked, Host, Level, Places, Planned, Setup, Wishes};
use support::{Loop, MIB};

const VG: &str = "LMg6mS-OuPf-Rm2h-qWcJ-3Ce7-Vlwy-fGKSmr";
const PV: &str = "gQ2hDf-3QnX-hMlW-Te0J-xoAn-8rSo-Z4lC7s";
const FOREIGN_VG: &str = "aBcDeF-GhIj-KlMn-OpQr-StUv-WxYz-012345";
const FOREIGN_PV: &str = "ZyXwVu-TsRq-PoNm-LkJi-HgFe-DcBa-987654";
const ARRAY: &str = "3aaa0122:29827cfa:5331ad66:ca767371";

/// What an installer leaves in `lvm.conf`, in its essentials.
const LVM_CONF: &str = "# This is an example configuration file for the LVM2 system.\nconfig {\n\tchecks = 1\n}\ndevices {\n\
    \tdir = \"/dev\"\n\tscan = [ \"/dev\" ]\n\t# use_devicesfile = 1\n\t# global_filter = [ \"a|.*|\" ]\n\
    \tmd_component_detection = 1\n\tissue_discards = 0\n}\nallocation {\n\tcache_pool_chunk_size = 64\n}\n\
    activation {\n\traid_fault_policy = \"warn\"\n\tthin_pool_autoextend_percent = 20\n\t# auto_activation_volume_list = [ \"vg1\" ]\n}\n";

const MDADM_CONF: &str = "# mdadm.conf written out by anaconda\nMAILADDR root\nAUTO +imsm +1.x -all\n";

/// A host that is set up, and taken back.
struct Fixture {
    tree: Tree,
    _dir: tempfile::TempDir,
}

impl Fixture {
    /// A VM of this release of Enterprise Linux with everything installed, whose second disk is assigned and carries a
    /// volume group with the name of the host's own.
    fn new(release: u32, has_lvm_root: bool) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let tree = hosts::vmware(dir.path(), PVSCSI, true);
        let write = |path: &str, content: &str| tree.write(path, content);
        write(
            "etc/os-release",
            &format!("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"{release}.4\"\n"),
        );
        write("etc/group", "root:x:0:\nmt-agent:x:977:\n");
        write("etc/lvm/lvm.conf", LVM_CONF);
        write("usr/lib/systemd/system-generators/systemd-gpt-auto-generator", "");
        for program in ["lvm", "lvmdevices", "multipath", "multipathd", "mdadm"] {
            write(&format!("usr/sbin/{program}"), "");
        }
        write("usr/lib/udev/rules.d/80-udisks2.rules", "");
        write("usr/bin/gnome-shell", "");
        write("etc/dconf/profile/user", "user-db:user\nsystem-db:local\n");
        for (disk, digits) in [("sda", VMWARE_A), ("sdb", VMWARE_B)] {
            let device = fs::canonicalize(dir.path().join(format!("sys/block/{disk}/device"))).unwrap();
            fs::write(device.join("wwid"), format!("naa.{digits}\n")).unwrap();
        }
        for path in ["dev/sda", "dev/sda1", "dev/sda2", "dev/sdb", "dev/dm-0", "dev/dm-1"] {
            tree.write(path, vec![0u8; 2 << 20]);
        }
        tree.write("dev/sdb", volume("cs", FOREIGN_VG, FOREIGN_PV, &[FOREIGN_PV]));
        for link in [format!("wwn-0x{VMWARE_A}"), format!("scsi-3{VMWARE_A}")] {
            fs::create_dir_all(dir.path().join("dev/disk/by-id")).unwrap();
            symlink("../../sda2", dir.path().join(format!("dev/disk/by-id/{link}-part2"))).unwrap();
            symlink("../../sda", dir.path().join(format!("dev/disk/by-id/{link}"))).unwrap();
        }
        symlink("../../sda2", dir.path().join(format!("dev/disk/by-id/lvm-pv-uuid-{PV}"))).unwrap();
        if has_lvm_root {
            tree.write("dev/sda2", volume("cs", VG, PV, &[PV]));
            let active = format!("LVM-{}", VG.replace('-', ""));
            write("sys/block/dm-0/dm/uuid", &format!("{active}{:0>32}\n", 1));
            write("sys/block/dm-1/dm/uuid", &format!("{active}{:0>32}\n", 2));
            write("etc/fstab", "/dev/mapper/cs-root / xfs defaults 0 0\n");
        } else {
            for name in ["dm-0", "dm-1"] {
                fs::remove_file(dir.path().join(format!("sys/block/{name}"))).unwrap();
                fs::remove_file(dir.path().join(format!("sys/class/block/{name}"))).unwrap();
                fs::remove_file(dir.path().join(format!("sys/class/block/sda2/holders/{name}"))).unwrap();
            }
            write("proc/self/mountinfo", "22 1 0:21 / /proc rw - proc proc rw\n");
            write("proc/swaps", "Filename Type Size Used Priority\n");
            tree.mount("8:2", "/", "/dev/sda2");
            write("etc/fstab", "# by the installer\nUUID=1-2 / xfs defaults 0 0\n");
        }
        let fixture = Fixture { tree, _dir: dir };
        fixture.assign(&[VMWARE_B]);
        fixture
    }

    /// What an administrator has changed before.
    fn edited(self) -> Fixture {
        let local = "# local settings\nlocal {\n\tsystem_id = \"\"\n}\n";
        self.write("etc/lvm/lvmlocal.conf", local);
        self.write("etc/multipath.conf", "defaults {\n\tuser_friendly_names yes\n\tfind_multipaths yes\n}\n");
        self.write("etc/mdadm.conf", &format!("{MDADM_CONF}ARRAY /dev/md/boot UUID={ARRAY}\n"));
        fs::set_permissions(self.path("etc/mdadm.conf"), std::os::unix::fs::PermissionsExt::from_mode(0o640))
            .unwrap();
        self
    }

    fn assign(&self, digits: &[&str]) {
        let path = "var/lib/mt-agent/retention/machines/web01.toml";
        if digits.is_empty() {
            fs::remove_file(self.path(path)).unwrap();
            return;
        }
        let mut text =
            "schema_version = 1\nmachine = \"web01\"\ncreated = \"2026-03-01T10:00:00Z\"\n".to_owned();
        for (index, digits) in digits.iter().enumerate() {
            text.push_str(&format!(
                "[[disk]]\nname = \"disk{index}\"\nid = \"naa.{digits}\"\nsize = 10737418240\nlogical_sector = 512\n\
                 overwrite = false\nassigned_at = \"2026-03-01T10:00:00Z\"\nstate = \"empty\"\n"
            ));
        }
        self.write(path, &text);
    }

    fn path(&self, path: &str) -> PathBuf {
        self.tree.root.join(path)
    }

    fn write(&self, path: &str, content: &str) {
        self.tree.write(path, content);
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn setup(&self) -> Setup {
        let places = Places {
            state_dir: "/var/lib/mt-agent".into(),
            retention_dir: "/var/lib/mt-agent/retention".into(),
            port: 9443,
        };
        Setup::open(Host::open(&self.tree.root, places, Wishes::default()).unwrap()).unwrap()
    }

    /// Applies one change, which gives the files that were written, or why it was refused.
    fn apply(&self, name: &str) -> Result<Vec<String>, String> {
        let mut done = self.setup().apply(&[change(name)]).unwrap();
        let applied = done.remove(0).1.map_err(|error| error.to_string())?;
        Ok(applied.files.iter().map(|path| path.display().to_string()).collect())
    }

    fn revert(&self, name: &str) -> Result<(), String> {
        self.setup().revert(&[change(name)]).unwrap().remove(0).1.map(drop).map_err(|error| error.to_string())
    }

    fn check(&self, name: &str) -> Checked {
        self.setup().check(&[change(name)]).remove(0)
    }

    fn plan(&self, name: &str) -> Planned {
        self.setup().plan(&[change(name)]).remove(0)
    }

    /// Everything in the tree but the records of the changes: kind, permissions, owner and content.
    fn snapshot(&self) -> BTreeMap<PathBuf, (u32, u32, u32, Vec<u8>)> {
        let mut found = BTreeMap::new();
        let mut left = vec![self.tree.root.clone()];
        while let Some(path) = left.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            let mut content = Vec::new();
            if meta.is_symlink() {
                content = fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes();
            } else if meta.is_dir() {
                left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            } else {
                content = fs::read(&path).unwrap();
            }
            found.insert(path, (meta.mode(), meta.uid(), meta.gid(), content));
        }
        let records = self.path("var/lib/mt-agent-setup");
        found.retain(|path, _| !path.starts_with(&records));
        found
    }

    #[track_caller]
    fn refuses(&self, name: &str, why: &str) {
        let before = self.snapshot();
        let refused = self.apply(name).unwrap_err();
        assert!(refused.contains(why), "{refused}");
        assert_eq!(self.check(name).level, Level::Fail);
        assert_eq!(self.plan(name).refused, Some(refused));
        assert!(self.snapshot() == before, "something was written");
    }
}

const STORAGE: [&str; 6] = ["udev", "lvm", "multipath", "md", "gpt-auto", "automount"];

fn change(name: &str) -> &'static Change {
    CHANGES.iter().find(|change| change.name == name).unwrap()
}

/// A physical volume of 2 MiB with its metadata, as `pvcreate` and `vgcreate` lay it out.
fn volume(group: &str, group_id: &str, id: &str, members: &[&str]) -> Vec<u8> {
    let mut disk = vec![0u8; 2 << 20];
    let mut text = format!(
        "{group} {{\nid = \"{group_id}\"\nseqno = 1\nformat = \"lvm2\"\nstatus = [\"RESIZEABLE\", \"READ\", \"WRITE\"]\n\
         flags = []\nextent_size = 8192\nmax_lv = 0\nmax_pv = 0\nmetadata_copies = 0\n\nphysical_volumes {{\n"
    );
    for (index, member) in members.iter().enumerate() {
        text.push_str(&format!(
            "pv{index} {{\nid = \"{member}\"\ndevice = \"/dev/x\"\nstatus = [\"ALLOCATABLE\"]\nflags = []\ndev_size = 4096\n\
             pe_start = 2048\npe_count = 0\n}}\n"
        ));
    }
    text.push_str("}\n\n}\n# Generated by LVM2\n");
    let mut put = |at: usize, bytes: &[u8]| disk[at..at + bytes.len()].copy_from_slice(bytes);
    let (area, size) = (4096usize, (1usize << 20) - 4096);
    put(512, b"LABELONE\x01");
    put(512 + 20, &32u32.to_le_bytes());
    put(512 + 24, b"LVM2 001");
    put(512 + 32, id.replace('-', "").as_bytes());
    put(512 + 64, &(2u64 << 20).to_le_bytes());
    put(512 + 72, &(1u64 << 20).to_le_bytes());
    put(512 + 104, &(area as u64).to_le_bytes());
    put(512 + 112, &(size as u64).to_le_bytes());
    put(area + 4, b" LVM2 x[5A%r0N*>");
    put(area + 20, &1u32.to_le_bytes());
    put(area + 24, &(area as u64).to_le_bytes());
    put(area + 32, &(size as u64).to_le_bytes());
    put(area + 40, &512u64.to_le_bytes());
    put(area + 48, &(text.len() as u64).to_le_bytes());
    put(area + 56, &checksum(text.as_bytes()).to_le_bytes());
    put(area + 512, text.as_bytes());
    let label = checksum(&disk[512 + 20..1024]);
    disk[512 + 16..512 + 20].copy_from_slice(&label.to_le_bytes());
    let header = checksum(&disk[area + 4..area + 512]);
    disk[area..area + 4].copy_from_slice(&header.to_le_bytes());
    disk
}

#[test]
fn every_change_is_made_once_and_taken_back() {
    let changes: Vec<&Change> = STORAGE.map(change).to_vec();
    for release in [8, 9, 10] {
        for (has_lvm_root, is_edited) in [(true, false), (true, true), (false, false), (false, true)] {
            let what = format!("EL {release}, LVM root {has_lvm_root}, edited {is_edited}");
            let mut host = Fixture::new(release, has_lvm_root);
            if is_edited {
                host = host.edited();
            }
            let before = host.snapshot();
            let plans = host.setup().plan(&changes);
            assert!(
                plans.iter().all(|plan| plan.refused.is_none() && !plan.diff.is_empty()),
                "{what}: {plans:?}"
            );
            assert!(host.snapshot() == before, "{what}: a plan wrote something");
            for (name, done) in host.setup().apply(&changes).unwrap() {
                let done = done.unwrap_or_else(|error| panic!("{what}: {name}: {error}"));
                assert!(!done.files.is_empty(), "{what}: {name}");
            }
            let applied = host.snapshot();
            assert!(applied != before);
            for (name, again) in host.setup().apply(&changes).unwrap() {
                assert!(again.unwrap().files.is_empty(), "{what}: {name}");
            }
            assert!(host.snapshot() == applied, "{what}: the second run changed something");
            for checked in host.setup().check(&changes) {
                assert_eq!(checked.level, Level::Pass, "{what}: {checked:?}");
            }
            for (name, reverted) in host.setup().revert(&changes).unwrap() {
                assert!(reverted.unwrap().applied, "{what}: {name}");
            }
            assert!(host.snapshot() == before, "{what}: it is not what it was");
        }
    }
}

#[test]
fn a_plan_shows_files_calls_and_what_stays() {
    let host = Fixture::new(9, true).edited();
    let plan = host.plan("lvm");
    let pvid = PV.replace('-', "");
    assert_eq!(
        plan.diff,
        format!(
            "--- /dev/null\n+++ /etc/lvm/devices/system.devices\n@@ -0,0 +1,4 @@\n\
             +# LVM uses devices listed in this file.\n+# Created by `mt-agent setup apply`; change it by lvmdevices(8).\n\
             +VERSION=1.1.1\n+IDTYPE=sys_wwid IDNAME=naa.{VMWARE_A} DEVNAME=/dev/sda2 PVID={pvid} PART=2\n"
        )
    );
    assert_eq!(
        plan.evidence,
        [format!("stays: physical volume /dev/sda2 ({PV}) of volume group cs, which carries /")]
    );
    host.write("usr/bin/dracut", "");
    assert_eq!(host.plan("lvm").calls[0].command, "dracut --force --regenerate-all");

    assert_eq!(
        host.plan("multipath").diff,
        format!(
            "--- /dev/null\n+++ /etc/multipath/conf.d/mt-agent.conf\n@@ -0,0 +1,7 @@\n\
             +# Written by `mt-agent setup apply`, and again whenever disks are assigned.\n+blacklist {{\n\
             +\t# the host's own, with /\n+\twwid \"^3{VMWARE_A}$\"\n+\t# disk disk0 of machine web01\n\
             +\twwid \"^3{VMWARE_B}$\"\n+}}\n"
        )
    );
    assert_eq!(
        host.plan("md").diff,
        format!(
            "--- /etc/mdadm.conf\n+++ /etc/mdadm.conf\n@@ -1,4 +1,5 @@\n # mdadm.conf written out by anaconda\n MAILADDR root\n\
             -AUTO +imsm +1.x -all\n+AUTO -all\n+# before mt-agent: AUTO +imsm +1.x -all\n ARRAY /dev/md/boot UUID={ARRAY}\n"
        )
    );
    let generator = "/etc/systemd/system-generators/systemd-gpt-auto-generator";
    assert_eq!(
        host.plan("gpt-auto").diff,
        format!("--- /dev/null\n+++ {generator}\n@@ -0,0 +1 @@\n+(link to /dev/null)\n")
    );

    let old = Fixture::new(8, true).edited();
    assert_eq!(
        old.plan("lvm").diff,
        format!(
            "--- /etc/lvm/lvmlocal.conf\n+++ /etc/lvm/lvmlocal.conf\n@@ -2,3 +2,15 @@\n local {{\n \tsystem_id = \"\"\n }}\n\
             +# BEGIN mt-agent: written by `mt-agent setup apply`. Before another physical volume is made for this host: \
             `mt-agent setup revert --only lvm`.\n+devices {{\n+    global_filter = [\n\
             +        \"a|^/dev/disk/by-id/scsi-3{VMWARE_A}-part2$|\",\n\
             +        \"a|^/dev/disk/by-id/wwn-0x{VMWARE_A}-part2$|\",\n+        \"r|.*|\"\n+    ]\n+}}\n+activation {{\n\
             +    auto_activation_volume_list = [ \"cs\" ]\n+}}\n+# END mt-agent\n"
        )
    );
}

#[test]
fn what_someone_edited_since_is_left_alone() {
    let host = Fixture::new(9, true).edited();
    let files = [
        ("lvm", "etc/lvm/devices/system.devices"),
        ("multipath", "etc/multipath/conf.d/mt-agent.conf"),
        ("md", "etc/mdadm.conf"),
        ("automount", "etc/dconf/db/local.d/60-mt-agent"),
    ];
    for (name, path) in files {
        host.apply(name).unwrap();
        let text = host.read(path);
        host.write(path, &format!("{text}# by hand\n"));
        let edited = host.snapshot();
        let refused = host.revert(name).unwrap_err();
        assert!(refused.contains(path) && refused.contains("changed since"), "{name}: {refused}");
        assert!(host.snapshot() == edited, "{name}");
        host.write(path, &text);
        host.revert(name).unwrap();
    }
}

#[test]
fn lvm_is_not_touched_where_the_root_would_not_be_found() {
    for release in [8, 9, 10] {
        // Its own disk is assigned, by mistake.
        let host = Fixture::new(release, true);
        host.assign(&[VMWARE_A]);
        host.refuses("lvm", "beside those on the assigned disk naa.");
        // A physical volume of its group is nowhere, or cannot be seen.
        let host = Fixture::new(release, true);
        host.tree.write("dev/sda2", volume("cs", VG, PV, &[PV, FOREIGN_PV]));
        host.refuses(
            "lvm",
            &format!("the physical volume {FOREIGN_PV} of the active volume group cs was not found once"),
        );
        host.tree.write("dev/sda2", vec![0u8; 2 << 20]);
        host.refuses("lvm", "the physical volumes of centos-root (dm-0) were not found");
        let mut damaged = volume("cs", VG, PV, &[PV]);
        damaged[512 + 300] ^= 1;
        host.tree.write("dev/sda2", damaged);
        host.refuses("lvm", "/dev/sda2 carries an active volume group, and cannot be read");
        host.tree.write("dev/sda2", volume("cs", VG, PV, &[PV]));
        host.apply("lvm").unwrap();
    }
    let host = Fixture::new(8, true);
    fs::remove_dir_all(host.path("dev/disk")).unwrap();
    host.refuses("lvm", "has no name that is the same after the next boot");
    fs::create_dir_all(host.path("dev/disk/by-path")).unwrap();
    symlink("../../sda2", host.path("dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part2")).unwrap();
    host.apply("lvm").unwrap();
    assert_eq!(host.check("lvm").level, Level::Warn);
    let text = host.read("etc/lvm/lvmlocal.conf");
    // A dot is any character.
    assert!(text.contains("\"a|^/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part2$|\""), "{text}");
}

/// What is the host's own is not known of a tree that does not run: nothing is written there, and nothing taken back.
#[test]
fn the_tree_of_a_host_that_does_not_run_stays_as_it_is() {
    for release in [8, 9] {
        for is_applied in [false, true] {
            let host = Fixture::new(release, true).edited();
            if is_applied {
                for name in ["lvm", "md"] {
                    host.apply(name).unwrap();
                }
            }
            fs::remove_dir_all(host.path("sys")).unwrap();
            let before = host.snapshot();
            for name in ["lvm", "md"] {
                assert_eq!(host.apply(name), Ok(Vec::new()), "EL {release}: {name}");
                let expected = if is_applied { Level::Pass } else { Level::Warn };
                assert_eq!(host.check(name).level, expected, "EL {release}: {name}");
            }
            assert!(host.snapshot() == before);
        }
    }
}

#[test]
fn lvm_takes_a_copy_of_its_own_volume_for_none() {
    for release in [8, 9] {
        let host = Fixture::new(release, true);
        host.assign(&[]);
        for copy in ["dev/sda1", "dev/sdb"] {
            host.tree.write(copy, volume("cs", VG, PV, &[PV]));
        }
        host.apply("lvm").unwrap();
        let stays: Vec<String> = host.plan("lvm").evidence;
        assert!(stays[0].contains("stays: physical volume /dev/sda2"), "{stays:?}");
    }
}

#[test]
fn an_existing_devices_file_only_loses_assigned_disks() {
    let host = Fixture::new(10, true);
    let own = format!(
        "IDTYPE=sys_wwid IDNAME=naa.{VMWARE_A} DEVNAME=/dev/sda2 PVID={} PART=2\n",
        PV.replace('-', "")
    );
    let other = "IDTYPE=devname IDNAME=/dev/vdx DEVNAME=/dev/vdx PVID=phl0clFbAokp9UXqbIgI5YYQxuTIJVkD\n";
    let foreign = format!(
        "IDTYPE=sys_wwid IDNAME=naa.{VMWARE_B} DEVNAME=/dev/sdb PVID={}\n",
        FOREIGN_PV.replace('-', "")
    );
    let head = "# LVM uses devices listed in this file.\n";
    let ids = "PRODUCT_UUID=5e2a1c66-d554-5c95-8eb9-bcfce74db9d0\nVERSION=1.1.29\n";
    let file = "etc/lvm/devices/system.devices";
    host.write(file, &format!("{head}# HASH=3984349505\n{ids}{own}{foreign}{other}"));
    host.apply("lvm").unwrap();
    assert_eq!(host.read(file), format!("{head}{ids}{own}{other}"));
    assert_eq!(host.check("lvm").level, Level::Pass);

    // One that is right stays as it is, and is nothing to take back.
    let host = Fixture::new(10, true);
    host.write(file, &format!("{head}# HASH=3984349505\n{ids}{own}"));
    let before = host.snapshot();
    assert_eq!(host.apply("lvm"), Ok(Vec::new()));
    assert!(host.snapshot() == before);

    // By a name that another disk has now.
    host.write(
        file,
        &format!(
            "{ids}{}",
            own.replace("sys_wwid", "devname").replace(&format!("naa.{VMWARE_A}"), "/dev/sdb")
        ),
    );
    host.refuses("lvm", "on the assigned disk");

    // One of an image is known by its text alone.
    host.write(file, &format!("{ids}{own}{foreign}"));
    fs::remove_dir_all(host.path("sys")).unwrap();
    host.apply("lvm").unwrap();
    assert_eq!(host.read(file), format!("{ids}{own}"));
}

#[test]
fn lvm_settings_of_an_administrator_stay() {
    let host = Fixture::new(9, true);
    host.write("etc/lvm/lvm.conf", &LVM_CONF.replace("# use_devicesfile = 1", "use_devicesfile = 0"));
    host.apply("lvm").unwrap();
    assert!(host.read("etc/lvm/lvmlocal.conf").contains("devices {\n    use_devicesfile = 1\n}\n"));

    let host = Fixture::new(8, true);
    let own =
        LVM_CONF.replace("# global_filter", "global_filter").replace("# auto_activation", "auto_activation");
    host.write("etc/lvm/lvm.conf", &own);
    host.apply("lvm").unwrap();
    let local = host.read("etc/lvm/lvmlocal.conf");
    assert!(local.contains("    filter = [") && !local.contains("auto_activation"), "{local}");
    host.revert("lvm").unwrap();
    host.write("etc/lvm/lvm.conf", &own.replace("md_component", "filter = [ \"a|.*|\" ]\n\tmd_component"));
    host.refuses("lvm", "both a filter and a global_filter");
    host.write("etc/lvm/lvm.conf", "devices {");
    host.refuses("lvm", "/etc/lvm/lvm.conf cannot be understood");
}

/// Whatever the encoding and the ends of the lines are.
#[test]
fn files_of_others_keep_their_bytes() {
    let comment = &b"# f\xfcr uns\r\n"[..];
    let applied = |host: &Fixture, name: &str, path: &str, before: &[u8]| {
        host.tree.write(path, before);
        let start = host.snapshot();
        host.apply(name).unwrap();
        let after = fs::read(host.path(path)).unwrap();
        assert_eq!(host.apply(name), Ok(Vec::new()));
        host.revert(name).unwrap();
        assert!(host.snapshot() == start, "{path}");
        after.escape_ascii().to_string()
    };
    let shown = |parts: &[&[u8]]| parts.concat().escape_ascii().to_string();

    let host = Fixture::new(8, true);
    let local = [comment, b"local {\n\tsystem_id = \"\"\n} "].concat();
    let after = applied(&host, "lvm", "etc/lvm/lvmlocal.conf", &local);
    assert!(after.starts_with(&shown(&[&local, b"\n# BEGIN mt-agent"])), "{after}");
    // Of a block without an end nobody knows what is whose.
    host.tree.write("etc/lvm/lvmlocal.conf", [b"# BEGIN mt-agent: x\n", &local[..]].concat());
    host.refuses("lvm", "none with `# END mt-agent`");

    let host = Fixture::new(9, true);
    let line = |digits: &str, node: &str, id: &str| {
        format!("IDTYPE=sys_wwid IDNAME=naa.{digits} DEVNAME={node} PVID={}\r\n", id.replace('-', ""))
    };
    let (own, foreign) = (line(VMWARE_A, "/dev/sda2", PV), line(VMWARE_B, "/dev/sdb", FOREIGN_PV));
    let before = [comment, own.as_bytes(), foreign.as_bytes(), b"# \xff"].concat();
    let after = applied(&host, "lvm", "etc/lvm/devices/system.devices", &before);
    assert_eq!(after, shown(&[comment, own.as_bytes(), b"# \xff"]));

    let before = [comment, b"AUTO +all\r\nMAILADDR b\xfcro"].concat();
    let after = applied(&host, "md", "etc/mdadm.conf", &before);
    assert_eq!(after, shown(&[comment, b"AUTO -all\n# before mt-agent: AUTO +all\r\nMAILADDR b\xfcro"]));
}

fn lvm_tools() -> bool {
    let there = ["/usr/sbin/lvm", "/sbin/lvm"].iter().any(|path| Path::new(path).exists());
    if !there {
        support::skipped(std::thread::current().name().unwrap(), "lvm2 is not installed");
    }
    there
}

#[track_caller]
fn sh(line: &str) -> String {
    let path = "/usr/sbin:/usr/bin:/sbin:/bin";
    let output = Command::new("sh").args(["-ec", line]).env("PATH", path).output().unwrap();
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    assert!(output.status.success(), "{line}: {}", said.concat());
    said[0].clone()
}

/// Runs a tool of LVM on the configuration of a tree.
#[track_caller]
fn lvm(system: &Path, command: &str) -> String {
    sh(&format!("LVM_SYSTEM_DIR={} LVM_SUPPRESS_FD_WARNINGS=1 lvm {command} 2>&1", system.display()))
}

#[test]
fn lvm_reads_the_filter_as_it_was_meant() {
    if !lvm_tools() {
        return;
    }
    for is_edited in [false, true] {
        let mut host = Fixture::new(8, true);
        if is_edited {
            host = host.edited();
            host.write(
                "etc/lvm/lvmlocal.conf",
                "devices {\n\tissue_discards = 1\n}\nlocal {\n\tsystem_id = \"own\"\n}",
            );
        }
        host.apply("lvm").unwrap();
        let system = host.path("etc/lvm");
        let diff = lvm(&system, "lvmconfig --typeconfig diff");
        let filter = format!(
            "global_filter=[\"a|^/dev/disk/by-id/scsi-3{VMWARE_A}-part2$|\",\"a|^/dev/disk/by-id/wwn-0x{VMWARE_A}-part2$|\",\
             \"r|.*|\"]"
        );
        // LVM prints a list of one without its brackets.
        assert!(diff.contains(&filter) && diff.contains("auto_activation_volume_list=\"cs\""), "{diff}");
        assert_eq!(diff.contains("issue_discards=1"), is_edited, "{diff}");
        if is_edited {
            assert!(lvm(&system, "lvmconfig local/system_id").contains("system_id=\"own\""));
        }
    }
    // No volume group of its own: none is activated.
    let host = Fixture::new(8, false);
    host.apply("lvm").unwrap();
    let diff = lvm(&host.path("etc/lvm"), "lvmconfig --typeconfig diff");
    assert!(diff.contains("auto_activation_volume_list=[]"), "{diff}");
}

/// LVM itself sees the host's own volume and not the other, by what was written.
#[test]
fn lvm_sees_the_own_volume_only() {
    require_root!();
    if !lvm_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let conf = "devices {\n obtain_device_list_from_udev = 0\n external_device_info_source = \"none\"\n hints = \"none\"\n}\n\
                backup {\n backup = 0\n archive = 0\n}\nglobal {\n use_lvmpolld = 0\n event_activation = 0\n \
                locking_dir = \"DIR\"\n}\nactivation {\n udev_sync = 0\n udev_rules = 0\n monitoring = 0\n}\n"
        .replace("DIR", dir.path().to_str().unwrap());
    let disks = ["own.img", "foreign.img"].map(|name| Loop::create(&dir.path().join(name), 32 * MIB));
    let plain = dir.path().join("plain");
    fs::create_dir_all(&plain).unwrap();
    fs::write(plain.join("lvm.conf"), &conf).unwrap();
    for (disk, group) in disks.iter().zip(["own", "foreign"]) {
        let node = disk.node().display();
        lvm(&plain, &format!("vgcreate --driverloaded n --devices {node} {group} {node}"));
    }
    let report = format!(
        "vgs --driverloaded n --noheadings -o vg_name,vg_uuid --devices {},{}",
        disks[0].node().display(),
        disks[1].node().display()
    );
    let all = lvm(&plain, &report);
    let uuid = all.lines().find_map(|line| line.trim().strip_prefix("own ")).unwrap().trim().replace('-', "");

    for release in [8, 9] {
        let host = Fixture::new(release, false);
        // Without what is the first parent of the loop devices, a disk of the host's.
        for (at, disk) in disks.iter().enumerate() {
            let name = disk.node().file_name().unwrap().to_str().unwrap();
            host.tree.loop_device(name, &format!("7:{at}"), disk.backing().to_str().unwrap(), 32 * MIB);
            host.tree.write(format!("dev/{name}"), fs::read(disk.backing()).unwrap());
        }
        let own = disks[0].node().file_name().unwrap().to_str().unwrap();
        host.tree.dm("dm-7", "253:7", "own-root", &format!("LVM-{uuid}{:0>32}", 1), GIB, &[own]);
        symlink(format!("../../{own}"), host.path("dev/disk/by-id/virtio-own")).unwrap();
        host.write("etc/lvm/lvm.conf", &conf.replace("devices {", "devices {\n use_devicesfile = 0"));
        host.apply("lvm").unwrap();
        let system = host.path("etc/lvm");
        // In a /dev of its own, which has the link that udev makes on a real host.
        let seen = sh(&format!(
            "unshare --mount sh -euc 'mkdir {0}/d; mount -t tmpfs none {0}/d; mkdir -p {0}/d/disk/by-id; \
             for n in /dev/loop*; do cp -a $n {0}/d; done; cp -a /dev/null {0}/d; mount --bind {0}/d /dev; \
             ln -s {1} /dev/disk/by-id/virtio-own; \
             LVM_SYSTEM_DIR={2} LVM_SUPPRESS_FD_WARNINGS=1 lvm vgs --driverloaded n --noheadings -o vg_name 2>&1'; rmdir {0}/d",
            dir.path().display(),
            disks[0].node().display(),
            system.display()
        ));
        let groups: Vec<&str> =
            seen.lines().map(str::trim).filter(|line| ["own", "foreign"].contains(line)).collect();
        assert_eq!(groups, ["own"], "EL {release}: {seen}\n{}", host.read("etc/lvm/lvmlocal.conf"));
    }
}

#[test]
fn multipath_keeps_the_maps_that_there_are() {
    // The root lies on a map: it stays one.
    let host = Fixture::new(9, false);
    host.tree.dm("dm-5", "253:5", "mpatha", &format!("mpath-3{VMWARE_A}"), 40 * GIB, &["sda"]);
    host.tree.dm("dm-6", "253:6", "mpatha2", &format!("part2-mpath-3{VMWARE_A}"), 39 * GIB, &["dm-5"]);
    host.write("proc/self/mountinfo", "22 1 0:21 / /proc rw - proc proc rw\n");
    host.tree.mount("253:6", "/", "/dev/mapper/mpatha2");
    host.apply("multipath").unwrap();
    let text = host.read("etc/multipath/conf.d/mt-agent.conf");
    assert!(text.contains(VMWARE_B) && !text.contains(VMWARE_A), "{text}");

    // An assigned disk with two paths does too.
    let host = Fixture::new(9, false);
    let two = hosts::Scsi {
        name: "sdc",
        devno: "8:32",
        hctl: "1:0:1:0",
        adapter: PVSCSI,
        vendor: "VMware",
        model: "Virtual disk",
        revision: "2.0",
        size: 100 * GIB,
        page_83: Some(hosts::page_83(&[(1, 3, &hosts::hex(VMWARE_B))])),
        page_80: None,
        wwid: None,
    };
    host.tree.scsi(&two);
    host.tree.dm("dm-5", "253:5", "mpatha", &format!("mpath-3{VMWARE_B}"), 100 * GIB, &["sdb", "sdc"]);
    host.apply("multipath").unwrap();
    assert!(!host.read("etc/multipath/conf.d/mt-agent.conf").contains(VMWARE_B));
    assert_eq!(host.check("multipath").level, Level::Warn);

    // Where the administrator's own configuration says otherwise.
    for (release, dir) in [(9, "etc/mp.d"), (10, "etc/multipath/conf.d")] {
        let host = Fixture::new(release, false);
        let own = format!(
            "defaults {{\n config_dir \"/etc/mp.d\"\n}}\nblacklist_exceptions {{\n wwid 3{VMWARE_B}\n}}\n"
        );
        host.write("etc/multipath.conf", &own);
        assert_eq!(host.apply("multipath").unwrap(), [format!("/{dir}/mt-agent.conf")]);
        assert_eq!(host.read("etc/multipath.conf"), own);
        let checked = host.check("multipath");
        assert!(
            checked.findings.iter().any(|found| found.what.contains("makes an exception")),
            "{checked:?}"
        );
    }
}

#[test]
fn what_is_assigned_later_is_followed() {
    let host = Fixture::new(9, true);
    host.assign(&[]);
    assert_eq!(host.setup().follow_disks().unwrap().len(), 0);
    host.apply("multipath").unwrap();
    assert!(!host.read("etc/multipath/conf.d/mt-agent.conf").contains(VMWARE_B));
    host.assign(&[VMWARE_B]);
    let followed = host.setup().follow_disks().unwrap();
    assert!(matches!(followed.as_slice(), [("multipath", Ok(_))]), "{followed:?}");
    assert!(host.read("etc/multipath/conf.d/mt-agent.conf").contains(VMWARE_B));
    host.revert("multipath").unwrap();
    assert!(!host.path("etc/multipath").exists());
}

#[test]
fn md_goes_on_with_the_own_arrays_only() {
    let other = "11112222:33334444:55556666:77778888";
    let host = Fixture::new(9, false);
    host.write("etc/mdadm.conf", MDADM_CONF);
    host.tree.md("md127", "9:127", "raid1", GIB, &["sda1"]);
    host.write("sys/block/md127/md/array_state", "clean\n");
    host.refuses("md", "the UUID of the array md127, which is this host's own, is not known");
    host.tree.udev("9:127", &[("MD_UUID", ARRAY), ("MD_DEVNAME", "boot")]);
    host.tree.md("md126", "9:126", "raid1", GIB, &["sdb"]);
    host.write("sys/block/md126/md/array_state", "active\n");
    host.tree.udev("9:126", &[("MD_UUID", other)]);
    host.apply("md").unwrap();
    let applied = format!(
        "# mdadm.conf written out by anaconda\nMAILADDR root\nAUTO -all\n# before mt-agent: AUTO +imsm +1.x -all\n\
         ARRAY /dev/md/boot UUID={ARRAY}\n"
    );
    assert_eq!(host.read("etc/mdadm.conf"), applied);
    let checked = host.check("md");
    assert_eq!(checked.level, Level::Warn);
    assert!(
        checked.findings.iter().any(|found| found.fix == "stop it: mdadm --stop /dev/md126"),
        "{checked:?}"
    );
    // One that is listed in a snippet is not listed again.
    host.revert("md").unwrap();
    host.write("etc/mdadm.conf.d/own.conf", &format!("ARRAY <ignore> UUID={other}\nARRAY UUID={ARRAY}\n"));
    host.apply("md").unwrap();
    assert!(!host.read("etc/mdadm.conf").contains("ARRAY"));
}

#[test]
fn the_gpt_generator_stays_where_the_host_needs_it() {
    let host = Fixture::new(10, false);
    host.write("etc/fstab", "# UUID=1 / xfs\nUUID=2 /boot xfs defaults 0 0\n");
    host.refuses("gpt-auto", "/etc/fstab does not list /");
    host.write("etc/fstab", "UUID=1 / xfs defaults 0 0\n");
    host.write(
        "run/systemd/generator.late/efi.automount",
        "# Automatically generated by systemd-gpt-auto-generator\n[Automount]\nWhere=/efi\n",
    );
    host.refuses("gpt-auto", "units that systemd-gpt-auto-generator made: efi.automount");
    fs::remove_dir_all(host.path("run/systemd")).unwrap();
    host.apply("gpt-auto").unwrap();
    let link = host.path("etc/systemd/system-generators/systemd-gpt-auto-generator");
    assert_eq!(fs::read_link(link).unwrap(), Path::new("/dev/null"));
}

#[test]
fn a_desktop_mounts_nothing() {
    let host = Fixture::new(9, false);
    host.apply("automount").unwrap();
    // udisks2 is kept away by the change `udev`, which is not made yet.
    let checked = host.check("automount");
    assert_eq!(checked.level, Level::Fail);
    assert!(
        checked
            .findings
            .iter()
            .any(|found| found.fix.starts_with("mt-agent setup apply --only udev --root /")),
        "{checked:?}"
    );
    host.apply("udev").unwrap();
    assert_eq!(host.check("automount").level, Level::Pass);
    host.write("etc/dconf/profile/user", "user-db:user\n");
    assert_eq!(host.check("automount").level, Level::Fail);
}

#[test]
fn nothing_is_written_for_what_is_not_installed() {
    let host = Fixture::new(9, false);
    fs::remove_dir_all(host.path("usr")).unwrap();
    let before = host.snapshot();
    for name in ["lvm", "multipath", "md", "gpt-auto", "automount"] {
        assert_eq!(host.apply(name), Ok(Vec::new()), "{name}");
        assert_eq!(host.check(name).level, Level::Pass, "{name}");
    }
    assert!(host.snapshot() == before);
}
