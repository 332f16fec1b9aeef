//! `sluicebox transforms`: the folder of the running process, the ready-made modules, and the tools
//! for those who write their own.

mod bench;
mod inspect;
mod modules;
mod new;
mod pretty;
mod test;

use std::path::Path;
use std::process::ExitCode;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use super::client::{Client, ProcessArguments};
use super::output::{cut, print, print_json, printable, table, to_stderr};
use super::{Global, UsageError};
use crate::config;
use crate::transform::{TransformList, TransformView, VetReport, ready_made};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List what is in the folder, and what the running process makes of it.
    List(ListArguments),
    /// Put a ready-made transform into the folder.
    Add(AddArguments),
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

#[derive(Debug, Args)]
pub(super) struct AddArguments {
    /// The ready-made transform.
    #[arg(value_name = "READY-MADE", value_parser = ready_made_names())]
    name: String,
    /// A column that it works on; give it again for more.
    #[arg(long = "column", value_name = "COLUMN", required = true)]
    columns: Vec<String>,
    /// Only in this table: `schema.name`, or a name in any schema; give it again for more.
    #[arg(long = "table", value_name = "TABLE")]
    tables: Vec<String>,
    /// How compress-columns compresses [default: zstd].
    #[arg(long)]
    codec: Option<Codec>,
    /// Leave messages alone that S2 would take as they are.
    #[arg(long)]
    only_oversize: bool,
    /// The number that the file's name begins with, and so its place in the chain; the next free
    /// one without it.
    #[arg(long, value_name = "NN")]
    number: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Codec {
    Zstd,
    Gzip,
}

fn ready_made_names() -> PossibleValuesParser {
    ready_made::ALL
        .iter()
        .map(|ready_made| PossibleValue::new(ready_made.name).help(ready_made.description))
        .collect::<Vec<_>>()
        .into()
}

pub(super) async fn run(global: &Global, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List(arguments) => list(&global.config, &arguments).await,
        Command::Add(arguments) => add(&global.config, &arguments),
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

/// Asks nobody: the folder is watched by whoever runs.
fn add(config: &Path, arguments: &AddArguments) -> anyhow::Result<ExitCode> {
    let dir = config::Transforms::load(config)?.dir;
    let settings = settings_text(arguments)?;
    let path = ready_made::install(&dir, &arguments.name, &settings, arguments.number)?;
    print(&format!("{}\n", path.display()))?;
    to_stderr("a running sluicebox takes it up by itself; `sluicebox transforms list` shows how");
    Ok(ExitCode::SUCCESS)
}

/// The settings file beside the module.
fn settings_text(arguments: &AddArguments) -> anyhow::Result<String> {
    #[derive(Serialize)]
    struct Settings<'a> {
        #[serde(skip_serializing_if = "<[String]>::is_empty")]
        tables: &'a [String],
        config: ModuleConfig<'a>,
    }
    #[derive(Serialize)]
    struct ModuleConfig<'a> {
        columns: &'a [String],
        #[serde(skip_serializing_if = "Option::is_none")]
        codec: Option<Codec>,
        only_oversize: bool,
    }
    if arguments.codec.is_some() && arguments.name != "compress-columns" {
        return Err(UsageError("--codec is for compress-columns".to_owned()).into());
    }
    let (columns, codec) = (arguments.columns.as_slice(), arguments.codec);
    let config = ModuleConfig { columns, codec, only_oversize: arguments.only_oversize };
    Ok(toml::to_string(&Settings { tables: &arguments.tables, config })?)
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
            transform.vet.as_ref().map(VetReport::text).unwrap_or_default(),
            cut(transform.reason.as_deref().unwrap_or_default(), 400),
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
    use crate::transform::{TransformState, VetResult};

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
            vet: Some(VetReport {
                result: VetResult::Passed,
                fixes: 3,
                of: 4,
                breaks: 0,
                sample: 50,
                drops: 0,
                slower_percent: None,
            }),
        };
        let rejected = TransformView {
            file: "20-y.wasm".to_owned(),
            digest: String::new(),
            state: TransformState::Rejected,
            reason: Some("not\nWebAssembly".to_owned()),
            calls: 0,
            errors: 0,
            vet: None,
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

    #[test]
    fn settings_are_written_for_the_module() {
        #[track_caller]
        fn check(arguments: &AddArguments, expected: &str) {
            assert_eq!(settings_text(arguments).unwrap(), expected);
            let dir = tempfile::tempdir().unwrap();
            ready_made::install(dir.path(), &arguments.name, expected, None).unwrap();
        }
        let strip = AddArguments {
            name: "strip-columns".to_owned(),
            columns: vec!["body".to_owned(), "a\"b".to_owned()],
            tables: Vec::new(),
            codec: None,
            only_oversize: false,
            number: None,
        };
        check(&strip, "[config]\ncolumns = [\"body\", 'a\"b']\nonly_oversize = false\n");
        let compress = AddArguments {
            name: "compress-columns".to_owned(),
            columns: vec!["body".to_owned()],
            tables: vec!["public.t".to_owned()],
            codec: Some(Codec::Gzip),
            only_oversize: true,
            number: Some(5),
        };
        check(
            &compress,
            "tables = [\"public.t\"]\n\n[config]\ncolumns = [\"body\"]\ncodec = \"gzip\"\n\
             only_oversize = true\n",
        );
        let wrong = AddArguments { codec: Some(Codec::Zstd), ..strip };
        assert!(settings_text(&wrong).unwrap_err().is::<UsageError>());
    }

    #[test]
    fn a_module_is_put_into_the_configured_folder() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("sluicebox.toml");
        // The rest of the file needs variables that an operator's shell may not have.
        std::fs::write(&config, "[source]\nurl = \"${NOT_SET_HERE}\"\n[transforms]\ndir = \"t\"\n")
            .unwrap();
        std::fs::create_dir(dir.path().join("t")).unwrap();
        let arguments = AddArguments {
            name: "strip-columns".to_owned(),
            columns: vec!["body".to_owned()],
            tables: Vec::new(),
            codec: None,
            only_oversize: false,
            number: None,
        };
        add(&config, &arguments).unwrap();
        assert!(dir.path().join("t/10-strip-columns.wasm").exists());
        assert!(dir.path().join("t/10-strip-columns.toml").exists());
    }
}
