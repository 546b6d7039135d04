//! A small XFS made by hand, sound in all that is looked at: for each rule one field is changed, and the map is none for
//! exactly that reason.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

use std::sync::Arc;

use proptest::prelude::*;

use super::super::ranges::{Ranges, between};
use super::free::Order;
use super::*;
use crate::checksum::crc32c;

const BLOCK: u64 = 512;
const GROUP: u64 = 96;
/// Three whole groups and a short one.
const BLOCKS: u64 = 3 * GROUP + 70;
/// Where the log begins in group 1, up to its end.
const LOG: u64 = 64;
const LOG_BLOCKS: u64 = GROUP - LOG;
const LOG_AT: u64 = (GROUP + LOG) * BLOCK;
const UUID: [u8; 16] = *b"0123456789abcdef";
const META: [u8; 16] = *b"fedcba9876543210";
/// Blocks of each group, behind its four headers: four roots of other trees, two kept blocks, and the trees.
const ROOTS: u32 = 4;
const KEPT: u32 = 8;
const TREES: u32 = 10;
/// Where the log's head is, and its cycle.
const HEAD: u64 = 12;
const CYCLE: u32 = 3;

/// The free extents of each group: of three levels, of two, of none at all, and up to the end.
const FREE: [&[(u32, u32)]; 4] = [
    &[(40, 1), (42, 3), (50, 1), (52, 2), (55, 1), (57, 1), (60, 36)],
    &[(40, 1), (50, 8), (59, 1)],
    &[],
    &[(30, 2), (34, 36)],
];

#[derive(Clone)]
struct Image {
    bytes: Vec<u8>,
    v5: bool,
    /// The log's head and its cycle.
    head: u64,
    cycle: u32,
    /// Where each structure with a checksum begins and where its checksum is.
    sealed: Vec<(u64, u64)>,
}

impl Image {
    fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Image {
        self.bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
        self
    }

    fn u16(&mut self, at: u64, number: u16) -> &mut Image {
        self.put(at, &number.to_be_bytes())
    }

    fn u32(&mut self, at: u64, number: u32) -> &mut Image {
        self.put(at, &number.to_be_bytes())
    }

    fn u64(&mut self, at: u64, number: u64) -> &mut Image {
        self.put(at, &number.to_be_bytes())
    }

    fn get(&self, at: u64) -> u32 {
        u32::from_be_bytes(self.bytes[at as usize..][..4].try_into().unwrap())
    }

    /// Makes all checksums right again.
    fn seal(&mut self) -> &mut Image {
        for (at, field) in self.sealed.clone() {
            self.put(at + field, &[0; 4]);
            let sum = crc32c(&self.bytes[at as usize..][..BLOCK as usize]);
            self.put(at + field, &sum.to_le_bytes());
        }
        self
    }

    fn new(v5: bool) -> Image {
        let mut image = Image {
            bytes: vec![0xa5; (BLOCKS * BLOCK) as usize],
            v5,
            head: HEAD,
            cycle: CYCLE,
            sealed: Vec::new(),
        };
        let mut free = 0;
        for group in 0..4 {
            image.superblock(group * GROUP * BLOCK);
            free += image.group(group);
        }
        (0..4).for_each(|group| {
            image.u64(group * GROUP * BLOCK + 144, free);
        });
        image.log(HEAD, CYCLE).unmount(HEAD - 2);
        image.seal();
        image
    }

    fn superblock(&mut self, at: u64) {
        self.put(at, &[0; BLOCK as usize]).put(at, b"XFSB");
        self.u32(at + 4, BLOCK as u32).u64(at + 8, BLOCKS).put(at + 32, &UUID);
        // In block numbers a group counts 128.
        self.u64(at + 48, 128 + LOG)
            .u32(at + 84, GROUP as u32)
            .u32(at + 88, 4)
            .u32(at + 96, LOG_BLOCKS as u32);
        self.u16(at + 100, if self.v5 { 0xb4a5 } else { 0xb4a4 })
            .u16(at + 102, 512)
            .put(at + 108, b"a label\0\0\0\0\0");
        self.put(at + 120, &[9, 9]).put(at + 124, &[7]);
        let second = if self.v5 { 0x18a } else { 0x8a };
        self.u32(at + 200, second).u32(at + 204, second);
        if self.v5 {
            self.u32(at + 212, 0xf).u32(at + 216, 0xf).u64(at + 240, lsn(0)).put(at + 248, &META);
            self.sealed.push((at, 224));
        }
    }

