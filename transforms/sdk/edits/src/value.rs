//! What the host makes of a column's value, so that it need not cross into a guest.

use std::borrow::Cow;
use std::cell::RefCell;
use std::convert::Infallible;
use std::io::Write;

use base64::Engine as _;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use zstd::zstd_safe::{CCtx, CParameter};

/// How much is compressed or hashed before it is asked whether to go on.
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

thread_local! {
    /// Memory of the last compression on this thread: to ask the kernel for it anew, page by page, takes
    /// as long as a third of compressing 2 MiB.
    static ZSTD_CONTEXT: RefCell<Option<CCtx<'static>>> = const { RefCell::new(None) };
}

/// How a value is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    Zstd,
    Gzip,
}

impl Codec {
    /// Its name in `metadata.compressed_columns`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
        }
    }

    /// The level that a guest asked for, where 0 stands for the usual one.
    fn level(self, asked: u32) -> Result<u32, Refused> {
        let (usual, max) = match self {
            Self::Zstd => (ZSTD_LEVEL_DEFAULT, ZSTD_LEVEL_MAX),
            Self::Gzip => (GZIP_LEVEL_DEFAULT, GZIP_LEVEL_MAX),
        };
        match asked {
            0 => Ok(usual),
            level if level <= max => Ok(level),
            level => Err(Refused(format!(
                "level {level} is not one of {}'s: 1 to {max}, or 0 for the usual one",
                self.as_str()
            ))),
        }
    }
}

/// Why a value was left as it is: a sentence for the guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// Why long work did not end well.
#[derive(Debug, PartialEq, Eq)]
pub enum Stopped<S> {
    Refused(Refused),
    /// The caller did not want it to go on.
    By(S),
}

impl<S> From<Refused> for Stopped<S> {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

/// A value as a consumer thinks of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// What is between the quotes of a JSON string, unescaped.
    Text(Cow<'a, str>),
    /// The JSON text of anything else.
    Json(Cow<'a, str>),
}

impl<'a> Content<'a> {
    /// What a column's JSON text stands for; nothing where it is null.
    ///
    /// # Errors
    ///
    /// When it is a string that cannot be read.
    pub fn of(column: &str, json: Cow<'a, str>) -> Result<Option<Self>, Refused> {
        if json == "null" {
            return Ok(None);
        }
        if !json.starts_with('"') {
            return Ok(Some(Self::Json(json)));
        }
        if json.contains('\\') {
            let text: String = serde_json::from_str(&json).map_err(|error| {
                Refused(format!("column `{column}` holds a string that cannot be read: {error}"))
            })?;
            return Ok(Some(Self::Text(text.into())));
        }
        let inside = 1..json.len() - 1;
        Ok(Some(Self::Text(match json {
            Cow::Borrowed(json) => json[inside].into(),
            Cow::Owned(mut json) => {
                json.pop();
                json.remove(0);
                json.into()
            }
        })))
    }

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

/// A compressed value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// The new value, as JSON text.
    pub json: String,
    /// What `metadata.compressed_columns` says of it.
    pub entry: serde_json::Value,
}

/// Compresses a value. `go_on` is asked now and then.
///
/// # Errors
///
/// When the codec has no such level, or `go_on` fails.
pub fn compress<S>(
    content: &Content<'_>,
    codec: Codec,
    level: u32,
    mut go_on: impl FnMut() -> Result<(), S>,
) -> Result<Compressed, Stopped<S>> {
    let bytes = content.bytes();
    let packed = pack(bytes, codec, codec.level(level)?, &mut go_on)?;
    // Base64 needs no escaping, so that this is the JSON string.
    let mut json = String::with_capacity(packed.len().div_ceil(3) * 4 + 2);
    json.push('"');
    base64::engine::general_purpose::STANDARD.encode_string(&packed, &mut json);
    json.push('"');
    let entry = json!({
        "codec": codec.as_str(),
        "encoding": "base64",
        "content": content.name(),
        "bytes": bytes.len(),
    });
    Ok(Compressed { json, entry })
}

/// The SHA-256 of a value, or its HMAC where there is a key, as JSON text. `go_on` is asked now and
/// then.
///
/// # Errors
///
/// When `go_on` fails.
pub fn hash<S>(
    content: &Content<'_>,
    key: Option<&[u8]>,
    mut go_on: impl FnMut() -> Result<(), S>,
) -> Result<String, S> {
    let digest = match key {
        Some(key) => keyed(key, content.bytes(), &mut go_on)?,
        None => digest(Sha256::new(), content.bytes(), &mut go_on)?,
    };
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("\"{hex}\""))
}

/// A string cut to at most so many bytes, between characters, and how many it had; nothing where it is
/// short enough.
///
/// # Errors
///
/// When the value is not a string.
pub fn truncate(
    column: &str,
    content: &Content<'_>,
    bytes_max: u64,
) -> Result<Option<(String, usize)>, Refused> {
    let Content::Text(text) = content else {
        return Err(Refused(format!(
            "column `{column}` is not a string, and only strings can be truncated"
        )));
    };
    let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX);
    if text.len() <= bytes_max {
        return Ok(None);
    }
    Ok(Some((text[..text.floor_char_boundary(bytes_max)].to_owned(), text.len())))
}

/// HMAC-SHA-256 (RFC 2104).
#[must_use]
pub fn hmac(key: &[u8], bytes: &[u8]) -> Vec<u8> {
    match keyed(key, bytes, &mut || Ok::<(), Infallible>(())) {
        Ok(digest) => digest,
        Err(never) => match never {},
    }
}

