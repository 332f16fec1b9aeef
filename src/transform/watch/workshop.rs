//! From a file to a transform that may go live: read, checked, compiled and started beside the
//! traffic, on threads that leave room for it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use super::super::cache::Cache;
use super::super::chain::{Counters, Transform};
use super::super::compiler::{self, Compiler, Stop};
use super::super::engine::Engine;
use super::super::folder::{self, Content, Seen};
use super::super::instance::Instance;
use super::super::loader::{self, Module};
use super::super::settings::Settings;
use super::now;

/// From this size on nothing waits behind a module that is smaller: it takes many seconds.
pub(super) const LARGE_BYTES: u64 = 1024 * 1024;

/// The priority of what has time: the kernel gives it about a tenth of a busy processor.
const NICE: i32 = 10;

/// The priority of small modules, which take a moment: about a quarter of a busy processor, so that
/// traffic that keeps all of them busy is hardly slowed, and a mend does not wait for seconds either.
const NICE_SMALL: i32 = 5;

/// Makes transforms.
#[derive(Debug)]
pub(super) struct Workshop {
    pub(super) engine: Arc<Engine>,
    pub(super) cache: Cache,
    pub(super) compiler: Compiler,
    pub(super) dir: PathBuf,
}

/// A transform that may go live, and its module's bytes.
pub(super) struct Made {
    pub(super) transform: Arc<Transform>,
    pub(super) bytes: Vec<u8>,
}

/// Why a file is not usable.
#[derive(Debug)]
pub(super) struct Unusable {
    /// Empty where it could not be read.
    pub(super) digest: String,
    pub(super) reason: String,
    pub(super) may_be_unfinished: bool,
}

impl Workshop {
    /// Reads, checks, compiles and starts one file. A module that is among `known` is not compiled
    /// again.
    pub(super) fn make_file(
        &self,
        file: &str,
        known: &[Arc<Module>],
        stop: &Stop,
    ) -> Result<Made, Unusable> {
        let content = folder::read(&self.dir, file).map_err(|error| Unusable {
            digest: String::new(),
            reason: format!("it could not be read: {error}"),
            may_be_unfinished: true,
        })?;
        self.make(file, content, known, stop)
    }

    /// Whether a file may keep a compiler busy for long, however small it is.
    pub(super) fn is_demanding(&self, file: &str) -> bool {
        let content = folder::read(&self.dir, file);
        content.is_ok_and(|content| compiler::is_demanding(&content.module))
    }

    pub(super) fn make(
        &self,
        file: &str,
        content: Content,
        known: &[Arc<Module>],
        stop: &Stop,
    ) -> Result<Made, Unusable> {
        let digest = loader::digest(&content.module);
        // A defect of what reads, compiles and starts it costs this file.
        catch_unwind(AssertUnwindSafe(|| self.make_of(file, &digest, content, known, stop)))
            .unwrap_or_else(|_| {
                let reason = "it could not be compiled or started, by a defect of Sluicebox; the log has more";
                Err(Unusable { digest, reason: reason.into(), may_be_unfinished: false })
            })
    }

    fn make_of(
        &self,
        file: &str,
        digest: &str,
        content: Content,
        known: &[Arc<Module>],
        stop: &Stop,
    ) -> Result<Made, Unusable> {
        let refuse = |reason: String, may_be_unfinished| Unusable {
            digest: digest.to_owned(),
            reason,
            may_be_unfinished,
        };
        let text = content.settings.as_deref().unwrap_or("");
        let of_settings = |error| {
            refuse(format!("its settings file `{}`: {error}", folder::settings_name(file)), true)
        };
        // Before minutes are spent on compiling it.
        Settings::parse(text).map_err(of_settings)?;
        // The same module with other settings, or under another name.
        let module = match known.iter().find(|module| module.digest == digest) {
            Some(module) => Arc::clone(module),
            None => Arc::new(
                self.compile(&content.module, stop)
                    .map_err(|error| refuse(error.to_string(), error.may_be_unfinished()))?,
            ),
        };
        // By the schema, which only the module has.
        let settings = Settings::of(text, module.schema.as_ref()).map_err(of_settings)?;
        let name: Arc<str> = file.into();
        Instance::start(&self.engine, &name, &module, &settings, false)
            .map_err(|fault| refuse(format!("it {}", fault.reason), true))?;
        let transform = Transform {
            file: name,
            module,
            settings,
            settings_text: content.settings,
            counters: Counters::default(),
            since: now(),
        };
        Ok(Made { transform: Arc::new(transform), bytes: content.module })
    }

