//! A disk as it was at a point, while it is written to.
//!
//! Whoever writes a disk makes the old content durable in the journal before it overwrites a block. So a range of the disk
//! is read first, and the journal is looked at afterwards: whatever was overwritten before the read is in the journal by
//! then.

use std::fs::File;
use std::io;

use super::target::Target;
use super::{Error, Journal, Standing};
use crate::error::IoError;
use crate::journal::View;
use crate::journal::recover::{self, History};
use crate::name::Name;
use crate::protection::Assignment;
use crate::storage::device::{Device, EngineChoice};
use crate::storage::shelf::Directory;
use crate::storage::{Action, Completion, Geometry, Request, Storage, Waker};
use crate::sys::aligned::Arena;
use crate::units::Extent;

/// The disk, and what was overwritten since the point.
pub(super) struct Past {
    target: Target,
    shelf: Directory,
    standing: Standing,
    history: History,
    view: View,
}

impl Past {
    /// As it was after this pass.
    pub(super) fn of(target: Target, journal: Journal, pass: u64) -> Result<Past, recover::Error> {
        let Journal { shelf, history, standing } = journal;
        let view = View::after(&history, pass)?;
        Ok(Past { target, shelf, standing, history, view })
    }

    /// The size of the disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.target.size()
    }

    /// What it held there.
    pub(super) fn read(&mut self, extent: Extent) -> Result<Vec<u8>, recover::Error> {
        let mut bytes = self.target.read(extent)?;
        self.look()?;
        self.view.overlay(&self.shelf, extent.offset(), &mut bytes)?;
        Ok(bytes)
    }

    /// Looks at the journal. What is overlaid afterwards must have been read before.
    fn look(&mut self) -> Result<(), recover::Error> {
        let Past { target, shelf, standing, history, view } = self;
        history.refresh(shelf, &|lineage| standing.is_ours(lineage), &|extent| target.read(extent))?;
        view.extend(history)
    }
}

/// A disk that can be read as it was at its newest point, beside whoever receives it.
pub struct Newest {
    past: Past,
    file: File,
    block: u32,
    name: String,
}

/// Fails where the point is not there any more.
pub type Kept = Box<dyn Fn() -> Result<(), IoError> + Send>;

/// Of how many parts, at most, what was overwritten since the point may consist: 100 MiB of memory. A disk of which more was
/// overwritten while it is compared is compared when the pass is through.
const MOST_PARTS: usize = 1 << 20;

impl Newest {
    /// Opens it, by its identity and for reading only. The machine is not failed over, and its disks are not taken away, as
    /// long as this lives. `None` where it has no point.
    pub fn open(machine: &Name, disk: &Assignment, journal: Journal) -> Result<Option<Newest>, Error> {
        let Some(pass) = journal.standing.newest().and_then(|point| journal.standing.pass_at(point)) else {
            return Ok(None);
        };
        let failed = |source| Error::Journal { machine: machine.clone(), disk: disk.name.clone(), source };
        journal.reaches(pass).map_err(failed)?;
        let target = Target::attached(&disk.id)?;
        let (file, block) = (target.file()?, target.block()?);
        let past = Past::of(target, journal, pass).map_err(failed)?;
        Ok(Some(Newest { past, file, block, name: disk.id.to_string() }))
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.past.size()
    }

    /// Its logical block size in bytes.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// A queue of so many reads, with buffers from the arena. What it gives is what the disk held at the point: `kept` is
    /// asked after each of them.
    pub fn queue(
        self,
        engine: EngineChoice,
        depth: usize,
        arena: &Arena,
        kept: Kept,
    ) -> Result<Box<dyn Storage>, IoError> {
        let Newest { past, file, block, name } = self;
        let geometry = Geometry { size: past.size(), block };
        let (device, _) = Device::new(file, name, geometry, engine, depth, arena)?;
        Ok(Box::new(Queue { device, past, kept, under_way: Vec::new() }))
    }
}

/// Reads of the disk as it is, and over them what it held.
struct Queue {
    device: Device,
    past: Past,
    kept: Kept,
    /// The tags of what is being read, and where that is.
    under_way: Vec<(u64, u64)>,
}

impl Queue {
    fn go_back(&mut self, done: &mut [Completion]) -> Result<(), recover::Error> {
        self.past.look()?;
        for completion in done {
            let found = self.under_way.iter().position(|(tag, _)| *tag == completion.tag);
            let at = found.map(|found| self.under_way.swap_remove(found).1);
            if let (Some(at), Some(buffer), Ok(())) = (at, &mut completion.buffer, &completion.result) {
                self.past.view.overlay(&self.past.shelf, at, buffer)?;
            }
        }
        Ok(())
    }
}

impl Storage for Queue {
    fn geometry(&self) -> Geometry {
        self.device.geometry()
    }

    fn depth(&self) -> usize {
        self.device.depth()
    }

    fn submit(&mut self, request: Request) {
        let Action::Read { offset, .. } = &request.action else {
            unreachable!("what a disk was is only read");
        };
        self.under_way.push((request.tag, *offset));
        self.device.submit(request);
    }

    fn wait(&mut self, done: &mut Vec<Completion>) -> Result<(), IoError> {
        let before = done.len();
        self.device.wait(done)?;
        let went_back = self.go_back(&mut done[before..]);
        // A point that was let go of explains whatever else is wrong: before its images go, the log says so.
        (self.kept)()?;
        went_back.map_err(|error| match error {
            recover::Error::Io(error) => error,
            error => IoError::new("read", "what the disk held at its newest point", io::Error::other(error)),
        })?;
        match self.past.view.parts() {
            0..=MOST_PARTS => Ok(()),
            _ => {
                let text = "too much was overwritten since: try again once the pass that runs is committed";
                let what = "what the disk held at its newest point";
                Err(IoError::new("keep in memory", what, io::Error::other(text)))
            }
        }
    }

    fn waker(&self) -> Waker {
        self.device.waker()
    }

    fn create_segment(&mut self, _: &str, _: u64, _: &[u8]) -> Result<(), IoError> {
        unreachable!("what a disk was is only read")
    }
}
