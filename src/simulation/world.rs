//! What all parts of a run share: chance, the trace, which faults there are, and what is known of the
//! store from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::folders::Copied;
use super::judge::{self, Ours};
use super::letters::{self, Paper};
use super::mirror::Mirror;
use super::process::Process;
use super::routes::{self, ROUTED};
use super::workload::{Planned, Workload};
use crate::change::Position;
use crate::pipeline::budget::ByteBudget;
use crate::pipeline::control::Status;
use crate::pipeline::grants::{Grants, LostRecords};
use crate::sink::model::Model;
use crate::store::{Database, Write};

/// The pipeline's own stream.
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
    /// Records of a stream expire.
    Expire,
    /// The pipeline's own stream is deleted and created again.
    Recreate,
    /// A stream that messages are routed to is deleted, and perhaps created again later.
    Delete,
    /// Such a stream is not there from the start.
    Missing,
    /// Such a stream is forbidden, being deleted, or away, for a while.
    Shut,
    /// S2 refuses a batch that is in order.
    RefuseRecord,
    /// The disk of the store is full.
    DiskFull,
    /// A process is started with an empty folder, or with an old copy.
    WrongFolder,
    /// The clock of the machine is set, between two processes.
    ClockJump,
    /// Somebody else appends to a stream.
    Foreign,
    /// Another pipeline wants a stream.
    Intruder,
    /// Another program fences a stream.
    Fencer,
    /// The state folder is lost.
    LoseStore,
    /// An operator grants what nobody asked for.
    Grants,
    /// The connection to Postgres breaks; it starts again at what was confirmed, or at less.
    Disconnect,
    /// The file of dead letters cannot be written, or only in part.
    Letters,
    /// A transform takes seconds.
    SlowTransform,
    /// The chain changes: a mend appears or disappears.
    Reload,
    /// An operator retries and gives up.
    Operator,
}

const FAULTS: usize = Fault::Operator as usize + 1;

/// What shows something only together. Each of these is drawn whole now and then, so that how soon it
/// shows does not hang on what else is drawn.
const TOGETHER: [Together; 2] = [
    // How far an operator skips, and a process that dies soon after it has gone on.
    Together { faults: &[Fault::Expire, Fault::Recreate, Fault::Crash, Fault::Late], moves: false },
    // A routed stream that cannot be read, with something in it that now goes elsewhere.
    Together { faults: &[Fault::Shut, Fault::Crash, Fault::Cut, Fault::Reload], moves: true },
];

struct Together {
    faults: &'static [Fault],
    /// From one chain to the next, transforms route to other streams.
    moves: bool,
}

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
    noted: BTreeMap<&'static str, usize>,
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
    shut: BTreeMap<&'static str, (u16, &'static str, Instant)>,
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
    lost_at: u64,
    /// What only a lost store held.
    abandoned: BTreeSet<Position>,
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
    rerouted: bool,
    /// Sessions with routed streams, by their processes.
    sessions: BTreeSet<(u64, &'static str)>,
    pub(super) disk_full: bool,
    pub(super) slow: bool,
    /// How far the machine's clock is off, in milliseconds.
    pub(super) clock_off_ms: i64,
    away_until: Instant,
}

impl State {
    /// A record of ours is where it belongs.
    fn lands(&mut self, ours: Ours, stream: &'static str, process: u64) {
        if ours.is_last() {
            self.landed.insert(ours.position);
            if ours.letter {
                self.letters.insert(ours.position);
            }
        }
        let again = process < self.store_since && ours.position.commit_lsn.0 >= self.lost_at;
        let is_open = self.sessions.iter().any(|(by, of)| *by >= self.store_since && *of == stream);
        let unasked = process < self.store_since && !is_open;
        let (lost, current) = (false, true);
        self.history.push(Landed { ours, stream, process, lost, current, again, unasked });
    }

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

