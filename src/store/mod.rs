//! The message store: parked and waiting messages, the checkpoint, and a few facts, in one SQLite file
//! in the state folder.
//!
//! The fast path writes nothing per change: the store is written when a message is parked and when a
//! checkpoint is taken. Every write is one transaction that is on disk (synced) before it is answered,
//! so what the store holds survives a power loss, and may be confirmed to Postgres.
//!
//! One thread owns the file. It takes requests in order; the store never decides what to do with a
//! message.
//!
//! ```text
//! Store ── Task ──▶ its thread ──▶ Database     in the product
//!          Task ──▶ whoever made the handle     in the simulation: late, refused, or cut off by a crash
//! ```

mod checksum;
mod codec;
mod dead_letters;
pub mod given_up;
pub mod look;
mod owner;
mod parts;
mod schema;
mod spill;
mod view;

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::RngExt as _;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::oneshot;

use crate::change::{Change, Lsn, Position};
use crate::mutation::{self, Rule};
use crate::pipeline::control::{self, ColumnBytes, ErrorView, MessageList, PageQuery, TraceStep};
use crate::pipeline::group::{GroupId, Groups};
use crate::sink::Guarantee;
use crate::source::PublicationId;

pub use codec::{primary_key, primary_keys};
pub use dead_letters::LetterFile;
pub use parts::{KnownParts, Parts};
pub use spill::Chunk;

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not open the message store {}", path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error(
        "the state folder {} is in use by another sluicebox{}: stop it, or give this one a folder of \
         its own (state.dir); if that one is frozen, or was on another machine that is gone, start \
         once with `sluicebox run --take-over`",
        path.display(),
        pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
    )]
    Locked {
        path: PathBuf,
        /// Of whoever holds the lock, if it said so.
        pid: Option<u32>,
    },
    #[error(
        "another sluicebox stands still in the middle of a write to the message store: end it (kill \
         -9), or let it go on"
    )]
    Busy,
    #[error(
        "the message store was taken over by another sluicebox: this one has stopped and writes \
         nothing more"
    )]
    TakenOver,
    #[error(
        "the message store in the state folder is of a newer release (version {found}; this one knows \
         up to {known}) and is left as it is: go on with that release, or give this one an empty \
         state folder (state.dir)"
    )]
    Version { found: i64, known: i64 },
    #[error(
        "the message store, sluicebox.db in the state folder, is damaged ({text}), and nothing of it is \
         used. Put the folder back from a copy that was made after Sluicebox last ran; without one, \
         move it away (state.dir): what was parked there is lost then"
    )]
    Corrupt { text: String },
    #[error(
        "the disk that holds the message store (state.dir) is full: make room, and it goes on by itself"
    )]
    Full,
    #[error("the message store refused what it was given, which is a defect of Sluicebox")]
    Refused(#[source] rusqlite::Error),
    #[error("the message store failed")]
    Sqlite(#[source] rusqlite::Error),
    #[error("the message store holds something that this release cannot read: {text}")]
    Content { text: String },
    #[error("the message store has stopped")]
    Stopped,
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        // The statements are ours: a file that does not know their columns is not as it was made.
        if let rusqlite::Error::SqlInputError { msg, .. } = error {
            return Self::Corrupt { text: msg };
        }
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Corrupt { text: error.to_string() }
            }
            Some(
                ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::ApiMisuse,
            ) => Self::Refused(error),
            _ => Self::Sqlite(error),
        }
    }
}

impl Error {
    /// Whether the same request may succeed later without anybody losing anything.
    #[must_use]
    pub fn heals(&self) -> bool {
        match self {
            Self::Full | Self::Sqlite(_) => true,
            Self::Open { .. }
            | Self::Locked { .. }
            | Self::Busy
            | Self::TakenOver
            | Self::Version { .. }
            | Self::Corrupt { .. }
            | Self::Refused(_)
            | Self::Content { .. }
            | Self::Stopped => false,
        }
    }
}

/// How far a stream and the source are settled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// Every change at or below it is in the stream, in the store, dropped or given up.
    pub position: Position,
    /// The lowest sequence number whose acknowledgement is not applied to the store: where a restart
    /// begins to read the stream. Nothing before the stream was opened for the first time, when nothing
    /// of this store can be in it; as part of a [`Write`] it leaves the number as it is.
    pub seq: Option<u64>,
    /// The stream is known to have reached this number: one that ends before it is an older state of
    /// itself, or another one. As part of a [`Write`] it counts where there is a `seq`.
    pub reached: u64,
    /// What may be confirmed to Postgres.
    pub confirm: Lsn,
}

/// What is known of a stream that transforms have routed messages to, in which there may be records that
/// nobody has heard of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamRow {
    pub name: String,
    /// The number from which it has to be read.
    pub seq: u64,
    /// As in [`Checkpoint`].
    pub reached: u64,
}

/// Why a message failed, as the store keeps it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Failure {
    pub error: ErrorView,
    /// Metered bytes, where the record was measured.
    pub bytes: Option<u64>,
    /// The largest columns first, where the record was measured.
    pub columns: Vec<ColumnBytes>,
    pub trace: Vec<TraceStep>,
}

/// A message's state in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredState {
    Parked,
    Retrying,
    Waiting,
    /// Given up by an operator, or a dead letter; kept until the checkpoint has passed it, so that a repeat
    /// is known.
    Acknowledged,
}

