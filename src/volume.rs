//! One target disk, and what it tells of itself.

pub mod counters;
