//! What bad input gets: a clear error on both sides, a volume whose state is known, and a service that goes on for
//! the others.

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use mt_agent::net::frame::{Encoding, Header, Kind, MAX_DATA};
use mt_agent::net::message::{Code, HelloReply, Open, OpenReply, PassKind};
use mt_agent::net::tls::client::{Identity, pinning_config};
use mt_agent::net::wire;
use nix::sys::signal::Signal;
use support::client::{Client, LENGTH_AT, PAYLOAD_LEN_AT, patched};
use support::{
    Frozen, KIB, Loop, MACHINE, MIB, PATIENCE, Rig, Service, Tmpfs, assert_equal, directory, run, tool,
    wait_for,
};

/// Takes a disk away, also from whoever looks at it for a moment.
fn detach(disk: Loop) {
    let backing = disk.backing().to_str().unwrap().to_owned();
    drop(disk);
    wait_for("the device to be detached", || {
        tool("losetup", &["--associated", &backing]).is_empty().then_some(())
    });
}

/// The service still does its work: a small image goes to `disk`.
#[track_caller]
fn goes_on(rig: &Rig, disk: &str) {
    let source = rig.mixed("small.img", MIB);
    rig.send(&[(disk, &source)], &["--another-disk"]).ok();
    let index: usize = disk[1..].parse().unwrap();
    assert_equal(&source, rig.targets[index].backing());
    rig.synchronized(disk);
}

/// Sends bytes to the port and reads until the service closes.
fn talk(rig: &Rig, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(rig.service.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // A reset is an end as well.
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "the service did not close");
    }
    answer
}

#[test]
fn other_protocols_on_the_port_are_turned_away() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let mut garbage = vec![0; 4096];
    File::open("/dev/urandom").unwrap().read_exact(&mut garbage).unwrap();
    // Whatever the first byte is by chance, it is no handshake.
    garbage[0] = 0x80;
    let strangers: [&[u8]; 4] =
        [b"GET / HTTP/1.0\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", &garbage, &Header::zero(0, 0, 4096).encode()];
    for (index, stranger) in strangers.into_iter().enumerate() {
        let answer = talk(&rig, stranger);
        // At most an alert of TLS.
        assert!(answer.len() < 16, "{answer:?}");
        let refused = index as f64 + 1.0;
        wait_for("the count", || {
            (rig.service.metric("mt_agent_sessions_refused_total") == refused).then_some(())
        });
        // It is counted, and then told.
        wait_for("a line of the log", || {
            let log = rig.service.log();
            let said = log.matches("the peer does not speak TLS: plain text or another protocol").count();
            assert!(said <= index + 1, "{log}");
            (said == index + 1).then_some(())
        });
        goes_on(&rig, "d0");
    }
    // A port scan is nothing to worry about, and a connection that says nothing holds nobody up.
    drop(TcpStream::connect(rig.service.address()).unwrap());
    let _silent = TcpStream::connect(rig.service.address()).unwrap();
    goes_on(&rig, "d0");
}

#[tokio::test]
async fn a_client_without_a_certificate_may_only_enrol() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let token: mt_agent::net::token::Token = rig.service.token("db01").parse().unwrap();
    let mut client = Client::connect_with(&rig, pinning_config(token.fingerprint)).await;
    let refusal = client.open("d0", MIB).await.unwrap_err();
    assert_eq!(refusal.code, Code::NotAuthorized);
    assert!(refusal.message.contains("mt-agent enroll"), "{refusal}");
    drop(client);
    rig.service.wait_for_log("this connection has no client certificate");
    assert_eq!(rig.service.volume(MACHINE, "d0").phase, "empty");
    goes_on(&rig, "d0");
}

#[test]
fn certificates_of_another_authority_are_refused_on_both_sides() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let elsewhere = directory();
    let other = Service::start(elsewhere.path(), &[]);
    let source = rig.random("source.img", MIB);
    let stranger = rig.path("stranger");
    other.enroll(MACHINE, &stranger);
    let by_hand = |state: &Path| {
        let (to, disk) = (rig.service.address().to_string(), format!("d0={}", source.display()));
        let state = state.to_str().unwrap();
        run(&["send", "--machine", MACHINE, "--to", &to, "--state-dir", state, "--disk", &disk])
    };
    by_hand(&stranger).fails(
        3,
        &[
            "is not the master target at which this machine was enrolled",
            "was not issued for this connection",
        ],
    );
    // It trusts this target, and this target does not trust it.
    let machine = MACHINE.parse().unwrap();
    let ours = Identity::load(&rig.client(), &machine).unwrap();
    let theirs = Identity::load(&stranger, &machine).unwrap();
    Identity { ca: ours.ca, ..theirs }.save(&stranger).unwrap();
    by_hand(&stranger)
        .fails(3, &["does not accept the certificate that it was shown: enrol the machine again"]);
    rig.service.wait_for_log("the peer's certificate was not issued for this connection");
    // One that was never enrolled is told so before anything is sent.
    by_hand(&rig.path("nobody")).fails(3, &["enrol"]);
    assert_eq!(rig.service.volume(MACHINE, "d0").phase, "empty");
    goes_on(&rig, "d0");
}

#[test]
fn a_machine_writes_to_its_own_disks_only() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let source = rig.random("source.img", MIB);
    let client = rig.path("db01");
    rig.service.enroll("db01", &client);
    let send = |machine: &str, disk: &str| {
        let (to, disk) = (rig.service.address().to_string(), format!("{disk}={}", source.display()));
        let state = client.to_str().unwrap();
        run(&["send", "--machine", machine, "--to", &to, "--state-dir", state, "--disk", &disk])
    };
    send("db01", "d0").fails(3, &["no disk is assigned to machine db01", "protect add", "unknown-machine"]);
    let own = Loop::create(&rig.path("own.img"), 4 * MIB);
    rig.service.protect_add("db01", "data", &own).ok();
    send("db01", "d0").fails(3, &["machine db01 has no disk d0", "unknown-disk"]);
    // Its certificate under the other's name.
    let machine = "db01".parse().unwrap();
    let mut identity = Identity::load(&client, &machine).unwrap();
    identity.machine = MACHINE.parse().unwrap();
    identity.save(&client).unwrap();
    send(MACHINE, "d0").fails(3, &["db01"]);
    assert_eq!(rig.service.volume(MACHINE, "d0").phase, "empty");
    assert!(fs::read(rig.targets[0].backing()).unwrap().iter().all(|byte| *byte == 0));
    // Nor is a disk given to two machines.
    rig.service.protect_add("db01", "more", &rig.targets[0]).fails(3, &["web01"]);
    send("db01", "data").ok();
    assert_equal(&source, own.backing());
    goes_on(&rig, "d0");
}

