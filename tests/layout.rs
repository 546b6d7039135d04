//! What `inspect` and the maps say, against the tools that own the formats: `sfdisk`, `sgdisk`, `partx`, `blkid`, LVM's.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use mt_agent::layout::landmarks::Landmarks;
use mt_agent::layout::lvm::group::{Area, Group, Volume};
use mt_agent::layout::ranges::{Ranges, between};
use mt_agent::layout::tree::{Disk, Layout, read};
use mt_agent::storage::file::ReadFile;
use mt_agent::units::Extent;
use serde_json::Value;
use support::{GIB, Loop, MIB, directory, run};

/// Runs a line of shell, with the system's tools in its path.
#[track_caller]
fn sh(line: &str) -> String {
    let path = "/usr/sbin:/usr/bin:/sbin:/bin";
    support::succeed(Command::new("sh").args(["-ec", line]).env("PATH", path))
}

/// Whether a tool is installed, which is said where it is not.
fn has(program: &str) -> bool {
    let found =
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(program).exists());
    if !found {
        support::skipped(std::thread::current().name().unwrap(), &format!("{program} is not installed"));
    }
    found
}

fn sparse(path: &Path, size: u64) -> PathBuf {
    File::create(path).unwrap().set_len(size).unwrap();
    path.to_owned()
}

fn layout(paths: &[&Path]) -> Layout {
    let files: Vec<ReadFile> = paths.iter().map(|path| ReadFile::open(path).unwrap()).collect();
    let disks: Vec<Disk<'_>> =
        files.iter().map(|file| Disk { reader: file, sector: file.sector().unwrap() }).collect();
    read(&disks)
}

fn inspect(paths: &[&Path]) -> Value {
    let mut args = vec!["inspect", "--json"];
    args.extend(paths.iter().map(|path| path.to_str().unwrap()));
    run(&args).ok().json()
}

/// Number, first byte, length, type, PARTUUID, name and boot flag of every partition.
type Partition = (u64, u64, u64, String, String, Option<String>, bool);

fn ours(path: &Path) -> Vec<Partition> {
    let found = inspect(&[path]);
    let content = &found["disks"][0]["content"];
    assert_eq!((&content["type"], &content["flaw"]), (&"table".into(), &Value::Null), "{content:#}");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let partitions = content["partitions"].as_array().unwrap().iter();
    let mut all: Vec<Partition> = partitions
        .map(|one| {
            (
                one["number"].as_u64().unwrap(),
                one["offset"].as_u64().unwrap(),
                one["size"].as_u64().unwrap(),
                text(&one["kind"]),
                text(&one["uuid"]),
                one["name"].as_str().map(str::to_owned),
                one["bootable"].as_bool().unwrap(),
            )
        })
        .collect();
    all.sort_by_key(|one| one.0);
    all
}

fn theirs(path: &Path) -> (String, Vec<Partition>) {
    let node = path.to_str().unwrap();
    let dump: Value = serde_json::from_str(&sh(&format!("sfdisk --json {node}"))).unwrap();
    let table = &dump["partitiontable"];
    let uuids: BTreeMap<u64, String> = sh(&format!("partx -g -r -o NR,UUID {node}"))
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(number, uuid)| (number.parse().unwrap(), uuid.to_owned()))
        .collect();
    let sector = table["sectorsize"].as_u64().unwrap();
    let partitions = table["partitions"].as_array().unwrap().iter().map(|one| {
        let suffix = one["node"].as_str().unwrap().strip_prefix(node).unwrap().trim_start_matches('p');
        let number = suffix.parse().unwrap();
        let kind = one["type"].as_str().unwrap().to_lowercase();
        let kind = if table["label"] == "dos" { format!("0x{kind}") } else { kind };
        let attributes = one["attrs"].as_str().unwrap_or_default();
        (
            number,
            one["start"].as_u64().unwrap() * sector,
            one["size"].as_u64().unwrap() * sector,
            kind,
            uuids[&number].clone(),
            one["name"].as_str().map(str::to_owned),
            one["bootable"] == true || attributes.contains("LegacyBIOSBootable"),
        )
    });
    (table["id"].as_str().unwrap().to_owned(), partitions.collect())
}

const TABLES: &[&str] = &[
    "label: dos\n,100M,L,*\n,,8e\n",
    "label: dos\nstart=63,size=200000,type=83\n,50M,82\n,,E\n,20M,L\n,30M,L\n,20M,8e\n,,L\n",
    "label: dos\n,10M,L\n,10M,L\n,10M,L\n,,E\n,20M,L\n",
    "label: dos\n,,f\n,20M,L\n",
    "label: gpt\n,100M,U\n,1M,21686148-6449-6E6F-744E-656564454649\n,,L,*\n",
    "label: gpt\ntable-length: 1024\nsize=10M, name=\"root é\", attrs=\"LegacyBIOSBootable\"\n,20M,S\n",
    "label: gpt\n3: size=10M\n1: size=20M\n17: size=20M, uuid=01234567-89AB-CDEF-0123-456789ABCDEF\n",
    "label: gpt\nfirst-lba: 4096\n,10M\n",
];

#[test]
fn tables_are_those_that_sfdisk_shows() {
    if !has("sfdisk") {
        return;
    }
    let dir = directory();
    for (index, script) in TABLES.iter().enumerate() {
        let image = sparse(&dir.path().join(format!("{index}.img")), 500 * MIB);
        let script = script.replace('\n', "\\n").replace('"', "\\\"");
        sh(&format!("printf \"{script}\" | sfdisk -q {}", image.display()));
        let (id, partitions) = theirs(&image);
        // Where nothing lies on it yet, the size of the sectors is a guess; of a loop device it is not.
        mark(&image, partitions.iter().filter(|one| !["0x5", "0xf"].contains(&&*one.3)).map(|one| one.1));
        assert_eq!(ours(&image), partitions, "{script}");
        assert_eq!(inspect(&[&image])["disks"][0]["content"]["id"], id, "{script}");
    }
}

