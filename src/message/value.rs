//! Postgres's text of a value, as JSON. The only mapper, for the stream and for backfills.
//!
//! It relies on the session settings that the source pins: `timezone=UTC`, `datestyle=ISO`,
//! `intervalstyle=postgres`, `extra_float_digits=3`, `bytea_output=hex`. It writes valid JSON
//! only: a text that does not fit its kind, which those settings exclude, becomes a JSON string
//! of that text, so that nothing is lost and nobody has to give a row up.

use super::interval::Interval;
use super::nested::{write_array, write_composite};
use super::out::Out;
use super::string::{NotUtf8, check_utf8, write_string};
use crate::pg_type::Kind;

/// Writes a value that is not NULL. What was written before an error is of no use.
pub(super) fn write_value(out: &mut impl Out, kind: &Kind, text: &[u8]) -> Result<(), NotUtf8> {
    // Postgres has checked json and jsonb; parsing them again costs precision and time. The type
    // number in the stream is the one of the row, so that a json column never holds other text.
    if let (Kind::Json, false) = (kind, text.is_empty()) {
        check_utf8(text)?;
        out.put(text);
        return Ok(());
    }
    write_checked(out, kind, text)
}

/// The JSON of a value that is not NULL, as every message shows it.
#[must_use]
pub fn value_json(kind: &Kind, text: &str) -> String {
    let mut json = Vec::with_capacity(text.len() + 2);
    write_value(&mut json, kind, text.as_bytes()).expect("a str is UTF-8");
    String::from_utf8(json).expect("JSON of UTF-8 is UTF-8")
}

/// Like [`write_value`], for a value inside of another. A composite type's attributes are those
/// of today's catalogue, not of the row, so that even json is checked.
pub(super) fn write_checked(out: &mut impl Out, kind: &Kind, text: &[u8]) -> Result<(), NotUtf8> {
    match kind {
        Kind::Text => return write_string(out, text),
        Kind::Bool => match text {
            b"t" => out.put(b"true"),
            b"f" => out.put(b"false"),
            _ => return write_string(out, text),
        },
        Kind::Integer | Kind::Float => {
            if !is_number(text) {
                return write_string(out, text);
            }
            out.put(text);
        }
        Kind::Json => {
            if serde_json::from_slice::<&serde_json::value::RawValue>(text).is_err() {
                return write_string(out, text);
            }
            out.put(text);
        }
        Kind::Timestamp => {
            if !is_timestamp(text) {
                return write_string(out, text);
            }
            write_timestamp(out, text, b"");
            out.put(b"\"");
        }
        Kind::Timestamptz => match text.strip_suffix(b"+00") {
            Some(utc) if is_timestamp(utc) => {
                // `.000000`, from what is already there: nothing, or a dot and 1 to 6 digits.
                let padding = match utc.len() {
                    TO_SECONDS => ".000000",
                    length => &"000000"[length - TO_SECONDS - 1..],
                };
                write_timestamp(out, utc, padding.as_bytes());
                out.put(b"Z\"");
            }
            _ => return write_string(out, text),
        },
        Kind::Interval => match Interval::parse(text) {
            Some(interval) => interval.write(out),
            None => return write_string(out, text),
        },
        Kind::Vector => {
            if !is_vector(text) {
                return write_string(out, text);
            }
            out.put(text);
        }
        Kind::Array { element, delimiter } => return write_array(out, element, *delimiter, text),
        Kind::Composite { attributes } => return write_composite(out, attributes, text),
    }
    Ok(())
}

/// The length of `2025-06-11 01:19:22`.
const TO_SECONDS: usize = 19;

/// Is it `2025-06-11 01:19:22` with up to six more digits? Infinities, years before Christ and
/// years of more than four digits are not.
fn is_timestamp(text: &[u8]) -> bool {
    let Some((whole, fraction)) = text.split_first_chunk::<TO_SECONDS>() else { return false };
    let pattern = b"0000-00-00 00:00:00";
    let whole = whole.iter().zip(pattern).all(|(byte, pattern)| match pattern {
        b'0' => byte.is_ascii_digit(),
        separator => byte == separator,
    });
    whole
        && match fraction {
            [] => true,
            [b'.', digits @ ..] => {
                (1..=6).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit)
            }
            _ => false,
        }
}

/// Writes an opening quote and the timestamp with a `T`.
fn write_timestamp(out: &mut impl Out, text: &[u8], padding: &[u8]) {
    let (date, time) = text.split_at(10);
    out.put(b"\"");
    out.put(date);
    out.put(b"T");
    out.put(&time[1..]);
    out.put(padding);
}

