//! `sluicebox s2`: the embedded S2 server on its own.

use std::net::SocketAddr;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The address to listen on; port 0 lets the system choose.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub(super) listen: SocketAddr,
    /// Keep the streams in this folder; in memory without it.
    #[arg(long, value_name = "DIR")]
    pub(super) dir: Option<PathBuf>,
}
