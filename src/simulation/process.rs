//! One running Sluicebox: the real driver over the world's parts, until it dies.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::faults::Fault;
use super::network::Network;
use super::operator;
use super::postgres;
use super::workload::{FailureClass, Fate};
use super::world::{STREAM, Stage, World, lock};
use crate::clock::Clock;
use crate::message::Draft;
use crate::pipeline::budget::ByteBudget;
use crate::pipeline::control::{Control, ErrorView, Filter, Status};
use crate::pipeline::driver::{self, Bounds, Parts};
use crate::pipeline::grants::{Grants, LostRecords};
use crate::pipeline::heartbeat::heartbeat;
use crate::pipeline::item::{Item, Origin, Shaped};
use crate::pipeline::sample::{Sample, Sampler};
use crate::pipeline::workers::{self, Done, Job, Workers};
use crate::policy::Backoff;
use crate::sink::model::REFUSED_HEADER;
use crate::sink::{Client, Endpoint, Settings};
use crate::source::Resume;
use crate::store::{self, Database, Error, Loaded, Store, Task};
use crate::transform::{Chain, Class, Failure, Outcome};

/// The file name of the one transform.
const TRANSFORM: &str = "10-simulated.wasm";

/// A process, as the rest of the world sees it.
pub(super) struct Process {
    pub(super) number: u64,
    alive: AtomicBool,
    frozen: AtomicBool,
    frozen_once: AtomicBool,
    /// It was told to take as delivered what nobody can know of.
    pub(super) excuses: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
    tasks: Mutex<Vec<AbortHandle>>,
    /// It died, or stands still: time for another one.
    pub(super) gone: Notify,
}

impl Process {
    fn new(number: u64) -> Arc<Self> {
        Arc::new(Self {
            number,
            alive: AtomicBool::new(true),
            frozen: AtomicBool::new(false),
            frozen_once: AtomicBool::new(false),
            excuses: AtomicBool::new(false),
            wakers: Mutex::default(),
            tasks: Mutex::default(),
            gone: Notify::new(),
        })
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }

    /// Whether it ever stood still: others took over what it had.
    pub(super) fn is_frozen(&self) -> bool {
        self.frozen_once.load(Ordering::Relaxed)
    }

    /// A task that ends with the process.
    pub(super) fn owns(&self, task: AbortHandle) {
        if !self.is_alive() {
            task.abort();
        }
        lock(&self.tasks).push(task);
    }

    /// `kill -9`: nothing of it runs on from here.
    pub(super) fn kill(&self) {
        self.alive.store(false, Ordering::Relaxed);
        for task in lock(&self.tasks).drain(..) {
            task.abort();
        }
        self.gone.notify_one();
    }

    fn freeze(&self) {
        self.frozen_once.store(true, Ordering::Relaxed);
        self.frozen.store(true, Ordering::Relaxed);
        self.gone.notify_one();
    }

    fn thaw(&self) {
        self.frozen.store(false, Ordering::Relaxed);
        lock(&self.wakers).drain(..).for_each(Waker::wake);
    }
}

/// How often a part of a process may be asked to go on within a second of the world's clock.
const POLLS_MAX: u32 = 5_000;

/// Runs a part of a process, and not while the process stands still. One that goes on and on while the
/// clock stands still would never let it move again, so that this is noticed here.
pub(super) struct Freezing<F> {
    inner: Pin<Box<F>>,
    process: Arc<Process>,
    world: Arc<World>,
    polls: u32,
    second: Instant,
}

impl<F> Freezing<F> {
    pub(super) fn new(world: &Arc<World>, process: &Arc<Process>, inner: F) -> Self {
        let (world, process) = (Arc::clone(world), Arc::clone(process));
        Self { inner: Box::pin(inner), process, world, polls: 0, second: Instant::now() }
    }

    /// Whether it is still within what is usual.
    fn is_usual(&mut self) -> bool {
        let now = Instant::now();
        if now.duration_since(self.second) >= Duration::from_secs(1) {
            (self.polls, self.second) = (0, now);
        }
        self.polls += 1;
        self.polls <= POLLS_MAX
    }
}

impl<F: Future> Future for Freezing<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        if self.process.frozen.load(Ordering::Relaxed) {
            lock(&self.process.wakers).push(context.waker().clone());
            return Poll::Pending;
        }
        if !self.is_usual() {
            let number = self.process.number;
            self.world.violated(format!(
                "process {number} spins: {POLLS_MAX} steps within a second of its clock"
            ));
            self.process.kill();
            return Poll::Pending;
        }
        self.inner.as_mut().poll(context)
    }
}

