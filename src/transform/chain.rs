//! The transforms that are live together, in order. Immutable: every change makes a new chain.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::health::Health;
use super::hex;
use super::loader::Module;
use super::settings::Settings;
use super::state::LogQuota;

/// One file of the folder, loaded.
#[derive(Debug)]
pub(crate) struct Transform {
    /// The file's name in the folder.
    pub(crate) file: Arc<str>,
    pub(crate) module: Arc<Module>,
    pub(crate) settings: Settings,
    /// What the settings were read from; nothing where there is no file.
    pub(crate) settings_text: Option<String>,
    pub(crate) counters: Counters,
    /// When it went live, RFC 3339.
    pub(crate) since: String,
}

/// How often a transform was called, how often it failed, how long it took and how much it wrote.
/// Shared by all workers.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    calls: AtomicU64,
    errors: AtomicU64,
    nanos: AtomicU64,
    /// Of the lines that it writes.
    pub(crate) logs: Arc<LogQuota>,
    /// Messages that it failed and that its settings dropped for it.
    dropped: AtomicU64,
    drop_lines: LogQuota,
}

/// How many dropped messages of one transform are logged in a second.
pub(crate) const DROPS_LOGGED_MAX: u32 = 10;

impl Counters {
    pub(crate) fn called(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn took(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(crate) fn failed(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a message that was dropped for an error. Answers whether it is to be logged, and how many
    /// of the second that has just ended were not.
    pub(crate) fn dropped(&self, now: Instant) -> (bool, u32) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
        self.drop_lines.count(now, DROPS_LOGGED_MAX)
    }

    pub(crate) fn drops(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// What all calls took together.
    pub(crate) fn time(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }

    pub(crate) fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

/// What every message passes through, in file-name order.
#[derive(Debug)]
pub struct Chain {
    /// Rises with every change of the chain, for as long as the pipeline lives.
    pub generation: u64,
    digest: String,
    transforms: Vec<Arc<Transform>>,
    health: Health,
    /// When the change of the folder was seen that made this chain.
    pub(crate) seen_at: Option<Instant>,
    /// When another chain took its place.
    left: OnceLock<Instant>,
}

impl Chain {
    /// A chain of no transforms: messages go on as they are.
    #[must_use]
    pub fn empty(generation: u64) -> Self {
        Self::new(generation, Vec::new())
    }

    pub(crate) fn new(generation: u64, transforms: Vec<Arc<Transform>>) -> Self {
        let digest = digest(&transforms);
        let (health, left) = (Health::default(), OnceLock::new());
        Self { generation, digest, transforms, health, seen_at: None, left }
    }

    /// SHA-256 over file names, modules and settings, in hexadecimal. Two chains with the same
    /// digest make the same messages.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Generation and the first 16 digits of the digest, as the header `sb-chain` carries them:
    /// `7:0123456789abcdef`.
    #[must_use]
    pub fn tag(&self) -> String {
        format!("{}:{}", self.generation, &self.digest[..16])
    }

    /// The file names, in order.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.transforms.iter().map(|transform| &*transform.file)
    }

    /// Whether the settings of this file allow it to make messages vanish.
    pub(crate) fn may_drop(&self, file: &str) -> bool {
        let found = self.transforms.iter().find(|transform| &*transform.file == file);
        found.is_some_and(|transform| transform.settings.may_drop)
    }

    /// The modules' digests, in order.
    pub fn digests(&self) -> impl Iterator<Item = &str> {
        self.transforms.iter().map(|transform| transform.module.digest.as_str())
    }

    /// The texts of the settings files, in order.
    pub fn settings_texts(&self) -> impl Iterator<Item = Option<&str>> {
        self.transforms.iter().map(|transform| transform.settings_text.as_deref())
    }

    /// When the change of the folder was seen that made this chain; nothing at a start.
    #[must_use]
    pub fn seen_at(&self) -> Option<Instant> {
        self.seen_at
    }

    /// Another chain has taken its place: nothing more is given to it.
    pub fn leave(&self) {
        self.left.get_or_init(Instant::now);
    }

    /// How long ago another chain took its place; nothing where none did.
    #[must_use]
    pub fn left_for(&self) -> Option<Duration> {
        self.left.get().map(Instant::elapsed)
    }

    /// How the messages fare that it shapes.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.transforms.is_empty()
    }

    pub(crate) fn transforms(&self) -> &[Arc<Transform>] {
        &self.transforms
    }
}

/// The digest that a chain of these transforms has.
pub(crate) fn digest(transforms: &[Arc<Transform>]) -> String {
    let mut hasher = Sha256::new();
    for transform in transforms {
        for part in [&*transform.file, &transform.module.digest, transform.settings.digest()] {
            // With its length, so that no two lists of parts give the same bytes.
            hasher.update((part.len() as u64).to_be_bytes());
            hasher.update(part);
        }
    }
    hex(&hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_messages_are_all_counted_and_few_of_a_second_are_logged() {
        let counters = Counters::default();
        let start = Instant::now();
        let logged = (0..1000).filter(|_| counters.dropped(start).0).count();
        assert_eq!((logged, counters.drops()), (DROPS_LOGGED_MAX as usize, 1000));
        let later = counters.dropped(start + Duration::from_secs(1));
        assert_eq!(later, (true, 1000 - DROPS_LOGGED_MAX));
    }

    #[test]
    fn the_empty_chain_has_a_tag() {
        let chain = Chain::empty(3);
        assert_eq!(chain.tag(), "3:e3b0c44298fc1c14");
        assert_eq!(chain.digest().len(), 64);
        assert!(chain.is_empty());
    }
}
