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

/// The chaos module's text, with a function that keeps a compiler busy: for minutes at a depth of 60,000,
/// for some seconds at a quarter of that. With a number, so that no two need be the same.
pub fn slow_text(text: &str, depth: usize, number: usize) -> String {
    let loops = format!(
        "(func (param i32) {} {} i32.const {number} drop)",
        "loop local.get 0 br_if 0 ".repeat(depth),
        "end ".repeat(depth)
    );
    let memory = "(memory (export";
    assert!(text.contains(memory));
    text.replacen(memory, &format!("{loops} {memory}"), 1)
}

/// The chaos module's text, made to take out the column `body` as well.
pub fn stripping_text() -> String {
    let text = chaos_text();
    let import = "(import \"sluicebox:transform/types@1.0.0\" \"[resource-drop]change\"";
    let remove = "(import \"sluicebox:transform/types@1.0.0\" \"[method]change.remove\" \
                  (func $remove (param i32 i32 i32 i32)))";
    let call = "(call $drop_change (local.get $change))";
    let calls = format!(
        "(call $remove (local.get $change) (i32.const 8) (i32.const 4) (i32.const 3072)) {call}"
    );
    let data = "(data (i32.const 0) \"label\")";
    assert!(text.contains(import) && text.contains(call) && text.contains(data));
    text.replacen(import, &format!("{remove} {import}"), 1).replacen(call, &calls, 1).replacen(
        data,
        &format!("{data} (data (i32.const 8) \"body\")"),
        1,
    )
}

/// The chaos module, with `trap` and `loop` taken for nothing special.
pub fn calm() -> Vec<u8> {
    let text = chaos_text().replace("0x70617274", "0x70617275").replace("0x706f6f6c", "0x706f6f6d");
    assert_ne!(text, chaos_text());
    core_module(&text, &interface_text())
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
