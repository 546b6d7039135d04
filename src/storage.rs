//! What a device looks like to the code above it.
//!
//! [`ReadAt`] is a plain positioned read, for everything that only looks. [`Storage`] is a queue:
//! requests are submitted, run several at a time, and complete in any order; it is how a volume writes. Its
//! backends are an io_uring, a pool of threads ([`device`]), and the fault-injecting one of the tests
//! ([`fault`]). A volume's journal goes through the same queue: beside the disk it has one segment file at a time, out
//! of a [`Shelf`] of them. And the points log is a [`Scroll`], so that the tests can cut the power of all of these at once.

pub mod ahead;
pub mod device;
pub mod fault;
pub mod file;
pub mod scroll;
pub mod shelf;
mod threads;

use std::any::Any;
use std::fmt::Debug;

use crate::error::IoError;
use crate::sys::aligned::Buffer;
use crate::units::Extent;

/// Positioned reads.
pub trait ReadAt {
    /// The size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset` on. Reading past the end is an error, never a short read.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError>;
}

/// What to do, with the memory that it is done with: a request owns its buffer until it completes.
#[derive(Debug)]
pub enum Action {
    /// Fill the buffer from `offset` on.
    Read {
        /// Where on the device.
        offset: u64,
        /// What is filled, wholly.
        buffer: Buffer,
    },
    /// Write the whole buffer at `offset`.
    Write {
        /// Where on the device.
        offset: u64,
        /// What is written.
        buffer: Buffer,
    },
    /// Make the range read as zeros, by discarding it where that is certain to give zeros.
    Zero(Extent),
    /// Make all writes durable that *completed* before this was submitted (`fdatasync`).
    Flush,
}

/// Where a request goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// The disk itself.
    Disk,
    /// The segment that was created last.
    Segment,
}

/// One piece of work for a device; `tag` comes back with its completion.
#[derive(Debug)]
pub struct Request {
    /// The submitter's name for it.
    pub tag: u64,
    /// The disk or the segment.
    pub place: Place,
    /// What to do.
    pub action: Action,
}

/// How a request ended.
#[derive(Debug)]
pub struct Completion {
    /// The request's tag.
    pub tag: u64,
    /// The buffer of a read or a write, given back.
    pub buffer: Option<Buffer>,
    /// Whole success, or why not: short transfers were carried on by the backend.
    pub result: Result<(), IoError>,
}

/// What a device demands of the requests that it is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// The size in bytes.
    pub size: u64,
    /// Offsets, lengths and memory are multiples of this (the logical block size).
    pub block: u32,
}

/// Wakes the thread that is in [`Storage::wait`], from any thread.
pub type Waker = std::sync::Arc<crate::sys::wake::EventFd>;

/// One open device as a queue of requests.
pub trait Storage: Send {
    /// Size and alignment.
    fn geometry(&self) -> Geometry;

    /// How many requests may be under way at once; [`Storage::submit`] must not be called beyond that.
    fn depth(&self) -> usize;

    /// Queues a request. It need not start before [`Storage::wait`] is called.
    fn submit(&mut self, request: Request);

    /// Starts what is queued, blocks until at least one request completed or the [`Waker`] was used, and
    /// appends what completed. An error here means that the queue itself is broken.
    fn wait(&mut self, done: &mut Vec<Completion>) -> Result<(), IoError>;

    /// What makes a blocked [`Storage::wait`] return.
    fn waker(&self) -> Waker;

    /// Creates a segment of `len` bytes on the shelf that begins with `header`; from now on [`Place::Segment`] means this
    /// one. Its name and its header are durable and its space is reserved when this returns: a write to it does not fail for
    /// want of room. A crash before that leaves none, or one of any length with a part of its header and else nothing.
    /// Nothing is under way on the segment before.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`](std::io::ErrorKind::StorageFull) where there is no room, and then nothing is left
    /// of it; `Unsupported` where there is no shelf.
    fn create_segment(&mut self, name: &str, len: u64, header: &[u8]) -> Result<(), IoError>;
}

/// A directory of segment files. One writer at a time; what is created is created through a [`Storage`].
pub trait Shelf: Send + Sync {
    /// The names of all files there.
    fn list(&self) -> Result<Vec<String>, IoError>;

    /// Opens one for reading.
    fn open(&self, name: &str) -> Result<Box<dyn ReadAt + Send + Sync>, IoError>;

    /// Makes all of one durable, after shortening it to `cut` bytes where that is given.
    fn settle(&self, name: &str, cut: Option<u64>) -> Result<(), IoError>;

    /// Gives one another name, durably.
    fn rename(&self, from: &str, to: &str) -> Result<(), IoError>;

    /// Removes some. Their names are gone for good when this returns; after a crash within it any of them may be back,
    /// whole.
    fn remove(&self, names: &[String]) -> Result<(), IoError>;
}

/// A file that grows at its end, to which other processes append as well, one at a time. What is changed about it is durable
/// where that is said, and else once it was flushed.
pub trait Scroll: Debug + Send {
    /// Waits for the right to change it, which lasts until what is given back is dropped.
    fn lock(&self) -> Result<Box<dyn Any>, IoError>;

    /// All of it, which must not be longer than `limit` bytes; `None` where there is none.
    fn read(&self, limit: u64) -> Result<Option<Vec<u8>>, IoError>;

    /// Whether there is anything of this name beside it.
    fn is_beside(&self, name: &str) -> Result<bool, IoError>;

    /// Puts these bytes in its place, durably: a crash leaves what was there, or them.
    fn replace(&mut self, bytes: &[u8]) -> Result<(), IoError>;

    /// Opens it, cuts it off behind `end`, and makes all of it durable, its name too. Says how many bytes that cut off.
    /// What follows is about the file that is open.
    fn settle(&mut self, end: u64) -> Result<u64, IoError>;

    /// Whether the file that is open has the name still, and ends there.
    fn ends_at(&self, end: u64) -> Result<bool, IoError>;

    /// Writes behind `end`, where it ends.
    fn append(&mut self, end: u64, bytes: &[u8]) -> Result<(), IoError>;

    /// Makes what was written durable.
    fn flush(&mut self) -> Result<(), IoError>;

    /// Cuts it off behind `end`.
    fn cut(&mut self, end: u64) -> Result<(), IoError>;
}
