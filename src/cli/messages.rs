//! `sluicebox messages`: the store of the running process.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::client::{Client, ClientError, ProcessArguments};
use super::output::{cut, print, print_json, printable, table, to_stderr};
use super::{EXIT_NO, Global, UsageError, human};
use crate::case::Case;
use crate::change::Lsn;
use crate::pipeline::control::{
    Changed, ColumnBytes, ErrorView, MessageDetail, MessageList, MessageView, TraceStep,
};

/// Messages that one request may ask for.
const PAGE_MAX: usize = 1000;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List messages, oldest first.
    List(ListArguments),
    /// Show one message: why it is here, what it passed, and its payload.
    Show(ShowArguments),
    /// Write one message to a file, with what is needed to fail in the same way elsewhere:
    /// `transforms test --case FILE` replays it.
    Export(ExportArguments),
    /// Try messages again at once.
    Retry(ChangeArguments),
    /// Give messages up: they are removed and never delivered.
    Ack(ChangeArguments),
}

#[derive(Debug, Args)]
pub(super) struct ListArguments {
    #[command(flatten)]
    filter: FilterArguments,
    /// The most messages to list.
    #[arg(long, value_name = "N", default_value = "100")]
    limit: usize,
    /// Go on behind this message.
    #[arg(long, value_name = "ID")]
    after: Option<u64>,
    #[command(flatten)]
    process: ProcessArguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ShowArguments {
    /// The message.
    id: u64,
    #[command(flatten)]
    process: ProcessArguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ExportArguments {
    /// The message.
    id: u64,
    /// Put other values of the same types and sizes in the place of the row's.
    #[arg(long)]
    redact: bool,
    /// The file, instead of stdout.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    process: ProcessArguments,
}

#[derive(Debug, Args)]
pub(super) struct ChangeArguments {
    /// The messages.
    #[arg(
        value_name = "ID",
        required_unless_present = "all",
        conflicts_with_all = ["all", "state", "table", "class", "transform"]
    )]
    ids: Vec<u64>,
    /// All messages, or all that --state, --table, --class and --transform leave.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    filter: FilterArguments,
    #[command(flatten)]
    process: ProcessArguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Args)]
struct FilterArguments {
    /// Only messages in this state.
    #[arg(long)]
    state: Option<StateFilter>,
    /// Only messages of this table: `schema.name`, or a name in any schema.
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
    /// Only messages whose last failure was of this class, such as `oversize` or `trap`.
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    /// Only messages that this transform failed last, by its file name.
    #[arg(long, value_name = "FILE")]
    transform: Option<String>,
}

/// A state, or the two that mean failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StateFilter {
    /// Parked and retrying.
    Failed,
    /// Failed, and tried again when the transforms change, or by hand.
    Parked,
    /// Failed, and tried again by itself.
    Retrying,
    /// Behind a failed message of its group.
    Waiting,
    /// On its way to S2.
    Delivering,
    /// Handed on as a dead letter (`list` only).
    Dead,
}

impl StateFilter {
    fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Parked => "parked",
            Self::Retrying => "retrying",
            Self::Waiting => "waiting",
            Self::Delivering => "delivering",
            Self::Dead => "dead",
        }
    }
}

