//! Which changes must keep their order among each other.
//!
//! A group is taken from source columns, before any transform: the primary key where it lies in the
//! replica identity (so that deletes carry it too), otherwise the replica identity, otherwise the
//! whole table. A change of the key belongs to the group that it leaves and to the one that it joins.

use sha2::{Digest, Sha256};

use crate::change::{Action, Cell, Change, Column, Table, Tuple};

/// A group's name: the first 128 bits of a SHA-256, so that it says nothing of the values and is the
/// same in every process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub [u8; 16]);

/// The groups of one change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    pub table: GroupId,
    /// The row's group after the change, or the only one.
    pub first: Option<GroupId>,
    /// The group that a changed key left.
    pub second: Option<GroupId>,
}

impl Groups {
    /// The groups of a change. A truncate has none of its own: it is a barrier for its table.
    #[must_use]
    pub fn of(change: &Change) -> Self {
        let table = table_group(&change.table);
        if change.action == Action::Truncate {
            return Self { table, first: None, second: None };
        }
        let key = key_columns(&change.table);
        let group = |row: &Tuple, other: Option<&Tuple>| row_group(&change.table, &key, row, other);
        let new = change.new.as_ref().map(|row| group(row, change.old.as_ref()));
        let old = change.old.as_ref().map(|row| group(row, None));
        match (new, old) {
            (Some(new), old) => {
                Self { table, first: Some(new), second: old.filter(|old| *old != new) }
            }
            (None, old) => Self { table, first: old, second: None },
        }
    }

    /// The groups themselves, one or two; none for a truncate.
    pub fn iter(&self) -> impl Iterator<Item = GroupId> {
        [self.first, self.second].into_iter().flatten()
    }

    /// A truncate waits for all of its table and holds all of it.
    #[must_use]
    pub fn is_barrier(&self) -> bool {
        self.first.is_none()
    }
}

/// The name of a table's own group.
#[must_use]
pub fn table_group(table: &Table) -> GroupId {
    name(hasher(table))
}

/// The indexes of the columns that make a group; empty where the whole table is one.
fn key_columns(table: &Table) -> Vec<usize> {
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

fn row_group(table: &Table, key: &[usize], row: &Tuple, other: Option<&Tuple>) -> GroupId {
    let mut hasher = hasher(table);
    for &column in key {
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
    name(hasher)
}

fn hasher(table: &Table) -> Sha256 {
    let mut hasher = Sha256::new();
    for part in [&table.schema, &table.name] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher
}

fn name(hasher: Sha256) -> GroupId {
    let digest = hasher.finalize();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
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
        })
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
            assert_eq!(one.first, two.first);
        }
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