/// A running process and the means to talk to it.
pub(super) struct Running {
    pub(super) process: Arc<Process>,
    pub(super) control: Control,
    chains: watch::Sender<Arc<Chain>>,
    pub(super) shutdown: CancellationToken,
    pub(super) driver: JoinHandle<Result<(), driver::Error>>,
}

/// The number in a token of a pipeline of ours, as a store counts them.
pub(super) fn epoch_of(token: &str) -> Option<u64> {
    u64::from_str_radix(token.split('-').nth(2)?, 16).ok()
}

/// Starts a process on the world's store.
pub(super) fn start(world: &Arc<World>, number: u64) -> Running {
    if number > 1 && world.fault(Fault::LoseStore, 0.2) {
        world.lose_store(number);
        // Whoever does not know yet reads it.
        world.state().abandon = world.chance(0.5);
    }
    let mut database = Database::shared(&world.store_name()).expect("the store can be opened");
    let loaded = {
        let mut rng = world.draw(rand::rngs::SmallRng::from_rng);
        database.load(&mut rng).expect("the store can be read")
    };
    {
        let mut state = world.state();
        state.owner = number;
        if std::mem::take(&mut state.letters_left) {
            state.after_letters = number;
        }
    }
    super::judge::store_is_as_told(world, &loaded);
    world.note("start", number, loaded.messages.len() as u64);
    let is_unread = number > 1 && world.fault(Fault::Shut, 0.4) && world.shut_at_start();
    // What operators do between two runs: now and then about just what cannot be read now.
    let rerouted = is_unread && world.may(Fault::Reload) && world.chance(0.5);
    if rerouted || world.fault(Fault::Reload, 0.3) {
        another_chain(world);
    }
    if world.fault(Fault::ClockJump, 0.5) {
        let off = world.draw(|rng| rng.random_range(-1_000_000_000..1_000_000_000));
        world.state().clock_off_ms = off;
    }
    let grants = operator::grants(world);
    run(world, number, database, loaded, grants)
}

/// Runs a process on a store.
pub(super) fn run(
    world: &Arc<World>,
    number: u64,
    database: Database,
    loaded: Loaded,
    grants: Grants,
) -> Running {
    let process = Process::new(number);
    if grants.abandon_parked {
        world.state().granted_ownership.push(Arc::clone(&process));
    }
    if grants.lost_records == Some(LostRecords::Skip) {
        process.excuses.store(true, Ordering::Relaxed);
    }
    let shutdown = CancellationToken::new();
    let budget = Arc::new(ByteBudget::new(world.workload.budget_bytes));
    let resume = Resume::from(&loaded);
    let source = postgres::start(world, &process, &resume, Arc::clone(&budget), shutdown.clone());
    let (workers, finished) = workers(world, &process);
    let chain = chain(world);
    let (chains, chains_in) = watch::channel(chain);
    let (requests_in, requests) = mpsc::channel(64);
    let (status_in, status) = watch::channel(Status::default());
    let (beat, heart) = heartbeat();
    let control = Control::new(requests_in, status.clone(), heart);
    let parts = Parts {
        settings: driver::Settings {
            window: world.workload.window,
            grants,
            retry: Backoff { min: Duration::from_millis(200), max: Duration::from_secs(5) },
            dead_letters: world.workload.dead_letters.clone(),
            bounds: if world.state().strangers.contains(&number) {
                // It would confirm what it has spilled, which Postgres then denies the right folder.
                Bounds { spill_bytes_max: 0, ..world.workload.bounds }
            } else {
                world.workload.bounds
            },
            portions: world.workload.portions,
            stuck_after: Duration::from_secs(20),
            guarantee: None,
            pipeline_name: "simulated".to_owned(),
            database_name: "simulated".to_owned(),
            hostname: "simulated".to_owned(),
            unguarded: false,
        },
        store: store(world, &process, database),
        loaded,
        source,
        budget: Arc::clone(&budget),
        chains: chains_in,
        sampler: Sampler::new(Sample::default()),
        workers,
        letters: super::letters::writer(world, &process),
        client: client(world, &process),
        clock: Clock::starting_at(time_of_day(world)),
        rng: world.draw(rand::rngs::SmallRng::from_rng),
        status: status_in,
        heart: beat,
        shutdown: shutdown.clone(),
    };
    let run = driver::run(parts, finished, requests);
    let driver = tokio::spawn(Freezing::new(world, &process, run));
    process.owns(driver.abort_handle());
    {
        let mut state = world.state();
        state.process = Some(Arc::clone(&process));
        (state.status, state.budget) = (Some(status), Some(budget));
    }
    Running { process, control, chains, shutdown, driver }
}

