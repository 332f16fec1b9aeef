//! `sluicebox verify`: whether the stream holds what the tables hold.

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde_json::Value;

use super::client::{Client, ClientError, ProcessArguments};
use super::output::{print, print_json, printable, to_stderr};
use super::{EXIT_NO, Global, UsageError, stream};
use crate::app;
use crate::change::{Lsn, Position};
use crate::config::{Config, Endpoint, TableName};
use crate::pipeline::control::{MessageDetail, MessageList, MessageView, Status};
use crate::store::look::Look;
use crate::transform::{live_modules, read_modules};
use crate::verify::{Drops, Held, Settings, Verifier};

/// Messages that one request asks for.
const PAGE: &str = "1000";

/// How many messages are asked for at once where the store is on another machine.
const AT_ONCE: usize = 32;

/// How often the pipeline is asked whether what it had spilled is through.
const ASK_INTERVAL: Duration = Duration::from_millis(200);

/// What `--help` says below the options.
const AFTER_HELP: &str = "\
The text names each kind of fault with its number, `ok` in front where there are none and `NO` where there \
are, with the first five of each; then what was read and what was compared, table by table. Rows are named \
by their keys. Not faults, and named with their numbers, are rows of which a change is parked or waits \
behind one, those of which an operator gave a change up, and those that a transform drops. What was dropped \
is written down nowhere: the modules that are live are tried on a row that is not in the stream as it is in the \
table, and what they would drop now counts as dropped. What another version of them dropped is missing; so are \
rows of a table without a key, which cannot be told from each other. Order is judged by the groups of \
the configuration as it is: records from before `delivery.group_by` was changed may be told as out of \
order, and --from leaves them out.

The pipeline may run or not. While it runs, the comparison waits until it has passed the moment at which the \
tables are read. Where it does not, changes that are still in the slot count as held back. The store is read \
in the state folder; on another machine the running process is asked instead.

Exit codes: 0 the stream holds what the tables hold, 1 it does not or that cannot be told, 2 wrong usage.";

