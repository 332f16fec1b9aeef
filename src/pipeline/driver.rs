//! The one task that owns a running pipeline.
//!
//! ```text
//! source ─▶ jobs ─▶ workers ─▶ in order again ─┬─▶ outbox ─▶ S2 ─▶ settled ─▶ checkpoint ─▶ confirm
//!             ▲                                └─▶ store (failed, or behind a failed one) ─┘
//!             └──────────────── due again ◀──────────┘
//! ```
//!
//! Everything that decides what may be confirmed happens here, one event at a time. The invariants:
//!
//! - Nothing is confirmed before the checkpoint that covers it is on disk, and a checkpoint covers a
//!   change only when S2 has acknowledged it, the store holds it, or it was dropped.
//! - A checkpoint's sequence number never passes a record whose acknowledgement is not applied: a
//!   restart reads from there and finds what it may not send again.
//! - A message leaves the store in the transaction whose checkpoint covers its record.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::ack::{AckTracker, EntryId, Progress};
use super::budget::ByteBudget;
use super::control::{self, Changed, ErrorView, Filter, Reason, Request, Status};
use super::holds::{Due, Holds, MessageId};
use super::item::{Item, Origin, Shaped};
use super::link::{self, Established, Line, Opening, establish};
use super::outbox::{Outbox, Parcel, Window};
use super::workers::{Done, Job, Workers};
use crate::change::{Change, Lsn, Position};
use crate::message::{Draft, Envelope, EnvelopeSettings};
use crate::policy::{self, Backoff, Retry};
use crate::sink::client::Client;
use crate::sink::error::{Class, Refusal};
use crate::source::{self, Source};
use crate::store::{self, Checkpoint, Failure, Loaded, Store, StoredState, Write};
use crate::transform::Chain;

/// How often the checkpoint follows what is settled. A restart reads at most this much of the stream
/// again, and each one is a sync of the disk.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(200);

/// The same where only the end of the log moved, without a change for us.
const IDLE_CHECKPOINT_INTERVAL: Duration = Duration::from_secs(2);

/// How often the published status follows.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);

/// How long a shutdown waits for what is on its way.
const DRAIN_TIME: Duration = Duration::from_secs(20);

/// How many bytes of stored messages are tried at once, beside the first.
const RETRY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// How many stored messages are read from the store at once.
const RETRY_BATCH: usize = 64;

/// How much of a message an operator is shown, in bytes.
const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// Why the pipeline stopped by itself. What can heal never ends up here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Sink(String),
    #[error("{0}")]
    Source(String),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(
        "{text}; its settings say on_error = \"halt\": mend the transform or its settings, then start \
         again; the message is sent then"
    )]
    Halted { text: String },
    #[error("the threads that run the transforms have ended, which is a defect")]
    Workers,
}

/// What a driver is made of.
#[derive(Debug)]
pub struct Parts {
    pub settings: Settings,
    pub store: Store,
    pub loaded: Loaded,
    pub source: Source,
    pub budget: Arc<ByteBudget>,
    pub chains: watch::Receiver<Arc<Chain>>,
    pub workers: Workers,
    pub client: Client,
    pub status: watch::Sender<Status>,
    /// Drains and ends.
    pub shutdown: CancellationToken,
}

/// What a driver needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    pub window: Window,
    /// Between attempts of a failed message.
    pub retry: Backoff,
    pub pipeline_name: String,
    pub database_name: String,
    pub hostname: String,
}

type Pending<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The line to S2, and what to do where there is none.
enum Sink {
    Opening(Pending<(Option<u64>, Result<Established, link::Error>)>),
    Open(Box<Line>),
    /// In trouble, until the next attempt.
    Waiting {
        until: Instant,
    },
}

/// A write that is under way, and what is settled by it.
struct Writing {
    done: Pending<Result<(), store::Error>>,
    writes: Arc<[Write]>,
    effects: Effects,
}

/// Messages that are being read from the store.
struct Reading {
    ids: Vec<MessageId>,
    done: Pending<Result<Vec<(MessageId, Change)>, store::Error>>,
}

/// What becomes true once a write is on disk.
#[derive(Default)]
struct Effects {
    settled: Vec<(EntryId, usize)>,
    confirm: Option<Progress>,
    answers: Vec<(oneshot::Sender<Result<Changed, control::Error>>, Changed)>,
}

/// A request that had to ask the store first.
enum Selected {
    Retry(Vec<u64>, Filter, oneshot::Sender<Result<Changed, control::Error>>),
    Acknowledge(Vec<u64>, u64, oneshot::Sender<Result<Changed, control::Error>>),
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    changes: u64,
    records: u64,
    record_bytes: u64,
    dropped: u64,
}

/// The running pipeline.
struct Driver {
    settings: Settings,
    pipeline_id: String,
    store: Store,
    source: Source,
    budget: Arc<ByteBudget>,
    client: Client,
    shutdown: CancellationToken,
    status: watch::Sender<Status>,

    chains: watch::Receiver<Arc<Chain>>,
    chain: Arc<Chain>,
    envelope: Arc<Envelope>,
    workers: Workers,
    next_job: u64,
    /// Jobs that are out, oldest first; a result that came early waits in its place.
    jobs: VecDeque<Option<Done>>,