impl StoredState {
    fn number(self) -> i64 {
        match self {
            Self::Parked => 0,
            Self::Retrying => 1,
            Self::Waiting => 2,
            Self::Acknowledged => 3,
        }
    }

    fn from_number(number: i64) -> Result<Self, Error> {
        match number {
            0 => Ok(Self::Parked),
            1 => Ok(Self::Retrying),
            2 => Ok(Self::Waiting),
            3 => Ok(Self::Acknowledged),
            _ => Err(Error::Content { text: format!("a message in state {number}") }),
        }
    }
}

/// How often a message was tried in vain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempts {
    pub all: u64,
    /// Those that failed for what the message itself is, and not for the trouble of a stream.
    pub own: u64,
}

/// One write. A batch of them is one transaction.
#[derive(Debug)]
pub enum Write {
    /// A message enters the store.
    Insert {
        id: u64,
        change: Box<Change>,
        groups: Groups,
        state: StoredState,
        attempts: Attempts,
        next_attempt: Option<SystemTime>,
        failure: Option<Failure>,
    },
    /// An attempt to deliver it failed.
    Failed {
        id: u64,
        state: StoredState,
        attempts: Attempts,
        next_attempt: Option<SystemTime>,
        failure: Failure,
    },
    /// It was delivered, or a transform dropped it.
    Remove { id: u64 },
    /// It was handed on as a dead letter.
    DeadLetter { id: u64 },
    /// The file of dead letters holds what left with this transaction.
    LetterFile(LetterFile),
    /// Its records, which no batch holds together, in the place of those that it had; nothing where it
    /// is to be shaped anew.
    Parts { id: u64, parts: Option<Parts> },
    /// Those of its parts whose number is below this one are in the stream.
    PartsSent { id: u64, below: u64 },
    /// An operator gave it up.
    Acknowledge { id: u64 },
    /// How far everything is settled now.
    Checkpoint(Checkpoint),
    /// The stream is about to be opened for the first time: nothing of this store is in front of this
    /// number. The rest of the checkpoint stays.
    Begin { seq: u64 },
    /// From which number a restart has to read a stream that transforms route messages to; nothing when
    /// all that this store has sent there is covered by the checkpoint. And how far it has reached.
    Stream { name: Arc<str>, seq: Option<u64>, reached: u64 },
    /// Changes that wait behind all others until S2 is back.
    Spill { id: u64, changes: Vec<Change> },
    /// Every spilled chunk up to this one is through.
    Unspill { through: u64 },
    /// A new chain is about to be used: what is parked is due.
    Chain { generation: u64, digest: String },
    /// What is promised of the stream from now on.
    Promise(Guarantee),
    /// A stream has this fencing token, which takes the place of all that were drawn before it.
    InForce { stream: Option<Arc<str>>, token: String },
    /// Which Postgres is read, by its `system_identifier`.
    SourceIdentity { system_identifier: String },
    /// Which publication is read.
    Publication(PublicationId),
    /// The slot of this name was made for this store, so that no other can have read from it.
    SlotMade { slot: String },
}

/// A message as the pipeline needs to know it at start.
#[derive(Clone, Debug)]
pub struct Known {
    pub id: u64,
    pub position: Position,
    pub groups: Groups,
    pub state: StoredState,
    pub attempts: Attempts,
    pub next_attempt: Option<SystemTime>,
    /// Of its last failure, if it failed.
    pub class: Option<String>,
    /// Its records, if they were stored.
    pub parts: Option<KnownParts>,
}

/// A message as it is read for another attempt.
#[derive(Clone, Debug)]
pub struct Message {
    pub id: u64,
    pub change: Change,
    /// Its records, where they were stored: it is not shaped again.
    pub parts: Option<Parts>,
    /// Its last failure as the store has it, which few have to understand.
    pub failure: Option<String>,
}

impl Message {
    /// Why it failed last, if it did.
    ///
    /// # Errors
    ///
    /// When the store holds what this release cannot read.
    pub fn failure(&self) -> Result<Option<Failure>, Error> {
        self.failure.as_deref().map(codec::from_json).transpose()
    }
}

/// What the store knows at start.
#[derive(Debug)]
pub struct Loaded {
    /// Drawn once for each store: part of every record's identity.
    pub pipeline_id: String,
    /// Nothing before the first checkpoint.
    pub checkpoint: Option<Checkpoint>,
    pub generation: u64,
    pub chain_digest: Option<String>,
    /// What was last promised of the stream, once something was.
    pub promised: Option<Guarantee>,
    /// `system_identifier` of the Postgres that was read, once one was.
    pub source_identity: Option<String>,
    /// The publication that was read, once one was.
    pub publication: Option<PublicationId>,
    /// The slot that was made for this store, if one was.
    pub slot_made: Option<String>,
    pub messages: Vec<Known>,
    pub next_id: u64,
    /// Spilled changes, oldest first.
    pub spilled: Vec<Chunk>,
    /// Those in which there may be records that nobody has heard of.
    pub streams: Vec<StreamRow>,
    /// How many messages have become dead letters.
    pub dead_letters: u64,
    /// Nothing before the first one was written to a file.
    pub letter_file: Option<LetterFile>,
}

