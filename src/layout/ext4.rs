//! ext2, ext3 and ext4.
//!
//! All three are one format with more or fewer features. The disk is divided into groups of blocks; a group's descriptor
//! says where its bitmap of used blocks lies. Descriptors and the superblock have copies in some of the groups; bitmaps
//! have none. `superblock` holds the geometry, `groups` descriptors and bitmaps.
//!
//! What lies in its place is stale as long as the journal was not replayed: a block whose bit is clear may hold a file that
//! was committed. So `journal` is read first, and `blocks` then gives of each block the newest content. Where that is not
//! certain, or a checksum does not hold, or two things that should agree do not, everything is used.
//!
//! What an unclean file system's kernel does after the replay, to its orphaned inodes, only gives blocks back.

mod blocks;
mod features;
mod groups;
mod inode;
mod journal;
mod superblock;

use std::collections::HashMap;

use super::view::View;
use super::{Allocation, Error, FileSystem, State};
use crate::units::ByteLen;
use blocks::Blocks;
use features::{HAS_JOURNAL, JOURNAL_DEVICE, RECOVER};
use superblock::{Checks, Geometry, Superblock};

/// Reads the file system that lies in this place, if it is one of these.
pub fn read(view: &View<'_>) -> Result<Option<FileSystem>, Error> {
    match Superblock::read(view, superblock::AT)? {
        None => Ok(copy(view)?.map(|copy| {
            let why =
                Error::Corrupt { what: "a file system whose primary superblock is gone", at: superblock::AT };
            let note = format!("the primary superblock is gone; read from the copy at byte {}", copy.at);
            let found = describe(copy, note, Allocation::Whole { why });
            FileSystem { state: None, ..found }
        })),
        Some(Ok(primary)) if primary.features.has(JOURNAL_DEVICE) => Ok(None),
        Some(Ok(primary)) => Ok(Some(with_map(view, primary))),
        Some(Err(Error::Io(why))) => Err(Error::Io(why)),
        Some(Err(why)) => match copy(view)? {
            None => Err(why),
            Some(copy) => {
                let note = format!(
                    "the primary superblock is damaged: {why}; read from the copy at byte {}",
                    copy.at
                );
                Ok(Some(with_copy(view, copy, note)))
            }
        },
    }
}

/// A file system, read by its primary superblock.
fn with_map(view: &View<'_>, primary: Superblock) -> FileSystem {
    match allocation(view, &primary) {
        Ok(map) => {
            let mut found = describe(primary, None, Allocation::Known(map.used));
            found.free = Some(ByteLen(map.free));
            found
        }
        Err(why) => describe(primary, None, Allocation::Whole { why }),
    }
}

/// A file system, read by a copy of its superblock. Nobody keeps the copies' state: whether it was unmounted, and whether
/// there is a journal to replay, is not in them. So the map is only believed where checksums prove every structure that it
/// is made of, the journal itself says that it is empty, and what is left of the primary does not say otherwise.
fn with_copy(view: &View<'_>, mut copy: Superblock, note: String) -> FileSystem {
    let mut found = match proven(view, &copy) {
        Ok(true) => {
            copy.valid = true;
            with_map(view, copy)
        }
        Ok(false) => {
            let why = Error::Corrupt {
                what: "a file system whose primary superblock is damaged",
                at: superblock::AT,
            };
            describe(copy, None, Allocation::Whole { why })
        }
        Err(why) => describe(copy, None, Allocation::Whole { why }),
    };
    found.state = None;
    found.notes.push(note);
    found
}

/// Whether all that a copy of the superblock does not say is known from elsewhere.
fn proven(view: &View<'_>, copy: &Superblock) -> Result<bool, Error> {
    let read = view.read(superblock::AT, superblock::LEN)?;
    let primary = superblock::Remains::parse(read.fields())?;
    let own = copy.geometry.as_ref().is_ok_and(|geometry| {
        // The copy of a file system that was here before has another UUID.
        matches!(geometry.checks, Checks::Crc32c(_)) && primary.id == geometry.id
    });
    Ok(own && primary.clean && copy.features.has(HAS_JOURNAL))
}

