//! Files of messages: cases, messages as they are in the stream, and shorter ones written by hand.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{Case, Error};
use crate::change::{Action, Cell, Change, Column, Grouping, Lsn, Position, Table, Tuple};
use crate::pg_type::Kind;

/// 2026-01-01T00:00:00Z, for a message that says no time.
const TIMESTAMP_US: i64 = 1_767_225_600_000_000;

/// Where messages that say no position begin, and the step between two.
const LSN_FIRST: u64 = 0x0100_0000;
const LSN_STEP: u64 = 0x100;

/// A change to try a transform on.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What people call it: unique in a run.
    pub name: String,
    pub change: Change,
    /// Where it came from a case.
    pub case: Option<Box<Case>>,
}

/// A file that holds no messages, or not in a form that is known here.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("it holds no message")]
    Empty,
    #[error("it is not JSON after {read} messages")]
    Syntax { read: usize, source: serde_json::Error },
    #[error(
        "message {number} is neither a case (`messages export`), nor a record (`tail --json`), nor a \
         message (an object with `action` and `record`)"
    )]
    Form { number: usize, source: serde_json::Error },
    #[error("message {number} cannot be used")]
    Case { number: usize, source: Error },
    #[error("message {number} cannot be used: {reason}")]
    Message { number: usize, reason: String },
}

/// Reads messages: one after the other, in lines or not, or in an array.
///
/// Each is a case, a line of `tail --json`, or a message as the stream has it, which may be short:
///
/// ```json
/// {"action": "insert", "table": "public.documents", "key": ["id"], "types": {"price": "numeric"},
///  "record": {"id": 1, "title": "a", "price": "1.50", "meta": {"a": [1, 2]}}}
/// ```
///
/// Without `types`, a value's type is guessed from its JSON form. `changes` are the values before an
/// update, and `metadata.unchanged_columns` the large ones that it did not touch.
///
/// # Errors
///
/// When there is no message in it, or one of them cannot be used.
pub fn read(text: &str) -> Result<Vec<Sample>, ReadError> {
    let mut values: Vec<Box<RawValue>> = Vec::new();
    for value in serde_json::Deserializer::from_str(text).into_iter::<Box<RawValue>>() {
        let value = value.map_err(|source| ReadError::Syntax { read: values.len(), source })?;
        match serde_json::from_str::<Vec<Box<RawValue>>>(value.get()) {
            Ok(several) => values.extend(several),
            Err(_) => values.push(value),
        }
    }
    let mut samples: Vec<Sample> = Vec::with_capacity(values.len());
    for (index, value) in values.iter().enumerate() {
        if let Some(mut sample) = read_one(index + 1, value.get())? {
            if samples.iter().any(|known| known.name == sample.name) {
                sample.name = format!("{} ({})", sample.name, index + 1);
            }
            samples.push(sample);
        }
    }
    if samples.is_empty() { Err(ReadError::Empty) } else { Ok(samples) }
}

/// What tells the forms apart.
#[derive(Deserialize)]
struct Peek<'a> {
    sluicebox_case: Option<de::IgnoredAny>,
    seq_num: Option<de::IgnoredAny>,
    command: Option<de::IgnoredAny>,
    #[serde(borrow)]
    body: Option<std::borrow::Cow<'a, str>>,
}

/// Nothing for a command record of the stream.
fn read_one(number: usize, json: &str) -> Result<Option<Sample>, ReadError> {
    let form = |source| ReadError::Form { number, source };
    let peek: Peek<'_> = serde_json::from_str(json).map_err(form)?;
    if peek.sluicebox_case.is_some() {
        let case: Case = serde_json::from_str(json).map_err(form)?;
        let change = case.change().map_err(|source| ReadError::Case { number, source })?;
        let name = match &case.message {
            Some(id) => format!("message {id}"),
            None => format!("case {number}"),
        };
        return Ok(Some(Sample { name, change, case: Some(Box::new(case)) }));
    }
    if peek.command.is_some() {
        return Ok(None);
    }
    let written: Written = match (&peek.seq_num, &peek.body) {
        (Some(_), Some(body)) => serde_json::from_str(body),
        _ => serde_json::from_str(json),
    }
    .map_err(form)?;
    let name = match &written.name {
        Some(name) => name.clone(),
        None => format!("{} {number}", written.action),
    };
    let change = written.change(number).map_err(|reason| ReadError::Message { number, reason })?;
    Ok(Some(Sample { name, change, case: None }))
}

