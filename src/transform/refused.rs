//! Versions of files that must not go live: they do not load, a trial showed that they break what
//! worked, or they failed after they had gone live. Kept in the state folder, so that a restart does not
//! take them for new.
//!
//! What a file holds is refused as long as it holds it. What was rolled back is refused by its content,
//! the module and its settings, whatever it is called and however often it is taken away and put back;
//! it is a new version once either of both says something else.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::chain::Transform;
use super::folder::write_atomically;
use super::vet::VetReport;
use super::watch::TransformState;

const FILE: &str = "refused-transforms.json";
const ROLLED_BACK_FILE: &str = "rolled-back-transforms.json";

/// How many contents that were rolled back are remembered, the newest.
const ROLLED_BACK_MAX: usize = 200;

/// One version of a file, and why it is not live.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refused {
    /// SHA-256 of the module; empty where it could not be read.
    pub(crate) digest: String,
    /// SHA-256 of its settings; nothing where it did not load.
    pub(crate) settings: Option<String>,
    pub(crate) state: TransformState,
    pub(crate) reason: String,
    /// RFC 3339.
    pub(crate) since: String,
    pub(crate) vet: Option<VetReport>,
}

impl Refused {
    /// Whether the module with this digest was refused because it does not load.
    pub(crate) fn is_unusable(&self, digest: &str) -> bool {
        self.settings.is_none() && self.digest == digest
    }

    /// Whether it is about this very content.
    pub(crate) fn is_of(&self, transform: &Transform) -> bool {
        self.digest == transform.module.digest
            && self.settings.as_deref() == Some(transform.settings.digest())
    }
}

/// A content that was rolled back, under whichever name it stands in the folder now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RolledBack {
    /// What it was called when it failed.
    file: String,
    refused: Refused,
}

/// The refused versions, one for each file, and the contents that were rolled back.
#[derive(Debug)]
pub(crate) struct Refusals {
    entries: Kept<BTreeMap<String, Refused>>,
    rolled_back: Kept<Vec<RolledBack>>,
    is_saved: bool,
}

impl Refusals {
    /// Reads what an earlier run refused.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let entries = Kept::open(state_dir.join(FILE))?;
        let rolled_back = Kept::open(state_dir.join(ROLLED_BACK_FILE))?;
        Ok(Self { entries, rolled_back, is_saved: true })
    }

    pub(crate) fn get(&self, file: &str) -> Option<&Refused> {
        self.entries.now.get(file)
    }

    /// Whether this very content was refused under this name, or rolled back under whichever.
    pub(crate) fn of(&self, transform: &Transform) -> Option<Refused> {
        let file = &*transform.file;
        let here = self.get(file).filter(|refused| refused.is_of(transform));
        here.cloned().or_else(|| {
            let is_it = |back: &&RolledBack| back.refused.is_of(transform);
            let RolledBack { file: name, refused } = self.rolled_back.now.iter().find(is_it)?;
            let mut refused = refused.clone();
            if name != file {
                refused.reason = format!("it is what `{name}` was: {}", refused.reason);
            }
            Some(refused)
        })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Refused)> {
        self.entries.now.iter()
    }

    /// Kept by [`Self::save`]: whoever puts a thousand files into the folder must not make it write as often.
    pub(crate) fn insert(&mut self, file: &str, refused: Refused) {
        self.entries.now.insert(file.to_owned(), refused);
        self.is_saved = false;
    }

    /// Keeps what was refused, and what is not any more, for a restart.
    pub(crate) fn save(&mut self) {
        if !std::mem::replace(&mut self.is_saved, true) {
            self.entries.save();
        }
    }

    /// Refuses a content from now on that was live under this name.
    pub(crate) fn insert_rolled_back(&mut self, file: &str, refused: Refused) {
        let known = &mut self.rolled_back.now;
        known.retain(|back| {
            (&back.refused.digest, &back.refused.settings) != (&refused.digest, &refused.settings)
        });
        known.drain(..(known.len() + 1).saturating_sub(ROLLED_BACK_MAX));
        known.push(RolledBack { file: file.to_owned(), refused: refused.clone() });
        self.rolled_back.save();
        self.insert(file, refused);
        self.save();
    }

    /// Nothing of this name is refused any more. What was rolled back goes on to be, should it come back.
    pub(crate) fn remove(&mut self, file: &str) {
        if self.entries.now.remove(file).is_some() {
            self.is_saved = false;
        }
    }
}

/// A value, and the file that keeps it over a restart.
#[derive(Debug)]
struct Kept<T> {
    path: PathBuf,
    now: T,
    /// What the file holds.
    written: T,
}

impl<T: Clone + Default + PartialEq + Serialize + DeserializeOwned> Kept<T> {
    fn open(path: PathBuf) -> io::Result<Self> {
        let now: T = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => T::default(),
            Err(error) => return Err(error),
        };
        Ok(Self { path, written: now.clone(), now })
    }

    fn save(&mut self) {
        if self.now == self.written {
            return;
        }
        let saved = serde_json::to_vec_pretty(&self.now)
            .map_err(io::Error::other)
            .and_then(|text| write_atomically(&self.path, |file| file.write_all(&text)));
        match saved {
            Ok(()) => self.written.clone_from(&self.now),
            Err(error) => tracing::warn!(
                file = %self.path.display(),
                "could not keep which transforms are refused, and a restart will try them again: \
                 {error}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(reason: &str) -> Refused {
        let (reason, since) = (reason.to_owned(), "2026-01-01T00:00:00Z".to_owned());
        let state = TransformState::Rejected;
        Refused { digest: "d".to_owned(), settings: None, state, reason, since, vet: None }
    }

    #[test]
    fn many_refusals_are_written_once_and_a_rollback_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let kept = || {
            let refusals = Refusals::open(dir.path()).unwrap();
            refusals.iter().map(|(file, _)| file.clone()).collect::<Vec<_>>()
        };
        let mut refusals = Refusals::open(dir.path()).unwrap();
        for number in 10..14 {
            refusals.insert(&format!("{number}-x.wasm"), refused("it is broken"));
        }
        refusals.remove("11-x.wasm");
        assert!(kept().is_empty());
        refusals.save();
        assert_eq!(kept(), ["10-x.wasm", "12-x.wasm", "13-x.wasm"]);
        // A crash must not let it go live again.
        refusals.insert_rolled_back("12-x.wasm", refused("it failed"));
        assert_eq!(Refusals::open(dir.path()).unwrap().get("12-x.wasm"), refusals.get("12-x.wasm"));
    }
}
