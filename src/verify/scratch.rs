//! The folded stream on disk: a temporary SQLite file, so that memory does not grow with the table.
//!
//! What it takes: 17 bytes for each column and the key for each row that the stream ever named, some
//! twenty bytes for each record, and the values themselves only where they are to be shown; the whole
//! of the messages where they come from several streams. What is in memory is a page cache of
//! [`CACHE_KIB`]. Nothing of it outlives the process, so nothing is
//! synced and nothing is journalled.

use rusqlite::{Connection, OptionalExtension as _, params};
use tempfile::TempDir;

use super::Error;
use super::canon::Digest;
use crate::change::{Lsn, Position};

const CACHE_KIB: u64 = 64 * 1024;

const SCHEMA: &str = "
CREATE TABLE seen (lsn INTEGER, idx INTEGER, part INTEGER, PRIMARY KEY (lsn, idx, part))
    WITHOUT ROWID;
CREATE TABLE splits (lsn INTEGER, idx INTEGER, parts INTEGER, found INTEGER, label TEXT,
    PRIMARY KEY (lsn, idx)) WITHOUT ROWID;
CREATE TABLE states (tbl INTEGER, key TEXT, lsn INTEGER, idx INTEGER, state INTEGER, cells BLOB,
    vals TEXT, matched INTEGER DEFAULT 0, PRIMARY KEY (tbl, key));
CREATE TABLE versions (tbl INTEGER, key TEXT, state INTEGER, cells BLOB, vals TEXT);
CREATE INDEX versions_by_key ON versions (tbl, key);
CREATE TABLE bags (tbl INTEGER, digest BLOB, n INTEGER, late INTEGER, PRIMARY KEY (tbl, digest))
    WITHOUT ROWID;
CREATE TABLE groups (stream INTEGER, tbl INTEGER, key TEXT, lsn INTEGER, idx INTEGER,
    PRIMARY KEY (stream, tbl, key)) WITHOUT ROWID;
CREATE TABLE pieces (lsn INTEGER, idx INTEGER, part INTEGER, body BLOB, PRIMARY KEY (lsn, idx, part))
    WITHOUT ROWID;
CREATE TABLE spool (lsn INTEGER, idx INTEGER, part INTEGER, parts INTEGER, stream INTEGER,
    seq INTEGER, tbl INTEGER, body BLOB, PRIMARY KEY (lsn, idx, part));
CREATE TABLE held (tbl INTEGER, key TEXT, PRIMARY KEY (tbl, key)) WITHOUT ROWID;
CREATE TABLE given_up (tbl INTEGER, key TEXT, PRIMARY KEY (tbl, key)) WITHOUT ROWID;
";

/// What the stream says of one column of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cell {
    /// The row is older than what was read of the stream.
    Unknown,
    Value(Digest),
    /// A transform has altered it, and the stream does not say what it was.
    Altered,
    /// No record of the row has the column, and none says why.
    Absent,
}

/// What the stream says of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Only that something happened to it after the moment that is compared.
    Unknown,
    Live,
    Deleted,
    /// Its last change came in parts or with a body of a transform's own.
    Opaque,
}

/// A row as the stream has it, at one place of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) at: Position,
    pub(super) state: State,
    pub(super) cells: Vec<Cell>,
    /// The JSON of each column, only where values are to be shown.
    pub(super) values: Option<Vec<Option<String>>>,
}

/// A message that waits until all streams are read.
#[derive(Clone, Debug)]
pub(super) struct Spooled {
    pub(super) at: Position,
    pub(super) part: u32,
    pub(super) parts: u32,
    /// Its place among the streams, and its number there.
    pub(super) stream: usize,
    pub(super) seq: u64,
    pub(super) table: usize,
    pub(super) body: Vec<u8>,
}

/// The file. Removed when dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    connection: Connection,
    /// Declared last: the file is closed before its folder goes.
    _dir: TempDir,
}

