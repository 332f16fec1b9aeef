//! Modules for the transforms folder, in every form that a toolchain leaves behind: a core module
//! with the interface's description in it, the same as a component, and broken ones.

use std::fs;
use std::path::Path;

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// What begins a file that is a component.
const COMPONENT: [u8; 8] = *b"\0asm\x0d\0\x01\0";

fn here(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The text of `tests/fixtures/chaos.wat`, to make a variant of.
pub fn chaos_text() -> String {
    fs::read_to_string(here("tests/fixtures/chaos.wat")).unwrap()
}

/// The interface's text, to make a variant of.
pub fn interface_text() -> String {
    fs::read_to_string(here("wit/transform.wit")).unwrap()
}

/// A core module from its text, with the description of the interface that it was built for.
pub fn core_module(text: &str, interface: &str) -> Vec<u8> {
    let mut module = wat::parse_str(text).unwrap_or_else(|error| panic!("{error}"));
    let mut resolve = Resolve::default();
    let package = resolve.push_source("transform.wit", interface).unwrap();
    let world = resolve.select_world(&[package], Some("transform")).unwrap();
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();
    module
}

/// The module of `tests/fixtures/chaos.wat`.
pub fn chaos() -> Vec<u8> {
    core_module(&chaos_text(), &interface_text())
}

pub fn is_component(bytes: &[u8]) -> bool {
    bytes.starts_with(&COMPONENT)
}

/// A core module as a component.
pub fn component(module: &[u8]) -> Vec<u8> {
    assert!(!is_component(module), "this is a component already");
    let encoder = ComponentEncoder::default().validate(true).module(module);
    encoder.unwrap_or_else(|error| panic!("{error:#}")).encode().unwrap()
}
