//! Whether a part of the pipeline stands still although it has something to do. Pure: it is told what
//! each part is doing and when, and answers what to say and whom to begin anew.
//!
//! A part is *stuck* when it had work for [`Stuck`]'s time and nothing of it got done. What does not
//! count:
//!
//! - no work: an idle pipeline is not stuck;
//! - trouble that has a name of its own already, such as an S2 that does not answer. The time stops
//!   meanwhile and is not forgotten, so that a part that falls from one trouble into the next without
//!   ever getting anything done is found all the same;
//! - time in which nobody looked, because the process itself stood still.
//!
//! What is stuck is begun anew where that can be done, at once and then after ever longer times: the
//! pause between two attempts doubles, since something that is merely slow must not be kept from
//! finishing by being begun again and again.

use std::time::{Duration, Instant};

/// What can stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Postgres has more WAL than it has sent.
    Source,
    /// No change comes back from the transforms.
    Transform,
    /// Records wait for S2, or the stream is not opened.
    Sink,
    /// A request to the message store is not answered.
    Store,
    /// Something is unfinished, and none of the other parts has it.
    Pipeline,
}

impl Part {
    /// In the order in which a change passes them.
    pub const ALL: [Self; 5] =
        [Self::Source, Self::Transform, Self::Sink, Self::Store, Self::Pipeline];

    /// The word in codes and metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Transform => "transform",
            Self::Sink => "sink",
            Self::Store => "store",
            Self::Pipeline => "pipeline",
        }
    }

    /// What an operator reads: what does not move, what is done about it, and where to look.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::Source => {
                "Postgres has more WAL for the slot and sends none of it. The connection is opened \
                 anew. If that does not help, the walsender is busy with a large transaction or waits \
                 for something: look at its row in pg_stat_activity (backend_type = 'walsender'; \
                 wait_event, state) and at the server's log"
            }
            Self::Transform => {
                "no change comes back from the transforms, although each call has a limit. Nothing is \
                 lost or confirmed; `sluicebox transforms list` names the modules, and a restart of \
                 Sluicebox begins what is there anew"
            }
            Self::Sink => {
                "S2 acknowledges none of the records that wait for it. The session is opened anew. If \
                 that does not help, look at what lies between here and S2, such as a proxy that does \
                 not let a session through (sink.mode = \"unary\" does without one), and at \
                 https://status.s2.dev"
            }
            Self::Store => {
                "the message store does not answer: its disk stands still. Nothing is confirmed to \
                 Postgres meanwhile; look at the disk of state.dir (dmesg, iostat), above all if it is \
                 on the network"
            }
            Self::Pipeline => {
                "something is unfinished that no part of the pipeline works on, which is a defect of \
                 Sluicebox. Nothing of it is lost or confirmed; a restart reads it again"
            }
        }
    }
}

/// What a part is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// It has nothing to do, or others keep it from doing it.
    Nothing,
    /// It has trouble that is known and shown.
    KnownTrouble,
    Working,
}

/// A look at a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    pub doing: Doing,
    /// Another number each time that something got done.
    pub progress: u64,
}

/// What became of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It stands still. To be said, and to be begun anew.
    Stuck { stalled: Duration },
    /// It still does. To be begun anew once more.
    Still { stalled: Duration },
    /// It goes on, or has nothing more to do.
    Moves { stalled: Duration },
}

/// No more than this of the time between two looks counts: whoever looks was kept from it.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// Pauses between attempts double so many times.
const DOUBLINGS_MAX: u32 = 4;

/// The judge of all parts.
#[derive(Debug)]
pub struct Stuck {
    after: Duration,
    looked_at: Option<Instant>,
    parts: [Watched; Part::ALL.len()],
}

#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    progress: u64,
    /// With work and without progress.
    stalled: Duration,
    /// When it is begun anew next, as `stalled` goes.
    next: Duration,
    attempts: u32,
    is_stuck: bool,
}

impl Stuck {
    /// Stuck is what gets nothing done for so long.
    #[must_use]
    pub fn new(after: Duration) -> Self {
        Self { after, looked_at: None, parts: [Watched::default(); Part::ALL.len()] }
    }

    /// Looks at each part, in the order of [`Part::ALL`].
    pub fn look(&mut self, now: Instant, looks: [Look; Part::ALL.len()]) -> Vec<(Part, News)> {
        let since = self.looked_at.replace(now).map(|last| now.saturating_duration_since(last));
        let passed = since.unwrap_or_default().min(LOOK_MAX);
        let mut news = Vec::new();
        for ((part, watched), look) in Part::ALL.into_iter().zip(&mut self.parts).zip(looks) {
            news.extend(watched.look(look, passed, self.after).map(|news| (part, news)));
        }
        news
    }