impl Loaded {
    /// Everything up to here was read from the source and is settled or in the store.
    #[must_use]
    pub fn read_through(&self) -> Position {
        let checkpoint = self.checkpoint.unwrap_or_default();
        let spilled = self.spilled.last().map(|chunk| chunk.last).unwrap_or_default();
        // The source may have gone on behind what was spilled, and kept nothing of it.
        let confirmed = Position::last_before(checkpoint.confirm);
        checkpoint.position.max(spilled).max(confirmed)
    }
}

/// Fencing tokens, at most 36 bytes each.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// The one that was just drawn.
    pub next: String,
    /// It and those drawn before it, oldest first, one of which the stream may have.
    pub known: Vec<String>,
    /// How far the stream has reached, as the store knows it.
    pub reached: u64,
}

/// The store within the state folder.
pub const FILE: &str = "sluicebox.db";

/// How many tokens of a stream are remembered: the one that is known to be in force, and the newest of
/// those that were drawn since. Each start draws one, and so does each lost connection.
const TOKENS_MAX: usize = 1000;

/// How often a store looks whether it is still its process's, where nothing is written that would tell.
const OWNER_INTERVAL: Duration = Duration::from_secs(1);

type Answer<T> = oneshot::Sender<Result<T, Error>>;

enum Request {
    Write(Arc<[Write]>, Answer<()>),
    Read(Vec<u64>, usize, Answer<Vec<Message>>),
    ReadSpill(u64, Answer<Option<(u64, Vec<Change>)>>),
    DrawToken(Option<Arc<str>>, u32, Answer<Tokens>),
    List(PageQuery, HashSet<u64>, oneshot::Sender<Result<MessageList, control::Error>>),
    Show(u64, HashSet<u64>, oneshot::Sender<Result<view::Stored, control::Error>>),
    Select(control::Filter, oneshot::Sender<Result<Vec<u64>, control::Error>>),
    UnchangedBehind(Vec<u64>, Answer<u64>),
}

/// The handle to the store. The file is closed when the last handle is gone.
#[derive(Clone)]
pub struct Store {
    hand_over: Arc<dyn Fn(Task) + Send + Sync>,
    bytes: Arc<AtomicU64>,
    load: Arc<Load>,
}

/// What the thread was asked for and has done.
#[derive(Debug, Default)]
struct Load {
    asked: AtomicU64,
    done: AtomicU64,
    /// It has seen that another process is the owner.
    taken_over: AtomicBool,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

/// A request on its way to the file. Dropped without an answer, it reads as a store that has stopped.
pub struct Task(Request);

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").field("writes", &self.writes()).finish()
    }
}

impl Task {
    /// Whether it changes the file.
    #[must_use]
    pub fn writes(&self) -> bool {
        matches!(self.0, Request::Write(..) | Request::DrawToken(..))
    }

    /// The transaction that it asks for, if it does.
    #[cfg(test)]
    pub(crate) fn transaction(&self) -> Option<Arc<[Write]>> {
        if let Request::Write(writes, _) = &self.0 { Some(Arc::clone(writes)) } else { None }
    }

    /// Carries it out and answers. Says whether the file holds what it asked to write.
    pub fn carry_out(self, database: &mut Database) -> bool {
        database.answer(self.0)
    }

    /// Whether the pipeline itself reads changes by it.
    #[must_use]
    pub fn reads_changes(&self) -> bool {
        matches!(self.0, Request::Read(..) | Request::ReadSpill(..))
    }

    /// Answers a request that [writes](Self::writes) or [reads changes](Self::reads_changes) that it
    /// failed, and leaves the file as it was. Any other is dropped.
    pub fn refuse(self, error: Error) {
        // A caller that no longer waits does not matter.
        match self.0 {
            Request::Write(_, answer) => drop(answer.send(Err(error))),
            Request::DrawToken(_, _, answer) => drop(answer.send(Err(error))),
            Request::Read(_, _, answer) => drop(answer.send(Err(error))),
            Request::ReadSpill(_, answer) => drop(answer.send(Err(error))),
            Request::List(..)
            | Request::Show(..)
            | Request::Select(..)
            | Request::UnchangedBehind(..) => {}
        }
    }
}

pub use view::Stored;

impl Store {
    /// Opens or creates the store in a folder, which nobody else may use meanwhile.
    ///
    /// # Errors
    ///
    /// When the folder cannot be made or is in use, or the file is damaged or of a newer release.
    pub fn open(dir: &Path) -> Result<(Self, Loaded), Error> {
        Self::open_from(dir, false)
    }

    /// As [`Self::open`]. With `take_over` the folder may still be in use by a process that is frozen
    /// or out of reach, which can write nothing more from here on.
    ///
    /// # Errors
    ///
    /// As [`Self::open`], and when that process stands in the middle of a write.
    pub fn open_from(dir: &Path, take_over: bool) -> Result<(Self, Loaded), Error> {
        Self::open_by(dir, take_over, Connection::open)
    }

