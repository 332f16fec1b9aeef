//! What the parts share: rows of about 1 KiB, a server, and what the kernel says of a process.

use std::time::{Duration, Instant};

use sluicebox::sink::{Client, Endpoint, Settings};

use crate::support::postgres::Database;
use crate::support::s2::Server;
use crate::support::sluicebox::Home;
use crate::support::world::{BASIN, STREAM, settings};

pub const MIB: f64 = 1024.0 * 1024.0;

/// Rows of one transaction.
pub const TRANSACTION_ROWS: u64 = 1_000;

/// A server in memory with the basin and the stream.
pub async fn server() -> Server {
    let server = Server::in_memory().await;
    server.create_basin(BASIN).await;
    server.create_stream(BASIN, STREAM).await;
    server
}

/// Our own client of a server's stream: quick enough to look at its end all the time.
pub fn client(server: &Server, stream: &str) -> Client {
    let mut settings = Settings::new(BASIN, stream);
    settings.endpoint = Endpoint::Url(server.endpoint());
    Client::new(settings).unwrap()
}

/// A home of its own slot, so that several can read the same log.
pub fn home(database: &Database<'_>, server: &Server, slot: &str, tables: &[&str]) -> Home {
    home_with(database, server, slot, tables, "")
}

/// With more under `[sink]`.
pub fn home_with(
    database: &Database<'_>,
    server: &Server,
    slot: &str,
    tables: &[&str],
    sink: &str,
) -> Home {
    let mut settings = settings(database, &server.endpoint(), tables);
    settings.slot = slot.to_owned();
    settings.publication = format!("{slot}_publication");
    settings.sink = sink.to_owned();
    Home::new(settings)
}

/// The table of rows of about 1 KiB.
pub async fn create_events(database: &Database<'_>, table: &str) {
    let sql = format!(
        "create table {table} (id bigint primary key, customer int, amount numeric, \
         active bool, created timestamptz, tags jsonb, title text, body text)"
    );
    database.run(&sql).await;
}

/// Such rows, numbered so.
pub fn insert_events(table: &str, first: u64, last: u64) -> String {
    format!(
        "insert into {table} select n, n % 1000, n * 0.01, n % 2 = 0, now(), \
         jsonb_build_object('kind', 'order', 'n', n), 'event number ' || n, \
         repeat(md5(n::text), 26) from generate_series({first}, {last}) n"
    )
}

pub const DOCUMENTS: &str = "public.documents";

/// The table of rows over S2's limit. Their text is not compressed, so that it is as long in the log.
pub async fn create_documents(database: &Database<'_>) {
    let sql = format!("create table {DOCUMENTS} (id bigint primary key, title text, body text)");
    database.run(&sql).await;
    database.run(&format!("alter table {DOCUMENTS} alter body set storage external")).await;
}

/// Such rows, numbered so.
pub fn insert_documents(first: u64, last: u64, row_mib: usize) -> String {
    format!(
        "insert into {DOCUMENTS} select n, 'document ' || n, repeat(md5(n::text), {}) \
         from generate_series({first}, {last}) n",
        row_mib * 1024 * 1024 / 32
    )
}

/// Writes rows, so many in a transaction.
pub async fn write(
    database: &Database<'_>,
    first: u64,
    last: u64,
    transaction_rows: u64,
    insert: impl Fn(u64, u64) -> String,
) {
    let client = database.connect().await;
    let mut next = first;
    while next <= last {
        let end = (next + transaction_rows - 1).min(last);
        client.batch_execute(&insert(next, end)).await.unwrap();
        next = end + 1;
    }
}

/// Writes on until it is dropped.
pub struct Writer(tokio::task::JoinHandle<()>);

impl Writer {
    /// So many rows in a transaction, numbered from `first`, with a pause behind each.
    pub async fn start(
        database: &Database<'_>,
        table: &'static str,
        first: u64,
        rows: u64,
        pause: Duration,
    ) -> Self {
        let client = database.connect().await;
        Self(tokio::spawn(async move {
            let mut next = first;
            loop {
                client.batch_execute(&insert_events(table, next, next + rows - 1)).await.unwrap();
                next += rows;
                tokio::time::sleep(pause).await;
            }
        }))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How many records the process has delivered, once it answers.
pub async fn delivered(home: &Home) -> u64 {
    home.status().await.ok().and_then(|status| status["records"].as_u64()).unwrap_or(0)
}

/// Waits until the process has delivered so many records.
pub async fn until_delivered(home: &Home, records: u64) -> Instant {
    until(home, &format!("{records} records"), async || delivered(home).await >= records).await
}

/// Waits for what a benchmark needs, looking often.
pub async fn until(home: &Home, what: &str, mut seen: impl AsyncFnMut() -> bool) -> Instant {
    let deadline = Instant::now() + Duration::from_secs(900);
    while !seen().await {
        if Instant::now() > deadline {
            panic!("waited in vain for {what}: {:?}\n{}", home.status().await, home.log());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Instant::now()
}

/// User and system time of a process, and the peak of its resident memory in bytes.
pub fn usage(pid: u32) -> (Duration, u64) {
    // The kernel counts in hundredths of a second for user space on every Linux.
    const TICKS_PER_SECOND: u64 = 100;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name before it may hold spaces.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    (Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND), kib * 1024)
}

/// The value that this part of the others does not exceed: 0.5 for the median.
pub fn quantile(values: &[f64], part: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let last = (values.len() - 1) as f64;
    let above = values.iter().enumerate().find(|(index, _)| *index as f64 >= last * part);
    *above.unwrap().1
}

pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}
