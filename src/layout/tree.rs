//! What lies on some disks, from their tables down to their file systems.

use std::io;

use super::lvm::group::{Group, Volume};
use super::lvm::{self, PhysicalVolume};
use super::signature::{FAR, MEMBERS};
use super::table::{self, Table};
use super::view::{PER_READ, View};
use super::{Allocation, Error, FileSystem, PARSERS, mbr, named, signature};
use crate::error::IoError;
use crate::storage::ReadAt;
use crate::units::Extent;

/// A disk that is to be looked at.
#[derive(Clone, Copy)]
pub struct Disk<'a> {
    /// Reads it.
    pub reader: &'a dyn ReadAt,
    /// The size of its sectors in bytes; an image does not say.
    pub sector: Option<u64>,
}

/// What lies on some disks.
#[derive(Debug)]
pub struct Layout {
    /// One for each disk, in their order.
    pub disks: Vec<Place>,
    /// The physical volumes on all of them.
    pub physical: Vec<PhysicalVolume>,
    /// The volume groups that these belong to.
    pub groups: Vec<GroupLayout>,
}

/// A disk or a partition, and what lies there.
#[derive(Debug)]
pub struct Place {
    /// From the beginning of the disk.
    pub at: u64,
    /// In bytes.
    pub size: u64,
    /// What lies there.
    pub content: Content,
}

/// A volume group, and what lies in its logical volumes.
#[derive(Debug)]
pub struct GroupLayout {
    /// The group.
    pub group: Group,
    /// One for each of its logical volumes, in their order; `None` for those that are no disks of their own: hidden ones,
    /// and those of which it is not known where they lie, or who else needs them.
    pub contents: Vec<Option<Content>>,
}

/// What lies in a place.
#[derive(Debug)]
pub enum Content {
    /// Nothing announces itself, or it is a boot loader's partition. There may be data all the same.
    Unknown,
    /// More than one thing announces itself, and which of them is meant cannot be told.
    Several(Vec<&'static str>),
    /// What announces itself cannot be read.
    Unread {
        /// What it is, if it got that far.
        kind: Option<&'static str>,
        /// Why.
        why: Error,
    },
    /// Partitions.
    Table {
        /// The table.
        table: Table,
        /// The places of [`Table::leaves`], in their order.
        places: Vec<Place>,
    },
    /// A file system, or what lies in place of one.
    FileSystem(FileSystem),
    /// A physical volume: its index in [`Layout::physical`].
    PhysicalVolume(usize),
}

/// Where a place is, which decides what may lie there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Disk { sector: Option<u64> },
    Partition,
    LogicalVolume,
}

/// A partition table's signatures.
const TABLES: [&str; 3] = ["dos", "PMBR", "gpt"];

