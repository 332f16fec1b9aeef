//! The tools for those who write transforms: what `test`, `bench`, `inspect` and `export` print, and
//! with which exit code.

use std::fs;

use serde_json::Value;

use crate::support::guest;
use crate::support::sluicebox::Home;
use crate::support::world::World;

const NOTES: &str = "create table notes (id bigint primary key, label text, body text);";

async fn notes(test: &str) -> World<'static> {
    World::new(test, NOTES, &["public.notes"]).await
}

/// Three messages of the table that the chaos module knows.
fn write_messages(home: &Home) -> String {
    let message = |id: u32, label: &str| {
        format!(
            r#"{{"action":"insert","table":"public.notes","record":{{"id":{id},"label":"{label}","body":"text"}}}}"#
        )
    };
    let lines = [message(1, "keep it"), message(2, "drop it"), message(3, "split it")].join("\n");
    let path = home.path("messages.json");
    fs::write(&path, lines).unwrap();
    path.display().to_string()
}

fn write(home: &Home, name: &str, bytes: &[u8]) -> String {
    let path = home.path(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_is_tried_on_samples_and_compared_with_what_is_expected() {
    let world = notes("try").await;
    let module = write(&world, "chaos.wasm", &guest::chaos());
    // The built-in samples: every kind of message, and what is too large stays too large.
    let report = world.json(&["transforms", "test", &module]).await;
    assert_eq!(report["ok"], true, "{report}");
    let outcomes: Vec<&str> = report["samples"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["outcome"].as_str().unwrap())
        .collect();
    assert_eq!(outcomes, ["sent", "sent", "sent", "sent", "sent", "sent", "oversize"]);
    assert!(report["transforms"][0]["memory_bytes"].as_u64().unwrap() >= 65_536, "{report}");

    let messages = write_messages(&world);
    let expected = world.path("expected.json").display().to_string();
    let with = ["transforms", "test", &module, "--messages", &messages];
    let text = world.ok(&with).await;
    assert!(text.contains("dropped") && text.contains("part 1 of 2"), "{text}");
    world.ok(&[&with[..], &["--write-expect", &expected]].concat()).await;
    world.ok(&[&with[..], &["--expect", &expected]].concat()).await;

    // Another result is a difference, shown and told by the exit code.
    let changed = fs::read_to_string(&expected).unwrap().replace("\"dropped\"", "\"sent\"");
    fs::write(&expected, changed).unwrap();
    let output = world.cli(&[&with[..], &["--expect", &expected]].concat()).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("-    \"outcome\": \"sent\""), "{text}");
    assert!(text.contains("+    \"outcome\": \"dropped\""), "{text}");

    // A failure is an answer, with its reason; a missing file is wrong usage.
    let trap = r#"{"action":"insert","table":"public.notes","record":{"id":1,"label":"trap"}}"#;
    let trap = write(&world, "trap.json", trap.as_bytes());
    let output = world.cli(&["transforms", "test", &module, "--messages", &trap, "--json"]).await;
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["samples"][0]["outcome"], "failed");
    assert_eq!(report["samples"][0]["error"]["class"], "trap");
    assert!(!report["samples"][0]["trace"][0]["backtrace"].as_array().unwrap().is_empty());
    for wrong in [["nowhere.wasm", &messages], [&module, "nowhere.json"]] {
        let output = world.cli(&["transforms", "test", wrong[0], "--messages", wrong[1]]).await;
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }

    let report = world.json(&["transforms", "bench", &module, "--seconds", "1"]).await;
    let samples = report["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 3);
    assert!(samples.iter().all(|sample| sample["micros_with"].as_f64().unwrap() > 0.0), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_is_inspected_whether_or_not_it_loads() {
    let world = notes("inspect").await;
    let module = write(&world, "chaos.wasm", &guest::chaos());
    let report = world.json(&["transforms", "inspect", &module]).await;
    assert_eq!(report["kind"], "core module");
    assert_eq!(report["interface"], "1.0.0");
    assert_eq!(report["loads"], true);
    assert_eq!(report["digest"].as_str().unwrap().len(), 64);
    let component = write(&world, "component.wasm", &guest::component(&guest::chaos()));
    let report = world.json(&["transforms", "inspect", &component]).await;
    assert_eq!(report["kind"], "component");
    assert!(world.ok(&["transforms", "inspect", &component]).await.contains("loads      yes"));

    let text = write(&world, "text.wasm", b"no module");
    let output = world.cli(&["transforms", "inspect", &text, "--json"]).await;
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["kind"], "unknown");
    assert!(report["reason"].as_str().unwrap().contains("text, not WebAssembly"), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_message_is_replayed_elsewhere() {
    let world = notes("export").await;
    let module = write(&world, "10-chaos.wasm", &guest::chaos());
    world.drop_in_settings("10-chaos.wasm", "# as it was\n");
    world.drop_in("10-chaos.wasm", &guest::chaos());
    let running = world.start().ready().await;
    world.until_transform("10-chaos.wasm", "live").await;
    world
        .sql(
            "insert into notes values (1, 'trap r0wv4lue', 'r0wv4lue'); \
             insert into notes values (2, 'keep', repeat('r0wv4lue', 200000));",
        )
        .await;
    let parked = world.until_messages("failed", 2).await;
    let id = parked[0]["id"].as_str().unwrap();

    let file = world.path("case.json").display().to_string();
    world.ok(&["messages", "export", id, "-o", &file]).await;
    let case: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(case["sluicebox_case"], 1);
    assert_eq!(case["change"]["new"]["label"], "trap r0wv4lue");
    assert_eq!(case["failure"]["error"]["class"], "trap");
    assert_eq!(case["transforms"][0]["settings"], "# as it was\n");
    let output = world.cli(&["transforms", "test", &module, "--case", &file, "--json"]).await;
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["samples"][0]["error"]["class"], "trap");
    let notes = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(notes.contains("has the settings of the case"), "{notes}");

    // Other values, the same sizes; what a guest said goes, too.
    let redacted = world.ok(&["messages", "export", id, "--redact"]).await;
    assert!(!redacted.contains("r0wv4lue"), "{redacted}");
    let redacted: Value = serde_json::from_str(&redacted).unwrap();
    assert_eq!(redacted["redacted"], true);
    let label = redacted["change"]["new"]["label"].as_str().unwrap();
    assert_eq!(label.len(), "trap r0wv4lue".len());
    let gone = world.cli(&["messages", "export", "99"]).await;
    assert_eq!(gone.status.code(), Some(1));

    // All that failed, from the running process: with a module that mends one of the two.
    world.ok(&["transforms", "add", "strip-columns", "--column", "body", "--number", "90"]).await;
    world.until_transform("90-strip-columns.wasm", "live").await;
    let strip = world.path("transforms/90-strip-columns.wasm").display().to_string();
    let parked = world.until_messages("failed", 1).await;
    assert_eq!(parked[0]["id"], id);
    let report = world.json(&["transforms", "test", &strip, "--parked"]).await;
    assert_eq!(report["samples"][0]["outcome"], "sent", "{report}");
    assert!(report["samples"][0]["difference"].as_str().unwrap().contains("-    \"body\""));
    running.stop().await;
}
