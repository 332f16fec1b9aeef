//! Which messages are in the store, in what order they may leave it, and which later changes they
//! hold back. Pure: time comes in as an argument, and nothing here does I/O.
//!
//! ```text
//!             fails                       tried, in order
//!   change ──────────▶ idle, head of its group ──────────▶ busy ──▶ sent ──acknowledged──▶ gone
//!      │                      ▲      ▲                       │        │
//!      └─ its group is held ──┘      └────── fails again ────┘        │
//!         (behind the head)          └────── S2 refused it ───────────┘
//! ```
//!
//! The rules:
//! - A message may be tried when nothing unsent stands before it in any of its groups.
//! - A barrier (a truncate, or a change of a table that is one group) is tried when nothing unsent of
//!   its table stands before it, and holds all of its table behind it. A change that meets its table
//!   under another grouping becomes one.
//! - What is sent no longer holds: whatever follows it takes the same way to S2, behind it.
//! - After a restart, a message beyond the checkpoint waits until the source has read past it: changes
//!   of its group that had not reached S2 come first. Likewise where they were spilled, until they have
//!   come out of the spill.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use super::group::{GROUPING_BYTES, GroupId, Groups};
use crate::change::{Change, Position};
use crate::mutation::{self, Rule};

/// Names a message in the store.
pub type MessageId = u64;

/// When a message is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// As soon as it is the head of its groups: it never failed, or somebody asked for it.
    Now,
    /// Not before this instant.
    At(Instant),
    /// When the chain changes, or when an operator asks.
    OnRequest,
}

/// The messages in the store, by group.
#[derive(Debug)]
pub struct Holds {
    messages: HashMap<MessageId, Held>,
    groups: HashMap<GroupId, BTreeMap<Position, MessageId>>,
    tables: HashMap<GroupId, TableQueue>,
    /// Messages that nothing holds back, by when they are due.
    schedule: BTreeSet<(Option<Instant>, Position, MessageId)>,
    /// Messages beyond the checkpoint that the source has not read past yet.
    gated: BTreeMap<Position, MessageId>,
    passed: Position,
    counts: Counts,
}

#[derive(Debug)]
struct Held {
    position: Position,
    groups: Groups,
    due: Due,
    failed: bool,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Busy,
    Sent,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct TableQueue {
    unsent: BTreeMap<Position, MessageId>,
    barriers: BTreeSet<Position>,
    /// How many messages are of each grouping, sent or not.
    groupings: BTreeMap<[u8; GROUPING_BYTES], usize>,
}

/// How many messages are in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Failed, and tried again on request only.
    pub parked: u64,
    /// Failed, and tried again by themselves.
    pub retrying: u64,
    /// Behind a failed one.
    pub waiting: u64,
}

impl Holds {
    /// No messages. `passed` is the checkpoint's position.
    #[must_use]
    pub fn new(passed: Position) -> Self {
        Self {
            messages: HashMap::new(),
            groups: HashMap::new(),
            tables: HashMap::new(),
            schedule: BTreeSet::new(),
            gated: BTreeMap::new(),
            passed,
            counts: Counts::default(),
        }
    }

    /// Nothing is held, so that nobody needs to compute a change's groups.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Messages that are on their way at this moment.
    pub fn moving(&self) -> impl Iterator<Item = MessageId> {
        let moving = |(id, held): (&MessageId, &Held)| (held.phase != Phase::Idle).then_some(*id);
        self.messages.iter().filter_map(moving)
    }

    /// The groups of a change as they are beside what is stored.
    #[must_use]
    pub fn groups_of(&self, change: &Change) -> Groups {
        let mut groups = Groups::of(change);
        if mutation::broken(Rule::BothGroups) {
            groups.second = None;
        }
        self.beside(groups)
    }

    fn beside(&self, groups: Groups) -> Groups {
        let other = |table: &TableQueue| {
            table.groupings.keys().any(|grouping| Some(*grouping) != groups.grouping())
        };
        let meets = self.tables.get(&groups.table).is_some_and(other)
            && !mutation::broken(Rule::BarrierBetweenGroupings);
        if meets { groups.as_barrier() } else { groups }
    }

