//! Which points are let go: a pure function of the log, the policy, the room and the time.
//!
//! Points go oldest first, for one of four reasons, looked at in this order:
//!
//! 1. *age*: it was superseded longer ago than [`Policy::max_age`], by this host's clock, on all of its disks: until a
//!    newer point is that old, the older one is what the disks were at that age. So at any time of the last `max_age` one can
//!    go back to what was the newest point then, however seldom passes are made. A fuzzy point, which is no moment, supersedes
//!    only fuzzy ones;
//! 2. *thinning*, where it is on: all points of the last hour stay, then the best one of each hour for a day, then the
//!    best one of each day for a week. The best one is an application's before a file system's before a crash's, a fuzzy
//!    one last; of equals the oldest, so that what was kept stays kept as time goes on;
//! 3. *size*: the before-images take more than [`Policy::max_bytes`];
//! 4. *space*: less than [`Policy::min_free`] is free.
//!
//! Size and space hold, whoever is not sent any more: see below.
//!
//! # What is never let go
//!
//! - The newest point of a disk, whatever its age: the disk stands at it. A point of several disks stays as long as
//!   it is the newest of one of them, since a point is there on all of its disks or on none. A machine of
//!   a group that is no longer sent thus holds the group's last point, and with it the before-images of the others
//!   since then, until there are too many of these, or too little room. Then the group's point goes, from all of its
//!   machines at once, and what those of them that stand at it keep of it is a point of their own: it is *narrowed* to
//!   them. That costs nothing, as their disks hold it, and their next delta pass goes on from it.
//! - A point at which a machine was failed over.
//!
//! # What is freed
//!
//! Dropping a point frees room only where it is the oldest one of a disk: then the before-images of the passes
//! up to the next kept point go. An older point that is kept needs them: its way back leads through them. So size
//! and space pass over a point that is not the oldest of any of its disks, as behind one that cannot go. And
//! *thinning frees nothing when it thins*: the before-images of a thinned point stay until the points before
//! it are gone. It keeps the list short, and lets a longer [`Policy::max_age`] be read; what bounds the room is
//! age, size and space.
//!
//! Thinning keeps nothing longer than `max_age`: with that at its default of a day there is no point a day for a week.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use time::OffsetDateTime;

use super::{Entry, Point, PointId, Reason};
use crate::name::Name;

const HOUR: i64 = 60 * 60;
const DAY: i64 = 24 * HOUR;

/// How much is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// The age beyond which the points before one go.
    pub max_age: Duration,
    /// The most bytes of before-images, if there is a bound.
    pub max_bytes: Option<u64>,
    /// The least bytes that the retention file system must have free.
    pub min_free: u64,
    /// Whether points are thinned with their age.
    pub thinning: bool,
}

/// How much room there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Bytes free on the retention file system.
    pub free: u64,
    /// Bytes of before-images of passes that are not committed, which count towards [`Policy::max_bytes`].
    pub open: u64,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Choice {
    /// The points to let go, oldest first.
    pub drop: Vec<(PointId, Reason)>,
    /// The points to narrow to these machines, oldest first.
    pub narrow: Vec<(PointId, Reason, Vec<Name>)>,
    /// How many bytes of before-images that frees, as the points tell; the file system may have more or less of them.
    pub frees: u64,
    /// How many bytes too many there are still, or too few free, when all of these are gone: nothing else may go.
    pub lacking: u64,
}

