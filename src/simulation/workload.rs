//! What is committed in Postgres, and what the transforms and S2 think of each change: all of it drawn
//! before anything runs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::RngExt as _;
use rand::rngs::SmallRng;

use crate::change::{Action, Cell, Change, Column, Grouping, Lsn, Position, Table, Tuple};
use crate::pg_type::Kind;
use crate::pipeline::outbox::Window;

/// What becomes of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Plain,
    /// Several records.
    Split(u32),
    /// No record.
    Dropped,
    /// A transform fails it until the mend is live; then it is as the number of parts says: none, one
    /// or several.
    Failing {
        class: FailureClass,
        parts: u32,
    },
    /// A transform fails it now and then.
    Flaky,
    /// S2 refuses its record until the mend is live.
    Refused {
        oversize: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FailureClass {
    Trap,
    Oversize,
}

/// A committed change.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) change: Change,
    /// The rows whose order it keeps; none for a truncate.
    pub(super) keys: Vec<String>,
    pub(super) fate: Fate,
}

/// A committed transaction.
#[derive(Debug)]
pub(super) struct Transaction {
    /// When it commits, in milliseconds from the start.
    pub(super) at_ms: u64,
    pub(super) commit_lsn: u64,
    pub(super) end_lsn: u64,
    pub(super) changes: Vec<Planned>,
}

/// Everything that is drawn beforehand.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) transactions: Vec<Transaction>,
    pub(super) by_position: BTreeMap<Position, (usize, usize)>,
    pub(super) window: Window,
    pub(super) budget_bytes: usize,
    pub(super) workers: usize,
    pub(super) create: bool,
    /// When faults end, in milliseconds.
    pub(super) calm_ms: u64,
}

struct Rows {
    table: Arc<Table>,
    keyed: bool,
    rows: BTreeMap<u64, u64>,
}

impl Workload {
    pub(super) fn draw(rng: &mut SmallRng) -> Self {
        let mut tables = [
            Rows { table: table(1, "items", true), keyed: true, rows: BTreeMap::new() },
            Rows { table: table(2, "others", true), keyed: true, rows: BTreeMap::new() },
            Rows { table: table(3, "log", false), keyed: false, rows: BTreeMap::new() },
        ];
        let trouble = rng.random_range(0.0..0.3_f64).powi(2) * 3.0;
        let keys = rng.random_range(2..12);
        let large = rng.random_bool(0.03);
        let truncates = if rng.random_bool(0.4) { 0.05 } else { 0.0 };
        let duration_ms = rng.random_range(200..8000);
        let mut transactions = Vec::new();
        let mut by_position = BTreeMap::new();
        let mut lsn = 1000;
        let mut at_ms = 0;
        let count = rng.random_range(4..60);
        for number in 0..count {
            let commit_lsn = if rng.random_bool(0.3) { lsn } else { lsn + rng.random_range(1..50) };
            let size = match rng.random_range(0..20) {
                0 => rng.random_range(0..1),
                1..18 => rng.random_range(1..5),
                _ => rng.random_range(5..30),
            };
            let mut changes = Vec::new();
            let mut index = 0;
            for _ in 0..size {
                // A change that is not ours takes an index too.
                index += u64::from(rng.random_bool(0.1));
                let position = Position { commit_lsn: Lsn(commit_lsn), index };
                index += 1;
                let which = [0, 0, 0, 1, 1, 2][rng.random_range(0..6)];
                let mut planned = tables[which].draw(rng, position, keys, truncates, large);
                planned.fate = fate(rng, trouble);
                by_position.insert(position, (number, changes.len()));
                changes.push(planned);
            }
            lsn = commit_lsn + rng.random_range(8..64);
            transactions.push(Transaction { at_ms, commit_lsn, end_lsn: lsn, changes });
            if rng.random_bool(0.6) {
                at_ms += rng.random_range(0..(2 * duration_ms / count as u64 + 2));
            }
        }
        Self {
            transactions,
            by_position,
            window: Window {
                linger: Duration::from_millis(rng.random_range(0..8)),
                bytes_max: if rng.random_bool(0.5) { 3000 } else { 1 << 24 },
            },
            budget_bytes: if rng.random_bool(0.3) { 4000 } else { 1 << 20 },
            workers: rng.random_range(1..4),
            create: rng.random_bool(0.3),
            calm_ms: at_ms + rng.random_range(100..10_000),
        }
    }

    pub(super) fn planned(&self, position: Position) -> Option<&Planned> {
        let (transaction, change) = self.by_position.get(&position)?;
        self.transactions.get(*transaction)?.changes.get(*change)
    }

    pub(super) fn changes(&self) -> impl Iterator<Item = &Planned> {
        self.transactions.iter().flat_map(|transaction| &transaction.changes)
    }
}

