//! A sender made of the library's own pieces, which can say what `mt-agent send` never would.

use std::path::Path;
use std::time::Duration;

use mt_agent::disk::id::DiskId;
use mt_agent::name::Name;
use mt_agent::net::frame::{Encoding, HEADER_LEN, Header, Kind};
use mt_agent::net::message::{
    self, Begin, BeginReply, Code, Commit, Committed, Hello, HelloReply, Join, JoinReply, Message, Open,
    OpenReply, PassKind,
};
use mt_agent::net::tls::client::Identity;
use mt_agent::net::{tls, wire};
use mt_agent::pass::PassId;
use mt_agent::points::{self, PointId};
use rustls::ClientConfig;
use std::sync::Arc;
use time::OffsetDateTime;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{MACHINE, Rig};

/// The configuration of TLS of the rig's machine.
pub fn config(rig: &Rig) -> Arc<ClientConfig> {
    config_of(&rig.client(), MACHINE)
}

/// The same of a machine whose identity lies in `state`.
pub fn config_of(state: &Path, machine: &str) -> Arc<ClientConfig> {
    Identity::load(state, &machine.parse().unwrap()).unwrap().client_config().unwrap()
}

/// One connection.
pub struct Client {
    pub stream: TlsStream<TcpStream>,
    pub pass: PassId,
    /// What its pass will be: as the service's answer to the opening asks for, unless it was told before to compare.
    pub kind: PassKind,
    /// The unit of the digests that it asks for, if it does.
    pub compare: Option<u32>,
    /// The disk that was opened last, or `d0`.
    pub disk: Name,
    /// The identity of its source.
    pub source: Option<DiskId>,
    /// Whether the source may be another one than before: it is of any size in most tests.
    pub another: bool,
}

const PATIENCE: Duration = Duration::from_secs(20);

impl Client {
    /// With the certificate of the rig's machine, after the greeting.
    pub async fn connect(rig: &Rig) -> Client {
        Client::connect_with(rig, config(rig)).await
    }

    /// With any configuration of TLS, after the greeting.
    pub async fn connect_with(rig: &Rig, config: Arc<ClientConfig>) -> Client {
        let mut client = Client::secured(rig, config).await;
        let _: HelloReply = client.ask(&Hello::ours()).await.unwrap();
        client
    }

    /// With the certificate of the rig's machine, and nothing said yet.
    pub async fn connect_raw(rig: &Rig) -> Client {
        Client::secured(rig, config(rig)).await
    }

    async fn secured(rig: &Rig, config: Arc<ClientConfig>) -> Client {
        let tcp = TcpStream::connect(rig.service.address()).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let stream = TlsConnector::from(config).connect(tls::server_name(), tcp).await.unwrap();
        let mut id = [0; 16];
        getrandom::fill(&mut id).unwrap();
        Client {
            stream,
            pass: PassId(u128::from_le_bytes(id)),
            kind: PassKind::Initial,
            compare: None,
            disk: "d0".parse().unwrap(),
            source: None,
            another: true,
        }
    }

    /// With the disk `disk` open for a source of `size` bytes, and the pass begun.
    pub async fn begun(rig: &Rig, disk: &str, size: u64) -> (Client, OpenReply) {
        let mut client = Client::connect(rig).await;
        let reply = client.open(disk, size).await.unwrap();
        client.begin().await.unwrap();
        (client, reply)
    }

    pub async fn open(&mut self, disk: &str, size: u64) -> Result<OpenReply, message::Error> {
        let compression = vec![Encoding::Lz4, Encoding::Zstd];
        self.disk = disk.parse().unwrap();
        let reply: Result<OpenReply, message::Error> = self
            .ask(&Open {
                disk: disk.parse().unwrap(),
                size,
                sector: 512,
                source: self.source.clone(),
                resized: self.another,
                another: self.another,
                compression,
                verify: self.kind == PassKind::Verify,
                group: None,
                disks: Vec::new(),
            })
            .await;
        if self.kind == PassKind::Initial && reply.as_ref().is_ok_and(|reply| reply.baseline.is_some()) {
            self.kind = PassKind::Delta;
        }
        reply
    }

    /// Another connection with this configuration of TLS that joins the pass which this answer to the opening invites to.
    pub async fn join(rig: &Rig, config: Arc<ClientConfig>, join: &Join) -> Result<Client, message::Error> {
        let mut client = Client::connect_with(rig, config).await;
        client.ask::<JoinReply>(join).await.map(|_| client)
    }

