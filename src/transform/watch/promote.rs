//! How what is ready becomes the next chain: tried first, then published whole.
//!
//! ```text
//! made ─┐                       ┌─ breaks nothing ──▶ published, on probation
//!       ├─▶ ready ──▶ on trial ─┤
//! gone ─┘     ▲                 └─ breaks something ─▶ refused; the rest is tried without it
//!             └── a file changed meanwhile
//! ```
//!
//! What files that are gone break is not the fault of what comes with them: where something breaks, the
//! others are tried once more against the chain without those.
//!
//! What goes and what comes with it is one step (see `replaced`).
//!
//! Where files are gone and nothing else changed there is nothing to decide: that goes live at once, and
//! what the files were good for is found out afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::chain::{self, Chain, Transform};
use super::super::compiler::Stop;
use super::super::folder::{self, Seen};
use super::super::loader::{self, Module};
use super::super::refused::Refused;
use super::super::runner::Runner;
use super::super::settings::Judgement;
use super::super::vet::{Comparison, Trial, Vet, VetReport, VetResult};
use super::answer::Answer;
use super::view::TransformState;
use super::workshop::{LARGE_BYTES, Made, Unusable};
use super::{Wake, Watcher, now};

/// How long a change that is ready waits for others that are not, so that files that are replaced
/// together go live together.
const HOLD_MAX: Duration = Duration::from_secs(2);

/// What is to become of one file.
#[derive(Clone, Debug)]
pub(super) enum Change {
    To(Arc<Transform>),
    Gone,
}

impl Change {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::To(one), Self::To(other)) => Arc::ptr_eq(one, other),
            (Self::Gone, Self::Gone) => true,
            (Self::To(_), Self::Gone) | (Self::Gone, Self::To(_)) => false,
        }
    }
}

/// Changes by file.
pub(super) type Changes = BTreeMap<String, Change>;

/// A chain that is being tried.
#[derive(Debug)]
pub(super) struct UnderTrial {
    number: u64,
    changes: Changes,
    chain: Arc<Chain>,
    /// Where this is tried against the chain without the files that are gone: how it fared against the
    /// one with them.
    with_gone: Option<Comparison>,
}

impl UnderTrial {
    pub(super) fn transforms(&self) -> impl Iterator<Item = &Arc<Transform>> {
        self.changes.values().filter_map(|change| match change {
            Change::To(transform) => Some(transform),
            Change::Gone => None,
        })
    }
}

impl Watcher {
    /// Starts to make a transform of a file. `known`: the modules that are live.
    pub(super) fn begin(&mut self, file: String, seen: Seen, known: &Arc<[Arc<Module>]>) {
        let workshop = Arc::clone(&self.workshop);
        let known = Arc::clone(known);
        self.making.insert(file.clone(), seen.clone());
        let stop = Stop::default();
        let begun = (Instant::now(), stop.clone());
        if let Some((_, before)) = self.stops.insert(file.clone(), begun) {
            before.stop();
        }
        let of = seen.clone();
        let demanding = self.lanes.demanding.clone();
        let defect = Unusable {
            digest: String::new(),
            reason: "it could not be loaded, by a defect; the log has more".into(),
            may_be_unfinished: false,
        };
        let answer = Wake::Made {
            file: file.clone(),
            seen: seen.clone(),
            made: Err(defect),
            took: Duration::ZERO,
        };
        let answer = Answer::or(&self.wake, answer);
        self.lanes.make(&of, move || {
            let is_demanding = seen.module_bytes() < LARGE_BYTES && workshop.is_demanding(&file);
            let make = move || {
                let started = Instant::now();
                let made = workshop.make_file(&file, &known, &stop);
                let took = started.elapsed();
                answer.send(Wake::Made { file, seen, made, took });
            };
            if is_demanding { demanding.run(make) } else { make() }
        });
    }

