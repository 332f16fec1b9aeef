//! Writes letters away from the driver's task: a row may have a hundred megabytes, and a disk its moods.
//!
//! ```text
//! Writer ── Task ──▶ a thread of its own ──▶ records, or lines in a file     in the product
//!           Task ──▶ whoever made the writer         in the simulation: late, cut, or never
//! ```

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::file::{self, Appended, Line, Medium};
use super::{Error, Letter};
use crate::config::LetterPlace;
use crate::message::{Envelope, idempotency_key};
use crate::pipeline::size_gate::SizedRecord;
use crate::transform::Chain;

/// Hands letters over to be written.
#[derive(Clone)]
pub struct Writer {
    hand_over: Arc<dyn Fn(Task) + Send + Sync>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

/// Letters, written.
#[derive(Debug)]
pub enum Written {
    Records(Vec<(Letter, Vec<SizedRecord>)>),
    /// They are in the file.
    InFile(Vec<Letter>, Appended),
}

/// Letters to be written. Dropped without an answer, it reads as a defect of whoever had it.
#[derive(Debug)]
pub struct Task {
    letters: Vec<Letter>,
    place: LetterPlace,
    known: u64,
    envelope: Arc<Envelope>,
    chain: Arc<Chain>,
    answer: oneshot::Sender<Result<Written, String>>,
}

impl Writer {
    /// Writes on threads of the runtime.
    #[must_use]
    pub fn start() -> Self {
        Self::over(|task| drop(tokio::task::spawn_blocking(move || task.carry_out())))
    }

    /// A writer whose tasks go to `hand_over`, which sees to it that each is carried out.
    pub fn over(hand_over: impl Fn(Task) + Send + Sync + 'static) -> Self {
        Self { hand_over: Arc::new(hand_over) }
    }

    /// Writes letters to where they go, of which the file is `known` up to there. Gives what they take,
    /// and what comes of them.
    pub fn write(
        &self,
        letters: Vec<Letter>,
        place: LetterPlace,
        known: u64,
        envelope: Arc<Envelope>,
        chain: Arc<Chain>,
    ) -> (HashMap<u64, usize>, impl Future<Output = Result<Written, String>> + use<>) {
        let bytes = |letter: &Letter| (letter.message, letter.change.bytes());
        let at_work = letters.iter().map(bytes).collect();
        let (answer, answered) = oneshot::channel();
        (self.hand_over)(Task { letters, place, known, envelope, chain, answer });
        let written = async move {
            let broken = |_| Err("writing dead letters broke off, which is a defect".to_owned());
            answered.await.unwrap_or_else(broken)
        };
        (at_work, written)
    }
}

impl Task {
    /// Writes them, and answers.
    pub fn carry_out(self) {
        self.carry_out_on(file::open);
    }

    /// The same, with the file opened by somebody else.
    pub fn carry_out_on<M: Medium>(self, open: impl FnOnce(&Path) -> Result<M, std::io::Error>) {
        let Self { letters, place, known, envelope, chain, answer } = self;
        let failed = |error: Error| error.to_string();
        let written = match &place {
            LetterPlace::Stream(name) => {
                let write = |letter: Letter| {
                    let records = letter.records(name, &envelope, &chain).map_err(failed)?;
                    Ok((letter, records))
                };
                letters.into_iter().map(write).collect::<Result<_, _>>().map(Written::Records)
            }
            LetterPlace::File(path) => {
                let line = |letter: &Letter| {
                    let key = idempotency_key(letter.change.position);
                    let text = letter.text(&envelope, &chain).map_err(failed)?;
                    Ok(Line { key, text })
                };
                let lines: Result<Vec<Line>, String> = letters.iter().map(line).collect();
                lines.and_then(|lines| {
                    let pipeline = &envelope.settings().pipeline_id;
                    let appended = open(path)
                        .and_then(|mut file| file::append(&mut file, known, pipeline, &lines));
                    let appended = appended.map_err(|error| {
                        let path = path.display();
                        format!("could not write the dead letters' file {path}: {error}")
                    })?;
                    Ok(Written::InFile(letters, appended))
                })
            }
        };
        // Whoever asked may be gone.
        drop(answer.send(written));
    }
}