impl Scratch {
    pub(super) fn create() -> Result<Self, Error> {
        let dir = tempfile::Builder::new().prefix("sluicebox-verify-").tempdir();
        let dir = dir.map_err(Error::Folder)?;
        let connection = Connection::open(dir.path().join("fold.db"))?;
        connection.execute_batch(&format!(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;
             PRAGMA cache_size = -{CACHE_KIB}; PRAGMA temp_store = FILE; {SCHEMA} BEGIN;"
        ))?;
        // As many as there are statements here.
        connection.set_prepared_statement_cache_capacity(32);
        Ok(Self { connection, _dir: dir })
    }

    /// Notes a record; false where it was there already.
    pub(super) fn see(&self, at: Position, part: u32) -> Result<bool, Error> {
        let mut insert =
            self.connection.prepare_cached("INSERT OR IGNORE INTO seen VALUES (?1, ?2, ?3)")?;
        Ok(insert.execute(params![signed(at.commit_lsn.0), signed(at.index), part])? == 1)
    }

    pub(super) fn has_seen(&self, at: Position) -> Result<bool, Error> {
        let sql = "SELECT 1 FROM seen WHERE lsn = ?1 AND idx = ?2";
        let mut select = self.connection.prepare_cached(sql)?;
        Ok(select.exists(params![signed(at.commit_lsn.0), signed(at.index)])?)
    }

    /// Notes one part of a change that was split.
    pub(super) fn add_part(&self, at: Position, parts: u32, label: &str) -> Result<(), Error> {
        let sql = "INSERT INTO splits VALUES (?1, ?2, ?3, 1, ?4)
            ON CONFLICT DO UPDATE SET found = found + 1";
        let mut insert = self.connection.prepare_cached(sql)?;
        insert.execute(params![signed(at.commit_lsn.0), signed(at.index), parts, label])?;
        Ok(())
    }

    /// Lays aside a part that is no message by itself. With the last of them all the bodies come back, one
    /// behind the other.
    pub(super) fn join(
        &self,
        at: Position,
        part: u32,
        parts: u32,
        body: &[u8],
    ) -> Result<Option<Vec<u8>>, Error> {
        let (lsn, idx) = (signed(at.commit_lsn.0), signed(at.index));
        let sql = "INSERT INTO pieces VALUES (?1, ?2, ?3, ?4)";
        self.connection.prepare_cached(sql)?.execute(params![lsn, idx, part, body])?;
        let sql = "SELECT body FROM pieces WHERE lsn = ?1 AND idx = ?2 ORDER BY part";
        let mut select = self.connection.prepare_cached(sql)?;
        let sql = "SELECT count(*) FROM pieces WHERE lsn = ?1 AND idx = ?2";
        let mut count = self.connection.prepare_cached(sql)?;
        if count.query_row([lsn, idx], |row| row.get::<_, u32>(0))? < parts {
            return Ok(None);
        }
        let bodies: Vec<Vec<u8>> =
            select.query_map([lsn, idx], |row| row.get(0))?.collect::<Result<_, _>>()?;
        let sql = "DELETE FROM pieces WHERE lsn = ?1 AND idx = ?2";
        self.connection.prepare_cached(sql)?.execute([lsn, idx])?;
        Ok(Some(bodies.concat()))
    }

