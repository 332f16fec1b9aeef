//! Messages that a transform routes to streams of their own: each is once in its stream, in order,
//! whoever is killed; and the trouble of one stream is the others' only where order asks for it.

use std::path::Path;

use crate::support::oracle::{TABLES, Workload, judge_streams};
use crate::support::postgres::Cluster;
use crate::support::s2::{Record, Server, data};
use crate::support::world::{BASIN, STREAM, World, field};
use crate::support::{Random, until};

/// A world whose S2 keeps its streams on disk, with more settings of the sink.
async fn world(test: &str, dir: &Path, sink: &str) -> World<'static> {
    let database = Cluster::shared().await.database(test).await;
    let s2 = Server::on_disk(dir).await;
    let mut world = World::of(database, s2, TABLES, &["public.items"]).await;
    world.home.settings.sink = sink.to_owned();
    world.home.write_config();
    world
}

async fn route(world: &World<'_>, template: &str) {
    world.ok(&["transforms", "add", "route", "--set", &format!("stream={template}")]).await;
}

async fn records(world: &World<'_>, stream: &str) -> Vec<Record> {
    match world.s2.tail(BASIN, stream).await {
        Ok(_) => data(&world.s2.read(BASIN, stream).await).into_iter().cloned().collect(),
        Err(_) => Vec::new(),
    }
}

async fn until_ids(world: &World<'_>, stream: &str, expected: &[&str]) {
    until(&format!("{expected:?} in `{stream}`"), async || {
        let records = records(world, stream).await;
        let mut ids: Vec<String> = records.iter().map(|record| field(record, "id")).collect();
        // What was parked has an order in its group only.
        ids.sort();
        let mut expected: Vec<&str> = expected.to_vec();
        expected.sort_unstable();
        if ids == expected { Ok(()) } else { Err(format!("{ids:?}")) }
    })
    .await;
}