    /// As [`Self::open_from`], with the file opened by somebody else: tests put a layer under SQLite.
    fn open_by(
        dir: &Path,
        take_over: bool,
        connect: impl FnOnce(PathBuf) -> rusqlite::Result<Connection>,
    ) -> Result<(Self, Loaded), Error> {
        let mut database = Database::open(dir, take_over, connect)?;
        let loaded = database.load(&mut rand::rng())?;
        let bytes = Arc::clone(&database.bytes);
        let load = Arc::<Load>::default();
        let done = Arc::clone(&load);
        let (tasks, received) = mpsc::channel::<Task>();
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                let mut looked_at = Instant::now();
                loop {
                    match received.recv_timeout(OWNER_INTERVAL) {
                        Ok(task) => {
                            // Whoever asked is told.
                            let _ = task.carry_out(&mut database);
                            done.done.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(mpsc::RecvTimeoutError::Timeout) => {}
                        Err(mpsc::RecvTimeoutError::Disconnected) => break,
                    }
                    if looked_at.elapsed() >= OWNER_INTERVAL {
                        looked_at = Instant::now();
                        done.taken_over.fetch_or(database.is_taken_over(), Ordering::Relaxed);
                    }
                }
            })
            .map_err(|source| Error::Open { path: dir.to_owned(), source })?;
        // The thread ends only when every handle is gone, or by a panic, and then the answer's
        // channel tells.
        let asked = Arc::clone(&load);
        let hand_over = Arc::new(move |task| {
            asked.asked.fetch_add(1, Ordering::Relaxed);
            drop(tasks.send(task));
        });
        Ok((Self { hand_over, bytes, load }, loaded))
    }

    /// A handle whose requests go to `hand_over`, which sees to it that each is carried out on this
    /// database, in order.
    pub fn over(database: &Database, hand_over: impl Fn(Task) + Send + Sync + 'static) -> Self {
        let bytes = Arc::clone(&database.bytes);
        Self { hand_over: Arc::new(hand_over), bytes, load: Arc::default() }
    }

    /// What of the file is in use, in bytes, as of the last write.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How many requests wait for an answer, and how many were answered. Nothing of either for a handle
    /// over another [`Database`].
    #[must_use]
    pub fn load(&self) -> (u64, u64) {
        let done = self.load.done.load(Ordering::Relaxed);
        (self.load.asked.load(Ordering::Relaxed).saturating_sub(done), done)
    }

    /// Whether another process has taken the store over, so that every write fails from here on. Known
    /// within a second or two; never for a handle over another [`Database`].
    #[must_use]
    pub fn is_taken_over(&self) -> bool {
        self.load.taken_over.load(Ordering::Relaxed)
    }

    /// Carries all the writes out in one transaction, on disk when this returns.
    ///
    /// # Errors
    ///
    /// When the transaction failed as a whole; nothing of it is written then.
    pub async fn write(&self, writes: Arc<[Write]>) -> Result<(), Error> {
        self.ask(|answer| Request::Write(writes, answer)).await
    }

    /// These messages: the first that is there, and as many more as fit into `bytes_max` together with
    /// it, as [`Change::bytes`] counts them.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub async fn read(&self, ids: Vec<u64>, bytes_max: usize) -> Result<Vec<Message>, Error> {
        self.ask(|answer| Request::Read(ids, bytes_max, answer)).await
    }

    /// The changes of the first spilled chunk behind this one, with its id.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub async fn read_spill(&self, after: u64) -> Result<Option<(u64, Vec<Change>)>, Error> {
        self.ask(|answer| Request::ReadSpill(after, answer)).await
    }

    /// Draws a fencing token that was never drawn before, and remembers it for a stream that transforms
    /// route messages to, or the pipeline's own. `nonce` keeps a process on a copy of this store from
    /// drawing the same one.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub async fn draw_token(&self, stream: Option<Arc<str>>, nonce: u32) -> Result<Tokens, Error> {
        self.ask(|answer| Request::DrawToken(stream, nonce, answer)).await
    }

    /// A page of messages; `moving` are those on their way at this moment.
    pub fn list(
        &self,
        query: PageQuery,
        moving: HashSet<u64>,
        answer: oneshot::Sender<Result<MessageList, control::Error>>,
    ) {
        self.send(Request::List(query, moving, answer));
    }

    /// One message whole.
    ///
    /// # Errors
    ///
    /// When there is none of that id, or the file cannot be read.
    pub async fn show(&self, id: u64, moving: HashSet<u64>) -> Result<Stored, control::Error> {
        let (answer, answered) = oneshot::channel();
        self.send(Request::Show(id, moving, answer));
        answered.await.map_err(|_| control::Error::Stopped)?
    }

    /// The ids that a filter means, oldest first.
    ///
    /// # Errors
    ///
    /// When the filter means nothing, or the file cannot be read.
    pub async fn select(&self, filter: control::Filter) -> Result<Vec<u64>, control::Error> {
        let (answer, answered) = oneshot::channel();
        self.send(Request::Select(filter, answer));
        answered.await.map_err(|_| control::Error::Stopped)?
    }

    /// How many messages behind these, in their groups, are updates with unchanged TOAST columns.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub async fn unchanged_behind(&self, ids: Vec<u64>) -> Result<u64, Error> {
        self.ask(|answer| Request::UnchangedBehind(ids, answer)).await
    }

    fn send(&self, request: Request) {
        (self.hand_over)(Task(request));
    }

    async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        self.send(request(answer));
        answered.await.map_err(|_| Error::Stopped)?
    }
}

/// The file itself. Whoever has it carries requests out, one at a time.
#[derive(Debug)]
pub struct Database {
    connection: Connection,
    /// Nothing for a database in memory.
    lock: Option<owner::Lock>,
    /// The name under which this process writes, once it has loaded what is there.
    owner: String,
    /// See [`Store::bytes`].
    bytes: Arc<AtomicU64>,
}