/// The points to let go, of all machines. `history` is [`Log::history`](super::Log::history), `released` the points at
/// which machines were failed over.
pub fn choose(
    history: &[Entry],
    released: &HashSet<PointId>,
    policy: &Policy,
    room: Room,
    now: OffsetDateTime,
) -> Choice {
    let mut volumes = Volumes::new(history);
    let mut kept: Vec<bool> = history.iter().map(|entry| entry.dropped.is_none()).collect();
    let pinned = volumes.pinned(history, released, &kept);
    let before = volumes.held(&kept);
    let mut drop: Vec<(usize, Reason)> = Vec::new();

    let superseded = volumes.superseded(history, &kept, |point| now - point.recorded > policy.max_age);
    for at in superseded.into_iter().filter(|at| !pinned[*at]) {
        drop.push((at, Reason::Age));
        kept[at] = false;
    }
    if policy.thinning {
        let best = best(history, &kept, now);
        for at in 0..history.len() {
            if kept[at] && !pinned[at] && !best.contains(&at) {
                drop.push((at, Reason::Thinned));
                kept[at] = false;
            }
        }
    }

    let mut narrow = Vec::new();
    let mut held = volumes.held(&kept);
    let too_many = |held: u128| {
        policy.max_bytes.map_or(0, |most| (held + u128::from(room.open)).saturating_sub(u128::from(most)))
    };
    let too_few =
        |held: u128| u128::from(policy.min_free).saturating_sub(u128::from(room.free) + (before - held));
    for at in 0..history.len() {
        let reason = match (too_many(held), too_few(held)) {
            (0, 0) => break,
            (0, _) => Reason::Space,
            (_, _) => Reason::Size,
        };
        if kept[at] && !pinned[at] && volumes.is_oldest_of_any(at, &kept) {
            drop.push((at, reason));
            kept[at] = false;
            held -= volumes.freed(at, &kept);
        } else if kept[at] && pinned[at] && !released.contains(&history[at].point.id) {
            let point = &history[at].point;
            let stay = volumes.standing_at(at, point, &kept);
            if let Some(freed) = volumes.take_from_others(at, point, &stay, &kept) {
                held -= freed;
                narrow.push((point.id, reason, stay.into_iter().cloned().collect()));
            }
        }
    }
    drop.sort_unstable_by_key(|(at, _)| *at);
    Choice {
        drop: drop.into_iter().map(|(at, reason)| (history[at].point.id, reason)).collect(),
        narrow,
        frees: bytes(before - held),
        lacking: bytes(too_many(held).max(too_few(held))),
    }
}

/// Sums are formed in 128 bits, so that no log can make them overflow.
fn bytes(sum: u128) -> u64 {
    u64::try_from(sum).unwrap_or(u64::MAX)
}

/// For each disk its points, by their place in the history, with the bytes of their before-images.
struct Volumes {
    runs: Vec<Vec<Step>>,
    /// The runs in which each place of the history is, and where in each of them.
    of: Vec<Vec<(usize, usize)>>,
}

/// A disk's part in a point.
struct Step {
    /// The place of the point in the history.
    at: usize,
    /// The before-images of the pass that led there.
    bytes: u128,
    /// Whether the point was taken from the disk, and stays for others.
    left: bool,
}

impl Step {
    fn is_kept(&self, kept: &[bool]) -> bool {
        kept[self.at] && !self.left
    }
}

impl Volumes {
    fn new(history: &[Entry]) -> Volumes {
        let mut numbers: HashMap<(&Name, &Name), usize> = HashMap::new();
        let mut volumes = Volumes { runs: Vec::new(), of: Vec::new() };
        for (at, entry) in history.iter().enumerate() {
            let mut of = Vec::new();
            for volume in &entry.point.volumes {
                let next = numbers.len();
                let run = *numbers.entry((&volume.machine, &volume.disk)).or_insert(next);
                if run == next {
                    volumes.runs.push(Vec::new());
                }
                of.push((run, volumes.runs[run].len()));
                let bytes = if entry.has_images() { volume.bytes.into() } else { 0 };
                volumes.runs[run].push(Step { at, bytes, left: false });
            }
            volumes.of.push(of);
        }
        volumes
    }

    /// What must stay: the newest of each disk, and where machines were failed over to.
    fn pinned(&self, history: &[Entry], released: &HashSet<PointId>, kept: &[bool]) -> Vec<bool> {
        let mut pinned: Vec<bool> = history.iter().map(|entry| released.contains(&entry.point.id)).collect();
        for run in &self.runs {
            if let Some(newest) = newest(run, kept) {
                pinned[newest.at] = true;
            }
        }
        pinned
    }

    /// The kept points that have, for each of their disks, a newer kept one that is old enough to take their place.
    fn superseded(&self, history: &[Entry], kept: &[bool], is_old: impl Fn(&Point) -> bool) -> Vec<usize> {
        let mut stays = vec![false; history.len()];
        for run in &self.runs {
            let (mut any_is_old, mut moment_is_old) = (false, false);
            for &Step { at, .. } in run.iter().rev() {
                let point = &history[at].point;
                stays[at] |= !(if point.fuzzy { any_is_old } else { moment_is_old });
                if kept[at] && is_old(point) {
                    any_is_old = true;
                    moment_is_old |= !point.fuzzy;
                }
            }
        }
        (0..history.len()).filter(|at| kept[*at] && !stays[*at]).collect()
    }

