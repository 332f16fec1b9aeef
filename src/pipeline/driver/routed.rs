//! Streams that transforms route messages to: what is particular to them.
//!
//! - *Known to the store.* Before the first record goes to a routed stream, the store has a row for it
//!   with the number to read it from; while the row is there, a record that nobody has heard of may be
//!   in it. The row follows the checkpoint, in its transaction, and leaves with the one that covers
//!   everything. A start reads every stream that has a row before anything at all is sent: a newer
//!   chain may route elsewhere what is in it already.
//! - *Its own trouble.* Where a stream is missing, forbidden, being deleted, fenced by somebody else or
//!   trimmed, or takes nothing for [`PATIENCE`] while the pipeline's own does, it is *shut*: what is
//!   bound for it parks, with the class `route` and a sentence that names it, so that the database is
//!   let go and all others go on, except what is behind a parked message in its group. The stream is
//!   tried again by itself, and what is parked for it follows at once when it is back. To keep the
//!   head waiting instead would let one stream, which a row's value may have named, stop them all.
//!   Trouble of S2 as a whole parks nothing, as everywhere.
//! - *Doubtful.* What was sent there without an answer when it was shut, or when changes were spilled,
//!   may be in it. It may be tried again for the same stream only, where the stream is read before it
//!   goes; routed elsewhere it parks until the stream has been read, or is said not to be there any more.
//!   That may be wrong, as a proxy's 404 is: when the stream is back, it is looked for there all the same.
//! - *Veiled.* A stream that has a row and is shut before it was read at the start holds what nobody here
//!   knows. What may be in it is what an earlier process had: at most everything that was committed when
//!   the slot became ours ([`SourceStatus::taken_at`](crate::source::SourceStatus::taken_at)), and what was
//!   in the store then, which is no newer. All of that is doubtful at once, whatever the chain makes of
//!   it: it parks, and newer changes go on, except behind a parked one of their group. Once the stream can
//!   be read, what is found in it leaves the store, and the rest follows. Where the store is full of it,
//!   nothing new is read, as always. After `--take-over` nothing is veiled, and everything waits: a frozen
//!   process may still read on, and nothing keeps it from a stream that cannot be fenced.
//! - A stream that was deleted has taken its records along: it is begun anew, with what is beyond the
//!   checkpoint.
//!
//! Whoever stands in for S2 provides a sink for every stream by its
//! [`Transport`](crate::sink::transport::Transport): it is the same for all, and a request's path names
//! the stream.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dead::is_letter;
use super::keep::MadeBy;
use super::lane::{Lane, Sink};
use super::{Driver, Error};
use crate::change::Position;
use crate::mutation::{self, Rule};
use crate::pipeline::control::{ErrorView, Reason, StreamView};
use crate::pipeline::grants::{Grants, refusal};
use crate::pipeline::holds::MessageId;
use crate::pipeline::item::{Item, Origin};
use crate::pipeline::outbox::Parcel;
use crate::pipeline::place::{Floors, Landed, LaneId};
use crate::pipeline::size_gate::SizedRecord;
use crate::policy;
use crate::policy::outcomes::{self, Condition};
use crate::sink::error::{Class, Named};
use crate::store::{Failure, StreamRow, Write};

/// For so long a routed stream may take nothing while the pipeline's own does, before what is bound for
/// it parks.
const PATIENCE: Duration = Duration::from_secs(15);

/// A message for a stream that is shut has it tried again, at most so often.
const PROBE_PAUSE: Duration = Duration::from_secs(1);

/// How many streams the status shows.
const SHOWN_MAX: usize = 100;

/// What a routed stream has beside what every stream has.
pub(super) struct Routed {
    pub(super) name: Arc<str>,
    pub(super) row: Row,
    /// The numbers in the row, as the last transaction left it: from where it is read, and how far it has
    /// reached.
    saved: Option<(u64, u64)>,
    /// When it last got a session or lost it.
    pub(super) since: Instant,
    /// When it last had something to do.
    active_at: Instant,
    /// Since when it takes nothing.
    troubled_since: Option<Instant>,
    /// What is bound for it parks.
    shut: Option<Reason>,
    /// S2 says that there is no such stream, so that nothing that was sent there is anywhere: it may go
    /// elsewhere. Whoever said so may be wrong, so that it is looked for when the stream is back.
    gone: bool,
    probed_at: Instant,
    /// Changes up to here, or to the end of Postgres's log, are taken as delivered, as an operator chose
    /// because records of it are gone.
    pub(super) skips: Option<Option<Position>>,
    /// What is parked for it, and perhaps for another stream since.
    parked: HashSet<MessageId>,
    /// It was sent something without an answer, and is read whatever becomes of that: a transform may drop
    /// it by now, and without its row a restart with another chain would send it again.
    doubted: bool,
}

