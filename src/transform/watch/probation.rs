//! What goes live is on probation. If far more messages fail with it than before, and the chain
//! before handles those, the last good versions come back by themselves, as a new generation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::chain::{Chain, Transform};
use super::super::compiler::Stop;
use super::super::health::Tally;
use super::super::refused::Refused;
use super::super::settings::Judgement;
use super::super::vet::VetReport;
use super::answer::Answer;
use super::promote::{Change, Changes, is_same};
use super::view::TransformState;
use super::{Wake, Watcher, now};
use crate::policy::{self, Standing};

/// How often the counts are looked at.
pub(super) const LOOK: Duration = Duration::from_millis(200);

/// How far back the recent count goes, so that what begins to fail late is not lost among what went
/// well.
const RECENT: Duration = Duration::from_secs(10);

/// Transforms by file, and what vetting said of them.
pub(super) type Versions = (BTreeMap<String, Arc<Transform>>, BTreeMap<String, VetReport>);

/// A chain that has to prove itself.
#[derive(Debug)]
pub(super) struct Probation {
    chain: Arc<Chain>,
    /// The last versions that proved themselves.
    good: BTreeMap<String, Arc<Transform>>,
    /// What vetting said of them.
    reports: BTreeMap<String, VetReport>,
    /// How messages fared with them.
    baseline: Tally,
    /// The files that changed since, as far as they may be taken back.
    changed: BTreeSet<String>,
    /// Files of `good` that are gone since, and those of `changed` that came with that. They come back
    /// with them.
    replaced: BTreeMap<String, BTreeSet<String>>,
    since: Instant,
    /// Failures up to here were not the chain's fault.
    excused: Tally,
    recent: (Instant, Tally),
    /// The number of a check that is under way.
    checking: Option<u64>,
}

impl Probation {
    fn new(
        chain: Arc<Chain>,
        (good, reports): Versions,
        baseline: Tally,
        changed: BTreeSet<String>,
        replaced: BTreeMap<String, BTreeSet<String>>,
    ) -> Self {
        let now = Instant::now();
        let (excused, recent) = (Tally::default(), (now, Tally::default()));
        Self {
            chain,
            good,
            reports,
            baseline,
            changed,
            replaced,
            since: now,
            excused,
            recent,
            checking: None,
        }
    }

    /// The modules that may be needed again.
    pub(super) fn digests(&self) -> impl Iterator<Item = String> {
        self.good.values().map(|transform| transform.module.digest.clone())
    }
}

impl Watcher {
    /// A chain is about to be published in the place of `last`, with what was live until now.
    pub(super) fn begin_probation(
        &mut self,
        chain: &Arc<Chain>,
        live: Versions,
        last: &Chain,
        changes: &Changes,
    ) {
        // What did not prove itself yet is no better.
        let ((mut good, mut reports), baseline, mut changed, mut replaced) =
            match self.probation.take() {
                Some(Probation { good, reports, baseline, changed, replaced, .. }) => {
                    ((good, reports), baseline, changed, replaced)
                }
                None => (live, last.health().tally(), BTreeSet::new(), BTreeMap::new()),
            };
        for (file, change) in changes {
            replaced.remove(file);
            match change {
                Change::To(transform) if transform.settings.rollback == Judgement::On => {
                    changed.insert(file.clone());
                }
                Change::To(transform) => {
                    changed.remove(file);
                    good.insert(file.clone(), Arc::clone(transform));
                    reports.extend(self.reports.get(file).map(|it| (file.clone(), it.clone())));
                }
                Change::Gone => _ = changed.remove(file),
            }
        }
        for (file, change) in changes {
            if let Change::Gone = change {
                let by = self.successors(file, good.get(file), changes, &changed);
                // What took another one's place and was replaced itself.
                for others in replaced.values_mut().filter(|others| others.contains(file)) {
                    others.extend(by.iter().cloned());
                }
                if good.contains_key(file) {
                    replaced.insert(file.clone(), by);
                }
            }
        }
        // What nothing took the place of must not come back with the others.
        replaced.retain(|file, by| {
            by.retain(|by| changed.contains(by));
            if by.is_empty() {
                good.remove(file);
            }
            !by.is_empty()
        });
        if changed.is_empty() {
            return self.end_probation();
        }
        let good_ones = good.values().map(|transform| &**transform);
        let kept = self.last_good.set_probation(good_ones, &reports, &changed, &replaced, baseline);
        if let Err(error) = kept {
            tracing::warn!("could not keep what the chain is on probation against: {error}");
        }
        let (good, chain) = ((good, reports), Arc::clone(chain));
        self.probation = Some(Probation::new(chain, good, baseline, changed, replaced));
    }

