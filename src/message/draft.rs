//! A message being shaped: a change, and what transforms have made of it.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use sluicebox_edits::{
    check_column, check_header, check_json, check_key, check_stream_name, no_column,
};

use super::columns::{Column, EditedColumn, EditedOld};
use super::encode::{EncodeError, Value};
use super::envelope::{Envelope, TableParts, json_string};
use super::record::Sizes;
use super::weight::Makers;
use crate::change::{Action, Change};
use crate::pg_type::Kind;
use crate::sink::record::Header;

pub use sluicebox_edits::EditError;

impl From<EncodeError> for EditError {
    fn from(error: EncodeError) -> Self {
        Self::Encode(Box::new(error))
    }
}

/// A column as the message shows it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnInfo<'a> {
    pub name: &'a str,
    /// Postgres's type, also after an edit; `json` for a column that a transform added.
    pub type_name: &'a str,
    /// Part of the primary key.
    pub key: bool,
    /// A TOAST value that the update did not touch: the message names it and does not hold it.
    pub unchanged: bool,
    /// Of its value as JSON.
    pub bytes: u64,
}

/// A change on its way through the transforms: edits are kept beside the change, which is never
/// copied.
#[derive(Clone, Debug)]
pub struct Draft {
    pub(super) change: Change,
    pub(super) envelope: Arc<Envelope>,
    pub(super) table: Arc<TableParts>,
    /// The columns in their order, from the first edit of any.
    pub(super) edited: Option<Vec<EditedColumn>>,
    pub(super) extras: Extras,
    pub(super) sizes: Sizes,
}

/// What transforms added beside the columns.
#[derive(Clone, Debug, Default)]
pub(super) struct Extras {
    /// Keys and JSON values in `metadata`.
    pub(super) annotations: Vec<(String, String)>,
    pub(super) headers: Vec<Header>,
    /// The value of `sb-passed`.
    pub(super) passed: String,
    /// In place of the JSON message.
    pub(super) body: Option<Bytes>,
    /// The transform that made `body`.
    replaced_by: Option<Arc<str>>,
    pub(super) makers: Makers,
    /// Where the record goes, unless to the pipeline's own stream.
    stream: Option<Arc<str>>,
    /// Index and count, for a change that became several records.
    pub(super) part: Option<(u32, u32)>,
}

impl Draft {
    #[must_use]
    pub fn new(change: Change, envelope: Arc<Envelope>) -> Self {
        let table = envelope.table(&change.table);
        let (extras, sizes) = Default::default();
        Self { change, envelope, table, edited: None, extras, sizes }
    }

    /// The change as Postgres sent it, whatever was edited.
    #[must_use]
    pub fn change(&self) -> &Change {
        &self.change
    }

    /// How many columns the message has now, unchanged ones included.
    #[must_use]
    pub fn column_count(&self) -> usize {
        self.columns().count()
    }

