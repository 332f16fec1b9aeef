//! Copies of the modules and settings that were live last, in the state folder.
//!
//! A restart that finds a broken file where a working one was goes on with the copy: to start
//! without the transform would deliver what it was there to hide.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::chain::Transform;
use super::folder::{Content, create_private, write_atomically};
use super::loader;
use super::vet::VetReport;

/// The folder's name in the state folder.
const FOLDER: &str = "last-good-transforms";

const MANIFEST: &str = "manifest.json";

/// The folder with the copies.
#[derive(Debug)]
pub(crate) struct LastGood {
    dir: PathBuf,
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// SHA-256 of the module, and its copy's file name.
    digest: String,
    settings: Option<String>,
    /// What vetting said before it went live.
    #[serde(default)]
    vet: Option<VetReport>,
}

impl LastGood {
    /// Opens the folder, and makes it if there is none.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join(FOLDER);
        create_private(&dir)?;
        let entries = match fs::read(dir.join(MANIFEST)) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        Ok(Self { dir, entries })
    }

    /// The file names of the last chain.
    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The copy of a file, if there is one and it is intact.
    pub(crate) fn get(&self, file: &str) -> Option<Content> {
        let entry = self.entries.get(file)?;
        let module = fs::read(self.dir.join(&entry.digest)).ok()?;
        (loader::digest(&module) == entry.digest)
            .then(|| Content { module, settings: entry.settings.clone() })
    }

    /// Whether this is the version of the file that was live last.
    pub(crate) fn is(&self, transform: &Transform) -> bool {
        self.entries.get(&*transform.file).is_some_and(|entry| {
            entry.digest == transform.module.digest && entry.settings == transform.settings_text
        })
    }

    /// What vetting said of a file's last version.
    pub(crate) fn vet(&self, file: &str) -> Option<VetReport> {
        self.entries.get(file)?.vet.clone()
    }

    /// Copies a module that is about to go live.
    pub(crate) fn keep(&self, digest: &str, module: &[u8]) -> io::Result<()> {
        let path = self.dir.join(digest);
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() == module.len() as u64) {
            return Ok(());
        }
        write_atomically(&path, |file| file.write_all(module))
    }

    /// Makes these transforms the last good ones. Their modules were kept before. Copies of
    /// `others` stay too: they may go live next, or again.
    pub(crate) fn publish<'a>(
        &mut self,
        transforms: impl Iterator<Item = &'a Transform>,
        reports: &BTreeMap<String, VetReport>,
        others: &[String],
    ) -> io::Result<()> {
        let entry = |transform: &Transform| Entry {
            digest: transform.module.digest.clone(),
            settings: transform.settings_text.clone(),
            vet: reports.get(&*transform.file).cloned(),
        };
        let entries: BTreeMap<String, Entry> =
            transforms.map(|transform| (transform.file.to_string(), entry(transform))).collect();
        if entries != self.entries {
            let text = serde_json::to_vec_pretty(&entries).map_err(io::Error::other)?;
            write_atomically(&self.dir.join(MANIFEST), |file| file.write_all(&text))?;
            self.entries = entries;
        }
        self.prune(others)
    }

    /// Deletes copies that neither the manifest nor `others` name.
    fn prune(&self, others: &[String]) -> io::Result<()> {
        for file in fs::read_dir(&self.dir)? {
            let file = file?;
            let name = file.file_name();
            let is_used = name == MANIFEST
                || self.entries.values().any(|entry| name.to_str() == Some(&entry.digest))
                || others.iter().any(|digest| name.to_str() == Some(digest));
            if !is_used {
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    }
}
