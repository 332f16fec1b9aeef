//! A replication connection with its clocks: Postgres goes on hearing from us whatever is waited for.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::change::Lsn;
use crate::source::error::Error;
use crate::source::transport::Replication;

/// How often clocks are looked at: whether to send a status update, whether the server is silent,
/// whether to stop.
const TICK: Duration = Duration::from_millis(100);

/// A status update goes out at least this often, and with each tick where more was confirmed.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// A connection and its clocks.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: Replication,
    pub(super) pulse: Pulse,
    /// Postgres shuts down and waits for us.
    pub(super) going_down: CancellationToken,
    /// Our owner has had enough of this connection.
    pub(super) reconnects: watch::Receiver<()>,
    /// See [`SourceStatus::moved`](crate::source::SourceStatus::moved).
    pub(super) moved: u64,
}

impl Link {
    /// Waits for something else while Postgres goes on hearing from us.
    pub(super) async fn alive<T>(&mut self, wait: impl Future<Output = T>) -> Result<T, Error> {
        tokio::pin!(wait);
        loop {
            tokio::select! {
                biased;
                done = &mut wait => {
                    // Nothing was read meanwhile; that is not the server's silence.
                    self.pulse.heard();
                    return Ok(done);
                }
                _now = self.pulse.tick.tick() => self.on_tick().await?,
            }
        }
    }

    /// Sends a status update if one is due.
    pub(super) async fn on_tick(&mut self) -> Result<(), Error> {
        if self.going_down.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        if self.reconnects.has_changed().unwrap_or(false) {
            return Err(Error::Stuck);
        }
        let risen = self.pulse.take_confirmed();
        if risen || self.pulse.sent_at.elapsed() >= self.pulse.status_interval {
            let request_reply = self.pulse.heard_at.elapsed() > self.pulse.silence_max / 2;
            self.status(request_reply).await?;
        }
        Ok(())
    }

    pub(super) async fn status(&mut self, request_reply: bool) -> Result<(), Error> {
        self.pulse.take_confirmed();
        self.pulse.sent_at = Instant::now();
        self.connection.send_status(self.pulse.confirmed, request_reply).await
    }
}

/// When to say what to the server.
#[derive(Debug)]
pub(super) struct Pulse {
    pub(super) tick: Interval,
    pub(super) status_interval: Duration,
    pub(super) silence_max: Duration,
    pub(super) source: watch::Receiver<Lsn>,
    pub(super) confirmed: Lsn,
    pub(super) wal_end: Lsn,
    pub(super) sent_at: Instant,
    pub(super) heard_at: Instant,
    /// The `sent_at` of the last published status.
    pub(super) published: Instant,
}

impl Pulse {
    pub(super) fn new(
        source: watch::Receiver<Lsn>,
        floor: Lsn,
        sender_timeout: Option<Duration>,
        silence_max: Duration,
    ) -> Self {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let now = Instant::now();
        // Well within what the server allows, where that is short.
        let status_interval =
            sender_timeout.map_or(STATUS_INTERVAL, |timeout| STATUS_INTERVAL.min(timeout / 4));
        let confirmed = floor.max(*source.borrow());
        Self {
            tick,
            status_interval,
            silence_max,
            source,
            confirmed,
            wal_end: Lsn::default(),
            sent_at: now,
            heard_at: now,
            published: now,
        }
    }

    /// Looks at what the owner has confirmed; whether that is more than before.
    pub(super) fn take_confirmed(&mut self) -> bool {
        let confirmed = *self.source.borrow();
        let risen = confirmed > self.confirmed;
        self.confirmed = self.confirmed.max(confirmed);
        risen
    }

    pub(super) fn heard(&mut self) {
        self.heard_at = Instant::now();
    }

    pub(super) fn check_silence(&self) -> Result<(), Error> {
        let silence = self.heard_at.elapsed();
        if silence > self.silence_max { Err(Error::Silent { silence }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_confirmed_only_rises() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _guard = runtime.enter();
        let (confirm, confirmed) = watch::channel(Lsn(5));
        let mut pulse = Pulse::new(confirmed, Lsn(7), None, Duration::from_secs(60));
        assert_eq!(pulse.confirmed, Lsn(7), "never below the slot");
        for (told, risen, expected) in [(6, false, 7), (9, true, 9), (9, false, 9), (8, false, 9)] {
            confirm.send_replace(Lsn(told));
            assert_eq!((pulse.take_confirmed(), pulse.confirmed), (risen, Lsn(expected)));
        }
    }
}
