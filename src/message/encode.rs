//! A draft as JSON: the message's body.

use super::columns::Column;
use super::draft::Draft;
use super::envelope::IdempotencyKey;
use super::out::{Capped, Out};
use super::string::{NotUtf8, write_string};
use super::time::Timestamp;
use super::value::write_value;
use crate::change::{Action, Cell};
use crate::pg_type::Kind;

/// Why a message has no JSON form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    #[error(
        "the column `{column}` of {table} holds bytes that are not UTF-8; \
         the database must be read with client_encoding UTF8"
    )]
    NotUtf8 { table: String, column: String },
    #[error("the body that a transform put in place of the message is not UTF-8 text")]
    BodyNotUtf8,
    #[error("a row of {table} is damaged: a value lies outside the bytes that hold it")]
    Damaged { table: String },
}

/// A value on its way to JSON.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    Null,
    /// Left out, and named in the metadata.
    Unchanged,
    /// As Postgres sent it.
    Text {
        kind: &'a Kind,
        text: &'a [u8],
    },
    /// As a transform gave it.
    Json(&'a str),
}

impl Draft {
    /// The whole message as it would be sent.
    ///
    /// # Errors
    ///
    /// When a value, or the body that was put in its place, is not UTF-8.
    pub fn message_json(&self) -> Result<String, EncodeError> {
        let json = match &self.extras.body {
            Some(body) => body.to_vec(),
            None => {
                let mut json = Vec::with_capacity(self.expected_bytes());
                self.encode(&mut json)?;
                json
            }
        };
        String::from_utf8(json).map_err(|_| EncodeError::BodyNotUtf8)
    }

    /// The beginning of the message in at most so many bytes, and whether it was cut. No more
    /// than that is built.
    ///
    /// # Errors
    ///
    /// As [`Self::message_json`].
    pub fn message_preview(&self, bytes_max: usize) -> Result<(String, bool), EncodeError> {
        let mut capped = Capped::new(bytes_max, self.expected_bytes());
        match &self.extras.body {
            Some(body) => {
                std::str::from_utf8(body).map_err(|_| EncodeError::BodyNotUtf8)?;
                capped.put(body);
            }
            None => self.encode(&mut capped)?,
        }
        let (mut stored, cut) = capped.into_stored();
        if let Err(error) = std::str::from_utf8(&stored) {
            stored.truncate(error.valid_up_to());
        }
        Ok((String::from_utf8(stored).expect("cut at a character"), cut))
    }

    /// How much memory to reserve for the message: most values grow little in JSON.
    pub(super) fn expected_bytes(&self) -> usize {
        let columns = self.columns().map(|column| match self.value(&column) {
            Ok(Value::Text { text, .. }) => text.len() + text.len() / 32 + 4,
            Ok(Value::Json(json)) => json.len(),
            Ok(Value::Null | Value::Unchanged) | Err(_) => 4,
        });
        let annotations: usize =
            self.extras.annotations.iter().map(|(key, json)| key.len() + json.len() + 4).sum();
        let constants = self.table.bytes + self.envelope.metadata_tail.len();
        // The rest: punctuation, time, position, key, and the values in `record_pks`.
        columns.sum::<usize>() + constants + annotations + 256
    }

    pub(super) fn encode(&self, out: &mut impl Out) -> Result<(), EncodeError> {
        out.put(b"{\"record\":{");
        let mut unchanged = false;
        let mut first = true;
        for column in self.columns() {
            match self.value(&column)? {
                Value::Unchanged => unchanged = true,
                value @ (Value::Null | Value::Text { .. } | Value::Json(_)) => {
                    self.write_key(out, &column, &mut first);
                    self.write_counted(out, &column, value)?;
                }
            }
        }
        out.put(b"},\"changes\":");
        self.encode_changes(out)?;
        out.put(b",\"action\":\"");
        out.put(self.change.action.as_str().as_bytes());
        out.put(b"\",");
        self.encode_metadata(out, unchanged)?;
        out.put(b"}");
        Ok(())
    }

    fn encode_changes(&self, out: &mut impl Out) -> Result<(), EncodeError> {
        if self.change.action != Action::Update {
            out.put(b"null");
            return Ok(());
        }
        out.put(b"{");
        let mut first = true;
        for column in self.columns() {
            if let Some(old) = self.old(&column)? {
                self.write_key(out, &column, &mut first);
                self.write(out, &column, old)?;
            }
        }
        out.put(b"}");
        Ok(())
    }

