//! Freezes file systems while they are read, and thaws them whatever happens.
//!
//! A frozen file system keeps every writer waiting, so nothing may be left frozen: not when the sender fails, not when it
//! is killed, not when it takes too long. A process of its own sees to that, the *guard*: this program again, with the
//! hidden command [`GUARD`]. It freezes, waits for the end of its standard input or for the limit, and thaws. Its input
//! ends when the sender says so, and when the sender is gone, however it went. It ignores what ends other processes; where
//! it is killed all the same, the sender thaws. Only whoever kills both at once leaves frozen what was frozen.
//!
//! # What must not be written to
//!
//! Whoever writes to a frozen file system waits for its thaw. The guard writes only to its pipe. The sender reads: its
//! identity before, and the sources' devices, which a freeze does not stop. It writes nothing but its output, so it refuses
//! to freeze the file system on which the file lies to which that goes. So `/` can be frozen like any other.
//!
//! A file system may lie in a file of another one. Freezing it writes to that file, so it is frozen first: the later one is
//! mounted, the earlier. And so does thawing it: so all are thawed side by side, and it waits for the other one.
//!
//! # The guard's lines
//!
//! `frozen` once all are, or `failed INDEX ERRNO`; and at the end `thawed`, or `late` where the limit had passed, or
//! `broken` where somebody else had thawed one before.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::unistd::{setsid, syncfs};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::disk::discover::Sysroot;
use crate::disk::discover::roles::{self, FileSystem};
use crate::error::IoError;
use crate::sys::ioctl;

/// The hidden command of the guard: `hold-frozen MILLISECONDS FILE…`.
pub const GUARD: &str = "hold-frozen";

/// Why file systems are not frozen. None is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Not every file system can be.
    #[error(
        "the file system at {} cannot be frozen, so what is read of it would be no moment; mount it read-only while it is \
         sent (`mount -o remount,ro {}`, for instance in --pre-hook), or unmount it", .0.display(), .0.display()
    )]
    Unable(PathBuf),
    /// Somebody else did it.
    #[error(
        "the file system at {} is frozen already: whoever did that may thaw it at any moment (`fsfreeze --unfreeze {}` \
         does, if nobody did)", .0.display(), .0.display()
    )]
    Already(PathBuf),
    /// It is not where it was mounted.
    #[error("the file system of {} is not reached there: something else is mounted over it", .0.display())]
    Hidden(PathBuf),
    /// Writing the output would wait for the thaw.
    #[error(
        "the output of this command goes to a file on the file system at {}, and would wait for its thaw: send it \
         elsewhere, through a pipe or to a file system that is not sent", .0.display()
    )]
    Output(PathBuf),
    /// What is mounted is not known.
    #[error("{0}")]
    Unknown(String),
    /// It took too long.
    #[error("the file systems were not frozen within {} s: they write out what they hold first; raise the limit", .0.as_secs())]
    Slow(Duration),
    /// It was killed.
    #[error("the process that freezes ended before it had")]
    Guard,
}

impl Error {
    /// Whether a rule or the present state refused it, rather than a failure.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Error::Io(_) | Error::Guard)
    }
}

/// How long a thaw may take: it writes a block.
const THAW: Duration = Duration::from_secs(30);

/// A file system and the open directory where it is mounted.
type Held = (PathBuf, File);

/// File systems that are frozen, or about to be. Dropped, they are thawed.
#[derive(Debug)]
pub(super) struct Frozen {
    /// Its end tells the guard to thaw.
    stay: ChildStdin,
    /// Has the guard ended, and what it should have done done here.
    give_up: oneshot::Sender<()>,
    /// Ends with the guard: whether everything was frozen up to the end.
    watching: JoinHandle<bool>,
}

impl Frozen {
    /// Begins to freeze these file systems, which are in the order in which they were mounted, for `limit` at most. The
    /// receiver hears how that went.
    pub(super) async fn begin(
        systems: Vec<FileSystem>,
        limit: Duration,
    ) -> Result<(Frozen, oneshot::Receiver<Result<(), Error>>), Error> {
        let opened = tokio::task::spawn_blocking(move || open(&systems)).await;
        let held = match opened {
            Ok(opened) => opened?,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let failed = |op| move |error| Error::Io(IoError::new(op, "the process that freezes", error));
        let this = std::process::id();
        let mut guard = Command::new("/proc/self/exe")
            .arg(GUARD)
            .arg(limit.as_millis().to_string())
            .args(held.iter().map(|(_, file)| format!("/proc/{this}/fd/{}", file.as_raw_fd())))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed("start"))?;
        let (Some(stay), Some(lines)) = (guard.stdin.take(), guard.stdout.take()) else {
            return Err(failed("talk to")(io::ErrorKind::BrokenPipe.into()));
        };
        let (ready, is_ready) = oneshot::channel();
        let (give_up, given_up) = oneshot::channel();
        let watching = tokio::spawn(watch(guard, lines, held, limit, ready, given_up));
        Ok((Frozen { stay, give_up, watching }, is_ready))
    }

