//! The host's own edits: what is slow or large inside a guest is done here, without the value
//! crossing. No WebAssembly in this file.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use zstd::zstd_safe::{CCtx, CParameter};

use super::hex;
use super::state::{DeadlinePassed, Message};
use crate::message::EditError;

/// How much is compressed or hashed between two looks at the clock.
const CHUNK_BYTES: usize = 256 * 1024;

const ZSTD_LEVEL_DEFAULT: u32 = 3;
const ZSTD_LEVEL_MAX: u32 = 19;
/// What is compressed without a look at the clock in between, and so without a copy of it: at this level
/// that is done in less time than a chunk takes at the highest.
const ZSTD_WHOLE_LEVEL_MAX: i32 = 5;
const ZSTD_WHOLE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// What a thread keeps at most of memory for its next compression. Level 3 takes about 4 MiB for a value
/// of 2 MiB, level 19 more than 80.
const ZSTD_CONTEXT_BYTES_MAX: usize = 8 * 1024 * 1024;
const GZIP_LEVEL_DEFAULT: u32 = 6;
const GZIP_LEVEL_MAX: u32 = 9;

const COMPRESSED: &str = "compressed_columns";
const TRUNCATED: &str = "truncated_columns";

thread_local! {
    /// Memory of the last compression on this thread: to ask the kernel for it anew, page by page, takes
    /// as long as a third of compressing 2 MiB.
    static ZSTD_CONTEXT: RefCell<Option<CCtx<'static>>> = const { RefCell::new(None) };
}

/// Why an edit was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A sentence for the guest.
    #[error("{0}")]
    Refused(String),
    /// The draft refused it.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// For the host: the call ends here.
    #[error(transparent)]
    DeadlinePassed(#[from] DeadlinePassed),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Zstd,
    Gzip,
}

impl Codec {
    fn as_str(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
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
    let bytes = content.bytes().len();
    let packed = pack(content.bytes(), codec, level, deadline)?;
    let entry = json!({
        "codec": codec.as_str(),
        "encoding": "base64",
        "content": content.name(),
        "bytes": bytes,
    });
    drop(content);

    // Base64 needs no escaping, so that this is the JSON string.
    let mut value = String::with_capacity(packed.len().div_ceil(3) * 4 + 2);
    value.push('"');
    base64::engine::general_purpose::STANDARD.encode_string(&packed, &mut value);
    value.push('"');
    message.draft.set_json(column, value)?;
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
    let digest = match key {
        Some(key) => hmac(key, content.bytes(), deadline)?,
        None => digest(Sha256::new(), content.bytes(), deadline)?,
    };
    drop(content);
    message.draft.set_json(column, format!("\"{}\"", hex(&digest)))?;
    forget(message, column)?;
    Ok(true)
}

/// Cuts a string. Answers whether it was longer.
pub(crate) fn truncate(message: &mut Message, column: &str, bytes_max: u64) -> Result<bool, Error> {
    let text = match content(message, column)? {
        None => return Ok(false),
        Some(Content::Text(text)) => text,
        Some(Content::Json(_)) => {
            return Err(Error::Refused(format!(
                "column `{column}` is not a string, and only strings can be truncated"
            )));
        }
    };
    let bytes = text.len();
    let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX);
    if bytes <= bytes_max {
        return Ok(false);
    }
    let cut = text[..text.floor_char_boundary(bytes_max)].to_owned();
    drop(text);
    message.draft.set_text(column, &cut)?;
    message.truncated.insert(column.to_owned(), json!(bytes));
    annotate_columns(message, TRUNCATED)?;
    Ok(true)
}

/// Appends a value to a list in the metadata.
pub(crate) fn append(message: &mut Message, key: &str, json: &str) -> Result<(), Error> {
    let list = match message.draft.annotation(key) {
        None => format!("[{json}]"),
        Some(list) => match list.strip_suffix(']') {
            Some("[") => format!("[{json}]"),
            Some(start) => format!("{start},{json}]"),
            None => {
                return Err(Error::Refused(format!(
                    "`metadata.{key}` is not a list, so that nothing can be appended to it"
                )));
            }
        },
    };
    // The text alone must be one value: `1, 2` would be two, and `1], [2` breaks out.
    serde_json::from_str::<serde::de::IgnoredAny>(json)
        .map_err(|source| EditError::InvalidJson { name: key.to_owned(), source })?;
    Ok(message.draft.annotate(key, list)?)
}

