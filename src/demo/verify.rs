//! Is what S2 holds what Postgres holds? The stream, folded into a table by its keys, against the
//! source table and against what the clients know that they have committed.
//!
//! Nothing of the path is used to judge the path: what a value's JSON has to be is asked of
//! Postgres's own JSON functions, and the stream is read as any consumer would read it.

use std::collections::{HashMap, HashSet};
use std::fmt;

use base64::Engine as _;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::workload::{LARGE_COLUMNS, Ledger, Step, TABLE};
use crate::change::Action;
use crate::sink::ReadRecord;
use crate::sink::record::{RECORD_BYTES_MAX, metered_bytes};

/// Each column, and what Postgres says its JSON is. `NULL` here means JSON's `null`.
const COLUMNS: [(&str, &str); 23] = [
    ("id", "id"),
    ("revision", "revision"),
    ("uid", "to_json(uid)"),
    ("title", "to_json(title)"),
    ("slug", "to_json(slug::text)"),
    ("state", "to_json(state)"),
    ("tags", "to_json(tags)"),
    ("scores", "to_json(scores)"),
    // A JSON number would lose digits in most readers.
    ("price", "to_json(price::text)"),
    ("rating", "to_json(rating)"),
    ("views", "to_json(views)"),
    ("is_public", "to_json(is_public)"),
    ("published_on", "to_json(published_on::text)"),
    ("opens", "to_json(opens::text)"),
    (
        "read_time",
        "CASE WHEN read_time IS NOT NULL THEN json_build_object(
           'months', (extract(year FROM read_time) * 12 + extract(month FROM read_time))::bigint,
           'days', extract(day FROM read_time)::bigint,
           'microseconds', (extract(hour FROM read_time) * 3600000000
             + extract(minute FROM read_time) * 60000000
             + extract(microseconds FROM read_time))::bigint) END",
    ),
    ("pages", "to_json(pages::text)"),
    ("paper", "to_json(paper)"),
    ("author_address", "to_json(author_address)"),
    ("thumbnail", "to_json(thumbnail)"),
    ("meta", "meta"),
    ("body", "to_json(body)"),
    (
        "created_at",
        "CASE WHEN isfinite(created_at) AND created_at >= '0001-01-02'
           THEN to_json(to_char(created_at, 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))
           ELSE to_json(created_at::text) END",
    ),
    (
        "updated_at",
        "CASE WHEN isfinite(updated_at) AND updated_at >= '0001-01-02'
           THEN to_json(updated_at)
           ELSE to_json(updated_at::text) END",
    ),
];

/// What can be wrong with a stream, in the order in which it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Missing,
    Doubled,
    Disordered,
    Oversize,
    Different,
}

const FAULTS: [(Fault, &str); 5] = [
    (Fault::Missing, "missing from the stream"),
    (Fault::Doubled, "in the stream twice"),
    (Fault::Disordered, "out of order within a key"),
    (Fault::Oversize, "over S2's limit of a record"),
    (Fault::Different, "different from the table"),
];

/// How many of a fault are shown; the count tells the rest.
const EXAMPLES_MAX: usize = 5;

/// The stream as a table, and everything about it that was not as it has to be.
#[derive(Debug, Default)]
pub(super) struct Fold {
    rows: HashMap<i64, Row>,
    /// Each key's last position, `(commit_lsn, commit_idx)`.
    positions: HashMap<i64, (u64, u64)>,
    steps: HashMap<i64, Vec<Step>>,
    /// `sb-key` and `sb-part` of every record.
    identities: HashSet<(String, String)>,
    pipeline: Option<String>,
    records: u64,
    largest_bytes: u64,
    /// Values that a transform took out of the last record that had them.
    stripped: u64,
    values: u64,
    source_rows: u64,
    faults: Vec<(Fault, u64, Vec<String>)>,
}

/// A row's values by their place in [`COLUMNS`].
type Row = Vec<Cell>;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Cell {
    Json(Box<str>),
    /// A transform took it out, and the stream does not say what it is.
    Stripped,
}

