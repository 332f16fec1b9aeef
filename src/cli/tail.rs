//! `sluicebox tail`: the stream as S2 has it, command records included.

use std::borrow::Cow;
use std::process::ExitCode;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;

use super::client::{Client, ProcessArguments};
use super::output::{cut, print, printable, to_stderr};
use super::{Global, human, stream};
use crate::config;
use crate::pipeline::control::Status;
use crate::sink::record::Header;
use crate::sink::{Class, ReadRecord};

/// Characters of a body that a line shows; --json shows all.
const BODY_CHARS_MAX: usize = 200;

/// How long to wait before a lost stream is asked for again: a server that restarts is soon back,
/// one that is gone is not asked more than six times a minute.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print the last N records.
    #[arg(short, value_name = "N", default_value = "10")]
    number: u64,
    /// Begin with this sequence number instead, and print everything behind it.
    #[arg(long, value_name = "SEQ", conflicts_with = "number")]
    from: Option<u64>,
    /// Go on with records as they are appended, until Ctrl-C.
    #[arg(short, long)]
    follow: bool,
    /// The S2 server, instead of the configuration's sink.endpoint.
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// Print one JSON object for each record, bodies whole.
    #[arg(long)]
    json: bool,
}

/// Where the S2 server inside the running process listens.
async fn running_endpoint(global: &Global) -> anyhow::Result<String> {
    let client = Client::new(&ProcessArguments::default(), &global.config)?;
    let status: Status = client.read(client.get(&["status"], &[]).await?)?;
    Ok(status.endpoint)
}

