//! What the queues, the schedule and the counts are, worked out anew from the messages alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Due, GroupId, Holds, Phase, TableQueue, schedule_key};
use crate::change::Position;

impl Holds {
    /// # Panics
    ///
    /// Where what is kept is not what follows from the messages.
    pub(crate) fn assert_consistent(&self) {
        let mut groups: HashMap<GroupId, BTreeMap<Position, u64>> = HashMap::new();
        let mut tables: HashMap<GroupId, TableQueue> = HashMap::new();
        let (mut schedule, mut gated) = (BTreeSet::new(), BTreeMap::new());
        let mut counts = Self::new(self.passed);
        for (&id, held) in &self.messages {
            counts.count(held, 1);
            let table = tables.entry(held.groups.table).or_default();
            if let Some(grouping) = held.groups.grouping() {
                *table.groupings.entry(grouping).or_default() += 1;
            }
            if held.position > self.passed {
                gated.insert(held.position, id);
            }
            if held.phase == Phase::Sent {
                continue;
            }
            table.unsent.insert(held.position, id);
            if held.groups.is_barrier() {
                table.barriers.insert(held.position);
            }
            for group in held.groups.iter() {
                groups.entry(group).or_default().insert(held.position, id);
            }
            let waits = held.position > self.passed || held.due == Due::OnRequest;
            if held.phase == Phase::Idle && !waits && !self.holds(held.position, &held.groups) {
                schedule.insert(schedule_key(held, id));
            }
        }
        tables.retain(|_, table| !table.unsent.is_empty() || !table.groupings.is_empty());
        assert_eq!(self.groups, groups, "the queues of groups");
        assert_eq!(self.tables, tables, "the queues of tables");
        assert_eq!(self.gated, gated, "what waits for the source");
        assert_eq!(self.schedule, schedule, "the schedule");
        assert_eq!(self.counts, counts.counts, "the counts");
    }
}
