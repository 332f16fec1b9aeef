//! What an instance's store holds on the host's side: the message being shaped, limits and logs.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use wasmtime::ResourceLimiter;

use super::bindings::logging::Level;
use super::breaches::Breaches;
use super::wasi::Wasi;
use crate::message::Draft;

/// How many of a message's log lines are kept.
const LOG_LINES_MAX: usize = 50;

/// A log line is cut here, in bytes.
const LOG_LINE_BYTES_MAX: usize = 2000;

/// How many lines per second one instance may write to the process's log.
const LOG_LINES_PER_SECOND_MAX: u32 = 100;

/// Core instances, memories and tables of one instance of a component. A component built by
/// componentize-py has about thirty core instances; fifty is what Spin allows.
const INSTANCES_MAX: usize = 64;
const MEMORIES_MAX: usize = 64;
const TABLES_MAX: usize = 64;

/// Elements of one table. A JavaScript engine fills tens of thousands; Spin allows as many.
const TABLE_ELEMENTS_MAX: usize = 100_000;

/// What stands for a change on the guest's side of a handle. The change itself is in
/// [`GuestState::message`]: there is only ever one, so a table to look it up in would only cost.
#[derive(Debug)]
pub enum ChangeHandle {}

/// The data of an instance's store.
pub(crate) struct GuestState {
    /// The message of the current call, and nothing between calls.
    pub(crate) message: Option<Message>,
    /// The number behind the current call's handle.
    pub(crate) handle: u32,
    /// When the current call is out of time. Host functions that take long look at it.
    pub(crate) deadline: Instant,
    /// What the current call's edits hold in the host's memory, in bytes.
    pub(crate) host_bytes: usize,
    pub(crate) limiter: Limiter,
    pub(crate) logs: Logs,
    pub(crate) wasi: Option<Box<Wasi>>,
}

impl GuestState {
    pub(crate) fn new(name: Arc<str>, memory_bytes_max: usize, with_wasi: bool) -> Self {
        Self {
            message: None,
            handle: 0,
            deadline: Instant::now(),
            host_bytes: 0,
            limiter: Limiter { memory_bytes: 0, memory_bytes_max },
            logs: Logs::new(name),
            wasi: with_wasi.then(|| Box::new(Wasi::new())),
        }
    }

    /// Takes the lines written since the message began, stdout and stderr of WASI included.
    pub(crate) fn take_logs(&mut self) -> Vec<String> {
        if let Some(wasi) = &self.wasi {
            for line in wasi.take_output() {
                self.logs.push(Level::Info, &line);
            }
        }
        self.logs.take()
    }
}

/// A message on its way through the chain: the draft, and what the host's own edits must remember
/// so that two transforms that write the same metadata add up.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) draft: Draft,
    /// `metadata.compressed_columns`.
    pub(crate) compressed: BTreeMap<String, Value>,
    /// `metadata.truncated_columns`.
    pub(crate) truncated: BTreeMap<String, Value>,
    /// The size that a guest asked for last, for the trace.
    pub(crate) measured: Option<u64>,
    /// Broken rules of the current call.
    pub(crate) breaches: Breaches,
}

impl Message {
    pub(crate) fn new(draft: Draft) -> Self {
        Self {
            draft,
            compressed: BTreeMap::new(),
            truncated: BTreeMap::new(),
            measured: None,
            breaches: Breaches::default(),
        }
    }
}

/// A guest asked for more than its settings give it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct LimitReached(pub(crate) String);

/// A host function noticed that the call is out of time.
#[derive(Debug, thiserror::Error)]
#[error("the time limit passed inside a host function")]
pub(crate) struct DeadlinePassed;

/// Holds an instance to its memory limit, over all its memories together.
#[derive(Debug)]
pub(crate) struct Limiter {
    /// What the instance holds now.
    pub(crate) memory_bytes: usize,
    pub(crate) memory_bytes_max: usize,
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let total = self.memory_bytes.saturating_add(desired.saturating_sub(current));
        if total > self.memory_bytes_max {
            // An error, not `false`: a trap here names who asked, where a failed growth would
            // surface as a panic in the guest's allocator, or not at all.
            return Err(LimitReached(format!(
                "it asked for {} MiB of memory, and its limit is {} MiB (`limits.memory_mib`)",
                total.div_ceil(1 << 20),
                self.memory_bytes_max >> 20
            ))
            .into());
        }
        self.memory_bytes = total;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if desired > TABLE_ELEMENTS_MAX {
            return Err(LimitReached(format!(
                "it asked for a table of {desired} elements, and {TABLE_ELEMENTS_MAX} are allowed"
            ))
            .into());
        }
        Ok(true)
    }

    fn instances(&self) -> usize {
        INSTANCES_MAX
    }

    fn tables(&self) -> usize {
        TABLES_MAX
    }

    fn memories(&self) -> usize {
        MEMORIES_MAX
    }
}