    /// The rest of a group, and how many blocks it has that count as free.
    fn group(&mut self, group: u64) -> u64 {
        let start = group * GROUP * BLOCK;
        let (agf, agi, agfl) = (start + 512, start + 1024, start + 1536);
        let blocks = if group == 3 { 70 } else { GROUP as u32 };
        self.put(agf, &[0; 3 * 512]);
        for (at, magic) in [(agf, b"XAGF"), (agi, b"XAGI")] {
            self.put(at, magic).u32(at + 4, 1).u32(at + 8, group as u32).u32(at + 12, blocks);
        }
        self.u32(agi + 20, ROOTS).u32(agi + 328, ROOTS + 1).u32(agf + 24, ROOTS + 2).u32(agf + 88, ROOTS + 3);
        self.u32(agf + 80, 1);
        let first = if self.v5 { 36 } else { 0 };
        let size = (512 - first) / 4;
        // The ring's two entries are its last and its first.
        self.u32(agf + 40, size - 1).u32(agf + 44, 0).u32(agf + 48, 2);
        self.u32(agfl + u64::from(first), KEPT + 1).u32(agfl + u64::from(first + 4 * (size - 1)), KEPT);
        if self.v5 {
            self.put(agfl, b"XAFL").u32(agfl + 4, group as u32);
            for (at, stamp) in [(agf, &group::AGF), (agi, &group::AGI), (agfl, &group::AGFL)] {
                self.stamp(at, stamp);
            }
        }

        let mut free = FREE[group as usize].to_vec();
        let (root, levels, behind) = self.tree(group, Order::Start, &free, TREES);
        self.u32(agf + 16, root).u32(agf + 28, levels);
        free.sort_by_key(|(start, len)| (*len, *start));
        let (root, levels, end) = self.tree(group, Order::Length, &free, behind);
        self.u32(agf + 20, root).u32(agf + 32, levels);
        let sum: u32 = free.iter().map(|(_, len)| *len).sum();
        let trees = end - TREES - 2;
        self.u32(agf + 52, sum).u32(agf + 56, free.last().map_or(0, |(_, len)| *len)).u32(agf + 60, trees);
        u64::from(sum + 2 + trees)
    }

    fn stamp(&mut self, at: u64, stamp: &Stamp) {
        self.put(at + stamp.uuid, &META).u64(at + stamp.lsn, lsn(0));
        self.sealed.push((at, stamp.checksum));
    }

    /// A tree of two records a leaf and two blocks a block, from this block on: its root, its levels, and what is behind it.
    fn tree(&mut self, group: u64, order: Order, free: &[(u32, u32)], from: u32) -> (u32, u32, u32) {
        let mut next = from;
        let mut level = 0;
        let mut below: Vec<((u32, u32), Option<u32>)> = free.iter().map(|one| (*one, None)).collect();
        loop {
            let mut level_blocks = Vec::new();
            let count = below.len().div_ceil(2).max(1) as u32;
            for index in 0..count {
                let block = next + index;
                let children = below.chunks(2).nth(index as usize).unwrap_or_default();
                let neighbour = |has: bool, block: u32| if has { block } else { u32::MAX };
                let at = (group * GROUP + u64::from(block)) * BLOCK;
                let magic = order.magic(self.v5);
                self.put(at, &[0; 512]).put(at, magic).u16(at + 4, level as u16);
                self.u16(at + 6, children.len() as u16);
                self.u32(at + 8, neighbour(index > 0, block.wrapping_sub(1)));
                self.u32(at + 12, neighbour(index + 1 < count, block + 1));
                let header = if self.v5 { 56 } else { 16 };
                for (entry, ((start, len), child)) in children.iter().enumerate() {
                    let record = at + header + 8 * entry as u64;
                    self.u32(record, *start).u32(record + 4, *len);
                    if let Some(child) = child {
                        self.u32(at + header + (512 - header) / 12 * 8 + 4 * entry as u64, *child);
                    }
                }
                if self.v5 {
                    self.u64(at + 16, at / 512).u32(at + 48, group as u32);
                    self.stamp(at, &free::STAMP);
                }
                level_blocks.push((children.first().map_or((0, 0), |child| child.0), Some(block)));
            }
            next += count;
            level += 1;
            if count == 1 {
                return (next - 1, level, next);
            }
            below = level_blocks;
        }
    }

    /// Where a block of one of a group's trees lies, counted from the first one: leaves first, the root last.
    fn tree_block(group: u64, index: u64) -> u64 {
        (group * GROUP + u64::from(TREES) + index) * BLOCK
    }

    /// A log up to this head and without a record.
    fn log(&mut self, head: u64, cycle: u32) -> &mut Image {
        (self.head, self.cycle) = (head, cycle);
        for block in 0..LOG_BLOCKS {
            let cycle = self.cycle_of(block);
            self.put(LOG_AT + block * BLOCK, &[0; 512]).u32(LOG_AT + block * BLOCK, cycle);
        }
        self
    }

    fn cycle_of(&self, block: u64) -> u32 {
        if block < self.head { self.cycle } else { self.cycle - 1 }
    }

    /// A record of one block whose body this is.
    fn record(&mut self, block: u64, tail: u64, count: u32, body: &[u8]) -> &mut Image {
        let (at, body_at) = (LOG_AT + block * BLOCK, LOG_AT + (block + 1) % LOG_BLOCKS * BLOCK);
        let cycle = self.cycle_of(block);
        self.put(at, &[0; 512])
            .put(at, &[0xfe, 0xed, 0xba, 0xbe])
            .u32(at + 4, cycle)
            .u32(at + 8, 2)
            .u32(at + 12, 512);
        self.u64(at + 16, u64::from(cycle) << 32 | block).u64(at + 24, tail).u32(at + 40, count);
        self.u32(at + 300, 1).put(at + 304, &UUID).u32(at + 320, 32 << 10);
        let own = self.get(body_at);
        self.put(body_at, &[0; 512]).put(body_at, body).put(at + 44, &body[..4]).u32(body_at, own);
        self.seal_record(block)
    }

