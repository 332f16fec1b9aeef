//! How the demonstration speaks: numbered steps and plain sentences on standard output, progress
//! on standard error.
//!
//! On a terminal the progress is one line that is written over; elsewhere it is a plain line every
//! few seconds. A reader who has gone away (`| head`) does not end the demonstration: cleaning up
//! matters more than being heard.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often progress is told where it cannot be written over.
const PLAIN_INTERVAL: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct Narrator {
    is_terminal: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    step: u32,
    /// A progress line stands on the terminal.
    is_line_open: bool,
    told: Instant,
}

impl Narrator {
    pub(super) fn new() -> Self {
        let state = State { step: 0, is_line_open: false, told: Instant::now() };
        Self { is_terminal: io::stderr().is_terminal(), state: Mutex::new(state) }
    }

    /// Begins the next step.
    pub(super) fn step(&self, text: impl Display) {
        let step = {
            let mut state = self.state();
            state.step += 1;
            state.step
        };
        self.line(format_args!("\n{step}. {text}"));
    }

    /// Says something within a step; further lines are indented alike.
    pub(super) fn say(&self, text: impl Display) {
        for line in text.to_string().lines() {
            self.line(format_args!("   {line}"));
        }
    }

    /// Tells how far something is.
    pub(super) fn progress(&self, text: impl Display) {
        let mut state = self.state();
        let mut stderr = io::stderr().lock();
        let written = if self.is_terminal {
            state.is_line_open = true;
            write!(stderr, "\r\x1b[2K   {text}")
        } else if state.told.elapsed() >= PLAIN_INTERVAL {
            state.told = Instant::now();
            writeln!(stderr, "   … {text}")
        } else {
            Ok(())
        };
        forgive(written.and_then(|()| stderr.flush()));
    }

    /// A line of the story.
    pub(super) fn line(&self, text: impl Display) {
        let mut state = self.state();
        if std::mem::take(&mut state.is_line_open) {
            forgive(write!(io::stderr(), "\r\x1b[2K"));
        }
        state.told = Instant::now();
        let mut stdout = io::stdout().lock();
        forgive(writeln!(stdout, "{text}").and_then(|()| stdout.flush()));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
