//! Replacing transforms while rows come in, and starting with them.
//!
//! - *swap*: a module of a ready-made transform, a little different each time, is renamed into the
//!   folder over the one before; from the rename to the first record of the new chain in the stream.
//! - *compile*: one row at a time, from the commit's return to the record in the stream; while a module
//!   in JavaScript (12 MB, most of it the engine) is compiled beside it, and while nothing is. It is
//!   built by `transforms new --lang js` and npm.
//! - *start*: from the start of the process, with five modules in its cache, until it is ready.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use sluicebox::sink::client::ReadFrom;

use crate::Options;
use crate::measure::{
    Writer, client, create_events, home, insert_events, median, quantile, server, until,
};
use crate::support::CACHE;
use crate::support::postgres::Cluster;
use crate::support::sluicebox::Home;
use crate::support::world::STREAM;

const EVENTS: &str = "public.events";

/// Drops nothing.
const CONDITION: &str = "drop=[{column=\"customer\",less_than=0}]";

pub async fn run(cluster: &Cluster, options: &Options) {
    if options.wants("swap") {
        swap(cluster, options).await;
    }
    if options.wants("start") {
        start(cluster, options).await;
    }
    if options.wants("compile") {
        compile(cluster, options).await;
    }
}

/// The module with a custom section that makes it another one: a length in LEB128, a name, a number.
fn variant(module: &[u8], number: u32) -> Vec<u8> {
    let mut variant = module.to_vec();
    let section = [b"\x07variant".as_slice(), &number.to_be_bytes()].concat();
    variant.extend([0, u8::try_from(section.len()).unwrap()]);
    variant.extend(section);
    variant
}

async fn swap(cluster: &Cluster, options: &Options) {
    let database = cluster.database("swap").await;
    create_events(&database, EVENTS).await;
    let server = server().await;
    let home = home(&database, &server, "swap", &[EVENTS]);
    home.ok(&["transforms", "add", "filter", "--number", "50", "--set", CONDITION]).await;
    let file = home.path("transforms/50-filter.wasm");
    let module = std::fs::read(&file).unwrap();
    let running = home.start().ready().await;
    let writer = Writer::start(&database, EVENTS, 1, 1, Duration::from_millis(2)).await;
    let stream = client(&server, STREAM);
    let chain = async || {
        let page = stream.read(ReadFrom::TailOffset(1), 1, Duration::ZERO).await.unwrap();
        page.records.first().and_then(|record| record.header("sb-chain").cloned())
    };
    let mut took = Vec::new();
    for number in 0..if options.quick { 5 } else { 30 } {
        // Past the last one's probation and vetting, with a sample of rows to vet the next one on.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = chain().await;
        let new = home.path("transforms/new");
        std::fs::write(&new, variant(&module, number)).unwrap();
        std::fs::rename(new, &file).unwrap();
        let renamed = Instant::now();
        until(&home, "a record of the new chain", async || chain().await != before).await;
        took.push(renamed.elapsed().as_secs_f64() * 1e3);
    }
    drop(writer);
    running.stop().await;
    println!(
        "swap: a module of {} KiB: first record {:.0} ms after the rename (median of {}), {:.0} at most",
        module.len() / 1024,
        median(&took),
        took.len(),
        quantile(&took, 1.0)
    );
}

async fn start(cluster: &Cluster, options: &Options) {
    let database = cluster.database("start").await;
    create_events(&database, EVENTS).await;
    let server = server().await;
    let home = home(&database, &server, "start", &[EVENTS]);
    for transform in ["strip-columns", "mask-columns", "keep-columns", "compress-columns"] {
        home.ok(&["transforms", "add", transform, "--column", "body"]).await;
    }
    home.ok(&["transforms", "add", "filter", "--set", CONDITION]).await;
    home.start().ready().await.stop().await;
    let mut took = Vec::new();
    for _ in 0..if options.quick { 5 } else { 20 } {
        let started = Instant::now();
        let running = home.start();
        let ready = until(&home, "the process to be ready", async || {
            home.readyz().await.is_ok_and(|body| body["ready"] == true)
        });
        took.push((ready.await - started).as_secs_f64() * 1e3);
        running.stop().await;
    }
    println!(
        "start: ready after {:.0} ms with five modules in the cache (median of {}), {:.0} at most",
        median(&took),
        took.len(),
        quantile(&took, 1.0)
    );
}

