//! Follows the transforms folder and publishes the chain that it shows.
//!
//! ```text
//! folder ─▶ settle ─▶ workshop ─▶ promote ─▶ (watch) ─▶ driver
//!            looks     compiles     tries        probation ─▶ back again
//! ```
//!
//! A thread of its own looks at the folder: at once when the system reports a change, and every
//! second in any case, because network file systems and overflowing queues report nothing. What
//! was reported is never trusted; it only means "look again". The thread itself does nothing that
//! takes long: files are compiled, instantiated and initialised on others, beside the traffic, and so
//! is a chain tried before it goes live. Then it is published whole.

mod answer;
mod notes;
mod probation;
mod promote;
mod replaced;
mod reporter;
mod settle;
mod start;
mod view;
mod workshop;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::cache::Cache;
use super::chain::{Chain, Transform};
use super::compiler::{Compiler, Stop};
use super::engine::Engine;
use super::folder::{self, Look, Seen};
use super::health::Tally;
use super::last_good::LastGood;
use super::loader;
use super::refused::Refusals;
use super::runner::Runner;
use super::vet::{Comparison, Vet, VetReport};
use probation::Probation;
use promote::{Change, Changes, UnderTrial};
use reporter::Reporter;
use settle::{SETTLE, Settler};
use view::{View, live_view};
use workshop::{Lanes, Made, Unusable, Workshop};

pub(super) use workshop::beside_the_traffic;

pub use view::{TransformList, TransformState, TransformView};

/// How often the folder is looked at without a report.
const POLL: Duration = Duration::from_secs(1);

/// How long the end of a host waits for its thread.
const STOP_MAX: Duration = Duration::from_secs(1);

/// How many notices about deleted files are kept.
const NOTICES_MAX: usize = 20;

/// What is said of a folder that shows nothing, where that is taken for no deletion of everything.
const IS_AWAY: &str = "is another one than before, and empty, as where a volume is not mounted: the chain stays \
                       as it is. Put the modules back; where none is meant to be live, restart once with \
                       `sluicebox run --no-transforms`";

/// Where a host finds its files, and what it was before.
#[derive(Clone, Debug)]
pub struct HostSettings {
    /// The folder that is watched.
    pub dir: PathBuf,
    /// Where compiled code and the last good copies are kept.
    pub state_dir: PathBuf,
    /// The generation that the store knows; 0 for a new store.
    pub generation: u64,
    /// The digest of that generation's chain.
    pub digest: Option<String>,
    /// An empty folder is meant, though the last one with modules in it was another.
    pub no_transforms: bool,
    /// Tries what is about to go live on the messages that there are; without it, everything that
    /// loads goes live.
    pub vet: Option<Arc<dyn Vet>>,
    /// Whether modules that may keep a compiler busy are compiled by this program in a process of its
    /// own, with limits. Not where the program is another one, such as a test.
    pub compile_apart: bool,
}

/// Why a host could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "could not read the transforms folder {}; create it, or set `transforms.dir`",
        path.display()
    )]
    Folder { path: PathBuf, source: io::Error },
    #[error("could not use the folder {} for transforms; check its rights", path.display())]
    State { path: PathBuf, source: io::Error },
    #[error(
        "these transforms cannot be used, and no working copy of them is known: {files}. Mend or \
         remove the files; without them, messages would be delivered that they are there to shape"
    )]
    Unusable { files: String },
    #[error(
        "the transforms folder {} is another one than before, and empty, as where a volume is not mounted, and of \
         what was live last no working copy is known: {files}. Put the modules back; where none is meant to be \
         live, start once with `sluicebox run --no-transforms`",
        path.display()
    )]
    Away { path: PathBuf, files: String },
    #[error("could not start the WebAssembly engine: {reason}")]
    Engine { reason: String },
    #[error("could not start a thread for the transforms")]
    Thread(#[source] io::Error),
}

