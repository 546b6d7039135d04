//! A real file or block device as a [`Storage`]: an io_uring, or threads where there is none.
//!
//! Both engines move bytes with one system call an operation. What is common to them is here: short transfers
//! are carried on, zeros are made by the cheapest way that the device takes, and errors say what and where.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::shelf::Directory;
use super::threads::Pool;
use super::{Action, Completion, Geometry, Place, Request, Storage, Waker};
use crate::error::IoError;
use crate::sys::aligned::{Arena, Buffer, PAGE};
use crate::sys::ring::{Done, Op, Ring};
use crate::units::Extent;

/// Which engine to use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineChoice {
    /// io_uring where it works, else threads.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// The pool of threads.
    Threads,
}

impl FromStr for EngineChoice {
    type Err = ParseEngineError;

    fn from_str(text: &str) -> Result<EngineChoice, ParseEngineError> {
        match text {
            "auto" => Ok(EngineChoice::Auto),
            "io-uring" => Ok(EngineChoice::IoUring),
            "threads" => Ok(EngineChoice::Threads),
            _ => Err(ParseEngineError(text.escape_debug().collect())),
        }
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            EngineChoice::Auto => "auto",
            EngineChoice::IoUring => "io-uring",
            EngineChoice::Threads => "threads",
        })
    }
}

/// Why a text is no engine.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no engine: use auto, io-uring or threads")]
pub struct ParseEngineError(String);

/// The engine that runs, and why it was chosen.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Engine {
    /// `io-uring` or `threads`.
    pub name: String,
    /// In words: `asked for`, or what is missing.
    pub why: String,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.why)
    }
}

/// What an io_uring would say on this machine: opens one and does nothing with it.
pub fn probe(choice: EngineChoice) -> Result<Engine, IoError> {
    let null = File::open("/dev/null").map_err(|error| IoError::new("open", "/dev/null", error))?;
    let arena = Arena::new(PAGE).map_err(|error| IoError::new("map", "memory", error))?;
    Queue::open(null, choice, 1, &arena).map(|(_, engine)| engine)
}

#[derive(Debug)]
enum Queue {
    Ring(Box<Ring>),
    Threads(Pool),
}

impl Queue {
    fn open(
        file: File,
        choice: EngineChoice,
        depth: usize,
        arena: &Arena,
    ) -> Result<(Queue, Engine), IoError> {
        let engine = |name: &str, why: String| Engine { name: name.to_owned(), why };
        let threads = |file, why| -> Result<(Queue, Engine), IoError> {
            let pool = Pool::new(file).map_err(|error| IoError::new("start", "threads engine", error))?;
            Ok((Queue::Threads(pool), engine("threads", why)))
        };
        if choice == EngineChoice::Threads {
            return threads(file, "asked for".to_owned());
        }
        let spare = file.try_clone().map_err(|error| IoError::new("duplicate", "descriptor", error))?;
        match Ring::new(file, depth, arena) {
            Ok(ring) => {
                let why = match ring.has_registered_buffers() {
                    true => "works here".to_owned(),
                    false => "works here, without registered buffers: raise RLIMIT_MEMLOCK".to_owned(),
                };
                Ok((Queue::Ring(Box::new(ring)), engine("io-uring", why)))
            }
            Err(error) if choice == EngineChoice::IoUring => Err(IoError::new("set up", "io_uring", error)),
            Err(error) => threads(spare, reason(&error)),
        }
    }

    fn push(&mut self, tag: u64, file: usize, op: Op) {
        match self {
            Queue::Ring(ring) => ring.push(tag, file, op),
            Queue::Threads(pool) => pool.push(tag, file, op),
        }
    }

    fn set_second(&mut self, file: File) -> io::Result<()> {
        match self {
            Queue::Ring(ring) => ring.set_second(file),
            Queue::Threads(pool) => {
                pool.set_second(file);
                Ok(())
            }
        }
    }

    fn wait(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        match self {
            Queue::Ring(ring) => ring.wait(done),
            Queue::Threads(pool) => pool.wait(done),
        }
    }

    fn waker(&self) -> Waker {
        match self {
            Queue::Ring(ring) => ring.waker(),
            Queue::Threads(pool) => pool.waker(),
        }
    }
}

/// Why there is no io_uring, with the switch where it is one.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            let switch = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            match switch.as_deref().map(str::trim) {
                Ok(value @ ("1" | "2")) => {
                    format!("io_uring is forbidden: kernel.io_uring_disabled = {value}")
                }
                _ => "io_uring is forbidden by a seccomp filter or a security module".to_owned(),
            }
        }
        Some(libc::ENOSYS) => "this kernel has no io_uring".to_owned(),
        _ => format!("no usable io_uring: {error}"),
    }
}

