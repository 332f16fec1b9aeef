//! S2 is away for long: the database is let go, what waits for S2 is on disk and bounded, and nothing is
//! lost, doubled or out of order, whoever is killed meanwhile. And the disk is full.

use std::path::Path;
use std::time::Duration;

use crate::support::disk::SmallDisk;
use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Relay, Wire};
use crate::support::s2::Server;
use crate::support::world::{World, field};
use crate::support::{Random, until};

/// A world whose S2 keeps its streams on disk, with more settings.
async fn world(test: &str, dir: &Path, sections: &str) -> World<'static> {
    let database = Cluster::shared().await.database(test).await;
    let s2 = Server::on_disk(dir).await;
    let mut world = World::of(database, s2, TABLES, &["public.items"]).await;
    world.home.settings.sections = sections.to_owned();
    world.home.write_config();
    world
}

fn workload(world: &World<'_>) -> Workload {
    Workload::new(world.database.url(), 3)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_let_go_while_s2_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("spill", dir.path(), "[delivery]\nspill_after = \"1s\"").await;
    let mut running = world.start().ready().await;
    let work = workload(&world).start();
    for _ in 0..2 {
        work.commits(100).await;
        world.s2.kill().await;
        running.unready("sink_unreachable").await;
        running.until_spilled().await;
        work.commits(200).await;
        // Nothing but the disk can have taken them.
        world.until_confirmed().await;
        world.s2.up().await;
        running = running.ready().await;
        work.commits(100).await;
    }
    work.stop().await;
    judge(&world, Order::Whole).await;
    world.until_nothing_is_spilled().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_spilled_survives_a_kill_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("spill_kill", dir.path(), "[delivery]\nspill_after = \"500ms\"").await;
    let load = workload(&world);
    let mut random = Random::new(load.seed);
    let mut running = world.start().ready().await;
    let work = load.start();
    for round in 0..4 {
        work.commits(60).await;
        world.s2.kill().await;
        // The kill falls before, into and after the first steps of spilling.
        tokio::time::sleep(Duration::from_millis(random.below(1_500))).await;
        if round > 0 {
            running.until_spilled().await;
            work.commits(random.below(200)).await;
        }
        running.kill().await;
        running = world.start();
        running.until_spilled().await;
        work.commits(100).await;
        world.s2.up().await;
        // And this one into reading it again.
        tokio::time::sleep(Duration::from_millis(random.below(1_000))).await;
        running.kill().await;
        running = world.start().ready().await;
    }
    work.stop().await;
    judge(&world, Order::Whole).await;
    world.until_nothing_is_spilled().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_rows_keep_their_order_among_spilled_ones() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("spill_parked", dir.path(), "[delivery]\nspill_after = \"500ms\"").await;
    let load = Workload { oversize_one_in: 12, ..workload(&world) };
    let mut random = Random::new(load.seed);
    let mut running = world.start().ready().await;
    let work = load.start();
    for _ in 0..2 {
        work.commits(60).await;
        world.s2.kill().await;
        running.until_spilled().await;
        work.commits(150).await;
        world.s2.up().await;
        tokio::time::sleep(Duration::from_millis(random.below(1_000))).await;
        running.kill().await;
        running = world.start().ready().await;
    }
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    work.stop().await;
    judge(&world, Order::PerRow).await;
    world.until_no_messages().await;
    running.stop().await;
}

