//! What a call does to its message, and what a guest's failure does to it.

use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::json;

use super::*;
use crate::sink::record::RECORD_BYTES_MAX;

/// Runs the chaos guest once on a message with this body.
fn act(act: &str, number: u64, body: &str) -> Outcome {
    runner().run(&acting(act, number, ""), draft(body))
}

fn check_failure(outcome: Outcome, class: Class, text: &str) -> Failure {
    let failure = failed(outcome);
    assert_eq!((failure.class, failure.text.as_str()), (class, text));
    assert_eq!(failure.transform, "10-chaos.wasm");
    assert_eq!(failure.trace.last().unwrap().verdict, class.as_str());
    assert!(!failure.halt);
    failure
}

#[test]
fn an_empty_chain_leaves_the_message_alone() {
    let mut runner = runner();
    let kept = kept(runner.run(&chain(Vec::new()), draft("text")));
    assert_eq!(message(&kept), message(&draft("text")));
    assert!(runner.trace().is_empty());
}

#[test]
fn strip_columns_takes_columns_out() {
    let chain = chain(vec![
        transform("10-a.wasm", strip(), "[config]\ncolumns = [\"body\", \"missing\"]"),
        transform("20-b.wasm", strip(), "[config]\ncolumns = [\"tags\"]"),
    ]);
    let mut runner = runner();
    let message = message(&kept(runner.run(&chain, draft(&"x".repeat(3_000_000)))));
    assert_eq!(message["record"], json!({"id": 1, "title": "a title"}));
    assert_eq!(message["changes"], json!({"title": "old title"}));
    assert_eq!(message["metadata"]["stripped_columns"], json!(["body", "tags"]));
    let trace = runner.trace();
    assert_eq!(trace.len(), 2);
    assert_eq!((trace[0].transform.as_str(), trace[0].verdict.as_str()), ("10-a.wasm", "keep"));
    assert_eq!(trace[0].digest, loader::digest(strip()));
}

#[test]
fn only_oversize_messages_are_stripped_where_settings_say_so() {
    let settings = "[config]\ncolumns = [\"body\"]\nonly_oversize = true";
    let chain = chain(vec![transform("10-a.wasm", strip(), settings)]);
    let mut runner = runner();
    let small = message(&kept(runner.run(&chain, draft("small"))));
    assert_eq!(small["record"]["body"], "small");
    let large = message(&kept(runner.run(&chain, draft(&"x".repeat(2_000_000)))));
    assert_eq!(large["record"]["body"], json!(null));
    assert_eq!(large["metadata"]["stripped_columns"], json!(["body"]));
    assert!(runner.trace()[0].bytes.unwrap() > 2_000_000);
}

#[test]
fn compressed_columns_can_be_undone_from_the_metadata() {
    let body = "It was a \"dark\" and stormy night; ä€😀\n".repeat(100_000);
    let tags = json!({"a": [1, 2]});
    for codec in ["zstd", "gzip"] {
        let settings =
            format!("[config]\ncolumns = [\"body\", \"tags\"]\ncodec = \"{codec}\"\nmin_bytes = 1");
        let chain = chain(vec![
            transform("10-a.wasm", compress(), &settings),
            // Once more does not compress again.
            transform("20-b.wasm", compress(), &settings),
        ]);
        let draft = kept(runner().run(&chain, draft(&body)));
        assert!(draft.metered_bytes().unwrap() < RECORD_BYTES_MAX);
        let message = message(&draft);
        let undo = |column: &str| {
            let how = &message["metadata"]["compressed_columns"][column];
            assert_eq!((&how["codec"], &how["encoding"]), (&json!(codec), &json!("base64")));
            let packed = base64::engine::general_purpose::STANDARD
                .decode(message["record"][column].as_str().unwrap())
                .unwrap();
            let mut text = String::new();
            match codec {
                "zstd" => {
                    _ = std::io::Read::read_to_string(
                        &mut zstd::stream::read::Decoder::new(&*packed).unwrap(),
                        &mut text,
                    )
                    .unwrap()
                }
                _ => {
                    _ = std::io::Read::read_to_string(
                        &mut flate2::read::GzDecoder::new(&*packed),
                        &mut text,
                    )
                    .unwrap()
                }
            }
            assert_eq!(how["bytes"], json!(text.len()));
            match how["content"].as_str().unwrap() {
                "text" => json!(text),
                "json" => serde_json::from_str(&text).unwrap(),
                other => panic!("{other}"),
            }
        };
        assert_eq!(undo("body"), json!(body));
        assert_eq!(undo("tags"), tags);
        assert_eq!(message["changes"], json!({"title": "old title"}));
    }
}

