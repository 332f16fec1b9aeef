//! `sluicebox transforms test`: what modules make of messages, without sending any.
//!
//! The modules are loaded, limited and run as in a pipeline, and what they make goes through the
//! same encoder and size gate. Nothing is sent, and nothing is kept but compiled code.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::value::RawValue;

use super::super::output::{print, print_json, printable, to_stderr};
use super::super::{EXIT_NO, Global, UsageError, human};
use super::modules::{self, MessageArguments, ModuleArguments};
use super::pretty::pretty;
use crate::case::{self, Sample};
use crate::message::{Draft, Envelope, EnvelopeSettings};
use crate::pipeline::control::{ColumnBytes, ErrorView, TraceStep};
use crate::pipeline::item::Shaped;
use crate::pipeline::size_gate::SizedRecord;
use crate::pipeline::workers;
use crate::sink::record::RECORD_BYTES_MAX;
use crate::transform::{Chain, Outcome, Runner};

/// Strings in what is shown and in files of expectations are shortened from these lengths on.
const SHOWN_BYTES_MAX: usize = 120;
const EXPECTED_BYTES_MAX: usize = 1000;

/// Lines around a difference.
const CONTEXT_LINES: usize = 2;

#[derive(Debug, Args)]
pub(in crate::cli) struct TestArguments {
    #[command(flatten)]
    modules: ModuleArguments,
    #[command(flatten)]
    messages: MessageArguments,
    /// Compare what comes out with this file, and exit with 1 where it differs.
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// Write the file for --expect from what comes out now.
    #[arg(long, value_name = "FILE", conflicts_with = "expect")]
    write_expect: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, arguments: TestArguments) -> anyhow::Result<ExitCode> {
    let are_built_in = arguments.messages.are_built_in();
    let samples = match are_built_in {
        true => case::built_in(),
        false => arguments.messages.read(global).await?,
    };
    // On a thread without a runtime, as in a pipeline.
    let modules = arguments.modules;
    let report = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| scope.spawn(|| try_all(&modules, &samples)).join())
    })
    .map_err(|_| anyhow::anyhow!("the thread that ran the modules broke off, a defect"))??;

    let differs = match &arguments.expect {
        Some(path) => Some(difference(path, &report)?),
        None => None,
    };
    if let Some(path) = &arguments.write_expect {
        std::fs::write(path, expectation(&report)? + "\n")
            .map_err(|error| UsageError(format!("could not write {}: {error}", path.display())))?;
    }
    let is_well = match &differs {
        Some(difference) => difference.is_empty(),
        None => report.samples.iter().all(|trial| trial.is_well(are_built_in)),
    };
    if arguments.json {
        print_json(&JsonReport { ok: is_well, report: &report, difference: differs.as_deref() })?;
    } else {
        match &differs {
            Some(difference) => print(difference)?,
            None => print(&report_text(&report))?,
        }
        to_stderr(&summary(&report));
        if let Some(path) = &arguments.expect {
            let is = if is_well { "is as expected by" } else { "differs from" };
            to_stderr(&format!("what comes out {is} {}", path.display()));
        }
    }
    if let Some(path) = &arguments.write_expect {
        to_stderr(&format!("wrote {}; compare with --expect from now on", path.display()));
    }
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::from(EXIT_NO) })
}

#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    ok: bool,
    #[serde(flatten)]
    report: &'a Report,
    /// From the file of --expect; empty where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct Report {
    transforms: Vec<ModuleReport>,
    samples: Vec<Trial>,
}

#[derive(Debug, Serialize)]
struct ModuleReport {
    file: String,
    digest: String,
    /// The most that an instance held after a message; nothing where none outlived one.
    memory_bytes: Option<u64>,
}

/// What became of one message.
#[derive(Debug, Serialize)]
struct Trial {
    sample: String,
    table: String,
    action: String,
    outcome: &'static str,
    micros: u64,
    bytes_before: u64,
    bytes_max: u64,
    /// What would be sent.
    records: Vec<RecordReport>,
    error: Option<ErrorView>,
    /// The largest columns of what is too large.
    columns: Vec<ColumnBytes>,
    /// What each transform did.
    trace: Vec<TraceStep>,
    /// From the message before to the message after, lines with `-` and `+`.
    difference: String,
}

#[derive(Debug, Serialize)]
struct RecordReport {
    bytes: u64,
    /// Where transforms sent it; nothing for the pipeline's own stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<String>,
    /// Those of the transforms, and the part's number where there are several.
    headers: Vec<[String; 2]>,
    /// As JSON; a part of a message that was cut is a string.
    body: Box<RawValue>,
}

impl Trial {
    /// Of our own samples one is too large from the start, which no transform has to mend.
    fn is_well(&self, is_built_in: bool) -> bool {
        match self.outcome {
            "sent" | "dropped" => true,
            "oversize" => is_built_in && self.bytes_before > self.bytes_max,
            _ => false,
        }
    }
}

