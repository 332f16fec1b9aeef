//! A draft as a record: its headers, its size and the limit.
//!
//! Sizes are found by the code that writes, see [`super::out`]; the value of a column is read for
//! its size once and not again, however often a transform asks.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;

use super::columns::Column;
use super::draft::Draft;
use super::encode::{EncodeError, Value};
use super::envelope::IdempotencyKey;
use super::header;
use super::out::{Capped, Counter, Out};
use crate::sink::headers::Headers;
use crate::sink::record::{Header, RECORD_BYTES_MAX, RECORD_METERED_BYTES, Record};

/// Why there is no record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Its exact metered size.
    #[error("the record has {bytes} metered bytes, and S2 takes {RECORD_BYTES_MAX}")]
    Oversize { bytes: u64 },
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// Sizes that were found already; a clone starts without any.
#[derive(Debug)]
pub(super) struct Sizes {
    /// Of the row's values in JSON, by their place in the table.
    columns: OnceLock<Box<[AtomicU64]>>,
    /// Of the whole record, metered.
    total: AtomicU64,
}

const UNKNOWN: u64 = u64::MAX;

impl Default for Sizes {
    fn default() -> Self {
        Self { columns: OnceLock::new(), total: AtomicU64::new(UNKNOWN) }
    }
}

impl Clone for Sizes {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Sizes {
    pub(super) fn forget_total(&mut self) {
        *self.total.get_mut() = UNKNOWN;
    }
}

impl Draft {
    /// What S2 will count for the record, in bytes, exactly. Nothing is built for it, and it is
    /// known until the next edit.
    ///
    /// # Errors
    ///
    /// When a value is not UTF-8.
    pub fn metered_bytes(&self) -> Result<u64, EncodeError> {
        let known = self.sizes.total.load(Relaxed);
        if known != UNKNOWN {
            return Ok(known);
        }
        let body = match &self.extras.body {
            Some(body) => body.len() as u64,
            None => {
                let mut counter = Counter::default();
                self.encode(&mut counter)?;
                counter.written()
            }
        };
        let total = headers_bytes(&self.headers()) + body;
        self.sizes.total.store(total, Relaxed);
        Ok(total)
    }

    /// The record as S2 will store it. See [`Self::record`].
    ///
    /// # Errors
    ///
    /// When it is over S2's limit, or a value is not UTF-8.
    pub fn into_record(self) -> Result<Record, RecordError> {
        self.record()
    }

    /// The record as S2 will store it. No more than the limit of a body is ever built; what
    /// follows is only counted.
    ///
    /// # Errors
    ///
    /// When it is over S2's limit, or a value is not UTF-8.
    pub fn record(&self) -> Result<Record, RecordError> {
        let headers = self.headers();
        let headers_bytes = headers_bytes(&headers);
        let body_max = RECORD_BYTES_MAX.saturating_sub(headers_bytes);
        let known = self.sizes.total.load(Relaxed);
        if known != UNKNOWN && known > RECORD_BYTES_MAX {
            return Err(RecordError::Oversize { bytes: known });
        }
        let oversize = |body: u64| RecordError::Oversize { bytes: headers_bytes + body };
        let body = match &self.extras.body {
            Some(body) if body.len() as u64 > body_max => {
                return Err(oversize(body.len() as u64));
            }
            Some(body) => body.clone(),
            None => {
                let body_max = usize::try_from(body_max).unwrap_or(usize::MAX);
                let mut capped = Capped::new(body_max, self.expected_bytes());
                self.encode(&mut capped)?;
                Bytes::from(capped.finish().map_err(oversize)?)
            }
        };
        let timestamp_ms = u64::try_from(self.change.commit_timestamp_us / 1000).ok();
        let record = Record { timestamp_ms, headers, body };
        // Without a body the headers may be too large all the same.
        match record.metered_bytes() {
            bytes if bytes > RECORD_BYTES_MAX => Err(RecordError::Oversize { bytes }),
            _ => Ok(record),
        }
    }

    fn headers(&self) -> Headers {
        /// The key and the part, at their longest, and their names.
        const OWN_BYTES: usize = 96;
        let extras = &self.extras;
        let (head, tail) = (&self.envelope.head, self.table.tail(self.change.action));
        let more = extras.headers.iter().map(|header| header.name.len() + header.value.len() + 10);
        let more = more.sum::<usize>() + extras.passed.len() + 32;
        let mut headers =
            Headers::with_capacity(head.packed_bytes() + OWN_BYTES + tail.packed_bytes() + more);
        if !self.envelope.settings().unguarded {
            headers.extend_from(head);
            let key = IdempotencyKey::new(self.change.position);
            headers.push(header::KEY.as_bytes(), key.as_bytes());
            match extras.part {
                None => headers.extend_from(&self.envelope.whole),
                Some((index, count)) => {
                    headers.push(header::PART.as_bytes(), format!("{index}/{count}").as_bytes());
                }
            }
        }
        headers.extend_from(tail);
        if !extras.passed.is_empty() {
            headers.push(header::PASSED.as_bytes(), extras.passed.as_bytes());
        }
        for Header { name, value } in &extras.headers {
            headers.push(name, value);
        }
        headers
    }

    /// What the column's value takes in JSON; of one that has no JSON form, its own length.
    pub(super) fn bytes(&self, column: &Column<'_>) -> u64 {
        let Ok(value) = self.value(column) else { return 0 };
        self.value_bytes(column, value).unwrap_or(match value {
            Value::Text { text, .. } => text.len() as u64,
            Value::Null | Value::Unchanged | Value::Json(_) => 0,
        })
    }

    /// Counts a value of the record, or remembers what was counted.
    pub(super) fn value_bytes(
        &self,
        column: &Column<'_>,
        value: Value<'_>,
    ) -> Result<u64, EncodeError> {
        let known = match column.source {
            Some(index) if column.is_source_value() => self.column_size(index),
            _ => None,
        };
        if let Some(known) = known
            && known.load(Relaxed) != UNKNOWN
        {
            return Ok(known.load(Relaxed));
        }
        let mut counter = Counter::default();
        self.write(&mut counter, column, value)?;
        if let Some(known) = known {
            known.store(counter.written(), Relaxed);
        }
        Ok(counter.written())
    }

    fn column_size(&self, index: usize) -> Option<&AtomicU64> {
        let unknown = || AtomicU64::new(UNKNOWN);
        let count = self.change.table.columns.len();
        let sizes = self.sizes.columns.get_or_init(|| (0..count).map(|_| unknown()).collect());
        sizes.get(index)
    }
}

fn headers_bytes(headers: &Headers) -> u64 {
    RECORD_METERED_BYTES + headers.metered_bytes()
}