#[test]
fn disks_that_do_not_fit_are_refused_before_anything_is_written() {
    require_root!();
    let rig = Rig::new(&[4 * MIB, 4 * MIB]);
    let source = rig.random("source.img", 4 * MIB);
    let larger = rig.random("larger.img", 4 * MIB + 1);
    rig.send(&[("root", &source)], &[]).fails(3, &["machine web01 has no disk root", "unknown-disk"]);
    rig.service.wait_for_log("machine web01 has no disk root");
    let way_out = "attach a larger disk, and assign that one in its place";
    rig.send(&[("d0", &larger)], &[]).fails(3, &["4194305 bytes) are needed", way_out, "size-mismatch"]);
    rig.service.wait_for_log("4194305 bytes) are needed");
    assert_eq!(rig.state("d0"), "empty");
    assert!(fs::read(rig.targets[0].backing()).unwrap().iter().all(|byte| *byte == 0));
    // Where one of two is refused, there is no point, on neither.
    let both: [(&str, &Path); 2] = [("d0", &larger), ("d1", &source)];
    rig.send(&both, &[]).fails(3, &["2 of 2 disks", "size-mismatch", "not sent: disk d0 failed"]);
    assert_ne!(rig.state("d1"), "synchronized");
    assert_eq!(rig.state("d0"), "empty");

    // Sources that are none.
    let empty = rig.path("empty.img");
    File::create(&empty).unwrap();
    for (path, text) in [
        (rig.path("missing"), "No such file"),
        (empty, "is empty"),
        (rig.path("."), "is no block device and no regular file"),
    ] {
        rig.send(&[("d0", &path)], &[]).fails(3, &[text]);
    }
    // What the command line alone shows to be wrong.
    rig.send(&[("d0", &source), ("d0", &larger)], &[]).fails(2, &["the disk d0 is named twice"]);
    rig.send(&[("d0", &source), ("d1", &source)], &[])
        .fails(2, &["source.img is the source of two disks: d0 and d1"]);
    let filter = rig.send(&[("d0", &source)], &["--log-level", "mt_agent=loud"]).fails(2, &["mt_agent=loud"]);
    assert_eq!(filter.stderr.matches("debug").count(), 2, "the advice is given once: {filter:#?}");

    // Targets that cannot be written, or are not there.
    rig.targets[0].set_read_only(true);
    rig.send(&[("d0", &source)], &[]).fails(3, &["it is read-only"]);
    rig.targets[0].set_read_only(false);
    let mut rig = rig;
    let target = rig.targets.remove(0);
    detach(target);
    rig.send(&[("d0", &source)], &[]).fails(3, &["no disk here is loop:", "attach it"]);
    let again = Loop::attach(&rig.path("d0.img"), 512);
    rig.targets.insert(0, again);
    goes_on(&rig, "d0");
}

/// One frame that breaks a rule ends the session: nothing of it is written, and the next pass is whole.
#[tokio::test]
async fn frames_that_break_a_rule_end_the_session() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let size = 2 * MIB;
    let payload = [0x5a; 4096];
    let sound = Header::data(Encoding::Raw, 0, 0, 4096, &payload).unwrap();
    let mut flipped = sound.encode();
    flipped[20] ^= 1;
    let lz4 = Header::data(Encoding::Lz4, 0, 0, 8192, &payload).unwrap();
    let zstd = Header::data(Encoding::Zstd, 0, 0, 8192, &payload).unwrap();
    let past = |offset| Header::data(Encoding::Raw, 0, offset, 4096, &payload).unwrap().encode().to_vec();
    let later = Header { sequence: 1, ..sound };
    let huge = u64::from(u32::MAX);
    let cases: [(&str, Vec<u8>, Code, &str); 19] = [
        ("a header whose checksum does not hold", flipped.to_vec(), Code::BadFrame, "checksum"),
        (
            "an HTTP request inside TLS",
            b"GET / HTTP/1.1\r\nHost: target.example.org:9443\r\n\r\n".to_vec(),
            Code::BadFrame,
            "bad frame",
        ),
        ("another version", patched(&sound, 4, &[9]).to_vec(), Code::UnsupportedVersion, "version"),
        ("a kind that there is not", patched(&sound, 5, &[77]).to_vec(), Code::BadFrame, "77"),
        ("flags that there are not", patched(&sound, 6, &[0x40]).to_vec(), Code::BadFrame, "flags"),
        ("a length of 0", patched(&sound, LENGTH_AT, &[0; 8]).to_vec(), Code::BadFrame, "of length 0"),
        (
            "a length of 2^32-1",
            patched(&sound, LENGTH_AT, &huge.to_le_bytes()).to_vec(),
            Code::BadFrame,
            "4294967295",
        ),
        (
            "a payload of 0 bytes",
            patched(&sound, PAYLOAD_LEN_AT, &[0; 4]).to_vec(),
            Code::BadFrame,
            "payload",
        ),
        (
            "a payload of 2^32-1 bytes",
            patched(&sound, PAYLOAD_LEN_AT, &[0xff; 4]).to_vec(),
            Code::BadFrame,
            "4294967295",
        ),
        ("zeros without length", Header::zero(0, 0, 0).encode().to_vec(), Code::BadFrame, "of length 0"),
        ("an offset past the end", past(size), Code::OutOfRange, "outside"),
        ("an end past the end", past(size - 4095), Code::OutOfRange, "outside"),
        ("an end past 2^64", patched(&sound, 16, &[0xff; 8]).to_vec(), Code::BadFrame, "offset"),
        ("zeros past the end", Header::zero(0, MIB, MIB + 1).encode().to_vec(), Code::OutOfRange, "outside"),
        (
            "a number that is not due",
            [&later.encode()[..], &payload].concat(),
            Code::Protocol,
            "frame 1 came where 0 was due",
        ),
        ("LZ4 that is none", [&lz4.encode()[..], &payload].concat(), Code::BadFrame, "does not decompress"),
        (
            "Zstandard that is none",
            [&zstd.encode()[..], &payload].concat(),
            Code::BadFrame,
            "does not decompress",
        ),
        (
            "a frame that only servers send",
            Header::progress(0, 0).encode().to_vec(),
            Code::Protocol,
            "no place",
        ),
        ("a refusal from the client", Header::refused(&sound).encode().to_vec(), Code::Protocol, "no place"),
    ];
    for (what, bytes, code, text) in cases {
        eprintln!("{what}");
        let (mut client, _) = Client::begun(&rig, "d0", size).await;
        client.raw(&bytes).await;
        client.refused(code, text).await;
        let volume = rig.wait_until_closed("d0");
        assert_eq!((volume.phase.as_str(), volume.error), ("interrupted", None), "{what}");
        assert_eq!(rig.state("d0"), "receiving", "{what}");
        drop(client);
        rig.service.wait_for_log(text);
    }
    // All but the version, which is nobody's fault.
    wait_for("the count", || (rig.service.metric("mt_agent_frames_refused_total") == 18.0).then_some(()));
    assert!(
        fs::read(rig.targets[0].backing()).unwrap().iter().all(|byte| *byte == 0),
        "something was written"
    );
    goes_on(&rig, "d0");
}

