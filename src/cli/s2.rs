//! `sluicebox s2`: the embedded S2 server on its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The address to listen on; port 0 lets the system choose.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Keep the streams in this folder; in memory without it.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Serves until SIGINT or SIGTERM. The one line on stdout is the endpoint, printed when it answers.
#[cfg(feature = "embedded-s2")]
pub(super) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    use crate::sink::embedded::{Embedded, EmbeddedSettings, Storage};

    let storage = arguments.dir.map_or(Storage::Memory, Storage::Dir);
    let shutdown = super::signals::shutdown()?;
    let server = Embedded::start(EmbeddedSettings { listen: arguments.listen, storage }).await?;
    super::output::print(&format!("{}\n", server.url()))?;
    if !server.address().ip().is_loopback() {
        tracing::warn!(
            "the server is reachable from other machines, and it takes any access token"
        );
    }
    shutdown.cancelled().await;
    server.shutdown().await?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(not(feature = "embedded-s2"))]
pub(super) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { listen, dir: _ } = arguments;
    let text = format!(
        "this build has no embedded S2 to listen on {listen}; build with the feature `embedded-s2`"
    );
    Err(super::UsageError(text).into())
}
