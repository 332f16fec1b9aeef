//! The columns of a draft: what its record, and its `changes`, show for each.

use super::draft::Draft;
use super::encode::{EncodeError, Value};
use crate::change::{Action, Cell, Tuple};

#[derive(Clone, Debug)]
pub(super) struct EditedColumn {
    /// The place in the table; nothing for a column that a transform added.
    pub(super) source: Option<usize>,
    /// Unless it is the source's.
    pub(super) name: Option<String>,
    /// JSON, unless it is the source's value.
    pub(super) value: Option<String>,
    pub(super) old: EditedOld,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EditedOld {
    /// As the change has it.
    Source,
    /// Not shown: the new value was edited, and the old one must not tell what it was.
    Hidden,
    /// JSON.
    Json(String),
}

/// A column, whether any was edited or not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column<'a> {
    pub(super) source: Option<usize>,
    /// Unless it is the source's.
    pub(super) name: Option<&'a str>,
    value: Option<&'a str>,
    old: &'a EditedOld,
}

impl Draft {
    /// The columns that the message has now, in their order.
    pub(super) fn columns(&self) -> impl Iterator<Item = Column<'_>> {
        let source = match self.edited {
            None => self.change.row().map_or(&[][..], |row| &row.cells),
            Some(_) => &[],
        };
        let source = source
            .iter()
            .take(self.change.table.columns.len())
            .enumerate()
            .filter(|(_, cell)| !matches!(cell, Cell::Absent))
            .map(|(index, _)| Column::of_source(index));
        let edited = self.edited.iter().flatten().map(|column| Column {
            source: column.source,
            name: column.name.as_deref(),
            value: column.value.as_deref(),
            old: &column.old,
        });
        source.chain(edited)
    }

    /// The column that shows the table's column at that place, unless it was removed.
    pub(super) fn column_of_source(&self, index: usize) -> Option<Column<'_>> {
        match self.edited {
            None => Some(Column::of_source(index)),
            Some(_) => self.columns().find(|column| column.source == Some(index)),
        }
    }

    pub(super) fn name<'a>(&'a self, column: &Column<'a>) -> &'a str {
        let source = || column.source.and_then(|index| self.change.table.columns.get(index));
        column.name.or_else(|| source().map(|source| source.name.as_str())).unwrap_or_default()
    }

    /// What the record shows for a column.
    pub(super) fn value<'a>(&'a self, column: &Column<'a>) -> Result<Value<'a>, EncodeError> {
        match (column.value, column.source, self.change.row()) {
            (Some(json), _, _) => Ok(Value::Json(json)),
            (None, Some(index), Some(row)) => self.cell(row, index),
            (None, _, _) => Ok(Value::Null),
        }
    }

    /// What `changes` shows for a column, if anything.
    pub(super) fn old<'a>(&'a self, column: &Column<'a>) -> Result<Option<Value<'a>>, EncodeError> {
        match column.old {
            EditedOld::Hidden => return Ok(None),
            EditedOld::Json(json) => return Ok(Some(Value::Json(json))),
            EditedOld::Source => {}
        }
        let (Action::Update, Some(old), Some(new), Some(index)) =
            (self.change.action, &self.change.old, &self.change.new, column.source)
        else {
            return Ok(None);
        };
        let differs = match (old.cells.get(index), new.cells.get(index)) {
            (Some(Cell::Null), Some(Cell::Text { .. }))
            | (Some(Cell::Text { .. }), Some(Cell::Null)) => true,
            (Some(Cell::Text { .. }), Some(Cell::Text { .. })) => {
                old.text(index) != new.text(index)
            }
            // Unknown on either side, or NULL on both.
            _ => false,
        };
        if differs { self.cell(old, index).map(Some) } else { Ok(None) }
    }

    fn cell<'a>(&'a self, row: &'a Tuple, index: usize) -> Result<Value<'a>, EncodeError> {
        match row.cells.get(index) {
            Some(Cell::Unchanged) => Ok(Value::Unchanged),
            Some(Cell::Text { .. }) => {
                let damaged = || EncodeError::Damaged { table: self.change.table.qualified_name() };
                let column = self.change.table.columns.get(index).ok_or_else(damaged)?;
                let text = row.text(index).ok_or_else(damaged)?;
                Ok(Value::Text { kind: &column.kind, text })
            }
            Some(Cell::Null | Cell::Absent) | None => Ok(Value::Null),
        }
    }
}

impl<'a> Column<'a> {
    fn of_source(index: usize) -> Self {
        Self { source: Some(index), name: None, value: None, old: &EditedOld::Source }
    }

    /// Is the value the one that Postgres sent?
    pub(super) fn is_source_value(&self) -> bool {
        self.value.is_none()
    }
}
