//! What is committed in Postgres, and what the transforms and S2 think of each change: all of it drawn
//! before anything runs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::SmallRng;

use super::letters;
use super::routes::{Habit, Route, Wanted};
use super::tables::{Habits, Order, Rows};
use crate::change::{Change, Lsn, Position, Table};
use crate::config::{DeadLetters, LetterPlace, SpillAfter};
use crate::pipeline::driver::{Bounds, Portions};
use crate::pipeline::outbox::Window;
use crate::sink::Mode;
use crate::sink::limits::Limits;

/// What becomes of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Plain,
    /// Several records.
    Split(u32),
    /// No record.
    Dropped,
    /// So many records by chains of even and of odd numbers.
    Fickle([u32; 2]),
    /// A transform fails it until the mend is live; then it is as the number of parts says: none, one
    /// or several.
    Failing {
        class: FailureClass,
        parts: u32,
    },
    /// A transform fails it now and then.
    Flaky,
    /// S2 refuses its records until the mend is live.
    Refused {
        oversize: bool,
        parts: u32,
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
    /// The groups whose order it keeps; none for a truncate.
    pub(super) keys: Vec<String>,
    /// The groups through which it holds others while it is held, and they it.
    pub(super) spread: Vec<String>,
    pub(super) fate: Fate,
    pub(super) route: Route,
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
    tables: [Rows; 3],
    pub(super) window: Window,
    pub(super) budget_bytes: usize,
    pub(super) bounds: Bounds,
    pub(super) portions: Portions,
    pub(super) workers: usize,
    pub(super) create: bool,
    /// What ends the attempts of a message, if anything does.
    pub(super) dead_letters: Option<DeadLetters>,
    /// How much goes into a record and a batch.
    pub(super) limits: Limits,
    /// Transforms route some changes to streams of their own.
    pub(super) routes: bool,
    pub(super) mode: Mode,
    /// When faults end, in milliseconds.
    pub(super) calm_ms: u64,
}

