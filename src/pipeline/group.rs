//! Which changes must keep their order among each other.
//!
//! A group is taken from source columns, before any transform: those that `delivery.group_by` names,
//! and without it the primary key where it lies in the replica identity (so that deletes carry it
//! too), otherwise the replica identity. A change that takes a row from one group into another
//! belongs to both.
//!
//! Where there is no such column, or the whole table is one group by choice, each change is a
//! *barrier*: it waits for everything of its table that is stored before it, and holds everything
//! behind it. So is a truncate.
//!
//! A group's name begins with its *grouping*, the columns that it is made of. They differ once
//! `group_by` is changed, or the table's key, and then equal names no longer mean equal rows. So a
//! change that meets messages of its table under another grouping becomes a barrier: order holds
//! across the change, at the price that the table waits until what is stored is through.

use std::borrow::Cow;

use sha2::{Digest, Sha256};

use crate::change::{Action, Cell, Change, Column, Grouping, Position, Table, Tuple};

/// A group's name: four bytes for its grouping and the first 96 bits of a SHA-256, so that it says
/// nothing of the values and is the same in every process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub [u8; 16]);

impl GroupId {
    /// Names the columns that the group is made of.
    #[must_use]
    pub fn grouping(self) -> [u8; GROUPING_BYTES] {
        let mut grouping = [0; GROUPING_BYTES];
        grouping.copy_from_slice(&self.0[..GROUPING_BYTES]);
        grouping
    }
}

/// How many bytes of a group's name are its grouping's.
pub const GROUPING_BYTES: usize = 4;

/// The groups of one change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    pub table: GroupId,
    /// The row's group after the change, or the only one. None for a barrier.
    pub first: Option<GroupId>,
    /// The group that the row left.
    pub second: Option<GroupId>,
}

impl Groups {
    /// The groups of a change.
    #[must_use]
    pub fn of(change: &Change) -> Self {
        let described = &change.table;
        let table = table_group(described);
        let barrier = Self { table, first: None, second: None };
        if change.action == Action::Truncate {
            return barrier;
        }
        let columns = match &described.grouping {
            Grouping::Key => Cow::Owned(key_columns(described)),
            Grouping::Columns(columns) => Cow::Borrowed(columns.as_slice()),
            Grouping::Table => Cow::Borrowed(&[][..]),
            Grouping::None => {
                return Self {
                    table,
                    first: Some(alone(described, change.position)),
                    second: None,
                };
            }
        };
        if columns.is_empty() {
            return barrier;
        }
        let group = |row: &Tuple, other: Option<&Tuple>| row_group(described, &columns, row, other);
        let new = change.new.as_ref().map(|row| group(row, change.old.as_ref()));
        let old = change.old.as_ref().map(|row| group(row, None));
        match (new, old) {
            (Some(new), old) => {
                Self { table, first: Some(new), second: old.filter(|old| *old != new) }
            }
            (None, old) => Self { table, first: old, second: None },
        }
    }

    /// The same as one that waits for all of its table and holds all of it.
    #[must_use]
    pub fn as_barrier(self) -> Self {
        Self { first: None, second: None, ..self }
    }

    /// The groups themselves, one or two; none for a barrier.
    pub fn iter(&self) -> impl Iterator<Item = GroupId> {
        [self.first, self.second].into_iter().flatten()
    }

    /// It waits for all of its table and holds all of it.
    #[must_use]
    pub fn is_barrier(&self) -> bool {
        self.first.is_none()
    }

    /// The columns that its groups are made of; nothing for a barrier.
    #[must_use]
    pub fn grouping(&self) -> Option<[u8; GROUPING_BYTES]> {
        self.first.map(GroupId::grouping)
    }
}

/// The name that tells a table from others.
#[must_use]
pub fn table_group(table: &Table) -> GroupId {
    name([0; GROUPING_BYTES], hasher(table))
}

/// The indexes of the columns that make a group; empty where the whole table is one.
pub fn key_columns(table: &Table) -> Vec<usize> {
    let chosen = |choose: fn(&Column) -> bool| -> Vec<usize> {
        (0..table.columns.len()).filter(|index| choose(&table.columns[*index])).collect()
    };
    let primary = chosen(|column| column.primary_key);
    if !primary.is_empty() && primary.iter().all(|index| table.columns[*index].identity) {
        return primary;
    }
    let identity = chosen(|column| column.identity);
    // All columns: REPLICA IDENTITY FULL, which names no key.
    if identity.len() == table.columns.len() { Vec::new() } else { identity }
}

