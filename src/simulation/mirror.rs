//! What the store holds, told by the transactions that it carried out, and whether a restart from it
//! would lose or repeat anything.

use std::collections::{BTreeMap, BTreeSet};

use super::letters;
use super::routes::stream;
use super::workload::Workload;
use super::world::{Landed, STREAM};
use crate::change::Position;
use crate::sink::Guarantee;
use crate::store::{Checkpoint, Parts, Write};

#[derive(Clone, Default)]
pub(super) struct Mirror {
    pub(super) messages: BTreeMap<u64, Position>,
    /// Chunks of spilled changes, with their bytes.
    pub(super) spilled: BTreeMap<u64, Vec<(Position, usize)>>,
    pub(super) checkpoint: Checkpoint,
    /// From where each routed stream is read at a start.
    pub(super) streams: BTreeMap<&'static str, u64>,
    /// What was promised of the pipeline's own stream, for the next process.
    pub(super) promised: Option<Guarantee>,
    /// Every message that ever was in it, or in one that is lost.
    pub(super) ever: BTreeSet<Position>,
    /// Of the messages in it whose records are there, by its id: the number of the first, and how many.
    pub(super) parts: BTreeMap<u64, (u64, u64)>,
    /// Those of them that are a dead letter: of what the message itself was, nothing is sent any more.
    pub(super) letter_parts: BTreeSet<u64>,
    /// Became dead letters, and how often one did.
    pub(super) lettered: BTreeSet<Position>,
    pub(super) letters: u64,
    /// Up to where it knows the file of dead letters.
    pub(super) letter_file: u64,
    /// How many transactions it has carried out.
    pub(super) transactions: u64,
    /// Given up: how long the history of the stream was then, and by which process.
    pub(super) given_up: BTreeMap<Position, (usize, u64)>,
}

impl Mirror {
    /// Carries a transaction out. Says what it did.
    pub(super) fn carry_out(&mut self, writes: &[Write], now: (usize, u64)) -> String {
        let mut text = String::new();
        self.transactions += 1;
        for write in writes {
            match write {
                Write::Insert { id, change, .. } => {
                    self.messages.insert(*id, change.position);
                    self.ever.insert(change.position);
                    text += &format!(" +{id}@{}", change.position);
                }
                Write::Remove { id } => {
                    self.messages.remove(id);
                    self.parts.remove(id);
                    text += &format!(" -{id}");
                }
                Write::DeadLetter { id } => {
                    self.lettered.extend(self.messages.remove(id));
                    self.parts.remove(id);
                    self.letters += 1;
                    text += &format!(" dead {id}");
                }
                Write::LetterFile(file) => {
                    self.letter_file = file.end;
                    text += &format!(" letters to {}", file.end);
                }
                Write::Parts { id, parts } => {
                    self.letter_parts.remove(id);
                    match parts {
                        Some(Parts { first, records, stream }) => {
                            self.parts.insert(*id, (*first, records.len() as u64));
                            if stream.as_deref() == Some(letters::STREAM) {
                                self.letter_parts.insert(*id);
                            }
                        }
                        None => _ = self.parts.remove(id),
                    }
                    let count = parts.as_ref().map_or(0, |parts| parts.records.len());
                    text += &format!(" {count} parts of {id}");
                }
                Write::PartsSent { id, below } => {
                    if let Some((first, count)) = self.parts.get_mut(id) {
                        *count = (*first + *count).saturating_sub(*below);
                        *first = *below;
                    }
                    text += &format!(" parts of {id} to {below}");
                }
                Write::Acknowledge { id } => {
                    self.parts.remove(id);
                    if let Some(position) = self.messages.remove(id) {
                        self.given_up.insert(position, now);
                    }
                    text += &format!(" given up {id}");
                }
                Write::Checkpoint(checkpoint) => {
                    let seq = checkpoint.seq.or(self.checkpoint.seq);
                    self.checkpoint = Checkpoint { seq, ..*checkpoint };
                    text += &format!(
                        " checkpoint {} seq {:?} of {} confirm {}",
                        checkpoint.position,
                        checkpoint.seq,
                        checkpoint.reached,
                        checkpoint.confirm.0
                    );
                }
                Write::Begin { seq } => {
                    self.checkpoint.seq = Some(*seq);
                    text += &format!(" begin {seq}");
                }
                Write::Spill { id, changes } => {
                    let spilled = changes.iter().map(|change| (change.position, change.bytes()));
                    self.spilled.insert(*id, spilled.collect());
                    text += &format!(" spilled {id}: {}", changes.len());
                }
                Write::Unspill { through } => {
                    self.spilled.retain(|id, _| id > through);
                    text += &format!(" unspilled {through}");
                }
                Write::Failed { id, .. } => text += &format!(" failed {id}"),
                Write::Stream { name, seq, reached } => {
                    let name = stream(name).expect("it is one of the world's");
                    match seq {
                        Some(seq) => self.streams.insert(name, *seq),
                        None => self.streams.remove(name),
                    };
                    text += &format!(" {name} {seq:?} of {reached}");
                }
                Write::Promise(guarantee) => self.promised = Some(*guarantee),
                Write::Chain { .. }
                | Write::InForce { .. }
                | Write::SourceIdentity { .. }
                | Write::Publication(_)
                | Write::SlotMade { .. } => {}
            }
        }
        text
    }