    tracker: AckTracker,
    holds: Holds,
    attempts: HashMap<MessageId, u64>,
    next_id: MessageId,
    /// Changes beyond the checkpoint that are settled already and that the source will read again: in
    /// the stream, with the number of their first record, or in the store.
    replayed: HashMap<Position, Option<u64>>,
    retry_bytes: usize,
    reading: Option<Reading>,

    outbox: Outbox,
    sink: Sink,
    sink_reason: Option<Reason>,
    sink_failures: u64,
    epoch: Option<u64>,
    /// Where the stream has to be read from after a broken session.
    acknowledged: Option<u64>,
    /// The stream has been read once, so that it is known what not to send.
    established: bool,
    guarantee: &'static str,
    reconnecting: bool,
    refused: Option<(Parcel, Failure)>,

    writes: Vec<Write>,
    effects: Effects,
    delivered: bool,
    writing: Option<Writing>,
    store_reason: Option<Reason>,
    store_failures: u64,
    store_retry: Option<Instant>,
    saved: Progress,
    saved_at: Instant,

    selected: mpsc::UnboundedSender<Selected>,
    counters: Counters,
    source_reason: Option<Reason>,
    /// As the store has it: which Postgres its messages are from.
    source_identity: Option<String>,
    draining: Option<Instant>,
}

/// Runs a pipeline until the shutdown token is cancelled, or something stops it that cannot heal.
///
/// # Errors
///
/// See [`Error`].
pub async fn run(
    parts: Parts,
    finished: mpsc::UnboundedReceiver<Done>,
    requests: mpsc::Receiver<Request>,
) -> Result<(), Error> {
    let (selected, selections) = mpsc::unbounded_channel();
    Box::pin(Driver::new(parts, selected).run(finished, requests, selections)).await
}

impl Driver {
    fn new(parts: Parts, selected: mpsc::UnboundedSender<Selected>) -> Self {
        let Parts { settings, store, loaded, source, budget, .. } = parts;
        let Parts { chains, workers, client, status, shutdown, .. } = parts;
        let now = Instant::now();
        let checkpoint = loaded.checkpoint.unwrap_or_default();
        let progress = Progress { position: checkpoint.position, lsn: checkpoint.confirm };
        let mut holds = Holds::new(checkpoint.position);
        let mut replayed = HashMap::new();
        let mut attempts = HashMap::new();
        for known in &loaded.messages {
            if known.position > checkpoint.position {
                replayed.insert(known.position, None);
            }
            let failed = match known.state {
                StoredState::Acknowledged => continue,
                StoredState::Parked | StoredState::Retrying => true,
                StoredState::Waiting => false,
            };
            let due = match (known.state, known.next_attempt) {
                (StoredState::Parked, _) => Due::OnRequest,
                (_, Some(at)) => {
                    let wait = at.duration_since(SystemTime::now()).unwrap_or_default();
                    Due::At(now + wait)
                }
                (_, None) => Due::Now,
            };
            attempts.insert(known.id, known.attempts);
            holds.insert(known.id, known.position, known.groups, failed, due);
        }
        let chain = Arc::clone(&chains.borrow());
        let mut driver = Self {
            pipeline_id: loaded.pipeline_id,
            envelope: Arc::new(Envelope::new(envelope(&settings, "", ""))),
            outbox: Outbox::new(settings.window),
            settings,
            store,
            source,
            budget,
            client,
            shutdown,
            status,
            chains,
            chain,
            workers,
            next_job: 0,
            jobs: VecDeque::new(),
            tracker: AckTracker::new(progress),
            holds,
            attempts,
            next_id: loaded.next_id,
            replayed,
            retry_bytes: 0,
            reading: None,
            sink: Sink::Waiting { until: now },
            sink_reason: Some(Reason {
                part: "sink".to_owned(),
                code: "sink_connecting".to_owned(),
                text: "connecting to S2".to_owned(),
            }),
            sink_failures: 0,
            epoch: None,
            acknowledged: loaded.checkpoint.map(|checkpoint| checkpoint.seq),
            established: false,
            guarantee: "",
            reconnecting: false,
            refused: None,
            writes: Vec::new(),
            effects: Effects::default(),
            delivered: false,
            writing: None,
            store_reason: None,
            store_failures: 0,
            store_retry: None,
            saved: progress,
            saved_at: now,
            selected,
            counters: Counters::default(),
            source_reason: None,
            source_identity: loaded.source_identity,
            draining: None,
        };
        let changed = loaded.chain_digest.as_deref() != Some(driver.chain.digest())
            || loaded.generation != driver.chain.generation;
        driver.adopt_chain(changed);
        driver
    }

