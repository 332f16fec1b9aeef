//! Every outcome of S2 and of the chain: what happens, and the sentence that an operator reads.
//!
//! - *The sink waits*: everything stays at the head, the reason is shown, and it goes on by itself once
//!   it is mended; `retry-after` is the least that it waits. No message is marked as failed for it.
//! - *The message parks*: it alone, holding its group, until the chain changes or an operator asks; the
//!   same bytes would meet the same answer. A batch that is refused for one record goes again with each
//!   of its changes alone, so that it costs that one.
//! - *The message is retried*: the same, and it is tried by itself as well, with a growing delay.
//! - *The line is opened anew*: at once, which finds out what the stream holds; nobody needs to do
//!   anything.
//! - *The process stands down*: the stream is another writer's, and only an operator can know whether it
//!   may be taken back ([`grants`](crate::pipeline::grants)).
//! - *An operator decides*: records that would tell what has arrived are gone; either way of going on has
//!   a price, which the sentence names.
//! - *The pipeline stops*: the settings cannot work, or this program has a defect.
//!
//! Where `delivery.max_attempts` bounds them, failures of a message itself count, and all of them are
//! tried by themselves until they are spent; then it becomes a
//! [dead letter](crate::pipeline::dead_letter). What is a stream's trouble (`route`) never counts, and
//! what makes the sink wait is no message's failure at all.
//!
//! *Landed* says whether an append with that outcome may be in the stream all the same. Nothing rests on
//! it: after whatever failure the stream is fenced and its end is read before anything is sent again.
//! The first row that fits counts.
//!
//! A stream that transforms route messages to has trouble of its own where S2 answers for it 403, 404
//! `stream_not_found` or 409 `stream_deletion_pending`, where somebody else has fenced it or its records
//! are gone, and where it takes nothing for 15 seconds while the pipeline's own stream does. Then
//! *the stream is shut*: messages bound for it park with the class `route` and the sentence of the
//! answer, and go by themselves as soon as it is back, which is tried all the time. Every other outcome
//! means there what it means everywhere: the stream waits, and so does what is behind it in its groups.
//! Why not the head in every case: one stream, whose name may come from a row's value, would stop them
//! all. Where a start cannot read such a stream, which may have what an earlier run sent, everything that
//! was committed before parks likewise.
//!
//! | outcome | what happens | landed | code |
//! | --- | --- | --- | --- |
//! | 413, to an append | the message parks | no | `oversize` |
//! | 422 “metered size”, to an append | the message parks | no | `oversize` |
//! | 400 “length limit exceeded”, to an append | the message parks | no | `oversize` |
//! | 400 `bad_frame` “exceeds decode limit”, to an append | the message parks | no | `oversize` |
//! | 422, to an append | the message is retried | no | `refused` |
//! | 400 `bad_proto`, to an append | the message is retried | no | `refused` |
//! | 401 | the sink waits | no | `sink_401` |
//! | 403 `quota_exhausted` | the sink waits | no | `sink_403_quota` |
//! | 403 | the sink waits | no | `sink_403` |
//! | 404 `basin_not_found` | the sink waits | no | `sink_404_basin` |
//! | 404 `stream_not_found` | the sink waits | no | `sink_404_stream` |
//! | 404 `access_token_not_found` | the sink waits | no | `sink_404_token` |
//! | 404 | the sink waits | no | `sink_404` |
//! | 407 | the sink waits | no | `sink_407` |
//! | 408 | the sink waits | perhaps | `sink_408` |
//! | 409 `basin_deletion_pending` | the sink waits | no | `sink_409` |
//! | 409 `stream_deletion_pending` | the sink waits | no | `sink_409` |
//! | 409 | the sink waits | no | `sink_409` |
//! | 412 | the sink waits | no | `sink_412` |
//! | 413 | the sink waits | no | `sink_413` |
//! | 429 | the sink waits | no | `sink_429` |
//! | 501 `not_implemented` | the sink waits | no | `sink_501` |
//! | 502 `hot_server` | the sink waits | no | `sink_502` |
//! | 503 `server_draining` | the sink waits | no | `sink_503` |
//! | 502–503 | the sink waits | perhaps | `sink_{status}` |
//! | 504 | the sink waits | perhaps | `sink_504` |
//! | 500–599 | the sink waits | perhaps | `sink_{status}` |
//! | 300–399 | the sink waits | no | `sink_{status}` |
//! | 400–498 | the sink waits | no | `sink_{status}` |
//! | any other | the sink waits | perhaps | `sink_{status}` |
//! | no address | the sink waits | no | `sink_dns` |
//! | connection refused | the sink waits | no | `sink_unreachable` |
//! | a certificate that has expired | the sink waits | no | `sink_tls` |
//! | a certificate that is not valid yet | the sink waits | no | `sink_tls` |
//! | a certificate for another name | the sink waits | no | `sink_tls` |
//! | a certificate of an unknown authority | the sink waits | no | `sink_tls` |
//! | TLS failure | the sink waits | no | `sink_tls` |
//! | time-out | the sink waits | perhaps | `sink_timeout` |
//! | cut in the middle | the sink waits | perhaps | `sink_cut` |
//! | 412 with a number | the line is opened anew | no | `sink_412_number` |
//! | 412 with an empty token | the line is opened anew | no | `sink_412_no_token` |
//! | 412 with a token | the process stands down | no | `sink_fenced` |
//! | a stream that was created again | an operator decides | no | `sink_stream_recreated` |
//! | a stream that was trimmed | an operator decides | no | `sink_stream_trimmed` |
//! | no answer of S2's | the sink waits | perhaps | `sink_protocol` |
//! | a token file that cannot be read | the sink waits | no | `sink_token_file` |
//! | a session that has ended | the sink waits | no | `sink_closed` |
//! | a batch that cannot be sent | the pipeline stops | no | `sink_batch` |
//! | settings that cannot be right | the pipeline stops | no | `sink_settings` |
//! | no HTTP client | the pipeline stops | no | `sink_http_client` |
//! | the chain: `oversize` with a transform to blame | the message parks | no | |
//! | the chain: `oversize` with a column to blame | the message parks | no | |
//! | the chain: `oversize` | the message parks | no | |
//! | the chain: `refused` | the message is retried | no | |
//! | the chain: `route`, its stream takes nothing | the message is retried | no | |
//! | the chain: anything else of a transform | the message is retried | no | |
//! | the chain: anything else | the message is retried | no | |

