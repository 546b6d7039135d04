//! A disk as it was at an older point: the images of the passes since then over what the disk holds now.
//!
//! A [`View`] only knows where the images lie; the shelf that they are read from is given with each call.

use super::recover::{Error, History, Image, Images};
use super::saved::Saved;
use crate::storage::Shelf;
use crate::units::Extent;

/// How much of the disk is read at once, in bytes: no image is longer.
const AT_ONCE: u64 = 1 << 20;

/// Which image holds which part of the older content. Parts that are in no image are on the disk as they were.
pub struct View {
    /// By where they begin on the disk; they do not overlap. No tree: this is what takes memory where a lot changed.
    parts: Vec<Part>,
    covered: Saved,
    /// The first image that was not looked at yet: its pass, and which it is of that.
    next: (u64, usize),
}

struct Part {
    /// Where it begins on the disk.
    offset: u64,
    /// How long it is; it may be less than the image.
    len: u32,
    pass: u64,
    image: Image,
}

impl Part {
    fn end(&self) -> u64 {
        self.offset + u64::from(self.len)
    }
}

impl View {
    /// The disk as it was after this pass.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where a pass since then is damaged.
    pub fn after(history: &History, pass: u64) -> Result<View, Error> {
        let next = (pass.saturating_add(1), 0);
        let mut view = View { parts: Vec::new(), covered: Saved::default(), next };
        view.extend(history)?;
        view.parts.shrink_to_fit();
        Ok(view)
    }

    /// Takes what the history has got since: newer passes, and more images of the newest one.
    ///
    /// # Errors
    /// As [`after`](Self::after).
    pub fn extend(&mut self, history: &History) -> Result<(), Error> {
        let sorted = self.parts.len();
        for pass in history.after(self.next.0 - 1)? {
            let known = if pass.number == self.next.0 { self.next.1 } else { 0 };
            let images = pass.images.get(known..).unwrap_or_default();
            for image in images {
                // An older pass's image is nearer to the point.
                self.parts.extend(self.covered.missing(image.extent()).into_iter().map(|part| Part {
                    offset: part.offset(),
                    // Within an image.
                    len: part.len() as u32,
                    pass: pass.number,
                    image: *image,
                }));
            }
            // Only now: the images of one pass do not overlap.
            images.iter().for_each(|image| self.covered.insert(image.extent()));
            self.next = (pass.number, pass.images.len());
        }
        match (sorted, self.parts.len()) {
            // In place, where there may be many.
            (0, _) => self.parts.sort_unstable_by_key(|part| part.offset),
            // A few, behind many that are in order: this sort finds that.
            (before, now) if before < now => self.parts.sort_by_key(|part| part.offset),
            _ => {}
        }
        Ok(())
    }

    /// How many parts it has: what it takes in memory.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// How many bytes that are.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|part| u64::from(part.len)).sum()
    }

    /// Whether the disk holds now what it held then.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Calls `put` with every range that is in an image, and its old bytes, in order.
    pub fn each<E: From<Error>>(
        &self,
        shelf: &dyn Shelf,
        mut put: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut images = Images::of(shelf);
        self.parts.iter().try_for_each(|part| {
            let bytes = images.read(part.pass, &part.image)?;
            put(part.offset, within(bytes, part))
        })
    }

    /// Whether a disk, of which `read` reads ranges, holds all that is in the images. Where an image is wanted whole, its
    /// checksum tells, and it is not read.
    pub fn is_on<E: From<Error>>(
        &self,
        shelf: &dyn Shelf,
        mut read: impl FnMut(Extent) -> Result<Vec<u8>, E>,
    ) -> Result<bool, E> {
        let mut images = Images::of(shelf);
        let mut rest = self.parts.as_slice();
        while let Some(first) = rest.first() {
            // At once what lies side by side.
            let mut end = first.offset;
            let together = rest.iter().take_while(|part| {
                let joins = part.offset == end && part.end() - first.offset <= AT_ONCE;
                end = if joins { part.end() } else { end };
                joins
            });
            let (some, later) = rest.split_at(together.count().max(1));
            rest = later;
            let len = some.iter().map(|part| u64::from(part.len)).sum();
            let Some(range) = Extent::new(first.offset, len) else { continue };
            let bytes = read(range)?;
            for part in some {
                let from = (part.offset - first.offset) as usize;
                let now = &bytes[from..from + part.len as usize];
                let same = match part.image.extent().len() == u64::from(part.len) {
                    true => part.image.is_of(now),
                    false => within(images.read(part.pass, &part.image)?, part) == now,
                };
                if !same {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Puts the old bytes over `buf`, which holds what the disk has from `offset` on.
    pub fn overlay(&self, shelf: &dyn Shelf, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        let mut images = Images::of(shelf);
        let end = offset + buf.len() as u64;
        let first = self.parts.partition_point(|part| part.end() <= offset);
        for part in self.parts[first..].iter().take_while(|part| part.offset < end) {
            let (from, to) = (part.offset.max(offset), part.end().min(end));
            let bytes = images.read(part.pass, &part.image)?;
            let bytes = &within(bytes, part)[(from - part.offset) as usize..(to - part.offset) as usize];
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(bytes);
        }
        Ok(())
    }
}

/// The bytes of a part, out of those of its image.
fn within<'b>(bytes: &'b [u8], part: &Part) -> &'b [u8] {
    let skip = (part.offset - part.image.extent().offset()) as usize;
    &bytes[skip..skip + part.len as usize]
}
