//! A source disk, and the thread that reads ahead of the connection.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use tokio::sync::mpsc::Sender;

use super::compare::Asks;
use super::encode::{Encoder, Piece};
use super::free::Free;
use super::hints::Hints;
use super::limit::Limiter;
use super::{Compression, Progress, mark};
use crate::digest::Digest;
use crate::disk::discover::{Sysroot, roles, views};
use crate::disk::id::DiskId;
use crate::error::IoError;
use crate::storage::Geometry;
use crate::storage::ahead::{Ahead, CHUNK, Part};
use crate::storage::device::{Device, EngineChoice};
use crate::sys::aligned::{Arena, Buffer, PAGE};
use crate::sys::ioctl;
use crate::units::{ByteLen, Extent};

/// How many requests are under way.
const DEPTH: usize = 8;

/// Memory for what was read and not sent yet: bounds what a slow connection lets pile up.
const MEMORY: usize = 24 << 20;

/// Why a source cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// It is no disk and no image.
    #[error("{} is no block device and no regular file", .0.display())]
    NotADisk(PathBuf),
    /// There is nothing to send.
    #[error("{} is empty", .0.display())]
    Empty(PathBuf),
    /// A read does not come back.
    #[error(
        "a read of {} has not come back for {} s: its device, or what that lies on, hangs; see `dmesg`, and start this again \
         once it can be read",
        .0.display(), .1.as_secs()
    )]
    Hangs(PathBuf, Duration),
    /// It was made smaller.
    #[error(
        "{} was made smaller while it was read, from {from} to {to}; if that is meant, `mt-agent send --resized` sends what \
         is left",
        .path.display()
    )]
    Shrunk {
        /// The source.
        path: PathBuf,
        /// Its size when it was opened.
        from: ByteLen,
        /// Its size now.
        to: ByteLen,
    },
}

impl Error {
    /// Whether what was named cannot be a source, rather than that something failed.
    pub fn is_refusal(&self) -> bool {
        match self {
            Error::NotADisk(_) | Error::Empty(_) => true,
            Error::Hangs(..) | Error::Shrunk { .. } => false,
            Error::Io(error) => {
                matches!(error.source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
            }
        }
    }
}

/// An open source disk or image file.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    /// For reading at any offset.
    file: File,
    /// For reading around the page cache, where the file system can.
    direct: Option<File>,
    /// Whether it may have holes, which need not be read.
    sparse: bool,
    size: u64,
    sector: u32,
}

