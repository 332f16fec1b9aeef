//! The proof of what the [driver](crate::pipeline::driver) promises: the driver itself, on a clock that
//! stands still between events, in a world where everything that may fail does.
//!
//! A seed draws what is committed, what the transforms and S2 make of it, which kinds of faults there
//! are, and every moment at which one happens. The same seed gives the same run, so that a run that
//! breaks a promise can be looked at again:
//!
//! ```text
//! make sim ARGS=seed=4711            one run, with all of its events
//! make sim ARGS='seeds=100000'       many, from a seed that is printed; from=N chooses it
//! make sim ARGS=broken=Fence         how soon one broken rule is found out
//! ```
//!
//! | file | what | real |
//! | --- | --- | --- |
//! | `process` | the driver with everything above its seams, until it is killed | driver, sessions, fencing, S2's protocol, SQLite |
//! | `network` | the way to S2: what is under way there outlives the process | |
//! | `sink::model` | the S2 server, held to the real one by a test | |
//! | `postgres` | the slot | what leaves repetitions out |
//! | `workload`, `tables`, `routes` | what is committed, in tables of every grouping, and for which streams | |
//! | `letters` | where dead letters go | |
//! | `operator` | what operators do and grant | |
//! | `older` | S2 put back to an older state | |
//! | `folders` | state folders that are not the pipeline's | |
//! | `faults` | what may go wrong, and which of it is drawn | |
//! | `streams` | what becomes of the streams beside what is sent | |
//! | `world` | chance, the trace, what all share | |
//! | `checks` | what holds at every moment: nothing lands out of order or is confirmed too early | |
//! | `mirror` | what the store holds; looks at each transaction for what a restart from there would lose or repeat | |
//! | `judge` | what stream and store have to be in the end | |
//!
//! The promises: each committed change is exactly once in the stream that the chain of its record says,
//! and in no other, or was dropped or given up, or is a dead letter once its attempts were spent, in its
//! place once, before it left the store; its parts lie side by side or, where no batch holds them, each
//! once, in their order, and in the store before; each row's changes are in
//! their order, around truncates and over all streams too, and all those of a stream that were never held
//! are in commit order; what S2 had acknowledged and has forgotten comes again, or an
//! operator is asked; nothing is in a stream that was not committed; Postgres is never told to forget
//! what is not safe, nor is more spilled than may be; a process with another state folder writes nothing;
//! and none goes on and on while its clock stands still. When the faults end, all
//! that does not fail gets through; and once the rest is mended, all of it comes to rest, with nothing
//! left in the store, no reason to complain, every byte of the budget given back, and nothing written any
//! more. Between any two events, what the driver counts is what is there (`pipeline::driver::invariants`).
//!
//! Operators do what they may: they retry and give up, choose what becomes of records that are gone, take a
//! stream over from another program, and begin with an empty folder where the right one is lost
//! (`--abandon-parked`). Then, and only then, what that folder alone held may be missing, and what Postgres
//! had not been told comes twice; and a process that stood still with that folder may get more into routed
//! streams, out of order with the rest, until the new store has opened them.
//!
//! [`exactly_once`](crate::pipeline::exactly_once) is the argument that all this follows.
//!
//! It lives beside the unit tests, and not in `tests/`, because the [switches](crate::mutation) that
//! break the driver's rules exist only where the crate itself is compiled for tests. `tests` shows that
//! each of them is found out.

mod checks;
mod faults;
mod folders;
mod judge;
mod letters;
mod mirror;
mod network;
mod older;
mod operator;
mod postgres;
mod process;
mod routes;
mod streams;
mod tables;
mod tests;
mod workload;
mod world;

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use tokio::time::sleep;

use crate::mutation::{self, Rule};
use crate::pipeline::grants::Grants;
use crate::sink::limits::{self, Limits};
use crate::store::Tokens;
use faults::Fault;
use world::{STREAM, World, lock};

/// How long a world without faults may take to come to rest.
const REST_TIME: Duration = Duration::from_secs(180);

/// How long a pipeline is looked at that has nothing to do.
const QUIET_TIME: Duration = Duration::from_secs(3);

/// So often that is looked for.
const QUIET_LOOKS: u32 = 4;

/// How a run went.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    /// Of everything that happened, in order.
    hash: u64,
    events: u64,
    changes: usize,
    processes: u64,
    /// The first promise that was broken.
    violation: Option<String>,
}

/// Runs one seed, with a rule broken or none.
fn run(seed: u64, broken: Option<Rule>, verbose: bool) -> Run {
    mutation::set(broken);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without threads can be made");
    let run = runtime.block_on(async {
        let world = World::new(seed, verbose);
        limits::set(world.workload.limits);
        let processes = live(&world).await;
        let state = world.state();
        let events = state.events;
        drop(state);
        Run {
            hash: world.hash(),
            events,
            changes: world.workload.by_position.len(),
            processes,
            violation: world.violation(),
        }
    });
    drop(runtime);
    mutation::set(None);
    limits::set(Limits::S2);
    run
}

