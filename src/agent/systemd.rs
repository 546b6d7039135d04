//! What is said to systemd, and taken from it: sd_notify(3), sd_watchdog_enabled(3). Where there is no systemd, nobody
//! listens, and that is no error.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

use super::status::Board;
use crate::volume::pulse::Pulse;

/// How often the line of `systemctl status` is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// For how many times the watchdog's time a volume may stand still: a disk that is slow, or whose path is being switched,
/// is no reason to cut off all the others, and is answered for by the kernel's own time limits.
const PATIENT: u32 = 2;

/// Says it.
pub(super) fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be notified");
    }
}

/// The threads of the volumes, whose getting on is what feeds the watchdog.
#[derive(Debug, Default)]
pub(super) struct Pulses(Mutex<Vec<Weak<Pulse>>>);

impl Pulses {
    /// Watches one more, until it has ended.
    pub(super) fn watch(&self, pulse: Weak<Pulse>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(pulse);
    }

    /// For how long the one that stands still longest does so.
    fn stalled(&self) -> Duration {
        let mut pulses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pulses.retain(|pulse| pulse.strong_count() > 0);
        pulses.iter().filter_map(Weak::upgrade).map(|pulse| pulse.stalled()).max().unwrap_or_default()
    }
}

/// Tells systemd how it goes, until this is aborted; and feeds its watchdog, but not while a volume stands still that has
/// work: if nothing else ends that, a new start does. That this runs at all shows that the runtime does.
pub(super) async fn keep_told(board: Arc<Board>, pulses: Arc<Pulses>) {
    let watchdog = sd_notify::watchdog_enabled();
    let tick = watchdog.map_or(LOOK, |limit| LOOK.min(limit / 4)).max(Duration::from_millis(1));
    let mut tick = interval(tick);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut said, mut stood) = (String::new(), false);
    loop {
        tick.tick().await;
        let line = board.line();
        if line != said {
            tell(&[NotifyState::Status(&line)]);
            said = line;
        }
        if let Some(limit) = watchdog {
            let stalled = pulses.stalled();
            let stands = stalled > limit * PATIENT;
            if stands && !stood {
                tracing::error!(
                    seconds = stalled.as_secs(),
                    "a disk has got nothing done for too long: the watchdog is not fed any more"
                );
            }
            stood = stands;
            if !stands {
                tell(&[NotifyState::Watchdog]);
            }
        }
    }
}
