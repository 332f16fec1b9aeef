//! The line to S2: opening it, sending, and what its answers settle.

use super::{Driver, Error, Sink, SinkEvent};
use crate::change::Position;
use crate::message::Draft;
use crate::mutation::{self, Rule};
use crate::pipeline::control;
use crate::pipeline::control::{ErrorView, Reason};
use crate::pipeline::grants::Grants;
use crate::pipeline::holds::{Due, MessageId};
use crate::pipeline::item::Origin;
use crate::pipeline::link;
use crate::pipeline::link::{Established, Opening, establish};
use crate::pipeline::outbox::Parcel;
use crate::policy;
use crate::sink::Guarantee;
use crate::sink::error::{Class, Operation, Refusal};
use crate::store::{Failure, Tokens};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt as _;

impl Driver {
    pub(super) fn open_sink(&mut self, now: Instant) {
        let Sink::Waiting { until } = &self.sink else { return };
        if *until > now {
            return;
        }
        let (store, client) = (self.store.clone(), self.client.clone());
        let (pipeline_id, read_from) = (self.pipeline_id.clone(), self.acknowledged);
        let tokens = if mutation::broken(Rule::FreshToken) {
            let one = format!("sb-{pipeline_id}-1");
            Some(Tokens { next: one.clone(), known: vec![one] })
        } else {
            self.tokens.take()
        };
        let in_force = self.in_force.clone();
        let (nonce, grants) = (self.rng.random(), self.grants);
        let numbers = self.others.leave_numbers(now);
        let (least, promised) = (self.least(), self.promised);
        self.sink = Sink::Opening(Box::pin(async move {
            let tokens = match tokens {
                Some(tokens) => tokens,
                None => match store.draw_token(nonce, in_force).await {
                    Ok(tokens) => tokens,
                    Err(error) => return (None, Err(error.into())),
                },
            };
            let again = tokens.clone();
            let opening = Opening {
                client,
                store,
                pipeline_id,
                read_from,
                tokens,
                grants,
                least,
                promised,
                numbers,
            };
            (Some(again), establish(opening).await)
        }));
    }

    pub(super) fn send(&mut self, now: Instant) -> Result<(), Error> {
        let Sink::Open(line) = &mut self.sink else { return Ok(()) };
        if self.begins_elsewhere {
            return Ok(());
        }
        if self.reconnecting {
            if !self.outbox.is_in_flight() {
                self.reconnecting = false;
                self.sink = Sink::Waiting { until: now };
            }
            return Ok(());
        }
        while let Some(records) = self.outbox.next_batch(now) {
            self.measures.sent_records += records.len() as u64;
            self.measures.sent_bytes += records
                .iter()
                .map(crate::pipeline::size_gate::SizedRecord::metered_bytes)
                .sum::<u64>();
            line.send(&records)
                .map_err(|error| Error::Sink(crate::error_chain::error_chain(&error)))?;
        }
        Ok(())
    }

    pub(super) fn on_sink(&mut self, event: SinkEvent) -> Result<(), Error> {
        match event {
            SinkEvent::Opened(_, Ok(established)) => {
                self.on_established(*established);
            }
            SinkEvent::Opened(tokens, Err(error)) => {
                self.tokens = tokens;
                match error {
                    link::Error::Sink(error) => self.on_sink_error(&error)?,
                    link::Error::Store(error) if error.heals() => {
                        self.sink_waits(
                            "store_failed",
                            crate::error_chain::error_chain(&error),
                            None,
                        );
                    }
                    link::Error::Store(error) => return Err(error.into()),
                    link::Error::Owned { text } => return Err(Error::Sink(text)),
                }
            }
            SinkEvent::Ack(Ok(ack)) => {
                self.sink_failures = 0;
                self.acknowledged = Some(ack.end);
                self.reconnecting |= ack.reconnect_advised;
                for (parcel, seq) in self.outbox.acknowledged(ack.start) {
                    self.on_delivered(&parcel, seq);
                }
            }
            SinkEvent::Ack(Err(error)) => self.on_sink_error(&error)?,
        }
        Ok(())
    }

