//! Tries a chain on the messages that there are: parked ones from the store, and recent changes.
//!
//! It runs what the workers run, the size gate included, and sends and writes nothing. A message
//! counts as handled when it could be sent, or when a transform decided to drop it; a failure counts
//! as one also where a transform's settings hide it (`on_error = "pass"` or `"drop"`).
//!
//! Mended is a failed message only where its row is in what would be sent (see [`remains`]). One that is
//! dropped, emptied, or replaced by the same for every row would be gone without having been delivered.

mod remains;

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::control::Filter;
use super::item::Shaped;
use super::sample::Sample;
use super::size_gate::SizedRecord;
use super::workers::shape;
use crate::change::Change;
use crate::message::{Draft, Envelope, EnvelopeSettings};
use crate::store::{Message, Store};
use crate::transform::{Class, Comparison, Trial, Vet};
use remains::{Content, Remains};

/// How long both parts of a comparison may take together. A chain that is worth it waits for this
/// long at most; the traffic does not.
const TIME_MAX: Duration = Duration::from_secs(4);

/// So many of each kind are tried even where the time is over: on a machine that is busy with other
/// things it would be over before the first, and a chain would go live untried. But one, where messages
/// run out of their own time: they are what took it.
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
    fn try_stored(&self, comparing: &mut Comparing<'_>, mut ids: Vec<u64>, kind: Kind) {
        while !ids.is_empty() && comparing.has_time() {
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
            let last = read.iter().map(|message| message.id).max().unwrap_or(u64::MAX);
            ids.retain(|id| *id > last);
            for Message { change, .. } in read {
                if !comparing.has_time() {
                    break;
                }
                comparing.run(&change, kind);
            }
        }
    }
}

/// What a chain makes of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// To this stream, nothing for the pipeline's own; and what of the row is in it.
    Sent(Option<Arc<str>>, Remains),
    /// Something is sent, and nothing of the row is in it.
    Emptied,
    Dropped,
    /// With the reason, the class, and the transform, where it was one.
    Failed(String, Option<Class>, Option<String>),
}

impl Fate {
    fn is_timeout(&self) -> bool {
        matches!(self, Self::Failed(_, Some(Class::Timeout), _))
    }
}

fn fate(trial: &mut Trial, envelope: &Arc<Envelope>, change: &Change) -> (Fate, Duration) {
    let started = Instant::now();
    let shaped = shape(&mut trial.runner, &trial.chain, envelope, change);
    let took = started.elapsed();
    let fault = trial.runner.fault().map(|(class, transform)| (class, transform.to_owned()));
    let class = fault.as_ref().map(|(class, _)| *class);
    let fate = match (shaped, fault) {
        (Shaped::Failed(failure) | Shaped::Halt(failure), _) => {
            Fate::Failed(failure.error.text, class, failure.error.transform)
        }
        (Shaped::Records(_) | Shaped::Dropped, Some((class, transform))) => {
            let text =
                format!("`{transform}` fails ({}), and its settings hide it", class.as_str());
            Fate::Failed(text, Some(class), Some(transform))
        }
        (Shaped::Records(records), None) => sent(envelope, change, &records),
        (Shaped::Dropped, None) => Fate::Dropped,
    };
    (fate, took)
}

fn sent(envelope: &Arc<Envelope>, change: &Change, records: &[SizedRecord]) -> Fate {
    let original = Draft::new(change.clone(), Arc::clone(envelope));
    let bodies: Vec<&[u8]> = records.iter().map(|record| &*record.record().body).collect();
    let remains = remains::of(change, &original, &bodies);
    match remains.content {
        Content::Nothing => Fate::Emptied,
        Content::Recognised | Content::Other(_) => {
            Fate::Sent(records.first().and_then(|record| record.stream().cloned()), remains)
        }
    }
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
    /// Messages that the new chain makes something of in which nothing of the row can be recognised.
    others: Vec<Other>,
    /// The chain before ran out of time.
    is_before_slow: bool,
    /// When the time for the current kind of messages is over, how many of them were tried, and how many
    /// of these ran out of their own.
    end: Instant,
    tried: u64,
    timeouts: u64,
}

/// See [`Content::Other`].
struct Other {
    hash: u64,
    kind: Kind,
    was_sent: bool,
    losers: Vec<String>,
}

