//! What Postgres told us, as plain data: positions, tables and row changes.
//!
//! Nothing here does I/O and nothing here knows JSON, WebAssembly or S2. A [`Change`] is cheap to
//! clone: its column values stay in the buffer that the replication connection read.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::pg_type::Kind;

/// A place in the write-ahead log, in bytes since its beginning.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    /// As Postgres writes it: `16/B374D848`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl std::str::FromStr for Lsn {
    type Err = InvalidLsn;

    fn from_str(text: &str) -> Result<Self, InvalidLsn> {
        let (high, low) = text.split_once('/').ok_or(InvalidLsn)?;
        let part = |digits: &str| u32::from_str_radix(digits, 16).map_err(|_| InvalidLsn);
        Ok(Self(u64::from(part(high)?) << 32 | u64::from(part(low)?)))
    }
}

/// The text is not an LSN such as `16/B374D848`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an LSN (expected two hexadecimal numbers around a slash, such as 16/B374D848)")]
pub struct InvalidLsn;

/// The total order of changes: the commit record's LSN, then the place in the transaction.
///
/// Commit LSNs rise in the order in which a slot delivers transactions; neither commit timestamps
/// nor the LSNs of the rows do. `index` counts every insert, update, delete, truncated table and
/// logical message of the transaction from 0, before any filter of ours, so that the same change
/// has the same position each time that it is read.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Position {
    /// `Begin.final_lsn`, which equals `Commit.lsn`.
    pub commit_lsn: Lsn,
    /// From 0.
    pub index: u64,
}

impl Position {
    /// The last position in front of this one.
    #[must_use]
    pub fn before(self) -> Self {
        match self.index.checked_sub(1) {
            Some(index) => Self { index, ..self },
            None => Self::last_before(self.commit_lsn),
        }
    }

    /// The last position that may belong to a transaction which ended at or before `end`.
    ///
    /// The next transaction's commit record may begin where that one's ends: with concurrent
    /// writers its position carries this very LSN, and is not meant.
    #[must_use]
    pub fn last_before(end: Lsn) -> Self {
        Self { commit_lsn: Lsn(end.0.saturating_sub(1)), index: u64::MAX }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.commit_lsn, self.index)
    }
}

/// What happened to a row, or to a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Insert,
    Update,
    Delete,
    /// A row as a backfill selected it.
    Read,
    /// A table was emptied; the change has no row.
    Truncate,
}

impl Action {
    /// In the order of their numbers.
    pub const ALL: [Self; 5] =
        [Self::Insert, Self::Update, Self::Delete, Self::Read, Self::Truncate];

    /// The word that messages and headers carry.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::Read => "read",
            Self::Truncate => "truncate",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A table as the replication stream described it when the change was made.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Table {
    /// `pg_class.oid`.
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// In the order of the tuple's cells.
    pub columns: Vec<Column>,
    /// Which of its changes keep their order among each other.
    #[serde(default)]
    pub grouping: Grouping,
}

impl Table {
    /// `schema.name`, as messages, headers and errors name it.
    #[must_use]
    pub fn qualified_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

/// Which changes of a table keep their order among each other, whatever happens to one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grouping {
    /// Those of one row, by its key; all of a table that has none.
    #[default]
    Key,
    /// Those with the same values in these columns, which are places in [`Table::columns`] and lie in
    /// the replica identity.
    Columns(Vec<usize>),
    /// All of them.
    Table,
    /// None: each goes when it can.
    None,
}

/// One column of a [`Table`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Column {
    pub name: String,
    /// As `pg_type.typname` says it: `int4`, `jsonb`, `_text`, `my_enum`.
    pub type_name: String,
    /// How the text of a value becomes JSON.
    pub kind: Kind,
    /// Part of the replica identity (with identity FULL: every column; see `primary_key`).
    pub identity: bool,
    /// Part of the primary key. What groups are made of by default.
    pub primary_key: bool,
}

