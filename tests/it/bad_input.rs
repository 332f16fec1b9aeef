//! What people get wrong. Each mistake gets one message that names the thing and the mend, with
//! the exit code that scripts rely on: 2 for usage and configuration, 1 for what is not so.

use std::process::Output;

use crate::support::postgres::{Cluster, Database, USER};
use crate::support::s2::Server;
use crate::support::sluicebox::{Home, Settings};
use crate::support::until;
use crate::support::world::{BASIN, STREAM, World, settings};

const TABLE: &str = "create table t (id bigint primary key, body text);";

/// A configuration that names servers which nobody runs: for mistakes that are found before any
/// server is asked.
fn nowhere() -> Settings {
    Settings {
        url: "postgres://postgres:pg-s3cret-p4ss@127.0.0.1:1/nowhere?sslmode=disable".to_owned(),
        slot: "nowhere".to_owned(),
        publication: "nowhere".to_owned(),
        tables: vec!["public.t".to_owned()],
        token: "access_token = \"s2-t0ken-s3cret\"".to_owned(),
        endpoint: "http://127.0.0.1:1".to_owned(),
        basin: BASIN.to_owned(),
        stream: STREAM.to_owned(),
        transforms: "transforms".to_owned(),
        state: "state".to_owned(),
        sink: String::new(),
        sections: String::new(),
    }
}