async fn compile(cluster: &Cluster, options: &Options) {
    let built = tempfile::tempdir().unwrap();
    let module = javascript(built.path());
    let database = cluster.database("compile").await;
    create_events(&database, EVENTS).await;
    let server = server().await;
    let home = home(&database, &server, "compile", &[EVENTS]);
    home.ok(&["transforms", "add", "strip-columns", "--column", "absent"]).await;
    let running = home.start().ready().await;
    let stream = client(&server, STREAM);
    let postgres = database.connect().await;
    let mut id = 0;
    let mut one = async || {
        id += 1;
        let tail = stream.tail().await.unwrap().next_seq;
        postgres.batch_execute(&insert_events(EVENTS, id, id)).await.unwrap();
        let committed = Instant::now();
        // The server holds the answer back until the record is there. Asking again and again would
        // take both cores, and the compiler, which runs at a low priority, would never end.
        let page = stream.read(ReadFrom::Seq(tail), 1, Duration::from_secs(60)).await.unwrap();
        assert_eq!(page.records.len(), 1, "row {id} is not in the stream");
        let latency = committed.elapsed().as_secs_f64() * 1e3;
        tokio::time::sleep(Duration::from_millis(3 + id % 5)).await;
        latency
    };
    let samples = if options.quick { 500 } else { 5000 };
    let (mut quiet, mut beside) = (Vec::new(), Vec::new());
    let mut compiled = Vec::new();
    for number in 0.. {
        if beside.len() >= samples {
            break;
        }
        let file = format!("90-script-{number}.wasm");
        home.drop_in_settings(&file, "[config]\ncolumns = [\"absent\"]\n");
        home.drop_in(&file, &variant(&module, number));
        let dropped = Instant::now();
        loop {
            let mut rows = Vec::with_capacity(50);
            for _ in 0..rows.capacity() {
                rows.push(one().await);
            }
            if is_live(&home, &file).await {
                // Some of the last rows went through it.
                break;
            }
            beside.extend(rows);
        }
        compiled.push(dropped.elapsed().as_secs_f64());
        // So that the chain that serves is the same in both.
        for file in [file.clone(), file.replace(".wasm", ".toml")] {
            std::fs::remove_file(home.path(&format!("transforms/{file}"))).unwrap();
        }
        until(&home, "the chain without it", async || !is_live(&home, &file).await).await;
        while quiet.len() < beside.len() {
            assert!(!is_live(&home, &file).await);
            for _ in 0..50 {
                quiet.push(one().await);
            }
        }
    }
    running.stop().await;
    println!(
        "compile: {} modules of {} MB in {:.1} s each; {} rows in either column",
        compiled.len(),
        module.len() / 1_000_000,
        median(&compiled),
        quiet.len()
    );
    for (name, part) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
        let (beside, quiet) = (quantile(&beside, part), quantile(&quiet, part));
        println!(
            "compile: {name} {beside:.2} ms beside a compilation, {quiet:.2} without; ratio {:.2}",
            beside / quiet
        );
    }
}

async fn is_live(home: &Home, file: &str) -> bool {
    let list = home.json(&["transforms", "list"]).await;
    let all = list["transforms"].as_array().unwrap();
    let Some(entry) = all.iter().find(|entry| entry["file"] == file) else { return false };
    assert_ne!(entry["state"], "rejected", "{file}: {}", entry["reason"]);
    entry["state"] == "live"
}

/// The project that `transforms new` writes, built by the commands of its README.
fn javascript(dir: &Path) -> Vec<u8> {
    let program = Path::new(env!("CARGO_BIN_EXE_sluicebox"));
    let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
    run(Command::new(program)
        .args(["transforms", "new", "script", "--lang", "js"])
        .current_dir(dir));
    let project = dir.join("script");
    let readme = std::fs::read_to_string(project.join("README.md")).unwrap();
    let commands = readme.split("```").nth(1).unwrap().strip_prefix("sh\n").unwrap();
    let path =
        format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let modules = dir.join("transforms");
    std::fs::create_dir(&modules).unwrap();
    for line in commands.lines() {
        let line = line.replace("TRANSFORMS", &modules.display().to_string());
        let mut sh = Command::new("sh");
        sh.args(["-e", "-c", &line]).current_dir(&project).env("PATH", &path);
        run(sh.env("XDG_CACHE_HOME", CACHE));
    }
    let module = std::fs::read_dir(&modules).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        (path.extension()? == "wasm").then_some(path)
    });
    std::fs::read(module.unwrap()).unwrap()
}
