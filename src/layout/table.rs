//! Partition tables: what MBR and GPT have in common, and which of them a disk has.

use super::view::View;
use super::{Error, gpt, mbr};
use crate::units::Extent;

/// A partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Partition {
    /// As Linux numbers it.
    pub number: u32,
    /// Where it lies on the disk.
    pub extent: Extent,
    /// Its type: `0x83` in a MBR, a GUID in a GPT.
    pub kind: String,
    /// As `blkid` prints it as PARTUUID.
    pub uuid: Option<String>,
    /// The name that a GPT has for it.
    pub name: Option<String>,
    /// Whether it is marked for booting.
    pub bootable: bool,
    /// Whether it is the extended partition, in which the logical ones lie.
    pub container: bool,
}

/// The types of partitions that hold a boot loader's code and no file system: BIOS boot, and PReP in either table.
const BOOT: [&str; 3] =
    ["21686148-6449-6e6f-744e-656564454649", "9e1a2d38-c612-4316-aa26-8b49521e5a8b", "0x41"];

impl Partition {
    /// Whether a boot loader's code is all that it holds, by its type.
    pub fn boots(&self) -> bool {
        BOOT.contains(&self.kind.as_str())
    }
}

/// A partition table.
#[derive(Debug)]
pub struct Table {
    /// `dos` or `gpt`.
    pub kind: &'static str,
    /// The disk's identifier, as `sfdisk` prints it.
    pub id: Option<String>,
    /// The size of the sectors that it counts in.
    pub sector: u64,
    /// Whether that size is a guess, and the table would fit the disk with the other size as well.
    pub guessed: bool,
    /// In the order of the table.
    pub partitions: Vec<Partition>,
    /// Where the table itself lies: headers, entries, the boot records of logical partitions.
    pub own: Vec<Extent>,
    /// What whoever looks at it should know.
    pub notes: Vec<String>,
    /// Why nothing that it says of free space can be trusted.
    pub flaw: Option<Error>,
}

impl Table {
    pub(super) fn new(kind: &'static str, id: Option<String>, sector: u64) -> Table {
        let (partitions, own, notes) = (Vec::new(), Vec::new(), Vec::new());
        Table { kind, id, sector, guessed: false, partitions, own, notes, flaw: None }
    }

    /// Bytes that the table itself takes.
    pub(super) fn takes(&mut self, at: u64, len: u64) {
        self.own.extend(Extent::new(at, len));
    }

    /// Remembers the first thing that is wrong with it.
    pub(super) fn flaw(&mut self, flaw: Error) {
        self.flaw.get_or_insert(flaw);
    }

    /// The same, where nothing more is to be had.
    pub(super) fn flawed(&mut self, flaw: Error) -> Result<(), Error> {
        self.flaw(flaw);
        Ok(())
    }

    /// The partitions that hold something of their own.
    pub fn leaves(&self) -> impl Iterator<Item = &Partition> {
        self.partitions.iter().filter(|one| !one.container)
    }

    /// Looks for what contradicts itself: partitions beyond the end, over each other or over the table.
    fn check(&mut self, size: u64) {
        let beyond = self.partitions.iter().find(|one| one.extent.end() > size);
        let beyond = beyond.map(|one| (one.extent, "a partition that ends beyond the disk's end"));
        // Logical partitions lie in the extended one, and all others beside it.
        let containers: Vec<Extent> =
            self.partitions.iter().filter(|one| one.container).map(|one| one.extent).collect();
        let primary = |one: &&Partition| !one.container && self.kind == "dos" && one.number <= 4;
        let inside = self
            .partitions
            .iter()
            .filter(primary)
            .find(|one| containers.iter().any(|container| container.overlaps(one.extent)))
            .map(|one| (one.extent, "a partition that overlaps the extended one"));
        let mut all: Vec<Extent> =
            self.leaves().map(|one| one.extent).chain(self.own.iter().copied()).collect();
        all.sort_by_key(|extent| extent.offset());
        let overlap = all.iter().zip(all.iter().skip(1)).find(|(one, next)| one.overlaps(**next));
        let overlap = overlap.map(|(_, next)| (*next, "a partition that overlaps another or the table"));
        let empty = self.partitions.is_empty();
        if let Some((extent, what)) = beyond.or(overlap).or(inside) {
            self.flaw(Error::Corrupt { what, at: extent.offset() });
        } else if empty {
            // Whoever writes to a disk without partitions writes to the disk.
            self.flaw(Error::unsupported("a table without partitions"));
        }
    }
}

/// Reads the table of a disk that announces one. `sector` is the size of its sectors, where that is known: an image does
/// not say.
pub(super) fn read(disk: &View<'_>, sector: Option<u64>) -> Result<Table, Error> {
    let entries = mbr::read_entries(disk)?;
    let protective = entries.iter().flatten().any(|entry| entry.is_protective());
    let gpt = gpt::read(disk, sector)?;
    let mut table = match (entries.as_deref(), gpt) {
        (Some(entries), Some(mut table)) if protective => {
            if entries.len() > 1 {
                table.flaw(Error::unsupported("a GPT beside partitions in the MBR"));
            }
            table
        }
        // What the kernel would take: it looks at no GPT without a protective entry.
        (Some([_, ..]), Some(_)) => {
            let mut table = mbr::read(disk, sector.unwrap_or(512))?;
            table.flaw(Error::unsupported("a MBR beside the GPT of other times"));
            table
        }
        (_, Some(mut table)) => {
            table.flaw(Error::unsupported("a GPT without its protective MBR"));
            table
        }
        (Some(_), None) if protective => {
            return Err(Error::Corrupt {
                what: "a protective MBR, and neither header of the GPT is sound",
                at: 0,
            });
        }
        (_, None) => mbr::read(disk, sector.unwrap_or(512))?,
    };
    table.check(disk.size());
    // What the table says in sectors of 512 bytes it says in those of 4096 too: eight times as far.
    let end = table.partitions.iter().map(|one| one.extent.end()).max().unwrap_or(0);
    table.guessed = sector.is_none() && table.kind == "dos" && end.saturating_mul(8) <= disk.size();
    Ok(table)
}
