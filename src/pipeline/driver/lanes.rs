//! The pipeline's streams: its own, and those that transforms route messages to.
//!
//! A routed stream is opened at its first message and closed once it was idle for a while; never more
//! than [`Portions::sessions_max`] of them have a session at once. Where more have something to send,
//! those that have had theirs for [`Portions::session_turn`] give way to those that have waited longest. What waits for a stream
//! counts as everything that was read and is not settled: [`ByteBudget`](crate::pipeline::budget) and
//! the bounds of retries and of the spill hold for all streams together.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::select_all;

use super::Portions;
use super::lane::{Lane, Sink, SinkEvent};
use super::routed::Routed;
use crate::change::Change;
use crate::mutation::{self, Rule};
use crate::pipeline::crossing::Crossing;
use crate::pipeline::group::Groups;
use crate::pipeline::outbox::Parcel;
use crate::pipeline::place::LaneId;

/// Beyond so many, those that have nothing to do are closed sooner.
const KEPT_MAX: usize = 256;

/// All streams of which anything is in memory.
pub(super) struct Lanes {
    pub(super) own: Lane,
    portions: Portions,
    routed: BTreeMap<LaneId, Lane>,
    ids: HashMap<Arc<str>, LaneId>,
    /// Never given twice, so that no number can mean another stream than it did.
    next: u32,
    crossing: Crossing,
    /// Which is asked first for events, so that a busy stream does not keep others waiting.
    turn: usize,
}

impl Lanes {
    pub(super) fn new(own: Lane, portions: Portions) -> Self {
        Self {
            own,
            portions,
            routed: BTreeMap::new(),
            ids: HashMap::new(),
            next: 1,
            crossing: Crossing::default(),
            turn: 0,
        }
    }

    /// Nothing is routed anywhere.
    pub(super) fn is_single(&self) -> bool {
        self.routed.is_empty()
    }

    pub(super) fn get(&self, id: LaneId) -> Option<&Lane> {
        if id == LaneId::OWN { Some(&self.own) } else { self.routed.get(&id) }
    }

    pub(super) fn get_mut(&mut self, id: LaneId) -> Option<&mut Lane> {
        if id == LaneId::OWN { Some(&mut self.own) } else { self.routed.get_mut(&id) }
    }

