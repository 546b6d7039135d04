//! Which bytes of a disk are used, from all that lies on it.
//!
//! Free are the blocks that a file system proves free, the extents of a volume group that no logical volume has, and what
//! lies between partitions; but boot loaders and others put things where no table says so, and these places are used:
//! the first and the last MiB of a disk, the gaps between partitions as far as they are of the size that aligning them
//! leaves, the ends of larger ones, and the beginning of every file system.

use super::lvm::PhysicalVolume;
use super::lvm::group::{Group, Segment};
use super::ranges::{Ranges, Used, between};
use super::table::Table;
use super::tree::{Content, GroupLayout, Layout, Place};
use super::{Allocation, FileSystem};
use crate::units::Extent;

/// Used at either end of a disk and of a large gap.
const MARGIN: u64 = 1 << 20;
/// A gap between partitions up to this size is one of alignment.
const ALIGNMENT: u64 = 16 << 20;
/// So many ranges of logical volumes are looked at on a physical one, at each stripe once; what comes behind them is used. It
/// is several times what is known of a disk at most.
const MAX_STEPS: usize = 1 << 24;
/// Used at the beginning of a file system, where a boot loader's sectors are.
const BOOT: u64 = 64 << 10;

impl Layout {
    /// The used bytes of the disk with this index; all others are proven free. `None` where there is no such disk.
    pub fn used(&self, disk: usize) -> Option<Ranges> {
        let place = self.disks.get(disk)?;
        let mut used = Used::default();
        // What comes in ascending order is added quickly, and so are a few among many.
        between(0, place.size.min(MARGIN)).into_iter().for_each(|range| used.add(range));
        between(place.size.saturating_sub(MARGIN), place.size).into_iter().for_each(|range| used.add(range));
        self.place(place, &mut used);
        Some(used.finish())
    }

    fn place(&self, place: &Place, used: &mut Used) {
        match &place.content {
            Content::Table { table, places } if table.flaw.is_none() => {
                table_itself(table, place.size).into_iter().for_each(|range| used.add(range));
                let mut places: Vec<&Place> = places.iter().collect();
                places.sort_by_key(|place| place.at);
                places.into_iter().for_each(|place| self.place(place, used));
            }
            Content::FileSystem(found) => {
                let all = Extent::new(0, place.size);
                for range in all.into_iter().flat_map(|all| of_file_system(found, place.size, all)) {
                    add(used, place.at, range);
                }
            }
            Content::PhysicalVolume(index) => self.physical_volume(place, *index, used),
            _ => place.extent().into_iter().for_each(|range| used.add(range)),
        }
    }

    fn physical_volume(&self, place: &Place, index: usize, used: &mut Used) {
        let mut groups = self.groups.iter().filter(|group| group.group.claims.contains(&index));
        // Where two groups claim it, one of them is of another time.
        let group = groups.next().filter(|group| group.group.flaw.is_none() && groups.next().is_none());
        let member = group.and_then(|group| {
            let members = &group.group.members;
            // Two members of one identity both lie on it: neither's extents are all that are used.
            let mut own = (0..).zip(members).filter(|(_, member)| member.found == Some(index));
            let (number, _) = own.next()?;
            own.next().is_none().then_some((group, number))
        });
        match (member, self.physical.get(index)) {
            (Some((group, member)), Some(volume)) => {
                outside(&group.group, member, volume, place.size)
                    .iter()
                    .for_each(|range| add(used, place.at, *range));
                logical_volumes(group, member, MAX_STEPS, |range| add(used, place.at, range));
            }
            _ => place.extent().into_iter().for_each(|range| used.add(range)),
        }
    }
}

/// Adds a range that begins at `base`.
fn add(used: &mut Used, base: u64, range: Extent) {
    // Places lie on their disk, and ranges in their place.
    Extent::new(base.saturating_add(range.offset()), range.len())
        .into_iter()
        .for_each(|range| used.add(range));
}

/// What a table takes, and the gaps around its partitions that are used.
fn table_itself(table: &Table, size: u64) -> Vec<Extent> {
    let taken: Ranges = table.leaves().map(|one| one.extent).chain(table.own.iter().copied()).collect();
    let mut used = table.own.clone();
    let gaps = Extent::new(0, size).map(|disk| taken.complement(disk)).unwrap_or_default();
    for gap in gaps.iter() {
        if gap.len() <= ALIGNMENT {
            used.push(gap);
        } else {
            used.extend(between(gap.offset(), gap.offset().saturating_add(MARGIN)));
            used.extend(between(gap.end().saturating_sub(MARGIN), gap.end()));
        }
    }
    used
}

/// The used bytes of a place of `size` bytes, as far as they lie in `window`.
fn of_file_system(found: &FileSystem, size: u64, window: Extent) -> impl Iterator<Item = Extent> + '_ {
    let (known, end) = match &found.allocation {
        Allocation::Known(ranges) => (Some(ranges), found.size.0),
        Allocation::Whole { .. } => (None, 0),
    };
    let clip =
        move |range: Extent| between(range.offset().max(window.offset()), range.end().min(window.end()));
    let boot = known.and(between(0, BOOT.min(size))).and_then(clip);
    // Without a map that is all of it.
    let behind = between(end.min(size), size).and_then(clip);
    let own = between(window.offset(), window.end().min(end));
    let own =
        own.into_iter().flat_map(move |own| known.into_iter().flat_map(move |ranges| ranges.within(own)));
    boot.into_iter().chain(own).chain(behind)
}

/// What a physical volume takes for itself: all but its extents.
fn outside(group: &Group, member: usize, volume: &PhysicalVolume, size: u64) -> Vec<Extent> {
    let own = [&volume.metadata_areas, &volume.boot_areas].into_iter().flatten().copied();
    let extents =
        group.members.get(member).map_or(0..0, |member| member.extents.offset()..member.extents.end());
    own.chain(between(0, extents.start)).chain(between(extents.end, size)).collect()
}

/// Gives what the logical volumes use of a physical one, from its beginning and in ascending order, as far as that takes no
/// more than `left` ranges; what comes behind these is used.
pub(super) fn logical_volumes(
    layout: &GroupLayout,
    member: usize,
    mut left: usize,
    mut give: impl FnMut(Extent),
) {
    let mut pieces: Vec<(Extent, usize, &Segment, u64, Option<&Content>)> = Vec::new();
    for (volume, content) in layout.group.volumes.iter().zip(&layout.contents) {
        for segment in &volume.segments {
            for (index, area) in segment.stripes.iter().flat_map(|stripes| stripes.areas.iter().enumerate()) {
                if area.member == member {
                    pieces.push((area.extent, index, segment, volume.size, content.as_ref()));
                }
            }
        }
    }
    pieces.sort_by_key(|(extent, ..)| extent.offset());
    for (extent, index, segment, size, content) in pieces {
        match content {
            Some(Content::FileSystem(found)) if matches!(found.allocation, Allocation::Known(_)) => {
                for range in of_file_system(found, size, segment.extent).take(left) {
                    left = left.saturating_sub(1);
                    segment.on_stripe(index, range).into_iter().for_each(&mut give);
                }
                if left == 0 {
                    give(extent);
                }
            }
            _ => give(extent),
        }
    }
}
