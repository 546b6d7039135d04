//! Every key of the configuration: what it is, how its value is read, and how it is shown.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Serialize, Serializer};
use toml::de::DeValue;

use super::Config;
use crate::agent::control::LONGEST_PATH;
use crate::agent::logging;
use crate::units::ByteLen;

pub(in crate::agent) const WINDOW: Range<u64> = 2 * ByteLen::MIB..256 * ByteLen::MIB + 1;
const MAX_SESSIONS: Range<i64> = 1..4097;
const IDLE: Bounds = Bounds { least: 1, most: 24 * 60 * 60, shown: "1s to 24h" };
/// Ten years: what is longer is rather a slip, and `retention_size` and `retention_free` bound the room anyway.
const AGE: Bounds = Bounds { least: 60, most: 10 * 365 * 24 * 60 * 60, shown: "1m to 87600h" };
const SIZE: Range<u64> = ByteLen::MIB..u64::MAX;
const FREE: Range<u64> = 0..u64::MAX;
/// What `retention_size` is where there is no bound.
const NONE: &str = "none";

/// A key of the configuration.
pub struct Key {
    /// As it stands in a file.
    pub name: &'static str,
    /// What it is and what it may be, in sentences.
    pub about: &'static str,
    /// Whether a running service takes another value on at a SIGHUP: for what begins from then on.
    pub reloads: bool,
    /// Takes a value, or says what would be one.
    pub(super) take: fn(&mut Config, &DeValue<'_>) -> Result<(), String>,
    /// The value in a configuration.
    pub show: fn(&Config) -> Value,
    /// Takes over the value of another configuration.
    pub(in crate::agent) copy: fn(&mut Config, &Config),
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A value of the configuration. It is shown as it stands in a file, and serialised with sizes in bytes and times in
/// seconds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    /// Whether.
    Flag(bool),
    /// How many.
    Number(u64),
    /// Where, or which.
    Text(String),
    /// How many bytes; `None` for no bound.
    Size(Option<u64>),
    /// How long.
    Time(Duration),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |f: &mut fmt::Formatter<'_>, text: String| toml::Value::String(text).fmt(f);
        match self {
            Value::Flag(flag) => flag.fmt(f),
            Value::Number(number) => number.fmt(f),
            Value::Text(text) => quoted(f, text.clone()),
            Value::Size(None) => quoted(f, NONE.to_owned()),
            Value::Size(Some(0)) => f.write_str("0"),
            Value::Size(Some(bytes)) => {
                let unit = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
                match unit.iter().find(|(shift, _)| bytes.trailing_zeros() >= *shift) {
                    Some((shift, unit)) => quoted(f, format!("{}{unit}", bytes >> shift)),
                    None => bytes.fmt(f),
                }
            }
            Value::Time(time) => {
                let seconds = time.as_secs();
                let unit = [(60 * 60, "h"), (60, "m"), (1, "s")];
                let whole =
                    unit.iter().find(|(length, _)| seconds.is_multiple_of(*length) && seconds > *length);
                let (length, unit) = whole.unwrap_or(&(1, "s"));
                quoted(f, format!("{}{unit}", seconds / length))
            }
        }
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Value::Flag(flag) => flag.serialize(serializer),
            Value::Number(number) => number.serialize(serializer),
            Value::Text(text) => text.serialize(serializer),
            Value::Size(bytes) => bytes.serialize(serializer),
            Value::Time(time) => time.as_secs().serialize(serializer),
        }
    }
}

/// A key whose value is one field of the configuration.
macro_rules! key {
    ($name:literal, $about:literal, $reloads:literal, $($field:ident).+, $read:expr, $show:expr) => {
        Key {
            name: $name,
            about: $about,
            reloads: $reloads,
            take: |config, value| {
                config.$($field).+ = $read(value)?;
                Ok(())
            },
            show: |config| $show(&config.$($field).+),
            copy: |config, from| config.$($field).+ = from.$($field).+.clone(),
        }
    };
}