use std::fmt;

use crate::sink::error::{Answer, Fault, Operation, Place};

/// What happens after an outcome. See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happens {
    SinkWaits,
    MessageParks,
    MessageRetries,
    LineReopens,
    StandsDown,
    OperatorDecides,
    PipelineStops,
}

/// What was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// For anything.
    Anything,
    /// For an append, which alone carries records, so that only it can be refused for one.
    Append,
}

/// A row for an answer.
#[derive(Clone, Copy, Debug)]
pub struct AnswerRow {
    asked: Asked,
    /// First and last status.
    status: (u16, u16),
    /// S2's code; empty for any, also where the answer is not S2's.
    s2: &'static str,
    /// What the answer contains.
    said: &'static str,
    pub happens: Happens,
    pub may_have_landed: bool,
    /// For machines; a message's class where a message is to blame.
    code: &'static str,
    sentence: &'static str,
}

/// A row for a connection that failed.
#[derive(Clone, Copy, Debug)]
struct FaultRow {
    fault: Fault,
    code: &'static str,
    sentence: &'static str,
}

/// An outcome that is neither a refusal with a row of its own nor a connection that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The stream goes on at another number.
    OtherNumber,
    /// The stream has no fencing token any more.
    NoToken,
    /// The stream has somebody else's fencing token.
    OtherToken,
    Recreated,
    Trimmed,
    Protocol,
    TokenFile,
    Closed,
    Batch,
    Settings,
    HttpClient,
}

