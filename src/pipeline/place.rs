//! Where a record lies: in which stream of the pipeline, and under which number. Plain data.

use std::collections::BTreeMap;

/// Names a stream for as long as anything of it is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId(pub u32);

impl LaneId {
    /// The pipeline's own stream.
    pub const OWN: Self = Self(0);
}

/// A record that a stream holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landed {
    pub lane: LaneId,
    pub seq: u64,
}

/// The lowest number of each stream: what a restart has to read again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Floors {
    own: Option<u64>,
    routed: BTreeMap<LaneId, u64>,
}

impl Floors {
    pub fn add(&mut self, landed: Landed) {
        let Landed { lane, seq } = landed;
        if lane == LaneId::OWN {
            self.own = Some(self.own.map_or(seq, |own| own.min(seq)));
        } else {
            let floor = self.routed.entry(lane).or_insert(seq);
            *floor = seq.min(*floor);
        }
    }

    /// Of one stream, if it has any.
    #[must_use]
    pub fn of(&self, lane: LaneId) -> Option<u64> {
        if lane == LaneId::OWN { self.own } else { self.routed.get(&lane).copied() }
    }

    /// Takes the lower of both for each stream.
    pub fn merge(&mut self, other: &Self) {
        if let Some(seq) = other.own {
            self.add(Landed { lane: LaneId::OWN, seq });
        }
        for (&lane, &seq) in &other.routed {
            self.add(Landed { lane, seq });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stream_has_its_own_floor() {
        let at = |lane, seq| Landed { lane: LaneId(lane), seq };
        let mut floors = Floors::default();
        for landed in [at(0, 7), at(1, 3), at(0, 5), at(1, 4)] {
            floors.add(landed);
        }
        let mut other = Floors::default();
        other.add(at(1, 2));
        other.add(at(0, 9));
        floors.merge(&other);
        assert_eq!([0, 1, 2].map(|lane| floors.of(LaneId(lane))), [Some(5), Some(2), None]);
    }
}
