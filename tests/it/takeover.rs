//! Who may write: lost and copied stores, processes that stand still and wake up, streams that lost
//! records, and others who append to the same stream.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::oracle::{Order, TABLES, Work, Workload, judge};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Relay, Wire};
use crate::support::s2::{Record, Server};
use crate::support::sluicebox::Home;
use crate::support::until;
use crate::support::world::{BASIN, STREAM, World, field, settings};

async fn items(test: &str) -> World<'static> {
    World::new(test, TABLES, &["public.items"]).await
}

fn work(world: &World<'_>) -> Work {
    let load = Workload::new(world.database.url(), 2);
    load.start()
}

fn insert(id: u64, body_bytes: u64) -> String {
    format!(
        "insert into items values ({id}, {id}, 'r0wv4lue', 'r0wv4lue' || repeat('x', {body_bytes}))"
    )
}

fn ids(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| field(record, "id")).collect()
}

/// `run` with these arguments ends by itself with 1 and says all of this.
async fn refused(home: &Home, args: &[&str], parts: &[&str]) {
    let before = home.log().len();
    let status = home.start_with(args).ended().await;
    let log = home.log()[before..].to_owned();
    assert_eq!(status.code(), Some(1), "{log}");
    for part in parts {
        assert!(log.contains(part), "`{part}` is not in:\n{log}");
    }
}

