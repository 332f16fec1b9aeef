//! What is kept and told of versions as they come and go: what vetting said of them, what they mended,
//! and what fails without them.

use std::collections::BTreeMap;

use super::super::chain::Chain;
use super::super::settings::Judgement;
use super::super::vet::{Comparison, VetReport};
use super::promote::{Change, Changes};
use super::{NOTICES_MAX, Watcher};

impl Watcher {
    /// Keeps and logs what a trial said, and what leaves with a file that is gone. `without` is the
    /// trial that shows what fails without the files that are gone, where there was one.
    pub(super) fn note_reports(
        &mut self,
        chain: &Chain,
        changes: &Changes,
        comparison: Option<&Comparison>,
        without: Option<&Comparison>,
    ) {
        let tried = comparison.map(VetReport::of);
        let renamed = self.renamed(changes);
        let before = self.reports.clone();
        for (file, change) in changes {
            match change {
                Change::To(transform) => {
                    let mut report = match &tried {
                        _ if transform.settings.vet == Judgement::Off => VetReport::off(),
                        Some(report) => report.clone(),
                        None => VetReport::of(&Comparison::default()),
                    };
                    // What a version mended is what its file is good for, whatever is in it now.
                    let old_name = renamed.iter().find(|(_, new)| *new == file);
                    let earlier = before.get(old_name.map_or(file, |(old, _)| old));
                    report.mended += earlier.map_or(0, |earlier| earlier.mended);
                    tracing::info!(file, chain = chain.tag(), "vetting: {}", report.text());
                    let doubts = report.doubts();
                    if !doubts.is_empty() {
                        tracing::warn!(file, "of the messages that were tried, {doubts}");
                    }
                    self.notices.remove(file);
                    self.reports.insert(file.clone(), report);
                }
                Change::Gone => {
                    let report = self.reports.remove(file);
                    if let Some(new) = renamed.get(file) {
                        tracing::info!("`{file}` is called `{new}` now");
                        continue;
                    }
                    let notice = parting(file, report, without);
                    tracing::warn!("{notice}");
                    self.notices.insert(file.clone(), notice);
                }
            }
        }
        while self.notices.len() > NOTICES_MAX {
            self.notices.pop_first();
        }
    }

    /// The files that are gone and stand under another name among the changes.
    fn renamed(&self, changes: &Changes) -> BTreeMap<String, String> {
        let new_name = |old: &str| {
            let digest = &self.live.get(old)?.module.digest;
            // Not one that had the same module already, and other settings now.
            let had =
                |new: &String| self.live.get(new).is_some_and(|it| it.module.digest == *digest);
            let new = changes.iter().find(|(new, change)| match change {
                Change::To(transform) => transform.module.digest == *digest && !had(new),
                Change::Gone => false,
            });
            new.map(|(new, _)| new.clone())
        };
        let gone = changes.iter().filter(|(_, change)| matches!(change, Change::Gone));
        gone.filter_map(|(old, _)| Some((old.clone(), new_name(old)?))).collect()
    }

    /// Chains were compared after files had gone.
    pub(super) fn on_looked_back(&mut self, gone: &[String], comparison: &Comparison) {
        let Some(lost) = missed(comparison) else { return };
        for file in gone {
            // It may be back.
            let Some(notice) = self.notices.get_mut(file) else { continue };
            tracing::warn!("`{file}` was deleted{lost}");
            notice.push_str(&lost);
        }
    }
}

/// What to say of a file that leaves the chain: what it was good for is not hidden.
fn parting(file: &str, report: Option<VetReport>, comparison: Option<&Comparison>) -> String {
    let mut text = format!("`{file}` was deleted, and left the chain");
    match report {
        Some(report) if report.mended > report.fixes => text.push_str(&format!(
            "; its versions fixed {} parked messages as they went live, and such ones will be parked again",
            report.mended
        )),
        Some(report) if report.fixes > 0 => text.push_str(&format!(
            "; when it went live it fixed {} of {} parked messages, and such ones will be parked \
             again",
            report.fixes, report.of
        )),
        Some(_) | None => {}
    }
    text.extend(comparison.and_then(missed));
    text
}

/// What fails without a file that is gone.
fn missed(comparison: &Comparison) -> Option<String> {
    let tried = comparison.of + comparison.sample;
    let breaks = comparison.breaks;
    let text = || format!("; of {tried} messages that were tried, {breaks} fail without it");
    (breaks > 0).then(text)
}
