//! The judgement over a run: what the stream and the store have to be, whatever happened.
//!
//! It knows the workload and what was observed from outside, and none of the driver's own ideas.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use base64::Engine as _;

use super::letters;
use super::tables::{ID, VALUE};
use super::workload::{Fate, Planned};
use super::world::{Landed, Stage, State, World};
use crate::change::{Action, Lsn, Position};
use crate::message::header;
use crate::pipeline::control::{Status, StreamView};
use crate::sink::ReadRecord;
use crate::store::{Chunk, Loaded, StoredState};

/// A record that a pipeline of ours made.
#[derive(Debug)]
pub(super) struct Ours {
    pub(super) seq: u64,
    pub(super) position: Position,
    pub(super) part: u32,
    pub(super) parts: u32,
    /// It is of a dead letter.
    pub(super) letter: bool,
    chain: String,
    /// The number of the chain that made it.
    generation: u64,
    body: bytes::Bytes,
}

impl Ours {
    /// A line of the file of dead letters.
    pub(super) fn in_file(at: u64, position: Position, body: bytes::Bytes) -> Self {
        let chain = String::new();
        Self { seq: at, position, part: 0, parts: 1, letter: true, chain, generation: 0, body }
    }

    /// The last of the parts.
    pub(super) fn is_last(&self) -> bool {
        self.part + 1 == self.parts
    }
}

/// The position that a record's key holds.
pub(super) fn position_of(key: &[u8]) -> Option<Position> {
    let (commit_lsn, index) = std::str::from_utf8(key).ok()?.split_once(':')?;
    Some(Position { commit_lsn: Lsn(commit_lsn.parse().ok()?), index: index.parse().ok()? })
}

/// Reads a record's headers; nothing where it is not ours.
pub(super) fn ours(record: &ReadRecord) -> Option<Ours> {
    let text = |name: &str| std::str::from_utf8(record.header(name)?).ok();
    let key = base64::engine::general_purpose::STANDARD.decode(text(header::KEY)?).ok()?;
    let (part, parts) = text(header::PART)?.split_once('/')?;
    let chain = text(header::CHAIN)?;
    Some(Ours {
        seq: record.seq,
        position: position_of(&key)?,
        part: part.parse().ok()?,
        parts: parts.parse().ok()?,
        letter: record.header(header::DEAD_LETTER).is_some(),
        chain: chain.to_owned(),
        generation: chain.split(':').next()?.parse().ok()?,
        body: record.body.clone(),
    })
}

/// Checks that the store holds what its transactions said, no more and no less.
pub(super) fn store_is_as_told(world: &World, loaded: &Loaded) {
    let held: BTreeMap<u64, Position> = loaded
        .messages
        .iter()
        .filter(|known| known.state != StoredState::Acknowledged)
        .map(|known| (known.id, known.position))
        .collect();
    let told = world.state().store.messages.clone();
    if held != told {
        world.violated(format!("the store holds {held:?}, and was told to hold {told:?}"));
    }
    let chunk = |chunk: &Chunk| (chunk.id, chunk.changes, chunk.bytes);
    let held: Vec<(u64, u64, u64)> = loaded.spilled.iter().map(chunk).collect();
    let chunk = |(id, changes): (&u64, &Vec<(Position, usize)>)| {
        let bytes = changes.iter().map(|(_, bytes)| *bytes as u64);
        (*id, changes.len() as u64, bytes.sum())
    };
    let told: Vec<(u64, u64, u64)> = world.state().store.spilled.iter().map(chunk).collect();
    if held != told {
        world.violated(format!("the spill holds {held:?}, and was told to hold {told:?}"));
    }
}

/// Judges a run that has healed.
pub(super) fn judge(world: &World) {
    let verdict = check(world);
    if let Err(text) = verdict {
        world.violated(text);
    }
}

