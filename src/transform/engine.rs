//! The one wasmtime engine of the process: what guests may use, and the clock that stops them.

use std::time::Duration;

use wasmtime::component::Linker;
use wasmtime::{Config, WasmBacktraceDetails};

use super::state::GuestState;
use super::{bindings, wasi};

/// How often the engine's epoch advances. A guest is stopped at most this much after its deadline;
/// 5 ms costs nothing that can be measured and is well under any useful limit.
const TICK: Duration = Duration::from_millis(5);

/// How deep a guest's calls may go, in bytes of stack: wasmtime's default.
const STACK_BYTES_MAX: usize = 512 * 1024;

/// How many frames of a guest's stack are kept where it traps.
pub(crate) const BACKTRACE_FRAMES_MAX: usize = 50;

/// What all modules share: compiler settings, the host's functions and the epoch clock.
pub(crate) struct Engine {
    wasm: wasmtime::Engine,
    /// For modules that import nothing but the transform interface.
    plain: Linker<GuestState>,
    /// For modules that import WASI as well: see [`wasi`] for what they are given.
    wasi: Linker<GuestState>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").finish_non_exhaustive()
    }
}

impl Engine {
    /// Builds the engine and starts its clock, a thread that ends by itself with the engine.
    ///
    /// # Errors
    ///
    /// When wasmtime does not support this machine, or no thread can be started.
    pub(crate) fn new() -> wasmtime::Result<Self> {
        let mut config = Config::new();
        config
            .epoch_interruption(true)
            .max_wasm_stack(STACK_BYTES_MAX)
            .wasm_backtrace_details(WasmBacktraceDetails::Enable)
            .wasm_backtrace_max_frames(std::num::NonZeroUsize::new(BACKTRACE_FRAMES_MAX))
            .wasm_memory64(false)
            .wasm_multi_memory(false)
            // The same module must give the same bytes for the same change on every machine.
            .cranelift_nan_canonicalization(true)
            .relaxed_simd_deterministic(true);
        let wasm = wasmtime::Engine::new(&config)?;

        let mut plain = Linker::new(&wasm);
        bindings::add_to_linker(&mut plain)?;
        let mut with_wasi = plain.clone();
        wasi::add_to_linker(&mut with_wasi)?;

        let weak = wasm.weak();
        std::thread::Builder::new().name("transform-clock".into()).spawn(move || {
            while let Some(engine) = weak.upgrade() {
                engine.increment_epoch();
                drop(engine);
                std::thread::sleep(TICK);
            }
        })?;
        Ok(Self { wasm, plain, wasi: with_wasi })
    }

    pub(crate) fn wasm(&self) -> &wasmtime::Engine {
        &self.wasm
    }

    pub(crate) fn linker(&self, with_wasi: bool) -> &Linker<GuestState> {
        if with_wasi { &self.wasi } else { &self.plain }
    }
}

/// A time limit as epochs from now. One more than the limit needs, because the current epoch may
/// end at once.
pub(crate) fn ticks(limit: Duration) -> u64 {
    let ticks = limit.as_micros().div_ceil(TICK.as_micros());
    // Far below u64::MAX, which would overflow when wasmtime adds it to the current epoch.
    u64::try_from(ticks).unwrap_or(u64::from(u32::MAX)).min(u64::from(u32::MAX)) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_never_shorter_than_the_limit() {
        for (millis, expected) in [(0, 1), (1, 2), (5, 2), (6, 3), (1000, 201)] {
            assert_eq!(ticks(Duration::from_millis(millis)), expected, "{millis} ms");
        }
        assert_eq!(ticks(Duration::MAX), u64::from(u32::MAX) + 1);
    }
}
