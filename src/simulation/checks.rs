//! What holds at every moment: looked at when a record lands, when a transaction of the store is carried
//! out, and when Postgres is told what it may forget.

use super::judge::{self, Ours};
use super::letters;
use super::workload::{Planned, Workload};
use super::world::{Landed, STREAM, State, World, lock};
use crate::change::Position;
use crate::store::Write;

impl State {
    /// A record of ours is where it belongs.
    fn lands(&mut self, ours: Ours, stream: &'static str, process: u64) {
        if ours.is_last() {
            self.landed.insert(ours.position);
            if ours.letter {
                self.letters.insert(ours.position);
            }
        }
        let again = process < self.store_since && ours.position.commit_lsn.0 >= self.lost_at;
        let is_open = self.sessions.iter().any(|(by, of)| *by >= self.store_since && *of == stream);
        let unasked = process < self.store_since && !is_open;
        let (lost, current) = (false, true);
        self.history.push(Landed { ours, stream, process, lost, current, again, unasked });
    }

    /// A change that goes before this one in one of its rows, and that a restart would still send.
    fn is_due_before(&self, workload: &Workload, position: Position) -> Option<Position> {
        let keys = &workload.planned(position).filter(|_| !self.landed.contains(&position))?.keys;
        let is_settled = |planned: &Planned| {
            let at = planned.change.position;
            let is_skipped = self.excused.contains(&at) && at <= self.store.checkpoint.position;
            self.landed.contains(&at)
                || self.dropped.contains(&at)
                || self.store.given_up.contains_key(&at)
                || self.abandoned.contains(&at)
                || is_skipped
        };
        let mut before =
            workload.changes().take_while(|planned| planned.change.position < position);
        let due = before.find(|planned| {
            planned.keys.iter().any(|key| keys.contains(key)) && !is_settled(planned)
        })?;
        Some(due.change.position)
    }
}

impl World {
    /// Notes what is new in the streams, and that this process sent it.
    pub(super) fn landed(&self, process: u64) {
        let mut state = self.state();
        if let Some(stream) = lock(&self.server).unguarded.take() {
            let text = format!("a batch went to {stream} without a fencing token");
            state.violation.get_or_insert(text);
        }
        let mut landed = Vec::new();
        for &stream in self.streams() {
            let noted = state.noted.get(stream).copied().unwrap_or_default();
            let new = lock(&self.server).records(stream, noted);
            if !new.is_empty() && state.strangers.contains(&process) {
                let text = format!("process {process} with another folder wrote to {stream}");
                state.violation.get_or_insert(text);
            }
            state.noted.insert(stream, noted + new.len());
            let ours = new.iter().filter_map(judge::ours).next();
            if let Some(ours) = ours
                && stream != STREAM
                && process >= state.store_since
                && !state.store.streams.contains_key(stream)
            {
                let text = format!(
                    "{} landed in {stream}, and the store does not know that anything may be there",
                    ours.position
                );
                state.violation.get_or_insert(text);
            }
            for ours in new.iter().filter_map(judge::ours) {
                let is_ours = process >= state.store_since;
                if let Some(before) = state.is_due_before(&self.workload, ours.position)
                    && is_ours
                {
                    let text = format!(
                        "{} landed in {stream}, and a restart would send {before} behind it",
                        ours.position
                    );
                    state.violation.get_or_insert(text);
                }
                let is_stored = || state.store.has_part(ours.position, ours.part);
                if self.is_in_portions(&ours) && is_ours && !is_stored() {
                    let text = format!(
                        "part {} of {} landed in {stream}, and is not in the store",
                        ours.part, ours.position
                    );
                    state.violation.get_or_insert(text);
                }
                landed.push((ours.position, stream, ours.seq));
                state.lands(ours, stream, process);
            }
        }
        drop(state);
        for (position, stream, seq) in landed {
            let text = format!("landed {position} in {stream} by {process}");
            self.note(&text, position.index, seq);
        }
    }

    /// Notes what is new in the file of dead letters, and that this process wrote it.
    pub(super) fn filed(&self, process: u64) {
        let mut state = self.state();
        for news in state.paper.news() {
            let wrong = match &news {
                _ if state.strangers.contains(&process) => {
                    Some(format!("process {process} with another folder wrote dead letters"))
                }
                Ok(_) => None,
                Err(text) => Some(text.clone()),
            };
            if let Some(text) = wrong {
                state.violation.get_or_insert(text);
            }
            if let Ok(ours) = news {
                state.lands(ours, letters::FILE, process);
            }
        }
        drop(state);
        self.note("filed", process, 0);
    }