impl FilterArguments {
    /// Each that is set, by its name in the API.
    fn set(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let Self { state, table, class, transform } = self;
        [
            ("state", state.map(StateFilter::as_str)),
            ("table", table.as_deref()),
            ("class", class.as_deref()),
            ("transform", transform.as_deref()),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
    }
}

pub(super) async fn run(global: &Global, command: Command) -> anyhow::Result<ExitCode> {
    let config = global.config.as_path();
    match command {
        Command::List(arguments) => list(config, arguments).await,
        Command::Show(arguments) => show(config, arguments).await,
        Command::Export(arguments) => export(config, &arguments).await,
        Command::Retry(arguments) => {
            let (code, changed) = change(config, "retry", &arguments).await?;
            print_changed(&arguments, changed, "tried again")?;
            Ok(code)
        }
        Command::Ack(arguments) => {
            let (code, changed) = change(config, "ack", &arguments).await?;
            print_changed(&arguments, changed, "acknowledged and will not be delivered")?;
            if changed.unchanged_behind > 0 {
                to_stderr(&format!(
                    "{} behind it refer to large columns that only the acknowledged messages \
                     held: consumers keep the older values of those",
                    human::count(changed.unchanged_behind, "waiting update")
                ));
            }
            Ok(code)
        }
    }
}

async fn list(config: &Path, arguments: ListArguments) -> anyhow::Result<ExitCode> {
    let client = Client::new(&arguments.process, config)?;
    let answer = pages(&client, &arguments).await?;
    if arguments.json {
        print_json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    let list: MessageList = client.read(answer)?;
    if list.messages.is_empty() {
        to_stderr("no messages");
        return Ok(ExitCode::SUCCESS);
    }
    print(&list_text(&list))?;
    if let Some(next) = &list.next {
        let (shown, total) = (list.messages.len(), list.total);
        to_stderr(&format!("{shown} of {total}; go on with --after {next}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// As many pages as the limit takes, put together in the shape of one. They stay JSON, so that
/// fields which this program does not know are passed on.
async fn pages(client: &Client, arguments: &ListArguments) -> Result<Value, ClientError> {
    let mut after = arguments.after.map(|id| id.to_string());
    let mut left = arguments.limit.max(1);
    let mut messages = Vec::new();
    loop {
        let limit = left.min(PAGE_MAX).to_string();
        let mut query = vec![("limit", limit.as_str())];
        query.extend(arguments.filter.set());
        query.extend(after.as_deref().map(|after| ("after", after)));
        let mut answer = client.get(&["messages"], &query).await?;
        let page = match answer["messages"].take() {
            Value::Array(page) => page,
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Object(_) => Vec::new(),
        };
        left = left.saturating_sub(page.len());
        let is_last = page.is_empty() || left == 0;
        messages.extend(page);
        after = answer["next"].as_str().map(str::to_owned);
        if is_last || after.is_none() {
            answer["messages"] = Value::Array(messages);
            return Ok(answer);
        }
    }
}

/// The ids of the first failed messages, as many as the limit says.
pub(super) async fn failed_ids(client: &Client, limit: usize) -> anyhow::Result<Vec<String>> {
    let arguments = ListArguments {
        filter: FilterArguments { state: Some(StateFilter::Failed), ..FilterArguments::default() },
        limit,
        after: None,
        process: ProcessArguments::default(),
        json: true,
    };
    let list: MessageList = client.read(pages(client, &arguments).await?)?;
    Ok(list.messages.into_iter().map(|message| message.id).collect())
}

async fn show(config: &Path, arguments: ShowArguments) -> anyhow::Result<ExitCode> {
    let client = Client::new(&arguments.process, config)?;
    let answer = client.get(&["messages", &arguments.id.to_string()], &[]).await?;
    if arguments.json {
        print_json(&answer)?;
    } else {
        print(&detail_text(&client.read(answer)?))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn export(config: &Path, arguments: &ExportArguments) -> anyhow::Result<ExitCode> {
    let client = Client::new(&arguments.process, config)?;
    let (id, redact) = (arguments.id.to_string(), arguments.redact.to_string());
    let case = client.get(&["messages", &id, "case"], &[("redact", &redact)]).await?;
    // As our own type, so that the members have their order, and what is no case is no file.
    let case: Case = client.read(case)?;
    let text = serde_json::to_string_pretty(&case)? + "\n";
    match &arguments.output {
        None => print(&text)?,
        Some(path) => std::fs::write(path, text)
            .map_err(|error| UsageError(format!("could not write {}: {error}", path.display())))?,
    }
    if !arguments.redact {
        to_stderr(
            "the file holds the row's values and the transforms' settings, keys among them; \
             --redact replaces both",
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Each message is asked for on its own, so that one that is gone does not keep the others.
async fn change(
    config: &Path,
    verb: &str,
    arguments: &ChangeArguments,
) -> anyhow::Result<(ExitCode, Changed)> {
    let client = Client::new(&arguments.process, config)?;
    if arguments.all {
        let mut body = json!({"all": true});
        arguments.filter.set().for_each(|(name, value)| body[name] = json!(value));
        let changed = client.read(client.post(&["messages", verb], &body).await?)?;
        return Ok((ExitCode::SUCCESS, changed));
    }
    let mut code = ExitCode::SUCCESS;
    let mut sum = Changed { changed: 0, unchanged_behind: 0 };
    for id in &arguments.ids {
        match client.post(&["messages", &id.to_string(), verb], &json!({})).await {
            Ok(answer) => {
                let one: Changed = client.read(answer)?;
                sum.changed += one.changed;
                sum.unchanged_behind += one.unchanged_behind;
            }
            Err(ClientError::Refused { text, .. }) => {
                to_stderr(&format!("error: {text}"));
                code = ExitCode::from(EXIT_NO);
            }
            Err(error @ (ClientError::NotRunning { .. } | ClientError::Foreign { .. })) => {
                return Err(error.into());
            }
        }
    }
    Ok((code, sum))
}

fn print_changed(arguments: &ChangeArguments, changed: Changed, done: &str) -> anyhow::Result<()> {
    if arguments.json {
        return print_json(&changed);
    }
    Ok(print(&format!("{} {done}\n", human::count(changed.changed, "message")))?)
}

fn list_text(list: &MessageList) -> String {
    let rows: Vec<Vec<String>> = list.messages.iter().map(row).collect();
    table(
        &["ID", "STATE", "TABLE", "KEY", "ACTION", "SIZE", "LARGEST COLUMNS", "ATTEMPTS", "ERROR"],
        &rows,
    )
}

fn row(message: &MessageView) -> Vec<String> {
    const COLUMNS_SHOWN: usize = 2;
    let error = match (&message.error, &message.behind) {
        (Some(error), _) => format!("{}: {}", error.class, error.text),
        (None, Some(behind)) => format!("behind message {behind}"),
        (None, None) => String::new(),
    };
    vec![
        message.id.clone(),
        state_word(message),
        printable(&message.table).into_owned(),
        cut(&key_text(&message.key), 40),
        message.action.clone(),
        message.bytes.map_or_else(|| "-".to_owned(), human::bytes),
        columns_text(message.columns.iter().take(COLUMNS_SHOWN)),
        message.attempts.to_string(),
        cut(&error, 160),
    ]
}

fn detail_text(detail: &MessageDetail) -> String {
    let message = &detail.message;
    let mut fields = vec![
        ("message", message.id.clone()),
        ("state", state_word(message)),
        ("table", message.table.clone()),
        ("key", key_text(&message.key)),
        ("action", message.action.clone()),
        ("position", format!("{}:{}", Lsn(message.commit_lsn), message.commit_idx)),
        ("stored", message.stored_at.clone()),
        ("attempts", message.attempts.to_string()),
    ];
    if let Some(next) = &message.next_attempt_at {
        fields.push(("next attempt", next.clone()));
    }
    if let Some(bytes) = message.bytes {
        fields.push(("size", human::bytes_of_limit(bytes, message.bytes_max)));
    }
    if !message.columns.is_empty() {
        fields.push(("columns", columns_text(message.columns.iter())));
    }
    if let Some(behind) = &message.behind {
        fields.push(("behind", format!("message {behind}")));
    }
    if detail.holds > 0 {
        fields.push(("holds back", human::count(detail.holds, "message")));
    }
    if let Some(error) = &message.error {
        fields.extend(error_fields(error));
    }
    let mut text = String::new();
    for (name, value) in fields {
        push_field(&mut text, name, &value);
    }
    for step in &detail.trace {
        push_trace(&mut text, step);
    }
    if !detail.hint.is_empty() {
        push_field(&mut text, "what to do", &detail.hint);
    }
    let cut = if detail.payload_cut { ", its beginning" } else { "" };
    text.push_str(&format!("\npayload before any transform{cut}:\n"));
    text.push_str(&printable(&detail.payload));
    text.push('\n');
    text
}

fn error_fields(error: &ErrorView) -> Vec<(&'static str, String)> {
    let mut fields = vec![("error", format!("{}: {}", error.class, error.text))];
    fields.extend(error.transform.clone().map(|transform| ("in transform", transform)));
    let answer = match (error.status, &error.body) {
        (Some(status), Some(body)) => Some(format!("{status} {body}")),
        (Some(status), None) => Some(status.to_string()),
        (None, body) => body.clone(),
    };
    fields.extend(answer.map(|answer| ("S2 answered", answer)));
    fields
}

/// Values from rows, S2 and guests go through [`printable`].
fn push_field(text: &mut String, name: &str, value: &str) {
    text.push_str(&format!("{name:<13} {}\n", printable(value)));
}

fn push_trace(text: &mut String, step: &TraceStep) {
    let digest = step.digest.get(..16).unwrap_or(&step.digest);
    let bytes = step.bytes.map(|bytes| format!(", {}", human::bytes(bytes))).unwrap_or_default();
    let line =
        format!("{} ({digest}): {}, {} µs{bytes}", step.transform, step.verdict, step.micros);
    push_field(text, "passed", &line);
    for (name, lines) in [("  log", &step.logs), ("  stack", &step.backtrace)] {
        for line in lines {
            push_field(text, name, line);
        }
    }
}

fn state_word(message: &MessageView) -> String {
    // The words are those of the JSON.
    match serde_json::to_value(message.state) {
        Ok(Value::String(word)) => word,
        Ok(_) | Err(_) => String::new(),
    }
}

/// `id=1 region=eu`, values as JSON but for plain strings.
fn key_text(key: &Value) -> String {
    let value_text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value.to_string()
        }
    };
    match key {
        Value::Object(columns) => {
            let columns: Vec<_> = columns
                .iter()
                .map(|(name, value)| format!("{name}={}", value_text(value)))
                .collect();
            columns.join(" ")
        }
        Value::Null => "-".to_owned(),
        Value::String(_) | Value::Bool(_) | Value::Number(_) | Value::Array(_) => value_text(key),
    }
}

fn columns_text<'a>(columns: impl Iterator<Item = &'a ColumnBytes>) -> String {
    let columns: Vec<_> = columns
        .map(|column| format!("{} {}", printable(&column.name), human::bytes(column.bytes)))
        .collect();
    if columns.is_empty() { "-".to_owned() } else { columns.join(", ") }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::{mpsc, watch};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::admin::Server;
    use crate::config::Console;
    use crate::pipeline::control::{Control, Request, State, Status};

    fn message() -> MessageView {
        MessageView {
            id: "12".to_owned(),
            state: State::Parked,
            table: "public.documents".to_owned(),
            key: json!({"id": 7, "region": "eu\u{1b}[31m"}),
            action: "insert".to_owned(),
            commit_lsn: 0x16_B374_D848,
            commit_idx: 3,
            error: Some(ErrorView {
                class: "oversize".to_owned(),
                status: Some(422),
                text: "the record has 3000000 metered bytes".to_owned(),
                body: Some("{\"code\":\"invalid\"}".to_owned()),
                transform: None,
            }),
            bytes: Some(3_000_000),
            bytes_max: 1_048_576,
            columns: vec![
                ColumnBytes { name: "body".to_owned(), bytes: 2_999_000 },
                ColumnBytes { name: "title".to_owned(), bytes: 20 },
                ColumnBytes { name: "id".to_owned(), bytes: 1 },
            ],
            attempts: 1,
            next_attempt_at: None,
            stored_at: "2026-01-01T00:00:00Z".to_owned(),
            behind: None,
        }
    }

    #[test]
    fn a_list_is_a_table() {
        let waiting = MessageView {
            id: "13".to_owned(),
            state: State::Waiting,
            error: None,
            bytes: None,
            columns: Vec::new(),
            attempts: 0,
            behind: Some("12".to_owned()),
            key: Value::Null,
            ..message()
        };
        let list = MessageList { messages: vec![message(), waiting], next: None, total: 2 };
        let expected = "\
ID  STATE    TABLE             KEY                       ACTION  SIZE     LARGEST COLUMNS           ATTEMPTS  ERROR
12  parked   public.documents  id=7 region=eu\\u{1b}[31m  insert  2.8 MiB  body 2.8 MiB, title 20 B  1         oversize: the record has 3000000 metered bytes
13  waiting  public.documents  -                         insert  -        -                         0         behind message 12
";
        assert_eq!(list_text(&list), expected);
    }

    #[test]
    fn a_message_is_shown_whole() {
        let step = TraceStep {
            transform: "10-mask.wasm".to_owned(),
            digest: "0123456789abcdef0123".to_owned(),
            verdict: "keep".to_owned(),
            micros: 35,
            bytes: Some(3_000_000),
            backtrace: Vec::new(),
            logs: vec!["warn: odd\nrow".to_owned()],
        };
        let detail = MessageDetail {
            message: message(),
            payload: "{\"record\":{}}".to_owned(),
            payload_cut: true,
            trace: vec![step],
            hint: "sluicebox transforms add strip-columns --column body".to_owned(),
            holds: 2,
        };
        let expected = "\
message       12
state         parked
table         public.documents
key           id=7 region=eu\\u{1b}[31m
action        insert
position      16/B374D848:3
stored        2026-01-01T00:00:00Z
attempts      1
size          2.8 MiB (limit 1.0 MiB)
columns       body 2.8 MiB, title 20 B, id 1 B
holds back    2 messages
error         oversize: the record has 3000000 metered bytes
S2 answered   422 {\"code\":\"invalid\"}
passed        10-mask.wasm (0123456789abcdef): keep, 35 µs, 2.8 MiB
  log         warn: odd\\nrow
what to do    sluicebox transforms add strip-columns --column body

payload before any transform, its beginning:
{\"record\":{}}
";
        assert_eq!(detail_text(&detail), expected);
    }

    /// A process that answers with two messages of five at a time.
    async fn pages_of_two() -> (Client, CancellationToken) {
        let (requests_in, mut requests) = mpsc::channel(1);
        let (_, status) = watch::channel(Status::default());
        tokio::spawn(async move {
            while let Some(request) = requests.recv().await {
                let Request::List(query, answer) = request else { panic!("only lists are asked") };
                let first = query.after.unwrap_or(0) + 1;
                let last = (first + 1).min(first - 1 + query.limit as u64).min(5);
                let messages =
                    (first..=last).map(|id| MessageView { id: id.to_string(), ..message() });
                let next = (last < 5).then(|| last.to_string());
                let list = MessageList { messages: messages.collect(), next, total: 5 };
                answer.send(Ok(list)).unwrap();
            }
        });
        let listen = "127.0.0.1:0".parse().unwrap();
        let server = Server::bind(&Console { listen, names: Vec::new() }).await.unwrap();
        let console = Some(server.address().to_string().parse().unwrap());
        let client = Client::new(&ProcessArguments { console }, Path::new("none.toml")).unwrap();
        let shutdown = CancellationToken::new();
        let control = Control::new(requests_in, status, crate::pipeline::heartbeat::heartbeat().1);
        tokio::spawn(server.serve(control, Arc::new(|| json!({})), shutdown.clone()));
        (client, shutdown)
    }

    #[tokio::test]
    async fn pages_are_put_together_up_to_the_limit() {
        let (client, shutdown) = pages_of_two().await;
        for (limit, after, expected, next) in [
            (100, None, vec!["1", "2", "3", "4", "5"], Value::Null),
            (3, None, vec!["1", "2", "3"], json!("3")),
            (2, Some(3), vec!["4", "5"], Value::Null),
        ] {
            let arguments = ListArguments {
                filter: FilterArguments::default(),
                limit,
                after,
                process: ProcessArguments::default(),
                json: true,
            };
            let answer = pages(&client, &arguments).await.unwrap();
            let list = answer["messages"].as_array().unwrap();
            let ids: Vec<_> = list.iter().map(|message| message["id"].as_str().unwrap()).collect();
            assert_eq!(ids, expected);
            assert_eq!((&answer["next"], &answer["total"]), (&next, &json!(5)));
        }
        shutdown.cancel();
    }
}
