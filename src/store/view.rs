//! What operators read from the store.

use std::collections::{HashMap, HashSet};
use std::time::SystemTime;

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, params_from_iter};

use super::{Error, Failure, StoredState, codec, dead_letters, last_id, signed, unsigned};
use crate::change::Change;
use crate::pipeline::control::{self, Filter, MessageList, MessageView, PageQuery, State};
use crate::sink::record::RECORD_BYTES_MAX;

/// One message with its change and the trace of its last attempt.
#[derive(Debug)]
pub struct Stored {
    pub message: MessageView,
    pub change: Change,
    pub failure: Option<Failure>,
    /// How many messages wait behind it.
    pub holds: u64,
}

/// The most messages that a page may hold.
const PAGE_MAX: usize = 1000;

/// The word for messages that have left the store as dead letters.
const DEAD: &str = "dead";

const COLUMNS: &str = "SELECT messages.id, state, schema_name, table_name, key, action, commit_lsn,
    commit_idx, failure, attempts, next_attempt_ms, stored_ms
    FROM messages JOIN relations ON relations.id = relation WHERE state <> 3";

pub(super) fn list(
    connection: &Connection,
    query: &PageQuery,
    moving: &HashSet<u64>,
) -> Result<MessageList, control::Error> {
    if query.filter.state.as_deref() == Some(DEAD) {
        return dead_letters::list(connection, query).map_err(store);
    }
    let condition = Condition::new(&query.filter, moving)?;
    let limit = query.limit.clamp(1, PAGE_MAX);
    let read = || -> Result<MessageList, Error> {
        let total: i64 = connection.query_row(
            &format!(
                "SELECT count(*) FROM messages JOIN relations ON relations.id = relation
                 WHERE state <> 3 {}",
                condition.sql
            ),
            params_from_iter(&condition.values),
            |row| row.get(0),
        )?;
        let mut statement = connection.prepare(&format!(
            "{COLUMNS} {} AND messages.id > {} ORDER BY messages.id LIMIT {}",
            condition.sql,
            signed(query.after.unwrap_or(0)),
            limit + 1
        ))?;
        let mut rows = statement.query(params_from_iter(&condition.values))?;
        let mut messages = Vec::new();
        let mut behind = Behind::default();
        while let Some(row) = rows.next()? {
            messages.push(view(connection, row, moving, &mut behind)?);
        }
        let next = (messages.len() > limit).then(|| {
            messages.truncate(limit);
            messages.last().map(|message| message.id.clone())
        });
        Ok(MessageList { messages, next: next.flatten(), total: unsigned(total) })
    };
    read().map_err(store)
}

pub(super) fn show(
    connection: &Connection,
    id: u64,
    moving: &HashSet<u64>,
) -> Result<Stored, control::Error> {
    let read = || -> Result<Option<Stored>, Error> {
        let mut statement = connection.prepare(&format!("{COLUMNS} AND messages.id = ?1"))?;
        let mut rows = statement.query([signed(id)])?;
        let Some(row) = rows.next()? else { return Ok(None) };
        let message = view(connection, row, moving, &mut Behind::default())?;
        let failure: Option<String> = row.get(8)?;
        let failure = failure.map(|failure| codec::from_json(&failure)).transpose()?;
        let Some((change, _)) = codec::read(connection, id)? else { return Ok(None) };
        let holds = waiting_behind(connection, id)?;
        Ok(Some(Stored { message, change, failure, holds }))
    };
    match read().map_err(store)? {
        Some(stored) => Ok(stored),
        None => Err(missing(connection, id)),
    }
}

pub(super) fn select(connection: &Connection, filter: &Filter) -> Result<Vec<u64>, control::Error> {
    let condition = Condition::new(filter, &HashSet::new())?;
    let read = || -> Result<Vec<u64>, Error> {
        let mut statement = connection.prepare(&format!(
            "SELECT messages.id FROM messages JOIN relations ON relations.id = relation
             WHERE state <> 3 {} ORDER BY messages.id",
            condition.sql
        ))?;
        let ids = statement
            .query_map(params_from_iter(&condition.values), |row| row.get(0).map(unsigned))?
            .collect::<Result<Vec<u64>, _>>()?;
        Ok(ids)
    };
    let ids = read().map_err(store)?;
    match filter.id {
        Some(id) if ids.is_empty() => Err(missing(connection, id)),
        _ => Ok(ids),
    }
}