/// Looks at some disks. What cannot be read is said where it would have been.
pub fn read(disks: &[Disk<'_>]) -> Layout {
    let mut layout = Layout { disks: Vec::new(), physical: Vec::new(), groups: Vec::new() };
    // Where each physical volume begins.
    let mut begins: Vec<View<'_>> = Vec::new();
    for disk in disks {
        let view = View::new(disk.reader);
        let mut walk = Walk { physical: &mut layout.physical, begins: &mut begins };
        let content = walk.content(&view, Level::Disk { sector: disk.sector });
        layout.disks.push(Place { at: 0, size: view.size(), content });
    }
    for group in lvm::group::assemble(&layout.physical) {
        let contents = group.volumes.iter().map(|volume| logical(&group, volume, &begins)).collect();
        layout.groups.push(GroupLayout { group, contents });
    }
    layout
}

struct Walk<'w, 'a> {
    physical: &'w mut Vec<PhysicalVolume>,
    begins: &'w mut Vec<View<'a>>,
}

impl<'a> Walk<'_, 'a> {
    fn content(&mut self, view: &View<'a>, level: Level) -> Content {
        let mut kinds = match signatures(view) {
            Ok(kinds) => kinds,
            Err(why) => return Content::Unread { kind: None, why },
        };
        // An array's super block may lie at the end, and what lies in the array is then seen at its beginning.
        if let Some(member) = kinds.iter().find(|kind| MEMBERS.contains(kind)) {
            kinds = vec![member];
        }
        let (mut tables, others): (Vec<&str>, Vec<&str>) =
            kinds.iter().partition(|kind| TABLES.contains(kind));
        let disk = matches!(level, Level::Disk { .. });
        // The end of a boot sector, which a file system may have as well, looks like a table.
        if !others.is_empty()
            && (!disk || mbr::read_entries(view).is_ok_and(|found| found.is_some_and(|all| all.is_empty())))
        {
            tables.retain(|kind| disk && *kind != "dos");
        }
        match (tables.first(), others.as_slice(), level) {
            (Some(kind), [], Level::Disk { sector }) => self.table(view, sector, kind),
            // A disk within a disk is somebody else's.
            (Some(kind), [], _) => whole(kind, view, "a partition table in a partition or a logical volume"),
            (Some(_), _, _) => Content::Several(kinds),
            (None, [], _) => lost(view),
            (None, ["LVM2_member"], Level::LogicalVolume) => {
                whole("LVM2_member", view, "a physical volume in a logical one")
            }
            (None, ["LVM2_member"], _) => self.physical_volume(view),
            (None, [kind], _) => file_system(kind, view),
            (None, _, _) => Content::Several(others),
        }
    }

    fn table(&mut self, disk: &View<'a>, sector: Option<u64>, kind: &'static str) -> Content {
        let mut table = match table::read(disk, sector) {
            Ok(table) => table,
            Err(why) => return Content::Unread { kind: Some(kind), why },
        };
        let mut places = Vec::new();
        for partition in table.leaves() {
            let (at, size) = (partition.extent.offset(), partition.extent.len());
            let content = match disk.part(at, size) {
                // There is code, and what else announces itself is of an earlier time.
                Some(_) if partition.boots() => Content::Unknown,
                Some(view) => self.content(&view, Level::Partition),
                None => Content::Unread {
                    kind: None,
                    why: Error::Corrupt { what: "a partition that ends beyond the disk's end", at },
                },
            };
            places.push(Place { at, size, content });
        }
        let found =
            |place: &Place| matches!(place.content, Content::FileSystem(_) | Content::PhysicalVolume(_));
        if table.guessed && !places.iter().any(found) {
            table.flaw(Error::unsupported("an image of which the size of the sectors is not known"));
        }
        Content::Table { table, places }
    }

    fn physical_volume(&mut self, view: &View<'a>) -> Content {
        let kind = Some("LVM2_member");
        match lvm::read(view) {
            Ok(Some(volume)) => {
                self.physical.push(volume);
                self.begins.push(view.clone());
                Content::PhysicalVolume(self.physical.len().saturating_sub(1))
            }
            Ok(None) => {
                Content::Unread { kind, why: Error::Corrupt { what: "no label of a physical volume", at: 0 } }
            }
            Err(why) => Content::Unread { kind, why },
        }
    }
}

/// How much is read at the beginning and the end of a place for its signatures: but for what is [`FAR`], they lie in less.
const HEAD: u64 = 272 << 10;
const TAIL: u64 = 132 << 10;