impl Database {
    fn open(
        dir: &Path,
        take_over: bool,
        connect: impl FnOnce(PathBuf) -> rusqlite::Result<Connection>,
    ) -> Result<Self, Error> {
        create_dir(dir).map_err(|source| Error::Open { path: dir.to_owned(), source })?;
        let lock = owner::Lock::take(dir, take_over)?;
        let mut connection = connect(dir.join(FILE))?;
        schema::prepare(&mut connection)?;
        let database =
            Self { connection, lock: Some(lock), owner: String::new(), bytes: Arc::default() };
        database.measure()?;
        Ok(database)
    }

    /// The one of this name in memory, which lasts as long as anybody has it open. Each that opens it
    /// is another process to it.
    #[cfg(test)]
    pub(crate) fn shared(name: &str) -> Result<Self, Error> {
        let flags = rusqlite::OpenFlags::default();
        let name = format!("file:{name}?mode=memory&cache=shared");
        let mut connection = Connection::open_with_flags(name, flags)?;
        schema::prepare(&mut connection)?;
        Ok(Self { connection, lock: None, owner: String::new(), bytes: Arc::default() })
    }

    /// A copy of it under another name in memory.
    #[cfg(test)]
    pub(crate) fn copied(&self, name: &str) -> Result<Self, Error> {
        let flags = rusqlite::OpenFlags::default();
        let uri = format!("file:{name}?mode=memory&cache=shared");
        let connection = Connection::open_with_flags(&uri, flags)?;
        self.connection.execute("VACUUM INTO ?1", [&uri])?;
        Ok(Self { connection, lock: None, owner: String::new(), bytes: Arc::default() })
    }

    /// How many tokens it has drawn.
    #[cfg(test)]
    pub(crate) fn epoch(&self) -> u64 {
        let epoch = self.fact("epoch").ok().flatten();
        epoch.and_then(|text| text.parse().ok()).unwrap_or_default()
    }

    /// Whether another process is the owner now. Where that cannot be read, the next write tells.
    fn is_taken_over(&self) -> bool {
        self.fact("owner").is_ok_and(|found| found.as_deref() != Some(&self.owner))
    }

    /// Says whether it is written, where it was to be.
    fn answer(&mut self, request: Request) -> bool {
        // A caller that no longer waits does not matter to the file.
        match request {
            Request::Write(writes, answer) => {
                let result = self.write(&writes);
                let written = result.is_ok();
                drop(answer.send(result));
                return written;
            }
            Request::Read(ids, bytes_max, answer) => {
                drop(answer.send(self.read(&ids, bytes_max)));
            }
            Request::ReadSpill(after, answer) => {
                drop(answer.send(spill::read(&self.connection, after)));
            }
            Request::DrawToken(stream, nonce, answer) => {
                let result = self.draw_token(stream.as_deref(), nonce);
                let written = result.is_ok();
                drop(answer.send(result));
                return written;
            }
            Request::List(query, moving, answer) => {
                drop(answer.send(view::list(&self.connection, &query, &moving)));
            }
            Request::Show(id, moving, answer) => {
                drop(answer.send(view::show(&self.connection, id, &moving)));
            }
            Request::Select(filter, answer) => {
                drop(answer.send(view::select(&self.connection, &filter)));
            }
            Request::UnchangedBehind(ids, answer) => {
                drop(answer.send(view::unchanged_behind(&self.connection, &ids)));
            }
        }
        false
    }

    /// What a pipeline has to know at its start. A new file is given its pipeline's id here.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or holds what this release does not know.
    pub fn load(&mut self, rng: &mut impl rand::Rng) -> Result<Loaded, Error> {
        self.owner = format!("{:016x}", rng.random::<u64>());
        owner::claim(&mut self.connection, &self.owner, self.lock.as_ref())?;
        let pipeline_id = match self.fact("pipeline_id")? {
            Some(id) => id,
            None => {
                let id = format!("{:016x}", rng.random::<u64>());
                self.set_fact("pipeline_id", &id)?;
                id
            }
        };
        let number = |text: Option<String>| text.and_then(|text| text.parse().ok()).unwrap_or(0);
        let checkpoint = self
            .connection
            .query_row(
                "SELECT commit_lsn, commit_idx, seq, confirm_lsn, reached FROM checkpoints
                 WHERE stream = ''",
                [],
                |row| {
                    Ok(Checkpoint {
                        position: Position {
                            commit_lsn: Lsn(unsigned(row.get(0)?)),
                            index: unsigned(row.get(1)?),
                        },
                        seq: u64::try_from(row.get::<_, i64>(2)?).ok(),
                        confirm: Lsn(unsigned(row.get(3)?)),
                        reached: unsigned(row.get(4)?),
                    })
                },
            )
            .optional()?;
        Ok(Loaded {
            pipeline_id,
            checkpoint,
            generation: number(self.fact("generation")?),
            chain_digest: self.fact("chain_digest")?,
            promised: self.fact("promised")?.map(|word| promise(&word)).transpose()?,
            source_identity: self.fact("source_identity")?,
            publication: self.fact("publication")?.and_then(|text| publication(&text)),
            slot_made: self.fact("slot_made")?,
            messages: self.known()?,
            next_id: last_id(&self.connection)? + 1,
            spilled: spill::chunks(&self.connection)?,
            streams: self.streams()?,
            dead_letters: dead_letters::count(&self.connection)?,
            letter_file: dead_letters::file(&self.connection)?,
        })
    }