/// Nobody agreed to lose what came onto a disk after it was assigned, nor to write to one that shrank.
#[test]
fn a_disk_that_is_not_what_was_assigned_is_refused() {
    require_root!();
    let dir = directory();
    let service = Service::start(dir.path(), &[]);
    let backing = dir.path().join("d0.img");
    let mut rig = Rig::assemble(dir, service, Vec::new());
    let target = Loop::create(&backing, 8 * MIB);
    let (config, disk) = (rig.service.config(), format!("d0={}", target.id()));
    let add = |args: &[&str]| {
        run(&[&["protect", "add", MACHINE, "--config", &config, "--disk", &disk], args].concat()).ok();
    };
    let remove = || run(&["protect", "remove", MACHINE, "--config", &config, "--disk", "d0"]).ok();
    add(&[]);
    let source = rig.random("source.img", MIB);
    let old = rig.path("old.img");
    File::create(&old).unwrap().set_len(8 * MIB).unwrap();
    tool("mkfs.ext4", &["-q", old.to_str().unwrap()]);
    let old = fs::read(&old).unwrap();
    let node = File::options().write(true).open(target.node()).unwrap();
    node.write_all_at(&old, 0).unwrap();
    node.sync_all().unwrap();
    let refused = || {
        rig.send(&[("d0", &source)], &[]).fails(3, &["is not any more", "ext4", "--overwrite"]);
        assert!(fs::read(&backing).unwrap() == old, "the disk was written");
        assert_eq!(rig.state("d0"), "empty");
    };
    refused();
    // It does not look empty to who has read it, if it was written by another way since.
    node.write_all_at(&vec![0; old.len()], 0).unwrap();
    node.sync_all().unwrap();
    File::options().write(true).open(&backing).unwrap().write_all_at(&old, 0).unwrap();
    refused();
    drop(node);

    remove();
    add(&["--overwrite"]);
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, &backing);
    rig.wait_until_closed("d0");

    target.resize(6 * MIB);
    let had = "had 8388608 bytes in sectors of 512 when it was assigned, and has 6291456";
    rig.send(&[("d0", &source)], &[]).fails(3, &[had, "assign it again"]);
    target.resize(9 * MIB);
    rig.send(&[("d0", &source)], &[]).ok();
    rig.service.wait_for_log("has grown since it was assigned");
    rig.wait_until_closed("d0");
    target.resize(8 * MIB);
    detach(target);
    rig.targets.push(Loop::attach(&backing, 4096));
    rig.send(&[("d0", &source)], &[]).fails(3, &["in sectors of 4096 now"]);
}

/// Invariant: bytes that fail their checksum never reach a volume; they are refused, counted and sent again.
#[tokio::test]
async fn a_damaged_payload_is_refused_and_sent_again() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let (mut client, _) = Client::begun(&rig, "d0", 12 * KIB).await;
    let [first, second, third] = [[1; 4096], [2; 4096], [3; 4096]];
    client.data(0, 0, &first).await;
    let header = Header::data(Encoding::Raw, 1, 4096, 4096, &second).unwrap();
    let mut damaged = second;
    damaged[1000] ^= 1;
    client.frame(&header, &damaged).await;
    let refused = loop {
        match client.header().await.unwrap() {
            header if header.kind == Kind::Progress => {}
            header => break header,
        }
    };
    assert_eq!(refused, Header::refused(&header));
    client.data(2, 8192, &third).await;
    let counter = "mt_agent_volume_refused_frames_total{machine=\"web01\",disk=\"d0\"}";
    wait_for("the third frame", || {
        (rig.service.volume(MACHINE, "d0").written_bytes == Some(8192)).then_some(())
    });
    let mut target = [0xff; 12288];
    let backing = File::open(rig.targets[0].backing()).unwrap();
    backing.read_exact_at(&mut target, 0).unwrap();
    assert!(target[4096..8192].iter().all(|byte| *byte == 0), "damaged bytes reached the volume");
    assert_eq!(rig.service.metric(counter), 1.0);

    client.data(3, 4096, &second).await;
    let committed = client.commit(4, 12288).await.unwrap();
    assert_eq!((committed.written, committed.zeroed), (12288, 0));
    backing.read_exact_at(&mut target, 0).unwrap();
    assert!(target == *[first, second, third].concat());
    assert_eq!(rig.service.recorded(MACHINE, "d0")["last_commit"]["bytes"], 12288);
    drop(client);
    rig.synchronized("d0");
    assert_eq!(rig.service.metric(counter), 1.0);

    // One that is not sent again leaves a hole, which is no commit.
    let (mut client, _) = Client::begun(&rig, "d0", 4 * KIB).await;
    client.frame(&Header::data(Encoding::Raw, 0, 0, 4096, &second).unwrap(), &damaged).await;
    while client.header().await.unwrap().kind != Kind::Refused {}
    client.tell(1, &client.commit_message(1, 4096)).await;
    client
        .refused(Code::Protocol, "the commit counts 1 frames and 4096 bytes, and 1 and 0 were accepted")
        .await;
    assert_eq!(rig.wait_until_closed("d0").phase, "interrupted");
    goes_on(&rig, "d0");
}

/// A sender that goes on whatever is refused, and so would fill the log.
#[tokio::test]
async fn damage_without_end_is_given_up() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
    let header = |frame| Header::data(Encoding::Raw, frame, 0, 4096, &[7; 4096]).unwrap();
    for frame in 0..65 {
        client.frame(&header(frame), &[8; 4096]).await;
    }
    let mut refused = 0;
    let last = loop {
        match client.header().await.unwrap() {
            header if header.kind == Kind::Refused => refused += 1,
            header if header.kind == Kind::Progress => {}
            header => break header,
        }
    };
    assert_eq!((refused, last.kind), (64, Kind::Error));
    rig.service.wait_for_log("over 64 frames of the pass arrived damaged");
    assert_eq!(rig.wait_until_closed("d0").phase, "interrupted");
    goes_on(&rig, "d0");
}