fn row_group(table: &Table, columns: &[usize], row: &Tuple, other: Option<&Tuple>) -> GroupId {
    let mut hasher = hasher(table);
    for &column in columns {
        // Postgres sends the old key whenever it is out of line, so an unchanged one stands there.
        let source = match row.cells.get(column) {
            Some(Cell::Unchanged) => other.unwrap_or(row),
            _ => row,
        };
        match source.text(column) {
            Some(text) => {
                hasher.update([1]);
                hasher.update((text.len() as u64).to_le_bytes());
                hasher.update(text);
            }
            None => hasher.update([0]),
        }
    }
    let names = columns.iter().filter_map(|column| table.columns.get(*column));
    name(grouping(names.map(|column| column.name.as_str())), hasher)
}

/// A group that no other change is in.
fn alone(table: &Table, position: Position) -> GroupId {
    let mut hasher = hasher(table);
    hasher.update(position.commit_lsn.0.to_le_bytes());
    hasher.update(position.index.to_le_bytes());
    name(grouping(std::iter::empty()), hasher)
}

fn hasher(table: &Table) -> Sha256 {
    let mut hasher = Sha256::new();
    for part in [&table.schema, &table.name] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher
}

/// FNV-1a over the columns' names, whose order matters. A table has few groupings in its life, so
/// that 32 bits tell them apart.
fn grouping<'a>(columns: impl Iterator<Item = &'a str>) -> [u8; GROUPING_BYTES] {
    let mut hash: u32 = 0x811c_9dc5;
    let mut add = |byte: u8| hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    for column in columns {
        column.bytes().for_each(&mut add);
        // No name holds it.
        add(0);
    }
    hash.to_le_bytes()
}

