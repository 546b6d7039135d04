//! The control messages: what the JSON payloads of control frames hold.
//!
//! A pure codec. A payload is at most [`frame::MAX_CONTROL`] bytes; fields that this version does not know are
//! passed over, so that a later version may add some. Who sends what and when is in the protocol's
//! specification, [`crate::net`].
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use time::OffsetDateTime;

use super::frame::{self, Encoding, Kind};
use crate::disk::id::DiskId;
use crate::name::Name;
use crate::pass::PassId;
use crate::points::{self, PointId};

/// The version of the protocol that this agent speaks.
pub const PROTOCOL: u16 = 1;

/// The optional features that this agent has: none yet.
pub const FEATURES: [&str; 0] = [];

/// A message and the kind of frame that carries it.
pub trait Message: Serialize + DeserializeOwned {
    /// The kind of its frames.
    const KIND: Kind;
}

/// Why a payload is not the message that its frame announces, or a message does not fit a frame.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Longer than a control payload may be.
    #[error("a {kind:?} message of {len} bytes is longer than {max}", max = frame::MAX_CONTROL)]
    TooLong {
        /// The kind of frame.
        kind: Kind,
        /// The length, in bytes.
        len: usize,
    },
    /// Not the JSON of this message.
    #[error("a {kind:?} message that cannot be read")]
    Json {
        /// The kind of frame.
        kind: Kind,
        /// What is wrong with it, and where.
        source: serde_json::Error,
    },
}

fn fits(len: usize) -> bool {
    u32::try_from(len).is_ok_and(|len| len <= frame::MAX_CONTROL)
}

/// Reads the payload of a frame of kind `T::KIND`.
///
/// # Errors
/// [`CodecError::TooLong`] before anything is read, [`CodecError::Json`] for everything else.
pub fn parse<T: Message>(payload: &[u8]) -> Result<T, CodecError> {
    if !fits(payload.len()) {
        return Err(CodecError::TooLong { kind: T::KIND, len: payload.len() });
    }
    let wrong = |source| CodecError::Json { kind: T::KIND, source };
    // The derived code would take an array of the members for the message as well.
    if payload.trim_ascii_start().first() != Some(&b'{') {
        return Err(wrong(serde::de::Error::custom("not a JSON object")));
    }
    serde_json::from_slice(payload).map_err(wrong)
}

/// The payload that carries `message`.
///
/// # Errors
/// [`CodecError::TooLong`] where it does not fit a control frame.
pub fn encode<T: Message>(message: &T) -> Result<Vec<u8>, CodecError> {
    let payload = serde_json::to_vec(message).map_err(|source| CodecError::Json { kind: T::KIND, source })?;
    if fits(payload.len()) {
        Ok(payload)
    } else {
        Err(CodecError::TooLong { kind: T::KIND, len: payload.len() })
    }
}

/// The client's first message.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Every protocol version that the client speaks. Wider than a version ever is: a number that this agent cannot
    /// speak must not keep it from one that it can.
    pub protocol: Vec<u64>,
    /// Features that the client can use; the server passes over those that it does not know.
    #[serde(default)]
    pub features: Vec<String>,
    /// Features that the client cannot do without; the server refuses those that it does not know, by name.
    #[serde(default)]
    pub required: Vec<String>,
    /// Program and version, for the log.
    #[serde(default)]
    pub agent: String,
}

impl Hello {
    /// What this agent offers.
    pub fn ours() -> Hello {
        let features = FEATURES.map(str::to_owned).to_vec();
        Hello { protocol: vec![PROTOCOL.into()], features, required: Vec::new(), agent: agent() }
    }
}

/// The server's answer to [`Hello`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HelloReply {
    /// The version that both speak from here on.
    pub protocol: u16,
    /// The offered features that the server has too.
    #[serde(default)]
    pub features: Vec<String>,
    /// Program and version, for the log.
    #[serde(default)]
    pub agent: String,
}

impl HelloReply {
    /// The answer to `hello`.
    ///
    /// # Errors
    /// The message to refuse it with: [`Code::UnsupportedVersion`] or [`Code::UnsupportedFeature`].
    pub fn to(hello: &Hello) -> Result<HelloReply, Error> {
        if !hello.protocol.contains(&PROTOCOL.into()) {
            let text = format!(
                "the client speaks protocol {:?}, this agent {PROTOCOL}: install the same version on both sides",
                hello.protocol
            );
            return Err(Error::new(Code::UnsupportedVersion, text));
        }
        let known = |feature: &&String| FEATURES.contains(&feature.as_str());
        if let Some(missing) = hello.required.iter().find(|feature| !known(feature)) {
            let text = format!("the client needs the feature `{missing}`, which this agent does not have");
            return Err(Error::new(Code::UnsupportedFeature, text));
        }
        let wanted = hello.features.iter().chain(&hello.required);
        let features = wanted.filter(known).cloned().collect();
        Ok(HelloReply { protocol: PROTOCOL, features, agent: agent() })
    }
}

