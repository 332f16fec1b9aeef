//! `sluicebox verify`: the comparison of a stream with its tables, while the pipeline runs.

use serde_json::Value;

use crate::support::oracle::{TABLES, Workload};
use crate::support::world::{BASIN, STREAM, World};
use crate::support::{ROW_MARK, signal};

/// Every form of key, beside the tables of the workload.
const MORE_TABLES: &str = "
    create table pair (a text, b uuid, body text, primary key (a, b));
    create table loose (n int, body text);
    alter table loose replica identity full;
    create table parts (id bigint primary key, v numeric) partition by range (id);
    create table gone (id int primary key, twice int generated always as (id * 2) stored);
    create table parts_low partition of parts for values from (0) to (100);
    create table parts_high partition of parts for values from (100) to (200);";

/// What the command prints, and its exit code.
async fn verify(world: &World<'_>, args: &[&str]) -> (Value, Option<i32>) {
    let output = world.cli(&[&["verify", "--json"], args].concat()).await;
    let text = String::from_utf8_lossy(&output.stdout);
    let report = serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error}\n{text}\n{}", String::from_utf8_lossy(&output.stderr))
    });
    (report, output.status.code())
}

#[track_caller]
fn assert_holds((report, code): &(Value, Option<i32>)) {
    assert_eq!((report["holds"].as_bool(), *code), (Some(true), Some(0)), "{report:#}");
}

