//! Messages whose attempts are spent become dead letters.
//!
//! ```text
//!   fails once too often ─▶ spent ─▶ read from the store ─▶ written as a letter ─▶ handed on ─▶ gone
//!                            ▲ │                                      │
//!                            │ └── a new chain, or an operator: tried once more
//!                            └──── its place cannot take it: it stays parked, and this is said
//! ```
//!
//! - A message is *spent* when so many attempts have failed for what it is itself. Whether it is follows
//!   from what the store counts and from the settings, so that a restart knows it.
//! - To a stream it goes as a message does that transforms route there: by a lane, exactly once, and in
//!   the order of its group, whose next message is sent only once the letter is acknowledged. To a file
//!   it goes before anything of its group moves: the message stays busy until the line is synced.
//! - It leaves the store in a transaction of its own kind, which counts it, remembers what it was, and
//!   leaves its position until the checkpoint has passed that.
//! - A letter that may be in a stream without an answer is looked for there like everything else
//!   ([`Doubts`](super::routed::Doubts)); one that may be in the file is found there by its key.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::{Driver, Error, Pending};
use crate::change::Position;
use crate::config::{DeadLetters, LetterPlace};
use crate::message::{header, idempotency_key};
use crate::mutation::{self, Rule};
use crate::pipeline::control::DeadLettersView;
use crate::pipeline::dead_letter::Letter;
use crate::pipeline::dead_letter::file::Appended;
use crate::pipeline::dead_letter::writer::Written;
use crate::pipeline::holds::{Due, MessageId};
use crate::pipeline::item::{Item, Origin};
use crate::pipeline::outbox::Parcel;
use crate::pipeline::place::LaneId;
use crate::pipeline::size_gate::SizedRecord;
use crate::policy;
use crate::sink::session::BatchMeter;
use crate::store::{Attempts, Failure, LetterFile, Loaded, Message, Write};

/// What is written, and what became of it.
type Work = Pending<Result<Written, String>>;

/// What is spent, and how it goes on.
pub(super) struct Dead {
    settings: Option<DeadLetters>,
    spent: HashSet<MessageId>,
    /// Of these, those of which the store does not know it yet: no letter is written before, since a
    /// restart would try them once more.
    unsaid: HashSet<MessageId>,
    /// Of these, those that are to be tried once more and were on their way as letters then.
    again: HashSet<MessageId>,
    /// Read, in order, and not yet written as letters.
    waiting: Vec<Letter>,
    work: Option<Work>,
    /// Those that are at work, with what they take.
    at_work: HashMap<MessageId, usize>,
    /// In the file perhaps: it failed in the middle.
    in_doubt: HashSet<MessageId>,
    /// Letters that were found in a stream, or handed on just now.
    there: HashSet<Position>,
    file_end: u64,
    failures: u64,
    reason: Option<String>,
    written: u64,
}

impl Dead {
    pub(super) fn new(settings: Option<DeadLetters>, loaded: &Loaded) -> Self {
        let known = |path: &std::path::Path| {
            let file = loaded.letter_file.as_ref();
            file.filter(|file| *file.path == *path.to_string_lossy()).map_or(0, |file| file.end)
        };
        let file_end = match settings.as_ref().map(|settings| &settings.place) {
            Some(LetterPlace::File(path)) => known(path),
            Some(LetterPlace::Stream(_)) | None => 0,
        };
        Self {
            settings,
            spent: HashSet::new(),
            unsaid: HashSet::new(),
            again: HashSet::new(),
            waiting: Vec::new(),
            work: None,
            at_work: HashMap::new(),
            in_doubt: HashSet::new(),
            there: HashSet::new(),
            file_end,
            failures: 0,
            reason: None,
            written: loaded.dead_letters,
        }
    }

    /// How many attempts a message has.
    pub(super) fn attempts_max(&self) -> Option<u64> {
        self.settings.as_ref().map(|settings| settings.max_attempts)
    }

    /// Whether a message that an earlier run has left is spent. It is noted.
    pub(super) fn is_left_spent(&mut self, id: MessageId, class: &str, attempts: Attempts) -> bool {
        let own = policy::outcomes::of_message(class).own;
        let spent = own && self.attempts_max().is_some_and(|max| attempts.own >= max);
        if spent {
            self.spent.insert(id);
            // Nobody has looked into the file.
            if self.is_file() && !mutation::broken(Rule::DoubtTheLetter) {
                self.in_doubt.insert(id);
            }
        }
        spent
    }

