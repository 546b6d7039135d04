//! Opens target disks.
