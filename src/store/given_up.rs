//! What operators gave up: kept after the messages are gone, for whoever asks later why a row is not in
//! the stream.

use rusqlite::{Connection, Transaction};
use serde::{Deserialize, Serialize};

use super::{Error, codec, fact, now_ms, set_fact, signed, unsigned};

/// How many are remembered one by one; the count tells the rest.
const NEWEST_MAX: usize = 1000;

/// A longer key is left out.
const KEY_BYTES_MAX: usize = 1024;

/// The fact that holds them.
const NAME: &str = "given_up";

/// One message that was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    /// `schema.name`.
    pub table: String,
    /// The primary key's values by column; empty where the table has none.
    pub key: serde_json::Value,
    pub action: String,
    pub commit_lsn: u64,
    pub commit_idx: u64,
    /// Milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllGivenUp {
    pub count: u64,
    /// Oldest first.
    pub newest: Vec<GivenUp>,
}

/// A message that is about to be given up; nothing where there is no such message, or it was before.
pub(super) fn entry(connection: &Connection, id: u64) -> Result<Option<GivenUp>, Error> {
    let mut select = connection.prepare_cached(
        "SELECT schema_name || '.' || table_name, key, action, commit_lsn, commit_idx
         FROM messages JOIN relations ON relations.id = relation
         WHERE messages.id = ?1 AND state <> 3",
    )?;
    let mut rows = select.query([signed(id)])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    let key: String = row.get(1)?;
    let short = key.len() <= KEY_BYTES_MAX;
    Ok(Some(GivenUp {
        table: row.get(0)?,
        key: if short { codec::from_json(&key)? } else { serde_json::Value::Null },
        action: row.get(2)?,
        commit_lsn: unsigned(row.get(3)?),
        commit_idx: unsigned(row.get(4)?),
        at_ms: now_ms(),
    }))
}

/// Remembers them, once for a transaction.
pub(super) fn remember(transaction: &Transaction<'_>, entries: Vec<GivenUp>) -> Result<(), Error> {
    if entries.is_empty() {
        return Ok(());
    }
    let mut all = known(transaction)?;
    all.count += entries.len() as u64;
    all.newest.extend(entries);
    let gone = all.newest.len().saturating_sub(NEWEST_MAX);
    all.newest.drain(..gone);
    set_fact(transaction, NAME, &codec::to_json(&all)?)
}

pub(super) fn known(connection: &Connection) -> Result<AllGivenUp, Error> {
    fact(connection, NAME)?.map_or(Ok(AllGivenUp::default()), |text| codec::from_json(&text))
}
