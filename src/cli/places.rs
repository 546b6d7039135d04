//! The arguments that say where things are, shared by the commands that need them.

use std::path::PathBuf;

use clap::Args;
use mt_agent::agent::config::{self, Config};

use super::Failure;

/// Where the configuration, the state and the retention are.
#[derive(Args, Clone, Debug)]
pub struct Places {
    /// Read this configuration alone, instead of /etc/mt-agent/mt-agent.toml and /etc/mt-agent/conf.d
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The directory of the keys and tokens, instead of the configured one; the retention directory lies in it
    /// unless --retention says otherwise
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The directory of the protections, instead of the configured one
    #[arg(long, value_name = "DIR")]
    pub retention: Option<PathBuf>,
}

impl From<config::Error> for Failure {
    fn from(error: config::Error) -> Failure {
        if error.is_refusal() { Failure::refused(error) } else { Failure::failed(error) }
    }
}

impl Places {
    /// The configuration, with what was given on the command line in its place.
    pub fn load(&self) -> Result<Config, Failure> {
        Ok(self.read()?)
    }

    /// The same, for who can go on without.
    pub fn read(&self) -> Result<Config, config::Error> {
        Ok(self.over(Config::load(self.config.as_deref())?))
    }

    /// A configuration, with what was given on the command line in its place.
    pub fn over(&self, mut config: Config) -> Config {
        if let Some(state_dir) = &self.state_dir {
            config.state_dir.clone_from(state_dir);
            config.retention_dir = state_dir.join("retention");
        }
        if let Some(retention) = &self.retention {
            config.retention_dir.clone_from(retention);
        }
        config
    }
}
