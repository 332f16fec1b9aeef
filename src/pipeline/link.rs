//! The pipeline's line to S2: opening it so that exactly once holds, and what was found in the stream.
//!
//! Each opening fences the stream with a token that was never used before, guarded by this store's
//! earlier ones, and reads the stream from the last acknowledged record to the fence. After that
//! nothing of an earlier session can land, and it is known what has.
//!
//! What was promised is remembered, in the store, before anything is sent: a token that may do less at
//! the next start, or one start with a 403 that passes, would otherwise send again what cannot be looked
//! for. Less is promised only where an operator has said so (`sink.guarantee`) or, before anything was
//! promised, where S2 has said 403 for some seconds: where the stream begins for this store is written
//! down then, and its beginning may have been trimmed long ago.
//!
//! The stream is only taken from whom this store knows, or an operator granted it: see
//! [`grants`](super::grants).
//!
//! Why both guards, and why this is enough: a batch of an earlier session carries an older token, so S2
//! refuses it once the fence is in; whatever it took before the fence lies in front of it, where it is
//! read. A batch of this session carries the number that its first record must get, so nothing that
//! somebody else appends in between can shift it unnoticed.
//!
//! Others may append to the stream, with no token. Each of their records makes one batch of ours miss
//! its number; the line is then opened again. Where they append all the time, nothing would ever get
//! through, so a line can do without numbers. That is safe while the token is this session's own: a
//! batch that carries it was sent on this session, in its order, and is applied in that order or not
//! at all; the next session's fence ends its time, and everything in front of that fence is read. What
//! is given up is only the guard against a proxy that plays one request twice.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use base64::Engine as _;

use super::grants::{Grants, LostRecords, Owner, refusal};
use super::size_gate::SizedRecord;
use crate::change::{Lsn, Position};
use crate::message::header;
use crate::mutation::{self, Rule};
use crate::sink;
use crate::sink::client::{Client, Mode};
use crate::sink::open::{Guarantee, Known, Opened, holds_any, open};
use crate::sink::read::ReadRecord;
use crate::sink::session::{Ack, Append, Session};
use crate::store::{Store, Tokens, Write};

/// How often the stream may turn out to be another one than what was just granted: each time it is
/// looked at anew.
const GRANTS_USED_MAX: usize = 4;

/// Why the line could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Sink(#[from] crate::sink::error::Error),
    #[error(transparent)]
    Store(#[from] crate::store::Error),
    /// The stream is another's, and only an operator can know whether it may be taken.
    #[error("{text}")]
    Owned { text: String },
}

/// What opening needs to know.
#[derive(Clone, Debug)]
pub struct Opening {
    pub client: Client,
    pub store: Store,
    /// A stream that transforms chose, by its name; nothing for the pipeline's own.
    pub routed: Option<Arc<str>>,
    pub pipeline_id: String,
    /// The number after the last acknowledged record; nothing before the first session of this store.
    pub read_from: Option<u64>,
    /// How far the stream has reached, as far as anybody here knows.
    pub reached: u64,
    /// Drawn for this opening; the same may be tried again after a failure.
    pub tokens: Tokens,
    /// For the first opening of a process.
    pub grants: Grants,
    /// No less may be promised.
    pub least: Guarantee,
    /// What the store says was promised last.
    pub promised: Option<Guarantee>,
    /// Whether batches carry their numbers. Without a fencing token they always do.
    pub numbers: bool,
}

/// An open line.
#[derive(Debug)]
pub struct Line {
    session: Session,
    /// The number that the next batch is guarded by.
    next_seq: Option<u64>,
    fencing_token: Option<String>,
    pub guarantee: Guarantee,
}

/// An open line, and what of ours the stream holds from where it was read.
#[derive(Debug)]
pub struct Established {
    pub line: Line,
    /// The first record of each change of this pipeline that is there as a whole, by its position.
    pub landed: HashMap<Position, u64>,
    /// Of those whose first parts are there, the number of the first that is not.
    pub begun: HashMap<Position, u64>,
    /// Of both, those that are there as dead letters.
    pub letters: HashSet<Position>,
    /// What of ours lies before this number is known.
    pub known_to: u64,
    /// Records after the checkpoint were gone, and this is to be done about them.
    pub lost: Option<Lost>,
}

/// Records that are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    pub choice: LostRecords,
    /// All of them were before this number, and what is left behind them begins with it.
    pub behind: u64,
}

