//! What is in the folder, as operators, scripts and the console read it.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::super::chain::Transform;
use super::super::folder::Look;
use super::super::vet::VetReport;
use super::promote::{Change, UnderTrial};
use super::settle::UNFINISHED;
use super::{Watcher, now};

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
    /// Why it was rejected or rolled back.
    pub reason: Option<String>,
    /// RFC 3339.
    pub since: String,
    pub calls: u64,
    pub errors: u64,
    /// Messages that it failed and that its settings dropped (`on_error = "drop"`).
    pub dropped: u64,
    /// What all calls took together, in microseconds.
    pub micros: u64,
    /// What vetting said, where it was asked.
    pub vet: Option<VetReport>,
    /// The same as one clause: `fixes 37 of 40, breaks 0 of 540`.
    #[serde(default)]
    pub vet_text: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransformState {
    Live,
    /// Being read, compiled and started.
    Compiling,
    /// Loaded, and being tried on parked messages and recent changes.
    Vetting,
    /// It does not load, or vetting refused it.
    Rejected,
    /// It was live and failed, so that the version before came back.
    RolledBack,
}

pub(super) fn live_view(transform: &Transform, vet: Option<VetReport>) -> TransformView {
    TransformView {
        file: transform.file.to_string(),
        digest: transform.module.digest.clone(),
        state: TransformState::Live,
        reason: None,
        since: transform.since.clone(),
        calls: transform.counters.calls(),
        errors: transform.counters.errors(),
        dropped: transform.counters.drops(),
        micros: u64::try_from(transform.counters.time().as_micros()).unwrap_or(u64::MAX),
        vet_text: vet.as_ref().map(VetReport::text),
        vet,
    }
}

/// A version that is not live.
fn other_view(file: &str, digest: &str, state: TransformState, since: String) -> TransformView {
    TransformView {
        file: file.to_owned(),
        digest: digest.to_owned(),
        state,
        reason: None,
        since,
        calls: 0,
        errors: 0,
        dropped: 0,
        micros: 0,
        vet: None,
        vet_text: None,
    }
}

/// What the watching thread tells of files that are not live.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) others: Vec<TransformView>,
    pub(super) warnings: Vec<String>,
    /// Of the live versions, by file.
    pub(super) reports: BTreeMap<String, VetReport>,
}

impl Watcher {
    /// `restless`: files that never stay the same for long enough to be read.
    pub(super) fn warn_of_what_is_odd(&mut self, look: &Look, restless: &[String]) {
        let now = Instant::now();
        self.orphans.retain(|file, _| look.orphans.contains(file));
        for file in &look.orphans {
            self.orphans.entry(file.clone()).or_insert(now);
        }
        // Whoever puts both files there begins with one of them.
        let lonely =
            self.orphans.iter().filter(|(_, since)| now.duration_since(**since) >= UNFINISHED);
        let orphans = lonely.map(|(file, _)| orphan(file));
        let misnamed = look.misnamed.iter().map(|(name, why)| {
            format!(
                "`{name}` in the transforms folder is ignored: its name {why}; modules are called \
                 `NN-name.wasm`, and their settings `NN-name.toml`"
            )
        });
        let restless = restless.iter().map(|file| {
            format!(
                "`{file}` or its settings change again and again, so that nothing is done about them until \
                 they stay the same for a moment; who writes slowly writes to a name that ends in `.tmp`, \
                 and renames it then"
            )
        });
        let waiting = self.waiting_deletions();
        let staying = waiting.iter().filter(|(_, waiting)| !waiting.refused.is_empty());
        let staying = staying.map(|(file, waiting)| stays(file, &waiting.refused));
        let odd: Vec<String> = orphans.chain(misnamed).chain(restless).chain(staying).collect();
        for text in &odd {
            self.warn(text.clone());
        }
        // Said again should it happen again.
        self.warned.retain(|text| odd.contains(text));
    }

    /// Warns of what keeps the folder from being followed, once.
    pub(super) fn warn(&mut self, text: String) {
        if self.warned.insert(text.clone()) {
            tracing::warn!("{text}");
        }
    }

    /// Publishes what operators see.
    pub(super) fn show(&self) {
        let refused = self.refusals.iter().filter(|(file, _)| !self.making.contains_key(*file));
        let refused = refused.map(|(file, refused)| TransformView {
            reason: Some(refused.reason.clone()),
            vet: refused.vet.clone(),
            vet_text: refused.vet.as_ref().map(VetReport::text),
            ..other_view(file, &refused.digest, refused.state, refused.since.clone())
        });
        let compiling =
            self.making.keys().map(|file| other_view(file, "", TransformState::Compiling, now()));
        let tried = self.trial.iter().flat_map(UnderTrial::transforms);
        let vetting = tried.map(|transform| {
            let (digest, since) = (&transform.module.digest, transform.since.clone());
            other_view(&transform.file, digest, TransformState::Vetting, since)
        });
        // Ready, and tried once the step that it is part of can be taken.
        let held = self.held_back();
        let held = self.ready.iter().filter(|(file, _)| held.contains(*file));
        let held = held.filter_map(|(file, change)| match change {
            Change::To(transform) => Some(TransformView {
                reason: Some("it waits for what came with it, as the warnings say".into()),
                ..other_view(
                    file,
                    &transform.module.digest,
                    TransformState::Vetting,
                    transform.since.clone(),
                )
            }),
            Change::Gone => None,
        });
        let others = refused.chain(compiling).chain(vetting).chain(held).collect();
        let waiting = self.waiting_deletions().into_iter();
        let waiting = waiting.filter(|(_, waiting)| waiting.refused.is_empty());
        let waiting = waiting.map(|(file, waiting)| {
            let coming = named(&waiting.coming);
            format!(
                "`{file}` was deleted, and stays live until what came with that is ready: {coming}"
            )
        });
        let warnings = self.warned.iter().chain(self.notices.values()).cloned();
        let warnings = warnings.chain(waiting).collect();
        let view = View { others, warnings, reports: self.reports.clone() };
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = view;
    }
}

/// What to say of a file that is gone and live because of these.
fn stays(file: &str, refused: &[&str]) -> String {
    let refused = named(refused);
    format!(
        "`{file}` was deleted, and stays live: what came with that is refused ({refused}), and without \
         either, messages would be delivered that `{file}` is there to shape. Mend what is refused; or \
         take it away, and the deletion takes place"
    )
}

fn named(files: &[&str]) -> String {
    let files: Vec<String> = files.iter().map(|file| format!("`{file}`")).collect();
    files.join(", ")
}

fn orphan(file: &str) -> String {
    let module = file.strip_suffix(".toml").unwrap_or(file);
    format!(
        "`{file}` in the transforms folder has no module beside it, and is ignored; put `{module}.wasm` there, \
         or take the settings away"
    )
}
