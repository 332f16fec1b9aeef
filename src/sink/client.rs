//! One request, one answer: the tail, pages of records, single appends, and making basins and
//! streams. Never retries, with one exception: after a 401 a token's file is read again, and if it
//! has changed the request is sent once more.

use std::{sync::Arc, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use prost::Message as _;
use reqwest::{
    Body, Method, Request, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue},
};
use serde::Deserialize;

use super::{
    endpoint::{Addresses, Endpoint, Token},
    error::{ANSWER_BYTES_MAX, Answer, Error, Fault, Named, Operation, Place},
    json::AppendBody,
    proto::{self, AppendAck, FRAME_HEAD_BYTES, ReadBatch, StreamPosition},
    read::{Page, ReadRecord},
    record::{BATCH_RECORDS_MAX, RECORD_BYTES_MAX, Record},
    transport::{Failed, Http, Lane, Transport},
};

/// How long a unary request may take; S2's own time-out is shorter.
const UNARY_TIME_OUT: Duration = Duration::from_secs(15);
/// The longest wait that S2 allows a unary read.
const READ_WAIT_MAX: Duration = Duration::from_secs(60);
/// The longest answer that is read into memory: a page of 1 MiB metered and 1,000 records with the
/// most protobuf around them stays below.
const ANSWER_PAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A number for which no append is ever due: half of what 64 bits hold, for servers that count in
/// signed numbers.
const UNREACHABLE_SEQ: u64 = u64::MAX >> 1;

const PROTOBUF: HeaderValue = HeaderValue::from_static("application/protobuf");
const SESSION: HeaderValue = HeaderValue::from_static("s2s/proto");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const BASIN: &str = "s2-basin";
const FORMAT: &str = "s2-format";

/// How appends travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// One append session with many batches under way: over HTTP/2 on `https://` where the server
    /// has it, over HTTP/1.1 on `http://`.
    ///
    /// A stock s2-lite speaks `http://` and leaves TCP_NODELAY off. Over HTTP/2 that holds back its
    /// window updates, and a session gets half of what it gets over HTTP/1.1, which has none; with
    /// TCP_NODELAY on, HTTP/1.1 is still no slower and takes two thirds of the CPU.
    #[default]
    Session,
    /// The session over HTTP/2 on `http://` too, agreed on beforehand: for servers that take nothing
    /// else.
    SessionHttp2,
    /// A JSON request per batch, one at a time: bound by latency, for servers and proxies that a
    /// session does not get through, and for eyes: the same can be sent with curl.
    Unary,
    /// Nothing is sent: batches are encoded, thrown away and acknowledged at once. Only for measuring
    /// what everything in front of S2 costs.
    Discard,
    /// A session whose appends nothing guards, and whose records nobody could find again. Only for
    /// measuring what exactly once costs.
    Unguarded,
}

/// What a client is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    pub endpoint: Endpoint,
    pub basin: String,
    pub stream: String,
    /// What chose the stream, for those who read of its trouble.
    pub named: Named,
    /// None for servers that ask for none.
    pub token: Option<Token>,
    pub mode: Mode,
    /// Create the basin and the stream where they are missing.
    pub create: bool,
    /// Keep other writers out by a fencing token. Each opening of a session then adds a command
    /// record to the stream, which readers see and skip.
    pub fencing: bool,
    /// How long a session may go without an acknowledgement, and without the connection taking a
    /// byte, while batches are under way.
    pub ack_time_out: Duration,
}

impl Settings {
    /// Settings with S2's own service, no token, and the defaults of everything else.
    #[must_use]
    pub fn new(basin: &str, stream: &str) -> Self {
        Self {
            endpoint: Endpoint::Cloud,
            basin: basin.to_owned(),
            stream: stream.to_owned(),
            named: Named::Sink,
            token: None,
            mode: Mode::default(),
            create: false,
            fencing: true,
            // S2's SDK waits as long.
            ack_time_out: Duration::from_secs(5),
        }
    }
}

/// The end of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tail {
    /// The number that the next record gets.
    pub next_seq: u64,
    /// The last record's timestamp, 0 in a stream that never had one.
    pub timestamp_ms: u64,
}

