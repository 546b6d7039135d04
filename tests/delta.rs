//! Only what differs travels: a copy that is there is compared by digests, and an interrupted pass is gone on with so.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mt_agent::net::frame::{Header, Kind};
use mt_agent::net::message::{self, Code, PassKind};
use mt_agent::net::wire;
use mt_agent::points::{Dropped, Log, Reason, Record};
use support::client::Client;
use support::proxy::{Act, Fate, Proxy};
use support::{Loop, MACHINE, MIB, Rig, Service, assert_equal, directory, tool, write_random};
use time::OffsetDateTime;

fn sent(outcome: &serde_json::Value, field: &str) -> u64 {
    outcome["disks"][0][field].as_u64().unwrap()
}

#[test]
fn a_second_pass_sends_the_blocks_that_differ() {
    require_root!();
    let size = 16 * MIB + 3 * 4096 + 100;
    for engine in ["io-uring", "threads"] {
        let dir = directory();
        let service = Service::start(dir.path(), &["--engine", engine]);
        let target = Loop::create(&dir.path().join("d0.img"), size.next_multiple_of(4096));
        let rig = Rig::assemble(dir, service, vec![target]);
        let source = rig.random("source.img", size);
        let args = ["--compression", "off", "--engine", engine, "--json"];
        let first = rig.send(&[("d0", &source)], &args).ok().json();
        assert_eq!((sent(&first, "sent_bytes"), sent(&first, "same_bytes")), (size, 0));

        // The first and the last byte, one in the middle, and a run across two units.
        write_random(&source, 8 * MIB - 5000, 10_000);
        let file = File::options().read(true).write(true).open(&source).unwrap();
        for at in [0, 5 * MIB + 777, size - 1] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[!byte[0]], at).unwrap();
        }
        let second = rig.send(&[("d0", &source)], &args).ok().json();
        assert_equal(&source, rig.targets[0].backing());
        let (sent_bytes, same) = (sent(&second, "sent_bytes"), sent(&second, "same_bytes"));
        // Three blocks, the last of them of 100 bytes, and the three or four of the run.
        assert!(
            (2 * 4096 + 100 + 3 * 4096..=2 * 4096 + 100 + 4 * 4096).contains(&sent_bytes),
            "{sent_bytes}"
        );
        assert_eq!(sent_bytes + same, size);
        assert_eq!(rig.service.recorded(MACHINE, "d0")["last_commit"]["bytes"], size);

        // All of it, where that is asked for.
        let whole = rig.send(&[("d0", &source)], &[&args[..], &["--whole"]].concat()).ok().json();
        assert_eq!(sent(&whole, "sent_bytes"), size);
    }
}

/// An image with holes, and a target that has something else there: the zeros go as runs, and what is zero already stays.
#[test]
fn holes_are_compared_without_being_read() {
    require_root!();
    let size = 512 * MIB;
    let rig = Rig::new(&[size]);
    let source = rig.path("source.img");
    File::create(&source).unwrap().set_len(size).unwrap();
    for at in [3 * MIB, 200 * MIB + 12_288, size - 4096] {
        write_random(&source, at, 4096);
    }
    rig.send(&[("d0", &source)], &[]).ok();
    // A hole takes the place of data, and data that of a hole.
    tool("fallocate", &["-p", "-o", &(3 * MIB).to_string(), "-l", "4096", source.to_str().unwrap()]);
    write_random(&source, 100 * MIB, 8192);
    let outcome = rig.send(&[("d0", &source)], &["--json", "--compression", "off"]).ok().json();
    assert_equal(&source, rig.targets[0].backing());
    assert_eq!(sent(&outcome, "sent_bytes"), 8192);
}

/// Killed in the middle of its first pass, a sender that is started again sends what did not arrive.
#[test]
fn a_pass_that_was_interrupted_sends_nothing_twice_but_what_was_under_way() {
    require_root!();
    let size = 64 * MIB;
    let mut rig = Rig::new(&[size]);
    let source = rig.random("source.img", size);
    for victim in ["sender", "receiver"] {
        rig.service.wait_until_idle();
        let sender =
            rig.spawn(rig.command(&[("d0", &source)], &["--compression", "off", "--bwlimit", "12M"]));
        support::wait_for("half of the pass", || {
            (rig.service.volume(MACHINE, "d0").received_bytes > Some(size / 2)).then_some(())
        });
        match victim {
            "sender" => drop(sender),
            _ => {
                rig.service.process().kill();
                drop(sender);
                rig.service.spawn();
            }
        }
        rig.service.wait_until_idle();
        let there = same_bytes(&source, rig.targets[0].backing());
        assert!(there > 16 * MIB, "{there}");
        let outcome = rig.send(&[("d0", &source)], &["--json", "--compression", "off"]).ok().json();
        assert_equal(&source, rig.targets[0].backing());
        let again = sent(&outcome, "sent_bytes");
        assert!(again <= size - there, "{victim}: {again} bytes were sent, and {there} were there");
        write_random(&source, 0, size);
    }
}

