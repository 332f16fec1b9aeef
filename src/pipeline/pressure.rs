//! What the pipeline has been waiting for lately, and whether it falls behind. Pure.
//!
//! A look at one moment says little: with a slow S2, the window is full most of the time and not always.
//! So looks are gathered over some seconds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Over how long looks are gathered. Long enough for S2's slowest acknowledgements, and for a burst to be
/// over.
const WINDOW: Duration = Duration::from_secs(10);

/// How often one is taken at most.
const INTERVAL: Duration = Duration::from_millis(200);

/// What holds everything else back at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    Nobody,
    /// Every worker has as much as it may have.
    Transforms,
    /// As much as may be unacknowledged is, or there is no session.
    Sink,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    holds: Holds,
    /// Bytes of WAL that are not confirmed.
    lag: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Pressure {
    samples: VecDeque<Sample>,
    /// Since when the sink has held everything back without a pause.
    slow_since: Option<Instant>,
}

impl Pressure {
    /// Looks, if it is time for it.
    pub fn look(&mut self, now: Instant, holds: Holds, lag: u64) {
        let last = self.samples.back().map(|sample| sample.at);
        if last.is_some_and(|last| now < last + INTERVAL) {
            return;
        }
        self.samples.push_back(Sample { at: now, holds, lag });
        while self.samples.get(1).is_some_and(|sample| sample.at + WINDOW <= now) {
            self.samples.pop_front();
        }
        let is_slow = self.lately() == Holds::Sink && self.falls_behind(lag);
        self.slow_since = is_slow.then(|| self.slow_since.unwrap_or(now));
    }

    /// What held everything back for most of the time.
    #[must_use]
    pub fn lately(&self) -> Holds {
        let is_whole = |first: &Sample, last: &Sample| first.at + WINDOW <= last.at;
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else {
            return Holds::Nobody;
        };
        let most = |holds| {
            self.samples.iter().filter(|sample| sample.holds == holds).count() * 2
                > self.samples.len()
        };
        if !is_whole(first, last) {
            Holds::Nobody
        } else if most(Holds::Sink) {
            Holds::Sink
        } else if most(Holds::Transforms) {
            Holds::Transforms
        } else {
            Holds::Nobody
        }
    }

    /// More is written than gets through: what merely catches up is not slow.
    fn falls_behind(&self, lag: u64) -> bool {
        lag > 0 && self.samples.front().is_some_and(|first| lag >= first.lag)
    }

    /// Since when S2 has taken less than is written.
    #[must_use]
    pub fn slow_since(&self) -> Option<Instant> {
        self.slow_since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two looks a second; since which one the sink is slow.
    fn run(looks: impl IntoIterator<Item = (Holds, u64)>) -> Vec<Option<u64>> {
        let start = Instant::now();
        let mut pressure = Pressure::default();
        let mut found = Vec::new();
        for (number, (holds, lag)) in (0..).zip(looks) {
            pressure.look(start + Duration::from_millis(500) * number, holds, lag);
            let since = |at: Instant| at.duration_since(start).as_secs();
            found.push(pressure.slow_since().map(since));
        }
        found
    }

    #[test]
    fn a_sink_that_falls_behind_is_slow_once_it_has_done_so_for_long() {
        // In the window's way two times out of three.
        let look = |number: u64| {
            let holds = if number.is_multiple_of(3) { Holds::Nobody } else { Holds::Sink };
            (holds, 1000 + number)
        };
        let found = run((0..60).map(look));
        assert_eq!(found.iter().position(Option::is_some), Some(20));
        assert_eq!(found.last(), Some(&Some(10)), "and still since then");
    }

    #[test]
    fn what_catches_up_is_not_slow() {
        let found = run((0..100).map(|number| (Holds::Sink, 1_000_000 - number)));
        assert!(found.iter().all(Option::is_none));
    }

    #[test]
    fn a_burst_is_not_slow() {
        let look = |number: u64| {
            let holds = if number < 8 { Holds::Sink } else { Holds::Nobody };
            (holds, 1000)
        };
        assert!(run((0..100).map(look)).iter().all(Option::is_none));
        assert!(run((0..100).map(|_| (Holds::Transforms, 1000))).iter().all(Option::is_none));
    }

    #[test]
    fn it_ends_when_the_sink_keeps_up() {
        let look = |number: u64| {
            let holds = if number < 40 { Holds::Sink } else { Holds::Nobody };
            (holds, 1000 + number.min(40))
        };
        let found = run((0..80).map(look));
        assert_eq!((found[39], found[79]), (Some(10), None));
    }

    #[test]
    fn looks_that_come_too_often_do_not_count() {
        let now = Instant::now();
        let mut pressure = Pressure::default();
        for millis in 0..20_000 {
            pressure.look(now + Duration::from_millis(millis), Holds::Sink, 1);
        }
        assert!(pressure.samples.len() <= 52, "{}", pressure.samples.len());
        assert_eq!(pressure.lately(), Holds::Sink);
    }
}