    /// A file was made, or turned out to be no transform.
    pub(super) fn on_made(
        &mut self,
        file: &str,
        seen: Seen,
        made: Result<Made, Unusable>,
        took: Duration,
    ) {
        if self.making.get(file) == Some(&seen) {
            self.making.remove(file);
            self.stops.remove(file);
        }
        if folder::look_at(self.dir(), file).as_ref() != Some(&seen) {
            // It changed while it was read; what it is now is made next.
            return;
        }
        let made = match made {
            Ok(made) => made,
            Err(unusable) if unusable.may_be_unfinished => {
                if !self.settler.may_be_unfinished(file, Instant::now()) {
                    self.reject(file, seen, unusable);
                }
                return;
            }
            Err(unusable) => return self.reject(file, seen, unusable),
        };
        self.settler.note_handled(file, seen);
        let Made { transform, bytes } = made;
        if self.live.get(file).is_some_and(|live| is_same(live, &transform)) {
            self.refusals.remove(file);
            self.ready.remove(file);
            return;
        }
        let refused = self.refusals.of(&transform);
        if let Some(refused) = refused.filter(|it| it.state == TransformState::RolledBack) {
            if self.refusals.get(file) != Some(&refused) {
                tracing::warn!(
                    file,
                    "refused a transform that was rolled back: {}",
                    refused.reason
                );
                self.refusals.insert(file, refused);
            }
            self.ready.remove(file);
            return;
        }
        if let Err(error) = self.last_good.keep(&transform.module.digest, &bytes) {
            tracing::warn!(file, "could not keep a copy of the transform: {error}");
        }
        tracing::info!(file, "loaded a transform in {} ms", took.as_millis());
        let seen = self.settler.changed_since(file).unwrap_or_else(Instant::now);
        self.get_ready(file, Change::To(transform), seen);
    }

    fn reject(&mut self, file: &str, seen: Seen, unusable: Unusable) {
        let stays = if self.live.contains_key(file) {
            "the version before stays live"
        } else {
            "it does not go live"
        };
        // Something may put the same there again and again.
        let is_known = self.refusals.get(file).is_some_and(|known| {
            known.is_unusable(&unusable.digest) && known.reason == unusable.reason
        });
        if !is_known {
            tracing::warn!(file, "rejected a transform, and {stays}: {}", unusable.reason);
        }
        self.settler.note_handled(file, seen);
        if let Some(Change::To(_)) = self.ready.get(file) {
            self.ready.remove(file);
        }
        self.note_unusable(file, unusable);
    }

    pub(super) fn note_unusable(&mut self, file: &str, unusable: Unusable) {
        let Unusable { digest, reason, may_be_unfinished: _ } = unusable;
        let (state, since) = (TransformState::Rejected, now());
        let refused = Refused { digest, settings: None, state, reason, since, vet: None };
        self.refusals.insert(file, refused);
    }

    /// The file is gone for good.
    pub(super) fn on_gone(&mut self, file: &str, since: Instant) {
        self.note_replaced_again(file, since);
        self.refusals.remove(file);
        self.making.remove(file);
        if let Some((_, stop)) = self.stops.remove(file) {
            stop.stop();
        }
        if !self.live.contains_key(file) {
            self.ready.remove(file);
        } else if !matches!(self.ready.get(file), Some(Change::Gone)) {
            self.note_replaced(file, since);
            self.get_ready(file, Change::Gone, since);
        }
    }

    pub(super) fn get_ready(&mut self, file: &str, change: Change, seen: Instant) {
        self.ready.insert(file.to_owned(), change);
        self.ready_since.insert(file.to_owned(), (Instant::now(), seen));
    }

