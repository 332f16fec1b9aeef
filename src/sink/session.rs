//! An append session: batches go out one behind the other without waiting, acknowledgements come
//! back in the same order.
//!
//! ```text
//! send ──▶ frames ──▶ the request's body ──▶ S2
//!   │                                        │
//!   └─▶ expected: count, number ──▶ check ◀──┴── acknowledgements ──▶ next_ack
//! ```
//!
//! The first failure ends a session, and S2 applies nothing behind it. A session is never mended.
//! After an ambiguous failure [`open`](super::open::open) finds out what has landed. After any other
//! one, such as a connection that was closed for being idle, [`Session::open`] is enough, with the
//! same token and the next number. The caller bounds what is under way; nothing here waits for room.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;
use prost::Message as _;
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
    time::{Instant, sleep_until},
};

use super::{
    client::{Client, Mode, Tail},
    error::{Error, Fault, Operation},
    json::{self, AppendBody},
    limits,
    proto::{self, AppendAck, Frame, FrameDecoder, FrameError},
    record::{BATCH_RECORDS_MAX, RECORD_BYTES_MAX, Record},
};
use crate::pipeline::size_gate::SizedRecord;

/// A frame is handed to the connection in pieces of this size, so that a slow connection can be told
/// from a dead one by its taking them. Four HTTP/2 frames; cutting costs no copy.
const PIECE_BYTES: usize = 64 * 1024;

/// A batch as it goes out.
#[derive(Clone, Copy, Debug)]
pub struct Append<'a> {
    /// At least one, at most [`BATCH_RECORDS_MAX`], together at most [`RECORD_BYTES_MAX`] metered
    /// bytes. They land together or not at all.
    pub records: &'a [&'a SizedRecord],
    /// The number that the first record must get.
    pub match_seq_num: Option<u64>,
    /// The token that the stream must have.
    pub fencing_token: Option<&'a str>,
}

/// S2 has made a batch durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The first record's number.
    pub start: u64,
    /// The number after the last record's.
    pub end: u64,
    /// The stream's end; beyond `end` where others append too.
    pub tail: Tail,
    /// The server is about to stop: send nothing more, half-close, take the remaining
    /// acknowledgements and open another session.
    pub reconnect_advised: bool,
}

/// Counts what goes into a batch, so that S2 takes it.
#[derive(Clone, Copy, Debug, Default)]
pub struct BatchMeter {
    records: usize,
    metered_bytes: u64,
}

impl BatchMeter {
    /// Counts a record in, if the batch still has room for it. An empty batch has room for any
    /// [`SizedRecord`].
    #[must_use]
    pub fn try_add(&mut self, record: &SizedRecord) -> bool {
        let metered_bytes = self.metered_bytes + record.metered_bytes();
        let fits = self.records < limits::batch_records() && metered_bytes <= RECORD_BYTES_MAX;
        if fits {
            *self = Self { records: self.records + 1, metered_bytes };
        }
        fits
    }

    /// Whether one batch holds all of these.
    #[must_use]
    pub fn holds(records: &[SizedRecord]) -> bool {
        let mut meter = Self::default();
        records.iter().all(|record| meter.try_add(record))
    }

    #[must_use]
    pub fn records(&self) -> usize {
        self.records
    }

    #[must_use]
    pub fn metered_bytes(&self) -> u64 {
        self.metered_bytes
    }
}

/// One session. Dropping it cuts it off.
#[derive(Debug)]
pub struct Session {
    client: Client,
    /// Nothing once the session is half-closed.
    out: Option<Way>,
    /// Ends after the first failure.
    incoming: mpsc::UnboundedReceiver<Result<Incoming, Error>>,
    outstanding: VecDeque<Expected>,
    progress: Arc<Progress>,
    /// When the last acknowledgement came, or the first batch went out after a pause.
    quiet_since: Instant,
    failed: bool,
    /// What carries the batches, if anything does.
    task: Option<AbortHandle>,
}

