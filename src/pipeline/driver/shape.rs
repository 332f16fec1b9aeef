//! Changes go to the workers and come back in order, where holds are decided.

use super::dead::is_letter;
use super::keep::MadeBy;
use super::routed::route_failure;
use super::{Driver, Error, envelope};
use crate::change::{Change, Position};
use crate::message::{Envelope, header};
use crate::mutation::{self, Rule};
use crate::pipeline::control::Reason;
use crate::pipeline::holds::Due;
use crate::pipeline::item::{Item, Origin, Shaped};
use crate::pipeline::outbox::Parcel;
use crate::pipeline::place::{Landed, LaneId};
use crate::pipeline::size_gate::SizedRecord;
use crate::pipeline::workers::{Done, Job};
use crate::sink::session::BatchMeter;
use crate::source;
use crate::store::{Failure, Write};
use crate::transform::Chain;
use std::sync::Arc;

impl Driver {
    pub(super) fn on_batch(&mut self, batch: source::Batch) -> Result<(), Error> {
        if self.spill.is_on() {
            self.spill_batch(batch);
            return Ok(());
        }
        let mut passed = Position::default();
        let mut items: Vec<Item> = Vec::with_capacity(batch.items.len());
        for item in batch.items {
            match item {
                source::Item::Change(change) => {
                    self.counters.changes += 1;
                    let entry = self.tracker.read(change.position);
                    passed = passed.max(change.position);
                    let replayed = self.replayed.remove(&change.position)
                        && !mutation::broken(Rule::SkipReplayed);
                    if replayed || self.skips(change.position) {
                        self.tracker.settle(entry, None);
                        self.budget.release(change.bytes());
                    } else {
                        items.push(Item { change, origin: Origin::Source { entry } });
                    }
                }
                source::Item::Commit { end_lsn: lsn } | source::Item::Idle { wal_end: lsn } => {
                    passed = passed.max(Position::last_before(lsn));
                    self.tracker.mark(lsn);
                    if !self.replayed.is_empty() {
                        self.replayed.retain(|position| *position > passed);
                    }
                }
            }
        }
        self.sampler.look(self.clock.now(), items.len(), |at| &items[at].change);
        self.dispatch(items)?;
        self.pass(passed);
        Ok(())
    }

    pub(super) fn on_source_status(&mut self, status: &source::SourceStatus) -> Result<(), Error> {
        if let Some(identity) = &status.identity
            && self.source_identity.as_ref() != Some(&identity.system_identifier)
        {
            let system_identifier = identity.system_identifier.clone();
            self.source_identity = Some(system_identifier.clone());
            self.writes.push(Write::SourceIdentity { system_identifier });
        }
        if let Some(publication) = &status.publication
            && self.publication.as_ref() != Some(publication)
        {
            self.publication = Some(publication.clone());
            self.writes.push(Write::Publication(publication.clone()));
        }
        if status.made_slot && !self.slot_is_ours {
            self.slot_is_ours = true;
            let slot = self.settings.pipeline_name.clone();
            self.writes.push(Write::SlotMade { slot });
        }
        self.source_reason = match &status.state {
            source::State::Streaming | source::State::Stopped => None,
            source::State::Connecting => {
                Some(("source_connecting".to_owned(), "connecting to Postgres".to_owned()))
            }
            source::State::Waiting { code, text, .. } => Some(((*code).to_string(), text.clone())),
            source::State::Fatal { text, .. } => return Err(Error::Source(text.clone())),
        }
        .map(|(code, text)| Reason { part: "source".to_owned(), code, text });
        Ok(())
    }

    /// Writes a chain's number down, so that no later chain gets it, whatever happens. The chain before
    /// goes on until that is on disk.
    pub(super) fn announce_chain(&mut self, chain: Arc<Chain>) {
        self.writes
            .push(Write::Chain { generation: chain.generation, digest: chain.digest().to_owned() });
        self.effects.chain = Some(chain);
    }

    /// The chain's number is on disk: stored messages are tried with it.
    pub(super) fn on_chain_stored(&mut self, chain: Arc<Chain>) {
        let files = chain.files().collect::<Vec<_>>().join(", ");
        tracing::info!(chain = chain.tag(), files, "the chain is live");
        self.first_of = chain.seen_at().map(|seen| (chain.tag(), seen));
        self.chain_stored = true;
        self.adopt_chain(chain);
        self.reprieve_all();
        self.holds.request_all();
        self.end_halt();
    }