/// A message, as far as a consumer needs it.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    record: HashMap<String, &'a RawValue>,
    #[serde(borrow)]
    changes: Option<HashMap<String, &'a RawValue>>,
    action: Action,
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    table_schema: String,
    table_name: String,
    commit_lsn: u64,
    commit_idx: u64,
    idempotency_key: String,
    #[serde(default)]
    unchanged_columns: Vec<String>,
    /// What `strip-columns` notes.
    #[serde(default)]
    stripped_columns: Vec<String>,
}

/// Why the comparison could not be made at all.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("could not read {TABLE} to compare it")]
    Source(#[from] tokio_postgres::Error),
}

impl Fold {
    /// Takes the stream's next record. Command records are no data and are passed over.
    pub(super) fn add(&mut self, record: &ReadRecord) {
        if record.is_command() {
            return;
        }
        self.records += 1;
        let headers = record.headers.iter().map(|header| (header.name.len(), header.value.len()));
        let bytes = metered_bytes(headers, record.body.len());
        self.largest_bytes = self.largest_bytes.max(bytes);
        if bytes > RECORD_BYTES_MAX {
            self.fault(Fault::Oversize, || format!("record {}: {bytes} bytes", record.seq));
        }
        match serde_json::from_slice::<Message<'_>>(&record.body) {
            Ok(message) => {
                self.check_headers(record, &message);
                self.apply(record.seq, &message);
            }
            Err(error) => {
                self.fault(Fault::Different, || format!("record {}: {error}", record.seq));
            }
        }
    }

    /// Holds the headers against the body, and both against what was there before.
    fn check_headers(&mut self, record: &ReadRecord, message: &Message<'_>) {
        let header = |name: &str| {
            let value = record.header(name).map(|value| String::from_utf8_lossy(value));
            value.map(|value| value.into_owned()).unwrap_or_default()
        };
        let metadata = &message.metadata;
        let identity = format!("{}:{}", metadata.commit_lsn, metadata.commit_idx);
        let identity = base64::engine::general_purpose::STANDARD.encode(identity);
        let table = format!("{}.{}", metadata.table_schema, metadata.table_name);
        let action = message.action.as_str();
        for (name, found, expected) in [
            ("sb-key", header("sb-key"), identity.as_str()),
            ("metadata.idempotency_key", metadata.idempotency_key.clone(), identity.as_str()),
            // Nothing here splits messages.
            ("sb-part", header("sb-part"), "0/1"),
            ("sb-table", header("sb-table"), table.as_str()),
            ("metadata.table_name", table.clone(), TABLE),
            ("sb-action", header("sb-action"), action),
        ] {
            if found != expected {
                self.fault(Fault::Different, || {
                    format!("record {}: {name} is `{found}`, not `{expected}`", record.seq)
                });
            }
        }
        let pipeline = header("sb-pipeline");
        if pipeline.is_empty() || *self.pipeline.get_or_insert(pipeline.clone()) != pipeline {
            self.fault(Fault::Different, || {
                format!("record {}: sb-pipeline is `{pipeline}`", record.seq)
            });
        }
        if !self.identities.insert((header("sb-key"), header("sb-part"))) {
            self.fault(Fault::Doubled, || format!("record {}: sb-key {identity}", record.seq));
        }
    }

    /// Does to our table what the message says was done to the source's.
    fn apply(&mut self, seq: u64, message: &Message<'_>) {
        let key_of = |columns: &HashMap<String, &RawValue>| -> Option<i64> {
            columns.get("id")?.get().parse().ok()
        };
        let Some(key) = key_of(&message.record) else {
            return self.fault(Fault::Different, || format!("record {seq}: no key"));
        };
        let old_key = message.changes.as_ref().and_then(key_of).filter(|old| *old != key);
        let position = (message.metadata.commit_lsn, message.metadata.commit_idx);
        for key in [Some(key), old_key].into_iter().flatten() {
            let last = self.positions.insert(key, position);
            if last.is_some_and(|last| last >= position) {
                self.fault(Fault::Disordered, || {
                    format!("record {seq}: id {key} at {position:?}, after {last:?}")
                });
            }
        }
        let revision = message.record.get("revision").and_then(|raw| raw.get().parse().ok());
        let revision = revision.filter(|_| message.action != Action::Delete);
        self.steps.entry(key).or_default().push(Step { action: message.action, revision });
        let former = self.rows.remove(&old_key.unwrap_or(key));
        let unexpected = match message.action {
            Action::Insert => former.is_some(),
            Action::Update | Action::Delete => former.is_none(),
            Action::Read | Action::Truncate => true,
        };
        if unexpected {
            let state = if former.is_some() { "is there already" } else { "is not there" };
            self.fault(Fault::Different, || {
                format!("record {seq}: {} of id {key}, which {state}", message.action)
            });
        }
        if message.action != Action::Delete {
            let row = self.row_after(seq, message, former);
            self.rows.insert(key, row);
        }
    }

    fn row_after(&mut self, seq: u64, message: &Message<'_>, former: Option<Row>) -> Row {
        let has = |names: &[String], name: &str| names.iter().any(|known| known == name);
        let mut former = former.unwrap_or_default();
        let mut row = Vec::with_capacity(COLUMNS.len());
        for (index, (name, _)) in COLUMNS.iter().enumerate() {
            let cell = if let Some(value) = message.record.get(*name) {
                Cell::Json(value.get().into())
            } else if has(&message.metadata.unchanged_columns, name) && index < former.len() {
                std::mem::replace(&mut former[index], Cell::Stripped)
            } else {
                // Only what the operator asked to strip may be gone, and the message says so.
                let stripped = has(&message.metadata.stripped_columns, name);
                if !stripped || !LARGE_COLUMNS.contains(name) {
                    self.fault(Fault::Different, || format!("record {seq}: no column `{name}`"));
                }
                Cell::Stripped
            };
            row.push(cell);
        }
        row
    }

    /// Holds the folded table against the ledger and the source table, which must be at rest.
    ///
    /// # Errors
    ///
    /// When the source table cannot be read.
    pub(super) async fn compare(
        &mut self,
        source: &tokio_postgres::Client,
        ledger: &Ledger,
    ) -> Result<(), Error> {
        self.compare_steps(ledger);
        self.compare_rows(source).await
    }

    /// Every committed change once, and in the order in which its row had them.
    fn compare_steps(&mut self, ledger: &Ledger) {
        let found = std::mem::take(&mut self.steps);
        for (key, expected) in &ledger.keys {
            let found = found.get(key).map_or(&[][..], Vec::as_slice);
            if found == expected.as_slice() {
                continue;
            }
            let fault = match found.len().cmp(&expected.len()) {
                std::cmp::Ordering::Less => Fault::Missing,
                std::cmp::Ordering::Greater => Fault::Doubled,
                std::cmp::Ordering::Equal => Fault::Disordered,
            };
            self.fault(fault, || {
                format!("id {key}: wrote {}, found {}", Steps(expected), Steps(found))
            });
        }
        for key in found.keys().filter(|key| !ledger.keys.contains_key(key)) {
            self.fault(Fault::Different, || format!("id {key}: nobody wrote it"));
        }
    }

    async fn compare_rows(&mut self, source: &tokio_postgres::Client) -> Result<(), Error> {
        /// Some rows have megabytes, so that a page stays below 100 MB at the worst.
        const PAGE_ROWS: usize = 25;
        source
            .batch_execute(
                "SET timezone = 'UTC'; SET datestyle = 'ISO'; SET intervalstyle = 'postgres';
                 SET bytea_output = 'hex'; SET extra_float_digits = 1;",
            )
            .await?;
        let columns: Vec<String> =
            COLUMNS.iter().map(|(_, sql)| format!("coalesce(({sql})::text, 'null')")).collect();
        let select = format!(
            "SELECT id, {} FROM {TABLE} WHERE id > $1 ORDER BY id LIMIT {PAGE_ROWS}",
            columns.join(", ")
        );
        let select = source.prepare(&select).await?;
        let mut after = i64::MIN;
        loop {
            let page = source.query(&select, &[&after]).await?;
            for source_row in &page {
                let key: i64 = source_row.try_get(0)?;
                after = key;
                self.source_rows += 1;
                let Some(row) = self.rows.remove(&key) else {
                    self.fault(Fault::Missing, || format!("id {key}: the whole row"));
                    continue;
                };
                for (index, (cell, (name, _))) in row.iter().zip(&COLUMNS).enumerate() {
                    let expected: &str = source_row.try_get(index + 1)?;
                    self.compare_value(key, name, cell, expected);
                }
            }
            if page.len() < PAGE_ROWS {
                break;
            }
        }
        for key in std::mem::take(&mut self.rows).into_keys() {
            self.fault(Fault::Different, || format!("id {key}: deleted, but still in the stream"));
        }
        Ok(())
    }

    fn compare_value(&mut self, key: i64, column: &str, cell: &Cell, expected: &str) {
        let Cell::Json(found) = cell else {
            self.stripped += 1;
            return;
        };
        self.values += 1;
        if same_value(column, found, expected) {
            return;
        }
        let (found, expected) = (shorten(found, 60), shorten(expected, 60));
        self.fault(Fault::Different, || {
            format!("id {key}: `{column}` is {found} in the stream, {expected} in Postgres")
        });
    }

    fn fault(&mut self, fault: Fault, example: impl FnOnce() -> String) {
        let index = self.faults.iter().position(|(known, ..)| *known == fault);
        let index = index.unwrap_or_else(|| {
            self.faults.push((fault, 0, Vec::new()));
            self.faults.len() - 1
        });
        let (_, count, examples) = &mut self.faults[index];
        *count += 1;
        if examples.len() < EXAMPLES_MAX {
            examples.push(example());
        }
    }

    /// Whether nothing at all was wrong, and there was something that could have been.
    pub(super) fn holds(&self) -> bool {
        self.faults.is_empty() && self.records > 0 && self.source_rows > 0
    }
}

