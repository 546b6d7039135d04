//! What lies where on a disk, in words: for telling people which partition or file system a range of bytes concerns.

use super::FileSystem;
use super::tree::{Content, Layout, Place};
use crate::units::Extent;

/// A range of a disk that has a name.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Landmark {
    extent: Extent,
    name: String,
    /// Whether others may lie in it, which say more.
    coarse: bool,
}

/// The ranges of one disk that have names.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Landmarks(Vec<Landmark>);

impl Landmarks {
    /// Those of the disk with this index.
    pub fn of(layout: &Layout, disk: usize) -> Landmarks {
        let mut found = Landmarks::default();
        if let Some(place) = layout.disks.get(disk) {
            found.content(layout, place, "the disk");
        }
        found
    }

    /// What a range touches. Nothing where nothing is known of it.
    pub fn at(&self, extent: Extent) -> Vec<&str> {
        let touches =
            |one: &&Landmark| one.extent.offset() < extent.end() && extent.offset() < one.extent.end();
        let (coarse, fine): (Vec<&Landmark>, Vec<&Landmark>) =
            self.0.iter().filter(touches).partition(|one| one.coarse);
        let mut names: Vec<&str> = Vec::new();
        for one in if fine.is_empty() { coarse } else { fine } {
            // A logical volume may lie in several pieces.
            if !names.contains(&one.name.as_str()) {
                names.push(&one.name);
            }
        }
        names
    }

    fn add(&mut self, extent: Option<Extent>, name: String, coarse: bool) {
        self.0.extend(extent.map(|extent| Landmark { extent, name, coarse }));
    }

    fn content(&mut self, layout: &Layout, place: &Place, name: &str) {
        match &place.content {
            Content::Table { table, places } => {
                self.add(place.extent(), "outside of all partitions".to_owned(), true);
                for extent in &table.own {
                    self.add(Some(*extent), "the partition table".to_owned(), false);
                }
                for (partition, inner) in table.leaves().zip(places) {
                    let name = format!("partition {}", partition.number);
                    self.content(layout, inner, &name);
                }
            }
            Content::PhysicalVolume(index) => self.physical_volume(layout, place, name, *index),
            Content::FileSystem(found) => {
                self.add(place.extent(), format!("{name} ({})", shown(found)), false);
            }
            Content::Unread { kind: Some(kind), .. } => {
                self.add(place.extent(), format!("{name} ({kind})"), false);
            }
            // Of a whole disk without anything that is known, nothing is said.
            Content::Unknown | Content::Several(_) | Content::Unread { kind: None, .. } => {
                if place.at > 0 {
                    self.add(place.extent(), name.to_owned(), false);
                }
            }
        }
    }

    fn physical_volume(&mut self, layout: &Layout, place: &Place, name: &str, index: usize) {
        let Some(here) = layout.groups.iter().find(|one| one.group.claims.contains(&index)) else {
            return self.add(place.extent(), format!("{name} (LVM2 physical volume)"), false);
        };
        let group = &here.group;
        let text = format!("{name} (volume group {}, outside of its logical volumes)", group.name);
        self.add(place.extent(), text, true);
        for (volume, content) in group.volumes.iter().zip(&here.contents) {
            let kind = match content {
                Some(Content::FileSystem(found)) => format!(" ({})", shown(found)),
                _ => String::new(),
            };
            let areas = volume.segments.iter().filter_map(|segment| segment.stripes.as_ref());
            for area in areas.flat_map(|stripes| &stripes.areas) {
                let member = group.members.get(area.member).and_then(|member| member.found);
                if member == Some(index) {
                    let at = place.at.checked_add(area.extent.offset());
                    let extent = at.and_then(|at| Extent::new(at, area.extent.len()));
                    self.add(extent, format!("logical volume {}/{}{kind}", group.name, volume.name), false);
                }
            }
        }
    }
}

fn shown(found: &FileSystem) -> String {
    match (&found.label, &found.uuid) {
        (Some(label), _) => format!("{}, LABEL=\"{label}\"", found.kind),
        (None, Some(uuid)) => format!("{}, UUID={uuid}", found.kind),
        (None, None) => found.kind.to_owned(),
    }
}
