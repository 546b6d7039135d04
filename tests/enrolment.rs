//! Enrolment and mutual TLS over real sockets, as a machine and a master target see them.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use mt_agent::name::Name;
use mt_agent::net::address::Address;
use mt_agent::net::enrolment::{self, Error};
use mt_agent::net::message::{self, BeginReply, Code, Enroll, Hello, HelloReply};
use mt_agent::net::tls::{self, Fingerprint, HandshakeError, client, server};
use mt_agent::net::token::{Secret, State, Token, TokenStore};
use mt_agent::net::wire;
use tempfile::TempDir;
use time::{Duration, OffsetDateTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// How one connection ended, seen from the server.
#[derive(Debug)]
enum End {
    Handshake(HandshakeError),
    /// The client went away in the middle of the conversation.
    BrokeOff,
    Enrolled(Name),
    Refused(Code),
    /// A client with a certificate, which speaks for this machine.
    Known(Name),
}

/// A master target that enrols, and answers machines that it knows with `BeginReply`.
struct Target {
    state: TempDir,
    identity: Arc<server::Identity>,
    tokens: TokenStore,
    address: Address,
    ends: mpsc::UnboundedReceiver<End>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Target {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Target {
    async fn start() -> Target {
        Target::issuing_with(None).await
    }

    /// A target that shows its own certificate, and issues those of the authority `other`.
    async fn issuing_with(other: Option<Arc<server::Identity>>) -> Target {
        let state = tempfile::tempdir().unwrap();
        let identity = Arc::new(server::Identity::load_or_create(state.path()).unwrap());
        let tokens = TokenStore::new(state.path());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string().parse().unwrap();
        let (report, ends) = mpsc::unbounded_channel();
        let acceptor = TlsAcceptor::from(identity.server_config().unwrap());
        let (shared, store) = (other.unwrap_or_else(|| identity.clone()), tokens.clone());
        let task = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (acceptor, identity, tokens) = (acceptor.clone(), shared.clone(), store.clone());
                let report = report.clone();
                tokio::spawn(async move {
                    let end = match serve(tcp, acceptor, &identity, &tokens).await {
                        Ok(end) => end,
                        Err(_) => End::BrokeOff,
                    };
                    // A test that has seen enough listens no longer.
                    report.send(end).ok();
                });
            }
        });
        Target { state, identity, tokens, address, ends, task }
    }

    fn token(&self, machine: &str) -> Token {
        self.token_at(machine, OffsetDateTime::now_utc())
    }

    fn token_at(&self, machine: &str, now: OffsetDateTime) -> Token {
        let fingerprint = self.identity.fingerprint();
        let machine = machine.parse().unwrap();
        self.tokens.create(machine, Duration::hours(1), self.address.clone(), fingerprint, now).unwrap()
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect((self.address.host(), self.address.port())).await.unwrap()
    }

    async fn end(&mut self) -> End {
        tokio::time::timeout(std::time::Duration::from_secs(10), self.ends.recv()).await.unwrap().unwrap()
    }
}

async fn serve(
    tcp: TcpStream,
    acceptor: TlsAcceptor,
    identity: &server::Identity,
    tokens: &TokenStore,
) -> Result<End, wire::Error> {
    let peer = tcp.peer_addr().unwrap();
    let mut stream = match acceptor.accept(tcp).await {
        Ok(stream) => stream,
        Err(error) => return Ok(End::Handshake(error.into())),
    };
    let hello: Hello = wire::read_message(&mut stream).await?;
    wire::write_message(&mut stream, 0, &HelloReply::to(&hello).unwrap()).await?;
    if let Some(machine) = tls::machine_of(stream.get_ref().1.peer_certificates()).unwrap() {
        wire::write_message(&mut stream, 0, &BeginReply {}).await?;
        return Ok(End::Known(machine));
    }
    let request: Enroll = wire::read_message(&mut stream).await?;
    let end = match enrolment::handle(&request, peer, tokens, identity, OffsetDateTime::now_utc()) {
        Ok(reply) => {
            wire::write_message(&mut stream, 0, &reply).await?;
            End::Enrolled(reply.machine)
        }
        Err(refused) => {
            let refusal = refused.to_peer();
            wire::write_message(&mut stream, 0, &refusal).await?;
            End::Refused(refusal.code)
        }
    };
    stream.shutdown().await.ok();
    Ok(end)
}

