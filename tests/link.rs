//! A link that breaks: whatever happens on the way, what is acknowledged is there, and what arrived is not sent again.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use mt_agent::net::frame::Kind;
use mt_agent::net::message::PassKind;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use support::client::Client;
use support::proxy::{Act, Fate, Proxy};
use support::{KIB, MACHINE, MIB, Rig, assert_equal, wait_for, write_random};

const SIZE: u64 = 12 * MIB;
/// The smallest that can be configured.
const WINDOW: u64 = 2 * MIB;

fn rig() -> (Rig, Proxy) {
    let mut rig = Rig::new(&[SIZE]);
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "window = \"2M\"\nallow_root_retention = true\n"));
    let proxy = Proxy::start(rig.service.address());
    (rig, proxy)
}

fn send_through(rig: &Rig, proxy: &Proxy, source: &std::path::Path, more: &[&str]) -> support::Outcome {
    let to = proxy.address.to_string();
    let args = ["--to", &to, "--compression", "off", "--json", "--retry-for", "60s", "--connections"];
    // One, however long an answer takes on a busy machine.
    let more = if more.is_empty() { &["1"] } else { more };
    rig.send(&[("d0", source)], &[&args[..], more].concat())
}

/// `MT_AGENT_LINK_ROUNDS` for more than a run in passing has time for; `MT_AGENT_LINK_SEED` for the same ones again.
#[test]
fn whatever_happens_on_the_way() {
    require_root!();
    break_again_and_again(20, "1");
}

/// The same where several connections carry each pass: any of them may break, and takes the pass with it.
#[test]
fn whatever_happens_to_one_of_several_connections() {
    require_root!();
    break_again_and_again(8, "4");
}

