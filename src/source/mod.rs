//! Postgres: the replication connection, the slot, the publication and the catalogue.
//!
//! Nothing else speaks to Postgres. One task reads the slot and hands over batches of changes, in
//! order and each once for the life of the process: after a reconnect Postgres repeats what was not
//! confirmed yet, and the repetition is left out here. Nothing is confirmed here by itself: what
//! the owner publishes on [`Source::confirm`] is what Postgres is told it may forget.
//!
//! ```text
//! Connecting ──► Streaming ──► (lost) ──► Waiting ──► Connecting …
//!     │              │                       ▲
//!     └── unmet ─────┼───────────────────────┘   heals by itself once it is mended
//!                    └──► Fatal                  going on would lose changes
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `dsn`, `tls`, `socket` | where Postgres is, and the way there |
//! | `frame`, `transport` | the replication protocol |
//! | `sql`, `catalog`, `preflight` | questions to Postgres |
//! | `inspect` | tables as they are at one moment, for comparisons |
//! | `seen`, `reader` | what was read already; the task |
//! | `error` | what went wrong, and whether waiting helps |

mod catalog;
mod dsn;
mod error;
mod frame;
mod inspect;
mod preflight;
mod reader;
pub(crate) mod seen;
mod socket;
mod sql;
mod tls;
mod transport;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::change::{Change, Lsn, Position};
use crate::group_by::GroupBys;
use crate::pipeline::budget::ByteBudget;
use crate::store::Loaded;
use crate::table_name::TableName;

pub use dsn::{Dsn, DsnError, Endpoint, RootCert, Ssl, SslMode};
pub use error::{Error, ServerError, Trouble};
pub use inspect::{Inspector, Published, Rows};
pub use preflight::{Finding, OpenTransaction, SlotHealth, check, is_slot_name};
pub use transport::Identity;

/// What our connections are called in `pg_stat_activity`.
pub const APPLICATION_NAME: &str = "sluicebox";

/// How long [`Source::finish`] waits for the last status update to be taken.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// What to read.
#[derive(Clone, Debug)]
pub struct Settings {
    pub dsn: Dsn,
    /// See [`is_slot_name`].
    pub slot: String,
    pub publication: String,
    /// Changes of other tables that the publication holds are left out. Not empty.
    pub tables: Vec<TableName>,
    /// Of some of these tables.
    pub group_by: GroupBys,
}

/// Where an earlier run of the pipeline stopped.
#[derive(Clone, Debug, Default)]
pub struct Resume {
    /// Changes up to here are settled: they are read and left out.
    pub skip_through: Option<Position>,
    /// The durable mark: at least what was ever confirmed to Postgres. A slot that was confirmed
    /// further has forgotten changes that this pipeline never saw, and then nothing starts. With a
    /// cursor, a slot that is missing is not made anew.
    pub cursor: Option<Lsn>,
    /// Of the cluster that the earlier run read; another one is refused.
    pub system_identifier: Option<String>,
    /// The publication that the earlier run read; one of the same name that was made anew is refused.
    pub publication: Option<PublicationId>,
    /// End the connection of another Sluicebox that still has the slot, once.
    pub take_over: bool,
    /// Once, a slot is taken as it is found, and one that is missing is made in spite of the cursor: what
    /// was changed in between is given up.
    pub lost_changes: bool,
}

impl From<&Loaded> for Resume {
    fn from(loaded: &Loaded) -> Self {
        let checkpoint = loaded.checkpoint;
        Self {
            skip_through: checkpoint.map(|_| loaded.read_through()),
            // Nothing was confirmed yet, so nothing can be missing.
            cursor: checkpoint.map(|checkpoint| checkpoint.confirm).filter(|lsn| *lsn > Lsn(0)),
            system_identifier: loaded.source_identity.clone(),
            publication: loaded.publication.clone(),
            take_over: false,
            lost_changes: false,
        }
    }
}

/// Tells a publication from another one of its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicationId {
    pub name: String,
    pub oid: u32,
}

/// What comes out of the slot, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Change(Change),
    /// A transaction is complete. Once all changes before it are settled, `end_lsn` may be
    /// confirmed.
    Commit {
        end_lsn: Lsn,
    },
    /// Everything up to `wal_end` has been delivered before this; may be confirmed likewise. Keeps
    /// an idle slot from holding WAL of other tables and databases.
    Idle {
        wal_end: Lsn,
    },
}

/// Items that travel together.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub items: Vec<Item>,
    /// The sum of [`Change::bytes`], which is what was taken from the budget for them.
    pub bytes: usize,
}

