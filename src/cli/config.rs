//! `mt-agent config`: the configuration of the service, before the service reads it.
//!
//! `check --json`: `{"schema_version": 1, "files": ["…"], "mistakes": [{"file": "…", "line": 3, "what": "…"}],
//! "more": 0}`: how many mistakes there are beyond the first hundred.
//! `show --json`: `{"schema_version": 1, "keys": [{"key": "window", "value": 8388608, "file": "…", "line": 3, "reloads":
//! true}]}`, with sizes in bytes, times in seconds, and `null` for file and line of a default.

use std::path::PathBuf;

use mt_agent::agent::config::{Error, KEYS, Mistake, Mistakes, Place, Sourced, Value};
use mt_agent::error::plain;
use serde::Serialize;

use super::{Failure, print, print_json, table};

const SCHEMA_VERSION: u32 = 1;

/// Look at the configuration of the service
#[derive(clap::Subcommand)]
pub enum Command {
    Check(Check),
    Show(Show),
}

/// Find all mistakes in the configuration, without starting anything; exit code 3 if there are any
#[derive(clap::Args)]
pub struct Check {
    /// Look at this file alone, instead of /etc/mt-agent/mt-agent.toml and /etc/mt-agent/conf.d
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print what was found as JSON
    #[arg(long)]
    json: bool,
}

/// Show what is configured, and where
#[derive(clap::Args)]
pub struct Show {
    /// All keys, also those that have their default
    #[arg(long)]
    effective: bool,
    /// Look at this file alone, instead of /etc/mt-agent/mt-agent.toml and /etc/mt-agent/conf.d
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print it as JSON, with sizes in bytes and times in seconds
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Checked {
    schema_version: u32,
    files: Vec<PathBuf>,
    mistakes: Vec<Wrong>,
    more: usize,
}

#[derive(Serialize)]
struct Wrong {
    file: PathBuf,
    line: usize,
    what: String,
}

#[derive(Serialize)]
struct Shown {
    schema_version: u32,
    keys: Vec<Set>,
}

#[derive(Serialize)]
struct Set {
    key: &'static str,
    value: Value,
    file: Option<PathBuf>,
    line: Option<usize>,
    reloads: bool,
}

/// The mistakes, for the exit code.
#[derive(Debug, thiserror::Error)]
#[error("the configuration has {0}")]
struct Unsound(String);

pub fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Check(args) => check(args),
        Command::Show(args) => show(args),
    }
}

fn check(args: &Check) -> Result<(), Failure> {
    let (files, mistakes) = match Sourced::load(args.config.as_deref()) {
        Ok(sourced) => (sourced.files, Mistakes::default()),
        Err(Error::Mistakes { files, mistakes }) => (files, mistakes),
        Err(error) => return Err(error.into()),
    };
    let count = mistakes.told.len() + mistakes.more;
    if args.json {
        let more = mistakes.more;
        let wrong = |Mistake { place: Place { file, line }, what }| Wrong { file, line, what };
        let mistakes = mistakes.told.into_iter().map(wrong).collect();
        print_json(&Checked { schema_version: SCHEMA_VERSION, files, mistakes, more })?;
    } else {
        let mut text = format!("{mistakes}\n");
        if count == 0 {
            let files: Vec<String> =
                files.iter().map(|file| plain(&file.to_string_lossy()).into_owned()).collect();
            text = match files.as_slice() {
                [] => "There is no configuration: all keys have their defaults.\n".to_owned(),
                _ => format!("The configuration is sound: {}.\n", files.join(", ")),
            };
        }
        print(&text)?;
    }
    match count {
        0 => Ok(()),
        1 => Err(Failure::refused(Unsound("a mistake".to_owned()))),
        _ => Err(Failure::refused(Unsound(format!("{count} mistakes")))),
    }
}

fn show(args: &Show) -> Result<(), Failure> {
    let Sourced { config, set, .. } = Sourced::load(args.config.as_deref())?;
    let keys = KEYS.iter().filter(|key| args.effective || set.contains_key(key.name));
    if args.json {
        let keys = keys.map(|key| {
            let place = set.get(key.name);
            Set {
                key: key.name,
                value: (key.show)(&config),
                file: place.map(|place| place.file.clone()),
                line: place.map(|place| place.line),
                reloads: key.reloads,
            }
        });
        return print_json(&Shown { schema_version: SCHEMA_VERSION, keys: keys.collect() });
    }
    // What is printed is a configuration of the same meaning.
    let rows: Vec<Vec<String>> = keys
        .map(|key| {
            let from = set.get(key.name).map_or_else(|| "default".to_owned(), Place::to_string);
            vec![key.name.to_owned(), "=".to_owned(), (key.show)(&config).to_string(), format!("# {from}")]
        })
        .collect();
    let lines = table::lines(&["# KEY", "", "VALUE", "# FROM"], &rows);
    print(&(lines.join("\n") + "\n"))
}
