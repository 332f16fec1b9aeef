//! When what a look saw counts: files that have settled, and files that are gone for good. Decides
//! by what two looks saw and by our own clock, and does nothing itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::super::folder::{self, Look, Seen};

/// How long a file must stay the same: somebody may be writing it.
pub(super) const SETTLE: Duration = Duration::from_millis(100);

/// The same for what was renamed into place, which nobody writes: only long enough that a module and
/// its settings that come one after the other go together.
pub(super) const GATHER: Duration = Duration::from_millis(20);

/// How long a file must be gone to count as deleted: editors and copying tools delete before they
/// write.
const DELETED_AFTER: Duration = Duration::from_secs(1);

/// A file that was written this recently and does not load may still be being written.
pub(super) const UNFINISHED: Duration = Duration::from_secs(2);

/// From how long on it is said of a file that it never stays the same.
const RESTLESS: Duration = Duration::from_secs(5);

/// What is known of the folder's files over several looks.
#[derive(Debug, Default)]
pub(super) struct Settler {
    /// What was last made or refused of each file, so that nothing is done twice.
    handled: BTreeMap<String, Seen>,
    /// The last state of each file that was seen.
    first_seen: BTreeMap<String, FirstSeen>,
    /// Files that were there and are not, since when.
    missing: BTreeMap<String, Instant>,
    /// Names that the system reported as renamed into place. Only ever makes a wait shorter.
    moved: BTreeSet<String>,
    /// When the system reported the first change that no look has seen.
    reported: Option<Instant>,
    /// Files that did not load and may still be being written: when to try again.
    again: BTreeMap<String, Instant>,
    /// Files that nothing was done about since they began to change.
    restless: BTreeMap<String, Instant>,
    /// Names that look like a transform's and are none, and when they came: nothing for those that
    /// were there at the start.
    misnamed: BTreeMap<String, Option<Instant>>,
}

/// A state of a file.
#[derive(Debug)]
struct FirstSeen {
    seen: Seen,
    /// When a look saw it first.
    at: Instant,
    /// When the system reported it, if it did before the look.
    changed: Instant,
    /// Whether it was there at the start.
    was_there: bool,
}

/// What one look shows.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// Files with a content that nothing was done about, and that may be read now.
    pub(super) changed: Vec<(String, Seen)>,
    /// Files that are gone for good, and since when they are.
    pub(super) gone: Vec<(String, Instant)>,
    /// Files that have been changing for long.
    pub(super) restless: Vec<String>,
    /// How long to wait for what has not settled.
    pub(super) wait: Option<Duration>,
}

impl Settler {
    /// The system says that this name was renamed into place.
    pub(super) fn note_moved(&mut self, name: String) {
        self.moved.insert(name);
    }

    /// The system reports a change, at this time. It may take a moment until somebody looks.
    pub(super) fn note_reported(&mut self, at: Instant) {
        self.reported = Some(self.reported.map_or(at, |before| before.min(at)));
    }

    /// Something final was done about this state of the file.
    pub(super) fn note_handled(&mut self, file: &str, seen: Seen) {
        self.moved.remove(file);
        self.moved.remove(&folder::settings_name(file));
        self.again.remove(file);
        self.restless.remove(file);
        self.handled.insert(file.to_owned(), seen);
    }

    pub(super) fn is_handled(&self, file: &str, seen: Option<&Seen>) -> bool {
        self.handled.get(file) == seen
    }

    /// Since when the folder holds this state of the file, as far as the system tells, or else since
    /// when it was seen.
    pub(super) fn changed_since(&self, file: &str) -> Option<Instant> {
        self.first_seen.get(file).map(|first| first.changed)
    }

    /// The files whose state was first seen after this time, and the names that are none of a
    /// transform's.
    pub(super) fn seen_after(&self, after: Instant) -> BTreeSet<String> {
        let files = self.first_seen.iter();
        let files = files.map(|(file, first)| (file, (!first.was_there).then_some(first.at)));
        let misnamed = self.misnamed.iter().map(|(name, at)| (name, *at));
        let new = files.chain(misnamed).filter(|(_, at)| at.is_some_and(|at| at >= after));
        new.map(|(file, _)| file.clone()).collect()
    }

    /// What the folder holds at the start, none of which came with anything that happens later.
    pub(super) fn note_first(&mut self, look: &Look, now: Instant) {
        self.misnamed = look.misnamed.iter().map(|(name, _)| (name.clone(), None)).collect();
        for (file, seen) in &look.modules {
            let first = FirstSeen { seen: seen.clone(), at: now, changed: now, was_there: true };
            self.first_seen.insert(file.clone(), first);
        }
    }

    /// Whether this stands in the folder under a name that is none of a transform's.
    pub(super) fn is_misnamed(&self, name: &str) -> bool {
        self.misnamed.contains_key(name)
    }

    /// Whether nothing final was done yet about the state of a file that is there.
    pub(super) fn is_unsettled(&self, file: &str) -> bool {
        let seen = self.first_seen.get(file).map(|first| &first.seen);
        seen.is_some() && self.handled.get(file) != seen
    }