/// Is it a number as JSON writes it? Postgres's integers and finite floats are.
fn is_number(text: &[u8]) -> bool {
    let unsigned = text.strip_prefix(b"-").unwrap_or(text);
    let integer = digits(unsigned);
    if integer == 0 || (integer > 1 && unsigned[0] == b'0') {
        return false;
    }
    let mut rest = &unsigned[integer..];
    if let Some(fraction) = rest.strip_prefix(b".") {
        let length = digits(fraction);
        if length == 0 {
            return false;
        }
        rest = &fraction[length..];
    }
    if let [b'e' | b'E', exponent @ ..] = rest {
        let exponent = match exponent {
            [b'+' | b'-', exponent @ ..] => exponent,
            exponent => exponent,
        };
        return !exponent.is_empty() && digits(exponent) == exponent.len();
    }
    rest.is_empty()
}

fn digits(text: &[u8]) -> usize {
    text.iter().take_while(|byte| byte.is_ascii_digit()).count()
}

/// Is it `[1,2.5,-3e-05]`? That is JSON already.
fn is_vector(text: &[u8]) -> bool {
    let inner = text.strip_prefix(b"[").and_then(|text| text.strip_suffix(b"]"));
    inner.is_some_and(|inner| inner.is_empty() || inner.split(|byte| *byte == b',').all(is_number))
}

#[cfg(test)]
mod tests {
    use super::super::out::{Capped, Counter};
    use super::*;
    use proptest::prelude::*;

    fn json(kind: &Kind, text: &[u8]) -> Result<String, NotUtf8> {
        let mut written = Vec::new();
        write_value(&mut written, kind, text)?;
        let mut counter = Counter::default();
        write_value(&mut counter, kind, text)?;
        assert_eq!(counter.written(), written.len() as u64, "{kind:?}");
        let half = written.len() / 2;
        let mut capped = Capped::new(half, half);
        write_value(&mut capped, kind, text)?;
        assert_eq!(capped.into_stored().0, &written[..half], "{kind:?}");
        Ok(String::from_utf8(written).unwrap())
    }

    fn check(kind: &Kind, text: &str, expected: &str) {
        assert_eq!(json(kind, text.as_bytes()).as_deref(), Ok(expected), "{kind:?} {text}");
    }

    /// The text stays as it is, as a JSON string.
    fn check_text(kind: &Kind, text: &str) {
        check(kind, text, &serde_json::to_string(text).unwrap());
    }

    fn array(element: Kind) -> Kind {
        Kind::Array { element: Box::new(element), delimiter: ',' }
    }

    fn composite(attributes: &[(&str, Kind)]) -> Kind {
        let attribute = |(name, kind): &(&str, Kind)| ((*name).to_owned(), kind.clone());
        Kind::Composite { attributes: attributes.iter().map(attribute).collect() }
    }

    #[test]
    fn booleans_and_numbers() {
        check(&Kind::Bool, "t", "true");
        check(&Kind::Bool, "f", "false");
        check_text(&Kind::Bool, "true");
        for integer in ["0", "-1", "32767", "9223372036854775807", "-9223372036854775808"] {
            check(&Kind::Integer, integer, integer);
        }
        for float in ["0", "-0", "1.5", "1e+20", "-1.7976931348623157e+308", "5e-324", "1E5"] {
            check(&Kind::Float, float, float);
        }
        for other in ["NaN", "Infinity", "-Infinity"] {
            check_text(&Kind::Float, other);
        }
        for other in ["", "-", "01", "+1", "1.", ".5", "1e", "1e+", "1 ", "0x1", "1e5.5"] {
            check_text(&Kind::Integer, other);
        }
    }

    #[test]
    fn json_is_embedded_as_it_is() {
        for json in [
            r#"{"b": 1, "a": 1, "a": 2}"#,
            "1e400",
            "123456789012345678901234567890",
            r#""\ud800""#,
            r#""\u0000""#,
            "[1,\n 2]",
            "null",
        ] {
            check(&Kind::Json, json, json);
        }
        check_text(&Kind::Json, "");
        assert_eq!(json(&Kind::Json, b"\"\xff\""), Err(NotUtf8));
    }