fn check(world: &World) -> Result<(), String> {
    let state = world.state();
    let (store, history) = (&state.store, &state.history);
    each_once(world, &state)?;
    // By when each change came first, and when all of it was there.
    let landed = firsts(history, |_| true);
    let whole = firsts(history, |record| record.ours.is_last());
    for planned in world.workload.changes() {
        let position = planned.change.position;
        if !whole.contains_key(&position) && !is_settled_without_record(&state, position) {
            return Err(format!("{position} is lost: neither in the stream nor given up"));
        }
    }
    if let Some(text) = world.untold(&state) {
        return Err(text);
    }
    for (position, (length, process)) in &store.given_up {
        // One that was given up while the batch of a dead process was still under way may land.
        if let Some(number) = landed.get(position)
            && number >= length
            && history[*number].process >= *process
        {
            return Err(format!("{position} was given up, and delivered later"));
        }
    }
    // What is routed parks where its stream is in trouble, and whatever may be in one that was not read.
    let mut may_be_held = troubled(world, state.refused_any || state.unread_any, true);
    may_be_held.extend(&store.ever);
    // What a process with the lost store still gets into a stream that the next one does not know is
    // not in its place, and nothing else is out of it for that.
    let begun = firsts(history, |record| !record.unasked);
    let ended = firsts(history, |record| !record.unasked && record.ours.is_last());
    in_order(world, &state, [&begun, &ended], &may_be_held)?;
    bodies(world, history)
}

/// Whether a change was dropped or given up, or was taken as delivered.
pub(super) fn is_settled_without_record(state: &State, position: Position) -> bool {
    state.dropped.contains(&position)
        || state.excused.contains(&position)
        || state.store.given_up.contains_key(&position)
}

/// The first of such records of each change.
fn firsts(history: &[Landed], which: impl Fn(&Landed) -> bool) -> BTreeMap<Position, usize> {
    let mut firsts = BTreeMap::new();
    for (number, record) in history.iter().enumerate().filter(|(_, record)| which(record)) {
        firsts.entry(record.ours.position).or_insert(number);
    }
    firsts
}

/// Each change once, as its records or as a dead letter, and each of its parts once, made by one chain:
/// side by side where one batch holds them, else in their order. Again only in another stream, or where
/// what had come before is gone and an operator decided so.
fn each_once(world: &World, state: &State) -> Result<(), String> {
    let mut by_position: BTreeMap<Position, Vec<&Landed>> = BTreeMap::new();
    for record in &state.history {
        by_position.entry(record.ours.position).or_default().push(record);
    }
    for (position, records) in by_position {
        let Some(planned) = world.workload.planned(position) else {
            return Err(format!("{position} is in the stream and was never committed"));
        };
        for Landed { ours, stream, .. } in &records {
            let is_there = if ours.letter {
                [letters::STREAM, letters::FILE].contains(stream)
            } else {
                planned.route.stream(ours.generation) == *stream
            };
            if !is_there {
                let chain = &ours.chain;
                return Err(format!("{position} is in {stream}, where chain {chain} sends it not"));
            }
        }
        let may_come_again =
            |record: &&Landed| !record.current || record.again || (state.granted && record.lost);
        let wrong = || {
            let place = |record: &&Landed| {
                (record.stream, record.ours.seq, record.ours.part, record.ours.letter)
            };
            let places: Vec<_> = records.iter().map(place).collect();
            format!("{position} should be in one stream once, and is there as {places:?}")
        };
        let mut copy: Vec<&Landed> = Vec::new();
        for &record in &records {
            let ours = &record.ours;
            let in_portions = world.is_in_portions(ours);
            let part = ours.part as usize;
            if let Some(last) = copy.last() {
                let is_same = (last.ours.letter, last.ours.parts, &last.ours.chain, last.stream)
                    == (ours.letter, ours.parts, &ours.chain, record.stream);
                let is_next =
                    is_same && part == copy.len() && (in_portions || last.ours.seq + 1 == ours.seq);
                if is_next {
                    copy.push(record);
                    continue;
                }
                // With the stream went parts that the store still had.
                let is_again = is_same && in_portions && part < copy.len();
                let over = if is_again { &copy[part..] } else { &copy[..] };
                let is_spent = !last.ours.is_last() && ours.letter && !last.ours.letter;
                if !is_spent && !over.iter().all(may_come_again) {
                    return Err(wrong());
                }
                copy.truncate(if is_again { part } else { 0 });
            }
            if part != copy.len() {
                return Err(format!("the parts of {position} are torn apart: {}", wrong()));
            }
            copy.push(record);
        }
        let Some(last) = copy.last() else { continue };
        if last.ours.letter && last.ours.is_last() {
            let text: Vec<u8> =
                copy.iter().flat_map(|record| record.ours.body.iter().copied()).collect();
            if letters::position(&text) != Some(position) {
                return Err(format!("the dead letter of {position} is not its own"));
            }
            let max =
                world.workload.dead_letters.as_ref().map_or(u64::MAX, |dead| dead.max_attempts);
            let failures = state.failures.get(&position).copied().unwrap_or_default();
            let may_be_refused = state.refused_any || matches!(planned.fate, Fate::Refused { .. });
            if failures < max && !may_be_refused {
                return Err(format!("{position} failed {failures} times and is a dead letter"));
            }
        }
    }
    Ok(())
}

