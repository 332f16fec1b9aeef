//! How fast: changes a second beside what bounds them, CPU of a change, and peak memory.
//!
//! In one run, against the same data in one Postgres: `pg_recvlogical` to /dev/null (what the
//! source can give), the sink alone (what s2-lite takes on this machine), and `sluicebox run` with a
//! fresh s2-lite in memory for each variant. Every variant has a slot of its own that exists before
//! the rows are written, so that all of them read the same write-ahead log.
//!
//! A rate counts from the moment when Postgres has sent the first of the rows until the last one is
//! settled, for `pg_recvlogical` as for Sluicebox. `pg_recvlogical` reads twice, before and behind
//! the variants, because the first to read finds cold caches; ratios are to the better of the two.

use std::process::Stdio;
use std::time::{Duration, Instant};

use sluicebox::change::Lsn;
use sluicebox::pipeline::size_gate::{self, SizedRecord};
use sluicebox::sink::headers::Headers;
use sluicebox::sink::record::{Header, Record};
use sluicebox::sink::session::BatchMeter;
use sluicebox::sink::{Append, Session};

use crate::Options;
use crate::measure::{
    DOCUMENTS, MIB, TRANSACTION_ROWS, client, create_documents, create_events, insert_documents,
    insert_events, server, until_delivered, usage, write,
};
use crate::support::postgres::{Cluster, Database};
use crate::support::s2::Server;
use crate::support::sluicebox::Home;
use crate::support::world::{STREAM, settings};

/// Unacknowledged bytes of the sink alone, the pipeline's own default.
const WINDOW_BYTES: u64 = 16 * 1024 * 1024;

pub async fn run(cluster: &Cluster, options: &Options) {
    small_rows(cluster, options).await;
    let rows = (options.rows / 1000).max(20);
    documents(cluster, options, "large", rows, 2).await;
    let (rows, row_mib) = if options.quick { (2, 20) } else { (10, 100) };
    documents(cluster, options, "huge", rows, row_mib).await;
}

/// Where a variant's records go.
#[derive(Clone, Copy, PartialEq)]
enum Sink {
    /// The stream is opened as ever; batches are encoded, and acknowledged without being sent.
    Discard,
    S2,
}

/// One way to run the pipeline, prepared before the rows are written.
struct Variant {
    name: &'static str,
    home: Home,
    /// The server of this variant alone.
    _s2: Server,
}

impl Variant {
    /// Runs the pipeline once, until it has its slot and its place in the stream.
    async fn prepare(
        database: &Database<'_>,
        name: &'static str,
        table: &str,
        sink: Sink,
        strip: Option<&str>,
    ) -> Self {
        let server = server().await;
        let mut settings = settings(database, &server.endpoint(), &[table]);
        if sink == Sink::Discard {
            settings.sink = "mode = \"discard\"".to_owned();
        }
        settings.slot =
            format!("bench_{}", name.replace(|c: char| !c.is_ascii_alphanumeric(), "_"));
        settings.slot.make_ascii_lowercase();
        settings.publication = table.replace('.', "_");
        let home = Home::new(settings);
        if let Some(column) = strip {
            home.ok(&["transforms", "add", "strip-columns", "--column", column]).await;
        }
        home.start().ready().await.stop().await;
        Self { name, home, _s2: server }
    }

    /// Delivers everything, and measures.
    async fn run(self, data: &Data<'_>) -> Measured {
        let running = self.home.start();
        let first = data.first_sent(&self.home.settings.slot).await;
        let last = until_delivered(&self.home, data.rows).await;
        let (cpu, memory) = usage(running.pid());
        running.stop().await;
        Measured { name: self.name, took: last - first, cpu: Some(cpu), memory: Some(memory) }
    }
}

/// What is read by every variant of a table.
struct Data<'a> {
    database: &'a Database<'a>,
    rows: u64,
    /// Of the rows' values, in bytes.
    bytes: u64,
    start: Lsn,
    end: Lsn,
}

