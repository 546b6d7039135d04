//! The binary: parses the command line, dispatches, prints errors and chooses the exit code.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}
