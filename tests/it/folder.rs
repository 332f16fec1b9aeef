//! The transforms folder, changed in every way that people and tools change files, under traffic:
//! what the stream says of it, what is tried before it goes live, and what comes back by itself.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::sluicebox::Running;
use crate::support::world::{World, field};
use crate::support::{Random, guest, until};

pub const NOTES: &str = "create table notes (id bigint primary key, label text, body text);";

pub fn insert(id: u64, label: &str) -> String {
    format!("insert into notes values ({id}, '{label} r0wv4lue', 'r0wv4lue body');")
}

/// A row that no record can hold, with this label.
pub fn oversize(id: u64, label: &str) -> String {
    format!("insert into notes values ({id}, '{label} r0wv4lue', repeat('r0wv4lue', 200000));")
}

pub async fn list(world: &World<'_>) -> Value {
    world.json(&["transforms", "list"]).await
}

/// Names and digests of the modules that the folder shows.
fn shown(dir: &Path) -> BTreeMap<String, String> {
    let mut shown = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.ends_with(".wasm") && !name.starts_with('.') {
            let digest = Sha256::digest(fs::read(entry.path()).unwrap());
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            shown.insert(name, digest);
        }
    }
    shown
}

/// Waits until exactly what the folder shows is live, and returns the generation.
pub async fn until_live(world: &World<'_>, running: &mut Running<'_>, what: &str) -> u64 {
    let expected = shown(&world.path("transforms"));
    until(&format!("the folder to be live: {what}"), async || {
        running.assert_alive();
        let list = list(world).await;
        let entries = list["transforms"].as_array().unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let live: BTreeMap<String, String> = entries
            .iter()
            .filter(|entry| entry["state"] == "live")
            .map(|entry| (text(&entry["file"]), text(&entry["digest"])))
            .collect();
        let is_quiet = entries.iter().all(|entry| entry["state"] == "live");
        if live == expected && is_quiet {
            Ok(list["generation"].as_u64().unwrap())
        } else {
            Err(format!("{expected:?} is not {list:#}"))
        }
    })
    .await
}

/// The stream after changes of the chain: generations never go back, and of one chain all inserts
/// have the same columns.
pub async fn check_chains(world: &World<'_>) -> BTreeMap<String, Vec<String>> {
    let mut last = 0;
    let mut chains: BTreeMap<u64, String> = BTreeMap::new();
    let mut columns: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for record in &world.records().await {
        let generation = record.generation();
        assert!(generation >= last, "record {} was made by an older chain", record.seq_num);
        last = generation;
        let chain = record.header("sb-chain").to_owned();
        let first = chains.entry(generation).or_insert_with(|| chain.clone());
        assert_eq!(*first, chain, "generation {generation} names two chains");
        if record.header("sb-action") == "insert" {
            let message = record.json();
            let found: Vec<String> =
                message["record"].as_object().unwrap().keys().cloned().collect();
            let expected = columns.entry(chain).or_insert_with(|| found.clone());
            assert_eq!(*expected, found, "record {} differs from its chain", record.seq_num);
        }
    }
    columns
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_ends_in_what_the_folder_shows() {
    every_kind_of_change("kinds", "", &[]).await;
}

/// As with a network file system, or where others have taken all watches that there are.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_nothing_is_reported_of_is_followed_all_the_same() {
    const LINE: &str = "echo 0 > /proc/sys/user/max_inotify_instances; exec \"$@\"";
    let without = ["-Ur", "sh", "-ec", LINE, "sh"];
    let mut unshare = std::process::Command::new("unshare");
    let can = unshare.args(without).arg("true").status();
    if !can.is_ok_and(|status| status.success()) {
        println!("not tested without reports: no namespace can be made here");
        return;
    }
    let log = every_kind_of_change("no_reports", "unshare", &without).await;
    assert!(log.contains("does not report changes of the transforms folder"), "{log}");
}

