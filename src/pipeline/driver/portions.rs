//! How much a driver moves at once.

use std::time::Duration;

/// The sizes of its steps, in bytes as [`Change::bytes`](crate::change::Change::bytes) counts them, or
/// in changes, and how long a routed stream keeps what it has. They bound memory and connections, and
/// nothing else depends on them: the simulation draws them small, so that each is met with a few changes.
#[derive(Clone, Copy, Debug)]
pub struct Portions {
    /// Stored messages that are tried at once, beside the first.
    pub retry_bytes_max: usize,
    /// Stored messages that are read from the store at once.
    pub retry_messages: usize,
    /// A chunk of spilled changes is written when it has so many changes or bytes, or as soon as the
    /// disk is free.
    pub chunk_changes_max: usize,
    pub chunk_bytes_max: u64,
    /// What may wait in memory to be spilled.
    pub pending_bytes_max: u64,
    /// What may be in memory that came out of the spill.
    pub drain_bytes_max: usize,
    /// Once so little is left of the spill, the source pauses until it is through: a trickle would
    /// never end otherwise.
    pub closing_bytes: u64,
    /// Spilled changes of a job for the workers, as a batch of the source has them.
    pub job_changes: usize,
    /// Dead letters that are written at once.
    pub letters: usize,
    /// Sessions with routed streams at once. Over HTTP/1.1 each is a connection.
    pub sessions_max: usize,
    /// How long a routed stream keeps its session while others wait for one.
    pub session_turn: Duration,
    /// A routed stream that had nothing to do for so long is closed: to open one again takes a few
    /// requests and leaves a record in it.
    pub stream_idle: Duration,
}

impl Default for Portions {
    fn default() -> Self {
        Self {
            retry_bytes_max: 8 * 1024 * 1024,
            retry_messages: 64,
            chunk_changes_max: 1024,
            chunk_bytes_max: 1024 * 1024,
            pending_bytes_max: 8 * 1024 * 1024,
            drain_bytes_max: 8 * 1024 * 1024,
            closing_bytes: 4 * 1024 * 1024,
            job_changes: 256,
            letters: 256,
            sessions_max: 32,
            session_turn: Duration::from_secs(1),
            stream_idle: Duration::from_secs(60),
        }
    }
}