/// A row for a condition.
#[derive(Clone, Copy, Debug)]
pub struct ConditionRow {
    condition: Condition,
    pub happens: Happens,
    pub may_have_landed: bool,
    /// For machines: scripts and alerts match on it.
    pub code: &'static str,
    sentence: &'static str,
}

/// What has to be known of a failure for a row to fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Column,
    Transform,
    Nothing,
}

/// A row for a message of its own trouble.
#[derive(Clone, Copy, Debug)]
pub struct MessageRow {
    /// Empty for any.
    class: &'static str,
    known: Known,
    pub happens: Happens,
    /// Whether it counts among `delivery.max_attempts`.
    pub own: bool,
    sentence: &'static str,
}

#[rustfmt::skip]
static ANSWERS: &[AnswerRow] = &[
    AnswerRow {
        asked: Asked::Append, status: (413, 413), s2: "", said: "",
        happens: Happens::MessageParks, may_have_landed: false, code: "oversize",
        sentence: "S2, or a proxy in front of it, takes no record of this size (413)",
    },
    AnswerRow {
        asked: Asked::Append, status: (422, 422), s2: "", said: "metered size",
        happens: Happens::MessageParks, may_have_landed: false, code: "oversize",
        sentence: "the record is larger than S2 takes (422){said}",
    },
    AnswerRow {
        asked: Asked::Append, status: (400, 400), s2: "", said: "length limit exceeded",
        happens: Happens::MessageParks, may_have_landed: false, code: "oversize",
        sentence: "the record is larger than S2 takes in one request (400){said}",
    },
    AnswerRow {
        asked: Asked::Append, status: (400, 400), s2: "bad_frame", said: "exceeds decode limit",
        happens: Happens::MessageParks, may_have_landed: false, code: "oversize",
        sentence: "the record is larger than S2 takes in one frame (400){said}",
    },
    AnswerRow {
        asked: Asked::Append, status: (422, 422), s2: "", said: "",
        happens: Happens::MessageRetries, may_have_landed: false, code: "refused",
        sentence: "S2 does not take this record (422){said}",
    },
    AnswerRow {
        asked: Asked::Append, status: (400, 400), s2: "bad_proto", said: "",
        happens: Happens::MessageRetries, may_have_landed: false, code: "refused",
        sentence: "S2 cannot read this record (400){said}",
    },
    AnswerRow {
        asked: Asked::Anything, status: (401, 401), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_401",
        sentence: "S2 does not know the access token (401); put a valid one into \
                    `sink.access_token` or the file named by `sink.access_token_file`, or issue \
                    a new one at https://s2.dev/dashboard",
    },
    AnswerRow {
        asked: Asked::Anything, status: (403, 403), s2: "quota_exhausted", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_403_quota",
        sentence: "the account's quota is used up (403){said}; raise it at \
                    https://s2.dev/dashboard",
    },
    AnswerRow {
        asked: Asked::Anything, status: (403, 403), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_403",
        sentence: "the access token does not allow it (403){said}; issue one whose scope holds \
                    this basin and stream with the operations `append`, `check-tail`, `read` and \
                    `fence` (this was `{permission}`)",
    },
    AnswerRow {
        asked: Asked::Anything, status: (404, 404), s2: "basin_not_found", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_404_basin",
        sentence: "there is no such basin (404); correct `sink.basin`, create it (`s2 \
                    create-basin {basin}`), or set `sink.create = true`",
    },
    AnswerRow {
        asked: Asked::Anything, status: (404, 404), s2: "stream_not_found", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_404_stream",
        sentence: "there is no such stream (404); {correction}, create it (`s2 \
                    create-stream s2://{basin}/{stream}`), or set `sink.create = true`",
    },
    AnswerRow {
        asked: Asked::Anything, status: (404, 404), s2: "access_token_not_found", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_404_token",
        sentence: "the access token was revoked or never existed (404); put a valid one into \
                    `sink.access_token` or the file named by `sink.access_token_file`",
    },
    AnswerRow {
        asked: Asked::Anything, status: (404, 404), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_404",
        sentence: "what answers there does not know S2's paths (404){said}; check \
                    `sink.endpoint`",
    },
    AnswerRow {
        asked: Asked::Anything, status: (407, 407), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_407",
        sentence: "the HTTP proxy wants credentials (407); put them into the proxy's URL",
    },
    AnswerRow {
        asked: Asked::Anything, status: (408, 408), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: true, code: "sink_408",
        sentence: "S2 ran out of time (408){said}; it is tried again",
    },
    AnswerRow {
        asked: Asked::Anything, status: (409, 409), s2: "basin_deletion_pending", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_409",
        sentence: "the basin is being deleted (409); wait until it is gone, or choose another",
    },
    AnswerRow {
        asked: Asked::Anything, status: (409, 409), s2: "stream_deletion_pending", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_409",
        sentence: "the stream is being deleted (409); wait until it is gone, or choose another",
    },
    AnswerRow {
        asked: Asked::Anything, status: (409, 409), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_409",
        sentence: "S2 was busy with something that excludes it (409){said}; it is tried again",
    },
    AnswerRow {
        asked: Asked::Anything, status: (412, 412), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_412",
        sentence: "S2 refused a condition of ours without naming it (412){said}; the end of the \
                    stream is read again",
    },
    AnswerRow {
        asked: Asked::Anything, status: (413, 413), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_413",
        sentence: "the request is too large (413) for S2 or for a proxy in front of it",
    },
    AnswerRow {
        asked: Asked::Anything, status: (429, 429), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_429",
        sentence: "S2 asks us to send less often (429){said}; it is tried again more slowly",
    },
    AnswerRow {
        asked: Asked::Anything, status: (501, 501), s2: "not_implemented", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_501",
        sentence: "this server does not do that (501){said}; check `sink.endpoint`, or try \
                    `sink.mode = \"unary\"`",
    },
    AnswerRow {
        asked: Asked::Anything, status: (502, 502), s2: "hot_server", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_502",
        sentence: "S2's server is overloaded (502){said}; it is tried again",
    },
    AnswerRow {
        asked: Asked::Anything, status: (503, 503), s2: "server_draining", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_503",
        sentence: "S2's server is about to stop (503){said}; it is tried again",
    },
    AnswerRow {
        asked: Asked::Anything, status: (502, 503), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: true, code: "sink_{status}",
        sentence: "S2 or a proxy in front of it is unavailable ({status}){said}; it is tried \
                    again",
    },
    AnswerRow {
        asked: Asked::Anything, status: (504, 504), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: true, code: "sink_504",
        sentence: "S2 ran out of time (504){said}; it is tried again",
    },
    AnswerRow {
        asked: Asked::Anything, status: (500, 599), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: true, code: "sink_{status}",
        sentence: "S2 has a fault of its own ({status}){said}; it is tried again",
    },
    AnswerRow {
        asked: Asked::Anything, status: (300, 399), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_{status}",
        sentence: "it redirects elsewhere ({status}); set `sink.endpoint` to where S2 itself is",
    },
    AnswerRow {
        asked: Asked::Anything, status: (400, 498), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: false, code: "sink_{status}",
        sentence: "it answered {status}{said}",
    },
    AnswerRow {
        asked: Asked::Anything, status: (0, 65535), s2: "", said: "",
        happens: Happens::SinkWaits, may_have_landed: true, code: "sink_{status}",
        sentence: "it answered {status}{said}",
    },
];

