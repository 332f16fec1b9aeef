//! Pure bookkeeping of what has been read and what of it is settled: it yields what may be confirmed.
//!
//! A change is *settled* once S2 acknowledged its records, a transform dropped it, the store holds it,
//! or it had been settled before a restart. Nothing here does I/O.

use std::collections::VecDeque;

use super::place::{Floors, Landed};
use crate::change::{Lsn, Position};

/// Names an entry for as long as it is not yet part of the settled prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId(u64);

/// What the source has read and the pipeline has not finished, oldest first.
///
/// Invariant: no LSN is given out for confirmation while a change read before it is unsettled.
#[derive(Debug)]
pub struct AckTracker {
    entries: VecDeque<Entry>,
    /// The id of the front entry.
    first: u64,
    progress: Progress,
}

#[derive(Clone, Copy, Debug)]
enum Entry {
    /// A change that is on its way.
    Open { position: Position },
    /// A settled change behind an open one, with the place of its first record, if any.
    Settled { position: Position, landed: Option<Landed> },
    /// Everything before this point of the log has been read: a commit's end, or a keepalive.
    Mark { lsn: Lsn },
}

/// How far everything is settled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Every change at or below it is settled.
    pub position: Position,
    /// What may be confirmed to Postgres once it is durably noted.
    pub lsn: Lsn,
}

impl AckTracker {
    /// Goes on from what a checkpoint says.
    #[must_use]
    pub fn new(progress: Progress) -> Self {
        Self { entries: VecDeque::new(), first: 0, progress }
    }

    /// A change was read.
    pub fn read(&mut self, position: Position) -> EntryId {
        let id = EntryId(self.first + self.entries.len() as u64);
        self.entries.push_back(Entry::Open { position });
        id
    }

    /// Everything at or below this position counts as settled, whether it was read or will be.
    pub fn skip_through(&mut self, position: Position) {
        self.progress.position = self.progress.position.max(position);
    }

    /// Everything before `lsn` was read.
    pub fn mark(&mut self, lsn: Lsn) {
        if let Some(Entry::Mark { lsn: last }) = self.entries.back_mut() {
            *last = lsn.max(*last);
        } else {
            self.entries.push_back(Entry::Mark { lsn });
        }
        self.advance();
    }

    /// A change is settled. `landed` is the place of its first record, if it has any.
    pub fn settle(&mut self, id: EntryId, landed: Option<Landed>) {
        let entry = self.index(id).and_then(|index| self.entries.get_mut(index));
        debug_assert!(matches!(entry, Some(Entry::Open { .. })), "a change is settled once");
        if let Some(entry) = entry
            && let Entry::Open { position } = *entry
        {
            *entry = Entry::Settled { position, landed };
        }
        self.advance();
    }

    /// How far everything is settled.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// The last change that was read, or what was settled before any.
    #[must_use]
    pub fn read_through(&self) -> Position {
        let last = self.entries.iter().rev().find_map(|entry| match entry {
            Entry::Open { position } | Entry::Settled { position, .. } => Some(*position),
            Entry::Mark { .. } => None,
        });
        last.unwrap_or_default().max(self.progress.position)
    }

    /// Where the change of an entry is that is not part of the settled prefix.
    #[must_use]
    pub fn position(&self, id: EntryId) -> Option<Position> {
        match *self.entries.get(self.index(id)?)? {
            Entry::Open { position } | Entry::Settled { position, .. } => Some(position),
            Entry::Mark { .. } => None,
        }
    }

    /// What was read and is not settled.
    pub fn open(&self) -> impl Iterator<Item = Position> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Open { position } => Some(*position),
            Entry::Settled { .. } | Entry::Mark { .. } => None,
        })
    }

    /// Adds the places of settled changes that the progress does not cover yet: what a restart has to
    /// read again.
    pub fn add_beyond(&self, floors: &mut Floors) {
        for entry in &self.entries {
            if let Entry::Settled { landed: Some(landed), .. } = entry {
                floors.add(*landed);
            }
        }
    }

    /// Nothing is on its way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many entries are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The same as [`Self::is_idle`].
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn index(&self, id: EntryId) -> Option<usize> {
        usize::try_from(id.0.checked_sub(self.first)?).ok()
    }

    fn advance(&mut self) {
        while let Some(entry) = self.entries.front() {
            match *entry {
                Entry::Open { .. } => break,
                Entry::Settled { position, .. } => {
                    self.progress.position = self.progress.position.max(position);
                }
                Entry::Mark { lsn } => self.progress.lsn = self.progress.lsn.max(lsn),
            }
            self.entries.pop_front();
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pipeline::place::LaneId;

    fn own(seq: u64) -> Option<Landed> {
        Some(Landed { lane: LaneId::OWN, seq })
    }

    fn seq_beyond(tracker: &AckTracker) -> Option<u64> {
        let mut floors = Floors::default();
        tracker.add_beyond(&mut floors);
        floors.of(LaneId::OWN)
    }

    fn at(commit_lsn: u64, index: u64) -> Position {
        Position { commit_lsn: Lsn(commit_lsn), index }
    }

    #[test]
    fn confirms_the_settled_prefix_only() {
        let mut tracker = AckTracker::new(Progress::default());
        let first = tracker.read(at(10, 0));
        let second = tracker.read(at(10, 1));
        tracker.mark(Lsn(12));
        tracker.settle(second, own(7));
        assert_eq!(tracker.progress(), Progress::default());
        assert_eq!(seq_beyond(&tracker), Some(7));
        assert_eq!(
            (tracker.read_through(), tracker.open().collect()),
            (at(10, 1), vec![at(10, 0)])
        );
        tracker.settle(first, own(6));
        assert_eq!(tracker.progress(), Progress { position: at(10, 1), lsn: Lsn(12) });
        assert_eq!(seq_beyond(&tracker), None);
        assert!(tracker.is_idle());
        assert_eq!((tracker.read_through(), tracker.open().count()), (at(10, 1), 0));
    }

    #[test]
    fn a_keepalive_does_not_overtake_an_open_change() {
        let mut tracker = AckTracker::new(Progress::default());
        tracker.mark(Lsn(5));
        assert_eq!(tracker.progress().lsn, Lsn(5));
        let open = tracker.read(at(10, 0));
        tracker.mark(Lsn(20));
        tracker.mark(Lsn(30));
        assert_eq!(tracker.progress().lsn, Lsn(5));
        tracker.settle(open, None);
        assert_eq!(tracker.progress(), Progress { position: at(10, 0), lsn: Lsn(30) });
    }

    proptest! {
        #[test]
        fn never_confirms_past_an_open_change(order in Just((0..40usize).collect::<Vec<_>>()).prop_shuffle()) {
            let mut tracker = AckTracker::new(Progress::default());
            let ids: Vec<EntryId> = (0..40u64)
                .map(|n| {
                    let id = tracker.read(at(n * 10 + 1, 0));
                    tracker.mark(Lsn(n * 10 + 5));
                    id
                })
                .collect();
            let mut settled = [false; 40];
            for index in order {
                tracker.settle(ids[index], own(index as u64));
                settled[index] = true;
                let prefix = settled.iter().take_while(|settled| **settled).count() as u64;
                let expected = prefix.checked_sub(1).map_or(Lsn(0), |last| Lsn(last * 10 + 5));
                prop_assert_eq!(tracker.progress().lsn, expected);
                let beyond = (prefix..40).filter(|n| settled[usize::try_from(*n).unwrap()]).min();
                prop_assert_eq!(seq_beyond(&tracker), beyond);
            }
            prop_assert!(tracker.is_idle());
        }
    }
}
