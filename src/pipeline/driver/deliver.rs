//! The lines to S2: opening them, sending, and what their answers settle.

use super::dead::is_letter;
use super::keep::MadeBy;
use super::lane::{Forbidden, Lane, Sink, SinkEvent, Tools};
use super::{Driver, Error};
use crate::change::Position;
use crate::message::Draft;
use crate::mutation::{self, Rule};
use crate::pipeline::control;
use crate::pipeline::control::{ErrorView, Reason};
use crate::pipeline::grants::Grants;
use crate::pipeline::holds::{Due, MessageId};
use crate::pipeline::item::Origin;
use crate::pipeline::link;
use crate::pipeline::link::Established;
use crate::pipeline::outbox::{Acknowledged, Found, Parcel};
use crate::pipeline::place::{Landed, LaneId};
use crate::policy;
use crate::policy::outcomes::{self, Condition};
use crate::sink::Guarantee;
use crate::sink::error::{Class, Operation, Refusal};
use crate::store::{Failure, Tokens};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt as _;

impl Driver {
    /// Begins to open every stream whose time has come.
    pub(super) fn open_sinks(&mut self, now: Instant) {
        let own = self.lanes.own.is_due(now).then_some(LaneId::OWN);
        for id in own.into_iter().chain(self.lanes.next_to_open(now)) {
            let pipeline_id = self.pipeline_id.as_str();
            let drawn = mutation::broken(Rule::FreshToken).then(|| {
                let one = format!("sb-{pipeline_id}-1");
                Tokens { next: one.clone(), known: vec![one], reached: 0 }
            });
            let (nonce, guarantee) = (self.rng.random(), self.settings.guarantee);
            let tools = Tools { store: &self.store, pipeline_id, nonce, guarantee };
            if let Some(lane) = self.lanes.get_mut(id) {
                lane.open(&tools, drawn, now);
            }
        }
    }

    pub(super) fn send(&mut self, now: Instant) -> Result<(), Error> {
        if self.begins_elsewhere {
            return Ok(());
        }
        self.lanes.lift();
        for (_, lane) in self.lanes.all_mut() {
            lane.send(&mut self.measures, now)
                .map_err(|error| Error::Sink(crate::error_chain::error_chain(&error)))?;
        }
        Ok(())
    }

    pub(super) fn on_sink(&mut self, id: LaneId, event: SinkEvent) -> Result<(), Error> {
        match event {
            SinkEvent::Opened(_, Ok(established)) => {
                self.on_established(id, *established);
            }
            SinkEvent::Opened(tokens, Err(error)) => {
                if let Some(lane) = self.lanes.get_mut(id) {
                    lane.tokens = tokens;
                }
                match error {
                    link::Error::Sink(error) => self.on_sink_error(id, &error)?,
                    link::Error::Store(error) if error.heals() => {
                        let text = crate::error_chain::error_chain(&error);
                        self.sink_waits(id, "store_failed", text, None);
                    }
                    link::Error::Store(error) => return Err(error.into()),
                    link::Error::Owned { text } => match self.lanes.get(id) {
                        Some(lane) if lane.routed.is_some() && !lane.is_awaited() => {
                            let row = outcomes::of_condition(Condition::OtherToken);
                            let (part, code) = ("sink".to_owned(), row.code.to_owned());
                            self.shut(id, Reason { part, code, text }, false);
                        }
                        _ => return Err(Error::Sink(text)),
                    },
                }
            }
            SinkEvent::Ack(Ok(ack)) => {
                let Some(lane) = self.lanes.get_mut(id) else { return Ok(()) };
                lane.failures = 0;
                lane.acknowledged = Some(ack.end);
                lane.reconnecting |= ack.reconnect_advised;
                lane.works();
                let Acknowledged { parcels, portion } = lane.outbox.acknowledged(ack.start);
                for (parcel, seq) in parcels {
                    self.on_delivered(&parcel, Landed { lane: id, seq });
                }
                if let Some(portion) = portion {
                    self.on_portion(&portion);
                }
            }
            SinkEvent::Ack(Err(error)) => self.on_sink_error(id, &error)?,
        }
        Ok(())
    }

    pub(super) fn on_delivered(&mut self, parcel: &Parcel, landed: Landed) {
        self.note_first_of_chain(parcel);
        self.doubts.end(parcel.item.change.position);
        let committed_us = parcel.item.change.commit_timestamp_us;
        self.measures.latency.observe(committed_us, self.clock.time_of_day());
        self.counters.records += parcel.records.len() as u64;
        self.counters.record_bytes += parcel
            .records
            .iter()
            .map(crate::pipeline::size_gate::SizedRecord::metered_bytes)
            .sum::<u64>();
        match parcel.item.origin {
            origin @ (Origin::Source { .. } | Origin::Spilled { .. }) => {
                self.settle(origin, parcel.item.change.bytes(), Some(landed));
            }
            Origin::Store { id } if is_letter(parcel) => {
                self.off_the_way(&parcel.item);
                self.handed_on(id);
            }
            Origin::Store { id } => {
                self.off_the_way(&parcel.item);
                self.delivered_from_store(id, parcel.item.change.position, landed);
            }
        }
    }

