//! S2: everything that speaks to it.
//!
//! ```text
//! open ── fences other writers out, reads what is already there ──▶ Session
//! Session ── batches out, acknowledgements back, in order ──▶ the pipeline
//! Client ── one request, one answer: tail, pages, appends, creating ──▶ open, check, tail, demo
//! ```
//!
//! It never decides what to do about a failure: [`Error::class`] says what one means. It never
//! sends anything twice by itself, because only the pipeline knows what may have landed.

pub mod client;
#[cfg(feature = "embedded-s2")]
pub mod embedded;
pub mod endpoint;
pub mod error;
pub mod headers;
mod json;
pub(crate) mod limits;
#[cfg(test)]
pub(crate) mod model;
pub mod open;
pub mod proto;
pub mod read;
pub mod record;
pub mod session;
pub mod transport;

pub use client::{Client, Mode, Settings};
pub use endpoint::{Endpoint, Token};
pub use error::{Class, Error};
pub use open::{Guarantee, Opened, open};
pub use read::{Page, ReadRecord, Reader};
pub use session::{Ack, Append, Session};

#[cfg(test)]
#[cfg(feature = "embedded-s2")]
mod tests;
