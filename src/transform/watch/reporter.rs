//! The system's reports of changes, which only ever mean "look again".

use std::path::Path;
use std::sync::mpsc;

use notify::Watcher as _;

use super::Wake;

/// The system's reports of changes, as far as it has any.
pub(super) struct Reporter {
    reports: mpsc::Sender<Wake>,
    watcher: Option<notify::RecommendedWatcher>,
    /// The folder that is watched, by device and inode: the one at the path may be replaced.
    watched: Option<(u64, u64)>,
    failed: bool,
}

impl Reporter {
    pub(super) fn new(reports: mpsc::Sender<Wake>) -> Self {
        Self { reports, watcher: None, watched: None, failed: false }
    }

    /// Sees to it that the folder at this path is the one that is watched.
    pub(super) fn follow(&mut self, dir: &Path) {
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
