//! Messages whose parts no batch of S2 holds together: each part is once in the stream, in order, with
//! nothing of its row in between, whoever is killed in the middle.

use std::collections::BTreeMap;

use crate::support::oracle::TABLES;
use crate::support::postgres::Cluster;
use crate::support::proxy::{Relay, Wire};
use crate::support::s2::{Record, Server, data};
use crate::support::world::{BASIN, STREAM, World, field};
use crate::support::{Random, until};

/// Seven parts of S2's largest records, or so.
const BODY_BYTES: usize = 6_500_000;

/// Index and count of a part.
fn part(record: &Record) -> (usize, usize) {
    let (index, count) = record.header("sb-part").split_once('/').expect("sb-part is index/count");
    (index.parse().unwrap(), count.parse().unwrap())
}

/// The parts of messages that have several, by their key, in the order of the stream.
fn parts(records: &[Record]) -> BTreeMap<String, Vec<&Record>> {
    let mut parts: BTreeMap<String, Vec<&Record>> = BTreeMap::new();
    for record in records.iter().filter(|record| part(record).1 > 1) {
        parts.entry(record.header("sb-key").to_owned()).or_default().push(record);
    }
    parts
}

async fn records(world: &World<'_>, stream: &str) -> Vec<Record> {
    match world.s2.tail(BASIN, stream).await {
        Ok(_) => data(&world.s2.read(BASIN, stream).await).into_iter().cloned().collect(),
        Err(_) => Vec::new(),
    }
}

/// Waits until so many parts are in the stream.
async fn until_parts(world: &World<'_>, stream: &str, count: usize) {
    until(&format!("{count} parts"), async || {
        let records = records(world, stream).await;
        let found = records.iter().filter(|record| part(record).1 > 1).count();
        if found >= count { Ok(()) } else { Err(found.to_string()) }
    })
    .await;
}

/// Has rows of three messages each through, of which one takes many batches, with kills in the middle.
async fn check(test: &str, stream: &str) {
    let dir = tempfile::tempdir().unwrap();
    let database = Cluster::shared().await.database(test).await;
    let s2 = Server::on_disk(dir.path()).await;
    let relay = Relay::to(s2.port()).await;
    let mut world = World::of(database, s2, TABLES, &["public.items"]).await;
    world.home.settings.endpoint = relay.endpoint();
    world.home.settings.sink = "create = true\n".to_owned();
    world.home.write_config();
    if stream != STREAM {
        world.ok(&["transforms", "add", "route", "--set", &format!("stream={stream}")]).await;
    }
    world.ok(&["transforms", "add", "split"]).await;
    let mut running = world.start().ready().await;
    let mut random = Random::new(Random::seed());
    let bodies: Vec<String> = (0..2).map(|_| random.text(BODY_BYTES)).collect();
    relay.set(Wire::Slow);
    for (id, body) in (1..).zip(&bodies) {
        let statements = format!(
            "insert into items values ({id}, 1, 'small', 'x');
             update items set op = 2, body = '{body}' where id = {id};
             update items set op = 3 where id = {id};
             insert into items values ({id}0, 4, 'another', 'y');"
        );
        world.sql(&statements).await;
    }
    // Sluicebox dies twice, its chain is another one then, and S2 dies once.
    let mut torn = 0;
    for (step, count) in [1, 3, 5].into_iter().enumerate() {
        until_parts(&world, stream, count).await;
        if step == 2 {
            world.s2.kill().await;
            world.s2.up().await;
        } else {
            running.kill().await;
            let records = records(&world, stream).await;
            let is_torn = |parts: &Vec<&Record>| parts.len() < part(parts[0]).1;
            torn += usize::from(parts(&records).values().any(is_torn));
            let settings = format!("[config]\npart_bytes = {}\n", 300_000 + step * 100_000);
            let module = if stream == STREAM { "10-split.wasm" } else { "20-split.wasm" };
            world.drop_in_settings(module, &settings);
            running = world.start();
        }
    }
    assert!(torn > 0, "nobody was killed in the middle of the parts");
    relay.set(Wire::Pass);
    until("every record", async || {
        let records = records(&world, stream).await;
        let found = records.iter().filter(|record| part(record).0 + 1 == part(record).1).count();
        if found >= 8 { Ok(()) } else { Err(found.to_string()) }
    })
    .await;
    world.until_no_messages().await;
    world.until_confirmed().await;
    running.stop().await;

    let records = records(&world, stream).await;
    let mut told: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut open: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for record in &records {
        let key = record.header("sb-key");
        let (index, count) = part(record);
        let whole = open.entry(key).or_default();
        assert_eq!(index, whole.len(), "record {} of {key}", record.seq_num);
        whole.push(record);
        let first = whole[0];
        assert_eq!(count, part(first).1, "record {}", record.seq_num);
        assert_eq!(record.header("sb-chain"), first.header("sb-chain"), "{}", record.seq_num);
        assert!(record.metered_bytes() <= 1024 * 1024, "record {}", record.seq_num);
        if index + 1 < count {
            continue;
        }
        let joined: String = whole.iter().map(|record| record.body.as_str()).collect();
        let message = Record { body: joined, ..first.clone() };
        let (id, op) = (field(&message, "id"), field(&message, "op"));
        if op == "2" {
            assert!(count > 2, "{count} parts");
            let body = &bodies[id.parse::<usize>().unwrap() - 1];
            assert!(field(&message, "body") == *body, "the parts of {id} are not the message");
            // After a restart other rows may go in between; its own do not.
            let between = records.iter().filter(|other| {
                (first.seq_num..record.seq_num).contains(&other.seq_num)
                    && other.header("sb-key") != key
                    && part(other).1 == 1
            });
            for other in between {
                assert_ne!(field(other, "id"), id, "record {}", other.seq_num);
            }
        }
        told.entry(id).or_default().push(op);
    }
    let expected: BTreeMap<String, Vec<String>> =
        [("1", "1 2 3"), ("10", "4"), ("2", "1 2 3"), ("20", "4")]
            .map(|(id, ops)| (id.to_owned(), ops.split(' ').map(str::to_owned).collect()))
            .into();
    assert_eq!(told, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_part_is_once_in_the_stream_whoever_is_killed_in_the_middle() {
    check("parts", STREAM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_it_is_in_a_stream_that_a_transform_chooses() {
    check("parts_routed", "large").await;
}