    fn seal_record(&mut self, block: u64) -> &mut Image {
        let (at, body_at) = (LOG_AT + block * BLOCK, LOG_AT + (block + 1) % LOG_BLOCKS * BLOCK);
        self.put(at + 32, &[0; 4]);
        let mut bytes = self.bytes[at as usize..][..328].to_vec();
        bytes.extend_from_slice(&self.bytes[body_at as usize..][..512]);
        self.put(at + 32, &crc32c(&bytes).to_le_bytes())
    }

    fn unmount(&mut self, block: u64) -> &mut Image {
        let mut body = [0; 20];
        body[8..10].copy_from_slice(&[0xaa, 0x20]);
        body[12..14].copy_from_slice(b"nU");
        self.record(block, lsn(0), 1, &body)
    }

    /// A record that covers the log: these operations, which tell of three pieces of the superblock.
    fn cover(&mut self, block: u64, tail: u64, change: impl FnOnce(&mut Vec<(u8, Vec<u8>)>)) -> &mut Image {
        let mut description = vec![0; 24];
        for (at, number) in [(0, 0x123c_u16), (2, 2), (4, 0x9000), (6, 1), (16, 1), (20, 7)] {
            description[at..at + 2].copy_from_slice(&number.to_le_bytes());
        }
        let mut superblock = self.bytes[..384].to_vec();
        // Another count of free blocks, and the rest that is not of now.
        superblock[144..152].fill(1);
        superblock[224..228].fill(2);
        superblock[240..248].fill(3);
        let head = [b"NART".as_slice(), &[0; 12]].concat();
        let mut all = vec![(1, Vec::new()), (0, head), (0, description), (0, superblock), (2, Vec::new())];
        change(&mut all);
        let mut body = Vec::new();
        for (flags, brings) in &all {
            body.extend_from_slice(&0x1234_5678_u32.to_be_bytes());
            body.extend_from_slice(&(brings.len() as u32).to_be_bytes());
            body.extend_from_slice(&[0x69, *flags, 0, 0]);
            body.extend_from_slice(brings);
        }
        body.resize(512, 0);
        self.record(block, tail, all.len() as u32, &body)
    }

    fn read(&self) -> Result<Option<FileSystem>, Error> {
        read(&View::new(&Arc::new(self.bytes.clone())))
    }

    #[track_caller]
    fn known(&self) -> Ranges {
        match self.read().unwrap().unwrap().allocation {
            Allocation::Known(used) => used,
            Allocation::Whole { why } => panic!("{why}"),
        }
    }

    #[track_caller]
    fn why(&self) -> String {
        match self.read().map(|found| found.unwrap().allocation) {
            Err(why) => format!("not even the superblock: {why}"),
            Ok(Allocation::Whole { why }) => why.to_string(),
            Ok(Allocation::Known(used)) => panic!("{used:?}"),
        }
    }
}

fn lsn(block: u64) -> u64 {
    u64::from(CYCLE) << 32 | block
}

fn used() -> Ranges {
    let free = FREE.iter().zip(0u64..).flat_map(|(all, group)| all.iter().map(move |one| (group, *one)));
    let free = free.map(|(group, (start, len))| {
        let from = (group * GROUP + u64::from(start)) * BLOCK;
        between(from, from + u64::from(len) * BLOCK).unwrap()
    });
    free.collect::<Ranges>().complement(between(0, BLOCKS * BLOCK).unwrap())
}

#[test]
fn what_is_in_neither_tree_is_used() {
    for v5 in [false, true] {
        let image = Image::new(v5);
        assert_eq!(image.known(), used());
        let found = image.read().unwrap().unwrap();
        assert_eq!(found.uuid.as_deref(), Some("30313233-3435-3637-3839-616263646566"));
        assert_eq!((found.label.as_deref(), found.block_size), (Some("a label"), Some(512)));
        assert_eq!((found.size.0, found.state), (BLOCKS * BLOCK, Some(State::Clean)));
        assert_eq!(found.version.as_deref(), Some(if v5 { "5" } else { "4" }));
        let features = if v5 {
            "crc projid32bit lazy-count finobt rmapbt reflink inobtcount ftype sparse meta_uuid bigtime"
        } else {
            "projid32bit lazy-count"
        };
        assert_eq!(found.features.join(" "), features);
    }
}

#[test]
fn other_places_are_nobodys() {
    for bytes in [vec![], vec![0; 511], b"XFSB".to_vec(), vec![0; 4096]] {
        assert!(read(&View::new(&Arc::new(bytes))).unwrap().is_none());
    }
}