    fn streams(&self) -> Result<Vec<StreamRow>, Error> {
        let mut statement = self.connection.prepare(
            "SELECT stream, seq, reached FROM checkpoints WHERE stream <> '' AND seq >= 0",
        )?;
        let rows = statement.query_map([], |row| {
            let (seq, reached) = (unsigned(row.get(1)?), unsigned(row.get(2)?));
            Ok(StreamRow { name: row.get(0)?, seq, reached })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn known(&self) -> Result<Vec<Known>, Error> {
        let mut statement = self.connection.prepare(
            "SELECT id, commit_lsn, commit_idx, state, attempts, next_attempt_ms,
                    table_group, group_a, group_b, json_extract(failure, '$.error.class'),
                    own_failures
             FROM messages ORDER BY id",
        )?;
        let mut parts = parts::known(&self.connection)?;
        let mut rows = statement.query([])?;
        let mut known = Vec::new();
        while let Some(row) = rows.next()? {
            known.push(Known {
                id: unsigned(row.get(0)?),
                position: Position {
                    commit_lsn: Lsn(unsigned(row.get(1)?)),
                    index: unsigned(row.get(2)?),
                },
                state: StoredState::from_number(row.get(3)?)?,
                attempts: Attempts { all: unsigned(row.get(4)?), own: unsigned(row.get(10)?) },
                next_attempt: row.get::<_, Option<i64>>(5)?.map(codec::time_from_ms),
                class: row.get(9)?,
                parts: parts.remove(&unsigned(row.get(0)?)),
                groups: Groups {
                    table: GroupId(row.get(6)?),
                    first: row.get::<_, Option<[u8; 16]>>(7)?.map(GroupId),
                    second: row.get::<_, Option<[u8; 16]>>(8)?.map(GroupId),
                },
            });
        }
        Ok(known)
    }

    fn write(&mut self, writes: &[Write]) -> Result<(), Error> {
        let transaction = owner::begin(&mut self.connection, &self.owner)?;
        let mut removed = false;
        let mut given_up = Vec::new();
        let mut dead_letters = dead_letters::Leaving::default();
        for write in writes {
            if let Write::Acknowledge { id } = write {
                given_up.extend(given_up::entry(&transaction, *id)?);
            }
            if let Write::DeadLetter { id } = write {
                dead_letters.add(&transaction, *id)?;
            }
            removed |= matches!(
                write,
                Write::Remove { .. }
                    | Write::DeadLetter { .. }
                    | Write::Parts { .. }
                    | Write::PartsSent { .. }
                    | Write::Acknowledge { .. }
                    | Write::Unspill { .. }
            );
            carry_out(&transaction, write)?;
        }
        given_up::remember(&transaction, given_up)?;
        dead_letters.remember(&transaction)?;
        transaction.commit()?;
        if removed
            // Gives the room of removed messages back to the disk, a few pages at a time.
            && let Err(error) = self.connection.execute_batch("PRAGMA incremental_vacuum(2000);")
        {
            // What was asked for is on disk: it must not be asked for again.
            let error = crate::error_chain::error_chain(&error);
            tracing::debug!(error, "could not give room of the message store back to the disk");
        }
        // The same holds here.
        if let Err(error) = self.measure() {
            let error = crate::error_chain::error_chain(&error);
            tracing::debug!(error, "could not measure the message store");
        }
        Ok(())
    }

    fn measure(&self) -> Result<(), Error> {
        let number = |name: &str| -> Result<u64, Error> {
            Ok(unsigned(
                self.connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))?,
            ))
        };
        let pages = number("page_count")?.saturating_sub(number("freelist_count")?);
        self.bytes.store(pages * number("page_size")?, Ordering::Relaxed);
        Ok(())
    }

    fn read(&self, ids: &[u64], bytes_max: usize) -> Result<Vec<Message>, Error> {
        let mut messages: Vec<Message> = Vec::with_capacity(ids.len());
        let mut total = 0;
        for &id in ids {
            total += codec::bytes(&self.connection, id)?;
            if total > bytes_max && !messages.is_empty() {
                break;
            }
            if let Some((change, failure)) = codec::read(&self.connection, id)? {
                let parts = parts::read(&self.connection, id)?;
                messages.push(Message { id, change, parts, failure });
            }
        }
        Ok(messages)
    }

    fn draw_token(&mut self, stream: Option<&str>, nonce: u32) -> Result<Tokens, Error> {
        let id = self.fact("pipeline_id")?.unwrap_or_default();
        let transaction = owner::begin(&mut self.connection, &self.owner)?;
        let drawn = fact(&transaction, "epoch")?.and_then(|text| text.parse::<u64>().ok());
        let epoch = drawn.unwrap_or(0) + 1;
        let (_, reached) = known_numbers(&transaction, stream.unwrap_or_default())?;
        let mut known = match known_tokens(&transaction, stream)? {
            Some(tokens) => tokens,
            None if stream.is_some() => Vec::new(),
            // Stores of earlier releases numbered them only.
            None => {
                let first = epoch.saturating_sub(TOKENS_MAX as u64).max(1);
                (first..epoch).map(|number| format!("sb-{id}-{number}")).collect()
            }
        };
        // The oldest is the one in force, unless a fence behind it has landed that nobody heard of.
        let excess = (known.len() + 1).saturating_sub(TOKENS_MAX);
        if excess > 0 {
            known.drain(1..=excess);
        }
        let next = format!("sb-{id}-{epoch:x}-{nonce:08x}");
        known.push(next.clone());
        set_fact(&transaction, "epoch", &epoch.to_string())?;
        set_fact(&transaction, &token_fact(stream), &known.join(" "))?;
        transaction.commit()?;
        Ok(Tokens { next, known, reached: unsigned(reached) })
    }

    fn fact(&self, name: &str) -> Result<Option<String>, Error> {
        fact(&self.connection, name)
    }

    fn set_fact(&self, name: &str, value: &str) -> Result<(), Error> {
        set_fact(&self.connection, name, value)
    }
}

/// The fact that keeps the fencing tokens of a stream that transforms route messages to, or of the
/// pipeline's own.
fn token_fact(stream: Option<&str>) -> String {
    stream.map_or_else(|| "tokens".to_owned(), |stream| format!("tokens of {stream}"))
}

/// A stream's tokens, oldest first; nothing before one was drawn.
fn known_tokens(
    connection: &Connection,
    stream: Option<&str>,
) -> Result<Option<Vec<String>>, Error> {
    let tokens = fact(connection, &token_fact(stream))?;
    Ok(tokens.map(|tokens| tokens.split_whitespace().map(str::to_owned).collect()))
}

/// A promise that a later release has made is not taken for less.
fn promise(word: &str) -> Result<Guarantee, Error> {
    Guarantee::from_word(word)
        .ok_or_else(|| Error::Content { text: format!("the promise `{word}` of a stream") })
}

/// As [`Write::Publication`] has it.
fn publication(text: &str) -> Option<PublicationId> {
    let (oid, name) = text.split_once(' ')?;
    Some(PublicationId { name: name.to_owned(), oid: oid.parse().ok()? })
}

fn fact(connection: &Connection, name: &str) -> Result<Option<String>, Error> {
    let mut statement =
        connection.prepare_cached("SELECT CAST(value AS TEXT) FROM facts WHERE name = ?1")?;
    Ok(statement.query_row([name], |row| row.get(0)).optional()?)
}

/// The number of the newest message that was ever here, 0 before there was one.
fn last_id(connection: &Connection) -> Result<u64, Error> {
    let last: i64 = connection.query_row(
        "SELECT max(coalesce((SELECT max(id) FROM messages), 0),
                    coalesce((SELECT CAST(value AS INTEGER) FROM facts WHERE name = 'last_id'), 0))",
        [],
        |row| row.get(0),
    )?;
    Ok(unsigned(last))
}