fn try_all(arguments: &ModuleArguments, samples: &[Sample]) -> anyhow::Result<Report> {
    let (workbench, chain) = modules::load(arguments, samples)?;
    let mut runner = workbench.runner();
    let mut memory: Vec<Option<u64>> = Vec::new();
    let mut trials = Vec::with_capacity(samples.len());
    for sample in samples {
        trials.push(try_one(&mut runner, &chain, sample));
        let now = runner.memory_bytes();
        memory.resize(now.len(), None);
        for (most, now) in memory.iter_mut().zip(now) {
            *most = (*most).max(now);
        }
    }
    memory.resize(chain.files().count(), None);
    let digests = chain.digests();
    let transforms =
        chain.files().zip(digests).zip(memory).map(|((file, digest), memory_bytes)| ModuleReport {
            file: file.to_owned(),
            digest: digest.to_owned(),
            memory_bytes,
        });
    Ok(Report { transforms: transforms.collect(), samples: trials })
}

/// What the pipeline would write into the message, as far as it is known here.
pub(super) fn envelope(sample: &Sample) -> Arc<Envelope> {
    let case = sample.case.as_ref().and_then(|case| case.pipeline.clone());
    Arc::new(Envelope::new(match case {
        Some(pipeline) => EnvelopeSettings {
            pipeline_id: pipeline.id,
            pipeline_name: pipeline.name,
            database_name: pipeline.database,
            hostname: pipeline.hostname,
            chain: pipeline.chain,
            unguarded: false,
        },
        // As long as those of a real pipeline, so that sizes are near.
        None => EnvelopeSettings {
            pipeline_id: "0197a1b2-0000-7000-8000-000000000000".to_owned(),
            pipeline_name: "sluicebox".to_owned(),
            database_name: "postgres".to_owned(),
            hostname: "localhost".to_owned(),
            chain: "1:0000000000000000".to_owned(),
            unguarded: false,
        },
    }))
}

fn try_one(runner: &mut Runner, chain: &Arc<Chain>, sample: &Sample) -> Trial {
    let draft = Draft::new(sample.change.clone(), envelope(sample));
    let before = draft.message_json().unwrap_or_else(|error| error.to_string());
    let bytes_before = draft.metered_bytes().unwrap_or(0);
    let started = Instant::now();
    let outcome = runner.run(chain, draft);
    let (shaped, drafts) = match outcome {
        Outcome::Keep(drafts) => (workers::gate(&drafts, || runner.trace()), drafts),
        Outcome::Failed(failure) => (workers::failed(*failure), Vec::new()),
    };
    let took = started.elapsed();
    let trace = runner.trace();
    let text = |draft: &Draft| draft.message_json().unwrap_or_else(|error| error.to_string());
    let after: Vec<String> = drafts.iter().map(text).collect();
    let (outcome, records, failure) = match shaped {
        Shaped::Records(records) => ("sent", records, None),
        Shaped::Dropped => ("dropped", Vec::new(), None),
        Shaped::Failed(failure) if failure.error.class == "oversize" => {
            ("oversize", Vec::new(), Some(failure))
        }
        Shaped::Failed(failure) => ("failed", Vec::new(), Some(failure)),
        Shaped::Halt(failure) => ("halted", Vec::new(), Some(failure)),
    };
    let (error, columns) = match failure {
        Some(failure) => (Some(failure.error), failure.columns),
        None => (None, Vec::new()),
    };
    Trial {
        sample: sample.name.clone(),
        table: sample.change.table.qualified_name(),
        action: sample.change.action.to_string(),
        outcome,
        micros: micros(took),
        bytes_before,
        bytes_max: RECORD_BYTES_MAX,
        records: records.iter().map(record_report).collect(),
        error,
        columns,
        trace,
        difference: message_difference(outcome, &before, &after),
    }
}

pub(super) fn micros(took: Duration) -> u64 {
    u64::try_from(took.as_micros()).unwrap_or(u64::MAX)
}

fn record_report(record: &SizedRecord) -> RecordReport {
    let headers = record.record().headers.iter().filter_map(|header| {
        let [name, value] =
            [&header.name, &header.value].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        // The rest says where and when, not what.
        let counts = match name.as_str() {
            "sb-part" => value != "0/1",
            "sb-passed" => true,
            name => !name.starts_with(crate::message::header::PREFIX),
        };
        counts.then_some([name, value])
    });
    let body = String::from_utf8_lossy(&record.record().body).into_owned();
    let body = RawValue::from_string(body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(&record.record().body);
        let text = serde_json::Value::String(text.into_owned()).to_string();
        RawValue::from_string(text).expect("a JSON string is JSON")
    });
    RecordReport {
        bytes: record.metered_bytes(),
        stream: record.stream().map(ToString::to_string),
        headers: headers.collect(),
        body,
    }
}

/// Empty where nothing changed.
fn message_difference(outcome: &str, before: &str, after: &[String]) -> String {
    match after {
        // Nothing comes out, which the outcome says.
        [] => String::new(),
        [after] => difference_of(&pretty(before, SHOWN_BYTES_MAX), &pretty(after, SHOWN_BYTES_MAX)),
        parts => {
            let mut text = String::new();
            for (index, part) in parts.iter().enumerate() {
                text.push_str(&format!("{outcome}, part {index} of {}:\n", parts.len()));
                for line in pretty(part, SHOWN_BYTES_MAX).lines() {
                    text.push_str(&format!("+{line}\n"));
                }
            }
            text
        }
    }
}