    /// A change that goes before this one in one of its rows, and that a restart would still send.
    fn is_due_before(&self, workload: &Workload, position: Position) -> Option<Position> {
        let keys = &workload.planned(position).filter(|_| !self.landed.contains(&position))?.keys;
        let is_settled = |planned: &Planned| {
            let at = planned.change.position;
            let is_skipped = self.excused.contains(&at) && at <= self.store.checkpoint.position;
            self.landed.contains(&at)
                || self.dropped.contains(&at)
                || self.store.given_up.contains_key(&at)
                || self.abandoned.contains(&at)
                || is_skipped
        };
        let mut before =
            workload.changes().take_while(|planned| planned.change.position < position);
        let due = before.find(|planned| {
            planned.keys.iter().any(|key| keys.contains(key)) && !is_settled(planned)
        })?;
        Some(due.change.position)
    }
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
        for rare in [Fault::Expire, Fault::Recreate, Fault::Delete, Fault::LoseStore] {
            if rng.random_bool(0.8) {
                weights[rare as usize] = 0.0;
            }
        }
        let mut moves = false;
        for together in TOGETHER {
            if rng.random_bool(0.08) {
                for &fault in together.faults {
                    weights[fault as usize] = rng.random_range(0.3..1.0);
                }
                moves |= together.moves;
            }
        }
        if weights[Fault::Recreate as usize] + weights[Fault::Delete as usize] > 0.0 {
            weights[Fault::Intruder as usize] = 0.0;
        }
        let workload = Workload::draw(&mut rng, moves);
        if verbose {
            for planned in workload.changes() {
                let Planned { change, keys, fate, route, .. } = planned;
                println!("{} {} {keys:?} {fate:?} {route:?}", change.position, change.action);
            }
        }
        let mut server = Model::default();
        server.create(STREAM);
        for &stream in &streams_of(&workload)[1..] {
            let missing = weights[Fault::Missing as usize];
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
        let weight = state.weights[fault as usize];
        state.stage == Stage::Storm && weight > 0.0 && state.rng.random_bool(weight * probability)
    }

    /// Whether a process was started where letters were left, and an operator is at its messages.
    pub(super) fn mends_letters(&self, process: u64) -> bool {
        let state = self.state();
        state.stage == Stage::Storm && state.after_letters == process
    }

