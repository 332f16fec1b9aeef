//! Messages whose attempts are spent: each becomes a dead letter once, with the row as it was, in a
//! stream or a file, whoever is killed; and what is not a message's own trouble spends nothing.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use serde_json::Value;

use crate::support::oracle::TABLES;
use crate::support::postgres::Cluster;
use crate::support::s2::{Record, Server, data};
use crate::support::world::{BASIN, World, field};
use crate::support::{Random, until};

const DEAD: &str = "dead";

const STREAM_PLACE: &str = "stream = \"dead\"";
const FILE_PLACE: &str = "file = \"dead.jsonl\"";

/// A world whose messages have so many attempts, with a place for those that have spent them.
async fn world(
    test: &str,
    dir: &std::path::Path,
    attempts: u64,
    place: &str,
    create: bool,
) -> World<'static> {
    let database = Cluster::shared().await.database(test).await;
    let s2 = Server::on_disk(dir).await;
    let mut world = World::of(database, s2, TABLES, &["public.items"]).await;
    world.home.settings.sink = format!("create = {create}\n");
    world.home.settings.sections = format!(
        "[delivery]\nmax_attempts = {attempts}\nretry_min = \"50ms\"\nretry_max = \"200ms\"\n\n\
         [dead_letters]\n{place}\n"
    );
    world.home.write_config();
    world
}

async fn insert(world: &World<'_>, id: u64, body_bytes: usize) -> String {
    let body = Random::new(id).text(body_bytes);
    world.sql(&format!("insert into items values ({id}, 1, 'r0wv4lue', '{body}')")).await;
    body
}

/// The dead letters of the stream by the id of their rows: parts are put together, and each has to be
/// there once and in order.
async fn in_stream(world: &World<'_>) -> BTreeMap<u64, Vec<Value>> {
    if world.s2.tail(BASIN, DEAD).await.is_err() {
        return BTreeMap::new();
    }
    let records = world.s2.read(BASIN, DEAD).await;
    let mut open: BTreeMap<String, String> = BTreeMap::new();
    let mut letters: BTreeMap<u64, Vec<Value>> = BTreeMap::new();
    let mut next: BTreeMap<String, usize> = BTreeMap::new();
    for record in data(&records) {
        assert!(record.metered_bytes() <= 1024 * 1024, "record {}", record.seq_num);
        assert_eq!(record.header("sb-dead-letter"), "oversize");
        let key = record.header("sb-key").to_owned();
        let (index, count) = record.header("sb-part").split_once('/').unwrap();
        let (index, count): (usize, usize) = (index.parse().unwrap(), count.parse().unwrap());
        let expected = next.entry(key.clone()).or_default();
        assert_eq!(index, *expected, "part of {key} as record {}", record.seq_num);
        *expected += 1;
        let text = open.entry(key.clone()).or_default();
        text.push_str(&record.body);
        if index + 1 == count {
            let letter: Value = serde_json::from_str(text).unwrap();
            assert_eq!(letter["dead_letter"]["key"], key);
            letters.entry(id(&letter)).or_default().push(letter);
        }
    }
    letters
}

/// The same of the file.
fn in_file(world: &World<'_>) -> BTreeMap<u64, Vec<Value>> {
    let path = world.path("dead.jsonl");
    let Ok(text) = std::fs::read_to_string(&path) else { return BTreeMap::new() };
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut letters: BTreeMap<u64, Vec<Value>> = BTreeMap::new();
    // The last line may be on its way.
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let letter: Value = serde_json::from_str(line).unwrap();
        letters.entry(id(&letter)).or_default().push(letter);
    }
    letters
}

fn id(letter: &Value) -> u64 {
    letter["change"]["new"]["id"].as_str().unwrap().parse().unwrap()
}

async fn letters(world: &World<'_>, place: &str) -> BTreeMap<u64, Vec<Value>> {
    if place == STREAM_PLACE { in_stream(world).await } else { in_file(world) }
}

async fn until_letters(world: &World<'_>, place: &str, count: usize) -> BTreeMap<u64, Vec<Value>> {
    until(&format!("{count} dead letters"), async || {
        let letters = letters(world, place).await;
        if letters.len() >= count { Ok(letters) } else { Err(letters.len().to_string()) }
    })
    .await
}

async fn until_status(world: &World<'_>, pointer: &str, expected: Value) -> Value {
    until(&format!("{pointer} to be {expected}"), async || {
        let status = world.status().await?;
        let found = status.pointer(pointer).cloned().unwrap_or_default();
        if found == expected { Ok(status) } else { Err(status.to_string()) }
    })
    .await
}

