//! What lies on a disk that is not empty, by its signatures alone.
//!
//! This answers one question: would something be lost? So it looks at the places where partition tables, file
//! systems, volume managers and swap announce themselves, and believes each of them. All of these places but one lie
//! in the first and the last MiB. Where nothing announces itself there, places all over the disk are looked at: data
//! without a signature, or whose signature was wiped, is data all the same. To read all of a large disk would take
//! hours, so [`Content`] says what was looked at.

use std::fmt;
use std::fs::File;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;

use crate::bytes;
use crate::error::IoError;
use crate::storage::ReadAt;
use crate::storage::file::ReadFile;

/// One thing that announces itself on a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Signature {
    /// What it is, as `blkid` calls it: `ext4`, `LVM2_member`, `gpt`.
    pub kind: &'static str,
    /// Where its magic lies, in bytes from the beginning of the disk.
    pub at: u64,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (at byte {})", self.kind, self.at)
    }
}

/// What was found on a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Content {
    /// All signatures that were found, by their place.
    pub signatures: Vec<Signature>,
    /// Where the first byte lies that is not zero, of those that were looked at.
    pub first_data: Option<u64>,
    /// At how many places between the first and the last MiB it was looked; `None` where all of the disk was.
    pub places: Option<u64>,
}

impl Content {
    /// Whether nothing was found: no signature, and nothing but zeros. [`Content::places`] says how much that says.
    pub fn is_blank(&self) -> bool {
        self.signatures.is_empty() && self.first_data.is_none()
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, signature) in self.signatures.iter().enumerate() {
            write!(f, "{}{signature}", if at > 0 { ", " } else { "" })?;
        }
        match (self.signatures.is_empty(), self.first_data, self.places) {
            (false, _, _) => Ok(()),
            (true, Some(at), _) => write!(f, "data without a known signature (at byte {at})"),
            (true, None, None) => f.write_str("nothing but zeros"),
            (true, None, Some(places)) => write!(
                f,
                "nothing found in its first and last MiB and at {places} places between, and not looked further"
            ),
        }
    }
}

/// How much is read at either end.
const END: u64 = 1 << 20;
/// The one place behind that where something announces itself, and how much of it is read.
pub const FAR: (u64, u64) = (1 << 20, 4096);
/// How many places between are looked at, and how much is read at each. A disk that turns takes some seconds.
const PLACES: u64 = 512;
const PLACE: u64 = 4096;

/// Reads both ends of `source` and looks for signatures; where there is nothing, looks for any data between. Errors
/// are those of reading.
pub fn probe(source: &impl ReadAt) -> Result<Content, IoError> {
    let size = source.size();
    let len = usize::try_from(size.min(END)).unwrap_or(0);
    let mut head = vec![0; len];
    source.read_at(0, &mut head)?;
    // A disk of less than 2 MiB is read twice in the middle, which costs nothing.
    let start = size.saturating_sub(END);
    let mut tail = vec![0; len];
    source.read_at(start, &mut tail)?;
    let far = usize::try_from(size.saturating_sub(FAR.0).min(FAR.1)).unwrap_or(0);
    let mut far = vec![0; far];
    source.read_at(FAR.0.min(size), &mut far)?;
    let mut content = parse(&[(0, &head), (FAR.0, &far), (start, &tail)], size);
    if !content.is_blank() {
        return Ok(content);
    }
    let blocks = start.saturating_sub(END).div_ceil(PLACE);
    let places = blocks.min(PLACES);
    let mut place = vec![0; usize::try_from(PLACE).unwrap_or(0)];
    for index in 0..places {
        // The first and the last block, and evenly spread ones between; on a small disk that is each of them.
        let last = places.saturating_sub(1).max(1);
        let block = index.saturating_mul(blocks.saturating_sub(1)).checked_div(last).unwrap_or(0);
        let at = END.saturating_add(block.saturating_mul(PLACE));
        // The last block may reach into the tail.
        source.read_at(at, &mut place)?;
        content.first_data = first_data(&place, at);
        if content.first_data.is_some() {
            break;
        }
    }
    content.places = (places < blocks).then_some(places);
    Ok(content)
}

