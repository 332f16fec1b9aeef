//! What an operator does at random moments: puts modules into the folder and takes them out, has
//! messages tried again, gives some up. Three modules are there all the time, with most seeds: they route the changes of
//! some tables to streams of their own.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::guest;
use crate::support::oracle::GivenUp;
use crate::support::sluicebox::Home;

/// What is in the transforms folder from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chain {
    Empty,
    /// Removes the large column, which lets parked rows through.
    Strips,
    /// Traps and fails on some rows.
    Traps,
    /// The same, and lets those pass as they are.
    TrapsAndPasses,
    /// The same, and leaves those out.
    TrapsAndDrops,
    /// Cuts what is too large into parts.
    Splits,
}

impl Chain {
    pub const ALL: [Self; 6] = [
        Self::Empty,
        Self::Strips,
        Self::Traps,
        Self::TrapsAndPasses,
        Self::TrapsAndDrops,
        Self::Splits,
    ];
}

/// Names of the files.
const STRIP: &str = "10-strip";
const TRAP: &str = "50-trap";
const SPLIT: &str = "90-split";

/// Rows of `items` go to one stream after the other; those of a customer are in three.
const ROUTES: [(&str, &str); 3] = [
    (
        "01-items",
        "tables = [\"public.items\"]\n[config]\nstream = \"{column:lane}\"\nfallback = \"changes\"\n",
    ),
    ("02-orders", "tables = [\"public.orders\"]\n[config]\nstream = \"cdc/orders-{action}\"\n"),
    ("03-pairs", "tables = [\"public.pairs\"]\n[config]\nstream = \"cdc/{table}\"\n"),
];

/// Has each row of `items` say which stream its change goes to; a deletion does not, and goes to the
/// pipeline's own.
pub const LANES: &str = "
    alter table items add column lane text;
    create function choose_lane() returns trigger language plpgsql as $$ begin
        new.lane := (array['cdc/left', 'cdc/right', null])[1 + new.op % 3]; return new;
    end $$;
    create trigger lanes before insert or update on items
        for each row execute function choose_lane();";

/// A module as it lies in the folder.
#[derive(Debug)]
struct Files {
    settings: Vec<u8>,
    module: Vec<u8>,
}

impl Files {
    /// Has the program write a ready-made module, and keeps what it wrote.
    async fn of(home: &Home, arguments: &[&str]) -> Self {
        home.ok(&[&["transforms", "add"], arguments].concat()).await;
        let take = |kind: &str| {
            let path = home.transforms().join(format!("10-{}.{kind}", arguments[0]));
            let bytes = fs::read(&path).unwrap();
            fs::remove_file(path).unwrap();
            bytes
        };
        Self { settings: take("toml"), module: take("wasm") }
    }

    /// A module's settings come before it, and go after it.
    fn put(&self, home: &Home, name: &str) {
        home.drop_in(&format!("{name}.toml"), &self.settings);
        home.drop_in(&format!("{name}.wasm"), &self.module);
    }
}

fn take_out(home: &Home, name: &str) {
    for kind in ["wasm", "toml"] {
        drop(fs::remove_file(home.transforms().join(format!("{name}.{kind}"))));
    }
}

/// With what the operator remembers.
#[derive(Debug)]
pub struct Operator {
    strip: Files,
    split: Files,
    /// By their operation in the ledger.
    pub given_up: BTreeMap<u64, GivenUp>,
    /// Whether [`Chain::TrapsAndDrops`] was ever there.
    pub has_dropped: bool,
}

impl Operator {
    /// Has the program write the modules once, to keep their files, and leaves those that route, where
    /// there are to be any.
    pub async fn new(home: &Home, routes: bool) -> Self {
        let strip = Files::of(home, &["strip-columns", "--column", "body"]).await;
        let split = Files::of(home, &["split"]).await;
        let mut route = Files::of(home, &["route", "--set", "stream=x"]).await;
        for (name, settings) in ROUTES.into_iter().filter(|_| routes) {
            route.settings = settings.into();
            route.put(home, name);
        }
        Self { strip, split, given_up: BTreeMap::new(), has_dropped: false }
    }

    pub fn change_chain(&mut self, home: &Home, chain: Chain) {
        self.has_dropped |= chain == Chain::TrapsAndDrops;
        let gone: &[&str] = match chain {
            Chain::Empty => &[STRIP, TRAP, SPLIT],
            Chain::Strips => &[TRAP, SPLIT],
            Chain::Traps | Chain::TrapsAndPasses | Chain::TrapsAndDrops => &[],
            // Otherwise nothing would be too large.
            Chain::Splits => &[STRIP],
        };
        for name in gone {
            take_out(home, name);
        }
        let trap = |settings: &str| {
            Files { settings: settings.into(), module: guest::chaos() }.put(home, TRAP);
        };
        match chain {
            Chain::Empty => {}
            Chain::Strips => self.strip.put(home, STRIP),
            Chain::Splits => self.split.put(home, SPLIT),
            Chain::Traps => trap("on_error = \"park\"\n"),
            Chain::TrapsAndPasses => trap("on_error = \"pass\"\n"),
            Chain::TrapsAndDrops => trap("on_error = \"drop\"\nmay_drop = true\n"),
        }
    }

    /// Whether anybody was there to do it.
    pub async fn retry(&self, home: &Home) -> bool {
        home.cli(&["messages", "retry", "--all"]).await.status.success()
    }

    /// Gives one message up, of those that failed and of whose row the ledger knows. Whether there was
    /// one.
    pub async fn acknowledge(&mut self, home: &Home) -> bool {
        let args = ["messages", "list", "--state", "failed", "--table", "items", "--json"];
        let Some(list) = read(home, &args).await else { return false };
        let messages = list["messages"].as_array().into_iter().flatten();
        // The newest: there are the fewest behind it.
        let mut inserts = messages.rev().filter(|message| message["action"] == "insert");
        let Some(id) = inserts.next().and_then(|message| message["id"].as_str()) else {
            return false;
        };
        let Some(detail) = read(home, &["messages", "show", id, "--json"]).await else {
            return false;
        };
        let payload = detail["payload"].as_str().unwrap_or_default();
        let op = payload.split_once("\"op\":").map(|(_, rest)| rest);
        let op = op.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
        let op: u64 = op.unwrap_or_else(|| panic!("no op in {payload:.300}"));
        let output = home.cli(&["messages", "ack", id, "--json"]).await;
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        match (output.status.success(), answer["changed"].as_u64()) {
            (true, Some(1)) => drop(self.given_up.insert(op, GivenUp::Surely)),
            // Refused, gone meanwhile, or cut off.
            _ => drop(self.given_up.insert(op, GivenUp::Perhaps)),
        }
        true
    }

    /// The same, and waits for such a message, for as long as this: where attempts have an end, it is
    /// there for a moment only.
    pub async fn acknowledge_within(&mut self, home: &Home, time: Duration) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < time {
            if self.acknowledge(home).await {
                return true;
            }
        }
        false
    }
}

/// What a command printed, if it got an answer.
async fn read(home: &Home, args: &[&str]) -> Option<Value> {
    let output = home.cli(args).await;
    output.status.success().then(|| serde_json::from_slice(&output.stdout).ok()).flatten()
}
