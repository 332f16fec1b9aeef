//! Copies of the modules and settings that were live last, in the state folder.
//!
//! A restart that finds a broken file where a working one was goes on with the copy: to start
//! without the transform would deliver what it was there to hide.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::chain::Transform;
use super::folder::{Content, create_private, write_atomically};
use super::health::Tally;
use super::loader;
use super::vet::VetReport;
use super::workbench::ModuleFiles;

/// The folder's name in the state folder.
const FOLDER: &str = "last-good-transforms";

const MANIFEST: &str = "manifest.json";

/// What a chain that has not proven itself yet would be taken back to.
const PROBATION: &str = "probation.json";

/// The folder that the modules stood in.
const PLACE: &str = "folder.json";

/// A probation that a restart must not end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Unproven {
    /// The versions that proved themselves last.
    good: BTreeMap<String, Entry>,
    /// The files that changed since.
    changed: BTreeSet<String>,
    /// The files that are gone since, and those that came in their place.
    #[serde(default)]
    replaced: BTreeMap<String, BTreeSet<String>>,
    /// How messages fared before.
    baseline: Tally,
}

/// A probation as it is restored.
pub(crate) struct Probationers {
    /// By file.
    pub(crate) good: BTreeMap<String, Content>,
    pub(crate) reports: BTreeMap<String, VetReport>,
    pub(crate) changed: BTreeSet<String>,
    pub(crate) replaced: BTreeMap<String, BTreeSet<String>>,
    pub(crate) baseline: Tally,
}

/// The folder with the copies.
#[derive(Debug)]
pub(crate) struct LastGood {
    dir: PathBuf,
    entries: BTreeMap<String, Entry>,
    unproven: Option<Unproven>,
    /// By device and inode; nothing where an earlier version kept the copies.
    place: Option<(u64, u64)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// SHA-256 of the module, and its copy's file name.
    digest: String,
    settings: Option<String>,
    /// What vetting said before it went live.
    #[serde(default)]
    vet: Option<VetReport>,
    /// Where the file is gone, and its transform stays live: all that came with that.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    stays_for: BTreeSet<String>,
}

impl Entry {
    fn of(transform: &Transform, reports: &BTreeMap<String, VetReport>) -> Self {
        Self {
            digest: transform.module.digest.clone(),
            settings: transform.settings_text.clone(),
            vet: reports.get(&*transform.file).cloned(),
            stays_for: BTreeSet::new(),
        }
    }
}