/// A message as the stream has it, with what may stand in the place of its metadata.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: Option<String>,
    action: Action,
    /// `schema.name`; `metadata` otherwise.
    table: Option<String>,
    #[serde(default)]
    key: Vec<String>,
    /// `pg_type.typname` by column.
    #[serde(default)]
    types: BTreeMap<String, String>,
    record: Option<Fields>,
    changes: Option<Fields>,
    metadata: Option<Metadata>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    table_schema: Option<String>,
    table_name: Option<String>,
    /// RFC 3339.
    commit_timestamp: Option<String>,
    commit_lsn: Option<u64>,
    commit_idx: Option<u64>,
    record_pks: Vec<Box<RawValue>>,
    unchanged_columns: Vec<String>,
}

/// An object's members in their order.
#[derive(Debug, Default)]
struct Fields(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of values by column")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

impl Fields {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.get())
    }
}

impl Written {
    fn change(self, number: usize) -> Result<Change, String> {
        let (schema, name) = self.table_name()?;
        let metadata = self.metadata.unwrap_or_default();
        let record = self.record.unwrap_or_default();
        let changes = self.changes.unwrap_or_default();
        let keys = key(&self.key, &metadata.record_pks, &record);

        let mut columns: Vec<Column> = Vec::new();
        let fields = record.0.iter().chain(&changes.0);
        let named = fields.map(|(name, value)| (name, Some(value.get())));
        let unchanged = metadata.unchanged_columns.iter().chain(self.types.keys());
        for (name, value) in named.chain(unchanged.map(|name| (name, None))) {
            if columns.iter().any(|column| column.name == *name) {
                continue;
            }
            let (type_name, kind) = column_type(self.types.get(name), value);
            let key = keys.contains(name);
            let name = name.clone();
            columns.push(Column { name, type_name, kind, identity: key, primary_key: key });
        }
        if let Some(missing) =
            keys.iter().find(|key| !columns.iter().any(|column| column.name == **key))
        {
            return Err(format!("the key names `{missing}`, which the record does not have"));
        }

        let commit_timestamp_us = match &metadata.commit_timestamp {
            None => TIMESTAMP_US,
            Some(text) => match text.parse::<jiff::Timestamp>() {
                Ok(time) => time.as_microsecond(),
                Err(_) => return Err("its `commit_timestamp` is not an RFC 3339 time".to_owned()),
            },
        };
        let (new, old) = match self.action {
            Action::Insert | Action::Read | Action::Update => {
                let is_unchanged = |name: &str| {
                    metadata.unchanged_columns.iter().any(|unchanged| unchanged == name)
                };
                let missing =
                    |name: &str| if is_unchanged(name) { Cell::Unchanged } else { Cell::Null };
                let old = (!changes.0.is_empty())
                    .then(|| tuple(&columns, &changes, |_| Cell::Absent))
                    .transpose()?;
                (Some(tuple(&columns, &record, missing)?), old)
            }
            Action::Delete => (None, Some(tuple(&columns, &record, |_| Cell::Absent)?)),
            Action::Truncate => (None, None),
        };
        let lsn = LSN_FIRST + LSN_STEP * number as u64;
        Ok(Change {
            position: Position {
                commit_lsn: Lsn(metadata.commit_lsn.unwrap_or(lsn)),
                index: metadata.commit_idx.unwrap_or(0),
            },
            commit_timestamp_us,
            action: self.action,
            table: Arc::new(Table { oid: 16_384, schema, name, columns, grouping: Grouping::Key }),
            new,
            old,
        })
    }

