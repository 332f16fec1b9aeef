//! Everything that can go wrong between us and S2, and the one table that says what it means.
//!
//! [`Error`] says what happened and where; [`Error::class`] says whose trouble it is: the sink's as a
//! whole (wait, say so, go on by itself), a record's (park it), or the stream's (an operator must
//! decide). Nothing here decides what to do about it.
//!
//! No error carries an access token or a row's value. What S2 answered is kept, cut to
//! [`ANSWER_BYTES_MAX`].

use std::{
    borrow::Cow, error::Error as StdError, fmt, io, path::PathBuf, sync::Arc, time::Duration,
};

use serde::Deserialize;

/// The most bytes of an answer that are read and kept for an error: S2's are a few hundred, a
/// proxy's page may be of any size.
pub const ANSWER_BYTES_MAX: usize = 4 * 1024;

/// The stream that an error is about, as an operator knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Scheme, host and port; no path, no credentials.
    pub endpoint: String,
    pub basin: String,
    pub stream: String,
}

/// What was being asked of S2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Append,
    Fence,
    Tail,
    Read,
    GetStream,
    CreateStream,
    GetBasin,
    CreateBasin,
}

impl Operation {
    /// Whether it may have changed the stream when its answer is lost.
    fn appends(self) -> bool {
        matches!(self, Self::Append | Self::Fence)
    }

    /// The permission that an access token needs for it, by S2's name.
    #[must_use]
    pub fn permission(self) -> &'static str {
        match self {
            Self::Append => "append",
            Self::Fence => "fence",
            Self::Tail => "check-tail",
            Self::Read => "read",
            Self::GetStream => "get-stream-config",
            Self::CreateStream => "create-stream",
            Self::GetBasin => "get-basin-config",
            Self::CreateBasin => "create-basin",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Append => "append to",
            Self::Fence => "fence",
            Self::Tail => "check the tail of",
            Self::Read => "read",
            Self::GetStream => "look up",
            Self::CreateStream => "create",
            Self::GetBasin => "look up the basin of",
            Self::CreateBasin => "create the basin of",
        })
    }
}

/// How a connection failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The name has no address.
    Dns,
    /// Nothing listens there, or nothing answers there at all.
    Connect,
    /// The certificate or the handshake.
    Tls,
    /// No answer in time.
    TimeOut,
    /// The connection broke in the middle.
    Cut,
}

/// What S2, or something in front of it, answered when it refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status, of the response or of a session's terminal frame.
    pub status: u16,
    /// S2's code where the answer is S2's.
    pub code: Option<String>,
    /// The answer as it came, cut to [`ANSWER_BYTES_MAX`].
    pub body: String,
    /// How long S2 asks us to wait.
    pub retry_after: Option<Duration>,
}

impl Answer {
    /// Reads what can be read of an answer; anything else is kept as text.
    pub(super) fn new(status: u16, body: &[u8], retry_after: Option<Duration>) -> Self {
        #[derive(Deserialize)]
        struct Info {
            code: String,
        }
        let code = serde_json::from_slice::<Info>(body).ok().map(|info| info.code);
        let body = String::from_utf8_lossy(&body[..body.len().min(ANSWER_BYTES_MAX)]).into_owned();
        Self { status, code, body, retry_after }
    }

    fn code(&self) -> &str {
        self.code.as_deref().unwrap_or("")
    }

