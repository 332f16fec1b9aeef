//! Log lines on stderr, chosen by `SLUICEBOX_LOG` or `RUST_LOG`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use super::UsageError;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object for each line.
    Json,
}

/// Starts logging. Without a variable, Sluicebox itself logs at `level` and every library at
/// `warn`: s2-lite and its storage tell much at `info` that an operator has no use for. The one that checks
/// certificates is silent: what it says comes with each attempt, and is the reason for which the sink waits.
pub(super) fn start(format: LogFormat, level: &str) -> Result<(), UsageError> {
    let filter = match chosen() {
        Some((name, text)) => EnvFilter::try_new(&text)
            .map_err(|error| UsageError(format!("{name} is no log filter: {error}")))?,
        None => EnvFilter::new(format!("warn,rustls_platform_verifier=off,sluicebox={level}")),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => {
            let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            builder.with_ansi(std::io::stderr().is_terminal() && !no_color).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| UsageError(format!("could not start logging: {error}")))
}

fn chosen() -> Option<(&'static str, String)> {
    ["SLUICEBOX_LOG", "RUST_LOG"].into_iter().find_map(|name| {
        let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
        Some((name, text))
    })
}
