//! Several connections that carry one pass: what they are worth, and what they may not.

mod support;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mt_agent::net::frame::{Encoding, Header, Kind};
use mt_agent::net::message::{Code, Committed, Join, OpenReply};
use mt_agent::net::wire;
use rustls::ClientConfig;
use support::client::{Client, config, config_of};
use support::proxy::{Fate, Proxy};
use support::{MACHINE, MIB, Rig, assert_equal, wait_for};

/// A rig whose service has more in its configuration.
fn rig_with(size: u64, more: &str) -> Rig {
    let mut rig = Rig::new(&[size]);
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "allow_root_retention = true\n" + more));
    rig
}

/// The disk is open, and others may join; `d0` and 4 MiB.
async fn opened(rig: &Rig) -> (Client, OpenReply) {
    let mut first = Client::connect(rig).await;
    let reply = first.open("d0", 4 * MIB).await.unwrap();
    (first, reply)
}

/// Nothing that happened is in the way of the next pass.
fn goes_on(rig: &Rig) {
    rig.wait_until_closed("d0");
    rig.service.wait_until_idle();
    let source = rig.random("next.img", 4 * MIB);
    rig.send(&[("d0", &source)], &["--another-disk", "--connections", "4"]).ok();
    assert_equal(&source, rig.targets[0].backing());
}

/// A way that grants each connection its share: four have four.
#[test]
fn four_are_faster_than_one_where_each_is_limited() {
    require_root!();
    let rig = rig_with(16 * MIB, "");
    let source = rig.random("source.img", 16 * MIB);
    let proxy = Proxy::start(rig.service.address());
    proxy.will_all(Fate { rate: Some(2_000_000), ..Fate::default() });
    let to = proxy.address.to_string();
    let [four, one] = ["4", "1"].map(|connections| {
        let before = proxy.connections();
        let args = ["--to", &to, "--compression", "off", "--whole", "--json", "--connections", connections];
        let sender = rig.start(&[("d0", &source)], &args);
        wait_for("a pass", || {
            let volume = rig.service.volume(MACHINE, "d0");
            let carried = volume.connections.filter(|_| volume.received_bytes > Some(0))?;
            assert_eq!(carried.to_string(), connections);
            Some(())
        });
        let outcome = sender.finish().ok();
        assert_equal(&source, rig.targets[0].backing());
        let disk = outcome.json()["disks"][0].clone();
        assert_eq!(disk["connections"].to_string(), connections);
        // Each has its share of the work.
        let carried: Vec<u64> =
            (before..proxy.connections()).map(|connection| proxy.up_of(connection)).collect();
        assert_eq!(carried.len().to_string(), connections);
        assert!(carried.iter().all(|bytes| *bytes > 2 * MIB), "{carried:?}");
        disk["seconds"].as_f64().unwrap()
    });
    println!("one connection: {one:.2} s, four: {four:.2} s, {:.2} times as fast", one / four);
    assert!(one >= 2.5 * four, "one connection: {one:.2} s, four: {four:.2} s");
}

/// A limit is for all of them together.
#[test]
fn a_limit_holds_for_all_of_them_together() {
    require_root!();
    let rig = rig_with(4 * MIB, "");
    let source = rig.random("source.img", 4 * MIB);
    let args = ["--connections", "4", "--bwlimit", "2M", "--compression", "off", "--json"];
    let outcome = rig.send(&[("d0", &source)], &args).ok();
    let disk = &outcome.json()["disks"][0];
    assert_eq!(disk["connections"], 4);
    // What a limiter saves up is a tenth of a second's worth.
    let seconds = disk["seconds"].as_f64().unwrap();
    assert!(seconds >= 1.85, "{seconds}");
}

/// What one of them holds up is held by nobody else, and what all of them hold is bounded.
#[test]
fn a_slow_one_costs_no_memory() {
    require_root!();
    let mut rig = rig_with(64 * MIB, "");
    let source = rig.random("source.img", 64 * MIB);
    let proxy = Proxy::start(rig.service.address());
    let slow = Fate { rate: Some(1_000_000), ..Fate::default() };
    proxy.will([Fate::default(), slow]);
    let to = proxy.address.to_string();
    let args = ["--to", &to, "--compression", "lz4", "--connections", "4", "--json"];
    let outcome = rig.send(&[("d0", &source)], &args).ok();
    assert_eq!(outcome.json()["disks"][0]["connections"], 4);
    assert_equal(&source, rig.targets[0].backing());
    let peak = rig.service.peak_memory();
    let its = proxy.up_of(1);
    println!("{its} bytes took the slow way, peak of the receiver {} MiB", peak / MIB);
    // As for one connection, and a compressed payload and buffers for each of the others.
    assert!(peak < 64 * MIB + 16 * MIB + 3 * 5 * MIB / 4, "{} MiB", peak / MIB);
    // A few megabytes, not a quarter of all.
    assert!(its < 14 * MIB, "{its}");
}