    /// The bytes that are needed: of each disk those behind its oldest kept point.
    fn held(&self, kept: &[bool]) -> u128 {
        let behind = |run: &Vec<Step>| -> u128 {
            run.iter().skip_while(|step| !step.is_kept(kept)).skip(1).map(|step| step.bytes).sum()
        };
        self.runs.iter().map(behind).sum()
    }

    /// The machines of the point that have a disk of which it is the newest.
    fn standing_at<'a>(&self, at: usize, point: &'a Point, kept: &[bool]) -> BTreeSet<&'a Name> {
        let is_newest = |run: usize| newest(&self.runs[run], kept).is_some_and(|newest| newest.at == at);
        let disks = point.volumes.iter().zip(&self.of[at]);
        disks.filter(|(_, (run, _))| is_newest(*run)).map(|(volume, _)| &volume.machine).collect()
    }

    /// Takes the point from all machines but those that `stay`, if it is the oldest of one of their disks, and says what that
    /// frees.
    fn take_from_others(
        &mut self,
        at: usize,
        point: &Point,
        stay: &BTreeSet<&Name>,
        kept: &[bool],
    ) -> Option<u128> {
        let disks = point.volumes.iter().zip(&self.of[at]);
        let leave: Vec<(usize, usize)> =
            disks.filter(|(volume, _)| !stay.contains(&volume.machine)).map(|(_, place)| *place).collect();
        if !leave.iter().any(|&(run, place)| self.is_oldest(run, place, kept)) {
            return None;
        }
        let freed = leave.iter().map(|&(run, place)| self.freed_of(run, place, kept)).sum();
        leave.iter().for_each(|&(run, place)| self.runs[run][place].left = true);
        Some(freed)
    }

    /// Whether no older point is kept of one of the disks of `at`.
    fn is_oldest_of_any(&self, at: usize, kept: &[bool]) -> bool {
        self.of[at].iter().any(|&(run, place)| self.is_oldest(run, place, kept))
    }

    fn is_oldest(&self, run: usize, place: usize, kept: &[bool]) -> bool {
        self.runs[run][..place].iter().all(|step| !step.is_kept(kept))
    }

    /// What is freed where `at` is not kept any more.
    fn freed(&self, at: usize, kept: &[bool]) -> u128 {
        self.of[at].iter().map(|&(run, place)| self.freed_of(run, place, kept)).sum()
    }

    /// What that frees of one disk: where it was the oldest, all up to the next kept point.
    fn freed_of(&self, run: usize, place: usize, kept: &[bool]) -> u128 {
        let mut freed = 0;
        if self.is_oldest(run, place, kept) {
            for step in &self.runs[run][place + 1..] {
                freed += step.bytes;
                if step.is_kept(kept) {
                    break;
                }
            }
        }
        freed
    }
}

/// The newest kept point of a disk.
fn newest<'a>(run: &'a [Step], kept: &[bool]) -> Option<&'a Step> {
    run.iter().rfind(|step| step.is_kept(kept))
}

/// The points that thinning keeps.
fn best(history: &[Entry], kept: &[bool], now: OffsetDateTime) -> HashSet<usize> {
    let mut recent = HashSet::new();
    let mut best: HashMap<(&Name, &Name, Span), usize> = HashMap::new();
    let worth = |point: &Point| (!point.fuzzy, point.kind);
    for (at, Entry { point, .. }) in history.iter().enumerate().filter(|(at, _)| kept[*at]) {
        let span = match (now - point.recorded).whole_seconds() {
            ..HOUR => {
                recent.insert(at);
                continue;
            }
            HOUR..DAY => Span::Hour(point.recorded.unix_timestamp().div_euclid(HOUR)),
            age if age < 7 * DAY => Span::Day(point.recorded.unix_timestamp().div_euclid(DAY)),
            _ => continue,
        };
        for volume in &point.volumes {
            let of_span = best.entry((&volume.machine, &volume.disk, span)).or_insert(at);
            if worth(point) > worth(&history[*of_span].point) {
                *of_span = at;
            }
        }
    }
    recent.extend(best.into_values());
    recent
}

