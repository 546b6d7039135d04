//! The machine, on changes of the tests' own, ended at each of its steps.

use std::cell::Cell;

use super::Error;
use crate::error::IoError;

thread_local! {
    /// How many steps are left before the power fails; none where it does not.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Called at each step.
pub(super) fn moment() -> Result<(), Error> {
    match LEFT.get() {
        Some(0) => Err(IoError::new("go on", "power", std::io::Error::other("cut by the test")).into()),
        left => {
            LEFT.set(left.map(|left| left - 1));
            Ok(())
        }
    }
}
