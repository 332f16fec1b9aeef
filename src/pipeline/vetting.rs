//! Tries a chain on the messages that there are: parked ones from the store, and recent changes.
//!
//! It runs what the workers run, the size gate included, and sends and writes nothing. A message
//! counts as handled when it could be sent, or when a transform decided to drop it; a failure counts
//! as one also where a transform's settings hide it (`on_error = "pass"` or `"drop"`).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::runtime::Handle;

use super::control::Filter;
use super::item::Shaped;
use super::sample::Sample;
use super::size_gate::SizedRecord;
use super::workers::shape;
use crate::change::Change;
use crate::message::{Envelope, EnvelopeSettings};
use crate::store::Store;
use crate::transform::{Comparison, Trial, Vet};

/// How long both parts of a comparison may take together. A chain that is worth it waits for this
/// long at most; the traffic does not.
const TIME_MAX: Duration = Duration::from_secs(4);

/// So many of each kind are tried however long it takes: on a machine that is busy with other things
/// the time would be over before the first, and a chain would go live untried. The limits of the
/// modules bound them.
const TRIED_MIN: u64 = 10;

/// How many parked messages are tried; of more than that, some from all over the store.
const PARKED_MAX: usize = 1000;

/// How many of those that wait behind them are tried: their turn comes as soon as the mend is live.
const WAITING_MAX: usize = 250;

/// How many of them are in memory at once, in bytes; a larger one is there alone.
const READ_BYTES_MAX: usize = 8 * 1024 * 1024;

/// From how many messages on it is said how much slower a chain is: fewer say nothing.
const TIMED_MIN: usize = 20;

/// Where a pipeline's messages are.
#[derive(Debug)]
pub struct Vetting {
    store: Store,
    sample: Sample,
    envelope: EnvelopeSettings,
    runtime: Handle,
}

impl Vetting {
    /// # Panics
    ///
    /// Outside of a runtime, which is needed to ask the store.
    #[must_use]
    pub fn new(store: Store, sample: Sample, envelope: EnvelopeSettings) -> Self {
        Self { store, sample, envelope, runtime: Handle::current() }
    }

    fn envelope(&self, trial: &Trial) -> Arc<Envelope> {
        let settings = EnvelopeSettings { chain: trial.chain.tag(), ..self.envelope.clone() };
        Arc::new(Envelope::new(settings))
    }

    /// Ids of messages to try that are in this state, and how many there are.
    fn stored(&self, state: &str, tried_max: usize) -> (Vec<u64>, u64) {
        let filter = Filter { state: Some(state.to_owned()), ..Filter::default() };
        let ids = match self.runtime.block_on(self.store.select(filter)) {
            Ok(ids) => ids,
            Err(error) => {
                tracing::warn!("could not read the parked messages to try a chain on: {error}");
                Vec::new()
            }
        };
        let all = ids.len();
        let spread = |ids: Vec<u64>| (0..tried_max).map(|n| ids[n * all / tried_max]).collect();
        (if all > tried_max { spread(ids) } else { ids }, all as u64)
    }

    /// Runs the comparison over stored messages, for as long as there is time.
    fn try_stored(
        &self,
        comparing: &mut Comparing<'_>,
        mut ids: Vec<u64>,
        kind: Kind,
        end: Instant,
    ) {
        let mut tried = 0;
        while !ids.is_empty() && (Instant::now() <= end || tried < TRIED_MIN) {
            let read = self.runtime.block_on(self.store.read(ids.clone(), READ_BYTES_MAX));
            let read = match read {
                Ok(read) if read.is_empty() => break,
                Ok(read) => read,
                Err(error) => {
                    tracing::warn!("could not read stored messages to try a chain on: {error}");
                    break;
                }
            };
            // Those that are missing have left the store meanwhile.
            let last = read.iter().map(|(id, _)| *id).max().unwrap_or(u64::MAX);
            ids.retain(|id| *id > last);
            for (_, change) in read {
                if Instant::now() > end && tried >= TRIED_MIN {
                    break;
                }
                comparing.run(&change, kind);
                tried += 1;
            }
        }
    }
}

