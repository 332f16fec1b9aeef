use base64::Engine as _;
use bytes::Bytes;

use super::fold::{Column, Fold, Table};
use super::scratch::Scratch;
use super::*;
use crate::change::Grouping;
use crate::sink::ReadRecord;
use crate::sink::record::Header;

const TABLE: &str = "public.t";

struct Event<'a> {
    action: &'a str,
    position: (u64, u64),
    record: &'a str,
    changes: &'a str,
    metadata: &'a str,
}

const INSERT: Event<'_> = Event {
    action: "insert",
    position: (1, 0),
    record: r#"{"id":1,"a":"x"}"#,
    changes: "null",
    metadata: "",
};
const UPDATE: Event<'_> = Event {
    action: "update",
    position: (2, 0),
    record: r#"{"id":1,"a":"y"}"#,
    changes: "{}",
    metadata: "",
};
const DELETE: Event<'_> =
    Event { action: "delete", position: (3, 0), record: r#"{"id":1}"#, ..INSERT };

fn record(event: &Event<'_>) -> ReadRecord {
    let (lsn, idx) = event.position;
    let key = base64::engine::general_purpose::STANDARD.encode(format!("{lsn}:{idx}"));
    let body = format!(
        r#"{{"record":{},"changes":{},"action":"{}","metadata":{{"table_schema":"public",
        "table_name":"t","commit_lsn":{lsn},"commit_idx":{idx},"idempotency_key":"{key}"{}}}}}"#,
        event.record, event.changes, event.action, event.metadata
    );
    let header = |name: &'static str, value: &str| Header {
        name: Bytes::from_static(name.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
    };
    let headers = vec![
        header("sb-pipeline", "p"),
        header("sb-key", &key),
        header("sb-part", "0/1"),
        header("sb-table", TABLE),
        header("sb-action", event.action),
    ];
    ReadRecord { seq: lsn, timestamp_ms: 0, headers, body: Bytes::from(body) }
}

fn fold(keys: &[&str]) -> Fold<'static> {
    fold_by(keys, Grouping::Key)
}

fn fold_by(keys: &[&str], grouping: Grouping) -> Fold<'static> {
    fold_of(keys, grouping, vec!["one".to_owned()])
}

fn fold_of(keys: &[&str], grouping: Grouping, streams: Vec<String>) -> Fold<'static> {
    let column = |name: &&str| Column {
        name: (*name).to_owned(),
        is_key: keys.contains(name),
        ignored: false,
        may_be_altered: *name == "a",
    };
    let columns = ["id", "a"].iter().map(column).collect();
    let table = Table::new(TABLE.to_owned(), columns, grouping);
    let mut fold = Fold::new(vec![(table, vec![TABLE.to_owned()])], streams).unwrap();
    fold.keep_values = true;
    fold
}

const RULES: Rules = Rules { allow_unmentioned: false, show_values: false };

/// Compares with these rows, and returns the faults and the table's report.
fn compared(
    fold: &mut Fold<'_>,
    rows: &[[&str; 2]],
    rules: Rules,
) -> (Vec<(Fault, u64)>, TableReport) {
    let mut comparison = Comparison::new(fold, 0, rules);
    for row in rows {
        let json = &row.map(Cow::Borrowed);
        comparison.row(fold, SourceRow { json, question: None }).unwrap();
    }
    let report = comparison.finish(fold).unwrap();
    let faults = Fault::ALL.into_iter();
    let found = faults.filter_map(|fault| fold.faults.of(fault).map(|found| (fault, found.count)));
    (found.collect(), report)
}

