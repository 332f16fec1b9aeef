//! While S2 is away, or takes less than is written, changes move on to disk, so that Postgres may forget
//! them.
//!
//! ```text
//! Off ── S2 away or slow, too much WAL kept ▶ Gathering ── workers are done ──▶ On
//!  ▲                  what is in memory goes to disk first, in its order ──────▲│
//!  └──────────── S2 is back, and all of it has been read again ◀────────────────┘
//! ```
//!
//! Two marks: *durable* is what the tracker of the source says, and may be confirmed; *delivered* is
//! how far what was spilled has got to S2, and is the checkpoint's position. The argument:
//!
//! - When spilling begins, everything unsettled that is in memory is spilled, in order and before
//!   anything newer. So all that was read is on disk or settled, without a gap: after a restart the
//!   source leaves out everything up to the last spilled change.
//! - What had been sent without an answer is spilled too. The stream is read before anything is sent
//!   again, at a restart as after a broken session, and what is in it is left out when it comes out
//!   of the spill.
//! - What is stored behind the first spilled change waits until that has come out again, even where it
//!   could be delivered now: it may be of the same group.
//! - While something is spilled, whatever comes from the source goes behind it. So order holds as if
//!   it had come from the source later; parking and holding happen behind, where they always do.
//! - A chunk leaves the disk in the transaction whose checkpoint has passed its last change.
//!
//! Where S2 is away before it was ever reached, spilling begins just so, with nothing in memory: what is
//! read goes to disk, and the checkpoint says how far, without a number to read the stream from, because
//! nothing of this store can be in it. Whether the stream, and with it the slot, is another store's is
//! not known then. What that store has not confirmed it will want to read again, so only a slot that was
//! made for this store is read before S2 has answered, or any where an operator gave the other store up
//! (`--abandon-parked`).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::lane::Sink;
use super::{Driver, Error, Pending};
use crate::change::{Change, Lsn, Position};
use crate::config::SpillAfter;
use crate::mutation::{self, Rule};
use crate::pipeline::ack::{AckTracker, EntryId, Progress};
use crate::pipeline::control::Reason;
use crate::pipeline::holds::Due;
use crate::pipeline::item::{Item, Origin};
use crate::pipeline::outbox::Parcel;
use crate::pipeline::place::{Floors, Landed, LaneId};
use crate::source;
use crate::store::{self, Checkpoint, Chunk, Write};

/// Bounds of what the store may take.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub spill_after: SpillAfter,
    /// What may be spilled, in bytes as [`Change::bytes`] counts them. 0: nothing is.
    pub spill_bytes_max: u64,
    /// What the store's file may hold before nothing new is read.
    pub store_bytes_max: u64,
}

/// S2 is away only after so long: a new session takes a moment.
const AWAY_MIN: Duration = Duration::from_secs(2);

/// From this share of a bound on, it is said.
const NEAR: f64 = 0.8;

/// A chunk's changes, with its id.
type Read = Result<Option<(u64, Vec<Change>)>, store::Error>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Off,
    Gathering,
    On,
}

/// What is spilled, and how far it has got.
pub(super) struct Spill {
    mode: Mode,
    away_since: Option<Instant>,
    /// Not yet passed by a checkpoint, oldest first.
    chunks: VecDeque<Chunk>,
    next_id: u64,
    /// Chunks up to this one are on disk, and have been read again.
    durable: u64,
    read: u64,
    /// The last change that was read again.
    read_through: Position,
    /// Everything up to here was read from the source, by this run while it spills or by an earlier one.
    source_through: Position,
    delivered: AckTracker,
    /// The lowest numbers of records that were acknowledged out of turn when spilling began.
    floors: Floors,
    /// All that is spilled, and what of it has not been read again, in bytes.
    changes: u64,
    bytes: u64,
    left_bytes: u64,
    /// In memory: not yet on disk, and read again.
    pending_bytes: u64,
    drain_bytes: usize,
    reading: Option<Pending<Read>>,
    read_again_at: Option<Instant>,
    reason: Option<Reason>,
    is_near: bool,
    unowned_is_said: bool,
}

