//! The folded stream against the tables as they are at one moment.

use super::canon::{canonical, digest};
use super::drops::SourceRow;
use super::fault::Fault;
use super::fold::{Fold, row_digest};
use super::report::TableReport;
use super::scratch::{Cell, Row, State};
use super::{Error, shorten};
use crate::change::Action;

/// Characters of a value that is shown.
const VALUE_CHARS_MAX: usize = 60;

/// What the operator allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Rows that no record names may be older than the slot.
    pub(super) allow_unmentioned: bool,
    pub(super) show_values: bool,
}

/// One table's comparison, row by row.
#[derive(Debug)]
pub(super) struct Comparison {
    table: usize,
    rules: Rules,
    pub(super) report: TableReport,
}

impl Comparison {
    pub(super) fn new(fold: &Fold<'_>, table: usize, rules: Rules) -> Self {
        let name = fold.tables[table].name.clone();
        Self { table, rules, report: TableReport { table: name, ..TableReport::default() } }
    }

    /// Takes a row of the source, its columns in the order of the fold's.
    pub(super) fn row(&mut self, fold: &mut Fold<'_>, source: SourceRow<'_>) -> Result<(), Error> {
        let row = source.json;
        self.report.rows += 1;
        let table = &fold.tables[self.table];
        let value = |name: &str| {
            let index = table.columns.iter().position(|column| column.name == name)?;
            row.get(index).map(AsRef::as_ref)
        };
        if !table.has_key {
            if let Some(digest) = row_digest(table, value) {
                fold.scratch.add_to_bag(self.table, digest, -1, false)?;
            }
            return Ok(());
        }
        let Some(key) = fold.key_of(self.table, value) else { return Ok(()) };
        let found = fold.scratch.row(self.table, &key)?;
        if found.is_some() {
            fold.scratch.set_matched(self.table, &key)?;
        }
        if fold.scratch.is_held(self.table, &key)? {
            self.report.held += 1;
            return Ok(());
        }
        let digests: Vec<_> = row.iter().map(|value| digest(&canonical(value))).collect();
        let differences = |found: &Row| -> Vec<usize> {
            let is_different = |(index, cell): (usize, &Cell)| match cell {
                Cell::Unknown | Cell::Altered => None,
                Cell::Value(value) => (digests.get(index) != Some(value)).then_some(index),
                Cell::Absent => {
                    row.get(index).is_some_and(|value| value != "null").then_some(index)
                }
            };
            found.cells.iter().enumerate().filter_map(is_different).collect()
        };
        let is_same = |row: &Row| match row.state {
            State::Live => differences(row).is_empty(),
            State::Unknown | State::Opaque => true,
            State::Deleted => false,
        };
        if let Some(row) = found.as_ref().filter(|row| is_same(row)) {
            self.count(row);
            return Ok(());
        }
        // It may be in between two changes that came while the moment was chosen.
        if let Some(row) = fold.scratch.versions(self.table, &key)?.iter().find(|row| is_same(row))
        {
            self.count(row);
            return Ok(());
        }
        if fold.scratch.is_given_up(self.table, &key)? {
            self.report.given_up += 1;
            return Ok(());
        }
        let shown = fold.tables[self.table].show(&key);
        let Some(found) = found else {
            if self.is_dropped(source, Action::Insert)? {
                return Ok(());
            }
            if self.rules.allow_unmentioned {
                self.report.unmentioned += 1;
            } else {
                fold.faults.add(Fault::Missing, || format!("{shown}: the whole row"));
            }
            return Ok(());
        };
        // It came back; or what changed it since was dropped.
        let last = if found.state == State::Deleted { Action::Insert } else { Action::Update };
        if self.is_dropped(source, last)? {
            return Ok(());
        }
        if found.state == State::Deleted {
            let text = format!("{shown}: in the table, but deleted in the stream");
            fold.faults.add(Fault::Different, || text);
            return Ok(());
        }
        let different = differences(&found);
        let table = &mut fold.tables[self.table];
        different.iter().for_each(|&index| table.different[index] += 1);
        let show = |index: &usize| {
            let name = &table.columns[*index].name;
            let in_stream = match found.cells.get(*index) {
                Some(Cell::Absent) => "in no record",
                _ => "different",
            };
            let values = found.values.as_ref().filter(|_| self.rules.show_values);
            let stream = values.and_then(|values| values.get(*index)?.as_deref());
            match (stream, row.get(*index)) {
                (Some(stream), Some(source)) => format!(
                    "`{name}` is {} in the stream and {} in Postgres",
                    shorten(stream, VALUE_CHARS_MAX),
                    shorten(source, VALUE_CHARS_MAX)
                ),
                (None, Some(source)) if self.rules.show_values => format!(
                    "`{name}` is {in_stream}, and {} in Postgres",
                    shorten(source, VALUE_CHARS_MAX)
                ),
                _ => format!("`{name}` is {in_stream}"),
            }
        };
        let text = different.iter().map(show).collect::<Vec<_>>().join(", ");
        fold.faults.add(Fault::Different, || format!("{shown}: {text}"));
        Ok(())
    }

