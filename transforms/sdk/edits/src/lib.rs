//! What an edit of a message may be, and what the edits make of a value that Sluicebox itself
//! makes: compressed, hashed, truncated.
//!
//! Sluicebox's host uses this, and so does the SDK where a transform's tests run without
//! WebAssembly: both give the same answers, in the same words. Nothing here does I/O.

mod stream_name;
mod value;

use serde::de::IgnoredAny;

pub use stream_name::{InvalidStreamName, STREAM_NAME_BYTES_MAX, check_stream_name};
pub use value::{Codec, Compressed, Content, Refused, Stopped, compress, hash, hmac, truncate};

/// The most headers that transforms may add to one record. Ours: S2 counts only their bytes, and
/// a guest's loop should end before it fills the memory.
pub const HEADERS_MAX: usize = 1000;

/// What the names of Sluicebox's own record headers start with.
pub const HEADER_PREFIX: &str = "sb-";

/// How large a record may be, in bytes as S2 meters them.
pub const RECORD_BYTES_MAX: u64 = 1024 * 1024;

/// The members of `metadata` that Sluicebox writes itself.
const METADATA_KEYS: [&str; 13] = [
    "table_schema",
    "table_name",
    "commit_timestamp",
    "commit_lsn",
    "commit_idx",
    "idempotency_key",
    "record_pks",
    "unchanged_columns",
    "database_name",
    "transaction_annotations",
    "enrichment",
    "consumer",
    "database",
];

/// Why an edit was refused. The message is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    #[error("there is no column `{column}`")]
    NoColumn { column: String },
    #[error("there is a column `{column}` already")]
    ColumnExists { column: String },
    #[error("what was given for `{name}` is not JSON")]
    InvalidJson { name: String, source: serde_json::Error },
    #[error("the message has no value from before the change for `{column}`: only updates have")]
    NoOldValues { column: String },
    #[error("`metadata.{key}` is Sluicebox's own; choose another key")]
    ReservedKey { key: String },
    #[error("`metadata.{key}` is not a list, so that nothing can be appended to it")]
    NotAList { key: String },
    #[error("a header's name must not be empty: S2 takes such a record for a command")]
    EmptyHeader,
    #[error("the header `{name}` starts with `sb-`, which is kept for Sluicebox's own headers")]
    ReservedHeader { name: String },
    #[error("the record has {HEADERS_MAX} headers from transforms already")]
    TooManyHeaders,
    #[error("the whole message was replaced, so that its columns cannot be changed any more")]
    Replaced,
    #[error("a column's name must not be empty")]
    EmptyColumn,
    #[error("a key of the metadata must not be empty")]
    EmptyKey,
    #[error(transparent)]
    Stream(#[from] InvalidStreamName),
    /// A value of the row cannot be written as JSON.
    #[error(transparent)]
    Encode(Box<dyn std::error::Error + Send + Sync>),
}

impl EditError {
    /// Whether a transform that overlooks it might send what it meant to hide, or send it to where
    /// it does not belong. The others depend on the row, and to try and see is a fair way.
    #[must_use]
    pub fn breaks_a_rule(&self) -> bool {
        match self {
            Self::InvalidJson { .. }
            | Self::ReservedKey { .. }
            | Self::EmptyHeader
            | Self::ReservedHeader { .. }
            | Self::TooManyHeaders
            | Self::Replaced
            | Self::EmptyColumn
            | Self::EmptyKey
            | Self::Stream(_) => true,
            Self::NoColumn { .. }
            | Self::ColumnExists { .. }
            | Self::NoOldValues { .. }
            | Self::NotAList { .. }
            | Self::Encode(_) => false,
        }
    }
}

/// That there is no column of this name.
#[must_use]
pub fn no_column(name: &str) -> EditError {
    EditError::NoColumn { column: name.to_owned() }
}

/// A column may have this name.
///
/// # Errors
///
/// When it is empty.
pub fn check_column(name: &str) -> Result<(), EditError> {
    if name.is_empty() { Err(EditError::EmptyColumn) } else { Ok(()) }
}

/// A transform may write to `metadata.<key>`.
///
/// # Errors
///
/// When the key is empty, or one of Sluicebox's own.
pub fn check_key(key: &str) -> Result<(), EditError> {
    if key.is_empty() {
        return Err(EditError::EmptyKey);
    }
    if METADATA_KEYS.contains(&key) {
        return Err(EditError::ReservedKey { key: key.to_owned() });
    }
    Ok(())
}

/// A transform may add a header of this name to a record that has so many of them already.
///
/// # Errors
///
/// When the name is empty or Sluicebox's own, and when there are [`HEADERS_MAX`].
pub fn check_header(name: &str, headers: usize) -> Result<(), EditError> {
    if name.is_empty() {
        return Err(EditError::EmptyHeader);
    }
    let prefix = name.as_bytes().get(..HEADER_PREFIX.len());
    if prefix.is_some_and(|prefix| prefix.eq_ignore_ascii_case(HEADER_PREFIX.as_bytes())) {
        return Err(EditError::ReservedHeader { name: name.to_owned() });
    }
    if headers >= HEADERS_MAX { Err(EditError::TooManyHeaders) } else { Ok(()) }
}

/// What was given for `name` is JSON text of one value.
///
/// # Errors
///
/// When it is not.
pub fn check_json(name: &str, json: &str) -> Result<(), EditError> {
    match serde_json::from_str::<IgnoredAny>(json) {
        Ok(IgnoredAny) => Ok(()),
        Err(source) => Err(EditError::InvalidJson { name: name.to_owned(), source }),
    }
}

/// A list in the metadata with one more value: `list` is what was there.
///
/// # Errors
///
/// When the value is not JSON, and when what was there is not a list.
pub fn appended(key: &str, list: Option<&str>, json: &str) -> Result<String, EditError> {
    // The text alone must be one value: `1, 2` would be two, and `1], [2` breaks out.
    check_json(key, json)?;
    let Some(list) = list else { return Ok(format!("[{json}]")) };
    match list.strip_suffix(']') {
        Some("[") => Ok(format!("[{json}]")),
        Some(start) => Ok(format!("{start},{json}]")),
        None => Err(EditError::NotAList { key: key.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_break_out_of_its_list() {
        assert_eq!(appended("k", None, "1").unwrap(), "[1]");
        assert_eq!(appended("k", Some("[]"), "1").unwrap(), "[1]");
        assert_eq!(appended("k", Some("[1]"), "\"]\"").unwrap(), "[1,\"]\"]");
        for json in ["1, 2", "1], [2", "", "]"] {
            let refused = appended("k", Some("[1]"), json).unwrap_err();
            assert!(matches!(refused, EditError::InvalidJson { .. }), "{json}");
        }
        let refused = appended("k", Some("{}"), "1").unwrap_err();
        assert_eq!(
            refused.to_string(),
            "`metadata.k` is not a list, so that nothing can be appended to it"
        );
    }

    #[test]
    fn names_that_are_sluicebox_s_own_are_refused() {
        assert!(check_key("mine").is_ok() && check_header("mine", HEADERS_MAX - 1).is_ok());
        assert!(matches!(check_key("table_name"), Err(EditError::ReservedKey { .. })));
        assert!(matches!(check_header("SB-x", 0), Err(EditError::ReservedHeader { .. })));
        assert!(matches!(check_header("", 0), Err(EditError::EmptyHeader)));
        assert!(matches!(check_header("x", HEADERS_MAX), Err(EditError::TooManyHeaders)));
    }
}
