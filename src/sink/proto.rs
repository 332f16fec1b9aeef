//! S2's messages and the frames of its append session, as bytes. Pure: nothing here does I/O.
//!
//! Messages that come in are `prost` structs, written by hand after `s2.v1.proto`. The one that goes
//! out, `AppendInput`, is written straight from the records into the frame's buffer: one copy of
//! each body and no allocation per record or header.
//!
//! A frame is a length of three bytes (big-endian, counting what follows), a flag and a payload:
//!
//! ```text
//! length ×3 │ flag: T C C R 0 0 0 0 │ payload
//!           │ T terminal            │ T=0: protobuf (AppendInput up, AppendAck down)
//!           │ C compression         │ T=1: HTTP status (two bytes, big-endian), then S2's JSON error
//!           │ R reconnect advised   │
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use super::record::{Header, Record};

/// The most bytes that a frame's length may state (`api/src/v1/stream/s2s.rs` of
/// s2-streamstore/s2).
pub const FRAME_BYTES_MAX: usize = 2 * 1024 * 1024;

const LENGTH_BYTES: usize = 3;
/// What stands before a frame's payload: length and flag.
pub(super) const FRAME_HEAD_BYTES: usize = LENGTH_BYTES + 1;
const STATUS_BYTES: usize = 2;

const TERMINAL: u8 = 0b1000_0000;
const COMPRESSION: u8 = 0b0110_0000;
const RECONNECT_ADVISED: u8 = 0b0001_0000;

// Tags of `AppendInput`, `AppendRecord` and `Header` in `s2.v1.proto`.
const INPUT_RECORDS: u32 = 1;
const INPUT_MATCH_SEQ_NUM: u32 = 2;
const INPUT_FENCING_TOKEN: u32 = 3;
const RECORD_TIMESTAMP: u32 = 1;
pub(super) const RECORD_HEADERS: u32 = 2;
const RECORD_BODY: u32 = 3;
pub(super) const HEADER_NAME: u32 = 1;
pub(super) const HEADER_VALUE: u32 = 2;

/// Where a record is in its stream.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct StreamPosition {
    #[prost(uint64, tag = "1")]
    pub seq_num: u64,
    /// Milliseconds since the Unix epoch.
    #[prost(uint64, tag = "2")]
    pub timestamp: u64,
}

/// S2 has made a batch durable.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct AppendAck {
    /// The batch's first record.
    #[prost(message, optional, tag = "1")]
    pub start: Option<StreamPosition>,
    /// The number after the batch's last record.
    #[prost(message, optional, tag = "2")]
    pub end: Option<StreamPosition>,
    /// The number that the stream's next record gets; beyond `end` where others append too.
    #[prost(message, optional, tag = "3")]
    pub tail: Option<StreamPosition>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct HeaderMessage {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) name: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) value: Bytes,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct SequencedRecord {
    #[prost(uint64, tag = "1")]
    pub(super) seq_num: u64,
    #[prost(uint64, tag = "2")]
    pub(super) timestamp: u64,
    #[prost(message, repeated, tag = "3")]
    pub(super) headers: Vec<HeaderMessage>,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) body: Bytes,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct ReadBatch {
    #[prost(message, repeated, tag = "1")]
    pub(super) records: Vec<SequencedRecord>,
    #[prost(message, optional, tag = "2")]
    pub(super) tail: Option<StreamPosition>,
}

/// The frame of one append. `AppendInput` alone, as a unary request takes it, begins at
/// [`FRAME_HEAD_BYTES`].
///
/// # Errors
///
/// [`FrameError::TooLong`] when S2 would refuse the frame for its length. A batch of 1 MiB metered
/// stays below 2 MiB of protobuf: a header costs at most twice its metered bytes (two letters: 4
/// metered, 8 here), and everything else less.
pub(super) fn append_frame<'a>(
    records: impl Iterator<Item = &'a Record> + Clone,
    match_seq_num: Option<u64>,
    fencing_token: Option<&str>,
) -> Result<Bytes, FrameError> {
    let payload_bytes = records.clone().map(input_record_len).sum::<usize>()
        + match_seq_num.map_or(0, |number| 1 + encoded_len_varint(number))
        + fencing_token.map_or(0, |token| bytes_len(token.as_bytes()));
    let length = 1 + payload_bytes;
    if length > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { bytes: length });
    }
    let mut frame = BytesMut::with_capacity(LENGTH_BYTES + length);
    frame.put_uint(length as u64, LENGTH_BYTES);
    frame.put_u8(0);
    for record in records {
        put_head(&mut frame, INPUT_RECORDS, record_len(record));
        put_record(&mut frame, record);
    }
    if let Some(number) = match_seq_num {
        put_number(&mut frame, INPUT_MATCH_SEQ_NUM, number);
    }
    if let Some(token) = fencing_token {
        put_bytes(&mut frame, INPUT_FENCING_TOKEN, token.as_bytes());
    }
    debug_assert_eq!(frame.len(), LENGTH_BYTES + length, "the length was computed beforehand");
    Ok(frame.freeze())
}

