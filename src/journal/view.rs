//! A disk as it was at an older point: the images of the passes since then over what the disk holds now.

use std::collections::BTreeMap;

use super::format::BLOCK;
use super::recover::{Error, History, Image, Images};
use super::saved::Saved;
use crate::storage::Shelf;

/// Which image holds which part of the older content. Parts that are in no image are on the disk as they were.
pub struct View<'a> {
    shelf: &'a dyn Shelf,
    /// By where they begin on the disk; they do not overlap.
    parts: BTreeMap<u64, Part>,
}

struct Part {
    /// How long it is; it may be less than the image.
    len: u64,
    pass: u64,
    image: Image,
}

impl<'a> View<'a> {
    /// The disk as it was after this pass.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where a pass since then is damaged.
    pub fn after(history: &History, pass: u64, shelf: &'a dyn Shelf) -> Result<View<'a>, Error> {
        let mut covered = Saved::default();
        let mut parts = BTreeMap::new();
        for pass in history.after(pass)? {
            for image in &pass.images {
                // An older pass's image is nearer to the point.
                for part in covered.missing(image.extent()) {
                    parts.insert(part.offset(), Part { len: part.len(), pass: pass.number, image: *image });
                }
            }
            // Only now: the images of one pass do not overlap.
            pass.images.iter().for_each(|image| covered.insert(image.extent()));
        }
        Ok(View { shelf, parts })
    }

    /// How many bytes that are.
    pub fn len(&self) -> u64 {
        self.parts.values().map(|part| part.len).sum()
    }

    /// Whether the disk holds now what it held then.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Calls `put` with every range that is in an image, and its old bytes, in order.
    pub fn each<E: From<Error>>(&self, mut put: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut images = Images::of(self.shelf);
        self.parts.iter().try_for_each(|(offset, part)| {
            let bytes = images.read(part.pass, &part.image)?;
            put(*offset, within(&bytes, *offset, part))
        })
    }

    /// Puts the old bytes over `buf`, which holds what the disk has from `offset` (a multiple of 4096) on.
    pub fn overlay(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        debug_assert!(offset.is_multiple_of(BLOCK));
        let mut images = Images::of(self.shelf);
        let end = offset + buf.len() as u64;
        // One part may begin before.
        let first = self.parts.range(..=offset).next_back().map_or(offset, |(at, _)| *at);
        for (at, part) in self.parts.range(first..end) {
            let (from, to) = ((*at).max(offset), (at + part.len).min(end));
            if from < to {
                let bytes = images.read(part.pass, &part.image)?;
                let bytes = &within(&bytes, *at, part)[(from - at) as usize..(to - at) as usize];
                buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(bytes);
            }
        }
        Ok(())
    }
}

/// The bytes of a part, out of those of its image.
fn within<'b>(bytes: &'b [u8], offset: u64, part: &Part) -> &'b [u8] {
    let skip = (offset - part.image.extent().offset()) as usize;
    &bytes[skip..skip + part.len as usize]
}