    /// The same, with the certificate of the rig's machine.
    pub async fn joined(rig: &Rig, reply: &OpenReply) -> Result<Client, message::Error> {
        let secret = reply.join.clone().expect("an invitation").secret;
        Client::join(rig, config(rig), &Join { disk: "d0".parse().unwrap(), secret }).await
    }

    pub async fn begin(&mut self) -> Result<BeginReply, message::Error> {
        let (pass, kind) = (self.pass, self.kind);
        let (point, disks) = (PointId(self.pass.0), vec![self.disk.clone()]);
        self.ask(&Begin { pass, kind, point, disks, compare: self.compare }).await
    }

    pub async fn commit(&mut self, frames: u64, bytes: u64) -> Result<Committed, message::Error> {
        self.tell(frames, &self.commit_message(frames, bytes)).await;
        self.answer().await
    }

    pub fn commit_message(&self, frames: u64, bytes: u64) -> Commit {
        let (time, kind) = (OffsetDateTime::now_utc(), points::Kind::Crash);
        Commit { pass: self.pass, frames, bytes, point_in_time: false, time, kind, name: None }
    }

    /// Sends a message.
    pub async fn tell(&mut self, sequence: u64, message: &impl Message) {
        wire::write_message(&mut self.stream, sequence, message).await.unwrap();
    }

    /// Sends a message and takes its answer.
    pub async fn ask<T: Message>(&mut self, message: &impl Message) -> Result<T, message::Error> {
        self.tell(0, message).await;
        self.answer().await
    }

    /// Sends bytes as they are. That the peer has closed already shows in its answer.
    pub async fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.ok();
        self.stream.flush().await.ok();
    }

    /// Sends a frame of data, raw.
    pub async fn data(&mut self, sequence: u64, offset: u64, bytes: &[u8]) {
        let header = Header::data(Encoding::Raw, sequence, offset, bytes.len() as u64, bytes).unwrap();
        self.frame(&header, bytes).await;
    }

    /// Sends any frame.
    pub async fn frame(&mut self, header: &Header, payload: &[u8]) {
        self.raw(&[&header.encode()[..], payload].concat()).await;
    }

    /// The next header.
    pub async fn header(&mut self) -> Result<Header, wire::Error> {
        timeout(PATIENCE, wire::read_header(&mut self.stream)).await.expect("the service answers in time")
    }

    /// The next message, past the frames that give window back, and digests; or the peer's last word.
    pub async fn answer<T: Message>(&mut self) -> Result<T, message::Error> {
        loop {
            let header = self.header().await.expect("an answer");
            if header.kind == Kind::Progress {
                continue;
            }
            if header.kind == Kind::Digests {
                let mut digests = vec![0; header.payload_len as usize];
                wire::read_payload(&mut self.stream, &header, &mut digests).await.unwrap();
                continue;
            }
            let body = timeout(PATIENCE, wire::read_message_body(&mut self.stream, &header)).await;
            return match body.expect("the service answers in time") {
                Ok(message) => Ok(message),
                Err(wire::Error::Peer(refusal)) => Err(refusal),
                Err(error) => panic!("{error:?}"),
            };
        }
    }

    /// The service gives up with this code and a text that has this in it, and closes the connection properly.
    pub async fn refused(&mut self, code: Code, text: &str) {
        let refusal = self.answer::<BeginReply>().await.expect_err("the service should have refused");
        assert_eq!(refusal.code, code, "{refusal}");
        assert!(refusal.message.contains(text), "`{text}` is missing: {refusal}");
        let end = self.header().await;
        assert!(matches!(end, Err(wire::Error::Closed)), "after the last word came {end:?}");
    }
}

/// A header with one field changed past all rules, and its checksum made anew.
pub fn patched(header: &Header, at: usize, bytes: &[u8]) -> [u8; HEADER_LEN] {
    let mut encoded = header.encode();
    encoded[at..at + bytes.len()].copy_from_slice(bytes);
    let crc = mt_agent::checksum::crc32c(&encoded[..HEADER_LEN - 4]);
    encoded[HEADER_LEN - 4..].copy_from_slice(&crc.to_le_bytes());
    encoded
}

/// Where `length` and `payload_len` lie in a header.
pub const LENGTH_AT: usize = 24;
pub const PAYLOAD_LEN_AT: usize = 32;
