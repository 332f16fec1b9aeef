//! A model of an S2 server, for the simulation: streams in memory behind the requests that the client
//! sends, without a network, a disk or a clock. `tests` holds it to the real server.
//!
//! It knows what the client uses: appends as protobuf and as JSON, with their two conditions, fences,
//! tails, pages of records, and whether streams exist. An append lands as a whole or not at all.

#[cfg(feature = "embedded-s2")]
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message as _;

use super::proto::{
    AppendAck, AppendInput, AppendRecord, HeaderMessage, ReadBatch, SequencedRecord, StreamPosition,
};
use super::read::ReadRecord;
use super::record::{BATCH_RECORDS_MAX, RECORD_BYTES_MAX, metered_bytes};

/// The header of a record that this server does not take; its value is the message of the refusal.
pub(crate) const REFUSED_HEADER: &str = "refused";

/// An answer: a status, and protobuf or JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Bytes,
}

/// The server.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    streams: BTreeMap<String, Stream>,
    /// Took records with headers, as ours have them, in a batch without a fencing token.
    pub(crate) unguarded: Option<String>,
}

#[derive(Clone, Debug, Default)]
struct Stream {
    records: Vec<SequencedRecord>,
    /// Those before this number have expired.
    first: usize,
    token: String,
    timestamp: u64,
}

impl Model {
    pub(crate) fn create(&mut self, stream: &str) {
        self.streams.entry(stream.to_owned()).or_default();
    }

    /// What is in a stream from this number on.
    pub(crate) fn records(&self, stream: &str, from: usize) -> Vec<ReadRecord> {
        let stream = self.streams.get(stream);
        let records = stream.and_then(|stream| stream.records.get(from..));
        records.unwrap_or_default().iter().cloned().map(ReadRecord::from).collect()
    }

    /// The number that the stream's next record gets.
    pub(crate) fn tail(&self, stream: &str) -> u64 {
        self.streams.get(stream).map_or(0, |stream| stream.tail().seq_num)
    }

    /// Whether there is such a stream.
    pub(crate) fn has(&self, stream: &str) -> bool {
        self.streams.contains_key(stream)
    }

    /// Lets the records before this number expire.
    pub(crate) fn trim(&mut self, stream: &str, to: u64) {
        if let Some(stream) = self.streams.get_mut(stream) {
            let to = usize::try_from(to).unwrap_or(usize::MAX).min(stream.records.len());
            stream.first = stream.first.max(to);
        }
    }

    pub(crate) fn delete(&mut self, stream: &str) {
        self.streams.remove(stream);
    }

    /// Deletes a stream and creates it again.
    pub(crate) fn recreate(&mut self, stream: &str) {
        self.streams.insert(stream.to_owned(), Stream::default());
    }

    /// The stream's fencing token, empty where it never had one.
    pub(crate) fn token(&self, stream: &str) -> &str {
        self.streams.get(stream).map_or("", |stream| &stream.token)
    }

    /// Appends a record as a writer does that knows of no condition. Says whether there is the stream.
    pub(crate) fn append_plain(&mut self, stream: &str, body: &'static str) -> bool {
        let record = AppendRecord { timestamp: None, headers: Vec::new(), body: body.into() };
        let input = AppendInput { records: vec![record], match_seq_num: None, fencing_token: None };
        self.append(stream, &input.encode_to_vec()).is_ok()
    }

    /// Fences a stream as another program does, whatever its token was. Says whether there is the stream.
    pub(crate) fn fence(&mut self, stream: &str, token: &str) -> bool {
        let header = HeaderMessage { name: Bytes::new(), value: "fence".into() };
        let body = Bytes::copy_from_slice(token.as_bytes());
        let record = AppendRecord { timestamp: None, headers: vec![header], body };
        let input = AppendInput { records: vec![record], match_seq_num: None, fencing_token: None };
        self.append(stream, &input.encode_to_vec()).is_ok()
    }

