//! Bringing up to date what was read of a shelf, beside the one that writes there.

use super::{BLOCK, BLOCK_LEN, Error, History, Holds, Ours, Pass, format, names, recover_but, went_away};
use crate::storage::Shelf;

impl History {
    /// Reads what was appended, created or removed on the shelf since; `ours` and `holds` are those of [`recover`](super::recover()). Where
    /// nothing was, that takes a look at the names; and where the newest pass grew, no more than what it got.
    ///
    /// # Errors
    /// Those of [`recover`](super::recover()).
    pub fn refresh(&mut self, shelf: &dyn Shelf, ours: Ours<'_>, holds: Holds<'_>) -> Result<(), Error> {
        let names = names(shelf)?;
        if names.values().flatten().map(|(_, name)| name).eq(&self.names) {
            // Only a pass that has not ended grows, and then in ways that its files' names do not show.
            let Some(mut newest) = self.passes.last_entry().filter(|newest| !newest.get().is_closed()) else {
                return Ok(());
            };
            match newest.get_mut().read_on(shelf, holds) {
                Ok(true) => return Ok(()),
                Err(error) if !went_away(&error) => return Err(error),
                Ok(false) | Err(_) => {}
            }
        }
        // One that ended is as it was as long as it has the same segments: there may be many of those.
        let History { mut passes, .. } = std::mem::take(self);
        passes.retain(|number, pass| {
            let now = names.get(number).into_iter().flatten().map(|(_, name)| name);
            pass.is_closed() && now.eq(pass.segments.iter().map(|segment| &segment.name))
        });
        *self = recover_but(shelf, &passes, ours, holds)?;
        self.passes.append(&mut passes);
        Ok(())
    }
}

impl Pass {
    /// Whether it ended and does not go on, as far as its segments tell: one that does so has a new one, which at first has
    /// no header.
    fn is_closed(&self) -> bool {
        self.ended && self.segments.last().is_some_and(|newest| newest.end >= BLOCK)
    }

    /// Takes what was appended to the newest segment since it was read; `false` where only reading all of it anew can tell.
    fn read_on(&mut self, shelf: &dyn Shelf, holds: Holds<'_>) -> Result<bool, Error> {
        let Some((place, newest)) = self.segments.iter().enumerate().next_back() else { return Ok(false) };
        let (from, generation) = (newest.end, newest.generation);
        if from < BLOCK || self.damage.is_some() {
            return Ok(false);
        }
        let reader = shelf.open(&newest.name)?;
        let mut block = [0; BLOCK_LEN];
        if reader.size() < from.max(BLOCK) {
            return Ok(false);
        }
        reader.read_at(0, &mut block)?;
        if !format::parse_segment(&block).is_ok_and(|segment| segment.generation == generation) {
            return Ok(false);
        }
        if reader.size() < from + BLOCK {
            // It is full: what comes next stands in another one.
            return Ok(true);
        }
        reader.read_at(from, &mut block)?;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(true);
        }
        let last = self.take(&*reader, generation, place, from)?;
        if !self.ended {
            self.settle(&*reader, generation, last, holds)?;
        }
        // Where there is damage, whoever writes may have been in the middle of it.
        Ok(self.damage.is_none())
    }
}
