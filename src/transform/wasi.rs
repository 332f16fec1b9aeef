//! What a module that imports WASI is given: as little as its language's runtime can live with.
//!
//! There are no arguments and no standard input, and no environment variables but those that the
//! module's settings name. Clocks and random numbers work. What is written to stdout and stderr
//! becomes log lines. Waiting ends at the call's deadline: epochs cannot stop a guest that sleeps in a
//! host function.
//!
//! Everything else is not linked, so that the loader refuses it by name: sockets, HTTP, signals. The
//! one exception are files. Standard libraries import `wasi:filesystem` whether or not a program ever
//! opens one, the adapter of wasip1 for every module, so it is linked, and empty: no folder is given,
//! nothing can be opened without one, and each attempt is answered by an error inside the module.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmtime::component::{HasData, Linker, Resource, ResourceTable};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream, WasiCli};
use wasmtime_wasi::clocks::WasiClocks;
use wasmtime_wasi::filesystem::WasiFilesystem;
use wasmtime_wasi::p2::bindings::sync::io::poll;
use wasmtime_wasi::p2::bindings::{cli, clocks, filesystem, random, sync};
use wasmtime_wasi::p2::{DynPollable, OutputStream, Pollable, StreamResult};
use wasmtime_wasi::random::WasiRandom;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use super::state::{DeadlinePassed, GuestState};

/// How much of what a call writes to stdout and stderr is kept: an exception and its stack.
const OUTPUT_BYTES_MAX: usize = 16 * 1024;

/// The interfaces of WASI 0.2 that a module may import: those that [`add_to_linker`] defines.
pub(crate) const GRANTED: [&str; 20] = [
    "wasi:cli/environment",
    "wasi:cli/exit",
    "wasi:cli/stderr",
    "wasi:cli/stdin",
    "wasi:cli/stdout",
    "wasi:cli/terminal-input",
    "wasi:cli/terminal-output",
    "wasi:cli/terminal-stderr",
    "wasi:cli/terminal-stdin",
    "wasi:cli/terminal-stdout",
    "wasi:clocks/monotonic-clock",
    "wasi:clocks/wall-clock",
    "wasi:filesystem/preopens",
    "wasi:filesystem/types",
    "wasi:io/error",
    "wasi:io/poll",
    "wasi:io/streams",
    "wasi:random/insecure",
    "wasi:random/insecure-seed",
    "wasi:random/random",
];

/// What wasip1 has and a transform is not given. Its files are there as those of WASI 0.2 are.
const NOT_GRANTED_OF_WASIP1: [&str; 5] =
    ["proc_raise", "sock_accept", "sock_recv", "sock_send", "sock_shutdown"];

/// Random bytes that a guest may ask for at once. The host makes them before the guest's own memory
/// limit sees them.
const RANDOM_BYTES_MAX: u64 = 1024 * 1024;

/// Whether a component's import of this name is met.
pub(crate) fn is_granted(import: &str) -> bool {
    let Some((interface, version)) = import.split_once('@') else { return false };
    version.starts_with("0.2.") && GRANTED.contains(&interface)
}

/// Whether a core module's import of this name from wasip1 is met.
pub(crate) fn is_granted_of_wasip1(function: &str) -> bool {
    !NOT_GRANTED_OF_WASIP1.contains(&function)
}

/// One instance's view of WASI.
pub(crate) struct Wasi {
    context: WasiCtx,
    table: ResourceTable,
    output: Output,
}

impl Wasi {
    /// With these variables of this process's environment, and room for so many of the host's
    /// objects (streams, pollables).
    ///
    /// # Errors
    ///
    /// With a sentence, where a variable is not set or not text.
    pub(crate) fn new(env: &[String], resources_max: usize) -> Result<Self, String> {
        let mut variables = Vec::with_capacity(env.len());
        for name in env {
            let value = std::env::var(name).map_err(|error| {
                let what = match error {
                    std::env::VarError::NotPresent => "has none of that name",
                    std::env::VarError::NotUnicode(_) => "has one that is not UTF-8 text",
                };
                format!(
                    "is to be given the environment variable `{name}` (`wasi.env`), and Sluicebox \
                     itself {what}"
                )
            })?;
            variables.push((name, value));
        }
        let output = Output::default();
        let mut table = ResourceTable::new();
        table.set_max_capacity(resources_max);
        let context = WasiCtx::builder()
            .envs(&variables)
            .stdout(output.clone())
            .stderr(output.clone())
            .max_random_size(RANDOM_BYTES_MAX)
            .allow_tcp(false)
            .allow_udp(false)
            .build();
        Ok(Self { context, table, output })
    }

