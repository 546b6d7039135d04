//! More connections for the pass of one disk.
//!
//! One connection carries no more than its window in each round trip, and a shaper may grant each of them its share alone.
//! So the frames of a pass are dealt to several: whichever has sent what it had takes the next.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::encode::Piece;
use super::limit::Limiter;
use super::session::{ask, greet};
use super::{Connection, Error, Progress, connect, turn_at_the_door};
use crate::error::chain;
use crate::name::Name;
use crate::net::address::Address;
use crate::net::frame::Kind;
use crate::net::message::{Invitation, Join, JoinReply, OpenReply};
use crate::net::wire;

/// How many connections carry a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Connections {
    /// One where the way is short, and several where it is long.
    #[default]
    Auto,
    /// So many, as far as the master target allows them.
    Exactly(u32),
}

/// The most that can be asked for.
pub const MOST: u32 = 8;

/// How many are taken by themselves where the way is long.
const SEVERAL: u32 = 4;

/// A way is long from here on: below it one connection fills any link, and several only cost.
const LONG: Duration = Duration::from_millis(10);

/// How long one of them may take to join: the pass waits for it.
const JOINING: Duration = Duration::from_secs(20);

/// How long all of them may, with those of other disks before them: the master target waits for the pass, too.
const ALL: Duration = Duration::from_secs(60);

impl FromStr for Connections {
    type Err = String;

    fn from_str(text: &str) -> Result<Connections, String> {
        if text == "auto" {
            return Ok(Connections::Auto);
        }
        let number = text.parse().ok().filter(|number| (1..=MOST).contains(number));
        number.map(Connections::Exactly).ok_or_else(|| format!("give auto, or 1 to {MOST}"))
    }
}

impl Connections {
    /// How many more than the first are to join, where an answer took so long to come.
    pub(super) fn further(self, round_trip: Duration, invitation: Option<&Invitation>) -> u32 {
        let wanted = match self {
            Connections::Exactly(number) => number,
            Connections::Auto if round_trip < LONG => 1,
            Connections::Auto => SEVERAL,
        };
        // A master target that does not know of several invites none.
        wanted.min(invitation.map_or(1, |invitation| invitation.connections)).saturating_sub(1)
    }
}

/// Opens more connections for a disk, side by side. Each is worth having and none is needed: what there is for it, a
/// firewall or a limit on the other side, is told and no reason to send nothing.
pub(super) async fn join_all(
    to: &Address,
    tls: &Arc<ClientConfig>,
    disk: &Name,
    reply: &OpenReply,
    further: u32,
) -> Vec<Connection> {
    let Some(invitation) = &reply.join else { return Vec::new() };
    let mut joining = JoinSet::new();
    for _ in 0..further {
        let (to, tls, disk, invitation) = (to.clone(), tls.clone(), disk.clone(), invitation.clone());
        let joined = async move {
            let mut stream = connect(&to, tls).await?;
            join(&mut stream, &disk, &invitation).await?;
            Ok::<_, Error>(stream)
        };
        let in_turn = async {
            let _turn = turn_at_the_door().await;
            timeout(JOINING, joined).await.unwrap_or(Err(Error::Silent(JOINING)))
        };
        joining.spawn(async { timeout(ALL, in_turn).await.unwrap_or(Err(Error::Silent(ALL))) });
    }
    let mut joined = Vec::new();
    while let Some(ended) = joining.join_next().await {
        match ended {
            Ok(Ok(stream)) => joined.push(stream),
            Ok(Err(error)) => tracing::warn!(
                %disk, error = chain(&error),
                "one connection fewer carries the disk: another could not be opened"
            ),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }
    joined
}

/// Joins the pass of a disk over a fresh connection.
async fn join<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    disk: &Name,
    invitation: &Invitation,
) -> Result<(), Error> {
    greet(stream).await?;
    let JoinReply {} = ask(stream, &Join { disk: disk.clone(), secret: invitation.secret.clone() }).await?;
    Ok(())
}

