//! The plain form of an append: one JSON document that anybody can repeat with curl. Pure.
//!
//! JSON holds text only, and spells control characters with six bytes. A batch for which that does
//! not do is written with names, values and bodies in base64, which the request says in the header
//! `s2-format`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::headers::HeaderRef;
use super::record::Record;

/// The most bytes that S2 reads of a request (`common/src/caps.rs` of s2-streamstore/s2, and tried
/// against s2-lite).
const REQUEST_BYTES_MAX: usize = 2 * 1024 * 1024;

/// How the strings of a request are to be read: the value of the header `s2-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// As they stand.
    Raw,
    Base64,
}

impl Format {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Base64 => "base64",
        }
    }
}

/// The body of a request, and what its header has to say of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AppendBody {
    pub(super) json: Vec<u8>,
    pub(super) format: Format,
}

#[derive(Serialize)]
struct AppendInput<T> {
    records: Vec<AppendRecord<T>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    match_seq_num: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fencing_token: Option<T>,
}

#[derive(Serialize)]
struct AppendRecord<T> {
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    headers: Vec<(T, T)>,
    body: T,
}

/// One append: as text where that is possible and not longer than S2 reads, otherwise in base64.
pub(super) fn append_body<'a>(
    records: impl Iterator<Item = &'a Record> + Clone,
    match_seq_num: Option<u64>,
    fencing_token: Option<&str>,
) -> AppendBody {
    let raw = write(records.clone(), match_seq_num, fencing_token, |bytes| {
        std::str::from_utf8(bytes).ok()
    });
    match raw {
        Some(json) if json.len() <= REQUEST_BYTES_MAX => AppendBody { json, format: Format::Raw },
        _ => {
            let token = fencing_token.map(str::to_owned);
            let json = write(records, match_seq_num, token, |bytes| Some(STANDARD.encode(bytes)));
            let json = json.expect("every byte has its base64");
            AppendBody { json, format: Format::Base64 }
        }
    }
}

/// Nothing where a piece has no such form.
fn write<'a, T: Serialize>(
    records: impl Iterator<Item = &'a Record>,
    match_seq_num: Option<u64>,
    fencing_token: Option<T>,
    form: impl Fn(&'a [u8]) -> Option<T>,
) -> Option<Vec<u8>> {
    let header = |header: HeaderRef<'a>| Some((form(header.name)?, form(header.value)?));
    let record = |record: &'a Record| {
        Some(AppendRecord {
            timestamp: record.timestamp_ms,
            headers: record.headers.iter().map(header).collect::<Option<_>>()?,
            body: form(&record.body)?,
        })
    };
    let records = records.map(record).collect::<Option<_>>()?;
    let input = AppendInput { records, match_seq_num, fencing_token };
    Some(serde_json::to_vec(&input).expect("strings and numbers are JSON"))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::headers::Headers;
    use super::*;

    fn record(headers: &[(&'static str, &'static str)], body: &'static [u8]) -> Record {
        let mut packed = Headers::default();
        for (name, value) in headers {
            packed.push(name.as_bytes(), value.as_bytes());
        }
        Record { timestamp_ms: Some(7), headers: packed, body: Bytes::from_static(body) }
    }

    fn check(records: &[Record], token: Option<&str>, format: Format, expected: &str) {
        let body = append_body(records.iter(), Some(3), token);
        assert_eq!(body.format, format);
        assert_eq!(std::str::from_utf8(&body.json), Ok(expected));
    }

    #[test]
    fn text_stays_readable_and_the_rest_is_base64() {
        check(
            &[record(&[("sb-part", "0/1")], b"{\"a\":1}"), record(&[], b"")],
            Some("token"),
            Format::Raw,
            r#"{"records":[{"timestamp":7,"headers":[["sb-part","0/1"]],"body":"{\"a\":1}"},{"timestamp":7,"body":""}],"match_seq_num":3,"fencing_token":"token"}"#,
        );
        // The token is no part of what the format speaks of.
        check(
            &[record(&[("n", "v")], b"\xff")],
            Some("token"),
            Format::Base64,
            r#"{"records":[{"timestamp":7,"headers":[["bg==","dg=="]],"body":"/w=="}],"match_seq_num":3,"fencing_token":"token"}"#,
        );
    }

    #[test]
    fn what_json_would_blow_up_is_base64() {
        let body = Bytes::from(vec![1; 500_000]);
        let records = [Record { timestamp_ms: None, headers: Headers::default(), body }];
        let body = append_body(records.iter(), None, None);
        assert_eq!(body.format, Format::Base64);
        assert!(body.json.len() < REQUEST_BYTES_MAX);
    }
}