    /// Whether a file that does not load may still be being written. It is tried again then.
    pub(super) fn may_be_unfinished(&mut self, file: &str, now: Instant) -> bool {
        let is_young =
            self.first_seen.get(file).is_some_and(|it| now.duration_since(it.at) < UNFINISHED);
        if is_young {
            self.again.insert(file.to_owned(), now + SETTLE);
        }
        is_young
    }

    /// Compares a look with what is known. `known` are files that something is known of, whether
    /// they are there or not; `busy` are states that are being worked on.
    pub(super) fn settle(
        &mut self,
        look: &Look,
        known: impl Iterator<Item = String>,
        busy: &BTreeMap<String, Seen>,
        now: Instant,
    ) -> Settled {
        let mut settled = Settled::default();
        let reported = self.reported.take().map_or(now, |reported| reported.min(now));
        self.misnamed.retain(|name, _| {
            let is_there = look.misnamed.iter().any(|(misnamed, _)| misnamed == name);
            if !is_there {
                settled.gone.push((name.clone(), reported));
            }
            is_there
        });
        for (name, _) in &look.misnamed {
            self.misnamed.entry(name.clone()).or_insert(Some(now));
        }
        self.missing.retain(|file, _| !look.modules.contains_key(file));
        let seen_before = self.handled.keys().chain(self.first_seen.keys()).cloned();
        let known: BTreeSet<String> = known.chain(seen_before).collect();
        for file in known.into_iter().filter(|file| !look.modules.contains_key(file)) {
            let since = *self.missing.entry(file.clone()).or_insert(reported);
            if let Some(left) = DELETED_AFTER.checked_sub(now.duration_since(since))
                && !left.is_zero()
            {
                settled.wait_for(left.min(SETTLE));
                continue;
            }
            self.missing.remove(&file);
            self.handled.remove(&file);
            self.first_seen.remove(&file);
            self.again.remove(&file);
            self.restless.remove(&file);
            settled.gone.push((file, since));
        }
        for (file, seen) in &look.modules {
            let since = match self.first_seen.get(file) {
                Some(first) if first.seen == *seen => first.at,
                _ => {
                    let seen = seen.clone();
                    let first = FirstSeen { seen, at: now, changed: reported, was_there: false };
                    self.first_seen.insert(file.clone(), first);
                    self.again.remove(file);
                    now
                }
            };
            if self.handled.get(file) == Some(seen) || busy.get(file) == Some(seen) {
                continue;
            }
            let began = *self.restless.entry(file.clone()).or_insert(now);
            if now.duration_since(began) >= RESTLESS {
                settled.restless.push(file.clone());
            }
            let wait = if self.is_moved(file, seen) { GATHER } else { SETTLE };
            // As a module that is gone, settings must be gone for a while to count as deleted.
            let had_settings =
                self.handled.get(file).is_some_and(|handled| handled.settings.is_some());
            let wait = if had_settings && seen.settings.is_none() { DELETED_AFTER } else { wait };
            // Who writes a file in place empties it first, and an empty settings file is valid.
            let wait = if seen.has_empty() { UNFINISHED } else { wait };
            let due = (since + wait).max(self.again.get(file).copied().unwrap_or(since));
            match due.checked_duration_since(now) {
                Some(left) if !left.is_zero() => settled.wait_for(left.min(SETTLE)),
                _ => settled.changed.push((file.clone(), seen.clone())),
            }
        }
        // Names that turned out not to matter.
        if settled.wait.is_none() && settled.changed.is_empty() {
            self.moved.clear();
        }
        settled
    }

    /// Whether everything that changed about the file was renamed into place.
    fn is_moved(&self, file: &str, seen: &Seen) -> bool {
        let handled = self.handled.get(file);
        let module = handled.is_some_and(|handled| handled.module == seen.module);
        let settings = handled.map_or(&None, |handled| &handled.settings) == &seen.settings;
        (module || self.moved.contains(file))
            && (settings || self.moved.contains(&folder::settings_name(file)))
    }
}

