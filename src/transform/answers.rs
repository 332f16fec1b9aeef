//! Any bytes as what a guest does with a message, without a guest: calls of the host's functions
//! with names, texts and sizes of its choice, and a verdict. For [`crate::fuzz`].

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use wasmtime::component::Resource;

use super::bindings::types::{Algorithm, Codec, HostChange as _, Verdict};
use super::limits::Limits;
use super::state::{GuestState, Logs, Message};
use super::verdict::{Shaped, apply};
use crate::case::{self, Sample};
use crate::message::{Draft, Envelope, EnvelopeSettings, header};
use crate::pipeline::item::Shaped as Sent;
use crate::pipeline::workers;
use crate::sink::record::RECORD_BYTES_MAX;

/// The bytes that are left.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        match self.0 {
            [first, rest @ ..] => {
                self.0 = rest;
                *first
            }
            [] => 0,
        }
    }

    /// Either one that the message has, or the next bytes as text.
    fn name(&mut self) -> String {
        match self.byte() % 8 {
            0 => "id".to_owned(),
            1 => "title".to_owned(),
            2 => "body".to_owned(),
            3 => "meta".to_owned(),
            _ => self.text(),
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = usize::from(self.byte()).min(self.0.len());
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        text.to_vec()
    }

    /// The boundary to a guest takes UTF-8 only.
    fn text(&mut self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    fn number(&mut self) -> u64 {
        u64::from(self.byte()) << (self.byte() % 57)
    }
}

/// Runs the script and checks what would be sent.
///
/// # Panics
///
/// Where a rule is broken, which is a defect.
pub fn fuzz_answers(bytes: &[u8]) {
    let mut script = Script(bytes);
    // Made once: the large one among them takes longer than a run.
    static SAMPLES: OnceLock<Vec<Sample>> = OnceLock::new();
    let samples = SAMPLES.get_or_init(case::built_in);
    let Some(sample) = samples.get(usize::from(script.byte()) % 6) else { return };
    let sample = sample.change.clone();
    let envelope = Arc::new(Envelope::new(EnvelopeSettings::default()));
    let name: Arc<str> = "10-fuzz.wasm".into();
    let logs = Logs::new(Arc::clone(&name), 1, Arc::default(), true);
    let mut state = GuestState::new(&Limits::default(), None, logs);
    state.deadline = Instant::now() + Duration::from_secs(60);
    state.message = Some(Message::new(Draft::new(sample, envelope)));
    for _ in 0..64 {
        if script.0.is_empty() {
            break;
        }
        // An error ends the call, as a trap does in a guest.
        if call(&mut state, &mut script).is_err() {
            return;
        }
    }
    let verdict = match script.byte() % 6 {
        0..=2 => Verdict::Keep,
        3 => Verdict::Drop,
        4 => {
            let count = script.byte() % 8;
            Verdict::Split((0..count).map(|_| script.text()).collect())
        }
        _ => Verdict::Parts(script.number()),
    };
    let message = state.message.take().expect("a message stays for as long as the call takes");
    let drafts = match apply(verdict, message, &name) {
        Ok(Shaped::Keep(message)) => vec![message.draft],
        Ok(Shaped::Drop) => Vec::new(),
        Ok(Shaped::Split(drafts)) => drafts,
        Err((fault, _)) => {
            assert!(!fault.reason.is_empty());
            return;
        }
    };
    let is_cut = drafts.len() > 1;
    let Sent::Records(records) = workers::gate(&drafts, Vec::new) else { return };
    for record in &records {
        assert!(record.metered_bytes() <= RECORD_BYTES_MAX);
        assert_eq!(record.metered_bytes(), record.record().metered_bytes());
        let body = std::str::from_utf8(&record.record().body).expect("a body is UTF-8");
        let json = serde_json::from_str::<serde::de::IgnoredAny>(body);
        assert!(is_cut || json.is_ok(), "a body is JSON");
        let headers = &record.record().headers;
        assert!(headers.iter().all(|header| !header.name.is_empty()), "no command to S2");
        let is_ours = |name: &[u8]| {
            name.get(..3).is_some_and(|start| start.eq_ignore_ascii_case(header::PREFIX.as_bytes()))
        };
        let ours = headers.iter().filter(|header| is_ours(header.name)).count();
        assert_eq!(ours, 6, "none of our headers is missing or there twice");
    }
}

fn call(state: &mut GuestState, script: &mut Script<'_>) -> wasmtime::Result<()> {
    let this = || Resource::new_borrow(0);
    match script.byte() % 20 {
        0 => drop(state.set(this(), script.name(), script.text())?),
        1 => drop(state.set_text(this(), script.name(), script.text())?),
        2 => drop(state.set_old(this(), script.name(), script.text())?),
        3 => drop(state.remove(this(), script.name())?),
        4 => drop(state.rename(this(), script.name(), script.name())?),
        5 => drop(state.annotate(this(), script.name(), script.text())?),
        6 => drop(state.append(this(), script.name(), script.text())?),
        7 => drop(state.annotation(this(), script.name())?),
        8 => drop(state.add_header(this(), script.text(), script.bytes())?),
        9 => drop(state.size(this())?),
        10 => drop(state.message(this())?),
        11 => drop(state.set_message(this(), script.text())?),
        12 => {
            let codec = if script.byte().is_multiple_of(2) { Codec::Zstd } else { Codec::Gzip };
            // The slow levels only cost time.
            drop(state.compress(this(), script.name(), codec, u32::from(script.byte() % 4))?);
        }
        13 => drop(state.hash(this(), script.name(), Algorithm::Sha256, None)?),
        14 => {
            let key = script.bytes();
            drop(state.hash(this(), script.name(), Algorithm::Sha256, Some(key))?);
        }
        15 => drop(state.truncate(this(), script.name(), script.number())?),
        16 => drop(state.columns(this())?),
        17 => drop(state.get(this(), script.name())?),
        18 => drop(state.get_old(this(), script.name())?),
        _ => {
            let stream = (script.byte().is_multiple_of(2)).then(|| script.text());
            drop(state.route_to(this(), stream)?);
        }
    }
    Ok(())
}