#[derive(Debug, clap::Args)]
#[command(after_long_help = AFTER_HELP)]
pub(super) struct Arguments {
    /// Compare only this table (can be given more than once); all of `source.tables` without it.
    #[arg(long = "table", value_name = "TABLE")]
    tables: Vec<TableName>,
    /// Read this stream (can be given more than once); without it the pipeline's own, and all that its
    /// store knows messages to have been routed to.
    #[arg(long = "stream", value_name = "STREAM")]
    streams: Vec<String>,
    /// Begin with this sequence number of one stream, the pipeline's own without --stream; rows that the
    /// rest of it does not name are left out.
    #[arg(long, value_name = "SEQ")]
    from: Option<u64>,
    /// End before this sequence number of one stream, and do not look at the tables: only at doubled,
    /// disordered, oversize and malformed records.
    #[arg(long, value_name = "SEQ")]
    to: Option<u64>,
    /// Do not compare a column, such as one that a transform alters: `column`, `table.column` or
    /// `schema.table.column` (can be given more than once).
    #[arg(long = "ignore-column", value_name = "COLUMN")]
    ignore_columns: Vec<String>,
    /// Rows that no record names were there before the slot, and are not missing. Nor are inserts whose
    /// updates are in the stream: a transform may have dropped them.
    #[arg(long)]
    allow_older: bool,
    /// Show the values that differ. Keys are always shown.
    #[arg(long)]
    show_values: bool,
    /// How many seconds the pipeline may take to pass the moment that is compared.
    #[arg(long, value_name = "SECONDS", default_value = "60")]
    wait: u64,
    #[command(flatten)]
    process: ProcessArguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, arguments: Arguments) -> anyhow::Result<ExitCode> {
    let config = Config::load(&global.config)?;
    let process = Client::new(&arguments.process, &global.config)?;
    let has_range = arguments.from.is_some() || arguments.to.is_some();
    if has_range && arguments.streams.len() > 1 {
        let text = "--from and --to are numbers of one stream: name one by --stream";
        return Err(UsageError(text.to_owned()).into());
    }
    let reads_tables = arguments.to.is_none();
    let is_embedded = matches!(config.sink.endpoint, Endpoint::Embedded);
    let look = match Look::open(&config.state.dir) {
        Ok(look) => look,
        Err(error) => {
            let error = crate::error_chain::error_chain(&error);
            to_stderr(&format!("what the store holds is not known: {error}"));
            None
        }
    };
    let asked = match process.get(&["status"], &[]).await {
        Ok(answer) => Ok(process.read::<Status>(answer)?),
        Err(error @ ClientError::NotRunning { .. }) => Err(error),
        Err(error) => return Err(error.into()),
    };
    let needs_process = is_embedded || reads_tables && look.is_none();
    let status = match asked {
        Ok(status) => Some(status),
        Err(error) if needs_process => return Err(error.into()),
        Err(_) => None,
    };
    let endpoint = status.as_ref().filter(|_| is_embedded).map(|status| status.endpoint.clone());
    let client = stream::client(config.sink.clone(), endpoint)?;
    let mut streams = arguments.streams;
    let reads_all = streams.is_empty() && !has_range;
    if streams.is_empty() {
        streams.push(config.sink.stream.clone());
    }
    if reads_all {
        streams.extend(routed_streams(look.as_ref(), status.as_ref())?);
    }
    let pipeline_id = match &look {
        // With one stream, whoever wrote its first record is meant: it may be older than the store.
        Some(look) if streams.len() > 1 => look.pipeline_id()?,
        _ => None,
    };
    let dsn = app::dsn(&config)?;
    let wait = Duration::from_secs(arguments.wait);
    let settings = Settings {
        tables: arguments.tables,
        streams,
        pipeline_id,
        from: arguments.from,
        to: arguments.to,
        ignore_columns: arguments.ignore_columns,
        allow_unmentioned: arguments.allow_older,
        show_values: arguments.show_values,
        wait,
        ..Settings::new(app::source_settings(&config, dsn))
    };
    let mut verifier = Verifier::open(settings, client).await?;
    if reads_tables {
        verifier.ask(live_chain(&config));
    }
    let mut told = 0;
    let mut progress = |next: u64, end: u64| {
        // A line for each so many records, for who wonders whether it moves.
        if next / 250_000 > told {
            told = next / 250_000;
            to_stderr(&format!("read {next} of {end}"));
        }
    };
    give_up(&mut verifier, look.as_ref())?;
    verifier.read(&mut progress).await?;
    let mut held = Vec::new();
    if status.is_some() {
        verifier.choose_moment().await?;
        if reads_tables {
            until_nothing_is_spilled(&process, wait).await?;
        }
    } else {
        held = verifier.choose_moment_without_pipeline().await?;
        if let Some(look) = look.as_ref().filter(|_| reads_tables) {
            to_stderr(&format!("no pipeline runs; {} changes are still in the slot", held.len()));
            look.spilled(|change| held.push(Held::of(change)))?;
        }
    }
    match &look {
        _ if !reads_tables => {}
        Some(look) => look.undelivered(|message| {
            held.push(Held {
                table: message.table,
                position: message.position,
                keys: message.keys,
            });
        })?,
        None => held.extend(held_by(&process).await?),
    }
    if reads_all && status.is_some() {
        let status: Status = process.read(process.get(&["status"], &[]).await?)?;
        let pipeline_id = look.as_ref().map(Look::pipeline_id).transpose()?.flatten();
        verifier.read_also(routed_streams(look.as_ref(), Some(&status))?, pipeline_id)?;
    }
    give_up(&mut verifier, look.as_ref())?;
    let report = verifier.finish(&held, progress).await?;
    if arguments.json {
        print_json(&report)?;
    } else {
        let text = report.to_string();
        let lines = text.lines().map(|line| format!("{}\n", printable(line)));
        print(&lines.collect::<String>())?;
    }
    Ok(if report.holds { ExitCode::SUCCESS } else { ExitCode::from(EXIT_NO) })
}

/// What asks the live transforms. Where they cannot be asked, what they drop is missing, which is said.
fn live_chain(config: &Config) -> Option<Drops> {
    let modules = match live_modules(&config.state.dir) {
        // Another machine's pipeline may have the same folder of modules.
        Ok(None) if config.transforms.dir.is_dir() => read_modules(&config.transforms.dir),
        Ok(modules) => Ok(modules.unwrap_or_default()),
        Err(error) => Err(error),
    };
    let drops = modules.map_err(|error| error.to_string()).and_then(Drops::of);
    drops.unwrap_or_else(|reason| {
        to_stderr(&format!(
            "what the transforms drop is not known, and counts as missing: {reason}"
        ));
        None
    })
}

