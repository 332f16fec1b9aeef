//! Changes that wait on disk because S2 is away: in the order of the source, many in a row of the file,
//! before any transform and with their table's description.
//!
//! They lie in the store's own file, so that one transaction moves the checkpoint and removes what it
//! has passed, and so that one proof of what survives a power loss is enough.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use super::codec::{self, Cells, PIECE_BYTES};
use super::{Error, checksum, signed, unsigned};
use crate::change::{Action, Change, Lsn, Position, Table};

/// Changes that were spilled together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Chunks are read in the order of these numbers.
    pub id: u64,
    /// Of its last change.
    pub last: Position,
    pub changes: u64,
    /// As [`Change::bytes`] counts them.
    pub bytes: u64,
}

impl Chunk {
    /// What a chunk of these changes is called.
    #[must_use]
    pub fn of(id: u64, changes: &[Change]) -> Self {
        Self {
            id,
            last: changes.last().map(|change| change.position).unwrap_or_default(),
            changes: changes.len() as u64,
            bytes: changes.iter().map(|change| change.bytes() as u64).sum(),
        }
    }
}

/// One change without its values, which follow each other in the pieces.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    position: Position,
    commit_timestamp_us: i64,
    action: Action,
    relation: i64,
    cells: Cells,
    data_bytes: u64,
}

pub(super) fn insert(connection: &Connection, id: u64, changes: &[Change]) -> Result<(), Error> {
    let mut relations: HashMap<*const Table, i64> = HashMap::new();
    let mut heads = Vec::with_capacity(changes.len());
    let mut data: Vec<&Bytes> = Vec::with_capacity(changes.len());
    for change in changes {
        let relation = match relations.get(&Arc::as_ptr(&change.table)) {
            Some(relation) => *relation,
            None => {
                let relation = codec::relation(connection, &change.table)?;
                relations.insert(Arc::as_ptr(&change.table), relation);
                relation
            }
        };
        let (cells, parts) = codec::lay_out(change);
        heads.push(Head {
            position: change.position,
            commit_timestamp_us: change.commit_timestamp_us,
            action: change.action,
            relation,
            cells,
            data_bytes: parts.iter().map(|part| part.len() as u64).sum(),
        });
        data.extend(parts);
    }
    let head = postcard::to_stdvec(&heads).map_err(content)?;
    let chunk = Chunk::of(id, changes);
    connection
        .prepare_cached(
            "INSERT INTO spill (id, commit_lsn, commit_idx, changes, bytes, head, sum)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, checksum(?1, ?2, ?3, ?4, ?5, ?6))",
        )?
        .execute(params![
            signed(id),
            signed(chunk.last.commit_lsn.0),
            signed(chunk.last.index),
            signed(chunk.changes),
            signed(chunk.bytes),
            head,
        ])?;
    let mut pieces = Pieces { connection, chunk: id, number: 0, buffer: Vec::new() };
    for part in data.iter().flat_map(|data| data.chunks(PIECE_BYTES)) {
        pieces.add(part)?;
    }
    pieces.flush()
}

/// Puts small values together and large ones in as they are, so that no change needs a second buffer of
/// its size.
struct Pieces<'a> {
    connection: &'a Connection,
    chunk: u64,
    number: u64,
    buffer: Vec<u8>,
}

impl Pieces<'_> {
    fn add(&mut self, part: &[u8]) -> Result<(), Error> {
        if self.buffer.len() + part.len() > PIECE_BYTES {
            self.flush()?;
        }
        if part.len() == PIECE_BYTES {
            return self.write(part);
        }
        self.buffer.extend_from_slice(part);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        let mut buffer = std::mem::take(&mut self.buffer);
        if !buffer.is_empty() {
            self.write(&buffer)?;
        }
        buffer.clear();
        self.buffer = buffer;
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        self.connection
            .prepare_cached(
                "INSERT INTO spill_pieces (chunk, number, data, sum)
                 VALUES (?1, ?2, ?3, checksum(?1, ?2, ?3))",
            )?
            .execute(params![signed(self.chunk), signed(self.number), data])?;
        self.number += 1;
        Ok(())
    }
}

