//! What all parts of a run share: chance, the trace, which faults there are, and what is known of the
//! store from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::process::Process;
use super::workload::{Planned, Workload};
use crate::change::Position;
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
    /// S2 refuses a batch that is in order.
    RefuseRecord,
    /// The disk of the store is full.
    DiskFull,
    /// Somebody else appends to the stream.
    Foreign,
    /// Another pipeline wants the stream.
    Intruder,
    /// The connection to Postgres breaks; it starts again at what was confirmed, or at less.
    Disconnect,
    /// The chain changes: a mend appears or disappears.
    Reload,
    /// An operator retries and gives up.
    Operator,
}

const FAULTS: usize = Fault::Operator as usize + 1;

/// A run's world.
pub(super) struct World {
    pub(super) workload: Workload,
    pub(super) server: Mutex<Model>,
    pub(super) database: Mutex<Database>,
    began: tokio::time::Instant,
    state: Mutex<State>,
}

pub(super) struct State {
    rng: SmallRng,
    weights: [f64; FAULTS],
    /// No more faults: everything is to heal.
    calm: bool,
    hash: u64,
    pub(super) events: u64,
    verbose: bool,
    violation: Option<String>,
    pub(super) process: Option<Arc<Process>>,
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
    /// Which process sent each record of the stream, by sequence number.
    pub(super) senders: Vec<u64>,
    /// The changes that are in the stream.
    pub(super) landed: BTreeSet<Position>,
    /// S2 has refused a batch that was in order.
    pub(super) refused_any: bool,
    pub(super) disk_full: bool,
    pub(super) slow: bool,
}

/// What the store holds, told by the transactions that it carried out.
#[derive(Default)]
pub(super) struct Mirror {
    pub(super) messages: BTreeMap<u64, Position>,
    /// What the last checkpoint on disk says may be confirmed.
    pub(super) confirm: u64,
    /// Everything that ever was in it.
    pub(super) ever: BTreeSet<Position>,
    /// Given up: how long the stream was then, and by which process.
    pub(super) given_up: BTreeMap<Position, (u64, u64)>,
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
        let workload = Workload::draw(&mut rng);
        if verbose {
            for planned in workload.changes() {
                let Planned { change, keys, fate } = planned;
                println!("{} {} {keys:?} {fate:?}", change.position, change.action);
            }
        }
        let mut server = Model::default();
        server.create(STREAM);
        let database = Database::in_memory().expect("there is memory");
        let fixed = rng.random_bool(0.3);
        Arc::new(Self {
            workload,
            server: Mutex::new(server),
            database: Mutex::new(database),
            began: tokio::time::Instant::now(),
            state: Mutex::new(State {
                rng,
                weights,
                calm: false,
                hash: 0xcbf2_9ce4_8422_2325,
                events: 0,
                verbose,
                violation: None,
                process: None,
                generations: vec![fixed],
                confirmed: 0,
                persisted: 0,
                checked: 0,
                store: Mirror::default(),
                dropped: BTreeSet::new(),
                senders: Vec::new(),
                landed: BTreeSet::new(),
                refused_any: false,
                disk_full: false,
                slow: false,
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
        !state.calm && weight > 0.0 && state.rng.random_bool(weight * probability)
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

    pub(super) fn is_calm(&self) -> bool {
        self.state().calm
    }

    /// Ends all faults.
    pub(super) fn calm(&self) {
        let mut state = self.state();
        (state.calm, state.disk_full, state.slow) = (true, false, false);
    }

    /// Notes what is new in the stream, and that this process sent it.
    pub(super) fn landed(&self, process: u64) {
        let mut state = self.state();
        let from = state.senders.len();
        let mut positions = Vec::new();
        for record in lock(&self.server).records(STREAM, from) {
            state.senders.push(process);
            if let Some(ours) = super::judge::ours(&record) {
                state.landed.insert(ours.position);
                positions.push(ours.position);
            }
        }
        drop(state);
        for position in positions {
            self.note(&format!("landed {position}"), position.index, process);
        }
    }

    /// A transaction of a process was carried out.
    pub(super) fn carried_out(&self, writes: &[Write], process: u64) {
        let tail = lock(&self.server).tail(STREAM);
        let mut text = String::new();
        {
            let mut state = self.state();
            let store = &mut state.store;
            for write in writes {
                match write {
                    Write::Insert { id, change, .. } => {
                        store.messages.insert(*id, change.position);
                        store.ever.insert(change.position);
                        text += &format!(" +{id}@{}", change.position);
                    }
                    Write::Remove { id } => {
                        store.messages.remove(id);
                        text += &format!(" -{id}");
                    }
                    Write::Acknowledge { id } => {
                        if let Some(position) = store.messages.remove(id) {
                            store.given_up.insert(position, (tail, process));
                        }
                        text += &format!(" given up {id}");
                    }
                    Write::Checkpoint(checkpoint) => {
                        store.confirm = checkpoint.confirm.0;
                        text += &format!(
                            " checkpoint {} seq {} confirm {}",
                            checkpoint.position, checkpoint.seq, checkpoint.confirm.0
                        );
                    }
                    Write::Failed { .. }
                    | Write::Chain { .. }
                    | Write::SourceIdentity { .. }
                    | Write::Spill { .. }
                    | Write::Unspill { .. } => {}
                }
            }
        }
        self.note(&format!("stored by {process}:{text}"), writes.len() as u64, tail);
    }

    /// Postgres is told that it may forget everything before this.
    pub(super) fn confirm(&self, lsn: u64) {
        let mut state = self.state();
        if lsn <= state.confirmed {
            return;
        }
        state.confirmed = lsn;
        let durable = state.store.confirm;
        let mut unsafe_at = None;
        while let Some(transaction) = self.workload.transactions.get(state.checked) {
            if transaction.commit_lsn >= lsn {
                break;
            }
            state.checked += 1;
            let held: BTreeSet<Position> = state.store.messages.values().copied().collect();
            for planned in &transaction.changes {
                let position = planned.change.position;
                let is_safe = state.landed.contains(&position)
                    || held.contains(&position)
                    || state.store.given_up.contains_key(&position)
                    || state.dropped.contains(&position);
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
