//! The thread that reads a volume and tells its client what is on it, in digests.
//!
//! It runs ahead of the client by no more than [`AHEAD`] bytes of the volume, and what the client asks to see more
//! closely comes first. It reads through a queue of its own, beside the volume's thread: a client writes only where it
//! has the digest already, so that no range is read while it is written. Where another client writes, the queue gives what
//! the volume held before.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, WriteHalf};
use tokio::sync::{Mutex, mpsc};

use super::report::Report;
use super::{Error, Reader};
use crate::digest;
use crate::error::{IoError, chain};
use crate::net::frame::{Header, MAX_DATA};
use crate::net::message::{self, Code};
use crate::net::wire;
use crate::storage::Storage;
use crate::storage::ahead::{Ahead, CHUNK, Part};
use crate::sys::aligned::Arena;
use crate::units::Extent;

/// How much of the volume digests are sent for before the client must have said that it is there.
pub const AHEAD: u64 = 256 << 20;

/// How many ranges the client may wait to see more closely.
pub const MOST_WISHES: u64 = 64;

/// Memory for what is read.
pub const MEMORY: usize = 4 << 20;

/// How many requests are under way.
pub const DEPTH: usize = 3;

/// The comparing of the source with the volume.
pub(super) enum Comparing {
    /// Not begun: what it would take.
    Possible {
        reader: Reader,
        output: mpsc::Sender<Output>,
    },
    Running(Digester),
    /// Asked for, and it failed to start.
    No,
}

/// A frame, or why there is none.
pub(super) type Output = Result<(Header, Vec<u8>), IoError>;

enum Wish {
    /// Up to here the client has compared.
    Covered(u64),
    Refine(Extent),
}

/// The running thread. Dropped, it waits for the thread's end; whoever takes its output must have stopped by then.
pub(super) struct Digester {
    wishes: Option<Sender<Wish>>,
    thread: Option<JoinHandle<()>>,
    /// Ranges that were asked for and not answered.
    open: Arc<AtomicU64>,
}

impl Digester {
    /// Sends the digests of the first `size` bytes of `device` to `output`, one for `unit` bytes. `arena` is the one
    /// that the device's buffers come from.
    pub(super) fn start(
        device: Box<dyn Storage>,
        arena: Arena,
        size: u64,
        unit: u32,
        output: mpsc::Sender<Output>,
    ) -> Result<Digester, IoError> {
        let block = u64::from(device.geometry().block);
        let near = Arena::new((MAX_DATA + 2 * block) as usize)
            .map_err(|error| IoError::new("map", "memory", error))?;
        let (wishes, wanted) = channel();
        let open = Arc::new(AtomicU64::new(0));
        let answered = open.clone();
        let thread = std::thread::Builder::new()
            .name("digests".into())
            .spawn(move || {
                let ahead = Ahead::new(device, arena);
                let mut work = Work { ahead, near, size, block, unit, wanted, answered, output };
                if let Err(Stop::Failed(error)) = work.run() {
                    // The session may be gone as well.
                    work.output.blocking_send(Err(error)).ok();
                }
            })
            .map_err(|error| IoError::new("start", "a thread for digests", error))?;
        Ok(Digester { wishes: Some(wishes), thread: Some(thread), open })
    }

    /// The client is through with the first `bytes`.
    pub(super) fn covered(&self, bytes: u64) {
        self.wish(Wish::Covered(bytes));
    }

    /// The client wants to see this range more closely; `false` where it waits for too many already.
    pub(super) fn refine(&self, extent: Extent) -> bool {
        if self.open.fetch_add(1, Ordering::Relaxed) >= MOST_WISHES {
            return false;
        }
        self.wish(Wish::Refine(extent));
        true
    }

    fn wish(&self, wish: Wish) {
        if let Some(wishes) = &self.wishes {
            // A thread that failed has said so.
            wishes.send(wish).ok();
        }
    }
}

impl Drop for Digester {
    fn drop(&mut self) {
        self.wishes = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the digests panicked");
        }
    }
}

enum Stop {
    Failed(IoError),
    NobodyListens,
}

impl From<IoError> for Stop {
    fn from(error: IoError) -> Stop {
        Stop::Failed(error)
    }
}