/// With the process started by a program, if one is named. Gives what it printed.
async fn every_kind_of_change(test: &str, by: &str, args: &[&str]) -> String {
    let world = World::new(test, TABLES, &["public.items"]).await;
    let load = Workload::new(world.database.url(), 2);
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let strip = "10-strip-columns.wasm";
    let dir = world.path("transforms");
    let at = |name: &str| dir.join(name);
    let core = fs::read(at(strip)).unwrap();
    let component = guest::component(&core);
    let settings = fs::read_to_string(at("10-strip-columns.toml")).unwrap();
    let (keeps, keeps_too) = (guest::chaos(), guest::component(&guest::chaos()));
    let twins = twins();

    let running = if by.is_empty() { world.start() } else { world.start_by(by, args) };
    let mut running = running.ready().await;
    let work = load.start();
    let mut generation = until_live(&world, &mut running, "the start").await;
    let outside = world.path("outside");
    fs::create_dir(&outside).unwrap();

    for step in [
        "added by renaming",
        "replaced by renaming",
        "renamed",
        "deleted",
        "written in place",
        "written in place, slowly",
        "settings alone",
        "settings back, by renaming",
        "ten at once",
        "ten deleted",
        "a symbolic link as Kubernetes makes it",
        "its target swapped",
        "a hard link",
        "changed through the other name, without an event",
        "the name in other letters",
        "one that has a twin",
        "its twin, of the same size and time",
        "its twin, in pieces",
        "more events than the queue holds",
    ] {
        match step {
            "added by renaming" => world.drop_in("20-chaos.wasm", &keeps),
            "replaced by renaming" => world.drop_in("20-chaos.wasm", &keeps_too),
            "renamed" => fs::rename(at("20-chaos.wasm"), at("05-chaos.wasm")).unwrap(),
            "deleted" => fs::remove_file(at("05-chaos.wasm")).unwrap(),
            "written in place" => fs::write(at(strip), &component).unwrap(),
            "written in place, slowly" => {
                let mut file = fs::File::create(at(strip)).unwrap();
                for piece in core.chunks(core.len() / 5 + 1) {
                    file.write_all(piece).unwrap();
                    tokio::time::sleep(Duration::from_millis(130)).await;
                }
            }
            "settings alone" => {
                let other = settings.replace("body", "absent");
                assert_ne!(other, settings);
                fs::write(at("10-strip-columns.toml"), other).unwrap();
            }
            "settings back, by renaming" => world.drop_in_settings(strip, &settings),
            "ten at once" => {
                for number in 50..60 {
                    fs::write(at(&format!("{number}-chaos.wasm")), &keeps).unwrap();
                }
            }
            "ten deleted" => {
                for number in 50..60 {
                    fs::remove_file(at(&format!("{number}-chaos.wasm"))).unwrap();
                }
            }
            "a symbolic link as Kubernetes makes it" => {
                for (version, bytes) in [("..1", &keeps), ("..2", &keeps_too)] {
                    fs::create_dir(at(version)).unwrap();
                    fs::write(at(version).join("60-mounted.wasm"), bytes).unwrap();
                }
                symlink("..1", at("..data")).unwrap();
                symlink("..data/60-mounted.wasm", at("60-mounted.wasm")).unwrap();
            }
            "its target swapped" => {
                symlink("..2", at("..data_tmp")).unwrap();
                fs::rename(at("..data_tmp"), at("..data")).unwrap();
            }
            "a hard link" => {
                fs::write(outside.join("linked"), &keeps).unwrap();
                fs::hard_link(outside.join("linked"), at("70-linked.wasm")).unwrap();
            }
            "changed through the other name, without an event" => {
                // The system reports changes of a folder by the name that they were made through;
                // this is what a network file system looks like from here.
                fs::write(outside.join("linked"), &keeps_too).unwrap();
            }
            "the name in other letters" => {
                fs::rename(at("60-mounted.wasm"), at("60-Mounted.wasm")).unwrap();
            }
            "one that has a twin" => world.drop_in("60-Mounted.wasm", &twins[0]),
            "its twin, of the same size and time" => {
                replace_unseen(&at("60-Mounted.wasm"), &twins[1], 1).await;
            }
            "its twin, in pieces" => replace_unseen(&at("60-Mounted.wasm"), &twins[0], 5).await,
            _ => {
                running.signal("STOP");
                overflow(&dir);
                fs::remove_file(at("70-linked.wasm")).unwrap();
                world.drop_in("60-last.wasm", &keeps);
                running.signal("CONT");
            }
        }
        let now = until_live(&world, &mut running, step).await;
        // The settings do not show among the modules.
        let now = if step.starts_with("settings") {
            until("another generation", async || {
                let now = list(&world).await["generation"].as_u64().unwrap();
                if now > generation { Ok(now) } else { Err(now.to_string()) }
            })
            .await
        } else {
            now
        };
        assert!(now > generation, "{step}: generation {now} after {generation}");
        generation = now;
        work.commits(15).await;
    }
    work.stop().await;
    judge(&world, Order::Whole).await;
    let columns = check_chains(&world).await;
    let stripped: Vec<bool> =
        columns.values().map(|columns| !columns.contains(&"body".to_owned())).collect();
    assert!(stripped.contains(&true) && stripped.contains(&false), "{columns:?}");
    assert_eq!(world.messages(None).await.len(), 0);
    running.stop().await;
    world.log()
}

