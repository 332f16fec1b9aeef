//! Whether much of what the live chain is given fails. One that turns bad within its probation is taken
//! back; later nobody does that, and each failure alone is a line among many.

use std::time::{Duration, Instant};

use super::Driver;
use crate::transform::Tally;

/// Over so much time messages are counted.
const WINDOW: Duration = Duration::from_secs(30);

/// Fewer failures than this are told message by message only.
const FAILED_MIN: u64 = 10;

/// The last window, and the one that is being counted.
#[derive(Debug, Default)]
pub(super) struct Failing {
    /// Of which chain, since when, and what its health said then.
    counted: Option<(u64, Instant, Tally)>,
    last: Option<Tally>,
}

/// One message in ten fails.
fn is_much(tally: Tally) -> bool {
    tally.failed >= FAILED_MIN && tally.failed.saturating_mul(10) >= tally.messages
}

impl Failing {
    /// Looks at a chain's health. Says when that is bad since this look.
    fn look(&mut self, generation: u64, now: Instant, tally: Tally) -> bool {
        let Some((_, since, earlier)) = self.counted.filter(|(of, ..)| *of == generation) else {
            // What came before it went live was sampled, or is another chain's.
            *self = Self { counted: Some((generation, now, tally)), last: None };
            return false;
        };
        if now.saturating_duration_since(since) < WINDOW {
            return false;
        }
        let was_bad = self.last.is_some();
        self.counted = Some((generation, now, tally));
        self.last = Some(tally.since(earlier)).filter(|tally| is_much(*tally));
        self.last.is_some() && !was_bad
    }

    fn text(&self) -> Option<String> {
        let Tally { messages, failed, timeouts } = self.last?;
        Some(format!(
            "{failed} of the {messages} messages of {} s failed in the transforms, {timeouts} of them \
             for time. What becomes of them is as its settings say (`on_error`): parked and tried again, \
             if nothing else; `sluicebox transforms list` names the module, and `sluicebox messages` \
             what is wrong. A module that turns bad after its \
             probation is not taken back by itself: put a mended or an earlier one into the folder",
            WINDOW.as_secs()
        ))
    }
}

impl Driver {
    /// Looks at what the chain does, and says it in the log when it begins to be bad.
    pub(super) fn look_for_failing(&mut self) {
        let (now, tally) = (self.clock.now(), self.chain.health().tally());
        if self.failing.look(self.chain.generation, now, tally)
            && let Some(text) = self.failing.text()
        {
            tracing::error!(chain = self.chain.tag(), "{text}");
        }
    }

    /// One sentence while much fails.
    pub(super) fn failing_warning(&self) -> Option<String> {
        self.failing.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_much_is_said_until_it_does_no_more() {
        let began = Instant::now();
        let mut failing = Failing::default();
        let mut look = |seconds: u64, generation, messages, failed| {
            let tally = Tally { messages, failed, timeouts: 0 };
            let news = failing.look(generation, began + Duration::from_secs(seconds), tally);
            (news, failing.text().map(|text| text.split(" failed").next().unwrap().to_owned()))
        };
        let told = |text: &str| Some(text.to_owned());
        assert_eq!(look(0, 1, 50, 50), (false, None), "of before");
        assert_eq!(look(29, 1, 1000, 1000), (false, None), "the time is not over");
        assert_eq!(look(30, 1, 150, 59), (false, None), "nine are few");
        assert_eq!(look(60, 1, 1050, 149), (true, told("90 of the 900 messages of 30 s")));
        assert_eq!(look(61, 1, 1050, 149), (false, told("90 of the 900 messages of 30 s")));
        assert_eq!(look(90, 1, 1060, 159), (false, told("10 of the 10 messages of 30 s")));
        assert_eq!(look(120, 1, 2060, 169), (false, None), "one in a hundred");
        assert_eq!(look(150, 1, 2160, 269), (true, told("100 of the 100 messages of 30 s")));
        assert_eq!(look(151, 2, 0, 0), (false, None), "another chain");
        assert_eq!(look(181, 2, 0, 0), (false, None), "nothing comes");
    }
}
