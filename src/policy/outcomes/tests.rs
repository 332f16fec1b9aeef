use super::*;
use crate::sink::error::Named;

fn place() -> Place {
    Place {
        endpoint: "http://127.0.0.1:8080".to_owned(),
        basin: "my-basin".to_owned(),
        stream: "products".to_owned(),
        named: Named::Sink,
    }
}

fn answer_for(row: &AnswerRow) -> Answer {
    // A status between the ends of a range that no earlier row takes.
    let status = match row.status {
        (0, _) => 600,
        (500, 599) => 520,
        (400, 498) => 418,
        (first, _) => first,
    };
    let body = format!(r#"{{"code":"{}","message":"it said so: {}"}}"#, row.s2, row.said);
    Answer::new(status, body.as_bytes(), None)
}

fn happens(happens: Happens) -> &'static str {
    match happens {
        Happens::SinkWaits => "the sink waits",
        Happens::MessageParks => "the message parks",
        Happens::MessageRetries => "the message is retried",
        Happens::LineReopens => "the line is opened anew",
        Happens::StandsDown => "the process stands down",
        Happens::OperatorDecides => "an operator decides",
        Happens::PipelineStops => "the pipeline stops",
    }
}

#[test]
fn each_answer_finds_its_own_row_and_says_where_and_what() {
    for (index, row) in ANSWERS.iter().enumerate() {
        let answer = answer_for(row);
        let operation = match row.asked {
            Asked::Append => Operation::Append,
            Asked::Anything => Operation::Tail,
        };
        let found = of_answer(operation, &answer);
        assert!(std::ptr::eq(found, row), "row {index}: {answer:?} found {found:?}");
        let text = row.sentence(&place(), operation, &answer);
        for part in ["my-basin", "products", "http://127.0.0.1:8080"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(text.contains(&answer.status.to_string()), "{text}");
        assert!(!text.contains('{') && !text.contains('}'), "{text}");
        assert!(!row.code(&answer).contains('{'), "{}", row.code(&answer));
        if row.sentence.contains("{said}") {
            assert!(text.contains("it said so"), "{text}");
        }
        // A record is to blame for an append alone.
        if row.asked == Asked::Append {
            assert_eq!(of_answer(Operation::Tail, &answer).happens, Happens::SinkWaits);
        }
    }
}

#[test]
fn what_an_answer_says_is_no_template() {
    let answer = Answer::new(429, br#"{"code":"x","message":"{basin}"}"#, None);
    let row = of_answer(Operation::Tail, &answer);
    assert!(row.sentence(&place(), Operation::Tail, &answer).contains("({basin})"));
}

#[test]
fn each_fault_and_each_class_has_its_row() {
    for fault in [
        Fault::Dns,
        Fault::Connect,
        Fault::CertificateExpired,
        Fault::CertificateNotYet,
        Fault::CertificateName,
        Fault::CertificateIssuer,
        Fault::Tls,
        Fault::TimeOut,
        Fault::Cut,
    ] {
        assert_eq!(FAULTS.iter().filter(|row| row.fault == fault).count(), 1);
        let (code, text) = of_fault(&place(), Operation::Append, fault);
        assert!(code.starts_with("sink_") && text.contains("my-basin"), "{code} {text}");
    }
    assert_eq!(of_message("oversize").happens, Happens::MessageParks);
    for class in ["refused", "trap", "timeout", "limit", "guest", "invalid", "encode", "route"] {
        assert_eq!(of_message(class).happens, Happens::MessageRetries, "{class}");
        assert_eq!(of_message(class).own, class != "route", "{class}");
    }
    for row in MESSAGES {
        let class = if row.class.is_empty() { "trap" } else { row.class };
        let column = (row.known == Known::Column).then_some("{column}");
        let transform = (row.known == Known::Transform).then_some("{transform}");
        let text = hint(class, "7", column, transform);
        assert_eq!(text, row.sentence.replace("{id}", "7"));
    }
    assert!(hint("oversize", "7", Some("body"), None).contains("--column body"));
    assert!(hint("oversize", "7", Some("body"), Some("10-x.wasm")).contains("10-x.wasm"));
    assert!(hint("trap", "7", Some("body"), Some("10-x.wasm")).contains("10-x.wasm"));
    assert!(hint("refused", "7", None, Some("10-x.wasm")).contains("retry 7"));
}

/// The table of the documentation is this table.
#[test]
fn the_documentation_has_each_row() {
    let source = include_str!("../outcomes.rs");
    let documented: Vec<&str> =
        source.lines().filter_map(|line| line.strip_prefix("//! | ")).skip(2).collect();
    let rows = ANSWERS.len() + FAULTS.len() + CONDITIONS.len() + MESSAGES.len();
    assert_eq!(documented.len(), rows);
    for (row, line) in ANSWERS.iter().zip(&documented) {
        let landed = if row.may_have_landed { "perhaps" } else { "no" };
        let end = format!("| {} | {landed} | `{}` |", happens(row.happens), row.code);
        assert!(line.ends_with(&end), "{line} is not {end}");
        assert!(line.contains(row.s2) && line.contains(row.said), "{line}");
    }
    for (row, line) in FAULTS.iter().zip(&documented[ANSWERS.len()..]) {
        assert!(line.contains(row.code), "{line}");
    }
    let documented = &documented[ANSWERS.len() + FAULTS.len()..];
    for (row, line) in CONDITIONS.iter().zip(documented) {
        let landed = if row.may_have_landed { "perhaps" } else { "no" };
        let end = format!("| {} | {landed} | `{}` |", happens(row.happens), row.code);
        assert!(line.ends_with(&end), "{line} is not {end}");
    }
    for (row, line) in MESSAGES.iter().zip(&documented[CONDITIONS.len()..]) {
        assert!(line.contains(row.class) && line.contains(happens(row.happens)), "{line}");
    }
}

#[test]
fn a_missing_stream_is_corrected_where_it_is_named() {
    let answer = Answer::new(404, br#"{"code":"stream_not_found","message":"x"}"#, None);
    for (named, word) in [
        (Named::Sink, "`sink.stream`"),
        (Named::Route, "the transform that routes"),
        (Named::DeadLetters, "`dead_letters.stream`"),
    ] {
        let row = of_answer(Operation::Tail, &answer);
        let text = row.sentence(&Place { named, ..place() }, Operation::Tail, &answer);
        assert!(text.contains(word) && text.contains("create-stream"), "{text}");
        assert_eq!(text.contains("sink.stream"), named == Named::Sink, "{text}");
    }
}