impl Spill {
    /// Goes on with what an earlier run has left, which had read everything up to `source_through`.
    pub(super) fn new(
        chunks: Vec<Chunk>,
        checkpoint: Checkpoint,
        source_through: Position,
    ) -> Self {
        let last = chunks.last().map_or(0, |chunk| chunk.id);
        let first = chunks.first().map_or(last + 1, |chunk| chunk.id);
        let bytes = chunks.iter().map(|chunk| chunk.bytes).sum();
        if let Some(chunk) = chunks.last() {
            tracing::info!(bytes, through = %chunk.last, "spilled changes wait on disk for S2");
        }
        Self {
            mode: if chunks.is_empty() { Mode::Off } else { Mode::On },
            away_since: None,
            floors: Floors::default(),
            changes: chunks.iter().map(|chunk| chunk.changes).sum(),
            bytes,
            left_bytes: bytes,
            chunks: chunks.into(),
            next_id: last + 1,
            durable: last,
            read: first - 1,
            read_through: checkpoint.position,
            source_through,
            delivered: AckTracker::new(Progress { position: checkpoint.position, lsn: Lsn(0) }),
            pending_bytes: 0,
            drain_bytes: 0,
            reading: None,
            read_again_at: None,
            reason: None,
            is_near: false,
            unowned_is_said: false,
        }
    }

    /// Nothing new is begun, so that what is in memory can be spilled.
    pub(super) fn is_gathering(&self) -> bool {
        self.mode == Mode::Gathering
    }

    /// What comes from the source has to go behind what is spilled.
    pub(super) fn is_on(&self) -> bool {
        self.mode == Mode::On
    }

    /// How many changes are spilled and not yet delivered, by chunks, and their bytes.
    pub(super) fn size(&self) -> (u64, u64) {
        (self.changes, self.bytes)
    }

    /// It is being read again, or will be.
    pub(super) fn is_read(&self) -> bool {
        self.reading.is_some() || self.read_again_at.is_some()
    }

    pub(super) fn reason(&self) -> Option<&Reason> {
        self.reason.as_ref()
    }

    /// The last change that will not come any more: what is read again while something is spilled, else
    /// what the source has read.
    pub(super) fn read_through(&self, source: &AckTracker) -> Position {
        if self.mode == Mode::On { self.read_through } else { source.read_through() }
    }

    /// What came out of it and is not settled.
    pub(super) fn open(&self) -> impl Iterator<Item = Position> {
        self.delivered.open()
    }

    pub(super) fn position(&self, entry: EntryId) -> Option<Position> {
        self.delivered.position(entry)
    }

    pub(super) fn add_beyond(&self, floors: &mut Floors) {
        self.delivered.add_beyond(floors);
        floors.merge(&self.floors);
    }

    pub(super) fn settle(&mut self, entry: EntryId, bytes: usize, landed: Option<Landed>) {
        self.delivered.settle(entry, landed);
        self.drain_bytes = self.drain_bytes.saturating_sub(bytes);
    }

    /// # Panics
    ///
    /// Where what it counts does not follow from its chunks.
    #[cfg(test)]
    pub(super) fn assert_consistent(&self) {
        let bytes = |which: &dyn Fn(&Chunk) -> bool| -> u64 {
            self.chunks.iter().filter(|chunk| which(chunk)).map(|chunk| chunk.bytes).sum()
        };
        let changes: u64 = self.chunks.iter().map(|chunk| chunk.changes).sum();
        assert_eq!((self.changes, self.bytes), (changes, bytes(&|_| true)), "what is spilled");
        assert_eq!(self.left_bytes, bytes(&|chunk| chunk.id > self.read), "what is not read again");
        let pending = bytes(&|chunk| chunk.id > self.durable);
        assert_eq!(self.pending_bytes, pending, "what is not on disk");
        if self.delivered.open().next().is_none() {
            assert_eq!(self.drain_bytes, 0, "with nothing of it on its way");
        }
    }
}

pub(super) async fn spill_read(spill: &mut Spill) -> Read {
    match &mut spill.reading {
        Some(reading) => reading.await,
        None => std::future::pending().await,
    }
}

impl Driver {
    /// Whether there is room for more from the source.
    pub(super) fn takes(&self) -> bool {
        if self.draining.is_some() {
            return false;
        }
        let full = self.spill.reason.is_some();
        match self.spill.mode {
            Mode::Off => {
                // Messages of an earlier run wait until the source has read past them, and while they
                // do, nothing makes room. What lies in between, that run had in memory.
                (!full || self.holds.wait_for_source())
                    && self.established
                    && self.chain_stored
                    && self.jobs.len() < self.workers.jobs_max()
            }
            Mode::Gathering => false,
            Mode::On if full => false,
            Mode::On => {
                let portions = self.settings.portions;
                let closing = self.drains() && self.spill.left_bytes < portions.closing_bytes;
                self.spill.pending_bytes < portions.pending_bytes_max && !closing
            }
        }
    }

