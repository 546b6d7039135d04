//! Why places are used as a whole: the other side of the map (`map`), in words.

use super::lvm::group::Volume;
use super::tree::{Content, GroupLayout, Layout, Place};
use super::{Allocation, Error};
use crate::error::chain;

impl Layout {
    /// The places on the disk with this index of which it is not known what is free, and why: a sentence for each.
    pub fn reasons(&self, disk: usize) -> Vec<String> {
        let mut reasons = Vec::new();
        if let Some(place) = self.disks.get(disk) {
            self.of_place(place, &mut reasons);
        }
        reasons
    }

    fn of_place(&self, place: &Place, reasons: &mut Vec<String>) {
        let extent = place.extent().map(|extent| extent.to_string()).unwrap_or_default();
        match &place.content {
            Content::Table { table, places } => match &table.flaw {
                Some(flaw) => {
                    reasons.push(format!("{extent}: {} partition table: {}", table.kind, chain(flaw)))
                }
                None => places.iter().for_each(|place| self.of_place(place, reasons)),
            },
            Content::PhysicalVolume(index) => match self.group_of(*index) {
                Ok((group, member)) => {
                    for (volume, content) in group.group.volumes.iter().zip(&group.contents) {
                        let reason = of_volume(volume, content.as_ref()).filter(|_| lies_on(volume, member));
                        reasons
                            .extend(reason.map(|why| format!("{}/{}: {why}", group.group.name, volume.name)));
                    }
                }
                Err(why) => reasons.push(format!("{extent}: LVM2 physical volume: {why}")),
            },
            content => reasons.extend(of_content(content).map(|why| format!("{extent}: {why}"))),
        }
    }

    /// The group of a physical volume and which of its members that is, or why it is of none that can be followed.
    fn group_of(&self, index: usize) -> Result<(&GroupLayout, usize), String> {
        let mut groups = self.groups.iter().filter(|group| group.group.claims.contains(&index));
        let flaw = |flaw: &Option<Error>| flaw.as_ref().map(|flaw| chain(flaw));
        if let Some(why) = self.physical.get(index).and_then(|volume| flaw(&volume.flaw)) {
            return Err(why);
        }
        let group = match (groups.next(), groups.next()) {
            (Some(group), None) => group,
            (None, _) => return Err("it is of no volume group that is known".to_owned()),
            (Some(_), Some(_)) => return Err("two volume groups claim it".to_owned()),
        };
        if let Some(why) = flaw(&group.group.flaw) {
            return Err(format!("volume group {}: {why}", group.group.name));
        }
        let mut own = (0..).zip(&group.group.members).filter(|(_, member)| member.found == Some(index));
        match (own.next(), own.next()) {
            (Some((member, _)), None) => Ok((group, member)),
            _ => Err(format!("volume group {} does not know it, or twice", group.group.name)),
        }
    }
}

fn lies_on(volume: &Volume, member: usize) -> bool {
    let areas =
        volume.segments.iter().flat_map(|segment| &segment.stripes).flat_map(|stripes| &stripes.areas);
    areas.into_iter().any(|area| area.member == member)
}

fn of_volume(volume: &Volume, content: Option<&Content>) -> Option<String> {
    match content {
        Some(content) => of_content(content),
        None => Some(format!(
            "what a logical volume of kind {} holds is not looked at",
            volume.kinds().join(", ")
        )),
    }
}

/// Why it is not known what of this is free, where it is not.
fn of_content(content: &Content) -> Option<String> {
    match content {
        Content::FileSystem(found) => match &found.allocation {
            Allocation::Known(_) => None,
            Allocation::Whole { why } => Some(format!("{}: {}", found.kind, chain(why))),
        },
        Content::Unknown => Some("nothing that is known".to_owned()),
        Content::Several(kinds) => {
            Some(format!("{}: which of them is meant cannot be told", kinds.join(" and ")))
        }
        Content::Unread { kind, why } => {
            let kind = kind.map(|kind| format!("{kind}: ")).unwrap_or_default();
            Some(format!("{kind}{}", chain(why)))
        }
        // These are asked for what lies in them.
        Content::Table { .. } | Content::PhysicalVolume(_) => None,
    }
}