impl Data<'_> {
    /// Waits until Postgres has sent the first of the rows through this slot.
    async fn first_sent(&self, slot: &str) -> Instant {
        let client = self.database.connect().await;
        let sql = format!(
            "select 1 from pg_stat_replication r join pg_replication_slots s \
             on s.active_pid = r.pid where s.slot_name = '{slot}' and r.sent_lsn > '{}'",
            self.start
        );
        let deadline = Instant::now() + Duration::from_secs(120);
        while client.query(&sql, &[]).await.unwrap().is_empty() {
            assert!(Instant::now() < deadline, "nothing was sent through {slot}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Instant::now()
    }
}

struct Measured {
    name: &'static str,
    took: Duration,
    cpu: Option<Duration>,
    /// Peak, in bytes.
    memory: Option<u64>,
}

fn print(title: &str, data: &Data<'_>, measured: &[Measured]) {
    println!("\n{title}: {} changes, {:.0} MiB", data.rows, data.bytes as f64 / MIB);
    println!(
        "{:<34} {:>10} {:>8} {:>8} {:>12} {:>9}",
        "", "changes/s", "MiB/s", "ratio", "CPU µs/chg", "peak MiB"
    );
    let rate = |m: &Measured| data.rows as f64 / m.took.as_secs_f64();
    let base = measured.iter().filter(|m| m.name == RECVLOGICAL).map(rate).reduce(f64::max);
    for m in measured {
        let cpu = m.cpu.map(|cpu| format!("{:.2}", cpu.as_secs_f64() * 1e6 / data.rows as f64));
        let memory = m.memory.map(|bytes| format!("{:.0}", bytes as f64 / MIB));
        println!(
            "{:<34} {:>10.0} {:>8.1} {:>8.2} {:>12} {:>9}",
            m.name,
            rate(m),
            data.bytes as f64 / MIB / m.took.as_secs_f64(),
            rate(m) / base.unwrap_or(f64::NAN),
            cpu.unwrap_or_default(),
            memory.unwrap_or_default()
        );
    }
}

async fn small_rows(cluster: &Cluster, options: &Options) {
    let database = cluster.database("small").await;
    let table = "public.events";
    create_events(&database, table).await;
    let mut variants = Vec::new();
    for (name, sink, strip) in [
        ("discard", Sink::Discard, None),
        ("discard, strip-columns", Sink::Discard, Some("body")),
        ("s2-lite", Sink::S2, None),
        ("s2-lite, strip-columns", Sink::S2, Some("body")),
        // The cost of the transform alone: it is called, and everything is kept.
        ("discard, strip nothing", Sink::Discard, Some("absent")),
        ("s2-lite, strip nothing", Sink::S2, Some("absent")),
    ] {
        if options.wants(name) {
            variants.push(Variant::prepare(&database, name, table, sink, strip).await);
        }
    }
    let insert = |first, last| insert_events(table, first, last);
    let data = fill(&database, table, options.rows, TRANSACTION_ROWS, insert).await;
    let [first, last] = recvlogical_slots(table);
    let mut measured = vec![recvlogical(&data, table, &first).await];
    if options.wants("sink alone") {
        measured.push(sink_alone(options.rows).await);
    }
    for variant in variants {
        measured.push(variant.run(&data).await);
    }
    measured.push(recvlogical(&data, table, &last).await);
    print("Rows of about 1 KiB", &data, &measured);
}

/// Rows over S2's limit, whose large column is stripped.
async fn documents(
    cluster: &Cluster,
    options: &Options,
    name: &'static str,
    rows: u64,
    row_mib: usize,
) {
    if !options.wants(name) {
        return;
    }
    let database = cluster.database(name).await;
    create_documents(&database).await;
    let variant = Variant::prepare(&database, name, DOCUMENTS, Sink::S2, Some("body")).await;
    let insert = |first, last| insert_documents(first, last, row_mib);
    let data = fill(&database, DOCUMENTS, rows, 1, insert).await;
    let [first, last] = recvlogical_slots(DOCUMENTS);
    let measured = vec![
        recvlogical(&data, DOCUMENTS, &first).await,
        variant.run(&data).await,
        recvlogical(&data, DOCUMENTS, &last).await,
    ];
    print(&format!("Rows of {row_mib} MiB, s2-lite, strip-columns"), &data, &measured);
}

/// Writes the rows, so many per transaction, for slots that exist and for those of the source alone.
async fn fill<'a>(
    database: &'a Database<'a>,
    table: &str,
    rows: u64,
    transaction_rows: u64,
    insert: impl Fn(u64, u64) -> String,
) -> Data<'a> {
    // The source alone reads by slots of its own, of the publication that the variants share.
    let publication = table.replace('.', "_");
    let missing = format!("select 1 from pg_publication where pubname = '{publication}'");
    if database.value(&missing).await.is_none() {
        database.run(&format!("create publication {publication} for table {table}")).await;
    }
    for slot in recvlogical_slots(table) {
        let sql = format!("select pg_create_logical_replication_slot('{slot}', 'pgoutput')");
        database.run(&sql).await;
    }
    let lsn = async || {
        let text = database.value("select pg_current_wal_insert_lsn()").await.unwrap();
        text.parse::<Lsn>().unwrap()
    };
    eprintln!("writing {rows} rows into {table}");
    let start = lsn().await;
    write(database, 1, rows, transaction_rows, insert).await;
    let end = lsn().await;
    // `--endpos` ends at the first message behind it.
    database.run("select pg_logical_emit_message(true, 'bench', 'end')").await;
    let sum = format!("select sum(octet_length(t::text)::int8) from {table} t");
    let bytes = database.value(&sum).await.unwrap().parse().unwrap();
    Data { database, rows, bytes, start, end }
}