/// Puts swap's signature where partitions begin.
fn mark(image: &Path, places: impl Iterator<Item = u64>) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    places.for_each(|at| file.write_all_at(b"SWAPSPACE2", at + 4086).unwrap());
}

#[test]
fn tables_with_large_sectors_are_those_that_sfdisk_shows() {
    require_root!();
    if !has("sfdisk") {
        return;
    }
    let dir = directory();
    for (index, script) in TABLES.iter().enumerate().filter(|(_, script)| !script.contains("first-lba")) {
        let image = sparse(&dir.path().join(format!("{index}.img")), 4 * GIB);
        let disk = Loop::attach(&image, 4096);
        let script = script.replace('\n', "\\n").replace('"', "\\\"");
        sh(&format!(
            "printf \"{script}\" | sfdisk -q --no-reread --no-tell-kernel {}",
            disk.node().display()
        ));
        assert_eq!(ours(disk.node()), theirs(disk.node()).1, "{script}");
        if script.contains("gpt") {
            // A GPT says itself how large its sectors are.
            assert_eq!(ours(&image), ours(disk.node()));
        }
    }
}

#[test]
fn what_sgdisk_makes_and_repairs_is_read_in_between() {
    if !has("sgdisk") {
        return;
    }
    let dir = directory();
    let image = sparse(&dir.path().join("gpt.img"), 200 * MIB);
    let node = image.display();
    sh(&format!("sgdisk -n 1:2048:+20M -c 1:one -n 2:0:+30M -t 2:8e00 -n 5:0:0 -A 5:set:2 {node}"));
    let good = ours(&image);
    let of_sgdisk = |number: u64, key: &str| {
        let out = sh(&format!("sgdisk -i {number} {node}"));
        let line = out.lines().find(|line| line.starts_with(key)).unwrap();
        line.rsplit_once(": ").unwrap().1.split(' ').next().unwrap().to_lowercase()
    };
    assert_eq!(good.iter().map(|one| one.0).collect::<Vec<_>>(), [1, 2, 5]);
    for one in &good {
        assert_eq!(one.3, of_sgdisk(one.0, "Partition GUID code"));
        assert_eq!(one.4, of_sgdisk(one.0, "Partition unique GUID"));
        assert_eq!((one.1 / 512).to_string(), of_sgdisk(one.0, "First sector"));
        assert_eq!(((one.1 + one.2) / 512 - 1).to_string(), of_sgdisk(one.0, "Last sector"));
    }
    assert!(good[2].6);
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let end = 200 * MIB;
    let places = [
        ("Main header", "primary", 512 + 56),
        ("Main partition table", "primary", 1024),
        ("Backup header", "backup", end - 512 + 56),
        ("Backup partition table", "backup", end - 512 * 33),
    ];
    for (what, side, at) in places {
        let mut before = [0];
        file.read_exact_at(&mut before, at).unwrap();
        file.write_all_at(&[!before[0]], at).unwrap();
        let verified = Command::new("/usr/sbin/sgdisk").arg("-v").arg(&image).output().unwrap();
        let damaged = String::from_utf8(verified.stderr).unwrap();
        assert!(damaged.contains(&format!("{what}: ERROR")), "{damaged}");
        assert_eq!(ours(&image), good);
        let found = inspect(&[&image]);
        let notes = &found["disks"][0]["content"]["notes"];
        assert!(notes[0].as_str().unwrap().contains(side), "{what}: {notes}");
        file.write_all_at(&before, at).unwrap();
    }
    assert_eq!(inspect(&[&image])["disks"][0]["content"]["notes"], Value::Array(Vec::new()));
}

/// What is recognised by name has the type, version, UUID and label that `blkid` prints.
#[test]
fn names_are_those_of_blkid() {
    let makers = [
        ("mkswap", "mkswap -q -L 'my swap' IMG"),
        ("mkswap", "mkswap -q -p 65536 -U 01234567-89ab-cdef-0123-456789abcdef IMG"),
        ("mkfs.btrfs", "mkfs.btrfs -q -L 'b tree' IMG"),
        ("mkfs.vfat", "truncate -s 16M IMG && mkfs.vfat -F 12 -n SMALL IMG"),
        ("mkfs.vfat", "mkfs.vfat -F 16 -n 'AN EFI' IMG"),
        ("mkfs.vfat", "mkfs.vfat -F 32 -i 0badcafe IMG"),
        ("mkfs.vfat", "mkfs.vfat -F 32 -S 4096 -n LARGE IMG"),
        ("mkfs.ntfs", "mkfs.ntfs -q -F -f -L 'Wörk' IMG"),
        ("mkfs.ntfs", "mkfs.ntfs -q -F -f -c 65536 IMG"),
        ("xorriso", "mkdir IMG.d && echo a > IMG.d/a && xorriso -as mkisofs -quiet -V 'Plain' -o IMG IMG.d"),
        (
            "xorriso",
            "mkdir IMG.d && echo a > IMG.d/a && xorriso -as mkisofs -quiet -J -V 'With Joliet' -o IMG IMG.d",
        ),
        (
            "cryptsetup",
            "echo secret | cryptsetup luksFormat --type luks1 --pbkdf-force-iterations 1000 -q IMG -",
        ),
        (
            "cryptsetup",
            "echo secret | cryptsetup luksFormat --type luks2 --label 'a label' --pbkdf pbkdf2 \
             --pbkdf-force-iterations 1000 -q IMG -",
        ),
        ("make-bcache", "make-bcache -C IMG"),
        ("make-bcache", "make-bcache -B IMG"),
        ("mkfs.ext4", "mkfs.ext4 -q -b 4096 -O journal_dev -L external IMG"),
    ];
    let dir = directory();
    for (index, (program, line)) in makers.iter().enumerate() {
        if !has(program) {
            continue;
        }
        let image = sparse(&dir.path().join(format!("{index}.img")), 300 * MIB);
        sh(&line.replace("IMG", image.to_str().unwrap()));
        // The other formats put something else in place of letters that are not ASCII.
        let probed = sh(&format!("blkid -p -o udev {}", image.display()));
        let tags: BTreeMap<&str, String> = probed
            .lines()
            .filter_map(|line| line.strip_prefix("ID_FS_")?.split_once('='))
            .map(|(key, value)| (key, value.replace("\\x20", " ")))
            .collect();
        let found = inspect(&[&image]);
        let content = &found["disks"][0]["content"];
        assert_eq!(content["type"], "file-system", "{line}: {content:#}");
        for (key, tag) in
            [("kind", "TYPE"), ("version", "VERSION"), ("uuid", "UUID_ENC"), ("label", "LABEL_ENC")]
        {
            let known = tags.get(tag).map(String::as_str);
            // FAT12 and its like say so, and a version of the others is no harm where `blkid` has none.
            if key == "version" && known.is_none() {
                continue;
            }
            assert_eq!(content[key].as_str(), known, "{line}: {tag}");
        }
        assert!(content["whole"].is_string(), "{line}");
        assert_eq!(found["disks"][0]["free"], 0, "{line}");
    }
}

