//! The file: its settings, its tables, its version, and the way there from every older one.
//!
//! A version is never changed once it was released. What a release adds is one more step, which a
//! file that an older release has written goes through at its first start, in one transaction with
//! its new number. A new file goes through all of them, so that both ways lead to the same tables.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::{Error, checksum};

/// What `PRAGMA user_version` says in a file of this release.
const VERSION: usize = STEPS.len();

/// From each version to the next, beginning with an empty file. Write steps at the end.
const STEPS: &[Step] =
    &[version_1, version_2, version_3, version_4, version_5, version_6, version_7];

type Step = fn(&Transaction<'_>) -> Result<(), Error>;

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

/// The first release.
fn version_1(transaction: &Transaction<'_>) -> Result<(), Error> {
    transaction.execute_batch(
        "CREATE TABLE facts (
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
",
    )?;
    Ok(())
}

/// Rows have checksums. What an older release has written gets them as it is.
fn version_2(transaction: &Transaction<'_>) -> Result<(), Error> {
    const CHECKED: [(&str, &str); 4] = [
        ("facts", checksum::FACT),
        ("checkpoints", "stream, commit_lsn, commit_idx, seq, confirm_lsn"),
        (
            "messages",
            "id, commit_lsn, commit_idx, state, relation, action, commit_timestamp_us, cells, key,
             table_group, group_a, group_b, bytes, attempts, next_attempt_ms, stored_ms, failure",
        ),
        ("pieces", checksum::PIECE),
    ];
    for (table, columns) in CHECKED {
        transaction.execute_batch(&format!(
            "ALTER TABLE {table} ADD COLUMN sum INTEGER;
             UPDATE {table} SET sum = checksum({columns});"
        ))?;
    }
    Ok(())
}

/// Changes wait here while S2 is away.
fn version_3(transaction: &Transaction<'_>) -> Result<(), Error> {
    transaction.execute_batch(
        "
-- Changes as they came from the source, many in a row, in the order of the ids.
CREATE TABLE spill (
    id INTEGER PRIMARY KEY,
    -- Of the last change.
    commit_lsn INTEGER NOT NULL,
    commit_idx INTEGER NOT NULL,
    changes INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    head BLOB NOT NULL,
    sum INTEGER
) STRICT;
CREATE TABLE spill_pieces (
    chunk INTEGER NOT NULL REFERENCES spill (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    data BLOB NOT NULL,
    sum INTEGER,
    PRIMARY KEY (chunk, number)
) STRICT, WITHOUT ROWID;
",
    )?;
    Ok(())
}

/// The checkpoints of streams that transforms route messages to stand beside the pipeline's own. The
/// tables are the same, and an older release would not read those streams before it sends again.
fn version_4(_: &Transaction<'_>) -> Result<(), Error> {
    Ok(())
}

/// Before its stream was opened for the first time, a checkpoint has the number -1. The tables are the
/// same, and an older release would read the stream from there.
fn version_5(_: &Transaction<'_>) -> Result<(), Error> {
    Ok(())
}

/// Records that no batch holds together wait here until all of them are in the stream; and a message's
/// own failures are counted.
fn version_6(transaction: &Transaction<'_>) -> Result<(), Error> {
    transaction.execute_batch(
        "
CREATE TABLE parts (
    message INTEGER NOT NULL REFERENCES messages (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    -- Where they go; empty for the pipeline's own stream.
    stream TEXT NOT NULL,
    sum INTEGER,
    record BLOB NOT NULL,
    PRIMARY KEY (message, number)
) STRICT, WITHOUT ROWID;
-- Of the attempts, those that failed for what the message itself is.
ALTER TABLE messages ADD COLUMN own_failures INTEGER NOT NULL DEFAULT 0;
",
    )?;
    transaction
        .execute_batch(&format!("UPDATE messages SET sum = checksum({});", checksum::MESSAGE))?;
    Ok(())
}

/// How far each stream has reached, also where nothing of it is unsettled: such a row has the number -1.
fn version_7(transaction: &Transaction<'_>) -> Result<(), Error> {
    transaction.execute_batch(&format!(
        "
-- Behind the last record that is known to be in the stream, whoever wrote it.
ALTER TABLE checkpoints ADD COLUMN reached INTEGER NOT NULL DEFAULT 0;
UPDATE checkpoints SET reached = max(seq, 0);
UPDATE checkpoints SET sum = checksum({});
",
        checksum::CHECKPOINT
    ))?;
    Ok(())
}

/// The tables whose rows have checksums, and what of a row they cover. New ones come last.
const CHECKED: [(&str, &str); 7] = [
    ("facts", checksum::FACT),
    ("checkpoints", checksum::CHECKPOINT),
    ("messages", checksum::MESSAGE),
    ("pieces", checksum::PIECE),
    ("spill", checksum::SPILL),
    ("spill_pieces", checksum::SPILL_PIECE),
    ("parts", checksum::PART),
];

/// A file up to this size is looked through as a whole at each start, with all its values: 0.2 s a
/// GiB for the structure and as much for the checksums where the system has it in memory. Of a larger
/// one, values are left to the checks that each reading makes.
const CHECKED_WHOLE_BYTES_MAX: i64 = 1024 * 1024 * 1024;

/// Brings a new or older file to this release's version, and looks for damage.
///
/// # Errors
///
/// [`Error::Version`] where a later release has written the file, [`Error::Corrupt`] where it is not as
/// it was written.
pub(super) fn prepare(connection: &mut Connection) -> Result<(), Error> {
    checksum::register(connection)?;
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let version = usize::try_from(found).unwrap_or(usize::MAX);
    if version > VERSION {
        return Err(Error::Version { found, known: VERSION as i64 });
    }
    if version == 0 {
        let tables: i64 =
            connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if tables > 0 {
            let text = "it has tables and no version: Sluicebox has not written it".to_owned();
            return Err(Error::Corrupt { text });
        }
        // Only a file without tables can choose this.
        connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL;")?;
    }
    connection.execute_batch(SETTINGS)?;
    if version > 0 {
        check_structure(connection)?;
    }
    for (number, step) in STEPS.iter().enumerate().skip(version) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        step(&transaction)?;
        transaction.pragma_update(None, "user_version", number as i64 + 1)?;
        transaction.commit()?;
        if version > 0 {
            tracing::info!(from = number, to = number + 1, "the message store is of a new version");
        }
    }
    check_rows(connection)
}

/// Pages that are lost, used twice or out of order, and indexes that do not fit their table.
///
/// `quick_check` reads every page once. What it leaves out, whether indexes fit, costs 2.5 times that
/// and matters where an index finds rows: in `messages`, whose rows are small.
fn check_structure(connection: &Connection) -> Result<(), Error> {
    let checks: &[&str] = if is_large(connection)? {
        &["quick_check('facts')", "quick_check('checkpoints')", "integrity_check('messages')"]
    } else {
        &["quick_check(1)", "integrity_check('messages')"]
    };
    for check in checks {
        let verdict: String =
            connection.query_row(&format!("PRAGMA {check}"), [], |row| row.get(0))?;
        if verdict != "ok" {
            return Err(Error::Corrupt { text: verdict.replace('\n', "; ") });
        }
    }
    Ok(())
}

fn check_rows(connection: &Connection) -> Result<(), Error> {
    let large = is_large(connection)?;
    for (table, columns) in CHECKED {
        if !(large && [checksum::PIECE, checksum::SPILL_PIECE, checksum::PART].contains(&columns)) {
            checksum::verify(connection, table, columns)?;
        }
    }
    Ok(())
}

fn is_large(connection: &Connection) -> Result<bool, Error> {
    let pages: i64 = connection.query_row("PRAGMA page_count", [], |row| row.get(0))?;
    let page_bytes: i64 = connection.query_row("PRAGMA page_size", [], |row| row.get(0))?;
    Ok(pages.saturating_mul(page_bytes) > CHECKED_WHOLE_BYTES_MAX)
}
