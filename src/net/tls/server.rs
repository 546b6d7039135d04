//! The master target's keys: its authority, and the certificate that its service shows.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use time::{Duration, OffsetDateTime};

use super::{ALPN, Fingerprint, MACHINE_URI, SERVER_NAME, provider};
use crate::durable;
use crate::error::IoError;
use crate::name::Name;

/// The directory below the state directory.
const DIR: &str = "tls";
/// Its files. The directory appears whole or not at all, so that one without the other was taken away by hand.
const CA_KEY: &str = "ca.key";
const CA_CERT: &str = "ca.pem";
const SERVER_KEY: &str = "server.key";
const SERVER_CERT: &str = "server.pem";
/// A key or a certificate is far smaller, in bytes.
const MAX_FILE: u64 = 64 << 10;

/// How long certificates hold. Nothing renews them: an end in the middle of a failback would hurt more than a
/// short life protects, since what a machine may write to is decided by its assignments, not by its certificate.
/// The authority and its server, created together, outlive every client that is likely to be issued.
const AUTHORITY_LIFE: Duration = Duration::days(30 * 365);
const CLIENT_LIFE: Duration = Duration::days(10 * 365);
/// Certificates begin a day early: the clock of a machine that was just failed over may be off.
const CLOCK_SKEW: Duration = Duration::days(1);

/// Why the keys cannot be used, or a certificate not be issued.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing them failed.
    #[error("the server's keys are not accessible")]
    Io(#[from] IoError),
    /// Others may read a private key.
    #[error(
        "{path} may be read by others (mode {mode:04o}): run `chmod 600 {path}`, and if others had access, remove its directory and enrol all machines again"
    )]
    Exposed {
        /// The key's file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Some files are there and some are not.
    #[error(
        "{missing} is missing: restore it, or remove its directory to begin anew and enrol all machines again"
    )]
    Incomplete {
        /// The first one that is missing.
        missing: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no usable key or certificate: restore it from a backup")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A client's certificate request that cannot be granted.
    #[error("the certificate request is not usable")]
    Request(#[source] rcgen::Error),
    /// Keys could not be generated or used.
    #[error("making keys and certificates failed")]
    Crypto(#[source] Box<dyn std::error::Error + Send + Sync>),
}

fn crypto(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Crypto(error.into())
}

/// The authority and the server's certificate, loaded.
pub struct Identity {
    issuer: Issuer<'static, KeyPair>,
    ca: CertificateDer<'static>,
    ca_pem: String,
    server: CertificateDer<'static>,
    server_key: PrivateKeyDer<'static>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("fingerprint", &self.fingerprint()).finish_non_exhaustive()
    }
}

impl Identity {
    /// The identity under `state_dir`, created at the first call. Blocking.
    ///
    /// Several processes may call it at once: a lock lets one create it and the others load the same.
    ///
    /// # Errors
    /// Everything but [`Error::Request`]. Nothing that exists is ever replaced.
    pub fn load_or_create(state_dir: &Path) -> Result<Identity, Error> {
        durable::private_dir(state_dir)?;
        let _lock = durable::lock(&state_dir.join("tls.lock"))?;
        let dir = state_dir.join(DIR);
        if !dir.try_exists().map_err(|error| IoError::new("look for", dir.display().to_string(), error))? {
            create(state_dir, &dir)?;
        }
        load(&dir)
    }

    /// The fingerprint of the certificate that the service shows.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.server)
    }

    /// The authority's certificate, in PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// What the service accepts connections with: TLS 1.3 only, and a client certificate of this authority or none.
    ///
    /// # Errors
    /// [`Error::Crypto`], where the keys do not belong together.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>, Error> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).map_err(crypto)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            // A machine without a certificate must be able to ask for one.
            .allow_unauthenticated()
            .build()
            .map_err(crypto)?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(crypto)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.server.clone()], self.server_key.clone_key())
            .map_err(crypto)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// A certificate, in PEM, for the public key of `request` (PKCS #10 in PEM) that speaks for `machine`.
    ///
    /// All else that the request asks for is passed over: what a certificate says is for the server to decide.
    /// That the request is signed with its own key is verified.
    ///
    /// # Errors
    /// [`Error::Request`] or [`Error::Crypto`].
    pub fn issue_client(&self, request: &str, machine: &Name, now: OffsetDateTime) -> Result<String, Error> {
        let key = CertificateSigningRequestParams::from_pem(request).map_err(Error::Request)?.public_key;
        let uri = Ia5String::try_from(format!("{MACHINE_URI}{machine}")).map_err(crypto)?;
        let mut params = params(machine.as_str(), now, CLIENT_LIFE)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(&key, &self.issuer).map_err(crypto)?.pem())
    }
}