/// Where a page begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    Seq(u64),
    /// So many records before the tail, or the first one.
    TailOffset(u64),
}

/// Whether something had to be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    New,
    Existed,
}

/// Speaks to one stream. Cheap to clone; clones share connections.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    addresses: Addresses,
    token: Option<Token>,
    transport: Arc<dyn Transport>,
    settings: Settings,
}

impl Client {
    /// Checks the settings and sets up connections, without connecting.
    ///
    /// # Errors
    ///
    /// When a setting cannot be right, or this machine has no certificate authorities (`https`).
    pub fn new(settings: Settings) -> Result<Self, Error> {
        let addresses = Addresses::new(&settings)?;
        let transport = Arc::new(Http::new(&settings, &addresses)?);
        Ok(Self::with(settings, addresses, transport))
    }

    /// A client whose requests are carried by something else than HTTP.
    ///
    /// # Errors
    ///
    /// When a setting cannot be right.
    pub fn over(transport: Arc<dyn Transport>, settings: Settings) -> Result<Self, Error> {
        let addresses = Addresses::new(&settings)?;
        Ok(Self::with(settings, addresses, transport))
    }

    fn with(settings: Settings, addresses: Addresses, transport: Arc<dyn Transport>) -> Self {
        let token = settings.token.clone();
        Self { shared: Arc::new(Shared { addresses, token, transport, settings }) }
    }

    /// A client of another stream of the same basin, with the same settings, token and connections.
    ///
    /// # Errors
    ///
    /// When no stream can have that name.
    pub fn for_stream(&self, stream: &str, named: Named) -> Result<Self, Error> {
        let settings = Settings { stream: stream.to_owned(), named, ..self.settings().clone() };
        Self::over(Arc::clone(&self.shared.transport), settings)
    }

    /// The stream as errors name it.
    #[must_use]
    pub fn place(&self) -> &Arc<Place> {
        &self.shared.addresses.place
    }

    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// The stream's end.
    ///
    /// # Errors
    ///
    /// As every operation; a token without `check-tail` gets 403.
    pub async fn tail(&self) -> Result<Tail, Error> {
        #[derive(Deserialize)]
        struct Answer {
            tail: Position,
        }
        let request = self.get(&self.shared.addresses.tail);
        let response = self.send(Operation::Tail, request).await?;
        let answer: Answer = self.json(Operation::Tail, response).await?;
        Ok(answer.tail.into())
    }

    /// A page of records. At the tail it is empty: at once where `wait` is zero, else when S2 has
    /// waited so long (at most 60 s) for a record to come.
    ///
    /// It holds at most 1 MiB metered, so that a page may be short in the middle of a stream.
    ///
    /// # Errors
    ///
    /// As every operation; a token without `read` gets 403.
    pub async fn read(
        &self,
        from: ReadFrom,
        count_max: usize,
        wait: Duration,
    ) -> Result<Page, Error> {
        let mut url = self.shared.addresses.records.clone();
        let wait = wait.min(READ_WAIT_MAX);
        {
            let mut query = url.query_pairs_mut();
            match from {
                ReadFrom::Seq(seq) => query.append_pair("seq_num", &seq.to_string()),
                ReadFrom::TailOffset(offset) => {
                    query.append_pair("tail_offset", &offset.to_string())
                }
            };
            query.append_pair("count", &count_max.min(BATCH_RECORDS_MAX).to_string());
            query.append_pair("bytes", &RECORD_BYTES_MAX.to_string());
            if !wait.is_zero() {
                query.append_pair("wait", &wait.as_secs().max(1).to_string());
            }
        }
        let mut request = self.get(&url);
        request.headers_mut().insert(ACCEPT, PROTOBUF);
        *request.timeout_mut() = Some(UNARY_TIME_OUT + wait);
        let response = match self.send(Operation::Read, request).await {
            Err(Error::Refused { answer, .. }) if answer.status == 416 => {
                return Ok(Page { records: Vec::new(), tail: tail_in(&answer.body) });
            }
            other => other?,
        };
        let body = self.body(Operation::Read, response).await?;
        let batch = ReadBatch::decode(body)
            .map_err(|source| self.protocol(Operation::Read, "its page is no protobuf", source))?;
        Ok(Page {
            records: batch.records.into_iter().map(ReadRecord::from).collect(),
            tail: batch.tail.map(Tail::from),
        })
    }