/// Two modules of the same size.
fn twins() -> [Vec<u8>; 2] {
    // An empty custom section, and its name.
    [b'x', b'y'].map(|name| [&guest::chaos()[..], &[0, 2, 1, name]].concat())
}

/// Writes a file in place, in so many pieces, so that neither its size nor its time tells of it.
async fn replace_unseen(path: &Path, bytes: &[u8], pieces: usize) {
    let before = fs::metadata(path).unwrap();
    assert_eq!(before.len(), bytes.len() as u64);
    let mut file = fs::File::options().write(true).open(path).unwrap();
    for (number, piece) in bytes.chunks(bytes.len() / pieces + 1).enumerate() {
        if number > 0 {
            tokio::time::sleep(Duration::from_millis(130)).await;
        }
        file.write_all(piece).unwrap();
        file.set_modified(before.modified().unwrap()).unwrap();
    }
}

/// Makes more events than the kernel keeps for a process that does not read them.
fn overflow(dir: &Path) {
    let max = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let max: usize = max.trim().parse().unwrap();
    let name = |number: usize| dir.join(format!("event-{}.tmp", number % 2));
    for number in 0..=max {
        fs::write(name(number), "").unwrap();
    }
    for number in 0..2 {
        fs::remove_file(name(number)).unwrap();
    }
}

