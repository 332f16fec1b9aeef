//! What a core module says of the interface that it was built for: a component in a custom section, or
//! several, which the encoder reads. What would take its stack is found before.

use std::collections::{BTreeMap, BTreeSet};

use wasmparser::BinaryReader;
use wit_parser::Resolve;
use wit_parser::decoding::{self, DecodedWasm};

use super::loader::{Error, caught, refuse_nested};

/// The packages that a module's descriptions name, each with those that it needs. The encoder makes one of
/// all descriptions, and follows packages in turn for as long as it has stack.
#[derive(Debug, Default)]
pub(super) struct Packages(BTreeMap<String, BTreeSet<String>>);

impl Packages {
    /// Takes a description. What else is wrong with it, the encoder says.
    pub(super) fn read(&mut self, section: &[u8]) -> Result<(), Error> {
        let Some(component) = component(section) else { return Ok(()) };
        refuse_nested(component)?;
        let Some(resolve) = caught(|| Ok(resolve(component)))? else { return Ok(()) };
        for (id, package) in resolve.packages.iter() {
            let needed = resolve.package_direct_deps(id);
            let needed = needed.map(|id| resolve.packages[id].name.to_string());
            self.0.entry(package.name.to_string()).or_default().extend(needed);
        }
        Ok(())
    }

    /// Those that need each other, and what lies between such.
    pub(super) fn ring(mut self) -> Option<Vec<String>> {
        loop {
            let left: BTreeSet<String> = self.0.keys().cloned().collect();
            let needed: BTreeSet<String> = self.0.values().flatten().cloned().collect();
            self.0.retain(|name, needs| needed.contains(name) && !needs.is_disjoint(&left));
            if self.0.is_empty() {
                return None;
            }
            if self.0.len() == left.len() {
                return Some(left.into_iter().collect());
            }
        }
    }
}

/// The component in a description. In an earlier form a byte for the encoding of strings and the world's
/// name stand in front of it.
fn component(section: &[u8]) -> Option<&[u8]> {
    if section.first() != Some(&0x03) {
        return Some(section);
    }
    let mut reader = BinaryReader::new(section.get(2..)?, 0);
    reader.read_string().ok()?;
    section.get(2 + reader.original_position()..)
}

/// What a component says of its packages; nothing where it cannot be read.
fn resolve(component: &[u8]) -> Option<Resolve> {
    if let Ok((resolve, _)) = decoding::decode_world(component) {
        return Some(resolve);
    }
    match decoding::decode(component).ok()? {
        DecodedWasm::WitPackage(resolve, _) | DecodedWasm::Component(resolve, _) => Some(resolve),
    }
}