/// A field is changed and all checksums are made right again: it is refused for this reason.
#[track_caller]
fn refused(v5: bool, at: u64, bytes: &[u8], why: &str) {
    let mut image = Image::new(v5);
    assert_ne!(image.bytes[at as usize..][..bytes.len()], *bytes, "nothing is changed");
    image.put(at, bytes).seal();
    let found = image.why();
    assert!(found.starts_with(why), "at {at}: {found}");
}

#[test]
fn every_field_of_the_superblock_is_held_against_the_rest() {
    let lost = "not even the superblock: ";
    for v5 in [false, true] {
        let no = |at: u64, bytes: &[u8], why: &str| refused(v5, at, bytes, why);
        no(
            4,
            &1024u32.to_be_bytes(),
            &format!("{lost}a superblock with an impossible size of blocks (at byte 4)"),
        );
        no(4, &513u32.to_be_bytes(), &format!("{lost}a superblock with an impossible size of blocks"));
        no(4, &0u32.to_be_bytes(), &format!("{lost}a superblock with an impossible size of blocks"));
        no(120, &[10], &format!("{lost}a superblock with an impossible size of blocks"));
        no(
            102,
            &100u16.to_be_bytes(),
            &format!("{lost}a superblock with an impossible size of sectors (at byte 102)"),
        );
        no(102, &513u16.to_be_bytes(), &format!("{lost}a superblock with an impossible size of sectors"));
        let groups = format!("{lost}a superblock whose groups do not make up its blocks (at byte 84)");
        no(8, &(3 * GROUP).to_be_bytes(), &groups);
        no(8, &(3 * GROUP + 63).to_be_bytes(), &groups);
        no(8, &(4 * GROUP + 1).to_be_bytes(), &groups);
        no(8, &u64::MAX.to_be_bytes(), &groups);
        no(84, &0u32.to_be_bytes(), &groups);
        no(88, &0u32.to_be_bytes(), &groups);
        no(88, &u32::MAX.to_be_bytes(), &groups);
        no(124, &[8], &format!("{lost}a superblock whose block numbers do not fit its groups (at byte 124)"));
        let log = format!("{lost}a superblock whose log lies where none can (at byte 48)");
        no(48, &(128u64 + 3).to_be_bytes(), &log);
        no(48, &(128u64 + LOG + 1).to_be_bytes(), &log);
        no(48, &u64::MAX.to_be_bytes(), &log);
        no(96, &0u32.to_be_bytes(), &log);
        no(96, &u32::MAX.to_be_bytes(), &log);

        no(48, &[0; 8], "a log on another device cannot be followed");
        no(100, &[0xb4, 0xa3], "the version 3 cannot be followed");
        no(100, &[0xb6, if v5 { 0xa5 } else { 0xa4 }], "the version bit 0x200 cannot be followed");
        let torn = "a superblock whose version and feature of checksums contradict each other (at byte 100)";
        // The first and the second place of these features.
        no(203, &[0x8b], "the feature 0x1 cannot be followed");
        no(207, &[0x8b], "the feature 0x1 cannot be followed");
        no(if v5 { 101 } else { 202 }, &[if v5 { 0xa4 } else { 1 }], torn);
        no(200, &[0x40], "the feature 0x40000000 cannot be followed");
        no(16, &[1], "a file system with a real-time device cannot be followed");
        no(126, &[1], "a file system that is still being made cannot be followed");
        no(8, &(BLOCKS + 1).to_be_bytes(), "a copy of the superblock that contradicts it");
        // With other groups the log lies elsewhere.
        no(84, &(GROUP as u32 + 1).to_be_bytes(), "a log with a gap in its cycles");
        no(96, &(LOG_BLOCKS as u32 - 1).to_be_bytes(), "a copy of the superblock that contradicts it");
        no(144, &[1], "a superblock whose count of free blocks is not that of its groups (at byte 144)");
        no(32, b"x", "a record of another file system's log");
    }
    let no = |at: u64, bytes: &[u8], why: &str| refused(true, at, bytes, why);
    no(212, &[0, 0, 0, 0x1f], "the read-only compatible feature 0x10 cannot be followed");
    no(216, &[0, 0, 1, 0xf], "the incompatible feature 0x100 cannot be followed");
    no(216, &[0, 0, 6, 0xf], "the incompatible feature 0x600 cannot be followed");
    no(216, &[0, 0, 0, 0x1f], "a file system that is to be repaired first cannot be followed");
    no(216, &[0, 0, 0, 0xb], "a structure of another file system (at byte 576)");
    no(248, b"x", "a structure of another file system (at byte 576)");
    no(240, &lsn(HEAD + 1).to_be_bytes(), "a superblock that is younger than the log (at byte 240)");
}

#[test]
fn a_file_system_to_be_repaired_has_errors_and_no_map() {
    let mut image = Image::new(true);
    let found = image.u32(216, 0x1f).seal().read().unwrap().unwrap();
    assert_eq!(found.state, Some(State::Errors));
}

