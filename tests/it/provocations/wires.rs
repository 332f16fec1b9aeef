//! What freezes, stalls and cuts the connection to Postgres.

use std::time::Duration;

use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Relay, Wire};
use crate::support::s2::Server;
use crate::support::world::World;

/// Longer than the server waits for an answer.
const WAL_SENDER_TIMEOUT: (&str, &str) = ("wal_sender_timeout", "2s");
const BEYOND: Duration = Duration::from_secs(5);

async fn world<'a>(test: &str, cluster: &'a Cluster) -> World<'a> {
    let database = cluster.database(test).await;
    World::of(database, Server::in_memory().await, TABLES, &["public.items"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_beyond_the_time_out_it_takes_the_slot_again() {
    let cluster = Cluster::start(&[WAL_SENDER_TIMEOUT]).await;
    let world = world("frozen", &cluster).await;
    let mut running = world.start().ready().await;
    let work = Workload::new(world.database.url(), 2).start();
    for _ in 0..2 {
        work.commits(50).await;
        running.signal("STOP");
        tokio::time::sleep(BEYOND).await;
        running.signal("CONT");
        running = running.ready().await;
    }
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_wire_to_postgres_loses_and_doubles_nothing() {
    let cluster = Cluster::start(&[WAL_SENDER_TIMEOUT]).await;
    let mut world = world("wires", &cluster).await;
    let relay = Relay::to(cluster.port()).await;
    let (direct, relayed) = (format!(":{}/", cluster.port()), format!(":{}/", relay.port()));
    world.home.settings.url = world.home.settings.url.replace(&direct, &relayed);
    world.home.write_config();
    let mut running = world.start().ready().await;
    let work = Workload::new(world.database.url(), 2).start();
    for wire in Wire::FAULTS {
        relay.set(wire);
        work.commits(30).await;
        tokio::time::sleep(BEYOND / 2).await;
        relay.set(Wire::Pass);
        running = running.ready().await;
    }
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}