/// The running host. Stops watching when it is dropped; chains and runners go on working.
#[derive(Debug)]
pub struct Host {
    engine: Arc<Engine>,
    chain: watch::Receiver<Arc<Chain>>,
    view: Arc<Mutex<View>>,
    wake: mpsc::Sender<Wake>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// Loads what the folder holds and goes on watching it.
    ///
    /// # Errors
    ///
    /// When the folder or the state folder cannot be used, and when a file in it does not load and
    /// no working copy from the last run is there in its place.
    pub fn start(settings: HostSettings) -> Result<Self, Error> {
        let reason = |error: wasmtime::Error| Error::Engine { reason: loader::chain(&error) };
        let engine = Arc::new(Engine::new().map_err(reason)?);
        let state = |source| Error::State { path: settings.state_dir.clone(), source };
        let cache = Cache::open(&settings.state_dir).map_err(state)?;
        let last_good = LastGood::open(&settings.state_dir).map_err(state)?;
        let refusals = Refusals::open(&settings.state_dir).map_err(state)?;

        let view = Arc::new(Mutex::new(View::default()));
        let (publisher, chain) = watch::channel(Arc::new(Chain::empty(settings.generation)));
        let (wake, woken) = mpsc::channel();
        let compiler = if settings.compile_apart { Compiler::apart() } else { Compiler::Here };
        let engine_too = Arc::clone(&engine);
        let workshop = Workshop { engine: engine_too, cache, compiler, dir: settings.dir };
        let mut watcher = Watcher {
            workshop: Arc::new(workshop),
            lanes: Lanes::start().map_err(Error::Thread)?,
            wake: wake.clone(),
            vet: settings.vet,
            last_good,
            refusals,
            publisher,
            view: Arc::clone(&view),
            settler: Settler::default(),
            live: BTreeMap::new(),
            making: BTreeMap::new(),
            stops: BTreeMap::new(),
            ready: Changes::new(),
            ready_since: BTreeMap::new(),
            replaced: BTreeMap::new(),
            staying: BTreeMap::new(),
            folder: None,
            trial: None,
            next_trial: 0,
            probation: None,
            reports: BTreeMap::new(),
            orphans: BTreeMap::new(),
            warned: BTreeSet::new(),
            notices: BTreeMap::new(),
        };
        watcher.load_first(settings.digest.as_deref(), settings.no_transforms)?;

        let thread = std::thread::Builder::new()
            .name("transform-watch".into())
            .spawn(move || watcher.watch(&woken))
            .map_err(Error::Thread)?;
        Ok(Self { engine, chain, view, wake, thread: Some(thread) })
    }

    /// The chain that is live, and every later one.
    #[must_use]
    pub fn chain(&self) -> watch::Receiver<Arc<Chain>> {
        self.chain.clone()
    }

    /// What runs this host's chains on one thread.
    #[must_use]
    pub fn runner(&self) -> Runner {
        Runner::new(Arc::clone(&self.engine))
    }

    /// What is in the folder, live or not.
    #[must_use]
    pub fn list(&self) -> TransformList {
        let chain = Arc::clone(&self.chain.borrow());
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let mut transforms: Vec<TransformView> = chain
            .transforms()
            .iter()
            .map(|transform| live_view(transform, view.reports.get(&*transform.file).cloned()))
            .collect();
        transforms.extend(view.others.iter().cloned());
        // By file; of one file, the live version first.
        transforms.sort_by(|a, b| a.file.cmp(&b.file));
        TransformList {
            generation: chain.generation,
            digest: chain.digest().to_owned(),
            transforms,
            warnings: view.warnings.clone(),
        }
    }
}

