//! The tools for those who write transforms: what `test`, `bench`, `inspect` and `export` print, and
//! with which exit code.

use std::fs;

use serde_json::Value;
use sluicebox::transform::ready_made;

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
    // What sizes do to it, they do to it elsewhere: it is too large, and without its body it is not.
    let large = parked[1]["id"].as_str().unwrap();
    let file = world.path("redacted.json").display().to_string();
    world.ok(&["messages", "export", large, "--redact", "-o", &file]).await;
    assert!(!fs::read_to_string(&file).unwrap().contains("r0wv4lue"));
    let apart = world.path("apart");
    fs::create_dir(&apart).unwrap();
    let strip = apart.join("10-strip.wasm").display().to_string();
    fs::write(&strip, ready_made::find("strip-columns").unwrap().module()).unwrap();
    fs::write(apart.join("10-strip.toml"), "[config]\ncolumns = [\"body\"]\n").unwrap();
    for (module, outcome, exit) in [(&module, "oversize", 1), (&strip, "sent", 0)] {
        let output = world.cli(&["transforms", "test", module, "--case", &file, "--json"]).await;
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["samples"][0]["outcome"], outcome, "{report}");
        assert_eq!(output.status.code(), Some(exit), "{report}");
    }
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

/// A module that calls each function of the interface, and whose functions have names.
const NAMED: &[u8] = include_bytes!("../fixtures/frozen-1.0.0/rust-all.wasm");
/// One whose memory and functions are the same on every machine.
const STEADY: &[u8] = include_bytes!("../fixtures/frozen-1.0.0/component.wasm");

/// The text with `N` for each time in it.
fn without_times(text: &str) -> String {
    let mut steady = String::new();
    for piece in text.split_inclusive(" µs") {
        let Some(rest) = piece.strip_suffix(" µs") else {
            steady.push_str(piece);
            continue;
        };
        steady.push_str(rest.trim_end_matches(|c: char| c.is_ascii_digit()));
        steady.push_str("N µs");
    }
    steady
}

/// What a writer of transforms reads, to the letter.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_tools_print() {
    let world = notes("texts").await;
    let module = write(&world, "chaos.wasm", STEADY);
    let messages = write_messages(&world);
    let more = r#"{"action":"insert","table":"public.notes","record":{"id":4,"label":"trap"}}"#;
    let error = r#"{"action":"insert","table":"public.notes","record":{"id":5,"label":"error"}}"#;
    let failing = write(&world, "failing.json", format!("{more}\n{error}").as_bytes());
    let output = world
        .cli(&["transforms", "test", &module, "--messages", &messages, "--messages", &failing])
        .await;
    assert_eq!(output.status.code(), Some(1));
    let text = without_times(&String::from_utf8_lossy(&output.stdout));
    let failing_name = |name: &str| format!("{name} of {}", world.path("failing.json").display());
    let expected = format!(
        "\
== insert 1 (insert of public.notes)
   sent: 732 B of 1.0 MiB, N µs
   chaos.wasm: keep, N µs
   no change

== insert 2 (insert of public.notes)
   dropped: 732 B of 1.0 MiB, N µs
   chaos.wasm: drop, N µs

== insert 3 (insert of public.notes)
   sent: 733 B -> 340 B in 2 records of 1.0 MiB, N µs
   chaos.wasm: split, N µs
   header sb-part: 0/2
   header sb-part: 1/2
sent, part 0 of 2:
+{{
+  \"part\": 1
+}}
sent, part 1 of 2:
+{{
+  \"part\": 2
+}}

== {} (insert of public.notes)
   failed: 715 B of 1.0 MiB, N µs
   chaos.wasm: trap, N µs
     stack function 4
   error: trap: `chaos.wasm` trapped: wasm `unreachable` instruction executed

== {} (insert of public.notes)
   failed: 716 B of 1.0 MiB, N µs
   chaos.wasm: guest, N µs
   error: guest: `chaos.wasm` failed the message: the label asks for an error

chaos.wasm (52b3c62f3719843b): 128.0 KiB of memory
",
        failing_name("insert 1"),
        failing_name("insert 2")
    );
    assert_eq!(text, expected);
    let summary = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(summary.contains("5 messages: 2 sent, 1 dropped, 2 failed"), "{summary}");

    // What an edit changes, and where a trap was with what was logged before it.
    world.ok(&["transforms", "add", "strip-columns", "--column", "body", "--number", "10"]).await;
    let strip = world.path("transforms/10-strip-columns.wasm").display().to_string();
    let text = world.ok(&["transforms", "test", &strip, "--messages", &messages]).await;
    for line in [
        "   sent: 732 B -> 746 B of 1.0 MiB, ",
        "-    \"label\": \"keep it\",",
        "-    \"body\": \"text\"",
        "+    \"label\": \"keep it\"",
        "+    \"stripped_columns\": [",
        "+      \"body\"",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    let named = write(&world, "named.wasm", NAMED);
    let settings = write(&world, "named.toml", b"[config]\nact = \"trap\"\n");
    let with = ["transforms", "test", &named, "--settings", &settings, "--messages", &failing];
    let output = world.cli(&with).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in [
        "     log   info: about to trap\n",
        "     log   error: panicked at ",
        "     stack sluicebox_chaos::inner\n     stack sluicebox_chaos::outer\n",
        "its last log line: error: panicked at ",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }

    let text = world.ok(&["transforms", "inspect", &module]).await;
    assert_eq!(
        text,
        "\
kind       component
size       2.1 KiB
digest     52b3c62f3719843b39e54d8f31ae80065fe69364cfd1651e03ee3c28c2431002
interface  sluicebox:transform@1.0.0
import     sluicebox:transform/types@1.0.0
export     init
export     transform
settings   - (the module does not describe them)
loads      yes
"
    );
    let text = world.ok(&["transforms", "inspect", &strip]).await;
    for line in [
        "kind       core module\n",
        "import     sluicebox:transform/types@1.0.0\n",
        "setting    columns: a list, each a string, required: ",
        "setting    only_oversize: ",
        "loads      yes\n",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }

    let text = world.ok(&["transforms", "bench", &module, "--seconds", "1"]).await;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    for (line, words) in lines.iter().zip([
        ["MESSAGE", "µS WITHOUT", "µS ADDED", "CHANGES/S ON ONE THREAD"],
        ["insert with 1.0 KiB of text", "KiB", ".", ""],
        ["insert with 64.0 KiB of text", "KiB", ".", ""],
        ["insert with 2.0 MiB of text", "MiB", ".", ""],
        ["memory of the instances: 128.0 KiB", "", "", ""],
    ]) {
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} are not in {text}");
    }
}

