//! What the guest's calls do: the functions of `wit/`, each a few lines over the draft.

use std::error::Error;
use std::sync::Arc;

use wasmtime::Result;
use wasmtime::component::Resource;

use super::bindings::logging::{self, Level};
use super::bindings::types::{self, Action, Algorithm, Codec, Column};
use super::edits;
use super::state::{ChangeHandle, GuestState, LimitReached, Message};
use crate::change;
use crate::error_chain::error_chain;
use crate::message::Subject;
use crate::sink::record::RECORD_BYTES_MAX;

/// What an edit counts for beside its bytes, so that small ones without end are stopped too: 16,384
/// of them without settings, where a table has at most 1,600 columns.
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

    /// As [`Self::settled`], for an edit that may make the message larger: should it become too large,
    /// the operator is told by whom.
    fn made<T>(
        &mut self,
        subject: Subject,
        result: std::result::Result<T, edits::Error>,
    ) -> Answer<T> {
        self.note_maker(&subject, &result);
        self.settled(subject, result)
    }

    fn note_maker<T>(&mut self, subject: &Subject, result: &std::result::Result<T, edits::Error>) {
        if let (Ok(_), Some(message)) = (result, &mut self.message) {
            message.draft.made_by(subject.clone(), self.logs.transform());
        }
    }

    /// What the guest hears of an edit that gives its subject a new value, and so takes the place
    /// of refused ones.
    fn settled<T>(
        &mut self,
        subject: Subject,
        result: std::result::Result<T, edits::Error>,
    ) -> Answer<T> {
        if let (Ok(_), Some(message)) = (&result, &mut self.message) {
            message.breaches.made_good(&subject);
        }
        self.heard(subject, result)
    }

    /// What the guest hears of an edit. A deadline ends the call, and a broken rule is kept.
    fn heard<T>(
        &mut self,
        subject: Subject,
        result: std::result::Result<T, edits::Error>,
    ) -> Answer<T> {
        let error = match result {
            Ok(value) => return Ok(Ok(value)),
            Err(edits::Error::DeadlinePassed(error)) => return Err(error.into()),
            Err(edits::Error::Refused(refused)) => return Ok(Err(refused.0)),
            Err(edits::Error::Edit(error)) => error,
        };
        let reason = error_chain(&error);
        if error.breaks_a_rule() {
            self.charge(reason.len())?;
            if let Some(message) = &mut self.message {
                message.breaches.add(subject, reason.clone());
            }
        }
        Ok(Err(reason))
    }

    fn charge(&mut self, bytes: usize) -> Result<()> {
        self.host_bytes = self.host_bytes.saturating_add(bytes + EDIT_OVERHEAD_BYTES);
        if self.host_bytes > self.host_bytes_max {
            return Err(LimitReached(format!(
                "its edits of one message hold more than {} MiB (`limits.edits_mib`)",
                self.host_bytes_max >> 20
            ))
            .into());
        }
        Ok(())
    }
}