/// Replaces the whole message.
pub(crate) fn replace(
    message: &mut Message,
    json: String,
    transform: &Arc<str>,
) -> Result<(), Error> {
    if let Err(source) = serde_json::from_str::<serde::de::IgnoredAny>(&json) {
        let name = "the whole message".to_owned();
        return Err(EditError::InvalidJson { name, source }.into());
    }
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

/// A value as a consumer thinks of it.
enum Content<'a> {
    /// What is between the quotes of a JSON string, unescaped.
    Text(Cow<'a, str>),
    /// The JSON text of anything else.
    Json(Cow<'a, str>),
}

impl Content<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) | Self::Json(text) => text.as_bytes(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Json(_) => "json",
        }
    }
}

/// A column's value, or nothing where it is missing, null or unchanged.
fn content<'a>(message: &'a Message, column: &str) -> Result<Option<Content<'a>>, Error> {
    if let Some(text) = message.draft.plain_text(column)? {
        return Ok(Some(Content::Text(text.into())));
    }
    let Some(json) = message.draft.json(column)? else { return Ok(None) };
    if json == "null" {
        return Ok(None);
    }
    if !json.starts_with('"') {
        return Ok(Some(Content::Json(json)));
    }
    if memchr::memchr(b'\\', json.as_bytes()).is_some() {
        let text: String = serde_json::from_str(&json).map_err(|error| {
            Error::Refused(format!("column `{column}` holds a string that cannot be read: {error}"))
        })?;
        return Ok(Some(Content::Text(text.into())));
    }
    let inside = 1..json.len() - 1;
    Ok(Some(Content::Text(match json {
        Cow::Borrowed(json) => json[inside].into(),
        Cow::Owned(mut json) => {
            json.pop();
            json.remove(0);
            json.into()
        }
    })))
}

fn pack(bytes: &[u8], codec: Codec, level: u32, deadline: Instant) -> Result<Vec<u8>, Error> {
    let level = match (codec, level) {
        (Codec::Zstd, 0) => ZSTD_LEVEL_DEFAULT,
        (Codec::Gzip, 0) => GZIP_LEVEL_DEFAULT,
        (Codec::Zstd, 1..=ZSTD_LEVEL_MAX) | (Codec::Gzip, 1..=GZIP_LEVEL_MAX) => level,
        (Codec::Zstd, _) => return Err(level_refused(codec, level, ZSTD_LEVEL_MAX)),
        (Codec::Gzip, _) => return Err(level_refused(codec, level, GZIP_LEVEL_MAX)),
    };
    let failed = |error: std::io::Error| {
        Error::Refused(format!("could not compress with {}: {error}", codec.as_str()))
    };
    match codec {
        Codec::Zstd => {
            let level = i32::try_from(level).unwrap_or(i32::MAX);
            ZSTD_CONTEXT.with_borrow_mut(|kept| {
                let context = kept.get_or_insert_with(CCtx::create);
                let packed = pack_zstd(bytes, context, level, deadline);
                if packed.is_err() || context.sizeof() > ZSTD_CONTEXT_BYTES_MAX {
                    *kept = None;
                }
                packed
            })
        }
        Codec::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
            write_chunks(bytes, &mut encoder, deadline, failed)?;
            encoder.finish().map_err(failed)
        }
    }
}

