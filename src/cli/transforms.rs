//! `sluicebox transforms`: the folder of the running process, the ready-made modules, and the tools
//! for those who write their own.

mod add;
mod bench;
mod inspect;
mod modules;
mod new;
mod pretty;
mod test;

use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::Global;
use super::client::{Client, ProcessArguments};
use super::output::{cut, print, print_json, printable, table, to_stderr};
use crate::transform::{TransformList, TransformView};

/// How much of a reason is shown. The mend is at its end, and before it a guest may have said 2,000
/// characters: so all of it is, as a rule.
const REASON_CHARS_MAX: usize = 4000;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List what is in the folder, and what the running process makes of it.
    List(ListArguments),
    /// Put a ready-made transform into the folder.
    Add(add::AddArguments),
    /// Write a project for a transform of one's own.
    New(new::NewArguments),
    /// Show what modules make of messages, without sending any.
    Test(test::TestArguments),
    /// Measure what modules cost, against no transform in the same run.
    Bench(bench::BenchArguments),
    /// Show what a module is, and whether it would be taken up.
    Inspect(inspect::InspectArguments),
}

#[derive(Debug, Args)]
pub(super) struct ListArguments {
    #[command(flatten)]
    process: ProcessArguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List(arguments) => list(&global.config, &arguments).await,
        Command::Add(arguments) => add::run(&global.config, &arguments),
        Command::New(arguments) => new::run(&arguments),
        Command::Test(arguments) => test::run(global, arguments).await,
        Command::Bench(arguments) => bench::run(global, arguments).await,
        Command::Inspect(arguments) => inspect::run(&arguments),
    }
}

async fn list(config: &Path, arguments: &ListArguments) -> anyhow::Result<ExitCode> {
    let client = Client::new(&arguments.process, config)?;
    let answer = client.get(&["transforms"], &[]).await?;
    if arguments.json {
        print_json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    let list: TransformList = client.read(answer)?;
    if list.transforms.is_empty() {
        to_stderr("no transforms: messages go as they are");
    } else {
        print(&list_text(&list))?;
        to_stderr(&format!("chain {}:{}", list.generation, short(&list.digest)));
    }
    for warning in &list.warnings {
        to_stderr(&format!("warning: {}", printable(warning)));
    }
    Ok(ExitCode::SUCCESS)
}

fn list_text(list: &TransformList) -> String {
    let row = |transform: &TransformView| {
        vec![
            printable(&transform.file).into_owned(),
            state_word(transform),
            short(&transform.digest).to_owned(),
            transform.since.clone(),
            transform.calls.to_string(),
            transform.errors.to_string(),
            transform.vet_text.clone().unwrap_or_default(),
            cut(transform.reason.as_deref().unwrap_or_default(), REASON_CHARS_MAX),
        ]
    };
    let rows: Vec<_> = list.transforms.iter().map(row).collect();
    table(&["FILE", "STATE", "DIGEST", "SINCE", "CALLS", "ERRORS", "VET", "REASON"], &rows)
}

/// The words are those of the JSON.
fn state_word(transform: &TransformView) -> String {
    match serde_json::to_value(transform.state) {
        Ok(Value::String(word)) => word,
        Ok(_) | Err(_) => String::new(),
    }
}

/// As much of a digest as record headers carry.
fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transform::TransformState;

    #[test]
    fn a_list_is_a_table() {
        let live = TransformView {
            file: "10-x.wasm".to_owned(),
            digest: "0123456789abcdef99".to_owned(),
            state: TransformState::Live,
            reason: None,
            since: "2026-01-01T00:00:00Z".to_owned(),
            calls: 12,
            errors: 1,
            dropped: 0,
            micros: 0,
            vet: None,
            vet_text: Some("fixes 3 of 4, breaks 0 of 54".to_owned()),
        };
        let rejected = TransformView {
            file: "20-y.wasm".to_owned(),
            digest: String::new(),
            state: TransformState::Rejected,
            reason: Some("not\nWebAssembly".to_owned()),
            calls: 0,
            errors: 0,
            dropped: 0,
            micros: 0,
            vet_text: None,
            ..live.clone()
        };
        let list = TransformList {
            generation: 7,
            digest: "0123".to_owned(),
            transforms: vec![live, rejected],
            warnings: Vec::new(),
        };
        let expected = "\
FILE       STATE     DIGEST            SINCE                 CALLS  ERRORS  VET                           REASON
10-x.wasm  live      0123456789abcdef  2026-01-01T00:00:00Z  12     1       fixes 3 of 4, breaks 0 of 54
20-y.wasm  rejected                    2026-01-01T00:00:00Z  0      0                                     not\\nWebAssembly
";
        assert_eq!(list_text(&list), expected);
    }
}
