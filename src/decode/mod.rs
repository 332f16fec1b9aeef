//! pgoutput messages, protocol version 1 in text mode, to changes.
//!
//! Pure: no I/O, no clock, no catalogue. Bytes that are not a message give an error and never a
//! panic. No value is copied: the cells of a tuple are offsets into the message, and a tuple costs
//! one allocation.
//!
//! Version 1 sends whole transactions in commit order and never an aborted one, so the only state
//! is the transaction at hand and the tables that the server described:
//!
//! ```text
//!            Begin                      Commit
//! outside ───────────► in a transaction ───────► outside
//!                      Insert, Update, Delete, Truncate: a position each
//! ```
//!
//! What the row images mean: a value that is not there is never taken for NULL. An old row that
//! holds only the replica identity has [`Cell::Absent`] elsewhere; a TOAST value that an update
//! did not touch is [`Cell::Unchanged`], unless the old row holds it.

mod reader;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::change::{Action, Cell, Change, Lsn, Position, Table, Tuple};
use reader::Reader;

/// From 1970-01-01, which is ours, to 2000-01-01, which is Postgres's, in microseconds.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// A table as a Relation message describes it. Types are numbers here: only Postgres's catalogue
/// can tell what they mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// `pg_class.oid`.
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// `pg_class.relreplident`: `d` default, `n` nothing, `f` full, `i` index.
    pub replica_identity: u8,
    /// In the order of a tuple's cells.
    pub columns: Vec<RelationColumn>,
}

