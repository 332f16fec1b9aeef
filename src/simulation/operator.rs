//! What operators do: with messages, about records that are gone, and about streams that are another's.

use rand::RngExt as _;

use super::faults::Fault;
use super::world::World;
use crate::pipeline::control::{Control, Filter, Reason};
use crate::pipeline::grants::{Grants, LostRecords};

/// What the next process is granted: what was asked for, and now and then what nobody needs.
pub(super) fn grants(world: &World) -> Grants {
    let freely = [(); 2].map(|()| world.fault(Fault::Grants, 0.3));
    let mut state = world.state();
    let lost_records = state.grant.take();
    state.granted |= lost_records.is_some();
    if lost_records.is_some() {
        world.is_told();
    }
    if lost_records == Some(LostRecords::Skip) {
        state.chosen = 60;
    }
    let once = std::mem::take(&mut state.take_over_once);
    let abandon_parked = std::mem::take(&mut state.abandon) || freely[0];
    let take_over = state.take_over || once || freely[1];
    let grants = Grants { take_over, abandon_parked, lost_records, ..Grants::default() };
    state.last_grants = grants;
    state.told_to_take_over |= take_over;
    grants
}

/// A process that ended with a question had used none of its grants: they are given with the answer.
pub(super) fn grants_again(world: &World) {
    let mut state = world.state();
    let Grants { take_over, abandon_parked, lost_records, .. } = state.last_grants;
    state.take_over_once |= take_over;
    state.abandon |= abandon_parked;
    state.grant = state.grant.or(lost_records);
}

/// Records of a routed stream are gone, and the process goes on without it until an operator has chosen.
pub(super) fn wants_decision(world: &World) -> bool {
    let state = world.state();
    let Some(status) = state.status.as_ref() else { return false };
    let status = status.borrow();
    let asks = |reason: &Reason| asks_to_decide(&reason.text);
    state.grant.is_none()
        && status.streams.iter().filter_map(|stream| stream.reason.as_ref()).any(asks)
}

/// Records are gone, and an operator has to choose. Whoever asks for ownership as well may only ask for
/// that choice later.
pub(super) fn asks_to_decide(text: &str) -> bool {
    text.contains("--lost-records") && !text.contains("--take-over")
}

/// A stream is another's, and an operator who knows better reads what to say for the next process.
pub(super) fn grants_ownership(world: &World, text: &str) -> bool {
    let mut state = world.state();
    // Whoever was told to take over and stood still may do so later; one that is made anew is anybody's: a
    // process that wakes up may be the first to fence it; and an older state has an older token.
    let is_shared = !state.fenced.is_empty()
        || state.told_to_take_over
        || !state.deleted.is_empty()
        || world.times_put_back() > 0;
    let others = is_shared && text.contains("--take-over");
    let lost = state.store_since > 0 && text.contains("--abandon-parked");
    state.take_over_once |= others;
    state.abandon |= lost;
    // A running process only learns that it is fenced out: the next one says what may be done.
    let is_out = is_shared && text.contains("was taken over by another writer");
    others || lost || is_out
}

/// The same where it is a routed stream, without which the process goes on.
pub(super) fn wants_ownership(world: &World) -> bool {
    let status = world.state().status.clone();
    let Some(status) = status else { return false };
    let reasons: Vec<Reason> =
        status.borrow().streams.iter().filter_map(|stream| stream.reason.clone()).collect();
    reasons.iter().any(|reason| grants_ownership(world, &reason.text))
}

/// An operator chooses what becomes of records that are gone, for the next process.
pub(super) fn decide(world: &World, number: u64) {
    world.note("it wants a decision", number, 0);
    let skip = world.chance(0.5);
    let choice = if skip { LostRecords::Skip } else { LostRecords::Resend };
    world.state().grant = Some(choice);
}

/// Retries some messages or gives them up.
pub(super) async fn operate(world: &World, control: &Control) {
    let some = {
        let state = world.state();
        state.store.messages.keys().copied().collect::<Vec<_>>()
    };
    let mut filter = Filter::default();
    if !some.is_empty() && world.chance(0.7) {
        filter.id = Some(world.draw(|rng| some[rng.random_range(0..some.len())]));
    }
    let one = filter.id.is_some();
    if !one && world.chance(0.3) {
        filter.state = Some(
            ["failed", "parked", "retrying", "waiting"][world.draw(|rng| rng.random_range(0..4))]
                .to_owned(),
        );
    }
    let give_up = world.chance(if one { 0.5 } else { 0.1 });
    world.note(
        if give_up { "operator gives up" } else { "operator retries" },
        filter.id.unwrap_or(0),
        0,
    );
    let answer =
        if give_up { control.acknowledge(filter).await } else { control.retry(filter).await };
    world.note("operator is answered", answer.map_or(0, |changed| changed.changed), 0);
}