/// The number of faults of a kind.
fn faults(report: &Value, fault: &str) -> u64 {
    let all = report["faults"].as_array().unwrap();
    let found = all.iter().find(|found| found["fault"] == fault);
    found.map_or(0, |found| found["count"].as_u64().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_compared_while_rows_change() {
    let tables = [
        "public.items",
        "public.ledger",
        "public.pair",
        "public.loose",
        "public.parts",
        "public.gone",
    ];
    let world = World::new("verify", &format!("{TABLES}{MORE_TABLES}"), &tables).await;
    let running = world.start().ready().await;
    let workload = Workload::new(world.database.url(), 2);
    let work = workload.start();
    world
        .sql(
            "insert into pair select 'k' || n, md5(n::text)::uuid, 'r0wv4lue' \
             from generate_series(1, 20) n; \
             update pair set a = 'moved' || a where a like 'k1%'; delete from pair where a = 'k2'; \
             insert into loose select n % 3, 'r0wv4lue' from generate_series(1, 20) n; \
             update loose set n = 9 where n = 1; delete from loose where n = 2; \
             insert into parts select n, n + 0.50 from generate_series(1, 150, 7) n; \
             update parts set id = id + 100 where id < 50; \
             delete from parts where id > 120; \
             insert into gone values (1), (2); truncate gone; insert into gone values (3);",
        )
        .await;
    work.commits(100).await;
    for _ in 0..2 {
        let found = verify(&world, &[]).await;
        assert_holds(&found);
        let compared = |table: &Value| table["compared"] == table["rows"];
        assert!(found.0["tables"].as_array().unwrap().iter().all(compared), "{:#}", found.0);
        assert!(found.0["tables"][1]["rows"].as_u64().unwrap() > 100, "{:#}", found.0);
    }
    work.stop().await;
    let text = world.ok(&["verify", "--table", "pair", "--table", "loose"]).await;
    assert!(text.contains("rows of public.pair") && !text.contains("public.items"), "{text}");
    assert!(!text.contains(ROW_MARK), "no values unless they are asked for: {text}");
    let usage = world.cli(&["verify", "--table", "public.other"]).await;
    assert_eq!(usage.status.code(), Some(2), "{}", String::from_utf8_lossy(&usage.stderr));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_named_and_what_is_parked_is_not_lost() {
    let world = World::new("verify_faults", TABLES, &["public.items"]).await;
    world.sql("insert into items values (0, 0, 'r0wv4lue', 'older than the slot')").await;
    let running = world.start().ready().await;
    world
        .sql(
            "insert into items select n, n, 'r0wv4lue', 'r0wv4lue' from generate_series(1, 9) n; \
             insert into items values (10, 10, 'r0wv4lue', repeat('r0wv4lue', 200000)); \
             update items set id = 110 where id = 10; \
             insert into items values (11, 11, 'r0wv4lue', repeat('r0wv4lue', 200000));",
        )
        .await;
    world.until_messages("parked", 2).await;
    let (report, code) = verify(&world, &[]).await;
    assert_eq!((faults(&report, "missing"), code), (1, Some(1)), "row 0: {report:#}");
    let found = verify(&world, &["--allow-older"]).await;
    assert_holds(&found);
    let table = &found.0["tables"][0];
    assert_eq!((&table["held"], &table["unmentioned"]), (&2.into(), &1.into()), "{table:#}");

    // What an operator gave up is named as that, and is not lost unseen.
    let parked = world.messages(Some("parked")).await;
    let second = parked.iter().find(|message| message["key"]["id"] == 11).unwrap();
    world.ok(&["messages", "ack", second["id"].as_str().unwrap()]).await;
    let found = verify(&world, &["--allow-older"]).await;
    assert_holds(&found);
    assert_eq!(found.0["tables"][0]["given_up"], 1, "{:#}", found.0);
    let text = world.ok(&["verify", "--allow-older"]).await;
    assert!(text.contains("a change was given up"), "{text}");
    world.sql("delete from items where id = 0; update items set op = 12 where id = 11").await;
    let (report, code) = verify(&world, &[]).await;
    assert_eq!((faults(&report, "missing"), code), (1, Some(1)), "{report:#}");
    let named = report["faults"].to_string();
    assert!(named.contains("public.items id=0") && !named.contains("id=11"), "{report:#}");

    // A record that comes again.
    let records = world.records().await;
    let third = records.iter().find(|record| record.json()["record"]["id"] == 3).unwrap();
    world.s2.append_again(BASIN, STREAM, third).await;
    let (report, code) = verify(&world, &["--allow-older"]).await;
    assert_eq!((faults(&report, "doubled"), code), (1, Some(1)), "{report:#}");
    // The range before it has no fault; there the tables are not looked at.
    let last = records.last().unwrap().seq_num.to_string();
    let (report, code) = verify(&world, &["--allow-older", "--to", &last]).await;
    assert_eq!((code, report["moment"].is_null()), (Some(0), true), "{report:#}");
    let (report, _) = verify(&world, &["--from", &last]).await;
    assert_eq!(faults(&report, "missing"), 0, "older than the range: {report:#}");
    // Postgres sends nothing, so that nothing more is confirmed.
    let slot = &world.settings.slot;
    let sender = format!("select active_pid from pg_replication_slots where slot_name = '{slot}'");
    let sender: u32 = world.database.value(&sender).await.unwrap().parse().unwrap();
    signal("STOP", &[sender]);
    world.sql("update items set op = 13 where id = 1").await;
    let behind = world.cli(&["verify", "--wait", "1"]).await;
    signal("CONT", &[sender]);
    assert_eq!(behind.status.code(), Some(1));
    let text = String::from_utf8_lossy(&behind.stderr);
    assert!(text.contains("has not passed") && text.contains("sluicebox check"), "{text}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_that_stands_still_is_judged_by_what_the_slot_still_has() {
    let tables = ["public.items", "public.pair", "public.loose", "public.gone"];
    let world = World::new("verify_stopped", &format!("{TABLES}{MORE_TABLES}"), &tables).await;
    let running = world.start().ready().await;
    world
        .sql(
            "insert into items select n, n, 'r0wv4lue', 'r0wv4lue' from generate_series(1, 9) n; \
             insert into items values (10, 10, 'r0wv4lue', repeat('r0wv4lue', 200000)); \
             update items set id = 110 where id = 10; \
             insert into pair select 'k' || n, md5(n::text)::uuid, 'r0wv4lue' \
             from generate_series(1, 5) n; \
             insert into gone values (1), (2);",
        )
        .await;
    world.until_messages("parked", 1).await;
    world.until_confirmed().await;
    running.stop().await;
    // What was parked and what waits behind it is held: two keys of one row.
    let found = verify(&world, &[]).await;
    assert_holds(&found);
    assert_eq!(found.0["tables"][0]["held"], 1, "{:#}", found.0);

    world
        .sql(
            "update items set op = 13 where id = 1; delete from items where id = 2; \
             insert into items values (11, 11, 'r0wv4lue', 'r0wv4lue'); \
             update items set id = 103 where id = 3; \
             update pair set a = 'moved' where a = 'k1'; \
             insert into loose values (1, 'r0wv4lue'); truncate gone; insert into gone values (3);",
        )
        .await;
    let found = verify(&world, &[]).await;
    assert_holds(&found);
    let held: Vec<_> = found.0["tables"].as_array().unwrap().iter().map(|t| &t["held"]).collect();
    // 1, 2, 11, 3 and 103, beside the parked one; the row that moved, in both places; the whole table.
    assert_eq!(held, [6, 2, 1, 3], "{:#}", found.0);
    // It was looked at, and not taken.
    world.s2.append_again(BASIN, STREAM, &world.records().await[4]).await;
    let (report, code) = verify(&world, &[]).await;
    assert_eq!((faults(&report, "doubled"), code), (1, Some(1)), "{report:#}");
    let running = world.start().ready().await;
    world.until_confirmed().await;
    let (report, _) = verify(&world, &[]).await;
    assert_eq!(report["tables"][0]["held"], 1, "{report:#}");
    assert_eq!(report["faults"].as_array().unwrap().len(), 1, "{report:#}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_messages_were_routed_to_are_compared_as_one() {
    let mut world = World::new("verify_routed", TABLES, &["public.items"]).await;
    world.home.settings.sink = "create = true\n".to_owned();
    world.home.write_config();
    world.ok(&["transforms", "add", "route", "--set", "stream=cdc/{action}"]).await;
    let running = world.start().ready().await;
    let work = Workload::new(world.database.url(), 2).start();
    work.commits(60).await;
    let found = verify(&world, &[]).await;
    assert_holds(&found);
    let names = |report: &Value| -> Vec<String> {
        let streams = report["streams"].as_array().unwrap().iter();
        streams.map(|stream| stream["name"].as_str().unwrap().to_owned()).collect()
    };
    let all = [STREAM, "cdc/delete", "cdc/insert", "cdc/update"];
    assert_eq!(names(&found.0), all);
    work.stop().await;
    world.until_confirmed().await;
    running.stop().await;
    // The store knows them while nothing runs, too.
    let found = verify(&world, &[]).await;
    assert_holds(&found);
    assert_eq!(names(&found.0), all);
    let text = world.ok(&["verify"]).await;
    assert!(text.contains("of stream `cdc/insert`, from 0 to"), "{text}");

    let (report, code) = verify(&world, &["--stream", "cdc/update"]).await;
    assert!(faults(&report, "missing") > 0 && code == Some(1), "{report:#}");
    let range = ["--stream", "cdc/update", "--from", "0", "--to", "9"];
    let (report, code) = verify(&world, &range).await;
    assert_eq!(
        (code, report["records"].as_u64()),
        (Some(0), Some(8)),
        "one is a fence: {report:#}"
    );
    let two = ["verify", "--stream", "cdc/update", "--stream", "cdc/insert", "--from", "1"];
    let usage = world.cli(&two).await;
    assert_eq!(usage.status.code(), Some(2), "{}", String::from_utf8_lossy(&usage.stderr));

    // The same change in two of them.
    let inserted = world.s2.read(BASIN, "cdc/insert").await;
    world.s2.append_again(BASIN, "cdc/update", inserted.last().unwrap()).await;
    let (report, code) = verify(&world, &[]).await;
    assert_eq!((faults(&report, "doubled"), code), (1, Some(1)), "{report:#}");
    assert!(report["faults"].to_string().contains("of `cdc/update`"), "{report:#}");
    world.s2.delete_stream(BASIN, "cdc/insert").await;
    let (report, code) = verify(&world, &[]).await;
    assert!(faults(&report, "missing") > 0 && code == Some(1), "{report:#}");
}

/// The first comparison begins where nothing was routed yet, the second where some streams are known.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_come_up_while_they_are_compared_are_compared_too() {
    let mut world = World::new("verify_new_streams", TABLES, &["public.items"]).await;
    world.home.settings.sink = "create = true\n".to_owned();
    world.home.write_config();
    world.ok(&["transforms", "add", "route", "--set", "stream=cdc/{column:label}"]).await;
    let running = world.start().ready().await;
    for round in 1..=2 {
        // A stream for each row, the whole time.
        let rows = async {
            for id in 1.. {
                let id = round * 1000 + id;
                let row = format!("insert into items values ({id}, {id}, 'l{id}', 'r0wv4lue')");
                world.sql(&row).await;
            }
        };
        let found = tokio::select! {
            () = rows => unreachable!(),
            found = verify(&world, &[]) => found,
        };
        assert_holds(&found);
        let table = &found.0["tables"][0];
        assert!(
            table["rows"].as_u64() > Some(3) && table["compared"] == table["rows"],
            "{table:#}"
        );
        let streams = found.0["streams"].as_array().unwrap().len() as u64;
        assert!(streams > table["rows"].as_u64().unwrap(), "{streams}: {table:#}");
    }
    world.until_confirmed().await;
    running.stop().await;
    let twice = world.s2.read(BASIN, "cdc/l1002").await;
    world.s2.append_again(BASIN, "cdc/l1003", twice.last().unwrap()).await;
    let output = world.cli(&["verify"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    let named: Vec<&str> = text.lines().filter(|line| line.contains("stream `")).collect();
    assert_eq!(named.len(), 1, "{text}");
    assert!(named[0].contains("`cdc/l1003`") && named[0].contains("1 of the faults"), "{text}");
    assert!(text.contains("streams without a fault of their own"), "{text}");
}

/// The layout that people read, and what `--help` says of it.
#[tokio::test(flavor = "multi_thread")]
async fn the_verdict_is_laid_out_as_the_help_says() {
    let world = World::new("verify_text", TABLES, &["public.items"]).await;
    let running = world.start().ready().await;
    world.sql("insert into items select n, n, 'r0wv4lue', 'b' from generate_series(1, 9) n").await;
    let text = world.ok(&["verify"]).await;
    let lines: Vec<&str> = text.lines().collect();
    let expected = [
        "ok          0 missing from the stream",
        "ok          0 in the stream twice",
        "ok          0 out of order within a group",
        "ok          0 over S2's limit of a record",
        "ok          0 different from the table",
        "ok          0 not as Sluicebox writes records",
    ];
    assert_eq!(lines[..6], expected, "{text}");
    assert!(lines[6].contains("9 records read, the largest of"), "{text}");
    assert!(lines[7].trim_start().starts_with("of stream `changes`, from 0 to 10"), "{text}");
    assert!(lines[8].contains("the tables as they were at 0/"), "{text}");
    assert!(
        lines[9].contains("9 rows of public.items, 9 of them the same, in 36 values"),
        "{text}"
    );
    assert_eq!(lines.len(), 10, "{text}");
    let record = &world.records().await[2];
    world.s2.append_again(BASIN, STREAM, record).await;
    let output = world.cli(&["verify"]).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[1], "NO          1 in the stream twice");
    assert!(lines[2].starts_with("              record 10: sb-key "), "{text}");
    let help = world.ok(&["verify", "--help"]).await;
    for word in ["`ok` in front", "NO", "Exit codes: 0", "1 it does not", "2 wrong usage"] {
        assert!(help.contains(word), "`{word}` is not in {help}");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_that_a_transform_alters_are_told_and_left_out() {
    let world = World::new("verify_altered", TABLES, &["public.items"]).await;
    let running = world.start().ready().await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    world.until_transform("10-strip-columns.wasm", "live").await;
    world
        .sql("insert into items select n, n, 'r0wv4lue', 'r0wv4lue' from generate_series(1, 9) n")
        .await;
    let found = verify(&world, &[]).await;
    assert_holds(&found);
    assert_eq!(found.0["tables"][0]["altered"], 9);
    // Nobody says why the stream has not what the table has.
    world.sql("alter table items add column late text default 'r0wv4lue'").await;
    let (report, code) = verify(&world, &[]).await;
    assert_eq!((faults(&report, "different"), code), (9, Some(1)), "{report:#}");
    assert_eq!(report["tables"][0]["columns"]["late"], 9, "{report:#}");
    assert_holds(&verify(&world, &["--ignore-column", "items.late"]).await);
    let text = world.cli(&["verify", "--show-values", "--table", "items"]).await;
    assert!(String::from_utf8_lossy(&text.stdout).contains(ROW_MARK));
    let usage = world.cli(&["verify", "--ignore-column", "odd"]).await;
    assert_eq!(usage.status.code(), Some(2), "{}", String::from_utf8_lossy(&usage.stderr));
    running.stop().await;
}

/// Nobody writes down what was dropped; the modules that are live are tried on what is not there.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_transform_drops_is_told_from_what_is_missing() {
    let sql = format!("{TABLES}{MORE_TABLES}");
    let world = World::new("verify_drops", &sql, &["public.items", "public.pair"]).await;
    let filter = "drop=[{column=\"label\",starts_with=\"r0wv4lue hidden\"}]";
    world.ok(&["transforms", "add", "filter", "--set", filter]).await;
    let running = world.start().ready().await;
    world
        .sql(
            "insert into items select n, n, 'r0wv4lue', 'b' from generate_series(1, 6) n; \
             insert into items values (7, 7, 'r0wv4lue hidden', 'b'), (8, 8, 'r0wv4lue hidden', 'b'); \
             update items set label = 'r0wv4lue hidden', op = 9 where id = 1; \
             insert into pair values ('k', md5('k')::uuid, 'r0wv4lue');",
        )
        .await;
    let found = verify(&world, &[]).await;
    assert_holds(&found);
    let table = &found.0["tables"][0];
    // 7 and 8, which never came, and 1, which the stream has as it was before.
    assert_eq!(table["dropped"], serde_json::json!({"10-filter.wasm": 3}), "{table:#}");
    assert_eq!((&table["rows"], &table["compared"]), (&8.into(), &5.into()), "{table:#}");
    let text = world.ok(&["verify"]).await;
    assert!(text.contains("3   rows that `10-filter.wasm`, as it is now, drops"), "{text}");
    // It is let through from now on; that its insert was dropped only an operator can know.
    world.sql("update items set label = 'r0wv4lue', op = 10 where id = 8").await;
    let (report, code) = verify(&world, &[]).await;
    assert_eq!((faults(&report, "missing"), code), (1, Some(1)), "{report:#}");
    assert!(report["faults"].to_string().contains("--allow-older"), "{report:#}");
    world.until_confirmed().await;
    running.stop().await;
    let found = verify(&world, &["--allow-older"]).await;
    assert_holds(&found);
    assert_eq!(found.0["tables"][0]["dropped"]["10-filter.wasm"], 2, "{:#}", found.0);

    // What was committed while nobody watched is missing, and no transform is blamed for it.
    let slot = &world.settings.slot;
    world
        .sql(
            "insert into items values (9, 9, 'r0wv4lue', 'b'); \
             insert into items values (10, 10, 'r0wv4lue hidden', 'b'); \
             update items set op = 11 where id = 2; delete from items where id = 3;",
        )
        .await;
    let advance = format!("select pg_replication_slot_advance('{slot}', pg_current_wal_lsn())");
    world.sql(&advance).await;
    let (report, code) = verify(&world, &[]).await;
    let (missing, different) = (faults(&report, "missing"), faults(&report, "different"));
    assert_eq!((missing, different, code), (2, 2, Some(1)), "{report:#}");
    assert_eq!(report["tables"][0]["dropped"]["10-filter.wasm"], 3, "{report:#}");
    let named = report["faults"].to_string();
    assert!(named.contains("id=9") && !named.contains("id=10"), "{report:#}");

    // Modules that cannot be asked are said, and hide nothing.
    let live = world.path("state/last-good-transforms");
    for entry in std::fs::read_dir(&live).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none() {
            std::fs::write(path, "no module").unwrap();
        }
    }
    let output = world.cli(&["verify"]).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("counts as missing") && text.contains("10-filter.wasm"), "{text}");
}
