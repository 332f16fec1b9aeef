//! `sluicebox run`: the pipeline until SIGINT or SIGTERM.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

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
    /// there is never delivered, and what was not yet confirmed to Postgres may come twice. End every
    /// process that had the folder first: a frozen one that wakes up may still write to streams that
    /// transforms route to.
    #[arg(long)]
    abandon_parked: bool,
    /// Go on although records after the checkpoint were trimmed or have expired, the stream was made anew,
    /// or S2 was put back to an older state.
    #[arg(long, value_name = "WHAT")]
    lost_records: Option<LostRecords>,
    /// Go on although the slot is gone, was made anew or was moved by others, or the publication or the
    /// cluster is another one; a missing slot is made. What was changed since it was last read is never
    /// delivered (`sluicebox verify` shows the rows that differ).
    #[arg(long)]
    skip_lost_changes: bool,
    /// Take it as meant that the transforms folder is empty and another one than that of the modules that
    /// were live last: they leave the chain. Without this they go on, as where a volume is not mounted.
    /// Give it once, not in a unit file.
    #[arg(long)]
    no_transforms: bool,
}

/// How long a start that is told to stop may go on to a place where it notices.
const START_MAX: Duration = Duration::from_secs(1);

/// What can heal is waited for by the pipeline itself; an error from here needs a hand.
pub(super) async fn run(global: &Global, arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { take_over, abandon_parked, lost_records, skip_lost_changes, no_transforms } =
        arguments;
    let lost_changes = skip_lost_changes;
    let grants = Grants { take_over, abandon_parked, lost_records, lost_changes, no_transforms };
    let config = Config::load(&global.config)?;
    let shutdown = signals::shutdown()?;
    let Some(running) = start(config, grants, shutdown).await? else {
        tracing::info!("sluicebox was stopped before its pipeline ran");
        return Ok(ExitCode::SUCCESS);
    };
    tracing::info!(console = format!("http://{}", running.console), "sluicebox runs");
    running.finish().await?;
    tracing::info!("sluicebox has stopped; what was not confirmed is read again at the next start");
    Ok(ExitCode::SUCCESS)
}

/// Starts the pipeline, or nothing where somebody wants it to end first: to compile modules, to try them
/// on what is stored and to look through a large store takes as long as it takes, and nothing of that is
/// lost by leaving it.
async fn start(
    config: Config,
    grants: Grants,
    shutdown: CancellationToken,
) -> anyhow::Result<Option<app::Running>> {
    let told = shutdown.clone();
    let runtime = Handle::current();
    // On a thread of its own: what computes or waits for a disk would keep others from their turn.
    let start = tokio::task::spawn_blocking(move || {
        runtime.block_on(Box::pin(app::start(config, grants, told)))
    });
    let late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(START_MAX).await;
    };
    tokio::select! {
        biased;
        started = start => match started.context("the start broke off, which is a defect")? {
            Ok(running) => Ok(Some(running)),
            Err(error) if shutdown.is_cancelled() => {
                tracing::info!("what the start had come to: {error:#}");
                Ok(None)
            }
            Err(error) => Err(error),
        },
        () = late => Ok(None),
    }
}
