//! The table that the demonstration fills, and the client that fills it.
//!
//! Rows are drawn from a seed, so that a run can be repeated. They have the types that people
//! store and the values that pipelines stumble over: NaN and the infinities, BC dates, `NULL`
//! beside the text `NULL`, control characters, digits that no float holds. Most rows take about
//! 1 KiB; some have a column of 3 MB or a document of 1.2 MB, which no S2 record can take.
//!
//! The client notes what it has committed in a [`Ledger`], which the verification later holds
//! against the stream. It never looks at the pipeline.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use tokio_postgres::NoTls;

use crate::change::Action;

/// The table's qualified name.
pub(super) const TABLE: &str = "public.documents";

/// What makes the table. Each type class that Sluicebox maps in its own way has a column.
pub(super) const SCHEMA: &str = "
CREATE TYPE public.document_state AS ENUM ('draft', 'in review', 'published', 'it''s \"gone\"');
CREATE TYPE public.dimensions AS (width integer, height integer, unit text);
CREATE DOMAIN public.slug AS text CHECK (VALUE <> '');
CREATE TABLE public.documents (
    id bigint PRIMARY KEY,
    revision integer NOT NULL,
    uid uuid NOT NULL,
    title text NOT NULL,
    slug public.slug,
    state public.document_state NOT NULL,
    tags text[],
    scores integer[],
    price numeric,
    rating double precision,
    views bigint,
    is_public boolean,
    published_on date,
    opens time,
    read_time interval,
    pages int4range,
    paper public.dimensions,
    author_address inet,
    thumbnail bytea,
    meta jsonb,
    body text,
    created_at timestamptz NOT NULL,
    updated_at timestamp
);";

/// The columns that are too large for a record in some rows, and that the operator strips.
pub(super) const LARGE_COLUMNS: [&str; 2] = ["body", "meta"];

/// How large they are then, in bytes.
const BODY_LARGE_BYTES: usize = 3_000_000;
const META_LARGE_BYTES: usize = 1_200_000;

/// Clients that write at the same time, each its own rows.
const CLIENTS: u64 = 3;

/// The new key of a row whose key is changed is its old one plus this, and thus never used twice.
const KEY_SHIFT: i64 = 1_000_000_000;

/// What was committed, as the clients know it.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// For each primary key that there ever was, what happened to it, in commit order.
    pub(super) keys: HashMap<i64, Vec<Step>>,
    /// Row changes in all.
    pub(super) changes: u64,
    /// Rows that had at least one change which no record can take.
    pub(super) large_rows: u64,
}

/// One committed change of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) action: Action,
    /// The row's `revision` after the change; nothing after a delete.
    pub(super) revision: Option<i64>,
}

/// The clients between the parts of their work.
#[derive(Debug)]
pub(super) struct Workload {
    clients: Vec<Client>,
    ledger: Arc<Mutex<Ledger>>,
}

/// One client: its connection, its share of the rows and what it knows of them.
struct Client {
    connection: tokio_postgres::Client,
    random: StdRng,
    ledger: Arc<Mutex<Ledger>>,
    /// The next row's number among all; a client's numbers are `CLIENTS` apart.
    next: u64,
    /// Every so many rows one is large.
    large_every: u64,
    /// Live rows: key and revision.
    live: Vec<(i64, i64)>,
    /// Live large rows whose later changes are still to be written.
    large: Vec<(u64, i64, i64)>,
    statements: String,
    steps: Vec<(i64, Step)>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("next", &self.next).finish_non_exhaustive()
    }
}

impl Workload {
    /// Connects the clients.
    pub(super) async fn connect(
        url: &str,
        rows: u64,
        seed: u64,
    ) -> Result<Self, tokio_postgres::Error> {
        /// Large rows in all, as long as there are enough rows to hide them among.
        const LARGE_ROWS: u64 = 24;
        let ledger = Arc::new(Mutex::new(Ledger::default()));
        let mut clients = Vec::new();
        for number in 0..CLIENTS {
            let (connection, driver) = tokio_postgres::connect(url, NoTls).await?;
            // A failing connection shows in the next statement.
            tokio::spawn(driver);
            clients.push(Client {
                connection,
                random: StdRng::seed_from_u64(seed.wrapping_mul(CLIENTS).wrapping_add(number)),
                ledger: Arc::clone(&ledger),
                next: number,
                large_every: (rows / LARGE_ROWS).max(4),
                live: Vec::new(),
                large: Vec::new(),
                statements: String::new(),
                steps: Vec::new(),
            });
        }
        Ok(Self { clients, ledger })
    }