fn name(grouping: [u8; GROUPING_BYTES], hasher: Sha256) -> GroupId {
    let digest = hasher.finalize();
    let mut id = [0; 16];
    id[..GROUPING_BYTES].copy_from_slice(&grouping);
    id[GROUPING_BYTES..].copy_from_slice(&digest[..16 - GROUPING_BYTES]);
    GroupId(id)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::change::{Lsn, Position};
    use crate::pg_type::Kind;

    fn table(columns: &[(&str, bool, bool)]) -> Arc<Table> {
        let column = |(name, primary_key, identity): &(&str, bool, bool)| Column {
            name: (*name).to_owned(),
            type_name: "text".to_owned(),
            kind: Kind::Text,
            identity: *identity,
            primary_key: *primary_key,
        };
        Arc::new(Table {
            oid: 1,
            schema: "public".to_owned(),
            name: "t".to_owned(),
            columns: columns.iter().map(column).collect(),
            grouping: Grouping::Key,
        })
    }

    fn grouped(table: &Arc<Table>, grouping: Grouping) -> Arc<Table> {
        Arc::new(Table { grouping, ..Table::clone(table) })
    }

    fn row(values: &[Option<&str>]) -> Tuple {
        let mut data = Vec::new();
        let cells = values.iter().map(|value| match value {
            None => Cell::Null,
            Some("?") => Cell::Unchanged,
            Some(text) => {
                let start = u32::try_from(data.len()).unwrap();
                data.extend_from_slice(text.as_bytes());
                Cell::Text { start, end: u32::try_from(data.len()).unwrap() }
            }
        });
        let cells = cells.collect();
        Tuple { data: Bytes::from(data), cells }
    }

    fn groups(table: &Arc<Table>, new: Option<Tuple>, old: Option<Tuple>) -> Groups {
        let action = match (&new, &old) {
            (Some(_), None) => Action::Insert,
            (Some(_), Some(_)) => Action::Update,
            (None, Some(_)) => Action::Delete,
            (None, None) => Action::Truncate,
        };
        Groups::of(&Change {
            position: Position { commit_lsn: Lsn(1), index: 0 },
            commit_timestamp_us: 0,
            action,
            table: Arc::clone(table),
            new,
            old,
        })
    }

    #[test]
    fn a_row_keeps_its_group_through_insert_update_and_delete() {
        let table = table(&[("id", true, true), ("body", false, false)]);
        let insert = groups(&table, Some(row(&[Some("1"), Some("a")])), None);
        let update = groups(&table, Some(row(&[Some("1"), Some("b")])), None);
        let delete = groups(&table, None, Some(row(&[Some("1"), None])));
        assert_eq!(insert, update);
        assert_eq!(insert.first, delete.first);
        let other = groups(&table, Some(row(&[Some("2"), Some("a")])), None);
        assert_ne!(insert.first, other.first);
    }

    #[test]
    fn a_changed_key_belongs_to_both_groups() {
        let table = table(&[("id", true, true), ("body", false, false)]);
        let moved =
            groups(&table, Some(row(&[Some("2"), Some("a")])), Some(row(&[Some("1"), None])));
        assert_eq!(moved.first, groups(&table, Some(row(&[Some("2"), None])), None).first);
        assert_eq!(moved.second, groups(&table, Some(row(&[Some("1"), None])), None).first);
    }

    #[test]
    fn an_unchanged_key_is_read_from_the_old_row() {
        let table = table(&[("id", true, true), ("body", false, false)]);
        let update =
            groups(&table, Some(row(&[Some("?"), Some("a")])), Some(row(&[Some("1"), None])));
        assert_eq!(update.first, groups(&table, Some(row(&[Some("1"), None])), None).first);
        assert_eq!(update.second, None);
    }

    #[test]
    fn without_a_key_the_table_is_one_group() {
        for identity in [true, false] {
            let table = table(&[("a", false, identity), ("b", false, identity)]);
            let one = groups(&table, Some(row(&[Some("1"), Some("a")])), None);
            let two = groups(&table, Some(row(&[Some("2"), Some("b")])), None);
            assert!(one.is_barrier());
            assert_eq!(one, two);
        }
    }

    #[test]
    fn chosen_columns_make_the_group() {
        let table = table(&[("id", true, true), ("customer", false, true), ("body", false, false)]);
        let table = grouped(&table, Grouping::Columns(vec![1]));
        let insert = groups(&table, Some(row(&[Some("1"), Some("ann"), Some("a")])), None);
        let other = groups(&table, Some(row(&[Some("2"), Some("ann"), Some("b")])), None);
        assert_eq!(insert, other);
        let delete = groups(&table, None, Some(row(&[Some("2"), Some("ann"), None])));
        assert_eq!(delete, insert);
        // The row changes its key and stays in its group; then it leaves it.
        let old = Some(row(&[Some("1"), Some("ann"), None]));
        let renamed = groups(&table, Some(row(&[Some("9"), Some("ann"), Some("a")])), old.clone());
        assert_eq!(renamed, insert);
        let moved = groups(&table, Some(row(&[Some("1"), Some("bob"), Some("a")])), old);
        assert_eq!(moved.second, insert.first);
        assert_ne!(moved.first, insert.first);
    }

    #[test]
    fn a_table_may_be_one_group_or_none() {
        let table = table(&[("id", true, true), ("body", false, false)]);
        let whole = grouped(&table, Grouping::Table);
        assert!(groups(&whole, Some(row(&[Some("1"), Some("a")])), None).is_barrier());
        let none = grouped(&table, Grouping::None);
        let at = |index| {
            let position = Position { commit_lsn: Lsn(1), index };
            alone(&none, position)
        };
        assert_ne!(at(0), at(1));
        assert_eq!(at(0).grouping(), at(1).grouping());
        let change = groups(&none, Some(row(&[Some("1"), Some("a")])), None);
        assert_eq!(change.first, Some(at(0)));
    }

    #[test]
    fn the_columns_of_a_group_are_a_part_of_its_name() {
        let table = table(&[("a", true, true), ("b", false, true), ("c", false, false)]);
        let by = |columns: &[usize]| {
            let table = grouped(&table, Grouping::Columns(columns.to_vec()));
            groups(&table, Some(row(&[Some("1"), Some("1"), None])), None)
        };
        assert_ne!(by(&[0]).first, by(&[1]).first);
        assert_ne!(by(&[0, 1]).grouping(), by(&[1, 0]).grouping());
        let key = groups(&table, Some(row(&[Some("1"), Some("1"), None])), None);
        assert_eq!(key, by(&[0]), "the key by another way");
        assert_eq!(by(&[0]).table, by(&[1]).table);
    }

    #[test]
    fn a_primary_key_outside_the_identity_gives_way_to_it() {
        let table = table(&[("id", true, false), ("code", false, true)]);
        let insert = groups(&table, Some(row(&[Some("1"), Some("x")])), None);
        let delete = groups(&table, None, Some(row(&[None, Some("x")])));
        assert_eq!(insert.first, delete.first);
    }

    #[test]
    fn null_and_the_empty_text_differ_and_columns_do_not_run_together() {
        let table = table(&[("a", true, true), ("b", true, true), ("c", false, false)]);
        let group = |values: &[Option<&str>]| groups(&table, Some(row(values)), None).first;
        assert_ne!(group(&[None, Some(""), None]), group(&[Some(""), None, None]));
        assert_ne!(group(&[Some("ab"), Some("c"), None]), group(&[Some("a"), Some("bc"), None]));
    }
}
