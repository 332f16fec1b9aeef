//! What a module is, whether or not it can be used: for `transforms inspect`.
//!
//! The loader stops at the first thing that is wrong; this goes on as far as the bytes can be read,
//! and asks the loader for the verdict.

use serde::Serialize;
use wasmparser::{Encoding, Parser, Payload};

use super::{loader, schema};

/// What the bytes are.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// `component`, `core module`, `core module with wasip1`, or `unknown`.
    pub kind: &'static str,
    pub bytes: u64,
    /// SHA-256, in hexadecimal: what `transforms list` shows.
    pub digest: String,
    /// The version of sluicebox:transform that it was built for.
    pub interface: Option<String>,
    /// What it needs from the host, the transform interface included.
    pub imports: Vec<String>,
    pub exports: Vec<String>,
    /// How it can be set, where it says so: the custom section `sluicebox:settings`.
    pub settings_schema: Option<serde_json::Value>,
    /// Whether it would be taken up from a transforms folder, as far as its settings allow.
    pub loads: bool,
    /// Why not, with the mend.
    pub reason: Option<String>,
}

/// `refused`: why it does not load.
pub(super) fn inspect(bytes: &[u8], refused: Option<&loader::Error>) -> Inspection {
    // What took its reader with it is not read here.
    let is_dangerous = refused.is_some_and(loader::Error::is_dangerous);
    let examined = (!is_dangerous).then(|| loader::examine(bytes));
    let (kind, encoded) = match examined {
        Some(Ok(loader::Kind::Component)) => ("component", None),
        Some(Ok(loader::Kind::Core { wasip1 })) => (
            if wasip1 { "core module with wasip1" } else { "core module" },
            loader::encode(bytes, wasip1).ok(),
        ),
        Some(Err(_)) | None => (encoding(bytes), None),
    };
    let readable = if is_dangerous { &[] } else { encoded.as_deref().unwrap_or(bytes) };
    let names = loader::Names::of(readable).unwrap_or_default();
    let interface = names.imports.iter().chain(&names.exports).find_map(|name| {
        let (_, version) = name.strip_prefix(loader::PACKAGE)?.split_once('@')?;
        Some(version.to_owned())
    });
    let reason = refused.map(ToString::to_string);
    Inspection {
        kind,
        bytes: bytes.len() as u64,
        digest: loader::digest(bytes),
        interface,
        imports: names.imports,
        exports: names.exports,
        settings_schema: schema::of(bytes),
        loads: reason.is_none(),
        reason,
    }
}

fn encoding(bytes: &[u8]) -> &'static str {
    match Parser::new(0).parse_all(bytes).next() {
        Some(Ok(Payload::Version { encoding: Encoding::Component, .. })) => "component",
        Some(Ok(Payload::Version { encoding: Encoding::Module, .. })) => "core module",
        _ => "unknown",
    }
}