#[test]
fn a_change_without_its_checksum_is_seen_everywhere() {
    let image = Image::new(true);
    for (at, _) in image.sealed.clone() {
        for byte in (at..at + BLOCK).step_by(7) {
            let mut image = image.clone();
            image.bytes[byte as usize] ^= 0x10;
            let found = image.read().map(|found| found.map(|found| found.allocation));
            let refused = match &found {
                Ok(Some(Allocation::Known(_))) => false,
                // The magic itself.
                Ok(None) => byte < 4,
                Ok(Some(Allocation::Whole { why })) | Err(why) => {
                    byte < at + 8 || (at..=at + 102).contains(&byte) || why.to_string().contains("checksum")
                }
            };
            assert!(refused, "byte {byte}: {found:?}");
        }
    }
}

#[test]
fn copies_of_the_superblock_agree_with_it() {
    for v5 in [false, true] {
        for group in 1..4 {
            let at = group * GROUP * BLOCK;
            refused(v5, at, b"x", "a copy of the superblock that is none");
            let fields: [(u64, &[u8]); 8] = [
                (4, &[1]),
                (8, &[1]),
                (48, &[1]),
                (51, &[0, 0, 0, 0, 1]),
                (84, &[1]),
                (88, &[1]),
                (96, &[1]),
                (102, &[4]),
            ];
            for (field, bytes) in fields {
                let why = format!("a copy of the superblock that contradicts it (at byte {at})");
                refused(v5, at + field, bytes, &why);
            }
            // What changes while it is mounted is brought up to date in the first one only.
            let mut image = Image::new(v5);
            image.u64(at + 144, 1).u64(at + 128, 7).seal();
            assert_eq!(image.known(), used());
        }
    }
}

#[test]
fn every_field_of_a_groups_headers_is_held_against_the_rest() {
    for v5 in [false, true] {
        for group in 0..4 {
            let start = group * GROUP * BLOCK;
            for (header, name) in [(start + 512, "AGF"), (start + 1024, "AGI")] {
                let no = |at: u64, bytes: &[u8], why: &str| {
                    refused(v5, header + at, bytes, &format!("{why} (at byte {})", header + at));
                };
                no(0, b"XAGX", &format!("a group without its {name}"));
                refused(v5, header + 4, &[1], &format!("a group without its {name}"));
                no(8, &[1], "the header of another group");
                no(12, &[1], "a group whose length is not that of the superblock");
            }
            let agf = start + 512;
            let no = |at: u64, bytes: &[u8], why: &str| refused(v5, agf + at, bytes, why);
            let height = "a tree of free extents with an impossible height";
            no(28, &[0; 4], height);
            no(32, &10u32.to_be_bytes(), height);
            no(28, &u32::MAX.to_be_bytes(), height);
            let beyond = "a block of a tree that lies beyond its group";
            for root in [0u32, 3, 96, u32::MAX] {
                no(16, &root.to_be_bytes(), beyond);
                no(20, &root.to_be_bytes(), beyond);
            }
            no(16, &20u32.to_be_bytes(), "a block of a tree of free extents that is none");
            let ring = "an AGF whose list of blocks for its trees has other ends than its count says";
            for (at, number) in
                [(40, 0u32), (40, u32::MAX), (44, 1), (44, 128), (44, u32::MAX), (48, 1), (48, 0xffff)]
            {
                no(at, &number.to_be_bytes(), &format!("{ring} (at byte {})", agf + 40));
            }
            no(52, &[1], &format!("an AGF whose count of free blocks is wrong (at byte {})", agf + 52));
            no(56, &[1], &format!("an AGF whose longest free extent is wrong (at byte {})", agf + 56));
            no(
                60,
                &[1],
                &format!("an AGF whose count of blocks in its trees is wrong (at byte {})", agf + 60),
            );
            // In place of something else, in the place of something free, and in none.
            let agi = start + 1024;
            refused(v5, agi + 20, &KEPT.to_be_bytes(), "a group in which two structures lie in one place");
            refused(v5, agi + 20, &96u32.to_be_bytes(), "a structure that lies beyond its group");
            if let Some((free, _)) = FREE[group as usize].first() {
                refused(v5, agi + 20, &free.to_be_bytes(), "a free extent that something else lies in");
                let list = start + 1536 + if v5 { 36 } else { 0 };
                refused(v5, list, &free.to_be_bytes(), "a free extent that something else lies in");
            }
        }
    }
    for group in 0..4 {
        let start = group * GROUP * BLOCK;
        let no = |at: u64, bytes: &[u8], why: &str| {
            refused(true, start + at, bytes, &format!("{why} (at byte {})", start + at));
        };
        no(1536, b"x", "a group without its list of blocks for its trees");
        refused(true, start + 1536 + 4, &[1], "a group without its list of blocks for its trees");
        for (at, stamp) in [(512, &group::AGF), (1024, &group::AGI), (1536, &group::AGFL)] {
            no(at + stamp.uuid, b"x", "a structure of another file system");
            no(at + stamp.lsn, &lsn(HEAD + 1).to_be_bytes(), "a structure that is younger than the log");
        }
        for (at, what) in [(1024 + 328, "finobt"), (512 + 24, "rmapbt"), (512 + 88, "reflink")] {
            let mut image = Image::new(true);
            image.u32(start + at, KEPT).seal();
            assert!(image.why().starts_with("a group in which two structures lie in one place"), "{what}");
        }
    }
}