/// What is spilled comes before what is newer and was parked, also where that is let through while S2
/// is away: before spilling begins, and after.
#[tokio::test(flavor = "multi_thread")]
async fn a_parked_row_that_is_let_through_waits_for_older_changes_that_are_spilled() {
    for fixed_first in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let sections = "[delivery]\nspill_after = \"20MiB\"";
        let world = world("spill_released", dir.path(), sections).await;
        let running = world.start().ready().await;
        world.sql("insert into items values (0, 0, 'r0wv4lue', 'r0wv4lue')").await;
        world.until_records(1).await;
        world.s2.kill().await;
        world
            .sql(
                "insert into items values (1, 1, 'r0wv4lue', 'r0wv4lue');
                 update items set op = 2, body = repeat('x', 1200000) where id = 1;",
            )
            .await;
        world.until_messages("parked", 1).await;
        let mut running = running;
        let write_much = "create table if not exists much (n text); alter table much alter n \
             set storage external; insert into much select repeat('x', 1000000) from \
             generate_series(1, 30);";
        for fix in [fixed_first, !fixed_first] {
            if fix {
                world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
                world.until_transform("10-strip-columns.wasm", "live").await;
            } else {
                // What is written is not published, and what Postgres keeps is still too much.
                world.sql(write_much).await;
                running.until_spilled().await;
            }
        }
        world.s2.up().await;
        let records = world.until_records(3).await;
        let ops: Vec<_> = records.iter().map(|record| field(record, "op")).collect();
        assert_eq!(ops, ["0", "1", "2"], "fixed first: {fixed_first}");
        world.until_no_messages().await;
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spill_stops_reading_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let sections = "[delivery]\nspill_after = \"500ms\"\nspill_max = \"150KiB\"";
    let world = world("spill_full", dir.path(), sections).await;
    let mut running = world.start().ready().await;
    let work = workload(&world).start();
    work.commits(20).await;
    world.s2.kill().await;
    let text = running.unready("spill_full").await;
    assert!(text.contains("delivery.spill_max"), "{text}");
    work.commits(100).await;
    running.kill().await;
    let mut running = world.start();
    running.unready("spill_full").await;
    world.s2.up().await;
    let running = running.ready().await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_stops_reading_until_messages_leave_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = world("store_full", dir.path(), "").await;
    world.home.settings.state = "state\"\nbytes_max = \"2MiB".to_owned();
    world.home.write_config();
    let mut running = world.start().ready().await;
    let row = |id: u64, bytes: u64| {
        format!("insert into items values ({id}, {id}, 'r0wv4lue', repeat('x', {bytes}))")
    };
    for id in 1..=2 {
        world.sql(&row(id, 1_200_000)).await;
    }
    let text = running.unready("store_full").await;
    assert!(text.contains("state.bytes_max"), "{text}");
    world.sql(&row(3, 10)).await;
    world.ok(&["messages", "ack", "--all"]).await;
    let running = running.ready().await;
    world.until_records(1).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_outlasted() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("disk_full", dir.path(), "").await;
    let state = world.path("state");
    std::fs::create_dir(&state).unwrap();
    let Some(disk) = SmallDisk::mount(&state, "3m") else {
        eprintln!(
            "skipped: only root may mount a small disk; the store's own tests have a full one"
        );
        return;
    };
    let mut running = world.start().ready().await;
    let work = workload(&world).start();
    work.commits(20).await;
    let rows = "insert into items select n, n, 'r0wv4lue', repeat('x', 1200000)
                from generate_series(1, 3) n;
                insert into ledger (op, id, action) select n, n, 'insert' from generate_series(1, 3) n;";
    world.sql(rows).await;
    let text = running.unready("store_failed").await;
    assert!(text.contains("is full") && text.contains("make room"), "{text}");
    work.commits(20).await;
    // A stop does not wait for room for ever, and does not say that all is well.
    running.stop().await;
    let log = world.log();
    let left = "stopped: what could not be written to the store is read from Postgres again";
    assert!(log.contains(left), "{log}");
    running = world.start();
    running.unready("store_failed").await;
    disk.resize("64m");
    running = running.ready().await;
    world.until_messages("parked", 3).await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    work.stop().await;
    judge(&world, Order::PerRow).await;
    running.stop().await;
}