    /// Counts a row that a transform drops, if one does.
    fn is_dropped(&mut self, source: SourceRow<'_>, action: Action) -> Result<bool, Error> {
        let Some(file) = source.dropped_by(action)? else { return Ok(false) };
        *self.report.dropped.entry(file).or_default() += 1;
        Ok(true)
    }

    /// Counts a row that is as it has to be, and what of it could be compared.
    fn count(&mut self, row: &Row) {
        if row.state != State::Live {
            self.report.unjudged += 1;
            return;
        }
        self.report.compared += 1;
        for cell in &row.cells {
            match cell {
                Cell::Value(_) | Cell::Absent => self.report.values += 1,
                Cell::Altered | Cell::Unknown => self.report.altered += 1,
            }
        }
    }

    /// After the last row: what the stream has and the table has not.
    pub(super) fn finish(mut self, fold: &mut Fold<'_>) -> Result<TableReport, Error> {
        let table = &fold.tables[self.table];
        self.report.opaque = table.opaque;
        let columns = table.columns.iter().zip(&table.different);
        let differ = columns.filter(|(_, count)| **count > 0);
        self.report.columns = differ.map(|(column, n)| (column.name.clone(), *n)).collect();
        if !table.has_key {
            let (stream, source) = fold.scratch.bag_rest(self.table)?;
            let name = self.report.table.clone();
            self.report.compared = self.report.rows.saturating_sub(source);
            if fold.scratch.is_held(self.table, super::WHOLE_TABLE)? {
                self.report.held += stream.max(source);
                self.report.compared = 0;
            } else if fold.scratch.is_given_up(self.table, super::WHOLE_TABLE)? {
                self.report.given_up += stream.max(source);
                self.report.compared = 0;
            } else if source > 0 && self.rules.allow_unmentioned {
                self.report.unmentioned += source;
            } else if source > 0 {
                let text = format!("{name}: {source} rows of the table, which has no key");
                fold.faults.add(Fault::Missing, || text);
            }
            if stream > 0 && self.report.held + self.report.given_up == 0 {
                let text = format!("{name}: {stream} rows that the table has not");
                fold.faults.add(Fault::Different, || text);
            }
            return Ok(self.report);
        }
        let (mut stale, mut held, mut given_up) = (Vec::new(), 0, 0);
        let mut count = 0_u64;
        fold.scratch.unmatched(self.table, |key| {
            let gone = |row: &Row| matches!(row.state, State::Deleted | State::Unknown);
            if fold.scratch.is_held(self.table, key)? {
                held += 1;
            } else if fold.scratch.is_given_up(self.table, key)? {
                given_up += 1;
            } else if !fold.scratch.versions(self.table, key)?.iter().any(gone) {
                count += 1;
                if stale.len() < 5 {
                    stale.push(fold.tables[self.table].show(key));
                }
            }
            Ok(())
        })?;
        self.report.held += held;
        self.report.given_up += given_up;
        for _ in 0..count {
            let row = stale.pop();
            fold.faults.add(Fault::Different, || {
                let row = row.unwrap_or_default();
                format!("{row}: deleted in the table, but not in the stream")
            });
        }
        Ok(self.report)
    }
}
