//! The configuration: `/etc/mt-agent/mt-agent.toml`, then the snippets of `/etc/mt-agent/conf.d/*.toml` in the
//! order of their names. A key that several files set has the value of the last one.
//!
//! [`KEYS`] has every key: what it is, what it may be, its default, and whether a running service takes another value
//! on. `packaging/mt-agent.toml` is made of that table ([`commented`]). All files are read and looked at as a whole before
//! anything is refused, so that all mistakes are told at once.

mod keys;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;

pub use self::keys::{KEYS, Key, Value};
use crate::durable;
use crate::error::{IoError, plain};
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
/// How many mistakes are told. Who has more has a file of something else, and the rest is only counted.
const MOST_TOLD: usize = 100;
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
    #[error("{mistakes}")]
    Mistakes {
        /// The files that were read.
        files: Vec<PathBuf>,
        /// What is wrong in them.
        mistakes: Mistakes,
    },
}

impl Error {
    /// Whether it does not pass by itself: somebody has to write the files differently, or where they can be read.
    pub fn is_refusal(&self) -> bool {
        match self {
            Error::Mistakes { .. } => true,
            Error::Io(error) => matches!(
                error.source.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::IsADirectory
                    | io::ErrorKind::FileTooLarge
                    // It is no regular file.
                    | io::ErrorKind::Other
            ),
        }
    }
}

/// What is wrong in some files.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Mistakes {
    /// The first ones, in the order of the files and lines.
    pub told: Vec<Mistake>,
    /// How many there are beyond.
    pub more: usize,
}

impl Mistakes {
    fn are_none(&self) -> bool {
        self.told.is_empty()
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, mistake) in self.told.iter().enumerate() {
            write!(f, "{}{mistake}", if n == 0 { "" } else { "\n" })?;
        }
        if self.more > 0 {
            write!(f, "\nand {} more", self.more)?;
        }
        Ok(())
    }
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
        write!(f, "{}:{}", plain(&self.file.to_string_lossy()), self.line)
    }
}

/// What is wrong on a line. Which key is near one that there is not is looked for only where it is told.
enum Wrong<'a> {
    Said(String),
    Key(&'a str),
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
            Some(file) => Sourced::of(vec![(file.to_owned(), read(file)?)]),
            None => Sourced::load_from(Path::new(DEFAULT_FILE), Path::new(DEFAULT_SNIPPETS)),
        }
    }

    /// The configuration of a main file and a directory of snippets, either of which may be missing.
    pub fn load_from(file: &Path, snippets: &Path) -> Result<Sourced, Error> {
        // One that cannot be looked at is not taken for one that is missing.
        let is_there = file.try_exists();
        let is_there = is_there.map_err(|error| IoError::new("open", file.display().to_string(), error))?;
        let main = Some(file.to_owned()).filter(|_| is_there);
        let mut files = Vec::new();
        for file in main.into_iter().chain(list(snippets)?) {
            let bytes = read(&file)?;
            files.push((file, bytes));
        }
        Sourced::of(files)
    }

    /// The configuration that files say which were read already, in this order.
    pub fn of(files: Vec<(PathBuf, Vec<u8>)>) -> Result<Sourced, Error> {
        let mut sourced = Sourced::default();
        let mut mistakes = Mistakes::default();
        for (file, bytes) in files {
            if bytes.len() as u64 > MAX_LEN {
                let target = file.display().to_string();
                return Err(IoError::new("read", target, io::Error::from(io::ErrorKind::FileTooLarge)).into());
            }
            sourced.take(&file, &bytes, &mut mistakes);
            sourced.files.push(file);
        }
        let Sourced { config, set, .. } = &mut sourced;
        if !set.contains_key("retention_dir") {
            config.retention_dir = config.state_dir.join("retention");
        }
        // What is not a value at all contradicts nothing yet.
        if mistakes.are_none() {
            mistakes.told = sourced.contradictions();
        }
        if mistakes.are_none() {
            Ok(sourced)
        } else {
            Err(Error::Mistakes { files: sourced.files, mistakes })
        }
    }

    /// Takes what one file sets, and notes everything that is wrong in it, from its top to its bottom.
    fn take(&mut self, file: &Path, bytes: &[u8], mistakes: &mut Mistakes) {
        let ends: Vec<usize> =
            bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at).collect();
        let line = |offset: usize| ends.partition_point(|end| *end < offset) + 1;
        let place = |line: usize| Place { file: file.to_owned(), line };
        let mut found: Vec<(usize, Wrong<'_>)> = Vec::new();
        let table;
        match std::str::from_utf8(bytes) {
            Err(error) => {
                found.push((line(error.valid_up_to()), Wrong::Said("this is not UTF-8".to_owned())));
            }
            Ok(text) => {
                let errors;
                (table, errors) = DeTable::parse_recoverable(text);
                let mut broken = BTreeSet::new();
                for error in errors {
                    let line = line(error.span().map_or(0, |span| span.start));
                    // Of what follows from one slip, the first tells enough.
                    if broken.insert(line) {
                        found.push((line, Wrong::Said(error.message().trim_end().to_owned())));
                    }
                }
                for (key, value) in table.get_ref() {
                    let (named, at) = (key.get_ref().as_ref(), line(key.span().start));
                    // What stands on a line that is no TOML may be anything.
                    if broken.contains(&at) {
                        continue;
                    }
                    match KEYS.iter().find(|known| known.name == named) {
                        None => found.push((at, Wrong::Key(named))),
                        Some(known) => match (known.take)(&mut self.config, value.get_ref()) {
                            Ok(()) => _ = self.set.insert(known.name, place(at)),
                            Err(what) => found
                                .push((line(value.span().start), Wrong::Said(format!("{named}: {what}")))),
                        },
                    }
                }
            }
        }
        found.sort_by_key(|(line, _)| *line);
        let room = MOST_TOLD.saturating_sub(mistakes.told.len());
        mistakes.more += found.len().saturating_sub(room);
        mistakes.told.extend(found.into_iter().take(room).map(|(line, wrong)| Mistake {
            place: place(line),
            what: match wrong {
                Wrong::Said(what) => plain(&what).into_owned(),
                Wrong::Key(key) => keys::unknown(key),
            },
        }));
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
    Ok(bytes)
}

/// Whether a file of the snippets' directory is one, by its name: `*.toml`, but not what editors leave, which begins with a
/// dot.
pub fn is_snippet(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.ends_with(b".toml") && !name.starts_with(b".")
}

/// The snippets of a directory, by name.
fn list(directory: &Path) -> Result<Vec<PathBuf>, IoError> {
    let failed = |error| IoError::new("list", directory.display().to_string(), error);
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if is_snippet(&entry.file_name()) {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}
