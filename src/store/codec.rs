//! How a change lies in the file: its table's description once for all its messages, its cells as
//! JSON, and its values in pieces.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Error, checksum, now_ms, signed, unsigned};
use crate::change::{Action, Cell, Change, Lsn, Position, Table, Tuple};
use crate::pipeline::group::Groups;

/// Large values are bound a piece at a time, so that a message never needs a second buffer of its size.
pub(super) const PIECE_BYTES: usize = 1024 * 1024;

/// Where the values of a change lie in its pieces, put together.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Cells {
    new: Option<Vec<Cell>>,
    old: Option<Vec<Cell>>,
    /// Both rows point into the same bytes; otherwise the old row's begin here.
    old_from: Option<u64>,
}

pub(super) fn insert(
    connection: &Connection,
    id: u64,
    change: &Change,
    groups: &Groups,
) -> Result<(), Error> {
    let relation = relation(connection, &change.table)?;
    let (cells, data) = lay_out(change);
    connection
        .prepare_cached(
            "INSERT INTO messages (id, commit_lsn, commit_idx, state, relation, action,
               commit_timestamp_us, cells, key, table_group, group_a, group_b, bytes, attempts, stored_ms)
             VALUES (?1, ?2, ?3, 0, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, 0, ?13)",
        )?
        .execute(params![
            signed(id),
            signed(change.position.commit_lsn.0),
            signed(change.position.index),
            relation,
            change.action.as_str(),
            change.commit_timestamp_us,
            to_json(&cells)?,
            primary_key(change).to_string(),
            groups.table.0,
            groups.first.map(|group| group.0),
            groups.second.map(|group| group.0),
            signed(change.bytes() as u64),
            now_ms(),
        ])?;
    let mut statement = connection.prepare_cached(
        "INSERT INTO pieces (message, number, data, sum)
             VALUES (?1, ?2, ?3, checksum(?1, ?2, ?3))",
    )?;
    let pieces = data.iter().flat_map(|data| data.chunks(PIECE_BYTES));
    for (number, piece) in pieces.enumerate() {
        statement.execute(params![signed(id), signed(number as u64), piece])?;
    }
    Ok(())
}

/// What a message's change takes in memory, in bytes.
pub(super) fn bytes(connection: &Connection, id: u64) -> Result<usize, Error> {
    let bytes: Option<i64> = connection
        .prepare_cached("SELECT bytes FROM messages WHERE id = ?1")?
        .query_row([signed(id)], |row| row.get(0))
        .optional()?;
    Ok(bytes.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0))
}

/// The change of a message, and its last failure as JSON; nothing where there is no such message, or it
/// was given up.
pub(super) fn read(
    connection: &Connection,
    id: u64,
) -> Result<Option<(Change, Option<String>)>, Error> {
    let row = connection
        .prepare_cached(&format!(
            "SELECT commit_lsn, commit_idx, commit_timestamp_us, action, cells, description,
                   digest, sum IS checksum({}), failure
                 FROM (SELECT * FROM messages WHERE id = ?1 AND state <> 3)
                 JOIN (SELECT id AS relation_id, digest, description FROM relations)
                   ON relation_id = relation",
            checksum::MESSAGE
        ))?
        .query_row([signed(id)], |row| {
            Ok((
                Position { commit_lsn: Lsn(unsigned(row.get(0)?)), index: unsigned(row.get(1)?) },
                row.get::<_, i64>(2)?,
                row.get::<_, String>(3)?,
                row.get::<_, String>(4)?,
                row.get::<_, String>(5)?,
                row.get::<_, [u8; 32]>(6)?,
                row.get::<_, bool>(7)?,
                row.get::<_, Option<String>>(8)?,
            ))
        })
        .optional()?;
    let Some(row) = row else { return Ok(None) };
    let (position, commit_timestamp_us, action, cells, table, digest, intact, failure) = row;
    if !intact || digest != digest_of(&table) {
        return Err(damaged(id));
    }
    let action: Action = from_json(&format!("\"{action}\""))?;
    let table: Table = from_json(&table)?;
    let cells: Cells = from_json(&cells)?;
    let data = pieces(connection, id)?;
    let table = Arc::new(table);
    restore(position, commit_timestamp_us, action, table, cells, data)
        .map(|change| Some((change, failure)))
        .ok_or_else(|| Error::Content { text: format!("message {id} is shorter than it says") })
}

/// A change from its parts; nothing where the values are shorter than they say.
pub(super) fn restore(
    position: Position,
    commit_timestamp_us: i64,
    action: Action,
    table: Arc<Table>,
    cells: Cells,
    data: Bytes,
) -> Option<Change> {
    let tuple = |cells: Option<Vec<Cell>>, data: &Bytes| {
        cells.map(|cells| Tuple { data: data.clone(), cells: cells.into() })
    };
    let old_from = cells.old_from.and_then(|from| usize::try_from(from).ok()).unwrap_or(0);
    if old_from > data.len() {
        return None;
    }
    let old_data = data.slice(old_from..);
    let new = tuple(cells.new, &data);
    let old = tuple(cells.old, &old_data);
    Some(Change { position, commit_timestamp_us, action, table, new, old })
}

