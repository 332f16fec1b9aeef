//! Every decision about failure: what is tried again, when, and what an operator can do about it.
//!
//! What each outcome means is the table in [`outcomes`]; how long to wait is here.

pub mod outcomes;

use std::time::Duration;

use rand::{Rng, RngExt as _};

use crate::store::{Attempts, Failure};
use crate::transform::Tally;
use outcomes::Happens;

/// When a failed message is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// After this long.
    After(Duration),
    /// When the chain changes, or when an operator asks: trying the same again cannot help.
    OnRequest,
    /// Not any more: its attempts are spent.
    Spent,
}

/// The bounds of a back-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub min: Duration,
    pub max: Duration,
}

/// Between attempts to reach S2 again.
pub const SINK: Backoff = Backoff { min: Duration::from_millis(100), max: Duration::from_secs(15) };

/// Between attempts to write the store again.
pub const STORE: Backoff =
    Backoff { min: Duration::from_millis(500), max: Duration::from_secs(10) };

impl Backoff {
    /// How long to wait after so many failures in a row (from 1): doubling, and up to a quarter less,
    /// so that many that failed together do not come back together.
    #[must_use]
    pub fn delay(self, failures: u64, rng: &mut impl Rng) -> Duration {
        let doublings = u32::try_from(failures.saturating_sub(1)).unwrap_or(u32::MAX).min(30);
        let full = self.min.saturating_mul(1 << doublings).min(self.max);
        full.mul_f64(1.0 - rng.random_range(0.0..0.25))
    }
}

/// When to try a message again that failed so often by now. `max` bounds the attempts of its own, where
/// there is a bound; then those that parked for ever are tried by themselves as well, so that they come
/// to it, and an operator has that long to mend them.
#[must_use]
pub fn retry(
    failure: &Failure,
    attempts: Attempts,
    max: Option<u64>,
    backoff: Backoff,
    rng: &mut impl Rng,
) -> Retry {
    let row = outcomes::of_message(&failure.error.class);
    match (max.filter(|_| row.own), row.happens) {
        (Some(max), _) if attempts.own >= max => Retry::Spent,
        (None, Happens::MessageParks) => Retry::OnRequest,
        (Some(_), _)
        | (
            None,
            Happens::MessageRetries
            | Happens::SinkWaits
            | Happens::LineReopens
            | Happens::StandsDown
            | Happens::OperatorDecides
            | Happens::PipelineStops,
        ) => Retry::After(backoff.delay(attempts.all, rng)),
    }
}

/// Whether a failure counts among those that a message may have.
#[must_use]
pub fn is_own(failure: &Failure) -> bool {
    outcomes::of_message(&failure.error.class).own
}

/// How a chain does that went live a while ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// No worse than the one before it, as far as can be told.
    Fair,
    /// So many more messages fail that the one before it should come back, if it handles them.
    Worse,
}

/// From how many failures on they are more than chance.
const FAILURES_MIN: u64 = 3;

/// How much of all messages may fail beyond twice of what failed before: one in a hundred.
const FAILED_SHARE: f64 = 0.01;

/// How long and over how many messages a chain is on probation.
const PROBATION_TIME: Duration = Duration::from_secs(60);
const PROBATION_MESSAGES: u64 = 1000;

/// Compares how messages fare with a chain to how they fared before it.
#[must_use]
pub fn probation(before: Tally, now: Tally) -> Standing {
    let share = |count: u64, of: u64| count as f64 / of.max(1) as f64;
    let jumped = |before_count: u64, count: u64| {
        count >= FAILURES_MIN
            && share(count, now.messages)
                > 2.0 * share(before_count, before.messages) + FAILED_SHARE
    };
    if jumped(before.failed, now.failed) || jumped(before.timeouts, now.timeouts) {
        Standing::Worse
    } else {
        Standing::Fair
    }
}

/// Whether a chain's probation is over.
#[must_use]
pub fn is_proven(now: Tally, lasted: Duration) -> bool {
    lasted >= PROBATION_TIME && now.messages >= PROBATION_MESSAGES
}

/// What an operator can do about a failed message, in one sentence with a command.
#[must_use]
pub fn hint(id: &str, failure: Option<&Failure>) -> String {
    let give_up = format!("or give it up: sluicebox messages ack {id}");
    let Some(failure) = failure else {
        return format!(
            "It follows by itself once the message in front of it is through; {give_up}"
        );
    };
    let column = failure.columns.first().map(|column| column.name.as_str());
    let transform = failure.error.transform.as_deref();
    let mend = outcomes::hint(&failure.error.class, id, column, transform);
    format!("{mend}; {give_up}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::control::ErrorView;

    fn failure(class: &str) -> Failure {
        Failure {
            error: ErrorView {
                class: class.to_owned(),
                status: None,
                text: String::new(),
                body: None,
                transform: None,
            },
            bytes: None,
            columns: Vec::new(),
            trace: Vec::new(),
        }
    }

    #[test]
    fn delays_double_up_to_the_bound_and_vary_by_a_quarter() {
        let backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(300) };
        for (failures, full) in [(1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (u64::MAX, 300)] {
            let full = Duration::from_secs(full);
            for _ in 0..50 {
                let delay = backoff.delay(failures, &mut rand::rng());
                assert!(delay <= full && delay >= full.mul_f64(0.749), "{failures}: {delay:?}");
            }
        }
    }

    #[test]
    fn a_chain_is_worse_when_its_failures_jump() {
        let tally = |messages, failed, timeouts| Tally { messages, failed, timeouts };
        let check = |before, now, expected| assert_eq!(probation(before, now), expected, "{now:?}");
        let quiet = tally(0, 0, 0);
        check(quiet, tally(0, 0, 0), Standing::Fair);
        check(quiet, tally(2, 2, 0), Standing::Fair);
        check(quiet, tally(3, 3, 0), Standing::Worse);
        check(quiet, tally(1000, 10, 0), Standing::Fair);
        check(quiet, tally(1000, 11, 0), Standing::Worse);
        // As many failed before.
        check(tally(1000, 100, 0), tally(100, 20, 0), Standing::Fair);
        check(tally(1000, 100, 0), tally(100, 22, 0), Standing::Worse);
        // Other failures before do not make up for running out of time.
        check(tally(100, 50, 0), tally(100, 50, 3), Standing::Worse);
    }

    #[test]
    fn only_what_stays_too_large_is_not_tried_again() {
        for class in ["trap", "timeout", "limit", "guest", "invalid", "encode", "refused", "route"]
        {
            assert!(matches!(tried(class, 1, None), Retry::After(_)), "{class}");
            assert!(matches!(tried(class, 1_000_000, None), Retry::After(_)), "{class}");
        }
        assert_eq!(tried("oversize", 1, None), Retry::OnRequest);
    }

    fn tried(class: &str, own: u64, max: Option<u64>) -> Retry {
        let backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(300) };
        let attempts = Attempts { all: own + 7, own };
        retry(&failure(class), attempts, max, backoff, &mut rand::rng())
    }

    #[test]
    fn what_is_not_a_messages_own_trouble_never_spends_its_attempts() {
        for class in ["oversize", "trap", "timeout", "guest", "refused"] {
            assert!(matches!(tried(class, 2, Some(3)), Retry::After(_)), "{class}");
            assert_eq!(tried(class, 3, Some(3)), Retry::Spent, "{class}");
            assert!(is_own(&failure(class)));
        }
        assert!(matches!(tried("route", 1_000, Some(3)), Retry::After(_)));
        assert!(!is_own(&failure("route")));
    }
}
