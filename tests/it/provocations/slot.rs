//! The slot, the publication and the connection, as others treat them.

use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::until;
use crate::support::world::World;

const TABLE: &str = "create table t (id bigint primary key, body text);
    create table other (id bigint primary key, body text);";

async fn world(test: &str) -> World<'static> {
    World::new(test, TABLE, &["public.t"]).await
}

/// Waits until `run` has printed this.
async fn until_logged(world: &World<'_>, text: &str) {
    until(&format!("`run` to say `{text}`"), async || {
        let log = world.log();
        if log.contains(text) { Ok(()) } else { Err(log) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn terminated_again_and_again_it_goes_on() {
    let world = World::new("terminated", TABLES, &["public.items"]).await;
    let running = world.start().ready().await;
    let load = Workload::new(world.database.url(), 2);
    let work = load.start();
    for _ in 0..25 {
        world
            .sql(
                "select pg_terminate_backend(pid) from pg_stat_activity \
                 where datname = current_database() and application_name = 'sluicebox'",
            )
            .await;
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_are_not_published_do_not_pin_the_log() {
    let world = world("unpublished").await;
    let running = world.start().ready().await;
    for _ in 0..5 {
        world
            .sql(
                "insert into other select n, repeat(md5(n::text), 100) \
                 from generate_series(1, 1000) n; truncate other;",
            )
            .await;
    }
    world.until_confirmed().await;
    assert!(world.records().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_was_advanced_or_dropped_is_refused() {
    let world = world("advanced").await;
    let running = world.start().ready().await;
    world.sql("insert into t values (1, 'r0wv4lue')").await;
    world.until_records(1).await;
    world.until_confirmed().await;
    running.stop().await;
    let slot = &world.settings.slot;
    world.sql("insert into t values (2, 'r0wv4lue')").await;
    world.sql(&format!("select pg_replication_slot_advance('{slot}', pg_current_wal_lsn())")).await;
    let running = world.start();
    until_logged(&world, "source_slot_advanced").await;
    running.kill().await;

    world.sql(&format!("select pg_drop_replication_slot('{slot}')")).await;
    let running = world.start();
    until_logged(&world, "source_slot_missing").await;
    running.kill().await;
    let slots = "select count(*) from pg_replication_slots where database = current_database()";
    assert_eq!(world.database.value(slots).await.as_deref(), Some("0"), "none is made anew");
    assert!(world.log().contains("--skip-lost-changes"), "{}", world.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_was_made_anew_is_noticed() {
    let world = world("publication_anew").await;
    let running = world.start().ready().await;
    world.sql("insert into t values (1, 'r0wv4lue')").await;
    world.until_records(1).await;
    world.sql("drop publication sluicebox; create publication sluicebox for table t;").await;
    until_logged(&world, "was dropped and made anew").await;
    running.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_was_made_anew_between_two_runs_is_refused() {
    let world = world("publication_between").await;
    let running = world.start().ready().await;
    world.sql("insert into t values (1, 'r0wv4lue')").await;
    world.until_records(1).await;
    running.stop().await;
    // What is changed while it does not hold the table is in no stream of changes.
    world.sql("drop publication sluicebox; create publication sluicebox for table other").await;
    world.sql("insert into t values (2, 'r0wv4lue')").await;
    assert_eq!(world.start().ended().await.code(), Some(1));
    assert!(world.log().contains("without public.t"), "{}", world.log());
    world.sql("alter publication sluicebox add table t").await;
    let before = world.log().len();
    assert_eq!(world.start().ended().await.code(), Some(1));
    let log = world.log()[before..].to_owned();
    for part in ["was dropped and made anew (it was OID", "drop_replication_slot", "--skip-lost-"] {
        assert!(log.contains(part), "`{part}` is not in:\n{log}");
    }

    let slot = &world.settings.slot;
    world.sql(&format!("select pg_drop_replication_slot('{slot}')")).await;
    let running = world.start_with(&["--skip-lost-changes"]).ready().await;
    world.sql("insert into t values (3, 'r0wv4lue')").await;
    world.until_records(2).await;
    running.stop().await;
    // It is not asked for again.
    let running = world.start().ready().await;
    running.stop().await;
}

/// Dropped and made anew it is in no publication, whatever its name.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_leaves_the_publication_is_told_for_as_long_as_it_is_out() {
    let world = world("table_leaves").await;
    let running = world.start().ready().await;
    world.sql("insert into t values (1, 'r0wv4lue')").await;
    world.until_records(1).await;
    let warnings = async |told: bool| {
        until(&format!("a warning: {told}"), async || {
            let status = world.home.status().await?;
            let text = status["warnings"].to_string();
            let is_told = text.contains("does not hold public.t any more")
                && text.contains(r#"ADD TABLE \"public\".\"t\""#);
            if is_told == told { Ok(()) } else { Err(text) }
        })
        .await;
    };
    world.sql("drop table t; create table t (id bigint primary key, body text)").await;
    warnings(true).await;
    world.sql("alter publication sluicebox add table t").await;
    warnings(false).await;
    world.sql("insert into t values (2, 'r0wv4lue')").await;
    world.until_records(2).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_transaction_that_blocks_a_new_slot_is_named() {
    let world = world("blocked_slot").await;
    let blocker = world.database.connect().await;
    let subtransaction = "savepoint s; insert into other values (2, 'r0wv4lue');";
    let sql = format!("begin; insert into other values (1, 'r0wv4lue'); {subtransaction}");
    blocker.batch_execute(&sql).await.unwrap();
    let pid = blocker.query_one("select pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0);
    let mut running = world.start();
    let text = running.unready("source_slot_blocked").await;
    assert_eq!(text.matches(&format!("pid {pid}")).count(), 1, "{text}");
    blocker.batch_execute("commit").await.unwrap();
    let running = running.ready().await;
    world.sql("insert into t values (1, 'r0wv4lue')").await;
    world.until_records(1).await;
    running.stop().await;
}