/// What is sound by itself and was not agreed on, or only looks like what it should be.
#[tokio::test]
async fn what_was_not_agreed_on_ends_the_session() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let raw = |kind, json: &str| {
        let header = Header::control(kind, 0, json.as_bytes()).unwrap();
        [&header.encode()[..], json.as_bytes()].concat()
    };

    let mut client = Client::connect_raw(&rig).await;
    client.raw(&raw(Kind::Hello, r#"{"protocol":[70000,1]}"#)).await;
    assert_eq!(client.answer::<HelloReply>().await.unwrap().protocol, 1);
    let mut client = Client::connect_raw(&rig).await;
    client.raw(&raw(Kind::Hello, r#"[[1],[],[],""]"#)).await;
    client.refused(Code::BadFrame, "not a JSON object").await;

    let mut client = Client::connect(&rig).await;
    client.open("d0", MIB).await.unwrap();
    let begin = format!(r#"{{"pass":"{0}","kind":"sideways","point":"{0}","disks":["d0"]}}"#, client.pass);
    client.raw(&raw(Kind::Begin, &begin)).await;
    client.refused(Code::UnsupportedFeature, "it has `initial`").await;

    rig.wait_until_closed("d0");
    let mut client = Client::connect(&rig).await;
    let open = Open {
        disk: "d0".parse().unwrap(),
        size: MIB,
        sector: 512,
        source: None,
        resized: false,
        another: true,
        compression: vec![Encoding::Lz4],
        verify: false,
        group: None,
        disks: Vec::new(),
    };
    client.ask::<OpenReply>(&open).await.unwrap();
    client.begin().await.unwrap();
    let payload = [7; 100];
    client.frame(&Header::data(Encoding::Zstd, 0, 0, 4096, &payload).unwrap(), &payload).await;
    client.refused(Code::Protocol, "a payload in zstd, which was not agreed on").await;

    rig.wait_until_closed("d0");
    let (mut client, _) = Client::begun(&rig, "d0", 4096).await;
    client.data(0, 0, &[7; 4096]).await;
    client.tell(0, &client.commit_message(1, 4096)).await;
    client.refused(Code::Protocol, "frame 0 came where 1 was due").await;
    rig.wait_until_closed("d0");
    goes_on(&rig, "d0");
}

#[tokio::test]
async fn messages_out_of_order_end_the_session() {
    require_root!();
    let rig = Rig::new(&[4 * MIB, 4 * MIB]);
    let payload = [0x5a; 4096];

    // Data before a pass; the disk is then as it was.
    let mut client = Client::connect(&rig).await;
    client.open("d0", MIB).await.unwrap();
    client.data(0, 0, &payload).await;
    client.refused(Code::Protocol, "data outside of a pass").await;
    assert_eq!(rig.wait_until_closed("d0").phase, "empty");

    // A pass before a disk.
    let mut client = Client::connect(&rig).await;
    let refusal = client.begin().await.unwrap_err();
    assert_eq!(refusal.code, Code::Protocol, "{refusal}");

    // Two passes, two disks, two greetings.
    let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
    assert_eq!(client.begin().await.unwrap_err().code, Code::Protocol);
    rig.wait_until_closed("d0");
    let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
    let refusal = client.open("d1", MIB).await.unwrap_err();
    assert!(refusal.message.contains("no place in a pass"), "{refusal}");
    rig.wait_until_closed("d0");

    // Commits that count what was not sent, of another pass, of none, and twice.
    for (frames, bytes) in [(0, 4096), (1, 0), (2, 4096), (1, 8192), (u64::MAX, u64::MAX)] {
        let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
        client.data(0, 0, &payload).await;
        let refusal = client.commit(frames, bytes).await.unwrap_err();
        assert_eq!(refusal.code, Code::Protocol);
        assert!(refusal.message.contains("and 1 and 4096 were accepted"), "{refusal}");
        assert_eq!(rig.wait_until_closed("d0").phase, "interrupted");
        assert_eq!(rig.service.recorded(MACHINE, "d0")["last_commit"], serde_json::Value::Null);
    }
    let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
    client.pass.0 ^= 1;
    let refusal = client.commit(0, 0).await.unwrap_err();
    assert!(refusal.message.contains("a pass that is not open"), "{refusal}");
    rig.wait_until_closed("d0");
    // Nothing is sent twice: a sum that is right must not hide a range that never came.
    let (mut client, _) = Client::begun(&rig, "d0", 8192).await;
    client.data(0, 0, &payload).await;
    client.data(1, 0, &payload).await;
    client.refused(Code::Protocol, "were sent before in this pass").await;
    rig.wait_until_closed("d0");
    // An initial pass leaves nothing out.
    let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
    client.data(0, 0, &payload).await;
    let refusal = client.commit(1, 4096).await.unwrap_err();
    assert!(refusal.message.contains("covers 4096 of the source's 1048576 bytes"), "{refusal}");
    assert_eq!(rig.wait_until_closed("d0").phase, "interrupted");
    let (mut client, _) = Client::begun(&rig, "d0", 4096).await;
    client.data(0, 0, &payload).await;
    client.commit(1, 4096).await.unwrap();
    client.data(1, 0, &payload).await;
    client.refused(Code::Protocol, "a connection carries one pass").await;
    // What was committed stays so.
    rig.synchronized("d0");
    let mut behind = [0xff; 4096];
    File::open(rig.targets[0].backing()).unwrap().read_exact_at(&mut behind, 4096).unwrap();
    assert_eq!(behind, [0; 4096]);

    // A message that arrives damaged, one that is none, and one that is too long.
    let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
    let commit = mt_agent::net::message::encode(&client.commit_message(0, 0)).unwrap();
    let header = Header::control(Kind::Commit, 0, &commit).unwrap();
    client.frame(&header, &[&commit[..commit.len() - 1], b"x"].concat()).await;
    client.refused(Code::BadChecksum, "damaged").await;
    rig.wait_until_closed("d0");
    let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
    client.frame(&Header::control(Kind::Commit, 0, b"{}").unwrap(), b"{}").await;
    client.refused(Code::BadFrame, "Commit").await;
    rig.wait_until_closed("d0");
    let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
    client.raw(&patched(&header, PAYLOAD_LEN_AT, &[0xff; 4])).await;
    client.refused(Code::BadFrame, "4294967295").await;
    rig.wait_until_closed("d0");
    goes_on(&rig, "d0");
    goes_on(&rig, "d1");
}

/// A sender that breaks off in the middle of a frame leaves a pass that is interrupted, and says nothing false.
#[tokio::test]
async fn half_a_frame_is_an_interruption() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let payload = vec![0x5a; MAX_DATA as usize];
    let frame =
        [&Header::data(Encoding::Raw, 0, 0, MAX_DATA, &payload).unwrap().encode()[..], &payload].concat();
    for cut in [1, 47, 48, 49, 40_000, frame.len() - 1] {
        let (mut client, _) = Client::begun(&rig, "d0", MIB).await;
        client.raw(&frame[..cut]).await;
        drop(client);
        assert_eq!(rig.wait_until_closed("d0").phase, "interrupted", "cut at {cut}");
    }
    assert!(rig.service.log().contains("the connection broke off"));
    assert!(
        fs::read(rig.targets[0].backing()).unwrap().iter().all(|byte| *byte == 0),
        "something was written"
    );
    goes_on(&rig, "d0");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_window_is_refused() {
    require_root!();
    let dir = directory();
    let under = Loop::create(&dir.path().join("under.img"), 48 * MIB);
    tool("mkfs.ext4", &["-q", under.node().to_str().unwrap()]);
    let mount = support::Mount::new(under.node(), &dir.path().join("slow"));
    let service = Service::start(dir.path(), &[]);
    let disk = Loop::create(&dir.path().join("slow/d0.img"), 16 * MIB);
    let other = Loop::create(&dir.path().join("d1.img"), 16 * MIB);
    let mut rig = Rig::assemble(dir, service, vec![disk, other]);
    rig.mounts = vec![Box::new(mount), Box::new(under)];
    let (mut client, reply) = Client::begun(&rig, "d0", 16 * MIB).await;
    assert_eq!(reply.window, 8 * MIB);
    let frozen = Frozen::new(&rig.path("slow"));
    let payload = vec![0x5a; MIB as usize];
    for frame in 0..8 {
        client.data(frame, frame * MIB, &payload).await;
    }
    wait_for("a full window", || {
        (rig.service.volume(MACHINE, "d0").received_bytes == Some(8 * MIB)).then_some(())
    });
    // While the disk does not move, the others are served.
    goes_on(&rig, "d1");
    assert_eq!(rig.service.volume(MACHINE, "d0").written_bytes, Some(0));
    client.data(8, 8 * MIB, &payload).await;
    client.refused(Code::Protocol, "9437184 bytes are under way, and the window is 8388608").await;
    drop(frozen);
    assert_eq!(rig.wait_until_closed("d0").phase, "interrupted");
    // Nobody waits for what is still being written, and has the disk.
    support::wait_until_unclaimed(rig.targets[0].node());
    goes_on(&rig, "d0");
}

/// The sender that waits for a disk which does not move is not the one that is silent; one that has nothing to wait
/// for is.
#[tokio::test]
async fn a_sender_is_silent_only_while_the_disk_is_not_at_work() {
    require_root!();
    let dir = directory();
    let under = Loop::create(&dir.path().join("under.img"), 64 * MIB);
    tool("mkfs.ext4", &["-q", under.node().to_str().unwrap()]);
    let mount = support::Mount::new(under.node(), &dir.path().join("slow"));
    let service = Service::start(dir.path(), &[]);
    let disk = Loop::create(&dir.path().join("slow/d0.img"), 24 * MIB);
    let mut rig = Rig::assemble(dir, service, vec![disk]);
    rig.mounts = vec![Box::new(mount), Box::new(under)];
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "idle_timeout = \"3s\"\n"));

    let source = rig.random("source.img", 24 * MIB);
    let frozen = Frozen::new(&rig.path("slow"));
    let send = rig.start(&[("d0", &source)], &["--compression", "off"]);
    wait_for("a full window", || {
        (rig.service.volume(MACHINE, "d0").received_bytes == Some(8 * MIB)).then_some(())
    });
    // Four times its patience, and so twice what it may take to lose it.
    tokio::time::sleep(Duration::from_secs(12)).await;
    drop(frozen);
    send.finish().ok();
    assert_equal(&source, rig.targets[0].backing());
    rig.synchronized("d0");

    let (mut client, _) = Client::begun(&rig, "d0", 16 * MIB).await;
    let start = Instant::now();
    client.data(0, 0, &[7; 4096]).await;
    client.refused(Code::Silent, "the peer sent nothing for 3s").await;
    assert!(start.elapsed() >= Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(rig.wait_until_closed("d0").phase, "interrupted");
}

/// A disk that fails in the middle is faulted, with its reason, everywhere; the others go on; and once the cause is
/// gone the next pass makes it whole.
fn fails_in_the_middle(engine: &str) {
    let dir = directory();
    let small = Tmpfs::mount(&dir.path().join("small"), 8 * MIB);
    let service = Service::start(dir.path(), &["--engine", engine]);
    let backing = dir.path().join("small/d0.img");
    let targets = vec![Loop::create(&backing, 24 * MIB), Loop::create(&dir.path().join("d1.img"), 16 * MIB)];
    let mut rig = Rig::assemble(dir, service, targets);
    rig.mounts = vec![Box::new(small)];
    let (source, other) = (rig.random("source.img", 24 * MIB), rig.random("other.img", 16 * MIB));
    let beside = rig.start_into_pass(&[("d1", &other)], &["--bwlimit", "8M", "--compression", "off"]);
    let sent =
        rig.send(&[("d0", &source)], &[]).fails(1, &["the target disk failed: ", "d0.img at byte", "(io)"]);
    let reason = "write loop:";
    assert!(sent.stderr.contains(reason), "{sent:#?}");
    let volume = rig.wait_until_closed("d0");
    assert_eq!(volume.phase, "faulted");
    assert!(volume.error.as_deref().unwrap().contains(reason), "{volume:?}");
    let recorded = rig.service.recorded(MACHINE, "d0");
    assert_eq!((&recorded["state"], &recorded["last_commit"]), (&"faulted".into(), &().into()));
    assert!(recorded["fault"]["reason"].as_str().unwrap().contains(reason), "{recorded}");
    assert!(rig.service.log().contains("volume faulted"));
    assert_eq!(rig.service.metric("mt_agent_volume_faults_total{machine=\"web01\",disk=\"d0\"}"), 1.0);
    // It stays so until somebody does something about it, also over a restart.
    rig.send(&[("d0", &source)], &[]).fails(1, &["the target disk failed"]);
    beside.finish().ok();
    assert_equal(&other, rig.targets[1].backing());
    rig.synchronized("d1");
    rig.service.process().signal(Signal::SIGTERM);
    rig.service.process().wait_within(PATIENCE);
    rig.service.spawn();
    assert_eq!(rig.service.volume(MACHINE, "d0").phase, "faulted");

    Tmpfs::resize(&rig.path("small"), 64 * MIB);
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, &backing);
    rig.synchronized("d0");
    assert_eq!(rig.service.recorded(MACHINE, "d0")["fault"], serde_json::Value::Null);
}

#[test]
fn a_target_that_fails_in_the_middle_with_io_uring() {
    require_root!();
    fails_in_the_middle("io-uring");
}

#[test]
fn a_target_that_fails_in_the_middle_with_threads() {
    require_root!();
    fails_in_the_middle("threads");
}

/// A disk that is pulled: its size goes to nothing under the writes. And one that turns read-only, as disks and
/// arrays do when they are in trouble.
#[test]
fn a_target_that_vanishes_in_the_middle() {
    require_root!();
    let rig = Rig::new(&[16 * MIB, 4 * MIB]);
    let source = rig.random("source.img", 16 * MIB);
    let slow = ["--whole", "--bwlimit", "8M", "--compression", "off"];
    type Harm = fn(&Loop, bool);
    let vanish: Harm = |disk, harm| disk.resize(if harm { 0 } else { 16 * MIB });
    let protect: Harm = |disk, harm| disk.set_read_only(harm);
    for (harm, again) in [(vanish, "are needed"), (protect, "it is read-only")] {
        support::write_random(&source, 0, 16 * MIB);
        let send = rig.start_into_pass(&[("d0", &source)], &slow);
        harm(&rig.targets[0], true);
        send.finish().fails(1, &["the target disk failed: write loop:"]);
        let volume = rig.wait_until_closed("d0");
        assert_eq!(volume.phase, "faulted");
        assert_eq!(rig.state("d0"), "faulted");
        rig.send(&[("d0", &source)], &[]).fails(3, &[again]);
        assert_eq!(rig.state("d0"), "faulted");
        goes_on(&rig, "d1");
        harm(&rig.targets[0], false);
        rig.send(&[("d0", &source)], &[]).ok();
        assert_equal(&source, rig.targets[0].backing());
        rig.synchronized("d0");
    }
}

/// The source fails: it shrinks while it is read, to nothing or to a part of it.
#[test]
fn a_source_that_vanishes_in_the_middle() {
    require_root!();
    // Much more than is read ahead: the end is not read yet when it goes.
    const SIZE: u64 = 80 * MIB;
    let rig = Rig::new(&[SIZE]);
    let source = Loop::create(&rig.path("source.img"), SIZE);
    let cut = "was made smaller while it was read, from 80.0 MiB to 60.0 MiB";
    for (left, told) in [(0, &["read the source: read /dev/loop"][..]), (60 * MIB, &[cut, "--resized"])] {
        source.resize(SIZE);
        support::write_random(source.backing(), 0, SIZE);
        let send =
            rig.start_into_pass(&[("d0", source.node())], &["--bwlimit", "8M", "--compression", "off"]);
        source.resize(left);
        send.finish().fails(1, told);
        assert_eq!(rig.wait_until_closed("d0").phase, "interrupted");
    }
    goes_on(&rig, "d0");
}

/// Everything that is kept lies on a file system that is full.
#[test]
fn a_full_state_directory_loses_nothing() {
    require_root!();
    let dir = directory();
    let state = Tmpfs::mount(&dir.path().join("state"), 16 * MIB);
    let service = Service::start(dir.path(), &[]);
    let sizes = [4 * MIB, 16 * MIB, 4 * MIB];
    let disk = |(index, size): (usize, &u64)| Loop::create(&dir.path().join(format!("d{index}.img")), *size);
    let targets = sizes.iter().enumerate().map(disk).collect();
    let mut rig = Rig::assemble(dir, service, targets);
    rig.mounts = vec![Box::new(state)];
    goes_on(&rig, "d0");
    let before = rig.service.recorded(MACHINE, "d0");
    let source = rig.random("source.img", 16 * MIB);
    // One that is under way when the space goes: what it sent is on the disk, and no commit is recorded.
    let send = rig.start_into_pass(&[("d1", &source)], &["--bwlimit", "4M", "--compression", "off"]);
    let filler = Tmpfs::fill(&rig.path("state"));
    let told = send.finish().fails(1, &["No space left on device", "(no-space)"]);
    assert!(!told.stderr.contains(rig.path("state").to_str().unwrap()), "{told:#?}");
    assert_eq!(rig.wait_until_closed("d1").phase, "interrupted");
    assert_eq!(rig.state("d1"), "receiving");
    // One that begins then: nothing is written.
    rig.send(&[("d0", &source)], &[]).fails(3, &["size-mismatch"]);
    let small = rig.random("small.img", MIB);
    rig.send(&[("d0", &small)], &[]).fails(3, &["No space left on device", "(no-space)"]);
    assert_eq!(rig.service.recorded(MACHINE, "d0"), before);
    assert_eq!(rig.wait_until_closed("d0").phase, "synchronized");
    assert!(support::first_difference(&small, rig.targets[0].backing()).is_some());
    assert!(rig.service.log().contains("No space left on device"));
    // New machines, new disks.
    let (at, dir) = (rig.service.address().to_string(), rig.service.state_dir());
    run(&["token", "create", "db01", "--address", &at, "--state-dir", &dir])
        .fails(1, &["No space left on device"]);
    let extra = Loop::create(&rig.path("extra.img"), MIB);
    rig.service.protect_add(MACHINE, "extra", &extra).fails(1, &["nothing was changed: free some space"]);

    fs::remove_file(filler).unwrap();
    assert_eq!(rig.service.recorded(MACHINE, "d0"), before);
    rig.send(&[("d1", &source)], &[]).ok();
    assert_equal(&source, rig.targets[1].backing());
    rig.service.protect_add(MACHINE, "extra", &extra).ok();
    goes_on(&rig, "d0");
}

#[test]
fn a_second_sender_waits_for_the_first() {
    require_root!();
    let rig = Rig::new(&[16 * MIB, 4 * MIB]);
    let (first, second) = (rig.random("first.img", 16 * MIB), rig.random("second.img", 16 * MIB));
    let elsewhere = rig.elsewhere();
    let one = rig.start_into_pass(&[("d0", &first)], &["--bwlimit", "8M", "--compression", "off"]);
    let two = one.standing_still(|| {
        let two = rig.start(&[("d0", &second)], &["--state-dir", &elsewhere, "--retry-for", "60s"]);
        wait_for("the refusal", || two.stderr().contains("(busy)").then_some(()));
        two
    });
    goes_on(&rig, "d1");
    one.finish().ok();
    let two = two.finish().ok();
    assert!(two.stderr.contains("trying again") && two.stderr.contains("(busy)"), "{two:#?}");
    assert!(
        two.stderr.contains("another session receives disk d0 of machine web01, from 127.0.0.1:"),
        "{two:#?}"
    );
    // How long it will wait, before it does.
    assert!(two.stderr.contains("every second, 40 times at most"), "{two:#?}");
    assert_equal(&second, rig.targets[0].backing());
    rig.synchronized("d0");
}

#[tokio::test]
async fn a_busy_disk_says_who_has_it() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let (client, _) = Client::begun(&rig, "d0", MIB).await;
    let mut late = Client::connect(&rig).await;
    let refusal = late.open("d0", MIB).await.unwrap_err();
    assert!(refusal.code == Code::Busy && refusal.code.retryable(), "{refusal}");
    let from = format!("from {} since 2", client.stream.get_ref().0.local_addr().unwrap());
    for text in ["another session receives disk d0 of machine web01", &from, "or end that `mt-agent send`"] {
        assert!(refusal.message.contains(text), "{refusal}");
    }
    rig.service.wait_for_log("mt-agent (pid ");
    // The one that has it keeps it, and its assignment.
    let remove = ["protect", "remove", MACHINE, "--config", &rig.service.config()];
    run(&remove).fails(3, &["is receiving"]);
    assert_eq!(rig.service.volume(MACHINE, "d0").phase, "receiving");
    drop(client);
    rig.wait_until_closed("d0");
    // So does one that compares it where it stands at no point.
    let mut compares = Client::connect(&rig).await;
    compares.kind = PassKind::Verify;
    compares.open("d0", MIB).await.unwrap();
    let mut late = Client::connect(&rig).await;
    let refusal = late.open("d0", MIB).await.unwrap_err();
    for text in ["another session compares disk d0 of machine web01", "or end that `mt-agent verify`"] {
        assert!(refusal.code == Code::Busy && refusal.message.contains(text), "{refusal}");
    }
    drop(compares);
    rig.service.wait_until_idle();
    // Of something else the peer hears no more than that: by whom is for the administrator there.
    let held = wait_for("whoever lists it to be done", || {
        File::options().read(true).custom_flags(libc::O_EXCL).open(rig.targets[0].node()).ok()
    });
    let mut late = Client::connect(&rig).await;
    let refusal = late.open("d0", MIB).await.unwrap_err();
    let text = &refusal.message;
    assert!(text.contains("held by something else") && !text.contains("pid"), "{refusal}");
    drop(held);
    let (_client, _) = Client::begun(&rig, "d0", MIB).await;
}

/// Everything is acknowledged, and the sender does not go.
#[tokio::test]
async fn who_stays_after_the_commit_keeps_nothing() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let (mut client, _) = Client::begun(&rig, "d0", 4096).await;
    client.data(0, 0, &[7; 4096]).await;
    client.commit(1, 4096).await.unwrap();
    let start = Instant::now();
    rig.wait_until_closed("d0");
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    let end = client.header().await;
    assert!(matches!(end, Err(wire::Error::Closed)), "{end:?}");
    rig.synchronized("d0");
    goes_on(&rig, "d0");
}

