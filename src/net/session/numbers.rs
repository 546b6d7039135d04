//! Which frames of a pass have come, by their numbers.

use std::collections::BTreeSet;

use super::Error;
use super::receiving::protocol;

/// How far a frame may be ahead of the first that has not come: bounds what is remembered, and how scattered what came may
/// be before the client can say that it is dealt with.
pub(super) const AHEAD: u64 = 1024;

/// The numbers of a pass's frames: each comes once, and none is left out.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// The first that has not come.
    due: u64,
    /// Those after it that have.
    early: BTreeSet<u64>,
    /// Whether they come over several connections, each of them in its own time.
    several: bool,
}

impl Numbers {
    /// Of frames that come over several connections, or over one alone.
    pub(super) fn new(several: bool) -> Numbers {
        Numbers { several, ..Numbers::default() }
    }

    /// The first that has not come.
    pub(super) fn due(&self) -> u64 {
        self.due
    }

    /// Whether this one must wait until others have come.
    pub(super) fn must_wait(&self, number: u64) -> bool {
        self.several && number.saturating_sub(self.due) >= AHEAD
    }

    /// Whether all before this one have come; over one connection they have, or never will.
    pub(super) fn reach(&self, number: u64) -> bool {
        !self.several || self.due >= number
    }

    /// Whether none has come but those before the first that has not.
    pub(super) fn none_early(&self) -> bool {
        self.early.is_empty()
    }

    /// Whether this one may come now.
    pub(super) fn check(&self, number: u64) -> Result<(), Error> {
        let early = self.several && number > self.due && !self.must_wait(number);
        if number == self.due || early && !self.early.contains(&number) {
            return Ok(());
        }
        if self.several {
            return Err(protocol(format!("frame {number} came twice")));
        }
        Err(protocol(format!("frame {number} came where {} was due", self.due)))
    }

    /// One that was checked comes.
    pub(super) fn add(&mut self, number: u64) {
        self.early.insert(number);
        while self.early.remove(&self.due) {
            self.due += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// In whatever order they come, each is taken once, and what is remembered is bounded.
        #[test]
        fn each_comes_once_in_any_order(jumps in prop::collection::vec(0..2 * AHEAD, 1..400)) {
            let mut numbers = Numbers::new(true);
            let mut come = BTreeSet::new();
            for jump in jumps {
                let number = numbers.due().saturating_sub(3) + jump;
                let due = (0..).find(|number| !come.contains(number)).unwrap();
                prop_assert_eq!(numbers.due(), due);
                prop_assert_eq!(numbers.must_wait(number), number >= due + AHEAD);
                if numbers.must_wait(number) {
                    continue;
                }
                prop_assert_eq!(numbers.check(number).is_ok(), !come.contains(&number));
                if come.insert(number) {
                    numbers.add(number);
                }
                prop_assert!(numbers.reach(numbers.due()) && !numbers.reach(numbers.due() + 1));
                prop_assert!(numbers.early.len() < AHEAD as usize);
            }
        }
    }

    #[test]
    fn over_one_connection_they_come_in_order() {
        let mut numbers = Numbers::new(false);
        numbers.add(0);
        assert!(numbers.check(1).is_ok());
        for wrong in [0, 2, u64::MAX] {
            assert!(numbers.check(wrong).is_err() && !numbers.must_wait(wrong), "{wrong}");
        }
    }
}
