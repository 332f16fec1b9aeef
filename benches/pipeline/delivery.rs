//! What the guarantees cost, and how soon they are kept.
//!
//! - *exactly once*: CPU of a change with all that makes it exactly once, beside the same build
//!   without (`sink.mode = "unguarded"`), in interleaved pairs over the same log.
//! - *recovery*: `kill -9` in the middle of a backlog; from the start of the next process to its
//!   first acknowledged record. The stream's end, up to the last checkpoint, is read in between.
//! - *latency*: one row at a time; from the commit's return to the record in the stream, beside one
//!   record of that size appended by the same client to another stream of the same server. The
//!   stream's end is asked for again and again, which adds up to one such request.
//! - *waiting*: CPU of a change with 100 parked and 100,000 waiting messages in the store, beside a
//!   store without, in interleaved pairs.
//! - *outage*: S2 is away: how fast changes are spilled, how fast they are delivered afterwards, and
//!   the peak of memory; with rows of about 1 KiB and of 100 MiB.

use std::time::{Duration, Instant};

use sluicebox::pipeline::size_gate;
use sluicebox::sink::headers::Headers;
use sluicebox::sink::record::Record;
use sluicebox::sink::{Append, Session};

use crate::Options;
use crate::measure::{
    DOCUMENTS, MIB, TRANSACTION_ROWS, Writer, client, create_documents, create_events, delivered,
    home, home_with, insert_documents, insert_events, median, quantile, server, until,
    until_delivered, usage, write,
};
use crate::support::postgres::{Cluster, Database};
use crate::support::s2::Server;
use crate::support::sluicebox::Home;
use crate::support::world::{BASIN, STREAM};

const EVENTS: &str = "public.events";

/// Where both servers keep all records of ten pairs, some 2 KiB of memory each.
const PAIR_ROWS_MAX: u64 = 200_000;

pub async fn run(cluster: &Cluster, options: &Options) {
    if options.wants("latency") {
        latency(cluster, options).await;
    }
    if options.wants("recovery") {
        recovery(cluster, options).await;
    }
    if options.wants("exactly once") {
        exactly_once(cluster, options).await;
    }
    if options.wants("waiting") {
        waiting(cluster, options).await;
    }
    if options.wants("outage") {
        outage(cluster, options).await;
        huge_outage(cluster, options).await;
    }
}

/// Makes the slot and the place in the stream, before the rows are written.
async fn prepare(home: &Home) {
    home.start().ready().await.stop().await;
}

/// Delivers what is there, and returns the CPU of a change in microseconds. The first tenth, with the
/// start of the process, is left out.
async fn cpu_of_a_change(home: &Home, rows: u64) -> f64 {
    let running = home.start();
    until_delivered(home, rows / 10).await;
    let (before, _) = usage(running.pid());
    let first = delivered(home).await;
    until_delivered(home, rows).await;
    let (after, _) = usage(running.pid());
    running.stop().await;
    (after - before).as_secs_f64() * 1e6 / (rows - first) as f64
}

/// Writes the rows of a pair, and has both deliver them. Each is the first as often as the other.
async fn cpu_of_a_pair(
    database: &Database<'_>,
    homes: [&Home; 2],
    pair: u64,
    rows: u64,
) -> (f64, f64) {
    let insert = |first, last| insert_events(EVENTS, first, last);
    let first = pair * rows + 1;
    write(database, first, first + rows - 1, TRANSACTION_ROWS, insert).await;
    let mut measured = [0.0; 2];
    for index in if pair.is_multiple_of(2) { [0, 1] } else { [1, 0] } {
        measured[index] = cpu_of_a_change(homes[index], rows).await;
    }
    measured.into()
}

fn print_pairs(name: &str, with: &str, without: &str, pairs: &[(f64, f64)]) {
    let ratios: Vec<f64> = pairs.iter().map(|(with, without)| with / without).collect();
    let withs: Vec<f64> = pairs.iter().map(|pair| pair.0).collect();
    let withouts: Vec<f64> = pairs.iter().map(|pair| pair.1).collect();
    println!(
        "{name}: {:.2} µs of CPU a change {with}, {:.2} {without}; medians of {} pairs; ratio {:.3} \
         (from {:.3} to {:.3})",
        median(&withs),
        median(&withouts),
        pairs.len(),
        median(&ratios),
        quantile(&ratios, 0.0),
        quantile(&ratios, 1.0)
    );
}