    /// Whether a fault may happen in this run.
    pub(super) fn may(&self, fault: Fault) -> bool {
        self.state().weights[fault as usize] > 0.0
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

    /// Notes what is new in the streams, and that this process sent it.
    pub(super) fn landed(&self, process: u64) {
        let mut state = self.state();
        if let Some(stream) = lock(&self.server).unguarded.take() {
            let text = format!("a batch went to {stream} without a fencing token");
            state.violation.get_or_insert(text);
        }
        let mut landed = Vec::new();
        for &stream in self.streams() {
            let noted = state.noted.get(stream).copied().unwrap_or_default();
            let new = lock(&self.server).records(stream, noted);
            if !new.is_empty() && state.strangers.contains(&process) {
                let text = format!("process {process} with another folder wrote to {stream}");
                state.violation.get_or_insert(text);
            }
            state.noted.insert(stream, noted + new.len());
            let ours = new.iter().filter_map(judge::ours).next();
            if let Some(ours) = ours
                && stream != STREAM
                && process >= state.store_since
                && !state.store.streams.contains_key(stream)
            {
                let text = format!(
                    "{} landed in {stream}, and the store does not know that anything may be there",
                    ours.position
                );
                state.violation.get_or_insert(text);
            }
            for ours in new.iter().filter_map(judge::ours) {
                let is_ours = process >= state.store_since;
                if let Some(before) = state.is_due_before(&self.workload, ours.position)
                    && is_ours
                {
                    let text = format!(
                        "{} landed in {stream}, and a restart would send {before} behind it",
                        ours.position
                    );
                    state.violation.get_or_insert(text);
                }
                let is_stored = || state.store.has_part(ours.position, ours.part);
                if self.is_in_portions(&ours) && is_ours && !is_stored() {
                    let text = format!(
                        "part {} of {} landed in {stream}, and is not in the store",
                        ours.part, ours.position
                    );
                    state.violation.get_or_insert(text);
                }
                landed.push((ours.position, stream, ours.seq));
                state.lands(ours, stream, process);
            }
        }
        drop(state);
        for (position, stream, seq) in landed {
            let text = format!("landed {position} in {stream} by {process}");
            self.note(&text, position.index, seq);
        }
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

    /// Another program fences a stream.
    pub(super) fn fence(&self, stream: &'static str) {
        let token = format!("another-{}", self.elapsed_ms());
        if lock(&self.server).fence(stream, &token) {
            self.landed(0);
            self.note(&format!("{stream} is fenced by another program"), 0, 0);
            self.state().fenced.insert(stream);
        }
    }

    /// Whether a record is of a change that no batch holds.
    pub(super) fn is_in_portions(&self, ours: &Ours) -> bool {
        ours.parts as usize > self.workload.limits.batch_records
    }

    /// Notes what is new in the file of dead letters, and that this process wrote it.
    pub(super) fn filed(&self, process: u64) {
        let mut state = self.state();
        for news in state.paper.news() {
            let wrong = match &news {
                _ if state.strangers.contains(&process) => {
                    Some(format!("process {process} with another folder wrote dead letters"))
                }
                Ok(_) => None,
                Err(text) => Some(text.clone()),
            };
            if let Some(text) = wrong {
                state.violation.get_or_insert(text);
            }
            if let Ok(ours) = news {
                state.lands(ours, letters::FILE, process);
            }
        }
        drop(state);
        self.note("filed", process, 0);
    }

    /// Lets some of a stream's records expire.
    pub(super) fn expire(&self, stream: &'static str) {
        let tail = lock(&self.server).tail(stream);
        let to = self.draw(|rng| rng.random_range(0..=tail));
        lock(&self.server).trim(stream, to);
        self.note(&format!("expired in {stream}"), to, tail);
        self.lose(stream, |landed| landed.ours.seq < to);
    }

    /// Deletes a stream, and creates it again or not.
    pub(super) fn delete(&self, stream: &'static str, again: bool) {
        if again {
            lock(&self.server).recreate(stream);
        } else {
            lock(&self.server).delete(stream);
        }
        self.note(&format!("deleted {stream}"), u64::from(again), 0);
        self.lose(stream, |_| true);
        let mut state = self.state();
        state.deleted.insert(stream);
        state.noted.remove(stream);
        for landed in state.history.iter_mut().filter(|landed| landed.stream == stream) {
            landed.current = false;
        }
    }

    /// Creates the streams that are not there.
    pub(super) fn create_missing(&self) {
        for &stream in self.streams() {
            lock(&self.server).create(stream);
        }
    }

    /// A stream that messages are routed to answers nothing else for a while.
    pub(super) fn shut(&self, stream: &'static str) {
        const ANSWERS: [(u16, &str); 4] = [
            (403, "permission_denied"),
            (409, "stream_deletion_pending"),
            (429, "rate_limited"),
            (503, "unavailable"),
        ];
        let (status, code) = self.draw(|rng| ANSWERS[rng.random_range(0..ANSWERS.len())]);
        let time =
            if self.chance(0.5) { self.between(10, 2000) } else { self.between(100, 25_000) };
        self.note(&format!("{stream} is shut: {code}"), u64::from(status), 0);
        self.state().shut.insert(stream, (status, code, Instant::now() + time));
        // What it was sent may be in it, and its answers are lost.
        if self.chance(0.5) {
            self.cut.notify_waiters();
            self.reroute();
        }
    }

    /// The stream, where it is another than the pipeline's own and is to be shut just when it has taken
    /// something, which it does not answer.
    pub(super) fn shuts_unanswered(&self, stream: &str) -> Option<&'static str> {
        let stream = routes::beside_own(stream).filter(|stream| self.is_shut(stream).is_none())?;
        self.fault(Fault::Shut, 0.1).then_some(stream)
    }

    /// Somebody routes what is in doubt to another stream, perhaps.
    pub(super) fn reroute(&self) {
        let rerouted = self.may(Fault::Reload) && self.chance(0.5);
        self.state().rerouted |= rerouted;
    }

    /// A routed stream is shut at a start: most often the one that got something last which no checkpoint
    /// covers, so that the start would have to read it. Says whether it is that one.
    pub(super) fn shut_at_start(&self) -> bool {
        let routed = &self.streams()[1..];
        if routed.is_empty() {
            return false;
        }
        let uncovered = {
            let state = self.state();
            let is_uncovered = |landed: &&Landed| {
                let is_beyond = landed.ours.position > state.store.checkpoint.position;
                landed.current && routed.contains(&landed.stream) && is_beyond
            };
            state.history.iter().rev().find(is_uncovered).map(|landed| landed.stream)
        };
        let stream = match uncovered.filter(|_| self.chance(0.7)) {
            Some(stream) => stream,
            None => self.draw(|rng| routed[rng.random_range(0..routed.len())]),
        };
        self.shut(stream);
        uncovered == Some(stream)
    }

    /// Whether the chain changes because what a stream was sent is in doubt, once.
    pub(super) fn is_rerouted(&self) -> bool {
        std::mem::take(&mut self.state().rerouted)
    }

    /// A request about a stream fails, and its process may not have read that yet.
    pub(super) fn fails_unread(&self, stream: &str, process: u64) {
        let Some(stream) = routes::beside_own(stream) else { return };
        let mut state = self.state();
        let is_read = state.sessions.contains(&(process, stream));
        state.unread_any |= !is_read && state.store.streams.contains_key(stream);
    }

    /// A process has read a stream.
    pub(super) fn has_session(&self, stream: &str, process: u64) {
        if let Some(stream) = routes::stream(stream) {
            self.state().sessions.insert((process, stream));
        }
    }

    /// What a stream answers that is shut.
    pub(super) fn is_shut(&self, stream: &str) -> Option<(u16, &'static str)> {
        let state = self.state();
        let (status, code, until) = state.shut.get(stream)?;
        (*until > Instant::now()).then_some((*status, code))
    }

    fn lose(&self, stream: &'static str, which: impl Fn(&Landed) -> bool) {
        let mut state = self.state();
        state.decimated.insert(stream);
        for landed in state.history.iter_mut().filter(|landed| landed.stream == stream) {
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
        let planned = transactions.iter().flat_map(|transaction| &transaction.changes);
        let is_held = |position| state.store.messages.values().any(|held| *held == position);
        // Of the pipeline's own stream this is decided when a change is read, before it is known where it
        // goes; of another one when it is about to go there, out of the spill too.
        let is_meant = |planned: &&Planned| {
            let position = planned.change.position;
            let is_gone = |stream| state.decimated.contains(stream);
            let read = is_gone(STREAM) && !state.store.holds(position);
            let routed = planned.route.streams().any(is_gone) && !is_held(position);
            position > checkpoint && (read || routed)
        };
        let excused: Vec<Position> =
            planned.filter(is_meant).map(|planned| planned.change.position).collect();
        state.excused.extend(excused);
    }

    /// A transaction of a process was carried out.
    pub(super) fn carried_out(&self, writes: &[Write], process: u64) {
        let mut state = self.state();
        let State { store, history, dropped, excused, deleted, letters, store_since, .. } =
            &mut *state;
        let untold = writes.iter().find_map(|write| {
            let Write::DeadLetter { id } = write else { return None };
            store.messages.get(id).filter(|position| !letters.contains(*position)).copied()
        });
        let text = store.carry_out(writes, (history.len(), process));
        let from_here: Vec<&Landed> =
            history.iter().filter(|landed| landed.process >= *store_since).collect();
        let unaccounted =
            store.unaccounted(&self.workload, history, &from_here, dropped, excused, deleted);
        let too_much = store.spilled_bytes() > self.spilled_bytes_max();
        let spilled = store.spilled_bytes();
        drop(state);
        self.note(&format!("stored by {process}:{text}"), writes.len() as u64, 0);
        if let Some(text) = unaccounted {
            self.violated(text);
        }
        if let Some(position) = untold {
            self.violated(format!("{position} left the store as a dead letter, which is nowhere"));
        }
        if too_much {
            self.violated(format!("{spilled} bytes are spilled, and that is beyond the bound"));
        }
    }

    /// A transaction of a process that woke up was carried out on a store that is lost. Until it is fenced
    /// out, it sends, and in the order that its own store keeps.
    pub(super) fn held_by_lost(&self, writes: &[Write]) {
        let held = writes.iter().filter_map(|write| {
            let Write::Insert { change, .. } = write else { return None };
            Some(change.position)
        });
        self.state().store.ever.extend(held);
    }

    /// What may be spilled at most: at the bound nothing more is read, but what was read by then is.
    fn spilled_bytes_max(&self) -> usize {
        let in_memory = self.workload.budget_bytes.max(self.workload.change_bytes_max());
        let bound = usize::try_from(self.workload.bounds.spill_bytes_max).unwrap_or(usize::MAX);
        bound.saturating_add(2 * in_memory)
    }

    /// Postgres is told that it may forget everything before this.
    pub(super) fn confirm(&self, lsn: u64, process: u64) {
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
                "Postgres was told by process {process} to forget everything before {lsn}, and the \
                 checkpoint on disk says {durable}"
            ));
        }
        self.event("confirmed", lsn, 0);
    }
}

fn streams_of(workload: &Workload) -> &'static [&'static str] {
    const ALL: [&str; ROUTED.len() + 2] =
        [STREAM, ROUTED[0], ROUTED[1], ROUTED[2], letters::STREAM];
    const UNROUTED: [&str; 2] = [STREAM, letters::STREAM];
    match (workload.routes, workload.has_letter_stream()) {
        (true, true) => &ALL,
        (true, false) => &ALL[..=ROUTED.len()],
        (false, true) => &UNROUTED,
        (false, false) => &UNROUTED[..1],
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