/// What all certificates have in common.
fn params(name: &str, now: OffsetDateTime, life: Duration) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + life;
    // Random and positive (RFC 5280, section 4.1.2.2): 126 bits of randomness, and the first byte never 0.
    let mut serial = [0; 16];
    getrandom::fill(&mut serial).map_err(crypto)?;
    serial[0] = serial[0] & 0x3f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

/// Makes all files in a directory beside `dir` and then gives it that name: a crash leaves all of them or none.
fn create(state_dir: &Path, dir: &Path) -> Result<(), Error> {
    let now = OffsetDateTime::now_utc();
    let ca_key = KeyPair::generate().map_err(crypto)?;
    let mut ca = params("mt-agent authority", now, AUTHORITY_LIFE)?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_cert = ca.self_signed(&ca_key).map_err(crypto)?;
    let ca_key_pem = ca_key.serialize_pem();
    let issuer = Issuer::new(ca, ca_key);

    let server_key = KeyPair::generate().map_err(crypto)?;
    let mut server = params(SERVER_NAME, now, AUTHORITY_LIFE)?;
    server.subject_alt_names = vec![SanType::DnsName(Ia5String::try_from(SERVER_NAME).map_err(crypto)?)];
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.use_authority_key_identifier_extension = true;
    let server_cert = server.signed_by(&server_key, &issuer).map_err(crypto)?;

    let new = state_dir.join(format!(".{DIR}.new"));
    match fs::remove_dir_all(&new) {
        // Left by a crash: the lock is ours, so that nobody else is at it.
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(IoError::new("remove", new.display().to_string(), error).into()),
    }
    durable::private_dir(&new)?;
    durable::create(&new.join(CA_KEY), ca_key_pem.as_bytes(), 0o600)?;
    durable::create(&new.join(CA_CERT), ca_cert.pem().as_bytes(), 0o644)?;
    durable::create(&new.join(SERVER_KEY), server_key.serialize_pem().as_bytes(), 0o600)?;
    durable::create(&new.join(SERVER_CERT), server_cert.pem().as_bytes(), 0o644)?;
    durable::sync_dir(&new)?;
    Ok(durable::rename(&new, dir)?)
}

fn load(dir: &Path) -> Result<Identity, Error> {
    let [ca_key, ca_pem, server_key, server_pem] =
        [CA_KEY, CA_CERT, SERVER_KEY, SERVER_CERT].map(|file| dir.join(file));
    let ca_key_text = text(&ca_key)?;
    let ca_text = text(&ca_pem)?;
    let server_key_text = text(&server_key)?;
    let server_text = text(&server_pem)?;

    let key = KeyPair::from_pem(&ca_key_text).map_err(corrupt(&ca_key))?;
    let authority_key = key.subject_public_key_info();
    let issuer = Issuer::from_ca_cert_pem(&ca_text, key).map_err(corrupt(&ca_pem))?;
    let ca = CertificateDer::from_pem_slice(ca_text.as_bytes()).map_err(corrupt(&ca_pem))?;
    let server = CertificateDer::from_pem_slice(server_text.as_bytes()).map_err(corrupt(&server_pem))?;
    let key = KeyPair::from_pem(&server_key_text).map_err(corrupt(&server_key))?;
    let serving_key = key.subject_public_key_info();
    let secret = PrivateKeyDer::from_pem_slice(server_key_text.as_bytes()).map_err(corrupt(&server_key))?;
    // That they belong together is found here, and not by every client at its handshake.
    if public_key(&ca).map_err(corrupt(&ca_pem))? != authority_key {
        return Err(corrupt(&ca_pem)("it is not the certificate of ca.key"));
    }
    if public_key(&server).map_err(corrupt(&server_pem))? != serving_key {
        return Err(corrupt(&server_key)("it is not the key of server.pem"));
    }
    serves_under(&server, &ca).map_err(corrupt(&server_pem))?;
    Ok(Identity { issuer, ca, ca_pem: ca_text, server, server_key: secret })
}