fn break_again_and_again(rounds: u64, connections: &str) {
    let several = connections != "1";
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let rounds = number("MT_AGENT_LINK_ROUNDS").unwrap_or(rounds);
    let seed = number("MT_AGENT_LINK_SEED").unwrap_or_else(|| rand::rng().random());
    println!("{rounds} rounds, MT_AGENT_LINK_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    let (mut broken, mut excess) = (0, 0);
    for round in 0..rounds {
        // The first pass is an initial one; later ones bring up to a quarter of the disk.
        let mut changed = if round == 0 { SIZE } else { 0 };
        for _ in 0..if round == 0 { 0 } else { random.random_range(1..12) } {
            let len = random.random_range(1..SIZE / 48);
            let at = random.random_range(0..SIZE - len);
            write_random(&source, at, len);
            changed += (len / 4096 + 2) * 4096;
        }
        let fates: Vec<Fate> = (0..random.random_range(1..if several { 12 } else { 4 }))
            .map(|_| {
                let act = [Act::Cut, Act::Flip, Act::HalfClose][random.random_range(0..3)];
                // Early, so that the handshakes have their share, and late.
                let at = [random.random_range(1..9000), random.random_range(1..changed + 20_000)];
                let at = at[random.random_range(0..2)];
                let down = random.random_range(1..12_000);
                Fate {
                    up: random.random_bool(0.6).then_some((at, act)),
                    down: random.random_bool(0.5).then_some((down, act)),
                    delay: Duration::from_micros([0, 0, 300][random.random_range(0..3)]),
                    // The first one must get so far that the link is known to have been there.
                    ..Fate::default()
                }
            })
            .collect();
        let before = (proxy.up(), proxy.connections());
        proxy.will(fates.clone());
        let mut outcome = send_through(&rig, &proxy, &source, &[connections]);
        let mut tried = 1;
        let again = |outcome: &support::Outcome| outcome.stderr.matches("trying again in").count() as u64;
        let mut attempts = 1 + again(&outcome);
        // What breaks before anything arrived ends the command: the address may be wrong.
        while outcome.code != Some(0) && tried < 12 {
            tried += 1;
            outcome = send_through(&rig, &proxy, &source, &[connections]);
            attempts += 1 + again(&outcome);
        }
        assert_eq!(outcome.code, Some(0), "round {round} (seed {seed}), {fates:?}: {outcome:#?}");
        assert_equal(&source, rig.targets[0].backing());
        rig.synchronized("d0");
        if !several {
            attempts = (proxy.connections() - before.1) as u64;
        }
        let up = proxy.up() - before.0;
        broken += attempts - 1;
        // Each attempt may lose what was under way: the window, and what was in the buffers of the proxy's sockets; and
        // has a handshake, headers and what TLS adds.
        let bound = changed + changed / 20 + attempts * (WINDOW + 6 * MIB + 64 * 1024);
        assert!(up <= bound, "round {round} (seed {seed}): {up} bytes in {attempts} attempts for {changed}");
        excess = excess.max(up.saturating_sub(changed));
    }
    println!("{broken} attempts broke; at most {excess} bytes more than had changed were sent in a round");
    assert!(broken >= rounds / 3, "hardly anything broke");
    assert_eq!(rig.service.log().matches("volume faulted").count(), 0);
}

/// The sender waits for a master target that is gone for a while, and says so.
#[test]
fn a_link_that_is_down_is_waited_for() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    let down = Fate { refuse: true, ..Fate::default() };
    let cut = Fate { up: Some((4 * MIB, Act::Cut)), ..Fate::default() };
    proxy.will([cut, down, down, down]);
    let outcome = send_through(&rig, &proxy, &source, &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
    assert!(outcome.stderr.contains("trying again in"), "{outcome:#?}");
    // What arrived before the cut was not sent again.
    let sent = outcome.json()["disks"][0]["sent_bytes"].as_u64().unwrap();
    assert!(sent <= SIZE - MIB, "{sent}");
}

/// An address at which nobody ever answered is an error at once, and so is a refusal.
#[test]
fn what_waiting_does_not_help_is_told_at_once() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    let started = std::time::Instant::now();
    let outcome = rig.send(&[("d0", &source)], &["--to", "127.0.0.1:1", "--retry-for", "1h"]);
    assert_eq!(outcome.code, Some(1), "{outcome:#?}");
    let outcome = rig.send(&[("other", &source)], &["--retry-for", "1h"]);
    assert_eq!(outcome.code, Some(3), "{outcome:#?}");
    assert!(started.elapsed() < Duration::from_secs(20));
    // With --retry-for 0s a link that breaks is one, too.
    proxy.will([Fate { up: Some((4 * MIB, Act::Cut)), ..Fate::default() }]);
    let to = proxy.address.to_string();
    let args = ["--to", &to, "--retry-for", "0s", "--connections", "1"];
    let outcome = rig.send(&[("d0", &source)], &args);
    assert_eq!(outcome.code, Some(1), "{outcome:#?}");
    assert!(!outcome.stderr.contains("trying again in"), "{outcome:#?}");
}

/// With --retry-for 0s nothing else is waited for either, and for no longer than it says.
#[tokio::test]
async fn a_disk_that_somebody_has_is_waited_for_as_long_as_is_wanted() {
    require_root!();
    let (rig, _) = rig();
    let source = rig.random("source.img", MIB);
    let (_client, _) = Client::begun(&rig, "d0", MIB).await;
    for (wanted, least) in [("0s", 0.0), ("2s", 2.0)] {
        let started = std::time::Instant::now();
        let outcome = rig.send(&[("d0", &source)], &["--retry-for", wanted]).fails(3, &["(busy)"]);
        assert_eq!(outcome.stderr.contains("trying again"), least > 0.0, "{outcome:#?}");
        let took = started.elapsed().as_secs_f64();
        assert!((least..least + 10.0).contains(&took), "{took} s");
    }
}

