//! What all parts of a run share: chance, the trace, which faults there are, and what is known of the
//! store from outside.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::judge::{self, Ours};
use super::mirror::Mirror;
use super::process::Process;
use super::workload::{Planned, Workload};
use crate::change::Position;
use crate::pipeline::budget::ByteBudget;
use crate::pipeline::control::Status;
use crate::pipeline::grants::LostRecords;
use crate::sink::model::Model;
use crate::store::{Database, Write};

/// The one stream.
pub(super) const STREAM: &str = "changes";

/// A fault that a run may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The process dies, at any event.
    Crash,
    /// The process stands still while another one takes over, and wakes up later.
    Freeze,
    /// An operator stops it in order.
    Shutdown,
    /// Nothing listens at S2.
    Refuse,
    /// A connection breaks, before or after what was on it landed.
    Cut,
    /// An answer never comes.
    Lose,
    /// Something is under way for many seconds, and lands when nobody expects it any more.
    Late,
    /// S2 answers with an error of its own.
    Status,
    /// S2 says that it is about to stop.
    Advise,
    /// The whole of S2 is slow.
    Slow,
    /// S2 is away for a while: connections break, and nothing listens.
    Outage,
    /// Records of the stream expire.
    Expire,
    /// The stream is deleted and created again.
    Recreate,
    /// S2 refuses a batch that is in order.
    RefuseRecord,
    /// The disk of the store is full.
    DiskFull,
    /// The clock of the machine is set, between two processes.
    ClockJump,
    /// Somebody else appends to the stream.
    Foreign,
    /// Another pipeline wants the stream.
    Intruder,
    /// The connection to Postgres breaks; it starts again at what was confirmed, or at less.
    Disconnect,
    /// A transform takes seconds.
    SlowTransform,
    /// The chain changes: a mend appears or disappears.
    Reload,
    /// An operator retries and gives up.
    Operator,
}

const FAULTS: usize = Fault::Operator as usize + 1;

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
    /// Which process sent it.
    pub(super) process: u64,
    /// Nobody can read it any more.
    pub(super) lost: bool,
    /// It is of the stream as it is, and not of one that was deleted.
    pub(super) current: bool,
}

/// A run's world.
pub(super) struct World {
    pub(super) workload: Workload,
    pub(super) server: Mutex<Model>,
    /// The name of the store in memory, and what keeps it there.
    pub(super) store_name: String,
    _store: Mutex<Database>,
    began: Instant,
    state: Mutex<State>,
    /// Connections to S2 break.
    pub(super) cut: Notify,
}

pub(super) struct State {
    rng: SmallRng,
    weights: [f64; FAULTS],
    pub(super) stage: Stage,
    hash: u64,
    pub(super) events: u64,
    verbose: bool,
    violation: Option<String>,
    pub(super) process: Option<Arc<Process>>,
    /// Whose the store is: the last process that opened it.
    pub(super) owner: u64,
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
    /// Every record of ours that ever was in the stream, in its order.
    pub(super) history: Vec<Landed>,
    /// How many records of the stream as it is have been noted.
    noted: usize,
    /// The changes that are or were in the stream.
    pub(super) landed: BTreeSet<Position>,
    /// Records of the stream are gone, of ours or not.
    pub(super) decimated: bool,
    /// What the operator decided about records that are gone, for the next process.
    pub(super) grant: Option<LostRecords>,
    /// The operator decided so at least once.
    pub(super) granted: bool,
    /// Taken as delivered, as the operator decided.
    pub(super) excused: BTreeSet<Position>,
    /// S2 has refused a batch that was in order.
    pub(super) refused_any: bool,
    pub(super) disk_full: bool,
    pub(super) slow: bool,
    /// How far the machine's clock is off, in milliseconds.
    pub(super) clock_off_ms: i64,
    away_until: Instant,
}