fn fate(rng: &mut SmallRng, trouble: f64) -> Fate {
    if !rng.random_bool(trouble) {
        return match rng.random_range(0..30) {
            0 => Fate::Dropped,
            1..3 => Fate::Split(rng.random_range(2..5)),
            _ => Fate::Plain,
        };
    }
    match rng.random_range(0..10) {
        0..3 => Fate::Failing { class: FailureClass::Trap, parts: rng.random_range(0..4) },
        3..6 => Fate::Failing { class: FailureClass::Oversize, parts: rng.random_range(0..4) },
        6..8 => Fate::Flaky,
        _ => Fate::Refused { oversize: rng.random_bool(0.5) },
    }
}

impl Rows {
    fn draw(
        &mut self,
        rng: &mut SmallRng,
        position: Position,
        keys: u64,
        truncates: f64,
        large: bool,
    ) -> Planned {
        let key = rng.random_range(0..keys);
        let value = position.commit_lsn.0 * 1000 + position.index;
        let bytes = match rng.random_range(0..20) {
            0 if large => 300_000,
            0..4 => rng.random_range(100..1500),
            _ => rng.random_range(0..20),
        };
        let big = "b".repeat(bytes);
        let key_text = key.to_string();
        let value_text = value.to_string();
        let row = |key: &str| tuple(&[Some(key), Some(&value_text), Some(&big)]);
        let exists = self.rows.contains_key(&key);
        let (action, new, old, mut keys_of) = if self.keyed && rng.random_bool(truncates) {
            self.rows.clear();
            (Action::Truncate, None, None, Vec::new())
        } else if !self.keyed || !exists {
            self.rows.insert(key, value);
            (Action::Insert, Some(row(&key_text)), None, vec![key])
        } else {
            match rng.random_range(0..10) {
                0..2 => {
                    self.rows.remove(&key);
                    let mut old = tuple(&[Some(&key_text), None, None]);
                    absent(&mut old);
                    (Action::Delete, None, Some(old), vec![key])
                }
                2..5 if (0..keys).any(|free| !self.rows.contains_key(&free)) => {
                    let free = (0..keys).find(|free| !self.rows.contains_key(free)).unwrap_or(key);
                    self.rows.remove(&key);
                    self.rows.insert(free, value);
                    let mut old = tuple(&[Some(&key_text), None, None]);
                    absent(&mut old);
                    (Action::Update, Some(row(&free.to_string())), Some(old), vec![free, key])
                }
                5..7 => {
                    self.rows.insert(key, value);
                    let mut new = tuple(&[Some(&key_text), Some(&value_text), None]);
                    new.cells[2] = Cell::Unchanged;
                    (Action::Update, Some(new), None, vec![key])
                }
                _ => {
                    self.rows.insert(key, value);
                    (Action::Update, Some(row(&key_text)), None, vec![key])
                }
            }
        };
        if !self.keyed {
            keys_of = vec![0];
        }
        let change = Change {
            position,
            commit_timestamp_us: 1_700_000_000_000_000
                + i64::try_from(position.commit_lsn.0).unwrap_or(0),
            action,
            table: Arc::clone(&self.table),
            new,
            old,
        };
        let keys = keys_of.iter().map(|key| format!("{}:{key}", self.table.name)).collect();
        Planned { change, keys, fate: Fate::Plain }
    }
}

fn absent(tuple: &mut Tuple) {
    for cell in &mut tuple.cells[1..] {
        *cell = Cell::Absent;
    }
}

fn tuple(values: &[Option<&str>]) -> Tuple {
    let mut data = String::new();
    let mut cells = Vec::new();
    for value in values {
        cells.push(match value {
            Some(value) => {
                let start = u32::try_from(data.len()).expect("rows are small");
                data.push_str(value);
                Cell::Text { start, end: u32::try_from(data.len()).expect("rows are small") }
            }
            None => Cell::Null,
        });
    }
    Tuple { data: Bytes::from(data), cells: cells.into() }
}

fn table(oid: u32, name: &str, keyed: bool) -> Arc<Table> {
    let column = |name: &str, kind: Kind, key: bool| Column {
        name: name.to_owned(),
        type_name: if kind == Kind::Integer { "int8" } else { "text" }.to_owned(),
        kind,
        identity: key || !keyed,
        primary_key: key && keyed,
    };
    Arc::new(Table {
        oid,
        schema: "public".to_owned(),
        name: name.to_owned(),
        columns: vec![
            column("id", Kind::Integer, true),
            column("value", Kind::Integer, false),
            column("big", Kind::Text, false),
        ],
        grouping: Grouping::Key,
    })
}