/// Every key, in the order in which they are shown.
pub static KEYS: [Key; 15] = [
    key!(
        "listen",
        "Address and port where the machines' blocks are taken; the port is also that of new tokens. Where \
         systemd\nhands over a socket, that one is used. \"[::]\" is every address, also of IPv4.",
        false,
        listen,
        listen,
        |value: &SocketAddr| Value::Text(value.to_string())
    ),
    key!(
        "state_dir",
        "The keys and tokens of this host, and the lock of its one service. An absolute path.",
        false,
        state_dir,
        path,
        text_of
    ),
    key!(
        "retention_dir",
        "The protections, the journals and the recovery points: a file system of its own. An absolute path;\n`retention` \
         below `state_dir` unless it is set. Elsewhere than below /var/lib/mt-agent, the service must be\nallowed to \
         write there: `systemctl edit mt-agent`, and `[Service]` `ReadWritePaths=/the/path`.",
        false,
        retention_dir,
        path,
        text_of
    ),
    key!(
        "control_socket",
        "The Unix socket that answers `mt-agent status` and monitoring. An absolute path.",
        false,
        control_socket,
        socket,
        text_of
    ),
    key!(
        "engine",
        "How disks are written: \"io-uring\", \"threads\", or \"auto\" for io_uring where it works.",
        false,
        engine,
        |value| {
            text(value)?.parse().map_err(|error: crate::storage::device::ParseEngineError| error.to_string())
        },
        |value: &crate::storage::device::EngineChoice| Value::Text(value.to_string())
    ),
    key!(
        "window",
        "The bytes that may be under way for each disk, which bounds the memory: \"2M\" to \"256M\".",
        true,
        window,
        |value| size(value, WINDOW),
        |value: &ByteLen| Value::Size(Some(value.0))
    ),
    key!(
        "max_sessions",
        "How many disks may be received at once, 1 to 4096.",
        true,
        max_sessions,
        max_sessions,
        |value: &u32| Value::Number(u64::from(*value))
    ),
    key!(
        "allow_loop",
        "Whether loop devices may be targets, for trials.",
        true,
        allow_loop,
        boolean,
        |value: &bool| Value::Flag(*value)
    ),
    key!(
        "idle_timeout",
        "How long a connection may be silent while its disk is not at work, \"1s\" to \"24h\".",
        true,
        idle_timeout,
        |value| duration(value, IDLE),
        |value: &Duration| Value::Time(*value)
    ),
    key!(
        "retention_age",
        "How far one can go back, \"1m\" to \"87600h\": a recovery point goes once a newer one is this old.",
        true,
        retention.max_age,
        |value| duration(value, AGE),
        |value: &Duration| Value::Time(*value)
    ),
    key!(
        "retention_size",
        "The most bytes of before-images, of all machines together: from \"1M\" on, or \"none\" for no bound.",
        true,
        retention.max_bytes,
        |value: &DeValue<'_>| match value.as_str() {
            Some(NONE) => Ok(None),
            _ => size(value, SIZE).map(|size| Some(size.0)),
        },
        |value: &Option<u64>| Value::Size(*value)
    ),
    key!(
        "retention_free",
        "What is kept free on the file system of `retention_dir`: beyond it the oldest points go.",
        true,
        retention.min_free,
        |value| size(value, FREE).map(|size| size.0),
        |value: &u64| Value::Size(Some(*value))
    ),
    key!(
        "retention_thinning",
        "Whether points are thinned as they age: all of the last hour, one an hour for a day, one a day for a \
         week.\nSet `retention_age` to as much.",
        true,
        retention.thinning,
        boolean,
        |value: &bool| Value::Flag(*value)
    ),
    key!(
        "allow_root_retention",
        "Whether `retention_dir` may be on the root file system, which before-images can fill: for trials.",
        false,
        allow_root_retention,
        boolean,
        |value: &bool| Value::Flag(*value)
    ),
    key!(
        "log_level",
        "What is logged: \"error\", \"warn\", \"info\", \"debug\", \"trace\", or a filter such as \
         \"mt_agent::net=debug,info\".\n`--log-level` and MT_AGENT_LOG win.",
        true,
        log_level,
        log_level,
        |value: &String| Value::Text(value.clone())
    ),
];

fn text_of(path: &std::path::Path) -> Value {
    Value::Text(path.display().to_string())
}

fn expected(what: &str, value: &DeValue<'_>) -> String {
    format!("this is {what}, not a value of type {}", value.type_str())
}

fn text<'a>(value: &'a DeValue<'_>) -> Result<&'a str, String> {
    let text = value.as_str().ok_or_else(|| expected("a text in quotes", value))?;
    // No path or filter that anybody means has one; the kernel takes no NUL, and the others would forge lines in logs.
    match text.chars().find(|c| c.is_control()) {
        None => Ok(text),
        Some(c) => {
            let start: String = text.chars().take(100).collect();
            Err(format!("`{}` has a control character in it, `{}`", start.escape_debug(), c.escape_debug()))
        }
    }
}

fn path(value: &DeValue<'_>) -> Result<PathBuf, String> {
    let path = PathBuf::from(text(value)?);
    if path.is_absolute() { Ok(path) } else { Err(format!("`{}` is no absolute path", path.display())) }
}

fn socket(value: &DeValue<'_>) -> Result<PathBuf, String> {
    let path = path(value)?;
    if path.as_os_str().len() > LONGEST_PATH {
        return Err(format!("the path of a socket has at most {LONGEST_PATH} bytes here"));
    }
    Ok(path)
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

fn log_level(value: &DeValue<'_>) -> Result<String, String> {
    let text = text(value)?;
    logging::parse(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
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

/// How many letters of a key that there is not are looked at, and shown.
const LONGEST: usize = 100;

/// What is said of a key that there is not: the nearest one, or all of them where none is near.
pub(super) fn unknown(key: &str) -> String {
    let names = KEYS.iter().map(|key| key.name);
    // The keys have at most some 20 letters; what is longer is far from all of them anyway.
    let start: String = key.chars().take(LONGEST).collect();
    let plain = start.to_ascii_lowercase().replace('-', "_");
    // Half of a name, such as `timeout`, is as near as one wrong letter.
    let far = |known: &str| match known.split('_').any(|part| part == plain) {
        true => 1,
        false => distance(&plain, known),
    };
    let nearest = names.clone().map(far).min();
    let near: Vec<&str> = names.clone().filter(|known| Some(far(known)) == nearest).collect();
    let shown = start.escape_debug();
    match nearest {
        Some(distance) if near.iter().all(|known| distance <= known.len() / 3) => {
            format!("there is no key `{shown}`: did you mean `{}`?", near.join("` or `"))
        }
        _ => format!("there is no key `{shown}`: the keys are {}", names.collect::<Vec<_>>().join(", ")),
    }
}

/// The number of letters to insert, remove or change that lead from one word to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
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
