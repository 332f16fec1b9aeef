//! The only way to the sink: a record is measured here, or it does not go.

use std::sync::Arc;

use crate::sink::record::{RECORD_BYTES_MAX, Record};

/// A record that fits S2's limit. Nothing else builds one, and the sink takes nothing else.
#[derive(Clone, Debug)]
pub struct SizedRecord {
    record: Record,
    metered_bytes: u64,
    stream: Option<Arc<str>>,
}

impl SizedRecord {
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Without its size.
    #[must_use]
    pub fn into_record(self) -> Record {
        self.record
    }

    /// What S2 will count for it, in bytes.
    #[must_use]
    pub fn metered_bytes(&self) -> u64 {
        self.metered_bytes
    }

    /// The stream that transforms chose for it; nothing for the pipeline's own. All records of one
    /// change have the same.
    #[must_use]
    pub fn stream(&self) -> Option<&Arc<str>> {
        self.stream.as_ref()
    }

    /// The same record for that stream.
    #[must_use]
    pub fn routed_to(self, stream: Option<Arc<str>>) -> Self {
        Self { stream, ..self }
    }
}

/// The record is larger than S2 takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the record has {bytes} metered bytes, and S2 takes {bytes_max}")]
pub struct Oversize {
    pub bytes: u64,
    pub bytes_max: u64,
}

/// Measures a record as S2 will.
///
/// # Errors
///
/// When its metered size is over [`RECORD_BYTES_MAX`].
pub fn check(record: Record) -> Result<SizedRecord, Oversize> {
    let metered_bytes = record.metered_bytes();
    if metered_bytes > RECORD_BYTES_MAX {
        return Err(Oversize { bytes: metered_bytes, bytes_max: RECORD_BYTES_MAX });
    }
    Ok(SizedRecord { record, metered_bytes, stream: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::record::Header;
    use bytes::Bytes;

    fn record(body_bytes: usize, headers: usize) -> Record {
        let header =
            Header { name: Bytes::from_static(b"name"), value: Bytes::from_static(b"value") };
        Record {
            timestamp_ms: Some(1),
            headers: vec![header; headers].into_iter().collect(),
            body: Bytes::from(vec![b'x'; body_bytes]),
        }
    }

    #[test]
    fn the_limit_is_inclusive_and_counts_headers() {
        let body_max = 1024 * 1024 - 8;
        assert_eq!(check(record(body_max, 0)).unwrap().metered_bytes(), RECORD_BYTES_MAX);
        assert!(check(record(body_max + 1, 0)).is_err());
        assert_eq!(check(record(body_max - 22, 2)).unwrap().metered_bytes(), RECORD_BYTES_MAX);
        assert_eq!(
            check(record(body_max - 21, 2)).unwrap_err(),
            Oversize { bytes: RECORD_BYTES_MAX + 1, bytes_max: RECORD_BYTES_MAX }
        );
    }
}
