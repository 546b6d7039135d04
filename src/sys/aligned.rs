//! Page-aligned memory for direct I/O, cut from an arena whose size bounds what a volume can ever hold.
//!
//! An [`Arena`] is one anonymous mapping. A [`Buffer`] is a contiguous run of its pages, owned by whoever holds
//! it, and goes back when it is dropped. Where the arena is full, the allocation waits: this is how a slow disk
//! slows its sender down instead of filling the memory.
//!
//! The mapping lives as long as the last buffer cut from it. A buffer whose write is still under way in the
//! kernel is owned by the ring, which leaks it rather than let it be used again.

use std::future::poll_fn;
use std::io;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::pin::pin;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// The unit of allocation and the alignment of every buffer. A multiple of every logical block size that
/// Linux supports with direct I/O (512 to 4096 on the page sizes that we run on).
pub const PAGE: usize = 4096;

/// A bounded supply of [`Buffer`]s.
#[derive(Clone, Debug)]
pub struct Arena {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    base: NonNull<u8>,
    bytes: NonZeroUsize,
    state: Mutex<State>,
}

// SAFETY: `base` points to a mapping that belongs to this value alone. Its bytes are reached only through
// `Buffer`s, whose page runs are disjoint, and each `Buffer` follows Rust's borrow rules.
unsafe impl Send for Shared {}
// SAFETY: as above; the only state shared between threads is behind the mutex.
unsafe impl Sync for Shared {}

