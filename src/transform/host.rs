//! What the guest's calls do: the functions of `wit/`, each a few lines over the draft.

use std::error::Error;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::bindings::logging::{self, Level};
use super::bindings::types::{self, Action, Algorithm, Codec, Column};
use super::edits;
use super::state::{ChangeHandle, GuestState, LimitReached, Message};
use crate::change;
use crate::sink::record::RECORD_BYTES_MAX;

/// How much one call may leave in the host's memory by its edits: many times what a record may
/// hold, and little beside the largest rows.
const HOST_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What an edit counts for beside its bytes, so that small ones without end are stopped too: 16,384
/// of them, where a table has at most 1,600 columns.
const EDIT_OVERHEAD_BYTES: usize = 4096;

/// What a guest sees of a call that can be refused.
type Answer<T> = Result<std::result::Result<T, String>>;

impl GuestState {
    /// The message behind a handle. Wasmtime lets a guest use only the handle of the current call;
    /// the number is compared all the same, because the wrong message must never be edited.
    fn edit(&mut self, handle: &Resource<ChangeHandle>) -> Result<&mut Message> {
        match &mut self.message {
            Some(message) if handle.rep() == self.handle => Ok(message),
            _ => Err(wasmtime::Error::msg("the change's handle was used outside of its call")),
        }
    }

    /// The same for an edit that leaves `bytes` of the guest's in the host's memory.
    fn edit_with(
        &mut self,
        handle: &Resource<ChangeHandle>,
        bytes: &[&str],
    ) -> Result<&mut Message> {
        let bytes: usize = bytes.iter().map(|text| text.len()).sum();
        self.charge(bytes)?;
        self.edit(handle)
    }

    fn charge(&mut self, bytes: usize) -> Result<()> {
        self.host_bytes = self.host_bytes.saturating_add(bytes + EDIT_OVERHEAD_BYTES);
        if self.host_bytes > HOST_BYTES_MAX {
            return Err(LimitReached(format!(
                "its edits of one message hold more than {} MiB",
                HOST_BYTES_MAX >> 20
            ))
            .into());
        }
        Ok(())
    }
}

fn answer<T, E: Error>(result: std::result::Result<T, E>) -> Answer<T> {
    Ok(result.map_err(|error| crate::error_chain::error_chain(&error)))
}

/// A deadline ends the call; everything else is for the guest to hear.
fn edited<T>(result: std::result::Result<T, edits::Error>) -> Answer<T> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(edits::Error::Refused(reason)) => Ok(Err(reason)),
        Err(edits::Error::DeadlinePassed(error)) => Err(error.into()),
    }
}

impl types::Host for GuestState {}

impl types::HostChange for GuestState {
    fn action(&mut self, this: Resource<ChangeHandle>) -> Result<Action> {
        Ok(match self.edit(&this)?.draft.change().action {
            change::Action::Insert => Action::Insert,
            change::Action::Update => Action::Update,
            change::Action::Delete => Action::Delete,
            change::Action::Read => Action::Read,
            change::Action::Truncate => Action::Truncate,
        })
    }

    fn table_schema(&mut self, this: Resource<ChangeHandle>) -> Result<String> {
        Ok(self.edit(&this)?.draft.change().table.schema.clone())
    }

    fn table_name(&mut self, this: Resource<ChangeHandle>) -> Result<String> {
        Ok(self.edit(&this)?.draft.change().table.name.clone())
    }

    fn commit_lsn(&mut self, this: Resource<ChangeHandle>) -> Result<u64> {
        Ok(self.edit(&this)?.draft.change().position.commit_lsn.0)
    }

    fn commit_index(&mut self, this: Resource<ChangeHandle>) -> Result<u64> {
        Ok(self.edit(&this)?.draft.change().position.index)
    }

    fn commit_timestamp(&mut self, this: Resource<ChangeHandle>) -> Result<i64> {
        Ok(self.edit(&this)?.draft.change().commit_timestamp_us)
    }

    fn columns(&mut self, this: Resource<ChangeHandle>) -> Result<Vec<Column>> {
        let draft = &self.edit(&this)?.draft;
        Ok((0..draft.column_count()).filter_map(|index| draft.column(index)).map(column).collect())
    }

    fn column(&mut self, this: Resource<ChangeHandle>, name: String) -> Result<Option<Column>> {
        let draft = &self.edit(&this)?.draft;
        Ok(draft.find(&name).and_then(|index| draft.column(index)).map(column))
    }

    fn get(&mut self, this: Resource<ChangeHandle>, column: String) -> Answer<Option<String>> {
        answer(self.edit(&this)?.draft.json(&column).map(|json| json.map(Into::into)))
    }

    fn get_text(&mut self, this: Resource<ChangeHandle>, column: String) -> Answer<Option<String>> {
        answer(self.edit(&this)?.draft.text(&column).map(|text| text.map(Into::into)))
    }

    fn get_old(&mut self, this: Resource<ChangeHandle>, column: String) -> Answer<Option<String>> {
        answer(self.edit(&this)?.draft.old_json(&column).map(|json| json.map(Into::into)))
    }

