//! Taking a stream over so that nothing is doubled: the opening of a session.
//!
//! ```text
//! tail T ─▶ is everything since `read_from` still there? ─▶ fence at T, with a fresh token,
//!   ▲                                                        if the stream still has ours
//!   └───────────── the number was not T: a late batch landed ──┘
//! fence landed at F ─▶ read [read_from, F) ─▶ send from F + 1, each batch with number and token
//! ```
//!
//! Both guards are needed. A batch of an earlier session that is still on its way may find its
//! number free: its token is no longer the stream's. A foreign writer without a token is caught by
//! the number.
//!
//! Never waits and never tries again after a failure; the caller does, with a fresh token and with
//! every token it ever tried, because a fence may have landed although its answer was lost.

use super::{
    client::{Client, ReadFrom, Tail},
    error::{Error, Operation},
    read::ReadRecord,
    session::Session,
};

use crate::mutation::{self, Rule};

/// The longest fencing token that S2 takes (`common/src/caps.rs` of s2-streamstore/s2).
pub const FENCING_TOKEN_BYTES_MAX: usize = 36;

/// After so many numbers that were taken meanwhile, somebody else appends all the time, and the fence
/// goes by the token alone.
const SEQ_MISMATCHES_MAX: usize = 8;
/// How often the stream may turn out to have another token of ours than the one guessed: each time it
/// names the right one, so that only a race between two of our own processes goes on.
const TOKEN_MISMATCHES_MAX: usize = 4;

/// What the stream and the token let us promise, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Guarantee {
    AtLeastOnce,
    /// Each batch carries its number, and nothing keeps a second writer out.
    NumbersOnly,
    ExactlyOnce,
}

impl Guarantee {
    /// Every one, the least first.
    pub const ALL: [Self; 3] = [Self::AtLeastOnce, Self::NumbersOnly, Self::ExactlyOnce];

    /// The word in settings, in the store and in metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::ExactlyOnce => "exactly-once",
            Self::NumbersOnly => "numbers",
            Self::AtLeastOnce => "at-least-once",
        }
    }

    /// What a [word](Self::word) means.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|guarantee| guarantee.word() == word)
    }

    /// For an operator: what is guaranteed, and what would make it more.
    #[must_use]
    pub fn sentence(self) -> &'static str {
        match self {
            Self::ExactlyOnce => {
                "exactly once: each change is in the stream once, also after crashes"
            }
            Self::NumbersOnly => {
                "exactly once as long as nothing of an earlier run is still on its way when this one \
                 starts: records are numbered but the stream is not fenced; allow the access token \
                 `fence`, and leave `sink.fencing` on, for exactly once"
            }
            Self::AtLeastOnce => {
                "at least once: after a crash or a lost connection some changes are in the stream \
                 twice, with the same `sb-key`; allow the access token `check-tail`, `read` and \
                 `fence` beside `append` for exactly once"
            }
        }
    }

    /// Whether each batch has to carry the number of its first record.
    #[must_use]
    pub fn has_numbers(self) -> bool {
        self != Self::AtLeastOnce
    }
}

impl std::fmt::Display for Guarantee {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.sentence())
    }
}

/// What is known of a stream before it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// What is before this number need not be read.
    pub read_from: u64,
    /// It had a record before this number.
    pub reached: u64,
}

impl From<u64> for Known {
    fn from(read_from: u64) -> Self {
        Self { read_from, reached: read_from }
    }
}

/// A stream that is ours to append to.
#[derive(Debug)]
pub struct Opened {
    /// The number of the next record: what the first batch's `match_seq_num` has to be. Nothing where
    /// numbers are not to be used.
    ///
    /// Once what was read is applied to the store, this may become the number to read from next
    /// time: nothing before it is unknown.
    pub next_seq: Option<u64>,
    /// What every batch has to carry as its token. Nothing where the stream is not fenced.
    pub fencing_token: Option<String>,
    pub guarantee: Guarantee,
    pub session: Session,
}

/// Takes the stream over.
///
/// `previous` are the tokens that this store has ever tried, newest first; `next_token` is a fresh
/// one, at most [`FENCING_TOKEN_BYTES_MAX`] bytes, that must be in the store before this is called.
/// `on_record` gets every data record from `read_from` to the fence, in order, whoever wrote it. Where
/// the stream has `reached` a number behind that, it has to do so still.
///
/// Where the access token may do less than all of this, less is guaranteed, but never less than
/// `least`: what was promised when the last batches were sent has to be kept to find out what became
/// of them, and a 403 may pass.
///
/// # Errors
///
/// As every operation, and
/// - [`Error::Fenced`]: the stream's token is none of `previous`. Another writer has it: stand down.
/// - [`Error::StreamRecreated`]: the stream ends before what it had reached.
/// - [`Error::StreamTrimmed`]: what is in the stream since `read_from` cannot be known.
/// - [`Error::SeqMismatch`] does not come out of this.
pub async fn open(
    client: &Client,
    previous: &[String],
    next_token: &str,
    Known { read_from, reached }: Known,
    least: Guarantee,
    mut on_record: impl FnMut(ReadRecord),
) -> Result<Opened, Error> {
    if next_token.is_empty() || next_token.len() > FENCING_TOKEN_BYTES_MAX {
        return Err(Error::Settings {
            text: format!(
                "a fencing token has 1 to {FENCING_TOKEN_BYTES_MAX} bytes, and this one has {}",
                next_token.len()
            ),
        });
    }
    let reached = if mutation::broken(Rule::NoticeOlderState) { 0 } else { reached };
    let reached = reached.max(read_from);
    let tail = match survey(client, read_from, reached).await {
        Ok(tail) => tail,
        // The token may append and no more: nothing can be found out, so nothing is guarded.
        Err(error)
            if !least.has_numbers()
                && (error.is_forbidden_to(Operation::Tail)
                    || error.is_forbidden_to(Operation::Read)) =>
        {
            return Ok(Opened {
                next_seq: None,
                fencing_token: None,
                guarantee: Guarantee::AtLeastOnce,
                session: Session::open(client),
            });
        }
        Err(error) => return Err(error),
    };

    let fenced = if client.settings().fencing && !mutation::broken(Rule::Fence) {
        match fence(client, previous, next_token, reached, tail).await {
            Err(error)
                if least != Guarantee::ExactlyOnce && error.is_forbidden_to(Operation::Fence) =>
            {
                None
            }
            result => Some(result?),
        }
    } else {
        None
    };
    let end = fenced.unwrap_or(tail.next_seq);
    if !mutation::broken(Rule::ReadTheEnd) {
        read_back(client, read_from, end, &mut on_record).await?;
    }
    let (next_seq, fencing_token, guarantee) = match fenced {
        Some(fence) => (fence + 1, Some(next_token.to_owned()), Guarantee::ExactlyOnce),
        None => (end, None, Guarantee::NumbersOnly),
    };
    Ok(Opened {
        next_seq: Some(next_seq),
        fencing_token,
        guarantee,
        session: Session::open(client),
    })
}