/// The public key in a certificate.
fn public_key(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, webpki::Error> {
    Ok(webpki::EndEntityCert::try_from(certificate)?.subject_public_key_info().to_vec())
}

/// Whether clients will take `server` for a server of the authority `ca`.
fn serves_under(server: &CertificateDer<'_>, ca: &CertificateDer<'_>) -> Result<(), webpki::Error> {
    let anchors = [webpki::anchor_from_trusted_cert(ca)?];
    let leaf = webpki::EndEntityCert::try_from(server)?;
    let algorithms = provider().signature_verification_algorithms.all;
    let usage = webpki::KeyUsage::server_auth();
    leaf.verify_for_usage(algorithms, &anchors, &[], UnixTime::now(), usage, None, None)?;
    leaf.verify_is_valid_for_subject_name(&super::server_name())
}

fn corrupt<E: Into<Box<dyn std::error::Error + Send + Sync>>>(path: &Path) -> impl FnOnce(E) -> Error + '_ {
    move |source| Error::Corrupt { path: path.to_owned(), source: source.into() }
}

fn text(path: &Path) -> Result<String, Error> {
    if path.extension().is_some_and(|extension| extension == "key") {
        refuse_exposed(path)?;
    }
    let bytes = durable::read(path, MAX_FILE).map_err(|error| missing(path, error))?;
    String::from_utf8(bytes).map_err(corrupt(path))
}

fn refuse_exposed(path: &Path) -> Result<(), Error> {
    let metadata = fs::metadata(path)
        .map_err(|error| missing(path, IoError::new("look at", path.display().to_string(), error)))?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 { Err(Error::Exposed { path: path.to_owned(), mode }) } else { Ok(()) }
}