    async fn run(
        mut self,
        mut finished: mpsc::UnboundedReceiver<Done>,
        mut requests: mpsc::Receiver<Request>,
        mut selections: mpsc::UnboundedReceiver<Selected>,
    ) -> Result<(), Error> {
        let mut status_tick = tokio::time::interval(STATUS_INTERVAL);
        status_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut source_status = self.source.status.clone();
        loop {
            self.step(Instant::now())?;
            if self.is_drained() {
                return self.finish().await;
            }
            let wake = self.wake();
            let takes = self.takes();
            tokio::select! {
                biased;
                () = self.shutdown.cancelled(), if self.draining.is_none() => {
                    self.draining = Some(Instant::now() + DRAIN_TIME);
                    tracing::info!("stopping: finishing what is on its way");
                }
                event = self.sink.event() => self.on_sink(event)?,
                result = done(&mut self.writing), if self.writing.is_some() => {
                    self.on_written(result)?;
                }
                Some(done) = finished.recv() => self.on_done(done)?,
                result = read(&mut self.reading), if self.reading.is_some() => {
                    self.on_read(result)?;
                }
                Ok(()) = self.chains.changed() => {
                    self.chain = Arc::clone(&self.chains.borrow_and_update());
                    self.adopt_chain(true);
                }
                Some(selected) = selections.recv() => self.on_selected(selected),
                Some(request) = requests.recv() => self.on_request(request),
                Ok(()) = source_status.changed() => {
                    let status = source_status.borrow_and_update().clone();
                    self.on_source_status(&status)?;
                }
                _ = status_tick.tick() => self.publish_status(),
                batch = self.source.batches.recv(), if takes => match batch {
                    Some(batch) => self.on_batch(batch)?,
                    None => {
                        let status = source_status.borrow_and_update().clone();
                        self.on_source_status(&status)?;
                        return Err(Error::Source("the source has ended, which is a defect".to_owned()));
                    }
                },
                () = sleep_until(wake) => {}
            }
        }
    }

    // What follows from the state as it is: nothing here waits.
    fn step(&mut self, now: Instant) -> Result<(), Error> {
        self.open_sink(now);
        self.send(now)?;
        if self.draining.is_none() {
            self.read_due(now);
        }
        self.write(now);
        Ok(())
    }

    /// Whether there is room for more from the source.
    fn takes(&self) -> bool {
        self.draining.is_none() && self.established && self.jobs.len() < self.workers.jobs_max()
    }

    /// When something has to be looked at again, whatever else happens.
    fn wake(&self) -> Option<Instant> {
        let sink = match &self.sink {
            Sink::Waiting { until } => Some(*until),
            Sink::Open(_) => self.outbox.due(),
            Sink::Opening(_) => None,
        };
        let retry = match self.holds.next_time() {
            Some(Some(at)) if self.established => Some(at),
            _ => None,
        };
        let checkpoint = (self.writing.is_none() && self.has_unsaved())
            .then(|| self.store_retry.unwrap_or(self.saved_at + self.checkpoint_interval()));
        [sink, retry, checkpoint, self.draining].into_iter().flatten().min()
    }

    // ---- transforms ----

    /// Uses the chain for everything that is dispatched from now on. Its number is in the store before
    /// any record carries it.
    fn adopt_chain(&mut self, changed: bool) {
        let chain = Arc::clone(&self.chain);
        self.envelope =
            Arc::new(Envelope::new(envelope(&self.settings, &self.pipeline_id, &chain.tag())));
        if changed {
            self.writes.push(Write::Chain {
                generation: chain.generation,
                digest: chain.digest().to_owned(),
            });
            self.holds.request_all();
            let files = chain.files().collect::<Vec<_>>().join(", ");
            tracing::info!(chain = chain.tag(), files, "the chain is live");
        }
    }

    fn dispatch(&mut self, items: Vec<Item>) -> Result<(), Error> {
        if items.is_empty() {
            return Ok(());
        }
        let job = Job {
            number: self.next_job,
            chain: Arc::clone(&self.chain),
            envelope: Arc::clone(&self.envelope),
            items,
        };
        self.next_job += 1;
        self.jobs.push_back(None);
        if self.workers.submit(job) { Ok(()) } else { Err(Error::Workers) }
    }

    fn on_done(&mut self, done: Done) -> Result<(), Error> {
        let first = self.next_job - self.jobs.len() as u64;
        let index = usize::try_from(done.number - first).unwrap_or(usize::MAX);
        if let Some(slot) = self.jobs.get_mut(index) {
            *slot = Some(done);
        }
        while let Some(Some(_)) = self.jobs.front() {
            let Some(Some(done)) = self.jobs.pop_front() else { break };
            for (item, shaped) in done.results {
                self.on_shaped(item, shaped)?;
            }
        }
        Ok(())
    }

    /// Order is restored here, so holds are decided here.
    fn on_shaped(&mut self, item: Item, shaped: Shaped) -> Result<(), Error> {
        let held = !self.holds.is_empty() && self.holds.holds(item.change.position, &item.groups());
        match item.origin {
            Origin::Source { entry } => match shaped {
                _ if held => self.store_waiting(item, entry),
                Shaped::Records(records) => {
                    self.outbox.push(Parcel::new(item, records), Instant::now())
                }
                Shaped::Dropped => {
                    self.counters.dropped += 1;
                    self.tracker.settle(entry, None);
                    self.budget.release(item.change.bytes());
                }
                Shaped::Failed(failure) => self.park(item, entry, *failure),
                Shaped::Halt(failure) => return Err(Error::Halted { text: failure.error.text }),
            },
            Origin::Store { id } => match shaped {
                // What was in front of it came back.
                _ if held => {
                    self.off_the_way(&item);
                    self.holds.back(id, false, Due::Now);
                }
                Shaped::Records(records) => {
                    self.holds.sent(id);
                    self.outbox.push(Parcel::new(item, records), Instant::now());
                }
                Shaped::Dropped => {
                    self.counters.dropped += 1;
                    self.off_the_way(&item);
                    self.forget(id);
                }
                Shaped::Failed(failure) => {
                    self.off_the_way(&item);
                    self.failed_again(id, *failure);
                }
                Shaped::Halt(failure) => return Err(Error::Halted { text: failure.error.text }),
            },
        }
        Ok(())
    }

