//! Why a disk was not sent, and what that says of the next attempt.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{hints, source, still};
use crate::error::IoError;
use crate::name::Name;
use crate::net::message::{self, Code};
use crate::net::tls::HandshakeError;
use crate::net::wire;

/// Why a disk was not sent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source cannot be opened or read.
    #[error("read the source")]
    Source(#[from] source::Error),
    /// The master target does not answer.
    #[error(
        "no connection to the master target: check its address, that `mt-agent serve` runs there, and the \
         firewalls between"
    )]
    Connect(#[source] IoError),
    /// There is no TLS with it.
    #[error("no secure connection to the master target")]
    Handshake(#[source] HandshakeError),
    /// Another master target, or something else, answers.
    #[error(
        "what answers is not the master target at which this machine was enrolled: check the address, or enrol the \
         machine again, with a token that was made there"
    )]
    Foreign(#[source] HandshakeError),
    /// The connection broke, or the master target gave up.
    #[error("the pass was not acknowledged; run `mt-agent send` again")]
    Wire(#[from] wire::Error),
    /// The same where it was only compared.
    #[error("the comparing did not come to its end; run `mt-agent verify` again")]
    NotCompared(#[source] wire::Error),
    /// The master target refused before anything was sent.
    #[error("the master target refused the disk")]
    Refused(#[source] message::Error),
    /// The master target broke the pass off on purpose.
    #[error("the master target ended the pass")]
    Ended(#[source] message::Error),
    /// The machine cannot be made to stand still, so that nothing was sent.
    #[error("nothing was sent")]
    Still(#[source] Arc<still::Error>),
    /// The source is a target.
    #[error("the source is a target disk of this host: {0}")]
    Itself(String),
    /// The connection broke off before anything was sent.
    #[error("the master target broke the connection off before it answered; run this again")]
    BrokenOff(#[source] wire::Error),
    /// It says what cannot be.
    #[error("the master target does not keep to the protocol: {0}; install the same version on both sides")]
    Broken(&'static str),
    /// It did not answer in time.
    #[error(
        "the master target was not heard of for {0:?}: check that `mt-agent serve` answers there (`mt-agent status`), and what \
         lies between"
    )]
    Silent(Duration),
    /// The ranges that a tracker tells cannot be read.
    #[error("{}", .0.display())]
    Hints(PathBuf, #[source] Arc<hints::Error>),
    /// Another disk of the same point failed.
    #[error("not sent: disk {0} failed, and a point is there on all disks or on none")]
    Together(Name),
    /// Payloads arrive damaged again and again, although TLS guards the way between.
    #[error(
        "{0} frames arrived with a bad checksum: suspect the memory of this machine or of the master target"
    )]
    Damaged(u64),
}

impl Error {
    /// Whether a rule or the present state refused it, rather than a failure.
    pub fn is_refusal(&self) -> bool {
        match self {
            Error::Source(error) => error.is_refusal(),
            // What failed with another disk says nothing of its own.
            Error::Refused(_)
            | Error::Ended(_)
            | Error::Foreign(_)
            | Error::Itself(_)
            | Error::Hints(..)
            | Error::Together(_) => true,
            Error::Still(error) => error.is_refusal(),
            Error::Handshake(error)
            | Error::Wire(wire::Error::Tls { source: error, .. })
            | Error::NotCompared(wire::Error::Tls { source: error, .. }) => error.is_refusal(),
            Error::Connect(_)
            | Error::Wire(_)
            | Error::NotCompared(_)
            | Error::BrokenOff(_)
            | Error::Broken(_)
            | Error::Silent(_)
            | Error::Damaged(_) => false,
        }
    }
}

impl Error {
    /// Whether another attempt may succeed with nobody doing anything: the way to the master target broke, or it has no
    /// time.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Connect(_) | Error::BrokenOff(_) | Error::Silent(_) => true,
            Error::Handshake(HandshakeError::Io(_)) => true,
            Error::Wire(error) | Error::NotCompared(error) => match error {
                wire::Error::Closed | wire::Error::Truncated | wire::Error::Io { .. } => true,
                // Bytes that were damaged on the way, past what TCP's checksum sees.
                wire::Error::Tls { .. } | wire::Error::PayloadChecksum { .. } => true,
                wire::Error::Peer(refusal) => is_transient(refusal.code),
                wire::Error::Frame(_)
                | wire::Error::Compression { .. }
                | wire::Error::Message(_)
                | wire::Error::Unexpected { .. } => false,
            },
            Error::Refused(refusal) => is_transient(refusal.code),
            Error::Handshake(_)
            | Error::Source(_)
            | Error::Foreign(_)
            | Error::Ended(_)
            | Error::Itself(_)
            | Error::Hints(..)
            | Error::Broken(_)
            | Error::Together(_)
            | Error::Still(_)
            | Error::Damaged(_) => false,
        }
    }

    /// Whether somebody may mend it without the sender: a hook or a freeze that failed, no room, what another disk failed of. A
    /// read that hangs is no such thing: each attempt would leave a thread behind that waits for it.
    pub fn is_passing(&self) -> bool {
        if let Error::Source(source::Error::Hangs(..)) = self {
            return false;
        }
        matches!(self, Error::Still(_) | Error::Together(_) | Error::Source(_) | Error::Hints(..))
            || self.code() == Some(Code::NoSpace)
    }

    /// What the master target called it, where it said so.
    pub(super) fn code(&self) -> Option<Code> {
        match self {
            Error::Refused(refusal)
            | Error::Ended(refusal)
            | Error::Wire(wire::Error::Peer(refusal))
            | Error::NotCompared(wire::Error::Peer(refusal)) => Some(refusal.code),
            _ => None,
        }
    }
}

impl From<HandshakeError> for Error {
    fn from(error: HandshakeError) -> Error {
        match error {
            HandshakeError::ForeignCertificate(_)
            | HandshakeError::NotTls(_)
            | HandshakeError::Incompatible(_) => Error::Foreign(error),
            error => Error::Handshake(error),
        }
    }
}

/// A point that another disk, or machine, failed, may be made by the next attempt.
fn is_transient(code: Code) -> bool {
    code.retryable() || code == Code::Incomplete
}
