//! The commands as scripts use them: what is on stdout, in which shape, with which exit code.

use serde_json::Value;

use crate::support::sluicebox::TOKEN;
use crate::support::world::{BASIN, STREAM, World};

const TABLE: &str = "create table t (id bigint primary key, body text);";

async fn world(test: &str) -> World<'static> {
    World::new(test, TABLE, &["public.t"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn check_is_content_with_a_good_setup() {
    let world = world("check").await;
    // Before the first run, while it runs, and after.
    world.ok(&["check"]).await;
    let running = world.start().ready().await;
    world.ok(&["check"]).await;
    running.stop().await;
    let report = world.ok(&["check"]).await;
    world.look_through("`check`", &report);
    assert!(!report.contains(TOKEN));
    // It only looks: the stream holds nothing but what `run` did.
    let tail = world.s2.tail(BASIN, STREAM).await.unwrap();
    world.ok(&["check"]).await;
    assert_eq!(world.s2.tail(BASIN, STREAM).await.unwrap(), tail);
    assert!(world.json(&["check"]).await.is_object());
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_listed_shown_retried_and_given_up() {
    let world = world("messages").await;
    let running = world.start().ready().await;
    let empty = world.json(&["messages", "list"]).await;
    assert_eq!(empty["messages"], serde_json::json!([]));
    assert_eq!(empty["total"], 0);
    assert_eq!(empty["next"], Value::Null);

    world
        .sql(
            "insert into t select n, 'r0wv4lue' || repeat('x', 1200000) \
             from generate_series(1, 3) n",
        )
        .await;
    let parked = world.until_messages("parked", 3).await;
    for (state, table, count) in [
        ("failed", "public.t", 3),
        ("failed", "t", 3),
        ("waiting", "public.t", 0),
        ("retrying", "public.t", 0),
        ("parked", "public.other", 0),
    ] {
        let list = world.json(&["messages", "list", "--state", state, "--table", table]).await;
        assert_eq!(list["total"], count, "{state} {table}");
    }

    let id = parked[0]["id"].as_str().unwrap();
    let shown = world.json(&["messages", "show", id]).await;
    assert_eq!(shown["id"], id);
    assert_eq!(shown["key"], serde_json::json!({ "id": 1 }));
    // The operator who asks for a message sees it.
    assert!(shown["payload"].as_str().unwrap().contains("r0wv4lue"));
    assert_eq!(shown["payload_cut"], true);
    let hint = shown["hint"].as_str().unwrap();
    assert!(hint.contains("strip-columns") && hint.contains("body"), "{hint}");
    // For people, too: the reason and the mend.
    let text = world.ok(&["messages", "show", id]).await;
    assert!(text.contains("public.t") && text.contains("strip-columns"), "{text}");
    let text = world.ok(&["messages", "list"]).await;
    assert!(text.contains("public.t") && text.contains("parked"), "{text}");

    world.ok(&["messages", "retry", "--all"]).await;
    world.until_messages("parked", 3).await;
    world.ok(&["messages", "ack", id]).await;
    world.until_messages("parked", 2).await;
    let gone = world.cli(&["messages", "show", id]).await;
    assert_eq!(gone.status.code(), Some(1));
    let text = String::from_utf8_lossy(&gone.stderr).into_owned();
    assert!(text.contains(id), "{text}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transforms_are_added_with_the_next_number() {
    let world = world("add").await;
    // Without a running process: it only writes files.
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    world.ok(&["transforms", "add", "compress-columns", "--column", "body"]).await;
    let mut names: Vec<String> = std::fs::read_dir(world.path("transforms"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    let modules: Vec<&String> = names.iter().filter(|name| name.ends_with(".wasm")).collect();
    let [first, second] = modules.as_slice() else { panic!("two modules: {names:?}") };
    assert!(first.ends_with("-strip-columns.wasm"), "{names:?}");
    assert!(second.ends_with("-compress-columns.wasm"), "{names:?}");
    assert_eq!(names.len(), 4, "each with its settings: {names:?}");
    let running = world.start().ready().await;
    let entry = world.until_transform(first, "live").await;
    assert_eq!(entry["reason"], Value::Null);
    world.until_transform(second, "live").await;
    let list = world.json(&["transforms", "list"]).await;
    assert!(list["generation"].is_u64() && list["digest"].is_string(), "{list}");
    let text = world.ok(&["transforms", "list"]).await;
    assert!(text.contains(first.as_str()) && text.contains("live"), "{text}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_columns_can_be_undone_by_what_the_message_says() {
    let world = world("compress").await;
    world.ok(&["transforms", "add", "compress-columns", "--column", "body"]).await;
    let running = world.start().ready().await;
    let body = format!("r0wv4lue{}", "compress me ".repeat(200_000));
    let insert = "insert into t values (1, 'r0wv4lue' || repeat('compress me ', 200000))";
    world.sql(insert).await;
    let record = world.until_records(1).await.remove(0);
    let message = record.json();
    let how = &message["metadata"]["compressed_columns"]["body"];
    assert_eq!(how["encoding"], "base64");
    assert_eq!(how["content"], "text");
    assert_eq!(how["bytes"], body.len());
    use base64::Engine;
    let packed = message["record"]["body"].as_str().unwrap();
    let packed = base64::engine::general_purpose::STANDARD.decode(packed).unwrap();
    let plain = match how["codec"].as_str().unwrap() {
        "zstd" => zstd::decode_all(&packed[..]).unwrap(),
        "gzip" => {
            let mut plain = Vec::new();
            let mut decoder = flate2::read::GzDecoder::new(&packed[..]);
            std::io::Read::read_to_end(&mut decoder, &mut plain).unwrap();
            plain
        }
        other => panic!("an unknown codec {other}"),
    };
    assert!(plain == body.as_bytes());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tail_prints_the_stream() {
    let world = world("tail").await;
    let running = world.start().ready().await;
    world.sql("insert into t select n, 'row ' || n from generate_series(1, 3) n").await;
    world.until_records(3).await;
    let text = world.ok(&["tail"]).await;
    for n in 1..=3 {
        assert!(text.contains(&format!("row {n}")), "{text}");
    }
    // One JSON value per line.
    let lines = world.ok(&["tail", "--json"]).await;
    let bodies: Vec<Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(bodies.len() >= 3, "{lines}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_answer() {
    let world = world("probes").await;
    let running = world.start().ready().await;
    let health = reqwest::get(world.url("/healthz")).await.unwrap();
    assert_eq!(health.status(), 200);
    let ready = world.readyz().await.unwrap();
    assert_eq!(ready["reasons"], serde_json::json!([]));
    let status = world.status().await.unwrap();
    assert!(status["guarantee"].as_str().is_some_and(|text| text.starts_with("exactly once")));
    assert!(status["pipeline_id"].as_str().is_some_and(|id| !id.is_empty()));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn help_and_version_are_on_stdout() {
    let program = env!("CARGO_BIN_EXE_sluicebox");
    for args in [&["--help"][..], &["--version"], &["run", "--help"], &["messages", "--help"]] {
        let output = std::process::Command::new(program).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
}