    fn table_name(&self) -> Result<(String, String), String> {
        if let Some(table) = &self.table {
            return Ok(match table.split_once('.') {
                Some((schema, name)) => (schema.to_owned(), name.to_owned()),
                None => ("public".to_owned(), table.clone()),
            });
        }
        let metadata = self.metadata.as_ref();
        let names = metadata.and_then(|metadata| {
            Some((metadata.table_schema.clone()?, metadata.table_name.clone()?))
        });
        names.ok_or_else(|| "it does not say its table: add \"table\": \"schema.name\"".to_owned())
    }
}

/// The columns of the primary key: as they are named, or else those with the values that
/// `record_pks` repeats, or else `id`.
fn key(named: &[String], record_pks: &[Box<RawValue>], record: &Fields) -> Vec<String> {
    if !named.is_empty() {
        return named.to_vec();
    }
    let plain = |json: &str| match serde_json::from_str::<String>(json) {
        Ok(text) => text,
        Err(_) => json.to_owned(),
    };
    let mut key: Vec<String> = Vec::new();
    for value in record_pks {
        let value = plain(value.get());
        let column = record
            .0
            .iter()
            .find(|(name, found)| !key.contains(name) && plain(found.get()) == value);
        key.extend(column.map(|(name, _)| name.clone()));
    }
    if key.is_empty() && record.get("id").is_some() {
        key.push("id".to_owned());
    }
    key
}

/// Guessed so that the message comes out as it was written.
fn column_type(named: Option<&String>, json: Option<&str>) -> (String, Kind) {
    if let Some(name) = named {
        return (name.clone(), Kind::builtin_named(name).unwrap_or(Kind::Text));
    }
    let first = json.and_then(|json| json.bytes().next()).unwrap_or(b'n');
    let (name, kind) = match first {
        b'{' | b'[' => ("jsonb", Kind::Json),
        b't' | b'f' => ("bool", Kind::Bool),
        b'-' | b'0'..=b'9' if json.is_some_and(|json| json.parse::<i64>().is_ok()) => {
            ("int8", Kind::Integer)
        }
        b'-' | b'0'..=b'9' => ("float8", Kind::Float),
        _ => ("text", Kind::Text),
    };
    (name.to_owned(), kind)
}

fn tuple(
    columns: &[Column],
    fields: &Fields,
    missing: impl Fn(&str) -> Cell,
) -> Result<Tuple, String> {
    let mut data = Vec::new();
    let mut cells = Vec::with_capacity(columns.len());
    for column in columns {
        let Some(json) = fields.get(&column.name) else {
            cells.push(missing(&column.name));
            continue;
        };
        let Some(text) = postgres_text(column, json)? else {
            cells.push(Cell::Null);
            continue;
        };
        let too_large = |_| "its values hold more than 4 GiB".to_owned();
        let start = u32::try_from(data.len()).map_err(too_large)?;
        data.extend_from_slice(text.as_bytes());
        cells.push(Cell::Text { start, end: u32::try_from(data.len()).map_err(too_large)? });
    }
    Ok(Tuple { data: Bytes::from(data), cells: cells.into() })
}

/// The text that Postgres would send for a JSON value; nothing for `null`.
fn postgres_text(column: &Column, json: &str) -> Result<Option<String>, String> {
    if json == "null" {
        return Ok(None);
    }
    if column.kind == Kind::Json {
        return Ok(Some(json.to_owned()));
    }
    Ok(Some(match json.bytes().next() {
        Some(b'"') => serde_json::from_str(json).map_err(|error| error.to_string())?,
        Some(b't') => "t".to_owned(),
        Some(b'f') => "f".to_owned(),
        Some(b'{' | b'[') => {
            return Err(format!(
                "`{}` is of the type {}: write its value as Postgres does, in a string",
                column.name, column.type_name
            ));
        }
        _ => json.to_owned(),
    }))
}