async fn insert(world: &World<'_>, id: u64, stream: &str) {
    world.sql(&format!("insert into items values ({id}, {id}, '{stream}', 'r0wv4lue')")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_change_is_once_in_its_stream_whoever_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("routes_kill", dir.path(), "create = true\n").await;
    // A row's changes move from stream to stream.
    route(&world, "cdc/{action}").await;
    let first = world.start().ready().await;
    let load = Workload::new(world.database.url(), 3);
    let mut random = Random::new(load.seed);
    let work = load.start();
    work.commits(20).await;
    first.kill().await;
    for round in 0..6 {
        let running = world.start();
        tokio::time::sleep(std::time::Duration::from_millis(random.below(1_500))).await;
        work.commits(random.below(100)).await;
        if round % 3 == 1 {
            world.s2.kill().await;
            tokio::time::sleep(std::time::Duration::from_millis(random.below(300))).await;
            world.s2.up().await;
            work.commits(random.below(50)).await;
        }
        running.kill().await;
    }
    work.stop().await;
    let running = world.start().ready().await;
    let streams = ["cdc/insert", "cdc/update", "cdc/delete"];
    judge_streams(&world, &streams).await;
    for stream in streams {
        let records = records(&world, stream).await;
        assert!(!records.is_empty(), "nothing was routed to {stream}");
        let action = &stream["cdc/".len()..];
        assert!(records.iter().all(|record| record.header("sb-action") == action), "{stream}");
    }
    assert!(world.records().await.is_empty(), "everything is routed");
    world.until_confirmed().await;
    let status = world.status().await.unwrap();
    let names: Vec<&str> =
        status["streams"].as_array().unwrap().iter().filter_map(|s| s["name"].as_str()).collect();
    assert_eq!(names.len(), 3, "{status}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_stream_parks_what_is_bound_for_it_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("routes_missing", dir.path(), "").await;
    world.s2.create_stream(BASIN, "left").await;
    route(&world, "{column:label}").await;
    let running = world.start().ready().await;
    for (id, stream) in [(1, "left"), (2, "gone"), (3, STREAM), (4, "gone"), (5, "left")] {
        insert(&world, id, stream).await;
    }
    // It waits behind a parked message of its row, wherever it is to go.
    world.sql("update items set label = 'left' where id = 2").await;
    until_ids(&world, "left", &["1", "5"]).await;
    until_ids(&world, STREAM, &["3"]).await;
    world.until_messages("failed", 2).await;
    world.until_messages("waiting", 1).await;
    world.until_confirmed().await;
    for message in world.messages(Some("failed")).await {
        assert_eq!(message["error"]["class"], "route", "{message}");
        let text = message["error"]["text"].as_str().unwrap();
        assert!(text.contains("`gone`") && text.contains(BASIN) && text.contains("404"), "{text}");
        let shown = world.ok(&["messages", "show", message["id"].as_str().unwrap()]).await;
        assert!(shown.contains("gone"), "{shown}");
    }
    let status = world.status().await.unwrap();
    assert_eq!(status["ready"], true, "{status}");
    let shut = status["streams"].as_array().unwrap().iter().find(|s| s["name"] == "gone").cloned();
    assert_eq!(shut.unwrap()["state"], "shut", "{status}");

    // It stays so over a restart, and goes by itself once the stream is there.
    running.kill().await;
    let running = world.start().ready().await;
    insert(&world, 6, "left").await;
    until_ids(&world, "left", &["1", "5", "6"]).await;
    world.s2.create_stream(BASIN, "gone").await;
    until_ids(&world, "gone", &["2", "4"]).await;
    until_ids(&world, "left", &["1", "5", "6", "2"]).await;
    world.until_no_messages().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_deleted_is_begun_anew_and_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("routes_deleted", dir.path(), "").await;
    world.s2.create_stream(BASIN, "left").await;
    route(&world, "{column:label}").await;
    let running = world.start().ready().await;
    insert(&world, 1, "left").await;
    until_ids(&world, "left", &["1"]).await;
    world.until_confirmed().await;
    running.kill().await;
    // `delete_stream` waits for it by creating it again.
    world.s2.delete_stream(BASIN, "left").await;
    let running = world.start().ready().await;
    insert(&world, 2, "left").await;
    insert(&world, 3, STREAM).await;
    until_ids(&world, "left", &["2"]).await;
    until_ids(&world, STREAM, &["3"]).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_message_that_a_newer_chain_routes_elsewhere_arrives_once() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("routes_elsewhere", dir.path(), "").await;
    route(&world, "{column:label}").await;
    let running = world.start().ready().await;
    insert(&world, 1, "gone").await;
    insert(&world, 2, STREAM).await;
    world.until_messages("failed", 1).await;
    world.drop_in_settings("10-route.wasm", "[config]\nstream = \"changes\"\n");
    until_ids(&world, STREAM, &["2", "1"]).await;
    world.until_no_messages().await;
    world.s2.create_stream(BASIN, "gone").await;
    running.kill().await;
    let running = world.start().ready().await;
    insert(&world, 3, "gone").await;
    until_ids(&world, STREAM, &["2", "1", "3"]).await;
    assert!(records(&world, "gone").await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_streams_than_may_be_open_at_once_take_turns() {
    const STREAMS: u64 = 100;
    let dir = tempfile::tempdir().unwrap();
    let world = world("routes_many", dir.path(), "create = true\n").await;
    route(&world, "{column:label}").await;
    let running = world.start().ready().await;
    world
        .sql(&format!(
            "insert into items select n, n, 'many-' || n % {STREAMS}, 'x' \
             from generate_series(1, {STREAMS} * 3) n"
        ))
        .await;
    for stream in 0..STREAMS {
        let ids: Vec<String> = (1..=STREAMS * 3)
            .filter(|id| id % STREAMS == stream)
            .map(|id| id.to_string())
            .collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        until_ids(&world, &format!("many-{stream}"), &ids).await;
    }
    world.until_confirmed().await;
    running.stop().await;
}
