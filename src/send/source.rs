//! A source disk, and the thread that reads ahead of the connection.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use tokio::sync::mpsc::Sender;

use super::encode::{Encoder, Piece};
use super::{Compression, Progress};
use crate::disk::discover::{Sysroot, roles, views};
use crate::error::IoError;
use crate::storage::device::{Device, EngineChoice};
use crate::storage::{Action, Completion, Geometry, Place, Request, Storage};
use crate::sys::aligned::{Arena, Buffer, PAGE};
use crate::sys::ioctl;
use crate::units::{ByteLen, Extent};

/// How much is read by one request.
const CHUNK: usize = 1 << 20;

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
}

impl Error {
    /// Whether what was named cannot be a source, rather than that something failed.
    pub fn is_refusal(&self) -> bool {
        match self {
            Error::NotADisk(_) | Error::Empty(_) => true,
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

    /// What of this host's is mounted on the source, one fact a line: while it is, what is read changes. An image is
    /// mounted through a loop device.
    pub fn mounts(&self, sysroot: &Sysroot) -> Vec<String> {
        views::of(sysroot, &self.file).iter().flat_map(|devno| roles::mounted(sysroot, devno)).collect()
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

    /// That an image file was not cut off while it was read: where a hole was, no read has failed for it.
    fn still_whole(&self) -> Result<(), Error> {
        let name = || self.path.display().to_string();
        let len = self.file.metadata().map_err(|error| IoError::new("look at", name(), error))?.len();
        if self.sparse && len < self.size {
            return Err(IoError::at("read", name(), len, io::ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }

    /// What can be read around the page cache ends here: direct reads come in whole blocks.
    fn direct_end(&self) -> u64 {
        match self.direct {
            Some(_) => self.size - self.size % PAGE as u64,
            None => 0,
        }
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

/// What the thread hands over.
pub(super) enum Output {
    /// A frame to send.
    Piece(Piece),
    /// Everything of the oldest unfinished extent was handed over.
    Finished,
    /// The source cannot be read; nothing follows.
    Failed(Error),
}

/// Reads the extents that are asked for, in order, until nobody asks any more or nobody listens.
pub(super) fn read(
    source: Arc<Source>,
    engine: EngineChoice,
    compression: Compression,
    progress: Arc<Progress>,
    extents: Receiver<Extent>,
    output: Sender<Output>,
) {
    let result = Reader::new(source, engine, compression, progress, output.clone())
        .and_then(|mut reader| extents.iter().try_for_each(|extent| reader.extent(extent)));
    if let Err(Stop::Failed(error)) = result {
        // The listener may be gone as well.
        output.blocking_send(Output::Failed(error)).ok();
    }
}

/// Why the thread stops before it has read everything.
enum Stop {
    NobodyListens,
    Failed(Error),
}

impl<E: Into<Error>> From<E> for Stop {
    fn from(error: E) -> Stop {
        Stop::Failed(error.into())
    }
}

/// A part of the source that is read ahead.
enum Ahead {
    Reading,
    Read(Buffer),
    Hole(Extent),
}

struct Reader {
    source: Arc<Source>,
    device: Option<Device>,
    arena: Arena,
    encoder: Encoder,
    progress: Arc<Progress>,
    output: Sender<Output>,
    pieces: Vec<Piece>,
    completions: Vec<Completion>,
}

impl Reader {
    fn new(
        source: Arc<Source>,
        engine: EngineChoice,
        compression: Compression,
        progress: Arc<Progress>,
        output: Sender<Output>,
    ) -> Result<Reader, Stop> {
        let arena = Arena::new(MEMORY).map_err(|error| IoError::new("map", "memory", error))?;
        let device = source.reader(engine, &arena)?;
        let encoder = Encoder::new(compression);
        let (pieces, completions) = (Vec::new(), Vec::new());
        Ok(Reader { source, device, arena, encoder, progress, output, pieces, completions })
    }

    fn extent(&mut self, extent: Extent) -> Result<(), Stop> {
        let mut at = extent.offset();
        // A range that is sent again may begin anywhere.
        let direct_end = self.source.direct_end().min(extent.end() - extent.end() % PAGE as u64);
        if self.device.is_some() && at.is_multiple_of(PAGE as u64) && at < direct_end {
            self.read_ahead(at, direct_end)?;
            at = direct_end;
        }
        while at < extent.end() {
            let len = (extent.end() - at).min(CHUNK as u64) as usize;
            let mut buffer = self.arena.alloc_blocking(len);
            self.source
                .file
                .read_exact_at(&mut buffer, at)
                .map_err(|error| IoError::at("read", self.source.path.display().to_string(), at, error))?;
            self.emit(at, buffer)?;
            at += len as u64;
        }
        self.source.still_whole()?;
        let rest = self.encoder.flush();
        self.hand_over(rest)?;
        self.output.blocking_send(Output::Finished).map_err(|_| Stop::NobodyListens)
    }

    /// Keeps `DEPTH` reads under way and emits them in the order of their offsets, and holes without reading them.
    fn read_ahead(&mut self, start: u64, end: u64) -> Result<(), Stop> {
        let mut next = start;
        // The oldest first; the tag of each is its offset.
        let mut window: VecDeque<(u64, Ahead)> = VecDeque::new();
        loop {
            while next < end && window.len() < DEPTH {
                if let Some(hole) = self.source.hole(next) {
                    let stop = hole.end().min(end);
                    // Whole blocks of it: what is left of its last block is read with the data that follows.
                    let stop = stop - stop % PAGE as u64;
                    if let Some(hole) = stop.checked_sub(next).and_then(|len| Extent::new(next, len)) {
                        window.push_back((next, Ahead::Hole(hole)));
                        next = stop;
                        continue;
                    }
                }
                let len = (end - next).min(CHUNK as u64) as usize;
                // Waits for memory only where nothing is under way that would have to be looked after.
                let buffer = match window.is_empty() {
                    true => self.arena.alloc_blocking(len),
                    false => match self.arena.try_alloc(len) {
                        Some(buffer) => buffer,
                        None => break,
                    },
                };
                let Some(device) = &mut self.device else { return Ok(()) };
                device.submit(Request {
                    tag: next,
                    place: Place::Disk,
                    action: Action::Read { offset: next, buffer },
                });
                window.push_back((next, Ahead::Reading));
                next += len as u64;
            }
            match window.pop_front() {
                None => return Ok(()),
                Some((at, Ahead::Read(buffer))) => self.emit(at, buffer)?,
                Some((_, Ahead::Hole(hole))) => {
                    self.progress.read.fetch_add(hole.len(), Ordering::Relaxed);
                    self.pass_on(|encoder, pieces| encoder.hole(hole, pieces))?;
                }
                Some((at, Ahead::Reading)) => {
                    window.push_front((at, Ahead::Reading));
                    let Some(device) = &mut self.device else { return Ok(()) };
                    device.wait(&mut self.completions)?;
                    for Completion { tag, buffer, result } in self.completions.drain(..) {
                        result?;
                        let slot = window.iter_mut().find(|(at, _)| *at == tag);
                        if let (Some((_, slot)), Some(buffer)) = (slot, buffer) {
                            *slot = Ahead::Read(buffer);
                        }
                    }
                }
            }
        }
    }

    fn emit(&mut self, at: u64, buffer: Buffer) -> Result<(), Stop> {
        self.progress.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.pass_on(|encoder, pieces| encoder.chunk(at, buffer, pieces))
    }

    fn pass_on(&mut self, encode: impl FnOnce(&mut Encoder, &mut Vec<Piece>)) -> Result<(), Stop> {
        let mut pieces = std::mem::take(&mut self.pieces);
        encode(&mut self.encoder, &mut pieces);
        let result = self.hand_over(pieces.drain(..));
        self.pieces = pieces;
        result
    }

    fn hand_over(&self, pieces: impl IntoIterator<Item = Piece>) -> Result<(), Stop> {
        pieces.into_iter().try_for_each(|piece| {
            self.output.blocking_send(Output::Piece(piece)).map_err(|_| Stop::NobodyListens)
        })
    }
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
        extents.send(source.extent()).unwrap();
        drop(extents);
        let reading = std::thread::spawn(move || {
            read(source, EngineChoice::Threads, Compression::Off, Arc::default(), wanted, output);
        });
        // The page of data, and the first zeros: by then the one hole of the file is known as a whole.
        assert!(matches!(pieces.blocking_recv(), Some(Output::Piece(_))));
        assert!(matches!(pieces.blocking_recv(), Some(Output::Piece(_))));
        file.set_len(128 << 20).unwrap();
        let last = std::iter::from_fn(|| pieces.blocking_recv()).last();
        let Some(Output::Failed(Error::Io(error))) = last else { panic!("it went on to the end") };
        assert_eq!(error.source.kind(), io::ErrorKind::UnexpectedEof);
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
