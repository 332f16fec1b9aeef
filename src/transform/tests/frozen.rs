//! Modules that were built against a released version of the interface go on working, for ever.
//!
//! They are files, not builds: what today's `wit/`, SDK and compiler make says nothing about what
//! users have in their folders. Never write them anew; a later version of the interface gets a
//! folder of its own.

use std::collections::BTreeSet;

use serde_json::json;

use super::*;

/// The chaos guest of the day of the release, as cargo built it.
const RUST: &[u8] = include_bytes!("../../../tests/fixtures/frozen-1.0.0/rust.wasm");

/// The guest that is written by hand, as a component.
const COMPONENT: &[u8] = include_bytes!("../../../tests/fixtures/frozen-1.0.0/component.wasm");

/// Every function of the interface is called by it, and by the next two: core modules and components
/// as cargo builds them, with and without WASI.
const ALL: [(&str, &[u8]); 3] = [
    ("rust-all.wasm", include_bytes!("../../../tests/fixtures/frozen-1.0.0/rust-all.wasm")),
    ("rust-wasip1.wasm", include_bytes!("../../../tests/fixtures/frozen-1.0.0/rust-wasip1.wasm")),
    ("rust-wasip2.wasm", include_bytes!("../../../tests/fixtures/frozen-1.0.0/rust-wasip2.wasm")),
];

/// The interface as it was released, without its documentation.
const SIGNATURES: &str = include_str!("../../../tests/fixtures/frozen-1.0.0/signatures.wit");

fn run(act: &str, more: &str, body: &str) -> Outcome {
    let settings = format!("[config]\nact = \"{act}\"\n{more}");
    let chain = chain(vec![transform("10-frozen.wasm", RUST, &settings)]);
    runner().run(&chain, draft(body))
}

#[test]
fn what_was_built_for_1_0_0_reads_and_edits() {
    let edited = |act: &str, more: &str| message(&kept(run(act, more, "some body")));
    assert_eq!(edited("keep", ""), message(&draft("some body")));
    assert_eq!(edited("remove", "")["record"]["body"], Value::Null);
    assert_eq!(edited("set", "")["record"]["body"], json!({"masked": true}));
    assert_eq!(edited("rename", "")["record"]["headline"], "a title");
    assert_eq!(edited("append", "")["metadata"]["list"], json!([1, {"a": 2}]));
    assert_eq!(edited("count", "")["metadata"]["calls"], 1);
    assert_eq!(edited("truncate", "number = 4")["record"]["body"], "some");
    assert_eq!(edited("replace", "")["wrapped"]["action"], "update");
    let names = json!(["id", "title", "body", "tags"]);
    assert_eq!(edited("column-names", "")["metadata"]["names"], names);
    let columns = edited("columns", "")["metadata"]["columns"].to_string();
    assert!(columns.contains("id:int4:true:false:1"), "{columns}");
    let seen = edited("read", "")["metadata"]["seen"].to_string();
    assert!(seen.contains("4711 3 1749604762402358"), "{seen}");
    let hash = |act: &str| edited(act, "")["record"]["title"].as_str().unwrap().len();
    assert_eq!([hash("hash"), hash("hmac")], [64, 64]);
    let record = kept(run("headers", "number = 2", "")).into_record().unwrap();
    assert!(record.headers.iter().any(|header| header.name == b"h1"));
}

#[test]
fn what_was_built_for_1_0_0_decides_and_fails() {
    assert!(several(run("drop", "", "")).is_empty());
    assert_eq!(several(run("split", "number = 3", "")).len(), 3);
    assert_eq!(several(run("parts", "number = 1024", &"x".repeat(3000))).len(), 4);
    let routed = kept(run("route", "text = \"orders\"", ""));
    assert_eq!(routed.stream().map(|stream| &**stream), Some("orders"));
    assert_eq!(failed(run("error", "", "")).class, Class::Guest);
    let trapped = failed(run("trap", "", ""));
    assert_eq!(trapped.class, Class::Trap);
    assert!(trapped.text.contains("nothing is 0"), "{}", trapped.text);
    assert!(trapped.trace[0].backtrace.iter().any(|frame| frame.contains("inner")));
    assert!(trapped.trace[0].logs.iter().any(|line| line == "info: about to trap"));
}

#[test]
fn a_component_that_was_built_for_1_0_0_works() {
    let chain = chain(vec![transform("10-frozen.wasm", COMPONENT, "")]);
    assert_eq!(message(&kept(runner().run(&chain, draft("text")))), message(&draft("text")));
}

