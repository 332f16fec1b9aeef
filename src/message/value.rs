//! Postgres's text of a value, as JSON. The only mapper, for the stream and for backfills.
//!
//! It relies on the session settings that the source pins: `timezone=UTC`, `datestyle=ISO`,
//! `intervalstyle=postgres`, `extra_float_digits=3`, `bytea_output=hex`. It writes valid JSON
//! only: a text that does not fit its kind, which those settings exclude, becomes a JSON string
//! of that text, so that nothing is lost and nobody has to give a row up.

use super::interval::Interval;
use super::nested::{write_array, write_composite};
use super::out::Out;
use super::string::{NotUtf8, check_utf8, write_string};
use crate::pg_type::Kind;

/// Writes a value that is not NULL. What was written before an error is of no use.
pub(super) fn write_value(out: &mut impl Out, kind: &Kind, text: &[u8]) -> Result<(), NotUtf8> {
    // Postgres has checked json and jsonb; parsing them again costs precision and time. The type
    // number in the stream is the one of the row, so that a json column never holds other text.
    if let (Kind::Json, false) = (kind, text.is_empty()) {
        check_utf8(text)?;
        out.put(text);
        return Ok(());
    }
    write_checked(out, kind, text)
}

/// Like [`write_value`], for a value inside of another. A composite type's attributes are those
/// of today's catalogue, not of the row, so that even json is checked.
pub(super) fn write_checked(out: &mut impl Out, kind: &Kind, text: &[u8]) -> Result<(), NotUtf8> {
    match kind {
        Kind::Text => return write_string(out, text),
        Kind::Bool => match text {
            b"t" => out.put(b"true"),
            b"f" => out.put(b"false"),
            _ => return write_string(out, text),
        },
        Kind::Integer | Kind::Float => {
            if !is_number(text) {
                return write_string(out, text);
            }
            out.put(text);
        }
        Kind::Json => {
            if serde_json::from_slice::<&serde_json::value::RawValue>(text).is_err() {
                return write_string(out, text);
            }
            out.put(text);
        }
        Kind::Timestamp => {
            if !is_timestamp(text) {
                return write_string(out, text);
            }
            write_timestamp(out, text, b"");
            out.put(b"\"");
        }
        Kind::Timestamptz => match text.strip_suffix(b"+00") {
            Some(utc) if is_timestamp(utc) => {
                // `.000000`, from what is already there: nothing, or a dot and 1 to 6 digits.
                let padding = match utc.len() {
                    TO_SECONDS => ".000000",
                    length => &"000000"[length - TO_SECONDS - 1..],
                };
                write_timestamp(out, utc, padding.as_bytes());
                out.put(b"Z\"");
            }
            _ => return write_string(out, text),
        },
        Kind::Interval => match Interval::parse(text) {
            Some(interval) => interval.write(out),
            None => return write_string(out, text),
        },
        Kind::Vector => {
            if !is_vector(text) {
                return write_string(out, text);
            }
            out.put(text);
        }
        Kind::Array { element, delimiter } => return write_array(out, element, *delimiter, text),
        Kind::Composite { attributes } => return write_composite(out, attributes, text),
    }
    Ok(())
}

/// The length of `2025-06-11 01:19:22`.
const TO_SECONDS: usize = 19;

/// Is it `2025-06-11 01:19:22` with up to six more digits? Infinities, years before Christ and
/// years of more than four digits are not.
fn is_timestamp(text: &[u8]) -> bool {
    let Some((whole, fraction)) = text.split_first_chunk::<TO_SECONDS>() else { return false };
    let pattern = b"0000-00-00 00:00:00";
    let whole = whole.iter().zip(pattern).all(|(byte, pattern)| match pattern {
        b'0' => byte.is_ascii_digit(),
        separator => byte == separator,
    });
    whole
        && match fraction {
            [] => true,
            [b'.', digits @ ..] => {
                (1..=6).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit)
            }
            _ => false,
        }
}

/// Writes an opening quote and the timestamp with a `T`.
fn write_timestamp(out: &mut impl Out, text: &[u8], padding: &[u8]) {
    let (date, time) = text.split_at(10);
    out.put(b"\"");
    out.put(date);
    out.put(b"T");
    out.put(&time[1..]);
    out.put(padding);
}

/// Is it a number as JSON writes it? Postgres's integers and finite floats are.
fn is_number(text: &[u8]) -> bool {
    let unsigned = text.strip_prefix(b"-").unwrap_or(text);
    let integer = digits(unsigned);
    if integer == 0 || (integer > 1 && unsigned[0] == b'0') {
        return false;
    }
    let mut rest = &unsigned[integer..];
    if let Some(fraction) = rest.strip_prefix(b".") {
        let length = digits(fraction);
        if length == 0 {
            return false;
        }
        rest = &fraction[length..];
    }
    if let [b'e' | b'E', exponent @ ..] = rest {
        let exponent = match exponent {
            [b'+' | b'-', exponent @ ..] => exponent,
            exponent => exponent,
        };
        return !exponent.is_empty() && digits(exponent) == exponent.len();
    }
    rest.is_empty()
}

fn digits(text: &[u8]) -> usize {
    text.iter().take_while(|byte| byte.is_ascii_digit()).count()
}

/// Is it `[1,2.5,-3e-05]`? That is JSON already.
fn is_vector(text: &[u8]) -> bool {
    let inner = text.strip_prefix(b"[").and_then(|text| text.strip_suffix(b"]"));
    inner.is_some_and(|inner| inner.is_empty() || inner.split(|byte| *byte == b',').all(is_number))
}