    // ---- the store ----

    fn park(&mut self, item: Item, entry: EntryId, failure: Failure) {
        let (state, next_attempt, due) = self.next_attempt(&failure, 1);
        let id = self.next_id;
        log_failure(id, &item, &failure);
        self.insert(item, entry, state, 1, next_attempt, Some(failure), due);
    }

    fn store_waiting(&mut self, item: Item, entry: EntryId) {
        self.insert(item, entry, StoredState::Waiting, 0, None, None, Due::Now);
    }

    #[expect(clippy::too_many_arguments, reason = "they are the columns of one row")]
    fn insert(
        &mut self,
        item: Item,
        entry: EntryId,
        state: StoredState,
        attempts: u64,
        next_attempt: Option<SystemTime>,
        failure: Option<Failure>,
        due: Due,
    ) {
        let id = self.next_id;
        self.next_id += 1;
        let groups = item.groups();
        let change = item.change;
        self.holds.insert(id, change.position, groups, failure.is_some(), due);
        self.attempts.insert(id, attempts);
        self.effects.settled.push((entry, change.bytes()));
        self.writes.push(Write::Insert {
            id,
            change: Box::new(change),
            groups,
            state,
            attempts,
            next_attempt,
            failure,
        });
    }

    fn failed_again(&mut self, id: MessageId, failure: Failure) {
        let attempts = self.attempts.get(&id).copied().unwrap_or(0) + 1;
        let (state, next_attempt, due) = self.next_attempt(&failure, attempts);
        self.attempts.insert(id, attempts);
        self.holds.back(id, true, due);
        self.writes.push(Write::Failed { id, state, attempts, next_attempt, failure });
    }

    fn next_attempt(
        &self,
        failure: &Failure,
        attempts: u64,
    ) -> (StoredState, Option<SystemTime>, Due) {
        match policy::retry(failure, attempts, self.settings.retry) {
            Retry::OnRequest => (StoredState::Parked, None, Due::OnRequest),
            Retry::After(delay) => {
                let at = SystemTime::now() + delay;
                (StoredState::Retrying, Some(at), Due::At(Instant::now() + delay))
            }
        }
    }

    /// A message has left the store for good.
    fn forget(&mut self, id: MessageId) {
        self.holds.remove(id);
        self.attempts.remove(&id);
        self.writes.push(Write::Remove { id });
    }

    /// Reads the next messages that are due, a bounded number of bytes at a time.
    fn read_due(&mut self, now: Instant) {
        if !self.established
            || self.reading.is_some()
            || self.retry_bytes >= RETRY_BYTES_MAX
            || self.jobs.len() >= self.workers.jobs_max()
            || self.writing_inserts()
        {
            return;
        }
        let mut ids = Vec::new();
        while ids.len() < RETRY_BATCH {
            let Some(id) = self.holds.next_due(now) else { break };
            ids.push(id);
        }
        if !ids.is_empty() {
            let store = self.store.clone();
            let wanted = ids.clone();
            let done = Box::pin(async move { store.read(wanted, RETRY_BYTES_MAX).await });
            self.reading = Some(Reading { ids, done });
        }
    }

    /// A message can be read only once its insert is on disk.
    fn writing_inserts(&self) -> bool {
        let inserts =
            |writes: &[Write]| writes.iter().any(|write| matches!(write, Write::Insert { .. }));
        inserts(&self.writes)
            || self.writing.as_ref().is_some_and(|writing| inserts(&writing.writes))
    }

    fn on_read(
        &mut self,
        result: Result<Vec<(MessageId, Change)>, store::Error>,
    ) -> Result<(), Error> {
        let Some(Reading { ids, .. }) = self.reading.take() else { return Ok(()) };
        let mut read = result?;
        // What did not fit comes with the next read.
        let got: HashSet<MessageId> = read.iter().map(|(id, _)| *id).collect();
        for id in ids.into_iter().filter(|id| !got.contains(id)) {
            self.holds.back(id, false, Due::Now);
        }
        read.sort_by_key(|(_, change)| change.position);
        let mut items = Vec::with_capacity(read.len());
        for (id, change) in read {
            self.retry_bytes += change.bytes();
            items.push(Item { change, origin: Origin::Store { id } });
        }
        self.dispatch(items)
    }

    /// A stored message is no longer on its way, whatever became of it.
    fn off_the_way(&mut self, item: &Item) {
        self.retry_bytes = self.retry_bytes.saturating_sub(item.change.bytes());
    }

    fn has_unsaved(&self) -> bool {
        !self.writes.is_empty() || self.delivered || self.tracker.progress() != self.saved
    }

