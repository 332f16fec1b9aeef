//! A guest that misbehaves on demand, for the host's tests: `config.act` says how.

use std::cell::Cell;
use std::hint::black_box;

use serde::Deserialize;
use sluicebox_transform::{Algorithm, Change, Codec, Level, Transform, Verdict, export, log};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    act: String,
    /// Act only on changes of this table; keep the others.
    #[serde(default)]
    table: Option<String>,
    #[serde(default)]
    number: u64,
    #[serde(default)]
    text: String,
}

struct Chaos(Config);

thread_local! {
    /// Counts the calls of this instance.
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

impl Transform for Chaos {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        match config.act.as_str() {
            "init-error" => Err("`config.act` asks for an error".into()),
            "init-panic" => panic!("init panics"),
            "init-log" => {
                log(Level::Info, "about to refuse");
                Err("`config.act` asks for an error after a line".into())
            }
            _ => Ok(Self(config)),
        }
    }

    fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
        CALLS.set(CALLS.get() + 1);
        if self.0.table.as_ref().is_some_and(|table| *table != change.table_name()) {
            return Ok(Verdict::Keep);
        }
        let number = self.0.number;
        match self.0.act.as_str() {
            "keep" => {}
            "drop" => return Ok(Verdict::Drop),
            "count" => change.annotate("calls", &CALLS.get().to_string())?,
            // Counts its calls, and fails at a table of the name `bad`.
            "count-until-bad" => {
                change.annotate("calls", &CALLS.get().to_string())?;
                if change.table_name() == "bad" {
                    match self.0.text.as_str() {
                        "guest" => return Err("a bad table".into()),
                        "trap" => outer(0),
                        "invalid" => return Ok(Verdict::Split(Vec::new())),
                        "timeout" => loop {
                            black_box(number);
                        },
                        "memory" => loop {
                            black_box(vec![1_u8; 1 << 20]).leak();
                        },
                        "depth" => _ = black_box(recurse(number)),
                        "call" => change.set_text("body", &"x".repeat(20 << 20))?,
                        other => return Err(format!("`config.text`: there is no {other}")),
                    }
                }
            }
            "remove" => _ = change.remove("body")?,
            "set" => change.set("body", "{\"masked\": true}")?,
            "set-not-json" => change.set("body", "{masked}")?,
            "error" => return Err("this row is not to my taste".into()),
            "edit-then-trap" => {
                change.set_text("title", "edited")?;
                outer(number);
            }
            "trap" => {
                log(Level::Info, "about to trap");
                outer(number);
            }
            "loop" => loop {
                black_box(number);
            },
            "recurse" => _ = black_box(recurse(number)),
            "allocate" => {
                let mut hoard: Vec<Vec<u8>> = Vec::new();
                loop {
                    hoard.push(black_box(vec![1; 1 << 20]));
                }
            }
            "host-allocate" => {
                let value = "x".repeat(1 << 20);
                for index in 0_u64.. {
                    change.set_text(&format!("c{index}"), &value)?;
                }
            }
            "host-edits" => {
                for index in 0_u64.. {
                    change.annotate(&format!("k{index}"), "1")?;
                }
            }
            "enlarge" => {
                let large = "x".repeat(number as usize);
                let json = json_of(number);
                match self.0.text.as_str() {
                    "set" => change.set("body", &json)?,
                    "set-text" => change.set_text("note", &large)?,
                    "set-old" => change.set_old("body", &json)?,
                    "renamed" => {
                        change.set("body", &json)?;
                        change.rename("body", "text")?;
                    }
                    "name" => change.set(&large, "1")?,
                    "annotate" => change.annotate("note", &json)?,
                    "append" => change.append("list", &json)?,
                    "header" => change.add_header("trail", large.as_bytes())?,
                    "headers" => {
                        for index in 0..1000 {
                            change.add_header(
                                &format!("h{index}"),
                                &large.as_bytes()[..number as usize / 1000],
                            )?;
                        }
                    }
                    "message" => change.set_message(&json)?,
                    "split" => return Ok(Verdict::Split(vec!["1".into(), json])),
                    "parts" => return Ok(Verdict::Parts(number)),
                    "compress" => _ = change.compress("body", Codec::Gzip, 0)?,
                    other => return Err(format!("`config.text`: there is no {other}")),
                }
            }
            "large-call" => change.set_text("body", &"x".repeat(20 << 20))?,
            "not-utf8" => {
                // SAFETY: none; to break this rule is the point.
                let text = unsafe { std::str::from_utf8_unchecked(black_box(&[0xff, 0xfe])) };
                change.set_text("body", text)?;
            }
            "use-handle-twice" => {
                // The second handle is the same one, so that it is dropped twice.
                drop(unsafe { Change::from_handle(change.handle()) });
            }
            "unknown-handle" => {
                let other = unsafe { Change::from_handle(change.handle() + 7) };
                let name = other.table_name();
                std::mem::forget(other);
                log(Level::Info, &name);
            }
            "log" => {
                for index in 0..number {
                    log(Level::Debug, &format!("line {index}"));
                }
            }
            "headers" => {
                for index in 0..number {
                    change.add_header(&format!("h{index}"), b"v")?;
                }
            }
            "reserved-header" => change.add_header("sb-key", b"mine")?,
            "empty-header" => change.add_header("", b"mine")?,
            "reserved-metadata" => change.annotate("table_name", "\"mine\"")?,
            "empty-key" => change.annotate("", "1")?,
            "append" => {
                change.append("list", "1")?;
                change.append("list", "{\"a\": 2}")?;
            }
            "append-two" => change.append("list", "1], [2")?,
            "append-to-object" => {
                change.annotate("list", "{}")?;
                change.append("list", "1")?;
            }
            "rename" => change.rename("title", "headline")?,
            "split" => {
                return Ok(Verdict::Split((0..number).map(|index| index.to_string()).collect()));
            }
            "split-large" => return Ok(Verdict::Split(vec![json_of(number), "1".into()])),
            "split-not-json" => return Ok(Verdict::Split(vec!["1".into(), "{".into()])),
            "parts" => return Ok(Verdict::Parts(number)),
            "replace" => {
                let message = change.message()?;
                change.set_message(&format!("{{\"wrapped\":{message}}}"))?;
            }
            "message" => change.set_message(&self.0.text)?,
            "packed" => {
                change.set_message(&format!("\"packed {:x}\"", 4097 * change.commit_index()))?;
            }
            "set-all" => {
                for name in change.column_names() {
                    change.set(&name, &self.0.text)?;
                }
            }
            "keep-only" => {
                for name in change.column_names().iter().filter(|name| **name != self.0.text) {
                    change.remove(name)?;
                }
            }
            "replace-not-json" => change.set_message("not json")?,
            "replace-large" => change.set_message(&json_of(number))?,
            "route" => change.route_to(Some(&self.0.text))?,
            "fail-unless-replaced" if !change.is_replaced() => {
                return Err("the message is as it was".into());
            }
            "fail-unless-replaced" => {}
            "column-names" => change.annotate("names", &format!("{:?}", change.column_names()))?,
            "route-back" => change.route_to(None)?,
            "route-and-split" => {
                change.route_to(Some(&self.0.text))?;
                return Ok(Verdict::Split(vec!["1".into(), "2".into()]));
            }
            "route-by-part" => {
                let stream = format!("stream-{}", change.message()?);
                change.route_to(Some(&stream))?;
            }
            "routed-to" => {
                let stream = change.routed_to().unwrap_or_default();
                change.annotate("stream", &format!("{stream:?}"))?;
            }
            // What a module looks like that does not look at what it is told.
            "overlook-route" => _ = change.route_to(Some(&self.0.text)),
            "overlook-set" => _ = change.set("body", "{masked"),
            "overlook-set-old" => _ = change.set_old("body", "{masked"),
            "overlook-empty-column" => _ = change.set_text("", "x"),
            "overlook-rename" => _ = change.rename("body", ""),
            "overlook-annotate" => _ = change.annotate("table_name", "1"),
            "overlook-append" => _ = change.append("list", "1], [2"),
            "overlook-header" => _ = change.add_header("", b"x"),
            "overlook-headers" => {
                for index in 0..number {
                    _ = change.add_header(&format!("h{index}"), b"v");
                }
            }
            "overlook-message" => _ = change.set_message("{"),
            "overlook-replaced" => {
                change.set_message("{}")?;
                _ = change.hash("body", Algorithm::Sha256, None);
            }
            "overlook-and-drop" => {
                _ = change.set("body", "{masked");
                return Ok(Verdict::Drop);
            }
            "overlook-missing" => _ = change.rename("missing", "found"),
            // And one that does.
            "make-good" => {
                if change.set("body", "{masked").is_err() {
                    change.set_text("body", "masked")?;
                }
                if change.route_to(Some("")).is_err() {
                    change.route_to(None)?;
                }
            }
            "hash" => _ = change.hash("title", Algorithm::Sha256, None)?,
            "hmac" => _ = change.hash("title", Algorithm::Sha256, Some(b"key"))?,
            "truncate" => _ = change.truncate("body", number)?,
            "truncate-id" => _ = change.truncate("id", number)?,
            "everything" => everything(change, &self.0.text)?,
            "columns" => {
                let columns: Vec<String> = change
                    .columns()
                    .iter()
                    .map(|c| {
                        format!("{}:{}:{}:{}:{}", c.name, c.type_name, c.key, c.unchanged, c.size)
                    })
                    .collect();
                change.annotate("columns", &format!("{:?}", columns.join(" ")))?;
            }
            "read" => {
                let seen = format!(
                    "{:?} {:?} {:?} {:?} {} {} {}",
                    change.get("title")?,
                    change.get_text("title")?,
                    change.get_old("title")?,
                    change.get("missing")?,
                    change.commit_lsn(),
                    change.commit_index(),
                    change.commit_timestamp(),
                );
                change.annotate("seen", &format!("{seen:?}"))?;
            }
            other => return Err(format!("`config.act`: there is no {other}")),
        }
        Ok(Verdict::Keep)
    }
}

