//! `/metrics`: the pipeline's status as numbers, in Prometheus's text format.
//!
//! Written by hand: everything comes out of one published status, so that a library's registry of
//! shared counters would be a second copy of all of them, and the format is a few lines.
//!
//! No name of a table and no value of a row is in here, and every label has few values: codes and
//! classes come from tables in the code, and of the names that operators and transforms choose, files and
//! routed streams, no more than [`NAMED_MAX`] each are told apart.

use std::fmt::Write as _;

use serde_json::Value;

use crate::pipeline::control::{Status, StreamView};
use crate::pipeline::heartbeat;
use crate::pipeline::stuck::Part;
use crate::pipeline::wal;
use crate::sink::Guarantee;

/// What a scraper is told.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// So many transforms or streams have numbers of their own; the others share one name.
const NAMED_MAX: usize = 50;

/// The name that the others share, which no file and no stream that transforms may choose has.
const OTHERS: &str = "(others)";

/// What the pipeline is doing, most urgent first: exactly one holds.
const STATES: [&str; 6] = ["stuck", "store", "sink", "source", "other", "delivering"];

/// Everything, one metric behind the other.
pub(super) fn text(status: &Status, transforms: &Value) -> String {
    let mut out = Exposition::default();
    out.gauges("build_info", "The running release; always 1.");
    out.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    state(&mut out, status);
    flow(&mut out, status);
    messages(&mut out, status);
    room(&mut out, status);
    postgres(&mut out, status);
    streams(&mut out, status);
    chain(&mut out, transforms);
    out.text
}

fn state(out: &mut Exposition, status: &Status) {
    out.gauge("ready", "1 while everything works, as /readyz says.", u64::from(status.ready));
    let has = |part: &str| status.reasons.iter().any(|reason| reason.part == part);
    let now = match () {
        () if !status.stuck.is_empty() => "stuck",
        () if status.ready => "delivering",
        () => ["store", "sink", "source"].into_iter().find(|part| has(part)).unwrap_or("other"),
    };
    out.gauges(
        "state",
        "1 for what the pipeline is doing: delivering, or the part whose trouble keeps it from that.",
    );
    for state in STATES {
        out.sample(&[("state", state)], f64::from(u8::from(state == now)));
    }
    out.gauges("guarantee", "1 for what is promised of the stream.");
    for guarantee in Guarantee::ALL {
        let holds = status.guarantee == guarantee.sentence();
        out.sample(&[("guarantee", guarantee.word())], f64::from(u8::from(holds)));
    }
    out.gauges("reason", "1 for each reason for not being ready, as /readyz has it.");
    let mut seen = Vec::new();
    for reason in &status.reasons {
        let labels = [("part", reason.part.as_str()), ("code", reason.code.as_str())];
        if !seen.contains(&labels) {
            out.sample(&labels, 1.0);
            seen.push(labels);
        }
    }
    out.gauges("stuck", "1 for a part that has work and gets none of it done.");
    for part in Part::ALL.into_iter().map(Part::word).chain([heartbeat::PART]) {
        let stuck = status.stuck.iter().any(|stuck| stuck.part == part);
        out.sample(&[("part", part)], f64::from(u8::from(stuck)));
    }
    out.counter(
        "sink_sessions_total",
        "Sessions with S2 that were opened, the first included.",
        status.sink_sessions,
    );
    out.counter(
        "source_connections_total",
        "Replication connections to Postgres that were opened, the first included.",
        status.source_connections,
    );
}

fn flow(out: &mut Exposition, status: &Status) {
    let measures = &status.measures;
    out.counter(
        "changes_read_total",
        "Changes read from Postgres, repeated ones not counted.",
        status.changes,
    );
    out.counter("changes_dropped_total", "Changes that a transform dropped.", status.dropped);
    out.counter(
        "records_appended_total",
        "Records sent to S2, sent again ones counted again.",
        measures.sent_records,
    );
    out.counter(
        "record_bytes_appended_total",
        "Metered bytes of the records sent to S2.",
        measures.sent_bytes,
    );
    out.counter("records_acknowledged_total", "Records that S2 has acknowledged.", status.records);
    out.counter(
        "record_bytes_acknowledged_total",
        "Metered bytes that S2 has acknowledged.",
        status.record_bytes,
    );
    let name = "delivery_seconds";
    out.family(
        name,
        "histogram",
        "From a change's commit in Postgres to S2's acknowledgement; the two machines' clocks are \
         compared.",
    );
    let mut total = 0;
    for (bound, count) in measures.latency.cumulative() {
        let bound = bound.map_or("+Inf".to_owned(), |us| (us as f64 / 1e6).to_string());
        out.line(&format!("{name}_bucket"), &[("le", &bound)], count as f64);
        total = count;
    }
    out.line(&format!("{name}_sum"), &[], measures.latency.sum_us() as f64 / 1e6);
    out.line(&format!("{name}_count"), &[], total as f64);
}