/// The entry of a file in a state.
pub async fn entry(world: &World<'_>, file: &str, state: &str) -> Value {
    world.until_transform(file, state).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_mends_a_parked_message_goes_live_and_what_pretends_to_does_not() {
    let world = World::new("vetting", NOTES, &["public.notes"]).await;
    let mut running = world.start().ready().await;
    world.sql(&[insert(1, "trap"), insert(2, "ok"), oversize(3, "over")].concat()).await;
    world.until_records(2).await;
    world.until_messages("parked", 1).await;

    // It drops the parked message, and traps where nothing failed.
    let dropping = guest::chaos_text().replace("0x706f7264", "0x7265766f");
    assert_ne!(dropping, guest::chaos_text());
    let pretender = guest::core_module(&dropping, &guest::interface_text());
    world.drop_in("10-pretends.wasm", &pretender);
    let refused = entry(&world, "10-pretends.wasm", "rejected").await;
    let vet = &refused["vet"];
    let counts = ["fixes", "of", "breaks", "sample"].map(|name| vet[name].as_u64().unwrap());
    assert_eq!(counts[..3], [0, 1, 1], "{refused}");
    // The first row is, at least: of rows that come fast, some are taken.
    assert!(counts[3] >= 1, "{refused}");
    assert_eq!(vet["result"], "refused");
    let reason = refused["reason"].as_str().unwrap();
    assert!(reason.contains("10-pretends.wasm") && reason.contains("vet = \"off\""), "{reason}");
    world.look_through("the reason", reason);

    // Settings that hide the trap hide nothing from the trial.
    for (refusals, on_error) in [(2, "drop"), (3, "pass")] {
        let text = format!("on_error = \"{on_error}\"\n# the trap is hidden\n");
        world.drop_in_settings("10-pretends.wasm", &text);
        // The reason is the same each time: only the log tells one refusal from the one before.
        until("another refusal", async || {
            let entry = entry(&world, "10-pretends.wasm", "rejected").await;
            let reason = entry["reason"].as_str().unwrap();
            let refused = world.log().matches("vetting refused a transform").count();
            let is_new = refused == refusals && reason.contains("hide it");
            if is_new { Ok(()) } else { Err(format!("{refused} refusals, {reason}")) }
        })
        .await;
    }
    assert_eq!(world.messages(Some("parked")).await.len(), 1);

    // A restart does not take it for new.
    running.stop().await;
    running = world.start().ready().await;
    let again = entry(&world, "10-pretends.wasm", "rejected").await;
    assert!(again["reason"].as_str().unwrap().contains("hide it"), "{again}");
    assert_eq!(world.messages(Some("parked")).await.len(), 1);

    // The one that mends it. It is tried on the parked message alone, after the restart.
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let live = entry(&world, "20-strip-columns.wasm", "live").await;
    assert_eq!(live["vet"]["result"], "passed", "{live}");
    assert_eq!([&live["vet"]["fixes"], &live["vet"]["of"]], [1, 1], "{live}");
    world.until_no_messages().await;
    let records = world.until_records(3).await;
    assert_eq!(field(&records[2], "id"), "3");
    let text = world.ok(&["transforms", "list"]).await;
    assert!(text.contains("fixes 1 of 1, breaks 0"), "{text}");

    // What it was good for is said when it goes.
    fs::remove_file(world.path("transforms/20-strip-columns.wasm")).unwrap();
    until("the notice", async || {
        let warnings = list(&world).await["warnings"].to_string();
        if warnings.contains("fixed 1 of 1 parked messages") { Ok(()) } else { Err(warnings) }
    })
    .await;

    // Whoever means it can have it.
    world.drop_in_settings("10-pretends.wasm", "vet = \"off\"\n");
    let live = entry(&world, "10-pretends.wasm", "live").await;
    assert_eq!(live["vet"]["result"], "off", "{live}");
    running.assert_alive();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_fails_once_it_is_live_is_taken_back() {
    let world = World::new("rollback", NOTES, &["public.notes"]).await;
    let mut running = world.start().ready().await;
    let rows = |ids: std::ops::Range<u64>, label: &str| -> String {
        ids.map(|id| insert(id, label)).collect()
    };
    world.sql(&rows(1..6, "ok")).await;
    world.until_records(5).await;
    world.drop_in("10-chaos.wasm", &guest::chaos());
    let live = entry(&world, "10-chaos.wasm", "live").await;
    assert_eq!(live["vet"]["result"], "passed", "{live}");
    world.sql(&rows(6..9, "ok")).await;
    world.until_records(8).await;

    // What was not among the recent changes.
    world.sql(&rows(9..20, "trap")).await;
    let back = entry(&world, "10-chaos.wasm", "rolled_back").await;
    let reason = back["reason"].as_str().unwrap();
    assert!(reason.contains("messages failed with it"), "{reason}");
    world.until_no_messages().await;
    let records = world.until_records(19).await;
    let by_chaos = records[7].generation();
    assert!(records[5].generation() > records[4].generation());
    assert!(records[18].generation() > by_chaos, "a rollback is a new generation");
    check_chains(&world).await;

    // The same content stays refused: touched, and after a restart.
    world.drop_in("10-chaos.wasm", &guest::chaos());
    tokio::time::sleep(Duration::from_millis(1500)).await;
    for _ in 0..2 {
        entry(&world, "10-chaos.wasm", "rolled_back").await;
        let entries = list(&world).await["transforms"].as_array().unwrap().len();
        assert_eq!(entries, 1);
        running.stop().await;
        running = world.start().ready().await;
    }
    let kept = entry(&world, "10-chaos.wasm", "rolled_back").await;
    assert_eq!(kept["reason"].as_str().unwrap(), reason);

    // Other content is another version.
    world.drop_in("10-chaos.wasm", &guest::component(&guest::chaos()));
    entry(&world, "10-chaos.wasm", "live").await;
    running.assert_alive();
    running.stop().await;
}

/// With nothing to try it on, nobody says that it is fine; and how long it took is told.
#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_was_there_to_try_on_is_unvetted() {
    let world = World::new("unvetted", NOTES, &["public.notes"]).await;
    let running = world.start().ready().await;
    world.drop_in("10-chaos.wasm", &guest::chaos());
    let live = entry(&world, "10-chaos.wasm", "live").await;
    assert_eq!([&live["vet"]["result"], &live["vet_text"]], ["unvetted", "unvetted"], "{live}");
    assert!(world.ok(&["transforms", "list"]).await.contains("unvetted"));
    world.sql(&insert(1, "ok")).await;
    let chain = world.until_records(1).await[0].header("sb-chain").to_owned();
    let told = until("the time from the folder to the stream", async || {
        let log = world.log();
        let told = log.lines().find(|line| line.contains("S2 has the first record of the chain"));
        told.map(str::to_owned).ok_or(log)
    })
    .await;
    assert!(told.contains(&chain) && told.contains(" ms after its files were seen"), "{told}");
    assert!(world.log().contains("vetting: unvetted"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_a_parked_message_vanish_does_not_mend_it() {
    let world = World::new("pretends", NOTES, &["public.notes"]).await;
    let mut running = world.start().ready().await;
    world.sql(&[insert(1, "ok"), oversize(2, "over")].concat()).await;
    world.until_records(1).await;
    world.until_messages("parked", 1).await;

    // It drops what is parked, and nothing else.
    let dropping = guest::chaos_text().replace("0x706f7264", "0x7265766f");
    assert_ne!(dropping, guest::chaos_text());
    world.drop_in("10-drops.wasm", &guest::core_module(&dropping, &guest::interface_text()));
    let refused = entry(&world, "10-drops.wasm", "rejected").await;
    assert_eq!(refused["vet"]["result"], "refused");
    assert_eq!([&refused["vet"]["fixes"], &refused["vet"]["drops"]], [0, 1], "{refused}");
    let reason = refused["reason"].as_str().unwrap();
    for part in ["does not fix 1 of 1 parked", "messages ack", "may_drop = true", "10-drops.toml"] {
        assert!(reason.contains(part), "{part} is not in {reason}");
    }
    assert_eq!(world.messages(Some("parked")).await.len(), 1);

    // One that does nothing goes live, and is said to mend nothing.
    world.drop_in("20-keeps.wasm", &guest::chaos());
    let keeps = entry(&world, "20-keeps.wasm", "live").await;
    assert_eq!([&keeps["vet"]["fixes"], &keeps["vet"]["of"]], [0, 1], "{keeps}");
    assert_eq!(world.messages(Some("parked")).await.len(), 1);

    // Whoever means it says so.
    world.drop_in_settings("10-drops.wasm", "may_drop = true\n");
    let live = entry(&world, "10-drops.wasm", "live").await;
    assert_eq!([&live["vet"]["fixes"], &live["vet"]["drops"]], [0, 1], "{live}");
    world.until_no_messages().await;
    assert_eq!(world.records().await.len(), 1);
    running.assert_alive();
    running.stop().await;
}

/// What is new while nothing ran is tried on what is parked, also where there was no chain before.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_tries_what_is_new_and_goes_on_with_a_probation() {
    let world = World::new("start", NOTES, &["public.notes"]).await;
    let running = world.start().ready().await;
    world.sql(&[insert(1, "ok"), oversize(2, "over")].concat()).await;
    world.until_records(1).await;
    world.until_messages("parked", 1).await;
    running.stop().await;

    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let running = world.start().ready().await;
    let live = entry(&world, "10-strip-columns.wasm", "live").await;
    assert_eq!([&live["vet"]["fixes"], &live["vet"]["of"]], [1, 1], "{live}");
    world.until_records(2).await;
    world.drop_in("20-chaos.wasm", &guest::chaos());
    entry(&world, "20-chaos.wasm", "live").await;
    running.stop().await;

    // A restart proves nothing, and knows what was said of what is live.
    let running = world.start().ready().await;
    let still = entry(&world, "10-strip-columns.wasm", "live").await;
    assert_eq!(still["vet"], live["vet"], "{still}");
    assert!(world.ok(&["transforms", "list"]).await.contains("fixes 1 of 1, breaks 0"));
    world.sql(&(3..20).map(|id| insert(id, "trap")).collect::<String>()).await;
    entry(&world, "20-chaos.wasm", "rolled_back").await;
    world.until_records(19).await;
    world.until_no_messages().await;
    running.stop().await;
}

/// What stands in the folder in place of files: nothing of it is waited for, each is told, and what is
/// live stays live.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_file_takes_nothing_out_of_the_chain() {
    let world = World::new("no_files", NOTES, &["public.notes"]).await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let strip = "10-strip-columns.wasm";
    let mut running = world.start().ready().await;
    entry(&world, strip, "live").await;
    let at = |name: &str| world.path("transforms").join(name);
    let good = fs::read(at(strip)).unwrap();
    let mut id = 0;
    let mut still_strips = async |running: &mut Running<'_>| {
        id += 1;
        world.sql(&insert(id, "ok")).await;
        let records = world.until_records(usize::try_from(id).unwrap()).await;
        assert!(records.last().unwrap().json()["record"].get("body").is_none());
        running.assert_alive();
    };

    fs::create_dir(at("20-folder.wasm")).unwrap();
    symlink("nothing", at("30-dangling.wasm")).unwrap();
    symlink("40-loop.wasm", at("40-loop.wasm")).unwrap();
    let made = std::process::Command::new("mkfifo").arg(at("50-pipe.wasm")).status().unwrap();
    assert!(made.success());
    fs::write(at("60-LOUD.WASM"), &good).unwrap();
    let foreign = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"70-\xff.wasm");
    fs::write(world.path("transforms").join(foreign), &good).unwrap();
    for (file, part) in [
        ("20-folder.wasm", "it is a folder"),
        ("30-dangling.wasm", "where nothing is; put the file itself there"),
        ("40-loop.wasm", "leads back to itself"),
        ("50-pipe.wasm", "it is no file"),
    ] {
        let reason = entry(&world, file, "rejected").await["reason"].to_string();
        assert!(reason.contains(part), "{file}: {reason}");
    }
    let warnings = list(&world).await["warnings"].to_string();
    assert!(warnings.contains("60-LOUD.WASM") && warnings.contains("not UTF-8"), "{warnings}");
    still_strips(&mut running).await;

    // In place of the live one, and of its settings.
    for what in ["a folder", "a link to nothing", "settings that are a folder"] {
        let settings = fs::read_to_string(at("10-strip-columns.toml")).unwrap();
        match what {
            "a folder" => {
                fs::remove_file(at(strip)).unwrap();
                fs::create_dir(at(strip)).unwrap();
            }
            "a link to nothing" => {
                fs::remove_file(at(strip)).unwrap();
                symlink("nothing", at(strip)).unwrap();
            }
            _ => {
                fs::remove_file(at("10-strip-columns.toml")).unwrap();
                fs::create_dir(at("10-strip-columns.toml")).unwrap();
            }
        }
        entry(&world, strip, "rejected").await;
        entry(&world, strip, "live").await;
        still_strips(&mut running).await;
        for name in [strip, "10-strip-columns.toml"] {
            let path = at(name);
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                fs::remove_dir(path).unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }
        world.drop_in_settings(strip, &settings);
        world.drop_in(strip, &good);
        until("the rejection to be over", async || {
            let list = list(&world).await;
            let of_file = |entry: &&Value| entry["file"] == strip;
            let count = list["transforms"].as_array().unwrap().iter().filter(of_file).count();
            if count == 1 { Ok(()) } else { Err(list.to_string()) }
        })
        .await;
    }

    // A large function is compiled by a process of its own, and no different for that.
    let nops = "nop ".repeat(100_000);
    let memory = "(memory (export";
    let large = guest::chaos_text().replacen(memory, &format!("(func {nops}) {memory}"), 1);
    assert!(large.len() > nops.len());
    world.drop_in("90-large.wasm", &guest::core_module(&large, &guest::interface_text()));
    entry(&world, "90-large.wasm", "live").await;
    still_strips(&mut running).await;

    // What the process keeps for itself is cleared away; it goes on, and makes it anew.
    fs::remove_dir_all(world.path("state/compiled-transforms")).unwrap();
    fs::remove_dir_all(world.path("state/last-good-transforms")).unwrap();
    world.drop_in("80-chaos.wasm", &guest::chaos());
    entry(&world, "80-chaos.wasm", "live").await;
    still_strips(&mut running).await;
    running.stop().await;
    world.drop_in(strip, b"broken while it was down");
    let mut running = world.start().ready().await;
    entry(&world, strip, "rejected").await;
    still_strips(&mut running).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_version_before_cannot_handle_either_takes_nothing_back() {
    let world = World::new("innocent", NOTES, &["public.notes"]).await;
    let running = world.start().ready().await;
    world.sql(&insert(1, "ok")).await;
    world.until_records(1).await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "absent"]).await;
    let strip = "10-strip-columns.wasm";
    entry(&world, strip, "live").await;
    let rows: String = (2..8).map(|id| oversize(id, "over")).collect();
    world.sql(&rows).await;
    world.until_messages("parked", 6).await;
    until("the check with the version before", async || {
        let log = world.log();
        let said = log.contains("the versions before would not have done better");
        if said { Ok(()) } else { Err(log) }
    })
    .await;
    entry(&world, strip, "live").await;
    running.stop().await;
}

