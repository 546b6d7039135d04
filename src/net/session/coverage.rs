//! What a pass has dealt with: nothing is sent twice, and an initial pass leaves nothing out.

use std::collections::BTreeMap;

use super::Error;
use super::receiving::protocol;
use crate::units::Extent;

/// Which bytes of the volume a pass has dealt with.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// Everything before this, but for what was refused and did not come again.
    below: u64,
    /// What was brought from there on: runs that do not touch, by their starts. A sender that goes through its disk in
    /// order has one.
    runs: BTreeMap<u64, u64>,
    /// What was refused and did not come again, by where it starts.
    refused: BTreeMap<u64, u64>,
}

/// How scattered the frames of a pass may be: bounds what is remembered of it.
const MOST_RUNS: usize = 4096;

impl Coverage {
    pub(super) fn overlaps(&self, extent: Extent) -> bool {
        if self.refused_run(extent).is_some() {
            return false;
        }
        extent.offset() < self.below
            || self.runs.range(..extent.end()).next_back().is_some_and(|(_, end)| *end > extent.offset())
    }

    /// What was refused and holds the whole of the range.
    fn refused_run(&self, extent: Extent) -> Option<(u64, u64)> {
        let (start, end) = self.refused.range(..=extent.offset()).next_back()?;
        (extent.end() <= *end).then_some((*start, *end))
    }

    /// A range that was added turned out to be damaged: it is to come again.
    pub(super) fn refuse(&mut self, extent: Extent) {
        if self.refused_run(extent).is_none() {
            self.refused.insert(extent.offset(), extent.end());
        }
    }

    /// Adds a range that overlaps none.
    pub(super) fn add(&mut self, extent: Extent) -> Result<(), Error> {
        let (mut start, mut end) = (extent.offset(), extent.end());
        if let Some((from, to)) = self.refused_run(extent) {
            self.refused.remove(&from);
            self.refused.extend([(from, start), (end, to)].into_iter().filter(|(from, to)| from < to));
            // It counts since it came for the first time.
            return Ok(());
        }
        // What of it lies before is counted already.
        start = start.max(self.below);
        if start >= end {
            return Ok(());
        }
        if let Some((&before, &touching)) = self.runs.range(..start).next_back()
            && touching == start
        {
            start = before;
        }
        if let Some(after) = self.runs.remove(&end) {
            end = after;
        }
        self.runs.insert(start, end);
        match self.runs.len() {
            0..=MOST_RUNS => Ok(()),
            _ => Err(protocol(format!("the pass jumps about: over {MOST_RUNS} separate ranges"))),
        }
    }

    /// Everything before this is dealt with.
    pub(super) fn pass(&mut self, below: u64) {
        self.below = below;
        let mut later = self.runs.split_off(&below);
        if let Some((_, end)) = self.runs.last_key_value().filter(|(_, end)| **end > below) {
            later.insert(below, *end);
        }
        self.runs = later;
    }

    /// Up to where everything is dealt with.
    pub(super) fn below(&self) -> u64 {
        self.below
    }

    /// The first that was refused and did not come again.
    pub(super) fn first_refused(&self) -> Option<Extent> {
        let (from, to) = self.refused.first_key_value()?;
        Extent::new(*from, to - from)
    }

    /// Whether every byte before `size` was dealt with.
    pub(super) fn is_whole(&self, size: u64) -> bool {
        let reached = self.runs.get(&self.below).copied().unwrap_or(self.below);
        reached >= size && self.refused.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// 0: a range comes; 1: it is refused; 2: everything up to its end is dealt with.
        #[test]
        fn coverage_equals_a_map_of_bytes(
            steps in prop::collection::vec((0..3u8, 0..200u64, 1..40u64), 1..60),
        ) {
            #[derive(Clone, Copy, PartialEq)]
            enum Byte { Open, Dealt, Refused }
            let mut coverage = Coverage::default();
            let mut bytes = [Byte::Open; 240];
            for (step, offset, len) in steps {
                let range = offset as usize..(offset + len) as usize;
                let extent = Extent::new(offset, len).unwrap();
                if step == 2 {
                    if extent.end() >= coverage.below() {
                        coverage.pass(extent.end());
                        for byte in &mut bytes[..range.end] {
                            if *byte == Byte::Open {
                                *byte = Byte::Dealt;
                            }
                        }
                    }
                    continue;
                }
                let is = |byte| bytes[range.clone()].iter().all(|found| *found == byte);
                // Either new, or a part of what was refused.
                let (new, again) = (is(Byte::Open), is(Byte::Refused));
                let mixed = !new && !again && !bytes[range.clone()].contains(&Byte::Dealt);
                if mixed {
                    continue;
                }
                prop_assert_eq!(coverage.overlaps(extent), !new && !again);
                if new && step == 1 {
                    // Each range that was refused is known by itself.
                    let touches = |at: usize| bytes.get(at) == Some(&Byte::Refused);
                    if touches(range.end) || range.start.checked_sub(1).is_some_and(touches) {
                        continue;
                    }
                    prop_assert!(coverage.add(extent).is_ok());
                    coverage.refuse(extent);
                    bytes[range].fill(Byte::Refused);
                } else if (new || again) && step == 0 {
                    prop_assert!(coverage.add(extent).is_ok());
                    bytes[range].fill(Byte::Dealt);
                }
            }
            prop_assert_eq!(coverage.first_refused().is_some(), bytes.contains(&Byte::Refused));
            let whole = bytes.iter().take_while(|byte| **byte == Byte::Dealt).count() as u64;
            prop_assert_eq!(coverage.is_whole(whole), !bytes.contains(&Byte::Refused));
            prop_assert!(!coverage.is_whole(whole + 1));
        }
    }

    #[test]
    fn a_pass_that_jumps_about_is_bounded() {
        let mut coverage = Coverage::default();
        let mut add = |n: usize| coverage.add(Extent::new(2 * n as u64, 1).unwrap());
        assert!((0..MOST_RUNS).all(|n| add(n).is_ok()));
        assert!(add(MOST_RUNS).is_err());
        // What is told to be dealt with is forgotten.
        coverage.pass(2 * MOST_RUNS as u64);
        assert!(coverage.add(Extent::new(1 << 20, 1).unwrap()).is_ok());
    }
}
