//! The configuration: `/etc/mt-agent/mt-agent.toml`, then the snippets of `/etc/mt-agent/conf.d/*.toml` in the
//! order of their names. A key that several files set has the value of the last one.
//!
//! [`KEYS`] has every key: what it is, what it may be, its default, and whether a running service takes another value
//! on. `packaging/mt-agent.toml` is made of that table ([`commented`]). All files are read and looked at as a whole before
//! anything is refused, so that all mistakes are told at once.

mod keys;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;

pub use self::keys::{KEYS, Key, Value};
use crate::durable;
use crate::error::IoError;
use crate::points::retention::Policy;
use crate::storage::device::EngineChoice;
use crate::units::ByteLen;

/// Where the main file is looked for when none is given.
pub const DEFAULT_FILE: &str = "/etc/mt-agent/mt-agent.toml";
/// The directory of the snippets, beside [`DEFAULT_FILE`].
pub const DEFAULT_SNIPPETS: &str = "/etc/mt-agent/conf.d";
/// The control socket when none is configured.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/mt-agent/control.sock";

const MAX_LEN: u64 = 1 << 20;
pub(super) use self::keys::WINDOW;

/// The configuration in effect: what the files say, and the defaults for the rest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Where connections for data are taken; see [`Config::bind`].
    pub listen: SocketAddr,
    /// Keys, tokens and the instance lock.
    pub state_dir: PathBuf,
    /// Protections, journals and points.
    pub retention_dir: PathBuf,
    /// The Unix socket of [`super::control`].
    pub control_socket: PathBuf,
    /// How volumes write.
    pub engine: EngineChoice,
    /// The bytes that may be in flight for each volume.
    pub window: ByteLen,
    /// How many connections may be open at once.
    pub max_sessions: u32,
    /// How many connections may carry one pass.
    pub max_connections: u32,
    /// Whether loop devices may be targets.
    pub allow_loop: bool,
    /// How long a connection may be silent, while the disk is not at work, before it is closed.
    pub idle_timeout: Duration,
    /// Which recovery points are kept.
    pub retention: Policy,
    /// Whether the retention directory may be on the root file system.
    pub allow_root_retention: bool,
    /// What is logged: a filter as [`super::logging`] takes it.
    pub log_level: String,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from(([0u16; 8], 9443)),
            state_dir: PathBuf::from("/var/lib/mt-agent"),
            retention_dir: PathBuf::from("/var/lib/mt-agent/retention"),
            control_socket: PathBuf::from(DEFAULT_CONTROL_SOCKET),
            engine: EngineChoice::default(),
            window: ByteLen(8 * ByteLen::MIB),
            max_sessions: 64,
            max_connections: 8,
            allow_loop: false,
            idle_timeout: Duration::from_secs(60),
            retention: Policy {
                max_age: Duration::from_secs(24 * 60 * 60),
                max_bytes: None,
                min_free: ByteLen::GIB,
                thinning: false,
            },
            allow_root_retention: false,
            log_level: super::logging::DEFAULT_LEVEL.to_owned(),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Files say what they cannot.
    #[error("{}", lines(mistakes))]
    Mistakes {
        /// The files that were read.
        files: Vec<PathBuf>,
        /// All of them, in the order of the files and lines.
        mistakes: Vec<Mistake>,
    },
}

fn lines(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(Mistake::to_string).collect::<Vec<_>>().join("\n")
}

/// Something that a file says and cannot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mistake {
    /// Where.
    pub place: Place,
    /// What is wrong there, and what would be right.
    pub what: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// A line of a file.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// A configuration and where it comes from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sourced {
    /// What holds.
    pub config: Config,
    /// The files that were read, in this order.
    pub files: Vec<PathBuf>,
    /// Where the keys were set that have another than their default, or the same once more.
    pub set: BTreeMap<&'static str, Place>,
}

impl Config {
    /// The configuration of this host, or of `file` alone where one is given: then there are no snippets, and the
    /// file must exist.
    pub fn load(file: Option<&Path>) -> Result<Config, Error> {
        Ok(Sourced::load(file)?.config)
    }

    /// Listens at [`Config::listen`], and at the IPv4 address of the same meaning where that is `[::]` and the host
    /// has no IPv6. The socket does not block.
    pub fn bind(&self) -> Result<TcpListener, IoError> {
        let bound = match TcpListener::bind(self.listen) {
            Err(error) if self.listen.ip().is_unspecified() && self.listen.is_ipv6() && no_ipv6(&error) => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, self.listen.port()))
            }
            bound => bound,
        };
        let failed = |error| IoError::new("listen at", self.listen.to_string(), error);
        let listener = bound.map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(listener)
    }
}

impl Sourced {
    /// See [`Config::load`].
    pub fn load(file: Option<&Path>) -> Result<Sourced, Error> {
        match file {
            Some(file) => Sourced::of(vec![file.to_owned()]),
            None => Sourced::load_from(Path::new(DEFAULT_FILE), Path::new(DEFAULT_SNIPPETS)),
        }
    }

    /// The configuration of a main file and a directory of snippets, either of which may be missing.
    pub fn load_from(file: &Path, snippets: &Path) -> Result<Sourced, Error> {
        let main = Some(file.to_owned()).filter(|file| file.exists());
        Sourced::of(main.into_iter().chain(list(snippets)?).collect())
    }