/// How zeros are made; each device starts with the cheapest and goes down where it says no.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ZeroBy {
    /// Discard, where the kernel guarantees zeros afterwards; frees thin and sparse storage.
    PunchHole,
    /// `WRITE ZEROES` offload, or zeros written by the kernel.
    ZeroRange,
    /// Zeros written by us: kernels before 4.9 have no `fallocate` on block devices.
    Write,
}

const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;

/// The longest single `fallocate`: bounds how long a flush waits behind one.
const ZERO_STEP: u64 = 64 << 20;

/// How long until what the kernel had no room for is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// How much is zeroed by one write.
const ZERO_WRITE: usize = 256 << 10;

#[derive(Debug)]
enum Pending {
    Transfer { file: usize },
    Zero { whole: Extent, at: u64 },
}

/// A file or block device that does I/O through one of the engines.
#[derive(Debug)]
pub struct Device {
    queue: Queue,
    name: String,
    geometry: Geometry,
    depth: usize,
    pending: HashMap<u64, Pending>,
    zero_by: ZeroBy,
    /// The zeros that are written where the device has no better way; `None` while they are under way.
    zeros: Option<Buffer>,
    /// Zero requests that wait for `zeros` to come back.
    zero_queue: VecDeque<u64>,
    done: Vec<Done>,
    /// Where its segments lie, and the name of the newest.
    shelf: Option<Directory>,
    segment: String,
}

/// The queue's numbers for the files.
const DISK: usize = 0;
const SEGMENT: usize = 1;

impl Device {
    /// Takes an open file. `name` is what errors call it. Buffers from `arena` are the fast ones.
    pub fn new(
        file: File,
        name: impl Into<String>,
        geometry: Geometry,
        choice: EngineChoice,
        depth: usize,
        arena: &Arena,
    ) -> Result<(Device, Engine), IoError> {
        let name = name.into();
        let (queue, engine) = Queue::open(file, choice, depth, arena)?;
        let zeros = Arena::new(ZERO_WRITE)
            .map(|arena| arena.alloc_blocking(ZERO_WRITE))
            .map_err(|error| IoError::new("map", "memory", error))?;
        let device = Device {
            queue,
            name,
            geometry,
            depth,
            pending: HashMap::new(),
            zero_by: ZeroBy::PunchHole,
            zeros: Some(zeros),
            zero_queue: VecDeque::new(),
            done: Vec::new(),
            shelf: None,
            segment: String::new(),
        };
        Ok((device, engine))
    }

    /// Lets its segments be created in this directory.
    pub fn with_shelf(self, shelf: Directory) -> Device {
        Device { shelf: Some(shelf), ..self }
    }

    /// What errors call the file.
    fn name(&self, file: usize) -> &str {
        if file == SEGMENT { &self.segment } else { &self.name }
    }

    /// Takes the next step of a zero request.
    fn zero(&mut self, tag: u64, whole: Extent, at: u64) {
        let left = whole.end() - at;
        let mode = match self.zero_by {
            ZeroBy::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | KEEP_SIZE,
            ZeroBy::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | KEEP_SIZE,
            ZeroBy::Write => {
                match self.zeros.take() {
                    Some(mut buffer) => {
                        buffer.set_len(usize::try_from(left).unwrap_or(usize::MAX).min(ZERO_WRITE));
                        self.queue.push(tag, DISK, Op::Write { offset: at, buffer, skip: 0 });
                    }
                    None => self.zero_queue.push_back(tag),
                }
                return;
            }
        };
        self.queue.push(tag, DISK, Op::Fallocate { mode, offset: at, len: left.min(ZERO_STEP) });
    }

    /// Continues or ends the request that an operation belonged to.
    fn advance(&mut self, done: Done, completions: &mut Vec<Completion>) {
        let Done { tag, op, result } = done;
        match self.pending.remove(&tag).expect("every operation belongs to a request") {
            Pending::Transfer { file } => {
                if let Some(completion) = self.advance_transfer(tag, file, op, result) {
                    completions.push(completion);
                }
            }
            Pending::Zero { whole, at } => {
                if let Some(result) = self.advance_zero(tag, op, result, whole, at) {
                    completions.push(Completion { tag, buffer: None, result });
                }
            }
        }
    }

