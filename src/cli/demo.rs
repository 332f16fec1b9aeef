//! `sluicebox demo`: the whole path on this machine.

use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// End by itself: read the stream back, compare it with the table, and exit 0 only if nothing
    /// is missing, doubled, out of order or too large.
    #[arg(long)]
    exit: bool,
    /// Rows to insert, at least 100; updates and deletes come on top.
    #[arg(long, value_name = "N", default_value = "20000", value_parser = clap::value_parser!(u64).range(100..))]
    rows: u64,
    /// Another seed draws other rows, and the same one the same.
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
    /// Leave the folder with database, stream, store and logs where it is.
    #[arg(long)]
    keep: bool,
}

/// It writes its log into its own folder, and ends its Postgres and S2 on SIGINT and SIGTERM.
#[cfg(feature = "embedded-s2")]
pub(super) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { exit, rows, seed, keep } = arguments;
    crate::demo::run(crate::demo::Options { rows, seed, exit, keep }).await
}

#[cfg(not(feature = "embedded-s2"))]
pub(super) async fn run(_arguments: Arguments) -> anyhow::Result<ExitCode> {
    let text = "this build has no embedded S2, which the demo needs; build with the feature \
                `embedded-s2`";
    Err(super::UsageError(text.to_owned()).into())
}

#[cfg(all(test, feature = "embedded-s2"))]
mod tests {
    use clap::{CommandFactory as _, FromArgMatches as _, Parser};

    use super::*;
    use crate::demo::{Options, ROWS_MIN};

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn the_defaults_are_the_demonstrations_own() {
        let parse = |line: &[&str]| {
            let matches = Alone::command().try_get_matches_from(line)?;
            Alone::from_arg_matches(&matches)
        };
        let Options { rows, seed, .. } = Options::default();
        let arguments = parse(&["demo"]).unwrap().arguments;
        assert_eq!((arguments.rows, arguments.seed), (rows, seed));
        assert!(parse(&["demo", "--rows", &ROWS_MIN.to_string()]).is_ok());
        assert!(parse(&["demo", "--rows", &(ROWS_MIN - 1).to_string()]).is_err());
    }
}
