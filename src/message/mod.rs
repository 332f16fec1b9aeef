//! The message: a change as the JSON object that consumers read, and as the record that carries
//! it.
//!
//! A [`Draft`] is a change on its way through the transforms. It costs little to make: no value
//! is copied until it is edited, and none is turned into JSON before somebody asks for it or for
//! its size. Nothing here knows WebAssembly, Postgres's protocol or the network.
//!
//! ```text
//! Change ──► Draft ──► edits ──► Record
//!              │                    body: {"record","changes","action","metadata"}
//!              └── Envelope         headers: sb-…, then those of the transforms
//! ```

mod columns;
mod cut;
mod draft;
mod encode;
mod envelope;
mod interval;
mod nested;
pub mod out;
mod record;
mod string;
#[cfg(test)]
mod tests;
mod time;
mod value;
mod weight;

pub use cut::cuts;
pub use draft::{ColumnInfo, Draft, EditError};
pub use encode::EncodeError;
pub use envelope::{Envelope, EnvelopeSettings, idempotency_key};
pub use interval::of_same_size as interval_of_same_size;
pub use record::RecordError;
pub use value::value_json;
pub use weight::{Subject, Weight, shown};

/// The names of Sluicebox's own record headers, in the order in which every record has them.
pub mod header {
    /// What all names start with; transforms cannot set such a header.
    pub const PREFIX: &str = sluicebox_edits::HEADER_PREFIX;
    /// The pipeline's id, drawn once and kept in the store.
    pub const PIPELINE: &str = "sb-pipeline";
    /// The change's [`super::idempotency_key`].
    pub const KEY: &str = "sb-key";
    /// Which of how many records the change became: `0/3` is the first of three.
    pub const PART: &str = "sb-part";
    /// `schema.name`.
    pub const TABLE: &str = "sb-table";
    /// `insert`, `update`, `delete`, `read` or `truncate`.
    pub const ACTION: &str = "sb-action";
    /// Generation and digest of the chain that made the record.
    pub const CHAIN: &str = "sb-chain";
    /// The transforms, separated by commas, that failed and let the message pass.
    pub const PASSED: &str = "sb-passed";
    /// The class of the last failure, in a dead letter only: its body is a case, and no message.
    pub const DEAD_LETTER: &str = "sb-dead-letter";
}
