//! The system's reports of changes, which only ever mean "look again".

use std::path::Path;
use std::sync::mpsc;
use std::time::Instant;

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind, RenameMode};
use notify::{Event, Watcher as _};

use super::super::folder;
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
        let found = folder::identity(dir).ok();
        if found.is_none() || found == self.watched || self.failed {
            return;
        }
        let reports = self.reports.clone();
        let watcher = notify::recommended_watcher(move |event| {
            if is_news(&event) {
                // A failed send: the thread has ended.
                reports.send(Wake::Report { moved: moved(event), at: Instant::now() }).ok();
            }
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

/// Whether there may be something to see. Every report of a change means the same, errors and lost
/// events included. That somebody opened or read a file is no change: it is our own looking that is
/// reported then, and looking again for it would never end.
fn is_news(event: &notify::Result<Event>) -> bool {
    match event {
        Ok(event) => match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
            EventKind::Access(_) => event.need_rescan(),
            EventKind::Any
            | EventKind::Create(_)
            | EventKind::Modify(_)
            | EventKind::Remove(_)
            | EventKind::Other => true,
        },
        Err(_) => true,
    }
}

/// The name of what was renamed into the folder, if that is what the event tells. It is only waited
/// for less.
fn moved(event: notify::Result<Event>) -> Option<String> {
    let event = event.ok()?;
    let is_moved = event.kind == EventKind::Modify(ModifyKind::Name(RenameMode::To));
    let name = is_moved.then(|| event.paths.first()?.file_name()?.to_str().map(str::to_owned));
    name.flatten()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Looks at a folder as the watcher does, at each report; gives how often it looked before the
    /// reports ended.
    fn looks(dir: &Path, reports: &mpsc::Receiver<Wake>) -> u32 {
        let mut looks = 0;
        while looks < 1000 && reports.recv_timeout(Duration::from_millis(300)).is_ok() {
            looks += 1;
            for entry in std::fs::read_dir(dir).unwrap() {
                std::fs::read(entry.unwrap().path()).unwrap();
            }
        }
        looks
    }

    #[test]
    fn looking_is_no_reason_to_look_again() {
        let dir = tempfile::tempdir().unwrap();
        let (reports, received) = mpsc::channel();
        let mut reporter = Reporter::new(reports);
        reporter.follow(dir.path());
        if reporter.failed {
            eprintln!("not tested: this system reports no changes of folders");
            return;
        }
        std::fs::write(dir.path().join("10-a.wasm"), "a").unwrap();
        let first = looks(dir.path(), &received);
        assert!((1..1000).contains(&first), "{first} looks");
        std::fs::rename(dir.path().join("10-a.wasm"), dir.path().join("20-a.wasm")).unwrap();
        let second = looks(dir.path(), &received);
        assert!((1..1000).contains(&second), "{second} looks");
    }
}
