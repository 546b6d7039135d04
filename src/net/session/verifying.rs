//! Telling a client what a volume holds, and no more: beside a pass that writes it, which goes on.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

use super::digester::{self, Digester, Output, send_digests, unreadable};
use super::receiving::{check_unit, protocol};
use super::report::{Heard, Report, patiently, report_progress};
use super::{CLOSING, Error, Patience, Reader, Viewed, off_runtime, within};
use crate::error::IoError;
use crate::net::frame::{Header, Kind, MAX_DATA};
use crate::net::message::{self, Begin, BeginReply, Code, OpenReply, PassKind};
use crate::net::wire;
use crate::sys::aligned::Arena;
use crate::units::Extent;

/// A session that only compares.
struct Verifying {
    size: u64,
    patience: Patience,
    report: Arc<Report>,
    /// What it takes to begin, until it begins.
    possible: Option<(Reader, mpsc::Sender<Output>)>,
    digester: Option<Digester>,
    /// Up to where the client is through.
    covered: Arc<AtomicU64>,
}

/// Lets the client compare a source of `size` bytes, until it closes the connection or must end.
pub(super) async fn verify<S: AsyncRead + AsyncWrite>(
    reader: &mut ReadHalf<S>,
    writer: &Mutex<WriteHalf<S>>,
    viewed: Viewed,
    size: u64,
    patience: Patience,
    stopped: impl Future<Output = Error>,
) -> Result<(), Error> {
    let Viewed { device_size, block, baseline, reader: volume, covered, hold } = viewed;
    let reply = OpenReply {
        window: MAX_DATA,
        max_payload: MAX_DATA as u32,
        volume_size: device_size,
        block,
        compression: Vec::new(),
        baseline,
        alike: true,
        standing: false,
        point: None,
        join: None,
    };
    let report = Arc::new(Report::default());
    let (output, mut digests) = mpsc::channel(2);
    let mut session = Verifying {
        size,
        patience,
        report: report.clone(),
        possible: Some((volume, output)),
        digester: None,
        covered,
    };
    let result = {
        let mut sending = pin!(send_digests(&report, &mut digests, writer));
        // There is none, but for its signs of life.
        let mut progress = pin!(report_progress(&report, writer));
        let result = {
            let mut talk = pin!(session.talk(reader, writer, &reply));
            tokio::select! {
                result = &mut talk => Ok(result),
                // It returns early only where reading the volume fails, or writing to the client.
                result = &mut sending => Err(result),
                result = &mut progress => Err(result.map_err(Error::from)),
                error = stopped => Ok(Err(error)),
            }
        };
        match result {
            Err(failed) => failed,
            Ok(result) => {
                // Not dropped in the middle of a frame: what comes after it must be readable.
                report.close();
                timeout(CLOSING, async { tokio::join!(progress, sending) }).await.ok();
                result
            }
        }
    };
    // The thread has nobody to talk to any more, and ends.
    drop(digests);
    let closing = off_runtime(move || {
        drop(session);
        drop(hold);
    });
    timeout(CLOSING, closing).await.unwrap_or(Ok(()))?;
    result
}