    /// Uses the chain for everything that is dispatched from now on.
    pub(super) fn adopt_chain(&mut self, chain: Arc<Chain>) {
        self.envelope =
            Arc::new(Envelope::new(envelope(&self.settings, &self.pipeline_id, &chain.tag())));
        if !Arc::ptr_eq(&self.chain, &chain) {
            self.chain.leave();
        }
        self.chain = chain;
    }

    /// Says how long a change of the folder took to reach the stream.
    pub(super) fn note_first_of_chain(&mut self, parcel: &Parcel) {
        let Some((tag, seen)) = &self.first_of else { return };
        let is_of_chain = parcel.records.iter().any(|record| {
            let headers = &record.record().headers;
            headers.iter().any(|header| {
                header.name == header::CHAIN.as_bytes() && header.value == tag.as_bytes()
            })
        });
        if is_of_chain {
            tracing::info!(
                chain = tag,
                "S2 has the first record of the chain, {} ms after its files were seen",
                seen.elapsed().as_millis()
            );
            self.first_of = None;
        }
    }

    pub(super) fn dispatch(&mut self, items: Vec<Item>) -> Result<(), Error> {
        if items.is_empty() {
            return Ok(());
        }
        let job = Job {
            number: self.next_job,
            chain: Arc::clone(&self.chain),
            envelope: Arc::clone(&self.envelope),
            items,
        };
        self.next_job += 1;
        self.jobs.push_back(None);
        if self.workers.submit(job) { Ok(()) } else { Err(Error::Workers) }
    }

    /// Stored messages behind this position may go, once what was read up to here has left the workers:
    /// a message whose records are stored, or a dead letter, is not shaped, and would overtake it.
    pub(super) fn pass(&mut self, position: Position) {
        if self.jobs.is_empty() || mutation::broken(Rule::PassInTurn) {
            self.holds.pass(position);
            return;
        }
        match self.passing.back_mut() {
            Some((number, passed)) if *number == self.next_job => *passed = position.max(*passed),
            Some(_) | None => self.passing.push_back((self.next_job, position)),
        }
    }

    /// What was read before these jobs were given out has left the workers.
    fn pass_in_turn(&mut self) {
        let first = self.next_job - self.jobs.len() as u64;
        while let Some((number, position)) = self.passing.front().copied()
            && number <= first
        {
            self.passing.pop_front();
            self.holds.pass(position);
        }
    }

    pub(super) fn on_done(&mut self, done: Done) {
        let first = self.next_job - self.jobs.len() as u64;
        let index = if mutation::broken(Rule::InOrder) {
            self.jobs.iter().position(Option::is_none).unwrap_or_default()
        } else {
            usize::try_from(done.number - first).unwrap_or(usize::MAX)
        };
        if let Some(slot) = self.jobs.get_mut(index) {
            *slot = Some(done);
        }
        while self.halted.is_none()
            && let Some(Some(_)) = self.jobs.front()
        {
            let Some(Some(done)) = self.jobs.pop_front() else { break };
            let is_older = done.generation < self.chain.generation;
            let by = if is_older { MadeBy::Older } else { MadeBy::Current };
            let mut untried = done.untried;
            let mut results = done.results.into_iter();
            while let Some((item, shaped)) = results.next() {
                if let Some((item, failure)) = self.on_shaped(item, shaped, by) {
                    let behind = results.by_ref().map(|(item, _)| item);
                    let items = std::iter::once(item).chain(behind).chain(untried.drain(..));
                    self.halt(items.collect(), Some(&failure));
                    if is_older {
                        self.end_halt();
                    }
                }
            }
            if !untried.is_empty() {
                self.halt(untried, None);
            }
        }
        self.pass_in_turn();
    }

