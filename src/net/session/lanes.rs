//! More connections for one pass.
//!
//! A session that is open invites them, until its pass begins; one that joins carries Data and Zero frames into the
//! session's [`Intake`]. It holds nothing of its own: it ends when the session does, and the session when it does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::AsyncRead;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::intake::Intake;
use super::receiving::protocol;
use super::report::Heard;
use super::{CLOSING, Error};
use crate::error::IoError;
use crate::name::Name;
use crate::net::frame::Kind;
use crate::net::message::{self, Code, Invitation, Join};
use crate::net::token::Secret;
use crate::net::wire;

/// The sessions of a service that can be joined, by machine and disk: a disk has one session at most. Clones share them.
#[derive(Clone, Default)]
pub struct Lanes(Arc<Mutex<HashMap<(Name, Name), Invited>>>);

struct Invited {
    secret: Secret,
    intake: Arc<Intake>,
    places: Arc<Semaphore>,
}

/// A session that can be joined, as long as this is kept.
pub(super) struct Inviting {
    lanes: Lanes,
    key: (Name, Name),
}

impl Drop for Inviting {
    fn drop(&mut self) {
        self.lanes.lock().remove(&self.key);
    }
}

/// The places of one session's further connections.
pub(super) struct Places {
    all: u32,
    free: Arc<Semaphore>,
}

impl Places {
    /// How many are taken.
    pub(super) fn taken(&self) -> u32 {
        self.all.saturating_sub(u32::try_from(self.free.available_permits()).unwrap_or(u32::MAX))
    }

    /// Waits, for a moment, until all of those that joined have let go of the session.
    pub(super) async fn empty(&self) {
        timeout(CLOSING, self.free.acquire_many(self.all)).await.ok();
    }
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, HashMap<(Name, Name), Invited>> {
        // The map is whole between its statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets more connections join the session of a disk, which `connections` may carry in all.
    pub(super) fn invite(
        &self,
        machine: &Name,
        disk: &Name,
        connections: u32,
        intake: &Arc<Intake>,
    ) -> Result<(Inviting, Places, Option<Invitation>), Error> {
        let secret = Secret::random().map_err(|error| {
            let error = IoError::new("draw", "random bits", error);
            message::Error::new(Code::Internal, crate::error::chain(&error))
        })?;
        let all = connections.saturating_sub(1);
        let invitation = (all > 0).then(|| Invitation { secret: secret.to_base64(), connections });
        let free = Arc::new(Semaphore::new(all as usize));
        let key = (machine.clone(), disk.clone());
        let invited = Invited { secret, intake: intake.clone(), places: free.clone() };
        self.lock().insert(key.clone(), invited);
        Ok((Inviting { lanes: self.clone(), key }, Places { all, free }, invitation))
    }

    /// Lets a connection of this machine in, where it knows the secret.
    pub(super) fn join(&self, machine: &Name, join: &Join) -> Result<Lane, message::Error> {
        let lanes = self.lock();
        let secret = Secret::from_base64(&join.secret);
        // A machine knows no other's secret; and what it may not join it does not hear of.
        let invited = lanes.get(&(machine.clone(), join.disk.clone()));
        let Some(invited) = invited.filter(|invited| secret.is_some_and(|secret| secret == invited.secret))
        else {
            let text = format!(
                "no pass of disk {} takes another connection of machine {machine} with this secret: open the disk, and \
                 join before the pass begins",
                join.disk
            );
            return Err(message::Error::new(Code::Refused, text));
        };
        let Ok(place) = invited.places.clone().try_acquire_owned() else {
            let text = "as many connections carry the pass as the master target allows (`max_connections`)";
            return Err(message::Error::new(Code::Refused, text));
        };
        Ok(Lane { intake: invited.intake.clone(), _place: place })
    }
}

/// One more connection of a pass.
// Dropped in this order: who waits for the place finds the session let go of.
pub(super) struct Lane {
    intake: Arc<Intake>,
    _place: OwnedSemaphorePermit,
}

impl Lane {
    /// Carries frames until the session is over, or something is wrong here, which ends the session.
    pub(super) async fn run<R: AsyncRead + Unpin>(self, reader: &mut R) -> Result<(), Error> {
        let result = tokio::select! {
            result = self.carry(reader) => result,
            () = self.intake.ended() => Ok(()),
        };
        match result {
            // Its peer has what it came for, or never wanted it.
            Err(_) if self.intake.is_done() => Ok(()),
            Err(error) => {
                // What was under way here is gone.
                self.intake.lose(error.to_peer());
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    async fn carry<R: AsyncRead + Unpin>(&self, reader: &mut R) -> Result<(), Error> {
        let reader = &mut Heard { reader, report: self.intake.report.clone() };
        let mut packed = Vec::new();
        loop {
            // Without a limit: the peer may have nothing for this one. That it is gone the kernel notices, and that it is
            // silent on all of them the first.
            let header = wire::read_header(reader).await?;
            if !matches!(header.kind, Kind::Data | Kind::Zero) {
                let text = format!("a {:?} frame on another connection than the pass's first", header.kind);
                return Err(protocol(text));
            }
            self.intake.take(reader, &header, &mut packed).await?;
        }
    }
}