fn messages(out: &mut Exposition, status: &Status) {
    let measures = &status.measures;
    out.gauges("messages", "Messages in the store by their state.");
    for (state, count) in
        [("parked", status.parked), ("retrying", status.retrying), ("waiting", status.waiting)]
    {
        out.sample(&[("state", state)], count as f64);
    }
    out.gauges(
        "messages_failed",
        "Messages in the store that failed, by the class of their failure.",
    );
    for (class, count) in &measures.failed {
        out.sample(&[("class", class)], *count as f64);
    }
    out.counters("message_failures_total", "Failed attempts to deliver a message, by class.");
    for (class, count) in &measures.failures {
        out.sample(&[("class", class)], *count as f64);
    }
    out.counter(
        "message_retries_total",
        "Stored messages that were tried again.",
        measures.retries,
    );
    if let Some(dead) = &status.dead_letters {
        out.counter(
            "dead_letters_total",
            "Messages that became dead letters, of all runs.",
            dead.written,
        );
        out.gauge(
            "dead_letters_waiting",
            "Messages whose attempts are spent and which are not where dead letters go yet.",
            dead.waiting,
        );
    }
}

fn room(out: &mut Exposition, status: &Status) {
    let measures = &status.measures;
    out.gauge("spilled_changes", "Changes on disk that wait for S2.", status.spilled_changes);
    out.gauge(
        "spilled_bytes",
        "Bytes of the changes on disk that wait for S2.",
        status.spilled_bytes,
    );
    out.gauge("store_bytes", "What the message store holds.", status.store_bytes);
    out.gauge(
        "store_bytes_max",
        "What the message store may hold (state.bytes_max).",
        status.store_bytes_max,
    );
    out.gauge(
        "in_flight_bytes",
        "Changes in memory between Postgres and their settlement.",
        measures.in_flight_bytes,
    );
    out.gauge(
        "in_flight_bytes_max",
        "What may be in memory there, beside one larger change.",
        measures.in_flight_bytes_max,
    );
    if let Some(bytes) = resident_bytes() {
        out.text.push_str("# HELP process_resident_memory_bytes Resident memory size in bytes.\n");
        out.text.push_str("# TYPE process_resident_memory_bytes gauge\n");
        writeln!(out.text, "process_resident_memory_bytes {bytes}").unwrap_or_default();
    }
}

fn postgres(out: &mut Exposition, status: &Status) {
    let numbers = [
        ("wal_unconfirmed_bytes", "WAL behind what was confirmed to Postgres.", status.lag_bytes),
        ("wal_retained_bytes", "WAL that Postgres keeps for the slot.", status.wal_kept_bytes),
    ];
    for (name, help, bytes) in numbers {
        if let Some(bytes) = bytes {
            out.gauge(name, help, bytes);
        }
    }
    out.gauges("wal_kept_by", "1 for what keeps WAL in Postgres, where it is more than a segment.");
    for code in wal::CODES {
        let holds = status.wal_kept_by.as_ref().is_some_and(|keeper| keeper.code == code);
        out.sample(&[("reason", code)], f64::from(u8::from(holds)));
    }
    if let Some(seconds) = status.oldest_transaction_seconds {
        out.gauge(
            "oldest_transaction_seconds",
            "How long the transaction has been open that keeps WAL in Postgres.",
            seconds,
        );
    }
    if let Some(bytes) = status.wal_safe_bytes {
        out.gauges(
            "wal_safe_bytes",
            "WAL that may still be written before Postgres drops the slot, where that is limited.",
        );
        out.sample(&[], bytes as f64);
    }
    if let Some(found) = &status.wal_status {
        out.gauges("wal_status", "1 for what Postgres says of the slot's WAL.");
        for word in ["reserved", "extended", "unreserved", "lost"] {
            out.sample(&[("status", word)], f64::from(u8::from(word == found)));
        }
    }
}

