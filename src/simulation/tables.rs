//! The tables: what is in them, and what makes a group there.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use rand::RngExt as _;
use rand::rngs::SmallRng;

use super::routes::Route;
use super::workload::{Fate, Planned};
use crate::change::{Action, Cell, Change, Column, Grouping, Position, Table, Tuple};
use crate::pg_type::Kind;

/// The columns, as every table has them.
pub(super) const ID: usize = 0;
pub(super) const VALUE: usize = 1;
const BIG: usize = 2;
const OWNER: usize = 3;

/// What keeps its order in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Each row, by the primary key.
    Key,
    /// The rows of each owner, by `group_by`.
    Owner,
    /// The whole table, by `group_by`.
    Table,
    /// The whole table, since it has no key.
    Keyless,
    /// Nothing, by `group_by`.
    Nothing,
    /// Each row: by the primary key and by its owner, who never changes, in turn, since `group_by` is
    /// another one at each start, and the key is altered meanwhile.
    InTurn,
}

/// One table.
#[derive(Debug)]
pub(super) struct Rows {
    order: Order,
    /// As the source describes it, for one process after the other.
    described: Vec<Arc<Table>>,
    /// From here on it is described as for the next process: its key was altered.
    altered: Option<Position>,
    /// What is in it: owners by key.
    rows: BTreeMap<u64, u64>,
}

/// How rows are drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Habits {
    pub(super) keys: u64,
    pub(super) truncates: f64,
    pub(super) large: bool,
}

impl Rows {
    pub(super) fn new(oid: u32, name: &str, order: Order) -> Self {
        let groupings = match order {
            Order::Key | Order::Keyless => vec![Grouping::Key],
            Order::Owner => vec![Grouping::Columns(vec![OWNER])],
            Order::Table => vec![Grouping::Table],
            Order::Nothing => vec![Grouping::None],
            Order::InTurn => vec![Grouping::Key, Grouping::Columns(vec![OWNER])],
        };
        let described = groupings.into_iter().map(|by| Arc::new(table(oid, name, order, by)));
        Self { order, described: described.collect(), altered: None, rows: BTreeMap::new() }
    }

    /// Alters its key with what comes at this position, where its order allows for another.
    pub(super) fn alter(&mut self, at: Position) {
        self.altered = Some(at);
    }

    /// The table as this process's source describes it at a position.
    pub(super) fn described(&self, process: u64, at: Position) -> &Arc<Table> {
        let altered = self.altered.is_some_and(|altered| altered <= at);
        let turn = process + u64::from(altered);
        &self.described[usize::try_from(turn).unwrap_or_default() % self.described.len()]
    }

    fn owner(&self, rng: &mut SmallRng, key: u64) -> u64 {
        match self.order {
            Order::InTurn => key % 3,
            Order::Key | Order::Owner | Order::Table | Order::Keyless | Order::Nothing => {
                rng.random_range(0..3)
            }
        }
    }