    /// What has been committed so far.
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    /// A handle to the same, for whoever watches while the clients write.
    pub(super) fn shared_ledger(&self) -> Arc<Mutex<Ledger>> {
        Arc::clone(&self.ledger)
    }

    /// Writes until row number `until` has been inserted and the large rows have had their later
    /// changes, all clients at once.
    pub(super) async fn write(&mut self, until: u64) -> Result<(), tokio_postgres::Error> {
        let work = self.clients.iter_mut().map(|client| client.write(until));
        for outcome in futures_util::future::join_all(work).await {
            outcome?;
        }
        Ok(())
    }
}

/// What has been written of the ledger stays readable when a client has panicked.
pub(super) fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    async fn write(&mut self, until: u64) -> Result<(), tokio_postgres::Error> {
        while self.next < until {
            let operations = *[1, 1, 5, 20, 60, 200].choose(&mut self.random).unwrap_or(&1);
            for _ in 0..operations {
                if self.next >= until {
                    break;
                }
                match self.random.random_range(0..100) {
                    0..=19 => self.update(),
                    20..=23 => self.delete(),
                    24 => self.change_key(),
                    _ => self.insert(),
                }
            }
            self.commit().await?;
            if self.random.random_ratio(1, 3) {
                self.follow_large_row();
                self.commit().await?;
            }
        }
        while !self.large.is_empty() {
            self.follow_large_row();
            self.commit().await?;
        }
        Ok(())
    }

    /// Sends the transaction, and notes it once it is committed.
    async fn commit(&mut self) -> Result<(), tokio_postgres::Error> {
        if self.steps.is_empty() {
            return Ok(());
        }
        let transaction = format!("BEGIN;{}COMMIT;", self.statements);
        self.connection.batch_execute(&transaction).await?;
        self.statements.clear();
        let mut ledger = lock(&self.ledger);
        ledger.changes += self.steps.len() as u64;
        for (key, step) in self.steps.drain(..) {
            ledger.keys.entry(key).or_default().push(step);
        }
        Ok(())
    }

    fn note(&mut self, key: i64, action: Action, revision: Option<i64>) {
        self.steps.push((key, Step { action, revision }));
    }

    fn insert(&mut self) {
        let number = self.next;
        self.next += CLIENTS;
        let key = i64::try_from(number).unwrap_or(i64::MAX) + 1;
        let large = number % self.large_every == self.large_every - 1;
        let which = number / self.large_every;
        let random = &mut self.random;
        let (mut body, mut meta) = (usual_body(random), usual_meta(random));
        if large {
            // Two in three have the text, and one the document.
            if which % 3 == 2 {
                meta = Some(large_meta(random));
            } else {
                body = Some(text(random, BODY_LARGE_BYTES));
            }
        }
        let values = [
            Some(key.to_string()),
            Some("1".to_owned()),
            Some(uuid(random)),
            Some(title(random)),
            chance(random, 9, 10).then(|| format!("document-{key}")),
            Some(pick(random, &["draft", "in review", "published", "it's \"gone\""])),
            chance(random, 9, 10).then(|| tags(random)),
            chance(random, 9, 10).then(|| scores(random)),
            chance(random, 9, 10).then(|| price(random)),
            chance(random, 9, 10).then(|| rating(random)),
            chance(random, 9, 10).then(|| views(random)),
            chance(random, 9, 10).then(|| pick(random, &["true", "false"])),
            chance(random, 9, 10).then(|| date(random)),
            chance(random, 9, 10).then(|| time(random)),
            chance(random, 9, 10).then(|| interval(random)),
            chance(random, 9, 10).then(|| pick(random, &["[1,10)", "(,5]", "empty", "[7,)"])),
            chance(random, 9, 10)
                .then(|| pick(random, &["(210,297,mm)", "(,,)", r#"(1,2,"a ""b"", c\\d")"#])),
            chance(random, 9, 10).then(|| address(random)),
            chance(random, 1, 2).then(|| bytes(random)),
            meta,
            body,
            Some(timestamp(random)),
            chance(random, 9, 10).then(|| timestamp(random)),
        ];
        self.statements.push_str("INSERT INTO public.documents VALUES (");
        for (index, value) in values.iter().enumerate() {
            if index > 0 {
                self.statements.push(',');
            }
            push_literal(&mut self.statements, value.as_deref());
        }
        self.statements.push_str(");");
        self.note(key, Action::Insert, Some(1));
        if large {
            lock(&self.ledger).large_rows += 1;
            self.large.push((which, key, 1));
        } else {
            self.live.push((key, 1));
        }
    }

    /// Draws a live row out of the list.
    fn draw(&mut self) -> Option<(i64, i64)> {
        if self.live.is_empty() {
            return None;
        }
        let index = self.random.random_range(0..self.live.len());
        Some(self.live.swap_remove(index))
    }

    fn update(&mut self) {
        let Some((key, revision)) = self.draw() else { return self.insert() };
        let body = if chance(&mut self.random, 1, 4) { usual_body(&mut self.random) } else { None };
        self.push_update(key, revision + 1, body.as_deref());
        self.live.push((key, revision + 1));
    }

    fn delete(&mut self) {
        let Some((key, _)) = self.draw() else { return self.insert() };
        self.push_delete(key);
    }

    fn change_key(&mut self) {
        let Some((key, revision)) = self.draw() else { return self.insert() };
        if key >= KEY_SHIFT {
            return self.live.push((key, revision));
        }
        self.push_key_change(key, revision + 1);
        self.live.push((key + KEY_SHIFT, revision + 1));
    }

    /// What happens to a large row afterwards, while it may be parked: every kind in turn.
    fn follow_large_row(&mut self) {
        let Some((which, key, revision)) = self.large.pop() else { return };
        // The large column stays as it is, so that Postgres does not send it.
        self.push_update(key, revision + 1, None);
        match which % 4 {
            0 => {}
            1 => self.push_delete(key),
            2 => {
                let body = text(&mut self.random, 900);
                self.push_update(key, revision + 2, Some(&body));
            }
            _ => {
                self.push_key_change(key, revision + 2);
                self.push_update(key + KEY_SHIFT, revision + 3, None);
            }
        }
    }

    fn push_update(&mut self, key: i64, revision: i64, body: Option<&str>) {
        let random = &mut self.random;
        let (title, price, tags) = (title(random), price(random), tags(random));
        let sql = &mut self.statements;
        write!(sql, "UPDATE public.documents SET revision={revision},title=").expect(IN_MEMORY);
        push_literal(sql, Some(&title));
        sql.push_str(",price=");
        push_literal(sql, Some(&price));
        sql.push_str(",tags=");
        push_literal(sql, Some(&tags));
        if let Some(body) = body {
            sql.push_str(",body=");
            push_literal(sql, Some(body));
        }
        write!(sql, ",updated_at=localtimestamp WHERE id={key};").expect(IN_MEMORY);
        self.note(key, Action::Update, Some(revision));
    }

    fn push_delete(&mut self, key: i64) {
        write!(self.statements, "DELETE FROM public.documents WHERE id={key};").expect(IN_MEMORY);
        self.note(key, Action::Delete, None);
    }

    fn push_key_change(&mut self, key: i64, revision: i64) {
        let new_key = key + KEY_SHIFT;
        write!(
            self.statements,
            "UPDATE public.documents SET id={new_key},revision={revision} WHERE id={key};"
        )
        .expect(IN_MEMORY);
        self.note(new_key, Action::Update, Some(revision));
    }
}

/// Writing to a string cannot fail.
const IN_MEMORY: &str = "a string takes what is written to it";

/// A quoted literal of SQL (with `standard_conforming_strings`, the default), or NULL.
fn push_literal(sql: &mut String, value: Option<&str>) {
    let Some(value) = value else { return sql.push_str("NULL") };
    sql.push('\'');
    for (index, part) in value.split('\'').enumerate() {
        if index > 0 {
            sql.push_str("''");
        }
        sql.push_str(part);
    }
    sql.push('\'');
}

fn chance(random: &mut StdRng, numerator: u32, denominator: u32) -> bool {
    random.random_ratio(numerator, denominator)
}

fn pick(random: &mut StdRng, choices: &[&str]) -> String {
    choices.choose(random).copied().unwrap_or_default().to_owned()
}

/// Words of text; now and then characters that JSON has to escape, or of several bytes.
const WORDS: [&str; 48] = [
    "the",
    "water",
    "runs",
    "down",
    "through",
    "a",
    "long",
    "wooden",
    "box",
    "with",
    "bars",
    "across",
    "its",
    "floor",
    "and",
    "heavy",
    "grains",
    "stay",
    "behind",
    "them",
    "while",
    "sand",
    "goes",
    "on",
    "river",
    "gravel",
    "gold",
    "miner",
    "shovel",
    "after",
    "every",
    "evening",
    "somebody",
    "lifts",
    "bars",
    "out",
    "\"quoted\"",
    "back\\slash",
    "tab\there",
    "line\nbreak",
    "Größe",
    "naïve",
    "山水",
    "🪣",
    "\u{1}",
    "\u{2028}",
    "{\"not\":\"json\"}",
    "'); --",
];

/// Text of that many bytes, or a few more.
fn text(random: &mut StdRng, bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        text.push_str(WORDS.choose(random).copied().unwrap_or_default());
        text.push(' ');
    }
    text
}

/// About 1 KiB; some tens of KiB, which Postgres stores apart; a few just below what S2 takes.
fn usual_body(random: &mut StdRng) -> Option<String> {
    let bytes = match random.random_range(0..3000) {
        0 => 900_000,
        1..=40 => random.random_range(10_000..60_000),
        41..=100 => return None,
        101..=140 => 0,
        _ => random.random_range(300..1400),
    };
    Some(text(random, bytes))
}

fn usual_meta(random: &mut StdRng) -> Option<String> {
    let number = random.random::<u32>();
    let source = pick(random, &["import", "editor", "api \\u00fc \\\" \\\\"]);
    chance(random, 9, 10).then(|| {
        format!(
            r#"{{"source":"{source}","ratio":2.50,"digits":123456789012345678901234567890.5,"n":{number},"list":[1,null,true,"",{{}}],"empty":{{}}}}"#
        )
    })
}

fn large_meta(random: &mut StdRng) -> String {
    let mut json = String::from(r#"{"source":"crawler","pages":["#);
    while json.len() < META_LARGE_BYTES {
        let (number, score) = (random.random::<u64>(), random.random::<f64>());
        write!(json, r#"{{"url":"https://example.org/{number:x}","score":{score}}},"#)
            .expect(IN_MEMORY);
    }
    json.push_str("{}]}");
    json
}

fn title(random: &mut StdRng) -> String {
    let bytes = random.random_range(10..60);
    text(random, bytes)
}

fn uuid(random: &mut StdRng) -> String {
    let digits = format!("{:032x}", random.random::<u128>());
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

/// An array's text: the element NULL and the text `NULL` are different things.
fn tags(random: &mut StdRng) -> String {
    let count = random.random_range(0..5);
    let elements: Vec<String> = (0..count)
        .map(|_| match random.random_range(0..8) {
            0 => "NULL".to_owned(),
            1 => "\"NULL\"".to_owned(),
            2 => "\"\"".to_owned(),
            _ => {
                let word = WORDS.choose(random).copied().unwrap_or_default();
                format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
            }
        })
        .collect();
    format!("{{{}}}", elements.join(","))
}

fn scores(random: &mut StdRng) -> String {
    let (a, b) = (random.random::<i32>(), random.random::<i32>());
    match random.random_range(0..4) {
        0 => format!("{{{{{a},NULL}},{{{b},0}}}}"),
        1 => "{}".to_owned(),
        _ => format!("{{{a},{b}}}"),
    }
}

fn price(random: &mut StdRng) -> String {
    match random.random_range(0..20) {
        0 => "NaN".to_owned(),
        1 => format!("{}.{}", random.random::<u128>(), random.random::<u64>()),
        2 => "-0.00000000000000000001".to_owned(),
        _ => format!("{}.{:02}", random.random_range(0..500), random.random_range(0..100)),
    }
}

fn rating(random: &mut StdRng) -> String {
    match random.random_range(0..20) {
        0 => pick(random, &["NaN", "Infinity", "-Infinity"]),
        1 => pick(random, &["1e300", "-2.2250738585072014e-308", "5e-324", "-0", "1e21"]),
        _ => format!("{:e}", random.random::<f64>() * 5.0),
    }
}

fn views(random: &mut StdRng) -> String {
    match random.random_range(0..10) {
        0 => i64::MAX.to_string(),
        1 => i64::MIN.to_string(),
        _ => random.random_range(0..100_000).to_string(),
    }
}

fn date(random: &mut StdRng) -> String {
    match random.random_range(0..30) {
        0 => pick(random, &["infinity", "-infinity", "0044-03-15 BC", "0001-01-01"]),
        _ => {
            let (year, month) = (random.random_range(1970..2100), random.random_range(1..13));
            format!("{year}-{month:02}-{:02}", random.random_range(1..29))
        }
    }
}

fn time(random: &mut StdRng) -> String {
    match random.random_range(0..30) {
        0 => "24:00:00".to_owned(),
        _ => clock(random),
    }
}

fn clock(random: &mut StdRng) -> String {
    let (hour, minute) = (random.random_range(0..24), random.random_range(0..60));
    let (second, micros) = (random.random_range(0..60), random.random_range(0..1_000_000));
    match random.random_range(0..3) {
        0 => format!("{hour:02}:{minute:02}:{second:02}"),
        1 => format!("{hour:02}:{minute:02}:{second:02}.{:03}", micros / 1000),
        _ => format!("{hour:02}:{minute:02}:{second:02}.{micros:06}"),
    }
}

/// Of both kinds, with and without a zone: the part that a type does not have is ignored.
fn timestamp(random: &mut StdRng) -> String {
    match random.random_range(0..30) {
        0 => pick(random, &["infinity", "-infinity", "0044-03-15 12:00:00+00 BC"]),
        _ => {
            let (month, day) = (random.random_range(1..13), random.random_range(1..29));
            let zone = pick(random, &["+00", "+05:30", "-08", "+13:45"]);
            let year = random.random_range(1971..2100);
            format!("{year}-{month:02}-{day:02} {}{zone}", clock(random))
        }
    }
}

fn interval(random: &mut StdRng) -> String {
    let seconds = random.random_range(-100_000..100_000);
    match random.random_range(0..5) {
        0 => "0".to_owned(),
        1 => format!("-1 year -2 mons +3 days {seconds} seconds"),
        2 => format!("{} months 40 days", random.random_range(-30..30)),
        3 => "-00:00:00.000001".to_owned(),
        _ => format!("{seconds}.25 seconds"),
    }
}

fn address(random: &mut StdRng) -> String {
    let [a, b, c, d] = random.random::<[u8; 4]>();
    match random.random_range(0..3) {
        0 => format!("2001:db8::{a:x}:{b:x}"),
        1 => format!("10.{a}.{b}.0/24"),
        _ => format!("{a}.{b}.{c}.{d}"),
    }
}

fn bytes(random: &mut StdRng) -> String {
    let mut text = String::from("\\x");
    for _ in 0..random.random_range(0..64) {
        write!(text, "{:02x}", random.random::<u8>()).expect(IN_MEMORY);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_quoted() {
        #[track_caller]
        fn check(value: Option<&str>, expected: &str) {
            let mut sql = String::new();
            push_literal(&mut sql, value);
            assert_eq!(sql, expected);
        }
        check(None, "NULL");
        check(Some(""), "''");
        check(Some("a"), "'a'");
        check(Some("'"), "''''");
        check(Some("it's '"), "'it''s '''");
        check(Some("NULL \\ \""), "'NULL \\ \"'");
    }

    #[test]
    fn the_same_seed_draws_the_same_rows() {
        let draw = |seed| {
            let mut random = StdRng::seed_from_u64(seed);
            (text(&mut random, 500), tags(&mut random), timestamp(&mut random))
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