#[test]
fn what_was_built_for_1_0_0_calls_every_function() {
    for (file, bytes) in ALL {
        let chain = chain(vec![transform(
            "10-frozen.wasm",
            bytes,
            "[config]\nact = \"everything\"\ntext = \"whole\"",
        )]);
        let mut runner = runner();
        let draft = kept(runner.run(&chain, draft("some body")));
        assert_eq!(draft.stream().map(|stream| &**stream), Some("orders"), "{file}");
        let logs = &runner.trace()[0].logs;
        assert_eq!(*logs, ["warn: everything was called"], "{file}");
        let message = &message(&draft)["whole"];
        let record = &message["record"];
        assert_eq!(record["title"], "a much longer", "{file}");
        assert_eq!(record["added"], json!([1, 2]), "{file}");
        assert_eq!(record["body"].as_str().unwrap().len(), 64, "{file}");
        assert!(record["labels"].is_string() && record["gone"].is_null(), "{file}: {record}");
        assert_eq!(message["changes"]["title"], "the old one", "{file}");
        let metadata = &message["metadata"];
        for (key, value) in [
            ("action", json!("Action::Update")),
            ("table", json!("public.documents")),
            ("position", json!("4711/3")),
            ("timestamp", json!("1749604762402358")),
            ("column", json!("id:int4:true:false:1")),
            (
                "columns",
                json!(
                    "id:int4:true:false:1 title:text:false:false:9 body:text:false:false:11 \
                     tags:jsonb:false:false:13"
                ),
            ),
            ("names", json!("id title body tags")),
            ("title", json!("Some(\"\\\"a title\\\"\") Some(\"a title\")")),
            ("old", json!("Some(\"\\\"old title\\\"\")")),
            ("truncated", json!("true")),
            ("compressed", json!("true")),
            ("hashed", json!("true")),
            ("removed", json!("true")),
            ("list", json!([1])),
            ("stream", json!("orders")),
            ("fits", json!("true")),
            ("replaced", json!("false")),
            ("truncated_columns", json!({"title": 19})),
        ] {
            assert_eq!(metadata[key], value, "{file}: {key}");
        }
        assert!(
            metadata["annotation"].as_str().unwrap().contains("old title"),
            "{file}: {metadata}"
        );
        let packed = &metadata["compressed_columns"]["labels"];
        assert_eq!((&packed["codec"], &packed["bytes"]), (&json!("gzip"), &json!(13)), "{file}");
        let record = draft.into_record().unwrap();
        assert!(record.headers.iter().any(|header| header.name == b"name"), "{file}");
    }
}

/// The functions of the interface by the names that a module imports or exports.
fn functions() -> BTreeSet<String> {
    let mut resolve = wit_parser::Resolve::default();
    let package = resolve.push_source("transform.wit", SIGNATURES).unwrap();
    let interfaces = &resolve.packages[package].interfaces;
    let imported =
        interfaces.values().flat_map(|id| resolve.interfaces[*id].functions.keys().cloned());
    let world = resolve.select_world(&[package], Some("transform")).unwrap();
    let exported = resolve.worlds[world].exports.keys().map(|key| resolve.name_world_key(key));
    imported.chain(exported).collect()
}

/// The names under which the core modules of a file import and export, nested ones too.
fn names(bytes: &[u8]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for payload in wasmparser::Parser::new(0).parse_all(bytes) {
        let payload = payload.unwrap();
        if let wasmparser::Payload::ImportSection(section) = &payload {
            names.extend(
                section.clone().into_imports().map(|import| import.unwrap().name.to_owned()),
            );
        }
        if let wasmparser::Payload::ExportSection(section) = &payload {
            names.extend(section.clone().into_iter().map(|export| export.unwrap().name.to_owned()));
        }
    }
    names
}

#[test]
fn no_function_of_1_0_0_is_without_a_module_that_uses_it() {
    let functions = functions();
    assert_eq!(functions.len(), 31 + 3, "{functions:?}");
    for (file, bytes) in ALL {
        let names = names(bytes);
        let unused: Vec<&String> =
            functions.iter().filter(|function| !names.contains(*function)).collect();
        assert!(
            unused.is_empty(),
            "{file} does not use {unused:?}: add a module beside it that does, never build it anew"
        );
    }
}

#[test]
fn the_interface_is_the_one_that_was_released() {
    let wit = include_str!("../../../wit/transform.wit");
    let signatures: Vec<&str> = wit
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
        .collect();
    assert_eq!(
        signatures,
        SIGNATURES.lines().collect::<Vec<_>>(),
        "`wit/transform.wit` is not what was released as 1.0.0, and modules built against it must go \
         on working: undo the change, or put what is new into a version 1.1.0 that the host links \
         beside it, with fixtures of its own in `tests/fixtures/frozen-1.1.0`"
    );
    assert_eq!(crate::transform::bindings::VERSION, "1.0.0");
}