/// What announces itself in a place.
fn signatures(view: &View<'_>) -> Result<Vec<&'static str>, Error> {
    let size = view.size();
    let mut blocks = Vec::new();
    for (at, len) in [(0, HEAD), FAR, (size.saturating_sub(TAIL), TAIL)] {
        let at = at.min(size);
        blocks.push((at, view.read(at, len.min(size.saturating_sub(at)))?));
    }
    let pieces: Vec<(u64, &[u8])> = blocks.iter().map(|(at, block)| (*at, block.bytes())).collect();
    let mut kinds = Vec::new();
    for signature in signature::parse(&pieces, size).signatures {
        if !kinds.contains(&signature.kind) {
            kinds.push(signature.kind);
        }
    }
    Ok(kinds)
}

/// Something that is known by name, and of which all is used.
fn whole(kind: &'static str, view: &View<'_>, why: &str) -> Content {
    let allocation = Allocation::Whole { why: Error::unsupported(why) };
    Content::FileSystem(FileSystem::new(kind, view.size(), allocation))
}

/// What announced itself as this.
pub(super) fn file_system(kind: &'static str, view: &View<'_>) -> Content {
    let parser = PARSERS.iter().find(|parser| parser.kinds.contains(&kind));
    let found = match parser.map(|parser| (parser.read)(view)) {
        Some(Ok(Some(found))) => Ok(found),
        Some(Err(why)) => Err(why),
        Some(Ok(None)) | None => named::read(kind, view),
    };
    match found {
        Ok(found) => Content::FileSystem(fitted(found, view)),
        Err(why) => Content::Unread { kind: Some(kind), why },
    }
}

/// Where nothing announces itself, a parser may know its file system by what is left of it.
fn lost(view: &View<'_>) -> Content {
    let mut found = PARSERS.iter().filter_map(|parser| (parser.read)(view).ok().flatten());
    found.next().map_or(Content::Unknown, |found| Content::FileSystem(fitted(found, view)))
}

/// A file system larger than its place was cut off, or its place is not what it was.
fn fitted(mut found: FileSystem, view: &View<'_>) -> FileSystem {
    if let Allocation::Known(used) = &found.allocation {
        view.keep(used.memory());
    }
    if found.size.0 > view.size() {
        let why = Error::Corrupt { what: "a file system that is larger than its place", at: 0 };
        found.allocation = Allocation::Whole { why };
    }
    found
}

/// Looks into a logical volume.
pub(super) fn logical(group: &Group, volume: &Volume, begins: &[View<'_>]) -> Option<Content> {
    let begin = begins.first()?;
    if group.flaw.is_some() || !volume.is_plain() {
        return None;
    }
    let members: Vec<Option<&View<'_>>> =
        group.members.iter().map(|member| begins.get(member.found?)).collect();
    let areas = volume.segments.iter().filter_map(|segment| segment.stripes.as_ref());
    let mut areas = areas.flat_map(|stripes| &stripes.areas);
    if areas.any(|area| members.get(area.member).is_none_or(Option::is_none)) {
        let why = Error::unsupported("a logical volume of which a part lies on a disk that is not here");
        return Some(Content::Unread { kind: None, why });
    }
    let reader = LogicalReader { volume, members, begin };
    let (mut physical, mut inner) = (Vec::new(), Vec::new());
    let mut walk = Walk { physical: &mut physical, begins: &mut inner };
    Some(walk.content(&begin.beside(&reader), Level::LogicalVolume))
}

/// Reads a logical volume from where it lies.
struct LogicalReader<'a> {
    volume: &'a Volume,
    members: Vec<Option<&'a View<'a>>>,
    /// Where it is counted what is spent.
    begin: &'a View<'a>,
}

impl LogicalReader<'_> {
    /// Where a byte lies, and how many from there on lie together.
    fn locate(&self, at: u64) -> Option<(&View<'_>, u64, u64)> {
        let segments = &self.volume.segments;
        let segment = segments.get(segments.partition_point(|segment| segment.extent.end() <= at))?;
        let within = at.checked_sub(segment.extent.offset())?;
        let (area, offset, len) = segment.stripes.as_ref()?.locate(within)?;
        let member = self.members.get(area.member).copied().flatten()?;
        Some((member, area.extent.offset().checked_add(offset)?, len))
    }
}

impl ReadAt for LogicalReader<'_> {
    fn size(&self) -> u64 {
        self.volume.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let failed = |at, error: io::ErrorKind| IoError::at("read", &*self.volume.name, at, error);
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (member, place, len) =
                self.locate(at).ok_or_else(|| failed(at, io::ErrorKind::UnexpectedEof))?;
            let count = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            // Where nothing is left of that, it is the next read that fails, and this one is short enough.
            self.begin.spend(PER_READ).ok();
            member.direct(place, now)?;
            at = at.saturating_add(len);
            rest = later;
        }
        Ok(())
    }
}

impl Place {
    /// The bytes of its disk that it takes.
    pub fn extent(&self) -> Option<Extent> {
        Extent::new(self.at, self.size)
    }
}
