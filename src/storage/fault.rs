//! A disk and a shelf in memory that keep a record of what they were told, and fail where they were asked to: the one
//! fault-injecting backend, for tests.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Action, Completion, Geometry, Place, ReadAt, Request, Scroll, Shelf, Storage, Waker};
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
    /// Everything before this is durable on the disk.
    Flush,
    /// A segment was created, durably, of so many zeros.
    Create(String, u64),
    /// Bytes were written to a segment.
    WriteSegment {
        /// Which.
        name: String,
        /// Where in it.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Everything before this is durable in the segment.
    FlushSegment(String),
    /// A segment was made durable, and shortened if a length is given.
    Settle(String, Option<u64>),
    /// A segment was given another name.
    Rename(String, String),
    /// A segment was removed.
    Remove(String),
    /// A segment with this content took the place of what had its name, durably.
    Replace(String, Vec<u8>),
    /// A segment was shortened; durable like a write.
    Cut(String, u64),
    /// The test made a note of this moment.
    Mark(u64),
}

/// What lies on a disk and its shelf.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Content {
    /// The disk.
    pub disk: Vec<u8>,
    /// The segments, by name.
    pub segments: BTreeMap<String, Arc<Vec<u8>>>,
}

/// The disk itself, which outlives the [`Storage`]s opened on it as a real one does.
#[derive(Clone, Debug)]
pub struct FaultDisk(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    geometry: Geometry,
    /// What a read returns now.
    now: Content,
    initial: Content,
    /// Each with the moment of its completion.
    log: Vec<(u64, Event)>,
    /// The next moment, for all that have one order.
    clock: Arc<AtomicU64>,
    seen: usize,
    fail: Option<(usize, i32)>,
    /// How many bytes of segments there is room for.
    room: u64,
}

impl FaultDisk {
    /// A disk with this content and an empty shelf. Its length is a multiple of `block`.
    pub fn new(bytes: Vec<u8>, block: u32) -> FaultDisk {
        FaultDisk::with(Content { disk: bytes, segments: BTreeMap::new() }, block)
    }

    /// A disk and a shelf with this content.
    pub fn with(content: Content, block: u32) -> FaultDisk {
        assert!(content.disk.len().is_multiple_of(block as usize));
        let geometry = Geometry { size: content.disk.len() as u64, block };
        FaultDisk(Arc::new(Mutex::new(State {
            geometry,
            now: content.clone(),
            initial: content,
            log: Vec::new(),
            clock: Arc::default(),
            seen: 0,
            fail: None,
            room: u64::MAX,
        })))
    }

    /// Gives all that happens to this disk and to `other` from now on one order, which [`Replay::moment`] tells.
    pub fn beside(self, other: &FaultDisk) -> FaultDisk {
        let clock = other.state().clock.clone();
        self.state().clock = clock;
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the `n`th request from now (0 is the next) fail with `errno`, and none after it.
    pub fn fail_nth(&self, n: usize, errno: i32) {
        let mut state = self.state();
        state.fail = Some((state.seen + n, errno));
    }

    /// Lets no further request fail, and says whether the failure was still to come.
    pub fn heal(&self) -> bool {
        let mut state = self.state();
        let seen = state.seen;
        state.fail.take().is_some_and(|(at, _)| at >= seen)
    }

    /// Leaves room on the shelf for so many bytes of segments, those that are there included.
    pub fn limit_room(&self, bytes: u64) {
        self.state().room = bytes;
    }

    /// Writes a mark into the log.
    pub fn mark(&self, number: u64) {
        self.state().note(Event::Mark(number));
    }

    /// What a read of the whole disk would return now.
    pub fn bytes(&self) -> Vec<u8> {
        self.state().now.disk.clone()
    }

    /// What lies on the disk and the shelf now.
    pub fn content(&self) -> Content {
        self.state().now.clone()
    }

    /// What happened so far.
    pub fn log(&self) -> Vec<Event> {
        self.state().log.iter().map(|(_, event)| event.clone()).collect()
    }

    /// What a power cut after the first `events` of the log leaves: see [`Replay::cut`].
    pub fn after_power_cut(&self, events: usize, keep: impl FnMut(usize, usize) -> bool) -> Content {
        let mut replay = self.replay();
        for _ in 0..events {
            replay.step();
        }
        replay.cut(keep)
    }

    /// Its log from the beginning, for going through event by event.
    pub fn replay(&self) -> Replay {
        let state = self.state();
        let (block, log) = (state.geometry.block as usize, state.log.clone().into());
        Replay { block, log, next: 0, durable: state.initial.clone(), pending: Vec::new() }
    }

    /// A file on its shelf that grows at its end.
    pub fn scroll(&self, name: &str) -> FaultScroll {
        FaultScroll { disk: self.clone(), name: name.to_owned() }
    }

    /// Its shelf.
    pub fn shelf(&self) -> FaultShelf {
        FaultShelf(self.clone())
    }

    /// Opens it.
    pub fn open(&self) -> io::Result<FaultStorage> {
        let wake = Arc::new(EventFd::new()?);
        Ok(FaultStorage { disk: self.clone(), queued: VecDeque::new(), wake, segment: None })
    }
}

impl State {
    fn note(&mut self, event: Event) {
        self.log.push((self.clock.fetch_add(1, Ordering::Relaxed), event));
    }

