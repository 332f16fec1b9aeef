//! Whether the task that owns the pipeline still turns, looked at from outside of it.
//!
//! [`stuck`](super::stuck) judges the pipeline's parts, and the driver itself does the looking. Where the
//! driver stands still (a lock that two want, an answer that never comes and is waited for without a
//! limit), nobody would say so: what it published last would be shown for ever, and the database would
//! keep its log. So the driver *beats* with each turn, five times a second at least, and a thread that
//! shares nothing else with it looks on, outside of the runtime, which may be what stands still:
//!
//! ```text
//! turning ── no beat for the given time ▶ stuck_driver ── nor for as long again ▶ the process ends
//!    ▲                                        │
//!    └───────────────── a beat ◀──────────────┘
//! ```
//!
//! There is nothing smaller to begin anew than the process. What every other part needs, which change
//! waits for what, is in the driver's own memory, and half a step of it was taken. To end is safe: it is
//! what `kill -9` does, and [`exactly_once`](super::exactly_once) holds through that at any moment. And
//! it is better than to stand: whoever supervises the process starts it again, sees the exit code
//! [`EXIT_CODE`], and counts how often.
//!
//! The thread takes no lock and writes to nobody before it ends the process, except for a line in the
//! log, which it has another thread write: a log that nobody reads may be what the driver waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::control::{Reason, Status, StuckView};

/// What ends by itself because it stood still ends with this: `EX_SOFTWARE` of sysexits.h. No command
/// ends with it otherwise.
pub const EXIT_CODE: u8 = 70;

/// The word for machines.
pub const CODE: &str = "stuck_driver";

/// The word for the driver where [parts](super::stuck::Part) are named.
pub const PART: &str = "driver";

/// A turn takes milliseconds; on a machine that swaps, seconds. Never shorter than this, whatever
/// `delivery.stuck_after` says, because what follows is the end of the process.
pub const AFTER_MIN: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// How often the thread looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// No more than this of the time between two looks counts: the thread itself was kept from looking, as
/// the whole process was.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// How long the log may take for the last line.
const LAST_WORD_MAX: Duration = Duration::from_secs(1);

/// The driver's end. When it is gone, nobody waits for a beat any more.
#[derive(Debug)]
pub struct Beat(Arc<Shared>);

/// The end of those who look.
#[derive(Clone, Debug)]
pub struct Heart(Arc<Shared>);

/// Both ends, for one driver.
#[must_use]
pub fn heartbeat() -> (Beat, Heart) {
    let shared = Arc::<Shared>::default();
    (Beat(Arc::clone(&shared)), Heart(shared))
}

#[derive(Debug, Default)]
struct Shared {
    beats: AtomicU64,
    over: AtomicBool,
    /// For how long it has stood still, once that is too long.
    stalled_seconds: AtomicU64,
}

