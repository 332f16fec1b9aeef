//! What the outbox counts, worked out anew from what it holds.

use super::{Batch, Outbox, Parcel};

impl Outbox {
    /// # Panics
    ///
    /// Where what is counted is not what is there.
    pub(crate) fn assert_consistent(&self) {
        let queued = self.queue.iter();
        let records: usize = queued.clone().map(|parcel| parcel.unsent().len()).sum();
        let bytes: u64 = queued.clone().map(Parcel::unsent_bytes).sum();
        let waiting = queued.filter(|parcel| !parcel.behind.is_empty()).count();
        assert_eq!(
            (self.queued_records, self.queued_bytes, self.waiting),
            (records, bytes, waiting),
            "records, bytes and parcels that wait in the queue"
        );
        let sent: u64 = self.in_flight.iter().map(|batch| batch.metered_bytes).sum();
        assert_eq!(self.in_flight_bytes, sent, "bytes on their way");
        assert!(self.queue.is_empty() || self.since.is_some(), "the queue never lingers");
        // A portion without its parcel belongs to the one behind it, which is begun.
        let is_part = |batch: &Batch| batch.parcels.is_empty();
        if self.in_flight.back().is_some_and(is_part) {
            let front = self.queue.front();
            assert!(front.is_some_and(Parcel::is_begun), "a portion of nothing is on its way");
        }
    }
}