    /// A stored message is in a stream. Another stream may be behind, and the checkpoint with it: a
    /// restart would then read the change from the source again, and has to find its record.
    pub(super) fn delivered_from_store(&mut self, id: MessageId, at: Position, landed: Landed) {
        self.forget(id);
        self.delivered = true;
        if !mutation::broken(Rule::FindWhatWasStored) {
            self.note_ahead(at, landed);
        }
    }

    pub(super) fn on_established(&mut self, id: LaneId, established: Established) {
        let Established { line, landed, begun, letters, known_to, lost } = established;
        let now = self.clock.now();
        self.on_letters_found(&letters);
        if let Some(lost) = lost {
            self.on_lost_records(id, lost, &landed);
        }
        let Some(lane) = self.lanes.get_mut(id) else { return };
        // Everything in front of the fence was read: what of it is ours is settled below, with its
        // numbers.
        (lane.acknowledged, lane.reached) = (Some(known_to), known_to);
        lane.grants = Grants::default();
        lane.forbidden = Forbidden::default();
        let place = lane.client.place();
        if lane.guarantee.is_none() || lane.reason.is_some() {
            tracing::info!(
                basin = place.basin,
                stream = place.stream,
                endpoint = place.endpoint,
                guarantee = line.guarantee.sentence(),
                "S2 is connected"
            );
        }
        if lane.promised.is_some_and(|promised| line.guarantee < promised) {
            tracing::warn!(
                stream = lane.routed.as_ref().map(|routed| &*routed.name),
                guarantee = line.guarantee.word(),
                "less is promised than before, as the settings allow"
            );
        }
        lane.guarantee = Some(line.guarantee);
        lane.promised = Some(line.guarantee);
        lane.reason = None;
        lane.sink = Sink::Open(Box::new(line));
        let first = std::mem::take(&mut lane.unread);
        self.counters.sink_sessions += 1;
        if first {
            self.apply_landed(id, landed.iter().map(|(position, seq)| (*position, *seq)));
        } else {
            let of = |parcel: &Parcel| {
                let position = &parcel.item.change.position;
                let whole = landed.get(position).map(|seq| Found::Whole(*seq));
                whole.or_else(|| begun.get(position).map(|part| Found::Below(*part)))
            };
            let in_doubt = |parcel: &Parcel| self.doubts.is_open(parcel.item.change.position);
            for (parcel, seq) in lane.outbox.resume(of, in_doubt, now) {
                self.doubts.end(parcel.item.change.position);
                self.on_delivered(&parcel, Landed { lane: id, seq });
            }
            // Changes that were sent before they were spilled may be there, and so may stored messages
            // that went back.
            if self.spill.is_on() && !mutation::broken(Rule::FindWhatWasSpilled) {
                self.apply_landed(id, landed.iter().map(|(position, seq)| (*position, *seq)));
            }
        }
        self.on_begun(id, &begun);
        self.end_doubts(id, &landed);
        self.after_refusal(id, now);
        self.on_routed_open(id);
        self.check_established();
        self.decide();
    }

    /// Once every stream in which something unknown may be has been read or is shut, sending begins.
    pub(super) fn check_established(&mut self) {
        let is_left = |lane: &Lane| {
            lane.is_awaited() && (lane.routed.is_none() || !mutation::broken(Rule::ReadEveryStream))
        };
        self.established |= !self.lanes.all().any(|(_, lane)| is_left(lane));
    }

    /// A stream was read, and holds what this process may not have heard of: that is not sent again,
    /// wherever it is by now, and messages that are in it leave the store.
    pub(super) fn apply_landed(
        &mut self,
        lane: LaneId,
        landed: impl Iterator<Item = (Position, u64)>,
    ) {
        let mut landed: Vec<(Position, u64)> = landed.collect();
        if landed.is_empty() {
            return;
        }
        landed.sort_unstable();
        let stored: HashMap<Position, MessageId> = self.holds.positions().collect();
        let (read, open) = (self.spill.read_through(&self.tracker), self.open_positions());
        for (position, seq) in landed {
            let landed = Landed { lane, seq };
            let is_to_come = position > read;
            match stored.get(&position) {
                Some(id) if self.holds.is_idle(*id) => {
                    self.delivered_from_store(*id, position, landed);
                }
                // It is on its way through the transforms.
                Some(_) => self.doubts.find(position, landed),
                None if !is_to_come && open.contains(&position) => {
                    self.doubts.find(position, landed);
                }
                // A transform has dropped it since. Before the checkpoint passes it, it may be read again.
                None if !is_to_come => self.note_ahead(position, landed),
                None => {}
            }
            if is_to_come {
                self.replayed.insert(position);
                self.note_ahead(position, landed);
            }
        }
    }

