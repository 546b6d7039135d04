//! The control socket: HTTP/1.1 on a Unix socket, for `mt-agent status`, monitoring and `curl --unix-socket`.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | the [`Report`](super::status::Report) in JSON |
//! | `GET /metrics` | [`super::metrics`] |
//! | `POST /v1/machines/NAME/end-sessions` | `{"seconds": 60}`: the sessions of the machine end, and for so long new ones are refused |
//! | `POST /v1/machines/NAME/receive` | `{}`: takes that back |
//! | `POST /v1/machines/NAME/changed` | `{}`: writes to the service's log whether the points log says that it is failed over |
//! | anything else | an error in JSON: `{"error": "…"}` with 404 or 405 |
//!
//! The socket's mode is 0660: whoever may read and write it may see everything here, and end sessions, which is what
//! `mt-agent failover` does. Nothing else can be changed by it.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Path as Named, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;
use tokio::net::UnixListener;
use tokio::sync::watch;

use super::metrics;
use super::status::Board;
use crate::error::{IoError, chain};
use crate::name::Name;
use crate::net::session::Ending;

/// The longest path of a Unix socket, in bytes: `sun_path` of unix(7) has 108 with the zero at its end.
const LONGEST_PATH: usize = 107;

/// For how long nothing is received for a machine whose sessions were ended: whoever asked for it has to get hold of its
/// disks until then, before a sender that tries again does.
pub const BARRED: Duration = Duration::from_secs(60);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Another service answers on it.
    #[error("another mt-agent answers on {}; stop it first, or set `control_socket`", .0.display())]
    Refused(PathBuf),
    /// The path cannot be a socket's.
    #[error("{} cannot be the control socket: {what}; set `control_socket`", path.display())]
    Config {
        /// The path.
        path: PathBuf,
        /// Why.
        what: &'static str,
    },
}

/// The control socket; its file is removed when this is dropped, unless it is somebody else's by then.
#[derive(Debug)]
pub struct Control {
    listener: Option<UnixListener>,
    path: PathBuf,
    // Device and inode.
    file: (u64, u64),
}

impl Control {
    /// Listens at `path`, whose directory is created where it is missing. A socket that nobody answers on is
    /// replaced; anything else that lies there is left alone. Needs a tokio runtime around it.
    pub fn bind(path: &Path) -> Result<Control, Error> {
        let failed = |op, error| IoError::new(op, path.display().to_string(), error);
        let config = |what| Error::Config { path: path.to_owned(), what };
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(config("it names no file"));
        };
        let mut fresh = name.to_owned();
        fresh.push(".new");
        let fresh = directory.join(fresh);
        if fresh.as_os_str().len() > LONGEST_PATH {
            return Err(config("it is too long"));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(|error| IoError::new("create", directory.display().to_string(), error))?;
        match fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => return Err(config("something else lies there")),
            Ok(_) => match UnixStream::connect(path) {
                Ok(_) => return Err(Error::Refused(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                // Its queue is full: somebody is there, however busy.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Error::Refused(path.to_owned()));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("connect to", error).into()),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at", error).into()),
        }
        // Made beside its place and moved there when its mode is right: at no moment can it be reached by those
        // who may not, and whoever connects finds a service or an old socket, never nothing.
        match fs::remove_file(&fresh) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("replace", error).into()),
        }
        let listener = UnixListener::bind(&fresh).map_err(|error| failed("listen at", error))?;
        fs::set_permissions(&fresh, Permissions::from_mode(0o660))
            .map_err(|error| failed("set the mode of", error))?;
        let meta = fs::symlink_metadata(&fresh).map_err(|error| failed("look at", error))?;
        fs::rename(&fresh, path).map_err(|error| failed("rename", error))?;
        Ok(Control { listener: Some(listener), path: path.to_owned(), file: (meta.dev(), meta.ino()) })
    }

    /// Answers until `stop` completes; requests that are under way by then are answered.
    pub async fn serve(
        mut self,
        board: Arc<Board>,
        ending: watch::Sender<Ending>,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), Error> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let sampled = board.clone();
        let sampler = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs(1));
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
            loop {
                tick.tick().await;
                sampled.sample(Instant::now());
            }
        });
        let served = axum::serve(listener, router(board, ending)).with_graceful_shutdown(stop).await;
        sampler.abort();
        served.map_err(|error| IoError::new("serve", self.path.display().to_string(), error).into())
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(file = %self.path.display(), %error, "left behind");
        }
    }
}

fn router(board: Arc<Board>, ending: watch::Sender<Ending>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/metrics", get(metrics))
        .route("/v1/machines/{machine}/changed", post(changed))
        .with_state(board)
        .route("/v1/machines/{machine}/end-sessions", post(end_sessions))
        .route("/v1/machines/{machine}/receive", post(receive))
        .with_state(ending)
        .fallback(async || {
            let text = "there is only /v1/status, /metrics, and what ends the sessions of a machine here";
            failure(StatusCode::NOT_FOUND, text.to_owned())
        })
        .method_not_allowed_fallback(async || {
            failure(StatusCode::METHOD_NOT_ALLOWED, "this is not how it is asked for here".to_owned())
        })
}

async fn end_sessions(
    State(ending): State<watch::Sender<Ending>>,
    Named(machine): Named<String>,
) -> Response {
    let machine: Name = match machine.parse() {
        Ok(machine) => machine,
        Err(error) => return failure(StatusCode::BAD_REQUEST, format!("{error}")),
    };
    tracing::info!(%machine, "its sessions end, as the control socket was asked");
    ending.send_modify(|ending| {
        let now = Instant::now();
        ending.machines.retain(|_, until| *until > now);
        ending.machines.insert(machine, now + BARRED);
    });
    Json(json!({ "seconds": BARRED.as_secs() })).into_response()
}

/// A command has failed the machine over, or taken that back: whoever reads the service's log finds it there, too. What it says
/// comes from the points log, not from whoever asks.
async fn changed(State(board): State<Arc<Board>>, Named(machine): Named<String>) -> Response {
    let machine: Name = match machine.parse() {
        Ok(machine) => machine,
        Err(error) => return failure(StatusCode::BAD_REQUEST, format!("{error}")),
    };
    answer(move || {
        board.log_standing(&machine).map_err(|error| chain(&error))?;
        Ok(Json(json!({})).into_response())
    })
    .await
}

async fn receive(State(ending): State<watch::Sender<Ending>>, Named(machine): Named<String>) -> Response {
    ending.send_modify(|ending| ending.machines.retain(|known, _| known.as_str() != machine));
    Json(json!({})).into_response()
}

fn failure(status: StatusCode, error: String) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
}

async fn status(State(board): State<Arc<Board>>) -> Response {
    answer(move || {
        let report = board.report().map_err(|error| error.to_string())?;
        Ok(Json(report).into_response())
    })
    .await
}

async fn metrics(State(board): State<Arc<Board>>) -> Response {
    answer(move || {
        let report = board.report().map_err(|error| error.to_string())?;
        let text = metrics::text(&board, report).map_err(|error| error.to_string())?;
        Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
    })
    .await
}

/// The files of the protections are read on a thread that may block.
async fn answer(make: impl FnOnce() -> Result<Response, String> + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(make).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => failure(StatusCode::INTERNAL_SERVER_ERROR, error),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
