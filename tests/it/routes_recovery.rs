//! What holds for the pipeline's own stream holds for those that transforms choose: what is spilled
//! reaches them, a frozen process writes nothing to them when it wakes up, and records that are gone from
//! one are an operator's to decide about.

use std::path::Path;

use crate::support::oracle::{TABLES, Workload, judge_streams};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Fault, Front, Relay, Wire};
use crate::support::s2::{Server, data};
use crate::support::sluicebox::Home;
use crate::support::until;
use crate::support::world::{BASIN, World, field, settings};

const STREAMS: [&str; 3] = ["cdc/insert", "cdc/update", "cdc/delete"];

/// A world whose messages go to streams by a template.
async fn world(test: &str, dir: &Path, template: &str, sections: &str) -> World<'static> {
    let database = Cluster::shared().await.database(test).await;
    let s2 = Server::on_disk(dir).await;
    let mut world = World::of(database, s2, TABLES, &["public.items"]).await;
    world.home.settings.sink = "create = true\n".to_owned();
    world.home.settings.sections = sections.to_owned();
    world.home.write_config();
    world.ok(&["transforms", "add", "route", "--set", &format!("stream={template}")]).await;
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_spilled_reaches_the_streams_that_it_is_routed_to() {
    let dir = tempfile::tempdir().unwrap();
    let sections = "[delivery]\nspill_after = \"1s\"";
    let world = world("routes_spill", dir.path(), "cdc/{action}", sections).await;
    let mut running = world.start().ready().await;
    let work = Workload::new(world.database.url(), 3).start();
    for round in 0..3 {
        work.commits(100).await;
        world.s2.kill().await;
        running.until_spilled().await;
        work.commits(100).await;
        // Dies with everything on disk, while it is read again, or not at all.
        if round == 0 {
            running.kill().await;
            running = world.start();
        }
        world.s2.up().await;
        if round == 1 {
            running.kill().await;
            running = world.start();
        }
        running = running.ready().await;
    }
    work.stop().await;
    judge_streams(&world, &STREAMS).await;
    world.until_confirmed().await;
    assert!(world.records().await.is_empty(), "everything is routed");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_process_writes_to_no_routed_stream_when_it_wakes_up() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("routes_zombie", dir.path(), "cdc/{action}", "").await;
    let first = world.start().ready().await;
    let work = Workload::new(world.database.url(), 2).start();
    work.commits(50).await;
    let mut other = settings(&world.database, &world.s2.endpoint(), &["public.items"]);
    other.slot.clone_from(&world.settings.slot);
    other.sink.clone_from(&world.settings.sink);
    other.state = world.path("state").to_str().unwrap().to_owned();
    other.transforms = world.transforms().to_str().unwrap().to_owned();
    let second = Home::new(other);
    let running = second.take_over_from(&first).await;
    work.commits(50).await;
    first.signal("CONT");
    assert_eq!(first.ended().await.code(), Some(1), "the process that woke up");
    work.commits(50).await;
    work.stop().await;
    judge_streams(&world, &STREAMS).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_routed_stream_that_was_trimmed_waits_for_a_choice() {
    const STREAM: &str = "left";
    let dir = tempfile::tempdir().unwrap();
    let world = world("routes_trimmed", dir.path(), "{column:label}", "").await;
    let insert = async |id: u64| {
        world.sql(&format!("insert into items values ({id}, {id}, '{STREAM}', 'r0wv4lue')")).await;
    };
    let running = world.start().ready().await;
    insert(1).await;
    until("the first record", async || {
        let tail = world.s2.tail(BASIN, STREAM).await;
        if tail.as_ref().is_ok_and(|tail| *tail >= 2) { Ok(()) } else { Err(format!("{tail:?}")) }
    })
    .await;
    world.until_confirmed().await;
    running.kill().await;
    for _ in 0..2 {
        world.s2.append_foreign(BASIN, STREAM).await;
    }
    let tail = world.s2.tail(BASIN, STREAM).await.unwrap();
    world.s2.trim(BASIN, STREAM, tail).await;
    insert(2).await;

    let before = world.log().len();
    assert_eq!(world.start().ended().await.code(), Some(1));
    let log = world.log()[before..].to_owned();
    for part in ["`left`", "trimmed or have expired", "--lost-records resend", "skip"] {
        assert!(log.contains(part), "`{part}` is not in:\n{log}");
    }
    let running = world.start_with(&["--lost-records", "resend"]).ready().await;
    insert(3).await;
    until("the changes to arrive", async || {
        let records = world.s2.read_from(BASIN, STREAM, tail).await;
        let ids: Vec<String> = data(&records).iter().map(|record| field(record, "id")).collect();
        if ids == ["2", "3"] { Ok(()) } else { Err(format!("{ids:?}")) }
    })
    .await;
    world.until_confirmed().await;
    running.kill().await;
    // It is not asked for again.
    let running = world.start().ready().await;
    running.stop().await;
}

/// Something in front of S2 says of a stream that it is not there, and it is, with records in it whose
/// acknowledgements were lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_only_said_to_be_gone_gets_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = world("routes_gone", dir.path(), "cdc/{action}", "").await;
    let front = Front::of(&world.s2).await;
    let relay = Relay::to(front.port()).await;
    world.home.settings.endpoint = relay.endpoint();
    world.home.write_config();
    let mut running = world.start().ready().await;
    let work = Workload::new(world.database.url(), 3).start();
    for round in 1..=5 {
        work.commits(60).await;
        // What is sent arrives, and no answer comes back.
        relay.set(Wire::HalfClose);
        work.commits(60).await;
        front.set(Fault::status(404, "stream_not_found"));
        relay.cut_once().await;
        until("the streams to be said to be gone", async || {
            running.assert_alive();
            let said = world.log().matches("what is routed to this stream is parked").count();
            if said >= round { Ok(()) } else { Err(said.to_string()) }
        })
        .await;
        front.set(Fault::None);
        running = running.ready().await;
    }
    work.stop().await;
    world.until_no_messages().await;
    judge_streams(&world, &STREAMS).await;
    running.stop().await;
}
