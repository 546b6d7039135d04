//! The files of the protections: read as they are, changed one at a time, durable before anyone is told.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use time::OffsetDateTime;

use super::assign::{Refusal, Refused, Why};
use super::file::{self, ParseError};
use super::{Assignment, Commit, Error, Fault, Pass, Protection, Source, State};
use crate::disk::id::DiskId;
use crate::durable;
use crate::error::{IoError, chain};
use crate::name::Name;
use crate::pass::PassId;
use crate::points::PointId;

/// The protections below one retention directory.
///
/// Beside `<machine>.toml` the directory `machines` holds
///
/// - `.lock`: every change of a file is made under an exclusive `flock` of it, so that two commands or a command
///   and the service never lose each other's changes. Reading needs no lock, since files are replaced whole.
/// - `<machine>.hold`: a session holds a shared `flock` of it, and taking a disk away needs an exclusive one.
///   All three of opening, locking and removing it happen under `.lock`: nobody locks a file that is gone.
/// - `.<machine>.toml.…`: what a crash left of a change that was not finished. It has no meaning.
#[derive(Clone, Debug)]
pub struct Store {
    machines: PathBuf,
}

/// A machine that has a file, with its protection or why that cannot be read.
pub type Listed = (Name, Result<Protection, Error>);

/// Keeps the disks of a machine from being taken away while it lives.
#[derive(Debug)]
pub struct Hold {
    // Closing the file gives the lock back, and so does the end of the process, however it ends.
    _lock: Flock<File>,
}

/// The exclusive lock under which files are changed.
struct Exclusive {
    _lock: Flock<File>,
}

impl Store {
    /// The protections below the retention directory `dir`. Nothing is read or created yet.
    pub fn open(dir: impl AsRef<Path>) -> Store {
        Store { machines: dir.as_ref().join("machines") }
    }

    /// The file of a machine's protection, whether there is one or not.
    pub fn file(&self, machine: &Name) -> PathBuf {
        self.machines.join(format!("{machine}.toml"))
    }