    /// A change has landed. As long as the checkpoint is before it, a restart has to find its record.
    fn note_ahead(&mut self, at: Position, landed: Landed) {
        if at > self.delivered_position() {
            self.ahead.insert(at, landed);
        }
    }

    /// What was read from the source, or from the spill, and comes back from the transforms. What is being
    /// written to the store does not, and may have left it again.
    fn open_positions(&self) -> HashSet<Position> {
        let written = self.writing.iter().map(|writing| &writing.effects).chain([&self.effects]);
        let stored: HashSet<Position> = written
            .flat_map(|effects| &effects.settled)
            .filter_map(|(origin, _)| match *origin {
                Origin::Source { entry } => self.tracker.position(entry),
                Origin::Spilled { entry } => self.spill.position(entry),
                Origin::Store { .. } => None,
            })
            .collect();
        let open = self.tracker.open().chain(self.spill.open());
        open.filter(|position| !stored.contains(position)).collect()
    }

    /// A refused message is parked once it is certain what landed, and takes what is behind it along.
    fn after_refusal(&mut self, id: LaneId, now: Instant) {
        let refused = self.lanes.get_mut(id).and_then(|lane| lane.refused.take());
        let Some((parcel, failure)) = refused else { return };
        match parcel.item.origin {
            Origin::Store { .. } if is_letter(&parcel) => {
                self.letter_waits(&parcel.item, id, &failure);
            }
            Origin::Source { .. } | Origin::Spilled { .. } => {
                _ = self.park(parcel.item, failure, MadeBy::Current)
            }
            Origin::Store { id } => {
                self.off_the_way(&parcel.item);
                self.failed_again(id, failure, MadeBy::Current);
            }
        }
        self.hold_back_what_is_held(now);
    }

    /// What is ready and stands behind a message that is in the store by now waits there, too.
    pub(super) fn hold_back_what_is_held(&mut self, now: Instant) {
        // One behind the other: what is held back holds what follows it, which may be in other groups
        // than what was refused, and in other streams.
        let mut queued: Vec<(LaneId, Parcel)> = Vec::new();
        for (id, lane) in self.lanes.all_mut() {
            queued.extend(lane.outbox.take_queue().into_iter().map(|parcel| (id, parcel)));
        }
        queued.sort_by_key(|(_, parcel)| parcel.number);
        let (mut stay, mut late) = (HashMap::<LaneId, VecDeque<Parcel>>::new(), Vec::new());
        for (id, parcel) in queued {
            if !self.is_held(&parcel) {
                stay.entry(id).or_default().push_back(parcel);
            } else if mutation::broken(Rule::HoldInTurn) {
                late.push(parcel);
            } else {
                self.hold_back(parcel);
            }
        }
        late.into_iter().for_each(|parcel| self.hold_back(parcel));
        for (id, lane) in self.lanes.all_mut() {
            lane.outbox.replace_queue(stay.remove(&id).unwrap_or_default(), now);
        }
    }

    /// Whether something of its groups is in the store that goes first.
    pub(super) fn is_held(&self, parcel: &Parcel) -> bool {
        let change = &parcel.item.change;
        match parcel.item.origin {
            Origin::Source { .. } | Origin::Spilled { .. } => {
                self.holds.holds(change.position, &self.holds.groups_of(change))
            }
            Origin::Store { id } => self.holds.is_held(id),
        }
    }

    /// What was ready to be sent waits in the store.
    pub(super) fn hold_back(&mut self, parcel: Parcel) {
        match parcel.item.origin {
            Origin::Source { .. } | Origin::Spilled { .. } => self.store_waiting(parcel.item),
            Origin::Store { id } => {
                self.off_the_way(&parcel.item);
                self.holds.back(id, false, Due::Now);
            }
        }
    }

