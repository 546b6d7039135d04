//! One io_uring for the open files of one volume, behind a safe interface.
//!
//! The ring owns the buffer of every request until its completion was seen, and its drop waits for those still
//! under way; where even that fails it leaks them, since the kernel may go on writing to freed memory's pages
//! otherwise.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};

use super::aligned::{Arena, Buffer, as_iovec};
use super::wake::EventFd;

/// How many files one ring serves.
pub const FILES: usize = 2;

/// One system call's worth of work on one of the ring's files.
#[derive(Debug)]
pub enum Op {
    /// Read into `buffer[skip..]` from `offset` on.
    Read {
        /// Byte offset in the file, where `buffer[skip]` goes.
        offset: u64,
        /// The memory.
        buffer: Buffer,
        /// How much of the buffer was filled by earlier, short reads.
        skip: usize,
    },
    /// Write `buffer[skip..]` at `offset`.
    Write {
        /// Byte offset in the file, where `buffer[skip]` goes.
        offset: u64,
        /// The memory.
        buffer: Buffer,
        /// How much of the buffer was written by earlier, short writes.
        skip: usize,
    },
    /// `fallocate(mode, offset, len)`.
    Fallocate {
        /// `FALLOC_FL_…`.
        mode: i32,
        /// Byte offset in the file.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// `fdatasync`.
    Sync,
}

impl Op {
    /// The buffer, if the operation has one.
    pub fn into_buffer(self) -> Option<Buffer> {
        match self {
            Op::Read { buffer, .. } | Op::Write { buffer, .. } => Some(buffer),
            Op::Fallocate { .. } | Op::Sync => None,
        }
    }
}

/// A finished operation.
#[derive(Debug)]
pub struct Done {
    /// What the submitter called it.
    pub tag: u64,
    /// The operation as it was submitted, with its buffer.
    pub op: Op,
    /// What the system call returned: bytes moved, or the errno.
    pub result: io::Result<u32>,
}

/// An io_uring bound to a file, and to a second one that may be exchanged.
pub struct Ring {
    ring: IoUring,
    files: [Option<File>; FILES],
    wake: Arc<EventFd>,
    /// Whether a poll of `wake` is under way.
    listening: bool,
    /// What is under way; the index is the completion's `user_data`.
    slots: Vec<Option<(u64, Op)>>,
    free: Vec<usize>,
    /// The arena whose memory is registered, as buffer 0.
    registered: Option<Arena>,
}

/// `user_data` of the poll of the eventfd; slots are far fewer.
const WAKE: u64 = u64::MAX;

const NEEDED: [(u8, &str); 8] = [
    (opcode::Read::CODE, "READ"),
    (opcode::Write::CODE, "WRITE"),
    (opcode::ReadFixed::CODE, "READ_FIXED"),
    (opcode::WriteFixed::CODE, "WRITE_FIXED"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
    (opcode::PollAdd::CODE, "POLL_ADD"),
    (opcode::Nop::CODE, "NOP"),
];

impl Ring {
    /// A ring on which `depth` operations can be under way. The memory of `arena` is registered with it where
    /// the limit on locked memory allows; buffers from elsewhere work too, a little slower.
    ///
    /// Errors: `EPERM` where `kernel.io_uring_disabled` or a seccomp filter forbids it, `ENOSYS` where the
    /// kernel has none, `Unsupported` with the operation's name where it is too old.
    pub fn new(file: File, depth: usize, arena: &Arena) -> io::Result<Ring> {
        // One entry more for the poll of the eventfd: the submission queue is never full.
        let entries = u32::try_from(depth + 1).map_err(|_| io::ErrorKind::InvalidInput)?.next_power_of_two();
        let ring = match IoUring::builder().setup_coop_taskrun().build(entries) {
            // Before 5.19 the flag is unknown.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries)?,
            other => other?,
        };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if let Some((_, name)) = NEEDED.iter().find(|(code, _)| !probe.is_supported(*code)) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("the kernel's io_uring has no {name}"),
            ));
        }
        // -1 keeps a place for the second one.
        ring.submitter().register_files(&[file.as_raw_fd(), -1])?;
        // SAFETY: the arena's mapping outlives the registration: the ring holds a handle to it, and drops it
        // after the `IoUring` (field order), whose drop ends the registration.
        let registered = match unsafe { ring.submitter().register_buffers(&[as_iovec(arena)]) } {
            Ok(()) => Some(arena.clone()),
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => None,
            Err(error) => return Err(error),
        };
        let wake = Arc::new(EventFd::new()?);
        let (slots, free) = ((0..depth).map(|_| None).collect(), (0..depth).collect());
        Ok(Ring { ring, files: [Some(file), None], wake, listening: false, slots, free, registered })
    }

    /// Whether the arena's memory could be registered.
    pub fn has_registered_buffers(&self) -> bool {
        self.registered.is_some()
    }

    /// Makes a blocked [`wait`](Self::wait) return.
    pub fn waker(&self) -> Arc<EventFd> {
        self.wake.clone()
    }

    /// How many operations are under way or queued.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Puts `file` in place of the second file. Operations on the one before go on with it until they complete.
    pub fn set_second(&mut self, file: File) -> io::Result<()> {
        self.ring.submitter().register_files_update(1, &[file.as_raw_fd()])?;
        self.files[1] = Some(file);
        Ok(())
    }

    /// Queues an operation on the first (0) or second (1) file; [`wait`](Self::wait) starts it.
    ///
    /// # Panics
    /// Where more than `depth` operations would be under way.
    pub fn push(&mut self, tag: u64, file: usize, mut op: Op) {
        let slot = self.free.pop().expect("more operations than the ring's depth");
        let entry = self.entry(file, &mut op).user_data(slot as u64);
        self.slots[slot] = Some((tag, op));
        // SAFETY: the memory that the entry points to belongs to `op`, which stays in its slot until the
        // completion was seen (or is leaked); buffers do not move when their owner does.
        unsafe { self.enqueue(&entry) };
    }

    /// # Safety
    /// What the entry points to stays valid until its completion.
    unsafe fn enqueue(&mut self, entry: &squeue::Entry) {
        // SAFETY: passed on to the caller.
        let pushed = unsafe { self.ring.submission().push(entry) };
        assert!(pushed.is_ok(), "the submission queue holds depth + 1 entries");
    }

    fn entry(&self, file: usize, op: &mut Op) -> squeue::Entry {
        debug_assert!(self.files[file].is_some());
        let file = types::Fixed(file as u32);
        let length = |buffer: &[u8]| u32::try_from(buffer.len()).unwrap_or(!4095);
        match op {
            Op::Read { offset, buffer, skip } => {
                let fixed = self.registered.as_ref().is_some_and(|arena| buffer.is_from(arena));
                let into = &mut buffer[*skip..];
                let (at, len) = (into.as_mut_ptr(), length(into));
                if fixed {
                    opcode::ReadFixed::new(file, at, len, 0).offset(*offset).build()
                } else {
                    opcode::Read::new(file, at, len).offset(*offset).build()
                }
            }
            Op::Write { offset, buffer, skip } => {
                let fixed = self.registered.as_ref().is_some_and(|arena| buffer.is_from(arena));
                let from = &buffer[*skip..];
                let (at, len) = (from.as_ptr(), length(from));
                if fixed {
                    opcode::WriteFixed::new(file, at, len, 0).offset(*offset).build()
                } else {
                    opcode::Write::new(file, at, len).offset(*offset).build()
                }
            }
            Op::Fallocate { mode, offset, len } => {
                opcode::Fallocate::new(file, *len).offset(*offset).mode(*mode).build()
            }
            Op::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

    /// Starts what is queued, sleeps until something completed or the waker was used, and appends what
    /// completed. An error means that the ring is broken.
    pub fn wait(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        if !self.listening {
            let fd = types::Fd(self.wake.as_fd().as_raw_fd());
            let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(WAKE);
            // SAFETY: a poll points to no memory; the descriptor lives as long as the ring.
            unsafe { self.enqueue(&poll) };
            self.listening = true;
        }
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => break,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The kernel is short of memory for requests: what runs already will free some.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    if !self.ring.completion().is_empty() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error),
            }
        }
        self.reap(done);
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        let completed: Vec<cqueue::Entry> = self.ring.completion().collect();
        for entry in completed {
            if entry.user_data() == WAKE {
                self.listening = false;
                self.wake.clear();
                continue;
            }
            let slot = entry.user_data() as usize;
            let (tag, op) =
                self.slots[slot].take().expect("a completion names the slot of what was submitted");
            self.free.push(slot);
            let result = match entry.result() {
                errno if errno < 0 => Err(io::Error::from_raw_os_error(-errno)),
                moved => Ok(moved as u32),
            };
            done.push(Done { tag, op, result });
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight() > 0 {
            if self.wait(&mut done).is_err() {
                // The kernel may still use these buffers: nobody else ever may.
                self.slots.drain(..).for_each(std::mem::forget);
                return;
            }
        }
        // The kernel lets go of what is registered a while after the ring is closed: who opens the device next, exclusively,
        // would find it in use.
        self.ring.submitter().unregister_files().ok();
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("files", &self.files).field("in_flight", &self.in_flight()).finish()
    }
}
