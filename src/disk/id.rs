//! The identity of a disk.

use serde::Serialize;

/// The identity of a disk in its canonical text.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize)]
#[serde(transparent)]
pub struct DiskId(String);