fn set_fact(connection: &Connection, name: &str, value: &str) -> Result<(), Error> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO facts (name, value, sum) VALUES (?1, ?2, checksum(?1, ?2))",
        )?
        .execute(params![name, value])?;
    Ok(())
}

fn carry_out(connection: &Connection, write: &Write) -> Result<(), Error> {
    match write {
        Write::Insert { id, change, groups, state, attempts, next_attempt, failure } => {
            codec::insert(connection, *id, change, groups)?;
            set_fact(connection, "last_id", &id.to_string())?;
            update(connection, *id, *state, *attempts, *next_attempt, failure.as_ref())
        }
        Write::Failed { id, state, attempts, next_attempt, failure } => {
            update(connection, *id, *state, *attempts, *next_attempt, Some(failure))
        }
        Write::Remove { id } => {
            connection
                .prepare_cached("DELETE FROM messages WHERE id = ?1")?
                .execute([signed(*id)])?;
            Ok(())
        }
        // A file cannot be asked for its letter at a position, as a stream can.
        Write::DeadLetter { id } => mark(connection, *id),
        Write::LetterFile(file) => dead_letters::set_file(connection, file),
        Write::Acknowledge { id } if mutation::broken(Rule::Tombstone) => {
            carry_out(connection, &Write::Remove { id: *id })
        }
        Write::Parts { id, parts } => parts::replace(connection, *id, parts.as_ref()),
        Write::PartsSent { id, below } => parts::remove(connection, *id, *below),
        Write::Acknowledge { id } => mark(connection, *id),
        Write::Checkpoint(checkpoint) => {
            let Checkpoint { position, seq, reached, confirm } = checkpoint;
            let (seq, reached) = match seq {
                Some(seq) => (signed(*seq), signed(*reached)),
                None => known_numbers(connection, "")?,
            };
            connection
                .prepare_cached(
                    "INSERT OR REPLACE INTO checkpoints
                     (stream, commit_lsn, commit_idx, seq, confirm_lsn, reached, sum)
                     VALUES ('', ?1, ?2, ?3, ?4, ?5, checksum('', ?1, ?2, ?3, ?4, ?5))",
                )?
                .execute([
                    signed(position.commit_lsn.0),
                    signed(position.index),
                    seq,
                    signed(confirm.0),
                    reached,
                ])?;
            connection
                .prepare_cached(
                    "DELETE FROM messages WHERE state = 3
                     AND (commit_lsn, commit_idx) <= (?1, ?2)",
                )?
                .execute([signed(position.commit_lsn.0), signed(position.index)])?;
            Ok(())
        }
        Write::Begin { seq } => {
            connection
                .prepare_cached(
                    "INSERT INTO checkpoints (stream, commit_lsn, commit_idx, seq, confirm_lsn, reached)
                     VALUES ('', 0, 0, ?1, 0, ?1)
                     ON CONFLICT (stream) DO UPDATE
                     SET seq = excluded.seq, reached = excluded.reached",
                )?
                .execute([signed(*seq)])?;
            let sum = format!(
                "UPDATE checkpoints SET sum = checksum({}) WHERE stream = ''",
                checksum::CHECKPOINT
            );
            connection.prepare_cached(&sum)?.execute([])?;
            Ok(())
        }
        Write::Stream { name, seq, reached } => {
            let seq = seq.map_or(NO_SEQ, signed);
            connection
                .prepare_cached(
                    "INSERT OR REPLACE INTO checkpoints
                     (stream, commit_lsn, commit_idx, seq, confirm_lsn, reached, sum)
                     VALUES (?1, 0, 0, ?2, 0, ?3, checksum(?1, 0, 0, ?2, 0, ?3))",
                )?
                .execute(params![&**name, seq, signed(*reached)])?;
            Ok(())
        }
        Write::Spill { id, changes } => spill::insert(connection, *id, changes),
        Write::Unspill { through } => spill::remove(connection, *through),
        Write::Chain { generation, digest } => {
            set_fact(connection, "generation", &generation.to_string())?;
            set_fact(connection, "chain_digest", digest)?;
            // It is to try them all, also where this process ends before it has: later, nobody could tell
            // whom it has tried.
            connection
                .prepare_cached(
                    "UPDATE messages SET state = 1, next_attempt_ms = ?1, sum = NULL WHERE state = 0",
                )?
                .execute([now_ms()])?;
            let sum = format!(
                "UPDATE messages SET sum = checksum({}) WHERE sum IS NULL",
                checksum::MESSAGE
            );
            connection.prepare_cached(&sum)?.execute([])?;
            Ok(())
        }
        Write::InForce { stream, token } => {
            let stream = stream.as_deref();
            let known = known_tokens(connection, stream)?.unwrap_or_default();
            let place = known.iter().position(|known| known == token).unwrap_or_default();
            set_fact(connection, &token_fact(stream), &known[place..].join(" "))
        }
        Write::Promise(guarantee) => set_fact(connection, "promised", guarantee.word()),
        Write::SourceIdentity { system_identifier } => {
            set_fact(connection, "source_identity", system_identifier)
        }
        Write::Publication(PublicationId { name, oid }) => {
            set_fact(connection, "publication", &format!("{oid} {name}"))
        }
        Write::SlotMade { slot } => set_fact(connection, "slot_made", slot),
    }
}

