//! The settings file beside a module: `10-mask.toml` for `10-mask.wasm`. Pure: text in, settings
//! or one sentence out.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::hex;
use super::limits::{self, Limits};
use super::schema;
use crate::change::{Action, Change};

/// What happens to a message that a transform fails on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// It is parked, and its group waits behind it.
    #[default]
    Park,
    /// It goes on as it was before this transform, with the header `sb-passed`.
    Pass,
    /// It is not sent; this is counted and logged.
    Drop,
    /// The pipeline stands still at it until there is another chain.
    Halt,
}

/// Whether one instance sees many messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// An instance is used until it fails, has grown, or has seen some thousands of messages.
    #[default]
    Reuse,
    /// Each message gets a fresh one: nothing of one row can reach the next.
    Fresh,
}

/// A judgement of the host that a settings file may lift.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Judgement {
    #[default]
    On,
    Off,
}

/// A module's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Nothing: every table.
    tables: Option<Vec<TablePattern>>,
    /// Nothing: every action.
    actions: Option<Vec<Action>>,
    /// For the module's `init`, as JSON text.
    pub(crate) config: String,
    pub(crate) limits: Limits,
    pub(crate) on_error: OnError,
    pub(crate) isolation: Isolation,
    /// The environment variables that it is given, by name.
    pub(crate) env: Vec<String>,
    /// Whether a version is refused that breaks what the chain before handles.
    pub(crate) vet: Judgement,
    /// Whether it may drop parked messages, or everything, without being refused for it.
    pub(crate) may_drop: bool,
    /// Whether a version is taken back that fails more than the chain before it.
    pub(crate) rollback: Judgement,
    /// SHA-256 of the text that these were read from, so that any change of the file counts.
    digest: String,
}

/// `schema.table`, `schema.*`, or `table` in any schema.
#[derive(Clone, Debug, PartialEq, Eq)]
struct TablePattern {
    schema: Option<String>,
    /// Nothing: every table of the schema.
    name: Option<String>,
}

/// The settings file is not usable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text is never quoted: a configuration may hold a key.
    #[error("line {line}: {reason}")]
    Syntax { line: usize, reason: String },
    #[error("`{key}`: {reason}")]
    Value { key: &'static str, reason: String },
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Raw {
    tables: Option<Vec<String>>,
    actions: Option<Vec<Action>>,
    config: toml::Table,
    limits: limits::Raw,
    on_error: OnError,
    isolation: Isolation,
    wasi: RawWasi,
    vet: Judgement,
    may_drop: bool,
    rollback: Judgement,
}

/// What a module is granted of WASI beyond clocks, random numbers and output.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawWasi {
    env: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self::parse("").expect("the empty text sets nothing, and everything has a default")
    }
}

impl Settings {
    /// Reads the text of a settings file.
    ///
    /// # Errors
    ///
    /// For text that is not TOML, for keys that mean nothing, and for values out of their range.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let raw: Raw = toml::from_str(text).map_err(|error| {
            let offset = error.span().map_or(0, |span| span.start);
            let line = line_of(text, offset);
            // Only the first line of the message: the rest may show the file's text.
            let reason = error.message().lines().next().unwrap_or("not TOML").to_owned();
            Error::Syntax { line, reason }
        })?;
        let tables = raw
            .tables
            .map(|tables| match tables.as_slice() {
                [] => Err(Error::Value {
                    key: "tables",
                    reason: "an empty list would never match; leave the key out for every table"
                        .into(),
                }),
                tables => tables.iter().map(|table| TablePattern::parse(table)).collect(),
            })
            .transpose()?;
        if raw.actions.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::Value {
                key: "actions",
                reason: "an empty list would never match; leave the key out for every action"
                    .into(),
            });
        }
        for name in &raw.wasi.env {
            if name.is_empty() || name.contains(['=', '\0']) {
                let reason = "a name of a variable is not empty and has no `=`".to_owned();
                return Err(Error::Value { key: "wasi.env", reason });
            }
        }
        Ok(Self {
            tables,
            actions: raw.actions,
            config: json(toml::Value::Table(raw.config))?.to_string(),
            limits: raw.limits.check()?,
            on_error: raw.on_error,
            isolation: raw.isolation,
            env: raw.wasi.env,
            vet: raw.vet,
            may_drop: raw.may_drop,
            rollback: raw.rollback,
            digest: hex(&Sha256::digest(text)),
        })
    }

    /// The settings of a module that says, or does not say, which it takes.
    ///
    /// # Errors
    ///
    /// As [`Self::parse`], and where `config` is not what the module takes.
    pub(super) fn of(text: &str, schema: Option<&serde_json::Value>) -> Result<Self, Error> {
        let settings = Self::parse(text)?;
        if let Some(schema) = schema {
            schema::check(schema, text)?;
        }
        Ok(settings)
    }

    /// Whether the module is to see this change.
    pub(crate) fn apply_to(&self, change: &Change) -> bool {
        let table = &change.table;
        self.actions.as_ref().is_none_or(|actions| actions.contains(&change.action))
            && self.tables.as_ref().is_none_or(|patterns| {
                patterns.iter().any(|pattern| pattern.matches(&table.schema, &table.name))
            })
    }

    /// SHA-256 of the settings file's text, in hexadecimal.
    pub(crate) fn digest(&self) -> &str {
        &self.digest
    }
}

