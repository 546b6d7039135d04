//! The way back over one pass: its images, out of the journal and onto the disk again.

use super::format::MAX_IMAGE;
use super::recover::{Error, Images, Pass};
use crate::error::IoError;
use crate::storage::{Action, Completion, Place, Request, Shelf, Storage};
use crate::sys::aligned::Arena;

/// Brings a disk back to what it was before this pass, and makes that durable. The segments are still there afterwards;
/// until they are let go of ([`let_go`](super::recover::let_go)), a crash at any moment is mended by doing the same again.
///
/// # Errors
/// [`Error::Corrupt`]: where the pass is known to be damaged, before anything is written.
pub fn roll_back(pass: &Pass, shelf: &dyn Shelf, storage: &mut dyn Storage) -> Result<(), Error> {
    if let Some(damage) = &pass.damage {
        return Err(Error::Corrupt { pass: pass.number, damage: damage.clone() });
    }
    let depth = storage.depth().min(16);
    let arena =
        Arena::new(depth * MAX_IMAGE as usize).map_err(|error| IoError::new("map", "memory", error))?;
    let mut images = Images::of(shelf);
    let mut done: Vec<Completion> = Vec::new();
    let mut in_flight = 0;
    for (tag, image) in pass.images.iter().enumerate() {
        let mut buffer = loop {
            match arena.try_alloc(image.len as usize) {
                Some(buffer) if in_flight < depth => break buffer,
                _ => in_flight -= reap(storage, &mut done)?,
            }
        };
        images.read_into(pass.number, image, &mut buffer)?;
        let action = Action::Write { offset: image.offset, buffer };
        storage.submit(Request { tag: tag as u64, place: Place::Disk, action });
        in_flight += 1;
    }
    while in_flight > 0 {
        in_flight -= reap(storage, &mut done)?;
    }
    storage.submit(Request { tag: 0, place: Place::Disk, action: Action::Flush });
    while reap(storage, &mut done)? == 0 {}
    Ok(())
}

/// Waits for completions, all of which must be successes, and counts them.
fn reap(storage: &mut dyn Storage, done: &mut Vec<Completion>) -> Result<usize, IoError> {
    storage.wait(done)?;
    let count = done.len();
    done.drain(..).try_for_each(|completion| completion.result)?;
    Ok(count)
}
