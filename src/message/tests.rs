use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::change::{Action, Cell, Change, Column, Grouping, Lsn, Position, Table, Tuple};
use crate::pg_type::Kind;
use crate::sink::record::{RECORD_BYTES_MAX, Record};

fn envelope() -> Arc<Envelope> {
    Arc::new(Envelope::new(EnvelopeSettings {
        pipeline_id: "p-1".to_owned(),
        pipeline_name: "shop \"main\"".to_owned(),
        database_name: "shop".to_owned(),
        hostname: "db.example".to_owned(),
        chain: "7:0123456789abcdef".to_owned(),
        unguarded: false,
    }))
}

/// `id int4` (the key), `body text`, `price numeric`, `tags jsonb`.
fn table() -> Arc<Table> {
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
        name: "documents".to_owned(),
        columns: vec![
            column("id", "int4", Kind::Integer, true),
            column("body", "text", Kind::Text, false),
            column("price", "numeric", Kind::Text, false),
            column("tags", "jsonb", Kind::Json, false),
        ],
        grouping: Grouping::Key,
    })
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum In<'a> {
    Null,
    Unchanged,
    Absent,
    Text(&'a str),
}
use In::{Absent, Null, Text, Unchanged};

fn tuple(cells: &[In<'_>]) -> Tuple {
    let mut data = b"before".to_vec();
    let mut cell = |input: &In<'_>| match input {
        Null => Cell::Null,
        Unchanged => Cell::Unchanged,
        Absent => Cell::Absent,
        Text(text) => {
            let start = u32::try_from(data.len()).unwrap();
            data.extend_from_slice(text.as_bytes());
            Cell::Text { start, end: u32::try_from(data.len()).unwrap() }
        }
    };
    let cells = cells.iter().map(&mut cell).collect();
    Tuple { data: Bytes::from(data), cells }
}

fn change(action: Action, new: Option<&[In<'_>]>, old: Option<&[In<'_>]>) -> Change {
    Change {
        position: Position { commit_lsn: Lsn(73_220_408), index: 0 },
        commit_timestamp_us: 1_749_604_762_402_358,
        action,
        table: table(),
        new: new.map(tuple),
        old: old.map(tuple),
    }
}

fn draft(action: Action, new: Option<&[In<'_>]>, old: Option<&[In<'_>]>) -> Draft {
    Draft::new(change(action, new, old), envelope())
}

const ROW: [In<'_>; 4] = [Text("1"), Text("say \"hi\""), Text("5.99"), Text(r#"{"b":1, "a":2}"#)];

fn inserted() -> Draft {
    draft(Action::Insert, Some(&ROW), None)
}

/// An update of the body in a table with identity FULL.
fn updated() -> Draft {
    let old = [Text("1"), Text("secret"), Text("5.99"), Null];
    draft(Action::Update, Some(&ROW), Some(&old))
}

fn message(draft: &Draft) -> Value {
    serde_json::from_str(&draft.message_json().unwrap()).unwrap()
}

fn headers(record: &Record) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    record.headers.iter().map(|header| (text(header.name), text(header.value))).collect()
}

#[test]
fn an_insert_is_what_consumers_know() {
    assert_eq!(
        inserted().message_json().unwrap(),
        concat!(
            r#"{"record":{"id":1,"body":"say \"hi\"","price":"5.99","tags":{"b":1, "a":2}},"#,
            r#""changes":null,"action":"insert","metadata":{"table_schema":"public","#,
            r#""table_name":"documents","commit_timestamp":"2025-06-11T01:19:22.402358Z","#,
            r#""commit_lsn":73220408,"commit_idx":0,"idempotency_key":"NzMyMjA0MDg6MA==","#,
            r#""record_pks":["1"],"database_name":"shop","transaction_annotations":null,"#,
            r#""enrichment":null,"consumer":{"id":"p-1","name":"shop \"main\"","annotations":{}},"#,
            r#""database":{"id":"db.example/shop","name":"shop","annotations":{},"#,
            r#""database":"shop","hostname":"db.example"}}}"#,
        )
    );
}