    /// Whether everything is still frozen.
    pub(super) fn holds(&self) -> bool {
        !self.watching.is_finished()
    }

    /// Thaws; whether everything was frozen until now.
    pub(super) async fn thaw(self) -> bool {
        let Frozen { stay, give_up, mut watching } = self;
        drop(stay);
        if let Ok(held) = timeout(THAW, &mut watching).await {
            return held.unwrap_or(false);
        }
        give_up.send(()).ok();
        match timeout(THAW, watching).await {
            Ok(_) => false,
            Err(_) => {
                tracing::error!(
                    "a file system is not thawed after {} s: see whether its disk still answers; the point is no moment",
                    2 * THAW.as_secs()
                );
                false
            }
        }
    }
}

/// Opens where the file systems are mounted, and has them write out what they hold, so that the freeze takes a moment.
fn open(systems: &[FileSystem]) -> Result<Vec<Held>, Error> {
    let mut held = Vec::new();
    // The last one first: it may lie in a file of another one.
    for system in systems.iter().rev() {
        let mut found = None;
        for point in &system.points {
            let failed = |op| move |error: io::Error| IoError::new(op, point.display().to_string(), error);
            let file = File::open(point).map_err(failed("open"))?;
            let number = file.metadata().map_err(failed("look at"))?.dev();
            let number = format!("{}:{}", nix::sys::stat::major(number), nix::sys::stat::minor(number));
            // The subvolumes of btrfs have numbers of their own.
            if number == system.devno || system.devno.starts_with("0:") {
                found = Some((point.clone(), file));
                break;
            }
        }
        let Some((point, file)) = found else {
            return Err(Error::Hidden(system.points.first().cloned().unwrap_or_default()));
        };
        let device = file
            .metadata()
            .map_err(|error| IoError::new("look at", point.display().to_string(), error))?
            .dev();
        if output_lies_on(device) {
            return Err(Error::Output(point));
        }
        syncfs(&file).map_err(|errno| IoError::new("flush", point.display().to_string(), errno))?;
        held.push((point, file));
    }
    Ok(held)
}

/// Whether standard output or error is a file there.
fn output_lies_on(device: u64) -> bool {
    let is_there = |file: io::Result<File>| {
        file.and_then(|file| file.metadata()).is_ok_and(|meta| meta.is_file() && meta.dev() == device)
    };
    let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    is_there(own(io::stdout().as_fd())) || is_there(own(io::stderr().as_fd()))
}

/// Hears what the guard says, to its end; thaws in its place where it is gone.
async fn watch(
    mut guard: Child,
    lines: ChildStdout,
    held: Vec<Held>,
    limit: Duration,
    ready: oneshot::Sender<Result<(), Error>>,
    mut given_up: oneshot::Receiver<()>,
) -> bool {
    let mut lines = BufReader::new(lines).lines();
    let stuck = tokio::time::sleep(limit + THAW);
    let mut stuck = std::pin::pin!(stuck);
    // A guard that is stopped neither thaws nor says anything: it is ended, and what it should have done is done here.
    let mut next = async || {
        tokio::select! {
            line = lines.next_line() => line.ok().flatten(),
            () = &mut stuck => None,
            Ok(()) = &mut given_up => None,
        }
    };
    let mut said = next().await;
    let answer = match said.as_deref().map(|said| said.split(' ').collect::<Vec<_>>()).as_deref() {
        Some(["frozen"]) => Ok(()),
        Some(["failed", index, errno]) => {
            let point = index.parse().ok().and_then(|index: usize| held.get(index));
            let point = point.map(|(point, _)| point.clone()).unwrap_or_default();
            Err(match errno.parse().map(Errno::from_raw) {
                Ok(Errno::EOPNOTSUPP) => Error::Unable(point),
                Ok(Errno::EBUSY) => Error::Already(point),
                Ok(errno) => IoError::new("freeze", point.display().to_string(), errno).into(),
                Err(_) => Error::Guard,
            })
        }
        Some(["late"]) => Err(Error::Slow(limit)),
        _ => Err(Error::Guard),
    };
    let was_frozen = answer.is_ok();
    // Whoever asked may be gone.
    ready.send(answer).ok();
    if was_frozen {
        said = next().await;
    }
    match said.as_deref() {
        Some("thawed") => {}
        Some("late") if was_frozen => tracing::warn!(
            "the file systems were thawed before everything was read, because {} s had passed: the point is no moment",
            limit.as_secs()
        ),
        Some("broken") => tracing::warn!("a file system was thawed by somebody else: the point is no moment"),
        Some(_) => {}
        None => {
            // It may be stopped, and must not freeze or thaw anything later.
            guard.start_kill().ok();
            tracing::warn!(
                "the process that freezes was ended, or did not answer: the file systems are thawed, and the point is no moment"
            );
            let thaw = |(_, file): Held| tokio::task::spawn_blocking(move || drop(ioctl::thaw(&file)));
            for thawing in held.into_iter().map(thaw).collect::<Vec<_>>() {
                thawing.await.ok();
            }
        }
    }
    guard.wait().await.ok();
    was_frozen && said.as_deref() == Some("thawed")
}

