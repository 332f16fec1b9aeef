//! The host of the users' WebAssembly: loads the modules of a folder, follows the folder, and runs
//! messages through them.
//!
//! ```text
//! folder ──► loader ──► Transform ─┐
//!   ▲   settings ──────────────────┴──► Chain ──(watch)──► Runner, one per worker
//!   └── Host: looks, compiles beside the traffic, publishes
//! ```
//!
//! Rules that everything here keeps:
//!
//! - A file that does not load never replaces one that does. What is published was compiled,
//!   instantiated and initialised before.
//! - A chain is immutable. A message is made by one chain, whole.
//! - A guest's failure costs one message. Its instance is never entered again.
//! - Precompiled code is run only if this process wrote it (see `cache`).
//!
//! Only this module names wasmtime.

mod answers;
mod bindings;
mod breaches;
mod cache;
mod chain;
mod compiler;
mod description;
mod edits;
mod engine;
mod folder;
mod health;
mod host;
mod inspect;
mod instance;
mod last_good;
mod limits;
mod loader;
pub mod ready_made;
mod refused;
mod runner;
mod schema;
mod settings;
mod state;
mod verdict;
mod vet;
mod wasi;
mod watch;
mod workbench;

#[cfg(test)]
mod tests;

pub use answers::fuzz_answers;
pub use chain::Chain;
pub(crate) use compiler::{COMMAND as COMPILE_COMMAND, compile_for_parent};
pub use health::{Health, Tally};
pub use inspect::Inspection;
pub use instance::Class;
pub(crate) use instance::{SAID, without_words};
pub use last_good::live_modules;
pub use loader::MODULE_BYTES_MAX;
pub use runner::{Failure, Outcome, Runner};
pub(crate) use schema::lines as setting_lines;
pub(crate) use state::steers;
pub use vet::{Comparison, Trial, Vet, VetReport, VetResult};
pub use watch::{Error, Host, HostSettings, TransformList, TransformState, TransformView};
pub use workbench::{ModuleFiles, Refused, Unsupported, Workbench, read_modules, user_cache_dir};

/// Bytes in lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes everything");
        text
    })
}
