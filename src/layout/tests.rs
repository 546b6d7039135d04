//! Disks made by hand: for each rule that a table or a label keeps, one field is changed, and the error is that one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

use proptest::prelude::*;

use super::lvm::{self, group::Group};
use super::ranges::{Ranges, between};
use super::table::Table;
use super::tree::{Content, Disk, Layout, Place, read};
use super::view::View;
use super::{Allocation, Error, FileSystem};
use crate::checksum::crc32;
use crate::error::IoError;
use crate::storage::ReadAt;

const MIB: u64 = 1 << 20;

/// A disk in memory.
#[derive(Clone)]
struct Image(Vec<u8>);

impl Image {
    fn new(size: u64) -> Image {
        Image(vec![0; size as usize])
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Image {
        self.0[at as usize..][..bytes.len()].copy_from_slice(bytes);
        self
    }

    fn get(&self, at: u64, len: u64) -> &[u8] {
        &self.0[at as usize..][..len as usize]
    }

    fn layout(&self, sector: Option<u64>) -> Layout {
        read(&[Disk { reader: self, sector }])
    }
}

impl ReadAt for Image {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        buf.copy_from_slice(self.get(offset, buf.len() as u64));
        Ok(())
    }
}

fn ranges(all: &[(u64, u64)]) -> Ranges {
    all.iter().map(|(from, to)| between(*from, *to).unwrap()).collect()
}

/// What an error says, and where.
#[track_caller]
fn says(error: Option<&Error>, what: &str) {
    let error = error.expect("nothing is wrong with it");
    assert!(error.to_string().starts_with(what), "`{error}` and not `{what}`");
}

fn table(layout: &Layout) -> &Table {
    match &layout.disks[0].content {
        Content::Table { table, .. } => table,
        other => panic!("{other:?}"),
    }
}

/// An entry of a boot record.
fn entry(kind: u8, first: u32, count: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4] = kind;
    bytes[8..12].copy_from_slice(&first.to_le_bytes());
    bytes[12..].copy_from_slice(&count.to_le_bytes());
    bytes
}

fn boot_record(image: &mut Image, at: u64, entries: &[[u8; 16]]) {
    image.put(at + 510, &[0x55, 0xaa]);
    for (index, entry) in entries.iter().enumerate() {
        image.put(at + 446 + 16 * index as u64, entry);
    }
}

const EXTENDED: u64 = 20 * MIB;
const SECOND: u64 = 30 * MIB;

/// A disk of 64 MiB: 1 to 5 MiB, and from 20 to 50 MiB two logical ones, each with a MiB before it.
fn dos() -> Image {
    let mut image = Image::new(64 * MIB);
    image.put(440, &0x1234_abcdu32.to_le_bytes());
    boot_record(&mut image, 0, &[entry(0x83, 2048, 8192), entry(5, 40960, 61440)]);
    image.0[446] = 0x80;
    boot_record(&mut image, EXTENDED, &[entry(0x83, 2048, 4096), entry(5, 20480, 10240)]);
    boot_record(&mut image, SECOND, &[entry(0x82, 2048, 8192)]);
    image
}

#[test]
fn a_dos_table_has_its_logical_partitions() {
    let layout = dos().layout(Some(512));
    let table = table(&layout);
    assert!(table.flaw.is_none(), "{:?}", table.flaw);
    assert_eq!((table.kind, table.id.as_deref()), ("dos", Some("0x1234abcd")));
    let found: Vec<(u32, u64, u64, &str, bool)> = (table.partitions.iter())
        .map(|one| (one.number, one.extent.offset(), one.extent.len(), one.kind.as_str(), one.bootable))
        .collect();
    let expected = [
        (1, MIB, 4 * MIB, "0x83", true),
        (2, EXTENDED, 30 * MIB, "0x5", false),
        (5, EXTENDED + MIB, 2 * MIB, "0x83", false),
        (6, SECOND + MIB, 4 * MIB, "0x82", false),
    ];
    assert_eq!(found, expected);
    assert_eq!(table.partitions[2].uuid.as_deref(), Some("1234abcd-05"));
    // Gaps up to 16 MiB are those of alignment.
    let used = layout.used(0).unwrap();
    assert_eq!(used, ranges(&[(0, 36 * MIB), (63 * MIB, 64 * MIB)]));
}

#[test]
fn every_rule_of_a_dos_table_has_its_error() {
    type Change = fn(&mut Image);
    let cases: [(Change, &str); 12] = [
        (
            |image| _ = image.put(446, &entry(0x83, 2048, 200_000)),
            "a partition that ends beyond the disk's end",
        ),
        (|image| _ = image.put(446, &entry(0x83, 0, 8192)), "a partition that overlaps another or the table"),
        (
            |image| _ = image.put(478, &entry(0x83, 9000, 100)),
            "a partition that overlaps another or the table",
        ),
        (|image| _ = image.put(478, &entry(0x83, 60_000, 100)), "a partition that overlaps the extended one"),
        (|image| _ = image.put(478, &entry(15, 110_000, 100)), "a second extended partition"),
        (
            |image| _ = image.put(EXTENDED + 510, &[0]),
            "a chain of logical partitions that ends in no boot record",
        ),
        (
            |image| _ = image.put(EXTENDED + 446, &entry(0x83, 2048, 60_000)),
            "a logical partition that leaves its extended one",
        ),
        (
            |image| _ = image.put(EXTENDED + 462, &entry(5, 61_440, 1)),
            "a chain of logical partitions that leaves its extended one",
        ),
        (
            |image| _ = image.put(EXTENDED + 478, &entry(0x83, 5000, 1)),
            "a boot record of a logical partition with other entries",
        ),
        (
            |image| _ = image.put(EXTENDED + 446, &entry(5, 5000, 1)),
            "a boot record of a logical partition with other entries",
        ),
        (
            |image| _ = image.put(SECOND + 462, &entry(5, 20_480, 10)),
            "a chain of logical partitions that runs in a circle",
        ),
        (|image| image.0[446..510].fill(0), "a table without partitions cannot be followed"),
    ];
    for (change, expected) in cases {
        let mut image = dos();
        change(&mut image);
        let layout = image.layout(Some(512));
        says(table(&layout).flaw.as_ref(), expected);
        assert_eq!(layout.used(0).unwrap(), ranges(&[(0, 64 * MIB)]), "{expected}");
    }
}

#[test]
fn a_chain_without_end_is_left() {
    let mut image = Image::new(64 * MIB);
    boot_record(&mut image, 0, &[entry(5, 2048, 100_000)]);
    for index in 0..300u32 {
        let next = entry(5, 16 * (index + 1), 16);
        boot_record(&mut image, MIB + u64::from(index) * 16 * 512, &[entry(0x83, 1, 8), next]);
    }
    says(table(&image.layout(Some(512))).flaw.as_ref(), "more than 256 logical partitions");
}

