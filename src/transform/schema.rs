//! What a module says about its settings: a JSON Schema of the table `config`, in its custom section
//! `sluicebox:settings`. The SDK writes one; tools for WebAssembly can add one to any module.
//!
//! It is shown, and the settings are held against it before the module is started, because only the
//! host knows on which line a key is. What the schema does not say, or says by keywords that are not
//! looked at here, is the module's own affair: it is given the settings in any case. Pure.

use serde_json::Value;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use wasmparser::{Parser, Payload};

use super::settings::{Error, line_of};
use crate::config::nearest;

/// The custom section's name.
const SECTION: &str = "sluicebox:settings";

/// A longer description is none: nobody wrote it for a reader.
const SECTION_BYTES_MAX: usize = 256 * 1024;

/// How deep settings are looked into. TOML's reader has a limit of its own far above it.
const DEPTH_MAX: usize = 32;

/// From the first section of that name, in the module itself or in one that a component holds.
pub(super) fn of(bytes: &[u8]) -> Option<Value> {
    let section = Parser::new(0).parse_all(bytes).map_while(Result::ok).find_map(|payload| {
        let Payload::CustomSection(section) = payload else { return None };
        (section.name() == SECTION).then(|| section.data())
    })?;
    let section = section.get(..section.len().min(SECTION_BYTES_MAX))?;
    serde_json::from_slice(section).ok()
}

/// Holds a settings file's `config` against a module's schema. The text is TOML: it was read before.
pub(super) fn check(schema: &Value, text: &str) -> Result<(), Error> {
    let Ok(document) = DeTable::parse(text) else { return Ok(()) };
    let empty = DeTable::new();
    let table = match document.get_ref().get("config").map(Spanned::get_ref) {
        Some(DeValue::Table(table)) => table,
        None => &empty,
        Some(_) => return Ok(()),
    };
    // Where there is no such table, its place is the file's first line.
    let at = document.get_ref().get("config").map_or(0, |config| config.span().start);
    check_table(schema, table, "config", at, 0).map_err(|(offset, reason)| {
        let line = line_of(text, offset);
        Error::Syntax { line, reason }
    })
}

type Wrong = (usize, String);

fn check_table(
    schema: &Value,
    table: &DeTable<'_>,
    path: &str,
    at: usize,
    depth: usize,
) -> Result<(), Wrong> {
    let empty = serde_json::Map::new();
    let known = schema["properties"].as_object().unwrap_or(&empty);
    let is_closed = schema["additionalProperties"] == false && schema["properties"].is_object();
    for (key, value) in table.iter() {
        let name: &str = key.get_ref();
        match known.get(name) {
            Some(schema) => check_value(schema, value, &format!("{path}.{name}"), depth + 1)?,
            None if is_closed => {
                return Err((key.span().start, unknown(path, name, known)));
            }
            None => {}
        }
    }
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    for name in required {
        if !table.contains_key(name) {
            return Err((at, format!("`{path}.{name}` is missing{}", meaning(&known.get(name)))));
        }
    }
    Ok(())
}

fn check_value(
    schema: &Value,
    value: &Spanned<DeValue<'_>>,
    path: &str,
    depth: usize,
) -> Result<(), Wrong> {
    let at = value.span().start;
    let wrong = |what: String| Err((at, format!("`{path}` must be {what}")));
    if depth > DEPTH_MAX {
        return Ok(());
    }
    if let Some(kinds) = kinds(&schema["type"])
        && !kinds.iter().any(|kind| is_of(value.get_ref(), kind))
    {
        return wrong(listed(kinds.iter().map(|kind| word(kind).to_owned())));
    }
    if let (Some(choices), DeValue::String(text)) = (schema["enum"].as_array(), value.get_ref())
        && !choices.iter().any(|choice| choice.as_str() == Some(text))
    {
        return wrong(listed(choices.iter().map(Value::to_string)));
    }
    match value.get_ref() {
        DeValue::Table(table) => check_table(schema, table, path, at, depth),
        DeValue::Array(values) => {
            let items = &schema["items"];
            values.iter().try_for_each(|value| check_value(items, value, path, depth + 1))
        }
        DeValue::String(_)
        | DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_) => Ok(()),
    }
}

fn unknown(path: &str, name: &str, known: &serde_json::Map<String, Value>) -> String {
    let keys = || known.keys().map(String::as_str);
    let mend = match nearest(name, keys()) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => format!("the module takes nothing in `{path}`"),
        None => format!("the module takes {}", keys().map(quoted).collect::<Vec<_>>().join(", ")),
    };
    format!("`{path}.{name}` is no setting of this module; {mend}")
}

fn quoted(word: &str) -> String {
    format!("`{word}`")
}

/// What the schema says of a setting, behind a colon.
fn meaning(schema: &Option<&Value>) -> String {
    match schema.and_then(|schema| schema["description"].as_str()) {
        Some(text) => format!(": {text}"),
        None => String::new(),
    }
}

/// The kinds that a value may have, where the schema says so.
fn kinds(kind: &Value) -> Option<Vec<&str>> {
    match kind {
        Value::String(kind) => Some(vec![kind]),
        Value::Array(kinds) => kinds.iter().map(Value::as_str).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => None,
    }
}

