//! The bytes of the replication protocol: frames in, status updates out. Pure.
//!
//! A frame is a letter, a length that counts itself, and a body. Inside CopyData (`d`) the
//! streaming protocol has its own two messages: `w`, a piece of WAL, and `k`, a keepalive.

use bytes::{BufMut, Bytes, BytesMut};

use super::error::{Error, ServerError};
use crate::change::Lsn;

/// Letter and length.
pub(super) const HEADER_BYTES: usize = 5;

/// Larger than any frame that Postgres can build: its allocations end at 1 GiB, and the headers
/// come on top.
pub(super) const FRAME_BYTES_MAX: usize = (1 << 30) + 4096;

/// `w`, start, end, time.
const WAL_HEADER_BYTES: usize = 25;

/// Microseconds from 1970 to 2000, where Postgres's clock begins.
const EPOCH_OFFSET_US: i64 = 946_684_800_000_000;

/// One message from the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub tag: u8,
    pub body: Bytes,
}

/// One message of the streaming protocol.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Streamed {
    /// A message of the output plugin, and where in the WAL it belongs.
    Data {
        lsn: Lsn,
        message: Bytes,
    },
    Keepalive {
        wal_end: Lsn,
        reply_requested: bool,
    },
    /// The server has ended the stream.
    Done,
    /// A notice or a changed parameter.
    Other,
}

/// How long the frame at the start of `buffer` is, its header included, once that is known.
///
/// # Errors
///
/// When the length is impossible.
pub(super) fn frame_bytes(buffer: &[u8]) -> Result<Option<usize>, Error> {
    let Some(length) = buffer.get(1..HEADER_BYTES) else { return Ok(None) };
    let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
    if !(4..=FRAME_BYTES_MAX).contains(&length) {
        return Err(Error::Protocol { what: format!("a message of {length} bytes") });
    }
    Ok(Some(length + 1))
}

/// Takes the first frame off the buffer, if all of it is there. Copies nothing.
///
/// # Errors
///
/// When the length is impossible.
pub(super) fn next_frame(buffer: &mut BytesMut) -> Result<Option<Frame>, Error> {
    match frame_bytes(buffer)? {
        Some(bytes) if bytes <= buffer.len() => {
            let tag = buffer[0];
            let mut body = buffer.split_to(bytes).freeze();
            bytes::Buf::advance(&mut body, HEADER_BYTES);
            Ok(Some(Frame { tag, body }))
        }
        _ => Ok(None),
    }
}

/// What a frame means while the server streams.
///
/// # Errors
///
/// When the server reports an error, or sends what does not belong here.
pub(super) fn streamed(frame: Frame) -> Result<Streamed, Error> {
    match frame.tag {
        b'd' => copy_data(frame.body),
        b'E' => Err(Error::Stream(ServerError::parse(&frame.body))),
        b'c' | b'C' | b'Z' => Ok(Streamed::Done),
        b'N' | b'S' | b'A' => Ok(Streamed::Other),
        tag => Err(unexpected(tag)),
    }
}

fn copy_data(mut body: Bytes) -> Result<Streamed, Error> {
    let lsn_at = |at: usize| {
        let bytes: [u8; 8] = body.get(at..at + 8)?.try_into().ok()?;
        Some(Lsn(u64::from_be_bytes(bytes)))
    };
    let streamed = match body.first() {
        Some(b'w') if body.len() >= WAL_HEADER_BYTES => lsn_at(1).map(|lsn| {
            bytes::Buf::advance(&mut body, WAL_HEADER_BYTES);
            Streamed::Data { lsn, message: body }
        }),
        Some(b'k') => lsn_at(1).and_then(|wal_end| {
            Some(Streamed::Keepalive { wal_end, reply_requested: *body.get(17)? != 0 })
        }),
        _ => None,
    };
    streamed
        .ok_or_else(|| Error::Protocol { what: "a replication message of no known form".into() })
}

pub(super) fn unexpected(tag: u8) -> Error {
    Error::Protocol { what: format!("a message `{}` out of place", tag.escape_ascii()) }
}