/// Why there is no such message: it has left the store, or nothing was ever numbered so.
fn missing(connection: &Connection, id: u64) -> control::Error {
    match last_id(connection) {
        Ok(last) if id == 0 || id > last => control::Error::NeverStored { id, last },
        Ok(_) => control::Error::NotFound { id },
        Err(error) => store(error),
    }
}

/// How many messages wait behind this one, in either of its groups, or in its table where one of the two
/// is for the whole table.
fn waiting_behind(connection: &Connection, id: u64) -> Result<u64, Error> {
    let mut statement = connection.prepare_cached(
        "SELECT count(DISTINCT later.id) FROM messages AS this, messages AS later
         WHERE this.id = ?1 AND later.state = 2
           AND (later.group_a IN (this.group_a, this.group_b)
                OR later.group_b IN (this.group_a, this.group_b)
                OR later.table_group = this.table_group
                   AND (later.group_a IS NULL OR this.group_a IS NULL))
           AND (later.commit_lsn, later.commit_idx) > (this.commit_lsn, this.commit_idx)",
    )?;
    Ok(statement.query_row([signed(id)], |row| row.get(0).map(unsigned))?)
}

pub(super) fn unchanged_behind(connection: &Connection, ids: &[u64]) -> Result<u64, Error> {
    let given_up: HashSet<u64> = ids.iter().copied().collect();
    let mut behind = HashSet::new();
    for &id in ids {
        let mut statement = connection.prepare_cached(
            // A group may hold more rows than one, and only the same row's later updates read their
            // unchanged columns from this one; an update of the key has another key.
            "SELECT later.id FROM messages AS later, messages AS this
             WHERE this.id = ?1 AND later.state <> 3 AND later.action = 'update'
               AND (later.group_a = this.group_a OR later.group_b = this.group_a
                    OR later.table_group = this.table_group
                       AND (later.group_a IS NULL OR this.group_a IS NULL))
               AND (later.key = this.key OR later.group_b IS NOT NULL)
               AND (later.commit_lsn, later.commit_idx) > (this.commit_lsn, this.commit_idx)
               AND json_extract(later.cells, '$.new') LIKE '%\"Unchanged\"%'",
        )?;
        let later = statement.query_map([signed(id)], |row| row.get(0).map(unsigned))?;
        for id in later {
            behind.insert(id?);
        }
    }
    Ok(behind.difference(&given_up).count() as u64)
}

/// A filter as SQL.
struct Condition {
    sql: String,
    values: Vec<Value>,
}

impl Condition {
    fn new(filter: &Filter, moving: &HashSet<u64>) -> Result<Self, control::Error> {
        let mut condition = Self { sql: String::new(), values: Vec::new() };
        if let Some(id) = filter.id {
            condition.and("messages.id = ?", [Value::Integer(signed(id))]);
        }
        let delivering = moving.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        match filter.state.as_deref() {
            None => {}
            Some("failed") => condition.and("state IN (0, 1)", []),
            Some("parked") => {
                condition.and(&format!("state = 0 AND messages.id NOT IN ({delivering})"), []);
            }
            Some("retrying") => {
                condition.and(&format!("state = 1 AND messages.id NOT IN ({delivering})"), []);
            }
            Some("waiting") => {
                condition.and(&format!("state = 2 AND messages.id NOT IN ({delivering})"), []);
            }
            Some("delivering") => {
                condition.and(&format!("messages.id IN ({delivering})"), []);
            }
            Some(DEAD) => {
                return Err(control::Error::Invalid {
                    text: "dead letters have left the store: there is nothing to do to them here"
                        .to_owned(),
                });
            }
            Some(other) => {
                return Err(control::Error::Invalid {
                    text: format!(
                        "`{other}` is not a state: use failed, parked, retrying, waiting, delivering \
                         or dead"
                    ),
                });
            }
        }
        if let Some(table) = &filter.table {
            let text = Value::Text(table.clone());
            condition.and(
                "(schema_name || '.' || table_name = ? OR table_name = ?)",
                [text.clone(), text],
            );
        }
        for (path, wanted) in [("class", &filter.class), ("transform", &filter.transform)] {
            if let Some(wanted) = wanted {
                let sql = format!("json_extract(failure, '$.error.{path}') = ?");
                condition.and(&sql, [Value::Text(wanted.clone())]);
            }
        }
        Ok(condition)
    }

    fn and<const N: usize>(&mut self, sql: &str, values: [Value; N]) {
        self.sql.push_str(" AND ");
        self.sql.push_str(sql);
        self.values.extend(values);
    }
}

/// The first message of each group, the first barrier of each table and the first message of each
/// table with barriers, looked up once for a page.
#[derive(Default)]
struct Behind(HashMap<(Queue, [u8; 16]), Option<Head>>);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Queue {
    Group,
    Barriers,
    Table,
}

