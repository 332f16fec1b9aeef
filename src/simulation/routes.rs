//! Streams beside the pipeline's own, and which changes the transforms route there.

use rand::RngExt as _;
use rand::rngs::SmallRng;

use super::letters;
use super::tables::ID;
use super::workload::Planned;
use super::world::STREAM;

/// The streams that changes may be routed to.
pub(super) const ROUTED: [&str; 3] = ["far", "left", "right"];

/// The name of a stream that is one of the world's.
pub(super) fn stream(name: &str) -> Option<&'static str> {
    [STREAM, letters::STREAM].into_iter().chain(ROUTED).find(|stream| *stream == name)
}

/// The same of one beside the pipeline's own.
pub(super) fn beside_own(name: &str) -> Option<&'static str> {
    stream(name).filter(|stream| *stream != STREAM)
}

/// Where a change goes. A chain of an odd number may route it elsewhere than one of an even number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Route([Option<&'static str>; 2]);

impl Route {
    /// What transforms of this chain say; nothing where they leave it as it is.
    pub(super) fn by(self, generation: u64) -> Option<&'static str> {
        self.0[usize::from(generation % 2 == 1)]
    }

    /// The stream in which it has to be when a chain of this number has made its records.
    pub(super) fn stream(self, generation: u64) -> &'static str {
        self.by(generation).unwrap_or(STREAM)
    }

    /// Every stream in which it may be.
    pub(super) fn streams(self) -> impl Iterator<Item = &'static str> {
        (0..2).map(move |generation| self.stream(generation))
    }

    /// Whether some chain routes it to another stream than the pipeline's own.
    pub(super) fn leaves(self) -> bool {
        self.0.iter().flatten().any(|name| *name != STREAM)
    }
}

/// By what changes are routed in a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Habit {
    by: By,
    /// Streams that are in use, the pipeline's own among them.
    streams: usize,
    /// Chains of odd and of even numbers differ.
    moves: bool,
    /// Nothing stays in the pipeline's own stream.
    all: bool,
}

/// What habits of a run are not left to chance.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    pub(super) moves: bool,
    pub(super) all: bool,
}

#[derive(Clone, Copy, Debug)]
enum By {
    /// All changes of a row go to one stream.
    Key,
    /// A row's changes move from stream to stream.
    Chance,
    Action,
}

impl Habit {
    pub(super) fn draw(rng: &mut SmallRng, Wanted { moves, all }: Wanted) -> Self {
        Self {
            by: [By::Key, By::Chance, By::Chance, By::Action][rng.random_range(0..4)],
            streams: rng.random_range(2..=ROUTED.len() + 1),
            moves: moves || rng.random_bool(0.6),
            all,
        }
    }

    pub(super) fn route(self, rng: &mut SmallRng, planned: &Planned) -> Route {
        let change = &planned.change;
        let number = match self.by {
            By::Key => {
                let id = change.row().and_then(|row| row.text(ID)).unwrap_or_default();
                id.iter().fold(0, |sum, digit| sum + usize::from(*digit))
            }
            By::Chance => rng.random_range(0..self.streams),
            By::Action => change.action as usize,
        };
        let named = rng.random_bool(0.5);
        let name = |number: usize| match number % self.streams {
            // By its name, or not routed at all.
            0 if self.all => Some(ROUTED[0]),
            0 => named.then_some(STREAM),
            number => Some(ROUTED[number - 1]),
        };
        let moved = if self.moves { number + 1 } else { number };
        Route([name(number), name(moved)])
    }
}
