//! SIGINT and SIGTERM as a shutdown that drains.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::output;

/// What a shell expects of a process that SIGINT ended.
const EXIT_INTERRUPTED: i32 = 130;

/// A token that the first SIGINT or SIGTERM cancels. A second one ends the process at once, for
/// an operator who does not want to wait: nothing is lost by that, only sent again.
///
/// Call it within a Tokio runtime.
///
/// # Errors
///
/// When the system takes no signal handlers.
pub fn shutdown() -> io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
            }
        };
        let name = next().await;
        tracing::info!("{name}: shutting down; a second signal ends at once");
        cancelled.cancel();
        let name = next().await;
        output::to_stderr(&format!("{name} again: ended without draining"));
        std::process::exit(EXIT_INTERRUPTED);
    });
    Ok(token)
}
