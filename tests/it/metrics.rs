//! What a scraper sees of a running pipeline.

use crate::folder::{NOTES, insert};
use crate::support::guest;
use crate::support::oracle::TABLES;
use crate::support::until;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_scrape_tells_what_happened() {
    let world = World::new("metrics", TABLES, &["public.items"]).await;
    let running = world.start().ready().await;
    world.ok(&["transforms", "add", "compress-columns", "--column", "body"]).await;
    world.until_transform("10-compress-columns.wasm", "live").await;
    for (id, bytes) in [(1, "'r0wv4lue'"), (2, "'r0wv4lue'")] {
        world.sql(&format!("insert into items values ({id}, {id}, 'r0wv4lue', {bytes})")).await;
    }
    // Random enough not to be made small.
    let large = "insert into items select 3, 3, 'r0wv4lue', \
                 string_agg(md5(random()::text), '') from generate_series(1, 120000)";
    world.sql(large).await;
    world.until_messages("parked", 1).await;
    let expected = [
        "sluicebox_ready 1",
        "sluicebox_state{state=\"delivering\"} 1",
        "sluicebox_state{state=\"sink\"} 0",
        "sluicebox_stuck{part=\"source\"} 0",
        "sluicebox_changes_read_total 3",
        "sluicebox_records_acknowledged_total 2",
        "sluicebox_records_appended_total 2",
        "sluicebox_delivery_seconds_count 2",
        "sluicebox_messages{state=\"parked\"} 1",
        "sluicebox_messages_failed{class=\"oversize\"} 1",
        "sluicebox_message_failures_total{class=\"oversize\"} 1",
        "sluicebox_transform_calls_total{file=\"10-compress-columns.wasm\"} 3",
        "sluicebox_transform_errors_total{file=\"10-compress-columns.wasm\"} 0",
        "sluicebox_sink_sessions_total 1",
        "sluicebox_source_connections_total 1",
        "sluicebox_wal_status{status=\"reserved\"} 1",
    ];
    let scrape = until("the scrape to say so", async || {
        let text = world.metrics().await?;
        let missing: Vec<_> =
            expected.iter().filter(|line| !text.lines().any(|found| found == **line)).collect();
        if missing.is_empty() { Ok(text) } else { Err(format!("{missing:?} not in\n{text}")) }
    })
    .await;
    world.look_through("/metrics", &scrape);
    assert!(!scrape.contains("items"), "no table is named:\n{scrape}");
    for name in ["wal_retained_bytes", "wal_unconfirmed_bytes", "store_bytes", "in_flight_bytes"] {
        assert!(scrape.contains(&format!("\nsluicebox_{name} ")), "{name} is not in\n{scrape}");
    }
    assert!(scrape.contains("\nprocess_resident_memory_bytes "));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_settings_drop_for_an_error_is_counted_and_logged() {
    let world = World::new("drops", NOTES, &["public.notes"]).await;
    world.drop_in_settings("10-chaos.wasm", "on_error = \"drop\"\n");
    world.drop_in("10-chaos.wasm", &guest::chaos());
    let running = world.start().ready().await;
    let live = world.until_transform("10-chaos.wasm", "live").await;
    assert_eq!(live["dropped"], 0, "{live}");
    let rows = [insert(1, "ok"), insert(2, "trap"), insert(3, "error"), insert(4, "ok")];
    world.sql(&rows.concat()).await;
    world.until_records(2).await;
    world.until_confirmed().await;
    let expected = [
        "sluicebox_transform_calls_total{file=\"10-chaos.wasm\"} 4",
        "sluicebox_transform_errors_total{file=\"10-chaos.wasm\"} 2",
        "sluicebox_transform_dropped_total{file=\"10-chaos.wasm\"} 2",
        "sluicebox_messages{state=\"parked\"} 0",
    ];
    until("the scrape to say so", async || {
        let text = world.metrics().await?;
        let is_there = |line: &&str| text.lines().any(|found| found == *line);
        if expected.iter().all(is_there) { Ok(()) } else { Err(text) }
    })
    .await;
    let live = world.until_transform("10-chaos.wasm", "live").await;
    assert_eq!(live["dropped"], 2, "{live}");
    let log = world.log();
    let dropped =
        log.lines().filter(|line| line.contains("10-chaos.wasm") && line.contains("drop"));
    assert_eq!(dropped.count(), 2, "{log}");
    assert!(world.messages(None).await.is_empty());
    running.stop().await;
}