    pub(super) fn drains(&self) -> bool {
        self.established
            && self.chain_stored
            && self.lanes.own.is_open()
            && !self.lanes.own.reconnecting
    }

    /// How far everything is in S2, in the store as a message, dropped or given up.
    pub(super) fn delivered_position(&self) -> Position {
        let read = self.tracker.progress().position;
        if self.spill.chunks.is_empty() || mutation::broken(Rule::CheckpointBehindSpill) {
            return read;
        }
        read.min(self.spill.delivered.progress().position)
    }

    /// The next step of spilling and of reading again, if it is time for one. The tick that publishes
    /// the status makes sure that time is looked at.
    pub(super) fn spill_step(&mut self, now: Instant) {
        let is_away = !self.lanes.own.is_open();
        let since = match (is_away, self.spill.away_since) {
            (true, Some(since)) => since,
            (true, None) | (false, _) => now,
        };
        self.spill.away_since = is_away.then_some(since);
        self.check_bounds();
        match self.spill.mode {
            Mode::Off if is_away && self.is_time_to_spill(now, since) => {
                self.spill.mode = Mode::Gathering;
            }
            Mode::Off if self.is_slow(now) => self.spill.mode = Mode::Gathering,
            Mode::Gathering if !is_away && !self.is_slow(now) => self.spill.mode = Mode::Off,
            Mode::Gathering
                if self.jobs.is_empty() && self.reading.is_none() && self.dead.is_idle() =>
            {
                // What was sent is spilled too, and what of it has landed is found out by the next
                // session, as after any other.
                if !is_away {
                    self.lanes.own.sink = Sink::Waiting { until: now };
                }
                self.begin_to_spill(is_away);
            }
            // A checkpoint has passed all of it: nothing goes past what is spilled.
            Mode::On
                if !is_away
                    && self.writing.is_none()
                    && (self.spill.chunks.is_empty() || mutation::broken(Rule::BehindTheSpill)) =>
            {
                self.spill.mode = Mode::Off;
                tracing::info!("what was spilled has been read again; the source goes on directly");
            }
            Mode::Off | Mode::Gathering | Mode::On => {}
        }
        self.read_spill(now);
    }

    fn may_spill(&self) -> bool {
        self.has_the_slot()
            && self.settings.bounds.spill_bytes_max > 0
            && self.draining.is_none()
            && self.spill.reason.is_none()
    }

    fn is_time_to_spill(&self, now: Instant, since: Instant) -> bool {
        self.may_spill()
            && match self.settings.bounds.spill_after {
                SpillAfter::Bytes(bytes) => {
                    let away = now.saturating_duration_since(since);
                    self.lag_bytes() >= bytes && away >= AWAY_MIN
                }
                SpillAfter::Time(time) => now.saturating_duration_since(since) >= time,
            }
    }

    /// S2 is there and takes less than is written, for so long or with so much behind it that the
    /// database is better let go. What merely catches up stays where it is.
    fn is_slow(&self, now: Instant) -> bool {
        let Some(since) = self.database.pressure.slow_since() else { return false };
        self.may_spill()
            && match self.settings.bounds.spill_after {
                SpillAfter::Bytes(bytes) => self.lag_bytes() >= bytes,
                SpillAfter::Time(time) => now.saturating_duration_since(since) >= time,
            }
    }

    /// Spills everything unsettled that is in memory. Nobody shapes or reads anything at this moment.
    pub(super) fn begin_to_spill(&mut self, is_away: bool) {
        self.spill.source_through = self.spill.source_through.max(self.holds.passed());
        let mut items = self.take_from_memory();
        items.sort_by_key(|item| item.change.position);
        self.spill.mode = Mode::On;
        self.spill.floors = Floors::default();
        self.tracker.add_beyond(&mut self.spill.floors);
        let (text, bytes) =
            (self.lanes.own.reason.as_ref().map(|reason| &reason.text), self.lag_bytes());
        tracing::warn!(
            wal_bytes = bytes,
            reason = text,
            "{}: changes are spilled to disk, so that the database need not keep them",
            if is_away { "S2 is away" } else { "S2 takes less than is written" }
        );
        for item in items {
            let bytes = item.change.bytes();
            self.effects.settled.push((item.origin, bytes));
            self.spill_change(item.change, bytes);
        }
    }