    /// The changes of which parts are missing: what they are, and how many of how many were found.
    pub(super) fn incomplete(&self) -> Result<Vec<(String, u32, u32)>, Error> {
        let sql = "SELECT label, found, parts FROM splits WHERE found < parts ORDER BY lsn, idx";
        let mut select = self.connection.prepare(sql)?;
        let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    pub(super) fn row(&self, table: usize, key: &str) -> Result<Option<Row>, Error> {
        let sql = "SELECT lsn, idx, state, cells, vals FROM states WHERE tbl = ?1 AND key = ?2";
        let mut select = self.connection.prepare_cached(sql)?;
        let row = select.query_row(params![number(table), key], |row| {
            let at =
                Position { commit_lsn: Lsn(unsigned(row.get(0)?)), index: unsigned(row.get(1)?) };
            Ok(decode(at, row.get(2)?, &row.get::<_, Vec<u8>>(3)?, row.get(4)?))
        });
        Ok(row.optional()?)
    }

    pub(super) fn put(&self, table: usize, key: &str, row: &Row) -> Result<(), Error> {
        let sql = "INSERT OR REPLACE INTO states VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 0)";
        let mut insert = self.connection.prepare_cached(sql)?;
        let (lsn, idx) = (signed(row.at.commit_lsn.0), signed(row.at.index));
        let (state, cells, values) = encode(row);
        insert.execute(params![number(table), key, lsn, idx, state, cells, values])?;
        Ok(())
    }

    /// The last change of a group so far, which this one becomes if it is later.
    pub(super) fn pass_group(
        &self,
        stream: usize,
        table: usize,
        key: &str,
        at: Position,
    ) -> Result<Option<Position>, Error> {
        let (stream, table) = (number(stream), number(table));
        let sql = "SELECT lsn, idx FROM groups WHERE stream = ?1 AND tbl = ?2 AND key = ?3";
        let mut select = self.connection.prepare_cached(sql)?;
        let last = select.query_row(params![stream, table, key], |row| {
            Ok(Position { commit_lsn: Lsn(unsigned(row.get(0)?)), index: unsigned(row.get(1)?) })
        });
        let last = last.optional()?;
        if last.is_none_or(|last| last < at) {
            let sql = "INSERT OR REPLACE INTO groups VALUES (?1, ?2, ?3, ?4, ?5)";
            let (lsn, idx) = (signed(at.commit_lsn.0), signed(at.index));
            self.connection.prepare_cached(sql)?.execute(params![stream, table, key, lsn, idx])?;
        }
        Ok(last)
    }

    /// Lays a message aside.
    pub(super) fn spool(&self, message: &Spooled) -> Result<(), Error> {
        let sql = "INSERT OR IGNORE INTO spool VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
        self.connection.prepare_cached(sql)?.execute(params![
            signed(message.at.commit_lsn.0),
            signed(message.at.index),
            message.part,
            message.parts,
            number(message.stream),
            signed(message.seq),
            number(message.table),
            message.body,
        ])?;
        Ok(())
    }

    /// The first message that was laid aside, behind this one in the order of the source.
    pub(super) fn next_spooled(
        &self,
        after: Option<(Position, u32)>,
    ) -> Result<Option<Spooled>, Error> {
        let sql = "SELECT lsn, idx, part, parts, stream, seq, tbl, body FROM spool
            WHERE (lsn, idx, part) > (?1, ?2, ?3) ORDER BY lsn, idx, part LIMIT 1";
        let (lsn, idx, part) = after.map_or((-1, -1, -1), |(at, part)| {
            (signed(at.commit_lsn.0), signed(at.index), i64::from(part))
        });
        let mut select = self.connection.prepare_cached(sql)?;
        let message = select.query_row(params![lsn, idx, part], |row| {
            let at =
                Position { commit_lsn: Lsn(unsigned(row.get(0)?)), index: unsigned(row.get(1)?) };
            let place = |number: i64| usize::try_from(number).unwrap_or_default();
            Ok(Spooled {
                at,
                part: row.get(2)?,
                parts: row.get(3)?,
                stream: place(row.get(4)?),
                seq: unsigned(row.get(5)?),
                table: place(row.get(6)?),
                body: row.get(7)?,
            })
        });
        Ok(message.optional()?)
    }

    /// Keeps a state that the row had until just now: the moment that is compared may be before.
    pub(super) fn put_version(&self, table: usize, key: &str, row: &Row) -> Result<(), Error> {
        let sql = "INSERT INTO versions VALUES (?1, ?2, ?3, ?4, ?5)";
        let mut insert = self.connection.prepare_cached(sql)?;
        let (state, cells, values) = encode(row);
        insert.execute(params![number(table), key, state, cells, values])?;
        Ok(())
    }

    /// The earlier states that were kept of a row.
    pub(super) fn versions(&self, table: usize, key: &str) -> Result<Vec<Row>, Error> {
        let sql = "SELECT state, cells, vals FROM versions WHERE tbl = ?1 AND key = ?2";
        let mut select = self.connection.prepare_cached(sql)?;
        let rows = select.query_map(params![number(table), key], |row| {
            let cells = row.get::<_, Vec<u8>>(1)?;
            Ok(decode(Position::default(), row.get(0)?, &cells, row.get(2)?))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Deletes every row of the table, as a truncate does.
    pub(super) fn truncate(&self, table: usize, keep_versions: bool) -> Result<(), Error> {
        if keep_versions {
            let sql = "INSERT INTO versions SELECT tbl, key, state, cells, vals FROM states
                WHERE tbl = ?1";
            self.connection.execute(sql, params![number(table)])?;
        }
        let live = encode_state(State::Live);
        let sql = "UPDATE states SET state = ?2 WHERE tbl = ?1 AND state = ?3";
        self.connection.execute(sql, params![number(table), encode_state(State::Deleted), live])?;
        let sql = "UPDATE bags SET n = 0, late = max(late, ?2) WHERE tbl = ?1";
        self.connection.execute(sql, params![number(table), keep_versions])?;
        Ok(())
    }

    /// The table has this row.
    pub(super) fn set_matched(&self, table: usize, key: &str) -> Result<(), Error> {
        let sql = "UPDATE states SET matched = 1 WHERE tbl = ?1 AND key = ?2";
        self.connection.prepare_cached(sql)?.execute(params![number(table), key])?;
        Ok(())
    }

    /// The rows that the stream has and the table has not.
    pub(super) fn unmatched(
        &self,
        table: usize,
        mut each: impl FnMut(&str) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let sql = "SELECT key FROM states WHERE tbl = ?1 AND state = ?2 AND matched = 0";
        let mut select = self.connection.prepare(sql)?;
        let mut rows = select.query(params![number(table), encode_state(State::Live)])?;
        while let Some(row) = rows.next()? {
            each(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?;
        }
        Ok(())
    }

    /// Adds so many equal rows to a table without a key, or takes them away.
    pub(super) fn add_to_bag(
        &self,
        table: usize,
        digest: Digest,
        n: i64,
        late: bool,
    ) -> Result<(), Error> {
        let sql = "INSERT INTO bags VALUES (?1, ?2, ?3, ?4)
            ON CONFLICT DO UPDATE SET n = n + excluded.n, late = max(late, excluded.late)";
        self.connection.prepare_cached(sql)?.execute(params![number(table), digest, n, late])?;
        Ok(())
    }

    /// How many rows of a table without a key are left over in the stream, and how many in the
    /// table; not counting those that changed while the table was looked at.
    pub(super) fn bag_rest(&self, table: usize) -> Result<(u64, u64), Error> {
        let sql = "SELECT coalesce(sum(max(n, 0)), 0), coalesce(sum(max(-n, 0)), 0) FROM bags
            WHERE tbl = ?1 AND late = 0";
        Ok(self.connection.query_row(sql, params![number(table)], |row| {
            Ok((unsigned(row.get(0)?), unsigned(row.get(1)?)))
        })?)
    }

    pub(super) fn hold(&self, table: usize, key: &str) -> Result<(), Error> {
        let sql = "INSERT OR IGNORE INTO held VALUES (?1, ?2)";
        self.connection.prepare_cached(sql)?.execute(params![number(table), key])?;
        Ok(())
    }

    pub(super) fn give_up(&self, table: usize, key: &str) -> Result<(), Error> {
        let sql = "INSERT OR IGNORE INTO given_up VALUES (?1, ?2)";
        self.connection.prepare_cached(sql)?.execute(params![number(table), key])?;
        Ok(())
    }

    /// The row, or with a truncate all of the table's rows.
    pub(super) fn is_given_up(&self, table: usize, key: &str) -> Result<bool, Error> {
        let sql = "SELECT 1 FROM given_up WHERE tbl = ?1 AND key IN (?2, '')";
        Ok(self.connection.prepare_cached(sql)?.exists(params![number(table), key])?)
    }

    /// The row, or with a truncate all of the table's rows.
    pub(super) fn is_held(&self, table: usize, key: &str) -> Result<bool, Error> {
        let sql = "SELECT 1 FROM held WHERE tbl = ?1 AND key IN (?2, '')";
        Ok(self.connection.prepare_cached(sql)?.exists(params![number(table), key])?)
    }
}

fn encode_state(state: State) -> u8 {
    match state {
        State::Unknown => 0,
        State::Live => 1,
        State::Deleted => 2,
        State::Opaque => 3,
    }
}

/// A row as the columns `state`, `cells` and `vals`.
fn encode(row: &Row) -> (u8, Vec<u8>, Option<String>) {
    let mut cells = Vec::with_capacity(row.cells.len() * 17);
    for cell in &row.cells {
        let (tag, digest) = match cell {
            Cell::Unknown => (0, None),
            Cell::Value(digest) => (1, Some(digest)),
            Cell::Altered => (2, None),
            Cell::Absent => (3, None),
        };
        cells.push(tag);
        cells.extend(digest.into_iter().flatten());
    }
    let values = row.values.as_ref().and_then(|values| serde_json::to_string(values).ok());
    (encode_state(row.state), cells, values)
}

fn decode(at: Position, state: u8, bytes: &[u8], values: Option<String>) -> Row {
    let state = match state {
        1 => State::Live,
        2 => State::Deleted,
        3 => State::Opaque,
        _ => State::Unknown,
    };
    let mut cells = Vec::new();
    let mut rest = bytes;
    while let Some((tag, after)) = rest.split_first() {
        rest = after;
        cells.push(match tag {
            1 => match rest.split_first_chunk() {
                Some((digest, after)) => {
                    rest = after;
                    Cell::Value(*digest)
                }
                None => Cell::Unknown,
            },
            2 => Cell::Altered,
            3 => Cell::Absent,
            _ => Cell::Unknown,
        });
    }
    let values = values.and_then(|values| serde_json::from_str(&values).ok());
    Row { at, state, cells, values }
}

/// A table's place among the tables that are compared.
fn number(table: usize) -> i64 {
    i64::try_from(table).unwrap_or(i64::MAX)
}

/// SQLite's integers are signed; all 64 bits come back.
fn signed(number: u64) -> i64 {
    number.cast_signed()
}

fn unsigned(number: i64) -> u64 {
    number.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(lsn: u64, index: u64) -> Position {
        Position { commit_lsn: Lsn(lsn), index }
    }

    #[test]
    fn rows_come_back_as_they_went() {
        let scratch = Scratch::create().unwrap();
        let row = Row {
            at: at(u64::MAX, 3),
            state: State::Live,
            cells: vec![Cell::Value([7; 16]), Cell::Altered, Cell::Absent, Cell::Unknown],
            values: Some(vec![Some("1".to_owned()), None, None, None]),
        };
        scratch.put(0, "[1]", &row).unwrap();
        assert_eq!(scratch.row(0, "[1]").unwrap(), Some(row.clone()));
        assert_eq!(scratch.row(1, "[1]").unwrap(), None);
        scratch.truncate(0, true).unwrap();
        assert_eq!(scratch.row(0, "[1]").unwrap().unwrap().state, State::Deleted);
        assert_eq!(scratch.versions(0, "[1]").unwrap()[0].cells, row.cells);
    }

    #[test]
    fn records_are_seen_once_and_splits_counted() {
        let scratch = Scratch::create().unwrap();
        assert!(scratch.see(at(1, 0), 0).unwrap());
        assert!(scratch.see(at(1, 0), 1).unwrap());
        assert!(!scratch.see(at(1, 0), 1).unwrap());
        assert!(scratch.has_seen(at(1, 0)).unwrap() && !scratch.has_seen(at(1, 1)).unwrap());
        scratch.add_part(at(1, 0), 3, "x").unwrap();
        scratch.add_part(at(1, 0), 3, "x").unwrap();
        assert_eq!(scratch.incomplete().unwrap(), [("x".to_owned(), 2, 3)]);
    }

    #[test]
    fn equal_rows_are_counted() {
        let scratch = Scratch::create().unwrap();
        scratch.add_to_bag(0, [1; 16], 2, false).unwrap();
        scratch.add_to_bag(0, [1; 16], -1, false).unwrap();
        scratch.add_to_bag(0, [2; 16], -3, false).unwrap();
        scratch.add_to_bag(0, [3; 16], 5, true).unwrap();
        assert_eq!(scratch.bag_rest(0).unwrap(), (1, 3));
    }
}