impl World {
    pub(super) fn new(seed: u64, verbose: bool) -> Arc<Self> {
        let mut rng = SmallRng::seed_from_u64(seed);
        // Each run has some kinds of faults and not others, so that none hides what another one shows.
        let mut weights = [0.0; FAULTS];
        for weight in &mut weights {
            if rng.random_bool(0.5) {
                *weight = rng.random_range(0.1..1.0_f64).powi(2);
            }
        }
        // With these, a record may be gone or come twice by an operator's decision: few runs have them,
        // and all others are judged without exception. Whoever deletes a stream opens it to anybody.
        for rare in [Fault::Expire, Fault::Recreate] {
            if rng.random_bool(0.8) {
                weights[rare as usize] = 0.0;
            }
        }
        if weights[Fault::Recreate as usize] > 0.0 {
            weights[Fault::Intruder as usize] = 0.0;
        }
        let workload = Workload::draw(&mut rng);
        if verbose {
            for planned in workload.changes() {
                let Planned { change, keys, fate, .. } = planned;
                println!("{} {} {keys:?} {fate:?}", change.position, change.action);
            }
        }
        let mut server = Model::default();
        server.create(STREAM);
        static WORLDS: AtomicU64 = AtomicU64::new(0);
        let store_name = format!("world-{}", WORLDS.fetch_add(1, Ordering::Relaxed));
        let store = Database::shared(&store_name).expect("there is memory");
        let fixed = rng.random_bool(0.3);
        Arc::new(Self {
            workload,
            server: Mutex::new(server),
            store_name,
            _store: Mutex::new(store),
            began: Instant::now(),
            cut: Notify::new(),
            state: Mutex::new(State {
                rng,
                weights,
                stage: Stage::Storm,
                hash: 0xcbf2_9ce4_8422_2325,
                events: 0,
                verbose,
                violation: None,
                process: None,
                owner: 0,
                status: None,
                budget: None,
                generations: vec![fixed],
                confirmed: 0,
                persisted: 0,
                checked: 0,
                store: Mirror::default(),
                dropped: BTreeSet::new(),
                history: Vec::new(),
                noted: 0,
                landed: BTreeSet::new(),
                decimated: false,
                grant: None,
                granted: false,
                excused: BTreeSet::new(),
                refused_any: false,
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
        let weight = state.weights[fault as usize];
        state.stage == Stage::Storm && weight > 0.0 && state.rng.random_bool(weight * probability)
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
        if self.fault(Fault::Crash, 0.02) {
            let process = self.state().process.clone();
            if let Some(process) = process {
                self.note("crash", process.number, 0);
                process.kill();
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

    /// Whether the last process has been connected to S2.
    pub(super) fn is_opened(&self) -> bool {
        let state = self.state();
        state.status.as_ref().is_some_and(|status| !status.borrow().guarantee.is_empty())
    }

    pub(super) fn is_away(&self) -> bool {
        self.state().away_until > Instant::now()
    }

    /// Notes what is new in the stream, and that this process sent it.
    pub(super) fn landed(&self, process: u64) {
        let mut state = self.state();
        let mut positions = Vec::new();
        for record in lock(&self.server).records(STREAM, state.noted) {
            state.noted += 1;
            if let Some(ours) = judge::ours(&record) {
                state.landed.insert(ours.position);
                positions.push((ours.position, ours.seq));
                state.history.push(Landed { ours, process, lost: false, current: true });
            }
        }
        drop(state);
        for (position, seq) in positions {
            self.note(&format!("landed {position} by {process}"), position.index, seq);
        }
    }

    /// Lets some of the stream's records expire.
    pub(super) fn expire(&self) {
        let tail = lock(&self.server).tail(STREAM);
        let to = self.draw(|rng| rng.random_range(0..=tail));
        lock(&self.server).trim(STREAM, to);
        self.note("expired", to, tail);
        self.lose(|landed| landed.ours.seq < to);
    }

    /// Deletes the stream, and creates it again.
    pub(super) fn recreate(&self) {
        lock(&self.server).recreate(STREAM);
        self.note("recreated", 0, 0);
        self.lose(|_| true);
        let mut state = self.state();
        state.noted = 0;
        for landed in &mut state.history {
            landed.current = false;
        }
    }

    fn lose(&self, which: impl Fn(&Landed) -> bool) {
        let mut state = self.state();
        state.decimated = true;
        for landed in &mut state.history {
            landed.lost |= landed.current && which(landed);
        }
    }

    /// An operator decides that what is committed by now and not covered by a checkpoint is taken as
    /// delivered, except for what the store holds.
    pub(super) fn excuse(&self) {
        let (count, _) = self.workload.committed(self.elapsed_ms());
        let mut state = self.state();
        let checkpoint = state.store.checkpoint.position;
        let transactions = &self.workload.transactions[..count];
        let positions = transactions.iter().flat_map(|transaction| &transaction.changes);
        let positions = positions.map(|planned| planned.change.position);
        let excused: Vec<Position> = positions
            .filter(|position| *position > checkpoint && !state.store.holds(*position))
            .collect();
        state.excused.extend(excused);
    }

    /// A transaction of a process was carried out.
    pub(super) fn carried_out(&self, writes: &[Write], process: u64) {
        let mut state = self.state();
        let State { store, history, dropped, excused, .. } = &mut *state;
        let text = store.carry_out(writes, (history.len(), process));
        let unaccounted = store.unaccounted(&self.workload, history, dropped, excused);
        let too_much = store.spilled_bytes() > self.spilled_bytes_max();
        let spilled = store.spilled_bytes();
        drop(state);
        self.note(&format!("stored by {process}:{text}"), writes.len() as u64, 0);
        if let Some(text) = unaccounted {
            self.violated(text);
        }
        if too_much {
            self.violated(format!("{spilled} bytes are spilled, and that is beyond the bound"));
        }
    }

    /// What may be spilled at most: at the bound nothing more is read, but what was read by then is.
    fn spilled_bytes_max(&self) -> usize {
        let in_memory = self.workload.budget_bytes.max(self.workload.change_bytes_max());
        let bound = usize::try_from(self.workload.bounds.spill_bytes_max).unwrap_or(usize::MAX);
        bound.saturating_add(2 * in_memory)
    }

    /// Postgres is told that it may forget everything before this.
    pub(super) fn confirm(&self, lsn: u64) {
        let mut state = self.state();
        if lsn <= state.confirmed {
            return;
        }
        state.confirmed = lsn;
        let durable = state.store.checkpoint.confirm.0;
        let mut unsafe_at = None;
        while let Some(transaction) = self.workload.transactions.get(state.checked) {
            if transaction.commit_lsn >= lsn {
                break;
            }
            state.checked += 1;
            for planned in &transaction.changes {
                let position = planned.change.position;
                let is_safe = state.landed.contains(&position)
                    || state.store.holds(position)
                    || state.store.given_up.contains_key(&position)
                    || state.dropped.contains(&position)
                    || state.excused.contains(&position);
                if !is_safe {
                    unsafe_at = Some(position);
                }
            }
        }
        drop(state);
        if let Some(position) = unsafe_at {
            self.violated(format!(
                "Postgres was told to forget everything before {lsn}, and {position} is neither in \
                 the stream nor in the store"
            ));
        }
        if durable < lsn {
            self.violated(format!(
                "Postgres was told to forget everything before {lsn}, and the checkpoint on disk says \
                 {durable}"
            ));
        }
        self.event("confirmed", lsn, 0);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