#[test]
fn a_killed_sender_leaves_an_interrupted_pass_and_the_others_alone() {
    require_root!();
    let rig = Rig::new(&[16 * MIB, 16 * MIB]);
    let source = rig.random("source.img", 16 * MIB);
    let slow = ["--whole", "--bwlimit", "2M", "--compression", "off"];
    let mut killed = rig.start_into_pass(&[("d0", &source)], &slow);
    let beside = rig.start_into_pass(&[("d1", &source)], &slow);
    killed.kill();
    let volume = rig.wait_until_closed("d0");
    assert_eq!((volume.phase.as_str(), volume.error, volume.last_commit), ("interrupted", None, None));
    assert!(volume.pass.is_some());
    assert_eq!(rig.state("d0"), "receiving");
    rig.service.wait_for_log("the connection broke off");
    beside.finish().ok();
    assert_equal(&source, rig.targets[1].backing());
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
    rig.synchronized("d0");
}

#[test]
fn a_service_that_is_stopped_in_the_middle_tells_its_senders() {
    require_root!();
    let mut rig = Rig::new(&[16 * MIB, 16 * MIB]);
    let source = rig.random("source.img", 16 * MIB);
    let slow = ["--whole", "--bwlimit", "2M", "--compression", "off"];
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // Whoever says nothing is not waited for.
        let _silent = [(); 3].map(|()| TcpStream::connect(rig.service.address()).unwrap());
        let sends = ["d0", "d1"].map(|disk| rig.start_into_pass(&[(disk, &source)], &slow));
        rig.service.process().signal(signal);
        let status = rig.service.process().wait_within(Duration::from_secs(10));
        assert_eq!(status.code(), Some(0), "{}", rig.service.log());
        assert!(!rig.service.log().contains("connections did not end in time"), "{}", rig.service.log());
        for send in sends {
            send.finish().fails(1, &["the service stops; run `mt-agent send` again", "(shutting-down)"]);
        }
        assert_eq!((rig.state("d0").as_str(), rig.state("d1").as_str()), ("receiving", "receiving"));
        // Nobody is there now.
        rig.send(&[("d0", &source)], &[]).fails(1, &["no connection to the master target", "refused"]);
        run(&["status", "--config", &rig.service.config()])
            .fails(3, &["the service is not running", "mt-agent serve"]);
        rig.service.spawn();
        assert_eq!(rig.service.volume(MACHINE, "d0").phase, "interrupted");
        for (index, disk) in ["d0", "d1"].into_iter().enumerate() {
            rig.send(&[(disk, &source)], &["--another-disk"]).ok();
            assert_equal(&source, rig.targets[index].backing());
            rig.synchronized(disk);
        }
    }
    assert!(rig.service.log().contains("stopped"));
}