/// Forgets every chunk up to this one.
pub(super) fn remove(connection: &Connection, through: u64) -> Result<(), Error> {
    connection.prepare_cached("DELETE FROM spill WHERE id <= ?1")?.execute([signed(through)])?;
    Ok(())
}

/// The chunks that wait, oldest first.
pub(super) fn chunks(connection: &Connection) -> Result<Vec<Chunk>, Error> {
    let mut statement = connection
        .prepare("SELECT id, commit_lsn, commit_idx, changes, bytes FROM spill ORDER BY id")?;
    let chunks = statement.query_map([], |row| {
        Ok(Chunk {
            id: unsigned(row.get(0)?),
            last: Position { commit_lsn: Lsn(unsigned(row.get(1)?)), index: unsigned(row.get(2)?) },
            changes: unsigned(row.get(3)?),
            bytes: unsigned(row.get(4)?),
        })
    })?;
    Ok(chunks.collect::<Result<_, _>>()?)
}

/// The changes of the first chunk behind this one.
pub(super) fn read(
    connection: &Connection,
    after: u64,
) -> Result<Option<(u64, Vec<Change>)>, Error> {
    let row = connection
        .prepare_cached(&format!(
            "SELECT id, head, sum IS checksum({}) FROM spill WHERE id > ?1 ORDER BY id LIMIT 1",
            checksum::SPILL
        ))?
        .query_row([signed(after)], |row| {
            let (id, head, intact) = (row.get(0)?, row.get::<_, Vec<u8>>(1)?, row.get(2)?);
            Ok((unsigned(id), head, intact))
        })
        .optional()?;
    let Some((id, head, intact)) = row else { return Ok(None) };
    let damaged =
        || Error::Corrupt { text: format!("spilled changes {id} are not as they were written") };
    let intact: bool = intact;
    if !intact {
        return Err(damaged());
    }
    let heads: Vec<Head> = postcard::from_bytes(&head).map_err(content)?;
    let bytes: u64 = heads.iter().map(|head| head.data_bytes).sum();
    let mut data = BytesMut::with_capacity(usize::try_from(bytes).map_err(|_| damaged())?);
    let mut statement = connection.prepare_cached(
        "SELECT data, sum IS checksum(chunk, number, data) FROM spill_pieces
         WHERE chunk = ?1 ORDER BY number",
    )?;
    let mut rows = statement.query([signed(id)])?;
    while let Some(row) = rows.next()? {
        let piece = row.get_ref(0)?.as_blob().map_err(|_| damaged())?;
        if !row.get::<_, bool>(1)? {
            return Err(damaged());
        }
        data.extend_from_slice(piece);
    }
    if data.len() as u64 != bytes {
        return Err(damaged());
    }
    let mut data = data.freeze();
    let mut tables: HashMap<i64, Arc<Table>> = HashMap::new();
    let mut changes = Vec::with_capacity(heads.len());
    for head in heads {
        let Head { position, commit_timestamp_us, action, relation, cells, data_bytes } = head;
        let table = match tables.get(&relation) {
            Some(table) => Arc::clone(table),
            None => {
                let table = Arc::new(table(connection, relation)?.ok_or_else(damaged)?);
                tables.insert(relation, Arc::clone(&table));
                table
            }
        };
        let values = data.split_to(usize::try_from(data_bytes).map_err(|_| damaged())?);
        let change = codec::restore(position, commit_timestamp_us, action, table, cells, values);
        changes.push(change.ok_or_else(damaged)?);
    }
    Ok(Some((id, changes)))
}

fn table(connection: &Connection, relation: i64) -> Result<Option<Table>, Error> {
    let row: Option<(String, [u8; 32])> = connection
        .prepare_cached("SELECT description, digest FROM relations WHERE id = ?1")?
        .query_row([relation], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((description, digest)) = row else { return Ok(None) };
    if digest != codec::digest_of(&description) {
        return Ok(None);
    }
    codec::from_json(&description).map(Some)
}

fn content(error: postcard::Error) -> Error {
    Error::Content { text: format!("spilled changes: {error}") }
}
