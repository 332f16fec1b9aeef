//! S2 is away when a store is new, and was never reached: the database is let go all the same, nothing is
//! lost, doubled or out of order, and nothing is taken that may be somebody else's.

use std::path::Path;
use std::time::Duration;

use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::postgres::{Cluster, Database};
use crate::support::s2::Server;
use crate::support::sluicebox::Running;
use crate::support::world::World;
use crate::support::{Random, until};

/// A world whose S2 is away, with basin and stream on its disk.
async fn world(test: &str, dir: &Path, delivery: &str) -> World<'static> {
    world_of(Cluster::shared().await.database(test).await, dir, delivery).await
}

async fn world_of<'a>(database: Database<'a>, dir: &Path, delivery: &str) -> World<'a> {
    let s2 = Server::on_disk(dir).await;
    let mut world = World::of(database, s2, TABLES, &["public.items"]).await;
    world.s2.kill().await;
    world.home.settings.sections = format!("[delivery]\n{delivery}");
    world.home.write_config();
    world
}

/// Waits until the slot is read, so that nothing can be committed before it.
async fn until_connected(running: &mut Running<'_>, world: &World<'_>) {
    until("a connection to the slot", async || {
        running.assert_alive();
        let status = world.status().await?;
        if status["source_connections"] == 0 { Err(status.to_string()) } else { Ok(()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_let_go_before_s2_was_ever_reached() {
    for round in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let world = world("first_start", dir.path(), "spill_after = \"500ms\"").await;
        let load = Workload::new(world.database.url(), 3);
        let mut random = Random::new(load.seed + round);
        let mut running = world.start();
        running.unready("sink_unreachable").await;
        until_connected(&mut running, &world).await;
        let work = load.start();
        running.until_spilled().await;
        work.commits(60).await;
        // Nothing but the disk can have taken them.
        world.until_confirmed().await;
        assert!(world.log().contains("S2 is away: changes are spilled"), "{}", world.log());
        for _ in 0..round {
            tokio::time::sleep(Duration::from_millis(random.below(700))).await;
            running.kill().await;
            running = world.start();
            work.commits(40).await;
            world.until_confirmed().await;
        }
        world.s2.up().await;
        // The kill falls before, into and after the first opening of the stream.
        for _ in 0..round {
            tokio::time::sleep(Duration::from_millis(random.below(900))).await;
            running.kill().await;
            running = world.start();
        }
        running = running.ready().await;
        work.commits(40).await;
        work.stop().await;
        judge(&world, Order::Whole).await;
        running.stop().await;
    }
}

/// Whose stream it is, and so who may have to read the slot again, only S2 can tell.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_of_somebody_else_is_not_read_before_s2_was_reached() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("first_slot", dir.path(), "spill_after = \"500ms\"").await;
    let slot = &world.settings.slot;
    world.sql("create publication sluicebox for table items").await;
    world.sql(&format!("select pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    let confirmed = async || {
        let sql = format!(
            "select confirmed_flush_lsn from pg_replication_slots where slot_name = '{slot}'"
        );
        world.database.value(&sql).await.unwrap()
    };
    let before = confirmed().await;
    let mut running = world.start();
    let text = running.unready("source_unowned").await;
    assert!(world.log().contains("source_unowned"), "{}", world.log());
    assert!(text.contains(slot.as_str()) && text.contains("--abandon-parked"), "{text}");
    world.sql("insert into items values (1, 1, 'r0wv4lue', 'r0wv4lue')").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((world.spilled().await, confirmed().await), (Ok(0), before));
    running.kill().await;

    // An operator knows.
    let mut running = world.start_with(&["--abandon-parked"]);
    running.until_spilled().await;
    world.until_confirmed().await;
    running.kill().await;
    let running = world.start();
    world.s2.up().await;
    let running = running.ready().await;
    world.until_records(1).await;
    running.stop().await;
}

/// What is read and cannot be sent fills memory, and nothing more is read then. How much is written
/// behind that is known all the same.
#[tokio::test(flavor = "multi_thread")]
async fn what_piles_up_is_known_while_nothing_more_is_read() {
    // What other databases of the same server write counts as well.
    let cluster = Cluster::start(&[]).await;
    let dir = tempfile::tempdir().unwrap();
    let database = cluster.database("piles_up").await;
    let world = world_of(database, dir.path(), "spill_after = \"64MiB\"").await;
    world.s2.up().await;
    let mut running = world.start().ready().await;
    world.s2.kill().await;
    running.unready("sink_unreachable").await;
    let rows = "alter table items alter body set storage external;
                insert into items select n, n, 'r0wv4lue', repeat('x', 500000)
                  from generate_series(1, 70) n;";
    world.sql(rows).await;
    until("memory to be full", async || {
        let changes = world.status().await?["changes"].as_u64().unwrap_or_default();
        if changes > 40 { Ok(()) } else { Err(changes.to_string()) }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(world.spilled().await, Ok(0));
    let much = "select pg_logical_emit_message(true, 'x', repeat('x', 1000000)) \
                from generate_series(1, 90)";
    world.sql(much).await;
    running.until_spilled().await;
    world.until_confirmed().await;
    world.s2.up().await;
    running = running.ready().await;
    world.until_records(70).await;
    running.stop().await;
}