#[test]
fn a_service_that_cannot_start_says_why() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let config = rig.service.config();
    // A second one with the same state, and one that only shares the control socket.
    let pid = rig.service.status().service.pid;
    let holder = format!("mt-agent is running already with pid {pid}");
    run(&["serve", "--config", &config]).fails(3, &[&holder, "--state-dir"]);
    let state = rig.path("elsewhere");
    let elsewhere = ["serve", "--config", &config, "--state-dir", state.to_str().unwrap()];
    run(&elsewhere).fails(3, &["another mt-agent answers on"]);
    // A port that is taken.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    run(&[&elsewhere[..], &["--listen", &listen]].concat())
        .fails(3, &[&listen, "Address already in use", "the port is taken", "ss -ltnp"]);
    // Wrong usage, and a configuration that says what there is not.
    for wrong in [&["--engine", "magic"][..], &["--listen", "here"], &["--no-such-flag"], &["extra"]] {
        run(&[&["serve"], wrong].concat()).fails(2, &["error: "]);
    }
    for wrong in [&["send"][..], &["send", "--machine", MACHINE], &["protect", "add"], &["token"], &[]] {
        run(wrong).fails(2, &[]);
    }
    let bad = rig.path("bad.toml");
    fs::write(&bad, "listen = \"127.0.0.1:0\"\nallow_lop = true\n").unwrap();
    run(&["serve", "--config", bad.to_str().unwrap()])
        .fails(3, &["bad.toml:2", "did you mean `allow_loop`?"]);
    goes_on(&rig, "d0");
}

