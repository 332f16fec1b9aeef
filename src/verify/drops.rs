//! What the chain leaves out: a row that is missing from the stream may be missing because a transform
//! drops it, which nobody writes down. So the modules that are live are given the row as it is in the table,
//! as if it had just been inserted (or, where the stream has an older state of it, updated), and what they
//! drop is named with the transform that does.
//!
//! **What this knows**: that the chain, as it is now, would not let this row through. **What it cannot
//! know**: whether it was that chain which decided. Where a module was changed, decides by more than the
//! row (a table's name that changed, the time, the values before an update, a large value that the update
//! did not touch), or counts what it has seen, the answer is about today's row. A row that the chain would
//! let through is missing, whatever dropped it once; and a record that needs one before it which a transform
//! dropped (an update that brings a row in again) has only the operator's word for that, `--allow-older`. What is deleted in the table and not in the stream is
//! a difference: the row is not there to be tried. And a table without a key has no row that could be told
//! from others: its rows are not tried.
//!
//! Nothing is counted, logged or kept by such a trial. It runs on a thread of its own, as guests do in a
//! pipeline, with the limits of their settings.

use std::borrow::Cow;
use std::sync::{Arc, mpsc};

use super::Error;
use crate::change::{Action, Cell, Change, Position, Table, Tuple};
use crate::message::{Draft, Envelope, EnvelopeSettings};
use crate::transform::{Chain, ModuleFiles, Outcome, Runner, Workbench};

/// The chain, ready to be asked.
#[derive(Debug)]
pub struct Drops {
    questions: mpsc::Sender<Change>,
    /// The file that dropped it.
    answers: mpsc::Receiver<Option<String>>,
}

impl Drops {
    /// Loads the modules. Nothing where there are none.
    ///
    /// # Errors
    ///
    /// In words, why the chain cannot be run here.
    pub fn of(modules: Vec<ModuleFiles>) -> Result<Option<Self>, String> {
        if modules.is_empty() {
            return Ok(None);
        }
        let (questions, asked) = mpsc::channel();
        let (answer, answers) = mpsc::channel();
        let (begun, ready) = mpsc::channel();
        let work = move || {
            let loaded = load(modules);
            let (chain, mut runner) = match loaded {
                Ok(loaded) => loaded,
                Err(reason) => return drop(begun.send(Err(reason))),
            };
            drop(begun.send(Ok(())));
            while let Ok(change) = asked.recv() {
                if answer.send(dropped_by(&mut runner, &chain, change)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("verify-chain".to_owned());
        thread.spawn(work).map_err(|error| error.to_string())?;
        match ready.recv() {
            Ok(Ok(())) => Ok(Some(Self { questions, answers })),
            Ok(Err(reason)) => Err(reason),
            Err(mpsc::RecvError) => Err("the thread that ran the modules broke off".to_owned()),
        }
    }

    /// Which transform drops this row, whose values are Postgres's text.
    fn ask(
        &self,
        table: &Arc<Table>,
        action: Action,
        values: &[Option<&str>],
    ) -> Result<Option<String>, Error> {
        let change = Change {
            position: Position::default(),
            commit_timestamp_us: 0,
            action,
            table: Arc::clone(table),
            new: tuple(values),
            old: None,
        };
        // Longer than any row that a message could be made of.
        if change.new.is_none() {
            return Ok(None);
        }
        self.questions.send(change).map_err(|_| Error::Chain)?;
        self.answers.recv().map_err(|_| Error::Chain)
    }
}

fn load(modules: Vec<ModuleFiles>) -> Result<(Arc<Chain>, Runner), String> {
    let workbench = Workbench::of_user().map_err(|e| e.to_string())?;
    let chain = workbench.chain(modules).map_err(|error| error.to_string())?;
    Ok((chain, workbench.quiet_runner()))
}

fn dropped_by(runner: &mut Runner, chain: &Arc<Chain>, change: Change) -> Option<String> {
    // As long as those of a real pipeline, so that sizes are near.
    let envelope = Envelope::new(EnvelopeSettings {
        pipeline_id: "0197a1b2-0000-7000-8000-000000000000".to_owned(),
        pipeline_name: "sluicebox".to_owned(),
        database_name: "postgres".to_owned(),
        hostname: "localhost".to_owned(),
        chain: "1:0000000000000000".to_owned(),
        unguarded: false,
    });
    match runner.run(chain, Draft::new(change, Arc::new(envelope))) {
        Outcome::Keep(drafts) if drafts.is_empty() => {
            runner.trace().pop().map(|step| step.transform)
        }
        // What fails is parked, and what is parked is known.
        Outcome::Keep(_) | Outcome::Failed(_) => None,
    }
}

fn tuple(values: &[Option<&str>]) -> Option<Tuple> {
    let mut data = String::new();
    let mut cells = Vec::with_capacity(values.len());
    for value in values {
        let Some(text) = value else {
            cells.push(Cell::Null);
            continue;
        };
        let start = u32::try_from(data.len()).ok()?;
        data.push_str(text);
        cells.push(Cell::Text { start, end: u32::try_from(data.len()).ok()? });
    }
    Some(Tuple { data: data.into(), cells: cells.into() })
}

/// A row of the source as it is compared, and as a transform would get it.
#[derive(Clone, Copy, Debug)]
pub(super) struct SourceRow<'a> {
    /// The JSON of each column.
    pub(super) json: &'a [Cow<'a, str>],
    /// Nothing where no chain is asked.
    pub(super) question: Option<Question<'a>>,
}

/// Whom to ask about a row, and about which.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question<'a> {
    pub(super) drops: &'a Drops,
    pub(super) table: &'a Arc<Table>,
    /// Postgres's text of each column.
    pub(super) values: &'a [Option<&'a str>],
}

impl SourceRow<'_> {
    /// Which transform drops it.
    pub(super) fn dropped_by(&self, action: Action) -> Result<Option<String>, Error> {
        match self.question {
            Some(Question { drops, table, values }) => drops.ask(table, action, values),
            None => Ok(None),
        }
    }
}
