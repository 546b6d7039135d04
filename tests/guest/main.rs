//! Tests that need what the build machine's kernel has not: SCSI disks, device mapper, md, udevd. Each is a test
//! like any other, whose body runs as root in a guest that is booted for it. See `harness`.

#[path = "../support/mod.rs"]
mod support;

mod durability;
mod exchange;
mod full;
mod harness;
mod host;
mod hypervisor;
mod identities;
mod journal;
mod lio;
mod log_writes;
mod many;
mod mapped;
mod receive;
mod reiserfs;
mod roles;
mod small;
mod striped;
mod writers;