    /// What came from the source and is not settled. Stored messages behind it that were on their way go
    /// back, and wait until it has come out of the spill.
    fn take_from_memory(&mut self) -> Vec<Item> {
        let from_source = |parcel: &Parcel| matches!(parcel.item.origin, Origin::Source { .. });
        let mut items = Vec::new();
        let mut in_doubt = Vec::new();
        let now = self.clock.now();
        for (id, lane) in self.lanes.all_mut() {
            if lane.refused.as_ref().is_some_and(|(parcel, _)| from_source(parcel))
                && let Some((parcel, _)) = lane.refused.take()
            {
                // It is refused again when it comes out.
                items.push(parcel.item);
            }
            // What is on its way there is answered to nobody any more.
            if lane.outbox.is_in_flight() {
                lane.sink = Sink::Waiting { until: now };
            }
            let (taken, sent) = lane.outbox.take_out(from_source, now);
            in_doubt.extend(taken[..sent].iter().map(|parcel| (parcel.item.change.position, id)));
            items.extend(taken.into_iter().map(|parcel| parcel.item));
        }
        if let Some(first) = items.iter().map(|item| item.change.position).min() {
            if !mutation::broken(Rule::WaitForTheSpill) {
                self.holds.read_again_from(first);
            }
            let is_behind = |parcel: &Parcel| parcel.item.change.position > first;
            let mut back = Vec::new();
            for (id, lane) in self.lanes.all_mut() {
                let (taken, sent) = lane.outbox.take_out(is_behind, now);
                in_doubt
                    .extend(taken[..sent].iter().map(|parcel| (parcel.item.change.position, id)));
                back.extend(taken);
            }
            for Parcel { item, .. } in back {
                if let Origin::Store { id } = item.origin {
                    self.off_the_way(&item);
                    self.holds.back(id, false, Due::Now);
                }
            }
        }
        // The pipeline's own stream is read before anything comes out again.
        in_doubt.retain(|(_, lane)| *lane != LaneId::OWN);
        self.doubt_all(in_doubt);
        items
    }

    /// How much WAL has been written since what Postgres may forget.
    pub(super) fn lag_bytes(&self) -> u64 {
        // One look: a second one inside of the first would wait for a writer that waits for it.
        let (wal_end, confirmed) = {
            let source = self.source.status.borrow();
            (source.wal_end, source.confirmed)
        };
        wal_end.0.saturating_sub(self.saved.lsn.max(confirmed).0)
    }

    /// What Postgres may forget: of a slot that was never confirmed, what it had forgotten before.
    pub(super) fn confirmed(&self) -> Lsn {
        self.saved.lsn.max(self.source.status.borrow().confirmed)
    }

    /// No other store can have a claim to what the slot still has.
    fn has_the_slot(&self) -> bool {
        self.lanes.own.acknowledged.is_some()
            || self.slot_is_ours
            || self.settings.grants.abandon_parked
    }

    /// Says it in the log, too, once.
    pub(super) fn say_unowned(&mut self) {
        if let Some(Reason { code, text, .. }) = self.unowned_reason()
            && !std::mem::replace(&mut self.spill.unowned_is_said, true)
        {
            tracing::warn!(code, "{text}");
        }
    }

    /// Why nothing is read before S2 was reached.
    pub(super) fn unowned_reason(&self) -> Option<Reason> {
        let away = self.spill.away_since?;
        let waits = self.clock.now().saturating_duration_since(away) >= AWAY_MIN;
        let is_connected = self.source.status.borrow().connections > 0;
        (waits && is_connected && !self.has_the_slot()).then(|| {
            let slot = &self.settings.pipeline_name;
            Reason {
                part: "source".to_owned(),
                code: "source_unowned".to_owned(),
                text: format!(
                    "slot `{slot}` was there before this state folder, so that its changes may be \
                     another Sluicebox's, and only the stream can tell: until S2 was reached once, \
                     nothing is read from it, and Postgres keeps its WAL. Mend what keeps S2 away; or, \
                     if nobody else has ever read from the slot or its state folder is lost, start once \
                     with `sluicebox run --abandon-parked`"
                ),
            }
        })
    }

