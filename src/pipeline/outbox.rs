//! What is ready for S2 and what is on its way there, in order. Pure: it packs batches and remembers
//! them until they are acknowledged, and says after a broken session what has to go again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::crossing::Behind;
use super::item::{Item, Origin};
use super::place::LaneId;
use super::size_gate::SizedRecord;
use crate::mutation::{self, Rule};
use crate::sink::session::BatchMeter;

/// A change's records, which land together or not at all; or, where no batch holds them, one batch
/// behind the other, with nothing of ours in between.
#[derive(Debug)]
pub struct Parcel {
    pub item: Item,
    /// Those that are not acknowledged.
    pub records: Vec<SizedRecord>,
    /// Among the parcels of all streams; see [`crossing`](super::crossing).
    pub number: u64,
    /// What has to be through in other streams before it may go.
    pub behind: Vec<Behind>,
    /// In a batch of its own, since S2 refused one that it was in.
    alone: bool,
    portions: Option<Portions>,
}

/// How far a parcel is that takes more than one batch.
#[derive(Clone, Copy, Debug)]
struct Portions {
    /// The part that the first of its records is.
    first: u64,
    /// So many of its records are on their way.
    sent: usize,
}

impl Parcel {
    #[must_use]
    pub fn new(item: Item, records: Vec<SizedRecord>) -> Self {
        Self { item, records, number: 0, behind: Vec::new(), alone: false, portions: None }
    }

    /// Of records that the store has, from the part of this number on, so that they need not land
    /// together.
    #[must_use]
    pub fn in_portions(item: Item, records: Vec<SizedRecord>, first: u64) -> Self {
        Self { portions: Some(Portions { first, sent: 0 }), ..Self::new(item, records) }
    }

    /// Some of its records were sent, and others are not yet.
    fn is_begun(&self) -> bool {
        self.portions.is_some_and(|portions| portions.sent > 0)
    }

    fn unsent(&self) -> &[SizedRecord] {
        let sent = self.portions.map_or(0, |portions| portions.sent);
        self.records.get(sent..).unwrap_or_default()
    }

    fn unsent_bytes(&self) -> u64 {
        metered_bytes(self.unsent())
    }

    /// The first of its records are in the stream.
    fn landed(&mut self, records: usize) {
        if let Some(portions) = &mut self.portions {
            let records = records.min(self.records.len());
            self.records.drain(..records);
            portions.first += records as u64;
            portions.sent = portions.sent.saturating_sub(records);
        }
    }

    /// Nothing of it is on its way any more, and all parts below `landed` are in the stream.
    fn rewind(&mut self, landed: Option<u64>) {
        if let Some(portions) = &mut self.portions {
            portions.sent = 0;
            let more = landed.unwrap_or(0).saturating_sub(portions.first);
            self.landed(usize::try_from(more).unwrap_or(usize::MAX));
        }
    }
}

fn metered_bytes(records: &[SizedRecord]) -> u64 {
    records.iter().map(SizedRecord::metered_bytes).sum()
}

/// A batch on its way.
#[derive(Debug)]
struct Batch {
    /// None where it is a portion, and not the last one, of the parcel that comes next.
    parcels: Vec<Parcel>,
    records: u64,
    metered_bytes: u64,
}

/// What an acknowledgement tells.
#[derive(Debug, Default)]
pub struct Acknowledged {
    /// Parcels that are in the stream, each with its first sequence number.
    pub parcels: Vec<(Parcel, u64)>,
    pub portion: Option<Portion>,
}

/// A part of a parcel is in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Portion {
    pub origin: Origin,
    /// All parts before this one are.
    pub below: u64,
    /// How much came to those that were.
    pub records: u64,
    pub metered_bytes: u64,
}

/// What of a parcel a stream was found to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// All of it, from this sequence number on.
    Whole(u64),
    /// All parts before this one.
    Below(u64),
}

/// When and how much may be sent.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// How long a batch that is not full may wait for more while others are on their way.
    pub linger: Duration,
    /// Unacknowledged metered bytes.
    pub bytes_max: u64,
}

