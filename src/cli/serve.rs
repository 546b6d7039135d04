//! `mt-agent serve`: the service.

use std::net::SocketAddr;
use std::path::PathBuf;

use mt_agent::agent::config::{self, Config};
use mt_agent::agent::{self, logging};
use mt_agent::error::chain;
use mt_agent::storage::device::EngineChoice;

use super::places::Places;
use super::{Failure, log_failure};

/// Receive the blocks of protected machines and write them to their target disks
#[derive(clap::Args)]
pub struct Args {
    /// Where to take connections, instead of the configured address
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// The control socket, instead of the configured one
    #[arg(long, value_name = "PATH")]
    control_socket: Option<PathBuf>,
    /// How to write: auto, io-uring or threads
    #[arg(long)]
    engine: Option<EngineChoice>,
    /// Take loop devices as targets, for trials
    #[arg(long)]
    allow_loop: bool,
    /// Take a retention directory on the root file system, for trials
    #[arg(long)]
    allow_root_retention: bool,
    /// How to log: text, json or journald; by default what fits the surroundings
    #[arg(long)]
    log_format: Option<logging::Format>,
    /// What to log: error, warn, info, debug or trace, or a filter such as mt_agent::net=debug,info
    #[arg(long, value_name = "FILTER")]
    log_level: Option<String>,
    #[command(flatten)]
    places: Places,
}

impl Args {
    fn read(&self) -> Result<Config, config::Error> {
        let mut config = self.places.read()?;
        config.listen = self.listen.unwrap_or(config.listen);
        config.control_socket = self.control_socket.clone().unwrap_or(config.control_socket);
        config.engine = self.engine.unwrap_or(config.engine);
        config.allow_loop |= self.allow_loop;
        config.allow_root_retention |= self.allow_root_retention;
        Ok(config)
    }
}

pub fn run(args: Args) -> Result<(), Failure> {
    let config = args.read()?;
    let level = logging::init(args.log_format, args.log_level.as_deref(), &config.log_level);
    let level = level.map_err(log_failure)?;
    let reread = Box::new(move || {
        let config = args.read()?;
        if let Err(error) = level.configured(&config.log_level) {
            tracing::error!(error = chain(&error), "the log goes on as before");
        }
        Ok(config)
    });
    agent::serve(config, reread).map_err(|error| match error {
        agent::Error::Taken(_) => Failure::refused(error),
        agent::Error::Lock(agent::lock::Error::Refused { .. }) => Failure::refused(error),
        agent::Error::Control(agent::control::Error::Refused(_)) => Failure::refused(error),
        agent::Error::RootRetention(_) => Failure::refused(error),
        _ => Failure::failed(error),
    })
}