/// Streams that transforms route messages to. Those in trouble come first, so that they have a name here.
fn streams(out: &mut Exposition, status: &Status) {
    out.gauges("streams", "Streams that transforms route messages to, by their state.");
    for state in ["open", "opening", "waiting", "shut", "idle"] {
        let count = status.streams.iter().filter(|stream| stream.state == state).count();
        out.sample(&[("state", state)], count as f64);
    }
    let mut each = |name: &str, help: &str, number: fn(&StreamView) -> u64| {
        out.gauges(name, help);
        let sample = |stream: &'_ StreamView| number(stream) as f64;
        out.named("stream", status.streams.iter().map(|one| (one.name.as_str(), sample(one))));
    };
    let queued = "Messages that are ready for a routed stream or on their way there.";
    each("stream_queued_messages", queued, |stream| stream.queued);
    let bytes = "Metered bytes that are ready for a routed stream or on their way there.";
    each("stream_queued_bytes", bytes, |stream| stream.queued_bytes);
    let parked = "Messages that are parked because of a routed stream's own trouble.";
    each("stream_parked_messages", parked, |stream| stream.parked);
}

fn chain<'a>(out: &mut Exposition, transforms: &'a Value) {
    out.gauge(
        "chain_generation",
        "The number of the chain of transforms that is live.",
        transforms["generation"].as_u64().unwrap_or_default(),
    );
    let files = transforms["transforms"].as_array().map_or(&[][..], Vec::as_slice);
    let live: Vec<&Value> = files.iter().filter(|file| file["state"] == "live").collect();
    out.gauges("transforms", "Files in the transforms folder by their state.");
    for state in ["live", "compiling", "vetting", "rejected", "rolled_back"] {
        let count = files.iter().filter(|file| file["state"] == state).count();
        out.sample(&[("state", state)], count as f64);
    }
    let mut each = |name: &str, help: &str, key: &str, unit: f64| {
        out.counters(name, help);
        let number = |file: &Value| file[key].as_u64().unwrap_or_default() as f64 / unit;
        let name = |file: &'a Value| file["file"].as_str().unwrap_or_default();
        out.named("file", live.iter().map(|file| (name(file), number(file))));
    };
    each("transform_calls_total", "Calls of a live transform.", "calls", 1.0);
    each("transform_errors_total", "Calls of a live transform that failed.", "errors", 1.0);
    each(
        "transform_dropped_total",
        "Messages that a live transform failed and its `on_error = \"drop\"` dropped.",
        "dropped",
        1.0,
    );
    each("transform_seconds_total", "What a live transform's calls took together.", "micros", 1e6);
}

/// The text as it grows.
#[derive(Debug, Default)]
struct Exposition {
    text: String,
    /// Of the metric that samples belong to.
    name: String,
}

impl Exposition {
    /// A gauge without labels.
    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.gauges(name, help);
        self.sample(&[], value as f64);
    }

    /// A counter without labels.
    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.counters(name, help);
        self.sample(&[], value as f64);
    }

    /// A gauge whose samples follow.
    fn gauges(&mut self, name: &str, help: &str) {
        self.family(name, "gauge", help);
    }

    /// A counter whose samples follow.
    fn counters(&mut self, name: &str, help: &str) {
        self.family(name, "counter", help);
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.name = name.to_owned();
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        writeln!(self.text, "# HELP sluicebox_{name} {help}\n# TYPE sluicebox_{name} {kind}")
            .unwrap_or_default();
    }

    /// A sample for each of the first names, and one for what the others come to together.
    fn named<'a>(&mut self, label: &str, samples: impl Iterator<Item = (&'a str, f64)>) {
        let mut others = None;
        for (index, (name, value)) in samples.enumerate() {
            if index < NAMED_MAX {
                self.sample(&[(label, name)], value);
            } else {
                others = Some(others.unwrap_or(0.0) + value);
            }
        }
        if let Some(sum) = others {
            self.sample(&[(label, OTHERS)], sum);
        }
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        let name = std::mem::take(&mut self.name);
        self.line(&name, labels, value);
        self.name = name;
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.text.push_str("sluicebox_");
        self.text.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            self.text.push(if index == 0 { '{' } else { ',' });
            // File names may hold anything.
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            write!(self.text, "{label}=\"{text}\"").unwrap_or_default();
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        writeln!(self.text, " {value}").unwrap_or_default();
    }
}

