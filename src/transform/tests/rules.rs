//! Guests that do not keep to the interface: each costs one message, with a reason that names the
//! file and the rule.

use serde_json::json;

use super::*;
use crate::pipeline::{item, workers};

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

/// What an operator reads of a message that transforms made, or left, too large.
fn oversize(chain: &Arc<Chain>, body: &str) -> crate::store::Failure {
    let mut runner = runner();
    let outcome = runner.run(chain, draft(body));
    match workers::measured(outcome, || runner.trace()) {
        item::Shaped::Failed(failure) => {
            assert_eq!(failure.error.class, "oversize", "{}", failure.error.text);
            *failure
        }
        other @ (item::Shaped::Records(_) | item::Shaped::Dropped | item::Shaped::Halt(_)) => {
            panic!("{other:?}")
        }
    }
}

#[test]
fn who_makes_a_record_too_large_is_named_with_the_piece_the_size_and_the_limit() {
    let check = |form: &str, body: &str, largest: &str| {
        let settings = format!("[config]\nact = \"enlarge\"\nnumber = 2000000\ntext = \"{form}\"");
        let chain = chain(vec![
            transform("10-chaos.wasm", chaos(), &settings),
            transform("20-keep.wasm", chaos(), "[config]\nact = \"keep\""),
        ]);
        let failure = oversize(&chain, body);
        let text = &failure.error.text;
        let bytes = failure.bytes.unwrap();
        let expected = format!(
            "a record of public.documents has {bytes} bytes, and S2 takes 1048576; largest in it: \
             {largest}"
        );
        assert!(text.starts_with(&expected), "{form}: {text}\n{expected}");
        assert_eq!(failure.error.transform.as_deref(), Some("10-chaos.wasm"), "{form}");
        let hint = crate::policy::hint("7", Some(&failure));
        assert!(hint.contains("replace 10-chaos.wasm in the transforms folder"), "{form}: {hint}");
    };
    let by = "bytes, made by `10-chaos.wasm`)";
    check("set", "text", &format!("column `body` (2000000 {by}"));
    check("set-text", "text", &format!("column `note` (2000006 {by}"));
    check("set-old", "text", &format!("`changes.body` (2000000 {by}"));
    check("renamed", "text", &format!("column `text` (2000004 {by}"));
    check("name", "text", &format!("column `{}…` (2000001 {by}", "x".repeat(100)));
    check("annotate", "text", &format!("`metadata.note` (2000004 {by}"));
    check("append", "text", &format!("`metadata.list` (2000006 {by}"));
    check("header", "text", &format!("header `trail` (2000007 {by}"));
    check("headers", "text", &format!("1000 headers (2005890 {by}"));
    check("message", "text", &format!("its body (2000000 {by}"));
    check("split", "text", &format!("its body (2000000 {by}"));
    check("parts", &"x".repeat(3_000_000), &format!("its body (2000000 {by}"));
    // What does not compress grows by base64.
    let mut random = 1_u64;
    let incompressible: String = std::iter::repeat_with(|| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        char::from(b' ' + u8::try_from(random >> 57).unwrap() % 95)
    })
    .filter(|character| !matches!(character, '"' | '\\'))
    .take(1_000_000)
    .collect();
    check("compress", &incompressible, "column `body` (1");
}

#[test]
fn a_row_that_was_too_large_before_is_put_down_to_nobody() {
    let chain = chain(vec![
        transform("10-chaos.wasm", chaos(), "[config]\nact = \"rename\""),
        transform("20-a.wasm", chaos(), "[config]\nact = \"append\""),
    ]);
    let failure = oversize(&chain, &"x".repeat(2_000_000));
    let text = &failure.error.text;
    assert!(text.contains("largest in it: column `body` (2000002 bytes), "), "{text}");
    assert_eq!(failure.error.transform, None);
    let hint = crate::policy::hint("7", Some(&failure));
    assert!(hint.contains("strip-columns --column body"), "{hint}");
}

#[test]
fn a_message_that_is_too_large_to_hand_over_ends_at_the_limit_of_a_call() {
    check(
        act("replace-large", 20_000_000, ""),
        Class::Limit,
        "reached a limit: it passed more than 16 MiB in a call (`limits.call_mib`)",
    );
}

#[test]
fn more_parts_than_are_allowed_fail_the_message() {
    let parts = |bytes_max: u64, body: usize| {
        let chain = acting("parts", bytes_max, "");
        failed(runner().run(&chain, draft(&"x".repeat(body))))
    };
    let failure = parts(1024, 1024 * 1024);
    assert_eq!(
        (failure.class, failure.text.as_str()),
        (
            Class::Invalid,
            "`10-chaos.wasm` asked for parts of 1024 bytes, which would be 1025 records, and 1000 are \
             allowed"
        )
    );
    let failure = parts(0, 129 << 20);
    assert_eq!(failure.class, Class::Limit);
    assert!(
        failure.text.starts_with("`10-chaos.wasm` asked for parts of a message of 13526")
            && failure
                .text
                .ends_with("bytes, and 134217728 are cut at most; make it smaller first"),
        "{}",
        failure.text
    );
}

#[test]
fn metadata_without_a_key_fails_the_message() {
    let rule = "a key of the metadata must not be empty";
    let failure = failed(act("empty-key", 0, ""));
    assert_eq!(failure.class, Class::Guest);
    assert!(failure.text.starts_with("`10-chaos.wasm` failed the message: "), "{}", failure.text);
    assert!(failure.text.contains("empty"), "{} is not {rule}", failure.text);
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