#[derive(Debug)]
struct State {
    /// Free runs of pages, `(first, count)`, sorted by `first`, never touching one another.
    free: Vec<(usize, usize)>,
    waiting: Vec<Waker>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held, and the lists are valid between statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `Arena::new` with this address and length, and no `Buffer` is left,
        // since each holds a reference to this value.
        let unmapped = unsafe { munmap(self.base.cast::<c_void>(), self.bytes.get()) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Arena {
    /// Maps `bytes` (rounded up to whole pages). Pages take memory when they are first used.
    pub fn new(bytes: usize) -> io::Result<Arena> {
        let pages = bytes.div_ceil(PAGE).max(1);
        let bytes = pages.checked_mul(PAGE).and_then(NonZeroUsize::new).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            mmap_anonymous(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }?;
        let state = Mutex::new(State { free: vec![(0, pages)], waiting: Vec::new() });
        Ok(Arena { shared: Arc::new(Shared { base: base.cast(), bytes, state }) })
    }

    /// The whole size in bytes: the largest buffer there can be, and the bound of all of them together.
    pub fn size(&self) -> usize {
        self.shared.bytes.get()
    }

    /// A buffer of `len` bytes with unspecified content (zeros, or what an earlier buffer held), or `None`
    /// where no run of pages is free that is long enough.
    pub fn try_alloc(&self, len: usize) -> Option<Buffer> {
        self.take(&mut self.shared.state(), len)
    }

    /// The same, but waits until there is room.
    ///
    /// # Panics
    /// Where `len` is larger than the arena: that wait would never end, so callers bound `len` first.
    pub async fn alloc(&self, len: usize) -> Buffer {
        poll_fn(|context| self.poll_alloc(context, len)).await
    }

    /// The same, blocking the thread.
    pub fn alloc_blocking(&self, len: usize) -> Buffer {
        struct Unpark(std::thread::Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Arc::new(Unpark(std::thread::current())).into();
        let mut context = Context::from_waker(&waker);
        let mut alloc = pin!(self.alloc(len));
        loop {
            match alloc.as_mut().poll(&mut context) {
                Poll::Ready(buffer) => return buffer,
                Poll::Pending => std::thread::park(),
            }
        }
    }

    fn poll_alloc(&self, context: &mut Context<'_>, len: usize) -> Poll<Buffer> {
        assert!(len <= self.size(), "a buffer of {len} bytes cannot come from an arena of {}", self.size());
        let mut state = self.shared.state();
        match self.take(&mut state, len) {
            Some(buffer) => Poll::Ready(buffer),
            None => {
                // Under the same lock as the look: a buffer that is freed from here on finds this waker.
                if !state.waiting.iter().any(|waiting| waiting.will_wake(context.waker())) {
                    state.waiting.push(context.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    fn take(&self, state: &mut State, len: usize) -> Option<Buffer> {
        let pages = len.div_ceil(PAGE).max(1);
        let run = state.free.iter().position(|&(_, count)| count >= pages)?;
        let (first, count) = state.free[run];
        if count == pages {
            state.free.remove(run);
        } else {
            state.free[run] = (first + pages, count - pages);
        }
        Some(Buffer { arena: self.shared.clone(), first, pages, len })
    }
}

/// A run of an arena's pages. Its start is page-aligned; its capacity is a whole number of pages.
#[derive(Debug)]
pub struct Buffer {
    arena: Arc<Shared>,
    first: usize,
    pages: usize,
    len: usize,
}

impl Buffer {
    /// How far the length can be set.
    pub fn capacity(&self) -> usize {
        self.pages * PAGE
    }

    /// Sets the length, up to the capacity. The bytes between the old and the new length are unspecified.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity());
        self.len = len;
    }

    /// Whether the buffer was cut from `arena`.
    pub fn is_from(&self, arena: &Arena) -> bool {
        Arc::ptr_eq(&self.arena, &arena.shared)
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: `first` counts pages inside the mapping, so the sum stays inside of it.
        unsafe { self.arena.base.add(self.first * PAGE) }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: these pages are mapped, initialised (by the kernel, with zeros) and belong to this value
        // alone, and `len` is at most their size.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut state = self.arena.state();
        let at = state.free.partition_point(|&(first, _)| first < self.first);
        state.free.insert(at, (self.first, self.pages));
        let joins = |free: &[(usize, usize)], i: usize| free[i].0 + free[i].1 == free[i + 1].0;
        if at + 1 < state.free.len() && joins(&state.free, at) {
            state.free[at].1 += state.free.remove(at + 1).1;
        }
        if at > 0 && joins(&state.free, at - 1) {
            state.free[at - 1].1 += state.free.remove(at).1;
        }
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// The memory of an arena as the ring registers it.
pub(super) fn as_iovec(arena: &Arena) -> nix::libc::iovec {
    nix::libc::iovec { iov_base: arena.shared.base.as_ptr().cast(), iov_len: arena.size() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_disjoint_and_come_back() {
        let arena = Arena::new(4 * PAGE).unwrap();
        let mut a = arena.try_alloc(1).unwrap();
        let mut b = arena.try_alloc(2 * PAGE).unwrap();
        assert_eq!(a.as_ptr() as usize % PAGE, 0);
        a.fill(1);
        b.fill(2);
        assert_eq!((a[0], b[0], b[2 * PAGE - 1]), (1, 2, 2));
        assert!(arena.try_alloc(PAGE + 1).is_none(), "one page is left");
        drop(a);
        assert!(arena.try_alloc(PAGE + 1).is_none(), "two pages are left, but apart");
        drop(b);
        let whole = arena.try_alloc(4 * PAGE).expect("all of it came back in one run");
        assert_eq!(whole.capacity(), 4 * PAGE);
    }

    #[test]
    fn a_full_arena_makes_the_allocation_wait() {
        let arena = Arena::new(PAGE).unwrap();
        let held = arena.try_alloc(PAGE).unwrap();
        let waiter = std::thread::spawn({
            let arena = arena.clone();
            move || arena.alloc_blocking(PAGE).len()
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!waiter.is_finished());
        drop(held);
        assert_eq!(waiter.join().unwrap(), PAGE);
    }

    #[test]
    fn a_buffer_outlives_its_arena() {
        let buffer = Arena::new(PAGE).unwrap().try_alloc(PAGE).unwrap();
        assert!(buffer.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn random_allocations_never_overlap() {
        let arena = Arena::new(64 * PAGE).unwrap();
        let mut live: Vec<(Buffer, u8)> = Vec::new();
        let mut seed = 1u32;
        for round in 0..5000u32 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if seed >> 31 == 0 && !live.is_empty() {
                let (buffer, mark) = live.swap_remove((seed >> 8) as usize % live.len());
                assert!(buffer.iter().all(|&byte| byte == mark), "another buffer wrote here");
            } else if let Some(mut buffer) = arena.try_alloc(1 + (seed >> 8) as usize % (8 * PAGE)) {
                buffer.fill(round as u8);
                live.push((buffer, round as u8));
            }
        }
        drop(live);
        assert!(arena.try_alloc(64 * PAGE).is_some(), "all runs joined again");
    }
}