impl Beat {
    /// The driver turns.
    pub fn beat(&self) {
        self.0.beats.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

impl Heart {
    /// For how long the driver has stood still, where that is too long. Takes no lock.
    #[must_use]
    pub fn stalled(&self) -> Option<Duration> {
        let seconds = self.0.stalled_seconds.load(Ordering::Relaxed);
        (seconds > 0).then(|| Duration::from_secs(seconds))
    }

    /// Adds to what the driver published last that it stands still, where it does.
    pub fn look_at(&self, status: &mut Status) {
        let Some(stalled) = self.stalled() else { return };
        let part = PART.to_owned();
        status.ready = false;
        status.stuck.push(StuckView { part: part.clone(), seconds: stalled.as_secs() });
        status.reasons.insert(0, Reason { part, code: CODE.to_owned(), text: TEXT.to_owned() });
    }

    /// Watches from a thread of its own until the driver has ended. What gets no beat for `after` is
    /// said, and after the same time again `give_up` is called, once.
    ///
    /// # Errors
    ///
    /// When there can be no thread.
    pub fn watch(
        &self,
        after: Duration,
        give_up: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<()> {
        let Self(shared) = self.clone();
        let look = move || {
            let mut judge = Judge::new(after);
            while !shared.over.load(Ordering::Relaxed) {
                match judge.look(Instant::now(), shared.beats.load(Ordering::Relaxed)) {
                    Verdict::Turns { stood } => {
                        shared.stalled_seconds.store(0, Ordering::Relaxed);
                        if let Some(stood) = stood {
                            let seconds = stood.as_secs();
                            say(move || tracing::info!(seconds, "the pipeline turns again"));
                        }
                    }
                    Verdict::Quiet => {}
                    Verdict::Stands { stalled, is_news } => {
                        let seconds = stalled.as_secs().max(1);
                        shared.stalled_seconds.store(seconds, Ordering::Relaxed);
                        if is_news {
                            say(move || tracing::error!(part = PART, seconds, "stuck: {TEXT}"));
                        }
                    }
                    Verdict::Over { stalled } => {
                        let seconds = stalled.as_secs();
                        let told = say(move || {
                            tracing::error!(
                                part = PART,
                                seconds,
                                code = EXIT_CODE,
                                "still stuck: this process ends, to be started again"
                            );
                        });
                        told.recv_timeout(LAST_WORD_MAX).unwrap_or_default();
                        give_up();
                        return;
                    }
                }
                std::thread::sleep(LOOK_INTERVAL);
            }
        };
        std::thread::Builder::new().name("heartbeat".to_owned()).spawn(look).map(drop)
    }
}

/// What an operator reads.
pub const TEXT: &str = "\
    the task that owns the pipeline stands still, which is a defect of Sluicebox: nothing is delivered, \
    and what is shown beside this is from before. If it does not move, the process ends by itself with \
    code 70, so that whoever supervises it starts it again; a restart goes on where it stood, and nothing \
    is lost or sent twice";

/// Has a thread of its own write to the log. It is gone from the receiver's other end once that is done.
fn say(line: impl FnOnce() + Send + 'static) -> std::sync::mpsc::Receiver<()> {
    let (done, told) = std::sync::mpsc::channel::<()>();
    let spawned = std::thread::Builder::new().name("last word".to_owned()).spawn(move || {
        line();
        drop(done);
    });
    // Without a thread there is no line; the end itself does not depend on it.
    drop(spawned);
    told
}

/// What a look has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It has turned since the last look. It had stood for so long where that was said.
    Turns {
        stood: Option<Duration>,
    },
    /// Not since the last one, and not for too long.
    Quiet,
    Stands {
        stalled: Duration,
        is_news: bool,
    },
    /// It has stood still for that long a second time.
    Over {
        stalled: Duration,
    },
}

/// Pure: it is told the time and the number of beats.
struct Judge {
    after: Duration,
    looked_at: Option<Instant>,
    beats: u64,
    stalled: Duration,
}

impl Judge {
    fn new(after: Duration) -> Self {
        Self { after, looked_at: None, beats: 0, stalled: Duration::ZERO }
    }

    fn look(&mut self, now: Instant, beats: u64) -> Verdict {
        let passed = self.looked_at.map(|last| now.saturating_duration_since(last));
        self.looked_at = Some(now);
        let was = self.stalled;
        // Before the first beat there is nothing that could stand still.
        if beats == 0 || beats != self.beats {
            (self.beats, self.stalled) = (beats, Duration::ZERO);
            return Verdict::Turns { stood: (was >= self.after).then_some(was) };
        }
        self.stalled += passed.unwrap_or_default().min(LOOK_MAX);
        let stalled = self.stalled;
        if stalled >= self.after * 2 {
            Verdict::Over { stalled }
        } else if stalled >= self.after {
            Verdict::Stands { stalled, is_news: was < self.after }
        } else {
            Verdict::Quiet
        }
    }
}

/// Where tests have the driver stand still. In the product there is no such place.
#[cfg(test)]
pub(crate) mod fault {
    use std::sync::atomic::{AtomicU8, Ordering};

    /// How it stands still.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(u8)]
    pub(crate) enum Hang {
        /// It waits for what never comes.
        Await = 1,
        /// It has its thread, and does not give it back.
        Block = 2,
    }

    static HANG: AtomicU8 = AtomicU8::new(0);

    /// From its next turn on.
    pub(crate) fn set(hang: Hang) {
        HANG.store(hang as u8, Ordering::Relaxed);
    }

    /// Does not come back where it was told so.
    pub(crate) async fn hang() {
        match HANG.load(Ordering::Relaxed) {
            1 => std::future::pending().await,
            2 => loop {
                std::thread::park();
            },
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
