//! How messages fare with a chain, counted beside the traffic, so that one that turns out bad after
//! it went live can be taken back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::Class;
use crate::change::Change;

/// How many of the failed changes are kept, to be tried with the chain before.
const FAILED_MAX: usize = 32;

/// What they may hold together, in bytes; the first is kept whatever it holds.
const FAILED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What became of a number of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub messages: u64,
    /// Those that a transform failed on, whatever its settings made of that, and those that came out
    /// of the chain as something that cannot be sent.
    pub failed: u64,
    /// Those of the failed that ran out of time.
    pub timeouts: u64,
}

impl Tally {
    /// What came after an earlier state of the same count.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            messages: self.messages.saturating_sub(earlier.messages),
            failed: self.failed.saturating_sub(earlier.failed),
            timeouts: self.timeouts.saturating_sub(earlier.timeouts),
        }
    }
}

/// A change that failed, and the transform that failed it, where one did.
#[derive(Clone, Debug)]
pub struct Failed {
    pub change: Change,
    pub transform: Option<String>,
}

/// What a chain did to changes from the source. Stored messages that are tried again do not count:
/// they failed before, and say nothing about a new chain.
#[derive(Debug, Default)]
pub struct Health {
    messages: AtomicU64,
    failed: AtomicU64,
    timeouts: AtomicU64,
    changes: Mutex<Vec<Failed>>,
}

impl Health {
    /// Counts messages, failed ones included.
    pub fn ran(&self, messages: u64) {
        self.messages.fetch_add(messages, Ordering::Relaxed);
    }

    /// Counts one of them as failed, and keeps its change while there is room.
    pub fn failed(&self, change: &Change, transform: Option<&str>, class: Option<Class>) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        if class == Some(Class::Timeout) {
            self.timeouts.fetch_add(1, Ordering::Relaxed);
        }
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let held: usize = changes.iter().map(|failed| failed.change.bytes()).sum();
        let fits = held + change.bytes() <= FAILED_BYTES_MAX && changes.len() < FAILED_MAX;
        if changes.is_empty() || fits {
            let transform = transform.map(str::to_owned);
            changes.push(Failed { change: change.detached(), transform });
        }
    }

    #[must_use]
    pub fn tally(&self) -> Tally {
        // Failures are counted before the messages that they are among, so that there are never
        // more of them.
        let messages = self.messages.load(Ordering::Relaxed);
        let failed = self.failed.load(Ordering::Relaxed);
        let timeouts = self.timeouts.load(Ordering::Relaxed);
        Tally { messages: messages.max(failed), failed, timeouts: timeouts.min(failed) }
    }

    /// The failed changes that were kept; room is made for others.
    pub(crate) fn take_failed(&self) -> Vec<Failed> {
        std::mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