/// What the store knows of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Row {
    /// Nothing unsettled of this store is in it.
    Absent,
    Present,
    /// The transaction that removes it is under way.
    Leaving,
}

/// Messages of which a stream may have a record that nobody has heard of.
#[derive(Default)]
pub(super) struct Doubts {
    /// Which stream.
    open: HashMap<Position, LaneId>,
    /// Streams that are shut and were not read since the start.
    veiled: BTreeSet<LaneId>,
    /// Found there while the message was on its way through the transforms.
    found: HashMap<Position, Landed>,
}

impl Doubts {
    pub(super) fn is_open(&self, position: Position) -> bool {
        self.open.contains_key(&position)
    }

    /// Nothing is in doubt.
    fn is_empty(&self) -> bool {
        self.open.is_empty() && self.veiled.is_empty()
    }

    /// It was found while it is on its way here.
    pub(super) fn find(&mut self, position: Position, landed: Landed) {
        self.found.insert(position, landed);
    }

    /// What was found and is still on its way here: a restart has to find it again.
    pub(super) fn add_found(&self, floors: &mut Floors) {
        self.found.values().for_each(|landed| floors.add(*landed));
    }

    /// It is known to have arrived.
    pub(super) fn end(&mut self, position: Position) {
        if !self.open.is_empty() {
            self.open.remove(&position);
        }
        if !self.found.is_empty() {
            self.found.remove(&position);
        }
    }

    /// With nothing on its way, nothing can have been found that is.
    #[cfg(test)]
    pub(super) fn assert_nothing_is_found(&self) {
        assert!(self.found.is_empty(), "at rest, {:?} are found", self.found);
    }
}

impl Routed {
    pub(super) fn is_shut(&self) -> bool {
        self.shut.is_some()
    }
}

impl Lane {
    /// What transforms call it; nothing for the pipeline's own.
    pub(super) fn name(&self) -> Option<Arc<str>> {
        self.routed.as_ref().map(|routed| Arc::clone(&routed.name))
    }

    /// A session is open, or is being opened.
    pub(super) fn has_session(&self) -> bool {
        matches!(self.sink, Sink::Open(_) | Sink::Opening(_))
    }

    /// Whether a routed stream has anything to do with a session.
    pub(super) fn wants_session(&self) -> bool {
        let Some(routed) = &self.routed else { return true };
        let is_to_be_read = (self.unread && !routed.gone) || routed.doubted;
        routed.row != Row::Leaving && (is_to_be_read || self.is_busy() || !routed.parked.is_empty())
    }

    /// When it has had its session long enough for others to have one, unless it ends it already.
    pub(super) fn turn_ends(&self, turn: Duration) -> Option<Instant> {
        let routed = self.routed.as_ref()?;
        (self.is_open() && !self.reconnecting).then(|| routed.since + turn)
    }

    /// Whether a routed stream has had nothing to do for so long.
    pub(super) fn is_idle(&self, now: Instant, time: Duration) -> bool {
        let Some(routed) = &self.routed else { return false };
        let is_unread = self.unread && !routed.gone;
        let is_free = !is_unread && !self.is_busy() && routed.parked.is_empty();
        let opens = matches!(self.sink, Sink::Opening(_)) || routed.row == Row::Leaving;
        is_free && !opens && routed.active_at + time <= now
    }

    /// It has taken something.
    pub(super) fn works(&mut self) {
        if let Some(routed) = &mut self.routed {
            routed.troubled_since = None;
        }
    }

    pub(super) fn touch(&mut self, now: Instant) {
        if let Some(routed) = &mut self.routed {
            routed.active_at = now;
        }
    }
}

impl Driver {
    /// Takes in the streams that the store has rows for: all of them are read before anything is sent.
    pub(super) fn adopt_streams(&mut self, rows: Vec<StreamRow>) -> Result<(), Error> {
        for StreamRow { name, seq, reached } in rows {
            let id = self
                .new_lane(name.as_str().into())
                .map_err(|error| Error::Sink(crate::error_chain::error_chain(&error)))?;
            let Some(lane) = self.lanes.get_mut(id) else { continue };
            lane.unread = true;
            (lane.acknowledged, lane.reached) = (Some(seq), reached);
            if let Some(routed) = &mut lane.routed {
                routed.row = Row::Present;
                routed.saved = Some((seq, reached));
            }
        }
        Ok(())
    }

