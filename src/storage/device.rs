//! A device as a `Storage`.