/// Where the first byte lies that is not zero, of some that begin at `from`.
fn first_data(bytes: &[u8], from: u64) -> Option<u64> {
    let at = bytes.iter().position(|&byte| byte != 0)?;
    from.checked_add(u64::try_from(at).ok()?)
}

/// Looks for signatures on a block device or an image that is open for reading.
pub fn probe_file(file: &File, target: &str) -> Result<Content, IoError> {
    let copy = file.try_clone().map_err(|error| IoError::new("duplicate", target, error))?;
    // What lies beside the places that are looked at is not wanted. Where the advice is not taken it only takes longer.
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).ok();
    probe(&ReadFile::new(copy, target)?.afresh())
}

/// Magic bytes at a fixed place from the beginning.
const MAGICS: &[(&str, u64, &[u8])] = &[
    ("xfs", 0, b"XFSB"),
    ("DM_snapshot_cow", 0, b"SnAp"),
    ("DM_verity_hash", 0, b"verity\0\0"),
    ("DM_integrity", 0, b"integrt\0"),
    ("LVM1_member", 0, b"HM\x01\0"),
    ("LVM1_member", 0, b"HM\x02\0"),
    ("vdo", 0, b"dmvdo001"),
    ("ReFS", 0, b"\0\0\0ReFS\0"),
    ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    ("squashfs", 0, b"hsqs"),
    ("ceph_bluestore", 0, b"bluestore block device"),
    ("linux_raid_member", 0, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
    ("linux_raid_member", 4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("apfs", 32, b"NXSB"),
    ("oracleasm", 32, b"ORCLDISK"),
    ("stratis", 512 + 4, STRATIS),
    ("stratis", 9 * 512 + 4, STRATIS),
    ("gpt", 512, b"EFI PART"),
    ("gpt", 4096, b"EFI PART"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("hfsplus", 1024, b"H+\0\x04"),
    ("vxfs", 1024, b"\xf5\xfc\x01\xa5"),
    ("vxfs", 8 << 10, b"\xa5\x01\xfc\xf5"),
    // It begins its third block, of 512 bytes to 4 KiB.
    ("ocfs2", 1 << 10, b"OCFSV2"),
    ("ocfs2", 2 << 10, b"OCFSV2"),
    ("ocfs2", 4 << 10, b"OCFSV2"),
    ("ocfs2", 8 << 10, b"OCFSV2"),
    ("ocfs", 8 << 10, b"OracleCFS"),
    ("bcachefs", 4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    ("bcache", 4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("jfs", 32 << 10, b"JFS1"),
    ("iso9660", (32 << 10) + 1, b"CD001"),
    ("udf", (32 << 10) + 1, b"BEA01"),
    ("reiserfs", (8 << 10) + 52, b"ReIsErFs"),
    ("reiserfs", (64 << 10) + 52, b"ReIsErFs"),
    ("reiserfs", (64 << 10) + 52, b"ReIsEr2Fs"),
    ("reiserfs", (64 << 10) + 52, b"ReIsEr3Fs"),
    ("reiser4", 64 << 10, b"ReIsEr4"),
    ("btrfs", (64 << 10) + 64, b"_BHRfS_M"),
    ("ufs", (8 << 10) + 1372, b"\x54\x19\x01\0"),
    ("ufs", (64 << 10) + 1372, b"\x19\x01\x54\x19"),
    ("VMFS_volume_member", FAR.0, b"\x0d\xd0\x01\xc0"),
];

const STRATIS: &[u8] = b"!Stra0tis\x86\xff\x02^\x41rh";

/// Parts of arrays and the like, which most often announce themselves at their end. What announces itself at their beginning
/// is in the array, and lies elsewhere once that is put together.
pub const MEMBERS: [&str; 5] =
    ["linux_raid_member", "ddf_raid_member", "isw_raid_member", "lsi_mega_raid_member", "drbd"];

/// Looks for signatures in pieces of a disk of `size` bytes, in ascending order, of each of which it is said where it lies:
/// the first and the last bytes (up to a MiB each), and what is [`FAR`].
pub fn parse(pieces: &[(u64, &[u8])], size: u64) -> Content {
    let ends = Pieces(pieces);
    let mut signatures: Vec<Signature> = Vec::new();
    let mut add = |kind, at| signatures.push(Signature { kind, at });
    for (kind, at, magic) in MAGICS {
        if ends.has(*at, magic) {
            add(kind, *at);
        }
    }
    if let Some(kind) = ext(&ends) {
        add(kind, EXT + 0x38);
    }
    if let Some(at) = fat(&ends) {
        add("vfat", at);
    }
    // A physical volume's label may lie in any of the first four sectors.
    for at in [0, 512, 1024, 1536] {
        if ends.has(at, b"LABELONE") && ends.has(at.saturating_add(24), b"LVM2 001") {
            add("LVM2_member", at.saturating_add(24));
        }
    }
    // Swap's magic ends the first page, and pages come in several sizes.
    for page in [4u64 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10] {
        let at = page.saturating_sub(10);
        if ends.has(at, b"SWAPSPACE2") || ends.has(at, b"SWAP-SPACE") {
            add("swap", at);
        }
        // A machine that sleeps left its memory there.
        if [b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND"].into_iter().any(|magic| ends.has(at, magic)) {
            add("swsuspend", at);
        }
    }
    // LUKS 2 keeps a second header at one of these places; it is found even where the first one was wiped.
    for at in (14..=18).map(|shift| 1u64 << shift) {
        if ends.has(at, b"SKUL\xba\xbe") {
            add("crypto_LUKS", at);
        }
    }
    // ZFS: a ring of uberblocks in the second half of the first label, of 1 KiB each or more.
    let uberblock = (128u64..256).map(|kib| kib << 10).find(|at| {
        ends.has(*at, &0x00ba_b10c_u64.to_le_bytes()) || ends.has(*at, &0x00ba_b10c_u64.to_be_bytes())
    });
    if let Some(at) = uberblock {
        add("zfs_member", at);
    }
    for sector in [512, 4096] {
        if let Some(at) = size.checked_sub(sector).filter(|at| *at > sector && ends.has(*at, b"EFI PART")) {
            add("gpt", at);
        }
    }
    // md 0.90: the last 64 KiB that are aligned to 64 KiB. md 1.0: 8 KiB before the end, aligned to 4 KiB.
    if let Some(at) = (size & !0xffff).checked_sub(0x1_0000)
        && (ends.has(at, b"\xfc\x4e\x2b\xa9\0\0\0\0") || ends.has(at, b"\xa9\x2b\x4e\xfc\0\0\0\0"))
    {
        add("linux_raid_member", at);
    }
    if let Some(at) = size.checked_sub(0x2000).map(|at| at & !0xfff)
        && ends.has(at, b"\xfc\x4e\x2b\xa9\x01\0\0\0")
    {
        add("linux_raid_member", at);
    }
    // Of controllers of disks: in the last sectors, which they may count in either size.
    for sector in [512, 4096] {
        let last = |back: u64| size.checked_div(sector)?.checked_sub(back)?.checked_mul(sector);
        if let Some(at) = last(2).filter(|at| ends.has(*at, b"Intel Raid ISM Cfg Sig. ")) {
            add("isw_raid_member", at);
        }
    }
    let last = |back: u64| (size >> 9).checked_sub(back).map(|sector| sector << 9);
    if let Some(at) = last(1).filter(|at| ends.has(*at, b"$XIDE$")) {
        add("lsi_mega_raid_member", at);
    }
    for at in [last(1), last(257)].into_iter().flatten() {
        if ends.has(at, b"\xde\x11\xde\x11") || ends.has(at, b"\x11\xde\x11\xde") {
            add("ddf_raid_member", at);
        }
    }
    // DRBD: in the block that ends the disk, where that has its own metadata.
    if let Some(at) = size.checked_sub(4096 - 60)
        && [0x6b, 0x6c, 0x6d].into_iter().any(|version| ends.has(at, &[0x83, 0x74, 0x02, version]))
    {
        add("drbd", at);
    }
    // GFS and GFS2 have one magic, and the number of their format is another.
    if ends.has(64 << 10, b"\x01\x16\x19\x70") {
        let first = ends.has((64 << 10) + 24, &1309u32.to_be_bytes());
        add(if first { "gfs" } else { "gfs2" }, 64 << 10);
    }
    // The boot sector of FAT and NTFS ends as a partition table does, and what stands before that is code.
    let boot_sector =
        signatures.iter().any(|found| matches!(found.kind, "vfat" | "ntfs" | "exfat" | "BitLocker"));
    if !boot_sector && has_partition_table(&ends) {
        // An entry of type 0xee covers the disk for those that know no GPT.
        let protective =
            [446u64, 462, 478, 494].into_iter().any(|at| ends.has(at.saturating_add(4), &[0xee]));
        signatures.push(Signature { kind: if protective { "PMBR" } else { "dos" }, at: 510 });
    }
    signatures.sort_by_key(|found| found.at);
    signatures.dedup();
    let first_data = pieces.iter().find_map(|(at, bytes)| first_data(bytes, *at));
    Content { signatures, first_data, places: Some(0) }
}

/// Pieces of a disk, addressed by offsets on the disk.
struct Pieces<'a>(&'a [(u64, &'a [u8])]);

impl Pieces<'_> {
    fn get(&self, at: u64, len: usize) -> Option<&[u8]> {
        self.0.iter().find_map(|(start, bytes)| {
            let from = usize::try_from(at.checked_sub(*start)?).ok()?;
            bytes.get(from..from.checked_add(len)?)
        })
    }

    fn has(&self, at: u64, magic: &[u8]) -> bool {
        self.get(at, magic.len()) == Some(magic)
    }

    fn u32(&self, at: u64) -> Option<u32> {
        bytes::le32(self.get(at, 4)?, 0)
    }
}

/// Where the super block of ext2, 3 and 4 begins.
const EXT: u64 = 1024;

/// Which of the ext file systems it is, if it is one, by its feature words.
fn ext(ends: &Pieces<'_>) -> Option<&'static str> {
    if !ends.has(EXT + 0x38, b"\x53\xef") {
        return None;
    }
    let compatible = ends.u32(EXT + 0x5c)?;
    let incompatible = ends.u32(EXT + 0x60)?;
    let read_only = ends.u32(EXT + 0x64)?;
    const HAS_JOURNAL: u32 = 0x4;
    const JOURNAL_DEVICE: u32 = 0x8;
    // filetype, needs_recovery, meta_bg; sparse_super, large_file, btree_dir: what ext3 knows.
    const EXT3_INCOMPATIBLE: u32 = 0x2 | 0x4 | 0x10;
    const EXT3_READ_ONLY: u32 = 0x1 | 0x2 | 0x4;
    Some(if incompatible & JOURNAL_DEVICE != 0 {
        "jbd"
    } else if incompatible & !EXT3_INCOMPATIBLE != 0 || read_only & !EXT3_READ_ONLY != 0 {
        "ext4"
    } else if compatible & HAS_JOURNAL != 0 {
        "ext3"
    } else {
        "ext2"
    })
}

/// Where FAT says that it is FAT.
fn fat(ends: &Pieces<'_>) -> Option<u64> {
    let names: [(u64, &[u8]); 4] =
        [(0x52, b"FAT32   "), (0x36, b"FAT12   "), (0x36, b"FAT16   "), (0x36, b"FAT     ")];
    let jump = matches!(ends.get(0, 1), Some([0xeb | 0xe9]));
    names.iter().find(|(at, name)| jump && ends.has(*at, name)).map(|(at, _)| *at)
}

/// Whether the first sector ends as a master boot record does, and its four entries have boot flags.
fn has_partition_table(ends: &Pieces<'_>) -> bool {
    let flag = |at: u64| matches!(ends.get(at, 1), Some([0x00 | 0x80]));
    ends.has(510, b"\x55\xaa") && [446, 462, 478, 494].into_iter().all(flag)
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    const SIZE: u64 = 300 << 20;

    fn image(make: &[&str]) -> Option<tempfile::NamedTempFile> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(SIZE).unwrap();
        let path = image.path().to_str().unwrap();
        let mut command = Command::new("sh");
        command
            .arg("-ec")
            .arg(make.join(" ").replace("IMG", path))
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let output = command.output().unwrap();
        if output.status.code() == Some(127) {
            assert!(std::env::var_os("CI").is_none(), "{make:?} is not installed");
            eprintln!("SKIPPED: {} is not installed", make[0]);
            return None;
        }
        assert!(output.status.success(), "{make:?}: {}", String::from_utf8_lossy(&output.stderr));
        Some(image)
    }

    fn content(image: &tempfile::NamedTempFile) -> Content {
        probe_file(&File::open(image.path()).unwrap(), "image").unwrap()
    }

    /// All that `wipefs` would erase: type and offset, one a line.
    fn wipefs(image: &tempfile::NamedTempFile) -> Vec<(String, u64)> {
        let output =
            Command::new("/usr/sbin/wipefs").args(["-i", "-p", "--noheadings"]).arg(image.path()).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        let mut found: Vec<(String, u64)> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                let fields: Vec<&str> = line.split(',').collect();
                let at = u64::from_str_radix(fields[0].trim_start_matches("0x"), 16).unwrap();
                (fields[3].to_owned(), at)
            })
            .collect();
        found.sort_by_key(|(_, at)| *at);
        found
    }

    #[test]
    fn what_the_tools_make_is_found_where_wipefs_finds_it() {
        let makers: &[&[&str]] = &[
            &["mkfs.ext2 -q IMG"],
            &["mkfs.ext3 -q IMG"],
            &["mkfs.ext4 -q IMG"],
            &["mkfs.xfs -q IMG"],
            &["mkfs.btrfs -q IMG"],
            &["mkswap -q IMG"],
            &["mkfs.vfat -F 32 IMG"],
            &["mkfs.vfat -F 16 IMG"],
            &["mkfs.ntfs -q -F -f IMG"],
            &["mkreiserfs -q -f -f IMG"],
            &["echo 'label: dos' | sfdisk -q IMG"],
            &["printf 'label: dos\\n,100M\\n' | sfdisk -q IMG"],
            &["printf 'label: gpt\\n,100M\\n' | sfdisk -q IMG"],
            &["echo secret | cryptsetup luksFormat --type luks1 --pbkdf-force-iterations 1000 -q IMG -"],
            &[
                "echo secret | cryptsetup luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 -q IMG -",
            ],
        ];
        let mut tried = 0;
        for make in makers {
            let Some(image) = image(make) else { continue };
            let content = content(&image);
            let found: Vec<(String, u64)> =
                content.signatures.iter().map(|s| (s.kind.to_owned(), s.at)).collect();
            let mut theirs = wipefs(&image);
            // wipefs takes the end of a boot sector of NTFS for a partition table, and names each of the places
            // that FAT must have right; one of them is enough here.
            if found.iter().any(|one| one.0 == "ntfs") {
                theirs.retain(|one| one.0 != "dos");
            }
            if found.iter().any(|one| one.0 == "vfat") {
                theirs.retain(|one| found.contains(one));
            }
            assert_eq!(found, theirs, "{make:?}");
            assert!(!content.is_blank());
            tried += 1;
        }
        assert!(tried > 0, "none of the tools is installed");
    }

    #[test]
    fn iso_9660_is_found() {
        let make =
            ["mkdir IMG.d && echo hello > IMG.d/a && xorriso -as mkisofs -quiet -o IMG IMG.d; rm -r IMG.d"];
        let Some(image) = image(&make) else { return };
        assert!(content(&image).signatures.contains(&Signature { kind: "iso9660", at: 32769 }));
    }

    /// Super blocks as mdadm and pvcreate write them, which need devices to do so; the places are those of
    /// md(4) and of lvmdiskscan.
    #[test]
    fn md_lvm_and_zfs_are_found_at_their_places() {
        let size = SIZE + 12345 * 512;
        let last = (size & !0xffff) - 0x1_0000;
        let cases: [(&str, u64, &[u8]); 13] = [
            ("linux_raid_member", last, b"\xfc\x4e\x2b\xa9\0\0\0\0"),
            ("linux_raid_member", ((size / 512 - 16) & !7) * 512, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
            ("linux_raid_member", 0, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
            ("linux_raid_member", 4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
            ("gpt", size - 512, b"EFI PART"),
            ("gpt", size - 4096, b"EFI PART"),
            ("zfs_member", (128 << 10) + 5 * 1024, b"\x0c\xb1\xba\0\0\0\0\0"),
            ("zfs_member", 128 << 10, b"\0\0\0\0\0\xba\xb1\x0c"),
            ("isw_raid_member", (size / 4096 - 2) * 4096, b"Intel Raid ISM Cfg Sig. 1.3"),
            ("ddf_raid_member", size - 512, b"\x11\xde\x11\xde"),
            ("ddf_raid_member", size - 257 * 512, b"\xde\x11\xde\x11"),
            ("swsuspend", 4086, b"ULSUSPEND"),
            ("bcachefs", 4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
        ];
        for (kind, at, magic) in cases {
            // One byte beside its place it is nothing.
            for (shift, expected) in [(0, vec![Signature { kind, at }]), (1, vec![])] {
                let (mut head, mut tail) = (vec![0; END as usize], vec![0; END as usize]);
                let (end, from) = if at < END { (&mut head, at) } else { (&mut tail, at - (size - END)) };
                end[from as usize + shift..][..magic.len()].copy_from_slice(magic);
                assert_eq!(parse(&[(0, &head), (size - END, &tail)], size).signatures, expected, "{kind}");
            }
        }
        let mut head = vec![0; END as usize];
        head[512..520].copy_from_slice(b"LABELONE");
        assert_eq!(parse(&[(0, &head)], size).signatures, []);
        head[536..544].copy_from_slice(b"LVM2 001");
        assert_eq!(parse(&[(0, &head)], size).signatures, [Signature { kind: "LVM2_member", at: 536 }]);
    }

    #[test]
    fn a_disk_is_blank_where_nothing_is_found_and_says_where_it_looked() {
        let image = image(&["true"]).unwrap();
        let found = content(&image);
        assert!(found.is_blank() && found.places == Some(512));
        assert!(found.to_string().contains("first and last MiB and at 512 places between"), "{found}");
        image.as_file().write_all_at(&[1], SIZE - 1).unwrap();
        let found = content(&image);
        assert!(!found.is_blank() && found.signatures.is_empty());
        assert_eq!(found.to_string(), format!("data without a known signature (at byte {})", SIZE - 1));
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(content(&empty).is_blank());
    }

    #[test]
    fn data_between_the_ends_is_found() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let file = image.as_file();
        file.set_len(SIZE).unwrap();
        // A run of a hundredth of the disk, wherever it lies: also right behind the head and right before the tail.
        let run = vec![0xa5; (SIZE / 100) as usize];
        for from in [END, 2 << 20, SIZE / 2, SIZE - END - run.len() as u64] {
            file.write_all_at(&run, from).unwrap();
            let found = content(&image);
            let at = found.first_data.unwrap();
            assert!(!found.is_blank() && (from..from + run.len() as u64).contains(&at), "{from}: {found:?}");
            file.write_all_at(&vec![0; run.len()], from).unwrap();
            assert!(content(&image).is_blank());
        }
    }

    #[test]
    fn all_of_a_small_disk_is_looked_at() {
        for size in [4096, END, END + 512, 2 * END, 2 * END + 512, 4 * END] {
            let image = tempfile::NamedTempFile::new().unwrap();
            let file = image.as_file();
            file.set_len(size).unwrap();
            let found = content(&image);
            assert!(found.is_blank() && found.places.is_none(), "{size}: {found:?}");
            assert_eq!(found.to_string(), "nothing but zeros");
            for at in (0..size).step_by(4096 * 7 + 511).chain([size - 1]) {
                file.write_all_at(&[1], at).unwrap();
                assert_eq!(content(&image).first_data, Some(at), "of {size} bytes");
                file.write_all_at(&[0], at).unwrap();
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(head: Vec<u8>, tail: Vec<u8>, size: u64) {
            parse(&[(0, &head), (size.saturating_sub(tail.len() as u64), &tail)], size);
        }
    }
}