    /// An operator decides that what is committed by now and not covered by a checkpoint is taken as
    /// delivered, except for what the store holds.
    pub(super) fn excuse(&self) {
        let (count, _) = self.workload.committed(self.elapsed_ms());
        let mut state = self.state();
        let checkpoint = state.store.checkpoint.position;
        let transactions = &self.workload.transactions[..count];
        let planned = transactions.iter().flat_map(|transaction| &transaction.changes);
        let is_held = |position| state.store.messages.values().any(|held| *held == position);
        // Of the pipeline's own stream this is decided when a change is read, before it is known where it
        // goes; of another one when it is about to go there, out of the spill too.
        let is_meant = |planned: &&Planned| {
            let position = planned.change.position;
            let is_gone = |stream| state.decimated.contains(stream);
            let read = is_gone(STREAM) && !state.store.holds(position);
            let routed = planned.route.streams().any(is_gone) && !is_held(position);
            position > checkpoint && (read || routed)
        };
        let excused: Vec<Position> =
            planned.filter(is_meant).map(|planned| planned.change.position).collect();
        state.excused.extend(excused);
    }

    /// A transaction of a process was carried out.
    pub(super) fn carried_out(&self, writes: &[Write], process: u64) {
        let mut state = self.state();
        let State { store, history, dropped, excused, deleted, letters, store_since, .. } =
            &mut *state;
        let untold = writes.iter().find_map(|write| {
            let Write::DeadLetter { id } = write else { return None };
            store.messages.get(id).filter(|position| !letters.contains(*position)).copied()
        });
        let text = store.carry_out(writes, (history.len(), process));
        let from_here: Vec<&Landed> =
            history.iter().filter(|landed| landed.process >= *store_since).collect();
        let unaccounted =
            store.unaccounted(&self.workload, history, &from_here, dropped, excused, deleted);
        let too_much = store.spilled_bytes() > self.spilled_bytes_max();
        let spilled = store.spilled_bytes();
        drop(state);
        self.note(&format!("stored by {process}:{text}"), writes.len() as u64, 0);
        if let Some(text) = unaccounted {
            self.violated(text);
        }
        if let Some(position) = untold {
            self.violated(format!("{position} left the store as a dead letter, which is nowhere"));
        }
        if too_much {
            self.violated(format!("{spilled} bytes are spilled, and that is beyond the bound"));
        }
    }

    /// A transaction of a process that woke up was carried out on a store that is lost. Until it is fenced
    /// out, it sends, and in the order that its own store keeps.
    pub(super) fn held_by_lost(&self, writes: &[Write]) {
        let held = writes.iter().filter_map(|write| {
            let Write::Insert { change, .. } = write else { return None };
            Some(change.position)
        });
        self.state().store.ever.extend(held);
    }

    /// Postgres is told that it may forget everything before this.
    pub(super) fn confirm(&self, lsn: u64, process: u64) {
        let mut state = self.state();
        if lsn <= state.confirmed {
            return;
        }
        state.confirmed = lsn;
        let durable = state.store.checkpoint.confirm.0;
        let mut unsafe_at = None;
        while let Some(transaction) = self.workload.transactions.get(state.checked) {
            if transaction.commit_lsn >= lsn {
                break;
            }
            state.checked += 1;
            for planned in &transaction.changes {
                let position = planned.change.position;
                let is_safe = state.landed.contains(&position)
                    || state.store.holds(position)
                    || state.store.given_up.contains_key(&position)
                    || state.dropped.contains(&position)
                    || state.excused.contains(&position);
                if !is_safe {
                    unsafe_at = Some(position);
                }
            }
        }
        drop(state);
        if let Some(position) = unsafe_at {
            self.violated(format!(
                "Postgres was told to forget everything before {lsn}, and {position} is neither in \
                 the stream nor in the store"
            ));
        }
        if durable < lsn {
            self.violated(format!(
                "Postgres was told by process {process} to forget everything before {lsn}, and the \
                 checkpoint on disk says {durable}"
            ));
        }
        self.event("confirmed", lsn, 0);
    }

    /// Whether a record is of a change that no batch holds.
    pub(super) fn is_in_portions(&self, ours: &Ours) -> bool {
        ours.parts as usize > self.workload.limits.batch_records
    }

    /// What may be spilled at most: at the bound nothing more is read, but what was read by then is.
    fn spilled_bytes_max(&self) -> usize {
        let in_memory = self.workload.budget_bytes.max(self.workload.change_bytes_max());
        let bound = usize::try_from(self.workload.bounds.spill_bytes_max).unwrap_or(usize::MAX);
        bound.saturating_add(2 * in_memory)
    }
}