    fn new_lane(&mut self, name: Arc<str>) -> Result<LaneId, crate::sink::error::Error> {
        let now = self.clock.now();
        let is_dead = self.dead.is_stream(Some(&name));
        let named = if is_dead { Named::DeadLetters } else { Named::Route };
        let client = self.lanes.own.client.for_stream(&name, named)?;
        // What was granted for this start is granted for each stream once.
        let first = self.settings.grants != Grants::default() && self.granted.insert(name.clone());
        let grants = if first { self.settings.grants } else { Grants::default() };
        let mut lane = Lane::new(client, self.settings.window, grants, None, now);
        lane.unread = false;
        // By one token for all streams, so that what holds for the pipeline's own holds for them.
        if !mutation::broken(Rule::PromiseForAll) {
            lane.promised = self.lanes.own.promised;
        }
        lane.routed = Some(Routed {
            name: Arc::clone(&name),
            row: Row::Absent,
            saved: None,
            since: now,
            active_at: now,
            troubled_since: None,
            shut: None,
            gone: false,
            probed_at: now,
            skips: None,
            parked: HashSet::new(),
            doubted: false,
        });
        Ok(self.lanes.insert(name, lane))
    }

    /// The stream that transforms chose, which is most often the pipeline's own.
    pub(super) fn lane_of(
        &mut self,
        records: &[SizedRecord],
    ) -> Result<LaneId, crate::sink::error::Error> {
        let Some(name) = records.first().and_then(SizedRecord::stream) else {
            return Ok(LaneId::OWN);
        };
        if let Some(id) = self.lanes.id(name) {
            return Ok(id);
        }
        if **name == *self.lanes.own.client.place().stream {
            return Ok(LaneId::OWN);
        }
        self.new_lane(Arc::clone(name))
    }

    /// The stream that may have a message already, and what to say of it meanwhile.
    pub(super) fn doubtful(&self, item: &Item) -> Option<(LaneId, Failure)> {
        let open = self.doubts.open.get(&item.change.position).copied();
        let is_gone = |lane: &LaneId| {
            let routed = self.lanes.get(*lane).and_then(|lane| lane.routed.as_ref());
            routed.is_some_and(|routed| routed.gone)
        };
        let Some(lane) = open.filter(|lane| !is_gone(lane)) else {
            return self.veiled(item.change.position);
        };
        let failure = route_failure(format!(
            "an earlier attempt to send it to stream `{}` got no answer, and that stream cannot be read \
             to find out; it goes nowhere else before that",
            self.stream_of(lane)
        ));
        Some((lane, failure))
    }

    /// The stream that was not read since the start and may have a change of this position, and what to
    /// say of it meanwhile.
    pub(super) fn veiled(&self, position: Position) -> Option<(LaneId, Failure)> {
        let lane = *self.doubts.veiled.first()?;
        let taken_at = self.source.status.borrow().taken_at;
        // Before the slot is ours, only messages of the store are on their way.
        let may_be_there = taken_at.is_none_or(|lsn| position <= Position::last_before(lsn));
        if !may_be_there || mutation::broken(Rule::DoubtTheUnread) {
            return None;
        }
        let failure = route_failure(format!(
            "it was committed before this start, and stream `{}`, which may have it, could not be read \
             since then; it goes nowhere before that",
            self.stream_of(lane)
        ));
        Some((lane, failure))
    }

    /// Whether a stream may have a change of this position without our knowing.
    pub(super) fn is_in_doubt(&self, position: Position) -> bool {
        self.doubts.is_open(position) || self.veiled(position).is_some()
    }

    /// One sentence for the operator, while a stream's content is not known.
    pub(super) fn veil_sentence(&self) -> Option<String> {
        let lane = *self.doubts.veiled.first()?;
        Some(format!(
            "stream `{}` could not be read since the start, so that what was committed before is parked",
            self.stream_of(lane)
        ))
    }

    fn stream_of(&self, lane: LaneId) -> &str {
        self.lanes.get(lane).map_or("", |lane| &lane.client.place().stream)
    }

