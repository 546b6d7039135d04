//! Enrolment: a machine proves the secret of a token and gets a certificate. See [`crate::net`] for the messages.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::message::{self, Code, Enroll, EnrollReply, Hello, HelloReply};
use super::tls::{HandshakeError, client, server, server_name};
use super::token::{Refusal, Secret, Token, TokenStore};
use super::wire;
use crate::error::IoError;
use crate::name::Name;
use crate::units::rfc3339;

/// How long a client does well to wait for each of the connection with its handshake, and the answer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Why a machine was not enrolled, on its own side.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The token's time is over, by this machine's clock.
    #[error(
        "the token expired at {}: make a new one with `mt-agent token create` on the master target (or set this machine's clock)", rfc3339(*at)
    )]
    Expired {
        /// When.
        at: OffsetDateTime,
    },
    /// The server does not answer.
    #[error(
        "no connection to the master target: check its address, that `mt-agent serve` runs there, and the firewalls between"
    )]
    Connect(#[source] IoError),
    /// The server does not answer in time.
    #[error("{server} did not answer within {} seconds ({doing})", patience.as_secs())]
    Timeout {
        /// Its address.
        server: String,
        /// How long it was waited for.
        patience: Duration,
        /// What was going on.
        doing: &'static str,
    },
    /// There is no TLS with it.
    #[error("no secure connection to the master target")]
    Handshake(#[from] HandshakeError),
    /// The server refused, or the conversation failed.
    #[error("enrolment failed")]
    Wire(#[from] wire::Error),
    /// The key or the request could not be made.
    #[error("making a key failed")]
    Key(#[source] rcgen::Error),
    /// What came back is not usable, or could not be kept.
    #[error("the machine's new identity could not be kept")]
    Identity(#[from] client::Error),
}

/// Enrols the machine that `token` names, and keeps its identity under `state_dir`.
///
/// It waits for `patience` ([`PATIENCE`]) at most, for the connection and then for the answer. The key is made
/// here and never leaves. An identity that the machine had before is replaced, at the very end.
///
/// # Errors
/// The step that failed. After [`Error::Wire`] and [`Error::Identity`] the token may be used up.
pub async fn enroll(token: &Token, state_dir: &Path, patience: Duration) -> Result<PathBuf, Error> {
    if OffsetDateTime::now_utc() >= token.expires {
        return Err(Error::Expired { at: token.expires });
    }
    client::Identity::rehearse(state_dir, &token.machine)?;
    let key = KeyPair::generate().map_err(Error::Key)?;
    let mut params = CertificateParams::default();
    // The server passes over all names in a request, so that none is put in.
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(&key).and_then(|request| request.pem()).map_err(Error::Key)?;

    let server = token.address.to_string();
    let late = |doing| {
        let server = server.clone();
        move |_| Error::Timeout { server, patience, doing }
    };
    let connecting = async {
        let tcp = TcpStream::connect((token.address.host(), token.address.port()))
            .await
            .map_err(|error| Error::Connect(IoError::new("connect to", &server, error)))?;
        let connector = TlsConnector::from(client::pinning_config(token.fingerprint));
        Ok::<_, Error>(connector.connect(server_name(), tcp).await.map_err(HandshakeError::from)?)
    };
    let mut stream = tokio::time::timeout(patience, connecting).await.map_err(late("connecting"))??;

    let asking = async {
        wire::write_message(&mut stream, 0, &Hello::ours()).await?;
        let _: HelloReply = wire::read_message(&mut stream).await?;
        wire::write_message(&mut stream, 0, &Enroll { secret: token.secret.to_base64(), csr }).await?;
        wire::read_message::<EnrollReply, _>(&mut stream).await
    };
    let reply =
        tokio::time::timeout(patience, asking).await.map_err(late("waiting for the certificate"))??;

    let identity = client::Identity {
        machine: token.machine.clone(),
        server,
        ca: reply.ca,
        certificate: reply.certificate,
        key: key.serialize_pem(),
    };
    identity.check(&token.machine)?;
    client::trusts(&identity, stream.get_ref().1.peer_certificates())?;
    Ok(identity.save(state_dir)?)
}

/// Why the server refuses an enrolment.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The token.
    #[error("token refused")]
    Token(#[from] Refusal),
    /// What should be the secret is none.
    #[error("the secret is not one of a token")]
    Malformed,
    /// The request, or the server's keys.
    #[error("no certificate")]
    Certificate(#[from] server::Error),
}

impl Refused {
    /// What to answer the client. It holds nothing of the server's files.
    pub fn to_peer(&self) -> message::Error {
        let again = "make a new one with `mt-agent token create` on the master target";
        match self {
            Refused::Token(Refusal::Failed(error)) => {
                let code = if is_full(error) { Code::NoSpace } else { Code::Io };
                message::Error::new(code, "the token could not be redeemed: see the log of the master target")
            }
            Refused::Token(refusal) => message::Error::new(Code::TokenRefused, format!("{refusal}: {again}")),
            Refused::Malformed => message::Error::new(Code::TokenRefused, format!("{self}: {again}")),
            Refused::Certificate(server::Error::Request(error)) => {
                message::Error::new(Code::BadFrame, format!("the certificate request is not usable: {error}"))
            }
            Refused::Certificate(_) => message::Error::new(
                Code::Internal,
                "no certificate was issued: see the log of the master target",
            ),
        }
    }
}

fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        }
        next = error.source();
    }
    false
}

/// Answers a request to enrol that came from `peer`, on a connection with or without a certificate. Blocking (files).
///
/// The outcome is logged, without the secret. A token is used up only once its request has been found good.
///
/// # Errors
/// Why not; [`Refused::to_peer`] is what the client may know of it.
pub fn handle(
    request: &Enroll,
    peer: SocketAddr,
    tokens: &TokenStore,
    identity: &server::Identity,
    now: OffsetDateTime,
) -> Result<EnrollReply, Refused> {
    match issue(request, tokens, identity, now) {
        Ok(reply) => {
            tracing::info!(%peer, machine = %reply.machine, "machine enrolled");
            Ok(reply)
        }
        Err(refused) => {
            let mut reason = refused.to_string();
            let mut next = std::error::Error::source(&refused);
            while let Some(cause) = next {
                reason = format!("{reason}: {cause}");
                next = cause.source();
            }
            tracing::warn!(%peer, reason, "enrolment refused");
            Err(refused)
        }
    }
}

fn issue(
    request: &Enroll,
    tokens: &TokenStore,
    identity: &server::Identity,
    now: OffsetDateTime,
) -> Result<EnrollReply, Refused> {
    let secret = Secret::from_base64(&request.secret).ok_or(Refused::Malformed)?;
    // First the lookup: only who holds a token gets as far as the parser of certificate requests. Then the
    // certificate, which goes nowhere yet: a bad request does not use the token up. The redemption is last.
    let token = tokens.find(&secret, now)?;
    let certificate = identity.issue_client(&request.csr, token.machine(), now)?;
    let machine: Name = token.redeem()?;
    Ok(EnrollReply { machine, certificate, ca: identity.ca_pem().to_owned() })
}
