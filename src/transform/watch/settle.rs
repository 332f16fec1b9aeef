//! When what a look saw counts: files that settled, and files that are gone for good.

use std::collections::BTreeSet;
use std::time::Instant;

use super::super::folder::{self, Look, Seen};
use super::{DELETED_AFTER, UNFINISHED, Watcher};

impl Watcher {
    /// Takes files out that are gone for good. Answers whether one is gone and may come back.
    pub(super) fn note_deletions(&mut self, look: &Look) -> bool {
        self.missing.retain(|file, _| !look.modules.contains_key(file));
        let known: BTreeSet<String> = self
            .live
            .keys()
            .chain(self.rejected.keys())
            .chain(self.handled.keys())
            .cloned()
            .collect();
        for file in known {
            if look.modules.contains_key(&file) {
                continue;
            }
            let since = *self.missing.entry(file.clone()).or_insert_with(Instant::now);
            if since.elapsed() < DELETED_AFTER {
                continue;
            }
            self.missing.remove(&file);
            self.handled.remove(&file);
            self.first_seen.remove(&file);
            self.rejected.remove(&file);
            if self.live.remove(&file).is_some() {
                tracing::info!(file, "the file was deleted, and leaves the chain");
                self.ready_since.get_or_insert_with(Instant::now);
            }
        }
        !self.missing.is_empty()
    }

    /// Whether this state of a file was first seen so recently that it may still be being written.
    /// By our own clock: a file that is emptied to be written anew can be seen with its old time.
    pub(super) fn is_new(&mut self, file: &str, seen: &Seen) -> bool {
        let now = Instant::now();
        match self.first_seen.get(file) {
            Some((known, since)) if known == seen => now.duration_since(*since) < UNFINISHED,
            _ => {
                self.first_seen.insert(file.to_owned(), (seen.clone(), now));
                true
            }
        }
    }

    /// Loads files that changed and have settled. Answers whether one has not settled.
    pub(super) fn load_changed(&mut self, look: &Look) -> bool {
        let mut unsettled = false;
        let mut candidates = Vec::new();
        for (file, seen) in &look.modules {
            if self.handled.get(file) == Some(seen) {
                continue;
            }
            let is_settled = self.previous.modules.get(file) == Some(seen);
            // Who writes a file in place empties it first, and an empty settings file is valid.
            let is_new = self.is_new(file, seen);
            if is_settled && !(seen.has_empty() && is_new) {
                candidates.push((file, seen));
            } else {
                unsettled = true;
            }
        }
        let names: Vec<&String> = candidates.iter().map(|(file, _)| *file).collect();
        if !names.is_empty() {
            self.show_with(Vec::new(), &names);
        }
        for (file, seen) in candidates {
            let started = Instant::now();
            let loaded = self.load(file);
            let now = folder::look(&self.dir).ok();
            if now.as_ref().and_then(|look| look.modules.get(file)) != Some(seen) {
                // It changed while it was read.
                unsettled = true;
                continue;
            }
            match loaded {
                Err(refusal) if refusal.may_be_unfinished && self.is_new(file, seen) => {
                    unsettled = true;
                    continue;
                }
                Err(refusal) => {
                    let stays = if self.live.contains_key(file) {
                        "the version before stays live"
                    } else {
                        "it does not go live"
                    };
                    tracing::warn!(file, "rejected a transform, and {stays}: {}", refusal.reason);
                    self.reject(file, refusal);
                }
                Ok(transform) => {
                    self.rejected.remove(file);
                    let is_same = self.live.get(file).is_some_and(|live| {
                        live.module.digest == transform.module.digest
                            && live.settings.digest() == transform.settings.digest()
                    });
                    if !is_same {
                        let took = started.elapsed().as_millis();
                        tracing::info!(file, "loaded a transform in {took} ms");
                        self.live.insert(file.clone(), transform);
                        self.ready_since.get_or_insert_with(Instant::now);
                    }
                }
            }
            self.handled.insert(file.clone(), seen.clone());
        }
        unsettled
    }
}
