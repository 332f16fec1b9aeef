//! The first load: everything must be usable, as it is or as a copy of the last good one. What
//! changed while nothing ran is tried like any other change, on what the store holds.
//!
//! A folder that is another one than the last with modules in it, and empty, is no deletion of everything,
//! at a start as little as later: a volume that is not mounted looks like that, and what the modules hide
//! would be delivered. The last chain goes on from its copies. Deletions in the same folder count.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::super::chain::{Chain, Transform};
use super::super::compiler::Stop;
use super::super::folder::{self, Look, Seen};
use super::super::loader::{self, Module};
use super::super::vet::{Comparison, Vet};
use super::promote::{Change, Changes, digest_of, judged, under_judgement};
use super::settle::{SETTLE, UNFINISHED};
use super::{Error, IS_AWAY, Watcher};

/// How often a folder is looked at that somebody is copying files into.
const LOOKS_MAX: usize = 50;

impl Watcher {
    /// `no_transforms`: somebody says that an empty folder is meant.
    pub(super) fn load_first(
        &mut self,
        last_digest: Option<&str>,
        no_transforms: bool,
    ) -> Result<(), Error> {
        let look = self.first_look()?;
        if !no_transforms && self.is_away(&look) {
            return self.load_copies(last_digest);
        }
        if let Some(folder) = self.folder {
            self.note_folder(folder, &look);
        }
        let mut unusable = Vec::new();
        // Of what changed while nothing ran, nobody can tell what came with what.
        let mut step: BTreeSet<String> =
            look.misnamed.iter().map(|(name, _)| name.clone()).collect();
        self.settler.note_first(&look, Instant::now());
        let mut changes = Changes::new();
        let mut before: BTreeMap<String, Arc<Transform>> = BTreeMap::new();
        for (file, seen) in &look.modules {
            if self.was_rejected_before(file) {
                continue;
            }
            self.settler.note_handled(file, seen.clone());
            let made = match self.workshop.make_file(file, &self.known(), &Stop::default()) {
                Ok(made) => made,
                Err(refusal) => {
                    let Some(good) = self.load_last_good(file) else {
                        unusable.push(format!("`{file}`: {}", refusal.reason));
                        continue;
                    };
                    tracing::warn!(
                        file,
                        "the file does not load, so its last good version goes on: {}",
                        refusal.reason
                    );
                    if !self.refusals.get(file).is_some_and(|it| it.is_unusable(&refusal.digest)) {
                        step.insert(file.clone());
                    }
                    self.note_unusable(file, refusal);
                    before.insert(file.clone(), Arc::clone(&good));
                    self.live.insert(file.clone(), good);
                    continue;
                }
            };
            if let Err(error) = self.last_good.keep(&made.transform.module.digest, &made.bytes) {
                tracing::warn!(file, "could not keep a copy of the transform: {error}");
            }
            if self.last_good.is(&made.transform) {
                before.insert(file.clone(), Arc::clone(&made.transform));
                self.live.insert(file.clone(), made.transform);
                continue;
            }
            let good = self.load_last_good(file);
            if let Some(good) = &good {
                before.insert(file.clone(), Arc::clone(good));
            }
            if let Some(refused) = self.refusals.of(&made.transform) {
                // Refused by an earlier run, and the same still, be it under another name.
                if !self.refusals.get(file).is_some_and(|it| it.is_of(&made.transform)) {
                    step.insert(file.clone());
                }
                self.refusals.insert(file, refused);
                self.live.extend(good.map(|good| (file.clone(), good)));
            } else {
                step.insert(file.clone());
                changes.insert(file.clone(), Change::To(made.transform));
            }
        }
        if !unusable.is_empty() {
            return Err(Error::Unusable { files: unusable.join("; ") });
        }
        let known: Vec<String> = self.refusals.iter().map(|(file, _)| file.clone()).collect();
        for file in known.iter().filter(|file| !look.modules.contains_key(*file)) {
            self.refusals.remove(file);
        }
        // Those of files that are gone too: what they were good for is told as they leave.
        for file in self.last_good.files() {
            if let Some(report) = self.last_good.vet(file) {
                self.reports.insert(file.to_owned(), report);
            }
        }
        let gone: Vec<String> = self
            .last_good
            .files()
            .filter(|file| !look.modules.contains_key(*file))
            .map(str::to_owned)
            .collect();
        for file in gone {
            changes.insert(file, Change::Gone);
        }
        let comparison = self.vet_first(&before, &mut changes);
        self.hold_first(&mut before, &mut changes, &step)?;

        for (file, change) in &changes {
            if let Change::To(transform) = change {
                self.live.insert(file.clone(), Arc::clone(transform));
                self.refusals.remove(file);
            }
        }
        // What was there before is not being put there.
        let long_ago = Instant::now().checked_sub(UNFINISHED);
        self.orphans.extend(look.orphans.iter().filter_map(|file| Some((file.clone(), long_ago?))));
        self.warn_of_what_is_odd(&look, &[]);
        let chain = self.first_chain(last_digest);
        let reports = self.reports.clone();
        self.note_reports(&chain, &changes, comparison.as_ref(), None);
        self.resume_probation(&chain);
        if !changes.is_empty() && (!before.is_empty() || self.probation.is_some()) {
            self.begin_probation(&chain, (before, reports), &Chain::empty(0), &changes);
        }
        self.publish(chain);
        self.refusals.save();
        self.show();
        Ok(())
    }

