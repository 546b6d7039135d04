//! `mt-agent inspect`: what lies on disks or images, read by this program alone; nothing is written or activated.
//!
//! `--json` prints one object: `schema_version` (1), `disks` and `volume_groups`. Of each disk `path`, `size`, `used` and
//! `free` (what would be copied, and what is proven free), `notes` and `content`. `notes` say who has it in use; while
//! there are any, `free` is what stands on the disk at this moment, and only proven while it is frozen. A content has a
//! `type`:
//!
//! - `unknown`: nothing announces itself.
//! - `several`: `kinds` that announce themselves in one place.
//! - `unreadable`: `kind`, where it is known, and `why`.
//! - `table`: `kind` (`dos`, `gpt`), `id`, `sector`, `notes`, `flaw` (why all of the disk is taken as used), and
//!   `partitions`: `number`, `offset`, `size`, `kind`, `uuid`, `name`, `bootable` and their `content`; that of the extended
//!   partition is null.
//! - `file-system`: `kind`, `version`, `uuid`, `label`, `block_size`, `size`, `used` and `free` by its own count, `state`
//!   (`clean`, `not-unmounted`, `journal-to-replay`, `errors`), `features`, `notes`, and `whole`: why all of it is taken
//!   as used, or null where its free space is known; where it is not and `state` is not `clean`, its count may be old.
//! - `physical-volume`: `uuid`, `group`, `flaw`.
//!
//! Of each volume group `name`, `uuid`, `seqno`, `extent_size`, `flaw`, `physical_volumes` (`uuid`, `size`, `here`) and
//! `logical_volumes`: `name`, `uuid`, `size`, `kinds`, `visible`, and `content`, null where it is not looked into. All sizes
//! and offsets are in bytes; what is not known is null.

mod tree;

use std::path::PathBuf;

use mt_agent::disk::discover::{Sysroot, roles, views};
use mt_agent::error::chain;
use mt_agent::layout::lvm::group::Volume;
use mt_agent::layout::table::{Partition, Table};
use mt_agent::layout::tree::{Content, Disk, GroupLayout, Layout, Place, read};
use mt_agent::layout::{Allocation, FileSystem};
use mt_agent::storage::file::ReadFile;
use serde_json::{Value, json};

use super::{Failure, print};

/// The version of the JSON; it changes when a field goes or changes its meaning.
const SCHEMA_VERSION: u32 = 1;

/// Show what lies on disks or images: partitions, volume groups, file systems, and how much of it is used
///
/// Only metadata is read, and nothing is written, mounted or activated. Give all disks of a volume group together.
#[derive(clap::Args)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage.")]
pub struct Args {
    /// Block devices or image files
    #[arg(value_name = "DISK", required = true)]
    disks: Vec<PathBuf>,
    /// Print JSON; sizes are in bytes
    #[arg(long)]
    json: bool,
}

/// Something to look at, and what was said of it beforehand.
struct Named {
    path: PathBuf,
    file: ReadFile,
    sector: Option<u64>,
    notes: Vec<String>,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let sysroot = Sysroot::default();
    let mut all = Vec::new();
    for path in &args.disks {
        let file = ReadFile::open(path).map_err(Failure::failed)?;
        let sector = file.sector().map_err(Failure::failed)?;
        let held = views::of(&sysroot, file.file()).into_iter();
        let notes = held.flat_map(|devno| roles::holders(&sysroot, &devno)).collect();
        all.push(Named { path: path.clone(), file, sector, notes });
    }
    let disks: Vec<Disk<'_>> = all.iter().map(|one| Disk { reader: &one.file, sector: one.sector }).collect();
    let layout = read(&disks);
    match args.json {
        true => print(&format!("{:#}\n", report(&all, &layout))),
        false => print(&tree::text(&all, &layout)),
    }
}

