//! What each part of the pipeline is doing, for the judge of [`stuck`](crate::pipeline::stuck), and
//! what follows from its verdict.

use super::lane::Sink;
use super::{Counters, Driver};
use crate::pipeline::control::{Reason, StuckView};
use crate::pipeline::stuck::{Doing, Look, News, Part};

/// The reason that stands before S2 has answered for the first time.
pub(super) const CONNECTING: &str = "sink_connecting";

impl Driver {
    /// Looks at every part, says what is stuck, and begins anew what can be.
    pub(super) fn look_for_stuck(&mut self) {
        let looks = [
            self.look_at_source(),
            self.look_at_transforms(),
            self.look_at_sink(),
            self.look_at_store(),
            self.look_at_pipeline(),
        ];
        for (part, news) in self.stuck.look(self.clock.now(), looks) {
            let word = part.word();
            match news {
                News::Stuck { stalled } => {
                    let seconds = stalled.as_secs();
                    tracing::error!(part = word, seconds, "stuck: {}", part.advice());
                    self.begin_anew(part);
                }
                News::Still { stalled } => {
                    let seconds = stalled.as_secs();
                    tracing::warn!(part = word, seconds, "still stuck; it is begun anew once more");
                    self.begin_anew(part);
                }
                News::Moves { stalled } => {
                    let seconds = stalled.as_secs();
                    tracing::info!(part = word, seconds, "no longer stuck");
                }
            }
        }
    }

    /// Reasons for not being ready.
    pub(super) fn stuck_reasons(&self) -> impl Iterator<Item = Reason> {
        self.stuck.stuck().map(|(part, _)| Reason {
            part: part.word().to_owned(),
            code: format!("stuck_{}", part.word()),
            text: part.advice().to_owned(),
        })
    }

    pub(super) fn stuck_views(&self) -> Vec<StuckView> {
        let view = |(part, stalled): (Part, std::time::Duration)| StuckView {
            part: part.word().to_owned(),
            seconds: stalled.as_secs(),
        };
        self.stuck.stuck().map(view).collect()
    }

    fn begin_anew(&mut self, part: Part) {
        match part {
            Part::Source => {
                self.source.reconnect.send_replace(());
            }
            // What the session has sent is found out by the next one. A token that is drawn and not
            // used is in the store with all others.
            Part::Sink => self.lanes.own.sink = Sink::Waiting { until: self.clock.now() },
            // A thread cannot be ended, and a disk not hurried.
            Part::Transform | Part::Store | Part::Pipeline => {}
        }
    }

    /// Postgres has said, on the other connection, that there is more than the stream has brought.
    fn look_at_source(&self) -> Look {
        let status = self.source.status.borrow();
        // While something is unsettled, it may be us who keep it from reading.
        let is_free = self.takes() && self.tracker.is_idle();
        let doing = if self.source_reason.is_some() {
            Doing::KnownTrouble
        } else if is_free && status.wal_end > status.received {
            Doing::Working
        } else {
            Doing::Nothing
        };
        Look { doing, progress: status.moved.wrapping_add(status.received.0) }
    }

    pub(super) fn look_at_transforms(&self) -> Look {
        let doing = if self.halt_reason().is_some() {
            Doing::KnownTrouble
        } else if self.jobs.is_empty() {
            Doing::Nothing
        } else {
            Doing::Working
        };
        let done = self.next_job - self.jobs.len() as u64;
        Look { doing, progress: done.wrapping_add(self.workers.shaped()) }
    }

    fn look_at_sink(&self) -> Look {
        let is_known = |reason: &Reason| reason.code != CONNECTING;
        let doing = if self.lanes.own.reason.as_ref().is_some_and(is_known) {
            Doing::KnownTrouble
        } else if self.established && !self.lanes.own.is_busy() {
            Doing::Nothing
        } else {
            Doing::Working
        };
        Look { doing, progress: self.counters.records }
    }

    fn look_at_store(&self) -> Look {
        let (waiting, answered) = self.store.load();
        let doing = if waiting == 0 { Doing::Nothing } else { Doing::Working };
        Look { doing, progress: answered }
    }

    /// Unsettled changes that nobody has.
    fn look_at_pipeline(&self) -> Look {
        let somebody = !self.jobs.is_empty()
            || self.lanes.all().any(|(_, lane)| lane.is_busy() || lane.is_awaited())
            || !self.writes.is_empty()
            || self.writing.is_some()
            || self.reading.is_some()
            || self.spill.is_read();
        let unfinished = !self.tracker.is_idle() || (self.spill.is_on() && self.drains());
        let doing = if unfinished && !somebody { Doing::Working } else { Doing::Nothing };
        let Counters { changes, records, dropped, .. } = self.counters;
        Look { doing, progress: changes + records + dropped }
    }
}