    fn set(&mut self, this: Resource<ChangeHandle>, column: String, json: String) -> Answer<()> {
        let message = self.edit_with(&this, &[&column, &json])?;
        if let Err(error) = message.draft.set_json(&column, json) {
            return answer(Err(error));
        }
        edited(edits::forget(message, &column))
    }

    fn set_text(
        &mut self,
        this: Resource<ChangeHandle>,
        column: String,
        text: String,
    ) -> Answer<()> {
        let message = self.edit_with(&this, &[&column, &text])?;
        if let Err(error) = message.draft.set_text(&column, &text) {
            return answer(Err(error));
        }
        edited(edits::forget(message, &column))
    }

    fn set_old(
        &mut self,
        this: Resource<ChangeHandle>,
        column: String,
        json: String,
    ) -> Answer<()> {
        answer(self.edit_with(&this, &[&column, &json])?.draft.set_old_json(&column, json))
    }

    fn remove(&mut self, this: Resource<ChangeHandle>, column: String) -> Answer<bool> {
        let message = self.edit(&this)?;
        match message.draft.remove(&column) {
            Ok(removed) => edited(edits::forget(message, &column).map(|()| removed)),
            Err(error) => answer(Err(error)),
        }
    }

    fn rename(&mut self, this: Resource<ChangeHandle>, column: String, to: String) -> Answer<()> {
        let message = self.edit_with(&this, &[&column, &to])?;
        if let Err(error) = message.draft.rename(&column, &to) {
            return answer(Err(error));
        }
        edited(edits::renamed(message, &column, &to))
    }

    fn annotate(&mut self, this: Resource<ChangeHandle>, key: String, json: String) -> Answer<()> {
        answer(self.edit_with(&this, &[&key, &json])?.draft.annotate(&key, json))
    }

    fn append(&mut self, this: Resource<ChangeHandle>, key: String, json: String) -> Answer<()> {
        edited(edits::append(self.edit_with(&this, &[&key, &json])?, &key, &json))
    }

    fn annotation(&mut self, this: Resource<ChangeHandle>, key: String) -> Result<Option<String>> {
        Ok(self.edit(&this)?.draft.annotation(&key).map(str::to_owned))
    }

    fn add_header(
        &mut self,
        this: Resource<ChangeHandle>,
        name: String,
        value: Vec<u8>,
    ) -> Answer<()> {
        self.charge(name.len() + value.len())?;
        answer(self.edit(&this)?.draft.add_header(&name, &value))
    }

    fn size(&mut self, this: Resource<ChangeHandle>) -> Answer<u64> {
        let message = self.edit(&this)?;
        let size = message.draft.metered_bytes();
        message.measured = size.as_ref().ok().copied();
        answer(size)
    }

    fn limit(&mut self, _this: Resource<ChangeHandle>) -> Result<u64> {
        Ok(RECORD_BYTES_MAX)
    }

    fn message(&mut self, this: Resource<ChangeHandle>) -> Answer<String> {
        answer(self.edit(&this)?.draft.message_json())
    }

    fn set_message(&mut self, this: Resource<ChangeHandle>, json: String) -> Answer<()> {
        if let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(&json) {
            return Ok(Err(format!("the new message is not JSON: {error}")));
        }
        self.edit_with(&this, &[&json])?.draft.set_message(json.into());
        Ok(Ok(()))
    }

    fn compress(
        &mut self,
        this: Resource<ChangeHandle>,
        column: String,
        codec: Codec,
        level: u32,
    ) -> Answer<bool> {
        let deadline = self.deadline;
        let codec = match codec {
            Codec::Zstd => edits::Codec::Zstd,
            Codec::Gzip => edits::Codec::Gzip,
        };
        edited(edits::compress(self.edit(&this)?, &column, codec, level, deadline))
    }

    fn hash(
        &mut self,
        this: Resource<ChangeHandle>,
        column: String,
        algorithm: Algorithm,
        key: Option<Vec<u8>>,
    ) -> Answer<bool> {
        let deadline = self.deadline;
        match algorithm {
            Algorithm::Sha256 => {}
        }
        let message = self.edit(&this)?;
        edited(edits::hash(message, &column, key.as_deref(), deadline))
    }

    fn truncate(
        &mut self,
        this: Resource<ChangeHandle>,
        column: String,
        max_bytes: u64,
    ) -> Answer<bool> {
        edited(edits::truncate(self.edit(&this)?, &column, max_bytes))
    }

    fn drop(&mut self, _this: Resource<ChangeHandle>) -> Result<()> {
        // A guest only ever borrows a change.
        Err(wasmtime::Error::msg("a change was dropped by the module that had borrowed it"))
    }
}

impl logging::Host for GuestState {
    fn log(&mut self, level: Level, message: String) -> Result<()> {
        self.logs.push(level, &message);
        Ok(())
    }
}

fn column(info: crate::message::ColumnInfo<'_>) -> Column {
    Column {
        name: info.name.to_owned(),
        type_name: info.type_name.to_owned(),
        key: info.key,
        unchanged: info.unchanged,
        size: info.bytes,
    }
}