#[test]
fn every_field_of_a_tree_is_held_against_the_rest() {
    for v5 in [false, true] {
        let header = if v5 { 56 } else { 16 };
        let below = header + (512 - header) / 12 * 8;
        // The first group's trees have four leaves, two blocks above these and a root, each.
        for tree in [0, 7] {
            for index in 0..7 {
                let at = Image::tree_block(0, tree + index);
                let no = |field: u64, bytes: &[u8], why: &str| {
                    refused(v5, at + field, bytes, &format!("{why} (at byte {})", at + field));
                };
                no(0, b"x", "a block of a tree of free extents that is none");
                no(4, &[0, 9], "a block of free extents of another level");
                no(6, &[0xff], "a block of free extents with an impossible count");
                no(6, &[0, 0], "a block of free extents with an impossible count");
                no(8, &[1], "a block of free extents with other neighbours");
                refused(v5, at + 12, &[1], "a block of free extents with other neighbours");
                if v5 {
                    no(16, &[0, 0, 0, 0, 0, 0, 1], "a block of free extents that belongs elsewhere");
                    no(24, &lsn(HEAD + 1).to_be_bytes(), "a structure that is younger than the log");
                    no(32, b"x", "a structure of another file system");
                    no(48, &[1], "a block of free extents of another group");
                }
                if index >= 4 {
                    refused(
                        v5,
                        at + below,
                        &0u32.to_be_bytes(),
                        "a block of a tree that lies beyond its group",
                    );
                    refused(
                        v5,
                        at + below,
                        &96u32.to_be_bytes(),
                        "a block of a tree that lies beyond its group",
                    );
                }
            }
            let leaf = Image::tree_block(0, tree + 1) + header;
            let start = |at: u64| Image::new(v5).get(at);
            // By its first record a block is known to those above it.
            let why = "a block of free extents that is not the one that the tree says";
            refused(v5, leaf, &(start(leaf) ^ 1).to_be_bytes(), why);
            // The second record comes behind the first one.
            let second = leaf + 8;
            refused(
                v5,
                second,
                &(start(second) - 2).to_be_bytes(),
                "free extents that are not in their order",
            );
            for len in [0, u32::MAX, GROUP as u32 - start(second) + 1] {
                let why = "a free extent that lies beyond its group";
                refused(v5, second + 4, &len.to_be_bytes(), why);
            }
        }
        // In only one of the trees.
        let by_start = Image::tree_block(0, 0) + header;
        refused(v5, by_start + 8 + 4, &2u32.to_be_bytes(), "two trees of free extents that do not agree");
        refused(v5, by_start + 8 + 3, &[43, 0, 0, 0, 2], "two trees of free extents that do not agree");
        let by_length = Image::tree_block(0, 7) + header;
        refused(v5, by_length + 8 + 3, &[51], "two trees of free extents that do not agree");
    }
}

/// A tree that says the same in both orders, and yet counts as free what is not.
#[test]
fn nothing_that_is_in_use_is_free() {
    for v5 in [false, true] {
        for (group, start) in
            [(1, LOG as u32), (1, LOG as u32 + 30), (0, 0), (0, 3), (0, 4), (0, 8), (0, 9), (0, 12), (0, 20)]
        {
            let header = if v5 { 56 } else { 16 };
            let mut image = Image::new(v5);
            // The one of greatest length, which is the last one by length and takes any place by its beginning.
            let mut free = FREE[group as usize].to_vec();
            let one = free.iter().position(|(_, len)| *len == 1).unwrap();
            free.remove(one);
            free.push((start, 1));
            free.sort_unstable();
            let (root, levels, behind) = image.tree(group, Order::Start, &free, TREES);
            let agf = group * GROUP * BLOCK + 512;
            image.u32(agf + 16, root).u32(agf + 28, levels);
            free.sort_by_key(|(start, len)| (*len, *start));
            let (root, levels, _) = image.tree(group, Order::Length, &free, behind);
            image.u32(agf + 20, root).u32(agf + 32, levels).seal();
            assert!(
                image.why().starts_with("a free extent that something else lies in"),
                "{start}: {} {header}",
                image.why()
            );
        }
    }
}

const REPLAY: &str = "a log with changes that are to be replayed cannot be followed";