impl Source {
    /// Opens a block device or an image file for reading.
    pub fn open(path: &Path) -> Result<Source, Error> {
        let name = path.display().to_string();
        let failed = |op| {
            let name = name.clone();
            move |error: io::Error| Error::Io(IoError::new(op, name, error))
        };
        // Before it is opened: the open of a pipe waits for its writer.
        let kind = fs::metadata(path).map_err(failed("open"))?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(Error::NotADisk(path.to_owned()));
        }
        let mut file = File::open(path).map_err(failed("open"))?;
        let size = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        if size == 0 {
            return Err(Error::Empty(path.to_owned()));
        }
        let sector = match kind.is_block_device() {
            true => ioctl::logical_sector(&file).map_err(failed("ask for the sector size of"))?,
            false => 512,
        };
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).ok();
        let sparse = kind.is_file();
        Ok(Source { path: path.to_owned(), file, direct, sparse, size, sector })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size in bytes.
    pub fn size(&self) -> ByteLen {
        ByteLen(self.size)
    }

    /// The logical sector size in bytes; 512 for an image file.
    pub fn sector(&self) -> u32 {
        self.sector
    }

    /// The logical sector size, where it is known: an image file does not say.
    pub(super) fn known_sector(&self) -> Option<u32> {
        (!self.sparse).then_some(self.sector)
    }

    /// Who of this host may be writing to the source, one fact a line: then what is read changes meanwhile. File systems whose
    /// files have one of the device numbers of `frozen` do not.
    pub fn writers(&self, frozen: &[String]) -> Vec<String> {
        roles::writers(&Sysroot::default(), &self.file, frozen)
    }

    /// What changes whenever somebody writes to the source. None where it would not always.
    pub(super) fn mark(&self) -> Option<String> {
        mark::of(&self.file)
    }

    /// Whether it would be seen that somebody writes to the source.
    pub(super) fn is_counted(&self) -> bool {
        mark::without_flush(&self.file).is_some()
    }

    /// The identity of the disk, or of the one that it is a partition of, if it has one. An image has none, and a loop
    /// device, which only shows one, has none either.
    pub(super) fn id(&self) -> Option<DiskId> {
        views::identity(&Sysroot::default(), &self.file)
    }

    /// The device numbers of all that shows the source here.
    pub(super) fn devnos(&self) -> Vec<String> {
        views::of(&Sysroot::default(), &self.file)
    }

    /// The agent of this host that receives into the source, if one does: device and process.
    pub(super) fn receiver(&self) -> Option<String> {
        views::receiver_into(&Sysroot::default(), &self.file)
    }

    /// The whole source.
    pub(super) fn extent(&self) -> Extent {
        let Some(extent) = Extent::new(0, self.size) else {
            unreachable!("an empty source is not opened");
        };
        extent
    }

    /// The hole of an image file that begins at `at`, if one does. Without an answer there is none: holes are read
    /// like anything else then.
    fn hole(&self, at: u64) -> Option<Extent> {
        if !self.sparse {
            return None;
        }
        let end = match lseek(&self.file, i64::try_from(at).ok()?, Whence::SeekData) {
            Ok(data) => u64::try_from(data).ok()?.min(self.size),
            // No data from here on; in a file that was cut off meanwhile that is no hole, and the read says so.
            Err(Errno::ENXIO) if self.file.metadata().is_ok_and(|now| now.len() >= self.size) => self.size,
            Err(_) => return None,
        };
        Extent::new(at, end.checked_sub(at)?)
    }

    /// That it was not cut off while it was read: where a hole was, no read has failed for it.
    fn still_whole(&self) -> Result<(), Error> {
        let measured = (&self.file).seek(SeekFrom::End(0));
        let now =
            measured.map_err(|error| IoError::new("measure", self.path.display().to_string(), error))?;
        match now {
            // A disk that is gone has no size.
            0 => {
                Err(IoError::at("read", self.path.display().to_string(), 0, io::ErrorKind::UnexpectedEof)
                    .into())
            }
            now if now < self.size => {
                Err(Error::Shrunk { path: self.path.clone(), from: self.size(), to: ByteLen(now) })
            }
            _ => Ok(()),
        }
    }

    /// What can be read around the page cache ends here: direct reads come in whole blocks.
    fn direct_end(&self) -> u64 {
        match self.direct {
            Some(_) => self.size - self.size % PAGE as u64,
            None => 0,
        }
    }

    /// Fills a buffer from `at`, a multiple of a page, on: as the queue of [`reader`](Self::reader) does, and at the end, or
    /// where the file system refuses that, through the page cache.
    pub(super) fn read_uncached(&self, at: u64, buffer: &mut Buffer) -> Result<(), IoError> {
        let failed = |at, error| IoError::at("read", self.path.display().to_string(), at, error);
        let end = at + buffer.len() as u64;
        let around = self.direct_end().min(end).saturating_sub(at) as usize;
        let read = match &self.direct {
            Some(direct) if around > 0 => direct.read_exact_at(&mut buffer[..around], at),
            _ => Ok(()),
        };
        let cached = match read {
            Ok(()) => around,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => 0,
            Err(error) => return Err(failed(at, error)),
        };
        let at = at + cached as u64;
        self.file.read_exact_at(&mut buffer[cached..], at).map_err(|error| failed(at, error))
    }

    /// Opens the queue for direct reads. Where the file system takes the flag and then refuses the reads (or
    /// refused the flag), reads go through the page cache.
    fn reader(&self, engine: EngineChoice, arena: &Arena) -> Result<Option<Device>, Error> {
        let Some(direct) = &self.direct else { return Ok(None) };
        let name = self.path.display().to_string();
        let file = direct.try_clone().map_err(|error| IoError::new("duplicate", &*name, error))?;
        if self.direct_end() > 0 {
            let mut probe = arena.alloc_blocking(PAGE);
            match direct.read_at(&mut probe, 0) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
                // Anything else comes again, with its offset, from the read that matters.
                _ => {}
            }
        }
        let geometry = Geometry { size: self.direct_end(), block: PAGE as u32 };
        let (device, chosen) = Device::new(file, name, geometry, engine, DEPTH, arena)?;
        tracing::debug!(source = %self.path.display(), engine = %chosen, "reading");
        Ok(Some(device))
    }
}