/// Lines that differ with a few around them.
fn difference_of(before: &str, after: &str) -> String {
    if before == after {
        return String::new();
    }
    let diff = similar::TextDiff::from_lines(before, after);
    let mut text = String::new();
    for (index, group) in diff.grouped_ops(CONTEXT_LINES).iter().enumerate() {
        if index > 0 {
            text.push_str(" …\n");
        }
        for change in group.iter().flat_map(|operation| diff.iter_changes(operation)) {
            let line = change.value().trim_end_matches('\n');
            text.push_str(&format!("{}{}\n", change.tag(), printable(line)));
        }
    }
    text
}

fn report_text(report: &Report) -> String {
    let mut text = String::new();
    for trial in &report.samples {
        trial_text(&mut text, trial);
        text.push('\n');
    }
    for module in &report.transforms {
        let digest = super::short(&module.digest);
        let memory = match module.memory_bytes {
            Some(bytes) => format!("{} of memory", human::bytes(bytes)),
            None => "no instance outlived its message".to_owned(),
        };
        text.push_str(&format!("{} ({digest}): {memory}\n", printable(&module.file)));
    }
    text
}

fn trial_text(text: &mut String, trial: &Trial) {
    let Trial { sample, table, action, .. } = trial;
    text.push_str(&format!("== {} ({action} of {})\n", printable(sample), printable(table)));
    let limit = trial.bytes_max;
    let before = human::bytes(trial.bytes_before);
    let sizes = match trial.records.as_slice() {
        [] => before,
        [record] if record.bytes == trial.bytes_before => before,
        [record] => format!("{before} -> {}", human::bytes(record.bytes)),
        records => {
            let bytes = records.iter().map(|record| record.bytes).sum();
            format!("{before} -> {} in {} records", human::bytes(bytes), records.len())
        }
    };
    text.push_str(&format!(
        "   {}: {sizes} of {}, {} µs\n",
        trial.outcome,
        human::bytes(limit),
        trial.micros
    ));
    for step in &trial.trace {
        let bytes = step.bytes.map(|bytes| format!(", measured {}", human::bytes(bytes)));
        text.push_str(&format!(
            "   {}: {}, {} µs{}\n",
            printable(&step.transform),
            step.verdict,
            step.micros,
            bytes.unwrap_or_default()
        ));
        for (name, lines) in [("log", &step.logs), ("stack", &step.backtrace)] {
            for line in lines {
                text.push_str(&format!("     {name:<5} {}\n", printable(line)));
            }
        }
    }
    if let Some(error) = &trial.error {
        text.push_str(&format!("   error: {}: {}\n", error.class, printable(&error.text)));
    }
    for record in &trial.records {
        if let Some(stream) = &record.stream {
            text.push_str(&format!("   to stream {}\n", printable(stream)));
        }
        for [name, value] in &record.headers {
            text.push_str(&format!("   header {}: {}\n", printable(name), printable(value)));
        }
    }
    match (trial.difference.as_str(), trial.outcome) {
        ("", "sent") => text.push_str("   no change\n"),
        (difference, _) => text.push_str(difference),
    }
}

fn summary(report: &Report) -> String {
    let count = |outcome| report.samples.iter().filter(|trial| trial.outcome == outcome).count();
    let outcomes = ["sent", "dropped", "oversize", "failed", "halted"];
    let parts: Vec<String> = outcomes
        .into_iter()
        .map(|outcome| (outcome, count(outcome)))
        .filter(|(_, count)| *count > 0)
        .map(|(outcome, count)| format!("{count} {outcome}"))
        .collect();
    let messages = human::count(report.samples.len() as u64, "message");
    format!("{messages}: {}", parts.join(", "))
}

/// What is compared: everything that decides what consumers and operators see, nothing that differs
/// from run to run.
fn expectation(report: &Report) -> anyhow::Result<String> {
    #[derive(Serialize)]
    struct Expected<'a> {
        sample: &'a str,
        outcome: &'a str,
        error: Option<String>,
        records: &'a [RecordReport],
    }
    let all: Vec<_> = report
        .samples
        .iter()
        .map(|trial| Expected {
            sample: &trial.sample,
            outcome: trial.outcome,
            error: trial.error.as_ref().map(|error| format!("{}: {}", error.class, error.text)),
            records: &trial.records,
        })
        .collect();
    Ok(pretty(&serde_json::to_string(&all)?, EXPECTED_BYTES_MAX))
}

/// From the file to what came out; empty where they agree. White space does not count.
fn difference(path: &Path, report: &Report) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let path = path.display();
        UsageError(format!("could not read {path}: {error}; --write-expect {path} writes it"))
    })?;
    Ok(difference_of(&pretty(&text, EXPECTED_BYTES_MAX), &expectation(report)?))
}