    /// A batch of the source, behind everything that is spilled.
    pub(super) fn spill_batch(&mut self, batch: source::Batch) {
        for item in batch.items {
            match item {
                source::Item::Change(change) => {
                    self.counters.changes += 1;
                    self.spill.source_through = change.position;
                    let entry = self.tracker.read(change.position);
                    if self.skips(change.position) {
                        let origin = Origin::Source { entry };
                        match self.replayed.remove(&change.position) {
                            // It is a message, or has its mark.
                            true => self.settle(origin, change.bytes(), None),
                            // What is spilled before it keeps the checkpoint.
                            false => self.skip(Item { change, origin }),
                        }
                        continue;
                    }
                    let bytes = change.bytes();
                    self.effects.settled.push((Origin::Source { entry }, bytes));
                    self.spill_change(change, bytes);
                }
                source::Item::Commit { end_lsn: lsn } | source::Item::Idle { wal_end: lsn } => {
                    let through = &mut self.spill.source_through;
                    *through = Position::last_before(lsn).max(*through);
                    self.tracker.mark(lsn);
                }
            }
        }
        self.pass_spilled();
    }

    /// Once all that is spilled has been read again, messages wait only for what the source has yet to
    /// read.
    fn pass_spilled(&mut self) {
        if self.spill.read + 1 == self.spill.next_id {
            self.pass(self.spill.source_through);
        }
    }

    fn spill_change(&mut self, change: Change, bytes: usize) {
        let (position, bytes) = (change.position, bytes as u64);
        if self.spill.chunks.is_empty() {
            // Whatever is before it is settled or in the same transaction.
            let before = position.before();
            self.spill.delivered = AckTracker::new(Progress { position: before, lsn: Lsn(0) });
            self.spill.read_through = before;
        }
        self.spill.pending_bytes += bytes;
        self.spill.left_bytes += bytes;
        self.spill.bytes += bytes;
        self.spill.changes += 1;
        let portions = self.settings.portions;
        // The last write, which has not begun, may have room.
        if let (Some(Write::Spill { changes, .. }), Some(chunk)) =
            (self.writes.last_mut(), self.spill.chunks.back_mut())
            && changes.len() < portions.chunk_changes_max
            && chunk.bytes + bytes <= portions.chunk_bytes_max
        {
            changes.push(change);
            *chunk = Chunk {
                last: position,
                changes: chunk.changes + 1,
                bytes: chunk.bytes + bytes,
                ..*chunk
            };
            return;
        }
        let id = self.spill.next_id;
        self.spill.next_id += 1;
        let changes = vec![change];
        self.spill.chunks.push_back(Chunk::of(id, &changes));
        self.writes.push(Write::Spill { id, changes });
    }

    /// A chunk is on disk.
    pub(super) fn spilled(&mut self, id: u64, changes: &[Change]) {
        self.spill.durable = self.spill.durable.max(id);
        let bytes: u64 = changes.iter().map(|change| change.bytes() as u64).sum();
        self.spill.pending_bytes = self.spill.pending_bytes.saturating_sub(bytes);
    }

    /// Forgets the chunks that the checkpoint passes, which is about to be written.
    pub(super) fn unspill(&mut self) -> Option<Write> {
        let through = self.spill.delivered.progress().position;
        let mut passed = None;
        while let Some(chunk) = self.spill.chunks.front()
            && (chunk.last <= through || mutation::broken(Rule::KeepTheSpill))
            && chunk.id <= self.spill.read
        {
            passed = Some(chunk.id);
            self.spill.bytes -= chunk.bytes;
            self.spill.changes -= chunk.changes;
            self.spill.chunks.pop_front();
        }
        if self.spill.chunks.is_empty() {
            self.spill.floors = Floors::default();
        }
        passed.map(|through| Write::Unspill { through })
    }

    fn read_spill(&mut self, now: Instant) {
        let spill = &self.spill;
        let waits = spill.read_again_at.is_some_and(|at| at > now);
        if spill.reading.is_some()
            || waits
            || spill.read >= spill.durable
            || spill.drain_bytes >= self.settings.portions.drain_bytes_max
            || self.draining.is_some()
            || !self.drains()
            || self.jobs.len() >= self.workers.jobs_max()
        {
            return;
        }
        let (store, after) = (self.store.clone(), spill.read);
        self.spill.read_again_at = None;
        self.spill.reading = Some(Box::pin(async move { store.read_spill(after).await }));
    }