    /// What is stuck, and for how long it had work without getting any done.
    pub fn stuck(&self) -> impl Iterator<Item = (Part, Duration)> {
        let parts = Part::ALL.into_iter().zip(&self.parts);
        parts.filter(|(_, watched)| watched.is_stuck).map(|(part, watched)| (part, watched.stalled))
    }
}

impl Watched {
    fn look(&mut self, look: Look, passed: Duration, after: Duration) -> Option<News> {
        if look.doing == Doing::Nothing || look.progress != self.progress {
            let was = std::mem::replace(self, Self { progress: look.progress, ..Self::default() });
            return was.is_stuck.then_some(News::Moves { stalled: was.stalled });
        }
        if look.doing == Doing::KnownTrouble {
            return None;
        }
        self.stalled += passed;
        let stalled = self.stalled;
        if stalled < after.max(self.next) {
            return None;
        }
        self.next = stalled + after * 2_u32.pow(self.attempts.min(DOUBLINGS_MAX));
        self.attempts += 1;
        let is_news = !std::mem::replace(&mut self.is_stuck, true);
        Some(if is_news { News::Stuck { stalled } } else { News::Still { stalled } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Look = Look { doing: Doing::Nothing, progress: 0 };

    fn at(doing: Doing, progress: u64) -> Look {
        Look { doing, progress }
    }

    /// A sink that is looked at each second; what was said, and when.
    fn run(looks: impl IntoIterator<Item = Look>) -> Vec<(u64, &'static str)> {
        let mut stuck = Stuck::new(Duration::from_secs(10));
        let start = Instant::now();
        let mut said = Vec::new();
        for (second, sink) in (0..).zip(looks) {
            let now = start + Duration::from_secs(second);
            for (part, news) in stuck.look(now, [IDLE, IDLE, sink, IDLE, IDLE]) {
                assert_eq!(part, Part::Sink);
                let word = match news {
                    News::Stuck { .. } => "stuck",
                    News::Still { .. } => "still",
                    News::Moves { .. } => "moves",
                };
                said.push((second, word));
            }
            let shown = stuck.stuck().any(|(part, _)| part == Part::Sink);
            let last = said.last().is_some_and(|(_, word)| *word != "moves");
            assert_eq!(shown, last, "second {second}");
        }
        said
    }

    #[test]
    fn what_does_not_move_is_stuck_and_begun_anew_ever_more_rarely() {
        let said = run(std::iter::repeat_n(at(Doing::Working, 0), 400));
        let expected = [(10, "stuck"), (20, "still"), (40, "still"), (80, "still"), (160, "still")];
        assert_eq!(said[..5], expected);
        assert_eq!(said[5..], [(320, "still")], "the pause has a bound");
    }

    #[test]
    fn what_moves_now_and_then_is_not_stuck() {
        assert_eq!(run((0..200).map(|second| at(Doing::Working, second / 9))), []);
    }

    #[test]
    fn idling_is_not_standing_still() {
        let look = |second| at(if second % 10 == 9 { Doing::Nothing } else { Doing::Working }, 0);
        assert_eq!(run((0..200).map(look)), []);
    }

    #[test]
    fn known_trouble_is_no_alarm_and_does_not_hide_one() {
        assert_eq!(run(std::iter::repeat_n(at(Doing::KnownTrouble, 0), 400)), []);
        // Open for five seconds, in trouble for five, and never anything done.
        let look =
            |second| at(if second % 10 < 5 { Doing::Working } else { Doing::KnownTrouble }, 0);
        assert_eq!(run((0..30).map(look)), [(20, "stuck")]);
    }

    #[test]
    fn progress_ends_it_and_the_next_time_begins_anew() {
        let look = |second| at(Doing::Working, u64::from(second >= 25));
        let said = run((0..36).map(look));
        assert_eq!(said, [(10, "stuck"), (20, "still"), (25, "moves"), (35, "stuck")]);
        let look = |second| at(if second < 15 { Doing::Working } else { Doing::Nothing }, 0);
        assert_eq!(run((0..60).map(look)), [(10, "stuck"), (15, "moves")]);
    }

    #[test]
    fn a_process_that_stood_still_itself_blames_nobody() {
        let mut stuck = Stuck::new(Duration::from_secs(10));
        let start = Instant::now();
        let looks = [at(Doing::Working, 7); Part::ALL.len()];
        assert_eq!(stuck.look(start, looks), []);
        assert_eq!(stuck.look(start + Duration::from_secs(3600), looks), []);
        assert_eq!(stuck.stuck().count(), 0);
    }
}
