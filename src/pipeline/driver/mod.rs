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
//!
//! What surrounds the driver comes in through [`Parts`], so that the very same code runs against real
//! servers and in the simulation:
//!
//! | part | the seam | asked |
//! | --- | --- | --- |
//! | source | the channels of [`Source`] | per batch |
//! | workers | [`Workers::over`]: takes jobs, the results come in any order | per batch |
//! | dead letters | [`Writer::over`]: takes letters, which are written to what it opens | per portion |
//! | store | [`Store::over`]: takes requests, which a [`Database`](store::Database) carries out | per transaction |
//! | sink | [`Transport`](crate::sink::transport::Transport): below sessions, fencing and frames, for all streams | per session, and per request beside it |
//! | time, chance | [`Clock`] on the runtime's clock, `rng` | per event |
//!
//! Nothing in here may ask another clock or draw from another source: a run has to repeat itself.

mod ask;
mod database;
mod dead;
mod deliver;
mod failing;
mod halt;
#[cfg(test)]
mod invariants;
mod keep;
mod lane;
mod lanes;
mod looks;
mod others;
mod parts;
mod portions;
mod routed;
mod shape;
mod skip;
mod spill;
#[cfg(test)]
mod tests;

pub use portions::Portions;
pub use spill::Bounds;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::change::Position;
use crate::clock::Clock;
use crate::config::DeadLetters;
use crate::message::{Envelope, EnvelopeSettings};
use crate::mutation::{self, Rule};
use crate::pipeline::ack::{AckTracker, Progress};
use crate::pipeline::budget::ByteBudget;
use crate::pipeline::control::{self, Changed, Filter, Reason, Request, Status};
use crate::pipeline::dead_letter::writer::Writer;
use crate::pipeline::grants::Grants;
use crate::pipeline::heartbeat::Beat;
use crate::pipeline::holds::{Due, Holds, MessageId};
use crate::pipeline::item::Origin;
use crate::pipeline::measures::{Classes, Measures};
use crate::pipeline::outbox::Window;
use crate::pipeline::place::Landed;
use crate::pipeline::sample::Sampler;
use crate::pipeline::stuck::Stuck;
use crate::pipeline::workers::{Done, Workers};
use crate::policy::Backoff;
use crate::sink::Guarantee;
use crate::sink::client::Client;
use crate::source::{PublicationId, Source};
use crate::store::{self, Attempts, Loaded, Store, StoredState, Write};
use crate::transform::Chain;
use database::Database;
use dead::Dead;
use halt::Halt;
use lane::Lane;
use lanes::Lanes;
use parts::InParts;
use routed::Doubts;
use skip::Skipping;
use spill::{Spill, spill_read};

/// How often the checkpoint follows what is settled. A restart reads at most this much of the stream
/// again, and each one is a sync of the disk.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(200);

/// The same where only the end of the log moved, without a change for us.
const IDLE_CHECKPOINT_INTERVAL: Duration = Duration::from_secs(2);

/// How often the published status follows.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);

/// How long a shutdown waits for what is on its way.
const DRAIN_TIME: Duration = Duration::from_secs(20);

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
    /// Takes a sample of the changes, to try chains on.
    pub sampler: Sampler,
    pub workers: Workers,
    /// Writes dead letters.
    pub letters: Writer,
    pub client: Client,
    pub clock: Clock,
    /// For what is drawn: jitter.
    pub rng: SmallRng,
    pub status: watch::Sender<Status>,
    /// Beats with each turn.
    pub heart: Beat,
    /// Drains and ends.
    pub shutdown: CancellationToken,
}

/// What a driver needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    pub window: Window,
    /// Between attempts of a failed message.
    pub retry: Backoff,
    /// What ends them; nothing: they go on for ever.
    pub dead_letters: Option<DeadLetters>,
    pub bounds: Bounds,
    pub portions: Portions,
    /// What gets nothing done for so long is stuck.
    pub stuck_after: Duration,
    /// The least that may be promised, where an operator says so.
    pub guarantee: Option<Guarantee>,
    /// For this start.
    pub grants: Grants,
    pub pipeline_name: String,
    pub database_name: String,
    pub hostname: String,
    /// For `sink::Mode::Unguarded`: records without what recovery needs, and no checkpoints.
    pub unguarded: bool,
}

type Pending<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A write that is under way, and what is settled by it.
struct Writing {
    done: Pending<Result<(), store::Error>>,
    writes: Arc<[Write]>,
    effects: Effects,
}