    /// Answers a unary request. `query` gives a parameter's number.
    pub(crate) fn answer(
        &mut self,
        method: &str,
        path: &str,
        query: impl Fn(&str) -> Option<u64>,
        body: &[u8],
    ) -> Answer {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        match (method, &*parts) {
            ("GET", ["v1", "streams", stream]) => match self.streams.get(*stream) {
                Some(_) => json(200, "{}"),
                None => missing(),
            },
            ("POST", ["v1", "streams"]) => {
                #[derive(serde::Deserialize)]
                struct Create {
                    stream: String,
                }
                match serde_json::from_slice::<Create>(body) {
                    Ok(create) => {
                        self.create(&create.stream);
                        json(201, "{}")
                    }
                    Err(_) => error(400, "bad_json", "no stream is named"),
                }
            }
            ("GET", ["v1", "streams", stream, "records", "tail"]) => {
                match self.streams.get(*stream) {
                    Some(stream) => json(200, &stream.tail_json()),
                    None => missing(),
                }
            }
            ("GET", ["v1", "streams", stream, "records"]) => match self.streams.get(*stream) {
                Some(stream) => {
                    stream.read(query("seq_num").unwrap_or(0), query("count").unwrap_or(1000))
                }
                None => missing(),
            },
            // No `AppendInput` begins like this as protobuf.
            ("POST", ["v1", "streams", stream, "records"]) if body.starts_with(b"{") => {
                let append = |input: AppendInput| self.append(stream, &input.encode_to_vec());
                match from_json(body).and_then(append) {
                    Ok(ack) => json(200, &to_json(&ack)),
                    Err(refused) => refused,
                }
            }
            ("POST", ["v1", "streams", stream, "records"]) => match self.append(stream, body) {
                Ok(ack) => Answer { status: 200, body: ack.encode_to_vec().into() },
                Err(refused) => refused,
            },
            _ => error(404, "other", "no such path"),
        }
    }