#[test]
fn a_log_is_clean_where_it_ends_with_an_unmount_wherever_that_is() {
    for v5 in [false, true] {
        // In the middle, over the end in either way, up to the end, and one by an older kernel.
        for (head, block) in [(12, 10), (2, 0), (1, LOG_BLOCKS - 1), (LOG_BLOCKS, LOG_BLOCKS - 2), (3, 1)] {
            let mut image = Image::new(v5);
            image.log(head, CYCLE).unmount(block);
            assert_eq!(image.known(), used(), "{head}");
            let body = LOG_AT + (block + 1) % LOG_BLOCKS * BLOCK;
            image.put(body + 7, &[8]).seal_record(block);
            assert_eq!(image.known(), used(), "{head}");
        }
        // As mkfs leaves it, without a checksum; anywhere else that is no record of version 5.
        let mut image = Image::new(v5);
        for at in image.sealed.clone() {
            let lsn = [(224, 240), (216, 208), (312, 320), (32, 24), (52, 24)];
            let field = lsn.iter().find(|(checksum, _)| *checksum == at.1).unwrap().1;
            image.u64(at.0 + field, u64::MAX);
        }
        image.seal().log(2, 1).unmount(0).put(LOG_AT + 32, &[0; 4]).u32(LOG_AT + 36, u32::MAX);
        assert_eq!(image.known(), used());
        let mut image = Image::new(v5);
        image.put(LOG_AT + (HEAD - 2) * BLOCK + 32, &[0; 4]).u32(LOG_AT + (HEAD - 2) * BLOCK + 36, u32::MAX);
        match v5 {
            true => assert!(image.why().starts_with("a record of the log whose checksum does not hold")),
            false => assert_eq!(image.known(), used()),
        }
    }
}

#[test]
fn every_field_of_the_log_is_held_against_the_rest() {
    for v5 in [false, true] {
        let record = LOG_AT + (HEAD - 2) * BLOCK;
        let no = |at: u64, bytes: &[u8], why: &str| {
            let mut image = Image::new(v5);
            assert_ne!(image.bytes[at as usize..][..bytes.len()], *bytes, "nothing is changed");
            image.put(at, bytes).seal_record(HEAD - 2);
            assert_eq!(image.why(), why, "at {at}");
            let found = image.read().unwrap().unwrap();
            assert_eq!(found.state, Some(State::JournalToReplay));
        };
        let belongs = |what: &str, at: u64| format!("{what} (at byte {})", record + at);
        no(
            record,
            &CYCLE.to_be_bytes(),
            &format!("a log without a record at its end (at byte {})", LOG_AT + HEAD * BLOCK),
        );
        no(record + 8, &[0, 0, 0, 1], &belongs("a record of the log of another version", 8));
        // Its checksum would be that of more.
        let lost = format!("a log without a record at its end (at byte {})", LOG_AT + HEAD * BLOCK);
        let longer = if v5 { belongs("a record of the log whose checksum does not hold", 32) } else { lost };
        no(record + 12, &[0, 0, 4, 0], &longer);
        for len in [0u32, 511, 1 << 18, u32::MAX] {
            no(
                record + 12,
                &len.to_be_bytes(),
                &belongs("a record of the log with an impossible length", 12),
            );
        }
        no(
            record + 16,
            &(lsn(HEAD - 1)).to_be_bytes(),
            &belongs("a record of the log that belongs elsewhere", 16),
        );
        no(record + 304, b"x", &belongs("a record of another file system's log", 304));
        no(
            record + 320,
            &u32::MAX.to_be_bytes(),
            &belongs("a record of the log with an impossible length", 12),
        );
        for (at, bytes) in [
            (40, 2u32.to_be_bytes()),
            (516, [0, 0, 0, 9]),
            (520, [0xaa, 0x21, 0, 0]),
            (520, [0x69, 0x20, 0, 0]),
            (524, [0; 4]),
        ] {
            no(record + at, &bytes, REPLAY);
        }
        // Cycles: a block on either side of the head, the first and the last one, and one of none.
        let gap = |block: u64| format!("a log with a gap in its cycles (at byte {})", LOG_AT + block * BLOCK);
        for block in [1, 8, HEAD, HEAD + 1, LOG_BLOCKS - 2] {
            let other = if block < HEAD { CYCLE - 1 } else { CYCLE };
            let mut image = Image::new(v5);
            image.u32(LOG_AT + block * BLOCK, other);
            let why = image.why();
            let lost = format!("a log without a record at its end (at byte {})", LOG_AT + (HEAD + 1) * BLOCK);
            assert!(
                why == gap(block) || block == HEAD && why == lost || why.starts_with("a log with a gap"),
                "{block}: {why}"
            );
        }
        no(LOG_AT + (LOG_BLOCKS - 1) * BLOCK, &7u32.to_be_bytes(), &gap(LOG_BLOCKS - 1));
        no(LOG_AT, &[0; 4], &format!("a log that was never written (at byte {LOG_AT})"));
        no(LOG_AT + 16 * BLOCK, &9u32.to_be_bytes(), &gap(16));
    }
    let mut image = Image::new(true);
    image.put(LOG_AT + (HEAD - 1) * BLOCK + 100, &[1]);
    assert!(image.why().starts_with("a record of the log whose checksum does not hold"));
}

