//! The host's own edits: what is slow or large inside a guest is done here, without the value
//! crossing. No WebAssembly in this file.

use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use sluicebox_edits::{Codec, Compressed, Content, Refused, Stopped};

use super::state::{DeadlinePassed, Message};
use crate::message::EditError;

const COMPRESSED: &str = "compressed_columns";
const TRUNCATED: &str = "truncated_columns";

/// Why an edit was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A sentence for the guest.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The draft refused it.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// For the host: the call ends here.
    #[error(transparent)]
    DeadlinePassed(#[from] DeadlinePassed),
}

impl From<Stopped<DeadlinePassed>> for Error {
    fn from(stopped: Stopped<DeadlinePassed>) -> Self {
        match stopped {
            Stopped::Refused(refused) => refused.into(),
            Stopped::By(deadline) => deadline.into(),
        }
    }
}

/// Replaces a column's value by its compressed bytes in base64. Answers whether there was one.
pub(crate) fn compress(
    message: &mut Message,
    column: &str,
    codec: Codec,
    level: u32,
    deadline: Instant,
) -> Result<bool, Error> {
    if message.compressed.contains_key(column) {
        return Ok(false);
    }
    let Some(content) = content(message, column)? else { return Ok(false) };
    let go_on = || check_deadline(deadline);
    let Compressed { json, entry } = sluicebox_edits::compress(&content, codec, level, go_on)?;
    drop(content);
    message.draft.set_json(column, json)?;
    message.compressed.insert(column.to_owned(), entry);
    annotate_columns(message, COMPRESSED)?;
    Ok(true)
}

/// Replaces a column's value by its digest. Answers whether there was a value.
pub(crate) fn hash(
    message: &mut Message,
    column: &str,
    key: Option<&[u8]>,
    deadline: Instant,
) -> Result<bool, Error> {
    let Some(content) = content(message, column)? else { return Ok(false) };
    let json = sluicebox_edits::hash(&content, key, || check_deadline(deadline))?;
    drop(content);
    message.draft.set_json(column, json)?;
    forget(message, column)?;
    Ok(true)
}

/// Cuts a string. Answers whether it was longer.
pub(crate) fn truncate(message: &mut Message, column: &str, bytes_max: u64) -> Result<bool, Error> {
    let Some(content) = content(message, column)? else { return Ok(false) };
    let cut = sluicebox_edits::truncate(column, &content, bytes_max)?;
    drop(content);
    let Some((text, bytes)) = cut else { return Ok(false) };
    message.draft.set_text(column, &text)?;
    message.truncated.insert(column.to_owned(), json!(bytes));
    annotate_columns(message, TRUNCATED)?;
    Ok(true)
}

/// Appends a value to a list in the metadata.
pub(crate) fn append(message: &mut Message, key: &str, json: &str) -> Result<(), Error> {
    let list = sluicebox_edits::appended(key, message.draft.annotation(key), json)?;
    Ok(message.draft.annotate(key, list)?)
}

/// Replaces the whole message.
pub(crate) fn replace(
    message: &mut Message,
    json: String,
    transform: &Arc<str>,
) -> Result<(), Error> {
    sluicebox_edits::check_json("the whole message", &json)?;
    message.draft.set_message(json.into(), transform);
    Ok(())
}

/// Forgets how a column was packed, because it is gone or has another value.
pub(crate) fn forget(message: &mut Message, column: &str) -> Result<(), Error> {
    if message.compressed.remove(column).is_some() {
        annotate_columns(message, COMPRESSED)?;
    }
    if message.truncated.remove(column).is_some() {
        annotate_columns(message, TRUNCATED)?;
    }
    Ok(())
}

/// Carries over to the new name how a column was packed.
pub(crate) fn renamed(message: &mut Message, from: &str, to: &str) -> Result<(), Error> {
    if let Some(entry) = message.compressed.remove(from) {
        message.compressed.insert(to.to_owned(), entry);
        annotate_columns(message, COMPRESSED)?;
    }
    if let Some(entry) = message.truncated.remove(from) {
        message.truncated.insert(to.to_owned(), entry);
        annotate_columns(message, TRUNCATED)?;
    }
    Ok(())
}

fn annotate_columns(message: &mut Message, key: &'static str) -> Result<(), Error> {
    let columns = if key == COMPRESSED { &message.compressed } else { &message.truncated };
    Ok(message.draft.annotate(key, json!(columns).to_string())?)
}

/// A column's value, or nothing where it is missing, null or unchanged.
fn content<'a>(message: &'a Message, column: &str) -> Result<Option<Content<'a>>, Error> {
    if let Some(text) = message.draft.plain_text(column)? {
        return Ok(Some(Content::Text(text.into())));
    }
    let Some(json) = message.draft.json(column)? else { return Ok(None) };
    Ok(Content::of(column, json)?)
}

fn check_deadline(deadline: Instant) -> Result<(), DeadlinePassed> {
    if Instant::now() >= deadline { Err(DeadlinePassed) } else { Ok(()) }
}