    /// What is ready and may go live now; since when the first of it is ready, and since when it is in
    /// the folder.
    fn due(&mut self) -> Option<(Changes, (Instant, Instant))> {
        let Self { ready, ready_since, replaced, .. } = self;
        ready_since.retain(|file, _| ready.contains_key(file));
        replaced.retain(|file, _| matches!(ready.get(file), Some(Change::Gone)));
        let held = self.held_back();
        let changes = self.ready.iter().filter(|(file, _)| !held.contains(*file));
        let changes: Changes =
            changes.map(|(file, change)| (file.clone(), change.clone())).collect();
        let since = self.ready_since.iter().filter(|(file, _)| changes.contains_key(*file));
        let first = since.map(|(_, since)| *since).reduce(|a, b| (a.0.min(b.0), a.1.min(b.1)));
        Some((changes, first?))
    }

    /// Tries or publishes what is ready, unless something else is about to be. Answers whether it
    /// waits.
    pub(super) fn advance(&mut self, is_unsettled: bool) -> bool {
        if self.trial.is_some() {
            return false;
        }
        let Some((changes, (ready_since, seen))) = self.due() else { return false };
        // What takes long holds nothing else up that comes later.
        let is_new = |(since, _): &(Instant, Stop)| since.elapsed() < HOLD_MAX;
        let is_unsettled = is_unsettled || self.stops.values().any(is_new);
        if is_unsettled && ready_since.elapsed() < HOLD_MAX {
            return true;
        }
        let chain = self.with(&changes, seen);
        if chain.digest() == self.chain().digest() {
            self.settle_with(&changes);
            return false;
        }
        match self.vet.clone().filter(|_| !under_judgement(&changes).is_empty()) {
            None => {
                let before = self.chain();
                self.promote(Arc::clone(&chain), &changes, None, None);
                self.look_back(before, chain, &changes);
            }
            Some(vet) => self.try_against(vet, self.chain(), (chain, changes), None),
        }
        false
    }

    /// Tries a chain of these changes beside the traffic.
    fn try_against(
        &mut self,
        vet: Arc<dyn Vet>,
        before: Arc<Chain>,
        (chain, changes): (Arc<Chain>, Changes),
        with_gone: Option<Comparison>,
    ) {
        self.next_trial += 1;
        let number = self.next_trial;
        let (mut before, mut after) = (self.trial_of(before), self.trial_of(Arc::clone(&chain)));
        let answer = Answer::or(&self.wake, Wake::Tried { number, comparison: None });
        self.lanes.vet(move || {
            let comparison = Some(vet.compare(&mut before, &mut after));
            answer.send(Wake::Tried { number, comparison });
        });
        self.trial = Some(UnderTrial { number, changes, chain, with_gone });
    }

    /// Finds out what fails without the files that are gone, once it is live.
    fn look_back(&self, before: Arc<Chain>, after: Arc<Chain>, changes: &Changes) {
        let gone = changes.iter().filter(|(_, change)| matches!(change, Change::Gone));
        let gone: Vec<String> = gone.map(|(file, _)| file.clone()).collect();
        let Some(vet) = self.vet.clone().filter(|_| !gone.is_empty()) else { return };
        let (mut before, mut after) = (self.trial_of(before), self.trial_of(after));
        let wake = self.wake.clone();
        self.lanes.vet(move || {
            let comparison = vet.compare(&mut before, &mut after);
            // A failed send: the watch has ended.
            drop(wake.send(Wake::LookedBack { gone, comparison }));
        });
    }

    pub(super) fn trial_of(&self, chain: Arc<Chain>) -> Trial {
        Trial { chain, runner: Runner::quiet(Arc::clone(&self.workshop.engine)) }
    }

    /// The chain as it would be.
    fn with(&self, changes: &Changes, seen: Instant) -> Arc<Chain> {
        let mut live = self.live.clone();
        apply(&mut live, changes);
        let generation = self.chain().generation + 1;
        let mut chain = Chain::new(generation, live.into_values().collect());
        chain.seen_at = Some(seen);
        Arc::new(chain)
    }