    /// Whether a stored message has to wait for another.
    #[must_use]
    pub fn is_held(&self, id: MessageId) -> bool {
        self.messages.get(&id).is_some_and(|held| self.holds(held.position, &held.groups))
    }

    /// Whether a change at this position has to wait in the store.
    #[must_use]
    pub fn holds(&self, position: Position, groups: &Groups) -> bool {
        if self.messages.is_empty() {
            return false;
        }
        let before = |queue: &BTreeMap<Position, MessageId>| {
            queue.first_key_value().is_some_and(|(first, _)| *first < position)
        };
        if let Some(table) = self.tables.get(&groups.table)
            && !mutation::broken(Rule::HoldTheTable)
        {
            let barrier = table.barriers.first().is_some_and(|barrier| *barrier < position);
            if barrier || (groups.is_barrier() && before(&table.unsent)) {
                return true;
            }
        }
        !mutation::broken(Rule::HoldTheGroup)
            && groups.iter().any(|group| self.groups.get(&group).is_some_and(before))
    }

    /// A message went into the store. `failed` tells a failed one from one that only waits.
    pub fn insert(
        &mut self,
        id: MessageId,
        position: Position,
        groups: Groups,
        failed: bool,
        due: Due,
    ) {
        let held = Held { position, groups, due, failed, phase: Phase::Idle };
        self.count(&held, 1);
        self.count_grouping(&held.groups, true);
        self.messages.insert(id, held);
        if position > self.passed {
            self.gated.insert(position, id);
        }
        self.enqueue(id);
        self.arm(id);
        self.disarm_followers(id);
    }

    /// See [`Self::pass`].
    #[must_use]
    pub fn passed(&self) -> Position {
        self.passed
    }

    /// Some messages wait until the source has read past them.
    #[must_use]
    pub fn wait_for_source(&self) -> bool {
        !self.gated.is_empty()
    }

    /// Everything at or below this position was read from the source, and from what was put aside.
    pub fn pass(&mut self, position: Position) {
        self.passed = self.passed.max(position);
        while let Some((gated, id)) = self.gated.first_key_value().map(|(at, id)| (*at, *id)) {
            if gated > self.passed {
                break;
            }
            self.gated.remove(&gated);
            self.arm(id);
        }
    }

    /// Changes from this position on, which had been read, will be read once more: what is stored
    /// behind them waits for that, as after a restart.
    pub fn read_again_from(&mut self, position: Position) {
        self.passed = self.passed.min(position.before());
        for (id, held) in self.messages.iter().filter(|(_, held)| held.position > self.passed) {
            self.schedule.remove(&schedule_key(held, *id));
            self.gated.insert(held.position, *id);
        }
    }

    /// Where a message's change is in the log.
    #[must_use]
    pub fn position(&self, id: MessageId) -> Option<Position> {
        self.messages.get(&id).map(|held| held.position)
    }

    /// Whether a message waits until what is before it has been read.
    #[must_use]
    pub fn is_gated(&self, id: MessageId) -> bool {
        self.messages.get(&id).is_some_and(|held| held.position > self.passed)
    }

    /// Takes the next message that is due, and marks it busy. Only messages up to `stored` can be
    /// read from the store yet.
    pub fn next_due(&mut self, now: Instant, stored: MessageId) -> Option<MessageId> {
        let is_due = |due: &Option<Instant>| due.is_none_or(|due| due <= now);
        let mut due = self.schedule.iter().take_while(|(due, _, _)| is_due(due));
        let entry = *due.find(|(_, _, id)| *id <= stored)?;
        self.schedule.remove(&entry);
        let (_, _, id) = entry;
        self.set_phase(id, Phase::Busy);
        Some(id)
    }

    /// When the next message up to `stored` is due by time, if any is.
    #[must_use]
    pub fn next_time(&self, stored: MessageId) -> Option<Instant> {
        let mut entries = self.schedule.iter();
        entries.find_map(|(due, _, id)| due.filter(|_| *id <= stored))
    }