    pub(super) fn id(&self, name: &str) -> Option<LaneId> {
        self.ids.get(name).copied()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (LaneId, &Lane)> {
        std::iter::once((LaneId::OWN, &self.own)).chain(self.routed())
    }

    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = (LaneId, &mut Lane)> {
        let routed = self.routed.iter_mut().map(|(id, lane)| (*id, lane));
        std::iter::once((LaneId::OWN, &mut self.own)).chain(routed)
    }

    pub(super) fn routed(&self) -> impl Iterator<Item = (LaneId, &Lane)> {
        self.routed.iter().map(|(id, lane)| (*id, lane))
    }

    /// Takes a routed stream in.
    pub(super) fn insert(&mut self, name: Arc<str>, lane: Lane) -> LaneId {
        if self.is_single() {
            self.crossing.begin();
        }
        let id = LaneId(self.next);
        self.next += 1;
        self.ids.insert(name, id);
        self.routed.insert(id, lane);
        id
    }

    /// Forgets a routed stream of which nothing is left.
    pub(super) fn remove(&mut self, id: LaneId) {
        if let Some(Routed { name, .. }) = self.routed.remove(&id).and_then(|lane| lane.routed) {
            self.ids.remove(&name);
        }
        if self.is_single() {
            self.crossing.end();
        }
    }

    /// Takes a change's records for a stream, behind everything of its groups that is on its way to
    /// others.
    pub(super) fn push(
        &mut self,
        id: LaneId,
        mut parcel: Parcel,
        groups: impl FnOnce(&Change) -> Groups,
        now: Instant,
    ) {
        if self.is_single() {
            parcel.number = self.crossing.number();
        } else {
            let Self { own, routed, crossing, .. } = self;
            let front = |id| front(own, routed, id);
            let groups = groups(&parcel.item.change);
            (parcel.number, parcel.behind) = crossing.enter(id, &groups, front);
            if mutation::broken(Rule::WaitForOtherStreams) {
                parcel.behind.clear();
            }
        }
        if let Some(lane) = self.get_mut(id) {
            lane.outbox.push(parcel, now);
        }
    }

    /// Lets those go that waited for other streams and need not any more.
    pub(super) fn lift(&mut self) {
        if !self.all().any(|(_, lane)| lane.outbox.waits()) {
            return;
        }
        let fronts: HashMap<LaneId, u64> =
            self.all().filter_map(|(id, lane)| Some((id, lane.front()?))).collect();
        for (_, lane) in self.all_mut() {
            lane.outbox.lift(|id| fronts.get(&id).copied());
        }
    }

    /// Which routed streams begin to be opened now. Sees to it that those that wait too long for a
    /// session get one.
    ///
    /// The pipeline's own stream is opened first: there a process finds out whether it may write at all,
    /// before it takes the others from one that may.
    pub(super) fn next_to_open(&mut self, now: Instant) -> Vec<LaneId> {
        if self.is_single() || self.own.unread {
            return Vec::new();
        }
        let mut open = self.routed.values().filter(|lane| lane.has_session()).count();
        let mut wanting: Vec<(Instant, LaneId)> = self
            .routed
            .iter()
            .filter(|(_, lane)| lane.wants_session() && lane.is_due(now))
            .filter_map(|(id, lane)| Some((lane.routed.as_ref()?.since, *id)))
            .collect();
        wanting.sort_unstable();
        let mut chosen = Vec::new();
        let mut left = wanting.len();
        for (_, id) in wanting {
            if open >= self.portions.sessions_max {
                if !self.give_way(left, now) {
                    break;
                }
                open -= 1;
            }
            open += 1;
            left -= 1;
            chosen.push(id);
        }
        chosen
    }

    /// Ends the session of a stream that has nothing to do, or lets the one end its that has had it
    /// longest, as far as not enough do so already. Says whether one is free now.
    fn give_way(&mut self, wanting: usize, now: Instant) -> bool {
        let idle = self.routed.values_mut().find(|lane| lane.is_open() && !lane.is_busy());
        if let Some(lane) = idle {
            lane.sink = Sink::Waiting { until: now };
            return true;
        }
        if self.leaving() < wanting {
            let turn = self.portions.session_turn;
            let has_had = |lane: &&mut Lane| lane.turn_ends(turn).is_some_and(|ends| ends <= now);
            let turns = self.routed.values_mut().filter(has_had);
            if let Some(lane) = turns.min_by_key(|lane| lane.turn_ends(turn)) {
                lane.reconnecting = true;
            }
        }
        false
    }

    /// How many are about to end their session.
    fn leaving(&self) -> usize {
        self.routed.values().filter(|lane| lane.is_open() && lane.reconnecting).count()
    }

    /// When one of them has to be looked at again, whatever else happens.
    pub(super) fn wake(&self, now: Instant) -> Option<Instant> {
        let own = self.own.wake();
        if self.is_single() || self.own.unread {
            return own;
        }
        let open = self.routed.values().filter(|lane| lane.has_session()).count();
        let mut wanting = 0;
        let mut wake = own;
        let mut earlier = |at: Option<Instant>| wake = [wake, at].into_iter().flatten().min();
        for lane in self.routed.values() {
            match &lane.sink {
                Sink::Waiting { until } if lane.wants_session() => {
                    if *until > now || open < self.portions.sessions_max {
                        earlier(Some(*until));
                    } else {
                        wanting += 1;
                    }
                }
                Sink::Waiting { .. } => {}
                Sink::Open(_) | Sink::Opening(_) => earlier(lane.wake()),
            }
        }
        // They wait for somebody's turn to end, and then for its acknowledgements.
        if wanting > self.leaving() {
            let turn = self.portions.session_turn;
            earlier(self.routed.values().filter_map(|lane| lane.turn_ends(turn)).min());
        }
        wake
    }

    /// By how much more rarely each of them is tried when many are in trouble.
    pub(super) fn crowd(&self) -> u32 {
        1 + u32::try_from(self.routed.len() / self.portions.sessions_max).unwrap_or(u32::MAX - 1)
    }

    /// The next event of any of them. Cancel-safe.
    pub(super) async fn event(&mut self) -> (LaneId, SinkEvent) {
        if self.is_single() {
            return (LaneId::OWN, self.own.sink.event().await);
        }
        self.turn = self.turn.wrapping_add(1);
        let turn = self.turn;
        let mut lanes: Vec<(LaneId, &mut Lane)> =
            self.all_mut().filter(|(id, lane)| *id == LaneId::OWN || lane.has_session()).collect();
        let first = turn % lanes.len();
        lanes.rotate_left(first);
        let events = lanes.into_iter().map(|(id, lane)| Box::pin(next_event(id, &mut lane.sink)));
        select_all(events).await.0
    }

    fn idle_max(&self) -> Duration {
        let Portions { session_turn, stream_idle, .. } = self.portions;
        if self.routed.len() > KEPT_MAX { session_turn } else { stream_idle }
    }

    /// Whether one of them has been idle for so long that it is closed.
    pub(super) fn is_any_idle(&self, now: Instant) -> bool {
        self.routed.values().any(|lane| lane.is_idle(now, self.idle_max()))
    }

    /// Those that are closed with the next checkpoint, because nothing of them is unsettled. `covered`
    /// says whether the checkpoint covers all of one's records.
    pub(super) fn to_close(&self, now: Instant, covered: impl Fn(LaneId) -> bool) -> Vec<LaneId> {
        let idle =
            |(id, lane): &(LaneId, &Lane)| lane.is_idle(now, self.idle_max()) && covered(*id);
        self.routed().filter(idle).map(|(id, _)| id).collect()
    }
}

async fn next_event(id: LaneId, sink: &mut Sink) -> (LaneId, SinkEvent) {
    (id, sink.event().await)
}

fn front(own: &Lane, routed: &BTreeMap<LaneId, Lane>, id: LaneId) -> Option<u64> {
    let lane = if id == LaneId::OWN { Some(own) } else { routed.get(&id) };
    lane.and_then(Lane::front)
}
