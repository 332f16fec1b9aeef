//! One instance of a module: a store with its limits, and the two calls into it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmtime::component::{Resource, ResourceTableError};
use wasmtime::{Store, Trap, WasmBacktrace};

use super::bindings;
use super::bindings::types::Verdict;
use super::chain::Transform;
use super::engine::{Engine, ticks};
use super::limits::Limits;
use super::loader::{self, Module};
use super::settings::{Isolation, Settings};
use super::state::{DeadlinePassed, GuestState, LimitReached, Logs, Message, OUTPUT};
use super::wasi::Wasi;

/// `init` may take at least this long, whatever the limit of a change: it happens once, and an
/// interpreter starts in it.
const INIT_TIME_MIN: Duration = Duration::from_secs(10);

/// After how many calls an instance is replaced. Fresh instances of a compiled language cost 17 µs
/// and those of an interpreter milliseconds; interpreters leak (ComponentizeJS #279).
const CALLS_MAX: u64 = 10_000;
const CALLS_OF_INTERPRETER_MAX: u64 = 1000;

/// What a guest's own words stand behind in a reason. There may be values of rows in them, so that they are
/// for whoever looks at the message, and for no log: see [`without_words`]. The first is for a sentence of
/// ours that goes on behind the reason, so that the words come last.
pub(crate) const SAID: &str = "; what it said of it: ";
const FAILED: &str = "failed the message: ";
const WROTE: &str = "; it wrote: ";
const LAST_LINE: &str = "; its last log line: ";

/// A guest's own error text is cut here, in bytes.
const GUEST_TEXT_BYTES_MAX: usize = 2000;

/// The kinds of failure, as operators see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The guest crashed.
    Trap,
    /// It ran out of time.
    Timeout,
    /// It asked for more memory, handles or data than it may have.
    Limit,
    /// It answered with an error of its own.
    Guest,
    /// What it answered breaks the interface's rules.
    Invalid,
}

impl Class {
    /// The word in errors, traces and filters.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Timeout => "timeout",
            Self::Limit => "limit",
            Self::Guest => "guest",
            Self::Invalid => "invalid",
        }
    }
}

/// A failure's text for logs and probes: up to where the guest's own words begin, and whether there are any.
pub(crate) fn without_words(text: &str) -> (&str, bool) {
    let begins = [SAID, FAILED, WROTE, LAST_LINE].iter().filter_map(|mark| text.find(mark)).min();
    // The mark's own words are ours, and say where the others would stand.
    let end = begins.map(|begin| {
        if text[begin..].starts_with(FAILED) { begin + FAILED.len() - 2 } else { begin }
    });
    (&text[..end.unwrap_or(text.len())], end.is_some())
}

/// Why one call failed. `reason` follows the transform's name in a sentence.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) class: Class,
    pub(crate) reason: String,
    /// The guest's functions, innermost first.
    pub(crate) backtrace: Vec<String>,
    /// What it logged, where it failed while it was starting: its instance is gone, and nobody else has
    /// them.
    pub(crate) logs: Vec<String>,
}

impl Fault {
    pub(crate) fn new(class: Class, reason: impl Into<String>) -> Self {
        Self { class, reason: reason.into(), backtrace: Vec::new(), logs: Vec::new() }
    }

    /// A trap says little by itself; what the guest logged last is usually its panic message, and what it
    /// wrote to its standard output or error is an exception with its stack.
    pub(crate) fn with_last_words(mut self, logs: &[String], module: &Module) -> Self {
        if self.class != Class::Trap {
            return self;
        }
        let written: Vec<&str> =
            logs.iter().rev().map_while(|line| line.strip_prefix(OUTPUT)).collect();
        if !written.is_empty() {
            let lines = written.into_iter().rev().filter(|line| !line.trim().is_empty());
            let text = lines.map(str::trim).collect::<Vec<_>>().join(" / ");
            self.reason.push_str(WROTE);
            self.reason.push_str(&without_middle(&text));
        } else if let Some(words) = logs.last() {
            self.reason.push_str(LAST_LINE);
            self.reason.push_str(words);
            return self;
        }
        if module.is_interpreter {
            self.reason.push_str(
                "; to read the exception here, catch it in the module and fail the message with its text, \
                 as the projects of `sluicebox transforms new` do",
            );
        }
        self
    }