/// A standby status update: everything up to `confirmed` is written, flushed and applied.
pub(super) fn status_update(
    out: &mut BytesMut,
    confirmed: Lsn,
    now_unix_us: i64,
    request_reply: bool,
) {
    out.put_u8(b'd');
    out.put_u32(4 + 1 + 3 * 8 + 8 + 1);
    out.put_u8(b'r');
    for _written_flushed_applied in 0..3 {
        out.put_u64(confirmed.0);
    }
    out.put_i64(now_unix_us.saturating_sub(EPOCH_OFFSET_US));
    out.put_u8(u8::from(request_reply));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    fn wal(lsn: u64, message: &[u8]) -> Vec<u8> {
        let mut body = vec![b'w'];
        body.extend_from_slice(&lsn.to_be_bytes());
        body.extend_from_slice(&[0; 16]);
        body.extend_from_slice(message);
        frame(b'd', &body)
    }

    fn keepalive(wal_end: u64, reply: u8) -> Vec<u8> {
        let mut body = vec![b'k'];
        body.extend_from_slice(&wal_end.to_be_bytes());
        body.extend_from_slice(&[0; 8]);
        body.push(reply);
        frame(b'd', &body)
    }

    fn read(bytes: &[u8]) -> Result<Option<Streamed>, Error> {
        let mut buffer = BytesMut::from(bytes);
        next_frame(&mut buffer)?.map(streamed).transpose()
    }

    #[test]
    fn what_is_streamed() {
        fn check(bytes: &[u8], expected: Streamed) {
            assert_eq!(read(bytes).unwrap(), Some(expected));
        }
        let message = Bytes::from_static(b"abc");
        check(&wal(7, b"abc"), Streamed::Data { lsn: Lsn(7), message });
        check(&wal(7, b""), Streamed::Data { lsn: Lsn(7), message: Bytes::new() });
        check(&keepalive(9, 1), Streamed::Keepalive { wal_end: Lsn(9), reply_requested: true });
        check(&keepalive(9, 0), Streamed::Keepalive { wal_end: Lsn(9), reply_requested: false });
        check(&frame(b'c', b""), Streamed::Done);
        check(&frame(b'N', b"SNOTICE\0\0"), Streamed::Other);
    }

    #[test]
    fn what_does_not_belong() {
        for bytes in [
            frame(b'd', b""),
            frame(b'd', b"x"),
            frame(b'd', b"w1234567"),
            frame(b'd', b"k12345678"),
            frame(b'?', b""),
            vec![b'd', 0, 0, 0, 3],
            vec![b'd', 0xFF, 0xFF, 0xFF, 0xFF],
        ] {
            assert!(matches!(read(&bytes), Err(Error::Protocol { .. })), "{bytes:x?}");
        }
        let error = read(&frame(b'E', b"C57P01\0Mbye\0\0"));
        assert!(matches!(error, Err(Error::Stream(error)) if error.code == "57P01"));
    }

    #[test]
    fn incomplete_frames_wait() {
        let whole = wal(7, b"abc");
        for end in 0..whole.len() {
            let mut buffer = BytesMut::from(&whole[..end]);
            assert_eq!(next_frame(&mut buffer).unwrap(), None);
            assert_eq!(buffer.len(), end, "nothing was taken");
        }
        assert_eq!(frame_bytes(&whole[..5]).unwrap(), Some(whole.len()));
    }

    #[test]
    fn a_status_update() {
        let mut out = BytesMut::new();
        status_update(&mut out, Lsn(0x0102), EPOCH_OFFSET_US + 5, true);
        let lsn = 0x0102_u64.to_be_bytes();
        let body = [b"r", &lsn[..], &lsn, &lsn, &5_i64.to_be_bytes(), &[1]].concat();
        assert_eq!(out, frame(b'd', &body));
    }

    proptest! {
        /// However the network cuts it, the same frames come out; and no bytes are a panic.
        #[test]
        fn framing_does_not_depend_on_the_cuts(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..10),
            cut in 1_usize..17,
        ) {
            let whole: Vec<u8> = bodies.iter().flat_map(|body| frame(b'd', body)).collect();
            let mut buffer = BytesMut::new();
            let mut found = Vec::new();
            for piece in whole.chunks(cut) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = next_frame(&mut buffer).unwrap() {
                    found.push(frame.body.to_vec());
                    let _any = streamed(frame);
                }
            }
            prop_assert_eq!(found, bodies);
        }
    }
}