    /// Reads the protection of a machine.
    ///
    /// # Errors
    /// [`Error::NoMachine`] where it has none, [`Error::Corrupt`] or [`Error::Unsupported`] where its file cannot
    /// be understood.
    pub fn load(&self, machine: &Name) -> Result<Protection, Error> {
        let path = self.file(machine);
        let bytes = match durable::read(&path, file::MAX_LEN) {
            Ok(bytes) => bytes,
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NoMachine { machine: machine.clone() });
            }
            Err(error) => return Err(error.into()),
        };
        let protection = file::parse(&bytes).map_err(|error| match error {
            ParseError::Version(version) => Error::Unsupported { file: path.clone(), version },
            ParseError::Corrupt { line, what } => {
                Error::Corrupt { machine: machine.clone(), file: path.clone(), line, what }
            }
        })?;
        // A copy of another machine's file would give two machines the same disks.
        if protection.machine != *machine {
            let line = bytes.split(|&b| b == b'\n').position(|line| line.starts_with(b"machine"));
            let what = format!("this is the protection of machine {}, not of {machine}", protection.machine);
            let line = line.map_or(1, |line| line + 1);
            return Err(Error::Corrupt { machine: machine.clone(), file: path, line, what });
        }
        Ok(protection)
    }

    /// All machines that have a file, by name, each with its protection or why it cannot be read: one broken file
    /// concerns nobody else.
    ///
    /// # Errors
    /// Only where the directory itself cannot be listed. One that does not exist holds no protections.
    pub fn all(&self) -> Result<Vec<Listed>, Error> {
        Ok(self.listed()?.unwrap_or_default())
    }

    /// The same; none where there is no directory.
    fn listed(&self) -> Result<Option<Vec<Listed>>, Error> {
        let failed = |error| IoError::new("list", self.machines.display().to_string(), error);
        let entries = match fs::read_dir(&self.machines) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error).into()),
        };
        let mut names = Vec::new();
        for entry in entries {
            let file = entry.map_err(failed)?.file_name();
            let Some(stem) = file.to_str().and_then(|file| file.strip_suffix(".toml")) else { continue };
            match stem.parse::<Name>() {
                Ok(name) => names.push(name),
                // Never written by us: what begins with a dot or has another character in it.
                Err(_) => tracing::debug!(file = %self.machines.join(&file).display(), "not a protection"),
            }
        }
        names.sort();
        let load = |name: Name| {
            let loaded = self.load(&name);
            (name, loaded)
        };
        // One that was removed since the listing is not there, rather than broken.
        let gone =
            |(_, loaded): &(Name, Result<Protection, Error>)| matches!(loaded, Err(Error::NoMachine { .. }));
        Ok(Some(names.into_iter().map(load).filter(|entry| !gone(entry)).collect()))
    }

    /// Every assigned target disk, with the machine and the machine's disk to which it belongs.
    ///
    /// # Errors
    /// Where any file cannot be read, or two name one disk: whoever must know that a disk is *not* assigned can
    /// only know it from all of them.
    pub fn owners(&self) -> Result<BTreeMap<DiskId, (Name, Name)>, Error> {
        let mut owners: BTreeMap<DiskId, (Name, Name)> = BTreeMap::new();
        for (machine, protection) in self.all()? {
            for disk in protection?.disks {
                if let Some((machine, name)) = owners.get(&disk.id) {
                    return Err(Error::Shared { id: disk.id, machine: machine.clone(), disk: name.clone() });
                }
                owners.insert(disk.id, (machine.clone(), disk.name));
            }
        }
        Ok(owners)
    }

    /// Every assigned target disk with its machine, as discovery takes it.
    ///
    /// # Errors
    /// Those of [`Store::owners`].
    pub fn assigned(&self) -> Result<BTreeMap<DiskId, String>, Error> {
        Ok(self.owners()?.into_iter().map(|(id, (machine, _))| (id, machine.to_string())).collect())
    }

    /// The machines that belong to a group.
    ///
    /// # Errors
    /// [`Error::NoGroup`] where none does; and where any file cannot be read, which may be that of a member.
    pub fn members(&self, group: &Name) -> Result<BTreeSet<Name>, Error> {
        let mut members = BTreeSet::new();
        for (machine, protection) in self.all()? {
            if protection?.group.as_ref() == Some(group) {
                members.insert(machine);
            }
        }
        if members.is_empty() { Err(Error::NoGroup(group.clone())) } else { Ok(members) }
    }

    /// Makes a group of exactly these machines; of none, there is no such group any more. Gives what it was before.
    ///
    /// Each machine's file is replaced on its own: a crash leaves some of them changed. Calling it again makes it whole.
    ///
    /// # Errors
    /// [`Error::NoMachine`], [`Error::Grouped`]: nothing was changed; [`Error::NoGroup`] where none is to be taken away.
    pub fn set_group(&self, group: &Name, machines: &BTreeSet<Name>) -> Result<BTreeSet<Name>, Error> {
        for machine in machines {
            self.load(machine)?;
        }
        let _exclusive = self.exclusive()?;
        let before = match self.members(group) {
            Err(Error::NoGroup(_)) if !machines.is_empty() => BTreeSet::new(),
            members => members?,
        };
        let mut changed = Vec::new();
        for machine in machines.union(&before) {
            let mut protection = self.load(machine)?;
            match &protection.group {
                Some(other) if other != group => {
                    return Err(Error::Grouped { machine: machine.clone(), group: other.clone() });
                }
                _ => protection.group = machines.contains(machine).then(|| group.clone()),
            }
            changed.push(protection);
        }
        for protection in changed {
            self.write(&protection)?;
        }
        Ok(before)
    }

    /// As [`Store::assigned`], as far as it can be read; and why the rest cannot. None where there is no directory of
    /// protections: nothing was ever assigned, or the file system that holds it is not mounted.
    pub fn known(&self) -> Option<(BTreeMap<DiskId, String>, Vec<String>)> {
        let (mut assigned, mut unread) = (BTreeMap::<DiskId, String>::new(), Vec::new());
        let listed = match self.listed() {
            Ok(listed) => listed?,
            Err(error) => {
                unread.push(chain(&error));
                Vec::new()
            }
        };
        for (machine, protection) in listed {
            match protection {
                Ok(protection) => {
                    for disk in protection.disks {
                        let owners = assigned.entry(disk.id).or_default();
                        // More than one only after an edit by hand.
                        owners.push_str(if owners.is_empty() { "" } else { " and " });
                        owners.push_str(machine.as_str());
                    }
                }
                Err(error) => unread.push(chain(&error)),
            }
        }
        // Unmounted while its files were read, which then seemed to have been removed.
        let gone = matches!(self.machines.try_exists(), Ok(false));
        (!gone).then_some((assigned, unread))
    }

    /// What `assign` would write, checked as there, but neither locked nor written.
    ///
    /// # Errors
    /// Those of [`Store::assign`].
    pub fn assign_dry(&self, machine: &Name, disks: &[Assignment]) -> Result<Protection, Error> {
        let owners = self.owners()?;
        let current = match self.load(machine) {
            Ok(protection) => Some(protection),
            Err(Error::NoMachine { .. }) => None,
            Err(error) => return Err(error),
        };
        let mut merged = current.unwrap_or_else(|| Protection {
            machine: machine.clone(),
            created: now(),
            group: None,
            disks: Vec::new(),
        });
        let mut refused = Vec::new();
        for disk in disks {
            let refuse = |why| Refusal { disk: disk.name.clone(), given: disk.id.to_string(), why };
            match merged.disk(&disk.name) {
                // Asked for once more: nothing changes, least of all its state.
                Some(known) if known.id == disk.id => continue,
                Some(known) => {
                    let why = Why::NameTaken { machine: machine.clone(), id: known.id.clone() };
                    refused.push(refuse(why));
                    continue;
                }
                None => {}
            }
            if let Some((owner, name)) = owners.get(&disk.id) {
                refused.push(refuse(Why::Assigned { machine: owner.clone(), disk: name.clone() }));
                continue;
            }
            if let Some(twice) = merged.disks.iter().find(|known| known.id == disk.id) {
                refused.push(refuse(Why::Twice { other: twice.name.clone() }));
                continue;
            }
            merged.disks.push(disk.clone());
        }
        if merged.disks.len() > file::MAX_DISKS
            && let Some(last) = disks.last()
        {
            let why = Why::TooMany { most: file::MAX_DISKS };
            refused.push(Refusal { disk: last.name.clone(), given: last.id.to_string(), why });
        }
        if refused.is_empty() {
            Ok(merged)
        } else {
            Err(Refused { machine: machine.clone(), refused }.into())
        }
    }

    /// Assigns target disks to a machine: all of them, or on any error none. A disk that the machine has under the
    /// same name already stays as it is.
    ///
    /// # Errors
    /// [`Error::Refused`] where a disk or a name is taken. A file of another machine that cannot be read is an
    /// error too, since it may name the same disks.
    pub fn assign(&self, machine: &Name, disks: &[Assignment]) -> Result<Protection, Error> {
        let _exclusive = self.exclusive()?;
        let merged = self.assign_dry(machine, disks)?;
        self.write(&merged)?;
        Ok(merged)
    }

    /// Takes one disk of a machine away, or with `None` all of them, and gives back what was taken. Works for a
    /// file that cannot be read, too, if all disks are meant: then nothing is given back.
    ///
    /// # Errors
    /// [`Error::Receiving`] while somebody has a [`Hold`] of the machine; [`Error::NoMachine`], [`Error::NoDisk`].
    pub fn remove(&self, machine: &Name, disk: Option<&Name>) -> Result<Vec<Assignment>, Error> {
        // Asked first, so that a mistyped name creates neither directory nor lock.
        if !self.exists(machine)? {
            return Err(Error::NoMachine { machine: machine.clone() });
        }
        let _exclusive = self.exclusive()?;
        let (taken, left) = self.without(machine, disk)?;
        let held = self.not_held(machine)?;
        match left {
            Some(protection) => self.write(&protection)?,
            None => {
                // A crash before it is durable may bring the file back, whole.
                durable::remove(&self.file(machine))?;
                if held.is_some() {
                    durable::remove(&self.machines.join(format!("{machine}.hold")))?;
                }
            }
        }
        drop(held);
        Ok(taken)
    }

    /// What `remove` would take away, checked as there, but nothing is written.
    ///
    /// # Errors
    /// Those of [`Store::remove`].
    pub fn remove_dry(&self, machine: &Name, disk: Option<&Name>) -> Result<Vec<Assignment>, Error> {
        if !self.exists(machine)? {
            return Err(Error::NoMachine { machine: machine.clone() });
        }
        let (taken, _) = self.without(machine, disk)?;
        self.not_held(machine)?;
        Ok(taken)
    }

    /// What goes with one disk of a machine, or with all of them, and what stays.
    fn without(
        &self,
        machine: &Name,
        disk: Option<&Name>,
    ) -> Result<(Vec<Assignment>, Option<Protection>), Error> {
        Ok(match (self.load(machine), disk) {
            (Err(Error::Corrupt { .. } | Error::Unsupported { .. }), None) => (Vec::new(), None),
            (Err(error), _) => return Err(error),
            (Ok(protection), None) => (protection.disks, None),
            (Ok(mut protection), Some(disk)) => {
                let place = protection.disks.iter().position(|known| known.name == *disk);
                let place =
                    place.ok_or_else(|| Error::NoDisk { machine: machine.clone(), disk: disk.clone() })?;
                let taken = vec![protection.disks.remove(place)];
                (taken, (!protection.disks.is_empty()).then_some(protection))
            }
        })
    }

    /// The exclusive lock of the machine's hold. Without such a file nobody receives: none is created here, and space
    /// comes free on a file system that is full.
    fn not_held(&self, machine: &Name) -> Result<Option<Flock<File>>, Error> {
        let hold = self.machines.join(format!("{machine}.hold"));
        if !hold.exists() {
            return Ok(None);
        }
        lock(&hold, FlockArg::LockExclusiveNonblock)
            .map(Some)
            .map_err(|error| busy(error, || Error::Receiving { machine: machine.clone() }))
    }

    /// Keeps the disks of a machine from being taken away for as long as the [`Hold`] lives. Several may be held at
    /// once.
    ///
    /// # Errors
    /// [`Error::NoMachine`] where it has no disks, and those of [`Store::load`].
    pub fn hold(&self, machine: &Name) -> Result<Hold, Error> {
        self.load(machine)?;
        let _exclusive = self.exclusive()?;
        // Again, now that nobody can take it away between this look and the lock.
        self.load(machine)?;
        let hold = self.machines.join(format!("{machine}.hold"));
        // Whoever excludes others has it for long.
        let lock = lock(&hold, FlockArg::LockSharedNonblock)
            .map_err(|error| busy(error, || Error::Excluded { machine: machine.clone() }))?;
        Ok(Hold { _lock: lock })
    }

    /// Keeps everyone else from receiving for the machine for as long as the [`Hold`] lives; also for one whose file cannot be
    /// read, and is to be removed.
    ///
    /// # Errors
    /// [`Error::Receiving`] while somebody has a hold of it; [`Error::NoMachine`].
    pub fn exclude(&self, machine: &Name) -> Result<Hold, Error> {
        let exists = || match self.exists(machine)? {
            true => Ok(()),
            false => Err(Error::NoMachine { machine: machine.clone() }),
        };
        exists()?;
        let _exclusive = self.exclusive()?;
        exists()?;
        let hold = self.machines.join(format!("{machine}.hold"));
        let lock = lock(&hold, FlockArg::LockExclusiveNonblock)
            .map_err(|error| busy(error, || Error::Receiving { machine: machine.clone() }))?;
        Ok(Hold { _lock: lock })
    }

    /// Records that a pass begins to write a disk: from here on its content is no point, whatever happens, and what there
    /// is of it is this source's. The same pass may begin again to go on after an interruption; another one takes its place.
    ///
    /// # Errors
    /// [`Error::Transition`] for a pass that faulted or was committed; [`Error::Shared`] where another protection
    /// names the disk as well.
    pub fn begin_pass(
        &self,
        machine: &Name,
        disk: &Name,
        pass: PassId,
        source: &Source,
    ) -> Result<(), Error> {
        self.change(machine, disk, |known| {
            match &known.state {
                State::Receiving(open) if open.id == pass => return Ok(()),
                State::Faulted(faulted, _) if faulted.id == pass => {
                    return Err(format!("go on with pass {pass}, only begin another"));
                }
                State::Synchronized if known.last_commit.is_some_and(|commit| commit.pass == pass) => {
                    return Err(format!("begin pass {pass}, which was committed"));
                }
                State::Empty | State::Receiving(_) | State::Synchronized | State::Faulted(..) => {}
            }
            known.state = State::Receiving(Pass { id: pass, started: now() });
            // An image of the disk, which has no identity, is no other disk.
            let id = source.id.clone().or(known.source.take().and_then(|known| known.id));
            known.source = Some(Source { id, ..source.clone() });
            Ok(())
        })?;
        Ok(())
    }

    /// Records that everything of a pass is durable on the disk: this *is* the commit. Committing the same pass once
    /// more gives the commit that was recorded, for a sender that did not hear the answer.
    ///
    /// # Errors
    /// [`Error::Transition`] for any pass but the one that is open.
    pub fn commit_pass(
        &self,
        machine: &Name,
        disk: &Name,
        pass: PassId,
        bytes: u64,
        point_in_time: bool,
    ) -> Result<Commit, Error> {
        let mut recorded = None;
        self.change(machine, disk, |known| {
            let commit = match (&known.state, known.last_commit) {
                (State::Synchronized, Some(commit)) if commit.pass == pass => commit,
                (State::Receiving(open), _) if open.id == pass => {
                    let commit = Commit { pass, time: now(), bytes, point_in_time };
                    known.state = State::Synchronized;
                    known.last_commit = Some(commit);
                    known.taken_back = false;
                    commit
                }
                _ => return Err(format!("commit pass {pass}")),
            };
            recorded = Some(commit);
            Ok(())
        })?;
        Ok(recorded.expect("a change that was accepted recorded its commit"))
    }

    /// Records that the disk stands at no point any more: its newest one was given up. It is as if the pass that led there had
    /// been interrupted.
    ///
    /// # Errors
    /// Those of [`Store::load`].
    pub fn forget_commit(&self, machine: &Name, disk: &Name) -> Result<(), Error> {
        self.change(machine, disk, |known| {
            if let (State::Synchronized, Some(commit)) = (&known.state, known.last_commit) {
                known.state = State::Receiving(Pass { id: commit.pass, started: commit.time });
            }
            (known.last_commit, known.released) = (None, None);
            Ok(())
        })
    }

    /// Records that all disks of a machine are released at this point, or that they are not any more. The points log knows that
    /// they are before that is recorded here, and that they are not after it.
    ///
    /// # Errors
    /// Those of [`Store::load`].
    pub fn release(&self, machine: &Name, point: Option<PointId>) -> Result<(), Error> {
        self.load(machine)?;
        let _exclusive = self.exclusive()?;
        let mut protection = self.load(machine)?;
        let before = protection.clone();
        for disk in &mut protection.disks {
            disk.released = point;
            // Also where the release itself was not recorded here: a crash came between.
            disk.taken_back |= point.is_none();
        }
        if protection == before { Ok(()) } else { self.write(&protection) }
    }

    /// Records that a write or a flush of a pass failed. The first reason is kept.
    ///
    /// # Errors
    /// [`Error::Transition`] for any pass but the one that is open.
    pub fn fault(&self, machine: &Name, disk: &Name, pass: PassId, reason: &str) -> Result<(), Error> {
        self.change(machine, disk, |known| {
            match &known.state {
                State::Faulted(faulted, _) if faulted.id == pass => {}
                State::Receiving(open) if open.id == pass => {
                    let end =
                        (0..=file::MAX_REASON.min(reason.len())).rfind(|&at| reason.is_char_boundary(at));
                    let reason = reason[..end.unwrap_or(0)].to_owned();
                    known.state = State::Faulted(*open, Fault { time: now(), reason });
                }
                _ => return Err(format!("fault in pass {pass}")),
            }
            Ok(())
        })
    }

    /// Reads, changes and writes one assignment under the lock. `step` says what it refused to do.
    fn change(
        &self,
        machine: &Name,
        disk: &Name,
        step: impl FnOnce(&mut Assignment) -> Result<(), String>,
    ) -> Result<(), Error> {
        self.load(machine)?;
        let _exclusive = self.exclusive()?;
        let mut protection = self.load(machine)?;
        let before = protection.clone();
        let known = protection
            .disks
            .iter_mut()
            .find(|known| known.name == *disk)
            .ok_or_else(|| Error::NoDisk { machine: machine.clone(), disk: disk.clone() })?;
        let from = match &known.state {
            State::Receiving(pass) => format!("receiving pass {}", pass.id),
            State::Faulted(pass, _) => format!("faulted in pass {}", pass.id),
            state => state.name().to_owned(),
        };
        self.not_shared(machine, known)?;
        step(known).map_err(|step| Error::Transition {
            machine: machine.clone(),
            disk: disk.clone(),
            from,
            step,
        })?;
        if protection == before { Ok(()) } else { self.write(&protection) }
    }

    /// Refuses a disk that another machine's file names as well, as after an edit by hand. Files that cannot be
    /// read are passed over: they must not stop this machine, and were checked when the disk was assigned.
    fn not_shared(&self, machine: &Name, disk: &Assignment) -> Result<(), Error> {
        for (other, protection) in self.all()? {
            let Ok(protection) = protection else { continue };
            if other == *machine {
                continue;
            }
            if let Some(theirs) = protection.disks.into_iter().find(|theirs| theirs.id == disk.id) {
                return Err(Error::Shared { id: theirs.id, machine: other, disk: theirs.name });
            }
        }
        Ok(())
    }

    fn exists(&self, machine: &Name) -> Result<bool, IoError> {
        let path = self.file(machine);
        path.try_exists().map_err(|error| IoError::new("look for", path.display().to_string(), error))
    }

    /// Waits for the lock under which files are changed. It is held for the change of one file.
    fn exclusive(&self) -> Result<Exclusive, Error> {
        // One at a time: each makes the name of its directory durable.
        if let Some(retention) = self.machines.parent() {
            durable::private_dir(retention)?;
        }
        durable::private_dir(&self.machines)?;
        let lock = durable::lock(&self.machines.join(".lock"))?;
        Ok(Exclusive { _lock: lock })
    }

    /// Replaces the file of a machine, durably. The caller has the lock.
    ///
    /// What a crash leaves, step by step:
    ///
    /// 1. a temporary file is created, 2. written: the old file, and a temporary one that may be torn. Its name
    ///    begins with a dot, and nobody reads it.
    /// 3. the temporary file is synced: the same, but it is whole from here on, also after a power cut. Renamed
    ///    before that, it could be found empty under its final name.
    /// 4. it is renamed: the old file or the new one, each of them whole.
    /// 5. the directory is synced: the new file. Only now the caller is told.
    ///
    /// Where 5 fails the change may or may not be there after a crash. The caller is told that it failed, and
    /// every change can be made once more.
    fn write(&self, protection: &Protection) -> Result<(), Error> {
        let path = self.file(&protection.machine);
        let text = file::encode(protection)
            .map_err(|error| IoError::new("encode", path.display().to_string(), io::Error::other(error)))?;
        durable::write(&path, text.as_bytes(), 0o640)?;
        Ok(())
    }
}

/// Now, to the second: that is what the files are read for.
fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_nanosecond(0).unwrap_or(now)
}

/// Opens, or creates, a file and takes an advisory lock of it.
fn lock(path: &Path, how: FlockArg) -> Result<Flock<File>, IoError> {
    let mut file = durable::lock_file(path)?;
    loop {
        match Flock::lock(file, how) {
            Ok(lock) => return Ok(lock),
            Err((same, Errno::EINTR)) => file = same,
            Err((_, errno)) => return Err(IoError::new("lock", path.display().to_string(), errno)),
        }
    }
}

/// What a lock that somebody else has means to the caller; other errors stay what they are.
fn busy(error: IoError, taken: impl FnOnce() -> Error) -> Error {
    if error.source.kind() == io::ErrorKind::WouldBlock { taken() } else { error.into() }
}
