//! Random work on a table with a ledger of what was committed, and the judgement over the whole
//! stream: every committed change once, none that was rolled back, each row's changes in their
//! order, positions rising, every record within S2's limit, and the stream folded into a table
//! equals the table.
//!
//! Each writer owns its rows, so that the order of its operations is the commit order of each
//! row's changes. The ledger is a table of the same database, written in the same transactions:
//! a commit whose answer was lost is in it or not, as Postgres decided.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::postgres::{Database, try_connect};
use super::s2::{Record, data};
use super::world::{BASIN, STREAM, World};
use super::{PATIENCE, Random, until};

/// The metered limit of a record, as S2 documents it.
const RECORD_BYTES_MAX: usize = 1024 * 1024;

/// Longer than any record can be.
const OVERSIZE_BYTES: usize = 1_200_000;

/// The tables that a [`Workload`] writes. `items` is what the tests publish; `orders`, whose groups are
/// customers, and `shapes`, whose columns change, are for tests that write them.
pub const TABLES: &str = "
    create table items (
        id bigint primary key, op bigint not null, label text not null, body text
    );
    create table pairs (a bigint, b bigint, op bigint not null, body text, primary key (a, b));
    create table bag (a bigint, op bigint, label text);
    alter table bag replica identity full;
    create table pad (id bigint primary key, op bigint not null);
    create table orders (id bigint primary key, customer bigint not null, op bigint not null, body text);
    create unique index orders_replica_identity on orders (customer, id);
    alter table orders replica identity using index orders_replica_identity;
    create table shapes (id bigint primary key);
    create table ledger (
        op bigint primary key, id bigint not null, action text not null,
        at pg_lsn not null default pg_current_wal_insert_lsn()
    );";

/// What the writers do, drawn from a seed.
#[derive(Debug, Clone)]
pub struct Workload {
    pub url: String,
    pub seed: u64,
    pub writers: u64,
    /// Rows that each writer owns.
    pub rows: u64,
    /// A transaction has one operation to so many.
    pub operations: u64,
    /// Of each writer between its transactions.
    pub pause: Duration,
    /// One insert in so many has a body that no record can hold; 0: none has.
    pub oversize_one_in: u64,
    /// Also writes the tables with other keys, which [`judge`] leaves to `sluicebox verify`: one of
    /// two columns, whose keys are changed, one without a key, and one that is truncated.
    pub more_tables: bool,
}

/// Writers at work.
#[derive(Debug)]
pub struct Work {
    stop: Arc<AtomicBool>,
    commits: Arc<AtomicU64>,
    writers: Vec<JoinHandle<()>>,
}

impl Workload {
    /// So many writers with forty rows each, all of which a record can hold, and a seed of the moment.
    pub fn new(url: String, writers: u64) -> Self {
        Self {
            url,
            seed: Random::seed(),
            writers,
            rows: 40,
            operations: 4,
            // Leaves most of two cores to the pipeline, and to the other tests.
            pause: Duration::from_millis(4),
            oversize_one_in: 0,
            more_tables: false,
        }
    }

    /// Creates nothing: the tables of [`TABLES`] must be there.
    pub fn start(&self) -> Work {
        let stop = Arc::new(AtomicBool::new(false));
        let commits = Arc::new(AtomicU64::new(0));
        let writer = |number| {
            let writer = Writer {
                workload: self.clone(),
                random: Random::new(self.seed ^ (number * 0x1_0001)),
                first_id: number * 1_000_000,
                next_op: number * 1_000_000_000,
            };
            tokio::spawn(writer.work(Arc::clone(&stop), Arc::clone(&commits)))
        };
        let writers = (1..=self.writers).map(writer).collect();
        Work { stop, commits, writers }
    }
}

impl Work {
    /// Waits until so many more transactions were committed.
    pub async fn commits(&self, more: u64) {
        let goal = self.commits.load(Ordering::Relaxed) + more;
        until(&format!("{more} commits"), async || {
            let commits = self.commits.load(Ordering::Relaxed);
            if commits >= goal { Ok(()) } else { Err(format!("{commits} of {goal}")) }
        })
        .await;
    }

    /// Lets each writer finish its transaction, and ends it.
    pub async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
    }
}

struct Writer {
    workload: Workload,
    random: Random,
    first_id: u64,
    next_op: u64,
}

