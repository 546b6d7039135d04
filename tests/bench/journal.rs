//! What the journal costs, for `scripts/bench journal`: drives a volume of the library on a device, with and without a
//! journal, and prints what it measured as JSON. Everything on the device is overwritten.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use clap::{Parser, Subcommand};
use mt_agent::error::IoError;
use mt_agent::journal::format::{self, BLOCK, Body, Entry, Record, Segment};
use mt_agent::journal::recover::{self, History, let_go};
use mt_agent::journal::writer::segment_name;
use mt_agent::journal::{View, Writer};
use mt_agent::pass::{Lineage, PassId};
use mt_agent::points::{self, Kind, Log, Point, PointId, VolumeAt};
use mt_agent::recovery::LONGEST_SEGMENT;
use mt_agent::storage::Geometry;
use mt_agent::storage::device::{Device, EngineChoice};
use mt_agent::storage::shelf::Directory;
use mt_agent::sys::aligned::{Arena, Buffer};
use mt_agent::units::Extent;
use mt_agent::volume::{Event, Volume};
use rand::rngs::StdRng as Dice;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use time::OffsetDateTime;

/// As the service has them.
const DEPTH: usize = 160;
const WINDOW: usize = 8 << 20;
/// How much content there is, before it repeats.
const POOL: usize = 16 << 20;

type Failure = Box<dyn std::error::Error>;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// One pass that overwrites all of a device, in extents of a size
    Pass {
        device: PathBuf,
        /// Where the journal goes; without it there is none
        #[arg(long)]
        journal: Option<PathBuf>,
        /// How many bytes of the device, from its beginning
        #[arg(long)]
        bytes: u64,
        #[arg(long)]
        extent: u64,
        /// The extents in any order
        #[arg(long)]
        random: bool,
        /// Another content for another number
        #[arg(long)]
        seed: u64,
    },
    /// From the last byte of a pass to its point, and beside it a write and an fdatasync of the device and of a file
    Commit {
        device: PathBuf,
        retention: PathBuf,
        #[arg(long)]
        times: u64,
    },
    /// The memory of the index of a journal that is made up
    Index {
        dir: PathBuf,
        /// How many full segments
        #[arg(long)]
        segments: u64,
    },
    /// How long it takes to read the headers of a journal that is made up
    Open {
        dir: PathBuf,
        #[arg(long)]
        segments: u64,
        #[arg(long)]
        times: u64,
    },
}

fn main() -> Result<(), Failure> {
    let measured = match Args::parse().what {
        What::Pass { device, journal, bytes, extent, random, seed } => {
            pass(&device, journal.as_deref(), bytes, extent, random, seed)?
        }
        What::Commit { device, retention, times } => commit(&device, &retention, times)?,
        What::Index { dir, segments } => index(&dir, segments)?,
        What::Open { dir, segments, times } => open(&dir, segments, times)?,
    };
    println!("{measured}");
    Ok(())
}

struct Running {
    volume: Volume,
    events: Receiver<Event>,
    written: u64,
}

fn direct(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)
}

impl Running {
    fn start(device: &Path, journal: Option<&Path>, size: u64) -> Result<Running, Failure> {
        let arena = Arena::new(WINDOW)?;
        let geometry = Geometry { size, block: 512 };
        let (mut storage, _) =
            Device::new(direct(device)?, "device", geometry, EngineChoice::Auto, DEPTH, &arena)?;
        if let Some(dir) = journal {
            storage = storage.with_shelf(Directory::create_all(dir.to_owned())?);
        }
        let (sender, events) = channel();
        let report = Box::new(move |event| drop(sender.send(event)));
        let volume = Volume::start("bench", Box::new(storage), size, arena, report)?;
        if journal.is_some() {
            volume.save(Writer::new(LINEAGE, 1, LONGEST_SEGMENT));
        }
        Ok(Running { volume, events, written: 0 })
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        let mut buffer = self.volume.arena().alloc_blocking(bytes.len());
        buffer.copy_from_slice(bytes);
        Ok(self.volume.write(at, buffer, bytes.len() as u64)?)
    }

    /// The next thing that happened; how much the journal takes, once it is flushed.
    fn hear(&mut self) -> Result<Option<u64>, Failure> {
        match self.events.recv()? {
            Event::Written { written, .. } => self.written += written,
            Event::Flushed { saved } => return Ok(Some(saved)),
            Event::Paused => return Err("the journal has no room".into()),
            Event::Resumed => {}
            Event::Faulted(fault) => return Err(fault.into()),
        }
        Ok(None)
    }