/// What is changed, and how.
type Change = (&'static str, fn(&mut Vec<(u8, Vec<u8>)>));

/// Frozen: two records that change nothing but the superblock's counters.
#[test]
fn a_log_that_is_only_covered_leaves_the_map_as_it_is() {
    for v5 in [false, true] {
        // The last of these is in front of the head; the second time over the log's end.
        for (head, first, second) in [(HEAD, 8, 10), (2, LOG_BLOCKS - 2, 0), (3, LOG_BLOCKS - 1, 1)] {
            let covered = || {
                let mut image = Image::new(v5);
                image.log(head, CYCLE);
                let tail = u64::from(image.cycle_of(first)) << 32 | first;
                image.cover(first, 0, |_| ()).cover(second, tail, |_| ());
                (image, tail)
            };
            let (image, tail) = covered();
            assert_eq!(image.known(), used());
            let found = image.read().unwrap().unwrap();
            assert_eq!((found.state, found.notes.len()), (Some(State::NotUnmounted), 1));
            // The count of now, and not that of the superblock.
            let (mut image, _) = covered();
            image.u64(144, 1).seal();
            assert_eq!(image.known(), used());
            assert_eq!(image.read().unwrap().unwrap().free, Image::new(v5).read().unwrap().unwrap().free);

            let changes: &[Change] = &[
                ("not begun", |all| all[0].0 = 0),
                ("not ended", |all| all[4].0 = 0),
                ("continued", |all| all[3].0 = 4),
                ("more at the beginning", |all| all[0].1 = vec![0; 4]),
                ("more at the end", |all| all[4].1 = vec![0; 4]),
                ("another head", |all| all[1].1[0] = b'X'),
                ("another thing", |all| all[2].1[0] = 0x3b),
                ("more pieces", |all| all[2].1[2] = 3),
                ("an order", |all| all[2].1[4] = 2),
                ("a longer buffer", |all| all[2].1[6] = 2),
                ("another place", |all| all[2].1[8] = 1),
                ("another place, far away", |all| all[2].1[15] = 1),
                ("no map", |all| all[2].1[16] = 0),
                ("no piece", |all| all[2].1[20] = 0),
                ("other pieces", |all| all[2].1[20] = 5),
                ("a piece beyond the end", |all| all[2].1[20] = 0xe),
                ("fewer bytes", |all| all[3].1.truncate(383)),
                ("another size", |all| all[3].1[15] ^= 1),
                ("another log", |all| all[3].1[55] ^= 1),
                ("other features", |all| all[3].1[219] ^= 1),
                ("two transactions' worth", |all| all.push((0, Vec::new()))),
                ("nothing", |all| all.clear()),
            ];
            for (what, change) in changes {
                for which in [first, second] {
                    let (mut image, _) = covered();
                    let tail = if which == first { 0 } else { tail };
                    image.cover(which, tail, change);
                    assert_eq!(image.why(), REPLAY, "{what}");
                }
            }
            for tail in
                [tail + 1, u64::from(CYCLE + 1) << 32 | first, tail ^ 1 << 32, LOG_BLOCKS, u64::MAX, 0]
            {
                let (mut image, _) = covered();
                image.cover(second, tail, |_| ());
                assert_eq!(image.why(), REPLAY, "{tail:#x}");
            }
            // From another one than a transaction, and another transaction's end.
            for at in [8, 0] {
                let (mut image, _) = covered();
                let body = LOG_AT + (second + 1) % LOG_BLOCKS * BLOCK;
                image.put(body + 12 + at, &[0xaa]).seal_record(second);
                assert_eq!(image.why(), REPLAY);
            }
        }
    }
}

proptest! {
    /// Where there are checksums, whatever else is on the disk, the map is the right one or none.
    #[test]
    fn random_changes_never_make_a_used_byte_free(
        changes in prop::collection::vec((0..BLOCKS * BLOCK, any::<u8>()), 1..6),
    ) {
        let mut image = Image::new(true);
        for (at, byte) in changes {
            image.put(at, &[byte]);
        }
        if let Ok(Some(FileSystem { allocation: Allocation::Known(found), .. })) = image.read() {
            prop_assert_eq!(found, used());
        }
    }

    /// Where there are none, or they were made right, both trees and the counters must tell the same lie.
    #[test]
    fn random_changes_with_checksums_are_read_without_a_panic(
        v5: bool,
        changes in prop::collection::vec((0..200u64, 0..BLOCK, any::<u32>(), 1..=4usize), 1..8),
    ) {
        let mut image = Image::new(v5);
        for (block, at, number, len) in changes {
            // Mostly small numbers.
            let at = (block * 3 % (BLOCKS - 1)) * BLOCK + at / 4 * 4;
            let number = if number % 2 == 0 { number % 128 } else { number };
            image.put(at, &number.to_be_bytes()[4 - len..]);
        }
        if let Ok(Some(FileSystem { allocation: Allocation::Known(found), size, .. })) = image.seal().read() {
            prop_assert!(found.iter().all(|range| range.end() <= size.0));
            // The headers at least.
            prop_assert!((0..4).all(|group| found.covers(between(group * GROUP * BLOCK, (group * GROUP + 4) * BLOCK).unwrap())));
        }
    }
}

/// A tree of free extents costs what is done with its extents, and not only what it takes to read it.
#[test]
fn free_extents_are_paid_for() {
    let extents: usize = FREE.iter().map(|group| group.len()).sum();
    for v5 in [false, true] {
        let spent = super::super::tests::spent_on_ranges(&Image::new(v5).bytes, read);
        assert_eq!(spent, 2 * extents as u64 * super::super::view::PER_RANGE);
    }
}