/// What no tool here makes, by its magic and what else `blkid` looks at; and over an ext4 that lies there still.
#[test]
fn what_no_tool_here_makes_has_the_name_that_blkid_has_for_it() {
    if !has("mkfs.ext4") {
        return;
    }
    let dir = directory();
    let size = 64 * MIB;
    let gfs = |format: u32, multi: u32| {
        let mut bytes = vec![0; 272];
        bytes[..4].copy_from_slice(b"\x01\x16\x19\x70");
        bytes[24..28].copy_from_slice(&format.to_be_bytes());
        bytes[28..32].copy_from_slice(&multi.to_be_bytes());
        bytes[160..171].copy_from_slice(b"cluster:one");
        bytes[256..].copy_from_slice(b"0123456789abcdef");
        bytes
    };
    let mut ocfs2 = vec![0; 352];
    ocfs2[..6].copy_from_slice(b"OCFSV2");
    ocfs2[194] = 90;
    ocfs2[272..278].copy_from_slice(b"shared");
    ocfs2[336..].copy_from_slice(b"fedcba9876543210");
    let drbd = |version: u8| [&[0; 60][..], &[0x83, 0x74, 0x02, version]].concat();
    let asm = [&[0; 32][..], b"ORCLDISK", b"DATA1"].concat();
    let ddf = [b"\xde\x11\xde\x11", &[0; 28][..], b"01.02.00"].concat();
    let cases: &[(u64, &[u8])] = &[
        (1024, &ocfs2),
        (2048, &ocfs2),
        (4096, &ocfs2),
        (8192, &ocfs2),
        (65536, &gfs(1801, 1900)),
        (65536, &gfs(1309, 1401)),
        (MIB, b"\x0d\xd0\x01\xc0\x05"),
        (size - 1024, b"Intel Raid ISM Cfg Sig. 1.3.00"),
        (size - 512, b"$XIDE$"),
        (size - 512, &ddf),
        (size - 257 * 512, &ddf),
        (size - 4096, &drbd(0x6b)),
        (size - 4096, &drbd(0x6c)),
        (0, &asm),
        (1024, b"\xf5\xfc\x01\xa5\x04"),
        (8192, b"\xa5\x01\xfc\xf5\0\0\0\x04"),
        (0, b"SnAp\x01"),
        (0, b"verity\0\0\x01\0\0\0"),
        (0, b"integrt\0\x01"),
        (0, b"HM\x01\0"),
        (0, b"HM\x02\0"),
        (0, b"\0\0\0ReFS\0"),
        (0, b"dmvdo001"),
        (4086, b"S1SUSPEND"),
        (65536 + 1372, b"\x19\x01\x54\x19"),
        (8192 + 1372, b"\x54\x19\x01\0"),
    ];
    let [plain, ext4] = ["plain", "ext4"].map(|name| sparse(&dir.path().join(name), size));
    sh(&format!("mkfs.ext4 -q -b 4096 {}", ext4.display()));
    assert_ne!(inspect(&[&ext4])["disks"][0]["free"], 0);
    for (at, bytes) in cases {
        let with = |image: &Path, look: &dyn Fn(&Path)| {
            let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
            let mut before = vec![0; bytes.len()];
            file.read_exact_at(&mut before, *at).unwrap();
            file.write_all_at(bytes, *at).unwrap();
            look(image);
            file.write_all_at(&before, *at).unwrap();
        };
        with(&plain, &|image| {
            let tag = |name: &str| sh(&format!("blkid -p -s {name} -o value {} || true", image.display()));
            let found = inspect(&[image]);
            let content = &found["disks"][0]["content"];
            assert_eq!(content["kind"], tag("TYPE"), "{at}: {content:#}");
            if ["gfs", "gfs2", "ocfs2"].contains(&content["kind"].as_str().unwrap()) {
                assert_eq!(
                    (&content["label"], &content["uuid"]),
                    (&tag("LABEL").into(), &tag("UUID").into())
                );
            }
            assert_eq!(found["disks"][0]["free"], 0);
        });
        // Whatever of the ext4 is left.
        with(&ext4, &|image| assert_eq!(inspect(&[image])["disks"][0]["free"], 0, "{at} over an ext4"));
    }
    assert_ne!(inspect(&[&ext4])["disks"][0]["free"], 0);
}

