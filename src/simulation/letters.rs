//! Where dead letters go: a stream of their own, or a file that is cut, full, or lost from where it was
//! last synced.

use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine as _;
use rand::RngExt as _;
use rand::rngs::SmallRng;
use tokio::time::sleep;

use super::faults::Fault;
use super::judge::Ours;
use super::process::{Freezing, Process};
use super::world::{Landed, World};
use crate::change::Position;
use crate::config::{DeadLetters, LetterPlace};
use crate::pipeline::dead_letter::Facts;
use crate::pipeline::dead_letter::file::Medium;
use crate::pipeline::dead_letter::writer::Writer;
use crate::pipeline::item::{Item, Origin};

/// The stream of dead letters, where they go to one.
pub(super) const STREAM: &str = "dead";

/// The file, which counts as a stream whose numbers are places in it.
pub(super) const FILE: &str = "dead.jsonl";

/// Whether attempts have an end, and what comes then.
pub(super) fn draw(rng: &mut SmallRng) -> Option<DeadLetters> {
    rng.random_bool(0.35).then(|| DeadLetters {
        max_attempts: if rng.random_bool(0.5) { 1 } else { rng.random_range(2..5) },
        place: match rng.random_bool(0.5) {
            true => LetterPlace::Stream(STREAM.into()),
            false => LetterPlace::File(PathBuf::from(FILE)),
        },
    })
}

/// What is in the file.
#[derive(Debug, Default)]
pub(super) struct Paper {
    bytes: Vec<u8>,
    /// Up to here it outlasts a loss of power.
    synced: usize,
    /// Up to here it is known what is in it.
    read: usize,
}

impl Paper {
    /// The machine stops: of what was not synced, some may be there.
    pub(super) fn lose(&mut self, rng: &mut SmallRng) {
        let left = rng.random_range(self.synced..=self.bytes.len());
        self.bytes.truncate(left);
    }

    /// The letters that are new since this was last asked, of which each line is one.
    pub(super) fn news(&mut self) -> Vec<std::result::Result<Ours, String>> {
        let mut news = Vec::new();
        while let Some(end) = self.bytes[self.read..].iter().position(|byte| *byte == b'\n') {
            let (from, to) = (self.read, self.read + end);
            self.read = to + 1;
            let line = bytes::Bytes::copy_from_slice(&self.bytes[from..to]);
            let letter = position(&line).map(|position| Ours::in_file(from as u64, position, line));
            news.push(letter.ok_or_else(|| format!("the line at {from} of {FILE} is no letter")));
        }
        news
    }
}

/// Whose letter a text is; nothing where it is none.
pub(super) fn position(text: &[u8]) -> Option<Position> {
    #[derive(serde::Deserialize)]
    struct Text {
        dead_letter: Facts,
    }
    let Text { dead_letter } = serde_json::from_slice(text).ok()?;
    let key = base64::engine::general_purpose::STANDARD.decode(dead_letter.key).ok()?;
    super::judge::position_of(&key)
}

/// What is in the file is not tried once more, as if it were not.
pub(super) fn is_not_there(world: &World, process: &Process, item: &Item) {
    let position = item.change.position;
    let state = world.state();
    let is_of_store = matches!(item.origin, Origin::Store { .. });
    if !is_of_store || state.owner != process.number || !state.letters.contains(&position) {
        return;
    }
    let is_there = |landed: &Landed| {
        let is_ours = landed.process >= state.store_since;
        landed.stream == FILE && landed.ours.position == position && is_ours
    };
    let tried_again = state.history.iter().any(is_there);
    drop(state);
    if tried_again {
        world.violated(format!("{position} is tried once more, and its letter is in the file"));
    }
}

/// The file as one process has it open.
struct Pen {
    world: Arc<World>,
    process: Arc<Process>,
    at: usize,
    /// So many bytes are written before something happens.
    room: Option<usize>,
    /// What happens then: the process dies, or the disk is full.
    dies: bool,
}

impl Pen {
    fn over<T>(&self) -> Result<T> {
        if self.dies {
            self.world.note("crash at the letters", self.process.number, 0);
            self.process.kill();
        }
        Err(Error::from(ErrorKind::StorageFull))
    }
}

impl Read for Pen {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        let state = self.world.state();
        let count = state.paper.bytes.get(self.at..).unwrap_or_default().read(into)?;
        self.at += count;
        Ok(count)
    }
}

impl Seek for Pen {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let SeekFrom::Start(at) = to else { return Err(ErrorKind::Unsupported.into()) };
        self.at = usize::try_from(at).unwrap_or(usize::MAX);
        Ok(at)
    }
}

impl Write for Pen {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let count = self.room.map_or(bytes.len(), |room| room.min(bytes.len()));
        if count == 0 && !bytes.is_empty() {
            return self.over();
        }
        self.room = self.room.map(|room| room - count);
        self.world.state().paper.bytes.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Medium for Pen {
    fn length(&self) -> Result<u64> {
        Ok(self.world.state().paper.bytes.len() as u64)
    }

    fn cut(&mut self, length: u64) -> Result<()> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let paper = &mut self.world.state().paper;
        if length < paper.read {
            return Err(Error::other("a whole line is to be cut"));
        }
        paper.bytes.truncate(length);
        paper.synced = paper.synced.min(length);
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        if self.world.fault(Fault::Letters, 0.1) {
            return self.over();
        }
        {
            let paper = &mut self.world.state().paper;
            paper.synced = paper.bytes.len();
        }
        self.world.filed(self.process.number);
        // Its messages are still in the store, and only the file tells that they are letters.
        if self.world.fault(Fault::Crash, 0.5) {
            self.world.note("crash behind the letters", self.process.number, 0);
            self.world.state().letters_left = true;
            self.process.kill();
        }
        Ok(())
    }
}

/// What writes a process's letters. One that stood still writes none: nothing fences a file, and what it
/// was at when it stood still would be written when it wakes up.
pub(super) fn writer(world: &Arc<World>, process: &Arc<Process>) -> Writer {
    let (world, process) = (Arc::clone(world), Arc::clone(process));
    Writer::over(move |task| {
        let (of_world, owner) = (Arc::clone(&world), Arc::clone(&process));
        let writing = async move {
            let (world, process) = (of_world, owner);
            sleep(world.delay()).await;
            if world.fault(Fault::Letters, 0.3) {
                sleep(world.between(100, 3000)).await;
            }
            world.event("letters are to be written", process.number, 0);
            if !process.is_alive() || process.is_frozen() {
                return;
            }
            let fails = world.fault(Fault::Letters, 0.3);
            let pen = Pen {
                room: fails.then(|| world.draw(|rng| rng.random_range(0..4000))),
                dies: world.fault(Fault::Crash, 0.5),
                at: 0,
                world: Arc::clone(&world),
                process: Arc::clone(&process),
            };
            task.carry_out_on(|_| Ok(pen));
            world.event("letters are written", process.number, 0);
        };
        let writing = tokio::spawn(Freezing::new(&world, &process, writing));
        process.owns(writing.abort_handle());
    })
}
