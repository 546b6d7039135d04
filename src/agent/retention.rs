//! Lets points go: by age, size and room, as the configuration says, and when an open pass needs the room.

use std::collections::HashSet;
use std::path::Path;

use nix::sys::statvfs::statvfs;
use time::OffsetDateTime;

use super::commit::Coordinator;
use super::config::Config;
use super::status::Live;
use crate::error::{IoError, chain};
use crate::points::retention::{Policy, Room, choose};
use crate::points::{Dropped, Reason, Record};
use crate::protection::Store;
use crate::recovery::{self, Error, LONGEST_SEGMENT, Standing};

/// Looks once, and lets go of what must go.
pub(super) fn run(config: &Config, store: &Store, coordinator: &Coordinator, live: &Live) {
    if let Err(error) = look(config, store, coordinator, live) {
        tracing::warn!(error = chain(&error), "older points could not be let go");
    }
}

fn look(config: &Config, store: &Store, coordinator: &Coordinator, live: &Live) -> Result<(), Error> {
    let retention = &config.retention_dir;
    // Meanwhile a machine may be failed over, or that be taken back. It has recorded so, and its point stays: what is let go
    // lies before that, and what is removed is nothing that it reads.
    let waits = live.open().values().any(|counters| counters.is_paused());
    let mut policy: Policy = config.retention;
    if waits {
        // Two segments for whoever waits, whatever is kept free else.
        policy.min_free = policy.min_free.max(2 * LONGEST_SEGMENT);
    }
    let room = Room { free: free(retention)?, open: 0 };
    let choice = coordinator.read(|log| {
        let in_use: HashSet<_> = log.in_use().collect();
        choose(log.history(), &in_use, &policy, room, OffsetDateTime::now_utc())
    })?;
    // First the record, then the segments: a crash in between leaves segments that the next look removes.
    for reason in [Reason::Age, Reason::Thinned, Reason::Size, Reason::Space] {
        let points: Vec<_> =
            choice.drop.iter().filter(|(_, why)| *why == reason).map(|(point, _)| *point).collect();
        if points.is_empty() {
            continue;
        }
        tracing::info!(points = points.len(), ?reason, "older points are let go");
        coordinator.append(Record::Dropped(Dropped { time: OffsetDateTime::now_utc(), reason, points }))?;
    }
    if waits && choice.lacking > 0 {
        tracing::warn!(
            lacking = choice.lacking,
            "a pass waits for room, and no older point is left to let go"
        );
    }
    for (machine, loaded) in store.all()? {
        let Ok(protection) = loaded else { continue };
        for disk in protection.disks {
            // One journal in which something is wrong concerns no other.
            let standing = coordinator.read(|log| Standing::of(&machine, &disk.name, &disk.id, log))?;
            if let Err(error) = recovery::let_go(retention, &machine, &disk.name, &standing) {
                tracing::warn!(error = chain(&error), "what older points needed could not be removed");
            }
        }
    }
    Ok(())
}

fn free(path: &Path) -> Result<u64, IoError> {
    let stat = statvfs(path)
        .map_err(|errno| IoError::new("ask for the room of", path.display().to_string(), errno))?;
    Ok(stat.blocks_available() * stat.fragment_size())
}