/// What writing frames needs.
#[derive(Clone)]
pub(super) struct Outlet {
    pub(super) limiter: Option<Arc<Limiter>>,
    pub(super) progress: Arc<Progress>,
}

impl Outlet {
    /// Writes a data or zero frame.
    pub(super) async fn deliver<W: AsyncWrite + Unpin>(
        &self,
        writer: &mut W,
        Piece { header, payload }: &Piece,
    ) -> Result<(), Error> {
        let lost = |source| Error::Wire(wire::Error::Io { op: "write", source });
        wire::write_header(writer, header).await?;
        match &self.limiter {
            None => writer.write_all(payload.bytes()).await.map_err(lost)?,
            // Bit by bit: the peer must not take the wait for silence.
            Some(limiter) => {
                for part in payload.bytes().chunks(limiter.part()) {
                    sleep(limiter.take(part.len() as u64)).await;
                    writer.write_all(part).await.map_err(lost)?;
                    writer.flush().await.map_err(lost)?;
                }
            }
        }
        // It must reach the peer, which gives window back for it.
        writer.flush().await.map_err(lost)?;
        let progress = &self.progress;
        progress.sent.fetch_add(payload.bytes().len() as u64, Ordering::Relaxed);
        progress.done.fetch_add(header.length, Ordering::Relaxed);
        if header.kind == Kind::Zero {
            progress.zero.fetch_add(header.length, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The frames that wait for a connection: whichever is free takes the next. So on each of them the numbers ascend.
#[derive(Clone)]
pub(super) struct Dealt(Arc<Mutex<mpsc::Receiver<Piece>>>);

impl Dealt {
    /// With the end at which frames are dealt. One waits at most: what waits could be under way on another connection.
    pub(super) fn new() -> (mpsc::Sender<Piece>, Dealt) {
        let (deal, dealt) = mpsc::channel(1);
        (deal, Dealt(Arc::new(Mutex::new(dealt))))
    }

    /// The next; `None` once no more come.
    pub(super) async fn next(&self) -> Option<Piece> {
        self.0.lock().await.recv().await
    }
}

/// Carries frames over a connection that joined, until no more come. The peer says nothing here but why it ends.
pub(super) async fn carry<S: AsyncRead + AsyncWrite>(
    stream: S,
    dealt: Dealt,
    outlet: Outlet,
) -> Result<(), Error> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let deliver = async {
        while let Some(piece) = dealt.next().await {
            outlet.deliver(&mut writer, &piece).await?;
        }
        Ok::<(), Error>(())
    };
    tokio::select! {
        result = deliver => result?,
        said = wire::read_message::<JoinReply, _>(&mut reader) => {
            return Err(said.map_or_else(Error::from, |_| Error::Broken("it let a connection join twice")));
        }
    }
    // A courtesy: everything is acknowledged.
    writer.shutdown().await.ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_many_there_are_depends_on_the_way_and_on_the_other_side() {
        let invitation = |connections| Some(Invitation { secret: String::new(), connections });
        let (short, long) = (Duration::from_millis(1), Duration::from_millis(30));
        let further = |text: &str, way, invitation: Option<Invitation>| {
            text.parse::<Connections>().unwrap().further(way, invitation.as_ref())
        };
        assert_eq!(further("auto", short, invitation(8)), 0);
        assert_eq!(further("auto", long, invitation(8)), 3);
        assert_eq!(further("auto", long, invitation(2)), 1);
        assert_eq!(further("8", short, invitation(8)), 7);
        assert_eq!(further("8", short, invitation(4)), 3);
        assert_eq!(further("1", long, invitation(8)), 0);
        for none in [None, invitation(1), invitation(0)] {
            assert_eq!(further("8", long, none), 0);
        }
        for wrong in ["0", "9", "-1", "many", ""] {
            assert!(wrong.parse::<Connections>().is_err(), "{wrong}");
        }
    }
}