impl Verifying {
    async fn talk<S: AsyncRead + AsyncWrite>(
        &mut self,
        reader: &mut ReadHalf<S>,
        writer: &Mutex<WriteHalf<S>>,
        reply: &OpenReply,
    ) -> Result<(), Error> {
        let report = self.report.clone();
        let reader = &mut Heard { reader, report: report.clone() };
        wire::write_message(&mut *writer.lock().await, 0, reply).await?;
        loop {
            // Until it begins its client runs no hook: it opens its other disks, some of which others may hold for a while, and
            // looks at what of them is free.
            let patience = match self.possible {
                Some(_) => self.patience.idle.max(self.patience.gather),
                None => self.patience.idle,
            };
            let header = match patiently(&report, patience, wire::read_header(reader)).await {
                Err(Error::Wire(wire::Error::Closed)) => return Ok(()),
                other => other?,
            };
            match header.kind {
                Kind::Begin => {
                    let begin: Begin =
                        within(self.patience.handshake, wire::read_message_body(reader, &header)).await?;
                    if begin.kind != PassKind::Verify {
                        return Err(protocol("a pass that writes, on a disk that was opened to be compared"));
                    }
                    let unit = begin.compare.ok_or_else(|| protocol("a comparison without digests"))?;
                    check_unit(unit)?;
                    let possible = self.possible.take();
                    let (volume, output) =
                        possible.ok_or_else(|| protocol("a connection carries one pass"))?;
                    wire::write_message(&mut *writer.lock().await, 0, &BeginReply {}).await?;
                    report.begun();
                    // Not before: the reply is the first that the client hears.
                    self.begin(volume, unit, output).await?;
                }
                Kind::Covered => self.cover(header.length)?,
                Kind::Refine => self.refine(&header)?,
                Kind::Error => {
                    // Always Err: the peer's last word.
                    let _: BeginReply =
                        within(self.patience.handshake, wire::read_message_body(reader, &header)).await?;
                }
                kind => return Err(protocol(format!("a {kind:?} frame where a disk is only compared"))),
            }
        }
    }

    async fn begin(&mut self, volume: Reader, unit: u32, output: mpsc::Sender<Output>) -> Result<(), Error> {
        let size = self.size;
        let started = off_runtime(move || {
            let arena = Arena::new(digester::MEMORY).map_err(|error| IoError::new("map", "memory", error))?;
            Digester::start(volume(&arena)?, arena, size, unit, output)
        });
        self.digester = Some(started.await?.map_err(|error| unreadable(&error))?);
        Ok(())
    }

    fn digester(&self, kind: Kind) -> Result<&Digester, Error> {
        self.digester.as_ref().ok_or_else(|| protocol(format!("a {kind:?} frame where nothing is compared")))
    }

    fn cover(&self, bytes: u64) -> Result<(), Error> {
        let digester = self.digester(Kind::Covered)?;
        let before = self.covered.load(Ordering::Relaxed);
        if bytes < before || bytes > self.size {
            return Err(protocol(format!("{bytes} bytes are covered, after {before}, of {}", self.size)));
        }
        self.covered.store(bytes, Ordering::Relaxed);
        digester.covered(bytes);
        Ok(())
    }

    fn refine(&self, header: &Header) -> Result<(), Error> {
        let digester = self.digester(Kind::Refine)?;
        let Some(extent) =
            Extent::new(header.offset, header.length).filter(|extent| extent.end() <= self.size)
        else {
            let text = format!("{} bytes at {} are outside of the source", header.length, header.offset);
            return Err(message::Error::new(Code::OutOfRange, text).into());
        };
        match digester.refine(extent) {
            true => Ok(()),
            false => Err(protocol(format!("over {} ranges wait to be refined", digester::MOST_WISHES))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Who opens a disk only to compare it opens others first, and runs no hook.
    #[tokio::test]
    async fn who_does_not_begin_to_compare_is_not_waited_for_like_a_hook() {
        let (_client, server) = tokio::io::duplex(64 << 10);
        let (mut reader, writer) = tokio::io::split(server);
        let writer = Mutex::new(writer);
        let viewed = Viewed {
            device_size: 4096,
            block: 512,
            baseline: None,
            reader: Box::new(|_| unreachable!("nobody compares")),
            covered: Arc::default(),
            hold: Box::new(()),
        };
        let limit = Duration::from_millis(30);
        let patience = Patience { gather: limit, idle: limit / 2, ..Patience::default() };
        let verifying = verify(&mut reader, &writer, viewed, 4096, patience, std::future::pending());
        let result = timeout(Duration::from_secs(20), verifying).await.unwrap();
        assert!(matches!(result, Err(Error::Silent(silent)) if silent == limit), "{result:?}");
    }
}