    pub(super) fn spend(&mut self, id: MessageId) {
        self.spent.insert(id);
        self.unsaid.insert(id);
    }

    /// Its letter waits until its last failure is on disk.
    pub(super) fn is_unsaid(&self, id: MessageId) -> bool {
        self.unsaid.contains(&id)
    }

    /// That is on disk.
    pub(super) fn is_said(&mut self, id: MessageId) {
        self.unsaid.remove(&id);
    }

    pub(super) fn is_spent(&self, id: MessageId) -> bool {
        self.spent.contains(&id)
    }

    /// Nothing of it is in memory.
    pub(super) fn is_idle(&self) -> bool {
        self.work.is_none() && self.waiting.is_empty()
    }

    fn stream(&self) -> Option<&Arc<str>> {
        match &self.settings.as_ref()?.place {
            LetterPlace::Stream(name) => Some(name),
            LetterPlace::File(_) => None,
        }
    }

    fn is_file(&self) -> bool {
        let place = self.settings.as_ref().map(|settings| &settings.place);
        matches!(place, Some(LetterPlace::File(_)))
    }

    /// Whether records go where letters go.
    pub(super) fn is_stream(&self, stream: Option<&Arc<str>>) -> bool {
        stream.is_some() && stream == self.stream()
    }

    /// These messages of the store are in a stream.
    fn found(&mut self, letters: impl Iterator<Item = Position>) {
        self.there.extend(letters);
    }

    /// A message leaves the store. Says whether as a dead letter.
    pub(super) fn leaves(&mut self, id: MessageId, position: Option<Position>) -> bool {
        self.spent.remove(&id);
        self.unsaid.remove(&id);
        self.again.remove(&id);
        self.in_doubt.remove(&id);
        position.is_some_and(|position| self.there.remove(&position))
    }

    /// An operator has given it up.
    pub(super) fn given_up(&mut self, id: MessageId) {
        self.spent.remove(&id);
        self.unsaid.remove(&id);
        self.again.remove(&id);
    }

    /// Its letter may be in the file.
    pub(super) fn is_in_doubt(&self, id: MessageId) -> bool {
        self.in_doubt.contains(&id)
    }

    pub(super) fn count(&mut self) {
        self.written += 1;
    }

    /// Without any message, nothing is known of one.
    #[cfg(test)]
    pub(super) fn assert_empty(&self) {
        let Self { spent, unsaid, again, in_doubt, at_work, there, .. } = self;
        assert!(
            [spent, unsaid, again, in_doubt].iter().all(|ids| ids.is_empty()),
            "at rest, {spent:?} are spent, {unsaid:?} unsaid, {again:?} tried once more, \
             {in_doubt:?} in doubt"
        );
        assert!(at_work.is_empty(), "at rest, {at_work:?} are at work");
        assert!(there.is_empty(), "at rest, {there:?} are there as letters");
    }
}

/// What comes of the letters that are at work.
pub(super) async fn written(dead: &mut Dead) -> Result<Written, String> {
    match &mut dead.work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}

impl Driver {
    /// A spent message was read: its letter is written, or what was written of it goes on.
    pub(super) fn on_spent_read(&mut self, message: Message) -> Result<(), Error> {
        let failure = message.failure()?;
        let Message { id, change, parts, .. } = message;
        let item = Item { change, origin: Origin::Store { id } };
        if let Some(landed) = self.found_landed(&item) {
            self.on_found(&item, landed);
            return Ok(());
        }
        if self.dead.is_unsaid(id) {
            self.off_the_way(&item);
            self.holds.back(id, true, Due::OnRequest);
            self.is_back(id);
            return Ok(());
        }
        match parts {
            Some(parts) if self.dead.is_stream(parts.stream.as_ref()) => {
                self.forward_parts(item, parts)
            }
            // It may be delivered. What goes to a stream is looked up once more on its way there.
            _ if self.dead.stream().is_none()
                && let Some((lane, failure)) = self.doubtful(&item) =>
            {
                self.letter_waits(&item, lane, &failure);
                Ok(())
            }
            _ => {
                let attempts = self.attempts.get(&id).copied().unwrap_or_default().all;
                let at = jiff::Timestamp::try_from(self.clock.time_of_day());
                let at = at.map_or_else(|_| String::new(), |at| at.to_string());
                let letter = Letter { message: id, change: item.change, failure, attempts, at };
                self.dead.waiting.push(letter);
                self.write_letters();
                Ok(())
            }
        }
    }

