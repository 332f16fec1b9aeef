//! A file that is taken away while others come: one look at the folder shows it replaced, so that the
//! chain replaces it in one step, and the old one serves until that step can be taken whole.
//!
//! ```text
//! gone, and nothing came with it ─────────────────────▶ leaves the chain
//! gone, and what came with it ─┬─ is on its way ──────▶ waits
//!                              ├─ is refused ─────────▶ waits, loudly, until it is mended or taken away
//!                              └─ is all ready ───────▶ goes with it
//! ```
//!
//! Nobody can tell whether what came with a deletion was meant to take the place of what is gone: a file
//! that is renamed while its content changes has no more in common with the old one than any other. To
//! go on without either would deliver what the old one is there to hide, which nothing takes back, and to
//! go on with the old one is what a new version under the same name would get. So the old one stays where
//! any of what came with it is not admitted, and nothing of the step goes live alone: two versions of one
//! transform must not be live together either.
//!
//! A deletion alone waits for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::Watcher;
use super::promote::Change;

/// How long before the deletion its replacement may have come: who copies a file under its new name and
/// then deletes the old one takes a moment.
const TOGETHER: Duration = Duration::from_secs(5);

/// A deletion that waits, and what for.
#[derive(Debug, Default)]
pub(super) struct Waiting<'a> {
    pub(super) coming: Vec<&'a str>,
    pub(super) refused: Vec<&'a str>,
}

impl Watcher {
    /// A live file is gone, since then.
    pub(super) fn note_replaced(&mut self, file: &str, since: Instant) {
        let by = self.came_with(since);
        self.replaced.insert(file.to_owned(), by);
    }

    /// A file is gone, since then. Where a deletion waits for it, what came in its place is waited for.
    pub(super) fn note_replaced_again(&mut self, file: &str, since: Instant) {
        let came = self.came_with(since);
        for by in self.replaced.values_mut() {
            if by.remove(file) {
                by.extend(came.iter().cloned());
            }
        }
    }

    /// What came with a deletion at this time.
    fn came_with(&self, since: Instant) -> BTreeSet<String> {
        self.settler.seen_after(since.checked_sub(TOGETHER).unwrap_or(since))
    }

    /// The deletions that wait, each with what it waits for.
    pub(super) fn waiting_deletions(&self) -> BTreeMap<&str, Waiting<'_>> {
        let waiting = self.replaced.iter().filter_map(|(file, by)| {
            let is_gone = matches!(self.ready.get(file), Some(Change::Gone));
            if !is_gone || self.is_renamed(file, by) {
                return None;
            }
            let mut waiting = Waiting::default();
            for by in by {
                if self.is_on_its_way(by) {
                    waiting.coming.push(by);
                } else if self.is_refused(by) {
                    waiting.refused.push(by);
                }
            }
            let waits = !waiting.coming.is_empty() || !waiting.refused.is_empty();
            waits.then_some((file.as_str(), waiting))
        });
        waiting.collect()
    }

    /// What is ready and has to wait: deletions, and what came with them.
    pub(super) fn held_back(&self) -> BTreeSet<String> {
        let mut held = BTreeSet::new();
        for file in self.waiting_deletions().into_keys() {
            held.insert(file.to_owned());
            held.extend(self.replaced[file].iter().cloned());
        }
        held
    }

    /// The files that stay live though they are gone, because what came with that is refused; each with
    /// all that came with it.
    pub(super) fn staying(&self) -> BTreeMap<String, BTreeSet<String>> {
        let waiting = self.waiting_deletions().into_iter();
        let staying = waiting.filter(|(_, waiting)| !waiting.refused.is_empty());
        staying.map(|(file, _)| (file.to_owned(), self.replaced[file].clone())).collect()
    }

    /// Whether the same module is ready under another name: that is all that it was waited for.
    fn is_renamed(&self, file: &str, by: &BTreeSet<String>) -> bool {
        let Some(live) = self.live.get(file) else { return false };
        by.iter().any(|by| match self.ready.get(by) {
            Some(Change::To(ready)) => ready.module.digest == live.module.digest,
            Some(Change::Gone) | None => false,
        })
    }

    fn is_on_its_way(&self, file: &str) -> bool {
        self.making.contains_key(file) || self.settler.is_unsettled(file)
    }

    /// Whether what stands there under this name does not go live. What is ready is another version than
    /// one that was refused.
    pub(super) fn is_refused(&self, file: &str) -> bool {
        let is_refused = self.refusals.get(file).is_some() || self.settler.is_misnamed(file);
        is_refused && !matches!(self.ready.get(file), Some(Change::To(_)))
    }
}
