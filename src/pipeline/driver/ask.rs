//! Requests of operators, and the status that everybody reads.

use super::{Driver, PAYLOAD_BYTES_MAX, Selected};
use crate::case::{Case, CaseTransform};
use crate::change::Lsn;
use crate::message::{Draft, Envelope};
use crate::pipeline::control;
use crate::pipeline::control::{Changed, Reason, Request, Status};
use crate::pipeline::holds::MessageId;
use crate::pipeline::measures::Measures;
use crate::policy;
use crate::sink::Guarantee;
use crate::store::{Store, Stored, Write};
use crate::transform::Chain;
use std::collections::HashSet;
use std::sync::Arc;

impl Driver {
    pub(super) fn on_request(&mut self, request: Request) {
        let store = self.store.clone();
        match request {
            Request::List(query, answer) => {
                store.list(query, self.holds.moving().collect(), answer);
            }
            Request::Show(id, answer) => {
                let moving = self.holds.moving().collect();
                let envelope = Arc::clone(&self.envelope);
                tokio::spawn(async move {
                    drop(answer.send(show(&store, id, moving, envelope).await));
                });
            }
            Request::Export(id, answer) => {
                let moving = self.holds.moving().collect();
                let (envelope, chain) = (Arc::clone(&self.envelope), Arc::clone(&self.chain));
                tokio::spawn(async move {
                    let stored = store.show(id, moving).await;
                    let case = stored.map(|stored| Box::new(case(stored, &envelope, &chain)));
                    drop(answer.send(case));
                });
            }
            Request::Retry(filter, answer) => {
                self.end_halt();
                let selected = self.selected.clone();
                tokio::spawn(async move {
                    match store.select(filter.clone()).await {
                        Ok(ids) => drop(selected.send(Selected::Retry(ids, filter, answer))),
                        Err(error) => drop(answer.send(Err(error))),
                    }
                });
            }
            Request::Acknowledge(filter, answer) => {
                let selected = self.selected.clone();
                tokio::spawn(async move {
                    let ids = match store.select(filter).await {
                        Ok(ids) => ids,
                        Err(error) => return drop(answer.send(Err(error))),
                    };
                    match store.unchanged_behind(ids.clone()).await {
                        Ok(behind) => {
                            drop(selected.send(Selected::Acknowledge(ids, behind, answer)));
                        }
                        Err(error) => {
                            drop(answer.send(Err(control::Error::Store(Box::new(error)))));
                        }
                    }
                });
            }
        }
    }

    pub(super) fn on_selected(&mut self, selected: Selected) {
        match selected {
            Selected::Retry(ids, filter, answer) => {
                let one = filter.id;
                let ids: Vec<u64> =
                    ids.into_iter().filter(|id| self.holds.has_failed(*id)).collect();
                if let (Some(id), true) = (one, ids.is_empty()) {
                    let text = format!(
                        "message {id} has not failed: it waits for the one in front of it, and follows \
                         by itself"
                    );
                    drop(answer.send(Err(control::Error::Invalid { text })));
                    return;
                }
                self.reprieve(ids.iter().copied());
                let changed = ids.iter().filter(|id| self.holds.request(**id)).count() as u64;
                drop(answer.send(Ok(Changed { changed, unchanged_behind: 0 })));
            }
            Selected::Acknowledge(ids, unchanged_behind, answer) => {
                if let Some(id) = ids.iter().copied().find(|id| self.dead.is_in_doubt(*id)) {
                    let text = format!(
                        "message {id} may be in the dead letters' file already; it leaves the store by \
                         itself once that can be written (`sluicebox check` says why it cannot)"
                    );
                    drop(answer.send(Err(control::Error::Invalid { text })));
                    return;
                }
                if let Some(id) = ids.iter().copied().find(|id| self.may_have_landed(*id)) {
                    if self.lanes.all().any(|(_, lane)| lane.failures > 0) {
                        drop(answer.send(Err(control::Error::Unread { id })));
                    } else {
                        self.undecided.push(Selected::Acknowledge(ids, unchanged_behind, answer));
                    }
                    return;
                }
                // Others have been delivered since they were chosen.
                let one = (ids.len() == 1).then(|| ids[0]);
                let ids: Vec<u64> = ids.into_iter().filter(|id| self.holds.has(*id)).collect();
                if let (Some(id), true) = (one, ids.is_empty()) {
                    drop(answer.send(Err(control::Error::NotFound { id })));
                    return;
                }
                let (idle, busy): (Vec<u64>, Vec<u64>) =
                    ids.into_iter().partition(|id| self.holds.is_idle(*id));
                if let (Some(&id), true) = (busy.first(), idle.is_empty()) {
                    drop(answer.send(Err(control::Error::Busy { id })));
                    return;
                }
                for &id in &idle {
                    tracing::warn!(id, "given up by an operator; it is not delivered");
                    self.holds.remove(id);
                    self.parked_for_none(id);
                    self.attempts.remove(&id);
                    self.parts.forget(id);
                    self.dead.given_up(id);
                    self.classes.gone(&mut self.measures, id);
                    self.writes.push(Write::Acknowledge { id });
                }
                // A restart before that would try them again, behind what had waited for them.
                if !idle.is_empty() {
                    self.write_down_first();
                }
                let changed = Changed { changed: idle.len() as u64, unchanged_behind };
                if idle.is_empty() {
                    drop(answer.send(Ok(changed)));
                } else {
                    self.effects.answers.push((answer, changed));
                }
            }
        }
    }

