//! The commands: arguments in, text or JSON out, an exit code at the end.
//!
//! Data goes to stdout and everything else to stderr. Errors travel up as `anyhow` and are printed
//! here, once, as one chain. Nothing here decides about delivery: `run` starts the pipeline, and
//! the rest asks the running process or S2.

mod check;
mod client;
mod demo;
mod human;
mod logging;
mod messages;
mod output;
mod run;
mod s2;
mod signals;
mod stream;
mod tail;
mod transforms;
mod verify;

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::{config, sink, source, transform, verify as verification};
use output::OutputError;

pub use logging::LogFormat;

/// Exit code where the answer is no, or the work could not be done.
const EXIT_NO: u8 = 1;
/// Exit code of wrong usage and wrong configuration; clap uses the same.
const EXIT_USAGE: u8 = 2;

/// How long a process that is done waits for its threads.
const THREADS_MAX: Duration = Duration::from_secs(2);

/// Postgres changes, through your own WebAssembly, into an S2 stream.
#[derive(Debug, Parser)]
#[command(name = "sluicebox", version, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// The configuration.
    #[arg(short, long, value_name = "FILE", default_value = "sluicebox.toml", global = true)]
    config: PathBuf,
    /// How log lines are written on stderr (SLUICEBOX_LOG=debug shows more).
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    log_format: LogFormat,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the whole path on this machine, with a throwaway Postgres and an embedded S2.
    Demo(demo::Arguments),
    /// Run the pipeline.
    Run(run::Arguments),
    /// Say what is wrong with the configuration, Postgres and S2, and what mends it.
    Check(check::Arguments),
    /// List, show, retry and acknowledge the messages in the store of the running process.
    #[command(subcommand)]
    Messages(messages::Command),
    /// List the transforms of the running process, or put a ready-made one into the folder.
    #[command(subcommand)]
    Transforms(transforms::Command),
    /// Print the stream as S2 has it.
    Tail(tail::Arguments),
    /// Compare the stream with the tables: what is missing, doubled, out of order or different.
    Verify(verify::Arguments),
    /// Run the embedded S2 server on its own, for development.
    S2(s2::Arguments),
    /// Compile the component on stdin for the process that started this one.
    #[command(name = transform::COMPILE_COMMAND, hide = true)]
    CompileModule,
}

/// Wrong usage that clap cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Parses the arguments, does what they say, and answers with the process's exit code.
#[must_use]
pub fn main() -> ExitCode {
    // Ends the process by itself for --help, --version and wrong usage.
    let cli = Cli::parse();
    match start(cli) {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    let Cli { global, command } = cli;
    match &command {
        Command::CompileModule => return compile_module(),
        // It tells its story on stderr, and logs into its own folder.
        Command::Demo(_) => {}
        Command::Run(_) | Command::S2(_) => logging::start(global.log_format, "info")?,
        Command::Check(_)
        | Command::Messages(_)
        | Command::Transforms(_)
        | Command::Tail(_)
        | Command::Verify(_) => logging::start(global.log_format, "warn")?,
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(async move {
        match command {
            Command::Demo(arguments) => Box::pin(demo::run(arguments)).await,
            Command::Run(arguments) => Box::pin(run::run(&global, arguments)).await,
            Command::Tail(arguments) => Box::pin(tail::run(&global, arguments)).await,
            Command::Verify(arguments) => Box::pin(verify::run(&global, arguments)).await,
            Command::S2(arguments) => Box::pin(s2::run(arguments)).await,
            Command::Check(arguments) => Box::pin(check::run(&global, arguments)).await,
            Command::Messages(command) => Box::pin(messages::run(&global, command)).await,
            Command::Transforms(command) => Box::pin(transforms::run(&global, command)).await,
            Command::CompileModule => unreachable!("it needs none of this, and was done before"),
        }
    });
    // What a thread still waits for, such as a disk or a name server, may never come.
    runtime.shutdown_timeout(THREADS_MAX);
    done
}

/// Bytes in, code out, and no words but those of the compiler.
fn compile_module() -> anyhow::Result<ExitCode> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes)?;
    match transform::compile_for_parent(&bytes) {
        Ok(code) => {
            std::io::stdout().lock().write_all(&code)?;
            Ok(ExitCode::SUCCESS)
        }
        Err((reason, code)) => {
            output::to_stderr(&reason);
            Ok(ExitCode::from(code))
        }
    }
}

/// Prints the chain and picks the exit code.
fn report(error: &anyhow::Error) -> ExitCode {
    let is_closed =
        |cause: &OutputError| matches!(cause, OutputError::Closed) && error.chain().len() == 1;
    if error.downcast_ref::<OutputError>().is_some_and(is_closed) {
        // `sluicebox … | head` has all that it wants.
        return ExitCode::SUCCESS;
    }
    // The alternate form of `anyhow` is the chain in one line.
    output::to_stderr(&format!("error: {error:#}"));
    ExitCode::from(exit_code(error))
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let is_usage = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<config::Error>()
            || cause.is::<UsageError>()
            || cause.is::<source::DsnError>()
            || matches!(cause.downcast_ref(), Some(sink::Error::Settings { .. }))
            || matches!(cause.downcast_ref(), Some(transform::Error::Folder { .. }))
            || matches!(
                cause.downcast_ref(),
                Some(
                    verification::Error::NotPublished { .. } | verification::Error::NoColumn { .. }
                )
            )
    };
    if error.chain().any(is_usage) { EXIT_USAGE } else { EXIT_NO }
}

#[cfg(test)]
mod tests;
