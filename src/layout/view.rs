//! A place on a disk, as a parser reads it.

use std::cell::Cell;
use std::rc::Rc;

use super::Error;
use super::fields::Block;
use super::ranges::Used;
use crate::error::IoError;
use crate::storage::ReadAt;

/// The most that is read at once.
pub const MAX_READ: u64 = 16 << 20;

/// What may be spent on a disk, in bytes that are read; all else counts as what could be read meanwhile. That is twice what
/// the bitmaps of 64 TiB in blocks of 4 KiB take, all of them written, and a second or two.
const WORK: u64 = 4 << 30;
/// What a read takes, however little is read.
pub const PER_READ: u64 = 4096;
/// What a used or free range takes.
pub const PER_RANGE: u64 = 64;
/// How much memory what is known of a disk may take: as much as the most ranges that a file system has.
const MEMORY: u64 = 32 << 20;

/// The bytes of a disk, a partition or a logical volume, from 0 to [`View::size`], wherever they lie.
///
/// A disk that was made for it could keep this program reading for ever, or have it fill the memory: with a thousand
/// partitions that are each as large as the disk, with groups whose bitmaps are all in one place. So what is spent on a disk
/// is limited, whatever its size, and a view shares that with the views of its parts. What comes when it is spent is used, and
/// says that there was too much.
#[derive(Clone)]
pub struct View<'a> {
    disk: &'a dyn ReadAt,
    start: u64,
    size: u64,
    left: Rc<Left>,
}

/// What is left of that.
struct Left {
    work: Cell<u64>,
    memory: Cell<u64>,
}

impl<'a> View<'a> {
    /// All of a disk.
    pub fn new(disk: &'a dyn ReadAt) -> View<'a> {
        View::limited(disk, WORK, MEMORY)
    }

    /// The same, with other limits.
    pub(super) fn limited(disk: &'a dyn ReadAt, work: u64, memory: u64) -> View<'a> {
        let left = Left { work: Cell::new(work), memory: Cell::new(memory) };
        View { disk, start: 0, size: disk.size(), left: Rc::new(left) }
    }

    /// `len` bytes of this one from `at` on, or `None` where it has not as many.
    pub fn part(&self, at: u64, len: u64) -> Option<View<'a>> {
        let end = at.checked_add(len)?;
        let start = self.start.checked_add(at)?;
        (end <= self.size).then(|| View { start, size: len, ..self.clone() })
    }

    /// All of another disk, with which this one shares what may be spent.
    pub fn beside<'b>(&self, disk: &'b dyn ReadAt) -> View<'b> {
        View { disk, start: 0, size: disk.size(), left: self.left.clone() }
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads `len` bytes, at most [`MAX_READ`], from `at` on.
    pub fn read(&self, at: u64, len: u64) -> Result<Block, Error> {
        let count = usize::try_from(len).ok().filter(|_| len <= MAX_READ);
        let count = count.ok_or_else(|| Error::unsupported(format!("a structure of {len} bytes")))?;
        self.check(at, len)?;
        let mut bytes = vec![0; count];
        self.fill(at, &mut bytes)?;
        Ok(Block::new(bytes, at))
    }

    /// Fills `buf` from `at` on.
    pub fn fill(&self, at: u64, buf: &mut [u8]) -> Result<(), Error> {
        let len = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        self.check(at, len)?;
        self.spend(len.saturating_add(PER_READ))?;
        Ok(self.direct(at, buf)?)
    }

    /// Spends what takes as long as to read so many bytes.
    pub fn spend(&self, work: u64) -> Result<(), Error> {
        let left = self.left.work.get().checked_sub(work);
        self.left.work.set(left.ok_or_else(|| Error::unsupported("so much metadata"))?);
        Ok(())
    }

    /// How much memory there is left for what is known of the disk.
    pub fn memory(&self) -> u64 {
        self.left.memory.get()
    }

    /// Remembers that so much more of it is taken.
    pub fn keep(&self, memory: u64) {
        self.left.memory.set(self.memory().saturating_sub(memory));
    }

    /// Collects used bytes, in no more ranges than there is memory for.
    pub fn used(&self) -> Used {
        Used::within(self.memory())
    }

    /// The same for a reader over several views, which is read through a view of its own.
    pub(super) fn direct(&self, at: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.disk.read_at(self.start.saturating_add(at), buf)
    }

    /// That nothing beyond the end is asked for.
    fn check(&self, at: u64, len: u64) -> Result<(), Error> {
        match at.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::Corrupt { what: "something is said to lie beyond the end of its place", at }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_part_begins_at_its_beginning_and_nothing_is_read_beyond_its_end() {
        let disk = Arc::new((0..100).collect::<Vec<u8>>());
        let part = View::new(&disk).part(10, 50).unwrap().part(5, 20).unwrap();
        assert_eq!(part.size(), 20);
        assert_eq!(part.read(18, 2).unwrap().bytes(), [33, 34]);
        for (at, len) in [(18, 3), (20, 1), (u64::MAX, 1)] {
            let error = part.read(at, len).unwrap_err();
            assert!(matches!(error, Error::Corrupt { at: found, .. } if found == at), "{error}");
        }
        assert!(part.part(20, 0).is_some());
        for (at, len) in [(20, 1), (0, 21), (u64::MAX, 1), (1, u64::MAX)] {
            assert!(part.part(at, len).is_none());
        }
    }

    /// A disk of zeros.
    struct Zeros(u64);

    impl ReadAt for Zeros {
        fn size(&self) -> u64 {
            self.0
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), IoError> {
            Ok(())
        }
    }

    #[test]
    fn what_is_spent_is_limited_at_once_and_in_all() {
        let disk = Zeros(64 << 30);
        let view = View::new(&disk);
        let part = view.part(1 << 30, 1 << 30).unwrap();
        assert_eq!(
            part.read(0, MAX_READ + 1).unwrap_err().to_string(),
            "a structure of 16777217 bytes cannot be followed"
        );
        // However large the disk is.
        assert_eq!(view.left.work.get(), 4 << 30);
        let view = View::limited(&disk, 2 * (5000 + PER_READ) + 100, 1000);
        let part = view.part(1 << 30, 1 << 30).unwrap();
        view.fill(0, &mut [0; 5000]).unwrap();
        part.fill(0, &mut [0; 5000]).unwrap();
        part.spend(100).unwrap();
        for view in [&part, &view, &view.beside(&disk)] {
            assert_eq!(view.read(0, 1).unwrap_err().to_string(), "so much metadata cannot be followed");
            assert_eq!(view.spend(1).unwrap_err().to_string(), "so much metadata cannot be followed");
        }
        view.keep(600);
        assert_eq!(part.memory(), 400);
        part.keep(600);
        assert_eq!(view.memory(), 0);
    }
}