/// A span of which thinning keeps one point, counted from 1970.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Span {
    Hour(i64),
    Day(i64),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::macros::datetime;

    use super::*;
    use crate::pass::{Lineage, PassId};
    use crate::points::{Kind, VolumeAt};

    const NOW: OffsetDateTime = datetime!(2026-03-09 12:30 UTC);
    const FOREVER: Policy =
        Policy { max_age: Duration::from_secs(1 << 40), max_bytes: None, min_free: 0, thinning: false };
    const WIDE: Room = Room { free: 1 << 40, open: 0 };

    /// A point of disks that are given as `machine` or `machine/disk`, recorded `minutes` ago.
    fn entry(id: u128, minutes: i64, volumes: &[(&str, u64)]) -> Entry {
        let recorded = NOW - time::Duration::minutes(minutes);
        let volumes = volumes
            .iter()
            .map(|(name, bytes)| {
                let (machine, disk) = name.split_once('/').unwrap_or((name, "root"));
                VolumeAt {
                    machine: machine.parse().unwrap(),
                    disk: disk.parse().unwrap(),
                    id: format!("loop:/{machine}/{disk}").parse().unwrap(),
                    lineage: Lineage(5),
                    pass: id as u64,
                    sender_pass: PassId(id),
                    bytes: *bytes,
                }
            })
            .collect();
        let point = Point {
            id: PointId(id),
            // The source's clock does not matter.
            time: datetime!(1970-01-01 0:00 UTC),
            recorded,
            kind: Kind::Crash,
            fuzzy: false,
            name: None,
            group: None,
            volumes,
        };
        Entry { point, dropped: None }
    }

    /// Points of one machine, recorded so many minutes ago, each with 10 bytes.
    fn single(minutes: &[i64]) -> Vec<Entry> {
        (1..).zip(minutes).map(|(id, &minutes)| entry(id, minutes, &[("web01", 10)])).collect()
    }

    fn chosen(choice: &Choice) -> Vec<(u128, Reason)> {
        choice.drop.iter().map(|(id, reason)| (id.0, *reason)).collect()
    }

    fn released(ids: &[u128]) -> HashSet<PointId> {
        ids.iter().copied().map(PointId).collect()
    }

    #[test]
    fn points_go_by_age_once_a_newer_one_is_so_old() {
        let history = single(&[181, 122, 121, 60]);
        let policy = Policy { max_age: Duration::from_secs(7200), ..FOREVER };
        let choice = choose(&history, &HashSet::new(), &policy, WIDE, NOW);
        // The third one is what the disk was two hours ago.
        assert_eq!(chosen(&choice), [(1, Reason::Age), (2, Reason::Age)]);
        // What the second and the third point's passes saved.
        assert_eq!((choice.frees, choice.lacking), (20, 0));
        let late = NOW + time::Duration::days(365);
        let choice = choose(&history, &HashSet::new(), &policy, WIDE, late);
        assert_eq!(chosen(&choice).len(), 3, "{choice:?}");
        assert_eq!(choice.frees, 30);
    }

    /// A pass a day, and points for a day: that of yesterday stays until today's is a day old.
    #[test]
    fn what_was_the_newest_until_now_does_not_go_at_once() {
        let day = 24 * 60;
        let policy = Policy { max_age: Duration::from_secs(24 * 3600), ..FOREVER };
        let gone = |minutes: &[i64]| chosen(&choose(&single(minutes), &HashSet::new(), &policy, WIDE, NOW));
        assert_eq!(gone(&[day + 1, 0]), []);
        assert_eq!(gone(&[2 * day, day - 1]), []);
        assert_eq!(gone(&[2 * day + 1, day + 1, 1]), [(1, Reason::Age)]);
        // A point that is no moment does not take the place of one that is.
        let mut history = single(&[3 * day, 2 * day, day + 1, 1]);
        history[2].point.fuzzy = true;
        let choice = choose(&history, &HashSet::new(), &policy, WIDE, NOW);
        assert_eq!(chosen(&choice), [(1, Reason::Age)]);
        history[1].point.fuzzy = true;
        let choice = choose(&history, &HashSet::new(), &policy, WIDE, NOW);
        assert_eq!(chosen(&choice), [(2, Reason::Age)]);
    }

    #[test]
    fn a_point_that_was_failed_over_to_stays_and_holds_what_is_behind_it() {
        let history = single(&[50, 40, 30, 20]);
        let policy = Policy { max_bytes: Some(0), ..FOREVER };
        let choice = choose(&history, &released(&[2]), &policy, WIDE, NOW);
        assert_eq!(chosen(&choice), [(1, Reason::Size)]);
        assert_eq!((choice.frees, choice.lacking), (10, 20));
        // By age those behind it go all the same; it frees nothing.
        let policy = Policy { max_age: Duration::from_secs(60), ..FOREVER };
        let choice = choose(&history, &released(&[2]), &policy, WIDE, NOW);
        assert_eq!(chosen(&choice), [(1, Reason::Age), (3, Reason::Age)]);
        assert_eq!(choice.frees, 10);
    }

    #[test]
    fn size_and_space_take_the_oldest_until_it_suffices() {
        let history = single(&[50, 40, 30, 20]);
        let none = HashSet::new();
        let by_size = |most, open| {
            let policy = Policy { max_bytes: Some(most), ..FOREVER };
            choose(&history, &none, &policy, Room { open, ..WIDE }, NOW)
        };
        assert_eq!(chosen(&by_size(30, 0)), []);
        assert_eq!(chosen(&by_size(29, 0)), [(1, Reason::Size)]);
        assert_eq!(chosen(&by_size(30, 11)), [(1, Reason::Size), (2, Reason::Size)]);
        assert_eq!(by_size(30, 31).lacking, 1);
        let by_space = |min_free, free| {
            let policy = Policy { min_free, ..FOREVER };
            choose(&history, &none, &policy, Room { free, open: 0 }, NOW)
        };
        assert_eq!(chosen(&by_space(100, 100)), []);
        assert_eq!(chosen(&by_space(100, 99)), [(1, Reason::Space)]);
        assert_eq!(chosen(&by_space(100, 90)), [(1, Reason::Space)]);
        assert_eq!(chosen(&by_space(100, 89)), [(1, Reason::Space), (2, Reason::Space)]);
        assert_eq!(by_space(100, 69).lacking, 1);
    }

    #[test]
    fn a_group_point_stays_as_long_as_one_of_its_disks_stands_at_it() {
        let mut history = vec![
            entry(1, 90, &[("web01", 1), ("db01", 1)]),
            entry(2, 80, &[("web01", 10), ("db01", 100)]),
            entry(3, 70, &[("web01", 1000)]),
        ];
        let policy = Policy { max_bytes: Some(0), max_age: Duration::from_secs(60), ..FOREVER };
        let by_age = Policy { max_bytes: None, ..policy };
        let choice = choose(&history, &HashSet::new(), &by_age, WIDE, NOW);
        // db01 stands at point 2, and web01's way back to it leads through 1000 bytes.
        assert_eq!(chosen(&choice), [(1, Reason::Age)]);
        assert_eq!((choice.frees, choice.narrow, choice.lacking), (110, vec![], 0));
        history.push(entry(4, 2, &[("db01", 5)]));
        let choice = choose(&history, &HashSet::new(), &policy, WIDE, NOW);
        assert_eq!(chosen(&choice), [(1, Reason::Age), (2, Reason::Age)]);
        assert_eq!((choice.frees, choice.lacking), (1115, 0));
    }

    /// However long a machine of a group is not sent: what the others save keeps to the limit, its newest point stays its own,
    /// and the group has all of its points or none.
    #[test]
    fn a_machine_that_is_not_sent_any_more_holds_no_more_of_the_others_than_may_be() {
        let group = [("web01", 10), ("web01/data", 1), ("db01", 100), ("app01", 1)];
        let mut history = vec![entry(1, 90, &group), entry(2, 80, &group)];
        history.extend((3..8).map(|id| entry(id, 60 - id as i64, &[("web01", 1000), ("app01", 1)])));
        let none = HashSet::new();
        let by_size = |most: u64| {
            let policy = Policy { max_bytes: Some(most), ..FOREVER };
            choose(&history, &none, &policy, WIDE, NOW)
        };
        // web01/data is not sent any more either: at point 2 stands the machine too, as all of its disks do or none.
        let narrowed = |machines: &[&str]| {
            vec![(
                PointId(2),
                Reason::Size,
                machines.iter().map(|machine| machine.parse().unwrap()).collect(),
            )]
        };
        let choice = by_size(5004);
        assert_eq!(chosen(&choice), [(1, Reason::Size)]);
        assert_eq!((choice.narrow, choice.lacking), (narrowed(&["db01", "web01"]), 0));
        // With all of its disks it goes on.
        history.iter_mut().skip(2).for_each(|entry| {
            let data = VolumeAt {
                disk: "data".parse().unwrap(),
                id: "loop:/web01/data".parse().unwrap(),
                ..entry.point.volumes[0].clone()
            };
            entry.point.volumes.push(VolumeAt { bytes: 0, ..data });
        });
        let by_size = |most: u64| {
            let policy = Policy { max_bytes: Some(most), ..FOREVER };
            choose(&history, &none, &policy, WIDE, NOW)
        };
        let choice = by_size(5005);
        assert_eq!((chosen(&choice), choice.narrow), (vec![(1, Reason::Size)], vec![]));
        let choice = by_size(5004);
        assert_eq!((chosen(&choice), choice.frees), (vec![(1, Reason::Size)], 112 + 1001));
        assert_eq!((choice.narrow, choice.lacking), (narrowed(&["db01"]), 0));
        let choice = by_size(2500);
        assert_eq!(chosen(&choice), [1, 3, 4].map(|id| (id, Reason::Size)));
        assert_eq!((choice.narrow, choice.lacking), (narrowed(&["db01"]), 0));
        // Where one of them is failed over to it, it stays.
        let policy = Policy { max_bytes: Some(2500), ..FOREVER };
        let choice = choose(&history, &released(&[2]), &policy, WIDE, NOW);
        assert_eq!(
            (chosen(&choice), choice.narrow, choice.lacking),
            (vec![(1, Reason::Size)], vec![], 5005 - 2500)
        );
    }

    #[test]
    fn thinning_keeps_the_best_of_each_hour_and_day() {
        // 12:30 now; 11:31, 11:20, 11:10 | 10:50, 10:10 | two of yesterday before 12:30 | two weeks ago.
        let mut history = single(&[20000, 2000, 1999, 140, 100, 80, 70, 59, 5]);
        let policy = Policy { thinning: true, ..FOREVER };
        let choice = choose(&history, &HashSet::new(), &policy, WIDE, NOW);
        let thinned = [1, 3, 5, 7].map(|id| (id, Reason::Thinned));
        // 140 and 100 minutes ago are 10:10 and 10:50; 80 and 70 are 11:10 and 11:20.
        assert_eq!(chosen(&choice), thinned);
        // Only the first one is the oldest, so that the second one's before-images go; the rest stays needed.
        assert_eq!((choice.frees, choice.lacking), (10, 0));
        // An application's point is worth more than an older one, a fuzzy one less than any.
        history[4].point.kind = Kind::Application;
        history[5].point.fuzzy = true;
        history[5].point.kind = Kind::Application;
        let choice = choose(&history, &HashSet::new(), &policy, WIDE, NOW);
        assert_eq!(chosen(&choice), [1, 3, 4, 6].map(|id| (id, Reason::Thinned)));
    }

    #[test]
    fn what_thinned_points_hold_goes_with_those_before_them() {
        let mut history = single(&[50, 40, 30, 20]);
        history[1].dropped = Some((NOW, Reason::Thinned));
        let policy = Policy { max_bytes: Some(29), ..FOREVER };
        let choice = choose(&history, &HashSet::new(), &policy, WIDE, NOW);
        assert_eq!(chosen(&choice), [(1, Reason::Size)]);
        assert_eq!(choice.frees, 20);
        // Undone, they hold nothing.
        history[1].dropped = Some((NOW, Reason::Undo));
        assert_eq!(chosen(&choose(&history, &HashSet::new(), &policy, WIDE, NOW)), []);
    }

    #[test]
    fn no_log_makes_the_sums_overflow() {
        let disks = [("a", u64::MAX), ("b", u64::MAX)];
        let history: Vec<Entry> = (1..5).map(|id| entry(id, 10, &disks)).collect();
        let policy = Policy { max_bytes: Some(0), min_free: u64::MAX, ..FOREVER };
        let room = Room { free: 0, open: u64::MAX };
        let choice = choose(&history, &HashSet::new(), &policy, room, NOW);
        assert_eq!((choice.drop.len(), choice.frees, choice.lacking), (3, u64::MAX, u64::MAX));
    }

    /// The before-images that the kept points need, counted in another way: those of every pass that lies between a
    /// kept point and the present, each once.
    fn needed(history: &[Entry], gone: &HashSet<PointId>) -> u64 {
        let is_kept = |entry: &Entry| entry.dropped.is_none() && !gone.contains(&entry.point.id);
        let mut passes = HashMap::new();
        for (at, entry) in history.iter().enumerate().filter(|(_, entry)| is_kept(entry)) {
            for volume in &entry.point.volumes {
                for later in &history[at + 1..] {
                    for other in later.point.volumes.iter().filter(|other| other.id == volume.id) {
                        passes.insert((other.id.clone(), other.pass), other.bytes);
                    }
                }
            }
        }
        passes.values().sum()
    }

    /// The history with these points narrowed, as the log has it then.
    fn narrowed(history: &[Entry], narrow: &[(PointId, Reason, Vec<Name>)]) -> Vec<Entry> {
        let mut narrowed = Vec::new();
        for entry in history {
            let found = narrow.iter().find(|(id, ..)| entry.dropped.is_none() && *id == entry.point.id);
            let (mut others, mut entry) = (entry.clone(), entry.clone());
            if let Some((_, reason, machines)) = found {
                others.dropped = Some((NOW, *reason));
                others.point.volumes.retain(|volume| !machines.contains(&volume.machine));
                entry.point.volumes.retain(|volume| machines.contains(&volume.machine));
                narrowed.push(others);
            }
            narrowed.push(entry);
        }
        narrowed
    }

    /// Points of up to so many disks each.
    fn history(most: usize) -> impl Strategy<Value = Vec<Entry>> {
        let disks = ["a/x", "a/y", "b/x", "c/x"];
        let one = (
            proptest::sample::subsequence(disks.to_vec(), 1..=most),
            0..3 * DAY / 60,
            0..50u64,
            prop_oneof![4 => Just(None), 1 => Just(Some((NOW, Reason::Asked)))],
            0..3u8,
            any::<bool>(),
        );
        proptest::collection::vec(one, 0..30).prop_map(|mut points| {
            points.sort_by_key(|(_, minutes, ..)| -minutes);
            let made = (1..).zip(points).map(|(id, (disks, minutes, bytes, dropped, kind, fuzzy))| {
                let disks: Vec<(&str, u64)> = disks.into_iter().map(|disk| (disk, bytes)).collect();
                let mut entry = entry(id, minutes, &disks);
                entry.dropped = dropped;
                entry.point.kind = [Kind::Crash, Kind::Filesystem, Kind::Application][usize::from(kind)];
                entry.point.fuzzy = fuzzy;
                entry
            });
            made.collect()
        })
    }

    proptest! {
        #[test]
        fn what_must_stay_stays_and_no_more_goes_than_must(
            mut history in history(4),
            failed_over in proptest::collection::hash_set((1..30u128).prop_map(PointId), 0..3),
            hours in prop_oneof![Just(1u64), 1..80u64],
            max_bytes in proptest::option::of(0..1000u64),
            min_free in 0..1000u64,
            free in 0..1000u64,
            open in 0..100u64,
            thinning in any::<bool>(),
        ) {
            let policy = Policy { max_age: Duration::from_secs(hours * 3600), max_bytes, min_free, thinning };
            let room = Room { free, open };
            let choice = choose(&history, &failed_over, &policy, room, NOW);
            let gone: HashSet<PointId> = choice.drop.iter().map(|(id, _)| *id).collect();
            prop_assert_eq!(gone.len(), choice.drop.len());
            prop_assert!(choice.drop.is_sorted_by_key(|(id, _)| *id), "oldest first");
            prop_assert!(choice.narrow.is_sorted_by_key(|(id, ..)| *id), "oldest first");

            // What must stay.
            prop_assert!(gone.is_disjoint(&failed_over));
            let mut newest = HashMap::new();
            for entry in history.iter().filter(|entry| entry.dropped.is_none()) {
                newest.extend(entry.point.volumes.iter().map(|volume| (volume.id.clone(), entry.point.id)));
            }
            for entry in history.iter().filter(|entry| entry.dropped.is_some()) {
                prop_assert!(!gone.contains(&entry.point.id), "dropped twice");
            }
            let narrowed = narrowed(&history, &choice.narrow);
            let is_kept = |entry: &&Entry| entry.dropped.is_none() && !gone.contains(&entry.point.id);
            let mut stands_at = HashMap::new();
            for entry in narrowed.iter().filter(is_kept) {
                stands_at.extend(entry.point.volumes.iter().map(|volume| (volume.id.clone(), entry.point.id)));
            }
            prop_assert_eq!(&stands_at, &newest);
            // The machines that stand at a point; of it, it may be taken from the others.
            let stay = |point: &Point| -> Vec<Name> {
                let disks = point.volumes.iter().filter(|volume| newest[&volume.id] == point.id);
                let machines: BTreeSet<Name> = disks.map(|volume| volume.machine.clone()).collect();
                machines.into_iter().collect()
            };
            for (id, _, machines) in &choice.narrow {
                let point = &history.iter().find(|entry| entry.point.id == *id).unwrap().point;
                prop_assert_eq!(machines, &stay(point));
                prop_assert!(!failed_over.contains(id));
            }

            // The figures.
            let (before, after) = (needed(&history, &HashSet::new()), needed(&narrowed, &gone));
            prop_assert_eq!(choice.frees, before - after);
            let too_many = |held: u64| max_bytes.map_or(0, |most| (held + open).saturating_sub(most));
            let too_few = |held: u64| min_free.saturating_sub(free + before - held);
            prop_assert_eq!(choice.lacking, too_many(after).max(too_few(after)));

            // Nothing goes that need not: without the last one that was in the way of the room, room was lacking.
            let of_room = |reason: &Reason| matches!(reason, Reason::Size | Reason::Space);
            let dropped = choice.drop.iter().map(|(id, reason)| (*id, *reason));
            let all = dropped.chain(choice.narrow.iter().map(|(id, reason, _)| (*id, *reason)));
            if let Some((last, _)) = all.filter(|(_, reason)| of_room(reason)).max() {
                let gone: HashSet<PointId> = gone.iter().copied().filter(|id| *id != last).collect();
                let narrow: Vec<_> = choice.narrow.iter().filter(|(id, ..)| *id != last).cloned().collect();
                let held = needed(&self::narrowed(&history, &narrow), &gone);
                prop_assert!(too_many(held) > 0 || too_few(held) > 0);
            }
            // And where it is lacking still, every point that would free some must stay.
            if choice.lacking > 0 {
                for entry in narrowed.iter().filter(is_kept) {
                    let id = entry.point.id;
                    let more: HashSet<PointId> = gone.iter().copied().chain([id]).collect();
                    let must = failed_over.contains(&id) || newest.values().any(|newest| *newest == id);
                    prop_assert!(must || needed(&narrowed, &more) == after);
                    if !failed_over.contains(&id) && !stay(&entry.point).is_empty() {
                        let less = self::narrowed(&narrowed, &[(id, Reason::Size, stay(&entry.point))]);
                        prop_assert_eq!(needed(&less, &gone), after);
                    }
                }
            }
            // What has a newer point, that is too old itself, on each of its disks is gone, unless it must stay; and by age
            // nothing else is.
            for (at, Entry { point, dropped }) in history.iter().enumerate() {
                let must = failed_over.contains(&point.id) || newest.values().any(|id| *id == point.id);
                let superseded = point.volumes.iter().all(|volume| {
                    history[at + 1..].iter().any(|later| {
                        later.dropped.is_none()
                            && NOW - later.point.recorded > policy.max_age
                            && (point.fuzzy || !later.point.fuzzy)
                            && later.point.volumes.iter().any(|other| other.disk == volume.disk && other.machine == volume.machine)
                    })
                });
                if dropped.is_none() && !must && superseded {
                    prop_assert!(gone.contains(&point.id));
                }
                prop_assert!(superseded || !choice.drop.contains(&(point.id, Reason::Age)));
            }

            // Once done, nothing is left to do.
            history = narrowed;
            for entry in history.iter_mut().filter(|entry| gone.contains(&entry.point.id)) {
                entry.dropped = Some((NOW, Reason::Asked));
            }
            let room = Room { free: free + choice.frees, open };
            let again = choose(&history, &failed_over, &policy, room, NOW);
            prop_assert_eq!(again, Choice { lacking: choice.lacking, ..Choice::default() });
        }

        #[test]
        fn thinning_leaves_a_point_of_every_hour_and_day(history in prop_oneof![history(1), history(4)]) {
            let policy = Policy { thinning: true, ..FOREVER };
            let choice = choose(&history, &HashSet::new(), &policy, WIDE, NOW);
            let gone: HashSet<PointId> = choice.drop.iter().map(|(id, _)| *id).collect();
            let spans = |gone: &HashSet<PointId>| {
                let mut spans: HashMap<_, u32> = HashMap::new();
                for Entry { point, dropped } in &history {
                    let age = NOW - point.recorded;
                    let span = if age < time::Duration::hours(1) {
                        continue;
                    } else if age < time::Duration::days(1) {
                        (point.recorded.date(), Some(point.recorded.hour()))
                    } else {
                        (point.recorded.date(), None)
                    };
                    if dropped.is_none() && !gone.contains(&point.id) {
                        for volume in &point.volumes {
                            *spans.entry((volume.id.clone(), span)).or_default() += 1;
                        }
                    }
                }
                spans
            };
            let (before, after) = (spans(&HashSet::new()), spans(&gone));
            prop_assert_eq!(before.len(), after.len());
            // Where every point is of one disk, one is left of each span, and the newest point.
            if history.iter().all(|entry| entry.point.volumes.len() == 1) {
                prop_assert!(after.values().all(|count| *count <= 2));
            }
        }
    }
}
