//! Follows the transforms folder and publishes the chain that it shows.
//!
//! A thread of its own looks at the folder: at once when the system reports a change, and every
//! second in any case, because network file systems and overflowing queues report nothing. What
//! was reported is never trusted; it only means "look again". A file counts when two looks saw it
//! the same, and a deletion when it lasted a second. Candidates are compiled, instantiated and
//! initialised there, beside the traffic; then a new chain is published whole.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use notify::Watcher as _;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::cache::Cache;
use super::chain::{self, Chain, Counters, Transform};
use super::engine::Engine;
use super::folder::{self, Content, Look, Seen};
use super::instance::Instance;
use super::last_good::LastGood;
use super::loader::{self, Module};
use super::runner::Runner;
use super::settings::Settings;

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

/// From this size on a module is compiled on threads of low priority: it takes many seconds.
const LARGE_BYTES: usize = 1024 * 1024;

/// The priority of those threads: the kernel gives them about a tenth of a busy processor.
const NICE: i32 = 10;

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

/// What is in the folder, as scripts and the console read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransformList {
    pub generation: u64,
    /// Of the chain.
    pub digest: String,
    pub transforms: Vec<TransformView>,
    /// What an operator should know beside: settings files without a module, a folder that cannot
    /// be read.
    pub warnings: Vec<String>,
}