    /// A busy message is on its way to S2: it no longer holds what follows.
    pub fn sent(&mut self, id: MessageId) {
        self.set_phase(id, Phase::Sent);
        for follower in self.dequeue(id) {
            self.arm(follower);
        }
    }

    /// A busy or sent message is back in the store: it failed (`failed`), or it could not be sent after
    /// all. It holds what follows again.
    pub fn back(&mut self, id: MessageId, failed: bool, due: Due) {
        let Some(mut held) = self.messages.remove(&id) else { return };
        self.count(&held, -1);
        held.failed |= failed;
        held.due = due;
        held.phase = Phase::Idle;
        self.count(&held, 1);
        self.messages.insert(id, held);
        self.enqueue(id);
        self.disarm_followers(id);
        self.arm(id);
    }

    /// The message has left the store: S2 acknowledged it, a transform dropped it, or an operator gave
    /// it up.
    pub fn remove(&mut self, id: MessageId) {
        let Some(held) = self.messages.get(&id) else { return };
        self.schedule.remove(&schedule_key(held, id));
        self.gated.remove(&held.position);
        let followers = self.dequeue(id);
        if let Some(held) = self.messages.remove(&id) {
            self.count(&held, -1);
            self.count_grouping(&held.groups, false);
        }
        for follower in followers {
            self.arm(follower);
        }
    }

    /// Makes an idle message due at once. Says whether it was idle.
    pub fn request(&mut self, id: MessageId) -> bool {
        if !self.is_idle(id) {
            return false;
        }
        let Some(mut held) = self.messages.remove(&id) else { return false };
        self.schedule.remove(&schedule_key(&held, id));
        self.count(&held, -1);
        held.due = Due::Now;
        self.count(&held, 1);
        self.messages.insert(id, held);
        self.arm(id);
        true
    }

    /// Makes every failed message due at once: the chain has changed.
    pub fn request_all(&mut self) {
        let ids: Vec<MessageId> = self.messages.keys().copied().collect();
        for id in ids {
            self.request(id);
        }
    }

    /// Whether a message has failed, rather than only waiting behind one.
    #[must_use]
    pub fn has_failed(&self, id: MessageId) -> bool {
        self.messages.get(&id).is_some_and(|held| held.failed)
    }

    /// All messages with their positions, in no order.
    pub fn positions(&self) -> impl Iterator<Item = (Position, MessageId)> {
        self.messages.iter().map(|(id, held)| (held.position, *id))
    }

    /// Whether there is such a message.
    #[must_use]
    pub fn has(&self, id: MessageId) -> bool {
        self.messages.contains_key(&id)
    }

    /// Whether a message is idle: neither tried nor sent at this moment.
    #[must_use]
    pub fn is_idle(&self, id: MessageId) -> bool {
        self.messages.get(&id).is_some_and(|held| held.phase == Phase::Idle)
    }

    /// Puts a message on the schedule if nothing holds it back.
    fn arm(&mut self, id: MessageId) {
        let Some(held) = self.messages.get(&id) else { return };
        let ready = held.phase == Phase::Idle
            && (held.position <= self.passed || mutation::broken(Rule::WaitForTheSource))
            && !self.holds(held.position, &held.groups);
        if ready && held.due != Due::OnRequest {
            self.schedule.insert(schedule_key(held, id));
        }
    }

    /// Takes the messages behind this one off the schedule.
    fn disarm_followers(&mut self, id: MessageId) {
        for follower in self.followers(id) {
            if let Some(held) = self.messages.get(&follower) {
                self.schedule.remove(&schedule_key(held, follower));
            }
        }
    }

    fn enqueue(&mut self, id: MessageId) {
        let Some(held) = self.messages.get(&id) else { return };
        for group in held.groups.iter() {
            self.groups.entry(group).or_default().insert(held.position, id);
        }
        let table = self.tables.entry(held.groups.table).or_default();
        table.unsent.insert(held.position, id);
        if held.groups.is_barrier() {
            table.barriers.insert(held.position);
        }
    }

