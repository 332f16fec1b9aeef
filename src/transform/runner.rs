//! Runs a chain over messages, one at a time, on one thread with instances of its own.
//!
//! Whatever a guest does, it costs at most the message that it was given: the instance is thrown
//! away after any failure, because a guest that trapped may have left its memory in any state,
//! and the next message gets a fresh one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::chain::{Chain, DROPS_LOGGED_MAX, Transform};
use super::engine::Engine;
use super::instance::{Class, Fault, Instance, without_words};
use super::settings::OnError;
use super::state::Message;
use super::verdict::{Shaped, apply};
use crate::change::Change;
use crate::message::Draft;
use crate::pipeline::control::TraceStep;

/// How many steps of one message are kept: a message that was split has some for each part.
const STEPS_MAX: usize = 100;

/// What became of a message.
#[derive(Debug)]
pub enum Outcome {
    /// What goes on: nothing where it was dropped, one message as a rule, several where it was
    /// split.
    Keep(Vec<Draft>),
    Failed(Box<Failure>),
}

/// Why a transform failed a message.
#[derive(Clone, Debug)]
pub struct Failure {
    pub class: Class,
    /// One sentence that names the transform and what it ran into; never a row's value of ours.
    pub text: String,
    /// The file name.
    pub transform: String,
    /// The steps up to and including the failed one.
    pub trace: Vec<TraceStep>,
    /// The module's settings say `on_error = "halt"`: the pipeline is to stop here.
    pub halt: bool,
}

/// Runs chains. One for each worker thread.
#[derive(Debug)]
pub struct Runner {
    engine: Arc<Engine>,
    chain: Option<Arc<Chain>>,
    /// One for each transform of `chain`, in its order.
    slots: Vec<Slot>,
    /// What was done to the last message.
    steps: Vec<Step>,
    /// The first failure of the last message, by its slot.
    fault: Option<(usize, Class)>,
    /// Messages are only tried: nothing is counted, and nothing is logged as if it had happened.
    quiet: bool,
}

#[derive(Debug)]
struct Slot {
    transform: Arc<Transform>,
    instance: Option<Instance>,
}

/// One step of a trace, kept cheap: most are never looked at.
#[derive(Debug)]
struct Step {
    /// Index into `slots`.
    slot: usize,
    verdict: &'static str,
    took: Duration,
    bytes: Option<u64>,
    backtrace: Vec<String>,
    logs: Vec<String>,
}

impl Runner {
    pub(crate) fn new(engine: Arc<Engine>) -> Self {
        let (chain, slots, steps, fault) = Default::default();
        Self { engine, chain, slots, steps, fault, quiet: false }
    }

    /// One that leaves no traces: for trying a chain.
    pub(crate) fn quiet(engine: Arc<Engine>) -> Self {
        Self { quiet: true, ..Self::new(engine) }
    }

    /// The first failure of a transform on the last message, also where the transform's settings made
    /// the message pass or dropped it: its class, and the transform's file name.
    #[must_use]
    pub fn fault(&self) -> Option<(Class, &str)> {
        let (slot, class) = self.fault?;
        Some((class, &self.slots.get(slot)?.transform.file))
    }

    /// Runs a message through a chain. Instances are kept from call to call, also over a change of
    /// the chain, as far as their transforms stay.
    pub fn run(&mut self, chain: &Arc<Chain>, draft: Draft) -> Outcome {
        self.steps.clear();
        self.fault = None;
        if chain.is_empty() {
            return Outcome::Keep(vec![draft]);
        }
        if !self.chain.as_ref().is_some_and(|current| Arc::ptr_eq(current, chain)) {
            self.adopt(chain);
        }
        match self.run_from(0, Message::new(draft)) {
            Ok(drafts) => Outcome::Keep(drafts),
            Err((slot, fault)) => {
                let transform = &self.slots[slot].transform;
                Outcome::Failed(Box::new(Failure {
                    class: fault.class,
                    text: format!("`{}` {}", transform.file, fault.reason),
                    transform: transform.file.to_string(),
                    halt: transform.settings.on_error == OnError::Halt,
                    trace: self.trace(),
                }))
            }
        }
    }