#[rustfmt::skip]
const FAULTS: &[FaultRow] = &[
    FaultRow {
        fault: Fault::Dns, code: "sink_dns",
        sentence: "its name has no address; check `sink.endpoint` and the network's DNS",
    },
    FaultRow {
        fault: Fault::Connect, code: "sink_unreachable",
        sentence: "nothing answers there; check `sink.endpoint`, that the server is up, and \
                    that a firewall lets this machine through",
    },
    FaultRow {
        fault: Fault::CertificateExpired, code: "sink_tls",
        sentence: "the server's certificate has expired; renew it there, or set this machine's clock right",
    },
    FaultRow {
        fault: Fault::CertificateNotYet, code: "sink_tls",
        sentence: "the server's certificate is not valid yet; set this machine's clock right, or the server's",
    },
    FaultRow {
        fault: Fault::CertificateName, code: "sink_tls",
        sentence: "the server's certificate is for another name; write in `sink.endpoint` the name that the \
                    certificate has",
    },
    FaultRow {
        fault: Fault::CertificateIssuer, code: "sink_tls",
        sentence: "the server's certificate is signed by nobody whom this machine trusts; add the authority to \
                    the system's certificates, or set SSL_CERT_FILE to a file that has it",
    },
    FaultRow {
        fault: Fault::Tls, code: "sink_tls",
        sentence: "the TLS handshake failed; check that `sink.endpoint` is the server's, with a \
                    certificate of its own that is no authority's; where the server has no TLS, write \
                    http:// in `sink.endpoint`",
    },
    FaultRow {
        fault: Fault::TimeOut, code: "sink_timeout",
        sentence: "no answer came in time; it is tried again. If that goes on for appends and a \
                    proxy is in between, it may not let a session through: set `sink.mode = \
                    \"unary\"`",
    },
    FaultRow {
        fault: Fault::Cut, code: "sink_cut",
        sentence: "the connection broke; it is tried again. If it never holds, something else than \
                    S2 may listen there: check host, port and http:// or https:// in \
                    `sink.endpoint`",
    },
];

