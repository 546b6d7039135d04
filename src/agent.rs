//! The service: configuration, logging, the instance lock, the control socket, status and metrics; and
//! [`serve`], which wires them to the network and the disks.

mod commit;
pub mod config;
pub mod control;
pub mod lock;
pub mod logging;
pub mod metrics;
mod receive;
mod refusal;
mod retention;
mod sessions;
pub mod status;
mod systemd;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tracing::Instrument;
use tracing::field::{Empty, display};

use crate::durable;
use crate::error::{IoError, chain};
use crate::net::keepalive;
use crate::net::message::Code;
use crate::net::session::{self, Ending, Guest, Lanes, Patience};
use crate::net::tls::{self, HandshakeError};
use crate::net::token::TokenStore;
use crate::points::{Begun, Log};
use crate::protection::{State, Store};
use crate::recovery::failover::{How, To, fail_over, undo};
use crate::storage::device;
use crate::sys::inherited;
use commit::Coordinator;
use config::{Config, KEYS};
use control::Control;
use receive::Receiver;
use status::{Board, Live, Service};
use systemd::{Pulses, Systemd};

/// Why the service does not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Another service runs.
    #[error(transparent)]
    Lock(#[from] lock::Error),
    /// The control socket cannot be opened.
    #[error("the control socket")]
    Control(#[from] control::Error),
    /// Refused: where before-images go must not be where the system lives.
    #[error(
        "the retention directory {} is on the root file system, which before-images would fill: mount a disk of its own there, or set `retention_dir` to a directory on one, or for trials `allow_root_retention = true`", .0.display()
    )]
    RootRetention(PathBuf),
    /// The points log cannot be read.
    #[error("the recovery points")]
    Points(#[from] crate::points::Error),
    /// The protections cannot be read.
    #[error("the protections")]
    Protections(#[from] crate::protection::Error),
    /// Somebody else listens there.
    #[error(
        "the port is taken: stop who has it (`ss -ltnp` shows that), or set another `listen` in the configuration"
    )]
    Taken(#[source] IoError),
    /// The keys cannot be made or read.
    #[error("the keys of the service")]
    Identity(#[from] tls::server::Error),
}

/// How much is read from a connection at once. TLS itself reads by records of 16 KiB at most, and by less where
/// its own buffer is short: every one of those would be a system call.
const READ_BUFFER: usize = 64 << 10;

/// How many connections may be open at once that have no place as a session (yet): a flood of them takes nothing from
/// the machines that are being received.
const STRANGERS: usize = 64;

/// How often it is looked for points to let go.
const KEEP: Duration = Duration::from_secs(5);

/// How long everything together gets to end when the service stops, which is to take 10 seconds at most: connections say
/// goodbye, and what is being recorded is recorded.
const DRAIN: Duration = Duration::from_secs(8);

/// Reads the configuration again, as for this run of the program.
pub type Reread = Box<dyn Fn() -> Result<Config, config::Error> + Send + Sync>;

/// Runs the service until SIGTERM or SIGINT; at a SIGHUP it takes on what `reread` gives.
pub fn serve(config: Config, reread: Reread) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("net")
        .build()
        .map_err(|error| IoError::new("start", "the runtime", error))?;
    let result = runtime.block_on(run(config, reread));
    // A thread that waits for a disk that hangs must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn run(config: Config, reread: Reread) -> Result<(), Error> {
    // Before anybody is told that it runs: a reload that comes early would end it otherwise.
    let signals = Signals::new()?;
    let config = Arc::new(config);
    let directory = &config.state_dir;
    durable::private_dir(directory)?;
    let _instance = lock::Instance::acquire(directory)?;
    let identity = tls::server::Identity::load_or_create(directory)?;
    let acceptor = TlsAcceptor::from(identity.server_config()?);
    let engine = device::probe(config.engine)?;
    let listener = listener(&config)?;
    let listen = listener
        .local_addr()
        .map_err(|error| IoError::new("ask for the address of", "the data port", error))?;
    let store = Store::open(&config.retention_dir);
    let coordinator = Arc::new(Coordinator::new(points(&config, &store)?));
    let live = Live::default();
    let service = Arc::new(Service::new(listen, engine.clone()));
    let board = Board::new(service.clone(), live.clone(), store.clone()).with_points(coordinator.clone());
    let board = Arc::new(board);
    let control = Control::bind(&config.control_socket)?;
    let (end, ending) = watch::channel(Ending::default());
    let mut asked_to_stop = ending.clone();
    let (pulses, systemd) = (Arc::<Pulses>::default(), Arc::new(Systemd::of_this_process()));
    let control = tokio::spawn(control.serve(board.clone(), end.clone(), async move {
        // An error means that the sender is gone, and with it the service.
        asked_to_stop.wait_for(|ending| ending.service).await.ok();
    }));
    let (current, configured) = watch::channel(config.clone());
    let keeper = {
        let (configured, store, live) = (configured.clone(), store.clone(), live.clone());
        let (coordinator, mut ending) = (coordinator.clone(), ending.clone());
        tokio::spawn(async move {
            // The look reads directories and small files: off the runtime, and never two at once.
            while timeout(KEEP, ending.wait_for(|ending| ending.service)).await.is_err() {
                let (config, store) = (configured.borrow().clone(), store.clone());
                let (coordinator, live) = (coordinator.clone(), live.clone());
                let look = move || retention::run(&config, &store, &coordinator, &live);
                if tokio::task::spawn_blocking(look).await.is_err() {
                    tracing::error!("the look at the retention failed; see above");
                }
            }
        })
    };
    {
        // It may take long, and the machine that it is about is refused meanwhile as before.
        let (config, store) = (config.clone(), store.clone());
        tokio::task::spawn_blocking(move || go_on(&config, &store));
    }
    let fingerprint = identity.fingerprint();
    tracing::info!(%listen, engine = %engine, %fingerprint, "listening");
    let tokens = TokenStore::new(directory);
    let front = Front {
        acceptor,
        strangers: Arc::default(),
        places: Arc::default(),
        lanes: Lanes::default(),
        configured: configured.clone(),
        service,
        ending,
        host: Arc::new(Receiver {
            config: configured,
            identity,
            tokens,
            store,
            live,
            coordinator,
            pulses: pulses.clone(),
        }),
    };
    systemd.tell_ready(&board);
    let teller = tokio::spawn(systemd.clone().keep_told(board.clone(), pulses));
    let reloads = Reloads { current, reread: Arc::new(reread), board, systemd: systemd.clone() };
    let result = front.accept(listener, signals, &reloads).await;
    teller.abort();
    systemd.tell_stopping().await;
    end.send_modify(|ending| ending.service = true);
    let mut sessions = result?;
    let deadline = Instant::now() + DRAIN;
    let drained = timeout_at(deadline, async { while sessions.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(sessions = sessions.len(), "connections did not end in time and are cut");
        sessions.shutdown().await;
    }
    // It ends by itself when the service stops.
    timeout_at(deadline, keeper).await.ok();
    match timeout_at(deadline, control).await {
        Ok(Ok(served)) => served?,
        Ok(Err(_)) | Err(_) => tracing::warn!("the control socket did not end in time"),
    }
    tracing::info!("stopped");
    Ok(())
}

/// The points log, settled, and the protections brought up to what it says: a crash may have come between the two.
fn points(config: &Config, store: &Store) -> Result<Log, Error> {
    let retention = &config.retention_dir;
    durable::private_dir(retention)?;
    if !config.allow_root_retention && on_root(retention)? {
        return Err(Error::RootRetention(retention.clone()));
    }
    let mut log = Log::open(&config.retention_dir)?;
    log.settle()?;
    for (machine, loaded) in store.all()? {
        let Ok(protection) = loaded else { continue };
        for disk in protection.disks {
            let State::Receiving(open) = &disk.state else { continue };
            let volume = log.newest(&machine).and_then(|point| {
                let volume = point.volumes_of(&machine).find(|volume| volume.disk == disk.name)?;
                (volume.sender_pass == open.id).then_some(point)
            });
            if let Some(point) = volume {
                store.commit_pass(&machine, &disk.name, open.id, disk.size.0, !point.fuzzy)?;
            }
        }
    }
    Ok(log)
}

/// Goes on with failovers, and their undoing, that were interrupted.
fn go_on(config: &Config, store: &Store) {
    let retention = &config.retention_dir;
    let log = |error: &dyn std::error::Error, what: &str| tracing::error!(error = chain(error), "{what}");
    let mut points = match Log::open(retention) {
        Ok(points) => points,
        Err(error) => return log(&error, "the recovery points"),
    };
    let begun: Vec<Begun> = points.all_begun().cloned().collect();
    for begun in begun {
        let (machine, engine) = (&begun.machine, config.engine);
        let span = tracing::error_span!("failover", %machine, point = begun.point.map(display));
        let _entered = span.enter();
        tracing::info!("{begun} was interrupted, and goes on");
        let done = match begun.point {
            Some(point) => {
                let how = How { fuzzy: true, dry_run: false, engine };
                fail_over(retention, store, &mut points, machine, &To::Id(point), how)
            }
            None => undo(retention, store, &mut points, machine, engine),
        };
        match done {
            Ok(_) => tracing::info!("{begun} is done"),
            Err(error) => log(&error, &format!("{begun} could not go on; call it again")),
        }
    }
}

/// Whether the directory lies on the file system of `/`, which before-images may fill.
fn on_root(directory: &Path) -> Result<bool, IoError> {
    let device = |path: &Path| {
        let look = std::fs::metadata(path);
        look.map(|found| found.dev())
            .map_err(|error| IoError::new("look at", path.display().to_string(), error))
    };
    Ok(device(directory)? == device(Path::new("/"))?)
}

/// The data port: that which systemd hands over, or the configured one.
fn listener(config: &Config) -> Result<TcpListener, Error> {
    let failed = |error| IoError::new("use", "the socket that systemd hands over", error);
    let listener = match inherited::listener().map_err(failed)? {
        Some(listener) => {
            tracing::info!("the data port is the socket that systemd hands over; `listen` says nothing");
            listener.set_nonblocking(true).map_err(failed)?;
            listener
        }
        None => config.bind().map_err(|error| match error.source.kind() {
            io::ErrorKind::AddrInUse => Error::Taken(error),
            _ => error.into(),
        })?,
    };
    Ok(TcpListener::from_std(listener)
        .map_err(|error| IoError::new("listen at", config.listen.to_string(), error))?)
}

/// What a reload of the configuration takes.
struct Reloads {
    current: watch::Sender<Arc<Config>>,
    reread: Arc<Reread>,
    board: Arc<Board>,
    systemd: Arc<Systemd>,
}

impl Reloads {
    /// Reads the configuration again and takes on what a running service can. A configuration with a mistake changes nothing.
    async fn reload(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => _ = self.systemd.tell(&[NotifyState::Reloading, now]),
            Err(error) => tracing::warn!(%error, "systemd could not be told of the reload"),
        }
        let again = self.reread.clone();
        let refused = match tokio::task::spawn_blocking(move || again()).await {
            Ok(Ok(wanted)) => {
                self.take_on(&wanted);
                None
            }
            Ok(Err(error)) => {
                let error = chain(&error);
                tracing::error!(error, "the configuration stays what it was, since it has mistakes now");
                Some(error)
            }
            Err(_) => {
                tracing::error!("the configuration could not be read again");
                Some("it could not be read".to_owned())
            }
        };
        self.board.reload_refused(refused.as_deref());
        self.systemd.tell_ready(&self.board);
    }

    fn take_on(&self, wanted: &Config) {
        let before = self.current.borrow().clone();
        let mut config = Config::clone(&before);
        let (mut taken, mut left) = (Vec::new(), Vec::new());
        for key in KEYS.iter().filter(|key| (key.show)(&before) != (key.show)(wanted)) {
            if key.reloads {
                (key.copy)(&mut config, wanted);
                taken.push(format!("{} = {}", key.name, (key.show)(wanted)));
            } else {
                left.push(key.name);
            }
        }
        self.current.send_replace(Arc::new(config));
        tracing::info!(changed = taken.join(", "), "the configuration was read again");
        if !left.is_empty() {
            tracing::warn!(
                keys = left.join(", "),
                "these keys were changed too, which only a restart of the service takes on"
            );
        }
    }
}

