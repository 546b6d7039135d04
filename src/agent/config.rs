//! The configuration: `/etc/mt-agent/mt-agent.toml`, then the snippets of `/etc/mt-agent/conf.d/*.toml` in the
//! order of their names. A key that several files set has the value of the last one.
//!
//! | key | value | default |
//! |---|---|---|
//! | `listen` | address and port for the data | `"[::]:9443"`, and `0.0.0.0` where there is no IPv6 |
//! | `state_dir` | absolute path: keys, tokens, the instance lock | `"/var/lib/mt-agent"` |
//! | `retention_dir` | absolute path: protections, journals, points | `retention` below `state_dir` |
//! | `control_socket` | absolute path | `"/run/mt-agent/control.sock"` |
//! | `engine` | `"auto"`, `"io-uring"` or `"threads"` | `"auto"` |
//! | `window` | bytes in flight for each volume, `"2M"` to `"256M"` | `"8M"` |
//! | `max_sessions` | how many disks may be received at once, 1 to 4096 | `64` |
//! | `allow_loop` | whether loop devices may be targets | `false` |
//! | `idle_timeout` | how long a connection may be silent while the disk is not at work, `"1s"` to `"24h"` | `"60s"` |
//! | `retention_age` | how far one can go back: a recovery point goes once a newer one is so old, `"1m"` to `"87600h"` | `"24h"` |
//! | `retention_size` | the most bytes of before-images, from `"1M"` on | no bound |
//! | `retention_free` | the bytes that the retention file system keeps free | `"1G"` |
//! | `retention_thinning` | whether points are thinned as they age | `false` |
//! | `allow_root_retention` | whether the retention directory may be on the root file system | `false` |

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

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
pub(super) const WINDOW: Range<u64> = 2 * ByteLen::MIB..256 * ByteLen::MIB + 1;
const MAX_SESSIONS: Range<i64> = 1..4097;
const IDLE: Bounds = Bounds { least: 1, most: 24 * 60 * 60, shown: "1s to 24h" };
/// Ten years: what is longer is rather a slip, and `retention_size` and `retention_free` bound the room anyway.
const AGE: Bounds = Bounds { least: 60, most: 10 * 365 * 24 * 60 * 60, shown: "1m to 87600h" };
const SIZE: Range<u64> = ByteLen::MIB..u64::MAX;
const FREE: Range<u64> = 0..u64::MAX;
const KEYS: [&str; 14] = [
    "listen",
    "state_dir",
    "retention_dir",
    "control_socket",
    "engine",
    "window",
    "max_sessions",
    "allow_loop",
    "idle_timeout",
    "retention_age",
    "retention_size",
    "retention_free",
    "retention_thinning",
    "allow_root_retention",
];

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
}

impl Default for Config {
    fn default() -> Config {
        Given::default().complete()
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A file says something that it cannot.
    #[error("{}:{line}: {what}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there, and what would be right.
        what: String,
    },
}

impl Config {
    /// The configuration of this host, or of `file` alone where one is given: then there are no snippets, and the
    /// file must exist.
    pub fn load(file: Option<&Path>) -> Result<Config, Error> {
        match file {
            Some(file) => {
                let mut given = Given::default();
                given.read(file)?;
                Ok(given.complete())
            }
            None => Config::load_from(Path::new(DEFAULT_FILE), Path::new(DEFAULT_SNIPPETS)),
        }
    }