/// How batches go out.
#[derive(Debug)]
enum Way {
    /// As frames of one request.
    Frames(mpsc::UnboundedSender<Bytes>),
    /// As a request each.
    Requests(mpsc::UnboundedSender<AppendBody>),
    /// Not at all: encoded and acknowledged here.
    Nowhere(mpsc::UnboundedSender<Result<Incoming, Error>>),
}

#[derive(Clone, Copy, Debug)]
struct Expected {
    records: u64,
    start: Option<u64>,
}

#[derive(Debug)]
struct Incoming {
    ack: AppendAck,
    reconnect_advised: bool,
}

impl Session {
    /// Begins a session. It connects on its own; a failure to do so comes out of
    /// [`Self::next_ack`].
    #[must_use]
    pub fn open(client: &Client) -> Self {
        let (answers, incoming) = mpsc::unbounded_channel();
        let progress = Arc::new(Progress::new());
        let (way, task) = match client.settings().mode {
            Mode::Session | Mode::SessionHttp2 | Mode::Unguarded => {
                let (out, frames) = mpsc::unbounded_channel();
                let (release, held) = oneshot::channel();
                let body = FrameStream {
                    frames,
                    piece: Bytes::new(),
                    hold: Hold::Free { held },
                    progress: progress.clone(),
                };
                let task = tokio::spawn(run_session(client.clone(), body, release, answers));
                (Way::Frames(out), Some(task.abort_handle()))
            }
            Mode::Unary => {
                let (out, requests) = mpsc::unbounded_channel();
                let run = run_unary(client.clone(), requests, answers, progress.clone());
                (Way::Requests(out), Some(tokio::spawn(run).abort_handle()))
            }
            Mode::Discard => (Way::Nowhere(answers), None),
        };
        Self {
            client: client.clone(),
            out: Some(way),
            incoming,
            outstanding: VecDeque::new(),
            progress,
            quiet_since: Instant::now(),
            failed: false,
            task,
        }
    }

    /// Sends a batch, without waiting. Its acknowledgement comes out of [`Self::next_ack`], behind
    /// those of the batches before it; so does the failure of a session that has ended.
    ///
    /// # Errors
    ///
    /// When the batch is over S2's limits or empty, or the session is half-closed. Nothing was sent
    /// then, and the session goes on.
    pub fn send(&mut self, batch: Append<'_>) -> Result<(), Error> {
        let Append { records, match_seq_num, fencing_token } = batch;
        let metered_bytes: u64 = records.iter().map(|record| record.metered_bytes()).sum();
        let wrong = if records.is_empty() {
            Some("it has no records".to_owned())
        } else if records.len() > BATCH_RECORDS_MAX {
            Some(format!("it has {} records, and S2 takes {BATCH_RECORDS_MAX}", records.len()))
        } else if metered_bytes > RECORD_BYTES_MAX {
            Some(format!("it has {metered_bytes} metered bytes, and S2 takes {RECORD_BYTES_MAX}"))
        } else {
            None
        };
        if let Some(what) = wrong {
            return Err(Error::Batch { what });
        }
        let records_of = records.iter().map(|record| record.record());
        self.send_records(records_of, records.len() as u64, match_seq_num, fencing_token)
    }