/// Kills the process while it compiles and keeps what it compiled, again and again: whatever is
/// left in the state folder, the next start goes on with good code.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_while_compiled_code_is_written_leaves_nothing_that_is_run() {
    let world = World::new("cachekill", NOTES, &["public.notes"]).await;
    let mut random = Random::new(Random::seed());
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    world.drop_in("20-chaos.wasm", &guest::chaos());
    let cache: PathBuf = world.path("state/compiled-transforms");
    for _ in 0..8 {
        let running = world.start();
        tokio::time::sleep(Duration::from_millis(random.below(700))).await;
        running.kill().await;
        // What a kill can leave behind, and what it cannot: each is to be made anew.
        let Ok(files) = fs::read_dir(&cache) else { continue };
        for path in files.map(|file| file.unwrap().path()) {
            if path.file_name().unwrap() == "key" {
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            match random.below(4) {
                0 => fs::write(&path, &bytes[..bytes.len() / 2]).unwrap(),
                1 => fs::remove_file(&path).unwrap(),
                2 if !bytes.is_empty() => {
                    let mut doctored = bytes.clone();
                    let at = usize::try_from(random.below(bytes.len() as u64)).unwrap();
                    doctored[at] ^= 0x40;
                    fs::write(&path, doctored).unwrap();
                }
                _ => {}
            }
        }
    }
    let mut running = world.start().ready().await;
    until_live(&world, &mut running, "both modules").await;
    world.sql(&insert(1, "ok")).await;
    let records = world.until_records(1).await;
    assert!(records[0].json()["record"].get("body").is_none());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn precompiled_code_is_refused_by_its_name_and_by_its_bytes() {
    let world = World::new("cwasm", NOTES, &["public.notes"]).await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let running = world.start().ready().await;
    entry(&world, "10-strip-columns.wasm", "live").await;
    // What the process itself compiled, as somebody could put it into the folder.
    let cache = fs::read_dir(world.path("state/compiled-transforms")).unwrap();
    let path =
        cache.map(|file| file.unwrap().path()).find(|path| path.file_name().unwrap() != "key");
    let bytes = fs::read(path.unwrap()).unwrap();
    // Behind the code's seal.
    let code = &bytes[32..];
    for name in ["20-fast.cwasm", "30-fast.wasm"] {
        world.drop_in(name, code);
        let refused = entry(&world, name, "rejected").await;
        let reason = refused["reason"].as_str().unwrap();
        assert!(reason.contains("machine code") && reason.contains(".wasm"), "{reason}");
    }
    world.sql(&insert(1, "ok")).await;
    world.until_records(1).await;
    running.stop().await;
}