/// One version of one file. A file whose new version was rejected is there twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransformView {
    pub file: String,
    /// SHA-256 of the module; empty where the file could not be read.
    pub digest: String,
    pub state: TransformState,
    /// Why it was rejected.
    pub reason: Option<String>,
    /// RFC 3339.
    pub since: String,
    pub calls: u64,
    pub errors: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransformState {
    Live,
    Compiling,
    Rejected,
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

fn live_view(transform: &Transform) -> TransformView {
    TransformView {
        file: transform.file.to_string(),
        digest: transform.module.digest.clone(),
        state: TransformState::Live,
        reason: None,
        since: transform.since.clone(),
        calls: transform.counters.calls(),
        errors: transform.counters.errors(),
    }
}

/// What the watching thread tells of files that are not live.
#[derive(Debug, Default)]
struct View {
    others: Vec<TransformView>,
    warnings: Vec<String>,
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

/// Why a file is not usable.
#[derive(Debug)]
struct Refusal {
    digest: String,
    reason: String,
    may_be_unfinished: bool,
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

    /// Takes files out that are gone for good. Answers whether one is gone and may come back.
    fn note_deletions(&mut self, look: &Look) -> bool {
        self.missing.retain(|file, _| !look.modules.contains_key(file));
        let known: BTreeSet<String> = self
            .live
            .keys()
            .chain(self.rejected.keys())
            .chain(self.handled.keys())
            .cloned()
            .collect();
        for file in known {
            if look.modules.contains_key(&file) {
                continue;
            }
            let since = *self.missing.entry(file.clone()).or_insert_with(Instant::now);
            if since.elapsed() < DELETED_AFTER {
                continue;
            }
            self.missing.remove(&file);
            self.handled.remove(&file);
            self.first_seen.remove(&file);
            self.rejected.remove(&file);
            if self.live.remove(&file).is_some() {
                tracing::info!(file, "the file was deleted, and leaves the chain");
                self.ready_since.get_or_insert_with(Instant::now);
            }
        }
        !self.missing.is_empty()
    }

    /// Whether this state of a file was first seen so recently that it may still be being written.
    /// By our own clock: a file that is emptied to be written anew can be seen with its old time.
    fn is_new(&mut self, file: &str, seen: &Seen) -> bool {
        let now = Instant::now();
        match self.first_seen.get(file) {
            Some((known, since)) if known == seen => now.duration_since(*since) < UNFINISHED,
            _ => {
                self.first_seen.insert(file.to_owned(), (seen.clone(), now));
                true
            }
        }
    }

    /// Loads files that changed and have settled. Answers whether one has not settled.
    fn load_changed(&mut self, look: &Look) -> bool {
        let mut unsettled = false;
        let mut candidates = Vec::new();
        for (file, seen) in &look.modules {
            if self.handled.get(file) == Some(seen) {
                continue;
            }
            let is_settled = self.previous.modules.get(file) == Some(seen);
            // Who writes a file in place empties it first, and an empty settings file is valid.
            let is_new = self.is_new(file, seen);
            if is_settled && !(seen.has_empty() && is_new) {
                candidates.push((file, seen));
            } else {
                unsettled = true;
            }
        }
        let names: Vec<&String> = candidates.iter().map(|(file, _)| *file).collect();
        if !names.is_empty() {
            self.show_with(Vec::new(), &names);
        }
        for (file, seen) in candidates {
            let started = Instant::now();
            let loaded = self.load(file);
            let now = folder::look(&self.dir).ok();
            if now.as_ref().and_then(|look| look.modules.get(file)) != Some(seen) {
                // It changed while it was read.
                unsettled = true;
                continue;
            }
            match loaded {
                Err(refusal) if refusal.may_be_unfinished && self.is_new(file, seen) => {
                    unsettled = true;
                    continue;
                }
                Err(refusal) => {
                    let stays = if self.live.contains_key(file) {
                        "the version before stays live"
                    } else {
                        "it does not go live"
                    };
                    tracing::warn!(file, "rejected a transform, and {stays}: {}", refusal.reason);
                    self.reject(file, refusal);
                }
                Ok(transform) => {
                    self.rejected.remove(file);
                    let is_same = self.live.get(file).is_some_and(|live| {
                        live.module.digest == transform.module.digest
                            && live.settings.digest() == transform.settings.digest()
                    });
                    if !is_same {
                        let took = started.elapsed().as_millis();
                        tracing::info!(file, "loaded a transform in {took} ms");
                        self.live.insert(file.clone(), transform);
                        self.ready_since.get_or_insert_with(Instant::now);
                    }
                }
            }
            self.handled.insert(file.clone(), seen.clone());
        }
        unsettled
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

    /// Reads, checks, compiles and tries one file.
    fn load(&self, file: &str) -> Result<Arc<Transform>, Refusal> {
        let content = folder::read(&self.dir, file).map_err(|error| Refusal {
            digest: String::new(),
            reason: format!("it could not be read: {error}"),
            may_be_unfinished: true,
        })?;
        self.make(file, content)
    }

    fn load_last_good(&self, file: &str) -> Option<Arc<Transform>> {
        let made = self.make(file, self.last_good.get(file)?);
        made.inspect_err(|refusal| {
            tracing::warn!(file, "the copy of its last good version fails too: {}", refusal.reason);
        })
        .ok()
    }

    fn make(&self, file: &str, content: Content) -> Result<Arc<Transform>, Refusal> {
        let digest = loader::digest(&content.module);
        let refuse = |reason: String, may_be_unfinished| Refusal {
            digest: digest.clone(),
            reason,
            may_be_unfinished,
        };
        let text = content.settings.as_deref().unwrap_or("");
        let settings = Settings::parse(text).map_err(|error| {
            refuse(format!("its settings file `{}`: {error}", folder::settings_name(file)), true)
        })?;
        // The same module with other settings need not be compiled again.
        let live = self.live.get(file).filter(|live| live.module.digest == digest);
        let module = match live {
            Some(live) => Arc::clone(&live.module),
            None => {
                let loaded = self.compile(&content.module);
                Arc::new(
                    loaded.map_err(|error| refuse(error.to_string(), error.may_be_unfinished()))?,
                )
            }
        };
        let name: Arc<str> = file.into();
        Instance::start(&self.engine, &name, &module, &settings)
            .map_err(|fault| refuse(format!("it {}", fault.reason), true))?;
        if let Err(error) = self.last_good.keep(&digest, &content.module) {
            tracing::warn!(file, "could not keep a copy of the transform: {error}");
        }
        Ok(Arc::new(Transform {
            file: name,
            module,
            settings,
            settings_text: content.settings,
            counters: Counters::default(),
            since: now(),
        }))
    }

    /// Large modules on threads of low priority, so that the traffic does not feel it.
    fn compile(&self, bytes: &[u8]) -> Result<Module, loader::Error> {
        let compile = || loader::load(&self.engine, bytes, Some(&self.cache));
        if bytes.len() < LARGE_BYTES {
            return compile();
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .thread_name(|_| "transform-compile".into())
            .start_handler(|_| {
                // Without the right to it, the compilation is only less polite.
                rustix::process::setpriority_process(None, NICE).ok();
            })
            .build();
        match pool {
            Ok(pool) => pool.install(compile),
            Err(_) => compile(),
        }
    }

    fn reject(&mut self, file: &str, refusal: Refusal) {
        let Refusal { digest, reason, may_be_unfinished: _ } = refusal;
        self.rejected.insert(file.to_owned(), Rejected { digest, reason, since: now() });
    }

    fn warn_of_orphans(&mut self, look: &Look) {
        for file in &look.orphans {
            let text = orphan(file);
            if self.warned.insert(text.clone()) {
                tracing::warn!("{text}");
            }
        }
        // Said again should it happen again.
        self.warned.retain(|text| look.orphans.iter().any(|file| *text == orphan(file)));
    }

    fn show(&self) {
        self.show_with(self.warned.iter().cloned().collect(), &[]);
    }

    fn show_with(&self, warnings: Vec<String>, compiling: &[&String]) {
        let rejected = self.rejected.iter().filter(|(file, _)| !compiling.contains(file)).map(
            |(file, rejected)| TransformView {
                file: file.clone(),
                digest: rejected.digest.clone(),
                state: TransformState::Rejected,
                reason: Some(rejected.reason.clone()),
                since: rejected.since.clone(),
                calls: 0,
                errors: 0,
            },
        );
        let compiling = compiling.iter().map(|file| TransformView {
            file: (*file).clone(),
            digest: String::new(),
            state: TransformState::Compiling,
            reason: None,
            since: now(),
            calls: 0,
            errors: 0,
        });
        let others = rejected.chain(compiling).collect();
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = View { others, warnings };
    }
}

fn orphan(file: &str) -> String {
    format!("`{file}` in the transforms folder has no module beside it, and is ignored")
}

fn is_fresh(seen: &Seen) -> bool {
    // A time in the future has no age, and counts as old: it must not keep a file waiting.
    let age = seen.modified().and_then(|modified| modified.elapsed().ok());
    age.is_some_and(|age| age < UNFINISHED)
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}

/// The system's reports of changes, as far as it has any.
struct Reporter {
    reports: mpsc::Sender<Wake>,
    watcher: Option<notify::RecommendedWatcher>,
    /// The folder that is watched, by device and inode: the one at the path may be replaced.
    watched: Option<(u64, u64)>,
    failed: bool,
}

impl Reporter {
    fn new(reports: mpsc::Sender<Wake>) -> Self {
        Self { reports, watcher: None, watched: None, failed: false }
    }

    /// Sees to it that the folder at this path is the one that is watched.
    fn follow(&mut self, dir: &Path) {
        use std::os::unix::fs::MetadataExt as _;
        let found = std::fs::metadata(dir).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        if found.is_none() || found == self.watched || self.failed {
            return;
        }
        let reports = self.reports.clone();
        // Every report means the same, errors and lost events included. A failed send: the
        // thread has ended.
        let watcher = notify::recommended_watcher(move |_| {
            reports.send(Wake::Report).ok();
        })
        .and_then(|mut watcher| {
            watcher.watch(dir, notify::RecursiveMode::NonRecursive).map(|()| watcher)
        });
        match watcher {
            Ok(watcher) => {
                self.watcher = Some(watcher);
                self.watched = found;
            }
            Err(error) => {
                self.failed = true;
                tracing::warn!(
                    "the system does not report changes of the transforms folder, which is \
                     looked at every second instead: {error}"
                );
            }
        }
    }
}
