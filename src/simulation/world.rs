//! What all parts of a run share: chance, the trace, and what is known of store and streams from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::faults::{Fault, Faults};
use super::folders::Copied;
use super::judge::Ours;
use super::letters::Paper;
use super::mirror::Mirror;
use super::older::Older;
use super::process::Process;
use super::streams::streams_of;
use super::workload::{Planned, Workload};
use crate::change::Position;
use crate::pipeline::budget::ByteBudget;
use crate::pipeline::control::Status;
use crate::pipeline::grants::{Grants, LostRecords};
use crate::sink::model::Model;
use crate::store::Database;

/// The pipeline's own stream.
pub(super) const STREAM: &str = "changes";

/// How far a run has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// Faults happen.
    Storm,
    /// No more faults: everything that is in order has to get through.
    Calm,
    /// What was refused or failed is mended and asked for: all the rest has to get through.
    Mended,
}

/// A record of ours that is or was in the stream.
#[derive(Debug)]
pub(super) struct Landed {
    pub(super) ours: Ours,
    pub(super) stream: &'static str,
    /// Which process sent it.
    pub(super) process: u64,
    /// Nobody can read it any more.
    pub(super) lost: bool,
    /// It is of the stream as it is, and not of one that was deleted.
    pub(super) current: bool,
    /// Its change is read once more, since the store that knew of it is lost.
    pub(super) again: bool,
    /// Its process had that store, and no process of the next one has opened this stream.
    pub(super) unasked: bool,
}

/// A run's world.
pub(super) struct World {
    pub(super) workload: Workload,
    pub(super) server: Mutex<Model>,
    /// The name of the store in memory, and what keeps it there.
    store: Mutex<(String, Database)>,
    /// What a backup has of it.
    pub(super) copied: Mutex<Option<Copied>>,
    pub(super) older: Mutex<Older>,
    began: Instant,
    state: Mutex<State>,
    /// Connections to S2 break.
    pub(super) cut: Notify,
}

pub(super) struct State {
    rng: SmallRng,
    faults: Faults,
    pub(super) stage: Stage,
    hash: u64,
    pub(super) events: u64,
    verbose: bool,
    pub(super) violation: Option<String>,
    pub(super) process: Option<Arc<Process>>,
    /// Whose the store is: the last process that opened it.
    pub(super) owner: u64,
    /// Processes that were started with another folder than the right one.
    pub(super) strangers: BTreeSet<u64>,
    /// What the last process says of itself.
    pub(super) status: Option<watch::Receiver<Status>>,
    pub(super) budget: Option<Arc<ByteBudget>>,
    /// Which generations of the chain have the mend.
    pub(super) generations: Vec<bool>,
    /// What Postgres was told, and what of it would survive its own crash.
    pub(super) confirmed: u64,
    pub(super) persisted: u64,
    /// How many transactions have been checked for being safe.
    pub(super) checked: usize,
    pub(super) store: Mirror,
    /// Dropped by the transforms at least once.
    pub(super) dropped: BTreeSet<Position>,
    /// Every record of ours that ever was in a stream, in the order in which they landed.
    pub(super) history: Vec<Landed>,
    /// How many records of the streams as they are have been noted.
    pub(super) noted: BTreeMap<&'static str, usize>,
    /// The changes that are or were in a stream as a whole.
    pub(super) landed: BTreeSet<Position>,
    /// Those of them that are there as dead letters.
    pub(super) letters: BTreeSet<Position>,
    /// The file of dead letters.
    pub(super) paper: Paper,
    /// The last process died before what it had written there left the store.
    pub(super) letters_left: bool,
    /// The one that was started after that.
    pub(super) after_letters: u64,
    /// How often a change did not get through the transforms.
    pub(super) failures: BTreeMap<Position, u64>,
    /// Records of these streams are gone, of ours or not.
    pub(super) decimated: BTreeSet<&'static str>,
    /// These streams were deleted at least once.
    pub(super) deleted: BTreeSet<&'static str>,
    /// These answer nothing else, until then.
    pub(super) shut: BTreeMap<&'static str, (u16, &'static str, Instant)>,
    /// A process was told to take a stream over at least once.
    pub(super) told_to_take_over: bool,
    /// What the last process was granted.
    pub(super) last_grants: Grants,
    /// What the operator decided about records that are gone, for the next process.
    pub(super) grant: Option<LostRecords>,
    /// From now on processes may take the stream from another one on this store: a zombie got it while
    /// it was new and had no token.
    pub(super) take_over: bool,
    /// The same for the next process only: another program has fenced a stream.
    pub(super) take_over_once: bool,
    /// Streams that another program has fenced at least once.
    pub(super) fenced: BTreeSet<&'static str>,
    /// Processes that may take a stream from another store.
    pub(super) granted_ownership: Vec<Arc<Process>>,
    /// The next process is told that the store before its own is given up.
    pub(super) abandon: bool,
    /// The first process of the store as it is.
    pub(super) store_since: u64,
    /// How far Postgres had been told when a store was lost.
    pub(super) lost_at: u64,
    /// What only a lost store held.
    pub(super) abandoned: BTreeSet<Position>,
    /// The slot is there.
    pub(super) has_slot: bool,
    /// The operator decided about records that are gone at least once.
    pub(super) granted: bool,
    /// Taken as delivered, as the operator decided.
    pub(super) excused: BTreeSet<Position>,
    /// S2 has refused a batch that was in order.
    pub(super) refused_any: bool,
    /// A process could not read a stream at its start that was to be read, and may go on without it.
    pub(super) unread_any: bool,
    /// So many events from now on an operator's choice to skip may not be on disk.
    pub(super) chosen: u32,
    /// What was sent to a stream that is shut is about to be routed to another one.
    pub(super) rerouted: bool,
    /// Sessions with routed streams, by their processes.
    pub(super) sessions: BTreeSet<(u64, &'static str)>,
    pub(super) disk_full: bool,
    pub(super) slow: bool,
    /// How far the machine's clock is off, in milliseconds.
    pub(super) clock_off_ms: i64,
    away_until: Instant,
}

