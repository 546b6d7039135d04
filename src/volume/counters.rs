//! Live counters.