    #[test]
    fn timestamps() {
        let plain = Kind::Timestamp;
        check(&plain, "2025-06-11 01:19:22.402358", r#""2025-06-11T01:19:22.402358""#);
        check(&plain, "2025-06-11 01:19:22", r#""2025-06-11T01:19:22""#);
        check(&plain, "0001-01-01 00:00:00.5", r#""0001-01-01T00:00:00.5""#);
        let zoned = Kind::Timestamptz;
        check(&zoned, "2025-06-11 01:19:22.402358+00", r#""2025-06-11T01:19:22.402358Z""#);
        check(&zoned, "2025-06-11 01:19:22.4+00", r#""2025-06-11T01:19:22.400000Z""#);
        check(&zoned, "2025-06-11 01:19:22+00", r#""2025-06-11T01:19:22.000000Z""#);
        for other in [
            "infinity",
            "-infinity",
            "0044-03-15 12:00:00 BC",
            "0044-03-15 12:00:00+00 BC",
            "10000-01-01 00:00:00",
            "294276-12-31 23:59:59.999999+00",
            "2025-06-11 01:19:22.",
            "2025-06-11 01:19:22.1234567",
            "2025-06-11",
            "",
        ] {
            check_text(&plain, other);
            check_text(&zoned, other);
        }
        check_text(&zoned, "2025-06-11 01:19:22+02");
    }

    #[test]
    fn intervals() {
        let expected = r#"{"months":14,"days":-3,"microseconds":14706789000}"#;
        check(&Kind::Interval, "1 year 2 mons -3 days +04:05:06.789", expected);
        check(&Kind::Interval, "00:00:00", r#"{"months":0,"days":0,"microseconds":0}"#);
        check_text(&Kind::Interval, "infinity");
    }

    #[test]
    fn everything_else_is_text() {
        for text in ["NaN", "5.99", "$1.00", "\\x00ff", "[2010-01-01,2020-12-31)", "24:00:00", ""] {
            check_text(&Kind::Text, text);
        }
        check(&Kind::Vector, "[1,2.5,-3e-05]", "[1,2.5,-3e-05]");
        check(&Kind::Vector, "[]", "[]");
        check_text(&Kind::Vector, "[1,]");
        check_text(&Kind::Vector, "{1:2}/5");
        assert_eq!(json(&Kind::Text, b"\xff"), Err(NotUtf8));
    }

    #[test]
    fn arrays() {
        let text = array(Kind::Text);
        check(&text, "{}", "[]");
        check(&text, r#"{a,NULL,"NULL",null,""}"#, r#"["a",null,"NULL","null",""]"#);
        check(&text, r#"{"a,b","{c}","\"q\" \\ e"," s "}"#, r#"["a,b","{c}","\"q\" \\ e"," s "]"#);
        check(&text, "{\"größer\n\"}", r#"["größer\n"]"#);
        let integer = array(Kind::Integer);
        check(&integer, "{{1,2},{NULL,-4}}", "[[1,2],[null,-4]]");
        check(&integer, "{{{{{{1}}}}}}", "[[[[[[1]]]]]]");
        check_text(&integer, "[0:1]={1,2}");
        check(&array(Kind::Bool), "{t,f}", "[true,false]");
        check(
            &array(Kind::Timestamptz),
            r#"{"2025-06-11 01:19:22+00",infinity}"#,
            r#"["2025-06-11T01:19:22.000000Z","infinity"]"#,
        );
        check(&array(Kind::Json), r#"{"{\"a\": [1, \"x\"]}",1}"#, r#"[{"a": [1, "x"]},1]"#);
        let boxes = Kind::Array { element: Box::new(Kind::Text), delimiter: ';' };
        check(&boxes, "{(1,1),(0,0);(2,2),(1,1)}", r#"["(1,1),(0,0)","(2,2),(1,1)"]"#);
        for other in [
            "", "{", "}", "{1", "{1,", "{1,}", "{,1}", "{\"1}", "{\"1\\", "{1}x", "{1}{2}", "{a\"}",
        ] {
            check_text(&text, other);
        }
        check_text(&integer, "{{{{{{{1}}}}}}}");
        check_text(&integer, &"{".repeat(100_000));
        assert_eq!(json(&text, b"{\xff}"), Err(NotUtf8));
        let wide = Kind::Array { element: Box::new(Kind::Text), delimiter: '→' };
        check_text(&wide, "{a}");
    }

    #[test]
    fn composites() {
        let point = composite(&[("x", Kind::Integer), ("label \"l\"", Kind::Text)]);
        check(&point, "(1,a)", r#"{"x":1,"label \"l\"":"a"}"#);
        check(&point, "(,)", r#"{"x":null,"label \"l\"":null}"#);
        check(&point, r#"(-1,"")"#, r#"{"x":-1,"label \"l\"":""}"#);
        check(&point, r#"(1,"a ""b"" \\ (c), d")"#, r#"{"x":1,"label \"l\"":"a \"b\" \\ (c), d"}"#);
        check(&composite(&[]), "()", "{}");
        check(&composite(&[("a", Kind::Text)]), "()", r#"{"a":null}"#);
        let nested = composite(&[("points", array(point.clone())), ("tags", array(Kind::Text))]);
        check(
            &nested,
            r#"("{""(1,a)"",""(2,\\""b c\\"")""}","{x,NULL,""y z""}")"#,
            r#"{"points":[{"x":1,"label \"l\"":"a"},{"x":2,"label \"l\"":"b c"}],"tags":["x",null,"y z"]}"#,
        );
        check(&array(point.clone()), r#"{"(1,a)",NULL}"#, r#"[{"x":1,"label \"l\"":"a"},null]"#);
        for other in ["", "(", "(1)", "(1,a", "(1,a,b)", "(1,a)x", "1,a", "(1,\"a)", "()"] {
            check_text(&point, other);
        }
        // The type was altered since the row was written: its json attribute meets other text.
        let altered = composite(&[("doc", Kind::Json), ("deep", nested)]);
        check(&altered, "(text,)", r#"{"doc":"text","deep":null}"#);
        check(&altered, r#"("{""a"": 1}",odd)"#, r#"{"doc":{"a": 1},"deep":"odd"}"#);
    }

    fn any_kind() -> impl Strategy<Value = Kind> {
        let leaf = prop_oneof![
            Just(Kind::Bool),
            Just(Kind::Integer),
            Just(Kind::Float),
            Just(Kind::Timestamp),
            Just(Kind::Timestamptz),
            Just(Kind::Interval),
            Just(Kind::Vector),
            Just(Kind::Text),
        ];
        leaf.prop_recursive(3, 8, 3, |inner| {
            // json stands here alone: outside of other values it is trusted.
            let inside = prop_oneof![4 => inner, 1 => Just(Kind::Json)];
            prop_oneof![
                inside.clone().prop_map(array),
                prop::collection::vec(("[a-c\"]{0,3}", inside), 0..3)
                    .prop_map(|attributes| Kind::Composite { attributes }),
            ]
        })
    }

    /// What `array_out` does to an array of text.
    fn array_text(elements: &[Option<String>]) -> String {
        let quoted = |element: &Option<String>| match element {
            None => "NULL".to_owned(),
            Some(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
        };
        format!("{{{}}}", elements.iter().map(quoted).collect::<Vec<_>>().join(","))
    }

    /// What `record_out` does to a row of text.
    fn record_text(fields: &[Option<String>]) -> String {
        let quoted = |field: &Option<String>| match field {
            None => String::new(),
            Some(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\"\"")),
        };
        format!("({})", fields.iter().map(quoted).collect::<Vec<_>>().join(","))
    }

    proptest! {
        #[test]
        fn any_text_of_any_kind_becomes_valid_json(
            kind in any_kind(),
            text in r#"[-{}()\[\],;"\\a-cNULtf0-2:. +=Te]{0,24}|.{0,16}"#,
        ) {
            let json = json(&kind, text.as_bytes()).unwrap();
            let parsed: Result<serde::de::IgnoredAny, _> = serde_json::from_str(&json);
            prop_assert!(parsed.is_ok(), "{} of {:?}", json, kind);
        }

        #[test]
        fn arrays_and_rows_read_back(elements in prop::collection::vec(any::<Option<String>>(), 1..5)) {
            let read = json(&array(Kind::Text), array_text(&elements).as_bytes()).unwrap();
            let read: Vec<Option<String>> = serde_json::from_str(&read).unwrap();
            prop_assert_eq!(&read, &elements);

            let kind = Kind::Composite {
                attributes: (0..elements.len()).map(|at| (at.to_string(), Kind::Text)).collect(),
            };
            let read = json(&kind, record_text(&elements).as_bytes()).unwrap();
            let read: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&read).unwrap();
            for (at, element) in elements.iter().enumerate() {
                prop_assert_eq!(&read[&at.to_string()], &serde_json::json!(element));
            }

            let nested = array_text(&[Some(record_text(&elements)), None]);
            let read = json(&array(kind), nested.as_bytes()).unwrap();
            let read: Vec<Option<serde_json::Map<String, serde_json::Value>>> =
                serde_json::from_str(&read).unwrap();
            prop_assert_eq!(read.len(), 2);
            prop_assert_eq!(&read[0].as_ref().unwrap()["0"], &serde_json::json!(elements[0]));
        }
    }
}
