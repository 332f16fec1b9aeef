//! The order of a group whose messages go to different streams. Pure.
//!
//! Within a stream, records lie in the order in which they were sent. Across streams there is no such
//! order, so this is what it means there: **a record is sent only once everything that was before it in
//! its groups is acknowledged, in whatever stream that is**. Whoever finds a record can find all that
//! came before it in its group.
//!
//! So a message whose group goes on in another stream waits for one acknowledgement, and what is behind
//! it in its own stream waits along. Messages of other groups that are in other streams do not.
//!
//! Messages are numbered in the order in which they become ready, and each stream sends in that order.
//! A message only ever waits for lower numbers, so the lowest of all never waits: nothing can block in
//! a circle. A message that went into the store instead does not count here any more; what is behind it
//! is held by [`holds`](super::holds). But what it had waited for still does, and it is waited for when
//! the message comes again: so the last of a group is remembered for each stream, and not only the last
//! of all.
//!
//! As long as nothing is routed, numbers are counted and nothing else is done.

use std::collections::HashMap;

use super::group::{GROUPING_BYTES, GroupId, Groups};
use super::place::LaneId;

/// Everything up to this number has to be through in this stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behind {
    pub lane: LaneId,
    pub number: u64,
}

impl Behind {
    /// Whether it still is, where `front` gives the lowest number that is not through in a stream.
    pub fn waits(self, front: impl Fn(LaneId) -> Option<u64>) -> bool {
        front(self.lane).is_some_and(|front| front <= self.number)
    }
}

/// Below this many groups nobody looks which of them are through.
const GROUPS_MIN: usize = 4096;

/// The last messages of a group or a table that may be on their way, one for each stream.
#[derive(Debug, Default)]
struct Last(Vec<Behind>);

impl Last {
    /// Forgets which are through, and takes this one in.
    fn replace(&mut self, here: Behind, front: impl Fn(LaneId) -> Option<u64> + Copy) {
        self.0.retain(|at| at.lane != here.lane && at.waits(front));
        self.0.push(here);
    }

    fn wait(&self, front: impl Fn(LaneId) -> Option<u64> + Copy) -> bool {
        self.0.iter().any(|at| at.waits(front))
    }
}

/// The last messages of each group and table that may be on their way.
#[derive(Debug, Default)]
pub struct Crossing {
    last: u64,
    /// The pipeline's own stream may have messages up to this number that are not known by group.
    unknown: u64,
    groups: HashMap<GroupId, Last>,
    tables: HashMap<GroupId, Table>,
    groups_max: usize,
}

#[derive(Debug, Default)]
struct Table {
    last: Last,
    barriers: Last,
    grouping: Option<[u8; GROUPING_BYTES]>,
}

impl Crossing {
    /// The number of a message, where there is only one stream.
    pub fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// From here on there are several streams.
    pub fn begin(&mut self) {
        self.unknown = self.last;
    }

    /// There is only one stream again.
    pub fn end(&mut self) {
        self.groups.clear();
        self.tables.clear();
    }

    /// The number of a message of these groups that goes to a stream, and what it has to wait for.
    pub fn enter(
        &mut self,
        lane: LaneId,
        groups: &Groups,
        front: impl Fn(LaneId) -> Option<u64> + Copy,
    ) -> (u64, Vec<Behind>) {
        let number = self.number();
        let here = Behind { lane, number };
        let mut behind = Vec::new();
        let mut wait = |at: Behind| {
            if at.lane != lane && at.waits(front) && !behind.contains(&at) {
                behind.push(at);
            }
        };
        wait(Behind { lane: LaneId::OWN, number: self.unknown });
        let table = self.tables.entry(groups.table).or_default();
        let grouping = groups.grouping();
        let other = grouping.is_some() && table.grouping.is_some() && table.grouping != grouping;
        table.barriers.0.iter().copied().for_each(&mut wait);
        if groups.is_barrier() || other {
            table.last.0.iter().copied().for_each(&mut wait);
            table.barriers.replace(here, front);
        }
        table.grouping = grouping.or(table.grouping);
        table.last.replace(here, front);
        for group in groups.iter() {
            let last = self.groups.entry(group).or_default();
            last.0.iter().copied().for_each(&mut wait);
            last.replace(here, front);
        }
        self.forget(front);
        (number, behind)
    }

