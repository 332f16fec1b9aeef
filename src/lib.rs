//! Sluicebox: Postgres changes, through your own WebAssembly, into an S2 stream.

pub mod admin;
pub mod change;
pub mod cli;
pub mod config;
pub mod finding;
pub mod pg_type;
pub mod pipeline;
pub mod sink;
