//! How far a point is, and the waiting of its sessions for one another.

use std::pin::pin;
use std::time::Duration;

use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, interval_at};

use super::Error;
use super::receiving::{lost, protocol};
use crate::name::Name;
use crate::net::message::{self, Code, Notice};
use crate::net::wire;

/// How far a point is: all its sessions go through it side by side.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stage {
    /// These machines of the group have not opened all their disks yet.
    Gathering(Vec<Name>),
    /// All disks are open; these machines have not begun all their passes yet.
    Beginning(Vec<Name>),
    /// All passes have begun: nobody is read before that, and so there was one moment at which all machines stood still.
    Begun,
    /// The point is there, recorded at this time.
    Recorded(OffsetDateTime),
    /// There will be no such point.
    Lost(message::Error),
}

impl Stage {
    /// What a session that waits for more tells its user.
    fn awaits(&self) -> Option<String> {
        let list = |machines: &[Name]| machines.iter().map(Name::as_str).collect::<Vec<_>>().join(", ");
        match self {
            Stage::Gathering(machines) => {
                Some(format!("waiting for the other machines of the group: {}", list(machines)))
            }
            Stage::Beginning(machines) => {
                Some(format!("waiting until all disks of these have begun: {}", list(machines)))
            }
            Stage::Begun | Stage::Recorded(_) | Stage::Lost(_) => None,
        }
    }
}

/// How often a peer that waits is told something at least.
pub(super) const TOLD: Duration = Duration::from_secs(10);

/// Waits, at most `limit`, until the point has come so far, and tells the peer now and then for whom. The peer has nothing
/// to say meanwhile; that it goes away ends the wait.
pub(super) async fn reached<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    stage: &mut watch::Receiver<Stage>,
    so_far: impl Fn(&Stage) -> bool,
    limit: Duration,
    reader: &mut R,
    writer: &Mutex<W>,
) -> Result<(), Error> {
    let mut next = pin!(wire::read_header(reader));
    let start = Instant::now();
    // Not at once: as a rule all disks of one machine begin in one moment.
    let mut told = interval_at(start + Duration::from_secs(1), TOLD);
    loop {
        tokio::select! {
            reached = stage.wait_for(|stage| so_far(stage) || matches!(stage, Stage::Lost(_))) => {
                return match reached.map(|stage| stage.clone()) {
                    Ok(Stage::Lost(error)) => Err(error.into()),
                    Ok(_) => Ok(()),
                    Err(_) => Err(lost().into()),
                };
            }
            early = &mut next => {
                return Err(early.map_or_else(Error::from, |header| {
                    protocol(format!("a {:?} frame came before the answer to what was sent last", header.kind))
                }));
            }
            _ = told.tick() => {}
        }
        let Some(awaits) = stage.borrow().awaits() else { continue };
        if start.elapsed() >= limit {
            let text = format!("{awaits}: given up after {} s; send all of them again", limit.as_secs());
            return Err(message::Error::new(Code::Incomplete, text).into());
        }
        let notice = Notice { message: awaits };
        wire::write_message(&mut *writer.lock().await, 0, &notice).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    /// What becomes of who waits, and what it is told meanwhile; at the first word the pass begins.
    async fn wait(stage: &watch::Sender<Stage>, limit: Duration) -> (Result<(), Error>, Vec<String>) {
        let (mut client, server) = tokio::io::duplex(64 << 10);
        let (mut reader, writer) = tokio::io::split(server);
        let begun = |stage: &Stage| *stage == Stage::Begun;
        let (mut waiting, writer) = (stage.subscribe(), Mutex::new(writer));
        let waits = async {
            let result = reached(&mut waiting, begun, limit, &mut reader, &writer).await;
            drop((reader, writer));
            result
        };
        let hears = async {
            let mut told = Vec::new();
            while let Ok(notice) = wire::read_message::<Notice, _>(&mut client).await {
                told.push(notice.message);
                stage.send_replace(Stage::Begun);
            }
            told
        };
        tokio::join!(waits, hears)
    }

    #[tokio::test]
    async fn who_waits_is_told_for_whom_and_not_for_ever() {
        let stage =
            watch::Sender::new(Stage::Gathering(vec!["db01".parse().unwrap(), "web01".parse().unwrap()]));
        let (result, told) = wait(&stage, SHORT).await;
        let Err(Error::Refused(refusal)) = result else { panic!("{result:?}") };
        let awaits = "waiting for the other machines of the group: db01, web01";
        assert_eq!(refusal.code, Code::Incomplete);
        assert!(refusal.message.starts_with(awaits) && refusal.message.contains("given up"), "{refusal}");
        assert!(told.is_empty());
        let (result, told) = wait(&stage, Duration::from_secs(60)).await;
        assert!(result.is_ok());
        assert_eq!(told, [awaits]);
        let lost = message::Error::new(Code::Incomplete, "lost");
        stage.send_replace(Stage::Lost(lost.clone()));
        let (result, _) = wait(&stage, SHORT).await;
        assert!(matches!(result, Err(Error::Refused(refusal)) if refusal == lost));
    }
}
