//! The file: its settings, tables and version.

use rusqlite::Connection;

use super::Error;

/// What `PRAGMA user_version` says in a file of this release.
const VERSION: i64 = 1;

/// WAL with `synchronous = FULL` syncs at each commit, so that what was committed survives a power
/// loss (<https://www.sqlite.org/pragma.html#pragma_synchronous>). The cache bound keeps a message of
/// 100 MiB from living in memory; the WAL is cut back after such a one.
const SETTINGS: &str = "
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA foreign_keys = ON;
PRAGMA cache_size = -4096;
PRAGMA journal_size_limit = 16777216;
PRAGMA temp_store = MEMORY;
";

const TABLES: &str = "
CREATE TABLE facts (
    name TEXT PRIMARY KEY,
    value ANY NOT NULL
) STRICT, WITHOUT ROWID;

-- How far a stream and the source are settled.
CREATE TABLE checkpoints (
    stream TEXT PRIMARY KEY,
    commit_lsn INTEGER NOT NULL,
    commit_idx INTEGER NOT NULL,
    -- The lowest sequence number whose acknowledgement is not applied here.
    seq INTEGER NOT NULL,
    -- What may be confirmed to Postgres.
    confirm_lsn INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Tables as they were described when a message's change was made.
CREATE TABLE relations (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    schema_name TEXT NOT NULL,
    table_name TEXT NOT NULL,
    description TEXT NOT NULL
) STRICT;

CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    commit_lsn INTEGER NOT NULL,
    commit_idx INTEGER NOT NULL,
    -- 0 parked, 1 retrying, 2 waiting; 3: given up, kept until the checkpoint has passed it.
    state INTEGER NOT NULL,
    relation INTEGER NOT NULL REFERENCES relations (id),
    action TEXT NOT NULL,
    commit_timestamp_us INTEGER NOT NULL,
    cells TEXT NOT NULL,
    key TEXT NOT NULL,
    table_group BLOB NOT NULL,
    group_a BLOB,
    group_b BLOB,
    bytes INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    next_attempt_ms INTEGER,
    stored_ms INTEGER NOT NULL,
    failure TEXT,
    UNIQUE (commit_lsn, commit_idx)
) STRICT;
CREATE INDEX messages_state ON messages (state, id);
CREATE INDEX messages_group_a ON messages (group_a, commit_lsn, commit_idx);
CREATE INDEX messages_group_b ON messages (group_b, commit_lsn, commit_idx);

-- Row values, apart from what lists show, in pieces, so that no message needs one large buffer.
CREATE TABLE pieces (
    message INTEGER NOT NULL REFERENCES messages (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (message, number)
) STRICT, WITHOUT ROWID;
";

/// Brings a new or older file to this release's version.
pub(super) fn prepare(connection: &Connection) -> Result<(), Error> {
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version == 0 {
        // Only a file without tables can choose this.
        connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL;")?;
    }
    connection.execute_batch(SETTINGS)?;
    match version {
        0 => connection.execute_batch(&format!(
            "BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;"
        ))?,
        VERSION => {}
        found => return Err(Error::Version { found, known: VERSION }),
    }
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(Error::Corrupt { text: verdict });
    }
    Ok(())
}
