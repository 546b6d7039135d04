//! How a machine is made to stand still while it is read, and what its point is worth for that.
//!
//! In this order: the pre-hook, the freeze, the reading of all disks, the thaw, the post-hook; and then the commits, for which
//! nobody need wait. A machine of a group does all of it between the two meetings of its group (see [`crate::net`]), so that
//! the moments at which its members stand still have one in common.
//!
//! Whatever happens after the pre-hook began (also a signal), [`Still::end`] thaws and runs the post-hook.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::freeze::{self, Frozen};
use super::hook;
use super::source::Source;
use crate::disk::discover::Sysroot;
use crate::name::Name;
use crate::points::{Kind, PointId};

/// What the user wants to be done around the reading.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// A command before.
    pub pre_hook: Option<String>,
    /// A command after.
    pub post_hook: Option<String>,
    /// How long each of them may take.
    pub hook_timeout: Duration,
    /// For how long file systems may be frozen, if they are to be.
    pub freeze: Option<Duration>,
}

/// Why a machine does not stand still, so that nothing of it is sent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A hook.
    #[error(transparent)]
    Hook(#[from] hook::Error),
    /// A file system.
    #[error(transparent)]
    Freeze(#[from] freeze::Error),
}

impl Error {
    /// Whether a rule or the present state refused it, rather than a failure. A pre-hook that fails says that this is no
    /// moment to send.
    pub fn is_refusal(&self) -> bool {
        match self {
            Error::Hook(_) => true,
            Error::Freeze(error) => error.is_refusal(),
        }
    }
}

/// What was read is worth this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Worth {
    pub(super) kind: Kind,
    /// Whether it is one moment of the disk.
    pub(super) point_in_time: bool,
}

/// One machine that stands still, is about to, or did.
#[derive(Debug)]
pub struct Still {
    wishes: Wishes,
    machine: Name,
    /// How many disks are still to be read.
    reading: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether nobody used the disks when the reading began, even without a freeze.
    unused: bool,
    /// What the sources were marked with then.
    marks: Vec<(Name, Arc<Source>, Option<String>)>,
    frozen: Option<Frozen>,
    /// Whether it was frozen, and not all the time.
    broke: bool,
    /// Whether somebody wrote to the sources all the same.
    written: bool,
    was_frozen: bool,
    /// Once the pre-hook began: what the hooks are told.
    environment: Option<Vec<(&'static str, String)>>,
    post_hook: Option<JoinHandle<Result<(), hook::Error>>>,
}

impl State {
    /// Marks the sources, and gives those of `still` that could be marked: of others it would not be seen that somebody writes
    /// to them.
    fn mark(&mut self, sources: &[(Name, Arc<Source>)], still: Vec<bool>) -> Vec<bool> {
        let mark = |(name, source): &(Name, Arc<Source>)| (name.clone(), source.clone(), source.mark());
        self.marks = sources.iter().map(mark).collect();
        self.marks.iter().zip(still).map(|((_, _, mark), still)| still && mark.is_some()).collect()
    }
}

impl Still {
    /// Of a machine of so many disks.
    pub fn new(machine: Name, disks: usize, wishes: Wishes) -> Still {
        Still { wishes, machine, reading: AtomicUsize::new(disks), state: Mutex::default() }
    }

