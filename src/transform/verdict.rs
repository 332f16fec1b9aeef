//! What a guest's verdict makes of its message, by the rules that `wit/` states.

use std::sync::Arc;

use bytes::Bytes;
use serde::de::IgnoredAny;

use super::bindings::types::Verdict;
use super::instance::{Class, Fault};
use super::state::Message;
use crate::message::{Draft, cuts};
use crate::sink::record::{BATCH_RECORDS_MAX, RECORD_BYTES_MAX};

/// The most records that a message may become: as many as S2 takes in one batch.
const PARTS_MAX: usize = BATCH_RECORDS_MAX;

/// The smallest parts that a guest may ask for, in bytes: headers alone take a few hundred.
const PART_BYTES_MIN: u64 = 1024;

/// The largest message that is cut into parts, in bytes: its text is in memory once.
const PARTS_MESSAGE_BYTES_MAX: u64 = 128 * 1024 * 1024;

/// By how much the header `sb-part` may grow: from `0/1` to `999/1000`.
const PART_NUMBER_BYTES: u64 = 5;

/// What one transform made of one message.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every message is kept, and a box would cost each of them an allocation"
)]
pub(crate) enum Shaped {
    Keep(Message),
    Drop,
    Split(Vec<Draft>),
}

impl Shaped {
    /// The word in traces.
    pub(crate) fn verdict(&self) -> &'static str {
        match self {
            Self::Keep(_) => "keep",
            Self::Drop => "drop",
            Self::Split(_) => "split",
        }
    }
}

/// Does what the guest of this file decided. Where its verdict breaks a rule, the message is given
/// back with the fault.
pub(crate) fn apply(
    verdict: Verdict,
    message: Message,
    transform: &Arc<str>,
) -> Result<Shaped, (Fault, Box<Message>)> {
    match decide(verdict, &message) {
        Ok(Decision::Keep) => Ok(Shaped::Keep(message)),
        Ok(Decision::Drop) => Ok(Shaped::Drop),
        Ok(Decision::Split(bodies)) => Ok(Shaped::Split(message.draft.split(bodies, transform))),
        Err(fault) => Err((fault, Box::new(message))),
    }
}

enum Decision {
    Keep,
    Drop,
    Split(Vec<Bytes>),
}

fn decide(verdict: Verdict, message: &Message) -> Result<Decision, Fault> {
    if let Some(reason) = message.breaches.first() {
        return Err(invalid(format!("broke the interface's rules and went on: {reason}")));
    }
    match verdict {
        Verdict::Keep => Ok(Decision::Keep),
        Verdict::Drop => Ok(Decision::Drop),
        Verdict::Split(bodies) => {
            refuse_part(message)?;
            split(bodies)
        }
        Verdict::Parts(bytes_max) => {
            refuse_part(message)?;
            parts(message, bytes_max)
        }
    }
}

fn invalid(reason: String) -> Fault {
    Fault::new(Class::Invalid, reason)
}

fn refuse_part(message: &Message) -> Result<(), Fault> {
    let (index, count) = message.draft.part();
    if count == 1 {
        return Ok(());
    }
    Err(invalid(format!(
        "split part {index}/{count} of a message that an earlier transform had split"
    )))
}

fn split(bodies: Vec<String>) -> Result<Decision, Fault> {
    if bodies.is_empty() {
        return Err(invalid("split a message into nothing; `drop` is the verdict for that".into()));
    }
    if bodies.len() > PARTS_MAX {
        return Err(invalid(format!(
            "split a message into {} records, and {PARTS_MAX} are allowed",
            bodies.len()
        )));
    }
    for (index, body) in bodies.iter().enumerate() {
        if let Err(error) = serde_json::from_str::<IgnoredAny>(body) {
            return Err(invalid(format!(
                "split a message into records of which number {index} is not JSON: {error}"
            )));
        }
    }
    Ok(Decision::Split(bodies.into_iter().map(Bytes::from).collect()))
}

fn parts(message: &Message, bytes_max: u64) -> Result<Decision, Fault> {
    let measured = message.draft.metered_bytes();
    let measured = measured.map_err(|error| invalid(format!("cannot be cut: {error}")))?;
    if measured > PARTS_MESSAGE_BYTES_MAX {
        return Err(Fault::new(
            Class::Limit,
            format!(
                "asked for parts of a message of {measured} bytes, and {PARTS_MESSAGE_BYTES_MAX} \
                 are cut at most; make it smaller first"
            ),
        ));
    }
    let text = message.draft.message_json();
    let text = text.map_err(|error| {
        invalid(format!("cannot be cut: {}", crate::error_chain::error_chain(&error)))
    })?;
    let bytes_max = match bytes_max {
        0 => {
            let headers = measured.saturating_sub(text.len() as u64) + PART_NUMBER_BYTES;
            RECORD_BYTES_MAX.saturating_sub(headers)
        }
        bytes_max => bytes_max,
    };
    if bytes_max < PART_BYTES_MIN {
        return Err(invalid(format!(
            "asked for parts of {bytes_max} bytes, and they must have {PART_BYTES_MIN}"
        )));
    }
    let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX);
    if text.len() <= bytes_max {
        return Ok(Decision::Keep);
    }
    let ranges = cuts(&text, bytes_max);
    if ranges.len() > PARTS_MAX {
        return Err(invalid(format!(
            "asked for parts of {bytes_max} bytes, which would be {} records, and {PARTS_MAX} are \
             allowed",
            ranges.len()
        )));
    }
    let text = Bytes::from(text);
    Ok(Decision::Split(ranges.into_iter().map(|range| text.slice(range)).collect()))
}