    pub(super) fn on_delivered(&mut self, parcel: &Parcel, seq: u64) {
        self.note_first_of_chain(parcel);
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
                self.settle(origin, parcel.item.change.bytes(), Some(seq));
            }
            Origin::Store { id } => {
                self.off_the_way(&parcel.item);
                self.forget(id);
                self.delivered = true;
            }
        }
    }

    pub(super) fn on_established(&mut self, established: Established) {
        let Established { line, landed, known_to, lost } = established;
        let now = self.clock.now();
        // Everything in front of the fence was read: what of it is ours is settled below, with its
        // numbers.
        self.acknowledged = Some(known_to);
        self.in_force = line.fencing_token().map(str::to_owned).or(self.in_force.take());
        self.grants = Grants::default();
        if let Some(choice) = lost {
            self.on_lost_records(choice, &landed);
        }
        let place = self.client.place();
        if !self.established || self.sink_reason.is_some() {
            tracing::info!(
                basin = place.basin,
                stream = place.stream,
                endpoint = place.endpoint,
                guarantee = line.guarantee.sentence(),
                "S2 is connected"
            );
        }
        if self.promised.is_some_and(|promised| line.guarantee < promised) {
            tracing::warn!(
                guarantee = line.guarantee.word(),
                "less is promised than before, as the settings allow"
            );
        }
        self.guarantee = Some(line.guarantee);
        self.promised = Some(line.guarantee);
        self.counters.sink_sessions += 1;
        self.sink_reason = None;
        self.sink = Sink::Open(Box::new(line));
        if self.established {
            let found =
                self.outbox.resume(|parcel| landed.get(&parcel.item.change.position).copied(), now);
            for (parcel, seq) in found {
                self.on_delivered(&parcel, seq);
            }
        } else {
            self.established = true;
            self.apply_landed(&landed);
        }
        self.landed_before_spilling(&landed);
        self.after_refusal(now);
        self.decide();
    }

    /// At start: what the stream holds is not sent again, and messages that are in it leave the store.
    pub(super) fn apply_landed(&mut self, landed: &HashMap<Position, u64>) {
        let through = self.delivered_position();
        let beyond = landed.iter().filter(|(position, _)| **position > through);
        self.replayed.extend(beyond.map(|(position, seq)| (*position, Some(*seq))));
        self.forget_landed(landed);
    }

    /// Stored messages that are in the stream leave the store.
    pub(super) fn forget_landed(&mut self, landed: &HashMap<Position, u64>) {
        let mut delivered: Vec<MessageId> = self
            .holds
            .positions()
            .filter(|(position, _)| landed.contains_key(position))
            .map(|(_, id)| id)
            .collect();
        delivered.sort_unstable();
        for id in delivered {
            self.forget(id);
            self.delivered = true;
        }
    }

    /// A refused message is parked once it is certain what landed, and takes what is behind it along.
    pub(super) fn after_refusal(&mut self, now: Instant) {
        let Some((parcel, failure)) = self.refused.take() else { return };
        match parcel.item.origin {
            Origin::Source { .. } | Origin::Spilled { .. } => self.park(parcel.item, failure),
            Origin::Store { id } => {
                self.off_the_way(&parcel.item);
                self.failed_again(id, failure);
            }
        }
        // One behind the other: what is held back holds what follows it, which may be in other groups
        // than what was refused.
        let (mut stay, mut late) = (VecDeque::new(), Vec::new());
        for parcel in self.outbox.take_queue() {
            let change = &parcel.item.change;
            let held = match parcel.item.origin {
                Origin::Source { .. } | Origin::Spilled { .. } => {
                    self.holds.holds(change.position, &self.holds.groups_of(change))
                }
                Origin::Store { id } => self.holds.is_held(id),
            };
            if !held {
                stay.push_back(parcel);
            } else if mutation::broken(Rule::HoldInTurn) {
                late.push(parcel);
            } else {
                self.hold_back(parcel);
            }
        }
        late.into_iter().for_each(|parcel| self.hold_back(parcel));
        self.outbox.replace_queue(stay, now);
    }

    /// What was ready to be sent waits in the store.
    fn hold_back(&mut self, parcel: Parcel) {
        match parcel.item.origin {
            Origin::Source { .. } | Origin::Spilled { .. } => self.store_waiting(parcel.item),
            Origin::Store { id } => {
                self.off_the_way(&parcel.item);
                self.holds.back(id, false, Due::Now);
            }
        }
    }

    pub(super) fn on_sink_error(&mut self, error: &crate::sink::error::Error) -> Result<(), Error> {
        match error.class() {
            Class::Sink(trouble) => {
                let mut text = trouble.text;
                if let Some(kept) = self.kept_promise(error) {
                    text.push_str(&kept);
                }
                self.sink_waits(&trouble.code, text, trouble.retry_after);
            }
            Class::SeqMismatch { next } => {
                tracing::info!(next, "somebody else appends to the stream too; reading its end");
                self.others.missed(self.clock.now());
                self.sink = Sink::Waiting { until: self.clock.now() };
            }
            Class::Oversize(refusal) => self.on_refused("oversize", &refusal),
            Class::Refused(refusal) => self.on_refused("refused", &refusal),
            // Ours is no longer the stream's, and no other took its place.
            Class::Fenced { actual } if actual.is_empty() => {
                tracing::warn!("the stream has lost its fencing token; looking at it anew");
                self.sink = Sink::Waiting { until: self.clock.now() };
            }
            Class::Fenced { .. } => {
                return Err(Error::Sink(crate::error_chain::error_chain(error)));
            }
            Class::Stream { text, .. } | Class::Fatal { text } => return Err(Error::Sink(text)),
        }
        Ok(())
    }

    /// No less may be promised than this.
    fn least(&self) -> Guarantee {
        self.settings.guarantee.or(self.promised).unwrap_or(Guarantee::AtLeastOnce)
    }

    /// What to add to a 403 that would do for a lesser promise.
    fn kept_promise(&self, error: &crate::sink::error::Error) -> Option<String> {
        let least = self.least();
        let needed = |operation| error.is_forbidden_to(operation);
        let is_for_less = if needed(Operation::Fence) {
            least == Guarantee::ExactlyOnce
        } else {
            least.has_numbers() && (needed(Operation::Tail) || needed(Operation::Read))
        };
        let less =
            if needed(Operation::Fence) { Guarantee::NumbersOnly } else { Guarantee::AtLeastOnce };
        is_for_less.then(|| {
            format!(
                ". `{}` is promised of this stream and not given up by itself; to go on with less, set \
                 sink.guarantee = \"{}\"",
                least.word(),
                less.word()
            )
        })
    }

    pub(super) fn on_refused(&mut self, class: &str, refusal: &Refusal) {
        self.sink = Sink::Waiting { until: self.clock.now() };
        let Some(parcel) = self.outbox.refused() else {
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
        self.refused = Some((parcel, failure));
    }

    pub(super) fn sink_waits(&mut self, code: &str, text: String, at_least: Option<Duration>) {
        self.sink_failures += 1;
        let delay =
            policy::SINK.delay(self.sink_failures, &mut self.rng).max(at_least.unwrap_or_default());
        let reason = Reason { part: "sink".to_owned(), code: code.to_owned(), text };
        if self.sink_reason.as_ref() != Some(&reason) {
            tracing::warn!(code, reason = reason.text, "S2 does not take records; waiting");
        }
        self.sink_reason = Some(reason);
        self.sink = Sink::Waiting { until: self.clock.now() + delay };
        self.decide();
    }
}
