//! Tries a chain on the messages that there are: parked ones from the store, and recent changes.
//!
//! It runs what the workers run, the size gate included, and sends and writes nothing. A message
//! counts as handled when it could be sent, or when a transform decided to drop it; a failure counts
//! as one also where a transform's settings hide it (`on_error = "pass"` or `"drop"`).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::control::Filter;
use super::item::Shaped;
use super::sample::Sample;
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

    /// Ids of the failed messages to try, and how many there are.
    fn parked(&self) -> (Vec<u64>, u64) {
        let filter = Filter { state: Some("failed".to_owned()), ..Filter::default() };
        let ids = match self.runtime.block_on(self.store.select(filter)) {
            Ok(ids) => ids,
            Err(error) => {
                tracing::warn!("could not read the parked messages to try a chain on: {error}");
                Vec::new()
            }
        };
        let all = ids.len();
        let spread = |ids: Vec<u64>| (0..PARKED_MAX).map(|n| ids[n * all / PARKED_MAX]).collect();
        (if all > PARKED_MAX { spread(ids) } else { ids }, all as u64)
    }
}

/// What a chain makes of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Sent,
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
        (Shaped::Records(_), None) => Fate::Sent,
        (Shaped::Dropped, None) => Fate::Dropped,
    };
    (fate, took)
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
    fn run(&mut self, change: &Change, is_parked: bool) {
        let (before, took_before) = fate(self.before, &self.envelopes[0], change);
        let (after, took_after) = fate(self.after, &self.envelopes[1], change);
        let found = &mut self.found;
        if is_parked {
            found.of += 1;
        } else {
            found.sample += 1;
        }
        match (before, after) {
            (Fate::Failed(..), Fate::Sent) if is_parked => found.fixes += 1,
            (Fate::Sent | Fate::Failed(..), Fate::Dropped) => found.drops += 1,
            (Fate::Sent | Fate::Dropped, Fate::Failed(reason, transform)) => {
                found.breaks += 1;
                found.culprits.extend(transform);
                found.example.get_or_insert(reason);
            }
            (Fate::Sent, Fate::Sent) => self.took.push((took_before, took_after)),
            (Fate::Failed(..), Fate::Sent | Fate::Failed(..))
            | (Fate::Dropped, Fate::Sent | Fate::Dropped) => {}
        }
    }
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
            comparing.run(&change, false);
        }
        let (mut ids, parked) = self.parked();
        comparing.found.parked = parked;
        while !ids.is_empty() && (started.elapsed() <= TIME_MAX || comparing.found.of < TRIED_MIN) {
            let read = self.runtime.block_on(self.store.read(ids.clone(), READ_BYTES_MAX));
            let read = match read {
                Ok(read) if read.is_empty() => break,
                Ok(read) => read,
                Err(error) => {
                    tracing::warn!("could not read parked messages to try a chain on: {error}");
                    break;
                }
            };
            // Those that are missing have left the store meanwhile.
            let last = read.iter().map(|(id, _)| *id).max().unwrap_or(u64::MAX);
            ids.retain(|id| *id > last);
            for (_, change) in read {
                if started.elapsed() > TIME_MAX && comparing.found.of >= TRIED_MIN {
                    break;
                }
                comparing.run(&change, true);
            }
        }
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
