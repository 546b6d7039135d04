//! A logical volume that is striped over two disks, which are sent without what is free: the kernel puts it together again
//! from the copies.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use mt_agent::layout::tree::{Content, Disk, read};
use mt_agent::layout::{Allocation, FileSystem};
use mt_agent::storage::file::ReadFile;

use crate::harness::small;
use crate::support::{Loop, MIB, Mount, Rig, noise, tool};

/// Runs one of LVM's commands, for which there are these two disks and no others.
fn lvm(disks: &[&Path; 2], command: &str) {
    let config =
        "activation { udev_sync = 0\n udev_rules = 0\n monitoring = 0 } backup { backup = 0\n archive = 0 }";
    let [one, other] = disks.map(|disk| disk.to_str().unwrap());
    let command = command.replace("DISKS", &format!("{one} {other}"));
    let (name, rest) = command.split_once(' ').unwrap();
    tool("sh", &["-c", &format!("lvm {name} -qq --devices {one},{other} --config '{config}' {rest}")]);
}

fn name(index: u64) -> String {
    format!("file {index}")
}

/// Files begin and end within stripes, and their blocks do in no order.
fn content(index: u64) -> Vec<u8> {
    noise(index, (20 << 10) + 1021 * index as usize)
}

/// How many files are written; each third of them is removed again.
const FILES: u64 = 150;

#[test]
fn a_striped_volume_is_put_together_from_what_was_sent_of_its_disks() {
    small().without_udev().run(|_| {
        tool("modprobe", &["dm-mod"]);
        let size = 96 * MIB;
        let rig = Rig::new(&[size, size]);
        let sources = ["source0", "source1"].map(|name| Loop::create(&rig.path(name), size));
        let nodes = sources.each_ref().map(Loop::node);
        lvm(&nodes, "vgcreate -s 1m vg DISKS");
        // The stripes lie at different places of their disks.
        lvm(&nodes, &format!("lvcreate -an -y -Zn -Wn -L 5m -n first vg {}", nodes[1].display()));
        lvm(&nodes, "lvcreate -y -Zn -Wn -i 2 -I 64k -L 120m -n data vg");
        let (volume, mounted) = (Path::new("/dev/vg/data"), rig.path("mounted"));
        tool("mkfs.ext4", &["-q", volume.to_str().unwrap()]);
        let mount = Mount::new(volume, &mounted);
        for index in 0..FILES {
            fs::write(mounted.join(name(index)), content(index)).unwrap();
        }
        (0..FILES).step_by(3).for_each(|index| fs::remove_file(mounted.join(name(index))).unwrap());
        drop(mount);
        lvm(&nodes, "vgchange -an vg");

        let sent = rig.send(&[("d0", nodes[0]), ("d1", nodes[1])], &["--json"]).ok().json();
        let files = sources.each_ref().map(|source| ReadFile::open(source.backing()).unwrap());
        let layout = read(&files.each_ref().map(|reader| Disk { reader, sector: Some(512) }));
        let known = |content: &Option<Content>| {
            matches!(content, Some(Content::FileSystem(FileSystem { allocation: Allocation::Known(_), .. })))
        };
        assert_eq!(layout.groups[0].contents.iter().filter(|content| known(content)).count(), 1);
        for (index, source) in sources.iter().enumerate() {
            let disk = &sent["disks"][index];
            assert!(disk["skipped_bytes"].as_u64() > Some(40 * MIB), "{disk:#}");
            // On the second one, the volume in which there is nothing.
            assert_eq!(disk["not_skipped"].as_array().unwrap().len(), index, "{disk:#}");
            rig.synchronized(&format!("d{index}"));
            let read = |path: &Path, at, len| {
                let mut bytes = vec![0; len];
                File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
                bytes
            };
            for range in layout.used(index).unwrap().iter() {
                let [ours, theirs] = [source.backing(), rig.targets[index].backing()]
                    .map(|path| read(path, range.offset(), range.len() as usize));
                assert!(ours == theirs, "{range} of disk {index}");
            }
        }

        // The kernel must not see the same volume group twice.
        drop(sources);
        let targets =
            rig.targets.iter().map(|target| Loop::attach(target.backing(), 512)).collect::<Vec<_>>();
        let nodes = [targets[0].node(), targets[1].node()];
        lvm(&nodes, "vgchange -ay vg");
        tool("e2fsck", &["-fn", volume.to_str().unwrap()]);
        let mount = Mount::new(volume, &mounted);
        for index in (0..FILES).filter(|index| index % 3 != 0) {
            assert!(fs::read(mounted.join(name(index))).unwrap() == content(index), "{}", name(index));
        }
        assert_eq!(fs::read_dir(&mounted).unwrap().count(), FILES as usize * 2 / 3 + 1);
        drop(mount);
        lvm(&nodes, "vgchange -an vg");
    });
}
