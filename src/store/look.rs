//! The store as another process may look at it, whether its owner is at work or not: for whoever compares
//! the stream with the tables. Nothing is written, and nobody is kept waiting.

use std::collections::BTreeSet;
use std::path::Path;

use rusqlite::{Connection, OpenFlags};
use serde_json::Value;

use super::given_up::{self, AllGivenUp, GivenUp};
use super::{Error, checksum, codec, dead_letters, fact, spill, token_fact, unsigned};
use crate::change::{Change, Lsn, Position};

/// A message that has not been delivered.
#[derive(Clone, Debug)]
pub struct Undelivered {
    /// `schema.name`.
    pub table: String,
    pub position: Position,
    /// Of each row that it concerns, as [`codec::primary_keys`] has them; of all, where there is none.
    pub keys: Vec<Value>,
}

/// An open look.
#[derive(Debug)]
pub struct Look {
    connection: Connection,
}

impl Look {
    /// Opens the store of a state folder; nothing where there is none.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn open(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(super::FILE);
        if !path.exists() {
            return Ok(None);
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        checksum::register(&connection)?;
        Ok(Some(Self { connection }))
    }

    /// What operators gave up.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn given_up(&self) -> Result<AllGivenUp, Error> {
        given_up::known(&self.connection)
    }

    /// What became a dead letter, as far as it is remembered one by one.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn dead_letters(&self) -> Result<Vec<GivenUp>, Error> {
        dead_letters::newest(&self.connection)
    }

    /// The id that every record of this store carries, once there is one.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn pipeline_id(&self) -> Result<Option<String>, Error> {
        fact(&self.connection, "pipeline_id")
    }

    /// The streams that transforms have routed messages to: those that it has a row for, and those that a
    /// fencing token was ever drawn for.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn streams(&self) -> Result<BTreeSet<String>, Error> {
        let prefix = token_fact(Some(""));
        let mut select = self.connection.prepare(
            "SELECT stream FROM checkpoints WHERE stream <> ''
             UNION SELECT substr(name, length(?1) + 1) FROM facts
               WHERE substr(name, 1, length(?1)) = ?1",
        )?;
        let names = select.query_map([prefix], |row| row.get(0))?;
        Ok(names.collect::<Result<_, _>>()?)
    }

    /// Tells each spilled change. In memory there is one chunk at a time.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn spilled(&self, mut each: impl FnMut(&Change)) -> Result<(), Error> {
        let mut after = 0;
        while let Some((id, changes)) = spill::read(&self.connection, after)? {
            changes.iter().for_each(&mut each);
            after = id;
        }
        Ok(())
    }

    /// Tells each message that is neither delivered nor given up. Values are read only where an update came
    /// with the row before it, whose key may be another one.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn undelivered(&self, mut each: impl FnMut(Undelivered)) -> Result<(), Error> {
        let mut select = self.connection.prepare(
            "SELECT messages.id, schema_name || '.' || table_name, commit_lsn, commit_idx, action, key,
                    json_extract(cells, '$.new') IS NOT NULL AND json_extract(cells, '$.old') IS NOT NULL
             FROM messages JOIN relations ON relations.id = relation WHERE state <> 3",
        )?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let (id, action, has_both): (i64, String, bool) =
                (row.get(0)?, row.get(4)?, row.get(6)?);
            let keys = if action == "truncate" {
                Vec::new()
            } else if has_both
                && let Some((change, _)) = codec::read(&self.connection, unsigned(id))?
            {
                codec::primary_keys(&change)
            } else {
                vec![codec::from_json(&row.get::<_, String>(5)?)?]
            };
            each(Undelivered {
                table: row.get(1)?,
                position: Position {
                    commit_lsn: Lsn(unsigned(row.get(2)?)),
                    index: unsigned(row.get(3)?),
                },
                keys,
            });
        }
        Ok(())
    }
}
