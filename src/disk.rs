//! Identity and discovery of disks. Nothing in this room writes to a disk.

pub mod device;
pub mod discover;
pub mod id;
pub mod vpd;
