//! What goes into the store and comes out of it: parked and waiting messages, and the checkpoint.

use super::{
    CHECKPOINT_INTERVAL, Driver, Effects, Error, IDLE_CHECKPOINT_INTERVAL, Reading, Writing,
};
use crate::mutation::{self, Rule};
use crate::pipeline::ack::Progress;
use crate::pipeline::control::Reason;
use crate::pipeline::holds::{Due, MessageId};
use crate::pipeline::item::{Item, Origin};
use crate::pipeline::place::{Floors, Landed, LaneId};
use crate::policy;
use crate::policy::Retry;
use crate::store;
use crate::store::{Attempts, Checkpoint, Failure, StoredState, Write};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Whose failure one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MadeBy {
    /// The chain that is live, or S2.
    Current,
    /// A chain that was live when the message was given to it, and no longer is.
    Older,
}

impl Driver {
    pub(super) fn park(&mut self, item: Item, failure: Failure, by: MadeBy) -> MessageId {
        let id = self.next_id;
        let attempts = counted(Attempts::default(), &failure, by);
        let (state, next_attempt, due) = self.next_attempt(id, &failure, attempts, by);
        log_failure(id, &item, &failure);
        self.insert(item, state, attempts, next_attempt, Some(failure), due);
        id
    }

    pub(super) fn store_waiting(&mut self, item: Item) {
        self.insert(item, StoredState::Waiting, Attempts::default(), None, None, Due::Now);
    }

    pub(super) fn insert(
        &mut self,
        item: Item,
        state: StoredState,
        attempts: Attempts,
        next_attempt: Option<SystemTime>,
        failure: Option<Failure>,
        due: Due,
    ) {
        let id = self.next_id;
        self.next_id += 1;
        let Item { change, origin } = item;
        let groups = self.holds.groups_of(&change);
        self.holds.insert(id, change.position, groups, failure.is_some(), due);
        self.attempts.insert(id, attempts);
        if let Some(failure) = &failure {
            self.count_failure(id, failure);
        }
        if mutation::broken(Rule::StoreWithCheckpoint) {
            self.settle(origin, change.bytes(), None);
        } else {
            self.effects.settled.push((origin, change.bytes()));
        }
        self.writes.push(Write::Insert {
            id,
            change: Box::new(change),
            groups,
            state,
            attempts,
            next_attempt,
            failure,
        });
    }

    pub(super) fn failed_again(&mut self, id: MessageId, failure: Failure, by: MadeBy) {
        self.shape_anew(id);
        let attempts = self.attempts.get(&id).copied().unwrap_or_default();
        let attempts = counted(attempts, &failure, by);
        let (state, next_attempt, due) = self.next_attempt(id, &failure, attempts, by);
        self.attempts.insert(id, attempts);
        self.count_failure(id, &failure);
        self.holds.back(id, true, due);
        self.writes.push(Write::Failed { id, state, attempts, next_attempt, failure });
    }

    pub(super) fn next_attempt(
        &mut self,
        id: MessageId,
        failure: &Failure,
        attempts: Attempts,
        by: MadeBy,
    ) -> (StoredState, Option<SystemTime>, Due) {
        // The chain that has gone live meanwhile has tried all that was stored then, and not this.
        if by == MadeBy::Older {
            return (StoredState::Retrying, Some(self.clock.time_of_day()), Due::Now);
        }
        let (max, backoff) = (self.dead.attempts_max(), self.settings.retry);
        match policy::retry(failure, attempts, max, backoff, &mut self.rng) {
            Retry::OnRequest => (StoredState::Parked, None, Due::OnRequest),
            Retry::Spent => {
                self.dead.spend(id);
                (StoredState::Retrying, Some(self.clock.time_of_day()), Due::OnRequest)
            }
            Retry::After(delay) => {
                let at = self.clock.time_of_day() + delay;
                (StoredState::Retrying, Some(at), Due::At(self.clock.now() + delay))
            }
        }
    }