/// What the thread is asked for, and told.
pub(super) enum Ask {
    /// A range, whole.
    Send(Extent),
    /// What of the whole source is not what the receiver has.
    Compare(Differing),
    /// These ranges: the rest is the same.
    Ranges(Arc<Hints>),
    /// Digests of what the receiver has, in order: one for each unit.
    Units(Vec<Digest>),
    /// The same of the blocks of the oldest range that was to be refined.
    Blocks(Vec<Digest>),
}

/// What becomes of what differs.
pub(super) enum Differing {
    /// Sent; and so is all that lies behind this offset, whatever the receiver has there.
    Sent { up_to: u64 },
    /// Sent, and told where the hints do not tell it.
    Checked(Arc<Hints>),
    /// Only told.
    Told,
}

/// What the thread hands over.
pub(super) enum Output {
    /// A frame to send.
    Piece(Piece),
    /// Everything before this offset is dealt with.
    Covered(u64),
    /// A range that differs somewhere: the digests of its blocks are wanted.
    Refine(Extent),
    /// A range that differs, and that the user is to be told of.
    Differs(Extent),
    /// Everything of the oldest unfinished ask was handed over.
    Finished,
    /// The source cannot be read; nothing follows.
    Failed(Error),
}

/// What is read, and how.
pub(super) struct Reading {
    pub(super) source: Arc<Source>,
    /// What of it counts as zeros.
    pub(super) free: Arc<Free>,
    pub(super) engine: EngineChoice,
    /// How fast it may be read, where that is limited.
    pub(super) limiter: Option<Arc<Limiter>>,
}

/// Carries out what is asked for, in order, until nobody asks any more or nobody listens.
pub(super) fn read(
    reading: Reading,
    compression: Compression,
    progress: Arc<Progress>,
    asks: Receiver<Ask>,
    output: Sender<Output>,
) {
    let result = Reader::new(reading, compression, progress, output.clone())
        .and_then(|mut reader| reader.run(&mut Asks::new(asks)));
    if let Err(Stop::Failed(error)) = result {
        // The listener may be gone as well.
        output.blocking_send(Output::Failed(error)).ok();
    }
}

/// Why the thread stops before it has read everything.
pub(super) enum Stop {
    NobodyListens,
    Failed(Error),
}

impl<E: Into<Error>> From<E> for Stop {
    fn from(error: E) -> Stop {
        Stop::Failed(error.into())
    }
}

/// Reads a source in order.
pub(super) struct Scan {
    pub(super) source: Arc<Source>,
    pub(super) free: Arc<Free>,
    device: Option<Ahead>,
    arena: Arena,
    progress: Arc<Progress>,
}

pub(super) struct Reader {
    pub(super) scan: Scan,
    /// How much may be read.
    pub(super) limiter: Option<Arc<Limiter>>,
    pub(super) encoder: Encoder,
    pub(super) progress: Arc<Progress>,
    pub(super) output: Sender<Output>,
    pieces: Vec<Piece>,
}

/// A way through a range of the source.
pub(super) struct Walk {
    at: u64,
    /// Up to here it is read around the page cache.
    direct_end: u64,
    end: u64,
    /// Parts begin at its multiples.
    unit: u64,
}

impl Scan {
    fn new(reading: Reading, progress: Arc<Progress>) -> Result<Scan, Error> {
        let Reading { source, free, engine, limiter: _ } = reading;
        let arena = Arena::new(MEMORY).map_err(|error| IoError::new("map", "memory", error))?;
        let device = progress.waits.read(|| source.reader(engine, &arena))?;
        let device = device.map(|device| Ahead::new(Box::new(device), arena.clone()));
        Ok(Scan { source, free, device, arena, progress })
    }

    /// Begins to read a range, in parts that begin at multiples of `unit` where the range does.
    pub(super) fn walk(&mut self, extent: Extent, unit: u64) -> Walk {
        let (start, end) = (extent.offset(), extent.end());
        // A range that is sent again may begin anywhere.
        let direct_end = self.source.direct_end().min(end);
        let direct_end = match &mut self.device {
            Some(device) if start.is_multiple_of(PAGE as u64) && direct_end > start => {
                let direct_end = (direct_end - direct_end % unit).max(start);
                device.seek(start, direct_end);
                direct_end
            }
            _ => start,
        };
        Walk { at: start, direct_end, end, unit }
    }