/// Calls every function of a change's handle, and writes down what it hears.
fn everything(change: &Change, text: &str) -> Result<(), String> {
    let note = |key: &str, text: String| change.annotate(key, &format!("{text:?}"));
    note("action", format!("{:?}", change.action()))?;
    note("table", format!("{}.{}", change.table_schema(), change.table_name()))?;
    note("position", format!("{}/{}", change.commit_lsn(), change.commit_index()))?;
    note("timestamp", change.commit_timestamp().to_string())?;
    let shown = |column: &sluicebox_transform::Column| {
        let sluicebox_transform::Column { name, type_name, key, unchanged, size } = column;
        format!("{name}:{type_name}:{key}:{unchanged}:{size}")
    };
    note("column", change.column("id").as_ref().map(shown).unwrap_or_default())?;
    note("columns", change.columns().iter().map(shown).collect::<Vec<_>>().join(" "))?;
    note("names", change.column_names().join(" "))?;
    note("title", format!("{:?} {:?}", change.get("title")?, change.get_text("title")?))?;
    note("old", format!("{:?}", change.get_old("title")?))?;
    note("annotation", format!("{:?}", change.annotation("old")))?;

    change.set_text("title", "a much longer title")?;
    note("truncated", change.truncate("title", 13)?.to_string())?;
    change.set_old("title", "\"the old one\"")?;
    note("compressed", change.compress("tags", Codec::Gzip, 0)?.to_string())?;
    change.rename("tags", "labels")?;
    note("hashed", change.hash("body", Algorithm::Sha256, Some(b"key"))?.to_string())?;
    change.set("added", "[1, 2]")?;
    change.set("gone", "1")?;
    note("removed", change.remove("gone")?.to_string())?;
    change.append("list", "1")?;
    change.add_header("name", b"value")?;
    change.route_to(Some("orders"))?;
    note("stream", change.routed_to().unwrap_or_default())?;
    note("fits", (change.size()? < change.limit()).to_string())?;
    note("replaced", change.is_replaced().to_string())?;
    log(Level::Warn, "everything was called");
    let message = change.message()?;
    change.set_message(&format!("{{\"{text}\":{message}}}"))
}

/// A JSON string of that many bytes.
fn json_of(bytes: u64) -> String {
    format!("\"{}\"", "x".repeat(bytes as usize - 2))
}

#[inline(never)]
fn outer(number: u64) {
    inner(black_box(number));
}

#[inline(never)]
fn inner(number: u64) {
    if number == black_box(0) {
        panic!("nothing is {number}");
    }
}

#[inline(never)]
#[allow(unconditional_recursion)]
fn recurse(depth: u64) -> u64 {
    black_box(recurse(black_box(depth) + 1)) + 1
}

export!(Chaos);
