//! A message whose attempts are spent, as it is handed on. Pure, but for the file in [`file`].
//!
//! A dead letter is a [case](crate::case), as `messages export` writes it: the change as it was, before
//! any transform, why it failed, and what failed it; with `dead_letter` in front, which names it and says
//! the rest. So whatever reads exported messages reads dead letters.
//!
//! In a stream it is a record with the headers of a message (`sb-key` is its identity) and
//! `sb-dead-letter`. One that is over S2's limit comes in numbered parts, as a message that was split
//! does: an oversized message is the first that needs this, and a summary in its place would lose it.
//! Parts that no batch holds together go as [those of messages](super::driver) do.

pub mod file;
pub mod writer;

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::size_gate::{self, SizedRecord};
use crate::case::{Case, CaseTransform};
use crate::change::Change;
use crate::message::{Envelope, cuts, header, idempotency_key};
use crate::sink::headers::Headers;
use crate::sink::limits;
use crate::sink::record::{RECORD_METERED_BYTES, Record, header_metered_bytes};
use crate::store::Failure;
use crate::transform::Chain;

/// Two numbers of at most ten digits.
const PART_DIGITS_MAX: usize = 21;

/// A message that becomes one.
#[derive(Debug)]
pub struct Letter {
    pub message: u64,
    pub change: Change,
    pub failure: Option<Failure>,
    pub attempts: u64,
    /// RFC 3339: when its attempts were spent, or when it was tried to be handed on since.
    pub at: String,
}

/// What stands in front of the case.
#[derive(Debug, Serialize, Deserialize)]
pub struct Facts {
    /// With `key` its identity: as `sb-pipeline` and `sb-key`.
    pub pipeline: String,
    pub key: String,
    /// Of its last failure: `oversize`, `trap`, …
    pub class: Option<String>,
    pub reason: Option<String>,
    /// The file name of the transform that failed it.
    pub transform: Option<String>,
    pub attempts: u64,
    pub at: String,
}

#[derive(Serialize)]
struct Written<'a> {
    dead_letter: Facts,
    #[serde(flatten)]
    case: &'a Case,
}

/// Nothing could be written of a message, which is a defect.
#[derive(Debug, thiserror::Error)]
#[error("message {message} cannot be written as a dead letter: {text}")]
pub struct Error {
    pub message: u64,
    text: String,
}

impl Letter {
    fn error(&self, error: impl std::fmt::Display) -> Error {
        Error { message: self.message, text: error.to_string() }
    }

    /// As JSON, on one line.
    ///
    /// # Errors
    ///
    /// When it cannot be written, which is a defect.
    pub fn text(&self, envelope: &Envelope, chain: &Chain) -> Result<String, Error> {
        let failed = self.failure.as_ref().map(|failure| &failure.error);
        let dead_letter = Facts {
            pipeline: envelope.settings().pipeline_id.clone(),
            key: idempotency_key(self.change.position),
            class: failed.map(|error| error.class.clone()),
            reason: failed.map(|error| error.text.clone()),
            transform: failed.and_then(|error| error.transform.clone()),
            attempts: self.attempts,
            at: self.at.clone(),
        };
        // Settings may hold secrets, and whoever reads dead letters is not always the operator.
        let transform = |(file, digest): (&str, &str)| CaseTransform {
            file: file.to_owned(),
            digest: digest.to_owned(),
            settings: None,
        };
        let case = Case::new(
            self.message.to_string(),
            &self.change,
            self.failure.clone(),
            envelope.settings(),
            chain.files().zip(chain.digests()).map(transform).collect(),
        );
        serde_json::to_string(&Written { dead_letter, case: &case })
            .map_err(|error| self.error(error))
    }