    /// A column by its place among those that the message has now. Asking for a column's size
    /// reads its value once; see [`Self::column_name`] for what costs nothing.
    #[must_use]
    pub fn column(&self, index: usize) -> Option<ColumnInfo<'_>> {
        self.columns().nth(index).map(|column| self.info(&column))
    }

    /// The name of the column at that place.
    #[must_use]
    pub fn column_name(&self, index: usize) -> Option<&str> {
        self.columns().nth(index).map(|column| self.name(&column))
    }

    /// The place of the column of that name among those that the message has now.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        self.columns().position(|column| self.name(&column) == name)
    }

    /// A column's value as JSON text. Nothing where there is no such column or where it is
    /// unchanged.
    ///
    /// # Errors
    ///
    /// When Postgres's text is not UTF-8.
    pub fn json(&self, name: &str) -> Result<Option<Cow<'_, str>>, EditError> {
        let Some(column) = self.named(name) else { return Ok(None) };
        Ok(self.value_json(&column, self.value(&column)?)?)
    }

    /// A column's value as Postgres's text; of an edited one, a JSON string's content or the JSON
    /// text of anything else. Nothing where there is no such column, where it is unchanged, and
    /// where it is NULL.
    ///
    /// # Errors
    ///
    /// When Postgres's text is not UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<Cow<'_, str>>, EditError> {
        let Some(column) = self.named(name) else { return Ok(None) };
        Ok(match self.value(&column)? {
            Value::Null | Value::Unchanged | Value::Json("null") => None,
            Value::Text { text, .. } => match std::str::from_utf8(text) {
                Ok(text) => Some(Cow::Borrowed(text)),
                Err(_) => return Err(self.not_utf8(&column).into()),
            },
            Value::Json(json) => Some(match serde_json::from_str::<String>(json) {
                Ok(content) => Cow::Owned(content),
                Err(_) => Cow::Borrowed(json),
            }),
        })
    }

    /// The content of a column that Postgres sent and that is written as a string with all of it, without
    /// making the JSON. Nothing for every other column, which may be a string all the same.
    ///
    /// # Errors
    ///
    /// When Postgres's text is not UTF-8.
    pub(crate) fn plain_text(&self, name: &str) -> Result<Option<&str>, EditError> {
        let Some(column) = self.named(name) else { return Ok(None) };
        match self.value(&column)? {
            Value::Text { kind: Kind::Text, text } => match std::str::from_utf8(text) {
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(self.not_utf8(&column).into()),
            },
            Value::Text { .. } | Value::Null | Value::Unchanged | Value::Json(_) => Ok(None),
        }
    }

    /// A column's value from before the change, as `changes` shows it: only in an update, only
    /// where it is known, and only where it differs. Ask before the column is edited: editing
    /// hides it.
    ///
    /// # Errors
    ///
    /// When Postgres's text is not UTF-8.
    pub fn old_json(&self, name: &str) -> Result<Option<Cow<'_, str>>, EditError> {
        let Some(column) = self.named(name) else { return Ok(None) };
        let Some(old) = self.old(&column)? else { return Ok(None) };
        Ok(self.value_json(&column, old)?)
    }

    /// Gives a column a value, and adds the column at the end if there is none of that name. Its
    /// value from before the change leaves `changes`, so that what an edit hides does not stay
    /// there; see [`Self::set_old_json`].
    ///
    /// # Errors
    ///
    /// When it is not JSON, the name is empty, or the whole message was replaced.
    pub fn set_json(&mut self, name: &str, json: String) -> Result<(), EditError> {
        check_column(name)?;
        let json = valid_json(name, json)?;
        let found = self.find(name);
        let columns = self.edit()?;
        match found.and_then(|index| columns.get_mut(index)) {
            Some(column) => {
                column.value = Some(json);
                column.old = EditedOld::Hidden;
            }
            None => columns.push(EditedColumn {
                source: None,
                name: Some(name.to_owned()),
                value: Some(json),
                old: EditedOld::Hidden,
            }),
        }
        Ok(())
    }

    /// Gives a column a text, as a JSON string; otherwise as [`Self::set_json`].
    ///
    /// # Errors
    ///
    /// When the whole message was replaced.
    pub fn set_text(&mut self, name: &str, text: &str) -> Result<(), EditError> {
        let mut json = Vec::with_capacity(text.len() + 2);
        json_string(&mut json, text);
        self.set_json(name, String::from_utf8(json).expect("a JSON string of a str is UTF-8"))
    }

    /// Puts a value into `changes`.
    ///
    /// # Errors
    ///
    /// When it is not JSON, there is no such column, the change is not an update, or the whole
    /// message was replaced.
    pub fn set_old_json(&mut self, name: &str, json: String) -> Result<(), EditError> {
        if self.change.action != Action::Update {
            return Err(EditError::NoOldValues { column: name.to_owned() });
        }
        let json = valid_json(name, json)?;
        let found = self.find(name);
        let columns = self.edit()?;
        let column = found.and_then(|index| columns.get_mut(index));
        column.ok_or_else(|| no_column(name))?.old = EditedOld::Json(json);
        Ok(())
    }

    /// Takes a column out of the record, out of `changes` and out of the metadata that names or
    /// repeats it. False where there is no such column.
    ///
    /// # Errors
    ///
    /// When the whole message was replaced.
    pub fn remove(&mut self, name: &str) -> Result<bool, EditError> {
        let found = self.find(name);
        self.refuse_replaced()?;
        let Some(index) = found else { return Ok(false) };
        self.edit()?.remove(index);
        Ok(true)
    }

    /// Gives a column another name, in its place and wherever the message names it.
    ///
    /// # Errors
    ///
    /// When there is no such column, the new name is taken or empty, or the whole message was
    /// replaced.
    pub fn rename(&mut self, from: &str, to: &str) -> Result<(), EditError> {
        self.refuse_replaced()?;
        check_column(to)?;
        let index = self.find(from).ok_or_else(|| no_column(from))?;
        if from == to {
            return Ok(());
        }
        if self.find(to).is_some() {
            return Err(EditError::ColumnExists { column: to.to_owned() });
        }
        if let Some(column) = self.edit()?.get_mut(index) {
            column.name = Some(to.to_owned());
        }
        self.rename_maker(from, to);
        Ok(())
    }

    /// Sets `metadata.<key>`.
    ///
    /// # Errors
    ///
    /// When the key is empty or one of Sluicebox's own, the value is not JSON, or the whole
    /// message was replaced.
    pub fn annotate(&mut self, key: &str, json: String) -> Result<(), EditError> {
        self.refuse_replaced()?;
        check_key(key)?;
        let json = valid_json(key, json)?;
        self.sizes.forget_total();
        let annotations = &mut self.extras.annotations;
        match annotations.iter_mut().find(|(known, _)| known == key) {
            Some((_, value)) => *value = json,
            None => annotations.push((key.to_owned(), json)),
        }
        Ok(())
    }

    /// What transforms have set at `metadata.<key>`, as JSON text.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<&str> {
        let annotations = &self.extras.annotations;
        annotations.iter().find(|(known, _)| known == key).map(|(_, json)| json.as_str())
    }

    /// Adds a header behind Sluicebox's own. Two of one name are both kept.
    ///
    /// # Errors
    ///
    /// When the name is empty or starts with `sb-`, or there are [`sluicebox_edits::HEADERS_MAX`] already.
    pub fn add_header(&mut self, name: &str, value: &[u8]) -> Result<(), EditError> {
        check_header(name, self.extras.headers.len())?;
        self.sizes.forget_total();
        self.extras.headers.push(Header {
            name: Bytes::copy_from_slice(name.as_bytes()),
            value: Bytes::copy_from_slice(value),
        });
        Ok(())
    }

    /// Replaces the whole message by a body of any form that this transform made. Columns and
    /// metadata can be read from here on, not edited; headers stay.
    pub fn set_message(&mut self, body: Bytes, transform: &Arc<str>) {
        self.sizes.forget_total();
        self.extras.body = Some(body);
        self.extras.replaced_by = Some(Arc::clone(transform));
    }

    /// Was the whole message replaced?
    #[must_use]
    pub fn is_replaced(&self) -> bool {
        self.extras.body.is_some()
    }

    /// The transform that replaced the whole message last, if any did.
    #[must_use]
    pub fn replaced_by(&self) -> Option<&str> {
        self.extras.replaced_by.as_deref()
    }

    /// Sends the record to another stream of the sink's basin, or to the pipeline's own again.
    ///
    /// # Errors
    ///
    /// When S2 takes no stream of that name.
    pub fn route_to(&mut self, stream: Option<&str>) -> Result<(), EditError> {
        if let Some(name) = stream {
            check_stream_name(name)?;
        }
        self.extras.stream = stream.map(Into::into);
        Ok(())
    }

    /// The stream that transforms chose; nothing for the pipeline's own.
    #[must_use]
    pub fn stream(&self) -> Option<&Arc<str>> {
        self.extras.stream.as_ref()
    }

    /// Notes in the header `sb-passed` that this transform failed and let the message pass.
    pub fn set_passed(&mut self, transform: &str) {
        self.sizes.forget_total();
        let passed = &mut self.extras.passed;
        if !passed.is_empty() {
            passed.push(',');
        }
        passed.push_str(transform);
    }

    /// Which of how many records of its change this is: index from 0, and count.
    #[must_use]
    pub fn part(&self) -> (u32, u32) {
        self.extras.part.unwrap_or((0, 1))
    }

    /// Numbers the records of one change anew: needed where a part was split again or dropped.
    pub fn set_part(&mut self, index: u32, count: u32) {
        self.sizes.forget_total();
        self.extras.part = Some((index, count));
    }

    /// One draft for each body that this transform made, numbered in their order, with this one's
    /// headers and stream.
    #[must_use]
    pub fn split(self, bodies: Vec<Bytes>, transform: &Arc<str>) -> Vec<Self> {
        let count = u32::try_from(bodies.len()).unwrap_or(u32::MAX);
        let parts = (0..count).zip(bodies).map(|(index, body)| {
            let mut part = self.clone();
            part.set_message(body, transform);
            part.set_part(index, count);
            part
        });
        parts.collect()
    }

    /// The columns whose values take most in JSON, largest first. Empty where the whole message
    /// was replaced.
    #[must_use]
    pub fn largest_columns(&self, count: usize) -> Vec<(String, u64)> {
        if self.is_replaced() {
            return Vec::new();
        }
        let mut columns: Vec<_> =
            self.columns().map(|column| (self.name(&column), self.bytes(&column))).collect();
        columns.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        columns.truncate(count);
        columns.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
    }

    fn info<'a>(&'a self, column: &Column<'a>) -> ColumnInfo<'a> {
        let source = column.source.and_then(|index| self.change.table.columns.get(index));
        ColumnInfo {
            name: self.name(column),
            type_name: source.map_or("json", |source| &source.type_name),
            key: source.is_some_and(|source| source.primary_key),
            unchanged: matches!(self.value(column), Ok(Value::Unchanged)),
            bytes: self.bytes(column),
        }
    }

    fn value_json(
        &self,
        column: &Column<'_>,
        value: Value<'_>,
    ) -> Result<Option<Cow<'_, str>>, EncodeError> {
        if matches!(value, Value::Unchanged) {
            return Ok(None);
        }
        let mut json = Vec::new();
        self.write(&mut json, column, value)?;
        Ok(Some(Cow::Owned(String::from_utf8(json).expect("JSON is UTF-8"))))
    }

    fn refuse_replaced(&self) -> Result<(), EditError> {
        if self.is_replaced() { Err(EditError::Replaced) } else { Ok(()) }
    }

    /// The columns for an edit, which makes known sizes of the whole invalid.
    fn edit(&mut self) -> Result<&mut Vec<EditedColumn>, EditError> {
        self.refuse_replaced()?;
        self.sizes.forget_total();
        let columns = self.edited.take().unwrap_or_else(|| {
            let untouched = |column: Column<'_>| EditedColumn {
                source: column.source,
                name: None,
                value: None,
                old: EditedOld::Source,
            };
            self.columns().map(untouched).collect()
        });
        Ok(self.edited.insert(columns))
    }

    fn named(&self, name: &str) -> Option<Column<'_>> {
        self.columns().find(|column| self.name(column) == name)
    }
}

/// Checks that the text is one JSON value, without building it, and takes white space off its
/// ends.
fn valid_json(name: &str, json: String) -> Result<String, EditError> {
    check_json(name, &json)?;
    let trimmed = json.trim_matches([' ', '\t', '\r', '\n']);
    Ok(if trimmed.len() == json.len() { json } else { trimmed.to_owned() })
}