    fn checkpoint_interval(&self) -> Duration {
        let urgent = self.draining.is_some()
            || self.writes.iter().any(|write| !matches!(write, Write::Remove { .. }));
        let moved = self.delivered
            || !self.writes.is_empty()
            || self.tracker.progress().position != self.saved.position;
        match (urgent, moved) {
            (true, _) => Duration::ZERO,
            (false, true) => CHECKPOINT_INTERVAL,
            (false, false) => IDLE_CHECKPOINT_INTERVAL,
        }
    }

    /// Starts the next transaction, if there is one to make and its time has come.
    fn write(&mut self, now: Instant) {
        if self.writing.is_some() || !self.has_unsaved() {
            return;
        }
        let due = self.store_retry.unwrap_or(self.saved_at + self.checkpoint_interval());
        if due > now {
            return;
        }
        let progress = self.tracker.progress();
        let mut writes = std::mem::take(&mut self.writes);
        let mut effects = std::mem::take(&mut self.effects);
        self.delivered = false;
        if let Some(acknowledged) = self.acknowledged {
            let replayed = self.replayed.values().copied().flatten().min();
            let beyond = [self.tracker.seq_beyond(), replayed].into_iter().flatten().min();
            let seq = beyond.map_or(acknowledged, |seq| seq.min(acknowledged));
            writes.push(Write::Checkpoint(Checkpoint {
                position: progress.position,
                seq,
                confirm: progress.lsn,
            }));
            effects.confirm = Some(progress);
        }
        self.start_writing(writes.into(), effects);
    }

    fn start_writing(&mut self, writes: Arc<[Write]>, effects: Effects) {
        let store = self.store.clone();
        let under_way = Arc::clone(&writes);
        let done = Box::pin(async move { store.write(under_way).await });
        self.writing = Some(Writing { done, writes, effects });
    }

    fn on_written(&mut self, result: Result<(), store::Error>) -> Result<(), Error> {
        let Some(Writing { writes, effects, .. }) = self.writing.take() else { return Ok(()) };
        self.saved_at = Instant::now();
        if let Err(error) = result {
            if !error.heals() {
                return Err(error.into());
            }
            self.store_failures += 1;
            let delay = policy::STORE.delay(self.store_failures);
            let reason = Reason {
                part: "store".to_owned(),
                code: "store_failed".to_owned(),
                text: crate::app::error_chain(&error),
            };
            if self.store_reason.as_ref() != Some(&reason) {
                tracing::error!(error = reason.text, "the store cannot be written; waiting");
            }
            self.store_reason = Some(reason);
            // The same transaction again, before anything newer.
            let store = self.store.clone();
            let again = Arc::clone(&writes);
            let done = Box::pin(async move {
                tokio::time::sleep(delay).await;
                store.write(again).await
            });
            self.writing = Some(Writing { done, writes, effects });
            return Ok(());
        }
        if self.store_reason.take().is_some() {
            tracing::info!("the store can be written again");
        }
        self.store_failures = 0;
        for (entry, bytes) in effects.settled {
            self.tracker.settle(entry, None);
            self.budget.release(bytes);
        }
        if let Some(progress) = effects.confirm {
            self.saved = progress;
            self.source.confirm.send_if_modified(|confirm| {
                let rises = progress.lsn > *confirm;
                if rises {
                    *confirm = progress.lsn;
                }
                rises
            });
        }
        for (answer, changed) in effects.answers {
            // Whoever asked may have left.
            drop(answer.send(Ok(changed)));
        }
        Ok(())
    }

    // ---- the source ----

    fn on_batch(&mut self, batch: source::Batch) -> Result<(), Error> {
        let mut items = Vec::with_capacity(batch.items.len());
        for item in batch.items {
            match item {
                source::Item::Change(change) => {
                    self.counters.changes += 1;
                    let entry = self.tracker.read(change.position);
                    self.holds.pass(change.position);
                    match self.replayed.remove(&change.position) {
                        Some(seq) => {
                            self.tracker.settle(entry, seq);
                            self.budget.release(change.bytes());
                        }
                        None => items.push(Item { change, origin: Origin::Source { entry } }),
                    }
                }
                source::Item::Commit { end_lsn: lsn } | source::Item::Idle { wal_end: lsn } => {
                    let passed = Position { commit_lsn: lsn, index: 0 };
                    self.holds.pass(passed);
                    self.tracker.mark(lsn);
                    if !self.replayed.is_empty() {
                        self.replayed.retain(|position, _| *position > passed);
                    }
                }
            }
        }
        self.dispatch(items)
    }

    fn on_source_status(&mut self, status: &source::SourceStatus) -> Result<(), Error> {
        if let (None, Some(identity)) = (&self.source_identity, &status.identity) {
            let system_identifier = identity.system_identifier.clone();
            self.source_identity = Some(system_identifier.clone());
            self.writes.push(Write::SourceIdentity { system_identifier });
        }
        self.source_reason = match &status.state {
            source::State::Streaming | source::State::Stopped => None,
            source::State::Connecting => {
                Some(("source_connecting".to_owned(), "connecting to Postgres".to_owned()))
            }
            source::State::Waiting { code, text, .. } => Some(((*code).to_string(), text.clone())),
            source::State::Fatal { text, .. } => return Err(Error::Source(text.clone())),
        }
        .map(|(code, text)| Reason { part: "source".to_owned(), code, text });
        Ok(())
    }