    pub(super) fn on_spill_read(&mut self, result: Read) -> Result<(), Error> {
        self.spill.reading = None;
        let (id, changes) = match result {
            Ok(Some(chunk)) => chunk,
            Ok(None) => {
                let text = "spilled changes are gone from it".to_owned();
                return Err(store::Error::Corrupt { text }.into());
            }
            Err(error) if error.heals() => {
                let delay = self.unreadable(&error);
                self.spill.read_again_at = Some(self.clock.now() + delay);
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        self.readable();
        self.spill.read = id;
        let bytes: u64 = changes.iter().map(|change| change.bytes() as u64).sum();
        self.spill.left_bytes = self.spill.left_bytes.saturating_sub(bytes);
        // Of the first chunk after a restart, the checkpoint may have passed a part.
        let settled = self.spill.delivered.progress().position;
        let job_changes = self.settings.portions.job_changes;
        let mut items = Vec::with_capacity(job_changes);
        for change in changes.into_iter().filter(|change| change.position > settled) {
            let position = change.position;
            self.spill.read_through = position;
            let entry = self.spill.delivered.read(position);
            if self.replayed.remove(&position) {
                self.spill.settle(entry, 0, None);
                self.delivered = true;
                continue;
            }
            self.spill.drain_bytes += change.bytes();
            items.push(Item { change, origin: Origin::Spilled { entry } });
            if items.len() == job_changes {
                self.dispatch(std::mem::take(&mut items))?;
            }
        }
        if !self.replayed.is_empty() {
            let through = self.spill.read_through;
            self.replayed.retain(|position| *position > through);
        }
        self.dispatch(items)?;
        self.pass(self.spill.read_through);
        self.pass_spilled();
        Ok(())
    }

    /// Says when a bound is near or reached.
    fn check_bounds(&mut self) {
        let bounds = self.settings.bounds;
        let (stored, spilled) = (self.store.bytes(), self.spill.size().1);
        let full = if stored >= bounds.store_bytes_max {
            Some(Reason {
                part: "store".to_owned(),
                code: "store_full".to_owned(),
                text: format!(
                    "the message store holds {stored} bytes, and state.bytes_max is {}: nothing new \
                     is read from Postgres, which keeps its WAL meanwhile, until messages have left \
                     it; mend or give up what is parked, or raise the bound{}",
                    bounds.store_bytes_max,
                    self.veil_sentence().map_or_else(String::new, |text| format!(". {text}")),
                ),
            })
        } else if self.spill.mode == Mode::On
            && spilled >= bounds.spill_bytes_max
            && !mutation::broken(Rule::SpillBound)
        {
            Some(Reason {
                part: "store".to_owned(),
                code: "spill_full".to_owned(),
                text: format!(
                    "{} bytes of changes wait on disk for S2, which is delivery.spill_max: nothing \
                     new is read from Postgres, which keeps its WAL meanwhile, until S2 is back; make \
                     sure that its disk has room",
                    bounds.spill_bytes_max
                ),
            })
        } else {
            None
        };
        let code = |reason: &Option<Reason>| reason.as_ref().map(|reason| reason.code.clone());
        if code(&full) != code(&self.spill.reason) {
            match &full {
                Some(reason) => tracing::error!(code = reason.code, "{}", reason.text),
                None => tracing::info!("there is room in the message store again"),
            }
        }
        // The text's numbers move: one line for each reason, not for each step.
        if code(&full) != code(&self.spill.reason) {
            self.spill.reason = full;
        }
        let near = |used: u64, max: u64| used as f64 >= max as f64 * NEAR;
        let is_near = near(stored, bounds.store_bytes_max)
            || (bounds.spill_bytes_max > 0 && near(spilled, bounds.spill_bytes_max));
        if is_near && !self.spill.is_near {
            tracing::warn!(
                store_bytes = stored,
                store_bytes_max = bounds.store_bytes_max,
                spilled_bytes = spilled,
                spill_bytes_max = bounds.spill_bytes_max,
                "the message store nears its bound; at it, nothing new is read from Postgres"
            );
        }
        self.spill.is_near = is_near;
    }

    /// One sentence while a bound is near.
    pub(super) fn store_warning(&self) -> Option<String> {
        self.spill.is_near.then(|| {
            format!(
                "the message store nears its bound: {} of {} bytes (state.bytes_max), {} of {} spilled \
                 (delivery.spill_max)",
                self.store.bytes(),
                self.settings.bounds.store_bytes_max,
                self.spill.size().1,
                self.settings.bounds.spill_bytes_max
            )
        })
    }
}
