//! What the pipeline counts for `/metrics`, beside what its [status](super::control::Status) says. Pure.
//!
//! Everything here is counted by the one task that owns the pipeline, and published as a copy with the
//! status, so that nobody shares a counter with it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::holds::MessageId;

/// Upper bounds of [`Latency`]'s buckets, in microseconds: from what a local S2 takes to a long outage.
pub const LATENCY_BOUNDS_US: [u64; 16] = [
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    60_000_000,
    600_000_000,
    3_600_000_000,
];

/// How long it took from the commit in Postgres to S2's acknowledgement, change by change. Two clocks
/// are compared: what they differ is in it, and less than nothing counts as nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// By bucket, those beyond all bounds last.
    counts: [u64; LATENCY_BOUNDS_US.len() + 1],
    sum_us: u64,
}

impl Latency {
    /// Counts a change that was committed then and is acknowledged now.
    pub fn observe(&mut self, committed_us: i64, now: SystemTime) {
        let now_us = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
        let took_us = i128::try_from(now_us).unwrap_or(i128::MAX) - i128::from(committed_us);
        let took_us = u64::try_from(took_us.max(0)).unwrap_or(u64::MAX);
        let bucket = LATENCY_BOUNDS_US.partition_point(|bound| *bound < took_us);
        self.counts[bucket] += 1;
        self.sum_us = self.sum_us.saturating_add(took_us);
    }

    /// Of each bound, how many took no longer; then how many there are in all.
    pub fn cumulative(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        let bounds = LATENCY_BOUNDS_US.into_iter().map(Some).chain([None]);
        bounds.zip(&self.counts).scan(0, |total, (bound, count)| {
            *total += count;
            Some((bound, *total))
        })
    }

    #[must_use]
    pub fn sum_us(&self) -> u64 {
        self.sum_us
    }
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measures {
    /// Sent to S2, repeated ones again.
    pub sent_records: u64,
    pub sent_bytes: u64,
    pub latency: Latency,
    /// Stored messages that were tried again.
    pub retries: u64,
    /// Failures by class, each attempt by itself.
    pub failures: BTreeMap<Arc<str>, u64>,
    /// Messages that are in the store because they failed, by the class of their last failure.
    pub failed: BTreeMap<Arc<str>, u64>,
    /// Between the source and their settlement, in bytes, and what that is bounded by.
    pub in_flight_bytes: u64,
    pub in_flight_bytes_max: u64,
}

/// Which messages failed by which class: what keeps [`Measures::failed`] right.
#[derive(Debug, Default)]
pub struct Classes {
    of: HashMap<MessageId, Arc<str>>,
}

impl Classes {
    /// A message is in the store by this failure, now or since an earlier run.
    pub fn failed(&mut self, measures: &mut Measures, id: MessageId, class: &str) {
        let class = match measures.failed.get_key_value(class) {
            Some((class, _)) => Arc::clone(class),
            None => Arc::from(class),
        };
        *measures.failed.entry(Arc::clone(&class)).or_default() += 1;
        self.count_off(measures, id, Some(class));
    }

    /// A message left the store.
    pub fn gone(&mut self, measures: &mut Measures, id: MessageId) {
        self.count_off(measures, id, None);
    }

    fn count_off(&mut self, measures: &mut Measures, id: MessageId, next: Option<Arc<str>>) {
        let before = match next {
            Some(next) => self.of.insert(id, next),
            None => self.of.remove(&id),
        };
        if let Some(count) = before.and_then(|before| measures.failed.get_mut(&before)) {
            *count = count.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_change_is_in_the_bucket_of_its_time() {
        let mut latency = Latency::default();
        let committed = 1_700_000_000_000_000;
        let day = UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_000);
        // On a bound, behind it, before the commit, beyond all bounds.
        for (took_us, earlier) in
            [(1_000, false), (1_001, false), (5, true), (4_000_000_000, false)]
        {
            let took = Duration::from_micros(took_us);
            latency.observe(committed, if earlier { day - took } else { day + took });
        }
        let found: Vec<_> = latency.cumulative().collect();
        assert_eq!(found[0], (Some(1_000), 2));
        assert_eq!(found[1], (Some(2_500), 3));
        assert_eq!(found[15], (Some(3_600_000_000), 3));
        assert_eq!(found[16], (None, 4));
        assert_eq!(latency.sum_us(), 4_000_002_001);
        latency.observe(i64::MIN, SystemTime::now());
        latency.observe(i64::MAX, SystemTime::now());
        assert_eq!(latency.cumulative().last(), Some((None, 6)));
    }

    #[test]
    fn a_message_counts_for_its_last_class_until_it_is_gone() {
        let (mut measures, mut classes) = (Measures::default(), Classes::default());
        let failed = |measures: &Measures| {
            measures
                .failed
                .iter()
                .map(|(class, count)| (class.to_string(), *count))
                .collect::<Vec<_>>()
        };
        classes.failed(&mut measures, 1, "trap");
        classes.failed(&mut measures, 2, "trap");
        classes.failed(&mut measures, 1, "oversize");
        assert_eq!(failed(&measures), [("oversize".to_owned(), 1), ("trap".to_owned(), 1)]);
        classes.failed(&mut measures, 1, "oversize");
        classes.gone(&mut measures, 2);
        classes.gone(&mut measures, 3);
        // A class that was there stays, so that its zero is seen.
        assert_eq!(failed(&measures), [("oversize".to_owned(), 1), ("trap".to_owned(), 0)]);
    }
}