/// Messages that are being read from the store.
struct Reading {
    ids: Vec<MessageId>,
    done: Pending<Result<Vec<store::Message>, store::Error>>,
}

/// What becomes true once a write is on disk.
#[derive(Default)]
struct Effects {
    settled: Vec<(Origin, usize)>,
    confirm: Option<Progress>,
    /// The store knows where the stream begins.
    beginning: bool,
    answers: Vec<(oneshot::Sender<Result<Changed, control::Error>>, Changed)>,
    /// Its number is on disk, so that records may carry it.
    chain: Option<Arc<Chain>>,
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
    /// Opened, the first included.
    sink_sessions: u64,
}

/// The running pipeline.
struct Driver {
    settings: Settings,
    clock: Clock,
    rng: SmallRng,
    pipeline_id: String,
    store: Store,
    source: Source,
    budget: Arc<ByteBudget>,
    shutdown: CancellationToken,
    status: watch::Sender<Status>,
    heart: Beat,

    chains: watch::Receiver<Arc<Chain>>,
    chain: Arc<Chain>,
    /// Whether the store knows the chain's number. Until then nothing is shaped at all, because
    /// there is no chain before it.
    chain_stored: bool,
    /// A chain of which no record was acknowledged yet: its tag, and when its files were seen.
    first_of: Option<(String, Instant)>,
    sampler: Sampler,
    envelope: Arc<Envelope>,
    workers: Workers,
    letters: Writer,
    next_job: u64,
    /// Jobs that are out, oldest first; a result that came early waits in its place.
    jobs: VecDeque<Option<Done>>,
    /// Up to where stored messages may go, once the jobs before these have left the workers.
    passing: VecDeque<(u64, Position)>,
    /// Where it stands still, because a transform's settings say so.
    halted: Option<Halt>,

    tracker: AckTracker,
    holds: Holds,
    attempts: HashMap<MessageId, Attempts>,
    next_id: MessageId,
    /// Messages up to this one are on disk.
    stored: MessageId,
    /// Changes beyond the checkpoint that are settled already, and that the source or the spill may give
    /// again.
    replayed: HashSet<Position>,
    /// Where changes landed, found at an opening or sent from the store, that are beyond the checkpoint.
    ahead: BTreeMap<Position, Landed>,
    retry_bytes: usize,
    reading: Option<Reading>,
    spill: Spill,
    parts: InParts,
    dead: Dead,

    lanes: Lanes,
    /// Of routed streams, what nobody has heard of.
    doubts: Doubts,
    /// Streams for which the grants of this start were used.
    granted: HashSet<Arc<str>>,
    /// Changes that are taken as delivered, because nobody can know.
    skipping: Skipping,
    /// By an operator's decision a stream has another beginning than the store knows of, or changes are
    /// skipped or messages given up of which it does not know. Until it does, nothing is sent: a restart
    /// would not find it.
    begins_elsewhere: bool,
    /// Every stream in which something unknown may be has been read once, so that it is known what not
    /// to send.
    established: bool,

    writes: Vec<Write>,
    effects: Effects,
    delivered: bool,
    writing: Option<Writing>,
    store_reason: Option<Reason>,
    store_failures: u64,
    /// The same for reads.
    unreadable_reason: Option<Reason>,
    read_failures: u64,
    saved: Progress,
    saved_at: Instant,

    selected: mpsc::UnboundedSender<Selected>,
    /// What an operator wants and can only be decided once S2 has been read.
    undecided: Vec<Selected>,
    counters: Counters,
    stuck: Stuck,
    failing: failing::Failing,
    database: Database,
    measures: Measures,
    classes: Classes,
    source_reason: Option<Reason>,
    /// As the store has it: which Postgres its messages are from.
    source_identity: Option<String>,
    publication: Option<PublicationId>,
    /// The slot was made for this store: see [`spill`].
    slot_is_ours: bool,
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
    Box::pin(Driver::new(parts, selected)?.run(finished, requests, selections)).await
}

