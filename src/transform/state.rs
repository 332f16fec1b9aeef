//! What an instance's store holds on the host's side: the message being shaped, limits and logs.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use wasmtime::ResourceLimiter;

use super::bindings::logging::Level;
use super::breaches::Breaches;
use super::limits::Limits;
use super::wasi::Wasi;
use crate::message::Draft;

/// How many of a message's log lines are kept.
const LOG_LINES_MAX: usize = 50;

/// What lines begin with that a guest did not log but wrote to its standard output or error.
pub(crate) const OUTPUT: &str = "output: ";

/// A log line is cut here, in bytes.
const LOG_LINE_BYTES_MAX: usize = 2000;

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
    pub(crate) host_bytes_max: usize,
    pub(crate) limiter: Limiter,
    pub(crate) logs: Logs,
    pub(crate) wasi: Option<Box<Wasi>>,
}

impl GuestState {
    /// `wasi`: for a module that imports it. `logs`: what becomes of what it logs.
    pub(crate) fn new(limits: &Limits, wasi: Option<Wasi>, logs: Logs) -> Self {
        Self {
            message: None,
            handle: 0,
            deadline: Instant::now(),
            host_bytes: 0,
            host_bytes_max: limits.edits_bytes_max,
            limiter: Limiter::new(limits),
            logs,
            wasi: wasi.map(Box::new),
        }
    }