impl Drop for Host {
    /// Waits for the watching thread, but not for a long compilation: whatever it is doing then is
    /// safe to be cut off by the end of the process.
    fn drop(&mut self) {
        // An error says that the thread has ended already.
        self.wake.send(Wake::Stop).ok();
        let Some(thread) = self.thread.take() else { return };
        let started = Instant::now();
        while !thread.is_finished() {
            if started.elapsed() > STOP_MAX {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if thread.join().is_err() {
            tracing::error!("the thread that watched the transforms folder had failed");
        }
    }
}

enum Wake {
    /// Something happened in the folder; what, the look will show. With the name of what was renamed
    /// into place.
    Report {
        moved: Option<String>,
        at: Instant,
    },
    /// A file was made into a transform, or cannot be.
    Made {
        file: String,
        seen: Seen,
        made: Result<Made, Unusable>,
        took: Duration,
    },
    /// A chain was tried; without a comparison, that failed.
    Tried {
        number: u64,
        comparison: Option<Comparison>,
    },
    /// Chains were compared that differ by files that are gone.
    LookedBack {
        gone: Vec<String>,
        comparison: Comparison,
    },
    /// Failed changes were tried with the last good versions: how many of how many they handle. With
    /// nothing, that failed.
    Checked {
        number: u64,
        handled: Option<(usize, usize)>,
        culprits: BTreeSet<String>,
        tally: Tally,
    },
    Stop,
}

/// The watching thread's state.
struct Watcher {
    workshop: Arc<Workshop>,
    lanes: Lanes,
    /// For what the lanes have to tell.
    wake: mpsc::Sender<Wake>,
    vet: Option<Arc<dyn Vet>>,
    last_good: LastGood,
    /// Versions that are not live, and why, one for each file.
    refusals: Refusals,
    publisher: watch::Sender<Arc<Chain>>,
    view: Arc<Mutex<View>>,
    settler: Settler,
    /// What the published chain is made of, by file.
    live: BTreeMap<String, Arc<Transform>>,
    /// Files that are being made into transforms, by the state that was seen.
    making: BTreeMap<String, Seen>,
    /// Since when, and what ends it where the file changes or is gone.
    stops: BTreeMap<String, (Instant, Stop)>,
    /// What the folder shows and the published chain does not.
    ready: Changes,
    /// Since when each of that is ready, and since when it is in the folder.
    ready_since: BTreeMap<String, (Instant, Instant)>,
    /// Live files that are gone, and what came with that.
    replaced: BTreeMap<String, BTreeSet<String>>,
    /// What a restart knows of those that stay live for what came with that.
    staying: BTreeMap<String, BTreeSet<String>>,
    /// The folder in which modules were seen last, by device and inode.
    folder: Option<(u64, u64)>,
    trial: Option<UnderTrial>,
    next_trial: u64,
    probation: Option<Probation>,
    /// What vetting said of the live versions.
    reports: BTreeMap<String, VetReport>,
    /// Settings files without a module, and since when they are there.
    orphans: BTreeMap<String, Instant>,
    /// What was warned about, so that it is said once.
    warned: BTreeSet<String>,
    /// What is to be known of deleted files, by file.
    notices: BTreeMap<String, String>,
}

impl Watcher {
    /// The thread.
    fn watch(mut self, woken: &mpsc::Receiver<Wake>) {
        let mut reporter = Reporter::new(self.wake.clone());
        let mut pause = POLL;
        loop {
            reporter.follow(self.dir());
            let mut wake = match woken.recv_timeout(pause) {
                Ok(wake) => Some(wake),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // Reports come in bursts; one look is enough for all of them.
            while let Some(next) = wake {
                if !self.on_wake(next) {
                    self.refusals.save();
                    return;
                }
                wake = woken.try_recv().ok();
            }
            pause = self.step();
        }
    }

    /// Answers whether to go on.
    fn on_wake(&mut self, wake: Wake) -> bool {
        match wake {
            Wake::Report { moved, at } => {
                self.settler.note_reported(at);
                if let Some(name) = moved {
                    self.settler.note_moved(name);
                }
            }
            Wake::Made { file, seen, made, took } => self.on_made(&file, seen, made, took),
            Wake::Tried { number, comparison } => self.on_tried(number, comparison),
            Wake::LookedBack { gone, comparison } => self.on_looked_back(&gone, &comparison),
            Wake::Checked { number, handled, culprits, tally } => {
                self.on_checked(number, handled, &culprits, tally);
            }
            Wake::Stop => return false,
        }
        true
    }

    /// Looks once and does what the look asks for. Answers how long to wait for the next.
    fn step(&mut self) -> Duration {
        let on_probation = self.watch_probation();
        let look = match self.look() {
            Ok(look) => look,
            Err(what) => {
                // Not a deletion of everything: a network folder may come back.
                self.warn(format!("the transforms folder {} {what}", self.dir().display()));
                self.show();
                return if on_probation { probation::LOOK } else { POLL };
            }
        };
        let known = self.live.keys().chain(self.ready.keys()).chain(self.making.keys());
        let known = known.chain(self.refusals.iter().map(|(file, _)| file));
        // Of what is known to be gone there is nothing more to find out.
        let is_gone = |file: &&String| matches!(self.ready.get(*file), Some(Change::Gone));
        let known: Vec<String> = known.filter(|file| !is_gone(file)).cloned().collect();
        let mut settled =
            self.settler.settle(&look, known.into_iter(), &self.making, Instant::now());
        for (file, since) in &settled.gone {
            self.on_gone(file, *since);
        }
        // What is back is not gone, whatever becomes of it.
        self.ready.retain(|file, change| {
            !(matches!(change, Change::Gone) && look.modules.contains_key(file))
        });
        let changed = std::mem::take(&mut settled.changed);
        if !changed.is_empty() {
            let known = self.known().into();
            for (file, seen) in changed {
                self.begin(file, seen, &known);
            }
        }
        self.warn_of_what_is_odd(&look, &settled.restless);
        let held = self.advance(settled.wait.is_some());
        if self.staying != self.staying() {
            self.keep_copies();
        }
        self.refusals.save();
        self.show();
        let held = if held { SETTLE } else { POLL };
        let on_probation = if on_probation { probation::LOOK } else { POLL };
        settled.wait.unwrap_or(POLL).min(held).min(on_probation)
    }

    /// What the folder shows, or why that is not to be followed.
    fn look(&mut self) -> Result<Look, String> {
        let stays = |error| format!("cannot be read, and the chain stays as it is: {error}");
        let found = folder::identity(self.dir()).map_err(stays)?;
        let look = folder::look(self.dir()).map_err(stays)?;
        if look.modules.is_empty() && !self.live.is_empty() && self.folder != Some(found) {
            return Err(IS_AWAY.to_owned());
        }
        self.note_folder(found, &look);
        Ok(look)
    }

    /// This is the folder that counts. A restart knows it by the modules that it held.
    fn note_folder(&mut self, found: (u64, u64), look: &Look) {
        self.folder = Some(found);
        if !look.modules.is_empty()
            && let Err(error) = self.last_good.set_place(found)
        {
            tracing::warn!("could not note down which transforms folder it is: {error}");
        }
    }

    fn dir(&self) -> &Path {
        &self.workshop.dir
    }

    fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.publisher.borrow())
    }
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}