    /// As records for a stream, at least one.
    ///
    /// # Errors
    ///
    /// As [`Self::text`].
    pub fn records(
        &self,
        stream: &Arc<str>,
        envelope: &Envelope,
        chain: &Chain,
    ) -> Result<Vec<SizedRecord>, Error> {
        let text = self.text(envelope, chain)?;
        let class = self.failure.as_ref().map_or("", |failure| &failure.error.class);
        let table = self.change.table.qualified_name();
        let fixed = [
            (header::PIPELINE, envelope.settings().pipeline_id.as_str()),
            (header::KEY, &idempotency_key(self.change.position)),
            (header::TABLE, &table),
            (header::ACTION, self.change.action.as_str()),
            (header::CHAIN, &envelope.settings().chain),
            (header::DEAD_LETTER, class),
        ];
        let bytes: u64 =
            fixed.iter().map(|(name, value)| header_metered_bytes(name.len(), value.len())).sum();
        let bytes = bytes + header_metered_bytes(header::PART.len(), PART_DIGITS_MAX);
        let body_max = limits::record_bytes().saturating_sub(RECORD_METERED_BYTES + bytes);
        let pieces = cuts(&text, usize::try_from(body_max).unwrap_or(usize::MAX));
        let count = pieces.len();
        let text = Bytes::from(text);
        let record = |(index, piece): (usize, std::ops::Range<usize>)| {
            let mut headers = Headers::default();
            for (name, value) in fixed {
                headers.push(name.as_bytes(), value.as_bytes());
                if name == header::KEY {
                    headers.push(header::PART.as_bytes(), format!("{index}/{count}").as_bytes());
                }
            }
            let timestamp_ms = u64::try_from(self.change.commit_timestamp_us / 1000).ok();
            let record = Record { timestamp_ms, headers, body: text.slice(piece) };
            let record = size_gate::check(record).map_err(|error| self.error(error))?;
            Ok(record.routed_to(Some(Arc::clone(stream))))
        };
        pieces.into_iter().enumerate().map(record).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{read, sized};
    use crate::message::EnvelopeSettings;
    use crate::pipeline::control::ErrorView;
    use crate::sink::record::RECORD_BYTES_MAX;

    pub(super) fn letter(body_bytes: usize) -> Letter {
        let error = ErrorView {
            class: "oversize".to_owned(),
            status: None,
            text: "a record of public.documents is too large".to_owned(),
            body: None,
            transform: None,
        };
        Letter {
            message: 7,
            change: sized(body_bytes),
            failure: Some(Failure { error, bytes: None, columns: Vec::new(), trace: Vec::new() }),
            attempts: 3,
            at: "2026-01-01T00:00:00Z".to_owned(),
        }
    }

    pub(super) fn envelope() -> Envelope {
        let pipeline_id = "0123".to_owned();
        Envelope::new(EnvelopeSettings { pipeline_id, ..EnvelopeSettings::default() })
    }

    fn check(body_bytes: usize, parts: usize) {
        let letter = letter(body_bytes);
        let stream: Arc<str> = "dead".into();
        let records = letter.records(&stream, &envelope(), &Chain::empty(1)).unwrap();
        assert_eq!(records.len(), parts, "{body_bytes}");
        let mut text = Vec::new();
        for (index, record) in records.iter().enumerate() {
            assert!(record.metered_bytes() <= RECORD_BYTES_MAX);
            assert_eq!(record.stream(), Some(&stream));
            let value = |name: &str| {
                let headers = &record.record().headers;
                let found = headers.iter().find(|header| header.name == name.as_bytes());
                found.map(|header| String::from_utf8_lossy(header.value).into_owned())
            };
            assert_eq!(value(header::PART).unwrap(), format!("{index}/{parts}"));
            assert_eq!(value(header::KEY).unwrap(), idempotency_key(letter.change.position));
            assert_eq!(value(header::DEAD_LETTER).unwrap(), "oversize");
            assert_eq!(value(header::TABLE).unwrap(), "public.documents");
            text.extend_from_slice(&record.record().body);
        }
        // It is a case, with the change as it was.
        let text = String::from_utf8(text).unwrap();
        let samples = read(&text).unwrap();
        assert_eq!(samples.len(), 1);
        let change = &samples[0].change;
        let row = |change: &Change| {
            let row = change.new.clone().unwrap();
            (0..row.cells.len()).map(|cell| row.text(cell).map(<[u8]>::to_vec)).collect::<Vec<_>>()
        };
        assert_eq!(change.position, letter.change.position);
        assert_eq!(row(change), row(&letter.change));
        #[derive(Deserialize)]
        struct Read {
            dead_letter: Facts,
        }
        let facts = serde_json::from_str::<Read>(&text).unwrap().dead_letter;
        assert_eq!((facts.class.as_deref(), facts.attempts), (Some("oversize"), 3));
        assert_eq!(facts.pipeline, "0123");
    }

    #[test]
    fn a_letter_is_a_case_in_as_many_parts_as_it_takes() {
        check(10, 1);
        check(1024 * 1024, 2);
        check(3 * 1024 * 1024, 4);
    }
}