impl fmt::Display for Fold {
    /// The verdict: a line for each kind of fault, examples below it, and what was compared.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (fault, text) in FAULTS {
            let found = self.faults.iter().find(|(known, ..)| *known == fault);
            let (count, examples) = found.map_or((0, &[][..]), |(_, count, e)| (*count, &e[..]));
            let mark = if count == 0 { "ok" } else { "NO" };
            writeln!(f, "{mark}  {count:>9} {text}")?;
            for example in examples {
                writeln!(f, "              {example}")?;
            }
        }
        writeln!(
            f,
            "    {:>9} records read back, the largest of {} metered bytes",
            self.records, self.largest_bytes
        )?;
        write!(
            f,
            "    {:>9} rows compared with the table, {} values; {} stripped ones left out",
            self.source_rows, self.values, self.stripped
        )
    }
}

/// What happened to a row, for people: `insert 1, update 2, delete`.
struct Steps<'a>(&'a [Step]);

impl fmt::Display for Steps<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        for (index, step) in self.0.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{}", step.action)?;
            if let Some(revision) = step.revision {
                write!(f, " {revision}")?;
            }
        }
        Ok(())
    }
}

/// The same JSON value. Documents of the user's are compared to the letter: they are embedded as
/// they are, and reading them would hide lost digits.
fn same_value(column: &str, found: &str, expected: &str) -> bool {
    if found == expected {
        return true;
    }
    if column == "meta" {
        return false;
    }
    let value = |text| serde_json::from_str::<Value>(text).ok();
    value(found).is_some_and(|found| value(expected) == Some(found))
}