/// What a chain makes of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// To this stream; nothing for the pipeline's own.
    Sent(Option<Arc<str>>),
    /// Something is sent, and nothing of the row is in it.
    Emptied,
    Dropped,
    /// With the reason, and the transform, where it was one.
    Failed(String, Option<String>),
}

fn fate(trial: &mut Trial, envelope: &Arc<Envelope>, change: &Change) -> (Fate, Duration) {
    let started = Instant::now();
    let shaped = shape(&mut trial.runner, &trial.chain, envelope, change);
    let took = started.elapsed();
    let fault = trial.runner.fault().map(|(class, transform)| (class, transform.to_owned()));
    let fate = match (shaped, fault) {
        (Shaped::Failed(failure) | Shaped::Halt(failure), _) => {
            Fate::Failed(failure.error.text, failure.error.transform)
        }
        (Shaped::Records(_) | Shaped::Dropped, Some((class, transform))) => {
            let text =
                format!("`{transform}` fails ({}), and its settings hide it", class.as_str());
            Fate::Failed(text, Some(transform))
        }
        (Shaped::Records(records), None) if is_emptied(change, &records) => Fate::Emptied,
        (Shaped::Records(records), None) => {
            Fate::Sent(records.first().and_then(|record| record.stream().cloned()))
        }
        (Shaped::Dropped, None) => Fate::Dropped,
    };
    (fate, took)
}

/// Whether nothing of a row is in what would be sent of it: no column, or an empty message in its place.
fn is_emptied(change: &Change, records: &[SizedRecord]) -> bool {
    let [record] = records else { return false };
    let Ok(message) = serde_json::from_slice::<Value>(&record.record().body) else { return false };
    let is_empty = |value: &Value| match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(members) => members.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    let had_columns = change.new.as_ref().or(change.old.as_ref()).is_some();
    is_empty(&message) || (had_columns && message.get("record").is_some_and(is_empty))
}

/// Where a message that is tried comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It failed, and lies in the store.
    Parked,
    /// A recent change, or one that waits in the store behind a failed one.
    Recent,
}

/// A comparison under way.
struct Comparing<'a> {
    before: &'a mut Trial,
    after: &'a mut Trial,
    envelopes: [Arc<Envelope>; 2],
    found: Comparison,
    /// What each message that both handle took.
    took: Vec<(Duration, Duration)>,
}

impl Comparing<'_> {
    fn run(&mut self, change: &Change, kind: Kind) {
        let (before, took_before) = fate(self.before, &self.envelopes[0], change);
        let (after, took_after) = fate(self.after, &self.envelopes[1], change);
        let found = &mut self.found;
        match kind {
            Kind::Parked => found.of += 1,
            Kind::Recent => found.sample += 1,
        }
        let was_sent = matches!(before, Fate::Sent(_));
        if kind == Kind::Recent && was_sent {
            found.sent += 1;
        }
        match (before, after) {
            (Fate::Failed(..), Fate::Sent(_)) if kind == Kind::Parked => found.fixes += 1,
            (Fate::Sent(_) | Fate::Failed(..), after @ (Fate::Dropped | Fate::Emptied)) => {
                match after {
                    Fate::Emptied => found.empties += 1,
                    Fate::Dropped | Fate::Sent(_) | Fate::Failed(..) => found.drops += 1,
                }
                let losers = losers(self.after);
                match kind {
                    _ if losers.is_empty() => {}
                    Kind::Parked => found.lost += 1,
                    Kind::Recent if was_sent => found.sent_lost += 1,
                    Kind::Recent => {}
                }
                found.losers.extend(losers);
            }
            (Fate::Sent(_) | Fate::Dropped | Fate::Emptied, Fate::Failed(reason, transform)) => {
                found.breaks += 1;
                found.culprits.extend(transform);
                found.example.get_or_insert(reason);
            }
            (Fate::Sent(before), Fate::Sent(after)) => {
                found.reroutes += u64::from(before != after);
                self.took.push((took_before, took_after));
            }
            (Fate::Failed(..), Fate::Sent(_) | Fate::Failed(..))
            | (Fate::Dropped | Fate::Emptied, Fate::Sent(_) | Fate::Dropped | Fate::Emptied) => {}
        }
    }
}

