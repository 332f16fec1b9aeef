//! The server's log and its data, as they are lost and put back.

use std::process::Command;

use crate::support::postgres::Cluster;
use crate::support::s2::Server;
use crate::support::until;
use crate::support::world::{World, field};
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

    // What it says mends it, step by step, and only on purpose.
    world.sql("insert into t values (2, 'r0wv4lue')").await;
    world.sql(&format!("select pg_drop_replication_slot('{}')", world.settings.slot)).await;
    refused(&world, &["does not exist any more", "--skip-lost-changes"]).await;
    let running = world.start_with(&["--skip-lost-changes"]).ready().await;
    world.sql("insert into t values (3, 'r0wv4lue')").await;
    let records = world.until_records(2).await;
    let ids: Vec<_> = records.iter().map(|record| field(record, "id")).collect();
    assert_eq!(ids, ["1", "3"]);
    world.until_confirmed().await;
    running.stop().await;
    let running = world.start().ready().await;
    running.stop().await;
}

/// It is said while it can be helped, and again when it cannot.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_in_danger_is_said_before_it_is_lost() {
    let cluster = Cluster::start(&[
        ("max_slot_wal_keep_size", "64MB"),
        ("max_wal_size", "32MB"),
        ("min_wal_size", "32MB"),
    ])
    .await;
    let mut world = world("slot_danger", &cluster).await;
    world.home.settings.sections = "[delivery]\nspill_max = \"0\"".to_owned();
    world.home.write_config();
    let mut running = world.start().ready().await;
    world.s2.kill().await;
    world.sql("insert into t values (1, 'r0wv4lue')").await;
    running.unready("sink_unreachable").await;
    let emit = async |megabytes: u32| {
        let sql = format!(
            "select pg_logical_emit_message(false, 'x', repeat('x', 1000000)) \
             from generate_series(1, {megabytes})"
        );
        world.sql(&sql).await;
    };
    emit(60).await;
    let status = until("the danger to be said", async || {
        running.assert_alive();
        let status = world.status().await?;
        let is_said = status["warnings"].to_string().contains("max_slot_wal_keep_size");
        if is_said { Ok(status) } else { Err(status.to_string()) }
    })
    .await;
    let warning = status["warnings"].to_string();
    assert!(warning.contains("changes are lost") && warning.contains("ALTER SYSTEM"), "{warning}");
    assert!(status["wal_safe_bytes"].is_i64(), "{status}");
    let scrape = world.metrics().await.unwrap();
    assert!(scrape.contains("sluicebox_wal_safe_bytes "), "{scrape}");
    assert!(world.log().contains("Postgres drops the slot's WAL"), "{}", world.log());

    until("Postgres to drop the slot's log", async || {
        emit(20).await;
        world.sql("checkpoint").await;
        let slot =
            "select wal_status from pg_replication_slots where database = current_database()";
        let status = world.database.value(slot).await;
        if status.as_deref() == Some("lost") { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    let status = running.ended().await;
    let log = world.log();
    assert_eq!(status.code(), Some(1), "{log}");
    for part in ["is lost", "pg_drop_replication_slot", "--skip-lost-changes"] {
        assert!(log.contains(part), "`{part}` is not in:\n{log}");
    }
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

/// Postgres finds out what is still running when it writes a checkpoint, and by itself each quarter of a
/// minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_is_left_open_is_named_with_its_process() {
    let cluster = Cluster::start(&[]).await;
    let world = world("left_open", &cluster).await;
    let running = world.start().ready().await;
    let idle = world.database.connect().await;
    let pid = idle.query_one("select pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0);
    idle.batch_execute("begin; insert into t values (1, 'r0wv4lue')").await.unwrap();
    // A segment of the log for each.
    let segment = "create table much (n int); drop table much; select pg_switch_wal(); checkpoint";
    for id in 2..5 {
        world.sql(&format!("insert into t values ({id}, 'r0wv4lue')")).await;
        world.sql(segment).await;
        world.until_confirmed().await;
    }
    let text = until("the open transaction to be named", async || {
        let keeper = world.status().await?["wal_kept_by"].clone();
        match keeper["code"].as_str() {
            Some("open_transaction") => Ok(keeper["text"].as_str().unwrap().to_owned()),
            _ => Err(keeper.to_string()),
        }
    })
    .await;
    assert!(text.contains(&pid.to_string()), "{text}");
    // Nothing waits for it.
    assert_eq!(world.until_records(3).await.len(), 3);
    idle.batch_execute("commit").await.unwrap();
    world.until_records(4).await;
    until("the log to be let go", async || {
        world.sql("select pg_switch_wal(); checkpoint").await;
        world.until_confirmed().await;
        let keeper = world.status().await?["wal_kept_by"].clone();
        let is_named = keeper["code"] == "open_transaction";
        if is_named { Err(keeper.to_string()) } else { Ok(()) }
    })
    .await;
    running.stop().await;
}
