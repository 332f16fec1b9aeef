//! Modules that were built against a released version of the interface go on working, for ever.
//!
//! They are files, not builds: what today's `wit/`, SDK and compiler make says nothing about what
//! users have in their folders. Never write them anew; a later version of the interface gets a
//! folder of its own.

use serde_json::json;

use super::*;

/// The chaos guest, which calls every function of the interface, as cargo built it.
const RUST: &[u8] = include_bytes!("../../../tests/fixtures/frozen-1.0.0/rust.wasm");

/// The guest that is written by hand, as a component.
const COMPONENT: &[u8] = include_bytes!("../../../tests/fixtures/frozen-1.0.0/component.wasm");

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
