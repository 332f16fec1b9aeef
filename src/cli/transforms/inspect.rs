//! `sluicebox transforms inspect`: what a module is, and whether it would be taken up.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::super::output::{print, print_json, printable};
use super::super::{EXIT_NO, UsageError, human};
use crate::transform::{Inspection, MODULE_BYTES_MAX, Workbench, setting_lines};

#[derive(Debug, Args)]
pub(in crate::cli) struct InspectArguments {
    /// The module.
    #[arg(value_name = "FILE.wasm")]
    module: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &InspectArguments) -> anyhow::Result<ExitCode> {
    let shown = arguments.module.display();
    let failed = |error| UsageError(format!("could not read {shown}: {error}"));
    let length = std::fs::metadata(&arguments.module).map_err(failed)?.len();
    if length > MODULE_BYTES_MAX.saturating_mul(4) {
        // Not read whole only to be told that it is too large.
        let text =
            format!("{shown} has {length} bytes, and a module has {MODULE_BYTES_MAX} at most");
        return Err(UsageError(text).into());
    }
    let bytes = std::fs::read(&arguments.module).map_err(failed)?;
    let inspection = Workbench::of_user()?.inspect(&bytes);
    if arguments.json {
        print_json(&inspection)?;
    } else {
        print(&text(&inspection))?;
    }
    Ok(if inspection.loads { ExitCode::SUCCESS } else { ExitCode::from(EXIT_NO) })
}

fn text(inspection: &Inspection) -> String {
    let mut text = String::new();
    let mut field = |name: &str, value: &str| {
        text.push_str(&format!("{name:<10} {}\n", printable(value)));
    };
    field("kind", inspection.kind);
    field("size", &human::bytes(inspection.bytes));
    field("digest", &inspection.digest);
    let interface = inspection.interface.as_ref();
    let interface = interface.map(|version| format!("sluicebox:transform@{version}"));
    field("interface", interface.as_deref().unwrap_or("-"));
    for import in &inspection.imports {
        field("import", import);
    }
    for export in &inspection.exports {
        field("export", export);
    }
    match &inspection.settings_schema {
        Some(schema) => {
            for (name, form) in setting_lines(schema) {
                field("setting", &format!("{name}: {form}"));
            }
        }
        None => field("settings", "- (the module does not describe them)"),
    }
    match &inspection.reason {
        None => field("loads", "yes"),
        Some(reason) => field("loads", &format!("no: {reason}")),
    }
    text
}