    // ---- the sink ----

    fn open_sink(&mut self, now: Instant) {
        let Sink::Waiting { until } = &self.sink else { return };
        if *until > now {
            return;
        }
        let (store, client) = (self.store.clone(), self.client.clone());
        let (pipeline_id, read_from) = (self.pipeline_id.clone(), self.acknowledged);
        let epoch = self.epoch;
        self.sink = Sink::Opening(Box::pin(async move {
            let epoch = match epoch {
                Some(epoch) => epoch,
                None => match store.next_epoch().await {
                    Ok(epoch) => epoch,
                    Err(error) => return (None, Err(error.into())),
                },
            };
            let opening = Opening { client, store, pipeline_id, read_from, epoch };
            (Some(epoch), establish(opening).await)
        }));
    }

    fn send(&mut self, now: Instant) -> Result<(), Error> {
        let Sink::Open(line) = &mut self.sink else { return Ok(()) };
        if self.reconnecting {
            if !self.outbox.is_in_flight() {
                self.reconnecting = false;
                self.sink = Sink::Waiting { until: now };
            }
            return Ok(());
        }
        while let Some(records) = self.outbox.next_batch(now) {
            line.send(&records).map_err(|error| Error::Sink(crate::app::error_chain(&error)))?;
        }
        Ok(())
    }

    fn on_sink(&mut self, event: SinkEvent) -> Result<(), Error> {
        match event {
            SinkEvent::Opened(_, Ok(established)) => {
                self.epoch = None;
                self.on_established(*established);
            }
            SinkEvent::Opened(epoch, Err(error)) => {
                self.epoch = epoch;
                match error {
                    link::Error::Sink(error) => self.on_sink_error(&error)?,
                    link::Error::Store(error) if error.heals() => {
                        self.sink_waits("store_failed", crate::app::error_chain(&error), None);
                    }
                    link::Error::Store(error) => return Err(error.into()),
                }
            }
            SinkEvent::Ack(Ok(ack)) => {
                self.sink_failures = 0;
                self.acknowledged = Some(ack.end);
                self.reconnecting |= ack.reconnect_advised;
                for (parcel, seq) in self.outbox.acknowledged(ack.start) {
                    self.on_delivered(&parcel, seq);
                }
            }
            SinkEvent::Ack(Err(error)) => self.on_sink_error(&error)?,
        }
        Ok(())
    }

    fn on_delivered(&mut self, parcel: &Parcel, seq: u64) {
        self.counters.records += parcel.records.len() as u64;
        self.counters.record_bytes +=
            parcel.records.iter().map(super::size_gate::SizedRecord::metered_bytes).sum::<u64>();
        match parcel.item.origin {
            Origin::Source { entry } => {
                self.tracker.settle(entry, Some(seq));
                self.budget.release(parcel.item.change.bytes());
            }
            Origin::Store { id } => {
                self.off_the_way(&parcel.item);
                self.forget(id);
                self.delivered = true;
            }
        }
    }

    fn on_established(&mut self, established: Established) {
        let Established { line, landed, read_from } = established;
        let now = Instant::now();
        // Everything in front of the fence was read: what of it is ours is settled below, with its
        // numbers.
        self.acknowledged = Some(line.next_seq().unwrap_or(read_from));
        let place = self.client.place();
        if !self.established || self.sink_reason.is_some() {
            tracing::info!(
                basin = place.basin,
                stream = place.stream,
                endpoint = place.endpoint,
                guarantee = line.guarantee.sentence(),
                "S2 is connected"
            );
        }
        self.guarantee = line.guarantee.sentence();
        self.sink_reason = None;
        self.sink = Sink::Open(Box::new(line));
        if self.established {
            let found =
                self.outbox.resume(|parcel| landed.get(&parcel.item.change.position).copied(), now);
            for (parcel, seq) in found {
                self.on_delivered(&parcel, seq);
            }
        } else {
            self.established = true;
            self.apply_landed(&landed);
        }
        self.after_refusal(now);
    }

    /// At start: what the stream holds is not sent again, and messages that are in it leave the store.
    fn apply_landed(&mut self, landed: &HashMap<Position, u64>) {
        let through = self.tracker.progress().position;
        let beyond = landed.iter().filter(|(position, _)| **position > through);
        self.replayed.extend(beyond.map(|(position, seq)| (*position, Some(*seq))));
        let delivered: Vec<MessageId> = self
            .holds
            .positions()
            .filter(|(position, _)| landed.contains_key(position))
            .map(|(_, id)| id)
            .collect();
        for id in delivered {
            self.forget(id);
            self.delivered = true;
        }
    }

    /// A refused message is parked once it is certain what landed, and takes what is behind it along.
    fn after_refusal(&mut self, now: Instant) {
        let Some((parcel, failure)) = self.refused.take() else { return };
        match parcel.item.origin {
            Origin::Source { entry } => self.park(parcel.item, entry, failure),
            Origin::Store { id } => {
                self.off_the_way(&parcel.item);
                self.failed_again(id, failure);
            }
        }
        let holds = &self.holds;
        let held =
            |parcel: &Parcel| holds.holds(parcel.item.change.position, &parcel.item.groups());
        for parcel in self.outbox.extract(held, now) {
            match parcel.item.origin {
                Origin::Source { entry } => self.store_waiting(parcel.item, entry),
                Origin::Store { id } => {
                    self.off_the_way(&parcel.item);
                    self.holds.back(id, false, Due::Now);
                }
            }
        }
    }

