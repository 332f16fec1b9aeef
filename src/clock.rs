//! What time it is for the pipeline.
//!
//! Instants come from the runtime's clock, which is the system's own, and in the simulation stands
//! still between events. What only `std::time` knows, the time of day, can be tied to that clock, so
//! that a run of the simulation is the same each time.

use std::time::{Instant, SystemTime};

/// A source of instants and of the time of day.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// Where the time of day follows the runtime's clock: what it was, and when.
    day: Option<(SystemTime, Instant)>,
}

impl Clock {
    /// The system's.
    #[must_use]
    pub const fn system() -> Self {
        Self { day: None }
    }

    /// It is `day` now, and from here on the runtime's clock alone counts.
    #[must_use]
    pub fn starting_at(day: SystemTime) -> Self {
        Self { day: Some((day, Self::system().now())) }
    }

    /// Now, for waiting and measuring. Outside of a runtime it is the system's.
    #[must_use]
    pub fn now(self) -> Instant {
        tokio::time::Instant::now().into_std()
    }

    /// The time of day, for what outlives the process.
    #[must_use]
    pub fn time_of_day(self) -> SystemTime {
        match self.day {
            Some((day, at)) => day + self.now().saturating_duration_since(at),
            None => SystemTime::now(),
        }
    }
}
