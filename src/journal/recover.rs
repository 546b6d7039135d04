//! Reads a shelf of segments back into what can be used: which passes there are, and where their images lie.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use super::format::{self, BLOCK, BLOCK_LEN, Body, MAX_IMAGE};
use super::writer::{gone_name, parse_gone, parse_name, segment_name};
use crate::checksum::crc32c;
use crate::error::IoError;
use crate::storage::{Action, Completion, Place, ReadAt, Request, Shelf, Storage};
use crate::sys::aligned::Arena;
use crate::units::Extent;

/// Why a journal cannot be read or applied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A segment does not hold what was written to it.
    #[error("the journal of pass {pass} is damaged")]
    Corrupt {
        /// The pass.
        pass: u64,
        /// Where.
        #[source]
        damage: Damage,
    },
    /// A segment of another version.
    #[error("segment {segment} is of version {version}: update mt-agent")]
    Unsupported {
        /// The file.
        segment: String,
        /// Its version.
        version: u32,
    },
}

/// Something in a segment that is not as it was written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{segment} at byte {at}: {what}")]
pub struct Damage {
    /// The file.
    pub segment: String,
    /// The byte in it.
    pub at: u64,
    /// What is wrong there.
    pub what: &'static str,
}

/// The passes of a volume whose images are on the shelf.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// By their numbers.
    pub passes: BTreeMap<u64, Pass>,
    /// The names of all segments.
    names: Vec<String>,
}

/// One pass.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Its number.
    pub number: u64,
    /// Its segments, by their index.
    pub segments: Vec<String>,
    /// Its images, in the order in which they were taken; they do not overlap.
    pub images: Vec<Image>,
    /// Whether it has all of its images: its end record is there.
    pub ended: bool,
    /// How many bytes its records take.
    pub bytes: u64,
    /// Where it is damaged; then some of its images are missing, and nothing may be read through it.
    pub damage: Option<Damage>,
    pub(super) next_sequence: u64,
    pub(super) next_index: u32,
}

/// Where an image lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Image {
    pub(super) offset: u64,
    /// Where in its segment; 0 for one that is all zeros.
    pub(super) at: u64,
    pub(super) len: u32,
    pub(super) crc: u32,
    /// The index of its segment in the pass.
    pub(super) segment: u32,
}

impl Image {
    /// Where on the disk it belongs.
    pub fn extent(&self) -> Extent {
        match Extent::new(self.offset, u64::from(self.len)) {
            Some(extent) => extent,
            None => unreachable!("it was an extent when it was parsed"),
        }
    }

    /// Whether it is all zeros, and so nowhere stored.
    pub fn is_zero(&self) -> bool {
        self.at == 0
    }
}

/// How often, and how long after, a pass that seems damaged is read again.
const AGAIN: u32 = 3;
const PAUSE: Duration = Duration::from_millis(5);

/// Reads the headers of all segments. What is damaged is said pass by pass; an error is only what concerns all.
pub fn recover(shelf: &dyn Shelf) -> Result<History, Error> {
    let mut names: Vec<(u64, u32, String)> = Vec::new();
    let mut gone = BTreeSet::new();
    for name in shelf.list()? {
        // Anything else was not made by this program.
        if let Some((pass, index)) = parse_name(&name) {
            names.push((pass, index, name));
        } else {
            gone.extend(parse_gone(&name));
        }
    }
    names.retain(|(pass, ..)| !gone.contains(pass));
    names.sort();
    let segments = names.iter().map(|(.., name)| name.clone()).collect();
    let mut history = History { passes: BTreeMap::new(), names: segments };
    for group in names.chunk_by(|a, b| a.0 == b.0) {
        let segments: Vec<(u32, String)> =
            group.iter().map(|(_, index, name)| (*index, name.clone())).collect();
        let mut pass = read_pass(shelf, group[0].0, segments.clone())?;
        // Whoever reads beside the writer may find a record half written, and the next one behind it a moment later: that
        // is no damage. Damage stays.
        for _ in 0..AGAIN {
            if pass.damage.is_none() || pass.ended {
                break;
            }
            std::thread::sleep(PAUSE);
            pass = read_pass(shelf, group[0].0, segments.clone())?;
        }
        history.passes.insert(pass.number, pass);
    }
    Ok(history)
}

