//! What holds of the driver's own counts between any two events, for the tests and the simulation: a
//! count that drifts stops something only much later, and somewhere else.

use super::Driver;
use super::lane::Lane;
use crate::mutation;

impl Driver {
    /// # Panics
    ///
    /// Where one of them does not hold.
    pub(super) fn assert_invariants(&self) {
        // A broken rule has to be found out by what comes of it.
        if mutation::is_broken() {
            return;
        }
        self.holds.assert_consistent();
        self.lanes.all().for_each(|(_, lane)| lane.outbox.assert_consistent());
        self.spill.assert_consistent();
        if self.is_at_rest() {
            self.assert_nothing_is_left();
        }
    }

    /// Nothing is on its way, in whatever place.
    fn is_at_rest(&self) -> bool {
        let is_free = |lane: &Lane| !lane.is_busy();
        self.holds.is_empty()
            && self.jobs.is_empty()
            && self.halted.is_none()
            && self.reading.is_none()
            && self.writing.is_none()
            && self.writes.is_empty()
            && self.effects.settled.is_empty()
            && self.dead.is_idle()
            && self.spill.size().0 == 0
            && !self.spill.is_read()
            && self.lanes.all().all(|(_, lane)| is_free(lane))
    }

    fn assert_nothing_is_left(&self) {
        assert!(self.tracker.is_idle(), "at rest, {} changes are forgotten", self.tracker.len());
        assert_eq!(self.spill.open().count(), 0, "at rest, spilled changes are forgotten");
        assert_eq!(self.retry_bytes, 0, "at rest, bytes of messages still count");
        assert!(self.passing.is_empty(), "at rest, {:?} did not pass", self.passing);
        assert!(self.attempts.is_empty(), "at rest, attempts of {:?}", self.attempts);
        assert!(self.parts.is_empty(), "at rest, parts are known");
        self.dead.assert_empty();
        self.doubts.assert_nothing_is_found();
    }
}
