//! Modules of every kind in the folder, good and broken, and reloads under traffic.

use std::collections::BTreeMap;
use std::fs;

use base64::Engine as _;
use serde_json::Value;

use crate::support::guest;
use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::sluicebox::Home;
use crate::support::until;
use crate::support::world::{World, field};

const NOTES: &str = "create table notes (id bigint primary key, label text, body text);";

async fn notes(test: &str) -> World<'static> {
    World::new(test, NOTES, &["public.notes"]).await
}

fn insert(id: u64, label: &str) -> String {
    format!("insert into notes values ({id}, '{label}', 'r0wv4lue body');")
}

/// The file that `transforms add` wrote, and the settings beside it.
async fn added(home: &Home, column: &str) -> (String, Vec<u8>, String) {
    let before = files(home);
    home.ok(&["transforms", "add", "strip-columns", "--column", column]).await;
    let new: Vec<String> = files(home).into_iter().filter(|file| !before.contains(file)).collect();
    let [settings, wasm] = new.as_slice() else { panic!("a module and its settings: {new:?}") };
    assert!(wasm.ends_with("strip-columns.wasm"), "{wasm}");
    assert_eq!(settings.strip_suffix(".toml"), wasm.strip_suffix(".wasm"));
    let bytes = fs::read(home.path("transforms").join(wasm)).unwrap();
    let text = fs::read_to_string(home.path("transforms").join(settings)).unwrap();
    (wasm.clone(), bytes, text)
}