fn pack_zstd(
    bytes: &[u8],
    context: &mut CCtx<'static>,
    level: i32,
    deadline: Instant,
) -> Result<Vec<u8>, Error> {
    let refused = |text: &str| Error::Refused(format!("could not compress with zstd: {text}"));
    let failed = |error: std::io::Error| refused(&error.to_string());
    if level <= ZSTD_WHOLE_LEVEL_MAX && bytes.len() <= ZSTD_WHOLE_BYTES_MAX {
        check_deadline(deadline)?;
        let code = |code| refused(zstd::zstd_safe::get_error_name(code));
        context.set_parameter(CParameter::CompressionLevel(level)).map_err(code)?;
        let mut packed = Vec::with_capacity(zstd::zstd_safe::compress_bound(bytes.len()));
        context.compress2(&mut packed, bytes).map_err(code)?;
        packed.shrink_to_fit();
        return Ok(packed);
    }
    let mut encoder = zstd::stream::write::Encoder::with_context(Vec::new(), context);
    encoder.set_parameter(CParameter::CompressionLevel(level)).map_err(failed)?;
    // The frame then states its content's size, and the encoder can plan for it.
    encoder.set_pledged_src_size(Some(bytes.len() as u64)).map_err(failed)?;
    write_chunks(bytes, &mut encoder, deadline, failed)?;
    encoder.finish().map_err(failed)
}

fn level_refused(codec: Codec, level: u32, max: u32) -> Error {
    Error::Refused(format!(
        "level {level} is not one of {}'s: 1 to {max}, or 0 for the usual one",
        codec.as_str()
    ))
}

fn write_chunks(
    bytes: &[u8],
    encoder: &mut impl Write,
    deadline: Instant,
    failed: impl Fn(std::io::Error) -> Error,
) -> Result<(), Error> {
    for chunk in bytes.chunks(CHUNK_BYTES) {
        check_deadline(deadline)?;
        encoder.write_all(chunk).map_err(&failed)?;
    }
    Ok(())
}

fn digest(mut hasher: Sha256, bytes: &[u8], deadline: Instant) -> Result<Vec<u8>, Error> {
    for chunk in bytes.chunks(CHUNK_BYTES) {
        check_deadline(deadline)?;
        hasher.update(chunk);
    }
    Ok(hasher.finalize().to_vec())
}

/// HMAC-SHA-256 (RFC 2104).
pub(crate) fn hmac(key: &[u8], bytes: &[u8], deadline: Instant) -> Result<Vec<u8>, Error> {
    const BLOCK_BYTES: usize = 64;
    let mut block = [0; BLOCK_BYTES];
    if key.len() > BLOCK_BYTES {
        let digest = Sha256::digest(key);
        block[..digest.len()].copy_from_slice(&digest);
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new().chain_update(block.map(|byte| byte ^ 0x36));
    let inner = digest(inner, bytes, deadline)?;
    let outer = Sha256::new().chain_update(block.map(|byte| byte ^ 0x5c)).chain_update(inner);
    Ok(outer.finalize().to_vec())
}

fn check_deadline(deadline: Instant) -> Result<(), DeadlinePassed> {
    if Instant::now() >= deadline { Err(DeadlinePassed) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hmac_is_that_of_rfc_4231() {
        let check = |key: &[u8], data: &[u8], expected: &str| {
            let deadline = Instant::now() + std::time::Duration::from_secs(60);
            assert_eq!(hex(&hmac(key, data, deadline).unwrap()), expected);
        };
        check(
            &[0x0b; 20],
            b"Hi There",
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
        );
        check(
            b"Jefe",
            b"what do ya want for nothing?",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        );
        check(
            &[0xaa; 131],
            b"Test Using Larger Than Block-Size Key - Hash Key First",
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
        );
    }

    #[test]
    fn every_level_that_is_promised_works_and_no_other() {
        let deadline = Instant::now() + std::time::Duration::from_secs(60);
        for (codec, max) in [(Codec::Zstd, ZSTD_LEVEL_MAX), (Codec::Gzip, GZIP_LEVEL_MAX)] {
            for level in 0..=max {
                assert!(pack(b"aaaaaaaaaaaaaaaa", codec, level, deadline).is_ok(), "{level}");
            }
            let error = pack(b"a", codec, max + 1, deadline).unwrap_err();
            assert!(matches!(error, Error::Refused(_)), "{error}");
        }
    }

    #[test]
    fn long_work_ends_at_the_deadline() {
        let past = Instant::now();
        assert!(matches!(pack(b"a", Codec::Zstd, 0, past), Err(Error::DeadlinePassed(_))));
        assert!(matches!(hmac(b"k", b"a", past), Err(Error::DeadlinePassed(_))));
    }
}
