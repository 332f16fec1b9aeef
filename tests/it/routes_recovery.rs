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

/// A start finds a stream forbidden that may have what an earlier run has sent, and a newer chain sends
/// that elsewhere: it waits, and nothing else does.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_cannot_be_read_at_a_start_keeps_only_what_may_be_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = world("routes_unread", dir.path(), "{column:label}", "").await;
    let front = Front::of(&world.s2).await;
    world.home.settings.endpoint = front.endpoint();
    world.home.write_config();
    let insert = async |id: u64, stream: &str| {
        let row = format!("{id}, {id}, '{stream}', 'r0wv4lue'");
        world.sql(&format!("insert into items values ({row})")).await;
    };
    let ids = async |stream: &str| {
        if world.s2.tail(BASIN, stream).await.is_err() {
            return Vec::new();
        }
        let records = world.s2.read(BASIN, stream).await;
        data(&records).iter().map(|record| field(record, "id")).collect::<Vec<_>>()
    };
    let until_ids = async |stream: &'static str, expected: &[&str]| {
        until(&format!("{expected:?} in {stream}"), async || {
            let found = ids(stream).await;
            if found == expected { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    };
    let running = world.start().ready().await;
    insert(1, "left").await;
    until_ids("left", &["1"]).await;
    world.until_confirmed().await;
    // One that does not get through keeps the checkpoint from passing what comes behind it. No start
    // that cannot read the stream can know that it is not there.
    front.set(Fault::OfStream { stream: "changes", status: 503, code: "unavailable" });
    insert(4, "changes").await;
    insert(2, "left").await;
    insert(3, "left").await;
    until_ids("left", &["1", "2", "3"]).await;
    running.kill().await;

    world.drop_in_settings("10-route.wasm", "[config]\nstream = \"changes\"\n");
    front.set(Fault::OfStream { stream: "left", status: 403, code: "permission_denied" });
    let running = world.start().ready().await;
    world.until_messages("failed", 3).await;
    insert(5, "left").await;
    until_ids("changes", &["5"]).await;
    world.sql("update items set label = 'y' where id = 2").await;
    world.until_messages("waiting", 1).await;
    world.until_confirmed().await;
    for message in world.messages(Some("failed")).await {
        assert_eq!(message["error"]["class"], "route", "{message}");
        let text = message["error"]["text"].as_str().unwrap();
        assert!(text.contains("`left`") && text.contains("could not be read"), "{text}");
    }
    let shut = world.status().await.unwrap()["streams"][0].clone();
    assert_eq!((&shut["name"], &shut["state"]), (&"left".into(), &"shut".into()), "{shut}");
    let text = shut["reason"]["text"].as_str().unwrap();
    assert!(text.contains("403") && text.contains("not known before it can be read"), "{text}");
    let refused = world.cli(&["messages", "ack", "--all"]).await;
    assert!(!refused.status.success(), "what consumers may have is not given up");
    running.kill().await;

    // The next start finds it just so.
    let running = world.start().ready().await;
    insert(6, "left").await;
    until_ids("changes", &["5", "6"]).await;
    assert_eq!(world.messages(None).await.len(), 4);
    front.set(Fault::None);
    world.until_no_messages().await;
    until_ids("left", &["1", "2", "3"]).await;
    let mut found = ids("changes").await;
    found[2..].sort_unstable();
    // The update of what was there, and what was not there.
    assert_eq!(found, ["5", "6", "2", "4"]);
    running.stop().await;
}

/// What is beyond the checkpoint comes again in a stream that was deleted and made anew, also where the
/// deleted one had it; or does not, where an operator has chosen so.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_made_anew_is_begun_anew() {
    for (test, args, expected) in [
        ("routes_anew", &[][..], &["2", "3", "4"][..]),
        ("routes_anew_skip", &["--lost-records", "skip"], &["4"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut world = world(test, dir.path(), "{column:label}", "").await;
        let front = Front::of(&world.s2).await;
        world.home.settings.endpoint = front.endpoint();
        world.home.write_config();
        let insert = async |id: u64, stream: &str| {
            let row = format!("{id}, {id}, '{stream}', 'r0wv4lue'");
            world.sql(&format!("insert into items values ({row})")).await;
        };
        let until_ids = async |expected: &[&str]| {
            until(&format!("{expected:?} in the stream"), async || {
                world.s2.tail(BASIN, "left").await.map_err(|status| status.to_string())?;
                let records = world.s2.read(BASIN, "left").await;
                let found: Vec<_> =
                    data(&records).iter().map(|record| field(record, "id")).collect();
                if found == expected { Ok(()) } else { Err(format!("{found:?}")) }
            })
            .await;
        };
        let running = world.start().ready().await;
        insert(1, "left").await;
        until_ids(&["1"]).await;
        world.until_confirmed().await;
        // One that does not get through keeps the checkpoint from passing what comes behind it.
        front.set(Fault::OfStream { stream: "changes", status: 503, code: "unavailable" });
        insert(9, "changes").await;
        insert(2, "left").await;
        insert(3, "left").await;
        until_ids(&["1", "2", "3"]).await;
        running.kill().await;
        front.set(Fault::None);
        world.s2.delete_stream(BASIN, "left").await;
        let running = world.start_with(args).ready().await;
        until("what came before to be confirmed", async || {
            let messages = world.messages(None).await;
            if messages.is_empty() { Ok(()) } else { Err(format!("{messages:?}")) }
        })
        .await;
        world.until_confirmed().await;
        insert(4, "left").await;
        until_ids(expected).await;
        assert_eq!(world.log().contains("was deleted and made anew"), args.is_empty());
        world.until_confirmed().await;
        running.stop().await;
    }
}
