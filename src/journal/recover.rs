//! Reads a shelf of segments back into what can be used: which passes there are, and where their images lie.

mod refresh;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use super::format::{self, BLOCK, BLOCK_LEN, Body, Record};
use super::parallel;
use super::writer::{Writer, gone_name, parse_gone, parse_name, segment_name};
use crate::checksum::crc32c;
use crate::error::IoError;
use crate::pass::Lineage;
use crate::storage::{ReadAt, Shelf};
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
    /// A segment of another volume.
    #[error(
        "segment {segment} belongs to the journal of another disk: files below `journals` were exchanged or copied; put \
         each of them back where it was"
    )]
    Foreign {
        /// The file.
        segment: String,
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
    pub segments: Vec<Segment>,
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

/// One file of a pass.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Its name.
    pub name: String,
    /// Where its last record ends; 0 where it has no header.
    pub end: u64,
    /// Whether there is more in it than that, which a power cut may leave of the last record that was begun.
    pub torn: bool,
    /// What tells it from another one under its name; 0 where it has no header.
    generation: u64,
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

    /// Whether these bytes are what it holds, as far as checksums tell.
    pub(super) fn is_of(&self, bytes: &[u8]) -> bool {
        if self.is_zero() { bytes.iter().all(|byte| *byte == 0) } else { crc32c(bytes) == self.crc }
    }
}

/// How often, and how long after, it is read again what somebody else may have been writing.
const AGAIN: u32 = 3;
const PAUSE: Duration = Duration::from_millis(5);

/// Whether a segment with this lineage belongs where it is.
pub type Ours<'a> = &'a (dyn Fn(Lineage) -> bool + Sync);

/// What the disk holds now; asked only where a power cut may have torn the newest record.
pub type Holds<'a> = &'a (dyn Fn(Extent) -> Result<Vec<u8>, IoError> + Sync);

/// Reads the headers of all segments. What is damaged is said pass by pass; an error is only what concerns all.
///
/// The newest record of a pass that did not end may be one that a power cut tore, and then nothing of its blocks was
/// overwritten; or it was whole, its blocks were overwritten, and it was damaged since. Nothing in the journal tells the two
/// apart, but the disk does: where it holds exactly what the record says that it saved, the record may be forgotten, and
/// otherwise it is damage. What the record is about is told by its header or the copy of it behind its payload.
pub fn recover(shelf: &dyn Shelf, ours: Ours<'_>, holds: Holds<'_>) -> Result<History, Error> {
    recover_but(shelf, &BTreeMap::new(), ours, holds)
}

/// Whether it was there a moment ago: meanwhile, older passes may be let go of, and what was torn be cut off.
fn went_away(error: &Error) -> bool {
    let kind = |error: &IoError| error.source.kind();
    matches!(error, Error::Io(error) if matches!(kind(error), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof))
}

