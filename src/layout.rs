//! What lies on a disk, read from its bytes alone, by no kernel: partition tables, volume groups, file systems, and
//! which bytes of all that are used. This room only reads, and only structures of metadata, of bounded size.
//!
//! The one rule that everything here keeps: **a byte is free only where that is proven**. What is damaged, unknown or
//! contradicts itself is used, all of it, and says why.
//!
//! A file system's parser is a function `read` from a [`View`] of the place where it may lie (a disk, a partition, a
//! logical volume: it cannot tell which) to a [`FileSystem`]:
//! - `Ok(None)`: it is another file system's place, or nobody's;
//! - `Ok(Some(_))`: it is this one's. Where it is known but its free space is not (an unknown feature, a journal that
//!   cannot be followed, a damaged bitmap) the [`Allocation`] is `Whole` and says why;
//! - `Err(_)`: it is this one's, and not even its superblock can be believed.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

pub mod ext4;
pub mod fields;
mod gpt;
pub mod landmarks;
pub mod lvm;
mod map;
mod mbr;
mod named;
pub mod ranges;
mod reasons;
mod reiserfs;
pub mod signature;
pub mod table;
pub mod tree;
pub mod view;
mod xfs;

use serde::Serialize;

use crate::error::IoError;
use crate::units::ByteLen;
use ranges::Ranges;
use view::View;

/// Why something on a disk cannot be read or followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The disk cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A structure breaks a rule of its format.
    #[error("{what} (at byte {at})")]
    Corrupt {
        /// What is wrong, in words: `a block bitmap whose checksum does not hold`.
        what: &'static str,
        /// Where that lies, from the beginning of the place that was read.
        at: u64,
    },
    /// It may be sound, and this program does not know how to follow it.
    #[error("{feature} cannot be followed")]
    Unsupported {
        /// What it is: `the feature 0x10000`, `a log that was not replayed`.
        feature: String,
    },
}

impl Error {
    /// Something that this program does not know how to follow.
    pub fn unsupported(feature: impl Into<String>) -> Error {
        Error::Unsupported { feature: feature.into() }
    }
}

/// A file system, or what lies in place of one: swap, a container of encrypted data, a member of an array.
#[derive(Debug)]
pub struct FileSystem {
    /// As `blkid` calls it: `ext4`, `xfs`, `swap`, `crypto_LUKS`.
    pub kind: &'static str,
    /// The format's version, where it has several.
    pub version: Option<String>,
    /// As `blkid` prints it.
    pub uuid: Option<String>,
    /// As `blkid` prints it.
    pub label: Option<String>,
    /// The size of its blocks in bytes.
    pub block_size: Option<u64>,
    /// How many bytes it covers, from the beginning of its place; the place may be larger.
    pub size: ByteLen,
    /// How many of these are free, by its own count.
    pub free: Option<ByteLen>,
    /// What it says of its own health; `None` where it says nothing, or is not asked.
    pub state: Option<State>,
    /// Its features, as its own tools call them.
    pub features: Vec<String>,
    /// What else whoever looks at it should know: `the primary superblock is damaged; read from the one at byte …`.
    pub notes: Vec<String>,
    /// Which of its place's bytes are used.
    pub allocation: Allocation,
}

impl FileSystem {
    /// One of which nothing is known but its name and extent.
    pub fn new(kind: &'static str, size: u64, allocation: Allocation) -> FileSystem {
        FileSystem {
            kind,
            version: None,
            uuid: None,
            label: None,
            block_size: None,
            size: ByteLen(size),
            free: None,
            state: None,
            features: Vec::new(),
            notes: Vec::new(),
            allocation,
        }
    }

    /// How many of its bytes are in use, by its own count.
    pub fn used(&self) -> Option<ByteLen> {
        self.size.0.checked_sub(self.free?.0).map(ByteLen)
    }
}

/// How a file system was left; of several that apply, the last one here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Unmounted, and nothing is wrong with it.
    Clean,
    /// It was not unmounted (or is mounted), and there is nothing to replay that would make a difference.
    NotUnmounted,
    /// Its journal is to be replayed, and what lies in its place until then is stale.
    JournalToReplay,
    /// Its driver found errors.
    Errors,
}

/// Which bytes of its place a file system uses.
#[derive(Debug)]
pub enum Allocation {
    /// These, from the beginning of its place; all others are proven free. What lies behind the file system's own end,
    /// [`FileSystem::size`], is no part of it, and whoever asks for the place's used bytes adds that.
    Known(Ranges),
    /// All of its place must be taken as used.
    Whole {
        /// Why.
        why: Error,
    },
}

/// What reads one kind of file system.
struct Parser {
    /// The signatures that announce it.
    kinds: &'static [&'static str],
    read: fn(&View<'_>) -> Result<Option<FileSystem>, Error>,
}

/// The file systems whose free space is known. The first that finds its own is believed.
const PARSERS: &[Parser] = &[
    Parser { kinds: &["ext2", "ext3", "ext4"], read: ext4::read },
    Parser { kinds: &["xfs"], read: xfs::read },
    Parser { kinds: &["reiserfs"], read: reiserfs::read },
];

#[cfg(test)]
mod tests;