fn text_of(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

/// The text names these things, and shows nothing of Rust.
#[track_caller]
fn assert_names(text: &str, parts: &[&str]) {
    let lower = text.to_lowercase();
    for part in parts {
        assert!(lower.contains(&part.to_lowercase()), "`{part}` is not in:\n{text}");
    }
    for sign in ["Error {", "Error(", "Some(", "Err(", "Kind(", " Db(", "panicked", "unwrap()"] {
        assert!(!text.contains(sign), "`{sign}` is in:\n{text}");
    }
}

/// `run` and `check` both refuse the configuration at once with exit code 2 and the same text.
async fn refused(settings: Settings, parts: &[&str]) {
    let home = Home::new(settings);
    for command in ["run", "check"] {
        let output = home.cli(&[command]).await;
        let text = text_of(&output);
        assert_eq!(output.status.code(), Some(2), "`sluicebox {command}` with {parts:?}:\n{text}");
        assert_names(&text, parts);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_says_nothing_sensible_is_refused() {
    let with = |change: &dyn Fn(&mut Settings)| {
        let mut settings = nowhere();
        change(&mut settings);
        settings
    };
    let cases: Vec<(Settings, Vec<&str>)> = vec![
        (with(&|s| s.sink = "bucket = \"x\"".to_owned()), vec!["bucket", "sluicebox.toml"]),
        (with(&|s| s.sections = "[sorce]\nurl = \"x\"".to_owned()), vec!["sorce"]),
        (with(&|s| s.sink = "create = \"yes\"".to_owned()), vec!["create"]),
        (with(&|s| s.sections = "[oops".to_owned()), vec!["sluicebox.toml"]),
        (
            with(&|s| s.url = "${SLUICEBOX_NO_SUCH_VARIABLE}".to_owned()),
            vec!["SLUICEBOX_NO_SUCH_VARIABLE"],
        ),
        (with(&|s| s.url = "mysql://root:pg-s3cret-p4ss@h/db".to_owned()), vec!["url", "postgres"]),
        (with(&|s| s.url = "not a url".to_owned()), vec!["url"]),
        (with(&|s| s.basin = "short".to_owned()), vec!["basin", "8", "48"]),
        (with(&|s| s.basin = "Upper-Case-Basin".to_owned()), vec!["basin"]),
        (with(&|s| s.basin = "a".repeat(49)), vec!["basin", "48"]),
        (with(&|s| s.stream = String::new()), vec!["stream"]),
        (with(&|s| s.endpoint = "ftp://127.0.0.1".to_owned()), vec!["endpoint", "http"]),
        (with(&|s| s.slot = "My-Slot".to_owned()), vec!["slot"]),
        (with(&|s| s.tables.clear()), vec!["tables"]),
    ];
    for (settings, parts) in cases {
        refused(settings, &parts).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_is_told_with_code_2() {
    let home = Home::new(nowhere());
    for args in [
        &["frobnicate"][..],
        &["run", "--frobnicate"],
        &["messages"],
        &["messages", "retry"],
        &["messages", "list", "--state", "sideways"],
        &["transforms", "add", "strip-colums", "--column", "x"],
    ] {
        let output = home.cli(args).await;
        let text = text_of(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}:\n{text}");
        assert!(output.stdout.is_empty(), "{args:?} printed on stdout:\n{text}");
        assert_names(&text, &[]);
    }
    std::fs::remove_file(home.path("sluicebox.toml")).unwrap();
    for command in ["run", "check"] {
        let output = home.cli(&[command]).await;
        assert_eq!(output.status.code(), Some(2), "{command}: {}", text_of(&output));
        assert_names(&text_of(&output), &["sluicebox.toml", "-c"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_does_not_exist_is_named() {
    let database = Cluster::shared().await.database("no_folder").await;
    database.run(TABLE).await;
    let s2 = Server::in_memory().await;
    s2.create_basin(BASIN).await;
    s2.create_stream(BASIN, STREAM).await;
    let mut settings = settings(&database, &s2.endpoint(), &["public.t"]);
    settings.transforms = "no-such-folder".to_owned();
    let home = Home::new(settings);
    let check = home.cli(&["check"]).await;
    assert_ne!(check.status.code(), Some(0));
    assert_names(&text_of(&check), &["no-such-folder", "mkdir"]);
    let run = home.start();
    let status = run.ended().await;
    assert!(matches!(status.code(), Some(1 | 2)), "{status}");
    assert_names(&home.log(), &["no-such-folder"]);
}

/// A database with the table, a running S2 with basin and stream, and a folder for both.
async fn good(test: &str) -> World<'static> {
    World::new(test, TABLE, &["public.t"]).await
}

/// `check` exits with 1 and names these things.
async fn check_names(home: &Home, parts: &[&str]) {
    let output = home.cli(&["check"]).await;
    let text = text_of(&output);
    assert_eq!(output.status.code(), Some(1), "`check` on {parts:?}:\n{text}");
    home.look_through("`check`", &text);
    assert_names(&text, parts);
}

/// `run` waits, says this code and these words in `/readyz`, and still lives.
async fn run_waits(home: &Home, code: &str, parts: &[&str]) {
    let mut running = home.start();
    let text = running.unready(code).await;
    assert_names(&text, parts);
    home.look_through("/readyz", &text);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_hosts_are_named_and_awaited() {
    let mut world = good("unreachable").await;
    let endpoint =
        std::mem::replace(&mut world.home.settings.endpoint, "http://127.0.0.1:9".to_owned());
    world.home.write_config();
    check_names(&world, &["127.0.0.1:9"]).await;
    run_waits(&world, "sink_unreachable", &["127.0.0.1:9"]).await;

    world.home.settings.endpoint = endpoint;
    world.home.settings.url = "postgres://tester:pg-s3cret-p4ss@127.0.0.1:9/x".to_owned();
    world.home.write_config();
    check_names(&world, &["127.0.0.1:9"]).await;
    run_waits(&world, "source_unreachable", &["127.0.0.1:9"]).await;

    world.home.settings.url = "postgres://tester:pg-s3cret-p4ss@no-such-host.invalid/x".to_owned();
    world.home.write_config();
    check_names(&world, &["no-such-host.invalid"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_and_databases_are_named() {
    let mut world = good("credentials").await;
    world.home.secret("wr0ng-p4ss");
    let cluster = world.database.cluster;
    let database = world.database.name.clone();
    for (url, parts) in [
        (cluster.url_as(USER, "wr0ng-p4ss", &database), vec!["password", USER]),
        (cluster.url("no_such_database"), vec!["no_such_database"]),
        (cluster.url_as("nobody_here", "x", &database), vec!["nobody_here"]),
    ] {
        world.home.settings.url = url;
        world.home.write_config();
        check_names(&world, &parts).await;
        // Whether it waits or ends is its own affair; it says the same, and is never ready.
        let running = world.start();
        until("`run` to say it", async || {
            let log = world.log().to_lowercase();
            if log.contains(&parts[0].to_lowercase()) { Ok(()) } else { Err(log) }
        })
        .await;
        assert_names(&world.log(), &parts);
        assert!(!world.readyz().await.is_ok_and(|body| body["ready"] == true));
        drop(running);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_logical_replication_is_told_how_to_get_it() {
    let cluster = Cluster::start(&[("wal_level", "replica")]).await;
    let database = cluster.database("wal_level").await;
    let world = World::of(database, Server::in_memory().await, TABLE, &["public.t"]).await;
    check_names(&world, &["wal_level", "logical", "restart"]).await;
    let _running = world.start();
    until("`run` to name it", async || {
        let log = world.log();
        if log.contains("wal_level") { Ok(()) } else { Err(log) }
    })
    .await;
    assert_names(&world.log(), &["wal_level"]);
}

/// To publish such a table would make the user's own updates fail: it is refused before that.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_replica_identity_is_refused_before_it_is_published() {
    let world = World::new(
        "identity",
        "create table good (id bigint primary key); create table bare (body text);",
        &["public.good", "public.bare"],
    )
    .await;
    check_names(&world, &["public.bare", "replica identity"]).await;
    let _running = world.start();
    until("`run` to name the table", async || {
        let log = world.log();
        if log.contains("public.bare") { Ok(()) } else { Err(log) }
    })
    .await;
    assert_names(&world.log(), &["public.bare", "replica identity"]);
    world.sql("insert into bare values ('r0wv4lue'); update bare set body = 'r0wv4lue 2'").await;
    let published = world.database.value("select count(*) from pg_publication_tables").await;
    assert_eq!(published.as_deref(), Some("0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_does_not_exist_is_named() {
    let mut world = good("no_table").await;
    world.home.settings.tables = vec!["public.t".to_owned(), "public.typo".to_owned()];
    world.home.write_config();
    check_names(&world, &["public.typo"]).await;
    let _running = world.start();
    until("`run` to name the table", async || {
        let log = world.log();
        if log.contains("public.typo") { Ok(()) } else { Err(log) }
    })
    .await;
}

/// A role that may read but not replicate: `check` says which privileges are missing.
#[tokio::test(flavor = "multi_thread")]
async fn missing_privileges_are_named() {
    let mut world = good("privileges").await;
    let role = format!("plain_{}", world.database.name);
    world.sql(&format!("create role {role} login password 'pg-s3cret-p4ss'")).await;
    let url = world.database.cluster.url_as(&role, "pg-s3cret-p4ss", &world.database.name);
    world.home.settings.url = url;
    world.home.write_config();
    let alter = format!("ALTER ROLE \"{role}\" REPLICATION");
    check_names(&world, &["replication", &role, &alter]).await;
    let text = text_of(&world.cli(&["check"]).await);
    assert!(!text.contains("sluicebox check"), "it sends nobody in a circle:\n{text}");

    // It may replicate now, and still not publish what is not its own; `run` says the same.
    world.sql(&format!("alter role {role} replication")).await;
    let create = "CREATE PUBLICATION \"sluicebox\" FOR TABLE \"public\".\"t\"";
    let grant = format!("GRANT SELECT ON \"public\".\"t\" TO \"{role}\"");
    check_names(&world, &["cannot create it", create, &grant]).await;
    run_waits(&world, "source_privilege", &[&role, create]).await;
    world.sql("create publication sluicebox for table t").await;
    let running = world.start().ready().await;
    world.sql("insert into t values (1, 'r0wv4lue')").await;
    world.until_records(1).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_other_letters_is_told_the_right_one() {
    let mut world = good("letters").await;
    for wrong in ["public.T", "other.t"] {
        world.home.settings.tables = vec![wrong.to_owned()];
        world.home.write_config();
        check_names(&world, &[wrong, "write \"public.t\""]).await;
    }
}

/// Files that would be rejected once they are in the folder of a running process are found before.
#[tokio::test(flavor = "multi_thread")]
async fn transforms_that_cannot_be_used_are_named() {
    let world = good("bad_transforms").await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    world.ok(&["check"]).await;
    world.drop_in("20-text.wasm", b"not a module");
    check_names(&world, &["20-text.wasm", "not WebAssembly"]).await;
    std::fs::remove_file(world.path("transforms").join("20-text.wasm")).unwrap();
    world.drop_in("10-strip-columns.toml", b"tabels = [\"public.t\"]");
    check_names(&world, &["10-strip-columns.wasm", "settings", "tabels"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_of_another_plugin_or_database_is_refused() {
    let world = good("foreign_slot").await;
    let slot = &world.settings.slot;
    world
        .sql(&format!("select pg_create_logical_replication_slot('{slot}', 'test_decoding')"))
        .await;
    check_names(&world, &[slot, "test_decoding"]).await;
    // Nobody is told to drop what belongs to somebody else.
    let text = text_of(&world.cli(&["check"]).await);
    assert!(!text.contains("pg_drop_replication_slot"), "{text}");
    world.sql(&format!("select pg_drop_replication_slot('{slot}')")).await;

    let other: Database<'static> = Cluster::shared().await.database("foreign_slot_other").await;
    other.run(&format!("select pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    check_names(&world, &[slot, &other.name]).await;
}

/// The console's address taken by another process: said at once, before anything is started.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_on_one_configuration_stops_at_once() {
    let world = good("twice").await;
    let mut first = world.start().ready().await;
    let second = world.cli(&["run"]).await;
    let text = text_of(&second);
    assert!(matches!(second.status.code(), Some(1 | 2)), "{text}");
    assert_names(&text, &["another process"]);
    first.assert_alive();
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_without_a_running_process_say_so() {
    let home = Home::new(nowhere());
    for args in [
        &["messages", "list"][..],
        &["messages", "show", "1"],
        &["messages", "retry", "--all"],
        &["transforms", "list"],
    ] {
        let output = home.cli(args).await;
        let text = text_of(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}:\n{text}");
        assert_names(&text, &["127.0.0.1", "sluicebox run"]);
    }
}
