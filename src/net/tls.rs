//! Who is who: TLS 1.3 with certificates of the agent's own authority.
//!
//! A master target is its own tiny certificate authority ([`server::Identity`]): its clients are the few machines
//! that it protects, each enrolled by hand with a token, so that nobody has to run a PKI first. A client
//! ([`client::Identity`]) trusts that authority and nothing else, under the one name that servers carry,
//! [`SERVER_NAME`]: the host's real name and address may change, the authority may not.
//!
//! *The name of a machine* stands in its certificate as the URI `mt-agent://machine/NAME` among the subject
//! alternative names. Not as a common name: that is free text which RFC 9525 no longer takes for an identity;
//! and not as a DNS name: a machine's name need not be one, and one could then be enrolled under the name of the
//! server. The common name repeats it for people.
//!
//! *Cipher suites*: AES-128-GCM comes first. Nobody attacks 128 bits, AES-256 costs four more rounds a block,
//! and ChaCha20, the better one without AES instructions, is not needed on hardware that runs virtual machines;
//! it stays on the list for what lacks them.
//!
//! *No resumption*: a connection lasts as long as a pass, so that tickets save nothing; and every connection
//! shows its certificate anew.

pub mod client;
pub mod server;

use std::fmt;
use std::hint::black_box;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, CertificateError};
use sha2::{Digest, Sha256};

use crate::name::{Name, ParseNameError};

/// The DNS name in every server's certificate. `.internal` is reserved for private use and resolves nowhere.
pub const SERVER_NAME: &str = "mt-agent.internal";

/// The application protocol (RFC 7301): a TLS client that comes for something else is told so in the handshake.
pub const ALPN: &[u8] = b"mt-agent";

const MACHINE_URI: &str = "mt-agent://machine/";

/// [`SERVER_NAME`] as rustls takes it.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("SERVER_NAME is a DNS name")
}

fn provider() -> Arc<CryptoProvider> {
    let cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(CryptoProvider { cipher_suites, ..default_provider() })
}

/// The SHA-256 of a certificate's DER form.
#[derive(Clone, Copy)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Fingerprint {
        Fingerprint(Sha256::digest(certificate).into())
    }
}

impl PartialEq for Fingerprint {
    fn eq(&self, other: &Fingerprint) -> bool {
        same(&self.0, &other.0)
    }
}

impl Eq for Fingerprint {}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether two digests are equal, in a time that does not depend on where they differ.
pub(super) fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let differing = a.iter().zip(b).fold(0, |seen, (a, b)| black_box(seen | (a ^ b)));
    differing == 0
}

/// The certificate of a peer names no machine.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// It cannot be read. One that passed the handshake can.
    #[error("the client's certificate cannot be read")]
    Unreadable(#[source] webpki::Error),
    /// It has not exactly one name of a machine.
    #[error("the client's certificate names {0} machines, not one: enrol the machine again")]
    Count(usize),
    /// The name is none.
    #[error("the client's certificate names no valid machine")]
    Name(#[from] ParseNameError),
}

/// The machine that a connection's client certificates speak for, or `None` on a connection without any (which may
/// do nothing but enrol).
///
/// `peer` is what rustls gives after the handshake, so that the chain is verified; here it is only read, and by the
/// library that verified it, so that the two cannot disagree about what it says.
///
/// # Errors
/// Where the certificate does not name exactly one valid machine.
pub fn machine_of(peer: Option<&[CertificateDer<'_>]>) -> Result<Option<Name>, NameError> {
    let Some(leaf) = peer.and_then(|chain| chain.first()) else {
        return Ok(None);
    };
    let leaf = webpki::EndEntityCert::try_from(leaf).map_err(NameError::Unreadable)?;
    let mut names = leaf.valid_uri_names().filter_map(|uri| uri.strip_prefix(MACHINE_URI));
    let (first, more) = (names.next(), names.count());
    match (first, more) {
        (Some(name), 0) => Ok(Some(Name::from_str(name)?)),
        (first, more) => Err(NameError::Count(usize::from(first.is_some()) + more)),
    }
}

/// Why there is no TLS connection, by what the people on both sides can do about it.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The peer does not speak TLS at all.
    #[error("the peer does not speak TLS: plain text or another protocol came on this port")]
    NotTls(#[source] rustls::Error),
    /// Nothing in common: an old TLS, or a client of another protocol.
    #[error("the peer does not offer TLS 1.3 for mt-agent")]
    Incompatible(#[source] rustls::Error),
    /// The certificate that the peer showed is not acceptable.
    #[error("the peer's certificate was not issued for this connection")]
    ForeignCertificate(#[source] rustls::Error),
    /// The server is not the one that the token names.
    #[error(
        "the server is not the one that made the token: check the address, whether something answers in its place, \
         and that the token was made with the configuration (`--config`, `--state-dir`) of the service"
    )]
    WrongServer,
    /// The certificate that the peer showed is out of its time.
    #[error("the peer's certificate is not valid at this time: check the clocks of both machines")]
    OutOfTime(#[source] rustls::Error),
    /// The peer does not accept our certificate.
    #[error(
        "the peer does not accept the certificate that it was shown: enrol the machine again, with a token of the \
         service that listens there"
    )]
    CertificateRefused(#[source] rustls::Error),
    /// Another failure of TLS.
    #[error("TLS failed")]
    Tls(#[source] rustls::Error),
    /// The connection itself failed.
    #[error("the connection failed during the TLS handshake")]
    Io(#[source] io::Error),
}

impl HandshakeError {
    /// Whether the two sides do not belong together (yet), rather than that the connection failed.
    pub fn is_refusal(&self) -> bool {
        match self {
            HandshakeError::NotTls(_)
            | HandshakeError::Incompatible(_)
            | HandshakeError::ForeignCertificate(_)
            | HandshakeError::WrongServer
            | HandshakeError::OutOfTime(_)
            | HandshakeError::CertificateRefused(_) => true,
            HandshakeError::Tls(_) | HandshakeError::Io(_) => false,
        }
    }
}

impl From<rustls::Error> for HandshakeError {
    fn from(error: rustls::Error) -> HandshakeError {
        use rustls::Error as E;
        match error {
            E::InvalidMessage(_) => HandshakeError::NotTls(error),
            E::PeerIncompatible(_) | E::NoApplicationProtocol => HandshakeError::Incompatible(error),
            E::AlertReceived(AlertDescription::ProtocolVersion | AlertDescription::NoApplicationProtocol) => {
                HandshakeError::Incompatible(error)
            }
            E::AlertReceived(
                AlertDescription::UnknownCA
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateRevoked
                | AlertDescription::DecryptError
                | AlertDescription::AccessDenied,
            ) => HandshakeError::CertificateRefused(error),
            E::InvalidCertificate(CertificateError::Other(ref other))
                if other.0.is::<client::UnexpectedServer>() =>
            {
                HandshakeError::WrongServer
            }
            E::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            ) => HandshakeError::OutOfTime(error),
            E::InvalidCertificate(_) => HandshakeError::ForeignCertificate(error),
            error => HandshakeError::Tls(error),
        }
    }
}

impl From<io::Error> for HandshakeError {
    /// rustls wraps its errors in those of I/O; this takes them out again.
    fn from(error: io::Error) -> HandshakeError {
        match error.downcast::<rustls::Error>() {
            Ok(error) => error.into(),
            Err(error) => HandshakeError::Io(error),
        }
    }
}
