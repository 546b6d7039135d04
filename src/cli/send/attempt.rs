//! One attempt at a pass, and the next ones.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use mt_agent::agent::logging;
use mt_agent::error::chain;
use mt_agent::name::Name;
use mt_agent::net::tls::client::Identity;
use mt_agent::send::lanes::Connections;
use mt_agent::send::still::{self, Still, Wishes};
use mt_agent::send::{self, Compression, Plan, Prepared, Progress, Scope};
use mt_agent::units::{ByteLen, Extent};
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep;

use super::screen::Screen;
use super::{Ended, SCHEMA_VERSION, Unsent, What};
use crate::cli::{Failure, log_failure, print, print_json};

/// What is to be done with which disks.
pub(in crate::cli) struct Job {
    pub(in crate::cli) machine: Name,
    pub(in crate::cli) plan: Plan,
    pub(in crate::cli) wishes: Wishes,
    identity: Identity,
    pub(in crate::cli) json: bool,
    /// Whether results are printed one a line, since there are several.
    pub(in crate::cli) lines: bool,
    /// How far the attempt before this one came with each disk, at the same pass.
    earlier: BTreeMap<Name, Arc<Progress>>,
}

impl Job {
    /// A job that sends what differs of these disks.
    pub(in crate::cli) fn new(what: &What) -> Result<Job, Failure> {
        logging::init(Some(logging::Format::Text), Some(&what.log_level), logging::DEFAULT_LEVEL)
            .map_err(log_failure)?;
        for (index, (name, path)) in what.disks.iter().enumerate() {
            for (other, source) in &what.disks[..index] {
                if name == other {
                    return Err(Failure::Usage(format!("the disk {name} is named twice")));
                }
                if path == source {
                    let path = path.display();
                    return Err(Failure::Usage(format!(
                        "{path} is the source of two disks: {other} and {name}"
                    )));
                }
            }
        }
        let identity = Identity::load(&what.state_dir, &what.machine).map_err(Failure::refused)?;
        let to = match &what.to {
            Some(to) => to.clone(),
            None => identity.server.parse().map_err(Failure::failed)?,
        };
        let plan = Plan {
            name: None,
            group: None,
            to,
            disks: what.disks.clone(),
            compression: Compression::Auto,
            engine: what.engine,
            limit: None,
            connections: Connections::Auto,
            scope: Scope::Differences,
            whole_disk: what.whole_disk,
            resized: false,
            another: false,
            hints: BTreeMap::new(),
            sent: BTreeMap::new(),
            wait: Duration::MAX,
        };
        Ok(Job {
            machine: what.machine.clone(),
            plan,
            wishes: Wishes::default(),
            identity,
            json: what.json,
            lines: false,
            earlier: BTreeMap::new(),
        })
    }
}

/// What ends a command before its time.
pub(in crate::cli) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub(in crate::cli) fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// What `work` comes to, unless a signal comes first.
    pub(super) async fn before<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            result = work => Some(result),
            () = self.any() => None,
        }
    }
}

/// What became of one attempt.
pub(in crate::cli) struct Outcome {
    pub(in crate::cli) disks: Vec<Prepared>,
    ends: Vec<Ended>,
    after: Duration,
    screen: Screen,
    interrupted: bool,
    verify: bool,
    after_reading: Result<(), still::Error>,
}

/// Opens all sources.
pub(super) fn prepare(plan: &Plan) -> Result<Vec<Prepared>, Failure> {
    send::prepare(plan).map_err(|error| match error.is_refusal() {
        true => Failure::refused(error),
        false => Failure::failed(error),
    })
}

/// The first pause before another attempt, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

