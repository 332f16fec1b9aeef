//! The records of messages that no batch holds together, as bytes, from before their first append
//! until the last of them is in the stream. A restart sends what is left of them as it is: shaped
//! anew, the rest might not fit what is in the stream already.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use rusqlite::{Connection, params};

use super::{Error, signed, unsigned};
use crate::sink::record::Record;

/// The records that are left of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Where they go; nothing for the pipeline's own stream.
    pub stream: Option<Arc<str>>,
    /// The number of the first. All before it are in the stream.
    pub first: u64,
    /// At least one, in the order of their numbers.
    pub records: Vec<Record>,
}

/// What a start is told of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownParts {
    /// As in [`Parts`].
    pub stream: Option<Arc<str>>,
    /// As in [`Parts`].
    pub first: u64,
}

/// Puts a message's records in the place of those that it had.
pub(super) fn replace(
    connection: &Connection,
    id: u64,
    parts: Option<&Parts>,
) -> Result<(), Error> {
    connection.prepare_cached("DELETE FROM parts WHERE message = ?1")?.execute([signed(id)])?;
    let Some(Parts { stream, first, records }) = parts else { return Ok(()) };
    let mut statement = connection.prepare_cached(
        "INSERT INTO parts (message, number, stream, record, sum)
         VALUES (?1, ?2, ?3, ?4, checksum(?1, ?2, ?3, ?4))",
    )?;
    for (number, record) in (*first..).zip(records) {
        let stream = stream.as_deref().unwrap_or_default();
        statement.execute(params![signed(id), signed(number), stream, &record.pack()[..]])?;
    }
    Ok(())
}

/// Forgets those before this number.
pub(super) fn remove(connection: &Connection, id: u64, below: u64) -> Result<(), Error> {
    connection
        .prepare_cached("DELETE FROM parts WHERE message = ?1 AND number < ?2")?
        .execute([signed(id), signed(below)])?;
    Ok(())
}

/// What is left of a message's records, if they were stored.
pub(super) fn read(connection: &Connection, id: u64) -> Result<Option<Parts>, Error> {
    let mut statement = connection.prepare_cached(
        "SELECT number, stream, record, sum IS checksum(message, number, stream, record)
         FROM parts WHERE message = ?1 ORDER BY number",
    )?;
    let mut rows = statement.query([signed(id)])?;
    let mut parts: Option<Parts> = None;
    while let Some(row) = rows.next()? {
        let number = unsigned(row.get(0)?);
        let stream: String = row.get(1)?;
        let record = Record::unpack(Bytes::from(row.get::<_, Vec<u8>>(2)?));
        let parts = parts.get_or_insert_with(|| Parts {
            stream: named(&stream),
            first: number,
            records: Vec::new(),
        });
        let expected = parts.first + parts.records.len() as u64;
        match record {
            Some(record) if row.get(3)? && number == expected => parts.records.push(record),
            _ => {
                let text = format!("part {expected} of message {id} is not as it was written");
                return Err(Error::Corrupt { text });
            }
        }
    }
    Ok(parts)
}

/// Of which messages there are any.
pub(super) fn known(connection: &Connection) -> Result<HashMap<u64, KnownParts>, Error> {
    let mut statement =
        connection.prepare("SELECT message, min(number), stream FROM parts GROUP BY message")?;
    let rows = statement.query_map([], |row| {
        let (id, first, stream): (i64, i64, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        Ok((unsigned(id), KnownParts { stream: named(&stream), first: unsigned(first) }))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// No stream has an empty name.
fn named(stream: &str) -> Option<Arc<str>> {
    (!stream.is_empty()).then(|| stream.into())
}
