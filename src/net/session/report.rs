//! What the volume's thread tells the session's tasks, and how they tell the peer.

use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, WriteHalf};
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use super::Error;
use super::stage::TOLD;
use crate::net::frame::Header;
use crate::net::message::Notice;
use crate::net::wire;
use crate::volume::counters::Counters;
use crate::volume::{Event, Events, Fault};

/// Waits in a pass, where silence is normal: a peer that waits for window has nothing to say. It is given up after
/// `idle`, and at most twice that, in which nothing was under way to the disk, no byte came over any of its connections and
/// no window went back.
pub(super) async fn patiently<T>(
    report: &Report,
    idle: Duration,
    next: impl Future<Output = Result<T, wire::Error>>,
) -> Result<T, Error> {
    let mut next = pin!(next);
    loop {
        let before = report.signs();
        match timeout(idle, &mut next).await {
            Ok(result) => return Ok(result?),
            Err(_) if report.is_busy() || report.signs() != before => {}
            Err(_) => return Err(Error::Silent(idle)),
        }
    }
}

/// A peer's bytes, each of them a sign of life.
pub(super) struct Heard<'a, R> {
    pub(super) reader: &'a mut R,
    pub(super) report: Arc<Report>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Heard<'_, R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let poll = Pin::new(&mut *self.reader).poll_read(cx, buf);
        self.report.heard.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
        poll
    }
}

/// What the volume's thread tells the session's tasks.
#[derive(Debug, Default)]
pub(super) struct Report {
    frames: AtomicU64,
    cost: AtomicU64,
    /// What was taken on of the same costs: as long as it is more, the volume is at work.
    taken: AtomicU64,
    /// Bytes that came from the peer.
    heard: AtomicU64,
    /// Frames of digests that went to it.
    pub(super) digested: AtomicU64,
    /// Frames that arrived damaged, of which the peer is to be told.
    refused: Mutex<Vec<Header>>,
    /// The session closes: no frame of digests is begun any more.
    pub(super) ended: Notify,
    /// Progress to report, or `closing`.
    news: Notify,
    pub(super) flushed: Notify,
    /// Bytes in the journal of the pass, at its end.
    pub(super) saved: AtomicU64,
    closing: AtomicBool,
    /// Between the answers to the pass's beginning and to its commit, when signs of life go to the peer.
    lives: AtomicBool,
    /// Whether the journal waits for room.
    paused: AtomicBool,
    /// Set before the first command goes to the volume.
    pub(super) counters: OnceLock<Arc<Counters>>,
}

impl Report {
    pub(super) fn events(self: Arc<Report>, fault: oneshot::Sender<Fault>) -> Events {
        let mut fault_sender = Some(fault);
        Box::new(move |event| match event {
            Event::Written { frames, cost, written, zeroed } => {
                if let Some(counters) = self.counters.get() {
                    counters.written_bytes.fetch_add(written, Ordering::Relaxed);
                    counters.zeroed_bytes.fetch_add(zeroed, Ordering::Relaxed);
                }
                self.give_back(frames, cost);
            }
            Event::Flushed { saved } => {
                self.saved.store(saved, Ordering::Relaxed);
                self.flushed.notify_one();
            }
            Event::Paused | Event::Resumed => {
                let paused = matches!(event, Event::Paused);
                if let Some(counters) = self.counters.get() {
                    counters.paused.store(paused, Ordering::Relaxed);
                }
                self.paused.store(paused, Ordering::Release);
                self.news.notify_one();
            }
            Event::Faulted(fault) => {
                if let Some(sender) = fault_sender.take() {
                    // The session may be gone.
                    sender.send(fault).ok();
                }
            }
        })
    }

    /// Grows with every byte that comes and every bit of window, and every digest, that goes back.
    fn signs(&self) -> [u64; 3] {
        [&self.heard, &self.cost, &self.digested].map(|count| count.load(Ordering::Acquire))
    }

    /// Whether the volume has something to carry out. While more is handed over the answer may be wrong; the
    /// [signs](Self::signs) change then.
    fn is_busy(&self) -> bool {
        self.taken.load(Ordering::Relaxed) != self.cost.load(Ordering::Acquire)
    }

    /// What of the window was given back since the pass began.
    pub(super) fn returned(&self) -> u64 {
        self.cost.load(Ordering::Acquire)
    }

    /// So much is handed over to the volume.
    pub(super) fn take(&self, cost: u64) {
        self.taken.fetch_add(cost, Ordering::Relaxed);
    }

    fn give_back(&self, frames: u64, cost: u64) {
        // Each released after what it counts, and acquired before that is looked at.
        self.frames.fetch_add(frames, Ordering::Release);
        self.cost.fetch_add(cost, Ordering::Release);
        self.news.notify_one();
    }

    fn refused(&self) -> std::sync::MutexGuard<'_, Vec<Header>> {
        // A list is whole whoever panicked beside it.
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frame arrived damaged: nothing of it is under way any more, and it is to be sent again.
    pub(super) fn refuse(&self, header: &Header) {
        self.refused().push(Header::refused(header));
        let cost = header.window_cost();
        self.take(cost);
        self.give_back(1, cost);
    }

    /// The peer has the answer to its beginning of the pass.
    pub(super) fn begun(&self) {
        self.lives.store(true, Ordering::Release);
    }

    /// The next that the peer hears is the answer to its commit, and the last.
    pub(super) fn answered(&self) {
        self.lives.store(false, Ordering::Release);
    }

    /// The session closes: what is being written is brought to its end, and nothing else is begun.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.news.notify_one();
        self.ended.notify_one();
    }
}

/// Gives window back as the volume's thread reports it, and asks for what arrived damaged, until the session closes. In a pass
/// the peer hears something every now and then, whatever that waits for: else it takes this side for dead. Fails where writing
/// does.
pub(super) async fn report_progress<S: AsyncRead + AsyncWrite>(
    report: &Report,
    writer: &tokio::sync::Mutex<WriteHalf<S>>,
) -> Result<(), wire::Error> {
    let (mut reported, mut was_paused) = (0, false);
    loop {
        let waited = timeout(TOLD, report.news.notified()).await.is_err();
        let closing = report.closing.load(Ordering::Acquire);
        let paused = report.paused.load(Ordering::Acquire);
        if paused != was_paused && !closing {
            was_paused = paused;
            let text = match paused {
                true => {
                    "the retention file system of the master target is full: the pass waits until there is room"
                }
                false => "there is room on the retention file system again: the pass goes on",
            };
            let notice = Notice { message: text.to_owned() };
            wire::write_message(&mut *writer.lock().await, 0, &notice).await?;
        }
        let cost = report.returned();
        let frames = report.frames.load(Ordering::Acquire);
        // Looked for after the counts, and told before them: a client that hears that all of its frames are dealt with
        // knows of each that it must send again.
        let refused = std::mem::take(&mut *report.refused());
        let given_back = cost != reported && !closing;
        if !refused.is_empty() || given_back || waited {
            reported = cost;
            let mut writer = writer.lock().await;
            // Looked at once nothing else can be written: nothing comes after the answer to a commit.
            let sign = waited && report.lives.load(Ordering::Acquire);
            let progress = (given_back || sign).then(|| Header::progress(frames, cost));
            for header in refused.iter().chain(&progress) {
                wire::write_header(&mut *writer, header).await?;
            }
            writer.flush().await.map_err(|source| wire::Error::Io { op: "write", source })?;
        }
        if closing {
            return Ok(());
        }
    }
}