    /// The configuration of a main file and a directory of snippets, either of which may be missing.
    pub fn load_from(file: &Path, snippets: &Path) -> Result<Config, Error> {
        let mut given = Given::default();
        if file.exists() {
            given.read(file)?;
        }
        for snippet in list(snippets)? {
            given.read(&snippet)?;
        }
        Ok(given.complete())
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

/// Whether binding failed because the kernel has no IPv6 (EAFNOSUPPORT), or no address of it (EADDRNOTAVAIL).
fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
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

/// What the files set so far.
#[derive(Default)]
struct Given {
    listen: Option<SocketAddr>,
    state_dir: Option<PathBuf>,
    retention_dir: Option<PathBuf>,
    control_socket: Option<PathBuf>,
    engine: Option<EngineChoice>,
    window: Option<ByteLen>,
    max_sessions: Option<u32>,
    allow_loop: Option<bool>,
    idle_timeout: Option<Duration>,
    retention_age: Option<Duration>,
    retention_size: Option<ByteLen>,
    retention_free: Option<ByteLen>,
    retention_thinning: Option<bool>,
    allow_root_retention: Option<bool>,
}

impl Given {
    fn complete(self) -> Config {
        let state_dir = self.state_dir.unwrap_or_else(|| PathBuf::from("/var/lib/mt-agent"));
        Config {
            listen: self.listen.unwrap_or_else(|| SocketAddr::from(([0u16; 8], 9443))),
            retention_dir: self.retention_dir.unwrap_or_else(|| state_dir.join("retention")),
            state_dir,
            control_socket: self.control_socket.unwrap_or_else(|| PathBuf::from(DEFAULT_CONTROL_SOCKET)),
            engine: self.engine.unwrap_or_default(),
            window: self.window.unwrap_or(ByteLen(8 * ByteLen::MIB)),
            max_sessions: self.max_sessions.unwrap_or(64),
            allow_loop: self.allow_loop.unwrap_or(false),
            idle_timeout: self.idle_timeout.unwrap_or(Duration::from_secs(60)),
            retention: Policy {
                max_age: self.retention_age.unwrap_or(Duration::from_secs(24 * 60 * 60)),
                max_bytes: self.retention_size.map(|size| size.0),
                min_free: self.retention_free.unwrap_or(ByteLen(ByteLen::GIB)).0,
                thinning: self.retention_thinning.unwrap_or(false),
            },
            allow_root_retention: self.allow_root_retention.unwrap_or(false),
        }
    }

    fn read(&mut self, path: &Path) -> Result<(), Error> {
        let failed = |op, error| IoError::new(op, path.display().to_string(), error);
        let file = File::open(path).map_err(|error| failed("open", error))?;
        let mut bytes = Vec::new();
        file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(|error| failed("read", error))?;
        if bytes.len() as u64 > MAX_LEN {
            let error = io::Error::other(format!("longer than {MAX_LEN} bytes: this is no configuration"));
            return Err(failed("read", error).into());
        }
        self.merge(&bytes).map_err(|(offset, what)| {
            let line = bytes.iter().take(offset).filter(|&&byte| byte == b'\n').count() + 1;
            Error::Config { file: path.to_owned(), line, what }
        })
    }

    /// Takes what one file sets, or says what is wrong at which byte; of several mistakes the first one.
    fn merge(&mut self, bytes: &[u8]) -> Result<(), (usize, String)> {
        let text = std::str::from_utf8(bytes)
            .map_err(|error| (error.valid_up_to(), "this is not UTF-8".to_owned()))?;
        let table = DeTable::parse(text).map_err(|error| {
            (error.span().map_or(0, |span| span.start), error.message().trim_end().to_owned())
        })?;
        let mut entries: Vec<_> = table.get_ref().iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, value) in entries {
            let name: &str = key.get_ref();
            self.set(name, value).map_err(|what| match what {
                Wrong::Key(what) => (key.span().start, what),
                Wrong::Value(what) => (value.span().start, format!("{name}: {what}")),
            })?;
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &Spanned<DeValue<'_>>) -> Result<(), Wrong> {
        let value = value.get_ref();
        match key {
            "listen" => self.listen = Some(listen(value)?),
            "state_dir" => self.state_dir = Some(path(value)?),
            "retention_dir" => self.retention_dir = Some(path(value)?),
            "control_socket" => self.control_socket = Some(path(value)?),
            "engine" => {
                self.engine = Some(
                    text(value)?
                        .parse()
                        .map_err(|error: crate::storage::device::ParseEngineError| error.to_string())?,
                );
            }
            "window" => self.window = Some(size(value, WINDOW)?),
            "max_sessions" => self.max_sessions = Some(max_sessions(value)?),
            "allow_loop" => self.allow_loop = Some(boolean(value)?),
            "idle_timeout" => self.idle_timeout = Some(duration(value, IDLE)?),
            "retention_age" => self.retention_age = Some(duration(value, AGE)?),
            "retention_size" => self.retention_size = Some(size(value, SIZE)?),
            "retention_free" => self.retention_free = Some(size(value, FREE)?),
            "retention_thinning" => self.retention_thinning = Some(boolean(value)?),
            "allow_root_retention" => self.allow_root_retention = Some(boolean(value)?),
            _ => return Err(Wrong::Key(unknown(key))),
        }
        Ok(())
    }
}

/// Whether the mistake is in the key or in its value.
enum Wrong {
    Key(String),
    Value(String),
}

impl From<String> for Wrong {
    fn from(what: String) -> Wrong {
        Wrong::Value(what)
    }
}

fn expected(what: &str, value: &DeValue<'_>) -> String {
    format!("this is {what}, not a value of type {}", value.type_str())
}

fn text<'a>(value: &'a DeValue<'_>) -> Result<&'a str, String> {
    value.as_str().ok_or_else(|| expected("a text in quotes", value))
}

fn path(value: &DeValue<'_>) -> Result<PathBuf, String> {
    let path = PathBuf::from(text(value)?);
    if path.is_absolute() { Ok(path) } else { Err(format!("`{}` is no absolute path", path.display())) }
}

fn listen(value: &DeValue<'_>) -> Result<SocketAddr, String> {
    let text = text(value)?;
    text.parse().map_err(|_| {
        format!(
            "`{}` is no address with a port, as in \"[::]:9443\" or \"192.0.2.7:9443\"",
            text.escape_debug()
        )
    })
}

fn integer(value: &DeValue<'_>) -> Option<i64> {
    let integer = value.as_integer()?;
    i64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

fn boolean(value: &DeValue<'_>) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| expected("true or false", value))
}

fn size(value: &DeValue<'_>, bounds: Range<u64>) -> Result<ByteLen, String> {
    let given = match (value.as_str(), integer(value)) {
        (Some(text), _) => text.parse::<ByteLen>().map_err(|error| error.to_string())?,
        (None, Some(bytes)) => {
            ByteLen(u64::try_from(bytes).map_err(|_| "a size is not negative".to_owned())?)
        }
        (None, None) => return Err(expected("a size, as in \"8M\"", value)),
    };
    if bounds.contains(&given.0) {
        Ok(given)
    } else {
        // Whoever writes 8 means 8M: the unit is the mistake more often than the number.
        let hint = if given.0 < 1024 { ", and a plain number counts bytes" } else { "" };
        Err(format!(
            "{given} is out of bounds: {} to {}{hint}",
            ByteLen(bounds.start),
            ByteLen(bounds.end - 1)
        ))
    }
}

fn max_sessions(value: &DeValue<'_>) -> Result<u32, String> {
    let given = integer(value).ok_or_else(|| expected("a whole number", value))?;
    u32::try_from(given).ok().filter(|_| MAX_SESSIONS.contains(&given)).ok_or_else(|| {
        format!("{given} is out of bounds: {} to {}", MAX_SESSIONS.start, MAX_SESSIONS.end - 1)
    })
}

/// What a time may be, in seconds, and how that is said.
struct Bounds {
    least: u64,
    most: u64,
    shown: &'static str,
}

fn duration(value: &DeValue<'_>, bounds: Bounds) -> Result<Duration, String> {
    let text = value.as_str().ok_or_else(|| expected("a time with its unit, as in \"60s\"", value))?;
    let bad = || format!("`{}` is no time: a whole number and s, m or h, as in \"60s\"", text.escape_debug());
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit.trim() {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        _ => return Err(bad()),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    let given = number.checked_mul(seconds).ok_or_else(bad)?;
    if (bounds.least..=bounds.most).contains(&given) {
        Ok(Duration::from_secs(given))
    } else {
        Err(format!("{text} is out of bounds: {}", bounds.shown))
    }
}

/// What is said of a key that there is not: the nearest one, or all of them where none is near.
fn unknown(key: &str) -> String {
    let plain = key.to_ascii_lowercase().replace('-', "_");
    // Half of a name, such as `timeout`, is as near as one wrong letter.
    let far = |known: &str| match known.split('_').any(|part| part == plain) {
        true => 1,
        false => distance(&plain, known),
    };
    let nearest = KEYS.iter().map(|known| far(known)).min();
    let near: Vec<&str> = KEYS.into_iter().filter(|known| Some(far(known)) == nearest).collect();
    let shown: String = key.escape_debug().take(100).collect();
    match nearest {
        Some(distance) if near.iter().all(|known| distance <= known.len() / 3) => {
            format!("there is no key `{shown}`: did you mean `{}`?", near.join("` or `"))
        }
        _ => format!("there is no key `{shown}`: the keys are {}", KEYS.join(", ")),
    }
}

/// The number of letters to insert, remove or change that lead from one word to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    // A key has at most some 20 letters; what is longer is far from all of them anyway.
    for (i, a) in from.chars().take(100).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}