    /// The files on probation that came as this one went; none where it was only renamed.
    fn successors(
        &self,
        gone: &str,
        good: Option<&Arc<Transform>>,
        changes: &Changes,
        changed: &BTreeSet<String>,
    ) -> BTreeSet<String> {
        let is_same_module = |change: &Change| match (change, good) {
            (Change::To(new), Some(good)) => new.module.digest == good.module.digest,
            (Change::To(_) | Change::Gone, _) => false,
        };
        if changes.values().any(is_same_module) {
            return BTreeSet::new();
        }
        let by = self.replaced.get(gone).into_iter().flatten();
        by.filter(|by| changes.contains_key(*by) && changed.contains(*by)).cloned().collect()
    }

    /// Goes on with the probation that the last run left: a restart proves nothing.
    pub(super) fn resume_probation(&mut self, chain: &Arc<Chain>) {
        let Some(left) = self.last_good.probation() else { return };
        let mut good = BTreeMap::new();
        for (file, content) in left.good {
            match self.workshop.make(&file, content, &self.known(), &Stop::default()) {
                Ok(made) => _ = good.insert(file, made.transform),
                Err(unusable) => {
                    tracing::warn!(
                        file,
                        "the version that the chain is on probation against cannot be used any more: {}",
                        unusable.reason
                    );
                    return self.end_probation();
                }
            }
        }
        tracing::info!(chain = chain.tag(), "the chain is still on probation");
        let (good, chain) = ((good, left.reports), Arc::clone(chain));
        self.probation =
            Some(Probation::new(chain, good, left.baseline, left.changed, left.replaced));
    }

    fn end_probation(&mut self) {
        self.probation = None;
        if let Err(error) = self.last_good.end_probation() {
            tracing::warn!("could not forget what the chain was on probation against: {error}");
        }
    }

    /// Looks at the counts. Answers whether a probation goes on.
    pub(super) fn watch_probation(&mut self) -> bool {
        let Some(probation) = &mut self.probation else { return false };
        if probation.checking.is_some() {
            return true;
        }
        let now = Instant::now();
        let tally = probation.chain.health().tally();
        let total = tally.since(probation.excused);
        let recent = tally.since(probation.recent.1);
        if now.duration_since(probation.recent.0) >= RECENT {
            probation.recent = (now, tally);
        }
        let is_worse = |tally| policy::probation(probation.baseline, tally) == Standing::Worse;
        if is_worse(total) || is_worse(recent) {
            self.check_with_good(total);
            return self.probation.is_some();
        }
        if policy::is_proven(total, now.duration_since(probation.since)) {
            tracing::info!(
                chain = probation.chain.tag(),
                "the chain has proven itself over {} messages",
                total.messages
            );
            self.end_probation();
        }
        self.probation.is_some()
    }

    /// Tries the failed changes with the last good versions: they may be no better at them.
    fn check_with_good(&mut self, tally: Tally) {
        let Some(probation) = &mut self.probation else { return };
        let failed = probation.chain.health().take_failed();
        let culprits: BTreeSet<String> =
            failed.iter().filter_map(|failed| failed.transform.clone()).collect();
        let Some(vet) = self.vet.clone() else {
            return self.roll_back(&culprits, tally);
        };
        self.next_trial += 1;
        let number = self.next_trial;
        probation.checking = Some(number);
        let good = probation.good.values().cloned().collect();
        let chain = Arc::new(Chain::new(probation.chain.generation, good));
        let mut trial = self.trial_of(chain);
        let unknown = Wake::Checked { number, handled: None, culprits: culprits.clone(), tally };
        let answer = Answer::or(&self.wake, unknown);
        self.lanes.vet(move || {
            let changes: Vec<_> = failed.into_iter().map(|failed| failed.change).collect();
            let handled = vet.handled(&mut trial, &changes);
            let handled = Some((handled, changes.len()));
            answer.send(Wake::Checked { number, handled, culprits, tally });
        });
    }

