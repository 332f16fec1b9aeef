//! Guests that do not keep to the interface: each costs one message, with a reason that names the
//! file and the rule.

use serde_json::json;

use super::*;
use crate::message::RecordError;

fn act(act: &str, number: u64, text: &str) -> Outcome {
    let settings = format!("text = {}", toml::Value::from(text));
    let settings = format!("[config]\nact = \"{act}\"\nnumber = {number}\n{settings}\n");
    let chain = chain(vec![transform("10-chaos.wasm", chaos(), &settings)]);
    runner().run(&chain, draft("text"))
}

#[track_caller]
fn check(outcome: Outcome, class: Class, expected: &str) {
    let failure = failed(outcome);
    let text = format!("`10-chaos.wasm` {expected}");
    assert_eq!((failure.class, failure.text), (class, text));
    assert_eq!(failure.transform, "10-chaos.wasm");
    assert_eq!(failure.trace.last().unwrap().verdict, class.as_str());
}

#[test]
fn a_refused_stream_fails_the_message() {
    let rules = [
        ("", "a stream's name must not be empty"),
        (".", "a stream must not be named `.` or `..`"),
        ("..", "a stream must not be named `.` or `..`"),
        ("a\u{0}b", "a stream's name must not have control characters"),
        (&*"ä".repeat(257), "a stream's name has at most 512 bytes, and this one has 514"),
    ];
    for (name, rule) in rules {
        // As the module's own error, and where the module goes on as if nothing were.
        check(act("route", 0, name), Class::Guest, &format!("failed the message: {rule}"));
        check(
            act("overlook-route", 0, name),
            Class::Invalid,
            &format!("broke the interface's rules and went on: {rule}"),
        );
    }
}

#[test]
fn a_refusal_that_is_overlooked_fails_the_message() {
    let check = |name: &str, number, rule: &str| {
        check(
            act(name, number, ""),
            Class::Invalid,
            &format!("broke the interface's rules and went on: {rule}"),
        );
    };
    let not_json = "what was given for `body` is not JSON: key must be a string at line 1 column 2";
    check("overlook-set", 0, not_json);
    check("overlook-set-old", 0, not_json);
    check("overlook-and-drop", 0, not_json);
    check("overlook-empty-column", 0, "a column's name must not be empty");
    check("overlook-rename", 0, "a column's name must not be empty");
    check("overlook-annotate", 0, "`metadata.table_name` is Sluicebox's own; choose another key");
    check(
        "overlook-append",
        0,
        "what was given for `list` is not JSON: trailing characters at line 1 column 2",
    );
    check(
        "overlook-header",
        0,
        "a header's name must not be empty: S2 takes such a record for a command",
    );
    check("overlook-headers", 5000, "the record has 1000 headers from transforms already");
    check(
        "overlook-message",
        0,
        "what was given for `the whole message` is not JSON: EOF while parsing an object at line 1 \
         column 1",
    );
    check(
        "overlook-replaced",
        0,
        "the whole message was replaced, so that its columns cannot be changed any more",
    );
}

#[test]
fn what_was_made_good_or_depends_on_the_row_does_not() {
    let good = kept(act("make-good", 0, ""));
    assert_eq!(message(&good)["record"]["body"], "masked");
    assert_eq!(good.stream(), None);
    assert!(kept(act("overlook-missing", 0, "")).stream().is_none());
}

#[test]
fn a_body_over_the_limit_is_measured_and_put_down_to_its_maker() {
    let oversize = |draft: &Draft| match draft.record() {
        Err(RecordError::Oversize { bytes }) => bytes > 2_000_000,
        other => panic!("{other:?}"),
    };
    let replaced = kept(act("replace-large", 2_000_000, ""));
    assert!(oversize(&replaced));
    assert_eq!(replaced.replaced_by(), Some("10-chaos.wasm"));
    let parts = several(act("split-large", 2_000_000, ""));
    assert!(oversize(&parts[0]));
    assert_eq!(parts[0].replaced_by(), Some("10-chaos.wasm"));
    check(
        act("replace-large", 20_000_000, ""),
        Class::Limit,
        "reached a limit: it passed more than 16 MiB in a call (`limits.call_mib`)",
    );
}

#[test]
fn a_route_goes_with_every_verdict_and_later_transforms_see_it() {
    let routed = kept(act("route", 0, "orders/eu"));
    assert_eq!(routed.stream().map(|stream| &**stream), Some("orders/eu"));
    for part in several(act("route-and-split", 0, "orders")) {
        assert_eq!(part.stream().map(|stream| &**stream), Some("orders"));
    }

    let step = |file, act: &str, text: &str| {
        transform(file, chaos(), &format!("[config]\nact = \"{act}\"\ntext = \"{text}\""))
    };
    let see = || step("20-see.wasm", "routed-to", "");
    let seen = kept(runner().run(&chain(vec![step("10-a.wasm", "route", "a"), see()]), draft("")));
    assert_eq!(message(&seen)["metadata"]["stream"], "a");
    let back = vec![step("10-a.wasm", "route", "a"), step("15-b.wasm", "route-back", ""), see()];
    let back = kept(runner().run(&chain(back), draft("")));
    assert_eq!(message(&back)["metadata"]["stream"], "");
    assert_eq!(back.stream(), None);
}

#[test]
fn the_parts_of_a_message_go_to_one_stream() {
    let split = transform("10-split.wasm", chaos(), "[config]\nact = \"split\"\nnumber = 2");
    let by_part = transform("20-part.wasm", chaos(), "[config]\nact = \"route-by-part\"");
    let failure = failed(runner().run(&chain(vec![split, by_part]), draft("")));
    assert_eq!(
        (failure.class, failure.text.as_str()),
        (
            Class::Invalid,
            "`20-part.wasm` sent the parts of a message that an earlier transform had split to \
             different streams"
        )
    );
}

#[test]
fn whether_the_message_was_replaced_can_be_asked() {
    let json = |act: &str| format!("[config]\nact = \"{act}\"");
    let chain = chain(vec![
        transform("10-a.wasm", chaos(), &json("replace")),
        transform("20-b.wasm", chaos(), &json("fail-unless-replaced")),
    ]);
    assert_eq!(message(&kept(runner().run(&chain, draft(""))))["wrapped"]["action"], "update");
    let names = kept(act("column-names", 0, ""));
    assert_eq!(message(&names)["metadata"]["names"], json!(["id", "title", "body", "tags"]));
}