    fn id_of(&self, position: Position) -> Option<u64> {
        self.messages.iter().find(|(_, held)| **held == position).map(|(id, _)| *id)
    }

    /// Which of a message's records are in it.
    fn parts_of(&self, position: Position) -> Option<(u64, u64)> {
        self.parts.get(&self.id_of(position)?).copied()
    }

    /// Whether a message is a letter whose records are in it.
    fn is_letter(&self, position: Position) -> bool {
        self.id_of(position).is_some_and(|id| self.letter_parts.contains(&id))
    }

    pub(super) fn has_part(&self, position: Position, part: u32) -> bool {
        let is_within = |(first, count)| (first..first + count).contains(&u64::from(part));
        self.parts_of(position).is_some_and(is_within)
    }

    fn spilled_positions(&self) -> impl Iterator<Item = Position> {
        self.spilled.values().flatten().map(|(position, _)| *position)
    }

    pub(super) fn spilled_bytes(&self) -> usize {
        self.spilled.values().flatten().map(|(_, bytes)| bytes).sum()
    }

    /// Whether a change is in it, as a message or spilled.
    pub(super) fn holds(&self, position: Position) -> bool {
        self.messages.values().any(|held| *held == position)
            || self.spilled_positions().any(|spilled| spilled == position)
    }

    /// What a restart from here would lose, or would send though the stream has it. `from_here` is what
    /// was sent with this store, and not with one that is lost.
    pub(super) fn unaccounted(
        &self,
        workload: &Workload,
        history: &[Landed],
        from_here: &[&Landed],
        dropped: &BTreeSet<Position>,
        excused: &BTreeSet<Position>,
        deleted: &BTreeSet<&str>,
    ) -> Option<String> {
        // No operator settles for less here, and no token may do less for good.
        if let Some(less) = self.promised.filter(|promised| *promised < Guarantee::ExactlyOnce) {
            return Some(format!("`{}` is promised where nobody said so", less.word()));
        }
        let Checkpoint { position: through, seq, .. } = self.checkpoint;
        // Of the first chunk, a restart leaves out what the checkpoint has passed.
        let spilled = self.spilled_positions().filter(|position| *position > through);
        let in_store: BTreeSet<Position> = self.messages.values().copied().chain(spilled).collect();
        // What the source leaves out from now on.
        let read = self.spilled_positions().max().unwrap_or_default().max(through);
        let last = history.iter().filter(|landed| landed.ours.is_last());
        let whole: BTreeSet<Position> = last.map(|landed| landed.ours.position).collect();
        for planned in workload.changes() {
            let position = planned.change.position;
            if position > read {
                break;
            }
            let accounted = in_store.contains(&position)
                || whole.contains(&position)
                || dropped.contains(&position)
                || excused.contains(&position)
                || self.given_up.contains_key(&position);
            if !accounted {
                return Some(format!(
                    "{position} is neither in the stream nor in the store, and would never be read \
                     again"
                ));
            }
        }
        // What of it was given up is known by its mark.
        let sent_again = |landed: &&Landed| {
            let position = landed.ours.position;
            let settled = position <= read && !in_store.contains(&position);
            // By its last part a restart knows that all of it is there.
            let settled = settled || (!landed.ours.is_last() && whole.contains(&position));
            let is_gone = |(first, _)| u64::from(landed.ours.part) < first;
            let is_known = self.given_up.contains_key(&position)
                || self.lettered.contains(&position)
                || (landed.stream != letters::STREAM && self.is_letter(position))
                || self.parts_of(position).is_some_and(is_gone);
            !settled && !is_known
        };
        let from = |stream: &str| match stream {
            STREAM => seq,
            letters::FILE => Some(self.letter_file),
            routed => self.streams.get(routed).copied(),
        };
        // A routed stream that was deleted is read from its beginning, whatever is written here.
        let is_read = |landed: &Landed| {
            landed.stream != STREAM && deleted.contains(landed.stream)
                || from(landed.stream).is_some_and(|from| landed.ours.seq >= from)
        };
        let mut readable = from_here.iter().copied().filter(|landed| !landed.lost);
        let unread = readable.find(|landed| !is_read(landed) && sent_again(landed))?;
        let Landed { ours, stream, .. } = unread;
        Some(format!(
            "{} is in the stream {stream} as {}, a restart would read from {:?}, and send it again",
            ours.position,
            ours.seq,
            from(stream)
        ))
    }
}