    /// What keeps a message from going to the stream that transforms chose for it: the stream that has
    /// to be back first, and the failure that it parks with.
    pub(super) fn obstacle(&mut self, id: LaneId, item: &Item) -> Option<(LaneId, Failure)> {
        if id == LaneId::OWN && self.doubts.is_empty() {
            return None;
        }
        if let Some((doubtful, failure)) = self.doubtful(item)
            && doubtful != id
        {
            return Some((doubtful, failure));
        }
        let now = self.clock.now();
        let lane = self.lanes.get_mut(id)?;
        lane.touch(now);
        let reason = lane.routed.as_ref()?.shut.as_ref()?;
        Some((id, route_failure(reason.text.clone())))
    }

    /// Parks what cannot be sent before a stream is back.
    pub(super) fn waits_for(&mut self, item: Item, lane: LaneId, failure: Failure) {
        self.probe(lane);
        let id = match item.origin {
            Origin::Source { .. } | Origin::Spilled { .. } => {
                self.park(item, failure, MadeBy::Current)
            }
            Origin::Store { id } => {
                self.off_the_way(&item);
                self.failed_again(id, failure, MadeBy::Current);
                id
            }
        };
        self.parked_for(lane, id);
    }

    /// A message waits for a stream, and may be tried because somebody has mended that.
    pub(super) fn probe(&mut self, id: LaneId) {
        let now = self.clock.now();
        let Some(lane) = self.lanes.get_mut(id) else { return };
        let Some(routed) = &lane.routed else { return };
        let probe = now.max(routed.probed_at + PROBE_PAUSE);
        if let Sink::Waiting { until } = &mut lane.sink
            && *until > probe
        {
            *until = probe;
        }
    }

    /// A message was parked because of a stream, and follows when that is back.
    pub(super) fn parked_for(&mut self, lane: LaneId, id: MessageId) {
        let lane = self.lanes.get_mut(lane);
        if let Some(routed) = lane.and_then(|lane| lane.routed.as_mut()) {
            routed.parked.insert(id);
        }
    }

    /// A message has left the store, perhaps by another stream: for none is there reason to stay open
    /// for it.
    pub(super) fn parked_for_none(&mut self, id: MessageId) {
        for (_, lane) in self.lanes.all_mut() {
            if let Some(routed) = &mut lane.routed {
                routed.parked.remove(&id);
            }
        }
    }

    /// Whether a stream has a message that was in doubt, found while it was shaped. It is delivered
    /// then.
    pub(super) fn found_landed(&mut self, item: &Item) -> Option<Landed> {
        if self.doubts.found.is_empty() {
            return None;
        }
        self.doubts.found.remove(&item.change.position)
    }

    /// These were sent to a stream without an answer, and have left its outbox.
    pub(super) fn doubt(&mut self, lane: LaneId, sent: &[Parcel]) {
        self.doubt_all(sent.iter().map(|parcel| (parcel.item.change.position, lane)).collect());
    }

    /// The same of several streams.
    pub(super) fn doubt_all(&mut self, sent: Vec<(Position, LaneId)>) {
        for (_, id) in &sent {
            if let Some(routed) = self.lanes.get_mut(*id).and_then(|lane| lane.routed.as_mut()) {
                routed.doubted = true;
            }
        }
        self.doubts.open.extend(sent);
    }

    /// A stream has been read: what was in doubt is in it or not.
    pub(super) fn end_doubts(&mut self, id: LaneId, landed: &HashMap<Position, u64>) {
        self.doubts.veiled.remove(&id);
        if self.doubts.open.is_empty() {
            return;
        }
        let mut found = Vec::new();
        self.doubts.open.retain(|position, lane| {
            if *lane == id
                && let Some(seq) = landed.get(position)
            {
                found.push((*position, *seq));
            }
            *lane != id
        });
        self.apply_landed(id, found.into_iter());
    }

    /// A routed stream was opened, and its end was read: what was parked for it is tried at once.
    pub(super) fn on_routed_open(&mut self, id: LaneId) {
        let now = self.clock.now();
        let Some(lane) = self.lanes.get_mut(id) else { return };
        let is_busy = lane.is_busy();
        let Some(routed) = &mut lane.routed else { return };
        routed.row = Row::Present;
        routed.since = now;
        routed.active_at = now;
        (routed.gone, routed.doubted) = (false, false);
        if !is_busy {
            routed.troubled_since = None;
        }
        if routed.shut.take().is_some() {
            tracing::info!(stream = &*routed.name, "the stream takes messages again");
        }
        let mut parked: Vec<MessageId> = std::mem::take(&mut routed.parked).into_iter().collect();
        parked.sort_unstable();
        for id in parked {
            self.holds.request(id);
        }
    }