/// Asked for everything, a sender brings everything, also where each connection breaks before its end: what it sent itself
/// is not sent again, and what the target had before is not relied on.
#[test]
fn everything_arrives_over_a_link_that_breaks_again_and_again() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    rig.send(&[("d0", &source)], &[]).ok();
    let before = proxy.up();
    proxy.will_all(Fate { up: Some((7 * MIB, Act::Cut)), ..Fate::default() });
    // Slow enough that what was written is looked at before the end.
    let outcome = send_through(&rig, &proxy, &source, &["1", "--whole", "--bwlimit", "2M"]).ok();
    let up = proxy.up() - before;
    let attempts = 1 + outcome.stderr.matches("trying again in").count() as u64;
    assert!(attempts > 1, "{outcome:#?}");
    // What is sent in the two seconds and a little more between two looks is lost with each connection.
    assert!(up >= SIZE && up < SIZE + attempts * 6 * MIB, "{up} bytes in {attempts} attempts");
    // Also where the result is for programs, each is told with its reason.
    let reasons = outcome.stderr.matches("mt-agent: d0: the pass was not acknowledged").count() as u64;
    assert_eq!(reasons, attempts - 1, "{outcome:#?}");
    assert_equal(&source, rig.targets[0].backing());
    // The next one is as whole.
    proxy.will_all(Fate::default());
    let whole = send_through(&rig, &proxy, &source, &["1", "--whole"]).ok().json();
    assert_eq!(whole["disks"][0]["sent_bytes"], SIZE);
}

/// Once a disk was opened the address is right, so that the connection is worth waiting for.
#[test]
fn a_link_that_is_lost_before_the_first_byte_is_waited_for() {
    require_root!();
    let (mut rig, _) = rig();
    let config = fs::read_to_string(rig.service.config()).unwrap();
    let port = rig.service.address().port();
    rig.service.restart_with_config(&config.replace("127.0.0.1:0", &format!("127.0.0.1:{port}")));
    let source = rig.random("source.img", SIZE);
    let (begun, go) = (rig.path("begun"), rig.path("go"));
    // It runs when the disk is open, and nothing was sent yet.
    let hook = format!("touch {}; while [ ! -e {} ]; do sleep 0.1; done", begun.display(), go.display());
    let sender = rig.start(&[("d0", &source)], &["--pre-hook", &hook, "--json", "--retry-for", "60s"]);
    wait_for("the hook", || begun.exists().then_some(()));
    rig.service.process().kill();
    rig.service.spawn();
    File::create(&go).unwrap();
    let outcome = sender.finish().ok();
    let reason = "mt-agent: d0: the master target broke the connection off before it answered";
    assert!(outcome.stderr.contains(reason) && outcome.stderr.contains("trying again in"), "{outcome:#?}");
    assert_equal(&source, rig.targets[0].backing());
}

/// Standard error is a full file system: what is said there is lost, and nothing else.
#[test]
fn a_sender_that_nobody_hears_goes_on() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    proxy.will([Fate { up: Some((4 * MIB, Act::Cut)), ..Fate::default() }]);
    let to = proxy.address.to_string();
    let args = ["--to", &to, "--compression", "off", "--retry-for", "60s", "--connections", "1"];
    let mut command = rig.command(&[("d0", &source)], &args);
    command.stdout(std::process::Stdio::null());
    command.stderr(File::options().write(true).open("/dev/full").unwrap());
    assert!(command.status().unwrap().success());
    assert_equal(&source, rig.targets[0].backing());
}

/// Nobody says that the other side is gone: the kernel finds out, within half a minute.
#[test]
fn a_peer_that_vanishes_is_noticed() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    proxy.will([Fate { up: Some((4 * MIB, Act::Swallow)), ..Fate::default() }]);
    // The proxy's own socket stays alive, so that only the service's silence tells; what it does tell is its own.
    let to = proxy.address.to_string();
    let args = ["--to", &to, "--compression", "off", "--retry-for", "60s", "--connections", "1"];
    let sender = rig.start(&[("d0", &source)], &args);
    wait_for("a pass that stands still", || {
        let received = || rig.service.volume(MACHINE, "d0").received_bytes;
        let before = received()?;
        thread::sleep(Duration::from_millis(500));
        (before > 0 && received() == Some(before)).then_some(())
    });
    drop(sender);
    rig.wait_until_closed("d0");
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
}

