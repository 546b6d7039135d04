//! A volume group: which bytes of its physical volumes each of its logical volumes takes.

use std::collections::{BTreeMap, BTreeSet};

use super::super::Error;
use super::super::ranges::between;
use super::PhysicalVolume;
use super::text::{Section, Value};
use crate::units::Extent;

/// Metadata counts in sectors of 512 bytes.
const SECTOR: u64 = 512;
/// LVM makes no more stripes than these.
const MAX_STRIPES: u64 = 128;

/// A volume group, as its newest metadata describes it.
#[derive(Debug)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// As LVM prints it.
    pub uuid: String,
    /// Counts the changes of its metadata.
    pub seqno: u64,
    /// The size of its extents in bytes.
    pub extent_size: u64,
    /// Its physical volumes.
    pub members: Vec<Member>,
    /// Which of the physical volumes that were found it says are its own, whatever else is wrong with it.
    pub claims: Vec<usize>,
    /// Its logical volumes, the hidden ones too.
    pub volumes: Vec<Volume>,
    /// Why nothing that it says of free space can be trusted.
    pub flaw: Option<Error>,
}

/// A physical volume as its group sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// As LVM prints it.
    pub uuid: String,
    /// Which of the physical volumes that were found it is.
    pub found: Option<usize>,
    /// Where its extents lie, from its beginning.
    pub extents: Extent,
}

/// A logical volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// As LVM prints it.
    pub uuid: String,
    /// Whether it is one that users see.
    pub visible: bool,
    /// Whether another one is made of it, or reads from it.
    pub referred: bool,
    /// The size in bytes.
    pub size: u64,
    /// In ascending order, without gaps.
    pub segments: Vec<Segment>,
}

impl Volume {
    /// Whether all of its bytes lie on physical volumes, at places that are known, and nobody else needs them.
    pub fn is_plain(&self) -> bool {
        self.visible && !self.referred && self.segments.iter().all(|segment| segment.stripes.is_some())
    }

    /// What it is made of: `linear`, `striped`, `thin`, `raid1`…; several, if it has several.
    pub fn kinds(&self) -> Vec<&str> {
        let mut kinds: Vec<&str> = Vec::new();
        for segment in &self.segments {
            if !kinds.contains(&segment.kind.as_str()) {
                kinds.push(&segment.kind);
            }
        }
        kinds
    }
}

/// A part of a logical volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Which bytes of the logical volume it is.
    pub extent: Extent,
    /// `linear`, or as LVM calls it.
    pub kind: String,
    /// Where it lies, if that is a matter of stripes on physical volumes.
    pub stripes: Option<Stripes>,
}

/// Bytes that are dealt out in turn, `unit` bytes at a time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stripes {
    /// How many bytes lie together. Of a single stripe all do.
    pub unit: u64,
    /// One or more, of equal length.
    pub areas: Vec<Area>,
}

/// Bytes of a physical volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Area {
    /// The index of its member.
    pub member: usize,
    /// From the physical volume's beginning.
    pub extent: Extent,
}

impl Stripes {
    /// How many of the first `len` bytes lie in the stripe with this index.
    fn share(&self, index: usize, len: u64) -> u64 {
        let count = u64::try_from(self.areas.len()).unwrap_or(1).max(1);
        let index = u64::try_from(index).unwrap_or(0);
        let unit = self.unit.max(1);
        let round = unit.saturating_mul(count);
        let whole = len.checked_div(round).unwrap_or(0).saturating_mul(unit);
        let rest = len.checked_rem(round).unwrap_or(0);
        whole.saturating_add(rest.saturating_sub(index.saturating_mul(unit)).min(unit))
    }

    /// Where these bytes of the segment lie in the stripe with this index, from its beginning.
    fn part(&self, index: usize, range: Extent) -> Option<Extent> {
        between(self.share(index, range.offset()), self.share(index, range.end()))
    }