    /// Whether an error is a routed stream's own trouble, and then why.
    pub(super) fn shuts(&self, id: LaneId, error: &crate::sink::error::Error) -> Option<Reason> {
        let lane = self.lanes.get(id)?;
        let routed = lane.routed.as_ref()?;
        let reason = |code: &str, text: String| Reason {
            part: "sink".to_owned(),
            code: code.to_owned(),
            text,
        };
        // Of what a frozen process may still do to one that was not read, nobody knows an end.
        let may_be_veiled = error.is_stream_missing() || !self.settings.grants.take_over;
        let may_be_shut = !lane.is_awaited() || may_be_veiled;
        match error.class() {
            Class::Sink(trouble) => {
                let now = self.clock.now();
                let is_late = routed.troubled_since.is_some_and(|since| since + PATIENCE <= now);
                let is_own = error.is_stream_missing()
                    || error.is_forbidden()
                    || error.is_stream_leaving()
                    || routed.shut.is_some()
                    || (is_late && self.lanes.own.is_open());
                (is_own && may_be_shut).then(|| reason(&trouble.code, trouble.text))
            }
            // At a start, an operator is asked before anything goes on without it.
            Class::Fenced { actual } if !lane.is_awaited() && !actual.is_empty() => {
                let text = refusal(lane.client.place(), &actual, &self.pipeline_id);
                Some(reason(outcomes::of_condition(Condition::OtherToken).code, text))
            }
            Class::Stream { code, text } if !lane.is_awaited() => Some(reason(code, text)),
            Class::Fatal { code, text } if may_be_shut => Some(reason(code, text)),
            Class::Fatal { .. }
            | Class::Fenced { .. }
            | Class::Stream { .. }
            | Class::Oversize(_)
            | Class::Refused(_)
            | Class::SeqMismatch { .. } => None,
        }
    }

    /// Parks everything that is bound for a stream, and tries it again after a while. `gone`: S2 says that
    /// it has no such stream, so that nothing that was sent is anywhere.
    pub(super) fn shut(&mut self, id: LaneId, mut reason: Reason, gone: bool) {
        let now = self.clock.now();
        let crowd = self.lanes.crowd();
        let Some(lane) = self.lanes.get_mut(id) else { return };
        lane.failures += 1;
        // Many that are missing are not asked for more often together than a few.
        let delay = policy::SINK.delay(lane.failures, &mut self.rng) * crowd;
        lane.sink = Sink::Waiting { until: now + delay };
        lane.reconnecting = false;
        let is_veiled = lane.unread && !gone;
        if is_veiled {
            reason.text.push_str(
                ". What an earlier run has sent to it is not known before it can be read: whatever was \
                 committed before this start may be there, and is parked until then",
            );
        }
        let mut parcels: Vec<Parcel> =
            lane.refused.take().map(|(parcel, _)| parcel).into_iter().collect();
        // What was refused is first, and certainly not in it.
        let refused = parcels.len();
        let (mut taken, sent) = lane.outbox.take_out(|_| true, now);
        parcels.append(&mut taken);
        if let Some(routed) = &mut lane.routed {
            routed.since = now;
            routed.probed_at = now;
            if routed.shut.as_ref() != Some(&reason) {
                tracing::warn!(
                    stream = &*routed.name,
                    code = reason.code,
                    reason = reason.text,
                    "what is routed to this stream is parked; all others go on"
                );
            }
            routed.shut = Some(reason.clone());
            routed.gone = gone;
            let holds = &self.holds;
            routed.parked.retain(|id| holds.has_failed(*id));
        }
        if mutation::broken(Rule::DoubtWhatWasSent) {
            self.end_doubts(id, &HashMap::new());
        } else {
            self.doubt(id, &parcels[refused..refused + sent]);
        }
        match is_veiled {
            true => self.doubts.veiled.insert(id),
            false => self.doubts.veiled.remove(&id),
        };
        for parcel in parcels {
            if self.is_held(&parcel) {
                self.hold_back(parcel);
                continue;
            }
            let failure = route_failure(reason.text.clone());
            if is_letter(&parcel) {
                self.letter_waits(&parcel.item, id, &failure);
                continue;
            }
            let message = match parcel.item.origin {
                Origin::Source { .. } | Origin::Spilled { .. } => {
                    self.park(parcel.item, failure, MadeBy::Current)
                }
                Origin::Store { id } => {
                    self.off_the_way(&parcel.item);
                    self.failed_again(id, failure, MadeBy::Current);
                    id
                }
            };
            self.parked_for(id, message);
        }
        if !mutation::broken(Rule::HoldBehindShut) {
            self.hold_back_what_is_held(now);
        }
        self.check_established();
        self.decide();
    }

