//! What the database has to keep for us, and why: see [`wal`](crate::pipeline::wal).

use std::time::{Duration, Instant};

use super::Driver;
use crate::pipeline::control::{KeeperView, Reason};
use crate::pipeline::pressure::{Holds, Pressure};
use crate::pipeline::wal::{self, Facts, Keeper, Levels, News};

/// A reason that changes is said at most so often.
const SAID_INTERVAL: Duration = Duration::from_secs(60);

/// What was last found.
#[derive(Debug, Default)]
pub(super) struct Database {
    pub(super) pressure: Pressure,
    levels: Levels,
    keeper: Option<Keeper>,
    /// What was last said to keep WAL, and when.
    said: Option<(&'static str, Instant)>,
    danger: Option<String>,
}

impl Driver {
    /// Gathers what everything waits for.
    pub(super) fn look_at_pressure(&mut self, now: Instant) {
        let is_full = self.lanes.all().any(|(_, lane)| lane.outbox.is_full());
        let holds = if is_full || !self.lanes.own.is_open() {
            Holds::Sink
        } else if self.jobs.len() >= self.workers.jobs_max() {
            Holds::Transforms
        } else {
            Holds::Nobody
        };
        let lag = self.lag_bytes();
        self.database.pressure.look(now, holds, lag);
    }

    /// Finds out what keeps WAL, and says it where there is much of it.
    pub(super) fn look_at_wal(&mut self, reasons: &[Reason]) {
        let unconfirmed = self.lag_bytes();
        let source = self.source.status.borrow();
        let Some(slot) = &source.slot else { return };
        let Some(restart) = slot.restart_lsn else { return };
        let kept = source.wal_end.0.saturating_sub(restart.0);
        let lately = self.database.pressure.lately();
        let trouble = |reason: &Reason| (reason.part.clone(), reason.code.clone());
        let facts = Facts {
            kept,
            unconfirmed,
            open_transaction: slot.oldest.as_ref().map(|oldest| oldest.text.clone()),
            troubles: reasons.iter().map(trouble).collect(),
            is_spilling: self.spill.is_on(),
            transforms_are_busy: lately == Holds::Transforms,
            sink_is_busy: lately == Holds::Sink,
        };
        let keeper = wal::keeper(&facts);
        let danger = wal::danger(kept, slot.wal_status.as_deref(), slot.safe_wal_bytes);
        drop(source);
        let now = self.clock.now();
        let Database { levels, keeper: known, said, danger: warned, .. } = &mut self.database;
        let text = keeper.as_ref().map_or("", |keeper| &keeper.text);
        let code = keeper.as_ref().map_or("", |keeper| keeper.code);
        let mut said_now = true;
        match levels.look(kept) {
            Some(News::Rising) => tracing::warn!(
                kept_bytes = kept,
                unconfirmed_bytes = facts.unconfirmed,
                kept_by = code,
                "Postgres keeps much WAL for the slot: {text}"
            ),
            Some(News::LetGo) => {
                tracing::info!(kept_bytes = kept, "Postgres has let most of the slot's WAL go");
            }
            // What has changed is as much news as how much it is.
            None if levels.is_high()
                && said.is_some_and(|(said, at)| said != code && at + SAID_INTERVAL <= now) =>
            {
                tracing::warn!(
                    kept_bytes = kept,
                    kept_by = code,
                    "Postgres keeps much WAL for another reason now: {text}"
                );
            }
            None => said_now = false,
        }
        if said_now {
            *said = Some((code, now));
        }
        // Its numbers move with each look.
        if let (Some(danger), None) = (&danger, &warned) {
            tracing::error!(kept_bytes = kept, kept_by = code, "{danger}");
        }
        *known = keeper;
        *warned = danger;
    }

    pub(super) fn keeper_view(&self) -> Option<KeeperView> {
        let Keeper { code, text } = self.database.keeper.clone()?;
        Some(KeeperView { code: code.to_owned(), text })
    }

    /// One sentence while Postgres may drop the slot's WAL.
    pub(super) fn slot_warning(&self) -> Option<String> {
        self.database.danger.clone()
    }
}