/// A token is not spent on an identity that there is no room for.
#[test]
fn a_full_disk_of_the_source_spends_no_token() {
    require_root!();
    let mut rig = Rig::new(&[]);
    let state = Tmpfs::mount(&rig.path("small"), MIB);
    rig.mounts = vec![Box::new(state)];
    let filler = Tmpfs::fill(&rig.path("small"));
    let (token, dir) = (rig.service.token("db01"), rig.path("small"));
    let enroll = ["enroll", &token, "--state-dir", dir.to_str().unwrap()];
    run(&enroll).fails(1, &["No space left on device"]);
    fs::remove_file(filler).unwrap();
    run(&enroll).ok();
}

/// A state directory may belong to a service user, who can put there what they like: root does nothing elsewhere for that.
#[test]
fn a_lock_that_is_a_link_is_none() {
    require_root!();
    let rig = Rig::new(&[MIB]);
    let source = rig.random("source.img", MIB);
    let send = || rig.send(&[("d0", &source)], &[]);
    send().ok();
    let (locks, victim) = (rig.client().join("send/web01.locks"), rig.path("victim"));
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("d0"), "of root").unwrap();
    let unchanged = || {
        let file = victim.join("d0");
        assert_eq!(fs::read(&file).unwrap(), b"of root");
        assert_eq!(fs::metadata(&file).unwrap().uid(), 0);
    };
    tool("chown", &["-R", "nobody:", rig.client().to_str().unwrap()]);
    fs::remove_dir_all(&locks).unwrap();
    symlink(&victim, &locks).unwrap();
    send().fails(1, &["cannot be seen whether another `mt-agent send`", "open", "web01.locks"]);
    unchanged();
    fs::remove_file(&locks).unwrap();
    fs::create_dir(&locks).unwrap();
    let lock = locks.join("d0");
    symlink(victim.join("d0"), &lock).unwrap();
    send().fails(1, &["cannot be seen whether another `mt-agent send`", "web01.locks/d0"]);
    unchanged();
    fs::remove_file(&lock).unwrap();
    nix::unistd::mkfifo(&lock, nix::sys::stat::Mode::S_IRWXU).unwrap();
    send().fails(1, &["no regular file"]);
    fs::remove_file(&lock).unwrap();
    send().ok();
}

/// No machine stays unprotected for want of a lock; one that is there is kept to.
#[test]
fn a_state_directory_that_is_full_or_read_only_stops_no_sender() {
    require_root!();
    let mut rig = Rig::new(&[MIB]);
    let source = rig.random("source.img", MIB);
    let small = rig.path("small");
    rig.mounts = vec![Box::new(Tmpfs::mount(&small, MIB))];
    rig.service.enroll(MACHINE, &small);
    let state = small.to_str().unwrap();
    let remount = |options: &str| tool("mount", &["-o", &format!("remount,{options}"), state]);
    let note = "another `mt-agent send` of the same disks would not be noticed";
    let sends = |why: Option<&str>| {
        let sent = rig.send(&[("d0", &source)], &["--state-dir", state]).ok();
        let told = sent.stderr.contains(note);
        assert!(told == why.is_some() && sent.stderr.contains(why.unwrap_or("")), "{sent:#?}");
    };
    remount("nr_inodes=20");
    let fillers: Vec<_> = (0..20).map(|index| small.join(format!("filler{index}"))).collect();
    let made = fillers.iter().filter(|filler| File::create(filler).is_ok()).count();
    assert!((1..20).contains(&made), "{made}");
    sends(Some("No space left on device"));
    fillers[..made].iter().for_each(|filler| fs::remove_file(filler).unwrap());
    sends(None);
    let filler = Tmpfs::fill(&small);
    sends(None);
    fs::remove_file(filler).unwrap();

    remount("ro");
    sends(None);
    let first = rig.start(&[("d0", &source)], &["--state-dir", state, "--every", "1h"]);
    wait_for("its pass", || first.stdout().contains("committed").then_some(()));
    let holder = format!("with pid {}", first.pid());
    rig.send(&[("d0", &source)], &["--state-dir", state]).fails(3, &["d0 of web01 is being sent", &holder]);
    drop(first);
    remount("rw");
    fs::remove_dir_all(small.join("send/web01.locks")).unwrap();
    remount("ro");
    sends(Some("Read-only file system"));
}

/// A limit above the number of strangers that are borne: who has a place is a stranger no more.
#[tokio::test]
async fn many_sessions_are_open_at_once_where_that_is_allowed() {
    require_root!();
    let mut rig = Rig::new(&[4 * MIB]);
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "max_sessions = 75\n"));
    let mut clients = Vec::new();
    for _ in 0..75 {
        clients.push(Client::connect(&rig).await);
    }
    assert_eq!(rig.service.status().service.sessions, 75);
    // The first one, too, is still served.
    clients[0].open("d0", MIB).await.unwrap();
    let mut over = Client::connect(&rig).await;
    assert_eq!(over.open("d0", MIB).await.unwrap_err().code, Code::Busy);
}

