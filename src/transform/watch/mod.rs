//! Follows the transforms folder and publishes the chain that it shows.
//!
//! A thread of its own looks at the folder: at once when the system reports a change, and every
//! second in any case, because network file systems and overflowing queues report nothing. What
//! was reported is never trusted; it only means "look again". A file counts when two looks saw it
//! the same, and a deletion when it lasted a second. Candidates are compiled, instantiated and
//! initialised there, beside the traffic; then a new chain is published whole.

mod reporter;
mod settle;
mod view;
mod workshop;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::cache::Cache;
use super::chain::{self, Chain, Transform};
use super::engine::Engine;
use super::folder::{self, Look, Seen};
use super::last_good::LastGood;
use super::loader;
use super::runner::Runner;
use reporter::Reporter;
use view::{View, live_view};

pub use view::{TransformList, TransformState, TransformView};

/// How often the folder is looked at without a report.
const POLL: Duration = Duration::from_secs(1);

/// How long a file must stay the same, and the pause between looks while something changes.
const SETTLE: Duration = Duration::from_millis(100);

/// How long a file must be gone to count as deleted: editors and copying tools delete before they
/// write.
const DELETED_AFTER: Duration = Duration::from_secs(1);

/// How long a change that is ready waits for others that are not, so that files that are replaced
/// together go live together.
const HOLD_MAX: Duration = Duration::from_secs(2);

/// A file that was written this recently and does not load may still be being written.
const UNFINISHED: Duration = Duration::from_secs(2);

/// How long the end of a host waits for its thread.
const STOP_MAX: Duration = Duration::from_secs(1);

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

        let view = Arc::new(Mutex::new(View::default()));
        let (publisher, chain) = watch::channel(Arc::new(Chain::empty(settings.generation)));
        let mut watcher = Watcher {
            engine: Arc::clone(&engine),
            cache,
            last_good,
            dir: settings.dir,
            publisher,
            view: Arc::clone(&view),
            live: BTreeMap::new(),
            rejected: BTreeMap::new(),
            handled: BTreeMap::new(),
            first_seen: BTreeMap::new(),
            missing: BTreeMap::new(),
            previous: Look::default(),
            ready_since: None,
            warned: BTreeSet::new(),
        };
        watcher.load_first(settings.digest.as_deref())?;

        let (wake, woken) = mpsc::channel();
        let reports = wake.clone();
        let thread = std::thread::Builder::new()
            .name("transform-watch".into())
            .spawn(move || watcher.watch(&woken, reports))
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
        let mut transforms: Vec<TransformView> =
            chain.transforms().iter().map(|transform| live_view(transform)).collect();
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
    /// Something happened in the folder; what, the look will show.
    Report,
    Stop,
}

/// The watching thread's state.
struct Watcher {
    engine: Arc<Engine>,
    cache: Cache,
    last_good: LastGood,
    dir: PathBuf,
    publisher: watch::Sender<Arc<Chain>>,
    view: Arc<Mutex<View>>,
    /// The best known version of each file, published or about to be.
    live: BTreeMap<String, Arc<Transform>>,
    rejected: BTreeMap<String, Rejected>,
    /// What was last loaded or rejected of each file, so that nothing is done twice.
    handled: BTreeMap<String, Seen>,
    /// The last state of each file that was seen, and when it was seen first.
    first_seen: BTreeMap<String, (Seen, Instant)>,
    /// Files that were there and are not, since when.
    missing: BTreeMap<String, Instant>,
    previous: Look,
    /// Since when `live` holds something that is not published.
    ready_since: Option<Instant>,
    /// What was warned about, so that it is said once.
    warned: BTreeSet<String>,
}

#[derive(Clone, Debug)]
struct Rejected {
    digest: String,
    reason: String,
    since: String,
}