    /// Appends one batch by a request of its own.
    ///
    /// # Errors
    ///
    /// As every operation, and [`Error::SeqMismatch`] and [`Error::Fenced`] where a condition fails.
    pub async fn append_unary<'a>(
        &self,
        records: impl Iterator<Item = &'a Record> + Clone,
        match_seq_num: Option<u64>,
        fencing_token: Option<&str>,
    ) -> Result<AppendAck, Error> {
        let frame = proto::append_frame(records, match_seq_num, fencing_token)
            .map_err(|source| Error::Batch { what: source.to_string() })?;
        self.append_message(Operation::Append, frame.slice(FRAME_HEAD_BYTES..)).await
    }

    /// Makes `token` the stream's fencing token, if its next number is `match_seq_num` (where given)
    /// and its present token `guard` (the empty one if it never had any). The record that does it
    /// takes a number of its own.
    pub(super) async fn fence(
        &self,
        token: &str,
        timestamp_ms: u64,
        match_seq_num: Option<u64>,
        guard: &str,
    ) -> Result<AppendAck, Error> {
        let record = fence_record(token, timestamp_ms);
        let frame = proto::append_frame(std::iter::once(&record), match_seq_num, Some(guard))
            .map_err(|source| Error::Batch { what: source.to_string() })?;
        self.append_message(Operation::Fence, frame.slice(FRAME_HEAD_BYTES..)).await
    }

    /// Sends an encoded `AppendInput`.
    async fn append_message(&self, operation: Operation, input: Bytes) -> Result<AppendAck, Error> {
        let mut request = self.post(&self.shared.addresses.records, PROTOBUF, input.into());
        request.headers_mut().insert(ACCEPT, PROTOBUF);
        let response = self.send(operation, request).await?;
        let body = self.body(operation, response).await?;
        AppendAck::decode(body)
            .map_err(|source| self.protocol(operation, "its answer is no protobuf", source))
    }

    /// The same as a JSON request, which can be repeated with curl.
    pub(super) async fn append_json(&self, body: AppendBody) -> Result<AppendAck, Error> {
        #[derive(Deserialize)]
        struct Answer {
            start: Position,
            end: Position,
            tail: Position,
        }
        let mut request = self.post(&self.shared.addresses.records, JSON, body.json.into());
        let format = HeaderValue::from_static(body.format.as_str());
        request.headers_mut().insert(FORMAT, format);
        let response = self.send(Operation::Append, request).await?;
        let Answer { start, end, tail } = self.json(Operation::Append, response).await?;
        let position =
            |Position { seq_num, timestamp }| Some(StreamPosition { seq_num, timestamp });
        Ok(AppendAck { start: position(start), end: position(end), tail: position(tail) })
    }

    /// Whether the stream exists, as far as the token may ask: nothing where it may not
    /// (403). Reads nothing and changes nothing.
    ///
    /// # Errors
    ///
    /// As every operation, a missing basin included.
    pub async fn stream_exists(&self) -> Result<Option<bool>, Error> {
        let request = self.get(&self.shared.addresses.stream);
        match self.send(Operation::GetStream, request).await {
            Ok(_) => Ok(Some(true)),
            Err(error) if error.is_stream_missing() => Ok(Some(false)),
            Err(error) if error.is_forbidden() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks S2 whether this token may append to this stream, without appending: a record guarded by a
    /// number that no stream reaches is refused behind every other check, and the refusal names
    /// the stream's next number. The basin may be configured to create streams on an append; then it
    /// creates this one.
    ///
    /// # Errors
    ///
    /// What an append would get: 401, 403, 404 and the rest.
    pub async fn check_append(&self) -> Result<u64, Error> {
        let record =
            Record { timestamp_ms: Some(0), headers: Default::default(), body: Bytes::new() };
        match self.append_unary(std::iter::once(&record), Some(UNREACHABLE_SEQ), None).await {
            Err(Error::SeqMismatch { next, .. }) => Ok(next),
            Err(error) => Err(error),
            Ok(_) => Err(Error::Protocol {
                place: self.place().clone(),
                operation: Operation::Append,
                what: "it took a record for a number that is not the next one".to_owned(),
                source: None,
            }),
        }
    }

    /// Creates the basin if it is missing, and leaves the configuration of an existing one alone.
    ///
    /// # Errors
    ///
    /// As every operation.
    pub async fn create_basin(&self) -> Result<Created, Error> {
        let body = serde_json::json!({ "basin": self.place().basin });
        let addresses = &self.shared.addresses;
        self.create(
            (Operation::GetBasin, &addresses.basin),
            (Operation::CreateBasin, &addresses.basins),
            body.to_string(),
        )
        .await
    }

    /// Creates the stream if it is missing, and leaves the configuration of an existing one alone.
    ///
    /// # Errors
    ///
    /// As every operation, a missing basin included.
    pub async fn create_stream(&self) -> Result<Created, Error> {
        let body = serde_json::json!({ "stream": self.place().stream });
        let addresses = &self.shared.addresses;
        self.create(
            (Operation::GetStream, &addresses.stream),
            (Operation::CreateStream, &addresses.streams),
            body.to_string(),
        )
        .await
    }

    /// Creates what is missing of basin and stream.
    ///
    /// # Errors
    ///
    /// As every operation.
    pub async fn create_missing(&self) -> Result<Created, Error> {
        match self.create_stream().await {
            Err(error) if error.is_basin_missing() => {
                self.create_basin().await?;
                self.create_stream().await
            }
            other => other,
        }
    }

    /// Looks first and creates then: a `PUT` would do both, but it resets whatever it does not name.
    async fn create(
        &self,
        look: (Operation, &Url),
        create: (Operation, &Url),
        body: String,
    ) -> Result<Created, Error> {
        match self.send(look.0, self.get(look.1)).await {
            Ok(_) => return Ok(Created::Existed),
            Err(error) => match error.status() {
                Some(404) if look.0 == Operation::GetStream && error.is_basin_missing() => {
                    return Err(error);
                }
                // A token may be allowed to create and not to look.
                Some(403 | 404) => {}
                _ => return Err(error),
            },
        }
        let request = self.post(create.1, JSON, body.into());
        match self.send(create.0, request).await {
            Ok(_) => Ok(Created::New),
            Err(Error::Refused { answer, .. })
                if answer.status == 409
                    && answer.code.as_deref() == Some("resource_already_exists") =>
            {
                Ok(Created::Existed)
            }
            Err(error) => Err(error),
        }
    }

    fn get(&self, url: &Url) -> Request {
        self.request(Method::GET, url)
    }

    fn post(&self, url: &Url, content_type: HeaderValue, body: Body) -> Request {
        let mut request = self.request(Method::POST, url);
        request.headers_mut().insert(CONTENT_TYPE, content_type);
        *request.body_mut() = Some(body);
        request
    }

    fn request(&self, method: Method, url: &Url) -> Request {
        let mut request = Request::new(method, url.clone());
        *request.timeout_mut() = Some(UNARY_TIME_OUT);
        if let Some(basin) = &self.shared.addresses.basin_header {
            request.headers_mut().insert(BASIN, basin.clone());
        }
        request
    }

    /// Sends a request and returns its answer if that is a success.
    async fn send(&self, operation: Operation, request: Request) -> Result<Response, Error> {
        let again = request.try_clone();
        let token = self.authorization().await?;
        let result = self.send_with(operation, request, token.as_ref()).await;
        let Err(Error::Refused { answer, .. }) = &result else { return result };
        if answer.status == 401
            && let (Some(again), Some(refused)) = (again, &token)
        {
            let token = self.authorization().await?;
            if token.as_ref() != Some(refused) {
                return self.send_with(operation, again, token.as_ref()).await;
            }
        }
        result
    }

    async fn send_with(
        &self,
        operation: Operation,
        mut request: Request,
        token: Option<&HeaderValue>,
    ) -> Result<Response, Error> {
        if let Some(token) = token {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        let answering = self.shared.transport.execute(Lane::Unary, request);
        let response = answering.await.map_err(|failed| self.connection(operation, failed))?;
        self.accept(operation, response, token).await
    }

    async fn authorization(&self) -> Result<Option<HeaderValue>, Error> {
        match &self.shared.token {
            Some(token) => token.header().await.map(Some),
            None => Ok(None),
        }
    }

    /// Tells a success from a refusal, and reads the refusal.
    async fn accept(
        &self,
        operation: Operation,
        mut response: Response,
        token: Option<&HeaderValue>,
    ) -> Result<Response, Error> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = retry_after(response.headers());
        let mut body = BytesMut::new();
        // The status is what counts: a body that breaks off is kept as far as it came.
        while body.len() < ANSWER_BYTES_MAX
            && let Ok(Some(chunk)) = response.chunk().await
        {
            body.extend_from_slice(&chunk);
        }
        Err(self.refused(operation, status.as_u16(), &body, retry_after, token).await)
    }

    /// The error that an answer amounts to. A token that S2 does not know is forgotten, so that the
    /// next request reads its file again.
    pub(super) async fn refused(
        &self,
        operation: Operation,
        status: u16,
        body: &[u8],
        retry_after: Option<Duration>,
        token: Option<&HeaderValue>,
    ) -> Error {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Condition {
            SeqNumMismatch(u64),
            FencingTokenMismatch(String),
        }
        let place = self.place().clone();
        if status == StatusCode::PRECONDITION_FAILED.as_u16() {
            match serde_json::from_slice(body) {
                Ok(Condition::SeqNumMismatch(next)) => return Error::SeqMismatch { place, next },
                Ok(Condition::FencingTokenMismatch(actual)) => {
                    return Error::Fenced { place, actual };
                }
                Err(_) => {}
            }
        }
        if status == StatusCode::UNAUTHORIZED.as_u16()
            && let (Some(token), Some(refused)) = (&self.shared.token, token)
        {
            token.forget(refused).await;
        }
        Error::Refused { place, operation, answer: Answer::new(status, body, retry_after) }
    }

    fn connection(&self, operation: Operation, failed: Failed) -> Error {
        let Failed { fault, source } = failed;
        Error::Connection {
            place: self.place().clone(),
            operation,
            fault,
            ambiguous: matches!(operation, Operation::Append | Operation::Fence)
                && matches!(fault, Fault::TimeOut | Fault::Cut),
            source,
        }
    }

    fn protocol(
        &self,
        operation: Operation,
        what: &str,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Error {
        Error::Protocol {
            place: self.place().clone(),
            operation,
            what: what.to_owned(),
            source: Some(Box::new(source)),
        }
    }

    async fn body(&self, operation: Operation, mut response: Response) -> Result<Bytes, Error> {
        let failed = |error: reqwest::Error| self.connection(operation, error.into());
        let Some(first) = response.chunk().await.map_err(failed)? else { return Ok(Bytes::new()) };
        // An answer mostly comes as one piece, which is then not copied.
        let Some(second) = response.chunk().await.map_err(failed)? else { return Ok(first) };
        let mut whole = BytesMut::with_capacity(2 * (first.len() + second.len()));
        whole.extend_from_slice(&first);
        whole.extend_from_slice(&second);
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if whole.len() + chunk.remaining() > ANSWER_PAGE_BYTES_MAX {
                return Err(Error::Protocol {
                    place: self.place().clone(),
                    operation,
                    what: format!("its answer is over {ANSWER_PAGE_BYTES_MAX} bytes"),
                    source: None,
                });
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }

    async fn json<T: for<'a> Deserialize<'a>>(
        &self,
        operation: Operation,
        response: Response,
    ) -> Result<T, Error> {
        let body = self.body(operation, response).await?;
        serde_json::from_slice(&body).map_err(|source| {
            self.protocol(operation, "its answer is not the JSON it should be", source)
        })
    }

    /// Starts the request of an append session: its answer comes while the body is still sent.
    pub(super) async fn start_session(&self, body: Body) -> Result<Response, Error> {
        let token = self.authorization().await?;
        let mut request = self.post(&self.shared.addresses.records, SESSION, body);
        // A time-out of the whole request would cut the session.
        *request.timeout_mut() = None;
        if let Some(token) = &token {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        let answering = self.shared.transport.execute(Lane::Session, request);
        let response =
            answering.await.map_err(|failed| self.connection(Operation::Append, failed))?;
        self.accept(Operation::Append, response, token.as_ref()).await
    }

    pub(super) fn session_connection(&self, source: reqwest::Error) -> Error {
        self.connection(Operation::Append, source.into())
    }

    /// A session's terminal frame said 401.
    pub(super) async fn forget_token(&self) {
        if let Ok(Some(current)) = self.authorization().await
            && let Some(token) = &self.shared.token
        {
            token.forget(&current).await;
        }
    }
}

/// The command record that sets a stream's fencing token. It takes the tail's timestamp: with its
/// time of arrival, later records with older commit times would be raised to it.
fn fence_record(token: &str, timestamp_ms: u64) -> Record {
    use super::record::Header;
    Record {
        timestamp_ms: Some(timestamp_ms),
        headers: Header { name: Bytes::new(), value: Bytes::from_static(b"fence") }.into(),
        body: Bytes::copy_from_slice(token.as_bytes()),
    }
}

#[derive(Deserialize)]
struct Position {
    seq_num: u64,
    timestamp: u64,
}

impl From<Position> for Tail {
    fn from(position: Position) -> Self {
        Self { next_seq: position.seq_num, timestamp_ms: position.timestamp }
    }
}

impl From<StreamPosition> for Tail {
    fn from(position: StreamPosition) -> Self {
        Self { next_seq: position.seq_num, timestamp_ms: position.timestamp }
    }
}

/// The tail that S2 names when it answers 416.
fn tail_in(body: &str) -> Option<Tail> {
    #[derive(Deserialize)]
    struct Body {
        tail: Position,
    }
    serde_json::from_str::<Body>(body).ok().map(|body| body.tail.into())
}

/// How long the answer asks us to wait: S2 says it in milliseconds, proxies in seconds.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let number = |name| headers.get(name)?.to_str().ok()?.trim().parse::<u64>().ok();
    number("retry-after-ms")
        .map(Duration::from_millis)
        .or_else(|| number("retry-after").map(Duration::from_secs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_that_answers_ask_for() {
        fn check(name: &'static str, value: &'static str, expected: Option<u64>) {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            assert_eq!(retry_after(&headers), expected.map(Duration::from_millis));
        }
        check("retry-after-ms", "250", Some(250));
        check("retry-after", "2", Some(2000));
        check("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT", None);
        check("retry-after-ms", "-1", None);
        check("other", "1", None);
    }

    #[test]
    fn the_tail_in_a_416() {
        let tail = Tail { next_seq: 3, timestamp_ms: 5 };
        assert_eq!(tail_in(r#"{"tail":{"seq_num":3,"timestamp":5}}"#), Some(tail));
        assert_eq!(tail_in("range not satisfiable"), None);
    }

    #[tokio::test]
    async fn conditions_are_told_apart() {
        let client = Client::new(Settings {
            endpoint: Endpoint::Url("http://127.0.0.1:1".to_owned()),
            ..Settings::new("my-basin", "s")
        })
        .unwrap();
        let refused =
            |body: &'static [u8]| client.refused(Operation::Append, 412, body, None, None);
        let error = refused(br#"{"seq_num_mismatch":7}"#).await;
        assert!(matches!(error, Error::SeqMismatch { next: 7, .. }));
        let error = refused(br#"{"fencing_token_mismatch":"them"}"#).await;
        assert!(matches!(error, Error::Fenced { actual, .. } if actual == "them"));
        let error = refused(b"<html>").await;
        assert_eq!(error.status(), Some(412));
    }

    #[tokio::test]
    async fn nothing_listens() {
        let client = Client::new(Settings {
            endpoint: Endpoint::Url("http://127.0.0.1:1".to_owned()),
            ..Settings::new("my-basin", "s")
        })
        .unwrap();
        let error = client.tail().await.unwrap_err();
        assert!(
            matches!(error, Error::Connection { fault: Fault::Connect, ambiguous: false, .. }),
            "{error:?}"
        );
        let client = Client::new(Settings {
            endpoint: Endpoint::Url("http://name.invalid".to_owned()),
            ..Settings::new("my-basin", "s")
        })
        .unwrap();
        let error = client.tail().await.unwrap_err();
        assert!(matches!(error, Error::Connection { fault: Fault::Dns, .. }), "{error:?}");
    }
}
