//! How much goes into a record and into a batch where we choose: S2's limits. A simulated run has
//! smaller ones, so that a message of a few records takes several batches, and a dead letter of a small
//! row several records. Outside of test builds they are constants.

#[cfg(test)]
pub(crate) use drawn::{Limits, batch_records, record_bytes, set};

/// Records of a batch.
#[cfg(not(test))]
pub(crate) const fn batch_records() -> usize {
    super::record::BATCH_RECORDS_MAX
}

/// Metered bytes of a record.
#[cfg(not(test))]
pub(crate) const fn record_bytes() -> u64 {
    super::record::RECORD_BYTES_MAX
}

#[cfg(test)]
mod drawn {
    use std::cell::Cell;

    use super::super::record::{BATCH_RECORDS_MAX, RECORD_BYTES_MAX};

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Limits {
        pub(crate) batch_records: usize,
        pub(crate) record_bytes: u64,
    }

    impl Limits {
        pub(crate) const S2: Self =
            Self { batch_records: BATCH_RECORDS_MAX, record_bytes: RECORD_BYTES_MAX };
    }

    thread_local! {
        /// A run of the simulation has one thread of its own.
        static LIMITS: Cell<Limits> = const { Cell::new(Limits::S2) };
    }

    /// Sets them for this thread.
    pub(crate) fn set(limits: Limits) {
        LIMITS.set(limits);
    }

    pub(crate) fn batch_records() -> usize {
        LIMITS.get().batch_records
    }

    pub(crate) fn record_bytes() -> u64 {
        LIMITS.get().record_bytes
    }
}