    /// A change that came from the source is through. `landed` is where its first record is.
    pub(super) fn settle(&mut self, origin: Origin, bytes: usize, landed: Option<Landed>) {
        match origin {
            Origin::Source { entry } => {
                self.tracker.settle(entry, landed);
                if !mutation::broken(Rule::GiveBack) {
                    self.budget.release(bytes);
                }
            }
            Origin::Spilled { entry } => {
                self.spill.settle(entry, bytes, landed);
                self.delivered = true;
            }
            Origin::Store { .. } => {}
        }
    }

    fn count_failure(&mut self, id: MessageId, failure: &Failure) {
        let class = failure.error.class.as_str();
        self.classes.failed(&mut self.measures, id, class);
        match self.measures.failures.get_mut(class) {
            Some(count) => *count += 1,
            None => drop(self.measures.failures.insert(class.into(), 1)),
        }
    }

    /// A message has left the store for good.
    pub(super) fn forget(&mut self, id: MessageId) {
        let position = self.holds.position(id);
        if self.dead.leaves(id, position) {
            self.log_dead_letter(id, position);
            self.writes.push(Write::DeadLetter { id });
        } else {
            self.writes.push(Write::Remove { id });
        }
        self.classes.gone(&mut self.measures, id);
        self.holds.remove(id);
        self.parked_for_none(id);
        self.attempts.remove(&id);
        self.parts.forget(id);
    }

    /// Whether there is room for stored messages among what is on its way.
    pub(super) fn can_read(&self) -> bool {
        self.established
            && self.chain_stored
            && self.halted.is_none()
            && self.draining.is_none()
            && !self.spill.is_gathering()
            && self.reading.is_none()
            && self.retry_bytes < self.settings.portions.retry_bytes_max
            && self.jobs.len() < self.workers.jobs_max()
    }

    /// Reads the next messages that are due, a bounded number of bytes at a time.
    pub(super) fn read_due(&mut self, now: Instant) {
        if !self.can_read() {
            return;
        }
        let mut ids = Vec::new();
        let portions = self.settings.portions;
        while ids.len() < portions.retry_messages {
            let Some(id) = self.holds.next_due(now, self.stored) else { break };
            ids.push(id);
        }
        if !ids.is_empty() {
            let store = self.store.clone();
            let wanted = ids.clone();
            let done = Box::pin(async move { store.read(wanted, portions.retry_bytes_max).await });
            self.reading = Some(Reading { ids, done });
        }
    }