pub(super) async fn run(global: &Global, arguments: Arguments) -> anyhow::Result<ExitCode> {
    let config = config::Sink::load(&global.config)?;
    let endpoint = match (arguments.endpoint, &config.endpoint) {
        (None, config::Endpoint::Embedded) => Some(running_endpoint(global).await?),
        (endpoint, _) => endpoint,
    };
    let client = stream::client(config, endpoint)?;
    let tail = client.tail().await?;
    let from = arguments.from.unwrap_or(tail.next_seq.saturating_sub(arguments.number));
    let print_page = |records: &[ReadRecord]| -> anyhow::Result<()> {
        let mut lines = String::new();
        for record in records {
            let line = if arguments.json { json_line(record)? } else { text_line(record) };
            lines.push_str(&line);
        }
        Ok(print(&lines)?)
    };
    let mut reader = client.read_range(from, tail.next_seq);
    while let Some(records) = reader.next().await? {
        print_page(&records)?;
    }
    if !arguments.follow {
        return Ok(ExitCode::SUCCESS);
    }
    let mut reader = client.follow(from.max(tail.next_seq));
    let mut pause = PAUSE_MIN;
    loop {
        match reader.next().await {
            Ok(records) => {
                pause = PAUSE_MIN;
                print_page(&records.unwrap_or_default())?;
            }
            Err(error) if matches!(error.class(), Class::Sink(_)) => {
                // What follows a stream outlives a restart of the server.
                to_stderr(&format!("{:#}; trying again", anyhow::Error::from(error)));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// What the record tells S2 to do, where it is a command: the value of its nameless header.
fn command(record: &ReadRecord) -> Option<Cow<'_, str>> {
    let header = record.is_command().then(|| record.headers.first())??;
    Some(String::from_utf8_lossy(&header.value))
}

/// Number, time, table, action, key and body on one line.
fn text_line(record: &ReadRecord) -> String {
    let (seq, timestamp) = (record.seq, human::timestamp(record.timestamp_ms));
    if let Some(command) = command(record) {
        let what = match (&*command, <[u8; 8]>::try_from(&*record.body)) {
            ("trim", Ok(bytes)) => format!("trim before {}", u64::from_be_bytes(bytes)),
            ("fence", _) => format!("fence, token {:?}", String::from_utf8_lossy(&record.body)),
            _ => command.into_owned(),
        };
        return format!("{seq:>8}  {timestamp}  (command: {})\n", cut(&what, BODY_CHARS_MAX));
    }
    let header = |name| match record.header(name) {
        Some(value) => String::from_utf8_lossy(value),
        None => Cow::Borrowed("-"),
    };
    let [table, action, key] = ["sb-table", "sb-action", "sb-key"].map(header);
    let named = format!("{table}  {action}  {key}");
    format!("{seq:>8}  {timestamp}  {}  {}\n", printable(&named), body_text(&record.body))
}

fn body_text(body: &[u8]) -> String {
    // Only so much of it can be shown as characters of four bytes at most.
    let shown = &body[..body.len().min(BODY_CHARS_MAX * 4)];
    let whole = String::from_utf8_lossy(shown);
    let text = cut(&whole, BODY_CHARS_MAX);
    if text.ends_with('…') || shown.len() < body.len() {
        return format!("{text} ({})", human::bytes(body.len() as u64));
    }
    text
}

/// The shape of the S2 command line's JSON; bytes that are not UTF-8 come as `…_base64` instead.
#[derive(Serialize)]
struct JsonLine<'a> {
    seq_num: u64,
    timestamp: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    headers: Option<Vec<[&'a str; 2]>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    headers_base64: Option<Vec<[String; 2]>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body_base64: Option<String>,
}

fn header_text(header: &Header) -> Option<[&str; 2]> {
    Some([std::str::from_utf8(&header.name).ok()?, std::str::from_utf8(&header.value).ok()?])
}

fn json_line(record: &ReadRecord) -> serde_json::Result<String> {
    let base64 = |header: &Header| [BASE64.encode(&header.name), BASE64.encode(&header.value)];
    let headers: Option<Vec<_>> = record.headers.iter().map(header_text).collect();
    let body = std::str::from_utf8(&record.body).ok();
    let line = JsonLine {
        seq_num: record.seq,
        timestamp: record.timestamp_ms,
        command: command(record),
        headers_base64: headers.is_none().then(|| record.headers.iter().map(base64).collect()),
        headers,
        body_base64: body.is_none().then(|| BASE64.encode(&record.body)),
        body,
    };
    Ok(serde_json::to_string(&line)? + "\n")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> Vec<Header> {
        pairs
            .iter()
            .map(|(name, value)| Header {
                name: Bytes::from_static(name.as_bytes()),
                value: Bytes::from_static(value.as_bytes()),
            })
            .collect()
    }

    #[test]
    fn lines_for_people_and_for_programs() {
        #[track_caller]
        fn check(headers: &[Header], body: &'static [u8], text: &str, json: &str) {
            let (headers, body) = (headers.to_vec(), Bytes::from_static(body));
            let record = ReadRecord { seq: 7, timestamp_ms: 1, headers, body };
            let (time, numbers) = ("1970-01-01T00:00:00.001Z", "\"seq_num\":7,\"timestamp\":1");
            assert_eq!(text_line(&record), format!("       7  {time}  {text}\n"));
            assert_eq!(json_line(&record).unwrap(), format!("{{{numbers},{json}}}\n"));
        }
        check(
            &headers(&[("sb-table", "public.t"), ("sb-action", "insert"), ("sb-key", "MTow")]),
            b"{\"a\":1}",
            "public.t  insert  MTow  {\"a\":1}",
            r#""headers":[["sb-table","public.t"],["sb-action","insert"],["sb-key","MTow"]],"body":"{\"a\":1}""#,
        );
        check(
            &headers(&[("", "fence")]),
            b"token",
            "(command: fence, token \"token\")",
            r#""command":"fence","headers":[["","fence"]],"body":"token""#,
        );
        check(
            &headers(&[("", "trim")]),
            &[0, 0, 0, 0, 0, 0, 1, 0],
            "(command: trim before 256)",
            r#""command":"trim","headers":[["","trim"]],"body":"\u0000\u0000\u0000\u0000\u0000\u0000\u0001\u0000""#,
        );
        check(&[], b"a\x1b[0m", "-  -  -  a\\u{1b}[0m", r#""headers":[],"body":"a\u001b[0m""#);
        check(&[], b"\xff", "-  -  -  \u{fffd}", r#""headers":[],"body_base64":"/w==""#);
        check(&[], b"", "-  -  -  ", r#""headers":[],"body":"""#);
    }

    #[test]
    fn long_bodies_are_cut_with_their_size() {
        #[track_caller]
        fn check(body: &str, expected: &str) {
            assert_eq!(body_text(body.as_bytes()), expected);
        }
        let long = "ä".repeat(200);
        check(&long, &long);
        check(&format!("{long}b"), &format!("{long}… (401 B)"));
        check(&"a".repeat(3 << 20), &format!("{}… (3.0 MiB)", "a".repeat(200)));
    }
}