fn agent() -> String {
    concat!("mt-agent/", env!("CARGO_PKG_VERSION")).to_owned()
}

/// A request for a certificate, on a connection without one.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enroll {
    /// The token's one-time secret: 32 bytes in base64url without padding.
    pub secret: String,
    /// A PKCS #10 certificate request in PEM. Only its public key counts.
    pub csr: String,
}

impl fmt::Debug for Enroll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enroll").field("csr", &self.csr).finish_non_exhaustive()
    }
}

/// The answer to [`Enroll`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EnrollReply {
    /// The machine that the certificate speaks for.
    pub machine: Name,
    /// The client's certificate, in PEM.
    pub certificate: String,
    /// The certificate of the authority that signed it and the server's, in PEM.
    pub ca: String,
}

/// What a connection is for: one disk of the machine that the client's certificate names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Open {
    /// The name under which the disk was assigned.
    pub disk: Name,
    /// The size of the source disk, in bytes.
    pub size: u64,
    /// The logical sector size of the source disk, in bytes.
    pub sector: u32,
    /// The identity of the source disk, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<DiskId>,
    /// Whether the source may have another size than the one before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resized: bool,
    /// Whether it may be another disk than the one before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub another: bool,
    /// The compressions that the client can send. Unknown names are passed over; `raw` needs no mention.
    #[serde(default, deserialize_with = "known_encodings")]
    pub compression: Vec<Encoding>,
    /// Whether the source is only to be compared, beside whatever else happens to the disk: its pass is of kind
    /// [`Verify`](PassKind::Verify), and no other is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub verify: bool,
    /// The consistency group whose point the pass is a part of, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Name>,
    /// With a group, all disks of the machine that are sent for its point, this one among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Name>,
}

/// The answer to [`Open`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpenReply {
    /// The window: how many bytes of cost the client may have sent and not got back. At least `max_payload`.
    pub window: u64,
    /// The most bytes that a data frame may cover here; at most [`frame::MAX_DATA`].
    pub max_payload: u32,
    /// The size of the target disk, in bytes; at least the source's.
    pub volume_size: u64,
    /// The alignment, in bytes, at which the volume is written without reading first.
    pub block: u32,
    /// The offered compressions that the server takes.
    #[serde(default, deserialize_with = "known_encodings")]
    pub compression: Vec<Encoding>,
    /// The point at which the volume stands, or would be brought to: only then a delta pass is possible. It is what is
    /// compared where that is all that is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<PointId>,
    /// Whether the volume likely holds much of what the source does, so that comparing pays.
    #[serde(default)]
    pub alike: bool,
    /// Whether it holds the baseline and nothing else, of a source of just this size: only then what changed since the
    /// baseline is all that differs.
    #[serde(default)]
    pub standing: bool,
    /// The point of the group, which the pass must lead to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<PointId>,
    /// How more connections may carry the pass, if they may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join: Option<Invitation>,
}

/// What more connections need in order to carry frames of a pass.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// Tells them from others of the same machine: 32 random bytes in base64url without padding.
    pub secret: String,
    /// How many connections may carry the pass in all, the first one among them.
    pub connections: u32,
}

impl fmt::Debug for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invitation").field("connections", &self.connections).finish_non_exhaustive()
    }
}

/// One more connection for the pass of a disk that another one has opened.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The disk.
    pub disk: Name,
    /// The secret of its [`Invitation`].
    pub secret: String,
}

impl fmt::Debug for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Join").field("disk", &self.disk).finish_non_exhaustive()
    }
}

/// The answer to [`Join`]: the connection belongs to the pass.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JoinReply {}

fn known_encodings<'de, D: Deserializer<'de>>(names: D) -> Result<Vec<Encoding>, D::Error> {
    let names = Vec::<String>::deserialize(names)?;
    let known = [Encoding::Raw, Encoding::Lz4, Encoding::Zstd];
    let mut encodings = Vec::new();
    for name in names {
        let encoding = known.into_iter().find(|encoding| encoding.name() == name);
        encodings.extend(encoding.filter(|encoding| !encodings.contains(encoding)));
    }
    Ok(encodings)
}

