//! The wire protocol, and the code that speaks it.
//!
//! # The mt-agent protocol, version 1
//!
//! A *client* (the source of a replication, `mt-agent send`) writes disks of one machine to volumes of a
//! *server* (the master target, `mt-agent serve`), over one TLS connection for each disk, or several (section 6).
//! This text is enough to write another client or server. `MUST`, `SHOULD` and `MAY` are those of RFC 2119. All numbers in
//! headers are little-endian and unsigned; a size or offset is in bytes unless it says otherwise.
//!
//! ## 1. Transport
//!
//! TCP, port 9443 unless configured otherwise, and on it TLS 1.3 (RFC 8446), nothing older, with the
//! application protocol (ALPN, RFC 7301) `mt-agent`. No 0-RTT, no resumption.
//!
//! The server shows a certificate for the DNS name `mt-agent.internal`, signed by the server's own authority.
//! A client that is enrolled MUST verify the chain against that authority alone, and that name, whatever
//! address it connected to. A client that is not enrolled yet MUST instead compare the SHA-256 of the
//! server's certificate (DER) with the one in its token (section 7), and MUST NOT send the secret to any
//! other server.
//!
//! The server asks for a client certificate. Without one the connection can do nothing but enrol. With one,
//! signed by the server's authority for the purpose of client authentication, it speaks for the machine in
//! the one URI `mt-agent://machine/NAME` among the certificate's subject alternative names, and MUST NOT
//! reach another machine's disks. In TLS 1.3 a refused client certificate shows as an alert at the client's
//! first read.
//!
//! A *name* (of a machine or a disk) is 1 to 64 characters of `A-Z a-z 0-9 . _ -`, the first neither `.` nor
//! `-`.
//!
//! ## 2. Frames
//!
//! Both directions carry frames: a header of 48 bytes, then `payload_len` bytes of payload.
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 4 | magic | the bytes `MTAG` |
//! | 4 | 1 | version | 1: the layout of this header |
//! | 5 | 1 | type | section 3 |
//! | 6 | 2 | flags | in Data, bits 0 and 1 are the payload's encoding: 0 raw, 1 LZ4, 2 Zstandard; 3 is invalid. All other bits, and all bits in other types, are 0 |
//! | 8 | 8 | sequence | Data, Zero and Commit: the frame's number in its pass. Progress: section 5. Digests: the *unit*, how many bytes of the volume each digest is of. Error: the number of the frame that it is about, or 0. Covered: section 6. Otherwise 0 |
//! | 16 | 8 | offset | Data, Zero, Refused, Digests and Refine: the first byte on the volume. Otherwise 0 |
//! | 24 | 8 | length | Data, Zero, Refused, Digests and Refine: how many bytes of the volume the frame is about. Progress and Covered: section 5. Otherwise 0 |
//! | 32 | 4 | payload_len | bytes of payload after this header |
//! | 36 | 4 | payload_crc | CRC-32C of the payload as sent; 0 without one |
//! | 40 | 4 | reserved | 0 |
//! | 44 | 4 | header_crc | CRC-32C of the bytes 0 to 43 |
//!
//! CRC-32C is that of RFC 3720 (Castagnoli, reflected, initial and final value all ones). TLS already
//! protects the bytes on the network; the checksums cover the way between there and the disk, and find
//! defects in either end.
//!
//! A receiver MUST check a header before it allocates or reads anything for its payload, and in this order:
//! magic, header_crc, version, type, flags, reserved, then
//!
//! - Data: `length` from 1 to 1 MiB, and no more than the server's `max_payload`; `offset + length` below
//!   2^64; `payload_len` equal to `length` for raw, from 1 to `length` for the others (what compression makes
//!   no smaller is sent raw).
//! - Zero: `length` from 1 byte to 1 GiB; `offset + length` below 2^64; no payload.
//! - Progress and Covered: `offset` 0; no payload.
//! - Refine: `length` from 1 to 1 MiB; `offset + length` below 2^64; no payload.
//! - Digests: `length` from 1 byte to 2 GiB; `offset + length` below 2^64; `sequence` a power of two from 4096 to 2^20;
//!   `payload_len` 32 for each `sequence` bytes of `length`, or a part of them, and at most 64 KiB.
//! - Refused: `sequence`, `offset` and `length` of the data frame that it is about; no payload.
//! - All others (*control*): `offset` and `length` 0; `payload_len` from 1 to 64 KiB.
//!
//! `sequence` is bound by the rules of sections 5 and 6 only; where it is said to be 0, receivers ignore it.
//!
//! The encodings: *LZ4* is one block of the LZ4 block format, without a length before it. *Zstandard* is one
//! frame (RFC 8878) without a dictionary. Either MUST decode to exactly `length` bytes; a receiver MUST stop
//! decoding past them.
//!
//! ## 3. Types
//!
//! | type | number | from | payload |
//! |---|---|---|---|
//! | Hello | 1 | client | JSON |
//! | HelloReply | 2 | server | JSON |
//! | Enroll | 3 | client | JSON |
//! | EnrollReply | 4 | server | JSON |
//! | Open | 5 | client | JSON |
//! | OpenReply | 6 | server | JSON |
//! | Begin | 7 | client | JSON |
//! | BeginReply | 8 | server | JSON |
//! | Data | 9 | client | bytes of the volume |
//! | Zero | 10 | client | none |
//! | Progress | 11 | server | none |
//! | Commit | 12 | client | JSON |
//! | Committed | 13 | server | JSON |
//! | Error | 14 | either | JSON |
//! | Refused | 15 | server | none |
//! | Notice | 16 | server | JSON |
//! | Digests | 17 | server | digests, 32 bytes each |
//! | Covered | 18 | client | none |
//! | Refine | 19 | client | none |
//! | Join | 20 | client | JSON |
//! | JoinReply | 21 | server | JSON |
//!
//! A control payload is one JSON object (RFC 8259) in UTF-8, with nothing but white space after it. A
//! receiver MUST pass over members that it does not know, so that later versions can add some; a member that
//! is not listed as optional MUST be there.
//!
//! ## 4. The order of things
//!
//! ```text
//!   client                      server
//!   Hello          ------->
//!                  <-------     HelloReply
//!   either:
//!   Enroll         ------->
//!                  <-------     EnrollReply        and the connection ends
//!   or:
//!   Open           ------->
//!                  <-------     Notice …, OpenReply
//!   Begin          ------->
//!                  <-------     Notice …, BeginReply
//!   Data, Zero …   ------->
//!   Covered …, Refine …
//!                  <-------     Progress …, Refused …, Notice …, Digests …
//!   Commit         ------->
//!                  <-------     Progress …, Committed
//!                               and the connection ends
//!   or, for a disk that another connection has opened:
//!   Join           ------->
//!                  <-------     JoinReply
//!   Data, Zero …   ------->
//! ```
//!
//! A frame of any other type at its place is an error (`protocol`). Outside a pass a side sends nothing
//! before it has the answer to what it sent last. A connection ends with TLS's close_notify; one that ends
//! without it broke off.
//!
//! An Error is a side's last frame, at any moment, in place of any answer: its sender closes the connection
//! after it, and nothing that the receiver sends afterwards is looked at. So that the Error is not lost to a
//! TCP reset, its sender SHOULD go on reading, and discard, for a moment; a client MUST read while it writes.
//!
//! How long silence is borne is each side's own affair. Before Open a server MAY close a connection that is
//! silent for 20 seconds, and between OpenReply and Begin one that is silent for 10 minutes, or with `verify` for 15 seconds
//! (this agent: for a minute by default). In a pass a client's silence is normal (a slow disk, a source that is read slowly),
//! and dead peers are found with TCP keepalive. A server MAY close a pass's connection after a long silence all the same,
//! but only one in which it had carried out, and given back, everything that came; a client that limits its own
//! rate SHOULD therefore send the bytes of a frame bit by bit, and something every few seconds. A server MUST say something on
//! the first connection at least every 20 seconds from BeginReply until Committed or the connection's end, whatever it waits
//! for (this agent: after each ten seconds without anything else, a Progress without anything new, in a pass of kind `verify`
//! as well). A client MAY give up a connection on which nothing came for a minute: what lies between can take all that it says
//! and pass nothing on.
//!
//! ### Hello, HelloReply
//!
//! - Hello: `protocol`, an array of all versions (below 2^64) that the client speaks; `features`, an optional array of
//!   names of optional features that it would use; `required`, an optional array of those that it cannot do
//!   without; `agent`, an optional text for the log, program and version.
//! - HelloReply: `protocol`, the one version that both speak from here on; `features`, optional, those of the
//!   offered ones (from either array) that the server has too; `agent`.
//!
//! No common version is refused with `unsupported-version`, a required feature that the server lacks with
//! `unsupported-feature` and its name. Version 1 defines no features. The header's version changes only with
//! its layout; Hello, HelloReply, and an Error in answer to Hello always have headers of version 1, so that
//! every version can tell every other that they do not fit.
//!
//! ### Open, OpenReply
//!
//! - Open: `disk`, the name under which the disk was assigned on the server; `size`, that of the source;
//!   `sector`, the source's logical sector size; `source`, optional, its identity as [`crate::disk::id`] writes it;
//!   `resized` and `another`, optional, true where the user knows that it has another size than the source of the pass
//!   before, or is another disk; `compression`, an optional array of `lz4` and `zstd`, those
//!   that the client can send; `verify`, optional, true where the pass will be of kind `verify`; `group`, optional, the name of the consistency group of whose point the pass is a part, and
//!   then `disks`, an array of the names of all disks of the machine that are sent for it, this one's among them.
//! - OpenReply: `window`, section 5, at least `max_payload` rounded up to 4096; `max_payload`, the most that
//!   a Data frame may cover, at most 1 MiB; `volume_size`, that of the target, at least `size`; `block`, the
//!   alignment at which the server writes without reading first; `compression`, the offered ones that the
//!   server takes. Data in another encoding is an error (`protocol`). `baseline`, optional, the
//!   point (32 lower-case hexadecimal digits) at which the volume stands or to which it can be brought back; `alike`,
//!   optional, true where the volume likely holds much of what the source does, so that comparing pays; `standing`, optional, true where it holds the baseline and nothing
//!   else, of a source of just this `size`: only then what changed since is all that differs; `point`, with
//!   `group` and only then, the point of the group; `join`, optional, an object with which more connections may carry the pass:
//!   `secret`, 32 random bytes in base64url without padding (43 characters), and `connections`, how many there may be in all,
//!   this one among them.
//!
//! A server remembers the size and the identity of the source of the last pass that began on a volume. One of another size
//! is refused (`refused`) unless `resized` or `another` is true; one of another identity, where both have one, unless
//! `another` is.
//!
//! The server opens the target (and checks its identity) before it answers. From OpenReply on, the volume is
//! this connection's alone; a second one is refused with `busy`. That is not so with `verify`: where the volume has a
//! baseline, several such connections (this agent: four) may be open beside the one that writes it; one more is refused with
//! `busy`. Without a baseline it is theirs alone as well.
//!
//! ### Begin, BeginReply, Commit, Committed
//!
//! - Begin: `pass`, 128 random bits chosen by the client, as 32 lower-case hexadecimal digits; `kind`, `initial` or, where
//!   OpenReply named a baseline, `delta`, or `verify`; `point`, 128 random bits, the same for all disks of the machine that
//!   are sent together, or OpenReply's; `disks`, an array of their names, this one's among them; `compare`, optional, the
//!   unit of the digests that the client wants, a power of two from 4096 to 2^20 (this agent uses 65536).
//! - BeginReply: no members.
//! - Commit: `pass`; `frames`, how many Data and Zero frames the pass had; `bytes`, the sum of their lengths;
//!   `point_in_time`, true if the source stood still while it was read; `time`, the moment that the point stands for, by
//!   the client's clock (RFC 3339); `kind`, what the disks hold then: `crash`, `filesystem` (frozen) or `application` (told);
//!   `name`, optional, what the user calls the point, a name as in section 1.
//! - Committed: `pass`; `written`, bytes written from Data frames; `zeroed`, bytes made zero by Zero frames;
//!   `time`, when it was durable, by the server's clock (RFC 3339).
//!
//! ## 5. A pass
//!
//! Data and Zero frames are numbered from 0 without a gap by `sequence`, and Commit has the next number. Each
//! MUST lie within the source's size. The frames of a pass MUST NOT overlap, but for one
//! that was refused and is sent again: an overlap is an error (`protocol`). Offsets come in any order (ascending
//! is fastest), at any alignment (`block` is fastest), as long as what was sent forms no more than 4096 separate
//! ranges at any moment. The frames of an initial pass cover every byte of the source: what need not be sent is
//! sent as zeros.
//!
//! **Window.** Each Data frame costs its `length` rounded up to a multiple of 4096, each Zero frame 4096. The
//! client MUST NOT have sent, since Begin, more than `window` beyond what the server has given back. The
//! server gives back in Progress: `length` is the total given back since Begin, and `sequence` the number of
//! frames that were carried out, in whatever order. Neither ever shrinks, and each Progress stands for all before
//! it; one with nothing new is a sign of life (section 4). A window that was exceeded is an error (`protocol`).
//!
//! *Written* is not *durable*: a Progress promises nothing about a power cut. Only Committed does.
//!
//! **Commit.** The server checks both sums, and that all frames arrived and none beyond them; writes what is still in flight;
//! makes the volume durable; and only then answers Committed. Until then the pass counts for nothing: a
//! client whose connection broke off, at any moment before it read Committed, MUST take the pass for undone
//! and send a new one, with a new `pass` and `point`. To send a pass twice is harmless.
//!
//! **Points.** The server answers Committed once *all* disks that the passes of a point name are durable, and the point is
//! recorded for all of them at once. Until then a commit waits; a disk whose connection ends before its own commit takes
//! the point with it, and the others are refused with `incomplete`.
//!
//! A server answers Begin once all passes of the point have begun, and a client MUST have begun all of them before it reads
//! the first of its disks.
//!
//! **Groups.** The administrator of the server says which machines a group has. Each of them, at about the same time, opens
//! the disks that it sends for the group's point. The server answers Open once all machines have opened all of theirs: it
//! chooses the point. It waits for five minutes, and refuses with `incomplete` then. After OpenReply a client that can make
//! its machine stand still does so, and then begins: since BeginReply comes when all passes of all machines have begun, and
//! nobody reads before it, there is one moment at which all of the machines stood still. A disk that leaves after
//! OpenReply takes the point with it; the others are refused with `incomplete`, and their passes stay open. Each volume must stand
//! at a point: an initial pass is no part of a group's point (`refused`). Of the Commits of all disks the point has the
//! latest `time`, the least `kind`, and is a point in time if each of them is.
//!
//! **Initial and delta.** An initial pass writes in place, and whatever points the machine had are given up when it
//! begins. Before a delta pass overwrites anything, the server saves what is there, so that the baseline stays a point.
//! It need not cover the source: what it leaves out stays as it is at the baseline, or as an interrupted pass left it; so
//! a client that does not send everything MUST send all that changed since the baseline. What is sent and is there
//! already costs neither journal nor write.
//!
//! **Comparing.** Where Begin asked for it, the server sends, after BeginReply and beside everything else, the digests of
//! what the volume holds: of the source's size, in ascending order, without a gap, each BLAKE3 (32 bytes) of one unit, the
//! last of what is left. It sends them for up to 256 MiB beyond what Covered said, and MUST NOT send them further ahead.
//! Covered says that the client has dealt with the first `length` bytes: what of them was neither sent nor refused is the
//! same on both sides, and stays as it is; `length` only grows, to the source's size at most, and frames for what is
//! covered are an overlap, but for what was refused. Refine asks for the digests of a range in units of 4096, which is
//! answered in Digests with that unit, one frame for each Refine, in their order; at most 64 may wait for their answer. An
//! initial pass with digests need not send what is the same: it is whole once everything before the source's size was
//! covered or sent. Without digests Covered may be sent as well; it spares the server the memory of a pass's ranges.
//!
//! A pass whose kind is `verify` carries neither Data nor Zero nor Commit: the client compares, and closes the connection.
//! What it compares with is the baseline that OpenReply names, whatever is written to the volume meanwhile; without one,
//! the volume as it is. If the baseline is let go of meanwhile, the server ends the connection (`refused`), and every digest
//! that it sent before is one of the baseline.
//!
//! A pass that broke off is not gone on with: another one compares, and finds what arrived of it in place.
//!
//! **Notice.** `message`, a text for the user, at any moment of a pass, and before OpenReply and BeginReply, where one comes
//! every few seconds as long as others are waited for; the pass goes on. A server that has no room to save
//! what it overwrites says so, gives back no window until it has, and says so then.
//!
//! **Damage.** A data frame whose payload does not have the checksum that its header states is thrown away and
//! answered with Refused; its cost is given back. The client sends the range again, in a frame with a number
//! of its own. Commit's `frames` counts every frame, its `bytes` only those that were not refused, so a range
//! that was refused and not sent again makes the commit an error (`protocol`). After 64 refused frames a server
//! MAY give the pass up (`bad-checksum`). A damaged header, or a payload
//! that has its checksum and does not decode, ends the connection (`bad-frame`).
//!
//! A connection carries one pass.
//!
//! ## 6. Several connections
//!
//! Where one connection does not fill the way, more may carry the Data and Zero frames of its pass. The one that opened the
//! disk is the *first*; all else goes over that one alone, in both directions.
//!
//! **Joining.** After an OpenReply with `join`, and before Begin, the client makes more connections, each as section 1 says
//! and with a certificate of the same machine, and after Hello sends
//!
//! - Join: `disk`, the name that was opened; `secret`, that of OpenReply.
//! - JoinReply: no members. From here on the connection belongs to the pass.
//!
//! A server MUST refuse (`refused`) a secret that is not that of an open disk of the certificate's machine, without telling
//! which of them is wrong, a Join after the pass began, and one more connection than `connections` allows. A client that was
//! refused MAY go on with those that it has. A server MUST NOT let connections that joined take the place of another
//! machine's: it bounds them for each pass, by `connections`.
//!
//! **Frames.** After BeginReply (on the first) the client sends each frame over whichever connection it likes. They are
//! numbered as over one, by one count for all of them; on each connection the numbers MUST ascend. The server takes the
//! frames of different connections in any order; a number that comes twice is an error (`protocol`). It MAY leave a frame
//! unread whose number is 1024 or more beyond the first that has not come: that one comes over another connection, and does
//! not depend on it. The window is one for all connections, and so are Progress, Refused and the numbers in them.
//!
//! Where connections joined, Covered's `sequence` is how many Data and Zero frames the client has numbered so far: it holds
//! once their headers have come, and the server remembers it until then. Commit waits likewise until all frames before it are
//! there.
//!
//! **Ends.** A connection that ends before Commit was sent, however it does, ends the pass: what was under way on it is
//! gone. The server then closes all of them. It tells why in an Error on the first connection, where there is more to tell
//! than that, and MAY do so on the one that it is about; it sends nothing else after JoinReply. After Committed the client
//! closes all of them, and the server does after a moment. Silence on one of them is normal as long as the others carry
//! something; silence on all of them, or a frame that never comes, is borne as over one.
//!
//! ## 7. Enrolment
//!
//! An administrator makes a token on the server for one machine, and carries it to the source; its text is
//! specified in [`token`]. The client connects as section 1 says, without a certificate, and after Hello
//! sends
//!
//! - Enroll: `secret`, the token's, 32 bytes in base64url without padding (43 characters); `csr`, a PKCS #10
//!   certificate request (RFC 2986) in PEM, signed with its key. The server takes the public key from it and
//!   nothing else.
//! - EnrollReply: `machine`, the name; `certificate`, the client's, in PEM; `ca`, the server's authority, in
//!   PEM.
//!
//! The client SHOULD verify that the certificate is for its key and machine, and that `ca` signed the
//! certificate of the server it talks to. A token that is unknown, expired or used is refused with
//! `token-refused`. A token is used up once the server begins to answer: where the answer is lost, another
//! token is needed.
//!
//! ## 8. Errors
//!
//! Error: `code`, one of the names below; `message`, for people, at most 4096 bytes. A receiver takes a code
//! that it does not know for a permanent failure. *Again* means that the same request on a new connection may
//! succeed with nobody doing anything (after a pause).
//!
//! | code | meaning | again |
//! |---|---|---|
//! | `unsupported-version` | no version in common | |
//! | `unsupported-feature` | a feature or kind of pass that the peer lacks; the message says which it lacks or has | |
//! | `bad-frame` | a header, message or encoding that breaks a rule of its own | |
//! | `bad-checksum` | a control payload arrived damaged, or too many of data | yes |
//! | `protocol` | a sound frame out of order, out of number or past the window | |
//! | `not-authorized` | no certificate that allows this: enrol | |
//! | `unknown-machine` | the machine has no disks assigned | |
//! | `unknown-disk` | the machine has no disk of this name | |
//! | `refused` | a safety rule forbids to write to the target, the machine is being failed over, or there is nothing to join; the message says which | |
//! | `size-mismatch` | the source is larger than the target | |
//! | `out-of-range` | a frame past the end of the source | |
//! | `busy` | another connection has the volume, or as many as may compare it; or there are as many as may be | yes |
//! | `volume-faulted` | the volume failed before and was not opened anew | |
//! | `io` | reading, writing or flushing the target failed | |
//! | `no-space` | no space for the server's own state | |
//! | `shutting-down` | the service stops | yes |
//! | `internal` | a defect of the peer | |
//! | `incomplete` | another disk of the same point, or another machine of the group, did not arrive, so there is no point | |
//! | `token-refused` | the token is unknown, used or expired | |
//! | `silent` | nothing came for longer than is borne | yes |

pub mod address;
pub mod compress;
pub mod enrolment;
pub mod frame;
pub mod keepalive;
pub mod message;
pub mod session;
pub mod tls;
pub mod token;
pub mod wire;