#[track_caller]
fn check(events: &[Event<'_>], rows: &[[&str; 2]], expected: &[(Fault, u64)]) -> TableReport {
    let mut fold = fold(&["id"]);
    for event in events {
        fold.add(0, &record(event)).unwrap();
    }
    let (faults, report) = compared(&mut fold, rows, RULES);
    assert_eq!(faults, expected, "{:?}", fold.faults);
    report
}

#[test]
fn a_faultless_stream_has_no_faults() {
    let report = check(&[INSERT, UPDATE], &[["1", r#""y""#]], &[]);
    assert_eq!((report.rows, report.compared, report.values), (1, 1, 2));
    check(&[INSERT, UPDATE, DELETE], &[], &[]);
    let truncate = Event { action: "truncate", position: (4, 0), record: "{}", ..INSERT };
    check(&[INSERT, truncate], &[], &[]);
}

#[test]
fn missing_doubled_and_disordered_changes_are_found() {
    check(&[INSERT], &[["1", r#""y""#]], &[(Fault::Different, 1)]);
    check(&[], &[["1", r#""y""#]], &[(Fault::Missing, 1)]);
    check(&[INSERT], &[], &[(Fault::Different, 1)]);
    check(&[INSERT, UPDATE, UPDATE], &[["1", r#""y""#]], &[(Fault::Doubled, 1)]);
    let late = Event { position: (9, 0), ..INSERT };
    check(&[late, UPDATE], &[["1", r#""x""#]], &[(Fault::Disordered, 1)]);
    check(&[UPDATE], &[["1", r#""y""#]], &[(Fault::Missing, 1)]);
    check(&[INSERT, DELETE], &[["1", r#""x""#]], &[(Fault::Different, 1)]);
    let early = Event { action: "truncate", position: (0, 1), record: "{}", ..INSERT };
    check(&[INSERT, early], &[], &[(Fault::Disordered, 1)]);
}

#[test]
fn a_changed_key_moves_the_row() {
    let moved = || Event {
        record: r#"{"id":7}"#,
        changes: r#"{"id":1}"#,
        metadata: r#","unchanged_columns":["a"]"#,
        ..UPDATE
    };
    check(&[INSERT, moved()], &[["7", r#""x""#]], &[]);
    check(&[INSERT, moved()], &[["7", "null"]], &[(Fault::Different, 1)]);
    // The old key's last change must come first, too.
    let late = Event { position: (9, 0), ..INSERT };
    check(&[late, moved()], &[["1", r#""x""#]], &[(Fault::Disordered, 1)]);
}

#[test]
fn order_is_judged_within_the_groups_that_columns_make() {
    #[track_caller]
    fn check(events: &[Event<'_>], disordered: u64) {
        let mut fold = fold_by(&["id"], Grouping::Columns(vec![1]));
        for event in events {
            fold.add(0, &record(event)).unwrap();
        }
        let found = fold.faults.of(Fault::Disordered).map_or(0, |found| found.count);
        assert_eq!(found, disordered, "{:?}", fold.faults);
    }
    let insert = |position, record| Event { position, record, ..INSERT };
    let (first, same) =
        (insert((1, 0), r#"{"id":1,"a":"x"}"#), insert((2, 0), r#"{"id":2,"a":"x"}"#));
    let other = insert((3, 0), r#"{"id":3,"a":"y"}"#);
    check(&[first, same], 0);
    let (first, same) =
        (insert((1, 0), r#"{"id":1,"a":"x"}"#), insert((2, 0), r#"{"id":2,"a":"x"}"#));
    check(&[same, first], 1);
    let first = insert((1, 0), r#"{"id":1,"a":"x"}"#);
    check(&[other, first], 0);
    // It leaves x for y, and is late in both.
    let moved = Event { changes: r#"{"a":"x"}"#, ..UPDATE };
    let (x, y) = (insert((8, 0), r#"{"id":4,"a":"x"}"#), insert((9, 0), r#"{"id":5,"a":"y"}"#));
    check(&[INSERT, x, y, moved], 2);
}

#[test]
fn columns_may_be_gone_only_where_the_message_says_so() {
    let event = |record, metadata| Event { record, metadata, ..INSERT };
    let row: &[[&str; 2]] = &[["1", r#""x""#]];
    check(&[event(r#"{"id":1}"#, "")], row, &[(Fault::Different, 1)]);
    check(&[event(r#"{"id":1}"#, "")], &[["1", "null"]], &[]);
    let report = check(&[event(r#"{"id":1}"#, r#","stripped_columns":["a"]"#)], row, &[]);
    assert_eq!(report.altered, 1);
    let key = event(r#"{"id":1,"a":"x"}"#, r#","masked_columns":["id"]"#);
    check(&[key], row, &[(Fault::Different, 1)]);
}

#[test]
fn what_is_held_is_not_lost() {
    let mut fold = fold(&["id"]);
    fold.add(0, &record(&INSERT)).unwrap();
    fold.scratch.hold(0, "[1]").unwrap();
    fold.scratch.hold(0, "[2]").unwrap();
    let (faults, report) = compared(&mut fold, &[["2", "null"]], RULES);
    assert_eq!((faults, report.held), (vec![], 2));
}

#[test]
fn a_truncate_that_is_held_or_given_up_concerns_all_rows() {
    for give_up in [false, true] {
        let mut fold = fold(&["id"]);
        fold.add(0, &record(&INSERT)).unwrap();
        let tell = if give_up { Scratch::give_up } else { Scratch::hold };
        tell(&fold.scratch, 0, WHOLE_TABLE).unwrap();
        let (faults, report) = compared(&mut fold, &[["2", "null"]], RULES);
        assert_eq!((faults, report.held + report.given_up), (vec![], 2));
    }
}

#[test]
fn rows_that_are_older_than_the_slot_are_counted() {
    let mut fold = fold(&["id"]);
    fold.partial = true;
    let moved = Event { position: (2, 0), record: r#"{"id":1}"#, ..UPDATE };
    let moved = Event { metadata: r#","unchanged_columns":["a"]"#, ..moved };
    fold.add(0, &record(&moved)).unwrap();
    let rules = Rules { allow_unmentioned: true, ..RULES };
    let (faults, report) = compared(&mut fold, &[["1", r#""x""#], ["2", "null"]], rules);
    assert_eq!((faults, report.unmentioned, report.compared), (vec![], 1, 1));
}

#[test]
fn a_row_that_changes_meanwhile_may_be_in_any_of_its_states() {
    let moment = Moment { from: Lsn(2), to: Lsn(4) };
    let at = |position| Event { position, ..UPDATE };
    #[track_caller]
    fn check(events: &[Event<'_>], moment: Moment, rows: &[[&str; 2]], holds: bool) {
        let mut fold = fold(&["id"]);
        fold.moment = Some(moment);
        for event in events {
            fold.add(0, &record(event)).unwrap();
        }
        let (faults, _) = compared(&mut fold, rows, RULES);
        assert_eq!(faults.is_empty(), holds, "{faults:?}");
    }
    for (value, holds) in [(r#""x""#, true), (r#""y""#, true), (r#""z""#, false)] {
        check(&[INSERT, at((3, 0))], moment, &[["1", value]], holds);
    }
    // Behind the moment it is not done yet, before it it is.
    check(&[INSERT, at((4, 0))], moment, &[["1", r#""x""#]], true);
    check(&[INSERT, at((4, 0))], moment, &[["1", r#""y""#]], false);
    check(&[INSERT, at((1, 1))], moment, &[["1", r#""x""#]], false);
    check(&[INSERT, DELETE], moment, &[], true);
    check(&[INSERT, DELETE], moment, &[["1", r#""x""#]], true);
    // One that is made meanwhile may be there or not.
    let born = || Event { position: (3, 0), ..INSERT };
    check(&[born()], moment, &[], true);
    check(&[born()], moment, &[["1", r#""x""#]], true);
    let later = Event { position: (5, 0), ..INSERT };
    check(&[later], moment, &[], true);
}

/// By the pipeline of that id.
fn by(pipeline: &'static str, event: &Event<'_>) -> ReadRecord {
    let mut record = record(event);
    record.headers[0].value = Bytes::from_static(pipeline.as_bytes());
    record
}

fn fence(token: &'static str) -> ReadRecord {
    let header = Header { name: Bytes::new(), value: Bytes::from_static(b"fence") };
    ReadRecord {
        headers: vec![header],
        body: Bytes::from_static(token.as_bytes()),
        ..record(&INSERT)
    }
}

#[test]
fn a_store_that_took_over_goes_on_with_what_the_lost_one_has_sent() {
    #[track_caller]
    fn check(records: &[ReadRecord], expected: &[(Fault, u64)], foreign: u64) {
        let mut fold = fold(&["id"]);
        for record in records {
            fold.add(0, record).unwrap();
        }
        assert_eq!(fold.counts.foreign, foreign);
        let (faults, _) = compared(&mut fold, &[["1", r#""y""#]], RULES);
        assert_eq!(faults, expected, "{:?}", fold.faults);
    }
    let (lost, own) = (|| fence("sb-lost-1-0a"), || fence("sb-p-1-0b"));
    check(&[lost(), by("lost", &INSERT), own(), record(&UPDATE)], &[], 0);
    let again = [lost(), by("lost", &INSERT), own(), record(&INSERT), record(&UPDATE)];
    check(&again, &[(Fault::Doubled, 1)], 0);
    // One that has never had the stream to itself.
    let later = Event { position: (9, 0), ..DELETE };
    check(&[own(), record(&INSERT), record(&UPDATE), by("other", &later)], &[], 1);
    check(&[fence("other"), own(), record(&INSERT), record(&UPDATE), by("other", &later)], &[], 1);
}

#[test]
fn several_streams_are_folded_as_one_and_each_has_its_own_order() {
    #[track_caller]
    fn check(
        events: &[(usize, Event<'_>)],
        rows: &[[&str; 2]],
        expected: &[(Fault, u64)],
        named: &str,
    ) {
        let streams = ["one", "two"].map(str::to_owned).to_vec();
        let mut fold = fold_of(&["id"], Grouping::Key, streams);
        for (stream, event) in events {
            fold.add(*stream, &record(event)).unwrap();
        }
        fold.settle().unwrap();
        assert_eq!(compared(&mut fold, rows, RULES).0, expected, "{:?}", fold.faults);
        let text = serde_json::to_string(&fold.faults).unwrap();
        assert!(text.contains(named), "{text}");
    }
    let at = |position, event| Event { position, ..event };
    // One stream is read after the other, whatever came first.
    let (update, delete) = (|| at((2, 0), UPDATE), || at((3, 0), DELETE));
    check(&[(0, delete()), (1, INSERT), (1, update())], &[], &[], "");
    check(&[(0, update()), (1, INSERT)], &[["1", r#""y""#]], &[], "");
    let kept =
        || Event { record: r#"{"id":1}"#, metadata: r#","unchanged_columns":["a"]"#, ..UPDATE };
    check(&[(0, kept()), (1, INSERT)], &[["1", r#""x""#]], &[], "");
    check(&[(0, kept()), (1, INSERT)], &[["1", r#""y""#]], &[(Fault::Different, 1)], "");
    // Each is judged by itself.
    let twice = [(0, INSERT), (1, INSERT)];
    check(&twice, &[["1", r#""x""#]], &[(Fault::Doubled, 1)], "of `two`");
    let late = [(0, INSERT), (1, delete()), (1, update())];
    check(&late, &[], &[(Fault::Disordered, 1)], "record 2 of `two`");
    check(&[(0, update())], &[["1", r#""y""#]], &[(Fault::Missing, 1)], "of `one`");
}

#[test]
fn a_change_that_waits_for_nothing_may_overtake_the_one_before_it() {
    #[track_caller]
    fn check(events: &[Event<'_>], rows: &[[&str; 2]], held: bool, expected: &[(Fault, u64)]) {
        let mut fold = fold_by(&["id"], Grouping::None);
        for event in events {
            fold.add(0, &record(event)).unwrap();
        }
        if held {
            fold.scratch.hold(0, "[1]").unwrap();
        }
        fold.settle().unwrap();
        assert_eq!(compared(&mut fold, rows, RULES).0, expected, "{:?}", fold.faults);
    }
    let kept =
        || Event { record: r#"{"id":1}"#, metadata: r#","unchanged_columns":["a"]"#, ..UPDATE };
    check(&[UPDATE, INSERT], &[["1", r#""y""#]], false, &[]);
    check(&[kept(), INSERT], &[["1", r#""x""#]], false, &[]);
    check(&[kept(), INSERT], &[["1", r#""z""#]], false, &[(Fault::Different, 1)]);
    check(&[DELETE, INSERT], &[], false, &[]);
    // The insert is parked still, or is nowhere.
    check(&[kept()], &[["1", r#""x""#]], true, &[]);
    check(&[UPDATE], &[["1", r#""y""#]], false, &[(Fault::Missing, 1)]);
}

#[test]
fn rows_without_a_key_are_counted() {
    #[track_caller]
    fn check(events: &[Event<'_>], rows: &[[&str; 2]], expected: &[(Fault, u64)]) {
        let mut fold = fold(&[]);
        for event in events {
            fold.add(0, &record(event)).unwrap();
        }
        assert_eq!(compared(&mut fold, rows, RULES).0, expected);
    }
    let again = || Event { position: (1, 1), ..INSERT };
    let update = || Event { changes: r#"{"a":"x"}"#, ..UPDATE };
    let row = ["1", r#""x""#];
    check(&[INSERT, again()], &[row, row], &[]);
    check(&[INSERT, again()], &[row], &[(Fault::Different, 1)]);
    check(&[INSERT], &[row, row], &[(Fault::Missing, 1)]);
    check(&[INSERT, again(), update()], &[row, ["1", r#""y""#]], &[]);
    check(&[update(), INSERT], &[], &[(Fault::Disordered, 1), (Fault::Different, 1)]);
}

#[test]
fn what_is_no_message_makes_a_table_incomparable_and_commands_are_nothing() {
    let mut fold = fold(&["id"]);
    let mut broken = record(&INSERT);
    broken.body = Bytes::from_static(b"{");
    fold.add(0, &broken).unwrap();
    assert_eq!(fold.tables[0].opaque, 1);
    let header = Header { name: Bytes::new(), value: Bytes::from_static(b"fence") };
    broken.headers = vec![header];
    fold.add(0, &broken).unwrap();
    assert_eq!((fold.counts.records, fold.counts.commands), (1, 1));
}

#[test]
fn what_others_append_is_left_out() {
    for headers in [vec![], vec![Header { name: "who".into(), value: "other".into() }]] {
        let mut fold = fold(&["id"]);
        fold.add(0, &record(&INSERT)).unwrap();
        let body = Bytes::from_static(b"theirs");
        let theirs = ReadRecord { headers, body, ..record(&UPDATE) };
        fold.add(0, &theirs).unwrap();
        assert_eq!((fold.counts.records, fold.counts.foreign), (2, 1));
        assert_eq!(compared(&mut fold, &[["1", r#""x""#]], RULES).0, []);
    }
}

#[test]
fn large_records_and_false_headers_are_found() {
    let mut large = record(&INSERT);
    let mut body = large.body.to_vec();
    body.resize(1024 * 1024, b' ');
    large.body = Bytes::from(body);
    let mut folded = fold(&["id"]);
    folded.add(0, &large).unwrap();
    assert!(folded.faults.of(Fault::Oversize).is_some());
    for index in 0..5 {
        let mut wrong = record(&INSERT);
        wrong.headers[index].value = Bytes::new();
        let mut folded = fold(&["id"]);
        folded.add(0, &wrong).unwrap();
        assert_eq!(folded.faults.of(Fault::Malformed).map(|found| found.count), Some(1));
    }
    let mut lying = record(&INSERT);
    lying.headers[4].value = Bytes::from_static(b"delete");
    let mut folded = fold(&["id"]);
    folded.add(0, &lying).unwrap();
    assert!(folded.faults.of(Fault::Malformed).is_some());
}

#[test]
fn a_part_that_is_missing_is_missing() {
    let mut folded = fold(&["id"]);
    let mut part = record(&INSERT);
    part.headers[2].value = Bytes::from_static(b"1/2");
    folded.add(0, &part).unwrap();
    assert_eq!(folded.scratch.incomplete().unwrap().len(), 1);
    part.headers[2].value = Bytes::from_static(b"0/2");
    folded.add(0, &part).unwrap();
    assert!(folded.scratch.incomplete().unwrap().is_empty() && folded.faults.is_empty());
}

#[test]
fn a_message_that_was_cut_is_put_together() {
    let pieces = |event: &Event<'_>, first_seq: u64| {
        let whole = record(event);
        let cut = whole.body.len() / 3;
        let bodies =
            [whole.body.slice(..cut), whole.body.slice(cut..2 * cut), whole.body.slice(2 * cut..)];
        bodies.into_iter().zip(0_u64..).map(move |(body, part)| {
            let mut piece = ReadRecord { seq: first_seq + part, body, ..whole.clone() };
            piece.headers[2].value = Bytes::from(format!("{part}/3"));
            piece
        })
    };
    for streams in [1, 2] {
        let names = (0..streams).map(|stream| stream.to_string()).collect();
        let mut folded = fold_of(&["id"], Grouping::Key, names);
        let again = Event { position: (4, 0), ..INSERT };
        let update = Event { position: (5, 0), ..UPDATE };
        let parts: Vec<ReadRecord> = pieces(&again, 10).collect();
        let all = [record(&INSERT), record(&DELETE)].into_iter().chain(parts);
        for (index, record) in all.chain([record(&update)]).enumerate() {
            folded.add(0, &record).unwrap();
            // Until it is whole, the table cannot be compared.
            assert_eq!(folded.tables[0].opaque, [0, 0, 1, 2, 0, 0][index]);
        }
        folded.settle().unwrap();
        assert!(folded.scratch.incomplete().unwrap().is_empty());
        let (faults, report) = compared(&mut folded, &[["1", r#""y""#]], RULES);
        assert_eq!((faults, report.values), (vec![], 2));
    }
    // What a transform puts in the place of a message stays what nobody can compare.
    let mut folded = fold(&["id"]);
    for mut piece in pieces(&INSERT, 1) {
        piece.body = Bytes::from_static(b"own");
        folded.add(0, &piece).unwrap();
    }
    assert_eq!(folded.tables[0].opaque, 3);
}

#[test]
fn shortened_texts_end_at_a_character() {
    assert_eq!(shorten("äöü", 3), "äöü");
    assert_eq!(shorten("äöü", 2), "äö… (6 bytes)");
}
