//! The server's log and its data, as they are lost and put back.

use std::process::Command;

use crate::support::postgres::Cluster;
use crate::support::s2::Server;
use crate::support::world::World;
use sluicebox::throwaway::Shutdown;

const TABLE: &str = "create table t (id bigint primary key, body text);";

async fn world<'a>(test: &str, cluster: &'a Cluster) -> World<'a> {
    let database = cluster.database(test).await;
    World::of(database, Server::in_memory().await, TABLE, &["public.t"]).await
}

/// `run` ends by itself with 1, once, and says all of this.
async fn refused(world: &World<'_>, parts: &[&str]) {
    let before = world.log().len();
    let status = world.start().ended().await;
    let log = world.log()[before..].to_owned();
    assert_eq!(status.code(), Some(1), "{log}");
    for part in parts {
        assert!(log.contains(part), "`{part}` is not in:\n{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_the_server_gave_up_is_named_with_its_mend() {
    let cluster = Cluster::start(&[
        ("max_slot_wal_keep_size", "1MB"),
        ("max_wal_size", "32MB"),
        ("min_wal_size", "32MB"),
    ])
    .await;
    let world = world("slot_lost", &cluster).await;
    let running = world.start().ready().await;
    world.sql("insert into t values (1, 'r0wv4lue')").await;
    world.until_records(1).await;
    running.stop().await;
    for _ in 0..4 {
        world.sql("create table much (n int); drop table much; select pg_switch_wal()").await;
    }
    world.sql("checkpoint").await;
    let status = "select wal_status from pg_replication_slots where database = current_database()";
    assert_eq!(world.database.value(status).await.as_deref(), Some("lost"));
    refused(&world, &["max_slot_wal_keep_size", "pg_drop_replication_slot", "lost"]).await;
    let check = world.cli(&["check"]).await;
    assert_eq!(check.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&check.stdout).contains("max_slot_wal_keep_size"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_the_servers_data_is_refused() {
    let cluster = Cluster::start(&[]).await;
    let world = world("restored", &cluster).await;
    let running = world.start().ready().await;
    world.sql("insert into t values (1, 'r0wv4lue')").await;
    world.until_records(1).await;
    running.stop().await;
    cluster.down(Shutdown::Fast).await;
    let data = cluster.data_dir().await;
    let copy = data.with_file_name("copy");
    let copied = |from: &std::path::Path, to: &std::path::Path| {
        let status = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
        assert!(status.success());
    };
    copied(&data, &copy);
    cluster.up().await;
    let running = world.start().ready().await;
    world.sql("insert into t select n, 'r0wv4lue' from generate_series(2, 2000) n").await;
    world.until_records(2000).await;
    world.until_confirmed().await;
    running.stop().await;

    cluster.down(Shutdown::Fast).await;
    std::fs::remove_dir_all(&data).unwrap();
    copied(&copy, &data);
    cluster.up().await;
    refused(&world, &["restored from an older copy"]).await;
    assert_eq!(world.records().await.len(), 2000, "nothing was written");
}