#[rustfmt::skip]
static CONDITIONS: &[ConditionRow] = &[
    ConditionRow {
        condition: Condition::OtherNumber, happens: Happens::LineReopens, may_have_landed: false,
        code: "sink_412_number",
        sentence: "stream `{stream}` in basin `{basin}` goes on at record {next}, which is not the \
                    number that was expected: something was appended in between",
    },
    ConditionRow {
        condition: Condition::NoToken, happens: Happens::LineReopens, may_have_landed: false,
        code: "sink_412_no_token",
        sentence: "stream `{stream}` in basin `{basin}` has no fencing token any more: it was deleted \
                    and created again, or somebody else took it away",
    },
    ConditionRow {
        condition: Condition::OtherToken, happens: Happens::StandsDown, may_have_landed: false,
        code: "sink_fenced",
        sentence: "stream `{stream}` in basin `{basin}` was taken over by another writer (fencing \
                    token `{actual}`): this process writes nothing more, because only one may write \
                    to a stream",
    },
    ConditionRow {
        condition: Condition::Recreated, happens: Happens::OperatorDecides, may_have_landed: false,
        code: "sink_stream_recreated",
        sentence: "stream `{stream}` in basin `{basin}` ends at record {tail}, and had reached record \
                    {reached}: it was deleted and created again, or S2 was put back to an older \
                    state; what was in it behind {tail} and is confirmed to Postgres does not come \
                    again (`sluicebox verify` tells what is missing); start once with `sluicebox run --lost-records resend` to send everything \
                    since the checkpoint into it, or with `skip` to begin with what is committed from \
                    now on",
    },
    ConditionRow {
        condition: Condition::Trimmed, happens: Happens::OperatorDecides, may_have_landed: false,
        code: "sink_stream_trimmed",
        sentence: "stream `{stream}` in basin `{basin}` begins at record {first}, after record \
                    {read_from} that this pipeline has to read from: the records between were trimmed \
                    or have expired; start once with `sluicebox run --lost-records resend` to send \
                    again what cannot be found (some changes come twice, none is missing), or with \
                    `skip` to take it as delivered (none comes twice, some may be missing)",
    },
    ConditionRow {
        condition: Condition::Protocol, happens: Happens::SinkWaits, may_have_landed: true,
        code: "sink_protocol",
        sentence: "could not {operation} `{stream}` in basin `{basin}`: {endpoint} did not answer as \
                    S2 does ({what}); check that `sink.endpoint` names an S2 server",
    },
    ConditionRow {
        condition: Condition::TokenFile, happens: Happens::SinkWaits, may_have_landed: false,
        code: "sink_token_file",
        sentence: "could not read the S2 access token from {path}: write the token there, readable by \
                    this process",
    },
    ConditionRow {
        condition: Condition::Closed, happens: Happens::SinkWaits, may_have_landed: false,
        code: "sink_closed",
        sentence: "the append session is closed",
    },
    ConditionRow {
        condition: Condition::Batch, happens: Happens::PipelineStops, may_have_landed: false,
        code: "sink_batch",
        sentence: "a batch cannot be sent: {what}",
    },
    ConditionRow {
        condition: Condition::Settings, happens: Happens::PipelineStops, may_have_landed: false,
        code: "sink_settings",
        sentence: "{what}",
    },
    ConditionRow {
        condition: Condition::HttpClient, happens: Happens::PipelineStops, may_have_landed: false,
        code: "sink_http_client",
        sentence: "could not set up the HTTP client for S2",
    },
];

