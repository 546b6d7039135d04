//! Both sides' sessions against each other, over a pipe in memory in place of TLS, so that a test can sit between
//! them and damage what passes. The disk is the fault-injecting one.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Instant;

use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::watch;

use super::session::{Job, Opening, open, run};
use super::still::Wishes;
use super::*;
use crate::error::IoError;
use crate::net::frame::{HEADER_LEN, Header, Kind};
use crate::net::message::{
    self, Begin, BeginReply, Code, Commit, Enroll, EnrollReply, Hello, HelloReply, Open, OpenReply,
};
use crate::net::session::{
    self as server, Begun, Ending, Guest, Host, Lanes, Opened, Passes, Patience, Reader, Stage, Viewed,
};
use crate::net::wire;
use crate::storage::device::Engine;
use crate::storage::fault::FaultDisk;
use crate::storage::{Geometry, Storage};
use crate::sys::aligned::Arena;
use crate::volume::counters::Counters;
use crate::volume::{Events, Fault, Volume};

const WINDOW: u64 = 3 << 20;

/// A host with one disk, which writes down what happened.
struct Bench {
    disk: FaultDisk,
    alike: bool,
    counters: Arc<Counters>,
    story: Arc<Mutex<Vec<String>>>,
}

impl Bench {
    fn new(size: usize) -> Arc<Bench> {
        let engine = Engine { name: "fault".into(), why: "test".into() };
        let disk = FaultDisk::new(vec![0xaa; size.next_multiple_of(512)], 512);
        Arc::new(Bench {
            disk,
            alike: false,
            counters: Arc::new(Counters::new(size as u64, engine)),
            story: Arc::default(),
        })
    }

    /// With a disk that holds an older copy.
    fn over(mut old: Vec<u8>) -> Arc<Bench> {
        let size = old.len();
        old.resize(size.next_multiple_of(512), 0xaa);
        let disk = FaultDisk::new(old, 512);
        let bench = Arc::into_inner(Bench::new(size)).unwrap();
        Arc::new(Bench { disk, alike: true, ..bench })
    }

    fn reader(&self) -> Reader {
        let again = self.disk.clone();
        Box::new(move |_| {
            let again = again.open().map_err(|error| IoError::new("open", "bench", error))?;
            Ok(Box::new(again))
        })
    }

    fn story(&self) -> Vec<String> {
        self.story.lock().unwrap().clone()
    }
}

impl Host for Bench {
    fn enroll(&self, _: SocketAddr, _: &Enroll) -> Result<EnrollReply, message::Error> {
        Err(message::Error::new(Code::TokenRefused, "no tokens here"))
    }

    fn view(&self, _: SocketAddr, _: &Name, _: &Open) -> Result<Viewed, message::Error> {
        let Geometry { size: device_size, block } = self.disk.open().unwrap().geometry();
        let (reader, covered, hold) = (self.reader(), Arc::default(), Box::new(()));
        Ok(Viewed { device_size, block, baseline: None, reader, covered, hold })
    }

    fn open(&self, _: SocketAddr, _: &Name, open: &Open, events: Events) -> Result<Opened, message::Error> {
        let storage = self.disk.open().unwrap();
        let (device_size, block) = (storage.geometry().size, storage.geometry().block);
        if open.size > device_size {
            return Err(message::Error::new(Code::SizeMismatch, "too large"));
        }
        let arena = Arena::new(WINDOW as usize).unwrap();
        let volume = Volume::start("bench", Box::new(storage), open.size, arena, events).unwrap();
        let reader = self.reader();
        let passes = Box::new(Story(self.story.clone(), self.disk.clone(), watch::Sender::new(Stage::Begun)));
        Ok(Opened {
            volume,
            device_size,
            block,
            reader,
            baseline: None,
            alike: self.alike,
            standing: false,
            group: None,
            window: WINDOW,
            connections: 8,
            counters: self.counters.clone(),
            passes,
            hold: Box::new(()),
        })
    }
}

struct Story(Arc<Mutex<Vec<String>>>, FaultDisk, watch::Sender<Stage>);