fn report(all: &[Named], layout: &Layout) -> Value {
    let disks: Vec<Value> = (0..).zip(all).zip(&layout.disks).map(|((index, named), place)| {
        let used = layout.used(index).map_or(place.size, |used| used.bytes());
        json!({
            "path": named.path, "size": place.size, "used": used, "free": place.size - used, "notes": named.notes,
            "content": content(layout, &place.content),
        })
    }).collect();
    let groups: Vec<Value> = layout.groups.iter().map(|group| volume_group(layout, group)).collect();
    json!({ "schema_version": SCHEMA_VERSION, "disks": disks, "volume_groups": groups })
}

fn content(layout: &Layout, content: &Content) -> Value {
    match content {
        Content::Unknown => json!({ "type": "unknown" }),
        Content::Several(kinds) => json!({ "type": "several", "kinds": kinds }),
        Content::Unread { kind, why } => json!({ "type": "unreadable", "kind": kind, "why": chain(why) }),
        Content::Table { table, places } => {
            let all: Vec<Value> = partitions(table, places)
                .into_iter()
                .map(|(one, place)| partition(layout, one, place))
                .collect();
            json!({
                "type": "table", "kind": table.kind, "id": table.id, "sector": table.sector, "notes": table.notes,
                "flaw": table.flaw.as_ref().map(|flaw| chain(flaw)), "partitions": all,
            })
        }
        Content::FileSystem(found) => file_system(found),
        Content::PhysicalVolume(index) => {
            let volume = layout.physical.get(*index);
            json!({
                "type": "physical-volume", "uuid": volume.map(|volume| &volume.uuid),
                "group": group_of(layout, *index),
                "flaw": volume.and_then(|volume| volume.flaw.as_ref()).map(|flaw| chain(flaw)),
            })
        }
    }
}

/// The partitions of a table in its order, with their places; the extended one has none.
fn partitions<'a>(table: &'a Table, places: &'a [Place]) -> Vec<(&'a Partition, Option<&'a Place>)> {
    let mut places = places.iter();
    let place = |one: &'a Partition| (one, if one.container { None } else { places.next() });
    table.partitions.iter().map(place).collect()
}

/// The name of the group that a physical volume belongs to.
fn group_of(layout: &Layout, index: usize) -> Option<&str> {
    let groups = layout.groups.iter().map(|group| &group.group);
    let mut groups = groups.filter(|group| group.claims.contains(&index));
    groups.next().map(|group| group.name.as_str())
}

fn partition(layout: &Layout, one: &Partition, place: Option<&Place>) -> Value {
    json!({
        "number": one.number, "offset": one.extent.offset(), "size": one.extent.len(), "kind": one.kind,
        "uuid": one.uuid, "name": one.name, "bootable": one.bootable,
        "content": place.map(|place| content(layout, &place.content)),
    })
}

fn file_system(found: &FileSystem) -> Value {
    let whole = match &found.allocation {
        Allocation::Known(_) => None,
        Allocation::Whole { why } => Some(chain(why)),
    };
    json!({
        "type": "file-system", "kind": found.kind, "version": found.version, "uuid": found.uuid, "label": found.label,
        "block_size": found.block_size, "size": found.size, "used": found.used(), "free": found.free,
        "state": found.state, "features": found.features, "notes": found.notes, "whole": whole,
    })
}

fn volume_group(layout: &Layout, one: &GroupLayout) -> Value {
    let group = &one.group;
    let members: Vec<Value> = group
        .members
        .iter()
        .map(|member| {
            let (size, here) = (member.extents.len(), member.found.is_some());
            json!({ "uuid": member.uuid, "size": size, "here": here })
        })
        .collect();
    let volume = |(volume, inner): (&Volume, &Option<Content>)| {
        json!({
            "name": volume.name, "uuid": volume.uuid, "size": volume.size, "kinds": volume.kinds(),
            "visible": volume.visible, "content": inner.as_ref().map(|inner| content(layout, inner)),
        })
    };
    let volumes: Vec<Value> = group.volumes.iter().zip(&one.contents).map(volume).collect();
    json!({
        "name": group.name, "uuid": group.uuid, "seqno": group.seqno, "extent_size": group.extent_size,
        "flaw": group.flaw.as_ref().map(|flaw| chain(flaw)),
        "physical_volumes": members, "logical_volumes": volumes,
    })
}