    /// Where one byte of the segment lies: the stripe, the offset in it, and how many bytes lie there together.
    pub fn locate(&self, at: u64) -> Option<(&Area, u64, u64)> {
        let count = u64::try_from(self.areas.len()).ok()?;
        let (chunk, within) = (at.checked_div(self.unit)?, at.checked_rem(self.unit)?);
        let area = self.areas.get(usize::try_from(chunk.checked_rem(count)?).ok()?)?;
        let offset = chunk.checked_div(count)?.checked_mul(self.unit)?.checked_add(within)?;
        let left = area.extent.len().checked_sub(offset)?;
        Some((area, offset, left.min(self.unit.checked_sub(within)?)))
    }
}

impl Segment {
    /// Where these bytes of the logical volume lie in the stripe with this index, from the physical volume's beginning;
    /// `None` where none of them do.
    pub fn on_stripe(&self, index: usize, bytes: Extent) -> Option<Extent> {
        let stripes = self.stripes.as_ref()?;
        let within = Extent::new(bytes.offset().checked_sub(self.extent.offset())?, bytes.len())?;
        let part = stripes.part(index, within)?;
        Extent::new(stripes.areas.get(index)?.extent.offset().checked_add(part.offset())?, part.len())
    }
}

/// Puts the groups together that these physical volumes belong to.
pub(in super::super) fn assemble(found: &[PhysicalVolume]) -> Vec<Group> {
    let mut newest: BTreeMap<&str, (&str, &Section)> = BTreeMap::new();
    for (name, section) in found.iter().filter_map(own_group) {
        let uuid = section.text("id").unwrap_or_default();
        let seqno = |section: &Section| section.number("seqno");
        match newest.get(uuid) {
            Some((_, known)) if seqno(known) >= seqno(section) => {}
            _ => _ = newest.insert(uuid, (name, section)),
        }
    }
    newest.into_iter().map(|(uuid, (name, section))| group(name, uuid, section, found)).collect()
}

/// The name and the section of the group that a physical volume's metadata is of.
pub fn own_group(volume: &PhysicalVolume) -> Option<(&str, &Section)> {
    volume.text.as_ref()?.sections().next()
}

fn group(name: &str, uuid: &str, section: &Section, found: &[PhysicalVolume]) -> Group {
    let named: BTreeSet<&str> =
        section.section("physical_volumes").into_iter().flat_map(Section::texts).collect();
    let claimed =
        |(index, volume): (usize, &PhysicalVolume)| named.contains(volume.uuid.as_str()).then_some(index);
    let mut group = Group {
        claims: found.iter().enumerate().filter_map(claimed).collect(),
        name: name.to_owned(),
        uuid: uuid.to_owned(),
        seqno: section.number("seqno").unwrap_or(0),
        extent_size: section.number("extent_size").unwrap_or(0).saturating_mul(SECTOR),
        members: Vec::new(),
        volumes: Vec::new(),
        flaw: None,
    };
    if let Err(why) = describe(&mut group, section, found) {
        group.flaw = Some(why);
    }
    group
}

/// Metadata lies in several places; what is wrong with it is said by key.
fn corrupt(what: &'static str) -> Error {
    Error::Corrupt { what, at: 0 }
}

fn describe(group: &mut Group, section: &Section, found: &[PhysicalVolume]) -> Result<(), Error> {
    if section.text("format").is_some_and(|format| format != "lvm2") {
        return Err(Error::unsupported("a volume group of another format than lvm2"));
    }
    if group.extent_size == 0 || group.uuid.is_empty() {
        return Err(corrupt("a volume group without an id or an extent_size"));
    }
    let nothing = Section::default();
    let mut numbers = BTreeMap::new();
    for (name, volume) in section.section("physical_volumes").unwrap_or(&nothing).sections() {
        numbers.insert(name, group.members.len());
        let member = member(group.extent_size, volume, found)?;
        group.members.push(member);
    }
    let names: BTreeMap<&str, usize> = numbers;
    let volumes = section.section("logical_volumes").unwrap_or(&nothing);
    for (name, volume) in volumes.sections() {
        let volume = logical(group, name, volume, &names)?;
        group.volumes.push(volume);
    }
    refer(group, volumes);
    overlaps(group)?;
    members_agree(group, section, found)
}