/// The transforms that made the last message of this trial vanish, as far as they may not: the one that
/// dropped it, or those that it passed where nothing was left of it.
fn losers(trial: &Trial) -> Vec<String> {
    let trace = trial.runner.trace();
    let dropped = trace.last().filter(|step| step.verdict == "drop");
    let steps = match dropped {
        Some(_) => &trace[trace.len() - 1..],
        None => &trace[..],
    };
    let may = |file: &str| trial.chain.may_drop(file);
    if steps.iter().any(|step| may(&step.transform)) {
        return Vec::new();
    }
    steps.iter().map(|step| step.transform.clone()).collect()
}

/// How much longer the second took, in percent. The messages that took longest are left out: there
/// the thread was kept waiting, or an instance was made.
fn slower_percent(mut took: Vec<(Duration, Duration)>) -> Option<i64> {
    if took.len() < TIMED_MIN {
        return None;
    }
    took.sort_unstable_by_key(|(before, after)| *before.max(after));
    took.truncate(took.len() * 9 / 10);
    let (before, after) =
        took.iter().fold((0.0, 0.0), |(b, a), (x, y)| (b + x.as_secs_f64(), a + y.as_secs_f64()));
    let percent = (after / before - 1.0) * 100.0;
    #[expect(clippy::cast_possible_truncation, reason = "held to a range that fits")]
    percent.is_finite().then(|| percent.clamp(-100.0, 1_000_000.0).round() as i64)
}

impl Vet for Vetting {
    fn compare(&self, before: &mut Trial, after: &mut Trial) -> Comparison {
        let started = Instant::now();
        let envelopes = [self.envelope(before), self.envelope(after)];
        let found = Comparison { culprits: BTreeSet::new(), ..Comparison::default() };
        let mut comparing = Comparing { before, after, envelopes, found, took: Vec::new() };
        for change in self.sample.changes() {
            if started.elapsed() > TIME_MAX / 2 && comparing.found.sample >= TRIED_MIN {
                break;
            }
            comparing.run(&change, Kind::Recent);
        }
        let (ids, parked) = self.stored("failed", PARKED_MAX);
        comparing.found.parked = parked;
        self.try_stored(&mut comparing, ids, Kind::Parked, started + TIME_MAX * 7 / 8);
        let (ids, _) = self.stored("waiting", WAITING_MAX);
        self.try_stored(&mut comparing, ids, Kind::Recent, started + TIME_MAX);
        let Comparing { mut found, took, .. } = comparing;
        found.slower_percent = slower_percent(took);
        found
    }

    fn handled(&self, trial: &mut Trial, changes: &[Change]) -> usize {
        let started = Instant::now();
        let envelope = self.envelope(trial);
        let handled = |change: &&Change| {
            started.elapsed() <= TIME_MAX
                && !matches!(fate(trial, &envelope, change).0, Fate::Failed(..))
        };
        changes.iter().filter(handled).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slowness_is_told_without_the_outliers() {
        #[track_caller]
        fn check(took: Vec<(u64, u64)>, expected: Option<i64>) {
            let micros = Duration::from_micros;
            let took = took.into_iter().map(|(before, after)| (micros(before), micros(after)));
            assert_eq!(slower_percent(took.collect()), expected);
        }
        check(vec![(10, 20); 19], None);
        check(vec![(10, 20); 20], Some(100));
        check(vec![(100, 97); 40], Some(-3));
        check([vec![(100, 112); 40], vec![(90_000, 100), (100, 50_000)]].concat(), Some(12));
        check(vec![(0, 0); 40], None);
    }
}