    pub(super) fn send_records<'a>(
        &mut self,
        records: impl Iterator<Item = &'a Record> + Clone,
        count: u64,
        match_seq_num: Option<u64>,
        fencing_token: Option<&str>,
    ) -> Result<(), Error> {
        let way = self.out.as_ref().ok_or(Error::Closed)?;
        let frame = |records| {
            proto::append_frame(records, match_seq_num, fencing_token)
                .map_err(|source: FrameError| Error::Batch { what: source.to_string() })
        };
        // Refused only by a session that has ended: `next_ack` says why.
        match way {
            Way::Frames(out) => drop(out.send(frame(records)?)),
            Way::Requests(out) => {
                drop(out.send(json::append_body(records, match_seq_num, fencing_token)));
            }
            Way::Nowhere(answers) => {
                drop(frame(records)?);
                let start = match_seq_num.unwrap_or_default();
                let position = |seq_num| Some(proto::StreamPosition { seq_num, timestamp: 0 });
                let (start, end) = (position(start), position(start + count));
                let ack = AppendAck { start, end, tail: end };
                drop(answers.send(Ok(Incoming { ack, reconnect_advised: false })));
            }
        }
        if self.outstanding.is_empty() {
            self.quiet_since = Instant::now();
        }
        self.outstanding.push_back(Expected { records: count, start: match_seq_num });
        Ok(())
    }

    /// Batches sent and not acknowledged yet.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Waits for the next batch to be acknowledged. With none under way it waits for the session to
    /// fail. Cancel-safe.
    ///
    /// # Errors
    ///
    /// The session is over then: every batch under way is unanswered, and none of them landed
    /// unless the error's class says `ambiguous`. [`Error::Closed`] after [`Self::half_close`] once
    /// all are acknowledged.
    pub async fn next_ack(&mut self) -> Result<Ack, Error> {
        if self.failed {
            return Err(Error::Closed);
        }
        let result = self.wait_for_ack().await;
        if result.is_err() {
            self.failed = true;
            self.abort();
        }
        result
    }

    async fn wait_for_ack(&mut self) -> Result<Ack, Error> {
        let time_out = self.client.settings().ack_time_out;
        loop {
            let quiet_since = self.quiet_since.max(self.progress.last());
            let due = quiet_since + time_out;
            let waiting = !self.outstanding.is_empty();
            tokio::select! {
                biased;
                incoming = self.incoming.recv() => return match incoming {
                    Some(Ok(incoming)) => self.check(incoming),
                    Some(Err(error)) => Err(self.settle(error)),
                    None if self.out.is_none() && !waiting => Err(Error::Closed),
                    None => Err(self.cut()),
                },
                () = sleep_until(due), if waiting => {
                    if self.progress.last() <= quiet_since {
                        return Err(self.connection(Fault::TimeOut));
                    }
                }
            }
        }
    }

    fn check(&mut self, incoming: Incoming) -> Result<Ack, Error> {
        let AppendAck { start, end, tail } = incoming.ack;
        let start = start.unwrap_or_default().seq_num;
        let end = end.unwrap_or_default().seq_num;
        // A tail is not needed to go on; a server that leaves it out says what it knows by `end`.
        let tail = tail.map_or(Tail { next_seq: end, timestamp_ms: 0 }, Tail::from);
        let Some(expected) = self.outstanding.front().copied() else {
            return Err(self.protocol(format!("it acknowledged {start} to {end} unasked")));
        };
        if end.checked_sub(start) != Some(expected.records)
            || expected.start.is_some_and(|expected| expected != start)
        {
            return Err(self.protocol(format!(
                "it acknowledged {start} to {end} for {} records from {:?}",
                expected.records, expected.start
            )));
        }
        self.outstanding.pop_front();
        self.quiet_since = Instant::now();
        Ok(Ack { start, end, tail, reconnect_advised: incoming.reconnect_advised })
    }

    /// Sends nothing more; batches under way are still acknowledged.
    pub fn half_close(&mut self) {
        self.out = None;
    }

    /// Half-closes and waits for every batch under way.
    ///
    /// # Errors
    ///
    /// As [`Self::next_ack`].
    pub async fn close(mut self) -> Result<Vec<Ack>, Error> {
        self.half_close();
        let mut acks = Vec::with_capacity(self.outstanding.len());
        while !self.outstanding.is_empty() {
            acks.push(self.next_ack().await?);
        }
        Ok(acks)
    }

    /// An error as it stands now: a broken connection is ambiguous only for batches under way.
    fn settle(&self, mut error: Error) -> Error {
        if let Error::Connection { ambiguous, .. } = &mut error {
            *ambiguous &= !self.outstanding.is_empty();
        }
        error
    }

    fn abort(&self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }

    fn cut(&self) -> Error {
        self.connection(Fault::Cut)
    }

    fn connection(&self, fault: Fault) -> Error {
        Error::Connection {
            place: self.client.place().clone(),
            operation: Operation::Append,
            fault,
            ambiguous: !self.outstanding.is_empty(),
            source: None,
        }
    }

    fn protocol(&self, what: String) -> Error {
        Error::Protocol {
            place: self.client.place().clone(),
            operation: Operation::Append,
            what,
            source: None,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Carries one append session: the body out, frames in, until the first failure or the end. Dropping
/// `release` lets the body go on behind its first frame.
async fn run_session(
    client: Client,
    body: FrameStream,
    release: oneshot::Sender<Infallible>,
    answers: mpsc::UnboundedSender<Result<Incoming, Error>>,
) {
    let body = reqwest::Body::wrap_stream(body);
    let mut response = match client.start_session(body).await {
        Ok(response) => response,
        Err(error) => return drop(answers.send(Err(error))),
    };
    let mut release = Some(release);
    if response.version() == reqwest::Version::HTTP_2 {
        drop(release.take());
    }
    let mut decoder = FrameDecoder::default();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) => decoder.push(&chunk),
            // S2 ends a session this way when everything sent is acknowledged; the receiver knows
            // whether that is so.
            Ok(None) => return,
            Err(source) => return drop(answers.send(Err(client.session_connection(source)))),
        }
        loop {
            let answer = match decoder.next_frame() {
                Ok(None) => break,
                Ok(Some(Frame::Message { payload, reconnect_advised })) => {
                    AppendAck::decode(payload)
                        .map(|ack| Incoming { ack, reconnect_advised })
                        .map_err(|source| protocol(&client, source))
                }
                Ok(Some(Frame::Terminal { status, body })) => {
                    Err(terminal(&client, status, &body).await)
                }
                Err(source) => Err(protocol(&client, source)),
            };
            let over = answer.is_err();
            if answers.send(answer).is_err() || over {
                return;
            }
            drop(release.take());
        }
    }
}

