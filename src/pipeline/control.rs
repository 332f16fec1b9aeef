//! What the console and the commands ask of a running pipeline, and the shapes of the answers.
//!
//! The field names are those that scripts rely on: fields may be added, not renamed.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::heartbeat::Heart;
use crate::case::Case;

/// Where a message is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// On its way to S2 at this moment.
    Delivering,
    /// Failed, and tried again by itself at `next_attempt_at`.
    Retrying,
    /// Failed, and tried again when the chain changes, or by hand.
    Parked,
    /// Behind a failed message of its group.
    Waiting,
    /// It has left the store as a dead letter.
    Dead,
}

/// Which messages a request means. Every field that is set narrows the choice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    pub id: Option<u64>,
    /// A state's word, or `failed`: parked and retrying. Of `dead` ones the newest thousand are listed.
    pub state: Option<String>,
    /// `schema.name`, or a bare name in any schema.
    pub table: Option<String>,
    /// Of the last failure, as in [`ErrorView::class`].
    pub class: Option<String>,
    /// The file name of the transform that failed it last.
    pub transform: Option<String>,
}

/// A page of messages, oldest first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MessageList {
    pub messages: Vec<MessageView>,
    /// What to pass as `after` for the next page, or nothing on the last one.
    pub next: Option<String>,
    /// All that the filter matches, on every page.
    pub total: u64,
}

/// A message in the store as an operator sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MessageView {
    pub id: String,
    pub state: State,
    /// `schema.name`.
    pub table: String,
    /// The primary key's columns, shown because an operator asked for this list.
    pub key: serde_json::Value,
    pub action: String,
    pub commit_lsn: u64,
    pub commit_idx: u64,
    pub error: Option<ErrorView>,
    /// Metered bytes of the record, where it was measured.
    pub bytes: Option<u64>,
    pub bytes_max: u64,
    /// The largest columns first, where it was measured.
    pub columns: Vec<ColumnBytes>,
    pub attempts: u64,
    /// RFC 3339, where the next attempt has a time.
    pub next_attempt_at: Option<String>,
    /// RFC 3339, when the store took it.
    pub stored_at: String,
    /// The id of the message that holds this one back.
    pub behind: Option<String>,
}

/// Why a message failed last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorView {
    /// `oversize`, `refused`, `route`, `trap`, `timeout`, `limit`, `guest`, `invalid` or `encode`.
    pub class: String,
    /// S2's HTTP status, where S2 refused it.
    pub status: Option<u16>,
    /// Names the table, sizes, limit and columns; never a row's value.
    pub text: String,
    /// S2's answer, where S2 refused it.
    pub body: Option<String>,
    /// The file name of the transform that failed it.
    pub transform: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnBytes {
    pub name: String,
    pub bytes: u64,
}

/// One message with everything that is known of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MessageDetail {
    #[serde(flatten)]
    pub message: MessageView,
    /// The message as JSON, before any transform; cut at 64 KiB.
    pub payload: String,
    pub payload_cut: bool,
    /// What each transform of the last attempt did.
    pub trace: Vec<TraceStep>,
    /// What an operator can do about it, as one sentence with a command.
    pub hint: String,
    /// How many messages of its groups are in the store behind it, and follow once it is through or
    /// given up.
    #[serde(default)]
    pub holds: u64,
}

/// What one transform did to a message at its last attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceStep {
    /// File name in the transforms folder.
    pub transform: String,
    /// SHA-256 of the module, hexadecimal.
    pub digest: String,
    /// `keep`, `drop`, `split`, or the class of its failure.
    pub verdict: String,
    pub micros: u64,
    /// Metered bytes after it, where the message was measured.
    pub bytes: Option<u64>,
    /// The guest's stack, innermost first, where it trapped.
    pub backtrace: Vec<String>,
    /// The guest's last log lines for this message.
    pub logs: Vec<String>,
}