fn pieces(connection: &Connection, id: u64) -> Result<Bytes, Error> {
    let bytes: i64 = connection
        .prepare_cached("SELECT coalesce(sum(length(data)), 0) FROM pieces WHERE message = ?1")?
        .query_row([signed(id)], |row| row.get(0))?;
    let mut data = BytesMut::with_capacity(usize::try_from(bytes).unwrap_or(0));
    let mut statement = connection.prepare_cached(
        "SELECT data, sum IS checksum(message, number, data) FROM pieces
         WHERE message = ?1 ORDER BY number",
    )?;
    let mut rows = statement.query([signed(id)])?;
    while let Some(row) = rows.next()? {
        let piece = row.get_ref(0)?.as_blob().map_err(|error| Error::Content {
            text: format!("message {id} has a piece that is not bytes: {error}"),
        })?;
        data.extend_from_slice(piece);
        if !row.get::<_, bool>(1)? {
            return Err(damaged(id));
        }
    }
    Ok(data.freeze())
}

/// The cells, and the bytes they point into, in the order in which they are stored.
pub(super) fn lay_out(change: &Change) -> (Cells, Vec<&Bytes>) {
    let cells = |tuple: &Option<Tuple>| tuple.as_ref().map(|tuple| tuple.cells.to_vec());
    let (new, old) = (cells(&change.new), cells(&change.old));
    match (&change.new, &change.old) {
        // The decoder gives both rows of one message the same bytes.
        (Some(new_row), Some(old_row)) if !same(&new_row.data, &old_row.data) => {
            let old_from = Some(new_row.data.len() as u64);
            (Cells { new, old, old_from }, vec![&new_row.data, &old_row.data])
        }
        (Some(row), _) | (None, Some(row)) => (Cells { new, old, old_from: None }, vec![&row.data]),
        (None, None) => (Cells { new, old, old_from: None }, Vec::new()),
    }
}

fn same(a: &Bytes, b: &Bytes) -> bool {
    a.as_ptr() == b.as_ptr() && a.len() == b.len()
}

pub(super) fn relation(connection: &Connection, table: &Table) -> Result<i64, Error> {
    let description = to_json(table)?;
    let digest = digest_of(&description);
    let known = connection
        .prepare_cached("SELECT id FROM relations WHERE digest = ?1")?
        .query_row([digest], |row| row.get(0))
        .optional()?;
    if let Some(id) = known {
        return Ok(id);
    }
    connection
        .prepare_cached(
            "INSERT INTO relations (digest, schema_name, table_name, description)
             VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![digest, table.schema, table.name, description])?;
    Ok(connection.last_insert_rowid())
}

pub(super) fn digest_of(description: &str) -> [u8; 32] {
    Sha256::digest(description.as_bytes()).into()
}

fn damaged(id: u64) -> Error {
    Error::Corrupt { text: format!("message {id} is not as it was written") }
}

/// The primary key's values by column, as text, for operators who ask for a message.
#[must_use]
pub fn primary_key(change: &Change) -> serde_json::Value {
    let none = || serde_json::Value::Object(serde_json::Map::new());
    change.row().map_or_else(none, |row| row_key(&change.table, row))
}

/// The same of each row that a change concerns: also of the one that an update made another key of.
#[must_use]
pub fn primary_keys(change: &Change) -> Vec<serde_json::Value> {
    let mut keys = vec![primary_key(change)];
    if let (Some(_), Some(old)) = (&change.new, &change.old) {
        let before = row_key(&change.table, old);
        if before != keys[0] {
            keys.push(before);
        }
    }
    keys
}

fn row_key(table: &Table, row: &Tuple) -> serde_json::Value {
    let columns = &table.columns;
    let has_primary = columns.iter().any(|column| column.primary_key);
    let mut key = serde_json::Map::new();
    for (index, column) in columns.iter().enumerate() {
        let part = if has_primary { column.primary_key } else { column.identity };
        // With REPLICA IDENTITY FULL and no key, the whole row would be shown.
        let whole_row = !has_primary && columns.iter().all(|column| column.identity);
        if !part || whole_row {
            continue;
        }
        let text = row.text(index).map(|text| String::from_utf8_lossy(text).into_owned());
        let value = match (&column.kind, text) {
            (_, None) => serde_json::Value::Null,
            (crate::pg_type::Kind::Integer, Some(text)) => {
                text.parse::<i64>().map_or(serde_json::Value::String(text), serde_json::Value::from)
            }
            (_, Some(text)) => serde_json::Value::String(text),
        };
        key.insert(column.name.clone(), value);
    }
    serde_json::Value::Object(key)
}

pub(super) fn to_json(value: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Content { text: error.to_string() })
}

pub(super) fn from_json<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, Error> {
    serde_json::from_str(text).map_err(|error| Error::Content { text: error.to_string() })
}

pub(super) fn time_from_ms(ms: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

pub(super) fn ms_from_time(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