    /// S2's message, or the answer's first line where it is not S2's.
    #[must_use]
    pub fn message(&self) -> Cow<'_, str> {
        #[derive(Deserialize)]
        struct Info {
            message: String,
        }
        match serde_json::from_str::<Info>(&self.body) {
            Ok(info) => Cow::Owned(info.message),
            Err(_) => {
                let line = self.body.lines().next().unwrap_or("").trim();
                Cow::Owned(line.chars().take(200).collect())
            }
        }
    }
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting cannot be right, whatever S2 says.
    #[error("{text}")]
    Settings { text: String },
    #[error("could not set up the HTTP client for S2")]
    HttpClient {
        #[source]
        source: reqwest::Error,
    },
    #[error(
        "could not read the S2 access token from {}: write the token there, readable by this \
         process", path.display()
    )]
    TokenFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// S2, or something in front of it, refused.
    #[error("{}", refusal_text(place, *operation, answer))]
    Refused { place: Arc<Place>, operation: Operation, answer: Answer },
    /// No answer, or none that is whole.
    #[error("{}", connection_text(place, *operation, *fault))]
    Connection {
        place: Arc<Place>,
        operation: Operation,
        fault: Fault,
        /// Whether appends of ours were without an answer when it happened.
        ambiguous: bool,
        #[source]
        source: Option<Box<dyn StdError + Send + Sync>>,
    },
    /// An answer that S2 does not give.
    #[error(
        "could not {operation} `{}` in basin `{}`: {} did not answer as S2 does ({what}); check that \
         `sink.endpoint` names an S2 server", place.stream, place.basin, place.endpoint
    )]
    Protocol {
        place: Arc<Place>,
        operation: Operation,
        what: String,
        #[source]
        source: Option<Box<dyn StdError + Send + Sync>>,
    },
    /// An append was guarded by a number that is not the stream's next one. Nothing landed.
    #[error(
        "stream `{}` in basin `{}` goes on at record {next}, which is not the number that was \
         expected: something was appended in between", place.stream, place.basin
    )]
    SeqMismatch { place: Arc<Place>, next: u64 },
    /// An append was guarded by a token that is no longer the stream's. Nothing landed.
    #[error(
        "stream `{}` in basin `{}` was taken over by another writer (fencing token `{actual}`): this \
         process writes nothing more, because only one may write to a stream", place.stream,
        place.basin
    )]
    Fenced { place: Arc<Place>, actual: String },
    /// The stream ends before the checkpoint: it was deleted and created again.
    #[error(
        "stream `{}` in basin `{}` ends at record {tail}, before record {read_from} that this \
         pipeline has to read from: it was deleted and created again; start once with \
         `sluicebox run --lost-records resend` to send everything since the checkpoint into it, or with \
         `skip` to begin with what is committed from now on", place.stream, place.basin
    )]
    StreamRecreated { place: Arc<Place>, read_from: u64, tail: u64 },
    /// Records after the checkpoint are gone, so that nobody can say which of them arrived.
    #[error(
        "stream `{}` in basin `{}` begins at record {first}, after record {read_from} that this \
         pipeline has to read from: the records between were trimmed or have expired; start once \
         with `sluicebox run --lost-records resend` to send again what cannot be found (some changes come \
         twice, none is missing), or with `skip` to take it as delivered (none comes twice, some may be \
         missing)",
        place.stream, place.basin
    )]
    StreamTrimmed {
        place: Arc<Place>,
        read_from: u64,
        /// The first number that can still be read, or the tail where nothing can.
        first: u64,
    },
    /// A batch that must not be sent: more than S2's limits, or nothing. A defect of the caller.
    #[error("a batch cannot be sent: {what}")]
    Batch { what: String },
    /// The session was half-closed and everything on it is answered.
    #[error("the append session is closed")]
    Closed,
}

/// Whose trouble an error is. Each arm asks for another treatment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Class {
    /// The sink as a whole cannot take anything now, and may again without our doing.
    Sink(Trouble),
    /// A record, or the batch as a whole for something in front of S2, is too large. Sending it again
    /// unchanged is of no use; a batch is worth trying in halves to find the record.
    Oversize(Refusal),
    /// S2 does not take a record of the batch, for another reason than its size.
    Refused(Refusal),
    /// Open the session anew: the numbers no longer fit.
    SeqMismatch { next: u64 },
    /// Another writer has taken the stream: stand down.
    Fenced { actual: String },
    /// Only an operator can say how to go on.
    Stream { code: &'static str, text: String },
    /// The settings cannot work, or this program has a defect.
    Fatal { text: String },
}