fn put_record(frame: &mut BytesMut, record: &Record) {
    if let Some(timestamp) = record.timestamp_ms {
        put_number(frame, RECORD_TIMESTAMP, timestamp);
    }
    frame.put_slice(record.headers.packed());
    put_optional_bytes(frame, RECORD_BODY, &record.body);
}

/// One record by itself, as an `AppendInput` has it.
#[must_use]
pub(super) fn pack_record(record: &Record) -> Bytes {
    let mut packed = BytesMut::with_capacity(record_len(record));
    put_record(&mut packed, record);
    packed.freeze()
}

/// What was packed; nothing where it was not.
#[must_use]
pub(super) fn unpack_record(packed: Bytes) -> Option<Record> {
    let AppendRecord { timestamp, headers, body } = AppendRecord::decode(packed).ok()?;
    let header = |HeaderMessage { name, value }| Header { name, value };
    Some(Record {
        timestamp_ms: timestamp,
        headers: headers.into_iter().map(header).collect(),
        body,
    })
}

fn input_record_len(record: &Record) -> usize {
    message_len(record_len(record))
}

fn record_len(record: &Record) -> usize {
    record.timestamp_ms.map_or(0, |timestamp| 1 + encoded_len_varint(timestamp))
        + record.headers.packed().len()
        + optional_bytes_len(&record.body)
}

/// The length of a field with `payload` bytes behind its key and its own length.
fn message_len(payload: usize) -> usize {
    key_len(INPUT_RECORDS) + encoded_len_varint(payload as u64) + payload
}

fn bytes_len(bytes: &[u8]) -> usize {
    message_len(bytes.len())
}

/// Proto3 leaves out a field that holds its default, and decoders put the default back.
pub(super) fn optional_bytes_len(bytes: &[u8]) -> usize {
    if bytes.is_empty() { 0 } else { bytes_len(bytes) }
}

/// A header has three of these, nearly all of them short: those take two bytes in one write.
#[inline]
pub(super) fn put_head(frame: &mut impl BufMut, tag: u32, payload: usize) {
    match (u8::try_from(tag), u8::try_from(payload)) {
        (Ok(tag @ ..16), Ok(length @ ..0x80)) => {
            frame.put_slice(&[tag << 3 | WireType::LengthDelimited as u8, length]);
        }
        _ => {
            encode_key(tag, WireType::LengthDelimited, frame);
            encode_varint(payload as u64, frame);
        }
    }
}

/// The tag of a field whose key was read.
pub(super) fn tag_of(key: u64) -> u32 {
    u32::try_from(key >> 3).unwrap_or(u32::MAX)
}

fn put_number(frame: &mut BytesMut, tag: u32, number: u64) {
    encode_key(tag, WireType::Varint, frame);
    encode_varint(number, frame);
}

fn put_bytes(frame: &mut impl BufMut, tag: u32, bytes: &[u8]) {
    put_head(frame, tag, bytes.len());
    frame.put_slice(bytes);
}

/// Proto3 leaves out a field that holds its default.
pub(super) fn put_optional_bytes(frame: &mut impl BufMut, tag: u32, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_bytes(frame, tag, bytes);
    }
}

/// What came down an append session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    Message {
        /// Protobuf.
        payload: Bytes,
        /// The server is about to stop: half-close, take the remaining acks, connect anew.
        reconnect_advised: bool,
    },
    /// The session is over, and nothing after the failing frame was applied.
    Terminal {
        /// An HTTP status.
        status: u16,
        /// S2's JSON error.
        body: Bytes,
    },
}