/// A second installation for the same slot and stream, on this state folder.
fn second(world: &World<'_>, state: &Path) -> Home {
    let mut second = settings(&world.database, &world.s2.endpoint(), &["public.items"]);
    second.slot.clone_from(&world.settings.slot);
    second.state = state.to_str().unwrap().to_owned();
    Home::new(second)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_store_is_not_replaced_without_a_word() {
    let world = items("lost_store").await;
    let running = world.start().ready().await;
    world.sql(&insert(1, 10)).await;
    world.sql(&insert(2, 2_000_000)).await;
    world.until_records(1).await;
    world.until_messages("parked", 1).await;
    world.until_confirmed().await;
    running.stop().await;
    fs::rename(world.path("state"), world.path("lost")).unwrap();

    let says = ["--abandon-parked", "never delivered", "state.dir", STREAM];
    refused(&world, &[], &says).await;
    // That is another grant.
    refused(&world, &["--take-over"], &says).await;
    assert_eq!(world.records().await.len(), 1, "nothing was written");

    // The folder is found again.
    fs::remove_dir_all(world.path("state")).unwrap();
    fs::rename(world.path("lost"), world.path("state")).unwrap();
    let running = world.start().ready().await;
    world.until_messages("parked", 1).await;
    running.stop().await;

    // It is not.
    fs::remove_dir_all(world.path("state")).unwrap();
    let running = world.start_with(&["--abandon-parked"]).ready().await;
    world.sql(&insert(3, 10)).await;
    assert_eq!(ids(&world.until_records(2).await), ["1", "3"]);
    running.stop().await;
    // Once is enough.
    let running = world.start().ready().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_process_is_taken_over_and_writes_nothing_when_it_wakes_up() {
    let world = items("zombie_shared").await;
    let first = world.start().ready().await;
    let work = work(&world);
    work.commits(50).await;

    let second = second(&world, &world.path("state"));
    let pid = format!("pid {}", first.pid());
    refused(&second, &[], &["--take-over", &pid, "state folder"]).await;
    let running = second.take_over_from(&first).await;
    work.commits(50).await;
    first.signal("CONT");
    let status = first.ended().await;
    assert_eq!(status.code(), Some(1), "the process that woke up");
    assert!(world.log().contains("taken over by another"), "{}", world.log());
    work.commits(50).await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    // The lock has passed over with the first one's end.
    let third = self::second(&world, &world.path("state"));
    refused(&third, &[], &["--take-over", "in use by another"]).await;
    running.stop().await;
    let running = second.start().ready().await;
    running.stop().await;
}

/// As where a configuration is copied for another stream: it would take what the first one has not read.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_slot_that_it_has_never_read_is_told_to_have_its_own() {
    let world = items("shared_slot").await;
    let running = world.start().ready().await;
    let dir = tempfile::tempdir().unwrap();
    let mut second = second(&world, dir.path());
    second.settings.stream = "other".to_owned();
    second.settings.sink = "create = true\n".to_owned();
    second.write_config();
    let mut waiting = second.start();
    let text = waiting.unready("source_slot_active").await;
    assert!(text.contains("another `source.slot`"), "{text}");
    waiting.kill().await;
    running.stop().await;
}

/// No write tells it then, and it must not keep the lock, and later the slot, from whoever starts next.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_process_that_was_taken_over_ends_though_it_has_nothing_to_write() {
    let mut world = items("zombie_idle").await;
    let port = Cluster::shared().await.port();
    let relay = Relay::to(port).await;
    let url = world.database.url().replace(&format!(":{port}/"), &format!(":{}/", relay.port()));
    world.home.settings.url = url;
    world.home.write_config();
    let mut first = world.start().ready().await;
    relay.set(Wire::Cut);
    first.unready("source_").await;
    // Until the checkpoint that an idle pipeline writes is behind it.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let second = second(&world, &world.path("state"));
    let running = second.take_over_from(&first).await;
    running.stop().await;
    first.signal("CONT");
    assert_eq!(first.ended().await.code(), Some(1), "the process that woke up");
    assert!(world.log().contains("taken over by another"), "{}", world.log());
    let running = second.start().ready().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_the_store_takes_over_and_the_original_stands_down() {
    let world = items("zombie_copied").await;
    let first = world.start().ready().await;
    let work = work(&world);
    work.commits(50).await;
    first.signal("STOP");
    let dir = tempfile::tempdir().unwrap();
    for file in ["sluicebox.db", "sluicebox.db-wal"] {
        fs::copy(world.path("state").join(file), dir.path().join(file)).unwrap();
    }
    let second = second(&world, dir.path());
    let running = second.start_with(&["--take-over"]).ready().await;
    work.commits(50).await;
    first.signal("CONT");
    // It has lost the slot, and ends as soon as it has anything to write.
    until("the first process to stand down", async || {
        let log = world.log();
        let says = ["taken over by another", "is in use by"];
        if says.iter().any(|part| log.contains(part)) { Ok(()) } else { Err(log) }
    })
    .await;
    work.commits(50).await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    first.kill().await;
    running.stop().await;
    // The older folder knows that it is not the one that counts.
    refused(&world, &[], &["copy of this state folder", "--take-over"]).await;
}

/// A message was delivered, and the store does not know it yet, as after a kill at that moment: an
/// operator who gives it up is told so, and not that it will not be delivered.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_delivered_cannot_be_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let database = Cluster::shared().await.database("delivered").await;
    let s2 = Server::on_disk(dir.path()).await;
    let mut world = World::of(database, s2, TABLES, &["public.items"]).await;
    let port = world.database.cluster.port();
    let relay = Relay::to(port).await;
    let (direct, relayed) = (format!(":{port}/"), format!(":{}/", relay.port()));
    world.home.settings.url = world.home.settings.url.replace(&direct, &relayed);
    world.home.write_config();
    let running = world.start().ready().await;
    world.sql(&insert(1, 2_000_000)).await;
    let parked = world.until_messages("parked", 1).await;
    let id = parked[0]["id"].as_str().unwrap().to_owned();
    world.until_confirmed().await;
    running.stop().await;

    // Delivered, while Postgres can be told nothing; then the store is as it was before.
    let (state, copy) = (world.path("state"), world.path("copy"));
    copy_store(&state, &copy);
    relay.set(Wire::Cut);
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let running = world.start();
    world.until_records(1).await;
    running.kill().await;
    copy_store(&copy, &state);

    world.s2.kill().await;
    let mut running = world.start_with(&["--take-over"]);
    running.unready("sink_unreachable").await;
    let refused = world.cli(&["messages", "ack", &id]).await;
    assert!(!refused.status.success());
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("may be in a stream already"), "{text}");
    world.s2.up().await;
    relay.set(Wire::Pass);
    let running = running.ready().await;
    let refused = world.cli(&["messages", "ack", &id]).await;
    assert!(!refused.status.success());
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("delivered"), "{text}");
    assert_eq!(ids(&world.until_records(1).await), ["1"]);
    running.stop().await;
}

