//! Whether others append to the stream so often that numbers would let nothing of ours through.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// So many missed numbers within [`WINDOW`] mean that somebody appends all the time. Each costs a
/// session, which is a few round trips.
const MISSED_MAX: usize = 3;

/// Long enough to tell a busy writer from one that appends now and then.
const WINDOW: Duration = Duration::from_secs(60);

/// When numbers were missed, the newest last.
#[derive(Debug, Default)]
pub(super) struct OtherWriters {
    missed: VecDeque<Instant>,
}

impl OtherWriters {
    /// A batch met another number than its own.
    pub(super) fn missed(&mut self, now: Instant) {
        self.missed.push_back(now);
        if self.missed.len() > MISSED_MAX {
            self.missed.pop_front();
        }
    }

    /// Whether the next line can be guarded by numbers.
    pub(super) fn leave_numbers(&self, now: Instant) -> bool {
        let recent = |at: &&Instant| now.saturating_duration_since(**at) < WINDOW;
        self.missed.iter().filter(recent).count() < MISSED_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_left_out_only_while_they_are_missed_often() {
        let now = Instant::now();
        let mut others = OtherWriters::default();
        assert!(others.leave_numbers(now));
        for seconds in [0, 30, 59] {
            assert!(others.leave_numbers(now + Duration::from_secs(seconds)));
            others.missed(now + Duration::from_secs(seconds));
        }
        assert!(!others.leave_numbers(now + Duration::from_secs(59)));
        assert!(others.leave_numbers(now + Duration::from_secs(60)));
        others.missed(now + Duration::from_secs(70));
        assert!(!others.leave_numbers(now + Duration::from_secs(80)));
    }
}
