//! Checking and compiling in a process of its own.
//!
//! What a compiler takes for a function grows faster than the function: half a megabyte of nested loops
//! takes minutes and gigabytes, and nobody can stop a compiler inside of this process. And what parser and
//! compiler have no defence against would take the whole process with it: at each start again. So what a
//! file holds is first looked at by a process with limits of its own, and a file that was never compiled
//! before costs one. Nesting, which would take their stack, is refused before they see it (see `loader`),
//! for whoever compiles here.
//!
//! Where no process can be started, small functions are still compiled here.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, setrlimit};
use wasmparser::{Parser, Payload};
use wasmtime::component::Component;

use super::engine::Engine;
use super::loader::{self, Error, chain};

/// The hidden command of this program that compiles what is on its standard input.
pub(crate) const COMMAND: &str = "compile-module";

/// From these sizes on, a module may keep a compiler busy: a function as large as this takes a second at
/// the worst, and all that fit into a file of the other size a few.
const FUNCTION_BYTES: usize = 64 * 1024;
const MODULE_BYTES: usize = 1024 * 1024;

/// How long compiling may take. JavaScript and Python take half a minute of two busy processors.
const TIME_MAX: Duration = Duration::from_secs(300);

/// How much memory it may take, in bytes. JavaScript and Python take 400 MiB.
const MEMORY_BYTES_MAX: u64 = 2 * 1024 * 1024 * 1024;

/// The other process's exit codes for what it refuses, and for what more bytes might mend.
pub(crate) const REFUSED: u8 = 1;
pub(crate) const UNFINISHED: u8 = 3;

/// How much of what the other process says is read.
const SAID_BYTES_MAX: u64 = 16 * 1024;

/// Who compiles.
#[derive(Clone, Debug)]
pub(crate) enum Compiler {
    /// This process, whatever it takes.
    Here,
    /// This program in another process. It is ended when somebody stops it.
    Apart(PathBuf, Stop),
}

/// Says that nobody needs the result any more. Cloned handles are the same one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(crate) fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Compiler {
    /// With this very program, also where its file was replaced meanwhile.
    pub(crate) fn apart() -> Self {
        let itself = PathBuf::from("/proc/self/exe");
        let itself = if itself.exists() { Some(itself) } else { std::env::current_exe().ok() };
        itself.map_or(Self::Here, |program| Self::Apart(program, Stop::default()))
    }

    /// The same for work that can be stopped.
    pub(crate) fn until(&self, stop: &Stop) -> Self {
        match self {
            Self::Here => Self::Here,
            Self::Apart(program, _) => Self::Apart(program.clone(), stop.clone()),
        }
    }

    /// Checks and compiles a file's bytes.
    pub(super) fn compile(&self, engine: &Engine, bytes: &[u8]) -> Result<Component, Error> {
        let failed = |error: wasmtime::Error| Error::Compile { reason: chain(&error) };
        if let Self::Apart(program, stop) = self {
            let mut command = Command::new(program);
            command.arg(COMMAND).env_clear();
            match compile_apart(command, bytes, TIME_MAX, stop) {
                Ok(code) => return super::cache::deserialize(engine.wasm(), &code).map_err(failed),
                Err(Failure::Start(error)) if !is_demanding(bytes) => {
                    tracing::warn!("a module is compiled without a process of its own: {error}");
                }
                Err(failure) => return Err(failure.into()),
            }
        }
        let component = loader::check(bytes)?;
        loader::caught(|| {
            Component::from_binary(engine.wasm(), &component)
                .map_err(|error| loader::of_engine(&error))
        })
    }
}

/// Why another process gave no code.
#[derive(Debug)]
enum Failure {
    Start(std::io::Error),
    /// It says why.
    Refused {
        reason: String,
        may_be_unfinished: bool,
    },
    /// It was ended, or broke off.
    Ended(String),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Start(error) => {
                Self::Compile { reason: format!("no process could be started for it: {error}") }
            }
            Failure::Refused { reason, may_be_unfinished } => {
                Self::Apart { reason, may_be_unfinished }
            }
            Failure::Ended(reason) => Self::BrokeOff { reason },
        }
    }
}

pub(super) fn is_demanding(component: &[u8]) -> bool {
    component.len() >= MODULE_BYTES || largest_function(component) >= FUNCTION_BYTES
}

/// The size of a component's largest function, in bytes.
fn largest_function(component: &[u8]) -> usize {
    let payloads = Parser::new(0).parse_all(component).map_while(Result::ok);
    let bytes = payloads.filter_map(|payload| {
        let Payload::CodeSectionEntry(body) = payload else { return None };
        Some(body.range().len())
    });
    bytes.max().unwrap_or(0)
}

