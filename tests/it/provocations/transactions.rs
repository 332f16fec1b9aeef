//! Transactions that do not simply commit, and what else is in the log.

use crate::support::postgres::Cluster;
use crate::support::s2::Server;
use crate::support::world::{World, field};
use sluicebox::throwaway::Shutdown;

const TABLE: &str = "create table t (id bigint primary key, body text);";

#[tokio::test(flavor = "multi_thread")]
async fn prepared_transactions_come_once_or_never() {
    let cluster = Cluster::start(&[("max_prepared_transactions", "5")]).await;
    let database = cluster.database("prepared").await;
    let world = World::of(database, Server::in_memory().await, TABLE, &["public.t"]).await;
    let running = world.start().ready().await;
    let prepare = |name: &str, id: u64| {
        format!("begin; insert into t values ({id}, 'r0wv4lue'); prepare transaction '{name}'")
    };
    world.sql(&prepare("kept", 1)).await;
    world.sql(&prepare("left", 2)).await;
    world.sql("insert into t values (3, 'r0wv4lue')").await;
    world.until_records(1).await;
    cluster.down(Shutdown::Immediate).await;
    cluster.up().await;
    let running = running.ready().await;
    world.sql("commit prepared 'kept'").await;
    world.sql("rollback prepared 'left'").await;
    world.sql("insert into t values (4, 'r0wv4lue')").await;
    let records = world.until_records(3).await;
    let ids: Vec<_> = records.iter().map(|record| field(record, "id")).collect();
    assert_eq!(ids, ["3", "1", "4"]);
    world.ok(&["verify"]).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logical_messages_become_no_records() {
    let world = World::new("messages", TABLE, &["public.t"]).await;
    let running = world.start().ready().await;
    world
        .sql(
            "select pg_logical_emit_message(false, 'x', 'r0wv4lue');
             begin; select pg_logical_emit_message(true, 'x', 'r0wv4lue');
               insert into t values (1, 'r0wv4lue');
               select pg_logical_emit_message(false, 'x', 'r0wv4lue'); commit;
             begin; insert into t values (2, 'r0wv4lue');
               select pg_logical_emit_message(false, 'x', 'r0wv4lue'); rollback;
             insert into t values (3, 'r0wv4lue');",
        )
        .await;
    let records = world.until_records(2).await;
    let ids: Vec<_> = records.iter().map(|record| field(record, "id")).collect();
    assert_eq!(ids, ["1", "3"]);
    world.until_confirmed().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subtransactions_that_are_rolled_back_leave_nothing() {
    let world = World::new("subtransactions", TABLE, &["public.t"]).await;
    let running = world.start().ready().await;
    world
        .sql(
            "do $$ begin for n in 1..2000 loop begin insert into t values (n, 'r0wv4lue');
               if n % 2 = 0 then raise exception 'no'; end if;
             exception when raise_exception then null; end; end loop; end $$;",
        )
        .await;
    let records = world.until_records(1000).await;
    assert!(records.iter().all(|record| field(record, "id").parse::<u64>().unwrap() % 2 == 1));
    world.ok(&["verify"]).await;
    running.stop().await;
}
