//! What becomes of the streams in S2 beside what the pipeline sends: fenced, trimmed, deleted, shut.

use rand::RngExt as _;
use tokio::time::Instant;

use super::faults::Fault;
use super::letters;
use super::routes::{self, ROUTED};
use super::workload::Workload;
use super::world::{Landed, STREAM, World, lock};

impl World {
    /// Another program fences a stream.
    pub(super) fn fence(&self, stream: &'static str) {
        let token = format!("another-{}", self.elapsed_ms());
        if lock(&self.server).fence(stream, &token) {
            self.landed(0);
            self.note(&format!("{stream} is fenced by another program"), 0, 0);
            self.state().fenced.insert(stream);
        }
    }

    /// Lets some of a stream's records expire.
    pub(super) fn expire(&self, stream: &'static str) {
        let tail = lock(&self.server).tail(stream);
        let to = self.draw(|rng| rng.random_range(0..=tail));
        lock(&self.server).trim(stream, to);
        self.note(&format!("expired in {stream}"), to, tail);
        self.lose(stream, |landed| landed.ours.seq < to);
    }

    /// Deletes a stream, and creates it again or not.
    pub(super) fn delete(&self, stream: &'static str, again: bool) {
        if again {
            lock(&self.server).recreate(stream);
        } else {
            lock(&self.server).delete(stream);
        }
        self.note(&format!("deleted {stream}"), u64::from(again), 0);
        self.forget(stream);
    }

    /// A stream is no more, or is another one.
    pub(super) fn forget(&self, stream: &'static str) {
        self.lose(stream, |_| true);
        self.forget_losses(stream);
        let mut state = self.state();
        state.deleted.insert(stream);
        state.noted.remove(stream);
        for landed in state.history.iter_mut().filter(|landed| landed.stream == stream) {
            landed.current = false;
        }
    }

    /// Creates the streams that are not there.
    pub(super) fn create_missing(&self) {
        for &stream in self.streams() {
            lock(&self.server).create(stream);
        }
    }

    /// A stream answers nothing else for a while. Where it is the pipeline's own, changes are spilled
    /// while the others take what they have.
    pub(super) fn shut(&self, stream: &'static str) {
        const ANSWERS: [(u16, &str); 4] = [
            (403, "permission_denied"),
            (409, "stream_deletion_pending"),
            (429, "rate_limited"),
            (503, "unavailable"),
        ];
        // One that is forbidden for long would be promised less, where it is the first answer.
        let answers = if stream == STREAM { &ANSWERS[1..] } else { &ANSWERS };
        let (status, code) = self.draw(|rng| answers[rng.random_range(0..answers.len())]);
        let time =
            if self.chance(0.5) { self.between(10, 2000) } else { self.between(100, 25_000) };
        self.note(&format!("{stream} is shut: {code}"), u64::from(status), 0);
        self.state().shut.insert(stream, (status, code, Instant::now() + time));
        // What it was sent may be in it, and its answers are lost.
        if self.chance(0.5) {
            self.cut.notify_waiters();
            self.reroute();
        }
    }

    /// The stream, where it is another than the pipeline's own and is to be shut just when it has taken
    /// something, which it does not answer.
    pub(super) fn shuts_unanswered(&self, stream: &str) -> Option<&'static str> {
        let stream = routes::beside_own(stream).filter(|stream| self.is_shut(stream).is_none())?;
        self.fault(Fault::Shut, 0.1).then_some(stream)
    }

    /// Somebody routes what is in doubt to another stream, perhaps.
    pub(super) fn reroute(&self) {
        let rerouted = self.may(Fault::Reload) && self.chance(0.5);
        self.state().rerouted |= rerouted;
    }

    /// A routed stream is shut at a start: most often the one that got something last which no checkpoint
    /// covers, so that the start would have to read it. Says whether it is that one.
    pub(super) fn shut_at_start(&self) -> bool {
        let routed = &self.streams()[1..];
        if routed.is_empty() {
            return false;
        }
        let uncovered = {
            let state = self.state();
            let is_uncovered = |landed: &&Landed| {
                let is_beyond = landed.ours.position > state.store.checkpoint.position;
                landed.current && routed.contains(&landed.stream) && is_beyond
            };
            state.history.iter().rev().find(is_uncovered).map(|landed| landed.stream)
        };
        let stream = match uncovered.filter(|_| self.chance(0.7)) {
            Some(stream) => stream,
            None => self.draw(|rng| routed[rng.random_range(0..routed.len())]),
        };
        self.shut(stream);
        uncovered == Some(stream)
    }

    /// Whether the chain changes because what a stream was sent is in doubt, once.
    pub(super) fn is_rerouted(&self) -> bool {
        std::mem::take(&mut self.state().rerouted)
    }

    /// A request about a stream fails, and its process may not have read that yet.
    pub(super) fn fails_unread(&self, stream: &str, process: u64) {
        let Some(stream) = routes::beside_own(stream) else { return };
        let mut state = self.state();
        let is_read = state.sessions.contains(&(process, stream));
        state.unread_any |= !is_read && state.store.streams.contains_key(stream);
    }

    /// A process has read a stream.
    pub(super) fn has_session(&self, stream: &str, process: u64) {
        if let Some(stream) = routes::stream(stream) {
            self.state().sessions.insert((process, stream));
            self.uses(stream, process);
        }
    }

    /// What a stream answers that is shut.
    pub(super) fn is_shut(&self, stream: &str) -> Option<(u16, &'static str)> {
        let state = self.state();
        let (status, code, until) = state.shut.get(stream)?;
        (*until > Instant::now()).then_some((*status, code))
    }

    fn lose(&self, stream: &'static str, which: impl Fn(&Landed) -> bool) {
        self.forget_copy();
        let mut state = self.state();
        state.decimated.insert(stream);
        for landed in state.history.iter_mut().filter(|landed| landed.stream == stream) {
            landed.lost |= landed.current && which(landed);
        }
    }
}

pub(super) fn streams_of(workload: &Workload) -> &'static [&'static str] {
    const ALL: [&str; ROUTED.len() + 2] =
        [STREAM, ROUTED[0], ROUTED[1], ROUTED[2], letters::STREAM];
    const UNROUTED: [&str; 2] = [STREAM, letters::STREAM];
    match (workload.routes, workload.has_letter_stream()) {
        (true, true) => &ALL,
        (true, false) => &ALL[..=ROUTED.len()],
        (false, true) => &UNROUTED,
        (false, false) => &UNROUTED[..1],
    }
}