/// Why the sink waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Stable: scripts and alerts match on it. `sink_401`, `sink_404_stream`, `sink_unreachable`, …
    pub code: Cow<'static, str>,
    /// For an operator: what is wrong, where, and what mends it.
    pub text: String,
    /// Wait at least so long.
    pub retry_after: Option<Duration>,
    /// Whether an append may have landed all the same, so that the stream's end has to be read
    /// before anything is sent again.
    pub ambiguous: bool,
}

/// What S2 said of a record that it does not take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: u16,
    /// Cut to [`ANSWER_BYTES_MAX`].
    pub body: String,
}

impl Error {
    /// What the error means. Every outcome of every operation is in this one table.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Refused { operation, answer, .. } => self.class_of_answer(*operation, answer),
            Self::Connection { fault, ambiguous, .. } => Class::Sink(Trouble {
                code: Cow::Borrowed(match fault {
                    Fault::Dns => "sink_dns",
                    Fault::Connect => "sink_unreachable",
                    Fault::Tls => "sink_tls",
                    Fault::TimeOut => "sink_timeout",
                    Fault::Cut => "sink_cut",
                }),
                text: self.to_string(),
                retry_after: None,
                ambiguous: *ambiguous,
            }),
            Self::Protocol { operation, .. } => Class::Sink(Trouble {
                code: Cow::Borrowed("sink_protocol"),
                text: self.to_string(),
                retry_after: None,
                ambiguous: operation.appends(),
            }),
            Self::TokenFile { .. } => Class::Sink(Trouble {
                code: Cow::Borrowed("sink_token_file"),
                text: self.to_string(),
                retry_after: None,
                ambiguous: false,
            }),
            Self::Closed => Class::Sink(Trouble {
                code: Cow::Borrowed("sink_closed"),
                text: self.to_string(),
                retry_after: None,
                ambiguous: false,
            }),
            Self::SeqMismatch { next, .. } => Class::SeqMismatch { next: *next },
            Self::Fenced { actual, .. } => Class::Fenced { actual: actual.clone() },
            Self::StreamRecreated { .. } => {
                Class::Stream { code: "sink_stream_recreated", text: self.to_string() }
            }
            Self::StreamTrimmed { .. } => {
                Class::Stream { code: "sink_stream_trimmed", text: self.to_string() }
            }
            Self::Settings { .. } | Self::HttpClient { .. } | Self::Batch { .. } => {
                Class::Fatal { text: self.to_string() }
            }
        }
    }

    fn class_of_answer(&self, operation: Operation, answer: &Answer) -> Class {
        let refusal = || Refusal { status: answer.status, body: answer.body.clone() };
        // Only an append carries records, so only an append can be refused for one.
        if operation == Operation::Append {
            match (answer.status, answer.code()) {
                (413, _) => return Class::Oversize(refusal()),
                (422, _) if answer.body.contains("metered size") => {
                    return Class::Oversize(refusal());
                }
                (400, _) if answer.body.contains("length limit exceeded") => {
                    return Class::Oversize(refusal());
                }
                (400, "bad_frame") if answer.body.contains("exceeds decode limit") => {
                    return Class::Oversize(refusal());
                }
                (422, _) | (400, "bad_proto") => return Class::Refused(refusal()),
                _ => {}
            }
        }
        let code = match (answer.status, answer.code()) {
            (403, "quota_exhausted") => Cow::Borrowed("sink_403_quota"),
            (404, "basin_not_found") => Cow::Borrowed("sink_404_basin"),
            (404, "stream_not_found") => Cow::Borrowed("sink_404_stream"),
            (404, "access_token_not_found") => Cow::Borrowed("sink_404_token"),
            (status, _) => Cow::Owned(format!("sink_{status}")),
        };
        Class::Sink(Trouble {
            code,
            text: self.to_string(),
            retry_after: answer.retry_after,
            ambiguous: operation.appends() && may_have_landed(answer),
        })
    }

    /// The HTTP status of a refusal.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        if let Self::Refused { answer, .. } = self { Some(answer.status) } else { None }
    }

    /// Whether S2 says that it has no such stream.
    #[must_use]
    pub fn is_stream_missing(&self) -> bool {
        matches!(self, Self::Refused { answer, .. }
            if answer.status == 404 && answer.code() == "stream_not_found")
    }

    /// Whether S2 says that it has no such basin.
    #[must_use]
    pub fn is_basin_missing(&self) -> bool {
        matches!(self, Self::Refused { answer, .. }
            if answer.status == 404 && answer.code() == "basin_not_found")
    }

    /// Whether the access token is known and may not do this.
    ///
    /// An exhausted quota is a 403 too, and no matter of the token's.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Refused { answer, .. }
            if answer.status == 403 && answer.code() != "quota_exhausted")
    }

    /// Whether the access token may not do just this.
    #[must_use]
    pub fn is_forbidden_to(&self, what: Operation) -> bool {
        matches!(self, Self::Refused { operation, .. } if *operation == what && self.is_forbidden())
    }
}

