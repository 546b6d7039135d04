//! `mt-agent generate`: the man pages and the shells' completions, for whoever makes a package of this program.
//!
//! It is a command of the program and not one of the build, because only the program knows its own commands; what
//! is written is therefore never older than the binary beside it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};
use mt_agent::agent::config::{Config, DEFAULT_FILE, DEFAULT_SNIPPETS, KEYS};
use mt_agent::error::IoError;
use time::OffsetDateTime;
use time::macros::format_description;

use super::{Cli, Failure};

const SOURCE: &str = concat!("mt-agent ", env!("CARGO_PKG_VERSION"));

/// Write the man pages and the completions for bash, zsh and fish
#[derive(clap::Args)]
#[command(hide = true)]
pub struct Args {
    /// Where the directories man1, man5, bash, zsh and fish are made
    dir: PathBuf,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut command = Cli::command();
    for (directory, shell) in [("bash", Shell::Bash), ("zsh", Shell::Zsh), ("fish", Shell::Fish)] {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut command, "mt-agent", &mut script);
        let name = match shell {
            Shell::Zsh => "_mt-agent",
            Shell::Fish => "mt-agent.fish",
            _ => "mt-agent",
        };
        write(&args.dir.join(directory), name, &script)?;
    }
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let date = date()?;
    manual(&args.dir.join("man1"), &command, None, &date)?;
    write(&args.dir.join("man5"), "mt-agent.toml.5", configuration(&date).to_roff().as_bytes())
}

/// The page of a command, and those of its subcommands. What `--help` does not show has none.
fn manual(dir: &Path, command: &clap::Command, above: Option<&str>, date: &str) -> Result<(), Failure> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let page = page(command, name, above, date).map_err(|error| failed("write the page of", name, error))?;
    write(dir, &format!("{name}.1"), &page)?;
    let shown = |below: &&clap::Command| !below.is_hide_set();
    command.get_subcommands().filter(shown).try_for_each(|below| manual(dir, below, Some(name), date))
}

fn page(command: &clap::Command, name: &str, above: Option<&str>, date: &str) -> io::Result<Vec<u8>> {
    let man =
        Man::new(command.clone()).title(name.to_uppercase()).date(date).source(SOURCE).manual("mt-agent");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.get_subcommands().any(|below| !below.is_hide_set()) {
        man.render_subcommands_section(&mut page)?;
    }
    let mut roff = Roff::new();
    roff.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in [
        ("0", "It is done."),
        ("1", "It failed; standard error says why."),
        ("2", "The command line is wrong."),
        ("3", "It is refused by a safety rule, or a precondition is not met."),
    ] {
        roff.control("TP", ["4"]).text([bold(code)]).text([roman(meaning)]);
    }
    roff.control("SH", ["SEE ALSO"]);
    let above = above.map(|above| format!("{above}(1), ")).unwrap_or_default();
    roff.text([roman(format!("{above}mt-agent.toml(5)"))]);
    roff.to_writer(&mut page)?;
    Ok(page)
}

/// The page of the configuration, from the table that reads it.
fn configuration(date: &str) -> Roff {
    let default = Config::default();
    let mut page = Roff::new();
    page.control("TH", ["MT-AGENT.TOML", "5", date, SOURCE, "mt-agent"]);
    page.control("SH", ["NAME"]).text([roman("mt-agent.toml - the configuration of a master target")]);
    page.control("SH", ["SYNOPSIS"]).text([roman(DEFAULT_FILE)]);
    page.control("br", []).text([roman(format!("{DEFAULT_SNIPPETS}/*.toml"))]);
    page.control("SH", ["DESCRIPTION"]).text([roman(
        "What the service and the commands of a master target go by, in TOML. The files of the directory are read \
         after the main one, in the order of their names. A key that several files set has the value of the last \
         one, and a key that none sets its default. All of these files may be missing.",
    )]);
    page.control("PP", []).text([
        bold("mt-agent config check"),
        roman(" finds mistakes without starting anything, and "),
        bold("mt-agent config show --effective"),
        roman(
            " tells what holds and which file says so. With a mistake in it, or where it cannot be read, every command that goes by \
             it ends with 3, and systemd does not start the service again; a reload is refused, which `systemctl status` shows, \
             and the service goes on with what it had. No value may have control characters in it.",
        ),
    ]);
    page.control("SH", ["KEYS"]);
    for key in &KEYS {
        let value = (key.show)(&default).to_string();
        page.control("TP", []).text([bold(key.name), roman(" = "), italic(value)]);
        page.text([roman(key.about.replace('\n', " "))]);
        if key.reloads {
            page.text([roman("A reload takes it on.")]);
        }
    }
    page.control("SH", ["SEE ALSO"]).text([roman("mt-agent-serve(1), mt-agent-config(1)")]);
    page
}

/// The day that the pages tell: that of the source where the build says so, as package builders do, else today.
fn date() -> Result<String, Failure> {
    let now = match std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|epoch| epoch.parse().ok()) {
        Some(epoch) => OffsetDateTime::from_unix_timestamp(epoch).map_err(Failure::failed)?,
        None => OffsetDateTime::now_utc(),
    };
    now.format(format_description!("[year]-[month]-[day]")).map_err(Failure::failed)
}

fn failed(op: &'static str, what: impl ToString, error: io::Error) -> Failure {
    Failure::failed(IoError::new(op, what.to_string(), error))
}

fn write(dir: &Path, name: &str, content: &[u8]) -> Result<(), Failure> {
    fs::create_dir_all(dir).map_err(|error| failed("make", dir.display(), error))?;
    let path = dir.join(name);
    fs::write(&path, content).map_err(|error| failed("write", path.display(), error))
}