    /// A trial has ended, or broken off.
    pub(super) fn on_tried(&mut self, number: u64, comparison: Option<Comparison>) {
        let Some(trial) = self.trial.take_if(|trial| trial.number == number) else { return };
        let UnderTrial { changes, chain, with_gone, .. } = trial;
        if changes.iter().any(|(file, change)| !self.is_current(file, change)) {
            // What it was about is not what the folder shows any more.
            return;
        }
        let refused = comparison
            .as_ref()
            .map_or_else(|| under_judgement(&changes), |comparison| judged(&changes, comparison));
        let is_gone = |change: &Change| matches!(change, Change::Gone);
        let is_for_what_is_gone = with_gone.is_none() && changes.values().any(is_gone);
        match (comparison, self.vet.clone()) {
            (comparison, _) if refused.is_empty() => {
                let without = with_gone.as_ref().or(comparison.as_ref());
                self.promote(chain, &changes, comparison.as_ref(), without);
            }
            (Some(comparison), Some(vet)) if is_for_what_is_gone => {
                let gone = changes.iter().filter(|(_, change)| is_gone(change));
                let gone = gone.map(|(file, change)| (file.clone(), change.clone())).collect();
                let without = self.with(&gone, Instant::now());
                self.try_against(vet, without, (chain, changes), Some(comparison));
            }
            (comparison, _) => {
                for transform in refused {
                    self.refuse(&transform, comparison.as_ref());
                    self.ready.remove(&*transform.file);
                }
                // What is left is tried without them.
                self.advance(false);
            }
        }
    }

    fn is_current(&self, file: &str, change: &Change) -> bool {
        // Of a folder that is away nothing is known.
        let seen = self.dir().exists().then(|| folder::look_at(self.dir(), file));
        self.ready.get(file).is_some_and(|ready| ready.is(change))
            && seen.is_none_or(|seen| self.settler.is_handled(file, seen.as_ref()))
    }

    /// Refuses a version for what a trial showed, or for a trial that broke off.
    pub(super) fn refuse(&mut self, transform: &Transform, comparison: Option<&Comparison>) {
        let report = comparison.map(|it| VetReport::of(it).with(VetResult::Refused));
        let settings = folder::settings_name(&transform.file);
        let broke_off = || {
            format!(
                "the trial of the chain with it broke off, by a defect; the log has more. Set vet = \"off\" \
                 in {settings} to go without; put there anew, it is tried again"
            )
        };
        let of = |refusal: fn(&Comparison, &str) -> Option<String>| {
            comparison.map_or_else(broke_off, |it| refusal(it, &settings).unwrap_or_default())
        };
        tracing::warn!(
            file = &*transform.file,
            vet = report.as_ref().map(VetReport::text),
            "vetting refused a transform: {}",
            of(Comparison::refusal_for_log)
        );
        let refused = Refused {
            digest: transform.module.digest.clone(),
            settings: Some(transform.settings.digest().to_owned()),
            state: TransformState::Rejected,
            reason: of(Comparison::refusal),
            since: now(),
            vet: report,
        };
        self.refusals.insert(&transform.file, refused);
    }

    /// Publishes a chain that may go live.
    fn promote(
        &mut self,
        chain: Arc<Chain>,
        changes: &Changes,
        comparison: Option<&Comparison>,
        without: Option<&Comparison>,
    ) {
        let before = (self.live.clone(), self.reports.clone());
        let last = self.chain();
        self.note_reports(&chain, changes, comparison, without);
        self.settle_with(changes);
        self.begin_probation(&chain, before, &last, changes);
        let seen = chain.seen_at;
        // Who sees the chain sees what is to be known of it.
        self.show();
        self.publish(chain);
        if let Some(seen) = seen {
            tracing::info!(
                "the change of the folder was live {} ms after it was seen",
                seen.elapsed().as_millis()
            );
        }
    }

