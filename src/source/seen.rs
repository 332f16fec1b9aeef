//! Which part of the stream was handed over already. Pure.
//!
//! After every reconnect Postgres starts again at what was last confirmed, which is behind what was
//! last read. Transactions come in the order of their commits and changes in the order of their
//! index, so one position is enough to know what is a repetition, also in the middle of a
//! transaction.

use crate::change::{Lsn, Position};

/// The end of what was handed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    position: Option<Position>,
    /// The highest end of a commit, or idle end of WAL.
    end: Lsn,
}

impl Seen {
    /// Nothing up to `position` is wanted, and nobody needs to hear of an end up to `end`.
    pub(crate) fn new(position: Option<Position>, end: Lsn) -> Self {
        Self { position, end }
    }

    /// Whether a change is new. It then counts as handed over.
    pub(crate) fn change(&mut self, position: Position) -> bool {
        let new = self.position.is_none_or(|seen| seen < position);
        if new {
            self.position = Some(position);
        }
        new
    }

    /// Whether an end, of a commit or of the WAL on an idle slot, is news.
    pub(crate) fn end(&mut self, end: Lsn) -> bool {
        let new = end > self.end;
        if new {
            self.end = end;
        }
        new
    }

    /// Everything before this was handed over.
    pub(crate) fn received(&self) -> Lsn {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One entry of a scripted stream.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Entry {
        Change(u64, u64),
        Commit(u64),
        Idle(u64),
    }
    use Entry::{Change, Commit, Idle};

    const STREAM: [Entry; 9] = [
        Change(10, 0),
        Change(10, 1),
        Change(10, 2),
        Commit(15),
        Idle(18),
        Change(20, 0),
        Change(20, 1),
        Commit(25),
        Idle(30),
    ];

    fn handed_over(seen: &mut Seen, stream: &[Entry]) -> Vec<Entry> {
        let new = |entry: &&Entry| match **entry {
            Change(lsn, index) => seen.change(Position { commit_lsn: Lsn(lsn), index }),
            Commit(end) | Idle(end) => seen.end(Lsn(end)),
        };
        stream.iter().filter(new).copied().collect()
    }

    #[test]
    fn a_loss_anywhere_and_a_restart_at_any_commit_hand_over_each_entry_once() {
        for lost_at in 0..=STREAM.len() {
            // Postgres restarts behind a commit or idle end that was read, or at the beginning.
            for restart in [0, 4, 5, 8].into_iter().filter(|&restart| restart <= lost_at) {
                let mut seen = Seen::default();
                let mut all = handed_over(&mut seen, &STREAM[..lost_at]);
                all.extend(handed_over(&mut seen, &STREAM[restart..]));
                assert_eq!(all, STREAM, "lost at {lost_at}, restarted at {restart}");
                assert_eq!(seen.received(), Lsn(30));
            }
        }
    }

    #[test]
    fn a_resumed_pipeline_hears_of_commits_that_it_has_yet_to_confirm() {
        let mut seen = Seen::new(Some(Position { commit_lsn: Lsn(20), index: 0 }), Lsn(15));
        let expected = [Idle(18), Change(20, 1), Commit(25), Idle(30)];
        assert_eq!(handed_over(&mut seen, &STREAM), expected);
    }

    #[test]
    fn an_idle_end_that_was_overtaken_is_no_news() {
        let mut seen = Seen::default();
        assert_eq!(
            handed_over(&mut seen, &[Commit(5), Idle(4), Idle(5), Idle(6)]),
            [Commit(5), Idle(6)]
        );
    }
}