/// LVM's tools on loop devices; nothing is activated, for which the kernel need not know device mapper.
struct Lvm {
    disks: Vec<Loop>,
    system: tempfile::TempDir,
}

impl Lvm {
    fn new(dir: &Path, sizes: &[u64]) -> Lvm {
        let system = tempfile::tempdir_in(dir).unwrap();
        fs::write(
            system.path().join("lvm.conf"),
            format!(
                "devices {{ use_devicesfile = 0\n obtain_device_list_from_udev = 0\n external_device_info_source = \"none\"\n \
                 hints = \"none\" }}\n backup {{ backup = 0\n archive = 0 }}\n \
                 global {{ locking_dir = \"{0}\"\n use_lvmpolld = 0\n event_activation = 0 }}\n \
                 activation {{ udev_sync = 0\n udev_rules = 0\n monitoring = 0 }}\n",
                system.path().display()
            ),
        )
        .unwrap();
        let attach =
            |(index, size): (usize, &u64)| Loop::create(&system.path().join(format!("{index}.img")), *size);
        let disks = sizes.iter().enumerate().map(attach).collect();
        Lvm { disks, system }
    }

    fn node(&self, index: usize) -> &str {
        self.disks[index].node().to_str().unwrap()
    }

    /// Runs a command, in which `@N` is the disk with this number.
    #[track_caller]
    fn run(&self, command: &str) -> String {
        let mut command = command.to_owned();
        for index in 0..self.disks.len() {
            command = command.replace(&format!("@{index}"), self.node(index));
        }
        let (name, rest) = command.split_once(' ').unwrap_or((&command, ""));
        let disks: Vec<&str> = (0..self.disks.len()).map(|index| self.node(index)).collect();
        sh(&format!(
            "LVM_SYSTEM_DIR={} LVM_SUPPRESS_FD_WARNINGS=1 lvm {name} --driverloaded n --devices {} {rest}",
            self.system.path().display(),
            disks.join(",")
        ))
    }

    /// A report's rows.
    fn report(&self, command: &str) -> Vec<Value> {
        let text = self.run(&format!("{command} --reportformat json --units b --nosuffix"));
        let report: Value = serde_json::from_str(&text).unwrap();
        let (_, rows) = report["report"][0].as_object().unwrap().iter().next().unwrap();
        rows.as_array().unwrap().clone()
    }

    fn layout(&self) -> Layout {
        let paths: Vec<&Path> = self.disks.iter().map(Loop::node).collect();
        layout(&paths)
    }
}

fn number(row: &Value, key: &str) -> u64 {
    row[key].as_str().unwrap().parse().unwrap()
}

/// Every physical volume, logical volume and segment is what LVM's own reports say, the hidden ones too.
fn compare(lvm: &Lvm) -> Layout {
    let found = lvm.layout();
    assert_eq!(found.groups.len(), 1);
    let group = &found.groups[0].group;
    assert!(group.flaw.is_none(), "{:?}", group.flaw);
    let rows = lvm.report("vgs -o vg_name,vg_uuid,vg_seqno,vg_extent_size,pv_count,lv_count");
    assert_eq!(rows[0]["vg_name"], group.name);
    assert_eq!(rows[0]["vg_uuid"], group.uuid);
    assert_eq!(number(&rows[0], "vg_seqno"), group.seqno);
    assert_eq!(number(&rows[0], "vg_extent_size"), group.extent_size);

    let mut names = BTreeMap::new();
    for row in lvm.report("pvs -o pv_name,pv_uuid,pe_start,pv_pe_count,pv_mda_count,pv_ba_start,pv_ba_size") {
        let uuid = row["pv_uuid"].as_str().unwrap();
        let (index, member) =
            group.members.iter().enumerate().find(|(_, member)| member.uuid == uuid).unwrap();
        names.insert(row["pv_name"].as_str().unwrap().to_owned(), index);
        assert_eq!(number(&row, "pe_start"), member.extents.offset());
        assert_eq!(number(&row, "pv_pe_count") * group.extent_size, member.extents.len());
        let volume = &found.physical[member.found.unwrap()];
        assert_eq!(number(&row, "pv_mda_count"), volume.metadata_areas.len() as u64);
        let areas: Vec<(u64, u64)> =
            volume.boot_areas.iter().map(|area| (area.offset(), area.len())).collect();
        let (at, len) = (number(&row, "pv_ba_start"), number(&row, "pv_ba_size"));
        assert_eq!(areas, if len > 0 { vec![(at, len)] } else { Vec::new() });
    }

    let mut volumes: Vec<(String, String, u64, bool)> = lvm
        .report("lvs -a -o lv_name,lv_uuid,lv_size,lv_layout")
        .iter()
        .map(|row| {
            let name = row["lv_name"].as_str().unwrap();
            let uuid = row["lv_uuid"].as_str().unwrap().to_owned();
            // Hidden ones are in brackets.
            let plain = name.trim_matches(['[', ']']);
            (plain.to_owned(), uuid, number(row, "lv_size"), plain == name)
        })
        .collect();
    volumes.sort();
    volumes.dedup();
    let mut own: Vec<(String, String, u64, bool)> = group
        .volumes
        .iter()
        .filter(|volume| is_reported(volume))
        .map(|volume| (volume.name.clone(), volume.uuid.clone(), volume.size, volume.visible))
        .collect();
    own.sort();
    assert_eq!(own, volumes);
    assert_eq!(segments(group), their_segments(lvm, &names));
    found
}

