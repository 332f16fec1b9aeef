//! `sluicebox demo`: the whole path on this machine.

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// End by itself: read the stream back, compare it with the table, and exit 0 only if nothing
    /// is missing, doubled, out of order or too large.
    #[arg(long)]
    pub(super) exit: bool,
    /// Rows to write.
    #[arg(long, value_name = "N")]
    pub(super) rows: Option<u64>,
    /// Keep the temporary folder with the database, the stream and the logs.
    #[arg(long)]
    pub(super) keep: bool,
}