/// Connects as an enrolled machine does, and reads what comes after the greeting.
async fn visit(target: &Target, identity: &client::Identity) -> Result<BeginReply, Error> {
    let connector = TlsConnector::from(identity.client_config().unwrap());
    let mut stream =
        connector.connect(tls::server_name(), target.tcp().await).await.map_err(HandshakeError::from)?;
    wire::write_message(&mut stream, 0, &Hello::ours()).await?;
    let _: HelloReply = wire::read_message(&mut stream).await?;
    Ok(wire::read_message(&mut stream).await?)
}

async fn enroll(token: &Token, state: &Path) -> Result<std::path::PathBuf, Error> {
    enrolment::enroll(token, state, enrolment::PATIENCE).await
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn nothing_kept(state: &Path) {
    assert_eq!(std::fs::read_dir(state).unwrap().count(), 0, "a failed enrolment left something behind");
}

fn refusal(result: Result<std::path::PathBuf, Error>) -> message::Error {
    match result {
        Err(Error::Wire(wire::Error::Peer(refusal))) => refusal,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_enrolled_machine_is_known_by_its_name() {
    let mut target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    let token: Token = target.token("web-01").to_string().parse().unwrap();
    let path = enroll(&token, source.path()).await.unwrap();
    assert!(matches!(target.end().await, End::Enrolled(machine) if machine == name("web-01")));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);

    let identity = client::Identity::load(source.path(), &name("web-01")).unwrap();
    assert_eq!(identity.server, target.address.to_string());
    visit(&target, &identity).await.unwrap();
    assert!(matches!(target.end().await, End::Known(machine) if machine == name("web-01")));
    assert_eq!(target.tokens.list(OffsetDateTime::now_utc()).unwrap()[0].state, State::Used);

    // The private key is nowhere on the server.
    let key = identity.key.lines().nth(1).unwrap();
    for entry in std::fs::read_dir(target.state.path().join("tokens/used")).unwrap() {
        assert!(!std::fs::read_to_string(entry.unwrap().path()).unwrap().contains(key));
    }
}

#[tokio::test]
async fn enrolling_again_replaces_the_identity() {
    let target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    let first = enroll(&target.token("web-01"), source.path()).await.unwrap();
    let old = std::fs::read(&first).unwrap();
    assert_eq!(enroll(&target.token("web-01"), source.path()).await.unwrap(), first);
    assert_ne!(std::fs::read(&first).unwrap(), old);
    assert_eq!(std::fs::read_dir(source.path().join("send")).unwrap().count(), 1);
}

#[tokio::test]
async fn a_used_token_is_refused_and_the_first_identity_stays() {
    let mut target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    let token = target.token("web-01");
    let path = enroll(&token, source.path()).await.unwrap();
    target.end().await;
    let kept = std::fs::read(&path).unwrap();
    let refusal = refusal(enroll(&token, source.path()).await);
    assert_eq!(refusal.code, Code::TokenRefused);
    assert!(refusal.message.contains("used before"), "{refusal}");
    assert!(matches!(target.end().await, End::Refused(Code::TokenRefused)));
    assert_eq!(std::fs::read(&path).unwrap(), kept);
}

#[tokio::test]
async fn two_at_once_with_one_token_are_one_enrolment() {
    let mut target = Target::start().await;
    let token = target.token("web-01");
    let sources = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (a, b) = tokio::join!(enroll(&token, sources[0].path()), enroll(&token, sources[1].path()));
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    assert_eq!(refusal(if a.is_ok() { b } else { a }).code, Code::TokenRefused);
    target.end().await;
    target.end().await;
}

#[tokio::test]
async fn an_expired_token_is_refused_by_both_sides() {
    let mut target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    let mut token = target.token_at("web-01", OffsetDateTime::now_utc() - Duration::hours(2));
    assert!(matches!(enroll(&token, source.path()).await, Err(Error::Expired { .. })));
    // A source whose clock is late, or a token that was tampered with.
    token.expires += Duration::days(1);
    let refusal = refusal(enroll(&token, source.path()).await);
    assert_eq!(refusal.code, Code::TokenRefused);
    assert!(refusal.message.contains("expired"), "{refusal}");
    assert!(matches!(target.end().await, End::Refused(Code::TokenRefused)));
    nothing_kept(source.path());
}

#[tokio::test]
async fn a_wrong_secret_is_refused_and_spoils_nothing() {
    let mut target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    let token = target.token("web-01");
    let wrong = Token { secret: Secret::from_base64(&"A".repeat(43)).unwrap(), ..token.clone() };
    let refusal = refusal(enroll(&wrong, source.path()).await);
    assert_eq!(refusal.code, Code::TokenRefused);
    assert!(refusal.message.contains("unknown"), "{refusal}");
    assert!(matches!(target.end().await, End::Refused(Code::TokenRefused)));
    nothing_kept(source.path());
    enroll(&token, source.path()).await.unwrap();
}

#[tokio::test]
async fn a_token_for_another_machine_gives_no_identity_of_this_one() {
    let target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    let token = Token { machine: name("db-01"), ..target.token("web-01") };
    let error = enroll(&token, source.path()).await.unwrap_err();
    assert!(matches!(error, Error::Identity(client::Error::OtherMachine { .. })), "{error:?}");
    nothing_kept(source.path());
}

#[tokio::test]
async fn another_server_never_sees_the_secret() {
    let mut target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    let token = Token { fingerprint: Fingerprint([0; 32]), ..target.token("web-01") };
    let error = enroll(&token, source.path()).await.unwrap_err();
    assert!(matches!(error, Error::Handshake(HandshakeError::WrongServer)), "{error:?}");
    // The server hears of it in the handshake, before any message.
    let end = target.end().await;
    assert!(
        matches!(end, End::Handshake(HandshakeError::Tls(_) | HandshakeError::CertificateRefused(_))),
        "{end:?}"
    );
    nothing_kept(source.path());
}

#[tokio::test]
async fn a_request_that_is_none_is_refused_and_does_not_use_the_token_up() {
    let mut target = Target::start().await;
    let token = target.token("web-01");
    for (secret, csr, code) in [
        (token.secret.to_base64(), "no request", Code::BadFrame),
        ("short".to_owned(), "no request", Code::TokenRefused),
    ] {
        let connector = TlsConnector::from(client::pinning_config(token.fingerprint));
        let mut stream = connector.connect(tls::server_name(), target.tcp().await).await.unwrap();
        wire::write_message(&mut stream, 0, &Hello::ours()).await.unwrap();
        let _: HelloReply = wire::read_message(&mut stream).await.unwrap();
        let request = Enroll { secret, csr: csr.to_owned() };
        wire::write_message(&mut stream, 0, &request).await.unwrap();
        let refusal: message::Error = wire::read_message(&mut stream).await.unwrap();
        assert_eq!(refusal.code, code);
        assert!(matches!(target.end().await, End::Refused(found) if found == code));
    }
    enroll(&token, tempfile::tempdir().unwrap().path()).await.unwrap();
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_on_both_sides() {
    let [mut here, there] = [Target::start().await, Target::start().await];
    let source = tempfile::tempdir().unwrap();
    enroll(&there.token("web-01"), source.path()).await.unwrap();
    let foreign = client::Identity::load(source.path(), &name("web-01")).unwrap();
    // The client does not trust this server.
    let error = visit(&here, &foreign).await.unwrap_err();
    assert!(matches!(error, Error::Handshake(HandshakeError::ForeignCertificate(_))), "{error:?}");
    here.end().await;
    // And where it does, the server does not trust the client.
    let forced = client::Identity { ca: here.identity.ca_pem().to_owned(), ..foreign };
    let error = visit(&here, &forced).await.unwrap_err();
    assert!(
        matches!(error, Error::Wire(wire::Error::Tls { source: HandshakeError::CertificateRefused(_), .. })),
        "{error:?}"
    );
    let end = here.end().await;
    assert!(matches!(end, End::Handshake(HandshakeError::ForeignCertificate(_))), "{end:?}");
}

#[tokio::test]
async fn a_machines_certificate_does_not_make_a_server() {
    let target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    enroll(&target.token("web-01"), source.path()).await.unwrap();
    let identity = client::Identity::load(source.path(), &name("web-01")).unwrap();
    // An enrolled machine that puts itself in the server's place.
    let pem = |text: &str| rustls::pki_types::CertificateDer::from_pem_slice(text.as_bytes()).unwrap();
    use rustls::pki_types::pem::PemObject;
    let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![pem(&identity.certificate)], key)
        .unwrap();
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let imposter = TlsAcceptor::from(Arc::new(config));
    let connector = TlsConnector::from(identity.client_config().unwrap());
    let (client, _) = tokio::join!(connector.connect(tls::server_name(), ours), imposter.accept(theirs));
    let error = HandshakeError::from(client.expect_err("the imposter was believed"));
    assert!(matches!(error, HandshakeError::ForeignCertificate(_)), "{error:?}");
}

#[tokio::test]
async fn an_authority_that_is_not_the_servers_own_is_not_taken() {
    let other = Target::start().await;
    let target = Target::issuing_with(Some(other.identity.clone())).await;
    let source = tempfile::tempdir().unwrap();
    let error = enroll(&target.token("web-01"), source.path()).await.unwrap_err();
    assert!(matches!(error, Error::Identity(client::Error::Corrupt(_))), "{error:?}");
    nothing_kept(source.path());
}

#[tokio::test]
async fn plain_text_on_the_port_is_named() {
    let mut target = Target::start().await;
    for text in
        [&b"GET / HTTP/1.1\r\nHost: mt\r\n\r\n"[..], b"SSH-2.0-OpenSSH_9.6\r\n", b"MTAG\x01\x01\0\0\0\0\0\0"]
    {
        let mut tcp = target.tcp().await;
        tcp.write_all(text).await.unwrap();
        let end = target.end().await;
        assert!(matches!(end, End::Handshake(HandshakeError::NotTls(_))), "{end:?}");
    }
    // And a peer that goes away at once.
    drop(target.tcp().await);
    assert!(matches!(target.end().await, End::Handshake(HandshakeError::Io(_))));
    // The service goes on for the others.
    enroll(&target.token("web-01"), tempfile::tempdir().unwrap().path()).await.unwrap();
}

/// A ClientHello of RFC 5246, without the extension with which TLS 1.3 is offered.
fn client_hello_of_tls_1_2() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0x11; 32]);
    body.push(0);
    // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256.
    body.extend([0, 2, 0xc0, 0x2b]);
    body.extend([1, 0]);
    // supported_groups: secp256r1; ec_point_formats: uncompressed; signature_algorithms: ecdsa_secp256r1_sha256.
    let extensions: [u8; 22] = [0, 10, 0, 4, 0, 2, 0, 23, 0, 11, 0, 2, 1, 0, 0, 13, 0, 4, 0, 2, 4, 3];
    body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
    body.extend(extensions);
    let len = u16::try_from(body.len()).unwrap();
    let mut record = vec![22, 3, 1];
    record.extend((len + 4).to_be_bytes());
    record.extend([1, 0]);
    record.extend(len.to_be_bytes());
    record.extend(body);
    record
}