#[test]
fn small_values_are_not_compressed() {
    let settings = "[config]\ncolumns = [\"body\", \"title\", \"missing\"]\nmin_bytes = 100";
    let chain = chain(vec![transform("10-a.wasm", compress(), settings)]);
    let message = message(&kept(runner().run(&chain, draft("small"))));
    assert_eq!(message["record"]["body"], "small");
    assert_eq!(message["metadata"]["compressed_columns"], json!(null));
}

#[test]
fn wrong_settings_are_refused_at_the_start() {
    let check = |bytes, config: &str, expected: &str| {
        let transform = transform("10-a.wasm", bytes, &format!("[config]\n{config}"));
        let fault =
            crate::transform::instance::Instance::new(engine(), &transform, false).unwrap_err();
        assert_eq!(fault.reason, expected, "{config}");
    };
    check(
        strip(),
        "column = [\"a\"]",
        "refused its settings: `config`: unknown field `column`, expected `columns` or \
         `only_oversize` at line 1 column 9",
    );
    check(
        strip(),
        "",
        "refused its settings: `config`: missing field `columns` at line 1 column 2",
    );
    check(
        strip(),
        "columns = []",
        "refused its settings: `config.columns` is empty: name at least one column",
    );
    check(
        compress(),
        "columns = [\"a\"]\ncodec = \"gzip\"\nlevel = 12",
        "refused its settings: `config.level` is over 9, the codec's highest",
    );
    check(chaos(), "act = \"init-error\"", "refused its settings: `config.act` asks for an error");
}

#[test]
fn a_panic_in_init_is_told_with_its_text() {
    let transform = transform("10-a.wasm", chaos(), "[config]\nact = \"init-panic\"");
    let fault = crate::transform::instance::Instance::new(engine(), &transform, false).unwrap_err();
    assert_eq!(fault.class, Class::Trap);
    assert!(fault.reason.contains("init panics"), "{}", fault.reason);
    assert!(fault.reason.ends_with("(while it was starting)"), "{}", fault.reason);
}

/// An instance that starts in the middle of the traffic, and does not.
#[test]
fn what_an_instance_logs_before_it_fails_to_start_is_kept() {
    for (act, class, line) in [
        ("init-log", Class::Guest, "info: about to refuse"),
        ("init-panic", Class::Trap, "error: "),
    ] {
        let failure = failed(self::act(act, 0, "text"));
        assert_eq!((failure.class, failure.trace.len()), (class, 1), "{}", failure.text);
        let step = &failure.trace[0];
        assert_eq!(step.verdict, class.as_str());
        assert!(step.logs.iter().any(|known| known.starts_with(line)), "{act}: {:?}", step.logs);
    }
}

#[test]
fn the_guest_sees_the_change() {
    let columns = message(&kept(act("columns", 0, "text")));
    assert_eq!(
        columns["metadata"]["columns"],
        "id:int4:true:false:1 title:text:false:false:9 body:text:false:false:6 \
         tags:jsonb:false:false:13"
    );
    let seen = message(&kept(act("read", 0, "text")));
    assert_eq!(
        seen["metadata"]["seen"],
        "Some(\"\\\"a title\\\"\") Some(\"a title\") Some(\"\\\"old title\\\"\") None 4711 3 \
         1749604762402358"
    );
}

#[test]
fn edits_reach_the_message() {
    assert_eq!(message(&kept(act("set", 0, "text")))["record"]["body"], json!({"masked": true}));
    let renamed = message(&kept(act("rename", 0, "text")));
    assert_eq!(renamed["record"]["headline"], "a title");
    assert_eq!(renamed["changes"]["headline"], "old title");
    let replaced = message(&kept(act("replace", 0, "text")));
    assert_eq!(replaced["wrapped"], message(&draft("text")));
    assert!(several(act("drop", 0, "text")).is_empty());
    let appended = message(&kept(act("append", 0, "text")));
    assert_eq!(appended["metadata"]["list"], json!([1, {"a": 2}]));
}

