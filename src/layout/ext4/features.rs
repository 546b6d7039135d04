//! Features, by their bits and as `dumpe2fs` calls them.

/// The three words of features.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features {
    /// Whoever does not know one of these may write all the same.
    pub compatible: u32,
    /// Whoever does not know one of these may not even read.
    pub incompatible: u32,
    /// Whoever does not know one of these may read and not write.
    pub read_only: u32,
}

/// A feature: a bit of one of the three words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Feature {
    /// Of the compatible ones.
    Compatible(u32),
    /// Of the incompatible ones.
    Incompatible(u32),
    /// Of those that forbid writing.
    ReadOnly(u32),
}

/// There is a journal.
pub const HAS_JOURNAL: Feature = Feature::Compatible(0x4);
/// Groups without a bitmap, from before descriptors had checksums.
const LAZY_BG: Feature = Feature::Compatible(0x40);
/// Two copies of the superblock, in groups that it names.
pub const SPARSE_SUPER2: Feature = Feature::Compatible(0x200);
/// The journal is to be replayed.
pub const RECOVER: Feature = Feature::Incompatible(0x4);
/// This is no file system, but the journal of one.
pub const JOURNAL_DEVICE: Feature = Feature::Incompatible(0x8);
/// Descriptors lie in the groups that they are about.
pub const META_BG: Feature = Feature::Incompatible(0x10);
/// Block numbers of 64 bits.
pub const WIDE: Feature = Feature::Incompatible(0x80);
/// Bitmaps and inode tables may lie in other groups.
pub const FLEX_BG: Feature = Feature::Incompatible(0x200);
/// The seed of checksums lies in the superblock.
pub const CSUM_SEED: Feature = Feature::Incompatible(0x2000);
/// Few groups have a copy of the superblock.
pub const SPARSE_SUPER: Feature = Feature::ReadOnly(0x1);
/// Descriptors have a CRC-16.
pub const GDT_CSUM: Feature = Feature::ReadOnly(0x10);
/// Space is given out in clusters of blocks.
pub const BIGALLOC: Feature = Feature::ReadOnly(0x200);
/// All of the metadata has checksums.
pub const METADATA_CSUM: Feature = Feature::ReadOnly(0x400);

/// What ext3 knows of incompatible features, and of those that forbid writing.
const EXT3: (u32, u32) = (0x2 | 0x4 | 0x10, 0x1 | 0x2 | 0x4);
/// Incompatible features whose file systems keep their free space as this program knows it.
const KNOWN_INCOMPATIBLE: u32 = 0x0003_e7d6;
/// The same of those that forbid writing.
const KNOWN_READ_ONLY: u32 = 0x0001_b77f;

const COMPATIBLE_NAMES: [&str; 13] = [
    "dir_prealloc",
    "imagic_inodes",
    "has_journal",
    "ext_attr",
    "resize_inode",
    "dir_index",
    "lazy_bg",
    "",
    "snapshot_bitmap",
    "sparse_super2",
    "fast_commit",
    "stable_inodes",
    "orphan_file",
];
const INCOMPATIBLE_NAMES: [&str; 18] = [
    "compression",
    "filetype",
    "needs_recovery",
    "journal_dev",
    "meta_bg",
    "",
    "extent",
    "64bit",
    "mmp",
    "flex_bg",
    "ea_inode",
    "",
    "dirdata",
    "metadata_csum_seed",
    "large_dir",
    "inline_data",
    "encrypt",
    "casefold",
];
const READ_ONLY_NAMES: [&str; 17] = [
    "sparse_super",
    "large_file",
    "",
    "huge_file",
    "uninit_bg",
    "dir_nlink",
    "extra_isize",
    "snapshot",
    "quota",
    "bigalloc",
    "metadata_csum",
    "replica",
    "read-only",
    "project",
    "shared_blocks",
    "verity",
    "orphan_present",
];

impl Features {
    /// Whether it has this one.
    pub fn has(&self, feature: Feature) -> bool {
        match feature {
            Feature::Compatible(bit) => self.compatible & bit != 0,
            Feature::Incompatible(bit) => self.incompatible & bit != 0,
            Feature::ReadOnly(bit) => self.read_only & bit != 0,
        }
    }

    /// What `blkid` calls a file system with these features.
    pub fn kind(&self) -> &'static str {
        if self.incompatible & !EXT3.0 != 0 || self.read_only & !EXT3.1 != 0 {
            "ext4"
        } else if self.has(HAS_JOURNAL) {
            "ext3"
        } else {
            "ext2"
        }
    }

    /// A feature with which free space may be kept in a way that is not known here.
    pub fn unknown(&self) -> Option<String> {
        let strange = Features {
            compatible: if self.has(LAZY_BG) { 0x40 } else { 0 },
            incompatible: self.incompatible & !KNOWN_INCOMPATIBLE,
            read_only: self.read_only & !KNOWN_READ_ONLY,
        };
        strange.names().into_iter().next()
    }

    /// Their names, in the order of `dumpe2fs`.
    pub fn names(&self) -> Vec<String> {
        let words: [(u32, char, &[&str]); 3] = [
            (self.compatible, 'C', &COMPATIBLE_NAMES),
            (self.incompatible, 'I', &INCOMPATIBLE_NAMES),
            (self.read_only, 'R', &READ_ONLY_NAMES),
        ];
        let mut all = Vec::new();
        for (word, letter, names) in words {
            let mut rest = word;
            for index in 0usize..32 {
                if rest & 1 == 1 {
                    all.push(match names.get(index) {
                        Some(name) if !name.is_empty() => (*name).to_owned(),
                        _ => format!("FEATURE_{letter}{index}"),
                    });
                }
                rest >>= 1;
            }
        }
        all
    }
}
