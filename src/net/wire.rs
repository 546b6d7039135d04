//! Frames on a stream: reads and writes headers and messages, and lets nothing be allocated before it is bounded.
//!
//! None of these functions has a timeout of its own: how long a peer may be silent depends on what it is doing,
//! which the caller knows. None is cancel safe: after a timeout the connection is at an unknown place in a frame,
//! and must be closed.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{self, HEADER_LEN, Header, Kind};
use super::message::{self, Code, CodecError, Message};
use super::tls::HandshakeError;

/// Why the next frame, or the message in it, did not come.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The peer closed the connection between two frames.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection ended within a frame, or without the farewell of TLS.
    #[error("the connection broke off: the peer or the network between went away")]
    Truncated,
    /// Reading or writing failed.
    #[error("{op} failed on the connection")]
    Io {
        /// `read` or `write`.
        op: &'static str,
        /// What the operating system or TLS said.
        source: io::Error,
    },
    /// TLS failed: often the first read says that the peer did not accept our certificate, since in TLS 1.3 it
    /// looks at it only after our side of the handshake is done.
    #[error("{op} failed on the connection")]
    Tls {
        /// `read` or `write`.
        op: &'static str,
        /// Why.
        source: HandshakeError,
    },
    /// A header that breaks a rule.
    #[error("bad frame")]
    Frame(#[from] frame::Error),
    /// A payload whose checksum does not hold.
    #[error("the payload of a {kind:?} frame arrived damaged (frame {sequence})")]
    PayloadChecksum {
        /// The frame's kind.
        kind: Kind,
        /// Its sequence number.
        sequence: u64,
    },
    /// A payload that is not the message it should be, or a message too long to send.
    #[error("bad message")]
    Message(#[from] CodecError),
    /// A frame of another kind than this moment allows.
    #[error("a {found:?} frame came where {expected:?} must")]
    Unexpected {
        /// The kind that came.
        found: Kind,
        /// The kind that was due.
        expected: Kind,
    },
    /// The peer gives up, and says why.
    #[error("the peer refused")]
    Peer(#[from] message::Error),
}

impl Error {
    /// What to tell the peer before the connection is closed; `None` where it is gone, or spoke last itself.
    pub fn to_peer(&self) -> Option<message::Error> {
        let code = match self {
            Error::Closed | Error::Truncated | Error::Io { .. } | Error::Tls { .. } | Error::Peer(_) => {
                return None;
            }
            Error::Frame(frame::Error::UnsupportedVersion { .. }) => Code::UnsupportedVersion,
            Error::Frame(_) | Error::Message(_) => Code::BadFrame,
            Error::PayloadChecksum { .. } => Code::BadChecksum,
            Error::Unexpected { .. } => Code::Protocol,
        };
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text = format!("{text}: {cause}");
            next = cause.source();
        }
        Some(message::Error::new(code, text))
    }

    fn read(source: io::Error) -> Error {
        match source.kind() {
            // TLS reports a peer that is gone without close_notify (RFC 8446, section 6.1) so, too.
            io::ErrorKind::UnexpectedEof => Error::Truncated,
            _ => Error::io("read", source),
        }
    }

    fn write(source: io::Error) -> Error {
        Error::io("write", source)
    }

    fn io(op: &'static str, source: io::Error) -> Error {
        match HandshakeError::from(source) {
            HandshakeError::Io(source) => Error::Io { op, source },
            source => Error::Tls { op, source },
        }
    }
}

/// Reads the next header; its payload is still on the stream.
///
/// # Errors
/// [`Error::Closed`] where the stream ends before its first byte, [`Error::Truncated`] after it.
pub async fn read_header<R: AsyncRead + Unpin>(stream: &mut R) -> Result<Header, Error> {
    let mut bytes = [0; HEADER_LEN];
    let first = loop {
        match stream.read(&mut bytes).await {
            Ok(0) => return Err(Error::Closed),
            Ok(count) => break count,
            Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(Error::read(source)),
        }
    };
    stream.read_exact(&mut bytes[first..]).await.map_err(Error::read)?;
    Ok(Header::parse(&bytes)?)
}

/// Reads the payload of `header` into `buffer`, which must have exactly its length, and verifies its checksum.
///
/// # Errors
/// [`Error::PayloadChecksum`]: the bytes in the buffer are not to be used.
///
/// # Panics
/// Where the buffer's length is not the payload's.
pub async fn read_payload<R: AsyncRead + Unpin>(
    stream: &mut R,
    header: &Header,
    buffer: &mut [u8],
) -> Result<(), Error> {
    assert_eq!(u64::try_from(buffer.len()), Ok(u64::from(header.payload_len)), "the buffer fits the payload");
    stream.read_exact(buffer).await.map_err(Error::read)?;
    if header.fits(buffer) {
        Ok(())
    } else {
        Err(Error::PayloadChecksum { kind: header.kind, sequence: header.sequence })
    }
}

/// Reads the message whose header was read.
///
/// # Errors
/// [`Error::Peer`] where the frame is an error message and `T` is not; [`Error::Unexpected`] for another kind.
pub async fn read_message_body<T: Message, R: AsyncRead + Unpin>(
    stream: &mut R,
    header: &Header,
) -> Result<T, Error> {
    if header.kind != T::KIND && header.kind != Kind::Error {
        return Err(Error::Unexpected { found: header.kind, expected: T::KIND });
    }
    // At most frame::MAX_CONTROL: a parsed header of a control frame says no more.
    let mut payload = vec![0; header.payload_len as usize];
    read_payload(stream, header, &mut payload).await?;
    if header.kind == T::KIND {
        Ok(message::parse(&payload)?)
    } else {
        Err(Error::Peer(message::parse::<message::Error>(&payload)?))
    }
}

/// Reads the next frame, which must be a message `T`.
///
/// # Errors
/// Those of [`read_header`] and [`read_message_body`].
pub async fn read_message<T: Message, R: AsyncRead + Unpin>(stream: &mut R) -> Result<T, Error> {
    let header = read_header(stream).await?;
    read_message_body(stream, &header).await
}

/// Writes a message and flushes it.
///
/// `sequence` is 0 for all but commits and errors (see [`Header::sequence`]).
///
/// # Errors
/// [`Error::Message`] where it is too long for a frame, before anything is written; else [`Error::Io`].
pub async fn write_message<T: Message, W: AsyncWrite + Unpin>(
    stream: &mut W,
    sequence: u64,
    message: &T,
) -> Result<(), Error> {
    let payload = message::encode(message)?;
    let too_long = || CodecError::TooLong { kind: T::KIND, len: payload.len() };
    let header = Header::control(T::KIND, sequence, &payload).ok_or_else(too_long)?;
    // One write, so that a message goes out as one TLS record.
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(&payload);
    stream.write_all(&bytes).await.map_err(Error::write)?;
    stream.flush().await.map_err(Error::write)
}

/// Writes a frame that is all header (zero, progress). Does not flush: several may share a record.
///
/// # Errors
/// [`Error::Io`].
pub async fn write_header<W: AsyncWrite + Unpin>(stream: &mut W, header: &Header) -> Result<(), Error> {
    stream.write_all(&header.encode()).await.map_err(Error::write)
}

#[cfg(test)]
mod tests {
    use super::super::message::{BeginReply, Hello, HelloReply};
    use super::*;
    use crate::net::frame::Encoding;

    async fn sent<T: Message>(message: &T) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_message(&mut bytes, 0, message).await.unwrap();
        bytes
    }

    #[tokio::test]
    async fn messages_follow_each_other_and_the_end_is_clean() {
        let mut bytes = sent(&Hello::ours()).await;
        bytes.extend(sent(&BeginReply {}).await);
        let mut stream = bytes.as_slice();
        assert_eq!(read_message::<Hello, _>(&mut stream).await.unwrap(), Hello::ours());
        assert_eq!(read_message::<BeginReply, _>(&mut stream).await.unwrap(), BeginReply {});
        assert!(matches!(read_message::<BeginReply, _>(&mut stream).await, Err(Error::Closed)));
    }

    #[tokio::test]
    async fn an_end_anywhere_within_a_frame_is_told_from_a_clean_one() {
        let bytes = sent(&Hello::ours()).await;
        for end in 1..bytes.len() {
            let mut stream = &bytes[..end];
            let error = read_message::<Hello, _>(&mut stream).await.unwrap_err();
            assert!(matches!(error, Error::Truncated), "cut at {end}: {error}");
        }
    }

    #[tokio::test]
    async fn headers_that_come_byte_by_byte_are_put_together() {
        let (mut ours, theirs) = tokio::io::duplex(1);
        let writer = tokio::spawn(async move {
            let mut theirs = theirs;
            write_message(&mut theirs, 0, &Hello::ours()).await.unwrap();
        });
        assert_eq!(read_message::<Hello, _>(&mut ours).await.unwrap(), Hello::ours());
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn any_damaged_byte_is_found() {
        let bytes = sent(&Hello::ours()).await;
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            let error = read_message::<Hello, _>(&mut damaged.as_slice()).await.unwrap_err();
            match error {
                Error::Frame(_) => assert!(at < HEADER_LEN),
                Error::PayloadChecksum { kind: Kind::Hello, sequence: 0 } => {
                    assert!(at >= HEADER_LEN);
                    assert_eq!(error.to_peer().unwrap().code, Code::BadChecksum);
                }
                other => panic!("byte {at}: {other}"),
            }
        }
    }

    #[tokio::test]
    async fn an_error_of_the_peer_comes_in_place_of_any_message() {
        let refusal = message::Error::new(Code::UnknownDisk, "no disk sdz");
        let bytes = sent(&refusal).await;
        match read_message::<HelloReply, _>(&mut bytes.as_slice()).await {
            Err(error @ Error::Peer(_)) => {
                assert_eq!(error.to_peer(), None);
                assert!(matches!(error, Error::Peer(theirs) if theirs == refusal));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(read_message::<message::Error, _>(&mut bytes.as_slice()).await.unwrap(), refusal);
    }

    #[tokio::test]
    async fn another_kind_is_refused_before_its_payload_is_read() {
        let bytes = sent(&Hello::ours()).await;
        let mut stream = bytes.as_slice();
        let error = read_message::<HelloReply, _>(&mut stream).await.unwrap_err();
        assert!(matches!(error, Error::Unexpected { found: Kind::Hello, expected: Kind::HelloReply }));
        assert_eq!(error.to_peer().unwrap().code, Code::Protocol);
        assert_eq!(stream.len(), bytes.len() - HEADER_LEN);
    }

    #[tokio::test]
    async fn plain_text_is_another_protocol() {
        let text = b"GET / HTTP/1.1\r\nHost: target.example.org:9443\r\n\r\n";
        let error = read_header(&mut text.as_slice()).await.unwrap_err();
        assert!(matches!(error, Error::Frame(frame::Error::NotThisProtocol { found }) if &found == b"GET "));
    }

    #[tokio::test]
    async fn data_arrives_with_its_checksum_verified() {
        let payload = [0x5a; 4096];
        let header = Header::data(Encoding::Raw, 3, 8192, 4096, &payload).unwrap();
        let mut bytes = Vec::new();
        write_header(&mut bytes, &header).await.unwrap();
        bytes.extend_from_slice(&payload);
        for flip in [0, 1] {
            *bytes.last_mut().unwrap() ^= flip;
            let mut stream = bytes.as_slice();
            assert_eq!(read_header(&mut stream).await.unwrap(), header);
            let mut buffer = [0; 4096];
            let result = read_payload(&mut stream, &header, &mut buffer).await;
            match flip {
                0 => result.unwrap(),
                _ => assert!(matches!(result, Err(Error::PayloadChecksum { kind: Kind::Data, sequence: 3 }))),
            }
        }
    }
}