fn time_of_day(world: &World) -> SystemTime {
    let off = world.state().clock_off_ms;
    let ms = 1_700_000_000_000_u64.saturating_add_signed(off) + world.elapsed_ms();
    UNIX_EPOCH + Duration::from_millis(ms)
}

impl Running {
    /// Waits until the process is no more: dead, ended, or another one's turn.
    pub(super) async fn end(mut self, world: &Arc<World>) {
        let number = self.process.number;
        let ended = tokio::select! {
            biased;
            () = self.process.gone.notified() => None,
            ended = &mut self.driver => Some(ended),
        };
        match ended {
            None if self.process.is_alive() => {
                world.note("frozen", number, 0);
                tokio::spawn(zombie(Arc::clone(world), self));
            }
            None => {}
            Some(Ok(Ok(()))) => {
                world.note("stopped", number, 0);
                self.process.kill();
            }
            Some(Ok(Err(error))) => {
                let text = crate::error_chain::error_chain(&error);
                self.process.kill();
                // Records are gone, and an operator reads what to choose from.
                let deleted = world.state().deleted.contains(STREAM);
                if !world.state().decimated.is_empty() && operator::asks_to_decide(&text) {
                    operator::decide(world, number);
                    operator::grants_again(world);
                } else if deleted && text.contains("--take-over") {
                    // A zombie woke up just when it had no token. It finds out when it is fenced.
                    world.note("it is to take the stream over", number, 0);
                    world.state().take_over = true;
                } else if operator::grants_ownership(world, &text) {
                    world.note("it is to take the stream from others", number, 0);
                    operator::grants_again(world);
                } else {
                    world.violated(format!("process {number} ended by itself: {text}"));
                }
            }
            Some(Err(broken)) if broken.is_panic() => {
                let panic = broken.into_panic();
                let text = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied());
                world.violated(format!(
                    "process {number} panicked: {}",
                    text.unwrap_or("without a word")
                ));
                self.process.kill();
            }
            Some(Err(_)) => {}
        }
    }

    /// What comes from outside while it runs: reloads, operators, shutdowns, and standing still.
    pub(super) async fn bother(
        process: Arc<Process>,
        control: Control,
        chains: watch::Sender<Arc<Chain>>,
        shutdown: CancellationToken,
        world: Arc<World>,
    ) {
        while process.is_alive() && !process.is_frozen() {
            sleep(world.between(20, 400)).await;
            super::judge::nothing_waits_for_what_is_shut(&world);
            // Who sees that attempts are spent mends it at once, and finds what has become of them.
            let mended = world.mends_letters(process.number) && world.chance(0.5);
            if mended && world.chance(0.5) {
                drop(control.retry(Filter::default()).await);
            } else if mended || world.is_rerouted() || world.fault(Fault::Reload, 0.15) {
                reload(&world, &chains);
            }
            if world.fault(Fault::Operator, 0.2) {
                operator::operate(&world, &control).await;
            }
            let undecided = operator::wants_decision(&world);
            if undecided {
                operator::decide(&world, process.number);
            }
            let is_anothers = operator::wants_ownership(&world);
            if is_anothers {
                // What was granted is of no use without that.
                operator::grants_again(&world);
            }
            if undecided || is_anothers || world.fault(Fault::Shutdown, 0.05) {
                world.note("shutdown", process.number, 0);
                shutdown.cancel();
            }
            if world.fault(Fault::Freeze, 0.05) {
                process.freeze();
            }
            if world.fault(Fault::DiskFull, 0.1) {
                world.note("disk full", 0, 0);
                world.state().disk_full = true;
            } else if world.chance(0.3) {
                world.state().disk_full = false;
            }
            let slow = world.fault(Fault::Slow, 0.1);
            if slow || world.chance(0.3) {
                world.state().slow = slow;
            }
            if world.stage() == Stage::Mended {
                if !world.state().generations.last().copied().unwrap_or(false) {
                    reload(&world, &chains);
                }
                // What was refused for its size is tried again by hand, and all else by itself.
                let parked = Filter { state: Some("parked".to_owned()), ..Filter::default() };
                drop(control.retry(parked).await);
            }
        }
    }

    /// Its doings from outside, as a task.
    pub(super) fn bothered(&self, world: &Arc<World>) -> AbortHandle {
        tokio::spawn(Self::bother(
            Arc::clone(&self.process),
            self.control.clone(),
            self.chains.clone(),
            self.shutdown.clone(),
            Arc::clone(world),
        ))
        .abort_handle()
    }
}

