//! A change on its way through the pipeline, and what became of it.

use super::ack::EntryId;
use super::holds::MessageId;
use super::size_gate::SizedRecord;
use crate::change::Change;
use crate::store::Failure;

/// Where a change came from, and so what has to be told once it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From the source, just now.
    Source { entry: EntryId },
    /// From the source, and spilled to disk since.
    Spilled { entry: EntryId },
    /// From the store, for another attempt.
    Store { id: MessageId },
}

/// A change with its origin.
#[derive(Debug)]
pub struct Item {
    pub change: Change,
    pub origin: Origin,
}

/// What the transforms and the size gate made of a change.
#[derive(Debug)]
pub enum Shaped {
    /// At least one record; several are the parts of a split.
    Records(Vec<SizedRecord>),
    /// A transform dropped it.
    Dropped,
    /// It cannot go as it is.
    Failed(Box<Failure>),
    /// A transform failed whose settings say `on_error = "halt"`: the pipeline stands still here.
    Halt(Box<Failure>),
}
