//! One spelling for each JSON value, so that equal values have equal digests.
//!
//! White space between tokens goes, and strings are escaped in one way. Numbers stay as they are
//! written, to the last digit, and so does the order of an object's keys: to read a document would
//! hide what it lost.

use std::borrow::Cow;

use sha2::{Digest as _, Sha256};

/// The first 128 bits of the SHA-256 of a value's spelling.
pub(super) type Digest = [u8; 16];

pub(super) fn digest(canonical: &str) -> Digest {
    let mut digest = Digest::default();
    digest.copy_from_slice(&Sha256::digest(canonical)[..16]);
    digest
}

/// The value in its one spelling. What is not JSON stays as it is.
pub(super) fn canonical(json: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| !byte.is_ascii_whitespace() && byte != b'\\';
    if json.bytes().all(is_plain) {
        return Cow::Borrowed(json);
    }
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(start) = rest.find('"') {
        push_without_space(&mut out, &rest[..start]);
        let Some(length) = string_length(&rest[start..]) else { return Cow::Borrowed(json) };
        push_string(&mut out, &rest[start..start + length]);
        rest = &rest[start + length..];
    }
    push_without_space(&mut out, rest);
    Cow::Owned(out)
}

fn push_without_space(out: &mut String, tokens: &str) {
    out.extend(tokens.chars().filter(|character| !character.is_ascii_whitespace()));
}

/// The bytes of the string that the text begins with, quotes included.
fn string_length(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn push_string(out: &mut String, string: &str) {
    // A lone surrogate, which Postgres takes in a json document, is no string to Rust.
    let plain = || serde_json::to_string(&serde_json::from_str::<String>(string).ok()?).ok();
    match string.contains('\\').then(plain).flatten() {
        Some(plain) => out.push_str(&plain),
        None => out.push_str(string),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_have_one_spelling() {
        #[track_caller]
        fn check(json: &str, expected: &str) {
            assert_eq!(canonical(json), expected);
        }
        check("1.50", "1.50");
        check("9223372036854775807", "9223372036854775807");
        check(r#" { "a" : [ 1 , "b c" ] } "#, r#"{"a":[1,"b c"]}"#);
        check(r#""\u00fc\u0041\/""#, r#""üA/""#);
        check(r#""a \" b""#, r#""a \" b""#);
        check(r#"{"a":1,"a":1e400}"#, r#"{"a":1,"a":1e400}"#);
        check(r#"["\ud800", 1]"#, r#"["\ud800",1]"#);
        check(r#"["open \"#, r#"["open \"#);
        assert_ne!(digest("null"), digest("\"null\""));
    }
}
