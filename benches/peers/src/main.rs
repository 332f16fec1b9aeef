//! What one edit of one message costs: here, and with what else one would use.
//!
//! The job is the same for all: of a row of 1 KiB, 64 KiB or 2 MiB, strip its large column, mask a
//! small one, or compress the large one. A round gives each contestant a block of calls, one after
//! the other, so that what else the machine does falls on all of them; medians of the rounds are
//! printed.
//!
//! - *native*: `serde_json`, from the message's bytes to the message's bytes. Compress: zstd of the
//!   column's bytes and base64, without JSON.
//! - *extism*, *vrl*: from the message's bytes to the message's bytes, as their users do.
//! - *handle*, *json*: a transform in our host, over no transform in the same round. The message is
//!   written once behind the transforms in either case, which is therefore in neither.
//!
//! `make bench-peers`; `PEERS_ROUNDS` is the number of rounds.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use base64::Engine as _;
use serde_json::Value;
use sluicebox::case;
use sluicebox::change::Change;
use sluicebox::message::{Draft, Envelope, EnvelopeSettings};
use sluicebox::transform::{Chain, ModuleFiles, Outcome, Runner, Workbench};

const SIZES: [(&str, usize); 3] = [("1 KiB", 1024), ("64 KiB", 64 << 10), ("2 MiB", 2 << 20)];
const JOBS: [&str; 3] = ["strip", "mask", "compress"];

/// Long against the clock, short against what else the machine does.
const BLOCK: Duration = Duration::from_millis(8);

type Contestant<'a> = (&'static str, Box<dyn FnMut() + 'a>);

fn main() -> anyhow::Result<()> {
    let rounds: usize = match std::env::var("PEERS_ROUNDS") {
        Ok(text) => text.parse().context("PEERS_ROUNDS is a number")?,
        Err(_) => 15,
    };
    let guests = build_guests()?;
    let workbench = Workbench::new(None)?;
    let module = std::fs::read(guests.join("peer_sluicebox.wasm"))?;
    let chain = |job: &str, json: bool| {
        workbench.chain(vec![ModuleFiles {
            file: "peer.wasm".to_owned(),
            module: module.clone(),
            settings: Some(format!("[config]\njob = \"{job}\"\njson = {json}\n")),
        }])
    };
    println!("microseconds for one message, medians of {rounds} rounds");
    println!(
        "{:<9} {:<7} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "job", "row", "native", "extism", "vrl", "handle", "json"
    );
    let mut all = BTreeMap::new();
    for job in JOBS {
        for (name, bytes) in SIZES {
            let change = case::sized(bytes);
            let envelope = Arc::new(Envelope::new(EnvelopeSettings::default()));
            let message = Draft::new(change.clone(), Arc::clone(&envelope)).message_json()?;
            let ours = Ours { change, envelope };
            let (handle, json) = (chain(job, false)?, chain(job, true)?);
            let none = Arc::new(Chain::empty(0));
            let runners = [workbench.runner(), workbench.runner(), workbench.runner()];
            let [mut without, mut by_handle, mut by_json] = runners;
            let mut contestants: Vec<Contestant<'_>> = vec![
                ("native", native(job, message.as_bytes())?),
                ("extism", extism(job, &guests, message.as_bytes())?),
                ("vrl", vrl(job, message.as_bytes())?),
                ("none", Box::new(|| ours.run(&mut without, &none))),
                ("handle", Box::new(|| ours.run(&mut by_handle, &handle))),
                ("json", Box::new(|| ours.run(&mut by_json, &json))),
            ];
            let calls: Vec<u32> = contestants.iter_mut().map(|(_, call)| calls(call)).collect();
            let mut measured: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
            for _ in 0..rounds {
                let mut none = 0.0;
                for ((name, call), calls) in contestants.iter_mut().zip(&calls) {
                    let micros = block(*calls, call);
                    match *name {
                        "none" => none = micros,
                        "handle" | "json" => measured.entry(name).or_default().push(micros - none),
                        name => measured.entry(name).or_default().push(micros),
                    }
                }
            }
            let cell = |name: &str| format!("{:>9.2}", median(&measured[name]));
            let cells = ["native", "extism", "vrl", "handle", "json"].map(cell).join(" ");
            println!("{job:<9} {name:<7} {cells}");
            all.insert((job, name), measured);
        }
    }
    // Of each round, so that what slows both is in neither.
    let ratio =
        |job, (row, name): (&'static str, &str), (other_row, other): (&'static str, &str)| {
            let pairs = all[&(job, row)][name].iter().zip(&all[&(job, other_row)][other]);
            median(&pairs.map(|(one, other)| one / other).collect::<Vec<_>>())
        };
    println!(
        "\nstrip, 1 KiB: by handle {:.2} of native, {:.3} of extism; 2 MiB by handle {:.2} of 1 KiB; \
         compress, 2 MiB: by handle {:.2} of native",
        ratio("strip", ("1 KiB", "handle"), ("1 KiB", "native")),
        ratio("strip", ("1 KiB", "handle"), ("1 KiB", "extism")),
        ratio("strip", ("2 MiB", "handle"), ("1 KiB", "handle")),
        ratio("compress", ("2 MiB", "handle"), ("2 MiB", "native")),
    );
    Ok(())
}

