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
    /// Whether nobody could write to the sources when the reading began.
    quiet: bool,
    /// What the sources were marked with then.
    marks: Vec<(Name, Arc<Source>, Option<String>)>,
    frozen: Option<Frozen>,
    /// The device numbers of the files of what was frozen.
    numbers: Vec<String>,
    /// Whether it was frozen, and not all the time.
    broke: bool,
    /// Whether somebody wrote to the sources all the same.
    written: bool,
    was_frozen: bool,
    /// Once the pre-hook began: what the hooks are told.
    environment: Option<Vec<(&'static str, String)>>,
    post_hook: Option<JoinHandle<Result<(), hook::Error>>>,
}

/// What was done about those who could write to the sources.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Freeze {
    /// Nothing was asked for.
    No,
    /// Nothing: a first pass takes too long.
    FirstPass,
    /// What can be frozen is.
    Done,
    /// It was asked for, and nothing was done yet: a dry run.
    Later,
}

/// Why what is free of a source may be in use before it is read: because somebody writes to it, or because it would not be
/// seen. None where neither is so.
pub(super) fn unsteady(source: &Source, writers: &[String], freeze: Freeze) -> Option<String> {
    if writers.is_empty() {
        let uncounted = "it does not count what is written to it (queue/iostats is 0, or the file of a loop device cannot be reached \
                         here), so that nobody would notice if what is free of it were used before it is read";
        return (!source.is_counted()).then(|| uncounted.to_owned());
    }
    let advice = match freeze {
        Freeze::No => "with --freeze it is left out (not in a first pass), and so it is of a snapshot",
        Freeze::FirstPass => {
            "nothing is frozen in a first pass; the next one leaves it out, and so does one of a snapshot"
        }
        Freeze::Done => "--freeze does not reach that; of a snapshot it is left out",
        Freeze::Later => "it is looked for once that is frozen (not in a first pass)",
    };
    let writers = writers.join("; ");
    Some(format!(
        "it is in use ({writers}), so that what is free of it may be in use before it is read: {advice}"
    ))
}

impl Still {
    /// Of a machine of so many disks.
    pub fn new(machine: Name, disks: usize, wishes: Wishes) -> Still {
        Still { wishes, machine, reading: AtomicUsize::new(disks), state: Mutex::default() }
    }

    /// Runs the pre-hook and freezes what is mounted on the sources. `all_delta`: whether no disk is sent for the first
    /// time, which would take longer than anything may be frozen. Says of each source why somebody may be writing to it from
    /// now on, so that what it says of its free space does not hold, if so; whether somebody did all the same is seen at the
    /// end.
    pub(super) async fn begin(
        &self,
        point: PointId,
        group: Option<&Name>,
        sources: &[(Name, Arc<Source>)],
        all_delta: bool,
    ) -> Result<Vec<Option<String>>, Error> {
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
        let freeze = match self.wishes.freeze {
            None => Freeze::No,
            Some(_) if !all_delta => Freeze::FirstPass,
            Some(limit) => {
                self.freeze(&mut state, sources, limit).await?;
                Freeze::Done
            }
        };
        let (all, numbers) = (sources.to_vec(), state.numbers.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let look = |(name, source): (Name, Arc<Source>)| {
                // Before its users are looked at: who comes in between is found among them, or at the end.
                let mark = source.mark();
                let writers = source.writers(&numbers);
                let why = unsteady(&source, &writers, freeze);
                if let (Freeze::Done, false) = (freeze, writers.is_empty()) {
                    let writers = writers.join("; ");
                    tracing::warn!(disk = %name, "{writers}: that is not frozen, so the point is no moment");
                }
                ((name, source, mark), writers.is_empty(), why)
            };
            all.into_iter().map(look).collect::<Vec<_>>()
        });
        let looked = match looked.await {
            Ok(looked) => looked,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        state.quiet = looked.iter().all(|(_, quiet, _)| *quiet);
        if freeze == Freeze::FirstPass && !state.quiet {
            tracing::warn!(
                "a disk is sent for the first time, which takes longer than anything may be frozen: this point is no moment; \
                 the next ones are"
            );
        }
        let mut reasons = Vec::new();
        for (mark, _, why) in looked {
            state.marks.push(mark);
            reasons.push(why);
        }
        Ok(reasons)
    }

    /// Freezes what is mounted on the sources and can be written to.
    async fn freeze(
        &self,
        state: &mut State,
        sources: &[(Name, Arc<Source>)],
        limit: Duration,
    ) -> Result<(), Error> {
        let look = sources.to_vec();
        let looked = tokio::task::spawn_blocking(move || {
            let devnos: Vec<String> = look.iter().flat_map(|(_, source)| source.devnos()).collect();
            freeze::file_systems(&devnos)
        });
        let systems = match looked.await {
            Ok(looked) => looked?,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        if systems.is_empty() {
            tracing::warn!("nothing that is mounted here lies on the sources: there is nothing to freeze");
            return Ok(());
        }
        tracing::info!("frozen: {}", freeze::shown(&systems));
        state.numbers = systems.iter().map(|system| system.devno.clone()).collect();
        let (frozen, is_ready) = Frozen::begin(systems, limit).await?;
        // From here on `end` knows of it.
        state.frozen = Some(frozen);
        is_ready.await.unwrap_or(Err(freeze::Error::Guard))?;
        state.was_frozen = true;
        Ok(())
    }

    /// A disk was read to its end. With the last one the machine need not stand still any longer.
    pub(super) async fn read(&self) -> Worth {
        let last = self.reading.fetch_sub(1, Ordering::AcqRel) == 1;
        let mut state = self.state.lock().await;
        if last {
            // Before the thaw, after which everybody may write again.
            let (marks, numbers, quiet) =
                (std::mem::take(&mut state.marks), state.numbers.clone(), state.quiet);
            let looked = tokio::task::spawn_blocking(move || {
                // Of what somebody could write to all the time no more is to be said.
                let wrote = |(_, source, before): &(Name, Arc<Source>, Option<String>)| {
                    source.mark() != *before || quiet && !source.writers(&numbers).is_empty()
                };
                marks.into_iter().filter(wrote).map(|(disk, ..)| disk).collect::<Vec<_>>()
            });
            let written = match looked.await {
                Ok(written) => written,
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            };
            for disk in written {
                tracing::warn!(%disk, "somebody wrote to the source while it was read: the point is no moment");
                state.written = true;
            }
            self.let_go(&mut state).await;
        }
        let holds = match &state.frozen {
            Some(frozen) => frozen.holds(),
            None => state.was_frozen && !state.broke,
        };
        let point_in_time = state.quiet && !state.written && (holds || !state.was_frozen);
        let kind = match &self.wishes {
            _ if state.was_frozen && !holds => Kind::Crash,
            Wishes { pre_hook: Some(_), post_hook: Some(_), .. } => Kind::Application,
            _ if state.was_frozen && point_in_time => Kind::Filesystem,
            _ => Kind::Crash,
        };
        Worth { kind, point_in_time }
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