/// The log lines of one instance: kept for the current message, and handed to the process's log as
/// long as there are not too many.
#[derive(Debug)]
pub(crate) struct Logs {
    transform: Arc<str>,
    lines: VecDeque<String>,
    second: Instant,
    written: u32,
}

impl Logs {
    fn new(transform: Arc<str>) -> Self {
        Self { transform, lines: VecDeque::new(), second: Instant::now(), written: 0 }
    }

    /// The file that the lines are of.
    pub(crate) fn transform(&self) -> &Arc<str> {
        &self.transform
    }

    pub(crate) fn push(&mut self, level: Level, message: &str) {
        let line = printable(message);
        if self.may_write() {
            let transform = &*self.transform;
            match level {
                Level::Debug => tracing::debug!(target: "sluicebox::guest", transform, "{line}"),
                Level::Info => tracing::info!(target: "sluicebox::guest", transform, "{line}"),
                Level::Warn => tracing::warn!(target: "sluicebox::guest", transform, "{line}"),
                Level::Error => tracing::error!(target: "sluicebox::guest", transform, "{line}"),
            }
        }
        if self.lines.len() == LOG_LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(format!("{}: {line}", word(level)));
    }

    fn take(&mut self) -> Vec<String> {
        if self.lines.is_empty() { Vec::new() } else { std::mem::take(&mut self.lines).into() }
    }

    /// Counts a line against the current second.
    fn may_write(&mut self) -> bool {
        if self.second.elapsed() >= Duration::from_secs(1) {
            let left_out = self.written.saturating_sub(LOG_LINES_PER_SECOND_MAX);
            if left_out > 0 {
                tracing::warn!(
                    target: "sluicebox::guest",
                    transform = &*self.transform,
                    "{left_out} lines were left out: at most {LOG_LINES_PER_SECOND_MAX} per second"
                );
            }
            self.second = Instant::now();
            self.written = 0;
        }
        self.written += 1;
        self.written <= LOG_LINES_PER_SECOND_MAX
    }
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Debug => "debug",
        Level::Info => "info",
        Level::Warn => "warn",
        Level::Error => "error",
    }
}

/// The text cut to a line's length, without the control characters that a terminal would obey.
fn printable(text: &str) -> String {
    let cut = &text[..text.floor_char_boundary(LOG_LINE_BYTES_MAX)];
    cut.chars()
        .map(|character| match character {
            '\n' | '\t' => character,
            character if character.is_control() => '\u{FFFD}',
            character => character,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_are_cut_and_cannot_steer_a_terminal() {
        assert_eq!(printable("a\tb\nc"), "a\tb\nc");
        assert_eq!(printable("\u{1b}[31mred\r"), "\u{FFFD}[31mred\u{FFFD}");
        assert_eq!(printable(&"ä".repeat(2000)).len(), 2000);
        assert_eq!(printable(&format!("a{}", "ä".repeat(2000))).len(), 1999);
    }

    #[test]
    fn only_the_last_lines_of_a_message_are_kept() {
        let mut logs = Logs::new("10-x.wasm".into());
        for number in 0..200 {
            logs.push(Level::Warn, &number.to_string());
        }
        let lines = logs.take();
        assert_eq!(lines.len(), LOG_LINES_MAX);
        assert_eq!(lines.last().unwrap(), "warn: 199");
        assert_eq!(lines.first().unwrap(), "warn: 150");
        assert!(logs.take().is_empty());
    }

    #[test]
    fn memory_is_limited_over_all_memories_together() {
        let mut limiter = Limiter { memory_bytes: 0, memory_bytes_max: 3 << 20 };
        assert!(limiter.memory_growing(0, 1 << 20, None).unwrap());
        assert!(limiter.memory_growing(0, 1 << 20, None).unwrap());
        assert!(limiter.memory_growing(1 << 20, 2 << 20, None).unwrap());
        let error = limiter.memory_growing(0, 1 << 16, None).unwrap_err();
        assert!(error.is::<LimitReached>());
        assert_eq!(limiter.memory_bytes, 3 << 20);
        assert!(limiter.table_growing(0, TABLE_ELEMENTS_MAX, None).unwrap());
        assert!(limiter.table_growing(0, TABLE_ELEMENTS_MAX + 1, None).is_err());
    }
}