    pub(super) fn on_sink_error(
        &mut self,
        id: LaneId,
        error: &crate::sink::error::Error,
    ) -> Result<(), Error> {
        if error.is_forbidden()
            && let Some(lane) = self.lanes.get_mut(id)
        {
            lane.forbidden.note(self.clock.now());
        }
        if id != LaneId::OWN {
            self.note_trouble(id);
            if let Some(reason) = self.shuts(id, error) {
                self.shut(id, reason, error.is_stream_missing());
                return Ok(());
            }
        }
        match error.class() {
            Class::Sink(trouble) => {
                let mut text = trouble.text;
                if let Some(kept) = self.kept_promise(id, error) {
                    text.push_str(&kept);
                }
                self.sink_waits(id, &trouble.code, text, trouble.retry_after);
            }
            Class::SeqMismatch { next } => {
                tracing::info!(next, "somebody else appends to the stream too; reading its end");
                let now = self.clock.now();
                if let Some(lane) = self.lanes.get_mut(id) {
                    lane.others.missed(now);
                    lane.sink = Sink::Waiting { until: now };
                }
            }
            Class::Oversize(refusal) => self.on_refused(id, "oversize", &refusal),
            Class::Refused(refusal) => self.on_refused(id, "refused", &refusal),
            // Ours is no longer the stream's, and no other took its place.
            Class::Fenced { actual } if actual.is_empty() => {
                tracing::warn!("the stream has lost its fencing token; looking at it anew");
                if let Some(lane) = self.lanes.get_mut(id) {
                    lane.sink = Sink::Waiting { until: self.clock.now() };
                }
            }
            Class::Fenced { .. } => {
                return Err(Error::Sink(crate::error_chain::error_chain(error)));
            }
            Class::Stream { text, .. } | Class::Fatal { text, .. } => {
                return Err(Error::Sink(text));
            }
        }
        Ok(())
    }

    /// What to add to a 403 that would do for a lesser promise.
    fn kept_promise(&self, id: LaneId, error: &crate::sink::error::Error) -> Option<String> {
        let lane = self.lanes.get(id)?;
        let least = lane.least(self.settings.guarantee, self.clock.now());
        let needed = |operation| error.is_forbidden_to(operation);
        let is_for_less = if needed(Operation::Fence) {
            least == Guarantee::ExactlyOnce
        } else {
            least.has_numbers() && (needed(Operation::Tail) || needed(Operation::Read))
        };
        let less =
            if needed(Operation::Fence) { Guarantee::NumbersOnly } else { Guarantee::AtLeastOnce };
        if is_for_less && lane.promised.or(self.settings.guarantee).is_none() {
            return Some(
                ". If it stays so for some seconds, less than exactly once is promised".to_owned(),
            );
        }
        is_for_less.then(|| {
            format!(
                ". `{}` is promised of this stream and not given up by itself; to go on with less, set \
                 sink.guarantee = \"{}\"",
                least.word(),
                less.word()
            )
        })
    }

    pub(super) fn on_refused(&mut self, id: LaneId, class: &str, refusal: &Refusal) {
        let now = self.clock.now();
        let Some(lane) = self.lanes.get_mut(id) else { return };
        lane.sink = Sink::Waiting { until: now };
        let Some(parcel) = lane.outbox.refused() else {
            tracing::warn!(
                status = refusal.status,
                "S2 refused a batch; sending its records one by one"
            );
            return;
        };
        let bytes =
            parcel.records.iter().map(crate::pipeline::size_gate::SizedRecord::metered_bytes).sum();
        let draft = Draft::new(parcel.item.change.clone(), Arc::clone(&self.envelope));
        let columns = draft
            .largest_columns(5)
            .into_iter()
            .map(|(name, bytes)| control::ColumnBytes { name, bytes })
            .collect();
        let failure = Failure {
            error: ErrorView {
                class: class.to_owned(),
                status: Some(refusal.status),
                text: format!(
                    "S2 refused a record of {} of {bytes} bytes with status {}",
                    parcel.item.change.table.qualified_name(),
                    refusal.status
                ),
                body: Some(refusal.body.clone()),
                transform: None,
            },
            bytes: Some(bytes),
            columns,
            trace: Vec::new(),
        };
        lane.refused = Some((parcel, failure));
    }

    fn sink_waits(&mut self, id: LaneId, code: &str, text: String, at_least: Option<Duration>) {
        let now = self.clock.now();
        let Some(lane) = self.lanes.get_mut(id) else { return };
        lane.failures += 1;
        let delay =
            policy::SINK.delay(lane.failures, &mut self.rng).max(at_least.unwrap_or_default());
        let reason = Reason { part: "sink".to_owned(), code: code.to_owned(), text };
        if lane.reason.as_ref() != Some(&reason) {
            tracing::warn!(code, reason = reason.text, "S2 does not take records; waiting");
        }
        lane.reason = Some(reason);
        lane.sink = Sink::Waiting { until: now + delay };
        self.decide();
    }
}
