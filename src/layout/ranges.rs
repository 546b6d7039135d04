//! Sets of bytes as ranges.

use crate::units::Extent;

/// What a range takes in memory.
const PER_RANGE: u64 = 16;

/// A set of bytes: ranges in ascending order that neither overlap nor touch. Exact, whatever is done with it; what it
/// takes in memory is 16 bytes a range. For sets that a disk determines there is [`Used`], which is bounded.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ranges(Vec<Extent>);

impl Ranges {
    /// The empty set.
    pub const fn new() -> Ranges {
        Ranges(Vec::new())
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many ranges it has.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// How much memory it takes.
    pub fn memory(&self) -> u64 {
        u64::try_from(self.count()).unwrap_or(u64::MAX).saturating_mul(PER_RANGE)
    }

    /// How many bytes it holds.
    pub fn bytes(&self) -> u64 {
        // They are disjoint, and so no more than u64::MAX.
        self.0.iter().fold(0, |sum, range| sum.saturating_add(range.len()))
    }

    /// The ranges, in ascending order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Extent> + DoubleEndedIterator + '_ {
        self.0.iter().copied()
    }

    /// Adds a range. Quick behind the last one, slow among many others.
    pub fn insert(&mut self, new: Extent) {
        // All that overlap or touch the new one become one with it.
        let from = match self.0.last() {
            Some(last) if last.end() < new.offset() => self.0.len(),
            _ => self.0.partition_point(|range| range.end() < new.offset()),
        };
        let rest = self.0.get(from..).unwrap_or_default();
        let count = rest.partition_point(|range| range.offset() <= new.end());
        let old = rest.get(..count).unwrap_or_default();
        let (first, last) = (old.first().copied().unwrap_or(new), old.last().copied().unwrap_or(new));
        let whole = between(first.offset().min(new.offset()), last.end().max(new.end()));
        self.0.splice(from..from.saturating_add(count), whole);
    }

    /// Whether all of the range is in the set.
    pub fn covers(&self, range: Extent) -> bool {
        let at = self.0.partition_point(|own| own.end() <= range.offset());
        self.0.get(at).is_some_and(|own| own.offset() <= range.offset() && range.end() <= own.end())
    }

    /// What of the set lies in `window`.
    pub fn within(&self, window: Extent) -> impl Iterator<Item = Extent> + '_ {
        let from = self.0.partition_point(|own| own.end() <= window.offset());
        let rest = self.0.get(from..).unwrap_or_default().iter();
        rest.map_while(move |own| between(own.offset().max(window.offset()), own.end().min(window.end())))
    }

    /// What is in either set.
    pub fn union(&self, other: &Ranges) -> Ranges {
        self.combine(other, |ours, theirs| ours || theirs)
    }

    /// What is in both sets.
    pub fn intersect(&self, other: &Ranges) -> Ranges {
        self.combine(other, |ours, theirs| ours && theirs)
    }

    /// What is in this set and not in the other.
    pub fn subtract(&self, other: &Ranges) -> Ranges {
        self.combine(other, |ours, theirs| ours && !theirs)
    }

    /// What of `within` is not in the set.
    pub fn complement(&self, within: Extent) -> Ranges {
        Ranges(vec![within]).subtract(self)
    }

    /// What is in the set according to `keep`, which is told whether a byte is in this one and in the other, and must
    /// say no where it is in neither: one walk over the ends of all ranges.
    fn combine(&self, other: &Ranges, keep: fn(bool, bool) -> bool) -> Ranges {
        let (mut ours, mut theirs) = (Edges::of(self), Edges::of(other));
        let mut result = Vec::new();
        let mut since = None;
        while let Some(at) = ours.next.into_iter().chain(theirs.next).min() {
            ours.pass(at);
            theirs.pass(at);
            match (since, keep(ours.inside, theirs.inside)) {
                (None, true) => since = Some(at),
                (Some(from), false) => {
                    result.extend(between(from, at));
                    since = None;
                }
                _ => {}
            }
        }
        Ranges(result)
    }
}

impl FromIterator<Extent> for Ranges {
    fn from_iter<I: IntoIterator<Item = Extent>>(ranges: I) -> Ranges {
        let mut all: Vec<Extent> = ranges.into_iter().collect();
        all.sort_unstable_by_key(|range| range.offset());
        let mut result = Ranges::new();
        all.into_iter().for_each(|range| result.insert(range));
        result
    }
}

/// The range from one byte to another, if the first is smaller.
pub fn between(from: u64, to: u64) -> Option<Extent> {
    Extent::new(from, to.checked_sub(from)?)
}