#[test]
fn hashes_are_those_of_the_text_and_hide_the_old_value() {
    let hashed = message(&kept(act("hash", 0, "text")));
    // printf 'a title' | sha256sum
    assert_eq!(
        hashed["record"]["title"],
        "aa4e9c1087d9d9298aa6a76e394f72ff8d99fb84f6b85cae68c5960ec7ea9354"
    );
    assert_eq!(hashed["changes"]["title"], json!(null));
}

#[test]
fn strings_are_cut_between_characters() {
    let cut = message(&kept(act("truncate", 4, "aä€x")));
    assert_eq!(cut["record"]["body"], "aä");
    assert_eq!(cut["metadata"]["truncated_columns"], json!({"body": 7}));
    let whole = message(&kept(act("truncate", 7, "aä€x")));
    assert_eq!(whole["record"]["body"], "aä€x");
    check_failure(
        act("truncate-id", 1, "text"),
        Class::Guest,
        "`10-chaos.wasm` failed the message: column `id` is not a string, and only strings can be \
         truncated",
    );
}

#[test]
fn a_trap_costs_one_message_and_says_where() {
    let chain = acting("trap", 0, "");
    let mut runner = runner();
    let failure = failed(runner.run(&chain, draft("text")));
    assert_eq!(failure.class, Class::Trap);
    assert!(
        failure.text.starts_with(
            "`10-chaos.wasm` trapped: wasm `unreachable` instruction executed; its last log line: \
             error: panicked at"
        ),
        "{}",
        failure.text
    );
    assert!(failure.text.ends_with("nothing is 0"), "{}", failure.text);
    let step = &failure.trace[0];
    assert_eq!(step.logs[0], "info: about to trap");
    assert!(
        step.backtrace.iter().any(|frame| frame.contains("sluicebox_chaos::inner")),
        "{:?}",
        step.backtrace
    );
    assert!(step.backtrace.iter().any(|frame| frame.contains("sluicebox_chaos::outer")));
    assert_eq!(chain.transforms()[0].counters.errors(), 1);
}

#[test]
fn after_a_failure_the_next_message_gets_a_fresh_instance() {
    let settings = "[config]\nact = \"count\"";
    let counting = chain(vec![transform("10-count.wasm", chaos(), settings)]);
    let mut runner = runner();
    let mut calls = |name: &str| {
        let draft = Draft::new(change_of(name, "text"), envelope());
        message(&kept(runner.run(&counting, draft)))["metadata"]["calls"].clone()
    };
    assert_eq!(calls("a"), 1);
    assert_eq!(calls("a"), 2);

    for (how, class) in [
        ("guest", Class::Guest),
        ("trap", Class::Trap),
        ("invalid", Class::Invalid),
        ("timeout", Class::Timeout),
        ("memory", Class::Limit),
        ("depth", Class::Limit),
        ("call", Class::Limit),
    ] {
        let settings = format!(
            "[limits]\ntime_ms = 1000\n[config]\nact = \"count-until-bad\"\ntext = \"{how}\""
        );
        let chain = chain(vec![transform("10-count.wasm", chaos(), &settings)]);
        let mut runner = self::runner();
        let mut run = |name: &str| runner.run(&chain, Draft::new(change_of(name, "x"), envelope()));
        let calls = |outcome| message(&kept(outcome))["metadata"]["calls"].clone();
        assert_eq!([calls(run("a")), calls(run("a"))], [1, 2], "{how}");
        let failure = failed(run("bad"));
        assert_eq!(failure.class, class, "{how}: {}", failure.text);
        assert_eq!([calls(run("a")), calls(run("a"))], [1, 2], "{how}: a fresh instance");
    }

    let trapping = acting("trap", 0, "");
    let mut runner = self::runner();
    for _ in 0..3 {
        assert_eq!(failed(runner.run(&trapping, draft("text"))).class, Class::Trap);
    }
    assert_eq!(trapping.transforms()[0].counters.calls(), 3);
    assert_eq!(trapping.transforms()[0].counters.errors(), 3);
}

#[test]
fn instances_are_kept_over_a_change_of_the_chain() {
    let counting = transform("10-count.wasm", chaos(), "[config]\nact = \"count\"");
    let stripping = transform("20-strip.wasm", strip(), "[config]\ncolumns = [\"body\"]");
    let mut runner = runner();
    runner.run(&chain(vec![counting.clone()]), draft("text"));
    let longer = chain(vec![counting, stripping]);
    let message = message(&kept(runner.run(&longer, draft("text"))));
    assert_eq!(message["metadata"]["calls"], 2);
    assert_eq!(message["record"]["body"], json!(null));
}