impl State {
    /// The store is lost: what it alone held, and what nobody remembers to have sent.
    fn lose_store(&mut self, workload: &Workload, process: u64) {
        self.store_since = process;
        self.lost_at = self.confirmed;
        self.persisted = self.confirmed;
        let State { store, history, landed, abandoned, .. } = self;
        let gone = workload.changes().map(|planned| planned.change.position);
        let gone = gone.filter(|at| at.commit_lsn.0 < self.lost_at && !landed.contains(at));
        abandoned.extend(gone);
        self.excused.extend(abandoned.iter().copied());
        for landed in history {
            landed.again |= landed.ours.position.commit_lsn.0 >= self.lost_at;
        }
        let mut given_up = std::mem::take(&mut store.given_up);
        given_up.retain(|at, _| at.commit_lsn.0 < self.lost_at);
        let ever = std::mem::take(&mut store.ever);
        *store = Mirror { ever, given_up, ..Mirror::default() };
    }
}

impl World {
    pub(super) fn new(seed: u64, verbose: bool) -> Arc<Self> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut faults = Faults::draw(&mut rng);
        let older = Older::draw(seed);
        if older.may() {
            faults.with_older_states(older.wanted);
        }
        let workload = Workload::draw(&mut rng, faults.wanted);
        if verbose {
            for planned in workload.changes() {
                let Planned { change, keys, fate, route, .. } = planned;
                println!("{} {} {keys:?} {fate:?} {route:?}", change.position, change.action);
            }
        }
        let mut server = Model::default();
        server.create(STREAM);
        for &stream in &streams_of(&workload)[1..] {
            let missing = faults.weight(Fault::Missing);
            if missing == 0.0 || rng.random_bool(1.0 - missing) {
                server.create(stream);
            }
        }
        static WORLDS: AtomicU64 = AtomicU64::new(0);
        let store_name = format!("world-{}", WORLDS.fetch_add(1, Ordering::Relaxed));
        let store = Database::shared(&store_name).expect("there is memory");
        let fixed = rng.random_bool(0.3);
        Arc::new(Self {
            workload,
            server: Mutex::new(server),
            store: Mutex::new((store_name, store)),
            copied: Mutex::new(None),
            older: Mutex::new(older),
            began: Instant::now(),
            cut: Notify::new(),
            state: Mutex::new(State {
                rng,
                faults,
                stage: Stage::Storm,
                hash: 0xcbf2_9ce4_8422_2325,
                events: 0,
                verbose,
                violation: None,
                process: None,
                owner: 0,
                strangers: BTreeSet::new(),
                status: None,
                budget: None,
                generations: vec![fixed],
                confirmed: 0,
                persisted: 0,
                checked: 0,
                store: Mirror::default(),
                dropped: BTreeSet::new(),
                history: Vec::new(),
                noted: BTreeMap::new(),
                landed: BTreeSet::new(),
                letters: BTreeSet::new(),
                paper: Paper::default(),
                letters_left: false,
                after_letters: 0,
                failures: BTreeMap::new(),
                decimated: BTreeSet::new(),
                deleted: BTreeSet::new(),
                shut: BTreeMap::new(),
                told_to_take_over: false,
                last_grants: Grants::default(),
                grant: None,
                take_over: false,
                take_over_once: false,
                fenced: BTreeSet::new(),
                granted_ownership: Vec::new(),
                abandon: false,
                store_since: 0,
                lost_at: 0,
                abandoned: BTreeSet::new(),
                has_slot: false,
                granted: false,
                excused: BTreeSet::new(),
                refused_any: false,
                unread_any: false,
                chosen: 0,
                rerouted: false,
                sessions: BTreeSet::new(),
                disk_full: false,
                slow: false,
                clock_off_ms: 0,
                away_until: Instant::now(),
            }),
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) fn draw<T>(&self, draw: impl FnOnce(&mut SmallRng) -> T) -> T {
        draw(&mut self.state().rng)
    }

    pub(super) fn chance(&self, probability: f64) -> bool {
        self.draw(|rng| rng.random_bool(probability))
    }

    /// Whether a fault happens now: with `probability` where the run is full of it.
    pub(super) fn fault(&self, fault: Fault, probability: f64) -> bool {
        let mut state = self.state();
        let weight = state.faults.weight(fault);
        state.stage == Stage::Storm && weight > 0.0 && state.rng.random_bool(weight * probability)
    }

    /// Whether a process was started where letters were left, and an operator is at its messages.
    pub(super) fn mends_letters(&self, process: u64) -> bool {
        let state = self.state();
        state.stage == Stage::Storm && state.after_letters == process
    }

    /// Whether a fault may happen in this run.
    pub(super) fn may(&self, fault: Fault) -> bool {
        self.state().faults.weight(fault) > 0.0
    }

    /// How long something takes that is not in trouble.
    pub(super) fn delay(&self) -> Duration {
        let slow = self.state().slow;
        self.draw(|rng| {
            let millis = match rng.random_range(0..10) {
                0..6 => 0,
                6..9 => rng.random_range(1..5),
                _ => rng.random_range(5..40),
            };
            Duration::from_millis(if slow { millis * 20 + 50 } else { millis })
        })
    }

    pub(super) fn between(&self, from_ms: u64, to_ms: u64) -> Duration {
        Duration::from_millis(self.draw(|rng| rng.random_range(from_ms..to_ms)))
    }

    pub(super) fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Something happened, which belongs to the trace.
    pub(super) fn note(&self, what: &str, a: u64, b: u64) {
        let at = self.elapsed_ms();
        let mut state = self.state();
        state.events += 1;
        let mut hash = state.hash;
        for byte in what.bytes().map(u64::from).chain([a, b, at]) {
            hash = (hash ^ byte).wrapping_mul(0x0000_0100_0000_01b3);
        }
        state.hash = hash;
        if state.verbose {
            println!("{at:>8} ms  {what} {a} {b}");
        }
    }

    /// The same, and the process may die of it.
    pub(super) fn event(&self, what: &str, a: u64, b: u64) {
        self.note(what, a, b);
        // A choice of an operator is most easily forgotten soon after it was given.
        let is_chosen = {
            let chosen = &mut self.state().chosen;
            *chosen = chosen.saturating_sub(1);
            *chosen > 0
        };
        if self.fault(Fault::Crash, if is_chosen { 0.1 } else { 0.02 }) {
            let process = self.state().process.clone();
            if let Some(process) = process {
                self.note("crash", process.number, 0);
                process.kill();
                // With the machine, or alone.
                if self.chance(0.5) {
                    let mut state = self.state();
                    let State { rng, paper, .. } = &mut *state;
                    paper.lose(rng);
                }
            }
        }
    }

    pub(super) fn is_verbose(&self) -> bool {
        self.state().verbose
    }

    pub(super) fn violated(&self, text: String) {
        let mut state = self.state();
        if state.verbose {
            println!("VIOLATED: {text}");
        }
        state.violation.get_or_insert(text);
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.state().violation.clone()
    }

    pub(super) fn hash(&self) -> u64 {
        self.state().hash
    }

    pub(super) fn stage(&self) -> Stage {
        self.state().stage
    }

    /// Ends all faults.
    pub(super) fn calm(&self) {
        self.note("calm", 0, 0);
        let mut state = self.state();
        state.stage = Stage::Calm;
        (state.disk_full, state.slow, state.away_until) = (false, false, Instant::now());
        state.shut.clear();
        drop(state);
        self.create_missing();
    }

    /// Mends everything.
    pub(super) fn mend(&self) {
        self.note("mended", 0, 0);
        self.state().stage = Stage::Mended;
    }

    /// S2 goes away for so long.
    pub(super) fn away(&self, time: Duration) {
        self.note("S2 is away", u64::try_from(time.as_millis()).unwrap_or(u64::MAX), 0);
        self.state().away_until = Instant::now() + time;
        self.cut.notify_waiters();
    }

    pub(super) fn is_away(&self) -> bool {
        self.state().away_until > Instant::now()
    }

    /// The streams of this run, the pipeline's own first.
    pub(super) fn streams(&self) -> &'static [&'static str] {
        streams_of(&self.workload)
    }

    /// One of them.
    pub(super) fn a_stream(&self) -> &'static str {
        let streams = self.streams();
        if streams.len() == 1 {
            return STREAM;
        }
        streams[self.draw(|rng| rng.random_range(0..streams.len()))]
    }

    /// The name of the store.
    pub(super) fn store_name(&self) -> String {
        lock(&self.store).0.clone()
    }

    /// The state folder is lost, and this process begins with an empty one.
    pub(super) fn lose_store(&self, process: u64) {
        let name = format!("{}-{process}", self.store_name());
        let store = Database::shared(&name).expect("there is memory");
        *lock(&self.store) = (name, store);
        *lock(&self.copied) = None;
        self.note("the store is lost", process, 0);
        // Whoever may take the stream over and has not done so yet would do it later: an operator ends
        // that one first, as is said wherever that is granted.
        let granted = std::mem::take(&mut self.state().granted_ownership);
        for process in granted {
            let number = process.number;
            if !self.state().sessions.contains(&(number, STREAM)) {
                process.kill();
            }
        }
        self.state().lose_store(&self.workload, process);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