    /// Order is restored here, so holds are decided here. Gives the item back where the pipeline is to
    /// stand still in front of it.
    pub(super) fn on_shaped(
        &mut self,
        item: Item,
        shaped: Shaped,
        by: MadeBy,
    ) -> Option<(Item, Box<Failure>)> {
        let held = match item.origin {
            Origin::Source { .. } | Origin::Spilled { .. } => {
                let position = item.change.position;
                !self.holds.is_empty()
                    && self.holds.holds(position, &self.holds.groups_of(&item.change))
            }
            Origin::Store { id } => self.holds.is_held(id),
        };
        if let Some(landed) = self.found_landed(&item) {
            self.on_found(&item, landed);
            return None;
        }
        let in_doubt = match shaped {
            Shaped::Failed(_) => None,
            // Nothing else would keep what follows it behind what is perhaps under way.
            Shaped::Dropped => self.doubtful(&item),
            Shaped::Records(_) | Shaped::Halt(_) => self.veiled(item.change.position),
        };
        if !held && let Some((lane, failure)) = in_doubt {
            // What it is made of now does not matter: it may be delivered.
            self.waits_for(item, lane, failure);
            return None;
        }
        match item.origin {
            origin @ (Origin::Source { .. } | Origin::Spilled { .. }) => match shaped {
                _ if held => self.store_waiting(item),
                Shaped::Records(records) => self.forward(item, records),
                Shaped::Dropped => {
                    self.counters.dropped += 1;
                    self.settle(origin, item.change.bytes(), None);
                }
                Shaped::Failed(failure) => _ = self.park(item, *failure, by),
                Shaped::Halt(failure) => return Some((item, failure)),
            },
            Origin::Store { id } => match shaped {
                // What was in front of it came back.
                _ if held => {
                    self.off_the_way(&item);
                    self.holds.back(id, false, Due::Now);
                }
                Shaped::Records(records) => self.forward(item, records),
                Shaped::Dropped => {
                    self.counters.dropped += 1;
                    tracing::info!(
                        id,
                        "a transform dropped it when it was tried again: it is not delivered"
                    );
                    self.off_the_way(&item);
                    self.forget(id);
                }
                Shaped::Failed(failure) => {
                    self.off_the_way(&item);
                    self.failed_again(id, *failure, by);
                }
                Shaped::Halt(failure) => return Some((item, failure)),
            },
        }
        None
    }

    /// Hands a change's records to the stream that they are for, or has them stored first where they
    /// take more than one batch.
    fn forward(&mut self, item: Item, records: Vec<SizedRecord>) {
        if BatchMeter::holds(&records) {
            self.forward_parcel(Parcel::new(item, records));
        } else {
            self.store_parts(item, records);
        }
    }

    /// Hands a parcel to the stream that it is for, or parks it where that cannot be.
    pub(super) fn forward_parcel(&mut self, parcel: Parcel) {
        let item = &parcel.item;
        let (lane, obstacle) = match self.lane_of(&parcel.records) {
            Ok(lane) => (lane, self.obstacle(lane, item)),
            Err(error) => {
                let text = crate::error_chain::error_chain(&error);
                (LaneId::OWN, Some((LaneId::OWN, route_failure(text))))
            }
        };
        if obstacle.is_none() && self.skips_in(lane, item) {
            self.skip(parcel.item);
            return;
        }
        let is_letter = is_letter(&parcel);
        match (obstacle, item.origin) {
            (Some((lane, failure)), Origin::Store { .. }) if is_letter => {
                self.probe(lane);
                self.letter_waits(item, lane, &failure);
                return;
            }
            (Some((lane, failure)), _) => {
                self.waits_for(parcel.item, lane, failure);
                return;
            }
            (None, Origin::Store { id }) => {
                self.holds.sent(id);
                if mutation::broken(Rule::RemoveWithCheckpoint) {
                    self.writes.push(Write::Remove { id });
                }
            }
            (None, Origin::Source { .. } | Origin::Spilled { .. }) => {}
        }
        let Self { lanes, holds, clock, .. } = self;
        let groups = |change: &Change| holds.groups_of(change);
        lanes.push(lane, parcel, groups, clock.now());
    }

    /// A change is in a stream already, as was found out while it was shaped again.
    pub(super) fn on_found(&mut self, item: &Item, landed: Landed) {
        match item.origin {
            origin @ (Origin::Source { .. } | Origin::Spilled { .. }) => {
                self.settle(origin, item.change.bytes(), Some(landed));
            }
            Origin::Store { id } => {
                self.off_the_way(item);
                self.delivered_from_store(id, item.change.position, landed);
            }
        }
    }
}
