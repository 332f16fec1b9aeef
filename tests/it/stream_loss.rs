//! Streams that lose records under a running pipeline: by a trim, by being deleted and made anew, or because
//! S2 itself is put back to an older state. What is below the checkpoint may go at any time. What is not
//! known to be there any more stops the pipeline, or shuts the stream that it was routed to, until an
//! operator has chosen; nothing goes on in silence.

use std::path::Path;

use crate::support::oracle::{Order, TABLES, Workload, judge_records};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Relay, Wire};
use crate::support::s2::{Server, data};
use crate::support::sluicebox::Running;
use crate::support::until;
use crate::support::world::{BASIN, STREAM, World, field};

/// A stream of the tests whose messages are routed by a column.
const ROUTED: &str = "left";

/// A world on a disk; `routed` for one whose messages go where their label says.
async fn world(test: &str, dir: &Path, routed: bool) -> World<'static> {
    let database = Cluster::shared().await.database(test).await;
    let s2 = Server::on_disk(dir).await;
    let mut world = World::of(database, s2, TABLES, &["public.items"]).await;
    world.home.settings.sink = "create = true\n".to_owned();
    world.home.write_config();
    if routed {
        world.ok(&["transforms", "add", "route", "--set", "stream={column:label}"]).await;
    }
    world
}

async fn insert(world: &World<'_>, id: u64, label: &str) {
    world.sql(&format!("insert into items values ({id}, {id}, '{label}', 'r0wv4lue')")).await;
}

/// The rows whose changes are in a stream, in its order, from this number on.
async fn ids(world: &World<'_>, stream: &str, from: u64) -> Vec<String> {
    if world.s2.tail(BASIN, stream).await.is_err() {
        return Vec::new();
    }
    let records = world.s2.read_from(BASIN, stream, from).await;
    data(&records).iter().map(|record| field(record, "id")).collect()
}

