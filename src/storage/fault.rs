//! A disk in memory that keeps a record of what it was told, and fails where it was asked to: the one
//! fault-injecting backend, for tests.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Action, Completion, Geometry, Request, Storage, Waker};
use crate::error::IoError;
use crate::sys::wake::EventFd;
use crate::units::Extent;

/// What happened to a disk, in the order in which it completed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Bytes were written; not durable before the next [`Event::Flush`].
    Write {
        /// Where.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// A range was zeroed; durable like a write.
    Zero(Extent),
    /// Everything before this is durable.
    Flush,
}

/// The disk itself, which outlives the [`Storage`]s opened on it as a real one does.
#[derive(Clone, Debug)]
pub struct FaultDisk(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    geometry: Geometry,
    /// What a read returns now.
    bytes: Vec<u8>,
    initial: Vec<u8>,
    log: Vec<Event>,
    seen: usize,
    fail: Option<(usize, i32)>,
}

impl FaultDisk {
    /// A disk with this content. Its length is a multiple of `block`.
    pub fn new(bytes: Vec<u8>, block: u32) -> FaultDisk {
        assert!(bytes.len().is_multiple_of(block as usize));
        let geometry = Geometry { size: bytes.len() as u64, block };
        let initial = bytes.clone();
        FaultDisk(Arc::new(Mutex::new(State {
            geometry,
            bytes,
            initial,
            log: Vec::new(),
            seen: 0,
            fail: None,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the `n`th request from now (0 is the next) fail with `errno`, and none after it.
    pub fn fail_nth(&self, n: usize, errno: i32) {
        let mut state = self.state();
        state.fail = Some((state.seen + n, errno));
    }

    /// What a read of the whole disk would return now.
    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// What happened so far.
    pub fn log(&self) -> Vec<Event> {
        self.state().log.clone()
    }

    /// What a power cut after the first `events` of the log leaves: everything up to the last flush, and of
    /// the rest the sectors for which `keep` says so. Its arguments are the event's index and the sector's
    /// index within the event, so that writes can be dropped, kept, reordered and torn.
    pub fn after_power_cut(&self, events: usize, mut keep: impl FnMut(usize, usize) -> bool) -> Vec<u8> {
        let state = self.state();
        let block = state.geometry.block as usize;
        let log = &state.log[..events];
        let flushed = log.iter().rposition(|event| *event == Event::Flush).unwrap_or(0);
        let mut image = state.initial.clone();
        for (index, event) in log.iter().enumerate() {
            let (offset, bytes) = match event {
                Event::Write { offset, bytes } => (*offset as usize, bytes.clone()),
                Event::Zero(extent) => (extent.offset() as usize, vec![0; extent.len() as usize]),
                Event::Flush => continue,
            };
            for (sector, content) in bytes.chunks(block).enumerate() {
                if index < flushed || keep(index, sector) {
                    let at = offset + sector * block;
                    image[at..at + content.len()].copy_from_slice(content);
                }
            }
        }
        image
    }

    /// Opens it.
    pub fn open(&self) -> io::Result<FaultStorage> {
        Ok(FaultStorage { disk: self.clone(), queued: VecDeque::new(), wake: Arc::new(EventFd::new()?) })
    }
}

/// An open [`FaultDisk`]. Requests complete in [`Storage::wait`], the last submitted first, so that code which
/// counts on an order is found out.
#[derive(Debug)]
pub struct FaultStorage {
    disk: FaultDisk,
    queued: VecDeque<Request>,
    wake: Waker,
}

impl FaultStorage {
    fn perform(&self, action: &mut Action) -> Result<(), IoError> {
        let mut state = self.disk.state();
        let request = state.seen;
        state.seen += 1;
        let failure = match state.fail {
            Some((at, errno)) if at == request => Some(io::Error::from_raw_os_error(errno)),
            _ => None,
        };
        let name = "fault disk";
        let range = |offset: u64, len: usize| {
            let (start, end) = (offset as usize, offset as usize + len);
            assert!(offset.is_multiple_of(u64::from(state.geometry.block)), "unaligned offset {offset}");
            assert!(len.is_multiple_of(state.geometry.block as usize), "unaligned length {len}");
            (end <= state.bytes.len()).then_some(start..end).ok_or(io::ErrorKind::InvalidInput)
        };
        match action {
            Action::Read { offset, buffer } => {
                let fail = |error| IoError::at("read", name, *offset, error);
                if let Some(error) = failure {
                    return Err(fail(error));
                }
                let range = range(*offset, buffer.len()).map_err(|kind| fail(kind.into()))?;
                buffer.copy_from_slice(&state.bytes[range]);
            }
            Action::Write { offset, buffer } => {
                let fail = |error| IoError::at("write", name, *offset, error);
                if let Some(error) = failure {
                    return Err(fail(error));
                }
                let range = range(*offset, buffer.len()).map_err(|kind| fail(kind.into()))?;
                state.bytes[range].copy_from_slice(buffer);
                state.log.push(Event::Write { offset: *offset, bytes: buffer.to_vec() });
            }
            Action::Zero(extent) => {
                let fail = |error| IoError::at("zero", name, extent.offset(), error);
                if let Some(error) = failure {
                    return Err(fail(error));
                }
                let range =
                    range(extent.offset(), extent.len() as usize).map_err(|kind| fail(kind.into()))?;
                state.bytes[range].fill(0);
                state.log.push(Event::Zero(*extent));
            }
            Action::Flush => match failure {
                Some(error) => return Err(IoError::new("flush", name, error)),
                None => state.log.push(Event::Flush),
            },
        }
        Ok(())
    }
}

impl Storage for FaultStorage {
    fn geometry(&self) -> Geometry {
        self.disk.state().geometry
    }

    fn depth(&self) -> usize {
        8
    }

    fn submit(&mut self, request: Request) {
        assert!(self.queued.len() < self.depth());
        self.queued.push_back(request);
    }

    fn wait(&mut self, done: &mut Vec<Completion>) -> Result<(), IoError> {
        let Some(Request { tag, mut action }) = self.queued.pop_back() else {
            let fd = std::os::fd::AsFd::as_fd(&*self.wake);
            let mut polled = [nix::poll::PollFd::new(fd, nix::poll::PollFlags::POLLIN)];
            nix::poll::poll(&mut polled, nix::poll::PollTimeout::NONE)
                .map_err(|errno| IoError::new("poll", "eventfd", errno))?;
            self.wake.clear();
            return Ok(());
        };
        let result = self.perform(&mut action);
        let buffer = match action {
            Action::Read { buffer, .. } | Action::Write { buffer, .. } => Some(buffer),
            Action::Zero(_) | Action::Flush => None,
        };
        done.push(Completion { tag, buffer, result });
        Ok(())
    }

    fn waker(&self) -> Waker {
        self.wake.clone()
    }
}
