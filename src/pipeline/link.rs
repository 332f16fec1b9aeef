//! The pipeline's line to S2: opening it so that exactly once holds, and what was found in the stream.
//!
//! Each opening fences the stream with a token that was never used before, guarded by this store's
//! earlier ones, and reads the stream from the last acknowledged record to the fence. After that
//! nothing of an earlier session can land, and it is known what has.
//!
//! Why both guards, and why this is enough: a batch of an earlier session carries an older token, so S2
//! refuses it once the fence is in; whatever it took before the fence lies in front of it, where it is
//! read. A batch of this session carries the number that its first record must get, so nothing that
//! somebody else appends in between can shift it unnoticed.

use std::collections::HashMap;

use base64::Engine as _;

use super::size_gate::SizedRecord;
use crate::change::{Lsn, Position};
use crate::message::header;
use crate::sink::client::{Client, Mode};
use crate::sink::open::{Guarantee, Opened, open};
use crate::sink::read::ReadRecord;
use crate::sink::session::{Ack, Append, Session};
use crate::store::{Checkpoint, Store, Write};

/// How many of this store's earlier tokens are recognised. One is drawn at each start and after each
/// session, so that this is years of them.
const TOKENS_KNOWN: u64 = 10_000;

/// Why the line could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Sink(#[from] crate::sink::error::Error),
    #[error(transparent)]
    Store(#[from] crate::store::Error),
}

/// What opening needs to know.
#[derive(Clone, Debug)]
pub struct Opening {
    pub client: Client,
    pub store: Store,
    pub pipeline_id: String,
    /// The number after the last acknowledged record; nothing before the first session of this store.
    pub read_from: Option<u64>,
    /// Drawn for this opening; the same one may be tried again after a failure.
    pub epoch: u64,
}

/// An open line.
#[derive(Debug)]
pub struct Line {
    session: Session,
    /// The number that the next record gets, where the token lets us know.
    next_seq: Option<u64>,
    fencing_token: Option<String>,
    pub guarantee: Guarantee,
}

/// An open line, and what of ours the stream holds from where it was read.
#[derive(Debug)]
pub struct Established {
    pub line: Line,
    /// The first record of each change of this pipeline, by the change's position.
    pub landed: HashMap<Position, u64>,
    /// Where reading began.
    pub read_from: u64,
}

/// Opens the line.
///
/// # Errors
///
/// What S2 or the store said.
pub async fn establish(opening: Opening) -> Result<Established, Error> {
    let Opening { client, store, pipeline_id, read_from, epoch } = opening;
    if client.settings().mode == Mode::Discard {
        let line = Line {
            session: Session::open(&client),
            next_seq: Some(read_from.unwrap_or_default()),
            fencing_token: None,
            guarantee: Guarantee::AtLeastOnce,
        };
        let read_from = read_from.unwrap_or_default();
        return Ok(Established { line, landed: HashMap::new(), read_from });
    }
    let read_from = match read_from {
        Some(read_from) => read_from,
        None => first_read_from(&client, &store).await?,
    };
    let token = |epoch: u64| format!("sb-{pipeline_id}-{epoch}");
    // The token of this opening is among the known ones: an earlier try of it may have landed
    // without an answer.
    let known: Vec<String> =
        (epoch.saturating_sub(TOKENS_KNOWN)..=epoch).rev().filter(|n| *n > 0).map(token).collect();
    // The one that is most likely in force comes first.
    let previous: Vec<String> = known.iter().skip(1).chain(known.first()).cloned().collect();
    let mut landed = HashMap::new();
    let on_record = |record: ReadRecord| {
        if let Some(position) = ours(&record, &pipeline_id) {
            landed.entry(position).or_insert(record.seq);
        }
    };
    let Opened { next_seq, fencing_token, guarantee, session } =
        Box::pin(open(&client, &previous, &token(epoch), read_from, on_record)).await?;
    Ok(Established {
        line: Line { session, next_seq, fencing_token, guarantee },
        landed,
        read_from,
    })
}

/// Before the first session of a store, nothing of it is in the stream: reading begins at the end. The
/// store has to know that before anything is sent.
async fn first_read_from(client: &Client, store: &Store) -> Result<u64, Error> {
    let seq = match client.tail().await {
        Ok(tail) => tail.next_seq,
        Err(error)
            if (error.is_stream_missing() || error.is_basin_missing())
                && client.settings().create =>
        {
            0
        }
        // The token may only append: nothing will be read.
        Err(error) if error.is_forbidden() => 0,
        Err(error) => return Err(error.into()),
    };
    let checkpoint = Checkpoint { seq, ..Checkpoint::default() };
    store.write(vec![Write::Checkpoint(checkpoint)].into()).await?;
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

impl Line {
    /// The number that the next record gets, where the access token lets us know.
    #[must_use]
    pub fn next_seq(&self) -> Option<u64> {
        self.next_seq
    }

    /// Sends a batch. Its acknowledgement, or why the line broke, comes out of [`Self::next_ack`].
    ///
    /// # Errors
    ///
    /// When the batch is not one that S2 could take, which is a defect.
    pub fn send(&mut self, records: &[SizedRecord]) -> Result<(), crate::sink::error::Error> {
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