/// LVM shows no volume for the link between a snapshot and its origin.
fn is_reported(volume: &Volume) -> bool {
    volume.kinds() != ["snapshot"]
}

/// Volume, first byte, length, type, and for those on physical volumes the unit of stripes and their places.
type Segments = Vec<(String, u64, u64, String, u64, Vec<(usize, u64)>)>;

fn segments(group: &Group) -> Segments {
    let mut all = Vec::new();
    for volume in group.volumes.iter().filter(|volume| is_reported(volume)) {
        for segment in &volume.segments {
            let stripes = segment.stripes.as_ref();
            let unit = stripes.filter(|stripes| stripes.areas.len() > 1).map_or(0, |stripes| stripes.unit);
            let place = |area: &Area| {
                let begin = group.members[area.member].extents.offset();
                (area.member, (area.extent.offset() - begin) / group.extent_size)
            };
            let places = stripes.map_or(Vec::new(), |stripes| stripes.areas.iter().map(place).collect());
            let extent = segment.extent;
            all.push((
                volume.name.clone(),
                extent.offset(),
                extent.len(),
                segment.kind.clone(),
                unit,
                places,
            ));
        }
    }
    all.sort();
    all
}

fn their_segments(lvm: &Lvm, names: &BTreeMap<String, usize>) -> Segments {
    let rows =
        lvm.report("lvs -a --segments -o lv_name,seg_start,seg_size,segtype,stripes,stripe_size,devices");
    let mut all: Segments = rows
        .iter()
        .map(|row| {
            let name = row["lv_name"].as_str().unwrap().trim_matches(['[', ']']).to_owned();
            let kind = row["segtype"].as_str().unwrap().to_owned();
            let on_disks = ["linear", "striped"].contains(&&*kind);
            let place = |text: &str| {
                let (device, at) = text.trim_end_matches(')').rsplit_once('(').unwrap();
                (names[device], at.parse().unwrap())
            };
            let places = match on_disks {
                true => row["devices"].as_str().unwrap().split(',').map(place).collect(),
                false => Vec::new(),
            };
            let unit = if kind == "striped" { number(row, "stripe_size") } else { 0 };
            (name, number(row, "seg_start"), number(row, "seg_size"), kind, unit, places)
        })
        .collect();
    all.sort();
    all
}

#[test]
fn linear_and_striped_volumes_lie_where_lvm_says() {
    require_root!();
    if !has("lvm") {
        return;
    }
    let dir = directory();
    let lvm = Lvm::new(dir.path(), &[200 * MIB, 300 * MIB, 260 * MIB]);
    lvm.run("pvcreate --bootloaderareasize 3m @0");
    lvm.run("pvcreate --pvmetadatacopies 2 --metadatasize 4m @1");
    lvm.run("pvcreate --dataalignment 512k @2");
    lvm.run("vgcreate -s 1m vg @0 @1 @2");
    lvm.run("lvcreate -an -Zn -y -L 40m -n root vg @0");
    lvm.run("lvcreate -an -Zn -y -i 3 -I 64k -L 60m -n striped vg");
    lvm.run("lvcreate -an -Zn -y -L 30m -n gone vg @1");
    lvm.run("lvcreate -an -Zn -y -L 30m -n after vg @1");
    compare(&lvm);
    lvm.run("lvremove -y vg/gone");
    // Over the gap and on to another disk.
    lvm.run("lvextend -L 250m vg/root");
    lvm.run("lvextend -i 2 -I 8k -L 100m vg/striped @1 @2");
    let found = compare(&lvm);
    // Free are the extents that nobody has, but for the ends of a disk.
    let group = &found.groups[0].group;
    let mut free: BTreeMap<String, Vec<Extent>> = BTreeMap::new();
    for row in lvm.report("pvs --segments -o pv_uuid,pvseg_start,pvseg_size,lv_name") {
        let uuid = row["pv_uuid"].as_str().unwrap().to_owned();
        let member = group.members.iter().find(|member| member.uuid == uuid).unwrap();
        let [at, len] = ["pvseg_start", "pvseg_size"].map(|key| number(&row, key) * group.extent_size);
        let extent = Extent::new(member.extents.offset() + at, len).unwrap();
        // What lies there has the name that LVM has for it.
        let named = match row["lv_name"].as_str().unwrap() {
            "" => "the disk (volume group vg, outside of its logical volumes)".to_owned(),
            name => format!("logical volume vg/{name}"),
        };
        assert_eq!(Landmarks::of(&found, member.found.unwrap()).at(extent), [named]);
        free.entry(uuid).or_default().extend((row["lv_name"] == "").then_some(extent));
    }
    assert!(free.values().any(|free| !free.is_empty()));
    for member in &group.members {
        let index = member.found.unwrap();
        let size = lvm.disks[index].backing().metadata().unwrap().len();
        let ends: Ranges = [between(0, MIB), between(size - MIB, size)].into_iter().flatten().collect();
        let free: Ranges = free[&member.uuid].iter().copied().collect();
        let used = found.used(index).unwrap();
        assert_eq!(used.complement(Extent::new(0, size).unwrap()), free.subtract(&ends));
    }
}