    /// Appends one `AppendInput`, whole or not at all.
    pub(crate) fn append(&mut self, stream: &str, input: &[u8]) -> Result<AppendAck, Answer> {
        let input = AppendInput::decode(input)
            .map_err(|source| error(400, "bad_proto", &source.to_string()))?;
        let name = stream;
        let stream = self.streams.get_mut(name).ok_or_else(missing)?;
        let AppendInput { records, match_seq_num, fencing_token } = input;
        let invalid = |message: &str| Err(error(422, "invalid", message));
        if records.is_empty() {
            return invalid("record batch must not be empty");
        }
        if records.len() > BATCH_RECORDS_MAX {
            return invalid("record batch must not exceed 1000 records");
        }
        let mut total = 0;
        for record in &records {
            let headers = record.headers.iter().map(|one| (one.name.len(), one.value.len()));
            let bytes = metered_bytes(headers, record.body.len());
            if bytes > RECORD_BYTES_MAX {
                return invalid("record must have metered size less than 1 MiB");
            }
            total += bytes;
            if let Some(refused) = record.headers.iter().find(|one| one.name == REFUSED_HEADER) {
                return invalid(&String::from_utf8_lossy(&refused.value));
            }
        }
        if total > RECORD_BYTES_MAX {
            return invalid("record batch must not exceed a metered size of 1 MiB");
        }
        let has_token = fencing_token.is_some();
        if fencing_token.is_some_and(|token| token != stream.token) {
            let body = serde_json::json!({ "fencing_token_mismatch": stream.token });
            return Err(json(412, &body.to_string()));
        }
        let start = stream.records.len() as u64;
        if match_seq_num.is_some_and(|number| number != start) {
            return Err(json(412, &format!(r#"{{"seq_num_mismatch":{start}}}"#)));
        }
        let is_named =
            |record: &AppendRecord| record.headers.iter().any(|one| !one.name.is_empty());
        if !has_token && records.iter().any(is_named) {
            self.unguarded = Some(name.to_owned());
        }
        let first = stream.timestamp.max(records[0].timestamp.unwrap_or(0));
        for record in records {
            if let [HeaderMessage { name, value }] = &*record.headers
                && name.is_empty()
                && *value == "fence"
            {
                stream.token = String::from_utf8_lossy(&record.body).into_owned();
            }
            stream.timestamp = stream.timestamp.max(record.timestamp.unwrap_or(0));
            stream.records.push(SequencedRecord {
                seq_num: stream.records.len() as u64,
                timestamp: stream.timestamp,
                headers: record.headers,
                body: record.body,
            });
        }
        let end = stream.tail();
        let start = StreamPosition { seq_num: start, timestamp: first };
        Ok(AppendAck { start: Some(start), end: Some(end), tail: Some(end) })
    }
}

impl Stream {
    fn tail(&self) -> StreamPosition {
        StreamPosition { seq_num: self.records.len() as u64, timestamp: self.timestamp }
    }

    fn tail_json(&self) -> String {
        let StreamPosition { seq_num, timestamp } = self.tail();
        format!(r#"{{"tail":{{"seq_num":{seq_num},"timestamp":{timestamp}}}}}"#)
    }

    fn read(&self, from: u64, count: u64) -> Answer {
        let from = usize::try_from(from).unwrap_or(usize::MAX).max(self.first);
        if from >= self.records.len() {
            return json(416, &self.tail_json());
        }
        let mut total = 0;
        let fits = |record: &&SequencedRecord| {
            let headers = record.headers.iter().map(|one| (one.name.len(), one.value.len()));
            total += metered_bytes(headers, record.body.len());
            total <= RECORD_BYTES_MAX
        };
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let records = self.records[from..].iter().take(count).take_while(fits).cloned().collect();
        let batch = ReadBatch { records, tail: Some(self.tail()) };
        Answer { status: 200, body: batch.encode_to_vec().into() }
    }
}

/// An append as curl sends it. Base64, for what is no text, is not known here.
fn from_json(body: &[u8]) -> Result<AppendInput, Answer> {
    #[derive(serde::Deserialize)]
    struct Input {
        records: Vec<Record>,
        match_seq_num: Option<u64>,
        fencing_token: Option<String>,
    }
    #[derive(serde::Deserialize)]
    struct Record {
        timestamp: Option<u64>,
        #[serde(default)]
        headers: Vec<(String, String)>,
        body: String,
    }
    let input: Input = serde_json::from_slice(body)
        .map_err(|source| error(400, "bad_json", &source.to_string()))?;
    let header =
        |(name, value): (String, String)| HeaderMessage { name: name.into(), value: value.into() };
    let record = |Record { timestamp, headers, body }| AppendRecord {
        timestamp,
        headers: headers.into_iter().map(header).collect(),
        body: body.into(),
    };
    Ok(AppendInput {
        records: input.records.into_iter().map(record).collect(),
        match_seq_num: input.match_seq_num,
        fencing_token: input.fencing_token,
    })
}

fn to_json(ack: &AppendAck) -> String {
    let position = |position: Option<StreamPosition>| {
        let StreamPosition { seq_num, timestamp } = position.unwrap_or_default();
        serde_json::json!({ "seq_num": seq_num, "timestamp": timestamp })
    };
    let (start, end, tail) = (position(ack.start), position(ack.end), position(ack.tail));
    serde_json::json!({ "start": start, "end": end, "tail": tail }).to_string()
}

/// What goes down an append session for one append.
pub(crate) fn frame(answer: Result<AppendAck, Answer>) -> Bytes {
    let (flag, payload) = match answer {
        Ok(ack) => (0, ack.encode_to_vec()),
        Err(Answer { status, body }) => {
            let mut payload = status.to_be_bytes().to_vec();
            payload.extend_from_slice(&body);
            (0b1000_0000, payload)
        }
    };
    let mut frame = BytesMut::with_capacity(payload.len() + 4);
    frame.put_uint(payload.len() as u64 + 1, 3);
    frame.put_u8(flag);
    frame.put_slice(&payload);
    frame.freeze()
}

/// The payloads of the frames that came up an append session.
pub(crate) use super::proto::{Frame, FrameDecoder};

pub(crate) fn error(status: u16, code: &str, message: &str) -> Answer {
    json(status, &serde_json::json!({ "code": code, "message": message }).to_string())
}

fn missing() -> Answer {
    error(404, "stream_not_found", "stream not found")
}

fn json(status: u16, body: &str) -> Answer {
    Answer { status, body: Bytes::copy_from_slice(body.as_bytes()) }
}
