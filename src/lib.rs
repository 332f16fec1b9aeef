//! Sluicebox: Postgres changes, through your own WebAssembly, into an S2 stream.

pub mod change;
pub mod decode;
pub mod message;
pub mod pg_type;
pub mod pipeline;
pub mod sink;
pub mod transform;