impl Settled {
    fn wait_for(&mut self, left: Duration) {
        self.wait = Some(self.wait.map_or(left, |wait| wait.min(left)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A folder, and a clock that the test moves.
    struct Folder {
        dir: tempfile::TempDir,
        settler: Settler,
        now: Instant,
    }

    impl Folder {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self { dir, settler: Settler::default(), now: Instant::now() }
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.dir.path().join(name), text).unwrap();
        }

        /// The files that count after so many milliseconds, which are handled then.
        fn after(&mut self, millis: u64) -> Vec<String> {
            self.now += Duration::from_millis(millis);
            let look = folder::look(self.dir.path()).unwrap();
            let settled =
                self.settler.settle(&look, std::iter::empty(), &BTreeMap::new(), self.now);
            for (file, seen) in &settled.changed {
                self.settler.note_handled(file, seen.clone());
            }
            let changed = settled.changed.into_iter().map(|(file, _)| file);
            let gone = settled.gone.into_iter().map(|(file, _)| format!("-{file}"));
            changed.chain(gone).collect()
        }
    }

    #[test]
    fn a_file_counts_when_it_stayed_the_same_however_often_it_was_looked_at() {
        let mut folder = Folder::new();
        folder.write("10-a.wasm", "1");
        assert!(folder.after(0).is_empty());
        assert!(folder.after(1).is_empty());
        assert!(folder.after(1).is_empty());
        folder.write("10-a.wasm", "22");
        assert!(folder.after(97).is_empty());
        assert!(folder.after(99).is_empty());
        assert_eq!(folder.after(1), ["10-a.wasm"]);
        assert!(folder.after(1000).is_empty());
    }

    #[test]
    fn what_is_renamed_into_place_counts_almost_at_once() {
        let mut folder = Folder::new();
        folder.write("10-a.wasm", "1");
        folder.settler.note_moved("10-a.wasm".into());
        assert!(folder.after(0).is_empty());
        assert_eq!(folder.after(20), ["10-a.wasm"]);
        // Its settings are written in place, so that they have to settle.
        folder.write("10-a.toml", "x");
        folder.settler.note_moved("10-a.wasm".into());
        assert!(folder.after(20).is_empty());
        assert!(folder.after(20).is_empty());
        assert_eq!(folder.after(80), ["10-a.wasm"]);
    }

    #[test]
    fn a_change_counts_from_the_systems_report_however_late_somebody_looks() {
        let mut folder = Folder::new();
        assert!(folder.after(0).is_empty());
        folder.write("10-a.wasm", "1");
        let reported = folder.now;
        folder.settler.note_reported(reported);
        folder.settler.note_reported(reported + Duration::from_millis(30));
        assert!(folder.after(400).is_empty());
        assert_eq!(folder.settler.changed_since("10-a.wasm"), Some(reported));
        // It settles from when it was seen: only then is it known to stay the same.
        assert!(folder.after(99).is_empty());
        assert_eq!(folder.after(1), ["10-a.wasm"]);
        // Without a report, the look is all that is known.
        folder.write("10-a.wasm", "22");
        assert!(folder.after(700).is_empty());
        assert_eq!(folder.settler.changed_since("10-a.wasm"), Some(folder.now));
    }

    #[test]
    fn settings_that_are_deleted_and_written_anew_are_waited_for() {
        let mut folder = Folder::new();
        folder.write("10-a.wasm", "1");
        folder.write("10-a.toml", "x");
        assert!(folder.after(0).is_empty());
        assert_eq!(folder.after(100), ["10-a.wasm"]);
        fs::remove_file(folder.dir.path().join("10-a.toml")).unwrap();
        assert!(folder.after(0).is_empty());
        assert!(folder.after(999).is_empty());
        assert_eq!(folder.after(1), ["10-a.wasm"]);
    }

    #[test]
    fn a_file_that_never_stays_the_same_is_told_of() {
        let mut folder = Folder::new();
        let mut restless = Vec::new();
        for number in 0..120 {
            folder.write("10-a.wasm", &"x".repeat(number + 1));
            folder.now += Duration::from_millis(50);
            let look = folder::look(folder.dir.path()).unwrap();
            let (none, busy) = (std::iter::empty(), BTreeMap::new());
            let settled = folder.settler.settle(&look, none, &busy, folder.now);
            assert!(settled.changed.is_empty());
            restless.push(settled.restless);
        }
        assert!(restless[..100].iter().all(Vec::is_empty));
        assert_eq!(restless[119], ["10-a.wasm"]);
        assert_eq!(folder.after(100), ["10-a.wasm"]);
    }

    #[test]
    fn what_is_gone_before_it_settled_is_forgotten() {
        let mut folder = Folder::new();
        folder.write("10-a.wasm", "1");
        assert!(folder.after(0).is_empty());
        assert!(folder.settler.is_unsettled("10-a.wasm"));
        fs::remove_file(folder.dir.path().join("10-a.wasm")).unwrap();
        assert!(folder.after(50).is_empty());
        assert_eq!(folder.after(1000), ["-10-a.wasm"]);
        assert!(!folder.settler.is_unsettled("10-a.wasm"));
        assert!(folder.after(1000).is_empty());
    }

    #[test]
    fn an_empty_file_is_waited_for_and_a_deletion_too() {
        let mut folder = Folder::new();
        folder.write("10-a.wasm", "");
        assert!(folder.after(0).is_empty());
        assert!(folder.after(1999).is_empty());
        assert_eq!(folder.after(1), ["10-a.wasm"]);
        fs::remove_file(folder.dir.path().join("10-a.wasm")).unwrap();
        assert!(folder.after(0).is_empty());
        assert!(folder.after(999).is_empty());
        assert_eq!(folder.after(1), ["-10-a.wasm"]);
        assert!(folder.after(5000).is_empty());
    }
}