/// The store's files alone, in the place of those that are there.
fn copy_store(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in ["sluicebox.db", "sluicebox.db-wal", "sluicebox.db-shm"] {
        drop(fs::remove_file(to.join(name)));
        if from.join(name).exists() {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_made_anew_waits_for_a_choice() {
    let world = items("made_anew").await;
    let running = world.start().ready().await;
    for id in 1..=20 {
        world.sql(&insert(id, 10)).await;
    }
    world.until_records(20).await;
    world.until_confirmed().await;
    running.kill().await;
    world.s2.delete_stream(BASIN, STREAM).await;
    world.sql(&insert(21, 10)).await;

    refused(&world, &[], &["deleted and created again", "--lost-records resend", "skip"]).await;
    let running = world.start_with(&["--lost-records", "resend"]).ready().await;
    assert_eq!(ids(&world.until_records(1).await), ["21"]);
    world.until_confirmed().await;
    running.kill().await;

    // The choice is not asked for again, and the other one leaves out what was committed meanwhile.
    let running = world.start().ready().await;
    world.sql(&insert(30, 2_000_000)).await;
    world.until_messages("parked", 1).await;
    world.until_confirmed().await;
    running.kill().await;
    world.s2.delete_stream(BASIN, STREAM).await;
    world.sql(&insert(22, 10)).await;
    let running = world.start_with(&["--lost-records", "skip"]).ready().await;
    world.until_confirmed().await;
    world.sql(&insert(23, 10)).await;
    assert_eq!(ids(&world.until_records(1).await), ["23"]);

    // What the store holds is not skipped: nobody has given it up.
    world.until_messages("parked", 1).await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    assert_eq!(ids(&world.until_records(2).await), ["23", "30"]);
    world.until_no_messages().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_trimmed_beyond_the_checkpoint_waits_for_a_choice() {
    let world = items("trimmed").await;
    let running = world.start().ready().await;
    world.sql(&insert(1, 10)).await;
    world.until_records(1).await;
    world.until_confirmed().await;
    running.kill().await;
    world.s2.append_foreign(BASIN, STREAM).await;
    world.s2.append_foreign(BASIN, STREAM).await;
    let tail = world.s2.tail(BASIN, STREAM).await.unwrap();
    world.s2.trim(BASIN, STREAM, tail).await;
    world.sql(&insert(2, 10)).await;

    refused(&world, &[], &["trimmed or have expired", "--lost-records resend", "skip"]).await;
    let running = world.start_with(&["--lost-records", "resend"]).ready().await;
    until("the change to arrive", async || {
        let records = world.s2.read_from(BASIN, STREAM, tail).await;
        let ours = crate::support::s2::data(&records).len();
        if ours == 1 { Ok(()) } else { Err(format!("{ours} records")) }
    })
    .await;
    running.stop().await;
}

/// Somebody appends all the time; everything arrives, once and in order, also through a kill.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_foreign_writer_does_no_harm() {
    let world = items("foreign").await;
    let mut running = world.start().ready().await;
    let stop = AtomicBool::new(false);
    let appending = async {
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            world.s2.append_foreign(BASIN, STREAM).await;
            count += 1;
        }
        count
    };
    let delivering = async {
        let work = work(&world);
        for _ in 0..3 {
            work.commits(100).await;
            running.kill().await;
            running = world.start().ready().await;
        }
        work.commits(100).await;
        work.stop().await;
        judge(&world, Order::Whole).await;
        stop.store(true, Ordering::Relaxed);
        assert!(world.messages(None).await.is_empty());
        running.stop().await;
    };
    let (count, ()) = tokio::join!(appending, delivering);
    assert!(count > 100, "{count} foreign records are no busy writer");
}