#[test]
fn updates_show_what_is_known_of_before() {
    let check = |new: &[In<'_>], old: Option<&[In<'_>]>, record, changes, unchanged| {
        let message = message(&draft(Action::Update, Some(new), old));
        assert_eq!(message["record"], record);
        assert_eq!(message["changes"], changes);
        assert_eq!(message["metadata"].get("unchanged_columns"), unchanged);
    };
    let whole = json!({"id": 1, "body": "b", "price": null, "tags": []});
    let row = [Text("1"), Text("b"), Null, Text("[]")];
    check(&row, None, whole.clone(), json!({}), None);
    let old = [Text("1"), Text("a"), Text("2"), Null];
    check(&row, Some(&old), whole.clone(), json!({"body": "a", "price": "2", "tags": null}), None);
    // The key changed: nothing but the old key is known.
    let old = [Text("7"), Absent, Absent, Absent];
    check(&row, Some(&old), whole, json!({"id": 7}), None);
    let row = [Text("1"), Unchanged, Text("2"), Unchanged];
    let expected = json!({"id": 1, "price": "2"});
    check(&row, None, expected, json!({}), Some(&json!(["body", "tags"])));
}

#[test]
fn deletes_truncates_and_reads() {
    let deleted = message(&draft(Action::Delete, None, Some(&[Text("1"), Absent, Absent, Absent])));
    assert_eq!(deleted["record"], json!({"id": 1}));
    assert_eq!(deleted["changes"], Value::Null);
    assert_eq!(deleted["action"], "delete");
    assert_eq!(deleted["metadata"]["record_pks"], json!(["1"]));

    let truncated = message(&draft(Action::Truncate, None, None));
    assert_eq!(truncated["record"], json!({}));
    assert_eq!(truncated["changes"], Value::Null);
    assert_eq!(truncated["metadata"]["record_pks"], json!([]));

    let read = message(&draft(Action::Read, Some(&ROW), None));
    assert_eq!(read["metadata"]["commit_lsn"], Value::Null);
    assert_eq!(read["metadata"]["commit_idx"], Value::Null);
}

#[test]
fn record_pks_are_the_key_whatever_the_identity() {
    let check = |columns: [(bool, bool); 2], expected| {
        let mut change = change(Action::Insert, Some(&[Text("a"), Text("b")]), None);
        let mut table = (*table()).clone();
        table.columns.remove(0);
        table.columns.truncate(2);
        for (column, (primary_key, identity)) in table.columns.iter_mut().zip(columns) {
            (column.primary_key, column.identity) = (primary_key, identity);
        }
        change.table = Arc::new(table);
        let message = message(&Draft::new(change, envelope()));
        assert_eq!(message["metadata"]["record_pks"], expected);
    };
    check([(true, true), (true, true)], json!(["a", "b"]));
    check([(false, true), (true, true)], json!(["b"]));
    check([(false, false), (false, true)], json!(["b"]));
    // Identity FULL without a primary key: the whole row is no key.
    check([(false, true), (false, true)], json!([]));
    check([(false, false), (false, false)], json!([]));
}

