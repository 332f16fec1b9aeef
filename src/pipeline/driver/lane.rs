//! One stream's part of the pipeline: what is ready for it and on its way there, the line, and its
//! trouble.
//!
//! ```text
//! Waiting ── its time has come ──▶ Opening ── the stream is ours, and its end was read ──▶ Open
//!    ▲                                │                                                      │
//!    └──────── trouble: after a pause ┴── the session broke, or S2 advised another one ◀─────┘
//! ```

use std::time::{Duration, Instant};

use super::Pending;
use super::others::OtherWriters;
use super::routed::Routed;
use crate::pipeline::control::Reason;
use crate::pipeline::grants::Grants;
use crate::pipeline::link::{self, Established, Line, Opening, establish};
use crate::pipeline::measures::Measures;
use crate::pipeline::outbox::{Outbox, Parcel, Window};
use crate::sink::Guarantee;
use crate::sink::client::Client;
use crate::store::{Failure, Store, Tokens};

/// The line to S2, and what to do where there is none.
pub(super) enum Sink {
    Opening(Pending<(Option<Tokens>, Result<Established, link::Error>)>),
    Open(Box<Line>),
    /// In trouble, until the next attempt.
    Waiting {
        until: Instant,
    },
}

/// What comes from the sink.
pub(super) enum SinkEvent {
    /// With the token that was drawn for it, which a failed attempt leaves to the next.
    Opened(Option<Tokens>, Result<Box<Established>, link::Error>),
    Ack(Result<crate::sink::session::Ack, crate::sink::error::Error>),
}

impl Sink {
    /// The next event. Cancel-safe: what is being opened is kept.
    pub(super) async fn event(&mut self) -> SinkEvent {
        match self {
            Self::Opening(opening) => {
                let (tokens, result) = opening.await;
                SinkEvent::Opened(tokens, result.map(Box::new))
            }
            Self::Open(line) => SinkEvent::Ack(line.next_ack().await),
            Self::Waiting { .. } => std::future::pending().await,
        }
    }
}

/// What all lanes are opened with.
pub(super) struct Tools<'a> {
    pub(super) store: &'a Store,
    pub(super) pipeline_id: &'a str,
    /// Keeps a process on a copy of the store from drawing the same token.
    pub(super) nonce: u32,
    /// The least that may be promised, where an operator says so.
    pub(super) guarantee: Option<Guarantee>,
}

/// Refusals for want of a permission, since a stream was last open.
///
/// A 403 may be the access token's for good, or pass, as one does while permissions are being changed or
/// something in front of S2 is set up. What it means for what is promised counts for all later starts,
/// and where the stream is to be read from is written down once: so a first one is not believed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Forbidden {
    count: u32,
    since: Option<Instant>,
}

/// So many in so much time are believed. With the pauses between attempts, the time decides.
const FORBIDDEN_MIN: u32 = 4;
const FORBIDDEN_TIME: Duration = Duration::from_secs(10);

impl Forbidden {
    pub(super) fn note(&mut self, now: Instant) {
        self.count += 1;
        self.since.get_or_insert(now);
    }

    /// Whether it is no passing one.
    fn stays(self, now: Instant) -> bool {
        let lasts = self.since.is_some_and(|since| since + FORBIDDEN_TIME <= now);
        self.count >= FORBIDDEN_MIN && lasts
    }
}

/// A stream.
pub(super) struct Lane {
    pub(super) client: Client,
    pub(super) outbox: Outbox,
    pub(super) sink: Sink,
    pub(super) reason: Option<Reason>,
    /// Attempts that failed since the last acknowledgement.
    pub(super) failures: u64,
    /// How often it was forbidden to open it.
    pub(super) forbidden: Forbidden,
    /// Drawn for an opening that failed.
    pub(super) tokens: Option<Tokens>,
    /// Used up by the first line.
    pub(super) grants: Grants,
    pub(super) others: OtherWriters,
    /// Where the stream has to be read from after a broken session.
    pub(super) acknowledged: Option<u64>,
    /// How far it had reached when it was last opened, or as the store says.
    pub(super) reached: u64,
    /// Of the last line, once there was one.
    pub(super) guarantee: Option<Guarantee>,
    /// What was promised of the stream last, by this process or, as the store says, by one before it.
    pub(super) promised: Option<Guarantee>,
    /// The session ends once everything on it is acknowledged, and another begins.
    pub(super) reconnecting: bool,
    /// What S2 refused, until it is certain what landed before it.
    pub(super) refused: Option<(Parcel, Failure)>,
    /// What an earlier process sent there without hearing of it is not known.
    pub(super) unread: bool,
    /// Nothing for the pipeline's own stream.
    pub(super) routed: Option<Routed>,
}