    pub(super) fn on_read(
        &mut self,
        result: Result<Vec<store::Message>, store::Error>,
    ) -> Result<(), Error> {
        let Some(Reading { ids, .. }) = self.reading.take() else { return Ok(()) };
        let mut read = match result {
            Ok(read) => read,
            Err(error) if error.heals() => {
                let at = self.clock.now() + self.unreadable(&error);
                for id in ids {
                    self.holds.back(id, false, Due::At(at));
                }
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        self.readable();
        // What did not fit comes with the next read.
        let got: HashSet<MessageId> = read.iter().map(|message| message.id).collect();
        for id in ids.into_iter().filter(|id| !got.contains(id)) {
            self.holds.back(id, false, Due::Now);
        }
        read.sort_by_key(|message| message.change.position);
        let mut items = Vec::with_capacity(read.len());
        for message in read {
            self.retry_bytes += message.change.bytes();
            self.measures.retries += 1;
            if self.dead.is_spent(message.id) {
                self.on_spent_read(message)?;
                continue;
            }
            let store::Message { id, change, parts, .. } = message;
            let item = Item { change, origin: Origin::Store { id } };
            match parts {
                Some(parts) => self.forward_parts(item, parts)?,
                None => items.push(item),
            }
        }
        self.dispatch(items)
    }

    /// The store cannot be read for now. Says so, once, and after how long to try again.
    pub(super) fn unreadable(&mut self, error: &store::Error) -> Duration {
        self.read_failures += 1;
        let reason = Reason {
            part: "store".to_owned(),
            code: "store_unreadable".to_owned(),
            text: format!(
                "{}; it is tried again, and nothing of it is lost: look at the disk of state.dir",
                crate::error_chain::error_chain(error)
            ),
        };
        if self.unreadable_reason.as_ref() != Some(&reason) {
            tracing::error!(error = reason.text, "the store cannot be read; waiting");
        }
        self.unreadable_reason = Some(reason);
        policy::STORE.delay(self.read_failures, &mut self.rng)
    }

    pub(super) fn readable(&mut self) {
        self.read_failures = 0;
        if self.unreadable_reason.take().is_some() {
            tracing::info!("the store can be read again");
        }
    }

    /// A stored message is no longer on its way, whatever became of it.
    pub(super) fn off_the_way(&mut self, item: &Item) {
        self.retry_bytes = self.retry_bytes.saturating_sub(item.change.bytes());
    }

    pub(super) fn has_unsaved(&self) -> bool {
        !self.writes.is_empty() || self.delivered || self.tracker.progress() != self.saved
    }

    pub(super) fn checkpoint_interval(&self) -> Duration {
        let urgent = self.draining.is_some()
            || self.begins_elsewhere
            || !self.writes.iter().all(|write| {
                matches!(
                    write,
                    Write::Remove { .. } | Write::DeadLetter { .. } | Write::PartsSent { .. }
                )
            });
        let moved = self.delivered
            || !self.writes.is_empty()
            || self.tracker.progress().position != self.saved.position;
        match (urgent, moved) {
            (true, _) => Duration::ZERO,
            (false, true) => CHECKPOINT_INTERVAL,
            (false, false) => IDLE_CHECKPOINT_INTERVAL,
        }
    }

    /// Starts the next transaction, if there is one to make and its time has come.
    pub(super) fn write(&mut self, now: Instant) {
        if self.writing.is_some() || !self.has_unsaved() {
            return;
        }
        let due = self.saved_at + self.checkpoint_interval();
        if due > now {
            return;
        }
        let progress = self.tracker.progress();
        if self.settings.unguarded && self.writes.is_empty() {
            (self.saved, self.saved_at) = (progress, now);
            (self.delivered, self.begins_elsewhere) = (false, false);
            self.confirm(progress);
            return;
        }
        let mut writes = std::mem::take(&mut self.writes);
        let mut effects = std::mem::take(&mut self.effects);
        if mutation::broken(Rule::StoreWithCheckpoint) {
            let is_insert = |write: &mut Write| matches!(write, Write::Insert { .. });
            self.writes = writes.extract_if(.., is_insert).collect();
        }
        self.delivered = false;
        effects.beginning = self.begins_elsewhere;
        // Before its stream is opened for the first time, nothing but spilled changes is settled.
        let acknowledged = self.lanes.own.acknowledged;
        if acknowledged.is_some() || self.spill.is_on() {
            let mut floors = Floors::default();
            self.tracker.add_beyond(&mut floors);
            self.spill.add_beyond(&mut floors);
            self.doubts.add_found(&mut floors);
            // Without the chunks that it passes, the checkpoint may reach further.
            let unspill = self.unspill();
            let position = self.delivered_position();
            while let Some(first) = self.ahead.first_entry()
                && *first.key() <= position
            {
                first.remove();
            }
            self.ahead.values().for_each(|landed| floors.add(*landed));
            let seq = acknowledged.map(|acknowledged| match floors.of(LaneId::OWN) {
                Some(seq) if !mutation::broken(Rule::CheckpointNumber) => seq.min(acknowledged),
                _ => acknowledged,
            });
            let (reached, confirm) = (self.lanes.own.reached(), progress.lsn);
            writes.push(Write::Checkpoint(Checkpoint { position, seq, reached, confirm }));
            writes.extend(self.stream_rows(&floors));
            writes.extend(unspill);
            effects.confirm = Some(progress);
        }
        self.start_writing(writes.into(), effects);
    }

    pub(super) fn start_writing(&mut self, writes: Arc<[Write]>, effects: Effects) {
        let store = self.store.clone();
        let under_way = Arc::clone(&writes);
        let done = Box::pin(async move { store.write(under_way).await });
        self.writing = Some(Writing { done, writes, effects });
    }

    /// A spent message becomes a letter once the store knows that it is spent.
    fn on_failure_stored(&mut self, id: MessageId) {
        // What was written may be an earlier failure.
        let is_of_it = |write: &Write| {
            matches!(write, Write::Failed { id: other, .. } | Write::Insert { id: other, .. }
                if *other == id)
        };
        if self.dead.is_unsaid(id) && !self.writes.iter().any(is_of_it) {
            self.dead.is_said(id);
            self.holds.request(id);
        }
    }

    /// Postgres may forget what is settled up to here.
    pub(super) fn confirm(&self, progress: Progress) {
        self.source.confirm.send_if_modified(|confirm| {
            let rises = progress.lsn > *confirm;
            if rises {
                *confirm = progress.lsn;
            }
            rises
        });
    }

    pub(super) fn on_written(&mut self, result: Result<(), store::Error>) -> Result<(), Error> {
        let Some(Writing { writes, effects, .. }) = self.writing.take() else { return Ok(()) };
        self.saved_at = self.clock.now();
        if let Err(error) = result
            && !mutation::broken(Rule::WriteAgain)
        {
            if !error.heals() {
                return Err(error.into());
            }
            self.store_failures += 1;
            let delay = policy::STORE.delay(self.store_failures, &mut self.rng);
            let reason = Reason {
                part: "store".to_owned(),
                code: "store_failed".to_owned(),
                text: crate::error_chain::error_chain(&error),
            };
            if self.store_reason.as_ref() != Some(&reason) {
                tracing::error!(error = reason.text, "the store cannot be written; waiting");
            }
            self.store_reason = Some(reason);
            // The same transaction again, before anything newer.
            let store = self.store.clone();
            let again = Arc::clone(&writes);
            let done = Box::pin(async move {
                tokio::time::sleep(delay).await;
                store.write(again).await
            });
            self.writing = Some(Writing { done, writes, effects });
            return Ok(());
        }
        if self.store_reason.take().is_some() {
            tracing::info!("the store can be written again");
        }
        self.store_failures = 0;
        // With nothing left to read, no read will tell.
        if self.holds.is_empty() && self.reading.is_none() && !self.spill.is_on() {
            self.readable();
        }
        for write in &*writes {
            match write {
                Write::Insert { id, .. } => {
                    self.stored = self.stored.max(*id);
                    self.on_failure_stored(*id);
                }
                Write::Parts { id, .. } => self.on_parts_stored(*id),
                Write::DeadLetter { .. } => self.dead.count(),
                Write::Spill { id, changes } => self.spilled(*id, changes),
                Write::Stream { name, seq: None, .. } => self.on_row_left(name),
                Write::Failed { id, .. } => self.on_failure_stored(*id),
                Write::Remove { .. }
                | Write::PartsSent { .. }
                | Write::LetterFile(_)
                | Write::Acknowledge { .. }
                | Write::Checkpoint(_)
                | Write::Begin { .. }
                | Write::Stream { .. }
                | Write::Unspill { .. }
                | Write::Chain { .. }
                | Write::Promise(_)
                | Write::InForce { .. }
                | Write::SourceIdentity { .. }
                | Write::Publication(_)
                | Write::SlotMade { .. } => {}
            }
        }
        for (origin, bytes) in effects.settled {
            self.settle(origin, bytes, None);
        }
        if let Some(progress) = effects.confirm {
            self.saved = progress;
            self.confirm(progress);
        }
        if effects.beginning {
            self.begins_elsewhere = false;
        }
        if let Some(chain) = effects.chain {
            self.on_chain_stored(chain);
        }
        for (answer, changed) in effects.answers {
            // Whoever asked may have left.
            drop(answer.send(Ok(changed)));
        }
        Ok(())
    }
}

/// One more attempt. What failed with a chain that is gone is tried with the live one before it counts.
fn counted(attempts: Attempts, failure: &Failure, by: MadeBy) -> Attempts {
    let own = by == MadeBy::Current && policy::is_own(failure);
    Attempts { all: attempts.all + 1, own: attempts.own + u64::from(own) }
}

fn log_failure(id: MessageId, item: &Item, failure: &Failure) {
    let (reason, has_words) = crate::transform::without_words(&failure.error.text);
    let more = if has_words {
        format!("; what the transform said of it: sluicebox messages show {id}")
    } else {
        String::new()
    };
    tracing::warn!(
        id,
        position = %item.change.position,
        class = failure.error.class,
        reason,
        "parked; only its group waits{more}"
    );
}
