//! When to read a stream that is always ready to be read.

use std::time::Duration;

use tokio::time::Instant;

/// Lets a busy stream gather for a moment before it is read again.
///
/// A walsender sends each change by itself. Read as they come, a busy stream costs a system call and
/// a wake-up of two threads for each; a millisecond apart, one for a hundred. A stream that is not
/// busy is never waited for.
#[derive(Debug)]
pub(super) struct Pace {
    since: Instant,
    bytes: usize,
    until: Option<Instant>,
}

/// What makes a stream busy: so many bytes within [`BUSY_TIME`].
const BUSY_BYTES: usize = 32 * 1024;
const BUSY_TIME: Duration = Duration::from_millis(2);

/// A read of fewer bytes has most likely emptied the socket.
const EMPTIED_BYTES: usize = 64 * 1024;

/// How long a busy stream gathers. The socket's buffer holds what comes meanwhile.
const GATHER: Duration = Duration::from_millis(1);

impl Pace {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), bytes: 0, until: None }
    }

    pub(super) fn read(&mut self, bytes: usize) {
        let now = Instant::now();
        if now.duration_since(self.since) > BUSY_TIME {
            self.since = now;
            self.bytes = 0;
        }
        self.bytes += bytes;
        let gathers = self.bytes >= BUSY_BYTES && bytes < EMPTIED_BYTES;
        self.until = gathers.then(|| now + GATHER);
    }

    /// Cancel-safe.
    pub(super) async fn wait(&self) {
        if let Some(until) = self.until {
            tokio::time::sleep_until(until).await;
        }
    }
}