    /// The chain of what is live, with the number that the store knows where it is the same.
    fn first_chain(&self, last_digest: Option<&str>) -> Arc<Chain> {
        let last = self.chain().generation;
        let is_last = last_digest == Some(digest_of(&self.live).as_str());
        let generation = if is_last { last } else { last + 1 };
        Arc::new(Chain::new(generation, self.live.values().cloned().collect()))
    }

    /// Whether the folder is not the one that the last chain's modules stood in, and has none.
    fn is_away(&self, look: &Look) -> bool {
        let had_modules = self.last_good.files().next().is_some();
        look.modules.is_empty()
            && had_modules
            && (self.folder.is_none() || self.folder != self.last_good.place())
    }

    /// Goes on with the last chain, of whose files the folder shows none.
    fn load_copies(&mut self, last_digest: Option<&str>) -> Result<(), Error> {
        self.folder = self.last_good.place();
        let files: Vec<String> = self.last_good.files().map(str::to_owned).collect();
        let mut lost = Vec::new();
        for file in files {
            if let Some(report) = self.last_good.vet(&file) {
                self.reports.insert(file.clone(), report);
            }
            let Some(good) = self.load_last_good(&file) else {
                lost.push(format!("`{file}`"));
                continue;
            };
            self.live.insert(file.clone(), good);
            let by = self.last_good.stays_for(&file);
            if !by.is_empty() {
                self.replaced.insert(file.clone(), by);
                self.get_ready(&file, Change::Gone, Instant::now());
            }
        }
        if !lost.is_empty() {
            let (dir, files) = (self.dir().to_owned(), lost.join(", "));
            return Err(Error::Away { path: dir, files });
        }
        self.warn(format!("the transforms folder {} {IS_AWAY}", self.dir().display()));
        let chain = self.first_chain(last_digest);
        self.resume_probation(&chain);
        self.publish(chain);
        self.show();
        Ok(())
    }

    /// Keeps what is gone where what came with that is refused, and what else came with it back, as
    /// [`super::replaced`] has it.
    fn hold_first(
        &mut self,
        before: &mut BTreeMap<String, Arc<Transform>>,
        changes: &mut Changes,
        step: &BTreeSet<String>,
    ) -> Result<(), Error> {
        let is_gone = |change: &Change| matches!(change, Change::Gone);
        let gone = changes.iter().filter(|(_, change)| is_gone(change));
        let gone: Vec<String> = gone.map(|(file, _)| file.clone()).collect();
        let mut held = BTreeSet::new();
        for file in gone {
            let mut by = self.last_good.stays_for(&file);
            by.extend(step.iter().cloned());
            let is_same_module = |change: &Change| match change {
                Change::To(new) => self.last_good.has_module(&file, &new.module.digest),
                Change::Gone => false,
            };
            if by.is_empty() || changes.values().any(is_same_module) {
                continue;
            }
            let refused: Vec<String> =
                by.iter().filter(|by| self.is_refused(by)).map(|by| format!("`{by}`")).collect();
            let good = self.load_last_good(&file);
            self.replaced.insert(file.clone(), by.clone());
            let Some(good) = good else {
                if refused.is_empty() {
                    continue;
                }
                let refused = refused.join(", ");
                let files = format!("`{file}`, which is gone, in place of {refused}, refused");
                return Err(Error::Unusable { files });
            };
            before.insert(file.clone(), Arc::clone(&good));
            if refused.is_empty() {
                continue;
            }
            self.live.insert(file.clone(), good);
            held.extend(by);
            held.insert(file);
        }
        for file in held {
            let Some(change) = changes.remove(&file) else { continue };
            let good = before.get(&file).cloned();
            self.live.extend(good.map(|good| (file.clone(), good)));
            self.get_ready(&file, change, Instant::now());
        }
        Ok(())
    }