impl Queue {
    /// The first message of a queue. Each has an index to begin at.
    fn sql(self) -> &'static str {
        match self {
            Self::Group => {
                "SELECT commit_lsn, commit_idx, id FROM (
                   SELECT id, commit_lsn, commit_idx FROM messages
                     WHERE group_a = ?1 AND state <> 3
                   UNION ALL
                   SELECT id, commit_lsn, commit_idx FROM messages
                     WHERE group_b = ?1 AND state <> 3)
                 ORDER BY commit_lsn, commit_idx LIMIT 1"
            }
            Self::Barriers => {
                "SELECT commit_lsn, commit_idx, id FROM messages
                 WHERE group_a IS NULL AND table_group = ?1 AND state <> 3
                 ORDER BY commit_lsn, commit_idx LIMIT 1"
            }
            Self::Table => {
                "SELECT commit_lsn, commit_idx, id FROM messages
                 WHERE table_group = ?1 AND state <> 3
                 ORDER BY commit_lsn, commit_idx LIMIT 1"
            }
        }
    }
}

/// Position and id.
type Head = (i64, i64, i64);

impl Behind {
    /// The message that a waiting one stands behind.
    fn head(&mut self, connection: &Connection, id: i64) -> Result<Option<i64>, Error> {
        let (table, first, second): ([u8; 16], Option<[u8; 16]>, Option<[u8; 16]>) = connection
            .prepare_cached("SELECT table_group, group_a, group_b FROM messages WHERE id = ?1")?
            .query_row([id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        let mut queues: Vec<_> =
            [first, second].into_iter().flatten().map(|group| (Queue::Group, group)).collect();
        queues.push(if queues.is_empty() {
            (Queue::Table, table)
        } else {
            (Queue::Barriers, table)
        });
        let own: Head = connection
            .prepare_cached("SELECT commit_lsn, commit_idx, id FROM messages WHERE id = ?1")?
            .query_row([id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        let mut first = None;
        for queue in queues {
            let head = match self.0.get(&queue) {
                Some(head) => *head,
                None => {
                    let head = connection
                        .prepare_cached(queue.0.sql())?
                        .query_row([queue.1], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
                        .optional()?;
                    self.0.insert(queue, head);
                    head
                }
            };
            first = [first, head.filter(|head| *head < own)].into_iter().flatten().min();
        }
        Ok(first.map(|(_, _, id)| id))
    }
}

fn view(
    connection: &Connection,
    row: &rusqlite::Row<'_>,
    moving: &HashSet<u64>,
    behind: &mut Behind,
) -> Result<MessageView, Error> {
    let id: i64 = row.get(0)?;
    let stored = StoredState::from_number(row.get(1)?)?;
    let state = match stored {
        _ if moving.contains(&unsigned(id)) => State::Delivering,
        StoredState::Parked | StoredState::Acknowledged => State::Parked,
        StoredState::Retrying => State::Retrying,
        StoredState::Waiting => State::Waiting,
    };
    let failure: Option<String> = row.get(8)?;
    let failure: Option<Failure> = failure.map(|failure| codec::from_json(&failure)).transpose()?;
    let (schema, table): (String, String) = (row.get(2)?, row.get(3)?);
    let behind = match stored {
        StoredState::Waiting => behind.head(connection, id)?,
        StoredState::Parked | StoredState::Retrying | StoredState::Acknowledged => None,
    };
    let key: String = row.get(4)?;
    Ok(MessageView {
        id: id.to_string(),
        state,
        table: format!("{schema}.{table}"),
        key: codec::from_json(&key)?,
        action: row.get(5)?,
        commit_lsn: unsigned(row.get(6)?),
        commit_idx: unsigned(row.get(7)?),
        bytes: failure.as_ref().and_then(|failure| failure.bytes),
        bytes_max: RECORD_BYTES_MAX,
        columns: failure.as_ref().map_or_else(Vec::new, |failure| failure.columns.clone()),
        error: failure.map(|failure| failure.error),
        attempts: unsigned(row.get(9)?),
        next_attempt_at: row.get::<_, Option<i64>>(10)?.map(|ms| rfc3339(codec::time_from_ms(ms))),
        stored_at: rfc3339(codec::time_from_ms(row.get(11)?)),
        behind: behind.map(|id| id.to_string()),
    })
}

pub(super) fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| String::new(), |time| time.to_string())
}

fn store(error: Error) -> control::Error {
    control::Error::Store(Box::new(error))
}
