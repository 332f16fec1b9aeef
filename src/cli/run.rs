//! `sluicebox run`: the pipeline until SIGINT or SIGTERM.

use std::process::ExitCode;

use super::{Global, signals};
use crate::app;
use crate::config::Config;
use crate::pipeline::grants::{Grants, LostRecords};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Take state folder, slot and stream from a Sluicebox that is dead or frozen; should it wake up, it
    /// writes nothing more.
    #[arg(long)]
    take_over: bool,
    /// Go on although the state folder that belongs to the stream is lost. What was parked or waiting
    /// there is never delivered, and what was not yet confirmed to Postgres may come twice.
    #[arg(long)]
    abandon_parked: bool,
    /// Go on although records after the checkpoint were trimmed or have expired, or the stream was made
    /// anew.
    #[arg(long, value_name = "WHAT")]
    lost_records: Option<LostRecords>,
    /// Go on although the slot is gone, was made anew or was moved by others, or the publication or the
    /// cluster is another one; a missing slot is made. What was changed since it was last read is never
    /// delivered (`sluicebox verify` shows the rows that differ).
    #[arg(long)]
    skip_lost_changes: bool,
}

/// What can heal is waited for by the pipeline itself; an error from here needs a hand.
pub(super) async fn run(global: &Global, arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { take_over, abandon_parked, lost_records, skip_lost_changes } = arguments;
    let grants =
        Grants { take_over, abandon_parked, lost_records, lost_changes: skip_lost_changes };
    let config = Config::load(&global.config)?;
    let shutdown = signals::shutdown()?;
    let running = Box::pin(app::start(config, grants, shutdown)).await?;
    tracing::info!(console = format!("http://{}", running.console), "sluicebox runs");
    running.finish().await?;
    tracing::info!("sluicebox has stopped; what was not confirmed is read again at the next start");
    Ok(ExitCode::SUCCESS)
}