#[test]
fn an_image_of_a_disk_whose_sectors_are_unknown_is_used_unless_something_is_found() {
    // A partition that would lie on the disk with sectors of 4096 bytes as well.
    let mut image = Image::new(64 * MIB);
    boot_record(&mut image, 0, &[entry(0x83, 2048, 8192)]);
    let layout = image.layout(None);
    says(table(&layout).flaw.as_ref(), "an image of which the size of the sectors is not known");
    assert_eq!(layout.used(0).unwrap().bytes(), 64 * MIB);
    assert!(table(&image.layout(Some(512))).flaw.is_none());
    // 2048 sectors of 512 bytes are right where swap begins.
    image.put(MIB + 4086, b"SWAPSPACE2");
    assert!(table(&image.layout(None)).flaw.is_none());
}

/// A GPT of 64 MiB with one partition from 1 to 5 MiB and one at the end of what is usable.
struct Gpt {
    image: Image,
    sector: u64,
}

impl Gpt {
    fn new(sector: u64) -> Gpt {
        let last = 64 * MIB / sector - 1;
        let mut gpt = Gpt { image: Image::new(64 * MIB), sector };
        boot_record(&mut gpt.image, 0, &[entry(0xee, 1, last as u32)]);
        let array = 16384 / sector;
        for (lba, other, entries) in [(1, last, 2), (last, 1, last - array)] {
            let at = lba * sector;
            let fields: [(u64, &[u8]); 10] = [
                (0, b"EFI PART\0\0\x01\0\x5c\0\0\0"),
                (24, &lba.to_le_bytes()),
                (32, &other.to_le_bytes()),
                (40, &(2 + array).to_le_bytes()),
                (48, &(last - array - 1).to_le_bytes()),
                (56, &[7; 16]),
                (72, &entries.to_le_bytes()),
                (80, &128u32.to_le_bytes()),
                (84, &128u32.to_le_bytes()),
                (88, &[0; 4]),
            ];
            for (offset, bytes) in fields {
                gpt.image.put(at + offset, bytes);
            }
        }
        let per_mib = MIB / sector;
        gpt.entry(0, per_mib, 5 * per_mib - 1).entry(1, 40 * per_mib, last - array - 1).seal();
        gpt
    }

    fn header(&self, which: usize) -> u64 {
        [1, 64 * MIB / self.sector - 1][which] * self.sector
    }

    fn entries(&self, which: usize) -> u64 {
        u64::from_le_bytes(self.image.get(self.header(which) + 72, 8).try_into().unwrap())
            .saturating_mul(self.sector)
    }

    fn entry(&mut self, index: u64, first: u64, last: u64) -> &mut Gpt {
        for which in 0..2 {
            let at = self.entries(which) + 128 * index;
            self.image.put(at, &[0xaf; 16]).put(at + 16, &[index as u8 + 1; 16]);
            self.image.put(at + 32, &first.to_le_bytes()).put(at + 40, &last.to_le_bytes());
            self.image.put(at + 56, b"n\0a\0m\0e\0");
        }
        self
    }

    /// Puts the checksums right.
    fn seal(&mut self) -> &mut Gpt {
        for which in 0..2 {
            let (at, entries) = (self.header(which), self.entries(which));
            if let Some(entries) = self.image.0.get(entries as usize..).and_then(|rest| rest.get(..128 * 128))
            {
                let crc = crc32(entries);
                self.image.put(at + 88, &crc.to_le_bytes());
            }
            self.image.put(at + 16, &[0; 4]);
            let crc = crc32(self.image.get(at, 92));
            self.image.put(at + 16, &crc.to_le_bytes());
        }
        self
    }

    fn layout(&self) -> Layout {
        self.image.layout(None)
    }
}

#[test]
fn a_gpt_is_read_with_either_size_of_sectors() {
    for sector in [512, 4096] {
        let layout = Gpt::new(sector).layout();
        let table = table(&layout);
        assert!(table.flaw.is_none() && table.notes.is_empty(), "{:?} {:?}", table.flaw, table.notes);
        assert_eq!((table.kind, table.sector), ("gpt", sector));
        let guid = "07070707-0707-0707-0707-070707070707";
        assert_eq!(table.id.as_deref(), Some(guid));
        let found: Vec<(u32, u64, u64)> =
            table.partitions.iter().map(|one| (one.number, one.extent.offset(), one.extent.end())).collect();
        assert_eq!(found, [(1, MIB, 5 * MIB), (2, 40 * MIB, 64 * MIB - 16384 - sector)]);
        assert_eq!(table.partitions[0].name.as_deref(), Some("name"));
        // From 5 to 40 MiB there is nothing, and the MiB at either end of that is not trusted.
        assert_eq!(layout.used(0).unwrap(), ranges(&[(0, 6 * MIB), (39 * MIB, 64 * MIB)]));
    }
}

