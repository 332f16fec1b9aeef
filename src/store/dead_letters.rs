//! What became a dead letter: counted, and the newest kept after the messages are gone, for whoever
//! asks later where a row went.

use rusqlite::{Connection, Transaction};
use serde::{Deserialize, Serialize};

use super::given_up::{self, GivenUp};
use super::view::rfc3339;
use super::{Error, Failure, codec, fact, set_fact, signed};
use crate::pipeline::control::{ErrorView, Filter, MessageList, MessageView, PageQuery, State};
use crate::sink::record::RECORD_BYTES_MAX;

/// How many are remembered one by one; the count tells the rest.
const NEWEST_MAX: usize = 1000;

/// The fact that holds them.
const NAME: &str = "dead_letters";

/// The fact that says how far the file of dead letters is known.
const FILE: &str = "dead_letter_file";

/// One message that became a dead letter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DeadLetter {
    id: u64,
    #[serde(flatten)]
    message: GivenUp,
    attempts: u64,
    error: Option<ErrorView>,
    bytes: Option<u64>,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct All {
    count: u64,
    /// Oldest first.
    newest: Vec<DeadLetter>,
}

/// How far the file of dead letters is known: what is in it up to `end` has left the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LetterFile {
    pub path: String,
    /// In bytes.
    pub end: u64,
}

/// Messages that are about to leave as dead letters, to be remembered in the same transaction.
#[derive(Default)]
pub(super) struct Leaving(Vec<DeadLetter>);

impl Leaving {
    pub(super) fn add(&mut self, connection: &Connection, id: u64) -> Result<(), Error> {
        let Some(message) = given_up::entry(connection, id)? else { return Ok(()) };
        let (attempts, failure): (i64, Option<String>) = connection
            .prepare_cached("SELECT attempts, failure FROM messages WHERE id = ?1")?
            .query_row([signed(id)], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let failure: Option<Failure> = failure.map(|text| codec::from_json(&text)).transpose()?;
        self.0.push(DeadLetter {
            id,
            message,
            attempts: super::unsigned(attempts),
            bytes: failure.as_ref().and_then(|failure| failure.bytes),
            // S2's own text may be long.
            error: failure.map(|failure| ErrorView { body: None, ..failure.error }),
        });
        Ok(())
    }

    pub(super) fn remember(self, transaction: &Transaction<'_>) -> Result<(), Error> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut all = known(transaction)?;
        all.count += self.0.len() as u64;
        all.newest.extend(self.0);
        let gone = all.newest.len().saturating_sub(NEWEST_MAX);
        all.newest.drain(..gone);
        set_fact(transaction, NAME, &codec::to_json(&all)?)
    }
}

fn known(connection: &Connection) -> Result<All, Error> {
    fact(connection, NAME)?.map_or(Ok(All::default()), |text| codec::from_json(&text))
}

/// How many there were.
pub(super) fn count(connection: &Connection) -> Result<u64, Error> {
    known(connection).map(|all| all.count)
}

pub(super) fn file(connection: &Connection) -> Result<Option<LetterFile>, Error> {
    fact(connection, FILE)?.map(|text| codec::from_json(&text)).transpose()
}

pub(super) fn set_file(connection: &Connection, file: &LetterFile) -> Result<(), Error> {
    set_fact(connection, FILE, &codec::to_json(file)?)
}

/// A page of them. Those that are no longer remembered one by one are counted all the same.
pub(super) fn list(connection: &Connection, query: &PageQuery) -> Result<MessageList, Error> {
    let All { count, newest } = known(connection)?;
    let Filter { table, class, transform, .. } = &query.filter;
    let is_wanted = |wanted: &Option<String>, found: Option<&str>| {
        wanted.as_deref().is_none_or(|wanted| found == Some(wanted))
    };
    let is_of = |letter: &&DeadLetter| {
        let name = letter.message.table.as_str();
        let bare = name.split_once('.').map(|(_, bare)| bare);
        let error = letter.error.as_ref();
        (is_wanted(table, Some(name)) || is_wanted(table, bare))
            && is_wanted(class, error.map(|error| error.class.as_str()))
            && is_wanted(transform, error.and_then(|error| error.transform.as_deref()))
    };
    let is_all = table.is_none() && class.is_none() && transform.is_none();
    let total = if is_all { count } else { newest.iter().filter(is_of).count() as u64 };
    let after = query.after.unwrap_or(0);
    // Ids rise with time, though not without exception: a page goes on behind the highest.
    let mut found: Vec<&DeadLetter> =
        newest.iter().filter(is_of).filter(|letter| letter.id > after).collect();
    found.sort_by_key(|letter| letter.id);
    let limit = query.limit.clamp(1, NEWEST_MAX);
    let is_more = found.len() > limit;
    found.truncate(limit);
    let messages: Vec<MessageView> = found.into_iter().map(view).collect();
    let next = messages.last().filter(|_| is_more).map(|message| message.id.clone());
    Ok(MessageList { messages, next, total })
}

fn view(letter: &DeadLetter) -> MessageView {
    let DeadLetter { id, message, attempts, error, bytes } = letter;
    MessageView {
        id: id.to_string(),
        state: State::Dead,
        table: message.table.clone(),
        key: message.key.clone(),
        action: message.action.clone(),
        commit_lsn: message.commit_lsn,
        commit_idx: message.commit_idx,
        error: error.clone(),
        bytes: *bytes,
        bytes_max: RECORD_BYTES_MAX,
        columns: Vec::new(),
        attempts: *attempts,
        next_attempt_at: None,
        stored_at: rfc3339(codec::time_from_ms(message.at_ms)),
        behind: None,
    }
}

/// Those that are remembered one by one, oldest first.
pub(super) fn newest(connection: &Connection) -> Result<Vec<GivenUp>, Error> {
    Ok(known(connection)?.newest.into_iter().map(|letter| letter.message).collect())
}