    /// Counts a message's grouping in, or out. What is sent still counts: it may be in a queue behind a
    /// change of another grouping, which is refused and has to hold it then.
    fn count_grouping(&mut self, groups: &Groups, is_in: bool) {
        let Some(grouping) = groups.grouping() else { return };
        let table = self.tables.entry(groups.table).or_default();
        let count = table.groupings.entry(grouping).or_default();
        *count = if is_in { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            table.groupings.remove(&grouping);
        }
        self.forget_table(groups.table);
    }

    fn forget_table(&mut self, table: GroupId) {
        let is_over = |table: &TableQueue| table.unsent.is_empty() && table.groupings.is_empty();
        if self.tables.get(&table).is_some_and(is_over) {
            self.tables.remove(&table);
        }
    }

    /// Takes a message out of its queues and says which may have become first.
    fn dequeue(&mut self, id: MessageId) -> Vec<MessageId> {
        let followers = self.followers(id);
        let Some(held) = self.messages.get(&id) else { return followers };
        for group in held.groups.iter() {
            if let Some(queue) = self.groups.get_mut(&group) {
                queue.remove(&held.position);
                if queue.is_empty() {
                    self.groups.remove(&group);
                }
            }
        }
        if let Some(table) = self.tables.get_mut(&held.groups.table) {
            table.unsent.remove(&held.position);
            table.barriers.remove(&held.position);
        }
        self.forget_table(held.groups.table);
        followers
    }

    /// The messages whose turn depends on this one: the next in each of its groups, the next barrier
    /// of its table, and, behind a barrier, everything up to the next one.
    fn followers(&self, id: MessageId) -> Vec<MessageId> {
        let Some(held) = self.messages.get(&id) else { return Vec::new() };
        let after = (std::ops::Bound::Excluded(held.position), std::ops::Bound::Unbounded);
        let mut followers: Vec<MessageId> = held
            .groups
            .iter()
            .filter_map(|group| self.groups.get(&group)?.range(after).next())
            .map(|(_, id)| *id)
            .collect();
        if let Some(table) = self.tables.get(&held.groups.table) {
            let next = table.barriers.range(after).next();
            let barrier = next.and_then(|barrier| table.unsent.get(barrier));
            followers.extend(barrier.copied());
            if held.groups.is_barrier() {
                let until = next.copied();
                let behind = table.unsent.range(after);
                let behind = behind.take_while(|(at, _)| until.is_none_or(|until| **at < until));
                followers.extend(behind.map(|(_, id)| *id));
            }
        }
        followers
    }

    fn set_phase(&mut self, id: MessageId, phase: Phase) {
        if let Some(held) = self.messages.get_mut(&id) {
            held.phase = phase;
        }
    }

    fn count(&mut self, held: &Held, by: i64) {
        let count = match (held.failed, held.due) {
            (false, _) => &mut self.counts.waiting,
            (true, Due::OnRequest) => &mut self.counts.parked,
            (true, Due::Now | Due::At(_)) => &mut self.counts.retrying,
        };
        *count = count.saturating_add_signed(by);
    }
}

fn schedule_key(held: &Held, id: MessageId) -> (Option<Instant>, Position, MessageId) {
    let due = match held.due {
        Due::At(instant) => Some(instant),
        Due::Now | Due::OnRequest => None,
    };
    (due, held.position, id)
}