/// What the source is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Connecting,
    Streaming,
    /// Something has to heal; the next attempt is at `until`.
    Waiting {
        code: &'static str,
        text: String,
        until: SystemTime,
    },
    /// It does not go on: a new configuration or an operator's decision is needed. No more batches
    /// come.
    Fatal {
        code: &'static str,
        text: String,
    },
    /// It was told to stop, and has.
    Stopped,
}

/// What the source knows, published as it changes (numbers about once a second).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceStatus {
    pub state: State,
    /// The end of the server's WAL as last heard.
    pub wal_end: Lsn,
    /// Everything before this was handed over.
    pub received: Lsn,
    /// What Postgres was last told.
    pub confirmed: Lsn,
    /// Changes handed over by this process.
    pub changes: u64,
    /// Rises with whatever the replication connection brings that is new, wanted or not.
    pub moved: u64,
    /// Connections made by this process, the first included.
    pub connections: u64,
    /// This process has made the slot.
    pub made_slot: bool,
    /// Of the cluster, once it was asked.
    pub identity: Option<Identity>,
    /// What is read, once it was found or made.
    pub publication: Option<PublicationId>,
    /// Where the WAL ended once the slot was this process's: whoever had it before has read nothing that
    /// was committed later. Asked with each connection, as somebody may have had it in between.
    pub taken_at: Option<Lsn>,
    /// What the slot keeps, asked every few seconds.
    pub slot: Option<SlotHealth>,
    /// What works and may stop working, one sentence each with its mend.
    pub warnings: Vec<String>,
}

impl Default for SourceStatus {
    fn default() -> Self {
        Self {
            state: State::Connecting,
            wal_end: Lsn::default(),
            received: Lsn::default(),
            confirmed: Lsn::default(),
            changes: 0,
            moved: 0,
            connections: 0,
            made_slot: false,
            identity: None,
            publication: None,
            taken_at: None,
            slot: None,
            warnings: Vec::new(),
        }
    }
}

/// A running source.
#[derive(Debug)]
pub struct Source {
    /// Ends after shutdown, once everything that was read is handed over, and after
    /// [`State::Fatal`].
    pub batches: mpsc::Receiver<Batch>,
    /// Everything up to this is settled. It only ever rises; a lower value is ignored. It must be
    /// durable before it is sent here (see [`Resume::cursor`]).
    pub confirm: watch::Sender<Lsn>,
    pub status: watch::Receiver<SourceStatus>,
    /// Whatever is sent here ends the replication connection, if there is one, for the next.
    pub reconnect: watch::Sender<()>,
    /// Ends after [`Self::finish`], or after [`State::Fatal`].
    pub task: JoinHandle<()>,
}

impl Source {
    /// Ends the source after the shutdown token was cancelled and the batches are drained: tells
    /// Postgres the last confirmed LSN, ends the stream and closes the connection.
    pub async fn finish(self) {
        let Self { batches, confirm, status, reconnect, mut task } = self;
        // That both are gone is how the task knows that nobody confirms any more.
        drop((batches, confirm, status, reconnect));
        if tokio::time::timeout(FINISH_TIMEOUT, &mut task).await.is_err() {
            tracing::warn!("Postgres did not take the end of the stream in time");
            task.abort();
        }
    }
}

/// Starts reading. Before anything is read, `budget` is asked for room.
///
/// After `shutdown` no new data is read, but the connection is kept (and what is confirmed is sent)
/// until [`Source::finish`].
#[must_use]
pub fn start(
    settings: Settings,
    resume: Resume,
    budget: Arc<ByteBudget>,
    shutdown: &CancellationToken,
) -> Source {
    let (batches_in, batches) = mpsc::channel(reader::BATCHES_MAX);
    let (confirm, confirmed) = watch::channel(resume.cursor.unwrap_or_default());
    let (publish, status) = watch::channel(SourceStatus::default());
    let (reconnect, reconnects) = watch::channel(());
    let ends = reader::Ends { batches: batches_in, confirmed, reconnects, publish };
    let reader = reader::Reader::new(settings, resume, budget, ends, shutdown);
    let task = tokio::spawn(reader.run());
    Source { batches, confirm, status, reconnect, task }
}

/// `"name"`, with quotes in it doubled.
fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `'text'`, with quotes in it doubled.
fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting() {
        assert_eq!(quote_identifier("My\"Pub"), "\"My\"\"Pub\"");
        assert_eq!(quote_literal("it's"), "'it''s'");
    }
}