    /// Notes that a routed stream is in trouble, for its patience.
    pub(super) fn note_trouble(&mut self, id: LaneId) {
        let now = self.clock.now();
        if let Some(routed) = self.lanes.get_mut(id).and_then(|lane| lane.routed.as_mut()) {
            routed.since = now;
            routed.troubled_since.get_or_insert(now);
        }
    }

    /// The rows of the next transaction, whose checkpoint leaves these records to be found again.
    pub(super) fn stream_rows(&mut self, floors: &Floors) -> Vec<Write> {
        if self.lanes.is_single() {
            return Vec::new();
        }
        let now = self.clock.now();
        let doubted: HashSet<LaneId> = self.doubts.open.values().copied().collect();
        let covered = |id| {
            (floors.of(id).is_none() && !doubted.contains(&id))
                || mutation::broken(Rule::CloseCovered)
        };
        for id in self.lanes.to_close(now, covered) {
            let Some(lane) = self.lanes.get_mut(id) else { continue };
            lane.sink = Sink::Waiting { until: now };
            match &mut lane.routed {
                Some(routed) if routed.row == Row::Present => routed.row = Row::Leaving,
                _ => self.lanes.remove(id),
            }
        }
        let mut writes = Vec::new();
        for (id, lane) in self.lanes.all_mut() {
            let reached = lane.reached();
            let Some(routed) = &mut lane.routed else { continue };
            let row = match routed.row {
                Row::Absent => continue,
                Row::Leaving => None,
                Row::Present => {
                    let floor = floors.of(id).filter(|_| !mutation::broken(Rule::RowNumber));
                    let floor = [floor, lane.acknowledged].into_iter().flatten().min();
                    let row = floor.map(|floor| (floor, reached));
                    if row.is_none() || row == routed.saved {
                        continue;
                    }
                    row
                }
            };
            routed.saved = row;
            let is_kept = row.is_some() || !mutation::broken(Rule::RememberTheEnd);
            let reached = if is_kept { reached } else { 0 };
            let (name, seq) = (Arc::clone(&routed.name), row.map(|(seq, _)| seq));
            writes.push(Write::Stream { name, seq, reached });
        }
        writes
    }

    /// A stream's row has left the store.
    pub(super) fn on_row_left(&mut self, name: &str) {
        let Some(id) = self.lanes.id(name) else { return };
        let Some(lane) = self.lanes.get_mut(id) else { return };
        let is_busy = lane.is_busy();
        let Some(routed) = &mut lane.routed else { return };
        // What came for it meanwhile finds it as new.
        routed.row = Row::Absent;
        lane.reached = lane.reached.max(lane.acknowledged.take().unwrap_or_default());
        lane.unread = false;
        if !is_busy {
            self.lanes.remove(id);
        }
    }

    /// For the status: the routed streams, those in trouble first.
    pub(super) fn stream_views(&self) -> Vec<StreamView> {
        let mut views: Vec<StreamView> = self
            .lanes
            .routed()
            .filter_map(|(_, lane)| {
                let routed = lane.routed.as_ref()?;
                let reason = routed.shut.as_ref().or(lane.reason.as_ref());
                let state = match &lane.sink {
                    _ if routed.shut.is_some() => "shut",
                    Sink::Open(_) => "open",
                    Sink::Opening(_) => "opening",
                    Sink::Waiting { .. } if reason.is_some() => "waiting",
                    Sink::Waiting { .. } => "idle",
                };
                let (messages, bytes) = lane.outbox.size();
                Some(StreamView {
                    name: routed.name.to_string(),
                    state: state.to_owned(),
                    reason: reason.cloned(),
                    queued: messages as u64,
                    queued_bytes: bytes,
                    parked: routed.parked.len() as u64,
                    tail: lane.acknowledged,
                })
            })
            .collect();
        views.sort_by(|a, b| (a.reason.is_none(), &a.name).cmp(&(b.reason.is_none(), &b.name)));
        views.truncate(SHOWN_MAX);
        views
    }
}

/// The failure of a message whose stream cannot take it.
pub(super) fn route_failure(text: String) -> Failure {
    Failure {
        error: ErrorView {
            class: "route".to_owned(),
            status: None,
            text,
            body: None,
            transform: None,
        },
        bytes: None,
        columns: Vec::new(),
        trace: Vec::new(),
    }
}
