//! Everything that can go wrong between us and S2.
//!
//! [`Error`] says what happened and where; [`Error::class`] says by the table in
//! [`outcomes`](crate::policy::outcomes) whose trouble it is: the sink's as a
//! whole (wait, say so, go on by itself), a record's (park it), or the stream's (an operator must
//! decide). Nothing here decides what to do about it.
//!
//! No error carries an access token or a row's value. What S2 answered is kept, cut to
//! [`ANSWER_BYTES_MAX`].

use std::{
    borrow::Cow, error::Error as StdError, fmt, io, path::PathBuf, sync::Arc, time::Duration,
};

use serde::Deserialize;

use crate::policy::outcomes::{self, Condition, Happens};

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
    pub named: Named,
}

/// What says which stream it is, and so what corrects a wrong name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Named {
    /// `sink.stream`.
    #[default]
    Sink,
    /// A transform, message by message.
    Route,
    /// `dead_letters.stream`.
    DeadLetters,
}

impl Named {
    /// What to do about a stream that is not there, beside creating it.
    #[must_use]
    pub fn correction(self) -> &'static str {
        match self {
            Self::Sink => "correct `sink.stream`",
            Self::Route => "correct the transform that routes messages to it",
            Self::DeadLetters => "correct `dead_letters.stream`",
        }
    }
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
    /// The certificate's time is over.
    CertificateExpired,
    /// The certificate's time has not begun.
    CertificateNotYet,
    /// The certificate is for another name.
    CertificateName,
    /// Nobody whom this machine trusts has signed the certificate.
    CertificateIssuer,
    /// Anything else of the certificate, or the handshake.
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
    pub(crate) fn new(status: u16, body: &[u8], retry_after: Option<Duration>) -> Self {
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
    #[error("{}", Condition::Settings.sentence(None, &[("what", text)]))]
    Settings { text: String },
    #[error("{}", Condition::HttpClient.sentence(None, &[]))]
    HttpClient {
        #[source]
        source: reqwest::Error,
    },
    #[error("{}", Condition::TokenFile.sentence(None, &[("path", &path.display())]))]
    TokenFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// S2, or something in front of it, refused.
    #[error("{}", outcomes::of_answer(*operation, answer).sentence(place, *operation, answer))]
    Refused { place: Arc<Place>, operation: Operation, answer: Answer },
    /// No answer, or none that is whole.
    #[error("{}", outcomes::of_fault(place, *operation, *fault).1)]
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
        "{}",
        Condition::Protocol.sentence(Some(place), &[("operation", operation), ("what", what)])
    )]
    Protocol {
        place: Arc<Place>,
        operation: Operation,
        what: String,
        #[source]
        source: Option<Box<dyn StdError + Send + Sync>>,
    },
    /// An append was guarded by a number that is not the stream's next one. Nothing landed.
    #[error("{}", Condition::OtherNumber.sentence(Some(place), &[("next", next)]))]
    SeqMismatch { place: Arc<Place>, next: u64 },
    /// An append was guarded by a token that is no longer the stream's. Nothing landed.
    #[error("{}", Condition::of_token(actual).sentence(Some(place), &[("actual", actual)]))]
    Fenced { place: Arc<Place>, actual: String },
    /// The stream ends before what it had reached: it was deleted and created again, or is an older state of
    /// itself.
    #[error(
        "{}",
        Condition::Recreated.sentence(Some(place), &[("tail", tail), ("reached", reached)])
    )]
    StreamRecreated { place: Arc<Place>, reached: u64, tail: u64 },
    /// Records after the checkpoint are gone, so that nobody can say which of them arrived.
    #[error(
        "{}",
        Condition::Trimmed.sentence(Some(place), &[("first", first), ("read_from", read_from)])
    )]
    StreamTrimmed {
        place: Arc<Place>,
        read_from: u64,
        /// The first number that can still be read, or the tail where nothing can.
        first: u64,
    },
    /// A batch that must not be sent: more than S2's limits, or nothing. A defect of the caller.
    #[error("{}", Condition::Batch.sentence(None, &[("what", what)]))]
    Batch { what: String },
    /// The session was half-closed and everything on it is answered.
    #[error("{}", Condition::Closed.sentence(None, &[]))]
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
    Fatal { code: &'static str, text: String },
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
    /// What the error means.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Refused { operation, answer, .. } => self.class_of_answer(*operation, answer),
            Self::Connection { place, operation, fault, ambiguous, .. } => {
                let (code, text) = outcomes::of_fault(place, *operation, *fault);
                Class::Sink(Trouble {
                    code: Cow::Borrowed(code),
                    text,
                    retry_after: None,
                    ambiguous: *ambiguous,
                })
            }
            Self::SeqMismatch { next, .. } => Class::SeqMismatch { next: *next },
            Self::Fenced { actual, .. } => Class::Fenced { actual: actual.clone() },
            Self::Protocol { operation, .. } => {
                self.class_of_condition(Condition::Protocol, operation.appends())
            }
            Self::TokenFile { .. } => self.class_of_condition(Condition::TokenFile, false),
            Self::Closed => self.class_of_condition(Condition::Closed, false),
            Self::StreamRecreated { .. } => self.class_of_condition(Condition::Recreated, false),
            Self::StreamTrimmed { .. } => self.class_of_condition(Condition::Trimmed, false),
            Self::Settings { .. } => self.class_of_condition(Condition::Settings, false),
            Self::HttpClient { .. } => self.class_of_condition(Condition::HttpClient, false),
            Self::Batch { .. } => self.class_of_condition(Condition::Batch, false),
        }
    }

    fn class_of_condition(&self, condition: Condition, appends: bool) -> Class {
        let row = outcomes::of_condition(condition);
        let text = self.to_string();
        match row.happens {
            Happens::OperatorDecides => Class::Stream { code: row.code, text },
            Happens::PipelineStops => Class::Fatal { code: row.code, text },
            Happens::SinkWaits
            | Happens::LineReopens
            | Happens::StandsDown
            | Happens::MessageParks
            | Happens::MessageRetries => Class::Sink(Trouble {
                code: Cow::Borrowed(row.code),
                text,
                retry_after: None,
                ambiguous: appends && row.may_have_landed,
            }),
        }
    }

    fn class_of_answer(&self, operation: Operation, answer: &Answer) -> Class {
        let refusal = || Refusal { status: answer.status, body: answer.body.clone() };
        let row = outcomes::of_answer(operation, answer);
        match row.happens {
            Happens::MessageParks => Class::Oversize(refusal()),
            Happens::MessageRetries => Class::Refused(refusal()),
            Happens::SinkWaits
            | Happens::LineReopens
            | Happens::StandsDown
            | Happens::OperatorDecides
            | Happens::PipelineStops => Class::Sink(Trouble {
                code: Cow::Owned(row.code(answer)),
                text: self.to_string(),
                retry_after: answer.retry_after,
                ambiguous: operation.appends() && row.may_have_landed,
            }),
        }
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

    /// Whether S2 says that it is deleting the stream.
    #[must_use]
    pub fn is_stream_leaving(&self) -> bool {
        matches!(self, Self::Refused { answer, .. }
            if answer.status == 409 && answer.code() == "stream_deletion_pending")
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
        if let Some(error) = error.downcast_ref() {
            return fault_of_tls(error);
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
            if let Some(error) = hidden_tls(error) {
                return fault_of_tls(error);
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

/// An I/O error hides the cause that it was made of from `source`, and may be one of several, each in the
/// other.
fn hidden_tls(error: &io::Error) -> Option<&rustls::Error> {
    let inner = error.get_ref()?;
    inner.downcast_ref().or_else(|| hidden_tls(inner.downcast_ref()?))
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a certificate can be wrong in two dozen ways, and these are told apart"
)]
fn fault_of_tls(error: &rustls::Error) -> Fault {
    use rustls::CertificateError as Certificate;
    let rustls::Error::InvalidCertificate(error) = error else { return Fault::Tls };
    match error {
        Certificate::Expired | Certificate::ExpiredContext { .. } => Fault::CertificateExpired,
        Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => {
            Fault::CertificateNotYet
        }
        Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
            Fault::CertificateName
        }
        Certificate::UnknownIssuer => Fault::CertificateIssuer,
        _ => Fault::Tls,
    }
}

#[cfg(test)]
mod tests;
