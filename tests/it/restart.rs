//! Everything is stopped, killed and started again, under load; the oracle judges the stream.

use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Fault, Front};
use crate::support::s2::Server;
use crate::support::sluicebox::Home;
use crate::support::world::{BASIN, World, settings};
use crate::support::{Random, until};
use sluicebox::throwaway::Shutdown;

async fn items(test: &str) -> World<'static> {
    World::new(test, TABLES, &["public.items"]).await
}

fn workload(url: &str) -> Workload {
    Workload::new(url.to_owned(), 3)
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_and_sigint_drain_and_the_next_start_goes_on() {
    let world = items("signals").await;
    // The slot has to exist before the rows.
    world.start().ready().await.stop().await;
    let work = workload(&world.database.url()).start();
    for signal in ["TERM", "INT", "TERM"] {
        let running = world.start().ready().await;
        work.commits(150).await;
        running.signal(signal);
        let status = running.ended().await;
        assert_eq!(status.code(), Some(0), "`sluicebox run` after SIG{signal}: {status}");
    }
    work.stop().await;
    let running = world.start().ready().await;
    judge(&world, Order::Whole).await;
    world.until_confirmed().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_it_is_killed_under_load() {
    let world = items("kill").await;
    let first = world.start().ready().await;
    let load = workload(&world.database.url());
    let mut random = Random::new(load.seed);
    let work = load.start();
    first.kill().await;
    for _ in 0..6 {
        let running = world.start();
        // Somewhere between its first steps and a while of delivering.
        tokio::time::sleep(std::time::Duration::from_millis(random.below(1_500))).await;
        work.commits(random.below(100)).await;
        running.kill().await;
    }
    work.stop().await;
    let running = world.start().ready().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_rows_keep_their_order_when_it_is_killed_before_and_after_the_mend() {
    let world = items("kill_parked").await;
    let load = Workload { oversize_one_in: 12, ..workload(&world.database.url()) };
    let mut random = Random::new(load.seed);
    let first = world.start().ready().await;
    let work = load.start();
    let any = async || match world.messages(Some("parked")).await.is_empty() {
        false => Ok(()),
        true => Err("none".to_owned()),
    };
    until("a parked message", any).await;
    first.kill().await;
    for round in 0..4 {
        let running = world.start().ready().await;
        work.commits(random.below(80)).await;
        if round == 1 {
            world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
            // The kill falls into the delivery of what was parked.
            tokio::time::sleep(std::time::Duration::from_millis(random.below(1_000))).await;
        }
        running.kill().await;
    }
    work.stop().await;
    let running = world.start().ready().await;
    judge(&world, Order::PerRow).await;
    world.until_no_messages().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_on_when_postgres_restarts_and_crashes() {
    let cluster = Cluster::start(&[]).await;
    let database = cluster.database("pg_restart").await;
    let s2 = Server::in_memory().await;
    let world = World::of(database, s2, TABLES, &["public.items"]).await;
    let mut running = world.start().ready().await;
    let work = workload(&world.database.url()).start();
    for shutdown in [Shutdown::Fast, Shutdown::Immediate, Shutdown::Fast] {
        work.commits(100).await;
        cluster.down(shutdown).await;
        let text = running.unready("source_unreachable").await;
        world.look_through("/readyz", &text);
        cluster.up().await;
        running = running.ready().await;
    }
    work.commits(50).await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_on_when_s2_is_killed_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let database = Cluster::shared().await.database("s2_restart").await;
    let s2 = Server::on_disk(dir.path()).await;
    let world = World::of(database, s2, TABLES, &["public.items"]).await;
    let mut running = world.start().ready().await;
    let work = workload(&world.database.url()).start();
    for _ in 0..3 {
        work.commits(100).await;
        world.s2.kill().await;
        running.unready("sink_unreachable").await;
        world.s2.up().await;
        running = running.ready().await;
    }
    // Both at once.
    world.s2.kill().await;
    running.kill().await;
    work.commits(20).await;
    world.s2.up().await;
    let running = world.start().ready().await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_while_s2_is_away_ends_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let database = Cluster::shared().await.database("stop_without_s2").await;
    let s2 = Server::on_disk(dir.path()).await;
    let world = World::of(database, s2, TABLES, &["public.items"]).await;
    let mut running = world.start().ready().await;
    let work = workload(&world.database.url()).start();
    work.commits(50).await;
    world.s2.kill().await;
    work.commits(50).await;
    running.unready("sink_unreachable").await;
    running.stop().await;
    work.stop().await;
    world.s2.up().await;
    let running = world.start().ready().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_takes_over_only_when_the_first_is_gone() {
    let world = items("two_processes").await;
    let first = world.start().ready().await;
    let work = workload(&world.database.url()).start();
    work.commits(50).await;

    // Another state and stream, the same slot: it waits and names the slot.
    let mut other = settings(&world.database, &world.s2.endpoint(), &["public.items"]);
    other.slot.clone_from(&world.settings.slot);
    other.stream = "other".to_owned();
    world.s2.create_stream(BASIN, "other").await;
    let other = Home::new(other);
    let mut second = other.start();
    let text = until("the second process to name the slot", async || {
        second.assert_alive();
        let body = other.readyz().await?;
        let text = body["reasons"].to_string();
        if text.contains(&world.settings.slot) { Ok(text) } else { Err(text) }
    })
    .await;
    assert!(text.contains("source"), "{text}");
    work.commits(50).await;
    second.kill().await;

    work.stop().await;
    judge(&world, Order::Whole).await;
    first.stop().await;
}

/// What is parked is tried when a chain goes live. This one was killed before S2 could take it, and its
/// successor finds the chain as it was.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_chain_was_to_try_is_tried_after_a_kill() {
    let mut world = World::new("due", TABLES, &["public.items"]).await;
    let front = Front::of(&world.s2).await;
    world.home.settings.endpoint = front.endpoint();
    world.home.write_config();
    let mut running = world.start().ready().await;
    world.sql("insert into items values (1, 1, 'r0wv4lue', repeat('r0wv4lue', 200000))").await;
    world.until_messages("parked", 1).await;
    front.set(Fault::status(503, "unavailable"));
    running.unready("sink_503").await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    world.until_transform("10-strip-columns.wasm", "live").await;
    until("the chain to be written down", async || {
        let log = world.log();
        let is_live = log.lines().any(|line| {
            line.contains("the chain is live") && line.contains("10-strip-columns.wasm")
        });
        if is_live { Ok(()) } else { Err(log) }
    })
    .await;
    running.kill().await;
    front.set(Fault::None);
    let running = world.start().ready().await;
    world.until_records(1).await;
    world.until_no_messages().await;
    running.stop().await;
}