/// Gives the runs of ones among the first `count` bits of a bitmap, of whose bytes the lowest bit is the first: the first
/// of each run, and the first behind it.
pub fn runs(bitmap: &[u8], count: u64, mut give: impl FnMut(u64, u64)) {
    let mut since = None;
    for (first, chunk) in (0u64..).step_by(64).zip(bitmap.chunks(8)) {
        if first >= count {
            break;
        }
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
        let mut rest = u64::from_le_bytes(bytes);
        let mut at = first;
        let mut left = 64;
        loop {
            // To the next bit of the other kind. Most words have none.
            let same = if since.is_some() { rest.trailing_ones() } else { rest.trailing_zeros() };
            at = at.saturating_add(same.into());
            if same >= left || at >= count {
                break;
            }
            left = left.saturating_sub(same);
            rest = rest.checked_shr(same).unwrap_or(0);
            match since.take() {
                Some(from) => give(from, at),
                None => since = Some(at),
            }
        }
    }
    since.into_iter().for_each(|from| give(from, count));
}

/// The ends of ranges, one after the other.
struct Edges<'a> {
    ranges: std::slice::Iter<'a, Extent>,
    current: Option<Extent>,
    /// Where the next end lies.
    next: Option<u64>,
    /// Whether a range has begun and not ended.
    inside: bool,
}

impl<'a> Edges<'a> {
    fn of(set: &'a Ranges) -> Edges<'a> {
        let mut edges = Edges { ranges: set.0.iter(), current: None, next: None, inside: false };
        edges.advance();
        edges
    }

    fn advance(&mut self) {
        self.current = self.ranges.next().copied();
        self.next = self.current.map(Extent::offset);
    }

    /// Goes beyond `at`, which is not beyond the next end.
    fn pass(&mut self, at: u64) {
        if self.next != Some(at) {
            return;
        }
        if self.inside {
            self.inside = false;
            self.advance();
        } else {
            self.inside = true;
            self.next = self.current.map(Extent::end);
        }
    }
}

/// The most ranges of a [`Used`]. One more, and before it is seen that this is too many, they take 32 MiB.
const MAX_RANGES: usize = (1 << 21) - 1;

/// Collects the *used* bytes that a disk's structures tell of, in bounded memory: where there are more ranges than that,
/// the shortest gaps between them are filled. What is used stays in the set in any case, and what comes of a disk that is
/// fragmented beyond measure is that some of its free bytes are copied.
#[derive(Debug)]
pub struct Used {
    ranges: Ranges,
    most: usize,
    /// Gaps that are shorter are filled.
    gap: u64,
}

impl Default for Used {
    fn default() -> Used {
        Used::with(MAX_RANGES)
    }
}

impl Used {
    /// With as many ranges as fit into so much memory, and no more than otherwise.
    pub fn within(memory: u64) -> Used {
        let most = memory.checked_div(PER_RANGE).and_then(|most| usize::try_from(most).ok());
        Used::with(most.unwrap_or(MAX_RANGES).min(MAX_RANGES))
    }

    /// With at most so many ranges, and two in any case.
    fn with(most: usize) -> Used {
        Used { ranges: Ranges::new(), most: most.max(2), gap: 0 }
    }

    /// Adds a range. Quick in ascending order.
    pub fn add(&mut self, range: Extent) {
        self.ranges.insert(range);
        // Once gaps are filled, half of the ranges are to be gone, or each new one would be paid for by all others.
        if self.ranges.count() > self.most {
            let enough = self.most.div_ceil(2);
            self.gap = self.gap.max(256);
            while self.ranges.count() > enough {
                self.gap = self.gap.saturating_mul(2);
                self.fill();
            }
        }
    }

    /// Makes one of the ranges on either side of each short gap.
    fn fill(&mut self) {
        let gap = self.gap;
        self.ranges.0.dedup_by(|next, kept| match between(kept.offset(), next.end()) {
            Some(whole) if next.offset().saturating_sub(kept.end()) < gap => {
                *kept = whole;
                true
            }
            _ => false,
        });
    }

    /// What was collected.
    pub fn finish(self) -> Ranges {
        self.ranges
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: usize = 64;

    fn extent(from: u64, to: u64) -> Extent {
        between(from, to).unwrap()
    }

    /// Ranges on a disk of 64 bytes, as they come.
    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        let one = (0..SIZE as u64, 1..=SIZE as u64)
            .prop_map(|(from, len)| extent(from, (from + len).min(SIZE as u64)));
        prop::collection::vec(one, 0..12)
    }

    fn bitmap(extents: &[Extent]) -> [bool; SIZE] {
        std::array::from_fn(|at| {
            extents.iter().any(|range| (range.offset()..range.end()).contains(&(at as u64)))
        })
    }