async fn terminal(client: &Client, status: u16, body: &[u8]) -> Error {
    if status == 401 {
        client.forget_token().await;
    }
    client.refused(Operation::Append, status, body, None, None).await
}

fn protocol(client: &Client, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Protocol {
        place: client.place().clone(),
        operation: Operation::Append,
        what: "its acknowledgements cannot be read".to_owned(),
        source: Some(Box::new(source)),
    }
}

/// The plain mode: a JSON request per batch, one at a time, so that none overtakes another.
async fn run_unary(
    client: Client,
    mut requests: mpsc::UnboundedReceiver<AppendBody>,
    answers: mpsc::UnboundedSender<Result<Incoming, Error>>,
    progress: Arc<Progress>,
) {
    while let Some(body) = requests.recv().await {
        progress.note();
        let answer =
            client.append_json(body).await.map(|ack| Incoming { ack, reconnect_advised: false });
        let over = answer.is_err();
        if answers.send(answer).is_err() || over {
            return;
        }
    }
}

/// The request's body: frames as they are sent, in pieces.
///
/// The first frame goes alone until S2 has answered it, over HTTP/1.1, or has answered at all, over
/// HTTP/2. What S2 says of a failing frame is lost over HTTP/1.1 if more is being written behind it:
/// the connection is reset under its last words. A failing batch is the first one of the session
/// that is opened after it, so that by then its reason is heard.
struct FrameStream {
    frames: mpsc::UnboundedReceiver<Bytes>,
    piece: Bytes,
    hold: Hold,
    progress: Arc<Progress>,
}

