//! The journal of a volume: what the disk held before a pass overwrote it.
//!
//! A *delta pass* overwrites blocks of a disk that stands at a point. Before it does, it appends their old content, the
//! *before-images*, to the journal and makes that durable; only then are the blocks overwritten ([`writer`]). So whatever
//! happens in between, the disk can be brought back to the point ([`recover`]), and after the pass has become a point
//! itself, the disk as it was at the older one can still be read ([`view`]).
//!
//! The passes of a volume are numbered. The images of a pass lie in segment files of their own, whose names begin with
//! its number: to let go of the oldest point is to remove the files of the pass that came after it. Each block has at most
//! one image in a pass, the content at the pass's beginning, so the images of one pass may be applied in any order, and
//! those of several passes newest first.
//!
//! # The order of writes, and what a crash between two of them leaves
//!
//! For every batch: (1) the record with the before-images is written to the segment, (2) the segment is flushed, (3) the
//! blocks are written to the disk. At the pass's end: (4) all of (3) has completed, (5) the disk is flushed, (6) the end
//! record is written and (7) flushed, (8) the point is recorded elsewhere, and that is the commit.
//!
//! - Before (2): the record may be there, torn, or not. Nothing of its blocks was overwritten. A newest record that does
//!   not check out is taken for this only where the disk still holds what it says that it saved ([`recover`]).
//! - Between (2) and (8): the blocks may be old, new, or torn. Their images are there: the pass goes on (the images are
//!   not taken again), or is rolled back by writing them back.
//! - Within a rollback: it begins again from the first image. Writing an image twice is writing it once.
//!
//! A pass that goes on after an interruption begins a new segment, after what a power cut left behind the last record of
//! the old one was cut off: behind the last record of a segment there is never another, so a sound record behind a broken
//! one means damage, and in a pass that ended every byte behind it is zero ([`verify`](mod@verify)).
//!
//! The segments of a volume carry its *lineage*, as do its points: files that were exchanged between two volumes are told by
//! it, and neither read nor removed.

mod back;
pub mod format;
mod parallel;
pub mod recover;
mod saved;
pub mod verify;
pub mod view;
pub mod writer;

pub use back::roll_back;
pub use format::{BLOCK, Entry};
pub use recover::{History, Pass};
pub use verify::verify;
pub use view::View;
pub use writer::Writer;