/// Parcels in the order of their changes.
#[derive(Debug)]
pub struct Outbox {
    window: Window,
    queue: VecDeque<Parcel>,
    queued_records: usize,
    queued_bytes: u64,
    /// When the oldest parcel of the queue came.
    since: Option<Instant>,
    in_flight: VecDeque<Batch>,
    in_flight_bytes: u64,
    /// How many of the queue wait for other streams.
    waiting: usize,
}

/// A batch is as full as it will be when it holds this share of what S2 takes.
const FULL_BYTES: u64 = 1024 * 1024;
const FULL_RECORDS: usize = crate::sink::record::BATCH_RECORDS_MAX;

impl Outbox {
    #[must_use]
    pub fn new(window: Window) -> Self {
        Self {
            window,
            queue: VecDeque::new(),
            queued_records: 0,
            queued_bytes: 0,
            since: None,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            waiting: 0,
        }
    }

    /// Nothing is ready and nothing is on its way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.in_flight.is_empty()
    }

    /// Something has been sent and is not acknowledged.
    #[must_use]
    pub fn is_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// The number of the first parcel that is not acknowledged.
    #[must_use]
    pub fn front(&self) -> Option<u64> {
        let sent = self.in_flight.iter().find_map(|batch| batch.parcels.first());
        sent.or_else(|| self.queue.front()).map(|parcel| parcel.number)
    }

    /// How many parcels are ready or on their way, and their metered bytes.
    #[must_use]
    pub fn size(&self) -> (usize, u64) {
        let sent: usize = self.in_flight.iter().map(|batch| batch.parcels.len()).sum();
        (self.queue.len() + sent, self.queued_bytes + self.in_flight_bytes)
    }

    /// Whether some of the queue wait for other streams.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.waiting > 0
    }

    /// Lets those go that need not wait any more, where `front` gives the first number that is not
    /// through in a stream.
    pub fn lift(&mut self, front: impl Fn(LaneId) -> Option<u64> + Copy) {
        if self.waiting == 0 {
            return;
        }
        for parcel in self.queue.iter_mut().filter(|parcel| !parcel.behind.is_empty()) {
            parcel.behind.retain(|behind| behind.waits(front));
            if !parcel.behind.is_empty() {
                break;
            }
            self.waiting -= 1;
        }
    }

    /// Takes a change's records, behind all others.
    pub fn push(&mut self, parcel: Parcel, now: Instant) {
        self.since.get_or_insert(now);
        self.waiting += usize::from(!parcel.behind.is_empty());
        self.queued_records += parcel.records.len();
        self.queued_bytes += parcel.unsent_bytes();
        self.queue.push_back(parcel);
    }

    /// When the queue has to be looked at again, if time alone lets something of it go. `None` too
    /// where an acknowledgement has to come first.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        if self.is_blocked() { None } else { self.lingered() }
    }

    fn lingered(&self) -> Option<Instant> {
        self.since.map(|since| since + self.window.linger)
    }

    /// As much is unacknowledged as may be.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.in_flight_bytes >= self.window.bytes_max && !self.queue.is_empty()
    }

    /// Nothing more may go before something is acknowledged.
    fn is_blocked(&self) -> bool {
        // A suspect travels alone: its refusal must not take others along.
        let suspect = |batch: &Batch| batch.parcels.first().is_some_and(|parcel| parcel.alone);
        let alone = self.queue.front().is_some_and(|parcel| parcel.alone)
            || self.in_flight.back().is_some_and(suspect);
        let full = self.in_flight_bytes >= self.window.bytes_max;
        let waits = self.queue.front().is_some_and(|parcel| !parcel.behind.is_empty());
        waits || (self.is_in_flight() && (alone || full))
    }

    /// Packs the next batch and counts it as on its way: at once where nothing else is, otherwise
    /// when it is full or has waited long enough. `None`: not now.
    pub fn next_batch(&mut self, now: Instant) -> Option<Vec<&SizedRecord>> {
        if self.queue.is_empty() || self.is_blocked() {
            return None;
        }
        if self.queue.front()?.portions.is_some() {
            return self.next_portion(now);
        }
        let waited = self.lingered().is_some_and(|due| due <= now);
        let full = self.queued_bytes >= FULL_BYTES || self.queued_records >= FULL_RECORDS;
        if self.is_in_flight() && !full && !waited {
            return None;
        }
        let mut meter = BatchMeter::default();
        let mut batch = Batch { parcels: Vec::new(), records: 0, metered_bytes: 0 };
        while let Some(parcel) = self.queue.front() {
            let apart = parcel.alone || parcel.portions.is_some();
            if !parcel.behind.is_empty() || (apart && !batch.parcels.is_empty()) {
                break;
            }
            let mut with = meter;
            if !parcel.records.iter().all(|record| with.try_add(record)) {
                break;
            }
            meter = with;
            let Some(parcel) = self.queue.pop_front() else { break };
            let alone = parcel.alone;
            batch.parcels.push(parcel);
            if alone {
                break;
            }
        }
        batch.metered_bytes = meter.metered_bytes();
        self.depart(batch, meter.records(), now);
        let mut records = Vec::with_capacity(meter.records());
        records.extend(self.in_flight.back()?.parcels.iter().flat_map(|parcel| &parcel.records));
        Some(records)
    }

    /// As many records of the first parcel as a batch holds, where that takes more than one. It does
    /// not wait for company: it gets none.
    fn next_portion(&mut self, now: Instant) -> Option<Vec<&SizedRecord>> {
        let parcel = self.queue.front_mut()?;
        let mut meter = BatchMeter::default();
        let count = parcel.unsent().iter().take_while(|record| meter.try_add(record)).count();
        let portions = parcel.portions.as_mut()?;
        let first = portions.sent;
        portions.sent += count;
        let is_last = portions.sent == parcel.records.len();
        let parcels = if is_last { self.queue.pop_front() } else { None };
        let metered_bytes = meter.metered_bytes();
        let batch = Batch { parcels: parcels.into_iter().collect(), records: 0, metered_bytes };
        self.depart(batch, count, now);
        let sent = self.in_flight.back()?.parcels.first().or(self.queue.front())?;
        Some(sent.records.get(first..first + count)?.iter().collect())
    }

    fn depart(&mut self, mut batch: Batch, records: usize, now: Instant) {
        batch.records = records as u64;
        self.queued_records -= records;
        self.queued_bytes -= batch.metered_bytes;
        self.since = (!self.queue.is_empty()).then_some(now);
        self.in_flight_bytes += batch.metered_bytes;
        self.in_flight.push_back(batch);
    }

    /// The parcel of which a batch without one is a portion: the first behind it.
    fn begun(&mut self) -> Option<&mut Parcel> {
        let sent = self.in_flight.iter_mut().find_map(|batch| batch.parcels.first_mut());
        sent.or(self.queue.front_mut()).filter(|parcel| parcel.is_begun())
    }

    /// The oldest batch is in the stream, from this number on.
    pub fn acknowledged(&mut self, start: u64) -> Acknowledged {
        let Some(batch) = self.in_flight.pop_front() else { return Acknowledged::default() };
        let Batch { parcels, records, metered_bytes } = batch;
        self.in_flight_bytes -= metered_bytes;
        if parcels.is_empty() {
            let portion = self.begun().map(|parcel| {
                parcel.landed(usize::try_from(records).unwrap_or(usize::MAX));
                let below = parcel.portions.map_or(0, |portions| portions.first);
                Portion { origin: parcel.item.origin, below, records, metered_bytes }
            });
            return Acknowledged { parcels: Vec::new(), portion };
        }
        let mut seq = start;
        let number = |parcel: Parcel| {
            let first = seq;
            seq += parcel.records.len() as u64;
            (parcel, first)
        };
        Acknowledged { parcels: parcels.into_iter().map(number).collect(), portion: None }
    }

    /// S2 refused the oldest batch for one of its records. If that can only be one change, it is taken
    /// out and given back, all of it that is not acknowledged; otherwise each of the batch's changes will go alone, so that the next
    /// refusal names one.
    pub fn refused(&mut self) -> Option<Parcel> {
        let batch = self.in_flight.front_mut()?;
        if batch.parcels.len() > 1 {
            for parcel in &mut batch.parcels {
                parcel.alone = true;
            }
            return None;
        }
        let batch = self.in_flight.pop_front()?;
        self.in_flight_bytes -= batch.metered_bytes;
        if batch.parcels.is_empty() { self.take_begun() } else { batch.parcels.into_iter().next() }
    }

    /// Takes out the parcel of which the first batch was a portion, and forgets its other portions.
    fn take_begun(&mut self) -> Option<Parcel> {
        while let Some(batch) = self.in_flight.pop_front() {
            self.in_flight_bytes -= batch.metered_bytes;
            if let Some(parcel) = batch.parcels.into_iter().next() {
                return Some(parcel);
            }
        }
        let parcel = self.queue.pop_front_if(|parcel| parcel.is_begun())?;
        self.queued_records -= parcel.unsent().len();
        self.queued_bytes -= parcel.unsent_bytes();
        Some(parcel)
    }

    /// The session is over and the stream has been read. What has landed is given out; everything else
    /// that was on its way is first in the queue again, in order. What is only queued is looked for where
    /// it is in doubt: it was sent before, and had left.
    pub fn resume(
        &mut self,
        landed: impl Fn(&Parcel) -> Option<Found>,
        in_doubt: impl Fn(&Parcel) -> bool,
        now: Instant,
    ) -> Vec<(Parcel, u64)> {
        let mut found = Vec::new();
        let mut not_landed = |parcels: &mut dyn Iterator<Item = Parcel>, sent: bool| {
            let mut left = VecDeque::new();
            for mut parcel in parcels {
                let looked_for = sent || parcel.portions.is_some() || in_doubt(&parcel);
                match looked_for.then(|| landed(&parcel)).flatten() {
                    Some(Found::Whole(seq)) => found.push((parcel, seq)),
                    Some(Found::Below(part)) => {
                        parcel.rewind(Some(part));
                        left.push_back(parcel);
                    }
                    None => {
                        parcel.rewind(None);
                        left.push_back(parcel);
                    }
                }
            }
            left
        };
        let sent = std::mem::take(&mut self.in_flight).into_iter();
        let mut again = not_landed(&mut sent.flat_map(|batch| batch.parcels), true);
        let mut queue = not_landed(&mut std::mem::take(&mut self.queue).into_iter(), false);
        self.in_flight_bytes = 0;
        if mutation::broken(Rule::FrontOfQueue) {
            std::mem::swap(&mut again, &mut queue);
        }
        again.append(&mut queue);
        self.replace_queue(again, now);
        found
    }

    /// Takes everything out of the queue, in order. [`Self::replace_queue`] has to follow.
    pub fn take_queue(&mut self) -> VecDeque<Parcel> {
        std::mem::take(&mut self.queue)
    }

    /// Takes parcels out, also those that were sent, which come first, with their number: the session is
    /// over, and whoever takes them finds out what has landed.
    pub fn take_out(
        &mut self,
        mut wanted: impl FnMut(&Parcel) -> bool,
        now: Instant,
    ) -> (Vec<Parcel>, usize) {
        let sent = std::mem::take(&mut self.in_flight).into_iter().flat_map(|batch| batch.parcels);
        let queued = std::mem::take(&mut self.queue);
        let mut taken = Vec::new();
        let mut left = Vec::new();
        for parcel in sent {
            if wanted(&parcel) { taken.push(parcel) } else { left.push(parcel) }
        }
        let (mut out, stay): (Vec<_>, Vec<_>) = queued.into_iter().partition(wanted);
        // At most the first has portions under way.
        let were_sent = taken.len() + out.iter().take_while(|parcel| parcel.is_begun()).count();
        taken.append(&mut out);
        self.in_flight_bytes = 0;
        if !left.is_empty() {
            let records = left.iter().map(|parcel| parcel.records.len() as u64).sum();
            let metered_bytes = left.iter().map(|parcel| metered_bytes(&parcel.records)).sum();
            self.in_flight_bytes = metered_bytes;
            self.in_flight.push_back(Batch { parcels: left, records, metered_bytes });
        }
        self.replace_queue(stay.into(), now);
        (taken, were_sent)
    }

    /// Puts a queue in the place of the present one.
    pub fn replace_queue(&mut self, queue: VecDeque<Parcel>, now: Instant) {
        self.queued_records = queue.iter().map(|parcel| parcel.unsent().len()).sum();
        self.queued_bytes = queue.iter().map(Parcel::unsent_bytes).sum();
        self.waiting = queue.iter().filter(|parcel| !parcel.behind.is_empty()).count();
        self.since = (!queue.is_empty()).then_some(now);
        self.queue = queue;
    }
}

