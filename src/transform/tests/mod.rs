//! The host against real guests: the ready-made ones, and one that misbehaves on demand.

mod calls;
mod folder;
mod frozen;
#[path = "../../../tests/it/support/guest.rs"]
#[expect(dead_code, reason = "the integration tests use the rest")]
mod guest;
mod hostile;
mod limits;
mod loading;
mod nesting;
mod proposals;
mod rules;
mod soak;
mod successors;
mod trials;
mod vetting;
mod wasi;
mod written_by_hand;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::Value;

use super::chain::{Chain, Counters, Transform};
use super::engine::Engine;
use super::loader::{self, Module};
use super::runner::{Failure, Outcome, Runner};
use super::settings::Settings;
use super::{Class, ready_made};
use crate::change::{Action, Cell, Change, Column, Grouping, Lsn, Position, Table, Tuple};
use crate::message::{Draft, Envelope, EnvelopeSettings};
use crate::pg_type::Kind;

fn engine() -> &'static Arc<Engine> {
    static ENGINE: OnceLock<Arc<Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| Arc::new(Engine::new().unwrap()))
}

/// The guest of `tests/guests/chaos`, built beside the ready-made ones, whose dependencies it
/// shares.
fn chaos() -> &'static [u8] {
    static CHAOS: OnceLock<Vec<u8>> = OnceLock::new();
    CHAOS.get_or_init(|| {
        let target_dir = PathBuf::from(concat!(env!("OUT_DIR"), "/guests"));
        let status = Command::new(env!("CARGO"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["build", "--locked", "--quiet", "--package", "sluicebox-chaos"])
            .args(["--target", "wasm32-unknown-unknown", "--profile", "guest", "--target-dir"])
            .arg(&target_dir)
            .env_remove("RUSTFLAGS")
            .status()
            .unwrap();
        assert!(status.success(), "the chaos guest does not build");
        std::fs::read(target_dir.join("wasm32-unknown-unknown/guest/sluicebox_chaos.wasm")).unwrap()
    })
}

fn strip() -> &'static [u8] {
    ready_made::find("strip-columns").unwrap().module()
}

fn compress() -> &'static [u8] {
    ready_made::find("compress-columns").unwrap().module()
}

fn module(bytes: &'static [u8]) -> Arc<Module> {
    static MODULES: std::sync::Mutex<Vec<(usize, Arc<Module>)>> = std::sync::Mutex::new(Vec::new());
    let mut modules = MODULES.lock().unwrap();
    let address = bytes.as_ptr().addr();
    if let Some((_, module)) = modules.iter().find(|(known, _)| *known == address) {
        return Arc::clone(module);
    }
    let module = Arc::new(loader::load(engine(), bytes, None).unwrap());
    modules.push((address, Arc::clone(&module)));
    module
}

fn transform(file: &str, bytes: &'static [u8], settings: &str) -> Arc<Transform> {
    Arc::new(Transform {
        file: file.into(),
        module: module(bytes),
        settings: Settings::parse(settings).unwrap(),
        settings_text: None,
        counters: Counters::default(),
        since: String::new(),
    })
}

fn chain(transforms: Vec<Arc<Transform>>) -> Arc<Chain> {
    Arc::new(Chain::new(1, transforms))
}

/// A chain of the chaos guest alone.
fn acting(act: &str, number: u64, more: &str) -> Arc<Chain> {
    let settings = format!("{more}\n[config]\nact = \"{act}\"\nnumber = {number}\n");
    chain(vec![transform("10-chaos.wasm", chaos(), &settings)])
}

fn runner() -> Runner {
    Runner::new(Arc::clone(engine()))
}

fn table(name: &str) -> Arc<Table> {
    let column = |name: &str, type_name: &str, kind, key| Column {
        name: name.to_owned(),
        type_name: type_name.to_owned(),
        kind,
        identity: key,
        primary_key: key,
    };
    Arc::new(Table {
        oid: 16_400,
        schema: "public".to_owned(),
        name: name.to_owned(),
        columns: vec![
            column("id", "int4", Kind::Integer, true),
            column("title", "text", Kind::Text, false),
            column("body", "text", Kind::Text, false),
            column("tags", "jsonb", Kind::Json, false),
        ],
        grouping: Grouping::Key,
    })
}

/// Nothing: NULL.
fn tuple(cells: &[Option<&str>]) -> Tuple {
    let mut data = Vec::new();
    let mut cell = |text: &Option<&str>| match text {
        None => Cell::Null,
        Some(text) => {
            let start = u32::try_from(data.len()).unwrap();
            data.extend_from_slice(text.as_bytes());
            Cell::Text { start, end: u32::try_from(data.len()).unwrap() }
        }
    };
    let cells = cells.iter().map(&mut cell).collect();
    Tuple { data: Bytes::from(data), cells }
}

fn envelope() -> Arc<Envelope> {
    Arc::new(Envelope::new(EnvelopeSettings {
        pipeline_id: "p-1".to_owned(),
        pipeline_name: "shop".to_owned(),
        database_name: "shop".to_owned(),
        hostname: "db.example".to_owned(),
        chain: "1:0123456789abcdef".to_owned(),
        unguarded: false,
    }))
}

fn change_of(table_name: &str, body: &str) -> Change {
    Change {
        position: Position { commit_lsn: Lsn(4711), index: 3 },
        commit_timestamp_us: 1_749_604_762_402_358,
        action: Action::Update,
        table: table(table_name),
        new: Some(tuple(&[Some("1"), Some("a title"), Some(body), Some("{\"a\": [1, 2]}")])),
        old: Some(tuple(&[Some("1"), Some("old title"), Some("old body"), None])),
    }
}

fn draft(body: &str) -> Draft {
    Draft::new(change_of("documents", body), envelope())
}

fn message(draft: &Draft) -> Value {
    serde_json::from_str(&draft.message_json().unwrap()).unwrap()
}

/// The only message of an outcome.
fn kept(outcome: Outcome) -> Draft {
    let mut drafts = several(outcome);
    assert_eq!(drafts.len(), 1);
    drafts.remove(0)
}

fn several(outcome: Outcome) -> Vec<Draft> {
    match outcome {
        Outcome::Keep(drafts) => drafts,
        Outcome::Failed(failure) => panic!("{}: {}", failure.class.as_str(), failure.text),
    }
}

fn failed(outcome: Outcome) -> Failure {
    match outcome {
        Outcome::Failed(failure) => *failure,
        Outcome::Keep(drafts) => panic!("kept {} messages", drafts.len()),
    }
}