/// Opens the line.
///
/// # Errors
///
/// What S2 or the store said.
pub async fn establish(opening: Opening) -> Result<Established, Error> {
    let Opening { client, store, routed, pipeline_id, read_from, reached, tokens, .. } = opening;
    let (grants, least, promised, numbers) =
        (opening.grants, opening.least, opening.promised, opening.numbers);
    let mode = client.settings().mode;
    if matches!(mode, Mode::Discard | Mode::Unguarded) {
        let line = Line {
            session: Session::open(&client),
            next_seq: read_from.or(Some(0)).filter(|_| mode == Mode::Discard),
            fencing_token: None,
            guarantee: Guarantee::AtLeastOnce,
        };
        let known_to = read_from.unwrap_or_default();
        let (landed, begun, letters) = Default::default();
        return Ok(Established { line, landed, begun, letters, known_to, lost: None });
    }
    // A row that is there may be lower: what is acknowledged need not be covered by a checkpoint yet.
    let mut row_is_due = read_from.is_none();
    let is_settled = read_from.is_none() && routed.is_some();
    let mut read_from = match read_from {
        Some(read_from) => read_from,
        None => first_read_from(&client, routed.is_none().then_some(&store), least).await?,
    };
    // The one that is most likely in force comes first. The newest is among them: an earlier try of
    // it may have landed without an answer.
    let Tokens { next, known, .. } = tokens;
    // Of a stream that was closed only the store knows it.
    let mut reached = if is_settled { tokens.reached.max(reached) } else { reached };
    let mut previous: Vec<String> = known.iter().rev().skip(1).cloned().collect();
    previous.push(next.clone());
    let mut lost = None;
    let mut used = 0;
    loop {
        let mut landed = HashMap::new();
        let mut begun = HashMap::new();
        let mut letters = HashSet::new();
        let on_record = |record: ReadRecord| {
            let Some(position) = ours(&record, &pipeline_id) else { return };
            landed.entry(position).or_insert(record.seq);
            if record.header(header::DEAD_LETTER).is_some() {
                letters.insert(position);
            }
            match part(&record) {
                // They are in order, so that the last tells whether all are there.
                Some((index, count)) if index + 1 < count => _ = begun.insert(position, index + 1),
                Some((_, count)) if count > 1 => _ = begun.remove(&position),
                _ => {}
            }
        };
        let stream = Known { read_from, reached };
        let opened = Box::pin(open(&client, &previous, &next, stream, least, on_record)).await;
        used += 1;
        let error = match opened {
            Ok(Opened { next_seq, fencing_token, guarantee, session }) => {
                let mut writes = Vec::new();
                // Before anything is sent, so that no later start takes less for as good.
                if routed.is_none() && promised != Some(guarantee) {
                    writes.push(Write::Promise(guarantee));
                }
                // However many are drawn from now on, this one is not forgotten.
                if let Some(token) = fencing_token.clone() {
                    writes.push(Write::InForce { stream: routed.clone(), token });
                }
                let known_to = next_seq.unwrap_or(read_from);
                let guarded = numbers || fencing_token.is_none();
                let next_seq = next_seq.filter(|_| guarded);
                let line = Line { session, next_seq, fencing_token, guarantee };
                let row_is_due = row_is_due && !mutation::broken(Rule::RowBeforeRecord);
                if let Some(name) = routed.as_ref().filter(|_| row_is_due) {
                    // Before its first record the store has to know that one may be there.
                    let name = Arc::clone(name);
                    writes.push(Write::Stream { name, seq: Some(read_from), reached: known_to });
                }
                if !writes.is_empty() {
                    store.write(writes.into()).await?;
                }
                landed.retain(|position, _| !begun.contains_key(position));
                return Ok(Established { line, landed, begun, letters, known_to, lost });
            }
            Err(error) => error,
        };
        // It has taken its records along, and holds nothing of ours that is older than itself. Nobody is
        // asked, for the reasons in `exactly_once`. One that still has something of ours was not made anew:
        // it is an older state of itself, and what is missing from it was in no stream that anybody deleted.
        if used <= GRANTS_USED_MAX
            && let sink::error::Error::StreamRecreated { tail, .. } = &error
            && routed.is_some()
            && reached.max(read_from) > 0
            && grants.lost_records != Some(LostRecords::Skip)
            && !holds_any(&client, *tail, |record| ours(record, &pipeline_id).is_some()).await?
        {
            tracing::warn!(
                stream = routed.as_deref(),
                read_from,
                tail,
                "the stream was deleted and made anew, and what was in it is gone: it is begun anew \
                 with what is beyond the checkpoint, also where the deleted one had it already"
            );
            (read_from, reached) = (0, 0);
            row_is_due = true;
            continue;
        }
        match (&error, grants.lost_records) {
            _ if used > GRANTS_USED_MAX => {}
            (sink::error::Error::Fenced { place, actual }, _) => {
                let owner = Owner::of(actual, &pipeline_id);
                if !grants.covers(owner) {
                    return Err(Error::Owned { text: refusal(place, actual, &pipeline_id) });
                }
                tracing::warn!(token = actual, "the stream is taken over, as was granted");
                previous.insert(0, actual.clone());
                continue;
            }
            (sink::error::Error::StreamTrimmed { first: from, .. }, Some(choice))
            | (sink::error::Error::StreamRecreated { tail: from, .. }, Some(choice)) => {
                tracing::warn!(
                    stream = routed.as_deref(),
                    read_from,
                    reached,
                    from,
                    ?choice,
                    "records after the checkpoint are gone"
                );
                let is_older = matches!(error, sink::error::Error::StreamRecreated { .. });
                // What is left of an older state is read, as far as it would be sent again.
                read_from = if is_older { read_from.min(*from) } else { *from };
                reached = 0;
                // In a stream that was closed nothing was in doubt.
                lost = (!is_settled).then_some(Lost { choice, behind: *from });
                continue;
            }
            _ => {}
        }
        return Err(error.into());
    }
}

