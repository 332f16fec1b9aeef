//! How the demonstration speaks: numbered steps and plain sentences on standard output, progress
//! on standard error.
//!
//! On a terminal the progress is one line that is written over; elsewhere it is a plain line every
//! few seconds. A reader who has gone away (`| head`) does not end the demonstration: cleaning up
//! matters more than being heard.

use std::cell::Cell;
use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// How often progress is told where it cannot be written over.
const PLAIN_INTERVAL: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct Narrator {
    is_terminal: bool,
    step: Cell<u32>,
    /// A progress line stands on the terminal.
    is_line_open: Cell<bool>,
    told: Cell<Instant>,
}

impl Narrator {
    pub(super) fn new() -> Self {
        Self {
            is_terminal: io::stderr().is_terminal(),
            step: Cell::new(0),
            is_line_open: Cell::new(false),
            told: Cell::new(Instant::now()),
        }
    }

    /// Begins the next step.
    pub(super) fn step(&self, text: impl Display) {
        self.step.set(self.step.get() + 1);
        self.line(format_args!("\n{}. {text}", self.step.get()));
    }

    /// Says something within a step; further lines are indented alike.
    pub(super) fn say(&self, text: impl Display) {
        for line in text.to_string().lines() {
            self.line(format_args!("   {line}"));
        }
    }

    /// Tells how far something is.
    pub(super) fn progress(&self, text: impl Display) {
        let mut stderr = io::stderr().lock();
        let written = if self.is_terminal {
            self.is_line_open.set(true);
            write!(stderr, "\r\x1b[2K   {text}")
        } else if self.told.get().elapsed() >= PLAIN_INTERVAL {
            self.told.set(Instant::now());
            writeln!(stderr, "   … {text}")
        } else {
            Ok(())
        };
        forgive(written.and_then(|()| stderr.flush()));
    }

    /// A line of the story.
    pub(super) fn line(&self, text: impl Display) {
        if self.is_line_open.replace(false) {
            forgive(write!(io::stderr(), "\r\x1b[2K"));
        }
        self.told.set(Instant::now());
        let mut stdout = io::stdout().lock();
        forgive(writeln!(stdout, "{text}").and_then(|()| stdout.flush()));
    }
}

/// Nobody is listening any more, which is no reason to stop.
fn forgive(_: io::Result<()>) {}

/// `26,481` for 26481.
pub(super) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        for (number, text) in
            [(0, "0"), (999, "999"), (1000, "1,000"), (26_481, "26,481"), (1_048_576, "1,048,576")]
        {
            assert_eq!(thousands(number), text);
        }
    }
}