#[test]
fn a_loop_is_stopped() {
    let chain = acting("loop", 1, "[limits]\ntime_ms = 50");
    let started = Instant::now();
    check_failure(
        runner().run(&chain, draft("text")),
        Class::Timeout,
        "`10-chaos.wasm` ran for more than 50 ms (`limits.time_ms`)",
    );
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(started.elapsed() >= Duration::from_millis(50));
}

#[test]
fn memory_depth_and_data_are_limited() {
    let chain = acting("allocate", 0, "[limits]\nmemory_mib = 16");
    let failure = failed(runner().run(&chain, draft("text")));
    assert_eq!(failure.class, Class::Limit);
    assert!(failure.text.contains("reached a limit: it asked for 1"), "{}", failure.text);
    assert!(
        failure.text.ends_with(
            "MiB of memory, and its limit is 16 MiB \
             (`limits.memory_mib`)"
        ),
        "{}",
        failure.text
    );
    check_failure(
        act("recurse", 0, "text"),
        Class::Limit,
        "`10-chaos.wasm` reached a limit: its calls went too deep",
    );
    for endless in ["host-allocate", "host-edits"] {
        check_failure(
            runner().run(&acting(endless, 0, "[limits]\ntime_ms = 20000"), draft("text")),
            Class::Limit,
            "`10-chaos.wasm` reached a limit: its edits of one message hold more than 64 MiB \
             (`limits.edits_mib`)",
        );
    }
    check_failure(
        act("large-call", 0, "text"),
        Class::Limit,
        "`10-chaos.wasm` reached a limit: it passed more than 16 MiB in a call \
         (`limits.call_mib`)",
    );
}

#[test]
fn what_breaks_the_rules_fails_the_message() {
    let check = |name, number, class, expected: &str| {
        let failure = failed(act(name, number, "text"));
        assert_eq!(
            (failure.class, failure.text.as_str()),
            (class, format!("`10-chaos.wasm` {expected}").as_str()),
            "{name}"
        );
    };
    use Class::{Guest, Invalid};
    check("error", 0, Guest, "failed the message: this row is not to my taste");
    check(
        "set-not-json",
        0,
        Guest,
        "failed the message: what was given for `body` is not JSON: key must be a string at line 1 \
         column 2",
    );
    check(
        "replace-not-json",
        0,
        Guest,
        "failed the message: what was given for `the whole message` is not JSON: expected ident at \
         line 1 column 2",
    );
    check(
        "headers",
        1001,
        Guest,
        "failed the message: the record has 1000 headers from transforms already",
    );
    check(
        "reserved-header",
        0,
        Guest,
        "failed the message: the header `sb-key` starts with `sb-`, which is kept for Sluicebox's \
         own headers",
    );
    check(
        "empty-header",
        0,
        Guest,
        "failed the message: a header's name must not be empty: S2 takes such a record for a \
         command",
    );
    check(
        "reserved-metadata",
        0,
        Guest,
        "failed the message: `metadata.table_name` is Sluicebox's own; choose another key",
    );
    check(
        "append-two",
        0,
        Guest,
        "failed the message: what was given for `list` is not JSON: trailing characters at line 1 \
         column 2",
    );
    check(
        "append-to-object",
        0,
        Guest,
        "failed the message: `metadata.list` is not a list, so that nothing can be appended to it",
    );
    check("split", 0, Invalid, "split a message into nothing; `drop` is the verdict for that");
    check("split", 10_000, Invalid, "split a message into 10000 records, and 1000 are allowed");
    check(
        "split-not-json",
        0,
        Invalid,
        "split a message into records of which number 1 is not JSON: EOF while parsing an object \
         at line 1 column 1",
    );
    check("parts", 100, Invalid, "asked for parts of 100 bytes, and they must have 1024");

    for (name, part) in
        [("not-utf8", "utf-8"), ("use-handle-twice", "handle"), ("unknown-handle", "handle")]
    {
        let failure = failed(act(name, 0, "text"));
        assert_eq!(failure.class, Invalid, "{name}: {}", failure.text);
        assert!(
            failure.text.starts_with("`10-chaos.wasm` broke the interface's rules: ")
                && failure.text.contains(part),
            "{}",
            failure.text
        );
        assert!(!failure.trace[0].backtrace.is_empty(), "{name}");
    }
}