/// Lets go of a pass: nothing will be read through it any more.
///
/// Its first segment gets another name, durably; then the others are removed; then the first. A crash in between leaves
/// the new name there, and the rest of the pass counts for nothing; [`tidy`] removes it.
pub fn discard(pass: &Pass, shelf: &dyn Shelf) -> Result<(), IoError> {
    let Some((first, others)) = pass.segments.split_first() else { return Ok(()) };
    let gone = gone_name(pass.number);
    match shelf.rename(first, &gone) {
        // Somebody else lets go of it, too.
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    shelf.remove(others)?;
    shelf.remove(&[gone])
}

/// Removes what a crash left of passes that were let go of. For the writer, before it writes.
pub fn tidy(shelf: &dyn Shelf) -> Result<(), IoError> {
    let names = shelf.list()?;
    for (gone, pass) in names.iter().filter_map(|name| Some((name, parse_gone(name)?))) {
        let is_of = |name: &&String| parse_name(name).is_some_and(|(number, _)| number == pass);
        let rest: Vec<String> = names.iter().filter(is_of).cloned().collect();
        shelf.remove(&rest)?;
        shelf.remove(std::slice::from_ref(gone))?;
    }
    Ok(())
}

impl History {
    /// Whether nothing was appended, created or removed on the shelf since it was read.
    pub fn is_current(&self, shelf: &dyn Shelf) -> Result<bool, Error> {
        let mut names = shelf.list()?;
        names.retain(|name| parse_name(name).is_some());
        names.sort();
        if names != self.names {
            return Ok(false);
        }
        // Only a pass that has not ended grows, and then in ways that its files' names do not show.
        Ok(self.passes.values().next_back().is_none_or(|newest| newest.ended))
    }

    /// The images of all passes after `pass`, in the order of their numbers, or which of them is damaged.
    pub fn after(&self, pass: u64) -> Result<Vec<&Pass>, Error> {
        let later = self.passes.range(pass.saturating_add(1)..).map(|(_, later)| later);
        later
            .map(|later| match &later.damage {
                None => Ok(later),
                Some(damage) => Err(Error::Corrupt { pass: later.number, damage: damage.clone() }),
            })
            .collect()
    }

    /// All passes up to this one.
    pub fn up_to(&self, pass: u64) -> impl Iterator<Item = &Pass> {
        self.passes.range(..=pass).map(|(_, pass)| pass)
    }
}

fn read_pass(shelf: &dyn Shelf, number: u64, segments: Vec<(u32, String)>) -> Result<Pass, Error> {
    let mut pass = Pass {
        number,
        segments: segments.iter().map(|(_, name)| name.clone()).collect(),
        images: Vec::new(),
        ended: false,
        bytes: 0,
        damage: None,
        next_sequence: 0,
        next_index: segments.last().map_or(0, |(index, _)| index.saturating_add(1)),
    };
    // How much the last record brought: it is void where the next segment begins with its number.
    let mut last = Last::default();
    let mut newest = None;
    for (place, (index, name)) in segments.into_iter().enumerate() {
        let damage = |at, what| Some(Damage { segment: name.clone(), at, what });
        if index as usize != place {
            pass.damage = damage(0, "the segment before it is missing");
            return Ok(pass);
        }
        let reader = shelf.open(&name)?;
        let mut block = [0; BLOCK_LEN];
        if reader.size() < BLOCK {
            // A crash came between its creation and the reservation of its space.
            continue;
        }
        reader.read_at(0, &mut block)?;
        let segment = match format::parse_segment(&block) {
            Ok(segment) => segment,
            Err(format::Error::Version(version)) => {
                return Err(Error::Unsupported { segment: name, version });
            }
            // Created, and never written to before the power went: no record can be in it.
            Err(_) => {
                if sound_record(&*reader, BLOCK, |_| true)?.is_some() {
                    pass.damage = damage(0, "the segment's header is damaged");
                    return Ok(pass);
                }
                continue;
            }
        };
        if (segment.pass, segment.index) != (number, index) {
            pass.damage = damage(0, "it is a segment of another place");
            return Ok(pass);
        }
        // It ended, its point was not recorded, and it went on.
        pass.ended = false;
        if segment.sequence.checked_add(1) == Some(pass.next_sequence) && last.records == 1 {
            // It was torn when the pass went on.
            pass.images.truncate(pass.images.len() - last.images);
            pass.bytes -= last.bytes;
            pass.next_sequence -= 1;
        }
        if segment.sequence != pass.next_sequence {
            pass.damage = damage(0, "records before it are missing");
            return Ok(pass);
        }
        last = Last::default();
        let mut at = BLOCK;
        while at.saturating_add(BLOCK) <= reader.size() && !pass.ended {
            reader.read_at(at, &mut block)?;
            let record = match format::parse_record(&block) {
                Ok(record)
                    if (record.generation, record.sequence) == (segment.generation, pass.next_sequence)
                        && at.saturating_add(record.len()) <= reader.size() =>
                {
                    record
                }
                _ => break,
            };
            last = Last { records: 1, images: 0, bytes: record.len() };
            match &record.body {
                Body::End => pass.ended = true,
                Body::Images { entries, .. } => {
                    let mut stored = at + BLOCK;
                    for entry in entries {
                        pass.images.push(Image {
                            offset: entry.extent.offset(),
                            at: if entry.zero { 0 } else { stored },
                            len: u32::try_from(entry.extent.len()).unwrap_or(0),
                            crc: entry.crc,
                            segment: u32::try_from(place).unwrap_or(u32::MAX),
                        });
                        stored += entry.stored();
                    }
                    last.images = entries.len();
                }
            }
            pass.next_sequence += 1;
            pass.bytes += record.len();
            at += record.len();
        }
        newest = Some((name, reader, segment.generation, at));
    }
    let Some((segment, reader, generation, at)) = newest else { return Ok(pass) };
    if pass.ended {
        return Ok(pass);
    }
    // Only the newest record can be torn, and nothing can stand behind the end.
    let sound = pass.images.len() - last.images;
    if pass.images[sound..].iter().any(|image| read_image(&*reader, image).is_err()) {
        pass.images.truncate(sound);
        pass.bytes -= last.bytes;
        pass.next_sequence -= 1;
    }
    let is_later =
        |record: &format::Record| record.generation == generation && record.sequence >= pass.next_sequence;
    // The newest record itself, where it was torn, lies before `at`.
    if let Some(at) = sound_record(&*reader, at, is_later)? {
        let what = "a record stands behind one that is damaged";
        pass.damage = Some(Damage { segment, at, what });
    }
    Ok(pass)
}

#[derive(Default)]
struct Last {
    records: u32,
    images: usize,
    bytes: u64,
}

/// Where a sound record header stands from `at` on, if one does.
fn sound_record(
    reader: &dyn ReadAt,
    mut at: u64,
    is: impl Fn(&format::Record) -> bool,
) -> Result<Option<u64>, IoError> {
    const STEP: u64 = 1 << 20;
    let mut chunk = vec![0; STEP as usize];
    let end = reader.size() - reader.size() % BLOCK;
    while at < end {
        let len = (end - at).min(STEP) as usize;
        reader.read_at(at, &mut chunk[..len])?;
        for (index, block) in chunk[..len].as_chunks::<BLOCK_LEN>().0.iter().enumerate() {
            if format::parse_record(block).is_ok_and(|record| is(&record)) {
                return Ok(Some(at + index as u64 * BLOCK));
            }
        }
        at += len as u64;
    }
    Ok(None)
}

/// The bytes of an image whose checksum holds.
fn read_image(reader: &dyn ReadAt, image: &Image) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![0; image.len as usize];
    if !image.is_zero() {
        reader.read_at(image.at, &mut bytes)?;
        if crc32c(&bytes) != image.crc {
            return Err(ImageError::Checksum);
        }
    }
    Ok(bytes)
}