struct Ours {
    change: Change,
    envelope: Arc<Envelope>,
}

impl Ours {
    fn run(&self, runner: &mut Runner, chain: &Arc<Chain>) {
        let draft = Draft::new(self.change.clone(), Arc::clone(&self.envelope));
        match runner.run(chain, draft) {
            Outcome::Keep(drafts) => drop(black_box(drafts)),
            Outcome::Failed(failure) => panic!("{}", failure.text),
        }
    }
}

fn native<'a>(job: &str, message: &'a [u8]) -> anyhow::Result<Box<dyn FnMut() + 'a>> {
    fn edit(message: &[u8], edit: impl Fn(&mut serde_json::Map<String, Value>)) {
        let mut message: Value = serde_json::from_slice(message).expect("it was made here");
        edit(message["record"].as_object_mut().expect("it was made here"));
        drop(black_box(serde_json::to_vec(&message)));
    }
    Ok(match job {
        "strip" => Box::new(|| edit(message, |record| drop(record.remove("body")))),
        "mask" => {
            Box::new(|| edit(message, |record| drop(record.insert("title".into(), "***".into()))))
        }
        "compress" => {
            let message: Value = serde_json::from_slice(message)?;
            let body = message["record"]["body"].as_str().context("a body")?.to_owned();
            Box::new(move || {
                let packed = zstd::bulk::compress(body.as_bytes(), 3).expect("memory is there");
                drop(black_box(base64::engine::general_purpose::STANDARD.encode(packed)));
            })
        }
        other => bail!("no job {other}"),
    })
}

fn extism<'a>(
    job: &'static str,
    guests: &Path,
    message: &'a [u8],
) -> anyhow::Result<Box<dyn FnMut() + 'a>> {
    let module = extism::Wasm::data(std::fs::read(guests.join("peer_extism.wasm"))?);
    let mut plugin = extism::Plugin::new(extism::Manifest::new([module]), [], false)?;
    Ok(Box::new(move || {
        let edited = plugin.call::<&[u8], Vec<u8>>(job, message);
        drop(black_box(edited.expect("the plug-in takes it")));
    }))
}

fn vrl<'a>(job: &str, message: &'a [u8]) -> anyhow::Result<Box<dyn FnMut() + 'a>> {
    use vrl::compiler::state::RuntimeState;
    use vrl::compiler::{Context, TargetValue, TimeZone};
    use vrl::value::{Secrets, Value};

    let source = match job {
        "strip" => "del(.record.body)",
        "mask" => ".record.title = \"***\"",
        "compress" => {
            ".record.body = encode_base64(encode_zstd(string!(.record.body), compression_level: 3))"
        }
        other => bail!("no job {other}"),
    };
    let compiled = match vrl::compiler::compile(source, &vrl::stdlib::all()) {
        Ok(compiled) => compiled,
        Err(errors) => bail!("{source}: {errors:?}"),
    };
    Ok(Box::new(move || {
        let value: Value = serde_json::from_slice(message).expect("it was made here");
        let metadata = Value::Object(BTreeMap::new());
        let mut target = TargetValue { value, metadata, secrets: Secrets::default() };
        let (mut state, zone) = (RuntimeState::default(), TimeZone::default());
        let mut context = Context::new(&mut target, &mut state, &zone);
        let resolved = compiled.program.resolve(&mut context);
        resolved.expect("the program has no errors");
        drop(black_box(serde_json::to_vec(&target.value)));
    }))
}

/// How many calls fill a block; the first ones warm up.
fn calls(call: &mut dyn FnMut()) -> u32 {
    let mut calls = 1;
    loop {
        if block(calls, call) * f64::from(calls) >= BLOCK.as_secs_f64() * 1e6 || calls >= 1 << 20 {
            return calls;
        }
        calls *= 2;
    }
}

fn block(calls: u32, call: &mut dyn FnMut()) -> f64 {
    let started = Instant::now();
    for _ in 0..calls {
        call();
    }
    started.elapsed().as_secs_f64() * 1e6 / f64::from(calls)
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Both guests, optimised, by a cargo of their own.
fn build_guests() -> anyhow::Result<PathBuf> {
    const TARGET: &str = "wasm32-unknown-unknown";
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target_dir = here.join("target/guests");
    let status = Command::new(env!("CARGO"))
        .current_dir(here)
        .args(["build", "--locked", "--target", TARGET, "--profile", "guest"])
        .args(["--package", "peer-extism", "--package", "peer-sluicebox", "--target-dir"])
        .arg(&target_dir)
        .status()?;
    if !status.success() {
        bail!("the guests do not build");
    }
    Ok(target_dir.join(TARGET).join("guest"))
}
