//! The judgement over a run: what the stream and the store have to be, whatever happened.
//!
//! It knows the workload and what was observed from outside, and none of the driver's own ideas.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use base64::Engine as _;

use super::workload::Fate;
use super::world::{STREAM, World, lock};
use crate::change::{Action, Lsn, Position};
use crate::message::header;
use crate::sink::ReadRecord;
use crate::store::{Loaded, StoredState};

/// A record that a pipeline of ours made.
#[derive(Debug)]
pub(super) struct Ours {
    pub(super) seq: u64,
    pub(super) position: Position,
    part: u32,
    parts: u32,
    chain: String,
    body: bytes::Bytes,
}

/// Reads a record's headers; nothing where it is not ours.
pub(super) fn ours(record: &ReadRecord) -> Option<Ours> {
    let text = |name: &str| std::str::from_utf8(record.header(name)?).ok();
    let key = base64::engine::general_purpose::STANDARD.decode(text(header::KEY)?).ok()?;
    let (commit_lsn, index) = std::str::from_utf8(&key).ok()?.split_once(':')?;
    let (part, parts) = text(header::PART)?.split_once('/')?;
    Some(Ours {
        seq: record.seq,
        position: Position {
            commit_lsn: Lsn(commit_lsn.parse().ok()?),
            index: index.parse().ok()?,
        },
        part: part.parse().ok()?,
        parts: parts.parse().ok()?,
        chain: text(header::CHAIN)?.to_owned(),
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
}

/// Judges a run that has healed.
pub(super) fn judge(world: &World) {
    let records = lock(&world.server).records(STREAM, 0);
    let ours: Vec<Ours> = records.iter().filter_map(ours).collect();
    let verdict = check(world, &ours);
    if let Err(text) = verdict {
        world.violated(text);
    }
}

fn check(world: &World, ours: &[Ours]) -> Result<(), String> {
    let state = world.state();
    let store = &state.store;
    each_once(world, ours)?;
    let landed: BTreeMap<Position, u64> =
        ours.iter().rev().map(|record| (record.position, record.seq)).collect();
    for planned in world.workload.changes() {
        let position = planned.change.position;
        let may_be_dropped = state.dropped.contains(&position);
        if !landed.contains_key(&position)
            && !may_be_dropped
            && !store.given_up.contains_key(&position)
        {
            return Err(format!("{position} is lost: neither in the stream nor given up"));
        }
    }
    for (position, (tail, process)) in &store.given_up {
        // One that was given up while the batch of a dead process was still under way may land.
        if let Some(seq) = landed.get(position)
            && seq >= tail
            && state.senders.get(usize::try_from(*seq).unwrap_or(usize::MAX)) >= Some(process)
        {
            return Err(format!("{position} was given up, and delivered later, as {seq}"));
        }
    }
    let mut may_be_held = troubled(world, state.refused_any);
    may_be_held.extend(&store.ever);
    in_order(world, &landed, &may_be_held)?;
    bodies(world, ours)
}

/// Each change once, and of a split one each part once, side by side, made by one chain.
fn each_once(world: &World, ours: &[Ours]) -> Result<(), String> {
    let mut by_position: BTreeMap<Position, Vec<&Ours>> = BTreeMap::new();
    for record in ours {
        by_position.entry(record.position).or_default().push(record);
    }
    for (position, records) in by_position {
        if world.workload.planned(position).is_none() {
            return Err(format!("{position} is in the stream and was never committed"));
        }
        let first = records[0];
        let parts: Vec<u32> = records.iter().map(|record| record.part).collect();
        if parts != (0..first.parts).collect::<Vec<_>>() {
            let seqs: Vec<u64> = records.iter().map(|record| record.seq).collect();
            return Err(format!(
                "{position} should be in the stream once in {} parts, and is there as parts \
                 {parts:?}, numbers {seqs:?}",
                first.parts
            ));
        }
        let adjacent = records.windows(2).all(|pair| pair[0].seq + 1 == pair[1].seq);
        let one_chain = records.iter().all(|record| record.chain == first.chain);
        if !adjacent || !one_chain {
            return Err(format!("the parts of {position} are torn apart or of several chains"));
        }
    }
    Ok(())
}

/// The changes that may have been held, also without a trace in the store, where a crash came first:
/// those that may fail, and those whose rows depend on such a one.
fn troubled(world: &World, any: bool) -> BTreeSet<Position> {
    let mut rows: BTreeSet<&str> = BTreeSet::new();
    let mut tables: BTreeSet<u32> = BTreeSet::new();
    let mut troubled: BTreeSet<Position> = BTreeSet::new();
    loop {
        let before = troubled.len();
        for planned in world.workload.changes() {
            let change = &planned.change;
            let fails = match planned.fate {
                Fate::Plain | Fate::Split(_) | Fate::Dropped => any,
                Fate::Failing { .. } | Fate::Flaky | Fate::Refused { .. } => true,
            };
            let truncates = change.action == Action::Truncate;
            let depends = planned.keys.iter().any(|key| rows.contains(&**key))
                || tables.contains(&change.table.oid)
                || (truncates && planned_of(world, change.table.oid, &troubled));
            if fails || depends {
                troubled.insert(change.position);
                rows.extend(planned.keys.iter().map(String::as_str));
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

/// Within each row the order of commits, around truncates too; over the whole stream as well, except
/// for what was held.
fn in_order(
    world: &World,
    landed: &BTreeMap<Position, u64>,
    may_be_held: &BTreeSet<Position>,
) -> Result<(), String> {
    let mut by_seq: Vec<(u64, Position)> = landed.iter().map(|(at, seq)| (*seq, *at)).collect();
    by_seq.sort_unstable();
    let mut rows: HashMap<&str, Position> = HashMap::new();
    let mut tables: HashMap<u32, (Position, Position)> = HashMap::new();
    let mut last_unheld = Position::default();
    for (seq, position) in by_seq {
        let Some(planned) = world.workload.planned(position) else { continue };
        let truncates = planned.change.action == Action::Truncate;
        let (last, barrier) = tables.entry(planned.change.table.oid).or_default();
        let mut before = if truncates { *last } else { *barrier };
        for key in &planned.keys {
            let row = rows.entry(key).or_default();
            before = before.max(*row);
            *row = position.max(*row);
        }
        *last = position.max(*last);
        if truncates {
            *barrier = position.max(*barrier);
        }
        if before > position {
            return Err(format!("{position} of {:?} is behind {before}, at {seq}", planned.keys));
        }
        if !may_be_held.contains(&position) {
            if last_unheld > position {
                return Err(format!(
                    "{position} was never held and is behind {last_unheld}, at {seq}"
                ));
            }
            last_unheld = position;
        }
    }
    Ok(())
}

/// Each record holds the row of its own change.
fn bodies(world: &World, ours: &[Ours]) -> Result<(), String> {
    #[derive(serde::Deserialize)]
    struct Message {
        record: Option<serde_json::Map<String, serde_json::Value>>,
        action: String,
    }
    for record in ours.iter().filter(|record| record.parts == 1) {
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
            || said("id") != number(0)
            || (change.new.is_some() && said("value") != number(1))
        {
            return Err(format!("record {} holds another change than its key says", record.seq));
        }
    }
    Ok(())
}

/// Why a run that has had its time has not come to rest; nothing where it has.
pub(super) fn unrest(world: &World) -> Option<String> {
    let state = world.state();
    let end = world.workload.transactions.last().map_or(0, |last| last.end_lsn);
    if state.confirmed < end {
        return Some(format!("Postgres was told {}, and its end is {end}", state.confirmed));
    }
    if !state.store.messages.is_empty() {
        return Some(format!("the store still holds {:?}", state.store.messages));
    }
    None
}