/// What a pass sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PassKind {
    /// All of the source, written in place.
    Initial,
    /// What is different from the point at which the volume stands, or more than that: what is overwritten is saved
    /// first, so that the point can be gone back to.
    Delta,
    /// Nothing: the source and the volume are compared, and neither is changed.
    Verify,
    /// A kind that this version does not know, from a newer peer.
    #[serde(other)]
    Unknown,
}

/// The start of a pass.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Begin {
    /// Its name.
    pub pass: PassId,
    /// What it sends.
    pub kind: PassKind,
    /// The point that it leads to.
    pub point: PointId,
    /// All disks of the machine that are sent for this point, this one among them: it is there once each of their
    /// passes is durable, and for all of them at once.
    pub disks: Vec<Name>,
    /// For comparing: digests of what the volume holds are wanted, one for so many bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compare: Option<u32>,
}

/// The answer to [`Begin`]: frames may come.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BeginReply {}

/// The end of a pass: everything was sent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Commit {
    /// The pass.
    pub pass: PassId,
    /// How many data and zero frames were sent in it.
    pub frames: u64,
    /// The sum of their lengths, in bytes of the volume.
    pub bytes: u64,
    /// Whether the source stood still while it was read, so that the result is one moment of it.
    pub point_in_time: bool,
    /// That moment, by the client's clock (RFC 3339).
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// What the disks hold.
    pub kind: points::Kind,
    /// What the user calls the point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
}

/// The answer to [`Commit`]: all of it is on stable storage.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Committed {
    /// The pass.
    pub pass: PassId,
    /// How many bytes were written.
    pub written: u64,
    /// How many bytes were made zero without being sent.
    pub zeroed: u64,
    /// When it became durable, by the server's clock (RFC 3339).
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
}

/// Something that the client's user should know; the pass goes on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Notice {
    /// For people.
    pub message: String,
}

/// Why the other side gives up: the last frame before it closes the connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{} ({code})", printable(message))]
pub struct Error {
    /// For programs.
    pub code: Code,
    /// For people: what happened and what to do. No secret, and no address or path that the peer may not know.
    pub message: String,
}

impl Error {
    /// The longest text that is sent, in bytes: an error must always fit a frame, whatever it quotes.
    pub const MAX_TEXT: usize = 4096;

    /// An error message; a text over [`Error::MAX_TEXT`] is cut.
    pub fn new(code: Code, message: impl Into<String>) -> Error {
        let mut message = message.into();
        if let Some(cut) = (0..=Error::MAX_TEXT).rev().find(|&at| message.is_char_boundary(at)) {
            message.truncate(cut);
        }
        Error { code, message }
    }
}

/// A peer's text as it may be shown: whatever could move the cursor or begin another line is escaped.
fn printable(text: &str) -> String {
    let mut shown = String::new();
    for char in text.chars() {
        if char.is_control() { shown.extend(char.escape_default()) } else { shown.push(char) }
    }
    shown
}

/// What kind of error it is, and so what to do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// No protocol version in common. Install the same version on both sides.
    UnsupportedVersion,
    /// A feature, compression or kind of pass that the peer does not have; the message names it.
    UnsupportedFeature,
    /// A header or message that breaks a rule of its own. A defect of the sender, or something that rewrites
    /// traffic; connect again, and report it if it stays.
    BadFrame,
    /// A payload whose checksum does not hold; nothing of it was written. Connect again and send the pass anew.
    BadChecksum,
    /// A frame that is sound but out of order: before its time, with a gap in the numbers, past the window.
    /// A defect of the sender.
    Protocol,
    /// The connection has no certificate that allows what it asks. Enrol the machine.
    NotAuthorized,
    /// The machine of the certificate has no disks assigned. `mt-agent protect add` on the master target.
    UnknownMachine,
    /// The machine has no disk of this name. Use a name that `mt-agent protect list` shows.
    UnknownDisk,
    /// A safety rule forbids to write to the target disk; the message says which.
    Refused,
    /// The source is larger than the target. Assign a larger disk.
    SizeMismatch,
    /// A frame past the end of the source or the target. A defect of the sender, or a source that grew.
    OutOfRange,
    /// Another connection has the volume open, or as many as may compare it. Try again once it is done.
    Busy,
    /// The volume failed before and was not recovered yet. Look at its error with `mt-agent status`; once the
    /// cause is gone a new connection opens it anew.
    VolumeFaulted,
    /// Reading, writing or flushing the target failed. Look at the master target's log.
    Io,
    /// No space for the state that the server must keep. Free some.
    NoSpace,
    /// The service is stopping. Try again after a moment.
    ShuttingDown,
    /// A defect of the peer. Report it with its log.
    Internal,
    /// Another disk of the same point did not arrive, so that there is no point. Send all of them again.
    Incomplete,
    /// The token is unknown, used or expired. Make a new one with `mt-agent token create`.
    TokenRefused,
    /// The peer, or the way to it, was silent for longer than is borne. Connect again.
    Silent,
    /// A code that this version does not know, from a newer peer. Go by the message.
    #[serde(other)]
    Unknown,
}

