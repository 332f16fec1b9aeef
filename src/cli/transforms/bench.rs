//! `sluicebox transforms bench`: what modules cost, against no transform in the same run.
//!
//! A round shapes the same message so often without the modules and so often with them, one block
//! after the other, so that what else the machine does falls on both. Medians of the rounds are
//! shown. Shaping is everything between decoding and the sink: draft, transforms, JSON, size gate.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::super::output::{print, print_json, table, to_stderr};
use super::super::{EXIT_NO, Global, human};
use super::modules::{self, MessageArguments, ModuleArguments};
use super::test::envelope;
use crate::case::{self, Sample};
use crate::message::{Draft, Envelope};
use crate::pipeline::item::Shaped;
use crate::pipeline::workers;
use crate::transform::{Chain, Runner};

/// Column sizes of the built-in messages, in bytes.
const SIZES: [usize; 3] = [1024, 64 * 1024, 2 * 1024 * 1024];

/// How long a block should take: long against the clock, short against what else the machine does.
const BLOCK: Duration = Duration::from_millis(10);

/// The fewest rounds, however long they take.
const ROUNDS_MIN: usize = 3;

#[derive(Debug, Args)]
pub(in crate::cli) struct BenchArguments {
    #[command(flatten)]
    modules: ModuleArguments,
    #[command(flatten)]
    messages: MessageArguments,
    /// How long to measure each message, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    /// Whether this program was built with optimisation: without, the host's part is slow.
    optimised: bool,
    samples: Vec<Measured>,
    /// What the modules' instances hold, by the chain's order.
    memory_bytes: Vec<Option<u64>>,
}

#[derive(Debug, Serialize)]
struct Measured {
    sample: String,
    bytes: u64,
    /// Microseconds for one change, medians of the rounds.
    micros_without: f64,
    micros_with: f64,
    micros_added: f64,
    /// On one thread, with the modules.
    changes_per_second: f64,
    rounds: usize,
    /// Why the modules failed it, which is then what was measured.
    error: Option<String>,
}

pub(super) async fn run(global: &Global, arguments: BenchArguments) -> anyhow::Result<ExitCode> {
    let samples = match arguments.messages.are_built_in() {
        true => SIZES.map(sized).into(),
        false => arguments.messages.read(global).await?,
    };
    let BenchArguments { modules, seconds, json, .. } = arguments;
    let time = Duration::from_secs(seconds);
    let report = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| scope.spawn(|| measure_all(&modules, &samples, time)).join())
    })
    .map_err(|_| anyhow::anyhow!("the thread that ran the modules broke off, a defect"))??;
    if json {
        print_json(&report)?;
    } else {
        print(&report_text(&report))?;
        if !report.optimised {
            to_stderr("this sluicebox was built without optimisation: compare nothing but ratios");
        }
    }
    for measured in &report.samples {
        if let Some(error) = &measured.error {
            to_stderr(&format!("{}: {error}", measured.sample));
        }
    }
    let is_well = report.samples.iter().all(|measured| measured.error.is_none());
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::from(EXIT_NO) })
}

fn sized(bytes: usize) -> Sample {
    let name = format!("insert with {} of text", human::bytes(bytes as u64));
    Sample { name, change: case::sized(bytes), case: None }
}

fn measure_all(
    arguments: &ModuleArguments,
    samples: &[Sample],
    time: Duration,
) -> anyhow::Result<Report> {
    let (workbench, chain) = modules::load(arguments, samples)?;
    let mut runner = workbench.runner();
    let mut without = workbench.runner();
    let mut measured = Vec::with_capacity(samples.len());
    for sample in samples {
        measured.push(measure(&mut runner, &mut without, &chain, sample, time));
    }
    let memory_bytes = runner.memory_bytes();
    Ok(Report { optimised: !cfg!(debug_assertions), samples: measured, memory_bytes })
}

fn measure(
    with: &mut Runner,
    without: &mut Runner,
    chain: &Arc<Chain>,
    sample: &Sample,
    time: Duration,
) -> Measured {
    let envelope = envelope(sample);
    let none = Arc::new(Chain::empty(0));
    let bytes = Draft::new(sample.change.clone(), Arc::clone(&envelope)).metered_bytes();
    let error = match shape(with, chain, sample, &envelope) {
        Shaped::Failed(failure) | Shaped::Halt(failure) if failure.error.class != "oversize" => {
            Some(failure.error.text)
        }
        Shaped::Failed(_) | Shaped::Halt(_) | Shaped::Records(_) | Shaped::Dropped => None,
    };
    let calls_without = calls(|| drop(shape(without, &none, sample, &envelope)));
    let calls_with = calls(|| drop(shape(with, chain, sample, &envelope)));
    let (mut rounds_without, mut rounds_with) = (Vec::new(), Vec::new());
    let started = Instant::now();
    while started.elapsed() < time || rounds_with.len() < ROUNDS_MIN {
        rounds_without
            .push(block(calls_without, || drop(shape(without, &none, sample, &envelope))));
        rounds_with.push(block(calls_with, || drop(shape(with, chain, sample, &envelope))));
    }
    let mut added: Vec<f64> =
        rounds_with.iter().zip(&rounds_without).map(|(with, without)| with - without).collect();
    let micros_with = median(&mut rounds_with);
    Measured {
        sample: sample.name.clone(),
        bytes: bytes.unwrap_or(0),
        micros_without: median(&mut rounds_without),
        micros_with,
        micros_added: median(&mut added),
        changes_per_second: 1e6 / micros_with,
        rounds: rounds_with.len(),
        error,
    }
}

fn shape(
    runner: &mut Runner,
    chain: &Arc<Chain>,
    sample: &Sample,
    envelope: &Arc<Envelope>,
) -> Shaped {
    let draft = Draft::new(sample.change.clone(), Arc::clone(envelope));
    let outcome = runner.run(chain, draft);
    workers::measured(outcome, || runner.trace())
}

/// How many calls fill a block.
fn calls(mut call: impl FnMut()) -> u32 {
    let mut calls = 1_u32;
    loop {
        let started = Instant::now();
        for _ in 0..calls {
            call();
        }
        if started.elapsed() >= BLOCK || calls >= 1 << 20 {
            return calls;
        }
        calls *= 2;
    }
}

/// Microseconds for one call.
fn block(calls: u32, mut call: impl FnMut()) -> f64 {
    let started = Instant::now();
    for _ in 0..calls {
        call();
    }
    started.elapsed().as_secs_f64() * 1e6 / f64::from(calls)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn report_text(report: &Report) -> String {
    let row = |measured: &Measured| {
        vec![
            measured.sample.clone(),
            human::bytes(measured.bytes),
            format!("{:.2}", measured.micros_without),
            format!("{:.2}", measured.micros_with),
            format!("{:.2}", measured.micros_added),
            format!("{:.0}", measured.changes_per_second),
        ]
    };
    let rows: Vec<_> = report.samples.iter().map(row).collect();
    let mut text = table(
        &["MESSAGE", "SIZE", "µS WITHOUT", "µS WITH", "µS ADDED", "CHANGES/S ON ONE THREAD"],
        &rows,
    );
    let memory: u64 = report.memory_bytes.iter().flatten().sum();
    text.push_str(&format!("memory of the instances: {}\n", human::bytes(memory)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median(&mut [3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!(median(&mut []).abs() < f64::EPSILON);
    }
}