async fn until_ids(world: &World<'_>, stream: &str, from: u64, expected: &[&str]) {
    until(&format!("{expected:?} in {stream}"), async || {
        let found = ids(world, stream, from).await;
        if found == expected { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
}

/// It ends by itself and has said all of this.
async fn ends(running: Running<'_>, before: usize, parts: &[&str]) {
    let home = running.home;
    assert_eq!(running.ended().await.code(), Some(1));
    let log = home.log()[before..].to_owned();
    for part in parts.iter().chain(&["--lost-records resend", "skip"]) {
        assert!(log.contains(part), "`{part}` is not in:\n{log}");
    }
}

/// A start is refused with all of this, and goes on once an operator has chosen.
async fn chosen<'a>(world: &'a World<'_>, says: &[&str], choice: &str) -> Running<'a> {
    let before = world.log().len();
    ends(world.start(), before, says).await;
    world.start_with(&["--lost-records", choice]).ready().await
}

/// As soon as Postgres was told of it, a record may be trimmed: under load, and whatever dies next.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_below_the_checkpoint_may_be_trimmed_at_any_time() {
    let world = World::new("trim_below", TABLES, &["public.items"]).await;
    let mut running = world.start().ready().await;
    let work = Workload::new(world.database.url(), 3).start();
    let mut records = Vec::new();
    let mut first = 0;
    for round in 0..6 {
        work.commits(100).await;
        let tail = world.s2.tail(BASIN, STREAM).await.unwrap();
        world.until_confirmed().await;
        let read = world.s2.read_from(BASIN, STREAM, first).await;
        records.extend(read.into_iter().filter(|record| record.seq_num < tail));
        if round % 2 == 0 {
            running.assert_alive();
            world.s2.trim(BASIN, STREAM, tail).await;
        } else {
            running.kill().await;
            world.s2.trim(BASIN, STREAM, tail).await;
            running = world.start();
        }
        first = tail;
    }
    work.stop().await;
    running = running.ready().await;
    world.until_confirmed().await;
    records.extend(world.s2.read_from(BASIN, STREAM, first).await);
    assert!(first > 500, "trimmed up to {first}");
    judge_records(&world.database, &records, Order::Whole, &<_>::default()).await;
    assert!(!world.log().contains("records after the checkpoint are gone"), "{}", world.log());
    running.stop().await;
}

/// A record lands, the answer is lost, and the record is trimmed before anybody has looked: it was there or
/// was not.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_trimmed_before_its_answer_is_an_operators_to_decide() {
    for (choice, expected) in [("resend", &["2", "3"][..]), ("skip", &["3"])] {
        let mut world =
            World::new(&format!("trim_beyond_{choice}"), TABLES, &["public.items"]).await;
        let relay = Relay::to(world.s2.port()).await;
        world.home.settings.endpoint = relay.endpoint();
        world.home.write_config();
        let running = world.start().ready().await;
        insert(&world, 1, "r0wv4lue").await;
        world.until_records(1).await;
        world.until_confirmed().await;
        relay.set(Wire::Mute);
        insert(&world, 2, "r0wv4lue").await;
        world.until_records(2).await;
        let tail = world.s2.tail(BASIN, STREAM).await.unwrap();
        world.s2.trim(BASIN, STREAM, tail).await;
        let before = world.log().len();
        relay.cut_once().await;
        ends(running, before, &["trimmed or have expired"]).await;
        let running = chosen(&world, &["trimmed or have expired"], choice).await;
        world.until_confirmed().await;
        insert(&world, 3, "r0wv4lue").await;
        until_ids(&world, STREAM, tail, expected).await;
        running.stop().await;
    }
}

/// The same in a stream that transforms chose: all others go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_routed_stream_that_was_trimmed_before_its_answer_is_shut() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = world("trim_routed", dir.path(), true).await;
    let relay = Relay::to(world.s2.port()).await;
    world.home.settings.endpoint = relay.endpoint();
    world.home.write_config();
    let running = world.start().ready().await;
    insert(&world, 1, ROUTED).await;
    until_ids(&world, ROUTED, 0, &["1"]).await;
    world.until_confirmed().await;
    relay.set(Wire::Mute);
    insert(&world, 2, ROUTED).await;
    until_ids(&world, ROUTED, 0, &["1", "2"]).await;
    let tail = world.s2.tail(BASIN, ROUTED).await.unwrap();
    world.s2.trim(BASIN, ROUTED, tail).await;
    relay.cut_once().await;
    let failed = world.until_messages("failed", 1).await;
    let text = failed[0]["error"]["text"].as_str().unwrap();
    assert!(text.contains("trimmed or have expired") && text.contains(ROUTED), "{text}");
    insert(&world, 3, "right").await;
    until_ids(&world, "right", 0, &["3"]).await;
    world.until_confirmed().await;
    running.kill().await;
    let running = chosen(&world, &["trimmed or have expired"], "resend").await;
    world.until_no_messages().await;
    insert(&world, 4, ROUTED).await;
    until_ids(&world, ROUTED, tail, &["2", "4"]).await;
    running.stop().await;
}

/// The stream, or the basin with all that is in it, is another one from one append to the next.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_anew_under_a_running_pipeline_stops_it() {
    for (test, basin) in [("renewed_stream", false), ("renewed_basin", true)] {
        let dir = tempfile::tempdir().unwrap();
        let world = world(test, dir.path(), false).await;
        let running = world.start().ready().await;
        for id in 1..=5 {
            insert(&world, id, "r0wv4lue").await;
        }
        world.until_records(5).await;
        world.until_confirmed().await;
        let before = world.log().len();
        if basin {
            world.s2.renew_basin(BASIN).await;
        } else {
            world.s2.delete_stream(BASIN, STREAM).await;
        }
        insert(&world, 6, "r0wv4lue").await;
        ends(running, before, &["deleted and created again"]).await;
        let running = chosen(&world, &["deleted and created again"], "resend").await;
        until_ids(&world, STREAM, 0, &["6"]).await;
        running.stop().await;
    }
}

