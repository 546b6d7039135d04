//! `mt-agent status`: what the service does, over its control socket.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use mt_agent::agent::status::{Report, SCHEMA_VERSION, VolumeReport};
use mt_agent::error::IoError;
use mt_agent::name::Name;
use mt_agent::units::{ByteLen, rfc3339};

use super::Failure;
use super::places::Places;
use super::table;

/// The longest answer that is read, in bytes.
const LONGEST_ANSWER: usize = 64 << 20;
/// The longest that an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Show the machines that are received and how far each of their disks is.
#[derive(clap::Args)]
pub struct Args {
    /// Only this machine
    machine: Option<Name>,
    /// Print the report as JSON, with sizes in bytes and durations in seconds
    #[arg(long)]
    json: bool,
    /// Print it again every second
    #[arg(long)]
    watch: bool,
    /// The control socket, instead of the configured one
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    places: Places,
}

/// Why the service did not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(
        "the service is not running: nobody answers on {}; start it with \
         `mt-agent serve`", .0.display()
    )]
    NotRunning(PathBuf),
    #[error("cannot reach the service; run this as root or as a member of the socket's group")]
    Denied(#[source] IoError),
    #[error(transparent)]
    Io(#[from] IoError),
    #[error("the service did not answer on {} within {} s; see `journalctl -u mt-agent`", .0.display(), PATIENCE.as_secs())]
    Silent(PathBuf),
    #[error("what answers on {} is not mt-agent", .0.display())]
    Foreign(PathBuf, #[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the service answered {0}: {1}")]
    Refused(StatusCode, String),
    #[error(
        "the service reports in schema {0}, and this mt-agent knows {SCHEMA_VERSION}; use the same version of both"
    )]
    Schema(u64),
    #[error("no disk is assigned to machine {0}; see `mt-agent protect list`")]
    NoMachine(Name),
}

/// Prints the report, once or every second.
pub fn run(args: Args) -> Result<(), Failure> {
    let socket = match &args.socket {
        Some(socket) => socket.clone(),
        None => args.places.load()?.control_socket,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(IoError::new("start", "the runtime", error)))?;
    let clear = args.watch && !args.json && io::stdout().is_terminal();
    loop {
        let text = runtime.block_on(fetch(&socket)).and_then(|report| render(report, &args));
        let text = text.map_err(|error| match error {
            Error::NoMachine(_) | Error::NotRunning(_) | Error::Denied(_) => Failure::refused(error),
            _ => Failure::failed(error),
        })?;
        let mut out = io::stdout().lock();
        // Home, the text, and only then what is left of the longer text before: clearing first would flicker.
        let written = if clear {
            let text = text.replace('\n', "\x1b[K\n");
            write!(out, "\x1b[H{text}\x1b[J")
        } else {
            out.write_all(text.as_bytes())
        };
        match written.and_then(|()| out.flush()) {
            Ok(()) => {}
            // `| head`: whoever reads has enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Failure::failed(IoError::new("write", "the report", error))),
        }
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn render(mut report: Report, args: &Args) -> Result<String, Error> {
    if let Some(machine) = &args.machine {
        report.machines.retain(|known| known.machine == *machine);
        if report.machines.is_empty() {
            return Err(Error::NoMachine(machine.clone()));
        }
    }
    if args.json {
        // One object a line where they follow each other, else for reading.
        let text =
            if args.watch { serde_json::to_string(&report) } else { serde_json::to_string_pretty(&report) };
        let text = text.map_err(|error| IoError::new("encode", "the report", io::Error::other(error)))?;
        return Ok(text + "\n");
    }
    Ok(text(&report))
}

async fn fetch(socket: &Path) -> Result<Report, Error> {
    let answer = ask(socket, Method::GET, "/v1/status").await?;
    let foreign = |error: serde_json::Error| Error::Foreign(socket.to_owned(), error.into());
    let value: serde_json::Value = serde_json::from_slice(&answer).map_err(foreign)?;
    match value.get("schema_version").and_then(serde_json::Value::as_u64) {
        Some(version) if version != u64::from(SCHEMA_VERSION) => Err(Error::Schema(version)),
        _ => serde_json::from_value(value).map_err(foreign),
    }
}

/// Asks the service over its control socket.
pub(super) async fn ask(socket: &Path, method: Method, path: &str) -> Result<Bytes, Error> {
    let answer = tokio::time::timeout(PATIENCE, ask_patiently(socket, method, path)).await;
    answer.unwrap_or_else(|_| Err(Error::Silent(socket.to_owned())))
}

async fn ask_patiently(socket: &Path, method: Method, path: &str) -> Result<Bytes, Error> {
    let stream = tokio::net::UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::NotRunning(socket.to_owned()),
        kind => {
            let error = IoError::new("connect to", socket.display().to_string(), error);
            if kind == io::ErrorKind::PermissionDenied { Error::Denied(error) } else { Error::Io(error) }
        }
    })?;
    let foreign = |error: hyper::Error| Error::Foreign(socket.to_owned(), error.into());
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(foreign)?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "localhost")
        .body(Empty::<Bytes>::new())
        .map_err(|error| Error::Foreign(socket.to_owned(), error.into()))?;
    let response = sender.send_request(request).await.map_err(foreign)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), LONGEST_ANSWER).collect().await;
    let body = body.map_err(|error| Error::Foreign(socket.to_owned(), error))?.to_bytes();
    driver.abort();
    if status == StatusCode::OK {
        return Ok(body);
    }
    let said = serde_json::from_slice::<serde_json::Value>(&body).ok();
    let said = said.as_ref().and_then(|said| said.get("error")?.as_str()).unwrap_or("nothing more");
    Err(Error::Refused(status, table::printable(said)))
}