/// `id op` of the pipeline's own stream.
fn told(records: &[Record]) -> Vec<String> {
    records
        .iter()
        .map(|record| format!("{} {}", field(record, "id"), field(record, "op")))
        .collect()
}

async fn the_story(test: &str, place: &str) {
    let dir = tempfile::tempdir().unwrap();
    let world = world(test, dir.path(), 3, place, true).await;
    let running = world.start().ready().await;
    let body = insert(&world, 1, 3_000_000).await;
    world.sql("update items set op = 2 where id = 1").await;
    insert(&world, 2, 10).await;
    let letters = until_letters(&world, place, 1).await;
    let letter = &letters[&1][0];
    assert_eq!(letter["sluicebox_case"], 1);
    assert!(letter["change"]["new"]["body"] == body, "the row is as it was");
    let facts = &letter["dead_letter"];
    assert_eq!((&facts["class"], &facts["attempts"]), (&"oversize".into(), &3.into()), "{facts}");
    assert!(facts["reason"].as_str().unwrap().contains("largest in it: column `body`"), "{facts}");
    // Its group goes on behind it.
    let records = world.until_records(2).await;
    assert_eq!(told(&records), ["2 1", "1 2"]);
    world.until_no_messages().await;
    world.until_confirmed().await;

    let status = until_status(&world, "/dead_letters/written", 1.into()).await;
    assert_eq!(status["dead_letters"]["waiting"], 0, "{status}");
    let metrics = world.metrics().await.unwrap();
    assert!(metrics.contains("sluicebox_dead_letters_total 1\n"), "{metrics}");
    let list = world.json(&["messages", "list", "--state", "dead"]).await;
    assert_eq!(list["total"], 1, "{list:#}");
    let listed = &list["messages"][0];
    assert_eq!((&listed["state"], &listed["key"]["id"]), (&"dead".into(), &1.into()), "{list:#}");
    assert_eq!((&listed["attempts"], &listed["error"]["class"]), (&3.into(), &"oversize".into()));
    world.ok(&["check"]).await;
    // It is told from what is missing.
    world.ok(&["verify"]).await;

    // A letter is what `transforms test` takes.
    let saved = world.path("letter.json");
    std::fs::write(&saved, letter.to_string()).unwrap();
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let module = world.transforms().join("10-strip-columns.wasm");
    let (module, saved) = (module.to_str().unwrap(), saved.to_str().unwrap());
    world.ok(&["transforms", "test", module, "--messages", saved]).await;

    // Nothing of it is forgotten or begun again.
    running.kill().await;
    let running = world.start().ready().await;
    until_status(&world, "/dead_letters/written", 1.into()).await;
    insert(&world, 3, 10).await;
    world.until_records(3).await;
    assert_eq!(self::letters(&world, place).await[&1].len(), 1);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_failed_often_enough_becomes_a_dead_letter_in_a_stream() {
    the_story("dead_stream", STREAM_PLACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_failed_often_enough_becomes_a_dead_letter_in_a_file() {
    the_story("dead_file", FILE_PLACE).await;
}

/// Every third row is too large, by a little or by many batches.
async fn killed(test: &str, place: &str) {
    const ROWS: u64 = 90;
    let dir = tempfile::tempdir().unwrap();
    let world = world(test, dir.path(), 2, place, true).await;
    let mut random = Random::new(Random::seed());
    let mut running = world.start().ready().await;
    let large = |id: u64| id.is_multiple_of(3);
    for id in 1..=ROWS {
        let bytes = if !large(id) {
            100
        } else if id.is_multiple_of(9) {
            3_500_000
        } else {
            1_100_000
        };
        insert(&world, id, bytes).await;
        world.sql(&format!("update items set op = 2 where id = {id}")).await;
        if id.is_multiple_of(10) {
            tokio::time::sleep(Duration::from_millis(random.below(1_000))).await;
            running.kill().await;
            if id.is_multiple_of(30) {
                world.s2.kill().await;
                world.s2.up().await;
            }
            running = world.start();
        }
    }
    let letters = until_letters(&world, place, usize::try_from(ROWS / 3).unwrap()).await;
    world.until_no_messages().await;
    world.until_confirmed().await;
    running.stop().await;
    for (id, letters) in &letters {
        assert!(large(*id), "{id} became a dead letter");
        assert_eq!(letters.len(), 1, "copies of {id}");
    }
    let mut expected: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for id in 1..=ROWS {
        let ops = if large(id) { &["2"][..] } else { &["1", "2"] };
        expected.insert(id.to_string(), ops.iter().map(|op| (*op).to_owned()).collect());
    }
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for record in &world.records().await {
        found.entry(field(record, "id")).or_default().push(field(record, "op"));
    }
    assert_eq!(found, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_dead_letter_is_once_in_the_stream_whoever_is_killed() {
    killed("dead_killed_stream", STREAM_PLACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_dead_letter_is_once_in_the_file_whoever_is_killed() {
    killed("dead_killed_file", FILE_PLACE).await;
}

/// While letters cannot be handed on, messages stay parked and everything else goes on.
async fn away(test: &str, place: &str, word: &str, mend: impl AsyncFn(&World<'_>)) {
    let dir = tempfile::tempdir().unwrap();
    let world = world(test, dir.path(), 1, place, false).await;
    let running = world.start().ready().await;
    for id in [1, 2] {
        insert(&world, id, 1_100_000).await;
        world.sql(&format!("update items set op = 2 where id = {id}")).await;
    }
    insert(&world, 3, 10).await;
    world.until_records(1).await;
    world.until_confirmed().await;
    let status = until_status(&world, "/dead_letters/waiting", 2.into()).await;
    assert_eq!(status["dead_letters"]["written"], 0, "{status}");
    let status = until("the reason", async || {
        let status = world.status().await?;
        let reason = status["dead_letters"]["reason"].as_str().map(str::to_owned);
        reason.filter(|reason| reason.contains(word)).ok_or_else(|| status.to_string())?;
        Ok(status)
    })
    .await;
    let warnings = status["warnings"].to_string();
    assert!(warnings.contains("spent their attempts"), "{status}");
    assert_eq!(world.cli(&["check"]).await.status.code(), Some(1));
    for message in world.until_messages("failed", 2).await {
        assert_eq!(message["error"]["class"], "oversize", "{message}");
    }
    world.until_messages("waiting", 2).await;

    // Nothing of this is lost over a restart.
    running.kill().await;
    let running = world.start().ready().await;
    until_status(&world, "/dead_letters/waiting", 2.into()).await;
    mend(&world).await;
    let letters = until_letters(&world, place, 2).await;
    assert!(letters.values().all(|letters| letters.len() == 1), "{}", letters.len());
    let records = world.until_records(3).await;
    assert_eq!(told(&records)[0], "3 1");
    world.until_no_messages().await;
    until_status(&world, "/dead_letters/waiting", 0.into()).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_their_stream_is_missing_the_messages_stay_parked() {
    let mend = async |world: &World<'_>| world.s2.create_stream(BASIN, DEAD).await;
    away("dead_stream_away", STREAM_PLACE, "dead_letters.stream", mend).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_their_file_cannot_be_written_the_messages_stay_parked() {
    let mend = async |world: &World<'_>| {
        std::fs::create_dir(world.path("gone")).unwrap();
        // Where the others look for it.
        let (from, to) = (world.path("gone/dead.jsonl"), world.path("dead.jsonl"));
        std::os::unix::fs::symlink(from, to).unwrap();
    };
    away("dead_file_away", "file = \"gone/dead.jsonl\"", "gone/dead.jsonl", mend).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_to_be_handed_on_is_delivered_by_a_mended_chain() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("dead_mended", dir.path(), 1, STREAM_PLACE, false).await;
    let running = world.start().ready().await;
    insert(&world, 1, 1_100_000).await;
    until_status(&world, "/dead_letters/waiting", 1.into()).await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    world.until_records(1).await;
    world.until_no_messages().await;
    let status = until_status(&world, "/dead_letters/waiting", 0.into()).await;
    assert_eq!(status["dead_letters"]["written"], 0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_spends_no_attempts() {
    let dir = tempfile::tempdir().unwrap();
    let world = world("dead_outage", dir.path(), 1, STREAM_PLACE, false).await;
    world.s2.create_stream(BASIN, DEAD).await;
    // Rows go to streams that their labels name, of which one is missing.
    world.ok(&["transforms", "add", "route", "--set", "stream={column:label}"]).await;
    let mut running = world.start().ready().await;
    world.sql("insert into items values (1, 1, 'gone', 'x')").await;
    world.until_messages("failed", 1).await;
    world.s2.kill().await;
    running.unready("sink_").await;
    world.sql("insert into items values (2, 1, 'changes', 'x')").await;
    // The message of the missing stream is tried again and again.
    until("more attempts", async || {
        let list = world.messages(Some("failed")).await;
        if list[0]["attempts"].as_u64() >= Some(3) { Ok(()) } else { Err(list[0].to_string()) }
    })
    .await;
    world.s2.up().await;
    world.until_records(1).await;
    world.s2.create_stream(BASIN, "gone").await;
    world.until_no_messages().await;
    let status = world.status().await.unwrap();
    assert_eq!(status["dead_letters"]["written"], 0, "{status}");
    assert!(in_stream(&world).await.is_empty());
    running.stop().await;
}