/// The changes that may have been held, also without a trace in the store, where a crash came first:
/// those that may fail or, where what is in order counts too, are routed or take several batches, and
/// those whose rows depend on such a one.
fn troubled(world: &World, any: bool, in_order: bool) -> BTreeSet<Position> {
    let mut rows: BTreeSet<&str> = BTreeSet::new();
    let mut tables: BTreeSet<u32> = BTreeSet::new();
    let mut troubled: BTreeSet<Position> = BTreeSet::new();
    let batch_records = world.workload.limits.batch_records;
    loop {
        let before = troubled.len();
        for planned in world.workload.changes() {
            let change = &planned.change;
            let fails = match planned.fate {
                Fate::Split(parts) => any || (in_order && parts as usize > batch_records),
                Fate::Fickle(parts) => {
                    any || (in_order && parts.iter().any(|parts| *parts as usize > batch_records))
                }
                Fate::Plain | Fate::Dropped => any,
                Fate::Failing { .. } | Fate::Flaky | Fate::Refused { .. } => true,
            };
            let truncates = change.action == Action::Truncate;
            let fails = fails || (in_order && planned.route.leaves());
            let depends = planned.spread.iter().any(|key| rows.contains(&**key))
                || tables.contains(&change.table.oid)
                || (truncates && planned_of(world, change.table.oid, &troubled));
            if fails || depends {
                troubled.insert(change.position);
                rows.extend(planned.spread.iter().map(String::as_str));
                if truncates {
                    tables.insert(change.table.oid);
                }
            }
        }
        if troubled.len() == before {
            return troubled;
        }
    }
}

fn planned_of(world: &World, table: u32, among: &BTreeSet<Position>) -> bool {
    let is_of = |position: &Position| {
        world.workload.planned(*position).is_some_and(|planned| planned.change.table.oid == table)
    };
    among.iter().any(is_of)
}

/// Within each row the order of commits, around truncates and over all streams too; within each stream
/// as well, except for what was held.
fn in_order(
    world: &World,
    State { history, dropped, .. }: &State,
    landed: [&BTreeMap<Position, usize>; 2],
    may_be_held: &BTreeSet<Position>,
) -> Result<(), String> {
    let mut by_number: Vec<(usize, Position)> =
        landed.into_iter().flatten().map(|(at, number)| (*number, *at)).collect();
    by_number.sort_unstable();
    by_number.dedup();
    let mut rows: HashMap<&str, Position> = HashMap::new();
    let mut tables: HashMap<u32, (Position, Position)> = HashMap::new();
    let mut last_unheld: BTreeMap<&str, Position> = BTreeMap::new();
    for (number, position) in by_number {
        let Some(planned) = world.workload.planned(position) else { continue };
        // One that was dropped, and was read once more with another chain, is where it is.
        if dropped.contains(&position) {
            continue;
        }
        let truncates = planned.change.action == Action::Truncate;
        let (last, barrier) = tables.entry(planned.change.table.oid).or_default();
        let mut before = if truncates { *last } else { *barrier };
        // A letter in a file may overtake what is before it, and nothing overtakes the letter.
        let overtakes = history[number].stream == letters::FILE;
        for key in &planned.keys {
            let row = rows.entry(key).or_default();
            before = before.max(*row);
            *row = if overtakes { *row } else { position.max(*row) };
        }
        if !overtakes {
            *last = position.max(*last);
        }
        if truncates && !overtakes {
            *barrier = position.max(*barrier);
        }
        if before > position {
            return Err(format!(
                "{position} of {:?} is behind {before}, as record {number}",
                planned.keys
            ));
        }
        if !may_be_held.contains(&position) {
            let last = last_unheld.entry(history[number].stream).or_default();
            if *last > position {
                return Err(format!(
                    "{position} was never held and is behind {last}, as record {number}"
                ));
            }
            *last = position;
        }
    }
    Ok(())
}