#[rustfmt::skip]
const MESSAGES: &[MessageRow] = &[
    MessageRow {
        class: "oversize", known: Known::Transform, happens: Happens::MessageParks, own: true,
        sentence: "A transform made it too large: replace {transform} in the transforms folder by a \
                    version that makes less of it, and it is delivered at once",
    },
    MessageRow {
        class: "oversize", known: Known::Column, happens: Happens::MessageParks, own: true,
        sentence: "Remove or compress its largest column by a transform, and it is delivered at \
                    once: sluicebox transforms add strip-columns --column {column} (or \
                    compress-columns)",
    },
    MessageRow {
        class: "oversize", known: Known::Nothing, happens: Happens::MessageParks, own: true,
        sentence: "A transform made its body; put one into the folder that makes a smaller one",
    },
    MessageRow {
        class: "refused", known: Known::Nothing, happens: Happens::MessageRetries, own: true,
        sentence: "S2 does not take this record; change the transforms so that they make \
                    another, then: sluicebox messages retry {id}",
    },
    MessageRow {
        class: "route", known: Known::Nothing, happens: Happens::MessageRetries, own: false,
        sentence: "It follows by itself once its stream takes records: create the stream or allow \
                    the access token to write it (or set `sink.create = true`); or change the \
                    transform that routes it",
    },
    MessageRow {
        class: "", known: Known::Transform, happens: Happens::MessageRetries, own: true,
        sentence: "Replace {transform} in the transforms folder by a version that handles it, \
                    and it is tried at once",
    },
    MessageRow {
        class: "", known: Known::Nothing, happens: Happens::MessageRetries, own: true,
        sentence: "Try it again: sluicebox messages retry {id}",
    },
];

/// The row of an answer.
#[must_use]
pub fn of_answer(operation: Operation, answer: &Answer) -> &'static AnswerRow {
    let code = answer.code.as_deref().unwrap_or("");
    let fits = |row: &&AnswerRow| {
        (row.asked == Asked::Anything || operation == Operation::Append)
            && (row.status.0..=row.status.1).contains(&answer.status)
            && (row.s2.is_empty() || row.s2 == code)
            && answer.body.contains(row.said)
    };
    ANSWERS.iter().find(fits).unwrap_or(&ANSWERS[ANSWERS.len() - 1])
}

impl AnswerRow {
    /// For machines: scripts and alerts match on it.
    #[must_use]
    pub fn code(&self, answer: &Answer) -> String {
        self.code.replace("{status}", &answer.status.to_string())
    }