/// Frames in any order over any of them, damage on one, what is covered and committed before all of its frames have come.
#[tokio::test]
async fn frames_come_in_any_order_and_each_counts_once() {
    require_root!();
    let rig = rig_with(4 * MIB, "");
    let (mut first, reply) = opened(&rig).await;
    let mut second = Client::joined(&rig, &reply).await.unwrap();
    let mut third = Client::joined(&rig, &reply).await.unwrap();
    first.begin().await.unwrap();
    let part = |byte: u8| vec![byte; MIB as usize];
    first.frame(&Header::covered(4, 4 * MIB), &[]).await;
    second.data(3, 3 * MIB, &part(3)).await;
    third.frame(&Header::zero(1, MIB, MIB), &[]).await;
    // Damaged on the way: it is refused on the first connection, and comes again over another.
    let damaged = Header::data(Encoding::Raw, 2, 0, MIB, &part(4)).unwrap();
    third.frame(&damaged, &part(7)).await;
    let refused = loop {
        let header = first.header().await.unwrap();
        if header.kind != Kind::Progress {
            break header;
        }
    };
    assert_eq!((refused.kind, refused.sequence, refused.offset, refused.length), (Kind::Refused, 2, 0, MIB));
    second.data(4, 0, &part(4)).await;
    first.tell(5, &first.commit_message(5, 4 * MIB)).await;
    // The first that is due comes last, and in two parts: it is not there before its last byte.
    let still_receives = async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(rig.service.volume(MACHINE, "d0").phase, "receiving");
    };
    still_receives().await;
    let (bytes, half) = (part(2), MIB as usize / 2);
    third.frame(&Header::data(Encoding::Raw, 0, 2 * MIB, MIB, &bytes).unwrap(), &bytes[..half]).await;
    still_receives().await;
    third.raw(&bytes[half..]).await;
    let committed: Committed = first.answer().await.unwrap();
    assert_eq!((committed.written, committed.zeroed), (3 * MIB, MIB));
    let target = fs::read(rig.targets[0].backing()).unwrap();
    assert!(target == [part(4), part(0), part(2), part(3)].concat());
    drop((first, second, third));
    goes_on(&rig);
}

/// A commit stands for the frames that it counts: none may come beyond it, whatever the sums say.
#[tokio::test]
async fn nothing_comes_beyond_the_commit() {
    require_root!();
    let rig = rig_with(4 * MIB, "");
    let (mut first, reply) = opened(&rig).await;
    let mut second = Client::joined(&rig, &reply).await.unwrap();
    first.begin().await.unwrap();
    second.frame(&Header::zero(0, 0, 2 * MIB), &[]).await;
    second.frame(&Header::zero(2, 2 * MIB, 2 * MIB), &[]).await;
    wait_for("both frames", || {
        (rig.service.volume(MACHINE, "d0").received_bytes == Some(4 * MIB)).then_some(())
    });
    first.tell(1, &first.commit_message(1, 4 * MIB)).await;
    first.refused(Code::Protocol, "numbered beyond the commit").await;
    assert_eq!(rig.wait_until_closed("d0").phase, "interrupted");
    goes_on(&rig);
}

/// Who may join, and when.
#[tokio::test]
async fn nobody_joins_who_was_not_invited() {
    require_root!();
    let rig = rig_with(4 * MIB, "max_sessions = 1\n");
    rig.service.enroll("other", &rig.path("other"));
    let other = config_of(&rig.path("other"), "other");
    let refused = |config: Arc<ClientConfig>, disk: &str, secret: String| {
        let join = Join { disk: disk.parse().unwrap(), secret };
        let rig = &rig;
        async move {
            let refusal = Client::join(rig, config, &join).await.err().expect("it should be refused");
            assert_eq!(refusal.code, Code::Refused, "{refusal}");
            refusal.message
        }
    };
    // Nothing is open.
    let nothing = refused(config(&rig), "d0", "A".repeat(43)).await;
    assert!(nothing.contains("no pass of disk d0 takes another connection"), "{nothing}");
    let (mut first, reply) = opened(&rig).await;
    let invitation = reply.join.clone().unwrap();
    assert_eq!(invitation.connections, 8);
    // All that is wrong sounds alike.
    let right = invitation.secret.clone();
    for (config, secret) in
        [(config(&rig), "A".repeat(43)), (config(&rig), String::new()), (config(&rig), format!("{right}A"))]
    {
        assert_eq!(refused(config, "d0", secret).await, nothing);
    }
    assert!(refused(config(&rig), "d1", right.clone()).await.contains("no pass of disk d1"));
    assert!(refused(other, "d0", right.clone()).await.contains("of machine other"));
    // With `max_sessions` at its end those that were invited still come, and no session.
    let mut joined = Vec::new();
    for _ in 1..invitation.connections {
        joined.push(Client::joined(&rig, &reply).await.unwrap());
    }
    let ninth = refused(config(&rig), "d0", right.clone()).await;
    assert!(ninth.contains("`max_connections`"), "{ninth}");
    let refusal = Client::connect(&rig).await.open("d0", MIB).await.unwrap_err();
    assert_eq!(refusal.code, Code::Busy);
    first.begin().await.unwrap();
    assert_eq!(rig.service.volume(MACHINE, "d0").connections, Some(8));
    assert_eq!(refused(config(&rig), "d0", right.clone()).await, nothing);
    drop((first, joined));
    rig.wait_until_closed("d0");
    assert_eq!(refused(config(&rig), "d0", right).await, nothing);
    goes_on(&rig);
}

