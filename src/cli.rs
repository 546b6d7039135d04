//! The command line: one file a subcommand, each with its arguments and its `run`.

/// Tells the user something on standard error. That nobody can hear it is no reason to end: `eprintln!` panics then.
macro_rules! note {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stderr(), $($text)*).ok();
    }};
}

mod check;
mod config;
mod digest;
mod discover_disks;
mod enroll;
mod export;
mod failover;
mod generate;
mod hold_frozen;
mod inspect;
mod places;
mod points;
mod protect;
mod send;
mod serve;
mod setup;
mod status;
mod table;
mod token;
mod verify;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mt_agent::agent::logging;
use mt_agent::error::{IoError, chain, plain};
use serde::Serialize;

/// Where the agent keeps its keys and records unless told otherwise.
const STATE_DIR: &str = "/var/lib/mt-agent";

/// Why a command did not do what it was asked, sorted by exit code.
#[derive(Debug)]
pub enum Failure {
    /// Exit code 1: it was tried and failed.
    Failed(Box<dyn Error + Send + Sync>),
    /// Exit code 2: the command line means nothing, which only the command could see.
    Usage(String),
    /// Exit code 3: refused by a safety rule, or a precondition is not met.
    Refused(Box<dyn Error + Send + Sync>),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Failed(error) | Failure::Refused(error) => f.write_str(&chain(error.as_ref())),
            Failure::Usage(text) => f.write_str(text),
        }
    }
}

impl Failure {
    /// Exit code 1.
    pub fn failed(error: impl Into<Box<dyn Error + Send + Sync>>) -> Failure {
        Failure::Failed(error.into())
    }

    /// Exit code 3.
    pub fn refused(error: impl Into<Box<dyn Error + Send + Sync>>) -> Failure {
        Failure::Refused(error.into())
    }
}

/// The agent on a Linux master target: receives the replicated blocks of machines that fail back, and writes
/// them to disks that will boot as those machines.
#[derive(Parser)]
#[command(name = "mt-agent", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    DiscoverDisks(discover_disks::Args),
    Inspect(inspect::Args),
    #[command(subcommand)]
    Protect(protect::Command),
    Token(token::Args),
    Enroll(enroll::Args),
    Points(points::Args),
    Failover(failover::Args),
    Export(export::Args),
    Check(check::Args),
    #[command(subcommand)]
    Config(config::Command),
    Digest(digest::Args),
    Serve(serve::Args),
    #[command(subcommand)]
    Setup(setup::Command),
    Send(send::Args),
    Verify(verify::Args),
    Status(status::Args),
    HoldFrozen(hold_frozen::Args),
    Generate(generate::Args),
}

/// Parses the command line, runs the subcommand and reports how it ended.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let result: Result<(), Failure> = match cli.command {
        Command::DiscoverDisks(args) => discover_disks::run(args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Protect(command) => protect::run(command),
        Command::Token(args) => token::run(args),
        Command::Enroll(args) => enroll::run(args),
        Command::Points(args) => points::run(&args),
        Command::Failover(args) => failover::run(args),
        Command::Export(args) => export::run(args),
        Command::Check(args) => check::run(args),
        Command::Config(command) => config::run(&command),
        Command::Digest(args) => digest::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Setup(command) => setup::run(command),
        Command::Send(args) => send::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Status(args) => status::run(args),
        Command::HoldFrozen(args) => hold_frozen::run(&args),
        Command::Generate(args) => generate::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Its lines are ours; what else would be done to the terminal is somebody else's name.
            let text = failure.to_string();
            note!("mt-agent: {}", text.split('\n').map(plain).collect::<Vec<_>>().join("\n"));
            ExitCode::from(match failure {
                Failure::Failed(_) => 1,
                Failure::Usage(_) => 2,
                Failure::Refused(_) => 3,
            })
        }
    }
}

/// Writes what a command found to standard output.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // `| head`: whoever reads has enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|error| Failure::failed(IoError::new("write", "the output", error))),
    }
}

/// JSON for people and programs.
fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(&(serde_json::to_string_pretty(value).map_err(Failure::failed)? + "\n"))
}

/// A filter that cannot be understood is wrong usage.
fn log_failure(error: logging::Error) -> Failure {
    match error {
        logging::Error::Config { .. } => Failure::Usage(chain(&error)),
        error => Failure::failed(error),
    }
}
