use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::change::Cell;
use crate::message::{Draft, Envelope};
use crate::pg_type::Kind;

fn draft(change: &Change) -> Draft {
    Draft::new(change.clone(), Arc::new(Envelope::new(EnvelopeSettings::default())))
}

fn case(change: &Change) -> Case {
    Case::new("7".to_owned(), change, None, &EnvelopeSettings::default(), Vec::new())
}

/// Through the text of a file.
fn again(case: &Case) -> Case {
    serde_json::from_str(&serde_json::to_string(case).unwrap()).unwrap()
}

#[test]
fn a_case_gives_the_same_message() {
    for sample in built_in() {
        let back = again(&case(&sample.change)).change().unwrap();
        assert_eq!(back.position, sample.change.position, "{}", sample.name);
        assert_eq!(
            draft(&back).message_json().unwrap(),
            draft(&sample.change).message_json().unwrap(),
            "{}",
            sample.name
        );
    }
}

#[test]
fn a_value_that_is_not_utf8_survives() {
    let mut change = sized(4);
    let row = change.new.as_mut().unwrap();
    let mut data = row.data.to_vec();
    let Cell::Text { start, .. } = row.cells[2] else { panic!("a text") };
    data[start as usize] = 0xff;
    row.data = data.into();
    let back = again(&case(&change)).change().unwrap();
    assert_eq!(back.new.unwrap().text(2), change.new.unwrap().text(2));
}

#[test]
fn a_redacted_case_has_the_same_size_and_none_of_the_values() {
    for sample in built_in() {
        let redacted = again(&case(&sample.change).redact());
        let back = redacted.change().unwrap();
        let (before, after) = (draft(&sample.change), draft(&back));
        let json = after.message_json().unwrap();
        assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok(), "{}", sample.name);
        assert_eq!(after.metered_bytes(), before.metered_bytes(), "{}", sample.name);
        for word in ["Quarterly", "draft", "words", "deadbeef", "12345", "happy", "comma", "6f1c"] {
            assert!(!json.contains(word), "{word} in {json}");
        }
    }
}

#[test]
fn values_are_replaced_by_their_kind() {
    #[track_caller]
    fn check(kind: Kind, type_name: &str, text: &str, expected: &str) {
        assert_eq!(redact::value(&kind, type_name, text), expected);
    }
    let array = |element| Kind::Array { element: Box::new(element), delimiter: ',' };
    check(Kind::Bool, "bool", "t", "t");
    check(Kind::Integer, "int4", "-120", "-111");
    check(Kind::Float, "float8", "NaN", "NaN");
    check(Kind::Text, "text", "a \"b\"\n1ü€😀", "xx\"x\"\nxé€😀");
    check(Kind::Text, "numeric", "12.50", "11.11");
    check(Kind::Text, "uuid", "6f1c8b5e-2b1d", "1a1a1a1a-1a1a");
    check(Kind::Timestamptz, "timestamptz", "2026-01-01 00:00:00+00", "1111-11-11 11:11:11+00");
    check(
        Kind::Json,
        "jsonb",
        r#"{"key": ["va\"l\u00e9", 1.5, true, null]}"#,
        r#"{"key": ["xx\"x\u0078", 1.1, true, null]}"#,
    );
    check(array(Kind::Text), "_text", r#"{ab,NULL,"NULL","a\"b"}"#, r#"{xx,NULL,"xxxx","x\"x"}"#);
    check(array(Kind::Integer), "_int4", "{{1,23},{4,NULL}}", "{{1,11},{1,NULL}}");
}

/// What a message shows takes as many bytes, whatever the type, alone and nested.
#[test]
fn values_keep_their_size_in_a_message() {
    #[track_caller]
    fn check(kind: &Kind, type_name: &str, text: &str) {
        let redacted = redact::value(kind, type_name, text);
        let size = |text: &str| crate::message::value_json(kind, text).len();
        assert_eq!(size(&redacted), size(text), "{type_name}: {text} became {redacted}");
        if text.chars().any(|character| matches!(character, '2'..='9')) {
            assert_ne!(redacted, text, "{type_name}");
        }
    }
    let texts: [(Kind, &str, &[&str]); 10] = [
        (Kind::Bool, "bool", &["t", "f"]),
        (Kind::Integer, "int8", &["0", "-9223372036854775808"]),
        (Kind::Float, "float8", &["0.25", "1e+300", "-Infinity", "NaN"]),
        (Kind::Text, "text", &["", "NULL", "a \"b\\ü€😀", "(2,{}"]),
        (Kind::Text, "bytea", &["\\xdeadbeef"]),
        (Kind::Json, "jsonb", &["{\"a\": [true, null, 25, \"b\\\"c\"]}", "null", "\"\""]),
        (Kind::Timestamp, "timestamp", &["2026-02-03 04:05:06.7", "infinity", "0044-03-15 BC"]),
        (Kind::Timestamptz, "timestamptz", &["2026-02-03 04:05:06.789+00", "-infinity"]),
        (
            Kind::Interval,
            "interval",
            &[
                "00:00:00",
                "9 years",
                "-2 years -3 mons +25 days -04:05:06.789",
                "1 mon",
                "-1 days",
                "00:00:00.000025",
                "1000000:59:59",
                "-178000000 years",
                "infinity",
            ],
        ),
        (Kind::Vector, "vector", &["[2,0.5,-3e-05]"]),
    ];
    for (kind, type_name, texts) in texts {
        let array = Kind::Array { element: Box::new(kind.clone()), delimiter: ',' };
        let attributes = vec![("one".to_owned(), kind.clone()), ("two".to_owned(), kind.clone())];
        let pair = Kind::Composite { attributes };
        let pairs = Kind::Array { element: Box::new(pair.clone()), delimiter: ';' };
        for text in texts {
            check(&kind, type_name, text);
            let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
            check(&array, type_name, &format!("{{\"{escaped}\",NULL,\"{escaped}\"}}"));
            check(&array, type_name, &format!("{{{{\"{escaped}\"}},{{NULL}}}}"));
            check(&array, type_name, &format!("[0:1]={{\"{escaped}\",NULL}}"));
            let doubled = text.replace('\\', "\\\\").replace('"', "\"\"");
            let composite = format!("(\"{doubled}\",)");
            check(&pair, type_name, &composite);
            check(&pair, type_name, &format!("{composite}\"{doubled}\""));
            let escaped = composite.replace('\\', "\\\\").replace('"', "\\\"");
            check(&pairs, type_name, &format!("{{\"{escaped}\";NULL}}"));
        }
    }
}

#[test]
fn secrets_of_settings_are_replaced() {
    let text = "tables = [\"public.t\"]\n[config]\ncolumns = [\"email\"]\nhash_key = \"hunter2\"\n\
                [[config.more]]\npassword = \"swordfish\"\n";
    let redacted = redact::settings(text);
    assert!(!redacted.contains("hunter2") && !redacted.contains("swordfish"), "{redacted}");
    assert!(redacted.contains("email") && redacted.contains("public.t"), "{redacted}");
    toml::from_str::<toml::Table>(&redacted).unwrap();
}

fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        ".*".prop_map(Into::into),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
            proptest::collection::btree_map(".*", inner, 0..4)
                .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn redacted_json_is_json_of_the_same_length(value in json()) {
        let text = value.to_string();
        let redacted = redact::value(&Kind::Json, "jsonb", &text);
        prop_assert_eq!(redacted.len(), text.len());
        prop_assert!(serde_json::from_str::<serde_json::Value>(&redacted).is_ok(), "{}", redacted);
    }

    #[test]
    fn redacted_text_takes_the_same_room(text in ".*") {
        let redacted = redact::value(&Kind::Text, "text", &text);
        prop_assert_eq!(redacted.len(), text.len());
        let size = |text: &str| serde_json::to_string(text).unwrap().len();
        prop_assert_eq!(size(&redacted), size(&text));
    }

    #[test]
    fn files_never_panic(text in ".*") {
        drop(read(&text));
    }
}

