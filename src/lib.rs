//! `mt-agent`: the agent on a Linux master target.
//!
//! The library holds everything but the command line. Its rooms, from the ground up:
//!
//! - [`units`], [`name`], [`pass`], [`bytes`], [`checksum`], [`digest`], [`error`]: plain values that everyone may use.
//! - [`durable`]: small files that are replaced whole or not at all.
//! - [`sys`]: the only room with `unsafe` code: ioctls, aligned memory, the io_uring, inherited sockets.
//! - [`storage`]: what a device looks like to the code above it, and the fault-injecting backend of the tests.
//! - [`journal`]: what a disk held before a pass overwrote it.
//! - [`layout`]: what lies on a disk, and which of its bytes are used; it only reads.
//! - [`disk`]: identity and discovery of SCSI disks; it never writes.
//! - [`protection`]: which target disk belongs to which disk of which machine.
//! - [`setup`]: the changes that make a host a master target.
//! - [`points`]: the recovery points: their log, and which of them are let go.
//! - [`volume`]: one target disk and the thread that owns the order of its writes and flushes.
//! - [`recovery`]: brings disks to a point, exports and checks points.
//! - [`net`]: frames, messages, TLS, and the session that answers only after durability.
//! - [`send`]: the source side.
//! - [`agent`]: the service that wires all of it together.
//!
//! Arrows point down only: a room uses those above its line in this list, never those below.

pub mod agent;
pub mod bytes;
pub mod checksum;
pub mod digest;
pub mod disk;
pub mod durable;
pub mod error;
pub mod journal;
pub mod layout;
pub mod name;
pub mod net;
pub mod pass;
pub mod points;
pub mod protection;
pub mod recovery;
pub mod send;
pub mod setup;
pub mod storage;
pub mod sys;
pub mod units;
pub mod volume;