    fn flush(&mut self) -> Result<u64, Failure> {
        self.volume.flush();
        loop {
            if let Some(saved) = self.hear()? {
                return Ok(saved);
            }
        }
    }

    fn written(&mut self, bytes: u64) -> Result<(), Failure> {
        while self.written < bytes {
            self.hear()?;
        }
        Ok(())
    }
}

fn content(seed: u64) -> Vec<u8> {
    let mut pool = vec![0; POOL];
    Dice::seed_from_u64(seed).fill(&mut pool[..]);
    pool
}

/// What the extent at this place becomes.
fn part(pool: &[u8], at: u64, len: u64) -> &[u8] {
    let from = (at as usize) % POOL;
    &pool[from..from + len as usize]
}

const LINEAGE: Lineage = Lineage(1);

fn ours(lineage: Lineage) -> bool {
    lineage == LINEAGE
}

fn recover(dir: &Path) -> Result<History, recover::Error> {
    let holds = |_| Err(IoError::new("read", "the disk", io::ErrorKind::Unsupported));
    recover::recover(&Directory::at(dir.to_owned()), &ours, &holds)
}

fn remove(journal: &Path) -> Result<(), recover::Error> {
    let_go(&Directory::at(journal.to_owned()), .., &ours)
}

fn pass(
    device: &Path,
    journal: Option<&Path>,
    bytes: u64,
    extent: u64,
    random: bool,
    seed: u64,
) -> Result<Value, Failure> {
    let pool = content(seed);
    let mut places: Vec<u64> = (0..bytes / extent).map(|index| index * extent).collect();
    if random {
        places.shuffle(&mut Dice::seed_from_u64(seed));
    }
    let mut running = Running::start(device, journal, bytes)?;
    let begin = Instant::now();
    for at in places {
        running.write(at, part(&pool, at, extent))?;
    }
    let saved = running.flush()?;
    let wall = begin.elapsed().as_secs_f64();
    let written = running.written;
    running.volume.close();
    journal.map(remove).transpose()?;
    Ok(json!({ "wall": wall, "written": written, "saved": saved }))
}

/// What is written before the last bytes of a pass, and with them.
const BEFORE: u64 = 8;
const UNIT: u64 = 64 << 10;

fn commit(device: &Path, retention: &Path, times: u64) -> Result<Value, Failure> {
    fs::create_dir_all(retention)?;
    let (journal, mut log) = (retention.join("journal"), Log::open(retention)?);
    let size = (BEFORE + 1) * UNIT;
    // Its blocks are written once already, so that a flush of it is one of nothing but the device.
    let beside = retention.join("beside");
    File::create(&beside)?.write_all_at(&vec![1; size as usize], 0)?;
    File::open(&beside)?.sync_all()?;
    let (disk, beside) =
        (direct(device)?, direct(&beside).or_else(|_| File::options().write(true).open(&beside))?);
    let mut rounds = Vec::new();
    for round in 0..times {
        let pool = content(round);
        let ours = |log: &mut Log| -> Result<f64, Failure> {
            let mut running = Running::start(device, Some(&journal), size)?;
            for index in 0..BEFORE {
                running.write(index * UNIT, part(&pool, index * UNIT, UNIT))?;
            }
            running.written(BEFORE * UNIT)?;
            let begin = Instant::now();
            running.write(BEFORE * UNIT, part(&pool, BEFORE * UNIT, UNIT))?;
            let bytes = running.flush()?;
            log.append(points::Record::Point(point(round, bytes)?))?;
            let took = begin.elapsed().as_secs_f64();
            running.volume.close();
            remove(&journal)?;
            Ok(took)
        };
        let theirs = || -> Result<f64, Failure> {
            let buffer = |at| -> Result<Buffer, Failure> {
                let mut buffer = Arena::new(UNIT as usize)?.alloc_blocking(UNIT as usize);
                // Not what the other one writes.
                buffer.copy_from_slice(part(&pool, at + (POOL as u64 / 2), UNIT));
                Ok(buffer)
            };
            for index in 0..BEFORE {
                let buffer = buffer(index * UNIT)?;
                disk.write_all_at(&buffer, index * UNIT)?;
                beside.write_all_at(&buffer, index * UNIT)?;
            }
            let buffer = buffer(BEFORE * UNIT)?;
            let begin = Instant::now();
            for file in [&beside, &disk] {
                file.write_all_at(&buffer, BEFORE * UNIT)?;
                file.sync_data()?;
            }
            Ok(begin.elapsed().as_secs_f64())
        };
        let (first, second);
        if round % 2 == 0 {
            first = ours(&mut log)?;
            second = theirs()?;
        } else {
            second = theirs()?;
            first = ours(&mut log)?;
        }
        rounds.push(json!({ "commit": first, "pair": second }));
    }
    Ok(json!(rounds))
}

