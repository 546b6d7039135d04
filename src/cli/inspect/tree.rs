//! What was found, as a tree for people.

use mt_agent::error::chain;
use mt_agent::layout::lvm::group::Volume;
use mt_agent::layout::table::Partition;
use mt_agent::layout::tree::{Content, GroupLayout, Layout, Place};
use mt_agent::layout::{Allocation, FileSystem, State};
use mt_agent::storage::ReadAt;
use mt_agent::units::ByteLen;

use super::super::table::printable;
use super::{Named, group_of, partitions};

/// A line, and those that hang on it.
struct Node {
    line: String,
    below: Vec<Node>,
}

impl Node {
    fn new(line: String) -> Node {
        Node { line: printable(&line), below: Vec::new() }
    }

    fn add(&mut self, line: impl Into<String>) {
        self.below.push(Node::new(line.into()));
    }

    fn print(&self, before: &str, out: &mut String) {
        out.push_str(&self.line);
        out.push('\n');
        for (index, node) in self.below.iter().enumerate() {
            let last = index + 1 == self.below.len();
            out.push_str(&format!("{before}{}", if last { "└─ " } else { "├─ " }));
            node.print(&format!("{before}{}", if last { "   " } else { "│  " }), out);
        }
    }
}

pub(super) fn text(all: &[Named], layout: &Layout) -> String {
    let mut out = String::new();
    for ((index, named), place) in (0..).zip(all).zip(&layout.disks) {
        let used = layout.used(index).map_or(place.size, |used| used.bytes());
        let mut node = described(layout, &place.content, &named.path.display().to_string(), place.size);
        for note in &named.notes {
            node.add(note);
        }
        let (size, free) = (ByteLen(named.file.size()), ByteLen(place.size - used));
        let free = match named.notes.is_empty() {
            true => format!("{free} are proven free"),
            // Who has it may write to it, and some of that may not be on it yet.
            false => format!(
                "{free} are free as it stands on the disk at this moment, which is only proven while it is frozen"
            ),
        };
        node.add(format!("{} of {size} are used, {free}", ByteLen(used)));
        node.print("", &mut out);
    }
    for group in &layout.groups {
        volume_group(layout, group).print("", &mut out);
    }
    out
}

/// A place and what lies there.
fn described(layout: &Layout, content: &Content, name: &str, size: u64) -> Node {
    let mut node = Node::new(format!("{name} {} {}", ByteLen(size), summary(layout, content)));
    match content {
        Content::Table { table, places } => {
            for note in &table.notes {
                node.add(note);
            }
            if let Some(flaw) = &table.flaw {
                node.add(format!("all of it is taken as used: {}", chain(flaw)));
            }
            for (one, place) in partitions(table, places) {
                node.below.push(partition(layout, one, place));
            }
        }
        Content::FileSystem(found) => {
            for note in &found.notes {
                node.add(note);
            }
            if let Allocation::Whole { why } = &found.allocation {
                node.add(format!("all of it is taken as used: {}", chain(why)));
            }
        }
        Content::PhysicalVolume(index) => {
            let flaw = layout.physical.get(*index).and_then(|volume| volume.flaw.as_ref());
            if let Some(flaw) = flaw {
                node.add(format!("all of it is taken as used: {}", chain(flaw)));
            }
        }
        Content::Unknown | Content::Several(_) | Content::Unread { .. } => {}
    }
    node
}

fn summary(layout: &Layout, content: &Content) -> String {
    match content {
        Content::Unknown => "nothing that is known".to_owned(),
        Content::Several(kinds) => format!("{}: which of them is meant cannot be told", kinds.join(" and ")),
        Content::Unread { kind, why } => {
            let kind = kind.map(|kind| format!("{kind}, ")).unwrap_or_default();
            format!("{kind}which cannot be read: {}", chain(why))
        }
        Content::Table { table, .. } => {
            let kind = if table.kind == "gpt" { "GPT" } else { "MBR" };
            let id = table.id.as_deref().unwrap_or("without an identifier");
            format!("{kind} {id}, sectors of {} bytes", table.sector)
        }
        Content::FileSystem(found) => file_system(found),
        Content::PhysicalVolume(index) => {
            let uuid = layout.physical.get(*index).map_or("", |volume| volume.uuid.as_str());
            let group = group_of(layout, *index)
                .map_or("of no volume group that is known".to_owned(), |name| {
                    format!("of volume group {name}")
                });
            format!("LVM2 physical volume {group} UUID={uuid}")
        }
    }
}