enum Hold {
    /// The first frame has not begun.
    Free {
        held: oneshot::Receiver<Infallible>,
    },
    /// Nothing goes behind the first frame.
    Held {
        held: oneshot::Receiver<Infallible>,
    },
    Released,
}

impl Hold {
    /// Whether the next frame may begin.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Free { .. } | Self::Released => Poll::Ready(()),
            Self::Held { held } => {
                // Nothing is ever sent: it is ready once the other end is gone.
                if Pin::new(held).poll(context).is_pending() {
                    return Poll::Pending;
                }
                *self = Self::Released;
                Poll::Ready(())
            }
        }
    }

    fn frame_began(&mut self) {
        if let Self::Free { held } = std::mem::replace(self, Self::Released) {
            *self = Self::Held { held };
        }
    }
}

impl Stream for FrameStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.piece.is_empty() {
            if self.hold.poll(context).is_pending() {
                return Poll::Pending;
            }
            match self.frames.poll_recv(context) {
                Poll::Ready(Some(frame)) => {
                    self.hold.frame_began();
                    self.piece = frame;
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
        self.progress.note();
        let length = self.piece.len().min(PIECE_BYTES);
        let piece = self.piece.split_to(length);
        Poll::Ready(Some(Ok(piece)))
    }
}

/// When the connection last took a piece.
#[derive(Debug)]
struct Progress {
    start: Instant,
    /// Milliseconds after `start`.
    last_ms: AtomicU64,
}

impl Progress {
    fn new() -> Self {
        Self { start: Instant::now(), last_ms: AtomicU64::new(0) }
    }

    fn note(&self) {
        let elapsed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(elapsed, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.start + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::size_gate;

    fn record(body_bytes: u64) -> SizedRecord {
        let body = Bytes::from(vec![b'x'; usize::try_from(body_bytes).unwrap()]);
        size_gate::check(Record { timestamp_ms: None, headers: Default::default(), body }).unwrap()
    }

    #[test]
    fn a_batch_is_full_by_bytes_or_by_records() {
        fn check(records: impl IntoIterator<Item = u64>, fit: usize, metered_bytes: u64) {
            let mut meter = BatchMeter::default();
            let fitted = records.into_iter().take_while(|bytes| meter.try_add(&record(*bytes)));
            assert_eq!(fitted.count(), fit);
            assert_eq!((meter.records(), meter.metered_bytes()), (fit, metered_bytes));
        }
        const MIB: u64 = RECORD_BYTES_MAX;
        check([], 0, 0);
        check([MIB - 8], 1, MIB);
        check([MIB - 8, 0], 1, MIB);
        check([MIB - 16, 0, 0], 2, MIB);
        check([MIB / 2 - 8, MIB / 2 - 8], 2, MIB);
        check([MIB / 2 - 8, MIB / 2 - 7], 1, MIB / 2);
        check(std::iter::repeat_n(2, 1001), 1000, 10_000);
    }

    #[tokio::test]
    async fn pieces_follow_each_other_and_the_first_frame_goes_alone() {
        use futures_util::StreamExt as _;
        let (out, frames) = mpsc::unbounded_channel();
        let (release, held) = oneshot::channel();
        let mut stream = FrameStream {
            frames,
            piece: Bytes::new(),
            hold: Hold::Free { held },
            progress: Arc::new(Progress::new()),
        };
        let first = Bytes::from(vec![b'1'; PIECE_BYTES + 1]);
        out.send(first.clone()).unwrap();
        out.send(Bytes::from_static(b"2")).unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap(), first.slice(..PIECE_BYTES));
        assert_eq!(stream.next().await.unwrap().unwrap(), first.slice(PIECE_BYTES..));
        let held = tokio::time::timeout(Duration::from_millis(10), stream.next()).await;
        assert!(held.is_err());
        drop(release);
        assert_eq!(stream.next().await.unwrap().unwrap(), Bytes::from_static(b"2"));
        drop(out);
        assert!(stream.next().await.is_none());
    }
}