    /// Has letters written.
    fn write_letters(&mut self) {
        let Some(settings) = &self.dead.settings else { return };
        if self.dead.work.is_some() || self.dead.waiting.is_empty() {
            return;
        }
        let some = self.dead.waiting.len().min(self.settings.portions.letters);
        let rest = self.dead.waiting.split_off(some);
        let letters = std::mem::replace(&mut self.dead.waiting, rest);
        let (envelope, chain) = (Arc::clone(&self.envelope), Arc::clone(&self.chain));
        let (place, known) = (settings.place.clone(), self.dead.file_end);
        let is_file = matches!(place, LetterPlace::File(_));
        let (at_work, written) = self.letters.write(letters, place, known, envelope, chain);
        if is_file {
            self.dead.in_doubt.extend(at_work.keys());
        }
        self.dead.at_work = at_work;
        self.dead.work = Some(Box::pin(written));
    }

    pub(super) fn on_letters(&mut self, done: Result<Written, String>) {
        self.dead.work = None;
        let at_work = std::mem::take(&mut self.dead.at_work);
        match done {
            Ok(Written::Records(letters)) => {
                for (letter, records) in letters {
                    let item = Item {
                        change: letter.change,
                        origin: Origin::Store { id: letter.message },
                    };
                    self.forward_letter(item, records);
                }
            }
            Ok(Written::InFile(letters, appended)) => {
                self.letters_go();
                for letter in letters {
                    self.retry_bytes = self.retry_bytes.saturating_sub(letter.change.bytes());
                    self.handed_on(letter.message);
                }
                let end = self.known_end(appended);
                self.dead.file_end = end;
                if let Some(LetterPlace::File(path)) =
                    self.dead.settings.as_ref().map(|settings| &settings.place)
                {
                    let path = path.to_string_lossy().into_owned();
                    self.writes.push(Write::LetterFile(LetterFile { path, end }));
                }
            }
            Err(text) => {
                self.dead.failures += 1;
                self.letters_wait(text);
                let delay = policy::STORE.delay(self.dead.failures, &mut self.rng);
                let at = self.clock.now() + delay;
                for (id, bytes) in at_work {
                    self.retry_bytes = self.retry_bytes.saturating_sub(bytes);
                    self.holds.back(id, true, Due::At(at));
                    self.is_back(id);
                }
            }
        }
        self.write_letters();
    }

    /// Up to where the file is known: not beyond a letter whose message is still here, and that has to be
    /// found there.
    fn known_end(&self, appended: Appended) -> u64 {
        let Appended { end, others } = appended;
        if others.is_empty() || mutation::broken(Rule::FindTheLetter) {
            return end;
        }
        let stored: HashSet<String> =
            self.holds.positions().map(|(position, _)| idempotency_key(position)).collect();
        let still_here = others.into_iter().filter(|(key, _)| stored.contains(key));
        still_here.map(|(_, at)| at).min().unwrap_or(end)
    }

    /// Hands a letter to its stream, or has it stored first where it takes more than one batch.
    fn forward_letter(&mut self, item: Item, records: Vec<SizedRecord>) {
        let Origin::Store { id } = item.origin else { return };
        if self.holds.is_held(id) {
            self.off_the_way(&item);
            self.holds.back(id, false, Due::Now);
        } else if let Some(landed) = self.found_landed(&item) {
            self.on_found(&item, landed);
        } else if BatchMeter::holds(&records) {
            self.forward_parcel(Parcel::new(item, records));
        } else {
            self.store_parts(item, records);
        }
    }

    /// A stream has been read, which holds these as letters.
    pub(super) fn on_letters_found(&mut self, letters: &HashSet<Position>) {
        if letters.is_empty() {
            return;
        }
        let stored = self.holds.positions().map(|(position, _)| position);
        self.dead.found(stored.filter(|position| letters.contains(position)));
    }