#[test]
fn messages_are_split_into_records_and_parts() {
    let records = several(act("split", 3, "text"));
    let bodies: Vec<Value> = records.iter().map(message).collect();
    assert_eq!(bodies, [json!(0), json!(1), json!(2)]);
    assert_eq!(records.iter().map(Draft::part).collect::<Vec<_>>(), [(0, 3), (1, 3), (2, 3)]);

    let body = "ä€😀 ".repeat(400_000);
    let parts = several(act("parts", 0, &body));
    assert!(parts.len() > 3);
    let mut joined = Vec::new();
    for part in parts {
        let record = part.into_record().unwrap();
        assert!(record.metered_bytes() <= RECORD_BYTES_MAX);
        assert!(std::str::from_utf8(&record.body).is_ok());
        joined.extend_from_slice(&record.body);
    }
    assert_eq!(joined, draft(&body).message_json().unwrap().as_bytes());

    // What fits stays whole.
    assert_eq!(kept(act("parts", 0, "text")).part(), (0, 1));
}

#[test]
fn later_transforms_see_each_part() {
    let split = transform("10-split.wasm", chaos(), "[config]\nact = \"split\"\nnumber = 2");
    let header = transform("20-header.wasm", chaos(), "[config]\nact = \"headers\"\nnumber = 1");
    let records = several(runner().run(&chain(vec![split.clone(), header]), draft("text")));
    assert_eq!(records.len(), 2);
    for record in records {
        let record = record.into_record().unwrap();
        assert!(record.headers.iter().any(|header| header.name == b"h0"));
    }

    // A mask behind a split must not be silently without effect.
    let mask = transform("20-mask.wasm", chaos(), "[config]\nact = \"remove\"");
    let failure = failed(runner().run(&chain(vec![split.clone(), mask]), draft("text")));
    assert_eq!((failure.class, failure.transform.as_str()), (Class::Guest, "20-mask.wasm"));

    let again = transform("20-again.wasm", chaos(), "[config]\nact = \"split\"\nnumber = 2");
    let failure = failed(runner().run(&chain(vec![split.clone(), again]), draft("text")));
    assert_eq!((failure.class, failure.transform.as_str()), (Class::Invalid, "20-again.wasm"));

    let drop = transform("20-drop.wasm", chaos(), "[config]\nact = \"drop\"");
    let failure = failed(runner().run(&chain(vec![split, drop]), draft("text")));
    assert_eq!((failure.class, failure.transform.as_str()), (Class::Invalid, "20-drop.wasm"));
}

#[test]
fn settings_decide_what_an_error_means() {
    let with = |on_error: &str| acting("edit-then-trap", 0, &format!("on_error = \"{on_error}\""));
    assert!(!failed(runner().run(&with("park"), draft("text"))).halt);
    assert!(failed(runner().run(&with("halt"), draft("text"))).halt);
    assert!(several(runner().run(&with("drop"), draft("text"))).is_empty());

    let dropping = with("drop");
    let mut runner = runner();
    for dropped in 1..=3 {
        assert!(several(runner.run(&dropping, draft("text"))).is_empty());
        let counters = &dropping.transforms()[0].counters;
        assert_eq!((counters.errors(), counters.drops()), (dropped, dropped));
    }
    // What is only tried is not counted.
    let mut quiet = Runner::quiet(Arc::clone(engine()));
    assert!(several(quiet.run(&dropping, draft("text"))).is_empty());
    assert_eq!(dropping.transforms()[0].counters.drops(), 3);

    let passed = kept(runner.run(&with("pass"), draft("text")));
    // The edit before the trap is undone.
    assert_eq!(message(&passed), message(&draft("text")));
    let record = passed.into_record().unwrap();
    let header = record.headers.iter().find(|header| header.name == b"sb-passed").unwrap();
    assert_eq!(header.value, b"10-chaos.wasm");
    assert_eq!(runner.trace()[0].verdict, "trap");
}

#[test]
fn settings_choose_tables_and_actions() {
    let drop = |more: &str| acting("drop", 0, more);
    let run = |chain: &Arc<Chain>| several(runner().run(chain, draft("text"))).len();
    assert_eq!(run(&drop("tables = [\"public.documents\"]")), 0);
    assert_eq!(run(&drop("tables = [\"public.others\"]")), 1);
    assert_eq!(run(&drop("actions = [\"insert\"]")), 1);
    assert_eq!(run(&drop("actions = [\"insert\", \"update\"]")), 0);
}
