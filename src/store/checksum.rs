//! Checksums of rows: SQLite finds a damaged page where its structure is hurt, and takes any bytes for
//! a row's content. A checkpoint or a value that a disk has changed would be believed.
//!
//! SQL computes them itself, by the function `checksum(…)` that is known on the store's connections, so
//! that a statement which writes a row writes its checksum with the values as SQLite stores them.

use rusqlite::Connection;
use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::types::ValueRef;

use super::Error;

/// Makes `checksum(…)` known: CRC-32 over the type and the bytes of each argument.
pub(super) fn register(connection: &Connection) -> Result<(), Error> {
    let flags = FunctionFlags::SQLITE_UTF8
        | FunctionFlags::SQLITE_DETERMINISTIC
        | FunctionFlags::SQLITE_DIRECTONLY;
    connection.create_scalar_function("checksum", -1, flags, |context| Ok(checksum(context)))?;
    Ok(())
}

fn checksum(context: &Context<'_>) -> i64 {
    let mut hasher = crc32fast::Hasher::new();
    for index in 0..context.len() {
        let (kind, bytes): (u8, &[u8]) = match context.get_raw(index) {
            ValueRef::Null => (0, &[]),
            ValueRef::Integer(value) => {
                hasher.update(&[1]);
                hasher.update(&value.to_le_bytes());
                continue;
            }
            ValueRef::Real(value) => {
                hasher.update(&[2]);
                hasher.update(&value.to_le_bytes());
                continue;
            }
            ValueRef::Text(text) => (3, text),
            ValueRef::Blob(blob) => (4, blob),
        };
        hasher.update(&[kind]);
        // With its length, so that neighbours do not run together.
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    i64::from(hasher.finalize())
}

/// What of each table's row its checksum covers. Row values lie in tables of pieces, whose rows are
/// checked whenever they are read.
pub(super) const FACT: &str = "name, value";
pub(super) const CHECKPOINT: &str = "stream, commit_lsn, commit_idx, seq, confirm_lsn, reached";
pub(super) const MESSAGE: &str = "id, commit_lsn, commit_idx, state, relation, action, \
     commit_timestamp_us, cells, key, table_group, group_a, group_b, bytes, attempts, \
     next_attempt_ms, stored_ms, failure, own_failures";
pub(super) const PIECE: &str = "message, number, data";
pub(super) const SPILL: &str = "id, commit_lsn, commit_idx, changes, bytes, head";
pub(super) const SPILL_PIECE: &str = "chunk, number, data";
pub(super) const PART: &str = "message, number, stream, record";

/// Finds a row whose checksum is not that of its values.
///
/// # Errors
///
/// [`Error::Corrupt`] with the table's name, or what SQLite said.
pub(super) fn verify(connection: &Connection, table: &str, columns: &str) -> Result<(), Error> {
    let damaged: i64 = connection.query_row(
        &format!("SELECT count(*) FROM {table} WHERE sum IS NOT checksum({columns})"),
        [],
        |row| row.get(0),
    )?;
    if damaged > 0 {
        let text = format!("{damaged} rows of its table `{table}` are not as they were written");
        return Err(Error::Corrupt { text });
    }
    Ok(())
}
