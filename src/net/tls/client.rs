//! The source's side: a machine's certificate, and the one connection that is made before there is one.

use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, PeerIncompatible, RootCertStore,
    SignatureScheme,
};
use serde::{Deserialize, Serialize};

use super::{ALPN, Fingerprint, NameError, machine_of, provider, server_name};
use crate::durable;
use crate::error::IoError;
use crate::name::Name;

/// The directory below the state directory.
const DIR: &str = "send";
/// An identity is far smaller, in bytes.
const MAX_FILE: u64 = 256 << 10;

/// Why a machine's identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine is not enrolled.
    #[error(
        "the machine {machine} is not enrolled here ({path} is missing): run `mt-agent token create {machine}` on the master target, and `mt-agent enroll TOKEN` here"
    )]
    NotEnrolled {
        /// The machine.
        machine: Name,
        /// Where its identity would be.
        path: PathBuf,
    },
    /// Reading or writing it failed.
    #[error("the identity of the machine is not accessible")]
    Io(#[from] IoError),
    /// Others may read the private key.
    #[error(
        "{path} may be read by others (mode {mode:04o}): run `chmod 600 {path}`, and if others had access, enrol the machine again"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The file, or what the server sent, does not hold what it should.
    #[error("the identity of the machine is not usable: enrol it again")]
    Corrupt(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The certificate is another machine's.
    #[error("the certificate is for the machine {found}, not {wanted}")]
    OtherMachine {
        /// The machine it is for.
        found: Name,
        /// The machine it should be for.
        wanted: Name,
    },
}

fn corrupt(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Corrupt(error.into())
}

/// A machine's key and certificate, and the authority that it trusts.
///
/// All of it is one file, `send/MACHINE.json` under the state directory and 0600, so that enrolling again replaces it
/// whole or not at all.
#[derive(Clone, Serialize, Deserialize)]
pub struct Identity {
    /// The machine.
    pub machine: Name,
    /// Where its master target was when it was enrolled: `HOST:PORT`.
    pub server: String,
    /// The certificate of the master target's authority, in PEM.
    pub ca: String,
    /// The machine's certificate, in PEM.
    pub certificate: String,
    /// The machine's private key, in PEM (PKCS #8).
    pub key: String,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Identity { machine, server, .. } = self;
        f.debug_struct("Identity").field("machine", machine).field("server", server).finish_non_exhaustive()
    }
}

impl Identity {
    /// Where the identity of `machine` is kept.
    pub fn path(state_dir: &Path, machine: &Name) -> PathBuf {
        state_dir.join(DIR).join(format!("{machine}.json"))
    }

    /// The identity of `machine`. Blocking.
    ///
    /// # Errors
    /// [`Error::NotEnrolled`] where there is none; all others too.
    pub fn load(state_dir: &Path, machine: &Name) -> Result<Identity, Error> {
        let path = Identity::path(state_dir, machine);
        let mode = match fs::metadata(&path) {
            Ok(metadata) => metadata.permissions().mode() & 0o7777,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NotEnrolled { machine: machine.clone(), path });
            }
            Err(error) => return Err(IoError::new("look at", path.display().to_string(), error).into()),
        };
        if mode & 0o077 != 0 {
            return Err(Error::Exposed { path, mode });
        }
        let identity: Identity = serde_json::from_slice(&durable::read(&path, MAX_FILE)?).map_err(corrupt)?;
        identity.check(machine)?;
        Ok(identity)
    }

    /// Tries whether an identity of `machine` could be kept, so that a token is not spent on one that cannot. Blocking.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(in crate::net) fn rehearse(state_dir: &Path, machine: &Name) -> Result<(), Error> {
        durable::private_dir(state_dir)?;
        // An identity is smaller than this, and a directory for it.
        let path = state_dir.join(format!(".{machine}.room"));
        durable::write(&path, &[b'\n'; 16 << 10], 0o600)?;
        Ok(durable::remove(&path)?)
    }

    /// Keeps the identity, in place of an earlier one of the same machine. Blocking.
    ///
    /// # Errors
    /// [`Error::Io`]; an earlier identity is then still there.
    pub fn save(&self, state_dir: &Path) -> Result<PathBuf, Error> {
        let path = Identity::path(state_dir, &self.machine);
        durable::private_dir(&state_dir.join(DIR))?;
        durable::write(&path, &serde_json::to_vec_pretty(self).map_err(corrupt)?, 0o600)?;
        Ok(path)
    }

    /// Whether all parts fit each other and `machine`.
    pub(in crate::net) fn check(&self, machine: &Name) -> Result<(), Error> {
        self.client_config()?;
        let chain = self.chain()?;
        match machine_of(Some(&chain)).map_err(|error: NameError| corrupt(error))? {
            Some(found) if found == *machine && self.machine == *machine => Ok(()),
            Some(found) => Err(Error::OtherMachine { found, wanted: machine.clone() }),
            None => Err(corrupt("no certificate in it")),
        }
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        CertificateDer::pem_slice_iter(self.certificate.as_bytes()).collect::<Result<_, _>>().map_err(corrupt)
    }

    /// What verifies the master target: its authority and the name of servers.
    pub(in crate::net) fn verifier(&self) -> Result<Arc<WebPkiServerVerifier>, Error> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.ca.as_bytes()) {
            roots.add(certificate.map_err(corrupt)?).map_err(corrupt)?;
        }
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build().map_err(corrupt)
    }

    /// What to connect to the master target with; connect to the name [`server_name`].
    ///
    /// # Errors
    /// [`Error::Corrupt`], where certificate, key and authority cannot be read or do not fit.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>, Error> {
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(corrupt)?;
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(corrupt)?
            .with_webpki_verifier(self.verifier()?)
            .with_client_auth_cert(self.chain()?, key)
            .map_err(corrupt)?;
        Ok(finished(config))
    }
}

fn finished(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

/// What to connect with for enrolment only: no certificate of one's own, and the server's is known by its
/// fingerprint alone.
pub fn pinning_config(fingerprint: Fingerprint) -> Arc<ClientConfig> {
    let provider = provider();
    let verifier = Pinned { fingerprint, provider: provider.clone() };
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has cipher suites of TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    finished(config)
}

/// The server's certificate is not the expected one.
#[derive(Debug, thiserror::Error)]
#[error("the server's certificate has the fingerprint {found}, and the token says {expected}")]
pub struct UnexpectedServer {
    /// The fingerprint of the certificate that the server showed.
    pub found: Fingerprint,
    /// That of the certificate that it should have shown.
    pub expected: Fingerprint,
}

/// Takes one certificate and no other. Names and dates do not matter: the fingerprint came from the server itself,
/// by a way that the user trusts. That the server holds the certificate's key is verified as always.
#[derive(Debug)]
struct Pinned {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = Fingerprint::of(end_entity);
        if found == self.fingerprint {
            return Ok(ServerCertVerified::assertion());
        }
        let error = UnexpectedServer { found, expected: self.fingerprint };
        Err(CertificateError::Other(OtherError(Arc::new(error))).into())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether the server of an enrolment is one that `identity` will trust from now on.
pub(in crate::net) fn trusts(
    identity: &Identity,
    server: Option<&[CertificateDer<'_>]>,
) -> Result<(), Error> {
    let (leaf, rest) = server
        .and_then(|chain| chain.split_first())
        .ok_or_else(|| corrupt("the server showed no certificate"))?;
    let verifier = identity.verifier()?;
    verifier.verify_server_cert(leaf, rest, &server_name(), &[], UnixTime::now()).map_err(corrupt)?;
    Ok(())
}