fn member(extent_size: u64, volume: &Section, found: &[PhysicalVolume]) -> Result<Member, Error> {
    let uuid = volume.text("id").ok_or_else(|| corrupt("a physical volume without an id"))?;
    let start = volume.number("pe_start").and_then(|start| start.checked_mul(SECTOR));
    let len = volume.number("pe_count").and_then(|count| count.checked_mul(extent_size));
    let extents = start.zip(len).and_then(|(start, len)| Extent::new(start, len));
    let extents = extents.ok_or_else(|| corrupt("a physical volume without extents"))?;
    let mut matching = (0..).zip(found).filter(|(_, volume)| volume.uuid == uuid);
    let at = matching.next();
    if matching.next().is_some() {
        return Err(Error::unsupported(format!("a physical volume that is there twice ({uuid})")));
    }
    if at.is_some_and(|(_, volume)| extents.end() > volume.size) {
        return Err(corrupt("a physical volume whose extents end beyond its end"));
    }
    Ok(Member { uuid: uuid.to_owned(), found: at.map(|(index, _)| index), extents })
}

fn logical(
    group: &Group,
    name: &str,
    volume: &Section,
    names: &BTreeMap<&str, usize>,
) -> Result<Volume, Error> {
    let is_visible = |value: &Value| matches!(value, Value::Text(text) if text == "VISIBLE");
    let visible = volume.list("status").is_some_and(|status| status.iter().any(is_visible));
    let mut segments = Vec::new();
    for (key, section) in volume.sections() {
        if key.starts_with("segment") {
            segments.push(segment(group, section, names)?);
        }
    }
    segments.sort_by_key(|segment| segment.extent.offset());
    let mut end = 0;
    for segment in &segments {
        if segment.extent.offset() != end {
            return Err(corrupt("a logical volume whose segments overlap or leave a gap"));
        }
        end = segment.extent.end();
    }
    let count = u64::try_from(segments.len()).unwrap_or(u64::MAX);
    if segments.is_empty() || volume.number("segment_count") != Some(count) {
        return Err(corrupt("a logical volume with another number of segments than it says"));
    }
    let uuid = volume.text("id").unwrap_or_default().to_owned();
    Ok(Volume { name: name.to_owned(), uuid, visible, referred: false, size: end, segments })
}