/// A small ring, in which the text is soon at the end and goes on at the beginning.
#[test]
fn metadata_is_followed_around_the_end_of_its_ring() {
    require_root!();
    if !has("lvm") {
        return;
    }
    let dir = directory();
    let lvm = Lvm::new(dir.path(), &[100 * MIB]);
    lvm.run("pvcreate --metadatasize 10k --dataalignment 64k @0");
    lvm.run("vgcreate ring @0");
    let disk = File::open(lvm.disks[0].backing()).unwrap();
    let wraps = || {
        let mut header = [0; 64];
        disk.read_exact_at(&mut header, 4096).unwrap();
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        number(40) + number(48) > number(32)
    };
    let mut changes = 0;
    while !wraps() {
        changes += 1;
        assert!(changes < 40, "the text never comes to the end of its ring");
        lvm.run(&format!("vgchange --addtag tag-{changes}-{} ring", "long".repeat(changes)));
    }
    compare(&lvm);
}

/// LVM's tools make volumes of these kinds only where the kernel knows device mapper; but they restore any metadata that
/// they understand.
#[test]
fn thin_cache_raid_mirror_and_snapshot_are_named_and_used() {
    require_root!();
    if !has("lvm") {
        return;
    }
    let dir = directory();
    let lvm = Lvm::new(dir.path(), &[200 * MIB, 200 * MIB]);
    lvm.run("pvcreate @0 @1");
    lvm.run("vgcreate -s 1m vg @0 @1");
    lvm.run("lvcreate -an -Zn -Wn -y -L 8m -n plain vg @0");
    let file = dir.path().join("metadata");
    lvm.run(&format!("vgcfgbackup -f {} vg", file.display()));
    let mut volumes = Volumes { text: String::new(), next: 20 };
    let kinds = [
        (
            "raid",
            "raid1",
            4,
            "device_count = 2 region_size = 1024 raids = [\"raid_rmeta_0\", \"raid_rimage_0\", \"raid_rmeta_1\", \"raid_rimage_1\"]",
        ),
        (
            "pool",
            "thin-pool",
            4,
            "metadata = \"pool_tmeta\" pool = \"pool_tdata\" transaction_id = 1 chunk_size = 128 discards = \"passdown\" \
             zero_new_blocks = 1",
        ),
        ("thin", "thin", 20, "thin_pool = \"pool\" transaction_id = 0 device_id = 1"),
        ("cached", "cache", 6, "cache_pool = \"cpool\" origin = \"cached_corig\""),
        (
            "mirrored",
            "mirror",
            4,
            "mirror_count = 2 mirror_log = \"mirrored_mlog\" region_size = 1024 mirrors = [\"mirrored_mimage_0\", 0, \"mirrored_mimage_1\", 0]",
        ),
        ("snapshot0", "snapshot", 4, "chunk_size = 8 origin = \"origin\" cow_store = \"cow\""),
    ];
    for (name, kind, extents, fields) in kinds {
        volumes.add(name, true, extents, &format!("type = \"{kind}\" {fields}"));
    }
    let pool = "data = \"cpool_cdata\" metadata = \"cpool_cmeta\" chunk_size = 128 metadata_format = 2 cache_mode = \"writethrough\" \
        policy = \"smq\"";
    volumes.add("cpool", false, 3, &format!("type = \"cache-pool\" {pool}"));
    let parts = [
        ("raid_rmeta_0", 1),
        ("raid_rimage_0", 4),
        ("raid_rmeta_1", 1),
        ("raid_rimage_1", 4),
        ("pool_tmeta", 4),
        ("pool_tdata", 4),
        ("cached_corig", 6),
        ("cpool_cdata", 3),
    ];
    for (name, extents) in parts.into_iter().chain([
        ("cpool_cmeta", 8),
        ("mirrored_mlog", 1),
        ("mirrored_mimage_0", 4),
        ("mirrored_mimage_1", 4),
    ]) {
        volumes.linear(name, false, extents);
    }
    volumes.linear("origin", true, 4);
    volumes.linear("cow", true, 4);
    let text = fs::read_to_string(&file).unwrap();
    let head = "logical_volumes {";
    assert!(text.contains(head));
    fs::write(&file, text.replacen(head, &format!("{head}\n{}", volumes.text), 1)).unwrap();
    lvm.run(&format!("vgcfgrestore --force -f {} vg", file.display()));
    let found = compare(&lvm);
    let one = &found.groups[0];
    for (volume, content) in one.group.volumes.iter().zip(&one.contents) {
        assert_eq!(content.is_some(), volume.name == "plain", "{}", volume.name);
    }
    for (name, kind, ..) in kinds {
        let volume = one.group.volumes.iter().find(|volume| volume.name == name).unwrap();
        assert_eq!(volume.kinds(), [kind]);
    }
    // All of the second disk that has an extent of theirs.
    let used = found.used(one.group.members[1].found.unwrap()).unwrap();
    let taken = between(21 * MIB, (1 + volumes.next) * MIB).unwrap();
    assert!(used.covers(taken));
    let rest = between(taken.end(), 199 * MIB).unwrap();
    assert_eq!(used.intersect(&[rest].into_iter().collect()), Ranges::new());
}

/// The text of logical volumes; those that lie on disks lie one after the other on the second.
struct Volumes {
    text: String,
    next: u64,
}

impl Volumes {
    fn add(&mut self, name: &str, visible: bool, extents: u64, segment: &str) {
        let status = if visible { ", \"VISIBLE\"" } else { "" };
        // Any 32 letters and digits, as long as they are nobody else's.
        let letters = format!("{name:x<32}").replace('_', "y");
        let id = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32].map(|range| &letters[range]).join("-");
        self.text.push_str(&format!(
            "{name} {{\n id = \"{id}\"\n status = [\"READ\", \"WRITE\"{status}]\n flags = []\n segment_count = 1\n \
             segment1 {{\n start_extent = 0\n extent_count = {extents}\n {segment}\n }}\n}}\n"
        ));
    }

    fn linear(&mut self, name: &str, visible: bool, extents: u64) {
        let at = self.next;
        self.next += extents;
        self.add(
            name,
            visible,
            extents,
            &format!("type = \"striped\" stripe_count = 1 stripes = [\"pv1\", {at}]"),
        );
    }
}