impl LastGood {
    /// Opens the folder, and makes it if there is none.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join(FOLDER);
        create_private(&dir)?;
        let entries = read_json(&dir.join(MANIFEST))?.unwrap_or_default();
        let unproven = read_json(&dir.join(PROBATION))?;
        let place = read_json(&dir.join(PLACE))?;
        Ok(Self { dir, entries, unproven, place })
    }

    /// The file names of the last chain.
    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The folder that the modules stood in, by device and inode.
    pub(crate) fn place(&self) -> Option<(u64, u64)> {
        self.place
    }

    /// Remembers the folder that the modules stand in.
    pub(crate) fn set_place(&mut self, place: (u64, u64)) -> io::Result<()> {
        if self.place.replace(place) == Some(place) && self.dir.join(PLACE).exists() {
            return Ok(());
        }
        create_private(&self.dir)?;
        let text = serde_json::to_vec(&place).map_err(io::Error::other)?;
        write_atomically(&self.dir.join(PLACE), |file| file.write_all(&text))
    }

    /// The copy of a file, if there is one and it is intact.
    pub(crate) fn get(&self, file: &str) -> Option<Content> {
        self.content(self.entries.get(file)?)
    }

    fn content(&self, entry: &Entry) -> Option<Content> {
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

    /// Whether this module was live last under this name, with whatever settings.
    pub(crate) fn has_module(&self, file: &str, digest: &str) -> bool {
        self.entries.get(file).is_some_and(|entry| entry.digest == digest)
    }

    /// What came when this file went, where its transform stayed live for that.
    pub(crate) fn stays_for(&self, file: &str) -> BTreeSet<String> {
        self.entries.get(file).map(|entry| entry.stays_for.clone()).unwrap_or_default()
    }

    /// What vetting said of a file's last version.
    pub(crate) fn vet(&self, file: &str) -> Option<VetReport> {
        self.entries.get(file)?.vet.clone()
    }

    /// Whether there is a copy of the module with this digest.
    pub(crate) fn has(&self, digest: &str) -> bool {
        self.dir.join(digest).exists()
    }

    /// Copies a module that is about to go live.
    pub(crate) fn keep(&self, digest: &str, module: &[u8]) -> io::Result<()> {
        let path = self.dir.join(digest);
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() == module.len() as u64) {
            return Ok(());
        }
        // Somebody may have cleared it away.
        create_private(&self.dir)?;
        write_atomically(&path, |file| file.write_all(module))
    }

    /// Makes these transforms the last good ones. Their modules were kept before. Copies of
    /// `others` stay too: they may go live next, or again. `staying`: those whose file is gone, and what
    /// came with that.
    pub(crate) fn publish<'a>(
        &mut self,
        transforms: impl Iterator<Item = &'a Transform>,
        reports: &BTreeMap<String, VetReport>,
        staying: &BTreeMap<String, BTreeSet<String>>,
        others: &[String],
    ) -> io::Result<()> {
        let entry = |transform: &Transform| {
            let stays_for = staying.get(&*transform.file).cloned().unwrap_or_default();
            (transform.file.to_string(), Entry { stays_for, ..Entry::of(transform, reports) })
        };
        let entries: BTreeMap<String, Entry> = transforms.map(entry).collect();
        if entries != self.entries || !self.dir.join(MANIFEST).exists() {
            create_private(&self.dir)?;
            let text = serde_json::to_vec_pretty(&entries).map_err(io::Error::other)?;
            write_atomically(&self.dir.join(MANIFEST), |file| file.write_all(&text))?;
            self.entries = entries;
        }
        self.prune(others)
    }

    /// Remembers what a chain on probation would be taken back to. Copies of the modules are kept by
    /// [`Self::publish`].
    pub(crate) fn set_probation<'a>(
        &mut self,
        good: impl Iterator<Item = &'a Transform>,
        reports: &BTreeMap<String, VetReport>,
        changed: &BTreeSet<String>,
        replaced: &BTreeMap<String, BTreeSet<String>>,
        baseline: Tally,
    ) -> io::Result<()> {
        let good = good.map(|it| (it.file.to_string(), Entry::of(it, reports))).collect();
        let (changed, replaced) = (changed.clone(), replaced.clone());
        let unproven = Unproven { good, changed, replaced, baseline };
        if self.unproven.as_ref() == Some(&unproven) {
            return Ok(());
        }
        create_private(&self.dir)?;
        let text = serde_json::to_vec_pretty(&unproven).map_err(io::Error::other)?;
        write_atomically(&self.dir.join(PROBATION), |file| file.write_all(&text))?;
        self.unproven = Some(unproven);
        Ok(())
    }

    /// There is no probation any more.
    pub(crate) fn end_probation(&mut self) -> io::Result<()> {
        if self.unproven.take().is_none() {
            return Ok(());
        }
        match fs::remove_file(self.dir.join(PROBATION)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// The probation that the last run left, as far as its copies are intact.
    pub(crate) fn probation(&self) -> Option<Probationers> {
        let Unproven { good, changed, replaced, baseline } = self.unproven.as_ref()?;
        let reports = good.iter().filter_map(|(file, it)| Some((file.clone(), it.vet.clone()?)));
        let reports = reports.collect();
        let good = good.iter().map(|(file, entry)| Some((file.clone(), self.content(entry)?)));
        let good = good.collect::<Option<_>>()?;
        let (changed, replaced) = (changed.clone(), replaced.clone());
        Some(Probationers { good, reports, changed, replaced, baseline: *baseline })
    }

    /// Deletes copies that neither the manifest nor `others` name.
    fn prune(&self, others: &[String]) -> io::Result<()> {
        for file in fs::read_dir(&self.dir)? {
            let file = file?;
            let name = file.file_name();
            let is_used = name == MANIFEST
                || name == PROBATION
                || name == PLACE
                || self.entries.values().any(|entry| name.to_str() == Some(&entry.digest))
                || others.iter().any(|digest| name.to_str() == Some(digest));
            if !is_used {
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    }
}

/// The modules that are live, or were last, in their order; nothing where no pipeline ever had this
/// state folder. Changes nothing, so that a running pipeline may own it.
///
/// # Errors
///
/// When a file cannot be read, or is not what it was when it was kept.
pub fn live_modules(state_dir: &Path) -> io::Result<Option<Vec<ModuleFiles>>> {
    let dir = state_dir.join(FOLDER);
    let Some(entries) = read_json(&dir.join(MANIFEST))? else { return Ok(None) };
    let kept = LastGood { dir, entries, unproven: None, place: None };
    let module = |file: &str| {
        let Content { module, settings } = kept
            .get(file)
            .ok_or_else(|| io::Error::other(format!("the copy of `{file}` is gone or damaged")))?;
        Ok(ModuleFiles { file: file.to_owned(), module, settings })
    };
    kept.files().map(module).collect::<io::Result<_>>().map(Some)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