/// What a superblock says of its file system.
fn describe(superblock: Superblock, note: impl Into<Option<String>>, allocation: Allocation) -> FileSystem {
    let bytes = |blocks: u64| ByteLen(blocks.saturating_mul(superblock.block_size));
    let features = &superblock.features;
    let state = if superblock.errors {
        State::Errors
    } else if features.has(RECOVER) {
        State::JournalToReplay
    } else if superblock.valid {
        State::Clean
    } else {
        State::NotUnmounted
    };
    FileSystem {
        version: Some(format!("{}.{}", superblock.revision.0, superblock.revision.1)),
        uuid: superblock.uuid.clone(),
        label: superblock.label.clone(),
        block_size: Some(superblock.block_size),
        free: Some(bytes(superblock.free_blocks)),
        state: Some(state),
        features: features.names(),
        notes: note.into().into_iter().collect(),
        ..FileSystem::new(features.kind(), bytes(superblock.blocks).0, allocation)
    }
}

/// Which bytes are used.
fn allocation(view: &View<'_>, found: &Superblock) -> Result<groups::Map, Error> {
    let geometry = found.geometry.as_ref().map_err(unknown)?;
    if geometry.byte(geometry.blocks) > view.size() {
        return Err(Error::Corrupt {
            what: "a file system that is larger than its place",
            at: superblock::AT,
        });
    }
    sound(found)?;
    let mut blocks = Blocks { view, block_size: geometry.block_size, newer: HashMap::new() };
    if found.features.has(HAS_JOURNAL) {
        blocks.newer = journal::replay(&blocks, geometry, found.features.has(RECOVER))?;
        replayed(&blocks, geometry)?;
    }
    groups::map(&blocks, geometry)
}

/// That a file system's own word is not against it.
fn sound(found: &Superblock) -> Result<(), Error> {
    let (journal, recover) = (found.features.has(HAS_JOURNAL), found.features.has(RECOVER));
    if found.errors {
        return Err(Error::unsupported("a file system in which errors were found"));
    }
    if !recover && !found.valid {
        return Err(Error::unsupported("a file system that was not unmounted"));
    }
    match (journal, recover, found.journal_inode) {
        (false, true, _) => Err(Error::Corrupt {
            what: "a file system with a journal to replay, and none",
            at: superblock::AT,
        }),
        (true, _, 0) => Err(Error::unsupported("a journal on a device of its own")),
        (true, _, number) if number != inode::JOURNAL => {
            Err(Error::unsupported(format!("a journal in the inode {number}")))
        }
        _ => Ok(()),
    }
}

/// That the superblock as it is after the replay tells the same of the file system.
fn replayed(blocks: &Blocks<'_, '_>, geometry: &Geometry) -> Result<(), Error> {
    let block = geometry.superblock();
    if !blocks.newer.contains_key(&block) {
        return Ok(());
    }
    let read = blocks.read(block, 1)?;
    let within = superblock::AT.saturating_sub(geometry.byte(block));
    let bytes = read.fields().bytes(within, superblock::LEN)?.to_vec();
    let found = Superblock::parse(&super::fields::Block::new(bytes, superblock::AT))?;
    if found.errors {
        return Err(Error::unsupported("a file system in which errors were found"));
    }
    if found.geometry.as_ref().map_err(unknown)? != geometry {
        return Err(Error::unsupported("a journal that changes the file system's size"));
    }
    Ok(())
}

fn unknown(feature: &String) -> Error {
    Error::unsupported(format!("the feature {feature}"))
}

/// The first copy of a superblock that is sound. Where the groups have the number of blocks that they have unless somebody
/// asked for another.
fn copy(view: &View<'_>) -> Result<Option<Superblock>, Error> {
    for shift in 0..=6 {
        let size = 1024u64 << shift;
        for group in [1u32, 3, 5, 7, 9, 25, 27, 49] {
            // The number of blocks in a group has to fit into 16 bits, and is divided by 8.
            let blocks = size.saturating_mul(8).min(65528).saturating_mul(u64::from(group));
            let at = blocks.saturating_add(u64::from(shift == 0)).saturating_mul(size);
            if let Some(Ok(found)) = Superblock::read(view, at)?
                && found.block_size == size
                && found.group == group
                && !found.features.has(JOURNAL_DEVICE)
            {
                return Ok(Some(found));
            }
        }
    }
    Ok(None)
}