#[tokio::test]
async fn a_client_of_tls_1_2_gets_the_alert_for_it() {
    let mut target = Target::start().await;
    let mut tcp = target.tcp().await;
    tcp.write_all(&client_hello_of_tls_1_2()).await.unwrap();
    let mut answer = Vec::new();
    tcp.read_to_end(&mut answer).await.unwrap();
    // A fatal alert, protocol_version (RFC 8446, section 6.2).
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 70]);
    let end = target.end().await;
    assert!(matches!(end, End::Handshake(HandshakeError::Incompatible(_))), "{end:?}");
}

#[tokio::test]
async fn a_client_of_another_protocol_over_tls_is_turned_away() {
    let mut target = Target::start().await;
    let mut config = (*client::pinning_config(target.identity.fingerprint())).clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let error = connector.connect(tls::server_name(), target.tcp().await).await.err().unwrap();
    assert!(matches!(HandshakeError::from(error), HandshakeError::Incompatible(_)));
    assert!(matches!(target.end().await, End::Handshake(HandshakeError::Incompatible(_))));
}

#[tokio::test]
async fn a_server_that_is_not_there_or_hangs_up_is_told_apart() {
    let target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = |address: io::Result<std::net::SocketAddr>| address.unwrap().to_string().parse().unwrap();
    let token = Token { address: at(free.local_addr()), ..target.token("web-01") };
    let (result, _) = tokio::join!(enroll(&token, source.path()), async { free.accept().await.map(drop) });
    assert!(matches!(result, Err(Error::Handshake(HandshakeError::Io(_)))), "{result:?}");
    drop(free);
    let result = enroll(&token, source.path()).await;
    assert!(matches!(result, Err(Error::Connect(_))), "{result:?}");
    nothing_kept(source.path());
}