/// What the process is doing, for `/readyz` and `/api/v1/status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub ready: bool,
    pub reasons: Vec<Reason>,
    /// `exactly once`, or what the access token allows.
    pub guarantee: String,
    /// The S2 server, as the pipeline reaches it.
    pub endpoint: String,
    pub pipeline_id: String,
    pub chain: String,
    pub changes: u64,
    pub records: u64,
    pub record_bytes: u64,
    pub dropped: u64,
    pub parked: u64,
    pub retrying: u64,
    pub waiting: u64,
    /// Postgres's end of WAL as last heard, what we confirmed, and the bytes between.
    pub wal_end: Option<String>,
    pub confirmed: Option<String>,
    pub lag_bytes: Option<u64>,
    /// S2's next sequence number as we know it.
    pub stream_tail: Option<u64>,
    /// Streams that transforms route messages to, as far as they are in use: those in trouble first, a
    /// hundred at most.
    pub streams: Vec<StreamView>,
    /// Changes that wait on disk because S2 is away, or was.
    pub spilled_changes: u64,
    pub spilled_bytes: u64,
    /// What the store holds, and may hold.
    pub store_bytes: u64,
    pub store_bytes_max: u64,
    /// How much WAL Postgres keeps for the slot, asked every few seconds.
    pub wal_kept_bytes: Option<u64>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// How many bytes may still be written before Postgres may drop the slot, where that is limited.
    pub wal_safe_bytes: Option<i64>,
    /// Why so much of it is kept, where it is more than a segment.
    pub wal_kept_by: Option<KeeperView>,
    /// How long the oldest transaction that has written has been open, where that is what keeps WAL.
    pub oldest_transaction_seconds: Option<u64>,
    /// What works and may stop working, one sentence each with its mend.
    pub warnings: Vec<String>,
    /// Nothing where messages are tried for ever.
    pub dead_letters: Option<DeadLettersView>,
    /// Parts that get nothing done although they have something to do. Each is among the reasons, too.
    pub stuck: Vec<StuckView>,
    /// Sessions with S2 and connections to Postgres that this process opened, the first included.
    pub sink_sessions: u64,
    pub source_connections: u64,
    /// For `/metrics`.
    #[serde(skip)]
    pub measures: super::measures::Measures,
}

/// Where messages go whose attempts are spent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLettersView {
    /// `stream NAME` or `file PATH`.
    pub place: String,
    /// How many went there, or to places before it, since the store was made.
    pub written: u64,
    /// Messages whose attempts are spent and which are not there yet.
    pub waiting: u64,
    /// Why they are not.
    pub reason: Option<String>,
}

/// What keeps WAL in Postgres.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperView {
    /// One of [`wal::CODES`](super::wal::CODES).
    pub code: String,
    /// What it is, and what mends it.
    pub text: String,
}

/// A part of the pipeline that stands still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StuckView {
    /// `source`, `transform`, `sink`, `store` or `pipeline`; or `driver`, the task that owns them all.
    pub part: String,
    /// How long it had work without getting any done; trouble that has a name of its own not counted.
    pub seconds: u64,
}

/// A stream that transforms route messages to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamView {
    pub name: String,
    /// `open`; `opening`; `waiting`: in trouble that is S2's as a whole; `shut`: in trouble of its own,
    /// so that what is bound for it parks; `idle`.
    pub state: String,
    pub reason: Option<Reason>,
    /// Ready for it or on its way there.
    pub queued: u64,
    /// Metered.
    pub queued_bytes: u64,
    /// Parked because of it.
    pub parked: u64,
    /// Its next sequence number as we know it.
    pub tail: Option<u64>,
}

/// Why the process is not ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// `source`, `sink`, `transforms`, `store`, or a part of [`StuckView`].
    pub part: String,
    /// `sink_401`, `source_unreachable`, `stuck_sink`, …
    pub code: String,
    pub text: String,
}

/// How many messages a request changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    pub changed: u64,
    /// Waiting updates whose unchanged TOAST columns refer to a message that was acknowledged.
    pub unchanged_behind: u64,
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "there is no message {id} in the store: it was delivered or acknowledged, or it became a dead \
         letter"
    )]
    NotFound { id: u64 },
    /// Messages are numbered from 1, and `last` is the newest that there ever was.
    #[error("{}", never_stored(*id, *last))]
    NeverStored { id: u64, last: u64 },
    #[error("{text}")]
    Invalid { text: String },
    #[error("message {id} is on its way to S2 at this moment; try again")]
    Busy { id: u64 },
    #[error(
        "message {id} may be in a stream already, which is known once that has been read; it cannot be \
         at this moment (`sluicebox check` says why): try again when it can"
    )]
    Unread { id: u64 },
    #[error("the pipeline has stopped")]
    Stopped,
    #[error("could not read the message store")]
    Store(#[source] Box<dyn std::error::Error + Send + Sync>),
}