    fn of(files: Vec<PathBuf>) -> Result<Sourced, Error> {
        let mut sourced = Sourced::default();
        let mut mistakes = Vec::new();
        for file in &files {
            sourced.take(file, &read(file)?, &mut mistakes);
        }
        sourced.files = files;
        let Sourced { config, set, .. } = &mut sourced;
        if !set.contains_key("retention_dir") {
            config.retention_dir = config.state_dir.join("retention");
        }
        // What is not a value at all contradicts nothing yet.
        if mistakes.is_empty() {
            mistakes = sourced.contradictions();
        }
        if mistakes.is_empty() {
            Ok(sourced)
        } else {
            Err(Error::Mistakes { files: sourced.files, mistakes })
        }
    }

    /// Takes what one file sets, and notes everything that is wrong in it, from its top to its bottom.
    fn take(&mut self, file: &Path, bytes: &[u8], mistakes: &mut Vec<Mistake>) {
        let place = |offset: usize| Place {
            file: file.to_owned(),
            line: bytes.iter().take(offset).filter(|&&byte| byte == b'\n').count() + 1,
        };
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let what = "this is not UTF-8".to_owned();
                return mistakes.push(Mistake { place: place(error.valid_up_to()), what });
            }
        };
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut found: Vec<Mistake> = Vec::new();
        for error in errors {
            let place = place(error.span().map_or(0, |span| span.start));
            // Of what follows from one slip, the first tells enough.
            if found.iter().all(|known| known.place != place) {
                found.push(Mistake { place, what: error.message().trim_end().to_owned() });
            }
        }
        let broken: Vec<usize> = found.iter().map(|mistake| mistake.place.line).collect();
        for (key, value) in table.get_ref() {
            let (named, at) = (key.get_ref().as_ref(), place(key.span().start));
            // What stands on a line that is no TOML may be anything.
            if broken.contains(&at.line) {
                continue;
            }
            let result = match KEYS.iter().find(|known| known.name == named) {
                None => Err((at, keys::unknown(named))),
                Some(known) => match (known.take)(&mut self.config, value.get_ref()) {
                    Ok(()) => {
                        self.set.insert(known.name, at);
                        Ok(())
                    }
                    Err(what) => Err((place(value.span().start), format!("{named}: {what}"))),
                },
            };
            if let Err((place, what)) = result {
                found.push(Mistake { place, what });
            }
        }
        found.sort_by_key(|mistake| mistake.place.line);
        mistakes.append(&mut found);
    }

    /// Values of which each is sound, and that cannot hold together.
    fn contradictions(&self) -> Vec<Mistake> {
        let Config { state_dir, retention_dir, control_socket, retention, .. } = &self.config;
        let mut found = Vec::new();
        // Of two keys it is told at the one that somebody set; both cannot be defaults.
        let mut contradiction = |keys: [&str; 2], what: String| {
            if let Some(place) = keys.iter().find_map(|key| self.set.get(key)) {
                found.push(Mistake { place: place.clone(), what: format!("{}: {what}", keys[0]) });
            }
        };
        if state_dir.starts_with(retention_dir) {
            let what = format!(
                "{} holds `state_dir`, {}: the keys of this host must not travel with the recovery points; \
                 use a directory beside or below it",
                retention_dir.display(),
                state_dir.display()
            );
            contradiction(["retention_dir", "state_dir"], what);
        }
        for kept in ["tls", "tokens", "send"] {
            if retention_dir.starts_with(state_dir.join(kept)) {
                let what = format!(
                    "{} is where `state_dir` keeps its {kept}; use another name",
                    retention_dir.display()
                );
                contradiction(["retention_dir", "state_dir"], what);
            }
        }
        for (key, directory) in [("state_dir", state_dir), ("retention_dir", retention_dir)] {
            if directory.starts_with(control_socket) {
                let what =
                    format!("{} is a directory, that of `{key}` or above it", control_socket.display());
                contradiction(["control_socket", key], what);
            }
        }
        let hour = Duration::from_secs(60 * 60);
        if retention.thinning && retention.max_age <= hour {
            let what = "all points of the last hour are kept, and `retention_age` lets go of everything that is older: \
                        nothing is left to be thinned; set `retention_age = \"168h\"`, or leave this out";
            contradiction(["retention_thinning", "retention_age"], what.to_owned());
        }
        found
    }
}

/// The file with every key and its default, all of it commented out.
pub fn commented() -> String {
    let mut text = String::from(
        "# The configuration of mt-agent. Every key is here with its default; to change one, take its `#` away.\n\
         # Files in conf.d/*.toml beside this one are read after it, in the order of their names, and win.\n\
         # `mt-agent config check` finds mistakes, and `mt-agent config show --effective` tells what holds and why.\n\
         # `systemctl reload mt-agent` takes on what is marked so; the rest needs `systemctl restart mt-agent`.\n",
    );
    let defaults = Config::default();
    for key in &KEYS {
        text.push('\n');
        for line in key.about.lines() {
            text += &format!("# {line}\n");
        }
        if key.reloads {
            text += "# A reload takes it on.\n";
        }
        text += &format!("#{} = {}\n", key.name, (key.show)(&defaults));
    }
    text
}

/// Whether binding failed because the kernel has no IPv6 (EAFNOSUPPORT), or no address of it (EADDRNOTAVAIL).
fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn read(path: &Path) -> Result<Vec<u8>, IoError> {
    let failed = |op, error| IoError::new(op, path.display().to_string(), error);
    let file = durable::regular(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(|error| failed("read", error))?;
    if bytes.len() as u64 > MAX_LEN {
        let error = io::Error::other(format!("longer than {MAX_LEN} bytes: this is no configuration"));
        return Err(failed("read", error));
    }
    Ok(bytes)
}

/// The `*.toml` of a directory by name, without those that begin with a dot (what editors leave).
fn list(directory: &Path) -> Result<Vec<PathBuf>, IoError> {
    let failed = |error| IoError::new("list", directory.display().to_string(), error);
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