/// Kinds that are not JSON Schema's fit everything.
fn is_of(value: &DeValue<'_>, kind: &str) -> bool {
    match kind {
        // Dates and times become strings.
        "string" => matches!(value, DeValue::String(_) | DeValue::Datetime(_)),
        "integer" => matches!(value, DeValue::Integer(_)),
        "number" => matches!(value, DeValue::Integer(_) | DeValue::Float(_)),
        "boolean" => matches!(value, DeValue::Boolean(_)),
        "array" => matches!(value, DeValue::Array(_)),
        "object" => matches!(value, DeValue::Table(_)),
        "null" => false,
        _ => true,
    }
}

fn word(kind: &str) -> &str {
    match kind {
        "string" => "a string",
        "integer" => "an integer",
        "number" => "a number",
        "boolean" => "true or false",
        "array" => "a list",
        "object" => "a table",
        other => other,
    }
}

fn listed(words: impl Iterator<Item = String>) -> String {
    words.collect::<Vec<_>>().join(" or ")
}

/// One line for each setting, for people: its name, what it may be, and what it means.
pub(crate) fn lines(schema: &Value) -> Vec<(String, String)> {
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let settings = schema["properties"].as_object().into_iter().flatten();
    let line = |(name, schema): (&String, &Value)| {
        let mut text = form(schema);
        if required.contains(&name.as_str()) {
            text.push_str(", required");
        }
        if let Some(default) = schema.get("default") {
            text.push_str(&format!(", {default} by default"));
        }
        text.push_str(&meaning(&Some(schema)));
        (name.clone(), text)
    };
    settings.map(line).collect()
}

fn form(schema: &Value) -> String {
    if let Some(choices) = schema["enum"].as_array() {
        return listed(choices.iter().map(Value::to_string));
    }
    match kinds(&schema["type"]).as_deref() {
        None => "anything".to_owned(),
        Some(["array"]) if schema["items"].is_object() => {
            format!("a list, each {}", form(&schema["items"]))
        }
        Some(["object"]) if schema["properties"].is_object() => {
            let keys = schema["properties"].as_object().into_iter().flatten();
            let keys: Vec<String> = keys.map(|(key, _)| quoted(key)).collect();
            format!("a table of {}", keys.join(", "))
        }
        Some(kinds) => listed(kinds.iter().map(|kind| word(kind).to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({
            "type": "object",
            "properties": {
                "columns": {"description": "What to hide.", "type": "array",
                    "items": {"type": "string"}},
                "method": {"default": "redact", "enum": ["redact", "hash"]},
                "level": {"type": "integer", "minimum": 0},
                "rules": {"type": "array", "items": {
                    "type": "object",
                    "properties": {"column": {"type": "string"}},
                    "required": ["column"],
                    "additionalProperties": false,
                }},
                "free": {"oneOf": []},
            },
            "required": ["columns"],
            "additionalProperties": false,
        })
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let said = super::check(&schema(), text).map_err(|error| error.to_string());
        assert_eq!(said.err().unwrap_or_default(), expected, "{text}");
    }

    #[test]
    fn settings_are_held_against_what_the_module_says() {
        check("[config]\ncolumns = [\"a\"]\nmethod = \"hash\"\nlevel = 3\nfree = 1\n", "");
        check("config = { columns = [], rules = [{ column = \"a\" }] }", "");
        check(
            "\n[config]\ncolumns = []\ncolumn = [\"a\"]\n",
            "line 4: `config.column` is no setting of this module; did you mean `columns`?",
        );
        check(
            "config.columns = []\nconfig.nonsense = 1\n",
            "line 2: `config.nonsense` is no setting of this module; the module takes `columns`, \
             `free`, `level`, `method`, `rules`",
        );
        check("", "line 1: `config.columns` is missing: What to hide.");
        check("\n[config]\nlevel = 1", "line 2: `config.columns` is missing: What to hide.");
        check("[config]\ncolumns = \"a\"", "line 2: `config.columns` must be a list");
        check("[config]\ncolumns = [\n1]", "line 3: `config.columns` must be a string");
        check(
            "[config]\ncolumns = []\nmethod = \"hush\"",
            "line 3: `config.method` must be \"redact\" or \"hash\"",
        );
        check(
            "[config]\ncolumns = []\n[[config.rules]]\nis = 1\n",
            "line 4: `config.rules.is` is no setting of this module; the module takes `column`",
        );
    }

    #[test]
    fn a_schema_that_says_nothing_or_nonsense_refuses_nothing() {
        let text = "[config]\nanything = [1, { a = 1.5 }]";
        for schema in [
            json!(true),
            json!({}),
            json!({"additionalProperties": false}),
            json!({"properties": {"anything": {"type": 1}}}),
            json!({"properties": {"anything": {"type": "imaginary", "items": 3}}}),
            json!([]),
        ] {
            assert_eq!(super::check(&schema, text), Ok(()), "{schema}");
        }
    }

    #[test]
    fn settings_are_shown_a_line_each() {
        let lines: Vec<String> =
            lines(&schema()).into_iter().map(|(name, text)| format!("{name}: {text}")).collect();
        assert_eq!(
            lines,
            [
                "columns: a list, each a string, required: What to hide.",
                "free: anything",
                "level: an integer",
                "method: \"redact\" or \"hash\", \"redact\" by default",
                "rules: a list, each a table of `column`",
            ]
        );
    }
}