impl Passes for Story {
    fn begin(&mut self, _: &Begin) -> Result<Begun, message::Error> {
        self.0.lock().unwrap().push(format!("begin after {} events", self.1.log().len()));
        Ok(Begun { writer: None, stage: self.2.subscribe() })
    }
    fn prepare(&mut self, commit: &Commit, _: u64) -> Result<(), message::Error> {
        let log = self.1.log();
        assert_eq!(log.last(), Some(&crate::storage::fault::Event::Flush), "recorded before the flush");
        self.0.lock().unwrap().push(format!("commit of {} bytes", commit.bytes));
        self.2.send_replace(Stage::Recorded(OffsetDateTime::now_utc()));
        Ok(())
    }
    fn committed(&mut self, _: &Commit) -> Result<(), message::Error> {
        Ok(())
    }
    fn fault(&mut self, fault: &Fault) -> Result<(), message::Error> {
        self.0.lock().unwrap().push(format!("fault: {}", fault.0));
        Ok(())
    }
}

/// What sits between the two sides: may change the header and the payload of each of the sender's frames, or end
/// the connection.
type Meddler = Box<dyn FnMut(&mut [u8; HEADER_LEN], &mut Vec<u8>) -> bool + Send>;

async fn pass_on(
    mut from: tokio::io::ReadHalf<DuplexStream>,
    mut to: tokio::io::WriteHalf<DuplexStream>,
    mut meddle: Meddler,
) {
    let mut header = [0; HEADER_LEN];
    while from.read_exact(&mut header).await.is_ok() {
        let mut payload = vec![0; Header::parse(&header).unwrap().payload_len as usize];
        if from.read_exact(&mut payload).await.is_err() || !meddle(&mut header, &mut payload) {
            break;
        }
        if to.write_all(&header).await.is_err() || to.write_all(&payload).await.is_err() {
            break;
        }
    }
    to.shutdown().await.ok();
}

struct Outcome {
    sender: Result<Done, Error>,
    receiver: Result<(), server::Error>,
    progress: Arc<Progress>,
}

fn point() -> Point {
    Point {
        id: PointId(1),
        disks: vec!["root".parse().unwrap()],
        time: OffsetDateTime::now_utc(),
        name: None,
    }
}

async fn transfer(bench: &Arc<Bench>, content: &[u8], compression: Compression, meddle: Meddler) -> Outcome {
    transfer_of(bench, content, compression, Scope::Differences, meddle).await
}

async fn transfer_of(
    bench: &Arc<Bench>,
    content: &[u8],
    compression: Compression,
    scope: Scope,
    meddle: Meddler,
) -> Outcome {
    transfer_after(bench, content, compression, scope, 0, meddle).await
}

async fn transfer_after(
    bench: &Arc<Bench>,
    content: &[u8],
    compression: Compression,
    scope: Scope,
    sent: u64,
    meddle: Meddler,
) -> Outcome {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    let progress = Arc::new(Progress::default());
    let job = Job {
        point: point(),
        still: Arc::new(Still::new("web01".parse().unwrap(), 1, Wishes::default())),
        source: Arc::new(Source::open(file.path()).unwrap()),
        free: Arc::default(),
        in_doubt: super::free::Free::default(),
        progress: progress.clone(),
        compression,
        engine: EngineChoice::Auto,
        limiter: None,
        scope,
        sent,
        hints: None,
    };
    let (client, near) = tokio::io::duplex(256 << 10);
    let (far, server_end) = tokio::io::duplex(256 << 10);
    let (near_read, mut near_write) = tokio::io::split(near);
    let (mut far_read, far_write) = tokio::io::split(far);
    let there = tokio::spawn(pass_on(near_read, far_write, meddle));
    let back = tokio::spawn(async move {
        tokio::io::copy(&mut far_read, &mut near_write).await.ok();
        near_write.shutdown().await.ok();
    });
    // What breaks is noticed at once; a slow disk is no such thing.
    let limit = Duration::from_secs(60);
    let patience = Patience { handshake: limit, gather: limit, begin: limit, idle: limit };
    let (_keep, ending) = watch::channel(Ending::default());
    let machine = Some("web01".parse().unwrap());
    let peer = "127.0.0.1:1".parse().unwrap();
    let guest = Guest { peer, machine, place: Box::new(()), room: true };
    let (host, lanes) = (bench.clone(), Lanes::default());
    let serve =
        tokio::spawn(async move { server::serve(server_end, guest, host, &lanes, patience, ending).await });
    let sender = pass(client, &job).await;
    let receiver = serve.await.unwrap();
    there.abort();
    back.abort();
    Outcome { sender, receiver, progress }
}