    fn encode_metadata(&self, out: &mut impl Out, unchanged: bool) -> Result<(), EncodeError> {
        let position = self.change.position;
        out.put(&self.table.metadata_head);
        out.put(Timestamp::new(self.change.commit_timestamp_us).as_bytes());
        // A row that a backfill read is of no transaction.
        if self.change.action == Action::Read {
            out.put(b"\",\"commit_lsn\":null,\"commit_idx\":null");
        } else {
            let mut number = itoa::Buffer::new();
            out.put(b"\",\"commit_lsn\":");
            out.put(number.format(position.commit_lsn.0).as_bytes());
            out.put(b",\"commit_idx\":");
            out.put(number.format(position.index).as_bytes());
        }
        out.put(b",\"idempotency_key\":\"");
        out.put(IdempotencyKey::new(position).as_bytes());
        out.put(b"\",\"record_pks\":[");
        self.encode_key_values(out)?;
        out.put(b"]");
        if unchanged {
            let columns = self.columns();
            let unchanged =
                columns.filter(|column| matches!(self.value(column), Ok(Value::Unchanged)));
            out.put(b",\"unchanged_columns\":[");
            for (index, column) in unchanged.enumerate() {
                if index > 0 {
                    out.put(b",");
                }
                write_name(out, self.name(&column));
            }
            out.put(b"]");
        }
        out.put(&self.envelope.metadata_tail);
        for (key, json) in &self.extras.annotations {
            out.put(b",");
            write_name(out, key);
            out.put(b":");
            out.put(json.as_bytes());
        }
        out.put(b"}");
        Ok(())
    }

    /// The key's values as strings. They follow the edits: a key that was masked in the record
    /// must not show here.
    fn encode_key_values(&self, out: &mut impl Out) -> Result<(), EncodeError> {
        let mut first = true;
        for index in &self.table.key_columns {
            let Some(column) = self.column_of_source(*index) else { continue };
            let value = match self.value(&column)? {
                Value::Unchanged => continue,
                Value::Null if self.is_absent(*index) => continue,
                // Strings stay as they are, and there is no text for null.
                Value::Json(json) if !json.starts_with('"') && json != "null" => {
                    Value::Text { kind: &Kind::Text, text: json.as_bytes() }
                }
                Value::Text { text, .. } => Value::Text { kind: &Kind::Text, text },
                value @ (Value::Null | Value::Json(_)) => value,
            };
            if !std::mem::take(&mut first) {
                out.put(b",");
            }
            self.write(out, &column, value)?;
        }
        Ok(())
    }

    fn write_key(&self, out: &mut impl Out, column: &Column<'_>, first: &mut bool) {
        let first = std::mem::take(first);
        match (column.name, column.source.and_then(|index| self.table.keys.get(index))) {
            // Both forms are of one text: a comma, then the key.
            (None, Some(key)) => out.put(if first { &key[1..] } else { key }),
            (name, _) => {
                if !first {
                    out.put(b",");
                }
                write_name(out, name.unwrap_or_default());
                out.put(b":");
            }
        }
    }

    /// As [`Self::write`], for a value of the record, whose size may be known.
    fn write_counted(
        &self,
        out: &mut impl Out,
        column: &Column<'_>,
        value: Value<'_>,
    ) -> Result<(), EncodeError> {
        if out.counts_only() {
            out.skip(self.value_bytes(column, value)?);
            return Ok(());
        }
        self.write(out, column, value)
    }

    pub(super) fn write(
        &self,
        out: &mut impl Out,
        column: &Column<'_>,
        value: Value<'_>,
    ) -> Result<(), EncodeError> {
        match value {
            Value::Null => out.put(b"null"),
            Value::Unchanged => {}
            Value::Json(json) => out.put(json.as_bytes()),
            Value::Text { kind, text } => {
                write_value(out, kind, text).map_err(|NotUtf8| self.not_utf8(column))?;
            }
        }
        Ok(())
    }

    fn is_absent(&self, index: usize) -> bool {
        let cell = self.change.row().and_then(|row| row.cells.get(index));
        matches!(cell, None | Some(Cell::Absent))
    }

    pub(super) fn not_utf8(&self, column: &Column<'_>) -> EncodeError {
        EncodeError::NotUtf8 {
            table: self.change.table.qualified_name(),
            column: self.name(column).to_owned(),
        }
    }
}

fn write_name(out: &mut impl Out, name: &str) {
    write_string(out, name.as_bytes()).expect("a str is UTF-8");
}