    /// Forgets what is through, once it is much.
    fn forget(&mut self, front: impl Fn(LaneId) -> Option<u64> + Copy) {
        if self.groups.len() <= self.groups_max.max(GROUPS_MIN) {
            return;
        }
        self.groups.retain(|_, last| last.wait(front));
        self.tables.retain(|_, table| table.last.wait(front));
        self.groups_max = 2 * self.groups.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: LaneId = LaneId(1);
    const B: LaneId = LaneId(2);

    /// A group of the first grouping.
    fn group(name: u8) -> GroupId {
        let mut group = [name; 16];
        group[..GROUPING_BYTES].fill(7);
        GroupId(group)
    }

    fn row(name: u8) -> Groups {
        Groups { table: GroupId([255; 16]), first: Some(group(name)), second: None }
    }

    const TRUNCATE: Groups = Groups { table: GroupId([255; 16]), first: None, second: None };

    fn check(
        crossing: &mut Crossing,
        lane: LaneId,
        groups: Groups,
        expected: &[(LaneId, u64)],
    ) -> u64 {
        // Nothing is through.
        let (number, behind) = crossing.enter(lane, &groups, |_| Some(0));
        let expected: Vec<Behind> =
            expected.iter().map(|&(lane, number)| Behind { lane, number }).collect();
        let known: Vec<Behind> =
            behind.into_iter().filter(|at| (at.lane, at.number) != (LaneId::OWN, 0)).collect();
        assert_eq!(known, expected, "number {number}");
        number
    }

    #[test]
    fn a_group_waits_only_where_it_changes_its_stream() {
        let mut crossing = Crossing::default();
        check(&mut crossing, A, row(1), &[]);
        check(&mut crossing, A, row(1), &[]);
        check(&mut crossing, B, row(2), &[]);
        check(&mut crossing, B, row(1), &[(A, 2)]);
        check(&mut crossing, A, row(1), &[(B, 4)]);
        check(&mut crossing, A, row(2), &[(B, 3)]);
        let moved = Groups { second: Some(group(2)), ..row(1) };
        check(&mut crossing, B, moved, &[(A, 5), (A, 6)]);
    }

    #[test]
    fn a_truncate_waits_for_every_stream_and_is_waited_for() {
        let mut crossing = Crossing::default();
        check(&mut crossing, A, row(1), &[]);
        check(&mut crossing, B, row(2), &[]);
        check(&mut crossing, A, TRUNCATE, &[(B, 2)]);
        check(&mut crossing, B, row(3), &[(A, 3)]);
        check(&mut crossing, A, row(4), &[]);
    }

    #[test]
    fn what_comes_again_from_the_store_waits_for_what_it_had_waited_for() {
        let mut crossing = Crossing::default();
        check(&mut crossing, A, row(1), &[]);
        check(&mut crossing, B, row(1), &[(A, 1)]);
        // B was shut, and the second went into the store.
        let front = |lane| (lane == A).then_some(1);
        assert_eq!(crossing.enter(B, &row(1), front).1, [Behind { lane: A, number: 1 }]);
        let c = LaneId(3);
        assert_eq!(crossing.enter(c, &row(1), front).1, [Behind { lane: A, number: 1 }]);
        assert_eq!(crossing.enter(c, &TRUNCATE, front).1, [Behind { lane: A, number: 1 }]);

        let mut crossing = Crossing::default();
        check(&mut crossing, A, TRUNCATE, &[]);
        check(&mut crossing, B, TRUNCATE, &[(A, 1)]);
        assert_eq!(crossing.enter(B, &row(1), front).1, [Behind { lane: A, number: 1 }]);
    }

    #[test]
    fn another_grouping_is_a_barrier() {
        let mut crossing = Crossing::default();
        check(&mut crossing, A, row(1), &[]);
        let other = Groups { first: Some(GroupId([9; 16])), ..row(1) };
        check(&mut crossing, B, other, &[(A, 1)]);
        check(&mut crossing, A, other, &[(B, 2)]);
    }

    #[test]
    fn what_is_through_is_not_waited_for() {
        let mut crossing = Crossing::default();
        crossing.enter(A, &row(1), |_| None);
        assert_eq!(crossing.enter(B, &row(1), |_| None), (2, Vec::new()));
        // A has a later one only.
        assert_eq!(crossing.enter(A, &row(1), |lane| (lane == B).then_some(3)).1, []);
    }

    #[test]
    fn what_was_ready_before_anything_was_routed_goes_first() {
        let mut crossing = Crossing::default();
        crossing.number();
        crossing.number();
        crossing.begin();
        let front = |lane| (lane == LaneId::OWN).then_some(1);
        let (number, behind) = crossing.enter(A, &row(1), front);
        assert_eq!(behind, [Behind { lane: LaneId::OWN, number: 2 }]);
        assert_eq!(number, 3);
        assert!(behind[0].waits(|_| Some(2)) && !behind[0].waits(|_| Some(3)));
        assert_eq!(crossing.enter(A, &row(2), |_| Some(3)).1, []);
    }

    #[test]
    fn what_is_through_is_forgotten_in_the_end() {
        let mut crossing = Crossing::default();
        for number in 1..100_000_u64 {
            let name = number.to_le_bytes();
            let mut group = [0; 16];
            group[8..].copy_from_slice(&name);
            let groups = Groups { first: Some(GroupId(group)), ..row(1) };
            crossing.enter(A, &groups, |_| Some(number.saturating_sub(10)));
        }
        assert!(crossing.groups.len() <= GROUPS_MIN + 1, "{}", crossing.groups.len());
    }
}
