//! The threads that run the transforms: changes go out in small batches and come back with what was
//! made of them. Order is restored by the caller, from the job's number.
//!
//! Guest code runs only here, on threads of its own, so that a slow transform never keeps the tasks
//! that talk to Postgres and S2 from running.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::sync::mpsc as async_mpsc;

use super::control::{ColumnBytes, ErrorView, TraceStep};
use super::item::{Item, Origin, Shaped};
use super::size_gate;
use crate::change::Change;
use crate::message::{Draft, Envelope, RecordError, Weight, shown};
use crate::sink::record::RECORD_BYTES_MAX;
use crate::store::Failure;
use crate::transform::{Chain, Outcome, Runner};

/// How many of an oversized message's columns are named.
const COLUMNS_NAMED: usize = 5;

/// How long a chain goes on with its jobs after another took its place. One that is any good is done with
/// them by then; one whose messages run out of time would keep the other waiting for many seconds.
const LEFT_MAX: Duration = Duration::from_millis(100);

/// Changes that are shaped by one chain.
#[derive(Debug)]
pub struct Job {
    pub number: u64,
    pub chain: Arc<Chain>,
    pub envelope: Arc<Envelope>,
    pub items: Vec<Item>,
}

/// A job's results, in the order of its items.
#[derive(Debug)]
pub struct Done {
    pub number: u64,
    /// Of the chain that shaped it.
    pub generation: u64,
    pub results: Vec<(Item, Shaped)>,
    /// What came behind them and was not tried, because another chain had taken the place of this one.
    pub untried: Vec<Item>,
}

impl Done {
    /// What was in the job.
    pub fn into_items(self) -> impl Iterator<Item = Item> {
        self.results.into_iter().map(|(item, _)| item).chain(self.untried)
    }
}