/// Connections that say nothing, as many as anyone likes to open, lock nobody out.
#[test]
fn silent_strangers_lock_nobody_out() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let mut tries = 0..5;
    // Strangers are given up after 15 seconds: it shows nothing where so long was needed.
    let strangers = loop {
        let strangers: Vec<TcpStream> =
            (0..300).map(|_| TcpStream::connect(rig.service.address()).unwrap()).collect();
        let start = Instant::now();
        goes_on(&rig, "d0");
        let nth = tries.next().expect("one of the tries is done in time");
        rig.service.enroll(&format!("other{nth}"), &rig.path(&format!("other{nth}")));
        if start.elapsed() < Duration::from_secs(10) {
            break strangers;
        }
    };
    rig.service.wait_for_log("too many newer connections");
    wait_for("most of them to be gone", || (rig.service.status().service.sessions <= 64).then_some(()));
    drop(strangers);
}

/// Whoever was dropped before the first word, as the oldest stranger is, tries again.
#[test]
fn a_connection_that_is_dropped_unanswered_is_tried_again() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let between = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, service) = (between.local_addr().unwrap().to_string(), rig.service.address());
    let pass_on = std::thread::spawn(move || {
        drop(between.accept().unwrap());
        let (near, far) = (between.accept().unwrap().0, TcpStream::connect(service).unwrap());
        std::thread::scope(|scope| {
            for (mut from, mut to) in [(&near, &far), (&far, &near)] {
                scope.spawn(move || {
                    std::io::copy(&mut from, &mut to).ok();
                    to.shutdown(std::net::Shutdown::Write).ok();
                });
            }
        });
    });
    let source = rig.random("source.img", MIB);
    let disk = format!("d0={}", source.display());
    let state = rig.client();
    let mut command = support::mt_agent();
    command.args(["send", "--machine", MACHINE, "--to", &address, "--disk", &disk, "--state-dir"]).arg(state);
    command.args(["--connections", "1"]);
    let outcome = rig.spawn(command).finish().ok();
    assert!(outcome.stderr.contains("trying again"), "{outcome:#?}");
    assert_equal(&source, rig.targets[0].backing());
    pass_on.join().unwrap();
}

/// More connections than are allowed: those that are open are served, and the others are told to try again.
#[tokio::test]
async fn connections_beyond_the_limit_wait_their_turn() {
    require_root!();
    let mut rig = Rig::new(&[4 * MIB]);
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "max_sessions = 1\n"));
    let (mut client, _) = Client::begun(&rig, "d0", 4096).await;
    let mut second = Client::connect(&rig).await;
    let refusal = second.open("d0", 4096).await.unwrap_err();
    assert_eq!(refusal.code, Code::Busy);
    assert!(refusal.code.retryable() && refusal.message.contains("`max_sessions`"), "{refusal}");
    client.data(0, 0, &[7; 4096]).await;
    client.commit(1, 4096).await.unwrap();
    drop(client);
    rig.wait_until_closed("d0");
    goes_on(&rig, "d0");
}

/// Whatever ends a `send` of several disks: each result is said as soon as it is there, and what was committed stays
/// so.
#[test]
fn an_interrupted_send_says_what_became_of_each_disk() {
    require_root!();
    let rig = Rig::new(&[MIB, 64 * MIB]);
    let (small, large) = (rig.random("small.img", 64 * KIB), rig.random("large.img", 64 * MIB));
    let disks: [(&str, &Path); 2] = [("d0", &small), ("d1", &large)];
    let slow = ["--whole", "--bwlimit", "4M", "--compression", "off"];
    for (signal, json) in [(Signal::SIGINT, false), (Signal::SIGTERM, false), (Signal::SIGTERM, true)] {
        let send = rig.start(&disks, &[&slow[..], if json { &["--json"] } else { &[] }].concat());
        wait_for("a pass that is done beside one that is not", || {
            let (first, second) = (rig.service.volume(MACHINE, "d0"), rig.service.volume(MACHINE, "d1"));
            (first.phase == "committing" && second.written_bytes > Some(0)).then_some(())
        });
        send.signal(signal);
        let word = "interrupted before its commit was acknowledged";
        let texts = [format!("d0: {word}"), format!("d1: {word}"), "interrupted: 2 of 2 disks".to_owned()];
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let sent = send.finish().fails(1, if json { &[] } else { &texts });
        // A point is there on all disks or on none.
        for disk in ["d0", "d1"] {
            assert_eq!(rig.wait_until_closed(disk).phase, "interrupted");
        }
        if json {
            for index in [0, 1] {
                let disk = &sent.json()["disks"][index];
                assert!(disk["error"].as_str().unwrap().contains(word), "{sent:#?}");
                assert_eq!(disk["pass"], serde_json::Value::Null, "{sent:#?}");
            }
        }
    }
}

/// Something else listens where the master target should.
#[test]
fn a_server_of_another_kind_is_named() {
    require_root!();
    let rig = Rig::new(&[4 * MIB]);
    let source = rig.random("source.img", MIB);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n").unwrap();
        // Until the sender has gone.
        stream.read_to_end(&mut Vec::new()).ok();
    });
    let (state, disk) = (rig.client(), format!("d0={}", source.display()));
    let state = state.to_str().unwrap();
    run(&["send", "--machine", MACHINE, "--to", &to, "--state-dir", state, "--disk", &disk])
        .fails(3, &["what answers is not the master target", "check the address", "does not speak TLS"]);
    other.join().unwrap();
}

/// However the source is named: a target does not become its own copy.
#[test]
fn a_target_is_not_sent_to_itself() {
    require_root!();
    let dir = directory();
    let service = Service::start(dir.path(), &[]);
    // It holds something, and did so when it was assigned.
    let backing = dir.path().join("d0.img");
    support::write_random(&backing, 0, 4 * MIB);
    let targets = vec![Loop::attach(&backing, 512), Loop::create(&dir.path().join("d1.img"), 4 * MIB)];
    let rig = Rig::assemble(dir, service, targets);
    let target = &rig.targets[0];
    for source in [target.node(), target.backing()] {
        let sent = rig.send(&[("d0", source)], &[]).fails(3, &["the source is a target disk of this host"]);
        let holder =
            format!("mt-agent (pid {}) has {}", rig.service.status().service.pid, target.node().display());
        assert!(sent.stderr.contains(&holder), "{sent:#?}");
        rig.wait_until_closed("d0");
        assert_eq!(rig.state("d0"), "empty", "a pass began");
    }
    // As the source of another disk it stands still, and is a disk like any other.
    rig.send(&[("d1", target.node())], &[]).ok();
    assert_equal(target.backing(), rig.targets[1].backing());
}

#[test]
fn a_hangup_does_not_end_the_service() {
    require_root!();
    let mut rig = Rig::new(&[16 * MIB]);
    let source = rig.random("source.img", 16 * MIB);
    let send = rig.start_into_pass(&[("d0", &source)], &["--bwlimit", "16M", "--compression", "off"]);
    rig.service.process().signal(Signal::SIGHUP);
    rig.service.wait_for_log("the configuration was read again");
    send.finish().ok();
    assert_equal(&source, rig.targets[0].backing());
}