/// Copies one image into another, holes aside.
fn embed(image: &Path, part: &Path, at: u64) {
    let seek = format!("oflag=seek_bytes seek={at} bs=1M conv=notrunc,sparse status=none");
    sh(&format!("dd if={} of={} {seek}", part.display(), image.display()));
}

/// A disk as installers make them, as one command shows it.
#[test]
fn inspect_shows_all_of_a_disk_and_writes_nothing() {
    require_root!();
    if !(has("lvm") && has("sfdisk") && has("mkfs.vfat")) {
        return;
    }
    let dir = directory();
    let image = &sparse(&dir.path().join("disk.img"), GIB);
    let script = "label: gpt\\n,100M,U\\n,2M,21686148-6449-6E6F-744E-656564454649\\n,600M,V\\n";
    sh(&format!("printf '{script}' | sfdisk -q {}", image.display()));
    let efi = sparse(&dir.path().join("efi.img"), 100 * MIB);
    sh(&format!("mkfs.vfat -i 0badcafe -n EFI {}", efi.display()));
    embed(image, &efi, MIB);
    let lvm = Lvm::new(dir.path(), &[600 * MIB]);
    lvm.run("vgcreate -s 1m rhel @0");
    lvm.run("lvcreate -an -Zn -Wn -y -L 50m -n swap rhel");
    lvm.run("lvcreate -an -Zn -Wn -y -L 100m -n root rhel");
    let swap = sparse(&dir.path().join("swap.img"), 50 * MIB);
    sh(&format!("mkswap -q -L 'my swap' -U 01234567-89ab-cdef-0123-456789abcdef {}", swap.display()));
    embed(lvm.disks[0].backing(), &swap, MIB);
    embed(image, lvm.disks[0].backing(), 103 * MIB);

    let disk = Loop::attach(image, 512);
    sh(&format!("sync -f {}", image.display()));
    let before = (fs::read(image).unwrap(), fs::metadata(image).unwrap().modified().unwrap());
    disk.set_read_only(true);
    let text = run(&["inspect", disk.node().to_str().unwrap()]).ok().stdout;
    let found = inspect(&[disk.node()]);
    assert_eq!(before, (fs::read(image).unwrap(), fs::metadata(image).unwrap().modified().unwrap()));

    let lines = [
        " 1.0 GiB GPT ",
        "├─ 1 (EFI system) at 1.0 MiB 100.0 MiB vfat FAT16 LABEL=\"EFI\" UUID=0BAD-CAFE; blocks of 512 B",
        "├─ 2 (BIOS boot) at 101.0 MiB 2.0 MiB nothing that is known",
        "├─ 3 (Linux LVM) at 103.0 MiB 600.0 MiB LVM2 physical volume of volume group rhel UUID=",
        "└─ 256.0 MiB of 1.0 GiB are used, 768.0 MiB are proven free",
        "volume group rhel 1 of 1 physical volumes are here, extents of 1.0 MiB, UUID=",
        "├─ root (linear) 100.0 MiB nothing that is known",
        "└─ swap (linear) 50.0 MiB swap 1 LABEL=\"my swap\" UUID=01234567-89ab-cdef-0123-456789abcdef; blocks of 4.0 KiB",
        "   └─ all of it is taken as used: what swap holds cannot be followed",
    ];
    for line in lines {
        assert!(text.contains(line), "`{line}` is not in\n{text}");
    }
    assert_eq!(found["schema_version"], 1);
    // The last sectors are the table's, and the gap before them ends with a MiB that is used.
    let backup = 33 * 512;
    let free = 768 * MIB - backup;
    assert_eq!(
        (&found["disks"][0]["used"], &found["disks"][0]["free"]),
        (&(GIB - free).into(), &free.into())
    );
    let volume = &found["disks"][0]["content"]["partitions"][2]["content"];
    assert_eq!((&volume["type"], &volume["group"]), (&"physical-volume".into(), &"rhel".into()));
    let volumes = &found["volume_groups"][0]["logical_volumes"];
    assert_eq!((&volumes[1]["content"]["kind"], &volumes[1]["kinds"][0]), (&"swap".into(), &"linear".into()));
    assert_eq!(volumes[1]["content"]["size"], 50 * MIB);
    // The same of the image, which says nothing of its sectors.
    assert_eq!(inspect(&[image])["disks"][0]["free"], free);

    let used = layout(&[image]).used(0).unwrap();
    let expected = [(0, 254 * MIB), (703 * MIB, 704 * MIB), (1023 * MIB - backup, GIB)];
    let expected: Ranges = expected.into_iter().filter_map(|(from, to)| between(from, to)).collect();
    assert_eq!(used, expected);
}

#[test]
fn what_is_no_disk_is_an_error_and_an_empty_one_is_not() {
    let dir = directory();
    let missing = dir.path().join("missing");
    run(&["inspect", missing.to_str().unwrap()]).fails(1, &["open", "missing", "No such file"]);
    let pipe = dir.path().join("pipe");
    sh(&format!("mkfifo {}", pipe.display()));
    for path in [pipe.as_path(), dir.path(), Path::new("/dev/null")] {
        run(&["inspect", path.to_str().unwrap()]).fails(1, &["it is no block device and no regular file"]);
    }
    run(&["inspect"]).fails(2, &["<DISK>"]);
    let empty = sparse(&dir.path().join("empty"), 0);
    assert_eq!(inspect(&[&empty])["disks"][0]["content"]["type"], "unknown");
    let text = run(&["inspect", empty.to_str().unwrap()]).ok().stdout;
    assert!(text.contains("0 B of 0 B are used"), "{text}");
}

