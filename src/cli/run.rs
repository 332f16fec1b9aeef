//! `sluicebox run`: the pipeline until SIGINT or SIGTERM.

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {}