    /// The next part of it, in order.
    pub(super) fn next(&mut self, walk: &mut Walk) -> Result<Option<(u64, Part)>, Error> {
        let progress = self.progress.clone();
        let read = || match &mut self.device {
            Some(device) if walk.at < walk.direct_end => {
                let gap = |at| gap(&self.source, &self.free, at);
                Ok(device.next(walk.unit, gap)?.map(|(_, part)| part))
            }
            _ => match (walk.end - walk.at).min(CHUNK) {
                0 => Ok(None),
                len => {
                    let mut buffer = self.arena.alloc_blocking(len as usize);
                    let name = || self.source.path.display().to_string();
                    self.source
                        .file
                        .read_exact_at(&mut buffer, walk.at)
                        .map_err(|error| IoError::at("read", name(), walk.at, error))?;
                    Ok(Some(Part::Bytes(buffer)))
                }
            },
        };
        let part: Result<_, Error> = progress.waits.read(read);
        // What was cut off reads as an error of some kind or other.
        let part = part.map_err(|error| match progress.waits.read(|| self.source.still_whole()) {
            Err(shrunk @ Error::Shrunk { .. }) => shrunk,
            _ => error,
        });
        let Some(mut part) = part? else { return Ok(None) };
        let (at, len) = (walk.at, part.len());
        if let Part::Bytes(buffer) = &mut part {
            self.free.clear(at, buffer);
        }
        walk.at += len;
        if let Part::Bytes(_) = part {
            self.progress.read.fetch_add(len, Ordering::Relaxed);
        }
        Ok(Some((at, part)))
    }
}

/// What begins at `at` and need not be read, or what does soon behind it.
fn gap(source: &Source, free: &Free, at: u64) -> Option<Extent> {
    let mut end = at;
    while let Some(further) =
        free.end_from(end).or_else(|| source.hole(end).map(Extent::end)).filter(|further| *further > end)
    {
        end = further;
    }
    Extent::new(at, end - at).or_else(|| free.next(at))
}

impl Reader {
    fn new(
        reading: Reading,
        compression: Compression,
        progress: Arc<Progress>,
        output: Sender<Output>,
    ) -> Result<Reader, Stop> {
        let limiter = reading.limiter.clone();
        let scan = Scan::new(reading, progress.clone())?;
        Ok(Reader { scan, limiter, encoder: Encoder::new(compression), progress, output, pieces: Vec::new() })
    }

    fn run(&mut self, asks: &mut Asks) -> Result<(), Stop> {
        while let Some(ask) = asks.next() {
            match ask {
                Ask::Send(extent) => self.send(extent)?,
                Ask::Compare(differing) => self.compare(asks, &differing)?,
                Ask::Ranges(hints) => self.ranges(&hints)?,
                // The connection lets none through that nobody waits for.
                Ask::Units(_) | Ask::Blocks(_) => continue,
            }
            self.progress.waits.read(|| self.scan.source.still_whole())?;
            let rest = self.encoder.flush();
            self.hand_over(rest)?;
            self.output.blocking_send(Output::Finished).map_err(|_| Stop::NobodyListens)?;
        }
        Ok(())
    }

    fn send(&mut self, extent: Extent) -> Result<(), Stop> {
        let mut walk = self.scan.walk(extent, PAGE as u64);
        while let Some((at, part)) = self.scan.next(&mut walk)? {
            match part {
                Part::Hole(hole) => self.pass_on(|encoder, pieces| encoder.hole(hole, pieces))?,
                Part::Bytes(buffer) => {
                    let (len, buffer) = (buffer.len(), Arc::new(buffer));
                    self.pass_on(|encoder, pieces| encoder.chunk(at, &buffer, 0..len, pieces))?;
                }
            }
        }
        Ok(())
    }

    /// Sends what the hints tell. What is told to be dealt with was handed over.
    fn ranges(&mut self, hints: &Hints) -> Result<(), Stop> {
        for extent in hints.ranges() {
            self.send(extent)?;
            self.covered(extent.end())?;
        }
        self.covered(self.scan.source.size)
    }

    /// Everything before this is dealt with.
    pub(super) fn covered(&mut self, end: u64) -> Result<(), Stop> {
        let rest = self.encoder.flush();
        self.hand_over(rest)?;
        self.output.blocking_send(Output::Covered(end)).map_err(|_| Stop::NobodyListens)
    }

    pub(super) fn pass_on(&mut self, encode: impl FnOnce(&mut Encoder, &mut Vec<Piece>)) -> Result<(), Stop> {
        let mut pieces = std::mem::take(&mut self.pieces);
        encode(&mut self.encoder, &mut pieces);
        let result = self.hand_over(pieces.drain(..));
        self.pieces = pieces;
        result
    }