/// The report for people.
fn text(report: &Report) -> String {
    let head = [
        "MACHINE",
        "DISK",
        "IDENTITY",
        "PHASE",
        "DONE",
        "SIZE",
        "RATE",
        "CONNECTIONS",
        "ETA",
        "LAG",
        "LAST COMMIT",
        "ERROR",
    ];
    let mut rows = Vec::new();
    for machine in &report.machines {
        if let Some(error) = &machine.error {
            let mut row = vec![String::from("-"); head.len()];
            row[0] = machine.machine.to_string();
            row[head.len() - 1] = table::printable(error);
            rows.push(row);
        }
        rows.extend(machine.volumes.iter().map(|volume| row(&machine.machine, volume)));
    }
    let service = &report.service;
    let mut lines = vec![format!(
        "mt-agent {} (pid {}) listens at {}, {} open, writes with {} ({})",
        table::printable(&service.version),
        service.pid,
        service.listen,
        match service.sessions {
            1 => "1 session".to_owned(),
            sessions => format!("{sessions} sessions"),
        },
        table::printable(&service.engine.name),
        table::printable(&service.engine.why),
    )];
    if rows.is_empty() {
        lines.push("no disk is assigned; assign some with `mt-agent protect add`".to_owned());
    } else {
        lines.extend(table::lines(&head, &rows));
    }
    lines.join("\n") + "\n"
}

fn row(machine: &Name, volume: &VolumeReport) -> Vec<String> {
    let none = || "-".to_owned();
    vec![
        machine.to_string(),
        volume.disk.to_string(),
        table::printable(&volume.id),
        match volume.verified_bytes {
            None => table::printable(&volume.phase),
            Some(bytes) => format!("{}, {} verified", table::printable(&volume.phase), ByteLen(bytes)),
        },
        volume
            .received_bytes
            .map_or_else(none, |bytes| ByteLen(bytes + volume.same_bytes.unwrap_or(0)).to_string()),
        ByteLen(volume.total_bytes.unwrap_or(volume.size)).to_string(),
        volume.rate.map_or_else(none, |rate| format!("{}/s", ByteLen(rate))),
        volume.connections.map_or_else(none, |connections| connections.to_string()),
        volume.eta.map_or_else(none, duration),
        volume.lag.map_or_else(none, duration),
        volume.last_commit.as_ref().map_or_else(none, |commit| {
            let time = rfc3339(commit.time);
            if commit.point_in_time { time } else { format!("{time} (not a point in time)") }
        }),
        volume.error.as_deref().map_or_else(none, table::printable),
    ]
}

/// Seconds as the two largest units: `1d 2h`, `3m 20s`, `7s`.
fn duration(seconds: u64) -> String {
    let (days, hours) = (seconds / 86400, seconds / 3600 % 24);
    let (minutes, seconds) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {seconds}s"),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_show_two_units() {
        let shown: Vec<String> = [0, 59, 60, 3599, 3600, 90061].into_iter().map(duration).collect();
        assert_eq!(shown, ["0s", "59s", "1m 0s", "59m 59s", "1h 0m", "1d 1h"]);
    }
}