/// S2 takes everything, and less of it than is written.
#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_let_go_while_s2_is_slow() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = world("spill_slow", dir.path(), "[delivery]\nspill_after = \"1s\"").await;
    let relay = Relay::to(world.s2.port()).await;
    world.home.settings.endpoint = relay.endpoint();
    world.home.settings.sink = "in_flight_mib = 1".to_owned();
    world.home.write_config();
    let mut running = world.start().ready().await;
    relay.set(Wire::Slow);
    let mut written = 0;
    until("changes to be spilled", async || {
        running.assert_alive();
        if world.spilled().await? > 0 {
            return Ok(());
        }
        // Some three times of what gets through.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (from, to) = (written + 1, written + 400);
        written = to;
        let rows = format!(
            "begin; insert into items select n, n, 'r0wv4lue', repeat('x', 2000)
               from generate_series({from}, {to}) n;
             insert into ledger (op, id, action) select n, n, 'insert'
               from generate_series({from}, {to}) n; commit;"
        );
        world.sql(&rows).await;
        Err(format!("{written} rows written"))
    })
    .await;
    assert!(world.log().contains("S2 takes less than is written"), "{}", world.log());
    // Nothing but the disk can have taken them so soon.
    world.until_confirmed().await;
    relay.set(Wire::Pass);
    running = running.ready().await;
    judge(&world, Order::Whole).await;
    world.until_nothing_is_spilled().await;
    running.stop().await;
}

/// Whoever looks after the database is told what keeps its log, and who.
#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_the_log_is_named() {
    let cluster = Cluster::start(&[]).await;
    let database = cluster.database("keepers").await;
    let tables = [TABLES, "create table other (id bigint, body text);"].concat();
    let mut world =
        World::of(database, Server::in_memory().await, &tables, &["public.items"]).await;
    world.home.settings.sections = "[delivery]\nspill_max = \"0\"".to_owned();
    world.home.write_config();
    let mut running = world.start().ready().await;
    let kept_by = async |code: &str| {
        until(&format!("the log to be kept by {code}"), async || {
            let status = world.status().await?;
            let found = &status["wal_kept_by"];
            let is_it = found["code"] == code || (code.is_empty() && found.is_null());
            if is_it { Ok(status) } else { Err(status.to_string()) }
        })
        .await
    };
    // 40 MB of it.
    let much = "select pg_logical_emit_message(false, 'x', repeat('x', 1000000)) \
                from generate_series(1, 40)";
    let open = world.database.connect().await;
    open.batch_execute("begin; insert into other values (1, 'r0wv4lue')").await.unwrap();
    let pid = open.query_one("select pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0);
    world.sql(much).await;
    let status = kept_by("open_transaction").await;
    let text = status["wal_kept_by"]["text"].as_str().unwrap();
    assert!(text.contains(&format!("pid {pid} ")), "{text}");
    assert!(status["oldest_transaction_seconds"].is_u64(), "{status}");
    let scrape = world.metrics().await.unwrap();
    assert!(scrape.contains("sluicebox_wal_kept_by{reason=\"open_transaction\"} 1\n"), "{scrape}");
    open.batch_execute("commit").await.unwrap();
    kept_by("").await;

    world.s2.kill().await;
    world.sql("insert into items values (1, 1, 'r0wv4lue', 'r0wv4lue')").await;
    running.unready("sink_unreachable").await;
    world.sql(much).await;
    let status = kept_by("sink_away").await;
    let text = status["wal_kept_by"]["text"].as_str().unwrap();
    assert!(text.contains("sink_unreachable"), "{text}");
    running.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_at_the_start_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("full_at_start", dir.path(), "").await;
    let state = world.path("state");
    std::fs::create_dir(&state).unwrap();
    let Some(disk) = SmallDisk::mount(&state, "3m") else {
        eprintln!("skipped: only root may mount a small disk");
        return;
    };
    let running = world.start().ready().await;
    world.sql("insert into items values (1, 1, 'r0wv4lue', 'r0wv4lue')").await;
    world.until_records(1).await;
    running.kill().await;
    // To the last byte.
    disk.fill();
    let fill = |number: u32| std::fs::write(state.join(format!("fill{number}")), vec![1; 4096]);
    let filled = (0..2000).take_while(|number| fill(*number).is_ok()).count();
    assert!(filled < 2000, "the disk is full");
    world.sql("insert into items values (2, 2, 'r0wv4lue', 'r0wv4lue')").await;
    let mut running = world.start();
    let text = running.unready("store_failed").await;
    assert!(text.contains("full") || text.contains("disk"), "{text}");
    disk.resize("64m");
    let running = running.ready().await;
    world.until_records(2).await;
    running.stop().await;
}
