//! A link that breaks: whatever happens on the way, what is acknowledged is there, and what arrived is not sent again.

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use support::{MACHINE, MIB, Rig, assert_equal, wait_for, write_random};

/// What a way does to what passes it.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Both directions end at once.
    Cut,
    /// One bit arrives changed.
    Flip,
    /// This direction ends, the other one goes on.
    HalfClose,
    /// Nothing passes any more, and nobody is told.
    Swallow,
}

/// What happens to one connection.
#[derive(Clone, Copy, Debug, Default)]
struct Fate {
    /// After so many bytes from the client.
    up: Option<(u64, Act)>,
    /// After so many bytes from the server.
    down: Option<(u64, Act)>,
    /// How long each piece is held back.
    delay: Duration,
    /// The connection ends before it begins.
    refuse: bool,
}

/// Stands between a client and the service. Each connection takes the next fate; without one all is well.
struct Proxy {
    address: SocketAddr,
    fates: Arc<Mutex<Vec<Fate>>>,
    up: Arc<AtomicU64>,
    connections: Arc<AtomicU64>,
}

impl Proxy {
    fn start(server: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let fates: Arc<Mutex<Vec<Fate>>> = Arc::default();
        let (up, connections) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let proxy = Proxy { address, fates: fates.clone(), up: up.clone(), connections: connections.clone() };
        // It ends with the process.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                connections.fetch_add(1, Ordering::Relaxed);
                let fate = fates.lock().unwrap().pop().unwrap_or_default();
                if fate.refuse {
                    continue;
                }
                let Ok(server) = TcpStream::connect(server) else { continue };
                let ends =
                    [(client.try_clone(), server.try_clone()), (server.try_clone(), client.try_clone())];
                let acts = [fate.up, fate.down];
                for (index, (ends, act)) in ends.into_iter().zip(acts).enumerate() {
                    let (Ok(from), Ok(to)) = ends else { continue };
                    let count = (index == 0).then(|| up.clone());
                    thread::spawn(move || pump(from, to, act, fate.delay, count));
                }
            }
        });
        proxy
    }

    fn will(&self, fates: impl IntoIterator<Item = Fate>) {
        let mut list: Vec<Fate> = fates.into_iter().collect();
        list.reverse();
        *self.fates.lock().unwrap() = list;
    }
}

fn pump(
    mut from: TcpStream,
    mut to: TcpStream,
    act: Option<(u64, Act)>,
    delay: Duration,
    count: Option<Arc<AtomicU64>>,
) {
    let mut buffer = vec![0; 16 << 10];
    let mut passed = 0;
    loop {
        let len = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(len) => len,
        };
        thread::sleep(delay);
        let bytes = &mut buffer[..len];
        let before = passed;
        passed += len as u64;
        let mut pass = len;
        match act.filter(|(at, _)| (before..passed).contains(at)) {
            None => {}
            Some((at, Act::Flip)) => bytes[(at - before) as usize] ^= 0x10,
            Some((at, act)) => {
                pass = (at - before) as usize;
                to.write_all(&bytes[..pass]).ok();
                match act {
                    Act::Cut => {
                        from.shutdown(Shutdown::Both).ok();
                        to.shutdown(Shutdown::Both).ok();
                        return;
                    }
                    Act::HalfClose => break,
                    Act::Swallow => {
                        // Until one of them has had enough.
                        while from.read(&mut buffer).is_ok_and(|len| len > 0) {}
                        to.shutdown(Shutdown::Both).ok();
                        return;
                    }
                    Act::Flip => unreachable!(),
                }
            }
        }
        if let Some(count) = &count {
            count.fetch_add(pass as u64, Ordering::Relaxed);
        }
        if to.write_all(bytes).is_err() {
            from.shutdown(Shutdown::Both).ok();
            return;
        }
    }
    to.shutdown(Shutdown::Write).ok();
}

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
    let args = ["--to", &to, "--compression", "off", "--json", "--retry-for", "60s"];
    rig.send(&[("d0", source)], &[&args[..], more].concat())
}

/// `MT_AGENT_LINK_ROUNDS` for more than a run in passing has time for; `MT_AGENT_LINK_SEED` for the same ones again.
#[test]
fn whatever_happens_on_the_way() {
    require_root!();
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let rounds = number("MT_AGENT_LINK_ROUNDS").unwrap_or(20);
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
        let fates: Vec<Fate> = (0..random.random_range(1..4))
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
                    refuse: false,
                }
            })
            .collect();
        let before = (proxy.up.load(Ordering::Relaxed), proxy.connections.load(Ordering::Relaxed));
        proxy.will(fates.clone());
        let mut outcome = send_through(&rig, &proxy, &source, &[]);
        let mut tried = 1;
        // What breaks before anything arrived ends the command: the address may be wrong.
        while outcome.code != Some(0) && tried < 6 {
            tried += 1;
            outcome = send_through(&rig, &proxy, &source, &[]);
        }
        assert_eq!(outcome.code, Some(0), "round {round} (seed {seed}), {fates:?}: {outcome:#?}");
        assert_equal(&source, rig.targets[0].backing());
        rig.synchronized("d0");
        let attempts = proxy.connections.load(Ordering::Relaxed) - before.1;
        let up = proxy.up.load(Ordering::Relaxed) - before.0;
        broken += attempts - 1;
        // Each attempt may lose what was under way: the window, and what was in the buffers of the proxy's sockets; and
        // has a handshake, headers and what TLS adds.
        let bound = changed + changed / 20 + attempts * (WINDOW + 6 * MIB + 64 * 1024);
        assert!(up <= bound, "round {round} (seed {seed}): {up} bytes in {attempts} attempts for {changed}");
        excess = excess.max(up.saturating_sub(changed));
    }
    println!("{broken} connections broke; at most {excess} bytes more than had changed were sent in a round");
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
    let outcome = rig.send(&[("d0", &source)], &["--to", &to, "--retry-for", "0s"]);
    assert_eq!(outcome.code, Some(1), "{outcome:#?}");
    assert!(!outcome.stderr.contains("trying again in"), "{outcome:#?}");
}

/// Standard error is a full file system: what is said there is lost, and nothing else.
#[test]
fn a_sender_that_nobody_hears_goes_on() {
    require_root!();
    let (rig, proxy) = rig();
    let source = rig.random("source.img", SIZE);
    proxy.will([Fate { up: Some((4 * MIB, Act::Cut)), ..Fate::default() }]);
    let to = proxy.address.to_string();
    let args = ["--to", &to, "--compression", "off", "--retry-for", "60s"];
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
    let sender = rig.start(&[("d0", &source)], &["--to", &to, "--compression", "off", "--retry-for", "60s"]);
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