impl Comparing<'_> {
    /// Goes over to other messages, for as long as this.
    fn begin(&mut self, end: Instant) {
        (self.end, self.tried, self.timeouts) = (end, 0, 0);
    }

    fn has_time(&self) -> bool {
        Instant::now() <= self.end || (self.tried < TRIED_MIN && self.timeouts == 0)
    }

    fn run(&mut self, change: &Change, kind: Kind) {
        self.tried += 1;
        match kind {
            Kind::Parked => self.found.of += 1,
            Kind::Recent => self.found.sample += 1,
        }
        let (after, before) = if self.is_before_slow {
            // What can be sent is no worse, whatever was before: that need not run out of time again.
            let after = self.fate_after(change);
            let before = match (&after.0, kind) {
                (Fate::Sent(..), Kind::Recent) => return,
                (Fate::Sent(..), Kind::Parked) => {
                    (Fate::Failed(String::new(), None, None), Duration::ZERO)
                }
                _ => self.fate_before(change),
            };
            (after, before)
        } else {
            let before = self.fate_before(change);
            (self.fate_after(change), before)
        };
        self.compare(kind, before, after);
    }

    fn fate_before(&mut self, change: &Change) -> (Fate, Duration) {
        let (fate, took) = fate(self.before, &self.envelopes[0], change);
        self.is_before_slow |= fate.is_timeout();
        self.timeouts += u64::from(fate.is_timeout());
        (fate, took)
    }

    fn fate_after(&mut self, change: &Change) -> (Fate, Duration) {
        let (fate, took) = fate(self.after, &self.envelopes[1], change);
        self.timeouts += u64::from(fate.is_timeout());
        (fate, took)
    }

    fn compare(&mut self, kind: Kind, before: (Fate, Duration), after: (Fate, Duration)) {
        let ((before, took_before), (after, took_after)) = (before, after);
        let was_sent = matches!(before, Fate::Sent(..));
        if kind == Kind::Recent && was_sent {
            self.found.sent += 1;
        }
        let is_other = |remains: &Remains| match remains.content {
            Content::Other(hash) => Some(hash),
            Content::Recognised | Content::Nothing => None,
        };
        let other = match (&before, &after) {
            (Fate::Sent(_, before), Fate::Sent(_, after)) => {
                is_other(after).filter(|_| is_other(before).is_none())
            }
            (Fate::Failed(..), Fate::Sent(_, after)) => is_other(after),
            _ => None,
        };
        if let Some(hash) = other {
            let losers = losers(self.after);
            self.others.push(Other { hash, kind, was_sent, losers });
        }
        match (before, after) {
            (Fate::Failed(..), Fate::Sent(stream, remains)) => {
                if kind == Kind::Parked {
                    self.mended(stream.is_some(), remains);
                }
            }
            (Fate::Sent(..) | Fate::Failed(..), after @ (Fate::Dropped | Fate::Emptied)) => {
                match after {
                    Fate::Emptied => self.found.empties += 1,
                    Fate::Dropped | Fate::Sent(..) | Fate::Failed(..) => self.found.drops += 1,
                }
                let losers = losers(self.after);
                self.lost(kind, was_sent, losers);
            }
            (
                Fate::Sent(..) | Fate::Dropped | Fate::Emptied,
                Fate::Failed(reason, _, transform),
            ) => {
                self.found.breaks += 1;
                self.found.culprits.extend(transform);
                self.found.example.get_or_insert(reason);
            }
            (Fate::Sent(before, remained), Fate::Sent(after, remains)) => {
                self.found.reroutes += u64::from(before != after);
                let is_new = |name: &String| !remained.left_out.contains(name);
                let left_out = remains.left_out.iter().filter(|name| is_new(name));
                self.found.leave_out(left_out.cloned().collect(), remains.columns);
                self.found.keyless += u64::from(remains.lacks_key && !remained.lacks_key);
                self.found.misnamed += u64::from(remains.is_misnamed && !remained.is_misnamed);
                self.took.push((took_before, took_after));
            }
            (Fate::Failed(..), Fate::Failed(..))
            | (Fate::Dropped | Fate::Emptied, Fate::Sent(..) | Fate::Dropped | Fate::Emptied) => {}
        }
    }

    /// A failed message could be sent.
    fn mended(&mut self, is_routed: bool, remains: Remains) {
        let found = &mut self.found;
        found.fixes += 1;
        found.reroutes += u64::from(is_routed);
        found.keyless += u64::from(remains.lacks_key);
        found.misnamed += u64::from(remains.is_misnamed);
        found.leave_out(remains.left_out, remains.columns);
    }

    /// A message would be gone.
    fn lost(&mut self, kind: Kind, was_sent: bool, losers: Vec<String>) {
        let found = &mut self.found;
        match kind {
            _ if losers.is_empty() => {}
            Kind::Parked => found.lost += 1,
            Kind::Recent if was_sent => found.sent_lost += 1,
            Kind::Recent => {}
        }
        found.losers.extend(losers);
    }

    /// What came of it. Where nothing of the rows could be recognised, they may be packed, and every one
    /// is different then; what says the same of each says nothing.
    fn end(mut self) -> Comparison {
        let others = std::mem::take(&mut self.others);
        let different: HashSet<u64> = others.iter().map(|other| other.hash).collect();
        if different.len() > 1 && different.len() * 2 > others.len() {
            self.found.unrecognised = others.len() as u64;
        } else {
            for other in others {
                if other.kind == Kind::Parked {
                    self.found.fixes = self.found.fixes.saturating_sub(1);
                }
                self.found.empties += 1;
                self.lost(other.kind, other.was_sent, other.losers);
            }
        }
        self.found.slower_percent = slower_percent(self.took);
        self.found
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
        let mut comparing = Comparing {
            before,
            after,
            envelopes,
            found,
            took: Vec::new(),
            others: Vec::new(),
            is_before_slow: false,
            end: started + TIME_MAX / 2,
            tried: 0,
            timeouts: 0,
        };
        for change in self.sample.changes() {
            if !comparing.has_time() {
                break;
            }
            comparing.run(&change, Kind::Recent);
        }
        let (ids, parked) = self.stored("failed", PARKED_MAX);
        comparing.found.parked = parked;
        comparing.begin(started + TIME_MAX * 7 / 8);
        self.try_stored(&mut comparing, ids, Kind::Parked);
        let (ids, _) = self.stored("waiting", WAITING_MAX);
        comparing.begin(started + TIME_MAX);
        self.try_stored(&mut comparing, ids, Kind::Recent);
        comparing.end()
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