#[derive(Debug)]
enum ImageError {
    Io(IoError),
    Checksum,
}

impl From<IoError> for ImageError {
    fn from(error: IoError) -> ImageError {
        ImageError::Io(error)
    }
}

/// Reads images, and verifies each. Keeps the segment open that was read last.
pub struct Images<'a> {
    shelf: &'a dyn Shelf,
    open: Option<(String, Box<dyn ReadAt + Send + Sync>)>,
}

impl<'a> Images<'a> {
    /// Of the segments on this shelf.
    pub fn of(shelf: &'a dyn Shelf) -> Images<'a> {
        Images { shelf, open: None }
    }

    /// The bytes of an image of this pass.
    pub fn read(&mut self, pass: u64, image: &Image) -> Result<Vec<u8>, Error> {
        if image.is_zero() {
            return Ok(vec![0; image.len as usize]);
        }
        let (name, reader) = self.segment(pass, image)?;
        read_image(reader, image).map_err(|error| match error {
            ImageError::Io(error) => Error::Io(error),
            ImageError::Checksum => {
                let what = "the checksum of a before-image does not hold";
                let damage = Damage { segment: name.clone(), at: image.at, what };
                Error::Corrupt { pass, damage }
            }
        })
    }

    fn segment(&mut self, pass: u64, image: &Image) -> Result<(&String, &dyn ReadAt), IoError> {
        let name = segment_name(pass, image.segment);
        if self.open.as_ref().is_none_or(|(open, _)| *open != name) {
            let reader = self.shelf.open(&name)?;
            self.open = Some((name, reader));
        }
        match &self.open {
            Some((name, reader)) => Ok((name, &**reader)),
            None => unreachable!("it was just opened"),
        }
    }
}

/// Brings a disk back to what it was before this pass, and makes that durable. The segments are still there afterwards;
/// until they are let go of ([`discard`]), a crash at any moment is mended by doing the same again.
///
/// # Errors
/// [`Error::Corrupt`]: where the pass is known to be damaged, before anything is written.
pub fn roll_back(pass: &Pass, shelf: &dyn Shelf, storage: &mut dyn Storage) -> Result<(), Error> {
    if let Some(damage) = &pass.damage {
        return Err(Error::Corrupt { pass: pass.number, damage: damage.clone() });
    }
    let depth = storage.depth().min(16);
    let arena =
        Arena::new(depth * MAX_IMAGE as usize).map_err(|error| IoError::new("map", "memory", error))?;
    let mut images = Images::of(shelf);
    let mut done: Vec<Completion> = Vec::new();
    let mut in_flight = 0;
    for (tag, image) in pass.images.iter().enumerate() {
        let bytes = images.read(pass.number, image)?;
        let mut buffer = loop {
            match arena.try_alloc(bytes.len()) {
                Some(buffer) if in_flight < depth => break buffer,
                _ => in_flight -= reap(storage, &mut done)?,
            }
        };
        buffer.copy_from_slice(&bytes);
        let action = Action::Write { offset: image.offset, buffer };
        storage.submit(Request { tag: tag as u64, place: Place::Disk, action });
        in_flight += 1;
    }
    while in_flight > 0 {
        in_flight -= reap(storage, &mut done)?;
    }
    storage.submit(Request { tag: 0, place: Place::Disk, action: Action::Flush });
    while reap(storage, &mut done)? == 0 {}
    Ok(())
}

/// Waits for completions, all of which must be successes, and counts them.
fn reap(storage: &mut dyn Storage, done: &mut Vec<Completion>) -> Result<usize, IoError> {
    storage.wait(done)?;
    let count = done.len();
    done.drain(..).try_for_each(|completion| completion.result)?;
    Ok(count)
}

/// Reads all records of a pass, and says whether they are as they were written: every image, and what fills it up to a whole
/// block. What lies behind the last record is not looked at.
pub fn verify(pass: &Pass, shelf: &dyn Shelf) -> Result<(), Error> {
    let corrupt = |damage| Error::Corrupt { pass: pass.number, damage };
    if let Some(damage) = &pass.damage {
        return Err(corrupt(damage.clone()));
    }
    let mut images = Images::of(shelf);
    for image in &pass.images {
        images.read(pass.number, image)?;
        let filled = u64::from(image.len).next_multiple_of(BLOCK);
        let padding = (filled - u64::from(image.len)) as usize;
        if !image.is_zero() && padding > 0 {
            let (segment, reader) = images.segment(pass.number, image)?;
            let mut bytes = vec![0; padding];
            let at = image.at + u64::from(image.len);
            reader.read_at(at, &mut bytes)?;
            if bytes.iter().any(|byte| *byte != 0) {
                let what = "what fills up a before-image is not zero";
                return Err(corrupt(Damage { segment: segment.clone(), at, what }));
            }
        }
    }
    Ok(())
}