fn segment(group: &Group, section: &Section, names: &BTreeMap<&str, usize>) -> Result<Segment, Error> {
    let extents = |count: u64| count.checked_mul(group.extent_size);
    let start = section.number("start_extent").and_then(extents);
    let len = section.number("extent_count").and_then(extents);
    let extent = start.zip(len).and_then(|(start, len)| Extent::new(start, len));
    let extent = extent.ok_or_else(|| corrupt("a segment without extents"))?;
    let kind = section.text("type").ok_or_else(|| corrupt("a segment without a type"))?;
    if kind != "striped" {
        // What lies on physical volumes is the business of other, hidden volumes. Where it is not, which extents it takes
        // cannot be told from here.
        if section.texts().any(|text| names.contains_key(text)) {
            return Err(Error::unsupported(format!("a segment of type {kind} right on a physical volume")));
        }
        // Behind a plus stand features that older tools would not know.
        let kind = kind.split('+').next().unwrap_or(kind);
        return Ok(Segment { extent, kind: kind.to_owned(), stripes: None });
    }
    let list = section.list("stripes").unwrap_or_default();
    let count = u64::try_from(list.len() / 2).unwrap_or(0);
    if count == 0 || !list.len().is_multiple_of(2) || section.number("stripe_count") != Some(count) {
        return Err(corrupt("a segment with another number of stripes than it says"));
    }
    if count > MAX_STRIPES {
        return Err(Error::unsupported(format!("a segment of {count} stripes")));
    }
    let share = extent.len().checked_div(count).filter(|share| {
        share.is_multiple_of(group.extent_size) && share.checked_mul(count) == Some(extent.len())
    });
    let share = share.ok_or_else(|| corrupt("a segment that its stripes do not divide"))?;
    let unit = match count {
        1 => share,
        _ => section.number("stripe_size").and_then(|size| size.checked_mul(SECTOR)).unwrap_or(0),
    };
    if unit == 0 || !share.is_multiple_of(unit) {
        return Err(corrupt("a segment whose stripe size is out of bounds"));
    }
    let mut areas = Vec::new();
    for pair in list.chunks_exact(2) {
        let [Value::Text(name), Value::Number(at)] = pair else {
            return Err(corrupt("a stripe that is no pair of a name and a number"));
        };
        let Some(index) = names.get(name.as_str()) else {
            // A volume that lies on another one.
            return Ok(Segment { extent, kind: kind.to_owned(), stripes: None });
        };
        let member = group.members.get(*index).map(|member| member.extents);
        let from = u64::try_from(*at).ok().and_then(extents).zip(member);
        let area = from
            .and_then(|(from, member)| Extent::new(member.offset().checked_add(from)?, share))
            .filter(|area| member.is_some_and(|member| area.end() <= member.end()));
        let extent = area.ok_or_else(|| corrupt("a stripe beyond the extents of its physical volume"))?;
        areas.push(Area { member: *index, extent });
    }
    let kind = if count == 1 { "linear" } else { kind };
    Ok(Segment { extent, kind: kind.to_owned(), stripes: Some(Stripes { unit, areas }) })
}

/// Marks the volumes whose names are anywhere in another one: its parts, its origin, its pool.
fn refer(group: &mut Group, volumes: &Section) {
    let (mut referred, mut snapshots) = (BTreeSet::new(), BTreeSet::new());
    for (name, section) in volumes.sections() {
        for (_, segment) in section.sections() {
            referred.extend(segment.texts().filter(|text| *text != name));
            snapshots.extend(segment.text("cow_store"));
        }
    }
    for volume in &mut group.volumes {
        volume.referred = referred.contains(volume.name.as_str());
        // What users see of a snapshot is the volume that holds what was overwritten since.
        volume.visible |= snapshots.contains(volume.name.as_str());
    }
}

/// Looks for extents that two volumes take.
fn overlaps(group: &Group) -> Result<(), Error> {
    let segments = group.volumes.iter().flat_map(|volume| &volume.segments);
    let mut areas: Vec<Area> = segments
        .filter_map(|segment| segment.stripes.as_ref())
        .flat_map(|stripes| stripes.areas.clone())
        .collect();
    areas.sort_by_key(|area| (area.member, area.extent.offset()));
    let clash = |(one, next): (&Area, &Area)| one.member == next.member && one.extent.overlaps(next.extent);
    match areas.iter().zip(areas.iter().skip(1)).any(clash) {
        true => Err(corrupt("two logical volumes that take the same extents")),
        false => Ok(()),
    }
}

/// Every physical volume that is here and keeps metadata keeps the same.
fn members_agree(group: &Group, newest: &Section, found: &[PhysicalVolume]) -> Result<(), Error> {
    for volume in group.members.iter().filter_map(|member| found.get(member.found?)) {
        if volume.flaw.is_some() {
            return Err(Error::unsupported(format!(
                "the damaged metadata of the physical volume {}",
                volume.uuid
            )));
        }
        if own_group(volume).is_some_and(|(_, section)| section != newest) {
            return Err(Error::unsupported(format!(
                "the metadata of another time on the physical volume {}",
                volume.uuid
            )));
        }
    }
    Ok(())
}
