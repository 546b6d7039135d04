//! Where log lines go: to the journal with their fields when systemd started us, else to stderr.

use std::os::fd::AsFd;
use std::str::FromStr;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::error::{IoError, plain};

/// The variable that holds a filter where no `--log-level` is given.
pub const FILTER_VARIABLE: &str = "MT_AGENT_LOG";

/// What is logged unless somebody says otherwise.
pub const DEFAULT_LEVEL: &str = "info";

/// How log lines are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// Lines for people, on stderr.
    Text,
    /// One JSON object a line, on stderr.
    Json,
    /// Entries of the journal with their fields.
    Journald,
}

impl FromStr for Format {
    type Err = ParseFormatError;

    fn from_str(text: &str) -> Result<Format, ParseFormatError> {
        match text {
            "text" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            "journald" => Ok(Format::Journald),
            _ => Err(ParseFormatError(text.escape_debug().collect())),
        }
    }
}

/// Why a text is no format.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no format of log lines: use text, json or journald")]
pub struct ParseFormatError(String);

/// Why there is no logging.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The journal's socket does not take anything.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The filter cannot be understood.
    #[error(
        "`{}` is no filter of log lines: use error, warn, info, debug or trace, or mt_agent::net=debug,info",
        plain(given)
    )]
    Config {
        /// What was given. What its parser says of it is the advice above once more.
        given: String,
    },
    /// Somebody started it in this process before.
    #[error("logging was started twice")]
    Started(#[from] TryInitError),
}

/// What is logged, while it is.
#[derive(Debug)]
pub struct Level {
    filter: reload::Handle<EnvFilter, Registry>,
    /// Whether it was given for this run of the program, and is not the configuration's to change.
    fixed: bool,
}

impl Level {
    /// Another configuration holds.
    pub fn configured(&self, level: &str) -> Result<(), Error> {
        if !self.fixed {
            // It fails only where nothing is logged any more, as the program ends.
            self.filter.reload(parse(level)?).ok();
        }
        Ok(())
    }
}

/// Reads a filter of log lines.
pub(super) fn parse(given: &str) -> Result<EnvFilter, Error> {
    EnvFilter::builder().parse(given).map_err(|_| Error::Config { given: given.to_owned() })
}

/// Starts logging for the process: once, before anything is logged.
///
/// `format` wins over what the surroundings suggest; `level` over [`FILTER_VARIABLE`], and that over what is configured.
pub fn init(format: Option<Format>, level: Option<&str>, configured: &str) -> Result<Level, Error> {
    let variable = std::env::var(FILTER_VARIABLE).ok().filter(|value| !value.is_empty());
    let given = level.map(str::to_owned).or(variable);
    let fixed = given.is_some();
    let (filter, handle) = reload::Layer::new(parse(given.as_deref().unwrap_or(configured))?);
    let format = format.unwrap_or_else(|| {
        let stream = std::env::var("JOURNAL_STREAM").ok();
        if stream.is_some_and(|stream| is_stream(&stream, std::io::stderr())) {
            Format::Journald
        } else {
            Format::Text
        }
    });
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match format {
        Format::Text => Box::new(
            tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())),
        ),
        Format::Json => Box::new(tracing_subscriber::fmt::layer().json().with_writer(std::io::stderr)),
        Format::Journald => Box::new(
            tracing_journald::layer()
                .map_err(|error| IoError::new("connect to", "the journal", error))?
                .with_syslog_identifier("mt-agent".to_owned())
                // `journalctl MT_AGENT_MACHINE=web01`; and nothing of ours is taken for a field of somebody else's.
                .with_field_prefix(Some("MT_AGENT".to_owned())),
        ),
    };
    tracing_subscriber::registry().with(layer.with_filter(filter)).try_init()?;
    Ok(Level { filter: handle, fixed })
}

/// Whether `fd` is the stream to the journal that systemd names as `device:inode` (systemd.exec(5), JOURNAL_STREAM).
/// A service whose stderr was redirected since then has the variable all the same.
fn is_stream(named: &str, fd: impl AsFd) -> bool {
    let Ok(stat) = nix::sys::stat::fstat(fd) else { return false };
    named
        .split_once(':')
        .is_some_and(|(device, inode)| device.parse() == Ok(stat.st_dev) && inode.parse() == Ok(stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_journal_is_used_only_where_stderr_still_is_its_stream() {
        let file = tempfile::tempfile().unwrap();
        let meta = file.metadata().unwrap();
        assert!(is_stream(&format!("{}:{}", meta.dev(), meta.ino()), &file));
        assert!(!is_stream(&format!("{}:{}", meta.dev(), meta.ino() + 1), &file));
        assert!(!is_stream("", &file) && !is_stream("1", &file) && !is_stream("x:y", &file));
    }

    #[test]
    fn a_filter_that_means_nothing_is_named() {
        let error = init(Some(Format::Text), Some("mt_agent=loud"), "info").unwrap_err().to_string();
        assert!(error.contains("mt_agent=loud") && error.contains("debug"), "{error}");
    }
}