/// Whether an append that got this answer may be in the stream all the same. After
/// `api/src/v1/error.rs` of s2-streamstore/s2, except that `unavailable` counts as uncertain. A
/// status without a code that we know came from something in front of S2, which cannot know.
fn may_have_landed(answer: &Answer) -> bool {
    match answer.code() {
        "access_token_not_found"
        | "authn"
        | "bad_frame"
        | "bad_header"
        | "bad_json"
        | "bad_path"
        | "bad_proto"
        | "bad_query"
        | "basin_deletion_pending"
        | "basin_not_found"
        | "decryption_failed"
        | "hot_server"
        | "invalid"
        | "not_implemented"
        | "permission_denied"
        | "quota_exhausted"
        | "rate_limited"
        | "resource_already_exists"
        | "server_draining"
        | "stream_deletion_pending"
        | "stream_not_found"
        | "transaction_conflict" => false,
        _ => !matches!(answer.status, 300..=407 | 409..=498),
    }
}

fn refusal_text(place: &Place, operation: Operation, answer: &Answer) -> String {
    let Place { endpoint, basin, stream } = place;
    let status = answer.status;
    let what = format!("could not {operation} stream `{stream}` in basin `{basin}` at {endpoint}");
    let message = answer.message();
    let said = if message.is_empty() { String::new() } else { format!(" ({message})") };
    let reason = match (status, answer.code()) {
        (401, _) => "S2 does not know the access token (401); put a valid one into \
             `sink.access_token` or the file named by `sink.access_token_file`, or issue a new one at \
             https://s2.dev/dashboard"
            .to_owned(),
        (403, "quota_exhausted") => {
            format!("the account's quota is used up (403){said}; raise it at https://s2.dev/dashboard")
        }
        (403, _) => format!(
            "the access token does not allow it (403){said}; issue one whose scope holds this basin \
             and stream with the operations `append`, `check-tail`, `read` and `fence` (this was \
             `{}`)",
            operation.permission()
        ),
        (404, "basin_not_found") => format!(
            "there is no such basin (404); correct `sink.basin`, create it (`s2 create-basin \
             {basin}`), or set `sink.create = true`"
        ),
        (404, "stream_not_found") => format!(
            "there is no such stream (404); correct `sink.stream`, create it (`s2 create-stream \
             s2://{basin}/{stream}`), or set `sink.create = true`"
        ),
        (404, "access_token_not_found") => {
            "the access token was revoked or never existed (404); put a valid one into \
             `sink.access_token` or the file named by `sink.access_token_file`"
                .to_owned()
        }
        (404, _) => format!(
            "what answers there does not know S2's paths (404){said}; check `sink.endpoint`"
        ),
        (409, "basin_deletion_pending") => {
            "the basin is being deleted (409); wait until it is gone, or choose another".to_owned()
        }
        (409, "stream_deletion_pending") => {
            "the stream is being deleted (409); wait until it is gone, or choose another".to_owned()
        }
        (407, _) => "the HTTP proxy wants credentials (407); put them into the proxy's URL".to_owned(),
        (408 | 504, _) => format!("S2 ran out of time ({status}){said}; it is tried again"),
        (413, _) => "the request is too large (413) for S2 or for a proxy in front of it".to_owned(),
        (429, _) => format!("S2 asks us to send less often (429){said}; it is tried again more slowly"),
        (502 | 503, _) => {
            format!("S2 or a proxy in front of it is unavailable ({status}){said}; it is tried again")
        }
        (500..=599, _) => format!("S2 has a fault of its own ({status}){said}; it is tried again"),
        (300..=399, _) => {
            format!("it redirects elsewhere ({status}); set `sink.endpoint` to where S2 itself is")
        }
        _ => format!("it answered {status}{said}"),
    };
    format!("{what}: {reason}")
}

