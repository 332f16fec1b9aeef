//! What an operator does at random moments: puts modules into the folder and takes them out, has
//! messages tried again, gives some up.

use std::collections::BTreeMap;
use std::fs;

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
}

impl Chain {
    pub const ALL: [Self; 3] = [Self::Empty, Self::Strips, Self::Traps];
}

/// Names of the files; a module's settings come before it.
const STRIP: [&str; 2] = ["10-strip.toml", "10-strip.wasm"];
const TRAP: &str = "50-trap.wasm";

/// With what the operator remembers.
#[derive(Debug)]
pub struct Operator {
    strip: [Vec<u8>; 2],
    /// By their operation in the ledger.
    pub given_up: BTreeMap<u64, GivenUp>,
}

impl Operator {
    /// Has the program write the module once, to keep its files.
    pub async fn new(home: &Home) -> Self {
        home.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
        let strip = ["toml", "wasm"].map(|kind| {
            let path = home.transforms().join(format!("10-strip-columns.{kind}"));
            let bytes = fs::read(&path).unwrap();
            fs::remove_file(path).unwrap();
            bytes
        });
        Self { strip, given_up: BTreeMap::new() }
    }

    pub fn change_chain(&self, home: &Home, chain: Chain) {
        let gone: &[&str] = match chain {
            Chain::Empty => &[STRIP[1], STRIP[0], TRAP],
            Chain::Strips => &[TRAP],
            Chain::Traps => &[],
        };
        for name in gone {
            drop(fs::remove_file(home.transforms().join(name)));
        }
        match chain {
            Chain::Empty => {}
            Chain::Strips => {
                for (name, bytes) in STRIP.iter().zip(&self.strip) {
                    home.drop_in(name, bytes);
                }
            }
            Chain::Traps => home.drop_in(TRAP, &guest::chaos()),
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
}

/// What a command printed, if it got an answer.
async fn read(home: &Home, args: &[&str]) -> Option<Value> {
    let output = home.cli(args).await;
    output.status.success().then(|| serde_json::from_slice(&output.stdout).ok()).flatten()
}
