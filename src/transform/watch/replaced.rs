//! A file that is taken away while others that came with it are not ready yet: one look at the folder
//! shows it replaced, so that the chain replaces it in one step, and the old one serves meanwhile.
//!
//! A deletion alone waits for nothing, and one that waits does not do so for ever: what cannot be
//! loaded, or is refused, takes nobody's place, and what does not end is not waited for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::Watcher;
use super::promote::Change;

/// How long before the deletion its replacement may have come: who copies a file under its new name and
/// then deletes the old one takes a moment.
const TOGETHER: Duration = Duration::from_secs(5);

/// How long a deletion waits at most: as long as a module may be compiled.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// A deletion, and what came with it.
#[derive(Debug)]
pub(super) struct Replaced {
    since: Instant,
    by: BTreeSet<String>,
}

impl Watcher {
    /// A live file is gone, since then.
    pub(super) fn note_replaced(&mut self, file: &str, since: Instant) {
        let by = self.settler.seen_after(since.checked_sub(TOGETHER).unwrap_or(since));
        self.replaced.insert(file.to_owned(), Replaced { since, by });
    }

    /// The deletions that wait, each with what it waits for.
    pub(super) fn waiting_deletions(&self) -> BTreeMap<&str, Vec<&str>> {
        let waiting = self.replaced.iter().filter_map(|(file, replaced)| {
            let is_gone = matches!(self.ready.get(file), Some(Change::Gone));
            if !is_gone || replaced.since.elapsed() >= WAIT_MAX || self.is_renamed(file, replaced) {
                return None;
            }
            let by = replaced.by.iter().map(String::as_str);
            let by: Vec<&str> = by.filter(|by| self.is_on_its_way(by)).collect();
            (!by.is_empty()).then_some((file.as_str(), by))
        });
        waiting.collect()
    }

    /// What is ready and has to wait: deletions, and what came with them.
    pub(super) fn held_back(&self) -> BTreeSet<String> {
        let mut held = BTreeSet::new();
        for file in self.waiting_deletions().into_keys() {
            held.insert(file.to_owned());
            held.extend(self.replaced[file].by.iter().cloned());
        }
        held
    }

    /// Whether the same module is ready under another name: that is all that it was waited for.
    fn is_renamed(&self, file: &str, replaced: &Replaced) -> bool {
        let Some(live) = self.live.get(file) else { return false };
        replaced.by.iter().any(|by| match self.ready.get(by) {
            Some(Change::To(ready)) => ready.module.digest == live.module.digest,
            Some(Change::Gone) | None => false,
        })
    }

    fn is_on_its_way(&self, file: &str) -> bool {
        self.making.contains_key(file) || self.settler.is_unsettled(file)
    }
}
