//! A record as a consumer of the stream reads it.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::change::{Action, Lsn, Position};
use crate::message::header;
use crate::sink::ReadRecord;

/// Columns by their names, with the JSON of their values.
pub(super) type Columns<'a> = HashMap<String, &'a RawValue>;

/// A message, as far as it is needed to fold it.
#[derive(Deserialize)]
pub(super) struct Message<'a> {
    #[serde(borrow)]
    pub(super) record: Columns<'a>,
    #[serde(borrow)]
    pub(super) changes: Option<Columns<'a>>,
    pub(super) action: Action,
    pub(super) metadata: Metadata,
}

impl<'a> Message<'a> {
    /// The JSON of a column after the change.
    pub(super) fn after(&self, column: &str) -> Option<&'a str> {
        self.record.get(column).map(|value| value.get())
    }

    /// The JSON of a column before it.
    pub(super) fn before(&self, column: &str) -> Option<&'a str> {
        let before = self.changes.as_ref().and_then(|changes| changes.get(column));
        before.map(|value| value.get()).or_else(|| self.after(column))
    }
}

#[derive(Deserialize)]
pub(super) struct Metadata {
    pub(super) table_schema: String,
    pub(super) table_name: String,
    pub(super) idempotency_key: String,
    #[serde(default)]
    pub(super) unchanged_columns: Vec<String>,
    /// Everything else: lists and objects whose names end with `_columns` tell what a transform
    /// has altered.
    #[serde(flatten)]
    rest: HashMap<String, serde_json::Value>,
}

impl Metadata {
    /// Whether a transform notes that it altered this column: `stripped_columns` and
    /// `compressed_columns` of the ready-made ones, and whatever else is named so.
    pub(super) fn is_altered(&self, column: &str) -> bool {
        self.rest.iter().filter(|(name, _)| name.ends_with("_columns")).any(
            |(_, noted)| match noted {
                serde_json::Value::Array(names) => names.iter().any(|name| name == column),
                serde_json::Value::Object(names) => names.contains_key(column),
                serde_json::Value::Null
                | serde_json::Value::Bool(_)
                | serde_json::Value::Number(_)
                | serde_json::Value::String(_) => false,
            },
        )
    }
}

/// What the headers say.
pub(super) struct Headers {
    pub(super) pipeline: String,
    pub(super) key: String,
    pub(super) position: Position,
    pub(super) part: u32,
    pub(super) parts: u32,
    pub(super) table: String,
    pub(super) action: String,
}

impl Headers {
    /// # Errors
    ///
    /// The name of the header that is missing or cannot be read.
    pub(super) fn of(record: &ReadRecord) -> Result<Self, &'static str> {
        let text = |name: &'static str| {
            let value = record.header(name).and_then(|value| std::str::from_utf8(value).ok());
            value.filter(|value| !value.is_empty()).map(str::to_owned).ok_or(name)
        };
        let key = text(header::KEY)?;
        let (part, parts) = text(header::PART)?
            .split_once('/')
            .and_then(|(part, parts)| Some((part.parse().ok()?, parts.parse().ok()?)))
            .filter(|(part, parts): &(u32, u32)| part < parts)
            .ok_or(header::PART)?;
        Ok(Self {
            pipeline: text(header::PIPELINE)?,
            position: position(&key).ok_or(header::KEY)?,
            key,
            part,
            parts,
            table: text(header::TABLE)?,
            action: text(header::ACTION)?,
        })
    }
}

/// What an idempotency key is made of.
fn position(key: &str) -> Option<Position> {
    let text = String::from_utf8(BASE64.decode(key).ok()?).ok()?;
    let (lsn, index) = text.split_once(':')?;
    Some(Position { commit_lsn: Lsn(lsn.parse().ok()?), index: index.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::idempotency_key;

    #[test]
    fn keys_tell_their_position() {
        let at = Position { commit_lsn: Lsn(u64::MAX), index: 7 };
        assert_eq!(position(&idempotency_key(at)), Some(at));
        for key in ["", "?", "MTow", "MTowOg=="] {
            let expected = (key == "MTow").then_some(Position { commit_lsn: Lsn(1), index: 0 });
            assert_eq!(position(key), expected, "{key}");
        }
    }

    #[test]
    fn transforms_note_what_they_altered() {
        let json = r#"{"table_schema":"public","table_name":"t","idempotency_key":"",
            "stripped_columns":["a"],"compressed_columns":{"b":{"codec":"zstd"}},
            "unchanged_columns":["c"],"other":["d"],"record_pks":["1"]}"#;
        let metadata: Metadata = serde_json::from_str(json).unwrap();
        let altered = ["a", "b", "c", "d"].map(|column| metadata.is_altered(column));
        assert_eq!(altered, [true, true, false, false]);
    }
}