    /// Counts a request, and says whether it is the one that fails.
    fn fails(&mut self) -> io::Result<()> {
        self.seen += 1;
        match self.fail {
            Some((at, errno)) if at + 1 == self.seen => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }
}

/// The log of a [`FaultDisk`], gone through up to some event.
#[derive(Clone, Debug)]
pub struct Replay {
    block: usize,
    log: Arc<[(u64, Event)]>,
    next: usize,
    /// What is certain.
    durable: Content,
    /// The events since then whose file was not flushed.
    pending: Vec<usize>,
}

impl Replay {
    /// When what it goes to next happened, of all that has one order with it.
    pub fn moment(&self) -> Option<u64> {
        self.log.get(self.next).map(|(moment, _)| *moment)
    }

    /// Goes one event further, and says which that was.
    pub fn step(&mut self) -> Option<&Event> {
        let log = self.log.clone();
        let (_, event) = log.get(self.next)?;
        match event {
            Event::Write { .. } | Event::Zero(_) | Event::WriteSegment { .. } | Event::Cut(..) => {
                self.pending.push(self.next);
            }
            Event::Flush => self.settle(None, true),
            Event::FlushSegment(name) => self.settle(Some(name), true),
            Event::Create(name, len) => {
                self.durable.segments.insert(name.clone(), vec![0; *len as usize].into());
            }
            Event::Settle(name, cut) => {
                self.settle(Some(name), true);
                if let (Some(len), Some(segment)) = (cut, self.durable.segments.get_mut(name)) {
                    Arc::make_mut(segment).truncate(*len as usize);
                }
            }
            Event::Rename(from, to) => {
                self.settle(Some(from), false);
                if let Some(segment) = self.durable.segments.remove(from) {
                    self.durable.segments.insert(to.clone(), segment);
                }
            }
            Event::Remove(name) => {
                self.settle(Some(name), false);
                self.durable.segments.remove(name);
            }
            Event::Replace(name, bytes) => {
                self.settle(Some(name), false);
                self.durable.segments.insert(name.clone(), bytes.clone().into());
            }
            Event::Mark(_) => {}
        }
        self.next += 1;
        self.log.get(self.next - 1).map(|(_, event)| event)
    }

    /// Carries out what is pending for a file, or forgets it.
    fn settle(&mut self, segment: Option<&str>, apply: bool) {
        let (log, block) = (self.log.clone(), self.block);
        let durable = &mut self.durable;
        self.pending.retain(|index| {
            let (_, event) = &log[*index];
            let of = match event {
                Event::WriteSegment { name, .. } | Event::Cut(name, _) => Some(name.as_str()),
                _ => None,
            };
            if of != segment {
                return true;
            }
            if apply {
                put(durable, event, block, |_| true);
            }
            false
        });
    }

    /// What a power cut at this moment leaves: everything up to the last flush of each file, and of the rest the sectors
    /// for which `keep` says so. Its arguments are the event's index and the sector's index within the event, so that
    /// writes can be dropped, kept, reordered and torn.
    pub fn cut(&self, mut keep: impl FnMut(usize, usize) -> bool) -> Content {
        let mut content = self.durable.clone();
        for index in &self.pending {
            put(&mut content, &self.log[*index].1, self.block, |sector| keep(*index, sector));
        }
        content
    }