    /// These changes are part of the chain now.
    fn settle_with(&mut self, changes: &Changes) {
        apply(&mut self.live, changes);
        for (file, change) in changes {
            if self.ready.get(file).is_some_and(|ready| ready.is(change)) {
                self.ready.remove(file);
            }
            self.refusals.remove(file);
        }
    }

    /// Makes `live` the chain that everybody uses.
    pub(super) fn publish(&mut self, chain: Arc<Chain>) {
        self.keep_copies();
        self.send(chain);
    }

    /// Keeps copies of what is live, for a restart, and of what may be needed next.
    pub(super) fn keep_copies(&mut self) {
        let mut others: Vec<String> = self
            .ready
            .values()
            .filter_map(|change| match change {
                Change::To(transform) => Some(transform.module.digest.clone()),
                Change::Gone => None,
            })
            .collect();
        others.extend(self.probation.iter().flat_map(super::probation::Probation::digests));
        // Somebody may have cleared the copies away.
        for (file, live) in &self.live {
            let digest = &live.module.digest;
            if self.last_good.has(digest) {
                continue;
            }
            let there = folder::read(self.dir(), file).ok();
            if let Some(there) = there.filter(|there| loader::digest(&there.module) == *digest)
                && let Err(error) = self.last_good.keep(digest, &there.module)
            {
                tracing::warn!(file, "could not keep a copy of the transform: {error}");
            }
        }
        let live = self.live.values().map(|live| &**live);
        let staying = self.staying();
        if let Err(error) = self.last_good.publish(live, &self.reports, &staying, &others) {
            tracing::warn!("could not keep copies of the live transforms: {error}");
        }
        self.staying = staying;
    }

    pub(super) fn send(&self, chain: Arc<Chain>) {
        let files: Vec<&str> = chain.files().collect();
        tracing::info!(
            chain = chain.tag(),
            "live transforms: {}",
            if files.is_empty() { "none".to_owned() } else { files.join(", ") }
        );
        self.publisher.send_replace(chain);
    }
}

/// The changed transforms that are refused for what broke or was lost: those that did it, or all that
/// are to be judged where none of them did.
pub(super) fn judged(changes: &Changes, comparison: &Comparison) -> Vec<Arc<Transform>> {
    let (breaks, loses) = (comparison.breaks > 0, comparison.loses());
    if !breaks && !loses {
        return Vec::new();
    }
    let judged = under_judgement(changes);
    let judged: Vec<Arc<Transform>> =
        judged.into_iter().filter(|transform| breaks || !transform.settings.may_drop).collect();
    let named = |culprits: &BTreeSet<String>| {
        let is_named = |transform: &&Arc<Transform>| culprits.contains(&*transform.file);
        judged.iter().filter(is_named).cloned().collect::<Vec<_>>()
    };
    let culprits = named(if breaks { &comparison.culprits } else { &comparison.losers });
    if culprits.is_empty() { judged } else { culprits }
}

/// The changed transforms whose settings do not keep them out of trials.
pub(super) fn under_judgement(changes: &Changes) -> Vec<Arc<Transform>> {
    let transforms = changes.values().filter_map(|change| match change {
        Change::To(transform) => Some(transform),
        Change::Gone => None,
    });
    transforms.filter(|transform| transform.settings.vet == Judgement::On).cloned().collect()
}

fn apply(live: &mut BTreeMap<String, Arc<Transform>>, changes: &Changes) {
    for (file, change) in changes {
        match change {
            Change::To(transform) => live.insert(file.clone(), Arc::clone(transform)),
            Change::Gone => live.remove(file),
        };
    }
}

/// Whether two transforms are the same module with the same settings.
pub(super) fn is_same(one: &Transform, other: &Transform) -> bool {
    one.module.digest == other.module.digest && one.settings.digest() == other.settings.digest()
}

/// The digest of a chain of these.
pub(super) fn digest_of(live: &BTreeMap<String, Arc<Transform>>) -> String {
    chain::digest(&live.values().cloned().collect::<Vec<_>>())
}
