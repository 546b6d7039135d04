//! The sessions that have a disk, or look at it: whoever is refused hears of them, and of those that only look there are no
//! more than may be.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use time::OffsetDateTime;

use crate::name::Name;
use crate::net::message::{self, Code};
use crate::units::rfc3339;

/// How many sessions may compare one disk at once. Each is one of `max_sessions`, and those that a timer starts and nobody ends
/// would take all of these.
const MOST_COMPARING: usize = 4;

/// All of them, in the order in which they came. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Sessions(Arc<Mutex<Vec<Arc<Session>>>>);

#[derive(Debug)]
struct Session {
    machine: Name,
    disk: Name,
    peer: SocketAddr,
    since: OffsetDateTime,
    /// Up to where it compared the disk, where that is all it does.
    compared: Option<Arc<AtomicU64>>,
    /// Whether the device is its alone.
    holds: AtomicBool,
}

impl Session {
    fn is_of(&self, machine: &Name, disk: &Name) -> bool {
        self.machine == *machine && self.disk == *disk
    }

    fn whence(&self) -> String {
        format!("from {} since {}", self.peer, rfc3339(self.since))
    }
}

/// Keeps a session among them.
#[derive(Debug)]
pub(super) struct Entry {
    sessions: Sessions,
    session: Arc<Session>,
}

impl Entry {
    /// The device was opened for this session alone, and is until it ends.
    pub(super) fn holds(&self) {
        self.session.holds.store(true, Ordering::Relaxed);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.sessions.lock().retain(|session| !Arc::ptr_eq(session, &self.session));
    }
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        // A list is whole whoever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, sessions: &mut Vec<Arc<Session>>, session: Session) -> Entry {
        let session = Arc::new(session);
        sessions.push(session.clone());
        Entry { sessions: self.clone(), session }
    }

    /// One comes that is to write to the disk.
    pub(super) fn receive(&self, machine: &Name, disk: &Name, peer: SocketAddr) -> Entry {
        self.enter(&mut self.lock(), session(machine, disk, peer, None))
    }

    /// One comes that only compares the disk, up to `compared`.
    pub(super) fn compare(
        &self,
        machine: &Name,
        disk: &Name,
        peer: SocketAddr,
        compared: &Arc<AtomicU64>,
    ) -> Result<Entry, message::Error> {
        let mut sessions = self.lock();
        let comparing: Vec<String> = sessions
            .iter()
            .filter(|session| session.is_of(machine, disk) && session.compared.is_some())
            .map(|session| session.whence())
            .collect();
        if comparing.len() >= MOST_COMPARING {
            let text = format!(
                "{} sessions compare disk {disk} of machine {machine}, and no more may at once: {}; wait for one to be done, or \
                 end that `mt-agent verify`",
                comparing.len(),
                comparing.join(", ")
            );
            return Err(message::Error::new(Code::Busy, text));
        }
        Ok(self.enter(&mut sessions, session(machine, disk, peer, Some(compared.clone()))))
    }

    /// Up to where a disk was compared, if it is being compared; of several, by the one that came first.
    pub(super) fn compared(&self, machine: &Name, disk: &Name) -> Option<u64> {
        let sessions = self.lock();
        let mut comparing = sessions
            .iter()
            .filter(|session| session.is_of(machine, disk))
            .filter_map(|one| one.compared.as_ref());
        comparing.next().map(|bytes| bytes.load(Ordering::Relaxed))
    }

    /// Which session has the device of the disk, if one does, and what whoever wants it can do.
    pub(super) fn holder(&self, machine: &Name, disk: &Name) -> Option<String> {
        let sessions = self.lock();
        let holds =
            |session: &&Arc<Session>| session.is_of(machine, disk) && session.holds.load(Ordering::Relaxed);
        let session = sessions.iter().find(holds)?;
        let (does, command) = match session.compared {
            None => ("receives", "send"),
            Some(_) => ("compares", "verify"),
        };
        Some(format!(
            "another session {does} disk {disk} of machine {machine}, {}: wait until it is done, or end that \
             `mt-agent {command}`; where nobody is there any more, it ends by itself (`idle_timeout`)",
            session.whence()
        ))
    }
}

fn session(machine: &Name, disk: &Name, peer: SocketAddr, compared: Option<Arc<AtomicU64>>) -> Session {
    let (machine, disk, since) = (machine.clone(), disk.clone(), OffsetDateTime::now_utc());
    Session { machine, disk, peer, since, compared, holds: AtomicBool::new(false) }
}
