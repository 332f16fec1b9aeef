//! Other values inside of arrays and composites, with their punctuation and their quotes as they were. Pure.

use std::iter::Peekable;
use std::str::Chars;

use super::redact::{structural, value};
use crate::pg_type::Kind;

type Characters<'a> = Peekable<Chars<'a>>;

/// Elements that are quoted are redacted without their escapes, and escaped again. An unquoted `NULL`
/// stays one. What no message shows as an array, one with bounds, is text.
pub(super) fn array(element: &Kind, delimiter: char, type_name: &str, text: &str) -> String {
    if !text.starts_with('{') {
        return as_text(text);
    }
    let type_name = type_name.strip_prefix('_').unwrap_or(type_name);
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(next) = rest.peek().copied() {
        let is_punctuation = |character| matches!(character, '{' | '}') || character == delimiter;
        if is_punctuation(next) {
            out.push(next);
            rest.next();
        } else if next == '"' {
            let Some(content) = quoted(&mut rest) else { return as_text(text) };
            let escape = |character| matches!(character, '"' | '\\').then_some('\\');
            put_quoted(&mut out, &value(element, type_name, &content), escape);
        } else {
            let word = until(&mut rest, is_punctuation);
            match word.as_str() {
                "NULL" => out.push_str(&word),
                word => out.push_str(&value(element, type_name, word)),
            }
        }
    }
    out
}

/// The same for `(1,,"a b")`, whose attributes have a kind each.
pub(super) fn composite(attributes: &[(String, Kind)], text: &str) -> String {
    fields(attributes, text).unwrap_or_else(|| as_text(text))
}

/// Nothing where the text does not fit the attributes, which a message shows as text then.
fn fields(attributes: &[(String, Kind)], text: &str) -> Option<String> {
    let mut rest = text.strip_prefix('(')?.chars().peekable();
    let mut out = String::from("(");
    for (index, (_, kind)) in attributes.iter().enumerate() {
        if index > 0 {
            out.push(rest.next_if_eq(&',')?);
        }
        if rest.peek() == Some(&'"') {
            let content = quoted(&mut rest)?;
            let escape = |character| matches!(character, '"' | '\\').then_some(character);
            put_quoted(&mut out, &value(kind, "", &content), escape);
        } else {
            let word = until(&mut rest, |character| matches!(character, ',' | ')'));
            if !word.is_empty() {
                out.push_str(&value(kind, "", &word));
            }
        }
    }
    out.push(rest.next_if_eq(&')')?);
    rest.next().is_none().then_some(out)
}

fn as_text(text: &str) -> String {
    text.chars().map(structural).collect()
}

/// The content of a text in quotes: a backslash, and a quote before another one, escape what follows.
fn quoted(rest: &mut Characters<'_>) -> Option<String> {
    rest.next_if_eq(&'"')?;
    let mut content = String::new();
    loop {
        match rest.next()? {
            '\\' => content.push(rest.next()?),
            '"' => content.push(match rest.next_if_eq(&'"') {
                Some(quote) => quote,
                None => return Some(content),
            }),
            character => content.push(character),
        }
    }
}

fn put_quoted(out: &mut String, content: &str, escape: impl Fn(char) -> Option<char>) {
    out.push('"');
    for character in content.chars() {
        out.extend(escape(character));
        out.push(character);
    }
    out.push('"');
}

fn until(rest: &mut Characters<'_>, ends: impl Fn(char) -> bool) -> String {
    let mut word = String::new();
    while let Some(character) = rest.next_if(|character| !ends(*character)) {
        word.push(character);
    }
    word
}