#[test]
fn what_holds_a_disk_is_said() {
    require_root!();
    let dir = directory();
    let disk = Loop::create(&dir.path().join("disk.img"), 64 * MIB);
    sh(&format!("mkfs.ext4 -q {}", disk.node().display()));
    let at = dir.path().join("mounted");
    let mount = support::Mount::new(disk.node(), &at);
    let expected = format!("is mounted on {}", at.display());
    for path in [disk.node(), disk.backing()] {
        let notes = inspect(&[path])["disks"][0]["notes"].clone();
        assert!(notes[0].as_str().unwrap().contains(&expected), "{notes}");
        let text = run(&["inspect", path.to_str().unwrap()]).ok().stdout;
        assert!(text.contains(&expected) && !text.contains("are proven free"), "{text}");
        assert!(
            text.contains("are free as it stands on the disk at this moment, which is only proven"),
            "{text}"
        );
    }
    drop(mount);
    assert_eq!(inspect(&[disk.node()])["disks"][0]["notes"], Value::Array(Vec::new()));
    assert!(run(&["inspect", disk.node().to_str().unwrap()]).ok().stdout.contains("are proven free"));
}

/// What a file system counted before its log was written is not said as though it were so now.
#[test]
fn what_cannot_be_followed_is_not_counted_as_certain() {
    if !has("mkfs.xfs") {
        return;
    }
    let dir = directory();
    let image = sparse(&dir.path().join("xfs"), 300 * MIB);
    sh(&format!("mkfs.xfs -q {}", image.display()));
    let text = || run(&["inspect", image.to_str().unwrap()]).ok().stdout;
    assert!(text().contains(" free; clean;") && !text().contains("last count"), "{}", text());
    // The head of its log is of no cycle.
    let log = sh(&format!(
        "xfs_db -r -c 'sb 0' -c 'convert fsblock '$(xfs_db -r -c 'sb 0' -c 'p logstart' {0} | sed 's/.*= //')' byte' {0}",
        image.display()
    ));
    let hex = log.split(['(', ')']).next().unwrap().trim().trim_start_matches("0x").to_owned();
    let at = u64::from_str_radix(&hex, 16).unwrap();
    OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[0; 512], at).unwrap();
    let text = text();
    assert!(
        text.contains(" free by its last count, which may be old; its journal is to be replayed"),
        "{text}"
    );
    assert!(text.contains("all of it is taken as used"), "{text}");
}

/// Of a group that cannot be followed it is not said that none of no volumes is here.
#[test]
fn a_group_whose_volumes_are_not_known_says_so() {
    require_root!();
    if !has("lvm") {
        return;
    }
    let dir = directory();
    let lvm = Lvm::new(dir.path(), &[64 * MIB]);
    lvm.run("vgcreate -s 1m vg @0");
    let text = |path: &Path| run(&["inspect", path.to_str().unwrap()]).ok().stdout;
    let good = text(lvm.disks[0].backing());
    assert!(
        good.contains("volume group vg 1 of 1 physical volumes are here, extents of 1.0 MiB, UUID="),
        "{good}"
    );
    // The metadata says of another size that there are none of it.
    let mut bytes = fs::read(lvm.disks[0].backing()).unwrap();
    let begin = bytes.windows(4).position(|four| four == b"vg {").unwrap();
    let end = begin + bytes[begin..].iter().position(|byte| *byte == 0).unwrap();
    let old = bytes[begin..end].windows(18).position(|some| some == b"extent_size = 2048").unwrap() + begin;
    bytes[old..old + 18].copy_from_slice(b"extent_size = 0000");
    let area = 4096;
    let whole = mt_agent::layout::lvm::checksum(&bytes[begin..end + 1]).to_le_bytes();
    bytes[area + 56..area + 60].copy_from_slice(&whole);
    let header = mt_agent::layout::lvm::checksum(&bytes[area + 4..area + 512]).to_le_bytes();
    bytes[area..area + 4].copy_from_slice(&header);
    let image = dir.path().join("broken");
    fs::write(&image, &bytes).unwrap();
    let broken = text(&image);
    assert!(broken.contains("volume group vg whose physical volumes are not known, UUID="), "{broken}");
    assert!(broken.contains("a volume group without an id or an extent_size"), "{broken}");
}

#[test]
fn a_disk_of_two_terabytes_takes_less_than_a_second() {
    require_root!();
    if !(has("lvm") && has("sfdisk")) {
        return;
    }
    let dir = directory();
    let lvm = Lvm::new(dir.path(), &[2048 * GIB]);
    lvm.run("vgcreate vg @0");
    for index in 0..20 {
        lvm.run(&format!("lvcreate -an -Zn -Wn -y -L 90g -n volume{index} vg"));
    }
    let table = sparse(&dir.path().join("table.img"), 2048 * GIB);
    let script: String = (0..30).map(|_| ",60G\\n").collect();
    sh(&format!("printf 'label: gpt\\n{script}' | sfdisk -q {}", table.display()));
    // Of CPU time; to read all of it would take hours.
    let (program, disk) = (env!("CARGO_BIN_EXE_mt-agent"), lvm.disks[0].node().display());
    let line = format!("ulimit -t 1; {program} inspect --json {disk} {}", table.display());
    let found: Value = serde_json::from_str(&sh(&line)).unwrap();
    assert_eq!(found["volume_groups"][0]["logical_volumes"].as_array().unwrap().len(), 20);
    assert_eq!(found["disks"][1]["content"]["partitions"].as_array().unwrap().len(), 30);
}