const RECVLOGICAL: &str = "pg_recvlogical";

/// One for each time that it reads.
fn recvlogical_slots(table: &str) -> [String; 2] {
    ["first", "last"].map(|time| format!("recv_{}_{time}", table.replace('.', "_")))
}

/// The limit of the source: what Postgres's own client takes and throws away.
async fn recvlogical(data: &Data<'_>, table: &str, slot: &str) -> Measured {
    let cluster = data.database.cluster;
    let mut command = tokio::process::Command::new(cluster.bin().join("pg_recvlogical"));
    command.arg("--dbname").arg(data.database.url()).args(["--slot", slot, "--start"]);
    command.args(["--no-loop", "--file", "/dev/null", "--option", "proto_version=1"]);
    command.arg("--option").arg(format!("publication_names={}", table.replace('.', "_")));
    command.args(["--endpos", &data.end.to_string(), "--status-interval", "1"]);
    let mut child = command.stdin(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    let first = data.first_sent(slot).await;
    let status = child.wait().await.unwrap();
    assert!(status.success(), "pg_recvlogical: {status}");
    data.database.run(&format!("select pg_drop_replication_slot('{slot}')")).await;
    Measured { name: RECVLOGICAL, took: first.elapsed(), cpu: None, memory: None }
}

/// The limit of the sink: records that are ready, appended as the pipeline appends them.
async fn sink_alone(records: u64) -> Measured {
    let server = server().await;
    let client = client(&server, STREAM);
    let batch = batch();
    let batch: Vec<&SizedRecord> = batch.iter().collect();
    let batch_bytes: u64 = batch.iter().map(|record| record.metered_bytes()).sum();
    let mut session = Session::open(&client);
    let (mut sent, mut acknowledged, mut under_way) = (0, 0, 0);
    let started = Instant::now();
    while acknowledged < records {
        while sent < records && under_way + batch_bytes <= WINDOW_BYTES {
            let records = &batch[..batch.len().min(usize::try_from(records - sent).unwrap())];
            let append = Append { records, match_seq_num: Some(sent), fencing_token: None };
            session.send(append).unwrap();
            sent += records.len() as u64;
            under_way += batch_bytes;
        }
        acknowledged = session.next_ack().await.unwrap().end;
        under_way -= batch_bytes;
    }
    Measured { name: "sink alone", took: started.elapsed(), cpu: None, memory: None }
}

/// One full batch of records of about 1 KiB, with headers as the pipeline's records have them.
fn batch() -> Vec<SizedRecord> {
    let header =
        |name: &'static str, value: &'static str| Header { name: name.into(), value: value.into() };
    let record = Record {
        timestamp_ms: Some(1_750_000_000_000),
        headers: Headers::from_iter([
            header("sb-pipeline", "0123456789abcdef"),
            header("sb-key", "MTIzNDU2Nzg5MDEyOjEyMw=="),
            header("sb-part", "0/1"),
            header("sb-table", "public.events"),
            header("sb-action", "insert"),
            header("sb-chain", "1:0123456789abcdef"),
        ]),
        body: vec![b'x'; 1024 - 160].into(),
    };
    let record = size_gate::check(record).unwrap();
    let mut meter = BatchMeter::default();
    let mut batch = Vec::new();
    while meter.try_add(&record) {
        batch.push(record.clone());
    }
    batch
}
