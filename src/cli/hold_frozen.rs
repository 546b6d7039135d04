//! `mt-agent hold-frozen`: what `mt-agent send --freeze` starts, and nobody else.

use std::path::PathBuf;
use std::time::Duration;

use mt_agent::send::freeze;

use super::Failure;

/// Freeze file systems until standard input ends
#[derive(clap::Args)]
#[command(name = freeze::GUARD, hide = true)]
pub struct Args {
    /// For how long at most
    milliseconds: u64,
    /// A file on each of them
    files: Vec<PathBuf>,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    freeze::hold(Duration::from_millis(args.milliseconds), &args.files).map_err(Failure::failed)
}
