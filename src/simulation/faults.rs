//! What may go wrong in a run, and which of it a seed draws.

use rand::RngExt as _;
use rand::rngs::SmallRng;

use super::routes::Wanted;

/// A fault that a run may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The process dies, at any event.
    Crash,
    /// The process stands still while another one takes over, and wakes up later.
    Freeze,
    /// An operator stops it in order.
    Shutdown,
    /// Nothing listens at S2.
    Refuse,
    /// A connection breaks, before or after what was on it landed.
    Cut,
    /// An answer never comes.
    Lose,
    /// Something is under way for many seconds, and lands when nobody expects it any more.
    Late,
    /// S2 answers with an error of its own.
    Status,
    /// S2 says that it is about to stop.
    Advise,
    /// The whole of S2 is slow.
    Slow,
    /// S2 is away for a while: connections break, and nothing listens.
    Outage,
    /// Records of a stream expire.
    Expire,
    /// The pipeline's own stream is deleted and created again.
    Recreate,
    /// A stream that messages are routed to is deleted, and perhaps created again later.
    Delete,
    /// Such a stream is not there from the start.
    Missing,
    /// A stream, alone, is being deleted or away for a while; or forbidden, where it is such a one.
    Shut,
    /// S2 refuses a batch that is in order.
    RefuseRecord,
    /// The disk of the store is full.
    DiskFull,
    /// A process is started with an empty folder, or with an old copy.
    WrongFolder,
    /// The clock of the machine is set, between two processes.
    ClockJump,
    /// Somebody else appends to a stream.
    Foreign,
    /// Another pipeline wants a stream.
    Intruder,
    /// Another program fences a stream.
    Fencer,
    /// The state folder is lost.
    LoseStore,
    /// An operator grants what nobody asked for.
    Grants,
    /// The connection to Postgres breaks; it starts again at what was confirmed, or at less.
    Disconnect,
    /// The file of dead letters cannot be written, or only in part.
    Letters,
    /// A transform takes seconds.
    SlowTransform,
    /// The chain changes: a mend appears or disappears.
    Reload,
    /// An operator retries and gives up.
    Operator,
}

const COUNT: usize = Fault::Operator as usize + 1;

/// What shows something only together. Each of these is drawn whole now and then, so that how soon it
/// shows does not hang on what else is drawn.
const TOGETHER: [Together; 2] = [
    // How far an operator skips, and a process that dies soon after it has gone on.
    Together { faults: &[Fault::Expire, Fault::Recreate, Fault::Crash, Fault::Late], moves: false },
    // A routed stream that cannot be read, with something in it that now goes elsewhere.
    Together { faults: &[Fault::Shut, Fault::Crash, Fault::Cut, Fault::Reload], moves: true },
];

struct Together {
    faults: &'static [Fault],
    /// From one chain to the next, transforms route to other streams.
    moves: bool,
}

/// How much of which faults a run has.
#[derive(Debug)]
pub(super) struct Faults {
    /// Zero for what it has not.
    weights: [f64; COUNT],
    pub(super) wanted: Wanted,
}

impl Faults {
    pub(super) fn draw(rng: &mut SmallRng) -> Self {
        // Each run has some kinds of faults and not others, so that none hides what another one shows.
        let mut weights = [0.0; COUNT];
        for weight in &mut weights {
            if rng.random_bool(0.5) {
                *weight = rng.random_range(0.1..1.0_f64).powi(2);
            }
        }
        // With these, a record may be gone or come twice by an operator's decision: few runs have them,
        // and all others are judged without exception. Whoever deletes a stream opens it to anybody.
        for rare in [Fault::Expire, Fault::Recreate, Fault::Delete, Fault::LoseStore] {
            if rng.random_bool(0.8) {
                weights[rare as usize] = 0.0;
            }
        }
        let mut moves = false;
        for together in TOGETHER {
            if rng.random_bool(0.08) {
                for &fault in together.faults {
                    weights[fault as usize] = rng.random_range(0.3..1.0);
                }
                moves |= together.moves;
            }
        }
        if weights[Fault::Recreate as usize] + weights[Fault::Delete as usize] > 0.0 {
            weights[Fault::Intruder as usize] = 0.0;
        }
        Self { weights, wanted: Wanted { moves, all: false } }
    }

    /// In this run S2 is put back to an older state, between two processes; so there have to be several, and
    /// streams that take nothing meanwhile.
    pub(super) fn with_older_states(&mut self, wanted: Wanted) {
        for wanted in [Fault::Crash, Fault::Shutdown, Fault::Shut] {
            let weight = &mut self.weights[wanted as usize];
            *weight = weight.max(0.4);
        }
        // Of what a lost store knew, nobody is told; an older state may be anybody's; and what others append
        // hides how much is gone.
        for without in [Fault::LoseStore, Fault::Intruder, Fault::Foreign, Fault::Fencer] {
            self.weights[without as usize] = 0.0;
        }
        self.wanted = Wanted { moves: self.wanted.moves || wanted.moves, all: wanted.all };
    }

    pub(super) fn weight(&self, fault: Fault) -> f64 {
        self.weights[fault as usize]
    }
}
