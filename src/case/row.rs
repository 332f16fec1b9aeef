//! A row in a case: values by column, as Postgres wrote them.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap as _, Serializer};

use super::{Error, redact};
use crate::change::{Cell, Table, Tuple};
use crate::pg_type::Kind;

/// The key of the object that stands for bytes that are not UTF-8.
const BASE64_KEY: &str = "$base64";

/// Columns in the table's order. Written as an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Row(pub(super) Vec<(String, Value)>);

/// `null`, a string of Postgres's text, or `{"$base64": "…"}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Null,
    Text(String),
    Bytes(Vec<u8>),
}

impl Value {
    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Null => None,
            Self::Text(text) => Some(text.as_bytes()),
            Self::Bytes(bytes) => Some(bytes),
        }
    }
}

impl Row {
    pub(super) fn of(tuple: &Tuple, table: &Table) -> Self {
        let mut row = Vec::new();
        for (index, (column, cell)) in table.columns.iter().zip(&tuple.cells).enumerate() {
            let value = match cell {
                Cell::Unchanged | Cell::Absent => continue,
                Cell::Null => Value::Null,
                Cell::Text { .. } => {
                    let bytes = tuple.text(index).unwrap_or_default();
                    match std::str::from_utf8(bytes) {
                        Ok(text) => Value::Text(text.to_owned()),
                        Err(_) => Value::Bytes(bytes.to_vec()),
                    }
                }
            };
            row.push((column.name.clone(), value));
        }
        Self(row)
    }

    /// `name` is `new` or `old`: what a missing column means depends on it.
    pub(super) fn tuple(&self, name: &'static str, table: &Table) -> Result<Tuple, Error> {
        let known = |column: &str| table.columns.iter().any(|known| known.name == column);
        if let Some((column, _)) = self.0.iter().find(|(column, _)| !known(column)) {
            return Err(Error::UnknownColumn { row: name, column: column.clone() });
        }
        let missing = if name == "new" { Cell::Unchanged } else { Cell::Absent };
        let mut data = Vec::new();
        let mut cells = Vec::with_capacity(table.columns.len());
        for column in &table.columns {
            let Some((_, value)) = self.0.iter().find(|(known, _)| *known == column.name) else {
                cells.push(missing);
                continue;
            };
            let Some(bytes) = value.bytes() else {
                cells.push(Cell::Null);
                continue;
            };
            // Everywhere else Postgres has checked it, and messages are built on that.
            if column.kind == Kind::Json && serde_json::from_slice::<de::IgnoredAny>(bytes).is_err()
            {
                return Err(Error::NotJson {
                    row: name,
                    column: column.name.clone(),
                    type_name: column.type_name.clone(),
                });
            }
            let offset = |length: usize| u32::try_from(length).map_err(|_| Error::TooLarge);
            let start = offset(data.len())?;
            data.extend_from_slice(bytes);
            cells.push(Cell::Text { start, end: offset(data.len())? });
        }
        Ok(Tuple { data: Bytes::from(data), cells: cells.into() })
    }

    pub(super) fn redact(&mut self, table: &Table) {
        for (name, value) in &mut self.0 {
            let column = table.columns.iter().find(|column| column.name == *name);
            match value {
                Value::Null => {}
                Value::Text(text) => {
                    *text = match column {
                        Some(column) => redact::value(&column.kind, &column.type_name, text),
                        None => redact::value(&Kind::Text, "text", text),
                    };
                }
                Value::Bytes(bytes) => bytes.fill(0xff),
            }
        }
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    /// Makes values differ again that did before the redaction: `changes` shows only those.
    pub(super) fn keep_apart(&mut self, new: &Self, old_before: &Self, new_before: &Self) {
        for (name, value) in &mut self.0 {
            let differed = old_before.get(name) != new_before.get(name);
            if let Value::Text(text) = value
                && differed
                && new.get(name) == Some(&Value::Text(text.clone()))
            {
                *text = redact::another(text);
            }
        }
    }
}

impl Serialize for Row {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            match value {
                Value::Null => map.serialize_entry(name, &None::<()>)?,
                Value::Text(text) => map.serialize_entry(name, text)?,
                Value::Bytes(bytes) => {
                    let object = serde_json::json!({ BASE64_KEY: BASE64.encode(bytes) });
                    map.serialize_entry(name, &object)?;
                }
            }
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Rows;
        impl<'de> Visitor<'de> for Rows {
            type Value = Row;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of values by column")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row, A::Error> {
                let mut row = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    row.push(entry);
                }
                Ok(Row(row))
            }
        }
        deserializer.deserialize_map(Rows)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Values;
        impl<'de> Visitor<'de> for Values {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "null, a string of Postgres's text, or {{\"{BASE64_KEY}\": …}}")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
                Ok(Value::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Value, E> {
                Ok(Value::Text(text))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                match map.next_entry::<String, String>()? {
                    Some((key, text)) if key == BASE64_KEY => {
                        BASE64.decode(text).map(Value::Bytes).map_err(de::Error::custom)
                    }
                    _ => Err(de::Error::custom("an object here must be {\"$base64\": …}")),
                }
            }
        }
        deserializer.deserialize_any(Values)
    }
}