/// All that a sender does with one disk over a connection.
async fn pass(mut client: DuplexStream, job: &Job) -> Result<Done, Error> {
    let opening = Opening {
        disk: "root".parse().unwrap(),
        source: job.source.clone(),
        compression: job.compression,
        resized: false,
        another: false,
        verify: job.scope == Scope::Verify,
        group: None,
        disks: job.point.disks.clone(),
        connections: Connections::Auto,
    };
    let (reply, _) = open(&mut client, &opening).await?;
    run(client, Vec::new(), &reply, job).await
}

fn honest() -> Meddler {
    Box::new(|_, _| true)
}

/// Noise with runs of zeros, and an odd end.
fn content(len: usize) -> Vec<u8> {
    let mut state = 7u64;
    (0..len)
        .map(|at| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if (at >> 20) % 3 == 1 { 0 } else { (state >> 56) as u8 }
        })
        .collect()
}

fn stored(bench: &Bench, len: usize) -> Vec<u8> {
    bench.disk.bytes()[..len].to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pass_arrives_and_is_recorded_after_its_flush() {
    for compression in [Compression::Off, Compression::Auto, Compression::Lz4, Compression::Zstd] {
        let source = content((9 << 20) + 777);
        let bench = Bench::new(source.len());
        let outcome = transfer(&bench, &source, compression, honest()).await;
        let Done::Committed(committed, _) = outcome.sender.unwrap() else { panic!("it was to be sent") };
        outcome.receiver.unwrap();
        assert!(stored(&bench, source.len()) == source);
        assert!(bench.disk.bytes()[source.len()..].iter().all(|&byte| byte == 0xaa), "behind the source");
        assert_eq!(committed.written + committed.zeroed, source.len() as u64);
        assert!(committed.zeroed >= 3 << 20);
        assert_eq!(
            bench.story(),
            ["begin after 0 events".into(), format!("commit of {} bytes", source.len())]
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_payload_is_refused_and_sent_again() {
    let source = content((9 << 20) + 777);
    let bench = Bench::new(source.len());
    let mut seen = 0;
    let meddle = Box::new(move |header: &mut [u8; HEADER_LEN], payload: &mut Vec<u8>| {
        if Header::parse(header).unwrap().kind == Kind::Data {
            seen += 1;
            // The third, and the third's second try.
            if seen == 3 || seen == 8 {
                let middle = payload.len() / 2;
                payload[middle] ^= 1;
            }
        }
        true
    });
    let outcome = transfer(&bench, &source, Compression::Off, meddle).await;
    outcome.sender.unwrap();
    outcome.receiver.unwrap();
    assert!(stored(&bench, source.len()) == source);
    assert_eq!(outcome.progress.again.load(std::sync::atomic::Ordering::Relaxed), 2);
    assert_eq!(bench.counters.refused_frames.load(std::sync::atomic::Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_without_end_is_given_up() {
    let source = content(2 << 20);
    let bench = Bench::new(source.len());
    let meddle = Box::new(|header: &mut [u8; HEADER_LEN], payload: &mut Vec<u8>| {
        if Header::parse(header).unwrap().kind == Kind::Data {
            payload[0] ^= 1;
        }
        true
    });
    let outcome = transfer(&bench, &source, Compression::Off, meddle).await;
    assert!(matches!(outcome.sender, Err(Error::Damaged(_))), "{:?}", outcome.sender);
    assert_eq!(
        bench.disk.log().iter().filter(|e| matches!(e, crate::storage::fault::Event::Write { .. })).count(),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_leaves_no_commit() {
    let source = content(9 << 20);
    for cut in [4usize, 6, 9, 11] {
        let bench = Bench::new(source.len());
        let mut frames = 0;
        let meddle = Box::new(move |_: &mut [u8; HEADER_LEN], _: &mut Vec<u8>| {
            frames += 1;
            frames < cut
        });
        let started = Instant::now();
        let outcome = transfer(&bench, &source, Compression::Off, meddle).await;
        assert!(outcome.sender.is_err() && outcome.receiver.is_err());
        assert_eq!(bench.story().len(), 1, "begun and not committed");
        assert!(started.elapsed() < Duration::from_secs(60));
        // The disk is free again, and another pass makes it whole.
        transfer(&bench, &source, Compression::Off, honest()).await.sender.unwrap();
        assert!(stored(&bench, source.len()) == source);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_write_or_flush_reaches_the_sender_with_its_reason() {
    let source = content(4 << 20);
    let clean = Bench::new(source.len());
    transfer(&clean, &source, Compression::Off, honest()).await.sender.unwrap();
    let requests = clean.disk.log().len();
    for nth in 0..requests {
        let bench = Bench::new(source.len());
        bench.disk.fail_nth(nth, libc::EIO);
        let outcome = transfer(&bench, &source, Compression::Off, honest()).await;
        let Err(Error::Wire(wire::Error::Peer(refusal))) = &outcome.sender else {
            panic!("request {nth}: {:?}", outcome.sender);
        };
        assert_eq!(refusal.code, Code::Io);
        assert!(refusal.message.contains("Input/output error"), "{refusal}");
        let story = bench.story();
        assert!(story.len() == 2 && story[1].starts_with("fault: "), "{story:?}");
        transfer(&bench, &source, Compression::Off, honest()).await.sender.unwrap();
        assert!(stored(&bench, source.len()) == source);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_too_large_is_refused_before_anything_is_sent() {
    let bench = Bench::new(1 << 20);
    let outcome = transfer(&bench, &content(2 << 20), Compression::Off, honest()).await;
    assert!(matches!(&outcome.sender, Err(Error::Refused(refusal)) if refusal.code == Code::SizeMismatch));
    assert!(bench.story().is_empty() && bench.disk.log().is_empty());
}

/// Numbers without an end, the same in every run.
fn numbers(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize) % below
    }
}

/// A disk and an older copy of it: of the blocks in between, some differ, in a byte or in all.
fn pair(seed: u64, size: usize) -> (Vec<u8>, Vec<u8>) {
    let mut number = numbers(seed);
    let old = content(size);
    let mut new = old.clone();
    for _ in 0..number(40) {
        let at = number(size);
        let len = [1, 512, 4096, 5000, 70_000, 300_000][number(6)].min(size - at);
        match number(3) {
            0 => new[at..at + len].fill(0),
            1 => new[at..at + len].iter_mut().for_each(|byte| *byte = byte.wrapping_add(1)),
            _ => new[at..at + len].iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8 ^ 0x5a),
        }
    }
    (old, new)
}

fn differing(old: &[u8], new: &[u8]) -> usize {
    old.chunks(4096).zip(new.chunks(4096)).filter(|(old, new)| old != new).map(|(old, _)| old.len()).sum()
}

/// Where everything is to be sent, only what an earlier attempt has written is compared.
#[tokio::test(flavor = "multi_thread")]
async fn everything_travels_but_what_was_written_before() {
    let unit = u64::from(crate::digest::UNIT);
    let old = content((3 << 20) + 777);
    let size = old.len() as u64;
    let mut new = old.clone();
    new[5000] ^= 1;
    for (sent, compared) in [
        (0, 0),
        (1, 0),
        (unit, unit),
        (20 * unit + 1, 20 * unit),
        (size - 1, size - size % unit),
        (size, size),
    ] {
        let bench = Bench::over(old.clone());
        let travelled = Arc::new(AtomicU64::new(0));
        let counted = travelled.clone();
        let meddle = Box::new(move |header: &mut [u8; HEADER_LEN], _: &mut Vec<u8>| {
            let header = Header::parse(header).unwrap();
            if matches!(header.kind, Kind::Data | Kind::Zero) {
                counted.fetch_add(header.length, Ordering::Relaxed);
            }
            true
        });
        let outcome = transfer_after(&bench, &new, Compression::Off, Scope::Whole, sent, meddle).await;
        outcome.sender.unwrap();
        assert!(stored(&bench, new.len()) == new);
        let differs = if compared > 0 { 4096 } else { 0 };
        assert_eq!(travelled.load(Ordering::Relaxed), size - compared + differs, "{sent}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_blocks_that_differ_travel() {
    for seed in 0..24 {
        let size = [4096, 100, 65536 + 1, (1 << 20) + 511, (3 << 20) + 777, 9 << 20][seed as usize % 6];
        let (old, new) = pair(seed, size);
        let bench = Bench::over(old.clone());
        let wire = Arc::new(AtomicU64::new(0));
        let (counted, frames) = (wire.clone(), Arc::new(AtomicU64::new(0)));
        let headers = frames.clone();
        let meddle = Box::new(move |header: &mut [u8; HEADER_LEN], payload: &mut Vec<u8>| {
            if Header::parse(header).unwrap().kind == Kind::Data {
                counted.fetch_add(payload.len() as u64, Ordering::Relaxed);
                headers.fetch_add(1, Ordering::Relaxed);
            }
            true
        });
        let outcome = transfer(&bench, &new, Compression::Off, meddle).await;
        outcome.sender.unwrap_or_else(|error| panic!("seed {seed}: {}", chain(&error)));
        outcome.receiver.unwrap();
        assert!(stored(&bench, size) == new, "seed {seed}");
        assert!(bench.disk.bytes()[size..].iter().all(|&byte| byte == 0xaa), "behind the source");
        let differs = differing(&old, &new) as u64;
        let sent = wire.load(Ordering::Relaxed);
        assert!(sent <= differs, "seed {seed}: {sent} bytes were sent, and {differs} differ");
        let same = outcome.progress.same.load(Ordering::Relaxed);
        // Zeros go by the unit.
        let most = size as u64 - differs;
        assert!(same <= most && same + 40 * 65536 * 6 >= most, "seed {seed}: {same} of {most} are the same");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_byte_anywhere_is_found() {
    let size = (2 << 20) + 777;
    let old = content(size);
    for at in [0, 1, 4095, 4096, 65535, 65536, (1 << 20) - 1, 1 << 20, size - 778, size - 777, size - 1] {
        let mut new = old.clone();
        new[at] ^= 1;
        let bench = Bench::over(old.clone());
        let outcome = transfer(&bench, &new, Compression::Off, honest()).await;
        outcome.sender.unwrap();
        assert!(stored(&bench, size) == new, "byte {at}");
        assert!(outcome.progress.sent.load(Ordering::Relaxed) <= 4096, "byte {at}");
    }
    // And where nothing differs, nothing is written.
    let bench = Bench::over(old.clone());
    let outcome = transfer(&bench, &old, Compression::Off, honest()).await;
    outcome.sender.unwrap();
    assert_eq!(outcome.progress.sent.load(Ordering::Relaxed), 0);
    assert_eq!(outcome.progress.same.load(Ordering::Relaxed), size as u64);
    assert_eq!(bench.disk.log(), [crate::storage::fault::Event::Flush]);
}

/// The refused range is dealt with, as far as the frames after it say, and comes again all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_block_comes_again_after_those_behind_it() {
    let size = 12 << 20;
    let (old, mut new) = (content(size), content(size));
    for at in (0..size).step_by(1 << 20) {
        new[at + 5000] ^= 1;
    }
    let bench = Bench::over(old);
    let mut seen = 0;
    let meddle = Box::new(move |header: &mut [u8; HEADER_LEN], payload: &mut Vec<u8>| {
        if Header::parse(header).unwrap().kind == Kind::Data {
            seen += 1;
            if seen % 3 == 1 {
                payload[17] ^= 1;
            }
        }
        true
    });
    let outcome = transfer(&bench, &new, Compression::Off, meddle).await;
    outcome.sender.unwrap();
    outcome.receiver.unwrap();
    assert!(stored(&bench, size) == new);
    assert!(outcome.progress.again.load(Ordering::Relaxed) >= 4);
}

/// What was damaged on the way comes again behind all else: so far what arrived before it is what need not be sent again.
#[tokio::test(flavor = "multi_thread")]
async fn what_arrived_before_damage_is_known_to_have_arrived() {
    let size = 12 << 20;
    let new = vec![0x11; size];
    for cut in [true, false] {
        let bench = Bench::new(size);
        let refused = Arc::new(AtomicU64::new(0));
        let (mut seen, told) = (0, refused.clone());
        let meddle = Box::new(move |header: &mut [u8; HEADER_LEN], payload: &mut Vec<u8>| {
            let header = Header::parse(header).unwrap();
            if header.kind == Kind::Data {
                seen += 1;
                std::thread::sleep(Duration::from_millis(400));
                if seen == 2 {
                    told.store(header.offset, Ordering::Relaxed);
                    payload[17] ^= 1;
                }
            }
            !cut || seen < 10
        });
        let outcome = transfer_of(&bench, &new, Compression::Off, Scope::Whole, meddle).await;
        assert_eq!(outcome.sender.is_err(), cut, "{:?}", outcome.sender);
        let reached = outcome.progress.reached.load(Ordering::Relaxed);
        let refused = refused.load(Ordering::Relaxed);
        assert!(refused > 0);
        assert_eq!(reached, if cut { refused } else { size as u64 });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_pass_sends_nothing_twice_but_what_was_under_way() {
    let size = 24 << 20;
    let (old, new) = (vec![0x11; size], content(size));
    let bench = Bench::over(old.clone());
    let mut frames = 0;
    let cut = Box::new(move |_: &mut [u8; HEADER_LEN], _: &mut Vec<u8>| {
        frames += 1;
        frames < 35
    });
    let first = transfer(&bench, &new, Compression::Off, cut).await;
    assert!(first.sender.is_err());
    let there = size - differing(&bench.disk.bytes(), &new);
    assert!(there > 2 << 20, "{there}");
    let second = transfer(&bench, &new, Compression::Off, honest()).await;
    second.sender.unwrap();
    assert!(stored(&bench, size) == new);
    let sent = second.progress.sent.load(Ordering::Relaxed);
    assert!(sent <= (differing(&old, &new) - there) as u64, "{sent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn verifying_tells_what_differs_and_changes_nothing() {
    let (old, new) = pair(3, 9 << 20);
    let bench = Bench::over(old.clone());
    let outcome = transfer_of(&bench, &new, Compression::Off, Scope::Verify, honest()).await;
    assert_eq!(outcome.sender.unwrap(), Done::Compared);
    outcome.receiver.unwrap();
    assert!(bench.disk.bytes() == old && bench.disk.log().is_empty() && bench.story().is_empty());
    let found = outcome.progress.differences.lock().unwrap().clone();
    let mut expected: Vec<u8> = vec![0; old.len()];
    for extent in &found {
        expected[extent.offset() as usize..extent.end() as usize].fill(1);
    }
    assert!(!found.is_empty());
    for (at, (old, new)) in old.chunks(4096).zip(new.chunks(4096)).enumerate() {
        let told = expected[at * 4096] == 1;
        // Where the source has zeros, it is told by the unit.
        let zeros = new.iter().all(|byte| *byte == 0);
        assert!(told == (old != new) || (told && zeros), "block {at}");
    }
    let differs: u64 = found.iter().map(|extent| extent.len()).sum();
    assert_eq!(outcome.progress.differs.load(Ordering::Relaxed), differs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_read_for_comparing_ends_the_pass_with_its_reason() {
    let (old, new) = pair(5, 4 << 20);
    let bench = Bench::over(old);
    bench.disk.fail_nth(0, libc::EIO);
    let outcome = transfer(&bench, &new, Compression::Off, honest()).await;
    let Err(Error::Wire(wire::Error::Peer(refusal))) = &outcome.sender else {
        panic!("{:?}", outcome.sender)
    };
    assert!(refusal.code == Code::Io && refusal.message.contains("cannot be read"), "{refusal}");
}

/// What a server says that does not keep to the protocol.
struct Liar {
    hello: HelloReply,
    open: OpenReply,
    /// Right after the pass began.
    early: Vec<Header>,
    /// `written` and `zeroed`, and whether it waits for the commit with it.
    committed: Option<(u64, u64, bool)>,
}

async fn lied_to(liar: Liar) -> Error {
    let Liar { hello, open, early, committed } = liar;
    let (client, mut server) = tokio::io::duplex(64 << 10);
    let serve = async move {
        let _: Hello = wire::read_message(&mut server).await?;
        wire::write_message(&mut server, 0, &hello).await?;
        let _: Open = wire::read_message(&mut server).await?;
        wire::write_message(&mut server, 0, &open).await?;
        let Begin { pass, .. } = wire::read_message(&mut server).await?;
        wire::write_message(&mut server, 0, &BeginReply {}).await?;
        for header in &early {
            wire::write_header(&mut server, header).await?;
        }
        let (mut frames, mut cost) = (0, 0);
        loop {
            let answer = committed.filter(|(_, _, waits)| !waits || frames == u64::MAX);
            if let Some((written, zeroed, _)) = answer {
                let committed = Committed { pass, written, zeroed, time: OffsetDateTime::now_utc() };
                wire::write_message(&mut server, 0, &committed).await?;
            }
            let header = wire::read_header(&mut server).await?;
            let mut payload = vec![0; header.payload_len as usize];
            wire::read_payload(&mut server, &header, &mut payload).await?;
            if header.kind == Kind::Commit {
                frames = u64::MAX;
                continue;
            }
            frames += 1;
            cost += header.window_cost();
            if early.is_empty() {
                wire::write_header(&mut server, &Header::progress(frames, cost)).await?;
            }
        }
    };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&content(12 << 20)).unwrap();
    let job = Job {
        point: point(),
        still: Arc::new(Still::new("web01".parse().unwrap(), 1, Wishes::default())),
        source: Arc::new(Source::open(file.path()).unwrap()),
        free: Arc::default(),
        in_doubt: super::free::Free::default(),
        progress: Arc::default(),
        compression: Compression::Off,
        engine: EngineChoice::Auto,
        limiter: None,
        scope: Scope::Differences,
        sent: 0,
        hints: None,
    };
    // The server ends once the client is gone.
    let talk = async { tokio::join!(pass(client, &job), serve) };
    let (result, _): (_, Result<(), wire::Error>) =
        timeout(Duration::from_secs(60), talk).await.expect("an end");
    result.expect_err("what it was told cannot be")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_not_believed_what_cannot_be() {
    let size = 12 << 20;
    let hello = || HelloReply { protocol: 1, features: Vec::new(), agent: String::new() };
    let open = || OpenReply {
        point: None,
        window: 8 << 20,
        max_payload: 1 << 20,
        volume_size: size,
        block: 512,
        compression: Vec::new(),
        baseline: None,
        alike: false,
        standing: false,
        join: None,
    };
    let sound = || Liar { hello: hello(), open: open(), early: Vec::new(), committed: Some((size, 0, true)) };
    let refused = |offset, length| Header::refused(&Header { offset, length, ..Header::zero(0, 0, 1) });
    let cases = [
        (Liar { hello: HelloReply { protocol: 9, ..hello() }, ..sound() }, "was not offered"),
        (Liar { open: OpenReply { window: (1 << 20) - 1, ..open() }, ..sound() }, "smaller than those"),
        (Liar { open: OpenReply { max_payload: 4096, ..open() }, ..sound() }, "smaller than those"),
        (Liar { open: OpenReply { volume_size: size - 1, ..open() }, ..sound() }, "smaller than the source"),
        (Liar { committed: Some((size, 0, false)), ..sound() }, "before there was one"),
        (Liar { committed: Some((size - 1, 0, true)), ..sound() }, "another number of bytes"),
        (Liar { committed: Some((u64::MAX, size + 1, true)), ..sound() }, "another number of bytes"),
        (Liar { early: vec![Header::progress(0, u64::MAX)], ..sound() }, "more window than was taken"),
        (Liar { early: vec![Header::progress(u64::MAX, 0)], ..sound() }, "more frames than were sent"),
        (Liar { early: vec![refused(size, 4096)], ..sound() }, "the source does not have"),
    ];
    for (liar, what) in cases {
        match lied_to(liar).await {
            Error::Broken(said) => assert!(said.contains(what), "{said}"),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_breaks_the_rules_ends_the_session_and_never_reaches_the_disk() {
    // Each changes the first data frame; the checksum of the header is made right again.
    type Change = fn(&mut Header);
    let cases: [(Change, Code); 5] = [
        (|header| header.sequence += 1, Code::Protocol),
        (|header| header.offset = 4 << 20, Code::OutOfRange),
        (|header| header.offset = u64::MAX - (1 << 20), Code::OutOfRange),
        (|header| header.length = 0, Code::BadFrame),
        (|header| header.length = u64::from(u32::MAX), Code::BadFrame),
    ];
    let source: Vec<u8> = content(12 << 20)[..1 << 20].repeat(4);
    for (case, (change, code)) in cases.into_iter().enumerate() {
        let bench = Bench::new(source.len());
        let mut done = false;
        let meddle = Box::new(move |header: &mut [u8; HEADER_LEN], _: &mut Vec<u8>| {
            let mut parsed = Header::parse(header).unwrap();
            if parsed.kind == Kind::Data && !done {
                change(&mut parsed);
                *header = parsed.encode();
                done = true;
            }
            true
        });
        let outcome = transfer(&bench, &source, Compression::Off, meddle).await;
        let Err(Error::Wire(wire::Error::Peer(refusal))) = &outcome.sender else {
            panic!("case {case}: {:?}", outcome.sender);
        };
        assert_eq!(refusal.code, code, "case {case}: {refusal}");
        assert!(bench.disk.log().is_empty(), "case {case}");
    }
}