    /// What went wrong in a call, from what wasmtime says about it.
    fn of(error: &wasmtime::Error, limits: &Limits, time_max: Duration) -> Self {
        let timeout = || {
            let limit = time_max.as_millis();
            (Class::Timeout, format!("ran for more than {limit} ms (`limits.time_ms`)"))
        };
        let (class, reason) = if let Some(limit) = error.downcast_ref::<LimitReached>() {
            (Class::Limit, format!("reached a limit: {limit}"))
        } else if error.is::<DeadlinePassed>() {
            timeout()
        } else if let Some(trap) = error.downcast_ref::<Trap>() {
            of_trap(*trap).unwrap_or_else(timeout)
        } else {
            let text = cause(error);
            // Wasmtime has no type for this one.
            if text.contains("fuel allocated for hostcalls") {
                let limit = limits.call_bytes_max >> 20;
                let reason = format!(
                    "reached a limit: it passed more than {limit} MiB in a call \
                     (`limits.call_mib`)"
                );
                (Class::Limit, reason)
            } else if matches!(
                error.downcast_ref::<ResourceTableError>(),
                Some(ResourceTableError::Full)
            ) || text.contains("handle limit exceeded")
            {
                let limit = limits.handles_max;
                let reason = format!(
                    "reached a limit: it holds more than {limit} handles (`limits.handles`)"
                );
                (Class::Limit, reason)
            } else if text.contains("resource limit exceeded") {
                let limit = limits.instances_max;
                let reason = format!(
                    "reached a limit: it has more than {limit} instances, memories or tables \
                     (`limits.instances`)"
                );
                (Class::Limit, reason)
            } else if let Some(exit) = error.downcast_ref::<wasmtime_wasi::I32Exit>() {
                (Class::Trap, format!("ended itself with exit code {}", exit.0))
            } else {
                // Not a trap of its code: text that is not UTF-8, a handle that it kept, and the
                // like.
                (Class::Invalid, format!("broke the interface's rules: {text}"))
            }
        };
        Self { backtrace: backtrace(error), ..Self::new(class, reason) }
    }
}

/// The kinds of trap; nothing for the one that is the end of a call's time.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "wasmtime may add traps, and what has no class of its own is a trap"
)]
fn of_trap(trap: Trap) -> Option<(Class, String)> {
    let text = trap.to_string();
    let text = text.strip_prefix("wasm trap: ").unwrap_or(&text);
    Some(match trap {
        Trap::Interrupt => return None,
        Trap::StackOverflow => {
            (Class::Limit, "reached a limit: its calls went too deep".to_owned())
        }
        Trap::AllocationTooLarge => {
            (Class::Limit, "reached a limit: it asked for too large an allocation".to_owned())
        }
        // What a guest's bindings hand over, and not its own code.
        Trap::InvalidChar
        | Trap::InvalidDiscriminant
        | Trap::ListOutOfBounds
        | Trap::StringOutOfBounds
        | Trap::UnalignedPointer => {
            (Class::Invalid, format!("broke the interface's rules: {text}"))
        }
        _ => (Class::Trap, format!("trapped: {text}")),
    })
}

/// An error's causes without the backtrace that wasmtime adds as the outermost.
fn cause(error: &wasmtime::Error) -> String {
    if error.is::<WasmBacktrace>() { error.root_cause().to_string() } else { loader::chain(error) }
}

fn backtrace(error: &wasmtime::Error) -> Vec<String> {
    let Some(backtrace) = error.downcast_ref::<WasmBacktrace>() else { return Vec::new() };
    let frame = |frame: &wasmtime::FrameInfo| {
        let names: Vec<String> = frame
            .symbols()
            .iter()
            .filter_map(|symbol| {
                let name = symbol.name()?;
                Some(match (symbol.file(), symbol.line()) {
                    (Some(file), Some(line)) => format!("{name} ({file}:{line})"),
                    _ => name.to_owned(),
                })
            })
            .collect();
        if !names.is_empty() {
            return names;
        }
        let name = frame.func_name().map_or_else(
            || format!("function {}", frame.func_index()),
            |name| format!("{:#}", rustc_demangle::demangle(name)),
        );
        vec![name]
    };
    backtrace.frames().iter().flat_map(frame).collect()
}

/// The instance of one worker.
pub(crate) struct Instance {
    store: Store<GuestState>,
    guest: bindings::Transform,
    calls: u64,
    /// What it held after `init`.
    memory_at_start: usize,
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Instance").field("calls", &self.calls).finish_non_exhaustive()
    }
}

impl Instance {
    /// Instantiates a transform's module and calls its `init`. What a `quiet` one logs is kept out of
    /// the process's log.
    pub(crate) fn new(engine: &Engine, transform: &Transform, quiet: bool) -> Result<Self, Fault> {
        let Transform { file, module, settings, counters, .. } = transform;
        let max = settings.limits.log_lines_per_second_max;
        let logs = Logs::new(Arc::clone(file), max, Arc::clone(&counters.logs), quiet);
        Self::begin(engine, module, settings, logs)
    }