impl Writer {
    async fn work(mut self, stop: Arc<AtomicBool>, commits: Arc<AtomicU64>) {
        let mut connection: Option<(Client, BTreeSet<u64>)> = None;
        let mut failing_since: Option<Instant> = None;
        while !stop.load(Ordering::Relaxed) {
            let done = match &mut connection {
                Some((client, live)) => self.transaction(client, live).await,
                None => self.connect().await.map(|opened| {
                    connection = Some(opened);
                    false
                }),
            };
            match done {
                Ok(committed) => {
                    failing_since = None;
                    commits.fetch_add(u64::from(committed), Ordering::Relaxed);
                    tokio::time::sleep(self.workload.pause).await;
                }
                // Tests restart the server under us: what was committed is read from the ledger.
                Err(error) => {
                    connection = None;
                    let since = *failing_since.get_or_insert_with(Instant::now);
                    assert!(since.elapsed() < PATIENCE, "the writer cannot go on: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// A connection, and the rows of ours that exist.
    async fn connect(&self) -> Result<(Client, BTreeSet<u64>), tokio_postgres::Error> {
        let client = try_connect(&self.workload.url).await?;
        let (first, last) = (self.first_id, self.first_id + self.workload.rows);
        let sql = format!("select id::text from items where id >= {first} and id < {last}");
        let mut live = BTreeSet::new();
        for message in client.simple_query(&sql).await? {
            if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
                let id = row.get(0).expect("ids are not null");
                live.insert(id.parse().expect("ids are numbers"));
            }
        }
        Ok((client, live))
    }

    /// Now and then rolled back, whole or in part. Says whether it was committed.
    async fn transaction(
        &mut self,
        client: &Client,
        live: &mut BTreeSet<u64>,
    ) -> Result<bool, tokio_postgres::Error> {
        let mut after = live.clone();
        let mut sql = String::from("begin;");
        for _ in 0..=self.random.below(self.workload.operations) {
            if self.random.one_in(12) {
                sql.push_str("savepoint s;");
                self.operation(&mut sql, &mut after.clone());
                sql.push_str("rollback to savepoint s;");
            } else {
                self.operation(&mut sql, &mut after);
            }
        }
        if self.workload.more_tables {
            self.more(&mut sql);
        }
        let commit = !self.random.one_in(10);
        sql.push_str(if commit { "commit" } else { "rollback" });
        if let Err(error) = client.batch_execute(&sql).await {
            assert!(
                error.as_db_error().is_none_or(is_the_server_leaving),
                "{error:?} in {sql:.900}"
            );
            return Err(error);
        }
        if commit {
            *live = after;
        }
        Ok(commit)
    }

    /// What has no ledger: each writer's rows have its number in `a`.
    fn more(&mut self, sql: &mut String) {
        let (a, b) = (self.first_id, self.random.below(self.workload.rows));
        let op = self.next_op;
        self.next_op += 1;
        let text = self.random.text(40);
        sql.push_str(&match self.random.below(8) {
            0 | 1 => format!(
                "insert into pairs values ({a}, {b}, {op}, '{text}') \
                 on conflict (a, b) do update set op = {op};"
            ),
            2 => format!(
                "delete from pairs where a = {a} and b = {b} + 1; \
                 update pairs set b = b + 1, op = {op} where a = {a} and b = {b};"
            ),
            3 => format!("delete from pairs where a = {a} and b = {b};"),
            4 | 5 => format!("insert into bag values ({a}, {b}, '{text}');"),
            6 => format!(
                "update bag set op = {op} where a = {a} and op = {b}; \
                 delete from bag where a = {a} and op = {b} + 1;"
            ),
            // Whoever truncates waits for all who write, which a savepoint could turn around.
            _ if self.random.one_in(12) => "truncate pad;".to_owned(),
            _ => format!("insert into pad values ({op}, {op});"),
        });
    }

    fn operation(&mut self, sql: &mut String, live: &mut BTreeSet<u64>) {
        let id = self.first_id + self.random.below(self.workload.rows);
        let op = self.next_op;
        self.next_op += 1;
        let label = self.random.text(24);
        let action = if live.insert(id) {
            let oversize = self.workload.oversize_one_in;
            let bytes = if oversize > 0 && self.random.one_in(oversize) {
                OVERSIZE_BYTES
            } else {
                // Mostly small; some large enough for TOAST, and to fill batches by bytes.
                match self.random.below(50) {
                    0 => 60_000,
                    1..5 => 5_000,
                    _ => 200,
                }
            };
            let body = self.random.text(bytes);
            sql.push_str(&format!("insert into items values ({id}, {op}, '{label}', '{body}');"));
            "insert"
        } else if self.random.one_in(4) {
            live.remove(&id);
            sql.push_str(&format!("delete from items where id = {id};"));
            "delete"
        } else {
            // Leaves the body alone: a large one is then an unchanged TOAST value.
            let set = format!("update items set op = {op}, label = '{label}' where id = {id};");
            sql.push_str(&set);
            "update"
        };
        sql.push_str(&format!(
            "insert into ledger (op, id, action) values ({op}, {id}, '{action}');"
        ));
    }
}

/// Postgres ends a connection because it stops, or refuses one because it starts.
fn is_the_server_leaving(error: &tokio_postgres::error::DbError) -> bool {
    error.code().code().starts_with("57P")
}

/// What the stream has to be judged by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// Positions rise over the whole stream.
    #[default]
    Whole,
    /// Positions rise for each row; some rows were parked and came later.
    PerRow,
}

/// What an operator knows of a message that was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenUp {
    /// It was answered so.
    Surely,
    /// No answer came, or another one.
    Perhaps,
}

/// Inserts of `items` that were given up, by their operation in the ledger.
pub type AllGivenUp = BTreeMap<u64, GivenUp>;

/// Waits until the stream holds as many records as the ledger names changes, or until it has not
/// grown for long: what is missing is then told better by [`judge_records`].
async fn wait_for_all(world: &World<'_>, given_up: &AllGivenUp) {
    let goal = world.database.value("select count(*) from ledger").await.unwrap();
    let goal = goal.parse::<u64>().unwrap() - given_up.len() as u64;
    let mut last = (0, Instant::now());
    loop {
        // The tail counts commands, too; to ask it is cheap.
        let tail = world.s2.tail(BASIN, STREAM).await.expect("the stream exists");
        if tail >= goal && world.records().await.len() as u64 >= goal {
            return;
        }
        if tail != last.0 {
            last = (tail, Instant::now());
        }
        if last.1.elapsed() > PATIENCE / 2 {
            eprintln!("the stream stays at {tail}; the ledger has {goal} changes");
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits for every change, and judges the stream from its first record to its last against the
/// ledger and the table.
pub async fn judge(world: &World<'_>, order: Order) {
    judge_without(world, order, &AllGivenUp::new()).await;
}

/// The same where an operator has given messages up: those, and only those, are not in the stream.
pub async fn judge_without(world: &World<'_>, order: Order, given_up: &AllGivenUp) {
    wait_for_all(world, given_up).await;
    let records = world.records().await;
    judge_records(&world.database, &records, order, given_up).await;
}

/// The same where transforms route what comes to several streams: each holds its changes of a row in
/// order, and together they hold each change once.
pub async fn judge_streams(world: &World<'_>, streams: &[&str]) {
    judge_streams_without(world, streams, &AllGivenUp::new()).await;
}

/// What a stream has.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    pub records: usize,
    /// Of messages that were cut.
    pub in_parts: usize,
}

impl Counts {
    fn of(records: &[Record]) -> Self {
        let is_part = |record: &&Record| !record.header("sb-part").ends_with("/1");
        Self { records: records.len(), in_parts: records.iter().filter(is_part).count() }
    }
}

/// The same where an operator has given messages up. Says what each stream has.
pub async fn judge_streams_without(
    world: &World<'_>,
    streams: &[&str],
    given_up: &AllGivenUp,
) -> Vec<Counts> {
    let goal = world.database.value("select count(*) from ledger").await.unwrap();
    let goal = goal.parse::<usize>().unwrap() - given_up.len();
    let mut last = (0, Instant::now());
    let records = loop {
        let mut records = Vec::new();
        for stream in streams {
            let found = match world.s2.tail(BASIN, stream).await {
                Ok(_) => world.s2.read(BASIN, stream).await,
                Err(_) => Vec::new(),
            };
            records.push(data(&found).into_iter().cloned().collect::<Vec<Record>>());
        }
        let all = records.iter().flatten();
        let items = all.filter(|record| record.header("sb-table") == "public.items");
        let found = items.map(|record| record.header("sb-key")).collect::<BTreeSet<_>>().len();
        if found != last.0 {
            last = (found, Instant::now());
        }
        if found >= goal {
            break records;
        }
        if last.1.elapsed() > PATIENCE / 2 {
            eprintln!("the streams stay at {found} changes; the ledger has {goal}");
            break records;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    for records in &records {
        let records: Vec<&Record> = records.iter().collect();
        check_positions(&whole(&records).iter().collect::<Vec<_>>(), Order::PerRow);
    }
    let counts = records.iter().map(|records| Counts::of(records)).collect();
    let mut all: Vec<Record> = records.into_iter().flatten().collect();
    all.sort_by_key(|record| key_position(record.header("sb-key")));
    judge_records(&world.database, &all, Order::PerRow, given_up).await;
    counts
}

/// Puts the parts of each message together that a transform has cut, as a consumer does; the message has
/// the number of its first part.
pub fn whole(records: &[&Record]) -> Vec<Record> {
    let mut whole: Vec<Record> = Vec::with_capacity(records.len());
    // What was found of a message, and where it begins in `whole`.
    let mut open: HashMap<&str, (usize, BTreeMap<usize, &str>)> = HashMap::new();
    for record in records {
        let (part, parts) = record.header("sb-part").split_once('/').expect("a part of so many");
        let (part, parts): (usize, usize) = (part.parse().unwrap(), parts.parse().unwrap());
        if parts == 1 {
            whole.push((*record).clone());
            continue;
        }
        let (at, bodies) = open.entry(record.header("sb-key")).or_insert_with(|| {
            whole.push((*record).clone());
            (whole.len() - 1, BTreeMap::new())
        });
        bodies.insert(part, &record.body);
        if bodies.len() == parts {
            whole[*at].body = bodies.values().copied().collect();
            open.remove(record.header("sb-key"));
        }
    }
    assert!(open.is_empty(), "messages of which parts are missing: {:?}", open.keys());
    whole
}

/// `(commit_lsn, commit_idx)`, which an idempotency key is made of.
fn key_position(key: &str) -> (u64, u64) {
    let text = base64::engine::general_purpose::STANDARD.decode(key).expect("a key is Base64");
    let text = String::from_utf8(text).expect("a key is text");
    let (lsn, index) = text.split_once(':').expect("a key is made of a position");
    (lsn.parse().expect("a number"), index.parse().expect("a number"))
}

/// Judges these records, in this order.
pub async fn judge_records(
    database: &Database<'_>,
    records: &[Record],
    order: Order,
    given_up: &AllGivenUp,
) {
    let records = data(records);
    check_records(&records);
    let records = whole(&records);
    let records: Vec<&Record> = records.iter().collect();
    check_messages(&records);
    check_positions(&records, order);

    let mut told: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut folded: BTreeMap<u64, (String, String)> = BTreeMap::new();
    for record in &records {
        if record.header("sb-table") != "public.items" {
            continue;
        }
        let message = record.json();
        let action = message["action"].as_str().expect("an action").to_owned();
        assert_eq!(record.header("sb-action"), action);
        let row = &message["record"];
        let id = row["id"].as_u64().expect("an id");
        let op = row["op"].as_u64();
        told.entry(id).or_default().push(match (action.as_str(), op) {
            ("delete", _) => "delete".to_owned(),
            (_, op) => format!("{action} {}", op.expect("an op")),
        });
        if action == "delete" {
            folded.remove(&id);
        } else {
            let label = row["label"].as_str().expect("a label").to_owned();
            folded.insert(id, (op.expect("an op").to_string(), label));
        }
    }

    let mut committed: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut missing = Vec::new();
    // Their state is told by no record, or by an older one.
    let mut incomplete = BTreeSet::new();
    for row in database.rows("select id, action, op, at from ledger order by op").await {
        let [id, action, op, at] = row.try_into().expect("four columns");
        let id: u64 = id.unwrap().parse().unwrap();
        let (action, op) = (action.unwrap(), op.unwrap());
        let change = match action.as_str() {
            "delete" => action,
            _ => format!("{action} {op}"),
        };
        let is_told = told.get(&id).is_some_and(|told| told.contains(&change));
        match given_up.get(&op.parse().unwrap()) {
            Some(GivenUp::Surely) if is_told => {
                panic!("{change} of row {id} is in the stream, and an operator has given it up")
            }
            Some(_) if !is_told => {
                incomplete.insert(id);
                continue;
            }
            Some(_) | None => {}
        }
        if !is_told {
            missing.push(format!("{} {change} of row {id}", at.unwrap()));
        }
        committed.entry(id).or_default().push(change);
    }
    // Where they were written tells whether a piece of the log was skipped.
    missing.sort();
    let ends = [missing.first(), missing.last()];
    assert!(missing.is_empty(), "{} changes are not in the stream: {ends:?}", missing.len());
    for id in committed.keys().chain(told.keys()) {
        assert_eq!(
            told.get(id),
            committed.get(id),
            "row {id}: left what the stream tells, right what was committed"
        );
    }

    let mut table = BTreeMap::new();
    for row in database.rows("select id, op, label from items").await {
        let [id, op, label] = row.try_into().expect("three columns");
        table.insert(id.unwrap().parse().unwrap(), (op.unwrap(), label.unwrap()));
    }
    for (id, row) in &table {
        let same = folded.get(id) == Some(row) || incomplete.contains(id);
        assert!(same, "row {id} of the stream, folded, differs from the table");
    }
    let gone = folded.keys().find(|id| !table.contains_key(id));
    assert!(gone.is_none(), "row {gone:?} of the stream, folded, is not in the table");
}

/// No record twice, and none over the limit.
pub fn check_records(records: &[&Record]) {
    let mut seen: HashMap<(String, String), u64> = HashMap::new();
    let mut pipelines = BTreeSet::new();
    for record in records {
        let identity = (record.header("sb-key").to_owned(), record.header("sb-part").to_owned());
        if let Some(first) = seen.insert(identity.clone(), record.seq_num) {
            panic!("{identity:?} is in the stream twice, as {first} and {}", record.seq_num);
        }
        pipelines.insert(record.header("sb-pipeline").to_owned());
        assert!(
            record.metered_bytes() <= RECORD_BYTES_MAX,
            "record {} has {} metered bytes",
            record.seq_num,
            record.metered_bytes()
        );
    }
    assert!(pipelines.len() <= 1, "one pipeline wrote the stream: {pipelines:?}");
}

/// Headers that agree with the message.
fn check_messages(records: &[&Record]) {
    for record in records {
        let message = record.json();
        assert_eq!(
            message["metadata"]["idempotency_key"].as_str(),
            Some(record.header("sb-key")),
            "the key in the message of record {}",
            record.seq_num
        );
    }
}

fn check_positions(records: &[&Record], order: Order) {
    let mut last: HashMap<String, (&Record, (u64, u64))> = HashMap::new();
    for &record in records {
        let message = record.json();
        let position = position(&message);
        let table = record.header("sb-table");
        let groups = match order {
            Order::Whole => BTreeSet::from([String::new()]),
            // An order that changes hands belongs to both customers.
            Order::PerRow if table == "public.orders" => [&message["record"], &message["changes"]]
                .into_iter()
                .filter_map(|row| row.get("customer"))
                .map(|customer| format!("customer {customer}"))
                .collect(),
            Order::PerRow => {
                BTreeSet::from([format!("{table} {}", message["metadata"]["record_pks"])])
            }
        };
        for group in groups {
            let show = |record: &Record, position: (u64, u64)| {
                let (seq, action) = (record.seq_num, record.header("sb-action"));
                format!(
                    "record {seq} ({action} at {position:?}, chain {})",
                    record.header("sb-chain")
                )
            };
            if let Some((before, at)) = last.insert(group.clone(), (record, position)) {
                assert!(
                    at < position,
                    "of {group}, {} comes after {}",
                    show(record, position),
                    show(before, at)
                );
            }
        }
    }
}

/// `(commit_lsn, commit_idx)` of a message.
pub fn position(message: &Value) -> (u64, u64) {
    let part = |name: &str| message["metadata"][name].as_u64().expect("positions are numbers");
    (part("commit_lsn"), part("commit_idx"))
}
