//! Who is seen writing to a source: through maps, and past its partitions.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::harness::small;
use crate::lio::{Identity, Store, Target};
use crate::mapped::Mapped;
use crate::roles::kernel_name;
use crate::support::{MIB, Mount, Rig, tool, wait_for, write_random};

#[test]
fn writes_past_a_partition_and_mounts_of_maps_are_seen() {
    small().without_udev().run(|_| {
        let rig = Rig::new(&[8 * MIB]);
        let target = Target::new();
        let lun = target.attach(0, &Store::file(&rig.path("source.img"), 64 * MIB, &Identity::vmware(0)));
        let disk = lun.node();
        let table = "label: gpt\\nsize=8MiB\\nsize=32MiB\\n";
        tool("sh", &["-c", &format!("printf '{table}' | sfdisk -q {}", disk.display())]);
        let part = |number: u32| PathBuf::from(format!("{}{number}", disk.display()));
        let (one, two) = (part(1), part(2));
        wait_for("the partitions", || two.exists().then_some(()));
        let [first, second] = [&one, &two].map(|part| {
            let name = part.file_name().unwrap().to_str().unwrap();
            let sectors = fs::read_to_string(format!("/sys/class/block/{name}/start")).unwrap();
            512 * sectors.trim().parse::<u64>().unwrap()
        });
        write_random(&one, 0, 8 * MIB);
        // Nobody uses the map yet, and so it is no reason not to believe the disk, which it has claimed.
        let map = Mapped::new("thing", &disk, 0, 64 * MIB);
        assert_eq!((rig.users(&disk), rig.users(&one)), (vec![], vec![]));
        let slow = ["--whole", "--compression", "off", "--bwlimit", "3M"];
        let seen_to_write = |to: &Path, at: u64| {
            let send = rig.start_into_pass(&[("d0", &one)], &slow);
            send.standing_still(|| {
                let file = OpenOptions::new().write(true).open(to).unwrap();
                file.write_all_at(&[0x5a; 4096], at).unwrap();
                file.sync_all().unwrap();
            });
            send.finish().ok().stderr.contains("somebody wrote to the source while it was read")
        };
        assert!(seen_to_write(&map.node(), first + 2 * MIB), "a map of the whole disk");
        // What is another partition's is written to all the time.
        assert!(!seen_to_write(&two, 2 * MIB), "another partition");
        drop(map);
        tool("dmsetup", &["remove", "thing"]);

        // Of a partition, by one that lies on its disk.
        let map = Mapped::new("part", &disk, second, 32 * MIB);
        tool("mkfs.ext4", &["-q", map.node().to_str().unwrap()]);
        let mnt = rig.path("mnt");
        let mount = Mount::new(&map.node(), &mnt);
        let (dm, sd) = (kernel_name(map.node().to_str().unwrap()), lun.name());
        let said = format!("{dm} (part) on {sd} is mounted on {}", mnt.display());
        assert_eq!((rig.users(&disk), rig.users(&two)), (vec![said.clone()], vec![said]));
        assert_eq!(rig.users(&map.node()), [format!("{dm} (part) is mounted on {}", mnt.display())]);
        drop(mount);
        wait_for("nobody", || rig.users(&disk).is_empty().then_some(()));
        tool("dmsetup", &["remove", "part"]);
    });
}