impl Job {
    /// Pass after pass, or one, each with as many attempts as it takes.
    pub(in crate::cli) async fn keep_on(
        &mut self,
        every: Option<Duration>,
        retry_for: Duration,
        signals: &mut Signals,
    ) -> Result<(), Failure> {
        let mut pause = PAUSES.0;
        // When something arrived for the last time, or when a disk was opened for the first time: before, a wrong address is more
        // likely than a broken link.
        let mut arrived = every.map(|_| Instant::now());
        let mut last: Option<Outcome> = None;
        loop {
            let started = Instant::now();
            let outcome = match self.attempt(signals).await {
                Ok(outcome) => outcome,
                // A source that is not there may come back.
                Err(failure) if every.is_some() => {
                    note!("mt-agent: {failure}");
                    let wait = pause;
                    pause = (pause * 2).min(PAUSES.1);
                    match signals.before(sleep(wait)).await {
                        Some(()) => continue,
                        None => return Ok(()),
                    }
                }
                Err(failure) => {
                    // A disk that was begun with has a result.
                    if let Some(last) = &mut last {
                        last.end_with(&failure);
                        last.show(self)?;
                    }
                    return Err(failure);
                }
            };
            let moments = outcome.disks.iter().filter_map(|disk| {
                // A moment is whole whoever panicked beside it.
                *disk.progress.arrived.lock().unwrap_or_else(PoisonError::into_inner)
            });
            if let Some(moment) = moments.max() {
                (arrived, pause) = (arrived.max(Some(moment)), PAUSES.0);
            } else if outcome.disks.iter().any(|disk| disk.progress.opened.load(Ordering::Relaxed)) {
                arrived = arrived.or_else(|| Some(Instant::now()));
            }
            if outcome.is_sent() {
                self.plan.sent.clear();
                let Some(every) = every else { return outcome.report(self) };
                arrived = Some(Instant::now());
                // A post-hook that failed is told, and is no reason to protect the machine no longer.
                if let Err(failure) = outcome.report(self) {
                    note!("mt-agent: {failure}");
                }
                match signals.before(sleep(every.saturating_sub(started.elapsed()))).await {
                    Some(()) => continue,
                    None => return Ok(()),
                }
            }
            // Whoever keeps a machine protected is stopped in the middle of a pass more often than not.
            if outcome.interrupted && every.is_some() {
                if let Err(error) = &outcome.after_reading {
                    note!("mt-agent: {}", chain(error));
                }
                return outcome.show(self);
            }
            let patient = arrived.is_some_and(|arrived| arrived.elapsed() < retry_for);
            if !(patient && outcome.may_pass() || every.is_some() && outcome.may_pass_some_day()) {
                return outcome.report(self);
            }
            for disk in &outcome.disks {
                self.earlier.insert(disk.name.clone(), disk.progress.clone());
                let sent = self.plan.sent.entry(disk.name.clone()).or_default();
                *sent = disk.progress.reached.load(Ordering::Relaxed).max(*sent);
            }
            // Else it was told when it ended.
            if self.json {
                outcome.say_why();
            }
            // Many senders that lost one master target must not come back in one moment.
            let wait = pause.mul_f64(0.5 + random());
            pause = (pause * 2).min(PAUSES.1);
            note!("mt-agent: trying again in {:.1} s", wait.as_secs_f64());
            if signals.before(sleep(wait)).await.is_none() {
                return if every.is_some() { outcome.show(self) } else { outcome.report(self) };
            }
            // Only for its result: it holds the sources open.
            last = every.is_none().then_some(outcome);
        }
    }

    /// One pass over all disks, whatever becomes of it.
    pub(in crate::cli) async fn attempt(&self, signals: &mut Signals) -> Result<Outcome, Failure> {
        let disks = prepare(&self.plan)?;
        // What will be frozen is no reason to worry, and what is only compared changes nothing.
        if self.wishes.freeze.is_none() {
            for disk in &disks {
                let (path, verify) = (disk.source.path().display(), self.plan.scope == Scope::Verify);
                let what = if verify {
                    "what it holds is changing, and what was written since its last pass differs"
                } else {
                    "what arrives is not one point in time"
                };
                for writer in disk.source.writers(&[]) {
                    note!("mt-agent: {path} is in use ({writer}): {what}");
                }
            }
        }
        let tls = self.identity.client_config().map_err(Failure::failed)?;
        let screen = Screen::new(&disks);
        let still = Arc::new(Still::new(self.machine.clone(), disks.len(), self.wishes.clone()));
        let mut ended: Vec<Option<Ended>> = disks.iter().map(|_| None).collect();
        let mut printed = Ok(());
        let sending = send::send(&self.plan, tls, &still, disks.clone(), |index, result| {
            let result = result.map_err(Unsent::from);
            let one = Ended { result, after: screen.started.elapsed() };
            if let Err(failure) = screen.ended(index, &one, self.json) {
                printed = Err(failure);
            }
            ended[index] = Some(one);
        });
        let interrupted = tokio::select! {
            done = signals.before(sending) => done.is_none(),
            () = screen.show() => unreachable!("the display never ends by itself"),
        };
        // A thaw, and a hook, which has its limit: a second signal changes nothing.
        let after_reading = still.end().await;
        let after = screen.started.elapsed();
        let mut ends = Vec::new();
        for (index, end) in ended.into_iter().enumerate() {
            ends.push(match end {
                Some(end) => end,
                None => {
                    let end = Ended { result: Err(Unsent::Interrupted), after };
                    screen.ended(index, &end, self.json)?;
                    end
                }
            });
        }
        printed?;
        for disk in &disks {
            if let Some(earlier) = self.earlier.get(&disk.name) {
                disk.progress.add_missed(earlier);
            }
        }
        let verify = self.plan.scope == Scope::Verify;
        Ok(Outcome { verify, disks, ends, after, screen, interrupted, after_reading })
    }
}

/// 0 to 1.
fn random() -> f64 {
    let mut bits = [0; 4];
    // Without random bits the pause is only less random.
    getrandom::fill(&mut bits).ok();
    f64::from(u32::from_ne_bytes(bits)) / f64::from(u32::MAX)
}

impl Outcome {
    fn errors(&self) -> impl Iterator<Item = &Unsent> {
        self.ends.iter().filter_map(|end| end.result.as_ref().err())
    }

