//! `sluicebox verify`: whether the stream holds what the tables hold.

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use super::client::{Client, ProcessArguments};
use super::output::{print, print_json, printable, to_stderr};
use super::{EXIT_NO, Global, stream};
use crate::app;
use crate::change::{Lsn, Position};
use crate::config::{Config, Endpoint, TableName};
use crate::pipeline::control::{MessageDetail, MessageList, MessageView, Status};
use crate::store::given_up::{self, GivenUp};
use crate::verify::{Held, Settings, Verifier};

/// Messages that one request asks for.
const PAGE: &str = "1000";

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Compare only this table (can be given more than once); all of `source.tables` without it.
    #[arg(long = "table", value_name = "TABLE")]
    tables: Vec<TableName>,
    /// Begin with this sequence number; rows that the rest of the stream does not name are left out.
    #[arg(long, value_name = "SEQ")]
    from: Option<u64>,
    /// End before this sequence number, and do not look at the tables: only at doubled, disordered,
    /// oversize and malformed records.
    #[arg(long, value_name = "SEQ")]
    to: Option<u64>,
    /// Do not compare a column, such as one that a transform alters: `column`, `table.column` or
    /// `schema.table.column` (can be given more than once).
    #[arg(long = "ignore-column", value_name = "COLUMN")]
    ignore_columns: Vec<String>,
    /// Rows that no record names were there before the slot, and are not missing.
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
    let endpoint = match &config.sink.endpoint {
        Endpoint::Embedded => {
            let status: Status = process.read(process.get(&["status"], &[]).await?)?;
            Some(status.endpoint)
        }
        Endpoint::Cloud | Endpoint::Url(_) => None,
    };
    let client = stream::client(config.sink.clone(), endpoint)?;
    let dsn = app::dsn(&config)?;
    let settings = Settings {
        tables: arguments.tables,
        from: arguments.from,
        to: arguments.to,
        ignore_columns: arguments.ignore_columns,
        allow_unmentioned: arguments.allow_older,
        show_values: arguments.show_values,
        wait: Duration::from_secs(arguments.wait),
        ..Settings::new(app::source_settings(&config, dsn))
    };
    let reads_tables = settings.to.is_none();
    let mut verifier = Verifier::open(settings, client).await?;
    let mut told = 0;
    let mut progress = |next: u64, end: u64| {
        // A line for each so many records, for who wonders whether it moves.
        if next / 250_000 > told {
            told = next / 250_000;
            to_stderr(&format!("read {next} of {end}"));
        }
    };
    verifier.give_up(&given_up(&config))?;
    verifier.read(&mut progress).await?;
    verifier.choose_moment().await?;
    verifier.give_up(&given_up(&config))?;
    let held = if reads_tables { held(&process).await? } else { Vec::new() };
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

/// What operators gave up, from the store itself. It may be on another machine: then nothing is known of
/// it, and such rows count as missing.
fn given_up(config: &Config) -> Vec<GivenUp> {
    match given_up::read(&config.state.dir) {
        Ok(all) => all.map(|all| all.newest).unwrap_or_default(),
        Err(error) => {
            let error = crate::error_chain::error_chain(&error);
            to_stderr(&format!(
                "what was given up is not told apart from what is missing: {error}"
            ));
            Vec::new()
        }
    }
}

/// What is in the store of the running process: neither in the stream nor lost.
async fn held(process: &Client) -> anyhow::Result<Vec<Held>> {
    let mut held = Vec::new();
    let mut after = None;
    loop {
        let mut query = vec![("limit", PAGE)];
        query.extend(after.as_deref().map(|after| ("after", after)));
        let list: MessageList = process.read(process.get(&["messages"], &query).await?)?;
        for message in &list.messages {
            held.push(held_message(process, message).await?);
        }
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