/// Each record holds the row of its own change.
fn bodies(world: &World, history: &[Landed]) -> Result<(), String> {
    #[derive(serde::Deserialize)]
    struct Message {
        record: Option<serde_json::Map<String, serde_json::Value>>,
        action: String,
    }
    let records = history.iter().map(|landed| &landed.ours);
    for record in records.filter(|record| record.parts == 1 && !record.letter) {
        let Some(planned) = world.workload.planned(record.position) else { continue };
        if matches!(planned.fate, Fate::Split(_)) {
            continue;
        }
        let change = &planned.change;
        let message: Message = serde_json::from_slice(&record.body)
            .map_err(|error| format!("{} has a body that is no message: {error}", record.seq))?;
        let row = change.row();
        let number = |column| {
            row.and_then(|row| row.text(column))
                .and_then(|text| std::str::from_utf8(text).ok()?.parse::<u64>().ok())
        };
        let said = |name: &str| message.record.as_ref()?.get(name)?.as_u64();
        if message.action != change.action.as_str()
            || said("id") != number(ID)
            || (change.new.is_some() && said("value") != number(VALUE))
        {
            return Err(format!("record {} holds another change than its key says", record.seq));
        }
    }
    Ok(())
}

/// What is bound for a stream that is shut parks, and keeps nobody waiting.
pub(super) fn nothing_waits_for_what_is_shut(world: &World) {
    let Some(status) = world.state().status.clone() else { return };
    let status = status.borrow();
    let waits = |stream: &&StreamView| stream.state == "shut" && stream.queued > 0;
    if let Some(stream) = status.streams.iter().find(waits) {
        world.violated(format!("{} is shut, and {} wait for it", stream.name, stream.queued));
    }
}

/// Why a run whose faults are over has not come to rest; nothing where it has. Before it is mended, what
/// fails and what waits for it stays in the store, unless attempts have an end, and all else has to be
/// through.
pub(super) fn unrest(world: &World) -> Option<String> {
    let state = world.state();
    let store = &state.store;
    let end = world.workload.transactions.last().map_or(0, |last| last.end_lsn);
    let status = state.status.as_ref().map(|status| status.borrow().clone()).unwrap_or_default();
    if state.stage < Stage::Mended {
        let full = status.reasons.iter().any(|reason| reason.code == "store_full");
        let may_be_held = troubled(world, state.refused_any, false);
        let has_end = world.workload.dead_letters.is_some();
        let stays = |position: &Position| {
            !has_end && store.holds(*position) && may_be_held.contains(position)
        };
        // With the store full of what fails, nothing is read any more.
        let waits = |planned: &&Planned| {
            let position = planned.change.position;
            let through = state.landed.contains(&position)
                || state.dropped.contains(&position)
                || state.excused.contains(&position)
                || store.given_up.contains_key(&position);
            !through && !stays(&position) && !full
        };
        let waiting = world.workload.changes().find(waits)?;
        return Some(format!("{} does not get through", waiting.change.position));
    }
    if state.confirmed < end {
        return Some(format!("Postgres was told {}, and its end is {end}", state.confirmed));
    }
    if !store.messages.is_empty() {
        return Some(format!("the store still holds {:?}", store.messages));
    }
    if !store.spilled.is_empty() {
        return Some(format!("the spill still holds {:?}", store.spilled));
    }
    if !store.streams.is_empty() {
        return Some(format!("the store still has rows of {:?}", store.streams));
    }
    let (waiting, written) = status
        .dead_letters
        .as_ref()
        .map_or((0, store.letters), |letters| (letters.waiting, letters.written));
    if (waiting, written) != (0, store.letters) {
        let letters = store.letters;
        return Some(format!(
            "at rest {waiting} are spent, and {written} of {letters} are letters"
        ));
    }
    let Status { parked, retrying, waiting, spilled_changes, spilled_bytes, .. } = status;
    let left = [parked, retrying, waiting, spilled_changes, spilled_bytes];
    if !status.ready || left != [0; 5] {
        return Some(format!("at rest it says {:?}, and to hold {left:?}", status.reasons));
    }
    let out = state.budget.as_ref().map_or(0, |budget| budget.bytes_out());
    if out > 0 {
        return Some(format!("{out} bytes are still out of the budget"));
    }
    None
}