/// What of this process is in memory. Linux alone says it in a file.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};
    use std::time::SystemTime;

    use serde_json::json;

    use super::*;
    use crate::pipeline::control::{Reason, StuckView};

    fn stream(name: &str, state: &str, queued: u64) -> StreamView {
        StreamView {
            name: name.to_owned(),
            state: state.to_owned(),
            reason: None,
            queued,
            queued_bytes: queued * 100,
            parked: 1,
            tail: None,
        }
    }

    /// A sample's name and labels, in the order in which they stand.
    type Sample = (String, Vec<(String, String)>);

    /// Reads the format as its documentation has it, and fails on everything else.
    fn parse(text: &str) -> BTreeMap<Sample, f64> {
        let mut samples = BTreeMap::new();
        let mut family = String::new();
        let mut families = HashSet::new();
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                assert!(!help.is_empty() && families.insert(name.to_owned()), "{line}");
                family = name.to_owned();
                continue;
            }
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert_eq!(name, family, "HELP stands before TYPE");
                assert!(["gauge", "counter", "histogram"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                continue;
            }
            let (sample, value) = parse_sample(line);
            let base = sample.0.trim_end_matches("_bucket").trim_end_matches("_sum");
            assert_eq!(base.trim_end_matches("_count"), family, "{line}");
            assert!(samples.insert(sample, value).is_none(), "twice: {line}");
        }
        samples
    }

    fn parse_sample(line: &str) -> (Sample, f64) {
        let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap();
        let (name, mut rest) = line.split_at(end);
        let mut labels = Vec::new();
        if rest.starts_with('{') {
            while let Some((label, after)) = rest[1..].split_once("=\"") {
                assert!(label.chars().all(|c| c.is_ascii_lowercase()), "{line}");
                let mut text = String::new();
                let mut chars = after.char_indices();
                let end = loop {
                    match chars.next().unwrap() {
                        (_, '\\') => text.push(match chars.next().unwrap().1 {
                            'n' => '\n',
                            other => other,
                        }),
                        (at, '"') => break at,
                        (_, other) => text.push(other),
                    }
                };
                labels.push((label.to_owned(), text));
                rest = &after[end + 1..];
                if rest.starts_with('}') {
                    rest = &rest[1..];
                    break;
                }
                assert!(rest.starts_with(','), "{line}");
            }
        }
        let value = rest.strip_prefix(' ').unwrap().parse().unwrap();
        ((name.to_owned(), labels), value)
    }

    fn get(samples: &BTreeMap<Sample, f64>, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels = labels.iter().map(|(label, text)| ((*label).to_owned(), (*text).to_owned()));
        samples.get(&(format!("sluicebox_{name}"), labels.collect())).copied()
    }

    #[test]
    fn an_empty_status_is_well_formed() {
        let samples = parse(&text(&Status::default(), &Value::Null));
        assert_eq!(get(&samples, "ready", &[]), Some(0.0));
        assert_eq!(get(&samples, "wal_retained_bytes", &[]), None, "not known");
        assert_eq!(get(&samples, "delivery_seconds_bucket", &[("le", "+Inf")]), Some(0.0));
    }

    #[test]
    fn what_is_published_is_what_is_scraped() {
        let mut status = Status {
            changes: 1 << 40,
            parked: 3,
            wal_kept_bytes: Some(7),
            wal_safe_bytes: Some(-5),
            wal_status: Some("extended".to_owned()),
            reasons: ["sink_503", "sink_503"]
                .map(|code| Reason {
                    part: "sink".to_owned(),
                    code: code.to_owned(),
                    text: "never shown".to_owned(),
                })
                .into(),
            ..Status::default()
        };
        status.streams = vec![stream("tenants/7", "shut", 5), stream("tenants/8", "open", 0)];
        status.measures.failed.insert("oversize".into(), 3);
        status.measures.latency.observe(0, SystemTime::UNIX_EPOCH);
        let odd = "1\"0\\\n{}.wasm";
        let transforms = json!({"generation": 7, "transforms": [
            {"file": odd, "state": "live", "calls": 10, "errors": 2, "dropped": 1, "micros": 1_500_000},
            {"file": "2.wasm", "state": "rejected", "calls": 0, "errors": 0, "micros": 0},
        ]});
        let scraped = text(&status, &transforms);
        assert!(!scraped.contains("never shown"));
        let samples = parse(&scraped);
        let check = |name: &str, labels: &[(&str, &str)], expected: f64| {
            assert_eq!(get(&samples, name, labels), Some(expected), "{name}{labels:?}\n{scraped}");
        };
        check("changes_read_total", &[], (1_u64 << 40) as f64);
        check("messages", &[("state", "parked")], 3.0);
        check("messages_failed", &[("class", "oversize")], 3.0);
        check("wal_retained_bytes", &[], 7.0);
        check("wal_safe_bytes", &[], -5.0);
        check("wal_status", &[("status", "extended")], 1.0);
        check("wal_status", &[("status", "lost")], 0.0);
        check("reason", &[("part", "sink"), ("code", "sink_503")], 1.0);
        check("delivery_seconds_bucket", &[("le", "0.001")], 1.0);
        check("delivery_seconds_count", &[], 1.0);
        check("chain_generation", &[], 7.0);
        check("streams", &[("state", "shut")], 1.0);
        check("streams", &[("state", "idle")], 0.0);
        check("stream_queued_messages", &[("stream", "tenants/7")], 5.0);
        check("stream_queued_bytes", &[("stream", "tenants/7")], 500.0);
        check("stream_parked_messages", &[("stream", "tenants/8")], 1.0);
        check("transforms", &[("state", "rejected")], 1.0);
        check("transform_calls_total", &[("file", odd)], 10.0);
        check("transform_errors_total", &[("file", odd)], 2.0);
        check("transform_dropped_total", &[("file", odd)], 1.0);
        check("transform_seconds_total", &[("file", odd)], 1.5);
        assert_eq!(get(&samples, "transform_calls_total", &[("file", "2.wasm")]), None);
    }

    #[test]
    fn exactly_one_state_holds() {
        let reason =
            |part: &str| Reason { part: part.to_owned(), code: String::new(), text: String::new() };
        let of = |parts: &[&str], stuck: &[&str]| {
            let view = |part: &&str| StuckView { part: (*part).to_owned(), seconds: 60 };
            let status = Status {
                ready: parts.is_empty(),
                reasons: parts.iter().map(|part| reason(part)).collect(),
                stuck: stuck.iter().map(view).collect(),
                ..Status::default()
            };
            let samples = parse(&text(&status, &Value::Null));
            let holds = |state: &&str| get(&samples, "state", &[("state", state)]) == Some(1.0);
            STATES.into_iter().filter(holds).collect::<Vec<_>>()
        };
        assert_eq!(of(&[], &[]), ["delivering"]);
        assert_eq!(of(&["source", "sink"], &[]), ["sink"]);
        assert_eq!(of(&["source", "store", "sink"], &[]), ["store"]);
        assert_eq!(of(&["sink"], &["sink"]), ["stuck"]);
        assert_eq!(of(&["pipeline"], &[]), ["other"]);
    }

    #[test]
    fn many_names_share_one() {
        let file =
            |number: usize| json!({"file": format!("{number}.wasm"), "state": "live", "calls": 1});
        let files: Vec<Value> = (0..NAMED_MAX + 3).map(file).collect();
        let streams = (0..NAMED_MAX + 2).map(|number| stream(&number.to_string(), "open", 2));
        let status = Status { streams: streams.collect(), ..Status::default() };
        let samples = parse(&text(&status, &json!({"transforms": files})));
        assert_eq!(get(&samples, "transform_calls_total", &[("file", "49.wasm")]), Some(1.0));
        assert_eq!(get(&samples, "transform_calls_total", &[("file", "50.wasm")]), None);
        assert_eq!(get(&samples, "transform_calls_total", &[("file", OTHERS)]), Some(3.0));
        assert_eq!(get(&samples, "stream_queued_messages", &[("stream", OTHERS)]), Some(4.0));
        assert_eq!(get(&samples, "stream_queued_messages", &[("stream", "51")]), None);
    }
}