/// Leaves nothing of a message but its position, until the checkpoint has passed that.
fn mark(connection: &Connection, id: u64) -> Result<(), Error> {
    parts::replace(connection, id, None)?;
    connection.prepare_cached("DELETE FROM pieces WHERE message = ?1")?.execute([signed(id)])?;
    connection
        .prepare_cached("UPDATE messages SET state = 3, failure = NULL WHERE id = ?1")?
        .execute([signed(id)])?;
    sum_message(connection, id)
}

fn update(
    connection: &Connection,
    id: u64,
    state: StoredState,
    attempts: Attempts,
    next_attempt: Option<SystemTime>,
    failure: Option<&Failure>,
) -> Result<(), Error> {
    let failure = failure.map(codec::to_json).transpose()?;
    let next_attempt = next_attempt.map(codec::ms_from_time);
    connection
        .prepare_cached(
            "UPDATE messages SET state = ?2, attempts = ?3, own_failures = ?4, next_attempt_ms = ?5,
               failure = ?6
             WHERE id = ?1",
        )?
        .execute(params![
            signed(id),
            state.number(),
            signed(attempts.all),
            signed(attempts.own),
            next_attempt,
            failure
        ])?;
    sum_message(connection, id)
}

/// The pipeline's own stream was never opened, or nothing of another one is unsettled.
const NO_SEQ: i64 = -1;

/// From which number a stream has to be read, and how far it has reached, as the file has it.
fn known_numbers(connection: &Connection, stream: &str) -> Result<(i64, i64), Error> {
    let mut statement =
        connection.prepare_cached("SELECT seq, reached FROM checkpoints WHERE stream = ?1")?;
    let numbers = statement.query_row([stream], |row| Ok((row.get(0)?, row.get(1)?)));
    Ok(numbers.optional()?.unwrap_or((NO_SEQ, 0)))
}

/// Every change of a message's row ends with this.
fn sum_message(connection: &Connection, id: u64) -> Result<(), Error> {
    let sql = format!("UPDATE messages SET sum = checksum({}) WHERE id = ?1", checksum::MESSAGE);
    connection.prepare_cached(&sql)?.execute([signed(id)])?;
    Ok(())
}

/// Makes the folder, and makes sure that a power loss leaves it where it is.
fn create_dir(dir: &Path) -> std::io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(dir)?;
    for folder in dir.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()) {
        // Above a folder of another user's there is nothing of ours.
        let Ok(folder) = File::open(folder) else { break };
        folder.sync_all()?;
    }
    Ok(())
}

/// SQLite's integers are signed; ours are counts and log positions below 2^63.
fn signed(value: u64) -> i64 {
    value.cast_signed()
}

fn unsigned(value: i64) -> u64 {
    value.cast_unsigned()
}

fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