/// The beginning of a text, at most so many characters.
pub(super) fn shorten(text: &str, characters_max: usize) -> String {
    match text.char_indices().nth(characters_max) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::sink::record::Header;

    /// A row with `null` in all columns but key, revision and those given.
    fn row(id: i64, revision: i64, leave_out: &[&str]) -> String {
        let columns: Vec<String> = COLUMNS
            .iter()
            .filter(|(name, _)| !leave_out.contains(name))
            .map(|(name, _)| match *name {
                "id" => format!("\"id\":{id}"),
                "revision" => format!("\"revision\":{revision}"),
                name => format!("\"{name}\":null"),
            })
            .collect();
        format!("{{{}}}", columns.join(","))
    }

    struct Event<'a> {
        action: &'a str,
        position: (u64, u64),
        record: String,
        changes: &'a str,
        metadata: &'a str,
    }

    impl Default for Event<'_> {
        fn default() -> Self {
            let record = row(1, 1, &[]);
            Self { action: "insert", position: (1, 0), record, changes: "null", metadata: "" }
        }
    }

    fn record(event: &Event<'_>) -> ReadRecord {
        let (lsn, idx) = event.position;
        let key = base64::engine::general_purpose::STANDARD.encode(format!("{lsn}:{idx}"));
        let body = format!(
            r#"{{"record":{},"changes":{},"action":"{}","metadata":{{"table_schema":"public",
            "table_name":"documents","commit_lsn":{lsn},"commit_idx":{idx},
            "idempotency_key":"{key}"{}}}}}"#,
            event.record, event.changes, event.action, event.metadata
        );
        let header = |name: &'static str, value: &str| Header {
            name: Bytes::from_static(name.as_bytes()),
            value: Bytes::copy_from_slice(value.as_bytes()),
        };
        let headers = vec![
            header("sb-pipeline", "p"),
            header("sb-key", &key),
            header("sb-part", "0/1"),
            header("sb-table", TABLE),
            header("sb-action", event.action),
        ];
        ReadRecord { seq: lsn, timestamp_ms: 0, headers, body: Bytes::from(body) }
    }

    fn ledger(steps: &[(i64, &[Step])]) -> Ledger {
        let keys = steps.iter().map(|(key, steps)| (*key, steps.to_vec())).collect();
        Ledger { keys, ..Ledger::default() }
    }

    const INSERT: Step = Step { action: Action::Insert, revision: Some(1) };
    const UPDATE: Step = Step { action: Action::Update, revision: Some(2) };
    const DELETE: Step = Step { action: Action::Delete, revision: None };

    #[track_caller]
    fn check(events: &[Event<'_>], steps: &[(i64, &[Step])], expected: &[(Fault, u64)]) -> Fold {
        let mut fold = Fold::default();
        for event in events {
            fold.add(&record(event));
        }
        fold.compare_steps(&ledger(steps));
        let faults: Vec<_> = fold.faults.iter().map(|(fault, count, _)| (*fault, *count)).collect();
        assert_eq!(faults, expected, "{fold}");
        fold
    }

    fn update<'a>() -> Event<'a> {
        Event {
            action: "update",
            position: (2, 0),
            record: row(1, 2, &[]),
            changes: "{}",
            ..Event::default()
        }
    }

    fn delete<'a>() -> Event<'a> {
        Event {
            action: "delete",
            position: (3, 0),
            record: r#"{"id":1}"#.to_owned(),
            ..Event::default()
        }
    }

    #[test]
    fn a_faultless_stream_has_no_faults() {
        let fold = check(&[Event::default(), update()], &[(1, &[INSERT, UPDATE])], &[]);
        assert_eq!(fold.rows.len(), 1);
        let all = [Event::default(), update(), delete()];
        let fold = check(&all, &[(1, &[INSERT, UPDATE, DELETE])], &[]);
        assert_eq!(fold.rows.len(), 0);
    }

    #[test]
    fn missing_doubled_and_disordered_changes_are_found() {
        check(&[Event::default()], &[(1, &[INSERT, UPDATE])], &[(Fault::Missing, 1)]);
        check(&[], &[(1, &[INSERT])], &[(Fault::Missing, 1)]);
        check(&[Event::default()], &[], &[(Fault::Different, 1)]);
        check(
            &[Event::default(), update(), update()],
            &[(1, &[INSERT, UPDATE])],
            &[(Fault::Doubled, 2), (Fault::Disordered, 1)],
        );
        check(
            &[update(), Event::default()],
            &[(1, &[INSERT, UPDATE])],
            &[(Fault::Different, 2), (Fault::Disordered, 2)],
        );
    }

    #[test]
    fn a_changed_key_moves_the_row() {
        let moved = || Event {
            record: row(7, 2, &["body"]),
            changes: r#"{"id":1}"#,
            metadata: r#","unchanged_columns":["body"]"#,
            ..update()
        };
        let steps: &[(i64, &[Step])] = &[(1, &[INSERT]), (7, &[UPDATE])];
        let fold = check(&[Event::default(), moved()], steps, &[]);
        assert_eq!(fold.rows.keys().collect::<Vec<_>>(), [&7]);
        assert_eq!(fold.rows[&7].last(), Some(&Cell::Json("null".into())));
        // The old key's last change must come first, too.
        let late = Event { position: (9, 0), ..Event::default() };
        check(&[late, moved()], steps, &[(Fault::Disordered, 1)]);
    }

    #[test]
    fn columns_may_be_gone_only_where_the_message_says_so() {
        let event = |leave_out: &[&str], metadata| Event {
            record: row(1, 1, leave_out),
            metadata,
            ..Event::default()
        };
        let steps: &[(i64, &[Step])] = &[(1, &[INSERT])];
        check(&[event(&["body"], "")], steps, &[(Fault::Different, 1)]);
        check(&[event(&["body"], r#","stripped_columns":["body"]"#)], steps, &[]);
        let other = event(&["title"], r#","stripped_columns":["title"]"#);
        check(&[other], steps, &[(Fault::Different, 1)]);
        // Unchanged since when?
        let unchanged = event(&["body"], r#","unchanged_columns":["body"]"#);
        check(&[unchanged], steps, &[(Fault::Different, 1)]);
    }

    #[test]
    fn what_is_no_message_is_a_fault_and_commands_are_none() {
        let mut fold = Fold::default();
        let mut broken = record(&Event::default());
        broken.body = Bytes::from_static(b"{");
        fold.add(&broken);
        assert_eq!(fold.faults.len(), 1);
        let mut fold = Fold::default();
        let header = Header { name: Bytes::new(), value: Bytes::from_static(b"fence") };
        broken.headers = vec![header];
        fold.add(&broken);
        assert!(fold.faults.is_empty());
        assert!(!fold.holds(), "an empty stream proves nothing");
    }

    #[test]
    fn large_records_and_false_headers_are_found() {
        let mut large = record(&Event::default());
        let mut body = large.body.to_vec();
        body.resize(1024 * 1024, b' ');
        large.body = Bytes::from(body);
        let mut fold = Fold::default();
        fold.add(&large);
        assert_eq!(fold.faults.first().map(|(fault, ..)| *fault), Some(Fault::Oversize));
        for index in 0..5 {
            let mut wrong = record(&Event::default());
            wrong.headers[index].value = Bytes::new();
            let mut fold = Fold::default();
            fold.add(&wrong);
            assert_eq!(fold.faults.len(), 1, "header {index}");
        }
    }

    #[test]
    fn values_are_compared_by_meaning_and_documents_to_the_letter() {
        #[track_caller]
        fn check(column: &str, found: &str, expected: &str, same: bool) {
            assert_eq!(same_value(column, found, expected), same, "{found} {expected}");
        }
        check("title", r#""a""#, r#""a""#, true);
        check("title", r#""\u00fc""#, r#""ü""#, true);
        check("title", "null", r#""null""#, false);
        check("price", r#""1.50""#, r#""1.5""#, false);
        check("rating", "1e21", "1000000000000000000000", true);
        check("views", "9223372036854775807", "9223372036854775806", false);
        check("meta", r#"{"a": 1}"#, r#"{"a":1}"#, false);
        check("body", "{", "}", false);
    }

    #[test]
    fn shortened_texts_end_at_a_character() {
        assert_eq!(shorten("äöü", 3), "äöü");
        assert_eq!(shorten("äöü", 2), "äö… (6 bytes)");
    }
}
