//! `mt-agent enroll`: gives this machine the certificate that it sends with.

use std::io::Read;
use std::path::PathBuf;

use mt_agent::net::enrolment::{self, Error, PATIENCE};
use mt_agent::net::message::Code;
use mt_agent::net::token::Token;
use mt_agent::net::wire;

use super::{Failure, print};

/// Enrol this machine at a master target, with a token that was made there.
#[derive(clap::Args)]
pub struct Args {
    /// The token that `mt-agent token create` printed, or `-` to read it from standard input, which keeps it out of
    /// the shell's history and the list of processes.
    token: String,
    /// Where the agent keeps its keys.
    #[arg(long, value_name = "DIR", default_value = super::STATE_DIR)]
    state_dir: PathBuf,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let text = match args.token.as_str() {
        "-" => typed()?,
        _ => args.token,
    };
    let token: Token = text.parse().map_err(Failure::refused)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::failed)?;
    let path =
        runtime.block_on(enrolment::enroll(&token, &args.state_dir, PATIENCE)).map_err(
            |error| match error {
                Error::Expired { .. } => Failure::refused(error),
                Error::Handshake(ref handshake) if handshake.is_refusal() => Failure::refused(error),
                Error::Wire(wire::Error::Peer(ref theirs)) if theirs.code == Code::TokenRefused => {
                    Failure::refused(error)
                }
                error => Failure::failed(error),
            },
        )?;
    print(&format!("The machine {} is enrolled at {} ({}).\n", token.machine, token.address, path.display()))
}

/// The first line of standard input.
fn typed() -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let mut input = std::io::stdin().lock().take(4096);
    std::io::BufRead::read_until(&mut std::io::BufReader::new(&mut input), b'\n', &mut bytes)
        .map_err(Failure::failed)?;
    String::from_utf8(bytes).map_err(Failure::refused)
}