#[cfg(test)]
mod invariants;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::change::Lsn;

    fn at(index: u64) -> Position {
        Position { commit_lsn: Lsn(1), index }
    }

    fn group(name: u8) -> GroupId {
        GroupId([name; 16])
    }

    const TABLE: GroupId = GroupId([255; 16]);

    fn row(name: u8) -> Groups {
        Groups { table: TABLE, first: Some(group(name)), second: None }
    }

    fn moved(to: u8, from: u8) -> Groups {
        Groups { table: TABLE, first: Some(group(to)), second: Some(group(from)) }
    }

    const TRUNCATE: Groups = Groups { table: TABLE, first: None, second: None };

    fn holds_all_read() -> Holds {
        Holds::new(at(1_000_000))
    }

    #[test]
    fn a_failed_message_holds_its_group_and_no_other() {
        let mut holds = holds_all_read();
        holds.insert(1, at(1), row(1), true, Due::OnRequest);
        assert!(holds.holds(at(2), &row(1)));
        assert!(!holds.holds(at(2), &row(2)));
        assert!(!holds.holds(at(0), &row(1)), "an earlier change goes first");
        assert_eq!(holds.counts(), Counts { parked: 1, retrying: 0, waiting: 0 });
    }

    #[test]
    fn a_refused_change_holds_what_was_sent_behind_it_under_another_grouping() {
        let of = |grouping: u8| {
            let mut id = [1; 16];
            id[..GROUPING_BYTES].fill(grouping);
            Groups { table: TABLE, first: Some(GroupId(id)), second: None }
        };
        let mut holds = holds_all_read();
        holds.insert(8, at(8), of(1), false, Due::Now);
        assert_eq!(holds.next_due(Instant::now(), u64::MAX), Some(8));
        holds.sent(8);
        // Changes in front of it in the queue have another grouping, and one is refused.
        let refused = holds.beside(of(2));
        assert!(refused.is_barrier());
        holds.insert(9, at(3), refused, true, Due::OnRequest);
        assert!(holds.is_held(8));
        holds.back(8, false, Due::Now);
        holds.remove(9);
        assert_eq!(holds.next_due(Instant::now(), u64::MAX), Some(8));
        holds.remove(8);
        assert!(!holds.beside(of(2)).is_barrier() && holds.tables.is_empty());
    }

    #[test]
    fn what_is_read_again_comes_before_what_was_stored_behind_it() {
        let now = Instant::now();
        let mut holds = holds_all_read();
        holds.insert(1, at(2), row(1), true, Due::Now);
        holds.insert(2, at(5), row(1), true, Due::OnRequest);
        holds.insert(3, at(6), row(2), true, Due::Now);
        holds.read_again_from(at(4));
        assert_eq!(holds.next_due(now, u64::MAX), Some(1), "it is in front");
        holds.sent(1);
        assert!(holds.request(2));
        assert_eq!(holds.next_due(now, u64::MAX), None);
        holds.pass(at(5));
        assert_eq!(holds.next_due(now, u64::MAX), Some(2));
        assert_eq!(holds.next_due(now, u64::MAX), None);
        holds.pass(at(6));
        assert_eq!(holds.next_due(now, u64::MAX), Some(3));
    }

    #[test]
    fn messages_of_a_group_leave_in_order() {
        let now = Instant::now();
        let mut holds = holds_all_read();
        holds.insert(1, at(1), row(1), true, Due::OnRequest);
        holds.insert(2, at(2), row(1), false, Due::Now);
        assert_eq!(holds.next_due(now, u64::MAX), None);
        assert!(holds.request(1));
        assert_eq!(holds.next_due(now, u64::MAX), Some(1));
        assert_eq!(holds.next_due(now, u64::MAX), None, "the first is not sent yet");
        holds.sent(1);
        assert!(holds.holds(at(3), &row(1)), "the second is not sent yet");
        assert_eq!(holds.next_due(now, u64::MAX), Some(2));
        holds.sent(2);
        assert!(!holds.holds(at(3), &row(1)));
        holds.remove(1);
        holds.remove(2);
        assert!(holds.is_empty());
        assert_eq!(holds.counts(), Counts::default());
    }

    #[test]
    fn what_is_not_stored_yet_lets_others_go_first() {
        let now = Instant::now();
        let mut holds = holds_all_read();
        holds.insert(7, at(1), row(1), true, Due::Now);
        holds.insert(3, at(2), row(2), true, Due::Now);
        assert_eq!(holds.next_due(now, 6), Some(3));
        assert_eq!(holds.next_due(now, 6), None);
        assert_eq!(holds.next_due(now, 7), Some(7));
    }

    #[test]
    fn a_retry_waits_for_its_time() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut holds = holds_all_read();
        holds.insert(1, at(1), row(1), true, Due::At(later));
        assert_eq!(holds.next_due(now, u64::MAX), None);
        assert_eq!(holds.next_time(u64::MAX), Some(later));
        assert_eq!(holds.next_due(later, u64::MAX), Some(1));
        holds.back(1, true, Due::OnRequest);
        assert_eq!(holds.next_due(later, u64::MAX), None);
        holds.request_all();
        assert_eq!(holds.next_due(now, u64::MAX), Some(1));
    }

    #[test]
    fn a_changed_key_waits_in_both_groups_and_holds_both() {
        let now = Instant::now();
        let mut holds = holds_all_read();
        holds.insert(1, at(1), row(1), true, Due::OnRequest);
        holds.insert(2, at(2), moved(2, 1), false, Due::Now);
        assert!(holds.holds(at(3), &row(2)), "behind the change of the key");
        holds.request(1);
        assert_eq!(holds.next_due(now, u64::MAX), Some(1));
        holds.remove(1);
        assert_eq!(holds.next_due(now, u64::MAX), Some(2));
        holds.remove(2);
        assert!(!holds.holds(at(3), &row(2)));
    }

    #[test]
    fn a_truncate_is_a_barrier() {
        let now = Instant::now();
        let mut holds = holds_all_read();
        assert!(!holds.holds(at(9), &TRUNCATE));
        holds.insert(1, at(1), row(1), true, Due::OnRequest);
        assert!(holds.holds(at(2), &TRUNCATE));
        holds.insert(2, at(2), TRUNCATE, false, Due::Now);
        assert!(holds.holds(at(3), &row(2)), "behind the truncate, in any group");
        holds.insert(3, at(3), row(2), false, Due::Now);
        holds.insert(4, at(4), row(3), false, Due::Now);
        assert_eq!(holds.next_due(now, u64::MAX), None);
        holds.request(1);
        assert_eq!(holds.next_due(now, u64::MAX), Some(1));
        holds.sent(1);
        assert_eq!(holds.next_due(now, u64::MAX), Some(2));
        assert_eq!(holds.next_due(now, u64::MAX), None);
        holds.sent(2);
        assert_eq!(holds.next_due(now, u64::MAX), Some(3));
        assert_eq!(holds.next_due(now, u64::MAX), Some(4));
    }

    #[test]
    fn a_change_of_the_grouping_is_a_barrier() {
        use crate::change::{Action, Cell, Column, Grouping, Lsn, Table, Tuple};
        use crate::pg_type::Kind;
        use std::sync::Arc;

        let change = |index, grouping: &Grouping| {
            let column = Column {
                name: "id".to_owned(),
                type_name: "text".to_owned(),
                kind: Kind::Text,
                identity: true,
                primary_key: true,
            };
            let other = Column { name: "n".to_owned(), primary_key: false, ..column.clone() };
            let table = Table {
                oid: 1,
                schema: "s".to_owned(),
                name: "t".to_owned(),
                columns: vec![column, other],
                grouping: grouping.clone(),
            };
            let cells = [Cell::Text { start: 0, end: 1 }, Cell::Null].into();
            Change {
                position: Position { commit_lsn: Lsn(1), index },
                commit_timestamp_us: 0,
                action: Action::Insert,
                table: Arc::new(table),
                new: Some(Tuple { data: bytes::Bytes::from_static(b"1"), cells }),
                old: None,
            }
        };
        let now = Instant::now();
        let mut holds = holds_all_read();
        let (key, by) = (Grouping::Key, Grouping::Columns(vec![1]));
        let insert = |holds: &mut Holds, id, change: &Change, failed, due| {
            let groups = holds.groups_of(change);
            holds.insert(id, change.position, groups, failed, due);
            groups
        };
        insert(&mut holds, 1, &change(1, &key), true, Due::OnRequest);
        assert!(!holds.groups_of(&change(2, &key)).is_barrier());
        let first = change(2, &by);
        assert!(holds.holds(at(2), &holds.groups_of(&first)), "behind another grouping");
        assert!(insert(&mut holds, 2, &first, false, Due::Now).is_barrier());
        let second = change(3, &by);
        assert!(holds.holds(at(3), &holds.groups_of(&second)), "behind the barrier");
        insert(&mut holds, 3, &second, false, Due::Now);
        assert!(holds.is_held(2) && holds.is_held(3) && !holds.is_held(1));
        assert_eq!(holds.next_due(now, u64::MAX), None);
        for id in [1, 2, 3] {
            holds.request(id);
            assert_eq!(holds.next_due(now, u64::MAX), Some(id));
            assert_eq!(holds.next_due(now, u64::MAX), None);
            holds.sent(id);
            holds.remove(id);
        }
        assert!(!holds.groups_of(&change(4, &by)).is_barrier(), "the new grouping holds now");
        assert!(holds.tables.is_empty());
    }

    #[test]
    fn what_s2_refused_holds_again() {
        let now = Instant::now();
        let mut holds = holds_all_read();
        holds.insert(1, at(1), row(1), true, Due::Now);
        assert_eq!(holds.next_due(now, u64::MAX), Some(1));
        holds.sent(1);
        assert!(!holds.holds(at(2), &row(1)));
        holds.back(1, true, Due::OnRequest);
        assert!(holds.holds(at(2), &row(1)));
    }

    #[test]
    fn beyond_the_checkpoint_the_source_goes_first() {
        let now = Instant::now();
        let mut holds = Holds::new(at(1));
        holds.insert(5, at(5), row(1), true, Due::Now);
        assert_eq!(holds.next_due(now, u64::MAX), None);
        holds.pass(at(4));
        assert_eq!(holds.next_due(now, u64::MAX), None);
        assert!(!holds.holds(at(4), &row(1)), "what had not reached S2 comes first");
        holds.pass(at(5));
        assert_eq!(holds.next_due(now, u64::MAX), Some(5));
    }

    #[test]
    fn an_earlier_message_takes_the_turn() {
        let now = Instant::now();
        let mut holds = holds_all_read();
        holds.insert(5, at(5), row(1), true, Due::Now);
        holds.insert(6, at(3), row(1), true, Due::OnRequest);
        assert_eq!(holds.next_due(now, u64::MAX), None);
        holds.remove(6);
        assert_eq!(holds.next_due(now, u64::MAX), Some(5));
    }

    proptest! {
        /// Whatever happens, what leaves keeps the order of positions within each group and around
        /// truncates, and everything leaves in the end.
        #[test]
        fn order_holds(
            messages in prop::collection::vec((0..4u8, 0..4u8, 0..10u8), 1..40),
            fails in prop::collection::vec(0..3u8, 200),
        ) {
            let now = Instant::now();
            let mut holds = holds_all_read();
            let mut all = Vec::new();
            for (index, (to, from, kind)) in messages.iter().enumerate() {
                let groups = match kind {
                    0 => TRUNCATE,
                    1 | 2 => moved(*to, *from),
                    _ => row(*to),
                };
                let groups = Groups { second: groups.second.filter(|second| Some(*second) != groups.first), ..groups };
                let id = index as u64;
                holds.insert(id, at(id), groups, id.is_multiple_of(3), Due::Now);
                all.push(groups);
            }
            let mut fails = fails.into_iter();
            let mut left: Vec<u64> = Vec::new();
            let mut busy: Vec<u64> = Vec::new();
            loop {
                while let Some(id) = holds.next_due(now, u64::MAX) {
                    busy.push(id);
                }
                if busy.is_empty() {
                    break;
                }
                for id in std::mem::take(&mut busy) {
                    match fails.next().unwrap_or(2) {
                        0 => holds.back(id, true, Due::Now),
                        1 => {
                            holds.sent(id);
                            left.push(id);
                            holds.remove(id);
                        }
                        _ => {
                            left.push(id);
                            holds.remove(id);
                        }
                    }
                }
            }
            prop_assert_eq!(left.len(), all.len());
            prop_assert!(holds.is_empty());
            prop_assert_eq!(holds.counts(), Counts::default());
            for (n, a) in left.iter().enumerate() {
                for b in &left[n + 1..] {
                    let (first, second) = (&all[usize::try_from(*a).unwrap()], &all[usize::try_from(*b).unwrap()]);
                    let related = first.is_barrier() || second.is_barrier()
                        || first.iter().any(|group| second.iter().any(|other| other == group));
                    prop_assert!(!related || a < b, "{} left before {}", a, b);
                }
            }
        }
    }
}