/// What a process of its own makes of a component, or why it does not.
fn compile_apart(
    mut command: Command,
    component: &[u8],
    time_max: Duration,
    stop: &Stop,
) -> Result<Vec<u8>, Failure> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Failure::Start)?;
    let (Some(mut input), Some(mut output), Some(said)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        unreachable!("all three were asked for")
    };
    thread::scope(|scope| {
        scope.spawn(move || {
            // A process that has ended reads no more, and says why itself.
            input.write_all(component).ok();
        });
        let code = scope.spawn(move || {
            let mut code = Vec::new();
            output.read_to_end(&mut code).map(|_| code)
        });
        let said = scope.spawn(move || {
            let mut text = Vec::new();
            said.take(SAID_BYTES_MAX).read_to_end(&mut text).ok();
            String::from_utf8_lossy(&text).into_owned()
        });
        let started = Instant::now();
        let status = loop {
            match child.try_wait().map_err(Failure::Start)? {
                Some(status) => break Some(status),
                None if started.elapsed() >= time_max || stop.is_stopped() => break None,
                None => thread::sleep(Duration::from_millis(10)),
            }
        };
        if status.is_none() {
            // An error: it has ended in this moment.
            child.kill().ok();
            child.wait().ok();
        }
        let (code, said) = (code.join(), said.join());
        let largest = largest_function(component);
        let mend = format!(
            "its largest function has {largest} bytes; build it with smaller ones, such as with \
             optimisation for size and without inlining"
        );
        let said = said.unwrap_or_default().trim_end().to_owned();
        let refused =
            |may_be_unfinished| Failure::Refused { reason: said.clone(), may_be_unfinished };
        match (status, code) {
            (None, _) if stop.is_stopped() => {
                Err(Failure::Ended("it changed while it was compiled".to_owned()))
            }
            (None, _) => {
                let after = time_max.as_secs();
                let reason = format!("it took more than {after} s, and was given up; {mend}");
                Err(Failure::Ended(reason))
            }
            (Some(status), Ok(Ok(code))) if status.success() => Ok(code),
            (Some(status), _) if status.code() == Some(REFUSED.into()) => Err(refused(false)),
            (Some(status), _) if status.code() == Some(UNFINISHED.into()) => Err(refused(true)),
            (Some(status), _) if said.contains("overflowed its stack") => {
                Err(Failure::Ended(format!(
                    "the process that read it ran out of stack ({}): its types or blocks are nested far too \
                 deeply",
                    ending(status)
                )))
            }
            (Some(status), _) => Err(Failure::Ended(format!(
                "the process that compiled it broke off ({}): it may take {} MiB of memory; {mend}",
                ending(status),
                MEMORY_BYTES_MAX >> 20
            ))),
        }
    })
}

fn ending(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "for an unknown reason".to_owned(),
    }
}

/// The other process: checks a file's bytes, compiles them with this engine's settings and gives the code.
///
/// # Errors
///
/// What there is to be said of the file, and the exit code that tells what is behind that.
pub(crate) fn compile_for_parent(bytes: &[u8]) -> Result<Vec<u8>, (String, u8)> {
    let limit = |bytes| Rlimit { current: Some(bytes), maximum: Some(bytes) };
    // Where a system has no such limit, there is only the one of time.
    setrlimit(Resource::Data, limit(MEMORY_BYTES_MAX)).ok();
    setrlimit(Resource::Core, limit(0)).ok();
    // Should nobody be left to end this: over all processors together.
    setrlimit(Resource::Cpu, limit(TIME_MAX.as_secs() * 4)).ok();
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).ok();
    // Its standard error is for the reason alone, which a panic is part of.
    std::panic::set_hook(Box::new(|_| {}));
    let refused = |error: &Error| {
        (error.to_string(), if error.may_be_unfinished() { UNFINISHED } else { REFUSED })
    };
    let failed = |error: wasmtime::Error| Error::Compile { reason: chain(&error) };
    let compile = || {
        let engine = Engine::new().map_err(failed)?;
        let component = Compiler::Here.compile(&engine, bytes)?;
        component.serialize().map_err(failed)
    };
    super::watch::beside_the_traffic(compile).map_err(|error| refused(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_process_cannot_do_is_said() {
        let compile = |line: &str, time| {
            let mut command = Command::new("sh");
            command.args(["-c", line]);
            compile_apart(command, &[0; 100_000], Duration::from_secs(time), &Stop::default())
                .map_err(Error::from)
        };
        let program = Command::new("/no/such/program");
        let none = compile_apart(program, &[], TIME_MAX, &Stop::default()).unwrap_err();
        let none = Error::from(none).to_string();
        assert!(none.contains("no process could be started for it: "), "{none}");
        // Most of them read nothing.
        assert_eq!(compile("printf code", 60).unwrap(), b"code");
        assert_eq!(compile("cat | wc -c | tr -d ' \\n'", 60).unwrap(), b"100000");
        for (code, may_be_unfinished) in [(1, false), (3, true)] {
            let error = compile(&format!("echo its reason >&2; exit {code}"), 60).unwrap_err();
            assert_eq!(error.to_string(), "its reason");
            assert_eq!(error.may_be_unfinished(), may_be_unfinished);
        }
        let check = |line, time, part: &str| {
            let error = compile(line, time).unwrap_err().to_string();
            assert!(error.contains(part), "{line}: {error}");
        };
        check(
            "kill -ABRT $$",
            60,
            "broke off (signal 6): it may take 2048 MiB of memory; its largest",
        );
        check(
            "echo has overflowed its stack >&2; kill -ABRT $$",
            60,
            "ran out of stack (signal 6): its types or blocks are nested far too deeply",
        );
        check(
            "exec sleep 1000",
            0,
            "it took more than 0 s, and was given up; its largest function",
        );
        let stop = Stop::default();
        stop.stop();
        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        let stopped = Error::from(compile_apart(sleep, &[], TIME_MAX, &stop).unwrap_err());
        assert!(stopped.to_string().ends_with("it changed while it was compiled"), "{stopped}");
    }
}
