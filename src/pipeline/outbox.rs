//! What is ready for S2 and what is on its way there, in order. Pure: it packs batches and remembers
//! them until they are acknowledged, and says after a broken session what has to go again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::item::Item;
use super::size_gate::SizedRecord;
use crate::sink::session::BatchMeter;

/// A change's records, which land together or not at all.
#[derive(Debug)]
pub struct Parcel {
    pub item: Item,
    pub records: Vec<SizedRecord>,
    /// In a batch of its own, since S2 refused one that it was in.
    alone: bool,
}

impl Parcel {
    #[must_use]
    pub fn new(item: Item, records: Vec<SizedRecord>) -> Self {
        Self { item, records, alone: false }
    }

    fn metered_bytes(&self) -> u64 {
        self.records.iter().map(SizedRecord::metered_bytes).sum()
    }
}

/// A batch on its way.
#[derive(Debug)]
struct Batch {
    parcels: Vec<Parcel>,
    records: u64,
    metered_bytes: u64,
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

    /// Takes a change's records, behind all others.
    pub fn push(&mut self, parcel: Parcel, now: Instant) {
        self.since.get_or_insert(now);
        self.queued_records += parcel.records.len();
        self.queued_bytes += parcel.metered_bytes();
        self.queue.push_back(parcel);
    }

    /// When the queue has to be looked at again, if it holds anything that is only waiting for more.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + self.window.linger)
    }

    /// Packs the next batch and counts it as on its way: at once where nothing else is, otherwise
    /// when it is full or has waited long enough. `None`: not now.
    pub fn next_batch(&mut self, now: Instant) -> Option<Vec<SizedRecord>> {
        let waited = self.due().is_some_and(|due| due <= now);
        let full = self.queued_bytes >= FULL_BYTES || self.queued_records >= FULL_RECORDS;
        let idle = self.in_flight.is_empty();
        let room = idle || self.in_flight_bytes < self.window.bytes_max;
        let first = self.queue.front()?;
        // A suspect travels alone: its refusal must not take others along.
        let suspect = |batch: &Batch| batch.parcels.first().is_some_and(|parcel| parcel.alone);
        if !idle && (first.alone || self.in_flight.back().is_some_and(suspect)) {
            return None;
        }
        if !(room && (idle || full || waited)) {
            return None;
        }
        let mut meter = BatchMeter::default();
        let mut batch = Batch { parcels: Vec::new(), records: 0, metered_bytes: 0 };
        let mut records = Vec::with_capacity(self.queued_records.min(FULL_RECORDS));
        while let Some(parcel) = self.queue.front() {
            if parcel.alone && !batch.parcels.is_empty() {
                break;
            }
            let mut with = meter;
            if !parcel.records.iter().all(|record| with.try_add(record)) {
                break;
            }
            meter = with;
            let Some(parcel) = self.queue.pop_front() else { break };
            records.extend(parcel.records.iter().cloned());
            let alone = parcel.alone;
            batch.parcels.push(parcel);
            if alone {
                break;
            }
        }
        batch.records = records.len() as u64;
        batch.metered_bytes = meter.metered_bytes();
        self.queued_records -= records.len();
        self.queued_bytes -= batch.metered_bytes;
        self.since = (!self.queue.is_empty()).then_some(now);
        self.in_flight_bytes += batch.metered_bytes;
        self.in_flight.push_back(batch);
        Some(records)
    }

    /// The oldest batch is in the stream. Gives its parcels, each with its first sequence number.
    pub fn acknowledged(&mut self, start: u64) -> Vec<(Parcel, u64)> {
        let Some(batch) = self.in_flight.pop_front() else { return Vec::new() };
        self.in_flight_bytes -= batch.metered_bytes;
        let mut seq = start;
        let number = |parcel: Parcel| {
            let first = seq;
            seq += parcel.records.len() as u64;
            (parcel, first)
        };
        batch.parcels.into_iter().map(number).collect()
    }

    /// S2 refused the oldest batch for one of its records. If that can only be one change, it is taken
    /// out and given back; otherwise each of the batch's changes will go alone, so that the next
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
        batch.parcels.into_iter().next()
    }

    /// The session is over and the stream has been read: `landed` gives the first sequence number of a
    /// change that is in it. Those are given out; everything else that was on its way is first in the
    /// queue again, in order.
    pub fn resume(
        &mut self,
        landed: impl Fn(&Parcel) -> Option<u64>,
        now: Instant,
    ) -> Vec<(Parcel, u64)> {
        let mut found = Vec::new();
        let parcels =
            std::mem::take(&mut self.in_flight).into_iter().flat_map(|batch| batch.parcels);
        let mut again = VecDeque::new();
        for parcel in parcels {
            match landed(&parcel) {
                Some(seq) => found.push((parcel, seq)),
                None => again.push_back(parcel),
            }
        }
        self.in_flight_bytes = 0;
        again.append(&mut self.queue);
        self.replace(again, now);
        found
    }

    /// Takes everything out of the queue that `held` says has to wait.
    pub fn extract(&mut self, mut held: impl FnMut(&Parcel) -> bool, now: Instant) -> Vec<Parcel> {
        let (out, stay): (Vec<Parcel>, Vec<Parcel>) =
            std::mem::take(&mut self.queue).into_iter().partition(|parcel| held(parcel));
        self.replace(stay.into(), now);
        out
    }

    fn replace(&mut self, queue: VecDeque<Parcel>, now: Instant) {
        self.queued_records = queue.iter().map(|parcel| parcel.records.len()).sum();
        self.queued_bytes = queue.iter().map(Parcel::metered_bytes).sum();
        self.since = (!queue.is_empty()).then_some(now);
        self.queue = queue;
    }
}
