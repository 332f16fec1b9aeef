//! Everything that can be nested, far deeper than any stack, read in this process: what uses the host as
//! a library has no other one for it.

use std::sync::LazyLock;

use super::*;
use crate::transform::Workbench;
use crate::transform::loader::{encode, load};

const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";
const MODULE: &[u8] = b"\0asm\x01\0\0\0";
const IS_NESTED: &str = "nested 100 deep and deeper";

static WORKBENCH: LazyLock<Workbench> = LazyLock::new(|| Workbench::new(None).unwrap());

/// Sections by their numbers.
const CUSTOM: u8 = 0;
const CORE_MODULE: u8 = 1;
const INNER: u8 = 4;
const TYPES: u8 = 7;
const IMPORTS: u8 = 10;

fn leb(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(u8::try_from(number & 0x7f).unwrap() | 0x80);
        number >>= 7;
    }
    bytes.push(u8::try_from(number).unwrap());
    bytes
}

fn section(id: u8, content: &[u8]) -> Vec<u8> {
    [&[id], &leb(content.len())[..], content].concat()
}

fn component(sections: &[Vec<u8>]) -> Vec<u8> {
    [COMPONENT, &sections.concat()].concat()
}

/// A section with one type in which others are nested: `begin` stands in front of each.
fn types_within(begin: &[u8], depth: usize) -> Vec<u8> {
    section(TYPES, &[&[1], &begin.repeat(depth)[..], &[0x42, 0]].concat())
}

/// Each of the types is what the one behind it, which begins with `kind`, exports as `sort`. The first has
/// the number `from`.
fn types_by_number(kind: u8, sort: u8, from: usize, count: usize) -> Vec<u8> {
    let mut content = leb(count);
    content.extend([kind, 0]);
    for number in from + 1..from + count {
        let alias = [&[2, 3, 2, 1], &leb(number - 1)[..]].concat();
        content.extend([&[kind, 2], &alias[..], &[4, 0, 1, b'a', sort, 0]].concat());
    }
    section(TYPES, &content)
}

/// An import of the name that a transform may have.
fn import(sort: u8, number: usize) -> Vec<u8> {
    let name = b"sluicebox:transform/deep@1.0.0";
    section(IMPORTS, &[&[1, 0], &leb(name.len())[..], name, &[sort], &leb(number)].concat())
}

/// A core module that was built for the interface that this describes.
fn core_module(interface: &[u8]) -> Vec<u8> {
    let name = "component-type:deep";
    let content = [&leb(name.len()), name.as_bytes(), interface].concat();
    [MODULE, &section(CUSTOM, &content)].concat()
}

/// Bytes are refused, by the sentence about what is nested or by another one. That they are is the point:
/// a stack that runs out ends the process.
#[track_caller]
fn check(what: &str, bytes: &[u8], is_nested: bool) {
    let error = load(engine(), bytes, None).unwrap_err().to_string();
    // Which goes on where that ends.
    assert_eq!(WORKBENCH.inspect(bytes).reason.as_ref(), Some(&error), "{what}");
    assert_eq!(error.contains(IS_NESTED), is_nested, "{what}: {error}");
}

#[test]
fn what_is_nested_in_its_text_is_refused_unread() {
    let within: [(&str, &[u8]); 4] = [
        ("component types", &[0x41, 1, 1]),
        ("instance types", &[0x42, 1, 1]),
        ("both", &[0x41, 1, 1, 0x42, 1, 1]),
        // Behind a function, a record, a core type, an alias and an export.
        (
            "types behind others",
            &[
                0x42, 6, 1, 0x40, 0, 1, 0, 1, 0x72, 1, 1, b'f', 0x73, 0, 0x50, 0, 2, 3, 2, 1, 0, 4,
                0, 1, b'e', 1, 0, 1,
            ],
        ),
    ];
    for (what, begin) in within {
        let types = types_within(begin, 200_000);
        check(what, &component(std::slice::from_ref(&types)), true);
        check(what, &component(&[section(INNER, &component(std::slice::from_ref(&types)))]), true);
        check(what, &core_module(&component(std::slice::from_ref(&types))), true);
        // As it was written before 2024.
        let earlier = [&[3, 0, 5][..], b"world", &component(std::slice::from_ref(&types))].concat();
        check(what, &core_module(&earlier), true);
        check(what, &core_module(&component(&[section(INNER, &component(&[types]))])), true);
    }
    let inner =
        |depth: usize| (0..depth).fold(component(&[]), |it, _| component(&[section(INNER, &it)]));
    check("components", &inner(2000), true);
    check("the same in an interface", &core_module(&inner(2000)), true);
    let modules = component(&vec![section(CORE_MODULE, MODULE); 900]);
    check("modules side by side", &modules, false);
}

