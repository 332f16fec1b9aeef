//! JSON as people compare it: one member in a line, long strings shortened. Works on the text, so
//! that every digit stays as it was written.

use sha2::{Digest as _, Sha256};

const INDENT: &str = "  ";

/// The text over several lines. A string of more than `string_bytes_max` bytes is shown by its
/// beginning, its length and its digest. What is not JSON is one line, shortened alike.
pub(super) fn pretty(json: &str, string_bytes_max: usize) -> String {
    if serde_json::from_str::<serde::de::IgnoredAny>(json).is_err() {
        return shortened(json, string_bytes_max);
    }
    let mut out = String::with_capacity(json.len().min(1 << 20) + 256);
    let mut depth = 0_usize;
    let mut rest = json;
    while let Some(character) = rest.chars().next() {
        let length = character.len_utf8();
        match character {
            '"' => {
                let end = string_end(rest);
                out.push('"');
                out.push_str(&shortened(&rest[1..end - 1], string_bytes_max));
                out.push('"');
                rest = &rest[end..];
                continue;
            }
            '{' | '[' => {
                let close = if character == '{' { '}' } else { ']' };
                let inside = rest[1..].trim_start();
                out.push(character);
                if inside.starts_with(close) {
                    out.push(close);
                    rest = &inside[1..];
                    continue;
                }
                depth += 1;
                new_line(&mut out, depth);
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                new_line(&mut out, depth);
                out.push(character);
            }
            ',' => {
                out.push(',');
                new_line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            ' ' | '\t' | '\r' | '\n' => {}
            other => out.push(other),
        }
        rest = &rest[length..];
    }
    out
}

fn new_line(out: &mut String, depth: usize) {
    out.push('\n');
    out.extend(std::iter::repeat_n(INDENT, depth));
}

/// Behind the closing quote of the string that begins this text.
fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (index, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return index + 1,
            _ => {}
        }
    }
    text.len()
}

/// The digest tells two apart that begin alike and have the same length.
fn shortened(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let mut start = text.floor_char_boundary(bytes_max / 2);
    // Not in the middle of an escape.
    while text[..start].ends_with('\\') {
        start -= 1;
    }
    let digest = Sha256::digest(text.as_bytes());
    let digest: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{}… ({} bytes, {digest})", &text[..start], text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_member_in_a_line_and_every_digit_as_it_was() {
        let json = r#"{"a":[1.50,{"b":{}} , []],"c:,{":"x\"y","d":1e400}"#;
        let expected = "{\n  \"a\": [\n    1.50,\n    {\n      \"b\": {}\n    },\n    []\n  ],\n  \
                        \"c:,{\": \"x\\\"y\",\n  \"d\": 1e400\n}";
        assert_eq!(pretty(json, 100), expected);
        assert_eq!(pretty(expected, 100), expected);
    }

    #[test]
    fn long_strings_are_told_apart() {
        let json = |last: char| format!("\"{}{last}\"", "ä".repeat(100));
        let (one, other) = (pretty(&json('1'), 20), pretty(&json('2'), 20));
        assert!(one.starts_with("\"äääää… (201 bytes, ") && one.ends_with(")\""), "{one}");
        assert_ne!(one, other);
        // A part of a message is no JSON.
        assert!(pretty(&"{".repeat(50), 20).starts_with("{{{{{{{{{{… (50 bytes, "));
        assert!(!pretty(&format!("\"{}\"", "\\\\".repeat(50)), 21).contains("\\…"));
    }
}
