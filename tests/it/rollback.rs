//! A new version that fails once it is live: the one before it comes back by itself, and what failed
//! meanwhile is delivered by it.

use std::collections::BTreeSet;
use std::fs;

use crate::folder::{NOTES, check_chains, entry, insert, list};
use crate::support::until;
use crate::support::world::{World, field};
use crate::support::{guest, sluicebox::Running};

const FILE: &str = "10-x.wasm";

fn rows(ids: std::ops::Range<u64>, label: &str) -> String {
    ids.map(|id| insert(id, label)).collect()
}

/// The digest of the version of the file that is in a state.
async fn digest(world: &World<'_>, state: &str) -> String {
    entry(world, FILE, state).await["digest"].as_str().unwrap().to_owned()
}

/// A first version handles what the second one fails on, which is not among what the second one is tried
/// on before it goes live.
async fn comes_back(test: &str, label: &str, expected: &str) {
    let world = World::new(test, NOTES, &["public.notes"]).await;
    world.drop_in_settings(FILE, "[limits]\ntime_ms = 500\n");
    world.drop_in(FILE, &guest::calm());
    let running = world.start().ready().await;
    let first = digest(&world, "live").await;
    world.sql(&rows(1..6, "ok")).await;
    let by_first = world.until_records(5).await[4].generation();

    world.drop_in(FILE, &guest::chaos());
    let second = until("the second version", async || {
        let now = digest(&world, "live").await;
        if now == first { Err(now) } else { Ok(now) }
    })
    .await;
    world.sql(&rows(6..9, "ok")).await;
    let by_second = world.until_records(8).await[7].generation();
    assert!(by_second > by_first);

    world.sql(&rows(9..20, label)).await;
    let back = entry(&world, FILE, "rolled_back").await;
    assert_eq!(back["digest"], second.as_str());
    assert_eq!(digest(&world, "live").await, first);
    let reason = back["reason"].as_str().unwrap();
    for part in ["messages failed with it", &first[..16], "is back", "is refused", expected] {
        assert!(reason.contains(part), "{part} is not in {reason}");
    }
    let log = world.log();
    let told = log.lines().find(|line| line.contains("rolled a transform back")).unwrap();
    assert!(told.contains(FILE) && told.contains(&second[..16]), "{told}");
    let table = world.ok(&["transforms", "list"]).await;
    assert!(table.contains("rolled_back") && table.contains(&second[..16]), "{table}");

    // What failed meanwhile is delivered, once, by the first version under a number of its own.
    world.until_no_messages().await;
    let records = world.until_records(19).await;
    let ids: BTreeSet<String> = records.iter().map(|record| field(record, "id")).collect();
    assert_eq!(ids.len(), 19);
    let of_first: Vec<&str> = records[..5].iter().map(|record| record.header("sb-chain")).collect();
    for record in &records[8..] {
        assert!(record.generation() > by_second, "record {}", record.seq_num);
        // The same chain, another generation.
        let digest = |tag: &str| tag.split_once(':').unwrap().1.to_owned();
        assert_eq!(digest(record.header("sb-chain")), digest(of_first[0]));
    }
    check_chains(&world).await;

    // A restart goes on with the first version, and the file in the folder is the second.
    running.stop().await;
    let running = world.start().ready().await;
    still_first(&world, &first, &second).await;
    // Under another name it is what it was; the folder shows no first version any more.
    for end in ["wasm", "toml"] {
        let path = |stem: &str| world.transforms().join(format!("{stem}.{end}"));
        fs::rename(path("10-x"), path("20-y")).unwrap();
    }
    let refused = entry(&world, "20-y.wasm", "rolled_back").await;
    assert!(refused["reason"].as_str().unwrap().starts_with("it is what `10-x.wasm` was"));
    // Settings that say something else are a change; it is tried, and now on what it failed on.
    world.drop_in_settings("20-y.wasm", "rollback = \"off\"\n[limits]\ntime_ms = 500\n");
    entry(&world, "20-y.wasm", "rejected").await;
    // Whoever insists says so.
    let insists = "vet = \"off\"\nrollback = \"off\"\n[limits]\ntime_ms = 500\n";
    world.drop_in_settings("20-y.wasm", insists);
    entry(&world, "20-y.wasm", "live").await;
    stop(running).await;
}

async fn still_first(world: &World<'_>, first: &str, second: &str) {
    assert_eq!(digest(world, "live").await, first);
    assert_eq!(digest(world, "rolled_back").await, second);
    let generation = list(world).await["generation"].as_u64().unwrap();
    world.sql(&rows(20..21, "trap")).await;
    let records = world.until_records(20).await;
    assert_eq!(records[19].generation(), generation);
}

async fn stop(mut running: Running<'_>) {
    running.assert_alive();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_begins_to_fail_gives_way_to_the_one_before() {
    comes_back("errors_jump", "trap", "(0 ran out of time)").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_begins_to_loop_gives_way_to_the_one_before() {
    comes_back("timeouts_jump", "loop", "ran out of time").await;
}