/// Why bytes are not a frame, or a batch does not become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {bytes} bytes is longer than the {FRAME_BYTES_MAX} that S2 allows")]
    TooLong { bytes: usize },
    #[error("a frame is empty: it lacks its flag")]
    Empty,
    #[error("a terminal frame lacks its status")]
    NoStatus,
    #[error("a frame is compressed, which was not asked for")]
    Compressed,
}

/// Cuts a session's bytes into frames, however they were split on their way.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: BytesMut,
}

impl FrameDecoder {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or nothing until more bytes are pushed.
    ///
    /// # Errors
    ///
    /// When the bytes are no frame. The session is then beyond repair.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let [first, second, third, ..] = *self.buffer else { return Ok(None) };
        let length = u32::from_be_bytes([0, first, second, third]) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong { bytes: length });
        }
        if length == 0 {
            return Err(FrameError::Empty);
        }
        if self.buffer.len() < LENGTH_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(LENGTH_BYTES);
        let mut payload = self.buffer.split_to(length).freeze();
        let flag = payload.get_u8();
        if flag & TERMINAL != 0 {
            if payload.len() < STATUS_BYTES {
                return Err(FrameError::NoStatus);
            }
            let status = payload.get_u16();
            return Ok(Some(Frame::Terminal { status, body: payload }));
        }
        if flag & COMPRESSION != 0 {
            return Err(FrameError::Compressed);
        }
        Ok(Some(Frame::Message { payload, reconnect_advised: flag & RECONNECT_ADVISED != 0 }))
    }
}

/// `AppendInput` as `prost` writes and reads it: what the hand-written encoder is held to, and how the
/// model of the server reads what comes in.
#[cfg(test)]
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AppendInput {
    #[prost(message, repeated, tag = "1")]
    pub(super) records: Vec<AppendRecord>,
    #[prost(uint64, optional, tag = "2")]
    pub(super) match_seq_num: Option<u64>,
    #[prost(string, optional, tag = "3")]
    pub(super) fencing_token: Option<String>,
}

/// One of its records, which is read outside of tests as well, where a record was put aside.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AppendRecord {
    #[prost(uint64, optional, tag = "1")]
    pub(super) timestamp: Option<u64>,
    #[prost(message, repeated, tag = "2")]
    pub(super) headers: Vec<HeaderMessage>,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) body: Bytes,
}

#[cfg(test)]
mod tests {
    use super::super::headers::Headers;
    use super::*;
    use proptest::prelude::*;

    fn as_prost(records: &[Record], number: Option<u64>, token: Option<&str>) -> AppendInput {
        AppendInput {
            records: records
                .iter()
                .map(|record| AppendRecord {
                    timestamp: record.timestamp_ms,
                    headers: record
                        .headers
                        .iter()
                        .map(|header| HeaderMessage {
                            name: Bytes::copy_from_slice(header.name),
                            value: Bytes::copy_from_slice(header.value),
                        })
                        .collect(),
                    body: record.body.clone(),
                })
                .collect(),
            match_seq_num: number,
            fencing_token: token.map(ToOwned::to_owned),
        }
    }