impl Watcher {
    /// The first load: everything must be usable, as it is or as a copy of the last good one.
    fn load_first(&mut self, last_digest: Option<&str>) -> Result<(), Error> {
        let folder = |source| Error::Folder { path: self.dir.clone(), source };
        let mut look = folder::look(&self.dir).map_err(folder)?;
        // Somebody may be copying files into the folder at this moment.
        for _ in 0..50 {
            if !look.modules.values().any(is_fresh) {
                break;
            }
            std::thread::sleep(SETTLE);
            let next = folder::look(&self.dir).map_err(folder)?;
            if next == look {
                break;
            }
            look = next;
        }

        let mut unusable = Vec::new();
        for (file, seen) in &look.modules {
            let refusal = match self.load(file) {
                Ok(transform) => {
                    self.live.insert(file.clone(), transform);
                    self.handled.insert(file.clone(), seen.clone());
                    continue;
                }
                Err(refusal) => refusal,
            };
            match self.load_last_good(file) {
                Some(transform) => {
                    tracing::warn!(
                        file,
                        "the file does not load, so its last good version goes on: {}",
                        refusal.reason
                    );
                    self.live.insert(file.clone(), transform);
                    self.reject(file, refusal);
                    self.handled.insert(file.clone(), seen.clone());
                }
                None => unusable.push(format!("`{file}`: {}", refusal.reason)),
            }
        }
        if !unusable.is_empty() {
            return Err(Error::Unusable { files: unusable.join("; ") });
        }
        let gone: Vec<&str> =
            self.last_good.files().filter(|file| !look.modules.contains_key(*file)).collect();
        if !gone.is_empty() {
            tracing::warn!("no longer in the transforms folder: {}", gone.join(", "));
        }
        self.warn_of_orphans(&look);
        self.previous = look;

        let transforms: Vec<_> = self.live.values().cloned().collect();
        let last = self.publisher.borrow().generation;
        let is_last = last_digest == Some(chain::digest(&transforms).as_str());
        self.publish(Chain::new(if is_last { last } else { last + 1 }, transforms));
        self.show();
        Ok(())
    }

    /// The thread.
    fn watch(mut self, woken: &mpsc::Receiver<Wake>, reports: mpsc::Sender<Wake>) {
        let mut reporter = Reporter::new(reports);
        let mut pause = POLL;
        loop {
            reporter.follow(&self.dir);
            match woken.recv_timeout(pause) {
                Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
                // Reports come in bursts; one look is enough for all of them.
                Ok(Wake::Report) => {
                    while let Ok(wake) = woken.try_recv() {
                        if matches!(wake, Wake::Stop) {
                            return;
                        }
                    }
                }
            }
            pause = self.step();
        }
    }

    /// Looks once and does what the look asks for. Answers how long to wait for the next.
    fn step(&mut self) -> Duration {
        let look = match folder::look(&self.dir) {
            Ok(look) => look,
            Err(error) => {
                // Not a deletion of everything: a network folder may come back.
                let text = format!(
                    "the transforms folder {} cannot be read, and the chain stays as it is: {error}",
                    self.dir.display()
                );
                if self.warned.insert(text.clone()) {
                    tracing::warn!("{text}");
                }
                self.show_with(vec![text], &[]);
                return POLL;
            }
        };
        let unsettled = self.note_deletions(&look);
        let unsettled = self.load_changed(&look) || unsettled;
        self.warn_of_orphans(&look);
        self.previous = look;
        let held = self.publish_if_ready(unsettled);
        self.show();
        if unsettled || held { SETTLE } else { POLL }
    }

    /// Publishes what is ready, unless something else is about to be. Answers whether it waits.
    fn publish_if_ready(&mut self, unsettled: bool) -> bool {
        let Some(since) = self.ready_since else { return false };
        if unsettled && since.elapsed() < HOLD_MAX {
            return true;
        }
        self.ready_since = None;
        let current = Arc::clone(&self.publisher.borrow());
        let transforms: Vec<_> = self.live.values().cloned().collect();
        if chain::digest(&transforms) != current.digest() {
            self.publish(Chain::new(current.generation + 1, transforms));
        }
        false
    }

    fn publish(&mut self, chain: Chain) {
        if let Err(error) = self.last_good.publish(self.live.values().map(|live| &**live)) {
            tracing::warn!("could not keep copies of the live transforms: {error}");
        }
        let files: Vec<&str> = chain.files().collect();
        tracing::info!(
            chain = chain.tag(),
            "live transforms: {}",
            if files.is_empty() { "none".to_owned() } else { files.join(", ") }
        );
        self.publisher.send_replace(Arc::new(chain));
    }
}

fn is_fresh(seen: &Seen) -> bool {
    // A time in the future has no age, and counts as old: it must not keep a file waiting.
    let age = seen.modified().and_then(|modified| modified.elapsed().ok());
    age.is_some_and(|age| age < UNFINISHED)
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}
