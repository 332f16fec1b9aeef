//! What is left of a row in what would be sent of it. Pure.
//!
//! A module mends a message only if the row is in what comes out of it. So the values of the row are
//! looked for in the bodies: under their columns' names, and, where they are not there, anywhere else. No
//! value leaves this file, only names of columns, numbers and a hash.

use std::collections::{BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde_json::Value;

use crate::change::Change;
use crate::message::Draft;

/// Shorter texts are looked for as whole values only: they are in any long text.
const WITHIN_BYTES_MIN: usize = 4;

/// How many columns are looked for under other names; each may cost a walk through the body.
const ELSEWHERE_MAX: usize = 64;

/// What is left of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Remains {
    /// How many columns of the row have a value.
    pub(super) columns: u64,
    /// Those of them whose value is not there any more, also where something empty stands in its place.
    pub(super) left_out: BTreeSet<String>,
    /// Nothing tells of which row it is: neither the key's columns nor `metadata.record_pks`.
    pub(super) lacks_key: bool,
    /// It says another action or another table than the change is of.
    pub(super) is_misnamed: bool,
    pub(super) content: Content,
}

/// Whether the row is in the bodies at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Content {
    /// At least one of its values is, as it was, or the change has none.
    #[default]
    Recognised,
    /// Something is there, and none of the values: they may be packed or hashed, or it says the same of
    /// every row. With a hash of it, by which one can tell.
    Other(u64),
    /// Nothing at all.
    Nothing,
}

/// Looks for a change in the bodies of its records. `original` is the message as it was before any
/// transform.
pub(super) fn of(change: &Change, original: &Draft, bodies: &[&[u8]]) -> Remains {
    let body = parsed(bodies);
    let mut remains = Remains { is_misnamed: is_misnamed(change, &body), ..Remains::default() };
    let Some(row) = change.row() else {
        remains.content = if is_empty(&body) { Content::Nothing } else { Content::Recognised };
        return remains;
    };
    let record = body.get("record").and_then(Value::as_object);
    let names = change.table.columns.iter().map(|column| column.name.as_str()).collect();
    let content = Texts::of_body(&body, &names);
    let mut key = (0, 0);
    let mut looked = 0;
    let mut is_recognised = false;
    for (index, column) in change.table.columns.iter().enumerate() {
        if row.text(index).is_none_or(<[u8]>::is_empty) {
            continue;
        }
        remains.columns += 1;
        let found = record.and_then(|record| record.get(&column.name));
        let is_there = match found.filter(|value| !is_empty(value)) {
            Some(value) => {
                is_recognised = is_recognised || is_same(original, &column.name, value);
                true
            }
            None => {
                looked += 1;
                let is_elsewhere = looked <= ELSEWHERE_MAX && content.have(original, &column.name);
                is_recognised |= is_elsewhere;
                is_elsewhere
            }
        };
        if column.primary_key {
            key = (key.0 + 1, key.1 + u32::from(is_there));
        }
        if !is_there {
            remains.left_out.insert(column.name.clone());
        }
    }
    let keys = body.get("metadata").and_then(|metadata| metadata.get("record_pks"));
    remains.lacks_key = key.1 < key.0 && keys.is_none_or(is_empty);
    remains.content = if content.0.is_empty() && (remains.columns > 0 || is_empty(&body)) {
        Content::Nothing
    } else if remains.columns > 0 && !is_recognised {
        Content::Other(content.hash())
    } else {
        Content::Recognised
    };
    match remains.content {
        Content::Recognised => remains,
        // Of what is packed nobody can say what is missing.
        content @ (Content::Other(_) | Content::Nothing) => {
            Remains { content, ..Remains::default() }
        }
    }
}