/// The signals that the service waits for.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Signals, IoError> {
        let wait = |kind| signal(kind).map_err(|error| IoError::new("wait for", "signals", error));
        Ok(Signals {
            terminate: wait(SignalKind::terminate())?,
            interrupt: wait(SignalKind::interrupt())?,
            hangup: wait(SignalKind::hangup())?,
        })
    }
}

/// Takes connections.
#[derive(Clone)]
struct Front {
    acceptor: TlsAcceptor,
    strangers: Arc<Strangers>,
    places: Arc<AtomicU32>,
    lanes: Lanes,
    configured: watch::Receiver<Arc<Config>>,
    service: Arc<Service>,
    ending: watch::Receiver<Ending>,
    host: Arc<Receiver>,
}

impl Front {
    /// Until a signal; returns the sessions that still run.
    async fn accept(
        &self,
        listener: TcpListener,
        mut signals: Signals,
        reloads: &Reloads,
    ) -> Result<JoinSet<()>, Error> {
        let mut sessions = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                // Ends of sessions are collected as they come.
                Some(_) = sessions.join_next() => continue,
                _ = signals.terminate.recv() => return Ok(sessions),
                _ = signals.interrupt.recv() => return Ok(sessions),
                Some(()) = signals.hangup.recv() => {
                    reloads.reload().await;
                    continue;
                }
            };
            match accepted {
                Ok((stream, peer)) => {
                    let (front, stranger) = (self.clone(), Stranger::admit(&self.strangers));
                    // Whatever is logged in it says of whom it is, as far as that is known, whatever the level.
                    let span =
                        tracing::error_span!("session", %peer, machine = Empty, disk = Empty, point = Empty);
                    sessions.spawn(async move { front.talk(stream, peer, stranger).await }.instrument(span));
                }
                Err(error) => {
                    // Out of descriptors, or the peer was gone already: the next try may do.
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn talk(&self, stream: TcpStream, peer: SocketAddr, stranger: Stranger) {
        self.service.sessions.fetch_add(1, Ordering::Relaxed);
        self.service.sessions_total.fetch_add(1, Ordering::Relaxed);
        let seat = stranger.seat.clone();
        let result = tokio::select! {
            result = self.session(stream, peer, stranger) => result,
            () = seat.lost() => Err(SessionError::CrowdedOut),
        };
        match result {
            Ok(()) => tracing::debug!("connection ended"),
            Err(error) => {
                if error.is_refusal() {
                    self.service.refused_total.fetch_add(1, Ordering::Relaxed);
                }
                if error.is_bad_frame() {
                    self.service.bad_frames_total.fetch_add(1, Ordering::Relaxed);
                }
                tracing::warn!(error = chain(&error), "connection ended");
            }
        }
        self.service.sessions.fetch_sub(1, Ordering::Relaxed);
    }

    async fn session(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        stranger: Stranger,
    ) -> Result<(), SessionError> {
        keepalive::set(&stream).map_err(HandshakeError::Io)?;
        let buffered = BufReader::with_capacity(READ_BUFFER, stream);
        let (most, patience) = {
            let config = self.configured.borrow();
            (config.max_sessions, Patience { idle: config.idle_timeout, ..Patience::default() })
        };
        let handshake = timeout(patience.handshake, self.acceptor.accept(buffered));
        let mut ending = self.ending.clone();
        let stream = tokio::select! {
            stream = handshake => stream.map_err(|_| SessionError::Slow)?.map_err(HandshakeError::from)?,
            // Nothing was said yet.
            _ = ending.wait_for(|ending| ending.service) => return Ok(()),
        };
        let machine = tls::machine_of(stream.get_ref().1.peer_certificates())?;
        if let Some(machine) = &machine {
            tracing::Span::current().record("machine", display(machine));
        }
        // Whoever showed a certificate of ours counts as a session, or joins one; who did not may only enrol, and goes on
        // counting as a stranger, as does who finds no room.
        let taken = machine.as_ref().and_then(|_| Place::take(&self.places, most));
        let room = taken.is_some();
        let place: Box<dyn Send> = match taken {
            Some(place) => {
                drop(stranger);
                Box::new(place)
            }
            None => Box::new(stranger),
        };
        let (host, ending) = (self.host.clone(), self.ending.clone());
        let guest = Guest { peer, machine, place, room };
        Ok(session::serve(stream, guest, host, &self.lanes, patience, ending).await?)
    }
}

/// A place as a session, until this is dropped: there are as many as the configuration says when one is asked for.
struct Place(Arc<AtomicU32>);

impl Place {
    fn take(taken: &Arc<AtomicU32>, most: u32) -> Option<Place> {
        let more = |taken| (taken < most).then_some(taken + 1);
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Place(taken.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The connections that have no place as a session, the oldest first. Where there are too many, the oldest must go:
/// one that means it is done with its handshake long before, and waiting for those that say nothing would lock out
/// the others.
#[derive(Default)]
struct Strangers(Mutex<VecDeque<Arc<Seat>>>);

/// What one of them sits on.
#[derive(Default)]
struct Seat {
    taken_away: Notify,
    left: AtomicBool,
}

impl Seat {
    /// Waits until it is taken away from a stranger that still sits on it. One that has left it by now is known: to end
    /// its connection would break off what it is in.
    async fn lost(&self) {
        self.taken_away.notified().await;
        if self.left.load(Ordering::Relaxed) {
            std::future::pending().await
        }
    }
}

/// One of them, until this is dropped.
struct Stranger {
    strangers: Arc<Strangers>,
    seat: Arc<Seat>,
}

impl Stranger {
    fn admit(strangers: &Arc<Strangers>) -> Stranger {
        let seat = Arc::new(Seat::default());
        let mut queue = strangers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() >= STRANGERS
            && let Some(oldest) = queue.pop_front()
        {
            oldest.taken_away.notify_one();
        }
        queue.push_back(seat.clone());
        Stranger { strangers: strangers.clone(), seat }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        // In the task that waits for it to be taken away, so that one of the two comes first.
        self.seat.left.store(true, Ordering::Relaxed);
        let mut queue = self.strangers.0.lock().unwrap_or_else(PoisonError::into_inner);
        queue.retain(|other| !Arc::ptr_eq(other, &self.seat));
    }
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("no TLS")]
    Handshake(#[from] HandshakeError),
    #[error("the TLS handshake took too long")]
    Slow,
    #[error("too many newer connections came that showed no certificate either")]
    CrowdedOut,
    #[error("the client's certificate names no machine")]
    Name(#[from] tls::NameError),
    #[error(transparent)]
    Session(#[from] session::Error),
}

impl SessionError {
    /// Whether the peer was not let in.
    fn is_refusal(&self) -> bool {
        match self {
            SessionError::Handshake(_)
            | SessionError::Name(_)
            | SessionError::Session(session::Error::Full)
            | SessionError::CrowdedOut => true,
            SessionError::Slow | SessionError::Session(_) => false,
        }
    }

    /// Whether it ended with a frame that was refused.
    fn is_bad_frame(&self) -> bool {
        let code = match self {
            SessionError::Session(session::Error::Wire(error)) => error.to_peer().map(|told| told.code),
            SessionError::Session(session::Error::Refused(refusal)) => Some(refusal.code),
            _ => None,
        };
        matches!(code, Some(Code::BadFrame | Code::BadChecksum | Code::OutOfRange | Code::Protocol))
    }
}

#[cfg(test)]
mod crash;
#[cfg(test)]
mod tests;
