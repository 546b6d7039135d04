//! kill -9 of either side at random moments of a pass: what the service says of the disk afterwards is true, and
//! another run makes it whole.

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::{MACHINE, MIB, Rig, assert_equal, first_difference};

const KILLS: usize = 25;
const SIZE: u64 = 24 * MIB;

/// A stretch of about half a second, in which the start of the program is a small part.
const SLOW: [&str; 4] = ["--compression", "off", "--bwlimit", "48M"];

/// Random moments that can be had again (SplitMix64).
struct Moments(u64);

impl Moments {
    /// With the seed in `MT_AGENT_SEED`, or a new one.
    fn new() -> Moments {
        let seed = match std::env::var("MT_AGENT_SEED") {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => {
                let mut seed = [0; 8];
                getrandom::fill(&mut seed).unwrap();
                u64::from_le_bytes(seed)
            }
        };
        println!("MT_AGENT_SEED={seed}");
        Moments(seed)
    }

    fn within(&mut self, limit: Duration) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        limit.mul_f64((x ^ (x >> 31)) as f64 / u64::MAX as f64)
    }
}

/// Two sources that differ everywhere, sent in turns: what arrived is never what was there before.
struct Trial {
    rig: Rig,
    sources: [PathBuf; 2],
    /// The source of the last pass that was acknowledged or recorded.
    last: usize,
    /// How often the kill came while a pass was open, and after a commit.
    inside: usize,
    committed: usize,
    /// How long the last pass that nobody disturbed took: the machine may be busy with other things in turns.
    whole: Duration,
}

impl Trial {
    fn new() -> Trial {
        let rig = Rig::new(&[SIZE]);
        // Zeros in them too, so that the kills meet both ways of writing.
        let sources = [rig.mixed("a.img", SIZE), rig.random("b.img", SIZE)];
        let mut trial = Trial { rig, sources, last: 1, inside: 0, committed: 0, whole: Duration::ZERO };
        trial.again(1);
        trial
    }

    fn target(&self) -> &Path {
        self.rig.targets[0].backing()
    }

    /// What is recorded holds: `synchronized` is the content of the last commit, and whatever the sender was told
    /// to be durable is recorded. `sending` is the source whose pass was hit; `acknowledged` whether its sender
    /// ended well.
    fn check(&mut self, sending: usize, pass_before: &str, acknowledged: bool) {
        let recorded = self.rig.service.recorded(MACHINE, "d0");
        let pass = recorded["last_commit"]["pass"].as_str().unwrap();
        let state = recorded["state"].as_str().unwrap();
        let is_new = pass != pass_before;
        assert!(is_new || !acknowledged, "an acknowledged pass is not recorded: {recorded}");
        match state {
            "synchronized" => {
                self.committed += 1;
                self.last = if is_new { sending } else { self.last };
                assert_eq!(first_difference(&self.sources[self.last], self.target()), None, "{recorded}");
                assert_eq!(self.rig.service.volume(MACHINE, "d0").phase, "synchronized");
            }
            "receiving" => {
                self.inside += 1;
                assert!(!is_new, "{recorded}");
                assert_ne!(recorded["pass"]["id"], pass, "{recorded}");
                assert_eq!(self.rig.service.volume(MACHINE, "d0").phase, "interrupted");
            }
            other => panic!("the disk is {other}: {recorded}"),
        }
    }

    /// Another run ends equal.
    fn again(&mut self, sending: usize) {
        let start = Instant::now();
        self.rig.send(&[("d0", &self.sources[sending])], &[&SLOW[..], &["--whole"]].concat()).ok();
        self.whole = start.elapsed();
        assert_equal(&self.sources[sending], self.target());
        self.rig.synchronized("d0");
        self.last = sending;
    }

    fn pass(&self) -> String {
        self.rig.service.recorded(MACHINE, "d0")["last_commit"]["pass"].as_str().unwrap().to_owned()
    }

    /// The next round, while there were too few, or too few of their moments were such that the test means something.
    fn round(&self) -> Option<usize> {
        let round = self.inside + self.committed;
        let enough = round >= KILLS && self.inside >= KILLS / 3;
        assert!(enough || round < 4 * KILLS, "only {} of {round} kills came within a pass", self.inside);
        if enough {
            println!("{} kills within a pass, {} outside of one", self.inside, self.committed);
        }
        (!enough).then_some(round)
    }
}

#[test]
fn of_the_sender() {
    require_root!();
    let mut moments = Moments::new();
    let mut trial = Trial::new();
    while let Some(round) = trial.round() {
        let (sending, before) = (1 - trial.last, trial.pass());
        let mut send = trial.rig.start(&[("d0", &trial.sources[sending])], &SLOW);
        let moment = moments.within(trial.whole);
        std::thread::sleep(moment);
        let acknowledged = send.kill().success();
        println!("round {round}: killed after {moment:?}, acknowledged: {acknowledged}");
        trial.rig.service.wait_until_idle();
        trial.check(sending, &before, acknowledged);
        trial.again(sending);
    }
    assert_eq!(trial.rig.service.log().matches("volume faulted").count(), 0);
}

#[test]
fn of_the_receiver() {
    require_root!();
    let mut moments = Moments::new();
    let mut trial = Trial::new();
    while let Some(round) = trial.round() {
        let (sending, before) = (1 - trial.last, trial.pass());
        let send = trial.rig.start(&[("d0", &trial.sources[sending])], &SLOW);
        let moment = moments.within(trial.whole);
        std::thread::sleep(moment);
        trial.rig.service.process().kill();
        let outcome = send.finish();
        println!("round {round}: killed after {moment:?}, the sender said {:?}", outcome.code);
        match outcome.code {
            Some(0) => {}
            Some(1) => {
                let told = [
                    "no connection to the master target",
                    "the master target broke the connection off before it answered; run this again",
                    "the pass was not acknowledged; run `mt-agent send` again",
                    "no secure connection to the master target",
                    "broke the connection off before it answered",
                ];
                assert!(told.iter().any(|told| outcome.stderr.contains(told)), "{outcome:#?}");
            }
            _ => panic!("{outcome:#?}"),
        }
        trial.rig.service.spawn();
        trial.check(sending, &before, outcome.code == Some(0));
        trial.again(sending);
    }
}