    /// The same for a module that is not part of a chain, to see whether it starts.
    pub(crate) fn start(
        engine: &Engine,
        file: &Arc<str>,
        module: &Module,
        settings: &Settings,
        quiet: bool,
    ) -> Result<Self, Fault> {
        let max = settings.limits.log_lines_per_second_max;
        Self::begin(
            engine,
            module,
            settings,
            Logs::new(Arc::clone(file), max, Arc::default(), quiet),
        )
    }

    fn begin(
        engine: &Engine,
        module: &Module,
        settings: &Settings,
        logs: Logs,
    ) -> Result<Self, Fault> {
        let limits = &settings.limits;
        let wasi = module.wants_wasi.then(|| Wasi::new(&settings.env, limits.handles_max));
        let wasi = wasi.transpose().map_err(|reason| Fault::new(Class::Invalid, reason))?;
        let state = GuestState::new(limits, wasi, logs);
        let mut store = Store::new(engine.wasm(), state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(limits.call_bytes_max);
        store.set_max_component_handles(limits.handles_max);
        // Before instantiating: a new store's deadline is now.
        let time_max = limits.time_max.max(INIT_TIME_MIN);
        store.set_epoch_deadline(ticks(time_max));
        store.data_mut().deadline = Instant::now() + time_max;

        let started = module.pre.instantiate(&mut store).and_then(|guest| {
            let answer = guest.call_init(&mut store, &settings.config)?;
            Ok((guest, answer))
        });
        let (guest, answer) = started.map_err(|error| {
            // Nobody gives it a row's values before it has started.
            let logs = store.data_mut().take_logs(false);
            let fault = Fault::of(&error, limits, time_max).with_last_words(&logs, module);
            Fault { reason: format!("{} (while it was starting)", fault.reason), logs, ..fault }
        })?;
        answer.map_err(|text| {
            let reason = format!("refused its settings: {}", shortened(&text));
            let logs = store.data_mut().take_logs(false);
            Fault { logs, ..Fault::new(Class::Guest, reason) }
        })?;
        let memory_at_start = store.data().limiter.memory_bytes;
        Ok(Self { store, guest, calls: 0, memory_at_start })
    }

    /// Gives the guest a message to shape. The message stays in the store until
    /// [`Self::take_message`], whatever happens.
    pub(crate) fn call(
        &mut self,
        limits: &Limits,
        started: Instant,
        message: Message,
    ) -> Result<Verdict, Fault> {
        let time_max = limits.time_max;
        self.calls += 1;
        self.store.set_epoch_deadline(ticks(time_max));
        let state = self.store.data_mut();
        state.deadline = started + time_max;
        state.host_bytes = 0;
        state.handle = state.handle.wrapping_add(1);
        state.message = Some(message);
        let handle = Resource::new_borrow(state.handle);
        match self.guest.call_transform(&mut self.store, handle) {
            Ok(Ok(verdict)) => Ok(verdict),
            Ok(Err(text)) => Err(Fault::new(Class::Guest, format!("{FAILED}{}", shortened(&text)))),
            Err(error) => Err(Fault::of(&error, limits, time_max)),
        }
    }

    pub(crate) fn take_message(&mut self) -> Option<Message> {
        self.store.data_mut().message.take()
    }

    /// The lines of the last call, which `failed` or not.
    pub(crate) fn take_logs(&mut self, failed: bool) -> Vec<String> {
        self.store.data_mut().take_logs(failed)
    }

    /// What its memories hold now.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.store.data().limiter.memory_bytes
    }

    /// Whether a fresh instance is better for the next message, or asked for.
    pub(crate) fn is_spent(&self, module: &Module, isolation: Isolation) -> bool {
        let calls_max = if module.is_interpreter { CALLS_OF_INTERPRETER_MAX } else { CALLS_MAX };
        let limiter = &self.store.data().limiter;
        let has_grown = limiter.memory_bytes > limiter.memory_bytes_max / 2
            && limiter.memory_bytes / 2 > self.memory_at_start;
        isolation == Isolation::Fresh || self.calls >= calls_max || has_grown
    }
}

/// A text of which beginning and end tell most: an exception's text is first in some languages, and last
/// in others.
fn without_middle(text: &str) -> String {
    const HALF: usize = 400;
    if text.len() <= 2 * HALF {
        return text.to_owned();
    }
    let head = text.floor_char_boundary(HALF);
    let tail = text.ceil_char_boundary(text.len() - HALF);
    format!("{} … {}", &text[..head], &text[tail..])
}

fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(GUEST_TEXT_BYTES_MAX)]
}