    fn advance_transfer(
        &mut self,
        tag: u64,
        file: usize,
        mut op: Op,
        result: io::Result<u32>,
    ) -> Option<Completion> {
        let (verb, at, skip, len) = match &mut op {
            Op::Read { offset, buffer, skip } => ("read", offset, skip, buffer.len()),
            Op::Write { offset, buffer, skip } => ("write", offset, skip, buffer.len()),
            Op::Sync | Op::Fallocate { .. } => {
                let result = result.map(drop).map_err(|error| IoError::new("flush", self.name(file), error));
                return Some(Completion { tag, buffer: None, result });
            }
        };
        let result = match result {
            // Interrupted before anything moved.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                // Not in a tight circle, where a device has no room for a while.
                std::thread::sleep(RETRY);
                Ok(0)
            }
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            other => other,
        };
        match result {
            Ok(moved) => {
                *skip += moved as usize;
                *at += u64::from(moved);
                if *skip < len {
                    self.pending.insert(tag, Pending::Transfer { file });
                    self.queue.push(tag, file, op);
                    return None;
                }
                Some(Completion { tag, buffer: op.into_buffer(), result: Ok(()) })
            }
            Err(error) => {
                let result = Err(IoError::at(verb, self.name(file), *at, error));
                Some(Completion { tag, buffer: op.into_buffer(), result })
            }
        }
    }

    fn advance_zero(
        &mut self,
        tag: u64,
        op: Op,
        result: io::Result<u32>,
        whole: Extent,
        at: u64,
    ) -> Option<Result<(), IoError>> {
        let tried = match &op {
            Op::Fallocate { mode, .. } if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 => ZeroBy::PunchHole,
            Op::Fallocate { .. } => ZeroBy::ZeroRange,
            _ => ZeroBy::Write,
        };
        let by_write = tried == ZeroBy::Write;
        let moved = match &op {
            Op::Fallocate { len, .. } => *len,
            _ => u64::from(*result.as_ref().unwrap_or(&0)),
        };
        if let Some(buffer) = op.into_buffer() {
            self.zeros = Some(buffer);
            if let Some(next) = self.zero_queue.pop_front()
                && let Some(&Pending::Zero { whole, at }) = self.pending.get(&next)
            {
                self.zero(next, whole, at);
            }
        }
        let at = match result {
            Ok(0) if by_write => {
                return Some(Err(IoError::at("write zeros to", &*self.name, at, io::ErrorKind::WriteZero)));
            }
            Ok(_) => at + moved,
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => at,
                // The device does not take this way of making zeros: the next one from now on.
                Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENODEV | libc::ENOSYS) if !by_write => {
                    // Several may be under way: only a refusal of the present way leads to the next.
                    self.zero_by = match (self.zero_by, tried) {
                        (ZeroBy::PunchHole, _) => ZeroBy::ZeroRange,
                        (ZeroBy::ZeroRange, ZeroBy::ZeroRange) => ZeroBy::Write,
                        (now, _) => now,
                    };
                    at
                }
                _ => return Some(Err(IoError::at("zero", &*self.name, at, error))),
            },
        };
        if at == whole.end() {
            return Some(Ok(()));
        }
        self.pending.insert(tag, Pending::Zero { whole, at });
        self.zero(tag, whole, at);
        None
    }
}

impl Storage for Device {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn submit(&mut self, request: Request) {
        let Request { tag, place, action } = request;
        let file = match place {
            Place::Disk => DISK,
            Place::Segment => SEGMENT,
        };
        let op = match action {
            Action::Read { offset, buffer } => Op::Read { offset, buffer, skip: 0 },
            Action::Write { offset, buffer } => Op::Write { offset, buffer, skip: 0 },
            Action::Flush => Op::Sync,
            Action::Zero(whole) => {
                assert_eq!(place, Place::Disk, "segments are written, never zeroed");
                self.pending.insert(tag, Pending::Zero { whole, at: whole.offset() });
                return self.zero(tag, whole, whole.offset());
            }
        };
        self.pending.insert(tag, Pending::Transfer { file });
        self.queue.push(tag, file, op);
    }

    fn wait(&mut self, completions: &mut Vec<Completion>) -> Result<(), IoError> {
        let mut done = std::mem::take(&mut self.done);
        self.queue.wait(&mut done).map_err(|error| IoError::new("wait for", &*self.name, error))?;
        for one in done.drain(..) {
            self.advance(one, completions);
        }
        self.done = done;
        Ok(())
    }

    fn waker(&self) -> Waker {
        self.queue.waker()
    }

    fn create_segment(&mut self, name: &str, len: u64, header: &[u8]) -> Result<(), IoError> {
        let failed = |error| IoError::new("create", name, error);
        let shelf = self.shelf.as_ref().ok_or_else(|| failed(io::ErrorKind::Unsupported.into()))?;
        let (file, path) = shelf.create(name, len, header)?;
        self.queue.set_second(file).map_err(failed)?;
        self.segment = path;
        Ok(())
    }
}