#[test]
fn messages_come_out_as_they_were_written() {
    let text = r#"{"action":"update","table":"shop.orders","record":{"id":7,"total":1.50,"note":"a","tags":["x"],"paid":true,"gone":null},"changes":{"note":"b"},"metadata":{"unchanged_columns":["body"]}}"#;
    let sample = read(text).unwrap().remove(0);
    assert_eq!(sample.name, "update 1");
    assert_eq!(sample.change.table.qualified_name(), "shop.orders");
    let json = draft(&sample.change).message_json().unwrap();
    let (written, made) = (text, json);
    let part = |text: &str| text[text.find("\"record\"").unwrap()..].to_owned();
    let expected = part(written);
    let expected = &expected[..expected.find(",\"metadata\"").unwrap()];
    assert!(part(&made).starts_with(expected), "{made}\n{expected}");
    assert!(made.contains(r#""unchanged_columns":["body"]"#), "{made}");
    // And the message itself is a sample again, as is a record of the stream.
    let again = read(&made).unwrap().remove(0);
    assert_eq!(draft(&again.change).message_json().unwrap(), made);
    let record = serde_json::json!({"seq_num": 1, "timestamp": 1, "headers": [], "body": made});
    let command =
        r#"{"seq_num":0,"timestamp":1,"command":"fence","headers":[["","fence"]],"body":"t"}"#;
    let lines = read(&format!("{command}\n{record}\n{record}\n")).unwrap();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1].name, "update 3");
    assert_eq!(draft(&lines[0].change).message_json().unwrap(), made);
}

#[test]
fn what_cannot_be_read_is_said() {
    #[track_caller]
    fn check(text: &str, expected: &str) {
        let error = read(text).unwrap_err();
        let text = crate::error_chain::error_chain(&error);
        assert!(text.contains(expected), "{text}");
    }
    check("", "no message");
    check("[]", "no message");
    check("{\"a\":", "not JSON after 0 messages");
    check("{\"a\": 1}", "message 1 is neither a case");
    check(r#"{"action":"insert","recrod":{}}"#, "recrod");
    check(r#"{"action":"insert","record":{}}"#, "does not say its table");
    check(r#"{"action":"insert","table":"t","key":["x"],"record":{}}"#, "names `x`");
    check(
        r#"{"action":"insert","table":"t","types":{"a":"_text"},"record":{"a":["x"]}}"#,
        "write its value as Postgres does",
    );
    let newer = serde_json::to_value(case(&sized(1))).unwrap();
    let mut newer = newer;
    newer["sluicebox_case"] = 2.into();
    check(&newer.to_string(), "version 2");
    newer["sluicebox_case"] = 1.into();
    newer["change"]["new"]["meta"] = "{broken".into();
    check(&newer.to_string(), "is not JSON");
    newer["change"]["new"]["other"] = "1".into();
    check(&newer.to_string(), "`other`");
}