fn answer<T, E: Error>(result: std::result::Result<T, E>) -> Answer<T> {
    Ok(result.map_err(|error| error_chain(&error)))
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

    fn column_names(&mut self, this: Resource<ChangeHandle>) -> Result<Vec<String>> {
        let draft = &self.edit(&this)?.draft;
        let name = |index| draft.column_name(index).map(str::to_owned);
        Ok((0..draft.column_count()).filter_map(name).collect())
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
        let set = message.draft.set_json(&column, json).map_err(Into::into);
        let set = set.and_then(|()| edits::forget(message, &column));
        self.made(Subject::Column(column), set)
    }

    fn set_text(
        &mut self,
        this: Resource<ChangeHandle>,
        column: String,
        text: String,
    ) -> Answer<()> {
        let message = self.edit_with(&this, &[&column, &text])?;
        let set = message.draft.set_text(&column, &text).map_err(Into::into);
        let set = set.and_then(|()| edits::forget(message, &column));
        self.made(Subject::Column(column), set)
    }

    fn set_old(
        &mut self,
        this: Resource<ChangeHandle>,
        column: String,
        json: String,
    ) -> Answer<()> {
        let message = self.edit_with(&this, &[&column, &json])?;
        let set = message.draft.set_old_json(&column, json).map_err(Into::into);
        self.made(Subject::Old(column), set)
    }

    fn remove(&mut self, this: Resource<ChangeHandle>, column: String) -> Answer<bool> {
        let message = self.edit(&this)?;
        let removed = message.draft.remove(&column).map_err(Into::into);
        let removed = removed.and_then(|removed| edits::forget(message, &column).map(|()| removed));
        self.settled(Subject::Column(column), removed)
    }

    fn rename(&mut self, this: Resource<ChangeHandle>, column: String, to: String) -> Answer<()> {
        let message = self.edit_with(&this, &[&column, &to])?;
        let renamed = message.draft.rename(&column, &to).map_err(Into::into);
        let renamed = renamed.and_then(|()| edits::renamed(message, &column, &to));
        // The value is what it was, and what was refused of it stays refused.
        self.heard(Subject::Column(column), renamed)
    }

    fn annotate(&mut self, this: Resource<ChangeHandle>, key: String, json: String) -> Answer<()> {
        let message = self.edit_with(&this, &[&key, &json])?;
        let annotated = message.draft.annotate(&key, json).map_err(Into::into);
        self.made(Subject::Metadata(key), annotated)
    }

    fn append(&mut self, this: Resource<ChangeHandle>, key: String, json: String) -> Answer<()> {
        let appended = edits::append(self.edit_with(&this, &[&key, &json])?, &key, &json);
        let subject = Subject::Metadata(key);
        self.note_maker(&subject, &appended);
        self.heard(subject, appended)
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
        let added = self.edit(&this)?.draft.add_header(&name, &value).map_err(Into::into);
        self.made(Subject::Header(name), added)
    }

    fn route_to(&mut self, this: Resource<ChangeHandle>, stream: Option<String>) -> Answer<()> {
        let message = self.edit_with(&this, &[stream.as_deref().unwrap_or_default()])?;
        let routed = message.draft.route_to(stream.as_deref()).map_err(Into::into);
        self.settled(Subject::Stream, routed)
    }

    fn routed_to(&mut self, this: Resource<ChangeHandle>) -> Result<Option<String>> {
        Ok(self.edit(&this)?.draft.stream().map(|stream| String::from(&**stream)))
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
        let transform = Arc::clone(self.logs.transform());
        let message = self.edit_with(&this, &[&json])?;
        let replaced = edits::replace(message, json, &transform);
        self.settled(Subject::Message, replaced)
    }

    fn is_replaced(&mut self, this: Resource<ChangeHandle>) -> Result<bool> {
        Ok(self.edit(&this)?.draft.is_replaced())
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
            Codec::Zstd => sluicebox_edits::Codec::Zstd,
            Codec::Gzip => sluicebox_edits::Codec::Gzip,
        };
        let compressed = edits::compress(self.edit(&this)?, &column, codec, level, deadline);
        let subject = Subject::Column(column);
        // One that packed nothing is not charged, and could note as much as it likes.
        if matches!(compressed, Ok(true)) {
            self.note_maker(&subject, &compressed);
        }
        self.heard(subject, compressed)
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
        let hashed = edits::hash(self.edit(&this)?, &column, key.as_deref(), deadline);
        self.heard(Subject::Column(column), hashed)
    }

    fn truncate(
        &mut self,
        this: Resource<ChangeHandle>,
        column: String,
        max_bytes: u64,
    ) -> Answer<bool> {
        let truncated = edits::truncate(self.edit(&this)?, &column, max_bytes);
        self.heard(Subject::Column(column), truncated)
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