fn point(round: u64, bytes: u64) -> Result<Point, Failure> {
    let (pass, time) = (round + 1, OffsetDateTime::now_utc());
    let volume = VolumeAt {
        machine: "bench".parse()?,
        disk: "disk".parse()?,
        id: "loop:/bench".parse()?,
        lineage: LINEAGE,
        pass,
        sender_pass: PassId(pass.into()),
        bytes,
    };
    Ok(Point {
        id: PointId(pass.into()),
        time,
        recorded: time,
        kind: Kind::Crash,
        fuzzy: false,
        name: None,
        group: None,
        volumes: vec![volume],
    })
}

/// One batch of a volume: so many bytes, in extents of [`UNIT`].
const RECORD: u64 = 2 << 20;

/// Segments as long as they get, full of before-images of extents of 64 KiB, a hundred to a pass. Only the headers are
/// there: the images are holes, which nobody reads. How many bytes of images that are.
fn make_up(dir: &Path, segments: u64) -> Result<u64, Failure> {
    const OF_PASS: u64 = 100;
    let records = (LONGEST_SEGMENT - BLOCK) / (2 * BLOCK + RECORD);
    let (mut at, mut sequence) = (0, 0);
    for number in 0..segments {
        let (pass, index) = (1 + number / OF_PASS, (number % OF_PASS) as u32);
        if index == 0 {
            (at, sequence) = (0, 0);
        }
        let path = dir.join(segment_name(pass, index));
        let file = File::options().write(true).create_new(true).open(path)?;
        file.set_len(LONGEST_SEGMENT)?;
        let generation = number + 1;
        let segment = Segment { lineage: LINEAGE, pass, index, generation, sequence };
        file.write_all_at(&format::encode_segment(&segment), 0)?;
        let mut place = BLOCK;
        for _ in 0..records {
            let entry = |index| {
                let extent = Extent::new(at + index * UNIT, UNIT).ok_or("an empty extent")?;
                Ok::<_, Failure>(Entry { extent, zero: false, crc: 1 })
            };
            let entries = (0..RECORD / UNIT).map(entry).collect::<Result<Vec<_>, _>>()?;
            let body = Body::Images { entries, payload_len: RECORD as u32 };
            let record = Record { generation, sequence, body };
            let header = format::encode_record(&record)?;
            file.write_all_at(&header, place)?;
            file.write_all_at(&header, place + BLOCK + RECORD)?;
            (at, place, sequence) = (at + RECORD, place + record.len(), sequence + 1);
        }
        if index == (OF_PASS - 1) as u32 || number + 1 == segments {
            let end = Record { generation, sequence, body: Body::End };
            file.write_all_at(&format::encode_record(&end)?, place)?;
        }
    }
    Ok(segments * records * RECORD)
}

/// Resident memory of this process that is of no file.
fn memory() -> Result<u64, Failure> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

fn index(dir: &Path, segments: u64) -> Result<Value, Failure> {
    let images = make_up(dir, segments)?;
    let shelf = Directory::at(dir.to_owned());
    let before = memory()?;
    let history = recover(dir)?;
    let read = memory()?;
    let go_on = |pass| recover::go_on(pass, LINEAGE, LONGEST_SEGMENT, &shelf);
    let writers = history.passes.values().map(go_on).collect::<Result<Vec<Writer>, _>>()?;
    let saved = memory()?;
    drop(writers);
    let again = memory()?;
    let view = View::after(&history, 0)?;
    let viewed = memory()?;
    // The passes overlap: the view has the part of the images that is the oldest of each place.
    Ok(json!({
        "images": images,
        "history": read - before,
        "writer": saved.saturating_sub(read),
        "view": viewed.saturating_sub(again),
        "view_images": view.len(),
    }))
}

fn open(dir: &Path, segments: u64, times: u64) -> Result<Value, Failure> {
    make_up(dir, segments)?;
    let mut rounds = Vec::new();
    for _ in 0..times {
        let begin = Instant::now();
        let history = recover(dir)?;
        let took = begin.elapsed().as_secs_f64();
        let damaged = history.passes.values().any(|pass| pass.damage.is_some() || !pass.ended);
        let found: usize = history.passes.values().map(|pass| pass.segments.len()).sum();
        if damaged || found as u64 != segments {
            return Err(format!("{found} segments were found, damaged: {damaged}").into());
        }
        rounds.push(took);
    }
    Ok(json!(rounds))
}
