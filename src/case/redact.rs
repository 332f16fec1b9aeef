//! Other values of the same type and size. Pure.
//!
//! A message made of them takes as many bytes as the row's own, to the byte: what is escaped in JSON
//! stays escaped, what is a number stays a number of as many digits, a character becomes one of as many
//! bytes.

use super::nested;
use crate::message::interval_of_same_size;
use crate::pg_type::Kind;

/// A value in the place of this one, both as Postgres's text.
pub(super) fn value(kind: &Kind, type_name: &str, text: &str) -> String {
    match kind {
        // One bit: nothing else would have the same size.
        Kind::Bool => text.to_owned(),
        Kind::Integer | Kind::Float | Kind::Vector | Kind::Timestamp => digits(text),
        Kind::Interval => interval_of_same_size(text).unwrap_or_else(|| digits(text)),
        Kind::Timestamptz => match text.strip_suffix("+00") {
            // The zone is the session's, not the row's, and decides how the value is written.
            Some(time) => digits(time) + "+00",
            None => digits(text),
        },
        Kind::Json => json(text),
        Kind::Array { element, delimiter } => nested::array(element, *delimiter, type_name, text),
        Kind::Composite { attributes } => nested::composite(attributes, text),
        Kind::Text => plain(type_name, text),
    }
}

/// A value that differs from this redacted one in its last character that can be another.
pub(super) fn another(redacted: &str) -> String {
    const PAIRS: [(char, char); 7] =
        [('x', 'y'), ('1', '2'), ('a', 'b'), ('A', 'B'), ('é', 'è'), ('€', '₤'), ('😀', '😁')];
    let of = |character| PAIRS.iter().find(|(from, _)| *from == character).map(|(_, to)| *to);
    let mut characters: Vec<char> = redacted.chars().collect();
    if let Some((place, to)) =
        characters.iter_mut().rev().find_map(|place| of(*place).map(|to| (place, to)))
    {
        *place = to;
    }
    characters.into_iter().collect()
}

/// The text of a settings file with the strings replaced whose names say that they are secret.
/// Everything else is needed to replay.
pub(super) fn settings(text: &str) -> String {
    let Ok(mut table) = toml::from_str::<toml::Table>(text) else { return String::new() };
    for value in table.iter_mut().filter(|(name, _)| *name == "config").map(|(_, value)| value) {
        secrets(value);
    }
    toml::to_string(&table).unwrap_or_default()
}

fn secrets(value: &mut toml::Value) {
    match value {
        toml::Value::Table(table) => {
            for (name, value) in table.iter_mut() {
                if let toml::Value::String(text) = value
                    && is_secret(name)
                {
                    *text = "x".repeat(text.len());
                } else {
                    secrets(value);
                }
            }
        }
        toml::Value::Array(values) => values.iter_mut().for_each(secrets),
        toml::Value::String(_)
        | toml::Value::Integer(_)
        | toml::Value::Float(_)
        | toml::Value::Boolean(_)
        | toml::Value::Datetime(_) => {}
    }
}

fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["key", "secret", "token", "password", "salt"].iter().any(|word| name.contains(word))
}

/// Of the types whose text is free, every character; of the others, digits.
fn plain(type_name: &str, text: &str) -> String {
    match type_name {
        "numeric" | "money" | "date" | "time" | "timetz" | "bit" | "varbit" | "point" | "lseg"
        | "path" | "box" | "polygon" | "line" | "circle" | "int4range" | "numrange" | "tsrange"
        | "tstzrange" | "daterange" | "int8range" | "tid" | "xid" | "xid8" | "cid" | "pg_lsn" => {
            digits(text)
        }
        "uuid" | "bytea" | "inet" | "cidr" | "macaddr" | "macaddr8" => {
            text.chars().map(hexadecimal).collect()
        }
        _ => text.chars().map(free).collect(),
    }
}

fn digits(text: &str) -> String {
    text.chars().map(|character| if character.is_ascii_digit() { '1' } else { character }).collect()
}

fn hexadecimal(character: char) -> char {
    match character {
        '0'..='9' => '1',
        'a'..='f' => 'a',
        'A'..='F' => 'A',
        other => other,
    }
}

/// A character of as many bytes, in UTF-8 and in a JSON string.
fn free(character: char) -> char {
    match character {
        '"' | '\\' => character,
        character if character.is_control() => character,
        character => match character.len_utf8() {
            1 => 'x',
            2 => 'é',
            3 => '€',
            _ => '😀',
        },
    }
}

/// The same where a nested value is shown as text, whose punctuation stays.
pub(super) fn structural(character: char) -> char {
    match character {
        '{' | '}' | '(' | ')' | '[' | ']' | '"' | '\\' | ',' | ';' | ':' | '=' => character,
        '0'..='9' => '1',
        character => free(character),
    }
}

/// Strings and numbers of a JSON text; its structure, keys, booleans and nulls stay.
fn json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        if character != '"' {
            out.push(if character.is_ascii_digit() { '1' } else { character });
            rest = &rest[character.len_utf8()..];
            continue;
        }
        let end = string_end(rest);
        let (string, behind) = rest.split_at(end);
        if behind.trim_start_matches([' ', '\t', '\r', '\n']).starts_with(':') {
            out.push_str(string);
        } else {
            json_string(string, &mut out);
        }
        rest = behind;
    }
    out
}

/// Where the string ends that begins this text, behind its closing quote.
fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (index, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return index + 1,
            _ => {}
        }
    }
    text.len()
}

/// An escape of two bytes stays; one of six stays an escape of six, and no half of a pair.
fn json_string(string: &str, out: &mut String) {
    let mut characters = string.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => out.push('"'),
            '\\' => match characters.next() {
                Some('u') => {
                    for _ in 0..4 {
                        characters.next();
                    }
                    out.push_str("\\u0078");
                }
                Some(other) => {
                    out.push('\\');
                    out.push(other);
                }
                None => out.push('\\'),
            },
            character => out.push(free(character)),
        }
    }
}