/// What S2 had acknowledged is gone with the newer state of its disk, and Postgres has forgotten it: it does
/// not come again, so that somebody has to know.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_state_of_s2_is_noticed() {
    let (dir, copies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let world = world("older_s2", &dir.path().join("s2"), false).await;
    let running = world.start().ready().await;
    insert(&world, 1, "r0wv4lue").await;
    world.until_records(1).await;
    let older = copies.path().join("older");
    world.s2.snapshot(&older);
    insert(&world, 2, "r0wv4lue").await;
    world.until_records(2).await;
    world.until_confirmed().await;
    let before = world.log().len();
    world.s2.back_to(&older).await;
    let says = ["put back to an older state", "does not come again", "sluicebox verify"];
    ends(running, before, &says).await;
    insert(&world, 3, "r0wv4lue").await;
    let running = chosen(&world, &says, "resend").await;
    until_ids(&world, STREAM, 0, &["1", "3"]).await;
    world.until_confirmed().await;
    let verify = world.cli(&["verify"]).await;
    assert_eq!(verify.status.code(), Some(1), "{}", String::from_utf8_lossy(&verify.stdout));
    running.stop().await;
}

/// The stream then has a fencing token that has been replaced since, as if another process had a copy of
/// the state folder, which an operator has to deny as well.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_state_of_s2_with_an_older_token_is_noticed() {
    let (dir, copies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let world = world("older_token", &dir.path().join("s2"), false).await;
    let running = world.start().ready().await;
    insert(&world, 1, "r0wv4lue").await;
    world.until_records(1).await;
    let older = copies.path().join("older");
    world.s2.snapshot(&older);
    running.kill().await;
    let running = world.start().ready().await;
    insert(&world, 2, "r0wv4lue").await;
    world.until_records(2).await;
    world.until_confirmed().await;
    running.kill().await;
    world.s2.back_to(&older).await;
    insert(&world, 3, "r0wv4lue").await;
    let before = world.log().len();
    ends(world.start(), before, &["put back to an older state"]).await;
    let before = world.log().len();
    let refused = world.start_with(&["--lost-records", "resend"]);
    assert_eq!(refused.ended().await.code(), Some(1));
    let log = world.log()[before..].to_owned();
    for part in ["put back to an older state", "--take-over", "--lost-records"] {
        assert!(log.contains(part), "`{part}` is not in:\n{log}");
    }
    let running = world.start_with(&["--take-over", "--lost-records", "resend"]).ready().await;
    until_ids(&world, STREAM, 0, &["1", "3"]).await;
    world.until_confirmed().await;
    running.stop().await;
}

/// The same where all is routed, so that the pipeline's own stream has lost nothing. A stream that was
/// deleted and made anew is begun anew by itself; this one still has what is older.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_state_of_a_routed_stream_is_noticed() {
    let (dir, copies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let world = world("older_routed", &dir.path().join("s2"), true).await;
    let mut running = world.start().ready().await;
    insert(&world, 1, ROUTED).await;
    insert(&world, 2, "right").await;
    until_ids(&world, ROUTED, 0, &["1"]).await;
    until_ids(&world, "right", 0, &["2"]).await;
    let older = copies.path().join("older");
    world.s2.snapshot(&older);
    insert(&world, 3, ROUTED).await;
    until_ids(&world, ROUTED, 0, &["1", "3"]).await;
    world.until_confirmed().await;
    world.s2.back_to(&older).await;
    insert(&world, 4, ROUTED).await;
    insert(&world, 5, "right").await;
    until_ids(&world, "right", 0, &["2", "5"]).await;
    let failed = world.until_messages("failed", 1).await;
    let text = failed[0]["error"]["text"].as_str().unwrap();
    assert!(text.contains("put back to an older state") && text.contains(ROUTED), "{text}");
    running.assert_alive();
    assert_eq!(ids(&world, ROUTED, 0).await, ["1"]);
    running.kill().await;
    let running = chosen(&world, &["put back to an older state"], "resend").await;
    world.until_no_messages().await;
    insert(&world, 6, ROUTED).await;
    until_ids(&world, ROUTED, 0, &["1", "4", "6"]).await;
    world.until_confirmed().await;
    running.kill().await;
    // It is not asked for again.
    let running = world.start().ready().await;
    running.stop().await;
}