/// Names in the transforms folder, sorted, without what Sluicebox may keep there for itself.
fn files(home: &Home) -> Vec<String> {
    let entries = fs::read_dir(home.path("transforms")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

/// The columns of the message, sorted.
fn columns(record: &crate::support::s2::Record) -> Vec<String> {
    record.json()["record"].as_object().unwrap().keys().cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn core_modules_and_components_load_as_they_are() {
    let world = notes("forms").await;
    let (wasm, bytes, settings) = added(&world, "body").await;
    let running = world.start().ready().await;
    world.until_transform(&wasm, "live").await;
    world.sql(&insert(1, "r0wv4lue")).await;
    assert_eq!(columns(&world.until_records(1).await[0]), ["id", "label"]);

    // The other form of the same module, under another name; the first is deleted.
    if guest::is_component(&bytes) {
        world.drop_in("20-other.wasm", &guest::chaos());
    } else {
        fs::write(world.path("transforms/20-other.toml"), &settings).unwrap();
        world.drop_in("20-other.wasm", &guest::component(&bytes));
    }
    world.until_transform("20-other.wasm", "live").await;
    fs::remove_file(world.path("transforms").join(&wasm)).unwrap();
    until("the deleted file to leave the chain", async || {
        let list = world.json(&["transforms", "list"]).await;
        let all = list["transforms"].as_array().unwrap();
        let there = all.iter().any(|entry| entry["file"] == wasm && entry["state"] == "live");
        if there { Err(list.to_string()) } else { Ok(()) }
    })
    .await;
    world.sql(&insert(2, "r0wv4lue")).await;
    let records = world.until_records(2).await;
    let expected: &[&str] =
        if guest::is_component(&bytes) { &["body", "id", "label"] } else { &["id", "label"] };
    assert_eq!(columns(&records[1]), expected);
    assert!(records[1].generation() > records[0].generation());

    // One that no compiler of ours made, in both forms; it runs behind the others.
    let mut before = Value::Null;
    for form in [guest::chaos(), guest::component(&guest::chaos())] {
        world.drop_in("30-chaos.wasm", &form);
        before = until("the new form to be live", async || {
            let entry = world.until_transform("30-chaos.wasm", "live").await;
            let digest = entry["digest"].clone();
            if digest == before { Err(entry.to_string()) } else { Ok(digest) }
        })
        .await;
    }
    world.sql(&[insert(3, "drop r0wv4lue"), insert(4, "split r0wv4lue")].concat()).await;
    let records = world.until_records(4).await;
    let bodies: Vec<&str> = records[2..].iter().map(|record| record.body.as_str()).collect();
    assert_eq!(bodies, [r#"{"part":1}"#, r#"{"part":2}"#]);
    let parts: Vec<&str> = records[2..].iter().map(|record| record.header("sb-part")).collect();
    assert_eq!(parts, ["0/2", "1/2"]);
    assert_eq!(records[2].header("sb-key"), records[3].header("sb-key"));
    world.until_confirmed().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_never_replaces_a_working_one() {
    let world = notes("broken").await;
    let (wasm, good, settings) = added(&world, "body").await;
    let mut running = world.start().ready().await;
    let live = world.until_transform(&wasm, "live").await;
    let mut id = 0;
    let mut goes_on = async |running: &mut crate::support::sluicebox::Running<'_>| {
        id += 1;
        world.sql(&insert(id, "r0wv4lue")).await;
        let records = world.until_records(usize::try_from(id).unwrap()).await;
        assert_eq!(columns(records.last().unwrap()), ["id", "label"], "after {id} rows");
        running.assert_alive();
    };
    goes_on(&mut running).await;

    let interface = guest::interface_text();
    let chaos = guest::chaos_text();
    let newer = "sluicebox:transform/types@9.0.0";
    let foreign = guest::core_module(
        &chaos.replace("sluicebox:transform/types@1.0.0", newer),
        &interface.replace("sluicebox:transform@1.0.0", "sluicebox:transform@9.0.0"),
    );
    let unknown = r#"(module (import "env" "steal" (func)) (func (export "transform") call 0))"#;
    let broken: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("text", b"#!/bin/sh\necho this is no module\n".to_vec()),
        ("cut after its head", good[..8].to_vec()),
        ("cut in the middle", good[..good.len() / 2].to_vec()),
        ("cut by one byte", good[..good.len() - 1].to_vec()),
        ("another interface", foreign),
        ("no interface", wat::parse_str(unknown).unwrap()),
        ("nothing in it", wat::parse_str("(module)").unwrap()),
        (
            "trapping on init",
            guest::core_module(
                &chaos.replace("(i32.store8 (i32.const 1024) (i32.const 0))", "(unreachable)"),
                &interface,
            ),
        ),
    ];
    for (what, bytes) in broken {
        // In place of the live one, and as a file of its own.
        world.drop_in(&wasm, &bytes);
        let entry = world.until_transform(&wasm, "rejected").await;
        let reason = entry["reason"].as_str().unwrap_or_default();
        assert!(!reason.is_empty(), "a file that is {what} is rejected without a reason: {entry}");
        assert_plain(reason, what);
        goes_on(&mut running).await;
        world.drop_in(&wasm, &good);
        until("the good file to be back", async || {
            let list = world.json(&["transforms", "list"]).await;
            let all = list["transforms"].as_array().unwrap().clone();
            let of_file: Vec<&Value> = all.iter().filter(|entry| entry["file"] == wasm).collect();
            let good =
                of_file.iter().any(|e| e["state"] == "live" && e["digest"] == live["digest"]);
            let bad = of_file.iter().any(|entry| entry["state"] == "rejected");
            if good && !bad { Ok(()) } else { Err(list.to_string()) }
        })
        .await;

        world.drop_in("90-new.wasm", &bytes);
        world.until_transform("90-new.wasm", "rejected").await;
        goes_on(&mut running).await;
        fs::remove_file(world.path("transforms/90-new.wasm")).unwrap();
    }

    // A restart goes on as before, also where a file was never live.
    world.drop_in("90-new.wasm", b"no module");
    world.until_transform("90-new.wasm", "rejected").await;
    running.stop().await;
    running = world.start().ready().await;
    world.until_transform("90-new.wasm", "rejected").await;
    goes_on(&mut running).await;
    fs::remove_file(world.path("transforms/90-new.wasm")).unwrap();

    // Settings that mean nothing are as bad as a broken module.
    world.drop_in_settings(&wasm, "tabels = [\"public.notes\"]\n");
    let entry = world.until_transform(&wasm, "rejected").await;
    assert!(entry["reason"].as_str().unwrap().contains("tabels"), "{entry}");
    goes_on(&mut running).await;

    // A restart that finds only a broken file goes on with the last good one.
    world.drop_in_settings(&wasm, &settings);
    world.drop_in(&wasm, b"broken while it was down");
    world.until_transform(&wasm, "rejected").await;
    running.stop().await;
    let mut running = world.start().ready().await;
    goes_on(&mut running).await;
    running.stop().await;
}

/// No Rust debug output in what an operator reads.
fn assert_plain(text: &str, what: &str) {
    for sign in ["Error {", "Some(", "Err(", "Error(", "kind:", "source:"] {
        assert!(!text.contains(sign), "{what}: `{sign}` in `{text}`");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_call_costs_one_message() {
    let world = notes("chaos").await;
    world.drop_in("10-chaos.wasm", &guest::chaos());
    let mut running = world.start().ready().await;
    world.until_transform("10-chaos.wasm", "live").await;
    let mut sql = String::new();
    for (id, label) in (1..).zip(["trap", "ok", "loop", "ok", "grow", "ok", "erro", "ok"]) {
        sql.push_str(&insert(id, &format!("{label} r0wv4lue")));
    }
    world.sql(&format!("begin; {sql} commit;")).await;
    let records = world.until_records(4).await;
    let ids: Vec<String> = records.iter().map(|record| field(record, "id")).collect();
    assert_eq!(ids, ["2", "4", "6", "8"]);

    let failed = world.until_messages("failed", 4).await;
    for (message, (id, class)) in
        failed.iter().zip([(1, "trap"), (3, "timeout"), (5, "limit"), (7, "guest")])
    {
        assert_eq!(message["key"]["id"], id);
        let error = &message["error"];
        assert_eq!(error["class"], class, "{error}");
        assert_eq!(error["transform"], "10-chaos.wasm");
        let text = error["text"].as_str().unwrap();
        assert_plain(text, class);
        world.look_through("the reason", text);
        if class == "guest" {
            assert!(text.contains("the label asks for an error"), "{text}");
        }
    }
    running.assert_alive();

    // Without the module they pass.
    fs::remove_file(world.path("transforms/10-chaos.wasm")).unwrap();
    world.until_no_messages().await;
    assert_eq!(world.until_records(8).await.len(), 8);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_may_pass_or_drop_what_it_fails_on() {
    let world = notes("on_error").await;
    world.drop_in("10-chaos.wasm", &guest::chaos());
    fs::write(world.path("transforms/10-chaos.toml"), "on_error = \"pass\"\n").unwrap();
    let running = world.start().ready().await;
    world.until_transform("10-chaos.wasm", "live").await;
    world.sql(&insert(1, "trap r0wv4lue")).await;
    let records = world.until_records(1).await;
    assert!(records[0].header("sb-passed").contains("10-chaos"), "{:?}", records[0].headers);

    fs::write(world.path("transforms/10-chaos.toml"), "on_error = \"drop\"\n").unwrap();
    let before = records[0].generation();
    until("another generation", async || {
        let list = world.json(&["transforms", "list"]).await;
        let now = list["generation"].as_u64().unwrap();
        if now > before { Ok(()) } else { Err(list.to_string()) }
    })
    .await;
    world.sql(&[insert(2, "trap r0wv4lue"), insert(3, "r0wv4lue")].concat()).await;
    let records = world.until_records(2).await;
    assert_eq!(field(&records[1], "id"), "3");
    assert_eq!(records[1].find_header("sb-passed"), None);
    running.stop().await;
}

/// Everything waits at the message, visibly, for as long as it takes, over a restart too; mended
/// settings let it go on by itself, in order and with nothing lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_module_may_halt_the_pipeline_until_it_is_mended() {
    let world = notes("halt").await;
    world.drop_in_settings("10-chaos.wasm", "on_error = \"halt\"\n");
    world.drop_in("10-chaos.wasm", &guest::chaos());
    let mut running = world.start().ready().await;
    world.until_transform("10-chaos.wasm", "live").await;
    world.sql(&[insert(1, "ok r0wv4lue"), insert(2, "trap r0wv4lue")].concat()).await;
    let text = running.unready("halted").await;
    for part in ["`10-chaos.wasm` trapped", "on_error = \"halt\"", "public.notes", "mend"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    world.look_through("/readyz", &text);
    // What comes later waits too, and nothing is parked for it.
    let rows: String = (3..40).map(|id| insert(id, "ok r0wv4lue")).collect();
    world.sql(&rows).await;
    world.until_records(1).await;
    assert_eq!(world.messages(None).await.len(), 0);
    running.stop().await;

    running = world.start();
    running.unready("halted").await;
    assert_eq!(world.records().await.len(), 1);
    // Another chain that does not help, and an operator who hopes.
    world.drop_in_settings("10-chaos.wasm", "on_error = \"halt\"\n# looked at it\n");
    until("another halt", async || {
        let halts = world.log().matches("the pipeline stands still").count();
        if halts >= 3 { Ok(()) } else { Err(halts.to_string()) }
    })
    .await;
    world.ok(&["messages", "retry", "--all"]).await;
    running.unready("halted").await;

    world.drop_in_settings("10-chaos.wasm", "on_error = \"pass\"\n");
    let records = world.until_records(39).await;
    let ids: Vec<String> = records.iter().map(|record| field(record, "id")).collect();
    let expected: Vec<String> = (1..40).map(|id| id.to_string()).collect();
    assert_eq!(ids, expected);
    assert!(records[1].header("sb-passed").contains("10-chaos"), "{:?}", records[1].headers);
    let generations: Vec<u64> = records.iter().map(|record| record.generation()).collect();
    assert!(generations.is_sorted(), "{generations:?}");
    let running = running.ready().await;
    world.until_confirmed().await;
    running.stop().await;
}

/// The ready-made ones together, as a consumer reads what comes of them.
#[tokio::test(flavor = "multi_thread")]
async fn ready_made_transforms_in_one_chain() {
    let world = World::new(
        "ready_made",
        "create table people (id bigint primary key, email text, note text, body text, \
         internal boolean, secret text);",
        &["public.people"],
    )
    .await;
    let add = async |arguments: &[&str]| {
        world.ok(&[&["transforms", "add"], arguments].concat()).await;
    };
    add(&["filter", "--set", "drop=[{column=\"internal\",is=true}]"]).await;
    add(&[
        "mask-columns",
        "--column",
        "email",
        "--set",
        "method=hash",
        "--set",
        "key=0123456789abcdef",
    ])
    .await;
    add(&["truncate-columns", "--column", "note", "--set", "max_bytes=5"]).await;
    add(&["compress-columns", "--column", "body"]).await;
    add(&["keep-columns", "--column", "email", "--column", "note", "--column", "body"]).await;
    let running = world.start().ready().await;
    world.until_transform("50-keep-columns.wasm", "live").await;
    world
        .sql(
            "insert into people values \
             (1, 'new@example', 'äää', repeat('It was a dark night. ', 1000), false, 'r0wv4lue'), \
             (2, 'new@example', 'r0wv4lue', 'r0wv4lue', true, 'r0wv4lue'), \
             (3, null, 'abcde', 'short', null, 'r0wv4lue');",
        )
        .await;
    let records = world.until_records(2).await;
    let messages: Vec<Value> = records.iter().map(|record| record.json()).collect();
    let first = &messages[0]["record"];
    assert_eq!(
        first["email"], "5a0116cb506d4465efd68f683c92c55ae7330493cda6fdfe2dc7fedfb2dff0b1",
        "the keyed hash is the same for ever"
    );
    assert_eq!(first["note"], "ää");
    assert_eq!(messages[0]["metadata"]["truncated_columns"], serde_json::json!({"note": 6}));
    assert_eq!(messages[0]["metadata"]["compressed_columns"]["body"]["codec"], "zstd");
    assert_eq!(
        messages[0]["metadata"]["stripped_columns"],
        serde_json::json!(["internal", "secret"])
    );
    let packed =
        base64::engine::general_purpose::STANDARD.decode(first["body"].as_str().unwrap()).unwrap();
    let body = zstd::stream::decode_all(&*packed).unwrap();
    assert_eq!(String::from_utf8(body).unwrap(), "It was a dark night. ".repeat(1000));
    let third = &messages[1]["record"];
    assert_eq!(
        *third,
        serde_json::json!({"id": 3, "email": null, "note": "abcde", "body": "short"})
    );
    world.until_confirmed().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_choose_tables_and_actions() {
    let world = World::new(
        "scope",
        "create table a (id bigint primary key, body text); \
         create table b (id bigint primary key, body text);",
        &["public.a", "public.b"],
    )
    .await;
    let (wasm, _, settings) = added(&world, "body").await;
    let scoped = format!("tables = [\"public.a\"]\nactions = [\"insert\"]\n{settings}");
    fs::write(world.path("transforms").join(wasm.replace(".wasm", ".toml")), scoped).unwrap();
    let running = world.start().ready().await;
    world.until_transform(&wasm, "live").await;
    world
        .sql(
            "insert into a values (1, 'r0wv4lue'); insert into b values (1, 'r0wv4lue'); \
             update a set body = 'r0wv4lue!' where id = 1;",
        )
        .await;
    let records = world.until_records(3).await;
    let shapes: Vec<Vec<String>> = records.iter().map(columns).collect();
    assert_eq!(shapes, [vec!["id"], vec!["body", "id"], vec!["body", "id"]]);
    running.stop().await;
}

/// The chain is swapped again and again under load, in every way that files change. Its
/// generation never goes back along the stream, and each chain leaves one kind of record.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_is_one_step_between_two_changes() {
    let world = World::new("reload", TABLES, &["public.items"]).await;
    let load = Workload::new(world.database.url(), 3);
    let running = world.start().ready().await;
    let (wasm, good, settings) = added(&world, "body").await;
    world.until_transform(&wasm, "live").await;
    let path = world.path("transforms").join(&wasm);
    let toml = world.path("transforms").join(wasm.replace(".wasm", ".toml"));
    let other = settings.replace("body", "absent");
    assert_ne!(settings, other, "the settings name the column");

    let generation = async || {
        let list = world.json(&["transforms", "list"]).await;
        list["generation"].as_u64().expect("the generation is a number")
    };
    let work = load.start();
    for round in 0..6 {
        let before = generation().await;
        match round {
            // Deleted.
            0 => fs::remove_file(&path).unwrap(),
            // Written in place, slowly.
            1 => {
                let mut file = fs::File::create(&path).unwrap();
                for piece in good.chunks(good.len() / 3 + 1) {
                    std::io::Write::write_all(&mut file, piece).unwrap();
                    tokio::time::sleep(std::time::Duration::from_millis(60)).await;
                }
            }
            // Other settings, then back again by renaming.
            2 | 4 => fs::write(&toml, &other).unwrap(),
            _ => {
                let temporary = toml.with_extension("toml.tmp");
                fs::write(&temporary, &settings).unwrap();
                fs::rename(temporary, &toml).unwrap();
            }
        }
        until("another generation", async || {
            let now = generation().await;
            if now > before { Ok(()) } else { Err(format!("still {now}")) }
        })
        .await;
        work.commits(60).await;
    }
    work.stop().await;
    judge(&world, Order::Whole).await;
    let records = world.records().await;

    let mut last = 0;
    let mut kinds: BTreeMap<String, (bool, u64)> = BTreeMap::new();
    for record in &records {
        let generation = record.generation();
        assert!(generation >= last, "record {} was made by an older chain", record.seq_num);
        last = generation;
        // Only inserts surely have a body to strip.
        if record.header("sb-action") == "insert" {
            let has_body = record.json()["record"].get("body").is_some();
            let chain = record.header("sb-chain").to_owned();
            let (first, _) = *kinds.entry(chain).or_insert((has_body, record.seq_num));
            assert_eq!(first, has_body, "record {} differs from its chain", record.seq_num);
        }
    }
    let both = [true, false].map(|has| kinds.values().any(|(kind, _)| *kind == has));
    assert_eq!(both, [true, true], "chains with and without the transform: {kinds:?}");
    running.stop().await;
}