/// The original disk of a machine: only what differs from it travels in the first pass.
#[test]
fn a_target_with_an_older_copy_is_a_seed() {
    require_root!();
    let size = 16 * MIB;
    let dir = directory();
    let service = Service::start(dir.path(), &[]);
    let backing = dir.path().join("d0.img");
    write_random(&backing, 0, size);
    let target = Loop::attach(&backing, 512);
    let config = service.config();
    let add = |flags: &[&str]| {
        let disk = format!("d0={}", target.id());
        let args = ["protect", "add", MACHINE, "--config", &config, "--disk", &disk];
        support::run(&[&args[..], flags].concat())
    };
    let refused = add(&[]);
    assert!(refused.code == Some(3) && refused.stderr.contains("--seed makes use of it"), "{refused:#?}");
    assert_eq!(add(&["--seed", "--overwrite"]).code, Some(2));
    assert!(add(&["--seed"]).ok().stdout.contains("taken for an older copy"));
    service.enroll(MACHINE, &dir.path().join("client"));
    let rig = Rig::assemble(dir, service, Vec::new());
    let source = rig.path("source.img");
    fs::copy(&backing, &source).unwrap();
    write_random(&source, 5 * MIB, 4096);
    let outcome = rig.send(&[("d0", &source)], &["--json", "--compression", "off"]).ok().json();
    assert_equal(&source, &backing);
    assert_eq!(sent(&outcome, "sent_bytes"), 4096);
    assert_eq!(sent(&outcome, "same_bytes"), size - 4096);
}