/// A process that others have taken for dead wakes up, and has to find out.
async fn zombie(world: Arc<World>, running: Running) {
    sleep(world.between(10, 20_000)).await;
    world.note("wakes up", running.process.number, 0);
    running.process.thaw();
    let ended = tokio::time::timeout(Duration::from_secs(60), running.driver).await;
    world.note("zombie ends", running.process.number, u64::from(ended.is_ok()));
    running.process.kill();
}

fn chain(world: &World) -> Arc<Chain> {
    Arc::new(Chain::empty(world.state().generations.len() as u64 - 1))
}

fn another_chain(world: &World) {
    let fixed = world.stage() == Stage::Mended || world.chance(0.5);
    world.state().generations.push(fixed);
}

fn reload(world: &World, chains: &watch::Sender<Arc<Chain>>) {
    another_chain(world);
    let chain = chain(world);
    world.note("reload", chain.generation, 0);
    chains.send_replace(chain);
}

/// S2 as this process reaches it.
pub(super) fn client(world: &Arc<World>, process: &Arc<Process>) -> Client {
    let settings = Settings {
        endpoint: Endpoint::Url("http://s2.simulated".to_owned()),
        create: world.workload.create,
        mode: world.workload.mode,
        ..Settings::new("simulated", STREAM)
    };
    Client::over(Arc::new(Network::new(world, process)), settings).expect("the settings are right")
}

/// Somebody else's process.
pub(super) fn stranger() -> Arc<Process> {
    Process::new(0)
}

/// An empty store that nothing happens to.
pub(super) fn store_of_its_own() -> Store {
    let database = Database::shared("").expect("there is memory");
    let shared = Arc::new(Mutex::new(database));
    let database = Arc::clone(&shared);
    Store::over(&lock(&shared), move |task| {
        let _ = task.carry_out(&mut lock(&database));
    })
}

/// The world's store as this process has it open, over a thread that takes its time and dies with the
/// process.
fn store(world: &Arc<World>, process: &Arc<Process>, mut database: Database) -> Store {
    let (tasks, mut received) = mpsc::unbounded_channel::<Task>();
    let number = process.number;
    let store = Store::over(&database, move |task| drop(tasks.send(task)));
    let owner = Arc::clone(process);
    let of_world = Arc::clone(world);
    let since = world.state().store_since;
    let thread = async move {
        let world = of_world;
        while let Some(task) = received.recv().await {
            sleep(world.delay()).await;
            let full = (task.writes() || task.reads_changes()) && world.state().disk_full;
            // What is left of the letters is asked for before anybody could look into their file.
            let unread = task.reads_changes() && world.mends_letters(number) && world.chance(0.5);
            if full || unread {
                task.refuse(Error::Full);
                continue;
            }
            world.event("store is asked", number, u64::from(task.writes()));
            if !owner.is_alive() {
                return;
            }
            let transaction = task.transaction();
            let written = task.carry_out(&mut database);
            let (is_strange, is_lost) = {
                let state = world.state();
                (state.strangers.contains(&number), state.store_since != since)
            };
            let Some(writes) = transaction.filter(|_| written && !is_strange) else { continue };
            if is_lost {
                world.held_by_lost(&writes);
                continue;
            }
            if world.state().owner != number {
                world.violated(format!("process {number} wrote to a store that was taken over"));
            }
            world.carried_out(&writes, number);
            world.event("stored", number, 0);
        }
    };
    let thread = tokio::spawn(Freezing::new(world, process, thread));
    process.owns(thread.abort_handle());
    store
}

