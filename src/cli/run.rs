//! `sluicebox run`: the pipeline until SIGINT or SIGTERM.

use std::process::ExitCode;

use super::{Global, signals};
use crate::app;
use crate::config::Config;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {}

/// What can heal is waited for by the pipeline itself; an error from here needs a hand.
pub(super) async fn run(global: &Global, arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments {} = arguments;
    let config = Config::load(&global.config)?;
    let shutdown = signals::shutdown()?;
    let running = Box::pin(app::start(config, shutdown)).await?;
    tracing::info!(console = format!("http://{}", running.console), "sluicebox runs");
    running.finish().await?;
    tracing::info!("sluicebox has stopped; what was not confirmed is read again at the next start");
    Ok(ExitCode::SUCCESS)
}