#[test]
fn the_record_has_its_headers_in_order() {
    let mut draft = inserted();
    draft.set_passed("10-mask.wasm");
    draft.set_passed("20-strip.wasm");
    draft.add_header("x", b"y").unwrap();
    let record = draft.record().unwrap();
    let expected = [
        ("sb-pipeline", "p-1"),
        ("sb-key", "NzMyMjA0MDg6MA=="),
        ("sb-part", "0/1"),
        ("sb-table", "public.documents"),
        ("sb-action", "insert"),
        ("sb-chain", "7:0123456789abcdef"),
        ("sb-passed", "10-mask.wasm,20-strip.wasm"),
        ("x", "y"),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(headers(&record), expected);
    assert_eq!(record.timestamp_ms, Some(1_749_604_762_402));
    assert_eq!(record.body, draft.message_json().unwrap());
    assert_eq!(draft.into_record().unwrap(), record);
}

#[test]
fn columns_are_listed_as_the_message_shows_them() {
    let update = draft(Action::Update, Some(&[Text("1"), Unchanged, Null, Text("[1]")]), None);
    let columns: Vec<_> = (0..update.column_count()).filter_map(|at| update.column(at)).collect();
    let info = |name, type_name, key, unchanged, bytes| ColumnInfo {
        name,
        type_name,
        key,
        unchanged,
        bytes,
    };
    assert_eq!(
        columns,
        [
            info("id", "int4", true, false, 1),
            info("body", "text", false, true, 0),
            info("price", "numeric", false, false, 4),
            info("tags", "jsonb", false, false, 3),
        ]
    );
    assert_eq!(update.find("tags"), Some(3));
    assert_eq!(update.find("tag"), None);
    let deleted = draft(Action::Delete, None, Some(&[Absent, Absent, Text("x"), Absent]));
    assert_eq!(deleted.column_count(), 1);
    assert_eq!(deleted.column_name(0), Some("price"));
    assert_eq!(deleted.find("price"), Some(0));
    assert_eq!(draft(Action::Truncate, None, None).column_count(), 0);
}

#[test]
fn values_are_read_as_json_and_as_text() {
    let mut draft = draft(Action::Update, Some(&[Text("1"), Text("a\"b"), Null, Unchanged]), None);
    let check = |draft: &Draft, name, json: Option<&str>, text: Option<&str>| {
        assert_eq!(draft.json(name).unwrap().as_deref(), json, "{name}");
        assert_eq!(draft.text(name).unwrap().as_deref(), text, "{name}");
    };
    check(&draft, "id", Some("1"), Some("1"));
    check(&draft, "body", Some(r#""a\"b""#), Some("a\"b"));
    check(&draft, "price", Some("null"), None);
    check(&draft, "tags", None, None);
    check(&draft, "missing", None, None);
    draft.set_text("body", "c\nd").unwrap();
    draft.set_json("price", " [1] ".to_owned()).unwrap();
    draft.set_json("id", "null".to_owned()).unwrap();
    draft.set_json("extra", r#""\ud800""#.to_owned()).unwrap();
    check(&draft, "body", Some(r#""c\nd""#), Some("c\nd"));
    check(&draft, "price", Some("[1]"), Some("[1]"));
    check(&draft, "id", Some("null"), None);
    check(&draft, "extra", Some(r#""\ud800""#), Some(r#""\ud800""#));
    assert_eq!(draft.column(4).unwrap().type_name, "json");
}

#[test]
fn an_edit_hides_the_old_value_until_another_is_given() {
    let mut draft = updated();
    assert_eq!(message(&draft)["changes"], json!({"body": "secret", "tags": null}));
    assert_eq!(draft.old_json("body").unwrap().as_deref(), Some("\"secret\""));
    assert_eq!(draft.old_json("tags").unwrap().as_deref(), Some("null"));
    assert_eq!(draft.old_json("price").unwrap(), None);
    draft.set_text("body", "***").unwrap();
    assert_eq!(draft.old_json("body").unwrap(), None);
    assert_eq!(message(&draft)["changes"], json!({"tags": null}));
    draft.set_old_json("body", "\"*\"".to_owned()).unwrap();
    assert_eq!(message(&draft)["changes"], json!({"body": "*", "tags": null}));
    let missing = draft.set_old_json("missing", "1".to_owned());
    assert!(matches!(missing, Err(EditError::NoColumn { .. })));
    let insert = inserted().set_old_json("body", "1".to_owned());
    assert!(matches!(insert, Err(EditError::NoOldValues { .. })));
}

#[test]
fn a_removed_column_is_gone_everywhere() {
    let mut draft = updated();
    assert!(draft.remove("body").unwrap());
    assert!(draft.remove("id").unwrap());
    assert!(!draft.remove("id").unwrap());
    let found = message(&draft);
    assert_eq!(found["record"], json!({"price": "5.99", "tags": {"b": 1, "a": 2}}));
    assert_eq!(found["changes"], json!({"tags": null}));
    assert_eq!(found["metadata"]["record_pks"], json!([]));
    let row = [Text("1"), Unchanged, Null, Unchanged];
    let mut draft = self::draft(Action::Update, Some(&row), None);
    draft.remove("tags").unwrap();
    assert_eq!(message(&draft)["metadata"]["unchanged_columns"], json!(["body"]));
    draft.set_text("body", "x").unwrap();
    assert_eq!(message(&draft)["metadata"].get("unchanged_columns"), None);
}

#[test]
fn a_masked_key_is_masked_in_record_pks() {
    let check = |value: &str, expected| {
        let mut draft = inserted();
        draft.set_json("id", value.to_owned()).unwrap();
        assert_eq!(message(&draft)["metadata"]["record_pks"], expected);
    };
    check("\"a\"", json!(["a"]));
    check("{\"a\": \"b\"}", json!(["{\"a\": \"b\"}"]));
    check("null", json!([null]));
}

#[test]
fn a_renamed_column_is_renamed_everywhere() {
    let mut draft = updated();
    draft.rename("body", "text").unwrap();
    draft.rename("id", "key").unwrap();
    let found = message(&draft);
    assert_eq!(found["record"]["text"], "say \"hi\"");
    assert_eq!(found["record"].get("body"), None);
    assert_eq!(found["changes"], json!({"text": "secret", "tags": null}));
    assert_eq!(found["metadata"]["record_pks"], json!(["1"]));
    let taken = draft.rename("text", "price");
    assert!(matches!(taken, Err(EditError::ColumnExists { .. })));
    assert!(matches!(draft.rename("body", "x"), Err(EditError::NoColumn { .. })));
    draft.rename("text", "text").unwrap();
    let row = [Text("1"), Unchanged, Null, Null];
    let mut draft = self::draft(Action::Update, Some(&row), None);
    draft.rename("body", "\"new\"").unwrap();
    assert_eq!(message(&draft)["metadata"]["unchanged_columns"], json!(["\"new\""]));
}

#[test]
fn what_is_not_allowed_is_refused() {
    let mut draft = inserted();
    let before = draft.message_json().unwrap();
    for json in ["", "{", "tru", "1 2", "'a'", "[1,]", "nul"] {
        let refused = draft.set_json("body", json.to_owned());
        assert!(matches!(refused, Err(EditError::InvalidJson { .. })), "{json}");
        let refused = draft.annotate("note", json.to_owned());
        assert!(matches!(refused, Err(EditError::InvalidJson { .. })), "{json}");
    }
    let metadata = message(&draft);
    for key in metadata["metadata"].as_object().unwrap().keys() {
        let refused = draft.annotate(key, "1".to_owned());
        assert!(matches!(refused, Err(EditError::ReservedKey { .. })), "{key}");
    }
    assert!(matches!(draft.add_header("", b"x"), Err(EditError::EmptyHeader)));
    for name in ["sb-", "sb-key", "SB-other"] {
        let refused = draft.add_header(name, b"x");
        assert!(matches!(refused, Err(EditError::ReservedHeader { .. })), "{name}");
    }
    assert_eq!(draft.message_json().unwrap(), before);
    for _ in 0..sluicebox_edits::HEADERS_MAX {
        draft.add_header("s", b"").unwrap();
    }
    assert!(matches!(draft.add_header("s", b""), Err(EditError::TooManyHeaders)));
}

#[test]
fn annotations_join_the_metadata() {
    let mut draft = inserted();
    draft.annotate("codec", "{\"body\":\"zstd\"}".to_owned()).unwrap();
    draft.annotate("a \"b\"", "1".to_owned()).unwrap();
    draft.annotate("codec", " 2 ".to_owned()).unwrap();
    let metadata = &message(&draft)["metadata"];
    assert_eq!(metadata["codec"], 2);
    assert_eq!(metadata["a \"b\""], 1);
    assert_eq!(metadata["table_name"], "documents");
}

#[test]
fn a_replaced_message_takes_no_more_edits() {
    let mut draft = inserted();
    draft.set_message(Bytes::from_static(b"anything"), &"10-x.wasm".into());
    assert_eq!(draft.message_json().unwrap(), "anything");
    assert_eq!(draft.json("id").unwrap().as_deref(), Some("1"));
    assert_eq!(draft.largest_columns(3), []);
    let replaced = |result| assert!(matches!(result, Err(EditError::Replaced)));
    replaced(draft.set_text("id", ""));
    replaced(draft.remove("id").map(|_| ()));
    replaced(draft.rename("id", "x"));
    replaced(draft.annotate("x", "1".to_owned()));
    let mut update = updated();
    update.set_message(Bytes::new(), &"10-x.wasm".into());
    replaced(update.set_old_json("id", "1".to_owned()));
    draft.add_header("x", b"y").unwrap();
    draft.set_message(Bytes::from_static(b"\xff"), &"10-x.wasm".into());
    assert_eq!(draft.message_json(), Err(EncodeError::BodyNotUtf8));
    let record = draft.into_record().unwrap();
    assert_eq!(&record.body[..], b"\xff");
    assert_eq!(record.headers.len(), 7);
}

#[test]
fn parts_are_numbered() {
    let mut draft = inserted();
    draft.add_header("x", b"y").unwrap();
    let bodies = vec![Bytes::from_static(b"a"), Bytes::from_static(b"b")];
    let parts = draft.clone().split(bodies, &"10-x.wasm".into());
    let found: Vec<_> = parts
        .iter()
        .map(|part| {
            let record = part.record().unwrap();
            (headers(&record)[2].1.clone(), record.body, part.part())
        })
        .collect();
    assert_eq!(
        found,
        [
            ("0/2".to_owned(), Bytes::from_static(b"a"), (0, 2)),
            ("1/2".to_owned(), Bytes::from_static(b"b"), (1, 2)),
        ]
    );
    assert_eq!(draft.split(Vec::new(), &"10-x.wasm".into()).len(), 0);
}

/// An insert whose body has that many bytes.
fn sized(body_bytes: usize) -> Draft {
    let body = "x".repeat(body_bytes);
    draft(Action::Insert, Some(&[Text("1"), Text(&body), Null, Null]), None)
}

#[test]
fn the_limit_is_inclusive_and_oversize_is_exact() {
    let empty = usize::try_from(sized(0).metered_bytes().unwrap()).unwrap();
    let room = usize::try_from(RECORD_BYTES_MAX).unwrap() - empty;
    for measured_before in [false, true] {
        let check = |body_bytes, expected: Option<u64>| {
            let draft = sized(body_bytes);
            if measured_before {
                draft.metered_bytes().unwrap();
            }
            match (draft.record(), expected) {
                (Ok(record), None) => assert_eq!(record.metered_bytes(), RECORD_BYTES_MAX),
                (Err(error), Some(bytes)) => assert_eq!(error, RecordError::Oversize { bytes }),
                other => panic!("unexpected: {other:?}"),
            }
        };
        check(room, None);
        check(room + 1, Some(RECORD_BYTES_MAX + 1));
        check(room + 5_000_000, Some(RECORD_BYTES_MAX + 5_000_000));
    }
    let mut replaced = sized(0);
    replaced.set_message(Bytes::from(vec![b'x'; 2 << 20]), &"10-x.wasm".into());
    let bytes = replaced.metered_bytes().unwrap();
    assert!(bytes > 2 << 20);
    assert_eq!(replaced.record(), Err(RecordError::Oversize { bytes }));
    // The headers alone are too large.
    replaced.set_message(Bytes::new(), &"10-x.wasm".into());
    replaced.add_header("x", &vec![0; 2 << 20]).unwrap();
    let bytes = replaced.metered_bytes().unwrap();
    assert_eq!(replaced.record(), Err(RecordError::Oversize { bytes }));
}

#[test]
fn the_largest_columns_are_those_of_the_edited_message() {
    let mut draft = inserted();
    let named = |names: &[(&str, u64)]| {
        names.iter().map(|(name, bytes)| ((*name).to_owned(), *bytes)).collect::<Vec<_>>()
    };
    assert_eq!(draft.largest_columns(2), named(&[("tags", 14), ("body", 12)]));
    draft.remove("tags").unwrap();
    draft.set_text("extra", "0123456789abcdef").unwrap();
    assert_eq!(
        draft.largest_columns(9),
        named(&[("extra", 18), ("body", 12), ("price", 6), ("id", 1)])
    );
}

#[test]
fn a_preview_is_cut_at_a_character() {
    let draft = draft(Action::Insert, Some(&[Text("1"), Text("ä"), Null, Null]), None);
    let whole = draft.message_json().unwrap();
    assert_eq!(draft.message_preview(10_000).unwrap(), (whole.clone(), false));
    assert_eq!(draft.message_preview(whole.len()).unwrap(), (whole.clone(), false));
    let start = whole.find('ä').unwrap();
    for cut in [start, start + 1] {
        assert_eq!(draft.message_preview(cut).unwrap(), (whole[..start].to_owned(), true));
    }
}

#[test]
fn text_that_is_not_utf8_names_its_column() {
    let mut change = change(Action::Insert, Some(&ROW), None);
    let mut row = tuple(&[Text("1"), Text("bad"), Null, Null]);
    let mut data = row.data.to_vec();
    let last = data.len() - 1;
    data[last] = 0xFF;
    row.data = Bytes::from(data);
    change.new = Some(row);
    let mut draft = Draft::new(change, envelope());
    let expected =
        EncodeError::NotUtf8 { table: "public.documents".to_owned(), column: "body".to_owned() };
    assert_eq!(draft.message_json(), Err(expected.clone()));
    assert_eq!(draft.metered_bytes(), Err(expected.clone()));
    assert_eq!(draft.record(), Err(RecordError::Encode(expected)));
    assert_eq!(draft.column(1).unwrap().bytes, 3);
    draft.remove("body").unwrap();
    assert!(draft.record().is_ok());
}

#[test]
fn a_row_that_points_outside_its_bytes_is_an_error() {
    let mut change = change(Action::Insert, Some(&ROW), None);
    let cells = [Cell::Text { start: 5, end: 500 }; 4];
    change.new = Some(Tuple { data: Bytes::from_static(b"short"), cells: Box::new(cells) });
    let table = "public.documents".to_owned();
    let damaged = Err(EncodeError::Damaged { table });
    assert_eq!(Draft::new(change, envelope()).message_json(), damaged);
}

#[test]
fn drafts_cross_threads() {
    fn check<T: Send + Sync + 'static>() {}
    check::<Draft>();
    check::<Envelope>();
}

#[test]
fn more_tables_than_are_kept_do_not_grow_the_envelope_or_mix_up_names() {
    let envelope = envelope();
    for number in 0..3000 {
        let mut change = change(Action::Insert, Some(&ROW), None);
        let mut table = (*table()).clone();
        table.name = format!("t{number}");
        change.table = Arc::new(table);
        let draft = Draft::new(change, Arc::clone(&envelope));
        assert_eq!(message(&draft)["metadata"]["table_name"], format!("t{number}"));
    }
}

#[derive(Clone, Debug)]
enum Edit {
    Measure,
    SetJson(usize, String),
    SetText(usize, String),
    SetOld(usize, String),
    Remove(usize),
    Rename(usize, usize),
    Annotate(String, String),
    Header(String, Vec<u8>),
    Passed(String),
    Part(u32, u32),
    Message(Vec<u8>),
    ColumnSize(usize),
}

const NAMES: [&str; 7] = ["id", "body", "price", "tags", "new", "other \"name\"", "ünï"];

fn edit() -> impl Strategy<Value = Edit> {
    let name = || 0..NAMES.len();
    let json = || {
        prop_oneof![
            Just("null".to_owned()),
            Just(" [1, 2] ".to_owned()),
            Just("\"text\"".to_owned()),
            any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap()),
            Just("not json".to_owned()),
        ]
    };
    prop_oneof![
        3 => Just(Edit::Measure),
        3 => (name(), json()).prop_map(|(at, json)| Edit::SetJson(at, json)),
        3 => (name(), any::<String>()).prop_map(|(at, text)| Edit::SetText(at, text)),
        2 => (name(), json()).prop_map(|(at, json)| Edit::SetOld(at, json)),
        3 => name().prop_map(Edit::Remove),
        3 => (name(), name()).prop_map(|(from, to)| Edit::Rename(from, to)),
        2 => ("[a-c]{0,2}|consumer", json()).prop_map(|(key, json)| Edit::Annotate(key, json)),
        2 => ("[a-c]{0,2}|sb-x", prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(name, value)| Edit::Header(name, value)),
        1 => "[a-c]{1,9}".prop_map(Edit::Passed),
        1 => (0..9_u32, 0..99_u32).prop_map(|(index, count)| Edit::Part(index, count)),
        1 => prop::collection::vec(any::<u8>(), 0..30).prop_map(Edit::Message),
        2 => name().prop_map(Edit::ColumnSize),
    ]
}

fn apply(draft: &mut Draft, edit: &Edit) {
    // Whether an edit is taken or refused, sizes have to stay exact.
    let _taken = match edit {
        Edit::Measure => draft.metered_bytes().is_ok(),
        Edit::SetJson(at, json) => draft.set_json(NAMES[*at], json.clone()).is_ok(),
        Edit::SetText(at, text) => draft.set_text(NAMES[*at], text).is_ok(),
        Edit::SetOld(at, json) => draft.set_old_json(NAMES[*at], json.clone()).is_ok(),
        Edit::Remove(at) => draft.remove(NAMES[*at]).is_ok(),
        Edit::Rename(from, to) => draft.rename(NAMES[*from], NAMES[*to]).is_ok(),
        Edit::Annotate(key, json) => draft.annotate(key, json.clone()).is_ok(),
        Edit::Header(name, value) => draft.add_header(name, value).is_ok(),
        Edit::Passed(transform) => {
            draft.set_passed(transform);
            true
        }
        Edit::Part(index, count) => {
            draft.set_part(*index, *count);
            true
        }
        Edit::Message(body) => {
            draft.set_message(Bytes::copy_from_slice(body), &"10-x.wasm".into());
            true
        }
        Edit::ColumnSize(at) => draft.column(*at).is_some(),
    };
}

fn cell() -> impl Strategy<Value = Option<Option<String>>> {
    prop_oneof![Just(None), Just(Some(None)), any::<String>().prop_map(|text| Some(Some(text)))]
}

/// Random text for the body and the price; `None` is what was not sent.
fn cells<'a>(random: &'a [Option<Option<String>>; 2], not_sent: In<'a>) -> [In<'a>; 4] {
    let of = |cell: &'a Option<Option<String>>| match cell {
        None => not_sent,
        Some(None) => Null,
        Some(Some(text)) => Text(text),
    };
    [Text("1"), of(&random[0]), of(&random[1]), Text("[true]")]
}

proptest! {
    #[test]
    fn measured_and_written_sizes_agree_after_any_edits(
        action in 0..4_usize,
        new in [cell(), cell()],
        old in [cell(), cell()],
        edits in prop::collection::vec(edit(), 0..12),
    ) {
        let (new, old) = (cells(&new, Unchanged), cells(&old, Absent));
        let mut draft = match action {
            0 => draft(Action::Insert, Some(&new), None),
            1 => draft(Action::Update, Some(&new), None),
            2 => draft(Action::Update, Some(&new), Some(&old)),
            _ => draft(Action::Delete, None, Some(&old)),
        };
        for edit in &edits {
            apply(&mut draft, edit);
            let record = draft.clone().into_record().unwrap();
            prop_assert_eq!(draft.metered_bytes().unwrap(), record.metered_bytes());
            if draft.is_replaced() {
                continue;
            }
            let body: Value = serde_json::from_slice(&record.body).unwrap();
            let shown: Vec<_> = (0..draft.column_count())
                .filter_map(|at| draft.column(at))
                .filter(|column| !column.unchanged)
                .collect();
            prop_assert_eq!(body["record"].as_object().unwrap().len(), shown.len());
            for column in shown {
                let json = draft.json(column.name).unwrap().unwrap().into_owned();
                prop_assert_eq!(column.bytes, json.len() as u64);
                let value: Value = serde_json::from_str(&json).unwrap();
                prop_assert_eq!(&body["record"][column.name], &value);
            }
        }
    }
}