/// The header whose field was changed is named by what is wrong with it, and the other one serves.
#[test]
fn every_rule_of_a_gpt_header_has_its_error() {
    let cases: [(u64, &[u8], bool, &str); 13] = [
        (0, b"X", true, "no signature of a GPT"),
        (8, &[0, 0, 2, 0], true, "a header of another revision"),
        (12, &[91], false, "a header whose size is out of bounds"),
        (12, &[0, 16], false, "a header whose size is out of bounds"),
        (60, &[1], false, "a header whose checksum does not hold"),
        (24, &[9], true, "a header that says it lies in another sector"),
        (40, &[0xff; 8], true, "usable sectors that do not lie on the disk"),
        (48, &[0xff; 7], true, "usable sectors that do not lie on the disk"),
        (72, &[0xff; 8], true, "something is said to lie beyond the end of its place"),
        (80, &[0; 4], true, "a number of entries that is out of bounds"),
        (80, &[0xff; 4], true, "a number of entries that is out of bounds"),
        (84, &[127], true, "a size of entries that is not allowed"),
        (84, &[192], true, "a size of entries that is not allowed"),
    ];
    for (at, bytes, seal, expected) in cases {
        for which in 0..2 {
            let mut gpt = Gpt::new(512);
            let header = gpt.header(which);
            gpt.image.put(header + at, bytes);
            if seal {
                gpt.seal();
            }
            let layout = gpt.layout();
            let table = table(&layout);
            let note = table.notes.iter().find(|note| note.contains(expected));
            let side =
                ["the primary header is not sound, the backup is used: ", "the backup header in sector"]
                    [which];
            assert!(note.is_some_and(|note| note.starts_with(side)), "{expected}: {:?}", table.notes);
            assert!(table.flaw.is_none() && table.partitions.len() == 2);
        }
    }
    let mut gpt = Gpt::new(512);
    let entries = gpt.entries(0);
    gpt.image.put(entries + 200, &[1]);
    assert!(table(&gpt.layout()).notes[0].contains("entries whose checksum does not hold"));
    let header = gpt.header(1);
    gpt.image.put(header, b"X");
    match &gpt.layout().disks[0].content {
        Content::Unread { kind: Some("PMBR"), why } => {
            says(Some(why), "a protective MBR, and neither header of the GPT is sound");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_rule_of_a_gpt_has_its_error() {
    type Change = fn(&mut Gpt);
    let cases: [(Change, &str); 9] = [
        (|gpt| _ = gpt.entry(1, 4096, 9000), "a partition that overlaps another or the table"),
        (|gpt| _ = gpt.entry(1, 33, 40), "a partition beyond the usable sectors"),
        (|gpt| _ = gpt.entry(1, 131_000, 131_050), "a partition beyond the usable sectors"),
        (|gpt| _ = gpt.entry(1, 50_000, 49_999), "a partition that ends before it begins"),
        (
            |gpt| {
                let at = gpt.entries(0);
                gpt.image.put(at + 100, b"other");
            },
            "two sound headers that say different things",
        ),
        (
            |gpt| boot_record(&mut gpt.image, 0, &[entry(0xee, 1, 2047), entry(0x83, 2048, 100)]),
            "a GPT beside partitions in the MBR",
        ),
        (
            |gpt| boot_record(&mut gpt.image, 0, &[entry(0x83, 2048, 100_000)]),
            "a MBR beside the GPT of other times",
        ),
        (|gpt| gpt.image.0[446..512].fill(0), "a GPT without its protective MBR"),
        (
            |gpt| {
                for which in 0..2 {
                    let at = gpt.entries(which) as usize;
                    gpt.image.0[at..at + 256].fill(0);
                }
            },
            "a table without partitions",
        ),
    ];
    for (change, expected) in cases {
        let mut gpt = Gpt::new(512);
        change(&mut gpt);
        gpt.seal();
        let layout = gpt.layout();
        says(table(&layout).flaw.as_ref(), expected);
        assert_eq!(layout.used(0).unwrap().bytes(), 64 * MIB, "{expected}");
    }
}

#[test]
fn a_disk_that_grew_keeps_its_backup_where_its_end_was() {
    let mut gpt = Gpt::new(512);
    gpt.image.0.resize(128 << 20, 0);
    let layout = gpt.layout();
    assert_eq!(table(&layout).notes, ["its backup lies in sector 131071, and the disk's last is 262143"]);
    assert!(table(&layout).flaw.is_none());
    assert_eq!(
        layout.used(0).unwrap(),
        ranges(&[(0, 6 * MIB), (39 * MIB, 65 * MIB), (127 * MIB, 128 * MIB)])
    );
}

const UUIDS: [&str; 2] = ["aaaaaabbbbccccddddeeeeffffgggggg", "hhhhhhiiiijjjjkkkkllllmmmmnnnnnn"];

const THIRD: &str = "oooooopppp0000111122223333444444";

fn dashed(uuid: &str) -> String {
    [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32].map(|range| &uuid[range]).join("-")
}

/// Metadata of a group with two physical volumes of 15 extents of 1 MiB each, which begin at 1 MiB.
fn text(seqno: u32, volumes: &str) -> String {
    let volume = |name: &str, uuid: &str| {
        format!("{name} {{ id = \"{}\" pe_start = 2048 pe_count = 15 }}\n", dashed(uuid))
    };
    format!(
        "vg {{ id = \"the-id\" seqno = {seqno} format = \"lvm2\" extent_size = 2048\n physical_volumes {{ {} {} }}\n\
         logical_volumes {{ {volumes} }} }}\ncontents = \"Text Format Volume Group\"\n\0",
        volume("pv0", UUIDS[0]),
        volume("pv1", UUIDS[1])
    )
}

fn volume(name: &str, segments: &str) -> String {
    let count = segments.matches("extent_count").count();
    format!(
        "{name} {{ id = \"{name}-id\" status = [\"READ\", \"VISIBLE\"] segment_count = {count} {segments} }}\n"
    )
}

fn linear(index: u32, start: u32, count: u32, volume: &str, at: u32) -> String {
    format!(
        "segment{index} {{ start_extent = {start} extent_count = {count} type = \"striped\" stripe_count = 1 \
         stripes = [\"{volume}\", {at}] }}\n"
    )
}

/// The metadata area of the physical volumes here.
const AREA: u64 = 4096;
const AREA_LEN: u64 = 16384;

/// A physical volume of 16.5 MiB, with its text at an offset in the ring.
fn physical(which: usize, text: &str, at: u64) -> Image {
    let mut image = Image::new(16 * MIB + MIB / 2);
    image.put(512, b"LABELONE\x01").put(532, &[32]).put(536, b"LVM2 001").put(544, UUIDS[which].as_bytes());
    image.put(576, &(16 * MIB + MIB / 2).to_le_bytes());
    // Data to the end, one metadata area, and an area for boot loaders.
    image.put(584, &MIB.to_le_bytes());
    image.put(616, &AREA.to_le_bytes()).put(624, &AREA_LEN.to_le_bytes());
    image.put(648, &[2]).put(656, &(512u64 << 10).to_le_bytes()).put(664, &(64u64 << 10).to_le_bytes());
    let len = text.len() as u64;
    image.put(AREA + 4, b" LVM2 x[5A%r0N*>\x01");
    image.put(AREA + 24, &AREA.to_le_bytes()).put(AREA + 32, &AREA_LEN.to_le_bytes());
    image.put(AREA + 40, &at.to_le_bytes()).put(AREA + 48, &len.to_le_bytes());
    image.put(AREA + 56, &lvm::checksum(text.as_bytes()).to_le_bytes());
    let first = (AREA_LEN - at).min(len);
    image
        .put(AREA + at, &text.as_bytes()[..first as usize])
        .put(AREA + 512, &text.as_bytes()[first as usize..]);
    seal_physical(&mut image);
    image
}

fn seal_physical(image: &mut Image) {
    let crc = lvm::checksum(image.get(532, 492));
    image.put(528, &crc.to_le_bytes());
    let crc = lvm::checksum(image.get(AREA + 4, 508));
    image.put(AREA, &crc.to_le_bytes());
}

fn layout_of(images: &[Image]) -> Layout {
    let disks: Vec<Disk<'_>> = images.iter().map(|reader| Disk { reader, sector: Some(512) }).collect();
    read(&disks)
}

fn both(text: &str) -> [Image; 2] {
    [physical(0, text, 512), physical(1, text, 512)]
}

fn group(layout: &Layout) -> &Group {
    assert_eq!(layout.groups.len(), 1);
    &layout.groups[0].group
}

#[test]
fn a_group_lies_on_its_physical_volumes() {
    let volumes = volume("root", &(linear(1, 0, 2, "pv0", 3) + &linear(2, 2, 1, "pv1", 0)));
    let layout = layout_of(&both(&text(3, &volumes)));
    let group = group(&layout);
    assert!(group.flaw.is_none(), "{:?}", group.flaw);
    assert_eq!((group.name.as_str(), group.seqno, group.extent_size), ("vg", 3, MIB));
    assert_eq!(group.volumes[0].size, 3 * MIB);
    assert_eq!(layout.physical[0].uuid, dashed(UUIDS[0]));
    assert_eq!(layout.physical[0].boot_areas, [between(512 << 10, 576 << 10).unwrap()]);
    // The first and the last MiB, and what `root` has.
    let half = MIB / 2;
    let end = (16 * MIB - half, 16 * MIB + half);
    assert_eq!(layout.used(0).unwrap(), ranges(&[(0, MIB), (4 * MIB, 6 * MIB), end]));
    assert_eq!(layout.used(1).unwrap(), ranges(&[(0, 2 * MIB), end]));
}

#[test]
fn what_a_logical_volume_holds_is_read_from_all_of_its_places() {
    // The signature of swap lies in the second stripe of the first page, which is on the other disk.
    let striped = "segment1 { start_extent = 0 extent_count = 4 type = \"striped\" stripe_count = 2 stripe_size = 4 \
        stripes = [\"pv0\", 1, \"pv1\", 5] }";
    let text = text(1, &volume("swap", striped));
    let mut images = both(&text);
    images[1].put(6 * MIB + 2038, b"SWAPSPACE2");
    images[0].put(2 * MIB + 1024, &[1, 0, 0, 0, 9]);
    let layout = layout_of(&images);
    match &layout.groups[0].contents[0] {
        Some(Content::FileSystem(found)) => {
            assert_eq!((found.kind, found.size.0), ("swap", 40960));
            assert!(matches!(found.allocation, Allocation::Whole { .. }));
        }
        other => panic!("{other:?}"),
    }
    let end = (15 * MIB + MIB / 2, 16 * MIB + MIB / 2);
    assert_eq!(layout.used(0).unwrap(), ranges(&[(0, MIB), (2 * MIB, 4 * MIB), end]));
    assert_eq!(layout.used(1).unwrap(), ranges(&[(0, MIB), (6 * MIB, 8 * MIB), end]));
}

#[test]
fn a_text_may_go_around_the_end_of_its_ring() {
    let text = text(7, &volume("root", &linear(1, 0, 1, "pv0", 0)));
    for at in [AREA_LEN - 1, AREA_LEN - 300, 512] {
        let layout = layout_of(&[physical(0, &text, at)]);
        assert!(layout.physical[0].flaw.is_none(), "{:?}", layout.physical[0].flaw);
        assert_eq!(group(&layout).seqno, 7);
        // The other disk is not here, and its extents are none of this disk's business.
        assert_eq!(group(&layout).members[1].found, None);
    }
}

#[test]
fn every_rule_of_a_label_has_its_error() {
    let text = text(1, "");
    let cases: [(u64, &[u8], bool, &str); 8] = [
        (520, &[2], true, "a label that says it lies in another sector"),
        (700, &[1], false, "a label whose checksum does not hold"),
        (545, b"!", true, "an identifier with other characters than letters and digits"),
        (576, &[0; 8], true, "a physical volume larger than its place"),
        (576, &[0xff; 8], true, "a physical volume larger than its place"),
        (624, &[0xff; 8], true, "an area beyond the end of the physical volume"),
        (584, &[0xff; 8], true, "an area beyond the end of the physical volume"),
        (533, &[2], true, "a structure that ends before its fields do"),
    ];
    for (at, bytes, seal, expected) in cases {
        let mut image = physical(0, &text, 512);
        image.put(at, bytes);
        if seal {
            seal_physical(&mut image);
        }
        let layout = layout_of(&[image]);
        match &layout.disks[0].content {
            Content::Unread { kind: Some("LVM2_member"), why } => says(Some(why), expected),
            other => panic!("{expected}: {other:?}"),
        }
        assert_eq!(layout.used(0).unwrap().count(), 1);
    }
    let mut image = physical(0, &text, 512);
    (0..40).for_each(|index| _ = image.put(584 + 16 * index, &[1, 0, 0, 0, 0, 0, 0, 0, 1]));
    seal_physical(&mut image);
    // The label's sector ends before the list may be too long.
    match &layout_of(&[image]).disks[0].content {
        Content::Unread { why, .. } => says(Some(why), "a structure that ends before its fields do"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_rule_of_a_metadata_area_has_its_error() {
    let text = text(1, "");
    let cases: [(u64, &[u8], bool, &str); 12] = [
        (100, &[1], false, "a metadata header whose checksum does not hold"),
        (4, b"x", true, "a metadata header without its magic"),
        (20, &[2], true, "a metadata header of another version"),
        (24, &[1], true, "a metadata header of another area"),
        (32, &[1], true, "a metadata header of another area"),
        (40, &[1, 0], true, "a text that does not lie in its area"),
        (40, &AREA_LEN.to_le_bytes(), true, "a text that does not lie in its area"),
        (48, &[0; 8], true, "a text that does not lie in its area"),
        (48, &[0xff; 8], true, "a text that does not lie in its area"),
        (48, &[1, 0], true, "a text whose checksum does not hold"),
        (600, b"x", true, "a text whose checksum does not hold"),
        (64, &[1], true, "metadata that was about to be replaced"),
    ];
    for (at, bytes, seal, expected) in cases {
        let mut image = physical(0, &text, 512);
        image.put(AREA + at, bytes);
        if seal {
            seal_physical(&mut image);
        }
        let layout = layout_of(&[image]);
        says(layout.physical[0].flaw.as_ref(), expected);
        assert_eq!(layout.used(0).unwrap().count(), 1, "{expected}");
    }
    // An area that is not kept up to date says nothing, and neither does an empty one.
    for (at, bytes) in [(60, &[1][..]), (40, &[0; 8])] {
        let mut image = physical(0, &text, 512);
        image.put(AREA + at, bytes);
        seal_physical(&mut image);
        let layout = layout_of(&[image]);
        assert!(layout.physical[0].flaw.is_none() && layout.physical[0].text.is_none());
        assert!(layout.groups.is_empty());
        assert_eq!(layout.used(0).unwrap().count(), 1);
    }
}

/// Areas that keep the same text are one; of others it is not known which one counts.
#[test]
fn two_metadata_areas_keep_the_same_text() {
    let other_area = 64u64 << 10;
    let image = |first: &str, second: &str| {
        let mut image = physical(0, first, 512);
        let second = physical(0, second, 512);
        let bytes = second.get(AREA, AREA_LEN).to_vec();
        image.put(632, &other_area.to_le_bytes()).put(640, &AREA_LEN.to_le_bytes()).put(648, &[0; 32]);
        image.put(other_area, &bytes).put(other_area + 24, &other_area.to_le_bytes());
        let crc = lvm::checksum(image.get(other_area + 4, 508));
        image.put(other_area, &crc.to_le_bytes());
        seal_physical(&mut image);
        image
    };
    let (one, other) = (text(1, ""), text(2, ""));
    let layout = layout_of(&[image(&one, &one)]);
    assert!(layout.physical[0].flaw.is_none() && layout.physical[0].text.is_some());
    assert_eq!(layout.physical[0].metadata_areas.len(), 2);
    let layout = layout_of(&[image(&one, &other)]);
    says(layout.physical[0].flaw.as_ref(), "two metadata areas with different texts");
    assert_eq!(layout.used(0).unwrap().count(), 1);
}

#[test]
fn every_rule_of_a_group_has_its_error() {
    let good = text(1, &(volume("a", &linear(1, 0, 2, "pv0", 0)) + &volume("b", &linear(1, 0, 2, "pv0", 2))));
    assert!(group(&layout_of(&both(&good))).flaw.is_none());
    let cases = [
        ("format = \"lvm2\"", "format = \"lvm1\"", "a volume group of another format than lvm2"),
        ("extent_size = 2048", "extent_size = 0", "a volume group without an id or an extent_size"),
        ("the-id", "", "a volume group without an id or an extent_size"),
        ("pe_count = 15", "pe_count = 0", "a physical volume without extents"),
        ("pe_count = 15", "pe_count = 9999999999999999", "a physical volume without extents"),
        ("pe_count = 15", "pe_count = 16", "a physical volume whose extents end beyond its end"),
        ("segment1 ", "other ", "a logical volume with another number of segments than it says"),
        ("start_extent = 0", "start_extent = 1", "a logical volume whose segments overlap or leave a gap"),
        ("extent_count = 2", "extent_count = 0", "a segment without extents"),
        ("type = \"striped\"", "", "a segment without a type"),
        ("type = \"striped\"", "type = \"new\"", "a segment of type new right on a physical volume"),
        ("stripe_count = 1", "stripe_count = 2", "a segment with another number of stripes than it says"),
        (
            "stripes = [\"pv0\", 0]",
            "stripes = [\"pv0\", 14]",
            "a stripe beyond the extents of its physical volume",
        ),
        (
            "stripes = [\"pv0\", 0]",
            "stripes = [\"pv0\", -1]",
            "a stripe beyond the extents of its physical volume",
        ),
        (
            "stripes = [\"pv0\", 0]",
            "stripes = [0, \"pv0\"]",
            "a stripe that is no pair of a name and a number",
        ),
        (
            "stripes = [\"pv0\", 0]",
            "stripes = [\"pv0\", 1]",
            "two logical volumes that take the same extents",
        ),
        (
            "stripe_count = 1 stripes = [\"pv0\", 0]",
            "stripe_count = 3 stripe_size = 8 stripes = [\"pv0\", 4, \"pv0\", 8, \"pv0\", 9]",
            "a segment that its stripes do not divide",
        ),
        (
            "stripe_count = 1 stripes = [\"pv0\", 0]",
            "stripe_count = 2 stripe_size = 24 stripes = [\"pv0\", 4, \"pv0\", 8]",
            "a segment whose stripe size is out of bounds",
        ),
        (
            "stripe_count = 1 stripes = [\"pv0\", 0]",
            "stripe_count = 2 stripes = [\"pv0\", 4, \"pv0\", 8]",
            "a segment whose stripe size is out of bounds",
        ),
    ];
    for (from, to, expected) in cases {
        assert!(good.contains(from), "{from}");
        let layout = layout_of(&both(&good.replacen(from, to, 1)));
        says(group(&layout).flaw.as_ref(), expected);
        assert!((0..2).all(|disk| layout.used(disk).unwrap().count() == 1), "{expected}");
    }
    let stripes = |count: usize| {
        let stripes = (0..count).map(|_| "\"pv0\", 0").collect::<Vec<_>>().join(", ");
        format!("stripe_count = {count} stripe_size = 8 stripes = [{stripes}]")
    };
    for (count, expected) in [(128, "a segment that its stripes"), (129, "a segment of 129 stripes")] {
        let many = good.replacen("stripe_count = 1 stripes = [\"pv0\", 0]", &stripes(count), 1);
        says(group(&layout_of(&both(&many))).flaw.as_ref(), expected);
    }
}

#[test]
fn members_that_do_not_agree_are_used() {
    let (old, new) = (text(1, ""), text(2, ""));
    let layout = layout_of(&[physical(0, &old, 512), physical(1, &new, 512)]);
    assert_eq!(group(&layout).seqno, 2);
    says(group(&layout).flaw.as_ref(), "the metadata of another time on the physical volume aaaaaa");
    let mut damaged = physical(1, &new, 512);
    damaged.put(AREA + 600, b"x");
    let layout = layout_of(&[physical(0, &new, 512), damaged]);
    says(group(&layout).flaw.as_ref(), "the damaged metadata of the physical volume hhhhhh");
    let layout = layout_of(&[physical(0, &new, 512), physical(0, &new, 512)]);
    says(group(&layout).flaw.as_ref(), "a physical volume that is there twice");
    for layout in [&layout, &layout_of(&[physical(0, &old, 512), physical(1, &new, 512)])] {
        assert!((0..2).all(|disk| layout.used(disk).unwrap().count() == 1));
    }
}

/// Found by fuzzing.
#[test]
fn of_a_disk_that_is_two_members_nothing_is_free() {
    let text = text(1, &volume("root", &linear(1, 0, 2, "pv1", 3)));
    let layout = layout_of(&[physical(0, &text.replace(&dashed(UUIDS[1]), &dashed(UUIDS[0])), 512)]);
    assert_eq!(layout.used(0).unwrap(), ranges(&[(0, 16 * MIB + MIB / 2)]));
}

#[test]
fn a_physical_volume_without_metadata_is_known_by_the_others() {
    let text = text(1, &volume("root", &linear(1, 0, 2, "pv1", 3)));
    let [first, mut second] = both(&text);
    second.put(AREA + 60, &[1]);
    seal_physical(&mut second);
    let layout = layout_of(&[first, second.clone()]);
    assert!(layout.physical[1].text.is_none());
    let end = (15 * MIB + MIB / 2, 16 * MIB + MIB / 2);
    assert_eq!(layout.used(1).unwrap(), ranges(&[(0, MIB), (4 * MIB, 6 * MIB), end]));
    // Two groups that both say it is theirs.
    let other = text.replace("the-id", "another").replace(&dashed(UUIDS[0]), &dashed(THIRD));
    let mut third = physical(0, &other, 512);
    third.put(544, THIRD.as_bytes());
    seal_physical(&mut third);
    let layout = layout_of(&[physical(0, &text, 512), second.clone(), third.clone()]);
    assert!(layout.groups.len() == 2 && layout.groups.iter().all(|group| group.group.flaw.is_none()));
    assert_eq!([0, 1, 2].map(|disk| layout.used(disk).unwrap().count()), [2, 1, 2]);
    // That one of them is damaged does not make the other one's claim a better one.
    let broken = physical(0, &text.replace("pe_count = 15", "pe_count = 0"), 512);
    let layout = layout_of(&[broken, second, third]);
    assert_eq!([0, 1, 2].map(|disk| layout.used(disk).unwrap().count()), [1, 1, 2]);
}

/// Free blocks of a file system, through a volume that lies on two disks in two ways.
#[test]
fn what_a_file_system_proves_free_is_free_where_it_lies() {
    let striped = "segment2 { start_extent = 2 extent_count = 4 type = \"striped\" stripe_count = 2 stripe_size = 64 \
        stripes = [\"pv0\", 9, \"pv1\", 2] }";
    let text = text(1, &volume("root", &(linear(1, 0, 2, "pv1", 10) + striped)));
    let mut layout = layout_of(&both(&text));
    // Of 6 MiB, of which the file system has 5.5 MiB.
    let used = ranges(&[(100 << 10, 164 << 10), (2 * MIB - 4096, 2 * MIB + 40_000), (3 * MIB, 5 * MIB)]);
    let size = 5 * MIB + MIB / 2;
    let found = FileSystem::new("ext4", size, Allocation::Known(used.clone()));
    layout.groups[0].contents[0] = Some(Content::FileSystem(found));
    let root = layout.groups[0].group.volumes[0].clone();
    let mut expected = [0, 1].map(|_| ranges(&[(0, MIB), (15 * MIB + MIB / 2, 16 * MIB + MIB / 2)]));
    // The boot sectors, and what lies behind the file system's end.
    for range in used.union(&ranges(&[(0, 64 << 10), (size, 6 * MIB)])).iter() {
        for at in (range.offset()..range.end()).step_by(64) {
            let segment = root.segments.iter().find(|segment| at < segment.extent.end()).unwrap();
            let within = at - segment.extent.offset();
            let (area, offset, len) = segment.stripes.as_ref().unwrap().locate(within).unwrap();
            assert!(len >= 64);
            let from = area.extent.offset() + offset;
            expected[area.member].insert(between(from, from + 64).unwrap());
        }
    }
    assert_eq!([0, 1].map(|disk| layout.used(disk).unwrap()), expected);
    assert!(expected[0].count() > 2 && expected[1].count() > 3);
    // Whoever has no time for all of that takes the rest as used. Each stripe of a segment is a walk of its own.
    for steps in 0..20 {
        let some = |steps| {
            let mut given = Ranges::new();
            super::map::logical_volumes(&layout.groups[0], 1, steps, |range| given.insert(range));
            given
        };
        let (all, some) = (some(1000), some(steps));
        assert!(all.subtract(&some).is_empty() && (steps < 7) == (some != all), "{steps}");
    }
    // And right on a disk.
    let found = FileSystem::new("ext4", size, Allocation::Known(used));
    layout.disks[0] = Place { at: 0, size: 16 * MIB, content: Content::FileSystem(found) };
    let expected =
        ranges(&[(0, MIB), (2 * MIB - 4096, 2 * MIB + 40_000), (3 * MIB, 5 * MIB), (size, 16 * MIB)]);
    assert_eq!(layout.used(0).unwrap(), expected);
}

/// Whatever another volume refers to is read by somebody else, who may need what its file system calls free.
#[test]
fn parts_origins_and_pools_are_not_looked_into() {
    let hidden = volume("pool_tdata", &linear(1, 0, 2, "pv0", 0)).replace("\"VISIBLE\"", "\"WRITE\"");
    let pool = volume(
        "pool",
        "segment1 { start_extent = 0 extent_count = 2 type = \"thin-pool\" pool = \"pool_tdata\" }",
    );
    let thin =
        volume("thin", "segment1 { start_extent = 0 extent_count = 9 type = \"thin\" thin_pool = \"pool\" }");
    let origin = volume("origin", &linear(1, 0, 2, "pv0", 4));
    let cow = volume("cow", &linear(1, 0, 1, "pv0", 7));
    let snapshot = volume(
        "snapshot0",
        "segment1 { start_extent = 0 extent_count = 2 type = \"snapshot\" cow_store = \"cow\" origin = \"origin\" }",
    );
    let plain = volume("plain", &linear(1, 0, 1, "pv0", 9));
    let all = [hidden, pool, thin, origin, cow, snapshot, plain].concat();
    let layout = layout_of(&both(&text(1, &all)));
    let one = &layout.groups[0];
    assert!(one.group.flaw.is_none(), "{:?}", one.group.flaw);
    let looked: Vec<&str> = (one.group.volumes.iter().zip(&one.contents))
        .filter(|(_, content)| content.is_some())
        .map(|(volume, _)| volume.name.as_str())
        .collect();
    assert_eq!(looked, ["plain"]);
    let thin = one.group.volumes.iter().find(|volume| volume.name == "thin").unwrap();
    assert_eq!(thin.kinds(), ["thin"]);
    let extents = [(0, 3), (5, 7), (8, 9), (10, 11)].map(|(from, to)| (from * MIB, to * MIB));
    let used = ranges(&extents).union(&ranges(&[(15 * MIB + MIB / 2, 16 * MIB + MIB / 2)]));
    assert_eq!(layout.used(0).unwrap(), used);
}

proptest! {
    /// Where a byte of stripes lies, against counting.
    #[test]
    fn stripes_are_dealt_out_in_turn(count in 1..5usize, unit in 1..9u64, rounds in 1..6u64, from in 0..100u64, len in 1..100u64) {
        use super::lvm::group::{Area, Segment, Stripes};
        use crate::units::Extent;
        let share = unit * rounds;
        let areas: Vec<Area> = (0..count)
            .map(|index| Area { member: 0, extent: Extent::new(1000 * (index as u64 + 1), share).unwrap() })
            .collect();
        let total = share * count as u64;
        let (from, len) = (from % total, len.min(total - from % total));
        let stripes = Stripes { unit, areas };
        let mut places = vec![Vec::new(); count];
        let mut expected = vec![Vec::new(); count];
        for at in 0..total {
            let (chunk, within) = (at / unit, at % unit);
            let (stripe, offset) = ((chunk % count as u64) as usize, chunk / count as u64 * unit + within);
            let (area, found, together) = stripes.locate(at).unwrap();
            prop_assert_eq!((area.extent.offset(), found), (1000 * (stripe as u64 + 1), offset));
            prop_assert_eq!(together, unit - within);
            if (from..from + len).contains(&at) {
                expected[stripe].push(1000 * (stripe as u64 + 1) + offset);
            }
        }
        let extent = Extent::new(7000, total).unwrap();
        let segment = Segment { extent, kind: "striped".to_owned(), stripes: Some(stripes) };
        for (index, places) in places.iter_mut().enumerate() {
            if let Some(found) = segment.on_stripe(index, Extent::new(7000 + from, len).unwrap()) {
                places.extend(found.offset()..found.end());
            }
        }
        prop_assert_eq!(places, expected);
    }

    /// Any bytes, in place of some of a good disk: nothing panics, and the ends of the disk are used.
    #[test]
    fn no_bytes_make_it_panic(which in 0..4usize, at in 0..40_000usize, bytes: Vec<u8>, seal: bool) {
        let put = |image: &mut Image| {
            let len = bytes.len().min(image.0.len() - at);
            image.put(at as u64, &bytes[..len]);
        };
        let image = match which {
            0 => {
                let mut image = dos();
                put(&mut image);
                image
            }
            1 => {
                let mut gpt = Gpt::new(512);
                put(&mut gpt.image);
                if seal {
                    gpt.seal();
                }
                gpt.image
            }
            _ => {
                let text = text(1, &volume("root", &linear(1, 0, 2, "pv0", 3)));
                let mut image = physical(0, &text, 512);
                put(&mut image);
                if seal {
                    seal_physical(&mut image);
                }
                image
            }
        };
        let size = image.0.len() as u64;
        let used = image.layout(None).used(0).unwrap();
        prop_assert!(used.iter().all(|range| range.end() <= size));
        prop_assert!(used.covers(between(0, MIB).unwrap()) && used.covers(between(size - MIB, size).unwrap()));
    }
}

#[test]
fn a_place_without_a_signature_and_one_with_two_are_used() {
    let mut image = Image::new(8 * MIB);
    assert!(matches!(image.layout(None).disks[0].content, Content::Unknown));
    image.put(4086, b"SWAPSPACE2").put(512, b"LABELONE").put(536, b"LVM2 001");
    match &image.layout(None).disks[0] {
        Place { content: Content::Several(kinds), .. } => assert_eq!(kinds, &["LVM2_member", "swap"]),
        other => panic!("{other:?}"),
    }
    assert_eq!(image.layout(None).used(0).unwrap(), ranges(&[(0, 8 * MIB)]));
}

#[test]
fn an_array_s_member_is_not_taken_for_what_lies_in_the_array() {
    let mut image = Image::new(8 * MIB);
    image.put(4086, b"SWAPSPACE2").put(8 * MIB - 8192, b"\xfc\x4e\x2b\xa9\x01\0\0\0");
    image.put(8 * MIB - 8192 + 16, &[3; 16]).put(8 * MIB - 8192 + 32, b"host:0");
    match &image.layout(None).disks[0].content {
        Content::FileSystem(found) => {
            assert_eq!((found.kind, found.version.as_deref()), ("linux_raid_member", Some("1.0")));
            assert_eq!(found.uuid.as_deref(), Some("03030303-0303-0303-0303-030303030303"));
            assert_eq!(found.label.as_deref(), Some("host:0"));
        }
        other => panic!("{other:?}"),
    }
}

/// A large disk of zeros but for some pieces, which counts what is read of it.
struct Sparse {
    size: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    read: std::cell::Cell<u64>,
    reads: std::cell::Cell<u64>,
}

/// How much of what may be spent it takes to read a file system, beside what is read of it.
pub(super) fn spent_on_ranges(bytes: &[u8], read: fn(&View<'_>) -> Result<Option<FileSystem>, Error>) -> u64 {
    let known = |work| {
        let disk = Sparse::new(bytes.len() as u64, vec![(0, bytes.to_vec())]);
        let found = read(&View::limited(&disk, work, 32 << 20));
        let whole = matches!(found, Ok(Some(FileSystem { allocation: Allocation::Known(_), .. })));
        whole.then(|| disk.read.get() + disk.reads.get() * super::view::PER_READ)
    };
    let (mut less, mut enough) = (0, 1 << 30);
    while enough - less > 1 {
        let middle = (less + enough) / 2;
        match known(middle) {
            Some(_) => enough = middle,
            None => less = middle,
        }
    }
    enough - known(enough).unwrap()
}

impl Sparse {
    fn new(size: u64, pieces: Vec<(u64, Vec<u8>)>) -> Sparse {
        Sparse { size, pieces, read: 0.into(), reads: 0.into() }
    }

    /// Why nothing is known of the file system on it.
    #[track_caller]
    fn whole(&self) -> String {
        match &read(&[Disk { reader: self, sector: Some(512) }]).disks[0].content {
            Content::FileSystem(FileSystem { allocation: Allocation::Whole { why }, .. }) => why.to_string(),
            other => panic!("{other:?}"),
        }
    }
}

impl ReadAt for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.read.set(self.read.get() + buf.len() as u64);
        self.reads.set(self.reads.get() + 1);
        buf.fill(0);
        let end = offset + buf.len() as u64;
        for (at, bytes) in &self.pieces {
            let (from, to) = (offset.max(*at), end.min(at + bytes.len() as u64));
            if from < to {
                let piece = &bytes[(from - at) as usize..(to - at) as usize];
                buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(piece);
            }
        }
        Ok(())
    }
}

/// An ext2 of `groups` groups with blocks of `1024 << shift` bytes, whose bitmaps are these blocks in turn, and which has
/// `free` blocks in each group: its superblock and descriptors.
fn groups(shift: u32, groups: u32, per_group: u32, bitmaps: &[u32], free: u16) -> Vec<(u64, Vec<u8>)> {
    let block = 1024u64 << shift;
    let mut superblock = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| superblock[at..at + bytes.len()].copy_from_slice(bytes);
    let numbers = [
        (0x00, groups * 512),
        (0x04, groups * per_group),
        (0x18, shift),
        (0x1c, shift),
        (0x20, per_group),
        (0x24, per_group),
        (0x28, 512),
        (0x4c, 1),
        (0x54, 11),
        // Types in directories, and bitmaps wherever they are; few copies of the superblock.
        (0x60, 0x202),
        (0x64, 1),
    ];
    numbers.into_iter().for_each(|(at, number)| put(at, &number.to_le_bytes()));
    put(0x38, b"\x53\xef\x01\0");
    put(0x58, &128u16.to_le_bytes());
    put(0x68, &[7; 16]);
    let descriptor = |index: u32| {
        let mut bytes = [0; 32];
        let places = [bitmaps[index as usize % bitmaps.len()], 701, 702];
        places
            .iter()
            .enumerate()
            .for_each(|(word, at)| bytes[4 * word..][..4].copy_from_slice(&at.to_le_bytes()));
        bytes[12..14].copy_from_slice(&free.to_le_bytes());
        bytes
    };
    vec![(1024, superblock), (block.max(2048), (0..groups).flat_map(descriptor).collect())]
}

/// A million groups with two bitmaps, which lie apart: to read these is to read 64 GiB.
#[test]
fn what_is_read_of_a_disk_that_was_made_to_be_read_for_ever_is_limited() {
    let disk = Sparse::new(8 << 40, groups(6, 1 << 20, 128, &[700, 1000], 128));
    assert_eq!(disk.whole(), "so much metadata cannot be followed");
    assert!((1 << 30..4 << 30).contains(&disk.read.get()), "{}", disk.read.get());
}

/// All groups have one bitmap, in which every other block is used.
#[test]
fn ranges_without_end_are_limited() {
    let mut pieces = groups(1, 60, 16384, &[700], 8192);
    pieces.push((700 << 11, vec![0x55; 2048]));
    let disk = Sparse::new((60 * 16384) << 11, pieces);
    let map = |work| super::ext4::read(&View::limited(&disk, work, 32 << 20)).unwrap().unwrap();
    // Some of what lies in fixed places is free by that: for its ranges alone it takes this much work.
    let says = |work| match map(work).allocation {
        Allocation::Whole { why } => why.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(says(4 << 30).starts_with("metadata in blocks that its bitmap calls free"), "{}", says(4 << 30));
    assert!(says(60 * 8192 * 64 + MIB).starts_with("metadata in blocks that its bitmap"));
    assert_eq!(says(60 * 8192 * 64), "so much metadata cannot be followed");
}

/// A volume in the smallest of stripes is read piece by piece.
#[test]
fn each_piece_of_a_logical_volume_is_paid_for() {
    let striped = "segment1 { start_extent = 0 extent_count = 4 type = \"striped\" stripe_count = 2 stripe_size = 1 \
        stripes = [\"pv0\", 1, \"pv1\", 5] }";
    let images = both(&text(1, &volume("small", striped)));
    let layout = layout_of(&images);
    let group = group(&layout);
    let look = |work| {
        let begins = images.each_ref().map(|image| View::limited(image, work, 32 << 20));
        super::tree::logical(group, &group.volumes[0], &begins).unwrap()
    };
    assert!(matches!(look(16 * MIB), Content::Unknown));
    // More than twice what is read of it.
    match look(MIB) {
        Content::Unread { kind: None, why } => says(Some(&why), "so much metadata cannot be followed"),
        other => panic!("{other:?}"),
    }
}

/// Partitions that lie one over the other do not multiply what is known of one of them.
#[test]
fn the_memory_that_is_taken_for_a_disk_is_limited() {
    // Its own structures are used, and then every other block.
    let mut bitmap = vec![0xff_u8; 2048];
    bitmap[8..808].fill(0x55);
    let mut one = groups(1, 1, 16384, &[3], 3200);
    one[1].1[4..12].copy_from_slice(&[4, 0, 0, 0, 5, 0, 0, 0]);
    one.push((3 << 11, bitmap));
    let disk = Sparse::new(32 * MIB, one);
    let count = |memory| {
        let view = View::limited(&disk, 1 << 30, memory);
        let found = super::tree::file_system("ext2", &view);
        match found {
            Content::FileSystem(FileSystem { allocation: Allocation::Known(used), .. }) => {
                (used.count() as u64, used.bytes(), memory - view.memory())
            }
            other => panic!("{other:?}"),
        }
    };
    let (ranges, bytes, memory) = count(32 << 20);
    assert!(ranges > 3000 && memory == 16 * ranges, "{ranges}");
    // With too little it is more that is used, never less.
    let (fewer, more, memory) = count(16 * 1000);
    assert!(fewer <= 1000 && more > bytes && memory == 16 * fewer, "{fewer} {more}");
    assert!(count(0).0 <= 2);
}

/// A boot loader's own partition is never looked into: there is code where a file system of earlier times has its name.
#[test]
fn a_boot_loader_s_partition_is_used_whatever_lies_in_it() {
    // A sound ext2 of 2 MiB, at the beginning of a partition of 4 MiB.
    let mut pieces = groups(1, 1, 1024, &[3], 960);
    pieces[1].1[4..12].copy_from_slice(&[4, 0, 0, 0, 5, 0, 0, 0]);
    pieces.push((3 << 11, [vec![0xff; 8], vec![0; 2040]].concat()));
    let place = |image: &mut Image| pieces.iter().for_each(|(at, bytes)| _ = image.put(MIB + at, bytes));
    let partition = between(MIB, 5 * MIB).unwrap();
    for (kind, boots) in [(0x83, false), (0x41, true)] {
        let mut image = dos();
        image.0[446 + 4] = kind;
        place(&mut image);
        assert_eq!(image.layout(Some(512)).used(0).unwrap().covers(partition), boots, "{kind:x}");
    }
    let bios = *b"Hah!IdontNeedEFI";
    let prep =
        [0x38, 0x2d, 0x1a, 0x9e, 0x12, 0xc6, 0x16, 0x43, 0xaa, 0x26, 0x8b, 0x49, 0x52, 0x1e, 0x5a, 0x8b];
    for (kind, boots) in [([0xaf; 16], false), (bios, true), (prep, true)] {
        let mut gpt = Gpt::new(512);
        for which in 0..2 {
            let at = gpt.entries(which);
            gpt.image.put(at, &kind);
        }
        place(&mut gpt.seal().image);
        assert_eq!(gpt.layout().used(0).unwrap().covers(partition), boots, "{kind:x?}");
    }
}