    /// A change of it.
    pub(super) fn draw(
        &mut self,
        rng: &mut SmallRng,
        position: Position,
        habits: Habits,
    ) -> Planned {
        let Habits { keys, truncates, large } = habits;
        let keyed = self.order != Order::Keyless;
        let key = rng.random_range(0..keys);
        let value = position.commit_lsn.0 * 1000 + position.index;
        let bytes = match rng.random_range(0..20) {
            0 if large => 300_000,
            0..4 => rng.random_range(100..1500),
            _ => rng.random_range(0..20),
        };
        let (big, value) = ("b".repeat(bytes), value.to_string());
        let row =
            |(key, owner): (u64, u64)| tuple(&[&key.to_string(), &value, &big, &owner.to_string()]);
        let owner = self.owner(rng, key);
        let was = self.rows.get(&key).map(|owner| (key, *owner));
        let (action, after, before, unchanged) = match was {
            _ if keyed && rng.random_bool(truncates) => {
                self.rows.clear();
                (Action::Truncate, None, None, false)
            }
            Some(was) if keyed => match rng.random_range(0..12) {
                0..2 => (Action::Delete, None, Some(was), false),
                2..5 => {
                    let free = (0..keys).find(|free| !self.rows.contains_key(free)).unwrap_or(key);
                    (Action::Update, Some((free, self.owner(rng, free))), Some(was), false)
                }
                5..7 => (Action::Update, Some((key, owner)), Some(was), false),
                7..9 => (Action::Update, Some(was), Some(was), true),
                _ => (Action::Update, Some(was), Some(was), false),
            },
            Some(_) | None => (Action::Insert, Some((key, owner)), None, false),
        };
        if let Some((key, _)) = before {
            self.rows.remove(&key);
        }
        if let Some((key, owner)) = after {
            self.rows.insert(key, owner);
        }
        let table = Arc::clone(self.described(0, position));
        let mut new = after.map(row);
        if let Some(new) = &mut new
            && unchanged
        {
            new.cells[BIG] = Cell::Unchanged;
        }
        // Postgres sends the old row where it is gone or its identity changes.
        let identity =
            |(key, owner): (u64, u64)| (key, table.columns[OWNER].identity.then_some(owner));
        let sent = before.filter(|was| after.is_none_or(|after| identity(after) != identity(*was)));
        let mut old = sent.map(row);
        if let Some(old) = &mut old {
            for (cell, column) in old.cells.iter_mut().zip(&table.columns) {
                if !column.identity {
                    *cell = Cell::Absent;
                }
            }
        }
        let rows: Vec<(u64, u64)> = [after, before].into_iter().flatten().collect();
        let (keys, spread) = self.groups(&table.name, &rows);
        let commit_timestamp_us =
            1_700_000_000_000_000 + i64::try_from(position.commit_lsn.0).unwrap_or(0);
        let change = Change { position, commit_timestamp_us, action, table, new, old };
        Planned { change, keys, spread, fate: Fate::Plain, route: Route::default() }
    }

    /// The groups whose order has to be kept, and those through which a held message holds others.
    fn groups(&self, table: &str, rows: &[(u64, u64)]) -> (Vec<String>, Vec<String>) {
        let mut groups: Vec<String> = match self.order {
            Order::Key | Order::InTurn => {
                rows.iter().map(|(key, _)| format!("{table}:{key}")).collect()
            }
            Order::Owner => rows.iter().map(|(_, owner)| format!("{table}/{owner}")).collect(),
            Order::Table | Order::Keyless if !rows.is_empty() => vec![table.to_owned()],
            Order::Table | Order::Keyless | Order::Nothing => Vec::new(),
        };
        groups.dedup();
        let in_turn = self.order == Order::InTurn;
        let spread = if in_turn { vec![table.to_owned()] } else { groups.clone() };
        (groups, spread)
    }
}

fn tuple(values: &[&str]) -> Tuple {
    let mut data = String::new();
    let cells = values.iter().map(|value| {
        let start = u32::try_from(data.len()).expect("rows are small");
        data.push_str(value);
        Cell::Text { start, end: u32::try_from(data.len()).expect("rows are small") }
    });
    let cells = cells.collect();
    Tuple { data: Bytes::from(data), cells }
}

fn table(oid: u32, name: &str, order: Order, grouping: Grouping) -> Table {
    let keyed = order != Order::Keyless;
    let by_owner = matches!(order, Order::Owner | Order::InTurn);
    let column = |name: &str, kind: Kind, index: usize| Column {
        name: name.to_owned(),
        type_name: if kind == Kind::Integer { "int8" } else { "text" }.to_owned(),
        kind,
        identity: index == ID || !keyed || (index == OWNER && by_owner),
        primary_key: index == ID && keyed,
    };
    Table {
        oid,
        schema: "public".to_owned(),
        name: name.to_owned(),
        columns: vec![
            column("id", Kind::Integer, ID),
            column("value", Kind::Integer, VALUE),
            column("big", Kind::Text, BIG),
            column("owner", Kind::Integer, OWNER),
        ],
        grouping,
    }
}