    fn check_append(records: &[Record], number: Option<u64>, token: Option<&str>) {
        let frame = append_frame(records.iter(), number, token).unwrap();
        let expected = as_prost(records, number, token).encode_to_vec();
        assert_eq!(frame[FRAME_HEAD_BYTES..], expected[..]);
        let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]) as usize;
        assert_eq!(length, expected.len() + 1);
        assert_eq!(frame[3], 0);
    }

    fn record(timestamp_ms: Option<u64>, headers: &[(&str, &str)], body: &[u8]) -> Record {
        let mut packed = Headers::default();
        for (name, value) in headers {
            packed.push(name.as_bytes(), value.as_bytes());
        }
        Record { timestamp_ms, headers: packed, body: Bytes::copy_from_slice(body) }
    }

    #[test]
    fn an_append_is_what_prost_would_write() {
        check_append(&[], None, None);
        check_append(&[record(None, &[], b"")], None, Some(""));
        check_append(&[record(Some(0), &[("", "fence")], b"token")], Some(0), Some("old"));
        check_append(
            &vec![record(Some(u64::MAX), &[("a", ""), ("b", "c")], &[0xff; 300]); 3],
            Some(u64::MAX),
            Some("0123456789abcdef"),
        );
    }

    proptest! {
        #[test]
        fn any_append_is_what_prost_would_write(
            records in proptest::collection::vec(
                (
                    proptest::option::of(any::<u64>()),
                    proptest::collection::vec((".{0,40}", ".{0,200}"), 0..6),
                    proptest::collection::vec(any::<u8>(), 0..600),
                ),
                0..20,
            ),
            number in proptest::option::of(any::<u64>()),
            token in proptest::option::of(".{0,36}"),
        ) {
            let records: Vec<Record> = records
                .iter()
                .map(|(timestamp, headers, body)| {
                    let headers: Vec<(&str, &str)> =
                        headers.iter().map(|(name, value)| (&**name, &**value)).collect();
                    record(*timestamp, &headers, body)
                })
                .collect();
            check_append(&records, number, token.as_deref());
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut decoder = FrameDecoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_frame() {}
        }
    }

    #[test]
    fn the_largest_batches_fit_a_frame() {
        fn check(records: &[Record]) {
            let metered: u64 = records.iter().map(Record::metered_bytes).sum();
            assert!(metered <= crate::sink::record::RECORD_BYTES_MAX, "{metered}");
            let token = "t".repeat(36);
            assert!(append_frame(records.iter(), Some(u64::MAX), Some(&token)).is_ok());
        }
        let now = Some(1_800_000_000_000);
        // The smallest headers: the most protobuf per metered byte.
        check(&vec![record(now, &[("n", "v"); 260], b""); 1000]);
        check(&vec![record(now, &[("sb-key", "0123456789")], &[b'x'; 1000]); 1000]);
        check(&[record(now, &[], &vec![b'x'; 1024 * 1024 - 8])]);

        let over = [record(now, &[], &vec![b'x'; FRAME_BYTES_MAX])];
        let error = append_frame(over.iter(), None, None).err();
        assert!(matches!(error, Some(FrameError::TooLong { .. })));
    }

    fn message(payload: &[u8], flag: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_uint(payload.len() as u64 + 1, 3);
        bytes.put_u8(flag);
        bytes.put_slice(payload);
        bytes
    }

    #[test]
    fn frames_are_found_wherever_the_bytes_are_split() {
        let bytes = [
            message(b"one", 0),
            message(b"", 0),
            message(&[b'x'; 1000], RECONNECT_ADVISED),
            message(b"\x01\xa6{}", TERMINAL),
        ]
        .concat();
        let expected = [
            Frame::Message { payload: Bytes::from_static(b"one"), reconnect_advised: false },
            Frame::Message { payload: Bytes::new(), reconnect_advised: false },
            Frame::Message { payload: Bytes::from(vec![b'x'; 1000]), reconnect_advised: true },
            Frame::Terminal { status: 422, body: Bytes::from_static(b"{}") },
        ];
        for split in 0..=bytes.len() {
            let mut decoder = FrameDecoder::default();
            let mut found = Vec::new();
            for part in [&bytes[..split], &bytes[split..]] {
                decoder.push(part);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    found.push(frame);
                }
            }
            assert_eq!(found, expected, "split at {split}");
        }
        let mut decoder = FrameDecoder::default();
        let mut found = Vec::new();
        for byte in &bytes {
            decoder.push(&[*byte]);
            found.extend(decoder.next_frame().unwrap());
        }
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        fn check(bytes: &[u8], expected: Result<Option<Frame>, FrameError>) {
            let mut decoder = FrameDecoder::default();
            decoder.push(bytes);
            assert_eq!(decoder.next_frame(), expected, "{bytes:?}");
        }
        check(b"", Ok(None));
        check(b"\0\0", Ok(None));
        check(b"\0\0\x05\0abc", Ok(None));
        check(b"\0\0\0", Err(FrameError::Empty));
        check(b"\0\0\x01\x80", Err(FrameError::NoStatus));
        check(b"\0\0\x02\x80\x01", Err(FrameError::NoStatus));
        check(b"\0\0\x01\x20", Err(FrameError::Compressed));
        check(b"\0\0\x01\x40", Err(FrameError::Compressed));
        check(b"\x20\0\x01", Err(FrameError::TooLong { bytes: 2 * 1024 * 1024 + 1 }));
        check(b"HTTP/1.1", Err(FrameError::TooLong { bytes: 0x0048_5454 }));
        check(
            b"\0\0\x03\x80\x01\x94",
            Ok(Some(Frame::Terminal { status: 404, body: Bytes::new() })),
        );
    }
}