    /// Runs the pre-hook and freezes what is mounted on the sources. `all_delta`: whether no disk is sent for the first
    /// time, which would take longer than anything may be frozen. Says of each source whether nobody should be writing to it
    /// from now on, so that what it says of its free space holds; whether somebody did all the same is seen at the end.
    pub(super) async fn begin(
        &self,
        point: PointId,
        group: Option<&Name>,
        sources: &[(Name, Arc<Source>)],
        all_delta: bool,
    ) -> Result<Vec<bool>, Error> {
        let mut state = self.state.lock().await;
        let disks: Vec<&str> = sources.iter().map(|(name, _)| name.as_str()).collect();
        let mut environment = vec![
            ("MT_AGENT_MACHINE", self.machine.to_string()),
            ("MT_AGENT_POINT", point.to_string()),
            ("MT_AGENT_DISKS", disks.join(",")),
        ];
        environment.extend(group.map(|group| ("MT_AGENT_GROUP", group.to_string())));
        state.environment = Some(environment.clone());
        if let Some(command) = &self.wishes.pre_hook {
            hook::run("pre-hook", command, &environment, self.wishes.hook_timeout).await?;
        }
        // Looked at after the hook, which may have changed it.
        let look = sources.to_vec();
        let looked = tokio::task::spawn_blocking(move || {
            let unused = look.iter().all(|(_, source)| source.mounts(&Sysroot::default()).is_empty());
            let devnos: Vec<Vec<String>> = look.iter().map(|(_, source)| source.devnos()).collect();
            // Read-only is as good as not mounted.
            let idle = |devnos: &Vec<String>| freeze::file_systems(devnos).is_ok_and(|all| all.is_empty());
            (unused, devnos.iter().map(idle).collect(), freeze::file_systems(&devnos.concat()))
        });
        let (unused, idle, systems): (_, Vec<bool>, _) = match looked.await {
            Ok(looked) => looked,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        state.unused = unused;
        let Some(limit) = self.wishes.freeze else {
            return Ok(state.mark(sources, idle));
        };
        let systems = systems?;
        if systems.is_empty() {
            tracing::warn!("nothing that is mounted here lies on the sources: there is nothing to freeze");
            return Ok(state.mark(sources, idle));
        }
        if !all_delta {
            tracing::warn!(
                "a disk is sent for the first time, which takes longer than anything may be frozen: this point is no moment; \
                 the next ones are"
            );
            return Ok(state.mark(sources, idle));
        }
        tracing::info!("frozen: {}", freeze::shown(&systems));
        let (frozen, is_ready) = Frozen::begin(systems, limit).await?;
        // From here on `end` knows of it.
        state.frozen = Some(frozen);
        is_ready.await.unwrap_or(Err(freeze::Error::Guard))?;
        state.was_frozen = true;
        Ok(state.mark(sources, vec![true; sources.len()]))
    }

    /// A disk was read to its end. With the last one the machine need not stand still any longer.
    pub(super) async fn read(&self) -> Worth {
        let last = self.reading.fetch_sub(1, Ordering::AcqRel) == 1;
        let mut state = self.state.lock().await;
        if last {
            // Before the thaw, after which everybody may write again.
            for (disk, source, before) in std::mem::take(&mut state.marks) {
                let mounted = state.unused && !source.mounts(&Sysroot::default()).is_empty();
                if mounted || source.mark() != before {
                    tracing::warn!(%disk, "somebody wrote to the source while it was read: the point is no moment");
                    state.written = true;
                }
            }
            self.let_go(&mut state).await;
        }
        let holds = match &state.frozen {
            Some(frozen) => frozen.holds(),
            None => state.was_frozen && !state.broke,
        };
        let kind = match (&self.wishes, holds) {
            (_, false) if state.was_frozen => Kind::Crash,
            (Wishes { pre_hook: Some(_), post_hook: Some(_), .. }, _) => Kind::Application,
            (_, true) => Kind::Filesystem,
            (_, false) => Kind::Crash,
        };
        Worth { kind, point_in_time: (holds || state.unused) && !state.written }
    }

    /// Thaws, and starts the post-hook.
    async fn let_go(&self, state: &mut State) {
        if let Some(frozen) = state.frozen.take() {
            state.broke = !frozen.thaw().await;
        }
        if let (Some(environment), Some(command)) = (state.environment.take(), self.wishes.post_hook.clone())
        {
            let limit = self.wishes.hook_timeout;
            state.post_hook =
                Some(tokio::spawn(
                    async move { hook::run("post-hook", &command, &environment, limit).await },
                ));
        }
    }

    /// Thaws and runs the post-hook, if that was not done, and waits for its end. To be called whatever happened, when
    /// nobody uses this any more.
    ///
    /// # Errors
    /// That of the post-hook.
    pub async fn end(&self) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        self.let_go(&mut state).await;
        match state.post_hook.take() {
            None => Ok(()),
            Some(running) => match running.await {
                Ok(result) => Ok(result?),
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            },
        }
    }
}