    /// Whether the last run rejected this very module, because it does not load, and ran without. To go on
    /// like that hides nothing that was not hidden before, and a restart in the night is no time to ask
    /// for a hand. It is looked at again once everything runs: it may have taken minutes to reject it.
    fn was_rejected_before(&self, file: &str) -> bool {
        let was_live = self.last_good.files().any(|live| live == file);
        let Some(refused) = self.refusals.get(file).filter(|_| !was_live) else { return false };
        let content = folder::read(self.dir(), file);
        let digest = content.map(|content| loader::digest(&content.module)).unwrap_or_default();
        refused.is_unusable(&digest)
    }

    /// Somebody may be copying files into the folder at this moment.
    fn first_look(&mut self) -> Result<Look, Error> {
        let dir = &self.dir().to_owned();
        let failed = |source| Error::Folder { path: dir.to_owned(), source };
        let mut look = folder::look(dir).map_err(failed)?;
        self.folder = folder::identity(dir).ok();
        for _ in 0..LOOKS_MAX {
            if !look.modules.values().any(is_fresh) {
                break;
            }
            std::thread::sleep(SETTLE);
            let next = folder::look(dir).map_err(failed)?;
            if next == look {
                break;
            }
            look = next;
        }
        Ok(look)
    }

    pub(super) fn known(&self) -> Vec<Arc<Module>> {
        self.live.values().map(|live| Arc::clone(&live.module)).collect()
    }

    fn load_last_good(&self, file: &str) -> Option<Arc<Transform>> {
        let made =
            self.workshop.make(file, self.last_good.get(file)?, &self.known(), &Stop::default());
        let made = made.inspect_err(|refusal| {
            tracing::warn!(file, "the copy of its last good version fails too: {}", refusal.reason);
        });
        made.ok().map(|made| made.transform)
    }

    /// Tries the changes, takes out what breaks something, and puts the last good versions in their
    /// places.
    fn vet_first(
        &mut self,
        before: &BTreeMap<String, Arc<Transform>>,
        changes: &mut Changes,
    ) -> Option<Comparison> {
        let vet = self.vet.clone()?;
        loop {
            let under_judgement = under_judgement(changes);
            if under_judgement.is_empty() {
                return None;
            }
            let comparison = self.compare_first(&*vet, before, changes);
            let broken = comparison.as_ref().map_or(under_judgement, |it| judged(changes, it));
            if broken.is_empty() {
                return comparison;
            }
            for transform in broken {
                let file = &*transform.file;
                self.refuse(&transform, comparison.as_ref());
                changes.remove(file);
                let good = before.get(file).cloned();
                self.live.extend(good.map(|good| (file.to_owned(), good)));
            }
        }
    }

    fn compare_first(
        &self,
        vet: &dyn Vet,
        before: &BTreeMap<String, Arc<Transform>>,
        changes: &Changes,
    ) -> Option<Comparison> {
        let mut after = self.live.clone();
        for (file, change) in changes {
            if let Change::To(transform) = change {
                after.insert(file.clone(), Arc::clone(transform));
            }
        }
        let chain = |transforms: &BTreeMap<String, Arc<Transform>>| {
            Arc::new(Chain::new(0, transforms.values().cloned().collect()))
        };
        let (mut before, mut after) = (self.trial_of(chain(before)), self.trial_of(chain(&after)));
        // On a thread of its own: the one that starts a process may not wait for the store.
        std::thread::scope(|scope| {
            let compare = scope.spawn(|| vet.compare(&mut before, &mut after));
            let compared = compare.join();
            if compared.is_err() {
                tracing::error!("the trial of the changed transforms failed, which is a defect");
            }
            compared.ok()
        })
    }
}

fn is_fresh(seen: &Seen) -> bool {
    // A time in the future has no age, and counts as old: it must not keep a file waiting.
    let age = seen.modified().and_then(|modified| modified.elapsed().ok());
    age.is_some_and(|age| age < UNFINISHED)
}