fn connection_text(place: &Place, operation: Operation, fault: Fault) -> String {
    let Place { endpoint, basin, stream } = place;
    let reason = match fault {
        Fault::Dns => "its name has no address; check `sink.endpoint` and the network's DNS",
        Fault::Connect => {
            "nothing answers there; check `sink.endpoint`, that the server is up, and \
             that a firewall lets this machine through"
        }
        Fault::Tls => {
            "the TLS handshake failed; check that the certificate is valid for this name \
             and signed by an authority that this machine knows"
        }
        Fault::TimeOut if operation == Operation::Append => {
            "no acknowledgement came in time; it is tried again. If that goes on and a proxy is in \
             between, it may not let a session through: set `sink.mode = \"unary\"`"
        }
        Fault::TimeOut => "no answer came in time; it is tried again",
        Fault::Cut => "the connection broke; it is tried again",
    };
    format!("could not {operation} stream `{stream}` in basin `{basin}` at {endpoint}: {reason}")
}

/// How a request failed, as far as its chain of causes tells.
pub(super) fn fault_of(error: &(dyn StdError + 'static)) -> Fault {
    let mut connecting = false;
    let mut fault = None;
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<reqwest::Error>() {
            connecting |= error.is_connect();
            if error.is_timeout() && fault.is_none() {
                fault = Some(Fault::TimeOut);
            }
        }
        if error.is::<rustls::Error>() {
            return Fault::Tls;
        }
        if let Some(error) = error.downcast_ref::<io::Error>() {
            let kind = error.kind();
            if matches!(
                kind,
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::AddrNotAvailable
            ) {
                return Fault::Connect;
            }
            if kind == io::ErrorKind::TimedOut && fault.is_none() {
                fault = Some(Fault::TimeOut);
            }
            // An I/O error hides a cause of another type from `source`.
            if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
                return Fault::Tls;
            }
        }
        // hyper-util says so in words only: its connector's error type is private.
        if error.to_string().starts_with("dns error") {
            return Fault::Dns;
        }
        next = error.source();
    }
    match fault {
        // No connection within the connect time-out: nothing is there.
        _ if connecting => Fault::Connect,
        Some(fault) => fault,
        None => Fault::Cut,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Arc<Place> {
        Arc::new(Place {
            endpoint: "http://127.0.0.1:8080".to_owned(),
            basin: "my-basin".to_owned(),
            stream: "products".to_owned(),
        })
    }

    fn refused(operation: Operation, status: u16, body: &str) -> Error {
        let answer = Answer::new(status, body.as_bytes(), None);
        Error::Refused { place: place(), operation, answer }
    }

    fn standard(code: &str, message: &str) -> String {
        format!(r#"{{"code":"{code}","message":"{message}"}}"#)
    }

    #[test]
    fn every_code_of_s2_has_its_class() {
        fn check(status: u16, code: &str, expected: &str, ambiguous: bool) {
            let error = refused(Operation::Append, status, &standard(code, "said so"));
            let Class::Sink(trouble) = error.class() else {
                panic!("{status} {code}: {:?}", error.class())
            };
            assert_eq!(trouble.code, expected, "{status} {code}");
            assert_eq!(trouble.ambiguous, ambiguous, "{status} {code}");
            for name in ["my-basin", "products", "http://127.0.0.1:8080"] {
                assert!(trouble.text.contains(name), "{}", trouble.text);
            }
        }
        check(400, "bad_header", "sink_400", false);
        check(400, "bad_json", "sink_400", false);
        check(400, "bad_frame", "sink_400", false);
        check(400, "bad_path", "sink_400", false);
        check(400, "bad_query", "sink_400", false);
        check(400, "decryption_failed", "sink_400", false);
        check(401, "authn", "sink_401", false);
        check(403, "permission_denied", "sink_403", false);
        check(403, "quota_exhausted", "sink_403_quota", false);
        check(404, "basin_not_found", "sink_404_basin", false);
        check(404, "stream_not_found", "sink_404_stream", false);
        check(404, "access_token_not_found", "sink_404_token", false);
        check(408, "request_timeout", "sink_408", true);
        check(409, "resource_already_exists", "sink_409", false);
        check(409, "basin_deletion_pending", "sink_409", false);
        check(409, "stream_deletion_pending", "sink_409", false);
        check(409, "transaction_conflict", "sink_409", false);
        check(429, "rate_limited", "sink_429", false);
        check(499, "client_hangup", "sink_499", true);
        check(500, "other", "sink_500", true);
        check(500, "storage", "sink_500", true);
        check(501, "not_implemented", "sink_501", false);
        check(502, "hot_server", "sink_502", false);
        check(503, "server_draining", "sink_503", false);
        check(503, "unavailable", "sink_503", true);
        check(504, "upstream_timeout", "sink_504", true);
    }

    #[test]
    fn what_stands_in_front_of_s2_cannot_know_whether_an_append_landed() {
        fn check(status: u16, code: &str, ambiguous: bool) {
            let error = refused(Operation::Append, status, "<html>\nno\n</html>");
            let Class::Sink(trouble) = error.class() else { panic!("{:?}", error.class()) };
            assert_eq!((&*trouble.code, trouble.ambiguous), (code, ambiguous), "{status}");
        }
        check(301, "sink_301", false);
        check(401, "sink_401", false);
        check(403, "sink_403", false);
        check(404, "sink_404", false);
        check(407, "sink_407", false);
        check(408, "sink_408", true);
        check(429, "sink_429", false);
        check(500, "sink_500", true);
        check(502, "sink_502", true);
        check(503, "sink_503", true);
        check(504, "sink_504", true);
        check(520, "sink_520", true);
    }

    #[test]
    fn a_record_is_to_blame_for_an_append_alone() {
        fn check(status: u16, body: &str, oversize: bool) {
            let refusal = Refusal { status, body: body.to_owned() };
            let expected =
                if oversize { Class::Oversize(refusal) } else { Class::Refused(refusal) };
            assert_eq!(refused(Operation::Append, status, body).class(), expected);
            for operation in [Operation::Fence, Operation::Tail, Operation::Read] {
                let class = refused(operation, status, body).class();
                let Class::Sink(trouble) = class else { panic!("{operation:?}: {class:?}") };
                assert_eq!(trouble.code, format!("sink_{status}"));
                assert!(!trouble.ambiguous);
            }
        }
        check(413, "<html>413 Request Entity Too Large</html>", true);
        check(413, "", true);
        let text = "record must have metered size less than 1 MiB";
        check(422, &standard("invalid", text), true);
        let text = "record batch must not exceed a metered size of 1 MiB";
        check(422, &standard("invalid", text), true);
        let text = "Failed to buffer the request body: length limit exceeded";
        check(400, &standard("bad_json", text), true);
        check(400, &standard("bad_proto", text), true);
        check(400, &standard("bad_frame", "frame exceeds decode limit"), true);
        check(422, &standard("invalid", "record batch must not exceed 1000 records"), false);
        check(422, &standard("invalid", "unknown command"), false);
        check(422, &standard("invalid", "record timestamp was missing"), false);
        check(422, "", false);
        check(400, &standard("bad_proto", "failed to decode Protobuf message"), false);
    }

    #[test]
    fn the_rest_of_the_table() {
        let connection = |fault, ambiguous| Error::Connection {
            place: place(),
            operation: Operation::Append,
            fault,
            ambiguous,
            source: None,
        };
        for (fault, code) in [
            (Fault::Dns, "sink_dns"),
            (Fault::Connect, "sink_unreachable"),
            (Fault::Tls, "sink_tls"),
            (Fault::TimeOut, "sink_timeout"),
            (Fault::Cut, "sink_cut"),
        ] {
            for ambiguous in [false, true] {
                let class = connection(fault, ambiguous).class();
                let Class::Sink(trouble) = class else { panic!("{class:?}") };
                assert_eq!((&*trouble.code, trouble.ambiguous), (code, ambiguous));
                assert!(trouble.text.contains("http://127.0.0.1:8080"));
            }
        }
        let error = Error::SeqMismatch { place: place(), next: 7 };
        assert_eq!(error.class(), Class::SeqMismatch { next: 7 });
        let error = Error::Fenced { place: place(), actual: "theirs".to_owned() };
        assert_eq!(error.class(), Class::Fenced { actual: "theirs".to_owned() });
        let error = Error::StreamRecreated { place: place(), read_from: 9, tail: 3 };
        assert!(matches!(error.class(), Class::Stream { code: "sink_stream_recreated", .. }));
        let error = Error::StreamTrimmed { place: place(), read_from: 9, first: 12 };
        assert!(matches!(error.class(), Class::Stream { code: "sink_stream_trimmed", .. }));
        let error = Error::Batch { what: "it is empty".to_owned() };
        assert!(matches!(error.class(), Class::Fatal { .. }));
    }

    #[test]
    fn an_answer_is_cut_and_its_wait_is_kept() {
        let body = "é".repeat(ANSWER_BYTES_MAX);
        let answer = Answer::new(503, body.as_bytes(), Some(Duration::from_millis(250)));
        assert_eq!(answer.body.len(), ANSWER_BYTES_MAX);
        let error = Error::Refused { place: place(), operation: Operation::Tail, answer };
        let Class::Sink(trouble) = error.class() else { panic!("{error}") };
        assert_eq!(trouble.retry_after, Some(Duration::from_millis(250)));
        assert!(trouble.text.len() < 1000, "{}", trouble.text);
    }

    #[test]
    fn sentences_name_the_mend() {
        fn check(error: &Error, mends: &[&str]) {
            let text = error.to_string();
            for mend in mends {
                assert!(text.contains(mend), "{text}");
            }
        }
        check(&refused(Operation::Tail, 401, "{}"), &["sink.access_token", "401"]);
        check(
            &refused(Operation::Fence, 403, &standard("permission_denied", "no")),
            &["`fence`", "check-tail", "(no)"],
        );
        check(
            &refused(Operation::Tail, 404, &standard("stream_not_found", "")),
            &["s2 create-stream s2://my-basin/products", "sink.create = true"],
        );
        check(
            &refused(Operation::Tail, 404, &standard("basin_not_found", "")),
            &["s2 create-basin my-basin", "sink.basin"],
        );
        check(&refused(Operation::Tail, 404, "nginx"), &["sink.endpoint", "(nginx)"]);
    }

    #[test]
    fn a_fault_is_found_in_the_chain() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        fn check(error: io::Error, expected: Fault) {
            assert_eq!(fault_of(&Outer(error)), expected);
        }
        check(io::ErrorKind::ConnectionRefused.into(), Fault::Connect);
        check(io::ErrorKind::HostUnreachable.into(), Fault::Connect);
        check(io::ErrorKind::TimedOut.into(), Fault::TimeOut);
        check(io::ErrorKind::ConnectionReset.into(), Fault::Cut);
        check(io::ErrorKind::UnexpectedEof.into(), Fault::Cut);
        check(io::Error::other(rustls::Error::DecryptError), Fault::Tls);
        check(io::Error::other("dns error: no such host"), Fault::Dns);
    }
}
