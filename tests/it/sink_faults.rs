//! What is wrong with S2 is waited out: said in `/readyz` with a code, healed without a restart,
//! nothing lost, nothing doubled, no message marked as failed for it.

use std::fs;

use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Fault, Front, Relay, Wire};
use crate::support::s2::Server;
use crate::support::sluicebox::{Home, Running, TOKEN};
use crate::support::world::{BASIN, STREAM, World, settings};
use crate::support::{Random, until};

async fn items(test: &str) -> World<'static> {
    World::new(test, TABLES, &["public.items"]).await
}

/// The world behind a front that answers faults.
async fn fronted(test: &str) -> (World<'static>, Front) {
    let mut world = items(test).await;
    let front = Front::of(&world.s2).await;
    world.home.settings.endpoint = front.endpoint();
    world.home.write_config();
    (world, front)
}

fn workload(world: &World<'_>) -> Workload {
    Workload::new(world.database.url(), 2)
}

/// Says what is wrong in words that an operator can act on.
fn assert_text(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{text}` does not say `{part}`");
    }
    assert!(!text.contains("Error {") && !text.contains("Some("), "{text}");
}

async fn assert_nothing_failed(home: &Home) {
    assert!(home.messages(None).await.is_empty(), "an outage of the sink fails no message");
}

/// The stream is there all the time, and would be created if it were not.
#[tokio::test(flavor = "multi_thread")]
async fn a_404_that_passes_does_not_make_a_stream_count_as_deleted() {
    let (mut world, front) = fronted("passing_404").await;
    world.home.settings.sink = "create = true\n".to_owned();
    world.home.write_config();
    let mut running = world.start().ready().await;
    let work = workload(&world).start();
    work.commits(50).await;
    front.set(Fault::status(404, "stream_not_found"));
    running.unready("sink_404").await;
    work.commits(20).await;
    front.set(Fault::None);
    let mut running = running.ready().await;
    // A restart reads the stream from its checkpoint, too.
    front.set(Fault::status(404, "stream_not_found"));
    running.unready("sink_404").await;
    running.kill().await;
    let mut running = world.start();
    running.unready("sink_404").await;
    front.set(Fault::None);
    let running = running.ready().await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_basin_and_stream_are_named_and_awaited() {
    let database = Cluster::shared().await.database("missing").await;
    let s2 = Server::in_memory().await;
    database.run(TABLES).await;
    let home = Home::new(settings(&database, &s2.endpoint(), &["public.items"]));
    let mut running = home.start();
    let text = running.unready("sink_404").await;
    assert_text(&text, &[BASIN]);
    // What was committed before the slot exists is not in the stream.
    until("the slot", async || {
        let slots = "select count(*) from pg_replication_slots where database = current_database()";
        match database.value(slots).await.as_deref() {
            Some("1") => Ok(()),
            other => Err(format!("{other:?} slots")),
        }
    })
    .await;
    database.run("insert into items values (1, 1, 'r0wv4lue', 'r0wv4lue')").await;
    let check = home.cli(&["check"]).await;
    assert_eq!(check.status.code(), Some(1), "`check` on what is missing");

    s2.create_basin(BASIN).await;
    let text = until("the stream to be named", async || {
        let text = running.unready("sink_404").await;
        if text.contains(STREAM) { Ok(text) } else { Err(text) }
    })
    .await;
    assert_text(&text, &["create"]);
    s2.create_stream(BASIN, STREAM).await;
    let running = running.ready().await;
    until("the change to arrive", async || match s2.tail(BASIN, STREAM).await {
        Ok(2..) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_basin_and_stream_are_created_where_the_configuration_says_so() {
    let database = Cluster::shared().await.database("create").await;
    let s2 = Server::in_memory().await;
    database.run(TABLES).await;
    let mut settings = settings(&database, &s2.endpoint(), &["public.items"]);
    settings.sink = "create = true".to_owned();
    let home = Home::new(settings);
    let running = home.start().ready().await;
    database.run("insert into items values (1, 1, 'r0wv4lue', 'r0wv4lue')").await;
    until("the change to arrive", async || match s2.tail(BASIN, STREAM).await {
        Ok(2..) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_of_the_whole_sink_are_waited_out() {
    let (world, front) = fronted("statuses").await;
    let mut running = world.start().ready().await;
    let work = workload(&world).start();
    for (status, code) in [
        (401, "authn"),
        (403, "permission_denied"),
        (429, "rate_limited"),
        (500, "storage"),
        (503, "unavailable"),
    ] {
        work.commits(30).await;
        front.set(Fault::status(status, code));
        let text = running.unready(&format!("sink_{status}")).await;
        assert_text(&text, &[&status.to_string()]);
        work.commits(30).await;
        assert_nothing_failed(&world).await;
        assert!(front.refused() > 0);
        front.set(Fault::None);
        running = running.ready().await;
    }
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_for_patience_gets_it() {
    let (world, front) = fronted("patience").await;
    let mut running = world.start().ready().await;
    let patience = Fault::Status {
        status: 429,
        code: "rate_limited",
        // Longer than any first steps of a back-off.
        retry_after_ms: Some(3_600_000),
    };
    front.set(patience);
    world.sql("insert into items values (1, 1, 'r0wv4lue', 'r0wv4lue')").await;
    running.unready("sink_429").await;
    let refused = front.refused();
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert!(
        front.refused() <= refused + 1,
        "asked {} times in 3 s although it was told to wait an hour",
        front.refused() - refused
    );
    running.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mended_token_file_needs_no_restart() {
    let (mut world, front) = fronted("token_file").await;
    let (old, new) = ("0ld-t0ken-s3cret", "n3w-t0ken-s3cret");
    world.home.secret(old);
    world.home.secret(new);
    fs::write(world.path("token"), format!("{old}\n")).unwrap();
    world.home.settings.token = "access_token_file = \"token\"".to_owned();
    world.home.write_config();
    front.set(Fault::Unless { token: old.to_owned() });
    let mut running = world.start().ready().await;
    let work = workload(&world).start();
    work.commits(30).await;

    front.set(Fault::Unless { token: new.to_owned() });
    let text = running.unready("sink_401").await;
    assert_text(&text, &["access_token"]);
    world.look_through("/readyz", &text);
    let check = world.cli(&["check"]).await;
    assert_eq!(check.status.code(), Some(1));
    let report = String::from_utf8_lossy(&check.stdout);
    world.look_through("`check`", &report);
    assert!(report.contains("401"), "{report}");

    fs::write(world.path("token"), new).unwrap();
    let running = running.ready().await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

/// S2 itself never sees a record over its limit: the size gate stops it. A proxy in front of S2
/// may allow less, and then the answer counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_size_parks_that_message_alone() {
    let (world, front) = fronted("refused_size").await;
    front.set(Fault::BodiesOver { bytes: 300_000 });
    let running = world.start().ready().await;
    let insert = |id: u64, bytes: u64| {
        format!(
            "insert into items values ({id}, {id}, 'r0wv4lue', 'r0wv4lue' || repeat('x', {bytes}));"
        )
    };
    let sql: String =
        (1..=40).map(|id| insert(id, if id % 20 == 7 { 500_000 } else { 1_000 })).collect();
    world.sql(&format!("begin; {sql} commit;")).await;
    world.until_records(38).await;
    let failed = world.until_messages("failed", 2).await;
    for (message, id) in failed.iter().zip([7, 27]) {
        assert_eq!(message["key"]["id"], id);
        assert_eq!(message["error"]["status"], 413, "{message:#}");
        assert_text(message["error"]["text"].as_str().unwrap(), &["413"]);
    }
    assert_eq!(world.readyz().await.unwrap()["ready"], true);

    front.set(Fault::None);
    world.ok(&["messages", "retry", "--all"]).await;
    world.until_no_messages().await;
    let records = world.until_records(40).await;
    assert_eq!(records.iter().filter(|record| record.body.len() > 300_000).count(), 2);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_cut_and_stalled_lose_and_double_nothing() {
    let mut world = items("wires").await;
    let relay = Relay::to(world.s2.port()).await;
    world.home.settings.endpoint = relay.endpoint();
    world.home.write_config();
    let mut running: Running<'_> = world.start().ready().await;
    let load = workload(&world);
    let mut random = Random::new(load.seed);
    let work = load.start();
    for _ in 0..12 {
        work.commits(random.below(40)).await;
        relay.cut_once().await;
    }
    running = running.ready().await;
    relay.set(Wire::Cut);
    running.unready("sink_unreachable").await;
    relay.set(Wire::Pass);
    running = running.ready().await;
    // Nothing answers, and nothing says so.
    relay.set(Wire::Stall);
    work.commits(30).await;
    running.unready("sink_").await;
    relay.set(Wire::Pass);
    running = running.ready().await;
    work.stop().await;
    assert_nothing_failed(&world).await;
    judge(&world, Order::Whole).await;
    assert!(!world.log().contains(TOKEN));
    running.stop().await;
}

/// While the sink stands still, Postgres is answered: the connection outlives its time-out.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_answered_while_the_sink_stands_still() {
    let cluster = Cluster::start(&[("wal_sender_timeout", "5s")]).await;
    let database = cluster.database("stalled").await;
    let world = World::of(database, Server::in_memory().await, TABLES, &["public.items"]).await;
    let front = Front::of(&world.s2).await;
    let mut home = Home::new(settings(&world.database, &front.endpoint(), &["public.items"]));
    home.settings.stream = STREAM.to_owned();
    home.write_config();
    let mut running = home.start().ready().await;
    let walsender = async || {
        let sql = "select pid from pg_stat_replication where state = 'streaming'";
        world.database.value(sql).await
    };
    let before = until("a walsender", async || walsender().await.ok_or("none".to_owned())).await;
    front.set(Fault::status(503, "unavailable"));
    // More than the queues hold, so that reading stops, too.
    world
        .sql(
            "alter table items alter body set storage external; \
             insert into items select n, n, 'r0wv4lue', \
             'r0wv4lue' || repeat(md5(n::text), 16000) from generate_series(1, 120) n; \
             insert into ledger (op, id, action) select n, n, 'insert' \
             from generate_series(1, 120) n;",
        )
        .await;
    running.unready("sink_503").await;
    tokio::time::sleep(std::time::Duration::from_secs(12)).await;
    assert_eq!(walsender().await, Some(before), "the walsender before and after the stall");
    front.set(Fault::None);
    let running = running.ready().await;
    judge(&world, Order::Whole).await;
    running.stop().await;
}

/// A 403 at a start may pass, or be there to stay: only an operator can say that less will do.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_promised_is_kept_over_a_restart() {
    let (mut world, front) = fronted("promise").await;
    let running = world.start().ready().await;
    let work = workload(&world).start();
    work.commits(30).await;
    running.kill().await;
    front.set(Fault::AppendOnly);
    let mut running = world.start();
    let text = running.unready("sink_403").await;
    assert_text(&text, &["`exactly-once` is promised", "sink.guarantee = \"at-least-once\""]);
    work.commits(30).await;
    front.set(Fault::None);
    let running = running.ready().await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.stop().await;

    front.set(Fault::AppendOnly);
    world.home.settings.sink = "guarantee = \"at-least-once\"".to_owned();
    world.home.write_config();
    let running = world.start().ready().await;
    let status = world.status().await.unwrap();
    assert!(status["guarantee"].as_str().unwrap().starts_with("at least once"), "{status}");
    let scrape = world.metrics().await.unwrap();
    assert!(scrape.contains("sluicebox_guarantee{guarantee=\"at-least-once\"} 1\n"), "{scrape}");
    assert!(world.log().contains("less is promised than before"), "{}", world.log());
    running.stop().await;
}

/// Before anything was promised, a 403 says what the access token may do, if it stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_403_that_passes_at_the_very_first_start_changes_nothing() {
    let (world, front) = fronted("passing").await;
    // The stream does not begin where it began.
    for _ in 0..2 {
        world.s2.append_foreign(BASIN, STREAM).await;
    }
    let tail = world.s2.tail(BASIN, STREAM).await.unwrap();
    world.s2.trim(BASIN, STREAM, tail).await;
    front.set(Fault::AppendOnly);
    let mut running = world.start();
    let text = running.unready("sink_403").await;
    assert_text(&text, &["If it stays so for some seconds", "less than exactly once"]);
    front.set(Fault::None);
    let running = running.ready().await;
    let status = world.status().await.unwrap();
    assert!(status["guarantee"].as_str().unwrap().starts_with("exactly once"), "{status}");
    running.stop().await;

    let (world, front) = fronted("staying").await;
    front.set(Fault::AppendOnly);
    let running = world.start().ready().await;
    let status = world.status().await.unwrap();
    assert!(status["guarantee"].as_str().unwrap().starts_with("at least once"), "{status}");
    running.stop().await;
}
