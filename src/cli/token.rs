//! `mt-agent token`: makes, lists and revokes the tokens with which machines enrol.

use std::path::Path;

use mt_agent::agent::config::Config;
use mt_agent::name::Name;
use mt_agent::net::address::Address;
use mt_agent::net::tls::server;
use mt_agent::net::token::{Entry, Error, LIFE, State, TokenStore};
use mt_agent::protection::{self, Store};
use mt_agent::units::rfc3339;
use serde::Serialize;
use time::{Duration, OffsetDateTime};

use super::places::Places;
use super::{Failure, print, print_json};

/// Make, list and revoke the tokens with which machines enrol.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make a token: one string with which one machine can enrol, once.
    ///
    /// The token is all that standard output gets. On the source machine, give it to `mt-agent enroll`.
    Create {
        /// The machine that may enrol.
        machine: Name,
        /// Where the source machine reaches this master target [default: this host's name]. Without a port in it, that
        /// of the configured `listen`
        #[arg(long, value_name = "HOST[:PORT]", value_parser = address)]
        address: Option<String>,
        /// How long the token can be used: a number with s, m, h or d, from one minute to 30 days.
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = life)]
        expires: Duration,
        /// Print JSON: `schema_version`, `token`, `machine`, `address`, `fingerprint`, `expires`.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        places: Places,
    },
    /// List the tokens that wait, and those that were used or revoked or expired in the last days.
    List {
        /// Print JSON: `schema_version`, and `tokens` with `id`, `machine`, `state` (`waiting`, `used`, `expired`,
        /// `revoked`), `created` and `expires`.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        places: Places,
    },
    /// Make a token that waits unusable.
    Revoke {
        /// The token's id, from `mt-agent token list`.
        id: String,
        #[command(flatten)]
        places: Places,
    },
}

/// What stays a text until the configuration has said which port is meant where it has none.
fn address(text: &str) -> Result<String, String> {
    text.parse::<Address>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// `90s`, `15m`, `1h`, `7d`.
fn life(text: &str) -> Result<Duration, String> {
    let usage = || "give a number with s, m, h or d, from 1m to 30d, as in 90m".to_owned();
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(usage)?;
    let (number, unit) = text.split_at(digits);
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(usage()),
    };
    let number: i64 = number.parse().map_err(|_| usage())?;
    let life = number.checked_mul(unit).map(Duration::seconds).ok_or_else(usage)?;
    if LIFE.contains(&life) { Ok(life) } else { Err(usage()) }
}

pub fn run(args: Args) -> Result<(), Failure> {
    match args.command {
        Command::Create { machine, address, expires, json, places } => {
            create(&places.load()?, machine, address, expires, json)
        }
        Command::List { json, places } => list(&places.load()?.state_dir, json),
        Command::Revoke { id, places } => match TokenStore::new(&places.load()?.state_dir).revoke(&id) {
            Ok(machine) => {
                print(&format!("Nobody can enrol with the token {id} of the machine {machine} any more.\n"))
            }
            Err(error @ Error::NoSuchToken { .. }) => Err(Failure::refused(error)),
            Err(error) => Err(Failure::failed(error)),
        },
    }
}

#[derive(Serialize)]
struct Created<'a> {
    schema_version: u32,
    token: &'a str,
    machine: &'a Name,
    address: &'a str,
    fingerprint: &'a str,
    expires: &'a str,
}

fn create(
    config: &Config,
    machine: Name,
    address: Option<String>,
    life: Duration,
    json: bool,
) -> Result<(), Failure> {
    let address = place(address, config.listen.port())?;
    let state_dir = &config.state_dir;
    if let Err(error @ protection::Error::NoMachine { .. }) =
        Store::open(&config.retention_dir).load(&machine)
    {
        note!("mt-agent: {error}");
    }
    let identity = server::Identity::load_or_create(state_dir).map_err(Failure::failed)?;
    let fingerprint = identity.fingerprint();
    let now = OffsetDateTime::now_utc();
    let token = TokenStore::new(state_dir)
        .create(machine, life, address, fingerprint, now)
        .map_err(Failure::failed)?;
    let (text, expires) = (token.to_string(), rfc3339(token.expires));
    if json {
        return print_json(&Created {
            schema_version: 1,
            token: &text,
            machine: &token.machine,
            address: &token.address.to_string(),
            fingerprint: &fingerprint.to_string(),
            expires: &expires,
        });
    }
    print(&format!("{text}\n"))?;
    note!(
        "This token lets the machine {} enrol once, at {}, until {expires}.\n\
         On that machine run `mt-agent enroll -` and paste it.",
        token.machine,
        token.address
    );
    Ok(())
}

/// The address in a token: as it was given, or by this host's name; with `port` where none was given.
fn place(given: Option<String>, port: u16) -> Result<Address, Failure> {
    let unknown = if port == 0 {
        "the configured `listen` leaves the port to chance: give --address HOST:PORT"
    } else {
        "this host's name is no address: give --address HOST[:PORT], as the source machine reaches it"
    };
    let name = match given {
        Some(given) => given,
        None => {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
            name.map_err(|_| Failure::refused(unknown))?.trim().to_owned()
        }
    };
    Address::parse(&name, port).map_err(|_| Failure::refused(unknown))
}

#[derive(Serialize)]
struct List {
    schema_version: u32,
    tokens: Vec<Entry>,
}

fn list(state_dir: &Path, json: bool) -> Result<(), Failure> {
    let tokens = TokenStore::new(state_dir).list(OffsetDateTime::now_utc()).map_err(Failure::failed)?;
    if json {
        return print_json(&List { schema_version: 1, tokens });
    }
    if tokens.is_empty() {
        return print("no tokens; make one with `mt-agent token create`\n");
    }
    let mut text = format!("{:<16}  {:<8}  {:<20}  MACHINE\n", "ID", "STATE", "EXPIRES");
    for Entry { id, machine, state, expires, .. } in tokens {
        let state = match state {
            State::Waiting => "waiting",
            State::Used => "used",
            State::Expired => "expired",
            State::Revoked => "revoked",
        };
        text += &format!("{id:<16}  {state:<8}  {:<20}  {machine}\n", rfc3339(expires));
    }
    print(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_of_tokens_are_parsed_and_bounded() {
        assert_eq!(life("60s"), Ok(Duration::minutes(1)));
        assert_eq!(life("90m"), Ok(Duration::minutes(90)));
        assert_eq!(life("1h"), Ok(Duration::hours(1)));
        assert_eq!(life("30d"), Ok(Duration::days(30)));
        for bad in [
            "",
            "1",
            "h",
            "59s",
            "0h",
            "31d",
            "-1h",
            "1.5h",
            "1w",
            "99999999999999999999d",
            "9223372036854775807d",
        ] {
            assert!(life(bad).is_err(), "{bad}");
        }
    }
}
