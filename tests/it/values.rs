//! Every type of Postgres with its extremes: what the message's JSON says of each value.
//!
//! The cluster's defaults for time zone, date style and the like are set to what nobody expects,
//! so that a value which is not pinned shows.

use std::collections::BTreeMap;

use serde_json::Value;
use serde_json::value::RawValue;

use crate::support::s2::Record;
use crate::support::world::World;

/// Type, SQL expression, and the JSON that it must become.
const VALUES: &[(&str, &str, &str)] = &[
    ("bool", "true", "true"),
    ("bool", "false", "false"),
    ("int2", "-32768", "-32768"),
    ("int4", "2147483647", "2147483647"),
    ("int8", "9223372036854775807", "9223372036854775807"),
    ("int8", "-9223372036854775808", "-9223372036854775808"),
    ("oid", "4294967295", "4294967295"),
    ("float4", "'1.17549435e-38'", "1.1754944e-38"),
    ("float8", "'1.7976931348623157e308'", "1.7976931348623157e308"),
    ("float8", "'0.1'", "0.1"),
    ("float8", "'5e-324'", "5e-324"),
    ("float8", "'NaN'", r#""NaN""#),
    ("float8", "'Infinity'", r#""Infinity""#),
    ("float4", "'-Infinity'", r#""-Infinity""#),
    (
        "numeric",
        "123456789012345678901234567890.123456789",
        r#""123456789012345678901234567890.123456789""#,
    ),
    ("numeric(10,2)", "5.9", r#""5.90""#),
    ("numeric", "'NaN'", r#""NaN""#),
    ("numeric", "'Infinity'", r#""Infinity""#),
    ("money", "'$1,234.50'", r#""$1,234.50""#),
    ("text", "''", r#""""#),
    (
        "text",
        "E'quote \" slash \\\\ tab \\t line \\n bell \\x07'",
        r#""quote \" slash \\ tab \t line \n bell \u0007""#,
    ),
    ("text", "'žluťoučký 🐎 \u{2028}'", "\"žluťoučký 🐎 \u{2028}\""),
    ("text", "'unchanged_toast'", r#""unchanged_toast""#),
    ("varchar(5)", "'abc'", r#""abc""#),
    ("char(5)", "'abc'", r#""abc  ""#),
    ("name", "'n'", r#""n""#),
    ("bytea", r"'\x00ff10'", r#""\\x00ff10""#),
    ("uuid", "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'", r#""a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11""#),
    ("date", "'2024-02-29'", r#""2024-02-29""#),
    ("date", "'infinity'", r#""infinity""#),
    ("date", "'0044-03-15 BC'", r#""0044-03-15 BC""#),
    ("time", "'24:00:00'", r#""24:00:00""#),
    ("time", "'12:34:56.789012'", r#""12:34:56.789012""#),
    ("timetz", "'12:34:56.5+05:30'", r#""12:34:56.5+05:30""#),
    ("timestamp", "'2025-06-11 01:19:22.402358'", r#""2025-06-11T01:19:22.402358""#),
    ("timestamp", "'-infinity'", r#""-infinity""#),
    ("timestamp", "'0001-01-01 00:00:00 BC'", r#""0001-01-01 00:00:00 BC""#),
    ("timestamptz", "'2025-06-11 01:19:22.402358+02'", r#""2025-06-10T23:19:22.402358Z""#),
    ("timestamptz", "'2025-01-01 00:00:00+00'", r#""2025-01-01T00:00:00.000000Z""#),
    ("timestamptz", "'infinity'", r#""infinity""#),
    (
        "interval",
        "'1 year 2 months 3 days 04:05:06.789'",
        r#"{"months":14,"days":3,"microseconds":14706789000}"#,
    ),
    ("interval", "'-1 days -00:00:00.000001'", r#"{"months":0,"days":-1,"microseconds":-1}"#),
    ("json", r#"'{"b": 1, "a": 1e400, "a": 2}'"#, r#"{"b": 1, "a": 1e400, "a": 2}"#),
    (
        "json",
        "'12345678901234567890.123456789012345678901'",
        "12345678901234567890.123456789012345678901",
    ),
    ("jsonb", r#"'{"b": [1, null, "x"], "a": {}}'"#, r#"{"a": {}, "b": [1, null, "x"]}"#),
    ("jsonb", "'null'", "null"),
    ("int4[]", "'{1,NULL,3}'", "[1,null,3]"),
    ("int4[]", "'{}'", "[]"),
    ("int4[]", "'{{1,2},{3,4}}'", "[[1,2],[3,4]]"),
    ("text[]", r#"ARRAY['NULL', NULL, 'a,b', 'q"q', '']"#, r#"["NULL",null,"a,b","q\"q",""]"#),
    ("int4[]", "'[2:3]={7,8}'", r#""[2:3]={7,8}""#),
    (
        "timestamptz[]",
        "ARRAY['2025-01-01 00:00:00+00'::timestamptz]",
        r#"["2025-01-01T00:00:00.000000Z"]"#,
    ),
    ("jsonb[]", r#"ARRAY['{"a": 1}'::jsonb]"#, r#"[{"a": 1}]"#),
    ("mood", "'so so'", r#""so so""#),
    ("mood[]", "ARRAY['so so'::mood]", r#"["so so"]"#),
    ("posint", "7", "7"),
    ("pair", "ROW(1, 'x, \"y\"')", r#"{"a":1,"b":"x, \"y\""}"#),
    ("pair", "ROW(NULL, '')", r#"{"a":null,"b":""}"#),
    ("int4range", "'[1,5]'", r#""[1,6)""#),
    ("daterange", "'[2010-01-01,2020-12-31)'", r#""[2010-01-01,2020-12-31)""#),
    ("inet", "'192.168.0.1/24'", r#""192.168.0.1/24""#),
    ("cidr", "'10.0.0.0/8'", r#""10.0.0.0/8""#),
    ("macaddr", "'08:00:2b:01:02:03'", r#""08:00:2b:01:02:03""#),
    ("point", "'(1.5,2)'", r#""(1.5,2)""#),
    ("bit(3)", "B'101'", r#""101""#),
    ("xml", "'<a>b</a>'", r#""<a>b</a>""#),
    ("tsvector", "'b a'", r#""'a' 'b'""#),
    ("pg_lsn", "'16/B374D848'", r#""16/B374D848""#),
];

#[derive(serde::Deserialize)]
struct Message {
    record: BTreeMap<String, Box<RawValue>>,
}

fn raw(record: &Record) -> BTreeMap<String, Box<RawValue>> {
    let message: Message = serde_json::from_str(&record.body).unwrap();
    message.record
}

/// The same JSON: numbers digit by digit where they are integers or too large to parse, everything
/// else by what it means.
fn same(actual: &str, expected: &str) -> bool {
    if actual == expected {
        return true;
    }
    let (actual, expected) = match (serde_json::from_str(actual), serde_json::from_str(expected)) {
        (Ok(actual), Ok(expected)) => (actual, expected),
        _ => return false,
    };
    match (&actual, &expected) {
        // Their texts differ.
        (Value::Number(_), Value::Number(number)) if !number.is_f64() => false,
        _ => actual == expected,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_and_its_extremes() {
    let mut columns = String::from("id bigint primary key");
    let mut values = String::from("1");
    for (number, (kind, sql, _)) in VALUES.iter().enumerate() {
        columns.push_str(&format!(", v{number} {kind}"));
        values.push_str(&format!(", {sql}"));
    }
    let nulls = ", null".repeat(VALUES.len());
    let world = World::new(
        "types",
        &format!(
            "create type mood as enum ('so so', 'fine'); create domain posint as int4; \
             create type pair as (a int4, b text); create table t ({columns});"
        ),
        &["public.t"],
    )
    .await;
    let running = world.start().ready().await;
    let insert = format!("insert into t values ({values}); insert into t values (2{nulls});");
    // What the server does to the literals must not depend on the cluster's odd defaults.
    world.sql(&format!("set datestyle = 'ISO, YMD'; {insert}")).await;
    let records = world.until_records(2).await;
    let (first, second) = (raw(&records[0]), raw(&records[1]));
    let mut wrong = Vec::new();
    for (number, (kind, sql, expected)) in VALUES.iter().enumerate() {
        let column = format!("v{number}");
        let actual = first.get(&column).map_or("(absent)", |value| value.get());
        if !same(actual, expected) {
            wrong.push(format!("{kind} {sql}: {actual} instead of {expected}"));
        }
        let null = second.get(&column).map_or("(absent)", |value| value.get());
        assert_eq!(null, "null", "{kind}: a NULL");
    }
    assert!(wrong.is_empty(), "{} values differ:\n{}", wrong.len(), wrong.join("\n"));

    let metadata = &serde_json::from_str::<BTreeMap<String, Box<RawValue>>>(&records[0].body)
        .unwrap()["metadata"];
    let metadata: Value = serde_json::from_str(metadata.get()).unwrap();
    let stamp = metadata["commit_timestamp"].as_str().unwrap();
    assert!(stamp.ends_with('Z') && stamp.len() == "2025-06-11T01:19:22.402358Z".len(), "{stamp}");
    assert_eq!(metadata["record_pks"], serde_json::json!(["1"]));
    assert_eq!(metadata["database_name"], world.database.name.as_str());
    // The record's time is the commit's.
    let millis = world
        .database
        .value(&format!("select floor(extract(epoch from timestamptz '{stamp}') * 1000)::int8"))
        .await;
    assert_eq!(millis, Some(records[0].timestamp.to_string()));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn untouched_large_values_are_left_out_and_named() {
    let world = World::new(
        "toast",
        "create table plain (id bigint primary key, n int, body text); \
         create table whole (id bigint primary key, n int, body text); \
         alter table plain alter body set storage external; \
         alter table whole alter body set storage external; \
         alter table whole replica identity full;",
        &["public.plain", "public.whole"],
    )
    .await;
    let running = world.start().ready().await;
    for table in ["plain", "whole"] {
        world
            .sql(&format!(
                "insert into {table} values (1, 1, 'r0wv4lue' || repeat('x', 9000)); \
                 update {table} set n = 2 where id = 1; \
                 update {table} set id = 5 where id = 1; \
                 delete from {table} where id = 5;"
            ))
            .await;
    }
    let records = world.until_records(8).await;
    let messages: Vec<Value> = records.iter().map(Record::json).collect();
    let body = format!("r0wv4lue{}", "x".repeat(9000));

    let [_, update, moved, delete] = &messages[..4] else { panic!("four messages") };
    assert_eq!(update["record"], serde_json::json!({ "id": 1, "n": 2 }));
    assert_eq!(update["metadata"]["unchanged_columns"], serde_json::json!(["body"]));
    assert_eq!(moved["record"], serde_json::json!({ "id": 5, "n": 2 }));
    assert_eq!(moved["changes"]["id"], 1, "the old key is kept: {moved}");
    assert_eq!(delete["record"], serde_json::json!({ "id": 5 }));

    let [_, update, moved, delete] = &messages[4..] else { panic!("four more") };
    assert_eq!(update["record"], serde_json::json!({ "id": 1, "n": 2, "body": body }));
    assert_eq!(update["changes"], serde_json::json!({ "n": 1 }));
    assert_eq!(moved["record"]["body"], body);
    assert_eq!(moved["changes"], serde_json::json!({ "id": 1 }));
    assert_eq!(delete["record"], serde_json::json!({ "id": 5, "n": 2, "body": body }));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_with_every_letter_and_tables_that_change() {
    let world = World::new(
        "names",
        r#"create schema "Odd Schema"; create table "Odd Schema"."T ""q"" ž" (
            "Id" bigint primary key, "col ""q"" ž" text);"#,
        &[r#""Odd Schema"."T ""q"" ž""#],
    )
    .await;
    let running = world.start().ready().await;
    let table = r#""Odd Schema"."T ""q"" ž""#;
    world.sql(&format!("insert into {table} values (1, 'r0wv4lue')")).await;
    world
        .sql(&format!(
            "begin; alter table {table} add extra int default 7; \
             insert into {table} values (2, 'r0wv4lue', 8); \
             alter table {table} drop \"col \"\"q\"\" ž\"; \
             insert into {table} values (3, 9); commit;"
        ))
        .await;
    let records = world.until_records(3).await;
    let rows: Vec<Value> = records.iter().map(|record| record.json()["record"].clone()).collect();
    let column = "col \"q\" ž";
    assert_eq!(rows[0], serde_json::json!({ "Id": 1, column: "r0wv4lue" }));
    assert_eq!(rows[1], serde_json::json!({ "Id": 2, column: "r0wv4lue", "extra": 8 }));
    assert_eq!(rows[2], serde_json::json!({ "Id": 3, "extra": 9 }));
    assert_eq!(records[0].json()["metadata"]["table_name"], "T \"q\" ž");
    running.stop().await;
}

/// The largest record that S2 takes passes, and one byte more is parked: the size that is told is
/// the size that S2 counts.
#[tokio::test(flavor = "multi_thread")]
async fn the_limit_is_exact() {
    let world =
        World::new("limit", "create table t (id bigint primary key, body text)", &["public.t"])
            .await;
    let running = world.start().ready().await;
    let insert =
        |id: u64, bytes: usize| format!("insert into t values ({id}, repeat('x', {bytes}))");
    world.sql(&insert(1, 1_000_000)).await;
    let first = world.until_records(1).await[0].clone();
    let room = 1_048_576 - first.metered_bytes();
    // Positions and times may take another number of digits: the exact size is searched for.
    let mut passed = 0;
    for id in 2..8 {
        world.sql(&insert(id, 1_000_000 + room - 6 + usize::try_from(id).unwrap())).await;
    }
    world.until_confirmed().await;
    let parked = world.messages(Some("parked")).await;
    for record in world.records().await {
        assert!(record.metered_bytes() <= 1_048_576);
        passed += 1;
    }
    assert_eq!(passed + parked.len(), 7);
    assert!(!parked.is_empty(), "one of them must be over the limit");
    for message in &parked {
        let bytes = message["bytes"].as_u64().unwrap();
        assert!(bytes > 1_048_576 && bytes < 1_048_576 + 64, "{bytes}");
    }
    running.stop().await;
}