/// Before the first session of a store, nothing of it is in the stream: reading begins at the end. The
/// store has to know that before anything is sent: of the pipeline's own stream here, of a routed one
/// once it is open.
async fn first_read_from(
    client: &Client,
    store: Option<&Store>,
    least: Guarantee,
) -> Result<u64, Error> {
    let seq = match client.tail().await {
        Ok(tail) => tail.next_seq,
        Err(error)
            if (error.is_stream_missing() || error.is_basin_missing())
                && client.settings().create =>
        {
            0
        }
        // The token may only append: nothing will be read.
        Err(error) if error.is_forbidden() && !least.has_numbers() => 0,
        Err(error) => return Err(error.into()),
    };
    if let Some(store) = store
        && !mutation::broken(Rule::BeginBeforeSending)
    {
        store.write(vec![Write::Begin { seq }].into()).await?;
    }
    Ok(seq)
}

/// The position of the change that a record of this pipeline carries.
fn ours(record: &ReadRecord, pipeline_id: &str) -> Option<Position> {
    if record.header(header::PIPELINE)? != pipeline_id.as_bytes() {
        return None;
    }
    let key = base64::engine::general_purpose::STANDARD.decode(record.header(header::KEY)?).ok()?;
    let (commit_lsn, index) = std::str::from_utf8(&key).ok()?.split_once(':')?;
    Some(Position { commit_lsn: Lsn(commit_lsn.parse().ok()?), index: index.parse().ok()? })
}

/// Which part of how many a record is.
fn part(record: &ReadRecord) -> Option<(u64, u64)> {
    let (index, count) = std::str::from_utf8(record.header(header::PART)?).ok()?.split_once('/')?;
    Some((index.parse().ok()?, count.parse().ok()?))
}

impl Line {
    /// A line of a test, on which nothing goes.
    #[cfg(test)]
    pub(super) fn silent(client: &Client) -> Self {
        let guarantee = Guarantee::ExactlyOnce;
        Self { session: Session::open(client), next_seq: None, fencing_token: None, guarantee }
    }

    /// The token that the stream has now, if it is fenced.
    #[must_use]
    pub fn fencing_token(&self) -> Option<&str> {
        self.fencing_token.as_deref()
    }

    /// Sends a batch. Its acknowledgement, or why the line broke, comes out of [`Self::next_ack`].
    ///
    /// # Errors
    ///
    /// When the batch is not one that S2 could take, which is a defect.
    pub fn send(&mut self, records: &[&SizedRecord]) -> Result<(), crate::sink::error::Error> {
        self.session.send(Append {
            records,
            match_seq_num: self.next_seq,
            fencing_token: self.fencing_token.as_deref(),
        })?;
        self.next_seq = self.next_seq.map(|seq| seq + records.len() as u64);
        Ok(())
    }

    /// The next acknowledgement, in the order of the batches. Cancel-safe.
    ///
    /// # Errors
    ///
    /// When the line is broken; open another.
    pub async fn next_ack(&mut self) -> Result<Ack, crate::sink::error::Error> {
        self.session.next_ack().await
    }
}