/// A connection on which nothing comes any more, one of several or the only one: the service gives the pass up, and it is gone
/// on with.
#[test]
fn a_connection_that_stalls_is_no_end() {
    require_root!();
    let (mut rig, _) = rig();
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "idle_timeout = \"1s\"\n"));
    let proxy = Proxy::start(rig.service.address());
    let source = rig.random("source.img", SIZE);
    // One of several may get little to do.
    let stalls = |at| Fate { up: Some((at, Act::Swallow)), ..Fate::default() };
    for (connections, fates) in [("4", vec![Fate::default(), stalls(64 * KIB)]), ("1", vec![stalls(2 * MIB)])]
    {
        write_random(&source, 0, SIZE);
        proxy.will(fates);
        let outcome = send_through(&rig, &proxy, &source, &[connections]).ok();
        assert!(outcome.stderr.contains("trying again in"), "{outcome:#?}");
        assert_equal(&source, rig.targets[0].backing());
        rig.synchronized("d0");
        rig.service.wait_for_log("the peer sent nothing for 1s");
    }
}

/// Whatever takes its time there, the service says something in a pass: also where it only compares.
#[tokio::test]
async fn the_service_gives_signs_of_life() {
    require_root!();
    let rig = Rig::new(&[MIB, MIB]);
    let (mut writing, _) = Client::begun(&rig, "d0", MIB).await;
    let mut comparing = Client::connect(&rig).await;
    (comparing.kind, comparing.compare) = (PassKind::Verify, Some(1 << 16));
    comparing.open("d1", MIB).await.unwrap();
    comparing.begin().await.unwrap();
    let mut digests = vec![0; 16 * 32];
    let header = comparing.header().await.unwrap();
    assert_eq!(header.kind, Kind::Digests);
    mt_agent::net::wire::read_payload(&mut comparing.stream, &header, &mut digests).await.unwrap();
    for _ in 0..2 {
        for client in [&mut writing, &mut comparing] {
            let header = client.header().await.unwrap();
            assert_eq!((header.kind, header.sequence, header.length), (Kind::Progress, 0, 0));
        }
    }
}

/// What lies between takes everything and passes nothing on: neither side's kernel notices.
#[test]
fn a_master_target_that_falls_silent_in_a_pass_is_not_waited_for() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    proxy.will([Fate { up: Some((4 * MIB, Act::SwallowBoth)), ..Fate::default() }]);
    let started = Instant::now();
    let to = proxy.address.to_string();
    let args = ["--to", &to, "--compression", "off", "--connections", "1", "--retry-for", "5m"];
    let outcome = rig.send(&[("d0", &source)], &args).ok();
    assert!(outcome.stderr.contains("was not heard of for 60s"), "{outcome:#?}");
    assert!((60..90).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    assert_equal(&source, rig.targets[0].backing());
}

/// No other attempt would read it, and each would leave a thread that waits for it.
#[test]
fn a_source_that_hangs_is_named_and_ends_the_sender() {
    require_root!();
    let (mut rig, _) = rig();
    let config = fs::read_to_string(rig.service.config()).unwrap();
    rig.service.restart_with_config(&(config + "idle_timeout = \"3s\"\n"));
    let source = rig.random("source.img", SIZE);
    let hanging = |args: &[&str]| {
        let mut command = rig.command(&[("d0", &source)], &[&["--engine", "threads"], args].concat());
        support::seccomp::hang_reads(&mut command, 6 * MIB as u32..8 * MIB as u32);
        rig.spawn(command).finish()
    };
    let told = format!("a read of {} has not come back for", source.display());
    for args in [["--retry-for", "1h"], ["--every", "1h"]] {
        let outcome = hanging(&args).fails(1, &[&told, "start this again once it can be read"]);
        assert!(!outcome.stderr.contains("trying again in"), "{outcome:#?}");
    }
    rig.send(&[("d0", &source)], &[]).ok();
    assert_equal(&source, rig.targets[0].backing());
}