    /// Takes the lines written since the message began, stdout and stderr of WASI included. What a guest
    /// said last in a call that `failed` is no line that somebody meant for a log: a panic's message, an
    /// exception and its stack, with whatever value was at hand. It is kept for the message alone.
    pub(crate) fn take_logs(&mut self, failed: bool) -> Vec<String> {
        let output = self.wasi.as_ref().map(|wasi| wasi.take_output()).unwrap_or_default();
        if failed {
            self.logs.last = None;
        }
        for line in output {
            self.logs.push_output(&line, failed);
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

/// Holds an instance to its limits, over all its memories and all its tables together.
#[derive(Debug)]
pub(crate) struct Limiter {
    /// What the instance holds now.
    pub(crate) memory_bytes: usize,
    pub(crate) memory_bytes_max: usize,
    table_elements: usize,
    table_elements_max: usize,
    instances_max: usize,
}

impl Limiter {
    fn new(limits: &Limits) -> Self {
        Self {
            memory_bytes: 0,
            memory_bytes_max: limits.memory_bytes_max,
            table_elements: 0,
            table_elements_max: limits.table_elements_max,
            instances_max: limits.instances_max,
        }
    }
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
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let max = self.table_elements_max;
        let total = self.table_elements.saturating_add(desired.saturating_sub(current));
        if total > max {
            return Err(LimitReached(format!(
                "it asked for {total} elements of tables, and its limit is {max} \
                 (`limits.table_elements`)"
            ))
            .into());
        }
        self.table_elements = total;
        Ok(true)
    }

    fn instances(&self) -> usize {
        self.instances_max
    }

    fn tables(&self) -> usize {
        self.instances_max
    }

    fn memories(&self) -> usize {
        self.instances_max
    }
}

/// The log lines of one instance: kept for the current message, and handed to the process's log as
/// long as there are not too many.
#[derive(Debug)]
pub(crate) struct Logs {
    transform: Arc<str>,
    /// Lines are kept for the message and not handed on: it is only tried.
    quiet: bool,
    lines: VecDeque<String>,
    /// What is handed on once it is known that the guest went on behind it.
    last: Option<(Level, String)>,
    quota: Arc<LogQuota>,
    per_second_max: u32,
}

/// How many lines a transform has written in the current second: all of its instances together, since
/// one that fails at every message has a fresh instance for each.
#[derive(Debug, Default)]
pub(crate) struct LogQuota(Mutex<(Option<Instant>, u32)>);

impl LogQuota {
    /// Counts a line. Answers whether it may be written, and how many were left out of the second that
    /// has just ended.
    pub(super) fn count(&self, now: Instant, max: u32) -> (bool, u32) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (second, written) = &mut *state;
        let began = *second.get_or_insert(now);
        let mut left_out = 0;
        if now.saturating_duration_since(began) >= Duration::from_secs(1) {
            left_out = written.saturating_sub(max);
            (*second, *written) = (Some(now), 0);
        }
        *written = written.saturating_add(1);
        (*written <= max, left_out)
    }

    /// How many lines there were in this second.
    #[cfg(test)]
    pub(super) fn written(&self) -> u32 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

impl Logs {
    /// `quiet`: lines are kept out of the process's log.
    pub(crate) fn new(
        transform: Arc<str>,
        per_second_max: u32,
        quota: Arc<LogQuota>,
        quiet: bool,
    ) -> Self {
        let lines = VecDeque::new();
        Self { transform, quiet, lines, last: None, quota, per_second_max }
    }

    /// The file that the lines are of.
    pub(crate) fn transform(&self) -> &Arc<str> {
        &self.transform
    }

    pub(crate) fn push(&mut self, level: Level, message: &str) {
        let line = printable(message);
        self.keep(format!("{}: {line}", word(level)));
        self.hand_on();
        self.last = (!self.quiet).then_some((level, line));
    }

    /// A line of standard output or error, for the message alone where it is one of its `last_words`.
    fn push_output(&mut self, message: &str, last_words: bool) {
        let line = printable(message);
        self.keep(format!("{OUTPUT}{line}"));
        if !last_words {
            self.hand_on();
            self.last = (!self.quiet).then_some((Level::Info, line));
        }
    }

    /// Hands the last line on to the process's log, as far as it may be. What is one line there stays one:
    /// the next would look like one of ours.
    fn hand_on(&mut self) {
        let Some((level, line)) = self.last.take() else { return };
        if self.may_write() {
            let (transform, line) = (&*self.transform, line.replace('\n', "\\n"));
            match level {
                Level::Debug => tracing::debug!(target: "sluicebox::guest", transform, "{line}"),
                Level::Info => tracing::info!(target: "sluicebox::guest", transform, "{line}"),
                Level::Warn => tracing::warn!(target: "sluicebox::guest", transform, "{line}"),
                Level::Error => tracing::error!(target: "sluicebox::guest", transform, "{line}"),
            }
        }
    }

    fn keep(&mut self, line: String) {
        if self.lines.len() == LOG_LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn take(&mut self) -> Vec<String> {
        self.hand_on();
        if self.lines.is_empty() { Vec::new() } else { std::mem::take(&mut self.lines).into() }
    }

    /// Counts a line against the current second.
    fn may_write(&self) -> bool {
        let max = self.per_second_max;
        let (may, left_out) = self.quota.count(Instant::now(), max);
        if left_out > 0 {
            tracing::warn!(
                target: "sluicebox::guest",
                transform = &*self.transform,
                "{left_out} lines were left out: at most {max} per second \
                 (`limits.log_lines_per_second`)"
            );
        }
        may
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

/// Whether a terminal would obey a character: controls, those that turn the direction of what comes behind
/// them, and other line ends.
pub(crate) fn steers(c: char) -> bool {
    let turns =
        matches!(c, '\u{200E}' | '\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}');
    c.is_control() || turns
}

/// The text cut to a line's length, without the characters that a terminal would obey.
pub(super) fn printable(text: &str) -> String {
    let cut = &text[..text.floor_char_boundary(LOG_LINE_BYTES_MAX)];
    cut.chars()
        .map(|character| match character {
            '\n' | '\t' => character,
            character if steers(character) => '\u{FFFD}',
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
        assert_eq!(
            printable("\u{202E}back\u{2028}next\u{9b}1m"),
            "\u{FFFD}back\u{FFFD}next\u{FFFD}1m"
        );
        assert_eq!(printable(&"ä".repeat(2000)).len(), 2000);
        assert_eq!(printable(&format!("a{}", "ä".repeat(2000))).len(), 1999);
    }

    #[test]
    fn only_the_last_lines_of_a_message_are_kept() {
        let mut logs = Logs::new("10-x.wasm".into(), 100, Arc::default(), false);
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
    fn so_many_lines_a_second_are_written_and_no_more() {
        let quota = LogQuota::default();
        let start = Instant::now();
        let count = |millis| quota.count(start + Duration::from_millis(millis), 3);
        let first: Vec<bool> = (0..5).map(|n| count(n).0).collect();
        assert_eq!(first, [true, true, true, false, false]);
        assert_eq!(count(999), (false, 0));
        // Said once, when the next second begins.
        assert_eq!(count(1000), (true, 3));
        assert_eq!(count(1001), (true, 0));
    }

    #[test]
    fn memory_is_limited_over_all_memories_together() {
        let limits = Limits { memory_bytes_max: 3 << 20, ..Limits::default() };
        let mut limiter = Limiter::new(&limits);
        assert!(limiter.memory_growing(0, 1 << 20, None).unwrap());
        assert!(limiter.memory_growing(0, 1 << 20, None).unwrap());
        assert!(limiter.memory_growing(1 << 20, 2 << 20, None).unwrap());
        let error = limiter.memory_growing(0, 1 << 16, None).unwrap_err();
        assert!(error.is::<LimitReached>());
        assert_eq!(limiter.memory_bytes, 3 << 20);
        assert!(limiter.table_growing(0, 100_000, None).unwrap());
        assert!(limiter.table_growing(0, 100_001, None).is_err());
    }
}
