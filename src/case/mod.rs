//! Messages in files: a failed one exported as a *case*, and samples that people write or take from
//! the stream. What `messages export` writes and `transforms test` reads.
//!
//! Pure: text to changes and back. Nothing here speaks to a process, and nothing runs a transform.
//!
//! ```text
//! store ──► Case ──► file ──► Case ──► Change ──► the transforms, on a laptop
//!            └─ redact: other values of the same sizes
//! ```
//!
//! A case is JSON with `"sluicebox_case": 1`. Fields may be added; a file with a higher number is
//! refused.

mod nested;
mod read;
mod redact;
mod row;
mod samples;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::change::{Action, Change, Lsn, Position, Table};
use crate::message::EnvelopeSettings;
use crate::pipeline::control::ErrorView;
use crate::store::Failure;
use row::Row;

pub use read::{ReadError, Sample, read};
pub use samples::{built_in, sized};

/// The number in `sluicebox_case`.
pub const VERSION: u32 = 1;

/// One message with everything that is needed to fail in the same way elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// [`VERSION`].
    pub sluicebox_case: u32,
    /// The message's id in the store that it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Whether the values are others than the row's.
    #[serde(default)]
    pub redacted: bool,
    change: CaseChange,
    /// Why it failed last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// What the pipeline writes into every message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<CasePipeline>,
    /// The chain that was live at the export, in order.
    #[serde(default)]
    pub transforms: Vec<CaseTransform>,
}

/// A module that was live, without its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaseTransform {
    /// The file's name in the folder.
    pub file: String,
    /// SHA-256 of the module, in hexadecimal.
    pub digest: String,
    /// The text of its settings file; nothing where there was none.
    pub settings: Option<String>,
}

/// See [`EnvelopeSettings`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CasePipeline {
    pub id: String,
    pub name: String,
    pub database: String,
    pub hostname: String,
    /// Generation and digest of the chain.
    pub chain: String,
}

/// A change with its values beside their columns' names, as Postgres's text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct CaseChange {
    action: Action,
    commit_lsn: Lsn,
    commit_idx: u64,
    commit_timestamp_us: i64,
    table: Table,
    /// A column that is missing here is an unchanged TOAST value.
    new: Option<Row>,
    /// A column that is missing here was not sent.
    old: Option<Row>,
}

/// A case that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "the case has version {found}, and this sluicebox reads up to {VERSION}; update sluicebox"
    )]
    Version { found: u32 },
    #[error("the row `{row}` names the column `{column}`, which the table does not have")]
    UnknownColumn { row: &'static str, column: String },
    #[error("the value of `{column}` in `{row}` is not JSON, and its type is {type_name}")]
    NotJson { row: &'static str, column: String, type_name: String },
    #[error("the rows hold more than 4 GiB")]
    TooLarge,
}

impl Case {
    /// A case of a stored message.
    #[must_use]
    pub fn new(
        message: String,
        change: &Change,
        failure: Option<Failure>,
        pipeline: &EnvelopeSettings,
        transforms: Vec<CaseTransform>,
    ) -> Self {
        let row = |row: &Option<_>| row.as_ref().map(|row| Row::of(row, &change.table));
        Self {
            sluicebox_case: VERSION,
            message: Some(message),
            redacted: false,
            change: CaseChange {
                action: change.action,
                commit_lsn: change.position.commit_lsn,
                commit_idx: change.position.index,
                commit_timestamp_us: change.commit_timestamp_us,
                table: (*change.table).clone(),
                new: row(&change.new),
                old: row(&change.old),
            },
            failure,
            pipeline: Some(CasePipeline {
                id: pipeline.pipeline_id.clone(),
                name: pipeline.pipeline_name.clone(),
                database: pipeline.database_name.clone(),
                hostname: pipeline.hostname.clone(),
                chain: pipeline.chain.clone(),
            }),
            transforms,
        }
    }

    /// The change as the pipeline would see it.
    ///
    /// # Errors
    ///
    /// When the case is of a later version, or its rows do not fit its table.
    pub fn change(&self) -> Result<Change, Error> {
        if self.sluicebox_case == 0 || self.sluicebox_case > VERSION {
            return Err(Error::Version { found: self.sluicebox_case });
        }
        let change = &self.change;
        let new = change.new.as_ref().map(|row| row.tuple("new", &change.table));
        let old = change.old.as_ref().map(|row| row.tuple("old", &change.table));
        Ok(Change {
            position: Position { commit_lsn: change.commit_lsn, index: change.commit_idx },
            commit_timestamp_us: change.commit_timestamp_us,
            action: change.action,
            table: Arc::new(change.table.clone()),
            new: new.transpose()?,
            old: old.transpose()?,
        })
    }

    /// Puts other values of the same type and size in the place of the row's. What a guest said of
    /// the message goes too, since it may quote one, and what looks like a secret in the settings.
    ///
    /// Names of columns, the keys of JSON objects, booleans and NULLs stay.
    #[must_use]
    pub fn redact(mut self) -> Self {
        let CaseChange { table, new, old, .. } = &mut self.change;
        let (new_before, old_before) = (new.clone(), old.clone());
        for row in [&mut *new, &mut *old].into_iter().flatten() {
            row.redact(table);
        }
        if let (Some(new), Some(old), Some(new_before), Some(old_before)) =
            (new, old, new_before, old_before)
        {
            old.keep_apart(new, &old_before, &new_before);
        }
        if let Some(failure) = &mut self.failure {
            redact_failure(failure);
        }
        for transform in &mut self.transforms {
            transform.settings = transform.settings.as_deref().map(redact::settings);
        }
        self.redacted = true;
        self
    }
}

fn redact_failure(failure: &mut Failure) {
    const LEFT_OUT: &str = "(left out)";
    let ErrorView { class, text, body, .. } = &mut failure.error;
    // The host's own sentences name columns and sizes only; these classes quote the guest, and a
    // body is S2's own text.
    if !matches!(class.as_str(), "oversize" | "timeout" | "limit" | "encode") {
        LEFT_OUT.clone_into(text);
    }
    if let Some(body) = body {
        LEFT_OUT.clone_into(body);
    }
    for step in &mut failure.trace {
        for line in &mut step.logs {
            LEFT_OUT.clone_into(line);
        }
    }
}