/// Finds the stream's end, creates the stream where that is wanted, and makes sure that everything
/// since `read_from` can be read. Done before the fence, so that a refusal leaves no trace.
async fn survey(client: &Client, read_from: u64, reached: u64) -> Result<Tail, Error> {
    let missing = |error: &Error| error.is_stream_missing() || error.is_basin_missing();
    let tail = match client.tail().await {
        Err(error) if missing(&error) && client.settings().create => {
            // The answer may be of something in front of S2, and pass. What was written to may be gone,
            // too: then it is made anew, and its end says so below, before anything is sent.
            client.create_missing().await?;
            client.tail().await?
        }
        other => other?,
    };
    if tail.next_seq < reached {
        return Err(recreated(client, reached, tail.next_seq));
    }
    if read_from == tail.next_seq {
        // At the tail too, to learn now whether the token may read.
        client.read(ReadFrom::Seq(read_from), 1, std::time::Duration::ZERO).await?;
        return Ok(tail);
    }
    match client.read_below_tail(read_from, 1).await?.records.first() {
        Some(first) if first.seq == read_from => Ok(tail),
        Some(first) => Err(trimmed(client, read_from, first.seq)),
        None => Err(trimmed(client, read_from, tail.next_seq)),
    }
}

/// Sets the token, and returns the number of the record that did it.
async fn fence(
    client: &Client,
    previous: &[String],
    next_token: &str,
    reached: u64,
    mut tail: Tail,
) -> Result<u64, Error> {
    let mut guard = previous.first().map_or("", String::as_str).to_owned();
    let mut seq_mismatches = 0;
    let mut token_mismatches = 0;
    loop {
        let number = (seq_mismatches < SEQ_MISMATCHES_MAX).then_some(tail.next_seq);
        match client.fence(next_token, tail.timestamp_ms, number, &guard).await {
            Ok(ack) => {
                let seq = ack.start.unwrap_or_default().seq_num;
                if number.is_some_and(|number| number != seq) {
                    return Err(Error::Protocol {
                        place: client.place().clone(),
                        operation: Operation::Fence,
                        what: format!("it put a record for {number:?} at {seq}"),
                        source: None,
                    });
                }
                return Ok(seq);
            }
            // A batch of an earlier session landed meanwhile, or somebody else appends.
            Err(Error::SeqMismatch { .. }) => {
                seq_mismatches += 1;
                tail = client.tail().await?;
                if tail.next_seq < reached {
                    return Err(recreated(client, reached, tail.next_seq));
                }
            }
            // Another token of ours: its fence landed although we never heard so. Or none at all:
            // the fence that should have set the one we know never landed.
            Err(Error::Fenced { actual, .. })
                if token_mismatches < TOKEN_MISMATCHES_MAX
                    && (actual.is_empty()
                        || previous.contains(&actual)
                        || mutation::broken(Rule::StandDown)) =>
            {
                token_mismatches += 1;
                guard = actual;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn read_back(
    client: &Client,
    read_from: u64,
    end: u64,
    on_record: &mut impl FnMut(ReadRecord),
) -> Result<(), Error> {
    let mut reader = client.read_range(read_from, end);
    let mut next = read_from;
    while let Some(records) = reader.next().await? {
        for record in records {
            if record.seq != next {
                return Err(trimmed(client, next, record.seq));
            }
            next += 1;
            if !record.is_command() {
                on_record(record);
            }
        }
    }
    if next < end { Err(trimmed(client, next, end)) } else { Ok(()) }
}

/// Whether one of the records that are there, before this number, is such a record.
///
/// # Errors
///
/// As [`Client::read`].
pub async fn holds_any(
    client: &Client,
    end: u64,
    is_such: impl Fn(&ReadRecord) -> bool,
) -> Result<bool, Error> {
    let mut reader = client.read_range(0, end);
    while let Some(records) = reader.next().await? {
        if records.iter().any(&is_such) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn recreated(client: &Client, reached: u64, tail: u64) -> Error {
    Error::StreamRecreated { place: client.place().clone(), reached, tail }
}

fn trimmed(client: &Client, read_from: u64, first: u64) -> Error {
    Error::StreamTrimmed { place: client.place().clone(), read_from, first }
}
