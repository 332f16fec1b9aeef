//! S2 that is put back to an older state between two processes, as from a copy of its disk.
//!
//! What S2 had acknowledged may be gone then from Postgres and from the store, too, so that nothing sends it
//! again. Whoever runs the pipeline has to be told, once that stream is used again.

use std::collections::BTreeSet;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::judge;
use super::routes::Wanted;
use super::world::{Landed, STREAM, Stage, State, World, lock};
use crate::change::Position;
use crate::mutation::{self, Rule};
use crate::sink::model::Model;

/// S2's older states.
pub(super) struct Older {
    /// How often it is put back.
    weight: f64,
    /// Messages are routed to other streams, and the pipeline's own, which a start always reads, is all
    /// that notices anything where nothing else is known.
    pub(super) wanted: Wanted,
    copy: Option<Model>,
    times: u64,
    gone: Vec<Gone>,
}

/// What one stream has lost.
struct Gone {
    stream: &'static str,
    /// Changes, with the number of the part.
    parts: BTreeSet<(Position, u32)>,
    /// How long the history was.
    since: usize,
    /// Of the next process.
    process: u64,
    opened: bool,
    told: bool,
}

impl Older {
    /// Drawn beside all else, so that other runs are what they would be without it.
    pub(super) fn draw(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed ^ 0x01de_57a7_e0f5_2000);
        // What these rules keep shows in such runs alone, and in few of them.
        let always =
            [Rule::NoticeOlderState, Rule::RememberTheEnd].into_iter().any(mutation::broken);
        let is_drawn = rng.random_bool(0.12);
        let weight = if is_drawn || always { rng.random_range(0.3..1.0) } else { 0.0 };
        let wanted = Wanted { moves: rng.random_bool(0.8), all: rng.random_bool(0.6) };
        Self { weight, wanted, copy: None, times: 0, gone: Vec::new() }
    }

    /// Whether it happens in this run.
    pub(super) fn may(&self) -> bool {
        self.weight > 0.0
    }
}

impl World {
    /// How often S2 was put back: what was on its way to it then does not arrive.
    pub(super) fn times_put_back(&self) -> u64 {
        lock(&self.older).times
    }

    /// Somebody copies S2's disk, now and then.
    pub(super) fn copy_s2(&self) {
        let (may, is_copied) = {
            let older = lock(&self.older);
            (older.may(), older.copy.is_some())
        };
        if may && self.chance(if is_copied { 0.03 } else { 0.5 }) {
            let copy = lock(&self.server).clone();
            self.note("S2 is copied", 0, 0);
            lock(&self.older).copy = Some(copy);
        }
    }

    /// S2 is put back to the copy before this process starts, perhaps.
    pub(super) fn put_back(&self, process: u64) {
        let (weight, times) = {
            let older = lock(&self.older);
            (older.weight, older.times)
        };
        let is_storm = self.stage() == Stage::Storm;
        if weight == 0.0 || times > 0 || !is_storm || !self.chance(weight) {
            return;
        }
        let Some(copy) = lock(&self.older).copy.take() else { return };
        for &stream in self.streams() {
            let (tail, now) = (copy.tail(stream), lock(&self.server).tail(stream));
            let is_there = copy.has(stream);
            if !is_there {
                self.forget(stream);
            } else if tail < now {
                self.lose_from(stream, tail, process);
            }
            self.note(&format!("{stream} is put back"), tail, now);
        }
        *lock(&self.server) = copy;
        lock(&self.older).times += 1;
        self.cut.notify_waiters();
    }

    fn lose_from(&self, stream: &'static str, tail: u64, process: u64) {
        let mut parts = BTreeSet::new();
        let mut state = self.state();
        state.decimated.insert(stream);
        state.noted.insert(stream, usize::try_from(tail).unwrap_or(usize::MAX));
        let since = state.history.len();
        let mut is_left = false;
        for landed in state.history.iter_mut().filter(|one| one.stream == stream && one.current) {
            if landed.ours.seq < tail {
                is_left |= !landed.lost;
                continue;
            }
            (landed.lost, landed.current) = (true, false);
            parts.insert((landed.ours.position, landed.ours.part));
        }
        drop(state);
        // Without a record of ours, a routed one cannot be told from one that was made anew.
        if is_left || stream == STREAM {
            let gone = Gone { stream, parts, since, process, opened: false, told: false };
            lock(&self.older).gone.push(gone);
        }
    }

    /// A process appends to a stream.
    pub(super) fn uses(&self, stream: &str, process: u64) {
        let mut older = lock(&self.older);
        for gone in older.gone.iter_mut().filter(|gone| gone.stream == stream) {
            gone.opened |= process >= gone.process;
        }
    }

    /// An operator was asked about records that are gone, and has chosen.
    pub(super) fn is_told(&self) {
        lock(&self.older).gone.iter_mut().for_each(|gone| gone.told = true);
    }

    /// In an older state, what a stream has lost by itself would be there again.
    pub(super) fn forget_copy(&self) {
        lock(&self.older).copy = None;
    }

    /// A stream is another one: what it had lost before is nobody's business.
    pub(super) fn forget_losses(&self, stream: &str) {
        lock(&self.older).gone.retain(|gone| gone.stream != stream);
    }

    /// What an older state of S2 has cost and nobody was told of; nothing where all of it came again.
    pub(super) fn untold(&self, state: &State) -> Option<String> {
        let older = lock(&self.older);
        let used = older.gone.iter().filter(|gone| gone.opened && !gone.told);
        for Gone { stream, parts, since, .. } in used {
            let after = state.history.get(*since..).unwrap_or_default();
            let is_again = |(position, part): &(Position, u32)| {
                let is_it = |landed: &Landed| {
                    landed.ours.position == *position && landed.ours.part <= *part && !landed.lost
                };
                after.iter().any(is_it) || judge::is_settled_without_record(state, *position)
            };
            if let Some((position, part)) = parts.iter().find(|one| !is_again(one)) {
                return Some(format!(
                    "part {part} of {position} was in {stream} before S2 was put back, does not come \
                     again, and nobody is told"
                ));
            }
        }
        None
    }
}
