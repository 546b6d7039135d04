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
use crate::points::{Dropped, Narrowed, Reason, Record};
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
    for (point, reason, machines) in choice.narrow {
        tracing::info!(%point, ?reason, ?machines, "an older point goes, but for machines that stand at it");
        let time = OffsetDateTime::now_utc();
        coordinator.append(Record::Narrowed(Narrowed { point, time, reason, machines }))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::Name;
    use crate::pass::{Lineage, PassId};
    use crate::points::{Kind, Log, Point, PointId, VolumeAt};

    /// A group whose one machine is not sent any more, and whose other one fills the retention.
    #[test]
    fn an_idle_machine_of_a_group_keeps_its_newest_point_and_no_other_machine_from_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let name = |text: &str| -> Name { text.parse().unwrap() };
        let volume = |machine: &str, pass: u64| VolumeAt {
            machine: name(machine),
            disk: name("root"),
            id: format!("loop:/{machine}").parse().unwrap(),
            lineage: Lineage(1),
            pass,
            sender_pass: PassId(pass.into()),
            bytes: 1 << 20,
        };
        let now = OffsetDateTime::now_utc();
        let point = |id: u64, group: Option<&str>, machines: &[&str]| Point {
            id: PointId(id.into()),
            time: now,
            recorded: now,
            kind: Kind::Crash,
            fuzzy: false,
            name: None,
            group: group.map(name),
            volumes: machines.iter().map(|machine| volume(machine, id)).collect(),
        };
        let coordinator = Coordinator::new(Log::open(dir.path()).unwrap());
        for id in 1..=2 {
            coordinator.append(Record::Point(point(id, Some("shop"), &["web01", "db01"]))).unwrap();
        }
        for id in 3..=9 {
            coordinator.append(Record::Point(point(id, None, &["web01"]))).unwrap();
        }
        let policy = Policy { max_bytes: Some(3 << 20), min_free: 0, ..Config::default().retention };
        let config = Config { retention_dir: dir.path().to_owned(), retention: policy, ..Config::default() };
        let store = Store::open(dir.path());
        look(&config, &store, &coordinator, &Live::default()).unwrap();
        let points = |machine| -> Vec<u128> {
            let points = |log: &Log| log.points(&name(machine)).map(|point| point.id.0).collect();
            coordinator.read(points).unwrap()
        };
        // Three megabytes lead back from the ninth point of web01 to the sixth.
        assert_eq!((points("web01"), points("db01")), (vec![6, 7, 8, 9], vec![2]));
        // Its own, and not the group's any more; its next pass goes on from there.
        let own = coordinator.read(|log| log.get(PointId(2)).cloned()).unwrap().unwrap();
        assert_eq!((own.group, own.volumes), (None, vec![volume("db01", 2)]));
        coordinator.append(Record::Point(point(10, Some("shop"), &["web01", "db01"]))).unwrap();
        assert_eq!(points("db01"), [2, 10]);
    }
}
