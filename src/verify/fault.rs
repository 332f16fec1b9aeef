//! What can be wrong with a stream, counted, with a few examples of each.

use serde::Serialize;

/// A kind of fault, in the order in which the kinds are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    /// A row of the table, or a part of a split message, that is not in the stream.
    Missing,
    /// The same change and part twice.
    Doubled,
    /// A change that comes after a later one of its group.
    Disordered,
    /// A record over S2's limit.
    Oversize,
    /// The stream says something else than the table, or contradicts itself.
    Different,
    /// Headers and message that disagree, or no message at all.
    Malformed,
}

impl Fault {
    pub const ALL: [Self; 6] = [
        Self::Missing,
        Self::Doubled,
        Self::Disordered,
        Self::Oversize,
        Self::Different,
        Self::Malformed,
    ];

    /// What follows the number of such faults.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Missing => "missing from the stream",
            Self::Doubled => "in the stream twice",
            Self::Disordered => "out of order within a group",
            Self::Oversize => "over S2's limit of a record",
            Self::Different => "different from the table",
            Self::Malformed => "not as Sluicebox writes records",
        }
    }
}

/// How many of a fault are shown; the count tells the rest.
const EXAMPLES_MAX: usize = 5;

/// The faults of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    pub fault: Fault,
    pub count: u64,
    /// The first few, with keys; with values only where those were asked for.
    pub examples: Vec<String>,
}

/// All faults that were found.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Faults(Vec<Found>);

impl Faults {
    pub fn add(&mut self, fault: Fault, example: impl FnOnce() -> String) {
        let known = self.0.iter().position(|found| found.fault == fault);
        let index = known.unwrap_or_else(|| {
            self.0.push(Found { fault, count: 0, examples: Vec::new() });
            self.0.len() - 1
        });
        let found = &mut self.0[index];
        found.count += 1;
        if found.examples.len() < EXAMPLES_MAX {
            found.examples.push(example());
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are, of all kinds.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().map(|found| found.count).sum()
    }

    /// The faults of a kind, where there are any.
    #[must_use]
    pub fn of(&self, fault: Fault) -> Option<&Found> {
        self.0.iter().find(|found| found.fault == fault)
    }
}
