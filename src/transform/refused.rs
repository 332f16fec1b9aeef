//! Versions of files that must not go live: they do not load, a trial showed that they break what
//! worked, or they failed after they had gone live. Kept in the state folder, so that a restart does not
//! take them for new.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::chain::Transform;
use super::folder::write_atomically;
use super::vet::VetReport;
use super::watch::TransformState;

const FILE: &str = "refused-transforms.json";

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

/// The refused versions, one for each file.
#[derive(Debug)]
pub(crate) struct Refusals {
    path: PathBuf,
    entries: BTreeMap<String, Refused>,
    /// What the file holds.
    written: BTreeMap<String, Refused>,
}

impl Refusals {
    /// Reads what an earlier run refused.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(FILE);
        let entries: BTreeMap<String, Refused> = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        Ok(Self { path, written: entries.clone(), entries })
    }

    pub(crate) fn get(&self, file: &str) -> Option<&Refused> {
        self.entries.get(file)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Refused)> {
        self.entries.iter()
    }

    pub(crate) fn insert(&mut self, file: &str, refused: Refused) {
        self.entries.insert(file.to_owned(), refused);
        self.save();
    }

    pub(crate) fn remove(&mut self, file: &str) {
        if self.entries.remove(file).is_some() {
            self.save();
        }
    }

    fn save(&mut self) {
        if self.entries == self.written {
            return;
        }
        let saved = serde_json::to_vec_pretty(&self.entries)
            .map_err(io::Error::other)
            .and_then(|text| write_atomically(&self.path, |file| file.write_all(&text)));
        match saved {
            Ok(()) => self.written.clone_from(&self.entries),
            Err(error) => tracing::warn!(
                file = %self.path.display(),
                "could not keep which transforms are refused, and a restart will try them again: \
                 {error}"
            ),
        }
    }
}