impl Driver {
    fn new(parts: Parts, selected: mpsc::UnboundedSender<Selected>) -> Result<Self, Error> {
        let Parts { settings, store, loaded, source, budget, .. } = parts;
        let Parts { mut chains, sampler, workers, client, status, heart, .. } = parts;
        let Parts { letters, shutdown, clock, rng, .. } = parts;
        let now = clock.now();
        let stuck = Stuck::new(settings.stuck_after);
        let checkpoint = loaded.checkpoint.unwrap_or_default();
        let progress = Progress { position: checkpoint.position, lsn: checkpoint.confirm };
        let read = Progress { position: loaded.read_through(), ..progress };
        let settled = if loaded.spilled.is_empty() { read.position } else { progress.position };
        let mut holds = Holds::new(settled);
        let mut replayed = HashSet::new();
        let mut attempts = HashMap::new();
        let (mut measures, mut classes) = (Measures::default(), Classes::default());
        let mut dead = Dead::new(settings.dead_letters.clone(), &loaded);
        for known in &loaded.messages {
            if known.position > checkpoint.position {
                replayed.insert(known.position);
            }
            let failed = match known.state {
                StoredState::Acknowledged => continue,
                StoredState::Parked | StoredState::Retrying => true,
                StoredState::Waiting => false,
            };
            let class = known.class.as_deref().filter(|_| failed);
            let spent =
                class.is_some_and(|class| dead.is_left_spent(known.id, class, known.attempts));
            let due = match (known.state, known.next_attempt) {
                _ if spent => Due::Now,
                (StoredState::Parked, _) => Due::OnRequest,
                (_, Some(at)) => {
                    // The machine's clock may have been set since.
                    let wait = at.duration_since(clock.time_of_day()).unwrap_or_default();
                    Due::At(now + wait.min(settings.retry.max))
                }
                (_, None) => Due::Now,
            };
            attempts.insert(known.id, known.attempts);
            if let Some(class) = &known.class {
                classes.failed(&mut measures, known.id, class);
            }
            holds.insert(known.id, known.position, known.groups, failed, due);
        }
        let chain = Arc::clone(&chains.borrow_and_update());
        let acknowledged = loaded.checkpoint.and_then(|checkpoint| checkpoint.seq);
        let mut own = Lane::new(client, settings.window, settings.grants, acknowledged, now);
        own.promised = loaded.promised;
        own.reached = checkpoint.reached;
        let slot_is_ours = loaded.slot_made.as_ref() == Some(&settings.pipeline_name);
        own.reason = Some(Reason {
            part: "sink".to_owned(),
            code: looks::CONNECTING.to_owned(),
            text: "connecting to S2".to_owned(),
        });
        let mut driver = Self {
            pipeline_id: loaded.pipeline_id,
            envelope: Arc::new(Envelope::new(envelope(&settings, "", ""))),
            lanes: Lanes::new(own, settings.portions),
            doubts: Doubts::default(),
            granted: HashSet::new(),
            settings,
            clock,
            rng,
            store,
            source,
            budget,
            shutdown,
            status,
            heart,
            chains,
            chain,
            chain_stored: true,
            first_of: None,
            sampler,
            workers,
            letters,
            next_job: 0,
            jobs: VecDeque::new(),
            passing: VecDeque::new(),
            halted: None,
            tracker: AckTracker::new(read),
            holds,
            attempts,
            next_id: loaded.next_id,
            stored: loaded.next_id - 1,
            replayed,
            ahead: BTreeMap::new(),
            retry_bytes: 0,
            reading: None,
            parts: InParts::new(&loaded.messages),
            dead,
            spill: Spill::new(loaded.spilled, checkpoint, read.position),
            skipping: Skipping::Nothing,
            begins_elsewhere: false,
            established: false,
            writes: Vec::new(),
            effects: Effects::default(),
            delivered: false,
            writing: None,
            store_reason: None,
            store_failures: 0,
            unreadable_reason: None,
            read_failures: 0,
            saved: read,
            saved_at: now,
            selected,
            undecided: Vec::new(),
            counters: Counters::default(),
            stuck,
            failing: failing::Failing::default(),
            database: Database::default(),
            measures,
            classes,
            source_reason: None,
            source_identity: loaded.source_identity,
            publication: loaded.publication,
            slot_is_ours,
            draining: None,
        };
        let changed = loaded.chain_digest.as_deref() != Some(driver.chain.digest())
            || loaded.generation != driver.chain.generation;
        let chain = Arc::clone(&driver.chain);
        if changed {
            driver.chain_stored = false;
            driver.announce_chain(chain);
        } else {
            driver.adopt_chain(chain);
        }
        driver.adopt_streams(loaded.streams)?;
        Ok(driver)
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
            self.heart.beat();
            #[cfg(test)]
            crate::pipeline::heartbeat::fault::hang().await;
            self.step(self.clock.now())?;
            #[cfg(test)]
            self.assert_invariants();
            self.publish_readiness();
            if self.is_drained() {
                return self.finish().await;
            }
            let wake = self.wake();
            let takes = self.takes();
            tokio::select! {
                biased;
                () = self.shutdown.cancelled(), if self.draining.is_none() => {
                    self.draining = Some(self.clock.now() + DRAIN_TIME);
                    tracing::info!("stopping: finishing what is on its way");
                }
                (lane, event) = self.lanes.event() => self.on_sink(lane, event)?,
                result = done(&mut self.writing), if self.writing.is_some() => {
                    self.on_written(result)?;
                }
                Some(done) = finished.recv() => self.on_done(done),
                result = read(&mut self.reading), if self.reading.is_some() => {
                    self.on_read(result)?;
                }
                result = spill_read(&mut self.spill) => self.on_spill_read(result)?,
                done = dead::written(&mut self.dead) => self.on_letters(done),
                Ok(()) = self.chains.changed() => {
                    let chain = Arc::clone(&self.chains.borrow_and_update());
                    self.announce_chain(chain);
                }
                Some(selected) = selections.recv() => self.on_selected(selected),
                Some(request) = requests.recv() => self.on_request(request),
                Ok(()) = source_status.changed() => {
                    let status = source_status.borrow_and_update().clone();
                    self.on_source_status(&status)?;
                }
                _ = status_tick.tick() => {
                    // With nothing to write it would keep lock and slot from the one that took over.
                    if self.store.is_taken_over() {
                        return Err(store::Error::TakenOver.into());
                    }
                    self.look_at_pressure(self.clock.now());
                    // They are closed with a checkpoint.
                    self.delivered |= self.lanes.is_any_idle(self.clock.now());
                    self.look_for_stuck();
                    self.look_for_failing();
                    self.publish_status();
                }
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
        if mutation::broken(Rule::ConfirmBehindCheckpoint) {
            self.confirm(self.tracker.progress());
        }
        self.open_sinks(now);
        self.go_on_from_halt()?;
        self.send(now)?;
        self.read_due(now);
        self.spill_step(now);
        self.write(now);
        Ok(())
    }

    /// When something has to be looked at again, whatever else happens.
    fn wake(&self) -> Option<Instant> {
        if mutation::broken(Rule::WaitForEvents) && self.writing.is_some() {
            return Some(self.clock.now());
        }
        // Before one begins elsewhere, the store is what is waited for.
        let sink = self.lanes.wake(self.clock.now()).filter(|_| !self.begins_elsewhere);
        let retry = self.can_read().then(|| self.holds.next_time(self.stored)).flatten();
        let checkpoint = (self.writing.is_none() && self.has_unsaved())
            .then(|| self.saved_at + self.checkpoint_interval());
        [sink, retry, checkpoint, self.draining].into_iter().flatten().min()
    }

    /// Everything that was on its way when the shutdown began has arrived, or cannot.
    fn is_drained(&self) -> bool {
        let Some(deadline) = self.draining else { return false };
        let sent = self.lanes.all().all(|(_, lane)| lane.outbox.is_empty() || !lane.is_open());
        let shaped = self.jobs.is_empty() || self.stands_still();
        let done = sent && shaped && self.writing.is_none() && !self.has_unsaved();
        done || deadline <= self.clock.now()
    }

    async fn finish(mut self) -> Result<(), Error> {
        let left = self.tracker.len();
        self.publish_status();
        let confirmed = self.saved.lsn;
        let stored = self.writing.is_none() && !self.has_unsaved();
        let sent = self.jobs.is_empty() && self.lanes.all().all(|(_, lane)| lane.outbox.is_empty());
        self.source.finish().await;
        if sent && stored {
            tracing::info!(%confirmed, "stopped: everything taken was delivered or stored");
        } else {
            tracing::warn!(
                %confirmed,
                unfinished = left,
                "stopped: what {} is read from Postgres again at the next start",
                if stored { "S2 has not taken" } else { "could not be written to the store" },
            );
        }
        Ok(())
    }
}

async fn done(writing: &mut Option<Writing>) -> Result<(), store::Error> {
    match writing {
        Some(writing) => (&mut writing.done).await,
        None => std::future::pending().await,
    }
}

async fn read(reading: &mut Option<Reading>) -> Result<Vec<store::Message>, store::Error> {
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

fn envelope(settings: &Settings, pipeline_id: &str, chain: &str) -> EnvelopeSettings {
    EnvelopeSettings {
        pipeline_id: pipeline_id.to_owned(),
        pipeline_name: settings.pipeline_name.clone(),
        database_name: settings.database_name.clone(),
        hostname: settings.hostname.clone(),
        chain: chain.to_owned(),
        unguarded: settings.unguarded,
    }
}