    pub(super) fn on_checked(
        &mut self,
        number: u64,
        handled: Option<(usize, usize)>,
        culprits: &BTreeSet<String>,
        tally: Tally,
    ) {
        let Some(probation) = &mut self.probation else { return };
        if probation.checking != Some(number) {
            return;
        }
        probation.checking = None;
        // Where nothing could be found out, the versions that proved themselves are the better guess.
        let Some((handled, tried)) = handled else { return self.roll_back(culprits, tally) };
        if tried > 0 && handled * 2 >= tried {
            return self.roll_back(culprits, tally);
        }
        tracing::info!(
            chain = probation.chain.tag(),
            "{} of {} messages failed, and the versions before would not have done better: of {tried} \
             they handle {handled}",
            tally.failed,
            tally.messages
        );
        probation.excused = probation.chain.health().tally();
        probation.recent = (Instant::now(), probation.excused);
    }

    /// Brings the last good versions back and refuses what they replace.
    fn roll_back(&mut self, culprits: &BTreeSet<String>, tally: Tally) {
        let Some(probation) = self.probation.take() else { return };
        let named: Vec<&String> = probation.changed.intersection(culprits).collect();
        let files: Vec<String> = if named.is_empty() {
            probation.changed.iter().cloned().collect()
        } else {
            named.into_iter().cloned().collect()
        };
        let Tally { messages, failed, timeouts } = tally;
        let reason = |instead: &str| {
            format!(
                "{failed} of {messages} messages failed with it ({timeouts} ran out of time), and {instead}; \
                 this content is refused, whatever it is called, until the module or its settings change"
            )
        };
        let mut refused = Vec::new();
        for file in files {
            let Some(bad) = self.live.get(&file).cloned() else { continue };
            let vet = self.reports.remove(&file);
            let instead = match probation.good.get(&file) {
                Some(good) if is_same(good, &bad) => {
                    self.reports.extend(vet.map(|vet| (file, vet)));
                    continue;
                }
                Some(good) => {
                    let report = probation.reports.get(&file);
                    self.reports.extend(report.map(|report| (file.clone(), report.clone())));
                    self.live.insert(file.clone(), Arc::clone(good));
                    format!("the version before ({}) is back", short(&good.module.digest))
                }
                None => {
                    self.live.remove(&file);
                    match probation.replaced.iter().find(|(_, by)| by.contains(&file)) {
                        Some((old, _)) => format!("`{old}`, which was there before, is back"),
                        None => "the chain goes on without it".to_owned(),
                    }
                }
            };
            let reason = reason(&instead);
            let version = short(&bad.module.digest);
            tracing::warn!(file, version, "rolled a transform back: {reason}");
            let entry = Refused {
                digest: bad.module.digest.clone(),
                settings: Some(bad.settings.digest().to_owned()),
                state: TransformState::RolledBack,
                reason,
                since: now(),
                vet,
            };
            refused.push((file, entry));
        }
        if refused.is_empty() {
            return;
        }
        let refused_files = refused.iter().map(|(file, _)| file.clone()).collect();
        self.take_back_steps(&probation, &refused_files);
        // What was being tried stood beside the chain that goes; it is tried again.
        self.trial = None;
        let generation = self.chain().generation + 1;
        let chain = Chain::new(generation, self.live.values().cloned().collect());
        // In this order: a crash in between leaves a file that counts as new, and never one that is
        // refused without anything in its place.
        self.keep_copies();
        for (file, entry) in refused {
            self.refusals.insert_rolled_back(&file, entry);
        }
        self.end_probation();
        // Who sees the chain sees what is to be known of it.
        self.show();
        self.send(Arc::new(chain));
    }
}

impl Watcher {
    /// Brings files back that are gone, where what came with that is refused now; what else came with
    /// it waits, as it would have done had the refusal come first.
    fn take_back_steps(&mut self, probation: &Probation, refused: &BTreeSet<String>) {
        for (old, by) in &probation.replaced {
            let Some(good) = probation.good.get(old).filter(|_| !by.is_disjoint(refused)) else {
                continue;
            };
            self.live.insert(old.clone(), Arc::clone(good));
            let report = probation.reports.get(old);
            self.reports.extend(report.map(|report| (old.clone(), report.clone())));
            self.notices.remove(old);
            for file in by.difference(refused) {
                let Some(live) = self.live.remove(file) else { continue };
                self.live.extend(probation.good.get(file).map(|it| (file.clone(), Arc::clone(it))));
                if !matches!(self.ready.get(file), Some(Change::To(_))) {
                    self.get_ready(file, Change::To(live), Instant::now());
                }
            }
            // Unless it is on its way back by itself.
            if !matches!(self.ready.get(old), Some(Change::To(_))) {
                self.replaced.insert(old.clone(), by.clone());
                self.get_ready(old, Change::Gone, Instant::now());
            }
        }
    }
}

/// As much of a digest as lists show of it.
fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}
