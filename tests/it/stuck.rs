//! What stands still is noticed, named and begun anew; what has a reason of its own, or nothing to do,
//! raises no alarm.

use std::time::Duration;

use serde_json::Value;

use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Fault, Front, Relay, Wire};
use crate::support::s2::Server;
use crate::support::world::World;
use crate::support::{signal, until};

/// A world in which little time makes something stuck.
async fn world<'a>(cluster: &'a Cluster, test: &str, stuck_after: &str) -> World<'a> {
    let database = cluster.database(test).await;
    let mut world = World::of(database, Server::in_memory().await, TABLES, &["public.items"]).await;
    world.home.settings.sections = format!("[delivery]\nstuck_after = \"{stuck_after}\"");
    world.home.write_config();
    world
}

fn workload(world: &World<'_>) -> Workload {
    Workload::new(world.database.url(), 2)
}

/// The parts that are stuck, as `status` has them.
async fn stuck(world: &World<'_>) -> Vec<Value> {
    let status = world.status().await.unwrap();
    status["stuck"].as_array().unwrap().iter().map(|stuck| stuck["part"].clone()).collect()
}

/// S2 answers every question and acknowledges nothing: each session fails by itself, and the next one
/// opens, so that the sink is never in trouble for long.
#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_opens_and_acknowledges_nothing_is_stuck() {
    let mut world = world(Cluster::shared().await, "stuck_sink", "7s").await;
    let front = Front::of(&world.s2).await;
    world.home.settings.endpoint = front.endpoint();
    world.home.write_config();
    let mut running = world.start().ready().await;
    let work = workload(&world).start();
    work.commits(20).await;
    front.set(Fault::SwallowSessions);
    let text = running.unready("stuck_sink").await;
    assert!(text.contains("session is opened anew") && text.contains("unary"), "{text}");
    assert_eq!(stuck(&world).await, ["sink"]);
    let scrape = world.metrics().await.unwrap();
    assert!(scrape.contains("sluicebox_stuck{part=\"sink\"} 1\n"), "{scrape}");
    front.set(Fault::None);
    running = running.ready().await;
    assert!(stuck(&world).await.is_empty());
    work.stop().await;
    judge(&world, Order::Whole).await;
    let log = world.log();
    assert!(
        log.contains("stuck: S2 acknowledges none") && log.contains("no longer stuck"),
        "{log}"
    );
    running.stop().await;
}

/// A server that stands still is away, which has a state of its own; and an idle pipeline does nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_server_and_an_idle_pipeline_are_no_alarm() {
    let world = world(Cluster::shared().await, "no_alarm", "7s").await;
    let mut running = world.start().ready().await;
    world.sql("insert into items values (1, 1, 'r0wv4lue', 'r0wv4lue')").await;
    world.until_records(1).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(stuck(&world).await.is_empty());
    let server: Vec<u32> = world.s2.pid().into_iter().collect();
    signal("STOP", &server);
    world.sql("insert into items values (2, 2, 'r0wv4lue', 'r0wv4lue')").await;
    running.unready("sink_timeout").await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(stuck(&world).await.is_empty());
    signal("CONT", &server);
    running = running.ready().await;
    world.until_records(2).await;
    assert!(!world.log().contains(" stuck: "), "{}", world.log());
    running.stop().await;
}

/// The walsender stands still while the server's other processes answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_walsender_that_sends_nothing_is_stuck() {
    let cluster = Cluster::start(&[]).await;
    let world = world(&cluster, "stuck_source", "3s").await;
    let mut running = world.start().ready().await;
    let pid = "select active_pid from pg_replication_slots where active";
    let pid = until("a walsender", async || {
        world.database.value(pid).await.ok_or_else(|| "none".to_owned())
    });
    let walsender = [pid.await.parse().unwrap()];
    signal("STOP", &walsender);
    let work = workload(&world).start();
    work.commits(20).await;
    let text = running.unready("stuck_source").await;
    assert!(text.contains("pg_stat_activity"), "{text}");
    until("the slot to be found in use", async || {
        let log = world.log();
        let found = log.contains("source_stuck") && log.contains("source_slot_active");
        if found { Ok(()) } else { Err(log) }
    })
    .await;
    signal("CONT", &walsender);
    running = running.ready().await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    assert!(world.log().contains("our own, given up"), "{}", world.log());
    running.stop().await;
}

/// Not even a lost connection is heard of: nothing comes any more, on any of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_went_silent_is_connected_to_again() {
    let cluster = Cluster::start(&[("wal_sender_timeout", "5s")]).await;
    let mut world = world(&cluster, "silent", "60s").await;
    let relay = Relay::to(cluster.port()).await;
    let direct = format!(":{}/", cluster.port());
    let url = world.database.url().replace(&direct, &format!(":{}/", relay.port()));
    world.home.settings.url = url;
    world.home.write_config();
    let mut running = world.start().ready().await;
    let work = workload(&world).start();
    work.commits(20).await;
    relay.set(Wire::Stall);
    work.commits(20).await;
    running.unready("source_").await;
    until("the silence to be said", async || {
        let log = world.log();
        if log.contains("source_silent") { Ok(()) } else { Err(log) }
    })
    .await;
    relay.set(Wire::Pass);
    running = running.ready().await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}