    fn is_sent(&self) -> bool {
        self.errors().next().is_none()
    }

    /// Whether another attempt may succeed with nobody doing anything.
    fn may_pass(&self) -> bool {
        let because_of_another =
            |unsent: &&Unsent| matches!(unsent, Unsent::Failed(send::Error::Together(_)));
        !self.interrupted
            && self.errors().filter(|unsent| !because_of_another(unsent)).all(|unsent| match unsent {
                Unsent::Failed(error) => error.is_transient(),
                Unsent::Interrupted | Unsent::NotAgain(_) => false,
            })
    }

    /// Whether somebody who keeps a machine protected should go on: a hook that failed, or a retention that is full.
    fn may_pass_some_day(&self) -> bool {
        !self.interrupted
            && self.errors().all(|unsent| match unsent {
                Unsent::Failed(error) => error.is_transient() || error.is_passing(),
                Unsent::Interrupted | Unsent::NotAgain(_) => false,
            })
    }

    /// Says why disks were not sent.
    fn say_why(&self) {
        for (disk, end) in self.disks.iter().zip(&self.ends) {
            if let Err(error) = &end.result {
                note!("mt-agent: {}: {}", disk.name, chain(error));
            }
        }
    }

    /// How it went with each disk.
    pub(in crate::cli) fn json(&self, machine: &Name) -> Value {
        let disks = self.screen.disks.iter().zip(&self.ends);
        json!({
            "schema_version": SCHEMA_VERSION,
            "machine": machine,
            "dry_run": false,
            "seconds": self.after.as_secs_f64(),
            "post_hook_error": self.after_reading.as_ref().err().map(|error| chain(error)),
            "disks": disks.map(|(disk, end)| disk.json(end)).collect::<Vec<_>>(),
        })
    }

    /// What comparing found for each disk: how much differs and where, and what failed.
    pub(in crate::cli) fn compared(
        &self,
    ) -> impl Iterator<Item = (&Prepared, u64, Vec<Extent>, Option<String>)> {
        self.disks.iter().zip(&self.ends).map(|(disk, end)| {
            let differs = disk.progress.differs.load(Ordering::Relaxed);
            // A list is whole whoever panicked beside it.
            let ranges = disk.progress.differences.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let error = end.result.as_ref().err().map(|error| chain(error));
            (disk, differs, ranges, error)
        })
    }

    /// Why there is no other attempt stands in for why this one failed.
    fn end_with(&mut self, failure: &Failure) {
        for end in &mut self.ends {
            end.result = Err(Unsent::NotAgain(failure.to_string()));
        }
    }

    /// Prints the result where it is for programs: for people each disk's was told when it ended.
    fn show(&self, job: &Job) -> Result<(), Failure> {
        match (job.json, job.lines) {
            (false, _) => Ok(()),
            (true, true) => print(&format!("{}\n", self.json(&job.machine))),
            (true, false) => print_json(&self.json(&job.machine)),
        }
    }

    /// Prints the result, and says whether all is well.
    fn report(self, job: &Job) -> Result<(), Failure> {
        self.show(job)?;
        self.verdict(&job.machine)
    }

    /// Whether all is well.
    pub(in crate::cli) fn verdict(self, machine: &Name) -> Result<(), Failure> {
        let failed: Vec<&Unsent> = self.errors().collect();
        if failed.is_empty() {
            // The point is there all the same.
            self.after_reading.map_err(Failure::failed)?;
            let missed: u64 =
                self.disks.iter().map(|disk| disk.progress.differs.load(Ordering::Relaxed)).sum();
            if missed > 0 && !self.verify {
                return Err(Failure::failed(format!(
                    "the ranges that were given do not tell {} that had changed, and that were sent all the same: do not \
                     rely on what made them (--json lists the ranges)",
                    ByteLen(missed)
                )));
            }
            let unjudged = |disk: &&Prepared| {
                disk.progress.judged.load(Ordering::Relaxed) && disk.progress.set_aside.get().is_some()
            };
            let unjudged: Vec<&str> =
                self.disks.iter().filter(unjudged).map(|disk| disk.name.as_str()).collect();
            if !unjudged.is_empty() {
                return Err(Failure::failed(format!(
                    "the ranges that were given for {} could not be judged: the connection was lost, and what had arrived by \
                     then does not differ any more. All that had changed was sent. Give --verify with the ranges of the next \
                     pass too before you rely on what made them",
                    unjudged.join(", ")
                )));
            }
            return Ok(());
        }
        if let Err(error) = &self.after_reading {
            note!("mt-agent: {}", chain(error));
        }
        let text = format!(
            "{}{} of {} disks of {machine} {}",
            if self.interrupted { "interrupted: " } else { "" },
            failed.len(),
            self.ends.len(),
            if self.verify { "were not compared" } else { "were not sent" },
        );
        let refused = |unsent: &&Unsent| matches!(unsent, Unsent::Failed(error) if error.is_refusal());
        Err(if failed.iter().all(refused) { Failure::refused(text) } else { Failure::failed(text) })
    }
}