/// The guard: freezes the file systems of these files, and thaws them when standard input ends or `limit` has passed.
///
/// # Errors
/// Where a file cannot be opened; nothing is frozen then.
pub fn hold(limit: Duration, files: &[PathBuf]) -> Result<(), IoError> {
    // Nothing but the end of its input ends it: not what ends the sender, nor the terminal.
    SigSet::all().thread_block().map_err(|errno| IoError::new("block", "signals", errno))?;
    // In a session of its own already, or of no importance.
    setsid().ok();
    // Not everywhere allowed.
    fs::write("/proc/self/oom_score_adj", "-1000").ok();
    let until = Instant::now() + limit;
    let open = |path: &PathBuf| {
        File::open(path).map_err(|error| IoError::new("open", path.display().to_string(), error))
    };
    let files: Arc<[File]> = files.iter().map(open).collect::<Result<_, _>>()?;
    let shared = Arc::new(Shared::default());
    let freezer = {
        let (files, shared) = (files.clone(), shared.clone());
        std::thread::spawn(move || {
            for (index, file) in files.iter().enumerate() {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                match ioctl::freeze(file) {
                    Ok(()) => shared.frozen.store(index as u32 + 1, Ordering::SeqCst),
                    Err(error) => {
                        say(&format!("failed {index} {}", error.raw_os_error().unwrap_or(0)));
                        shared.failed.store(true, Ordering::SeqCst);
                        return;
                    }
                }
            }
            say("frozen");
        })
    };
    let mut late = false;
    while !shared.failed.load(Ordering::SeqCst) && !input_ended(Duration::from_millis(20)) {
        late = Instant::now() >= until;
        if late {
            break;
        }
    }
    shared.stop.store(true, Ordering::SeqCst);
    let mut thawing = Vec::new();
    loop {
        let done = freezer.is_finished();
        let frozen = shared.frozen.load(Ordering::SeqCst) as usize;
        for index in thawing.len()..frozen {
            let files = files.clone();
            thawing.push(std::thread::spawn(move || ioctl::thaw(&files[index]).is_ok()));
        }
        if done {
            break;
        }
        // The next one is being frozen, and may wait for one that is.
        std::thread::sleep(Duration::from_millis(20));
    }
    let broken = !thawing.into_iter().all(|one| one.join().unwrap_or(false));
    match (broken, late) {
        _ if shared.failed.load(Ordering::SeqCst) => {}
        (true, _) => say("broken"),
        (false, true) => say("late"),
        (false, false) => say("thawed"),
    }
    Ok(())
}

/// What the guard's two threads share.
#[derive(Default)]
struct Shared {
    /// How many of the file systems are frozen, in their order.
    frozen: AtomicU32,
    failed: AtomicBool,
    stop: AtomicBool,
}

/// That nobody listens any more is no reason to stop.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
}

/// Whether standard input ended, after waiting a moment for it.
fn input_ended(moment: Duration) -> bool {
    let input = io::stdin();
    let mut wait = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    match poll(&mut wait, PollTimeout::try_from(moment).unwrap_or(PollTimeout::ZERO)) {
        Ok(0) | Err(Errno::EINTR) => false,
        // Nobody writes to it.
        Ok(_) | Err(_) => true,
    }
}

/// The file systems that lie on these devices.
pub(super) fn file_systems(devnos: &[String]) -> Result<Vec<FileSystem>, Error> {
    let systems = roles::file_systems(&Sysroot::default(), devnos).map_err(Error::Unknown)?;
    // What nobody can write to stands still.
    Ok(systems.into_iter().filter(|system| !system.read_only).collect())
}

/// For messages.
pub(super) fn shown(systems: &[FileSystem]) -> String {
    let points = systems.iter().filter_map(|system| system.points.first());
    points.map(|point| point.display().to_string()).collect::<Vec<_>>().join(", ")
}