impl Lane {
    /// A lane that is opened as soon as it is looked at. `acknowledged` is where the stream has to be
    /// read from, once anything of this store may be in it.
    pub(super) fn new(
        client: Client,
        window: Window,
        grants: Grants,
        acknowledged: Option<u64>,
        now: Instant,
    ) -> Self {
        Self {
            client,
            outbox: Outbox::new(window),
            sink: Sink::Waiting { until: now },
            reason: None,
            failures: 0,
            forbidden: Forbidden::default(),
            tokens: None,
            grants,
            others: OtherWriters::default(),
            acknowledged,
            reached: 0,
            guarantee: None,
            promised: None,
            reconnecting: false,
            refused: None,
            unread: true,
            routed: None,
        }
    }

    /// How far the stream has reached: one that ends before this has lost records.
    pub(super) fn reached(&self) -> u64 {
        self.reached.max(self.acknowledged.unwrap_or_default())
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.sink, Sink::Open(_))
    }

    /// It has to be read before anything at all is sent.
    pub(super) fn is_awaited(&self) -> bool {
        self.unread && self.routed.as_ref().is_none_or(|routed| !routed.is_shut())
    }

    /// Something of it is ready, on its way, or not yet decided.
    pub(super) fn is_busy(&self) -> bool {
        !self.outbox.is_empty() || self.refused.is_some()
    }

    /// The number of the first of its parcels that is not acknowledged or parked.
    pub(super) fn front(&self) -> Option<u64> {
        let refused = self.refused.as_ref().map(|(parcel, _)| parcel.number);
        refused.or_else(|| self.outbox.front())
    }

    /// It waits, and the time for the next attempt has come.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        matches!(self.sink, Sink::Waiting { until } if until <= now)
    }

    /// No less may be promised than this. `set` is what an operator has said. Before anything was
    /// promised of the pipeline's own stream, a 403 says what the access token may do, once it has stayed;
    /// the others have the promise of that one.
    pub(super) fn least(&self, set: Option<Guarantee>, now: Instant) -> Guarantee {
        let is_known = self.routed.is_some() || self.forbidden.stays(now);
        let found = if is_known { Guarantee::AtLeastOnce } else { Guarantee::ExactlyOnce };
        set.or(self.promised).unwrap_or(found)
    }

    /// Begins to open the line.
    pub(super) fn open(&mut self, tools: &Tools<'_>, drawn: Option<Tokens>, now: Instant) {
        let (store, client) = (tools.store.clone(), self.client.clone());
        let (pipeline_id, read_from) = (tools.pipeline_id.to_owned(), self.acknowledged);
        let reached = self.reached();
        let tokens = drawn.or_else(|| self.tokens.take());
        let (nonce, grants) = (tools.nonce, self.grants);
        let numbers = self.others.leave_numbers(now);
        let (least, promised) = (self.least(tools.guarantee, now), self.promised);
        let name = self.name();
        self.sink = Sink::Opening(Box::pin(async move {
            let tokens = match tokens {
                Some(tokens) => tokens,
                None => match store.draw_token(name.clone(), nonce).await {
                    Ok(tokens) => tokens,
                    Err(error) => return (None, Err(error.into())),
                },
            };
            let again = tokens.clone();
            let opening = Opening {
                client,
                store,
                routed: name,
                pipeline_id,
                read_from,
                reached,
                tokens,
                grants,
                least,
                promised,
                numbers,
            };
            (Some(again), establish(opening).await)
        }));
    }

    /// Sends what may go, and counts it.
    pub(super) fn send(
        &mut self,
        measures: &mut Measures,
        now: Instant,
    ) -> Result<(), crate::sink::error::Error> {
        let Sink::Open(line) = &mut self.sink else { return Ok(()) };
        if self.reconnecting {
            if !self.outbox.is_in_flight() {
                self.reconnecting = false;
                self.sink = Sink::Waiting { until: now };
                if let Some(routed) = &mut self.routed {
                    routed.since = now;
                }
            }
            return Ok(());
        }
        while let Some(records) = self.outbox.next_batch(now) {
            measures.sent_records += records.len() as u64;
            measures.sent_bytes += records.iter().map(|record| record.metered_bytes()).sum::<u64>();
            line.send(&records)?;
        }
        Ok(())
    }

    /// When it has to be looked at again, whatever else happens.
    pub(super) fn wake(&self) -> Option<Instant> {
        match &self.sink {
            Sink::Waiting { until } => Some(*until),
            // While a session ends, its acknowledgements are what is waited for.
            Sink::Open(_) if self.reconnecting => None,
            Sink::Open(_) => self.outbox.due(),
            Sink::Opening(_) => None,
        }
    }
}