fn file_system(found: &FileSystem) -> String {
    let mut words = vec![found.kind.to_owned()];
    words.extend(found.version.clone());
    words.extend(found.label.as_ref().map(|label| format!("LABEL=\"{label}\"")));
    words.extend(found.uuid.as_ref().map(|uuid| format!("UUID={uuid}")));
    let mut facts = Vec::new();
    facts.extend(found.block_size.map(|size| format!("blocks of {}", ByteLen(size))));
    if let (Some(used), Some(free)) = (found.used(), found.free) {
        // Of one that is not clean and could not be followed, that is what was written down at some time.
        let old = match (&found.allocation, found.state) {
            (Allocation::Known(_), _) | (_, Some(State::Clean)) => "",
            (Allocation::Whole { .. }, _) => " by its last count, which may be old",
        };
        facts.push(format!("{used} used, {free} free{old}"));
    }
    facts.extend(found.state.map(|state| {
        match state {
            State::Clean => "clean",
            State::NotUnmounted => "not unmounted",
            State::JournalToReplay => "its journal is to be replayed",
            State::Errors => "it has errors",
        }
        .to_owned()
    }));
    if !found.features.is_empty() {
        facts.push(format!("features: {}", found.features.join(" ")));
    }
    match facts.is_empty() {
        true => words.join(" "),
        false => format!("{}; {}", words.join(" "), facts.join("; ")),
    }
}

fn partition(layout: &Layout, one: &Partition, place: Option<&Place>) -> Node {
    let kind = kind_name(&one.kind).unwrap_or(&one.kind);
    let name = one.name.as_ref().map(|name| format!(" \"{name}\"")).unwrap_or_default();
    let boot = if one.bootable { ", bootable" } else { "" };
    let line = format!("{}{name} ({kind}{boot}) at {}", one.number, ByteLen(one.extent.offset()));
    match place {
        Some(place) => described(layout, &place.content, &line, place.size),
        None => Node::new(format!("{line} {}", ByteLen(one.extent.len()))),
    }
}

/// The types that a Linux machine has.
fn kind_name(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "0x5" | "0xf" | "0x85" => "extended",
        "0x7" => "NTFS or exFAT",
        "0xb" | "0xc" => "FAT32",
        "0x82" | "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f" => "Linux swap",
        "0x83" | "0fc63daf-8483-4772-8e79-3d69d8477de4" => "Linux",
        "0x8e" | "e6d6d379-f507-44c2-a23c-238f2a3df928" => "Linux LVM",
        "0xfd" | "a19d880f-05fc-4d3b-a006-743f0f84911e" => "Linux RAID",
        "0xef" | "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" => "EFI system",
        "0x41" | "9e1a2d38-c612-4316-aa26-8b49521e5a8b" => "PReP boot",
        "21686148-6449-6e6f-744e-656564454649" => "BIOS boot",
        "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7" => "Microsoft basic data",
        _ => return None,
    })
}

fn volume_group(layout: &Layout, one: &GroupLayout) -> Node {
    let group = &one.group;
    let here = group.members.iter().filter(|member| member.found.is_some()).count();
    let members = match group.members.len() {
        0 => "whose physical volumes are not known".to_owned(),
        count => format!("{here} of {count} physical volumes are here"),
    };
    let extents = match group.extent_size {
        0 => String::new(),
        size => format!(", extents of {}", ByteLen(size)),
    };
    let mut node = Node::new(format!("volume group {} {members}{extents}, UUID={}", group.name, group.uuid));
    if let Some(flaw) = &group.flaw {
        node.add(format!("all of it is taken as used: {}", chain(flaw)));
    }
    for (volume, content) in group.volumes.iter().zip(&one.contents) {
        node.below.push(logical_volume(layout, volume, content.as_ref()));
    }
    node
}

fn logical_volume(layout: &Layout, volume: &Volume, content: Option<&Content>) -> Node {
    let kinds = volume.kinds().join(" and ");
    let name = format!("{} ({kinds})", volume.name);
    match content {
        Some(content) => described(layout, content, &name, volume.size),
        None if !volume.visible => Node::new(format!("{name} {} a part of another", ByteLen(volume.size))),
        None => {
            Node::new(format!("{name} {} not looked into: all of it is taken as used", ByteLen(volume.size)))
        }
    }
}
