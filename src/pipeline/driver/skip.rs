//! Changes that an operator told us to take as delivered, because the records that could tell are gone.

use std::collections::HashMap;

use super::Driver;
use crate::change::Position;
use crate::mutation::{self, Rule};
use crate::pipeline::grants::LostRecords;
use crate::pipeline::item::{Item, Origin};
use crate::pipeline::link::Lost;
use crate::pipeline::place::LaneId;
use crate::store::{Attempts, StoredState, Write};

/// How far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Skipping {
    Nothing,
    /// To the end of Postgres's log as it is when the first change comes.
    ToEndOfLog,
    To(Position),
}

impl Driver {
    /// Records after the checkpoint are gone. The next start must not ask again, so that what is
    /// known now goes into the next checkpoint.
    pub(super) fn on_lost_records(
        &mut self,
        lane: LaneId,
        Lost { choice, behind }: Lost,
        landed: &HashMap<Position, u64>,
    ) {
        self.write_down_first();
        // What is left in front of the lost ones says nothing of them.
        let later = landed.iter().filter(|(_, seq)| **seq >= behind);
        let newest = later.map(|(position, _)| *position).max();
        if let Some(routed) = self.lanes.get_mut(lane).and_then(|lane| lane.routed.as_mut()) {
            let skips = choice == LostRecords::Skip;
            routed.skips = skips.then_some(newest);
            return;
        }
        self.skipping = match (choice, newest) {
            (LostRecords::Resend, _) => Skipping::Nothing,
            (LostRecords::Skip, Some(newest)) => Skipping::To(newest),
            (LostRecords::Skip, None) => Skipping::ToEndOfLog,
        };
        if let Skipping::To(through) = self.skipping {
            self.tracker.skip_through(through);
        }
    }

    /// Nothing is sent before what is known now is in the store.
    pub(super) fn write_down_first(&mut self) {
        self.delivered = true;
        self.begins_elsewhere = true;
        // What is being written does not know of it.
        if let Some(writing) = &mut self.writing {
            writing.effects.beginning = false;
        }
    }

    /// Whether a change that is routed to this stream is taken as delivered there.
    pub(super) fn skips_in(&mut self, lane: LaneId, item: &Item) -> bool {
        if lane == LaneId::OWN || matches!(item.origin, Origin::Store { .. }) {
            return false;
        }
        let Some(routed) = self.lanes.get_mut(lane).and_then(|lane| lane.routed.as_mut()) else {
            return false;
        };
        let through = match routed.skips {
            None => return false,
            Some(Some(through)) => through,
            Some(None) => {
                // Whoever has read a change knows the server.
                let identity = self.source.status.borrow().identity.clone();
                let Some(identity) = identity else { return false };
                let through = Position::last_before(identity.wal_end);
                routed.skips = Some(Some(through));
                through
            }
        };
        let skips = item.change.position <= through;
        if !skips {
            routed.skips = None;
        }
        skips
    }

    /// Takes a change that is routed to a stream as delivered. Another one before it may keep the
    /// checkpoint, and a restart is not told to skip: it would send this one behind what follows it. So
    /// its mark is in the store before anything follows.
    pub(super) fn skip(&mut self, item: Item) {
        let id = self.next_id;
        self.next_id += 1;
        let Item { change, origin } = item;
        self.effects.settled.push((origin, change.bytes()));
        self.writes.push(Write::Insert {
            id,
            groups: self.holds.groups_of(&change),
            change: Box::new(change),
            state: StoredState::Waiting,
            attempts: Attempts::default(),
            next_attempt: None,
            failure: None,
        });
        self.writes.push(Write::Acknowledge { id });
        self.write_down_first();
    }

    /// Whether a change from the source is taken as delivered.
    pub(super) fn skips(&mut self, position: Position) -> bool {
        let through = match self.skipping {
            Skipping::Nothing => return false,
            Skipping::To(through) => through,
            Skipping::ToEndOfLog => {
                // Whoever has read a change knows the server.
                let identity = self.source.status.borrow().identity.clone();
                let Some(identity) = identity else { return false };
                let through = Position::last_before(identity.wal_end);
                self.tracker.skip_through(through);
                self.skipping = Skipping::To(through);
                // A restart is not told to skip: it would send what is skipped now, behind stored
                // messages of the same groups that are let through meanwhile.
                if !mutation::broken(Rule::SkipOnDisk) {
                    self.write_down_first();
                }
                through
            }
        };
        if position > through {
            tracing::warn!(%through, "changes up to here were taken as delivered, as was chosen");
            self.skipping = Skipping::Nothing;
        }
        position <= through
    }
}
