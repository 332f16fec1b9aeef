//! JSON strings: quoted, escaped, and checked to be UTF-8 in the same pass.
//!
//! Most text needs no escape, so runs without one are found eight bytes at a time and copied
//! whole.

use super::out::Out;

/// The bytes are not UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotUtf8;

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;

/// Writes the text as a JSON string. What was written before an error is of no use.
pub(super) fn write_string(out: &mut impl Out, text: &[u8]) -> Result<(), NotUtf8> {
    out.put(b"\"");
    let mut rest = text;
    let mut highs = 0;
    loop {
        let run = plain_run(rest, &mut highs);
        out.put(&rest[..run]);
        let Some(&byte) = rest.get(run) else { break };
        write_escape(out, byte);
        rest = &rest[run + 1..];
    }
    out.put(b"\"");
    // ASCII is the common case, and then nothing is left to check.
    if highs & HIGHS != 0 { check_utf8(text) } else { Ok(()) }
}

pub(super) fn check_utf8(text: &[u8]) -> Result<(), NotUtf8> {
    std::str::from_utf8(text).map(|_| ()).map_err(|_| NotUtf8)
}

/// How many bytes from the start need no escape. `highs` collects all bytes that were looked at.
#[inline]
fn plain_run(text: &[u8], highs: &mut u64) -> usize {
    let (words, tail) = text.as_chunks::<8>();
    let mut at = 0;
    for word in words {
        let word = u64::from_le_bytes(*word);
        *highs |= word;
        let special = special_bytes(word);
        if special != 0 {
            return at + special.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    for &byte in tail {
        *highs |= u64::from(byte);
        if needs_escape(byte) {
            return at;
        }
        at += 1;
    }
    at
}

fn needs_escape(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

/// The high bit of each byte that needs an escape. The lowest bit set is exact; those above it
/// may be wrong, because the subtractions borrow.
fn special_bytes(word: u64) -> u64 {
    let control = word.wrapping_sub(ONES * 0x20) & !word;
    let quote = word ^ (ONES * b'"' as u64);
    let quote = quote.wrapping_sub(ONES) & !quote;
    let backslash = word ^ (ONES * b'\\' as u64);
    let backslash = backslash.wrapping_sub(ONES) & !backslash;
    (control | quote | backslash) & HIGHS
}

fn write_escape(out: &mut impl Out, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    match byte {
        b'"' => out.put(b"\\\""),
        b'\\' => out.put(b"\\\\"),
        b'\n' => out.put(b"\\n"),
        b'\r' => out.put(b"\\r"),
        b'\t' => out.put(b"\\t"),
        0x08 => out.put(b"\\b"),
        0x0C => out.put(b"\\f"),
        byte => {
            let (high, low) = (usize::from(byte >> 4), usize::from(byte & 15));
            out.put(&[b'\\', b'u', b'0', b'0', HEX[high], HEX[low]]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, expected: &str) {
        let mut written = Vec::new();
        write_string(&mut written, text.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(written).unwrap(), expected, "{text:?}");
    }

    #[test]
    fn escapes_what_json_requires_and_nothing_else() {
        check("", r#""""#);
        check("plain", r#""plain""#);
        check(r#"say "hi" \ there"#, r#""say \"hi\" \\ there""#);
        check("\n\r\t\u{8}\u{c}\0\u{1f}\u{7f}", "\"\\n\\r\\t\\b\\f\\u0000\\u001f\u{7f}\"");
        check("größer 💧 / \u{2028}", "\"größer 💧 / \u{2028}\"");
    }

    #[test]
    fn finds_every_special_byte_at_every_place_of_a_word() {
        for byte in 0..=255_u8 {
            for at in 0..24 {
                let mut text = [b'a'; 24];
                text[at] = byte;
                let mut highs = 0;
                let expected = if needs_escape(byte) { at } else { 24 };
                assert_eq!(plain_run(&text, &mut highs), expected, "byte {byte} at {at}");
            }
        }
    }

    #[test]
    fn refuses_what_is_not_utf8() {
        for text in [&b"\xff"[..], b"a\xc3", b"12345678\x80", b"\"\xed\xa0\x80\"", b"\n\n\xc3(\n"] {
            assert_eq!(write_string(&mut Vec::new(), text), Err(NotUtf8), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn serde_json_reads_the_same_text_back(text in any::<String>()) {
            let mut written = Vec::new();
            write_string(&mut written, text.as_bytes()).unwrap();
            prop_assert_eq!(serde_json::from_slice::<String>(&written).unwrap(), text);
        }

        #[test]
        fn any_bytes_are_written_exactly_when_they_are_utf8(
            bytes in proptest::collection::vec(any::<u8>(), 0..40)
        ) {
            let result = write_string(&mut Vec::new(), &bytes);
            prop_assert_eq!(result.is_ok(), std::str::from_utf8(&bytes).is_ok());
        }
    }
}