/// The same without the passes that are known.
fn recover_but(
    shelf: &dyn Shelf,
    known: &BTreeMap<u64, Pass>,
    ours: Ours<'_>,
    holds: Holds<'_>,
) -> Result<History, Error> {
    for _ in 0..AGAIN {
        match read_all(shelf, known, ours, holds) {
            Err(error) if went_away(&error) => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
    read_all(shelf, known, ours, holds)
}

fn read_all(
    shelf: &dyn Shelf,
    known: &BTreeMap<u64, Pass>,
    ours: Ours<'_>,
    holds: Holds<'_>,
) -> Result<History, Error> {
    let names = names(shelf)?;
    let segments: Vec<String> = names.values().flatten().map(|(_, name)| name.clone()).collect();
    let names: Vec<_> = names.into_iter().filter(|(pass, _)| !known.contains_key(pass)).collect();
    let many = names.iter().map(|(_, segments)| segments.len()).sum::<usize>() > ALONE;
    let passes = parallel::each(&names, many, |_, (number, segments)| {
        let mut pass = read_pass(shelf, *number, segments, ours, holds)?;
        // Whoever reads beside the writer may find a record half written, and the next one behind it a moment later: that
        // is no damage. Damage stays.
        for _ in 0..AGAIN {
            if pass.damage.is_none() || pass.ended {
                break;
            }
            std::thread::sleep(PAUSE);
            pass = read_pass(shelf, *number, segments, ours, holds)?;
        }
        Ok((*number, pass))
    });
    let passes = passes.into_iter().collect::<Result<_, Error>>()?;
    Ok(History { passes, names: segments })
}

/// So many segments are read by one thread.
const ALONE: usize = 64;

/// The index and name of each segment, by its pass, without those of passes that were let go of.
fn names(shelf: &dyn Shelf) -> Result<BTreeMap<u64, Vec<(u32, String)>>, IoError> {
    let mut names: BTreeMap<u64, Vec<(u32, String)>> = BTreeMap::new();
    let mut gone = BTreeSet::new();
    for name in shelf.list()? {
        // Anything else was not made by this program.
        if let Some((pass, index)) = parse_name(&name) {
            names.entry(pass).or_default().push((index, name));
        } else {
            gone.extend(parse_gone(&name));
        }
    }
    names.retain(|pass, _| !gone.contains(pass));
    names.values_mut().for_each(|segments| segments.sort());
    Ok(names)
}

/// Lets go of all passes with numbers in this range: nothing will be read through them any more. Of their segments only
/// the first block is read.
///
/// The first segment of a pass gets another name, durably; then the others are removed; then the first. A crash in between
/// leaves the new name there, and the rest of the pass counts for nothing; [`tidy`] removes it. Oldest first: what is left
/// has no gap.
///
/// # Errors
/// [`Error::Foreign`], where one of them is not ours to remove.
pub fn let_go(
    shelf: &dyn Shelf,
    passes: impl std::ops::RangeBounds<u64>,
    ours: Ours<'_>,
) -> Result<(), Error> {
    for (pass, segments) in names(shelf)?.range(passes) {
        let mut segments: Vec<String> = segments.iter().map(|(_, name)| name.clone()).collect();
        for name in &segments {
            let mut block = [0; BLOCK_LEN];
            let reader = match shelf.open(name) {
                // Somebody else lets go of it, too.
                Err(error) if error.source.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            if reader.size() < BLOCK {
                continue;
            }
            reader.read_at(0, &mut block)?;
            if format::parse_segment(&block).is_ok_and(|segment| !ours(segment.lineage)) {
                return Err(Error::Foreign { segment: name.clone() });
            }
        }
        let first = segments.remove(0);
        let gone = gone_name(*pass);
        match shelf.rename(&first, &gone) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        }
        shelf.remove(&segments)?;
        shelf.remove(&[gone])?;
    }
    Ok(())
}

/// The writer that goes on with a pass that was interrupted, of a journal with this lineage. For the one that writes.
///
/// What a power cut may have left behind the last record is cut off first, so that a finished pass has nothing but its
/// records and zeros. The cut flushes the segment, too: a service that was killed may have left a record that is whole and
/// not durable, and is about to be relied on. A crash before it is durable leaves what was there.
pub fn go_on(pass: &Pass, lineage: Lineage, longest: u64, shelf: &dyn Shelf) -> Result<Writer, IoError> {
    if let Some(Segment { name, end, torn, .. }) = pass.segments.last() {
        shelf.settle(name, torn.then_some(*end))?;
    }
    Ok(Writer::go_on(lineage, pass, longest))
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

fn read_pass(
    shelf: &dyn Shelf,
    number: u64,
    segments: &[(u32, String)],
    ours: Ours<'_>,
    holds: Holds<'_>,
) -> Result<Pass, Error> {
    let count = segments.len();
    let mut pass = Pass {
        number,
        segments: segments
            .iter()
            .map(|(_, name)| Segment { name: name.clone(), end: 0, torn: false, generation: 0 })
            .collect(),
        images: Vec::new(),
        ended: false,
        bytes: 0,
        damage: None,
        next_sequence: 0,
        next_index: segments.last().map_or(0, |(index, _)| index.saturating_add(1)),
    };
    for (place, (index, name)) in segments.iter().enumerate() {
        let damage = |at, what| Some(Damage { segment: name.clone(), at, what });
        if *index as usize != place {
            pass.damage = damage(0, "the segment before it is missing");
            return Ok(pass);
        }
        let newest = place + 1 == count;
        let reader = shelf.open(name)?;
        let mut block = [0; BLOCK_LEN];
        if reader.size() < BLOCK {
            // A crash came between its creation and the reservation of its space, or it was cut off.
            continue;
        }
        reader.read_at(0, &mut block)?;
        let segment = match format::parse_segment(&block) {
            Ok(segment) => segment,
            Err(format::Error::Version(version)) => {
                return Err(Error::Unsupported { segment: name.clone(), version });
            }
            // Created, and never written to before the power went: no record can be in it, and none after it.
            Err(_) => {
                if !newest || records(&window(&*reader, BLOCK)?).next().is_some() {
                    pass.damage = damage(0, "the segment's header is damaged");
                    return Ok(pass);
                }
                pass.segments[place].torn = true;
                continue;
            }
        };
        if !ours(segment.lineage) {
            return Err(Error::Foreign { segment: name.clone() });
        }
        if (segment.pass, segment.index) != (number, *index) {
            pass.damage = damage(0, "it is a segment of another place");
            return Ok(pass);
        }
        // It ended, its point was not recorded, and it went on.
        pass.ended = false;
        if segment.sequence != pass.next_sequence {
            pass.damage = damage(0, "records before it are missing");
            return Ok(pass);
        }
        pass.segments[place].generation = segment.generation;
        let last = pass.take(&*reader, segment.generation, place, BLOCK)?;
        if newest && !pass.ended {
            pass.settle(&*reader, segment.generation, last, holds)?;
        }
    }
    Ok(pass)
}

impl Pass {
    /// Takes the records that stand from `at` on in the segment with this index and generation. Gives the last one.
    fn take(
        &mut self,
        reader: &dyn ReadAt,
        generation: u64,
        place: usize,
        mut at: u64,
    ) -> Result<Option<Record>, Error> {
        let mut block = [0; BLOCK_LEN];
        let mut last = None;
        while at.saturating_add(BLOCK) <= reader.size() && !self.ended {
            reader.read_at(at, &mut block)?;
            let record = match format::parse_record(&block) {
                Ok(record)
                    if (record.generation, record.sequence) == (generation, self.next_sequence)
                        && at.saturating_add(record.len()) <= reader.size() =>
                {
                    record
                }
                _ => break,
            };
            self.add(&record, place, at);
            at += record.len();
            last = Some(record);
        }
        self.segments[place].end = at;
        Ok(last)
    }

    /// Takes a record that begins at `at` in the segment with this index.
    fn add(&mut self, record: &Record, segment: usize, at: u64) {
        match &record.body {
            Body::End => self.ended = true,
            Body::Images { entries, .. } => {
                let mut stored = at + BLOCK;
                for entry in entries {
                    self.images.push(Image {
                        offset: entry.extent.offset(),
                        at: if entry.zero { 0 } else { stored },
                        len: u32::try_from(entry.extent.len()).unwrap_or(0),
                        crc: entry.crc,
                        segment: u32::try_from(segment).unwrap_or(u32::MAX),
                    });
                    stored += entry.stored();
                }
            }
        }
        self.next_sequence += 1;
        self.bytes += record.len();
    }

    /// Looks at the newest record of a pass that did not end, `last` or one whose header cannot be read: is it sound, torn,
    /// or damaged?
    fn settle(
        &mut self,
        reader: &dyn ReadAt,
        generation: u64,
        mut last: Option<Record>,
        holds: Holds<'_>,
    ) -> Result<(), Error> {
        let Some(newest) = self.segments.last_mut() else { return Ok(()) };
        let (end, mut at) = (newest.end, newest.end);
        let images = last.as_ref().map_or(0, |last| last.entries().len());
        let sound = self.images.len() - images;
        let mut bytes = Vec::new();
        let mut is_bad = |image: &Image| {
            bytes.resize(image.len as usize, 0);
            !image.is_zero() && read_image(reader, image, &mut bytes).is_err()
        };
        // Relied on with a copy that is torn, it would be called damaged once the pass has ended.
        let copied = match &last {
            Some(last) if matches!(last.body, Body::Images { .. }) => {
                let (mut header, mut copy) = ([0; BLOCK_LEN], [0; BLOCK_LEN]);
                reader.read_at(end - last.len(), &mut header)?;
                reader.read_at(end - BLOCK, &mut copy)?;
                header == copy
            }
            _ => true,
        };
        let bad = last.take_if(|_| !copied || self.images[sound..].iter().any(&mut is_bad));
        let behind = window(reader, end)?;
        if let Some(bad) = &bad {
            self.images.truncate(sound);
            self.next_sequence -= 1;
            self.bytes -= bad.len();
            at -= bad.len();
        }
        newest.end = at;
        newest.torn = bad.is_some() || behind.iter().any(|byte| *byte != 0);
        let ours: Vec<(u64, Record)> =
            records(&behind).filter(|(_, record)| record.generation == generation).collect();
        // Only the newest record can be torn, and nothing can stand behind it.
        if let Some((behind, _)) = ours.iter().find(|(_, record)| record.sequence > self.next_sequence) {
            let what = "a record stands behind one that is damaged";
            self.damage = Some(Damage { segment: newest.name.clone(), at: end + behind, what });
            return Ok(());
        }
        // Where its header cannot be read, its copy tells what it is.
        let copy =
            ours.into_iter().map(|(_, record)| record).find(|record| record.sequence == self.next_sequence);
        for entry in bad.or(copy).iter().flat_map(Record::entries) {
            let bytes = holds(entry.extent)?;
            let same =
                if entry.zero { bytes.iter().all(|byte| *byte == 0) } else { crc32c(&bytes) == entry.crc };
            if !same {
                let what = "the newest record is damaged, and the disk no longer holds what it saved";
                self.damage = Some(Damage { segment: newest.name.clone(), at, what });
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The longest record, in bytes: whatever can stand behind a record that cannot be read begins within so much.
const LONGEST_RECORD: u64 = 2 * BLOCK + format::MAX_PAYLOAD as u64;

/// What stands from `at` on, as far as the next record can begin.
fn window(reader: &dyn ReadAt, at: u64) -> Result<Vec<u8>, IoError> {
    let len = reader.size().saturating_sub(at).min(LONGEST_RECORD + BLOCK);
    let mut bytes = vec![0; len as usize];
    reader.read_at(at, &mut bytes)?;
    Ok(bytes)
}

/// The sound record headers among these blocks, and where they stand.
fn records(bytes: &[u8]) -> impl Iterator<Item = (u64, Record)> {
    let blocks = bytes.as_chunks::<BLOCK_LEN>().0.iter().zip(0u64..);
    blocks.filter_map(|(block, index)| Some((index * BLOCK, format::parse_record(block).ok()?)))
}

/// Reads the bytes of an image, whose checksum must hold.
fn read_image(reader: &dyn ReadAt, image: &Image, bytes: &mut [u8]) -> Result<(), ImageError> {
    reader.read_at(image.at, bytes)?;
    if image.is_of(bytes) { Ok(()) } else { Err(ImageError::Checksum) }
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
    bytes: Vec<u8>,
}

impl<'a> Images<'a> {
    /// Of the segments on this shelf.
    pub fn of(shelf: &'a dyn Shelf) -> Images<'a> {
        Images { shelf, open: None, bytes: Vec::new() }
    }

    /// The bytes of an image of this pass.
    pub fn read(&mut self, pass: u64, image: &Image) -> Result<&[u8], Error> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.resize(image.len as usize, 0);
        let read = self.read_into(pass, image, &mut bytes);
        self.bytes = bytes;
        read.map(|()| &*self.bytes)
    }

    /// The same, into memory of their length.
    pub fn read_into(&mut self, pass: u64, image: &Image, bytes: &mut [u8]) -> Result<(), Error> {
        if image.is_zero() {
            bytes.fill(0);
            return Ok(());
        }
        let (name, reader) = self.segment(pass, image)?;
        read_image(reader, image, bytes).map_err(|error| match error {
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