impl Workload {
    /// Draws one, whose chains route messages where something is wanted of that.
    pub(super) fn draw(rng: &mut SmallRng, wanted: Wanted) -> Self {
        let order = |rng: &mut SmallRng| match rng.random_range(0..10) {
            0..4 => Order::Key,
            4..6 => Order::Owner,
            6 => Order::Table,
            7 => Order::Nothing,
            _ => Order::InTurn,
        };
        let mut tables = [
            Rows::new(1, "items", order(rng)),
            Rows::new(2, "others", order(rng)),
            Rows::new(3, "log", Order::Keyless),
        ];
        let dead_letters = letters::draw(rng);
        let mut trouble = rng.random_range(0.0..0.3_f64).powi(2) * 3.0;
        if dead_letters.is_some() {
            // Or hardly any would be written.
            trouble += 0.05;
        }
        let keys = rng.random_range(2..12);
        let large = rng.random_bool(0.03);
        let truncates = if rng.random_bool(0.4) { 0.05 } else { 0.0 };
        let habits = Habits { keys, truncates, large };
        let routing = (wanted.moves || rng.random_bool(0.4)).then(|| Habit::draw(rng, wanted));
        let duration_ms = rng.random_range(200..8000);
        let mut transactions = Vec::new();
        let mut by_position = BTreeMap::new();
        let mut lsn = 1000;
        let mut at_ms = 0;
        let count = rng.random_range(4..60);
        let alters = rng.random_range(0..2 * count);
        for number in 0..count {
            let commit_lsn = if rng.random_bool(0.3) { lsn } else { lsn + rng.random_range(1..50) };
            let size = match rng.random_range(0..20) {
                0 => rng.random_range(0..1),
                1..18 => rng.random_range(1..5),
                _ => rng.random_range(5..30),
            };
            let mut changes = Vec::new();
            if number == alters {
                let at = Position { commit_lsn: Lsn(commit_lsn), index: 0 };
                tables.iter_mut().for_each(|rows| rows.alter(at));
            }
            let mut index = 0;
            for _ in 0..size {
                // A change that is not ours takes an index too.
                index += u64::from(rng.random_bool(0.1));
                let position = Position { commit_lsn: Lsn(commit_lsn), index };
                index += 1;
                let which = [0, 0, 0, 1, 1, 2][rng.random_range(0..6)];
                let mut planned = tables[which].draw(rng, position, habits);
                planned.fate = fate(rng, trouble);
                if let Some(routing) = routing {
                    planned.route = routing.route(rng, &planned);
                }
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
            tables,
            window: Window {
                linger: Duration::from_millis(rng.random_range(0..8)),
                bytes_max: if rng.random_bool(0.5) { 3000 } else { 1 << 24 },
            },
            budget_bytes: if rng.random_bool(0.3) { 4000 } else { 1 << 20 },
            bounds: bounds(rng),
            portions: portions(rng),
            workers: rng.random_range(1..4),
            create: rng.random_bool(0.3),
            dead_letters,
            limits: limits(rng, large),
            routes: routing.is_some(),
            mode: match rng.random_range(0..10) {
                0..6 => Mode::Session,
                6..8 => Mode::SessionHttp2,
                _ => Mode::Unary,
            },
            calm_ms: at_ms + rng.random_range(100..10_000),
        }
    }

    /// Whether dead letters go to a stream of their own.
    pub(super) fn has_letter_stream(&self) -> bool {
        let place = self.dead_letters.as_ref().map(|letters| &letters.place);
        matches!(place, Some(LetterPlace::Stream(_)))
    }

    pub(super) fn planned(&self, position: Position) -> Option<&Planned> {
        let (transaction, change) = self.by_position.get(&position)?;
        self.transactions.get(*transaction)?.changes.get(*change)
    }

    /// A change as this process's source describes it.
    pub(super) fn described(&self, change: &Change, process: u64) -> Change {
        let at = change.position;
        let is_of = |rows: &&Rows| rows.described(0, at).oid == change.table.oid;
        let table = self.tables.iter().find(is_of).map(|rows| rows.described(process, at));
        let table: &Arc<Table> = table.unwrap_or(&change.table);
        Change { table: Arc::clone(table), ..change.clone() }
    }

    /// What is committed by this moment: how many transactions, and the end of the log.
    pub(super) fn committed(&self, at_ms: u64) -> (usize, u64) {
        let count = self.transactions.partition_point(|transaction| transaction.at_ms <= at_ms);
        let end = count.checked_sub(1).map_or(0, |last| self.transactions[last].end_lsn);
        (count, end)
    }

    /// What the largest change holds in memory, in bytes.
    pub(super) fn change_bytes_max(&self) -> usize {
        self.changes().map(|planned| planned.change.bytes()).max().unwrap_or(0)
    }

    pub(super) fn changes(&self) -> impl Iterator<Item = &Planned> {
        self.transactions.iter().flat_map(|transaction| &transaction.changes)
    }
}

fn limits(rng: &mut SmallRng, large: bool) -> Limits {
    let batch_records = match rng.random_range(0..3) {
        0 => rng.random_range(1..4),
        _ => Limits::S2.batch_records,
    };
    let record_bytes = match rng.random_range(0..3) {
        // So that a letter takes a few.
        0 if !large => rng.random_range(700..4000),
        _ => Limits::S2.record_bytes,
    };
    Limits { batch_records, record_bytes }
}

fn bounds(rng: &mut SmallRng) -> Bounds {
    Bounds {
        spill_after: match rng.random_range(0..3) {
            0 => SpillAfter::Time(Duration::MAX),
            1 => SpillAfter::Time(Duration::from_millis(rng.random_range(0..4000))),
            _ => SpillAfter::Bytes(rng.random_range(1..2000)),
        },
        spill_bytes_max: match rng.random_range(0..4) {
            0 => 0,
            1 => rng.random_range(1000..10_000),
            _ => 1 << 20,
        },
        // An empty store takes more than a hundred kibibytes.
        store_bytes_max: match rng.random_range(0..4) {
            0 => rng.random_range(120_000..200_000),
            _ => u64::MAX,
        },
    }
}

fn portions(rng: &mut SmallRng) -> Portions {
    if rng.random_bool(0.3) {
        return Portions::default();
    }
    Portions {
        // With room for one message only, nothing more is read if anything still counts that is not on
        // its way.
        retry_bytes_max: if rng.random_bool(0.3) { 1 } else { rng.random_range(300..3000) },
        retry_messages: rng.random_range(1..6),
        chunk_changes_max: rng.random_range(1..8),
        chunk_bytes_max: rng.random_range(300..4000),
        pending_bytes_max: if rng.random_bool(0.2) { 1 } else { rng.random_range(300..6000) },
        drain_bytes_max: if rng.random_bool(0.2) { 1 } else { rng.random_range(300..6000) },
        closing_bytes: rng.random_range(0..6000),
        job_changes: rng.random_range(1..6),
        letters: rng.random_range(1..5),
        sessions_max: rng.random_range(1..4),
        // In no time at all, nobody would get to send anything.
        session_turn: Duration::from_millis(rng.random_range(0..2000_u64).max(1)),
        // Often closed while something comes for it.
        stream_idle: Duration::from_millis(match rng.random_range(0..2) {
            0 => rng.random_range(0..20),
            _ => rng.random_range(0..5000),
        }),
    }
}

fn fate(rng: &mut SmallRng, trouble: f64) -> Fate {
    if !rng.random_bool(trouble) {
        return match rng.random_range(0..30) {
            0 => Fate::Dropped,
            1..3 => Fate::Split(rng.random_range(2..5)),
            3..6 => Fate::Fickle([(); 2].map(|()| rng.random_range(0..4))),
            _ => Fate::Plain,
        };
    }
    match rng.random_range(0..10) {
        0..3 => Fate::Failing { class: FailureClass::Trap, parts: rng.random_range(0..4) },
        3..6 => Fate::Failing { class: FailureClass::Oversize, parts: rng.random_range(0..4) },
        6..8 => Fate::Flaky,
        _ => {
            let parts = if rng.random_bool(0.6) { 1 } else { rng.random_range(2..5) };
            Fate::Refused { oversize: rng.random_bool(0.5), parts }
        }
    }
}
