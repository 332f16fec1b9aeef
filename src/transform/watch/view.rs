//! What is in the folder, as operators, scripts and the console read it.

use std::sync::PoisonError;

use serde::{Deserialize, Serialize};

use super::super::chain::Transform;
use super::super::folder::Look;
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

pub(super) fn live_view(transform: &Transform) -> TransformView {
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
pub(super) struct View {
    pub(super) others: Vec<TransformView>,
    pub(super) warnings: Vec<String>,
}

impl Watcher {
    pub(super) fn warn_of_orphans(&mut self, look: &Look) {
        for file in &look.orphans {
            let text = orphan(file);
            if self.warned.insert(text.clone()) {
                tracing::warn!("{text}");
            }
        }
        // Said again should it happen again.
        self.warned.retain(|text| look.orphans.iter().any(|file| *text == orphan(file)));
    }

    pub(super) fn show(&self) {
        self.show_with(self.warned.iter().cloned().collect(), &[]);
    }

    pub(super) fn show_with(&self, warnings: Vec<String>, compiling: &[&String]) {
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
