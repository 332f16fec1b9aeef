//! Cutting a text into pieces of whole characters. Pure.

use std::ops::Range;

/// Where to cut a text so that each piece has at most `bytes_max` bytes, which is not less than any
/// character has.
#[must_use]
pub fn cuts(text: &str, bytes_max: usize) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut start = 0;
    while start < text.len() {
        let end = text.floor_char_boundary(start.saturating_add(bytes_max));
        ranges.push(start..end);
        start = end;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_characters_and_make_the_text_again() {
        let check = |text: &str, bytes_max, expected: &[&str]| {
            let pieces: Vec<&str> =
                cuts(text, bytes_max).into_iter().map(|range| &text[range]).collect();
            assert_eq!(pieces, expected, "{text} by {bytes_max}");
        };
        check("", 4, &[]);
        check("abcd", 4, &["abcd"]);
        check("abcde", 4, &["abcd", "e"]);
        check("aääb", 4, &["aä", "äb"]);
        check("😀😀", 4, &["😀", "😀"]);
        check("a😀b", 4, &["a", "😀", "b"]);
    }
}
