//! `sluicebox transforms add`: a ready-made transform, with its settings, into the folder.

use std::path::Path;
use std::process::ExitCode;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::super::UsageError;
use super::super::output::{print, table, to_stderr};
use crate::config;
use crate::transform::ready_made;

#[derive(Debug, Args)]
pub(in crate::cli) struct AddArguments {
    /// The ready-made transform; without one, they are listed.
    #[arg(value_name = "READY-MADE", value_parser = names())]
    name: Option<String>,
    /// A column that it works on; give it again for more.
    #[arg(long = "column", value_name = "COLUMN")]
    columns: Vec<String>,
    /// Another of its settings, the value as in TOML or as plain text; give it again for more.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
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

fn names() -> PossibleValuesParser {
    ready_made::ALL
        .iter()
        .map(|ready_made| PossibleValue::new(ready_made.name).help(ready_made.description))
        .collect::<Vec<_>>()
        .into()
}

/// Asks nobody: the folder is watched by whoever runs.
pub(super) fn run(config: &Path, arguments: &AddArguments) -> anyhow::Result<ExitCode> {
    let Some(name) = &arguments.name else {
        let rows: Vec<_> = ready_made::ALL
            .iter()
            .map(|ready_made| vec![ready_made.name.to_owned(), ready_made.description.to_owned()])
            .collect();
        print(&table(&["READY-MADE", "WHAT IT DOES"], &rows))?;
        return Ok(ExitCode::SUCCESS);
    };
    let dir = config::Transforms::load(config)?.dir;
    let settings = settings_text(name, arguments)?;
    let path = ready_made::install(&dir, name, &settings, arguments.number)?;
    print(&format!("{}\n", path.display()))?;
    to_stderr("a running sluicebox takes it up by itself; `sluicebox transforms list` shows how");
    Ok(ExitCode::SUCCESS)
}

/// The settings file beside the module.
fn settings_text(name: &str, arguments: &AddArguments) -> anyhow::Result<String> {
    #[derive(Serialize)]
    struct Settings<'a> {
        #[serde(skip_serializing_if = "<[String]>::is_empty")]
        tables: &'a [String],
        config: toml::Table,
    }
    if arguments.codec.is_some() && name != "compress-columns" {
        return Err(UsageError("--codec is for compress-columns".to_owned()).into());
    }
    let mut config = toml::Table::new();
    let mut set = |key: &str, value: toml::Value| match config.insert(key.to_owned(), value) {
        None => Ok(()),
        Some(_) => Err(UsageError(format!("`{key}` is set twice"))),
    };
    if !arguments.columns.is_empty() {
        set("columns", arguments.columns.clone().into())?;
    }
    if let Some(codec) = arguments.codec {
        set("codec", toml::Value::try_from(codec)?)?;
    }
    if arguments.only_oversize {
        set("only_oversize", true.into())?;
    }
    for setting in &arguments.set {
        match setting.split_once('=') {
            Some((key, value)) if !key.trim().is_empty() => set(key.trim(), parsed(value))?,
            _ => return Err(UsageError(format!("`--set {setting}` is not KEY=VALUE")).into()),
        }
    }
    Ok(toml::to_string(&Settings { tables: &arguments.tables, config })?)
}

/// A value as TOML has it; what is none is text, so that quotes need no quotes of the shell's.
fn parsed(text: &str) -> toml::Value {
    let document: Result<toml::Table, _> = toml::from_str(&format!("value = {text}"));
    let value =
        document.ok().filter(|table| table.len() == 1).and_then(|mut table| table.remove("value"));
    value.unwrap_or_else(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(name: &str, columns: &[&str], set: &[&str]) -> AddArguments {
        let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        AddArguments {
            name: Some(name.to_owned()),
            columns: owned(columns),
            set: owned(set),
            tables: Vec::new(),
            codec: None,
            only_oversize: false,
            number: None,
        }
    }

    #[track_caller]
    fn check(arguments: &AddArguments, expected: &str) {
        let name = arguments.name.as_deref().unwrap();
        assert_eq!(settings_text(name, arguments).unwrap(), expected);
        let dir = tempfile::tempdir().unwrap();
        ready_made::install(dir.path(), name, expected, None).unwrap();
    }

    #[test]
    fn settings_are_written_for_the_module() {
        let strip = arguments("strip-columns", &["body", "a\"b"], &[]);
        check(&strip, "[config]\ncolumns = [\"body\", 'a\"b']\n");
        let compress = AddArguments {
            tables: vec!["public.t".to_owned()],
            codec: Some(Codec::Gzip),
            only_oversize: true,
            ..arguments("compress-columns", &["body"], &[])
        };
        check(
            &compress,
            "tables = [\"public.t\"]\n\n[config]\ncodec = \"gzip\"\ncolumns = [\"body\"]\n\
             only_oversize = true\n",
        );
        let wrong = AddArguments { codec: Some(Codec::Zstd), ..strip };
        assert!(settings_text("strip-columns", &wrong).unwrap_err().is::<UsageError>());
    }

    #[test]
    fn any_setting_can_be_set() {
        check(
            &arguments("truncate-columns", &["body"], &["max_bytes=100"]),
            "[config]\ncolumns = [\"body\"]\nmax_bytes = 100\n",
        );
        check(
            &arguments("route", &[], &["stream=cdc/{table}", "fallback=\"rest\""]),
            "[config]\nfallback = \"rest\"\nstream = \"cdc/{table}\"\n",
        );
        check(
            &arguments("filter", &[], &["drop=[{column=\"internal\",is=true}]"]),
            "[[config.drop]]\ncolumn = \"internal\"\nis = true\n",
        );
        for set in [&["max_bytes"][..], &["=1"], &["a=1", "a=2"]] {
            let arguments = arguments("split", &[], set);
            assert!(settings_text("split", &arguments).unwrap_err().is::<UsageError>(), "{set:?}");
        }
    }

    #[test]
    fn a_module_is_put_into_the_configured_folder() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("sluicebox.toml");
        // The rest of the file needs variables that an operator's shell may not have.
        std::fs::write(&config, "[source]\nurl = \"${NOT_SET_HERE}\"\n[transforms]\ndir = \"t\"\n")
            .unwrap();
        std::fs::create_dir(dir.path().join("t")).unwrap();
        run(&config, &arguments("strip-columns", &["body"], &[])).unwrap();
        assert!(dir.path().join("t/10-strip-columns.wasm").exists());
        assert!(dir.path().join("t/10-strip-columns.toml").exists());
        // What the module would refuse is not written.
        let error = run(&config, &arguments("mask-columns", &["a"], &["method=hash"])).unwrap_err();
        assert!(error.to_string().contains("`config.key` is missing"), "{error:#}");
        assert_eq!(std::fs::read_dir(dir.path().join("t")).unwrap().count(), 2);
    }
}