impl Code {
    /// Whether a new connection and the same request may well succeed without anyone doing anything.
    pub const fn retryable(self) -> bool {
        match self {
            Code::BadChecksum | Code::Busy | Code::ShuttingDown | Code::Silent => true,
            Code::UnsupportedVersion
            | Code::UnsupportedFeature
            | Code::BadFrame
            | Code::Protocol
            | Code::NotAuthorized
            | Code::UnknownMachine
            | Code::UnknownDisk
            | Code::Refused
            | Code::SizeMismatch
            | Code::OutOfRange
            | Code::VolumeFaulted
            | Code::Io
            | Code::NoSpace
            | Code::Internal
            | Code::Incomplete
            | Code::TokenRefused
            | Code::Unknown => false,
        }
    }

    /// The code as it is sent.
    pub const fn name(self) -> &'static str {
        match self {
            Code::UnsupportedVersion => "unsupported-version",
            Code::UnsupportedFeature => "unsupported-feature",
            Code::BadFrame => "bad-frame",
            Code::BadChecksum => "bad-checksum",
            Code::Protocol => "protocol",
            Code::NotAuthorized => "not-authorized",
            Code::UnknownMachine => "unknown-machine",
            Code::UnknownDisk => "unknown-disk",
            Code::Refused => "refused",
            Code::SizeMismatch => "size-mismatch",
            Code::OutOfRange => "out-of-range",
            Code::Busy => "busy",
            Code::VolumeFaulted => "volume-faulted",
            Code::Io => "io",
            Code::NoSpace => "no-space",
            Code::ShuttingDown => "shutting-down",
            Code::Internal => "internal",
            Code::Incomplete => "incomplete",
            Code::TokenRefused => "token-refused",
            Code::Silent => "silent",
            Code::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

macro_rules! messages {
    ($($name:ident),*) => {$(
        impl Message for $name {
            const KIND: Kind = Kind::$name;
        }
    )*};
}

messages!(
    Hello,
    HelloReply,
    Enroll,
    EnrollReply,
    Open,
    OpenReply,
    Join,
    JoinReply,
    Begin,
    BeginReply,
    Commit,
    Committed,
    Notice,
    Error
);

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]
mod tests {
    use proptest::prelude::*;
    use time::macros::datetime;

    use super::*;

    fn text<T: Message>(message: &T) -> String {
        String::from_utf8(encode(message).unwrap()).unwrap()
    }

    fn pass() -> PassId {
        "000102030405060708090a0b0c0d0e0f".parse().unwrap()
    }

