//! What becomes of messages that are with a chain while another takes its place: a module that is slow
//! or never ends must not keep its mend waiting, and what it fails last must not be forgotten.

use std::fs;

use crate::support::guest;
use crate::support::until;
use crate::support::world::{World, field};

const NOTES: &str = "create table notes (id bigint primary key, label text, body text);";

/// Rows that the module of `tests/fixtures/chaos.wat` never comes back from.
fn looping(ids: std::ops::Range<u64>) -> String {
    let rows: Vec<String> = ids.map(|id| format!("({id}, 'loop r0wv4lue', 'r0wv4lue')")).collect();
    format!("insert into notes values {};", rows.join(", "))
}

/// Each row that loops takes ten seconds of a worker, and of whatever tries a chain on it: two hundred
/// of them would be over long after the test has given up.
#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_loops_is_gone_soon_after_its_file_and_mended_as_soon() {
    let world = World::new("loops", NOTES, &["public.notes"]).await;
    let settings = "[limits]\ntime_ms = 10000\n";
    world.drop_in_settings("10-chaos.wasm", settings);
    world.drop_in("10-chaos.wasm", &guest::chaos());
    let mut running = world.start().ready().await;
    world.until_transform("10-chaos.wasm", "live").await;
    let until_it_loops = async |since: usize| {
        until("the module to loop", async || {
            let list = world.json(&["transforms", "list"]).await;
            let calls = list["transforms"][0]["calls"].as_u64().unwrap();
            if calls > since as u64 { Ok(()) } else { Err(list.to_string()) }
        })
        .await;
    };
    world.sql(&looping(1..201)).await;
    until_it_loops(0).await;
    fs::remove_file(world.path("transforms/10-chaos.wasm")).unwrap();
    let records = world.until_records(200).await;
    // In order, but for what was being tried.
    assert!(records.iter().all(|record| record.generation() == records[0].generation()));
    world.until_no_messages().await;

    // The same once more, and this time it is mended. That is tried before it goes live, on what the
    // chain before never comes back from.
    world.drop_in_settings(
        "10-chaos.wasm",
        &format!("vet = \"off\"\nrollback = \"off\"\n{settings}"),
    );
    world.drop_in("10-chaos.wasm", &guest::chaos());
    world.until_transform("10-chaos.wasm", "live").await;
    world.sql(&looping(201..401)).await;
    until_it_loops(0).await;
    let for_ever = "(loop $for_ever (br $for_ever))";
    let mended = guest::chaos_text().replace(for_ever, "");
    assert_ne!(mended, guest::chaos_text());
    world.drop_in_settings("10-chaos.wasm", settings);
    world.drop_in("10-chaos.wasm", &guest::core_module(&mended, &guest::interface_text()));
    let records = world.until_records(400).await;
    world.until_no_messages().await;
    let mut ids: Vec<u64> = records.iter().map(|r| field(r, "id").parse().unwrap()).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(1..401));
    let generations: Vec<u64> = records.iter().map(|record| record.generation()).collect();
    assert!(generations.is_sorted(), "{generations:?}");
    running.assert_alive();
    running.stop().await;
}

/// The message is with a module that takes long, comes out too large, and its mend has gone live
/// meanwhile: nothing else would ever try it again.
#[tokio::test(flavor = "multi_thread")]
async fn what_fails_in_a_chain_that_has_left_is_tried_with_the_one_that_is_live() {
    let world = World::new("left", NOTES, &["public.notes"]).await;
    // Waits where the hand-written module loops, and keeps the message then.
    let import = "(import \"wasi:clocks/monotonic-clock@0.2.6\" \"subscribe-duration\" \
                  (func $subscribe (param i64) (result i32)))\n\
                  (import \"wasi:io/poll@0.2.6\" \"[method]pollable.block\" (func $block (param i32)))\n\
                  (import \"wasi:io/poll@0.2.6\" \"[resource-drop]pollable\" (func $forget (param i32)))\n\
                  (memory (export \"memory\")";
    let wait = "(local.set $at (call $subscribe (i64.const 8000000000))) (call $block (local.get $at)) \
                (call $forget (local.get $at))";
    let text = guest::chaos_text()
        .replace("(memory (export \"memory\")", import)
        .replace("(local $word i32)", "(local $word i32) (local $at i32)")
        .replace("(loop $for_ever (br $for_ever))", wait);
    let interface = guest::interface_text().replace(
        "import logging;",
        "import logging;\n    import wasi:clocks/monotonic-clock@0.2.6;",
    ) + "package wasi:io@0.2.6 { interface poll { resource pollable { block: func(); } } }\n\
         package wasi:clocks@0.2.6 {\n\
           interface monotonic-clock {\n\
             use wasi:io/poll@0.2.6.{pollable};\n\
             subscribe-duration: func(when: u64) -> pollable;\n\
           }\n\
         }\n";
    world.drop_in_settings("10-slow.wasm", "[limits]\ntime_ms = 60000\n");
    world.drop_in("10-slow.wasm", &guest::core_module(&text, &interface));
    let running = world.start().ready().await;
    world.until_transform("10-slow.wasm", "live").await;
    world.sql("insert into notes values (1, 'loop r0wv4lue', repeat('r0wv4lue', 200000));").await;
    until("the module to be called", async || {
        let list = world.json(&["transforms", "list"]).await;
        if list["transforms"][0]["calls"] == 1 { Ok(()) } else { Err(list.to_string()) }
    })
    .await;

    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let added = world.path("transforms/20-strip-columns.wasm");
    let strip = fs::read(&added).unwrap();
    fs::remove_file(added).unwrap();
    let settings = world.path("transforms/20-strip-columns.toml");
    let settings = fs::read_to_string(settings).unwrap();
    // Trying it would take as long as the message.
    world.drop_in_settings("10-slow.wasm", &format!("vet = \"off\"\n{settings}"));
    world.drop_in("10-slow.wasm", &strip);
    let records = world.until_records(1).await;
    assert_eq!(records[0].json()["record"].get("body"), None);
    world.until_no_messages().await;
    let parked = world.log().matches("parked; only its group waits").count();
    assert_eq!(parked, 1, "it was with the chain before, and failed there");
    running.stop().await;
}
