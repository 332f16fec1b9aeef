//! Sluicebox: Postgres changes, through your own WebAssembly, into an S2 stream.

pub mod admin;
pub mod app;
pub mod case;
pub mod change;
pub mod cli;
pub mod clock;
pub mod config;
pub mod decode;
#[cfg(feature = "embedded-s2")]
pub mod demo;
pub mod error_chain;
pub mod finding;
pub mod fuzz;
pub mod group_by;
pub mod message;
mod mutation;
pub mod pg_type;
pub mod pipeline;
pub mod policy;
#[cfg(test)]
mod simulation;
pub mod sink;
pub mod source;
pub mod store;
pub mod table_name;
pub mod throwaway;
pub mod transform;
pub mod verify;