fn keyed<S>(
    key: &[u8],
    bytes: &[u8],
    go_on: &mut impl FnMut() -> Result<(), S>,
) -> Result<Vec<u8>, S> {
    const BLOCK_BYTES: usize = 64;
    let mut block = [0; BLOCK_BYTES];
    if key.len() > BLOCK_BYTES {
        let digest = Sha256::digest(key);
        block[..digest.len()].copy_from_slice(&digest);
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new().chain_update(block.map(|byte| byte ^ 0x36));
    let inner = digest(inner, bytes, go_on)?;
    let outer = Sha256::new().chain_update(block.map(|byte| byte ^ 0x5c)).chain_update(inner);
    Ok(outer.finalize().to_vec())
}

fn digest<S>(
    mut hasher: Sha256,
    bytes: &[u8],
    go_on: &mut impl FnMut() -> Result<(), S>,
) -> Result<Vec<u8>, S> {
    for chunk in bytes.chunks(CHUNK_BYTES) {
        go_on()?;
        hasher.update(chunk);
    }
    Ok(hasher.finalize().to_vec())
}

fn pack<S>(
    bytes: &[u8],
    codec: Codec,
    level: u32,
    go_on: &mut impl FnMut() -> Result<(), S>,
) -> Result<Vec<u8>, Stopped<S>> {
    let failed = |error: std::io::Error| {
        Refused(format!("could not compress with {}: {error}", codec.as_str()))
    };
    match codec {
        Codec::Zstd => {
            let level = i32::try_from(level).unwrap_or(i32::MAX);
            ZSTD_CONTEXT.with_borrow_mut(|kept| {
                let context = kept.get_or_insert_with(CCtx::create);
                let packed = pack_zstd(bytes, context, level, go_on);
                if packed.is_err() || context.sizeof() > ZSTD_CONTEXT_BYTES_MAX {
                    *kept = None;
                }
                packed
            })
        }
        Codec::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
            write_chunks(bytes, &mut encoder, go_on, failed)?;
            Ok(encoder.finish().map_err(failed)?)
        }
    }
}

fn pack_zstd<S>(
    bytes: &[u8],
    context: &mut CCtx<'static>,
    level: i32,
    go_on: &mut impl FnMut() -> Result<(), S>,
) -> Result<Vec<u8>, Stopped<S>> {
    let refused = |text: &str| Refused(format!("could not compress with zstd: {text}"));
    let failed = |error: std::io::Error| refused(&error.to_string());
    if level <= ZSTD_WHOLE_LEVEL_MAX && bytes.len() <= ZSTD_WHOLE_BYTES_MAX {
        go_on().map_err(Stopped::By)?;
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
    write_chunks(bytes, &mut encoder, go_on, failed)?;
    Ok(encoder.finish().map_err(failed)?)
}

fn write_chunks<S>(
    bytes: &[u8],
    encoder: &mut impl Write,
    go_on: &mut impl FnMut() -> Result<(), S>,
    failed: impl Fn(std::io::Error) -> Refused,
) -> Result<(), Stopped<S>> {
    for chunk in bytes.chunks(CHUNK_BYTES) {
        go_on().map_err(Stopped::By)?;
        encoder.write_all(chunk).map_err(&failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn go_on() -> Result<(), Infallible> {
        Ok(())
    }

    #[test]
    fn hmac_is_that_of_rfc_4231() {
        let check = |key: &[u8], data: &[u8], expected: &str| {
            let hex: String = hmac(key, data).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, expected);
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
        let content = Content::Text("aaaaaaaaaaaaaaaa".into());
        for (codec, max) in [(Codec::Zstd, ZSTD_LEVEL_MAX), (Codec::Gzip, GZIP_LEVEL_MAX)] {
            for level in 0..=max {
                assert!(compress(&content, codec, level, go_on).is_ok(), "{level}");
            }
            let refused = compress(&content, codec, max + 1, go_on).unwrap_err();
            assert!(matches!(refused, Stopped::Refused(_)), "{refused:?}");
        }
    }

    #[test]
    fn long_work_ends_when_it_is_told_to() {
        let content = Content::Text("a".into());
        let compressed = compress(&content, Codec::Zstd, 0, || Err("enough"));
        assert_eq!(compressed, Err(Stopped::By("enough")));
        assert_eq!(hash(&content, Some(b"k"), || Err("enough")), Err("enough"));
    }

    #[test]
    fn a_value_is_its_text_or_its_json() {
        let check = |json: &str, expected: Option<Content<'_>>| {
            assert_eq!(Content::of("c", json.into()), Ok(expected.clone()), "{json}");
            assert_eq!(Content::of("c", json.to_owned().into()), Ok(expected), "{json}");
        };
        check("null", None);
        check("12.50", Some(Content::Json("12.50".into())));
        check("\"a\"", Some(Content::Text("a".into())));
        check("\"\"", Some(Content::Text("".into())));
        check(r#""a\n\"ä""#, Some(Content::Text("a\n\"ä".into())));
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let text = Content::Text("ää".into());
        assert_eq!(truncate("c", &text, 4), Ok(None));
        assert_eq!(truncate("c", &text, 3), Ok(Some(("ä".into(), 4))));
        assert_eq!(truncate("c", &text, 0), Ok(Some((String::new(), 4))));
        assert!(truncate("c", &Content::Json("1".into()), 0).is_err());
    }
}