/// The bodies as one value: what was cut is joined, what was split is a list.
fn parsed(bodies: &[&[u8]]) -> Value {
    if let Ok(value) = serde_json::from_slice(&bodies.concat()) {
        return value;
    }
    let text = |body: &&[u8]| Value::String(String::from_utf8_lossy(body).into_owned());
    let value = |body: &&[u8]| serde_json::from_slice(body).unwrap_or_else(|_| text(body));
    Value::Array(bodies.iter().map(value).collect())
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.iter().all(is_empty),
        Value::Object(members) => members.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Whether it is the column's value as it was.
fn is_same(original: &Draft, column: &str, value: &Value) -> bool {
    let json = original.json(column).ok().flatten();
    json.is_some_and(|json| serde_json::from_str::<Value>(&json).is_ok_and(|was| was == *value))
}

/// Only where it says so: a body of another shape has no names that could be wrong.
fn is_misnamed(change: &Change, body: &Value) -> bool {
    let is_other = |found: Option<&Value>, expected: &str| {
        found.and_then(Value::as_str).is_some_and(|found| found != expected)
    };
    let Some(metadata) = body.get("metadata").and_then(Value::as_object) else { return false };
    is_other(body.get("action"), change.action.as_str())
        || is_other(metadata.get("table_schema"), &change.table.schema)
        || is_other(metadata.get("table_name"), &change.table.name)
}

/// The values of a body that say something, as text.
#[derive(Default)]
struct Texts(HashSet<String>);

impl Texts {
    /// All of a value, but the names of columns, which transforms note down beside what they do to them.
    fn gather(&mut self, value: &Value, names: &HashSet<&str>) {
        match value {
            Value::Null => {}
            Value::String(text) if text.is_empty() || names.contains(text.as_str()) => {}
            Value::String(text) => drop(self.0.insert(text.clone())),
            Value::Bool(_) | Value::Number(_) => drop(self.0.insert(value.to_string())),
            Value::Array(values) => values.iter().for_each(|value| self.gather(value, names)),
            Value::Object(members) => members.values().for_each(|value| self.gather(value, names)),
        }
    }

    /// The values of a body without what is beside the row in every message.
    fn of_body(body: &Value, names: &HashSet<&str>) -> Self {
        const BESIDE: [&str; 3] = ["action", "changes", "metadata"];
        let mut texts = Self::default();
        match body.as_object().filter(|members| members.contains_key("metadata")) {
            Some(members) => {
                let of_row = members.iter().filter(|(name, _)| !BESIDE.contains(&name.as_str()));
                of_row.for_each(|(_, value)| texts.gather(value, names));
            }
            None => texts.gather(body, names),
        }
        texts
    }

    fn hash(&self) -> u64 {
        let texts: BTreeSet<&String> = self.0.iter().collect();
        let mut hasher = DefaultHasher::new();
        texts.hash(&mut hasher);
        hasher.finish()
    }

    /// Whether a column's value is there under another name, or within another text.
    fn have(&self, original: &Draft, column: &str) -> bool {
        let Ok(Some(json)) = original.json(column) else { return false };
        let Ok(value) = serde_json::from_str::<Value>(&json) else { return false };
        let mut sought = Self::default();
        sought.gather(&value, &HashSet::new());
        // They are in many a row.
        sought.0.retain(|text| text != "true" && text != "false");
        let is_within = |sought: &str| {
            sought.len() >= WITHIN_BYTES_MIN && self.0.iter().any(|text| text.contains(sought))
        };
        sought.0.iter().any(|sought| self.0.contains(sought) || is_within(sought))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::change::{Action, Cell, Column, Grouping, Lsn, Position, Table, Tuple};
    use crate::message::{Envelope, EnvelopeSettings};
    use crate::pg_type::Kind;

    /// A row of `(id, title, body, tags, note)`; the note is null.
    fn change() -> Change {
        let column = |name: &str, kind, primary_key| Column {
            name: name.to_owned(),
            type_name: "text".to_owned(),
            kind,
            identity: primary_key,
            primary_key,
        };
        let table = Table {
            oid: 1,
            schema: "public".to_owned(),
            name: "documents".to_owned(),
            columns: vec![
                column("id", Kind::Integer, true),
                column("title", Kind::Text, false),
                column("body", Kind::Text, false),
                column("tags", Kind::Json, false),
                column("note", Kind::Text, false),
            ],
            grouping: Grouping::Key,
        };
        let mut data = Vec::new();
        let mut cells: Vec<Cell> = ["71", "a title", "a long body", "{\"a\": [\"green\"]}"]
            .iter()
            .map(|text| {
                let start = u32::try_from(data.len()).unwrap();
                data.extend_from_slice(text.as_bytes());
                Cell::Text { start, end: u32::try_from(data.len()).unwrap() }
            })
            .collect();
        cells.push(Cell::Null);
        Change {
            position: Position { commit_lsn: Lsn(7), index: 0 },
            commit_timestamp_us: 0,
            action: Action::Insert,
            table: Arc::new(table),
            new: Some(Tuple { data: Bytes::from(data), cells: cells.into() }),
            old: None,
        }
    }

    fn remains(bodies: &[&str]) -> Remains {
        let change = change();
        let envelope = Arc::new(Envelope::new(EnvelopeSettings::default()));
        let original = Draft::new(change.clone(), envelope);
        let bodies: Vec<&[u8]> = bodies.iter().map(|body| body.as_bytes()).collect();
        of(&change, &original, &bodies)
    }

    /// A message as Sluicebox makes it, with this record.
    fn message(record: &Value) -> String {
        let metadata = json!({
            "table_schema": "public", "table_name": "documents", "record_pks": ["71"],
            "commit_lsn": 7, "stripped_columns": ["body"],
        });
        json!({"record": record, "changes": null, "action": "insert", "metadata": metadata})
            .to_string()
    }

    fn content(body: &Value) -> Content {
        remains(&[&body.to_string()]).content
    }

    #[test]
    fn what_is_left_out_is_named() {
        #[track_caller]
        fn check(record: &Value, left_out: &[&str]) {
            let remains = remains(&[&message(record)]);
            assert_eq!(remains.content, Content::Recognised, "{record}");
            assert_eq!(remains.left_out, left_out.iter().map(|&name| name.to_owned()).collect());
            assert_eq!(
                (remains.columns, remains.lacks_key, remains.is_misnamed),
                (4, false, false)
            );
        }
        let whole = json!({"id": 71, "title": "a title", "body": "a long body",
            "tags": {"a": ["green"]}, "note": null});
        check(&whole, &[]);
        check(&json!({"id": 71, "title": "a title", "tags": {"a": ["green"]}}), &["body"]);
        // Masked, cut and packed are still there; nothing in its place is not.
        check(&json!({"id": 71, "title": "***", "body": "a lo", "tags": "x"}), &[]);
        check(
            &json!({"id": 71, "title": "", "body": null, "tags": {}}),
            &["body", "tags", "title"],
        );
        // Under another name, or in another text.
        check(
            &json!({"id": 71, "head": "a title", "all": "it says a long body", "t": ["green"]}),
            &[],
        );
        check(&json!({"title": "a title"}), &["body", "id", "tags"]);
    }

    #[test]
    fn what_does_not_tell_of_its_row_or_of_another_is_noticed() {
        let check = |body: Value, lacks_key, is_misnamed| {
            let remains = remains(&[&body.to_string()]);
            assert_eq!(
                (remains.lacks_key, remains.is_misnamed),
                (lacks_key, is_misnamed),
                "{body}"
            );
        };
        check(json!({"title": "a title"}), true, false);
        check(json!({"title": "a title", "metadata": {"record_pks": ["71"]}}), false, false);
        check(json!({"title": "a title", "metadata": {"record_pks": []}}), true, false);
        check(json!({"key": 71}), false, false);
        let other = |name: &str, action: &str| json!({"record": {"id": 71}, "action": action, "metadata": {"table_name": name}});
        check(other("documents", "insert"), false, false);
        check(other("documents", "delete"), false, true);
        check(other("people", "insert"), false, true);
        check(json!({"id": 71, "action": "buy"}), false, false);
    }

    #[test]
    fn nothing_is_told_from_something_else() {
        for body in [
            json!({}),
            json!(null),
            json!(""),
            json!([]),
            json!([{}, ""]),
            json!({"a": {"b": [null, ""]}}),
            serde_json::from_str(&message(&json!({}))).unwrap(),
            serde_json::from_str(&message(&json!({"id": null, "title": ""}))).unwrap(),
        ] {
            assert_eq!(content(&body), Content::Nothing, "{body}");
        }
        let other = |body: Value| match content(&body) {
            Content::Other(hash) => hash,
            found @ (Content::Recognised | Content::Nothing) => panic!("{body}: {found:?}"),
        };
        assert_eq!(other(json!({"ok": true})), other(json!({"ok": true})));
        assert_ne!(other(json!({"packed": "AAAA"})), other(json!({"packed": "AAAB"})));
        other(json!("x"));
        other(json!(7));
        // The same in every column, and what is in every message does not count.
        let masked = json!({"id": "x", "title": "x", "body": "x", "tags": "x"});
        let with = |lsn: u64| json!({"record": masked, "metadata": {"commit_lsn": lsn}});
        assert_eq!(other(with(1)), other(with(2)));
        assert_eq!(content(&json!([{"n": 71}])), Content::Recognised);
        assert_eq!(content(&json!("71, a title")), Content::Recognised);
    }

    #[test]
    fn parts_are_joined_and_splits_are_looked_through() {
        let whole = message(&json!({"id": 71, "title": "a title", "body": "a long body"}));
        let (one, other) = whole.split_at(whole.len() / 2);
        let joined = remains(&[one, other]);
        assert_eq!(joined.left_out, ["tags".to_owned()].into());
        assert_eq!(joined.content, Content::Recognised);
        assert_eq!(remains(&["{}", "{}"]).content, Content::Nothing);
        assert_eq!(remains(&["{}", "{\"n\": 71}"]).content, Content::Recognised);
        assert!(matches!(remains(&["1", "2"]).content, Content::Other(_)));
        // Not JSON at all cannot come out of the host, and is no reason to fail.
        assert!(matches!(remains(&["{", "x"]).content, Content::Other(_)));
    }

    #[test]
    fn a_truncate_has_no_row_to_look_for() {
        let change = Change { action: Action::Truncate, new: None, ..change() };
        let envelope = Arc::new(Envelope::new(EnvelopeSettings::default()));
        let original = Draft::new(change.clone(), envelope);
        assert_eq!(of(&change, &original, &[b"{\"a\": 1}"]).content, Content::Recognised);
        assert_eq!(of(&change, &original, &[b"{}"]).content, Content::Nothing);
    }
}