/// One value of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cell {
    /// SQL NULL.
    Null,
    /// A TOAST value that the update did not touch, so that Postgres did not send it. Not NULL.
    Unchanged,
    /// Not part of what was sent: a column outside the replica identity in an old row. Not NULL.
    Absent,
    /// Text at `start..end` of [`Tuple::data`].
    Text { start: u32, end: u32 },
}

/// One row, in the table's column order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// The bytes that the cells point into.
    pub data: Bytes,
    pub cells: Box<[Cell]>,
}

impl Tuple {
    /// The text of a column as Postgres sent it, or nothing where it is NULL, unchanged or absent.
    #[must_use]
    pub fn text(&self, column: usize) -> Option<&[u8]> {
        match self.cells.get(column)? {
            Cell::Null | Cell::Unchanged | Cell::Absent => None,
            Cell::Text { start, end } => self.data.get(*start as usize..*end as usize),
        }
    }

    /// What the tuple's values take, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let text = |cell: &Cell| match cell {
            Cell::Text { start, end } => end.saturating_sub(*start) as usize,
            Cell::Null | Cell::Unchanged | Cell::Absent => 0,
        };
        self.cells.iter().map(text).sum()
    }
}

/// One decoded row change, or one truncated table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub position: Position,
    /// Microseconds since the Unix epoch, from the transaction's Begin message.
    pub commit_timestamp_us: i64,
    pub action: Action,
    pub table: Arc<Table>,
    /// The row after the change. With `old` of an identity FULL, unchanged cells are filled from it.
    pub new: Option<Tuple>,
    /// The row before it: whole with REPLICA IDENTITY FULL, otherwise the identity's columns, and
    /// only where Postgres sends them (deletes, and updates that change the identity).
    pub old: Option<Tuple>,
}

impl Change {
    /// What the change holds in memory, in bytes, near enough for budgets.
    #[must_use]
    pub fn bytes(&self) -> usize {
        const OVERHEAD: usize = 256;
        let tuple = |tuple: &Option<Tuple>| tuple.as_ref().map_or(0, Tuple::bytes);
        OVERHEAD + tuple(&self.new) + tuple(&self.old)
    }

    /// The row that the message's `record` shows: the new one, or the old one of a delete.
    #[must_use]
    pub fn row(&self) -> Option<&Tuple> {
        self.new.as_ref().or(self.old.as_ref())
    }

    /// The same change on buffers of its own, for what is kept longer than the path takes: cells
    /// otherwise hold on to the whole buffer that was read from the network.
    #[must_use]
    pub fn detached(&self) -> Self {
        let tuple = |tuple: &Option<Tuple>| {
            tuple.as_ref().map(|tuple| Tuple {
                data: Bytes::copy_from_slice(&tuple.data),
                cells: tuple.cells.clone(),
            })
        };
        Self { new: tuple(&self.new), old: tuple(&self.old), ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_reads_back_what_it_writes() {
        for value in [0, 1, 0xFFFF_FFFF, 0x16_B374_D848, u64::MAX] {
            assert_eq!(Lsn(value).to_string().parse(), Ok(Lsn(value)));
        }
        for text in ["", "1", "1/", "/1", "1/1/1", "x/1", "123456789/1"] {
            assert_eq!(text.parse::<Lsn>(), Err(InvalidLsn), "{text}");
        }
    }

    #[test]
    fn a_commit_that_begins_where_another_ends_is_not_before_it() {
        let at = |commit_lsn, index| Position { commit_lsn: Lsn(commit_lsn), index };
        assert!(Position::last_before(Lsn(10)) >= at(9, 1_000_000));
        assert!(Position::last_before(Lsn(10)) < at(10, 0));
    }

    #[test]
    fn positions_order_by_commit_then_index() {
        let at = |commit_lsn, index| Position { commit_lsn: Lsn(commit_lsn), index };
        assert!(at(1, 9) < at(2, 0));
        assert!(at(2, 0) < at(2, 1));
    }
}