    /// Whether a stored message may be in a stream without our knowing: after a restart, until each stream
    /// was read, and where it was on its way when spilling began or when its stream was shut. Giving it up then would deny what consumers have.
    fn may_have_landed(&self, id: MessageId) -> bool {
        let is_open = self.lanes.own.is_open();
        let position = self.holds.position(id);
        !self.established
            || position.is_some_and(|position| self.is_in_doubt(position))
            || self.spill.is_on() && !is_open && self.holds.is_gated(id)
    }

    /// Who waits for S2 to be read is answered: it was, or it cannot be now.
    pub(super) fn decide(&mut self) {
        for selected in std::mem::take(&mut self.undecided) {
            self.on_selected(selected);
        }
    }

    /// Why the process is not ready.
    fn reasons(&self) -> impl Iterator<Item = Reason> {
        [
            self.source_reason.as_ref(),
            self.lanes.own.reason.as_ref(),
            self.store_reason.as_ref(),
            self.unreadable_reason.as_ref(),
            self.spill.reason(),
            self.halt_reason(),
        ]
        .into_iter()
        .chain(
            self.lanes
                .routed()
                .filter(|(_, lane)| lane.is_awaited())
                .map(|(_, lane)| lane.reason.as_ref()),
        )
        .flatten()
        .cloned()
        .chain(self.unowned_reason())
        .chain(self.stuck_reasons())
    }

    /// Whoever waits for the process to be ready is not kept until the next tick.
    pub(super) fn publish_readiness(&mut self) {
        let was_ready = self.status.borrow().ready;
        if !was_ready && self.reasons().next().is_none() {
            self.publish_status();
        }
    }

    pub(super) fn publish_status(&mut self) {
        let counts = self.holds.counts();
        let source = self.source.status.borrow().clone();
        let confirmed = self.confirmed();
        let reasons: Vec<Reason> = self.reasons().collect();
        self.say_unowned();
        self.look_at_wal(&reasons);
        let (spilled_changes, spilled_bytes) = self.spill.size();
        let slot = source.slot.as_ref();
        let warnings = source.warnings.iter().cloned();
        let warnings = warnings.chain(self.slot_warning()).chain(self.store_warning());
        let warnings = warnings.chain(self.dead_letters_warning());
        let warnings = warnings.chain(self.failing_warning()).collect();
        let status = Status {
            ready: reasons.is_empty(),
            reasons,
            guarantee: self.lanes.own.guarantee.map_or("", Guarantee::sentence).to_owned(),
            endpoint: self.lanes.own.client.place().endpoint.clone(),
            pipeline_id: self.pipeline_id.clone(),
            chain: self.chain.tag(),
            changes: self.counters.changes,
            records: self.counters.records,
            record_bytes: self.counters.record_bytes,
            dropped: self.counters.dropped,
            parked: counts.parked,
            retrying: counts.retrying,
            waiting: counts.waiting,
            wal_end: (source.wal_end > Lsn(0)).then(|| source.wal_end.to_string()),
            confirmed: (confirmed > Lsn(0)).then(|| confirmed.to_string()),
            lag_bytes: (confirmed > Lsn(0)).then(|| source.wal_end.0.saturating_sub(confirmed.0)),
            stream_tail: self.lanes.own.acknowledged,
            streams: self.stream_views(),
            dead_letters: self.dead_letters_view(),
            spilled_changes,
            spilled_bytes,
            store_bytes: self.store.bytes(),
            store_bytes_max: self.settings.bounds.store_bytes_max,
            wal_kept_bytes: slot
                .and_then(|slot| slot.restart_lsn)
                .map(|lsn| source.wal_end.0.saturating_sub(lsn.0)),
            wal_status: slot.and_then(|slot| slot.wal_status.clone()),
            wal_safe_bytes: slot.and_then(|slot| slot.safe_wal_bytes),
            wal_kept_by: self.keeper_view(),
            oldest_transaction_seconds: slot
                .and_then(|slot| slot.oldest.as_ref())
                .map(|oldest| oldest.seconds),
            warnings,
            stuck: self.stuck_views(),
            sink_sessions: self.counters.sink_sessions,
            source_connections: source.connections,
            measures: Measures {
                in_flight_bytes: self.budget.bytes_out() as u64,
                in_flight_bytes_max: self.budget.bytes_max() as u64,
                ..self.measures.clone()
            },
        };
        self.status.send_if_modified(|published| {
            let changed = *published != status;
            if changed {
                *published = status;
            }
            changed
        });
    }
}

async fn show(
    store: &Store,
    id: MessageId,
    moving: HashSet<u64>,
    envelope: Arc<Envelope>,
) -> Result<control::MessageDetail, control::Error> {
    let stored = store.show(id, moving).await?;
    let hint = policy::hint(&stored.message.id, stored.failure.as_ref());
    let draft = Draft::new(stored.change, envelope);
    let (payload, payload_cut) =
        draft.message_preview(PAYLOAD_BYTES_MAX).unwrap_or_else(|error| (error.to_string(), true));
    Ok(control::MessageDetail {
        message: stored.message,
        payload,
        payload_cut,
        trace: stored.failure.map(|failure| failure.trace).unwrap_or_default(),
        hint,
        holds: stored.holds,
    })
}

fn case(stored: Stored, envelope: &Envelope, chain: &Chain) -> Case {
    let modules = chain.files().zip(chain.digests()).zip(chain.settings_texts());
    let transform = |((file, digest), settings): ((&str, &str), Option<&str>)| CaseTransform {
        file: file.to_owned(),
        digest: digest.to_owned(),
        settings: settings.map(str::to_owned),
    };
    let transforms = modules.map(transform).collect();
    let Stored { message, change, failure, .. } = stored;
    Case::new(message.id, &change, failure, envelope.settings(), transforms)
}