async fn exactly_once(cluster: &Cluster, options: &Options) {
    let database = cluster.database("guarded").await;
    create_events(&database, EVENTS).await;
    let mut pairs = Vec::new();
    for pair in 0..if options.quick { 2 } else { 10 } {
        let mut variants = Vec::new();
        for mode in ["session", "unguarded"] {
            let server = server().await;
            let sink = format!("mode = \"{mode}\"");
            let home = home_with(&database, &server, &format!("{mode}_{pair}"), &[EVENTS], &sink);
            prepare(&home).await;
            variants.push((home, server));
        }
        let homes = [&variants[0].0, &variants[1].0];
        pairs.push(cpu_of_a_pair(&database, homes, pair, options.rows).await);
        for (home, _) in variants {
            let slot = &home.settings.slot;
            database.run(&format!("select pg_drop_replication_slot('{slot}')")).await;
        }
    }
    print_pairs("exactly once", "with it", "without", &pairs);
}

async fn recovery(cluster: &Cluster, options: &Options) {
    let database = cluster.database("recovery").await;
    create_events(&database, EVENTS).await;
    let server = server().await;
    let home = home(&database, &server, "recovery", &[EVENTS]);
    prepare(&home).await;
    let rounds = if options.quick { 3 } else { 10 };
    let insert = |first, last| insert_events(EVENTS, first, last);
    write(&database, 1, options.rows, TRANSACTION_ROWS, insert).await;
    let writer =
        Writer::start(&database, EVENTS, options.rows + 1, TRANSACTION_ROWS, Duration::ZERO).await;
    let mut took = Vec::new();
    let mut running = home.start();
    for _ in 0..rounds {
        // Far enough from the beginning that much is under way, with enough left for the others.
        until_delivered(&home, options.rows / (rounds * 2)).await;
        running.kill().await;
        let started = Instant::now();
        running = home.start();
        let first = until(&home, "the first record", async || delivered(&home).await > 0).await;
        took.push((first - started).as_secs_f64() * 1e3);
    }
    drop(writer);
    running.kill().await;
    println!(
        "recovery: first record {:.0} ms after the start behind kill -9 under full load (median of \
         {rounds}), {:.0} ms at most",
        median(&took),
        quantile(&took, 1.0)
    );
}

async fn latency(cluster: &Cluster, options: &Options) {
    let database = cluster.database("latency").await;
    create_events(&database, EVENTS).await;
    let server = server().await;
    server.create_stream(BASIN, "alone").await;
    let home = home(&database, &server, "latency", &[EVENTS]);
    let running = home.start().ready().await;
    let (stream, alone) = (client(&server, STREAM), client(&server, "alone"));
    let mut session = Session::open(&alone);
    let postgres = database.connect().await;
    let (mut ours, mut sinks) = (Vec::new(), Vec::new());
    for n in 1..=if options.quick { 200 } else { 1000 } {
        let tail = stream.tail().await.unwrap().next_seq;
        postgres.batch_execute(&insert_events(EVENTS, n, n)).await.unwrap();
        let committed = Instant::now();
        while stream.tail().await.unwrap().next_seq == tail {}
        ours.push(committed.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(5 + n % 7)).await;

        let record = Record {
            timestamp_ms: None,
            headers: Headers::default(),
            body: vec![b'x'; 1200].into(),
        };
        let records = [size_gate::check(record).unwrap()];
        let appended = Instant::now();
        let records = &records.each_ref();
        let append = Append { records, match_seq_num: None, fencing_token: None };
        session.send(append).unwrap();
        session.next_ack().await.unwrap();
        sinks.push(appended.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(5 + n % 7)).await;
    }
    running.stop().await;
    for (name, values) in [("commit to record in S2", &ours), ("S2 alone", &sinks)] {
        println!(
            "latency: {name}: p50 {:.2} ms, p90 {:.2}, p99 {:.2}, most {:.2}",
            median(values),
            quantile(values, 0.9),
            quantile(values, 0.99),
            quantile(values, 1.0)
        );
    }
}

