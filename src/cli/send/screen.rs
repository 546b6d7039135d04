//! What is shown while disks are read: bars, lines, and results.

use std::cell::Cell;
use std::io::IsTerminal;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mt_agent::error::chain;
use mt_agent::name::Name;
use mt_agent::send::{Done, Prepared, Progress};
use mt_agent::units::{ByteLen, rfc3339};
use serde_json::{Value, json};

use super::{Ended, of_space};
use crate::cli::{Failure, print};

/// One disk, as it is shown.
pub(super) struct Shown {
    name: Name,
    size: ByteLen,
    progress: Arc<Progress>,
    ended: Cell<bool>,
}

/// Where something differs, as it is told.
pub(in crate::cli) fn differences(progress: &Progress) -> Vec<Value> {
    // A list is whole whoever panicked beside it.
    let ranges = progress.differences.lock().unwrap_or_else(PoisonError::into_inner);
    ranges.iter().map(|extent| json!({"offset": extent.offset(), "length": extent.len()})).collect()
}

/// How many connections carry it, where that is more than one.
fn over(progress: &Progress) -> String {
    match progress.connections.load(Ordering::Relaxed) {
        0 | 1 => String::new(),
        connections => format!(" over {connections} connections"),
    }
}

impl Shown {
    pub(super) fn json(&self, Ended { result, after }: &Ended) -> Value {
        let committed = match result {
            Ok(Done::Committed(committed, point)) => Some((committed, point)),
            _ => None,
        };
        let space = self.progress.space.get().cloned().unwrap_or_default();
        json!({
            "disk": self.name,
            "size": self.size,
            "seconds": after.as_secs_f64(),
            "read_bytes": self.progress.read.load(Ordering::Relaxed),
            "same_bytes": self.progress.same.load(Ordering::Relaxed),
            "zero_bytes": self.progress.zero.load(Ordering::Relaxed),
            "sent_bytes": self.progress.sent.load(Ordering::Relaxed),
            "connections": self.progress.connections.load(Ordering::Relaxed),
            "used_bytes": space.free.map(|free| self.size.0 - free),
            "free_bytes": space.free,
            "skipped_bytes": space.skipped,
            "not_skipped": space.reasons,
            "ranges_set_aside": self.progress.set_aside.get(),
            "missed": differences(&self.progress),
            "refused_frames": self.progress.again.load(Ordering::Relaxed),
            "point": committed.map(|(_, point)| point),
            "pass": committed.map(|(committed, _)| committed.pass),
            "committed": committed.map(|(committed, _)| rfc3339(committed.time)),
            "error": result.as_ref().err().map(|error| chain(error)),
        })
    }

    /// How far it is, for where there is no bar. `before` is what was done at the last call, `period` ago.
    fn line(&self, before: &mut u64, period: Duration) -> String {
        let done = self.progress.done.load(Ordering::Relaxed);
        let rate = done.saturating_sub(std::mem::replace(before, done)) as f64 / period.as_secs_f64();
        let (name, size, rate) = (&self.name, self.size, ByteLen(rate as u64));
        if self.progress.waiting.load(Ordering::Relaxed) {
            return format!("{name}: waiting until the master target can take it");
        }
        let head = format!("{name}: {} of {size}", ByteLen(done));
        match rate.0 {
            0 => format!("{head}, nothing went out in the last {} s", period.as_secs()),
            bytes => {
                let over = over(&self.progress);
                format!("{head}, {rate}/s{over}, {} s left", size.0.saturating_sub(done) / bytes)
            }
        }
    }
}

/// What is shown while disks are sent: bars on a terminal, a line every ten seconds elsewhere, and each result.
pub(super) struct Screen {
    pub(super) started: Instant,
    pub(super) disks: Vec<Shown>,
    bars: Option<(MultiProgress, Vec<ProgressBar>)>,
}

impl Screen {
    pub(super) fn new(disks: &[Prepared]) -> Screen {
        let disk = |disk: &Prepared| Shown {
            name: disk.name.clone(),
            size: disk.source.size(),
            progress: disk.progress.clone(),
            ended: Cell::new(false),
        };
        let disks: Vec<Shown> = disks.iter().map(disk).collect();
        let bars = std::io::stderr().is_terminal().then(|| {
            let bars = MultiProgress::new();
            let style = "{msg:12} {bar:30} {bytes:>11} of {total_bytes:11} {binary_bytes_per_sec:>12}  {eta}";
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = |disk: &Shown| {
                let bar = ProgressBar::new(disk.size.0).with_style(style.clone());
                bars.add(bar.with_message(disk.name.to_string()))
            };
            let each = disks.iter().map(bar).collect();
            (bars, each)
        });
        Screen { started: Instant::now(), disks, bars }
    }

    /// Shows progress until it is dropped.
    pub(super) async fn show(&self) {
        const PERIOD: Duration = Duration::from_secs(10);
        if let Some((_, bars)) = &self.bars {
            loop {
                for (bar, disk) in bars.iter().zip(&self.disks).filter(|(_, disk)| !disk.ended.get()) {
                    let waits = disk.progress.waiting.load(Ordering::Relaxed);
                    bar.set_message(format!("{}{}", disk.name, if waits { " (waits)" } else { "" }));
                    bar.set_position(disk.progress.done.load(Ordering::Relaxed));
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        let mut before = vec![0; self.disks.len()];
        loop {
            tokio::time::sleep(PERIOD).await;
            for (disk, before) in self.disks.iter().zip(&mut before).filter(|(disk, _)| !disk.ended.get()) {
                note!("{}", disk.line(before, PERIOD));
            }
        }
    }

    /// Says how it went with one of the disks, as soon as that is known. With `json` that is said at the end.
    pub(super) fn ended(
        &self,
        index: usize,
        Ended { result, after }: &Ended,
        json: bool,
    ) -> Result<(), Failure> {
        let Shown { name, size, progress, ended } = &self.disks[index];
        ended.set(true);
        if json {
            return Ok(());
        }
        let say = || match result {
            Ok(Done::Committed(_, point)) => {
                let seconds = after.as_secs_f64();
                let zero = ByteLen(progress.zero.load(Ordering::Relaxed));
                let sent = ByteLen(progress.sent.load(Ordering::Relaxed));
                let same = match progress.same.load(Ordering::Relaxed) {
                    0 => String::new(),
                    same => format!(", {} there already", ByteLen(same)),
                };
                let read = ByteLen(progress.read.load(Ordering::Relaxed));
                let rate = ByteLen((read.0 as f64 / seconds) as u64);
                let over = over(progress);
                let space = progress.space.get().cloned().unwrap_or_default();
                let text = format!(
                    "{name}: {size} committed in point {point} in {seconds:.1} s; {read} read ({rate}/s), {sent} sent{over}, {zero} zeros{same}\n"
                );
                print(&(text + &of_space(name, *size, &space, "skipped")))
            }
            Ok(Done::Compared) => Ok(()),
            Err(error) => {
                note!("mt-agent: {name}: {}", chain(error));
                Ok(())
            }
        };
        match &self.bars {
            // In the place of its bar, above those that go on.
            Some((bars, each)) => {
                each[index].finish_and_clear();
                bars.suspend(say)
            }
            None => say(),
        }
    }
}
