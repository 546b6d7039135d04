//! Several files at once: while one thread checks what it read, another one reads.

use std::sync::atomic::{AtomicUsize, Ordering};

/// How many threads there are at most.
const THREADS: usize = 4;

/// What `work` makes of each item, in the order of the items. Where it is not `worth` it, one after the other.
pub(super) fn each<T: Sync, R: Send>(
    items: &[T],
    worth: bool,
    work: impl Fn(usize, &T) -> R + Sync,
) -> Vec<R> {
    // Only asked where it is needed: to find out, files below /proc and /sys are read.
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if worth { THREADS.min(cores()).min(items.len()) } else { 1 };
    let next = AtomicUsize::new(0);
    let some = || {
        let places = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
        let some = places.map_while(|place| Some((place, work(place, items.get(place)?))));
        some.collect::<Vec<_>>()
    };
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(some)).collect();
        let mut done = some();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        let items: Vec<usize> = (0..1000).collect();
        for worth in [false, true] {
            let results = each(&items, worth, |place, item| {
                assert_eq!(place, *item);
                // The first ones take longest.
                std::thread::sleep(std::time::Duration::from_micros(if *item < 10 { 500 } else { 0 }));
                item * 2
            });
            assert_eq!(results, items.iter().map(|item| item * 2).collect::<Vec<_>>());
        }
        assert!(each(&[] as &[usize], true, |_, item| *item).is_empty());
    }
}
