//! A bounded sample of recent changes in memory, for trying a chain before it goes live.
//!
//! It must cost the path next to nothing: a batch is looked at only when the last look is a while
//! ago, a few of its changes are copied, and the driver never waits for whoever reads the sample.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::change::Change;

/// How many changes are kept, and how much they may hold together.
const CHANGES_MAX: usize = 500;
const BYTES_MAX: usize = 8 * 1024 * 1024;

/// A larger change is not kept: it would push out too many others.
const CHANGE_BYTES_MAX: usize = 2 * 1024 * 1024;

/// How often a batch is looked at, and how many changes of it are taken: at most 400 a second.
const INTERVAL: Duration = Duration::from_millis(20);
const PER_BATCH: usize = 8;

/// Copying is held to this many bytes per second, about a hundredth of one core.
const BYTES_PER_SECOND: u64 = 32 * 1024 * 1024;

/// The sample. Cloned handles show the same one.
#[derive(Clone, Debug, Default)]
pub struct Sample(Arc<Mutex<Changes>>);

/// By table, so that a busy one does not push out all that is known of a quiet one.
#[derive(Debug, Default)]
struct Changes {
    tables: HashMap<u32, VecDeque<Change>>,
    count: usize,
    bytes: usize,
}

impl Sample {
    /// The changes, newest last within each table. They share their values with the sample.
    #[must_use]
    pub fn changes(&self) -> Vec<Change> {
        let changes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        changes.tables.values().flatten().cloned().collect()
    }
}

impl Changes {
    fn add(&mut self, change: Change) {
        self.count += 1;
        self.bytes += change.bytes();
        self.tables.entry(change.table.oid).or_default().push_back(change);
        while self.count > CHANGES_MAX || self.bytes > BYTES_MAX {
            let largest = self.tables.values_mut().max_by_key(|table| table.len());
            let Some(oldest) = largest.and_then(VecDeque::pop_front) else { break };
            self.count -= 1;
            self.bytes -= oldest.bytes();
        }
        self.tables.retain(|_, table| !table.is_empty());
    }
}

/// What takes changes out of the stream of batches.
#[derive(Debug)]
pub struct Sampler {
    sample: Sample,
    next: Option<Instant>,
}

impl Sampler {
    #[must_use]
    pub fn new(sample: Sample) -> Self {
        Self { sample, next: None }
    }

    /// Takes a few changes of a batch, evenly spread over it, if it is time again. `at` gives the
    /// change at a place of the batch.
    pub fn look<'a>(&mut self, now: Instant, len: usize, at: impl Fn(usize) -> &'a Change) {
        if len == 0 || self.next.is_some_and(|next| now < next) {
            return;
        }
        // Somebody reads the sample: the next batch is as good.
        let Ok(mut changes) = self.sample.0.try_lock() else { return };
        let taken = len.min(PER_BATCH);
        let mut copied: u64 = 0;
        for number in 0..taken {
            let change = at(number * len / taken);
            let bytes = change.bytes();
            if bytes <= CHANGE_BYTES_MAX {
                copied += bytes as u64;
                changes.add(change.detached());
            }
        }
        let pause = Duration::from_micros(copied * 1_000_000 / BYTES_PER_SECOND);
        self.next = Some(now + INTERVAL.max(pause));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Action, Cell, Grouping, Lsn, Position, Table, Tuple};
    use bytes::Bytes;

    fn change(oid: u32, index: u64, bytes: usize) -> Change {
        let table = Table {
            oid,
            schema: "s".into(),
            name: "t".into(),
            columns: Vec::new(),
            grouping: Grouping::default(),
        };
        let end = u32::try_from(bytes).unwrap();
        Change {
            position: Position { commit_lsn: Lsn(1), index },
            commit_timestamp_us: 0,
            action: Action::Insert,
            table: Arc::new(table),
            new: Some(Tuple {
                data: Bytes::from(vec![b'x'; bytes]),
                cells: Box::new([Cell::Text { start: 0, end }]),
            }),
            old: None,
        }
    }

    fn indices(sample: &Sample, oid: u32) -> Vec<u64> {
        let of_table = |change: &Change| (change.table.oid == oid).then_some(change.position.index);
        sample.changes().iter().filter_map(of_table).collect()
    }

    #[test]
    fn a_batch_gives_a_few_changes_and_then_there_is_a_pause() {
        let sample = Sample::default();
        let mut sampler = Sampler::new(sample.clone());
        let start = Instant::now();
        let batch: Vec<Change> = (0..80).map(|index| change(1, index, 10)).collect();
        sampler.look(start, batch.len(), |at| &batch[at]);
        assert_eq!(indices(&sample, 1), [0, 10, 20, 30, 40, 50, 60, 70]);
        sampler.look(start + INTERVAL / 2, batch.len(), |at| &batch[at]);
        assert_eq!(sample.changes().len(), 8);
        sampler.look(start + INTERVAL, 3, |at| &batch[at]);
        assert_eq!(indices(&sample, 1)[8..], [0, 1, 2]);

        // Whoever reads is not waited for.
        let reading = sample.0.lock().unwrap();
        sampler.look(start + INTERVAL * 9, 3, |at| &batch[at]);
        drop(reading);
        assert_eq!(sample.changes().len(), 11);
    }

    #[test]
    fn large_changes_make_the_pause_longer_and_the_largest_are_left_out() {
        let sample = Sample::default();
        let mut sampler = Sampler::new(sample.clone());
        let start = Instant::now();
        let batch = [change(1, 0, CHANGE_BYTES_MAX), change(1, 1, 1024 * 1024)];
        sampler.look(start, batch.len(), |at| &batch[at]);
        assert_eq!(indices(&sample, 1), [1]);
        sampler.look(start + INTERVAL, 1, |_| &batch[1]);
        assert_eq!(sample.changes().len(), 1);
        sampler.look(start + Duration::from_secs(1), 1, |_| &batch[1]);
        assert_eq!(sample.changes().len(), 2);
    }

    #[test]
    fn a_quiet_table_outlasts_a_busy_one() {
        let sample = Sample::default();
        let mut sampler = Sampler::new(sample.clone());
        let mut now = Instant::now();
        let quiet = change(7, 0, 100);
        sampler.look(now, 1, |_| &quiet);
        for index in 0..1000 {
            now += Duration::from_secs(1);
            let busy = change(1, index, 40_000);
            sampler.look(now, 1, |_| &busy);
        }
        assert_eq!(indices(&sample, 7), [0]);
        let busy = indices(&sample, 1);
        assert_eq!(busy.last(), Some(&999));
        let bytes: usize = sample.changes().iter().map(Change::bytes).sum();
        assert!(bytes <= BYTES_MAX && bytes > BYTES_MAX / 2, "{bytes}");
        assert!(sample.changes().len() <= CHANGES_MAX);
    }
}