/// What comes from the other side to be compared counts as well: the link is there.
#[test]
fn a_link_that_breaks_while_what_was_sent_is_compared_is_waited_for() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    let cut = Fate { up: Some((9 * MIB, Act::Cut)), ..Fate::default() };
    // The handshakes, and a part of the digests, in longer than --retry-for.
    let slow = Fate { rate: Some(800), down: Some((6500, Act::Cut)), ..Fate::default() };
    proxy.will([cut, slow]);
    let more = ["1", "--whole", "--bwlimit", "2M", "--retry-for", "4s"];
    let to = proxy.address.to_string();
    let args = ["--to", &to, "--compression", "off", "--connections"];
    let outcome = rig.send(&[("d0", &source)], &[&args[..], &more].concat()).ok();
    assert_eq!(outcome.stderr.matches("trying again in").count(), 2, "{outcome:#?}");
    assert_equal(&source, rig.targets[0].backing());
}

/// For programs each disk has its result, also where there can be no other attempt.
#[test]
fn a_source_that_goes_away_between_two_attempts_is_told_to_programs() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    proxy.will([Fate { up: Some((7 * MIB, Act::Cut)), ..Fate::default() }]);
    let to = proxy.address.to_string();
    let args = ["--to", &to, "--compression", "off", "--json", "--retry-for", "60s", "--connections", "1"];
    let sender = rig.start_into_pass(&[("d0", &source)], &[&args[..], &["--bwlimit", "2M"]].concat());
    fs::rename(&source, rig.path("elsewhere.img")).unwrap();
    let outcome = sender.finish().fails(3, &["No such file"]);
    let error = &outcome.json()["disks"][0]["error"];
    let error = error.as_str().unwrap();
    assert!(error.contains(source.to_str().unwrap()) && error.contains("No such file"), "{outcome:#?}");
}

/// What is only compared is not sent again.
#[test]
fn a_comparing_that_breaks_off_says_so() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    rig.send(&[("d0", &source)], &[]).ok();
    proxy.will([Fate { down: Some((7000, Act::Cut)), ..Fate::default() }]);
    let (to, state) = (proxy.address.to_string(), rig.client().display().to_string());
    let disk = format!("d0={}", source.display());
    let args = ["verify", "--machine", MACHINE, "--to", &to, "--state-dir", &state, "--disk", &disk];
    support::run(&args).fails(1, &["the comparing did not come to its end; run `mt-agent verify` again"]);
}

/// Pass after pass, through a service that is restarted meanwhile.
#[test]
fn a_machine_is_kept_protected() {
    require_root!();
    let mut rig = Rig::new(&[SIZE]);
    let config = fs::read_to_string(rig.service.config()).unwrap();
    let port = rig.service.address().port();
    let config = config.replace("127.0.0.1:0", &format!("127.0.0.1:{port}"));
    rig.service.restart_with_config(&(config + "allow_root_retention = true\n"));
    let source = rig.random("source.img", SIZE);
    let mut sender = rig.start(&[("d0", &source)], &["--every", "0s", "--json"]);
    let file = File::options().write(true).open(&source).unwrap();
    for round in 0..6u64 {
        file.write_all_at(&[round as u8 + 1; 100], 4096 * 7 * round + 5).unwrap();
        if round == 3 {
            rig.service.process().kill();
            thread::sleep(Duration::from_millis(700));
            rig.service.spawn();
        }
        wait_for("the target to be the source", || {
            assert!(sender.has_ended().is_none(), "{}", sender.stderr());
            support::first_difference(&source, rig.targets[0].backing()).is_none().then_some(())
        });
    }
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(sender.pid() as i32),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    let outcome = sender.finish();
    let passes: Vec<serde_json::Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // The last one may be what the signal ended.
    assert!(passes.len() >= 5, "{outcome:#?}");
    let delta = passes.iter().skip(1).map(|pass| pass["disks"][0]["sent_bytes"].as_u64().unwrap());
    assert!(delta.max().unwrap() <= 4 * 4096, "{outcome:#?}");
}
