//! Messages whose records no batch holds together.
//!
//! S2 takes a batch as a whole or not at all, and these need several. What dies in between leaves the
//! first parts in the stream, and shaped anew, perhaps by another chain, the rest might not fit them. So
//! the records are stored as bytes before the first is sent, and from then on nothing is shaped again:
//!
//! ```text
//! shaped ─▶ stored, with its records ─▶ read again ─▶ sent, batch by batch ─▶ gone
//!                     ▲                                       │
//!                     └── parts that are in the stream leave ─┘
//! ```
//!
//! - The message is one in the store like any other, and holds its group until it is sent; others may
//!   overtake it meanwhile. Behind it in the outbox nothing comes in between.
//! - A part leaves the store with the checkpoint whose number is behind it. A restart reads the stream
//!   from there, finds by `sb-part` which parts came after, and sends those that are left.
//! - What fails before anything of it is in the stream loses its records, so that another chain makes
//!   others of it. After that it is these records or none.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::{Driver, Error};
use crate::change::Position;
use crate::pipeline::holds::{Due, MessageId};
use crate::pipeline::item::{Item, Origin};
use crate::pipeline::outbox::{Parcel, Portion};
use crate::pipeline::place::LaneId;
use crate::pipeline::size_gate::{self, SizedRecord};
use crate::store::{self, Attempts, Known, KnownParts, Parts, StoredState, Write};

/// The messages whose records the store has, or will have.
#[derive(Default)]
pub(super) struct InParts {
    known: HashMap<MessageId, KnownParts>,
    /// On their way there, and busy until then.
    coming: HashSet<MessageId>,
}

impl InParts {
    /// What an earlier process has left.
    pub(super) fn new(messages: &[Known]) -> Self {
        let known = messages.iter().filter_map(|known| Some((known.id, known.parts.clone()?)));
        Self { known: known.collect(), coming: HashSet::new() }
    }

    pub(super) fn forget(&mut self, id: MessageId) {
        self.known.remove(&id);
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty() && self.coming.is_empty()
    }
}

impl Driver {
    /// Has the records of a message stored, with the message where it comes from the source. It follows
    /// from there.
    pub(super) fn store_parts(&mut self, item: Item, records: Vec<SizedRecord>) {
        let stream = records.first().and_then(SizedRecord::stream).cloned();
        let id = match item.origin {
            Origin::Source { .. } | Origin::Spilled { .. } => {
                let id = self.next_id;
                self.insert(item, StoredState::Waiting, Attempts::default(), None, None, Due::Now);
                id
            }
            Origin::Store { id } => {
                self.off_the_way(&item);
                self.parts.coming.insert(id);
                id
            }
        };
        self.parts.known.insert(id, KnownParts { stream: stream.clone(), first: 0 });
        let records = records.into_iter().map(SizedRecord::into_record).collect();
        let parts = Some(Parts { stream, first: 0, records });
        self.writes.push(Write::Parts { id, parts });
    }

    /// They are on disk.
    pub(super) fn on_parts_stored(&mut self, id: MessageId) {
        if self.parts.coming.remove(&id) {
            self.holds.back(id, false, Due::Now);
            self.is_back(id);
        }
    }

    /// Sends what the store has of a message's records.
    pub(super) fn forward_parts(&mut self, item: Item, parts: Parts) -> Result<(), Error> {
        let Origin::Store { id } = item.origin else { return Ok(()) };
        if self.holds.is_held(id) {
            self.off_the_way(&item);
            self.holds.back(id, false, Due::Now);
            return Ok(());
        }
        if let Some(landed) = self.found_landed(&item) {
            self.on_found(&item, landed);
            return Ok(());
        }
        let Parts { stream, first, records } = parts;
        let routed = |record| {
            let sized = size_gate::check(record).map_err(|error| store::Error::Content {
                text: format!("a part of message {id} cannot be sent: {error}"),
            })?;
            Ok(sized.routed_to(stream.clone()))
        };
        let mut records =
            records.into_iter().map(routed).collect::<Result<Vec<_>, store::Error>>()?;
        // Those that were found in the stream meanwhile may still leave the store.
        let found = self.parts.known.get(&id).map_or(0, |known| known.first);
        let gone = usize::try_from(found.saturating_sub(first)).unwrap_or(usize::MAX);
        records.drain(..gone.min(records.len()));
        self.forward_parcel(Parcel::in_portions(item, records, first.max(found)));
        Ok(())
    }

    /// Some parts were acknowledged, and others are still to come.
    pub(super) fn on_portion(&mut self, portion: &Portion) {
        self.counters.records += portion.records;
        self.counters.record_bytes += portion.metered_bytes;
        if let Origin::Store { id } = portion.origin {
            self.parts_are_in(id, portion.below);
        }
    }

    /// A stream has been read, which holds these first parts.
    pub(super) fn on_begun(&mut self, lane: LaneId, begun: &HashMap<Position, u64>) {
        if begun.is_empty() || self.parts.known.is_empty() {
            return;
        }
        let is_own = lane == LaneId::OWN;
        let name = self.lanes.get(lane).and_then(|lane| lane.name());
        let in_it: Vec<(MessageId, u64)> = self
            .parts
            .known
            .iter()
            // A stream that a transform names may be the pipeline's own.
            .filter(|(_, known)| {
                known.stream == name || is_own && self.is_own(known.stream.as_ref())
            })
            .filter_map(|(id, _)| Some((*id, *begun.get(&self.holds.position(*id)?)?)))
            .collect();
        for (id, below) in in_it {
            self.parts_are_in(id, below);
        }
    }

    fn is_own(&self, stream: Option<&Arc<str>>) -> bool {
        stream.is_none_or(|stream| **stream == *self.lanes.own.client.place().stream)
    }

    fn parts_are_in(&mut self, id: MessageId, below: u64) {
        let Some(known) = self.parts.known.get_mut(&id) else { return };
        if known.first < below {
            known.first = below;
            self.writes.push(Write::PartsSent { id, below });
            self.delivered = true;
        }
    }

    /// A part of its letter is where that goes.
    pub(super) fn letter_is_begun(&self, id: MessageId) -> bool {
        let known = self.parts.known.get(&id);
        known.is_some_and(|known| known.first > 0 && self.dead.is_stream(known.stream.as_ref()))
    }

    /// A message has failed. Where nothing of it is in a stream, it is shaped anew the next time.
    pub(super) fn shape_anew(&mut self, id: MessageId) {
        let is_begun = |known: &KnownParts| known.first > 0;
        if self.parts.known.get(&id).is_none_or(is_begun) {
            return;
        }
        if self.holds.position(id).is_some_and(|position| self.is_in_doubt(position)) {
            return;
        }
        self.parts.known.remove(&id);
        self.writes.push(Write::Parts { id, parts: None });
    }
}