#[tokio::test]
async fn a_server_that_is_silent_is_not_waited_for_forever() {
    let target = Target::start().await;
    let source = tempfile::tempdir().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string().parse().unwrap();
    let token = Token { address, ..target.token("web-01") };
    let result = enrolment::enroll(&token, source.path(), std::time::Duration::from_millis(200)).await;
    assert!(matches!(result, Err(Error::Timeout { doing: "connecting", .. })), "{result:?}");
}

#[test]
fn an_identity_that_others_can_read_or_that_is_damaged_is_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let source = tempfile::tempdir().unwrap();
    let web = name("web-01");
    let path = runtime.block_on(async {
        let target = Target::start().await;
        enroll(&target.token("web-01"), source.path()).await.unwrap()
    });
    let error = client::Identity::load(source.path(), &name("db-01")).unwrap_err();
    assert!(
        matches!(error, client::Error::NotEnrolled { .. })
            && error.to_string().contains("token create db-01")
    );
    std::fs::copy(&path, path.with_file_name("db-01.json")).unwrap();
    let error = client::Identity::load(source.path(), &name("db-01")).unwrap_err();
    assert!(matches!(error, client::Error::OtherMachine { .. }), "{error:?}");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = client::Identity::load(source.path(), &web).unwrap_err();
    assert!(matches!(error, client::Error::Exposed { mode: 0o644, .. }), "{error:?}");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let whole = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(client::Identity::load(source.path(), &web), Err(client::Error::Corrupt(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_carry_a_token_from_one_machine_to_the_other() {
    let target = Target::start().await;
    let (here, there) = (target.state.path().to_owned(), tempfile::tempdir().unwrap());
    let address = target.address.to_string();
    let run = move |args: &[&str], stdin: &str, code: i32| {
        let output = assert_cmd::Command::cargo_bin("mt-agent")
            .unwrap()
            .args(args)
            .write_stdin(stdin)
            .timeout(std::time::Duration::from_secs(30))
            .assert()
            .code(code)
            .get_output()
            .clone();
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let source = there.path().to_owned();
    tokio::task::spawn_blocking(move || {
        let (here, there) = (here.to_str().unwrap(), source.to_str().unwrap());
        let create = ["token", "create", "web-01", "--address", &address, "--state-dir", here];
        let (token, told) = run(&create, "", 0);
        assert_eq!(token.lines().count(), 1, "standard output is the token alone");
        assert!(told.contains("mt-agent enroll"));
        let (said, _) = run(&["enroll", "-", "--state-dir", there], &token, 0);
        assert!(said.contains("web-01"), "{said}");
        let (_, why) = run(&["enroll", token.trim(), "--state-dir", there], "", 3);
        assert!(why.contains("used before") && why.contains("token create"), "{why}");
        let (_, why) = run(&["enroll", &token[..50], "--state-dir", there], "", 3);
        assert!(why.contains("cut or mistyped"), "{why}");

        let (json, _) = run(&[&create[..], &["--json"]].concat(), "", 0);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["schema_version"], 1);
        assert!(json["token"].as_str().unwrap().parse::<Token>().is_ok());
        let (list, _) = run(&["token", "list", "--json", "--state-dir", here], "", 0);
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let states: Vec<&str> =
            list["tokens"].as_array().unwrap().iter().map(|token| token["state"].as_str().unwrap()).collect();
        assert!(states.contains(&"used") && states.contains(&"waiting"), "{states:?}");
        let waiting =
            list["tokens"].as_array().unwrap().iter().find(|token| token["state"] == "waiting").unwrap();
        let id = waiting["id"].as_str().unwrap();
        let (said, _) = run(&["token", "revoke", id, "--state-dir", here], "", 0);
        assert!(said.contains(id) && said.contains("web-01"), "{said}");
        let revoked = json["token"].as_str().unwrap();
        let (_, why) = run(&["enroll", revoked, "--state-dir", there], "", 3);
        assert!(why.contains("the token was revoked"), "{why}");
        run(&["token", "revoke", id, "--state-dir", here], "", 3);
        let (table, _) = run(&["token", "list", "--state-dir", here], "", 0);
        assert_eq!(table.lines().count(), 3, "{table}");
        assert!(table.contains("used") && table.contains("revoked"), "{table}");
        let empty = format!("{there}/none");
        let (none, _) = run(&["token", "list", "--state-dir", &empty], "", 0);
        assert!(none.contains("no tokens"), "{none}");
        // The port that is configured, where none is given: with this host's name, and with another.
        let config = format!("{there}/mt-agent.toml");
        let made = |listen: &str, more: &[&str], code: i32| {
            std::fs::write(&config, format!("listen = \"{listen}\"\nstate_dir = \"{here}\"\n")).unwrap();
            run(&[&["token", "create", "web-01", "--json", "--config", &config], more].concat(), "", code)
        };
        let address = |more: &[&str]| -> String {
            let made: serde_json::Value = serde_json::from_str(&made("127.0.0.1:12345", more, 0).0).unwrap();
            assert_eq!(made["expires"].as_str().unwrap().len(), "2026-01-01T00:00:00Z".len(), "{made}");
            made["address"].as_str().unwrap().to_owned()
        };
        assert!(address(&[]).ends_with(":12345"));
        assert_eq!(address(&["--address", "mt.example.org"]), "mt.example.org:12345");
        assert_eq!(address(&["--address", "mt.example.org:9443"]), "mt.example.org:9443");
        let (_, why) = made("127.0.0.1:0", &[], 3);
        assert!(why.contains("--address HOST:PORT"), "{why}");
        made("127.0.0.1:0", &["--address", "no address"], 2);
    })
    .await
    .unwrap();
}