    /// Compiles on half of the processors, so that the traffic has the others.
    fn compile(&self, bytes: &[u8], stop: &Stop) -> Result<Module, loader::Error> {
        let Self { engine, cache, compiler, .. } = self;
        let compiler = compiler.until(stop);
        beside_the_traffic(|| loader::load_by(&compiler, engine, bytes, Some(cache)))
    }
}

/// Compiles on half of the processors, at the priority of this thread, which a process that it starts has
/// as well: there is a low one where changes flow, and the usual one at a start, which they wait for.
pub(in super::super) fn beside_the_traffic<T: Send>(compile: impl FnOnce() -> T + Send) -> T {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let nice = rustix::process::getpriority_process(None).unwrap_or(0);
    let pool = rayon::ThreadPoolBuilder::new()
        .thread_name(|_| "transform-compile".into())
        .num_threads((processors / 2).max(1))
        .start_handler(move |_| be_polite(nice))
        .build();
    match pool {
        Ok(pool) => pool.install(compile),
        Err(_) => compile(),
    }
}

/// Lowers the priority of this thread. Where a system does not do so, it is only less polite.
fn be_polite(nice: i32) {
    rustix::process::setpriority_process(None, nice).ok();
}

/// The threads of a host beside its watch.
#[derive(Debug)]
pub(super) struct Lanes {
    small: Lane,
    large: Lane,
    /// For small files that may keep a compiler busy for minutes: nothing else waits behind them.
    pub(super) demanding: Lane,
    vetting: Lane,
}

impl Lanes {
    pub(super) fn start() -> std::io::Result<Self> {
        Ok(Self {
            // Two, because the start of a module may take ten seconds.
            small: Lane::start("transform-load", 2, NICE_SMALL)?,
            large: Lane::start("transform-large", 1, NICE)?,
            demanding: Lane::start("transform-slow", 1, NICE)?,
            vetting: Lane::start("transform-vet", 1, NICE)?,
        })
    }

    /// Runs what makes this file.
    pub(super) fn make(&self, seen: &Seen, job: impl FnOnce() + Send + 'static) {
        if seen.module_bytes() < LARGE_BYTES { self.small.run(job) } else { self.large.run(job) }
    }

    /// Runs what tries a chain.
    pub(super) fn vet(&self, job: impl FnOnce() + Send + 'static) {
        self.vetting.run(job);
    }
}

/// Threads that take one job after the other.
#[derive(Clone, Debug)]
pub(super) struct Lane(mpsc::Sender<Job>);

type Job = Box<dyn FnOnce() + Send>;

impl Lane {
    /// The threads end with this handle, after the jobs that they are at.
    fn start(name: &str, threads: usize, nice: i32) -> std::io::Result<Self> {
        let (jobs, received) = mpsc::channel::<Job>();
        let received = Arc::new(Mutex::new(received));
        for _ in 0..threads {
            let received = Arc::clone(&received);
            std::thread::Builder::new().name(name.into()).spawn(move || {
                be_polite(nice);
                loop {
                    // The lock covers only the wait for a job, never a job.
                    let next = received.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = next else { break };
                    // Its answer is sent as it unwinds.
                    if catch_unwind(AssertUnwindSafe(job)).is_err() {
                        tracing::error!("a thread beside the transforms folder failed, a defect");
                    }
                }
            })?;
        }
        Ok(Self(jobs))
    }

    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        // The thread outlives this handle.
        drop(self.0.send(Box::new(job)));
    }
}