/// The handle to the threads, or to what stands in for them. They end when this is dropped and their
/// last job is done.
pub struct Workers {
    /// Called once for each job, never for each change.
    submit: Box<dyn Fn(Job) -> bool + Send>,
    count: usize,
    /// How many changes came out of the chain, those of jobs that are not done among them.
    shaped: Arc<AtomicU64>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Workers {
    /// Starts a thread for each runner. What they finish comes out of the receiver, in any order.
    ///
    /// # Errors
    ///
    /// When the system refuses a thread.
    pub fn start(
        runners: Vec<Runner>,
    ) -> std::io::Result<(Self, async_mpsc::UnboundedReceiver<Done>)> {
        let (jobs, received) = mpsc::channel::<Job>();
        let received = Arc::new(Mutex::new(received));
        // The caller bounds how many jobs are out, and so what this channel may hold.
        let (done, finished) = async_mpsc::unbounded_channel();
        let count = runners.len();
        let shaped = Arc::<AtomicU64>::default();
        for (index, mut runner) in runners.into_iter().enumerate() {
            let received = Arc::clone(&received);
            let (done, shaped) = (done.clone(), Arc::clone(&shaped));
            std::thread::Builder::new().name(format!("transform-{index}")).spawn(move || {
                loop {
                    // The lock covers only the wait for a job, never a job.
                    let next = received.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = next else { break };
                    if done.send(shape_all(&mut runner, job, &shaped)).is_err() {
                        break;
                    }
                }
            })?;
        }
        let workers = Self::over(count, move |job| jobs.send(job).is_ok());
        Ok((Self { shaped, ..workers }, finished))
    }

    /// A handle whose jobs go to `submit`, which says whether anybody is left to do them.
    pub fn over(count: usize, submit: impl Fn(Job) -> bool + Send + 'static) -> Self {
        Self { submit: Box::new(submit), count, shaped: Arc::default() }
    }

    /// How many changes the threads have shaped so far: a job of slow ones is no standstill.
    #[must_use]
    pub fn shaped(&self) -> u64 {
        self.shaped.load(Ordering::Relaxed)
    }

    /// How many jobs keep every thread busy without a pause.
    #[must_use]
    pub fn jobs_max(&self) -> usize {
        self.count * 2 + 1
    }

    /// Hands a job to whichever thread is free first. Says whether any thread is left to take it.
    #[must_use]
    pub fn submit(&self, job: Job) -> bool {
        (self.submit)(job)
    }
}

fn shape_all(runner: &mut Runner, job: Job, count: &AtomicU64) -> Done {
    let Job { number, chain, envelope, items } = job;
    let mut from_source = 0;
    let shape = |item: Item| {
        let shaped = shape(runner, &chain, &envelope, &item.change);
        if let Origin::Source { .. } | Origin::Spilled { .. } = item.origin {
            from_source += 1;
            note_failure(runner, &chain, &item, &shaped);
        }
        count.fetch_add(1, Ordering::Relaxed);
        (item, shaped)
    };
    let mut items = items.into_iter();
    let is_at_work = || chain.left_for().is_none_or(|time| time < LEFT_MAX);
    let results = std::iter::from_fn(|| if is_at_work() { items.next() } else { None });
    let results = results.map(shape).collect();
    chain.health().ran(from_source);
    Done { number, generation: chain.generation, results, untried: items.collect() }
}

/// Tells the chain's health where a change did not come through: also where a transform's settings
/// hide it.
fn note_failure(runner: &Runner, chain: &Chain, item: &Item, shaped: &Shaped) {
    match (runner.fault(), shaped) {
        (Some((class, transform)), _) => {
            chain.health().failed(&item.change, Some(transform), Some(class));
        }
        (None, Shaped::Failed(_)) => chain.health().failed(&item.change, None, None),
        (None, Shaped::Records(_) | Shaped::Dropped | Shaped::Halt(_)) => {}
    }
}

/// What a chain and the size gate behind it make of a change.
pub(super) fn shape(
    runner: &mut Runner,
    chain: &Arc<Chain>,
    envelope: &Arc<Envelope>,
    change: &Change,
) -> Shaped {
    let draft = Draft::new(change.clone(), Arc::clone(envelope));
    let outcome = runner.run(chain, draft);
    measured(outcome, || runner.trace())
}

/// What the chain left of a change as records that S2 takes. `trace` says what the chain did.
pub(crate) fn measured(outcome: Outcome, trace: impl Fn() -> Vec<TraceStep>) -> Shaped {
    match outcome {
        Outcome::Keep(drafts) => gate(&drafts, trace),
        Outcome::Failed(failure) => failed(*failure),
    }
}

/// What a transform's failure means for its message.
pub(crate) fn failed(failure: crate::transform::Failure) -> Shaped {
    let halt = failure.halt;
    let failure = Box::new(Failure {
        error: ErrorView {
            class: failure.class.as_str().to_owned(),
            status: None,
            text: failure.text,
            body: None,
            transform: Some(failure.transform),
        },
        bytes: None,
        columns: Vec::new(),
        trace: failure.trace,
    });
    if halt { Shaped::Halt(failure) } else { Shaped::Failed(failure) }
}

/// The records of what the transforms let through, or why they cannot go.
pub(crate) fn gate(drafts: &[Draft], trace: impl Fn() -> Vec<TraceStep>) -> Shaped {
    if drafts.is_empty() {
        return Shaped::Dropped;
    }
    let mut records = Vec::with_capacity(drafts.len());
    for draft in drafts {
        match draft.record() {
            Ok(record) => match size_gate::check(record) {
                Ok(record) => records.push(record.routed_to(draft.stream().cloned())),
                Err(size_gate::Oversize { bytes, .. }) => {
                    return Shaped::Failed(oversize(draft, bytes, trace()));
                }
            },
            Err(RecordError::Oversize { bytes }) => {
                return Shaped::Failed(oversize(draft, bytes, trace()));
            }
            Err(RecordError::Encode(error)) => {
                return Shaped::Failed(failure(
                    "encode",
                    error.to_string(),
                    None,
                    Vec::new(),
                    trace(),
                ));
            }
        }
    }
    Shaped::Records(records)
}

/// A failure behind the transforms, which S2 has not seen.
fn failure(
    class: &str,
    text: String,
    bytes: Option<u64>,
    columns: Vec<ColumnBytes>,
    trace: Vec<TraceStep>,
) -> Box<Failure> {
    let class = class.to_owned();
    let error = ErrorView { class, status: None, text, body: None, transform: None };
    Box::new(Failure { error, bytes, columns, trace })
}

fn oversize(draft: &Draft, bytes: u64, trace: Vec<TraceStep>) -> Box<Failure> {
    let columns: Vec<ColumnBytes> = draft
        .largest_columns(COLUMNS_NAMED)
        .into_iter()
        .map(|(name, bytes)| ColumnBytes { name: shown(&name), bytes })
        .collect();
    let table = draft.change().table.qualified_name();
    let named = |Weight { what, bytes, transform }: Weight| match transform {
        Some(transform) => format!("{what} ({bytes} bytes, made by `{transform}`)"),
        None => format!("{what} ({bytes} bytes)"),
    };
    let largest = draft.heaviest(3).into_iter().map(named).collect::<Vec<_>>().join(", ");
    let text = format!(
        "a record of {table} has {bytes} bytes, and S2 takes {RECORD_BYTES_MAX}; largest in it: \
         {largest}"
    );
    let mut failure = failure("oversize", text, Some(bytes), columns, trace);
    failure.error.transform = draft.enlarged_by().map(|transform| transform.to_string());
    failure
}