/// Transforms that do what the workload says, in any order.
fn workers(world: &Arc<World>, process: &Arc<Process>) -> (Workers, mpsc::UnboundedReceiver<Done>) {
    let (done, finished) = mpsc::unbounded_channel();
    let (world, process) = (Arc::clone(world), Arc::clone(process));
    let count = world.workload.workers;
    let submit = move |job: Job| {
        let (world, done, owner) = (Arc::clone(&world), done.clone(), Arc::clone(&process));
        let task = tokio::spawn(async move {
            sleep(world.delay()).await;
            // What is tried again is on its way while its stream is opened.
            let again = job.items.iter().all(|item| matches!(item.origin, Origin::Store { .. }));
            if world.fault(Fault::SlowTransform, if again { 0.4 } else { 0.1 }) {
                sleep(world.between(100, 5000)).await;
            }
            world.event("shaped", job.number, job.items.len() as u64);
            let Job { number, chain, envelope, items } = job;
            let generation = chain.generation;
            let fixed = {
                let index = usize::try_from(generation).expect("generations are few");
                world.state().generations[index]
            };
            let shape = |item: Item| {
                super::letters::is_not_there(&world, &owner, &item);
                let draft = Draft::new(item.change.clone(), Arc::clone(&envelope));
                let shaped = match outcome(&world, &item, draft, generation, fixed) {
                    Made::Oversize(failure) => Shaped::Failed(failure),
                    Made::By(outcome) => workers::measured(outcome, Vec::new),
                };
                if matches!(shaped, Shaped::Failed(_)) {
                    *world.state().failures.entry(item.change.position).or_default() += 1;
                }
                (item, shaped)
            };
            let mut items = items;
            let tried = if chain.left_for().is_some() && world.fault(Fault::SlowTransform, 0.5) {
                world.draw(|rng| rng.random_range(0..=items.len()))
            } else {
                items.len()
            };
            let untried = items.split_off(tried);
            let results: Vec<(Item, Shaped)> = items.into_iter().map(shape).collect();
            if world.is_verbose() {
                for (item, shaped) in &results {
                    let shaped = match shaped {
                        Shaped::Records(records) => format!("{} records", records.len()),
                        Shaped::Dropped => "dropped".to_owned(),
                        Shaped::Failed(_) | Shaped::Halt(_) => "failed".to_owned(),
                    };
                    println!("             {} {:?}: {shaped}", item.change.position, item.origin);
                }
            }
            drop(done.send(Done { number, generation, results, untried }));
        });
        process.owns(task.abort_handle());
        true
    };
    (Workers::over(count, submit), finished)
}

/// What the transforms made of a change, or the size gate behind them.
enum Made {
    By(Outcome),
    Oversize(Box<store::Failure>),
}

fn outcome(world: &World, item: &Item, mut draft: Draft, generation: u64, fixed: bool) -> Made {
    let position = item.change.position;
    let Some(planned) = world.workload.planned(position) else {
        world.violated(format!("{position} was never committed and went through the transforms"));
        return Made::By(Outcome::Keep(Vec::new()));
    };
    draft.route_to(planned.route.by(generation)).expect("it is a name");
    let parts = match planned.fate {
        Fate::Plain => 1,
        Fate::Split(parts) => parts,
        Fate::Dropped => 0,
        Fate::Fickle(parts) => parts[usize::from(generation % 2 == 1)],
        Fate::Failing { class, .. } if !fixed => return failed(class),
        Fate::Failing { parts, .. } => parts,
        Fate::Flaky if world.stage() == Stage::Storm && world.chance(0.5) => {
            return failed(FailureClass::Trap);
        }
        Fate::Flaky => 1,
        Fate::Refused { oversize, parts } => {
            if !fixed {
                let text: &[u8] = if oversize { b"its metered size" } else { b"not this one" };
                draft.add_header(REFUSED_HEADER, text).expect("it is a header");
            }
            parts
        }
    };
    Made::By(match parts {
        0 => {
            world.state().dropped.insert(position);
            Outcome::Keep(Vec::new())
        }
        1 => Outcome::Keep(vec![draft]),
        parts => {
            let body = |part| bytes::Bytes::from(format!("{{\"part\":{part}}}"));
            Outcome::Keep(draft.split((0..parts).map(body).collect(), &Arc::from(TRANSFORM)))
        }
    })
}

fn failed(class: FailureClass) -> Made {
    match class {
        FailureClass::Trap => Made::By(Outcome::Failed(Box::new(Failure {
            class: Class::Trap,
            text: "`10-simulated.wasm` failed".to_owned(),
            transform: TRANSFORM.to_owned(),
            trace: Vec::new(),
            halt: false,
        }))),
        // As if it were a mebibyte, which would only take time.
        FailureClass::Oversize => Made::Oversize(Box::new(store::Failure {
            error: ErrorView {
                class: "oversize".to_owned(),
                status: None,
                text: "a record is too large".to_owned(),
                body: None,
                transform: None,
            },
            bytes: Some(2 << 20),
            columns: Vec::new(),
            trace: Vec::new(),
        })),
    }
}