#[test]
fn what_is_not_nested_too_deep_is_read() {
    check("types", &component(&[types_within(&[0x41, 1, 1], 98)]), false);
    check("one more", &component(&[types_within(&[0x41, 1, 1], 99)]), true);
    // Side by side, and each with an end.
    let beside = [&leb(5000), &[0x41, 1, 1, 0x42, 0].repeat(5000)[..]].concat();
    check("types side by side", &component(&[section(TYPES, &beside)]), false);
    let wide = [&[1, 0x41], &leb(5000)[..], &[1, 0x42, 0].repeat(5000)].concat();
    check("types side by side in one", &component(&[section(TYPES, &wide)]), false);
    for cut in 1..40 {
        let types = types_within(&[0x41, 1, 1], 50);
        check(
            "a section that ends early",
            &component(&[types[..types.len() - cut].to_vec()]),
            false,
        );
    }
}

#[test]
fn what_is_nested_by_numbers_is_refused_by_whoever_reads_it() {
    const COUNT: usize = 50_000;
    let whole = encode(strip(), false).unwrap();
    let mut validator = wasmparser::Validator::new();
    let from = validator.validate_all(&whole).unwrap();
    let from = usize::try_from(from.as_ref().component_type_count()).unwrap();
    for (what, kind, sort) in [("instances", 0x42, 5), ("components", 0x41, 4)] {
        let types = types_by_number(kind, sort, 0, COUNT);
        let imported = import(sort, COUNT - 1);
        check(what, &component(&[types.clone(), imported.clone()]), false);
        check(what, &core_module(&component(&[types, imported])), false);
        let types = types_by_number(kind, sort, from, COUNT);
        let imported = import(sort, from + COUNT - 1);
        check(what, &[&whole[..], &types, &imported].concat(), false);
    }
    // Lists of lists.
    let mut lists = leb(COUNT);
    lists.extend([0x70, 0x73]);
    for number in 1..COUNT {
        // Signed: the last byte's highest bit would be its sign.
        let (low, high) = ((number - 1) & 0x7f, (number - 1) >> 7);
        lists.extend([0x70, u8::try_from(low).unwrap() | 0x80]);
        lists.extend([u8::try_from(high & 0x7f).unwrap() | 0x80]);
        lists.extend([u8::try_from(high >> 7).unwrap()]);
    }
    let lists = section(TYPES, &lists);
    check("lists", &component(std::slice::from_ref(&lists)), false);
    check("lists", &core_module(&component(&[lists])), false);
}

/// Adds the description of a world that imports an interface, written as text.
fn describe(module: &mut Vec<u8>, interfaces: &str, imported: &str) {
    let mut resolve = wit_parser::Resolve::default();
    let text = format!("package its:root; world transform {{ import {imported}; }} {interfaces}");
    let package = resolve.push_str("transform.wit", &text).unwrap();
    let world = resolve.select_world(&[package], None).unwrap();
    wit_component::embed_component_metadata(
        module,
        &resolve,
        world,
        wit_component::StringEncoding::UTF8,
    )
    .unwrap();
}

#[test]
fn packages_that_need_each_other_are_refused() {
    const SECOND_NEEDS_FIRST: &str = "package a:first { interface of { resource thing; } } \
        package b:second { interface needing { use a:first/of.{thing}; } }";
    const FIRST_NEEDS_SECOND: &str = "package b:second { interface of { resource thing; } } \
        package a:first { interface needing { use b:second/of.{thing}; } }";
    let mut module = MODULE.to_vec();
    describe(&mut module, SECOND_NEEDS_FIRST, "b:second/needing");
    let reason = load(engine(), &module, None).unwrap_err().to_string();
    assert!(!reason.contains("ring"), "one by itself: {reason}");
    describe(&mut module, FIRST_NEEDS_SECOND, "a:first/needing");
    let reason = load(engine(), &module, None).unwrap_err().to_string();
    let ring = "the packages of the module's interface need each other (`a:first`, `b:second`) in a \
                ring, and it cannot be put together; build it for one interface";
    assert_eq!(reason, ring);
    check("a ring", &module, false);
}