    /// What an operator reads: where, what, and what mends it.
    #[must_use]
    pub fn sentence(&self, place: &Place, operation: Operation, answer: &Answer) -> String {
        let message = answer.message();
        let said = if message.is_empty() { String::new() } else { format!(" ({message})") };
        let reason = self
            .sentence
            .replace("{status}", &answer.status.to_string())
            .replace("{basin}", &place.basin)
            .replace("{stream}", &place.stream)
            .replace("{permission}", operation.permission())
            .replace("{correction}", place.named.correction())
            // Last, since it is not ours.
            .replace("{said}", &said);
        at(place, operation, &reason)
    }
}

/// The code and the sentence of a connection that failed.
#[must_use]
pub fn of_fault(place: &Place, operation: Operation, fault: Fault) -> (&'static str, String) {
    let row = FAULTS.iter().find(|row| row.fault == fault);
    let (code, sentence) = row.map_or(("sink_cut", ""), |row| (row.code, row.sentence));
    (code, at(place, operation, sentence))
}

fn at(place: &Place, operation: Operation, reason: &str) -> String {
    let Place { endpoint, basin, stream, .. } = place;
    format!("could not {operation} stream `{stream}` in basin `{basin}` at {endpoint}: {reason}")
}

/// The row of a condition.
#[must_use]
pub fn of_condition(condition: Condition) -> &'static ConditionRow {
    let is_it = |row: &&ConditionRow| row.condition == condition;
    CONDITIONS.iter().find(is_it).expect("each condition has a row, as a test sees to")
}

impl Condition {
    /// Of a stream that has this fencing token and not ours.
    #[must_use]
    pub fn of_token(actual: &str) -> Self {
        if actual.is_empty() { Self::NoToken } else { Self::OtherToken }
    }

    /// What an operator reads; `known` are the values that the sentence names.
    #[must_use]
    pub fn sentence(self, place: Option<&Place>, known: &[(&str, &dyn fmt::Display)]) -> String {
        let mut values: Vec<(&str, String)> = Vec::with_capacity(known.len() + 3);
        if let Some(Place { endpoint, basin, stream, .. }) = place {
            values.push(("endpoint", endpoint.clone()));
            values.push(("basin", basin.clone()));
            values.push(("stream", stream.clone()));
        }
        values.extend(known.iter().map(|(name, value)| (*name, value.to_string())));
        // Each name is looked for in what is left of the sentence: a value is no template.
        let mut left = of_condition(self).sentence;
        let mut text = String::with_capacity(left.len() * 2);
        while let Some((before, rest)) = left.split_once('{') {
            let (name, after) = rest.split_once('}').unwrap_or((rest, ""));
            text.push_str(before);
            if let Some((_, value)) = values.iter().find(|(known, _)| *known == name) {
                text.push_str(value);
            }
            left = after;
        }
        text.push_str(left);
        text
    }
}

/// What becomes of a message of this class.
#[must_use]
pub fn of_message(class: &str) -> &'static MessageRow {
    let fits = |row: &&MessageRow| row.class.is_empty() || row.class == class;
    MESSAGES.iter().find(fits).unwrap_or(&MESSAGES[MESSAGES.len() - 1])
}

/// What an operator can do about a message of this class: `column` is its largest one, `transform` the
/// file that failed it.
#[must_use]
pub fn hint(class: &str, id: &str, column: Option<&str>, transform: Option<&str>) -> String {
    let fits = |row: &&MessageRow| {
        let known = match row.known {
            Known::Column => column.is_some(),
            Known::Transform => transform.is_some(),
            Known::Nothing => true,
        };
        known && (row.class.is_empty() || row.class == class)
    };
    let sentence = MESSAGES.iter().find(fits).map_or("", |row| row.sentence);
    sentence
        .replace("{id}", id)
        .replace("{transform}", transform.unwrap_or_default())
        // Last, since a column may have any name.
        .replace("{column}", column.unwrap_or_default())
}

#[cfg(test)]
mod tests;