    /// A letter cannot go to its stream for now: it stays parked for what it was parked for.
    pub(super) fn letter_waits(&mut self, item: &Item, lane: LaneId, failure: &Failure) {
        let Origin::Store { id } = item.origin else { return };
        self.off_the_way(item);
        self.letters_wait(failure.error.text.clone());
        // It is asked for as soon as its stream is back.
        self.holds.back(id, true, Due::At(self.clock.now() + self.settings.retry.max));
        self.parked_for(lane, id);
        self.is_back(id);
    }

    /// A letter was not handed on: its message is tried once more, if somebody wanted that meanwhile.
    pub(super) fn is_back(&mut self, id: MessageId) {
        if self.dead.again.remove(&id) {
            self.reprieve([id]);
            self.holds.request(id);
        }
    }

    fn letters_wait(&mut self, text: String) {
        if self.dead.reason.as_ref() != Some(&text) {
            tracing::error!(
                reason = text,
                "dead letters cannot be handed on; their messages stay parked"
            );
        }
        self.dead.reason = Some(text);
    }

    fn letters_go(&mut self) {
        self.dead.failures = 0;
        if self.dead.reason.take().is_some() {
            tracing::info!("dead letters can be handed on again");
        }
    }

    /// A letter is where it belongs.
    pub(super) fn handed_on(&mut self, id: MessageId) {
        self.letters_go();
        if let Some(position) = self.holds.position(id) {
            self.dead.there.insert(position);
        }
        self.forget(id);
        self.delivered = true;
    }

    /// Another chain has come, or an operator asks: what is spent has one more attempt, unless its letter
    /// may be there already.
    pub(super) fn reprieve(&mut self, ids: impl IntoIterator<Item = MessageId>) {
        for id in ids {
            if !self.dead.spent.contains(&id) {
                continue;
            }
            if !self.holds.is_idle(id) {
                self.dead.again.insert(id);
                continue;
            }
            let is_begun = self.letter_is_begun(id);
            let position = self.holds.position(id);
            let in_doubt = position.is_some_and(|position| self.is_in_doubt(position));
            let may_be_there = is_begun || in_doubt || self.dead.in_doubt.contains(&id);
            if !may_be_there && self.established {
                self.dead.spent.remove(&id);
                self.dead.unsaid.remove(&id);
                self.shape_anew(id);
            }
        }
    }

    pub(super) fn reprieve_all(&mut self) {
        let spent: Vec<MessageId> = self.dead.spent.iter().copied().collect();
        self.reprieve(spent);
    }

    pub(super) fn dead_letters_view(&self) -> Option<DeadLettersView> {
        let settings = self.dead.settings.as_ref()?;
        let waiting = self.dead.spent.len() as u64;
        Some(DeadLettersView {
            place: settings.place.to_string(),
            written: self.dead.written,
            waiting,
            reason: self.dead.reason.clone().filter(|_| waiting > 0),
        })
    }

    /// One sentence while dead letters cannot be handed on.
    pub(super) fn dead_letters_warning(&self) -> Option<String> {
        let view = self.dead_letters_view()?;
        let DeadLettersView { place, waiting, reason: Some(reason), .. } = view else {
            return None;
        };
        Some(format!(
            "{waiting} messages have spent their attempts and cannot go to {place}, so that they stay \
             parked: {reason}"
        ))
    }

    pub(super) fn log_dead_letter(&self, id: MessageId, position: Option<Position>) {
        let place = self.dead.settings.as_ref().map(|settings| settings.place.to_string());
        tracing::warn!(
            id,
            position = position.map(|position| position.to_string()),
            place,
            "became a dead letter: its attempts were spent"
        );
    }
}

/// A parcel is a letter, and not what a chain makes of its message. No transform can set that header.
pub(super) fn is_letter(parcel: &Parcel) -> bool {
    let name = header::DEAD_LETTER.as_bytes();
    matches!(parcel.item.origin, Origin::Store { .. })
        && parcel
            .records
            .first()
            .is_some_and(|first| first.record().headers.iter().any(|header| header.name == name))
}