#[test]
fn ranges_that_a_tracker_tells_are_sent_and_one_that_lies_is_found() {
    require_root!();
    let size = 16 * MIB + 100;
    let rig = Rig::new(&[16 * MIB + 4096]);
    let source = rig.random("source.img", size);
    let hints = rig.path("hints");
    let given = format!("d0={}", hints.display());
    let args = ["--json", "--compression", "off", "--changed-ranges", &given];
    // The first pass sends everything, whatever the hints say.
    fs::write(&hints, "0 4096\n").unwrap();
    let first = rig.send(&[("d0", &source)], &args).ok().json();
    assert_eq!(sent(&first, "sent_bytes"), size);
    assert_eq!(
        first["disks"][0]["ranges_set_aside"],
        "the target stands at no recovery point yet, so that all of the disk is sent"
    );

    write_random(&source, MIB, 8192);
    write_random(&source, size - 50, 50);
    fs::write(&hints, format!("{} 50\n{MIB} 8192\n", size - 50)).unwrap();
    let told = rig.send(&[("d0", &source)], &args).ok();
    assert!(!told.stderr.contains("set aside"), "{told:#?}");
    let told = told.json();
    assert_eq!(told["disks"][0]["ranges_set_aside"], serde_json::Value::Null);
    assert_equal(&source, rig.targets[0].backing());
    assert_eq!((sent(&told, "sent_bytes"), sent(&told, "read_bytes")), (8192 + 100, 8192 + 100));

    // One range is not told: without a check it does not arrive, and with one it does.
    write_random(&source, 2 * MIB, 4096);
    write_random(&source, 3 * MIB, 4096);
    fs::write(&hints, format!(r#"[{{"offset": {}, "length": 4096}}]"#, 2 * MIB)).unwrap();
    rig.send(&[("d0", &source)], &args).ok();
    let differs = support::first_difference(&source, rig.targets[0].backing());
    assert!(differs.is_some_and(|at| (3 * MIB..3 * MIB + 4096).contains(&at)), "{differs:?}");
    let checked = rig.send(&[("d0", &source)], &[&args[..], &["--verify"]].concat());
    assert_eq!(checked.code, Some(1), "{checked:#?}");
    assert!(checked.stderr.contains("do not rely on what made them"), "{checked:#?}");
    let missed = &checked.json()["disks"][0]["missed"];
    assert_eq!(*missed, serde_json::json!([{"offset": 3 * MIB, "length": 4096}]));
    assert_equal(&source, rig.targets[0].backing());
    rig.send(&[("d0", &source)], &[&args[..], &["--verify"]].concat()).ok();

    fs::write(&hints, "0 4096\nnonsense\n").unwrap();
    let refused = rig.send(&[("d0", &source)], &args);
    assert!(refused.code == Some(3) && refused.stderr.contains("line 2"), "{refused:#?}");
    let wrong = |args: &[&str], texts: &[&str]| {
        rig.send(&[("d0", &source)], args).fails(2, texts);
    };
    let of_another = given.replace("d0", "d9");
    wrong(&["--changed-ranges", &of_another], &["disk d9, which is not sent", "NAME=FILE", "(d0)"]);
    wrong(&["--changed-ranges", "hints"], &["NAME=FILE"]);
    wrong(&["--changed-ranges", &given, "--changed-ranges", &given], &["d0 twice"]);
    // What is written between the tracker's answer and the freeze is in no range.
    for more in [&["--pre-hook", "true"][..], &["--dry-run"], &[]] {
        let frozen = [&["--changed-ranges", &given, "--freeze"], more].concat();
        wrong(&frozen, &["do not go together", "a snapshot as the source", "--verify"]);
    }
    fs::write(&hints, "0 4096\n").unwrap();
    rig.send(&[("d0", &source)], &[&args[..], &["--freeze", "--verify"]].concat()).ok();
}

/// What was sent before a connection broke does not differ any more: no later attempt finds that the tracker did not tell it.
#[test]
fn a_tracker_that_lies_is_found_although_connections_break() {
    require_root!();
    let size = 16 * MIB;
    let rig = Rig::new(&[size]);
    let source = rig.random("source.img", size);
    rig.send(&[("d0", &source)], &[]).ok();
    let proxy = Proxy::start(rig.service.address());
    let (to, hints) = (proxy.address.to_string(), rig.path("hints"));
    let given = format!("d0={}", hints.display());
    let send = |ranges: &str, more: &[&str]| {
        fs::write(&hints, ranges).unwrap();
        proxy.will([5, 2].map(|mib| Fate {
            up: Some((mib * MIB, Act::Cut)),
            lasts: true,
            ..Fate::default()
        }));
        write_random(&source, MIB, 8 * MIB);
        let args =
            ["--to", &to, "--retry-for", "60s", "--compression", "off", "--connections", "1", "--json"];
        let outcome =
            rig.send(&[("d0", &source)], &[&args[..], &["--changed-ranges", &given], more].concat());
        assert_equal(&source, rig.targets[0].backing());
        assert_eq!(outcome.stderr.matches("trying again in").count(), 2, "{outcome:#?}");
        outcome
    };
    let lied = send("[]", &["--verify"]).fails(1, &["do not tell", "do not rely on what made them"]).json();
    let (lied, missed) = (&lied["disks"][0], &lied["disks"][0]["missed"]);
    assert!(lied["ranges_set_aside"].is_string() && lied["committed"].is_string(), "{lied:#}");
    assert_eq!(missed[0]["offset"], MIB, "{missed:#}");
    assert!(missed[0]["length"].as_u64() >= Some(4 * MIB), "{missed:#}");
    // Nothing was found of one that told all so far; what it told of the rest nobody knows.
    let told = format!("{MIB} {}\n", 8 * MIB);
    let unknown = send(&told, &["--verify"]).fails(1, &["for d0 could not be judged", "next pass"]).json();
    assert_eq!(unknown["disks"][0]["missed"], serde_json::json!([]));
    // Nobody asked.
    send(&told, &[]).ok();
}

/// What a tracker that failed leaves, or one of another disk, is not taken for what has changed.
#[test]
fn ranges_that_cannot_be_meant_are_refused() {
    require_root!();
    let size = 4 * MIB + 100;
    let rig = Rig::new(&[4 * MIB + 4096]);
    let source = rig.random("source.img", size);
    rig.send(&[("d0", &source)], &[]).ok();
    write_random(&source, MIB, 4096);
    let (before, hints) = (rig.service.recorded(MACHINE, "d0"), rig.path("hints"));
    let given = format!("d0={}", hints.display());
    let send = |ranges: &str, more: &[&str]| {
        fs::write(&hints, ranges).unwrap();
        rig.send(&[("d0", &source)], &[&["--changed-ranges", &given, "--json"], more].concat())
    };
    let (end, sizes) = (size.to_string(), format!("100 bytes at offset {size}"));
    for (ranges, texts) in [
        ("", &["holds no range", "`[]`"][..]),
        ("# thin_delta: no such device\n\n", &["holds no range"]),
        (&format!("0 4096\n\n{size} 100\n"), &["line 3", &sizes, &end]),
        (&format!(r#"[{{"offset": {size}, "length": 100}}]"#), &["entry 1", &sizes]),
    ] {
        send(ranges, &[]).fails(3, texts);
        // Also where they are made only then.
        send(ranges, &["--pre-hook", "true"]).fails(3, &[]);
        rig.wait_until_closed("d0");
    }
    assert_eq!(rig.service.recorded(MACHINE, "d0"), before);
    // That nothing has changed can be said.
    let nothing = send("[]", &[]).ok().json();
    assert_eq!((sent(&nothing, "read_bytes"), sent(&nothing, "sent_bytes")), (0, 0));
}

/// Ranges since the last point are all that differs only where the volume stands at that point: not after a pass that was
/// interrupted, nor where the source has grown.
#[test]
fn ranges_are_not_relied_on_where_they_cannot_tell_all() {
    require_root!();
    let size = 16 * MIB;
    let rig = Rig::new(&[2 * size]);
    let source = rig.random("source.img", size);
    rig.send(&[("d0", &source)], &[]).ok();
    let before = fs::read(&source).unwrap();
    // An interrupted pass brought what the source has no more.
    write_random(&source, 0, 8 * MIB);
    let sender = rig.start(&[("d0", &source)], &["--compression", "off", "--bwlimit", "4M"]);
    support::wait_for("a part of the pass", || {
        (rig.service.volume(MACHINE, "d0").received_bytes > Some(2 * MIB)).then_some(())
    });
    drop(sender);
    rig.wait_until_closed("d0");
    fs::write(&source, &before).unwrap();
    write_random(&source, 12 * MIB, 4096);
    let hints = rig.path("hints");
    fs::write(&hints, format!("{} 4096\n", 12 * MIB)).unwrap();
    let given = format!("d0={}", hints.display());
    let set_aside = |outcome: support::Outcome| {
        let why = "--changed-ranges is set aside: since the newest recovery point a pass was interrupted";
        assert!(outcome.stderr.contains(why), "{outcome:#?}");
    };
    // Nor do they deserve to be blamed for what they could not tell.
    set_aside(rig.send(&[("d0", &source)], &["--changed-ranges", &given, "--verify"]).ok());
    assert_equal(&source, rig.targets[0].backing());

    // What has grown is in no range. It is not taken for the same disk by itself.
    File::options().write(true).open(&source).unwrap().set_len(2 * size).unwrap();
    write_random(&source, size + MIB, 8192);
    fs::write(&hints, "[]").unwrap();
    set_aside(rig.send(&[("d0", &source)], &["--changed-ranges", &given, "--resized"]).ok());
    assert_equal(&source, rig.targets[0].backing());

    // They are read when the pass begins, after the pre-hook that makes them; and a pipe is none.
    write_random(&source, 3 * MIB, 4096);
    let hook = format!("echo {} 4096 > {}", 3 * MIB, hints.display());
    let args = ["--changed-ranges", &given, "--pre-hook", &hook, "--json"];
    let outcome = rig.send(&[("d0", &source)], &args).ok().json();
    assert_eq!(sent(&outcome, "read_bytes"), 4096);
    assert_equal(&source, rig.targets[0].backing());
    fs::remove_file(&hints).unwrap();
    nix::unistd::mkfifo(&hints, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let refused = rig.send(&[("d0", &source)], &["--changed-ranges", &given]);
    assert!(refused.code == Some(3) && refused.stderr.contains("no regular file"), "{refused:#?}");
}

/// A disk that is not what was sent before under its name is not sent by mistake; whoever means it says so once.
#[test]
fn a_source_of_another_size_is_refused_until_that_is_meant() {
    require_root!();
    let size = 8 * MIB;
    let rig = Rig::new(&[2 * size]);
    let source = rig.random("source.img", size);
    let send = |args: &[&str]| rig.send(&[("d0", &source)], &[&["--compression", "off"], args].concat());
    let resize = |size| File::options().write(true).open(&source).unwrap().set_len(size).unwrap();
    let is = |size| {
        assert_equal(&source, rig.targets[0].backing());
        assert_eq!(
            rig.service.recorded(MACHINE, "d0")["source"],
            serde_json::json!({"size": size, "id": null})
        );
    };
    assert_eq!(rig.service.recorded(MACHINE, "d0")["source"], serde_json::Value::Null);
    send(&[]).ok();
    is(size);
    for (now, flag) in
        [(size + 3 * MIB + 100, "--resized"), (size - 4096, "--resized"), (size, "--another-disk")]
    {
        let (recorded, before) =
            (rig.service.recorded(MACHINE, "d0"), fs::read(rig.targets[0].backing()).unwrap());
        let last = recorded["source"]["size"].to_string();
        resize(now);
        write_random(&source, 0, 4096);
        // Waiting does not help, so that nobody waits.
        send(&["--retry-for", "1h"]).fails(3, &[&last, &now.to_string(), "send it once with --resized"]);
        rig.start(&[("d0", &source)], &["--every", "0s"]).finish().fails(3, &["send it once with --resized"]);
        rig.wait_until_closed("d0");
        assert_eq!(rig.service.recorded(MACHINE, "d0"), recorded);
        assert!(fs::read(rig.targets[0].backing()).unwrap() == before);
        send(&[flag]).ok();
        is(now);
        // From here on it is what is known.
        send(&[]).ok();
    }
    send(&["--resized", "--every", "1h"]).fails(2, &["cannot be used with"]);

    // Interrupted, it was said, and is gone on with; what it was before is another one now.
    resize(2 * size);
    write_random(&source, 0, 2 * size);
    let sender = rig.start(&[("d0", &source)], &["--resized", "--compression", "off", "--bwlimit", "8M"]);
    support::wait_for("a part of the pass", || {
        (rig.service.volume(MACHINE, "d0").received_bytes > Some(2 * MIB)).then_some(())
    });
    drop(sender);
    rig.wait_until_closed("d0");
    resize(size);
    send(&[]).fails(3, &["send it once with --resized"]);
    resize(2 * size);
    send(&[]).ok();
    is(2 * size);
}

#[tokio::test]
async fn a_source_with_another_identity_is_refused_until_that_is_meant() {
    require_root!();
    let rig = Rig::new(&[8 * MIB]);
    let [one, two] = ["eui.0011223344556677", "eui.0011223344556688"].map(|id| Some(id.parse().unwrap()));
    let open = async |source: &Option<mt_agent::disk::id::DiskId>, size, another| {
        let mut client = Client::connect(&rig).await;
        (client.source, client.another) = (source.clone(), another);
        let reply = client.open("d0", size).await;
        (client, reply)
    };
    let send = async |source, another| {
        let (mut client, reply) = open(source, 4 * MIB, another).await;
        let standing = reply.unwrap().standing;
        client.begin().await.unwrap();
        client.frame(&Header::zero(0, 0, 4 * MIB), &[]).await;
        client.commit(1, 4 * MIB).await.unwrap();
        drop(client);
        rig.wait_until_closed("d0");
        standing
    };
    let recorded = || rig.service.recorded(MACHINE, "d0")["source"]["id"].clone();
    // Looking at the disk is no pass of it.
    open(&two, 4 * MIB, false).await.1.unwrap();
    rig.wait_until_closed("d0");
    assert!(!send(&one, false).await);
    assert!(send(&one, false).await);
    // An image of it has none.
    assert!(send(&None, false).await);
    assert_eq!(recorded(), "eui.0011223344556677");
    let refusal = open(&two, 4 * MIB, false).await.1.unwrap_err();
    assert_eq!(refusal.code, Code::Refused);
    for text in ["eui.0011223344556677", "eui.0011223344556688", "send it once with --another-disk"] {
        assert!(refusal.message.contains(text), "{refusal}");
    }
    rig.wait_until_closed("d0");
    // What changed on the one says nothing of the other.
    assert!(!send(&two, true).await);
    assert_eq!(recorded(), "eui.0011223344556688");
    assert!(send(&two, false).await);
    let refusal = open(&one, 4 * MIB, false).await.1.unwrap_err();
    assert!(refusal.message.contains("--another-disk"), "{refusal}");
}

/// Somebody writes to a source that nobody seems to use.
#[test]
fn a_source_that_is_written_to_meanwhile_is_no_moment() {
    require_root!();
    let size = 8 * MIB;
    let rig = Rig::new(&[size]);
    let image = rig.random("source.img", size);
    let disk = Loop::attach(&rig.random("disk.img", size), 512);
    let fuzzy = || !rig.service.recorded(MACHINE, "d0")["last_commit"]["point_in_time"].as_bool().unwrap();
    for (source, written) in [(disk.node(), disk.node()), (image.as_path(), image.as_path())] {
        let outcome = rig.send(&[("d0", source)], &["--whole"]).ok();
        assert!(!fuzzy(), "{outcome:#?}");
        let args = ["--whole", "--compression", "off", "--bwlimit", "4M"];
        let sender = rig.start_into_pass(&[("d0", source)], &args);
        File::options().write(true).open(written).unwrap().write_all_at(&[7; 512], 4096).unwrap();
        let outcome = sender.finish().ok();
        assert!(outcome.stderr.contains("somebody wrote to the source"), "{outcome:#?}");
        assert!(fuzzy());
    }
}

#[test]
fn verifying_and_digests_tell_what_is_the_same() {
    require_root!();
    let size = 16 * MIB;
    let rig = Rig::new(&[size]);
    let source = rig.random("source.img", size);
    rig.send(&[("d0", &source)], &[]).ok();
    let before = rig.service.recorded(MACHINE, "d0");
    let verify = |flags: &[&str]| verify(&rig, &source, flags);
    assert!(verify(&[]).ok().stdout.contains("d0: 16.0 MiB are equal"));
    let target = rig.targets[0].id().to_string();
    let digests = support::run(&["digest", source.to_str().unwrap(), &target]).ok();
    let lines: Vec<&str> = digests.stdout.lines().map(|line| line.split("  ").next().unwrap()).collect();
    let expected = blake3::hash(&fs::read(&source).unwrap()).to_hex().to_string();
    assert_eq!(lines, [&expected, &expected]);

    for at in [0, 7 * MIB + 4096] {
        write_random(&source, at, 4096);
    }
    let started = std::time::Instant::now();
    let outcome = verify(&["--json", "--rate", "8M"]);
    assert!(started.elapsed() > std::time::Duration::from_millis(1500), "{:?}", started.elapsed());
    assert_eq!(outcome.code, Some(1), "{outcome:#?}");
    let report = outcome.json();
    assert_eq!(
        report["disks"][0]["differences"],
        serde_json::json!([
            {"offset": 0, "length": 4096, "where": []}, {"offset": 7 * MIB + 4096, "length": 4096, "where": []}
        ])
    );
    assert_eq!((&report["equal"], &report["disks"][0]["differing_bytes"]), (&false.into(), &8192.into()));
    // Nothing was changed, and nothing was recorded.
    rig.wait_until_closed("d0");
    assert_eq!(rig.service.recorded(MACHINE, "d0"), before);
    assert!(support::first_difference(&source, rig.targets[0].backing()).is_some());
    let refused = support::run(&["digest", "/dev/shm/no-such-file"]);
    assert_eq!(refused.code, Some(3), "{refused:#?}");
}

/// However slowly it reads, what was written there and what is a hole: the master target hears of it.
#[test]
fn a_slow_comparison_is_not_taken_for_silence() {
    require_root!();
    let mut rig = Rig::new(&[8 * MIB]);
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "idle_timeout = \"3s\"\n"));
    let source = rig.random("source.img", 3 * MIB / 2);
    File::options().write(true).open(&source).unwrap().set_len(3 * MIB).unwrap();
    rig.send(&[("d0", &source)], &[]).ok();
    // A chunk takes 4 s.
    verify(&rig, &source, &["--rate", "256K"]).ok();
}

/// Most of what is no file was meant to be one.
#[test]
fn a_digest_of_what_is_not_there_says_that_there_is_no_such_file() {
    for (missing, others) in [
        ("/no/such.img", &[][..]),
        ("no/such.img", &[]),
        ("such.img", &["no disk is named so: it has none of the known forms"]),
    ] {
        let said = format!("there is no file `{missing}`");
        let refused = support::run(&["digest", missing]);
        assert!(!refused.stderr.contains("identity"), "{refused:#?}");
        refused.fails(3, &[&[said.as_str()][..], others].concat());
    }
    // An identity is one, whether its disk is here or not.
    let identity = "naa.6000c290000000000000000000000001";
    support::run(&["digest", identity]).fails(3, &["there is no disk `naa.6000c29"]);
}

/// What differs is told in terms of what lies there, and what is not compared is told, too.
#[test]
fn what_differs_is_told_by_partition_and_file_system() {
    require_root!();
    let size = 32 * MIB;
    let rig = Rig::new(&[size + 3 * 4096]);
    let source = rig.path("source.img");
    File::create(&source).unwrap().set_len(size).unwrap();
    let table = rig.path("table");
    fs::write(&table, "label: gpt\nstart=2048, size=16384\nstart=18432, size=20480\n").unwrap();
    tool("sh", &["-c", &format!("sfdisk -q {} < {}", source.display(), table.display())]);
    let path = source.to_str().unwrap();
    tool("mkfs.ext4", &["-q", "-L", "boot", "-E", "offset=1048576", path, "8192k"]);
    rig.send(&[("d0", &source)], &["--whole-disk"]).ok();
    let verify = |flags: &[&str]| verify(&rig, &source, &[&["--whole-disk"], flags].concat());
    let larger = "the target is larger by 12.0 KiB (12288 bytes): what it holds behind the end of the source was not compared";
    let equal = verify(&[]).ok();
    assert!(equal.stdout.contains("32.0 MiB are equal") && equal.stdout.contains(larger), "{equal:#?}");
    for at in [5 * MIB, 10 * MIB, 25 * MIB] {
        write_random(&source, at, 4096);
    }
    let told = verify(&["--json"]);
    assert_eq!(told.code, Some(1), "{told:#?}");
    let report = told.json();
    let places: Vec<&serde_json::Value> =
        report["disks"][0]["differences"].as_array().unwrap().iter().map(|one| &one["where"]).collect();
    let expected = [["partition 1 (ext4, LABEL=\"boot\")"], ["partition 2"], ["outside of all partitions"]]
        .map(|at| serde_json::json!(at));
    assert_eq!(places, expected.iter().collect::<Vec<_>>());
    assert_eq!(report["disks"][0]["target_size"], size + 3 * 4096);
    let told = verify(&[]);
    assert!(told.stdout.contains(": partition 1 (ext4, LABEL=\"boot\")\n"), "{told:#?}");
    // One of another size cannot be equal, whatever the part that both have is.
    for len in [size - MIB, size + 4096] {
        File::options().write(true).open(&source).unwrap().set_len(len).unwrap();
        let refused = verify(&[]).fails(3, &["send it once with --resized"]);
        assert!(refused.stderr.contains(&format!("had {size} bytes")), "{refused:#?}");
    }
}

#[test]
fn a_point_has_the_digest_that_its_source_had() {
    require_root!();
    let size = 8 * MIB + 100;
    let rig = Rig::new(&[9 * MIB]);
    let source = rig.random("source.img", size);
    let config = rig.service.config();
    let digest = |what: &str| {
        let report = support::run(&["digest", what, "--json", "--config", &config]).ok().json();
        let one = &report["digests"][0];
        assert_eq!(one["size"], size);
        (one["digest"].as_str().unwrap().to_owned(), one["disk"].clone())
    };
    let mut points = Vec::new();
    for _ in 0..3 {
        rig.send(&[("d0", &source)], &[]).ok();
        let list = support::run(&["points", MACHINE, "--json", "--config", &config]).ok().json();
        let id = list["points"].as_array().unwrap().last().unwrap()["id"].as_str().unwrap().to_owned();
        points.push((id, digest(source.to_str().unwrap()).0));
        write_random(&source, 3 * MIB + 777, 100_000);
        write_random(&source, size - 50, 50);
    }
    for (id, expected) in &points {
        assert_eq!(digest(&format!("{MACHINE}@{id}")), (expected.clone(), "d0".into()));
    }
    let latest = support::run(&["digest", &format!("{MACHINE}@latest"), "--config", &config]).ok().stdout;
    let (id, expected) = points.last().unwrap();
    assert_eq!(latest, format!("{expected}  {MACHINE}@{id} d0, {size} bytes\n"));
    let missing = format!("{MACHINE}@00000000000000000000000000000000");
    assert_eq!(support::run(&["digest", &missing, "--config", &config]).code, Some(3));
}

/// A sender that was stopped (a debugger, a suspended laptop) holds its disk for twice the patience of the service at most.
#[test]
fn a_sender_that_stands_still_gives_the_disk_back() {
    require_root!();
    let size = 24 * MIB;
    let mut rig = Rig::new(&[size]);
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "idle_timeout = \"2s\"\nallow_root_retention = true\n"));
    let source = rig.random("source.img", size);
    let args = ["--compression", "off", "--bwlimit", "4M", "--connections", "1"];
    let sender = rig.start_into_pass(&[("d0", &source)], &args);
    let lag = rig.service.volume(MACHINE, "d0").lag_bytes.unwrap();
    assert!(lag > 0 && lag < size, "{lag}");
    let metric = rig.service.metric("mt_agent_volume_lag_bytes{machine=\"web01\",disk=\"d0\"}");
    assert!(metric > 0.0 && metric <= lag as f64, "{metric} after {lag}");
    let connections = "mt_agent_volume_connections{machine=\"web01\",disk=\"d0\"}";
    assert_eq!(rig.service.metric(connections), 1.0);
    sender.signal(nix::sys::signal::Signal::SIGSTOP);
    let stopped = std::time::Instant::now();
    let volume = rig.wait_until_closed("d0");
    // Not at once, and what the machine is busy with.
    let after = stopped.elapsed().as_secs_f64();
    assert!((1.0..8.0).contains(&after), "{after} s");
    assert_eq!((volume.phase.as_str(), volume.lag_bytes), ("interrupted", None));
    rig.service.wait_for_log("the peer sent nothing for 2s");
    rig.send(&[("d0", &source)], &["--state-dir", &rig.elsewhere()]).ok();
    assert_equal(&source, rig.targets[0].backing());
    // It learns of it once it goes on.
    sender.signal(nix::sys::signal::Signal::SIGCONT);
    sender.finish().fails(1, &["the pass was not acknowledged"]);
    rig.synchronized("d0");
}

/// The limit goes by the clock of the machine.
#[test]
fn a_bandwidth_limit_goes_by_the_time_of_day() {
    require_root!();
    let size = 8 * MIB;
    let rig = Rig::new(&[size]);
    let source = rig.random("source.img", size);
    let took = |limit: &str| {
        let start = std::time::Instant::now();
        rig.send(&[("d0", &source)], &["--whole", "--compression", "off", "--bwlimit", limit]).ok();
        start.elapsed().as_secs_f64()
    };
    // This hour and the next one, so that midnight does not come between.
    let hour: u32 = tool("date", &["+%-H"]).parse().unwrap();
    let now = format!("{hour:02}:00-{:02}:00", (hour + 2) % 24);
    assert!(took(&format!("{now}=4M,1G")) > 1.7);
    assert!(took(&format!("{now}=1G,64K")) < 60.0);
    rig.send(&[("d0", &source)], &["--bwlimit", "8-18=4M"]).fails(2, &["no time of day"]);
}

fn same_bytes(a: &Path, b: &Path) -> u64 {
    let (a, b) = (fs::read(a).unwrap(), fs::read(b).unwrap());
    a.chunks(4096).zip(b.chunks(4096)).filter(|(a, b)| a == b).count() as u64 * 4096
}

/// What a client says of its comparing that cannot be.
#[tokio::test]
async fn digests_are_for_those_who_keep_to_the_rules() {
    require_root!();
    let rig = Rig::new(&[8 * MIB]);
    let begun = async |compare, kind: Option<PassKind>| {
        let mut client = Client::connect(&rig).await;
        client.compare = compare;
        client.kind = kind.unwrap_or(client.kind);
        client.open("d0", 4 * MIB).await.unwrap();
        let reply = client.begin().await;
        (client, reply)
    };
    for unit in [0, 1, 4095, 2048, 65537, 2 << 20, u32::MAX] {
        let refusal = begun(Some(unit), None).await.1.unwrap_err();
        assert_eq!(refusal.code, Code::Protocol, "{refusal}");
        rig.wait_until_closed("d0");
    }
    let refusal = begun(None, Some(PassKind::Verify)).await.1.unwrap_err();
    assert!(refusal.message.contains("without digests"), "{refusal}");
    rig.wait_until_closed("d0");

    let refine = Header::refine(0, 4096);
    let cases: [(Option<u32>, Vec<Header>, Code, &str); 6] = [
        (None, vec![refine], Code::Protocol, "where nothing is compared"),
        (Some(65536), vec![Header::refine(4 * MIB - 4096, 8192)], Code::OutOfRange, "outside"),
        (Some(65536), vec![Header::covered(0, 4 * MIB + 1)], Code::Protocol, "bytes are covered"),
        (Some(65536), vec![Header::covered(0, 8192), Header::covered(0, 4096)], Code::Protocol, "after 8192"),
        (
            Some(65536),
            vec![Header::covered(0, 8192), Header::zero(0, 4096, 4096)],
            Code::Protocol,
            "before in this pass",
        ),
        (
            Some(65536),
            vec![Header::covered(0, 8192), Header::zero(0, 8192, 4096), Header::zero(1, 8192, 1)],
            Code::Protocol,
            "before in this pass",
        ),
    ];
    for (compare, frames, code, text) in cases {
        let (mut client, reply) = begun(compare, None).await;
        reply.unwrap();
        for header in frames {
            client.frame(&header, &[]).await;
        }
        client.refused(code, text).await;
        rig.wait_until_closed("d0");
    }
    // Nothing may be left out, and what is only compared is not written.
    let (mut client, _) = begun(Some(65536), None).await;
    client.frame(&Header::covered(0, 4 * MIB - 1), &[]).await;
    let refusal = client.commit(0, 0).await.unwrap_err();
    assert!(refusal.message.contains("covers 0 of the source's"), "{refusal}");
    rig.wait_until_closed("d0");
    for kind in [Kind::Zero, Kind::Commit] {
        let (mut client, reply) = begun(Some(65536), Some(PassKind::Verify)).await;
        reply.unwrap();
        match kind {
            Kind::Zero => {
                client.frame(&Header::zero(0, 0, 4096), &[]).await;
                client.refused(Code::Protocol, "a Zero frame where a disk is only compared").await;
            }
            _ => {
                let refusal = client.commit(0, 0).await.unwrap_err();
                assert!(
                    refusal.message.contains("a Commit frame where a disk is only compared"),
                    "{refusal}"
                );
            }
        }
        rig.service.wait_until_idle();
    }
}

fn verify(rig: &Rig, source: &Path, flags: &[&str]) -> support::Outcome {
    let (to, state) = (rig.service.address().to_string(), rig.client().display().to_string());
    let disk = format!("d0={}", source.display());
    let args = ["verify", "--machine", MACHINE, "--to", &to, "--state-dir", &state, "--disk", &disk];
    support::run(&[&args[..], flags].concat())
}

/// What is compared is the newest point, whatever a pass has written since.
#[test]
fn verifying_beside_a_pass_sees_the_point_before_it() {
    require_root!();
    let size = 8 * MIB + 3 * 512;
    let rig = Rig::new(&[size]);
    let (old, new) = (rig.random("old.img", size), rig.path("new.img"));
    let target = rig.targets[0].backing();
    rig.send(&[("d0", &old)], &[]).ok();
    // By hand, and not where the pass writes.
    write_random(target, 7 * MIB + 8192, 512);
    fs::copy(&old, &new).unwrap();
    write_random(&new, 0, 6 * MIB);
    let args = ["--compression", "off", "--bwlimit", "2M", "--another-disk"];
    let mut pass = rig.start_into_pass(&[("d0", &new)], &args);
    let overwritten = || support::first_difference(&old, target).is_some_and(|at| at < MIB);
    support::wait_for("the first blocks", || overwritten().then_some(()));
    pass.signal(nix::sys::signal::Signal::SIGSTOP);
    assert_eq!(pass.has_ended(), None, "the pass ended before it could be looked at beside it");
    let told = verify(&rig, &old, &["--json"]);
    assert_eq!(told.code, Some(1), "{told:#?}");
    let report = told.json();
    let list = support::run(&["points", MACHINE, "--json", "--config", &rig.service.config()]).ok().json();
    assert_eq!(report["disks"][0]["point"], list["points"][0]["id"]);
    let expected = serde_json::json!([{"offset": 7 * MIB + 8192, "length": 4096, "where": []}]);
    assert_eq!(report["disks"][0]["differences"], expected);
    // Of what is being sent, it is all that the pass has to bring.
    let told = verify(&rig, &new, &["--json"]).json();
    assert_eq!(sent(&told, "differing_bytes"), 6 * MIB + 4096);
    pass.signal(nix::sys::signal::Signal::SIGCONT);
    pass.finish().ok();
    rig.synchronized("d0");
    assert_equal(&new, target);
    let equal = verify(&rig, &new, &[]).ok();
    assert!(equal.stdout.contains("8.0 MiB are equal to point "), "{equal:#?}");
}

/// The digest of a block, as a client that compares is told it.
async fn block(client: &mut Client, at: u64) -> Vec<u8> {
    client.frame(&Header::refine(at, 4096), &[]).await;
    loop {
        let header = client.header().await.unwrap();
        assert_eq!(header.kind, Kind::Digests);
        let mut payload = vec![0; header.payload_len as usize];
        wire::read_payload(&mut client.stream, &header, &mut payload).await.unwrap();
        if header.sequence == 4096 {
            return payload;
        }
    }
}

async fn comparing(rig: &Rig, size: u64) -> Client {
    let mut client = Client::connect(rig).await;
    (client.kind, client.compare) = (PassKind::Verify, Some(65536));
    let reply = client.open("d0", size).await.unwrap();
    assert!(reply.baseline.is_some());
    client.begin().await.unwrap();
    client
}

/// Comparing takes a place among the sessions, of which one disk has no more than a few.
#[tokio::test]
async fn few_compare_a_disk_at_once() {
    require_root!();
    let size = 4 * MIB;
    let rig = Rig::new(&[size]);
    let source = rig.random("source.img", size);
    rig.send(&[("d0", &source)], &[]).ok();
    let mut four = Vec::new();
    for _ in 0..4 {
        four.push(comparing(&rig, size).await);
    }
    let mut fifth = Client::connect(&rig).await;
    fifth.kind = PassKind::Verify;
    let refusal = fifth.open("d0", size).await.unwrap_err();
    assert_eq!(refusal.code, Code::Busy);
    let from = |client: &Client| format!("from {} since ", client.stream.get_ref().0.local_addr().unwrap());
    for text in four.iter().map(from).chain(["4 sessions compare disk d0".into(), "wait for one".into()]) {
        assert!(refusal.message.contains(&text), "{text} is missing: {refusal}");
    }
    // A pass is another matter.
    rig.send(&[("d0", &source)], &[]).ok();
    drop(four.pop());
    verify(&rig, &source, &[]).ok();
}

/// A point stays what it is while newer ones come; where it is let go of, nothing more is said of it; and a failover ends the
/// comparing as it ends a pass.
#[tokio::test]
async fn verifying_ends_where_its_point_does() {
    require_root!();
    let size = 4 * MIB;
    let rig = Rig::new(&[size]);
    let (old, new) = (rig.random("old.img", size), rig.random("new.img", size));
    let at = 3 * MIB as usize;
    let old_block = blake3::hash(&fs::read(&old).unwrap()[at..at + 4096]);
    rig.send(&[("d0", &old)], &[]).ok();
    let mut client = comparing(&rig, size).await;
    assert_eq!(block(&mut client, at as u64).await, old_block.as_bytes());
    assert_eq!(rig.service.volume(MACHINE, "d0").verified_bytes, Some(0));
    client.frame(&Header::covered(0, MIB), &[]).await;
    let status = || support::run(&["status", "--config", &rig.service.config()]).ok().stdout;
    support::wait_for("the status", || status().contains("synchronized, 1.0 MiB verified").then_some(()));
    let metric = "mt_agent_volume_verified_bytes{machine=\"web01\",disk=\"d0\"}";
    assert_eq!(rig.service.metric(metric), MIB as f64);
    for source in [&new, &old, &new] {
        rig.send(&[("d0", source)], &[]).ok();
        assert_eq!(block(&mut client, at as u64).await, old_block.as_bytes());
    }
    assert_equal(&new, rig.targets[0].backing());
    let mut log = Log::open(PathBuf::from(rig.service.state_dir()).join("retention")).unwrap();
    let points: Vec<_> = log.points(&MACHINE.parse().unwrap()).map(|point| point.id).collect();
    let mut drop_point = |point| {
        let (time, reason) = (OffsetDateTime::now_utc(), Reason::Age);
        log.append(Record::Dropped(Dropped { time, reason, points: vec![point] })).unwrap();
    };
    drop_point(points[1]);
    assert_eq!(block(&mut client, at as u64).await, old_block.as_bytes());
    drop_point(points[0]);
    client.frame(&Header::refine(at as u64, 4096), &[]).await;
    loop {
        let header = client.header().await.unwrap();
        if header.kind != Kind::Digests {
            let last: Result<message::Notice, _> = wire::read_message_body(&mut client.stream, &header).await;
            let Err(wire::Error::Peer(refusal)) = last else { panic!("{last:?}") };
            assert_eq!(refusal.code, Code::Refused);
            assert!(refusal.message.contains("was let go of meanwhile"), "{refusal}");
            break;
        }
    }
    drop(client);
    rig.service.wait_until_idle();
    assert_eq!(rig.service.volume(MACHINE, "d0").verified_bytes, None);

    let mut client = comparing(&rig, size).await;
    let mut failover = support::mt_agent();
    failover.args(["failover", MACHINE, "--to", "latest", "--config", &rig.service.config()]);
    let failover = rig.spawn(failover);
    client.refused(Code::Refused, "is being failed over").await;
    drop(client);
    failover.finish().ok();
    verify(&rig, &new, &[]).fails(3, &["was failed over to point"]);
}