    pub(super) fn hand_over(&self, pieces: impl IntoIterator<Item = Piece>) -> Result<(), Stop> {
        pieces.into_iter().try_for_each(|piece| {
            self.output.blocking_send(Output::Piece(piece)).map_err(|_| Stop::NobodyListens)
        })
    }
}

/// The BLAKE3 digest of all bytes of a source. `progress` counts what was read, and what is done with.
pub fn digest(source: Source, engine: EngineChoice, progress: Arc<Progress>) -> Result<Digest, Error> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut hasher = blake3::Hasher::new();
    let reading = Reading { source: Arc::new(source), free: Arc::default(), engine, limiter: None };
    let mut scan = Scan::new(reading, progress.clone())?;
    let mut walk = scan.walk(scan.source.extent(), PAGE as u64);
    while let Some((_, part)) = scan.next(&mut walk)? {
        progress.done.fetch_add(part.len(), Ordering::Relaxed);
        match part {
            Part::Bytes(buffer) => {
                hasher.update(&buffer);
            }
            Part::Hole(hole) => {
                let mut left = hole.len();
                while left > 0 {
                    let zeros = &ZEROS[..left.min(ZEROS.len() as u64) as usize];
                    hasher.update(zeros);
                    left -= zeros.len() as u64;
                }
            }
        }
    }
    scan.source.still_whole()?;
    Ok(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found_and_a_file_that_was_cut_off_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = File::create(&path).unwrap();
        file.write_all_at(&[1; PAGE], 4 << 20).unwrap();
        file.set_len((9 << 20) + 100).unwrap();
        let source = Source::open(&path).unwrap();
        let extent = |from: u64, to: u64| Extent::new(from, to - from);
        let (data, behind, end) = (4 << 20, (4 << 20) + PAGE as u64, (9 << 20) + 100);
        assert_eq!(source.hole(0), extent(0, data));
        assert_eq!(source.hole(1000), extent(1000, data));
        assert_eq!(source.hole(data), None);
        assert_eq!(source.hole(behind), extent(behind, end));
        assert!(source.still_whole().is_ok());
        file.set_len(6 << 20).unwrap();
        assert_eq!(source.hole(behind), None);
        assert_eq!(source.hole(7 << 20), None);
    }

    #[test]
    fn a_hole_is_not_read_and_counts_as_nothing_that_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        File::create(&path).unwrap().set_len(16 << 20).unwrap();
        let source = Arc::new(Source::open(&path).unwrap());
        let all = source.extent();
        let reading = Reading { source, free: Arc::default(), engine: EngineChoice::Threads, limiter: None };
        let progress = Arc::new(Progress::default());
        let mut scan = Scan::new(reading, progress.clone()).unwrap();
        let mut walk = scan.walk(all, PAGE as u64);
        assert!(matches!(scan.next(&mut walk), Ok(Some((0, Part::Hole(hole)))) if hole == all));
        assert_eq!(progress.read.load(Ordering::Relaxed), 0);
    }

    /// Cut off in a hole that was passed over, when no read can fail any more.
    #[test]
    fn a_source_that_shrinks_is_not_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = File::create(&path).unwrap();
        file.write_all_at(&[1; PAGE], 0).unwrap();
        file.set_len(256 << 20).unwrap();
        let source = Arc::new(Source::open(&path).unwrap());
        let (extents, wanted) = std::sync::mpsc::channel();
        let (output, mut pieces) = tokio::sync::mpsc::channel(1);
        extents.send(Ask::Send(source.extent())).unwrap();
        drop(extents);
        let reading = std::thread::spawn(move || {
            let engine = EngineChoice::Threads;
            let reading = Reading { source, free: Arc::default(), engine, limiter: None };
            read(reading, Compression::Off, Arc::default(), wanted, output);
        });
        // The page of data, and the first zeros: by then the one hole of the file is known as a whole.
        assert!(matches!(pieces.blocking_recv(), Some(Output::Piece(_))));
        assert!(matches!(pieces.blocking_recv(), Some(Output::Piece(_))));
        file.set_len(128 << 20).unwrap();
        let last = std::iter::from_fn(|| pieces.blocking_recv()).last();
        let Some(Output::Failed(Error::Shrunk { from, to, .. })) = last else {
            panic!("it went on to the end")
        };
        assert_eq!((from.0, to.0), (256 << 20, 128 << 20));
        reading.join().unwrap();
    }

    #[test]
    fn a_pipe_is_no_source_and_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(Source::open(&path), Err(Error::NotADisk(_))));
    }
}