    /// The set's bits; and it keeps the rules of its order.
    fn bits(set: &Ranges) -> [bool; SIZE] {
        let all: Vec<Extent> = set.iter().collect();
        assert!(all.windows(2).all(|pair| pair[0].end() < pair[1].offset()), "{set:?}");
        assert_eq!(set.bytes(), bitmap(&all).iter().filter(|bit| **bit).count() as u64);
        bitmap(&all)
    }

    proptest! {
        #[test]
        fn the_set_is_what_a_bitmap_is(a in extents(), b in extents(), probe in (0..60u64, 1..4u64)) {
            let set = |extents: &[Extent]| {
                let mut set = Ranges::new();
                extents.iter().for_each(|range| set.insert(*range));
                assert_eq!(set, extents.iter().copied().collect());
                set
            };
            let (left, right) = (bitmap(&a), bitmap(&b));
            let (a, b) = (set(&a), set(&b));
            prop_assert_eq!(bits(&a), left);
            let each = |f: fn(bool, bool) -> bool| std::array::from_fn(|at| f(left[at], right[at]));
            prop_assert_eq!(bits(&a.union(&b)), each(|l, r| l | r));
            prop_assert_eq!(bits(&a.intersect(&b)), each(|l, r| l & r));
            prop_assert_eq!(bits(&a.subtract(&b)), each(|l, r| l & !r));
            let (from, to) = (probe.0, probe.0 + probe.1);
            let within: [bool; SIZE] = std::array::from_fn(|at| (from..to).contains(&(at as u64)));
            let rest: [bool; SIZE] = std::array::from_fn(|at| within[at] & !left[at]);
            prop_assert_eq!(bits(&a.complement(extent(from, to))), rest);
            let clipped: Ranges = [extent(from, to)].into_iter().collect();
            prop_assert_eq!(a.within(extent(from, to)).collect::<Ranges>(), a.intersect(&clipped));
            prop_assert_eq!(a.covers(extent(from, to)), rest.iter().all(|bit| !bit));
        }

        #[test]
        fn runs_are_those_of_the_bits(words in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 1..6), cut in 0..64u64) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let count = words.len() as u64 * 64 - cut;
            let mut found = Vec::new();
            runs(&bytes, count, |from, to| {
                assert!(found.last().is_none_or(|last| *last + 1 < from) && from < to);
                found.extend(from..to);
            });
            let expected: Vec<u64> =
                (0..count).filter(|at| bytes[*at as usize / 8] >> (at % 8) & 1 == 1).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn used_bytes_are_never_lost_and_ranges_are_never_too_many(all in extents(), most in 2..5usize) {
            let mut used = Used::with(most);
            for range in &all {
                used.add(*range);
                prop_assert!(used.ranges.count() <= most);
            }
            let used = bits(&used.finish());
            prop_assert!(bitmap(&all).iter().zip(used).all(|(was, is)| !was || is));
        }

        #[test]
        fn as_long_as_there_is_room_the_collection_is_exact(all in extents()) {
            let mut used = Used::default();
            all.iter().for_each(|range| used.add(*range));
            prop_assert_eq!(bits(&used.finish()), bitmap(&all));
        }
    }

    #[test]
    fn only_short_gaps_are_filled() {
        let mut used = Used::with(4);
        for at in [0u64, 1 << 20, (1 << 20) + 8192, 1 << 30, 1 << 40] {
            used.add(Extent::new(at, 4096).unwrap());
        }
        let found: Vec<u64> = used.finish().iter().map(Extent::offset).collect();
        assert_eq!(found, [0, 1 << 40]);
    }

    #[test]
    fn the_last_byte_of_all_is_no_exception() {
        let all = extent(0, u64::MAX);
        let one: Ranges = [extent(u64::MAX - 1, u64::MAX)].into_iter().collect();
        let rest = one.complement(all);
        assert_eq!(rest.bytes(), u64::MAX - 1);
        assert_eq!(rest.union(&one), [all].into_iter().collect());
    }

    #[test]
    fn a_disk_that_is_fragmented_beyond_measure_takes_bounded_memory_and_time() {
        use nix::sys::resource::{UsageWho, getrusage};
        let cpu = || getrusage(UsageWho::RUSAGE_THREAD).unwrap().user_time().tv_sec();
        let before = cpu();
        let mut used = Used::default();
        // Every other block of 32 GiB.
        for block in 0..4u64 << 20 {
            used.add(Extent::new(block * 8192, 4096).unwrap());
            assert!(used.ranges.0.capacity() <= MAX_RANGES + 1);
        }
        assert!(cpu() - before < 30, "{} s", cpu() - before);
        let used = used.finish();
        assert!(used.bytes() >= 16 << 30 && used.count() <= MAX_RANGES);
    }
}