    fn on_sink_error(&mut self, error: &crate::sink::error::Error) -> Result<(), Error> {
        match error.class() {
            Class::Sink(trouble) => {
                self.sink_waits(&trouble.code, trouble.text, trouble.retry_after);
            }
            Class::SeqMismatch { next } => {
                tracing::info!(next, "somebody else appends to the stream too; reading its end");
                self.sink = Sink::Waiting { until: Instant::now() };
            }
            Class::Oversize(refusal) => self.on_refused("oversize", &refusal),
            Class::Refused(refusal) => self.on_refused("refused", &refusal),
            Class::Fenced { .. } => return Err(Error::Sink(crate::app::error_chain(error))),
            Class::Stream { text, .. } | Class::Fatal { text } => return Err(Error::Sink(text)),
        }
        Ok(())
    }

    fn on_refused(&mut self, class: &str, refusal: &Refusal) {
        self.sink = Sink::Waiting { until: Instant::now() };
        let Some(parcel) = self.outbox.refused() else {
            tracing::warn!(
                status = refusal.status,
                "S2 refused a batch; sending its records one by one"
            );
            return;
        };
        let bytes = parcel.records.iter().map(super::size_gate::SizedRecord::metered_bytes).sum();
        let draft = Draft::new(parcel.item.change.clone(), Arc::clone(&self.envelope));
        let columns = draft
            .largest_columns(5)
            .into_iter()
            .map(|(name, bytes)| control::ColumnBytes { name, bytes })
            .collect();
        let failure = Failure {
            error: ErrorView {
                class: class.to_owned(),
                status: Some(refusal.status),
                text: format!(
                    "S2 refused a record of {} of {bytes} bytes with status {}",
                    parcel.item.change.table.qualified_name(),
                    refusal.status
                ),
                body: Some(refusal.body.clone()),
                transform: None,
            },
            bytes: Some(bytes),
            columns,
            trace: Vec::new(),
        };
        self.refused = Some((parcel, failure));
    }

    fn sink_waits(&mut self, code: &str, text: String, at_least: Option<Duration>) {
        self.sink_failures += 1;
        let delay = policy::SINK.delay(self.sink_failures).max(at_least.unwrap_or_default());
        let reason = Reason { part: "sink".to_owned(), code: code.to_owned(), text };
        if self.sink_reason.as_ref() != Some(&reason) {
            tracing::warn!(code, reason = reason.text, "S2 does not take records; waiting");
        }
        self.sink_reason = Some(reason);
        self.sink = Sink::Waiting { until: Instant::now() + delay };
    }

    // ---- requests ----

    fn on_request(&mut self, request: Request) {
        let store = self.store.clone();
        match request {
            Request::List(query, answer) => {
                store.list(query, self.holds.moving().collect(), answer);
            }
            Request::Show(id, answer) => {
                let moving = self.holds.moving().collect();
                let envelope = Arc::clone(&self.envelope);
                tokio::spawn(async move {
                    drop(answer.send(show(&store, id, moving, envelope).await));
                });
            }
            Request::Retry(filter, answer) => {
                let selected = self.selected.clone();
                tokio::spawn(async move {
                    match store.select(filter.clone()).await {
                        Ok(ids) => drop(selected.send(Selected::Retry(ids, filter, answer))),
                        Err(error) => drop(answer.send(Err(error))),
                    }
                });
            }
            Request::Acknowledge(filter, answer) => {
                let selected = self.selected.clone();
                tokio::spawn(async move {
                    let ids = match store.select(filter).await {
                        Ok(ids) => ids,
                        Err(error) => return drop(answer.send(Err(error))),
                    };
                    match store.unchanged_behind(ids.clone()).await {
                        Ok(behind) => {
                            drop(selected.send(Selected::Acknowledge(ids, behind, answer)));
                        }
                        Err(error) => {
                            drop(answer.send(Err(control::Error::Store(Box::new(error)))));
                        }
                    }
                });
            }
        }
    }

    fn on_selected(&mut self, selected: Selected) {
        match selected {
            Selected::Retry(ids, filter, answer) => {
                let one = filter.id;
                let ids: Vec<u64> =
                    ids.into_iter().filter(|id| self.holds.has_failed(*id)).collect();
                if let (Some(id), true) = (one, ids.is_empty()) {
                    let text = format!(
                        "message {id} has not failed: it waits for the one in front of it, and follows \
                         by itself"
                    );
                    drop(answer.send(Err(control::Error::Invalid { text })));
                    return;
                }
                let changed = ids.iter().filter(|id| self.holds.request(**id)).count() as u64;
                drop(answer.send(Ok(Changed { changed, unchanged_behind: 0 })));
            }
            Selected::Acknowledge(ids, unchanged_behind, answer) => {
                let (idle, busy): (Vec<u64>, Vec<u64>) =
                    ids.into_iter().partition(|id| self.holds.is_idle(*id));
                if let (Some(&id), true) = (busy.first(), idle.is_empty()) {
                    drop(answer.send(Err(control::Error::Busy { id })));
                    return;
                }
                for &id in &idle {
                    tracing::warn!(message = id, "given up by an operator; it is not delivered");
                    self.holds.remove(id);
                    self.attempts.remove(&id);
                    self.writes.push(Write::Acknowledge { id });
                }
                let changed = Changed { changed: idle.len() as u64, unchanged_behind };
                if idle.is_empty() {
                    drop(answer.send(Ok(changed)));
                } else {
                    self.effects.answers.push((answer, changed));
                }
            }
        }
    }

