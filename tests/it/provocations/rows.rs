//! Tables and rows as Postgres allows them to be.

use serde_json::Value;

use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn names_are_taken_letter_for_letter() {
    let mut world = World::new(
        "letters",
        r#"create schema "My.Schema";
           create table "My.Schema"."Ta""ble" ("Ïd Col" bigint primary key, "select" text);"#,
        &[],
    )
    .await;
    world.home.settings.tables = vec![r#""My.Schema"."Ta""ble""#.to_owned()];
    world.home.settings.publication = "My Pub".to_owned();
    world.home.write_config();
    let running = world.start().ready().await;
    world.sql(r#"insert into "My.Schema"."Ta""ble" values (1, 'r0wv4lue')"#).await;
    let records = world.until_records(1).await;
    assert_eq!(records[0].header("sb-table"), r#"My.Schema.Ta"ble"#);
    assert_eq!(records[0].json()["record"]["Ïd Col"], 1);
    world.ok(&["verify"]).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_change_is_read_by_the_tables_shape_of_its_time() {
    let world =
        World::new("ddl", "create table t (id bigint primary key, a text);", &["public.t"]).await;
    let running = world.start().ready().await;
    world
        .sql(
            "insert into t values (1, 'r0wv4lue');
             begin; insert into t values (2, 'r0wv4lue'); alter table t add column b int;
               insert into t values (3, 'r0wv4lue', 7); alter table t drop column a;
               insert into t values (4, 8); commit;
             alter table t rename column b to c; insert into t values (5, 9);
             alter table t alter column c type text using 'r0wv4lue';
             insert into t values (6, 'r0wv4lue');",
        )
        .await;
    let records = world.until_records(6).await;
    let columns = |record: &Value| -> Vec<String> {
        record["record"].as_object().unwrap().keys().cloned().collect()
    };
    let found: Vec<_> = records.iter().map(|record| columns(&record.json()).join(" ")).collect();
    assert_eq!(found, ["id a", "id a", "id a b", "id b", "id c", "id c"].map(sorted));
    assert_eq!(records[3].json()["record"]["b"], 8);
    assert_eq!(records[5].json()["record"]["c"], "r0wv4lue");

    // Another table of the same name.
    world
        .sql(
            "drop table t; create table t (id text primary key, z int[]);
             alter publication sluicebox add table t; insert into t values ('r0wv4lue', '{1,2}');",
        )
        .await;
    let records = world.until_records(7).await;
    assert_eq!(records[6].json()["record"]["z"], serde_json::json!([1, 2]));
    running.stop().await;
}

fn sorted(names: &str) -> String {
    let mut names: Vec<_> = names.split(' ').collect();
    names.sort_unstable();
    names.join(" ")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_crosses_a_filter_is_born_or_dies() {
    let tables = "create table t (id bigint primary key, open bool not null, secret text);
        alter table t replica identity full;
        create table few (id bigint primary key, shown text, secret text);
        create publication sluicebox
          for table t where (open), few (id, shown) with (publish_via_partition_root = true);";
    let world = World::new("filters", tables, &["public.t", "public.few"]).await;
    let running = world.start().ready().await;
    world
        .sql(
            "insert into t values (1, true, 'r0wv4lue'), (2, false, 'r0wv4lue');
             update t set open = not open; update t set secret = 'r0wv4lue 2';
             insert into few values (1, 'r0wv4lue', 'r0wv4lue');
             update few set secret = 'r0wv4lue 3';",
        )
        .await;
    // Row 1 born, dead; row 2 born, changed; the other table's row twice.
    let records = world.until_records(6).await;
    let found: Vec<_> = records
        .iter()
        .map(|record| {
            (record.header("sb-action").to_owned(), record.json()["record"]["id"].clone())
        })
        .collect();
    let is = |action: &str, id: u64| found.contains(&(action.to_owned(), id.into()));
    assert!(is("insert", 1) && is("delete", 1) && is("insert", 2), "{found:?}");
    let few = records.iter().filter(|record| record.header("sb-table") == "public.few");
    assert!(few.into_iter().all(|record| record.json()["record"].get("secret").is_none()));
    world.ok(&["verify"]).await;
    running.stop().await;
}