#[cfg(test)]
mod invariants;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::change::{Action, Change, Grouping, Lsn, Position, Table};
    use crate::pipeline::item::Origin;
    use crate::pipeline::size_gate;
    use crate::sink::record::Record;

    const LINGER: Duration = Duration::from_millis(5);

    fn outbox(bytes_max: u64) -> Outbox {
        Outbox::new(Window { linger: LINGER, bytes_max })
    }

    fn parcel(id: u64, records: usize, body_bytes: usize) -> Parcel {
        let table = Table {
            oid: 1,
            schema: "s".into(),
            name: "t".into(),
            columns: Vec::new(),
            grouping: Grouping::Key,
        };
        let change = Change {
            position: Position { commit_lsn: Lsn(id), index: 0 },
            commit_timestamp_us: 0,
            action: Action::Insert,
            table: Arc::new(table),
            new: None,
            old: None,
        };
        let body = Bytes::from(vec![b'x'; body_bytes]);
        let record = Record { timestamp_ms: None, headers: Default::default(), body };
        let record = size_gate::check(record).unwrap();
        Parcel::new(Item { change, origin: Origin::Store { id } }, vec![record; records])
    }

    fn acknowledged(outbox: &mut Outbox, start: u64) -> Vec<(u64, u64)> {
        ids(&outbox.acknowledged(start).parcels)
    }

    fn ids(parcels: &[(Parcel, u64)]) -> Vec<(u64, u64)> {
        parcels
            .iter()
            .map(|(parcel, seq)| (parcel.item.change.position.commit_lsn.0, *seq))
            .collect()
    }

    #[test]
    fn sends_at_once_when_idle_and_lingers_behind_others() {
        let now = Instant::now();
        let mut outbox = outbox(1 << 24);
        outbox.push(parcel(1, 1, 10), now);
        assert_eq!(outbox.next_batch(now).map(|records| records.len()), Some(1));
        outbox.push(parcel(2, 1, 10), now);
        outbox.push(parcel(3, 2, 10), now);
        assert!(outbox.next_batch(now).is_none());
        assert_eq!(outbox.due(), Some(now + LINGER));
        assert_eq!(outbox.next_batch(now + LINGER).map(|records| records.len()), Some(3));
        assert_eq!(acknowledged(&mut outbox, 7), [(1, 7)]);
        assert_eq!(acknowledged(&mut outbox, 8), [(2, 8), (3, 9)]);
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_full_batch_does_not_linger_and_a_full_window_waits_for_an_acknowledgement() {
        let now = Instant::now();
        let mut outbox = outbox(1_000_000);
        for id in 0..4 {
            outbox.push(parcel(id, 1, 600_000), now);
        }
        assert_eq!(outbox.next_batch(now).map(|records| records.len()), Some(1));
        assert_eq!(outbox.next_batch(now).map(|records| records.len()), Some(1), "full");
        assert!(outbox.next_batch(now + LINGER).is_none());
        assert_eq!(outbox.due(), None, "no time alone helps: nobody may spin on it");
        outbox.acknowledged(0);
        assert_eq!(outbox.next_batch(now + LINGER).map(|records| records.len()), Some(1));
    }

    #[test]
    fn parts_of_one_change_share_a_batch() {
        let now = Instant::now();
        let mut outbox = outbox(1 << 24);
        outbox.push(parcel(1, 1, 600_000), now);
        outbox.push(parcel(2, 2, 300_000), now);
        assert_eq!(outbox.next_batch(now).map(|records| records.len()), Some(1));
        assert_eq!(outbox.next_batch(now + LINGER).map(|records| records.len()), Some(2));
    }

    #[test]
    fn what_landed_is_given_out_and_the_rest_goes_again_in_order() {
        let now = Instant::now();
        let mut outbox = outbox(1 << 24);
        for id in 0..3 {
            outbox.push(parcel(id, 1, 10), now);
        }
        outbox.next_batch(now);
        outbox.push(parcel(3, 1, 10), now);
        let landed = |parcel: &Parcel| {
            let id = parcel.item.change.position.commit_lsn.0;
            (id < 1).then_some(Found::Whole(40 + id))
        };
        assert_eq!(ids(&outbox.resume(landed, |_| false, now)), [(0, 40)]);
        assert_eq!(outbox.next_batch(now).map(|records| records.len()), Some(3));
        assert_eq!(acknowledged(&mut outbox, 50), [(1, 50), (2, 51), (3, 52)]);
    }

    #[test]
    fn what_was_sent_in_an_earlier_life_is_looked_for_where_it_is_in_doubt() {
        let now = Instant::now();
        let mut outbox = outbox(1 << 24);
        for id in 0..3 {
            outbox.push(parcel(id, 1, 10), now);
        }
        let id = |parcel: &Parcel| parcel.item.change.position.commit_lsn.0;
        let found =
            outbox.resume(|parcel| Some(Found::Whole(id(parcel))), |parcel| id(parcel) == 1, now);
        assert_eq!(ids(&found), [(1, 1)]);
        assert_eq!(outbox.next_batch(now).map(|records| records.len()), Some(2));
    }

    #[test]
    fn what_waits_for_another_stream_keeps_what_is_behind_it() {
        let now = Instant::now();
        let mut outbox = outbox(1 << 24);
        for id in 0..4 {
            let mut parcel = parcel(id, 1, 10);
            parcel.number = id + 10;
            if id == 1 {
                parcel.behind = vec![Behind { lane: LaneId(7), number: 5 }];
            }
            outbox.push(parcel, now);
        }
        assert_eq!(outbox.front(), Some(10));
        assert_eq!(outbox.next_batch(now).map(|records| records.len()), Some(1));
        outbox.acknowledged(0);
        assert_eq!(outbox.front(), Some(11));
        assert!(outbox.next_batch(now + LINGER).is_none());
        assert_eq!(outbox.due(), None, "no time alone helps");
        outbox.lift(|_| Some(5));
        assert!(outbox.waits() && outbox.next_batch(now + LINGER).is_none());
        outbox.lift(|_| Some(6));
        assert!(!outbox.waits());
        assert_eq!(outbox.next_batch(now).map(|records| records.len()), Some(3));
    }

    #[test]
    fn a_refused_batch_goes_one_by_one_until_the_culprit_is_alone() {
        let now = Instant::now();
        let mut outbox = outbox(1 << 24);
        for id in 0..3 {
            outbox.push(parcel(id, 1, 10), now);
        }
        outbox.next_batch(now);
        assert!(outbox.refused().is_none(), "one of three, nobody knows which");
        outbox.resume(|_| None, |_| true, now);
        assert_eq!(outbox.next_batch(now).map(|records| records.len()), Some(1));
        assert!(outbox.next_batch(now + LINGER).is_none(), "alone");
        assert_eq!(outbox.due(), None);
        assert_eq!(acknowledged(&mut outbox, 0), [(0, 0)]);
        outbox.next_batch(now);
        let culprit = outbox.refused().expect("alone in its batch");
        assert_eq!(culprit.item.change.position.commit_lsn.0, 1);
        outbox.resume(|_| None, |_| true, now);
        outbox.next_batch(now);
        assert_eq!(acknowledged(&mut outbox, 1), [(2, 1)]);
        assert!(outbox.is_empty());
    }

    fn in_portions(id: u64, records: usize, body_bytes: usize) -> Parcel {
        let parcel = parcel(id, records, body_bytes);
        Parcel::in_portions(parcel.item, parcel.records, 0)
    }

    #[test]
    fn what_no_batch_holds_goes_in_portions_with_nothing_in_between() {
        let now = Instant::now();
        let mut outbox = outbox(1 << 24);
        outbox.push(parcel(1, 1, 10), now);
        outbox.push(in_portions(2, 5, 400_000), now);
        outbox.push(parcel(3, 1, 10), now);
        let mut later = now;
        let mut sent = Vec::new();
        while let Some(batch) = outbox.next_batch(later) {
            sent.push(batch.len());
            later += LINGER;
        }
        assert_eq!(sent, [1, 2, 2, 1, 1]);
        assert_eq!(outbox.front(), Some(0));
        assert_eq!(acknowledged(&mut outbox, 10), [(1, 10)]);
        for below in [2, 4] {
            let told = outbox.acknowledged(9 + below);
            assert!(told.parcels.is_empty());
            let portion = told.portion.expect("a part is in the stream");
            assert_eq!((portion.below, portion.records), (below, 2));
            assert_eq!(portion.origin, Origin::Store { id: 2 });
        }
        assert_eq!(acknowledged(&mut outbox, 15), [(2, 15)]);
        assert_eq!(acknowledged(&mut outbox, 16), [(3, 16)]);
        assert!(outbox.is_empty() && outbox.size() == (0, 0));
    }

    /// The session breaks after so many acknowledgements; the stream turns out to hold `landed` parts.
    #[track_caller]
    fn check_broken(acks: usize, landed: Option<Found>, expected: &[usize]) {
        let now = Instant::now();
        let mut outbox = outbox(1_000_000);
        outbox.push(in_portions(1, 5, 400_000), now);
        outbox.push(parcel(2, 1, 10), now);
        assert_eq!(outbox.next_batch(now).map(|batch| batch.len()), Some(2));
        assert_eq!(outbox.next_batch(now).map(|batch| batch.len()), Some(2));
        assert!(outbox.next_batch(now).is_none(), "the window is full");
        for _ in 0..acks {
            outbox.acknowledged(0);
        }
        let is_first = |parcel: &Parcel| parcel.item.change.position.commit_lsn.0 == 1;
        let found = outbox.resume(|parcel| landed.filter(|_| is_first(parcel)), |_| false, now);
        assert_eq!(found.len(), usize::from(matches!(landed, Some(Found::Whole(_)))));
        let mut sent = Vec::new();
        while let Some(batch) = outbox.next_batch(now + LINGER) {
            sent.push(batch.len());
            outbox.acknowledged(0);
        }
        assert_eq!(sent, expected);
        assert!(outbox.is_empty() && outbox.size() == (0, 0));
    }

    #[test]
    fn after_a_broken_session_the_rest_of_the_parts_goes() {
        check_broken(0, None, &[2, 2, 1, 1]);
        check_broken(0, Some(Found::Below(2)), &[2, 1, 1]);
        check_broken(0, Some(Found::Below(4)), &[1, 1]);
        check_broken(0, Some(Found::Whole(7)), &[1]);
        // What was acknowledged need not be read again.
        check_broken(1, None, &[2, 1, 1]);
        check_broken(1, Some(Found::Below(4)), &[1, 1]);
        check_broken(2, None, &[1, 1]);
    }

    #[test]
    fn a_refused_portion_names_its_change() {
        for acks in 0..2 {
            let now = Instant::now();
            let mut outbox = outbox(1 << 24);
            outbox.push(in_portions(1, 5, 400_000), now);
            outbox.push(parcel(2, 1, 10), now);
            while outbox.next_batch(now + LINGER).is_some() {}
            for _ in 0..acks {
                outbox.acknowledged(0);
            }
            let culprit = outbox.refused().expect("it was alone");
            assert_eq!(culprit.item.change.position.commit_lsn.0, 1);
            assert!(outbox.resume(|_| None, |_| false, now).is_empty());
            assert_eq!(outbox.next_batch(now).map(|batch| batch.len()), Some(1));
            assert_eq!(acknowledged(&mut outbox, 0), [(2, 0)]);
            assert!(outbox.is_empty() && outbox.size() == (0, 0));
        }
    }

    #[test]
    fn what_is_taken_out_half_sent_counts_as_sent() {
        let now = Instant::now();
        let mut outbox = outbox(1_000_000);
        outbox.push(in_portions(1, 5, 400_000), now);
        outbox.push(parcel(2, 1, 10), now);
        outbox.next_batch(now);
        let (taken, sent) = outbox.take_out(|_| true, now);
        assert_eq!((taken.len(), sent), (2, 1));
        assert!(outbox.is_empty() && outbox.size() == (0, 0));
    }
}
