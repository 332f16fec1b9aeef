//! Writing to stdout and stderr: a reader that goes away is no failure, and text from outside
//! cannot steer a terminal.

use std::borrow::Cow;
use std::io::{self, Write as _};

use crate::transform::steers;

/// Why stdout took no more.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutputError {
    /// The reader of a pipe went away. An error of its own kind, since a broken pipe of a network
    /// connection is a failure and this is not.
    #[error("stdout was closed")]
    Closed,
    #[error("could not write to stdout")]
    Failed(#[source] io::Error),
}

/// Prints the text as it is and flushes it.
pub(super) fn print(text: &str) -> Result<(), OutputError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| {
        if error.kind() == io::ErrorKind::BrokenPipe {
            OutputError::Closed
        } else {
            OutputError::Failed(error)
        }
    })
}

/// Prints JSON on one line.
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string(value)?;
    text.push('\n');
    Ok(print(&text)?)
}

/// Prints a line for people. There is nobody to tell where stderr is closed.
pub(super) fn to_stderr(line: &str) {
    drop(writeln!(io::stderr().lock(), "{line}"));
}

/// The text with control characters written out, so that a row's value cannot move the cursor, colour the
/// screen, begin a line, or turn the direction of what comes behind it.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().fold(String::with_capacity(text.len() + 16), |mut out, c| {
        if steers(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
        out
    }))
}

/// At most so many characters, printable, with an ellipsis where something is missing.
pub(super) fn cut(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        None => printable(text).into_owned(),
        Some((end, _)) => format!("{}…", printable(&text[..end])),
    }
}

/// Columns under their headings, two spaces apart; the last one is not padded.
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(headings.get(column).map(|heading| heading.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, width) in cells.zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    line(&mut headings.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_written_out() {
        #[track_caller]
        fn check(input: &str, expected: &str) {
            assert_eq!(printable(input), expected);
        }
        check("plain ü", "plain ü");
        check("a\nb\u{1b}[31m\u{9b}", "a\\nb\\u{1b}[31m\\u{9b}");
    }

    #[test]
    fn long_text_is_cut_by_characters() {
        assert_eq!(cut("äöü", 3), "äöü");
        assert_eq!(cut("äöü", 2), "äö…");
    }

    #[test]
    fn tables_line_up() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        assert_eq!(
            table(&["ID", "NAME", "TEXT"], &[row(["1", "ä", ""]), row(["1000", "bcdef", "x"])]),
            "ID    NAME   TEXT\n1     ä\n1000  bcdef  x\n"
        );
    }
}