    /// What each transform did to the last message, also where it was kept: the message may turn
    /// out too large behind the chain.
    #[must_use]
    pub fn trace(&self) -> Vec<TraceStep> {
        let step = |step: &Step| {
            let transform = &self.slots[step.slot].transform;
            TraceStep {
                transform: transform.file.to_string(),
                digest: transform.module.digest.clone(),
                verdict: step.verdict.to_owned(),
                micros: u64::try_from(step.took.as_micros()).unwrap_or(u64::MAX),
                bytes: step.bytes,
                backtrace: step.backtrace.clone(),
                logs: step.logs.clone(),
            }
        };
        self.steps.iter().map(step).collect()
    }

    /// What the instance of each transform of the last chain holds, in bytes, in the chain's order;
    /// nothing where there is no instance, as after a failure.
    #[must_use]
    pub fn memory_bytes(&self) -> Vec<Option<u64>> {
        let held = |slot: &Slot| Some(slot.instance.as_ref()?.memory_bytes() as u64);
        self.slots.iter().map(held).collect()
    }

    fn adopt(&mut self, chain: &Arc<Chain>) {
        let mut old = std::mem::take(&mut self.slots);
        for transform in chain.transforms() {
            let kept = old.iter().position(|slot| Arc::ptr_eq(&slot.transform, transform));
            let instance = kept.and_then(|index| old.swap_remove(index).instance);
            self.slots.push(Slot { transform: Arc::clone(transform), instance });
        }
        self.chain = Some(Arc::clone(chain));
    }

    /// Runs the transforms from `first` on. The error names the slot that failed.
    fn run_from(
        &mut self,
        first: usize,
        mut message: Message,
    ) -> Result<Vec<Draft>, (usize, Fault)> {
        for slot in first..self.slots.len() {
            if !self.slots[slot].transform.settings.apply_to(message.draft.change()) {
                continue;
            }
            match self.run_one(slot, message).map_err(|fault| (slot, fault))? {
                Shaped::Keep(shaped) => message = shaped,
                Shaped::Drop => return Ok(Vec::new()),
                Shaped::Split(parts) => return self.run_parts(slot + 1, parts),
            }
        }
        Ok(vec![message.draft])
    }

    /// Runs the rest of the chain over each part of a message that was split.
    fn run_parts(&mut self, first: usize, parts: Vec<Draft>) -> Result<Vec<Draft>, (usize, Fault)> {
        let mut shaped: Vec<Draft> = Vec::with_capacity(parts.len());
        for part in parts {
            let number = part.part();
            let mut rest = self.run_from(first, Message::new(part))?;
            match (rest.pop(), rest.is_empty()) {
                (Some(part), true) if part.part() == number => {
                    // They land together or not at all, which two streams cannot do.
                    if shaped.first().is_some_and(|first| first.stream() != part.stream()) {
                        let reason = "sent the parts of a message that an earlier transform had \
                                      split to different streams";
                        return Err(self.fault_of_last(reason));
                    }
                    shaped.push(part);
                }
                _ => {
                    let reason = "dropped or split a part of a message that an earlier transform \
                                  had split; name it before that one, or give it other tables";
                    return Err(self.fault_of_last(reason));
                }
            }
        }
        Ok(shaped)
    }

    /// Puts a broken rule down to the transform that was called last.
    fn fault_of_last(&self, reason: &str) -> (usize, Fault) {
        let slot = self.steps.last().map_or(0, |step| step.slot);
        (slot, Fault::new(Class::Invalid, reason))
    }