fn never_stored(id: u64, last: u64) -> String {
    match last {
        0 => format!("this store has never had a message {id}, nor any other"),
        1 => format!("this store has never had a message {id}: the only one was number 1"),
        _ => format!("this store has never had a message {id}: their numbers were 1 to {last}"),
    }
}

/// Where and how to go on listing.
#[derive(Clone, Debug, Default)]
pub struct PageQuery {
    pub filter: Filter,
    pub after: Option<u64>,
    /// At most 1,000.
    pub limit: usize,
}

/// A request to the task that owns the pipeline.
#[derive(Debug)]
pub enum Request {
    List(PageQuery, oneshot::Sender<Result<MessageList, Error>>),
    Show(u64, oneshot::Sender<Result<MessageDetail, Error>>),
    Export(u64, oneshot::Sender<Result<Box<Case>, Error>>),
    Retry(Filter, oneshot::Sender<Result<Changed, Error>>),
    Acknowledge(Filter, oneshot::Sender<Result<Changed, Error>>),
}

/// The handle through which everything outside talks to a running pipeline.
#[derive(Clone, Debug)]
pub struct Control {
    requests: mpsc::Sender<Request>,
    status: tokio::sync::watch::Receiver<Status>,
    heart: Heart,
}

impl Control {
    pub(crate) fn new(
        requests: mpsc::Sender<Request>,
        status: tokio::sync::watch::Receiver<Status>,
        heart: Heart,
    ) -> Self {
        Self { requests, status, heart }
    }

    /// What the pipeline last published of itself, and whether it still does.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut status = self.status.borrow().clone();
        self.heart.look_at(&mut status);
        status
    }

    /// For how long the task that owns the pipeline has stood still, where that is too long.
    #[must_use]
    pub fn stalled(&self) -> Option<Duration> {
        self.heart.stalled()
    }

    /// Waits until the pipeline has published something new.
    ///
    /// # Errors
    ///
    /// When the pipeline has stopped.
    pub async fn status_changed(&mut self) -> Result<Status, Error> {
        self.status.changed().await.map_err(|_| Error::Stopped)?;
        drop(self.status.borrow_and_update());
        Ok(self.status())
    }

    /// Messages in the store, a page at a time.
    ///
    /// # Errors
    ///
    /// When a filter's word means nothing, the store cannot be read or the pipeline has stopped.
    pub async fn list(&self, query: PageQuery) -> Result<MessageList, Error> {
        self.ask(|answer| Request::List(query, answer)).await
    }

    /// One message whole.
    ///
    /// # Errors
    ///
    /// As [`Self::list`], and when there is no such message.
    pub async fn show(&self, id: u64) -> Result<MessageDetail, Error> {
        self.ask(|answer| Request::Show(id, answer)).await
    }

    /// One message with its change and the live chain, to be replayed elsewhere.
    ///
    /// # Errors
    ///
    /// As [`Self::show`].
    pub async fn export(&self, id: u64) -> Result<Box<Case>, Error> {
        self.ask(|answer| Request::Export(id, answer)).await
    }

    /// Tries the messages again at once.
    ///
    /// # Errors
    ///
    /// As [`Self::show`].
    pub async fn retry(&self, filter: Filter) -> Result<Changed, Error> {
        self.ask(|answer| Request::Retry(filter, answer)).await
    }

    /// Gives the messages up: they are removed and never delivered.
    ///
    /// # Errors
    ///
    /// As [`Self::show`].
    pub async fn acknowledge(&self, filter: Filter) -> Result<Changed, Error> {
        self.ask(|answer| Request::Acknowledge(filter, answer)).await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(request(answer)).await.map_err(|_| Error::Stopped)?;
        answered.await.map_err(|_| Error::Stopped)?
    }
}