/// The streams that messages were routed to, as far as the store and the running process know.
fn routed_streams(look: Option<&Look>, status: Option<&Status>) -> anyhow::Result<Vec<String>> {
    let mut names = look.map(Look::streams).transpose()?.unwrap_or_default();
    let open = status.iter().flat_map(|status| &status.streams);
    names.extend(open.map(|stream| stream.name.clone()));
    Ok(names.into_iter().collect())
}

/// What operators gave up and what became a dead letter, from the store itself. It may be on another machine: then nothing is known of
/// it, and such rows count as missing.
fn give_up(verifier: &mut Verifier<'_>, look: Option<&Look>) -> anyhow::Result<()> {
    match look {
        Some(look) => {
            verifier.give_up(&look.dead_letters()?)?;
            Ok(verifier.give_up(&look.given_up()?.newest)?)
        }
        None => Ok(()),
    }
}

/// What was spilled is confirmed, and reaches the stream later.
async fn until_nothing_is_spilled(process: &Client, wait: Duration) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let status: Status = process.read(process.get(&["status"], &[]).await?)?;
        if status.spilled_changes == 0 {
            return Ok(());
        }
        anyhow::ensure!(
            begun.elapsed() < wait,
            "{} changes are spilled because S2 was away, and had not reached the stream after {} s; \
             --wait waits longer",
            status.spilled_changes,
            wait.as_secs()
        );
        tokio::time::sleep(ASK_INTERVAL).await;
    }
}

/// What is in the store of a running process whose state folder is out of reach.
async fn held_by(process: &Client) -> anyhow::Result<Vec<Held>> {
    let mut held = Vec::new();
    let mut after = None;
    loop {
        let mut query = vec![("limit", PAGE)];
        query.extend(after.as_deref().map(|after| ("after", after)));
        let list: MessageList = process.read(process.get(&["messages"], &query).await?)?;
        let messages = futures_util::stream::iter(&list.messages);
        let messages = messages.map(|message| held_message(process, message)).buffered(AT_ONCE);
        held.extend(messages.try_collect::<Vec<_>>().await.context("could not read a message")?);
        after = list.next;
        if after.is_none() {
            return Ok(held);
        }
    }
}

async fn held_message(process: &Client, message: &MessageView) -> anyhow::Result<Held> {
    let mut keys = vec![message.key.clone()];
    // The key that an update left is in its payload alone. It may be gone by now: delivered.
    if message.action == "update"
        && let Ok(answer) = process.get(&["messages", &message.id], &[]).await
    {
        let detail: MessageDetail = process.read(answer)?;
        keys.extend(old_key(&message.key, &detail.payload));
    }
    if message.action == "truncate" {
        keys.clear();
    }
    Ok(Held {
        table: message.table.clone(),
        position: Position { commit_lsn: Lsn(message.commit_lsn), index: message.commit_idx },
        keys,
    })
}

/// The key before an update that changed it.
fn old_key(key: &Value, payload: &str) -> Option<Value> {
    let payload: HashMap<String, Value> = serde_json::from_str(payload).ok()?;
    let changes = payload.get("changes")?.as_object()?;
    let mut old = key.as_object()?.clone();
    let mut changed = false;
    for (column, value) in &mut old {
        if let Some(before) = changes.get(column) {
            value.clone_from(before);
            changed = true;
        }
    }
    changed.then_some(Value::Object(old))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_key_that_an_update_left_is_known() {
        #[track_caller]
        fn check(changes: Value, expected: Option<Value>) {
            let payload = json!({"record": {"a": 2, "b": 1}, "changes": changes}).to_string();
            assert_eq!(old_key(&json!({"a": 2, "b": 1}), &payload), expected);
        }
        check(json!({"a": 1}), Some(json!({"a": 1, "b": 1})));
        check(json!({"body": "x"}), None);
        check(Value::Null, None);
        assert_eq!(old_key(&json!({"a": 1}), "{\"record\":{\"a\":1"), None, "cut");
    }
}