/// One column of a [`Relation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelationColumn {
    pub name: String,
    /// `pg_type.oid`; for a domain or an enum its own.
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`, -1 where the type has none.
    pub type_modifier: i32,
    /// Part of the replica identity; with identity FULL every column is.
    pub identity: bool,
}

/// What one message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A transaction starts.
    Begin {
        /// Where its commit record starts; the same as in its Commit message.
        commit_lsn: Lsn,
        /// Microseconds since the Unix epoch.
        commit_timestamp_us: i64,
        xid: u32,
    },
    /// A row was inserted, updated or deleted.
    Change(Change),
    /// Tables were emptied: one change for each.
    Truncate(Vec<Change>),
    /// The transaction is complete.
    Commit {
        /// Where the commit record starts.
        lsn: Lsn,
        /// Where it ends: what to confirm once every change of the transaction is settled.
        end_lsn: Lsn,
    },
    /// A table's description. [`Decoder::define`] it before the next message is decoded.
    Relation(Relation),
    /// A type's name, an origin or a logical message: nothing that becomes a record.
    Other,
}

/// Why a message could not be decoded. All of them mean that the stream is not what it is expected
/// to be: the connection has to be given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("an empty replication message arrived")]
    Empty,
    #[error(
        "a replication message of the unknown type {:?} arrived; \
         the slot must use pgoutput with proto_version 1",
        char::from(*tag)
    )]
    UnknownMessage { tag: u8 },
    #[error("the {message} message ends at byte {at}, before its contents do")]
    Short { message: &'static str, at: usize },
    #[error("the {message} message has {bytes} bytes after its end")]
    Trailing { message: &'static str, bytes: usize },
    #[error("the {message} message has {bytes} bytes, more than 4 GiB")]
    TooLarge { message: &'static str, bytes: usize },
    #[error("a name in the {message} message is not UTF-8; client_encoding must be UTF8")]
    NotUtf8 { message: &'static str },
    #[error("the {message} message has the unknown row kind {:?}", char::from(*kind))]
    RowKind { message: &'static str, kind: u8 },
    #[error("a value of {table} has the unknown format {:?}", char::from(*format))]
    CellFormat { table: String, format: u8 },
    #[error("a value of {table} is binary; the slot must be read without the option `binary`")]
    BinaryCell { table: String },
    #[error("a row of {table} has {found} columns where its description has {expected}")]
    ColumnCount { table: String, expected: usize, found: usize },
    #[error("the {message} message names the table with oid {oid}, which was not described")]
    UndefinedTable { message: &'static str, oid: u32 },
    #[error("the {message} message arrived outside a transaction")]
    OutsideTransaction { message: &'static str },
    #[error("a transaction began at {begun} before the one at {open} was committed")]
    NestedTransaction { open: Lsn, begun: Lsn },
    #[error("the transaction announced for {begun} was committed at {committed}")]
    CommitMismatch { begun: Lsn, committed: Lsn },
}

/// The transaction that messages belong to.
#[derive(Clone, Copy, Debug)]
struct Transaction {
    commit_lsn: Lsn,
    commit_timestamp_us: i64,
    next_index: u64,
}

/// Decodes the messages of one connection, in order. A new connection needs a new decoder.
#[derive(Debug, Default)]
pub struct Decoder {
    transaction: Option<Transaction>,
    tables: HashMap<u32, Arc<Table>>,
    /// The table of the last row: rows of one table come in runs.
    last: Option<Arc<Table>>,
}

impl Decoder {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says what the table of that oid looks like from here on.
    pub fn define(&mut self, table: Arc<Table>) {
        self.last = None;
        self.tables.insert(table.oid, table);
    }

    /// Decodes one message: the payload of one XLogData frame.
    ///
    /// # Errors
    ///
    /// When the bytes are not a message of protocol version 1 in text mode, when it does not
    /// belong here, or when it is about a table that was not defined.
    pub fn decode(&mut self, message: Bytes) -> Result<Decoded, Error> {
        let tag = *message.first().ok_or(Error::Empty)?;
        match tag {
            b'I' => self.insert(message),
            b'U' => self.update(message),
            b'D' => self.delete(message),
            b'B' => self.begin(&mut Reader::new(&message, 1, "Begin")),
            b'C' => self.commit(&mut Reader::new(&message, 1, "Commit")),
            b'R' => self.relation(&mut Reader::new(&message, 1, "Relation")),
            b'T' => self.truncate(&mut Reader::new(&message, 1, "Truncate")),
            b'M' => self.logical(&mut Reader::new(&message, 1, "Message")),
            b'Y' => type_name(&mut Reader::new(&message, 1, "Type")),
            b'O' => origin(&mut Reader::new(&message, 1, "Origin")),
            tag => Err(Error::UnknownMessage { tag }),
        }
    }

    fn begin(&mut self, reader: &mut Reader<'_>) -> Result<Decoded, Error> {
        let commit_lsn = Lsn(reader.u64()?);
        let commit_timestamp_us = reader.i64()?.saturating_add(POSTGRES_EPOCH_US);
        let xid = reader.u32()?;
        reader.end()?;
        if let Some(open) = self.transaction {
            return Err(Error::NestedTransaction { open: open.commit_lsn, begun: commit_lsn });
        }
        self.transaction = Some(Transaction { commit_lsn, commit_timestamp_us, next_index: 0 });
        Ok(Decoded::Begin { commit_lsn, commit_timestamp_us, xid })
    }

    fn commit(&mut self, reader: &mut Reader<'_>) -> Result<Decoded, Error> {
        let _flags = reader.u8()?;
        let lsn = Lsn(reader.u64()?);
        let end_lsn = Lsn(reader.u64()?);
        let _timestamp = reader.i64()?;
        reader.end()?;
        let begun = self
            .transaction
            .ok_or(Error::OutsideTransaction { message: reader.message() })?
            .commit_lsn;
        if begun != lsn {
            return Err(Error::CommitMismatch { begun, committed: lsn });
        }
        self.transaction = None;
        Ok(Decoded::Commit { lsn, end_lsn })
    }

    fn relation(&mut self, reader: &mut Reader<'_>) -> Result<Decoded, Error> {
        let oid = reader.u32()?;
        // The system's own schema is sent as an empty name.
        let schema = match reader.name()? {
            "" => "pg_catalog",
            schema => schema,
        };
        let schema = schema.to_owned();
        let name = reader.name()?.to_owned();
        let replica_identity = reader.u8()?;
        let count = usize::from(reader.u16()?);
        // A column takes at least 10 bytes; a wrong count must not reserve memory.
        let mut columns = Vec::with_capacity(count.min(reader.remaining() / 10));
        for _ in 0..count {
            let flags = reader.u8()?;
            columns.push(RelationColumn {
                name: reader.name()?.to_owned(),
                type_oid: reader.u32()?,
                type_modifier: reader.i32()?,
                identity: flags & 1 != 0,
            });
        }
        reader.end()?;
        // What was known of the table no longer holds, also if nobody defines it anew.
        self.last = None;
        self.tables.remove(&oid);
        Ok(Decoded::Relation(Relation { oid, schema, name, replica_identity, columns }))
    }

    fn insert(&mut self, message: Bytes) -> Result<Decoded, Error> {
        let mut reader = row_reader(&message, "Insert")?;
        let table = self.table(&mut reader)?;
        let kind = reader.u8()?;
        if kind != b'N' {
            return Err(Error::RowKind { message: reader.message(), kind });
        }
        let new = cells(&mut reader, &table)?;
        reader.end()?;
        let new = Tuple { data: message, cells: new };
        self.change("Insert", Action::Insert, table, Some(new), None)
    }

    fn update(&mut self, message: Bytes) -> Result<Decoded, Error> {
        let mut reader = row_reader(&message, "Update")?;
        let table = self.table(&mut reader)?;
        let mut kind = reader.u8()?;
        let old = match kind {
            b'K' | b'O' => {
                let old = old_cells(&mut reader, &table, kind)?;
                kind = reader.u8()?;
                Some(old)
            }
            _ => None,
        };
        if kind != b'N' {
            return Err(Error::RowKind { message: reader.message(), kind });
        }
        let mut new = cells(&mut reader, &table)?;
        reader.end()?;
        if let Some(old) = &old {
            // Unchanged means that the old row's value still holds. Both rows are in one message,
            // so the old offsets are right for the new row too.
            for (new, old) in new.iter_mut().zip(old) {
                if let (Cell::Unchanged, Cell::Text { .. }) = (&new, old) {
                    *new = *old;
                }
            }
        }
        let old = old.map(|cells| Tuple { data: message.clone(), cells });
        let new = Tuple { data: message, cells: new };
        self.change("Update", Action::Update, table, Some(new), old)
    }

    fn delete(&mut self, message: Bytes) -> Result<Decoded, Error> {
        let mut reader = row_reader(&message, "Delete")?;
        let table = self.table(&mut reader)?;
        let kind = reader.u8()?;
        if !matches!(kind, b'K' | b'O') {
            return Err(Error::RowKind { message: reader.message(), kind });
        }
        let old = old_cells(&mut reader, &table, kind)?;
        reader.end()?;
        let old = Tuple { data: message, cells: old };
        self.change("Delete", Action::Delete, table, None, Some(old))
    }

    fn truncate(&mut self, reader: &mut Reader<'_>) -> Result<Decoded, Error> {
        let count = reader.u32()? as usize;
        // 1 is CASCADE, 2 RESTART IDENTITY: the tables are all listed, so neither matters.
        let _options = reader.u8()?;
        let mut changes = Vec::with_capacity(count.min(reader.remaining() / 4));
        for _ in 0..count {
            let oid = reader.u32()?;
            let table = self
                .tables
                .get(&oid)
                .ok_or(Error::UndefinedTable { message: reader.message(), oid })?;
            changes.push(Arc::clone(table));
        }
        reader.end()?;
        let changes = changes.into_iter().map(|table| {
            let (position, commit_timestamp_us) = self.position("Truncate")?;
            let action = Action::Truncate;
            Ok(Change { position, commit_timestamp_us, action, table, new: None, old: None })
        });
        Ok(Decoded::Truncate(changes.collect::<Result<_, Error>>()?))
    }

    /// A message of `pg_logical_emit_message`. A transactional one takes a place in the order.
    fn logical(&mut self, reader: &mut Reader<'_>) -> Result<Decoded, Error> {
        let transactional = reader.u8()? & 1 != 0;
        let _lsn = reader.u64()?;
        let _prefix = reader.name()?;
        let length = reader.u32()? as usize;
        let _content = reader.take(length)?;
        reader.end()?;
        if transactional {
            self.position("Message")?;
        }
        Ok(Decoded::Other)
    }

    fn change(
        &mut self,
        message: &'static str,
        action: Action,
        table: Arc<Table>,
        new: Option<Tuple>,
        old: Option<Tuple>,
    ) -> Result<Decoded, Error> {
        let (position, commit_timestamp_us) = self.position(message)?;
        Ok(Decoded::Change(Change { position, commit_timestamp_us, action, table, new, old }))
    }

    /// The place of the next change, and when its transaction was committed.
    fn position(&mut self, message: &'static str) -> Result<(Position, i64), Error> {
        let transaction = self.transaction.as_mut().ok_or(Error::OutsideTransaction { message })?;
        let index = transaction.next_index;
        transaction.next_index += 1;
        let position = Position { commit_lsn: transaction.commit_lsn, index };
        Ok((position, transaction.commit_timestamp_us))
    }

    fn table(&mut self, reader: &mut Reader<'_>) -> Result<Arc<Table>, Error> {
        let oid = reader.u32()?;
        if let Some(table) = &self.last
            && table.oid == oid
        {
            return Ok(Arc::clone(table));
        }
        let table = self
            .tables
            .get(&oid)
            .ok_or(Error::UndefinedTable { message: reader.message(), oid })?;
        self.last = Some(Arc::clone(table));
        Ok(Arc::clone(table))
    }
}

/// Starts on a message whose cells will be 32-bit offsets.
fn row_reader<'a>(message: &'a Bytes, name: &'static str) -> Result<Reader<'a>, Error> {
    if u32::try_from(message.len()).is_err() {
        return Err(Error::TooLarge { message: name, bytes: message.len() });
    }
    Ok(Reader::new(message, 1, name))
}

/// An old row: whole (`O`), or the replica identity's columns only (`K`), the others then being
/// sent as if they were NULL.
fn old_cells(reader: &mut Reader<'_>, table: &Table, kind: u8) -> Result<Box<[Cell]>, Error> {
    let mut cells = cells(reader, table)?;
    if kind == b'K' {
        for (cell, column) in cells.iter_mut().zip(&table.columns) {
            if !column.identity {
                *cell = Cell::Absent;
            }
        }
    }
    Ok(cells)
}

fn cells(reader: &mut Reader<'_>, table: &Table) -> Result<Box<[Cell]>, Error> {
    let found = usize::from(reader.u16()?);
    let expected = table.columns.len();
    if found != expected {
        return Err(Error::ColumnCount { table: table.qualified_name(), expected, found });
    }
    let mut cells = Vec::with_capacity(expected);
    for _ in 0..expected {
        cells.push(match reader.u8()? {
            b't' => {
                let length = reader.u32()? as usize;
                let start = offset(reader)?;
                reader.take(length)?;
                Cell::Text { start, end: offset(reader)? }
            }
            b'n' => Cell::Null,
            b'u' => Cell::Unchanged,
            b'b' => return Err(Error::BinaryCell { table: table.qualified_name() }),
            format => return Err(Error::CellFormat { table: table.qualified_name(), format }),
        });
    }
    Ok(cells.into_boxed_slice())
}

fn offset(reader: &Reader<'_>) -> Result<u32, Error> {
    let at = reader.at();
    u32::try_from(at).map_err(|_| Error::TooLarge { message: reader.message(), bytes: at })
}

/// Read only to check it: a domain's base comes without schema, and an enum looks like a
/// composite, so types are resolved through the catalogue.
fn type_name(reader: &mut Reader<'_>) -> Result<Decoded, Error> {
    let _oid = reader.u32()?;
    let _schema = reader.name()?;
    let _name = reader.name()?;
    reader.end()?;
    Ok(Decoded::Other)
}

fn origin(reader: &mut Reader<'_>) -> Result<Decoded, Error> {
    let _commit_lsn = reader.u64()?;
    let _name = reader.name()?;
    reader.end()?;
    Ok(Decoded::Other)
}
