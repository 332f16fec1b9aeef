//! Standing still at a message: a transform failed it whose settings say `on_error = "halt"`. Or for a
//! moment, because the chain that it was given to has left and was too slow to try it.
//!
//! Nothing behind the message goes on, whatever it is. What was shaped already stays in its place
//! among the jobs, and is shaped anew with the chain that ends the halt: so no record of an older
//! chain comes behind one of a newer. Nothing is written down, since a start comes to the same message
//! again.

use super::{Driver, Error};
use crate::pipeline::control::Reason;
use crate::pipeline::item::Item;
use crate::pipeline::workers::Job;
use crate::store::Failure;
use crate::transform::{SAID, without_words};
use std::sync::Arc;

/// Where the pipeline stands still.
pub(super) struct Halt {
    /// The failed message and what came behind it in its job, whose place is the first.
    items: Vec<Item>,
    /// Nothing where it was only not tried.
    reason: Option<Reason>,
    /// Somebody wants it to be tried again.
    is_over: bool,
}

impl Driver {
    /// Stops in front of the first of these items, which failed, or was not tried.
    pub(super) fn halt(&mut self, items: Vec<Item>, failure: Option<&Failure>) {
        let reason = failure.map(|failure| {
            let (text, has_words) = without_words(&failure.error.text);
            let words = failure.error.text[text.len()..].trim_start_matches([':', ';', ' ']);
            let mut reason = reason(&items, text);
            let (said, place) = if has_words { (SAID, "/api/v1/status") } else { ("", "") };
            tracing::error!("the pipeline stands still: {}{said}{place}", reason.text);
            if has_words {
                reason.text = format!("{}{SAID}{words}", reason.text);
            }
            reason
        });
        let is_over = reason.is_none();
        self.jobs.push_front(None);
        self.halted = Some(Halt { items, reason, is_over });
    }

    /// Whether it stands still until somebody does something.
    pub(super) fn stands_still(&self) -> bool {
        self.halted.as_ref().is_some_and(|halt| !halt.is_over)
    }

    pub(super) fn halt_reason(&self) -> Option<&Reason> {
        self.halted.as_ref()?.reason.as_ref()
    }

    /// The message is to be tried again: there is another chain, or an operator says so.
    pub(super) fn end_halt(&mut self) {
        if let Some(halt) = &mut self.halted {
            halt.is_over = true;
        }
    }

    /// Shapes anew what waited, once nothing of the chain before is at work any more.
    pub(super) fn go_on_from_halt(&mut self) -> Result<(), Error> {
        let is_at_work = self.jobs.iter().skip(1).any(Option::is_none);
        let Some(halt) = self.halted.take_if(|halt| halt.is_over && !is_at_work) else {
            return Ok(());
        };
        let what = if halt.reason.is_some() {
            "the pipeline tries again the message it stands at"
        } else {
            "the chain takes over what the one before had not come to"
        };
        tracing::info!(chain = self.chain.tag(), "{what}");
        let first = self.next_job - self.jobs.len() as u64;
        let waited = self.jobs.iter_mut().skip(1).filter_map(Option::take);
        let waited = waited.map(|done| done.into_items().collect());
        let again: Vec<Vec<Item>> = std::iter::once(halt.items).chain(waited).collect();
        for (number, items) in (first..).zip(again) {
            let (chain, envelope) = (Arc::clone(&self.chain), Arc::clone(&self.envelope));
            if !self.workers.submit(Job { number, chain, envelope, items }) {
                return Err(Error::Workers);
            }
        }
        Ok(())
    }
}

fn reason(items: &[Item], why: &str) -> Reason {
    let place = items.first().map_or_else(String::new, |item| {
        let change = &item.change;
        format!("a change of {} at {}", change.table.qualified_name(), change.position)
    });
    let text = format!(
        "{why}; its settings say on_error = \"halt\", so that everything waits at this message ({place}): \
         mend the transform or its settings, and it goes on by itself, with nothing lost"
    );
    Reason { part: "transforms".to_owned(), code: "halted".to_owned(), text }
}
