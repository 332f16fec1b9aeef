//! `sluicebox transforms`: the folder of the running process, and the ready-made modules.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use serde::Deserialize;

use super::Global;
use super::client::{Client, ProcessArguments};
use super::output::{cut, print, print_json, printable, table, to_stderr};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List what is in the folder, and what the running process makes of it.
    List(ListArguments),
    /// Put a ready-made transform into the folder.
    Add(AddArguments),
}

#[derive(Debug, Args)]
pub(super) struct ListArguments {
    #[command(flatten)]
    process: ProcessArguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct AddArguments {
    /// The ready-made transform: strip-columns or compress-columns.
    #[arg(value_name = "READY-MADE")]
    name: String,
    /// A column that it works on; give it again for more.
    #[arg(long = "column", value_name = "COLUMN", required = true)]
    columns: Vec<String>,
    /// Only in this table: `schema.name`; give it again for more.
    #[arg(long = "table", value_name = "TABLE")]
    tables: Vec<String>,
    /// How compress-columns compresses: zstd or gzip.
    #[arg(long, value_name = "CODEC")]
    codec: Option<String>,
    /// Leave messages alone that fit S2's limit as they are.
    #[arg(long)]
    only_oversize: bool,
}

pub(super) async fn run(global: &Global, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List(arguments) => list(&global.config, &arguments).await,
        Command::Add(_) => anyhow::bail!("waits for the other parts"),
    }
}

/// What the API answers, as far as a table shows it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ListView {
    generation: u64,
    digest: String,
    transforms: Vec<TransformView>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TransformView {
    file: String,
    digest: Option<String>,
    state: String,
    reason: Option<String>,
    since: Option<String>,
    calls: u64,
    errors: u64,
    vet: Option<VetView>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct VetView {
    fixes: u64,
    of: u64,
    breaks: u64,
}

async fn list(config: &Path, arguments: &ListArguments) -> anyhow::Result<ExitCode> {
    let client = Client::new(&arguments.process, config)?;
    let answer = client.get(&["transforms"], &[]).await?;
    if arguments.json {
        print_json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    let view: ListView = client.read(answer)?;
    if view.transforms.is_empty() {
        to_stderr("no transforms: messages go as they are");
        return Ok(ExitCode::SUCCESS);
    }
    print(&list_text(&view))?;
    to_stderr(&format!("chain {}:{}", view.generation, short(&view.digest)));
    Ok(ExitCode::SUCCESS)
}

fn list_text(view: &ListView) -> String {
    let row = |transform: &TransformView| {
        let vet = transform
            .vet
            .as_ref()
            .map(|vet| format!("fixes {} of {}, breaks {}", vet.fixes, vet.of, vet.breaks));
        vec![
            printable(&transform.file).into_owned(),
            transform.state.clone(),
            transform.digest.as_deref().map_or("-", short).to_owned(),
            transform.since.clone().unwrap_or_else(|| "-".to_owned()),
            transform.calls.to_string(),
            transform.errors.to_string(),
            vet.unwrap_or_else(|| "-".to_owned()),
            cut(transform.reason.as_deref().unwrap_or_default(), 400),
        ]
    };
    let rows: Vec<_> = view.transforms.iter().map(row).collect();
    table(&["FILE", "STATE", "DIGEST", "SINCE", "CALLS", "ERRORS", "VETTED", "REASON"], &rows)
}

/// As much of a digest as record headers carry.
fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_a_table() {
        let answer = r#"{"generation":7,"digest":"0123","transforms":[
            {"file":"10-x.wasm","digest":"0123456789abcdef99","state":"live","reason":null,
             "since":"2026-01-01T00:00:00Z","calls":12,"errors":1,
             "vet":{"fixes":37,"of":40,"breaks":0,"sample":500},"new":1},
            {"file":"20-y.wasm","digest":null,"state":"rejected","reason":"not WebAssembly"}]}"#;
        let view: ListView = serde_json::from_str(answer).unwrap();
        let expected = "\
FILE       STATE     DIGEST            SINCE                 CALLS  ERRORS  VETTED                    REASON
10-x.wasm  live      0123456789abcdef  2026-01-01T00:00:00Z  12     1       fixes 37 of 40, breaks 0
20-y.wasm  rejected  -                 -                     0      0       -                         not WebAssembly
";
        assert_eq!(list_text(&view), expected);
    }
}