struct Work {
    ahead: Ahead,
    /// Memory for a range that is read out of order.
    near: Arena,
    size: u64,
    block: u64,
    unit: u32,
    wanted: Receiver<Wish>,
    answered: Arc<AtomicU64>,
    output: mpsc::Sender<Output>,
}

impl Work {
    fn run(&mut self) -> Result<(), Stop> {
        // The device is read in whole blocks: what lies behind the source is cut off again.
        self.ahead.seek(0, self.size.next_multiple_of(self.block));
        let (mut sent, mut covered) = (0, 0);
        loop {
            let wish = if sent < self.size && sent < covered + AHEAD {
                match self.wanted.try_recv() {
                    Ok(wish) => Some(wish),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return Err(Stop::NobodyListens),
                }
            } else {
                Some(self.wanted.recv().map_err(|_| Stop::NobodyListens)?)
            };
            match wish {
                Some(Wish::Covered(bytes)) => covered = bytes,
                Some(Wish::Refine(extent)) => self.refine(extent)?,
                None => match self.ahead.next(CHUNK, |_| None)? {
                    Some((at, Part::Bytes(buffer))) => {
                        let len = buffer.len().min((self.size - at) as usize);
                        self.send(self.unit, at, &buffer[..len])?;
                        sent = at + len as u64;
                    }
                    Some((_, Part::Hole(_))) => unreachable!("none was passed over"),
                    None => sent = self.size,
                },
            }
        }
    }

    fn refine(&mut self, extent: Extent) -> Result<(), Stop> {
        let Some(blocks) = extent.widened(self.block) else { return Ok(()) };
        // One at a time: the buffer of the range before was given back.
        let buffer = self.near.alloc_blocking(blocks.len() as usize);
        let buffer = self.ahead.read(blocks.offset(), buffer)?;
        let from = (extent.offset() - blocks.offset()) as usize;
        self.send(digest::FINE, extent.offset(), &buffer[from..from + extent.len() as usize])?;
        self.answered.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }

    fn send(&self, unit: u32, offset: u64, bytes: &[u8]) -> Result<(), Stop> {
        let payload: Vec<u8> = digest::of(bytes, unit).flatten().collect();
        let Some(header) = Header::digests(unit, offset, bytes.len() as u64, &payload) else {
            unreachable!("no more digests than a frame takes")
        };
        self.output.blocking_send(Ok((header, payload))).map_err(|_| Stop::NobodyListens)
    }
}

/// The volume cannot be read for digests, or what it held is not there any more.
pub(super) fn unreadable(error: &IoError) -> Error {
    let refused = error.source.get_ref().and_then(|source| source.downcast_ref::<message::Error>());
    if let Some(refused) = refused {
        return refused.clone().into();
    }
    tracing::error!(error = chain(error), "the volume cannot be read for comparing");
    message::Error::new(Code::Io, format!("the target disk cannot be read: {}", chain(error))).into()
}

/// Sends the digests that the digester's thread has for the client, until the session closes.
pub(super) async fn send_digests<S: AsyncRead + AsyncWrite>(
    report: &Report,
    digests: &mut mpsc::Receiver<Output>,
    writer: &Mutex<WriteHalf<S>>,
) -> Result<(), Error> {
    loop {
        let output = tokio::select! {
            biased;
            () = report.ended.notified() => return Ok(()),
            output = digests.recv() => output,
        };
        let Some(output) = output else { break };
        let (header, payload) = output.map_err(|error| unreadable(&error))?;
        let mut writer = writer.lock().await;
        let failed = |source| wire::Error::Io { op: "write", source };
        wire::write_header(&mut *writer, &header).await?;
        writer.write_all(&payload).await.map_err(failed)?;
        writer.flush().await.map_err(failed)?;
        report.digested.fetch_add(1, Ordering::Release);
    }
    report.ended.notified().await;
    Ok(())
}

// A chunk has at most as many digests of the smallest unit as fit a frame, and so has what may be refined.
const _: () = assert!(CHUNK <= MAX_DATA && CHUNK / 4096 * digest::LEN as u64 <= 65536);