    #[test]
    fn the_json_is_that_of_the_specification() {
        assert!(
            text(&Hello::ours())
                .starts_with(r#"{"protocol":[1],"features":[],"required":[],"agent":"mt-agent/"#)
        );
        let open = Open {
            disk: "sda".parse().unwrap(),
            size: 1 << 30,
            sector: 512,
            source: None,
            resized: false,
            another: false,
            compression: vec![Encoding::Lz4, Encoding::Zstd],
            verify: false,
            group: None,
            disks: Vec::new(),
        };
        let json = r#"{"disk":"sda","size":1073741824,"sector":512,"compression":["lz4","zstd"]}"#;
        assert_eq!(text(&open), json);
        assert_eq!(parse::<Open>(json.as_bytes()).unwrap(), open);
        let json = r#"{"disk":"sda","size":1073741824,"sector":512,"compression":["lz4","zstd"],"group":"shop","disks":["sda"]}"#;
        let open = Open { group: Some("shop".parse().unwrap()), disks: vec!["sda".parse().unwrap()], ..open };
        assert_eq!(text(&open), json);
        assert_eq!(parse::<Open>(json.as_bytes()).unwrap(), open);
        let json = r#"{"disk":"sda","size":1073741824,"sector":512,"source":"eui.0011223344556677","resized":true,"another":true,"compression":["lz4","zstd"],"verify":true,"group":"shop","disks":["sda"]}"#;
        let source = Some("eui.0011223344556677".parse().unwrap());
        let open = Open { source, resized: true, another: true, verify: true, ..open };
        assert_eq!(text(&open), json);
        assert_eq!(parse::<Open>(json.as_bytes()).unwrap(), open);
        let (point, disks) = (PointId(1), vec!["sda".parse().unwrap()]);
        let begin = Begin { pass: pass(), kind: PassKind::Initial, point, disks, compare: None };
        let json = r#"{"pass":"000102030405060708090a0b0c0d0e0f","kind":"initial","point":"00000000000000000000000000000001","disks":["sda"]}"#;
        assert_eq!(text(&begin), json);
        assert_eq!(parse::<Begin>(json.as_bytes()).unwrap(), begin);
        assert_eq!(text(&BeginReply {}), "{}");
        let join = Join { disk: "sda".parse().unwrap(), secret: "s".into() };
        assert_eq!(text(&join), r#"{"disk":"sda","secret":"s"}"#);
        let reply = r#"{"window":8388608,"max_payload":1048576,"volume_size":4096,"block":512,"compression":[],"alike":false,"standing":false"#;
        let alone = parse::<OpenReply>(format!("{reply}}}").as_bytes()).unwrap();
        assert_eq!((&alone.join, text(&alone)), (&None, format!("{reply}}}")));
        let json = format!(r#"{reply},"join":{{"secret":"s","connections":8}}}}"#);
        let join = Some(Invitation { secret: "s".into(), connections: 8 });
        assert_eq!(parse::<OpenReply>(json.as_bytes()).unwrap(), OpenReply { join, ..alone });
        let time = datetime!(2024-02-29 12:00 UTC);
        let committed = Committed { pass: pass(), written: 4096, zeroed: 8192, time };
        let json = r#"{"pass":"000102030405060708090a0b0c0d0e0f","written":4096,"zeroed":8192,"time":"2024-02-29T12:00:00Z"}"#;
        assert_eq!(text(&committed), json);
        assert_eq!(parse::<Committed>(json.as_bytes()).unwrap(), committed);
    }

    #[test]
    fn unknown_fields_compressions_and_codes_are_passed_over() {
        let json =
            br#"{"disk":"a","size":1,"sector":512,"compression":["brotli","lz4-hc","zstd","zstd"],"colour":"red"}"#;
        assert_eq!(parse::<Open>(json).unwrap().compression, [Encoding::Zstd]);
        let error: Error = parse(br#"{"code":"from-the-future","message":"m"}"#).unwrap();
        assert_eq!(error.code, Code::Unknown);
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        assert!(matches!(parse::<Begin>(br#"{"pass":"00","kind":"initial"}"#), Err(CodecError::Json { .. })));
        let begin = |pass: &str| {
            format!(
                r#"{{"pass":"{pass}","kind":"initial","point":"00000000000000000000000000000001","disks":[]}}"#
            )
        };
        assert!(parse::<Begin>(begin("000102030405060708090a0b0c0d0e0f").as_bytes()).is_ok());
        assert!(parse::<Begin>(begin("000102030405060708090A0B0C0D0E0F").as_bytes()).is_err());
        assert!("+00102030405060708090a0b0c0d0e0f".parse::<PassId>().is_err());
        assert!(parse::<Open>(br#"{"disk":"../sda","size":1,"sector":512}"#).is_err());
        assert!(parse::<Open>(br#"{"disk":"sda","size":-1,"sector":512}"#).is_err());
        assert!(parse::<BeginReply>(b"{} {}").is_err());
        assert!(parse::<BeginReply>(b"[]").is_err());
        assert!(parse::<Hello>(br#"[[1],[],[],""]"#).is_err());
        assert_eq!(parse::<BeginReply>(b" \r\n\t{ }\n").unwrap(), BeginReply {});
        assert!(parse::<Hello>(&b"[".repeat(10_000)).is_err());
    }

    #[test]
    fn a_message_longer_than_a_frame_is_refused_on_both_sides() {
        let mut payload = b"{}".to_vec();
        payload.resize(1 << 16, b' ');
        assert!(parse::<BeginReply>(&payload).is_ok());
        payload.push(b' ');
        assert!(matches!(parse::<BeginReply>(&payload), Err(CodecError::TooLong { len: 65537, .. })));
        let hello = Hello { agent: "x".repeat(1 << 16), ..Hello::ours() };
        assert!(matches!(encode(&hello), Err(CodecError::TooLong { .. })));
        let error = Error::new(Code::Io, "é".repeat(1 << 20));
        assert!(error.message.len() <= Error::MAX_TEXT && encode(&error).is_ok());
    }

    #[test]
    fn versions_are_negotiated_and_features_refused_by_name() {
        let offer = |protocol: &[u64]| Hello { protocol: protocol.to_vec(), ..Hello::ours() };
        assert_eq!(HelloReply::to(&offer(&[1, 2, 1 << 40])).unwrap().protocol, 1);
        for offered in [&[][..], &[0], &[2, 3]] {
            assert_eq!(HelloReply::to(&offer(offered)).unwrap_err().code, Code::UnsupportedVersion);
        }
        let wish = Hello { features: vec!["delta".into()], ..Hello::ours() };
        assert!(HelloReply::to(&wish).unwrap().features.is_empty());
        let error = HelloReply::to(&Hello { required: vec!["delta".into()], ..Hello::ours() }).unwrap_err();
        assert_eq!(error.code, Code::UnsupportedFeature);
        assert!(error.message.contains("`delta`"));
    }

    #[test]
    fn every_code_is_sent_as_its_name() {
        // The last is the one that stands for every unknown name.
        let mut code = Code::UnsupportedVersion;
        let all = std::iter::from_fn(|| {
            let this = code;
            code = match code {
                Code::UnsupportedVersion => Code::UnsupportedFeature,
                Code::UnsupportedFeature => Code::BadFrame,
                Code::BadFrame => Code::BadChecksum,
                Code::BadChecksum => Code::Protocol,
                Code::Protocol => Code::NotAuthorized,
                Code::NotAuthorized => Code::UnknownMachine,
                Code::UnknownMachine => Code::UnknownDisk,
                Code::UnknownDisk => Code::Refused,
                Code::Refused => Code::SizeMismatch,
                Code::SizeMismatch => Code::OutOfRange,
                Code::OutOfRange => Code::Busy,
                Code::Busy => Code::VolumeFaulted,
                Code::VolumeFaulted => Code::Io,
                Code::Io => Code::NoSpace,
                Code::NoSpace => Code::ShuttingDown,
                Code::ShuttingDown => Code::Internal,
                Code::Internal => Code::Incomplete,
                Code::Incomplete => Code::TokenRefused,
                Code::TokenRefused => Code::Silent,
                Code::Silent | Code::Unknown => Code::Unknown,
            };
            (this != Code::Unknown).then_some(this)
        });
        let all: Vec<Code> = all.collect();
        assert_eq!(all.len(), 20);
        for code in all {
            let json = format!("\"{}\"", code.name());
            assert_eq!(serde_json::to_string(&code).unwrap(), json);
            assert_eq!(serde_json::from_str::<Code>(&json).unwrap(), code);
        }
    }

    #[test]
    fn what_a_peer_says_cannot_write_over_the_terminal() {
        let error: Error = parse(r#"{"code":"io","message":"\u001b[2Ja\nb\r\u009bé"}"#.as_bytes()).unwrap();
        assert_eq!(error.to_string(), r"\u{1b}[2Ja\nb\r\u{9b}é (io)");
    }

    #[test]
    fn the_secret_is_not_shown() {
        let enroll = Enroll { secret: "hush".into(), csr: "request".into() };
        assert!(!format!("{enroll:?}").contains("hush"));
        let join = Join { disk: "sda".parse().unwrap(), secret: "hush".into() };
        assert!(!format!("{join:?}").contains("hush"));
        let invitation = Invitation { secret: "hush".into(), connections: 8 };
        assert!(!format!("{invitation:?}").contains("hush"));
    }

    proptest! {
        #[test]
        fn commits_and_passes_come_back(pass: u128, frames: u64, bytes: u64, point_in_time: bool) {
            let (time, kind) = (datetime!(2024-02-29 12:00 UTC), points::Kind::Filesystem);
            let commit = Commit { pass: PassId(pass), frames, bytes, point_in_time, time, kind, name: None };
            prop_assert_eq!(parse::<Commit>(&encode(&commit).unwrap()).unwrap(), commit);
        }

        #[test]
        fn no_bytes_make_it_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse::<Hello>(&payload).is_ok();
            let _ = parse::<Committed>(&payload).is_ok();
            let _ = parse::<Error>(&payload).is_ok();
        }
    }
}