impl TablePattern {
    fn parse(text: &str) -> Result<Self, Error> {
        let invalid = || Error::Value {
            key: "tables",
            reason: format!(
                "`{text}` is not a table; write `schema.table`, `schema.*`, or `table` for any \
                 schema"
            ),
        };
        match text.split_once('.') {
            None if text.is_empty() || text.contains('*') => Err(invalid()),
            None => Ok(Self { schema: None, name: Some(text.into()) }),
            Some((schema, name)) if schema.is_empty() || name.is_empty() => Err(invalid()),
            Some((schema, "*")) => Ok(Self { schema: Some(schema.into()), name: None }),
            Some((schema, name)) if schema.contains('*') || name.contains('*') => Err(invalid()),
            Some((schema, name)) => {
                Ok(Self { schema: Some(schema.into()), name: Some(name.into()) })
            }
        }
    }

    fn matches(&self, schema: &str, name: &str) -> bool {
        self.schema.as_deref().is_none_or(|own| own == schema)
            && self.name.as_deref().is_none_or(|own| own == name)
    }
}

/// The line of a place in a text, from 1.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// The table as JSON. Dates and times become strings, because JSON has none.
fn json(value: toml::Value) -> Result<serde_json::Value, Error> {
    Ok(match value {
        toml::Value::String(text) => text.into(),
        toml::Value::Integer(number) => number.into(),
        toml::Value::Float(number) => serde_json::Number::from_f64(number)
            .ok_or_else(|| Error::Value {
                key: "config",
                reason: format!("JSON has no {number}; write a finite number or a string"),
            })?
            .into(),
        toml::Value::Boolean(value) => value.into(),
        toml::Value::Datetime(time) => time.to_string().into(),
        toml::Value::Array(values) => {
            values.into_iter().map(json).collect::<Result<Vec<_>, _>>()?.into()
        }
        toml::Value::Table(table) => serde_json::Value::Object(
            table
                .into_iter()
                .map(|(key, value)| Ok((key, json(value)?)))
                .collect::<Result<_, Error>>()?,
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Grouping, Position, Table};
    use std::sync::Arc;

    fn change(schema: &str, name: &str, action: Action) -> Change {
        let table = Table {
            oid: 1,
            schema: schema.into(),
            name: name.into(),
            columns: Vec::new(),
            grouping: Grouping::Key,
        };
        Change {
            position: Position::default(),
            commit_timestamp_us: 0,
            action,
            table: Arc::new(table),
            new: None,
            old: None,
        }
    }

    fn check_error(text: &str, expected: &str) {
        assert_eq!(Settings::parse(text).unwrap_err().to_string(), expected, "{text}");
    }

    #[test]
    fn everything_has_a_default() {
        let settings = Settings::parse("").unwrap();
        assert_eq!(settings.config, "{}");
        assert_eq!(settings.limits, Limits::default());
        assert_eq!(settings.on_error, OnError::Park);
        assert_eq!(settings.isolation, Isolation::Reuse);
        assert!(settings.env.is_empty());
        assert!(settings.apply_to(&change("a", "b", Action::Truncate)));
    }

    #[test]
    fn the_example_is_every_setting_at_its_default_and_each_of_its_lines_holds() {
        let text = include_str!("../../examples/transform.toml");
        let settings = Settings::parse(text).unwrap();
        let defaults = Settings { digest: settings.digest.clone(), ..Settings::default() };
        assert_eq!(settings, defaults);
        // The settings, as opposed to the prose, are what could be a line of TOML.
        let mut keys = 0;
        let with_values: Vec<&str> = text
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if rest.split(' ').nth(1) == Some("=") => {
                    keys += 1;
                    rest
                }
                _ => line,
            })
            .collect();
        assert_eq!(keys, 17);
        let settings = Settings::parse(&with_values.join("\n")).unwrap();
        assert_eq!(settings.env, ["MASK_KEY"]);
        assert_eq!(settings.isolation, Isolation::Fresh);
        assert!(settings.may_drop);
        assert_eq!((settings.vet, settings.rollback), (Judgement::Off, Judgement::Off));
        assert_eq!(settings.config, r#"{"columns":["password"]}"#);
    }

    #[test]
    fn config_becomes_json() {
        let settings = Settings::parse(
            "[config]\ncolumns = [\"a\", \"b\"]\nlevel = 3\nratio = 0.5\nsince = 2026-01-02\n\
             on = true\n[config.nested]\nkey = \"v\"\n",
        )
        .unwrap();
        assert_eq!(
            settings.config,
            r#"{"columns":["a","b"],"level":3,"nested":{"key":"v"},"on":true,"ratio":0.5,"since":"2026-01-02"}"#
        );
    }

    #[test]
    fn filters_choose_tables_and_actions() {
        let settings = Settings::parse(
            "tables = [\"public.a\", \"audit.*\", \"any\"]\nactions = [\"insert\", \"update\"]",
        )
        .unwrap();
        let check = |schema, name, action, expected| {
            assert_eq!(
                settings.apply_to(&change(schema, name, action)),
                expected,
                "{schema}.{name}"
            );
        };
        check("public", "a", Action::Insert, true);
        check("public", "b", Action::Insert, false);
        check("other", "a", Action::Insert, false);
        check("audit", "whatever", Action::Update, true);
        check("other", "any", Action::Update, true);
        check("public", "a", Action::Delete, false);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        check_error(
            "on_error = \"park\"\ncolumn = 1\n",
            "line 2: unknown field `column`, expected one of `tables`, `actions`, `config`, \
             `limits`, `on_error`, `isolation`, `wasi`, `vet`, `may_drop`, `rollback`",
        );
        check_error(
            "[limits]\n\nmemory = 1",
            "line 3: unknown field `memory`, expected one of `memory_mib`, `time_ms`, `call_mib`, \
             `edits_mib`, `handles`, `instances`, `table_elements`, `log_lines_per_second`",
        );
        check_error(
            "on_error = \"ignore\"",
            "line 1: unknown variant `ignore`, expected one of `park`, `pass`, `drop`, `halt`",
        );
        check_error("vet = \"no\"", "line 1: unknown variant `no`, expected `on` or `off`");
        check_error("[limits]\ntime_ms = 0", "`limits.time_ms`: 0 is not between 1 and 60000");
        check_error(
            "[limits]\nmemory_mib = 2000",
            "`limits.memory_mib`: 2000 is not between 1 and 1024",
        );
        check_error(
            "isolation = \"shared\"",
            "line 1: unknown variant `shared`, expected `reuse` or `fresh`",
        );
        check_error("[wasi]\nfiles = [\"/\"]", "line 2: unknown field `files`, expected `env`");
        check_error(
            "[wasi]\nenv = [\"A=B\"]",
            "`wasi.env`: a name of a variable is not empty and has no `=`",
        );
        check_error(
            "tables = []",
            "`tables`: an empty list would never match; leave the key out for every table",
        );
        check_error(
            "tables = [\"*\"]",
            "`tables`: `*` is not a table; write `schema.table`, `schema.*`, or `table` for any \
             schema",
        );
        check_error(
            "[config]\nx = nan",
            "`config`: JSON has no NaN; write a finite number or a string",
        );
        assert!(matches!(Settings::parse("# a\nb"), Err(Error::Syntax { line: 2, .. })));
    }

    #[test]
    fn any_change_of_the_text_is_another_digest() {
        let digest = |text| Settings::parse(text).unwrap().digest;
        assert_eq!(digest("on_error = \"park\""), digest("on_error = \"park\""));
        assert_ne!(digest("on_error = \"park\""), digest("on_error = \"pass\""));
    }
}