    fn publish_status(&mut self) {
        let counts = self.holds.counts();
        let source = self.source.status.borrow().clone();
        let confirmed = self.saved.lsn;
        let reasons: Vec<Reason> = [&self.source_reason, &self.sink_reason, &self.store_reason]
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        let status = Status {
            ready: reasons.is_empty(),
            reasons,
            guarantee: self.guarantee.to_owned(),
            endpoint: self.client.place().endpoint.clone(),
            pipeline_id: self.pipeline_id.clone(),
            chain: self.chain.tag(),
            changes: self.counters.changes,
            records: self.counters.records,
            record_bytes: self.counters.record_bytes,
            dropped: self.counters.dropped,
            parked: counts.parked,
            retrying: counts.retrying,
            waiting: counts.waiting,
            wal_end: (source.wal_end > Lsn(0)).then(|| source.wal_end.to_string()),
            confirmed: (confirmed > Lsn(0)).then(|| confirmed.to_string()),
            lag_bytes: (confirmed > Lsn(0)).then(|| source.wal_end.0.saturating_sub(confirmed.0)),
            stream_tail: self.acknowledged,
        };
        self.status.send_if_modified(|published| {
            let changed = *published != status;
            if changed {
                *published = status;
            }
            changed
        });
    }

    // ---- the end ----

    /// Everything that was on its way when the shutdown began has arrived, or cannot.
    fn is_drained(&self) -> bool {
        let Some(deadline) = self.draining else { return false };
        let sent = self.outbox.is_empty() || !matches!(self.sink, Sink::Open(_));
        let done = sent && self.jobs.is_empty() && self.writing.is_none() && !self.has_unsaved();
        done || deadline <= Instant::now()
    }

    async fn finish(mut self) -> Result<(), Error> {
        let left = self.tracker.len();
        self.publish_status();
        let confirmed = self.saved.lsn;
        self.source.finish().await;
        if self.outbox.is_empty() {
            tracing::info!(%confirmed, "stopped: everything taken was delivered or stored");
        } else {
            tracing::info!(
                %confirmed,
                unfinished = left,
                "stopped: what S2 has not taken is read from Postgres again at the next start"
            );
        }
        Ok(())
    }
}

/// What comes from the sink.
enum SinkEvent {
    /// With the number that was drawn for it, which a failed attempt leaves to the next.
    Opened(Option<u64>, Result<Box<Established>, link::Error>),
    Ack(Result<crate::sink::session::Ack, crate::sink::error::Error>),
}

impl Sink {
    /// The next event. Cancel-safe: what is being opened is kept.
    async fn event(&mut self) -> SinkEvent {
        match self {
            Self::Opening(opening) => {
                let (epoch, result) = opening.await;
                SinkEvent::Opened(epoch, result.map(Box::new))
            }
            Self::Open(line) => SinkEvent::Ack(line.next_ack().await),
            Self::Waiting { .. } => std::future::pending().await,
        }
    }
}

async fn done(writing: &mut Option<Writing>) -> Result<(), store::Error> {
    match writing {
        Some(writing) => (&mut writing.done).await,
        None => std::future::pending().await,
    }
}

async fn read(reading: &mut Option<Reading>) -> Result<Vec<(MessageId, Change)>, store::Error> {
    match reading {
        Some(reading) => (&mut reading.done).await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

async fn show(
    store: &Store,
    id: MessageId,
    moving: HashSet<u64>,
    envelope: Arc<Envelope>,
) -> Result<control::MessageDetail, control::Error> {
    let stored = store.show(id, moving).await?;
    let hint = policy::hint(&stored.message.id, stored.failure.as_ref());
    let draft = Draft::new(stored.change, envelope);
    let (payload, payload_cut) =
        draft.message_preview(PAYLOAD_BYTES_MAX).unwrap_or_else(|error| (error.to_string(), true));
    Ok(control::MessageDetail {
        message: stored.message,
        payload,
        payload_cut,
        trace: stored.failure.map(|failure| failure.trace).unwrap_or_default(),
        hint,
    })
}

fn envelope(settings: &Settings, pipeline_id: &str, chain: &str) -> EnvelopeSettings {
    EnvelopeSettings {
        pipeline_id: pipeline_id.to_owned(),
        pipeline_name: settings.pipeline_name.clone(),
        database_name: settings.database_name.clone(),
        hostname: settings.hostname.clone(),
        chain: chain.to_owned(),
    }
}

fn log_failure(id: MessageId, item: &Item, failure: &Failure) {
    tracing::warn!(
        message = id,
        position = %item.change.position,
        class = failure.error.class,
        reason = failure.error.text,
        "parked; only its group waits"
    );
}