#[tokio::test]
async fn where_one_connection_is_allowed_nobody_is_invited() {
    require_root!();
    let rig = rig_with(4 * MIB, "max_connections = 1\n");
    let (first, reply) = opened(&rig).await;
    assert_eq!(reply.join, None);
    drop(first);
    rig.wait_until_closed("d0");
    let source = rig.random("source.img", 4 * MIB);
    let outcome = rig.send(&[("d0", &source)], &["--connections", "8", "--json", "--another-disk"]).ok();
    assert_eq!(outcome.json()["disks"][0]["connections"], 1);
}

/// Whatever one of them says that it must not ends the pass for all of them; and so does its end.
#[tokio::test]
async fn what_is_wrong_with_one_ends_all() {
    require_root!();
    let rig = rig_with(4 * MIB, "");
    let bytes = vec![1; 8192];
    let data = |sequence, offset| Header::data(Encoding::Raw, sequence, offset, 8192, &bytes).unwrap();
    let cases: [(Vec<Header>, Code, &str); 5] = [
        (vec![data(0, 0), data(0, 8192)], Code::Protocol, "frame 0 came twice"),
        (vec![data(2, 0), data(2, 8192)], Code::Protocol, "frame 2 came twice"),
        (vec![data(0, 0), data(1, 4096)], Code::Protocol, "were sent before in this pass"),
        (vec![data(0, 4 * MIB - 4096)], Code::OutOfRange, "lie outside"),
        (vec![Header::covered(0, 4096)], Code::Protocol, "a Covered frame on another connection"),
    ];
    for (headers, code, text) in cases {
        let (mut first, reply) = opened(&rig).await;
        let mut second = Client::joined(&rig, &reply).await.unwrap();
        first.begin().await.unwrap();
        for header in headers {
            let payload: &[u8] = if header.kind == Kind::Data { &bytes } else { &[] };
            second.frame(&header, payload).await;
        }
        // Told on both.
        first.refused(code, text).await;
        second.refused(code, text).await;
        rig.wait_until_closed("d0");
    }
    for begun in [false, true] {
        let (mut first, reply) = opened(&rig).await;
        let [second, mut third] =
            [Client::joined(&rig, &reply).await.unwrap(), Client::joined(&rig, &reply).await.unwrap()];
        if begun {
            first.begin().await.unwrap();
        }
        drop(second);
        for client in [&mut first, &mut third] {
            let end = client.header().await;
            assert!(matches!(end, Err(wire::Error::Closed)), "{end:?}");
        }
        rig.wait_until_closed("d0");
    }
    goes_on(&rig);
}

/// One that stops in the middle of a frame holds the disk and its memory for no longer than the silence that is borne, and one
/// whose frame waits for another that never comes no longer either.
#[tokio::test]
async fn silence_ends_the_pass_in_its_time() {
    require_root!();
    let rig = rig_with(4 * MIB, "idle_timeout = \"3s\"\n");
    let bytes = vec![1; MIB as usize];
    for stuck in ["in a frame", "before a frame", "for a commit"] {
        let (mut first, reply) = opened(&rig).await;
        let mut second = Client::joined(&rig, &reply).await.unwrap();
        first.begin().await.unwrap();
        let start = Instant::now();
        match stuck {
            "in a frame" => {
                let header = Header::data(Encoding::Raw, 0, 0, MIB, &bytes).unwrap();
                second.frame(&header, &bytes[..1000]).await;
            }
            "before a frame" => second.frame(&Header::zero(1024, 0, 4096), &[]).await,
            _ => {
                second.frame(&Header::zero(1, 0, 4096), &[]).await;
                first.tell(2, &first.commit_message(2, 8192)).await;
            }
        }
        first.refused(Code::Silent, "sent nothing for 3s").await;
        let took = start.elapsed();
        assert!(took < Duration::from_secs(8), "{stuck}: {took:?}");
        rig.wait_until_closed("d0");
    }
    goes_on(&rig);
}