fn missing(path: &Path, error: IoError) -> Error {
    if error.source.kind() == io::ErrorKind::NotFound {
        Error::Incomplete { missing: path.to_owned() }
    } else {
        error.into()
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;

    use super::super::{NameError, machine_of};
    use super::*;

    fn mode(path: PathBuf) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn csr(params: CertificateParams) -> String {
        params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
    }

    fn der(pem: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
    }

    #[test]
    fn it_is_created_once_with_private_keys() {
        let state = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(state.path()).unwrap();
        let again = Identity::load_or_create(state.path()).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        assert_eq!(first.ca_pem(), again.ca_pem());
        again.server_config().unwrap();
        let dir = state.path().join(DIR);
        assert_eq!(mode(dir.clone()), 0o700);
        assert_eq!([mode(dir.join(CA_KEY)), mode(dir.join(SERVER_KEY))], [0o600; 2]);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 4);
    }

    #[test]
    fn many_at_once_create_one() {
        let state = tempfile::tempdir().unwrap();
        let prints: Vec<Fingerprint> = std::thread::scope(|scope| {
            let start = || Identity::load_or_create(state.path()).unwrap().fingerprint();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(prints.iter().all(|print| *print == prints[0]));
    }

    #[test]
    fn what_a_crash_left_of_its_creation_is_no_obstacle() {
        let state = tempfile::tempdir().unwrap();
        let new = state.path().join(".tls.new");
        fs::create_dir(&new).unwrap();
        fs::write(new.join(CA_KEY), "half a k").unwrap();
        Identity::load_or_create(state.path()).unwrap();
        assert!(!new.exists());
    }

    #[test]
    fn exposed_missing_and_damaged_files_are_named_and_left_alone() {
        for file in [CA_KEY, CA_CERT, SERVER_KEY, SERVER_CERT] {
            let state = tempfile::tempdir().unwrap();
            Identity::load_or_create(state.path()).unwrap();
            let path = state.path().join(DIR).join(file);
            if file.ends_with("key") {
                for exposed in [0o640, 0o604, 0o601] {
                    fs::set_permissions(&path, fs::Permissions::from_mode(exposed)).unwrap();
                    match Identity::load_or_create(state.path()) {
                        Err(Error::Exposed { path: found, mode }) => {
                            assert_eq!((found, mode), (path.clone(), exposed))
                        }
                        other => panic!("{file}: {other:?}"),
                    }
                }
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            }
            let whole = fs::read(&path).unwrap();
            fs::write(&path, &whole[..whole.len() / 2]).unwrap();
            match Identity::load_or_create(state.path()) {
                Err(Error::Corrupt { path: found, .. }) => assert_eq!(found, path),
                other => panic!("{file}: {other:?}"),
            }
            assert_eq!(fs::read(&path).unwrap().len(), whole.len() / 2);
            fs::remove_file(&path).unwrap();
            match Identity::load_or_create(state.path()) {
                Err(Error::Incomplete { missing }) => assert_eq!(missing, path),
                other => panic!("{file}: {other:?}"),
            }
        }
    }

    #[test]
    fn files_that_do_not_belong_together_are_named() {
        let other = tempfile::tempdir().unwrap();
        Identity::load_or_create(other.path()).unwrap();
        // Each is sound, and of another authority.
        let foreign = [
            (&[CA_KEY][..], CA_CERT),
            (&[CA_CERT], CA_CERT),
            (&[CA_KEY, CA_CERT], SERVER_CERT),
            (&[SERVER_KEY], SERVER_KEY),
            (&[SERVER_CERT], SERVER_KEY),
            (&[SERVER_KEY, SERVER_CERT], SERVER_CERT),
        ];
        for (files, named) in foreign {
            let state = tempfile::tempdir().unwrap();
            Identity::load_or_create(state.path()).unwrap();
            for file in files {
                fs::copy(other.path().join(DIR).join(file), state.path().join(DIR).join(file)).unwrap();
            }
            match Identity::load_or_create(state.path()) {
                Err(Error::Corrupt { path, .. }) => assert_eq!(path, state.path().join(DIR).join(named)),
                other => panic!("{files:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_damaged_certificate_of_the_server_is_not_shown_to_anyone() {
        let state = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(state.path()).unwrap();
        let path = state.path().join(DIR).join(SERVER_CERT);
        let write = |der: &[u8]| {
            let base64 = base64::engine::general_purpose::STANDARD.encode(der);
            fs::write(
                &path,
                format!(
                    "-----BEGIN CERTIFICATE-----
{base64}
-----END CERTIFICATE-----
"
                ),
            )
            .unwrap();
        };
        write(&identity.server);
        Identity::load_or_create(state.path()).unwrap();
        for at in 0..identity.server.len() {
            let mut damaged = identity.server.to_vec();
            damaged[at] ^= 1;
            write(&damaged);
            assert!(
                matches!(Identity::load_or_create(state.path()), Err(Error::Corrupt { .. })),
                "byte {at}"
            );
        }
    }

    #[test]
    fn a_certificate_says_what_the_server_decides_and_nothing_of_the_request() {
        let state = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(state.path()).unwrap();
        let now = OffsetDateTime::now_utc();
        let mut wish = CertificateParams::new(vec![SERVER_NAME.to_owned()]).unwrap();
        let uri = Ia5String::try_from(format!("{MACHINE_URI}other")).unwrap();
        wish.subject_alt_names.push(SanType::URI(uri));
        wish.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let machine: Name = "web-01".parse().unwrap();
        let issued = der(&identity.issue_client(&csr(wish), &machine, now).unwrap());
        assert_eq!(machine_of(Some(std::slice::from_ref(&issued))).unwrap(), Some(machine.clone()));
        let leaf = webpki::EndEntityCert::try_from(&issued).unwrap();
        assert_eq!(leaf.valid_dns_names().count(), 0);
        let anchor = webpki::anchor_from_trusted_cert(&identity.ca).unwrap();
        let valid = |usage, at: OffsetDateTime| {
            let at = std::time::Duration::from_secs(at.unix_timestamp().try_into().unwrap());
            let at = rustls::pki_types::UnixTime::since_unix_epoch(at);
            let anchors = std::slice::from_ref(&anchor);
            let algorithms = provider().signature_verification_algorithms.all;
            leaf.verify_for_usage(algorithms, anchors, &[], at, usage, None, None).map(|_| ())
        };
        let client = webpki::KeyUsage::client_auth;
        assert_eq!(valid(client(), now), Ok(()));
        assert_eq!(valid(client(), now - Duration::hours(23)), Ok(()));
        assert!(matches!(
            valid(client(), now - Duration::hours(25)),
            Err(webpki::Error::CertNotValidYet { .. })
        ));
        assert_eq!(valid(client(), now + Duration::days(9 * 365)), Ok(()));
        assert!(matches!(
            valid(client(), now + Duration::days(11 * 365)),
            Err(webpki::Error::CertExpired { .. })
        ));
        assert!(valid(webpki::KeyUsage::server_auth(), now).is_err(), "a machine could pass for the server");
        // The same key again: another serial number.
        let request = csr(CertificateParams::default());
        let serial = || {
            let issued = der(&identity.issue_client(&request, &machine, now).unwrap());
            webpki::EndEntityCert::try_from(&issued).unwrap().serial().to_vec()
        };
        let (a, b) = (serial(), serial());
        assert!(a != b && a.len() == 16 && b.len() == 16, "{a:?} {b:?}");
    }

    #[test]
    fn bad_requests_are_refused() {
        let state = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(state.path()).unwrap();
        let machine: Name = "web-01".parse().unwrap();
        let good = csr(CertificateParams::default());
        // The last of the base64 is in the signature.
        let at = good.rfind("-----END").unwrap() - 8;
        let mut forged = good.clone();
        forged.replace_range(at..=at, if &good[at..=at] == "A" { "B" } else { "A" });
        for bad in ["", "hello", &good[..good.len() / 2], &forged] {
            let result = identity.issue_client(bad, &machine, OffsetDateTime::now_utc());
            assert!(matches!(result, Err(Error::Request(_))), "{bad}");
        }
    }

    #[test]
    fn a_certificate_without_exactly_one_machine_names_none() {
        let named = |uris: &[&str]| {
            let mut params = CertificateParams::default();
            let uri = |uri: &&str| SanType::URI(Ia5String::try_from(uri.to_string()).unwrap());
            params.subject_alt_names = uris.iter().map(uri).collect();
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            machine_of(Some(&[certificate.der().clone()]))
        };
        assert_eq!(machine_of(None).unwrap(), None);
        assert_eq!(machine_of(Some(&[])).unwrap(), None);
        assert_eq!(
            named(&["https://example.org", "mt-agent://machine/a"]).unwrap(),
            Some("a".parse().unwrap())
        );
        assert!(matches!(named(&[]), Err(NameError::Count(0))));
        assert!(matches!(named(&["mt-agent://machine/a", "mt-agent://machine/b"]), Err(NameError::Count(2))));
        assert!(matches!(named(&["mt-agent://machine/../etc"]), Err(NameError::Name(_))));
        assert!(matches!(machine_of(Some(&[vec![1, 2].into()])), Err(NameError::Unreadable(_))));
    }
}