async fn waiting(cluster: &Cluster, options: &Options) {
    let database = cluster.database("waiting").await;
    create_events(&database, EVENTS).await;
    database.run("create table documents (id bigint primary key, n int, body text)").await;
    database.run("alter table documents alter body set storage external").await;
    let mut variants = Vec::new();
    for (slot, tables) in
        [("waiting", [EVENTS, "public.documents"].as_slice()), ("nothing", &[EVENTS])]
    {
        let server = server().await;
        let home = home(&database, &server, slot, tables);
        // Small records: the servers keep all of them in memory.
        let strip = ["strip-columns", "--column", "body", "--table", EVENTS];
        home.ok(&[["transforms", "add"].as_slice(), &strip].concat()).await;
        prepare(&home).await;
        variants.push((home, server));
    }
    let updates = if options.quick { 100 } else { 1000 };
    let home = &variants[0].0;
    let running = home.start().ready().await;
    database
        .run(
            "insert into documents select n, 0, repeat(md5(n::text), 40000) \
             from generate_series(1, 100) n",
        )
        .await;
    for _ in 0..updates {
        database.run("update documents set n = n + 1").await;
    }
    until(home, "messages to wait", async || {
        let Ok(status) = home.status().await else { return false };
        status["parked"] == 100 && status["waiting"] == 100 * updates
    })
    .await;
    running.stop().await;
    let mut pairs = Vec::new();
    for pair in 0..if options.quick { 2 } else { 10 } {
        let homes = [&variants[0].0, &variants[1].0];
        let rows = options.rows.min(PAIR_ROWS_MAX);
        pairs.push(cpu_of_a_pair(&database, homes, pair, rows).await);
    }
    let with = format!("with 100 parked and {} waiting messages", 100 * updates);
    print_pairs("waiting", &with, "with none", &pairs);
}

/// A server that keeps its stream when it is killed, and a home that spills soon.
async fn spilling(
    database: &Database<'_>,
    dir: &std::path::Path,
    tables: &[&str],
) -> (Home, Server) {
    let server = Server::on_disk(dir).await;
    server.create_basin(BASIN).await;
    server.create_stream(BASIN, STREAM).await;
    let mut home = home(database, &server, &database.name, tables);
    home.settings.sections =
        "[delivery]\nspill_after = \"500ms\"\nspill_max = \"8GiB\"\n".to_owned();
    // Written as it is between quotes.
    home.settings.state = "state\"\nbytes_max = \"16GiB".to_owned();
    home.write_config();
    prepare(&home).await;
    (home, server)
}

async fn outage(cluster: &Cluster, options: &Options) {
    let database = cluster.database("outage").await;
    create_events(&database, EVENTS).await;
    let dir = tempfile::tempdir().unwrap();
    let (home, server) = spilling(&database, dir.path(), &[EVENTS]).await;
    let insert = |first, last| insert_events(EVENTS, first, last);
    write(&database, 1, options.rows, TRANSACTION_ROWS, insert).await;
    server.kill().await;
    let running = home.start();
    let spilled = async || home.status().await.ok().and_then(|s| s["spilled_changes"].as_u64());
    let first = until(&home, "spilling", async || spilled().await.unwrap_or(0) > 0).await;
    let last = until(&home, "all to be spilled", async || spilled().await == Some(options.rows));
    let spilling = (last.await - first).as_secs_f64();
    let (cpu, memory) = usage(running.pid());
    println!(
        "outage: {:.0} changes a second are spilled, {:.2} µs of CPU each, {:.0} MiB at most",
        options.rows as f64 / spilling,
        cpu.as_secs_f64() * 1e6 / options.rows as f64,
        memory as f64 / MIB
    );
    server.up().await;
    let first = until(&home, "a record", async || delivered(&home).await > 0).await;
    let last = until_delivered(&home, options.rows).await;
    let (after, memory) = usage(running.pid());
    println!(
        "outage: {:.0} changes a second are delivered afterwards, {:.2} µs of CPU each, {:.0} MiB at \
         most",
        options.rows as f64 / (last - first).as_secs_f64(),
        (after - cpu).as_secs_f64() * 1e6 / options.rows as f64,
        memory as f64 / MIB
    );
    running.stop().await;
}

async fn huge_outage(cluster: &Cluster, options: &Options) {
    let (rows, row_mib) = if options.quick { (3, 20) } else { (10, 100) };
    let database = cluster.database("huge_outage").await;
    create_documents(&database).await;
    let dir = tempfile::tempdir().unwrap();
    let (home, server) = spilling(&database, dir.path(), &[DOCUMENTS]).await;
    home.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    write(&database, 1, rows, 1, |first, last| insert_documents(first, last, row_mib)).await;
    server.kill().await;
    let running = home.start();
    let spilled = async || home.status().await.ok().and_then(|s| s["spilled_changes"].as_u64());
    until(&home, "all to be spilled", async || spilled().await == Some(rows)).await;
    let away = usage(running.pid()).1;
    server.up().await;
    until_delivered(&home, rows).await;
    let back = usage(running.pid()).1;
    println!(
        "outage: {rows} rows of {row_mib} MiB: {:.0} MiB of memory at most while they are spilled, {:.0} \
         until they are delivered",
        away as f64 / MIB,
        back as f64 / MIB
    );
    running.stop().await;
}
