//! What S2 takes: a body, headers and a timestamp, with S2's own measure of its size.

use bytes::Bytes;

use super::headers::Headers;
use super::proto::{pack_record, unpack_record};

/// The most metered bytes that one record may have, and one batch of an append.
///
/// Source: `common/src/caps.rs` of s2-streamstore/s2; the limit is inclusive.
pub const RECORD_BYTES_MAX: u64 = sluicebox_edits::RECORD_BYTES_MAX;

/// The most records that one append may carry (the same source).
pub const BATCH_RECORDS_MAX: usize = 1000;

/// What S2 counts for a record beside its headers and its body.
pub(crate) const RECORD_METERED_BYTES: u64 = 8;

/// A name and a value beside a record's body. A name is never empty: that would make the record a
/// command to S2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub name: Bytes,
    pub value: Bytes,
}

/// A record before anybody has measured it. Only the size gate turns it into something that the
/// sink takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Milliseconds since the Unix epoch.
    pub timestamp_ms: Option<u64>,
    pub headers: Headers,
    pub body: Bytes,
}

impl Record {
    /// S2's metered size: 8 bytes, 2 per header, and the bytes of names, values and body. The
    /// timestamp is free (`common/src/record/envelope.rs` of s2-streamstore/s2).
    #[must_use]
    pub fn metered_bytes(&self) -> u64 {
        RECORD_METERED_BYTES + self.headers.metered_bytes() + self.body.len() as u64
    }

    /// As bytes, to be put aside.
    #[must_use]
    pub fn pack(&self) -> Bytes {
        pack_record(self)
    }

    /// What [`Self::pack`] made; nothing of other bytes.
    #[must_use]
    pub fn unpack(packed: Bytes) -> Option<Self> {
        unpack_record(packed)
    }
}

/// The metered size of a record with these header lengths (name, value) and this body length.
#[must_use]
pub fn metered_bytes(headers: impl Iterator<Item = (usize, usize)>, body_bytes: usize) -> u64 {
    let headers: u64 = headers.map(|(name, value)| header_metered_bytes(name, value)).sum();
    RECORD_METERED_BYTES + headers + body_bytes as u64
}

/// What S2 counts for a header with a name and a value of these lengths.
#[must_use]
pub(crate) fn header_metered_bytes(name: usize, value: usize) -> u64 {
    (2 + name + value) as u64
}