    /// Whether anything is uncertain at this moment.
    pub fn is_certain(&self) -> bool {
        self.pending.is_empty()
    }
}

fn put(content: &mut Content, event: &Event, block: usize, mut keep: impl FnMut(usize) -> bool) {
    let zeros;
    let (image, offset, bytes): (&mut Vec<u8>, u64, &[u8]) = match event {
        Event::Write { offset, bytes } => (&mut content.disk, *offset, bytes),
        Event::Zero(extent) => {
            zeros = vec![0; extent.len() as usize];
            (&mut content.disk, extent.offset(), &zeros)
        }
        Event::WriteSegment { name, offset, bytes } => match content.segments.get_mut(name) {
            Some(segment) => (Arc::make_mut(segment), *offset, bytes),
            None => return,
        },
        Event::Cut(name, len) => {
            if let Some(segment) = content.segments.get_mut(name)
                && keep(0)
            {
                Arc::make_mut(segment).truncate(*len as usize);
            }
            return;
        }
        _ => return,
    };
    // Only what grows begins within a sector, and reaches beyond the end; what is missing of it before a later sector is zeros.
    let (mut at, end) = (offset as usize, offset as usize + bytes.len());
    for sector in 0.. {
        let next = (at + 1).next_multiple_of(block).min(end);
        if at == end {
            break;
        }
        if keep(sector) {
            image.resize(image.len().max(next), 0);
            image[at..next].copy_from_slice(&bytes[at - offset as usize..next - offset as usize]);
        }
        at = next;
    }
}

/// An open [`FaultDisk`]. Requests complete in [`Storage::wait`], the last submitted first, so that code which
/// counts on an order is found out.
#[derive(Debug)]
pub struct FaultStorage {
    disk: FaultDisk,
    queued: VecDeque<Request>,
    wake: Waker,
    segment: Option<String>,
}

impl FaultStorage {
    fn perform(&self, place: Place, action: &mut Action) -> Result<(), IoError> {
        let mut state = self.disk.state();
        let state = &mut *state;
        let block = state.geometry.block as usize;
        let segment = match place {
            Place::Disk => None,
            Place::Segment => Some(self.segment.clone().expect("a segment that was created")),
        };
        let (op, offset, len) = match action {
            Action::Read { offset, buffer } => ("read", Some(*offset), buffer.len()),
            Action::Write { offset, buffer } => ("write", Some(*offset), buffer.len()),
            Action::Zero(extent) => ("zero", Some(extent.offset()), extent.len() as usize),
            Action::Flush => ("flush", None, 0),
        };
        let failed = |error: io::Error| IoError { op, target: "fault disk".into(), offset, source: error };
        state.fails().map_err(failed)?;
        let image = match &segment {
            None => &mut state.now.disk,
            Some(name) => {
                Arc::make_mut(state.now.segments.get_mut(name).expect("a segment that was not removed"))
            }
        };
        let start = offset.unwrap_or(0) as usize;
        assert!(
            start.is_multiple_of(block) && len.is_multiple_of(block),
            "unaligned: {len} bytes at {start}"
        );
        let Some(range) = image.get_mut(start..start + len) else {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        };
        let event = match action {
            Action::Read { buffer, .. } => {
                buffer.copy_from_slice(range);
                return Ok(());
            }
            Action::Write { offset, buffer } => {
                range.copy_from_slice(buffer);
                let (offset, bytes) = (*offset, buffer.to_vec());
                match segment {
                    None => Event::Write { offset, bytes },
                    Some(name) => Event::WriteSegment { name, offset, bytes },
                }
            }
            Action::Zero(extent) => {
                range.fill(0);
                Event::Zero(*extent)
            }
            Action::Flush => segment.map_or(Event::Flush, Event::FlushSegment),
        };
        state.note(event);
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
        let Some(Request { tag, place, mut action }) = self.queued.pop_back() else {
            let fd = std::os::fd::AsFd::as_fd(&*self.wake);
            let mut polled = [nix::poll::PollFd::new(fd, nix::poll::PollFlags::POLLIN)];
            nix::poll::poll(&mut polled, nix::poll::PollTimeout::NONE)
                .map_err(|errno| IoError::new("poll", "eventfd", errno))?;
            self.wake.clear();
            return Ok(());
        };
        let result = self.perform(place, &mut action);
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

    fn create_segment(&mut self, name: &str, len: u64, header: &[u8]) -> Result<(), IoError> {
        let mut state = self.disk.state();
        let failed = |error: io::Error| IoError::new("create", name, error);
        state.fails().map_err(failed)?;
        let taken: u64 = state.now.segments.values().map(|segment| segment.len() as u64).sum();
        if taken + len > state.room {
            return Err(failed(io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        let mut segment = vec![0; len as usize];
        segment[..header.len()].copy_from_slice(header);
        let before = state.now.segments.insert(name.to_owned(), segment.into());
        assert!(before.is_none(), "{name} exists");
        let write = Event::WriteSegment { name: name.to_owned(), offset: 0, bytes: header.to_vec() };
        state.note(Event::Create(name.to_owned(), len));
        state.note(write);
        state.note(Event::FlushSegment(name.to_owned()));
        self.segment = Some(name.to_owned());
        Ok(())
    }
}

/// The shelf of a [`FaultDisk`].
#[derive(Clone, Debug)]
pub struct FaultShelf(FaultDisk);

impl Shelf for FaultShelf {
    fn list(&self) -> Result<Vec<String>, IoError> {
        Ok(self.0.state().now.segments.keys().cloned().collect())
    }

    fn open(&self, name: &str) -> Result<Box<dyn ReadAt + Send + Sync>, IoError> {
        match self.0.state().now.segments.get(name) {
            Some(bytes) => Ok(Box::new(Arc::clone(bytes))),
            None => Err(IoError::new("open", name, io::ErrorKind::NotFound)),
        }
    }

    fn settle(&self, name: &str, cut: Option<u64>) -> Result<(), IoError> {
        let mut state = self.0.state();
        match state.now.segments.get_mut(name) {
            Some(segment) => {
                if let Some(len) = cut {
                    Arc::make_mut(segment).truncate(len as usize);
                }
                state.note(Event::Settle(name.to_owned(), cut));
                Ok(())
            }
            None => Err(IoError::new("settle", name, io::ErrorKind::NotFound)),
        }
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), IoError> {
        let mut state = self.0.state();
        match state.now.segments.remove(from) {
            Some(segment) => {
                state.now.segments.insert(to.to_owned(), segment);
                state.note(Event::Rename(from.to_owned(), to.to_owned()));
                Ok(())
            }
            None => Err(IoError::new("rename", from, io::ErrorKind::NotFound)),
        }
    }

    fn remove(&self, names: &[String]) -> Result<(), IoError> {
        let mut state = self.0.state();
        for name in names {
            if state.now.segments.remove(name).is_some() {
                state.note(Event::Remove(name.clone()));
            }
        }
        Ok(())
    }
}

/// A file on the shelf of a [`FaultDisk`] that grows at its end. Nobody else changes it.
#[derive(Debug)]
pub struct FaultScroll {
    disk: FaultDisk,
    name: String,
}

impl FaultScroll {
    /// Carries out a request that changes the file, and says what it is.
    fn change(
        &self,
        op: &'static str,
        at: Option<u64>,
        change: impl FnOnce(&mut Vec<u8>, String) -> Event,
    ) -> Result<(), IoError> {
        let mut state = self.disk.state();
        let failed = |source| IoError { op, target: self.name.clone(), offset: at, source };
        state.fails().map_err(failed)?;
        let Some(file) = state.now.segments.get_mut(&self.name) else {
            return Err(failed(io::ErrorKind::NotFound.into()));
        };
        let event = change(Arc::make_mut(file), self.name.clone());
        state.note(event);
        Ok(())
    }
}

impl Scroll for FaultScroll {
    fn lock(&self) -> Result<Box<dyn Any>, IoError> {
        Ok(Box::new(()))
    }

    fn read(&self, limit: u64) -> Result<Option<Vec<u8>>, IoError> {
        let state = self.disk.state();
        let file = state.now.segments.get(&self.name);
        assert!(file.is_none_or(|file| file.len() as u64 <= limit));
        Ok(file.map(|file| file.to_vec()))
    }

    fn is_beside(&self, name: &str) -> Result<bool, IoError> {
        Ok(self.disk.state().now.segments.contains_key(name))
    }

    fn replace(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        let mut state = self.disk.state();
        state.fails().map_err(|error| IoError::new("replace", &*self.name, error))?;
        state.now.segments.insert(self.name.clone(), bytes.to_vec().into());
        state.note(Event::Replace(self.name.clone(), bytes.to_vec()));
        Ok(())
    }

    fn settle(&mut self, end: u64) -> Result<u64, IoError> {
        let mut cut = 0;
        self.change("cut", None, |file, name| {
            cut = file.len() as u64 - end;
            file.truncate(end as usize);
            Event::Cut(name, end)
        })?;
        self.flush().map(|()| cut)
    }

    fn ends_at(&self, end: u64) -> Result<bool, IoError> {
        let state = self.disk.state();
        Ok(state.now.segments.get(&self.name).is_some_and(|file| file.len() as u64 == end))
    }

    fn append(&mut self, end: u64, bytes: &[u8]) -> Result<(), IoError> {
        self.change("append to", Some(end), |file, name| {
            assert_eq!(file.len() as u64, end, "{name} does not end there");
            file.extend_from_slice(bytes);
            Event::WriteSegment { name, offset: end, bytes: bytes.to_vec() }
        })
    }

    fn flush(&mut self) -> Result<(), IoError> {
        self.change("flush", None, |_, name| Event::FlushSegment(name))
    }

    fn cut(&mut self, end: u64) -> Result<(), IoError> {
        self.change("cut", None, |file, name| {
            file.truncate(end as usize);
            Event::Cut(name, end)
        })
    }
}

impl ReadAt for Arc<Vec<u8>> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let failed = || IoError::at("read", "memory", offset, io::ErrorKind::UnexpectedEof);
        let start = usize::try_from(offset).map_err(|_| failed())?;
        let range = start..start.checked_add(buf.len()).ok_or_else(failed)?;
        buf.copy_from_slice(self.get(range).ok_or_else(failed)?);
        Ok(())
    }
}
