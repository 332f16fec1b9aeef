//! What is the same in every message of a pipeline, or of a table, rendered once.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::header;
use super::string::write_string;
use crate::change::{Action, Position, Table};
use crate::sink::headers::Headers;
use base64::Engine;

/// How many tables' parts are kept. A connection has one description of each table; parked
/// messages bring descriptions of their own, which are made anew when the room is needed.
const TABLES_MAX: usize = 1024;

/// What an [`Envelope`] is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EnvelopeSettings {
    /// Drawn once per pipeline and kept in the store; `metadata.consumer.id`.
    pub pipeline_id: String,
    /// `metadata.consumer.name`.
    pub pipeline_name: String,
    pub database_name: String,
    /// Of the Postgres server.
    pub hostname: String,
    /// The chain's tag: generation and digest, `7:16 hexadecimal digits`.
    pub chain: String,
    /// Without the headers by which a recovery finds its records: for `sink::Mode::Unguarded`.
    pub unguarded: bool,
}

/// The constants of every message that one pipeline makes with one chain.
#[derive(Debug)]
pub struct Envelope {
    settings: EnvelopeSettings,
    /// The header that begins every record.
    pub(super) head: Headers,
    /// The part of a change that is one record.
    pub(super) whole: Headers,
    /// The members of `metadata` that never change, each after a comma.
    pub(super) metadata_tail: Box<[u8]>,
    /// By the address of the table's description, which the entry keeps alive.
    tables: RwLock<HashMap<usize, Arc<TableParts>>>,
}

impl Envelope {
    #[must_use]
    pub fn new(settings: EnvelopeSettings) -> Self {
        let (mut head, mut whole) = (Headers::default(), Headers::default());
        head.push(header::PIPELINE.as_bytes(), settings.pipeline_id.as_bytes());
        whole.push(header::PART.as_bytes(), b"0/1");
        let metadata_tail = metadata_tail(&settings);
        Self { head, whole, metadata_tail, settings, tables: RwLock::default() }
    }

    #[must_use]
    pub fn settings(&self) -> &EnvelopeSettings {
        &self.settings
    }

    /// What is the same in every message of the table.
    pub(super) fn table(&self, table: &Arc<Table>) -> Arc<TableParts> {
        let address = Arc::as_ptr(table).addr();
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(parts) = tables.get(&address) {
            return Arc::clone(parts);
        }
        drop(tables);
        let parts = Arc::new(TableParts::new(Arc::clone(table), &self.settings.chain));
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        if tables.len() >= TABLES_MAX {
            tables.clear();
        }
        tables.insert(address, Arc::clone(&parts));
        parts
    }
}

/// The constants of every message of one table.
#[derive(Debug)]
pub(super) struct TableParts {
    /// Keeps the address from being used for another table.
    _table: Arc<Table>,
    /// For each column `,"name":`.
    pub(super) keys: Box<[Box<[u8]>]>,
    /// `"metadata":{` with the table's names, up to the quote that opens the commit time.
    pub(super) metadata_head: Box<[u8]>,
    /// The record headers `sb-table`, `sb-action` and `sb-chain`, by the action.
    tails: [Headers; Action::ALL.len()],
    /// The columns whose values `record_pks` shows, by their place in the table.
    pub(super) key_columns: Box<[usize]>,
    /// What the constants take in a message, for reserving memory.
    pub(super) bytes: usize,
}

impl TableParts {
    fn new(table: Arc<Table>, chain: &str) -> Self {
        let key = |name: &str| {
            let mut key = vec![b','];
            json_string(&mut key, name);
            key.push(b':');
            key.into_boxed_slice()
        };
        let keys: Box<[_]> = table.columns.iter().map(|column| key(&column.name)).collect();
        let mut metadata_head = b"\"metadata\":{\"table_schema\":".to_vec();
        json_string(&mut metadata_head, &table.schema);
        metadata_head.extend_from_slice(b",\"table_name\":");
        json_string(&mut metadata_head, &table.name);
        metadata_head.extend_from_slice(b",\"commit_timestamp\":\"");
        Self {
            bytes: keys.iter().map(|key| key.len()).sum::<usize>() + metadata_head.len(),
            keys,
            metadata_head: metadata_head.into_boxed_slice(),
            tails: Action::ALL.map(|action| {
                let mut tail = Headers::default();
                tail.push(header::TABLE.as_bytes(), table.qualified_name().as_bytes());
                tail.push(header::ACTION.as_bytes(), action.as_str().as_bytes());
                tail.push(header::CHAIN.as_bytes(), chain.as_bytes());
                tail
            }),
            key_columns: key_columns(&table),
            _table: table,
        }
    }