/// Class, stack, log lines, verdicts, names and digests of a parked message: in the list, the view, the
/// console's API and the exported case, and the same after the process was killed.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_message_went_through_is_kept_everywhere() {
    let world = notes("trace").await;
    world.drop_in_settings("10-first.wasm", "[config]\nact = \"log\"\nnumber = 2\n");
    world.drop_in("10-first.wasm", NAMED);
    world.drop_in_settings("20-second.wasm", "[config]\nact = \"trap\"\n");
    world.drop_in("20-second.wasm", NAMED);
    let mut running = world.start().ready().await;
    let live = world.until_transform("20-second.wasm", "live").await;
    let digest = live["digest"].as_str().unwrap().to_owned();
    assert_eq!(digest.len(), 64);
    world.sql("insert into notes values (1, 'r0wv4lue', 'r0wv4lue');").await;

    for life in 0..2 {
        let parked = world.until_messages("failed", 1).await;
        let id = parked[0]["id"].as_str().unwrap();
        let check = |error: &Value, trace: &Value| {
            assert_eq!(error["class"], "trap");
            assert_eq!(error["transform"], "20-second.wasm");
            let text = error["text"].as_str().unwrap();
            assert!(
                text.starts_with("`20-second.wasm` trapped: ") && text.contains("nothing is 0")
            );
            let steps = trace.as_array().unwrap();
            let told = |step: &Value| {
                ["transform", "verdict", "digest"].map(|key| step[key].as_str().unwrap().to_owned())
            };
            let first = ["10-first.wasm", "keep", &digest].map(str::to_owned);
            let second = ["20-second.wasm", "trap", &digest].map(str::to_owned);
            assert_eq!(steps.iter().map(told).collect::<Vec<_>>(), [first, second], "{trace}");
            assert_eq!(steps[0]["logs"], serde_json::json!(["debug: line 0", "debug: line 1"]));
            assert_eq!(steps[1]["logs"][0], "info: about to trap");
            let last = steps[1]["logs"][1].as_str().unwrap();
            assert!(last.starts_with("error: panicked at") && last.ends_with("nothing is 0"));
            let stack: Vec<&str> = steps[1]["backtrace"]
                .as_array()
                .unwrap()
                .iter()
                .map(|f| f.as_str().unwrap())
                .collect();
            let inner = stack.iter().position(|frame| *frame == "sluicebox_chaos::inner").unwrap();
            assert_eq!(stack[inner + 1], "sluicebox_chaos::outer", "{stack:?}");
            assert!(steps[0]["backtrace"].as_array().unwrap().is_empty());
        };
        let shown = world.json(&["messages", "show", id]).await;
        check(&shown["error"], &shown["trace"]);
        let answer = reqwest::get(world.url(&format!("/api/v1/messages/{id}"))).await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        check(&answer["error"], &answer["trace"]);
        let case: Value =
            serde_json::from_str(&world.ok(&["messages", "export", id]).await).unwrap();
        check(&case["failure"]["error"], &case["failure"]["trace"]);
        // Redacted, all of it but what the guest said.
        let redacted = world.ok(&["messages", "export", id, "--redact"]).await;
        let redacted: Value = serde_json::from_str(&redacted).unwrap();
        let step = &redacted["failure"]["trace"][1];
        assert_eq!(step["backtrace"], case["failure"]["trace"][1]["backtrace"]);
        assert_eq!((&step["verdict"], &step["digest"]), (&"trap".into(), &digest.clone().into()));
        assert!(!redacted.to_string().contains("about to trap"), "{redacted}");

        let text = world.ok(&["messages", "show", id]).await;
        let short = &digest[..16];
        for line in [
            "error         trap: `20-second.wasm` trapped: ",
            "in transform  20-second.wasm\n",
            &format!("passed        10-first.wasm ({short}): keep, "),
            "  log         debug: line 1\n",
            &format!("passed        20-second.wasm ({short}): trap, "),
            "  log         info: about to trap\n",
            "  stack       sluicebox_chaos::inner\n  stack       sluicebox_chaos::outer\n",
            "what to do    Replace 20-second.wasm in the transforms folder",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        if life == 0 {
            running.kill().await;
            running = world.start().ready().await;
        }
    }
    running.stop().await;
}