/// Runs a world until it has come to rest, or a promise is broken. Says how many processes it took.
async fn live(world: &Arc<World>) -> u64 {
    tokio::spawn(others(Arc::clone(world)));
    let mut number = 0;
    let started = tokio::time::Instant::now();
    let calm = started + Duration::from_millis(world.workload.calm_ms);
    let mut rested = std::pin::pin!(async {
        tokio::time::sleep_until(calm).await;
        world.calm();
        if let Some(unrest) = rest(world).await {
            return Some(unrest);
        }
        world.mend();
        if let Some(unrest) = rest(world).await {
            return Some(unrest);
        }
        quiet(world).await;
        None
    });
    loop {
        number += 1;
        world.put_back(number);
        if folders::mistake(world, number).await {
            number += 1;
        }
        if world.fault(Fault::WrongFolder, 0.5) {
            folders::keep_copy(world, number);
        }
        let running = process::start(world, number);
        let bother = running.bothered(world);
        let over = tokio::select! {
            biased;
            () = running.end(world) => None,
            unrest = &mut rested => Some(unrest),
        };
        bother.abort();
        if world.violation().is_some() {
            return number;
        }
        if let Some(unrest) = over {
            if let Some(unrest) = unrest {
                let time = REST_TIME.as_secs();
                world.violated(format!("no rest {time} s after the last fault: {unrest}"));
            }
            break;
        }
        sleep(world.between(0, 1500)).await;
    }
    judge::judge(world);
    let process = world.state().process.take();
    if let Some(process) = process {
        process.kill();
    }
    number
}

/// Waits until a world without faults has come to rest. Says what does not, after [`REST_TIME`]; where
/// attempts have an end, after the last record: messages of a group spend theirs one behind the other.
async fn rest(world: &World) -> Option<String> {
    let mut began = tokio::time::Instant::now();
    let has_end = world.workload.dead_letters.is_some();
    let mut landed = 0;
    loop {
        let count = world.state().history.len();
        if has_end && count > landed {
            (began, landed) = (tokio::time::Instant::now(), count);
        }
        let unrest = judge::unrest(world)?;
        if world.violation().is_some() {
            return None;
        }
        if began.elapsed() >= REST_TIME {
            return Some(unrest);
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// Looks at a world that has come to rest: what has nothing to do writes nothing, once the end of the log is
/// in a checkpoint and what broke a session long ago has been noticed.
async fn quiet(world: &World) {
    let mut written = 0;
    for _ in 0..QUIET_LOOKS {
        let before = world.state().store.transactions;
        sleep(QUIET_TIME).await;
        written = world.state().store.transactions - before;
        if written == 0 {
            return;
        }
    }
    world.violated(format!("with nothing to do, {written} transactions are written"));
}

/// Everybody else who does something to the stream.
async fn others(world: Arc<World>) {
    loop {
        sleep(world.between(5, 300)).await;
        world.copy_s2();
        if world.fault(Fault::Outage, 0.05) && !world.is_away() {
            world.away(world.between(500, 15_000));
        }
        if world.fault(Fault::Expire, 0.05) {
            world.expire(world.a_stream());
        }
        if world.fault(Fault::Recreate, 0.02) {
            world.delete(STREAM, true);
        }
        let stream = world.a_stream();
        if stream == STREAM {
            if world.fault(Fault::Shut, 0.1) {
                world.shut(stream);
            }
        } else {
            if world.fault(Fault::Delete, 0.1) {
                world.delete(stream, world.chance(0.5));
            }
            if world.fault(Fault::Shut, 0.3) {
                world.shut(stream);
                // What waits for it has been overtaken by what is in other streams.
                if world.fault(Fault::Outage, 0.2) && !world.is_away() {
                    sleep(world.between(5, 3000)).await;
                    world.away(world.between(500, 15_000));
                }
            }
        }
        if world.streams().len() > 1 && world.chance(0.02) {
            world.create_missing();
        }
        if world.fault(Fault::Foreign, 0.5) && lock(&world.server).append_plain(stream, "foreign") {
            world.landed(0);
            world.event("foreign", 0, 0);
        }
        if world.fault(Fault::Fencer, 0.03) {
            world.fence(stream);
        }
        if world.fault(Fault::Intruder, 0.05) {
            intrude(&world).await;
        }
    }
}

/// A pipeline with a store of its own wants the stream. Once it is ours, it has to stay out.
async fn intrude(world: &Arc<World>) {
    use crate::pipeline::link::{Opening, establish};
    let stream = world.a_stream();
    let ours = !lock(&world.server).token(stream).is_empty();
    let process = process::stranger();
    let number = world.draw(|rng| rng.random_range(1..100));
    let named = crate::sink::error::Named::Route;
    let opening = Opening {
        client: process::client(world, &process).for_stream(stream, named).expect("it is a name"),
        store: process::store_of_its_own(),
        routed: None,
        pipeline_id: "intruder".to_owned(),
        read_from: None,
        reached: 0,
        tokens: Tokens { next: format!("sb-intruder-{number}"), known: Vec::new(), reached: 0 },
        grants: Grants::default(),
        least: crate::sink::Guarantee::ExactlyOnce,
        promised: None,
        numbers: true,
    };
    if ours {
        let entered = establish(opening).await.is_ok();
        world.note("intruder", number, u64::from(entered));
        if entered {
            world.violated(format!("another pipeline got {stream} while it was ours"));
        }
    }
}