    /// The constant headers behind a record's own.
    pub(super) fn tail(&self, action: Action) -> &Headers {
        &self.tails[action as usize]
    }
}

/// The primary key, or the replica identity without one. Identity FULL makes every column part of
/// the identity: a whole row is no key, and would double the message.
fn key_columns(table: &Table) -> Box<[usize]> {
    let all = || table.columns.iter().enumerate();
    let primary: Box<[_]> =
        all().filter(|(_, column)| column.primary_key).map(|(index, _)| index).collect();
    if !primary.is_empty() {
        return primary;
    }
    let identity: Box<[_]> =
        all().filter(|(_, column)| column.identity).map(|(index, _)| index).collect();
    if identity.len() == table.columns.len() { Box::default() } else { identity }
}

fn metadata_tail(settings: &EnvelopeSettings) -> Box<[u8]> {
    let EnvelopeSettings { pipeline_id, pipeline_name, database_name, hostname, .. } = settings;
    let mut tail = Vec::new();
    let mut member = |before: &str, value: &str| {
        tail.extend_from_slice(before.as_bytes());
        json_string(&mut tail, value);
    };
    member(r#","database_name":"#, database_name);
    member(r#","transaction_annotations":null,"enrichment":null,"consumer":{"id":"#, pipeline_id);
    member(r#","name":"#, pipeline_name);
    member(r#","annotations":{}},"database":{"id":"#, &format!("{hostname}/{database_name}"));
    member(r#","name":"#, database_name);
    member(r#","annotations":{},"database":"#, database_name);
    member(r#","hostname":"#, hostname);
    tail.push(b'}');
    tail.into_boxed_slice()
}

pub(super) fn json_string(out: &mut Vec<u8>, text: &str) {
    write_string(out, text.as_bytes()).expect("a str is UTF-8");
}

/// A change's identity in messages and in the header `sb-key`: base64 of `{commit_lsn}:{index}`,
/// both in decimal.
#[must_use]
pub fn idempotency_key(position: Position) -> String {
    IdempotencyKey::new(position).as_str().to_owned()
}

/// Two numbers of at most 20 digits and a colon.
const KEY_TEXT_MAX: usize = 41;
const KEY_MAX: usize = KEY_TEXT_MAX.div_ceil(3) * 4;

/// [`idempotency_key`] without an allocation.
#[derive(Clone, Copy, Debug)]
pub(super) struct IdempotencyKey {
    bytes: [u8; KEY_MAX],
    length: usize,
}

impl IdempotencyKey {
    pub(super) fn new(position: Position) -> Self {
        let mut text = [0; KEY_TEXT_MAX];
        let mut length = 0;
        let mut add = |part: &str| {
            text[length..length + part.len()].copy_from_slice(part.as_bytes());
            length += part.len();
        };
        let mut number = itoa::Buffer::new();
        add(number.format(position.commit_lsn.0));
        add(":");
        add(number.format(position.index));
        let mut bytes = [0; KEY_MAX];
        let length = base64::engine::general_purpose::STANDARD
            .encode_slice(&text[..length], &mut bytes)
            .expect("the buffer holds the longest key");
        Self { bytes, length }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn as_str(&self) -> &str {
        std::str::from_utf8(self.as_bytes()).expect("base64 is ASCII")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Lsn;

    #[test]
    fn idempotency_keys_are_those_that_consumers_know() {
        let key = |lsn, index| idempotency_key(Position { commit_lsn: Lsn(lsn), index });
        assert_eq!(key(73_220_408, 0), "NzMyMjA0MDg6MA==");
        assert_eq!(key(7_322_408, 0), "NzMyMjQwODow");
        assert_eq!(key(u64::MAX, u64::MAX).len(), KEY_MAX);
    }
}