    /// Takes the lines that the guest wrote since the last time.
    pub(crate) fn take_output(&self) -> Vec<String> {
        let mut buffer = self.output.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buffer.is_empty() {
            return Vec::new();
        }
        let text = String::from_utf8_lossy(&buffer).into_owned();
        buffer.clear();
        text.lines().map(str::to_owned).collect()
    }
}

impl WasiView for GuestState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let wasi = self.wasi.as_mut().expect("WASI is linked only to instances that have it");
        WasiCtxView { ctx: &mut wasi.context, table: &mut wasi.table }
    }
}

/// Defines the granted part of WASI 0.2.
pub(crate) fn add_to_linker(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    use wasmtime_wasi::cli::WasiCliView as _;
    use wasmtime_wasi::clocks::WasiClocksView as _;
    use wasmtime_wasi::filesystem::WasiFilesystemView as _;
    type T = GuestState;

    clocks::wall_clock::add_to_linker::<T, WasiClocks>(linker, T::clocks)?;
    clocks::monotonic_clock::add_to_linker::<T, WasiClocks>(linker, T::clocks)?;
    filesystem::preopens::add_to_linker::<T, WasiFilesystem>(linker, T::filesystem)?;
    sync::filesystem::types::add_to_linker::<T, WasiFilesystem>(linker, T::filesystem)?;
    random::random::add_to_linker::<T, WasiRandom>(linker, |t| t.ctx().ctx.random())?;
    random::insecure::add_to_linker::<T, WasiRandom>(linker, |t| t.ctx().ctx.random())?;
    random::insecure_seed::add_to_linker::<T, WasiRandom>(linker, |t| t.ctx().ctx.random())?;
    cli::exit::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    cli::environment::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    cli::stdin::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    cli::stdout::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    cli::stderr::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    cli::terminal_input::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    cli::terminal_output::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    cli::terminal_stdin::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    cli::terminal_stdout::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    cli::terminal_stderr::add_to_linker::<T, WasiCli>(linker, T::cli)?;
    sync::io::error::add_to_linker::<T, Table>(linker, |t| t.ctx().table)?;
    sync::io::streams::add_to_linker::<T, Table>(linker, |t| t.ctx().table)?;
    poll::add_to_linker::<T, BoundedPoll<'static>>(linker, |t| {
        let deadline = t.deadline;
        BoundedPoll { table: t.ctx().table, deadline }
    })
}

struct Table;

impl HasData for Table {
    type Data<'a> = &'a mut ResourceTable;
}

/// `wasi:io/poll` that gives up at the call's deadline.
struct BoundedPoll<'a> {
    table: &'a mut ResourceTable,
    deadline: Instant,
}

impl HasData for BoundedPoll<'static> {
    type Data<'a> = BoundedPoll<'a>;
}

impl BoundedPoll<'_> {
    /// How long to sleep between looks: short against any limit, long against a look's cost.
    const PAUSE: Duration = Duration::from_millis(1);

    fn wait(&mut self, pollables: &[u32]) -> wasmtime::Result<Vec<u32>> {
        loop {
            let mut ready = Vec::new();
            for (index, pollable) in (0..).zip(pollables) {
                if poll::HostPollable::ready(self.table, Resource::new_borrow(*pollable))? {
                    ready.push(index);
                }
            }
            if !ready.is_empty() {
                return Ok(ready);
            }
            if Instant::now() >= self.deadline {
                return Err(DeadlinePassed.into());
            }
            std::thread::sleep(Self::PAUSE);
        }
    }
}

impl poll::Host for BoundedPoll<'_> {
    fn poll(&mut self, pollables: Vec<Resource<DynPollable>>) -> wasmtime::Result<Vec<u32>> {
        if pollables.is_empty() {
            return Err(wasmtime::Error::msg(
                "`wasi:io/poll.poll` was called with nothing to await",
            ));
        }
        let pollables: Vec<u32> = pollables.iter().map(Resource::rep).collect();
        self.wait(&pollables)
    }
}

impl poll::HostPollable for BoundedPoll<'_> {
    fn ready(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<bool> {
        poll::HostPollable::ready(self.table, pollable)
    }

    fn block(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<()> {
        self.wait(&[pollable.rep()]).map(drop)
    }

    fn drop(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<()> {
        poll::HostPollable::drop(self.table, pollable)
    }
}

/// Stdout and stderr of a guest: takes everything at once, keeps the newest bytes.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    fn append(&self, bytes: &[u8]) {
        let mut buffer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.extend_from_slice(bytes);
        let excess = buffer.len().saturating_sub(OUTPUT_BYTES_MAX);
        buffer.drain(..excess);
    }
}

impl IsTerminal for Output {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Output {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

impl AsyncWrite for Output {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.append(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {}
}

impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.append(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(OUTPUT_BYTES_MAX)
    }
}