    fn run_one(&mut self, index: usize, message: Message) -> Result<Shaped, Fault> {
        let Self { engine, slots, steps, fault: first_fault, .. } = self;
        let quiet = self.quiet;
        let slot = &mut slots[index];
        let transform = &*slot.transform;
        // The only policy that goes on with the message as it was.
        let before = (transform.settings.on_error == OnError::Pass).then(|| message.clone());

        if !quiet {
            transform.counters.called();
        }
        let started = Instant::now();
        let called = slot.call(engine, started, message, quiet);
        let Called { result, failed, measured, logs } = called;
        let fault = match result {
            Ok(shaped) => {
                let step = Step::new(index, shaped.verdict(), started, measured, logs);
                if !quiet {
                    slot.transform.counters.took(step.took);
                }
                push(steps, step);
                return Ok(shaped);
            }
            Err(fault) => fault,
        };

        let transform = &*slot.transform;
        first_fault.get_or_insert((index, fault.class));
        let mut step = Step::new(index, fault.class.as_str(), started, measured, logs);
        if !quiet {
            transform.counters.failed();
            transform.counters.took(step.took);
        }
        step.backtrace.clone_from(&fault.backtrace);
        push(steps, step);
        match (transform.settings.on_error, before) {
            (OnError::Pass, Some(mut before)) => {
                before.draft.set_passed(&transform.file);
                Ok(Shaped::Keep(before))
            }
            (OnError::Drop, _) if quiet => Ok(Shaped::Drop),
            (OnError::Drop, _) => {
                let change = failed.as_ref().map(|message| message.draft.change());
                log_dropped(transform, change, &fault);
                Ok(Shaped::Drop)
            }
            (OnError::Park | OnError::Halt | OnError::Pass, _) => Err(fault),
        }
    }
}

/// Each is counted; only so many are logged, since a transform may fail every message.
fn log_dropped(transform: &Transform, change: Option<&Change>, fault: &Fault) {
    let (may_write, left_out) = transform.counters.dropped(Instant::now());
    if left_out > 0 {
        tracing::warn!(
            transform = &*transform.file,
            "{left_out} more messages were dropped and not logged each: at most \
             {DROPS_LOGGED_MAX} are in a second; `transform_dropped_total` counts all of them"
        );
    }
    if may_write {
        tracing::warn!(
            transform = &*transform.file,
            table = change.map(|change| change.table.qualified_name()),
            position = change.map(|change| change.position.to_string()),
            "dropped a message, as the transform's settings say: it {}",
            without_words(&fault.reason).0
        );
    }
}

/// What came of one call.
struct Called {
    result: Result<Shaped, Fault>,
    /// The message, half edited, where the call failed.
    failed: Option<Message>,
    /// The size that the guest asked for last.
    measured: Option<u64>,
    logs: Vec<String>,
}

impl Slot {
    /// Calls the transform, on a fresh instance if there is none, and keeps the instance only where
    /// the call went well.
    fn call(&mut self, engine: &Engine, started: Instant, message: Message, quiet: bool) -> Called {
        let transform = &*self.transform;
        let (mut instance, started) = match self.instance.take() {
            Some(instance) => (instance, started),
            None => match Instance::new(engine, transform, quiet) {
                // A start has a limit of its own, which is longer than a call's.
                Ok(instance) => (instance, Instant::now()),
                Err(mut fault) => {
                    let logs = std::mem::take(&mut fault.logs);
                    let failed = Some(message);
                    return Called { result: Err(fault), failed, measured: None, logs };
                }
            },
        };
        let answer = instance.call(&transform.settings.limits, started, message);
        let message = instance.take_message();
        let measured = message.as_ref().and_then(|message| message.measured);
        let (result, failed) = match (answer, message) {
            (Ok(verdict), Some(message)) => match apply(verdict, message, &transform.file) {
                Ok(shaped) => (Ok(shaped), None),
                Err((fault, message)) => (Err(fault), Some(*message)),
            },
            (Ok(_), None) => {
                unreachable!("the message stays in the store for as long as the call takes")
            }
            (Err(fault), message) => (Err(fault), message),
        };
        // What it wrote in a call that failed may be the row that it failed on.
        let logs = instance.take_logs(result.is_err());
        let result = result.map_err(|fault| fault.with_last_words(&logs, &transform.module));
        if result.is_ok() && !instance.is_spent(&transform.module, transform.settings.isolation) {
            self.instance = Some(instance);
        }
        Called { result, failed, measured, logs }
    }
}

impl Step {
    fn new(
        slot: usize,
        verdict: &'static str,
        started: Instant,
        bytes: Option<u64>,
        logs: Vec<String>,
    ) -> Self {
        Self { slot, verdict, took: started.elapsed(), bytes, backtrace: Vec::new(), logs }
    }
}

fn push(steps: &mut Vec<Step>, step: Step) {
    if steps.len() < STEPS_MAX {
        steps.push(step);
    }
}
